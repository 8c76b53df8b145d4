package hostile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

// witness is a file that no hostile message names, so that it must stay as it is.
type witness struct {
	s    *server
	fh   []byte
	root []byte
	data []byte
}

func newWitness(s *server) *witness {
	s.t.Helper()
	c := s.client("/rw")
	w := &witness{s: s, root: c.root, data: pattern(1, 100_000)}
	w.fh = c.create(c.root, "witness")
	c.write(w.fh, 0, w.data)
	return w
}

// check makes sure that the server serves others as ever.
func (w *witness) check(bad func()) {
	w.s.t.Helper()
	bad()
	if err := ping(w.s.nfs); err != nil {
		w.s.t.Fatalf("NULL on another connection: %v\n%s", err, w.s.log())
	}
	c := &client{t: w.s.t, c: dial(w.s.t, w.s.nfs), cred: sys(0, 0)}
	defer c.c.Close()
	if a := c.getattr(w.fh); a.Status != nfs.NFSStatusOk || a.Attr.Size != uint64(len(w.data)) {
		w.s.t.Fatalf("GETATTR of the witness: %+v", a)
	}
	if got := c.read(w.fh, 0, 1<<20); !bytes.Equal(got, w.data) {
		w.s.t.Fatal("the witness's data have changed")
	}
}

// world is a directory of objects for hostile calls to work on.
type world struct {
	dir, sub, file, link []byte
}

func newWorld(c *client, name string) *world {
	w := &world{dir: c.mkdir(c.root, name)}
	w.sub = c.mkdir(w.dir, "sub")
	w.file = c.create(w.dir, "file")
	c.write(w.file, 0, pattern(2, 10_000))
	for _, n := range []string{"victim", "from"} {
		c.create(w.dir, n)
	}
	c.mkdir(w.dir, "emptydir")
	var r nfs3.CreateRes
	c.must(c.do(nfs.NFSProcedureSymlink, &nfs3.SymlinkArgs{FH: w.dir, Name: []byte("link"), Attr: mode(0o777), Target: []byte("file")}, &r), r.Status)
	w.link = r.FH
	return w
}

// calls returns a valid call of each of the 22 procedures, and of variants with
// arguments of their own.
func (w *world) calls() []*callMsg {
	full := wire.SetAttr{Mask: wire.SetMode | wire.SetUID | wire.SetGID | wire.SetSize | wire.SetAtime | wire.SetMtime, Mode: 0o640, UID: 1, GID: 2, Size: 77, Atime: 1e9, Mtime: 2e9}
	n := func(s string) []byte { return []byte(s) }
	return []*callMsg{
		nfsCall(0, nil),
		nfsCall(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: w.file}),
		nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: w.file, Attr: full, Guard: true, GuardCtime: 5}),
		nfsCall(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: w.file, Attr: full}),
		nfsCall(nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: w.dir, Name: n("file")}),
		nfsCall(nfs.NFSProcedureAccess, &nfs3.AccessArgs{FH: w.file, Access: 0x3f}),
		nfsCall(nfs.NFSProcedureReadlink, &nfs3.FHArgs{FH: w.link}),
		nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: w.file, Offset: 10, Count: 4096}),
		nfsCall(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: w.file, Offset: 100, Count: 41, Stable: wire.FileSync, Data: pattern(3, 41)}),
		nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: w.dir, Name: n("new"), How: wire.Unchecked, Attr: full}),
		nfsCall(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: w.dir, Name: n("newx"), How: wire.Exclusive, Verf: [8]byte{1, 2}}),
		nfsCall(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: w.dir, Name: n("newdir"), Attr: mode(0o755)}),
		nfsCall(nfs.NFSProcedureSymlink, &nfs3.SymlinkArgs{FH: w.dir, Name: n("newlink"), Attr: mode(0o777), Target: n("some/where")}),
		nfsCall(nfs.NFSProcedureMkNod, &nfs3.MknodArgs{FH: w.dir, Name: n("newdev"), Type: wire.TypeChr, Attr: mode(0o600), RdevMajor: 1, RdevMinor: 3}),
		nfsCall(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: w.dir, Name: n("victim")}),
		nfsCall(nfs.NFSProcedureRmDir, &nfs3.DirOpArgs{FH: w.dir, Name: n("emptydir")}),
		nfsCall(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: w.dir, FromName: n("from"), ToFH: w.sub, ToName: n("to")}),
		nfsCall(nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: w.file, DirFH: w.sub, Name: n("hard")}),
		nfsCall(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: w.dir, Count: 4096}),
		nfsCall(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: w.dir, DirCount: 4096, MaxCount: 16384}),
		nfsCall(nfs.NFSProcedureFSStat, &nfs3.FHArgs{FH: w.dir}),
		nfsCall(nfs.NFSProcedureFSInfo, &nfs3.FHArgs{FH: w.dir}),
		nfsCall(nfs.NFSProcedurePathConf, &nfs3.FHArgs{FH: w.dir}),
		nfsCall(nfs.NFSProcedureCommit, &nfs3.CommitArgs{FH: w.file, Offset: 0, Count: 0}),
	}
}

