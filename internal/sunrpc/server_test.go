package sunrpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTranscripts compares replies with bytes written down from RFC 5531.
func TestTranscripts(t *testing.T) {
	_, a := startServer(t, Config{}, newTestHandler())
	const prog = " 00030da4" // 200100
	const none = " 00000000 00000000"
	const head = "00000001 00000000 00000002"
	sys := func(body string) string { // credential and verifier around an AUTH_SYS body
		b := unhex(t, body)
		return hex.EncodeToString(append(words(1, uint32(len(b))), b...)) + none
	}
	accepted := func(s string) string { return "00000001 00000001 00000000" + none + s }
	denied := func(s string) string { return "00000001 00000001 00000001 " + s }
	for _, tc := range []struct{ name, call, reply string }{
		{"NULL", head + prog + "00000003 00000000" + none + none, accepted("00000000")},
		{"echo", head + prog + "00000004 00000001" + none + none + "cafe0000", accepted("00000000 cafe0000")},
		{"RPC version 3", "00000001 00000000 00000003" + prog + "00000003 00000000" + none + none,
			denied("00000000 00000002 00000002")},
		{"RPC version 1, nothing else", "00000001 00000000 00000001", denied("00000000 00000002 00000002")},
		{"unknown program", head + "00030da5 00000003 00000000" + none + none, accepted("00000001")},
		{"version low", head + prog + "00000002 00000000" + none + none, accepted("00000002 00000003 00000004")},
		{"version high", head + prog + "00000005 00000001" + none + none, accepted("00000002 00000003 00000004")},
		{"procedure unavailable", head + prog + "00000003 0000000e" + none + none, accepted("00000003")},
		{"garbage arguments", head + prog + "00000003 00000006" + none + none, accepted("00000004")},
		{"system error", head + prog + "00000003 00000009" + none + none, accepted("00000005")},
		{"auth too weak", head + prog + "00000003 00000008" + none + none, denied("00000001 00000005")},
		{"credential over 400 bytes", head + prog + "00000003 00000000 00000001 00000191" + strings.Repeat("00", 404) + none,
			denied("00000001 00000001")},
		{"credential past the record", head + prog + "00000003 00000000 00000001 00000010" + none,
			denied("00000001 00000001")},
		{"AUTH_NONE with a body", head + prog + "00000003 00000000 00000000 00000004 00000000" + none,
			denied("00000001 00000001")},
		{"AUTH_SHORT", head + prog + "00000003 00000000 00000002 00000000" + none, denied("00000001 00000002")},
		{"RPCSEC_GSS", head + prog + "00000003 00000000 00000006 00000000" + none, denied("00000001 00000002")},
		{"verifier with AUTH_SYS flavor", head + prog + "00000003 00000000" + none + "00000001 00000000",
			denied("00000001 00000003")},
		{"verifier past the record", head + prog + "00000003 00000000" + none + "00000000 00000008",
			denied("00000001 00000003")},
		{"AUTH_SYS", head + prog + "00000003 0000000c" + sys("12345678 00000003 61626300 000003e8 00000064 00000002 0000000a 0000000b"),
			accepted("00000000 000003e8 00000064 00000002 0000000b")},
		{"AUTH_SYS, 17 groups", head + prog + "00000003 00000000" + sys("00000000 00000000 00000000 00000000 00000011"+strings.Repeat("00000001", 17)),
			denied("00000001 00000001")},
		{"AUTH_SYS, machine name of 256", head + prog + "00000003 00000000" + sys("00000000 00000100"+strings.Repeat("61", 256)+"00000000 00000000 00000000"),
			denied("00000001 00000001")},
		{"AUTH_SYS cut short", head + prog + "00000003 00000000" + sys("00000000 00000000 00000000 00000000 00000001"),
			denied("00000001 00000001")},
		{"AUTH_SYS with more behind it", head + prog + "00000003 00000000" + sys("00000000 00000000 00000000 00000000 00000000 00000000"),
			denied("00000001 00000001")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			nc := dialRaw(t, a)
			// The reply to a second call shows that the connection survives.
			mustWrite(t, nc, append(record(unhex(t, tc.call)), record(callMsg(99, 0))...))
			if got, want := mustRecord(t, nc), unhex(t, tc.reply); !bytes.Equal(got, want) {
				t.Errorf("got  %x\nwant %x", got, want)
			}
			if got := mustRecord(t, nc); binary.BigEndian.Uint32(got) != 99 {
				t.Errorf("second reply: %x", got)
			}
		})
	}
}

