package ost

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

var quiet = slog.New(slog.NewTextHandler(func() io.Writer {
	if os.Getenv("OST_LOG") != "" {
		return os.Stderr
	}
	return io.Discard
}(), nil))

// tickClock rises by a millisecond with every look.
type tickClock struct{ t atomic.Int64 }

func newClock() *tickClock {
	c := &tickClock{}
	c.t.Store(1e18)
	return c
}
func (c *tickClock) now() int64 { return c.t.Add(1e6) }

// open gives a target that serves.
func open(t testing.TB, o Options) *Target {
	t.Helper()
	g := openOnly(t, o)
	g.Begin(0)
	return g
}

// openOnly gives a target whose recovery is not over.
func openOnly(t testing.TB, o Options) *Target {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	if o.CommitInterval == 0 {
		o.CommitInterval = -1
	}
	if o.BootID == "" {
		o.BootID = "boot-1"
	}
	g, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// abandon stops the target's goroutines and nothing else, as kill -9 does.
func abandon(g *Target) {
	g.down.Store(true)
	g.halt()
}

func call(g *Target, req *wire.Request) *wire.Reply {
	rep := &wire.Reply{}
	if g.TryHandle(req, rep) {
		return rep
	}
	ch := make(chan struct{})
	g.Handle(req, rep, func() { close(ch) })
	<-ch
	return rep
}

func fid(n uint32) wire.FID { return wire.FID{Seq: 2, OID: n} }

func write(g *Target, f wire.FID, off uint64, b []byte, st wire.StableHow) *wire.Reply {
	return call(g, &wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: f, Offset: off, Bulk: b, Stable: st})
}

func read(g *Target, f wire.FID, off uint64, n int) ([]byte, *wire.Reply) {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xee
	}
	rep := call(g, &wire.Request{Header: wire.Header{Op: wire.OpRead}, FID: f, Offset: off, Bulk: b})
	return b[:rep.Count], rep
}

func op(g *Target, o wire.Op, f wire.FID) *wire.Reply {
	return call(g, &wire.Request{Header: wire.Header{Op: o}, FID: f})
}

func punch(g *Target, f wire.FID, size, log uint64) *wire.Reply {
	return call(g, &wire.Request{Header: wire.Header{Op: wire.OpPunch}, FID: f, Size: size, LogID: log})
}

func want(t testing.TB, rep *wire.Reply, s wire.Status) {
	t.Helper()
	if rep.Status != s {
		t.Fatalf("status %v, want %v", rep.Status, s)
	}
}