func mountCalls() []*callMsg {
	var l []*callMsg
	for p := range uint32(mount3.NumProcs) {
		m := mntCall("/rw")
		m.proc = p
		if p != 1 && p != 3 {
			m.args = nil
		}
		l = append(l, m)
	}
	return l
}

func portmapCalls() []*callMsg {
	call := func(vers, proc uint32, f func(*xdr.Writer)) *callMsg {
		m := null(rpcbind.Program, vers)
		m.proc = proc
		var w xdr.Writer
		f(&w)
		m.args = w.Buf
		return m
	}
	four := func(w *xdr.Writer) {
		for _, v := range []uint32{nfs3.Program, 3, 6, 2049} {
			w.Uint32(v)
		}
	}
	rpcb := func(w *xdr.Writer) {
		w.Uint32(nfs3.Program)
		w.Uint32(3)
		for _, s := range []string{"tcp", "127.0.0.1.8.1", "owner"} {
			w.String(s)
		}
	}
	var l []*callMsg
	for p := range uint32(6) { // NULL, SET, UNSET, GETPORT, DUMP, CALLIT
		l = append(l, call(2, p, four))
	}
	for _, v := range []uint32{3, 4} {
		for p := range uint32(13) {
			l = append(l, call(v, p, rpcb))
		}
	}
	return l
}

// resultOf is the decoder of a procedure's result.
func resultOf(proc nfs.NFSProcedure) decoder {
	switch proc {
	case nfs.NFSProcedureGetAttr:
		return &nfs3.GetattrRes{}
	case nfs.NFSProcedureSetAttr, nfs.NFSProcedureRemove, nfs.NFSProcedureRmDir:
		return &nfs3.WccRes{}
	case nfs.NFSProcedureLookup:
		return &nfs3.LookupRes{}
	case nfs.NFSProcedureAccess:
		return &nfs3.AccessRes{}
	case nfs.NFSProcedureReadlink:
		return &nfs3.ReadlinkRes{}
	case nfs.NFSProcedureRead:
		return &nfs3.ReadRes{}
	case nfs.NFSProcedureWrite:
		return &nfs3.WriteRes{}
	case nfs.NFSProcedureCreate, nfs.NFSProcedureMkDir, nfs.NFSProcedureSymlink, nfs.NFSProcedureMkNod:
		return &nfs3.CreateRes{}
	case nfs.NFSProcedureRename:
		return &nfs3.RenameRes{}
	case nfs.NFSProcedureLink:
		return &nfs3.LinkRes{}
	case nfs.NFSProcedureReadDir:
		return &nfs3.ReaddirRes{}
	case nfs.NFSProcedureReadDirPlus:
		return &nfs3.ReaddirRes{Plus: true}
	case nfs.NFSProcedureFSStat:
		return &nfs3.FSStatRes{}
	case nfs.NFSProcedureFSInfo:
		return &nfs3.FSInfoRes{}
	case nfs.NFSProcedurePathConf:
		return &nfs3.PathConfRes{}
	case nfs.NFSProcedureCommit:
		return &nfs3.CommitRes{}
	}
	return nil
}

