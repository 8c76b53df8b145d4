package sim

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// scenario is a sequence of faults that is known to be hard. Every one ends with all
// calls answered, everything at rest, contents as clients were told, and clean stores.
type scenario struct {
	name string
	cfg  func(*config)
	two  bool // one of the clients uses a two-node export
	run  func(*cluster)
}

// apart puts targets and frontends on nodes of their own: n0 and n1 are frontends,
// n2 has the MDT, n3 and n4 have OSTs.
func apart(cfg *config) { cfg.apart = true }

// together has the first node have everything but the second OST.
func together(cfg *config) {}

// TestScenarios runs the scenarios that have a name.
func TestScenarios(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			tracing = *simTrace
			cfg := defaultConfig()
			if s.cfg != nil {
				s.cfg(&cfg)
			}
			simulate(t, 1, cfg, fmt.Sprintf("go test ./tests/sim -v -sim.trace -run 'TestScenarios/%s$'", s.name), func(c *cluster) {
				c.serving()
				c.addActors(cfg.clients, s.two)
				if cfg.locks {
					c.addLockers(2)
				}
				s.run(c)
				c.heal()
				c.serving()
				c.finish()
			})
		})
	}
}

// frontendOf is the node that serves a client's address.
func (c *cluster) frontendOf(a *actor) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !a.v.ready {
		c.cond.Wait()
	}
	return a.v.owner.p.node
}

func (c *cluster) homeOf(target string) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.home[target]
}

// crash ends what is on a node, in one of the ways of ends, and starts it again.
func (c *cluster) crash(n *node, how string, down time.Duration) {
	in := &injector{cluster: c, rng: c.rand("crash")}
	switch how {
	case "none":
		return
	case "stop":
		n.stop()
	case "kill":
		n.die(false)
	case "power":
		n.die(true)
	case "take-over":
		n.die(true)
		in.takeOver(n)
	}
	time.Sleep(down)
	n.boot()
}

var ends = []string{"none", "kill", "power", "take-over", "stop"}

// lose breaks a connection before the next request with op, or its answer, is on its
// way; the result tells the target then.
func (c *cluster) lose(op wire.Op, reply bool) <-chan string {
	ch := make(chan string, 1)
	c.net.change(func() {
		c.net.filter = func(m *message) (v verdict) {
			if m.op != op || m.reply != reply {
				return v
			}
			c.net.filter = nil
			ch <- m.c.target
			return verdict{cut: true}
		}
	})
	return ch
}

// hold delays the next request with op from a node; the result tells that it is on
// its way.
func (c *cluster) hold(op wire.Op, from *node, d time.Duration) <-chan bool {
	ch := make(chan bool, 1)
	c.net.change(func() {
		c.net.filter = func(m *message) (v verdict) {
			if m.op == op && !m.reply && m.c.from.node == from {
				c.net.filter = nil
				ch <- true
				v.delay = d
			}
			return v
		}
	})
	return ch
}

// separate has the first two clients served by different frontends and returns that of
// the first.
func (c *cluster) separate() *node {
	fe := c.frontendOf(c.actors[0])
	if c.frontendOf(c.actors[1]) == fe {
		for _, n := range c.nodes {
			if n.front && n != fe {
				for n.frontend() == nil {
					time.Sleep(50 * time.Millisecond)
				}
				c.serve(c.actors[1].v, n.frontend())
			}
		}
	}
	return fe
}

