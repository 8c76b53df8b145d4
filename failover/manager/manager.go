package manager

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Registry is what a Manager needs of the registry: mgs.Floating and mgs.Registry have
// it.
type Registry interface {
	Watch(ctx context.Context, rev string) (mgs.View, error)
	Assign(ctx context.Context, index uint32, epoch uint64, node string) (mgs.VIP, error)
	Abandoned(ctx context.Context, index uint32, epoch uint64) error
}

// Leader tells whether this process is the one that decides. Of all processes one at
// most is told so, for as long as it asks before it acts.
type Leader interface {
	// Leads must not wait.
	Leads() bool
	// Term numbers the process's present time as leader; later ones of any node are
	// higher.
	Term() uint64
	// Changed returns a channel that is closed, or gets a value, when Leads or Term may
	// say something else than now. Nil: they are asked now and then.
	Changed() <-chan struct{}
}

// Options of New. Registry, Leader, Health, Ask and the node's names are required.
type Options struct {
	Config
	Registry Registry
	Leader   Leader
	// Health lists what this node's beats say of the others. It must not wait.
	Health func() []NodeHealth
	// Ask asks a node, this one too (method "report"). ctx bounds it.
	Ask func(ctx context.Context, node string, q *Question) (*Report, error)
	// OnEvent, if set, is called with what happens, in order, by one goroutine at a
	// time. It must not wait for the manager.
	OnEvent func(Event)
	// OnFloating, if set, is called when there are floating addresses, and when there
	// are none any more, by the registry's word to the leader.
	OnFloating func(bool)
	Clock      Clock // default: the machine's
	Logger     *slog.Logger
}

// Clock is a steady clock.
type Clock interface {
	Now() time.Duration
}

type systemClock struct{ start time.Time }

func (c systemClock) Now() time.Duration { return time.Since(c.start) }

// Times of the edge.
const (
	askTime  = time.Second     // bounds a question
	callTime = 5 * time.Second // bounds a change of the registry
	// look is how often it is asked who leads, if nobody tells of changes.
	look = 100 * time.Millisecond
	// carriers bounds the decisions that are carried out at a time.
	carriers = 8
)

// Manager decides while its process leads. Run runs it.
type Manager struct {
	o   Options
	log *slog.Logger
	// poked gets a value when something has come that the next tick should see at once.
	poked chan struct{}

	mu sync.Mutex // never held while anything is called
	m  *Machine
	// floating is closed while there is something to ask for, and replaced when not.
	floating chan struct{}
	open     bool
}

// New checks the options.
func New(o Options) (*Manager, error) {
	if o.Registry == nil || o.Leader == nil || o.Health == nil || o.Ask == nil {
		return nil, errors.New("manager: an option is missing")
	}
	if o.Clock == nil {
		o.Clock = systemClock{time.Now()}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnEvent == nil {
		o.OnEvent = func(Event) {}
	}
	if o.OnFloating == nil {
		o.OnFloating = func(bool) {}
	}
	m, err := NewMachine(o.Config)
	if err != nil {
		return nil, err
	}
	o.Config = m.cfg
	return &Manager{o: o, log: o.Logger, m: m, poked: make(chan struct{}, 1), floating: make(chan struct{})}, nil
}

// Poke has the manager look at everything at once: something was heard.
func (g *Manager) Poke() {
	select {
	case g.poked <- struct{}{}:
	default:
	}
}

// Status describes the manager now.
func (g *Manager) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.m.status(g.o.Clock.Now())
}

// Run decides whenever the process leads, until ctx ends. It waits for everything that
// it has begun.
func (g *Manager) Run(ctx context.Context) {
	t := time.NewTicker(look)
	defer t.Stop()
	for ctx.Err() == nil {
		if g.o.Leader.Leads() {
			g.lead(ctx, g.o.Leader.Term())
			continue
		}
		select {
		case <-ctx.Done():
		case <-g.o.Leader.Changed():
		case <-t.C:
		}
	}
}

// leads tells whether the process leads in this term still.
func (g *Manager) leads(term uint64) bool {
	return g.o.Leader.Leads() && g.o.Leader.Term() == term
}