// reaction is what RFC 5531 lets a server do with a record.
type reaction int

const (
	replies   reaction = iota
	ignores            // a reply message: nobody waits for an answer
	mayIgnore          // CALLIT and BCAST: no answer unless the call succeeds (RFC 1833 section 2.2.1)
	closes             // not an RPC message: the stream is lost
)

func expect(msg []byte) reaction {
	word := func(i int) uint32 { return binary.BigEndian.Uint32(msg[4*i:]) }
	switch {
	case len(msg) < 12:
		return closes
	case word(1) == 1:
		return ignores
	case word(1) != 0:
		return closes
	case word(2) == 2 && len(msg) < 40:
		return closes
	case word(2) == 2 && word(3) == rpcbind.Program && word(5) == 5:
		return mayIgnore
	}
	return replies
}

// checkReply makes sure that p is a proper answer to msg.
func checkReply(msg []byte, p *reply) error {
	word := func(i int) uint32 { return binary.BigEndian.Uint32(msg[4*i:]) }
	if p.denied {
		r := xdr.NewReader(p.body)
		want := 4
		if p.stat == 0 {
			if lo, hi := r.Uint32(), r.Uint32(); lo != 2 || hi != 2 {
				return fmt.Errorf("RPC_MISMATCH %d..%d", lo, hi)
			}
			if word(2) == 2 {
				return errors.New("RPC_MISMATCH for version 2")
			}
			want = 8
		} else if st := r.Uint32(); st < 1 || st > 5 {
			return fmt.Errorf("auth_stat %d", st)
		}
		if len(p.body) != want {
			return fmt.Errorf("denial with %d bytes", len(p.body))
		}
		return nil
	}
	if word(2) != 2 {
		return fmt.Errorf("RPC version %d accepted", word(2))
	}
	switch p.stat {
	case 0:
	case 2:
		if len(p.body) != 8 {
			return fmt.Errorf("PROG_MISMATCH with %d bytes", len(p.body))
		}
		return nil
	case 5:
		return errors.New("SYSTEM_ERR")
	default:
		if len(p.body) != 0 {
			return fmt.Errorf("accept_stat %d with %d bytes", p.stat, len(p.body))
		}
		return nil
	}
	if word(3) != nfs3.Program || word(5) == 0 {
		return nil
	}
	proc := nfs.NFSProcedure(word(5))
	res := resultOf(proc)
	if res == nil {
		return fmt.Errorf("SUCCESS for procedure %d", proc)
	}
	r := xdr.NewReader(p.body)
	if err := res.Decode(r); err != nil || r.Len() != 0 {
		return fmt.Errorf("result of procedure %d: %v, %d bytes left: % x", proc, err, r.Len(), p.body[:min(len(p.body), 200)])
	}
	st := nfs.NFSStatus(binary.BigEndian.Uint32(p.body))
	if !nfs3.Legal(proc, st) || st == nfs.NFSStatusServerFault || st == nfs.NFSStatusJukebox || st == nfs.NFSStatusIO {
		return fmt.Errorf("procedure %d: status %d", proc, uint32(st))
	}
	return nil
}

// attacker sends records one after the other and makes a new connection
// whenever the server has rightly closed the last one.
type attacker struct {
	t    testing.TB
	to   netip.AddrPort
	udp  bool
	c    *conn
	prog uint32 // for the NULL call that shows that nothing is to come
	vers uint32
	sent int
}

func (a *attacker) conn() *conn {
	if a.c == nil {
		network := "tcp"
		if a.udp {
			network = "udp"
		}
		c, err := tryDial(network, netip.AddrPort{}, a.to)
		if err != nil {
			a.t.Fatal(err)
		}
		a.c = c
	}
	return a.c
}

