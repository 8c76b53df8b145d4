package mdt

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

var clientA, clientB = wire.ClientID{'A'}, wire.ClientID{'B'}

// served is a target that serves clients A and B, with everything durable and the
// log held from here on.
func served(t testing.TB, o Options) *body {
	b := newBody(t, o)
	b.begin(0)
	b.put(clientA, 1)
	b.put(clientB, 1)
	b.sync()
	b.e.hold()
	return b
}

var lastXID atomic.Uint64

func reqOf(id wire.ClientID, op wire.Op, dir wire.FID, name string) *wire.Request {
	return &wire.Request{
		Header: wire.Header{Op: op, Client: id, ClientGen: 1, XID: lastXID.Add(1)},
		FID:    dir, Name: []byte(name), SetAttr: mode(0o644),
	}
}

func nfsKey(n uint32) wire.ReplyKey {
	return wire.ReplyKey{Addr: [16]byte{10}, Port: 700, XID: n, Proc: 100003<<8 | 8, Sum: uint64(n)}
}

// TestAdmission: who may not execute anything is told so, and nothing is kept of
// it, so that it can ask again.
func TestAdmission(t *testing.T) {
	b := served(t, Options{})
	b.e.allow()
	ch := make(chan error, 1)
	b.m.RaiseVIP(5, 3, func(err error) { ch <- err })
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
	_, before := b.e.ends()
	for _, c := range []struct {
		want wire.Status
		edit func(r *wire.Request)
	}{
		{wire.ErrStaleVIP, func(r *wire.Request) { r.VIP, r.VIPEpoch = 5, 2 }},
		{wire.ErrStaleClient, func(r *wire.Request) { r.ClientGen = 0 }},
		{wire.ErrUnknownClient, func(r *wire.Request) { r.ClientGen = 2 }},
		{wire.ErrUnknownClient, func(r *wire.Request) { r.Client = wire.ClientID{'X'} }},
	} {
		r := reqOf(clientA, wire.OpCreate, wire.RootFID, "a")
		c.edit(r)
		if e := b.execute(r, front.Exec{KeepSlot: true}); e.rep.Status != c.want || e.res.Status != c.want || !e.res.NotDone || e.res.Transno != 0 {
			t.Errorf("want %v: %v %+v", c.want, e.rep.Status, e.res)
		}
	}
	if _, n := b.e.ends(); n != before {
		t.Errorf("%d batches were written", n-before)
	}
	r := reqOf(clientA, wire.OpCreate, wire.RootFID, "a")
	r.VIP, r.VIPEpoch = 5, 3
	b.ok(r, execOf(r))
	b.m.Fail(errors.New("test"))
	if e := b.start(r, front.Exec{}, false); e.rep.Status != wire.ErrTargetDown || !e.res.NotDone {
		t.Errorf("after a failure: %v %+v", e.rep.Status, e.res)
	}
}

// TestExecutedInOrder: Executed is called in the order of transnos, whoever
// executes; Done after it, and when it asks for that, or the request, not before
// the operation is durable.
func TestExecutedInOrder(t *testing.T) {
	b := served(t, Options{})
	var mu sync.Mutex
	var order []uint64
	var wg sync.WaitGroup
	var waiting []*outcomeOf
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := range 50 {
				r := reqOf(clientA, wire.OpMkdir, wire.RootFID, fmt.Sprintf("%d.%d", i, n))
				e := &orderOf{outcomeOf{t: t, done: make(chan struct{}), wait: n%3 == 0}, func(tr uint64) {
					mu.Lock()
					order = append(order, tr)
					mu.Unlock()
				}}
				if n%5 == 0 {
					r.Flags |= wire.FlagWaitCommit
				}
				b.m.Execute(r, &e.rep, front.Exec{}, e)
				if now := n%3 != 0 && n%5 != 0; now != e.ended() {
					t.Errorf("request %d.%d is answered: %v", i, n, !now)
				} else if !now {
					mu.Lock()
					waiting = append(waiting, &e.outcomeOf)
					mu.Unlock()
				}
			}
		}()
	}
	wg.Wait()
	if len(order) != 400 {
		t.Fatalf("Executed %d times", len(order))
	}
	for i, tr := range order {
		if tr != order[0]+uint64(i) {
			t.Fatalf("Executed with %d after %d", tr, order[i-1])
		}
	}
	for _, e := range waiting {
		if e.ended() {
			t.Fatal("answered before it is durable")
		}
	}
	b.e.allow()
	for _, e := range waiting {
		<-e.done
		if e.rep.Status != wire.OK || e.rep.LastCommitted < e.rep.Transno {
			t.Fatalf("%v, transno %d, durable %d", e.rep.Status, e.rep.Transno, e.rep.LastCommitted)
		}
	}
}

