package health

import (
	"container/heap"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// The simulation runs the machines of a few nodes over a network that delays, breaks and
// swallows, while processes die, are replaced and stand still, and targets move. It
// holds every event of every machine against the truth.
type sim struct {
	t     *testing.T
	seed  uint64
	r     *rand.Rand
	now   time.Duration
	todo  todo
	seq   int
	nodes []*simNode
	// cut tells of two nodes between which nothing passes.
	cut map[[2]int]bool
	// deaf tells of a node that cannot dial another one, late of two whose messages take
	// longer.
	deaf map[[2]int]bool
	late map[[2]int]time.Duration
	// trouble is when something was last wrong that may make a live peer silent.
	trouble time.Duration
	starts  map[simStart]bool
	targets []*simTarget
	sent    int
	seen    map[Kind]int
}

type simStart struct {
	target   string
	node     string
	instance uint64
}

// simTarget is a target, on a node or (-1) nowhere.
type simTarget struct {
	name     string
	instance uint64
	at       int
	progress uint64
}

// simNode is a node; m is nil while it has no process.
type simNode struct {
	s           *sim
	id          int
	name        string
	incarnation uint64
	interval    time.Duration // 0: the default
	m           *Machine
	until       time.Duration // it stands still until then
	armed       time.Duration
	peers       map[string]bool // of interest
	conns       map[string]*simConn
	in          map[string]int
	view        *view
}

type simConn struct {
	from, to       *simNode
	fromInc, toInc uint64
	attempt        uint64
	open, entered  bool
	out            int
	arrival        [2]time.Duration // of the last message each way
}

type todoItem struct {
	at  time.Duration
	seq int
	f   func()
}

type todo []todoItem

func (q todo) Len() int { return len(q) }
func (q todo) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q todo) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *todo) Push(x any)   { *q = append(*q, x.(todoItem)) }
func (q *todo) Pop() any {
	old := *q
	x := old[len(old)-1]
	*q = old[:len(old)-1]
	return x
}

func (s *sim) fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("seed %d, at %v: %s", s.seed, s.now, fmt.Sprintf(format, args...))
}

func (s *sim) in(d time.Duration, f func()) {
	s.seq++
	heap.Push(&s.todo, todoItem{s.now + d, s.seq, f})
}

func (s *sim) run(to time.Duration) {
	for len(s.todo) > 0 && s.todo[0].at <= to {
		x := heap.Pop(&s.todo).(todoItem)
		s.now = x.at
		x.f()
	}
	s.now = to
}

// to runs f in the process that n has now, when it runs. After its death f is not run.
func (n *simNode) to(d time.Duration, f func()) {
	inc := n.incarnation
	var try func()
	try = func() {
		switch {
		case n.m == nil || n.incarnation != inc:
		case n.until > n.s.now:
			n.s.in(n.until-n.s.now, try)
		default:
			f()
			n.settle()
		}
	}
	n.s.in(d, try)
}

// settle checks what was learnt, and sees to it that the next tick comes.
func (n *simNode) settle() {
	for _, e := range n.m.Events() {
		n.check(&e)
		n.view.apply(n.s, &e)
	}
	next, any := time.Duration(0), false
	for _, p := range n.m.order {
		if due, ok := n.m.Due(p.name); ok && (!any || due < next) {
			next, any = due, true
		}
	}
	if next = max(next, n.s.now); any && (n.armed == 0 || next < n.armed) {
		n.armed = next
		n.to(next-n.s.now, func() {
			if n.armed <= n.s.now {
				n.armed = 0
			}
			n.tick()
		})
	}
}

func (n *simNode) tick() {
	s := n.s
	for _, p := range n.m.order {
		step := n.m.Tick(s.now, p.name)
		if step.Drop {
			if c := n.conns[p.name]; c != nil {
				c.close(false)
			}
		}
		if step.Dial != 0 {
			n.dial(s.node(p.name), step.Dial)
		}
		if c := n.conns[p.name]; step.Send && c != nil && c.out < maxOut {
			var b Beat
			n.m.Beat(p.name, &b)
			c.out++
			c.carry(0, &b)
		}
	}
}

func (s *sim) node(name string) *simNode {
	return s.nodes[slices.IndexFunc(s.nodes, func(n *simNode) bool { return n.name == name })]
}

func (s *sim) delay() time.Duration { return time.Duration(1+s.r.IntN(20)) * time.Millisecond }

func pairOf(a, b *simNode) [2]int { return [2]int{min(a.id, b.id), max(a.id, b.id)} }

func (s *sim) isCut(a, b *simNode) bool { return s.cut[pairOf(a, b)] }

