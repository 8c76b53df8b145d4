package nfsd

import (
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

func (b *bed) untilClosed() {
	b.t.Helper()
	for end := time.Now().Add(20 * time.Second); b.fs.OpenEpochs() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatal("IO epochs do not close")
		}
	}
}

// Attributes of files that nobody writes come from the MDT alone, whatever asks for
// them; those of a file that is written come from its objects.
func TestClosedEpochsNeedNoOST(t *testing.T) {
	for _, stripes := range []int{1, 2} {
		b := newBed(t, stripes)
		c, dir := b.root(), b.mount("/data")
		const size = 200_000
		var fh []byte
		for _, name := range []string{"a", "b", "c"} {
			fh = c.mustCreate(dir, name)
			want(t, "write", c.write(fh, size-4, "data", wire.Unstable).Status, nfs.NFSStatusOk)
		}
		sizes := map[string]func() uint64{
			"GETATTR": func() uint64 { a, _ := c.getattr(fh); return a.Size },
			"LOOKUP":  func() uint64 { return c.lookup(dir, "c").Obj.Attr.Size },
			"ACCESS": func() uint64 {
				var r nfs3.AccessRes
				c.do(nfs.NFSProcedureAccess, &nfs3.AccessArgs{FH: fh, Access: nfs3.AccessRead}, &r)
				return r.Obj.Attr.Size
			},
			"SETATTR of the mode": func() uint64 {
				return c.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: 0o640}).Wcc.After.Attr.Size
			},
			"READDIRPLUS": func() (n uint64) {
				r := nfs3.ReaddirRes{Plus: true}
				c.do(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, DirCount: 8000, MaxCount: 32000}, &r)
				for _, e := range r.Entries {
					if e.Attr.Present && string(e.Name) != "." && string(e.Name) != ".." {
						n += e.Attr.Attr.Size
					}
				}
				if n%3 != 0 {
					return 0
				}
				return n / 3
			},
		}
		for name, ask := range sizes {
			c.write(fh, 0, "x", wire.Unstable) // the epoch is open
			before := b.asked.Load()
			if n := ask(); n != size || b.asked.Load() == before {
				t.Errorf("%d stripes: %s while it is written: size %d, %d requests to OSTs", stripes, name, n, b.asked.Load()-before)
			}
			b.untilClosed()
			before = b.asked.Load()
			if n := ask(); n != size || b.asked.Load() != before {
				t.Errorf("%d stripes: %s of what is closed: size %d, %d requests to OSTs", stripes, name, n, b.asked.Load()-before)
			}
		}
	}
}

// A change of something else than the data leaves mtime as it is: that of the newest
// write, which only the object has while the IO epoch is open.
func TestMtimeSurvivesOtherChanges(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	old := wire.SetAttr{Mask: wire.SetMtime, Mtime: 1_000_000_000 * 1e9}
	for name, change := range map[string]func(fh []byte){
		"chmod": func(fh []byte) {
			want(t, "chmod", c.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: 0o600}).Status, nfs.NFSStatusOk)
		},
		"rename": func([]byte) {
			var r nfs3.RenameRes
			c.do(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: []byte("rename"), ToFH: dir, ToName: []byte("new")}, &r)
			want(t, "rename", r.Status, nfs.NFSStatusOk)
		},
		"link and remove": func(fh []byte) {
			var r nfs3.LinkRes
			c.do(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: fh, DirFH: dir, Name: []byte("second")}, &r)
			want(t, "link", r.Status, nfs.NFSStatusOk)
			want(t, "remove", c.remove(dir, "second"), nfs.NFSStatusOk)
		},
		"times, then chmod": func(fh []byte) {
			want(t, "touch", c.setattr(fh, old).Status, nfs.NFSStatusOk)
			want(t, "chmod", c.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: 0o600}).Status, nfs.NFSStatusOk)
		},
	} {
		fh := c.mustCreate(dir, name)
		want(t, "touch", c.setattr(fh, old).Status, nfs.NFSStatusOk)
		mtime := c.write(fh, 0, "data", wire.Unstable).Wcc.After.Attr.Mtime
		if name == "times, then chmod" {
			mtime = old.Mtime
		}
		change(fh)
		a, _ := c.getattr(fh)
		b.untilClosed()
		closed, _ := c.getattr(fh)
		if a.Mtime != mtime || closed.Mtime != mtime || closed.Ctime != a.Ctime {
			t.Errorf("%s: mtime %d, %d after the epoch has closed, want %d; ctime %d, then %d", name, a.Mtime, closed.Mtime, mtime, a.Ctime, closed.Ctime)
		}
		if w := c.write(fh, 0, "more", wire.Unstable); w.Wcc.After.Attr.Mtime <= closed.Ctime {
			t.Errorf("%s: mtime %d after another write, ctime was %d", name, w.Wcc.After.Attr.Mtime, closed.Ctime)
		}
	}
}
