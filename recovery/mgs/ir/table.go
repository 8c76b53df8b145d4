package ir

import (
	"cmp"
	"slices"
	"time"
)

// Config has a table's settings. Zero fields get the defaults.
type Config struct {
	// Disabled: nobody is told, and no recovery window is shortened.
	Disabled bool
	// Startup is how long nodes have after the registry's start to come back, default
	// 30 s.
	Startup time.Duration
	// Keepalive is when a watch is answered without news, and how long a node may
	// then take to watch again, default 5 s: so both notice that the other one is gone.
	Keepalive time.Duration
}

func (c *Config) defaults() {
	if c.Startup <= 0 {
		c.Startup = 30 * time.Second
	}
	if c.Keepalive <= 0 {
		c.Keepalive = 5 * time.Second
	}
}

// Answer is something for the caller to do: to answer the watch with the handle, or
// without News to refuse it, since another one has taken its place or the node has
// left.
type Answer struct {
	Handle any
	News   *News
}

// Table is the registry's table of targets. Its callers serialise the calls, give
// the time, and carry out the answers, which are valid until the next call.
type Table struct {
	cfg         Config
	incarnation uint64
	started     time.Time
	version     uint64
	targets     []*Target // by version
	byName      map[string]*Target
	nodes       map[string]*node
	pending     []change // not acknowledged by all, by version
	stats       Status   // NotifyCount and so on
	out         []Answer
}

// change is when the table got a version.
type change struct {
	version uint64
	at      time.Time
}

// node is a node that is connected.
type node struct {
	name string
	// conns is the number of its connections, as far as they are authenticated.
	conns int
	// watched: it has had a watch while it was connected.
	watched bool

	// conn is the connection of its watch, 0: it has none.
	conn    uint64
	waiting bool
	handle  any
	until   time.Time // waiting: when the watch is answered; else: when it is to be back
	able    bool
	joined  uint64 // the table's version when it came
	known   uint64 // what it has acknowledged
}

// NewTable returns the table of a registry that has started at now. The incarnation
// is not that of an earlier table.
func NewTable(cfg Config, incarnation uint64, now time.Time) *Table {
	cfg.defaults()
	return &Table{cfg: cfg, incarnation: incarnation, started: now, byName: map[string]*Target{}, nodes: map[string]*node{}}
}

// State tells whether clients are told.
func (t *Table) State(now time.Time) State {
	switch {
	case t.cfg.Disabled:
		return StateDisabled
	case now.Sub(t.started) < t.cfg.Startup:
		return StateStartup
	case t.nonIR() > 0:
		return StatePartial
	}
	return StateFull
}

// nonIR counts the nodes that are not told: those with a watch that opt out, and
// those that have never had one.
func (t *Table) nonIR() (k int) {
	for _, n := range t.nodes {
		if n.conn != 0 && !n.able || n.conn == 0 && !n.watched {
			k++
		}
	}
	return k
}

// Announce enters that a target has started or was stopped.
func (t *Table) Announce(a Announcement, now time.Time) (Taken, []Answer) {
	t.out = t.out[:0]
	e := t.byName[a.Target]
	late := e != nil && (a.Instance < e.Instance || a.Instance == e.Instance && a.Node != e.Node && !a.Up) ||
		e == nil && len(t.targets) >= maxTargets
	if !late {
		t.enter(e, Target{Name: a.Target, Node: a.Node, Instance: a.Instance, Up: a.Up, NoIR: a.NoIR}, now)
	}
	return Taken{Incarnation: t.incarnation, Version: t.version, State: t.State(now), Late: late}, t.out
}

func (t *Table) enter(e *Target, x Target, now time.Time) {
	if e != nil {
		x.Version = e.Version
		if *e == x {
			return
		}
		t.targets = slices.DeleteFunc(t.targets, func(o *Target) bool { return o == e })
	}
	t.version++
	x.Version = t.version
	t.byName[x.Name] = &x
	t.targets = append(t.targets, &x)
	if len(t.pending) >= maxTargets {
		t.pending = slices.Delete(t.pending, 0, 1) // nobody answers; the later changes tell of it
	}
	t.pending = append(t.pending, change{t.version, now})
	for _, n := range t.sorted() {
		if n.waiting {
			t.answer(n, now)
		}
	}
	t.settle(now)
}

// sorted lists the nodes by name.
func (t *Table) sorted() []*node {
	l := make([]*node, 0, len(t.nodes))
	for _, n := range t.nodes {
		l = append(l, n)
	}
	slices.SortFunc(l, func(a, b *node) int { return cmp.Compare(a.name, b.name) })
	return l
}

// answer gives a node what it does not have.
func (t *Table) answer(n *node, now time.Time) {
	news := &News{Incarnation: t.incarnation, Version: t.version, State: t.State(now)}
	i, _ := slices.BinarySearchFunc(t.targets, n.known+1, func(e *Target, v uint64) int { return cmp.Compare(e.Version, v) })
	for _, e := range t.targets[i:] {
		if len(news.Targets) == pageTargets {
			news.Version = news.Targets[pageTargets-1].Version
			break
		}
		news.Targets = append(news.Targets, *e)
	}
	t.out = append(t.out, Answer{n.handle, news})
	n.waiting, n.handle, n.until = false, nil, now.Add(t.cfg.Keepalive)
}

