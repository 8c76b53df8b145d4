package powerfail

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/fsck"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

var (
	seedFlag   = flag.Uint64("powerfail.seed", 0, "seed of the only history to run; 0: new ones")
	roundsFlag = flag.Int("powerfail.rounds", 0, "crashes per history; 0: 60, or 15 with -short")
)

// world is a history: one file system over many crashes.
type world struct {
	t    *testing.T
	seed uint64
	rng  *rand.Rand
	clk  clock.Strict
	gen  uint64
	n    *node
	ws   []*worker
	ops  atomic.Int64 // acknowledged operations

	mu      sync.Mutex
	fids    map[wire.FID]string // identities ever given out
	transno uint64              // highest acknowledged
	reused  error

	lost, resent, redone int
}

// call is a namespace operation with its reply key, kept for resends.
type call struct {
	req   wire.Request
	apply func(*wire.Reply) // its effect on the model; the reply has the identity
	want  wire.Status
}

// worker changes its own directory, one operation at a time.
type worker struct {
	w    *world
	id   int
	rng  *rand.Rand
	root *object
	hist []string
	xid  uint32
	ver  uint32
	next int

	acked []*call
	open  *call // asked and not answered
	err   error
}

func (w *world) failf(format string, a ...any) {
	w.t.Helper()
	w.t.Fatalf("-powerfail.seed=%d: %s", w.seed, fmt.Sprintf(format, a...))
}

func cred() wire.Cred { return wire.Cred{} }

// newCall gives an operation the next reply key.
func (k *worker) newCall(req wire.Request, apply func(*wire.Reply)) *call {
	k.xid++
	req.Flags |= wire.FlagWaitCommit
	req.Cred = cred()
	req.Key = wire.ReplyKey{Addr: [16]byte{10, byte(k.id)}, Port: 800, XID: k.xid, Proc: 100003<<8 | 7, Sum: uint64(k.xid) * 77}
	return &call{req: req, apply: apply}
}

// send executes a call on a node.
func (c *call) send(n *node) *wire.Reply {
	req, rep := c.req, &wire.Reply{}
	if req.Op == wire.OpSetattr {
		n.fs.Setattr(ctx, client.Owner{}, &req, rep)
	} else {
		n.fs.Call(ctx, client.Owner{}, &req, rep)
	}
	if req.Op == wire.OpCreate && rep.Status == wire.OK && !rep.Reconstructed {
		n.fs.Created(rep.Attr.FID, rep.Transno)
	}
	return rep
}

// do sends a call and notes its effect, if it was answered before the crash.
func (k *worker) do(c *call) bool {
	k.open = c
	rep := c.send(k.w.n)
	return k.w.n.g.alive(func() {
		k.open = nil
		if rep.Status != c.want || rep.Reconstructed {
			k.err = fmt.Errorf("operation %d %q: %v (reconstructed %v), want %v", c.req.Op, c.req.Name, rep.Status, rep.Reconstructed, c.want)
			return
		}
		k.done(c, rep)
	}) && k.err == nil
}

// done applies an acknowledged call to the model.
func (k *worker) done(c *call, rep *wire.Reply) {
	w := k.w
	w.mu.Lock()
	w.transno = max(w.transno, rep.Transno)
	switch c.req.Op {
	case wire.OpCreate, wire.OpMkdir, wire.OpSymlink:
		if c.want != wire.OK {
			break
		}
		who := fmt.Sprintf("worker %d call %d", k.id, c.req.Key.XID)
		if was, ok := w.fids[rep.Attr.FID]; ok && was != who {
			w.reused = fmt.Errorf("identity %v of %s is given to %s", rep.Attr.FID, was, who)
		}
		w.fids[rep.Attr.FID] = who
	}
	w.mu.Unlock()
	c.apply(rep)
	// What changed nothing is remembered in memory only: to do it again is right.
	if c.want == wire.OK && rep.Transno != 0 {
		k.acked = append(k.acked, c)
	}
	w.ops.Add(1)
}

// slot is a name in a directory of the model.
type slot struct {
	dir  *object
	name string
}

func (s slot) obj() *object { return s.dir.kids[s.name] }

