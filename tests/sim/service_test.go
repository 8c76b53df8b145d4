package sim

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Scenarios of targets that are slow and not dead, of stops in bad moments, of several
// failures at once, of load over many failures, and of what an administrator is told.

// dials is how often a node, or anybody if it has no name, has begun to connect to a target.
func (c *cluster) dials(node, target string) (n int) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for key, k := range c.net.serial {
		from, to, _ := strings.Cut(key, ">")
		if strings.HasPrefix(to, target+"@") && (node == "" || node == from) {
			n += k
		}
	}
	return n
}

// evictions is how many clients a target has forgotten since its start.
func (c *cluster) evictions(target string) int {
	if s := c.running(target); s != nil {
		return s.front.Status().Recovery.Evicted
	}
	c.fault("%s does not run", target)
	return 0
}

// undisturbed runs f and checks that nobody was taken for dead meanwhile: no target has
// been connected to again, none has evicted anybody, no verifier has changed.
func (c *cluster) undisturbed(f func()) {
	type figures struct{ dials, evicted int }
	was := map[string]figures{}
	for _, t := range c.targets() {
		was[t] = figures{c.dials("", t), c.evictions(t)}
	}
	f()
	for _, t := range c.targets() {
		if is := (figures{c.dials("", t), c.evictions(t)}); is != was[t] {
			c.fault("%s: connects and evictions were %+v and are %+v though it is only slow", t, was[t], is)
		}
	}
	c.mu.Lock()
	n := c.seen["verifier changes"]
	c.mu.Unlock()
	if n > 0 {
		c.fault("%d verifier changes though nobody has died", n)
	}
}

// slowly has a target take so much longer for what may block, from now on.
func (c *cluster) slowly(target string, d time.Duration) {
	c.net.change(func() {
		if target == mdtName {
			c.home[mdtName].slow = d
			return
		}
		c.net.work = func(m *message) time.Duration {
			if m.c.target == target && m.op != wire.OpPing {
				return d
			}
			return 0
		}
	})
}

// patient has frontends wait for a target as long as it takes.
func patient(cfg *config) {
	cfg.apart = true
	cfg.patience = 10 * time.Minute
}

func slowScenarios(add func(string, func(*config), func(*cluster))) {
	// RS 65a, RS 65b, RS 67a, RS 67b, SM 9: requests take longer and longer, or much
	// longer from one moment to the next. The longest is beyond every time-out.
	for _, target := range []string{mdtName, ostName(0)} {
		for name, delays := range map[string][]time.Duration{
			"gradually": {200 * time.Millisecond, time.Second, 3 * time.Second, 8 * time.Second, 20 * time.Second, 3 * time.Second, 0},
			"suddenly":  {30 * time.Second, 0},
		} {
			add("slow-"+name+"-"+target, patient, func(c *cluster) {
				c.furnish()
				c.undisturbed(func() {
					for _, d := range delays {
						c.slowly(target, d)
						began := time.Now()
						c.each(func(a *actor) {
							a.createAs(wire.Guarded, -1)
							for _, p := range a.places(false)[:2] {
								a.writeAs(p.file(), 0, 4, 0, wire.FileSync)
								a.truncateTo(p.file(), 3)
								a.verify(p.file(), all, 0, 6)
							}
						})
						if took := time.Since(began); took < d {
							c.fault("all is done after %v, so nothing was slow", took)
						}
					}
				})
			})
		}
		// RS 66b: the way to the target takes longer, up to just below the time in which a
		// target has to answer a ping.
		add("far-away-"+target, patient, func(c *cluster) {
			c.furnish()
			c.undisturbed(func() {
				for _, d := range []time.Duration{100 * time.Millisecond, 500 * time.Millisecond, 1200 * time.Millisecond, 0} {
					c.net.change(func() {
						c.net.filter = func(m *message) (v verdict) {
							if m.c.target == target {
								v.delay = d
							}
							return v
						}
					})
					c.each(func(a *actor) {
						a.createAs(wire.Guarded, -1)
						a.writeAs(a.places(false)[0].file(), 0, 4, 0, wire.FileSync)
					})
					time.Sleep(10 * time.Second)
				}
			})
		})
	}
	// SA 903, SM 132: a truncate that takes long.
	add("slow-truncate", patient, func(c *cluster) {
		c.furnish()
		c.undisturbed(func() {
			c.net.change(func() {
				c.net.work = func(m *message) time.Duration {
					if m.op == wire.OpPunch {
						return 2 * time.Minute
					}
					return 0
				}
			})
			began := time.Now()
			c.each(func(a *actor) { a.truncateTo(a.places(false)[0].file(), 1) })
			if took := time.Since(began); took < 2*time.Minute {
				c.fault("the truncate took only %v", took)
			}
		})
	})
	// RO 9: what is asked for while a target waits for a missing client is answered, and
	// the connection by which it was asked stays.
	for _, target := range []string{mdtName, ostName(0)} {
		add("asked-in-recovery-"+target, patient, func(c *cluster) {
			c.furnish()
			a, b := c.actors[0], c.actors[1]
			missing := c.separate()
			c.serving()
			c.excused(clientID(missing.name), -1, "a frontend misses a recovery")
			n := c.homeOf(target)
			c.net.change(func() { c.net.blocked[[2]string{missing.name, n.name}] = true })
			c.crash(n, "power", 500*time.Millisecond)
			for s := c.running(target); s == nil || s.front.Status().Recovery.Finished == 0; s = c.running(target) {
				time.Sleep(50 * time.Millisecond)
			}
			asks := c.frontendOf(b).name
			dials, began := c.dials(asks, target), time.Now()
			b.createAs(wire.Guarded, -1)
			for _, p := range b.places(false) {
				b.writeAs(p.file(), 0, 4, 0, wire.FileSync)
			}
			if took := time.Since(began); took < time.Second {
				c.fault("answered after %v: the target did not recover", took)
			}
			if n := c.dials(asks, target) - dials; n > 0 {
				c.fault("%d connects to %s while it recovers", n, target)
			}
			c.net.change(func() { clear(c.net.blocked) })
			a.settle()
		})
	}
}