func TestBasics(t *testing.T) {
	for _, c := range []struct {
		name string
		opts func() Options
	}{
		{"mem", func() Options { return Options{FS: objfs.NewMem(newClock().now), SegShift: 13} }},
		{"linux", func() Options { return Options{Dir: t.TempDir(), SegShift: 13} }},
		{"linux-1TiB", func() Options { return Options{Dir: t.TempDir()} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := open(t, c.opts())
			f := fid(7)
			_, rep := read(g, f, 0, 10)
			if want(t, rep, wire.OK); rep.Count != 0 || rep.Obj.Exists {
				t.Fatalf("missing object: %+v", rep.Obj)
			}
			want(t, punch(g, f, 0, 5), wire.OK)
			if op(g, wire.OpObjAttr, f).Obj.Exists {
				t.Fatal("punch to 0 made an object")
			}
			rep = call(g, &wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: f, Offset: 10, Bulk: []byte("hello"), Time: 1e18})
			want(t, rep, wire.OK)
			if d := cmp.Diff(wire.PreAttr{Valid: true}, rep.ObjPre); d != "" {
				t.Fatal(d)
			}
			o := rep.Obj
			if rep.Count != 5 || !o.Exists || o.Size != 15 || o.Mtime != 1e18 || o.Ctime != 1e18 || o.Version != rep.Transno || rep.Transno == 0 {
				t.Fatalf("write: %+v", rep)
			}
			if rep.LastCommitted >= rep.Transno {
				t.Fatal("unstable write is said to be committed")
			}
			rep2 := write(g, f, 0, []byte("x"), wire.FileSync)
			want(t, rep2, wire.OK)
			if d := cmp.Diff(wire.PreAttr{Valid: true, Size: 15, Mtime: 1e18, Ctime: 1e18}, rep2.ObjPre); d != "" {
				t.Fatal(d)
			}
			if rep2.LastCommitted < rep2.Transno {
				t.Fatalf("stable write not committed: %d < %d", rep2.LastCommitted, rep2.Transno)
			}
			b, rep := read(g, f, 0, 100)
			if want(t, rep, wire.OK); !bytes.Equal(b, []byte("x\x00\x00\x00\x00\x00\x00\x00\x00\x00hello")) {
				t.Fatalf("read %q", b)
			}
			// Sparse and across segments.
			want(t, write(g, f, 20000-3, []byte("across"), wire.Unstable), wire.OK)
			want(t, write(g, f, 3*8192-2, []byte("border"), wire.Unstable), wire.OK)
			b, _ = read(g, f, 3*8192-4, 100)
			if string(b) != "\x00\x00border" {
				t.Fatalf("border read %q", b)
			}
			// Punch semantics.
			want(t, punch(g, f, 12, 9), wire.OK)
			want(t, write(g, f, 12, []byte("new"), wire.Unstable), wire.OK)
			want(t, punch(g, f, 12, 9), wire.OK)
			want(t, punch(g, f, 3, 8), wire.OK)
			if s := op(g, wire.OpObjAttr, f).Obj.Size; s != 15 {
				t.Fatalf("old log ids were applied: size %d", s)
			}
			want(t, punch(g, f, 50000, 10), wire.OK)
			b, _ = read(g, f, 14, 60000)
			if len(b) != 50000-14 || b[0] != 'w' || bytes.Count(b[1:], []byte{0}) != len(b)-1 {
				t.Fatalf("extended: %d bytes", len(b))
			}
			want(t, op(g, wire.OpSyncObject, f), wire.OK)
			want(t, op(g, wire.OpSyncTarget, f), wire.OK)
			rep = op(g, wire.OpStatfs, f)
			if want(t, rep, wire.OK); rep.Statfs.Total == 0 || rep.Statfs.Avail == 0 {
				t.Fatalf("statfs %+v", rep.Statfs)
			}
			n := 0
			if err := g.WalkObjects(func(i ObjectInfo) {
				n++
				if i.Err != nil || i.FID != f || i.Size != 50000 || i.LogID != 10 {
					t.Errorf("walk: %+v", i)
				}
			}); err != nil || n != 1 {
				t.Fatal(n, err)
			}
			want(t, op(g, wire.OpDestroy, f), wire.OK)
			want(t, call(g, &wire.Request{Header: wire.Header{Op: wire.OpDestroy, Flags: wire.FlagWaitCommit}, FID: f}), wire.OK)
			if op(g, wire.OpObjAttr, f).Obj.Exists {
				t.Fatal("destroyed object exists")
			}
			want(t, write(g, f, 1, []byte("y"), wire.DataSync), wire.ErrStale)
			want(t, punch(g, f, 2, 99), wire.ErrStale)
			want(t, punch(g, f, 0, 100), wire.OK)
			if op(g, wire.OpObjAttr, f).Obj.Exists {
				t.Fatal("a late write has made a destroyed object anew")
			}
			forgetGone(g)
			want(t, write(g, f, 1, []byte("y"), wire.DataSync), wire.OK)
			b, _ = read(g, f, 0, 10)
			if string(b) != "\x00y" {
				t.Fatalf("after destroy %q", b)
			}
			want(t, write(g, f, wire.MaxFileSize, []byte("yy"), wire.Unstable), wire.ErrFBig)
			want(t, write(g, f, ^uint64(0), []byte("yy"), wire.Unstable), wire.ErrFBig)
			want(t, punch(g, f, wire.MaxFileSize+1, 99), wire.ErrFBig)
			want(t, op(g, wire.OpGetattr, f), wire.ErrNotSupp)
			want(t, op(g, 0, f), wire.ErrProto)
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			want(t, op(g, wire.OpObjAttr, f), wire.ErrTargetDown)
		})
	}
}

