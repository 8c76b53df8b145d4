package vipagent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
)

// candidate is an address that is being taken (failover.Candidate). Package failover
// calls its methods in order, but does not wait for one that is late.
type candidate struct {
	k *keeper
	// at is where the address is to be; given: somebody else adds it.
	at    vip.Address
	given bool

	mu    sync.Mutex
	unit  Unit
	over  bool              // Finish was called
	known map[told]struct{} // connections of the last owner
	began *mgs.VIP          // what Take gave
	left  bool              // the keeper has gone on without the rest
}

// Listen implements failover.Candidate. A node that could not add the address must not
// be ready for it: its owner would give it up for nothing.
func (c *candidate) Listen(context.Context) error {
	if !c.given {
		if err := c.k.a.o.Net.Check(c.at); err != nil {
			return err
		}
	}
	u := c.k.a.o.New(c.k.addr)
	if err := u.Listen(true); err != nil {
		return err
	}
	c.mu.Lock()
	over := c.over
	c.unit = u
	c.mu.Unlock()
	if over {
		return u.Finish(context.Background())
	}
	return nil
}

// Begin implements failover.Candidate.
func (c *candidate) Begin(ctx context.Context) error {
	k := c.k
	v := k.registry()
	c.learn(k.a.book.known(k.index, v.Epoch))
	if v.Epoch > 0 && !v.Clean {
		c.ask(v.Epoch)
	}
	got, err := k.a.o.Registry.Take(ctx, k.index, v.MoveID)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.began = &got
	u, over, left := c.unit, c.over, c.left
	c.mu.Unlock()
	k.mu.Lock()
	// An answer that is very late may find a later period.
	k.s.began = max(k.s.began, got.Epoch)
	switch {
	case left && (k.owe == nil || k.owe.epoch < got.Epoch):
		k.owe = &debt{epoch: got.Epoch, clean: !got.Crashed} // nothing was answered
	case !left:
		k.s.epoch = max(k.s.epoch, got.Epoch)
	}
	k.mu.Unlock()
	k.news(&got)
	k.wake()
	if over {
		return errors.New("the take-over was given up meanwhile")
	}
	return u.Begin(ctx, got)
}

// learn takes note of connections of the last owner.
func (c *candidate) learn(l []told) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = map[told]struct{}{}
	}
	for _, x := range l {
		if len(c.known) < maxConns && x.Remote.IsValid() {
			c.known[x] = struct{}{}
		}
	}
}

// ask asks all nodes for the connections of the last owner. Nobody waits for the
// answers, as one of them is dead: what comes late is used when the address is announced
// again.
func (c *candidate) ask(epoch uint64) {
	a := c.k.a
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, node := range a.o.Others {
		if a.ctx.Err() != nil {
			return // Stop waits already
		}
		a.wg.Go(func() {
			ctx, cancel := context.WithTimeout(a.ctx, knownTime)
			defer cancel()
			for from := 0; from < maxConns; {
				var res knownResult
				if err := a.o.Ask(ctx, node, MethodKnown, &knownArgs{Index: c.k.index, Epoch: epoch, From: from}, &res); err != nil {
					c.k.log.Debug("a node has not said which connections it knows", "node", node, "err", err)
					return
				}
				if len(res.Conns) == 0 {
					return
				}
				c.learn(res.Conns)
				from += len(res.Conns)
			}
		})
	}
}

// Serve implements failover.Candidate.
func (c *candidate) Serve(context.Context) error { return c.unit.Serve() }

// Conns implements failover.Candidate.
func (c *candidate) Conns() []vip.Conn {
	c.mu.Lock()
	l := slices.SortedFunc(maps.Keys(c.known), told.compare)
	c.mu.Unlock()
	conns := make([]vip.Conn, 0, len(l))
	for _, x := range l {
		if x.Remote.Addr().Unmap().Is4() == c.k.addr.Is4() {
			conns = append(conns, vip.Conn{Local: netip.AddrPortFrom(c.k.addr, x.Port), Remote: x.Remote})
		}
	}
	return conns
}

// Notify implements failover.Candidate.
func (c *candidate) Notify(ctx context.Context) (failover.Notified, error) { return c.unit.Notify(ctx) }

// Finish implements failover.Candidate.
func (c *candidate) Finish(ctx context.Context) error {
	c.mu.Lock()
	u := c.unit
	c.over = true
	c.mu.Unlock()
	if u == nil {
		return nil
	}
	return u.Finish(ctx)
}

