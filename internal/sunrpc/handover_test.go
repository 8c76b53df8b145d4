package sunrpc

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"
	"time"
)

// A second server goes on with the sockets of a first one; what comes in between waits,
// and nobody notices.
func TestHandover(t *testing.T) {
	h := newTestHandler()
	first, at := startServer(t, Config{DrainRecordWait: time.Millisecond}, h)
	if _, err := first.ListenUDP(at, ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	idle, busy, torn, cut := dialRaw(t, at), dialRaw(t, at), dialRaw(t, at), dialRaw(t, at)
	for _, nc := range []io.ReadWriter{idle, busy, torn, cut} {
		mustWrite(t, nc, record(callMsg(1, 0)))
		mustRecord(t, nc)
	}
	mustWrite(t, busy, record(callMsg(2, procHold)))
	<-h.got
	mustWrite(t, torn, record(callMsg(3, 0))[:10])
	eventually(t, "a record begun", func() bool {
		first.mu.Lock()
		defer first.mu.Unlock()
		for c := range first.conns {
			if c.partial.Load() {
				return true
			}
		}
		return false
	})

	first.KeepSockets()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	quiesced := make(chan Quiesced)
	go func() { quiesced <- first.Quiesce(ctx) }()
	// The others do not wait for the call in progress.
	mine := netip.MustParseAddrPort(busy.LocalAddr().String())
	first.waitConns(ctx, first.startDrain(all, endUnsaid), func(c *Conn) bool { return c.quiet.Load() || c.remote == mine })
	h.release()
	wantXID(t, busy, 2)
	if q := <-quiesced; q.Left != 0 || q.LeftUDP != 0 || q.Conns != 4 {
		t.Errorf("%+v", q)
	}
	mustWrite(t, idle, record(callMsg(4, 0)))
	late := dialRaw(t, at)
	mustWrite(t, late, record(callMsg(5, 0)))

	go func() { io.Copy(io.Discard, torn); torn.Close() }() // as a client does
	got, r, err := first.Handover(ctx)
	if err != nil || len(got.Sockets) != 2 || len(got.Conns) != 3 || r.Orderly != 4 || r.Forced != 0 {
		t.Fatalf("%d sockets, %d connections, %+v, %v", len(got.Sockets), len(got.Conns), r, err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	later := dialRaw(t, at)
	mustWrite(t, later, record(callMsg(6, 0)))

	second := NewServer(Config{Programs: []Program{{
		Prog: testProg, VersLow: testLow, VersHigh: testHigh, NumProcs: func(uint32) uint32 { return numProcs }, Handler: newTestHandler(),
	}}})
	defer second.Close()
	if a, err := second.ListenTCP(at, ListenOptions{File: got.Sockets[0]}); err != nil || a != at {
		t.Fatalf("%s, %v", a, err)
	}
	if a, err := second.ListenUDP(at, ListenOptions{File: got.Sockets[1]}); err != nil || a != at {
		t.Fatalf("%s, %v", a, err)
	}
	for _, f := range got.Conns {
		if err := second.Adopt(f); err != nil {
			t.Fatal(err)
		}
	}
	wantXID(t, idle, 4)
	wantXID(t, late, 5)
	wantXID(t, later, 6)
	for _, nc := range []io.ReadWriter{idle, busy, cut} {
		mustWrite(t, nc, record(callMsg(7, procEcho)))
		mustRecord(t, nc)
	}
}

// What is passed has to be what is asked for; it is closed in any case.
func TestAdoptRefuses(t *testing.T) {
	s, at := startServer(t, Config{}, newTestHandler())
	other, oat := startServer(t, Config{}, newTestHandler())
	dup := func() *os.File {
		t.Helper()
		ls, _ := other.sockets(all)
		f, err := dupSocket(ls[0].ln)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := dup()
	if a, err := s.ListenTCP(netip.AddrPortFrom(at.Addr(), 1), ListenOptions{File: f}); err == nil {
		t.Errorf("listens at %s", a)
	}
	if !errors.Is(f.Close(), os.ErrClosed) {
		t.Error("the file is left open")
	}
	if a, err := s.ListenUDP(oat, ListenOptions{File: dup()}); err == nil {
		t.Errorf("a listener is taken for UDP at %s", a)
	}
	if err := s.Adopt(dup()); err == nil {
		t.Error("a listener is taken for a connection")
	}
	nc := dialRaw(t, oat)
	cf, err := dupSocket(nc)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Adopt(cf); err == nil {
		t.Error("a connection of an address is adopted that is not listened on")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := s.Adopt(r); err == nil {
		t.Error("a pipe is taken for a connection")
	}
}
