package client

import (
	"bytes"
	"context"
	"math/rand"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Random reads, writes and size changes against a slice of bytes, while epochs
// open and close.
func TestModel(t *testing.T) {
	for _, stripes := range []int{1, 2, 3} {
		b := newBed(t, stripes, Options{})
		rng := rand.New(rand.NewSource(int64(stripes)))
		const limit = 8 * stripe
		for file := range 3 {
			a, transno := b.create(name(file), file == 1)
			f := a.FID
			if file == 1 {
				b.fs.Created(f, transno)
			}
			var model []byte
			for step := range 150 {
				off := rng.Intn(limit)
				switch op := rng.Intn(10); {
				case op < 4:
					p := make([]byte, 1+rng.Intn(3*stripe))
					rng.Read(p)
					how := wire.StableHow(rng.Intn(3))
					if st := b.tryWrite(f, uint64(off), p, how); st != wire.OK {
						t.Fatal(st)
					}
					if end := off + len(p); end > len(model) {
						model = append(model, make([]byte, end-len(model))...)
					}
					copy(model[off:], p)
				case op < 6:
					if st := b.truncate(f, uint64(off)); st != wire.OK {
						t.Fatal(st)
					}
					if off <= len(model) {
						model = model[:off:off]
					} else {
						model = append(model, make([]byte, off-len(model))...)
					}
				case op < 7:
					b.closeAll()
					if n := b.fs.OpenEpochs(); n != 0 {
						t.Fatalf("%d epochs left", n)
					}
					if a := b.mdtAttr(f); a.EpochOpen || a.Size != uint64(len(model)) {
						t.Fatalf("step %d: the MDT has size %d, open %v, want %d", step, a.Size, a.EpochOpen, len(model))
					}
				case op < 8:
					a := b.attr(f)
					if st := b.fs.Commit(ctx, Owner{}, &a); st != wire.OK || a.Size != uint64(len(model)) {
						t.Fatalf("commit: %v size %d", st, a.Size)
					}
				}
				b.checkSize("model", f, uint64(len(model)))
				n := 1 + rng.Intn(2*stripe)
				var want []byte
				if off < len(model) {
					want = model[off:min(off+n, len(model))]
				}
				if got := b.read(f, uint64(off), n); !bytes.Equal(got, want) {
					t.Fatalf("stripes %d file %d step %d: read of %d at %d differs", stripes, file, step, n, off)
				}
			}
			b.closeAll()
			if l := b.pending(); len(l) != 0 {
				t.Fatalf("left in the log: %+v", l)
			}
		}
	}
}

func TestMerge(t *testing.T) {
	l := wire.Layout{StripeSize: stripe, Count: 2}
	a := wire.Attr{Type: wire.TypeReg, Size: 999, Used: 999, Mtime: 50, Ctime: 100}
	merge := func(objs ...wire.ObjAttr) wire.Attr {
		var g merger
		for i := range objs {
			g.add(&l, uint8(i), &objs[i])
		}
		r := a
		g.apply(&r)
		return r
	}
	for _, c := range []struct {
		what string
		objs []wire.ObjAttr
		want wire.Attr
	}{
		{"no objects: empty, times of the inode", []wire.ObjAttr{{Size: 7}, {}}, wire.Attr{Mtime: 50, Ctime: 100}},
		{"newest object decides", []wire.ObjAttr{{Exists: true, Size: 10, Used: 1, Mtime: 300, Ctime: 300}, {Exists: true, Size: 5, Used: 2, Mtime: 200, Ctime: 200}},
			wire.Attr{Size: stripe + 5, Used: 3, Mtime: 300, Ctime: 300}},
		{"inode newer: its mtime stays", []wire.ObjAttr{{Exists: true, Size: 10, Used: 1, Mtime: 90, Ctime: 90}}, wire.Attr{Size: 10, Used: 1, Mtime: 50, Ctime: 100}},
		{"as old as the inode: its mtime stays", []wire.ObjAttr{{Exists: true, Size: 10, Mtime: 100, Ctime: 100}}, wire.Attr{Size: 10, Mtime: 50, Ctime: 100}},
	} {
		c.want.Type = wire.TypeReg
		if got := merge(c.objs...); got != c.want {
			t.Errorf("%s:\n%+v, want\n%+v", c.what, got, c.want)
		}
	}
}

// Before the first write is answered the epoch is open at the MDT, durably, and
// once per file, not per write.
func TestEpochOpensOnce(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	var bad atomic.Bool
	b.setHook(func(req *wire.Request, _ *wire.Reply) bool {
		if req.Op == wire.OpOpenEpoch && req.Flags&wire.FlagWaitCommit == 0 {
			bad.Store(true)
		}
		return false
	})
	for i := range 5 {
		b.write(a.FID, uint64(i), []byte("x"))
		if !b.mdtAttr(a.FID).EpochOpen {
			t.Fatal("written without an epoch")
		}
	}
	if n := b.count(wire.OpOpenEpoch); n != 1 || bad.Load() {
		t.Errorf("%d opens, one of them not durable: %v", n, bad.Load())
	}
	b.closeAll()
	b.write(a.FID, 0, []byte("x"))
	if n := b.count(wire.OpOpenEpoch); n != 2 {
		t.Errorf("%d opens after one close", n)
	}
	c, transno := b.create("g", true)
	b.fs.Created(c.FID, transno)
	b.write(c.FID, 0, []byte("x"))
	if n := b.count(wire.OpOpenEpoch); n != 2 {
		t.Errorf("%d opens: a created file's epoch was open", n)
	}
}

// The OSTs are not asked about files that were made and not written.
func TestCloseOfUntouchedFiles(t *testing.T) {
	b := newBed(t, 2, Options{})
	a, transno := b.create("f", true)
	b.fs.Created(a.FID, transno)
	b.closeAll()
	if m := b.mdtAttr(a.FID); m.EpochOpen || m.Size != 0 || m.Mtime != a.Mtime || m.Ctime != a.Ctime {
		t.Errorf("%+v", m)
	}
	if n := b.count(wire.OpSyncObject); n != 0 {
		t.Errorf("%d flushes", n)
	}
	a, transno = b.create("g", true)
	b.fs.Created(a.FID, transno)
	b.write(a.FID, 10, []byte("x"))
	b.closeAll()
	if m := b.mdtAttr(a.FID); m.EpochOpen || m.Size != 11 {
		t.Errorf("%+v", m)
	}
}

// After Close nothing is changed any more.
func TestTruncatedAfterFSClose(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("12345678"))
	if err := b.fs.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if st := b.fs.Truncated(ctx, Owner{}, &a, wire.Truncate{LogID: 1}); st != wire.ErrTargetDown {
		t.Error(st)
	}
	if n := b.count(wire.OpPunch); n != 0 {
		t.Errorf("%d punches", n)
	}
}

