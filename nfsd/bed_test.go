package nfsd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// bed is a whole server on loopback over stores in memory.
type bed struct {
	t    *testing.T
	mdt  *mdt.MDT
	fs   *client.FS
	srv  *Server
	addr netip.AddrPort
	rpc  *sunrpc.Server
	a    *Address
	stop func()

	// during, if set, is called (a func(wire.Op)) after an OST has executed a
	// request and before its answer is given.
	during atomic.Value
	// asked counts the requests to OSTs.
	asked atomic.Int64

	// what survives a restart
	mem   vfs.FS
	disks []*objfs.Mem
	clk   *clock.Strict
	gen   uint64
}

const bedExports = `/data *(rw,insecure,no_root_squash,dir=/data)
/squash *(rw,insecure,anonuid=4000,anongid=4000)
/ro *(ro,insecure,no_root_squash,dir=/data)
/secure *(rw,no_root_squash)
`

func newBed(t *testing.T, stripes int) *bed {
	t.Helper()
	b := &bed{t: t, mem: vfs.NewMem(), clk: &clock.Strict{}}
	for range 2 {
		b.disks = append(b.disks, objfs.NewMem(b.clk.Now))
	}
	b.start(stripes)
	t.Cleanup(func() { b.stop() })
	return b
}

func (b *bed) start(stripes int) {
	t := b.t
	t.Helper()
	b.gen++
	e, err := local.OpenPebble("mdt", local.Options{FS: b.mem, MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	b.mdt, err = mdt.Open(mdt.Options{
		Engine: e, Clock: b.clk.Now, StripeCount: uint8(stripes), StripeSize: 64 << 10,
		OSTs: func() []mdt.OSTState {
			return []mdt.OSTState{{Index: 0, Up: true, Free: 1 << 40}, {Index: 1, Up: true, Free: 1 << 40}}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.mdt.Begin(0)
	var conns []wire.Conn
	var osts []*ost.Target
	for i, d := range b.disks {
		o, err := ost.Open(ost.Options{Index: uint16(i), FS: d, BootID: "boot", Clock: b.clk.Now})
		if err != nil {
			t.Fatal(err)
		}
		o.Begin(0)
		osts = append(osts, o)
		conns = append(conns, &hookConn{wire.InProc(o), b})
	}
	b.fs, err = client.New(client.Options{
		MDT: wire.InProc(b.mdt), OSTs: conns, ID: wire.ClientID{1}, Gen: b.gen, Clock: b.clk.Now,
		EpochIdle: 50 * time.Millisecond, Atime: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := b.fs.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	b.srv, err = New(Config{FS: b.fs, Codec: nfs3.NewCodec(bytes.Repeat([]byte{7}, 32))})
	if err != nil {
		t.Fatal(err)
	}
	tab, err := exports.Parse("exports", []byte(bedExports), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.srv.SetExports(ctx, tab); err != nil {
		t.Fatal(err)
	}
	b.a = b.srv.Address(0, 0, [8]byte{1, 2, 3})
	b.rpc = sunrpc.NewServer(sunrpc.Config{Programs: []sunrpc.Program{b.a.NFSProgram(), b.a.MountProgram()}, OnClose: b.srv.ConnClosed})
	b.addr, err = b.rpc.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), sunrpc.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	b.stop = func() {
		b.rpc.Close()
		b.fs.Close(ctx)
		b.mdt.Close()
		e.Close()
		for _, o := range osts {
			o.Close()
		}
	}
}

type hookConn struct {
	wire.Conn
	b *bed
}

func (h *hookConn) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	h.b.asked.Add(1)
	return h.Conn.TryHandle(req, rep)
}

func (h *hookConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	h.b.asked.Add(1)
	h.Conn.Handle(req, rep, done)
}

func (h *hookConn) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	h.b.asked.Add(1)
	op := req.Op
	err := h.Conn.Call(ctx, req, rep)
	if f, _ := h.b.during.Load().(func(wire.Op)); f != nil {
		f(op)
	}
	return err
}

// restart stops everything in an orderly way and starts it on the same stores.
func (b *bed) restart() {
	b.t.Helper()
	b.stop()
	b.start(1)
}

// caller is one identity on one connection.
type caller struct {
	t *testing.T
	c *sunrpc.Client
}

func (b *bed) dial(prog, vers uint32, cred sunrpc.Cred) *caller {
	b.t.Helper()
	c, err := sunrpc.Dial(context.Background(), "tcp", netip.AddrPort{}, b.addr, prog, vers, cred)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return &caller{b.t, c}
}

func user(uid, gid uint32, groups ...uint32) sunrpc.Cred {
	c := sunrpc.Cred{Flavor: sunrpc.AuthSys, UID: uid, GID: gid, NGIDs: uint8(len(groups))}
	copy(c.GIDs[:], groups)
	return c
}

func (b *bed) as(cred sunrpc.Cred) *caller { return b.dial(nfs3.Program, nfs3.Version, cred) }
func (b *bed) root() *caller               { return b.as(user(0, 0)) }

func (b *bed) mount(path string) []byte {
	b.t.Helper()
	fh, st := b.tryMount(path)
	if st != nfs.MountStatusOk {
		b.t.Fatalf("mount %s: status %d", path, st)
	}
	return fh
}

func (b *bed) tryMount(path string) ([]byte, nfs.MountStatus) {
	b.t.Helper()
	m := b.dial(mount3.Program, mount3.Version, user(0, 0))
	var w xdr.Writer
	mount3.EncodePath(&w, path)
	var res mount3.MntRes
	m.call(uint32(nfs.MountProcMount), w.Buf, &res)
	return append([]byte(nil), res.FH...), res.Status
}

type decoder interface{ Decode(*xdr.Reader) error }
type encoder interface{ Encode(*xdr.Writer) }

func (c *caller) call(proc uint32, args []byte, res decoder) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := c.c.Call(ctx, proc, args)
	if err != nil {
		c.t.Fatalf("procedure %d: %v", proc, err)
	}
	if err := res.Decode(xdr.NewReader(append([]byte(nil), out...))); err != nil {
		c.t.Fatalf("procedure %d: decode the result: %v (%x)", proc, err, out)
	}
}

func (c *caller) do(proc nfs.NFSProcedure, args encoder, res decoder) {
	c.t.Helper()
	var w xdr.Writer
	args.Encode(&w)
	c.call(uint32(proc), w.Buf, res)
}

func (c *caller) getattr(fh []byte) (nfs3.Fattr, nfs.NFSStatus) {
	c.t.Helper()
	var r nfs3.GetattrRes
	c.do(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: fh}, &r)
	return r.Attr, r.Status
}

func (c *caller) create(dir []byte, name string, how wire.CreateHow, mode uint32) nfs3.CreateRes {
	c.t.Helper()
	var r nfs3.CreateRes
	c.do(nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte(name), How: how, Attr: wire.SetAttr{Mask: wire.SetMode, Mode: mode}}, &r)
	return r
}

func (c *caller) mustCreate(dir []byte, name string) []byte {
	c.t.Helper()
	r := c.create(dir, name, wire.Guarded, 0o644)
	if r.Status != nfs.NFSStatusOk {
		c.t.Fatalf("create %s: %v", name, r.Status)
	}
	return r.FH
}

func (c *caller) mkdir(dir []byte, name string, mode uint32) nfs3.CreateRes {
	c.t.Helper()
	var r nfs3.CreateRes
	c.do(nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte(name), Attr: wire.SetAttr{Mask: wire.SetMode, Mode: mode}}, &r)
	return r
}

func (c *caller) lookup(dir []byte, name string) nfs3.LookupRes {
	c.t.Helper()
	var r nfs3.LookupRes
	c.do(nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &r)
	return r
}

func (c *caller) remove(dir []byte, name string) nfs.NFSStatus {
	c.t.Helper()
	var r nfs3.WccRes
	c.do(nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &r)
	return r.Status
}

func (c *caller) write(fh []byte, off uint64, data string, how wire.StableHow) nfs3.WriteRes {
	c.t.Helper()
	var r nfs3.WriteRes
	c.do(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: fh, Offset: off, Count: uint32(len(data)), Stable: how, Data: []byte(data)}, &r)
	return r
}