type orderOf struct {
	outcomeOf
	note func(transno uint64)
}

func (e *orderOf) Executed(res recov.Result) bool {
	e.note(res.Transno)
	return e.outcomeOf.Executed(res)
}

// TestHeld: what could not be replayed is answered when it is durable, though
// nobody asked for that.
func TestHeld(t *testing.T) {
	b := served(t, Options{})
	open := func(id wire.ClientID, name string) wire.FID {
		t.Helper()
		r := reqOf(id, wire.OpCreate, wire.RootFID, name)
		r.Flags |= wire.FlagOpenEpoch
		return b.ok(r, execOf(r)).rep.Attr.FID
	}
	held := func(name string, r *wire.Request, want bool) *outcomeOf {
		t.Helper()
		e := b.start(r, execOf(r), false)
		if e.ended() == want || e.res.Held != want {
			t.Errorf("%s: answered %v, %+v", name, e.ended(), e.res)
		}
		// Only for what waits: else the next would find everything durable.
		if !e.ended() {
			b.e.allow()
			<-e.done
			b.e.hold()
		}
		if want && e.rep.LastCommitted < e.res.Transno {
			t.Errorf("%s: transno %d, durable %d", name, e.res.Transno, e.rep.LastCommitted)
		}
		return e
	}
	closes := func(id wire.ClientID, fids ...wire.FID) *wire.Request {
		r := reqOf(id, wire.OpCloseEpoch, wire.FID{}, "")
		for _, f := range fids {
			r.Epochs = append(r.Epochs, wire.EpochClose{FID: f, Size: 5})
		}
		return r
	}

	// The answer of a reply record, and of an exclusive create that was made before,
	// are somebody else's work (RV 12a: nobody may build on it before it is durable).
	r := reqOf(clientA, wire.OpCreate, wire.RootFID, "a")
	r.Key = nfsKey(1)
	first := held("a create", r, false)
	again := reqOf(clientB, wire.OpCreate, wire.RootFID, "a")
	again.Key = r.Key
	if e := held("a retransmission by another client", again, true); e.res.Transno != first.rep.Transno || !e.rep.Reconstructed {
		t.Errorf("%+v", e.res)
	}
	y := reqOf(clientA, wire.OpCreate, wire.RootFID, "y")
	y.How, y.Verf = wire.Exclusive, [8]byte{8}
	made := held("an exclusive create", y, false)
	y2 := *y
	y2.Client, y2.XID = clientB, lastXID.Add(1)
	if e := held("an exclusive create again", &y2, true); e.res.Transno != made.rep.Transno || e.rep.Transno != 0 || e.rep.Attr.FID != made.rep.Attr.FID {
		t.Errorf("%+v", e.res)
	}

	f1, f2 := open(clientA, "f1"), open(clientA, "f2")
	held("a close", closes(clientA, f1, f2), false)
	held("a close of nothing", closes(clientA, f1), false)
	f1 = open(clientA, "g1")
	held("a close that skips a file", closes(clientA, f1, f2), true)
	var five []wire.FID
	for i := range 5 {
		five = append(five, open(clientA, fmt.Sprint("h", i)))
	}
	held("a close of five", closes(clientA, five...), true)
	f1 = open(clientA, "i")
	b.ok(reqOf(clientB, wire.OpOpenEpoch, f1, ""), front.Exec{})
	b.m.DelClient(clientB, 1, false)
	if e := held("a close for a client that is gone", closes(clientA, f1), true); e.rep.Count != 1 {
		t.Errorf("closed %d", e.rep.Count)
	}

	b.put(clientB, 2)
	l := lockReq(wire.OpLock, f1, testOwner(1, 1), 0, 9, true, false)
	l.Client, l.ClientGen, l.VIP = clientA, 1, 0
	held("a lock", l, true)
	l = lockReq(wire.OpLock, f1, testOwner(2, 1), 0, 9, true, false)
	l.Client, l.ClientGen, l.VIP = clientA, 1, 0
	if e := held("a lock that is denied", l, false); e.rep.Status != wire.ErrLockDenied || e.res.Transno != 0 {
		t.Errorf("%v %+v", e.rep.Status, e.res)
	}
}

