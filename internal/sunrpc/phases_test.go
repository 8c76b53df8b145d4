package sunrpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// repair makes closing a socket send nothing, as vip.CloseQuietly does.
func repair(rc syscall.RawConn) error {
	var serr error
	err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) })
	return errors.Join(err, serr)
}

// tcpState is the state of a client's socket.
func tcpState(t *testing.T, nc *net.TCPConn) uint8 {
	t.Helper()
	rc, err := nc.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var state uint8
	if err := rc.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Error(err)
			return
		}
		state = info.State
	}); err != nil {
		t.Fatal(err)
	}
	return state
}

// queueOnly ends the accept goroutines: connections stay in the accept queue.
func queueOnly(t *testing.T, s *Server) {
	t.Helper()
	ls, _ := s.sockets(all)
	for _, l := range ls {
		if err := l.ln.SetDeadline(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		<-l.done
	}
}

func wantXID(t *testing.T, nc net.Conn, xid uint32) {
	t.Helper()
	if rec := mustRecord(t, nc); binary.BigEndian.Uint32(rec) != xid {
		t.Errorf("xid %x, want %d", rec[:4], xid)
	}
}

// bed is a server with connections in every state, and another address's beside it.
type phaseBed struct {
	h *testHandler
	s *Server
	a netip.AddrPort

	idle, busy, mid, torn, queued, stuck, bystander *net.TCPConn
	other                                           *Server
}

func newPhaseBed(t *testing.T) *phaseBed {
	b := &phaseBed{h: newTestHandler()}
	b.s, b.a = startServer(t, Config{}, b.h)
	var oa netip.AddrPort
	b.other, oa = startServer(t, Config{}, newTestHandler())
	b.idle, b.busy, b.mid, b.torn = dialRaw(t, b.a), dialRaw(t, b.a), dialRaw(t, b.a), dialRaw(t, b.a)
	b.stuck, b.bystander = dialRaw(t, b.a), dialRaw(t, oa)
	for _, nc := range []net.Conn{b.idle, b.busy, b.mid, b.torn, b.stuck, b.bystander} {
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	return b
}

// load brings the connections into their states.
func (b *phaseBed) load(t *testing.T) {
	mustWrite(t, b.busy, append(record(callMsg(2, procHold)), record(callMsg(3, procHold))...))
	<-b.h.got
	<-b.h.got
	big := record(callMsg(4, procSink, make([]byte, 500_000)...))
	mustWrite(t, b.mid, big[:300_000])
	mustWrite(t, b.torn, big[:2])
	eventually(t, "records begun", func() bool {
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		n := 0
		for c := range b.s.conns {
			if c.partial.Load() {
				n++
			}
		}
		return n == 2
	})
	// The rest of the record comes with a call behind it, which is not to be read.
	queueOnly(t, b.s)
	b.queued = dialRaw(t, b.a)
	mustWrite(t, b.queued, record(callMsg(7, procEcho)))
}

func (b *phaseBed) clog(t *testing.T) {
	for i := range uint32(30) {
		mustWrite(t, b.stuck, record(callMsg(i, procReadGo, words(MaxPayload)...)))
	}
	eventually(t, "replies waiting", func() bool {
		n := int64(0)
		for _, a := range b.s.Stats().Addrs {
			n += a.OutBytes
		}
		return n > 0
	})
}

func (b *phaseBed) checkBystander(t *testing.T) {
	t.Helper()
	mustWrite(t, b.bystander, record(callMsg(9, procEcho)))
	wantXID(t, b.bystander, 9)
}

func wantHeld(t *testing.T, a netip.AddrPort) {
	t.Helper()
	d := net.Dialer{Timeout: 100 * time.Millisecond}
	nc, err := d.Dial("tcp", a.String())
	if err == nil {
		_ = nc.Close()
		t.Error("connected to a held port")
	} else if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		t.Errorf("held port: %v, want a time-out", err)
	}
}

// TestPhasesHalfClose goes through the phases with clients that cooperate.
// 004.10, 004.11, 004.12, 004.14, 004.15, 004.16, 004.17, 004.18, 004.23
func TestPhasesHalfClose(t *testing.T) {
	b := newPhaseBed(t)
	b.load(t)
	ctx := testCtx(t)
	if err := b.s.Refuse(true); err != nil {
		t.Fatal(err)
	}
	if n := len(b.s.Conns()); n != 6 {
		t.Errorf("%d connections, want 6 with the one from the accept queue", n)
	}
	wantHeld(t, b.a)
	// It was taken, and calls are answered while new connections are refused.
	wantXID(t, b.queued, 7)
	quiesced := make(chan Quiesced, 1)
	go func() { quiesced <- b.s.Quiesce(ctx) }()
	eventually(t, "reading stopped", func() bool {
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		n := 0
		for c := range b.s.conns {
			if c.quiet.Load() {
				n++
			}
		}
		return n >= 3 // idle, stuck, queued; torn follows
	})
	mustWrite(t, b.idle, record(callMsg(8, procEcho))) // is not read any more
	big := record(callMsg(4, procSink, make([]byte, 500_000)...))
	mustWrite(t, b.mid, append(big[300_000:], record(callMsg(5, 0))...))
	wantXID(t, b.mid, 4)
	select {
	case q := <-quiesced:
		t.Fatalf("quiet with calls in progress: %+v", q)
	default:
	}
	b.h.release()
	wantXID(t, b.busy, 3)
	wantXID(t, b.busy, 2)
	if q := <-quiesced; q != (Quiesced{Conns: 6, Replies: 3}) {
		t.Errorf("quiesced: %+v", q)
	}
	if n := len(b.s.Conns()); n != 6 {
		t.Errorf("%d connections are still open, want 6", n)
	}
	all := []*net.TCPConn{b.idle, b.busy, b.mid, b.torn, b.queued, b.stuck}
	for i, nc := range all {
		if st := tcpState(t, nc); st != unix.BPF_TCP_ESTABLISHED {
			t.Errorf("connection %d: state %d before its end was said", i, st)
		}
	}
	b.checkBystander(t)
	closed := make(chan DrainResult, 1)
	go func() { closed <- b.s.HalfClose(ctx) }()
	for i, nc := range all {
		if n, err := nc.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("connection %d: %d bytes, %v, want EOF", i, n, err)
		}
		_ = nc.Close()
	}
	if r := <-closed; r.Orderly != 6 || r.Forced != 0 {
		t.Errorf("half-close: %+v", r)
	}
	wantHeld(t, b.a)
	b.s.CloseListeners()
	if nc, err := net.Dial("tcp", b.a.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("closed port: %v, %v", nc, err)
	}
	b.checkBystander(t)
	// 004.25: the address comes back.
	again, _ := startServer(t, Config{}, newTestHandler())
	if _, err := again.ListenTCP(b.a, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	nc := dialRaw(t, b.a)
	mustWrite(t, nc, record(callMsg(1, procEcho)))
	wantXID(t, nc, 1)
}

// TestPhasesDeadline: a client that never reads, one whose call hangs and one that never closes end with the
// deadlines, and what was not through is not answered afterwards.
// 004.14, 004.18, 004.22
func TestPhasesDeadline(t *testing.T) {
	b := newPhaseBed(t)
	ua, err := b.s.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	uc, err := net.Dial("udp", ua.String())
	if err != nil {
		t.Fatal(err)
	}
	defer uc.Close()
	mustWrite(t, uc, callMsg(6, procHold))
	<-b.h.got
	b.load(t)
	b.clog(t)
	if err := b.s.Refuse(true); err != nil {
		t.Fatal(err)
	}
	wantXID(t, b.queued, 7)
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	q := b.s.Quiesce(ctx)
	if q.Conns != 6 || q.Left != 2 || q.LeftUDP != 1 {
		t.Errorf("quiesced: %+v, want 2 of 6 connections and 1 datagram left", q)
	}
	b.h.release()
	if n := len(b.s.Conns()); n != 6 {
		t.Errorf("%d connections, want 6: they wait for what ends them", n)
	}
	// The call that hung is finished now; its reply must not leave.
	if st := tcpState(t, b.busy); st != unix.BPF_TCP_ESTABLISHED {
		t.Errorf("state %d of a connection that was cut off", st)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	r := b.s.HalfClose(ctx)
	if r.Orderly != 0 || r.Forced != 6 {
		t.Errorf("half-close of clients that never close: %+v", r)
	}
	if n, err := b.busy.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("cut off: %d bytes, %v, want a reset and nothing else", n, err)
	}
	if n, err := b.idle.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("idle: %d bytes, %v, want EOF", n, err)
	}
	b.s.CloseListeners()
	// The port is closed, which the next datagram tells; a late reply would be read before that.
	_ = uc.SetDeadline(time.Now().Add(30 * time.Second))
	mustWrite(t, uc, callMsg(6, procEcho))
	if n, err := uc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("UDP after the deadline: %d bytes, %v", n, err)
	}
	if n := len(b.s.Conns()); n != 0 {
		t.Errorf("%d connections left", n)
	}
	b.checkBystander(t)
	if err := b.s.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "buffers free", func() bool { return b.s.Stats().BufferBytes == 0 })
}