// The closer works by itself, and early when there are too many epochs.
func TestCloser(t *testing.T) {
	b := newBed(t, 2, Options{EpochIdle: 8 * time.Millisecond})
	var fids []wire.FID
	for i := range 40 {
		a, _ := b.create(name(i), false)
		b.write(a.FID, uint64(i), []byte("data"))
		fids = append(fids, a.FID)
	}
	wait(t, "epochs to close", func() bool { return b.fs.OpenEpochs() == 0 })
	for i, f := range fids {
		if a := b.mdtAttr(f); a.EpochOpen || a.Size != uint64(i)+4 {
			t.Fatalf("file %d: %+v", i, a)
		}
	}
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waiting for", what)
		}
	}
}

// Writers, truncaters and closing race; in the end size and data are those of
// the last operation, at the MDT too.
func TestCloseAgainstUse(t *testing.T) {
	b := newBed(t, 2, Options{})
	stop := make(chan struct{})
	var closer, users sync.WaitGroup
	closer.Add(1)
	go func() {
		defer closer.Done()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := b.fs.closeEpochs(ctx, 0); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	fids := make([]wire.FID, 4)
	for i := range fids {
		a, _ := b.create(name(i), false)
		fids[i] = a.FID
		users.Add(1)
		go func() {
			defer users.Done()
			for k := uint64(1); k <= 150; k++ {
				if st := b.tryWrite(fids[i], k*1000, []byte("tail"), wire.Unstable); st != wire.OK {
					t.Error(st)
					return
				}
				var a wire.Attr
				if st, _ := b.fs.Attr(ctx, Owner{}, fids[i], &a, true); st != wire.OK || a.Size != k*1000+4 {
					t.Errorf("file %d: %v size %d after write %d", i, st, a.Size, k)
					return
				}
				if k%10 == 0 {
					if st := b.truncate(fids[i], k*500); st != wire.OK {
						t.Error(st)
						return
					}
					if st, _ := b.fs.Attr(ctx, Owner{}, fids[i], &a, true); st != wire.OK || a.Size != k*500 {
						t.Errorf("file %d: %v size %d after truncate %d", i, st, a.Size, k)
						return
					}
				}
			}
		}()
	}
	users.Wait()
	close(stop)
	closer.Wait()
	b.closeAll()
	for _, f := range fids {
		if a := b.mdtAttr(f); a.EpochOpen || a.Size != 150*500 {
			t.Errorf("%+v", a)
		}
	}
	if l := b.pending(); len(l) != 0 {
		t.Errorf("log: %+v", l)
	}
}

// A file can be seen before its create is answered. What others did to it by
// then must not make the creator believe in an epoch that is closed again.
func TestCreatedAfterClose(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, transno := b.create("f", true)
	b.write(a.FID, 0, []byte("1234"))
	b.closeAll()
	b.fs.Created(a.FID, transno)
	b.write(a.FID, 0, []byte("12345678"))
	b.closeAll()
	b.checkSize("after both", a.FID, 8)
	if b.mdtAttr(a.FID).EpochOpen {
		t.Error("the epoch stays open")
	}
	// And without a write it does not stay open either.
	c, transno := b.create("g", true)
	x, _ := b.create("x", false)
	for i := range 200 { // some file of the same shard
		x, _ = b.create("x"+name(i), false)
		if b.fs.epochs.shard(x.FID) == b.fs.epochs.shard(c.FID) {
			break
		}
	}
	b.write(x.FID, 0, []byte("x"))
	b.closeAll()
	b.fs.Created(c.FID, transno)
	b.closeAll()
	if b.mdtAttr(c.FID).EpochOpen || b.fs.OpenEpochs() != 0 {
		t.Error("the epoch of a file that nobody writes stays open")
	}
}

// The epoch that a truncating create relies on may be closed before the punch.
func TestTruncatedAfterClose(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("12345678"))
	req := wire.Request{FID: wire.RootFID, Name: []byte("f"), How: wire.Unchecked, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 3}}
	req.Op, req.Flags = wire.OpCreate, wire.FlagWaitCommit
	var rep wire.Reply
	b.fs.Call(ctx, Owner{}, &req, &rep)
	if rep.Status != wire.OK || rep.Truncate.LogID == 0 {
		t.Fatalf("%v %+v", rep.Status, rep.Truncate)
	}
	b.closeAll()
	if st := b.fs.Truncated(ctx, Owner{}, &rep.Attr, rep.Truncate); st != wire.OK {
		t.Fatal(st)
	}
	b.checkSize("after the punch", a.FID, 3)
	b.write(a.FID, 3, []byte("x"))
	b.closeAll()
	b.checkSize("after the close", a.FID, 4)
	if b.mdtAttr(a.FID).EpochOpen {
		t.Error("the epoch stays open")
	}
	// Of a file that is gone there is nothing to cut.
	b.fs.Call(ctx, Owner{}, &req, &rep)
	b.remove("f")
	b.closeAll()
	if st := b.fs.Truncated(ctx, Owner{}, &rep.Attr, rep.Truncate); st != wire.OK {
		t.Error(st)
	}
}

