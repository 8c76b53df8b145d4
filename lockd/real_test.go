package lockd

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/nfsd"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// realBed is a lock service over the real table and the real export check, with
// stores in memory. It returns the handle of a file, too.
func realBed(t *testing.T) (*bed, []byte) {
	t.Helper()
	ctx := context.Background()
	clk := &clock.Strict{}
	e, err := local.OpenPebble("mdt", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	m, err := mdt.Open(mdt.Options{
		Engine: e, Clock: clk.Now, StripeCount: 1, StripeSize: 64 << 10,
		OSTs: func() []mdt.OSTState { return []mdt.OSTState{{Index: 0, Up: true, Free: 1 << 40}} },
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Begin(0)
	o, err := ost.Open(ost.Options{FS: objfs.NewMem(clk.Now), BootID: "boot", Clock: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	o.Begin(0)
	fs, err := client.New(client.Options{
		MDT: wire.InProc(m), OSTs: []wire.Conn{wire.InProc(o)}, ID: wire.ClientID{1}, Gen: 1, Clock: clk.Now,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fs.Close(ctx)
		m.Close()
		e.Close()
		o.Close()
	})
	codec := nfs3.NewCodec(bytes.Repeat([]byte{7}, 32))
	ns, err := nfsd.New(nfsd.Config{FS: fs, Codec: codec})
	if err != nil {
		t.Fatal(err)
	}
	tab, err := exports.Parse("exports", []byte("/data *(rw,no_root_squash)\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.SetExports(ctx, tab); err != nil {
		t.Fatal(err)
	}
	dir, err := fs.MkdirAll(ctx, "/data")
	if err != nil {
		t.Fatal(err)
	}
	req, rep := &wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagWaitCommit}, FID: dir, Name: []byte("f")}, new(wire.Reply)
	fs.Call(ctx, client.Owner{}, req, rep)
	if rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	var fh [nfs3.HandleSize]byte
	codec.Encode(nfs3.Handle{FSID: tab.Exports()[0].FSID, FID: rep.Attr.FID, Generation: rep.Attr.Generation}, &fh)

	b := &bed{t: t, peers: &peers{m: map[netip.Addr]*peer{}, asked: map[netip.Addr]int{}}}
	s, err := New(Config{Table: fs, Portmap: b.peers.port})
	if err != nil {
		t.Fatal(err)
	}
	const vip = 1
	svc := &wire.Request{Header: wire.Header{Op: wire.OpLockService, Flags: wire.FlagWaitCommit}, Lock: &wire.LockArgs{NSMState: 1}}
	rep.Reset()
	fs.Call(ctx, client.Owner{VIP: vip}, svc, rep)
	if rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	b.a = s.Address(netip.MustParseAddr("127.0.0.1"), vip, 0, ns.Address(vip, 0, [8]byte{}))
	b.rpc = sunrpc.NewServer(sunrpc.Config{Programs: b.a.Programs()})
	t.Cleanup(func() { b.rpc.Close() })
	any := netip.MustParseAddrPort("127.0.0.1:0")
	if b.tcp, err = b.rpc.ListenTCP(any, sunrpc.ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	if b.udp, err = b.rpc.ListenUDP(any, sunrpc.ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	b.a.Start()
	t.Cleanup(b.stop)
	return b, fh[:]
}

// TestRealTable passes a lock on through the real lock table.
func TestRealTable(t *testing.T) {
	for _, nw := range []string{"tcp", "udp"} {
		t.Run(nw, func(t *testing.T) {
			b, handle := realBed(t)
			fh := string(handle)
			h, w := b.peer(2, 4, nw), b.peer(3, 4, nw)
			want(t, "lock", h.lock(fh, 1, 0, 0, false), nlm.Granted)
			r := w.test(fh, 2, 5, 5)
			want(t, "test", r.Stat, nlm.Denied)
			if r.Holder.Svid != 1 || r.Holder.Offset != 0 || r.Holder.Len != 0 {
				t.Errorf("holder %+v", r.Holder)
			}
			want(t, "conflict", w.lock(fh, 2, 5, 5, false), nlm.Denied)
			want(t, "wait", w.lock(fh, 2, 5, 5, true), nlm.Blocked)
			want(t, "asked again", w.lock(fh, 2, 5, 5, true), nlm.Blocked)
			want(t, "unlock the middle", h.unlock(fh, 1, 5, 5), nlm.Granted)
			until(t, "accepted", func() bool { return b.a.Stats().CallbacksAccepted == 1 })
			want(t, "the waiter has it", h.test(fh, 1, 7, 1).Stat, nlm.Denied)
			want(t, "the rest is the holder's", w.test(fh, 2, 0, 1).Stat, nlm.Denied)
			// Two owners that would wait for each other.
			want(t, "wait", w.lock(fh, 2, 0, 1, true), nlm.Blocked)
			want(t, "deadlock", h.lock(fh, 1, 7, 1, true), nlm.Deadlck)
			want(t, "cancel", w.cancel(fh, 2, 0, 1), nlm.Granted)
			h.call(nlm.ProcFreeAll, &nlm.Notify{Name: []byte(fmt.Sprintf("host-%s", h.addr))}, nil)
			want(t, "free again", w.lock(fh, 3, 0, 5, false), nlm.Granted)
			if n := len(w.got()); n != 1 {
				t.Errorf("%d callbacks", n)
			}
		})
	}
}
