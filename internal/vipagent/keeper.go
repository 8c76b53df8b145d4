package vipagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
)

// keeper brings one address to what the registry says. Its goroutine does one step at a
// time; a step that makes no sense any more is broken off.
type keeper struct {
	a     *Agent
	log   *slog.Logger
	index uint32
	addr  netip.Addr
	poked chan struct{} // room for one

	// turn is held by a hook's command while it changes what is wanted.
	turn chan struct{}

	mu sync.Mutex
	s  situation
	// heard is the newest of follow's questions when the address was told of first, or
	// again after its removal.
	heard  uint64
	since  time.Time
	reason string
	// asked: a hook has said who adds the address.
	asked bool
	// keepPorts: listeners go on holding the ports when the address was given up.
	keepPorts bool
	// stop breaks the step in progress off, if useless says so of the situation.
	stop    context.CancelFunc
	useless func(*situation) bool
	// fencing is closed when what is being released has a newer owner.
	fencing chan struct{}
	// Listening.
	taking    *failover.Taking
	candidate *candidate
	at        vip.Address // where it is, or is to be
	// Serving, Releasing.
	unit   Unit
	teller *teller
	letgo  chan struct{} // closed: listeners need not hold the ports any more

	owe    *debt
	retry  time.Time
	pause  time.Duration
	failed uint64 // counts failures
	missed uint64 // the last assignment that could not be followed
}

// debt is the end of a period of service that the registry does not know of yet.
type debt struct {
	epoch uint64
	clean bool
	// stuck: the machine still has the address, which is to be removed first. Under the
	// keeper's mu.
	stuck bool
	// Of stuck: unit keeps the ports, nil if nobody does; silent: and drops what comes.
	unit   Unit
	silent bool
}

// newKeeper makes the keeper of an address; the agent's lock is held.
func newKeeper(a *Agent, v *mgs.VIP) *keeper {
	k := &keeper{a: a, log: a.log.With("address", v.Addr), index: v.Index, addr: v.Addr.Unmap(), poked: make(chan struct{}, 1), turn: make(chan struct{}, 1), since: time.Now()}
	k.heard = a.views.Load()
	k.s = situation{me: a.o.Node, vip: *v, state: Absent, leaving: a.leaving, last: a.last}
	k.wake()
	return k
}

func (k *keeper) wake() {
	select {
	case k.poked <- struct{}{}:
	default:
	}
}

// update takes what the registry says.
func (k *keeper) update(v *mgs.VIP) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !newer(&k.s.vip, v) {
		return
	}
	if v.MoveID != k.s.vip.MoveID || k.s.gone {
		k.retry, k.pause = time.Time{}, 0
	}
	if k.s.gone {
		k.heard = k.a.views.Load()
	}
	k.s.vip, k.s.gone = *v, false
	k.look()
}

// removed takes note that the registry, asked by follow, does not know the address.
func (k *keeper) removed(asked uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.heard < asked {
		k.s.gone = true
		k.look()
	}
}

// look has the keeper decide anew. k.mu is held.
func (k *keeper) look() {
	if k.stop != nil && k.useless(&k.s) {
		k.stop()
	}
	if k.s.held && k.s.mine() {
		k.letGo()
	}
	if k.fencing != nil && k.s.state == Releasing && k.s.lost() {
		close(k.fencing)
		k.fencing = nil
	}
	k.wake()
}

// lost tells, while the address is released, that somebody else has it already.
func (s *situation) lost() bool {
	return s.fence > s.epoch || !s.gone && s.vip.Epoch > s.epoch
}

// fenced tells that somebody serves the address with this epoch.
func (k *keeper) fenced(epoch uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if epoch > k.s.fence {
		k.s.fence = epoch
		k.look()
	}
}

// leave has nothing taken any more and, the last time, everything released.
func (k *keeper) leave(last bool) {
	k.mu.Lock()
	k.s.leaving, k.s.last = true, last
	if last {
		k.letGo()
	}
	k.look()
	k.mu.Unlock()
}

func (k *keeper) now() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.state
}

func (k *keeper) report() Report {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := Report{Index: k.index, Addr: k.addr, State: k.s.state, Since: k.since, Reason: k.reason}
	if k.s.state == Serving || k.s.state == Releasing || k.s.state == Taking {
		r.Epoch = k.s.epoch
	}
	if k.s.state == Failed {
		r.Move = k.missed
	}
	if k.s.state == Failed && k.owe != nil {
		r.Epoch = k.owe.epoch // it has to do with that still
		r.Stuck, r.Silent = k.owe.stuck, k.owe.stuck && k.owe.silent
	}
	if k.unit != nil && (k.s.state == Serving || k.s.state == Releasing) {
		r.Conns = len(k.unit.Conns())
	}
	return r
}

