package manager

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

var (
	simSeed = flag.Uint64("sim.seed", 0, "run this schedule only")
	simRuns = flag.Int("sim.runs", 0, "how many schedules")
)

// sim runs a world through random trouble and holds every decision against the truth.
type sim struct {
	t    *testing.T
	r    *rand.Rand
	seed uint64
	w    *world
	log  []string

	trouble map[string]time.Duration // of a node, as the leader may see it: when it was last
	reached map[string]time.Duration // when a node could last answer the leader
	ran     time.Duration            // since when the present leader runs without a pause
	took    map[[2]uint64]string     // who has begun a period of service
	moved   map[uint32]time.Duration // the last change of the assignment in this term
	moves   map[uint32]int
	next    map[uint32]string                   // who was to have the address last
	fine    map[uint32]map[string]time.Duration // since when a node could serve an address
	count   map[string]int
	bad     bool
}

// simBound is how long an address that could be served may be unserved. Nodes that
// listen never, and those that beat only, are tried before.
const simBound = 45 * time.Second

func newSim(t *testing.T, seed uint64) *sim {
	r := rand.New(rand.NewPCG(seed, 1))
	names := []string{"a", "b", "c", "d", "e"}[:3+r.IntN(3)]
	cfg := DefaultConfig("a", names...)
	cfg.HoldOffMax = 2 * time.Minute
	if r.IntN(4) == 0 {
		cfg.SlowAfter = 3 * time.Second
	}
	if r.IntN(5) == 0 {
		cfg.FailbackDelay = Never
	}
	if r.IntN(8) == 0 {
		cfg.Quorum = Owner
	}
	s := &sim{
		t: t, r: r, seed: seed, w: newWorld(cfg), trouble: map[string]time.Duration{}, reached: map[string]time.Duration{},
		took: map[[2]uint64]string{}, fine: map[uint32]map[string]time.Duration{}, next: map[uint32]string{}, count: map[string]int{},
	}
	for i := range 1 + r.IntN(5) {
		var prefer []string
		if r.IntN(2) == 0 {
			for _, k := range r.Perm(len(names))[:1+r.IntN(len(names))] {
				prefer = append(prefer, names[k])
			}
		}
		s.w.reg.add(fmt.Sprintf("192.0.2.%d", 10+i), prefer...)
		s.fine[uint32(i+1)] = map[string]time.Duration{}
	}
	s.w.decided, s.w.happened, s.w.served = s.decided, s.happened, s.served
	s.w.delay = func() time.Duration { return time.Duration(r.IntN(6)) * tick }
	return s
}

func (s *sim) p(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf("%8d ", s.w.now.Milliseconds())+fmt.Sprintf(format, args...))
}

func (s *sim) fail(format string, args ...any) {
	if s.bad {
		return
	}
	s.bad = true
	s.t.Errorf("seed %d: %s\n%s\nrepeat: go test ./failover/manager -run TestSimulation -sim.seed=%d -v",
		s.seed, fmt.Sprintf(format, args...), strings.Join(s.log[max(0, len(s.log)-60):], "\n"), s.seed)
}

func (s *sim) happened(e Event) {
	s.p("%s %s%s %s: %s %s", e.Kind, e.Node, e.From, e.To, e.Text, e.Err)
}

// served: no two nodes begin the same period of service.
func (s *sim) served(n *wnode, index uint32, epoch uint64) {
	s.p("%s serves %d, epoch %d", n.name, index, epoch)
	k := [2]uint64{uint64(index), epoch}
	if s.took[k] != "" {
		s.fail("%s and %s have begun period %d of address %d", s.took[k], n.name, epoch, index)
	}
	s.took[k] = n.name
}

