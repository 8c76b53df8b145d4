package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// replayCase is a call whose second execution would be seen: after its first one
// the world is changed, and a second one would undo or add to that.
type replayCase struct {
	name   string
	call   func(c *client, dir []byte) *callMsg
	change func(c *client, dir []byte)
	intact func(c *client, dir []byte) error
}

func absent(name string) func(*client, []byte) error {
	return func(c *client, dir []byte) error {
		if c.exists(dir, name) {
			return fmt.Errorf("%s is there again", name)
		}
		return nil
	}
}

func present(name string) func(*client, []byte) error {
	return func(c *client, dir []byte) error {
		if !c.exists(dir, name) {
			return fmt.Errorf("%s is gone", name)
		}
		return nil
	}
}

func replayCases() []replayCase {
	n := func(s string) []byte { return []byte(s) }
	rm := func(name string) func(*client, []byte) {
		return func(c *client, dir []byte) { c.must(nil, c.remove(dir, name)) }
	}
	rmdir := func(c *client, dir []byte) {
		var r nfs3.WccRes
		c.must(c.do(nfs.NFSProcedureRmDir, &nfs3.DirOpArgs{FH: dir, Name: n("x")}, &r), r.Status)
	}
	fill := func(c *client, dir []byte) { c.write(c.lookup(dir, "f").FH, 0, pattern(4, 5000)) }
	filled := func(c *client, dir []byte) error {
		if !bytes.Equal(c.read(c.lookup(dir, "f").FH, 0, 10000), pattern(4, 5000)) {
			return errors.New("the data written later are gone")
		}
		return nil
	}
	zero := wire.SetAttr{Mask: wire.SetSize}
	return []replayCase{
		{"CREATE guarded", func(c *client, dir []byte) *callMsg {
			return nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: n("x"), How: wire.Guarded, Attr: mode(0o600)})
		}, rm("x"), absent("x")},
		{"CREATE unchecked, truncating", func(c *client, dir []byte) *callMsg {
			c.create(dir, "f")
			return nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: n("f"), How: wire.Unchecked, Attr: zero})
		}, fill, filled},
		{"CREATE exclusive", func(c *client, dir []byte) *callMsg {
			return nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: n("x"), How: wire.Exclusive, Verf: [8]byte{3}})
		}, rm("x"), absent("x")},
		{"MKDIR", func(c *client, dir []byte) *callMsg {
			return nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: n("x"), Attr: mode(0o700)})
		}, rmdir, absent("x")},
		{"SYMLINK", func(c *client, dir []byte) *callMsg {
			return nfsCall(nfs.NFSProcedureSymlink, &nfs3.SymlinkArgs{FH: dir, Name: n("x"), Target: n("y")})
		}, rm("x"), absent("x")},
		{"MKNOD", func(c *client, dir []byte) *callMsg {
			return nfsCall(nfs.NFSProcedureMkNod, &nfs3.MknodArgs{FH: dir, Name: n("x"), Type: wire.TypeFifo})
		}, rm("x"), absent("x")},
		{"REMOVE", func(c *client, dir []byte) *callMsg {
			c.create(dir, "x")
			return nfsCall(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: n("x")})
		}, func(c *client, dir []byte) { c.create(dir, "x") }, present("x")},
		{"RMDIR", func(c *client, dir []byte) *callMsg {
			c.mkdir(dir, "x")
			return nfsCall(nfs.NFSProcedureRmDir, &nfs3.DirOpArgs{FH: dir, Name: n("x")})
		}, func(c *client, dir []byte) { c.mkdir(dir, "x") }, present("x")},
		{"RENAME", func(c *client, dir []byte) *callMsg {
			c.create(dir, "a")
			return nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: n("a"), ToFH: dir, ToName: n("b")})
		}, func(c *client, dir []byte) { c.write(c.create(dir, "a"), 0, n("another")) }, func(c *client, dir []byte) error {
			if !c.exists(dir, "a") || !c.exists(dir, "b") {
				return errors.New("the new file was renamed")
			}
			return nil
		}},
		{"LINK", func(c *client, dir []byte) *callMsg {
			f := c.create(dir, "f")
			return nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: f, DirFH: dir, Name: n("x")})
		}, rm("x"), func(c *client, dir []byte) error {
			if l := c.lookup(dir, "f"); l.Obj.Attr.Nlink != 1 || c.exists(dir, "x") {
				return fmt.Errorf("%d links", l.Obj.Attr.Nlink)
			}
			return nil
		}},
		{"SETATTR of the size", func(c *client, dir []byte) *callMsg {
			f := c.create(dir, "f")
			return nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: f, Attr: zero})
		}, fill, filled},
		{"SETATTR guarded", func(c *client, dir []byte) *callMsg {
			f := c.mkdir(dir, "d")
			return nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: f, Attr: mode(0o700), Guard: true, GuardCtime: c.getattr(f).Attr.Ctime})
		}, func(c *client, dir []byte) {
			var r nfs3.WccRes
			c.must(c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: c.lookup(dir, "d").FH, Attr: mode(0o711)}, &r), r.Status)
		}, func(c *client, dir []byte) error {
			if m := c.getattr(c.lookup(dir, "d").FH).Attr.Mode; m != 0o711 {
				return fmt.Errorf("mode %o", m)
			}
			return nil
		}},
	}
}