// slots lists all names of some types; 0: any.
func (k *worker) slots(types ...wire.FileType) (l []slot) {
	var walk func(d *object)
	walk = func(d *object) {
		for _, n := range d.names() {
			o := d.kids[n]
			if len(types) == 0 || slices.Contains(types, o.typ) {
				l = append(l, slot{d, n})
			}
			if o.typ == wire.TypeDir {
				walk(o)
			}
		}
	}
	walk(k.root)
	return l
}

func (k *worker) pick(l []slot) (slot, bool) {
	if len(l) == 0 {
		return slot{}, false
	}
	return l[k.rng.IntN(len(l))], true
}

func (k *worker) anyDir() *object {
	l := k.slots(wire.TypeDir)
	if n := k.rng.IntN(len(l) + 1); n < len(l) {
		return l[n].obj()
	}
	return k.root
}

func (k *worker) name() string {
	k.next++
	// Long names make directories span blocks of the engine.
	return fmt.Sprintf("n%d%s", k.next, strings.Repeat("x", k.rng.IntN(40)))
}

func hdr(op wire.Op) wire.Header { return wire.Header{Op: op} }

// run works until the crash.
func (k *worker) run() {
	for k.err == nil && k.step() {
	}
}

func unlink(s slot) {
	s.obj().links--
	delete(s.dir.kids, s.name)
}

func (k *worker) step() bool {
	mode := uint32(k.rng.IntN(0o1000))
	names := len(k.slots())
	switch p := k.rng.IntN(100); {
	case p < 14 && names < 40:
		d, name, o := k.anyDir(), k.name(), newObject(wire.TypeReg, mode)
		return k.do(k.newCall(wire.Request{
			Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: d.fid, Name: []byte(name),
			SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode},
		}, func(r *wire.Reply) { o.fid = r.Attr.FID; d.kids[name] = o }))
	case p < 18 && names < 40:
		d, name, o := k.anyDir(), k.name(), newObject(wire.TypeDir, mode)
		return k.do(k.newCall(wire.Request{
			Header: hdr(wire.OpMkdir), FID: d.fid, Name: []byte(name), SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode},
		}, func(r *wire.Reply) { o.fid = r.Attr.FID; d.kids[name] = o }))
	case p < 21 && names < 40:
		d, name, o := k.anyDir(), k.name(), newObject(wire.TypeLnk, 0o777)
		o.target = "to/" + name
		return k.do(k.newCall(wire.Request{
			Header: hdr(wire.OpSymlink), FID: d.fid, Name: []byte(name), Data: []byte(o.target),
		}, func(r *wire.Reply) { o.fid = r.Attr.FID; d.kids[name] = o }))
	case p < 26 && names < 40:
		s, ok := k.pick(k.slots(wire.TypeReg, wire.TypeLnk))
		if !ok {
			return true
		}
		o, d, name := s.obj(), k.anyDir(), k.name()
		return k.do(k.newCall(wire.Request{
			Header: hdr(wire.OpLink), FID: o.fid, FID2: d.fid, Name2: []byte(name),
		}, func(*wire.Reply) { o.links++; d.kids[name] = o }))
	case p < 36:
		return k.rename()
	case p < 44:
		s, ok := k.pick(k.slots(wire.TypeReg, wire.TypeLnk))
		if !ok {
			return true
		}
		return k.do(k.newCall(wire.Request{Header: hdr(wire.OpRemove), FID: s.dir.fid, Name: []byte(s.name)},
			func(*wire.Reply) { unlink(s) }))
	case p < 47:
		s, ok := k.pick(k.slots(wire.TypeDir))
		if !ok || s.dir == k.root && s.name == "striped" {
			return true
		}
		c := k.newCall(wire.Request{Header: hdr(wire.OpRmdir), FID: s.dir.fid, Name: []byte(s.name)}, func(*wire.Reply) {})
		if len(s.obj().kids) > 0 {
			c.want = wire.ErrNotEmpty
		} else {
			c.apply = func(*wire.Reply) { unlink(s) }
		}
		return k.do(c)
	case p < 50:
		s, ok := k.pick(k.slots(wire.TypeReg, wire.TypeDir))
		if !ok {
			return true
		}
		o := s.obj()
		return k.do(k.newCall(wire.Request{
			Header: hdr(wire.OpSetattr), FID: o.fid, SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: mode},
		}, func(*wire.Reply) { o.mode = mode }))
	case p < 56:
		return k.truncate()
	case p < 66:
		return k.commit()
	}
	return k.write()
}