// operations are all kinds of operations, as a client makes them; each checks the
// answer.
var operations = []struct {
	name string
	op   wire.Op
	do   func(a *actor)
}{
	{"mkdir", wire.OpMkdir, (*actor).mkdir},
	{"create", wire.OpCreate, func(a *actor) { a.createAs(wire.Unchecked, -1) }},
	{"create-size", wire.OpCreate, func(a *actor) { a.createAs(wire.Unchecked, 3) }},
	{"create-guarded", wire.OpCreate, func(a *actor) { a.createAs(wire.Guarded, -1) }},
	{"create-exclusive", wire.OpCreate, func(a *actor) { a.createAs(wire.Exclusive, -1) }},
	{"link", wire.OpLink, func(a *actor) { a.link(a.places(false)[0]) }},
	{"rename", wire.OpRename, func(a *actor) { a.renameTo(a.places(false)[0], place{a.root, a.newName()}) }},
	{"rename-over", wire.OpRename, func(a *actor) { a.renameTo(a.places(false)[0], a.places(false)[1]) }},
	{"remove", wire.OpRemove, func(a *actor) { a.remove(a.places(false)[0]) }},
	{"rmdir", wire.OpRmdir, (*actor).rmdir},
	{"chmod", wire.OpSetattr, func(a *actor) { a.chmod(a.places(false)[0].file()) }},
	{"truncate", wire.OpSetattr, func(a *actor) { a.truncateTo(a.places(false)[0].file(), 5) }},
	{"truncate-punch", wire.OpPunch, func(a *actor) { a.truncateTo(a.places(false)[1].file(), 1) }},
	{"write", wire.OpWrite, func(a *actor) { a.writeCells(a.places(false)[1].file(), 0, 4, 0) }},
	{"first-write", wire.OpOpenEpoch, func(a *actor) { a.writeCells(a.places(false)[2].file(), 0, 4, 0) }},
	{"close", wire.OpCloseEpoch, func(a *actor) {
		a.writeCells(a.places(false)[1].file(), 0, 4, 0)
		time.Sleep(5 * time.Second)
	}},
	{"getattr", wire.OpGetattr, func(a *actor) { a.getattr(a.places(false)[0].file()) }},
	{"lookup", wire.OpLookup, func(a *actor) { a.lookup(a.places(false)[0]) }},
	{"size", wire.OpObjAttr, func(a *actor) { a.getattr(a.places(false)[0].file()) }},
	{"read", wire.OpRead, func(a *actor) { a.verify(a.places(false)[0].file(), all, 0, 12) }},
	{"readdir", wire.OpReaddir, func(a *actor) { a.list(a.root) }},
	{"commit", wire.OpSyncObject, func(a *actor) { a.commit(a.places(false)[0].file()) }},
}

// furnish makes what operations need, and waits until nothing of it is open.
func (c *cluster) furnish() {
	c.each(func(a *actor) {
		for range 3 {
			a.createAs(wire.Guarded, -1)
		}
		a.mkdir()
		for _, p := range a.places(false)[:2] {
			a.writeCells(p.file(), 0, 8, 0)
		}
	})
	time.Sleep(5 * time.Second)
	a := c.actors[0]
	a.writeCells(a.places(false)[0].file(), 8, 12, 0)
	a.writeCells(a.places(false)[1].file(), 8, 12, 0)
}

// load has the clients work for a while, and runs f meanwhile.
func (c *cluster) load(ops int, f func()) {
	done := make(chan struct{})
	go func() {
		c.each(func(a *actor) { a.run(ops, 100*time.Millisecond, func() bool { return false }) })
		close(done)
	}()
	time.Sleep(500 * time.Millisecond)
	f()
	<-done
}

