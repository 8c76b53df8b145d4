package ost

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// crashFS takes what a power failure would leave before one of its changes.
type crashFS struct {
	*objfs.Mem
	mu   sync.Mutex
	left int // changes until then; negative: none
	seed uint64
	snap *objfs.Mem
}

func (f *crashFS) tick() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left--; f.left == 0 {
		f.snap = f.Mem.CrashClone(f.seed)
	}
}

func (f *crashFS) Open(p string, flags int) (int, error) {
	if flags&(objfs.Create|objfs.Trunc) != 0 {
		f.tick()
	}
	return f.Mem.Open(p, flags)
}

func (f *crashFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	f.tick()
	return f.Mem.Pwrite(fd, p, off)
}

func (f *crashFS) Truncate(fd int, size int64) error {
	f.tick()
	return f.Mem.Truncate(fd, size)
}

func (f *crashFS) Fdatasync(fd int) error {
	f.tick()
	return f.Mem.Fdatasync(fd)
}

func (f *crashFS) Syncfs() error {
	f.tick()
	return f.Mem.Syncfs()
}

func (f *crashFS) Rename(from, to string) error {
	f.tick()
	return f.Mem.Rename(from, to)
}

func (f *crashFS) Remove(p string) error {
	f.tick()
	return f.Mem.Remove(p)
}

// replayWorld is a target, its clients and what they did.
type replayWorld struct {
	t       *testing.T
	r       *rand.Rand
	clk     *tickClock
	fs      *crashFS
	boot    int
	g       *Target
	clients []*replayer
	files   []*file
	nextID  byte
	nextFID uint32
	log     uint64
	highest uint64 // transno that anybody was told
	deaths  bool

	replays, powers, kills int
}

func (w *replayWorld) logf(format string, args ...any) {
	if os.Getenv("OST_LOG") != "" {
		fmt.Printf(format+"\n", args...)
	}
}

func (w *replayWorld) opts() Options {
	return Options{FS: w.fs, SegShift: 13, Clock: w.clk.now, MaxOpenFiles: 16, BootID: fmt.Sprint("b", w.boot)}
}

func (w *replayWorld) newClient() {
	w.nextID++
	c := &replayer{rec: recov.ClientRecord{Client: wire.ClientID{w.nextID}, Gen: 1}, open: map[wire.FID]bool{}}
	if err := register(w.g, c.rec); err != nil {
		w.t.Fatal(err)
	}
	if !w.crashed() {
		w.clients = append(w.clients, c)
	}
}

func (w *replayWorld) newFile() *file {
	w.nextFID += 64
	return &file{fid: fid(w.nextFID)}
}

// crashed reports whether the power has failed since it was armed.
func (w *replayWorld) crashed() bool {
	w.fs.mu.Lock()
	defer w.fs.mu.Unlock()
	return w.fs.snap != nil
}

// do sends c's request; lost: its answer does not arrive. It reports whether it was answered.
func (w *replayWorld) do(f *file, x *change, lost bool) bool {
	c := x.who
	x.durable = false // that of an earlier execution was overtaken
	f.changes = append(f.changes, x)
	if c == nil {
		rep := call(w.g, &x.req)
		if w.crashed() {
			return false
		}
		w.expect(x, rep)
		x.acked, x.durable = true, true
		return true
	}
	c.open[f.fid] = true
	rep, res := execute(w.g, &x.req, front.Exec{})
	if w.crashed() || lost {
		if rep.Status == wire.OK {
			x.transno, x.inst = rep.Transno, w.g.instance
		}
		c.pending, c.on = x, f
		return false
	}
	if res.Status != rep.Status || res.Transno != rep.Transno || res.NotDone || res.Mismatch {
		w.t.Fatalf("result %+v of reply %+v", res, rep)
	}
	w.answered(f, x, rep)
	return true
}