// A punch that failed is executed before anything is written: its record is at
// the MDT, and a recovery would cut off what was written after it.
func TestFailedPunchComesBeforeWrites(t *testing.T) {
	for _, by := range []string{"write", "close", "truncate"} {
		b := newBed(t, 2, Options{})
		a, _ := b.create("f", false)
		b.write(a.FID, 0, bytes.Repeat([]byte{1}, 2*stripe))
		var fail atomic.Bool
		fail.Store(true)
		b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
			if req.Op != wire.OpPunch || req.Stripe != 1 || !fail.Load() {
				return false
			}
			rep.Status = wire.ErrIO
			return true
		})
		if st := b.truncate(a.FID, 10); st != wire.ErrIO {
			t.Fatal(st)
		}
		if st := b.tryWrite(a.FID, 0, []byte("x"), wire.Unstable); st != wire.ErrIO {
			t.Fatalf("a write passed a truncate that is not done: %v", st)
		}
		if _, err := b.fs.closeEpochs(ctx, 0); err == nil {
			t.Fatal("closed over a truncate that is not done")
		}
		fail.Store(false)
		size := uint64(10)
		switch by {
		case "write":
			size = stripe + 100
			b.write(a.FID, stripe+99, []byte{2})
			if p := b.read(a.FID, 10, stripe+89); !bytes.Equal(p, make([]byte, stripe+89)) {
				t.Error("data from before the truncate")
			}
		case "truncate":
			size = 3 * stripe
			if st := b.truncate(a.FID, size); st != wire.OK {
				t.Fatal(st)
			}
			if p := b.read(a.FID, 10, 3*stripe-10); !bytes.Equal(p, make([]byte, 3*stripe-10)) {
				t.Error("data from before the truncate")
			}
		}
		b.closeAll()
		b.checkSize(by, a.FID, size)
		if l := b.pending(); len(l) != 0 {
			t.Errorf("%s: log %+v", by, l)
		}
	}
}

