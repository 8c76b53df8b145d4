package client

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

const stripe = 64 << 10

var ctx = context.Background()

// bed is a FS on real targets over stores in memory.
type bed struct {
	t     *testing.T
	fs    *FS
	mdt   *mdt.MDT
	osts  []*ost.Target
	disks []*objfs.Mem
	clk   clock.Strict

	mu   sync.Mutex
	seen map[wire.Op]int
	hook func(*wire.Request, *wire.Reply) bool // true: rep is the answer
}

// spy counts the requests to a target and lets a test act on them.
type spy struct {
	wire.Conn
	b *bed
}

func (s *spy) before(req *wire.Request, rep *wire.Reply) bool {
	s.b.mu.Lock()
	s.b.seen[req.Op]++
	h := s.b.hook
	s.b.mu.Unlock()
	return h != nil && h(req, rep)
}

func (s *spy) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	if s.before(req, rep) {
		done()
		return
	}
	s.Conn.Handle(req, rep, done)
}

func (s *spy) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	if s.before(req, rep) {
		return nil
	}
	return s.Conn.Call(ctx, req, rep)
}

func (b *bed) count(op wire.Op) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen[op]
}

func (b *bed) setHook(f func(*wire.Request, *wire.Reply) bool) {
	b.mu.Lock()
	b.hook = f
	b.mu.Unlock()
}

// newBed makes a file system whose files have the given number of stripes, one
// OST each. Epochs stay open unless o says otherwise.
func newBed(t *testing.T, stripes int, o Options) *bed {
	t.Helper()
	b := &bed{t: t, seen: map[wire.Op]int{}}
	var states []mdt.OSTState
	for i := range stripes {
		d := objfs.NewMem(b.clk.Now)
		x, err := ost.Open(ost.Options{Index: uint16(i), FS: d, BootID: "boot", Clock: b.clk.Now, CommitInterval: -1})
		if err != nil {
			t.Fatal(err)
		}
		x.Begin(0)
		b.disks = append(b.disks, d)
		b.osts = append(b.osts, x)
		o.OSTs = append(o.OSTs, &spy{wire.InProc(x), b})
		states = append(states, mdt.OSTState{Index: uint16(i), Up: true, Free: 1 << 40})
	}
	e, err := local.OpenPebble("mdt", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1, MemTableBytes: 1 << 20, CacheBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	b.mdt, err = mdt.Open(mdt.Options{Engine: e, Clock: b.clk.Now, StripeCount: uint8(stripes), StripeSize: stripe, OSTs: func() []mdt.OSTState { return states }})
	if err != nil {
		t.Fatal(err)
	}
	b.mdt.Begin(0)
	o.MDT, o.ID, o.Gen, o.Clock = &spy{wire.InProc(b.mdt), b}, wire.ClientID{1}, 1, b.clk.Now
	if o.EpochIdle == 0 {
		o.EpochIdle = time.Hour
	}
	if b.fs, err = New(o); err != nil {
		t.Fatal(err)
	}
	if err := b.fs.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.setHook(nil)
		if err := b.fs.Close(ctx); err != nil {
			t.Error(err)
		}
		if err := b.mdt.Close(); err != nil {
			t.Error(err)
		}
		e.Close()
		for _, x := range b.osts {
			x.Close()
		}
	})
	return b
}

// another gives another client of a file system of one stripe.
func (b *bed) another() *FS {
	b.t.Helper()
	f, err := New(Options{MDT: wire.InProc(b.mdt), OSTs: []wire.Conn{wire.InProc(b.osts[0])}, ID: wire.ClientID{2}, Gen: 1, Clock: b.clk.Now, EpochIdle: time.Hour})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := f.Connect(ctx); err != nil {
		b.t.Fatal(err)
	}
	return f
}

// create makes a file; with open its epoch is opened by the create, and the
// reply is returned for Created.
func (b *bed) create(name string, open bool) (wire.Attr, uint64) {
	b.t.Helper()
	req := wire.Request{FID: wire.RootFID, Name: []byte(name), How: wire.Guarded}
	req.Op, req.Flags = wire.OpCreate, wire.FlagWaitCommit
	if open {
		req.Flags |= wire.FlagOpenEpoch
	}
	var rep wire.Reply
	b.fs.Call(ctx, Owner{}, &req, &rep)
	if rep.Status != wire.OK {
		b.t.Fatal("create:", rep.Status)
	}
	return rep.Attr, rep.Transno
}

func (b *bed) attr(f wire.FID) wire.Attr {
	b.t.Helper()
	var a wire.Attr
	if st, _ := b.fs.Attr(ctx, Owner{}, f, &a, true); st != wire.OK {
		b.t.Fatal("attr:", st)
	}
	return a
}

func (b *bed) tryWrite(f wire.FID, off uint64, p []byte, how wire.StableHow) wire.Status {
	var a wire.Attr
	if st, _ := b.fs.Attr(ctx, Owner{}, f, &a, true); st != wire.OK {
		return st
	}
	_, st := b.fs.Write(ctx, Owner{}, &a, off, p, how)
	return st
}

func (b *bed) write(f wire.FID, off uint64, p []byte) {
	b.t.Helper()
	if st := b.tryWrite(f, off, p, wire.Unstable); st != wire.OK {
		b.t.Fatal("write:", st)
	}
}

func (b *bed) read(f wire.FID, off uint64, n int) []byte {
	b.t.Helper()
	a := b.attr(f)
	p := make([]byte, n)
	k, eof, st, _ := b.fs.Read(ctx, Owner{}, &a, off, p, true)
	if st != wire.OK {
		b.t.Fatal("read:", st)
	}
	if eof != (off+uint64(n) >= a.Size) {
		b.t.Fatalf("read of %d at %d of %d: eof %v", n, off, a.Size, eof)
	}
	return p[:k]
}

func (b *bed) truncate(f wire.FID, size uint64) wire.Status {
	req := wire.Request{FID: f, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: size}}
	req.Op = wire.OpSetattr
	var rep wire.Reply
	b.fs.Setattr(ctx, Owner{}, &req, &rep)
	return rep.Status
}

func (b *bed) remove(name string) {
	b.t.Helper()
	req := wire.Request{FID: wire.RootFID, Name: []byte(name)}
	req.Op, req.Flags = wire.OpRemove, wire.FlagWaitCommit
	var rep wire.Reply
	b.fs.Call(ctx, Owner{}, &req, &rep)
	if rep.Status != wire.OK {
		b.t.Fatal("remove:", rep.Status)
	}
}

func (b *bed) closeAll() {
	b.t.Helper()
	if _, err := b.fs.closeEpochs(ctx, 0); err != nil {
		b.t.Fatal(err)
	}
}

// mdtAttr is what the MDT alone knows.
func (b *bed) mdtAttr(f wire.FID) wire.Attr {
	b.t.Helper()
	var a wire.Attr
	if st := b.fs.rawAttr(ctx, f, &a); st != wire.OK {
		b.t.Fatal(st)
	}
	return a
}

func (b *bed) pending() []mdt.LogRec {
	b.t.Helper()
	if err := b.mdt.Sync(); err != nil {
		b.t.Fatal(err)
	}
	l, err := b.mdt.PendingLogs(0, 1000)
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

func (b *bed) checkSize(what string, f wire.FID, size uint64) {
	b.t.Helper()
	if a := b.attr(f); a.Size != size {
		b.t.Fatalf("%s: size %d (epoch open: %v), want %d", what, a.Size, a.EpochOpen, size)
	}
}

func name(i int) string { return fmt.Sprintf("f%d", i) }
