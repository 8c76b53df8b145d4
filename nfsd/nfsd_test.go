package nfsd

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

func want(t *testing.T, what string, got, want nfs.NFSStatus) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: status %v (%d), want %v", what, got, got, want)
	}
}

func TestCreateWriteReadRemove(t *testing.T) {
	for _, stripes := range []int{1, 2} {
		t.Run(fmt.Sprintf("stripes=%d", stripes), func(t *testing.T) {
			b := newBed(t, stripes)
			c, dir := b.root(), b.mount("/data")
			fh := c.mustCreate(dir, "f")
			data := string(bytes.Repeat([]byte("0123456789abcdef"), 20000)) // 320,000 bytes: crosses stripes
			w := c.write(fh, 0, data, wire.Unstable)
			want(t, "write", w.Status, nfs.NFSStatusOk)
			if w.Count != uint32(len(data)) || w.Committed != wire.Unstable || w.Verf != [8]byte{1, 2, 3} {
				t.Fatalf("write: count %d committed %d verifier %x", w.Count, w.Committed, w.Verf)
			}
			if !w.Wcc.After.Present || w.Wcc.After.Attr.Size != uint64(len(data)) {
				t.Fatalf("write: attributes after %+v", w.Wcc.After)
			}
			if w.Wcc.Before.Valid != (stripes == 1) {
				t.Fatalf("write: attributes before valid=%v with %d stripes", w.Wcc.Before.Valid, stripes)
			}
			var cm nfs3.CommitRes
			c.do(nfs.NFSProcedureCommit, &nfs3.CommitArgs{FH: fh}, &cm)
			want(t, "commit", cm.Status, nfs.NFSStatusOk)
			if cm.Verf != w.Verf {
				t.Fatalf("commit verifier %x differs from write's %x", cm.Verf, w.Verf)
			}
			for _, r := range []struct {
				off  uint64
				n    uint32
				want string
				eof  bool
			}{
				{0, 1000, data[:1000], false},
				{65530, 20, data[65530:65550], false},
				{uint64(len(data)) - 5, 100, data[len(data)-5:], true},
				{uint64(len(data)), 10, "", true},
				{1 << 40, 10, "", true},
			} {
				got := c.read(fh, r.off, r.n)
				want(t, "read", got.Status, nfs.NFSStatusOk)
				if string(got.Data) != r.want || got.EOF != r.eof {
					t.Fatalf("read at %d: %d bytes eof %v, want %d bytes eof %v", r.off, len(got.Data), got.EOF, len(r.want), r.eof)
				}
			}
			// Once the IO epoch is closed the MDT answers, with the same figures.
			before, _ := c.getattr(fh)
			deadline := time.Now().Add(20 * time.Second)
			for b.fs.OpenEpochs() > 0 {
				if time.Now().After(deadline) {
					t.Fatal("the IO epoch was not closed")
				}
				time.Sleep(10 * time.Millisecond)
			}
			after, _ := c.getattr(fh)
			after.Atime, before.Atime, after.Used, before.Used = 0, 0, 0, 0
			if after != before {
				t.Fatalf("attributes changed when the epoch closed:\n%+v\n%+v", before, after)
			}
			want(t, "remove", c.remove(dir, "f"), nfs.NFSStatusOk)
			_, st := c.getattr(fh)
			want(t, "getattr of a removed file", st, nfs.NFSStatusStale)
			w = c.write(fh, 0, "x", wire.Unstable)
			want(t, "write to a removed file", w.Status, nfs.NFSStatusStale)
		})
	}
}