func (n *simNode) dial(to *simNode, attempt uint64) {
	s := n.s
	c := &simConn{from: n, to: to, fromInc: n.incarnation, attempt: attempt}
	n.conns[to.name] = c
	n.to(2*time.Second, func() {
		if !c.open {
			c.broke()
		}
	})
	if s.isCut(n, to) || s.deaf[[2]int{n.id, to.id}] {
		return // until it is broken off
	}
	if to.m == nil {
		n.to(s.delay(), func() { c.broke() })
		return
	}
	c.toInc = to.incarnation
	to.to(s.delay(), func() {
		c.entered = true
		to.in[n.name]++
		n.to(s.delay(), func() {
			if n.conns[to.name] == c && n.m.Connected(s.now, to.name, attempt) {
				c.open = true
				n.tick()
			} else {
				c.leave()
			}
		})
	})
}

// alive tells whether both processes of the connection live.
func (c *simConn) alive() bool {
	return c.from.m != nil && c.from.incarnation == c.fromInc && c.to.m != nil && c.to.incarnation == c.toInc
}

// broke tells the process that has dialled.
func (c *simConn) broke() {
	if n := c.from; n.conns[c.to.name] == c {
		delete(n.conns, c.to.name)
		n.m.Broke(n.s.now, c.to.name, c.attempt)
	}
}

// leave tells the other process that the connection has ended.
func (c *simConn) leave() {
	if !c.entered || c.to.m == nil || c.to.incarnation != c.toInc {
		return
	}
	c.entered = false
	c.to.to(c.from.s.delay(), func() {
		if c.to.in[c.from.name]--; c.to.in[c.from.name] == 0 {
			c.to.m.Left(c.to.s.now, c.from.name)
		}
	})
}

// close ends the connection from the dialling side; the other hears of it unless silent.
func (c *simConn) close(silent bool) {
	c.open = false
	if c.from.conns[c.to.name] == c {
		delete(c.from.conns, c.to.name)
	}
	if !silent {
		c.leave()
	}
}

// carry brings a beat to the other end (way 0) or an answer back (way 1).
func (c *simConn) carry(way int, b *Beat) {
	s := c.from.s
	s.sent++
	if s.isCut(c.from, c.to) {
		return
	}
	at := max(s.now+s.delay()+s.late[pairOf(c.from, c.to)], c.arrival[way])
	c.arrival[way] = at
	p := b.Append(nil)
	n, other := c.to, c.from
	if way == 1 {
		n, other = c.from, c.to
	}
	if !c.alive() {
		return
	}
	n.to(at-s.now, func() {
		var b Beat
		if err := DecodeBeat(p, &b); err != nil {
			s.fatalf("%v", err)
		}
		if way == 1 {
			if c.open {
				c.out--
				n.m.Heard(s.now, other.name, &b, Answer)
			}
			return
		}
		if !n.m.Allow(s.now, other.name) {
			s.fatalf("%s: too many beats from %s", n.name, other.name)
		}
		n.m.Heard(s.now, other.name, &b, Request)
		var own Beat
		n.m.Beat(other.name, &own)
		c.carry(1, &own)
	})
}

func (s *sim) start(n *simNode) {
	n.incarnation++
	var peers []string
	for _, p := range s.nodes {
		if p != n {
			peers = append(peers, p.name)
		}
	}
	m, err := New(Config{Node: n.name, Peers: peers, Incarnation: n.incarnation, Interval: n.interval})
	if err != nil {
		s.fatalf("%v", err)
	}
	s.trouble = s.now
	n.m, n.until, n.armed = m, 0, 0
	n.conns, n.in, n.view = map[string]*simConn{}, map[string]int{}, newView()
	n.look()
}

// look asks the node about itself, again and again.
func (n *simNode) look() {
	n.to(0, func() {
		l := Local{Peers: slices.Sorted(maps.Keys(n.peers))}
		for _, t := range n.s.targets {
			if t.at == n.id {
				t.progress++
				l.Targets = append(l.Targets, Target{Name: t.name, Instance: t.instance, State: Serving, Work: 1, Progress: t.progress})
			}
		}
		if err := n.m.SetLocal(n.s.now, l); err != nil {
			n.s.fatalf("%v", err)
		}
		n.to(n.m.cfg.Interval, n.look)
	})
}