// decided checks a decision.
func (s *sim) decided(d *Decision, v *mgs.VIP, err error) {
	w := s.w
	s.p("%v (move %v, error %v)", d, v != nil, err)
	s.count["decisions"]++
	majority := 0
	for _, n := range w.nodes {
		if n == w.lead || w.now-s.reached[n.name] <= w.cfg.fresh()+2*tick {
			majority++
		}
	}
	if w.cfg.Quorum != Owner && 2*majority <= len(w.nodes) {
		s.fail("a decision without quorum")
	}
	x := w.reg.vip(d.Index)
	if d.Abandon {
		s.count["abandoned"]++
		n := w.node(d.From)
		u := n.units[d.Index]
		held := u != nil && u.epoch == d.Epoch && (u.state == Serving || u.state == Releasing || u.state == Taking)
		if held && n.runs() && w.now-s.trouble[n.name] > 10*time.Second {
			s.fail("%s was well, and served the address", n.name)
		}
	}
	if err != nil {
		return
	}
	if d.To != "" && d.To != d.From {
		if len(x.Prefer) > 0 && !slices.Contains(x.Prefer, d.To) {
			s.fail("%s may not serve the address", d.To)
		}
		if n := w.node(d.To); slices.Contains(w.reg.drained, d.To) || !n.up && w.now-s.trouble[n.name] > 8*beat {
			s.fail("%s is drained or dead", d.To)
		}
	}
	voluntary := d.Planned && (strings.Contains(d.Reason, "preferred") || strings.Contains(d.Reason, "addresses, ") || strings.Contains(d.Reason, "slow"))
	if k := s.moves[d.Index]; voluntary && d.To != d.From {
		s.count["voluntary"]++
		if hold := min(w.cfg.HoldOff<<max(k-1, 0), w.cfg.HoldOffMax); k > 0 && w.now-s.moved[d.Index] < hold {
			s.fail("moved again after %v, not %v", w.now-s.moved[d.Index], hold)
		}
	}
	s.noteMoves()
	planned := 0
	for i := range w.reg.vips {
		y := &w.reg.vips[i]
		if o := owner(y); o != "" && y.Next != o && y.Next != "" && w.node(o).runs() && !w.node(o).holds && w.linked(o, w.lead.name) && w.now-s.trouble[o] > 10*time.Second {
			planned++
		}
	}
	if d.Planned && planned > w.cfg.ParallelMoves {
		s.fail("%d moves at once", planned)
	}
}

// noteMoves counts changes of the assignment.
func (s *sim) noteMoves() {
	for i := range s.w.reg.vips {
		x := &s.w.reg.vips[i]
		if was := s.next[x.Index]; was != x.Next && was != "" {
			if k := s.moves[x.Index]; k > 0 && s.w.now-s.moved[x.Index] > s.w.cfg.HoldOffMax+min(s.w.cfg.HoldOff<<(k-1), s.w.cfg.HoldOffMax) {
				s.moves[x.Index] = 0
			}
			s.moves[x.Index]++
			s.moved[x.Index] = s.w.now
		}
		s.next[x.Index] = x.Next
	}
}

func (s *sim) lead(n *wnode) {
	s.p("%s leads", n.name)
	s.w.takeLead(n)
	s.ran = s.w.now
	s.moved, s.moves = map[uint32]time.Duration{}, map[uint32]int{}
}

func (s *sim) pick() *wnode { return s.w.nodes[s.r.IntN(len(s.w.nodes))] }

// disturb does something random.
func (s *sim) disturb() {
	w, n := s.w, s.pick()
	o := s.pick()
	what := s.r.IntN(22)
	s.p("disturb %d: %s %s", what, n.name, o.name)
	switch what {
	case 0, 1:
		if n.up {
			w.kill(n)
		}
	case 2, 3, 4:
		if !n.up {
			w.start(n)
		}
	case 5:
		n.frozen = n.up
	case 6, 7:
		if n.frozen {
			w.thaw(n)
		}
	case 8:
		if n.up {
			w.kill(n)
			w.start(n)
		}
	case 9, 10:
		if n != o {
			w.cut[[2]string{n.name, o.name}] = true
		}
	case 11:
		clear(w.cut)
	case 12:
		n.unready = "the MDT does not answer"
	case 13, 14:
		n.unready, n.stuck, n.holds, n.fails, n.fumbles, n.slow, n.stopping = "", false, false, false, false, false, false
	case 15:
		n.slow = true
	case 16:
		switch s.r.IntN(4) {
		case 0:
			n.stuck = true
		case 1:
			n.holds = true
		case 2:
			n.fumbles = true
		default:
			n.fails = true
		}
	case 17:
		if slices.Contains(w.reg.drained, n.name) {
			w.reg.drained = slices.DeleteFunc(w.reg.drained, func(x string) bool { return x == n.name })
		} else if !w.away {
			w.reg.drained = append(w.reg.drained, n.name)
		}
	case 18:
		w.away = !w.away
	case 19:
		if w.lead != nil && s.r.IntN(2) == 0 {
			w.resign()
		} else if n.runs() {
			s.lead(n)
		}
	case 20:
		if i := uint32(1 + s.r.IntN(len(w.reg.vips))); !w.away && s.r.IntN(2) == 0 {
			x := w.reg.vip(i)
			_, _ = w.reg.assign(i, x.Epoch, n.name)
			s.noteMoves()
		}
	}
	if what == 21 && !w.away {
		if x := w.reg.vip(uint32(1 + s.r.IntN(len(w.reg.vips)))); x.Drained {
			x.Drained = false
		} else if s.r.IntN(2) == 0 {
			w.reg.drain(x)
		}
		s.noteMoves()
	}
	if s.w.lead == nil && n.runs() && s.r.IntN(2) == 0 {
		s.lead(n)
	}
}

