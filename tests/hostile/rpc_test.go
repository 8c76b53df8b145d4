package hostile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

var nextXID atomic.Uint32

func init() { nextXID.Store(0x10000000) }

func xid() uint32 { return nextXID.Add(1) }

// callMsg is an RPC call message without record mark (RFC 5531 section 9).
type callMsg struct {
	xid              uint32
	prog, vers, proc uint32
	credFlavor       uint32
	cred             []byte
	verfFlavor       uint32
	verf             []byte
	args             []byte
}

// sys is an AUTH_SYS body.
func sys(uid, gid uint32, gids ...uint32) []byte {
	var w xdr.Writer
	w.Uint32(0x7a57)
	w.String("hostile")
	w.Uint32(uid)
	w.Uint32(gid)
	w.Uint32(uint32(len(gids)))
	for _, g := range gids {
		w.Uint32(g)
	}
	return w.Buf
}

func (m *callMsg) bytes() []byte {
	var w xdr.Writer
	for _, v := range []uint32{m.xid, 0, 2, m.prog, m.vers, m.proc} {
		w.Uint32(v)
	}
	w.Uint32(m.credFlavor)
	w.Opaque(m.cred)
	w.Uint32(m.verfFlavor)
	w.Opaque(m.verf)
	w.FixedOpaque(m.args)
	return w.Buf
}

func nfsCall(proc nfs.NFSProcedure, args interface{ Encode(*xdr.Writer) }) *callMsg {
	m := &callMsg{xid: xid(), prog: nfs3.Program, vers: nfs3.Version, proc: uint32(proc), credFlavor: 1, cred: sys(0, 0, 4, 5)}
	if args != nil {
		var w xdr.Writer
		args.Encode(&w)
		m.args = w.Buf
	}
	return m
}

// record puts a record mark in front of a message.
func record(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, 1<<31|uint32(len(msg))), msg...)
}

// reply is a reply message.
type reply struct {
	xid    uint32
	denied bool
	stat   uint32 // accept_stat, or reject_stat when denied
	body   []byte // what follows stat
	raw    []byte
}

func parseReply(b []byte) (*reply, error) {
	r := xdr.NewReader(b)
	p := &reply{xid: r.Uint32(), raw: b}
	if mt := r.Uint32(); r.Err() == nil && mt != 1 {
		return nil, fmt.Errorf("message type %d in a reply", mt)
	}
	switch v := r.Uint32(); {
	case r.Err() != nil:
		return nil, fmt.Errorf("reply of %d bytes", len(b))
	case v == 0:
		if fl, verf := r.Uint32(), r.Opaque(400); fl != 0 || len(verf) != 0 {
			return nil, fmt.Errorf("verifier of flavor %d, %d bytes", fl, len(verf))
		}
	case v == 1:
		p.denied = true
	default:
		return nil, fmt.Errorf("reply_stat %d", v)
	}
	p.stat = r.Uint32()
	if r.Err() != nil {
		return nil, fmt.Errorf("truncated reply: % x", b)
	}
	p.body = r.Rest()
	if !p.denied && p.stat > 5 || p.denied && p.stat > 1 {
		return nil, fmt.Errorf("accept_stat or reject_stat %d", p.stat)
	}
	return p, nil
}

// conn is a raw connection to a server.
type conn struct {
	net.Conn
	udp bool
	buf []byte
}