func (a *attacker) close() {
	if a.c != nil {
		a.c.Close()
		a.c = nil
	}
}

// fire sends msg and checks the reaction.
func (a *attacker) fire(msg []byte, what string) {
	a.t.Helper()
	a.sent++
	fail := func(err error) {
		a.t.Helper()
		a.t.Fatalf("%s, message % x: %v", what, msg[:min(len(msg), 400)], err)
	}
	c := a.conn()
	want := expect(msg)
	if err := c.send(msg); err != nil {
		fail(err)
	}
	if want == closes && !a.udp {
		if err := c.closed(); err != nil {
			fail(err)
		}
		a.close()
		return
	}
	if want != replies {
		// Nothing may come. The answer to the next call shows that it did not.
		n := null(a.prog, a.vers)
		if err := c.send(n.bytes()); err != nil {
			fail(err)
		}
		p, err := c.recv()
		if err == nil && want == mayIgnore && p.xid == binary.BigEndian.Uint32(msg) {
			if err = checkReply(msg, p); err == nil {
				p, err = c.recv()
			}
		}
		if err == nil && p.xid != n.xid {
			err = fmt.Errorf("answered: % x", p.raw)
		}
		if err != nil {
			fail(err)
		}
		return
	}
	p, err := c.recv()
	if err == nil && p.xid != binary.BigEndian.Uint32(msg) {
		err = fmt.Errorf("answer to call %#x", p.xid)
	}
	if err == nil {
		err = checkReply(msg, p)
	}
	if err != nil {
		fail(err)
	}
}

// renew gives a copy of the call a new XID, so that it is not a replay.
func renew(msg []byte) []byte {
	m := append([]byte(nil), msg...)
	if len(m) >= 4 {
		binary.BigEndian.PutUint32(m, xid())
	}
	return m
}

// seed returns the run's seed, which BATON_SEED repeats.
func seed(t testing.TB) uint64 {
	v := uint64(time.Now().UnixNano())
	if s := os.Getenv("BATON_SEED"); s != "" {
		var err error
		if v, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("BATON_SEED: %v", err)
		}
	}
	t.Logf("BATON_SEED=%d", v)
	return v
}

var badValues = []uint32{0, 1, 1 << 31, 1<<32 - 1}

// mutate runs every mutation of a set of calls.
func mutate(t testing.TB, a *attacker, fresh func() []*callMsg, rnd *rand.Rand, flips int) {
	defer a.close()
	each := func(f func(i int, msg []byte)) {
		for i, m := range fresh() {
			f(i, m.bytes())
		}
	}
	each(func(i int, msg []byte) { a.fire(msg, fmt.Sprintf("call %d as it is", i)) })
	each(func(i int, msg []byte) {
		for n := range msg {
			a.fire(renew(msg)[:n], fmt.Sprintf("call %d cut after %d bytes", i, n))
		}
	})
	each(func(i int, msg []byte) {
		for at := 0; at+4 <= len(msg); at += 4 {
			for _, v := range badValues {
				m := renew(msg)
				binary.BigEndian.PutUint32(m[at:], v)
				a.fire(m, fmt.Sprintf("call %d, word at %d = %#x", i, at, v))
			}
		}
	})
	each(func(i int, msg []byte) {
		for range flips {
			m := renew(msg)
			for range 1 + rnd.IntN(6) {
				// The XID stays, so that no call is taken for another's replay.
				m[4+rnd.IntN(len(m)-4)] ^= byte(1 << rnd.IntN(8))
			}
			a.fire(m, fmt.Sprintf("call %d with flipped bits", i))
		}
	})
}

