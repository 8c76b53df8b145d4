package sunrpc

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// dialFrom connects from an address of its own.
func dialFrom(tb testing.TB, from string, to netip.AddrPort) *net.TCPConn {
	tb.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
	nc, err := d.Dial("tcp", to.String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(60 * time.Second))
	return nc.(*net.TCPConn)
}

// TestGoodClientAmongBad: connections that stop inside a record and that do not read long replies take the
// memory, and far more of them stand in line. A client that does neither is served at once, though time stands
// still and so nobody has used up his; and if it shares its address with all the bad ones, as soon as
// those that hold memory have used up theirs.
func TestGoodClientAmongBad(t *testing.T) {
	long := make([]byte, 1<<20)
	unfinished := record(callMsg(1, procSink, long...))[:500_000]
	// The first fragment is complete, and the second needs more memory than the first.
	fragmented := append(append(mark(400_000, false), callMsg(1, procSink, long[:400_000-40]...)...), append(mark(600_000, true), 1, 2, 3)...)
	unread := bytes.Repeat(record(callMsg(1, procReadGo, words(1<<20)...)), 8)
	for _, tc := range []struct {
		name string
		bad  [][]byte
	}{
		{"records", [][]byte{unfinished}},
		{"fragments", [][]byte{fragmented}},
		{"replies", [][]byte{unread}},
		{"all", [][]byte{unfinished, fragmented, unread}},
	} {
		for _, own := range []bool{true, false} {
			name := tc.name + map[bool]string{true: "/own address", false: "/same address"}[own]
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				begin := time.Now()
				var passed atomic.Int64
				const limit = 32 << 20
				s, a := startServer(t, Config{
					MaxInflightBytes: limit, Workers: 16,
					Now: func() time.Time { return begin.Add(time.Duration(passed.Load())) },
				}, newTestHandler())
				good := dialRaw(t, a)
				mustWrite(t, good, record(callMsg(1, 0)))
				mustRecord(t, good)
				for i := range 150 {
					from := "127.0.0.1"
					if own {
						from = "127.0.0." + string('2'+rune(i%5))
					}
					c := dialFrom(t, from, a)
					if err := c.SetReadBuffer(4096); err != nil {
						t.Fatal(err)
					}
					go func() { _, _ = c.Write(tc.bad[i%len(tc.bad)]) }() // until it is closed
				}
				var most int64
				full := func() {
					t.Helper()
					eventually(t, "memory to be full", func() bool {
						for range 20 {
							before := s.mem.used.Load()
							most = max(most, before)
							time.Sleep(5 * time.Millisecond)
							if s.mem.used.Load() != before || !s.memShort() {
								return false
							}
						}
						return true
					})
				}
				full()
				for round := range 3 {
					for _, call := range [][]byte{record(callMsg(2, procSink, long...)), record(callMsg(3, procReadGo, words(1<<20)...))} {
						answered := make(chan error, 1)
						go func() {
							_ = good.SetDeadline(time.Now().Add(10 * time.Second))
							_, err := good.Write(call)
							if err == nil {
								_, err = readRecord(good)
							}
							answered <- err
						}()
						if !own {
							eventually(t, "the good client's call to wait", func() bool { return len(answered) > 0 || s.inLine(good.LocalAddr().String()) })
							full()
							passed.Add(int64(4 * time.Second))
						}
						if err := <-answered; err != nil {
							t.Fatalf("round %d, call of %d bytes: %v; %d bytes of buffers in use", round, len(call), err, s.mem.used.Load())
						}
						if !own && s.Stats().Addrs[0].Conns < 50 {
							return // the rest do not fill the memory
						}
					}
				}
				if most > limit/4*5 {
					t.Errorf("%d bytes of buffers in use, limit %d", most, limit)
				}
			})
		}
	}
}

// inLine tells whether a connection waits for memory.
func (s *Server) inLine(remote string) bool {
	is := func(c *Conn) bool { return c.remote.String() == remote }
	s.room.mu.Lock()
	for _, q := range s.room.line.ring {
		if slices.ContainsFunc(q.l, is) {
			s.room.mu.Unlock()
			return true
		}
	}
	s.room.mu.Unlock()
	s.bulk.mu.Lock()
	defer s.bulk.mu.Unlock()
	for i := range s.bulk.lines {
		for _, q := range s.bulk.lines[i].ring {
			if slices.ContainsFunc(q.l, func(c *Call) bool { return is(c.Conn) }) {
				return true
			}
		}
	}
	return false
}

// TestNoWorkForClosed: long replies that wait when their connection is closed are not made.
func TestNoWorkForClosed(t *testing.T) {
	var made atomic.Int64
	h := newTestHandler()
	s, a := startServer(t, Config{
		MaxInflightBytes: 8 << 20, Workers: 4, Now: func() time.Time { return time.Unix(1e9, 0) },
		Programs: []Program{{
			Prog: testProg, VersLow: testLow, VersHigh: testHigh, NumProcs: func(uint32) uint32 { return numProcs },
			Handler: handlerFunc(func(c *Call) {
				if c.Proc != procReadGo {
					h.ServeRPC(c)
					return
				}
				c.GoReply(MaxPayload, func(c *Call) { made.Add(1); read(c) })
			}),
		}},
	}, h)
	for range 20 {
		nc := dialRaw(t, a)
		if err := nc.SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, nc, bytes.Repeat(record(callMsg(1, procReadGo, words(MaxPayload)...)), 40))
	}
	var before int64
	eventually(t, "nothing to go on", func() bool {
		before = made.Load()
		time.Sleep(200 * time.Millisecond)
		return s.bulk.n.Load() > 0 && made.Load() == before
	})
	s.mu.Lock()
	conns := make([]*Conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.fail(nil, true)
	}
	eventually(t, "all calls to end", func() bool {
		for _, c := range conns {
			if c.inflight.Load() != 0 {
				return false
			}
		}
		return s.mem.used.Load() == 0
	})
	// One connection's end makes room for what others wait for.
	if n := made.Load() - before; n > int64(len(conns)) {
		t.Errorf("%d replies were made while their connections were closed, %d before", n, before)
	}
}

type handlerFunc func(*Call)

func (f handlerFunc) ServeRPC(c *Call) { f(c) }

func TestLine(t *testing.T) {
	a, b := lineKey{p: new(peer)}, lineKey{p: new(peer), proven: true}
	var l line[int]
	for i := range 4 {
		l.push(a, i)
	}
	l.push(b, 10)
	l.push(b, 11)
	if !l.remove(a, 1) || l.remove(a, 10) || l.remove(lineKey{}, 1) {
		t.Error("remove")
	}
	yes, no := func(int) bool { return true }, func(int) bool { return false }
	if x, ok := l.next(no, no); ok {
		t.Errorf("%d is let by nobody", x)
	}
	var got []int
	for _, let := range []struct{ in, out func(int) bool }{
		{yes, no}, {yes, no}, {no, func(i int) bool { return i > 10 }}, {no, no}, {yes, no}, {yes, no}, {yes, no},
	} {
		if x, ok := l.next(let.in, let.out); ok {
			got = append(got, x)
		}
	}
	if want := []int{0, 10, 11, 2, 3}; !slices.Equal(got, want) || !l.empty() || len(l.queues) != 0 {
		t.Errorf("order %v, want %v", got, want)
	}
	l.push(a, 5)
	if !l.remove(a, 5) || !l.empty() || len(l.queues) != 0 {
		t.Error("remove of the last")
	}
}