// An object that does not exist cannot remember a punch; its record must be
// gone before the truncate is answered.
func TestPunchOfNothingLeavesNoRecord(t *testing.T) {
	b := newBed(t, 2, Options{})
	a, transno := b.create("f", true)
	b.fs.Created(a.FID, transno)
	if st := b.truncate(a.FID, 0); st != wire.OK {
		t.Fatal(st)
	}
	if l := b.pending(); len(l) != 0 {
		t.Fatalf("no object: %+v", l)
	}
	b.write(a.FID, 0, []byte("first stripe"))
	if st := b.truncate(a.FID, 5); st != wire.OK {
		t.Fatal(st)
	}
	if l := b.pending(); len(l) != 0 {
		t.Fatalf("an object is missing: %+v", l)
	}
	b.write(a.FID, stripe, []byte("second stripe"))
	if st := b.truncate(a.FID, stripe+1); st != wire.OK {
		t.Fatal(st)
	}
	if l := b.pending(); len(l) != 1 {
		t.Fatalf("the record goes when the punches are durable: %+v", l)
	}
	b.closeAll()
	if l := b.pending(); len(l) != 0 {
		t.Fatalf("after the close: %+v", l)
	}
}

// Records of a file that is truncated all the time do not pile up, and an epoch
// stays open until its records were reported.
func TestTruncateRecords(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("x"))
	for i := range 2 * maxLogs {
		if st := b.truncate(a.FID, uint64(10+i)); st != wire.OK {
			t.Fatal(st)
		}
	}
	if l := b.pending(); len(l) > maxLogs {
		t.Errorf("%d records", len(l))
	}
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		if req.Op != wire.OpTruncateDone {
			return false
		}
		rep.Status = wire.ErrNoSpc
		return true
	})
	if _, err := b.fs.closeEpochs(ctx, 0); err == nil || b.fs.OpenEpochs() != 1 {
		t.Errorf("%v, %d epochs", err, b.fs.OpenEpochs())
	}
	b.setHook(nil)
	b.closeAll()
	if l := b.pending(); len(l) != 0 || b.mdtAttr(a.FID).EpochOpen {
		t.Errorf("%d records", len(l))
	}
}

