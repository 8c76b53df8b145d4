package host_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Frontends give the MDT several replays at a time, which have to come in order;
// what a wire.Blocker gets comes in none.
func TestMDTGetsRequestsInOrder(t *testing.T) {
	if _, ok := any(new(mdt.MDT)).(wire.Blocker); ok {
		t.Error("the MDT is a wire.Blocker: replays may overtake each other")
	}
}

// Targets that are stopped and started again, one after the other, are only a delay
// to a frontend elsewhere: RS 0a, RO 1, RO 3, CS 5d.
func TestTargetsRestart(t *testing.T) {
	b := newBed(t, 2)
	lost := func(int, int) { t.Error("data are said to be lost") }
	fs := b.frontend("f", func(o *client.Options) {
		o.OnLostData, o.OnFlushError = lost, func(int, uint64) { t.Error("a failed flush") }
		o.OnEvicted = func(int) { t.Error("evicted") }
	})
	files := map[string]wire.Attr{}
	for i, restart := range []func(){
		func() {}, func() { b.stopMDT(); b.startMDT() }, func() { b.stopOST(0); b.startOST(0) },
		func() {
			b.stopOST(1)
			b.stopOST(0)
			b.stopMDT()
			b.startMDT()
			b.startOST(0)
			b.startOST(1)
		},
	} {
		for _, how := range []wire.StableHow{wire.Unstable, wire.FileSync} {
			name := strings.Repeat("x", 1+i) + string('0'+rune(how))
			a := b.create(fs, name)
			if st := b.write(fs, a, name, how); st != wire.OK {
				t.Fatalf("write %s: %v", name, st)
			}
			files[name] = a
		}
		restart()
		b.untilAllThere()
		for name, a := range files {
			if got := b.read(fs, a.FID); got != name {
				t.Errorf("after restart %d: %q in %s", i, got, name)
			}
			if a := b.attr(fs, a.FID); fs.Commit(ctx, client.Owner{}, &a) != wire.OK {
				t.Errorf("after restart %d: %s cannot be committed", i, name)
			}
		}
	}
	b.until("all IO epochs are closed", func() bool { return fs.OpenEpochs() == 0 })
	if err := fs.Close(ctx); err != nil {
		t.Error(err)
	}
}

// Requests that an OST had when it went away are given back after the frontend's
// patience, and do not come later after all; other OSTs are not concerned.
// RO 11, RS 59 (writes that wait for an OST), RO 10.
func TestPatienceEndsRequestsInFlight(t *testing.T) {
	b := newBed(t, 2)
	fs := b.frontend("f", func(o *client.Options) { o.Patience = 300 * time.Millisecond })
	here, away := b.createOn(fs, "here", 0), b.createOn(fs, "away", 1)
	for _, a := range []wire.Attr{here, away} {
		if st := b.write(fs, a, "old", wire.FileSync); st != wire.OK {
			t.Fatal(st)
		}
	}
	open := b.gate.shut(ostName(1))
	const n = 40
	var wg sync.WaitGroup
	res := make(chan wire.Status, n)
	for range n {
		wg.Go(func() { res <- b.write(fs, away, "new", wire.Unstable) })
	}
	b.until("the writes are at the OST", func() bool { return fs.OSTImport(1).Stats().AtTransport >= n })
	select {
	case st := <-res:
		t.Fatalf("a write to a target that hangs was answered: %v", st)
	case <-time.After(500 * time.Millisecond): // more than the patience: it is there, only slow
	}
	// The node of the OST dies: connections break, nothing is answered.
	o := b.osts[1]
	stopped := make(chan error, 1)
	short, cancel := context.WithCancel(ctx)
	cancel()
	go func() { stopped <- b.srv.StopTarget(short, ostName(1)) }()
	wg.Wait()
	close(res)
	for st := range res {
		if st != wire.ErrTargetDown {
			t.Errorf("a write to a target that is away: %v, want %v", st, wire.ErrTargetDown)
		}
	}
	if st := b.write(fs, here, "more", wire.FileSync); st != wire.OK || b.read(fs, here.FID) != "more" {
		t.Errorf("a file on the other OST: %v", st)
	}
	open()
	<-stopped
	if err := b.srv.StopTarget(ctx, ostName(1)); err != nil {
		t.Fatal(err)
	}
	if err := o.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	b.startOST(1)
	b.until("the OST is back", func() bool { return !fs.Away(1) })
	if got := b.read(fs, away.FID); got != "old" {
		t.Errorf("%q after writes that were given up: one came late", got)
	}
	if st := b.write(fs, away, "new", wire.FileSync); st != wire.OK || b.read(fs, away.FID) != "new" {
		t.Error("a write after the OST has come back:", st)
	}
}