func TestTruncateHolesAndLimits(t *testing.T) {
	for _, stripes := range []int{1, 2} {
		b := newBed(t, stripes)
		c, dir := b.root(), b.mount("/data")
		fh := c.mustCreate(dir, "f")
		size := func(n uint64) wire.SetAttr { return wire.SetAttr{Mask: wire.SetSize, Size: n} }
		want(t, "write", c.write(fh, 200000, "end", wire.FileSync).Status, nfs.NFSStatusOk)
		r := c.read(fh, 0, 200003)
		if len(r.Data) != 200003 || !bytes.Equal(r.Data[:200000], make([]byte, 200000)) || string(r.Data[200000:]) != "end" {
			t.Fatalf("stripes %d: hole does not read as zeros", stripes)
		}
		want(t, "shrink", c.setattr(fh, size(70000)).Status, nfs.NFSStatusOk)
		want(t, "grow", c.setattr(fh, size(300000)).Status, nfs.NFSStatusOk)
		r = c.read(fh, 0, 300000)
		if len(r.Data) != 300000 || !r.EOF || !bytes.Equal(r.Data, make([]byte, 300000)) {
			t.Fatalf("stripes %d: %d bytes after shrink and grow, or old data came back", stripes, len(r.Data))
		}
		const top = wire.MaxFileSize
		want(t, "write at the top", c.write(fh, top-3, "abc", wire.Unstable).Status, nfs.NFSStatusOk)
		a, _ := c.getattr(fh)
		if a.Size != top {
			t.Fatalf("size %d, want %d", a.Size, uint64(top))
		}
		if r = c.read(fh, top-3, 10); string(r.Data) != "abc" || !r.EOF {
			t.Fatalf("read at the top: %q eof %v", r.Data, r.EOF)
		}
		want(t, "write beyond the top", c.write(fh, top-2, "abc", wire.Unstable).Status, nfs.NFSStatusFBig)
		want(t, "size beyond the top", c.setattr(fh, size(1<<63)).Status, nfs.NFSStatusFBig)
		want(t, "size to the top", c.setattr(fh, size(top)).Status, nfs.NFSStatusOk)
	}
}

func TestTimesOrderAgainstWrites(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	set := wire.SetAttr{Mask: wire.SetMtime, Mtime: 1_000_000_000 * 1e9}
	for i := range 3 {
		w := c.write(fh, 0, "data", wire.Unstable)
		if w.Wcc.After.Attr.Mtime <= set.Mtime {
			t.Fatalf("round %d: a write after SETATTR did not move mtime: %d", i, w.Wcc.After.Attr.Mtime)
		}
		want(t, "setattr", c.setattr(fh, set).Status, nfs.NFSStatusOk)
		if a, _ := c.getattr(fh); a.Mtime != set.Mtime {
			t.Fatalf("round %d: mtime %d after SETATTR, want %d", i, a.Mtime, set.Mtime)
		}
		if i == 1 {
			for b.fs.OpenEpochs() > 0 {
				time.Sleep(5 * time.Millisecond)
			}
			if a, _ := c.getattr(fh); a.Mtime != set.Mtime {
				t.Fatalf("mtime %d after the epoch closed, want %d", a.Mtime, set.Mtime)
			}
		}
	}
}

func TestCreateModes(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	want(t, "write", c.write(fh, 0, "hello", wire.FileSync).Status, nfs.NFSStatusOk)
	want(t, "guarded", c.create(dir, "f", wire.Guarded, 0o600).Status, nfs.NFSStatusExist)
	// UNCHECKED leaves an existing file alone unless a size is given.
	r := c.create(dir, "f", wire.Unchecked, 0o600)
	if r.Status != nfs.NFSStatusOk || !bytes.Equal(r.FH, fh) || r.Obj.Attr.Size != 5 || r.Obj.Attr.Mode != 0o644 {
		t.Fatalf("unchecked: %v size %d mode %o", r.Status, r.Obj.Attr.Size, r.Obj.Attr.Mode)
	}
	var tr nfs3.CreateRes
	c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("f"), How: wire.Unchecked, Attr: wire.SetAttr{Mask: wire.SetSize}}, &tr)
	if tr.Status != nfs.NFSStatusOk || tr.Obj.Attr.Size != 0 {
		t.Fatalf("unchecked with size 0: %v size %d", tr.Status, tr.Obj.Attr.Size)
	}
	if rd := c.read(fh, 0, 10); len(rd.Data) != 0 || !rd.EOF {
		t.Fatalf("data after truncation: %q", rd.Data)
	}
	ex := func(verf byte) nfs3.CreateRes {
		var r nfs3.CreateRes
		c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("x"), How: wire.Exclusive, Verf: [8]byte{verf}}, &r)
		return r
	}
	first := ex(1)
	want(t, "exclusive", first.Status, nfs.NFSStatusOk)
	again := ex(1)
	if again.Status != nfs.NFSStatusOk || !bytes.Equal(again.FH, first.FH) {
		t.Fatalf("exclusive with the same verifier: %v", again.Status)
	}
	want(t, "exclusive with another verifier", ex(2).Status, nfs.NFSStatusExist)
}

