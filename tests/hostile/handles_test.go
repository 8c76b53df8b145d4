package hostile

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

const handleExports = `/rw *(rw,no_root_squash,insecure,dir=/)
/ro *(ro,no_root_squash,insecure,dir=/)
/sub *(rw,no_root_squash,insecure,dir=/sub)
/priv 127.0.0.9(rw,no_root_squash,insecure,dir=/priv)
/low *(rw,no_root_squash,secure,dir=/low)
`

// badHandleCalls are all procedures with fh in the place of every handle they
// have; good is used for the other handle of RENAME and LINK.
func badHandleCalls(fh, good []byte) []*callMsg {
	w := &world{dir: fh, sub: fh, file: fh, link: fh}
	l := w.calls()[1:]
	n := []byte("x")
	return append(l,
		nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: fh, FromName: n, ToFH: good, ToName: n}),
		nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: good, FromName: n, ToFH: fh, ToName: n}),
		nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: fh, DirFH: good, Name: n}),
		nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: good, DirFH: fh, Name: n}))
}

// status makes a call and returns its NFS status.
func (c *client) status(m *callMsg) nfs.NFSStatus {
	c.t.Helper()
	m.cred = c.cred
	p, err := c.c.call(m)
	if err == nil {
		err = checkReply(m.bytes(), p)
	}
	if err == nil && (p.denied || p.stat != 0) {
		err = fmt.Errorf("denied %v, stat %d", p.denied, p.stat)
	}
	if err != nil {
		c.t.Fatalf("procedure %d: %v", m.proc, err)
	}
	return nfs.NFSStatus(binary.BigEndian.Uint32(p.body))
}

func (c *client) refuses(fh, good []byte, want nfs.NFSStatus) {
	c.t.Helper()
	for _, m := range badHandleCalls(fh, good) {
		if st := c.status(m); st != want {
			c.t.Errorf("procedure %d: status %d, want %d", m.proc, uint32(st), uint32(want))
		}
	}
}