func (k *worker) rename() bool {
	s, ok := k.pick(k.slots())
	if !ok || s.dir == k.root && s.name == "striped" {
		return true
	}
	o, d, name := s.obj(), k.anyDir(), k.name()
	if k.rng.IntN(3) == 0 { // over something of the same kind
		types := []wire.FileType{wire.TypeReg, wire.TypeLnk}
		if o.typ == wire.TypeDir {
			types = []wire.FileType{wire.TypeDir}
		}
		if x, ok := k.pick(k.slots(types...)); ok && !(x.dir == k.root && x.name == "striped") {
			d, name = x.dir, x.name
		}
	}
	over := d.kids[name]
	c := k.newCall(wire.Request{Header: hdr(wire.OpRename), FID: s.dir.fid, Name: []byte(s.name), FID2: d.fid, Name2: []byte(name)}, nil)
	c.apply = func(*wire.Reply) {}
	switch {
	case over == o: // nothing happens
	case o.typ == wire.TypeDir && below(o, d):
		c.want = wire.ErrInval
	case over != nil && len(over.kids) > 0:
		c.want = wire.ErrNotEmpty
	default:
		c.apply = func(*wire.Reply) {
			delete(s.dir.kids, s.name)
			if over != nil {
				over.links--
			}
			d.kids[name] = o
		}
	}
	return k.do(c)
}

// below tells whether d is dir or below it.
func below(dir, d *object) bool {
	if dir == d {
		return true
	}
	for _, o := range dir.kids {
		if o.typ == wire.TypeDir && below(o, d) {
			return true
		}
	}
	return false
}

const maxCells = 600 // 300 KiB: several stripes, three segments

func (k *worker) truncate() bool {
	s, ok := k.pick(k.slots(wire.TypeReg))
	if !ok {
		return true
	}
	o, size := s.obj(), 0
	if k.rng.IntN(4) > 0 {
		size = k.rng.IntN(maxCells)
	}
	o.cut = size
	c := k.newCall(wire.Request{
		Header: hdr(wire.OpSetattr), FID: o.fid, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: uint64(size) * cellSize},
	}, func(r *wire.Reply) {
		k.trace(o, "truncated to %d, log %d (was %d)", size, r.Truncate.LogID, len(o.cells))
		o.truncated(size)
	})
	return k.do(c)
}

// trace keeps what happened to files, for the report of a failure.
func (k *worker) trace(o *object, format string, a ...any) {
	if len(k.hist) > 5000 {
		k.hist = k.hist[2500:]
	}
	k.hist = append(k.hist, fmt.Sprintf("%v ", o.fid)+fmt.Sprintf(format, a...))
}

// history is what is remembered of a file.
func (k *worker) history(o *object) string {
	var b strings.Builder
	for _, h := range k.hist {
		if strings.HasPrefix(h, o.fid.String()+" ") || strings.HasPrefix(h, "-") {
			b.WriteString("\n  " + h)
		}
	}
	return b.String()
}

func (k *worker) attr(o *object) (a wire.Attr, ok bool) {
	st, _ := k.w.n.fs.Attr(ctx, client.Owner{}, o.fid, &a, true)
	if st != wire.OK {
		k.err = fmt.Errorf("attributes of %v: %w", o.fid, st)
	}
	if want := uint64(len(o.cells)) * cellSize; st == wire.OK && a.Size != want {
		k.err = fmt.Errorf("%v: size %d, want %d", o.fid, a.Size, want)
	}
	return a, k.err == nil
}

