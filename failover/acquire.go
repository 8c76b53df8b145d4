package failover

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/vip"
)

// AcquireOptions say how an address is taken over. Subject and Candidate are required.
type AcquireOptions struct {
	Subject
	Candidate Candidate
	// Given: somebody else adds the address once the listeners are open, and takes it away.
	Given bool
	// Ready, if not nil, tells that the listeners are open.
	Ready func(ctx context.Context) error
	// Released, if not nil, returns when the last owner has given the address up, or is known to be gone.
	Released func(ctx context.Context) error
	// Fenced is closed, or gets a value, when another node serves the address: the take-over is broken off, or, when the
	// address is announced already, ends as Serving without what remains to be done: it is to be given up at once.
	Fenced <-chan struct{}
	// Again is when the address is announced again, after the first time; default 50 ms, 200 ms and 1 s, empty: never.
	Again []time.Duration
	// Confirm, if not nil, asks whether the address is still this machine's. It is asked before a repeated announcement
	// that is late: the process may have been stopped, and the address been taken from it meanwhile.
	Confirm func(ctx context.Context) bool
	// OnStage is called when a stage has ended. It must not block.
	OnStage   func(StageReport)
	Deadlines TakeDeadlines
}

// AcquireReport is what taking an address over came to.
type AcquireReport struct {
	Outcome Outcome
	Stage   Stage // that failed, of NotTaken
	// Err is why it was not taken. Of Serving: what has failed of announcing, tickling and notifying.
	Err error
	// Began: a period of service may have begun, which the registry then has to be told the end of when the outcome
	// is not Serving: Abandoned if Exposed is set, else Stopped.
	Began bool
	// Exposed: calls may have been answered.
	Exposed   bool
	Destroyed int // stale sockets
	Tickled   int // connections
	Clients   int // that are notified
	Stages    []StageReport
	Took      time.Duration
}

// Taking is a take-over whose listeners are open. Exactly one of Take and BreakOff is to be called.
type Taking struct {
	r       *Runner
	o       AcquireOptions
	m       *takeover
	d       *driver
	proceed chan struct{}   // closed: StageWait goes on
	n       int             // reports given to OnStage
	halted  <-chan struct{} // of the settler, nil before

	mu    sync.Mutex
	adds  int  // calls of Add that may have added the address
	ended bool // there are no more
}

// add adds the address.
func (t *Taking) add(ctx context.Context) error {
	t.mu.Lock()
	ended := t.ended
	if !ended {
		t.adds++
	}
	t.mu.Unlock()
	if ended { // a call that is late
		return context.Canceled
	}
	err := t.r.Net.Add(ctx, t.o.Address)
	if errors.Is(err, vip.ErrUnable) {
		t.mu.Lock()
		t.adds--
		t.mu.Unlock()
	}
	return err
}

// added tells whether the address may have been here. Nothing adds it afterwards.
func (t *Taking) added() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	return t.adds > 0
}

// Of repeated announcements: one that is later than lateAfter is confirmed first, which confirmTime bounds. A machine that
// stands still is not taken for dead before a second, and the last announcement is due after one: so whoever is not
// late has the address.
const (
	lateAfter   = 100 * time.Millisecond
	confirmTime = 500 * time.Millisecond
)

// Acquire is Listen and Take at once, with the wait for the last owner bounded by its deadline. The end of ctx
// breaks the take-over off, until the address is announced.
func (r *Runner) Acquire(ctx context.Context, o AcquireOptions) AcquireReport {
	t := r.taking(ctx, o, true)
	close(t.proceed)
	return t.finish(ctx)
}

// Listen does the stages before the wait for the last owner. If that fails, or ctx ends, everything is undone and
// the report says why; there is no Taking then.
func (r *Runner) Listen(ctx context.Context, o AcquireOptions) (*Taking, AcquireReport) {
	t := r.taking(ctx, o, false)
	t.drive(ctx, func() bool { return t.d.done || t.m.started[StageWait] })
	if t.d.done {
		return nil, t.report()
	}
	return t, AcquireReport{Stages: t.m.reports, Took: t.d.now()}
}