// become enters a state.
func (k *keeper) become(s State, reason string) {
	k.mu.Lock()
	if k.s.state != s {
		k.since = time.Now()
	}
	k.s.state, k.reason = s, reason
	k.mu.Unlock()
	k.a.change()
}

// run does what is to be done until the agent ends.
func (k *keeper) run() {
	k.adopt()
	for {
		var timer <-chan time.Time
		k.mu.Lock()
		at := k.retry
		k.mu.Unlock()
		stop := func() bool { return true }
		if d := time.Until(at); d > 0 {
			t := time.NewTimer(d)
			timer, stop = t.C, t.Stop
		}
		select {
		case <-k.a.ctx.Done():
			stop()
			return
		case <-k.poked:
			// Who waits for a state looks at what the registry says, too.
			k.a.change()
		case <-timer:
		}
		stop()
		for k.step() {
		}
	}
}

// step does the next step; false: there is nothing to do now.
func (k *keeper) step() bool {
	k.mu.Lock()
	late := time.Now().Before(k.retry)
	owes := k.owe != nil
	st := decide(&k.s)
	v := k.s.vip
	idle := k.s.state == Failed && st.do == doNothing && !owes
	k.mu.Unlock()
	switch {
	case st.do == doRelease:
		k.release(st)
		return true
	case st.do == doDrop:
		k.drop(st.text)
		return true
	case late || k.a.ctx.Err() != nil:
		return false
	case owes:
		k.settleOnce(k.a.ctx)
		return true
	}
	var err error
	switch st.do {
	case doListen:
		err = k.listen()
	case doReady:
		err = k.ready(&v)
	case doTake:
		err = k.take(&v)
	case doAbandon:
		err = k.abandon(&v)
	default:
		if idle { // what has failed is not wanted any more
			k.become(Absent, "")
		}
		return false
	}
	k.outcome(st.do, err)
	return true
}

// outcome notes how a step ended: after a failure it is tried again later.
func (k *keeper) outcome(do act, err error) {
	k.mu.Lock()
	if err == nil {
		k.retry, k.pause = time.Time{}, 0
		k.mu.Unlock()
		return
	}
	k.failed++
	k.pause = min(max(2*k.pause, k.a.o.Retry), k.a.o.RetryMax)
	k.retry = time.Now().Add(k.pause)
	pause, state := k.pause, k.s.state
	k.mu.Unlock()
	k.log.Error("the address cannot be brought to what the registry says; trying again", "step", do.String(), "in", pause, "err", err)
	if state == Absent || state == Failed {
		k.become(Failed, err.Error())
	} else {
		k.become(state, err.Error())
	}
	k.wake() // for the timer
}

// doing begins a step that can be broken off as soon as useless says so.
func (k *keeper) doing(useless func(*situation) bool) (context.Context, func()) {
	ctx, cancel := context.WithCancel(k.a.ctx)
	k.mu.Lock()
	k.stop, k.useless = cancel, useless
	if useless(&k.s) {
		cancel()
	}
	k.mu.Unlock()
	return ctx, func() {
		k.mu.Lock()
		k.stop, k.useless = nil, nil
		k.mu.Unlock()
		cancel()
	}
}

// ready tells the registry that the listeners are open.
func (k *keeper) ready(v *mgs.VIP) error {
	if !v.Ready {
		if err := k.a.call(func(ctx context.Context) (mgs.VIP, error) {
			return k.a.o.Registry.SetReady(ctx, k.index, v.MoveID)
		}); err != nil {
			return k.unlessMoved(err)
		}
	}
	k.mu.Lock()
	k.s.ready = true
	k.mu.Unlock()
	return nil
}

// unlessMoved: an address that was assigned anew meanwhile is no failure; the registry
// is about to say more.
func (k *keeper) unlessMoved(err error) error {
	var e *mgs.Error
	if errors.As(err, &e) && (e.Code == mgs.CodeMoved || e.Code == mgs.CodeSuperseded) {
		k.refresh()
		return nil
	}
	return err
}

// refresh asks the registry how the address is: something was refused because this
// node knows too little.
func (k *keeper) refresh() {
	ctx, cancel := context.WithTimeout(k.a.ctx, registryTime)
	defer cancel()
	v, err := k.a.o.Registry.Watch(ctx, "")
	if err != nil {
		wait(k.a.ctx, k.a.o.Retry)
		return
	}
	k.a.apply(&v)
	wait(k.a.ctx, time.Millisecond)
}

