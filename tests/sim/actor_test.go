package sim

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// actor is an NFS client with a hard mount: it has one call at a time and sends it
// again until it is answered. What it did to its own directory, and to its own
// sectors of files that all share, it knows exactly.
type actor struct {
	w    *world
	id   int
	all  int // number of actors
	rng  *rand.Rand
	v    *vip
	two  bool
	root *file
	next int
	ver  uint32

	port  uint16
	xid   uint32
	acks  []*ack // of the two-node export
	lossy bool   // both nodes of some acknowledged operation have died
	ops   int
	stuck string // the call that waits
	since time.Time
	mu    sync.Mutex // stuck, since

	locked *lock         // of a scenario, to be given back at its end
	again  time.Duration // when a request for a lock that waits is made again
}

func (w *world) newActor(id, all int, two bool) *actor {
	return &actor{
		w: w, id: id, all: all, rng: w.rand("actor", id), v: w.vips[id%len(w.vips)], two: two, port: uint16(1000 + id), root: newFile(true, 0o755), again: 15 * time.Second,
	}
}

func (a *actor) name() string { return fmt.Sprintf("a%d", a.id) }

// owner waits until somebody serves the actor's address.
func (a *actor) owner() (*frontend, client.Owner, <-chan struct{}) {
	w, v := a.w, a.v
	w.mu.Lock()
	defer w.mu.Unlock()
	for !v.ready {
		w.cond.Wait()
	}
	return v.owner, client.Owner{VIP: v.index, Epoch: v.epoch, TwoNode: a.two}, v.moved
}

// ask has a call executed by whoever serves the address, until there is an answer.
func ask[T any](a *actor, what string, f func(*frontend, client.Owner) (T, wire.Status)) (T, wire.Status, *frontend) {
	w := a.w
	a.waits(what)
	defer a.waits("")
	for try := 0; ; try++ {
		fe, o, moved := a.owner()
		if !fe.begin() {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		type answer struct {
			v  T
			st wire.Status
		}
		ch := make(chan answer, 1)
		go func() {
			defer fe.calls.Done()
			v, st := f(fe, o)
			if fe.p.storage() == nil { // it gets out
				ch <- answer{v, st}
			}
		}()
		select {
		case r := <-ch:
			w.mu.Lock()
			now := w.vips[a.v.index-1].owner == fe && a.v.epoch == o.Epoch
			w.mu.Unlock()
			switch {
			case !now || r.st == wire.ErrStaleVIP:
				// The connection is dead; nothing is answered.
			case r.st == wire.ErrJukebox, r.st == wire.ErrTargetDown, r.st == wire.ErrUnknownClient, r.st == wire.ErrRecovering, r.st == wire.ErrStaleClient:
				w.count("jukebox")
				a.xid++ // it is another call
			case r.st == wire.ErrIO && w.badDisk.Load():
				a.xid++
			default:
				return r.v, r.st, fe
			}
		case <-moved:
			w.trace("%s: %s: connection to %s lost", a.name(), what, fe.p.node.name)
			a.port++
		}
		time.Sleep(time.Duration(1+a.rng.IntN(200)) * time.Millisecond)
	}
}

func (a *actor) waits(what string) {
	a.mu.Lock()
	a.stuck, a.since = what, time.Now()
	a.mu.Unlock()
}

// modify executes an operation of the name space exactly once.
func (a *actor) modify(what string, q wire.Request) (*wire.Reply, *frontend) {
	a.xid++
	q.Cred = wire.Cred{}
	rep, st, fe := ask(a, what, func(fe *frontend, o client.Owner) (*wire.Reply, wire.Status) {
		r := q
		r.Key = wire.ReplyKey{Addr: [16]byte{10, byte(a.id)}, Port: a.port, XID: a.xid, Proc: 100003<<8 | uint32(q.Op), Sum: uint64(a.xid)}
		rep := fe.modify(o, &r)
		return rep, rep.Status
	})
	a.w.trace("%s: %s: %v", a.name(), what, st)
	a.ops++
	a.w.count("operations")
	if a.two {
		a.acks = append(a.acks, &ack{fe, time.Now()})
	}
	return rep, fe
}

// expect reports an answer that is not the right one, unless both nodes of an
// acknowledged operation have died.
func (a *actor) expect(what string, got, want wire.Status) bool {
	if got == want {
		return true
	}
	if !a.isLossy() {
		a.w.fault("%s: %s: %v, want %v", a.name(), what, got, want)
	}
	a.lossy = true
	return false
}

func (a *actor) isLossy() bool {
	if a.lossy {
		return true
	}
	for _, k := range a.acks {
		if a.w.bothDied(k, true) {
			a.w.trace("%s: an operation of %v may be lost", a.name(), k.at.Sub(a.w.began))
			a.w.count("lossy")
			a.lossy = true
			return true
		}
	}
	return false
}

func (a *actor) failf(format string, x ...any) {
	if !a.isLossy() {
		a.w.fault("%s: %s", a.name(), fmt.Sprintf(format, x...))
	}
	a.lossy = true
}

// dirs, files: what there is, in order.
func (a *actor) dirs() (l []*file) {
	l = append(l, a.root)
	for _, n := range a.root.names() {
		if k := a.root.kids[n]; k.kids != nil {
			l = append(l, k)
		}
	}
	return l
}

type place struct {
	dir  *file
	name string
}

func (p place) file() *file { return p.dir.kids[p.name] }

func (a *actor) places(dirs bool) (l []place) {
	for _, d := range a.dirs() {
		for _, n := range d.names() {
			if (d.kids[n].kids != nil) == dirs {
				l = append(l, place{d, n})
			}
		}
	}
	return l
}

func pick[T any](r *rand.Rand, l []T) T { return l[r.IntN(len(l))] }

func hdr(op wire.Op) wire.Header { return wire.Header{Op: op} }

// setup makes the actor's directory.
func (a *actor) setup() {
	rep, _ := a.modify("mkdir "+a.name(), wire.Request{Header: hdr(wire.OpMkdir), FID: wire.RootFID, Name: []byte(a.name()), SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o755}})
	if a.expect("mkdir", rep.Status, wire.OK) {
		a.root.fid = rep.Attr.FID
	}
}

