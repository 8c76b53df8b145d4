package front

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// serve moves what there is of a connection, until it is broken.
func (c *simConn) serve() {
	s := c.s
	for range c.wake {
		for more := true; more && !c.isBroken(); {
			more = s.receive(c)
			c.mu.Lock()
			to := len(c.to)
			c.mu.Unlock()
			if to > 0 {
				s.deliver(c)
				more = true
			}
		}
		if c.isBroken() {
			s.giveBack(c)
			s.shutServer(c)
			return
		}
	}
}

// TestConcurrent is for the race detector, and for what only happens when it
// happens at once: imports, their connections, a client in the target's process,
// the disk and the administrator each have goroutines. The target dies and is
// stopped a few times. What was acknowledged is checked as in the simulation.
func TestConcurrent(t *testing.T) {
	const clients, perClient, rounds = 3, 6, 5
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d (of the requests; their order is the scheduler's)", seed)
	s := &sim{
		t: t, d: &disk{}, seen: map[string]int{}, seed: seed,
		cfg: recov.Config{
			SoftMin: 2 * time.Second, SoftMax: 4 * time.Second, Hard: 20 * time.Second, Step: time.Second,
			PingInterval: 50 * time.Millisecond, PingTimeout: 20 * time.Second, CommitOnShare: true,
		},
	}
	s.vip.Store(1)
	s.start()

	var serving, working sync.WaitGroup
	var ending atomic.Bool
	for i := range clients {
		c := &simClient{s: s, name: string(rune('a' + i)), gen: 1}
		c.id[0] = byte(i + 1)
		s.clients = append(s.clients, c)
		var mu sync.Mutex // c's
		im, err := imp.Open(imp.Options{
			Addrs: []string{"x"}, Client: c.id, Gen: 1,
			Dial: func(ctx context.Context, _ string) (wire.Conn, error) {
				conn, err := s.dial(ctx, c)
				if err == nil {
					k := conn.(*simConn)
					k.wake = make(chan struct{}, 1)
					serving.Go(k.serve)
				}
				return conn, err
			},
			Config: imp.Config{
				PingInterval: 100 * time.Millisecond, DeadAfter: 10 * time.Second, ConnectTimeout: 10 * time.Second,
				BackoffMin: time.Millisecond, BackoffMax: 10 * time.Millisecond, RetryDelay: 5 * time.Millisecond,
			},
			OnEvicted: func(l imp.Loss) {
				mu.Lock()
				defer mu.Unlock()
				for _, r := range l.Requests {
					_, who := objects(r)
					for _, o := range c.ops {
						o.lost = o.lost || o.who == who
					}
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		c.im = im
		for j := range perClient {
			rng := rand.New(rand.NewPCG(seed, uint64(i*perClient+j)))
			working.Go(func() {
				for !ending.Load() {
					mu.Lock()
					o := c.newOp(rng)
					mu.Unlock()
					err := im.Call(context.Background(), &o.req, &o.rep)
					mu.Lock()
					if err == nil {
						o.answered()
					}
					mu.Unlock()
				}
			})
		}
	}

	// The disk, and what executes late.
	quit := make(chan struct{})
	serving.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 1000))
		for {
			select {
			case <-quit:
				return
			case <-time.After(time.Duration(rng.IntN(10000)) * time.Microsecond):
			}
			s.mu.Lock()
			later, b := s.later, s.b
			s.later = nil
			s.mu.Unlock()
			for _, r := range later {
				r.run()
			}
			b.mu.Lock()
			if b.dead {
				b.mu.Unlock()
				continue
			}
			n := b.d.durable + rng.IntN(len(b.d.log)-b.d.durable+1)
			b.mu.Unlock()
			b.commit(n)
		}
	})

	rng := rand.New(rand.NewPCG(seed, 2000))
	var local atomic.Uint64
	for round := range rounds {
		l := &simLocal{s: s, id: wire.ClientID{200}, gen: uint64(round)}
		l.start()
		var localOps sync.WaitGroup
		stop := make(chan struct{})
		for range 2 {
			lrng := rand.New(rand.NewPCG(seed, rng.Uint64()))
			localOps.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(time.Duration(lrng.IntN(500)) * time.Microsecond):
					}
					if !l.ready.Load() {
						continue
					}
					req := &wire.Request{Header: wire.Header{Op: wire.OpGetattr, Client: l.id, ClientGen: l.gen}}
					rep := &wire.Reply{}
					l.c.TryHandle(req, rep)
					if lrng.IntN(4) == 0 {
						req.Op, req.Flags = wire.OpMkdir, wire.FlagWaitCommit
						req.Name = fmt.Appendf(nil, "o%d#local/%d", lrng.IntN(10), local.Add(1))
					}
					done := make(chan struct{})
					rep.Reset()
					l.c.Handle(req, rep, func() { close(done) })
					<-done
				}
			})
		}
		for range 20 {
			time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
			switch rng.IntN(4) {
			case 0:
				if conns := s.all(); len(conns) > 0 {
					conns[rng.IntN(len(conns))].cut()
				}
			case 1:
				s.vip.Add(1)
			case 2:
				s.f.Status()
			case 3:
				if rng.IntN(3) == 0 {
					s.f.Evict(s.clients[0].id)
				}
			}
		}
		close(stop)
		localOps.Wait()
		l.c.(io.Closer).Close()
		s.restart(rng.IntN(3) == 0)
	}
	ending.Store(true)
	idle := make(chan struct{})
	go func() { working.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-time.After(60 * time.Second):
		t.Fatalf("no rest: %+v", s.f.Status())
	}
	for _, c := range s.clients {
		c.im.Close()
	}
	if err := s.f.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	close(quit)
	for _, c := range s.all() {
		c.cut()
	}
	serving.Wait()
	s.mu.Lock()
	for _, b := range s.bad {
		t.Error(b)
	}
	s.mu.Unlock()
	s.check()
	if n := s.calls.Load(); n != 0 {
		t.Errorf("%d requests are not answered", n)
	}
	t.Log(s.seen)
	if s.seen["checked"] == 0 {
		t.Error("nothing was answered")
	}
}

// restart ends the target's process, in order or not, and starts it again.
func (s *sim) restart(orderly bool) {
	old, f := s.b, s.f
	if orderly {
		if err := f.Stop(context.Background()); err != nil {
			s.t.Error(err)
		}
	}
	s.mu.Lock()
	s.up = false
	s.mu.Unlock()
	for _, c := range s.all() {
		if c.boot == old {
			c.cut()
		}
	}
	release := old.die()
	f.Fail(errDead)
	release()
	select {
	case <-f.ended:
	case <-time.After(30 * time.Second):
		s.t.Fatal("a front does not end")
	}
	s.d.crash()
	s.start()
}
