package vipagent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// The commands of cluster managers' hooks. What is wanted is noted at the registry and
// here, and then waited for: commands that come at the same time wait for each other's
// notes only, and the last one counts.

// lookup finds the keeper of an address. One that was just added may not have been
// told of yet.
func (a *Agent) lookup(ctx context.Context, addr netip.Addr) (*keeper, error) {
	if k := a.find(addr); k != nil && !k.isGone() {
		return k, nil
	}
	ctx, cancel := context.WithTimeout(ctx, registryTime)
	defer cancel()
	v, err := a.o.Registry.Watch(ctx, "")
	if err != nil {
		return a.find(addr), fmt.Errorf("the registry does not answer: %w", err)
	}
	a.apply(&v)
	if k := a.find(addr); k != nil && !k.isGone() {
		return k, nil
	}
	return nil, nil
}

func (k *keeper) isGone() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.gone
}

// begin takes the turn to change what is wanted of the address.
func (k *keeper) begin(ctx context.Context) (end func(), err error) {
	select {
	case k.turn <- struct{}{}:
		return func() { <-k.turn }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// situation is how the address is here.
func (k *keeper) situation() *situation {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.s
	return &s
}

// registry is the address as the registry said last.
func (k *keeper) registry() mgs.VIP {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.vip
}

var errLeaving = errors.New("this node stops and takes no addresses")

// TakeVIP implements vipctl.Mover.
func (a *Agent) TakeVIP(ctx context.Context, args vipctl.TakeArgs) (vipctl.Result, error) {
	k, err := a.lookup(ctx, args.Addr)
	switch {
	case err != nil:
		return vipctl.Result{}, err
	case k == nil:
		return vipctl.Result{}, fmt.Errorf("%s is not a floating address: enter it with \"baton vip add %s/BITS\"", args.Addr, args.Addr)
	case a.Leaving():
		return vipctl.Result{}, errLeaving
	}
	end, err := k.begin(ctx)
	if err != nil {
		return vipctl.Result{}, err
	}
	before := *k.situation()
	move, failed, err := k.want(args)
	end()
	if err != nil {
		return vipctl.Result{}, err
	}
	done := func(s *situation) bool {
		return s.state == Serving || args.Stage == vipctl.StageListen && (s.state == Listening && s.opened == s.given || s.state == Taking)
	}
	if done(&before) && done(k.situation()) {
		return k.result(string(before.state), "the address was %s here already", before.state)
	}
	for {
		changed := a.changes()
		k.mu.Lock()
		s, v, n, reason, state := k.s, k.s.vip, k.failed, k.reason, k.s.state
		k.mu.Unlock()
		switch {
		case v.MoveID != move || !s.mine():
			return vipctl.Result{}, fmt.Errorf("the take-over of %s was broken off: it is assigned to %s now", k.addr, named(v.Next))
		case done(&s):
			return k.result(string(state), "the address is %s here now", state)
		case a.Leaving():
			return vipctl.Result{}, errLeaving
		case n != failed:
			return vipctl.Result{}, fmt.Errorf("%s cannot be taken (it is tried again until it is released): %s", k.addr, reason)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return vipctl.Result{}, fmt.Errorf("%s is %s after the time that was given, and the work goes on: %w", k.addr, state, ctx.Err())
		}
	}
}

// want has the address assigned to this node, and returns the number of the assignment
// and of the failures so far.
func (k *keeper) want(args vipctl.TakeArgs) (move, failed uint64, err error) {
	// A process that dies meanwhile leaves the address to whom it belongs.
	if err := k.a.given.set(k.addr, args.Given); err != nil {
		return 0, 0, err
	}
	v := k.registry()
	// Not the caller's context: if it has gone, an order is not left half done.
	ctx, cancel := context.WithTimeout(k.a.ctx, registryTime)
	defer cancel()
	// Of an owner that is about to give it up in order, there is nothing to declare.
	if args.Force && !v.Free() && v.Node != k.a.o.Node && !k.givesUp(ctx, &v) {
		if err := k.a.o.Registry.Abandoned(ctx, k.index, v.Epoch); err != nil && !isGone(err) {
			return 0, 0, err
		}
	}
	k.mu.Lock()
	k.asked, k.s.given, k.s.hold = true, args.Given, args.Given && args.Stage == vipctl.StageListen
	k.keepPorts = false // of a release that this take comes after
	// An order to release that was not followed by another assignment is over.
	k.s.barred = 0
	failed = k.failed
	k.mu.Unlock()
	for range 3 {
		got, err := k.a.o.Registry.Assign(ctx, k.index, v.Epoch, k.a.o.Node)
		if err == nil {
			k.mu.Lock()
			k.retry, k.pause = time.Time{}, 0 // a failure before does not hold it up
			k.mu.Unlock()
			k.news(&got)
			return got.MoveID, failed, nil
		}
		if !isGone(err) {
			return 0, 0, err
		}
		k.refresh() // the epoch has risen meanwhile
		v = k.registry()
	}
	return 0, 0, fmt.Errorf("%s is being moved to and fro: epoch %d was no longer true when it was assigned", k.addr, v.Epoch)
}

func (k *keeper) result(state, format string, args ...any) (vipctl.Result, error) {
	return vipctl.Result{State: state, Text: k.addr.String() + ": " + fmt.Sprintf(format, args...)}, nil
}

// ReleaseVIP implements vipctl.Mover. The registry is told if it answers; the address
// is given up in any case.
func (a *Agent) ReleaseVIP(ctx context.Context, args vipctl.ReleaseArgs) (vipctl.Result, error) {
	k, err := a.lookup(ctx, args.Addr)
	if k == nil {
		// One that was removed may still be on its way.
		if k = a.find(args.Addr); k != nil && k.now() == Absent {
			k = nil
		}
	}
	if k == nil {
		text := fmt.Sprintf("%s: not a floating address, so nothing is served here", args.Addr)
		if err != nil {
			text = fmt.Sprintf("%s: never served by this process", args.Addr)
		}
		return vipctl.Result{State: vipctl.Unknown, Text: text}, nil
	}
	end, err := k.begin(ctx)
	if err != nil {
		return vipctl.Result{}, err
	}
	before, released := k.unwant(args)
	end()
	late := time.NewTimer(readyTime)
	defer late.Stop()
	for {
		changed := a.changes()
		k.mu.Lock()
		state, held, mine, owes, reason := k.s.state, k.s.held && args.Stage == vipctl.StageDrain, k.s.mine(), k.owe != nil, k.reason
		stuck := owes && k.owe.stuck
		// A later order counts, also if the address has never been absent between.
		again := mine && (state == Absent || state == Failed || k.s.vip.MoveID > released)
		k.mu.Unlock()
		// Whoever hears that it is over has the address added to another machine.
		over := !stuck && (state == Absent || state == Failed || state == Releasing && held)
		switch {
		case again:
			return vipctl.Result{}, fmt.Errorf("%s was assigned to this node again meanwhile", k.addr)
		case stuck: // somebody may remove it in time
		case over && (before == Absent || before == Failed):
			return k.result(vipctl.Absent, "nothing is served here")
		case over && held:
			return k.result(vipctl.Releasing, "drained: nothing is answered, connections are closed, new ones are held")
		case over && owes:
			return k.result(vipctl.Absent, "given up; the registry does not know it yet")
		case over:
			return k.result(vipctl.Absent, "given up")
		}
		select {
		case <-changed:
		case <-late.C: // whoever is to have it is not there
			k.bar(released)
		case <-ctx.Done():
			if stuck {
				return vipctl.Result{}, fmt.Errorf("%s is not answered here any more; %s: %w", k.addr, reason, ctx.Err())
			}
			return vipctl.Result{}, fmt.Errorf("%s is %s after the time that was given, and the work goes on: %w", k.addr, state, ctx.Err())
		}
	}
}

// readyTime is how long a release waits for the node that is to have the address next
// to listen.
const readyTime = time.Second

// bar has this node not follow the present assignment of the address, unless that is a
// later one than released to this node: the last order counts. It returns the one that is
// barred, or released.
func (k *keeper) bar(released uint64) uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	v := &k.s.vip
	if v.MoveID > released && v.Next == k.a.o.Node {
		return released
	}
	k.s.barred = v.MoveID
	k.look()
	return v.MoveID
}

// unwant has the address given up, and returns how it was here and the assignment that
// is not followed, or the one that came instead.
func (k *keeper) unwant(args vipctl.ReleaseArgs) (before State, released uint64) {
	k.mu.Lock()
	v := k.s.vip
	before = k.s.state
	k.asked, k.s.given = true, k.s.given || args.Given
	k.keepPorts = args.Given && args.Stage == vipctl.StageDrain && before == Serving
	if args.To == "" {
		k.s.barred = v.MoveID // whatever the registry answers
	}
	if args.Stage == vipctl.StageFinish {
		k.letGo()
	}
	if k.owe != nil && k.owe.stuck {
		k.retry, k.pause = time.Time{}, 0 // what was in the way may have gone
	}
	k.look()
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(k.a.ctx, registryTime) // as in want
	defer cancel()
	for range 3 {
		if v.Next != k.a.o.Node && (args.To == "" || args.To == v.Next) {
			return before, v.MoveID
		}
		got, err := k.a.o.Registry.Assign(ctx, k.index, v.Epoch, args.To)
		if err == nil {
			k.news(&got)
			return before, got.MoveID
		}
		if !isGone(err) {
			k.log.Warn("the address is released by order, and the registry cannot be told to whom it is to go", "to", args.To, "err", err)
			break
		}
		k.refresh() // the epoch has risen meanwhile, perhaps by a take that this comes after
		v = k.registry()
	}
	return before, k.bar(k.registry().MoveID)
}

// CheckVIP implements vipctl.Mover.
func (a *Agent) CheckVIP(ctx context.Context, args vipctl.CheckArgs) (vipctl.Result, error) {
	k := a.find(args.Addr)
	if k == nil || k.isGone() {
		return vipctl.Result{State: vipctl.Unknown, Text: fmt.Sprintf("%s: this node knows of no such floating address", args.Addr)}, nil
	}
	r := k.report()
	text := "the address is " + string(r.State) + " here"
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return k.result(string(r.State), "%s", text)
}