func dial(t testing.TB, to netip.AddrPort) *conn {
	t.Helper()
	c, err := tryDial("tcp", netip.AddrPort{}, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func dialUDP(t testing.TB, to netip.AddrPort) *conn {
	t.Helper()
	c, err := tryDial("udp", netip.AddrPort{}, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func tryDial(network string, from, to netip.AddrPort) (*conn, error) {
	d := net.Dialer{Timeout: patience}
	if from.IsValid() {
		if network == "tcp" {
			d.LocalAddr = net.TCPAddrFromAddrPort(from)
		} else {
			d.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
	}
	c, err := d.Dial(network, to.String())
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		c.Close()
		return nil, err
	}
	return &conn{Conn: c, udp: network == "udp"}, nil
}

// send sends one whole message.
func (c *conn) send(msg []byte) error {
	c.SetDeadline(time.Now().Add(patience))
	if !c.udp {
		msg = record(msg)
	}
	_, err := c.Write(msg)
	return err
}

var errHang = errors.New("no answer: the server hangs")

// recv reads the next reply. io.EOF, or another error that is not errHang,
// means that the server has closed the connection.
func (c *conn) recv() (*reply, error) {
	var b []byte
	var err error
	if c.udp {
		if c.buf == nil {
			c.buf = make([]byte, 64<<10)
		}
		var n int
		n, err = c.Read(c.buf)
		b = append([]byte(nil), c.buf[:n]...)
	} else {
		for last := false; !last && err == nil; {
			var mark [4]byte
			if _, err = io.ReadFull(c, mark[:]); err != nil {
				break
			}
			v := binary.BigEndian.Uint32(mark[:])
			last = v>>31 != 0
			if v &= 1<<31 - 1; v > 2<<20 {
				return nil, fmt.Errorf("reply fragment of %d bytes", v)
			}
			at := len(b)
			b = append(b, make([]byte, v)...)
			_, err = io.ReadFull(c, b[at:])
		}
	}
	if err != nil {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			return nil, errHang
		}
		return nil, err
	}
	return parseReply(b)
}

// call sends m and returns its reply, skipping those of other calls.
func (c *conn) call(m *callMsg) (*reply, error) {
	if err := c.send(m.bytes()); err != nil {
		return nil, err
	}
	return c.await(m.xid)
}

func (c *conn) await(xid uint32) (*reply, error) {
	for {
		p, err := c.recv()
		if err != nil || p.xid == xid {
			return p, err
		}
	}
}

// closed reads until the server closes the connection.
func (c *conn) closed() error {
	for {
		_, err := c.recv()
		if errors.Is(err, errHang) {
			return err
		}
		if err != nil {
			return nil
		}
	}
}

func null(prog, vers uint32) *callMsg { return &callMsg{xid: xid(), prog: prog, vers: vers} }

// ping makes a NULL call on a connection of its own.
func ping(to netip.AddrPort) error {
	c, err := tryDial("tcp", netip.AddrPort{}, to)
	if err != nil {
		return err
	}
	defer c.Close()
	p, err := c.call(null(nfs3.Program, nfs3.Version))
	if err == nil && (p.denied || p.stat != 0) {
		err = fmt.Errorf("NULL: stat %d", p.stat)
	}
	return err
}

// decoder is a result of nfs3.
type decoder interface{ Decode(*xdr.Reader) error }

// client is a well-behaved client over one connection, one call at a time.
type client struct {
	t    testing.TB
	c    *conn
	root []byte
	cred []byte
}

// client mounts path.
func (s *server) client(path string) *client { return s.clientFrom(s.t, netip.Addr{}, path) }

func (s *server) clientFrom(t testing.TB, from netip.Addr, path string) *client {
	t.Helper()
	var local netip.AddrPort
	if from.IsValid() {
		local = netip.AddrPortFrom(from, 0)
	}
	m, err := tryDial("tcp", local, s.mount)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	p, err := m.call(mntCall(path))
	if err != nil || p.denied || p.stat != 0 {
		t.Fatalf("MNT %s: %+v, %v\n%s", path, p, err, s.log())
	}
	var res mount3.MntRes
	if err := res.Decode(xdr.NewReader(p.body)); err != nil || res.Status != nfs.MountStatusOk {
		t.Fatalf("MNT %s: status %v, %v", path, res.Status, err)
	}
	c, err := tryDial("tcp", local, s.nfs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &client{t: t, c: c, root: append([]byte(nil), res.FH...), cred: sys(0, 0)}
}

func mntCall(path string) *callMsg {
	m := &callMsg{xid: xid(), prog: mount3.Program, vers: mount3.Version, proc: uint32(nfs.MountProcMount)}
	var w xdr.Writer
	mount3.EncodePath(&w, path)
	m.args = w.Buf
	return m
}

// do makes a call and decodes its result; anything but an accepted call with a
// well-formed result is an error.
func (c *client) do(proc nfs.NFSProcedure, args interface{ Encode(*xdr.Writer) }, res decoder) error {
	m := nfsCall(proc, args)
	m.cred = c.cred
	return c.doMsg(m, res)
}

func (c *client) doMsg(m *callMsg, res decoder) error {
	p, err := c.c.call(m)
	if err != nil {
		return fmt.Errorf("procedure %d: %w", m.proc, err)
	}
	return decodeRes(p, res)
}

func decodeRes(p *reply, res decoder) error {
	if p.denied || p.stat != 0 {
		return fmt.Errorf("call not executed: denied %v, stat %d, body % x", p.denied, p.stat, p.body)
	}
	r := xdr.NewReader(p.body)
	if err := res.Decode(r); err != nil {
		return fmt.Errorf("result: %w: % x", err, p.body[:min(len(p.body), 200)])
	}
	if r.Len() != 0 {
		return fmt.Errorf("%d bytes after the result", r.Len())
	}
	return nil
}

func (c *client) must(err error, st nfs.NFSStatus) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
	if st != nfs.NFSStatusOk {
		c.t.Fatalf("status %d (%v)", uint32(st), st)
	}
}

func (c *client) getattr(fh []byte) nfs3.GetattrRes {
	c.t.Helper()
	var r nfs3.GetattrRes
	if err := c.do(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: fh}, &r); err != nil {
		c.t.Fatal(err)
	}
	return r
}

func (c *client) lookup(dir []byte, name string) nfs3.LookupRes {
	c.t.Helper()
	var r nfs3.LookupRes
	if err := c.do(nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &r); err != nil {
		c.t.Fatal(err)
	}
	return r
}

func (c *client) exists(dir []byte, name string) bool {
	c.t.Helper()
	r := c.lookup(dir, name)
	if r.Status != nfs.NFSStatusOk && r.Status != nfs.NFSStatusNoEnt {
		c.t.Fatalf("LOOKUP %s: %v", name, r.Status)
	}
	return r.Status == nfs.NFSStatusOk
}

func mode(m uint32) wire.SetAttr { return wire.SetAttr{Mask: wire.SetMode, Mode: m} }

func (c *client) tryMkdir(dir []byte, name string) (nfs3.CreateRes, error) {
	var r nfs3.CreateRes
	err := c.do(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte(name), Attr: mode(0o755)}, &r)
	return r, err
}

func (c *client) mkdir(dir []byte, name string) []byte {
	c.t.Helper()
	r, err := c.tryMkdir(dir, name)
	c.must(err, r.Status)
	return r.FH
}

func (c *client) tryCreate(dir []byte, name string) (nfs3.CreateRes, error) {
	var r nfs3.CreateRes
	err := c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte(name), How: wire.Guarded, Attr: mode(0o644)}, &r)
	return r, err
}

