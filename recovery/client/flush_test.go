package client

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// After Flush the OSTs have nothing that is not durable, the IO epochs are as they
// were, and files that are gone do no harm.
func TestFlush(t *testing.T) {
	b := newBed(t, 2, Options{})
	o := Owner{VIP: 1, Epoch: 1}
	if err := b.fs.RaiseEpoch(ctx, o); err != nil {
		t.Fatal(err)
	}
	var fids []wire.FID
	for i := range 3 * flushers {
		a, _ := b.create(name(i), true)
		b.write(a.FID, 0, make([]byte, 2*stripe))
		fids = append(fids, a.FID)
	}
	// Somebody else has removed it: this client's epoch is still there.
	other := b.another()
	req := wire.Request{FID: wire.RootFID, Name: []byte(name(0))}
	req.Op, req.Flags = wire.OpRemove, wire.FlagWaitCommit
	var rep wire.Reply
	if other.Call(ctx, Owner{}, &req, &rep); rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	open := b.fs.OpenEpochs()
	if err := b.fs.Flush(ctx, o); err != nil {
		t.Fatal(err)
	}
	if err := other.Close(ctx); err != nil {
		t.Error(err)
	}
	if n := b.fs.OpenEpochs(); n != open {
		t.Errorf("%d epochs are open, %d were", n, open)
	}
	if n := b.count(wire.OpSyncObject); n < 2*(len(fids)-1) {
		t.Errorf("%d objects were flushed, want %d", n, 2*(len(fids)-1))
	}
	for i, x := range b.osts {
		if n := x.Stats().DirtyBytes; n != stripe { // of the file that is gone
			t.Errorf("OST %d has %d bytes that are not durable, want %d", i, n, stripe)
		}
	}
}

// A flush that fails, or is not done in time, is an error; so is one of an address
// that has a newer owner.
func TestFlushFails(t *testing.T) {
	b := newBed(t, 1, Options{OnFlushError: func(int, uint64) {}})
	o := Owner{VIP: 1, Epoch: 1}
	if err := b.fs.RaiseEpoch(ctx, o); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * flushers {
		a, _ := b.create(name(i), true)
		b.write(a.FID, 0, []byte("x"))
	}
	b.disks[0].FailSync(wire.ErrIO)
	if err := b.fs.Flush(ctx, o); !errors.Is(err, wire.ErrIO) {
		t.Error(err)
	}
	b.disks[0].FailSync(nil)
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := b.fs.Flush(gone, o); err == nil {
		t.Error("it succeeds after its time")
	}
	if err := b.fs.RaiseEpoch(ctx, Owner{VIP: 1, Epoch: 2}); err != nil {
		t.Fatal(err)
	}
	if err := b.fs.Flush(ctx, o); !errors.Is(err, wire.ErrStaleVIP) {
		t.Error(err)
	}
}

// silent is an OST that answers when release is called.
type silent struct {
	wire.Conn
	held chan func()
}

func (s *silent) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	s.held <- func() { s.Conn.Handle(req, rep, done) }
}

// Who raises an epoch waits for an OST that is silent until its time is over, and
// no longer; what the OST answers later does no harm.
func TestRaiseEpochEnds(t *testing.T) {
	b := newBed(t, 2, Options{})
	s := &silent{b.fs.osts[1].Conn, make(chan func(), 1)}
	b.fs.osts[1].Conn = s
	gone, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	end := make(chan error, 1)
	go func() { end <- b.fs.RaiseEpoch(gone, Owner{VIP: 1, Epoch: 1}) }()
	answer := <-s.held
	select {
	case err := <-end:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	over := errors.New("the time is over")
	cancel(over)
	select {
	case err := <-end:
		if !errors.Is(err, over) {
			t.Errorf("%v, want %v", err, over)
		}
	case <-time.After(time.Minute):
		t.Fatal("it still waits")
	}
	answer()
	b.fs.osts[1].Conn = s.Conn
	if err := b.fs.RaiseEpoch(ctx, Owner{VIP: 1, Epoch: 1}); err != nil {
		t.Error(err)
	}
}