// TestCloseForTheGone: nobody closes the epoch of a client that was evicted before
// all OSTs refuse its late writes; of one that is only not known any more anybody
// does; and a replay closes nobody else's.
func TestCloseForTheGone(t *testing.T) {
	b := served(t, Options{})
	r := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	r.Flags |= wire.FlagOpenEpoch
	f := b.ok(r, execOf(r)).rep.Attr.FID
	b.ok(reqOf(clientB, wire.OpOpenEpoch, f, ""), front.Exec{})
	closeA := func() *wire.Request {
		r := reqOf(clientA, wire.OpCloseEpoch, wire.FID{}, "")
		r.Epochs = []wire.EpochClose{{FID: f, Size: 7}}
		return r
	}
	opens := func(want uint16) {
		t.Helper()
		in, err := ReadInode(b.e, f)
		if err != nil || in.Opens != want {
			t.Fatalf("%d epochs open, want %d (%v)", in.Opens, want, err)
		}
	}
	b.sync()
	n, _ := b.e.ends()
	first := closeA()
	k := b.ok(first, execOf(first))
	opens(1)
	b.crash(n) // with B in the table again
	b.m.DelClient(clientB, 1, false)
	if e := b.replay(replayOf(first, &k.rep)); e.res.Mismatch {
		t.Fatalf("replay of the close: %v", e.rep.Status)
	}
	opens(1)

	b.crash(n)
	b.begin(0)
	b.m.DelClient(clientB, 1, true)
	b.ok(closeA(), front.Exec{})
	opens(1)
	b.sync()
	p := b.m.PendingFences()
	if len(p) != 1 || len(p[0].OSTs) != 3 {
		t.Fatalf("fences: %+v", p)
	}
	for i, o := range p[0].OSTs {
		r := closeA()
		if i == 2 {
			b.ok(reqOf(clientA, wire.OpOpenEpoch, f, ""), front.Exec{})
			b.ok(r, front.Exec{})
			opens(1)
		}
		if err := b.m.FenceDone(clientB, p[0].Tenure, o); err != nil {
			t.Fatal(err)
		}
	}
	b.ok(closeA(), front.Exec{})
	opens(0)
}

// TestNumbersAreNeverGivenAgain: Begin goes beyond what anybody was told, also of
// what a crash has taken, wherever the crash is; before it nothing new is executed
// (RD 0a, RS 0d: who comes back has seen higher numbers).
func TestNumbersAreNeverGivenAgain(t *testing.T) {
	b := served(t, Options{})
	given := map[uint64]bool{}
	var told uint64
	use := func(n int) {
		t.Helper()
		for i := range n {
			e := b.ok(reqOf(clientA, wire.OpMkdir, wire.RootFID, fmt.Sprintf("%d.%d", told, i)), front.Exec{})
			if given[e.rep.Transno] {
				t.Fatalf("transno %d is given twice", e.rep.Transno)
			}
			given[e.rep.Transno] = true
			told = e.rep.Transno
		}
	}
	use(20)
	for round := range 6 {
		d, n := b.e.ends()
		b.crash(d + (n-d)*round/6)
		tab, err := b.m.Table()
		if err != nil || tab.Transno > told {
			t.Fatal(tab.Transno, told, err)
		}
		rep := &wire.Reply{}
		b.m.Handle(reqOf(clientA, wire.OpMkdir, wire.RootFID, "early"), rep, func() {})
		if rep.Status != wire.ErrRecovering {
			t.Fatalf("before Begin: %v", rep.Status)
		}
		if round%2 == 0 {
			// The next crash comes before anything else is durable.
			b.begin(told)
			d, _ = b.e.ends()
			use(3)
			b.crash(d)
		}
		b.begin(told)
		if b.m.LastCommitted() <= told {
			t.Fatalf("durable up to %d, told were %d", b.m.LastCommitted(), told)
		}
		use(5)
	}
	// Far ahead of the log, as of a store that has lost much.
	b.crash(0)
	b.begin(told + 1<<35)
	b.put(clientA, 1)
	use(1)
	if told <= 1<<35 {
		t.Error(told)
	}
}

