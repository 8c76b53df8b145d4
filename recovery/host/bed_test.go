package host_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

var ctx = context.Background()

// patience is what nothing may take: only a hang exceeds it.
const patience = 60 * time.Second

// bed is an MDT and OSTs over stores in memory, served to frontends by TCP.
type bed struct {
	t     *testing.T
	mem   vfs.FS
	disks []*objfs.Mem
	clk   clock.Strict
	srv   *tcp.Server
	addr  string
	// stripes is how many OSTs a file is on.
	stripes uint8

	mdt  *host.MDT
	osts []*host.OST
	gate gate
}

// stripe is the size of stripes in bytes.
const stripe = 64 << 10

const mdtName = "MDT0000"

func ostName(i int) string { return fmt.Sprintf("OST%04x", i) }

func newBed(t *testing.T, osts int) *bed { return newStripedBed(t, osts, 1) }

func newStripedBed(t *testing.T, osts int, stripes uint8) *bed {
	b := &bed{t: t, mem: vfs.NewMem(), stripes: stripes, osts: make([]*host.OST, osts)}
	b.gate.hold = map[string]chan struct{}{}
	for range osts {
		b.disks = append(b.disks, objfs.NewMem(b.clk.Now))
	}
	var err error
	if b.srv, err = tcp.NewServer(nil, tcp.ServerOptions{Node: "targets", Insecure: true}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	served := make(chan error)
	go func() { served <- b.srv.Serve(l) }()
	b.startMDT()
	for i := range osts {
		b.startOST(i)
	}
	b.untilAllThere()
	t.Cleanup(func() {
		for i := range b.osts {
			b.stopOST(i)
		}
		b.stopMDT()
		if err := errors.Join(b.srv.Close(ctx), <-served); err != nil {
			t.Error(err)
		}
	})
	return b
}

var (
	imports = imp.Config{BackoffMin: 10 * time.Millisecond, BackoffMax: 50 * time.Millisecond, RetryDelay: 20 * time.Millisecond, PingInterval: 200 * time.Millisecond}
	windows = recov.Config{SoftMin: 5 * time.Second, SoftMax: 5 * time.Second, Hard: 20 * time.Second}
)

// reach is the way to a target for a client on the given node.
func (b *bed) reach(node, name string) client.Target {
	return client.Target{Name: name, Addrs: []string{b.addr}, Dial: func(ctx context.Context, addr string) (wire.Conn, error) {
		return tcp.DialBundle(ctx, tcp.BundleOptions{Bulk: name != mdtName, DialOptions: tcp.DialOptions{
			Addrs: []tcp.Endpoint{{Addr: addr}}, Target: name, Node: node, Insecure: true,
		}})
	}}
}

func (b *bed) reachOSTs(node string) (l []client.Target) {
	for i := range b.osts {
		l = append(l, b.reach(node, ostName(i)))
	}
	return l
}

func (b *bed) startMDT() {
	b.t.Helper()
	m, err := host.StartMDT(ctx, host.MDTOptions{
		Name: mdtName, Dir: "mdt", Engine: local.Options{FS: b.mem, MinFreeBytes: -1}, MDT: mdt.Options{StripeCount: b.stripes, StripeSize: stripe},
		Recovery: windows, OSTs: b.reachOSTs("targets"), Import: imports, Clock: b.clk.Now,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.mdt = m
	if err := b.srv.SetTarget(mdtName, b.gate.of(mdtName, m.Front())); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) stopMDT() {
	b.t.Helper()
	if b.mdt == nil {
		return
	}
	if err := errors.Join(b.mdt.Stop(ctx), b.srv.StopTarget(ctx, mdtName)); err != nil {
		b.t.Error(err)
	}
	b.mdt = nil
}

func (b *bed) startOST(i int) {
	b.t.Helper()
	o, err := host.StartOST(ctx, host.OSTOptions{
		Name: ostName(i), OST: ost.Options{Index: uint16(i), FS: b.disks[i], BootID: "boot", Clock: b.clk.Now},
		Recovery: windows, MDT: b.reach("targets", mdtName),
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.osts[i] = o
	if err := b.srv.SetTarget(ostName(i), b.gate.of(ostName(i), o.Front())); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) stopOST(i int) {
	b.t.Helper()
	if b.osts[i] == nil {
		return
	}
	if err := errors.Join(b.osts[i].Stop(ctx), b.srv.StopTarget(ctx, ostName(i))); err != nil {
		b.t.Error(err)
	}
	b.osts[i] = nil
}

// gate can keep the requests of clients from a target, as a node does that hangs.
type gate struct {
	mu   sync.Mutex
	hold map[string]chan struct{}
}

// shut keeps all writes from a target until the function returned is called.
func (g *gate) shut(name string) (open func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	ch := make(chan struct{})
	g.hold[name] = ch
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.hold, name)
		close(ch)
	}
}

func (g *gate) of(name string, a wire.Acceptor) wire.Target { return &gated{g, name, a} }

type gated struct {
	g    *gate
	name string
	a    wire.Acceptor
}

func (x *gated) Accept(p wire.Peer) wire.Target { return &gatedConn{x.a.Accept(p), x} }

func (x *gated) Handle(*wire.Request, *wire.Reply, func()) { panic("not accepted") }
func (x *gated) TryHandle(*wire.Request, *wire.Reply) bool { return false }

type gatedConn struct {
	wire.Target
	x *gated
}

func (c *gatedConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	c.x.g.mu.Lock()
	ch := c.x.g.hold[c.x.name]
	c.x.g.mu.Unlock()
	if ch == nil || req.Op != wire.OpWrite {
		c.Target.Handle(req, rep, done)
		return
	}
	go func() {
		<-ch
		c.Target.Handle(req, rep, done)
	}()
}

func (c *gatedConn) Close() error { return c.Target.(interface{ Close() error }).Close() }

// frontend connects a client; change may be nil.
func (b *bed) frontend(node string, change func(*client.Options)) *client.FS {
	b.t.Helper()
	o := client.Options{ID: host.AgentID(node), Gen: 1, Clock: b.clk.Now, EpochIdle: 50 * time.Millisecond}
	if change != nil {
		change(&o)
	}
	fs, err := client.NewRemote(o, client.Remote{MDT: b.reach(node, mdtName), OSTs: b.reachOSTs(node), Import: imports})
	if err != nil {
		b.t.Fatal(err)
	}
	c, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := fs.Connect(c); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = fs.Abandon() })
	return fs
}

func (b *bed) create(fs *client.FS, name string) wire.Attr {
	b.t.Helper()
	req := wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagWaitCommit | wire.FlagOpenEpoch},
		Key: key(), FID: wire.RootFID, Name: []byte(name), How: wire.Guarded}
	var rep wire.Reply
	if fs.Call(ctx, client.Owner{}, &req, &rep); rep.Status != wire.OK {
		b.t.Fatalf("create %s: %v", name, rep.Status)
	}
	fs.Created(rep.Attr.FID, rep.Transno)
	return rep.Attr
}