// Take goes on from Listen: it waits for Released, if there is one, as long as that takes, and takes the address. The
// end of ctx breaks it off, until the address is announced.
func (t *Taking) Take(ctx context.Context) AcquireReport {
	t.d.base = context.WithoutCancel(ctx)
	close(t.proceed)
	return t.finish(ctx)
}

// BreakOff undoes what Listen has done.
func (t *Taking) BreakOff() AcquireReport {
	t.d.step(input{kind: inBreak})
	return t.finish(context.Background())
}

func (r *Runner) taking(ctx context.Context, o AcquireOptions, wait bool) *Taking {
	r.stopSettling(o.addr())
	t := &Taking{r: r, o: o, proceed: make(chan struct{})}
	t.m = newTakeover(takeConfig{given: o.Given, ready: o.Ready != nil, wait: wait, again: o.Again, deadlines: o.Deadlines})
	t.d = r.drive(ctx, t.m, &t.o.Subject, roleTake)
	t.d.run, t.d.again = t.stage, t.announceAgain
	t.d.begin()
	return t
}

func (t *Taking) drive(ctx context.Context, stop func() bool) {
	t.d.until(func() bool {
		for ; t.n < len(t.m.reports) && t.o.OnStage != nil; t.n++ {
			t.o.OnStage(t.m.reports[t.n])
		}
		return stop()
	}, t.o.Fenced, ctx.Done(), nil)
}

func (t *Taking) finish(ctx context.Context) AcquireReport {
	t.drive(ctx, func() bool { return t.d.done })
	rep := t.report()
	if rep.Outcome == Serving {
		t.r.settle(t)
	}
	return rep
}

func (t *Taking) report() AcquireReport {
	m := t.m
	rep := AcquireReport{
		Outcome: m.outcome(), Stage: m.failed, Stages: m.reports, Took: t.d.now(), Err: errors.Join(t.d.errs...),
		Began: m.started[StageBegin], Exposed: t.added() || t.o.Given && m.started[StageServe],
	}
	if m.broken && rep.Err == nil {
		rep.Err = errors.New("the take-over was broken off")
	}
	for i := range m.reports {
		res := &m.reports[i].Result
		rep.Destroyed += res.Destroyed
		rep.Tickled += res.Tickled
		rep.Clients += res.Clients
	}
	t.d.end(rep.Outcome, map[string]int{
		events.Destroyed: rep.Destroyed, events.Tickled: rep.Tickled, events.Clients: rep.Clients,
	})
	return rep
}

func (t *Taking) stage(ctx context.Context, st step, attempt int) Result {
	o := &t.o
	switch st.stage {
	case StageListen:
		return Result{Err: o.Candidate.Listen(ctx)}
	case StageReady:
		return Result{Err: o.Ready(ctx)}
	case StageWait:
		select {
		case <-t.proceed:
		case <-ctx.Done():
			return Result{Err: ctx.Err()}
		}
		if o.Released == nil {
			return Result{}
		}
		return Result{Err: o.Released(ctx)}
	case StageBegin:
		return Result{Err: o.Candidate.Begin(ctx)}
	case StageClear:
		return t.r.clear(ctx, o.addr())
	case StageServe:
		return Result{Err: o.Candidate.Serve(ctx)}
	case StageAdd:
		err := t.add(ctx)
		if cerr := ctx.Err(); cerr != nil {
			// Nobody waits for it any more, and the address may have been removed before it came.
			rctx := context.WithoutCancel(ctx)
			return Result{Err: errors.Join(err, cerr, t.r.Net.Remove(rctx, o.Address))}
		}
		return Result{Err: err}
	case StageAnnounce:
		return Result{Err: t.r.Net.Announce(o.Address)}
	case StageTickle:
		conns := t.conns()
		if len(conns) == 0 {
			return Result{}
		}
		if err := t.r.Net.Tickle(o.Address, conns); err != nil {
			return Result{Err: err}
		}
		return Result{Tickled: len(conns)}
	case StageNotify:
		n, err := o.Candidate.Notify(ctx)
		return Result{Clients: n.Clients, Err: err}
	case StageRemove:
		return t.r.remove(ctx, o.Address)
	case StageFinish:
		return Result{Err: o.Candidate.Finish(ctx), final: true}
	}
	return Result{Err: errors.New("no such stage")}
}