func (w *replayWorld) expect(x *change, rep *wire.Reply) {
	if rep.Status != wire.OK {
		w.t.Fatalf("%v: %v", x.req.Op, rep.Status)
	}
	if x.punch() && !rep.Obj.Exists && rep.Transno == 0 {
		x.transno, x.inst = 0, w.g.instance
		return
	}
	if rep.Transno <= w.highest {
		w.t.Fatalf("transno %d, %d was told before", rep.Transno, w.highest)
	}
	w.highest = rep.Transno
	x.transno, x.inst = rep.Transno, w.g.instance
}

func (w *replayWorld) answered(f *file, x *change, rep *wire.Reply) {
	w.expect(x, rep)
	x.acked = true
	if x.req.Stable != wire.Unstable || x.req.Flags&wire.FlagWaitCommit != 0 {
		w.durable(f)
	}
	if x.punch() && !rep.Obj.Exists {
		// Nothing can remember it, so its client has the log record removed at once.
		x.done, x.durable = true, true
	}
	if x.transno != 0 {
		x.who.kept = append(x.who.kept, x)
	}
	w.told(x.who, rep.LastCommitted)
}

// durable notes that everything done to f is on the disk.
func (w *replayWorld) durable(f *file) {
	for _, x := range f.changes {
		if x.inst == w.g.instance {
			x.durable = true
		}
	}
}

func (w *replayWorld) told(c *replayer, lc uint64) {
	for _, f := range w.files {
		for _, x := range f.changes {
			if x.inst == w.g.instance && x.transno <= lc {
				x.durable = true
			}
		}
	}
	w.logf("  told %d", lc)
	c.answer(lc, w.g.instance)
}

// step does something at random.
func (w *replayWorld) step() {
	c := w.clients[w.r.IntN(len(w.clients))]
	if c.pending != nil {
		return // one that waits for an answer
	}
	f := w.live()[w.r.IntN(len(w.live()))]
	lost := w.r.IntN(40) == 0
	switch x := w.r.IntN(40); {
	case x < 20:
		n := 1 + w.r.IntN(3000)
		b := make([]byte, n)
		v := byte(1 + w.r.IntN(255))
		for i := range b {
			b[i] = v
		}
		off := uint64(w.r.IntN(replayLimit - n))
		if w.r.IntN(2) == 0 {
			off = uint64(w.r.IntN(2)) * 8000 // they overlap
		}
		q := wire.Request{Header: c.header(wire.OpWrite), FID: f.fid, Offset: off, Bulk: b, Time: w.clk.now()}
		if w.r.IntN(4) == 0 {
			q.Stable = wire.FileSync
		}
		w.logf("%d writes %d+%d of %v, value %d, stable %d, lost %v", c.rec.Client[0], off, n, f.fid, v, q.Stable, lost)
		if w.r.IntN(6) == 0 {
			// Somebody in the target's process.
			q.Header = wire.Header{Op: wire.OpWrite}
			q.Stable = wire.FileSync
			w.do(f, &change{req: q}, false)
			return
		}
		w.do(f, &change{req: q, who: c}, lost)
	case x < 25:
		for _, o := range w.clients {
			if o.pending != nil && o.pending.punch() && o.on == f {
				return // the MDT has another one that is not executed
			}
		}
		w.log++
		q := wire.Request{Header: c.header(wire.OpPunch), FID: f.fid, Size: uint64(w.r.IntN(12000)), LogID: w.log, Time: w.clk.now()}
		if w.r.IntN(3) == 0 {
			q.Size = 0
		}
		if w.r.IntN(4) == 0 {
			q.Flags = wire.FlagWaitCommit
		}
		w.logf("%d truncates %v to %d, log %d, flags %d, lost %v", c.rec.Client[0], f.fid, q.Size, q.LogID, q.Flags, lost)
		w.do(f, &change{req: q, who: c}, lost)
	case x < 29:
		w.logf("%d syncs %v", c.rec.Client[0], f.fid)
		w.sync(c, f)
	case x < 31 && !slices.ContainsFunc(w.clients, func(o *replayer) bool { return o.on == f && o.pending != nil }):
		// The file's epoch is closed: sizes are known, the truncate records go.
		w.logf("%d closes %v", c.rec.Client[0], f.fid)
		if !w.sync(c, f) {
			return
		}
		for _, x := range f.changes {
			x.done = x.done || x.durable
		}
		delete(c.open, f.fid)
	case x == 31 && !slices.ContainsFunc(w.clients, func(o *replayer) bool { return o.on == f && o.pending != nil }):
		w.logf("%v is removed", f.fid)
		f.gone = true
		for _, o := range w.clients {
			delete(o.open, f.fid)
		}
		if w.r.IntN(2) == 0 {
			call(w.g, &wire.Request{Header: wire.Header{Op: wire.OpDestroy, Flags: wire.FlagWaitCommit}, FID: f.fid})
		}
		i := slices.Index(w.files, f)
		w.files = append(w.files, f)
		w.files[i] = w.newFile()
	case x < 34:
		w.fs.Writeback(w.r)
	case x == 34:
		// What the background does, object by object.
		w.logf("commit")
		for _, f := range w.files {
			call(w.g, &wire.Request{Header: wire.Header{Op: wire.OpSyncObject}, FID: f.fid})
		}
	case x == 35 && w.deaths && len(w.clients) > 2:
		w.logf("%d dies", c.rec.Client[0])
		c.dead = true
		w.clients = slices.DeleteFunc(w.clients, func(o *replayer) bool { return o == c })
		w.g.DelClient(c.rec.Client, c.rec.Gen, true)
		w.redo()
		w.newClient()
	default:
		if f.gone {
			return
		}
		if err := f.check(w.g); err != nil && !w.crashed() {
			w.t.Fatal(f.fid, err)
		}
	}
}