// run does n operations, with pauses.
func (a *actor) run(n int, pause time.Duration, stop func() bool) {
	for range n {
		if a.lossy || stop() {
			return
		}
		a.step()
		time.Sleep(time.Duration(a.rng.Int64N(int64(pause))))
	}
}

func (a *actor) step() {
	files := a.places(false)
	switch p := a.rng.IntN(100); {
	case p < 6 && len(a.dirs()) < 3:
		a.mkdir()
	case p < 20 && len(files) < 8 || len(files) == 0:
		a.create()
	case p < 46:
		a.write(pick(a.rng, files).file())
	case p < 53:
		a.commit(pick(a.rng, files).file())
	case p < 59:
		a.truncate(pick(a.rng, files).file())
	case p < 65:
		a.read(pick(a.rng, files).file())
	case p < 68:
		a.getattr(pick(a.rng, files).file())
	case p < 69:
		a.lookup(pick(a.rng, files))
	case p < 72:
		a.list(pick(a.rng, a.dirs()))
	case p < 78:
		a.rename(pick(a.rng, files))
	case p < 82:
		a.link(pick(a.rng, files))
	case p < 87:
		a.remove(pick(a.rng, files))
	case p < 89:
		a.chmod(pick(a.rng, files).file())
	case p < 90:
		a.rmdir()
	default:
		a.shared()
	}
}

func (a *actor) newName() string {
	a.next++
	return fmt.Sprintf("f%d", a.next)
}