// TestFIDSequenceIsDurable: a sequence that is taken while the target runs is not
// taken again by the next start, whatever the crash has taken.
func TestFIDSequenceIsDurable(t *testing.T) {
	b := served(t, Options{})
	b.m.fidOID = 1<<32 - 1
	b.e.allow() // a sequence is durable before it is used
	e := b.ok(reqOf(clientA, wire.OpCreate, wire.RootFID, "a"), front.Exec{})
	f := e.rep.Attr.FID
	d, n := b.e.ends()
	for cut := d; cut <= n; cut++ {
		c := &body{t: t, e: b.e.cut(cut), o: b.o, now: b.now}
		c.open()
		if c.m.startSeq <= f.Seq {
			t.Errorf("%v was given, the next start takes sequence %d", f, c.m.startSeq)
		}
		c.kill()
	}
}

// TestTargetRecord: the instance rises with every start, a clean stop is one only
// when everything was durable, and without a readable record the instance is one
// that nobody has seen.
func TestTargetRecord(t *testing.T) {
	b := served(t, Options{})
	b.e.allow()
	tab, err := b.m.Table()
	if err != nil || tab.Target != (recov.TargetRecord{}) || tab.Instance == 0 || len(tab.Clients) != 2 {
		t.Fatalf("%+v %v", tab, err)
	}
	inst := tab.Instance
	if err := b.m.PutTarget(recov.TargetRecord{Instance: inst, Transno: 9}); err != nil {
		t.Fatal(err)
	}
	b.e.hold()
	b.ok(reqOf(clientA, wire.OpCreate, wire.RootFID, "a"), front.Exec{})
	d, _ := b.e.ends()
	b.crash(d)
	if tab, err = b.m.Table(); err != nil || tab.Instance != inst+1 || tab.Target != (recov.TargetRecord{Instance: inst, Transno: 9}) {
		t.Fatalf("after a crash: %+v %v", tab, err)
	}
	b.begin(0)
	e := b.ok(reqOf(clientA, wire.OpCreate, wire.RootFID, "b"), front.Exec{})
	b.e.allow()
	if err := b.m.PutTarget(recov.TargetRecord{Instance: inst + 1, Clean: true, Transno: e.rep.Transno}); err != nil {
		t.Fatal(err)
	}
	d, _ = b.e.ends()
	b.crash(d)
	if tab, err = b.m.Table(); err != nil || !tab.Target.Clean || tab.Transno != e.rep.Transno || tab.Instance != inst+2 {
		t.Fatalf("after a clean stop: %+v %v", tab, err)
	}
	b.begin(0)
	b.m.PutClient(recov.ClientRecord{Client: wire.ClientID{'C'}, Gen: 1, Instance: inst + 70}, nil)
	for _, v := range [][]byte{[]byte("bad"), nil} {
		bt := b.e.NewBatch()
		if bt.Set(keyTarget, v); v == nil {
			bt.Delete(keyTarget)
		}
		if err := b.e.Apply(bt); err != nil {
			t.Fatal(err)
		}
		b.sync()
		d, _ = b.e.ends()
		b.crash(d)
		if tab, err = b.m.Table(); err != nil || tab.Target.Clean || tab.Instance != inst+71 {
			t.Errorf("with record %q: %+v %v", v, tab, err)
		}
		b.begin(0)
	}
	b.m.DelClient(wire.ClientID{'C'}, 1, false)
	b.sync()
	d, _ = b.e.ends()
	for range 20 { // starts whose instance nobody remembers
		b.crash(d)
		d, _ = b.e.ends()
	}
	if tab, err = b.m.Table(); err != nil || tab.Instance <= inst+20 {
		t.Errorf("after 20 starts: %d, %v", tab.Instance, err)
	}
	b.e.hold()
	failed := make(chan error, 1)
	go func() { failed <- b.m.PutTarget(recov.TargetRecord{Instance: 99}) }()
	waitFor(t, func() bool { _, n := b.e.ends(); return n > d })
	b.e.die()
	if err := <-failed; err == nil {
		t.Error("recorded, but not durable")
	}
	if err := b.m.PutTarget(recov.TargetRecord{}); err == nil {
		t.Error("recorded by a failed target")
	}
}