// refuse ends a node's watch without news.
func (t *Table) refuse(n *node) {
	if n.waiting {
		t.out = append(t.out, Answer{Handle: n.handle})
		n.waiting, n.handle = false, nil
	}
}

// settle counts the changes that all have acknowledged who had a watch then and have
// it still.
func (t *Table) settle(now time.Time) {
	done := 0
	for _, c := range t.pending {
		for _, n := range t.nodes {
			if n.conn != 0 && n.able && n.joined < c.version && n.known < c.version {
				t.pending = slices.Delete(t.pending, 0, done)
				return
			}
		}
		done++
		d := now.Sub(c.at)
		t.stats.NotifyCount++
		t.stats.NotifyTotal += d
		t.stats.NotifyMax = max(t.stats.NotifyMax, d)
	}
	t.pending = t.pending[:0]
}

// Connected notes a connection of an authenticated node; Gone is to follow. A node
// that has never had a watch is not told anything.
func (t *Table) Connected(name string) {
	if n := t.node(name); n != nil {
		n.conns++
	}
}

// node finds or makes the entry of a node, nil if there are too many.
func (t *Table) node(name string) *node {
	n := t.nodes[name]
	if n == nil && len(t.nodes) < maxNodes {
		n = &node{name: name}
		t.nodes[name] = n
	}
	return n
}

// Gone notes that connection conn is closed. name is that of its authenticated node
// or, without one, of who has watched over it.
func (t *Table) Gone(conn uint64, name string, authenticated bool, now time.Time) []Answer {
	t.out = t.out[:0]
	n := t.nodes[name]
	if n == nil {
		return nil
	}
	if authenticated && n.conns > 0 {
		n.conns--
	}
	if n.conn == conn {
		t.leave(n, now)
	}
	t.forget(n)
	return t.out
}

// leave ends a node's watching.
func (t *Table) leave(n *node, now time.Time) {
	t.refuse(n)
	n.conn = 0
	t.settle(now)
}

// forget removes the entry of a node that is not connected.
func (t *Table) forget(n *node) {
	if n.conn == 0 && n.conns == 0 {
		delete(t.nodes, n.name)
	}
}

// Watch handles a watch that came by connection conn; connections are numbered from
// 1 in the order in which they were accepted. A node watches over its newest one, and
// the first watch there is answered at once.
func (t *Table) Watch(w Watch, conn uint64, handle any, now time.Time) []Answer {
	t.out = t.out[:0]
	n := t.node(w.Node)
	if n == nil || conn < n.conn {
		t.out = append(t.out, Answer{Handle: handle})
		return t.out
	}
	t.refuse(n)
	first := n.conn != conn
	if first {
		n.conn, n.joined = conn, t.version
	}
	n.watched, n.able = true, w.Able
	same := w.Incarnation == t.incarnation && w.Version <= t.version
	n.known = 0
	if same {
		n.known = w.Version
	}
	n.waiting, n.handle, n.until = true, handle, now.Add(t.cfg.Keepalive)
	if first || !same || n.known < t.version {
		t.answer(n, now)
	}
	t.settle(now)
	return t.out
}

// Tick answers the watches that have waited long, and gives up nodes that do not
// watch again.
func (t *Table) Tick(now time.Time) []Answer {
	t.out = t.out[:0]
	for _, n := range t.sorted() {
		switch {
		case n.conn == 0 || now.Before(n.until):
		case n.waiting:
			t.answer(n, now)
		default:
			t.leave(n, now)
			t.forget(n)
		}
	}
	return t.out
}

// NextTick returns when Tick has something to do, and false if nothing is to come.
func (t *Table) NextTick() (at time.Time, ok bool) {
	for _, n := range t.nodes {
		if n.conn != 0 && (!ok || n.until.Before(at)) {
			at, ok = n.until, true
		}
	}
	return at, ok
}

// Close refuses all watches.
func (t *Table) Close() []Answer {
	t.out = t.out[:0]
	for _, n := range t.sorted() {
		t.refuse(n)
	}
	return t.out
}

// Targets lists the entries by name.
func (t *Table) Targets() []Target {
	l := make([]Target, 0, len(t.targets))
	for _, e := range t.targets {
		l = append(l, *e)
	}
	slices.SortFunc(l, func(a, b Target) int { return cmp.Compare(a.Name, b.Name) })
	return l
}

// Status returns the figures for administrators.
func (t *Table) Status(now time.Time) Status {
	s := t.stats
	s.Incarnation, s.Version, s.State, s.NonIR, s.Pending = t.incarnation, t.version, t.State(now), t.nonIR(), len(t.pending)
	if s.State == StateStartup {
		s.StartupLeft = t.started.Add(t.cfg.Startup).Sub(now)
	}
	for _, n := range t.sorted() {
		s.Nodes = append(s.Nodes, Node{Name: n.name, Watching: n.conn != 0, Able: n.conn != 0 && n.able, Version: n.known})
	}
	return s
}