func (k *worker) write() bool {
	s, ok := k.pick(k.slots(wire.TypeReg))
	if !ok {
		return true
	}
	o := s.obj()
	a, ok := k.attr(o)
	if !ok {
		return false
	}
	n := 1 + k.rng.IntN(8)
	if k.rng.IntN(6) == 0 {
		n = 1 + k.rng.IntN(300)
	}
	from := k.rng.IntN(maxCells - n)
	if k.rng.IntN(3) == 0 {
		from = min(len(o.cells), maxCells-n)
	}
	k.ver++
	stable := k.rng.IntN(5) == 0
	how := wire.Unstable
	if stable {
		how = wire.FileSync
	}
	b := make([]byte, n*cellSize)
	fill(b, k.ver)
	o.wrFrom, o.wrTo, o.wrVer = from, from+n, k.ver
	_, st := k.w.n.fs.Write(ctx, client.Owner{}, &a, uint64(from)*cellSize, b, how)
	return k.w.n.g.alive(func() {
		if st != wire.OK {
			k.err = fmt.Errorf("write %v: %w", o.fid, st)
			return
		}
		o.wrote(stable)
		k.trace(o, "wrote %d: %d..%d stable %v", o.wrVer, from, from+n, stable)
		k.w.ops.Add(1)
	}) && k.err == nil
}

func (k *worker) commit() bool {
	s, ok := k.pick(k.slots(wire.TypeReg))
	if !ok {
		return true
	}
	o := s.obj()
	a, ok := k.attr(o)
	if !ok {
		return false
	}
	st := k.w.n.fs.Commit(ctx, client.Owner{}, &a)
	return k.w.n.g.alive(func() {
		if st != wire.OK {
			k.err = fmt.Errorf("commit %v: %w", o.fid, st)
			return
		}
		o.committed()
		k.trace(o, "committed")
		k.w.ops.Add(1)
	}) && k.err == nil
}

// newWorld makes a file system with a directory for each worker.
func newWorld(t *testing.T, seed uint64, workers int) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), fids: map[wire.FID]string{}}
	w.start(newDisks(&w.clk))
	w.n.serve()
	for i := range workers {
		k := &worker{w: w, id: i + 1, root: newObject(wire.TypeDir, 0o755), rng: rand.New(rand.NewPCG(seed, uint64(i)+100))}
		var err error
		if k.root.fid, err = w.n.fs.MkdirAll(ctx, fmt.Sprintf("w%d", i)); err != nil {
			w.failf("%v", err)
		}
		d := newObject(wire.TypeDir, 0o755)
		if d.fid, err = w.n.fs.MkdirAll(ctx, fmt.Sprintf("w%d/striped", i)); err != nil {
			w.failf("%v", err)
		}
		k.root.kids["striped"] = d
		var rep wire.Reply
		w.n.fs.Call(ctx, client.Owner{}, &wire.Request{
			Header: wire.Header{Op: wire.OpSetLayout, Flags: wire.FlagWaitCommit}, FID: d.fid,
			Layout: wire.Layout{StripeSize: 64 << 10, Count: 2},
		}, &rep)
		if rep.Status != wire.OK {
			w.failf("set layout: %v", rep.Status)
		}
		w.ws = append(w.ws, k)
	}
	return w
}

func (w *world) start(d *disks) {
	w.t.Helper()
	w.gen++
	var err error
	if w.n, err = start(d, &w.clk, w.gen); err != nil {
		w.failf("start: %v", err)
	}
}

// load runs the workers until after about n acknowledged operations the node
// crashes, and returns what that leaves.
func (w *world) load(n int, power bool) *disks {
	w.t.Helper()
	var wg sync.WaitGroup
	base := w.ops.Load()
	for _, k := range w.ws {
		k.acked, k.open = nil, nil
		k.hist = append(k.hist, fmt.Sprintf("--- load, power %v, boot %d", power, w.n.d.boot))
		wg.Go(k.run)
	}
	stopped := make(chan struct{})
	go func() { wg.Wait(); close(stopped) }()
	for w.ops.Load()-base < int64(n) {
		select {
		case <-stopped: // they failed
			w.workers()
			w.failf("the workers stopped without a crash")
		case <-time.After(50 * time.Microsecond):
		}
	}
	d := w.n.crash(w.rng, power)
	<-stopped
	w.workers()
	if err := w.n.stop(); err != nil {
		w.failf("stop of what was crashed: %v", err)
	}
	return d
}

