package tcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

func (b *bed) bundle(change func(*BundleOptions)) *Bundle {
	b.t.Helper()
	o := BundleOptions{DialOptions: b.options(), Bulk: true}
	o.Target = "house"
	if change != nil {
		change(&o)
	}
	c, err := DialBundle(ctx, o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// serverSide is the server's end of a connection of the given kind.
func (b *bed) serverSide(k Kind) *sconn {
	b.srv.mu.Lock()
	defer b.srv.mu.Unlock()
	for c := range b.srv.conns {
		if c.kind == k {
			return c
		}
	}
	b.t.Fatal("no connection of kind", k)
	return nil
}

// Both connections are of one session; large requests go by the bulk connection,
// all others by the control connection.
func TestBundle(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b, h := houseBed(t, secure, nil)
		c := b.bundle(nil)
		gs := h.all()
		if len(gs) != 2 || gs[0].peer != gs[1].peer || gs[0].peer.Session != c.Session() || c.Session() == 0 || c.Node() != "server" || c.MaxBulk() != wire.MaxBulk {
			t.Fatalf("%+v %v", gs, c)
		}
		read := func(n int) *wire.Request {
			r := request(wire.OpRead, 1)
			r.Bulk = make([]byte, n)
			return r
		}
		for _, req := range []*wire.Request{request(wire.OpPing, 1), write(1, bulkFrom-1), read(bulkFrom - 1), write(1, bulkFrom), read(1 << 20)} {
			var rep wire.Reply
			if err := c.Call(ctx, req, &rep); err != nil || rep.Status != wire.OK || int(rep.Count) != len(req.Bulk) {
				t.Fatal(err, rep.Status, rep.Count)
			}
		}
		if gs[0].given.Load() != 3 || gs[1].given.Load() != 2 || c.TryHandle(read(1), new(wire.Reply)) {
			t.Errorf("%d by control, %d by bulk", gs[0].given.Load(), gs[1].given.Load())
		}
		// A target without data has one connection; each path has a session of its own.
		small := b.bundle(func(o *BundleOptions) { o.Bulk = false })
		if err := small.Call(ctx, write(1, bulkFrom), new(wire.Reply)); err != nil || len(h.all()) != 3 || small.Session() <= c.Session() {
			t.Error(err, len(h.all()), small.Session(), c.Session())
		}
		done := make(chan wire.Status, 1)
		rep := new(wire.Reply)
		small.Close()
		small.Handle(request(wire.OpPing, 1), rep, func() { done <- rep.Status })
		if st := <-done; st != wire.ErrTargetDown || !errors.Is(small.Err(), ErrClosed) {
			t.Error(st, small.Err())
		}
	})
}

// Whichever connection breaks, both end: everything is given back once, and only
// then Done is closed.
func TestBundleBreaks(t *testing.T) {
	for _, x := range []struct {
		what  string
		cut   func(b *bed, c *Bundle)
		cause error
	}{
		{"control is cut", func(b *bed, _ *Bundle) { rawConn(b.serverSide(Control).nc).Close() }, nil},
		{"bulk is cut", func(b *bed, _ *Bundle) { rawConn(b.serverSide(Bulk).nc).Close() }, nil},
		{"close", func(_ *bed, c *Bundle) { c.Close() }, ErrClosed},
		{"abort", func(_ *bed, c *Bundle) { c.Abort(ErrTimeout) }, ErrTimeout},
	} {
		t.Run(x.what, func(t *testing.T) {
			both(t, func(t *testing.T, secure bool) {
				b, h := houseBed(t, secure, func(o *ServerOptions) { o.ControlWindow, o.BulkWindow = 3, 3 })
				h.set(wire.OpWrite, true)
				h.set(wire.OpLockPoll, true)
				c := b.bundle(nil)
				poll := start(c, 1, func(int) *wire.Request { return request(wire.OpLockPoll, 7) })
				small := start(c, 5, func(i int) *wire.Request { return write(uint64(i), 10) })
				large := start(c, 5, func(i int) *wire.Request { return write(uint64(i), bulkFrom) })
				eventually(t, "full windows", func() bool { return h.seen(wire.OpWrite) == 6 && h.seen(wire.OpLockPoll) == 1 })
				if c.Outstanding() != 11 {
					t.Error(c.Outstanding())
				}
				x.cut(b, c)
				<-c.Done()
				if len(poll) != 1 || len(small) != 5 || len(large) != 5 || c.Outstanding() != 0 {
					t.Fatalf("done with %d + %d + %d given back", len(poll), len(small), len(large))
				}
				isLost(t, <-poll, true)
				for _, res := range []chan error{small, large} {
					sent := 0
					for range 5 {
						err := <-res
						if !wire.NeverSent(err) {
							sent++
						}
						if x.cause != nil && !errors.Is(err, x.cause) {
							t.Error(err)
						}
					}
					if sent != 3 {
						t.Errorf("%d of the requests were sent", sent)
					}
				}
				isLost(t, c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply)), false)
				isLost(t, c.Call(ctx, write(1, bulkFrom), new(wire.Reply)), false)
				h.release()
				for _, g := range h.all() {
					eventually(t, "end at the target", func() bool { return g.closes.Load() == 1 })
				}
			})
		})
	}
}