func TestMalformedCalls(t *testing.T) {
	s := serve(t, options{toml: "[rpcbind]\nmode = \"own\"\nport = RPCBPORT\n"})
	w := newWitness(s)
	rnd := rand.New(rand.NewPCG(seed(t), 0))
	flips := 500
	if testing.Short() {
		flips = 5
	}
	worlds := 0
	nfsCalls := func() []*callMsg {
		worlds++
		c := s.client("/rw")
		defer c.c.Close()
		return newWorld(c, fmt.Sprintf("world%d", worlds)).calls()
	}
	for _, x := range []struct {
		name       string
		to         netip.AddrPort
		udp        bool
		prog, vers uint32
		calls      func() []*callMsg
	}{
		{"NFS over TCP", s.nfs, false, nfs3.Program, 3, nfsCalls},
		{"NFS over UDP", s.nfs, true, nfs3.Program, 3, nfsCalls},
		{"MOUNT over TCP", s.mount, false, mount3.Program, 3, mountCalls},
		{"MOUNT over UDP", s.mount, true, mount3.Program, 3, mountCalls},
		{"portmap over TCP", s.rpcb, false, rpcbind.Program, 2, portmapCalls},
		{"portmap over UDP", s.rpcb, true, rpcbind.Program, 2, portmapCalls},
	} {
		t.Run(x.name, func(t *testing.T) {
			if testing.Short() && x.udp && x.prog == nfs3.Program {
				t.Skip("SKIPPED, reason: -short; the TCP run has the same calls")
			}
			a := &attacker{t: t, to: x.to, udp: x.udp, prog: x.prog, vers: x.vers}
			mutate(t, a, x.calls, rnd, flips)
			t.Logf("%d messages", a.sent)
			w.check(func() { s.alive(badWords) })
		})
	}
	s.stop()
	s.fsck()
}

