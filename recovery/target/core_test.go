package target

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestCore runs the transcripts in testdata/core.
func TestCore(t *testing.T) {
	datadriven.Walk(t, "testdata/core", func(t *testing.T, path string) {
		c := NewCore(100)
		var gate Gate
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			var out strings.Builder
			for _, l := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				f := strings.Fields(l)
				n := make([]uint64, len(f))
				for i := range f {
					n[i], _ = strconv.ParseUint(f[i], 10, 64)
				}
				res := ""
				switch f[0] {
				case "connect": // client generation
					st, changed := c.Connect(wire.ClientID{byte(n[1])}, n[2])
					res = fmt.Sprintf("%v changed=%v", st, changed)
				case "disconnect":
					res = fmt.Sprint(c.Disconnect(wire.ClientID{byte(n[1])}))
				case "setvip": // vip epoch
					st, changed := c.SetVIPEpoch(uint32(n[1]), n[2])
					res = fmt.Sprintf("%v changed=%v", st, changed)
				case "admit": // client generation vip epoch
					res = c.View().Admit(&wire.Header{Op: wire.OpPing, Client: wire.ClientID{byte(n[1])}, ClientGen: n[2], VIP: uint32(n[3]), VIPEpoch: n[4]}).String()
				case "assign":
					next := c.NextTransno()
					res = fmt.Sprintf("next=%d assigned=%d", next, c.AssignTransno())
				case "applied":
					c.Applied(n[1])
					res = fmt.Sprintf("applied=%d committed=%d", c.LastApplied(), c.LastCommitted())
				case "gate":
					gate.Push(Waiter{Transno: n[1]})
					res = fmt.Sprintf("waiting=%d", gate.Len())
				case "committed":
					c.Committed(n[1])
					res = fmt.Sprintf("committed=%d released:", c.LastCommitted())
					for {
						w, ok := gate.Pop(c.LastCommitted())
						if !ok {
							break
						}
						res += fmt.Sprint(" ", w.Transno)
					}
				default:
					t.Fatalf("%s: %q", d.Pos, l)
				}
				fmt.Fprintf(&out, "%s\n  %s\n", l, res)
			}
			return out.String()
		})
	})
}

func TestGateKeepsOrder(t *testing.T) {
	var g Gate
	next, popped := uint64(1), uint64(1)
	rng := rand.New(rand.NewPCG(1, 1))
	for range 5000 {
		if rng.IntN(5) < 3 {
			g.Push(Waiter{Transno: next})
			next++
		} else if w, ok := g.Pop(next); ok {
			if w.Transno != popped {
				t.Fatalf("popped %d, want %d", w.Transno, popped)
			}
			popped++
		}
	}
	if _, ok := g.Pop(popped - 1); ok {
		t.Error("popped what is not committed")
	}
}

func key(addr byte, port uint16, xid uint32, sum uint64) *wire.ReplyKey {
	return &wire.ReplyKey{Addr: [16]byte{addr}, Port: port, XID: xid, Proc: 5, Sum: sum}
}

