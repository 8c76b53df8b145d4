package node

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/health"
)

// managing is this node's part in who serves floating addresses: it answers the node
// that decides, and decides itself while it leads.
type managing struct {
	m      *manager.Manager // nil unless the mode is builtin
	cancel context.CancelFunc
	done   chan struct{} // closed when m does not run any more
	// floating: there are floating addresses, or were in this process's life. All nodes
	// then have business with each other.
	floating atomic.Bool
	// vitals fills in what the frontend says of itself; addresses lists how floating
	// addresses are here. Neither may wait for anything but locks held for moments. nil:
	// there is no frontend yet, no address.
	vitals    atomic.Pointer[func(*manager.Report)]
	addresses atomic.Pointer[func() []manager.Address]
	// onEvent, if set, is given what the manager does and sees while this node leads.
	onEvent atomic.Pointer[func(manager.Event)]

	mu   sync.Mutex // guards keep
	keep manager.Keeper
}

// reportMethod is what the node that decides asks all nodes (manager.Question).
const reportMethod = "report"

// managerConfig translates the configuration.
func managerConfig(cfg *config.Config) manager.Config {
	k := &cfg.Manager
	c := manager.Config{
		Node: cfg.Cluster.Node, Quorum: manager.Quorum(k.Quorum), Interval: health.DefaultInterval,
		Confirm: time.Duration(k.Confirm), FailbackDelay: time.Duration(k.FailbackDelay),
		StartTimeout: time.Duration(k.StartTimeout), MoveTimeout: time.Duration(k.MoveTimeout),
		UnreadyAfter: time.Duration(k.UnreadyAfter), SlowAfter: time.Duration(k.SlowAfter),
		HoldOff: time.Duration(k.HoldOff), HoldOffMax: time.Duration(k.HoldOffMax), ParallelMoves: k.ParallelMoves,
	}
	if k.FailbackDelay == config.Never {
		c.FailbackDelay = manager.Never
	}
	for _, n := range cfg.Cluster.Nodes {
		c.Nodes = append(c.Nodes, n.Name)
	}
	return c
}

// answerManager enters the method by which nodes are asked. It comes before the node
// listens.
func (c *cluster) answerManager() {
	c.asks.handle(reportMethod, func(_ context.Context, _ string, args json.RawMessage) (any, error) {
		var q manager.Question
		if err := json.Unmarshal(args, &q); err != nil {
			return nil, fmt.Errorf("the question: %w", err)
		}
		return c.report(&q)
	})
	c.asks.handle(hearsMethod, func(context.Context, string, json.RawMessage) (any, error) { return c.hears(), nil })
}

// report is this node's answer to the one that decides.
func (c *cluster) report(q *manager.Question) (*manager.Report, error) {
	// Nobody asks unless there are floating addresses.
	c.managing.floating.Store(true)
	r := &manager.Report{Incarnation: c.incarnation, Reason: "its frontend has not started", Hears: c.hears()}
	if f := c.managing.vitals.Load(); f != nil {
		(*f)(r)
	}
	if f := c.managing.addresses.Load(); f != nil {
		r.Addresses = (*f)()
	}
	c.managing.mu.Lock()
	defer c.managing.mu.Unlock()
	return r, c.managing.keep.Answer(q, r)
}

// hears is what this node's beats say of the others.
func (c *cluster) hears() []manager.NodeHealth {
	peers := c.health.Status()
	l := make([]manager.NodeHealth, 0, len(peers))
	for i := range peers {
		p := &peers[i]
		h := manager.NodeHealth{Node: p.Name, Incarnation: p.Incarnation, Silence: p.Silence, Slow: p.Slow}
		switch p.State {
		case health.StateAlive:
			h.State = manager.Alive
		case health.StateSuspect:
			h.State, h.Suspected = manager.Suspect, max(p.Silence-p.Timeout, 0)
		}
		l = append(l, h)
	}
	return l
}

// leader tells whether this node decides.
func (c *cluster) leader() manager.Leader {
	if c.etcd != nil {
		return c.etcd.election
	}
	return leader{c.byName[config.MGSName]}
}

// leader tells that the node leads whose process runs the registry.
type leader struct{ h *hosted }

