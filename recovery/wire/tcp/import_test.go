package tcp

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/wire"
)

// moving is a target for imports that is never restarted, only reached elsewhere.
// It executes a request once, however often it is sent.
type moving struct {
	t        *testing.T
	accepted atomic.Int64
	closed   atomic.Int64
	locals   atomic.Int64

	mu      sync.Mutex
	known   map[wire.ClientID]bool
	replies map[uint64]wire.Reply
	session uint64
	polls   []func()
}

type movingConn struct {
	*moving
	peer wire.Peer
}

func (m *moving) Accept(p wire.Peer) wire.Target {
	m.accepted.Add(1)
	if p.Local {
		m.locals.Add(1)
	}
	return &movingConn{m, p}
}

func (m *moving) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (m *moving) MayBlock(op wire.Op) bool { return op == wire.OpWrite }

func (m *moving) Handle(*wire.Request, *wire.Reply, func()) {
	m.t.Error("a request without a connection")
}

func (c *movingConn) Close() error {
	c.closed.Add(1)
	return nil
}

func (c *movingConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	c.mu.Lock()
	rep.XID = req.XID
	switch {
	case req.Op == wire.OpConnect:
		if c.peer.Session <= c.session {
			c.t.Errorf("session %d after %d", c.peer.Session, c.session)
		}
		c.session = c.peer.Session
		rep.Instance, rep.Known = 1, c.known[req.Client]
		c.known[req.Client] = true
	case c.peer.Session != c.session:
		rep.Status = wire.ErrStaleClient // late: the client does not hear it
	case req.Op == wire.OpLockPoll:
		c.polls = append(c.polls, done)
		c.mu.Unlock()
		return
	case req.Op.Modifies():
		if old, ok := c.replies[req.XID]; ok {
			*rep = old
			break
		}
		rep.Transno = uint64(len(c.replies) + 1)
		rep.LastCommitted = rep.Transno
		rep.Count = uint32(len(req.Bulk))
		c.replies[req.XID] = *rep
	}
	c.mu.Unlock()
	done()
}

// An import finds its target again wherever it goes, on another node or in its own
// process, and its callers see nothing of it; when it closes, its connections have
// given everything back.
func TestImportOverMovingTarget(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		m := &moving{t: t, known: map[wire.ClientID]bool{}, replies: map[uint64]wire.Reply{}}
		b := newBed(t, secure, nil) // its two targets are two places
		var local atomic.Bool
		var lmu sync.Mutex
		var locals []*wire.LocalConn
		im, err := imp.Open(imp.Options{
			Addrs: []string{"a", "b", "local"}, Client: wire.ClientID{1}, Gen: 1, Logger: slog.New(slog.DiscardHandler),
			Config: imp.Config{Slots: 8, BackoffMin: time.Millisecond, BackoffMax: 10 * time.Millisecond},
			Dial: func(ctx context.Context, addr string) (wire.Conn, error) {
				if addr == "local" {
					if !local.Load() {
						return nil, errors.New("the target is not here")
					}
					c := wire.Local(m, wire.NextSession())
					lmu.Lock()
					locals = append(locals, c)
					lmu.Unlock()
					return c, nil
				}
				o := BundleOptions{DialOptions: b.options(), Bulk: true}
				o.Target = addr
				return DialBundle(ctx, o)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		poll := make(chan wire.Status, 1)
		rep := new(wire.Reply)
		im.Handle(request(wire.OpLockPoll, 0), rep, func() { poll <- rep.Status })

		end := make(chan struct{})
		var answered atomic.Int64
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-end:
						return
					default:
					}
					rep := new(wire.Reply)
					req := write(0, []int{10, bulkFrom, 0}[i%3])
					if i%3 == 2 {
						req = request(wire.OpGetattr, 0)
					}
					if err := im.Call(ctx, req, rep); err != nil || rep.Status != wire.OK || int(rep.Count) != len(req.Bulk) {
						t.Errorf("caller %d: %v %v %d", w, err, rep.Status, rep.Count)
						return
					}
					answered.Add(1)
				}
			})
		}
		for range 4 {
			for _, place := range []string{"a", "b", "local"} {
				if place == "local" {
					local.Store(true)
				} else if err := b.srv.SetTarget(place, m); err != nil {
					t.Fatal(err)
				}
				n := answered.Load()
				eventually(t, "answers at "+place, func() bool { return answered.Load() > n+20 })
				if place != "local" {
					if err := b.srv.StopTarget(ctx, place); err != nil {
						t.Fatal(err)
					}
					continue
				}
				local.Store(false)
				// What a target that leaves its process does not answer, it refuses;
				// here the connection ends instead, below the import.
				lmu.Lock()
				for _, c := range locals {
					c.Close()
				}
				lmu.Unlock()
			}
		}
		local.Store(true)
		n := answered.Load()
		eventually(t, "answers at the end", func() bool { return answered.Load() > n })
		close(end)
		wg.Wait()
		if err := im.Close(); err != nil {
			t.Error(err)
		}
		if st := <-poll; st != wire.ErrTargetDown {
			t.Error(st)
		}
		lmu.Lock()
		for _, c := range locals {
			<-c.Done()
		}
		lmu.Unlock()
		eventually(t, "end of all connections", func() bool { return m.accepted.Load() == m.closed.Load() })
		if m.locals.Load() == 0 {
			t.Error("never in one process")
		}
		m.mu.Lock()
		for _, done := range m.polls {
			done() // late
		}
		m.mu.Unlock()
	})
}
