package fsck

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/locks"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// world is a metadata target and two object targets on disks in memory.
type world struct {
	t   testing.TB
	vfs *vfs.MemFS
	ofs [2]*objfs.Mem
	clk clock.Strict

	e    *local.Pebble
	mdt  *mdt.MDT
	osts [2]*ost.Target
	fs   *client.FS
	xid  uint32
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func newWorld(t testing.TB) *world {
	w := &world{t: t, vfs: vfs.NewMem()}
	for i := range w.ofs {
		w.ofs[i] = objfs.NewMem(w.clk.Now)
	}
	w.start()
	return w
}

func (w *world) engine(ro bool) *local.Pebble {
	w.t.Helper()
	e, err := local.OpenPebble("mdt", local.Options{FS: w.vfs, MemTableBytes: 1 << 20, CacheBytes: 1 << 20, MinFreeBytes: -1, ReadOnly: ro})
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

func (w *world) start() {
	w.t.Helper()
	w.e = w.engine(false)
	var err error
	w.mdt, err = mdt.Open(mdt.Options{Engine: w.e, Clock: w.clk.Now, StripeSize: 64 << 10,
		OSTs: func() []mdt.OSTState {
			return []mdt.OSTState{{Index: 0, Up: true, Free: 1 << 30}, {Index: 1, Up: true, Free: 1 << 30}}
		}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.mdt.Begin(0)
	conns := make([]wire.Conn, 2)
	for i := range w.osts {
		if w.osts[i], err = ost.Open(ost.Options{Index: uint16(i), FS: w.ofs[i], BootID: "b", Clock: w.clk.Now, Logger: quiet, CommitInterval: -1, SegShift: 18}); err != nil {
			w.t.Fatal(err)
		}
		w.osts[i].Begin(0)
		conns[i] = wire.InProc(w.osts[i])
	}
	w.fs, err = client.New(client.Options{MDT: wire.InProc(w.mdt), OSTs: conns, ID: wire.ClientID{1}, Gen: uint64(w.clk.Now()), Clock: w.clk.Now, EpochIdle: time.Hour})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.fs.Connect(context.Background()); err != nil {
		w.t.Fatal(err)
	}
}

// stop ends everything in an orderly way; with runLogs unlinked objects are
// destroyed first, and with closeFS epochs are closed.
func (w *world) stop(runLogs, closeFS bool) {
	w.t.Helper()
	if closeFS {
		if err := w.fs.Close(context.Background()); err != nil {
			w.t.Fatal(err)
		}
	}
	if runLogs {
		w.runLogs()
	}
	if err := w.mdt.Close(); err != nil {
		w.t.Fatal(err)
	}
	if err := w.e.Close(); err != nil {
		w.t.Fatal(err)
	}
	for _, o := range w.osts {
		if err := o.Close(); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) runLogs() {
	w.t.Helper()
	if err := w.mdt.Sync(); err != nil {
		w.t.Fatal(err)
	}
	recs, err := w.mdt.PendingLogs(0, 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, l := range recs {
		if l.Kind != mdt.LogUnlink {
			continue
		}
		for s := uint8(0); s < l.Layout.Count; s++ {
			var rep wire.Reply
			req := wire.Request{Header: wire.Header{Op: wire.OpDestroy, Flags: wire.FlagWaitCommit}, FID: l.FID, Stripe: s}
			if err := wire.InProc(w.osts[l.Layout.OST[s]]).Call(context.Background(), &req, &rep); err != nil || rep.Status != wire.OK {
				w.t.Fatal(err, rep.Status)
			}
		}
		if err := w.mdt.LogDone([]uint64{l.ID}); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) call(req wire.Request) *wire.Reply {
	w.t.Helper()
	var rep wire.Reply
	req.Flags |= wire.FlagWaitCommit
	w.xid++
	req.Key = wire.ReplyKey{Addr: [16]byte{byte(w.xid % 3)}, Port: 700, XID: w.xid, Proc: 100003<<8 | 8, Sum: uint64(w.xid)}
	if req.Op == wire.OpSetattr {
		w.fs.Setattr(context.Background(), client.Owner{}, &req, &rep)
	} else {
		w.fs.Call(context.Background(), client.Owner{}, &req, &rep)
	}
	if rep.Status != wire.OK {
		w.t.Fatalf("op %d %q: %v", req.Op, req.Name, rep.Status)
	}
	return &rep
}

func op(o wire.Op) wire.Header { return wire.Header{Op: o} }

func (w *world) mkdir(dir wire.FID, name string) wire.FID {
	w.t.Helper()
	return w.call(wire.Request{Header: op(wire.OpMkdir), FID: dir, Name: []byte(name)}).Attr.FID
}

func (w *world) create(dir wire.FID, name string, size int) wire.FID {
	w.t.Helper()
	rep := w.call(wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: dir, Name: []byte(name)})
	a := rep.Attr
	w.fs.Created(a.FID, rep.Transno)
	if size > 0 {
		w.write(&a, 0, size)
	}
	return a.FID
}

func (w *world) write(a *wire.Attr, off uint64, n int) {
	w.t.Helper()
	if _, st := w.fs.Write(context.Background(), client.Owner{}, a, off, make([]byte, n), wire.Unstable); st != wire.OK {
		w.t.Fatal("write:", st)
	}
}

func (w *world) symlink(dir wire.FID, name, to string) wire.FID {
	w.t.Helper()
	return w.call(wire.Request{Header: op(wire.OpSymlink), FID: dir, Name: []byte(name), Data: []byte(to)}).Attr.FID
}

func (w *world) link(f, dir wire.FID, name string) {
	w.t.Helper()
	w.call(wire.Request{Header: op(wire.OpLink), FID: f, FID2: dir, Name2: []byte(name)})
}

func (w *world) rename(d1 wire.FID, n1 string, d2 wire.FID, n2 string) {
	w.t.Helper()
	w.call(wire.Request{Header: op(wire.OpRename), FID: d1, Name: []byte(n1), FID2: d2, Name2: []byte(n2)})
}

func (w *world) remove(dir wire.FID, name string) {
	w.t.Helper()
	w.call(wire.Request{Header: op(wire.OpRemove), FID: dir, Name: []byte(name)})
}

func (w *world) truncate(f wire.FID, size uint64) {
	w.t.Helper()
	w.call(wire.Request{Header: op(wire.OpSetattr), FID: f, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: size}})
}

// lock takes a lock as a client of the first service address.
func (w *world) lock(f wire.FID, start, end uint64) {
	w.t.Helper()
	o := wire.LockOwner{LockHost: wire.LockHost{Addr: netip.MustParseAddr("192.0.2.7"), Name: "c"}, Svid: 1, OH: "1@c"}
	var rep wire.Reply
	req := wire.Request{Header: wire.Header{Op: wire.OpLock, Flags: wire.FlagWaitCommit}, FID: f,
		Lock: &wire.LockArgs{Owner: o, Range: wire.LockRange{Start: start, End: end}, Exclusive: true, Monitor: true}}
	if w.fs.Call(context.Background(), client.Owner{VIP: 1}, &req, &rep); rep.Status != wire.OK {
		w.t.Fatal("lock:", rep.Status)
	}
}

// lockRecord finds the record of a lock on a file.
func (w *world) lockRecord(f wire.FID) (key, value []byte) {
	w.t.Helper()
	w.raw(func(e *local.Pebble) {
		if err := mdt.IterLocks(e, func(k, v []byte) error {
			rec, err := locks.DecodeRecord(k, v)
			if l, ok := rec.(*locks.EntryRecord); ok && l.Holder.FID == f {
				key, value = bytes.Clone(k), bytes.Clone(v)
			}
			return err
		}); err != nil {
			w.t.Fatal(err)
		}
	})
	if key == nil {
		w.t.Fatalf("no lock of %v", f)
	}
	return key, value
}

// tree holds the FIDs of what build makes.
type tree struct{ d, sub, deep, empty, file, big, striped, link2, sym, fifo, hole wire.FID }

// build makes all kinds of objects, and changes and removes some.
func (w *world) build() (x tree) {
	r := wire.RootFID
	x.d = w.mkdir(r, "d")
	x.sub = w.mkdir(x.d, "sub")
	x.deep = w.mkdir(x.sub, "deep")
	x.empty = w.mkdir(x.d, "empty")
	x.file = w.create(x.d, "file", 1000)
	x.big = w.create(x.d, "big", 600<<10) // three segments
	w.call(wire.Request{Header: op(wire.OpSetLayout), FID: x.sub, Layout: wire.Layout{StripeSize: 64 << 10, Count: 2}})
	x.striped = w.create(x.sub, "striped", 300<<10)
	x.hole = w.create(x.sub, "hole", 0)
	w.truncate(x.hole, 100<<10)
	x.link2 = w.create(x.d, "a", 10)
	w.link(x.link2, x.sub, "b")
	w.link(x.link2, x.deep, "c")
	x.sym = w.symlink(x.d, "sym", "sub/striped")
	x.fifo = w.call(wire.Request{Header: op(wire.OpMknod), FID: x.d, Name: []byte("fifo"), Type: wire.TypeFifo}).Attr.FID
	w.call(wire.Request{Header: op(wire.OpMknod), FID: x.d, Name: []byte("null"), Type: wire.TypeChr, RdevMajor: 1, RdevMinor: 3})
	w.create(x.d, "nothing", 0)
	for i := range 80 {
		w.create(x.deep, fmt.Sprintf("f%02d", i), i%3)
	}
	for i := range 40 {
		w.remove(x.deep, fmt.Sprintf("f%02d", i))
	}
	w.rename(x.deep, "f50", x.d, "moved")
	w.rename(x.deep, "f51", x.deep, "f52")
	m := w.mkdir(x.deep, "m")
	w.mkdir(m, "n")
	w.rename(x.deep, "m", r, "m2")
	t := w.create(x.d, "cut", 200<<10)
	w.truncate(t, 70<<10)
	w.truncate(t, 90<<10)
	w.lock(x.file, 0, 99)
	w.lock(x.striped, 5, wire.MaxLockOffset)
	z := w.create(x.sub, "zero", 200<<10)
	w.truncate(z, 0)
	return x
}

// check runs a check, or a repair, on the stopped stores.
func (w *world) check(repair bool) *Report {
	w.t.Helper()
	rep, err := w.tryCheck(repair)
	if err != nil {
		w.t.Fatal(err)
	}
	return rep
}

func (w *world) tryCheck(repair bool) (*Report, error) {
	return Open(context.Background(), OpenOptions{
		MDTDir: "mdt", OSTDirs: []string{"ost0", "ost1"}, Repair: repair,
		VFS: w.vfs, OSTFS: func(i int) objfs.FS { return w.ofs[i] },
	})
}

// raw opens the engine, lets fn change it, and closes it.
func (w *world) raw(fn func(e *local.Pebble)) {
	w.t.Helper()
	e := w.engine(false)
	fn(e)
	if err := e.Sync(); err != nil {
		w.t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		w.t.Fatal(err)
	}
}

// put stores raw keys; a nil value deletes.
func (w *world) put(kv ...[]byte) {
	w.t.Helper()
	w.raw(func(e *local.Pebble) {
		b := e.NewBatch()
		for i := 0; i < len(kv); i += 2 {
			if kv[i+1] == nil {
				b.Delete(kv[i])
			} else {
				b.Set(kv[i], kv[i+1])
			}
		}
		if err := e.Apply(b); err != nil {
			w.t.Fatal(err)
		}
	})
}

func (w *world) value(k []byte) []byte {
	w.t.Helper()
	var v []byte
	w.raw(func(e *local.Pebble) {
		var err error
		if v, err = e.Get(k, nil); err != nil {
			w.t.Fatalf("key %x: %v", k, err)
		}
	})
	return v
}

// edit changes an inode in the engine.
func (w *world) edit(f wire.FID, fn func(*mdt.Inode)) {
	w.t.Helper()
	in, err := mdt.DecodeInode(f, w.value(inodeKey(f)))
	if err != nil {
		w.t.Fatal(err)
	}
	fn(in)
	w.put(inodeKey(f), mdt.AppendInode(nil, in))
}

func (w *world) entry(dir wire.FID, name string) mdt.Entry {
	w.t.Helper()
	e, err := mdt.DecodeEntry(w.value(nameKey(dir, []byte(name))))
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

func (w *world) repairs(fn func(r *mdt.Repair)) {
	w.t.Helper()
	w.raw(func(e *local.Pebble) {
		r := mdt.NewRepair(e)
		fn(r)
		if err := r.Apply(e); err != nil {
			w.t.Fatal(err)
		}
	})
}

// objPath finds the file of an object.
func (w *world) objPath(i int, f wire.FID, stripe uint8) string {
	w.t.Helper()
	d := &Dir{fs: &guardFS{FS: w.ofs[i]}}
	p, err := d.locate(f, stripe)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// where tells the OST of a file's stripe.
func (w *world) where(f wire.FID, stripe int) int {
	in, err := mdt.DecodeInode(f, w.value(inodeKey(f)))
	if err != nil {
		w.t.Fatal(err)
	}
	return int(in.Attr.Layout.OST[stripe])
}

// ostDo opens an OST and lets fn use it.
func (w *world) ostDo(i int, req wire.Request) {
	w.t.Helper()
	o, err := ost.Open(ost.Options{Index: uint16(i), FS: w.ofs[i], BootID: "b", Clock: w.clk.Now, Logger: quiet, CommitInterval: -1})
	if err != nil {
		w.t.Fatal(err)
	}
	o.Begin(0)
	var rep wire.Reply
	if err := wire.InProc(o).Call(context.Background(), &req, &rep); err != nil || rep.Status != wire.OK {
		w.t.Fatal(err, rep.Status)
	}
	if err := o.Close(); err != nil {
		w.t.Fatal(err)
	}
}