func TestExportRules(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	ro := b.mount("/ro")
	if r := c.lookup(ro, "f"); r.Status != nfs.NFSStatusOk {
		t.Fatalf("lookup through the read-only export: %v", r.Status)
	} else {
		want(t, "write through ro", c.write(r.FH, 0, "x", wire.Unstable).Status, nfs.NFSStatusROFS)
		want(t, "setattr through ro", c.setattr(r.FH, wire.SetAttr{Mask: wire.SetMode}).Status, nfs.NFSStatusROFS)
	}
	want(t, "create through ro", c.create(ro, "g", wire.Guarded, 0o644).Status, nfs.NFSStatusROFS)
	want(t, "remove through ro", c.remove(ro, "f"), nfs.NFSStatusROFS)

	sq := b.mount("/squash")
	want(t, "root is squashed", c.create(sq, "g", wire.Guarded, 0o644).Status, nfs.NFSStatusAccess)

	if _, st := b.tryMount("/secure"); st != nfs.MountStatusErrAcces {
		t.Fatalf("mount of a secure export from a high port: %d", st)
	}
	if _, st := b.tryMount("/nothing"); st != nfs.MountStatusErrAcces {
		t.Fatalf("mount of what is not exported: %d", st)
	}
	// Entries may not be moved or linked between exports, even of one directory.
	var rn nfs3.RenameRes
	c.do(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: []byte("f"), ToFH: sq, ToName: []byte("f")}, &rn)
	want(t, "rename across exports", rn.Status, nfs.NFSStatusXDev)
	var ln nfs3.LinkRes
	c.do(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: fh, DirFH: sq, Name: []byte("l")}, &ln)
	want(t, "link across exports", ln.Status, nfs.NFSStatusXDev)
	// The export's root has no parent.
	if r := c.lookup(dir, ".."); r.Status != nfs.NFSStatusOk || !bytes.Equal(r.FH, dir) {
		t.Fatalf("lookup of .. in the export's root: %v", r.Status)
	}
	anon := b.as(sunrpc.Cred{Flavor: sunrpc.AuthNone})
	if _, st := anon.getattr(dir); st != nfs.NFSStatusOk {
		t.Fatalf("getattr with AUTH_NONE: %v", st)
	}
	want(t, "create with AUTH_NONE", anon.create(dir, "n", wire.Guarded, 0o644).Status, nfs.NFSStatusAccess)
}

func TestBadHandles(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	for name, fh := range map[string][]byte{
		"empty": {}, "short": dir[:40], "long": append(bytes.Clone(dir), make([]byte, 16)...),
		"changed": func() []byte { f := bytes.Clone(dir); f[20] ^= 1; return f }(),
	} {
		_, st := c.getattr(fh)
		want(t, name, st, nfs.NFSStatusBadHandle)
		want(t, name+" write", c.write(fh, 0, "x", wire.FileSync).Status, nfs.NFSStatusBadHandle)
		want(t, name+" create", c.create(fh, "x", wire.Guarded, 0).Status, nfs.NFSStatusBadHandle)
		want(t, name+" lookup", c.lookup(fh, "x").Status, nfs.NFSStatusBadHandle)
	}
	f := c.mustCreate(dir, "f")
	want(t, "lookup in a file", c.lookup(f, "x").Status, nfs.NFSStatusNotDir)
	want(t, "read of a directory", c.read(dir, 0, 10).Status, nfs.NFSStatusIsDir)
	want(t, "write to a directory", c.write(dir, 0, "x", wire.Unstable).Status, nfs.NFSStatusIsDir)
}