func (w *world) workers() {
	w.t.Helper()
	for _, k := range w.ws {
		if k.err != nil {
			w.failf("worker %d: %v", k.id, k.err)
		}
	}
	if w.reused != nil {
		w.failf("%v", w.reused)
	}
}

// fsck checks disks that no node uses.
func (w *world) fsck(d *disks, what string) *fsck.Report {
	w.t.Helper()
	r, err := d.check()
	if err != nil {
		w.failf("fsck %s: %v", what, err)
	}
	if r.ErrorsFound > 0 {
		w.failf("fsck %s:\n%s", what, text(r))
	}
	return r
}

// idle checks that nothing is left to do: no log, no open epoch. Further
// segments of an object whose first one a power failure took may stay: they go
// when the object is written or destroyed.
func (w *world) idle(d *disks, what string) {
	w.t.Helper()
	r := w.fsck(d, what)
	if r.Notes > r.Classes[fsck.ObjectUnfinished].Found {
		w.failf("fsck %s:\n%s", what, text(r))
	}
}

// verify recovers on d and compares everything with the model.
func (w *world) verify(d *disks, power bool) {
	w.t.Helper()
	w.fsck(d, "after the crash")
	// Crashes during the recovery, some of them before it has begun.
	for w.rng.IntN(3) == 0 {
		w.start(d)
		w.lostCheck(power)
		if w.rng.IntN(2) == 0 {
			if err := w.n.recover(); err != nil {
				w.failf("recovery: %v", err)
			}
			w.n.serve()
		}
		d = w.n.crash(w.rng, w.rng.IntN(2) == 0)
		for _, k := range w.ws {
			k.hist = append(k.hist, fmt.Sprintf("--- crash in recovery, boot %d", d.boot))
		}
		if err := w.n.stop(); err != nil {
			w.failf("stop: %v", err)
		}
		w.fsck(d, "after a crash in recovery")
	}
	w.start(d)
	said := w.lostCheck(power)
	if err := w.n.recover(); err != nil {
		w.failf("recovery: %v", err)
	}
	for _, k := range w.ws {
		w.verifyWorker(k, power, said)
	}
	if w.reused != nil {
		w.failf("%v", w.reused)
	}
	// After an orderly stop nothing at all is left to do.
	if err := w.n.stop(); err != nil {
		w.failf("stop: %v", err)
	}
	w.idle(d, "after the recovery and an orderly stop")
	w.start(d)
	if w.n.lost {
		w.failf("data are said to be lost after an orderly stop")
	}
	w.n.serve()
}

// lostCheck compares what the object targets say of unflushed data.
func (w *world) lostCheck(power bool) bool {
	w.t.Helper()
	if w.n.lost && w.n.d.boot == 0 {
		w.failf("data are said to be lost, and power never failed")
	}
	return w.n.lost || power && w.n.d.boot > 0
}