func TestHugeOffsets(t *testing.T) {
	g := open(t, Options{Dir: t.TempDir()})
	defer g.Close()
	f := fid(1)
	want(t, write(g, f, wire.MaxFileSize-4, []byte("tail"), wire.FileSync), wire.OK)
	rep := op(g, wire.OpObjAttr, f)
	if rep.Obj.Size != wire.MaxFileSize || rep.Obj.Used > 1<<20 {
		t.Fatalf("%+v", rep.Obj)
	}
	b, _ := read(g, f, wire.MaxFileSize-6, 100)
	if string(b) != "\x00\x00tail" {
		t.Fatalf("%q", b)
	}
	want(t, write(g, f, 1<<40-2, []byte("border"), wire.Unstable), wire.OK)
	want(t, punch(g, f, 1<<40+1, 1), wire.OK)
	b, _ = read(g, f, 1<<40-2, 10)
	if string(b) != "bor" {
		t.Fatalf("%q", b)
	}
	want(t, punch(g, f, wire.MaxFileSize, 2), wire.OK)
	b, _ = read(g, f, wire.MaxFileSize-6, 100)
	if len(b) != 6 || !bytes.Equal(b, make([]byte, 6)) {
		t.Fatalf("old tail came back: %q", b)
	}
}

func TestRestart(t *testing.T) {
	clk := newClock()
	m := objfs.NewMem(clk.now)
	opts := Options{FS: m, SegShift: 13, Clock: clk.now, Index: 3}
	g := open(t, opts)
	f := fid(9)
	rep := write(g, f, 100, []byte("data"), wire.Unstable)
	punch(g, fid(10), 77, 4)
	last := op(g, wire.OpPing, f).LastCommitted
	abandon(g)
	m.Kill()
	g = open(t, opts)
	if g.LostUnflushed() || g.FlushErrors() != 0 {
		t.Fatal("a process crash lost data")
	}
	b, r := read(g, f, 100, 10)
	if string(b) != "data" || r.Obj.Mtime < rep.Obj.Mtime-mtimeSlack {
		t.Fatalf("%q %+v", b, r.Obj)
	}
	w2 := write(g, f, 0, []byte("q"), wire.Unstable)
	if w2.Transno <= rep.Transno || last > w2.LastCommitted {
		t.Fatal("transno or last_committed went backwards")
	}
	w2 = op(g, wire.OpObjAttr, f)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if n := m.OpenFDs(); n != 0 {
		t.Fatalf("%d descriptors left", n)
	}
	opts.BootID = "boot-2"
	g = open(t, opts)
	if g.LostUnflushed() {
		t.Fatal("clean stop lost data")
	}
	r = op(g, wire.OpObjAttr, f)
	if d := cmp.Diff(w2.Obj, r.Obj); d != "" {
		t.Fatal("attributes changed over a clean restart:", d)
	}
	if _, err := Open(opts); !errors.Is(err, ErrLocked) {
		t.Fatalf("second open: %v", err)
	}
	abandon(g)
	c := m.CrashClone(1)
	opts.FS, opts.BootID = c, "boot-3"
	g = open(t, opts)
	if !g.LostUnflushed() {
		t.Fatal("power failure not noticed")
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	opts.Index = 4
	if _, err := Open(opts); err == nil {
		t.Fatal("wrong index accepted")
	}
}

func TestAdmission(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	opts := Options{FS: m}
	g := open(t, opts)
	id := wire.ClientID{1}
	do := func(o wire.Op, c wire.ClientID, gen uint64, vip uint32, ep uint64) wire.Status {
		return call(g, &wire.Request{Header: wire.Header{Op: o, Client: c, ClientGen: gen, VIP: vip, VIPEpoch: ep}, FID: fid(1)}).Status
	}
	check := func(got, want wire.Status) {
		t.Helper()
		if got != want {
			t.Fatalf("%v, want %v", got, want)
		}
	}
	check(do(wire.OpObjAttr, id, 1, 0, 0), wire.ErrUnknownClient)
	check(do(wire.OpConnect, id, 5, 0, 0), wire.OK)
	check(do(wire.OpConnect, id, 4, 0, 0), wire.ErrStaleClient)
	check(do(wire.OpObjAttr, id, 4, 0, 0), wire.ErrStaleClient)
	check(do(wire.OpObjAttr, id, 5, 0, 0), wire.OK)
	check(do(wire.OpSetVIPEpoch, id, 5, 2, 10), wire.OK)
	check(do(wire.OpSetVIPEpoch, id, 5, 2, 9), wire.ErrStaleVIP)
	check(do(wire.OpObjAttr, id, 5, 2, 9), wire.ErrStaleVIP)
	abandon(g)
	opts.FS, opts.BootID = m.CrashClone(3), "b"
	g = open(t, opts)
	check(do(wire.OpObjAttr, id, 5, 2, 9), wire.ErrStaleVIP)
	check(do(wire.OpObjAttr, id, 5, 2, 10), wire.OK)
	check(do(wire.OpDisconnect, id, 5, 0, 0), wire.OK)
	check(do(wire.OpObjAttr, id, 5, 2, 10), wire.ErrUnknownClient)
	check(do(wire.OpConnect, wire.ClientID{}, 5, 0, 0), wire.ErrProto)
	g.Close()
}

// model is an object as bytes that are not zero.
type model struct {
	exists bool
	size   uint64
	data   map[uint64]byte
	log    uint64
}

func (m *model) write(off uint64, b []byte) {
	m.exists = true
	for i, c := range b {
		m.data[off+uint64(i)] = c
	}
	m.size = max(m.size, off+uint64(len(b)))
}

func (m *model) punch(size, log uint64) {
	if log != 0 && log <= m.log || !m.exists && size == 0 {
		return
	}
	m.exists, m.size, m.log = true, size, max(log, m.log)
	for k := range m.data {
		if k >= size {
			delete(m.data, k)
		}
	}
}

func (m *model) read(off uint64, n int) []byte {
	if off >= m.size {
		return []byte{}
	}
	b := make([]byte, min(uint64(n), m.size-off))
	for i := range b {
		b[i] = m.data[off+uint64(i)]
	}
	return b
}

func seeds(t *testing.T, n int) []uint64 {
	if s := os.Getenv("OST_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{v}
	}
	base := uint64(time.Now().UnixNano())
	out := make([]uint64, n)
	for i := range out {
		out[i] = base + uint64(i)
	}
	return out
}

func TestDifferential(t *testing.T) {
	for i, seed := range seeds(t, 20) {
		shift := uint8(13)
		if i%2 == 1 {
			shift = 40
		}
		t.Run(fmt.Sprintf("shift=%d/OST_SEED=%d", shift, seed), func(t *testing.T) {
			differential(t, seed, shift)
		})
	}
}

// forgetGone lets destroyed objects be made again, so that tests meet what the old
// ones may have left on the disk.
func forgetGone(g *Target) {
	g.gone.mu.Lock()
	g.gone.m, g.gone.ring, g.gone.at = nil, nil, 0
	g.gone.mu.Unlock()
}

func TestGoneIsBounded(t *testing.T) {
	var g gone
	for i := range uint32(maxGone + 10) {
		g.add(objKey{fid: fid(i)})
		g.add(objKey{fid: fid(i)})
	}
	if len(g.m) != maxGone || len(g.ring) != maxGone {
		t.Errorf("%d and %d remembered", len(g.m), len(g.ring))
	}
	if g.check(objKey{fid: fid(9)}) != nil || g.check(objKey{fid: fid(10)}) != wire.ErrStale || g.check(objKey{fid: fid(maxGone + 9)}) != wire.ErrStale {
		t.Error("not the newest are remembered")
	}
}

func differential(t *testing.T, seed uint64, shift uint8) {
	r := rand.New(rand.NewPCG(seed, 1))
	clk := newClock()
	m := objfs.NewMem(clk.now)
	opts := Options{FS: m, SegShift: shift, Clock: clk.now, MaxOpenFiles: 16}
	g := open(t, opts)
	objs := make([]*model, 5)
	for i := range objs {
		objs[i] = &model{data: map[uint64]byte{}}
	}
	pos := func() uint64 {
		bases := []uint64{0, 4096, 1 << shift, 2 << shift, 5 << shift, g.maxSize - 5000}
		b := bases[r.IntN(len(bases))]
		return min(b-min(b, uint64(r.IntN(300)))+uint64(r.IntN(300)), g.maxSize)
	}
	log := uint64(0)
	for step := range 400 {
		k := r.IntN(len(objs))
		f, mo := fid(uint32(k*64)), objs[k]
		what := ""
		var rep *wire.Reply
		pre := wire.PreAttr{Size: mo.size}
		checkPre := false
		switch x := r.IntN(20); {
		case x < 8:
			b := make([]byte, 1+r.IntN(9000))
			for i := range b {
				b[i] = byte(1 + r.IntN(255))
			}
			off := pos()
			b = b[:min(uint64(len(b)), g.maxSize-off)]
			what = fmt.Sprintf("write %d+%d", off, len(b))
			rep = write(g, f, off, b, wire.StableHow(r.IntN(3)))
			if len(b) > 0 {
				mo.write(off, b)
			}
			checkPre = true
		case x < 13:
			off, n := pos(), r.IntN(10000)
			what = fmt.Sprintf("read %d+%d", off, n)
			var got []byte
			got, rep = read(g, f, off, n)
			if w := mo.read(off, n); !bytes.Equal(got, w) {
				t.Fatalf("step %d: %s: %d bytes, want %d, or other data", step, what, len(got), len(w))
			}
		case x < 16:
			id := uint64(0)
			if r.IntN(4) > 0 {
				if log++; true {
					id = log - min(uint64(r.IntN(3)), log-1)
				}
			}
			size := pos()
			if r.IntN(3) == 0 {
				size = 0
			}
			what = fmt.Sprintf("punch %d log %d", size, id)
			rep = punch(g, f, size, id)
			mo.punch(size, id)
			checkPre = true
		case x < 17:
			what = "sync"
			rep = op(g, wire.OpSyncObject, f)
		case x == 17:
			what = "destroy"
			rep = op(g, wire.OpDestroy, f)
			forgetGone(g)
			*mo = model{data: map[uint64]byte{}}
		case x == 18:
			what = "restart"
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			g = open(t, opts)
			rep = op(g, wire.OpObjAttr, f)
		default:
			what = "kill"
			abandon(g)
			m.Kill()
			g = open(t, opts)
			rep = op(g, wire.OpObjAttr, f)
		}
		if rep.Status != wire.OK {
			t.Fatalf("step %d: %s: %v", step, what, rep.Status)
		}
		if checkPre && rep.ObjPre.Size != pre.Size {
			t.Fatalf("step %d: %s: pre size %d, want %d", step, what, rep.ObjPre.Size, pre.Size)
		}
		a := op(g, wire.OpObjAttr, f).Obj
		if a.Exists != mo.exists || a.Size != mo.size {
			t.Fatalf("step %d: %s: %+v, want exists %v size %d", step, what, a, mo.exists, mo.size)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if n := m.OpenFDs(); n != 0 {
		t.Fatalf("%d descriptors leaked", n)
	}
}

func TestSyncError(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	g := open(t, Options{FS: m})
	f := fid(1)
	want(t, write(g, f, 0, []byte("one"), wire.FileSync), wire.OK)
	w := write(g, f, 0, []byte("two"), wire.Unstable)
	m.FailSync(unix.EIO)
	rep := op(g, wire.OpSyncObject, f)
	want(t, rep, wire.ErrIO)
	if rep.FlushErrors == 0 || g.FlushErrors() == 0 {
		t.Fatal("failed flush not counted")
	}
	want(t, write(g, f, 0, []byte("three"), wire.FileSync), wire.ErrIO)
	m.FailSync(nil)
	rep = op(g, wire.OpPing, f)
	if rep.LastCommitted >= w.Transno && rep.FlushErrors == 0 {
		t.Fatal("last_committed passed lost data silently")
	}
	want(t, write(g, f, 0, []byte("four"), wire.FileSync), wire.OK)
	if err := g.Close(); err == nil {
		t.Fatal("marked clean after a lost flush")
	}
}

func TestFullDisk(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	g := open(t, Options{FS: m})
	m.SetCapacity(64 << 10)
	f := fid(1)
	var total uint64
	for i := 0; ; i++ {
		rep := write(g, f, total, make([]byte, 10000), wire.Unstable)
		if rep.Status == wire.ErrNoSpc {
			break
		}
		want(t, rep, wire.OK)
		if i > 100 || rep.Count == 0 {
			t.Fatal("disk never full")
		}
		total += uint64(rep.Count)
	}
	a := op(g, wire.OpObjAttr, f).Obj
	if a.Size != total {
		t.Fatalf("size %d after %d bytes", a.Size, total)
	}
	want(t, write(g, fid(2), 0, []byte("x"), wire.Unstable), wire.ErrNoSpc)
	if op(g, wire.OpObjAttr, fid(2)).Obj.Exists {
		t.Fatal("half an object")
	}
	want(t, punch(g, f, 0, 1), wire.OK)
	want(t, write(g, fid(2), 0, []byte("x"), wire.FileSync), wire.OK)
	m.SetCapacity(0)
	g.Close()

	m = objfs.NewMem(newClock().now)
	m.SetCapacity(1 << 20)
	g = open(t, Options{FS: m, MinFreeBytes: 512 << 10})
	want(t, write(g, f, 0, make([]byte, 256<<10), wire.Unstable), wire.OK)
	want(t, write(g, f, 256<<10, make([]byte, 400<<10), wire.Unstable), wire.ErrNoSpc)
	want(t, write(g, f, 0, make([]byte, 256<<10), wire.Unstable), wire.OK)
	g.Close()
}

func TestErrors(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	opts := Options{FS: m, MaxOpenFiles: 16}
	g := open(t, opts)
	want(t, write(g, fid(1), 0, []byte("abc"), wire.FileSync), wire.OK)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	// Damage the header.
	k := objKey{fid: fid(1)}
	fd, err := m.Open(k.path(), objfs.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	m.Pwrite(fd, []byte{0xff}, 20)
	m.Close(fd)
	g = open(t, opts)
	for range 2 {
		_, rep := read(g, fid(1), 0, 3)
		want(t, rep, wire.ErrIO)
	}
	want(t, write(g, fid(1), 0, []byte("abc"), wire.FileSync), wire.ErrIO)
	found := false
	g.WalkObjects(func(i ObjectInfo) { found = found || i.FID == fid(1) && i.Err != nil })
	if !found || g.Stats().Damaged == 0 {
		t.Fatal("damage not reported")
	}
	want(t, op(g, wire.OpDestroy, fid(1)), wire.OK)
	forgetGone(g)
	want(t, write(g, fid(1), 0, []byte("abc"), wire.FileSync), wire.OK)
	for _, c := range []struct {
		e unix.Errno
		s wire.Status
	}{{unix.EROFS, wire.ErrROFS}, {unix.EDQUOT, wire.ErrDQuot}, {unix.EFBIG, wire.ErrFBig}, {unix.EMFILE, wire.ErrJukebox}, {unix.EIO, wire.ErrIO}} {
		m.FailOpen(c.e)
		want(t, write(g, fid(77), 0, []byte("x"), wire.Unstable), c.s)
	}
	m.FailOpen(nil)
	m.FailRead(unix.EIO)
	_, rep := read(g, fid(1), 0, 3)
	want(t, rep, wire.ErrIO)
	m.FailRead(nil)
	b, rep := read(g, fid(1), 0, 3)
	if want(t, rep, wire.OK); string(b) != "abc" {
		t.Fatalf("%q", b)
	}
	m.NoNowait()
	for range 2 {
		if b, _ = read(g, fid(1), 0, 3); string(b) != "abc" {
			t.Fatalf("%q", b)
		}
	}
	if !g.noNowait.Load() {
		t.Fatal("fallback not remembered")
	}
	g.Close()
}

func TestTableBounds(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	g := open(t, Options{FS: m, MaxOpenFiles: 64})
	for i := range uint32(2000) {
		want(t, write(g, fid(i), 0, []byte{byte(i)}, wire.Unstable), wire.OK)
		if n := g.Stats().OpenFiles; n > 64*4 {
			t.Fatalf("%d files open", n)
		}
	}
	if err := g.Commit(); err != nil {
		t.Fatal(err)
	}
	for i := range uint32(2000) {
		if b, _ := read(g, fid(i), 0, 2); !bytes.Equal(b, []byte{byte(i)}) {
			t.Fatalf("object %d: %q", i, b)
		}
	}
	if n := g.Stats().OpenFiles; n > 64+16 {
		t.Fatalf("%d files open when idle", n)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestGroupSync holds the first flush and lets others gather: they must share
// the next one.
func TestGroupSync(t *testing.T) {
	m := objfs.NewMem(newClock().now)
	slow := &slowFS{Mem: m, gate: make(chan struct{}), entered: make(chan struct{}, 1)}
	g := open(t, Options{FS: slow})
	f := fid(1)
	want(t, write(g, f, 0, make([]byte, 32*4096), wire.FileSync), wire.OK)
	slow.hold.Store(true)
	var wg sync.WaitGroup
	send := func(i int) {
		rep := &wire.Reply{}
		wg.Add(1)
		g.Handle(&wire.Request{Header: wire.Header{Op: wire.OpWrite}, FID: f, Offset: uint64(i) * 4096, Bulk: make([]byte, 4096), Stable: wire.FileSync}, rep, wg.Done)
	}
	before := m.Syncs()
	send(0)
	<-slow.entered
	for i := 1; i < 32; i++ {
		send(i)
	}
	slow.hold.Store(false)
	close(slow.gate)
	wg.Wait()
	if n := m.Syncs() - before; n != 2 {
		t.Fatalf("32 writes took %d syncs, want 2", n)
	}
	g.Close()
}

type slowFS struct {
	*objfs.Mem
	hold    atomic.Bool
	gate    chan struct{}
	entered chan struct{}
}

func (s *slowFS) Fdatasync(fd int) error {
	if s.hold.Load() {
		s.entered <- struct{}{}
		<-s.gate
	}
	return s.Mem.Fdatasync(fd)
}

func TestTryHandleAllocs(t *testing.T) {
	g := open(t, Options{Dir: t.TempDir()})
	defer g.Close()
	f := fid(1)
	want(t, write(g, f, 0, make([]byte, 8192), wire.FileSync), wire.OK)
	buf := make([]byte, 4096)
	req := &wire.Request{Header: wire.Header{Op: wire.OpRead}, FID: f, Offset: 4096, Bulk: buf}
	rep := &wire.Reply{}
	if !g.TryHandle(req, rep) {
		if g.noNowait.Load() {
			t.Skip("this file system does not know RWF_NOWAIT")
		}
		t.Fatal("cached read was not answered")
	}
	if n := testing.AllocsPerRun(200, func() { g.TryHandle(req, rep) }); n != 0 {
		t.Fatalf("%v allocations per read", n)
	}
	attr := &wire.Request{Header: wire.Header{Op: wire.OpObjAttr}, FID: f}
	if n := testing.AllocsPerRun(200, func() { g.TryHandle(attr, rep) }); n != 0 {
		t.Fatalf("%v allocations per getattr", n)
	}
}

func TestConcurrent(t *testing.T) {
	for _, linux := range []bool{false, true} {
		opts := Options{SegShift: 14, MaxOpenFiles: 32, CommitInterval: time.Millisecond}
		if linux {
			opts.Dir = t.TempDir()
		} else {
			opts.FS = objfs.NewMem(func() int64 { return time.Now().UnixNano() })
		}
		g := open(t, opts)
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := rand.New(rand.NewPCG(uint64(w), 2))
				for range 150 {
					// Each worker owns a slot of 1000 bytes in every object but
					// one, which all destroy and truncate.
					f := fid(uint32(r.IntN(40)))
					off := uint64(w * 4000)
					b := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, 1000)
					switch r.IntN(8) {
					case 0:
						f = fid(1000)
						op(g, wire.OpDestroy, f)
					case 1:
						f = fid(1000)
						punch(g, f, uint64(r.IntN(60000)), 0)
					case 2:
						write(g, fid(1000), uint64(r.IntN(60000)), b, wire.StableHow(r.IntN(3)))
					case 3:
						op(g, wire.OpSyncObject, f)
					case 4:
						op(g, wire.OpSyncTarget, f)
					default:
						rep := write(g, f, off, b, wire.StableHow(r.IntN(3)))
						got, rr := read(g, f, off, 1000)
						if rep.Status != wire.OK || rr.Status != wire.OK || !bytes.Equal(got, b) {
							t.Errorf("read back: %v %v", rep.Status, rr.Status)
						}
					}
				}
			}()
		}
		wg.Wait()
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		if n := g.openFDs.Load(); n != 0 {
			t.Fatalf("%d descriptors leaked", n)
		}
	}
}
