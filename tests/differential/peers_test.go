// Package differential gives the same operations to baton's NFS server and to
// go-nfs over billyfs and compares what they answer and what is there in the
// end. Both stand on real targets, but reach them on different ways.
//
// go-nfs is an independent server of the same protocol, but not in every point
// a right one. What it gets wrong is left out, by not asking or not comparing:
//
//   - statuses of failures: it often answers ACCES or IO for everything. Only
//     those in exactStatus are compared, of others that both fail.
//   - CREATE UNCHECKED of an existing file: truncates it and applies all
//     attributes; the others apply the size only. Asked with size 0 alone.
//   - CREATE EXCLUSIVE: not implemented. LINK: takes the wrong arguments.
//   - MKNOD of character devices: answers OK and makes nothing.
//   - WRITE: claims FILE_SYNC, so committed is not compared. COMMIT: does
//     nothing, so only its status is.
//   - REMOVE removes directories, RMDIR files. Asked for the right type only.
//   - file handles are paths: they become stale when the object or a directory
//     above is renamed. Every operation looks its object up afresh.
//   - SETATTR, READ and WRITE on handles of symbolic links act on what the link
//     names, and CREATE follows links. Not asked.
//   - READ of a directory answers OK if the directory's size is 0. Not asked.
//   - attributes: modes carry Go's type bits and no setuid, setgid, sticky (the
//     low nine bits are compared); atime and ctime are the mtime; used is the
//     size. SETATTR does not set modes above 0777.
//   - ACCESS grants everything; FSSTAT, FSINFO and PATHCONF are made up. wcc_data
//     is not atomic. Names "." and ".." are taken literally and act on
//     directories. Cookies are list positions, so a directory is read at once.
package differential

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd"
	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/baton-nfs/baton/nfsd/billyfs/billytest"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
)

// peer is one of the servers.
type peer struct {
	t    testing.TB
	name string
	addr netip.AddrPort
	// fs looks at the file system without the server.
	fs   *billyfs.FS
	rpc  *sunrpc.Client
	root []byte
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var striped = billytest.Options{OSTs: 2, StripeCount: 2, StripeSize: 64 << 10}

// go-nfs logs every refusal.
func init() { nfs.Log.SetLevel(nfs.PanicLevel) }

// goNFS starts go-nfs over billyfs at a loopback address.
func goNFS(t testing.TB, host string) *peer {
	t.Helper()
	f, err := billyfs.New(billytest.Open(t, striped), billyfs.Options{})
	ok(t, err)
	l, err := net.Listen("tcp", host+":0")
	ok(t, err)
	h := helpers.NewCachingHandler(helpers.NewNullAuthHandler(f), 1<<16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = nfs.Serve(l, h) // ends when the listener is closed
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return (&peer{t: t, name: "go-nfs", addr: l.Addr().(*net.TCPAddr).AddrPort(), fs: f}).dial()
}

// baton starts baton's server at a loopback address.
func baton(t testing.TB, host string) *peer {
	t.Helper()
	c := billytest.Open(t, striped)
	f, err := billyfs.New(c, billyfs.Options{})
	ok(t, err)
	srv, err := nfsd.New(nfsd.Config{FS: c, Codec: nfs3.NewCodec(bytes.Repeat([]byte{7}, 32))})
	ok(t, err)
	tab, err := exports.Parse("exports", []byte("/ *(rw,insecure,no_root_squash)\n"), nil)
	ok(t, err)
	ok(t, srv.SetExports(context.Background(), tab))
	a := srv.Address(0, 0, [8]byte{1})
	r := sunrpc.NewServer(sunrpc.Config{Programs: []sunrpc.Program{a.NFSProgram(), a.MountProgram()}, OnClose: srv.ConnClosed})
	t.Cleanup(func() { r.Close() })
	addr, err := r.ListenTCP(netip.AddrPortFrom(netip.MustParseAddr(host), 0), sunrpc.ListenOptions{})
	ok(t, err)
	return (&peer{t: t, name: "baton", addr: addr, fs: f}).dial()
}

var rootCred = sunrpc.Cred{Flavor: sunrpc.AuthSys}

func (p *peer) dial() *peer {
	p.t.Helper()
	m, err := sunrpc.Dial(context.Background(), "tcp", netip.AddrPort{}, p.addr, mount3.Program, mount3.Version, rootCred)
	ok(p.t, err)
	var w xdr.Writer
	mount3.EncodePath(&w, "/")
	out, err := m.Call(context.Background(), uint32(nfs.MountProcMount), w.Buf)
	ok(p.t, err)
	var res mount3.MntRes
	r := xdr.NewReader(out)
	if err := res.Decode(r); err != nil || res.Status != nfs.MountStatusOk {
		p.t.Fatalf("%s: mount: status %d, %v", p.name, res.Status, err)
	}
	p.root = bytes.Clone(res.FH)
	ok(p.t, m.Close())
	p.rpc, err = sunrpc.Dial(context.Background(), "tcp", netip.AddrPort{}, p.addr, nfs3.Program, nfs3.Version, rootCred)
	ok(p.t, err)
	p.t.Cleanup(func() { p.rpc.Close() })
	return p
}

// call makes one NFS call and decodes its result.
func (p *peer) call(proc nfs.NFSProcedure, args interface{ Encode(*xdr.Writer) }, res interface{ Decode(*xdr.Reader) error }) {
	p.t.Helper()
	var w xdr.Writer
	args.Encode(&w)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := p.rpc.Call(ctx, uint32(proc), w.Buf)
	if err != nil {
		p.t.Fatalf("%s: %v: %v", p.name, proc, err)
	}
	r := xdr.NewReader(out)
	if err := res.Decode(r); err != nil {
		p.t.Fatalf("%s: %v: %v (%x)", p.name, proc, err, out)
	}
}

// walk looks a path up from the root.
func (p *peer) walk(path []string) (fh []byte, st nfs.NFSStatus) {
	p.t.Helper()
	fh = p.root
	for _, n := range path {
		var res nfs3.LookupRes
		p.call(nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: fh, Name: []byte(n)}, &res)
		if res.Status != nfs.NFSStatusOk {
			return nil, res.Status
		}
		fh = res.FH
	}
	return fh, nfs.NFSStatusOk
}

// attr is what of fattr3 is compared.
func attr(a *nfs3.Fattr) string {
	s := fmt.Sprintf("type %d mode %03o nlink %d owner %d:%d", a.Type, a.Mode&0o777, a.Nlink, a.UID, a.GID)
	switch a.Type {
	case 1, 5:
		s += fmt.Sprintf(" size %d", a.Size)
	case 3, 4:
		s += fmt.Sprintf(" dev %d,%d", a.RdevMajor, a.RdevMinor)
	}
	return s
}

func (p *peer) getattr(fh []byte) (string, *nfs3.Fattr) {
	p.t.Helper()
	var res nfs3.GetattrRes
	p.call(nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: fh}, &res)
	if res.Status != nfs.NFSStatusOk {
		return fmt.Sprintf("getattr status %v", res.Status), nil
	}
	return attr(&res.Attr), &res.Attr
}
