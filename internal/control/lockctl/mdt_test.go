package lockctl

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestRealTarget does on a metadata target what the other tests do on a fake.
func TestRealTarget(t *testing.T) {
	var clk clock.Strict
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	e, err := local.OpenPebble("mdt", local.Options{FS: vfs.NewMem(), MemTableBytes: 1 << 20, CacheBytes: 1 << 20, MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	m, err := mdt.Open(mdt.Options{Engine: e, Clock: clk.Now, Logger: quiet, StripeSize: 64 << 10,
		OSTs: func() []mdt.OSTState { return []mdt.OSTState{{Index: 0, Up: true, Free: 1 << 30}} }})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.Begin(0)
	o, err := ost.Open(ost.Options{FS: objfs.NewMem(clk.Now), BootID: "b", Clock: clk.Now, Logger: quiet, CommitInterval: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	o.Begin(0)
	fs, err := client.New(client.Options{MDT: wire.InProc(m), OSTs: []wire.Conn{wire.InProc(o)}, ID: wire.ClientID{1}, Gen: 1, Clock: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	defer fs.Close(ctx)

	vips := []mgs.VIP{{Index: 1, Addr: netip.MustParseAddr("192.0.2.10"), Epoch: 3, NSMState: 5}, {Index: 2, Addr: netip.MustParseAddr("192.0.2.11"), Epoch: 1, NSMState: 1}}
	do := func(v mgs.VIP, req wire.Request, want wire.Status) wire.Reply {
		t.Helper()
		var rep wire.Reply
		req.Flags |= wire.FlagWaitCommit
		if fs.Call(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}, &req, &rep); rep.Status != want {
			t.Fatalf("op %d: %v, want %v", req.Op, rep.Status, want)
		}
		return rep
	}
	op := func(o wire.Op) wire.Header { return wire.Header{Op: o} }
	for _, v := range vips {
		h := op(wire.OpSetVIPEpoch)
		h.VIP, h.VIPEpoch = v.Index, v.Epoch
		do(v, wire.Request{Header: h}, wire.OK)
		do(v, wire.Request{Header: op(wire.OpLockService), Lock: &wire.LockArgs{NSMState: v.NSMState, Window: int64(time.Minute)}}, wire.OK)
	}
	dir := do(mgs.VIP{}, wire.Request{Header: op(wire.OpMkdir), FID: wire.RootFID, Name: []byte("d")}, wire.OK).Attr.FID
	f := do(mgs.VIP{}, wire.Request{Header: op(wire.OpCreate), FID: dir, Name: []byte("f")}, wire.OK).Attr.FID
	lock := func(v mgs.VIP, addr string, start uint64, block bool, want wire.Status) {
		t.Helper()
		do(v, wire.Request{Header: op(wire.OpLock), FID: f, Lock: &wire.LockArgs{
			Owner: wire.LockOwner{LockHost: wire.LockHost{Addr: netip.MustParseAddr(addr), Name: "c" + addr}, Svid: 1, OH: "1@c"},
			Range: wire.LockRange{Start: start, End: start + 9}, Exclusive: true, Block: block, Monitor: true}}, want)
	}
	lock(vips[0], "192.0.2.77", 0, false, wire.OK)
	lock(vips[0], "192.0.2.77", 100, false, wire.OK)
	lock(vips[1], "192.0.2.77", 200, false, wire.OK)
	lock(vips[1], "192.0.2.78", 0, true, wire.ErrLockBlocked)

	a := New(fs, func(context.Context) ([]mgs.VIP, error) { return vips, nil }, time.Now)
	l, err := a.List(ctx, ListArgs{File: "/d/f"})
	if err != nil || len(l.Locks) != 4 || !l.EOF || l.Locks[3].State != "waiting" || l.Locks[3].Addr != "192.0.2.11" || l.Locks[0].Path != "/d/f" {
		t.Fatalf("%+v, %v", l, err)
	}
	if l, err = a.List(ctx, ListArgs{Client: "192.0.2.77", After: l.Locks[0].ID}); err != nil || len(l.Locks) != 2 || l.Locks[0].Path != "/d/f" {
		t.Fatalf("%+v, %v", l, err)
	}
	last := l.Locks[1].ID
	s, err := a.Services(ctx, vips)
	if err != nil || len(s) != 2 || s[0].NSMState != 5 || s[0].Granted != 2 || s[1].Granted != 1 || s[1].Waiting != 1 || s[1].Hosts != 2 {
		t.Fatalf("%+v, %v", s, err)
	}
	h, err := a.Hosts(ctx, HostsArgs{})
	if err != nil || len(h.Hosts) != 3 || !h.Hosts[0].Notified || h.Hosts[0].Locks != 2 || h.Hosts[0].NSMState != 5 {
		t.Fatalf("%+v, %v", h, err)
	}
	r, err := a.Release(ctx, ReleaseArgs{IDs: []uint64{last, last}})
	if err != nil || len(r.Released) != 1 || len(r.Missing) != 1 || r.Failed != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	fr, err := a.Free(ctx, FreeArgs{Client: "192.0.2.77"})
	if err != nil || fr.Failed != "" || len(fr.Clients) != 1 || fr.Clients[0].Freed != 2 {
		t.Fatalf("%+v, %v", fr, err)
	}
	// Who waited has it now.
	if l, err = a.List(ctx, ListArgs{}); err != nil || len(l.Locks) != 1 || l.Locks[0].ClientAddr != "192.0.2.78" || l.Locks[0].State != "grant-pending" {
		t.Fatalf("%+v, %v", l, err)
	}
}
