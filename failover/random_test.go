package failover

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// pair is an address that moves: one machine gives it up, the other takes it, in one time.
type pair struct {
	t     *testing.T
	trace []string
	a     *world // teardown
	b     *world // take-over
	m     *teardown
	n     *takeover

	cfgA teardownConfig
	cfgB takeConfig

	hasA, hasB bool // the address
	fenced     bool // A learned that it is fenced; with fencedFirst B has the address already
	// Of A.
	drained, committed, told bool
	// Of B.
	listening, began, cleared, serving bool
	ran                                map[string]int // runs that were begun
	overA, overB                       time.Duration
}

func (p *pair) fail(format string, args ...any) {
	p.t.Helper()
	for _, l := range p.trace {
		p.t.Log(l)
	}
	p.t.Fatalf(format, args...)
}

// check is called when something has changed.
func (p *pair) check() {
	p.t.Helper()
	if p.hasA && p.hasB && !p.fenced && !p.cfgA.fenced {
		p.fail("both have the address")
	}
	if p.hasB && !p.began {
		p.fail("the address is at one that has begun no period of service")
	}
}

// first counts first runs: no stage twice.
func (p *pair) first(who string, a action) {
	if a.attempt == 1 {
		key := who + string(a.stage)
		if p.ran[key]++; p.ran[key] > 1 {
			p.fail("%s ran twice", key)
		}
	}
}

func (p *pair) onA(a action) {
	p.trace = append(p.trace, fmt.Sprintf("%6d a: %s", p.a.now.Milliseconds(), describe(a)))
	if a.kind == actDone {
		p.overA = p.a.now
		return
	}
	if a.kind != actRun {
		return
	}
	p.first("a ", a)
	order := func(before ...Stage) {
		for _, st := range before {
			if p.ran["a "+string(st)] == 0 {
				p.fail("a: %s before %s", a.stage, st)
			}
		}
	}
	switch a.stage {
	case StageDrain:
		order(StageRefuse)
		if p.m.fenced {
			p.fail("a fenced owner drains")
		}
	case StageCommit:
		order(StageDrain)
	case StageClose:
		order(StageRefuse)
		if !p.m.fenced {
			order(StageDrain, StageCommit)
		}
		if a.step.closing == Quiet && p.hasA && !p.m.fenced && !p.cfgA.given && p.m.removed {
			p.fail("closed quietly while the address is here")
		}
	case StageRemove:
		if p.cfgA.closing == HalfClose && !p.m.fenced {
			order(StageClose, StageClear)
		}
		if p.cfgA.given {
			p.fail("removed an address of somebody else")
		}
	case StageTold:
		order(StageClose, StageClear)
		switch {
		case p.m.fenced:
			p.fail("a fenced owner tells the registry")
		case p.hasA && !p.cfgA.given:
			p.fail("the registry is told while the address is here")
		case a.step.clean && !(p.drained && p.committed):
			p.fail("told clean after drain %v, commit %v", p.drained, p.committed)
		}
	case StageFinish:
		order(StageClose, StageClear)
	}
}

// endedA is what a run has done.
func (p *pair) endedA(st Stage, r Result) {
	ok := r.Err == nil && r.Remaining == 0
	// What comes when it is not waited for any more does not count as clean.
	waited := p.m.run != nil && p.m.run.stage == st
	switch st {
	case StageDrain:
		p.drained = r.Err == nil && waited
	case StageCommit:
		p.committed = ok && waited
	case StageRemove:
		if ok {
			p.hasA = false
		}
	case StageTold:
		if ok {
			p.told = true
			if p.b.runs[StageWait] != nil {
				p.b.runs[StageWait].at = p.a.now + 2*time.Millisecond
			}
		}
	}
	p.check()
}