func (a *actor) mkdir() {
	name, mode := a.newName(), uint32(0o700+a.rng.IntN(64))
	rep, _ := a.modify("mkdir "+name, wire.Request{Header: hdr(wire.OpMkdir), FID: a.root.fid, Name: []byte(name), SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode}})
	if a.expect("mkdir", rep.Status, wire.OK) {
		d := newFile(true, mode)
		d.fid = rep.Attr.FID
		a.root.kids[name] = d
		a.w.unique(a, d.fid)
	}
}

func (a *actor) create() {
	how, size := wire.CreateHow(a.rng.IntN(3)), -1
	if how == wire.Unchecked && a.rng.IntN(4) == 0 {
		size = a.rng.IntN(20)
	}
	a.createAs(how, size)
}

// createAs makes a file; size in cells, none if negative.
func (a *actor) createAs(how wire.CreateHow, size int) {
	dir, name, mode := pick(a.rng, a.dirs()), a.newName(), uint32(0o600+a.rng.IntN(64))
	q := wire.Request{
		Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch | wire.FlagOwnerOverride}, FID: dir.fid, Name: []byte(name),
		SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode},
	}
	if q.How = how; how == wire.Exclusive {
		q.SetAttr = wire.SetAttr{}
		q.Verf = [8]byte{byte(a.id), byte(a.next), byte(a.next >> 8), 1}
	}
	if size >= 0 {
		q.SetAttr.Mask |= wire.SetSize
		q.SetAttr.Size = uint64(size * cellSize)
	}
	what := fmt.Sprintf("create %v %s how %d size %d", dir.fid, name, q.How, size)
	rep, _ := a.modify(what, q)
	if !a.expect(what, rep.Status, wire.OK) {
		return
	}
	f := newFile(false, mode)
	f.fid = rep.Attr.FID
	if q.How == wire.Exclusive {
		f.mode = rep.Attr.Mode
	}
	if size >= 0 {
		f.truncated(size)
	}
	dir.kids[name] = f
	a.w.unique(a, f.fid)
	if a.rng.IntN(6) == 0 {
		// Whoever asks for it once more is told that it exists.
		q.How = wire.Guarded
		q.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: mode}
		rep, _ := a.modify("create again "+name, q)
		a.expect("create again", rep.Status, wire.ErrExist)
	}
}

// span chooses cells to write.
func (a *actor) span(f *file) (from, to int) {
	limit := 60
	if a.w.cfg.stripes > 1 {
		limit = 400
	}
	from = a.rng.IntN(min(len(f.cells)+4, limit))
	if a.rng.IntN(6) == 0 {
		from = a.rng.IntN(limit)
	}
	return from, from + 1 + a.rng.IntN(8)
}

func (a *actor) write(f *file) {
	from, to := a.span(f)
	a.writeCells(f, from, to, 0)
}

// writeCells writes version ver, 0 for a new one.
func (a *actor) writeCells(f *file, from, to int, ver uint32) bool {
	how := wire.Unstable
	if a.rng.IntN(4) == 0 {
		how = wire.FileSync
	}
	return a.writeAs(f, from, to, ver, how)
}

func (a *actor) writeUnstable(f *file, from, to int) { a.writeAs(f, from, to, 0, wire.Unstable) }

func (a *actor) writeAs(f *file, from, to int, ver uint32, how wire.StableHow) bool {
	if ver == 0 {
		a.ver++
		ver = uint32(a.id+1)<<24 | a.ver
	}
	data := make([]byte, (to-from)*cellSize)
	fill(data, ver)
	what := fmt.Sprintf("write %v cells %d-%d version %x stable %d", f.fid, from, to, ver, how)
	verf, st, fe := ask(a, what, func(fe *frontend, o client.Owner) (uint64, wire.Status) {
		verf, _, st := fe.write(o, f.fid, uint64(from*cellSize), data, how)
		return verf, st
	})
	a.w.trace("%s: %s: %v verifier %d", a.name(), what, st, verf)
	a.ops++
	a.w.count("writes")
	if !a.expect(what, st, wire.OK) {
		return false
	}
	f.wrote(from, to, ver, verf, how != wire.Unstable, a.ack(fe))
	return true
}

