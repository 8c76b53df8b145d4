package front

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Clock gives the time and timers.
type Clock struct {
	Now func() time.Time
	// AfterFunc calls f once in d, from any goroutine, unless stopped.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)
}

// SystemClock is the machine's own clock.
func SystemClock() Clock {
	return Clock{
		Now:       time.Now,
		AfterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}

// Options of New. Body is required.
type Options struct {
	// Name is the target's, for the log.
	Name string
	// Own is the client by which the target itself works elsewhere and here.
	Own    wire.ClientID
	Body   Body
	Config recov.Config
	// Pingless: clients on other nodes need not ping while somebody watches their
	// nodes and tells Alive.
	Pingless bool
	Clock    Clock // default SystemClock
	Logger   *slog.Logger
	// OnState is called with each new state after New, in order, by a goroutine of
	// the front, which waits for it. It must not call Stop.
	OnState func(recov.State)
	// OnFail is called once when the target fails, be it told by Fail or found out by
	// the front itself. It must not block or call the front.
	OnFail func(error)
}

// Front is a target in service. Its methods are safe for concurrent use.
type Front struct {
	o    Options
	body Body
	log  *slog.Logger
	// mayBlock is the body's, nil when it does not say.
	mayBlock func(wire.Op) bool

	// serving: recovery is over and the body has begun. Changed under mu.
	serving  atomic.Bool
	stopping atomic.Bool // by Stop or Fail; changed under mu
	failed   atomic.Bool
	wake     chan struct{}
	ended    chan struct{} // the loop has
	tasks    sync.WaitGroup

	mu       sync.Mutex
	m        *recov.Machine
	queue    []recov.Action // for the loop
	fences   int            // of the queue, and in work: what executions must not overtake
	sessions map[sessionKey]*session
	links    map[wire.ClientID]*session
	remote   int                      // of links
	homes    map[wire.ClientID]string // nodes from which registered clients were connected last
	conns    map[*conn]struct{}       // open, or with requests inside
	left     uint64                   // requests that have left connections which are no more
	held     []*call                  // until the target serves
	raises   map[raiseKey][]*call
	due      bool // the timer has fired
	timerAt  time.Time
	unarm    func() bool
	swept    time.Time
	final    *recov.TargetRecord // the machine has ended
	leaving  bool                // Stop's caller has given up
	err      error
}

type sessionKey struct {
	node  string
	num   uint64
	local bool
}

type raiseKey struct {
	vip   uint32
	epoch uint64
}

// maxHeld bounds the requests that wait until the target serves.
const maxHeld = 1024

var (
	_ wire.Acceptor = (*Front)(nil)
	_ wire.Target   = (*Front)(nil)
)

// Handle implements wire.Target for transports that take an Acceptor for one: a
// request that came by no accepted connection is refused.
func (f *Front) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	f.TryHandle(req, rep)
	done()
}

// TryHandle is Handle.
func (f *Front) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	rep.XID, rep.Status = req.XID, wire.ErrProto
	return true
}