func TestPermissions(t *testing.T) {
	b := newBed(t, 1)
	root, dir := b.root(), b.mount("/data")
	want(t, "chmod", root.setattr(dir, wire.SetAttr{Mask: wire.SetMode, Mode: 0o1777}).Status, nfs.NFSStatusOk)
	alice, bob := b.as(user(1000, 1000, 50, 51)), b.as(user(1001, 1001))
	fh := alice.mustCreate(dir, "f")
	want(t, "write by another", bob.write(fh, 0, "x", wire.Unstable).Status, nfs.NFSStatusAccess)
	want(t, "sticky: remove by another", bob.remove(dir, "f"), nfs.NFSStatusPerm)
	want(t, "chmod by another", bob.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: 0o777}).Status, nfs.NFSStatusPerm)
	want(t, "chgrp to an own group", alice.setattr(fh, wire.SetAttr{Mask: wire.SetGID, GID: 51}).Status, nfs.NFSStatusOk)
	want(t, "chgrp to a foreign group", alice.setattr(fh, wire.SetAttr{Mask: wire.SetGID, GID: 99}).Status, nfs.NFSStatusPerm)
	want(t, "chown", alice.setattr(fh, wire.SetAttr{Mask: wire.SetUID, UID: 1001}).Status, nfs.NFSStatusPerm)
	// The owner goes on with a file that was open when its mode changed.
	want(t, "chmod 0", alice.setattr(fh, wire.SetAttr{Mask: wire.SetMode}).Status, nfs.NFSStatusOk)
	want(t, "owner writes", alice.write(fh, 0, "x", wire.FileSync).Status, nfs.NFSStatusOk)
	want(t, "owner reads", alice.read(fh, 0, 1).Status, nfs.NFSStatusOk)
	want(t, "owner truncates", alice.setattr(fh, wire.SetAttr{Mask: wire.SetSize}).Status, nfs.NFSStatusOk)
	want(t, "another reads", bob.read(fh, 0, 1).Status, nfs.NFSStatusAccess)
	// A file that may be executed may be read.
	want(t, "chmod 711", alice.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: 0o711}).Status, nfs.NFSStatusOk)
	want(t, "read of an executable", bob.read(fh, 0, 1).Status, nfs.NFSStatusOk)
	var ac nfs3.AccessRes
	bob.do(nfs.NFSProcedureAccess, &nfs3.AccessArgs{FH: fh, Access: nfs3.AccessAll}, &ac)
	if ac.Access != nfs3.AccessExecute {
		t.Fatalf("access of another to mode 711: %#x", ac.Access)
	}
	var mk nfs3.CreateRes
	alice.do(nfs.NFSProcedureMkNod, &nfs3.MknodArgs{FH: dir, Name: []byte("dev"), Type: wire.TypeBlk}, &mk)
	want(t, "mknod of a device by a user", mk.Status, nfs.NFSStatusPerm)
	alice.do(nfs.NFSProcedureMkNod, &nfs3.MknodArgs{FH: dir, Name: []byte("fifo"), Type: wire.TypeFifo}, &mk)
	want(t, "mknod of a fifo by a user", mk.Status, nfs.NFSStatusOk)
}