// TestStreams breaks the record marking, not the messages.
func TestStreams(t *testing.T) {
	s := serve(t, options{})
	w := newWitness(s)
	cl := s.client("/rw")
	world := newWorld(cl, "world")
	get := func() *callMsg { return nfsCall(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: world.file}) }
	mark := func(last bool, n uint32) []byte {
		if last {
			n |= 1 << 31
		}
		return binary.BigEndian.AppendUint32(nil, n)
	}
	raw := func(t *testing.T, b []byte) *conn {
		t.Helper()
		c := dial(t, s.nfs)
		if _, err := c.Write(b); err != nil {
			t.Logf("write ended early: %v", err) // the server may close in the middle
		}
		return c
	}
	answered := func(t *testing.T, c *conn, m *callMsg) {
		t.Helper()
		p, err := c.await(m.xid)
		if err == nil {
			err = checkReply(m.bytes(), p)
		}
		if err == nil && (p.denied || p.stat != 0) {
			err = fmt.Errorf("denied %v, stat %d", p.denied, p.stat)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	gone := func(t *testing.T, c *conn) {
		t.Helper()
		if err := c.closed(); err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			f(t)
			w.check(func() { s.alive(badWords) })
		})
	}
	run("fragments of one byte", func(t *testing.T) {
		m := get()
		var b []byte
		msg := m.bytes()
		for i := range msg {
			b = append(append(b, mark(i == len(msg)-1, 1)...), msg[i])
		}
		answered(t, raw(t, b), m)
	})
	run("empty fragments around a call", func(t *testing.T) {
		m := get()
		var b []byte
		for range 5 {
			b = append(b, mark(false, 0)...)
		}
		b = append(append(b, mark(false, uint32(len(m.bytes())))...), m.bytes()...)
		b = append(b, mark(true, 0)...)
		answered(t, raw(t, b), m)
	})
	run("bytes one by one", func(t *testing.T) {
		m := get()
		c := dial(t, s.nfs)
		for _, x := range record(m.bytes()) {
			if _, err := c.Write([]byte{x}); err != nil {
				t.Fatal(err)
			}
		}
		answered(t, c, m)
	})
	run("only empty fragments", func(t *testing.T) {
		gone(t, raw(t, bytes.Repeat(mark(false, 0), 100_000)))
	})
	run("too many fragments", func(t *testing.T) {
		gone(t, raw(t, bytes.Repeat(append(mark(false, 1), 0), 100_000)))
	})
	run("empty record", func(t *testing.T) { gone(t, raw(t, mark(true, 0))) })
	for _, n := range []uint32{1<<31 - 1, 1 << 30, 16 << 20, 1<<20 + 64<<10 + 1} {
		run(fmt.Sprintf("record of %d bytes announced", n), func(t *testing.T) {
			gone(t, raw(t, append(mark(true, n), get().bytes()...)))
		})
	}
	run("fragments add up beyond the limit", func(t *testing.T) {
		gone(t, raw(t, bytes.Repeat(append(mark(false, 64<<10), make([]byte, 64<<10)...), 40)))
	})
	run("largest record", func(t *testing.T) {
		m := nfsCall(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: world.file, Count: 1 << 20, Stable: wire.FileSync, Data: pattern(5, 1<<20)})
		answered(t, raw(t, record(m.bytes())), m)
		if got := cl.read(world.file, 1<<20-100, 100); !bytes.Equal(got, pattern(5, 1<<20)[1<<20-100:]) {
			t.Error("the last bytes of the largest WRITE are not there")
		}
	})
	run("arguments over the limit", func(t *testing.T) {
		m := get()
		m.args = append(m.args, make([]byte, 1<<20+8<<10)...)
		p, err := raw(t, record(m.bytes())).await(m.xid)
		if err != nil || p.denied || p.stat != 4 {
			t.Fatalf("reply %+v, %v; want GARBAGE_ARGS", p, err)
		}
	})
	run("cut streams", func(t *testing.T) {
		for i, m := range world.calls() {
			b := record(m.bytes())
			for n := i % 7; n < len(b); n += 7 {
				c := raw(t, b[:n])
				if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if p, err := c.recv(); err == nil || errors.Is(err, errHang) {
					t.Fatalf("call %d cut after %d of %d bytes: %+v, %v; want the connection closed", i, n, len(b), p, err)
				}
				c.Close()
			}
		}
	})
	run("half-closed after a call", func(t *testing.T) {
		m := get()
		c := raw(t, record(m.bytes()))
		if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		answered(t, c, m)
		gone(t, c)
	})
	run("another protocol", func(t *testing.T) {
		gone(t, raw(t, []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")))
		gone(t, raw(t, []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"+string(pattern(1, 500)))))
	})
	run("noise", func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(seed(t), 1))
		for range 50 {
			b := make([]byte, 2000)
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
			c := raw(t, b)
			c.Conn.(interface{ CloseWrite() error }).CloseWrite() // the server may have closed already
			gone(t, c)
		}
	})
	s.stop()
	s.fsck()
}

// TestHeaders names the right refusal for each wrong part of a call's header.
func TestHeaders(t *testing.T) {
	s := serve(t, options{})
	w := newWitness(s)
	fh := w.fh
	base := func() *callMsg { return nfsCall(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: fh}) }
	with := func(f func(*callMsg)) *callMsg { m := base(); f(m); return m }
	gids := func(n int) []uint32 { return make([]uint32, n) }
	bigName := func(n int) []byte {
		var b xdr.Writer
		b.Uint32(1)
		b.Opaque(make([]byte, n))
		for range 3 {
			b.Uint32(0)
		}
		return b.Buf
	}
	const ok, progUnavail, progMismatch, procUnavail, garbage = 0, 1, 2, 3, 4
	const badCred, rejectedCred, badVerf = 1, 2, 3
	for _, x := range []struct {
		name string
		m    *callMsg
		rpc  uint32 // RPC version, 0: 2
		deny bool
		stat uint32
		body []uint32
	}{
		{"valid", base(), 0, false, ok, nil},
		{"program 0", with(func(m *callMsg) { m.prog = 0 }), 0, false, progUnavail, nil},
		{"NFSACL", with(func(m *callMsg) { m.prog = 100227 }), 0, false, progUnavail, nil},
		{"NLM 2", with(func(m *callMsg) { m.prog, m.vers = nlm.Program, 2 }), 0, false, progMismatch, []uint32{1, 4}},
		{"NLM 5", with(func(m *callMsg) { m.prog, m.vers = nlm.Program, 5 }), 0, false, progMismatch, []uint32{1, 4}},
		{"NLM procedure 24", with(func(m *callMsg) { m.prog, m.vers, m.proc = nlm.Program, 4, 24 }), 0, false, procUnavail, nil},
		{"NLM TEST with GETATTR's arguments", with(func(m *callMsg) { m.prog, m.vers = nlm.Program, 4 }), 0, false, garbage, nil},
		{"NSM 2", with(func(m *callMsg) { m.prog, m.vers = nsm.Program, 2 }), 0, false, progMismatch, []uint32{1, 1}},
		{"NSM procedure 7", with(func(m *callMsg) { m.prog, m.vers, m.proc = nsm.Program, 1, 7 }), 0, false, procUnavail, nil},
		{"NFS 2", with(func(m *callMsg) { m.vers = 2 }), 0, false, progMismatch, []uint32{3, 3}},
		{"NFS 4", with(func(m *callMsg) { m.vers = 4 }), 0, false, progMismatch, []uint32{3, 3}},
		{"NFS 2^32-1", with(func(m *callMsg) { m.vers = 1<<32 - 1 }), 0, false, progMismatch, []uint32{3, 3}},
		{"procedure 22", with(func(m *callMsg) { m.proc = 22 }), 0, false, procUnavail, nil},
		{"procedure 2^32-1", with(func(m *callMsg) { m.proc = 1<<32 - 1 }), 0, false, procUnavail, nil},
		{"MOUNT 4", with(func(m *callMsg) { m.prog, m.vers = mount3.Program, 4 }), 0, false, progMismatch, []uint32{1, 3}},
		{"MOUNT procedure 6", with(func(m *callMsg) { m.prog, m.proc = mount3.Program, 6 }), 0, false, procUnavail, nil},
		{"RPC 1", base(), 1, true, 0, []uint32{2, 2}},
		{"RPC 3", base(), 3, true, 0, []uint32{2, 2}},
		{"no arguments", with(func(m *callMsg) { m.args = nil }), 0, false, garbage, nil},
		{"AUTH_NONE with a body", with(func(m *callMsg) { m.credFlavor = 0 }), 0, true, 1, []uint32{badCred}},
		{"AUTH_SHORT", with(func(m *callMsg) { m.credFlavor = 2 }), 0, true, 1, []uint32{rejectedCred}},
		{"RPCSEC_GSS", with(func(m *callMsg) { m.credFlavor = 6 }), 0, true, 1, []uint32{rejectedCred}},
		{"empty AUTH_SYS", with(func(m *callMsg) { m.cred = nil }), 0, true, 1, []uint32{badCred}},
		{"16 groups", with(func(m *callMsg) { m.cred = sys(0, 0, gids(16)...) }), 0, false, ok, nil},
		{"17 groups", with(func(m *callMsg) { m.cred = sys(0, 0, gids(17)...) }), 0, true, 1, []uint32{badCred}},
		{"group count 2^32-1", with(func(m *callMsg) { binary.BigEndian.PutUint32(m.cred[len(m.cred)-12:], 1<<32-1) }), 0, true, 1, []uint32{badCred}},
		{"bytes after the groups", with(func(m *callMsg) { m.cred = append(m.cred, 0, 0, 0, 0) }), 0, true, 1, []uint32{badCred}},
		{"machine name of 255 bytes", with(func(m *callMsg) { m.cred = bigName(255) }), 0, false, ok, nil},
		{"machine name of 256 bytes", with(func(m *callMsg) { m.cred = bigName(256) }), 0, true, 1, []uint32{badCred}},
		{"credential of 404 bytes", with(func(m *callMsg) { m.cred = make([]byte, 404) }), 0, true, 1, []uint32{badCred}},
		{"credential of 60 KB", with(func(m *callMsg) { m.cred = make([]byte, 60000) }), 0, true, 1, []uint32{badCred}},
		{"verifier with a body", with(func(m *callMsg) { m.verf = make([]byte, 8) }), 0, true, 1, []uint32{badVerf}},
		{"verifier of 60 KB", with(func(m *callMsg) { m.verf = make([]byte, 60000) }), 0, true, 1, []uint32{badVerf}},
		{"verifier of another flavor", with(func(m *callMsg) { m.verfFlavor = 1 }), 0, true, 1, []uint32{badVerf}},
	} {
		for _, udp := range []bool{false, true} {
			name := x.name + " over TCP"
			if udp {
				name = x.name + " over UDP"
			}
			t.Run(name, func(t *testing.T) {
				c := dial(t, s.nfs)
				if udp {
					c = dialUDP(t, s.nfs)
				}
				m := *x.m
				m.xid = xid()
				b := m.bytes()
				if x.rpc != 0 {
					binary.BigEndian.PutUint32(b[8:], x.rpc)
				}
				if err := c.send(b); err != nil {
					t.Fatal(err)
				}
				p, err := c.await(m.xid)
				if err != nil {
					t.Fatal(err)
				}
				var want xdr.Writer
				for _, v := range x.body {
					want.Uint32(v)
				}
				if p.denied != x.deny || p.stat != x.stat || x.stat != ok && !bytes.Equal(p.body, want.Buf) {
					t.Errorf("denied %v, stat %d, % x; want %v, %d, % x", p.denied, p.stat, p.body, x.deny, x.stat, want.Buf)
				}
				// The connection, or the socket, works on.
				if p, err := c.call(null(nfs3.Program, 3)); err != nil || p.denied || p.stat != 0 {
					t.Errorf("NULL after it: %+v, %v", p, err)
				}
			})
		}
	}
	t.Run("a huge credential length", func(t *testing.T) {
		for _, n := range badValues[2:] {
			m := base()
			b := m.bytes()
			binary.BigEndian.PutUint32(b[28:], n)
			c := dial(t, s.nfs)
			if err := c.send(b); err != nil {
				t.Fatal(err)
			}
			if p, err := c.await(m.xid); err != nil || !p.denied || p.stat != 1 {
				t.Errorf("length %#x: %+v, %v; want AUTH_ERROR", n, p, err)
			}
		}
	})
	t.Run("replies instead of calls", func(t *testing.T) {
		c := dial(t, s.nfs)
		for range 1000 {
			b := base().bytes()
			binary.BigEndian.PutUint32(b[4:], 1)
			if err := c.send(b); err != nil {
				t.Fatal(err)
			}
		}
		n := null(nfs3.Program, 3)
		if err := c.send(n.bytes()); err != nil {
			t.Fatal(err)
		}
		if p, err := c.recv(); err != nil || p.xid != n.xid {
			t.Errorf("%+v, %v; want only the answer to NULL", p, err)
		}
	})
	t.Run("more than a datagram", func(t *testing.T) {
		c := s.client("/rw")
		dir := c.mkdir(c.root, "many")
		for i := range 600 {
			c.create(dir, fmt.Sprintf("%0200d", i))
		}
		u := dialUDP(t, s.nfs)
		for _, m := range []*callMsg{
			nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: w.fh, Count: 1 << 20}),
			nfsCall(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: w.fh, Count: 1<<32 - 1}),
			nfsCall(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Count: 1 << 20}),
			nfsCall(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, DirCount: 1 << 20, MaxCount: 1 << 20}),
		} {
			p, err := u.call(m)
			if err == nil {
				err = checkReply(m.bytes(), p)
			}
			if err != nil || p.stat != 0 || len(p.body) < 16<<10 {
				t.Errorf("procedure %d over UDP: %v; want a part of the data", m.proc, err)
			}
		}
	})
	w.check(func() { s.alive(badWords) })
	s.stop()
	s.fsck()
}