// verifyWorker checks one worker's acknowledged calls, names and data.
func (w *world) verifyWorker(k *worker, power, said bool) {
	w.t.Helper()
	// Retransmissions of acknowledged calls are answered from their records.
	for range min(20, len(k.acked)) {
		c := k.acked[w.rng.IntN(len(k.acked))]
		rep := c.send(w.n)
		if !rep.Reconstructed || rep.Status != wire.OK {
			w.failf("worker %d call %d (operation %d) sent again: %v, reconstructed %v", k.id, c.req.Key.XID, c.req.Op, rep.Status, rep.Reconstructed)
		}
		w.resent++
	}
	var first error
	switch c := k.open; {
	case c == nil:
		if err := k.root.compare(w.n, fmt.Sprint("w", k.id-1)); err != nil {
			w.failf("worker %d: %v", k.id, err)
		}
	case w.rng.IntN(2) == 0:
		// The client sends it again: whether it was executed or not, it is
		// executed once.
		rep := c.send(w.n)
		if rep.Status != c.want {
			w.failf("worker %d: the call that was under way (operation %d %q), sent again: %v (reconstructed %v), want %v", k.id, c.req.Op, c.req.Name, rep.Status, rep.Reconstructed, c.want)
		}
		if !rep.Reconstructed && c.want == wire.OK && rep.Transno != 0 && rep.Transno <= w.transno {
			w.failf("transno %d after %d was acknowledged", rep.Transno, w.transno)
		}
		if rep.Reconstructed {
			w.redone++
		}
		k.done(c, rep)
		if err := k.root.compare(w.n, fmt.Sprint("w", k.id-1)); err != nil {
			w.failf("worker %d after the resend (operation %d, reconstructed %v): %v", k.id, c.req.Op, rep.Reconstructed, err)
		}
	default:
		// It is wholly there or not at all.
		if first = k.root.compare(w.n, fmt.Sprint("w", k.id-1)); first != nil && c.want == wire.OK {
			if c.req.Op != wire.OpSetattr || c.req.SetAttr.Mask&wire.SetSize == 0 {
				c.apply(&wire.Reply{})
			}
			if err := k.root.compare(w.n, fmt.Sprint("w", k.id-1)); err != nil {
				w.failf("worker %d: without operation %d: %v; with it: %v", k.id, c.req.Op, first, err)
			}
		} else if first != nil {
			w.failf("worker %d: %v", k.id, first)
		}
		if err := k.root.learn(w.n); err != nil {
			w.failf("worker %d: %v", k.id, err)
		}
	}
	err := k.root.files(map[*object]bool{}, func(o *object) error {
		lost, err := o.data(w.n, power)
		if err != nil {
			err = fmt.Errorf("%w%s", err, k.history(o))
		}
		if err == nil && lost {
			w.lost++
			if !said {
				err = fmt.Errorf("%v: acknowledged data are lost and nobody said so", o.fid)
			}
		}
		return err
	})
	if err != nil {
		w.failf("worker %d: %v", k.id, err)
	}
	k.open, k.acked = nil, nil
}

func (w *world) end() {
	w.t.Helper()
	if err := w.n.stop(); err != nil {
		w.failf("stop: %v", err)
	}
	w.idle(w.n.d, "at the end")
	w.t.Logf("-powerfail.seed=%d: %d operations, %d resends answered from records, %d resends of calls under way that had been executed, %d files lost uncommitted data",
		w.seed, w.ops.Load(), w.resent, w.redone, w.lost)
}

func rounds() int {
	switch {
	case *roundsFlag > 0:
		return *roundsFlag
	case testing.Short():
		return 15
	}
	return 60
}

func seedOf(n uint64) uint64 {
	if *seedFlag != 0 {
		return *seedFlag
	}
	return uint64(time.Now().UnixNano()) + n
}

// history runs rounds of load, crash and check.
func history(t *testing.T, workers int, power func(*rand.Rand) bool) {
	t.Helper()
	w := newWorld(t, seedOf(uint64(workers)), workers)
	for range rounds() {
		p := power(w.rng)
		w.verify(w.load(w.rng.IntN(150*workers), p), p)
	}
	w.end()
}

// TestPowerFail loses power under load: what was acknowledged as durable is
// there, nothing is half done, calls are executed once, no identity is given
// twice, lost UNSTABLE data are told of, and both stores fit together
// (RS 9, RS 35, RS 55, RS 88, RS 89, SM 54, SM 107, RO 6, RO 7, own 5, own 9).
func TestPowerFail(t *testing.T) {
	power := func(*rand.Rand) bool { return true }
	t.Run("one-worker", func(t *testing.T) { history(t, 1, power) })
	t.Run("four-workers", func(t *testing.T) { history(t, 4, power) })
}

// TestKill kills the process under load: also UNSTABLE data are all there.
func TestKill(t *testing.T) {
	kill := func(*rand.Rand) bool { return false }
	t.Run("one-worker", func(t *testing.T) { history(t, 1, kill) })
	t.Run("four-workers", func(t *testing.T) { history(t, 4, kill) })
}

// TestMixed mixes both.
func TestMixed(t *testing.T) {
	history(t, 3, func(r *rand.Rand) bool { return r.IntN(2) == 0 })
}
