package tcp

import (
	"context"
	"errors"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

func write(xid uint64, size int) *wire.Request {
	req := request(wire.OpWrite, xid)
	req.Bulk = make([]byte, size)
	return req
}

// start begins n requests and returns where their errors arrive.
func start(c interface {
	Start(*wire.Request, *wire.Reply, func(error))
}, n int, req func(i int) *wire.Request) chan error {
	res := make(chan error, n)
	for i := range n {
		c.Start(req(i), new(wire.Reply), func(err error) { res <- err })
	}
	return res
}

// A target whose disk hangs keeps its own requests waiting, as many as are
// allowed in work, and neither other requests of the connection nor another
// target.
func TestBlockedTarget(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b, h := houseBed(t, secure, func(o *ServerOptions) { o.Workers = 3 }, wire.OpWrite)
		other := newHouse(t, wire.OpWrite)
		other.goOn()
		if err := b.srv.SetTarget("other", other); err != nil {
			t.Fatal(err)
		}
		c := b.visit(1)
		res := start(c, 10, func(i int) *wire.Request { return write(uint64(i), 1000) })
		g := h.all()[0]
		eventually(t, "full workers", func() bool { return g.blocked.Load() == 3 })
		for i := range 20 {
			if err := c.Call(ctx, request(wire.OpGetattr, uint64(i)), new(wire.Reply)); err != nil {
				t.Fatal(err)
			}
		}
		o := b.dial(func(o *DialOptions) { o.Target = "other" })
		if err := o.Call(ctx, write(1, 1000), new(wire.Reply)); err != nil {
			t.Fatal(err)
		}
		if n := g.blocked.Load(); n != 3 || len(res) != 0 {
			t.Errorf("%d in work, %d answered", n, len(res))
		}
		h.goOn()
		for range 10 {
			if err := <-res; err != nil {
				t.Error(err)
			}
		}
	})
}

// Requests that wait for a worker count against window and memory like others.
func TestBlockedTargetIsBounded(t *testing.T) {
	b, h := houseBed(t, false, func(o *ServerOptions) { o.Workers, o.ConnMemory, o.ControlWindow = 1, 256<<10, 6 }, wire.OpWrite)
	c := b.visit(1)
	res := start(c, 40, func(i int) *wire.Request { return write(uint64(i), 64<<10) })
	eventually(t, "full memory", func() bool { return b.srv.Stats().Requests == 5 })
	if m := b.srv.Stats().MemoryInUse; m != 256<<10 {
		t.Errorf("%d bytes in use", m)
	}
	small := start(b.visit(2), 40, func(i int) *wire.Request { return write(uint64(i), 0) })
	eventually(t, "full window", func() bool {
		b.srv.mu.Lock()
		defer b.srv.mu.Unlock()
		for sc := range b.srv.conns {
			sc.mu.Lock()
			n := sc.inflight
			sc.mu.Unlock()
			if n == 6 {
				return true
			}
		}
		return false
	})
	h.goOn()
	for range 40 {
		if err := <-res; err != nil {
			t.Error(err)
		}
		if err := <-small; err != nil {
			t.Error(err)
		}
	}
}

// What waits for a worker when its connection breaks is not given to the target,
// which hears of the end when it has returned from what it is in.
func TestCutWhileBlocked(t *testing.T) {
	b, h := houseBed(t, false, func(o *ServerOptions) { o.Workers = 2 }, wire.OpWrite)
	c := b.visit(1)
	res := start(c, 10, func(i int) *wire.Request { return write(uint64(i), 1000) })
	g := h.all()[0]
	eventually(t, "all read", func() bool { return g.blocked.Load() == 2 && b.srv.Stats().Requests == 10 })
	c.Close()
	for range 10 {
		isLost(t, <-res, true)
	}
	next := b.visit(2)
	after := start(next, 1, func(int) *wire.Request { return write(99, 1000) })
	eventually(t, "both connections", func() bool { return b.srv.Stats().Requests == 11 })
	if g.closes.Load() != 0 {
		t.Error("closed while the target is at a request")
	}
	h.goOn()
	if err := <-after; err != nil {
		t.Error(err)
	}
	eventually(t, "end", func() bool { return g.closes.Load() == 1 })
	if n := g.given.Load(); n != 2 {
		t.Errorf("%d requests given", n)
	}
}

// Stopping does not wait beyond its context for a target that hangs, and can be
// waited for again; what was read before is still done.
func TestStopWhileBlocked(t *testing.T) {
	b, h := houseBed(t, false, func(o *ServerOptions) { o.Workers = 2 }, wire.OpWrite)
	c := b.visit(1)
	res := start(c, 5, func(i int) *wire.Request { return write(uint64(i), 1000) })
	g := h.all()[0]
	eventually(t, "all read", func() bool { return g.blocked.Load() == 2 && b.srv.Stats().Requests == 5 })
	stopped := make(chan error, 1)
	go func() { stopped <- b.srv.StopTarget(ctx, "house") }()
	eventually(t, "farewell", func() bool { return errors.Is(c.Err(), ErrGoAway) })
	soon, cancel := context.WithCancel(ctx)
	cancel()
	if len(stopped) != 0 {
		t.Fatal("did not wait")
	}
	h.goOn()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	for range 5 {
		if err := <-res; err != nil {
			t.Error(err)
		}
	}
	if g.given.Load() != 5 || g.closes.Load() != 1 {
		t.Errorf("%d given, %d times closed", g.given.Load(), g.closes.Load())
	}

	h = newHouse(t, wire.OpWrite)
	if err := b.srv.SetTarget("house", h); err != nil {
		t.Fatal(err)
	}
	res = start(b.visit(2), 5, func(i int) *wire.Request { return write(uint64(i), 1000) })
	g = h.all()[0]
	eventually(t, "full workers", func() bool { return g.blocked.Load() == 2 })
	if err := b.srv.StopTarget(soon, "house"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for range 5 {
		isLost(t, <-res, true)
	}
	again := make(chan error, 1)
	go func() { again <- b.srv.StopTarget(ctx, "house") }()
	if g.closes.Load() != 0 {
		t.Error("closed while the target is at a request")
	}
	h.goOn()
	if err := <-again; err != nil {
		t.Error(err)
	}
	h.shut.Store(true)
	if g.closes.Load() != 1 {
		t.Errorf("%d times closed", g.closes.Load())
	}
}

// A server can close while a target hangs, and says so if it goes on hanging.
func TestCloseWhileBlocked(t *testing.T) {
	b, h := houseBed(t, false, nil, wire.OpWrite)
	b.srv.grace = 0
	c := b.visit(1)
	res := start(c, 3, func(i int) *wire.Request { return write(uint64(i), 1000) })
	eventually(t, "all blocked", func() bool { return h.all()[0].blocked.Load() == 3 })
	soon, cancel := context.WithCancel(ctx)
	cancel()
	if err := b.srv.Close(soon); !errors.Is(err, context.Canceled) || !errors.Is(err, errHangs) {
		t.Error(err)
	}
	for range 3 {
		isLost(t, <-res, true)
	}
	b.srv.grace = closeGrace
	h.goOn()
	if err := b.srv.Close(ctx); err != nil {
		t.Error(err)
	}
	if n := h.all()[0].closes.Load(); n != 1 {
		t.Errorf("%d times closed", n)
	}
}