func (a *actor) ack(fe *frontend) *ack {
	if !a.two {
		return nil
	}
	return &ack{fe, time.Now()}
}

func all(int) bool { return true }

// commit makes the file durable; what was lost is written again.
func (a *actor) commit(f *file) bool { return a.commitCells(f, all) }

func (a *actor) commitCells(f *file, mine func(int) bool) bool {
	for {
		verf, st, fe := ask(a, fmt.Sprintf("commit %v", f.fid), func(fe *frontend, o client.Owner) (uint64, wire.Status) {
			return fe.commit(o, f.fid)
		})
		a.w.trace("%s: commit %v: %v verifier %d", a.name(), f.fid, st, verf)
		a.ops++
		if !a.expect("commit", st, wire.OK) {
			return false
		}
		again := f.committed(mine, verf, a.ack(fe))
		if len(again) == 0 {
			return true
		}
		a.w.count("written again")
		for _, i := range again {
			if i < len(f.cells) && !a.writeCells(f, i, i+1, f.cells[i].cur) {
				return false
			}
		}
	}
}

func (a *actor) truncate(f *file) {
	size := a.rng.IntN(len(f.cells) + 6)
	if a.rng.IntN(3) == 0 {
		size = 0
	}
	a.truncateTo(f, size)
}

func (a *actor) truncateTo(f *file, size int) bool {
	what := fmt.Sprintf("truncate %v to %d cells", f.fid, size)
	rep, _ := a.modify(what, wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagOwnerOverride}, FID: f.fid, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: uint64(size * cellSize)}})
	if !a.expect(what, rep.Status, wire.OK) {
		return false
	}
	f.truncated(size)
	return true
}

type content struct {
	data []byte
	attr wire.Attr
}

func (a *actor) read(f *file) {
	from := 0
	n := len(f.cells) + 4
	if a.rng.IntN(2) == 0 && len(f.cells) > 0 {
		from = a.rng.IntN(len(f.cells))
		n = 1 + a.rng.IntN(8)
	}
	a.verify(f, all, from, n)
}

// verify reads cells and compares them with the model.
func (a *actor) verify(f *file, mine func(int) bool, from, n int) {
	what := fmt.Sprintf("read %v cells %d-%d", f.fid, from, from+n)
	c, st, _ := ask(a, what, func(fe *frontend, o client.Owner) (content, wire.Status) {
		data, at, st := fe.read(o, f.fid, uint64(from*cellSize), n*cellSize)
		return content{data, at}, st
	})
	a.w.trace("%s: %s: %v, %d bytes, size %d", a.name(), what, st, len(c.data), c.attr.Size)
	a.ops++
	if !a.expect(what, st, wire.OK) {
		return
	}
	if c.attr.Size%cellSize != 0 {
		a.failf("%s: size %d", what, c.attr.Size)
		return
	}
	size := int(c.attr.Size / cellSize)
	if want := max(0, min(n, size-from)) * cellSize; len(c.data) != want {
		a.failf("%s: %d bytes, want %d, size %d", what, len(c.data), want, c.attr.Size)
		return
	}
	a.checkSize(f, mine, what, size)
	if err := f.check(a.w, a.v, mine, from, c.data, size); err != nil {
		a.failf("%s: %v", what, err)
	}
}

func (a *actor) checkSize(f *file, mine func(int) bool, what string, size int) {
	least := f.least(a.w, a.v, mine)
	most := len(f.cells)
	if !mine(0) || !mine(1) || a.w.badDisk.Load() {
		most = 1 << 20 // others write, too; or a cut is lost (see check)
	}
	if size < least || size > most {
		a.failf("%s: %v has %d sectors, possible are %d to %d", what, f.fid, size, least, most)
	}
}