// live are the files that are not removed.
func (w *replayWorld) live() []*file { return w.files[:4] }

func (w *replayWorld) sync(c *replayer, f *file) bool {
	rep := call(w.g, &wire.Request{Header: c.header(wire.OpSyncObject), FID: f.fid})
	if w.crashed() {
		return false
	}
	if rep.Status != wire.OK {
		w.t.Fatal(rep.Status)
	}
	w.durable(f)
	w.told(c, rep.LastCommitted)
	return true
}

// redo executes the logged truncates of clients that are dead.
func (w *replayWorld) redo() {
	for _, f := range w.live() {
		var late []*change
		for _, x := range f.changes {
			if !x.punch() || x.done || x.who == nil || !x.who.dead {
				continue
			}
			q := x.req
			q.Header = wire.Header{Op: wire.OpPunch, Flags: wire.FlagWaitCommit}
			rep := call(w.g, &q)
			if w.crashed() {
				return
			}
			if rep.Status != wire.OK {
				w.t.Fatal(rep.Status)
			}
			w.highest = max(w.highest, rep.Transno)
			x.done, x.durable, x.inst = true, true, w.g.instance
			if !x.acked && rep.Obj.Size == x.req.Size {
				late = append(late, x)
			}
		}
		for _, x := range late {
			// Executed after what was done while it was not answered.
			f.changes = append(slices.DeleteFunc(f.changes, func(o *change) bool { return o == x }), x)
		}
	}
}

// fail ends the target's life, by a power failure or a crash of its process.
func (w *replayWorld) fail(power bool) {
	abandon(w.g)
	if !power {
		w.kills++
		w.logf("KILL")
		w.fs.Kill()
		// What was executed is in the kernel.
		for _, f := range w.files {
			for _, x := range f.changes {
				if x.inst == w.g.instance {
					x.durable = true
				}
			}
		}
		w.fs = &crashFS{Mem: w.fs.Mem, left: -1}
		return
	}
	w.powers++
	w.logf("POWER FAILURE")
	m := w.fs.snap
	if m == nil {
		m = w.fs.CrashClone(w.r.Uint64())
	}
	w.boot++
	w.fs = &crashFS{Mem: m, left: -1}
}