// kill ends a node's process; loud: the kernel says goodbye to the others.
func (s *sim) kill(n *simNode, loud bool) {
	s.trouble = s.now
	n.m = nil
	for _, t := range s.targets {
		if t.at == n.id {
			t.at = -1
		}
	}
	for _, name := range slices.Sorted(maps.Keys(n.conns)) {
		n.conns[name].close(!loud)
	}
	for _, p := range s.nodes {
		if c := p.conns[n.name]; p.m != nil && c != nil && c.toInc == n.incarnation && loud {
			p.to(s.delay(), func() { c.broke() })
		}
	}
}

func (s *sim) startTarget(t *simTarget, n *simNode) {
	t.instance++
	t.at = n.id
	s.starts[simStart{t.name, n.name, t.instance}] = true
}

// check holds an event against the truth.
func (n *simNode) check(e *Event) {
	s := n.s
	s.seen[e.Kind]++
	p := s.node(e.Peer)
	switch e.Kind {
	case Restarted:
		if e.Incarnation > p.incarnation {
			s.fatalf("%s: %s was never started", n.name, eventText(e))
		}
	case TargetUp, TargetMoved:
		if !s.starts[simStart{e.Target, e.Peer, e.Instance}] {
			s.fatalf("%s: %s never happened", n.name, eventText(e))
		}
	case TargetGone:
		for _, t := range s.targets {
			if t.name == e.Target && t.instance == e.Instance && t.at == p.id {
				s.fatalf("%s: %s, but it runs", n.name, eventText(e))
			}
		}
	case Suspect:
		if p.m != nil && !s.isCut(n, p) && s.now-s.trouble > 20*time.Second {
			s.fatalf("%s: %s, and nothing is wrong", n.name, eventText(e))
		}
	case Slow: // only who stood still as a whole
		if s.now-s.trouble > 10*time.Second {
			s.fatalf("%s: %s, but everything gets on", n.name, eventText(e))
		}
	}
}

// view is what a reader of the events believes.
type view struct {
	peer   map[string]Kind
	inc    map[string]uint64
	target map[string]Event
}

func newView() *view {
	return &view{map[string]Kind{}, map[string]uint64{}, map[string]Event{}}
}

// apply takes an event, which must make sense after the earlier ones.
func (v *view) apply(s *sim, e *Event) {
	bad := func() { s.fatalf("%s makes no sense now", eventText(e)) }
	switch e.Kind {
	case Alive, Suspect:
		v.peer[e.Peer] = e.Kind
	case Restarted:
		if v.inc[e.Peer] == e.Incarnation {
			bad()
		}
	case TargetUp:
		if t, ok := v.target[e.Target]; ok && (t.Peer != e.Peer || t.Instance >= e.Instance) {
			bad()
		}
		v.target[e.Target] = Event{Peer: e.Peer, Instance: e.Instance}
	case TargetMoved:
		if t := v.target[e.Target]; t.Peer != e.From || t.Peer == e.Peer || t.Instance >= e.Instance {
			bad()
		}
		v.target[e.Target] = Event{Peer: e.Peer, Instance: e.Instance}
	case TargetGone:
		if t := v.target[e.Target]; t.Peer != e.Peer || t.Instance != e.Instance {
			bad()
		}
		delete(v.target, e.Target)
	}
	v.inc[e.Peer] = e.Incarnation
}

// present checks that Present says of targets what the events have said.
func (n *simNode) present() {
	v := newView()
	for _, e := range n.m.Present()[1:] {
		v.apply(n.s, &e)
	}
	if !maps.Equal(v.target, n.view.target) {
		n.s.fatalf("%s: present %v, by the events %v", n.name, v.target, n.view.target)
	}
}

func (s *sim) disturb() {
	n := s.nodes[s.r.IntN(len(s.nodes))]
	o := s.nodes[s.r.IntN(len(s.nodes))]
	t := s.targets[s.r.IntN(len(s.targets))]
	pair := [2]int{min(n.id, o.id), max(n.id, o.id)}
	switch x := s.r.IntN(100); {
	case x < 10 && n.m != nil:
		s.kill(n, s.r.IntN(2) == 0)
	case x < 35 && n.m == nil:
		s.start(n)
	case x < 45 && n != o:
		s.cut[pair] = true
		s.trouble = s.now
	case x < 65:
		if s.cut[pair] {
			s.trouble = s.now
		}
		delete(s.cut, pair)
	case x < 72 && n.m != nil:
		n.until = s.now + time.Duration(s.r.IntN(4000))*time.Millisecond
		s.trouble = n.until
	case x < 85:
		t.at = -1
		if o.m != nil {
			s.startTarget(t, o)
		}
	case x < 95 && n != o:
		if on := s.r.IntN(2) == 0; on {
			n.peers[o.name], o.peers[n.name] = true, true
		} else {
			delete(n.peers, o.name)
			delete(o.peers, n.name)
		}
	case n != o: // one of them has forgotten it
		delete(n.peers, o.name)
	}
}

