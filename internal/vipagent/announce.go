package vipagent

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/failover"
)

// announcePauses are before the announcements of Announce: at once, and when the other
// machine has certainly learnt that the address is not its own.
var announcePauses = [...]time.Duration{0, 200 * time.Millisecond, time.Second}

// confirmTime is how long the registry may take to say whose the addresses are before
// they are announced. Meanwhile beats of all others have come, which say it, too.
const confirmTime = time.Second

// Announce tells the network again where the addresses are that are served here. It is
// called when another machine is heard again: as long as that did not know that it had
// lost an address, its kernel may have answered or asked for neighbours in its name. It
// may be this machine that was cut off: what it has lost is not drawn to it.
func (a *Agent) Announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last || a.ctx.Err() != nil {
		return
	}
	a.wg.Go(func() {
		ctx, cancel := context.WithTimeout(a.ctx, confirmTime)
		if v, err := a.o.Registry.Watch(ctx, ""); err == nil {
			a.apply(&v)
		}
		cancel()
		for _, d := range announcePauses {
			if wait(a.ctx, d); a.ctx.Err() != nil {
				return
			}
			for _, k := range a.all() {
				k.announce()
			}
		}
	})
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