// restart opens the target and repeats what the clients have kept, failing
// again and again meanwhile if again says so.
func (w *replayWorld) restart(again func() bool) {
	for {
		w.g = openOnly(w.t, w.opts())
		info := &wire.OSTInfo{}
		for _, c := range w.clients {
			info.Clients = append(info.Clients, wire.ClientInfo{ID: c.rec.Client, Gen: c.rec.Gen})
			for f := range c.open {
				info.Epochs = append(info.Epochs, wire.EpochInfo{FID: f, Client: c.rec.Client})
			}
		}
		for _, f := range w.files {
			if f.gone {
				info.Unlinked = append(info.Unlinked, f.fid)
			}
		}
		if err := w.g.Learn(info); err != nil {
			w.t.Fatal(err)
		}
		tab, err := w.g.Table()
		if err != nil {
			w.t.Fatal(err)
		}
		if len(tab.Clients) != len(w.clients) {
			w.t.Fatalf("%d clients, want %d", len(tab.Clients), len(w.clients))
		}
		if w.replay(tab, again) {
			w.g.Begin(w.highest)
			// What it flushes in the background must not make the rest depend on chance.
			if err := w.g.Commit(); err != nil {
				w.t.Fatal(err)
			}
			w.redo()
			w.resend(tab)
			return
		}
	}
}

// replay repeats what is above the end of the target's log; false: it failed meanwhile.
func (w *replayWorld) replay(tab front.Table, again func() bool) bool {
	type item struct {
		c *replayer
		x *change
	}
	var all []item
	for _, c := range w.clients {
		c.kept = slices.DeleteFunc(c.kept, func(x *change) bool { return x.transno <= tab.Transno })
		for _, x := range c.kept {
			all = append(all, item{c, x})
		}
	}
	slices.SortFunc(all, func(a, b item) int { return int(int64(a.x.transno) - int64(b.x.transno)) })
	for _, it := range all {
		if again() {
			w.fail(w.r.IntN(2) == 0)
			return false
		}
		q := it.x.req
		q.Flags, q.Transno = wire.FlagReplay, it.x.transno
		w.logf("replay of %d by %d", it.x.transno, it.c.rec.Client[0])
		rep, res := execute(w.g, &q, front.Exec{Transno: it.x.transno})
		if rep.Status != wire.OK || rep.Transno != it.x.transno || res.Mismatch || res.NotDone || res.Transno != it.x.transno {
			w.t.Fatalf("replay: %+v %+v", rep, res)
		}
		w.replays++
		it.x.inst = w.g.instance
		if w.r.IntN(8) == 0 { // the background
			call(w.g, &wire.Request{Header: wire.Header{Op: wire.OpSyncObject}, FID: it.x.req.FID})
		}
		if rep.LastCommitted >= it.x.transno && w.r.IntN(2) == 0 {
			w.told(it.c, rep.LastCommitted)
		}
	}
	return true
}