// TestPhasesQuiet: connections end here without a segment: the clients' stay established until something resets them.
// 004.18, 004.19
func TestPhasesQuiet(t *testing.T) {
	for _, name := range []string{"drained", "at once"} {
		t.Run(name, func(t *testing.T) {
			b := newPhaseBed(t)
			b.load(t)
			b.clog(t)
			if err := b.s.Refuse(true); err != nil {
				t.Fatal(err)
			}
			wantXID(t, b.queued, 7)
			if name == "drained" {
				ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
				defer cancel()
				if q := b.s.Quiesce(ctx); q.Left != 2 {
					t.Errorf("quiesced: %+v", q)
				}
				mustWrite(t, b.idle, record(callMsg(8, procEcho))) // unread at the end
			}
			r, err := b.s.CloseQuietly(testCtx(t), repair)
			if errors.Is(err, unix.EPERM) {
				t.Skip("TCP_REPAIR needs CAP_NET_ADMIN")
			}
			if err != nil {
				t.Fatal(err)
			}
			// Without the drain some are quiet before they are cut off, others not.
			if r.Orderly+r.Forced != 6 || r.Forced < 2 || name == "drained" && r.Forced != 2 {
				t.Errorf("result %+v, want 6 connections, 2 of them forced", r)
			}
			b.h.release()
			for i, nc := range []*net.TCPConn{b.idle, b.busy, b.mid, b.torn, b.queued} {
				if st := tcpState(t, nc); st != unix.BPF_TCP_ESTABLISHED {
					t.Errorf("connection %d: state %d, want established", i, st)
				}
				// The address is still here, so that the kernel answers for the connection that is gone.
				mustWrite(t, nc, []byte{1})
				if n, err := nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("connection %d: %d bytes, %v, want a reset by what was sent last", i, n, err)
				}
			}
			wantHeld(t, b.a)
			b.s.CloseListeners()
			b.checkBystander(t)
		})
	}
}

