package sim

import (
	"fmt"
	"strings"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Scenarios of files that are removed while they are in use. An NFS client that has
// such a file open gives it another name and removes that when it closes the file
// ("silly"); what another client removes is gone ("plain"). What takes the place of
// the open at a server is the frontend's IO epoch.

// script is what happens to files x and y, in words, before and after the MDT fails:
//
//	make x     it is made with an IO epoch that stays open
//	open x     it is made and written, which is not answered before the epoch is durable
//	use x      it is written
//	unlink x   it loses its name, while it is open
//	touch x    a new file gets the name
//	rm x       the new file goes
//	close x    the client needs the removed file no longer
//	commit     nothing is left to be replayed
//	fail       what is not committed has to be replayed
var scripts = []struct{ name, steps string }{
	{"close-uncommitted", "open x; commit; unlink x; close x; fail"},                              // RS 12
	{"all-committed", "open x; unlink x; commit; fail; close x"},                                  // RS 14, RS 25
	{"new-one-touched", "open x; unlink x; commit; touch x; fail; close x"},                       // RS 15
	{"new-one-removed", "open x; unlink x; touch x; rm x; fail; close x"},                         // RS 16
	{"open-replayed", "make x; fail; use x; close x"},                                             // RS 8, RS 17
	{"chain", "open x; commit; unlink x; touch x; close x; touch y; rm x; fail"},                  // RS 18
	{"all-replayed", "open x; unlink x; fail; close x"},                                           // RS 20a
	{"new-one-replayed", "open x; unlink x; touch x; fail; close x; rm x"},                        // RS 21
	{"unlink-replayed", "open x; commit; unlink x; fail; close x"},                                // RS 22
	{"unlink-and-new-replayed", "open x; commit; unlink x; touch x; fail; close x; rm x"},         // RS 23
	{"unlink-after", "make x; fail; unlink x; close x"},                                           // RS 24
	{"two-closed-apart", "open x; open y; unlink x; unlink y; close y; fail; close x"},            // RS 26
	{"two-closed-after", "open x; open y; unlink x; unlink y; fail; close x; close y"},            // RS 27
	{"two-committed-apart", "open x; open y; commit; unlink x; unlink y; close x; fail; close y"}, // RS 28
	{"two-committed-after", "open x; open y; commit; unlink x; unlink y; fail; close x; close y"}, // RS 29
	{"two-all-committed", "open x; open y; unlink x; unlink y; commit; fail; close x; close y"},   // RS 30
	{"two-one-committed", "open x; open y; unlink x; commit; unlink y; fail; close x; close y"},   // RS 31
}

// scripted is a run of a script.
type scripted struct {
	c     *cluster
	a     *actor
	silly bool
	osts  bool // OSTs fail with the MDT
	// during is what happens to the network when the MDT is back, before it hears of anybody.
	during func()
	files  map[string]*file // that were opened
	gone   map[string]bool  // and have no name any more
	closed map[string]bool
	dirty  bool
}

func (r *scripted) run(steps string) {
	// A client of a two-node export, whose answers do not wait for the disk.
	r.a = r.c.actors[len(r.c.actors)-1]
	r.files, r.gone, r.closed = map[string]*file{}, map[string]bool{}, map[string]bool{}
	for step := range strings.SplitSeq(steps, "; ") {
		what, name, _ := strings.Cut(step, " ")
		r.step(what, name)
	}
	for name := range r.files {
		r.close(name)
	}
	r.c.rest()
}

func (r *scripted) step(what, name string) {
	c, a := r.c, r.a
	p := place{a.root, name}
	switch what {
	case "make", "open":
		a.createNamed(a.root, name)
		r.files[name] = p.file()
		if what == "open" {
			a.writeUnstable(p.file(), 0, 8)
		}
		if !c.attr(a, p.file()).EpochOpen {
			c.fault("%s: no IO epoch is open", name)
		}
		r.dirty = what == "make"
		return
	case "use":
		a.writeUnstable(r.files[name], 4, 12)
		r.look(name)
	case "unlink":
		r.gone[name] = true
		if r.silly {
			a.renameTo(p, place{a.root, ".nfs-" + name})
			a.writeUnstable(r.files[name], 6, 10)
		} else {
			a.remove(p)
		}
		r.look(name)
	case "touch":
		a.createNamed(a.root, name)
	case "rm":
		a.remove(p)
	case "close":
		r.close(name)
	case "commit":
		c.committed()
		r.dirty = false
		return
	case "fail":
		r.fail()
		return
	}
	r.dirty = true
}

// look uses a file through its handle, by all frontends.
func (r *scripted) look(name string) {
	f := r.files[name]
	for _, x := range r.c.actors {
		if r.gone[name] && (!r.silly || r.closed[name]) {
			x.stale(f)
		} else {
			x.verify(f, all, 0, len(f.cells)+4)
		}
	}
}

func (r *scripted) close(name string) {
	if r.closed[name] {
		return
	}
	if r.closed[name] = true; r.silly && r.gone[name] {
		r.a.remove(place{r.a.root, ".nfs-" + name})
	}
	r.look(name)
}

// fail has the MDT lose what is not durable.
func (r *scripted) fail() {
	c := r.c
	fe := c.frontendOf(r.a).frontend()
	if n := fe.fs.MDTImport().Stats().Uncommitted; r.dirty != (n > 0) {
		c.fault("%d operations are not committed when the MDT fails, expected some: %v", n, r.dirty)
	}
	down := []*node{c.homeOf(mdtName)}
	for i := range c.osts {
		if r.osts {
			down = append(down, c.homeOf(ostName(i)))
		}
	}
	for _, n := range down {
		n.die(true)
	}
	time.Sleep(500 * time.Millisecond)
	if r.during != nil {
		r.during()
	}
	for _, n := range down {
		n.boot()
	}
	s := c.servingMDT(false)
	if st := s.front.Status(); r.dirty && st.Recovery.Replayed == 0 || st.Recovery.Evicted > 0 {
		c.fault("nothing was replayed, or somebody evicted: %+v", st.Recovery)
	}
	for name := range r.files {
		r.look(name)
	}
}

// committed waits until no frontend has anything to replay at the MDT.
func (c *cluster) committed() {
	for {
		n := 0
		for _, fe := range c.frontends() {
			n += fe.fs.MDTImport().Stats().Uncommitted
		}
		if n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// rest waits until nothing is under way, and checks that no removed file has left anything.
func (c *cluster) rest() {
	for range 240 {
		if c.pending() == "" {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if s := c.pending(); s != "" {
		c.fault("does not come to rest: %s", s)
	}
	c.noOrphans()
}

// noOrphans checks that all objects belong to files that have a name.
func (c *cluster) noOrphans() {
	named := map[wire.FID]bool{}
	for _, a := range c.actors {
		for _, p := range a.places(false) {
			named[p.file().fid] = true
		}
	}
	for _, s := range c.shared {
		named[s.views[0].fid] = true
	}
	for i := range c.osts {
		for _, f := range c.objects(i) {
			if !named[f] {
				c.fault("OST %d has an object of %v, which has no name any more", i, f)
			}
		}
	}
}

// objects lists the files that an OST has objects of.
func (c *cluster) objects(i int) (l []wire.FID) {
	s := c.running(ostName(i))
	if s == nil {
		c.fault("OST %d does not run", i)
		return nil
	}
	err := s.ost.Body().WalkObjects(func(o ost.ObjectInfo) { l = append(l, o.FID) })
	if err != nil {
		c.fault("OST %d: %v", i, err)
	}
	return l
}

// createNamed makes a file.
func (a *actor) createNamed(dir *file, name string) {
	rep, _ := a.modify("create "+name, wire.Request{
		Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: dir.fid, Name: []byte(name), How: wire.Guarded,
		SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o644},
	})
	if a.expect("create "+name, rep.Status, wire.OK) {
		f := newFile(false, 0o644)
		f.fid = rep.Attr.FID
		dir.kids[name] = f
		a.w.unique(a, f.fid)
	}
}

// stale checks that nobody can do anything to a file that was removed.
func (a *actor) stale(f *file) {
	_, st, _ := ask(a, fmt.Sprintf("getattr of removed %v", f.fid), func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) { return fe.getattr(o, f.fid) })
	a.expect("getattr of a removed file", st, wire.ErrStale)
	_, st, _ = ask(a, fmt.Sprintf("write of removed %v", f.fid), func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) {
		_, at, st := fe.write(o, f.fid, 0, make([]byte, cellSize), wire.Unstable)
		return at, st
	})
	a.expect("write of a removed file", st, wire.ErrStale)
	_, st, _ = ask(a, fmt.Sprintf("read of removed %v", f.fid), func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) {
		_, at, st := fe.read(o, f.fid, 0, cellSize)
		return at, st
	})
	a.expect("read of a removed file", st, wire.ErrStale)
}

// open keeps IO epochs open over a failure.
func open(cfg *config) {
	cfg.apart = true
	cfg.epochIdle = 10 * time.Second
}

func orphanScenarios() (l []scenario) {
	add := func(name string, two bool, run func(*cluster)) {
		l = append(l, scenario{"unlinked-" + name, open, two, run})
	}
	for _, s := range scripts {
		for _, how := range []string{"silly", "plain", "silly-osts"} {
			add(s.name+"-"+how, true, func(c *cluster) {
				r := scripted{c: c, silly: how != "plain", osts: how == "silly-osts"}
				r.run(s.steps)
			})
		}
	}
	// RS 73a, RS 73b, HX RS 73c: the client's connection breaks before its first replay,
	// before the answer to it, before its last replay.
	for name, at := range map[string]func(*message) bool{
		"before-replay":  func(m *message) bool { return !m.reply && m.request().Flags&wire.FlagReplay != 0 },
		"answer-lost":    func(m *message) bool { return m.reply && m.op == wire.OpCreate },
		"at-last-replay": func(m *message) bool { return !m.reply && m.request().Flags&wire.FlagLastReplay != 0 },
	} {
		add("reconnect-"+name, true, func(c *cluster) {
			lost := make(chan bool, 1)
			r := scripted{c: c, silly: true, during: func() {
				c.net.change(func() {
					c.net.filter = func(m *message) (v verdict) {
						if m.c.target == mdtName && at(m) {
							c.net.filter = nil
							lost <- true
							v.cut = true
						}
						return v
					}
				})
			}}
			r.run("open x; unlink x; fail; close x")
			select {
			case <-lost:
			default:
				c.fault("no message was lost")
			}
		})
	}
	// RD 5: one client has the file open, another one removes it, and this is replayed.
	add("by-another", true, func(c *cluster) {
		a, b := c.actors[0], c.actors[1]
		c.separate()
		c.serving()
		a.createNamed(a.root, "x")
		f := a.root.kids["x"]
		a.writeUnstable(f, 0, 8)
		b.remove(place{a.root, "x"})
		c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
		a.stale(f)
		b.stale(f)
		c.rest()
	})
	// RD 6, HX RD 7: two frontends have the file open when it is removed, and notice it
	// one by one, with two failures of the MDT in between, in both orders.
	for i, name := range []string{"first", "second"} {
		add("of-two-"+name, true, func(c *cluster) {
			a, b := c.actors[0], c.actors[1]
			c.separate()
			c.serving()
			s := a.share(wire.RootFID, "of two")
			f := s.views[0]
			for _, x := range c.actors {
				x.writeUnstable(s.views[x.id], 4*x.id, 4*x.id+4)
			}
			b.modify("remove", wire.Request{Header: hdr(wire.OpRemove), FID: wire.RootFID, Name: []byte("of two")})
			c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
			[]*actor{a, b}[i].stale(f)
			c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
			[]*actor{b, a}[i].stale(f)
			c.rest()
		})
	}
	// SN 36: everything that one client does to a file that another one has removed says so,
	// at once, also when the removed file's frontend has it in its caches.
	add("stale-at-once", false, func(c *cluster) {
		a, b := c.actors[0], c.actors[1]
		c.separate()
		c.serving()
		a.createNamed(a.root, "x")
		f := a.root.kids["x"]
		for range 20 {
			a.createNamed(a.root, "y")
			f = a.root.kids["y"]
			a.writeUnstable(f, 0, 8)
			a.verify(f, all, 0, 8)
			b.remove(place{a.root, "y"})
			a.stale(f)
		}
		c.crash(c.homeOf(mdtName), "power", 500*time.Millisecond)
		a.stale(f)
		c.rest()
	})
	// RS 20b: a frontend is evicted after it has removed files that it was writing, while OSTs
	// could not be told, and the MDT fails: their space is given back.
	for _, end := range []string{"power", "stop"} {
		add("by-the-evicted-"+end, false, func(c *cluster) {
			a := c.actors[0]
			c.excused(wire.ClientID{}, -1, "the MDT evicts a frontend")
			for i := range 8 {
				a.createNamed(a.root, fmt.Sprint("x", i))
			}
			for _, p := range a.places(false) {
				a.writeUnstable(p.file(), 0, 20)
			}
			m := c.homeOf(mdtName)
			away := func(v bool) {
				c.net.change(func() {
					for i := range c.osts {
						c.net.blocked[[2]string{m.name, c.home[ostName(i)].name}] = v
					}
				})
			}
			away(true)
			for _, p := range a.places(false) {
				a.remove(p)
			}
			c.servingMDT(false).front.Evict(clientID(c.frontendOf(a).name))
			c.crash(m, end, 500*time.Millisecond)
			c.servingMDT(false)
			if n := len(c.objects(0)) + len(c.objects(1)); n < 8 {
				c.fault("only %d objects are left, nothing is to be cleaned", n)
			}
			away(false)
			c.rest()
		})
	}
	return l
}
