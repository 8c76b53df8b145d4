package nfsd

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Retransmissions that overtake their original are executed once, all copies
// that are answered get one answer, and nothing is left behind.
func TestDuplicatesInProgress(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	x := b.raw("")
	const rounds, copies = 60, 4
	for i := range rounds {
		name := fmt.Sprintf("f%d", i)
		c.mustCreate(dir, name)
		rm := &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}
		for range copies {
			x.send(uint32(i), 1, nfs.NFSProcedureRemove, rm)
		}
		for range copies {
			var r nfs3.WccRes
			x.recv(uint32(i), &r)
			want(t, "remove "+name, r.Status, nfs.NFSStatusOk)
		}
	}
	if n := b.srv.dups.Len(); n != 0 {
		t.Errorf("still holds %d calls", n)
	}
}

func pending(t *testing.T, m *mdt.MDT) []mdt.LogRec {
	t.Helper()
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	l, err := m.PendingLogs(0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A new file may be given a size by the CREATE that makes it.
func TestCreateWithSize(t *testing.T) {
	for _, stripes := range []int{1, 2} {
		b := newBed(t, stripes)
		c, dir := b.root(), b.mount("/data")
		var r nfs3.CreateRes
		c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("f"), How: wire.Unchecked, Attr: wire.SetAttr{Mask: wire.SetSize, Size: 100_000}}, &r)
		want(t, "create", r.Status, nfs.NFSStatusOk)
		if r.Obj.Attr.Size != 100_000 {
			t.Errorf("size %d in the reply", r.Obj.Attr.Size)
		}
		if a, _ := c.getattr(r.FH); a.Size != 100_000 {
			t.Errorf("stripes %d: size %d", stripes, a.Size)
		}
		if rd := c.read(r.FH, 99_990, 100); len(rd.Data) != 10 || !rd.EOF {
			t.Errorf("%d bytes at the end", len(rd.Data))
		}
	}
}

// A size change of a file without objects leaves no record behind that a
// recovery would execute on data written later: there is no object that could
// remember that it was executed.
func TestTruncateOfEmptyFileIsNotRepeated(t *testing.T) {
	for _, stripes := range []int{1, 2} {
		b := newBed(t, stripes)
		c, dir := b.root(), b.mount("/data")
		fh := c.mustCreate(dir, "f")
		want(t, "truncate", c.setattr(fh, wire.SetAttr{Mask: wire.SetSize}).Status, nfs.NFSStatusOk)
		if l := pending(t, b.mdt); len(l) != 0 {
			t.Errorf("stripes %d: records %+v after the truncate was acknowledged", stripes, l)
		}
		want(t, "write", c.write(fh, 0, "kept", wire.FileSync).Status, nfs.NFSStatusOk)
		var tr nfs3.CreateRes
		g := c.mustCreate(dir, "g")
		c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("g"), How: wire.Unchecked, Attr: wire.SetAttr{Mask: wire.SetSize}}, &tr)
		want(t, "truncating create", tr.Status, nfs.NFSStatusOk)
		if l := pending(t, b.mdt); len(l) != 0 {
			t.Errorf("stripes %d: records %+v after the create was acknowledged", stripes, l)
		}
		want(t, "write", c.write(g, 0, "kept", wire.FileSync).Status, nfs.NFSStatusOk)
	}
}

// A flush that fails between the execution of a WRITE and its reply must show
// in the verifiers: the WRITE's is from before, the COMMIT's from after.
func TestVerifierOfWriteIsFromBefore(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	b.during.Store(func(op wire.Op) {
		if op == wire.OpWrite {
			b.a.SetVerifier([8]byte{9})
		}
	})
	w := c.write(fh, 0, "x", wire.Unstable)
	want(t, "write", w.Status, nfs.NFSStatusOk)
	if w.Verf == [8]byte{9} {
		t.Error("the verifier that came with the loss covers data from before it")
	}
	b.during.Store(func(op wire.Op) {
		if op == wire.OpSyncObject {
			b.a.SetVerifier([8]byte{10})
		}
	})
	var cm nfs3.CommitRes
	c.do(nfs.NFSProcedureCommit, &nfs3.CommitArgs{FH: fh}, &cm)
	want(t, "commit", cm.Status, nfs.NFSStatusOk)
	if cm.Verf != [8]byte{10} {
		t.Errorf("verifier %x of COMMIT is older than its flush", cm.Verf)
	}
}

