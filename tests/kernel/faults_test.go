package kernel

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// A faultPlan makes the schedule of a soak: which nodes are killed, for how long they
// are away, and where their targets go meanwhile. It follows from the seed alone,
// also where each target is.
type faultPlan struct {
	r *rand.Rand
	// victims are killed, all others live on. Targets go to any node.
	victims, nodes, frontends []string
	targets                   []string
	at                        map[string]string // node of a target
	n                         int
}

// faultKind is what is done to a node or target.
type faultKind string

const (
	faultKill  faultKind = "kill"
	faultStart faultKind = "start"
	// faultTakeOver starts the target of a dead node on a living one, faultMove
	// stops it in order where it is first.
	faultTakeOver faultKind = "take over"
	faultMove     faultKind = "move"
	// faultEvict makes the target forget a living frontend.
	faultEvict faultKind = "evict"
)

// fault is one act of a schedule, after a pause.
type fault struct {
	after  time.Duration
	kind   faultKind
	node   string
	target string // to take over, to move from node `from` to node, or to evict node
	from   string
}

func (f fault) String() string {
	s := fmt.Sprintf("+%v %s", f.after, f.kind)
	if f.target != "" {
		s += " " + f.target
	}
	if f.from != "" {
		s += " from " + f.from + " to"
	}
	return s + " " + f.node
}

// newFaultPlan makes the schedule for nodes, of which the victims may be killed and the
// frontends evicted, and for targets that are at the nodes that at says.
func newFaultPlan(seed uint64, victims, nodes, frontends []string, at map[string]string) *faultPlan {
	p := &faultPlan{r: rand.New(rand.NewPCG(seed, 7)), victims: victims, nodes: nodes, frontends: frontends, at: map[string]string{}}
	for t, n := range at {
		p.targets = append(p.targets, t)
		p.at[t] = n
	}
	slices.Sort(p.targets)
	return p
}

func (p *faultPlan) pause(most time.Duration) time.Duration {
	return time.Duration(p.r.Int64N(int64(most))).Round(time.Millisecond)
}

// of returns the targets that are at a node.
func (p *faultPlan) of(node string) (ts []string) {
	for _, t := range p.targets {
		if p.at[t] == node {
			ts = append(ts, t)
		}
	}
	return ts
}

// next returns what happens next. After it all nodes run, and each target somewhere.
func (p *faultPlan) next() (fs []fault) {
	p.n++
	wait := time.Second + p.pause(9*time.Second)
	add := func(f fault) {
		if len(fs) == 0 {
			f.after = wait
		}
		fs = append(fs, f)
	}
	some := slices.Clone(p.victims)
	p.r.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
	switch k := p.r.IntN(23); {
	case k < 3: // a target moves in order
		t := p.targets[p.r.IntN(len(p.targets))]
		to := p.nodes[p.r.IntN(len(p.nodes))]
		if to == p.at[t] {
			to = p.nodes[(slices.Index(p.nodes, to)+1)%len(p.nodes)]
		}
		add(fault{kind: faultMove, node: to, target: t, from: p.at[t]})
		p.at[t] = to
		return fs
	case k < 6: // twice the same
		v := some[0]
		add(fault{kind: faultKill, node: v})
		add(fault{kind: faultStart, node: v, after: p.pause(time.Second)})
		add(fault{kind: faultKill, node: v, after: p.pause(3 * time.Second)})
		add(fault{kind: faultStart, node: v, after: p.pause(2 * time.Second)})
		return fs
	case k < 9:
		// The MGS has no such clients.
		ts := slices.DeleteFunc(slices.Clone(p.targets), func(t string) bool { return t == "MGS" })
		add(fault{kind: faultEvict, node: p.frontends[p.r.IntN(len(p.frontends))], target: ts[p.r.IntN(len(ts))]})
		return fs
	case k < 15:
		some = some[:1]
	case k < 21:
		some = some[:2]
	}
	for _, v := range some {
		add(fault{kind: faultKill, node: v, after: p.pause(1500 * time.Millisecond)})
	}
	p.r.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
	for i, v := range some {
		for _, t := range p.of(v) {
			if p.r.IntN(4) > 0 {
				continue
			}
			living := slices.DeleteFunc(slices.Clone(p.nodes), func(n string) bool { return slices.Contains(some[i:], n) })
			p.at[t] = living[p.r.IntN(len(living))]
			add(fault{kind: faultTakeOver, node: p.at[t], target: t, after: p.pause(time.Second)})
		}
		add(fault{kind: faultStart, node: v, after: p.pause(7 * time.Second)})
	}
	return fs
}

// TestFaultPlan: a seed gives the same schedule again, every schedule is possible,
// and there is everything in it.
func TestFaultPlan(t *testing.T) {
	plan := func(seed uint64) *faultPlan {
		return newFaultPlan(seed, []string{"south", "meta", "data"}, []string{"north", "south", "meta", "data"}, []string{"north", "south"},
			map[string]string{"MGS": "meta", "MDT0000": "meta", "OST0000": "data", "OST0001": "data"})
	}
	a, b, c := plan(1), plan(1), plan(2)
	seen := map[faultKind]int{}
	homes := map[string]bool{}
	differ := false
	for range 300 {
		was := map[string]string{}
		for k, v := range a.at {
			was[k] = v
		}
		dead := map[string]bool{}
		fs := a.next()
		if got, want := fmt.Sprint(b.next()), fmt.Sprint(fs); got != want {
			t.Fatalf("the same seed gives %s and %s", want, got)
		}
		differ = differ || fmt.Sprint(c.next()) != fmt.Sprint(fs)
		var all strings.Builder
		for _, f := range fs {
			fmt.Fprintln(&all, f)
			seen[f.kind]++
			ok := true
			switch f.kind {
			case faultKill:
				ok = !dead[f.node] && f.node != "north"
				dead[f.node] = true
			case faultStart:
				ok = dead[f.node]
				delete(dead, f.node)
			case faultEvict:
				ok = !dead[f.node] && len(dead) == 0
			case faultTakeOver:
				ok = !dead[f.node] && dead[was[f.target]]
				was[f.target] = f.node
			case faultMove:
				ok = !dead[f.node] && was[f.target] == f.from && f.from != f.node
				was[f.target] = f.node
			}
			if !ok {
				t.Fatalf("impossible: %s\n%s", f, &all)
			}
		}
		if len(dead) > 0 {
			t.Fatalf("%v stay dead:\n%s", dead, &all)
		}
		for k, v := range was {
			if a.at[k] != v {
				t.Fatalf("%s is at %s, not at %s:\n%s", k, v, a.at[k], &all)
			}
			homes[k+" "+v] = true
		}
	}
	if !differ {
		t.Error("another seed gives the same schedule")
	}
	for _, k := range []faultKind{faultKill, faultStart, faultTakeOver, faultMove, faultEvict} {
		if seen[k] < 20 {
			t.Errorf("%s: %d times only", k, seen[k])
		}
	}
	if len(homes) != 16 {
		t.Errorf("targets were at %v only", homes)
	}
}