// TestPhasesQuietFails: a connection that cannot be silenced is reset, and it is said.
func TestPhasesQuietFails(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	nc := dialRaw(t, a)
	mustWrite(t, nc, record(callMsg(1, 0)))
	mustRecord(t, nc)
	if q := s.Quiesce(testCtx(t)); q != (Quiesced{Conns: 1}) {
		t.Errorf("quiesced: %+v", q)
	}
	r, err := s.CloseQuietly(testCtx(t), func(syscall.RawConn) error { return unix.EPERM })
	if !errors.Is(err, unix.EPERM) || r.Forced != 1 || r.Orderly != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

// TestRefuseReset closes the port; what the kernel had completed is served.
// 004.10, 004.11
func TestRefuseReset(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	queueOnly(t, s)
	var ncs []*net.TCPConn
	for i := range uint32(20) {
		nc := dialRaw(t, a)
		mustWrite(t, nc, record(callMsg(i, procEchoGo)))
		ncs = append(ncs, nc)
	}
	if err := s.Refuse(false); err != nil {
		t.Fatal(err)
	}
	if nc, err := net.Dial("tcp", a.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("refused port: %v, %v", nc, err)
	}
	for i, nc := range ncs {
		wantXID(t, nc, uint32(i))
	}
}

// TestCloseWhileQuiet: Close ends connections that wait for their end to be said, those cut off, too.
func TestCloseWhileQuiet(t *testing.T) {
	b := newPhaseBed(t)
	mustWrite(t, b.busy, record(callMsg(2, procHold)))
	<-b.h.got
	ctx, cancel := context.WithTimeout(context.Background(), 150*time.Millisecond)
	defer cancel()
	if q := b.s.Quiesce(ctx); q.Left != 1 || q.Conns != 5 {
		t.Errorf("quiesced: %+v", q)
	}
	if err := b.s.Close(); err != nil {
		t.Fatal(err)
	}
	for i, nc := range []*net.TCPConn{b.idle, b.busy} {
		if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("connection %d: %v, want a reset", i, err)
		}
	}
	b.h.release()
}