func TestWriteClearsSetuid(t *testing.T) {
	b := newBed(t, 1)
	root, dir := b.root(), b.mount("/data")
	fh := root.mustCreate(dir, "f")
	for _, c := range []struct{ before, after uint32 }{{0o6777, 0o777}, {0o2767, 0o2767}, {0o2777, 0o777}, {0o4666, 0o666}} {
		want(t, "chmod", root.setattr(fh, wire.SetAttr{Mask: wire.SetMode, Mode: c.before}).Status, nfs.NFSStatusOk)
		want(t, "write by root", root.write(fh, 0, "x", wire.FileSync).Status, nfs.NFSStatusOk)
		if a, _ := root.getattr(fh); a.Mode != c.before {
			t.Fatalf("mode %o after a write by root, want %o", a.Mode, c.before)
		}
		w := b.as(user(5, 5)).write(fh, 0, "y", wire.FileSync)
		want(t, "write by a user", w.Status, nfs.NFSStatusOk)
		if w.Wcc.After.Attr.Mode != c.after {
			t.Fatalf("mode %o after a write by a user to mode %o, want %o", w.Wcc.After.Attr.Mode, c.before, c.after)
		}
	}
}

func TestReaddirWhileTheDirectoryChanges(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	const n = 300
	for i := range n {
		c.mustCreate(dir, fmt.Sprintf("old%03d", i))
	}
	for _, plus := range []bool{false, true} {
		seen := map[string]int{}
		var cookie uint64
		var verf [8]byte
		for page := 0; ; page++ {
			r := nfs3.ReaddirRes{Plus: plus}
			if plus {
				c.do(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, Cookie: cookie, CookieVerf: verf, DirCount: 1000, MaxCount: 8000}, &r)
			} else {
				c.do(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Cookie: cookie, CookieVerf: verf, Count: 1000}, &r)
			}
			want(t, "readdir", r.Status, nfs.NFSStatusOk)
			for _, e := range r.Entries {
				seen[string(e.Name)]++
				if e.Cookie <= cookie {
					t.Fatalf("cookie %d after %d", e.Cookie, cookie)
				}
				cookie = e.Cookie
				if plus && string(e.Name)[0] == 'o' && (!e.Attr.Present || e.FH == nil || e.Attr.Attr.FileID != e.FileID) {
					t.Fatalf("entry %s without attributes or handle", e.Name)
				}
			}
			verf = r.CookieVerf
			if r.EOF {
				break
			}
			if len(r.Entries) == 0 {
				t.Fatal("a page without entries")
			}
			// The entry that the next page starts behind is removed, and one added.
			last := string(r.Entries[len(r.Entries)-1].Name)
			if last[0] == 'o' && page%2 == 0 {
				want(t, "remove", c.remove(dir, last), nfs.NFSStatusOk)
				c.mustCreate(dir, last) // for the second listing; it comes at the end
			}
		}
		for i := range n {
			if k := seen[fmt.Sprintf("old%03d", i)]; k < 1 || k > 2 {
				t.Fatalf("plus=%v: old%03d seen %d times", plus, i, k)
			}
		}
		if seen["."] != 1 || seen[".."] != 1 {
			t.Fatalf("dots: %d %d", seen["."], seen[".."])
		}
	}
	var r nfs3.ReaddirRes
	c.do(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Count: 20}, &r)
	want(t, "readdir with too small a count", r.Status, nfs.NFSStatusTooSmall)
	c.do(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Cookie: 5, CookieVerf: [8]byte{9}, Count: 4000}, &r)
	want(t, "readdir with a foreign verifier", r.Status, nfs.NFSStatusBadCookie)
}

