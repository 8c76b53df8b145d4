package sim

import (
	"fmt"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Scenarios of messages and connections that are lost in certain moments, of which
// random runs make many by chance.

// is chooses requests of an operation, replays or others.
func is(op wire.Op, replay bool) func(*message) bool {
	return func(m *message) bool {
		if m.op != op {
			return false
		}
		q := m.request()
		return (q.Flags&wire.FlagReplay != 0) == replay
	}
}

// cuts breaks connections before every message that pred chooses.
func (c *cluster) cuts(pred func(*message) bool) {
	c.net.change(func() {
		c.net.filter = func(m *message) verdict { return verdict{cut: pred(m)} }
	})
}

// again has a target fail and gives its state when it serves once more.
func (c *cluster) again(target string) *service {
	c.crash(c.homeOf(target), "power", 500*time.Millisecond)
	return c.servingTarget(target)
}

func raceScenarios(add func(string, func(*config), func(*cluster))) {
	// RS 53c, RS 53g, RS 53h, SM 21c, SM 21g, SM 21h: the opening and the closing of an IO
	// epoch are lost, both in one life of it. SM 22: others go on meanwhile.
	for _, x := range [][2]string{{"request", "request"}, {"answer", "request"}, {"request", "answer"}, {"answer", "answer"}} {
		add("both-lost-"+x[0]+"-"+x[1], apart, func(c *cluster) {
			c.furnish()
			a, b := c.actors[0], c.actors[1]
			f := a.places(false)[2].file()
			opened := c.loseThat(x[0] == "answer", is(wire.OpOpenEpoch, false))
			a.writeUnstable(f, 0, 4)
			<-opened
			closed := c.loseThat(x[1] == "answer", func(m *message) bool {
				if m.op != wire.OpCloseEpoch {
					return false
				}
				q := m.request()
				return slices.ContainsFunc(q.Epochs, func(e wire.EpochClose) bool { return e.FID == f.fid })
			})
			<-closed
			for range 5 {
				b.mkdir()
				b.createAs(wire.Guarded, -1)
			}
			time.Sleep(5 * time.Second)
			if at := c.attr(a, f); at.EpochOpen || at.Size != 4*cellSize {
				c.fault("epoch open %v, size %d", at.EpochOpen, at.Size)
			}
		})
	}
	// RS 93a: a client that is through with its replay, and waits for others, loses its connection.
	for _, target := range []string{mdtName, ostName(0)} {
		add("cut-while-waiting-"+target, apart, func(c *cluster) {
			c.furnish()
			missing := c.nodes[0]
			n := c.homeOf(target)
			c.net.change(func() { c.net.blocked[[2]string{missing.name, n.name}] = true })
			c.crash(n, "power", 500*time.Millisecond)
			for s := c.running(target); s == nil || s.front.Status().Recovery.Finished == 0; s = c.running(target) {
				time.Sleep(50 * time.Millisecond)
			}
			if k := c.net.cutAll(func(k *conn) bool { return k.target == target && k.from.node == c.nodes[1] }); k == 0 {
				c.fault("there was no connection")
			}
			time.Sleep(time.Second)
			c.net.change(func() { clear(c.net.blocked) })
			if r := c.servingTarget(target).front.Status().Recovery; r.Evicted > 0 {
				c.fault("somebody was evicted: %+v", r)
			}
		})
	}
	// RD 11: two clients lose their connections in replay; RD 10: the answer to a replayed
	// removal is lost; RD 8: what is replayed had been sent twice before.
	add("all-cut-in-replay", apart, func(c *cluster) {
		c.allTwoNode()
		c.each(func(a *actor) { a.createAs(wire.Guarded, -1); a.mkdir() })
		cut := map[*node]bool{}
		c.cuts(func(m *message) bool {
			if m.reply || m.c.target != mdtName || cut[m.c.from.node] {
				return false
			}
			q := m.request()
			if q.Flags&wire.FlagReplay == 0 {
				return false
			}
			cut[m.c.from.node] = true
			return true
		})
		if r := c.again(mdtName).front.Status().Recovery; r.Evicted > 0 || r.Replayed == 0 {
			c.fault("%+v", r)
		}
		if len(cut) < 2 {
			c.fault("%d connections were cut", len(cut))
		}
		c.each(func(a *actor) { a.final() })
	})
	add("answer-to-replayed-removal", apart, func(c *cluster) {
		c.allTwoNode()
		a := c.actors[0]
		a.createNamed(a.root, "x")
		c.committed()
		a.remove(place{a.root, "x"})
		lost := c.loseThat(true, is(wire.OpRemove, true))
		if r := c.again(mdtName).front.Status().Recovery; r.Evicted > 0 {
			c.fault("%+v", r)
		}
		<-lost
		a.final()
	})
	add("sent-twice-then-replayed", apart, func(c *cluster) {
		c.allTwoNode()
		a := c.actors[0]
		lost := c.loseThat(true, is(wire.OpMkdir, false))
		c.committed()
		c.slowly(mdtName, 30*time.Second) // it is not committed meanwhile
		a.mkdir()
		<-lost
		c.slowly(mdtName, 0)
		if r := c.again(mdtName).front.Status().Recovery; r.Replayed == 0 || r.Failed > 0 {
			c.fault("%+v", r)
		}
		a.final()
	})
	// RD 20: a lost client is waited for once. CS 84: one that always comes back and is
	// never through is waited for until the hard limit.
	add("lost-once", apart, func(c *cluster) {
		c.excused(wire.ClientID{}, -1, "a frontend is lost")
		c.nodes[0].die(true)
		var took []time.Duration
		for range 4 {
			r := c.again(mdtName).front.Status().Recovery
			took = append(took, r.End.Sub(r.Start))
		}
		if took[0] < c.cfg.recovery.SoftMin || slices.Max(took[1:]) > c.cfg.recovery.SoftMin/2 {
			c.fault("recoveries took %v", took)
		}
		c.nodes[0].boot()
	})
	add("never-through", apart, func(c *cluster) {
		c.excused(wire.ClientID{}, -1, "a frontend is evicted")
		bad := c.nodes[0]
		c.cuts(func(m *message) bool {
			if m.reply || m.c.target != mdtName || m.c.from.node != bad {
				return false
			}
			q := m.request()
			return q.Flags&wire.FlagLastReplay != 0
		})
		r := c.again(mdtName).front.Status().Recovery
		if d := r.End.Sub(r.Start); r.Evicted != 1 || d > c.cfg.recovery.Hard+time.Second || d < c.cfg.recovery.SoftMin {
			c.fault("%v, %+v", d, r)
		}
	})
	// RV 13: a client that comes late because of a slow network is waited for, and nothing is
	// taken for lost.
	add("slow-return", apart, func(c *cluster) {
		c.allTwoNode()
		c.each(func(a *actor) { a.createAs(wire.Guarded, -1) })
		late, m := c.nodes[0], c.homeOf(mdtName)
		c.net.change(func() { c.net.blocked[[2]string{late.name, m.name}] = true })
		c.crash(m, "power", 500*time.Millisecond)
		for c.running(mdtName) == nil {
			time.Sleep(50 * time.Millisecond)
		}
		time.Sleep(c.cfg.recovery.SoftMin - time.Second)
		c.net.change(func() { clear(c.net.blocked) })
		if r := c.servingMDT(false).front.Status().Recovery; r.Evicted > 0 || r.VersionRecovery || r.Replayed == 0 {
			c.fault("%+v", r)
		}
		c.each(func(a *actor) { a.final() })
	})
	// SM 18c, SM 147, RS 44a, CS 5e: connects get lost, or arrive long after later ones.
	for _, what := range []string{"request", "answer", "late"} {
		for _, evicted := range []bool{false, true} {
			add(fmt.Sprintf("connects-%s-evicted-%v", what, evicted), apart, func(c *cluster) {
				c.furnish()
				fe := c.separate()
				c.serving()
				n := 0
				c.net.change(func() {
					c.net.filter = func(m *message) (v verdict) {
						if m.op == wire.OpConnect && m.c.target == mdtName && m.c.from.node == fe && m.reply == (what == "answer") && n < 4 {
							if n++; what == "late" {
								v.delay = 3 * time.Second
							} else {
								v.cut = true
							}
						}
						return v
					}
				})
				if evicted {
					c.excused(wire.ClientID{}, -1, "the MDT evicts a frontend")
					c.servingMDT(false).front.Evict(clientID(fe.name))
				} else {
					c.net.cutAll(func(k *conn) bool { return k.target == mdtName && k.from.node == fe })
				}
				began := time.Now()
				c.actors[0].mkdir()
				if d := time.Since(began); n < 4 || d > 4*(c.cfg.imports.ConnectTimeout+c.cfg.imports.BackoffMax)+5*time.Second {
					c.fault("answered after %v and %d connects", d, n)
				}
			})
		}
	}
	// SM 155: frontends start anew, and then the MDT fails.
	add("frontends-then-mdt", apart, func(c *cluster) {
		c.furnish()
		for _, n := range c.nodes[:2] {
			n.stop()
			n.boot()
		}
		c.serving()
		c.each(func(a *actor) { a.createAs(wire.Guarded, -1); a.final() })
		if r := c.again(mdtName).front.Status().Recovery; r.Evicted > 0 {
			c.fault("%+v", r)
		}
		c.each(func(a *actor) { a.final() })
	})
	// RS 200: an answer to a ping that stays away for a while breaks nothing. RS 201: an OST
	// that stops holds up neither its own stop nor others.
	add("pings-late", apart, func(c *cluster) {
		c.furnish()
		c.undisturbed(func() {
			c.net.change(func() {
				c.net.filter = func(m *message) (v verdict) {
					if m.op == wire.OpPing && m.reply {
						v.delay = c.cfg.imports.DeadAfter - 500*time.Millisecond
					}
					return v
				}
			})
			time.Sleep(20 * time.Second)
		})
	})
	add("ost-stops", apart, func(c *cluster) {
		c.furnish()
		n, began, evicted := c.homeOf(ostName(0)), time.Now(), c.evictions(mdtName)
		n.stop()
		if d := time.Since(began); d > 3*time.Second {
			c.fault("the stop took %v", d)
		}
		began = time.Now()
		c.each(func(a *actor) { a.mkdir(); a.list(a.root) })
		if d := time.Since(began); d > 3*time.Second || c.evictions(mdtName) != evicted {
			c.fault("others took %v, %d evictions", d, c.evictions(mdtName)-evicted)
		}
		n.boot()
	})
	// SM 161: an OST takes the MDT for dead; what is removed is destroyed nevertheless.
	add("mdt-evicted-by-osts", apart, func(c *cluster) {
		c.furnish()
		for i := range c.osts {
			if !c.servingTarget(ostName(i)).front.Evict(host.AgentID(mdtName)) {
				c.fault("OST %d does not know the MDT", i)
			}
		}
		c.each(func(a *actor) { a.remove(a.places(false)[0]) })
		c.rest()
	})
	// CS 101a, CS 101b, CS 50d: an OST comes and goes while files are made on it.
	add("creates-while-ost-flaps", apart, func(c *cluster) {
		c.load(60, func() {
			for range 60 {
				time.Sleep(100 * time.Millisecond)
				c.net.cutAll(func(k *conn) bool { return k.target == ostName(0) })
			}
		})
	})
	// SM 112a: a write is sent again while its original is still being executed, and followed
	// by another one.
	add("beside-its-original", apart, func(c *cluster) {
		c.furnish()
		a := c.actors[0]
		f := a.places(false)[0].file()
		target := ostName(int(c.layout(a, f).OST[0]))
		n := 0
		c.net.change(func() {
			c.net.work = func(m *message) time.Duration {
				if m.op != wire.OpWrite || n > 0 {
					return 0
				}
				n++
				return 4 * time.Second
			}
		})
		began, done := time.Now(), make(chan bool)
		go func() { a.writeUnstable(f, 0, 6); close(done) }()
		time.Sleep(500 * time.Millisecond)
		c.net.cutAll(func(k *conn) bool { return k.target == target })
		<-done
		a.writeUnstable(f, 2, 4)
		time.Sleep(6*time.Second - time.Since(began))
		if n == 0 {
			c.fault("no write was slow")
		}
		a.final()
	})
	// SA 224c: one of two OSTs that have stripes of a file dies while it is written.
	add("striped-write-ost-dies", func(cfg *config) { apart(cfg); cfg.stripes = 2 }, func(c *cluster) {
		a := c.actors[0]
		a.createAs(wire.Guarded, -1)
		f := a.places(false)[0].file()
		lost := c.loseThat(false, func(m *message) bool { return m.op == wire.OpWrite && m.c.target == ostName(1) })
		done := make(chan bool)
		go func() { a.writeUnstable(f, 100, 160); close(done) }() // the boundary is at 128
		<-lost
		c.crash(c.homeOf(ostName(1)), "power", time.Second)
		<-done
		a.verify(f, all, 96, 70)
	})
	// RD 31, CS 90a: more calls than reply slots are under way when the MDT fails.
	add("slots-busy", func(cfg *config) {
		cfg.apart, cfg.fronts, cfg.vips, cfg.clients, cfg.imports.Slots = true, 1, 1, 24, 4
	}, func(c *cluster) {
		m := c.homeOf(mdtName)
		c.slowly(mdtName, 2*time.Second)
		done := make(chan bool)
		go func() { c.each(func(a *actor) { a.mkdir() }); close(done) }()
		time.Sleep(500 * time.Millisecond)
		if st := c.nodes[0].frontend().fs.MDTImport().Stats(); st.FreeSlots != 0 || st.Unanswered > 4+2 || st.Waiting < 10 {
			c.fault("%+v", st)
		}
		c.net.change(func() { m.slow = 0 })
		c.crash(m, "power", 500*time.Millisecond)
		<-done
		c.each(func(a *actor) { a.final() })
	})
}