// resend sends again what was not answered, after others went on.
func (w *replayWorld) resend(tab front.Table) {
	for _, c := range w.clients {
		x, f := c.pending, c.on
		if x == nil {
			continue
		}
		c.pending, c.on = nil, nil
		x.req.Flags |= wire.FlagResend
		i := slices.IndexFunc(tab.Slots, func(s recov.SlotRecord) bool {
			return s.Client == c.rec.Client && s.Slot == x.req.Slot && s.XID == x.req.XID
		})
		w.logf("resend of %d by %d, in slot %v", x.req.XID, c.rec.Client[0], i >= 0)
		if i >= 0 {
			if !x.durable {
				w.t.Fatal("a slot tells of a request that is lost")
			}
			var rep wire.Reply
			w.g.Rebuild(&x.req, &rep, &tab.Slots[i])
			want := uint32(len(x.req.Bulk))
			if rep.Status != wire.OK || !rep.Reconstructed || rep.Transno != x.transno || rep.Count != want || rep.ObjPre.Valid || rep.Obj.Exists != (x.transno != 0) {
				w.t.Fatalf("rebuilt: %+v", rep)
			}
			x.acked = true
			if x.punch() && x.transno == 0 {
				if rep.Obj.Exists {
					w.t.Fatal("a truncate of a missing object looks as if the object remembered it")
				}
				x.done, x.durable = true, true
			}
			continue
		}
		if x.durable && x.inst != 0 && w.kills > 0 && w.g.instance == x.inst+1 && !w.g.lostData {
			w.t.Fatalf("no slot tells of a request that was executed before the process died: XID %d, transno %d", x.req.XID, x.transno)
		}
		at := slices.Index(f.changes, x)
		f.changes = slices.Delete(f.changes, at, at+1)
		w.do(f, x, false)
		if size := call(w.g, &wire.Request{Header: wire.Header{Op: wire.OpObjAttr}, FID: f.fid}).Obj.Size; x.punch() && size != x.req.Size {
			// It was executed and is durable: it has its old place.
			f.changes = slices.Insert(f.changes[:len(f.changes)-1], at, x)
			x.durable = true
		}
	}
}

// TestReplay runs clients that keep what is not committed, as imports do, and
// lets process and power fail again and again, also in the middle of an operation
// and of recovery. Stable data have to be there whoever dies, and with their
// clients alive all data, in the order of their first execution. Covers RS 87a,
// RO 3, RO 6, RO 7, RS 89, SM 148, RD 16, RS 52, SM 54.
func TestReplay(t *testing.T) {
	n := 60
	if testing.Short() {
		n = 12
	}
	for i, seed := range seeds(t, n) {
		deaths := i%2 == 1
		if os.Getenv("OST_SEED") != "" {
			deaths = os.Getenv("OST_DEATHS") != ""
		}
		t.Run(fmt.Sprintf("deaths=%v/OST_SEED=%d", deaths, seed), func(t *testing.T) { replayRun(t, seed, deaths) })
	}
}

func replayRun(t *testing.T, seed uint64, deaths bool) {
	clk := newClock()
	w := &replayWorld{t: t, r: rand.New(rand.NewPCG(seed, 11)), clk: clk, deaths: deaths}
	w.fs = &crashFS{Mem: objfs.NewMem(clk.now), left: -1}
	w.g = open(t, w.opts())
	for range 3 {
		w.newClient()
	}
	for range 4 {
		w.files = append(w.files, w.newFile())
	}
	for range 12 {
		steps := 1 + w.r.IntN(60)
		power := w.r.IntN(3) > 0
		if power && w.r.IntN(3) > 0 {
			w.fs.mu.Lock()
			w.fs.seed, w.fs.left = w.r.Uint64(), 1+w.r.IntN(8*steps)
			w.fs.mu.Unlock()
		}
		for range steps {
			if w.step(); w.crashed() {
				break
			}
		}
		if deaths && power && len(w.clients) > 1 && w.r.IntN(2) == 0 {
			c := w.clients[0]
			w.logf("%d dies with the target", c.rec.Client[0])
			c.dead = true
			w.clients = w.clients[1:]
		}
		w.fail(power)
		fails := w.r.IntN(3)
		w.restart(func() bool {
			if fails > 0 && w.r.IntN(6) == 0 {
				fails--
				return true
			}
			return false
		})
		for i, f := range w.files {
			if err := f.check(w.g); err != nil {
				t.Fatalf("after recovery, file %d, %v: %v", i, f.fid, err)
			}
		}
		for len(w.clients) < 3 {
			w.newClient()
		}
	}
	if err := w.g.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d power failures, %d kills, %d replays", w.powers, w.kills, w.replays)
}