// observe takes the truth down.
func (s *sim) observe() {
	w := s.w
	for _, n := range w.nodes {
		if w.lead == nil || !n.runs() || !w.linked(n.name, w.lead.name) || !w.lead.runs() || n.holds || n.fails || n.fumbles || n.stuck || w.away {
			s.trouble[n.name] = w.now
		}
		if w.lead != nil && w.lead.runs() && n.runs() && w.linked(n.name, w.lead.name) {
			s.reached[n.name] = w.now
		}
	}
	able := w.lead != nil && w.lead.runs() && !w.away
	if able {
		k := 0
		for _, n := range w.nodes {
			if n.runs() && w.linked(n.name, w.lead.name) {
				k++
			}
		}
		able = 2*k > len(w.nodes) || w.cfg.Quorum == Owner
	}
	for i := range w.reg.vips {
		v := &w.reg.vips[i]
		served := false
		for _, n := range w.nodes {
			if u := n.units[v.Index]; u != nil && u.epoch == v.Epoch && (u.state == Serving || u.state == Releasing) && n.runs() {
				served = true
			}
		}
		for _, n := range w.nodes {
			may := len(v.Prefer) == 0 || slices.Contains(v.Prefer, n.name)
			if served || !able || !may || v.Drained || !n.runs() || !w.linked(n.name, w.lead.name) || n.unready != "" || n.stuck || n.fails || n.fumbles || n.slow && w.cfg.SlowAfter > 0 || n.stopping ||
				slices.Contains(w.reg.drained, n.name) {
				s.fine[v.Index][n.name] = w.now
			} else if d := w.now - s.fine[v.Index][n.name]; d > simBound {
				s.fail("%s could serve address %d for %v, and nobody does: %+v", n.name, v.Index, d, *v)
			}
		}
	}
}

func (s *sim) run(d time.Duration) {
	for end := s.w.now + d; s.w.now < end && !s.bad; {
		s.observe()
		s.w.step()
	}
}

// TestSimulation runs clusters of three to five nodes through partitions, freezes,
// restarts, slow and useless nodes, losses of the registry, changes of the leader and
// moves by hand. Nothing is decided without quorum; nobody who is well is taken for
// dead; a period of service has one node; addresses are served again within a bound, and
// are not moved without need before the hold-off has ended; and when trouble ends,
// everything is served, and then nothing moves any more.
func TestSimulation(t *testing.T) {
	runs := *simRuns
	if runs == 0 {
		if runs = 60; testing.Short() {
			runs = 15
		}
	}
	total := map[string]int{}
	one := func(seed uint64) {
		s := newSim(t, seed)
		s.lead(s.w.nodes[0])
		s.run(5 * time.Second)
		for range 60 {
			s.disturb()
			s.run(time.Duration(s.r.IntN(60)) * 2 * tick)
			if s.bad {
				return
			}
		}
		s.p("calm")
		w := s.w
		clear(w.cut)
		w.away, w.reg.drained = false, nil
		for i := range w.reg.vips {
			w.reg.vips[i].Drained = false
		}
		for _, n := range w.nodes {
			n.unready, n.stuck, n.holds, n.fails, n.fumbles, n.slow, n.stopping = "", false, false, false, false, false, false
			if n.frozen {
				w.thaw(n)
			}
			if !n.up {
				w.start(n)
			}
		}
		if w.lead == nil {
			s.lead(s.pick())
		}
		s.run(time.Minute)
		for i := range w.reg.vips {
			v := &w.reg.vips[i]
			var at []string
			for _, n := range w.nodes {
				if u := n.units[v.Index]; u != nil && u.state == Serving {
					at = append(at, n.name)
				}
			}
			if len(at) != 1 || at[0] != v.Node || v.Next != v.Node {
				s.fail("in the end address %d is served by %v: %+v", v.Index, at, *v)
			}
		}
		// Holds may have grown to their maximum.
		s.run(5 * time.Minute)
		before := s.count["decisions"]
		s.run(5 * time.Minute)
		if n := s.count["decisions"] - before; n != 0 {
			s.fail("%d decisions though nothing happens", n)
		}
		for k, n := range s.count {
			total[k] += n
		}
		if *simSeed != 0 {
			t.Log(strings.Join(s.log, "\n"))
		}
	}
	if *simSeed != 0 {
		one(*simSeed)
		return
	}
	for seed := range uint64(runs) {
		one(seed + 1)
	}
	t.Log(total)
	if total["abandoned"] == 0 || total["voluntary"] == 0 {
		t.Error("nothing was tested")
	}
}