// TestRaiseVIP: an epoch is durable when that is told, and nothing of an older one
// is executed afterwards.
func TestRaiseVIP(t *testing.T) {
	b := served(t, Options{})
	raise := func(epoch uint64) chan error {
		ch := make(chan error, 1)
		b.m.RaiseVIP(4, epoch, func(err error) { ch <- err })
		return ch
	}
	r := reqOf(clientA, wire.OpMkdir, wire.RootFID, "a")
	r.VIP, r.VIPEpoch = 4, 6
	b.ok(r, front.Exec{})
	ch := raise(7)
	if b.m.VIPEpoch(4) != 7 || len(ch) != 0 {
		t.Errorf("epoch %d, told before it is durable: %v", b.m.VIPEpoch(4), len(ch))
	}
	again := raise(7)
	older := raise(2)
	r.Name, r.XID = []byte("b"), lastXID.Add(1)
	if e := b.start(r, front.Exec{}, false); e.rep.Status != wire.ErrStaleVIP {
		t.Errorf("of an older epoch: %v", e.rep.Status)
	}
	if len(again) != 0 || len(older) != 0 {
		t.Error("told before it is durable")
	}
	b.e.allow()
	for _, c := range []chan error{ch, again, older} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
	d, _ := b.e.ends()
	b.crash(d)
	if b.m.VIPEpoch(4) != 7 {
		t.Errorf("after a crash: %d", b.m.VIPEpoch(4))
	}
	if err := <-raise(9); err != nil || b.m.VIPEpoch(4) != 9 { // in recovery
		t.Error(err)
	}
	ch = make(chan error, 1)
	b.m.RaiseVIP(0, 1, func(err error) { ch <- err })
	if err := <-ch; err != wire.ErrProto {
		t.Errorf("no address: %v", err)
	}
	b.begin(0)
	s := reqOf(clientA, wire.OpSetVIPEpoch, wire.FID{}, "")
	s.VIP, s.VIPEpoch = 4, 10
	if e := b.ok(s, front.Exec{}); e.res.Transno != 0 || b.m.VIPEpoch(4) != 10 {
		t.Errorf("%+v", e.res)
	}
	s.VIPEpoch = 3
	if e := b.execute(s, front.Exec{}); e.rep.Status != wire.ErrStaleVIP || e.res.Status != wire.ErrStaleVIP {
		t.Errorf("lower: %v", e.rep.Status)
	}
	b.e.die()
	if err := <-raise(20); err == nil {
		t.Error("raised on a broken engine")
	}
	if err := <-raise(21); err == nil {
		t.Error("raised on a failed target")
	}
}

// TestCommitForRecovery: what recovery asks of the committer.
func TestCommitForRecovery(t *testing.T) {
	b := served(t, Options{})
	e := b.ok(reqOf(clientA, wire.OpMkdir, wire.RootFID, "a"), front.Exec{})
	if b.m.LastCommitted() >= e.rep.Transno {
		t.Fatal("durable at once")
	}
	rep, done := &wire.Reply{}, make(chan struct{})
	if !b.m.WaitCommit(e.rep.Transno, rep, func() { close(done) }) {
		t.Fatal("nothing to wait for")
	}
	b.e.allow()
	<-done
	if rep.Status != wire.OK || b.m.LastCommitted() < e.rep.Transno || b.m.WaitCommit(e.rep.Transno, rep, func() { t.Error("called") }) {
		t.Error(rep.Status, b.m.LastCommitted())
	}
	b.e.hold()
	e = b.ok(reqOf(clientA, wire.OpMkdir, wire.RootFID, "b"), front.Exec{})
	b.m.CommitSoon()
	b.e.allow()
	waitFor(t, func() bool { return b.m.LastCommitted() >= e.rep.Transno })
	b.e.hold()
	e = b.ok(reqOf(clientA, wire.OpMkdir, wire.RootFID, "c"), front.Exec{})
	rep, done = &wire.Reply{}, make(chan struct{})
	b.m.WaitCommit(e.rep.Transno, rep, func() { close(done) })
	b.kill()
	<-done
	if rep.Status != wire.ErrTargetDown {
		t.Errorf("of a target that failed: %v", rep.Status)
	}
}