// A failed flush is told once, and before the reply that brought the news.
func TestFlushErrors(t *testing.T) {
	var told []uint64
	var b *bed
	b = newBed(t, 1, Options{OnFlushError: func(ost int, total uint64) {
		told = append(told, total)
		if b.fs.FlushErrors() != 0 {
			t.Error("counted before it was told")
		}
	}})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("x"))
	b.disks[0].FailSync(wire.ErrIO)
	if st := b.fs.Commit(ctx, Owner{}, &a); st != wire.ErrIO {
		t.Fatal(st)
	}
	b.disks[0].FailSync(nil)
	if len(told) != 1 || told[0] == 0 || b.fs.FlushErrors() != told[0] {
		t.Fatalf("told %v, counted %d", told, b.fs.FlushErrors())
	}
	if st := b.tryWrite(a.FID, 0, []byte("y"), wire.FileSync); st != wire.OK {
		t.Fatal(st)
	}
	if len(told) != 1 {
		t.Errorf("told again: %v", told)
	}
}

// What replies tell of failed flushes is compared over restarts of the OST: a new
// start has lost nothing by itself, and replies of an old one come late.
func TestFlushErrorsOverRestarts(t *testing.T) {
	var told []uint64
	b := newBed(t, 1, Options{OnFlushError: func(_ int, total uint64) { told = append(told, total) }})
	for i, x := range []struct {
		inst, count uint64
		told        []uint64
		sum         uint64
	}{
		{1, 0, nil, 0},
		{5, 0, nil, 0},
		{5, 2, []uint64{2}, 2},
		{5, 2, nil, 2},
		{5, 1, nil, 2},
		{5, 3, []uint64{3}, 3},
		{6, 0, nil, 3},
		{5, 9, nil, 3},
		{7, 1, []uint64{1}, 4},
		{7, 1<<32 - 1, []uint64{1<<32 - 1}, 4 + 1<<32 - 2},
		{8, 0, nil, 4 + 1<<32 - 2},
	} {
		told = nil
		b.fs.noteFlush(0, x.inst<<32|x.count)
		if d := cmp.Diff(x.told, told); d != "" || b.fs.FlushErrors() != x.sum {
			t.Errorf("%d: %d, want %d %s", i, b.fs.FlushErrors(), x.sum, d)
		}
	}
}

// The OST takes a part of a write only: the rest is tried and tells why.
func TestShortWrite(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.setHook(func(req *wire.Request, _ *wire.Reply) bool {
		if req.Op == wire.OpWrite && len(req.Bulk) > 3 {
			req.Bulk = req.Bulk[:3]
		}
		return false
	})
	pre, st := b.fs.Write(ctx, Owner{}, &a, 0, []byte("12345678"), wire.Unstable)
	if st != wire.OK || pre.Valid || a.Size != 8 {
		t.Errorf("%v, state before %+v, size %d", st, pre, a.Size)
	}
	b.setHook(nil)
	if p := b.read(a.FID, 0, 10); string(p) != "12345678" {
		t.Errorf("%q", p)
	}
}