func (c *client) create(dir []byte, name string) []byte {
	c.t.Helper()
	r, err := c.tryCreate(dir, name)
	c.must(err, r.Status)
	return r.FH
}

func (c *client) tryWrite(fh []byte, off uint64, data []byte, how wire.StableHow) (nfs3.WriteRes, error) {
	var r nfs3.WriteRes
	err := c.do(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: fh, Offset: off, Count: uint32(len(data)), Stable: how, Data: data}, &r)
	return r, err
}

func (c *client) write(fh []byte, off uint64, data []byte) {
	c.t.Helper()
	r, err := c.tryWrite(fh, off, data, wire.FileSync)
	c.must(err, r.Status)
	if r.Count != uint32(len(data)) {
		c.t.Fatalf("WRITE took %d of %d bytes", r.Count, len(data))
	}
}

func (c *client) commit(fh []byte) (nfs3.CommitRes, error) {
	var r nfs3.CommitRes
	err := c.do(nfs.NFSProcedureCommit, &nfs3.CommitArgs{FH: fh}, &r)
	return r, err
}

func (c *client) tryRead(fh []byte, off uint64, n uint32) (nfs3.ReadRes, error) {
	var r nfs3.ReadRes
	err := c.do(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: fh, Offset: off, Count: n}, &r)
	return r, err
}

func (c *client) read(fh []byte, off uint64, n uint32) []byte {
	c.t.Helper()
	r, err := c.tryRead(fh, off, n)
	c.must(err, r.Status)
	return append([]byte(nil), r.Data...)
}

func (c *client) remove(dir []byte, name string) nfs.NFSStatus {
	c.t.Helper()
	var r nfs3.WccRes
	if err := c.do(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &r); err != nil {
		c.t.Fatal(err)
	}
	return r.Status
}

// pattern is n bytes that depend on seed and position.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed)*2654435761 + 12345
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}