func (p *pair) onB(a action) {
	p.trace = append(p.trace, fmt.Sprintf("%6d b: %s", p.b.now.Milliseconds(), describe(a)))
	if a.kind == actDone {
		p.overB = p.b.now
	}
	if a.kind == actAnnounce && !p.hasB && !p.cfgB.given {
		p.fail("announced without the address")
	}
	if a.kind != actRun {
		return
	}
	who := "b "
	if p.n.undo {
		who = "undo "
	}
	p.first(who, a)
	if p.n.undo {
		return
	}
	switch a.stage {
	case StageWait:
		if !p.listening {
			p.fail("ready without listeners")
		}
	case StageServe:
		if !p.began {
			p.fail("served before the period began")
		}
	case StageAdd:
		if !p.serving || !p.cleared || !p.listening {
			p.fail("added with listening %v, serving %v, cleared %v", p.listening, p.serving, p.cleared)
		}
	case StageAnnounce:
		if !p.hasB && !p.cfgB.given {
			p.fail("announced before it was added")
		}
	case StageTickle, StageNotify:
		if p.ran["b announce"] == 0 {
			p.fail("%s before the announcement", a.stage)
		}
	}
}

func (p *pair) endedB(st Stage, r Result) {
	ok := r.Err == nil && r.Remaining == 0
	late := p.n.run == nil || p.n.run.stage != st
	switch st {
	case StageListen:
		p.listening = ok
	case StageBegin:
		p.began = p.began || ok
	case StageClear:
		p.cleared = ok
	case StageServe:
		p.serving = ok
	case StageAdd:
		// The Runner removes what comes late.
		if ok && !late {
			p.hasB = true
		}
	case StageRemove:
		if ok {
			p.hasB = false
		}
	}
	p.check()
}

func randomPlay(r *rand.Rand, bad float64) []play {
	var l []play
	for range 1 + r.IntN(3) {
		p := play{after: time.Duration(r.IntN(40)) * time.Millisecond}
		if r.Float64() < bad {
			switch r.IntN(5) {
			case 0:
				p.after = whenCut
			case 1:
				p.after = never
			case 2:
				p.after = time.Duration(r.IntN(4000)) * time.Millisecond
			case 3:
				p.res.Err = errors.New("broken")
			case 4:
				p.res.Remaining = 1 + r.IntN(3)
			}
			if r.IntN(4) == 0 {
				p.res.Err = errors.New("broken")
			}
		}
		l = append(l, p)
	}
	return l
}

