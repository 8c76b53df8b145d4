package vipagent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/vip"
)

// Looks whether the machine still has an address that is served here.
const (
	lookPause  = time.Second           // between two looks, at least
	lookShare  = 20 * time.Millisecond // for each address: a look lists all that the machine has
	lookFails  = 3                     // Adds that fail before the address is given up
	lookRepeat = 2                     // looks at which it is announced again
	addTime    = time.Second           // bounds Add
	giveWay    = 8                     // times Retry: the pause before it is taken here again
)

// guard is what a keeper's goroutine remembers of these looks, of one period of service.
type guard struct {
	epoch  uint64
	next   time.Time // zero: not served here
	home   string    // the interface that had the address at first
	fails  int
	silent bool // that the registry does not confirm it was logged
	repeat int
}

// due is when the next look is; zero: there is none.
func (g *guard) due(k *keeper) time.Time {
	k.mu.Lock()
	epoch, leaves := k.s.epoch, k.s.leaves()
	k.mu.Unlock()
	switch {
	case leaves:
		*g = guard{}
	case g.next.IsZero() || g.epoch != epoch:
		*g = guard{epoch: epoch, home: k.home()}
		g.later(k)
	}
	return g.next
}

// later sets the time of the next look.
func (g *guard) later(k *keeper) {
	k.a.mu.Lock()
	n := len(k.a.keepers)
	k.a.mu.Unlock()
	g.next = time.Now().Add(max(lookPause, time.Duration(n)*lookShare))
}

// leaves tells that the address is not served here, is about to be given up, or is
// somebody else's to add: then it is not added.
func (s *situation) leaves() bool {
	return s.state != Serving || s.given || decide(s).do != doNothing
}

// leaves is that of the keeper's situation now.
func (k *keeper) leaves() bool { return k.situation().leaves() }

// look sees to it that the machine has the address that is served here: others remove it,
// and the kernel removes IPv6 addresses when their interface goes down. It is called by the
// keeper's goroutine, which gives the address up, too: not at the same time.
func (g *guard) look(k *keeper) {
	g.later(k)
	if k.leaves() {
		return
	}
	has, err := k.a.o.Net.Has(k.addr)
	if err != nil {
		k.log.Debug("whether the machine has the address is not known", "err", err)
		return
	}
	if has {
		g.found(k)
		return
	}
	k.mu.Lock()
	at := k.at
	k.mu.Unlock()
	if at.Interface == "" {
		at.Interface = g.home
	}
	ours, err := k.addAgain(at)
	hint := "somebody has removed it"
	if k.addr.Is6() {
		hint += ", or its interface was down and net.ipv6.conf.all.keep_addr_on_down is not set"
	}
	e := events.Event{Kind: events.Node, Addr: k.addr, VIP: k.index, Epoch: g.epoch}
	switch {
	case !ours:
		if !g.silent && !k.leaves() {
			g.silent = true
			k.log.Warn("the machine does not have the address any more, and it is not known to be still this node's: it is not added", "err", err)
		}
		return
	case err == nil:
		g.fails, g.silent, g.repeat = 0, false, lookRepeat
		k.log.Warn("the machine did not have the address any more, and has it again: "+hint, "epoch", g.epoch)
		e.Reason = "the machine did not have the address any more, and has it again: " + hint
		k.a.o.Events.Append(e)
		k.announce()
		return
	}
	g.fails++
	k.log.Warn("the machine does not have the address any more, and it cannot be added again: "+hint, "epoch", g.epoch, "tries", g.fails, "err", err)
	if g.fails < lookFails {
		return
	}
	e.Reason, e.Err = "the machine does not have the address any more", err.Error()
	k.a.o.Events.Append(e)
	k.mu.Lock()
	k.s.failing = fmt.Sprintf("the machine does not have the address any more, and it cannot be added again: %v", err)
	k.mu.Unlock()
}

// home is the interface that has the address, if that is known: what tells where it belongs
// may go with it, an IPv6 address of its network.
func (k *keeper) home() string {
	l, err := k.a.o.Net.Added()
	if i := slices.IndexFunc(l, func(a vip.Address) bool { return a.Prefix.Addr() == k.addr }); err == nil && i >= 0 {
		return l[i].Interface
	}
	return ""
}

// found is for an address that is there.
func (g *guard) found(k *keeper) {
	g.fails, g.silent = 0, false
	if g.repeat > 0 {
		g.repeat--
		if ctx, end := k.doing((*situation).leaves); k.confirm(ctx) {
			end()
			k.announce()
		} else {
			end()
		}
	}
}

// addAgain adds the address if the registry says that it is this node's still, and looks
// again afterwards, since the process may have stood still meanwhile. Unless it is ours
// then, the machine does not keep it.
func (k *keeper) addAgain(at vip.Address) (ours bool, err error) {
	ctx, end := k.doing((*situation).leaves)
	defer end()
	if !k.confirm(ctx) || ctx.Err() != nil {
		return false, nil
	}
	short, cancel := context.WithTimeout(ctx, addTime)
	err = k.a.o.Net.Add(short, at)
	cancel()
	if ours = k.confirm(ctx) && ctx.Err() == nil; ours {
		return true, err
	}
	if k.situation().given {
		return false, err // it is for a cluster manager to remove it
	}
	return false, errors.Join(err, k.a.o.Net.Remove(context.WithoutCancel(ctx), at))
}

// yield is after an address was given up that the machine could not keep: others may take
// it first.
func (k *keeper) yield(reason string) {
	k.mu.Lock()
	k.failed++
	k.missed = k.s.vip.MoveID
	k.pause = min(giveWay*k.a.o.Retry, k.a.o.RetryMax)
	k.retry = time.Now().Add(k.pause)
	k.mu.Unlock()
	k.become(Failed, reason)
}