// conns are the connections of the last owner that are known by now.
func (t *Taking) conns() []vip.Conn {
	return slices.DeleteFunc(slices.Clone(t.o.Candidate.Conns()), func(c vip.Conn) bool { return c.Local.Addr() != t.o.addr() })
}

// announceAgain makes up for packets that were lost: it announces the address, and wakes
// those clients that have not come back by the connection that they had. One that has
// come by another one just finds out that the old one is over.
func (t *Taking) announceAgain(late time.Duration) {
	if late > lateAfter && !t.confirmed() {
		return
	}
	t.trouble(StageAnnounce, t.r.Net.Announce(t.o.Address))
	conns := t.conns()
	if len(conns) == 0 {
		return
	}
	ss, err := t.r.Net.Sockets(t.o.addr())
	if err != nil {
		t.trouble(StageTickle, err)
		return
	}
	back := make(map[vip.Conn]bool, len(ss))
	for _, s := range ss {
		back[s.Conn] = true
	}
	if conns = slices.DeleteFunc(conns, func(c vip.Conn) bool { return back[c] }); len(conns) > 0 {
		t.trouble(StageTickle, t.r.Net.Tickle(t.o.Address, conns))
	}
}

// confirmed asks whether the address is still here.
func (t *Taking) confirmed() bool {
	if t.o.Confirm == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), confirmTime)
	defer cancel()
	if t.halted == nil {
		return t.o.Confirm(ctx)
	}
	ok := make(chan bool, 1)
	t.r.wg.Add(1)
	go func() {
		defer t.r.wg.Done()
		ok <- t.o.Confirm(ctx)
	}()
	select {
	case yes := <-ok:
		return yes
	case <-t.halted:
		return false
	}
}

// trouble logs that a stage could not be repeated.
func (t *Taking) trouble(st Stage, err error) {
	if err == nil {
		return
	}
	e := t.o.event(events.Stage, roleTake)
	e.Stage, e.Err = string(st), err.Error()
	t.r.Log.Append(e)
}

// settler announces an address again after it was taken.
type settler struct {
	stop chan struct{}
	once sync.Once
	done chan struct{}
}

func (s *settler) halt() { s.once.Do(func() { close(s.stop) }) }

func (r *Runner) settle(t *Taking) {
	if t.m.settled() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	s := &settler{stop: make(chan struct{}), done: make(chan struct{})}
	if r.settling == nil {
		r.settling = make(map[netip.Addr]*settler)
	}
	r.settling[t.o.addr()] = s
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		defer close(s.done)
		t.settle(s.stop)
		r.mu.Lock()
		if r.settling[t.o.addr()] == s {
			delete(r.settling, t.o.addr())
		}
		r.mu.Unlock()
	}()
}

func (t *Taking) settle(stop <-chan struct{}) {
	t.halted = stop
	for !t.m.settled() {
		timer, halt := t.r.Clock.timer(max(0, t.d.wake-t.d.now()))
		select {
		case <-timer:
			t.d.step(input{kind: inTick})
		case <-stop:
			halt()
			return
		}
	}
}

// stopSettling returns when the address is not announced any more.
func (r *Runner) stopSettling(addr netip.Addr) {
	r.mu.Lock()
	s := r.settling[addr]
	r.mu.Unlock()
	if s != nil {
		s.halt()
		<-s.done
	}
}