var keys uint32

// key is that of a new NFS call.
func key() wire.ReplyKey {
	keys++
	return wire.ReplyKey{Addr: [16]byte{1}, Port: 7, XID: keys, Proc: 3<<8 | 1, Sum: uint64(keys)}
}

// createOn makes a file whose data are on the given OST.
func (b *bed) createOn(fs *client.FS, name string, i int) wire.Attr {
	b.t.Helper()
	for n := 0; n < 100; n++ {
		if a := b.create(fs, fmt.Sprint(name, n)); int(a.Layout.OST[0]) == i {
			return a
		}
	}
	b.t.Fatalf("no file came to OST %d", i)
	return wire.Attr{}
}

func (b *bed) write(fs *client.FS, a wire.Attr, data string, how wire.StableHow) wire.Status {
	_, st := fs.Write(ctx, client.Owner{}, &a, 0, []byte(data), how)
	return st
}

func (b *bed) read(fs *client.FS, fid wire.FID) string {
	b.t.Helper()
	a := b.attr(fs, fid)
	buf := make([]byte, a.Size)
	n, _, st, _ := fs.Read(ctx, client.Owner{}, &a, 0, buf, true)
	if st != wire.OK {
		b.t.Fatal("read:", st)
	}
	return string(buf[:n])
}

func (b *bed) attr(fs *client.FS, fid wire.FID) wire.Attr {
	b.t.Helper()
	var a wire.Attr
	if st, _ := fs.Attr(ctx, client.Owner{}, fid, &a, true); st != wire.OK {
		b.t.Fatal("attr:", st)
	}
	return a
}

// untilAllThere waits until the MDT makes files on all OSTs.
func (b *bed) untilAllThere() {
	b.t.Helper()
	b.until("the MDT has asked all OSTs", func() bool {
		for _, s := range b.mdt.OSTs() {
			if !s.Up || s.Free == 0 {
				return false
			}
		}
		return true
	})
}

func (b *bed) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// evict evicts a frontend, and waits until the MDT has done it.
func (b *bed) evict(name string) {
	b.t.Helper()
	id := host.AgentID(name)
	if !b.mdt.Front().Evict(id) {
		b.t.Fatal(name, "is not known")
	}
	b.until("the client is gone", func() bool { _, ok := b.mdt.Body().Clients()[id]; return !ok })
}