// TestEngineFailsInExecute: a client is not told an error of an operation whose
// fate nobody knows; it asks the next start.
func TestEngineFailsInExecute(t *testing.T) {
	b := served(t, Options{})
	// What waits is told without the target's locks.
	told := make(chan error, 3)
	look := func(err error) {
		b.m.Tenure(clientA)
		told <- err
	}
	b.m.PutClient(recov.ClientRecord{Client: wire.ClientID{'N'}, Gen: 1}, look)
	b.m.RaiseVIP(3, 1, look)
	before := reqOf(clientA, wire.OpMkdir, wire.RootFID, "before")
	before.Flags |= wire.FlagWaitCommit
	rep := &wire.Reply{}
	b.m.Handle(before, rep, func() { look(rep.Status) })
	b.e.fail.Store(true)
	r := reqOf(clientA, wire.OpMkdir, wire.RootFID, "a")
	r.Flags |= wire.FlagWaitCommit
	e := b.start(r, front.Exec{KeepSlot: true}, true)
	<-e.done
	if e.rep.Status != wire.ErrTargetDown || !e.res.NotDone || e.res.Transno != 0 {
		t.Errorf("%v %+v", e.rep.Status, e.res)
	}
	for range 3 {
		if err := <-told; err == nil || err == wire.OK {
			t.Error("told that it is durable")
		}
	}
	if !b.m.Down() {
		t.Error("the target works on")
	}
}

// TestUpgrade opens a store of an older version: clients without tenures, log
// records without clients, the clean mark in the superblock.
func TestUpgrade(t *testing.T) {
	b := newBody(t, Options{})
	b.begin(0)
	b.put(clientA, 1)
	r := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	r.Flags |= wire.FlagOpenEpoch
	f := b.ok(r, front.Exec{}).rep.Attr
	b.sync()
	bt := b.e.NewBatch()
	bt.Delete(appendClientKey(nil, clientA))
	bt.Set(appendClientKey(nil, clientB), be.AppendUint64([]byte{1}, 17))
	bt.Set(keySuper, append(be.AppendUint64([]byte{1}, b.m.super.NextSeq), 1))
	rec := append(f.FID.Append([]byte{1, byte(LogTruncate)}), 0, 0, 0, 0, 0, 0, 0, 100)
	bt.Set(appendLogKey(nil, 77), appendLayout(rec, &f.Layout))
	if err := b.e.Apply(bt); err != nil {
		t.Fatal(err)
	}
	_, n := b.e.ends()
	b.crash(n)
	tab, err := b.m.Table()
	if err != nil || len(tab.Clients) != 1 || tab.Clients[0] != (recov.ClientRecord{Client: clientB, Gen: 17, Local: true}) {
		t.Fatalf("%+v %v", tab, err)
	}
	if len(b.m.PendingFences()) != 0 {
		t.Error("the client was evicted")
	}
	tenure := b.m.Tenure(clientB)
	if tenure == 0 {
		t.Error("no tenure")
	}
	logs, err := b.m.PendingLogs(0, 10)
	if err != nil || len(logs) != 1 || logs[0] != (LogRec{ID: 77, Kind: LogTruncate, FID: f.FID, Layout: f.Layout, Size: 100}) {
		t.Errorf("logs %+v %v", logs, err)
	}
	// From here on it is in the new form.
	_, n = b.e.ends()
	b.crash(n)
	if got := b.m.Tenure(clientB); got != tenure {
		t.Errorf("tenure %d after another start, was %d", got, tenure)
	}
}

