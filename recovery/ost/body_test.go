package ost

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func mem() *objfs.Mem { return objfs.NewMem(newClock().now) }

// remote registers client n of generation 1.
func remote(t testing.TB, g *Target, n byte) recov.ClientRecord {
	t.Helper()
	r := recov.ClientRecord{Client: wire.ClientID{n}, Gen: 1, Instance: 1}
	if err := register(g, r); err != nil {
		t.Fatal(err)
	}
	return r
}

func writeOf(r recov.ClientRecord, xid uint64, f wire.FID, off uint64, b string) *wire.Request {
	return &wire.Request{
		Header: wire.Header{Op: wire.OpWrite, Client: r.Client, ClientGen: r.Gen, XID: xid, Slot: uint16(xid % 4)},
		FID:    f, Offset: off, Bulk: []byte(b),
	}
}

// do executes a request and wants it to succeed.
func do(t testing.TB, g *Target, q *wire.Request) *wire.Reply {
	t.Helper()
	rep, res := execute(g, q, front.Exec{})
	if rep.Status != wire.OK || res.Status != wire.OK || res.NotDone || res.Mismatch {
		t.Fatalf("%v: %v, %+v", q.Op, rep.Status, res)
	}
	return rep
}

func content(t testing.TB, g *Target, f wire.FID, want string) {
	t.Helper()
	if b, rep := read(g, f, 0, 1000); rep.Status != wire.OK || string(b) != want {
		t.Fatalf("%v %q, want %q", rep.Status, b, want)
	}
}