// Times that are set after a write count, and a write after that counts again,
// though the clocks of the two nodes differ (cp -p, tar, make).
func TestTimesWithClocksThatDiffer(t *testing.T) {
	for _, skew := range []time.Duration{-3 * time.Second, 3 * time.Second} {
		t.Run(skew.String(), func(t *testing.T) {
			b := newBed(t, 1)
			fs := b.frontend("f", func(o *client.Options) {
				o.Clock = func() int64 { return b.clk.Now() + int64(skew) }
				o.EpochIdle = time.Hour
			})
			a := b.create(fs, "f")
			if st := b.write(fs, a, "data", wire.Unstable); st != wire.OK {
				t.Fatal(st)
			}
			const mtime = 1_000_000_000 * int64(time.Second)
			req := wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagWaitCommit}, Key: key(), FID: a.FID,
				SetAttr: wire.SetAttr{Mask: wire.SetMtime, Mtime: mtime}}
			var rep wire.Reply
			before := b.attr(fs, a.FID)
			if fs.Call(ctx, client.Owner{}, &req, &rep); rep.Status != wire.OK {
				t.Fatal(rep.Status)
			}
			after := b.attr(fs, a.FID)
			if after.Mtime != mtime || after.Ctime <= before.Ctime {
				t.Errorf("mtime %d ctime %d after %d, want mtime %d", after.Mtime, after.Ctime, before.Ctime, mtime)
			}
			w := after
			if _, st := fs.Write(ctx, client.Owner{}, &w, 0, []byte("x"), wire.Unstable); st != wire.OK {
				t.Fatal(st)
			}
			if last := b.attr(fs, a.FID); last.Mtime == mtime || last.Ctime <= after.Ctime {
				t.Errorf("a write after that: mtime %d, ctime %d after %d", last.Mtime, last.Ctime, after.Ctime)
			}
		})
	}
}

// The epoch of a service address reaches all targets that are there, and those that
// are away by the MDT when they start: what an older owner sends is refused. SM 55.
func TestRaiseEpoch(t *testing.T) {
	b := newBed(t, 2)
	old, now := b.frontend("old", nil), b.frontend("now", nil)
	first, second := client.Owner{VIP: 5, Epoch: 1}, client.Owner{VIP: 5, Epoch: 2}
	if err := old.RaiseEpoch(ctx, first); err != nil {
		t.Fatal(err)
	}
	files := []wire.Attr{b.createOn(old, "a", 0), b.createOn(old, "b", 1)}
	for _, a := range files {
		if _, st := old.Write(ctx, first, &a, 0, []byte("x"), wire.FileSync); st != wire.OK {
			t.Fatal(st)
		}
	}
	b.stopOST(1)
	if err := now.RaiseEpoch(ctx, second); err != nil {
		t.Fatal(err)
	}
	b.startOST(1)
	for i, a := range files {
		if _, st := old.Write(ctx, first, &a, 0, []byte("y"), wire.FileSync); st != wire.ErrStaleVIP {
			t.Errorf("a write of the old owner to OST %d: %v", i, st)
		}
		if got := b.read(now, a.FID); got != "x" {
			t.Errorf("%q on OST %d", got, i)
		}
	}
	if err := old.RaiseEpoch(ctx, first); err == nil {
		t.Error("the older epoch was taken")
	}
}

// What a frontend leaves that is gone is finished, and that can be waited for: its
// IO epochs are closed with the sizes of the objects, its truncates executed.
// RS 57, SM 26a, RO 6.
func TestSettle(t *testing.T) {
	b := newBed(t, 2)
	fs := b.frontend("dead", func(o *client.Options) { o.EpochIdle = time.Hour })
	files := []wire.Attr{b.createOn(fs, "a", 0), b.createOn(fs, "b", 1)}
	for _, a := range files {
		if st := b.write(fs, a, "0123456789", wire.Unstable); st != wire.OK {
			t.Fatal(st)
		}
	}
	// Cut at the MDT only: the frontend dies before it comes to the OST.
	req := wire.Request{Header: wire.Header{Op: wire.OpSetattr, Flags: wire.FlagWaitCommit}, Key: key(), FID: files[1].FID,
		SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: 4}}
	var rep wire.Reply
	if fs.Call(ctx, client.Owner{}, &req, &rep); rep.Status != wire.OK || rep.Truncate.LogID == 0 {
		t.Fatal(rep.Status)
	}
	if err := fs.Abandon(); err != nil {
		t.Fatal(err)
	}
	b.evict("dead")
	c, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := b.mdt.Sync().Settle(c); err != nil {
		t.Fatal(err)
	}
	if f := b.mdt.Body().PendingFences(); len(f) != 0 {
		t.Errorf("fences: %+v", f)
	}
	other := b.frontend("other", nil)
	for i, want := range []string{"0123456789", "0123"} {
		if a := b.attr(other, files[i].FID); a.EpochOpen || a.Size != uint64(len(want)) {
			t.Errorf("file %d: %+v", i, a)
		}
		if got := b.read(other, files[i].FID); got != want {
			t.Errorf("file %d has %q, want %q", i, got, want)
		}
	}
	// With an OST away there is something left, and that is said.
	late := b.frontend("late", func(o *client.Options) { o.EpochIdle = time.Hour })
	if st := b.write(late, files[1], "abc", wire.Unstable); st != wire.OK {
		t.Fatal(st)
	}
	b.stopOST(1)
	b.until("the MDT knows", func() bool { return b.mdt.FS().Away(1) })
	if err := late.Abandon(); err != nil {
		t.Fatal(err)
	}
	b.evict("late")
	short, cancel2 := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel2()
	if err := b.mdt.Sync().Settle(short); err == nil {
		t.Error("settled although an OST does not know of an eviction")
	}
	b.startOST(1)
	if err := b.mdt.Sync().Settle(c); err != nil {
		t.Fatal(err)
	}
}