// several has all of a list of parts fail at once: "frontends" are the first two.
func (c *cluster) several(parts ...string) (down []*node) {
	for _, p := range parts {
		switch p {
		case "frontends":
			down = append(down, c.frontendOf(c.actors[0]), c.frontendOf(c.actors[1]))
		case "others":
			down = append(down, c.frontendOf(c.actors[2]), c.frontendOf(c.actors[3]))
		case "osts":
			for i := range c.osts {
				down = append(down, c.homeOf(ostName(i)))
			}
		default:
			down = append(down, c.homeOf(p))
		}
	}
	for _, n := range down {
		n.die(true)
	}
	return down
}

func severalScenarios(add func(string, func(*config), func(*cluster))) {
	four := func(cfg *config) { cfg.apart, cfg.fronts, cfg.vips, cfg.clients = true, 4, 4, 4 }
	// One after the other, the next before the ones before are back, or when they are
	// in recovery. SC double-scale, IN 10 to IN 14 with one metadata target.
	for name, parts := range map[string][]string{
		"mdt-frontends":       {mdtName, "frontends"},
		"ost-frontends":       {ostName(0), "frontends"},
		"frontends-mdt":       {"frontends", mdtName},
		"frontends-ost":       {"frontends", ostName(0)},
		"frontends-frontends": {"frontends", "others"},
		"mdt-ost-mdt":         {mdtName, ostName(0), mdtName},
		"mdt-frontends-mdt":   {mdtName, "frontends", mdtName},
		"mdt-osts-frontends":  {mdtName, "osts", "frontends"},
		"mdt-frontends-osts":  {mdtName, "frontends", "osts"},
		"osts-frontends-mdt":  {"osts", "frontends", mdtName},
	} {
		for _, back := range []bool{false, true} {
			add(fmt.Sprintf("several-%s-back-%v", name, back), four, func(c *cluster) {
				c.load(60, func() {
					var down []*node
					boot := func() {
						for _, n := range down {
							n.boot()
						}
						down = nil
					}
					for i, p := range parts {
						if back || slices.Contains(parts[:i], p) {
							time.Sleep(time.Second)
							boot()
							time.Sleep(1500 * time.Millisecond)
						}
						down = append(down, c.several(p)...)
						time.Sleep(400 * time.Millisecond)
					}
					time.Sleep(2 * time.Second)
					boot()
				})
			})
		}
	}
}