func tableOf(t testing.TB, g *Target) front.Table {
	t.Helper()
	tab, err := g.Table()
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// killed ends g's process, and powerless its machine.
func killed(g *Target, m *objfs.Mem) *objfs.Mem {
	abandon(g)
	m.Kill()
	return m
}

func powerless(g *Target, m *objfs.Mem) *objfs.Mem {
	abandon(g)
	return m.CrashClone(1)
}

// Where the log ends after each way to end, and that numbers are never given
// twice (SM 54).
func TestTransnoOverRestarts(t *testing.T) {
	m := mem()
	boot := 1
	opts := func() Options { return Options{FS: m, BootID: fmt.Sprint(boot)} }
	g := openOnly(t, opts())
	c := remote(t, g, 1)
	if tab := tableOf(t, g); tab.Transno != 0 || tab.Instance != 1 || len(tab.Clients) != 1 {
		t.Fatalf("new store: %+v", tab)
	}
	rep, res := execute(g, writeOf(c, 1, fid(1), 0, "x"), front.Exec{})
	if rep.Status != wire.ErrRecovering || !res.NotDone {
		t.Fatalf("before Begin: %v %+v", rep.Status, res)
	}
	want(t, write(g, fid(1), 0, []byte("x"), wire.Unstable), wire.ErrRecovering)
	g.Begin(1000)
	told := do(t, g, writeOf(c, 2, fid(1), 0, "one")).Transno
	if told != 1001 {
		t.Fatalf("first number %d", told)
	}
	lc := op(g, wire.OpSyncTarget, fid(1)).LastCommitted
	if lc != told {
		t.Fatalf("last committed %d", lc)
	}
	remote(t, g, 2) // records it

	m = killed(g, m)
	g = openOnly(t, opts())
	ceiling := tableOf(t, g).Transno
	if ceiling != 1000+transnoStep {
		t.Fatalf("after a crash of the process the log ends at %d", ceiling)
	}
	// Died before recovery was over: nothing is different.
	m = killed(g, m)
	g = openOnly(t, opts())
	if e := tableOf(t, g).Transno; e != ceiling {
		t.Fatalf("after another one at %d", e)
	}
	g.Begin(0)
	w := do(t, g, writeOf(c, 3, fid(1), 0, "two"))
	if w.Transno != ceiling+1 || w.LastCommitted != ceiling {
		t.Fatalf("%d, committed %d", w.Transno, w.LastCommitted)
	}

	m, boot = powerless(g, m), 2
	g = openOnly(t, opts())
	if e := tableOf(t, g).Transno; e != ceiling {
		t.Fatalf("after a power failure the log ends at %d, recorded was %d", e, ceiling)
	}
	// A replay keeps its number, whatever holes there are.
	q := writeOf(c, 3, fid(1), 0, "two")
	rep, res = execute(g, q, front.Exec{Transno: w.Transno + 4})
	if rep.Status != wire.OK || res.Transno != w.Transno+4 || rep.Obj.Version != w.Transno+4 || rep.LastCommitted >= rep.Transno {
		t.Fatalf("replay: %+v %+v", rep, res)
	}
	// It is not durable: who dies before the end of recovery does it again.
	m = killed(g, m)
	g = openOnly(t, opts())
	if e := tableOf(t, g).Transno; e != ceiling {
		t.Fatalf("after a crash in recovery the log ends at %d, want %d", e, ceiling)
	}
	if rep, _ = execute(g, q, front.Exec{Transno: w.Transno + 4}); rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	// A number that was never given is another store's.
	rep, res = execute(g, q, front.Exec{Transno: ceiling + transnoStep + 1})
	if rep.Status != wire.ErrProto || !res.Mismatch {
		t.Fatalf("%v %+v", rep.Status, res)
	}
	g.Begin(w.Transno + 4)
	if rep, res = execute(g, q, front.Exec{Transno: w.Transno + 9}); rep.Status != wire.ErrProto || !res.Mismatch {
		t.Fatalf("replay after recovery: %v %+v", rep.Status, res)
	}
	n := do(t, g, writeOf(c, 4, fid(1), 0, "six")).Transno
	if n != ceiling+transnoStep+1 {
		t.Fatalf("number %d after recovery", n)
	}
	content(t, g, fid(1), "six")

	// Stopped in order, in recovery too.
	rec := recov.TargetRecord{Instance: 9, Clean: true, Transno: n}
	if err := g.PutTarget(rec); err != nil {
		t.Fatal(err)
	}
	rep, res = execute(g, writeOf(c, 5, fid(1), 0, "no"), front.Exec{})
	if rep.Status != wire.ErrTargetDown || !res.NotDone {
		t.Fatalf("after a clean stop: %v %+v", rep.Status, res)
	}
	for _, how := range []string{"record only", "closed", "closed in recovery"} {
		if how == "record only" {
			m = powerless(g, m)
		} else if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		boot++
		g = openOnly(t, opts())
		tab := tableOf(t, g)
		if g.LostUnflushed() || tab.Transno < n || tab.Target.Instance != rec.Instance || len(tab.Clients) != 2 {
			t.Fatalf("%s: %+v", how, tab)
		}
		if tab.Target.Clean != (how != "closed in recovery") {
			t.Fatalf("%s: clean is %v", how, tab.Target.Clean)
		}
		rec = recov.TargetRecord{Instance: tab.Instance, Clean: how == "record only", Transno: n}
		if err := g.PutTarget(rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// superFS counts and holds rewrites of the superblock, or makes them fail.
type superFS struct {
	*objfs.Mem
	n       atomic.Int64
	hold    atomic.Bool
	entered chan struct{}
	release chan struct{}
	fail    atomic.Bool
}

func (f *superFS) Rename(from, to string) error {
	f.n.Add(1)
	if f.hold.Load() {
		f.entered <- struct{}{}
		<-f.release
	}
	if f.fail.Load() {
		return unix.ENOSPC
	}
	return f.Mem.Rename(from, to)
}

// Clients that come together share a rewrite of the superblock.
func TestClientsShareARewrite(t *testing.T) {
	f := &superFS{Mem: mem(), entered: make(chan struct{}), release: make(chan struct{})}
	g := open(t, Options{FS: f})
	before := f.n.Load()
	f.hold.Store(true)
	var wg sync.WaitGroup
	put := func(n byte) {
		wg.Add(1)
		g.PutClient(recov.ClientRecord{Client: wire.ClientID{n}, Gen: uint64(n)}, func(err error) {
			if err != nil {
				t.Error(err)
			}
			wg.Done()
		})
	}
	put(1)
	<-f.entered
	for n := byte(2); n <= 64; n++ {
		put(n)
	}
	f.hold.Store(false)
	close(f.release)
	wg.Wait()
	if n := f.n.Load() - before; n != 2 {
		t.Fatalf("%d rewrites for 64 clients", n)
	}
	if n := len(g.admit.tables.Load().clients); n != 64 {
		t.Fatalf("%d clients are admitted", n)
	}
	// All are there after a power failure.
	g = openOnly(t, Options{FS: powerless(g, f.Mem), BootID: "b2"})
	tab := tableOf(t, g)
	if len(tab.Clients) != 64 || tab.Clients[63].Gen != 64 {
		t.Fatalf("%d clients", len(tab.Clients))
	}
	g.DelClient(wire.ClientID{1}, 1, true)
	g.DelClient(wire.ClientID{2}, 1, true) // of a generation that is gone
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err := readSuper(g.fs); err != nil || len(s.Clients) != 63 {
		t.Fatal(err)
	}
}

// A superblock that cannot be written registers nobody, and what nobody waits
// for is written later.
func TestSuperblockFails(t *testing.T) {
	f := &superFS{Mem: mem()}
	g := open(t, Options{FS: f})
	c := remote(t, g, 1)
	f.fail.Store(true)
	if err := register(g, recov.ClientRecord{Client: wire.ClientID{2}, Gen: 1}); err == nil {
		t.Fatal("registered on a disk that fails")
	}
	ch := make(chan error, 1)
	g.RaiseVIP(1, 2, func(err error) { ch <- err })
	if err := <-ch; err == nil {
		t.Fatal("raised on a disk that fails")
	}
	if st := call(g, &wire.Request{Header: wire.Header{Op: wire.OpFence}, Peer: c.Client, Cookie: 9}).Status; st != wire.ErrNoSpc {
		t.Fatal(st)
	}
	g.DelClient(c.Client, c.Gen, false)
	if r, _ := execute(g, writeOf(c, 1, fid(1), 0, "x"), front.Exec{}); r.Status != wire.ErrUnknownClient {
		t.Fatal(r.Status)
	}
	f.fail.Store(false)
	remote(t, g, 3)
	m := powerless(g, f.Mem)
	g = openOnly(t, Options{FS: m, BootID: "b2"})
	if tab := tableOf(t, g); len(tab.Clients) != 1 || tab.Clients[0].Client != (wire.ClientID{3}) {
		t.Fatalf("%+v", tab.Clients)
	}
	// The numbers of service are reserved first, or there is none.
	f = &superFS{Mem: m}
	abandon(g)
	m.Kill()
	var failed atomic.Bool
	g = openOnly(t, Options{FS: f, BootID: "b2", OnFail: func(error) { failed.Store(true) }})
	f.fail.Store(true)
	g.Begin(0)
	if want(t, write(g, fid(1), 0, []byte("x"), wire.Unstable), wire.ErrTargetDown); !failed.Load() {
		t.Fatal("the target goes on")
	}
	if err := g.Close(); err == nil {
		t.Fatal("closed cleanly on a disk that fails")
	}
}

func TestWaitCommit(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m})
	c := remote(t, g, 1)
	wait := func(transno uint64) (*wire.Reply, bool) {
		rep, ch := &wire.Reply{}, make(chan struct{})
		if !g.WaitCommit(transno, rep, func() { close(ch) }) {
			return rep, false
		}
		<-ch
		return rep, true
	}
	w := do(t, g, writeOf(c, 1, fid(1), 0, "abc"))
	w2 := do(t, g, writeOf(c, 2, fid(2), 0, "abc"))
	if rep, waited := wait(w.Transno); !waited || rep.Status != wire.OK || rep.LastCommitted < w.Transno {
		t.Fatalf("%v %+v", waited, rep)
	}
	if rep, waited := wait(w.Transno); waited || rep.Status != wire.OK {
		t.Fatalf("durable already: %v %+v", waited, rep)
	}
	g.CommitSoon()
	for end := time.Now().Add(20 * time.Second); g.LastCommitted() < w2.Transno; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("CommitSoon does nothing")
		}
	}
	// A reply that the front lets wait for the disk, and one whose flush fails.
	rep, e := &wire.Reply{}, &execution{wait: true, done: make(chan struct{})}
	g.Execute(writeOf(c, 3, fid(1), 3, "def"), rep, front.Exec{}, e)
	<-e.done
	if rep.Status != wire.OK || rep.LastCommitted < rep.Transno {
		t.Fatalf("%+v", rep)
	}
	w = do(t, g, writeOf(c, 4, fid(1), 6, "ghi"))
	m.FailSync(unix.EIO)
	if rep, waited := wait(w.Transno); !waited || rep.Status != wire.ErrIO || rep.FlushErrors&math.MaxUint32 == 0 {
		t.Fatalf("%v %+v", waited, rep)
	}
	m.FailSync(nil)
	if rep, waited := wait(w.Transno); waited || rep.Status != wire.ErrIO {
		t.Fatalf("asked after the failure: %v %+v", waited, rep)
	}
	if rep, waited := wait(w2.Transno); waited || rep.Status != wire.OK {
		t.Fatalf("of before the failure: %v %+v", waited, rep)
	}
	// A number that nobody has is not waited for.
	if rep, _ := wait(w.Transno + 1<<40); rep.Status != wire.ErrIO {
		t.Fatal(rep.Status)
	}
	if err := g.Close(); err == nil {
		t.Fatal("closed cleanly after a lost flush")
	}
	if rep, waited := wait(1 << 60); waited || rep.Status != wire.ErrIO {
		t.Fatalf("after the end: %v %+v", waited, rep)
	}
}