func (c *caller) read(fh []byte, off uint64, n uint32) nfs3.ReadRes {
	c.t.Helper()
	var r nfs3.ReadRes
	c.do(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: fh, Offset: off, Count: n}, &r)
	return r
}

func (c *caller) setattr(fh []byte, sa wire.SetAttr) nfs3.WccRes {
	c.t.Helper()
	var r nfs3.WccRes
	c.do(nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: fh, Attr: sa}, &r)
	return r
}

// rawConn speaks RPC with chosen XIDs.
type rawConn struct {
	t *testing.T
	net.Conn
}

func (b *bed) raw(local string) *rawConn {
	b.t.Helper()
	d := net.Dialer{}
	if local != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local))
	}
	c, err := d.Dial("tcp", b.addr.String())
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return &rawConn{b.t, c}
}

func (c *rawConn) send(xid, stamp uint32, proc nfs.NFSProcedure, args encoder) {
	c.t.Helper()
	var w xdr.Writer
	w.Uint32(0) // record mark
	for _, v := range []uint32{xid, 0, 2, nfs3.Program, nfs3.Version, uint32(proc), sunrpc.AuthSys, 20, stamp, 0, 0, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	args.Encode(&w)
	binary.BigEndian.PutUint32(w.Buf, 1<<31|uint32(len(w.Buf)-4))
	if _, err := c.Write(w.Buf); err != nil {
		c.t.Fatal(err)
	}
}

// recv reads one reply and decodes its result into res.
func (c *rawConn) recv(xid uint32, res decoder) {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	var h [4]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		c.t.Fatalf("no reply: %v", err)
	}
	b := make([]byte, binary.BigEndian.Uint32(h[:])&^(1<<31))
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatal(err)
	}
	r := xdr.NewReader(b)
	if got := r.Uint32(); got != xid {
		c.t.Fatalf("reply to xid %d, want %d", got, xid)
	}
	r.Skip(20)
	if err := res.Decode(r); err != nil {
		c.t.Fatal(err)
	}
}