// The MDT skips a close if another client has opened or truncated the file since the
// size was collected: it is closed again, and does not stay open for ever.
func TestSkippedCloseIsRepeated(t *testing.T) {
	for _, by := range []string{"write", "truncate"} {
		b := newBed(t, 1, Options{})
		other := b.another()
		a, _ := b.create("f", false)
		b.write(a.FID, 0, []byte("1234"))
		c, _ := b.create("g", false)
		b.write(c.FID, 0, []byte("12"))
		b.setHook(func(req *wire.Request, _ *wire.Reply) bool {
			if req.Op != wire.OpCloseEpoch {
				return false
			}
			b.setHook(nil)
			if by == "truncate" {
				q := wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: a.FID, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 9}}
				var rep wire.Reply
				if other.Setattr(ctx, Owner{}, &q, &rep); rep.Status != wire.OK {
					t.Error(rep.Status)
				}
			} else {
				at := a
				if _, st := other.Write(ctx, Owner{}, &at, 4, []byte("56789"), wire.Unstable); st != wire.OK {
					t.Error(st)
				}
			}
			return false
		})
		if n, err := b.fs.closeEpochs(ctx, 0); n != 1 || err != nil {
			t.Fatalf("%s: closed %d, %v", by, n, err)
		}
		if n := b.fs.OpenEpochs(); n != 1 || !b.mdtAttr(a.FID).EpochOpen || b.mdtAttr(c.FID).EpochOpen {
			t.Fatalf("%s: %d left", by, n)
		}
		// Who reads or writes meanwhile does not let it be forgotten.
		b.fs.epochs.release(b.fs, b.fs.epochs.ref(b.fs, a.FID))
		if _, err := other.closeEpochs(ctx, 0); err != nil {
			t.Fatal(err)
		}
		b.closeAll()
		if at := b.mdtAttr(a.FID); at.EpochOpen || at.Size != 9 || b.fs.OpenEpochs() != 0 {
			t.Errorf("%s: open %v, size %d, %d left", by, at.EpochOpen, at.Size, b.fs.OpenEpochs())
		}
		if err := other.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

// The creator of a file that it has not used reports the size that others have made,
// whether their epochs are open or closed.
func TestCloseOfUntouchedFilesThatOthersUse(t *testing.T) {
	for _, closed := range []bool{false, true} {
		b := newBed(t, 1, Options{})
		other := b.another()
		a, transno := b.create("f", true)
		b.fs.Created(a.FID, transno)
		at := a
		if _, st := other.Write(ctx, Owner{}, &at, 4, []byte("56789"), wire.Unstable); st != wire.OK {
			t.Fatal(st)
		}
		closeOther := func() {
			if _, err := other.closeEpochs(ctx, 0); err != nil {
				t.Fatal(err)
			}
		}
		if closed {
			closeOther()
		} else {
			b.setHook(func(req *wire.Request, _ *wire.Reply) bool {
				if req.Op == wire.OpCloseEpoch {
					b.setHook(nil)
					closeOther()
				}
				return false
			})
		}
		b.closeAll()
		if at := b.mdtAttr(a.FID); at.EpochOpen || at.Size != 9 || b.fs.OpenEpochs() != 0 {
			t.Errorf("closed before %v: open %v, size %d, %d left", closed, at.EpochOpen, at.Size, b.fs.OpenEpochs())
		}
		if err := other.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

// Close is not held up by what the closer asks of a target that does not answer.
func TestCloseWhileTheCloserWaits(t *testing.T) {
	b := newBed(t, 1, Options{EpochIdle: time.Millisecond})
	block, blocked := make(chan struct{}), make(chan struct{})
	var once sync.Once
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		if req.Op != wire.OpGetattr {
			return false
		}
		once.Do(func() { close(blocked) })
		<-block
		rep.Status = wire.ErrTargetDown
		return true
	})
	b.create("f", false)
	b.fs.epochs.release(b.fs, func() *epoch {
		e := b.fs.epochs.ref(b.fs, wire.FID{Seq: 9, OID: 9})
		e.open.Store(true)
		return e
	}())
	<-blocked
	done, cancel := context.WithCancel(ctx)
	time.AfterFunc(10*time.Millisecond, func() {
		<-b.fs.work.Done() // it is told to give up
		close(block)
	})
	cancel()
	if err := b.fs.Close(done); err == nil {
		t.Error("closed without an error, though a file is left")
	}
}