func stopScenarios(add func(string, func(*config), func(*cluster))) {
	// RD 33: several operations are under way when the MDT fails, their answers are lost, and
	// recovery is aborted without their frontend. Each of them has happened once, then and
	// after another failure.
	add("abort-with-many-under-way", func(cfg *config) {
		cfg.apart, cfg.fronts, cfg.vips, cfg.clients = true, 1, 1, 6
	}, func(c *cluster) {
		c.excused(wire.ClientID{}, -1, "recovery is aborted")
		fe, m := c.nodes[0], c.homeOf(mdtName)
		asked := 0
		c.net.change(func() {
			c.net.filter = func(m *message) (v verdict) {
				if m.op == wire.OpCreate {
					if !m.reply {
						asked++
					}
					v.cut = m.reply
				}
				return v
			}
		})
		done := make(chan bool)
		go func() { c.each(func(a *actor) { a.createAs(wire.Guarded, -1) }); close(done) }()
		time.Sleep(2 * time.Second)
		c.net.change(func() {
			if c.net.filter = nil; asked < len(c.actors) {
				c.trace("only %d of %d were asked for", asked, len(c.actors))
				asked = -1
			}
			c.net.blocked[[2]string{fe.name, m.name}] = true
		})
		if asked < 0 {
			c.fault("the operations were not under way together")
		}
		c.crash(m, "power", 500*time.Millisecond)
		for s := c.running(mdtName); s == nil || !s.front.Abort(); s = c.running(mdtName) {
			time.Sleep(50 * time.Millisecond)
		}
		c.net.change(func() { clear(c.net.blocked) })
		<-done
		c.each(func(a *actor) { a.final() })
		c.crash(m, "power", 500*time.Millisecond)
		c.each(func(a *actor) { a.final() })
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.seen["evictions by the MDT"] == 0 {
			c.faults = append(c.faults, "recovery was not aborted")
		}
	})
	// SM 149: a target stops while it removes objects, and does the rest when it is back.
	for _, which := range []string{mdtName, ostName(0)} {
		add("stop-while-removing-"+which, apart, func(c *cluster) {
			c.each(func(a *actor) {
				for range 30 {
					a.createAs(wire.Guarded, -1)
				}
				for _, p := range a.places(false) {
					a.writeCells(p.file(), 0, 2, 0)
					a.commit(p.file())
				}
			})
			destroyed := make(chan bool, 1000)
			c.net.change(func() {
				c.net.work = func(m *message) time.Duration {
					if m.op != wire.OpDestroy {
						return 0
					}
					select {
					case destroyed <- true:
					default:
					}
					return 2 * time.Second
				}
			})
			c.each(func(a *actor) {
				for _, p := range a.places(false) {
					a.remove(p)
				}
			})
			<-destroyed
			time.Sleep(time.Second)
			n, began := c.homeOf(which), time.Now()
			n.stop()
			if took := time.Since(began); took > 8*time.Second {
				c.fault("the stop took %v", took)
			}
			left := 0
			for i := range c.osts {
				if s := c.running(ostName(i)); s != nil {
					left += len(c.objects(i))
				}
			}
			if left < 10 {
				c.fault("only %d objects are left when the target has stopped", left)
			}
			c.net.change(func() { c.net.work = nil })
			n.boot()
			c.rest()
		})
	}
	// SM 111, CS 23b: a start of the MDT that fails leaves nothing behind: the next one works.
	for _, after := range []int{1, 2, 3} {
		add(fmt.Sprintf("start-fails-%d", after), apart, func(c *cluster) {
			c.furnish()
			m := c.homeOf(mdtName)
			m.die(true)
			c.mdt.failAfter(after)
			m.boot()
			time.Sleep(8 * time.Second)
			if s := c.running(mdtName); s != nil {
				c.fault("the MDT serves with a bad disk")
			}
			c.mdt.failAfter(0)
			c.servingMDT(false)
			c.mu.Lock()
			n := c.seen["failed starts"]
			c.mu.Unlock()
			if n == 0 {
				c.fault("no start has failed")
			}
			c.each(func(a *actor) { a.final() })
		})
	}
	// MM 1 to MM 5, MM 8: a second node opens the store of a target that is served, after all
	// kinds of times. It gets nothing, and the first one does not notice.
	for _, target := range []string{mdtName, ostName(0)} {
		for _, after := range []time.Duration{0, time.Second, 2 * time.Second, 4 * time.Second} {
			add(fmt.Sprintf("second-start-%v-%s", after, target), apart, func(c *cluster) {
				n := c.homeOf(target)
				n.die(false)
				n.boot()
				time.Sleep(after)
				if after > 0 {
					c.servingTarget(target)
				}
				other := c.nodes[0].process()
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				s, err := other.open(ctx, target, func(error) {})
				if err == nil && after > 0 {
					c.fault("%s was opened twice", target)
				}
				if s != nil { // it was first
					_ = s.stop(ctx)
					other.left(target, true)
				}
				c.servingTarget(target)
				c.each(func(a *actor) { a.createAs(wire.Guarded, -1); a.writeCells(a.places(false)[0].file(), 0, 3, 0) })
				c.mu.Lock()
				failed := c.seen["failed targets"]
				c.mu.Unlock()
				if failed > 0 {
					c.fault("the owner has lost its store")
				}
			})
		}
		// MM 5, MM 6: another node takes the target over while the first one stops it in order.
		add("hand-over-"+target, apart, func(c *cluster) {
			c.load(60, func() {
				for i := range 6 {
					c.mu.Lock()
					c.home[target] = c.nodes[(i*2+1)%len(c.nodes)]
					c.cond.Broadcast()
					c.mu.Unlock()
					time.Sleep(time.Duration(100+700*i) * time.Millisecond)
				}
			})
			c.servingTarget(target)
		})
	}
}

