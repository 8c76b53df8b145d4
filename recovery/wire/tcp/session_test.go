package tcp

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// house is a target that knows its connections and watches over what it is
// promised.
type house struct {
	*fake
	t      testing.TB
	shut   atomic.Bool      // stopped: nothing may come any more
	blocks map[wire.Op]bool // Handle waits for goOn
	goOn   func()
	open   chan struct{}

	mu     sync.Mutex
	guests []*guest
}

type guest struct {
	h       *house
	peer    wire.Peer
	inside  atomic.Int32
	given   atomic.Int32
	closes  atomic.Int32
	blocked atomic.Int32
}

func newHouse(t testing.TB, blocks ...wire.Op) *house {
	h := &house{fake: newFake(), t: t, blocks: map[wire.Op]bool{}, open: make(chan struct{})}
	for _, op := range blocks {
		h.blocks[op] = true
	}
	h.goOn = sync.OnceFunc(func() { close(h.open) })
	t.Cleanup(h.goOn)
	return h
}

func (h *house) Accept(p wire.Peer) wire.Target {
	if h.shut.Load() {
		h.t.Error("a connection after the stop")
	}
	g := &guest{h: h, peer: p}
	h.mu.Lock()
	h.guests = append(h.guests, g)
	h.mu.Unlock()
	if len(h.blocks) > 0 {
		return blockingGuest{g}
	}
	return g
}

func (h *house) all() []*guest {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]*guest(nil), h.guests...)
}

func (g *guest) check() {
	if g.closes.Load() != 0 || g.h.shut.Load() {
		g.h.t.Error("a request after the end")
	}
}

func (g *guest) TryHandle(*wire.Request, *wire.Reply) bool {
	g.check()
	return false
}

func (g *guest) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	g.check()
	g.given.Add(1)
	g.inside.Add(1)
	defer g.inside.Add(-1)
	if g.h.blocks[req.Op] {
		g.blocked.Add(1)
		<-g.h.open
	}
	g.h.fake.Handle(req, rep, done)
}

func (g *guest) Close() error {
	if n := g.closes.Add(1); n != 1 || g.inside.Load() != 0 || g.h.shut.Load() {
		g.h.t.Errorf("closed %d times, with %d requests being given", n, g.inside.Load())
	}
	return nil
}

type blockingGuest struct{ *guest }

func (g blockingGuest) MayBlock(op wire.Op) bool { return g.h.blocks[op] }

// houseBed is a bed whose target "house" is one.
func houseBed(t testing.TB, secure bool, change func(*ServerOptions), blocks ...wire.Op) (*bed, *house) {
	t.Helper()
	b := newBed(t, secure, change)
	h := newHouse(t, blocks...)
	if err := b.srv.SetTarget("house", h); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.release() })
	return b, h
}

func (b *bed) visit(session uint64) *Conn {
	return b.dial(func(o *DialOptions) { o.Target, o.Session = "house", session })
}

// The target knows each connection by node and session before the client has it,
// and gets its requests apart from those of others.
func TestSessions(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b, h := houseBed(t, secure, nil)
		for i, session := range []uint64{7, 7, 0, 1<<64 - 1} {
			c := b.visit(session)
			gs := h.all()
			if len(gs) != i+1 || gs[i].peer != (wire.Peer{Node: "client", Session: session}) {
				t.Fatalf("connection %d: %+v", i, gs)
			}
			for range i {
				if err := c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, g := range h.all() {
			if int(g.given.Load()) != i || g.closes.Load() != 0 {
				t.Errorf("connection %d: %d requests, closed %d", i, g.given.Load(), g.closes.Load())
			}
		}
	})
}

// However a connection ends, its target is told once, after the last request.
func TestEndings(t *testing.T) {
	const silent = "client is silent"
	fast := Timeouts{Idle: time.Second}
	now, cancel := context.WithCancel(ctx)
	cancel()
	for _, x := range []struct {
		what string
		end  func(t *testing.T, b *bed, c *Conn)
	}{
		{"client closes", func(_ *testing.T, _ *bed, c *Conn) { c.Close() }},
		{"connection is cut", func(_ *testing.T, _ *bed, c *Conn) { rawConn(c.nc).Close() }},
		{silent, func(*testing.T, *bed, *Conn) {}},
		{"client breaks the protocol", func(t *testing.T, _ *bed, c *Conn) {
			if _, err := c.nc.Write(make([]byte, prefixSize)); err != nil {
				t.Error(err)
			}
		}},
		{"target stops", func(t *testing.T, b *bed, _ *Conn) {
			if err := b.srv.StopTarget(now, "house"); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if err := b.srv.StopTarget(ctx, "house"); err != nil {
				t.Error(err)
			}
		}},
		{"server closes", func(_ *testing.T, b *bed, _ *Conn) { _ = b.srv.Close(now) }},
	} {
		t.Run(x.what, func(t *testing.T) {
			both(t, func(t *testing.T, secure bool) {
				b, h := houseBed(t, secure, func(o *ServerOptions) {
					if x.what == silent {
						o.Timeouts = fast
					}
				})
				h.set(wire.OpGetattr, true)
				h.set(wire.OpLockPoll, true)
				c := b.visit(3)
				for _, op := range []wire.Op{wire.OpGetattr, wire.OpLockPoll, wire.OpGetattr} {
					c.Start(request(op, 1), new(wire.Reply), func(error) {})
				}
				eventually(t, "requests", func() bool { return h.all()[0].given.Load() == 3 })
				x.end(t, b, c)
				eventually(t, "end", func() bool { return h.all()[0].closes.Load() == 1 })
				h.release()
			})
		})
	}
}