func (a *actor) getattr(f *file) {
	at, st, _ := ask(a, fmt.Sprintf("getattr %v", f.fid), func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) {
		return fe.getattr(o, f.fid)
	})
	a.ops++
	if a.expect("getattr", st, wire.OK) {
		a.checkAttr(f, &at)
		a.checkSize(f, all, "getattr", int(at.Size/cellSize))
	}
}

func (a *actor) lookup(p place) {
	what := fmt.Sprintf("lookup %v %s", p.dir.fid, p.name)
	at, st, _ := ask(a, what, func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) {
		return fe.lookup(o, p.dir.fid, p.name)
	})
	a.ops++
	if a.expect(what, st, wire.OK) {
		a.checkAttr(p.file(), &at)
	}
}

func (a *actor) checkAttr(f *file, at *wire.Attr) {
	if at.Mode != f.mode || f.kids == nil && int(at.Nlink) != f.links || at.FID != f.fid {
		a.failf("%v: identity %v mode %o links %d, want mode %o links %d", f.fid, at.FID, at.Mode, at.Nlink, f.mode, f.links)
	}
}

func (a *actor) list(d *file) {
	have, st, _ := ask(a, fmt.Sprintf("readdir %v", d.fid), func(fe *frontend, o client.Owner) (map[string]wire.FID, wire.Status) {
		return fe.readdir(o, d.fid)
	})
	a.ops++
	if !a.expect("readdir", st, wire.OK) {
		return
	}
	for n, f := range have {
		if d.kids[n] == nil {
			a.failf("%v has %q (%v), which was removed or never made", d.fid, n, f)
		}
	}
	for _, n := range d.names() {
		if f, ok := have[n]; !ok || f != d.kids[n].fid {
			a.failf("%v: %q is %v (there %v), want %v", d.fid, n, f, ok, d.kids[n].fid)
		}
	}
}

func (a *actor) rename(p place) {
	to := place{pick(a.rng, a.dirs()), a.newName()}
	if l := a.places(false); a.rng.IntN(3) == 0 && len(l) > 1 {
		to = pick(a.rng, l)
	}
	a.renameTo(p, to)
}

func (a *actor) renameTo(p, to place) {
	what := fmt.Sprintf("rename %v %s to %v %s", p.dir.fid, p.name, to.dir.fid, to.name)
	rep, _ := a.modify(what, wire.Request{Header: hdr(wire.OpRename), FID: p.dir.fid, Name: []byte(p.name), FID2: to.dir.fid, Name2: []byte(to.name)})
	if !a.expect(what, rep.Status, wire.OK) {
		return
	}
	f := p.file()
	if old := to.file(); old == f {
		return // the same file: nothing happens
	} else if old != nil {
		old.links--
	}
	delete(p.dir.kids, p.name)
	to.dir.kids[to.name] = f
}

func (a *actor) link(p place) {
	dir, name := pick(a.rng, a.dirs()), a.newName()
	what := fmt.Sprintf("link %v to %v %s", p.file().fid, dir.fid, name)
	rep, _ := a.modify(what, wire.Request{Header: hdr(wire.OpLink), FID: p.file().fid, FID2: dir.fid, Name2: []byte(name)})
	if a.expect(what, rep.Status, wire.OK) {
		p.file().links++
		dir.kids[name] = p.file()
	}
}

func (a *actor) remove(p place) {
	what := fmt.Sprintf("remove %v %s", p.dir.fid, p.name)
	rep, _ := a.modify(what, wire.Request{Header: hdr(wire.OpRemove), FID: p.dir.fid, Name: []byte(p.name)})
	if !a.expect(what, rep.Status, wire.OK) {
		return
	}
	f := p.file()
	f.links--
	delete(p.dir.kids, p.name)
	if f.links == 0 && a.rng.IntN(2) == 0 {
		_, st, _ := ask(a, fmt.Sprintf("getattr of removed %v", f.fid), func(fe *frontend, o client.Owner) (wire.Attr, wire.Status) {
			return fe.getattr(o, f.fid)
		})
		a.expect("getattr of a removed file", st, wire.ErrStale)
	}
}