// TestHeld: who comes before Open waits, and is answered by the programs that Open brings.
func TestHeld(t *testing.T) {
	h := newTestHandler()
	prog := Program{Prog: testProg, VersLow: testLow, VersHigh: testHigh, NumProcs: func(uint32) uint32 { return numProcs }, Handler: h}
	s := NewServer(Config{})
	t.Cleanup(func() { _ = s.Close() })
	a, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{Held: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.ListenUDP(a, ListenOptions{Held: true}); err != nil {
		t.Fatal(err)
	}
	nc := dialRaw(t, a)
	mustWrite(t, nc, record(callMsg(1, procHold)))
	uc, err := net.Dial("udp", a.String())
	if err != nil {
		t.Fatal(err)
	}
	defer uc.Close()
	_ = uc.SetDeadline(time.Now().Add(30 * time.Second))
	mustWrite(t, uc, callMsg(2, procEcho))
	if n := len(s.Conns()); n != 0 {
		t.Errorf("%d connections before Open", n)
	}
	if err := s.Open(prog); err != nil {
		t.Fatal(err)
	}
	<-h.got
	h.release()
	wantXID(t, nc, 1)
	buf := make([]byte, 100)
	if _, err := uc.Read(buf); err != nil || binary.BigEndian.Uint32(buf) != 2 {
		t.Errorf("UDP: %x, %v", buf[:4], err)
	}
	if err := s.Open(); err == nil {
		t.Error("opened twice")
	}
	// What is listened on later is served at once.
	b, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{Held: true})
	if err != nil {
		t.Fatal(err)
	}
	nc = dialRaw(t, b)
	mustWrite(t, nc, record(callMsg(3, procEcho)))
	wantXID(t, nc, 3)
}

// TestHeldNeverOpened: a take-over that fails answers nothing.
func TestHeldNeverOpened(t *testing.T) {
	for _, phases := range []bool{true, false} {
		s := NewServer(Config{Programs: []Program{{
			Prog: testProg, VersLow: testLow, VersHigh: testHigh, NumProcs: func(uint32) uint32 { return numProcs }, Handler: newTestHandler(),
		}}})
		a, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{Held: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.ListenUDP(a, ListenOptions{Held: true}); err != nil {
			t.Fatal(err)
		}
		nc := dialRaw(t, a)
		mustWrite(t, nc, record(callMsg(1, procEcho)))
		if phases {
			if err := s.Refuse(true); err != nil {
				t.Fatal(err)
			}
			if q := s.Quiesce(testCtx(t)); q != (Quiesced{}) {
				t.Errorf("quiesced: %+v", q)
			}
			if err := s.Open(); err == nil {
				t.Error("opened after Refuse")
			}
			s.CloseListeners()
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if n, err := nc.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%d bytes, %v, want a reset", n, err)
		}
	}
}

// A machine that keeps the address answers nothing on it: neither new connections nor
// what belongs to none any more, and no datagram.
func TestDropAll(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	ua, err := s.ListenUDP(netip.AddrPortFrom(a.Addr(), 0), ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	nc := dialRaw(t, a)
	mustWrite(t, nc, record(callMsg(1, procEcho)))
	wantXID(t, nc, 1)
	if err := s.Refuse(true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s.Quiesce(ctx)
	if _, err := s.CloseQuietly(ctx, repair); err != nil {
		t.Fatal(err)
	}
	if err := s.DropAll(); err != nil {
		t.Fatal(err)
	}
	wantHeld(t, a)
	silent := func(c net.Conn, call []byte) {
		t.Helper()
		mustWrite(t, c, call)
		if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(make([]byte, 1))
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
			t.Errorf("%s: %d bytes, %v; want silence", c.RemoteAddr(), n, err)
		}
	}
	silent(nc, record(callMsg(2, procEcho)))
	uc, err := net.Dial("udp", ua.String())
	if err != nil {
		t.Fatal(err)
	}
	defer uc.Close()
	silent(uc, callMsg(3, procEcho))
	s.CloseListeners()
	if err := s.DropAll(); err == nil {
		t.Error("ports that are closed are said to be silent")
	}
}