func engine(t *testing.T) store.Engine {
	t.Helper()
	e, err := local.OpenPebble("x", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1, MemTableBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func reload(t *testing.T, e store.Engine, n int) *Replies {
	t.Helper()
	r := NewReplies(n)
	if err := r.Load(e, func(k []byte, err error) { t.Errorf("%x: %v", k, err) }); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRepliesRing(t *testing.T) {
	e := engine(t)
	r := NewReplies(0)
	put := func(n uint32) {
		b := e.NewBatch()
		r.Put(b, 1, key(1, 9, n, uint64(n)), Record{Transno: uint64(n), Created: n%2 == 0, FID: wire.FID{Seq: 2, OID: n}})
		if err := e.Apply(b); err != nil {
			t.Fatal(err)
		}
	}
	check := func(r *Replies, lo, hi uint32) {
		t.Helper()
		for n := uint32(1); n <= hi+5; n++ {
			rec, f := r.Lookup(1, key(1, 9, n, uint64(n)), 0)
			want := NotFound
			if n > lo && n <= hi {
				want = Hit
			}
			if f != want || f == Hit && (rec.Transno != uint64(n) || rec.Created != (n%2 == 0)) {
				t.Fatalf("%d: %v %+v, want %v", n, f, rec, want)
			}
		}
	}
	last := uint32(0)
	for _, hi := range []uint32{3, 16, 17, 100, 1024, 1500, 4000} {
		for last < hi {
			last++
			put(last)
		}
		lo := uint32(0)
		if hi > MaxClientSlots {
			lo = hi - MaxClientSlots
		}
		check(r, lo, hi)
		r = reload(t, e, 0)
		check(r, lo, hi)
	}
	if _, f := r.Lookup(2, key(1, 9, last, uint64(last)), 0); f != NotFound {
		t.Error("found under another VIP")
	}
	if _, f := r.Lookup(1, key(1, 9, last, 0), 0); f != NotFound {
		t.Error("found with other arguments")
	}
}

func TestRepliesPorts(t *testing.T) {
	r := NewReplies(0)
	r.Put(nil, 0, key(1, 7, 1, 1), Record{Transno: 1})
	r.Put(nil, 0, key(1, 8, 1, 1), Record{Transno: 2})
	for _, c := range []struct {
		port  uint16
		flags wire.Flags
		want  Found
		rec   uint64
	}{
		{7, 0, Hit, 1}, {8, 0, Hit, 2}, {8, wire.FlagForceNew, Hit, 2}, {9, 0, PortMismatch, 2},
		{9, wire.FlagAnyPort, Hit, 2}, {9, wire.FlagForceNew, NotFound, 0},
	} {
		if rec, f := r.Lookup(0, key(1, c.port, 1, 1), c.flags); f != c.want || rec.Transno != c.rec {
			t.Errorf("port %d flags %x: %v %d", c.port, c.flags, f, rec.Transno)
		}
	}
}

// TestRepliesBound: clients beyond the limit are forgotten, least recently used
// first, in memory and in the engine.
func TestRepliesBound(t *testing.T) {
	e := engine(t)
	r := NewReplies(10 * firstSlots)
	for a := range 100 {
		b := e.NewBatch()
		r.Put(b, 0, key(byte(a), 1, 1, 1), Record{Transno: uint64(a + 1)})
		if err := e.Apply(b); err != nil {
			t.Fatal(err)
		}
		if _, f := r.Lookup(0, key(0, 1, 1, 1), 0); f != Hit { // stays in use
			t.Fatalf("client 0 was forgotten at %d", a)
		}
		if r.Slots() > 10*firstSlots {
			t.Fatalf("%d slots", r.Slots())
		}
	}
	if _, f := r.Lookup(0, key(50, 1, 1, 1), 0); f != NotFound {
		t.Error("client 50 is still there")
	}
	if again := reload(t, e, 0); again.Clients() != 10 {
		t.Errorf("%d clients stored, want 10", again.Clients())
	}
	// One client alone cannot take more than there is.
	for n := range uint32(1000) {
		r.Put(nil, 0, key(99, 1, n, 1), Record{})
	}
	if r.Slots() > 10*firstSlots {
		t.Errorf("%d slots", r.Slots())
	}
}

func FuzzDecodeRecord(f *testing.F) {
	f.Add(AppendRecord(nil, &Record{Created: true}), AppendReplyKey(nil, 1, [16]byte{}, 3))
	f.Fuzz(func(t *testing.T, v, k []byte) {
		if rec, err := DecodeRecord(v); err == nil && string(AppendRecord(nil, &rec)) != string(v) {
			t.Error("record changes")
		}
		if vip, addr, slot, err := ParseReplyKey(k); err == nil && string(AppendReplyKey(nil, vip, addr, slot)) != string(k) {
			t.Error("key changes")
		}
	})
}

func TestCommitter(t *testing.T) {
	enter, leave := make(chan struct{}), make(chan error)
	var order []int
	var mu sync.Mutex
	done := make(chan int, 100)
	fails := 0
	c := NewCommitter(10, func() error { enter <- struct{}{}; return <-leave }, func(error) { fails++ })
	gate := func(n uint64) *wire.Reply {
		rep := &wire.Reply{Data: []byte("x")}
		if !c.Gate(n, rep, Func(func() {
			mu.Lock()
			order = append(order, int(n))
			mu.Unlock()
			done <- int(n)
		})) {
			done <- -int(n)
		}
		return rep
	}
	gate(10)
	if n := <-done; n != -10 {
		t.Fatal("what is committed waits")
	}
	c.Applied(11)
	r11 := gate(11)
	<-enter
	// These gather while the flush runs.
	for n := uint64(12); n < 20; n++ {
		c.Applied(n)
		gate(n)
	}
	if c.LastCommitted() != 10 || c.Waiting() != 9 {
		t.Errorf("committed %d, waiting %d", c.LastCommitted(), c.Waiting())
	}
	leave <- nil
	if n := <-done; n != 11 || r11.LastCommitted != 11 || r11.Status != wire.OK {
		t.Errorf("released %d, committed %d", n, r11.LastCommitted)
	}
	<-enter
	leave <- nil
	for n := 12; n < 20; n++ {
		if got := <-done; got != n {
			t.Errorf("released %d, want %d", got, n)
		}
	}
	if c.Syncs() != 2 {
		t.Errorf("%d flushes", c.Syncs())
	}
	// The next flush fails.
	c.Applied(20)
	c.Applied(21)
	r20, r21 := gate(20), gate(21)
	<-enter
	leave <- errors.New("disk is gone")
	<-done
	<-done
	if r20.Status != wire.ErrTargetDown || r21.Status != wire.ErrTargetDown || r20.LastCommitted != 19 {
		t.Errorf("%v %v %d", r20.Status, r21.Status, r20.LastCommitted)
	}
	if r := gate(22); r.Status != wire.ErrTargetDown || <-done != -22 {
		t.Errorf("after the failure: %v", r.Status)
	}
	if c.Close() == nil || fails != 1 {
		t.Errorf("fails %d", fails)
	}
}

// TestCommitterFailsWhileFlushHangs: a flush that never returns must not keep
// replies from getting their error.
func TestCommitterFailsWhileFlushHangs(t *testing.T) {
	enter, never := make(chan struct{}), make(chan struct{})
	defer close(never)
	c := NewCommitter(0, func() error { close(enter); <-never; return nil }, nil)
	c.Applied(1)
	rep := &wire.Reply{}
	done := make(chan struct{})
	c.Gate(1, rep, Func(func() { close(done) }))
	<-enter
	c.Fail(errors.New("broken"))
	<-done
	if rep.Status != wire.ErrTargetDown || c.Close() == nil {
		t.Error(rep.Status)
	}
}

// TestCommitterLazy: what nobody waits for becomes durable all the same, and
// Close commits the rest.
func TestCommitterLazy(t *testing.T) {
	synced := make(chan struct{}, 10)
	c := NewCommitter(0, func() error { synced <- struct{}{}; return nil }, nil)
	c.Applied(1)
	c.Lazy()
	<-synced
	c.Applied(2)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	<-synced
	if c.LastCommitted() != 2 {
		t.Error(c.LastCommitted())
	}
}

// TestCommitterExtra: what has no transno is durable when its callback says so,
// in the order of the log, and a failure reaches every callback.
func TestCommitterExtra(t *testing.T) {
	enter, leave := make(chan struct{}), make(chan error)
	c := NewCommitter(5, func() error { enter <- struct{}{}; return <-leave }, nil)
	got := make(chan error, 10)
	extra := func() error { return c.Extra(func(err error) { got <- err }) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(extra())
	<-enter
	must(extra()) // comes too late for the flush that runs
	c.Applied(6)
	leave <- nil
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	<-enter
	if len(got) != 0 || c.LastCommitted() != 5 {
		t.Errorf("%d callbacks, committed %d before the flush", len(got), c.LastCommitted())
	}
	leave <- nil
	if err := <-got; err != nil || c.LastCommitted() != 6 {
		t.Error(err, c.LastCommitted())
	}
	must(c.Extra(nil)) // becomes durable by itself
	<-enter
	leave <- nil
	c.Applied(7)
	c.Soon()
	<-enter
	must(extra())
	broken := errors.New("broken")
	leave <- broken
	if err := <-got; err != broken {
		t.Error(err)
	}
	if err := extra(); err != broken || len(got) != 0 {
		t.Error("after the failure:", err)
	}

	c = NewCommitter(0, func() error { <-enter; return nil }, nil)
	must(c.Extra(nil))
	go func() { enter <- struct{}{} }()
	if err := c.Close(); err != nil || c.Syncs() != 1 {
		t.Error(err, c.Syncs())
	}
	if err := extra(); err == nil || len(got) != 0 {
		t.Error("after Close:", err)
	}
}

// A reply that is gated while the flush that it needs ends is released although
// nothing is applied after it.
func TestCommitterGateAtTheEndOfAFlush(t *testing.T) {
	c := NewCommitter(0, func() error { return nil }, nil)
	gate := func(n uint64, wg *sync.WaitGroup) {
		rep := &wire.Reply{}
		if !c.Gate(n, rep, Func(wg.Done)) {
			wg.Done()
		}
	}
	for n := uint64(1); n <= 20000; n++ {
		var wg sync.WaitGroup
		wg.Add(4)
		c.Applied(n)
		for i := range 3 {
			go func() {
				for range i * int(n%50) {
					runtime.Gosched()
				}
				gate(n, &wg)
			}()
		}
		gate(n, &wg)
		released := make(chan struct{})
		go func() { wg.Wait(); close(released) }()
		select {
		case <-released:
		case <-time.After(20 * time.Second):
			t.Fatalf("a reply gated for %d was not released", n)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