// Requests that are not done, and those that make no sense.
func TestExecuteRefuses(t *testing.T) {
	g := open(t, Options{FS: mem(), SegShift: 13})
	c := remote(t, g, 1)
	q := func(o wire.Op) *wire.Request {
		r := writeOf(c, 1, fid(1), 0, "x")
		r.Op = o
		return r
	}
	stranger, old, zero, big, far := q(wire.OpWrite), q(wire.OpWrite), q(wire.OpWrite), q(wire.OpWrite), q(wire.OpWrite)
	stranger.Client = wire.ClientID{9}
	old.ClientGen = 0
	zero.Client = wire.ClientID{}
	big.Offset = math.MaxUint64
	far.Slot = math.MaxUint16
	for _, x := range []struct {
		q       *wire.Request
		st      wire.Status
		notDone bool
	}{
		{stranger, wire.ErrUnknownClient, true},
		{old, wire.ErrStaleClient, true},
		{zero, wire.OK, false},
		{far, wire.OK, false},
		{big, wire.ErrFBig, false},
		{q(wire.OpCreate), wire.ErrNotSupp, false},
		{q(wire.OpConnect), wire.ErrNotSupp, false},
		{q(0), wire.ErrNotSupp, false},
	} {
		rep, res := execute(g, x.q, front.Exec{})
		if rep.Status != x.st || res.Status != x.st || res.NotDone != x.notDone {
			t.Errorf("%+v: %v %+v", x.q.Header, rep.Status, res)
		}
	}
	for _, o := range []wire.Op{wire.OpRead, wire.OpWrite, wire.OpPunch, wire.OpDestroy, wire.OpSyncObject, wire.OpSyncTarget, wire.OpStatfs} {
		if !g.MayBlock(o) {
			t.Errorf("%v may block", o)
		}
	}
	if g.MayBlock(wire.OpPing) || g.MayBlock(wire.OpFence) || g.MayBlock(wire.OpObjAttr) {
		t.Error("what does not block")
	}
	g.Close()
}

