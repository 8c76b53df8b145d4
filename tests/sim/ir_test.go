package sim

import (
	"fmt"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/target/recov"
)

// Imperative recovery: n0 and n1 are frontends, n2 has the MDT, n3 and n4 have OSTs, n5
// has the registry.

// imperative runs a scenario with a registry; all ends as scenarios end.
func imperative(t *testing.T, change func(*world), run func(*cluster)) {
	t.Helper()
	tracing = *simTrace
	cfg := defaultConfig()
	cfg.apart = true
	cfg.registry = &registryConfig{startup: 5 * time.Second, factor: 5}
	simulateIn(t, 1, cfg, fmt.Sprintf("go test ./tests/sim -v -sim.trace -run '%s$'", t.Name()), change, func(c *cluster) {
		c.serving()
		c.addActors(2, false)
		run(c)
		c.heal()
		c.serving()
		c.finish()
	})
}

// settle has a target be on a node.
func (c *cluster) settle(target string, n *node) {
	c.mu.Lock()
	c.home[target] = n
	c.cond.Broadcast()
	c.mu.Unlock()
}

// wait waits until a target serves on a node, and returns how its recovery was.
func (c *cluster) wait(target string, n *node) (st recov.Status) {
	c.eventually(target+" serves at "+n.name, func() bool {
		if c.homeOf(target) != n {
			return false
		}
		s := c.running(target)
		if s == nil {
			return false
		}
		x := s.front.Status()
		st = x.Recovery
		return x.Serving
	})
	return st
}

// mdtWithFrontend has the machine of a frontend and that of the MDT lose power, and the
// MDT start on another node; it returns how recovery was.
func (c *cluster) mdtWithFrontend(dead *node, to *node) recov.Status {
	c.each(func(a *actor) { a.createAs(0, -1); a.mkdir() })
	was := c.homeOf(mdtName)
	dead.die(true)
	was.die(true)
	c.settle(mdtName, to)
	return c.wait(mdtName, to)
}

// took checks how long recovery waited for a frontend that is dead.
func (c *cluster) took(st recov.Status, shortened bool) {
	d := st.End.Sub(st.Start)
	if st.Evicted != 1 || (st.Tenths != 0) != shortened || shortened != (d < c.cfg.recovery.SoftMin) {
		c.fault("recovery took %v (%d/10), %d clients evicted; is to be shortened: %v", d, st.Tenths, st.Evicted, shortened)
	}
}

// With all clients told, the MDT waits a part of the window for a frontend that is dead;
// without, the whole: SM 100, 001.110, 001.111, 001.118, 001.119.
func TestShorterWindowForDeadFrontend(t *testing.T) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprintf("told %v", told), func(t *testing.T) {
			imperative(t, func(w *world) {
				for _, n := range w.nodes {
					w.optOut[n.name] = !told
				}
			}, func(c *cluster) {
				if told {
					c.state(ir.StateFull)
				} else {
					c.state(ir.StatePartial)
				}
				c.took(c.mdtWithFrontend(c.nodes[1], c.nodes[3]), told)
			})
		})
	}
}

// blind makes frontends that find out nothing by themselves.
func blind(w *world) {
	w.cfg.imports.PingInterval, w.cfg.imports.DeadAfter = time.Hour, 2*time.Hour
	w.cfg.keepalive, w.cfg.recovery.PingTimeout = time.Hour, -1
}

// Frontends that never ask and are told of nothing hang at a target whose machine has
// lost power; with the registry's news they go on: SM 101a, 000.5, 000.18, 000.20.
func TestNewsAloneReconnect(t *testing.T) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprintf("told %v", told), func(t *testing.T) {
			imperative(t, func(w *world) {
				blind(w)
				w.optOut[mdtName] = !told
			}, func(c *cluster) {
				c.state(ir.StateFull)
				c.each(func(a *actor) { a.mkdir() })
				c.homeOf(mdtName).die(true)
				done := make(chan time.Time, 1)
				go func() {
					c.each(func(a *actor) { a.mkdir() })
					done <- time.Now()
				}()
				time.Sleep(time.Second)
				c.settle(mdtName, c.nodes[3])
				c.wait(mdtName, c.nodes[3])
				began := time.Now()
				select {
				case at := <-done:
					if !told {
						c.fault("answered after %v, though nobody was told", at.Sub(began))
					}
					return
				case <-time.After(2 * time.Minute):
				}
				if told {
					c.fault("no answer within two minutes")
				}
				// By order: any word of a third party will do.
				for _, fe := range c.frontends() {
					fe.p.tell(mdtName, c.running(mdtName).front.Instance(), "n3")
				}
				<-done
			})
		})
	}
}

// News that come before the target takes connections cost nothing: who is told goes on
// trying, without long pauses: SM 101b.
func TestEarlyNews(t *testing.T) {
	imperative(t, func(w *world) {
		blind(w)
		w.optOut[mdtName] = true // it is told by hand, too early
	}, func(c *cluster) {
		c.state(ir.StateFull)
		c.each(func(a *actor) { a.mkdir() })
		m := c.homeOf(mdtName)
		next := c.running(mdtName).front.Instance() + 1
		m.die(true)
		for _, fe := range c.frontends() {
			fe.p.tell(mdtName, next, "n3")
		}
		time.Sleep(20 * time.Second) // pauses have become as long as they get
		c.settle(mdtName, c.nodes[3])
		c.eventually("the MDT takes connections", func() bool { return c.running(mdtName) != nil && c.homeOf(mdtName) == c.nodes[3] })
		began := time.Now()
		c.each(func(a *actor) { a.mkdir() })
		// A round of all addresses, one of which does not answer, and a pause.
		if d := time.Since(began); d > c.cfg.imports.ConnectTimeout+2*c.cfg.imports.BackoffMax+2*time.Second {
			c.fault("went on after %v", d)
		}
	})
}

