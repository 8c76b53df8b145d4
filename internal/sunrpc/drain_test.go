package sunrpc

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// closeOnEOF reads everything until EOF, then closes: what a client does when the server half-closes.
func closeOnEOF(nc net.Conn) { go func() { _, _ = io.Copy(io.Discard, nc); _ = nc.Close() }() }

// TestDrain drains connections in every state at once.
func TestDrain(t *testing.T) {
	h := newTestHandler()
	s, a := startServer(t, Config{}, h)
	ua, err := s.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.2:0"), ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	idle, busy, mid, torn := dialRaw(t, a), dialRaw(t, a), dialRaw(t, a), dialRaw(t, a)
	bystander := dialRaw(t, other)
	for _, nc := range []net.Conn{idle, busy, mid, torn, bystander} {
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	mustWrite(t, busy, record(callMsg(2, procHold)))
	mustWrite(t, busy, record(callMsg(3, procHold)))
	big := record(callMsg(4, procSink, make([]byte, 500_000)...))
	mustWrite(t, mid, big[:300_000])
	mustWrite(t, torn, big[:2])
	<-h.got
	<-h.got
	ctx := testCtx(t)
	uc, err := Dial(ctx, "udp", netip.AddrPort{}, ua, testProg, 3, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	defer uc.Close()
	udpDone := make(chan error, 1)
	go func() { _, err := uc.Call(ctx, procHold, nil); udpDone <- err }()
	<-h.got
	eventually(t, "records begun", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		n := 0
		for c := range s.conns {
			if c.partial.Load() {
				n++
			}
		}
		return n == 2
	})

	done := make(chan DrainResult, 1)
	go func() { done <- s.DrainAddr(ctx, netip.MustParseAddr("127.0.0.1")) }()
	// The idle connection is half-closed while others still work.
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("idle: %v, want EOF", err)
	}
	if nc, err := net.Dial("tcp", a.String()); err == nil {
		_ = nc.Close()
		t.Error("new connection accepted during the drain")
	}
	mustWrite(t, idle, make([]byte, 1000)) // discarded
	_ = idle.Close()
	// The begun record is completed, and served; what comes behind it is not.
	mustWrite(t, mid, append(big[300_000:], record(callMsg(5, 0))...))
	if rec := mustRecord(t, mid); binary.BigEndian.Uint32(rec) != 4 {
		t.Errorf("xid %x", rec[:4])
	}
	if _, err := mid.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("mid-record: %v, want EOF", err)
	}
	_ = mid.Close()
	if _, err := torn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("torn record: %v, want EOF", err)
	}
	_ = torn.Close()
	select {
	case r := <-done:
		t.Fatalf("drain ended with calls in progress: %+v", r)
	default:
	}
	h.release()
	for range 2 {
		mustRecord(t, busy)
	}
	if _, err := busy.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("busy: %v, want EOF", err)
	}
	_ = busy.Close()
	if err := <-udpDone; err != nil {
		t.Errorf("UDP call in progress: %v", err)
	}
	if r := <-done; r != (DrainResult{Orderly: 4, Replies: 3}) {
		t.Errorf("result %+v", r)
	}
	mustWrite(t, bystander, record(callMsg(9, procEcho)))
	if rec := mustRecord(t, bystander); binary.BigEndian.Uint32(rec) != 9 {
		t.Errorf("other address: xid %x", rec[:4])
	}
	// The address can be served again.
	if _, err := s.ListenTCP(a, ListenOptions{}); err != nil {
		t.Errorf("listen again: %v", err)
	}
	nc := dialRaw(t, a)
	mustWrite(t, nc, record(callMsg(1, 0)))
	mustRecord(t, nc)
}

// TestDrainForced: peers that do not cooperate end with the context.
func TestDrainForced(t *testing.T) {
	h := newTestHandler()
	s, a := startServer(t, Config{}, h)
	notReading, notClosing, stuck := dialRaw(t, a), dialRaw(t, a), dialRaw(t, a)
	for _, nc := range []net.Conn{notReading, notClosing, stuck} {
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	for i := range uint32(30) {
		mustWrite(t, notReading, record(callMsg(i, procReadGo, words(MaxPayload)...)))
	}
	mustWrite(t, stuck, record(callMsg(2, procHold)))
	<-h.got
	eventually(t, "replies waiting", func() bool { return s.Stats().Addrs[0].OutBytes > 0 })
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	r := s.Drain(ctx)
	if r.Orderly != 0 || r.Forced != 3 {
		t.Errorf("result %+v", r)
	}
	// Reset, not merely closed: no socket may stay behind.
	if _, err := notClosing.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("not closing: %v, want EOF first", err)
	}
	if _, err := stuck.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("stuck: %v, want a reset", err)
	}
	if n := s.Stats().Addrs[0].Conns; n != 0 {
		t.Errorf("%d connections left", n)
	}
	h.release()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().BufferBytes; n != 0 {
		t.Errorf("%d bytes of buffers left", n)
	}
}

// TestDrainUnderLoad: every call whose record the server has read is answered before the FIN.
func TestDrainUnderLoad(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	ncs := make([]*net.TCPConn, 8)
	counts := make(chan int, len(ncs))
	for k := range ncs {
		nc := dialRaw(t, a)
		ncs[k] = nc
		go func() {
			for i := uint32(0); ; i++ {
				if _, err := nc.Write(record(callMsg(i, uint32(procEcho+k%2), words(i)...))); err != nil {
					return
				}
			}
		}()
		go func() {
			n := 0
			for {
				if _, err := readRecord(nc); err != nil {
					if err != io.EOF {
						t.Errorf("connection %d: %v, want EOF at a record boundary", k, err)
					}
					_ = nc.Close()
					counts <- n
					return
				}
				n++
			}
		}()
	}
	eventually(t, "load", func() bool { return s.Stats().Addrs[0].Calls > 10_000 })
	r := s.Drain(testCtx(t))
	if r.Orderly != len(ncs) || r.Forced != 0 {
		t.Errorf("result %+v", r)
	}
	var got int
	for range ncs {
		got += <-counts
	}
	if calls := int(s.Stats().Addrs[0].Calls); got != calls {
		t.Errorf("%d calls read, %d replies received", calls, got)
	}
}

// TestDrainAcceptQueue: connections which the kernel has completed and nobody has accepted are served,
// not reset; with HoldOnDrain the port stays and SYNs are dropped.
func TestDrainAcceptQueue(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	held, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.2:0"), ListenOptions{HoldOnDrain: true})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		nc := dialRaw(t, a)
		closeOnEOF(nc)
	}
	if r := s.Drain(testCtx(t)); r != (DrainResult{Orderly: 20}) {
		t.Errorf("result %+v", r)
	}
	d := net.Dialer{Timeout: 100 * time.Millisecond}
	if nc, err := d.Dial("tcp", held.String()); err == nil {
		_ = nc.Close()
		t.Error("connected to a held port")
	} else if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		t.Errorf("held port: %v, want a time-out", err)
	}
	if nc, err := d.Dial("tcp", a.String()); err == nil {
		_ = nc.Close()
		t.Error("connected to a drained port")
	}
}