func TestHandles(t *testing.T) {
	s := serve(t, options{exports: handleExports})
	w := newWitness(s)
	c := s.client("/rw")
	sub := s.client("/sub")
	ro := s.client("/ro")
	priv := s.clientFrom(t, netip.MustParseAddr("127.0.0.9"), "/priv")
	key, err := os.ReadFile(filepath.Join(s.o.dataDir, "cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	codec := nfs3.NewCodec(key)
	seal := func(h nfs3.Handle) []byte {
		var b [nfs3.HandleSize]byte
		codec.Encode(h, &b)
		return b[:]
	}
	open := func(fh []byte) nfs3.Handle {
		h, err := codec.Decode(fh)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	file := c.create(c.root, "file")
	dir := c.mkdir(c.root, "dir")
	sub.create(sub.root, "subfile")
	step := func(name string, f func(t *testing.T, c *client)) {
		t.Run(name, func(t *testing.T) {
			cc := *c
			cc.t = t
			f(t, &cc)
			w.check(func() { s.alive(badWords) })
		})
	}

	step("every bit of a handle counts", func(t *testing.T, c *client) {
		for bit := range len(file) * 8 {
			fh := append([]byte(nil), file...)
			fh[bit/8] ^= 1 << (bit % 8)
			if st := c.getattr(fh).Status; st != nfs.NFSStatusBadHandle {
				t.Fatalf("bit %d flipped: status %d, want BADHANDLE", bit, uint32(st))
			}
		}
	})
	step("wrong length", func(t *testing.T, c *client) {
		long := append(append([]byte(nil), file...), make([]byte, 64)...)
		for n := range 65 {
			if n == len(file) {
				continue
			}
			if st := c.getattr(long[:n]).Status; st != nfs.NFSStatusBadHandle {
				t.Errorf("%d bytes: status %d, want BADHANDLE", n, uint32(st))
			}
		}
		m := nfsCall(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: long[:65]})
		if p, err := c.c.call(m); err != nil || p.denied || p.stat != 4 {
			t.Errorf("65 bytes: %+v, %v; want GARBAGE_ARGS", p, err)
		}
		c.refuses(file[:47], c.root, nfs.NFSStatusBadHandle)
		c.refuses(nil, c.root, nfs.NFSStatusBadHandle)
	})
	step("signed with another key", func(t *testing.T, c *client) {
		var b [nfs3.HandleSize]byte
		nfs3.NewCodec(make([]byte, 32)).Encode(open(file), &b)
		c.refuses(b[:], c.root, nfs.NFSStatusBadHandle)
	})
	step("made up", func(t *testing.T, c *client) {
		c.refuses(pattern(7, nfs3.HandleSize), c.root, nfs.NFSStatusBadHandle)
		c.refuses(make([]byte, nfs3.HandleSize), c.root, nfs.NFSStatusBadHandle)
	})
	step("another generation", func(t *testing.T, c *client) {
		h := open(dir)
		h.Generation++
		c.refuses(seal(h), c.root, nfs.NFSStatusStale)
		h = open(file)
		h.Generation++
		for _, m := range badHandleCalls(seal(h), c.root) {
			want := nfs.NFSStatusStale
			if nfs.NFSProcedure(m.proc) == nfs.NFSProcedureLookup {
				want = nfs.NFSStatusNotDir // either is true
			}
			if st := c.status(m); st != want {
				t.Errorf("procedure %d: status %d, want %d", m.proc, uint32(st), uint32(want))
			}
		}
	})
	step("an object that never was", func(t *testing.T, c *client) {
		h := open(file)
		h.FID.OID += 100000
		c.refuses(seal(h), c.root, nfs.NFSStatusStale)
		h.FID = wire.FID{}
		c.refuses(seal(h), c.root, nfs.NFSStatusStale)
	})
	step("an export that never was", func(t *testing.T, c *client) {
		h := open(file)
		h.FSID ^= 0x5555
		c.refuses(seal(h), c.root, nfs.NFSStatusStale)
	})
	gone := c.create(c.root, "gone")
	c.write(gone, 0, pattern(1, 5000))
	goneDir := c.mkdir(c.root, "gonedir")
	step("removed objects", func(t *testing.T, c *client) {
		if st := c.remove(c.root, "gone"); st != nfs.NFSStatusOk {
			t.Fatal(st)
		}
		var r nfs3.WccRes
		c.must(c.do(nfs.NFSProcedureRmDir, &nfs3.DirOpArgs{FH: c.root, Name: []byte("gonedir")}, &r), r.Status)
		c.refuses(gone, c.root, nfs.NFSStatusStale)
		c.refuses(goneDir, c.root, nfs.NFSStatusStale)
		// The same names again are other objects.
		c.create(c.root, "gone")
		c.mkdir(c.root, "gonedir")
		c.refuses(gone, c.root, nfs.NFSStatusStale)
		c.refuses(goneDir, c.root, nfs.NFSStatusStale)
	})
	step("an export for others", func(t *testing.T, c *client) {
		c.refuses(priv.root, c.root, nfs.NFSStatusAccess)
		if a := priv.getattr(priv.root); a.Status != nfs.NFSStatusOk {
			t.Errorf("the client that may: %v", a.Status)
		}
	})
	step("a port above 1023 on a secure export", func(t *testing.T, c *client) {
		low := dialFromPrivileged(t, s)
		p, err := low.call(mntCall("/low"))
		if err != nil || len(p.body) < 8+nfs3.HandleSize {
			t.Fatalf("MNT from a privileged port: %+v, %v", p, err)
		}
		c.refuses(p.body[8:8+nfs3.HandleSize], c.root, nfs.NFSStatusAccess)
	})
	step("a read-only export", func(t *testing.T, c *client) {
		h := open(file)
		h.FSID = open(ro.root).FSID
		roFile := seal(h)
		h = open(dir)
		h.FSID = open(ro.root).FSID
		roDir := seal(h)
		rc := *ro
		rc.t = t
		changes := 0
		for _, m := range (&world{dir: roDir, sub: roDir, file: roFile, link: roFile}).calls()[1:] {
			st := rc.status(m)
			switch p := nfs.NFSProcedure(m.proc); p {
			case nfs.NFSProcedureSetAttr, nfs.NFSProcedureWrite, nfs.NFSProcedureCreate, nfs.NFSProcedureMkDir, nfs.NFSProcedureSymlink, nfs.NFSProcedureMkNod,
				nfs.NFSProcedureRemove, nfs.NFSProcedureRmDir, nfs.NFSProcedureRename, nfs.NFSProcedureLink:
				changes++
				if st != nfs.NFSStatusROFS {
					t.Errorf("procedure %d: status %d, want ROFS", p, uint32(st))
				}
			default:
				if st == nfs.NFSStatusROFS || st == nfs.NFSStatusStale || st == nfs.NFSStatusBadHandle {
					t.Errorf("procedure %d: status %d", p, uint32(st))
				}
			}
		}
		if changes < 10 {
			t.Errorf("only %d changing calls", changes)
		}
	})
	step("from one export into another", func(t *testing.T, c *client) {
		n := []byte("file")
		for _, m := range []*callMsg{
			nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: c.root, FromName: n, ToFH: sub.root, ToName: n}),
			nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: sub.root, FromName: []byte("subfile"), ToFH: c.root, ToName: n}),
			nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: file, DirFH: sub.root, Name: n}),
		} {
			if st := c.status(m); st != nfs.NFSStatusXDev {
				t.Errorf("procedure %d: status %d, want XDEV", m.proc, uint32(st))
			}
		}
	})
	step("out of an export with ..", func(t *testing.T, c *client) {
		r := sub.lookup(sub.root, "..")
		if r.Status != nfs.NFSStatusOk || string(r.FH) != string(sub.root) {
			t.Errorf("LOOKUP .. at the root: %v, another object: %v", r.Status, string(r.FH) != string(sub.root))
		}
	})
	step("objects of the wrong type", func(t *testing.T, c *client) {
		for _, x := range []struct {
			m    *callMsg
			want nfs.NFSStatus
		}{
			{nfsCall(nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: file, Name: []byte("x")}), nfs.NFSStatusNotDir},
			{nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: file, Name: []byte("x")}), nfs.NFSStatusNotDir},
			{nfsCall(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: file, Count: 1000}), nfs.NFSStatusNotDir},
			{nfsCall(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: file, DirCount: 1000, MaxCount: 1000}), nfs.NFSStatusNotDir},
			{nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: dir, Count: 1000}), nfs.NFSStatusIsDir},
			{nfsCall(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: dir}), nfs.NFSStatusIsDir},
			{nfsCall(nfs.NFSProcedureReadlink, &nfs3.FHArgs{FH: file}), nfs.NFSStatusInval},
			{nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: dir, DirFH: c.root, Name: []byte("x")}), nfs.NFSStatusIsDir},
			{nfsCall(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Cookie: 5, CookieVerf: [8]byte{9}, Count: 1000}), nfs.NFSStatusBadCookie},
			{nfsCall(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Count: 3}), nfs.NFSStatusTooSmall},
		} {
			if st := c.status(x.m); st != x.want {
				t.Errorf("procedure %d: status %d, want %d", x.m.proc, uint32(st), uint32(x.want))
			}
		}
	})
	step("after a restart", func(t *testing.T, c *client) {
		s.restart()
		c.c = dial(t, s.nfs)
		if a := c.getattr(file); a.Status != nfs.NFSStatusOk {
			t.Errorf("a good handle: %v", a.Status)
		}
		c.refuses(gone, c.root, nfs.NFSStatusStale)
		c.refuses(goneDir, c.root, nfs.NFSStatusStale)
	})
	step("an export that is gone", func(t *testing.T, c *client) {
		s.o.exports = defaultExports
		s.writeConfig()
		c.c = dial(t, s.nfs)
		if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the export to go", func() bool { return c.getattr(sub.root).Status == nfs.NFSStatusStale })
		c.refuses(sub.root, c.root, nfs.NFSStatusStale)
	})
	s.stop()
	s.fsck()
}