// complete checks that the registry's table and that of a node have all targets as they
// run.
func (c *cluster) complete(n *node) {
	k := n.process().news.Status()
	at := map[string]ir.Target{}
	for _, x := range k.Targets {
		at[x.Name] = x
	}
	for _, t := range c.targets() {
		s := c.running(t)
		if s == nil {
			c.fault("%s does not run", t)
			continue
		}
		if x := at[t]; !x.Up || x.Instance != s.front.Instance() || x.Node != c.homeOf(t).name {
			c.fault("%s has %s as %+v, it runs as %d at %s", n.name, t, x, s.front.Instance(), c.homeOf(t).name)
		}
	}
	if len(at) != len(c.targets()) {
		c.fault("%d targets in the table", len(at))
	}
}

// A node that comes after a restart of the registry gets the whole table: SM 102,
// CS 27a.
func TestNewNodeGetsTableAfterRestartOfRegistry(t *testing.T) {
	imperative(t, nil, func(c *cluster) {
		c.state(ir.StateFull)
		c.nodes[5].die(true)
		time.Sleep(time.Second)
		c.nodes[1].die(false)
		c.nodes[5].boot()
		c.eventually("the registry runs", func() bool { _, _, ok := c.table(); return ok })
		c.nodes[1].boot()
		c.state(ir.StateFull)
		c.complete(c.nodes[1])
		c.complete(c.nodes[0])
	})
}

// A target that starts while there is no registry serves, and the table has it when the
// registry comes: SM 103, CS 27a.
func TestTargetStartsWithoutRegistry(t *testing.T) {
	imperative(t, nil, func(c *cluster) {
		c.state(ir.StateFull)
		c.nodes[5].die(true)
		for _, n := range []*node{c.nodes[2], c.nodes[3]} {
			c.crash(n, "kill", time.Second)
		}
		c.wait(mdtName, c.nodes[2])
		c.each(func(a *actor) { a.mkdir() })
		if st := c.wait(ostName(0), c.nodes[3]); st.Tenths != 0 {
			c.fault("shortened without a registry")
		}
		c.nodes[5].boot()
		c.state(ir.StateFull)
		c.complete(c.nodes[0])
	})
}

// A target that opts out is not waited for less, and nobody is told of it: SM 104.
func TestTargetOptsOut(t *testing.T) {
	imperative(t, func(w *world) { w.optOut[mdtName] = true }, func(c *cluster) {
		c.state(ir.StateFull)
		c.took(c.mdtWithFrontend(c.nodes[1], c.nodes[4]), false)
		c.state(ir.StateFull)
		for _, x := range c.nodes[0].process().news.Status().Targets {
			if x.NoIR != (x.Name == mdtName) {
				c.fault("%+v", x)
			}
		}
	})
}

// With one frontend that opts out the state is partial and the window whole; the others
// are told. When it has come back without, the state is full: SM 105, 001.112, 001.122.
func TestMixedClients(t *testing.T) {
	imperative(t, func(w *world) { w.optOut["n0"] = true }, func(c *cluster) {
		c.state(ir.StatePartial)
		if s, _, _ := c.table(); s.NonIR != 1 {
			c.fault("%d are not told", s.NonIR)
		}
		c.took(c.mdtWithFrontend(c.nodes[1], c.nodes[3]), false)
		c.heal()
		c.nodes[0].stop()
		c.mu.Lock()
		c.optOut["n0"] = false
		c.mu.Unlock()
		c.nodes[0].boot()
		c.serving()
		c.state(ir.StateFull)
		c.took(c.mdtWithFrontend(c.nodes[1], c.nodes[4]), true)
	})
}

// When the registry dies with the MDT on its node, it vouches for nobody when both come
// back: 001.117, CS 121, CS 27b.
func TestRegistryDiesWithMDT(t *testing.T) {
	imperative(t, nil, func(c *cluster) {
		c.settle(mgsName, c.nodes[2])
		c.state(ir.StateFull)
		was := c.homeOf(mdtName)
		c.each(func(a *actor) { a.mkdir() })
		c.nodes[1].die(true)
		was.die(true)
		c.settle(mgsName, c.nodes[3])
		c.settle(mdtName, c.nodes[3])
		c.took(c.wait(mdtName, c.nodes[3]), false)
		c.state(ir.StateFull)
		c.complete(c.nodes[0])
	})
}

// The registry moves, in order and by crashes, while targets restart and clients work;
// in the end its table is complete: CS 27b, CS 80, CS 121, SA 280, SA 900.
func TestRegistryMovesUnderLoad(t *testing.T) {
	imperative(t, nil, func(c *cluster) {
		c.state(ir.StateFull)
		c.load(150, func() {
			for i := range 6 {
				n := c.nodes[2+i%3]
				n.die(i%2 == 0)
				c.settle(mgsName, c.nodes[(i+3)%6])
				time.Sleep(time.Duration(100*i) * time.Millisecond)
				n.boot()
				if i%2 == 0 {
					c.settle(mgsName, c.nodes[(i+4)%6])
				}
				time.Sleep(3 * time.Second)
			}
		})
		c.settle(mgsName, c.nodes[5])
		for _, t := range c.targets() {
			c.wait(t, c.homeOf(t))
		}
		c.state(ir.StateFull)
		for _, n := range c.nodes {
			c.complete(n)
		}
	})
}