// TestRandom moves an address between two machines whose stages fail, hang and come late, with fences at any moment.
// Invariants: the address is never at two, what is told is true, the order of stages holds, no stage runs twice, and
// everything ends within the sum of the deadlines. 004.17, 004.19, 004.20, 004.21, 004.22, 004.24
func TestRandom(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 3_000
	}
	seen := map[Outcome]int{}
	for seed := range n {
		t.Run("", func(t *testing.T) { randomMove(t, uint64(seed), seen) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Log(seen)
	for _, o := range []Outcome{Clean, Unclean, Superseded, Stuck, Serving, NotTaken, BrokenOff} {
		if seen[o] == 0 {
			t.Errorf("no move has ended %s", o)
		}
	}
}

func randomMove(t *testing.T, seed uint64, seen map[Outcome]int) {
	r := rand.New(rand.NewPCG(seed, 4))
	p := &pair{t: t, hasA: true, ran: map[string]int{}, overA: -1, overB: -1}
	p.cfgA = teardownConfig{
		fenced: r.IntN(8) == 0, refuse: []Refuse{Hold, Reset}[r.IntN(2)], closing: []Closing{HalfClose, Quiet}[r.IntN(2)],
		tell: r.IntN(10) > 0, abandon: r.IntN(2) == 0, given: r.IntN(8) == 0,
	}
	p.cfgB = takeConfig{given: p.cfgA.given, ready: r.IntN(4) > 0, wait: true}
	if p.cfgA.given {
		p.hasA = false // it is somebody else's business
	}
	p.m, p.n = newTeardown(p.cfgA), newTakeover(p.cfgB)
	p.a, p.b = newWorld(p.m), newWorld(p.n)
	bad := []float64{0, 0.05, 0.3}[r.IntN(3)]
	for _, st := range planHalfClose {
		p.a.plays[st] = randomPlay(r, bad)
	}
	for _, st := range []Stage{StageListen, StageReady, StageBegin, StageClear, StageServe, StageAdd, StageAnnounce, StageTickle, StageNotify, StageRemove, StageFinish} {
		p.b.plays[st] = randomPlay(r, bad)
	}
	p.b.plays[StageWait] = []play{{after: whenCut, res: Result{Err: errors.New("the last owner has not given it up")}}}
	if p.cfgA.fenced {
		// It was taken without asking.
		p.b.plays[StageWait] = []play{{after: time.Duration(r.IntN(10)) * time.Millisecond}}
	}
	p.a.on, p.a.ended, p.b.on, p.b.ended = p.onA, p.endedA, p.onB, p.endedB
	startA := time.Duration(r.IntN(50)) * time.Millisecond
	if r.IntN(4) == 0 {
		at := startA + time.Duration(r.IntN(1+[]int{50, 5000}[r.IntN(2)]))*time.Millisecond
		p.a.due = append(p.a.due, due{at, input{kind: inFence}})
	}
	if r.IntN(6) == 0 {
		p.b.due = append(p.b.due, due{time.Duration(r.IntN(200)) * time.Millisecond, input{kind: []inputKind{inFence, inBreak}[r.IntN(2)]}})
	}
	p.b.step(input{kind: inTick})
	p.a.now = startA
	p.a.step(input{kind: inTick})
	for {
		p.fenced = p.fenced || p.m.fenced
		// The one whose turn is first; both clocks are the same.
		x, y := p.a.peek(), p.b.peek()
		var w *world
		switch {
		case x < 0 && y < 0:
		case y < 0 || x >= 0 && x <= y:
			w = p.a
		default:
			w = p.b
		}
		if w == nil {
			break
		}
		if !w.next(max(x, y)) {
			p.fail("nothing comes next")
		}
		p.a.now, p.b.now = max(p.a.now, w.now), max(p.b.now, w.now)
	}
	d, dn := p.m.cfg.deadlines, p.n.cfg.deadlines
	sumA := d.Refuse + d.Drain + d.Commit + d.Close + d.Clear + d.Remove + TellTimeout + d.Finish + 8*grace
	sumB := dn.Listen + dn.Ready + dn.Wait + dn.Begin + dn.Clear + dn.Serve + dn.Add + dn.Announce + dn.Tickle + dn.Notify + 10*grace
	sumB += 3 * (dn.Undo + grace)
	if p.overA < 0 || p.overA-startA > sumA {
		p.fail("the teardown ended after %v, bound %v", p.overA, sumA)
	}
	if p.overB < 0 || p.overB > sumB {
		p.fail("the take-over ended after %v, bound %v", p.overB, sumB)
	}
	oa, ob := p.m.outcome(), p.n.outcome()
	seen[oa]++
	seen[ob]++
	if p.ran["a finish"] != 1 {
		p.fail("the old owner has not finished")
	}
	switch {
	case oa == Clean && !(p.drained && p.committed && !p.hasA):
		p.fail("clean after drain %v, commit %v, address %v", p.drained, p.committed, p.hasA)
	case oa == Stuck != (p.hasA && p.ran["a remove"] > 0) && !slices.ContainsFunc(p.m.reports, func(s StageReport) bool { return s.Stage == StageRemove && (s.Lost || s.Cut) }):
		p.fail("outcome %s, the address is here: %v", oa, p.hasA)
	case oa == Stuck && (p.told || p.ran["a told"] > 0):
		p.fail("told although the address is here")
	case (oa == Clean || oa == Unclean || oa == Superseded) && p.hasA && !p.cfgA.given:
		p.fail("%s with the address", oa)
	}
	switch ob {
	case Serving:
		if !p.serving || !p.began || !p.hasB && !p.cfgB.given {
			p.fail("serving: serving %v, began %v, address %v", p.serving, p.began, p.hasB)
		}
		if !p.cfgA.fenced && !p.told {
			p.fail("served although nothing was told")
		}
	case NotTaken, BrokenOff:
		if p.hasB {
			p.fail("%s with the address", ob)
		}
		if p.ran["b listen"] > 0 && p.ran["undo finish"] != 1 {
			p.fail("%s, not undone", ob)
		}
	}
}