// dialFromPrivileged connects to the MOUNT port from a port below 1024.
func dialFromPrivileged(t *testing.T, s *server) *conn {
	t.Helper()
	var err error
	for port := uint16(1000); port > 900; port-- {
		var c *conn
		if c, err = tryDial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), s.mount); err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
	}
	t.Skipf("SKIPPED, reason: no privileged port: %v", err)
	return nil
}

// TestCredentials checks that a credential gives what it should and no more.
func TestCredentials(t *testing.T) {
	s := serve(t, options{exports: defaultExports + "/squash *(rw,root_squash,insecure,dir=/)\n"})
	w := newWitness(s)
	c := s.client("/rw")
	sq := s.client("/squash")
	var set nfs3.WccRes
	c.must(c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: c.root, Attr: mode(0o755)}, &set), set.Status)
	own := c.create(c.root, "private")
	c.must(c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: own, Attr: wire.SetAttr{Mask: wire.SetMode | wire.SetUID | wire.SetGID, Mode: 0o640, UID: 1000, GID: 2000}}, &set), set.Status)
	c.write(own, 0, []byte("secret"))
	none := func(m *callMsg) *callMsg { m.credFlavor, m.cred = 0, nil; return m }
	as := func(m *callMsg, uid, gid uint32, gids ...uint32) *callMsg { m.cred = sys(uid, gid, gids...); return m }
	read := func() *callMsg { return nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: own, Count: 100}) }
	write := func() *callMsg {
		return nfsCall(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: own, Count: 1, Data: []byte("X"), Stable: wire.FileSync})
	}
	mk := func(dir []byte) *callMsg {
		return nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("mine"), Attr: mode(0o777)})
	}
	sgids := make([]uint32, 16)
	for i := range sgids {
		sgids[i] = uint32(3000 + i)
	}
	last := append(append([]uint32(nil), sgids[:15]...), 2000)
	for _, x := range []struct {
		name string
		m    *callMsg
		want nfs.NFSStatus
	}{
		{"owner reads", as(read(), 1000, 1), nfs.NFSStatusOk},
		{"group reads", as(read(), 1001, 2000), nfs.NFSStatusOk},
		{"16th group reads", as(read(), 1001, 1, last...), nfs.NFSStatusOk},
		{"others do not read", as(read(), 1001, 1, sgids...), nfs.NFSStatusAccess},
		{"AUTH_NONE does not read", none(read()), nfs.NFSStatusAccess},
		{"uid 2^32-1 does not read", as(read(), 1<<32-1, 1<<32-1), nfs.NFSStatusAccess},
		{"group does not write", as(write(), 1001, 2000), nfs.NFSStatusAccess},
		{"others do not write", as(write(), 1001, 1), nfs.NFSStatusAccess},
		{"others do not make directories", as(mk(c.root), 1001, 1), nfs.NFSStatusAccess},
		{"AUTH_NONE does not make directories", none(mk(c.root)), nfs.NFSStatusAccess},
		{"squashed root does not make directories", as(mk(sq.root), 0, 0), nfs.NFSStatusAccess},
		{"others do not chmod", as(nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: own, Attr: mode(0o777)}), 1001, 2000), nfs.NFSStatusPerm},
		{"owner does not chown", as(nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: own, Attr: wire.SetAttr{Mask: wire.SetUID, UID: 1001}}), 1000, 2000), nfs.NFSStatusPerm},
		{"others do not remove", as(nfsCall(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: c.root, Name: []byte("private")}), 1001, 2000), nfs.NFSStatusAccess},
	} {
		t.Run(x.name, func(t *testing.T) {
			p, err := dial(t, s.nfs).call(x.m)
			if err == nil {
				err = checkReply(x.m.bytes(), p)
			}
			if err != nil || p.denied || p.stat != 0 {
				t.Fatalf("%+v, %v", p, err)
			}
			if st := nfs.NFSStatus(xdr.NewReader(p.body).Uint32()); st != x.want {
				t.Errorf("status %d, want %d", uint32(st), uint32(x.want))
			}
		})
	}
	if got := c.read(own, 0, 100); string(got) != "secret" {
		t.Errorf("the file holds %q", got)
	}
	w.check(func() { s.alive(badWords) })
	s.stop()
	s.fsck()
}