// A client that goes away in its handshake has been accepted, or not; its target
// hears of both or of nothing.
func TestGoneInHandshake(t *testing.T) {
	b, h := houseBed(t, false, nil)
	h2 := hello{min: 1, max: 1, kind: Control, session: 5, node: "client", target: "house"}
	for i := range 100 {
		nc, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		p := h2.encode()
		if i%3 == 0 {
			p = p[:i%len(p)]
		}
		_, _ = nc.Write(p)
		if i%2 == 0 {
			_ = nc.(*net.TCPConn).SetLinger(0)
		}
		_ = nc.Close()
	}
	eventually(t, "quiet", func() bool { st := b.srv.Stats(); return st.Accepted == 100 && st.Conns == 0 })
	eventually(t, "ends", func() bool {
		for _, g := range h.all() {
			if g.closes.Load() != 1 {
				return false
			}
		}
		return true
	})
	if len(h.all()) == 0 {
		t.Error("none was accepted: the test does not test")
	}
}

// When StopTarget has returned nothing comes to the target any more, however many
// clients are just connecting.
func TestStopWhileClientsConnect(t *testing.T) {
	b := newBed(t, false, nil)
	end := make(chan struct{})
	var wg sync.WaitGroup
	var accepted atomic.Int64
	for range 4 {
		wg.Go(func() {
			o := b.options()
			o.Target = "house"
			for {
				select {
				case <-end:
					return
				default:
				}
				c, err := Dial(ctx, o)
				switch {
				case err == nil:
					accepted.Add(1)
					err = c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply))
					if err != nil && !errors.Is(err, ErrGoAway) {
						t.Error(err)
					}
					c.Close()
				case !errors.Is(err, ErrNoTarget):
					t.Error(err)
				}
			}
		})
	}
	for range 40 {
		h := newHouse(t)
		if err := b.srv.SetTarget("house", h); err != nil {
			t.Fatal(err)
		}
		n := accepted.Load()
		eventually(t, "clients", func() bool { return accepted.Load() >= n+3 })
		if err := b.srv.StopTarget(ctx, "house"); err != nil {
			t.Fatal(err)
		}
		h.shut.Store(true)
		for _, g := range h.all() {
			if g.closes.Load() != 1 {
				t.Errorf("closed %d times when the target has stopped", g.closes.Load())
			}
		}
	}
	close(end)
	wg.Wait()
}

// A server that stops while a client is in its handshake does not leave it
// waiting: the client is connected and told that the target leaves.
func TestStopInHandshake(t *testing.T) {
	b, h := houseBed(t, false, nil)
	gate := make(chan struct{})
	if err := b.srv.SetTarget("gated", gated{h, gate}); err != nil {
		t.Fatal(err)
	}
	res := make(chan error, 1)
	go func() {
		o := b.options()
		o.Target = "gated"
		c, err := Dial(ctx, o)
		if err == nil {
			<-c.Done()
			err = c.Err()
		}
		res <- err
	}()
	eventually(t, "connection", func() bool { return b.srv.Stats().Conns == 1 })
	stopped := make(chan error, 1)
	go func() { stopped <- b.srv.StopTarget(ctx, "gated") }()
	eventually(t, "drain", func() bool {
		b.srv.mu.Lock()
		defer b.srv.mu.Unlock()
		for c := range b.srv.conns {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.drained
		}
		return false
	})
	close(gate)
	if err := <-res; !errors.Is(err, ErrGoAway) {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// gated accepts when the gate opens.
type gated struct {
	*house
	gate chan struct{}
}

func (g gated) Accept(p wire.Peer) wire.Target { <-g.gate; return g.house.Accept(p) }

// A hello that says nothing sensible of its session is no hello; what says
// something is taken as it is.
func TestHelloSession(t *testing.T) {
	h := hello{min: 1, max: 2, kind: Bulk, session: 0x0102030405060708, node: "client", target: "house"}
	p := h.encode()
	for cut := range len(p) - 6 {
		got, err := decodeHello(p[6 : 6+cut])
		if !errors.Is(err, ErrPeer) {
			t.Errorf("%d bytes: %v, %+v", cut, err, got)
		}
	}
	if got, err := decodeHello(append(p[6:], "later fields"...)); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzHello(f *testing.F) {
	h := hello{min: 1, max: 1, kind: Control, session: 9, node: "client", target: "MDT0000"}
	w := welcome{version: 1, window: 8, maxBulk: 1 << 20, node: "server", text: "text"}
	f.Add(h.encode()[6:])
	f.Add(w.encode()[6:])
	f.Add([]byte{0, 1, 0, 1, 1, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil {
			if again, err := decodeHello(h.encode()[6:]); err != nil || again != h {
				t.Errorf("%+v became %+v, %v", h, again, err)
			}
		} else if !errors.Is(err, ErrPeer) {
			t.Error(err)
		}
		if w, err := decodeWelcome(b); err == nil {
			if again, err := decodeWelcome(w.encode()[6:]); err != nil || again != w {
				t.Errorf("%+v became %+v, %v", w, again, err)
			}
		} else if !errors.Is(err, ErrPeer) {
			t.Error(err)
		}
	})
}

var _ io.Closer = (*guest)(nil)