// TestReplayedTimes: what is new after a recovery is newer than what was replayed,
// though the clock is behind.
func TestReplayedTimes(t *testing.T) {
	b := served(t, Options{})
	n, _ := b.e.ends()
	b.now += 30e9
	r := reqOf(clientA, wire.OpMkdir, wire.RootFID, "a")
	k := b.ok(r, front.Exec{})
	b.now -= 30e9
	b.crash(n)
	b.replay(replayOf(r, &k.rep))
	b.begin(0)
	e := b.ok(reqOf(clientA, wire.OpMkdir, wire.RootFID, "b"), front.Exec{})
	if e.rep.Attr.Ctime <= k.rep.Attr.Ctime || e.rep.Time <= k.rep.Time {
		t.Errorf("made at %d, after something of %d", e.rep.Attr.Ctime, k.rep.Attr.Ctime)
	}
	if s, err := ReadState(b.e); err != nil || s.Time < k.rep.Time {
		t.Error(s, err)
	}
	// Files have no directory's time.
	e = b.ok(reqOf(clientA, wire.OpCreate, k.rep.Attr.FID, "c"), front.Exec{})
	if e.rep.Attr.Ctime <= k.rep.Attr.Ctime {
		t.Error("a file older than what was replayed")
	}
}

// TestLocksInRecovery: the lock table's clock stands still until recovery is over,
// since what it changes would need a number.
func TestLocksInRecovery(t *testing.T) {
	b := served(t, Options{})
	b.e.allow()
	s := lockReq(wire.OpLockService, wire.FID{}, testOwner(1, 1), 0, 0, false, false)
	s.Client, s.ClientGen, s.VIPEpoch = clientA, 1, 0
	s.Lock.NSMState, s.Lock.Crashed, s.Lock.Window = 3, true, 1000
	b.ok(s, front.Exec{})
	b.sync()
	_, n := b.e.ends()
	b.crash(n)
	b.now += 1e12
	_, before := b.e.ends()
	if err := b.m.TickLocks(); err != nil {
		t.Fatal(err)
	}
	if _, n := b.e.ends(); n != before {
		t.Error("the lock table changed in recovery")
	}
	b.begin(0)
	_, before = b.e.ends()
	if err := b.m.TickLocks(); err != nil {
		t.Fatal(err)
	}
	if _, n := b.e.ends(); n != before+1 {
		t.Errorf("%d changes of the lock table", n-before)
	}
}

// TestPebbleTwin is TestTwin in small on the real engine, where a crash cuts the
// log anywhere.
func TestPebbleTwin(t *testing.T) {
	fs := vfs.NewCrashableMem()
	open := func(fs vfs.FS) (*MDT, store.Engine) {
		t.Helper()
		e, err := openEngine(fs, "mdt")
		if err != nil {
			t.Fatal(err)
		}
		now := int64(1e9)
		m, err := Open(Options{Engine: e, Clock: func() int64 { now += 1000; return now }, OSTs: threeOSTs})
		if err != nil {
			t.Fatal(err)
		}
		return m, e
	}
	m, e := open(fs)
	m.Begin(0)
	ch := make(chan error, 1)
	m.PutClient(recov.ClientRecord{Client: clientA, Gen: 1, Instance: 1}, func(err error) { ch <- err })
	if err := <-ch; err != nil {
		t.Fatal(err)
	}
	b := &body{t: t, m: m, e: newLogEngine()}
	var kept []*wire.Request
	var first []*outcomeOf
	dir := wire.RootFID
	for i := range 300 {
		r := reqOf(clientA, wire.OpCreate, dir, fmt.Sprint("f", i))
		if i%50 == 0 {
			r.Op = wire.OpMkdir
		}
		x := b.ok(r, execOf(r))
		if i%50 == 0 {
			dir = x.rep.Attr.FID
		}
		kept, first = append(kept, replayOf(r, &x.rep)), append(first, x)
	}
	want := contents(t, e)
	fs = fs.CrashClone(vfs.CrashCloneCfg{})
	_ = m.Close()
	_ = e.Close()
	m, e = open(fs)
	b.m = m
	tab, err := m.Table()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i, k := range kept {
		if k.Transno <= tab.Transno {
			continue
		}
		n++
		if x := b.replay(k); x.res.Mismatch || sameAnswer(&x.rep, &first[i].rep) != "" {
			t.Fatalf("replay %d: %v", k.Transno, x.rep.Status)
		}
	}
	t.Log(n, "of", len(kept), "replayed")
	if d := diffContents(contents(t, e), want); d != "" {
		t.Error(d)
	}
	if tab, err = m.Table(); err != nil || len(tab.Slots) == 0 {
		t.Error(tab, err)
	}
	m.Begin(0)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}
