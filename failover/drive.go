package failover

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/vip"
)

// Clock gives the time and timers.
type Clock struct {
	Now func() time.Time // default time.Now
	// Timer gives a channel that gets a value in d, unless it is stopped before.
	Timer func(d time.Duration) (c <-chan time.Time, stop func()) // default time.NewTimer
}

func (c *Clock) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

func (c *Clock) timer(d time.Duration) (<-chan time.Time, func()) {
	if c.Timer != nil {
		return c.Timer(d)
	}
	t := time.NewTimer(d)
	return t.C, func() { t.Stop() }
}

// Runner carries out teardowns and take-overs of a node's addresses. Its methods are safe for concurrent use with
// different addresses; one address is released or taken by one call at a time.
//
// A stage that does not come back from its deadline is left behind: the next method of the Service or Candidate may
// be called while that one still runs, and after Finish nothing of it may remain or be opened any more.
type Runner struct {
	Net   vip.Net
	Log   *events.Log // nil: none
	Clock Clock

	mu       sync.Mutex
	closed   bool
	settling map[netip.Addr]*settler
	wg       sync.WaitGroup // runs of stages, settlers
}

// Close ends repeated announcements and waits for all calls that stages have made. Releases and take-overs must have
// returned.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closed = true
	for _, s := range r.settling {
		s.halt()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// Subject is the address that is moved, and what events say of the move.
type Subject struct {
	Address vip.Address
	VIP     uint32 // index in the registry
	Epoch   uint64 // the period of service that ends; of a take-over the last one
	Move    uint64 // number of the assignment in the registry
	From    string // node
	To      string // node; empty: nobody yet
	Reason  Reason
}

func (s *Subject) addr() netip.Addr { return s.Address.Prefix.Addr() }

// Attributes of events beside the numbers.
const (
	attrRole    = "role"    // "release" or "take"
	AttrOutcome = "outcome" // Outcome, of the end of a move
	attrCut     = "cut"     // why the stage was cut: "deadline", "lost" (and it has not come back), or "fence"
)

func (s *Subject) event(kind, role string) events.Event {
	return events.Event{
		Kind: kind, Addr: s.addr(), VIP: s.VIP, Epoch: s.Epoch, Move: s.Move, From: s.From, To: s.To,
		Reason: string(s.Reason), Attrs: map[string]string{attrRole: role},
	}
}

// machine is a teardown or takeover.
type machine interface{ step(input) []action }

type stageResult struct {
	stage Stage
	res   Result
}

// driver carries out what a machine says.
type driver struct {
	r     *Runner
	m     machine
	sub   *Subject
	role  string
	base  context.Context // of stages
	run   func(ctx context.Context, st step, attempt int) Result
	again func(late time.Duration) // announce

	start   time.Time
	results chan stageResult
	gone    chan struct{} // closed when nobody takes results any more
	cancel  map[Stage]context.CancelFunc
	wake    time.Duration // -1: none
	busy    Stage         // that runs; empty: none
	done    bool
	errs    []error
}

func (r *Runner) drive(ctx context.Context, m machine, sub *Subject, role string) *driver {
	return &driver{
		r: r, m: m, sub: sub, role: role, base: context.WithoutCancel(ctx), start: r.Clock.now(),
		results: make(chan stageResult), gone: make(chan struct{}), cancel: make(map[Stage]context.CancelFunc), wake: -1,
	}
}

func (d *driver) now() time.Duration { return d.r.Clock.now().Sub(d.start) }

func (d *driver) step(in input) {
	in.now = d.now()
	var late time.Duration
	if d.wake >= 0 {
		late = in.now - d.wake
	}
	d.wake = -1
	if in.kind == inResult && in.stage == d.busy {
		d.busy = ""
	}
	for _, a := range d.m.step(in) {
		switch a.kind {
		case actRun:
			d.busy = a.stage
			d.runStage(a.step, a.attempt)
		case actCut:
			if c := d.cancel[a.stage]; c != nil {
				c()
			}
		case actTrouble, actStage:
			if a.report.Stage == d.busy {
				d.busy = ""
			}
			d.report(a.kind, &a.report)
		case actFenced:
			e := d.sub.event(events.Fence, d.role)
			if d.role == roleTake {
				e.Reason = "broken off"
			}
			d.r.Log.Append(e)
		case actAnnounce:
			d.again(late)
		case actTimer:
			if d.wake < 0 || a.at < d.wake {
				d.wake = a.at
			}
		case actDone:
			d.done = true
		}
	}
}

func (d *driver) runStage(st step, attempt int) {
	ctx, cancel := context.WithCancel(d.base)
	d.cancel[st.stage] = cancel
	d.r.wg.Add(1)
	go func() {
		defer d.r.wg.Done()
		defer cancel()
		res := d.run(ctx, st, attempt)
		select {
		case d.results <- stageResult{st.stage, res}:
		case <-d.gone:
		}
	}()
}

// Of a tick that comes late: this process stood still, and so did the stage, which gets grace before it is cut. A node that
// stood still for longer than awayAfter may be taken for dead: it does not go on to take an address.
const (
	stillAfter = 50 * time.Millisecond
	awayAfter  = time.Second
)

// excused tells whether the stage that runs gets more time when a tick is late.
func (d *driver) excused(late time.Duration) bool {
	return d.busy != "" && late > stillAfter && (d.role == roleRelease || late <= awayAfter)
}

// until drives the machine until stop says so. The channels are nil when there is nothing to come.
func (d *driver) until(stop func() bool, fence, broken, proceed <-chan struct{}) {
	var spare time.Duration // until then a late tick waits for the stage; 0: none does
	for !stop() {
		var timer <-chan time.Time
		halt := func() {}
		if d.wake >= 0 {
			timer, halt = d.r.Clock.timer(max(0, max(d.wake, spare)-d.now()))
		}
		select {
		case sr := <-d.results:
			halt()
			d.step(input{kind: inResult, stage: sr.stage, result: sr.res})
		case <-timer:
			if now := d.now(); spare == 0 && d.excused(now-d.wake) {
				spare = now + grace
				continue
			}
			d.step(input{kind: inTick})
		case <-fence:
			halt()
			fence = nil
			d.step(input{kind: inFence})
		case <-broken:
			halt()
			broken = nil
			d.step(input{kind: inBreak})
		case <-proceed:
			halt()
			proceed = nil
			d.step(input{kind: inProceed})
		}
		spare = 0
	}
}

// report logs that a stage has ended, or fails for the first time.
func (d *driver) report(kind actionKind, s *StageReport) {
	e := d.sub.event(events.Stage, d.role)
	e.Stage, e.Took = string(s.Stage), s.Took
	for _, n := range []struct {
		name string
		n    int
	}{
		{events.Conns, s.Result.Drained.Conns}, {events.Replies, s.Result.Drained.Replies}, {events.Left, s.Result.Drained.Left},
		{events.Orderly, s.Result.Closed.Orderly}, {events.Forced, s.Result.Closed.Forced},
		{events.Destroyed, s.Result.Destroyed}, {events.Remaining, s.Result.Remaining},
		{events.Tickled, s.Result.Tickled}, {events.Clients, s.Result.Clients},
	} {
		if n.n > 0 {
			e.SetInt(n.name, int64(n.n))
		}
	}
	if err := s.failure(); err != nil {
		e.Err = err.Error()
		if kind == actTrouble {
			e.Err += " (is tried again)"
		} else {
			d.errs = append(d.errs, fmt.Errorf("%s: %w", s.Stage, err))
		}
	}
	switch {
	case s.BrokenOff:
		e.Attrs[attrCut] = "fence"
	case s.Lost:
		e.Attrs[attrCut] = "lost"
	case s.Cut:
		e.Attrs[attrCut] = "deadline"
	}
	d.r.Log.Append(e)
}

// end logs the end of a move.
func (d *driver) end(o Outcome, counts map[string]int) {
	close(d.gone)
	for _, c := range d.cancel {
		c()
	}
	e := d.sub.event(events.Move, d.role)
	e.Stage, e.Took = events.End, d.now()
	e.Attrs[AttrOutcome] = string(o)
	for name, n := range counts {
		if n > 0 {
			e.Attrs[name] = strconv.Itoa(n)
		}
	}
	if err := errors.Join(d.errs...); err != nil {
		e.Err = err.Error()
	}
	d.r.Log.Append(e)
}

func (d *driver) begin() {
	e := d.sub.event(events.Move, d.role)
	e.Stage = events.Begin
	d.r.Log.Append(e)
	d.step(input{kind: inTick})
}

// clear destroys the address's sockets but listeners and those of UDP, and looks that none remains.
func (r *Runner) clear(ctx context.Context, addr netip.Addr) Result {
	n, err := r.Net.Destroy(ctx, addr)
	left, serr := r.Net.Sockets(addr)
	res := Result{Destroyed: n, Err: serr}
	for i := range left {
		if left[i].Network == "tcp" && left[i].State != "LISTEN" {
			res.Remaining++
		}
	}
	if res.Remaining > 0 {
		// That nothing could be destroyed is no trouble when there is nothing.
		res.Err = errors.Join(err, serr)
		if res.Err == nil {
			res.Err = fmt.Errorf("%d sockets of %s remain, the first from %s in state %s", res.Remaining, addr, firstOf(left).Remote, firstOf(left).State)
		}
	}
	return res
}

func firstOf(l []vip.Socket) vip.Socket {
	for i := range l {
		if l[i].Network == "tcp" && l[i].State != "LISTEN" {
			return l[i]
		}
	}
	return vip.Socket{}
}

// remove takes the address away and looks that it is away.
func (r *Runner) remove(ctx context.Context, a vip.Address) Result {
	if err := r.Net.Remove(ctx, a); err != nil {
		return Result{Err: err}
	}
	has, err := r.Net.Has(a.Prefix.Addr())
	if err == nil && has {
		err = fmt.Errorf("the machine still has %s: another program has added it, too; remove it there", a.Prefix.Addr())
	}
	return Result{Err: err}
}