// TestCrashBudget: with the defaults a dead node's addresses are assigned anew so early
// that the whole take-over stays below 2.5 s: 1 s is left for it. Time is the world's.
func TestCrashBudget(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 2))
		cfg := DefaultConfig("a", []string{"a", "b", "c", "d", "e"}[:3+r.IntN(3)]...)
		w := newWorld(cfg)
		w.reg.add("192.0.2.10")
		w.takeLead(w.node("a"))
		var decided time.Duration
		w.decided = func(d *Decision, _ *mgs.VIP, err error) {
			if d.Abandon && err == nil {
				decided = w.now
			}
		}
		run := func(d time.Duration) {
			for end := w.now + d; w.now < end; {
				w.step()
			}
		}
		run(3*time.Second + time.Duration(r.IntN(20))*tick)
		// The address is at a, b or c, and the leader does not die here.
		if _, err := w.reg.assign(1, 1, "c"); err != nil {
			t.Fatal(err)
		}
		run(3*time.Second + time.Duration(r.IntN(20))*tick)
		if w.reg.vips[0].Node != "c" {
			t.Fatalf("%+v", w.reg.vips[0])
		}
		died := w.now
		w.kill(w.node("c"))
		run(5 * time.Second)
		if took := decided - died; decided == 0 || took > 1500*time.Millisecond {
			t.Errorf("seed %d: %d nodes: decided after %v", seed, len(cfg.Nodes), took)
		}
	}
}

// A node that cannot have an address although it listens for it, and nodes none of which
// can, are tried again and again, but more and more seldom.
func TestFailuresAreRare(t *testing.T) {
	for name, c := range map[string]struct {
		break_  func(w *world)
		prefer  []string
		decided int // in 10 minutes, at most
		epochs  uint64
	}{
		"the preferred one cannot take it":    {func(w *world) { w.node("c").fumbles = true }, []string{"c", "b"}, 12, 12},
		"the preferred one cannot listen":     {func(w *world) { w.node("c").fails = true }, []string{"c", "b"}, 12, 0},
		"none can take it":                    {func(w *world) { w.fumble() }, nil, 150, 800},
		"none of those preferred can take it": {func(w *world) { w.fumble() }, []string{"c", "b"}, 100, 800},
		"none can listen": {func(w *world) {
			for _, n := range w.nodes {
				n.fails = true
			}
		}, nil, 150, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(DefaultConfig("a", "a", "b", "c"))
			v := w.reg.add("192.0.2.10", c.prefer...)
			w.takeLead(w.node("a"))
			decided := 0
			w.decided = func(d *Decision, _ *mgs.VIP, _ error) {
				if d.To != "" {
					decided++
				}
			}
			run := func(d time.Duration) {
				for end := w.now + d; w.now < end; {
					w.step()
				}
			}
			if c.prefer != nil { // it is at b, as c was away
				w.kill(w.node("c"))
				run(5 * time.Second)
				w.start(w.node("c"))
			}
			c.break_(w)
			decided = 0
			epoch := v.Epoch
			run(10 * time.Minute)
			t.Logf("%d decisions, %d periods of service", decided, v.Epoch-epoch)
			if decided == 0 || decided > c.decided || v.Epoch-epoch > c.epochs {
				t.Errorf("%d decisions, %d periods of service in 10 minutes", decided, v.Epoch-epoch)
			}
			for _, n := range w.nodes {
				n.fails, n.fumbles = false, false
			}
			run(time.Minute)
			if v.Clean || v.Node == "" || w.node(v.Node).units[v.Index].state != Serving {
				t.Errorf("it is not served when all are well: %+v", v)
			}
		})
	}
}

// fumble has all nodes fail with what they are to take.
func (w *world) fumble() {
	for _, n := range w.nodes {
		n.fumbles = true
	}
}
