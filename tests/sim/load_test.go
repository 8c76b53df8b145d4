package sim

import (
	"fmt"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Scenarios of load over many failures, and of many frontends.

// under has all clients do step again and again, with pauses, while f makes failures.
func (c *cluster) under(pause time.Duration, step func(*actor), f func()) {
	over := make(chan bool)
	done := make(chan bool)
	go func() {
		c.each(func(a *actor) {
			for !a.lossy {
				select {
				case <-over:
					return
				default:
				}
				step(a)
				time.Sleep(time.Duration(a.rng.Int64N(int64(pause))))
			}
		})
		close(done)
	}()
	f()
	close(over)
	<-done
}

// crowd is four clients of three frontends.
func crowd(cfg *config) {
	cfg.apart, cfg.fronts, cfg.vips, cfg.clients = true, 3, 3, 4
	cfg.stripes = 2
}

// during gives a scenario that goes on for so long, a 48th of that with -short.
func during(d time.Duration, cfg func(*config)) (time.Duration, func(*config)) {
	if testing.Short() {
		d /= 48
	}
	return d, func(c *config) {
		cfg(c)
		c.limit = 2*d + time.Hour
		c.imports.PingInterval, c.imports.DeadAfter = 5*time.Second, 15*time.Second
		c.recovery.PingInterval, c.recovery.PingTimeout = 5*time.Second, 40*time.Second
		c.ownerInterval = 5 * time.Second
		// The engine changes its log with the MDT's lock held, which would have simulated time
		// stand still if that took any.
		c.flush = 1
	}
}

// Steps of clients.
func nameSteps(a *actor) {
	switch a.rng.IntN(3) {
	case 0:
		if len(a.dirs()) < 6 {
			a.mkdir()
		}
	case 1:
		a.rmdir()
	default:
		a.list(pick(a.rng, a.dirs()))
	}
}

func renameSteps(a *actor) {
	switch l := a.places(false); {
	case len(a.dirs()) < 4:
		a.mkdir()
	case len(l) < 4:
		a.createAs(wire.Guarded, -1)
	default:
		a.renameTo(pick(a.rng, l), place{pick(a.rng, a.dirs()), a.newName()})
		a.list(pick(a.rng, a.dirs()))
	}
}

func syncSteps(a *actor) {
	if l := a.places(false); len(l) < 3 {
		a.createAs(wire.Guarded, -1)
	} else {
		f := pick(a.rng, l).file()
		from, to := a.span(f)
		a.writeAs(f, from, to, 0, wire.FileSync)
		a.verify(f, all, from, to-from)
	}
}

func loadScenarios(add func(string, func(*config), func(*cluster))) {
	mdt := func(c *cluster) *node { return c.homeOf(mdtName) }
	ost := func(c *cluster) *node {
		return c.homeOf(ostName(c.rand("victim", int(time.Since(c.began))).IntN(len(c.osts))))
	}
	// RS 70a to RS 70f, SM 50, SM 52, RD 26, RO 5, QU 18: failures again and again.
	for name, l := range map[string]struct {
		victim func(*cluster) *node
		step   func(*actor)
	}{
		"all-mdt": {mdt, (*actor).step}, "all-ost": {ost, (*actor).step}, "names-mdt": {mdt, nameSteps}, "renames-mdt": {mdt, renameSteps}, "sync-writes-ost": {ost, syncSteps},
	} {
		add("load-"+name, crowd, func(c *cluster) {
			rng := c.rand("failures")
			c.under(100*time.Millisecond, l.step, func() {
				for i := range 12 {
					time.Sleep(time.Duration(rng.IntN(5000)) * time.Millisecond)
					c.crash(l.victim(c), ends[1+i%4], time.Duration(rng.IntN(2000))*time.Millisecond)
				}
			})
			c.ops(200)
		})
	}
	// SM 51: the MDT fails again, at different times after its start.
	add("load-mdt-again", crowd, func(c *cluster) {
		c.under(100*time.Millisecond, (*actor).step, func() {
			for i := range 8 {
				c.crash(c.homeOf(mdtName), "power", 100*time.Millisecond)
				time.Sleep(time.Duration(i) * 700 * time.Millisecond)
				c.crash(c.homeOf(mdtName), "power", 100*time.Millisecond)
				c.servingMDT(false)
				time.Sleep(time.Second)
			}
		})
		c.ops(100)
	})
	// SC mds-scale, oss-scale: one kind of target fails every 10 minutes for 24 hours. No
	// client sees an error, nobody is evicted, nothing is lost.
	for name, victim := range map[string]func(*cluster) *node{"mdt": mdt, "ost": ost} {
		d, cfg := during(24*time.Hour, crowd)
		add("day-"+name, cfg, func(c *cluster) {
			n := 0
			c.under(40*time.Second, (*actor).step, func() {
				for until := time.Now().Add(d); time.Now().Before(until); n++ {
					time.Sleep(9*time.Minute + time.Duration(c.rand("when", n).IntN(120))*time.Second)
					c.crash(victim(c), ends[1+n%4], 5*time.Second)
				}
			})
			c.ops(int(d / (20 * time.Second)))
			c.mu.Lock()
			evicted := c.seen["evictions by the MDT"]
			c.mu.Unlock()
			if n < int(d/(15*time.Minute)) || evicted > 0 {
				c.fault("%d failures, %d evictions", n, evicted)
			}
		})
	}
	// SC random-scale: a frontend dies, then the MDT fails; only what that frontend alone
	// had may be lost. SC ha.sh, HX IN 15: any nodes at any time, also together.
	d, cfg := during(6*time.Hour, crowd)
	add("day-frontend-mdt", cfg, func(c *cluster) {
		c.under(20*time.Second, (*actor).step, func() {
			for i, until := 0, time.Now().Add(d); time.Now().Before(until); i++ {
				time.Sleep(time.Duration(c.rand("when", i).IntN(600)) * time.Second)
				fe := c.frontendOf(c.actors[i%len(c.actors)])
				fe.die(true)
				time.Sleep(time.Duration(c.rand("then", i).IntN(4000)) * time.Millisecond)
				c.crash(c.homeOf(mdtName), ends[1+i%3], 2*time.Second)
				time.Sleep(c.cfg.recovery.Hard)
				fe.boot()
			}
		})
		c.ops(int(d / (20 * time.Second)))
	})
	add("day-any", cfg, func(c *cluster) {
		c.under(20*time.Second, (*actor).step, func() {
			for i, until := 0, time.Now().Add(d); time.Now().Before(until); i++ {
				rng := c.rand("day", i)
				time.Sleep(time.Duration(rng.IntN(600)) * time.Second)
				var down []*node
				for range 1 + rng.IntN(3) {
					n := pick(rng, c.nodes)
					n.die(rng.IntN(2) == 0)
					down = append(down, n)
					time.Sleep(time.Duration(rng.IntN(2)*rng.IntN(3000)) * time.Millisecond)
				}
				time.Sleep(time.Duration(rng.IntN(10000)) * time.Millisecond)
				for _, n := range down {
					n.boot()
				}
			}
		})
		c.ops(int(d / (20 * time.Second)))
	})
	// SC large-scale 3a: how long recovery takes with so many frontends, each of which has
	// operations to replay.
	for _, n := range []int{2, 8, 32} {
		add(fmt.Sprintf("many-%d", n), many(n), func(c *cluster) {
			c.allTwoNode()
			c.each(func(a *actor) {
				for range 6 {
					a.createAs(wire.Guarded, -1)
				}
			})
			began := time.Now()
			c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
			r := c.servingMDT(false).front.Status().Recovery
			c.t.Logf("%d frontends: %v from the failure, %v in recovery, %d replays", n, time.Since(began), r.End.Sub(r.Start), r.Replayed)
			if r.Clients < n || r.Evicted > 0 || r.Replayed == 0 || r.End.Sub(r.Start) >= c.cfg.recovery.SoftMin {
				c.fault("recovery of %d frontends: %+v", n, r)
			}
			c.each(func(a *actor) { a.final() })
		})
	}
	// HX RV 10: some of many frontends are lost with the MDT. What the others have done is
	// there, and only those who are missing are evicted.
	add("many-some-lost", many(16), func(c *cluster) {
		c.allTwoNode()
		c.excused(wire.ClientID{}, -1, "frontends are lost")
		c.each(func(a *actor) {
			for range 4 {
				a.createAs(wire.Guarded, -1)
			}
		})
		for i := range 5 {
			c.nodes[3*i].die(true)
		}
		c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
		r := c.servingMDT(false).front.Status().Recovery
		if r.Evicted != 5 || r.Failed > 0 || r.Replayed == 0 {
			c.fault("recovery with 5 of 16 frontends missing: %+v", r)
		}
		lost := 0
		c.each(func(a *actor) { a.final() })
		for _, a := range c.actors {
			if a.isLossy() {
				lost++
			}
		}
		if lost == 0 || lost > 5 {
			c.fault("%d clients may have lost something, 5 frontends were lost", lost)
		}
	})
}

// many has a frontend, an address and a client so many times.
func many(n int) func(*config) {
	return func(cfg *config) { cfg.apart, cfg.fronts, cfg.vips, cfg.clients = true, n, n, n }
}

// allTwoNode has all clients use a two-node export, each served by a frontend of its own.
func (c *cluster) allTwoNode() {
	for i, a := range c.actors {
		a.two = true
		for c.nodes[i].frontend() == nil {
			time.Sleep(50 * time.Millisecond)
		}
		if c.frontendOf(a) != c.nodes[i] {
			c.serve(a.v, c.nodes[i].frontend())
		}
	}
	c.serving()
}

// ops checks that there was load: at least so many operations.
func (c *cluster) ops(least int) {
	n := 0
	for _, a := range c.actors {
		n += a.ops
	}
	if n < least {
		c.fault("only %d operations, at least %d were to be", n, least)
	}
	c.trace("%d operations", n)
}