// lead is one term.
func (g *Manager) lead(ctx context.Context, term uint64) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
		g.mu.Lock()
		g.m.Resign()
		g.mu.Unlock()
		g.let(false)
		g.log.Info("this node no longer decides who serves floating addresses", "term", term)
	}()
	g.log.Info("this node decides who serves floating addresses", "term", term)
	g.mu.Lock()
	g.m.Lead(g.o.Clock.Now(), term)
	g.mu.Unlock()
	wg.Go(func() { g.watch(ctx) })
	for _, n := range g.o.Nodes {
		wg.Go(func() { g.ask(ctx, n) })
	}
	slots := make(chan struct{}, carriers)
	t := time.NewTicker(g.o.Interval / 4)
	defer t.Stop()
	for g.leads(term) {
		heard := g.o.Health()
		var todo []Decision
		g.mu.Lock()
		if g.m.Floating() {
			now := g.o.Clock.Now()
			g.m.Health(now, heard)
			todo = g.m.Tick(now)
		}
		told := g.m.Events()
		g.mu.Unlock()
		for _, e := range told {
			g.event(e)
		}
		for _, d := range todo {
			g.log.Info("decided", "address", d.Addr, "from", d.From, "to", d.To, "abandon", d.Abandon, "reason", d.Reason)
			wg.Go(func() { g.carryOut(ctx, term, &d, slots) })
		}
		select {
		case <-ctx.Done():
			return
		case <-g.o.Leader.Changed():
		case <-g.poked:
		case <-t.C:
		}
	}
}

// event passes an event on.
func (g *Manager) event(e Event) {
	switch {
	case e.Kind == NodeEvent:
		g.log.Info("node "+e.Node+": "+e.Text, "node", e.Node)
	case e.Kind == QuorumEvent:
		g.log.Warn(e.Text)
	case e.Err != "":
		g.log.Warn("the registry has not taken a decision; it is made anew", "address", e.Addr, "to", e.To, "err", e.Err)
	case e.Kind == AddressEvent:
		g.log.Warn(e.Text, "address", e.Addr, "from", e.From, "to", e.To)
	}
	g.o.OnEvent(e)
}

// let has the nodes asked, or not.
func (g *Manager) let(on bool) {
	g.mu.Lock()
	was := g.open
	if g.open = on; on && !was {
		close(g.floating)
	} else if !on && was {
		g.floating = make(chan struct{})
	}
	g.mu.Unlock()
	if on != was {
		g.o.OnFloating(on)
	}
}

// watch follows the registry.
func (g *Manager) watch(ctx context.Context) {
	pause := g.o.Interval
	for rev := ""; ctx.Err() == nil; {
		v, err := g.o.Registry.Watch(ctx, rev)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			g.mu.Lock()
			g.m.Lost()
			g.mu.Unlock()
			g.log.Warn("the registry cannot be read; floating addresses stay where they are", "err", err)
			rev = ""
			wait(ctx, pause)
			pause = min(2*pause, 5*time.Second)
			continue
		}
		pause, rev = g.o.Interval, v.Rev
		g.mu.Lock()
		g.m.View(g.o.Clock.Now(), &v)
		on := g.m.Floating()
		g.mu.Unlock()
		g.let(on)
		g.Poke()
	}
}

// wait waits unless ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// ask asks a node again and again.
func (g *Manager) ask(ctx context.Context, node string) {
	for {
		g.mu.Lock()
		on := g.floating
		g.mu.Unlock()
		select {
		case <-on:
		case <-ctx.Done():
			return
		}
		g.mu.Lock()
		asked := g.o.Clock.Now()
		q := g.m.Question(asked, node)
		g.mu.Unlock()
		limited, cancel := context.WithTimeout(ctx, askTime)
		r, err := g.o.Ask(limited, node, &q)
		cancel()
		now := g.o.Clock.Now()
		if err == nil {
			g.mu.Lock()
			g.m.Report(now, node, asked, r)
			g.mu.Unlock()
			g.Poke()
		} else if ctx.Err() == nil {
			g.log.Debug("node does not answer", "node", node, "err", err)
		}
		wait(ctx, asked+g.o.Interval-now)
	}
}

// carryOut does what was decided, as long as the process leads.
func (g *Manager) carryOut(ctx context.Context, term uint64, d *Decision, slots chan struct{}) {
	var v *mgs.VIP
	err := errors.New("this node no longer decides")
	select {
	case slots <- struct{}{}:
		v, err = g.change(ctx, term, d)
		<-slots
	case <-ctx.Done():
	}
	g.mu.Lock()
	g.m.Result(g.o.Clock.Now(), d.ID, v, err)
	g.mu.Unlock()
	g.Poke()
}

func (g *Manager) change(ctx context.Context, term uint64, d *Decision) (*mgs.VIP, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if d.Abandon {
		if !g.leads(term) {
			return nil, errors.New("this node no longer decides")
		}
		// Somebody else may have ended the period of service, such as the new process of
		// its node; Assign refuses if there is a later one.
		var refused *mgs.Error
		if err := g.o.Registry.Abandoned(ctx, d.Index, d.Epoch); err != nil && !(errors.As(err, &refused) && d.To != "") {
			return nil, err
		}
	}
	if d.To == "" {
		return nil, nil
	}
	if !g.leads(term) {
		return nil, errors.New("this node no longer decides")
	}
	v, err := g.o.Registry.Assign(ctx, d.Index, d.Epoch, d.To)
	if err != nil {
		return nil, err
	}
	return &v, nil
}