// When the server leaves, on both connections or, for all the client can see, on
// one, no new requests are taken, those that were read are answered, and both end.
func TestBundleGoAway(t *testing.T) {
	for what, kinds := range map[string][]Kind{"both": {Control, Bulk}, "control": {Control}, "bulk": {Bulk}} {
		t.Run(what, func(t *testing.T) {
			both(t, func(t *testing.T, secure bool) {
				b, h := houseBed(t, secure, func(o *ServerOptions) { o.ControlWindow, o.BulkWindow = 3, 3 })
				h.set(wire.OpWrite, true)
				h.set(wire.OpLockPoll, true)
				c := b.bundle(nil)
				poll := start(c, 1, func(int) *wire.Request { return request(wire.OpLockPoll, 7) })
				small := start(c, 5, func(i int) *wire.Request { return write(uint64(i), 10) })
				large := start(c, 5, func(i int) *wire.Request { return write(uint64(i), bulkFrom) })
				eventually(t, "full windows", func() bool { return h.seen(wire.OpWrite) == 6 && h.seen(wire.OpLockPoll) == 1 })
				for _, k := range kinds {
					b.serverSide(k).drain()
				}
				for range 2 {
					isLost(t, <-small, false)
					isLost(t, <-large, false)
				}
				if !errors.Is(c.Err(), ErrGoAway) {
					t.Error(c.Err())
				}
				isLost(t, c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply)), false)
				isLost(t, c.Call(ctx, write(1, bulkFrom), new(wire.Reply)), false)
				select {
				case <-c.Done():
					t.Fatal("ended with requests at the target")
				default:
				}
				h.releaseBut(wire.OpLockPoll)
				for range 3 {
					if err := <-small; err != nil {
						t.Error(err)
					}
					if err := <-large; err != nil {
						t.Error(err)
					}
				}
				isLost(t, <-poll, true)
				<-c.Done()
				h.release()
			})
		})
	}
}

// A server that ends in order leaves no request of a bundle without an answer or
// the news that it was not sent, whatever is just on its way.
func TestBundleServerStops(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, nil)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		for round := range 10 {
			h := newHouse(t)
			h.later = round%2 == 0
			if err := b.srv.SetTarget("house", h); err != nil {
				t.Fatal(err)
			}
			c := b.bundle(nil)
			var wg sync.WaitGroup
			var answered, refused atomic.Int64
			for w := range 4 {
				rnd := rand.New(rand.NewPCG(seed, uint64(round*4+w)))
				wg.Go(func() {
					for {
						err := c.Call(ctx, write(1, []int{0, 100, bulkFrom, 100000}[rnd.IntN(4)]), new(wire.Reply))
						switch {
						case err == nil:
							answered.Add(1)
							continue
						case !wire.NeverSent(err):
							t.Error(err)
						}
						refused.Add(1)
						return
					}
				})
			}
			eventually(t, "requests", func() bool { return answered.Load() > 50 })
			if err := b.srv.StopTarget(ctx, "house"); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			<-c.Done()
			if n := h.seen(wire.OpWrite); int64(n) != answered.Load() {
				t.Errorf("round %d: %d executed, %d answered", round, n, answered.Load())
			}
		}
	})
}

// A node that is gone without a word is noticed on either connection.
func TestBundleServerVanishes(t *testing.T) {
	noLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for range 2 {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, nc)
			greet(nc)
		}
	}()
	b, err := DialBundle(ctx, BundleOptions{Bulk: true, DialOptions: DialOptions{
		Addrs: []Endpoint{{Addr: l.Addr().String()}}, Target: "x", Node: "client", Insecure: true, Timeouts: Timeouts{Idle: 300 * time.Millisecond},
	}})
	if err != nil {
		t.Fatal(err)
	}
	<-accepted
	res := start(b, 4, func(i int) *wire.Request { return write(uint64(i), (i&1)*bulkFrom) })
	<-b.Done()
	for range 4 {
		isLost(t, <-res, true)
	}
	if !errors.Is(b.Err(), ErrTimeout) {
		t.Error(b.Err())
	}
	for _, nc := range conns {
		nc.Close()
	}
	l.Close()
}