// SETATTR's guard is the ctime that the client was told, be it an object's.
func TestGuardWhileWriting(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	created, _ := c.getattr(fh)
	w := c.write(fh, 0, "x", wire.Unstable)
	set := func(xid uint32, guard int64, mode uint32) nfs.NFSStatus {
		x := b.raw("")
		defer x.Close()
		var r nfs3.WccRes
		for range 2 { // the second is answered from the record
			x.send(xid, 1, nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: fh, Attr: wire.SetAttr{Mask: wire.SetMode, Mode: mode}, Guard: true, GuardCtime: guard})
			x.recv(xid, &r)
		}
		return r.Status
	}
	want(t, "guard from before the write", set(1, created.Ctime, 0o600), nfs.NFSStatusNotSync)
	want(t, "guard from the write", set(2, w.Wcc.After.Attr.Ctime, 0o640), nfs.NFSStatusOk)
	want(t, "the same guard again", set(3, w.Wcc.After.Attr.Ctime, 0o600), nfs.NFSStatusNotSync)
	if a, _ := c.getattr(fh); a.Mode != 0o640 {
		t.Errorf("mode %o", a.Mode)
	}
}

// The root of an export has itself as "..", in listings too.
func TestReaddirDotDotAtTheRoot(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	a, _ := c.getattr(dir)
	for _, plus := range []bool{false, true} {
		r := nfs3.ReaddirRes{Plus: plus}
		if plus {
			c.do(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, DirCount: 1000, MaxCount: 8000}, &r)
		} else {
			c.do(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Count: 1000}, &r)
		}
		for _, e := range r.Entries {
			if string(e.Name) == ".." && e.FileID != a.FileID {
				t.Errorf("plus=%v: fileid %d of .., want %d", plus, e.FileID, a.FileID)
			}
			if plus && string(e.Name) == ".." && !bytes.Equal(e.FH, dir) {
				t.Error("handle of ..")
			}
		}
	}
}

// A connection whose only call runs after it was closed is forgotten.
func TestClosedConnectionsAreForgotten(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	for i := range 30 {
		x := b.raw("")
		x.send(uint32(i), 1, nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: fh, Count: 1, Stable: wire.FileSync, Data: []byte("x")})
		x.Close()
	}
	c.getattr(fh)
	b.rpc.Close()
	b.srv.connMu.Lock()
	defer b.srv.connMu.Unlock()
	if n := len(b.srv.conns); n != 0 {
		t.Errorf("%d connections are remembered after all were closed", n)
	}
}

// A full disk is told as such, also to a write of which a part fitted.
func TestFullDisk(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	for _, d := range b.disks {
		d.SetCapacity(600 << 10)
	}
	for i := range 20 {
		w := c.write(fh, uint64(i)*100_000, string(make([]byte, 100_000)), wire.FileSync)
		if w.Status == nfs.NFSStatusOk {
			continue
		}
		want(t, "write to a full disk", w.Status, nfs.NFSStatusNoSPC)
		return
	}
	t.Fatal("the disk did not get full")
}

func TestStatfsHasFiles(t *testing.T) {
	b := newBed(t, 1)
	s, st := b.fs.Statfs(context.Background(), b.a.owner())
	if st != wire.OK || s.FilesFree == 0 || s.FilesAvail == 0 || s.Files <= s.FilesFree {
		t.Errorf("%v %+v", st, s)
	}
}