func TestVersionGap(t *testing.T) {
	h := newTestHandler()
	np := func(uint32) uint32 { return 2 }
	_, a := startServer(t, Config{Programs: []Program{
		{Prog: 7, VersLow: 1, VersHigh: 1, NumProcs: np, Handler: h},
		{Prog: 7, VersLow: 3, VersHigh: 4, NumProcs: np, Handler: h, MaxArgs: 8},
	}}, h)
	ctx := testCtx(t)
	for vers, ok := range []bool{false, true, false, true, true, false} {
		c, err := Dial(ctx, "tcp", netip.AddrPort{}, a, 7, uint32(vers), Cred{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Call(ctx, 1, []byte("12345678"))
		var ae *AcceptError
		if ok && err != nil || !ok && (!errors.As(err, &ae) || ae.Stat != ProgMismatch || ae.Low != 1 || ae.High != 4) {
			t.Errorf("version %d: %v", vers, err)
		}
		if _, err = c.Call(ctx, 1, make([]byte, 12)); vers >= 3 && ok && (!errors.As(err, &ae) || ae.Stat != GarbageArgs) {
			t.Errorf("version %d, arguments over MaxArgs: %v", vers, err)
		}
		_ = c.Close()
	}
}

// TestClosed sends what ends a connection.
func TestClosed(t *testing.T) {
	s, a := startServer(t, Config{MaxRecord: 4096, MaxFragments: 8}, newTestHandler())
	for name, in := range map[string][]byte{
		"short record":       record(words(1, 0, 2)),
		"empty record":       mark(0, true),
		"unknown type":       record(words(1, 2, 2, 0, 0, 0, 0, 0, 0, 0)),
		"record too long":    append(mark(4097, true), make([]byte, 100)...),
		"2 GiB record":       mark(1<<31-1, true),
		"fragments too long": append(append(mark(4000, false), make([]byte, 4000)...), mark(97, true)...),
		"zero fragments":     bytes.Repeat(mark(0, false), 9),
	} {
		nc := dialRaw(t, a)
		mustWrite(t, nc, in)
		if n, err := nc.Read(make([]byte, 100)); n != 0 || err == nil {
			t.Errorf("%s: read %d bytes, %v; want the connection closed", name, n, err)
		}
	}
	eventually(t, "all buffers returned", func() bool { return s.Stats().BufferBytes == 0 })
	// A reply is ignored, also in the middle of calls.
	nc := dialRaw(t, a)
	mustWrite(t, nc, append(record(words(5, 1, 0, 0, 0, 0)), record(callMsg(6, 0))...))
	if got := mustRecord(t, nc); binary.BigEndian.Uint32(got) != 6 {
		t.Errorf("reply %x", got)
	}
}

func TestFragments(t *testing.T) {
	_, a := startServer(t, Config{MaxFragments: 100_000}, newTestHandler())
	arg := make([]byte, 20_000)
	for i := range arg {
		arg[i] = byte(i * 7)
	}
	for _, size := range []int{1, 3, 1000, 7000, 19_000} {
		msg := callMsg(uint32(size), procEcho, arg...)
		if size == 1 {
			msg = callMsg(1, procEcho, arg[:400]...)
		}
		var in []byte
		for rest := msg; len(rest) > 0; {
			n := min(size, len(rest))
			in = append(append(in, mark(n, n == len(rest))...), rest[:n]...)
			rest = rest[n:]
		}
		in = append(in, record(callMsg(7777, 0))...)
		nc := dialRaw(t, a)
		// Cut at random places, so that marks are torn as well.
		go func() {
			for len(in) > 0 {
				n := min(1+rand.IntN(3000), len(in))
				if _, err := nc.Write(in[:n]); err != nil {
					return
				}
				in = in[n:]
			}
		}()
		got := mustRecord(t, nc)
		if want := msg[40:]; !bytes.Equal(got[24:], want) {
			t.Errorf("fragments of %d: echo differs: %d bytes, want %d", size, len(got)-24, len(want))
		}
		if got := mustRecord(t, nc); binary.BigEndian.Uint32(got) != 7777 {
			t.Errorf("fragments of %d: next call's xid %x", size, got[:4])
		}
		_ = nc.Close()
	}
}

// TestSizes echoes records of all sizes around the limits of the read path, many in flight.
func TestSizes(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	var in []byte
	var sizes []int
	for _, base := range []int{0, 2048, inPlaceMax - 40, chunkMin - 44, outKeep - 24, chunkMax, 300_000, MaxPayload} {
		for d := -8; d <= 8; d += 4 {
			if base+d >= 0 {
				sizes = append(sizes, base+d)
			}
		}
	}
	for i := range 300 {
		sizes = append(sizes, 4*(i%50))
	}
	rand.Shuffle(len(sizes), func(i, j int) { sizes[i], sizes[j] = sizes[j], sizes[i] })
	for i, n := range sizes {
		proc := uint32(procEcho + i%2)
		in = append(in, record(callMsg(uint32(i), proc, bytes.Repeat([]byte{byte(i)}, n)...))...)
	}
	nc := dialRaw(t, a)
	go func() { _, _ = nc.Write(in) }()
	seen := make([]bool, len(sizes))
	for range sizes {
		rec := mustRecord(t, nc)
		i := int(binary.BigEndian.Uint32(rec))
		if i >= len(sizes) || seen[i] {
			t.Fatalf("xid %d unknown or answered twice", i)
		}
		seen[i] = true
		if b := rec[24:]; len(b) != sizes[i] || len(bytes.Trim(b, string([]byte{byte(i)}))) != 0 && i%256 < 128 {
			t.Fatalf("xid %d: %d bytes, want %d, or content differs", i, len(b), sizes[i])
		}
	}
	_ = nc.Close()
	eventually(t, "all buffers returned", func() bool { return s.Stats().BufferBytes == 0 })
}

func TestPayloads(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	ctx := testCtx(t)
	c, err := Dial(ctx, "tcp", netip.AddrPort{}, a, testProg, 3, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 2, 3, 4, 100, 2047, 2048, 2049, 4097, 65536, MaxPayload - 1, MaxPayload} {
		for _, proc := range []uint32{procRead, procReadGo} {
			b, err := c.Call(ctx, proc, words(uint32(n)))
			if err != nil {
				t.Fatal(err)
			}
			if len(b) != 4+(n+3)&^3 || int(binary.BigEndian.Uint32(b)) != n {
				t.Fatalf("proc %d, n %d: %d bytes", proc, n, len(b))
			}
			if n > 1 && (b[4] != 0xaa || b[3+n] != 0xbb) || !bytes.Equal(b[4+n:], make([]byte, len(b)-4-n)) {
				t.Fatalf("proc %d, n %d: content differs", proc, n)
			}
		}
		b, err := c.Call(ctx, procLongOut, words(uint32(n&^3)))
		if err != nil || len(b) != n&^3 || len(bytes.Trim(b, "\a")) != 0 {
			t.Fatalf("long result %d: %d bytes, %v", n&^3, len(b), err)
		}
	}
	_ = c.Close()
	eventually(t, "all buffers returned", func() bool { return s.Stats().BufferBytes == 0 })
}

// TestOutOfOrder holds calls of two connections and lets them go in reverse: every reply must reach the
// connection of its call.
func TestOutOfOrder(t *testing.T) {
	h := newTestHandler()
	_, a := startServer(t, Config{}, h)
	const n = 100
	ncs := []net.Conn{dialRaw(t, a), dialRaw(t, a)}
	for k, nc := range ncs {
		for i := range n {
			mustWrite(t, nc, record(callMsg(uint32(i), procHold, byte(k), byte(i), 0, 0)))
		}
		mustWrite(t, nc, record(callMsg(n, procEcho))) // overtakes all
		if rec := mustRecord(t, nc); binary.BigEndian.Uint32(rec) != n {
			t.Fatalf("first reply has xid %x", rec[:4])
		}
	}
	h.release()
	for k, nc := range ncs {
		for i := n - 1; i >= 0; i-- {
			rec := mustRecord(t, nc)
			if binary.BigEndian.Uint32(rec) != uint32(i) || rec[24] != byte(k) || rec[25] != byte(i) {
				t.Fatalf("connection %d, want reply %d: %x", k, i, rec)
			}
		}
	}
}

func TestManyClients(t *testing.T) {
	_, a := startServer(t, Config{Workers: 4}, newTestHandler())
	ctx := testCtx(t)
	var wg sync.WaitGroup
	for k := range 4 {
		c, err := Dial(ctx, "tcp", netip.AddrPort{}, a, testProg, 4, Cred{Flavor: AuthSys, UID: uint32(k)})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for g := range 8 {
			wg.Go(func() {
				for i := range 100 {
					arg := words(uint32(k), uint32(g), uint32(i))
					res, err := c.Call(ctx, uint32(procEcho+i%2), arg)
					if err != nil || !bytes.Equal(res, arg) {
						t.Errorf("got %x, %v, want %x", res, err, arg)
						return
					}
				}
			})
		}
	}
	wg.Wait()
}

// TestClientShutdown: a peer that sends FIN right after its calls still gets every answer.
func TestClientShutdown(t *testing.T) {
	h := newTestHandler()
	closed := make(chan *Conn, 1)
	_, a := startServer(t, Config{OnClose: func(c *Conn) { closed <- c }}, h)
	nc := dialRaw(t, a)
	mustWrite(t, nc, append(record(callMsg(1, procHold)), record(callMsg(2, procReadGo, words(MaxPayload)...))...))
	<-h.got
	if err := nc.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rec := mustRecord(t, nc); binary.BigEndian.Uint32(rec) != 2 || len(rec) != 28+MaxPayload {
		t.Fatalf("reply of %d bytes", len(rec))
	}
	h.mu.Lock()
	conn := h.held[0].Conn
	h.mu.Unlock()
	eventually(t, "connection not alive", func() bool { return !conn.Alive() })
	h.release()
	if rec := mustRecord(t, nc); binary.BigEndian.Uint32(rec) != 1 {
		t.Fatalf("xid %x", rec[:4])
	}
	if _, err := nc.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the last reply: %v, want EOF", err)
	}
	if c := <-closed; c != conn || c.Remote().String() != nc.LocalAddr().String() {
		t.Errorf("OnClose got %v", c.Remote())
	}
}

// TestSlowReader: clients ask for far more than they read; memory stays within bounds and another
// connection is served all the time.
func TestSlowReader(t *testing.T) {
	const maxBytes = 24 << 20
	s, a := startServer(t, Config{
		MaxInflightBytes: maxBytes, MaxOutBytesPerConn: 2 << 20, Workers: 4,
	}, newTestHandler())
	ctx := testCtx(t)
	for k := range 60 {
		nc := dialRaw(t, a)
		go func() { // blocks when the server stops reading
			for i := range uint32(200_000) {
				if _, err := nc.Write(record(callMsg(i, uint32(procRead+k%2), words(MaxPayload)...))); err != nil {
					return
				}
			}
		}()
	}
	c, err := Dial(ctx, "tcp", netip.AddrPort{}, a, testProg, 3, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var most int64
	for i := range uint32(400) {
		if _, err := c.Call(ctx, procEchoGo, words(i)); err != nil {
			t.Fatalf("call %d beside slow readers: %v", i, err)
		}
		most = max(most, s.mem.used.Load())
		if i%10 == 0 {
			runtime.Gosched()
			time.Sleep(time.Millisecond)
		}
	}
	st := s.Stats()
	t.Logf("buffers: at most %d KiB, at the end %d KiB; waiting replies %d KiB; inflight %d", most>>10, st.BufferBytes>>10, st.Addrs[0].OutBytes>>10, st.Addrs[0].Inflight)
	// Beyond the limit: a quarter for connections with nothing in progress, and the replies that were
	// being made when it was reached, one per worker and running reader.
	if limit := int64(maxBytes/4*5 + (4+8)*MaxPayload); most > limit {
		t.Errorf("%d bytes of buffers in use, limit %d", most, limit)
	}
}

// TestStalledWriter: who never reads is closed after WriteTimeout, and calls held for it end.
func TestStalledWriter(t *testing.T) {
	now := time.Now()
	s, a := startServer(t, Config{
		MaxOutBytesPerConn: 1 << 20, Workers: 2, Now: func() time.Time { return now },
		WriteTimeout: time.Minute, MaxInflightCallsPerConn: 1000,
	}, newTestHandler())
	nc := dialRaw(t, a)
	var in []byte // in one write, so that the reader admits them before the replies pile up
	for i := range uint32(100) {
		in = append(in, record(callMsg(i, procReadGo, words(MaxPayload)...))...)
	}
	mustWrite(t, nc, in)
	held := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.held)
		}
		return -1
	}
	eventually(t, "calls held back", func() bool { return held() > 0 })
	s.sweep(now.Add(time.Second))
	if st := s.Stats(); st.Addrs[0].Conns != 1 {
		t.Fatalf("%d connections before the time-out, want 1", st.Addrs[0].Conns)
	}
	later := now
	eventually(t, "connection closed", func() bool {
		// The kernel may have taken something meanwhile, which is progress.
		later = later.Add(2 * time.Minute)
		s.sweep(later)
		return s.Stats().Addrs[0].Conns == 0
	})
	eventually(t, "buffers returned", func() bool { return s.Stats().BufferBytes == 0 })
}