// A path that cannot be completed is given up as a whole, and the next address is
// tried with a new session.
func TestBundleDialHalfDone(t *testing.T) {
	var refuse atomic.Bool
	refuse.Store(true)
	b, h := houseBed(t, true, func(o *ServerOptions) {
		o.Allow = func(_, _ string, k Kind) error {
			if k == Bulk && refuse.Load() {
				return errors.New("no bulk now")
			}
			return nil
		}
	})
	o := BundleOptions{DialOptions: b.options(), Bulk: true}
	o.Target = "house"
	if _, err := DialBundle(ctx, o); !errors.Is(err, ErrRefused) {
		t.Fatal(err)
	}
	eventually(t, "end of the half", func() bool { gs := h.all(); return len(gs) == 1 && gs[0].closes.Load() == 1 })

	// The first address's bulk connection is cut in the handshake.
	refuse.Store(false)
	dials := 0
	o.Addrs = append(o.Addrs, o.Addrs[0])
	o.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		nc, err := new(net.Dialer).DialContext(ctx, network, addr)
		if dials++; err == nil && dials == 2 {
			nc = &cutConn{Conn: nc, read: 300, write: -1}
		}
		return nc, err
	}
	c, err := DialBundle(ctx, o)
	if err != nil || dials != 4 {
		t.Fatal(err, dials)
	}
	gs := h.all()
	if len(gs) != 4 || gs[2].peer.Session != c.Session() || gs[3].peer.Session != c.Session() || gs[1].peer.Session >= c.Session() {
		t.Errorf("%+v", gs)
	}
	eventually(t, "end of the half", func() bool { return gs[1].closes.Load() == 1 })
	c.Close()

	// The context's end in the middle.
	dials = 0
	o.Addrs = o.Addrs[:1]
	short, cancel := context.WithCancel(ctx)
	o.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dials++; dials == 2 {
			cancel()
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	if _, err := DialBundle(short, o); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for _, g := range h.all() {
		eventually(t, "end", func() bool { return g.closes.Load() == 1 })
	}
}

// An address behind which there are different nodes makes no path.
func TestBundleOfTwoNodes(t *testing.T) {
	noLeaks(t)
	n := 0
	o := fakeServer(t, func(nc net.Conn) {
		if _, err := readHandshake(nc); err != nil {
			return
		}
		n++
		w := welcome{version: 1, window: 8, maxBulk: 1 << 20, node: fmt.Sprint("node", n)}
		_, _ = nc.Write(w.encode())
		if n == 2 {
			_, _ = io.Copy(io.Discard, nc)
		}
	})
	// The fake server has one connection at a time: the first is closed when the second comes.
	if _, err := DialBundle(ctx, BundleOptions{DialOptions: o, Bulk: true}); !errors.Is(err, ErrIdentity) {
		t.Error(err)
	}
}

// A control connection that breaks before there is a bulk connection ends the
// bundle as one that breaks later.
func TestBundleLinkAfterTheEnd(t *testing.T) {
	b, _ := houseBed(t, false, nil)
	for _, cause := range []error{ErrClosed, ErrGoAway} {
		for _, dead := range []int{0, 1} {
			cs := []*Conn{b.visit(1), b.visit(1)}
			cs[dead].Abort(cause)
			link(cs[0], cs[1])
			<-cs[1-dead].Done()
			if err := cs[1-dead].Err(); !errors.Is(err, cause) {
				t.Error(err)
			}
		}
	}
	cs := []*Conn{b.visit(1), b.visit(1)}
	cs[0].retire()
	link(cs[0], cs[1])
	<-cs[0].Done()
	<-cs[1].Done()
}

