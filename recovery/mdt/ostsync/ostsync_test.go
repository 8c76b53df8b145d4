package ostsync

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// faulty is an OST one of whose objects cannot be destroyed.
type faulty struct {
	wire.Conn
	bad   atomic.Pointer[wire.FID]
	tries atomic.Int64
}

func (f *faulty) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	if b := f.bad.Load(); req.Op == wire.OpDestroy && b != nil && req.FID == *b {
		f.tries.Add(1)
		rep.Status = wire.ErrIO
		done()
		return
	}
	f.Conn.Handle(req, rep, done)
}

// A destroy that fails is tried again, and holds up no other record of the log
// (SM 143).
func TestFailedDestroyHoldsUpNothingElse(t *testing.T) {
	ctx := context.Background()
	quiet := slog.New(slog.DiscardHandler)
	clk := &clock.Strict{}
	e, err := local.OpenPebble("mdt", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	m, err := mdt.Open(mdt.Options{Engine: e, Clock: clk.Now, Logger: quiet})
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
	f := &faulty{Conn: wire.InProc(o)}
	fs, err := client.New(client.Options{MDT: wire.InProc(m), OSTs: []wire.Conn{f}, ID: wire.ClientID{1}, Gen: 1, Clock: clk.Now})
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	defer fs.Close(ctx)

	const files = 600 // more than a batch
	name := func(i int) []byte { return fmt.Appendf(nil, "f%d", i) }
	call := func(op wire.Op, i int) *wire.Reply {
		req := &wire.Request{Header: wire.Header{Op: op, Flags: wire.FlagWaitCommit}, FID: wire.RootFID, Name: name(i)}
		if op == wire.OpCreate {
			req.Flags |= wire.FlagOpenEpoch // there may be objects
			req.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: 0o644}
		}
		rep := &wire.Reply{}
		if fs.Call(ctx, client.Owner{}, req, rep); rep.Status != wire.OK {
			t.Fatalf("op %d of file %d: %v", op, i, rep.Status)
		}
		return rep
	}
	var bad wire.FID
	for i := range files {
		a := call(wire.OpCreate, i).Attr
		if i == 3 {
			bad = a.FID
		}
	}
	f.bad.Store(&bad)
	s := New(m, fs, quiet)
	for i := range files {
		call(wire.OpRemove, i)
	}
	for pass := range int64(3) {
		if err := s.Once(ctx); err == nil {
			t.Error("the failure is not told")
		}
		recs, err := m.PendingLogs(0, 2*files)
		if err != nil {
			t.Fatal(err)
		}
		if len(recs) != 1 || recs[0].FID != bad {
			t.Fatalf("%d records are left after pass %d", len(recs), pass)
		}
		if n := f.tries.Load(); n != pass+1 {
			t.Errorf("%d tries after %d passes", n, pass+1)
		}
	}
	f.bad.Store(nil)
	if err := s.Once(ctx); err != nil {
		t.Error(err)
	}
	if recs, err := m.PendingLogs(0, 10); err != nil || len(recs) != 0 {
		t.Errorf("%d records are left: %v", len(recs), err)
	}
	if st := s.Status(); st.Destroyed != files {
		t.Errorf("%d destroyed, want %d", st.Destroyed, files)
	}
}