// New starts a target's service: it reads the body's table, records the new
// instance durably, and serves or begins recovery. Only the front may call the
// body's methods of interface Body from now on. If the body fails before New has
// returned, Fail is to be called then.
func New(o Options) (*Front, error) {
	if o.Body == nil {
		return nil, errors.New("start target: no body")
	}
	if o.Clock.Now == nil {
		o.Clock = SystemClock()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	t, err := o.Body.Table()
	if err != nil {
		return nil, fmt.Errorf("start target %s: read its clients: %w", o.Name, err)
	}
	f := &Front{
		o: o, body: o.Body, log: o.Logger.With("target", o.Name), wake: make(chan struct{}, 1), ended: make(chan struct{}),
		m:        recov.New(o.Config, t.Instance, t.Target, t.Transno, t.Clients, t.Slots),
		sessions: map[sessionKey]*session{}, links: map[wire.ClientID]*session{}, conns: map[*conn]struct{}{},
		homes: map[wire.ClientID]string{}, raises: map[raiseKey][]*call{},
	}
	if b, ok := o.Body.(interface{ MayBlock(wire.Op) bool }); ok {
		f.mayBlock = b.MayBlock
	}
	now := o.Clock.Now()
	f.swept = now
	acts := slices.Clone(f.m.Start(now))
	for i := range acts {
		if a := &acts[i]; a.Kind == recov.ActPutTarget {
			if err := f.body.PutTarget(a.Target); err != nil {
				return nil, fmt.Errorf("start target %s: record instance %d: %w", o.Name, t.Instance, err)
			}
		} else {
			f.carryOut(a)
		}
	}
	if f.m.State() == recov.StateFull {
		f.body.Begin(f.m.NextTransno() - 1)
		f.serving.Store(true)
	}
	go f.loop()
	f.poke()
	return f, nil
}

// Stop ends service in order: requests are refused, those being executed end,
// and unless the target was in recovery it is recorded that the next start needs
// none. The body stays open; OpLockPoll requests may be waiting in it. When ctx
// ends first, or the target has failed, Stop returns an error; requests may then
// still be in the body, and the next start may have to recover.
func (f *Front) Stop(ctx context.Context) error {
	f.mu.Lock()
	f.end(f.o.Clock.Now())
	f.mu.Unlock()
	f.poke()
	select {
	case <-f.ended:
	case <-ctx.Done():
		f.mu.Lock()
		f.leaving = true
		f.mu.Unlock()
		select {
		case <-f.ended: // just now
		default:
			return fmt.Errorf("stop target %s: %w", f.o.Name, ctx.Err())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return fmt.Errorf("stop target %s: %w", f.o.Name, f.err)
	}
	return nil
}

// Fail tells that the body has failed: what waits is answered with
// ErrTargetDown, and nothing more is executed. It may be called with the body's
// locks held. Stop is still to be called.
func (f *Front) Fail(err error) {
	f.mu.Lock()
	first := !f.failed.Load()
	if first {
		f.failed.Store(true)
		f.err = err
		f.end(f.o.Clock.Now())
	}
	f.mu.Unlock()
	if first {
		f.log.Error("target failed", "err", err)
		f.poke()
		if f.o.OnFail != nil {
			f.o.OnFail(err)
		}
	}
}

// end stops the machine. The lock is held.
func (f *Front) end(now time.Time) {
	if f.stopping.Load() {
		return
	}
	f.stopping.Store(true)
	f.serving.Store(false)
	f.post(f.m.Stop(now))
	f.dropHeld(nil, wire.ErrTargetDown)
}

// dropHeld answers what waits until the target serves: all, or that of one
// connection. The lock is held.
func (f *Front) dropHeld(c *conn, st wire.Status) {
	f.held = slices.DeleteFunc(f.held, func(x *call) bool {
		mine := c == nil || x.c == c
		if mine {
			f.queue = append(f.queue, recov.Action{Kind: recov.ActReply, Handle: x, Status: st})
		}
		return mine
	})
}

// Shorten tells that all clients are told that the target is back, so that recovery
// need not wait for their time-outs: those that do not come are waited for this many
// tenths (1..10) of the usual window.
func (f *Front) Shorten(tenths int) {
	f.event(func(now time.Time) []recov.Action { return f.m.Shorten(tenths, now) })
}

// Evict removes a client by order of the administrator. It reports whether the
// client was registered. Requests of its connections are refused from now on.
func (f *Front) Evict(id wire.ClientID) bool {
	var ok bool
	f.event(func(now time.Time) (acts []recov.Action) { ok, acts = f.m.Evict(id, now); return acts })
	return ok
}

// Abort ends recovery at once: clients that are not through are evicted. It
// reports whether the target was in recovery.
func (f *Front) Abort() bool {
	var ok bool
	f.event(func(now time.Time) (acts []recov.Action) { ok, acts = f.m.Abort(now); return acts })
	return ok
}

// Alive notes signs of life of nodes: clients that are connected from a node of which
// alive holds count as heard. A connection that is open is part of it, so that a client
// which can no longer reach the target, but whose node lives, does not stay registered for
// ever: it has to come back in time. alive must not block.
func (f *Front) Alive(alive func(node string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.o.Clock.Now()
	for id, s := range f.links {
		if !s.local && alive(s.node) {
			f.m.Heard(id, now)
		}
	}
}

// Vitals are what others are told of the life of a target.
type Vitals struct {
	Instance uint64
	Serving  bool
	// Work is the number of requests that were taken and not answered. In recovery
	// only those that are being executed count: the others wait for clients.
	Work int
	// Progress rises, and wraps, whenever one of those has been answered.
	Progress uint64
	// Nodes are those of clients that are registered, as far as they were connected
	// to this instance, in any order.
	Nodes []string
}

// Vitals tells how the target is. It waits for nothing but short locks.
func (f *Front) Vitals() Vitals {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := Vitals{Instance: f.m.Instance(), Serving: f.serving.Load(), Progress: f.left}
	for c := range f.conns {
		v.Work += int(c.load.inside())
		v.Progress += uint64(c.load.left())
	}
	if !v.Serving {
		v.Work = f.m.Executing()
	}
	for _, node := range f.homes {
		if !slices.Contains(v.Nodes, node) {
			v.Nodes = append(v.Nodes, node)
		}
	}
	return v
}

// event shows something to the machine and has the loop do what it wants.
func (f *Front) event(fn func(now time.Time) []recov.Action) {
	f.mu.Lock()
	f.post(fn(f.o.Clock.Now()))
	f.mu.Unlock()
	f.poke()
}

// Instance numbers the target's starts.
func (f *Front) Instance() uint64 { return f.m.Instance() }

// State tells what the target does with requests.
func (f *Front) State() recov.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.m.State()
}

// Status describes the target for administrators.
type Status struct {
	Name     string
	Recovery recov.Status
	Clients  []Client // by ID
	// Serving: recovery is over and the body has begun.
	Serving bool
	// Held requests wait until the target serves.
	Held int
	// Err is why the target has failed, or nil.
	Err error
}

// Client is an entry of the client table.
type Client struct {
	recov.ClientStatus
	// Node is the one from which the client was connected last, empty for this process
	// and for a client that was not seen by this instance. Session is the path by which
	// it is connected, 0 for none.
	Node    string
	Session uint64
	Tenure  uint64
}

// Status returns the target's figures.
func (f *Front) Status() Status {
	lc := f.body.LastCommitted()
	f.mu.Lock()
	f.m.Committed(lc)
	s := Status{Name: f.o.Name, Recovery: f.m.Status(), Serving: f.serving.Load(), Held: len(f.held), Err: f.err}
	for _, c := range f.m.Clients() {
		k := Client{ClientStatus: c}
		k.Node = f.homes[c.Client]
		if p := f.links[c.Client]; p != nil {
			k.Session = p.num
		}
		s.Clients = append(s.Clients, k)
	}
	f.mu.Unlock()
	for i := range s.Clients {
		s.Clients[i].Tenure = f.body.Tenure(s.Clients[i].Client)
	}
	return s
}