// Bundles that end in every way at every moment: each request comes back once,
// with its own answer or none, and what was never sent is never executed.
func TestBundleEndsAnywhere(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b, h := houseBed(t, secure, func(o *ServerOptions) { o.ControlWindow, o.BulkWindow, o.Workers = 16, 4, 2 }, wire.OpPunch)
		h.later = true
		h.goOn()
		executed := &seenXIDs{house: h, m: map[uint64]bool{}}
		if err := b.srv.SetTarget("seen", executed); err != nil {
			t.Fatal(err)
		}
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rounds := 80
		if testing.Short() {
			rounds = 30
		}
		var answered, lost, never int64
		for round := range rounds {
			rnd := rand.New(rand.NewPCG(seed, uint64(round)))
			cut := &cutConn{read: -1, write: -1}
			end := rnd.IntN(6)
			limit := 1000 + rnd.IntN(1<<(12+round%9))
			which, dials := rnd.IntN(2), 0
			o := BundleOptions{DialOptions: b.options(), Bulk: true}
			o.Target = "seen"
			o.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				nc, err := new(net.Dialer).DialContext(ctx, network, addr)
				if err == nil && dials == which && end < 2 {
					cut.Conn = nc
					if end == 0 {
						cut.read = limit
					} else {
						cut.write = limit
					}
					nc = cut
				}
				dials++
				return nc, err
			}
			c, err := DialBundle(ctx, o)
			if err != nil {
				continue // cut in the handshake
			}
			var mu sync.Mutex
			back := map[uint64]int{}
			var wg, cbs sync.WaitGroup
			for w := range 3 {
				r := rand.New(rand.NewPCG(seed, uint64(round)<<8|uint64(w)))
				wg.Go(func() {
					for i := range 30 {
						xid := uint64(round)<<32 | uint64(w)<<16 | uint64(i)
						req := request([]wire.Op{wire.OpWrite, wire.OpWrite, wire.OpPunch}[r.IntN(3)], xid)
						req.Offset = r.Uint64()
						if req.Op == wire.OpWrite {
							req.Bulk = make([]byte, []int{0, 100, bulkFrom, 70000}[r.IntN(4)])
						}
						rep := new(wire.Reply)
						cbs.Add(1)
						c.Start(req, rep, func(err error) {
							mu.Lock()
							defer mu.Unlock()
							back[xid]++
							switch {
							case err == nil:
								answered++
								if rep.XID != xid || req.Op == wire.OpWrite && (rep.Obj.Size != req.Offset || int(rep.Count) != len(req.Bulk)) {
									t.Errorf("request %#x got %+v", xid, rep)
								}
							case wire.NeverSent(err):
								never++
								if executed.has(xid) {
									t.Errorf("request %#x was executed, but not sent", xid)
								}
							default:
								lost++
							}
							if back[xid] > 1 {
								t.Errorf("request %#x came back %d times", xid, back[xid])
							}
							cbs.Done()
						})
						if r.IntN(8) == 0 {
							time.Sleep(time.Duration(r.IntN(100)) * time.Microsecond)
						}
					}
				})
			}
			time.Sleep(time.Duration(rnd.IntN(1000)) * time.Microsecond)
			switch end {
			case 2:
				c.Abort(ErrClosed)
			case 3, 4:
				b.srv.mu.Lock()
				for sc := range b.srv.conns {
					if end == 3 {
						sc.drain()
					} else if sc.kind == Bulk {
						sc.close(ErrClosed)
					}
				}
				b.srv.mu.Unlock()
			}
			wg.Wait()
			if end == 3 {
				<-c.Done()
			}
			c.Close()
			cbs.Wait()
			mu.Lock()
			for xid, n := range back {
				if n != 1 {
					t.Errorf("request %#x came back %d times", xid, n)
				}
			}
			mu.Unlock()
		}
		if answered == 0 || lost == 0 || never == 0 {
			t.Errorf("%d answered, %d lost, %d not sent: the test does not test", answered, lost, never)
		}
		t.Logf("%d answered, %d lost, %d not sent", answered, lost, never)
		eventually(t, "the target's late answers", func() bool { return b.srv.Stats().MemoryInUse == 0 && b.srv.Stats().Conns == 0 })
	})
}

// seenXIDs is a house that remembers what was given to it.
type seenXIDs struct {
	*house
	mu sync.Mutex
	m  map[uint64]bool
}

func (s *seenXIDs) Accept(p wire.Peer) wire.Target {
	return &seenGuest{s.house.Accept(p).(blockingGuest), s}
}

func (s *seenXIDs) has(xid uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m[xid]
}

type seenGuest struct {
	blockingGuest
	s *seenXIDs
}

func (g *seenGuest) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	g.s.mu.Lock()
	if g.s.m[req.XID] {
		g.h.t.Errorf("request %#x was executed twice", req.XID)
	}
	g.s.m[req.XID] = true
	g.s.mu.Unlock()
	g.blockingGuest.Handle(req, rep, done)
}