// outcome is what must be the same in all answers to one call.
func outcome(m *callMsg, p *reply) (string, error) {
	res := resultOf(nfs.NFSProcedure(m.proc))
	if err := decodeRes(p, res); err != nil {
		return "", err
	}
	s := fmt.Sprint("status ", xdr.NewReader(p.body).Uint32())
	if r, ok := res.(*nfs3.CreateRes); ok && r.FH != nil {
		s += fmt.Sprintf(" handle %x", r.FH)
	}
	return s, nil
}

func TestReplays(t *testing.T) {
	times := 100
	if testing.Short() {
		times = 10
	}
	s := serve(t, options{})
	w := newWitness(s)
	setup := s.client("/rw")
	type done struct {
		replayCase
		m   *callMsg
		dir []byte
	}
	var all []done
	for i, rc := range replayCases() {
		t.Run(rc.name, func(t *testing.T) {
			c := *setup
			c.t = t
			dir := c.mkdir(c.root, fmt.Sprint("dir", i))
			m := rc.call(&c, dir)
			again := func(conn *conn, want string, what string) string {
				t.Helper()
				p, err := conn.call(m)
				var got string
				if err == nil {
					got, err = outcome(m, p)
				}
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if want != "" && got != want {
					t.Fatalf("%s: %s, want %s", what, got, want)
				}
				return got
			}
			first := dial(t, s.nfs)
			want := again(first, "", "first")
			if want[:8] != "status 0" {
				t.Fatal(want)
			}
			for range times {
				again(first, want, "same connection")
			}
			rc.change(&c, dir)
			for range times {
				again(first, "", "same connection, world changed") // the object may be gone, and its handle with it
			}
			if err := rc.intact(&c, dir); err != nil {
				t.Fatalf("a replay on the same connection was executed: %v", err)
			}
			first.Close()
			for range times {
				other := dial(t, s.nfs)
				again(other, "", "another connection")
				other.Close()
			}
			if err := rc.intact(&c, dir); err != nil {
				t.Fatalf("a replay on another connection was executed: %v", err)
			}
			all = append(all, done{rc, m, dir})
		})
	}
	w.check(func() { s.alive(badWords) })

	t.Run("after kill -9", func(t *testing.T) {
		s.restart()
		c := *setup
		c.t, c.c = t, dial(t, s.nfs)
		for _, d := range all {
			for range times / 10 {
				conn := dial(t, s.nfs)
				p, err := conn.call(d.m)
				var got string
				if err == nil {
					got, err = outcome(d.m, p)
				}
				if err != nil || got[:8] != "status 0" {
					t.Fatalf("%s: %s, %v", d.name, got, err)
				}
				conn.Close()
			}
			if err := d.intact(&c, d.dir); err != nil {
				t.Errorf("%s was executed again: %v", d.name, err)
			}
		}
	})
	w.check(func() { s.alive(badWords) })
	s.stop()
	s.fsck()
}

