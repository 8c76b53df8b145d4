package vipagent

import "time"

// announcePauses are before the announcements of Announce: at once, and when the other
// machine has certainly learnt that the address is not its own.
var announcePauses = [...]time.Duration{0, 200 * time.Millisecond, time.Second}

// Announce tells the network again where the addresses are that are served here. It is
// called when another machine is heard again: as long as that did not know that it had
// lost an address, its kernel may have answered or asked for neighbours in its name.
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
			for _, k := range a.all() {
				k.announce()
			}
		}
	})
}

// announce does nothing unless the address is served; it cannot leave meanwhile, because
// it is given up in another state.
func (k *keeper) announce() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s.state != Serving || k.s.given {
		return
	}
	if err := k.a.o.Net.Announce(k.at); err != nil {
		k.log.Warn("the address could not be announced again", "err", err)
	}
}