// abandon ends the period of an earlier process of this node, which is dead.
func (k *keeper) abandon(v *mgs.VIP) error {
	ctx, cancel := context.WithTimeout(k.a.ctx, registryTime)
	defer cancel()
	err := k.a.o.Registry.Abandoned(ctx, k.index, v.Epoch)
	if err == nil {
		k.log.Info("an earlier process of this node served the address and has not given it up in order", "epoch", v.Epoch)
	}
	if err == nil || isGone(err) {
		k.refresh()
		return nil
	}
	return err
}

// isGone: the period of service that is to be ended has ended.
func isGone(err error) bool {
	var e *mgs.Error
	return errors.As(err, &e) && (e.Code == mgs.CodeSuperseded || e.Code == mgs.CodeNoVIP || e.Code == mgs.CodeServed)
}

// settleOnce tells the registry of the end of a period of service.
func (k *keeper) settleOnce(ctx context.Context) bool {
	k.mu.Lock()
	d := k.owe
	stuck := d != nil && d.stuck
	k.mu.Unlock()
	if d == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, registryTime)
	defer cancel()
	if stuck {
		if err := k.unstick(ctx, d); err != nil {
			k.outcome(doRelease, err)
			return false
		}
	}
	err := k.tell(ctx, d)
	if err == nil || isGone(err) {
		k.mu.Lock()
		if k.owe == d {
			k.owe = nil
		}
		k.mu.Unlock()
		k.outcome(doRelease, nil)
		k.a.change()
		if err == nil {
			k.noteEnd(d)
		}
		return true
	}
	k.outcome(doRelease, fmt.Errorf("the registry does not know that the address was given up: %w", err))
	return false
}

// unstick removes the address, which could not be removed in time.
func (k *keeper) unstick(ctx context.Context, d *debt) error {
	k.mu.Lock()
	at, given := k.at, k.s.given
	k.mu.Unlock()
	if !given {
		if _, err := k.a.o.Net.Destroy(ctx, k.addr); err != nil {
			k.log.Warn("sockets of an address that is not served here", "err", err)
		}
		err := k.a.o.Net.Remove(ctx, at)
		has, herr := k.a.o.Net.Has(k.addr)
		if err = errors.Join(err, herr); err != nil || has {
			return stuckError(at, err)
		}
	}
	k.log.Info("the machine does not have the address any more")
	k.letPorts()
	k.mu.Lock()
	d.stuck, d.silent = false, false
	k.mu.Unlock()
	return nil
}

// stuckError says what to do about an address that the machine still has.
func stuckError(at vip.Address, err error) error {
	text := fmt.Sprintf("stuck: this machine still has the address; remove it by hand: ip addr del %s", at.Prefix)
	if at.Interface != "" {
		text += " dev " + at.Interface
	}
	text += fmt.Sprintf(" (\"ip addr show to %s\" tells where it is), or turn the machine off", at.Prefix.Addr())
	if err == nil {
		return errors.New(text)
	}
	return fmt.Errorf("%s: %w", text, err)
}

// letPorts ends what keeps the ports of an address that the machine still has, or had.
func (k *keeper) letPorts() {
	k.mu.Lock()
	var u Unit
	if d := k.owe; d != nil {
		u, d.unit = d.unit, nil
	}
	k.mu.Unlock()
	if u == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), registryTime)
	defer cancel()
	if err := u.Finish(ctx); err != nil {
		k.log.Warn("the services of an address that was given up have not ended well", "err", err)
	}
}

func (k *keeper) tell(ctx context.Context, d *debt) error {
	if d.clean {
		return k.a.o.Registry.Stopped(ctx, k.index, d.epoch)
	}
	return k.a.o.Registry.Abandoned(ctx, k.index, d.epoch)
}

// noteEnd notes what the registry was told, before it says so itself.
func (k *keeper) noteEnd(d *debt) {
	k.mu.Lock()
	if v := &k.s.vip; v.Epoch == d.epoch {
		if d.clean {
			v.Clean = true
		} else {
			v.Node = ""
		}
	}
	k.mu.Unlock()
	k.wake()
}

// settle is for the end of the agent: it tells what is owed for as long as ctx lasts. The
// keeper's goroutine may do so at the same time, which does no harm.
func (k *keeper) settle(ctx context.Context) bool {
	for {
		if k.settleOnce(ctx) {
			return true
		}
		wait(ctx, k.a.o.Retry)
		if ctx.Err() != nil {
			return false
		}
	}
}