func (a *actor) rmdir() {
	for _, n := range a.root.names() {
		d := a.root.kids[n]
		if d.kids == nil {
			continue
		}
		want := wire.OK
		if len(d.kids) > 0 {
			want = wire.ErrNotEmpty
		}
		rep, _ := a.modify("rmdir "+n, wire.Request{Header: hdr(wire.OpRmdir), FID: a.root.fid, Name: []byte(n)})
		if a.expect("rmdir", rep.Status, want) && want == wire.OK {
			delete(a.root.kids, n)
		}
		return
	}
}

func (a *actor) chmod(f *file) {
	mode := uint32(0o600 + a.rng.IntN(64))
	what := fmt.Sprintf("chmod %v %o", f.fid, mode)
	rep, _ := a.modify(what, wire.Request{Header: hdr(wire.OpSetattr), FID: f.fid, SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode}})
	if a.expect(what, rep.Status, wire.OK) {
		f.mode = mode
	}
}

// shared works on a file that all clients write, each its own sectors.
func (a *actor) shared() {
	s := pick(a.rng, a.w.shared)
	if a.rng.IntN(6) == 0 {
		s.lock.lock(true)
		defer s.lock.unlock(true)
		size := a.rng.IntN(40)
		if a.truncateTo(s.views[a.id], size) {
			for i, f := range s.views {
				if i != a.id {
					f.truncated(size)
				}
			}
		}
		return
	}
	s.lock.lock(false)
	defer s.lock.unlock(false)
	f, mine := s.views[a.id], func(i int) bool { return i%a.all == a.id }
	switch p := a.rng.IntN(10); {
	case p < 6:
		i := a.rng.IntN(8)*a.all + a.id
		a.writeCells(f, i, i+1, 0)
	case p < 8:
		a.commitCells(f, mine)
	default:
		a.verify(f, mine, 0, 8*a.all)
	}
}

// sharedFile is a file that all clients write. Each has a view of its own.
type sharedFile struct {
	lock  *rwLock
	views []*file
}

// share makes a file for all.
func (a *actor) share(dir wire.FID, name string) *sharedFile {
	rep, _ := a.modify("create "+name, wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: dir, Name: []byte(name), How: wire.Guarded, SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o666}})
	a.expect("create shared", rep.Status, wire.OK)
	s := &sharedFile{lock: newRWLock()}
	for range a.all {
		f := newFile(false, 0o666)
		f.fid = rep.Attr.FID
		s.views = append(s.views, f)
	}
	return s
}

// settle makes everything that the actor has written durable.
func (a *actor) settle() {
	seen := map[*file]bool{}
	for _, p := range a.places(false) {
		if f := p.file(); !seen[f] && !a.lossy {
			seen[f] = true
			a.commit(f)
		}
	}
	for _, s := range a.w.shared {
		if !a.lossy {
			a.commitCells(s.views[a.id], func(i int) bool { return i%a.all == a.id })
		}
	}
}

// final compares everything with the model.
func (a *actor) final() {
	if a.isLossy() {
		return
	}
	for _, d := range a.dirs() {
		a.list(d)
	}
	seen := map[*file]bool{}
	for _, p := range a.places(false) {
		if f := p.file(); !seen[f] && !a.lossy {
			seen[f] = true
			a.getattr(f)
			a.verify(f, all, 0, len(f.cells)+4)
		}
	}
	for _, s := range a.w.shared {
		if !a.lossy {
			a.verify(s.views[a.id], func(i int) bool { return i%a.all == a.id }, 0, len(s.views[a.id].cells)+4)
		}
	}
}

// unique notes an identity that was given out: each is given once.
func (w *world) unique(a *actor, f wire.FID) {
	w.mu.Lock()
	who, twice := w.fids[f]
	w.fids[f] = a.name()
	w.mu.Unlock()
	if twice {
		a.failf("identity %v was given to %s before", f, who)
	}
}