// servingTarget waits until a target serves.
func (c *cluster) servingTarget(target string) *service {
	for {
		if s := c.running(target); s != nil && s.front.Status().Serving {
			return s
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func toldScenarios(add func(string, func(*config), func(*cluster))) {
	// RS 160: how long after the start of recovery clients have come back.
	add("told-reconnects", func(cfg *config) { cfg.apart, cfg.fronts, cfg.vips = true, 3, 3 }, func(c *cluster) {
		n := c.homeOf(mdtName)
		late := c.nodes[0]
		c.net.change(func() { c.net.blocked[[2]string{late.name, n.name}] = true })
		c.crash(n, "power", 500*time.Millisecond)
		for c.running(mdtName) == nil || c.running(mdtName).front.Status().Recovery.Start.IsZero() {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(2100 * time.Millisecond) // of the window, which the first frontend begins
		if r := c.running(mdtName).front.Status().Recovery; r.Reconnects[0]+r.Reconnects[1] != 2 || r.Connected != 2 || r.Clients != 3 {
			c.fault("with one of three frontends away: %+v", r)
		}
		c.net.change(func() { clear(c.net.blocked) })
		r := c.servingMDT(false).front.Status().Recovery
		if r.Reconnects[0]+r.Reconnects[1] != 2 || r.Reconnects[2]+r.Reconnects[3] != 1 || r.Evicted != 0 {
			c.fault("two frontends came at once and one after more than 2 s: %+v", r)
		}
	})
	// SM 146: evictions are counted, each once, by the target that evicts.
	add("told-evictions", apart, func(c *cluster) {
		c.excused(wire.ClientID{}, -1, "evicted by order")
		c.furnish()
		for i, target := range []string{mdtName, ostName(0), mdtName} {
			was := map[string]int{}
			for _, t := range c.targets() {
				was[t] = c.evictions(t)
			}
			if !c.running(target).front.Evict(clientID(c.nodes[i%2].name)) {
				c.fault("%s does not know the frontend", target)
			}
			if c.running(target).front.Evict(wire.ClientID{1}) {
				c.fault("%s has evicted somebody that it does not know", target)
			}
			time.Sleep(5 * time.Second)
			c.each(func(a *actor) { a.createAs(wire.Guarded, -1); a.writeCells(a.places(false)[0].file(), 0, 3, 0) })
			was[target]++
			for _, t := range c.targets() {
				if n := c.evictions(t); n != was[t] {
					c.fault("%s: %d evictions, want %d", t, n, was[t])
				}
			}
		}
	})
	// SM 150: statfs is answered while an OST is away, without its space; while the MDT is
	// away it waits, and is answered then.
	add("told-space", apart, func(c *cluster) {
		a := c.actors[0]
		c.furnish()
		space := func() wire.Statfs {
			s, st, _ := ask(a, "statfs", func(fe *frontend, o client.Owner) (wire.Statfs, wire.Status) {
				return fe.fs.Statfs(context.Background(), o)
			})
			a.expect("statfs", st, wire.OK)
			return s
		}
		whole := space().Total
		if whole == 0 {
			c.fault("there is no space")
		}
		n := c.homeOf(ostName(0))
		n.die(false)
		time.Sleep(2 * c.cfg.imports.DeadAfter)
		began := time.Now()
		if s := space().Total; s != whole/2 || time.Since(began) > time.Second {
			c.fault("with one of two OSTs away %d of %d, after %v", s, whole, time.Since(began))
		}
		n.boot()
		c.servingTarget(ostName(0))
		m := c.homeOf(mdtName)
		m.die(false)
		got := make(chan wire.Statfs)
		go func() { got <- space() }()
		select {
		case <-got:
			c.fault("statfs without the MDT")
		case <-time.After(3 * time.Second):
			m.boot()
			if s := <-got; s.Total != whole {
				c.fault("%d of %d when everything is back", s.Total, whole)
			}
		}
	})
}

// serviceScenarios are all of this file.
func serviceScenarios() (l []scenario) {
	add := func(name string, cfg func(*config), run func(*cluster)) {
		l = append(l, scenario{name, cfg, false, run})
	}
	slowScenarios(add)
	severalScenarios(add)
	stopScenarios(add)
	toldScenarios(add)
	loadScenarios(add)
	raceScenarios(add)
	return l
}
