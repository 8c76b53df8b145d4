package health

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// TargetName is the name that Health.Target is served by, and dialled.
const TargetName = "health"

// Conn is a connection for beats, such as a *tcp.Conn of kind Health. What Start
// takes is answered, at the latest, soon after Close or when Done is closed.
type Conn interface {
	Start(req *wire.Request, rep *wire.Reply, done func(err error))
	Done() <-chan struct{}
	Close() error
}

// Dial gives Options.Dial for package tcp. Of what options returns, Target and Kind
// are set here; Node in Addrs has to be the node's name, so that it is authenticated.
func Dial(options func(node string) tcp.DialOptions) func(ctx context.Context, node string) (Conn, error) {
	return func(ctx context.Context, node string) (Conn, error) {
		o := options(node)
		o.Target, o.Kind = TargetName, tcp.Health
		c, err := tcp.Dial(ctx, o)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
}

// Clock is a steady clock with timers.
type Clock struct {
	Now func() time.Duration
	// AfterFunc calls f once in d, from any goroutine, unless stopped.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)
}

// SystemClock is the machine's own clock.
func SystemClock() Clock {
	start := time.Now()
	return Clock{
		Now:       func() time.Duration { return time.Since(start) },
		AfterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}

// Options are what Start needs. Config, Dial and Local are required.
type Options struct {
	Config
	// Dial connects to a node. ctx ends with the attempt.
	Dial func(ctx context.Context, node string) (Conn, error)
	// DialTimeout bounds one attempt. Default 2 s.
	DialTimeout time.Duration
	// Local is asked once per interval what this node is. While it does not return,
	// beats go on and say what it has said last, so that the peers see no progress.
	Local func() Local
	// OnEvents, if set, is called by one goroutine with what was learnt, in order.
	// Who is slow to take it may get Reset and the present state instead.
	OnEvents func([]Event)
	Clock    Clock // default SystemClock
	Logger   *slog.Logger
}

// Health exchanges beats with the peers of a node.
//
// Every peer has a goroutine and a timer of its own, which wait for nothing but mu; mu
// is held for steps of the machine only.
type Health struct {
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	links  map[string]*link
	news   chan struct{} // queue is not empty

	mu     sync.Mutex
	m      *Machine
	queue  []Event
	closed bool
}

// link is what there is for one peer.
type link struct {
	h    *Health
	name string
	wake chan struct{}

	// Guarded by Health.mu.
	armed time.Duration // the timer
	conn  *conn
	cut   context.CancelFunc // of the connection or the attempt
	in    int                // connections that the peer has dialled
}

// conn is a connection that this node has dialled.
type conn struct {
	Conn
	out atomic.Int32 // beats without answer
}

// maxOut bounds the beats without answer on a connection, so that none waits in its
// queue for credits.
const maxOut = 3

// maxQueue bounds the events that wait for OnEvents.
const maxQueue = 4096

// Start begins to exchange beats.
func Start(o Options) (*Health, error) {
	if o.Dial == nil || o.Local == nil {
		return nil, errors.New("health: Dial and Local are needed")
	}
	if o.DialTimeout <= 0 {
		o.DialTimeout = 2 * time.Second
	}
	if o.Clock.Now == nil {
		o.Clock = SystemClock()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := o.Config.prepare(); err != nil {
		return nil, err
	}
	m, err := New(o.Config)
	if err != nil {
		return nil, err
	}
	h := &Health{o: o, m: m, links: map[string]*link{}, news: make(chan struct{}, 1)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	for _, name := range o.Peers {
		h.links[name] = &link{h: h, name: name, wake: make(chan struct{}, 1), armed: math.MaxInt64}
	}
	for _, l := range h.links {
		h.wg.Go(l.run)
	}
	h.wg.Go(h.collect)
	h.wg.Go(h.deliver)
	return h, nil
}

// Close ends all connections and waits for everything that was started, for Local and
// OnEvents too.
func (h *Health) Close() {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.wg.Wait()
}

// Status describes all peers, by name.
func (h *Health) Status() []PeerStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.m.Status(h.o.Clock.Now())
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// input lets the machine take something in that concerns the peer.
func (l *link) input(f func(m *Machine, now time.Duration)) {
	h := l.h
	h.mu.Lock()
	defer h.mu.Unlock()
	f(h.m, h.o.Clock.Now())
	h.drain()
	l.arm()
}

// arm wakes the peer's goroutine when its timer would do so too late. Called with mu
// held.
func (l *link) arm() {
	if due, ok := l.h.m.Due(l.name); ok && due < l.armed {
		signal(l.wake)
	}
}

// drain queues what the machine has learnt. Called with mu held.
func (h *Health) drain() {
	e := h.m.Events()
	if len(e) == 0 || h.o.OnEvents == nil {
		return
	}
	if h.queue = append(h.queue, e...); len(h.queue) > maxQueue {
		h.queue = h.m.Present()
	}
	signal(h.news)
}

func (h *Health) deliver() {
	for {
		select {
		case <-h.ctx.Done():
			return
		case <-h.news:
		}
		h.mu.Lock()
		e := h.queue
		h.queue = nil
		h.mu.Unlock()
		if len(e) > 0 {
			h.o.OnEvents(e)
		}
	}
}

// collect asks the node about itself.
func (h *Health) collect() {
	wake := make(chan struct{}, 1)
	last := ""
	for h.ctx.Err() == nil {
		local := h.o.Local()
		h.mu.Lock()
		err := h.m.SetLocal(h.o.Clock.Now(), local)
		for _, l := range h.links {
			l.arm()
		}
		h.mu.Unlock()
		switch {
		case err == nil:
			last = ""
		case err.Error() != last:
			last = err.Error()
			h.o.Logger.Error("other nodes cannot be told about this one", "err", err)
		}
		stop := h.o.Clock.AfterFunc(h.o.Interval, func() { signal(wake) })
		select {
		case <-wake:
		case <-h.ctx.Done():
			stop()
		}
	}
}

// run does what is due for a peer.
func (l *link) run() {
	h := l.h
	for {
		var beat Beat
		h.mu.Lock()
		now := h.o.Clock.Now()
		s := h.m.Tick(now, l.name)
		if s.Drop {
			l.drop()
		}
		if s.Dial != 0 {
			l.dial(s.Dial)
		}
		c := l.conn
		if s.Send = s.Send && c != nil; s.Send {
			if c.out.Load() < maxOut {
				h.m.Beat(l.name, &beat)
			} else {
				s.Send = false
				h.m.Note(l.name, func(s *Stats) { s.Unsent++ })
			}
		}
		h.drain()
		due, ok := h.m.Due(l.name)
		if !ok {
			due = math.MaxInt64
		}
		l.armed = due
		h.mu.Unlock()
		if s.Send {
			l.send(c, &beat)
		}
		stop := func() bool { return true }
		if ok {
			stop = h.o.Clock.AfterFunc(due-now, func() { signal(l.wake) })
		}
		select {
		case <-l.wake:
			stop()
		case <-h.ctx.Done():
			stop()
			return
		}
	}
}

// drop ends the connection or the attempt. Called with mu held.
func (l *link) drop() {
	if l.cut != nil {
		l.cut()
	}
	l.conn, l.cut = nil, nil
}

// dial begins an attempt. Called with mu held.
func (l *link) dial(attempt uint64) {
	l.drop()
	ctx, cut := context.WithCancel(l.h.ctx)
	l.cut = cut
	l.h.wg.Go(func() {
		defer cut()
		l.connect(ctx, attempt)
	})
}

// connect lasts as long as the connection that comes of an attempt.
func (l *link) connect(ctx context.Context, attempt uint64) {
	h := l.h
	limited, cancel := context.WithTimeout(ctx, h.o.DialTimeout)
	nc, err := h.o.Dial(limited, l.name)
	cancel()
	if err == nil {
		c := &conn{Conn: nc}
		l.input(func(m *Machine, now time.Duration) {
			if m.Connected(now, l.name, attempt) {
				l.conn = c
			} else {
				err = context.Canceled
			}
		})
		if err == nil {
			select {
			case <-c.Done():
			case <-ctx.Done():
			}
		}
		_ = nc.Close()
	} else {
		h.o.Logger.Debug("no health connection", "peer", l.name, "err", err)
	}
	l.input(func(m *Machine, now time.Duration) {
		if l.conn != nil && l.conn.Conn == nc {
			l.conn = nil
		}
		m.Broke(now, l.name, attempt)
	})
}

// send sends a beat, whose answer is heard whenever it comes.
func (l *link) send(c *conn, beat *Beat) {
	req := &wire.Request{Header: wire.Header{Op: wire.OpBeat, XID: beat.Seq}, Data: beat.Append(nil)}
	rep := new(wire.Reply)
	c.out.Add(1)
	c.Start(req, rep, func(err error) {
		c.out.Add(-1)
		if err != nil {
			return // Done follows
		}
		if rep.Status != wire.OK {
			l.input(func(m *Machine, _ time.Duration) { m.Note(l.name, func(s *Stats) { s.Refused++ }) })
			return
		}
		_ = l.heard(rep.Data, Answer)
	})
}

// heard takes an encoded beat.
func (l *link) heard(p []byte, via Via) error {
	h := l.h
	var b Beat
	err := DecodeBeat(p, &b)
	l.input(func(m *Machine, now time.Duration) {
		switch {
		case h.closed:
		case err != nil:
			m.Note(l.name, func(s *Stats) { s.Bad++ })
		default:
			m.Heard(now, l.name, &b, via)
		}
	})
	if err != nil {
		h.o.Logger.Debug("bad beat", "peer", l.name, "err", err)
	}
	return err
}

// Target takes the beats of peers that dial this node. Whoever serves it has to
// know the names of the nodes that connect, and to admit none that are not in the
// cluster.
func (h *Health) Target() wire.Target { return &service{h: h} }

// service answers beats, on one connection when node is set.
type service struct {
	h    *Health
	link *link
}

// Accept implements wire.Acceptor.
func (s *service) Accept(p wire.Peer) wire.Target {
	l := s.h.links[p.Node]
	if l != nil {
		s.h.mu.Lock()
		l.in++
		s.h.mu.Unlock()
	}
	return &service{h: s.h, link: l}
}

// Close implements io.Closer.
func (s *service) Close() error {
	if l := s.link; l != nil {
		l.input(func(m *Machine, now time.Duration) {
			if l.in--; l.in == 0 {
				m.Left(now, l.name)
			}
		})
	}
	return nil
}

// Handle implements wire.Target.
func (s *service) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	s.TryHandle(req, rep)
	done()
}

// TryHandle implements wire.Target. It never waits.
func (s *service) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	rep.Reset()
	rep.XID = req.XID
	switch {
	case s.link == nil:
		rep.Status = wire.ErrAcces
	case req.Op == wire.OpPing:
	case req.Op != wire.OpBeat:
		rep.Status = wire.ErrNotSupp
	default:
		rep.Data, rep.Status = s.link.answer(req.Data, rep.Data)
	}
	return true
}

// answer takes a beat and appends this node's own to b.
func (l *link) answer(p, b []byte) ([]byte, wire.Status) {
	h := l.h
	h.mu.Lock()
	allowed, closed := h.m.Allow(h.o.Clock.Now(), l.name), h.closed
	h.mu.Unlock()
	switch {
	case closed:
		return b, wire.ErrTargetDown
	case !allowed:
		return b, wire.ErrJukebox
	}
	if err := l.heard(p, Request); err != nil {
		return b, wire.ErrProto
	}
	var own Beat
	h.mu.Lock()
	h.m.Beat(l.name, &own)
	h.mu.Unlock()
	return own.Append(b), wire.OK
}