// lateFS returns from writes late, so that others overtake.
type lateFS struct{ *objfs.Mem }

func (f *lateFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	n, err := f.Mem.Pwrite(fd, p, off)
	time.Sleep(time.Duration(p[0]%4) * 50 * time.Microsecond)
	return n, err
}

// Overlapping writes of many clients take effect in the order of their numbers,
// or a replay in that order would give something else.
func TestNumbersAreInTheOrderOfEffects(t *testing.T) {
	for _, linux := range []bool{false, true} {
		o := Options{FS: &lateFS{mem()}, SegShift: 14}
		if linux {
			o = Options{Dir: t.TempDir(), SegShift: 14}
		}
		g := open(t, o)
		const files = 40
		type done struct {
			transno uint64
			off     uint64
			b       []byte
		}
		var mu sync.Mutex
		var all [files][]done
		var wg sync.WaitGroup
		for w := range 8 {
			c := remote(t, g, byte(w+1))
			wg.Go(func() {
				for i := range files {
					// Across the border of two segments.
					off := uint64(16384 - 4000 + 500*(w%3))
					b := bytes.Repeat([]byte{byte(1 + w + 8*i)}, 6000)
					rep := do(t, g, writeOf(c, uint64(i+1), fid(uint32(i)), off, string(b)))
					mu.Lock()
					all[i] = append(all[i], done{rep.Transno, off, b})
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		for i := range files {
			want := make([]byte, 30000)
			newest := make([]uint64, len(want))
			for _, d := range all[i] {
				for i, v := range d.b {
					if at := d.off + uint64(i); newest[at] < d.transno {
						newest[at], want[at] = d.transno, v
					}
				}
			}
			got, rep := read(g, fid(uint32(i)), 0, len(want))
			if rep.Status != wire.OK || !bytes.Equal(got, want[:len(got)]) {
				t.Fatalf("linux %v: the content of file %d is not that of the newest numbers", linux, i)
			}
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Objects that one client writes, or those in this process, cost one sync for a
// stable write; those that several write cost a second, and only when a flush has
// something of both to cover.
func TestSyncsOfSharedObjects(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m})
	a, b := remote(t, g, 1), remote(t, g, 2)
	xid := uint64(0)
	stable := func(c *recov.ClientRecord, f wire.FID) int64 {
		before := m.Syncs()
		if c == nil {
			want(t, write(g, f, 0, []byte("x"), wire.FileSync), wire.OK)
		} else {
			xid++
			q := writeOf(*c, xid, f, 0, "x")
			q.Stable = wire.FileSync
			do(t, g, q)
		}
		return m.Syncs() - before
	}
	var got []int64
	for _, x := range []struct {
		c *recov.ClientRecord
		f uint32
	}{{nil, 1}, {nil, 1}, {&a, 2}, {&a, 2}, {&b, 2}, {&b, 2}, {nil, 2}, {nil, 2}, {&a, 2}, {&a, 1}, {&a, 1}} {
		got = append(got, stable(x.c, fid(x.f)))
	}
	if d := cmp.Diff([]int64{1, 1, 1, 1, 2, 1, 2, 1, 2, 2, 1}, got); d != "" {
		t.Fatal(d)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// A reopened object remembers that somebody may replay what was done to it.
func TestSharedObjectIsReopened(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m, MaxOpenFiles: 16})
	a, b := remote(t, g, 1), remote(t, g, 2)
	do(t, g, writeOf(a, 1, fid(1), 0, "replayed"))
	old := do(t, g, writeOf(a, 2, fid(1), 0, "again   "))
	if err := g.Commit(); err != nil {
		t.Fatal(err)
	}
	for i := range uint32(200) {
		want(t, write(g, fid(1000+i*64), 0, []byte("x"), wire.FileSync), wire.OK)
	}
	if o := g.table.peek(objKey{fid: fid(1)}); o != nil {
		t.Fatal("the object is still open")
	}
	q := writeOf(b, 1, fid(1), 0, "durable!")
	q.Stable = wire.FileSync
	do(t, g, q)
	m = powerless(g, m)
	g = openOnly(t, Options{FS: m, BootID: "b2"})
	rep, res := execute(g, writeOf(a, 2, fid(1), 0, "again   "), front.Exec{Transno: old.Transno})
	if rep.Status != wire.OK || res.Transno != old.Transno || rep.Count != 8 {
		t.Fatalf("%+v", rep)
	}
	content(t, g, fid(1), "durable!")
	g.Close()
}

// holdSync holds one sync.
type holdSync struct {
	*objfs.Mem
	hold             atomic.Bool
	entered, release chan struct{}
}

func (f *holdSync) Fdatasync(fd int) error {
	if f.hold.Swap(false) {
		close(f.entered)
		<-f.release
	}
	return f.Mem.Fdatasync(fd)
}

// A truncate that comes while the one before it is being flushed is durable with
// it, and with what was written in between, or their flush does not count.
func TestTruncateDuringAFlush(t *testing.T) {
	m := mem()
	slow := &holdSync{Mem: m, entered: make(chan struct{}), release: make(chan struct{})}
	g := open(t, Options{FS: slow, SegShift: 13})
	c := remote(t, g, 1)
	do(t, g, writeOf(c, 1, fid(1), 0, string(bytes.Repeat([]byte("a"), 30000))))
	cut := func(xid, size, log uint64) *wire.Request {
		q := writeOf(c, xid, fid(1), 0, "")
		q.Op, q.Size, q.LogID, q.Bulk = wire.OpPunch, size, log, nil
		return q
	}
	do(t, g, cut(2, 20000, 5))
	slow.hold.Store(true)
	rep, synced := &wire.Reply{}, make(chan struct{})
	g.Handle(&wire.Request{Header: wire.Header{Op: wire.OpSyncObject}, FID: fid(1)}, rep, func() { close(synced) })
	<-slow.entered
	// The file becomes longer again, in segments that the flush does not know.
	do(t, g, cut(3, 100, 6))
	do(t, g, writeOf(c, 4, fid(1), 25000, "b"))
	last := do(t, g, cut(5, 26000, 7))
	close(slow.release)
	<-synced
	if rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	want := append(bytes.Repeat([]byte("a"), 100), make([]byte, 25900)...)
	want[25000] = 'b'
	for seed := range uint64(20) {
		g := openOnly(t, Options{FS: m.CrashClone(seed), BootID: "b2", SegShift: 13})
		// Neither its replay nor its log do anything, nor does that of the older one.
		if rep, _ := execute(g, cut(3, 100, 6), front.Exec{Transno: last.Transno - 2}); rep.Status != wire.OK {
			t.Fatal(rep.Status)
		}
		g.Begin(0)
		for log := range uint64(8) {
			if rep := punch(g, fid(1), 1, log+1); log < 7 && rep.Obj.Size != 26000 {
				t.Fatalf("seed %d: log %d cuts to %d", seed, log+1, rep.Obj.Size)
			}
			if log == 6 {
				if got, _ := read(g, fid(1), 0, 30000); !bytes.Equal(got, want) {
					t.Fatalf("seed %d: %d bytes, or other ones", seed, len(got))
				}
			}
		}
		g.Close()
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// A replay that cannot be executed is not lost silently.
func TestReplayFails(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m})
	c := remote(t, g, 1)
	w := do(t, g, writeOf(c, 1, fid(1), 0, "data"))
	m = powerless(g, m)
	g = openOnly(t, Options{FS: m, BootID: "b2"})
	q := writeOf(c, 1, fid(1), 0, "data")
	for _, x := range []struct {
		e        unix.Errno
		st       wire.Status
		mismatch bool
	}{{unix.EMFILE, wire.ErrRecovering, false}, {unix.EIO, wire.ErrIO, true}, {unix.ENOSPC, wire.ErrNoSpc, true}} {
		m.FailOpen(x.e)
		rep, res := execute(g, q, front.Exec{Transno: w.Transno})
		if rep.Status != x.st || res.Status != x.st || res.Mismatch != x.mismatch || res.NotDone == x.mismatch {
			t.Errorf("%v: %v %+v", x.e, rep.Status, res)
		}
	}
	m.FailOpen(nil)
	if rep, _ := execute(g, q, front.Exec{Transno: w.Transno}); rep.Status != wire.OK {
		t.Fatal(rep.Status)
	}
	content(t, g, fid(1), "data")
	// Twice in one recovery: it is known.
	if rep, res := execute(g, q, front.Exec{Transno: w.Transno}); rep.Status != wire.OK || res.Transno != w.Transno {
		t.Fatalf("%+v", rep)
	}
	abandon(g)
	g.closeFiles()
	if !errors.Is(g.Learn(&wire.OSTInfo{}), wire.ErrTargetDown) {
		t.Fatal("learnt after its end")
	}
}