func TestTimeouts(t *testing.T) {
	now := time.Now()
	s, a := startServer(t, Config{Now: func() time.Time { return now }, IdleTimeout: 10 * time.Minute}, newTestHandler())
	idle, mid := dialRaw(t, a), dialRaw(t, a)
	for _, nc := range []net.Conn{idle, mid} {
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	mustWrite(t, mid, record(callMsg(2, procEcho, make([]byte, 100_000)...))[:50_000])
	eventually(t, "record begun", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			if c.partial.Load() {
				return true
			}
		}
		return false
	})
	s.sweep(now.Add(time.Minute))
	eventually(t, "stalled record closed", func() bool { return s.Stats().Addrs[0].Conns == 1 })
	mustWrite(t, idle, record(callMsg(3, 0)))
	mustRecord(t, idle)
	eventually(t, "reply off the books", func() bool { return s.Stats().Addrs[0].OutBytes == 0 })
	s.sweep(now.Add(12 * time.Minute))
	if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("idle connection: %v, want EOF", err)
	}
}

func TestConnLimits(t *testing.T) {
	s, a := startServer(t, Config{MaxConnsPerClient: 2}, newTestHandler())
	for range 2 {
		nc := dialRaw(t, a)
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	if nc, err := net.Dial("tcp", a.String()); err == nil { // the reset may overtake Dial's return
		if n, err := nc.Read(make([]byte, 1)); err == nil {
			t.Errorf("third connection: %d bytes", n)
		}
		_ = nc.Close()
	}
	if st := s.Stats().Addrs[0]; st.Accepted != 2 || st.Rejected != 1 || st.Calls != 2 || st.Addr != a {
		t.Errorf("stats %+v", st)
	}
}

func TestWildcardRefused(t *testing.T) {
	s := NewServer(Config{})
	defer s.Close()
	for _, a := range []string{"0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"} {
		ap := netip.MustParseAddrPort(a)
		if _, err := s.ListenTCP(ap, ListenOptions{}); !errors.Is(err, errWildcard) {
			t.Errorf("TCP %s: %v", a, err)
		}
		if _, err := s.ListenUDP(ap, ListenOptions{}); !errors.Is(err, errWildcard) {
			t.Errorf("UDP %s: %v", a, err)
		}
	}
	if _, err := s.ListenTCP(netip.AddrPort{}, ListenOptions{}); err == nil {
		t.Error("zero address accepted")
	}
	if _, err := s.ListenTCP(netip.MustParseAddrPort("192.0.2.77:0"), ListenOptions{FreeBind: true}); err != nil {
		t.Errorf("FreeBind: %v", err)
	}
	if _, err := s.ListenUDP(netip.MustParseAddrPort("192.0.2.77:0"), ListenOptions{FreeBind: true}); err != nil {
		t.Errorf("FreeBind UDP: %v", err)
	}
}

func TestUDP(t *testing.T) {
	h := newTestHandler()
	s, _ := startServer(t, Config{}, h)
	ctx := testCtx(t)
	for _, listen := range []string{"127.0.0.1:0", "0.0.0.0:0"} {
		a, err := s.ListenUDP(netip.MustParseAddrPort(listen), ListenOptions{AllowWildcard: true})
		if err != nil {
			t.Fatal(err)
		}
		// With the wildcard, the address asked is not the one that routing would choose for the reply;
		// the connected client sees only replies from there.
		to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port())
		if listen == "0.0.0.0:0" {
			to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.9"), a.Port())
		}
		c, err := Dial(ctx, "udp", netip.MustParseAddrPort("127.0.0.1:0"), to, testProg, 3, Cred{Flavor: AuthSys, UID: 5, GID: 6, NGIDs: 1, GIDs: [16]uint32{9}})
		if err != nil {
			t.Fatal(err)
		}
		for _, proc := range []uint32{procEcho, procEchoGo} {
			if res, err := c.Call(ctx, proc, []byte("abcd")); err != nil || string(res) != "abcd" {
				t.Errorf("%s: echo %q, %v", listen, res, err)
			}
		}
		if res, err := c.Call(ctx, procCred, nil); err != nil || !bytes.Equal(res, words(5, 6, 1, 9)) {
			t.Errorf("credential %x, %v", res, err)
		}
		if res, err := c.Call(ctx, procRead, words(8001)); err != nil || len(res) != 8008 {
			t.Errorf("payload: %d bytes, %v", len(res), err)
		}
		var de *DenyError
		if _, err := c.Call(ctx, procTooWeak, nil); !errors.As(err, &de) || de.AuthStat != AuthTooWeak {
			t.Errorf("AuthError over UDP: %v", err)
		}
		go func() { // the first is dropped; the retransmission answered
			<-h.got
			h.mu.Lock()
			h.held[0].Drop()
			h.held = nil
			h.mu.Unlock()
			<-h.got
			h.release()
		}()
		if res, err := c.Call(ctx, procHold, []byte("again...")); err != nil || string(res) != "again..." {
			t.Errorf("retransmission: %q, %v", res, err)
		}
		_ = c.Close()
		nc, err := net.Dial("udp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, nc, []byte{1, 2, 3})
		mustWrite(t, nc, callMsg(1, 0)[:39])
		eventually(t, "garbage counted", func() bool {
			for _, st := range s.Stats().Addrs {
				if st.Addr == a && st.Garbage == 2 && st.Inflight == 0 {
					return true
				}
			}
			return false
		})
		_ = nc.Close()
	}
}

// TestIdleConns measures what 1,000 connections cost after they have been used.
func TestIdleConns(t *testing.T) {
	s, a := startServer(t, Config{}, newTestHandler())
	heap := func() (uint64, uint64) {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, m.StackInuse
	}
	const n = 1000
	h0, s0 := heap()
	ncs := make([]net.Conn, n)
	for i := range ncs {
		nc, err := net.Dial("tcp", a.String())
		if err != nil {
			t.Fatalf("connection %d: %v (descriptor limit?)", i, err)
		}
		defer nc.Close()
		ncs[i] = nc
		mustWrite(t, nc, append(record(callMsg(1, procEchoGo)), record(callMsg(2, procEcho))...))
	}
	for _, nc := range ncs {
		mustRecord(t, nc)
		mustRecord(t, nc)
	}
	eventually(t, "idle connections hold no buffer", func() bool { return s.Stats().BufferBytes == 0 })
	h1, s1 := heap()
	t.Logf("%d used, idle connections with both ends here: heap %d KiB, stacks %d KiB, pooled buffers in use 0", n, (int64(h1)-int64(h0))>>10, (int64(s1)-int64(s0))>>10)
	if per := (int64(h1) - int64(h0) + int64(s1) - int64(s0)) / n; per > 32<<10 {
		t.Errorf("%d bytes per idle connection", per)
	}
}

func TestCloseWithWork(t *testing.T) {
	h := newTestHandler()
	s, a := startServer(t, Config{Workers: 2}, h)
	for k := range 4 {
		nc := dialRaw(t, a)
		var in []byte
		for i := range uint32(100) {
			in = append(in, record(callMsg(i, uint32(procEcho+k), words(1000)...))...)
		}
		mustWrite(t, nc, in)
	}
	<-h.got
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	h.release() // replies of a server that is gone are discarded
	if n := s.Stats().BufferBytes; n != 0 {
		t.Errorf("%d bytes of buffers in use after Close", n)
	}
	if _, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{}); !errors.Is(err, errClosed) {
		t.Errorf("ListenTCP after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestClientErrors(t *testing.T) {
	h := newTestHandler()
	s, a := startServer(t, Config{}, h)
	ctx := testCtx(t)
	c, err := Dial(ctx, "tcp", netip.AddrPort{}, a, testProg, 3, Cred{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	short, cancel := context.WithCancel(ctx)
	go func() { <-h.got; cancel() }()
	if _, err := c.Call(short, procHold, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled call: %v", err)
	}
	h.release()
	if res, err := c.Call(ctx, procEcho, []byte("next")); err != nil || string(res) != "next" {
		t.Errorf("after a cancelled call: %q, %v", res, err)
	}
	go func() { <-h.got; _ = s.Close() }()
	if _, err := c.Call(ctx, procHold, nil); err == nil {
		t.Error("call on a reset connection succeeded")
	}
	if _, err := c.Call(ctx, procEcho, nil); err == nil {
		t.Error("call on a dead client succeeded")
	}
	h.release()
	if _, err := Dial(ctx, "tcp", netip.AddrPort{}, a, 1, 1, Cred{}); err == nil {
		t.Error("dialled a closed port")
	}
	if _, err := Dial(ctx, "unix", netip.AddrPort{}, a, 1, 1, Cred{}); err != ErrBadNetwork {
		t.Errorf("network unix: %v", err)
	}
}
