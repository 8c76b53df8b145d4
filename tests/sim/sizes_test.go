package sim

import (
	"fmt"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Scenarios of sizes that the MDT keeps while several frontends write (som.txt).

// overdue is a write or a truncate of a frontend that stays on its way to the OST for
// long. Meanwhile the MDT forgets the frontend, another frontend writes the same file,
// and the MDT gets a new size. When the request arrives it has to be refused.
type overdue struct {
	op       wire.Op
	queued   bool // the frontend does not reach the OST, and sends it again; else it is in the network
	misses   bool // the frontend is evicted since it misses a recovery of the MDT
	restarts int  // of the MDT after the eviction, before any OST knows of it
}

// arrival is when what is on its way arrives.
const arrival = 60 * time.Second

func (l *overdue) run(c *cluster) {
	a, b := c.actors[0], c.actors[1]
	fe := c.separate()
	c.serving()
	c.excused(wire.ClientID{}, -1, "the MDT evicts a frontend")
	s := c.shared[0]
	mine, others := s.views[a.id], s.views[b.id]
	b.writeAs(others, b.id, b.id+1, 0, wire.FileSync)
	b.writeAs(others, 8+b.id, 9+b.id, 0, wire.FileSync)
	a.writeAs(mine, a.id, a.id+1, 0, wire.FileSync)
	m := c.homeOf(mdtName)
	block := func(v bool, m *node, n ...*node) { // the network's lock is held
		for _, n := range n {
			c.net.blocked[[2]string{m.name, n.name}], c.net.blocked[[2]string{n.name, m.name}] = v, v
		}
	}
	away := func(v bool, n ...*node) { c.net.change(func() { block(v, m, n...) }) }
	var osts []*node
	for i := range c.osts {
		osts = append(osts, c.homeOf(ostName(i)))
	}
	began, sent, done := time.Now(), make(chan bool, 1), make(chan struct{})
	c.net.change(func() {
		c.net.filter = func(m *message) (v verdict) {
			if m.op != l.op || m.reply || m.c.from.node != fe {
				return v
			}
			c.net.filter = nil
			sent <- true
			if !l.queued {
				return verdict{delay: arrival}
			}
			block(true, fe, osts...)
			return verdict{cut: true}
		}
	})
	go func() {
		if l.op == wire.OpPunch {
			a.truncateTo(mine, 4)
		} else {
			a.writeUnstable(mine, 40+a.id, 41+a.id) // past the end that the MDT is told
		}
		close(done)
	}()
	<-sent
	if l.restarts > 0 {
		away(true, osts...)
		time.Sleep(c.cfg.imports.DeadAfter + 2*c.cfg.imports.PingInterval)
	}
	if l.misses {
		away(true, fe)
		c.crash(m, "power", 500*time.Millisecond)
		c.servingMDT(true)
		time.Sleep(time.Second)
	} else {
		c.servingMDT(false).front.Evict(clientID(fe.name))
		time.Sleep(500 * time.Millisecond)
	}
	fenced := func() bool {
		return slices.ContainsFunc(c.servingMDT(false).mdt.Body().PendingFences(), func(f mdt.PendingFence) bool { return f.ID == clientID(fe.name) })
	}
	for i := range l.restarts {
		if !fenced() {
			c.fault("after %d restarts the MDT has forgotten whom OSTs are to refuse", i)
		}
		c.crash(m, "power", 500*time.Millisecond)
		c.servingMDT(l.misses)
	}
	if l.restarts > 0 && !fenced() {
		c.fault("the MDT has forgotten whom OSTs are to refuse")
	}
	away(false, osts...)
	// The MDT finishes what the frontend has left. Nobody was told that the truncate is
	// done, so it may come after any write before that.
	for {
		left, err := c.servingMDT(false).mdt.Body().PendingLogs(0, 1)
		if len(left) == 0 && err == nil {
			break
		}
		if time.Since(began) > arrival/2 {
			c.fault("the MDT does not finish what an evicted frontend has left: %+v, %v", left, err)
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	// Now another frontend writes, closes, and the MDT has the size.
	const end = 32
	b.writeAs(others, end-2+b.id, end-1+b.id, 0, wire.Unstable)
	for at := c.attr(b, others); at.EpochOpen; at = c.attr(b, others) {
		if time.Since(began) > arrival-5*time.Second {
			c.fault("the IO epochs do not close: %+v", at)
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if at := c.attr(b, others); at.Size != end*cellSize {
		c.fault("size %d after the epochs have closed, want %d", at.Size, end*cellSize)
	}
	time.Sleep(arrival - time.Since(began) - time.Second)
	select {
	case <-done:
		c.fault("what is on its way was answered before it has arrived")
	default:
	}
	if l.queued {
		c.net.change(func() { block(false, fe, osts...) })
		time.Sleep(3 * time.Second) // it comes before the frontend reaches the MDT
	}
	away(false, fe)
	<-done
	c.mu.Lock()
	n := c.seen["refused "+opName(l.op)]
	c.mu.Unlock()
	if n == 0 {
		c.fault("%s was not refused", opName(l.op))
	}
	if l.op == wire.OpPunch {
		for _, f := range s.views {
			f.truncated(4) // its client has asked again
		}
	}
	c.each(func(a *actor) { a.final() })
}

// servingMDT waits until the MDT serves; abort ends its recovery without who is missing.
func (c *cluster) servingMDT(abort bool) *service {
	for {
		switch s := c.running(mdtName); {
		case s == nil:
		case s.front.Status().Serving:
			return s
		case abort:
			s.front.Abort()
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// attr is what a frontend says of a file.
func (c *cluster) attr(a *actor, f *file) wire.Attr {
	at, st, _ := ask(a, "attributes", func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) { return fe.getattr(o, f.fid) })
	a.expect("attributes", st, wire.OK)
	return at
}

// race has one frontend cut a file while another one writes it, again and again. What
// is there afterwards is what one order of the two gives, both frontends and the MDT
// say the same of it.
func race(c *cluster, faults func()) {
	a, b := c.actors[0], c.actors[1]
	c.separate()
	c.serving()
	c.excused(wire.ClientID{}, -1, "")
	rng := c.rand("race")
	f := a.share(wire.RootFID, "raced").views[b.id]
	var have []uint32 // versions of its sectors
	over := make(chan struct{})
	go func() { faults(); close(over) }()
	for more := true; more; {
		select {
		case <-over:
			more = false
		default:
		}
		size, from := rng.IntN(24), rng.IntN(20)
		end, cut := from+1+rng.IntN(6), make(chan struct{})
		go func() { a.truncateTo(&file{fid: f.fid}, size); close(cut) }()
		time.Sleep(time.Duration(rng.IntN(8)) * time.Millisecond)
		b.writeAs(f, from, end, 0, pick(rng, []wire.StableHow{wire.Unstable, wire.FileSync}))
		<-cut
		ver := f.cells[from].cur
		if rng.IntN(3) == 0 {
			time.Sleep(3 * time.Second) // epochs close
		}
		var was content
		for i, x := range []*actor{a, b} {
			got, st, _ := ask(x, "read after a race", func(fe *frontend, o client.Owner) (content, wire.Status) {
				data, at, st := fe.read(o, f.fid, 0, 64*cellSize)
				return content{data, at}, st
			})
			x.expect("read", st, wire.OK)
			if n := int(got.attr.Size / cellSize); n != size && n != max(size, end) || len(got.data) != n*cellSize {
				c.fault("%s: %d sectors, %d bytes, after a cut to %d and a write of %d-%d", x.name(), n, len(got.data), size, from, end)
				return
			}
			for j := range len(got.data) / cellSize {
				var want uint32
				switch {
				case j >= from && j < end:
					want = ver
				case j < size && j < len(have):
					want = have[j]
				}
				if v, ok := version(got.data[j*cellSize : (j+1)*cellSize]); !ok || v != want {
					c.fault("%s: sector %d has %x, want %x, after a cut to %d and a write of %d-%d", x.name(), j, v, want, size, from, end)
				}
			}
			if i > 0 && !slices.Equal(was.data, got.data) {
				c.fault("two frontends read different data")
			}
			was = got
		}
		f.truncated(len(was.data) / cellSize)
		have = have[:0]
		for j := range f.cells {
			v, _ := version(was.data[j*cellSize:])
			have = append(have, v)
			if v == 0 {
				f.cells[j] = cell{} // cut off before the write
			}
		}
	}
	a.settle()
	b.commit(f)
	time.Sleep(5 * time.Second)
	at := c.attr(a, f)
	if at.EpochOpen || at.Size != uint64(len(f.cells)*cellSize) {
		c.fault("the MDT has size %d, epoch open %v, want %d", at.Size, at.EpochOpen, len(f.cells)*cellSize)
	}
	b.verify(f, all, 0, len(f.cells)+4)
}

// sizeScenarios are the use cases and problems of sizes kept at the MDT.
func sizeScenarios() (l []scenario) {
	add := func(name string, run func(*cluster)) {
		l = append(l, scenario{"sizes-" + name, apart, false, run})
	}
	late := func(name string, o overdue) {
		l = append(l, scenario{"sizes-" + name, func(cfg *config) {
			cfg.apart = true
			if o.queued {
				// No OST takes the frontend for dead, and it is patient.
				cfg.recovery.PingTimeout, cfg.patience = 5*time.Minute, 5*time.Minute
			}
		}, false, o.run})
	}
	for _, x := range []struct {
		name   string
		op     wire.Op
		queued bool
	}{{"write", wire.OpWrite, false}, {"write-again", wire.OpWrite, true}, {"truncate-again", wire.OpPunch, true}} {
		late("evicted-"+x.name, overdue{op: x.op, queued: x.queued})
		late("evicted-then-restart-"+x.name, overdue{op: x.op, queued: x.queued, restarts: 1})
		late("misses-recovery-"+x.name, overdue{op: x.op, queued: x.queued, misses: true})
		late("two-restarts-"+x.name, overdue{op: x.op, queued: x.queued, misses: true, restarts: 1})
		late("three-restarts-"+x.name, overdue{op: x.op, queued: x.queued, misses: true, restarts: 2})
	}
	for _, end := range ends[1:] {
		add("mdt-restart-"+end, func(c *cluster) {
			c.separate()
			c.serving()
			c.each(func(a *actor) {
				s := c.shared[0].views[a.id]
				a.writeUnstable(s, 4+a.id, 5+a.id)
				a.createAs(wire.Guarded, -1)
				a.writeUnstable(a.places(false)[0].file(), 0, 7)
			})
			c.crash(c.homeOf(mdtName), end, time.Second)
			c.each(func(a *actor) {
				a.writeUnstable(c.shared[0].views[a.id], 20+a.id, 21+a.id) // in the same epoch
				a.final()
			})
			time.Sleep(5 * time.Second)
			for _, a := range c.actors {
				for f, size := range map[*file]uint64{c.shared[0].views[a.id]: 22, a.places(false)[0].file(): 7} {
					if at := c.attr(a, f); at.EpochOpen || at.Size != size*cellSize {
						c.fault("%v: epoch open %v, size %d, want %d", f.fid, at.EpochOpen, at.Size, size*cellSize)
					}
				}
			}
		})
	}
	for name, faults := range map[string]func(*cluster){
		"": func(*cluster) { time.Sleep(30 * time.Second) },
		"-mdt": func(c *cluster) {
			for range 4 {
				time.Sleep(2 * time.Second)
				c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
			}
		},
		"-ost": func(c *cluster) {
			for range 4 {
				time.Sleep(2 * time.Second)
				for i := range c.osts {
					c.crash(c.homeOf(ostName(i)), "power", 500*time.Millisecond)
				}
			}
		},
		"-cuts": func(c *cluster) {
			for range 150 {
				time.Sleep(200 * time.Millisecond)
				c.net.cutAll(func(*conn) bool { return true })
			}
		},
	} {
		add(fmt.Sprintf("truncate-races-write%s", name), func(c *cluster) { race(c, func() { faults(c) }) })
	}
	for name, faults := range map[string]func(*cluster){
		"close":     func(*cluster) {},
		"mdt-power": func(c *cluster) { c.crash(c.homeOf(mdtName), "power", time.Second) },
		"ost-power": func(c *cluster) {
			for i := range c.osts {
				c.crash(c.homeOf(ostName(i)), "power", time.Second)
			}
		},
		"all-power": func(c *cluster) {
			for _, t := range c.targets() {
				c.homeOf(t).die(true)
			}
			time.Sleep(time.Second)
			for _, t := range c.targets() {
				c.homeOf(t).boot()
			}
		},
		"evicted":  func(c *cluster) { c.servingMDT(false).front.Evict(clientID(c.frontendOf(c.actors[0]).name)) },
		"frontend": func(c *cluster) { c.crash(c.frontendOf(c.actors[0]), "kill", time.Second) },
	} {
		add("times-"+name, func(c *cluster) { times(c, func() { faults(c) }) })
	}
	return l
}

// times has files written, cut and given times, and then something fail: what
// was answered last about mtime counts, before and after the IO epochs are closed.
func times(c *cluster, fault func()) {
	a, b := c.actors[0], c.actors[1]
	c.separate()
	c.serving()
	c.excused(wire.ClientID{}, -1, "a frontend is evicted or dies")
	set := func(f *file, sa wire.SetAttr) {
		rep, _ := a.modify("setattr", wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagOwnerOverride}, FID: f.fid, SetAttr: sa})
		a.expect("setattr", rep.Status, wire.OK)
	}
	const old, touched = 1_000_000_000 * int64(time.Second), 5 // the first files are those that end with a time that was set
	touch := func(f *file) { set(f, wire.SetAttr{Mask: wire.SetMtime, Mtime: old}) }
	write := func(f *file) { a.writeAs(f, 0, 8, 0, wire.Unstable); a.commit(f) }
	chmod := func(f *file) { a.chmod(f) }
	cut := func(f *file) { a.truncateTo(f, 3) }
	var files []*file
	for _, steps := range [][]func(*file){
		{write, touch}, {write, touch, chmod}, {write, cut, touch}, {write, cut, touch, chmod}, {cut, touch},
		{touch, write}, {touch, write, chmod}, {write, touch, cut}, {write, touch, cut, chmod},
	} {
		a.createAs(wire.Guarded, -1)
		l := a.places(false)
		f := l[slices.IndexFunc(l, func(p place) bool { return !slices.Contains(files, p.file()) })].file()
		files = append(files, f)
		for _, do := range steps {
			do(f)
		}
	}
	var want []wire.Attr
	for _, f := range files {
		want = append(want, c.attr(a, f))
	}
	check := func(when string) {
		for i, f := range files {
			for _, x := range []*actor{a, b} {
				at := c.attr(x, f)
				// An OST that has died may give a change the time at which it was executed, or a
				// little more, so that clients look again; a time that was set stays.
				if d := at.Mtime - want[i].Mtime; d < 0 || d > 0 && i < touched || d > int64(time.Second) || at.Ctime < want[i].Ctime || at.Size != want[i].Size {
					c.fault("%s, file %d: mtime %d ctime %d size %d, want %d, %d, %d", when, i, at.Mtime, at.Ctime, at.Size, want[i].Mtime, want[i].Ctime, want[i].Size)
				}
			}
		}
	}
	for i := range files {
		if (i < touched) != (want[i].Mtime == old) {
			c.fault("file %d has mtime %d", i, want[i].Mtime)
		}
	}
	check("before")
	fault()
	check("after")
	time.Sleep(15 * time.Second)
	for _, f := range files {
		if c.attr(b, f).EpochOpen {
			c.fault("%v is in an IO epoch", f.fid)
		}
	}
	check("closed")
}