func scenarios() (l []scenario) {
	add := func(name string, cfg func(*config), two bool, run func(*cluster)) {
		l = append(l, scenario{name, cfg, two, run})
	}
	// Every operation: its request or its answer is lost, and then the target dies, or
	// the frontend does.
	for _, o := range operations {
		for _, what := range []string{"request", "answer"} {
			for _, end := range ends {
				add(strings.Join([]string{"op", o.name, what, end}, "-"), apart, false, func(c *cluster) {
					c.operation(c.actors[0], o.op, what, end, false, o.do)
				})
			}
			add(strings.Join([]string{"op", o.name, what, "frontend"}, "-"), apart, false, func(c *cluster) {
				c.operation(c.actors[0], o.op, what, "power", true, o.do)
			})
			if !o.op.Modifies() {
				continue
			}
			add(strings.Join([]string{"op", o.name, what, "two-node"}, "-"), apart, true, func(c *cluster) {
				c.operation(c.actors[1], o.op, what, "power", false, o.do)
			})
		}
	}
	// Any two of the parts fail close to each other, under load.
	parts := []string{mdtName, ostName(0), ostName(1), "frontend"}
	for _, first := range parts {
		for _, second := range parts {
			add(fmt.Sprintf("double-%s-%s", first, second), apart, true, func(c *cluster) {
				c.load(60, func() {
					n := c.part(first)
					n.die(true)
					time.Sleep(400 * time.Millisecond)
					if first == second {
						n.boot()
						time.Sleep(1500 * time.Millisecond) // in recovery
					}
					k := c.part(second)
					k.die(true)
					time.Sleep(2 * time.Second)
					n.boot()
					k.boot()
				})
			})
		}
	}
	for _, end := range ends[1:] {
		add("every-node-"+end, apart, true, func(c *cluster) {
			c.load(120, func() {
				for _, n := range c.nodes {
					c.crash(n, end, time.Second)
					time.Sleep(3 * time.Second)
				}
			})
		})
		add("mdt-empty-"+end, apart, false, func(c *cluster) {
			time.Sleep(5 * time.Second)
			c.crash(c.homeOf(mdtName), end, time.Second)
			c.each(func(a *actor) { a.createAs(wire.Guarded, -1); a.writeCells(a.places(false)[0].file(), 0, 3, 0) })
		})
		add("ost-unstable-"+end, apart, false, func(c *cluster) {
			c.each(func(a *actor) {
				for range 4 {
					a.createAs(wire.Guarded, -1)
				}
				for _, p := range a.places(false) {
					a.writeCells(p.file(), 0, 20, 0)
				}
			})
			c.crash(c.homeOf(ostName(0)), end, time.Second)
			c.each(func(a *actor) {
				for _, p := range a.places(false) {
					a.verify(p.file(), all, 0, 20)
				}
			})
			c.mu.Lock()
			n := c.seen["verifier changes"]
			c.mu.Unlock()
			if n > 0 {
				c.fault("%d verifier changes though frontends had the data", n)
			}
		})
		add("remove-while-ost-away-"+end, apart, false, func(c *cluster) {
			c.each(func(a *actor) {
				for range 40 {
					a.createAs(wire.Guarded, -1)
				}
				for _, p := range a.places(false) {
					a.writeCells(p.file(), 0, 2, 0)
					a.commit(p.file())
				}
			})
			n := c.homeOf(ostName(0))
			n.die(true)
			c.each(func(a *actor) {
				for _, p := range a.places(false) {
					a.remove(p)
				}
			})
			c.crash(c.homeOf(mdtName), end, time.Second)
			n.boot()
		})
	}
	add("ost-away-others-go-on", apart, false, func(c *cluster) {
		c.homeOf(ostName(0)).die(false)
		time.Sleep(5 * time.Second)
		c.each(func(a *actor) {
			for range 4 {
				a.createAs(wire.Guarded, -1)
				p := a.places(false)
				a.writeCells(p[len(p)-1].file(), 0, 3, 0)
			}
			for _, d := range a.dirs() {
				a.list(d)
			}
		})
	})
	add("frontend-starts-while-ost-away", apart, false, func(c *cluster) {
		c.homeOf(ostName(1)).die(false)
		fe := c.frontendOf(c.actors[0])
		fe.die(false)
		time.Sleep(time.Second)
		fe.boot()
		c.each(func(a *actor) { a.mkdir() })
	})
	// Writes of a frontend that hangs arrive after it was evicted, or after its address
	// has moved.
	for _, l := range []late{
		{name: "silent", silent: true, moved: true},
		{name: "evicted", mdt: true, moved: true},
		{name: "evicted-by-ost", ost: true, moved: true},
		{name: "evicted-by-all", mdt: true, ost: true},
		{name: "evicted-unmoved", mdt: true},
		{name: "evicted-while-ost-away", mdt: true, away: true},
		{name: "moved", moved: true},
	} {
		add("late-writes-"+l.name, apart, false, l.run)
	}
	// The old owner of a store hangs, another node takes it, the old one comes back.
	for _, target := range []string{mdtName, ostName(0)} {
		add("take-over-from-the-living-"+target, apart, false, func(c *cluster) {
			c.load(100, func() {
				n := c.homeOf(target)
				in := &injector{cluster: c, rng: c.rand("take-over")}
				c.net.change(func() { n.paused = true })
				in.takeOver(n)
				time.Sleep(12 * time.Second)
				c.net.change(func() { n.paused = false })
				time.Sleep(3 * time.Second)
				c.mu.Lock()
				c.home[target] = n
				c.cond.Broadcast()
				c.mu.Unlock()
			})
		})
	}
	// The size that one frontend reports arrives after another one has opened the file,
	// made it longer and closed it.
	add("old-close", apart, false, func(c *cluster) {
		a, b := c.actors[0], c.actors[1]
		held := c.hold(wire.OpCloseEpoch, c.separate(), 5*time.Second)
		s := c.shared[0]
		a.writeCells(s.views[a.id], a.id, a.id+1, 0)
		<-held
		b.writeCells(s.views[b.id], 20+b.id, 21+b.id, 0)
		time.Sleep(7 * time.Second)
		c.each(func(a *actor) { a.final() })
	})
	// The same of a frontend that has made the file and never used it.
	add("old-close-of-the-creator", apart, false, func(c *cluster) {
		a, b := c.actors[0], c.actors[1]
		fe := c.separate()
		time.Sleep(3 * time.Second)
		held := c.hold(wire.OpCloseEpoch, fe, 3*time.Second)
		s := a.share(wire.RootFID, "used by others")
		c.shared = append(c.shared, s)
		b.writeCells(s.views[b.id], 20+b.id, 21+b.id, 0)
		<-held
		time.Sleep(7 * time.Second)
		c.each(func(a *actor) { a.final() })
	})
	// The MDT leaves a frontend's process, with a write of that on the way.
	add("mdt-leaves-its-frontend", together, false, func(c *cluster) {
		a := c.actors[0]
		n := c.homeOf(mdtName)
		c.serve(a.v, n.frontend())
		for range 6 {
			a.createAs(wire.Guarded, -1)
		}
		sent := c.hold(wire.OpWrite, n, 3*time.Second)
		done := make(chan struct{})
		go func() {
			for _, p := range a.places(false) {
				a.writeCells(p.file(), 0, 8, 0)
			}
			close(done)
		}()
		<-sent
		c.mu.Lock()
		c.home[mdtName] = c.nodes[1]
		c.cond.Broadcast()
		c.mu.Unlock()
		<-done
		time.Sleep(3 * time.Second)
		a.final()
	})
	// A frontend dies with the OST in its process after it has cut files there; another one
	// writes them before the MDT knows that the first is dead, and finishes what it has left.
	add("truncates-of-the-absent", together, false, func(c *cluster) {
		a := c.actors[0]
		n, o := c.nodes[1], c.nodes[0]
		c.serve(a.v, n.frontend())
		for range 8 {
			a.createAs(wire.Guarded, -1)
		}
		for _, p := range a.places(false) {
			a.writeCells(p.file(), 0, 12, 0)
		}
		a.settle()
		time.Sleep(5 * time.Second)
		for _, p := range a.places(false) {
			a.truncateTo(p.file(), 1)
		}
		n.die(false)
		c.mu.Lock()
		for _, t := range c.targets() {
			c.home[t] = o
		}
		c.cond.Broadcast()
		c.mu.Unlock()
		for _, p := range a.places(false) {
			a.writeAs(p.file(), 4, 8, 0, wire.FileSync)
		}
		time.Sleep(2 * c.cfg.recovery.PingTimeout)
		a.final()
	})
	// A frontend misses the recovery of an OST that has lost its data: it has to tell its
	// clients, who write them again.
	add("unstable-lost", apart, false, func(c *cluster) {
		c.furnish()
		a := c.actors[0]
		for range 8 {
			a.createAs(wire.Guarded, -1)
		}
		for _, p := range a.places(false) {
			a.writeUnstable(p.file(), 0, 20)
		}
		c.excused(wire.ClientID{}, -1, "a frontend misses a recovery")
		n, fe := c.homeOf(ostName(0)), c.frontendOf(a)
		c.net.change(func() { c.net.blocked[[2]string{fe.name, n.name}] = true })
		c.crash(n, "power", 500*time.Millisecond)
		for s := c.running(ostName(0)); s == nil || !s.front.Abort(); s = c.running(ostName(0)) {
			time.Sleep(50 * time.Millisecond)
		}
		c.net.change(func() { clear(c.net.blocked) })
		a.settle()
		a.final()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.seen["verifier changes"] == 0 {
			c.faults = append(c.faults, "no verifier has changed")
		}
	})
	add("recovery-aborted", apart, false, func(c *cluster) {
		c.load(60, func() {
			in := &injector{cluster: c, rng: c.rand("abort")}
			for _, target := range []string{mdtName, ostName(0)} {
				in.excuseAll("recovery is aborted")
				n := c.homeOf(target)
				fe := c.frontendOf(c.actors[0])
				c.net.change(func() { c.net.blocked[[2]string{fe.name, n.name}] = true })
				c.crash(n, "power", 500*time.Millisecond)
				for s := c.running(target); s == nil || !s.front.Abort(); s = c.running(target) {
					time.Sleep(50 * time.Millisecond)
				}
				c.net.change(func() { clear(c.net.blocked) })
			}
		})
	})
	add("stop-in-recovery", apart, false, func(c *cluster) {
		c.load(60, func() {
			for _, target := range []string{mdtName, ostName(0)} {
				n := c.homeOf(target)
				fe := c.frontendOf(c.actors[0])
				c.net.change(func() { c.net.blocked[[2]string{fe.name, n.name}] = true })
				c.crash(n, "power", 500*time.Millisecond)
				for c.running(target) == nil {
					time.Sleep(50 * time.Millisecond)
				}
				n.stop()
				c.net.change(func() { clear(c.net.blocked) })
				n.boot()
			}
		})
	})
	for i, target := range []string{mdtName, ostName(0), ostName(1)} {
		add("frontend-stops-without-"+target, apart, false, func(c *cluster) {
			c.furnish()
			in := &injector{cluster: c, rng: c.rand("stop")}
			in.excuseAll("a frontend could not leave")
			c.homeOf(target).die(i%2 == 0)
			fe := c.frontendOf(c.actors[0])
			fe.stop()
			time.Sleep(time.Second)
			fe.boot()
		})
	}
	add("one-of-two-frontends-lost-with-the-mdt", apart, true, func(c *cluster) {
		c.load(60, func() {
			fe := c.frontendOf(c.actors[0])
			fe.die(true)
			c.crash(c.homeOf(mdtName), "power", time.Second)
			time.Sleep(c.cfg.recovery.SoftMax)
			fe.boot()
		})
	})
	for _, end := range ends[1:] {
		add("everything-on-one-node-"+end, together, false, func(c *cluster) {
			c.load(60, func() { c.crash(c.nodes[0], end, time.Second) })
		})
	}
	l = append(l, sizeScenarios()...)
	l = append(l, orphanScenarios()...)
	l = append(l, lockScenarios()...)
	return append(l, serviceScenarios()...)
}

