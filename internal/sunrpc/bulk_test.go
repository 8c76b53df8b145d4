package sunrpc

import (
	"net"
	"testing"
	"time"
)

// TestLongRepliesNeedMemory has many connections ask for long replies that they do not read.
func TestLongRepliesNeedMemory(t *testing.T) {
	const limit = 16 << 20
	h := newTestHandler()
	s, addr := startServer(t, Config{MaxInflightBytes: limit, Workers: 16}, h)
	ask := record(callMsg(1, procReadGo, words(1<<20)...))
	var hogs []*net.TCPConn
	for range 60 {
		c := dialRaw(t, addr)
		if err := c.SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		for range 8 {
			mustWrite(t, c, ask)
		}
		hogs = append(hogs, c)
	}
	stop, top := make(chan struct{}), make(chan int64)
	go func() {
		var most int64
		for {
			most = max(most, s.mem.used.Load())
			select {
			case <-stop:
				top <- most
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	}()
	// Who reads is served meanwhile.
	good := dialRaw(t, addr)
	for range 20 {
		mustWrite(t, good, ask)
		if rec := mustRecord(t, good); len(rec) < 1<<20 {
			t.Fatalf("reply of %d bytes", len(rec))
		}
	}
	close(stop)
	if most := <-top; most > limit/4*5 {
		t.Errorf("%d bytes in use, want at most %d", most, limit/4*5)
	} else if most < limit/8 {
		t.Errorf("%d bytes in use: the hogs ask for too little", most)
	}
	for _, c := range hogs {
		c.Close()
	}
	eventually(t, "everything given back", func() bool {
		return s.bulk.n.Load() == 0 && s.bulk.total() == 0
	})
	mustWrite(t, good, ask)
	mustRecord(t, good)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if n := c.bulk.Load(); n != 0 && n != 1<<20 {
			t.Errorf("a connection has %d bytes in the making", n)
		}
	}
}

// TestCloseWithHeldReplies ends a server whose gate holds calls.
func TestCloseWithHeldReplies(t *testing.T) {
	s, addr := startServer(t, Config{MaxInflightBytes: 5 << 20, Workers: 4}, newTestHandler())
	ask := record(callMsg(1, procReadGo, words(1<<20)...))
	for range 20 {
		c := dialRaw(t, addr)
		if err := c.SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		for range 8 {
			mustWrite(t, c, ask)
		}
	}
	eventually(t, "a call to be held", func() bool { return s.bulk.n.Load() > 0 })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all calls to end", func() bool {
		return s.bulk.n.Load() == 0 && s.bulk.total() == 0 && s.mem.used.Load() == 0
	})
}
