package mdt

import (
	"testing"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

// A file of a store in which nobody has ever opened an IO epoch, as it was written then,
// with a client whose entry has no tenure: its size counts until somebody opens one, and
// again when that is closed; whoever has one open over a restart does not lose it.
func TestStoreWithoutEpochs(t *testing.T) {
	for _, returns := range []bool{true, false} {
		b := newBody(t, Options{})
		b.begin(0)
		b.put(clientA, 1)
		f := b.ok(reqOf(clientA, wire.OpCreate, wire.RootFID, "f"), front.Exec{}).rep.Attr
		b.sync()
		// The first form of an inode: no flags but that it has data, SizeVersion 0.
		v := be.AppendUint16([]byte{1, byte(wire.TypeReg)}, 2)
		for _, x := range []uint32{0o644, 1, 10, 20, 0, 0} {
			v = be.AppendUint32(v, x)
		}
		for _, x := range []uint64{4096, 8192, 1, 2, 3} { // size, used, times
			v = be.AppendUint64(v, x)
		}
		v = be.AppendUint64(be.AppendUint64(be.AppendUint32(v, f.Generation), f.Version), 0)
		v = appendLayout(v, &f.Layout)
		bt := b.e.NewBatch()
		bt.Set(appendInodeKey(nil, f.FID), v)
		bt.Set(appendClientKey(nil, clientA), be.AppendUint64([]byte{1}, 1))
		if err := b.e.Apply(bt); err != nil {
			t.Fatal(err)
		}
		_, n := b.e.ends()
		b.crash(n)
		b.begin(0)
		attr := func() wire.Attr {
			t.Helper()
			in, err := ReadInode(b.e, f.FID)
			if err != nil {
				t.Fatal(err)
			}
			return in.Attr
		}
		b.put(clientA, 1)
		b.put(clientB, 1)
		if a := attr(); a.EpochOpen || a.Size != 4096 || a.Mtime != 2 {
			t.Fatalf("%+v", a)
		}
		b.ok(reqOf(clientA, wire.OpOpenEpoch, f.FID, ""), front.Exec{})
		if a := attr(); !a.EpochOpen {
			t.Fatalf("%+v", a)
		}
		b.sync()
		_, n = b.e.ends()
		b.crash(n)
		b.begin(0)
		if a := attr(); !a.EpochOpen {
			t.Fatalf("after a restart: %+v", a)
		}
		by := clientA
		if !returns {
			by = clientB
			b.m.DelClient(clientA, 1, true)
			b.sync()
		}
		closed := func() wire.Attr {
			r := reqOf(by, wire.OpCloseEpoch, wire.FID{}, "")
			r.Epochs = []wire.EpochClose{{FID: f.FID, Size: 5000, Used: 8192, Mtime: 9, Ctime: 9}}
			b.ok(r, front.Exec{})
			return attr()
		}
		for _, p := range b.m.PendingFences() {
			if returns {
				t.Errorf("%+v although the client is there", p)
			}
			if a := closed(); !a.EpochOpen {
				t.Fatalf("closed before all OSTs refuse what an evicted client has written: %+v", a)
			}
			for _, o := range p.OSTs {
				if err := b.m.FenceDone(p.ID, p.Tenure, o); err != nil {
					t.Fatal(err)
				}
			}
		}
		if a := closed(); a.EpochOpen || a.Size != 5000 || a.Mtime != 9 {
			t.Errorf("returns %v: %+v", returns, a)
		}
	}
}

// What changes an inode but not its data leaves mtime to the newest write, in the store
// and over replays, until the epoch is closed.
func TestMtimeOfWhatIsWritten(t *testing.T) {
	b := served(t, Options{})
	r := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	r.Flags |= wire.FlagOpenEpoch
	f := b.ok(r, execOf(r)).rep.Attr
	b.now += 100
	wrote := b.now // at the OST
	b.now += 100
	set := reqOf(clientA, wire.OpSetattr, f.FID, "")
	set.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: 0o600}
	b.sync()
	n, _ := b.e.ends()
	rep := b.ok(set, execOf(set)).rep
	check := func(what string) {
		t.Helper()
		in, err := ReadInode(b.e, f.FID)
		if err != nil || in.Attr.MtimeSince() != f.Ctime || in.Attr.Ctime <= wrote {
			t.Fatalf("%s: %+v, %v", what, in, err)
		}
		a := in.Attr
		if a.Merge(wrote, wrote); a.Mtime != wrote || a.Ctime != in.Attr.Ctime {
			t.Errorf("%s: mtime %d ctime %d, written at %d", what, a.Mtime, a.Ctime, wrote)
		}
	}
	check("first")
	b.crash(n)
	if e := b.replay(replayOf(set, &rep)); e.rep.Status != wire.OK {
		t.Fatal(e.rep.Status)
	}
	check("replayed")
	b.begin(0)
	r = reqOf(clientA, wire.OpCloseEpoch, wire.FID{}, "")
	r.Epochs = []wire.EpochClose{{FID: f.FID, Size: 4, Mtime: wrote, Ctime: wrote}}
	b.ok(r, front.Exec{})
	if in, err := ReadInode(b.e, f.FID); err != nil || in.Attr.Mtime != wrote || in.Attr.MtimeAt != 0 || in.Opens != 0 {
		t.Errorf("closed: %+v, %v", in, err)
	}
}