// late is what happens to a frontend while it hangs, with writes on the way.
type late struct {
	name     string
	silent   bool // for so long that everybody takes it for dead
	mdt, ost bool // by whom it is evicted
	moved    bool // another frontend takes its address
	away     bool // the MDT does not reach the OST when it evicts the frontend
}

func (l *late) run(c *cluster) {
	c.furnish()
	a, fe := c.actors[0], c.frontendOf(c.actors[0])
	c.excused(wire.ClientID{}, -1, "a frontend hung")
	f := a.places(false)[0].file()
	m := c.homeOf(mdtName)
	o := c.homeOf(ostName(int(c.layout(a, f).OST[0])))
	block := func(v bool) {
		c.net.change(func() {
			c.net.blocked[[2]string{m.name, o.name}], c.net.blocked[[2]string{o.name, m.name}] = v, v
		})
	}
	if l.away {
		block(true)
		time.Sleep(c.cfg.imports.DeadAfter + 2*c.cfg.imports.PingInterval)
		a.writeCells(f, 8, 10, 0) // the epoch is open
	}
	sent := make(chan bool, 1)
	c.net.change(func() {
		c.net.filter = func(m *message) (v verdict) {
			if m.op == wire.OpWrite && !m.reply {
				c.net.filter = nil
				sent <- true
				v.delay = 100 * time.Millisecond
			}
			return v
		}
	})
	done := make(chan struct{})
	go func() { a.writeCells(f, 10, 16, 0); close(done) }()
	<-sent
	c.net.change(func() { fe.paused = true })
	if l.silent {
		time.Sleep(2 * c.cfg.recovery.PingTimeout)
	}
	if l.mdt {
		c.running(mdtName).front.Evict(clientID(fe.name))
	}
	if l.away {
		time.Sleep(500 * time.Millisecond)
		block(false)
	}
	if l.ost {
		for i := range c.osts {
			c.running(ostName(i)).front.Evict(clientID(fe.name))
		}
	}
	if l.moved {
		c.depose(a.v, fe.frontend())
		<-done // by the other frontend
		a.writeCells(f, 9, 12, 0)
		a.commit(f)
		if l.silent || l.mdt {
			a.truncateTo(f, 1)
		}
	}
	time.Sleep(4 * time.Second)
	c.net.change(func() { fe.paused = false })
	<-done
	time.Sleep(3 * time.Second)
	a.final()
	c.mu.Lock()
	n := c.seen["evictions by the MDT"]
	c.mu.Unlock()
	if (n > 0) != (l.silent || l.mdt) {
		c.fault("the MDT has evicted %d", n)
	}
}

func (c *cluster) layout(a *actor, f *file) wire.Layout {
	at, st, _ := ask(a, "layout", func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) { return fe.getattr(o, f.fid) })
	a.expect("layout", st, wire.OK)
	return at.Layout
}

// part is the node with a target, or the one that serves the first client.
func (c *cluster) part(name string) *node {
	if name == "frontend" {
		return c.frontendOf(c.actors[0])
	}
	return c.homeOf(name)
}

// operation has a client do something whose request or answer is lost, and then lets
// the target that it was for die, or the frontend.
func (c *cluster) operation(a *actor, op wire.Op, what, end string, frontend bool, do func(*actor)) {
	c.furnish()
	lost := c.lose(op, what == "answer")
	done := make(chan struct{})
	go func() { do(a); close(done) }()
	var n *node
	select {
	case target := <-lost:
		n = c.homeOf(target)
	case <-done:
		c.fault("no message was lost")
		return
	}
	if frontend {
		n = c.frontendOf(a)
	}
	c.crash(n, end, time.Second)
	<-done
	a.final()
}
