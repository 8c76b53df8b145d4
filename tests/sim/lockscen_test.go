package sim

import (
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// lockOps are calls of the lock manager, as the first locker makes them after the second
// one has prepared what is needed.
var lockOps = []struct {
	name string
	op   wire.Op
	do   func(c *cluster, a, b *actor)
}{
	{"lock", wire.OpLock, func(c *cluster, a, b *actor) {
		l := a.lock(c.lockFile.f, 0, 2, true, 0)
		if l == nil {
			c.fault("the lock is not given though nobody has it")
			return
		}
		c.holders(1, 0)
		if b.lock(c.lockFile.f, 1, 2, true, 0) != nil {
			c.fault("the lock is given twice")
		}
		a.reclaim(l)
		a.unlock(l)
	}},
	{"wait", wire.OpLock, func(c *cluster, a, b *actor) {
		held := b.locked
		b.locked = nil
		done := make(chan *lock)
		go func() { done <- a.lock(c.lockFile.f, 0, 2, true, 5*time.Minute) }()
		time.Sleep(20 * time.Second)
		c.holders(1, 1)
		b.reclaim(held)
		b.unlock(held)
		if l := <-done; l == nil {
			c.fault("who waits gets no lock though it is free")
		} else {
			c.holders(1, 0)
			a.reclaim(l)
			a.unlock(l)
		}
	}},
	{"unlock", wire.OpUnlock, func(c *cluster, a, b *actor) {
		if l := a.lock(c.lockFile.f, 0, 2, true, 0); l != nil {
			a.unlock(l)
		}
		c.holders(0, 0)
	}},
	{"cancel", wire.OpLockCancel, func(c *cluster, a, b *actor) {
		held := b.locked
		b.locked = nil
		if a.lock(c.lockFile.f, 0, 2, true, time.Second) != nil {
			c.fault("the lock is given twice")
		}
		b.reclaim(held)
		c.holders(1, 0)
		b.unlock(held)
		c.holders(0, 0)
	}},
}

// holders checks how many locks the table has, and how many requests that wait.
func (c *cluster) holders(held, waiting int) {
	l, st := c.lockTable()
	for i := range l {
		if l[i].State == wire.LockWaiting {
			waiting--
		} else {
			held--
		}
	}
	if st != wire.OK || held != 0 || waiting != 0 {
		c.fault("the lock table has %v, %+v: %d locks and %d waiting requests are missing", st, l, held, waiting)
	}
}

// loseThat breaks the connection before the next request that pred chooses, or before its
// answer, is on its way; the result tells the target then. pred is called with the
// network's lock held.
func (c *cluster) loseThat(reply bool, pred func(*message) bool) <-chan string {
	ch := make(chan string, 1)
	var chosen *conn
	var tag uint64
	c.net.change(func() {
		c.net.filter = func(m *message) (v verdict) {
			switch {
			case chosen == nil && !m.reply && pred(m):
				if chosen, tag = m.c, m.tag; reply {
					return v
				}
			case m.reply && m.c == chosen && m.tag == tag:
			default:
				if chosen != nil && chosen.cut {
					chosen = nil // it has broken before
				}
				return v
			}
			c.net.filter = nil
			ch <- m.c.target
			return verdict{cut: true}
		}
	})
	return ch
}

// grants tells whether a message tells a frontend of locks that were given.
func (m *message) grants() bool {
	var rep wire.Reply
	if !m.reply || m.op != wire.OpLockPoll {
		return false
	}
	if _, err := wire.DecodeReply(m.head, m.op, &rep); err != nil {
		m.c.n.w.trace("reply of %s does not decode: %v", m.c.target, err)
		return false
	}
	return rep.Lock != nil && len(rep.Lock.Grants) > 0
}

// strike does to the MDT, or to the first locker's frontend, what end says.
func (c *cluster) strike(end string) {
	m, fe := c.homeOf(mdtName), c.frontendOf(c.lockers[0])
	switch end {
	case "frontend":
		c.crash(fe, "power", time.Second)
	case "frontend-stop":
		c.crash(fe, "stop", time.Second)
	case "evicted":
		c.excused(wire.ClientID{}, -1, "the MDT evicts a frontend")
		c.servingMDT(false).front.Evict(clientID(fe.name))
	default:
		c.crash(m, end, time.Second)
	}
}

// lockScenarios are those of clients that take locks.
func lockScenarios() (l []scenario) {
	add := func(name string, run func(*cluster)) {
		l = append(l, scenario{"locks-" + name, func(cfg *config) { cfg.apart, cfg.locks = true, true }, false, func(c *cluster) {
			c.separate()
			c.serving()
			run(c)
			for _, a := range c.lockers {
				if a.locked != nil {
					a.reclaim(a.locked)
					a.unlock(a.locked)
				}
			}
		}})
	}
	// Each call's request or its answer is lost, while the MDT or the frontend fails, the
	// frontend stops or is evicted: SM 66, SM 113, SM 120, RS 36, CS 33b, SN 110.
	for _, o := range lockOps {
		for _, what := range []string{"request", "answer"} {
			for _, end := range []string{"none", "kill", "power", "stop", "frontend", "frontend-stop", "evicted"} {
				add(fmt.Sprintf("%s-%s-%s", o.name, what, end), func(c *cluster) {
					a, b := c.lockers[0], c.lockers[1]
					if o.name == "wait" || o.name == "cancel" {
						b.locked = b.lock(c.lockFile.f, 0, 1, false, 0)
					}
					fe := c.frontendOf(a)
					lost := c.loseThat(what == "answer", func(m *message) bool { return m.op == o.op && m.c.from.node == fe })
					done := make(chan bool)
					go func() { o.do(c, a, b); close(done) }()
					select {
					case <-lost:
					case <-done:
						c.fault("no message was lost")
						return
					}
					c.strike(end)
					<-done
				})
			}
		}
	}
	// SM 10c, SM 10e: a lock is given to who waits while his frontend loses the connection
	// to the MDT: before it hears of it, or when the client has answered the callback and the
	// MDT does not know yet. With failures of both ends in that moment.
	for name, at := range map[string]func(*message) bool{
		"grant":           func(m *message) bool { return m.grants() },
		"answer-request":  func(m *message) bool { return !m.reply && m.op == wire.OpLockGrantDone },
		"answer-answered": func(m *message) bool { return m.reply && m.op == wire.OpLockGrantDone },
	} {
		for _, end := range []string{"none", "kill", "power", "frontend", "frontend-stop", "evicted"} {
			add("callback-"+name+"-"+end, func(c *cluster) {
				a, b := c.lockers[0], c.lockers[1]
				a.again = time.Hour // it relies on the callback
				held := b.lock(c.lockFile.f, 0, 2, true, 0)
				got := make(chan *lock)
				go func() { got <- a.lock(c.lockFile.f, 0, 2, true, 5*time.Minute) }()
				for l, _ := c.lockTable(); len(l) < 2; l, _ = c.lockTable() {
					time.Sleep(100 * time.Millisecond)
				}
				lost := make(chan bool, 1)
				c.net.change(func() {
					c.net.filter = func(m *message) (v verdict) {
						if at(m) {
							c.net.filter = nil
							lost <- true
							v.cut = true
						}
						return v
					}
				})
				b.reclaim(held)
				b.unlock(held)
				<-lost
				c.strike(end)
				l := <-got
				if l == nil {
					c.fault("who waits gets no lock though it is free")
					return
				}
				if b.lock(c.lockFile.f, 1, 2, false, 0) != nil {
					c.fault("the lock is given twice")
				}
				time.Sleep(5 * time.Second)
				c.holders(1, 0)
				a.reclaim(l)
				a.unlock(l)
			})
		}
	}
	// RS 121: the frontend of the holder of a lock dies. While his reclaim is lost on its
	// way, another client asks for the lock, waits, and gets it when it is given back.
	for _, what := range []string{"request", "answer"} {
		for _, end := range []string{"none", "power", "frontend", "evicted"} {
			add(fmt.Sprintf("reclaim-%s-%s", what, end), func(c *cluster) {
				a, b := c.lockers[0], c.lockers[1]
				l := a.lock(c.lockFile.f, 0, 2, true, 0)
				nsm := a.nsm()
				c.crash(c.frontendOf(a), "power", time.Second)
				c.serving()
				if a.nsm() == nsm {
					c.fault("the address has the old NSM state after a crash")
				}
				lost := c.loseThat(what == "answer", func(m *message) bool {
					if m.op != wire.OpLock {
						return false
					}
					q := m.request()
					return q.Lock.Reclaim
				})
				reclaimed, got := make(chan bool), make(chan *lock)
				go func() { a.reclaim(l); close(reclaimed) }()
				<-lost
				go func() { got <- b.lock(c.lockFile.f, 1, 2, true, 5*time.Minute) }()
				c.strike(end)
				<-reclaimed
				a.reclaim(l) // the frontend may have died again
				time.Sleep(10 * time.Second)
				c.holders(1, 1)
				a.unlock(l)
				if l := <-got; l == nil {
					c.fault("who waits gets no lock though it is free")
				} else {
					b.unlock(l)
				}
			})
		}
	}
	// SM 130a, SM 130b: the file is removed while the frontend cannot hear that a lock of it
	// was given; what it sends again finds no file, and no lock is left.
	for _, what := range []string{"request", "answer"} {
		for _, end := range []string{"none", "power", "evicted"} {
			add(fmt.Sprintf("removed-%s-%s", what, end), func(c *cluster) {
				a, b := c.lockers[0], c.actors[1]
				fe, m := c.frontendOf(a), c.homeOf(mdtName)
				lost := c.loseThat(what == "answer", func(m *message) bool { return m.op == wire.OpLock && m.c.from.node == fe })
				st := make(chan wire.Status)
				f := c.lockFile.f.fid
				go func() {
					st <- a.lockCall(wire.OpLock, &lock{a: a, f: f, r: wire.LockRange{End: 99}, excl: true}, wire.LockArgs{Monitor: true})
				}()
				<-lost
				c.net.change(func() { c.net.blocked[[2]string{fe.name, m.name}] = true })
				time.Sleep(time.Second)
				rep, _ := b.modify("remove", wire.Request{Header: hdr(wire.OpRemove), FID: wire.RootFID, Name: []byte("locked")})
				b.expect("remove", rep.Status, wire.OK)
				c.strike(end)
				c.net.change(func() { delete(c.net.blocked, [2]string{fe.name, m.name}) })
				// It was given, or the file was not there any more.
				if s := <-st; s != wire.ErrStale && (s != wire.OK || what == "request") {
					c.fault("lock of a removed file: %v", s)
				}
				c.holders(0, 0)
			})
		}
	}
	// A frontend that takes an address over is evicted by the MDT while it begins the lock
	// service: it does so once more, and serves.
	for _, what := range []string{"request", "answer"} {
		add("begin-"+what+"-evicted", func(c *cluster) {
			a := c.lockers[0]
			l := a.lock(c.lockFile.f, 0, 2, true, 0)
			c.excused(wire.ClientID{}, -1, "the MDT evicts a frontend")
			lost := c.loseThat(what == "answer", func(m *message) bool { return m.op == wire.OpLockService })
			n := c.frontendOf(a)
			n.die(true)
			<-lost
			for _, k := range c.nodes {
				if k.front && k != n {
					c.servingMDT(false).front.Evict(clientID(k.name))
				}
			}
			c.serving()
			c.holders(1, 0)
			a.reclaim(l)
			a.unlock(l)
			n.boot()
		})
	}
	// SA 232a: a frontend whose client waits for a lock stops, in order and without
	// waiting for it; so does the MDT. The client gets the lock from who serves its address then.
	for _, end := range []string{"frontend-stop", "stop"} {
		add("waiting-"+end, func(c *cluster) {
			a, b := c.lockers[0], c.lockers[1]
			held := b.lock(c.lockFile.f, 0, 2, true, 0)
			got := make(chan *lock)
			go func() { got <- a.lock(c.lockFile.f, 0, 2, true, 5*time.Minute) }()
			for l, _ := c.lockTable(); len(l) < 2; l, _ = c.lockTable() {
				time.Sleep(100 * time.Millisecond)
			}
			fe, nsm, began := c.frontendOf(a).frontend(), a.nsm(), time.Now()
			c.strike(end)
			if d := time.Since(began); d > c.cfg.stopTime/2 {
				c.fault("the stop took %v", d)
			}
			if end == "frontend-stop" && (fe.stopErr != nil || a.nsm() != nsm) {
				c.fault("the frontend did not stop in order: %v", fe.stopErr)
			}
			b.reclaim(held)
			b.unlock(held)
			if l := <-got; l == nil {
				c.fault("who waits gets no lock though it is free")
			} else {
				a.reclaim(l)
				a.unlock(l)
			}
		})
	}
	return l
}
