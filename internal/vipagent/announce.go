package vipagent

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// announcePauses are before the announcements of Announce: at once, and when the other
// machine has certainly learnt that the address is not its own.
var announcePauses = [...]time.Duration{0, 200 * time.Millisecond, time.Second, 2 * time.Second}

// Announce tells the network again where the addresses are that are served here. It is
// called when another machine is heard again: as long as that did not know that it had
// lost an address, its kernel may have answered or asked for neighbours in its name. Or it is
// this machine that nobody has heard: so the registry is asked first, and without it
// nothing is announced.
func (a *Agent) Announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last || a.ctx.Err() != nil {
		return
	}
	a.wg.Go(func() {
		for _, d := range announcePauses {
			if wait(a.ctx, d); a.ctx.Err() != nil {
				return
			}
			serving := false
			for _, k := range a.all() {
				serving = serving || k.serving()
			}
			if !serving {
				continue
			}
			v, ok := a.view(a.ctx)
			for _, k := range a.all() {
				if ok && k.owns(&v) {
					k.announce()
				}
			}
		}
	})
}

// confirmTime bounds the question whether an address is still here.
const confirmTime = time.Second

// view is what the registry says now.
func (a *Agent) view(ctx context.Context) (mgs.View, bool) {
	ctx, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	v, err := a.o.Registry.Watch(ctx, "")
	if err != nil {
		return v, false
	}
	a.apply(&v)
	return v, true
}

func (k *keeper) serving() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s.state == Serving && !k.s.given
}

// owns tells whether the period of service that the registry has is the one here.
func (k *keeper) owns(v *mgs.View) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range v.VIPs {
		if x := &v.VIPs[i]; x.Index == k.index {
			return x.Node == k.a.o.Node && !x.Clean && x.Epoch == k.s.epoch
		}
	}
	return false
}

// confirm asks the registry whether the address is still served here.
func (k *keeper) confirm(ctx context.Context) bool {
	v, ok := k.a.view(ctx)
	return ok && k.owns(&v)
}

// announce does nothing unless the address is served and not known to be lost; it cannot
// leave meanwhile, because it is given up in another state.
func (k *keeper) announce() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s.state != Serving || k.s.given || decide(&k.s).reason == failover.Fenced {
		return
	}
	if err := k.a.o.Net.Announce(k.at); err != nil {
		k.log.Warn("the address could not be announced again", "err", err)
	}
}