// subject names the address for package failover.
func (k *keeper) subject(reason failover.Reason) failover.Subject {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := &k.s.vip
	s := failover.Subject{Address: vip.Address{Prefix: netip.PrefixFrom(k.addr, v.Bits), Interface: v.Interface}, VIP: k.index, Epoch: v.Epoch, Move: v.MoveID, From: v.Node, To: v.Next, Reason: reason}
	if s.To == "" && v.Node != k.a.o.Node {
		s.To = k.a.o.Node
	}
	return s
}

// listen opens the listeners while the machine does not have the address.
func (k *keeper) listen() error {
	reason := failover.Move
	v := k.registry()
	if !v.Clean && v.Epoch > 0 && v.Node == "" {
		reason = failover.Crashed
	}
	k.mu.Lock()
	given := k.s.given
	k.mu.Unlock()
	subject := k.subject(reason)
	c := &candidate{k: k, at: subject.Address, given: given}
	o := failover.AcquireOptions{Subject: subject, Candidate: c, Given: given, Deadlines: failover.TakeDeadlines{Begin: beginTime}, Confirm: k.confirm}
	ctx, end := k.doing(func(s *situation) bool { return !s.mine() || s.vip.MoveID != v.MoveID })
	defer end()
	ceding := make(chan struct{})
	o.Fenced = ceding
	t, rep := k.a.runner.Listen(ctx, o)
	if t == nil {
		if ctx.Err() != nil {
			return nil
		}
		k.mu.Lock()
		k.missed = v.MoveID
		k.mu.Unlock()
		return rep.Err
	}
	k.mu.Lock()
	k.taking, k.candidate, k.at, k.ceding = t, c, o.Address, ceding
	k.keepPorts = false // an order to drain what was not here
	k.s.move, k.s.ready, k.s.opened = v.MoveID, false, given
	k.mu.Unlock()
	k.become(Listening, "")
	return nil
}

// drop closes listeners that are not needed any more.
func (k *keeper) drop(why string) {
	k.mu.Lock()
	t := k.taking
	k.taking, k.candidate = nil, nil
	k.mu.Unlock()
	if t != nil {
		if rep := t.BreakOff(); rep.Err != nil {
			k.log.Info("no longer ready to take the address", "why", why)
		}
	}
	k.become(Absent, "")
}

// take begins to serve the address.
func (k *keeper) take(v *mgs.VIP) error {
	k.mu.Lock()
	t, c := k.taking, k.candidate
	k.taking, k.candidate = nil, nil
	k.s.epoch = v.Epoch + 1
	k.mu.Unlock()
	k.become(Taking, "")
	move, base := v.MoveID, v.Epoch
	ctx, end := k.doing(func(s *situation) bool { return s.broken(move, base) })
	rep := t.Take(ctx)
	useless := ctx.Err() != nil
	end()
	c.mu.Lock()
	u, began := c.unit, c.began
	c.left = true // the registry may answer still
	c.mu.Unlock()
	if rep.Outcome == failover.Serving {
		if rep.Err != nil {
			k.log.Warn("the address is served, and not all clients may know", "err", rep.Err)
		}
		k.mu.Lock()
		k.unit, k.s.epoch, k.teller = u, began.Epoch, k.startTeller(u, began.Epoch)
		k.mu.Unlock()
		k.become(Serving, "")
		k.log.Info("the address is served here now", "epoch", began.Epoch, "from", v.Node, "crashed", began.Crashed, "took", rep.Took, "woken", rep.Tickled, "notified", rep.Clients)
		return nil
	}
	k.mu.Lock()
	if !useless {
		k.missed = move
	}
	if began != nil {
		// Nothing of it was answered unless it was exposed.
		k.owe = &debt{epoch: began.Epoch, clean: !began.Crashed && !rep.Exposed, stuck: rep.Outcome == failover.Stuck}
	}
	k.mu.Unlock()
	if rep.Outcome == failover.Stuck {
		k.become(Failed, stuckError(k.at, rep.Err).Error())
	} else {
		k.become(Absent, "")
	}
	if useless {
		k.log.Info("the take-over was broken off", "stage", rep.Stage, "err", rep.Err)
		return nil
	}
	return k.unlessMoved(fmt.Errorf("take-over: %w", rep.Err))
}