func newSim(t *testing.T, seed uint64) *sim {
	s := &sim{t: t, seed: seed, r: rand.New(rand.NewPCG(seed, 1)), cut: map[[2]int]bool{}, deaf: map[[2]int]bool{}, late: map[[2]int]time.Duration{}, starts: map[simStart]bool{}, seen: map[Kind]int{}}
	for i, name := range []string{"a", "b", "c", "d"} {
		s.nodes = append(s.nodes, &simNode{s: s, id: i, name: name, peers: map[string]bool{}})
	}
	for _, name := range []string{"mdt", "ost0", "ost1"} {
		s.targets = append(s.targets, &simTarget{name: name, at: -1})
	}
	for _, n := range s.nodes {
		s.start(n)
	}
	return s
}

func (s *sim) life() {
	for range 60 {
		s.disturb()
		d := time.Duration(s.r.IntN(3000)) * time.Millisecond
		if s.r.IntN(10) == 0 {
			d = 40 * time.Second // also a quiet time, in which nobody may be suspected
		}
		s.run(s.now + d)
		for _, n := range s.nodes {
			if n.m != nil {
				n.present()
			}
		}
	}
}

// heal makes everything right; everybody is interested in everybody.
func (s *sim) heal() {
	s.cut = map[[2]int]bool{}
	s.trouble = s.now
	for _, n := range s.nodes {
		n.until = 0
		if n.m == nil {
			s.start(n)
		}
		for _, o := range s.nodes {
			if o != n {
				n.peers[o.name] = true
			}
		}
	}
	for _, t := range s.targets {
		if t.at < 0 {
			s.startTarget(t, s.nodes[s.r.IntN(len(s.nodes))])
		}
	}
	s.run(s.now + 30*time.Second)
	for _, n := range s.nodes {
		for _, o := range s.nodes {
			if o == n {
				continue
			}
			for _, p := range n.m.Status(s.now) {
				if p.Name == o.name && (p.State != StateAlive || p.Incarnation != o.incarnation || p.Connected != (n.id < o.id)) {
					s.fatalf("%s believes after everything is well: %+v", n.name, p)
				}
			}
			for _, t := range s.targets {
				if at := n.view.target[t.name]; t.at == o.id && at != (Event{Peer: o.name, Instance: t.instance}) {
					s.fatalf("%s believes of %s, which is at %s with instance %d: %+v", n.name, t.name, o.name, t.instance, at)
				}
			}
		}
		n.present()
	}
}

// notice checks that a dead peer is suspected by all who care, however it died.
func (s *sim) notice() {
	dead := s.nodes[s.r.IntN(len(s.nodes))]
	s.kill(dead, s.r.IntN(2) == 0)
	s.run(s.now + 6*time.Second)
	for _, n := range s.nodes {
		if n != dead && n.view.peer[dead.name] != Suspect {
			s.fatalf("%s does not suspect %s, which is dead: %+v", n.name, dead.name, n.m.Status(s.now))
		}
	}
	s.start(dead)
	s.run(s.now + 10*time.Second)
}

// part checks that nothing is sent when nobody is interested.
func (s *sim) part() {
	for _, n := range s.nodes {
		clear(n.peers)
	}
	s.run(s.now + 10*time.Second)
	sent := s.sent
	s.run(s.now + time.Minute)
	if s.sent != sent {
		s.fatalf("%d beats among nodes that are not interested", s.sent-sent)
	}
	for _, n := range s.nodes {
		for _, p := range n.m.Status(s.now) {
			if p.State != StateIdle || p.Connected {
				s.fatalf("%s: %+v", n.name, p)
			}
		}
	}
}

var simSeed = flag.Uint64("health.seed", 0, "run one seed of the simulation")

func TestSimulation(t *testing.T) {
	first, n := rand.Uint64(), 150
	switch {
	case *simSeed != 0:
		first, n = *simSeed, 1
	case testing.Short():
		n = 40
	}
	seen := map[Kind]int{}
	for i := range n {
		s := newSim(t, first+uint64(i))
		s.life()
		s.heal()
		s.notice()
		s.part()
		for k, n := range s.seen {
			seen[k] += n
		}
	}
	t.Logf("seeds from %d: %v", first, seen)
	for k := Alive; k <= TargetGone; k++ {
		if seen[k] == 0 && n > 1 {
			t.Errorf("no event %q in all runs", k)
		}
	}
}