// A retransmission is answered with the first execution's result: on the same
// connection, from the same port after a reconnect, from another port when the old
// connection is dead; and over a restart (own 5, own 8).
func TestResendOfNonIdempotentCalls(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			b := newBed(t, 1)
			c, dir := b.root(), b.mount("/data")
			for _, n := range []string{"a", "b", "c", "d"} {
				c.mustCreate(dir, n)
			}
			rm := func(n string) *nfs3.DirOpArgs { return &nfs3.DirOpArgs{FH: dir, Name: []byte(n)} }
			x := b.raw("")
			var r nfs3.WccRes
			x.send(100, 1, nfs.NFSProcedureRemove, rm("a"))
			x.recv(100, &r)
			want(t, "first", r.Status, nfs.NFSStatusOk)
			x.send(100, 2, nfs.NFSProcedureRemove, rm("a")) // with a renewed stamp
			x.recv(100, &r)
			want(t, "resent on the connection", r.Status, nfs.NFSStatusOk)
			if r.Wcc.Before.Valid {
				t.Fatal("a reconstructed reply claims to know the state before")
			}
			x.send(101, 1, nfs.NFSProcedureRemove, rm("a"))
			x.recv(101, &r)
			want(t, "new call", r.Status, nfs.NFSStatusNoEnt)

			// While the first connection lives, an equal call of another is another call.
			y := b.raw("")
			y.send(100, 1, nfs.NFSProcedureRemove, rm("a"))
			y.recv(100, &r)
			want(t, "equal call of another live connection", r.Status, nfs.NFSStatusNoEnt)

			local := x.LocalAddr().String()
			x.send(102, 1, nfs.NFSProcedureRemove, rm("b"))
			x.recv(102, &r)
			want(t, "remove b", r.Status, nfs.NFSStatusOk)
			var cr nfs3.CreateRes
			mk := &nfs3.MkdirArgs{FH: dir, Name: []byte("dir")}
			x.send(103, 1, nfs.NFSProcedureMkDir, mk)
			x.recv(103, &cr)
			want(t, "mkdir", cr.Status, nfs.NFSStatusOk)
			fh := bytes.Clone(cr.FH)
			x.Close()
			if restart {
				b.restart()
			}
			waitGone(t, b, local)
			z := b.raw("")
			z.send(102, 1, nfs.NFSProcedureRemove, rm("b"))
			z.recv(102, &r)
			want(t, "resent from another port", r.Status, nfs.NFSStatusOk)
			z.send(103, 1, nfs.NFSProcedureMkDir, mk)
			z.recv(103, &cr)
			want(t, "mkdir resent", cr.Status, nfs.NFSStatusOk)
			if !bytes.Equal(cr.FH, fh) || !cr.Obj.Present {
				t.Fatal("the reconstructed reply names another directory")
			}
			// Another client host's equal call is its own.
			w := b.raw("127.0.0.2:0")
			w.send(102, 1, nfs.NFSProcedureRemove, rm("b"))
			w.recv(102, &r)
			want(t, "equal call of another host", r.Status, nfs.NFSStatusNoEnt)
		})
	}
}

// waitGone waits until the server has noticed that the connection ended.
func waitGone(t *testing.T, b *bed, _ string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		b.srv.connMu.Lock()
		live := 0
		for _, c := range b.srv.conns {
			if c.Alive() {
				live++
			}
		}
		b.srv.connMu.Unlock()
		if live <= 2 { // root's and y's
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the server still thinks that the closed connection lives")
}

func TestHandlesSurviveRestart(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	want(t, "write", c.write(fh, 0, "kept", wire.FileSync).Status, nfs.NFSStatusOk)
	sub := c.mkdir(dir, "sub", 0o755).FH
	b.restart()
	c = b.root()
	if r := c.read(fh, 0, 10); string(r.Data) != "kept" {
		t.Fatalf("read after restart: %v %q", r.Status, r.Data)
	}
	if r := c.create(sub, "g", wire.Guarded, 0o644); r.Status != nfs.NFSStatusOk {
		t.Fatalf("create after restart: %v", r.Status)
	}
	if got := b.mount("/data/sub"); !bytes.Equal(got, sub) {
		t.Fatal("mount of a subdirectory gives another handle")
	}
}

func TestGuardedSetattr(t *testing.T) {
	b := newBed(t, 1)
	c, dir := b.root(), b.mount("/data")
	fh := c.mustCreate(dir, "f")
	a, _ := c.getattr(fh)
	var r nfs3.WccRes
	c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: fh, Attr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o600}, Guard: true, GuardCtime: a.Ctime}, &r)
	want(t, "right guard", r.Status, nfs.NFSStatusOk)
	c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: fh, Attr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o640}, Guard: true, GuardCtime: a.Ctime}, &r)
	want(t, "old guard", r.Status, nfs.NFSStatusNotSync)
}
