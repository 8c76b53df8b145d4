package owner

import (
	"container/heap"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var (
	simSeeds = flag.Int("sim.seeds", 0, "number of random schedules")
	simSeed  = flag.Uint64("sim.seed", 0, "run this schedule only")
	simDuel  = flag.Bool("sim.duel", false, "it is a duel")
)

// The simulation: a few contenders, each with a clock of its own speed, and one
// disk. Accesses take their time, their effect comes somewhere in between, and the
// two copies are read at different moments; processes are stopped anywhere for any
// time, killed, and their nodes lose power; writes are torn, fail without effect,
// with it, or have it when nobody expects it any more.

type simEvent struct {
	at int64
	n  int // order among equals
	f  func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].n < q[j].n
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any {
	l := len(*q) - 1
	x := (*q)[l]
	*q = (*q)[:l]
	return x
}

// fate says how bad a schedule is: one in n times something happens.
type fate struct {
	slow, stop, torn, fail int
	slowFor, stopFor       int64 // at most
	stroke                 int64 // time between strokes of fate, at most
	chaos, calm            int64 // how long anything may happen, and how long nothing does then
}

// simNode is a machine; process is what runs on it now.
type simNode struct {
	name   string
	boot   int
	rate   float64 // of its clock
	offset int64
	ival   time.Duration
	p      *simProcess
	down   bool // without power
	// awaited: somebody relies on the node being down.
	awaited int
}

type simProcess struct {
	s       *sim
	node    *simNode
	m       *Machine
	dead    bool
	stopped int64 // until
	timer   int   // number of the newest
	owned   bool
	until   int64 // by the node's clock
	wait    bool
	fenced  *simNode
	flight  []*simWrite
	ended   bool
}

type simWrite struct {
	slot int
	rec  Record
	done bool
}

type sim struct {
	t       *testing.T
	seed    uint64
	duel    bool
	rng     *rand.Rand
	now     int64
	n       int
	q       simQueue
	slots   [3]Slot
	sum     uint32
	nodes   []*simNode
	calm    bool
	lastGen uint64
	fate    fate
	// erased: late and torn writes have destroyed both copies of the newest
	// ownership's record, and nobody can know its generation.
	erased bool
	trace  []string
	count  struct{ acquired, lost, refused, released, late int }
}

func (s *sim) log(f string, a ...any) {
	if len(s.trace) > 400 {
		s.trace = s.trace[200:]
	}
	s.trace = append(s.trace, fmt.Sprintf("%12.6f ", float64(s.now)/1e9)+fmt.Sprintf(f, a...))
}

func (s *sim) fail(f string, a ...any) {
	if s.t.Failed() {
		return
	}
	for _, l := range s.trace {
		s.t.Log(l)
	}
	s.t.Errorf("-sim.seed %d -sim.duel=%v: %s", s.seed, s.duel, fmt.Sprintf(f, a...))
}

func (s *sim) after(d int64, f func()) {
	s.n++
	heap.Push(&s.q, simEvent{s.now + d, s.n, f})
}

func (n *simNode) clock(t int64) int64 { return n.offset + int64(float64(t)*n.rate) }

// span is a real time from a node's.
func (n *simNode) span(d int64) int64 { return int64(float64(d) / n.rate) }

// long is a time of up to most, often one that the protocol is about.
func (s *sim) long(most int64) int64 {
	if s.rng.IntN(3) > 0 {
		return s.rng.Int64N(most)
	}
	near := []int64{250e6, 300e6, 1e9, 17e8, 2e9, 3e9}
	return max(near[s.rng.IntN(len(near))]+s.rng.Int64N(300e6)-150e6, 0)
}

// delay is how long an access takes.
func (s *sim) delay() int64 {
	if s.calm {
		return s.rng.Int64N(5e6)
	}
	if s.rng.IntN(s.fate.slow) == 0 {
		return s.long(s.fate.slowFor)
	}
	return s.rng.Int64N(30e6)
}

// step runs f in the process as soon as it is not stopped.
func (p *simProcess) step(f func()) {
	if p.dead {
		return
	}
	if p.stopped > p.s.now {
		p.s.after(p.stopped-p.s.now, func() { p.step(f) })
		return
	}
	p.lapse()
	f()
	p.run()
	// A process may be stopped between any two things that it does.
	if !p.s.calm && p.s.rng.IntN(p.s.fate.stop) == 0 {
		p.stop()
	}
}

func (p *simProcess) stop() {
	d := p.s.long(p.s.fate.stopFor)
	p.stopped = p.s.now + d
	p.s.log("%s is stopped for %v", p.node.name, time.Duration(d))
}

func (p *simProcess) clock() int64 { return p.node.clock(p.s.now) }

// valid is what Owner.Valid would say.
func (p *simProcess) valid() bool { return p.owned && !p.dead && p.clock() < p.until }

// lapse is Owner.Valid finding out that the time is over.
func (p *simProcess) lapse() {
	if p.owned && p.clock() >= p.until {
		p.owned = false
		p.m.Expired()
	}
}

func (p *simProcess) run() {
	s := p.s
	acts := append([]Action(nil), p.m.Actions()...)
	for i := range acts {
		a := &acts[i]
		switch a.Kind {
		case ActRead:
			p.read()
		case ActWrite:
			p.write(a.Slot, a.Record)
		case ActMark:
			p.write(2, a.Record)
		case ActTimer:
			p.timer++
			n := p.timer
			s.after(max(p.node.span(a.At-p.clock())+s.rng.Int64N(2e6)-1e6, 0), func() {
				p.step(func() {
					if n == p.timer {
						p.m.Tick(p.clock())
					}
				})
			})
		case ActAcquired:
			p.acquired(a)
		case ActExtend:
			if !p.owned {
				p.m.Expired()
				p.run()
				return
			}
			p.until = a.At
			p.alone()
		case ActRefused:
			s.count.refused++
			p.end("refused: %v", a.Err)
		case ActLost:
			s.count.lost++
			p.owned = false
			p.end("lost: %v", a.Err)
			if s.now > s.fate.chaos+60e9 {
				s.fail("%s has lost the store for nothing: %v", p.node.name, a.Err)
			}
		case ActReleased:
			s.count.released++
			p.end("released: %v", a.Err)
		}
	}
}

func (p *simProcess) end(f string, a ...any) {
	p.ended = true
	p.s.log(p.node.name+" "+f, a...)
}

func (p *simProcess) acquired(a *Action) {
	s := p.s
	s.count.acquired++
	p.owned, p.until = true, a.At
	s.log("%s OWNS generation %d", p.node.name, a.Record.Generation)
	if a.Record.Generation <= s.lastGen && !s.erased {
		s.fail("%s owns generation %d after %d", p.node.name, a.Record.Generation, s.lastGen)
	}
	s.lastGen, s.erased = max(s.lastGen, a.Record.Generation), false
	p.alone()
}

// alone is the invariant.
func (p *simProcess) alone() {
	for _, n := range p.s.nodes {
		if o := n.p; o != nil && o != p && o.valid() {
			p.s.fail("%s and %s own the store", p.node.name, o.node.name)
		}
	}
}

func (p *simProcess) read() {
	s := p.s
	d := s.delay()
	snap := new(Snapshot)
	for i, to := range []*Slot{&snap.Slots[0], &snap.Slots[1], &snap.Mark} {
		s.after(s.rng.Int64N(d+1), func() {
			*to = s.slots[i]
			if !s.calm && s.rng.IntN(s.fate.torn) == 0 && i < 2 { // read while it is written
				s.sum++
				*to = Slot{Sum: s.sum}
			}
		})
	}
	var err error
	if !s.calm && p.owned && s.rng.IntN(100) == 0 {
		err = errors.New("read error")
	}
	s.after(d, func() { p.step(func() { p.m.Read(p.clock(), snap, err) }) })
}

func (p *simProcess) write(slot int, rec Record) {
	s := p.s
	w := &simWrite{slot: slot, rec: rec}
	d := s.delay()
	at := []int64{0, d, s.rng.Int64N(d + 1)}[s.rng.IntN(3)]
	var err error
	if !s.calm {
		switch s.rng.IntN(s.fate.fail) {
		case 0:
			err, w.done = errors.New("write error without effect"), true
		case 1:
			err = errors.New("write error with effect")
		case 2:
			err, at = errors.New("write error with late effect"), d+s.rng.Int64N(10e9)
			s.count.late++
		}
	}
	p.flight = append(p.flight, w)
	s.log("%s writes copy %d generation %d seq %d %v, takes %v, effect after %v", p.node.name, slot, rec.Generation, rec.Seq, rec.State,
		time.Duration(d), time.Duration(at))
	s.after(at, func() { s.effect(w, false) })
	s.after(d, func() { p.step(func() { p.m.Wrote(p.clock(), err) }) })
}

func (s *sim) effect(w *simWrite, torn bool) {
	if w.done {
		return
	}
	w.done = true
	s.sum++
	s.slots[w.slot] = Slot{Sum: s.sum}
	if !torn {
		s.slots[w.slot] = Slot{OK: true, Record: w.rec, Sum: s.sum}
	}
	a, b := &s.slots[0], &s.slots[1]
	s.erased = s.erased || s.lastGen > 0 && (!a.OK || a.Record.Generation < s.lastGen) && (!b.OK || b.Record.Generation < s.lastGen)
}

// kill ends a process. What it has given to the kernel has its effect, unless the
// node loses its power: then it has it, or is torn, or is lost.
func (p *simProcess) kill(power bool) {
	s := p.s
	p.dead, p.owned = true, false
	s.log("%s is killed, power lost: %v", p.node.name, power)
	if power {
		for _, w := range p.flight {
			switch s.rng.IntN(3) {
			case 0:
				w.done = true
			case 1:
				s.effect(w, true)
			}
		}
	}
	if p.fenced != nil {
		p.fenced.awaited--
	}
	p.node.p = nil
}

func (s *sim) start(n *simNode) {
	p := &simProcess{s: s, node: n, wait: s.calm || s.rng.IntN(5) > 0}
	c := Config{Node: n.name, Boot: fmt.Sprint(n.name, n.boot), Interval: n.ival, Wait: p.wait, Check: s.rng.IntN(6) == 0, Exclusive: s.rng.IntN(2) == 0, Generation: s.lastGen + 1}
	for i := range c.Incarnation {
		c.Incarnation[i] = byte(s.rng.Uint32())
	}
	for _, o := range s.nodes {
		if o.down && s.rng.IntN(2) == 0 {
			c.Fenced, p.fenced = o.name, o
			o.awaited++
			break
		}
	}
	p.m = NewMachine(c)
	n.p = p
	s.log("%s starts, wait %v, exclusive %v, fenced %q", n.name, p.wait, c.Exclusive, c.Fenced)
	s.after(0, func() { p.step(func() { p.m.Start(p.clock()) }) })
}

// chaos is one stroke of fate.
func (s *sim) chaos() {
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	p := n.p
	switch k := s.rng.IntN(10); {
	case p == nil && !n.down, p == nil && n.awaited == 0:
		n.down = false
		s.start(n)
	case p == nil:
	case p.ended:
		// Its accesses have ended: the process may be another now.
		if len(p.flight) == 0 || p.flight[len(p.flight)-1].done {
			p.kill(false)
		}
	case k < 3:
		p.stop()
	case k < 5 && p.valid() && p.stopped <= s.now:
		// The owner has ended its work, and does not ask Valid any more.
		p.lapse()
		if p.owned {
			p.owned = false
			s.log("%s releases", n.name)
			p.m.Release(p.clock())
			p.run()
		}
	case k == 5:
		p.kill(false)
	case k == 6:
		p.kill(true)
		n.down, n.boot = true, n.boot+1
	}
}

// simulate runs a schedule: a long one with all kinds of fate, or a duel, in which
// contenders start at about the same time and are slow or stopped in the worst moments.
func simulate(t *testing.T, seed uint64, duel bool) *sim {
	s := &sim{t: t, seed: seed, duel: duel, rng: rand.New(rand.NewPCG(seed, 1))}
	for i := range s.slots {
		s.slots[i].Empty = true
	}
	one := func(v ...int64) int64 { return v[s.rng.IntN(len(v))] }
	s.fate = fate{
		slow: int(one(1, 3, 10, 40)), slowFor: one(150e6, 300e6, 1e9, 6e9), stop: int(one(5, 20, 100)), stopFor: one(300e6, 1e9, 4e9, 10e9),
		torn: int(one(5, 50, 500)), fail: int(one(20, 60, 1000)), stroke: one(500e6, 2e9, 6e9),
		chaos: 60e9, calm: 150e9,
	}
	if duel {
		s.fate.slow, s.fate.slowFor = int(one(1, 3, 10)), one(150e6, 300e6, 1e9)
		s.fate.fail, s.fate.stroke, s.fate.chaos, s.fate.calm = 1000, 60e9, 10e9, 60e9
	}
	for i := range int(one(2, 2, 3, 4)) {
		s.nodes = append(s.nodes, &simNode{name: string(rune('a' + i)), rate: 0.97 + 0.06*s.rng.Float64(), offset: 1 + s.rng.Int64N(1e15), ival: time.Second})
	}
	if s.rng.IntN(4) == 0 {
		// The interval has been changed, not everywhere yet. There is a record.
		for _, n := range s.nodes {
			n.ival = time.Duration(1+s.rng.IntN(3)) * 500 * time.Millisecond
		}
		s.sum++
		s.slots[0] = Slot{OK: true, Sum: s.sum, Record: Record{Node: "z", Generation: 7, Seq: 9, Interval: time.Second, State: Clean}}
		s.lastGen = 7
	}
	for _, n := range s.nodes {
		spread := int64(4e9)
		if duel {
			spread = one(1, 100e6, 400e6)
		}
		s.after(s.rng.Int64N(spread), func() {
			if n.p == nil && !n.down {
				s.start(n)
			}
		})
	}
	for at := int64(2e9); at < s.fate.chaos; at += 1 + s.rng.Int64N(s.fate.stroke) {
		s.n++
		heap.Push(&s.q, simEvent{at, s.n, s.chaos})
	}
	var starts func()
	starts = func() {
		for _, n := range s.nodes {
			if n.p != nil && n.p.ended && (len(n.p.flight) == 0 || n.p.flight[len(n.p.flight)-1].done) {
				n.p.kill(false)
			}
			if n.p == nil && n.awaited == 0 {
				n.down = false
				s.start(n)
			}
		}
		s.after(2e9, starts)
	}
	s.n++
	heap.Push(&s.q, simEvent{s.fate.chaos, s.n, func() { s.calm = true; starts() }})
	for len(s.q) > 0 && !t.Failed() {
		e := heap.Pop(&s.q).(simEvent)
		if e.at > s.fate.chaos+s.fate.calm {
			break
		}
		s.now = e.at
		e.f()
	}
	owners := 0
	for _, n := range s.nodes {
		if n.p != nil && n.p.valid() {
			owners++
		}
	}
	if owners != 1 {
		s.fail("%d owners when all has been calm for long", owners)
	}
	return s
}

// At no moment do two own the store, generations rise, and when it has been calm
// for a while exactly one owns it and goes on to (MM 1 to MM 10, CS 41c).
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		simulate(t, *simSeed, *simDuel)
		return
	}
	n := *simSeeds
	if n == 0 {
		n = 3000
		if testing.Short() {
			n = 200
		}
	}
	first := rand.Uint64() >> 1
	t.Logf("seeds %d and following", first)
	var acquired, lost, refused, released, late int
	for i := range n {
		s := simulate(t, first+uint64(i), false)
		if t.Failed() {
			return
		}
		acquired, lost, refused, released, late = acquired+s.count.acquired, lost+s.count.lost, refused+s.count.refused, released+s.count.released, late+s.count.late
	}
	t.Logf("%d schedules: owned %d times, lost %d, refused %d, released %d, late writes %d", n, acquired, lost, refused, released, late)
	if n >= 300 && (acquired < 2*n || lost < n/2 || refused < n/2 || released < n/4 || late < n/4) {
		t.Error("too little happens in the simulation")
	}
}

// The same of contenders that begin at once (MM 1, CS 41c).
func TestDuels(t *testing.T) {
	n := 4 * *simSeeds
	if n == 0 {
		n = 12000
		if testing.Short() {
			n = 600
		}
	}
	first := rand.Uint64() >> 1
	t.Logf("seeds %d and following", first)
	acquired := 0
	for i := range n {
		s := simulate(t, first+uint64(i), true)
		if t.Failed() {
			return
		}
		acquired += s.count.acquired
	}
	t.Logf("%d schedules: owned %d times", n, acquired)
}