// Leads implements manager.Leader.
func (l leader) Leads() bool {
	l.h.mu.Lock()
	m := l.h.mgs
	l.h.mu.Unlock()
	return m != nil && m.Valid()
}

// Term implements manager.Leader.
func (l leader) Term() uint64 { return l.h.instance() }

// Changed implements manager.Leader.
func (l leader) Changed() <-chan struct{} { return nil }

// newManager makes the manager, which does nothing yet.
func (c *cluster) newManager() error {
	if c.cfg.Manager.Mode != config.ManagerBuiltin {
		return nil
	}
	m, err := manager.New(manager.Options{
		Config: managerConfig(c.cfg), Registry: c.reg, Leader: c.leader(), Health: c.hears, Logger: c.log,
		Ask: func(ctx context.Context, node string, q *manager.Question) (*manager.Report, error) {
			if node == c.name {
				return c.report(q)
			}
			r := new(manager.Report)
			if err := c.ask(ctx, node, reportMethod, q, r); err != nil {
				return nil, err
			}
			return r, nil
		},
		OnEvent: func(e manager.Event) {
			if f := c.managing.onEvent.Load(); f != nil {
				(*f)(e)
			}
		},
		OnFloating: func(on bool) {
			if on {
				c.managing.floating.Store(true)
			}
		},
	})
	if err != nil {
		return err
	}
	c.managing.m, c.managing.done = m, make(chan struct{})
	return nil
}

// startManager begins to decide whenever this node leads.
func (c *cluster) startManager() {
	if c.managing.m == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.managing.cancel = cancel
	go func() {
		defer close(c.managing.done)
		c.managing.m.Run(ctx)
	}()
}

// stopManager ends that. The drain of this node's addresses comes before.
func (c *cluster) stopManager() {
	if c.managing.m != nil {
		c.managing.cancel()
		<-c.managing.done
	}
}

// Manager describes the manager of this node; one that does not lead knows nothing.
func (n *Node) Manager() manager.Status {
	if n.cluster == nil || n.cluster.managing.m == nil {
		return manager.Status{}
	}
	return n.cluster.managing.m.Status()
}

// vitals is what the frontend says of itself to the node that decides.
func (n *Node) vitals(r *manager.Report) {
	r.Stopping = n.stopping.Load()
	r.Load = n.load.now(time.Now(), n.calls)
	switch w := n.waits.Load(); {
	case n.up.Load() && n.cluster.agent.Load() == nil:
		r.Reason = "it serves no floating addresses (nfs.floating)"
	case n.up.Load() && n.fs.MDTImport().Ready():
		r.Ready, r.Reason = true, ""
	case n.up.Load():
		r.Reason = "the metadata target (" + mdtName + ") does not answer it"
	case w != nil:
		r.Reason = "its frontend waits for " + *w
	}
}

// calls counts the calls that were answered at all addresses.
func (n *Node) calls() (k uint64, ok bool) {
	for _, u := range n.serving() {
		for _, s := range u.Servers() {
			for _, a := range s.Stats().Addrs {
				k += a.Calls
			}
		}
	}
	return k, true
}

// loadKeeper turns a counter into a rate.
type loadKeeper struct {
	mu    sync.Mutex
	at    time.Time
	count uint64
	rate  float64
}

// loadSpan is the least time that a rate is of.
const loadSpan = time.Second

// now is the rate per second. Counters that fall, because an address has gone, give 0.
func (l *loadKeeper) now(now time.Time, count func() (uint64, bool)) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := now.Sub(l.at)
	if d < loadSpan {
		return l.rate
	}
	n, ok := count()
	if !ok {
		return l.rate
	}
	l.rate = 0
	if !l.at.IsZero() && n > l.count {
		l.rate = float64(n-l.count) / d.Seconds()
	}
	l.at, l.count = now, n
	return l.rate
}

// everybody calls add with all nodes if there are floating addresses: who may have to
// take one has to hear whether its node lives, and who has lost one has to be told.
func (c *cluster) everybody(add func(node string)) {
	if !c.managing.floating.Load() {
		return
	}
	for i := range c.cfg.Cluster.Nodes {
		add(c.cfg.Cluster.Nodes[i].Name)
	}
}