// After an eviction by the MDT, size changes from before are the MDT's: they may be
// executed, or replaced, before others write, and must not come again.
func TestEvictionLeavesTruncatesToTheMDT(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("12345678"))
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		rep.Status = wire.ErrTargetDown
		return req.Op == wire.OpPunch
	})
	if st := b.truncate(a.FID, 3); st != wire.ErrTargetDown {
		t.Fatal(st)
	}
	b.setHook(nil)
	n := b.count(wire.OpPunch)
	l := b.pending()
	if len(l) != 1 {
		t.Fatalf("%d records", len(l))
	}
	b.fs.epochs.lostAll(l[0].ID)
	b.write(a.FID, 8, []byte("9"))
	if k := b.count(wire.OpPunch) - n; k != 0 {
		t.Errorf("%d punches after the eviction", k)
	}
	if st := b.truncate(a.FID, 3); st != wire.OK {
		t.Error(st)
	}
	b.closeAll()
	if at := b.mdtAttr(a.FID); at.Size != 3 || at.EpochOpen || len(b.pending()) != 0 {
		t.Errorf("size %d, open %v, records %v", at.Size, at.EpochOpen, b.pending())
	}
}

// A size change that is answered from memory may be another client's, or be left to the
// MDT: the caller is told to ask again.
func TestReconstructedSetattr(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("12345678"))
	other := b.another()
	req := wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: a.FID, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 3}}
	req.Key = wire.ReplyKey{Addr: [16]byte{1}, Port: 700, XID: 1, Proc: 2, Sum: 3}
	again := req
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		rep.Status = wire.ErrTargetDown
		return req.Op == wire.OpPunch
	})
	var rep wire.Reply
	b.fs.Setattr(ctx, Owner{}, &req, &rep)
	b.setHook(nil)
	rep = wire.Reply{}
	if other.Setattr(ctx, Owner{}, &again, &rep); rep.Status != wire.ErrTargetDown || !rep.Reconstructed {
		t.Errorf("%v, reconstructed %v", rep.Status, rep.Reconstructed)
	}
	again.Key.XID++
	rep = wire.Reply{}
	if other.Setattr(ctx, Owner{}, &again, &rep); rep.Status != wire.OK {
		t.Error(rep.Status)
	}
	b.checkSize("asked again", a.FID, 3)
	if err := other.Close(ctx); err != nil {
		t.Error(err)
	}
}

// Close is not held up by a size change that waits for an OST either.
func TestCloseWhileATruncateWaits(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("12345678"))
	req := wire.Request{FID: wire.RootFID, Name: []byte("f"), How: wire.Unchecked, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 3}}
	req.Op, req.Flags = wire.OpCreate, wire.FlagWaitCommit
	var rep wire.Reply
	b.fs.Call(ctx, Owner{}, &req, &rep)
	blocked := make(chan struct{})
	var once sync.Once
	b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
		if req.Op != wire.OpPunch {
			return false
		}
		once.Do(func() { close(blocked) })
		<-b.fs.work.Done() // as an import does when the caller's context ends
		rep.Status = wire.ErrTargetDown
		return true
	})
	cut := make(chan wire.Status)
	go func() { cut <- b.fs.Truncated(ctx, Owner{}, &rep.Attr, rep.Truncate) }()
	<-blocked
	done, cancel := context.WithCancel(ctx)
	cancel()
	_ = b.fs.Close(done)
	if st := <-cut; st != wire.ErrTargetDown {
		t.Error(st)
	}
}

// The answer of a create that was executed before does not tell whose epoch it opened:
// it is closed, and not taken for open.
func TestRecreated(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", true)
	b.fs.Recreated(a.FID)
	b.write(a.FID, 0, []byte("1234"))
	if n := b.count(wire.OpOpenEpoch); n != 1 {
		t.Errorf("opened %d times", n)
	}
	c, _ := b.create("g", true)
	b.fs.Recreated(c.FID)
	b.closeAll()
	if b.mdtAttr(a.FID).EpochOpen || b.mdtAttr(c.FID).EpochOpen || b.fs.OpenEpochs() != 0 {
		t.Errorf("%d left", b.fs.OpenEpochs())
	}
	b.checkSize("written after it was made", a.FID, 4)
}