// TestReplaysInProgress sends calls again while the first one is being executed.
func TestReplaysInProgress(t *testing.T) {
	s := serve(t, options{})
	w := newWitness(s)
	setup := s.client("/rw")
	for i, rc := range replayCases() {
		t.Run(rc.name, func(t *testing.T) {
			c := *setup
			c.t = t
			dir := c.mkdir(c.root, fmt.Sprint("dir", i))
			m := rc.call(&c, dir)
			conn := dial(t, s.nfs)
			if _, err := conn.Write(bytes.Repeat(record(m.bytes()), 100)); err != nil {
				t.Fatal(err)
			}
			// Copies beyond a few may be dropped; whatever comes must be the same.
			var want string
			check := func(p *reply) {
				t.Helper()
				got, err := outcome(m, p)
				if err != nil {
					t.Fatal(err)
				}
				if want == "" {
					want = got
				}
				if got != want || got[:8] != "status 0" {
					t.Fatalf("one answer: %s, another: %s", want, got)
				}
			}
			p, err := conn.await(m.xid)
			if err != nil {
				t.Fatal(err)
			}
			check(p)
			last := nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("last"), Attr: mode(0o755)})
			if err := conn.send(last.bytes()); err != nil {
				t.Fatal(err)
			}
			answers := 1
			for {
				if p, err = conn.recv(); err != nil {
					t.Fatal(err)
				}
				if p.xid == last.xid {
					break
				}
				check(p)
				answers++
			}
			t.Logf("%d answers to 100 copies", answers)
			rc.change(&c, dir)
			if p, err = conn.call(m); err != nil {
				t.Fatal(err)
			}
			if got, err := outcome(m, p); err != nil || got[:8] != "status 0" {
				t.Fatalf("%s, %v", got, err)
			}
			if err := rc.intact(&c, dir); err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("another living connection", func(t *testing.T) {
		// The same XID and arguments from another port, while the connection of
		// the first call lives, are another client's call.
		c := *setup
		c.t = t
		dir := c.mkdir(c.root, "two")
		m := nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("x"), Attr: mode(0o755)})
		for i, want := range []nfs.NFSStatus{nfs.NFSStatusOk, nfs.NFSStatusExist} {
			p, err := dial(t, s.nfs).call(m)
			if err != nil || nfs.NFSStatus(xdr.NewReader(p.body).Uint32()) != want {
				t.Errorf("client %d: %+v, %v; want status %d", i, p, err, uint32(want))
			}
		}
	})
	// A client whose connection breaks sends the call again at once, from
	// another port, while the first one may still be on its way.
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	for _, how := range []string{"FIN", "RST"} {
		t.Run("new connection after "+how, func(t *testing.T) {
			c := *setup
			c.t = t
			dir := c.mkdir(c.root, how)
			for i := range rounds {
				m := nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: fmt.Append(nil, "d", i), Attr: mode(0o755)})
				a := dial(t, s.nfs)
				if err := a.send(m.bytes()); err != nil {
					t.Fatal(err)
				}
				if i%2 == 0 { // executed and answered, or perhaps not even read
					if _, err := a.recv(); err != nil {
						t.Fatal(err)
					}
				}
				if how == "RST" {
					a.Conn.(*net.TCPConn).SetLinger(0)
				}
				a.Close()
				b := dial(t, s.nfs)
				p, err := b.call(m)
				var got string
				if err == nil {
					got, err = outcome(m, p)
				}
				if err != nil || got[:8] != "status 0" {
					t.Fatalf("round %d: %s, %v", i, got, err)
				}
				b.Close()
				var r nfs3.WccRes
				c.must(c.do(nfs.NFSProcedureRmDir, &nfs3.DirOpArgs{FH: dir, Name: fmt.Append(nil, "d", i)}, &r), r.Status)
			}
			// The first one may have been read after the second, or not even yet.
			w.check(func() { s.alive(badWords) })
			for i := range rounds {
				if c.exists(dir, fmt.Sprint("d", i)) {
					t.Errorf("round %d: executed again after the answer", i)
				}
			}
		})
	}
	t.Run("over UDP", func(t *testing.T) {
		c := *setup
		c.t = t
		dir := c.mkdir(c.root, "udp")
		m := nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("x"), Attr: mode(0o755)})
		u := dialUDP(t, s.nfs)
		for range 100 {
			if err := u.send(m.bytes()); err != nil {
				t.Fatal(err)
			}
		}
		for range 20 {
			p, err := u.call(m)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := outcome(m, p); err != nil || got[:8] != "status 0" {
				t.Fatalf("%s, %v", got, err)
			}
		}
	})
	w.check(func() { s.alive(badWords) })
	s.stop()
	s.fsck()
}

// TestKilledInFlight kills the server with calls in progress and sends all of
// them again to its successor, as a client does.
func TestKilledInFlight(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	s := serve(t, options{})
	w := newWitness(s)
	const n = 60
	for round := range rounds {
		c := s.client("/rw")
		dir := c.mkdir(c.root, fmt.Sprint("round", round))
		var calls []*callMsg
		for i := range n {
			name := []byte(fmt.Sprint("n", i))
			switch i % 3 {
			case 0:
				calls = append(calls, nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: name, How: wire.Guarded, Attr: mode(0o644)}))
			case 1:
				c.create(dir, string(name))
				calls = append(calls, nfsCall(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: name}))
			case 2:
				c.create(dir, string(name))
				calls = append(calls, nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: name, ToFH: dir, ToName: append(name, 'x')}))
			}
		}
		var all []byte
		for _, m := range calls {
			all = append(all, record(m.bytes())...)
		}
		conn := dial(t, s.nfs)
		if _, err := conn.Write(all); err != nil {
			t.Fatal(err)
		}
		for range round * n / rounds {
			if _, err := conn.recv(); err != nil {
				t.Fatal(err)
			}
		}
		s.restart()
		local := netip.AddrPort{}
		if round%2 == 0 {
			// As Linux does: the same port again.
			local = conn.LocalAddr().(*net.TCPAddr).AddrPort()
		}
		conn.Close()
		next, err := tryDial("tcp", local, s.nfs)
		if err != nil {
			if next, err = tryDial("tcp", netip.AddrPort{}, s.nfs); err != nil {
				t.Fatal(err)
			}
		}
		for i, m := range calls {
			p, err := next.call(m)
			var got string
			if err == nil {
				got, err = outcome(m, p)
			}
			if err != nil || got[:8] != "status 0" {
				t.Errorf("round %d, call %d, procedure %d: %s, %v", round, i, m.proc, got, err)
			}
		}
		next.Close()
		c = s.client("/rw")
		for i := range n {
			name := fmt.Sprint("n", i)
			if got := c.exists(dir, name); got != (i%3 == 0) {
				t.Errorf("round %d: %s exists: %v", round, name, got)
			}
			if i%3 == 2 && !c.exists(dir, name+"x") {
				t.Errorf("round %d: %sx does not exist", round, name)
			}
		}
		w.check(func() { s.alive(badWords) })
	}
	s.stop()
	s.fsck()
}