// release gives the address up.
func (k *keeper) release(st step) {
	fencing := make(chan struct{})
	var keep chan struct{}
	k.mu.Lock()
	u, t, epoch, given := k.unit, k.teller, k.s.epoch, k.s.given
	k.teller = nil
	if k.keepPorts && st.reason != failover.Fenced && !k.s.last {
		keep = make(chan struct{})
		k.letgo = keep
	}
	k.keepPorts = false
	k.fencing = fencing
	k.mu.Unlock()
	k.become(Releasing, "")
	k.mu.Lock()
	k.look() // it may have been fenced since
	k.mu.Unlock()
	k.log.Info("giving the address up", "why", st.text, "epoch", epoch)
	t.stop()
	var rest sync.WaitGroup
	defer rest.Wait()
	o := failover.ReleaseOptions{
		Subject: k.subject(st.reason), Service: u, Refuse: k.a.o.Refuse, Closing: failover.HalfClose, Given: given, Fenced: fencing,
		Deadlines: k.a.o.Deadlines,
		// Who takes the address next must have the connections before it may begin.
		Told: func(ctx context.Context) error {
			rest.Wait()
			return k.told(ctx, epoch, true)
		},
		Abandon: func(ctx context.Context) error {
			rest.Wait()
			return k.told(ctx, epoch, false)
		},
	}
	o.Subject.Address, o.Subject.Epoch, o.Subject.From = k.at, epoch, k.a.o.Node
	if o.Subject.To == k.a.o.Node {
		o.Subject.To = ""
	}
	if keep != nil {
		o.Finish, o.FinishWait = keep, holdTime
	}
	o.Mute = u.Mute
	var know []string
	if st.reason != failover.Fenced {
		o.Closing, know = k.prepare(u, t, fencing)
	}
	o.OnStage = func(s failover.StageReport) {
		switch {
		// Of what has a newer owner nobody is told.
		case keep != nil && (s.Stage == failover.StageTold || s.Stage == failover.StageClear && k.isFenced()):
			k.holds()
		// Nothing is accepted any more: these are the last ones.
		case s.Stage == failover.StageDrain && len(know) > 0 && !k.isFenced():
			rest.Go(func() { t.rest(k.a.ctx, know) })
		}
	}
	rep := k.a.runner.Release(k.a.ctx, o)
	k.mu.Lock()
	k.fencing, k.unit, k.letgo, k.s.held, k.s.failing = nil, nil, nil, false, ""
	switch {
	case rep.Outcome == failover.Superseded || rep.Told:
	case rep.Outcome == failover.Stuck:
		// Somebody else may have it by now: then the registry knows.
		k.owe = &debt{epoch: epoch, stuck: true, unit: u, silent: rep.Silent}
	default:
		k.owe = &debt{epoch: epoch, clean: rep.Outcome == failover.Clean}
	}
	k.mu.Unlock()
	log := k.log.Info
	if rep.Outcome != failover.Clean {
		log = k.log.Warn
	}
	log("the address was given up", "outcome", rep.Outcome, "closing", o.Closing, "took", rep.Took, "conns", rep.Drained.Conns, "replies", rep.Drained.Replies,
		"orderly", rep.Closed.Orderly, "forced", rep.Closed.Forced, "destroyed", rep.Destroyed, "err", rep.Err)
	if rep.Outcome == failover.Stuck {
		err := stuckError(k.at, rep.Err)
		k.log.Error("the address could not be removed; nothing is answered there", "silent", rep.Silent, "err", err)
		k.a.o.Events.Append(events.Event{Kind: events.Node, Addr: k.addr, VIP: k.index, Epoch: epoch, Reason: "the machine still has the address", Err: err.Error()})
		k.become(Failed, err.Error())
		return
	}
	if st.reason == failover.Failed && rep.Outcome != failover.Superseded {
		k.yield(st.text)
		return
	}
	k.become(Absent, "")
}

// told tells the registry of the end of the period of service.
func (k *keeper) told(ctx context.Context, epoch uint64, clean bool) error {
	d := &debt{epoch: epoch, clean: clean}
	err := k.tell(ctx, d)
	switch {
	case err == nil:
		k.noteEnd(d)
	case isGone(err):
		err = nil
	}
	return err
}

// isFenced tells whether what is being released has a newer owner.
func (k *keeper) isFenced() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.lost()
}

// holds notes that the address was given up, but for listeners that hold the ports. The
// release goes on until letGo.
func (k *keeper) holds() {
	k.mu.Lock()
	k.s.held = true
	k.mu.Unlock()
	k.a.change()
}

// letGo closes listeners that hold the ports after a release. k.mu is held.
func (k *keeper) letGo() {
	if k.letgo != nil {
		close(k.letgo)
		k.letgo = nil
	}
}