// The MDT has evicted the client while it changed a size: the epoch that the MDT has
// opened and the record are not forgotten.
func TestSetattrOverEviction(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.setHook(func(req *wire.Request, _ *wire.Reply) bool {
		if req.Op == wire.OpSetattr {
			b.fs.tenure.Store(7) // that of the request is older
		}
		return false
	})
	if st := b.truncate(a.FID, 9); st != wire.OK {
		t.Fatal(st)
	}
	if n := b.fs.OpenEpochs(); n != 1 {
		t.Errorf("%d epochs in the table", n)
	}
	b.closeAll()
	if a := b.mdtAttr(a.FID); a.EpochOpen || a.Size != 9 || len(b.pending()) != 0 || b.fs.OpenEpochs() != 0 {
		t.Errorf("open %v, size %d, records %v", a.EpochOpen, a.Size, b.pending())
	}
}

// Requests that were made before the MDT evicted this client are refused by OSTs that
// know: they are made again, and nobody sees an error.
func TestRequestsOfAnOldTenure(t *testing.T) {
	b := newBed(t, 1, Options{})
	a, _ := b.create("f", false)
	b.write(a.FID, 0, []byte("1234"))
	for _, op := range []wire.Op{wire.OpSyncObject, wire.OpObjAttr, wire.OpRead} {
		refused, asked := 0, 0
		b.setHook(func(req *wire.Request, rep *wire.Reply) bool {
			switch {
			case req.Op == wire.OpGetattr && refused > 0 && req.FID == wire.RootFID:
				asked++
				b.fs.tenure.Store(7)
			case req.Op == op && req.Tenure != 7:
				refused++
				rep.Reset()
				rep.Status = wire.ErrTooLate
				return true
			}
			return false
		})
		b.fs.tenure.Store(1)
		// Not by a short cut past the hook.
		m := b.fs.get()
		m.req.Op, m.req.FID, m.req.Bulk = op, a.FID, make([]byte, 4)
		c, _ := b.fs.ost(&a, 0)
		b.fs.header(Owner{}, &m.req)
		if b.fs.call(ctx, c, m); m.rep.Status != wire.OK || refused != 1 || asked != 1 {
			t.Errorf("op %d: %v, refused %d times, asked %d times", op, m.rep.Status, refused, asked)
		}
		b.fs.put(m)
	}
}

// What an earlier incarnation left open is closed with the objects' sizes.
func TestCloseLeftEpochs(t *testing.T) {
	b := newBed(t, 2, Options{})
	var fids []wire.FID
	for i := range 5 {
		a, _ := b.create(name(i), false)
		b.write(a.FID, uint64(i)*stripe, []byte("abc"))
		fids = append(fids, a.FID)
	}
	b.remove(name(4))
	// The table forgets them, the MDT does not.
	b.fs.epochs.init()
	b.fs.epochs.n.Store(0)
	a, _ := b.create("used", false)
	b.write(a.FID, 0, []byte("x"))
	if _, err := b.fs.CloseLeftEpochs(ctx, append(fids, a.FID)); err != nil {
		t.Fatal(err)
	}
	for i, f := range fids[:4] {
		if a := b.mdtAttr(f); a.EpochOpen || a.Size != uint64(i)*stripe+3 {
			t.Errorf("file %d: %+v", i, a)
		}
	}
	if !b.mdtAttr(a.FID).EpochOpen {
		t.Error("closed an epoch that is in use")
	}
	if n := b.fs.OpenEpochs(); n != 1 {
		t.Errorf("%d epochs in the table", n)
	}
}
