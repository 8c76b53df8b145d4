package mdt

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// table gives the client table, slots and fences that a start finds.
func (b *body) table() (clients map[wire.ClientID]recov.ClientRecord, slots map[wire.ClientID]int, fences map[wire.ClientID]PendingFence) {
	b.t.Helper()
	tab, err := b.m.Table()
	if err != nil {
		b.t.Fatal(err)
	}
	clients, slots, fences = map[wire.ClientID]recov.ClientRecord{}, map[wire.ClientID]int{}, map[wire.ClientID]PendingFence{}
	for _, c := range tab.Clients {
		clients[c.Client] = c
	}
	for _, s := range tab.Slots {
		slots[s.Client]++
	}
	for _, f := range b.m.PendingFences() {
		fences[f.ID] = f
	}
	return clients, slots, fences
}

// TestEvictionIsWhole cuts the log at every batch: an evicted client has its entry
// and its slots, or neither and a fence, until every OST has answered; a fence is
// told only when the eviction is durable, and no tenure is ever given twice
// (SM 26a, SM 26b, RV 2b: eviction; RD 16).
func TestEvictionIsWhole(t *testing.T) {
	b := newBody(t, Options{})
	b.begin(0)
	b.put(clientA, 1)
	b.put(clientB, 5)
	for i := range 3 {
		r := reqOf(clientB, wire.OpMkdir, wire.RootFID, fmt.Sprint("d", i))
		r.ClientGen, r.Slot = 5, uint16(i)
		b.ok(r, front.Exec{KeepSlot: true})
	}
	tenure := b.m.Tenure(clientB)
	b.sync()
	from, _ := b.e.ends()
	b.e.hold()
	b.m.DelClient(clientB, 4, true) // another life's
	b.m.DelClient(clientB, 5, true)
	if st := b.start(reqOf(clientB, wire.OpMkdir, wire.RootFID, "x"), front.Exec{}, false).rep.Status; st != wire.ErrUnknownClient {
		t.Errorf("an evicted client is answered %v", st)
	}
	if f := b.m.PendingFences(); len(f) != 0 {
		t.Errorf("OSTs are told of an eviction that is not durable: %+v", f)
	}
	b.e.allow()
	<-b.m.FenceWake()
	f := b.m.PendingFences()
	if len(f) != 1 || f[0].ID != clientB || f[0].Tenure != tenure+1 || fmt.Sprint(f[0].OSTs) != "[0 3 7]" {
		t.Fatalf("fences %+v", f)
	}
	back := func() {
		r := recov.ClientRecord{Client: clientB, Gen: 5, Instance: 1}
		ch := make(chan error, 1)
		b.m.PutClient(r, func(err error) { ch <- err })
		if err := <-ch; err != nil {
			t.Fatal(err)
		}
	}
	done := func(tenure uint64, ost uint16) {
		t.Helper()
		if err := b.m.FenceDone(clientB, tenure, ost); err != nil {
			t.Fatal(err)
		}
	}
	done(tenure+1, 3)
	done(tenure+1, 3)
	done(tenure+1, 99)
	back()
	second := b.m.Tenure(clientB)
	if second <= tenure {
		t.Errorf("tenure %d after %d", second, tenure)
	}
	b.m.DelClient(clientB, 5, true) // again, before the first fence is done
	<-b.m.FenceWake()
	done(tenure+1, 0) // an answer to the first
	if f := b.m.PendingFences(); len(f) != 1 || f[0].Tenure != second+1 || len(f[0].OSTs) != 3 {
		t.Errorf("fences %+v", f)
	}
	for _, o := range []uint16{7, 0, 3} {
		done(second+1, o)
	}
	if f := b.m.PendingFences(); len(f) != 0 {
		t.Errorf("fences %+v", f)
	}
	_, told := b.e.ends()
	back()
	last := b.m.Tenure(clientB)
	b.sync()

	_, to := b.e.ends()
	states := map[string]int{}
	for n := from; n <= to; n++ {
		c := &body{t: t, e: b.e.cut(n), o: b.o, now: b.now}
		c.open()
		clients, slots, fences := c.table()
		r, in := clients[clientB]
		f, fenced := fences[clientB]
		switch state := fmt.Sprintf("in=%v slots=%d fence=%d of %d", in, slots[clientB], f.Tenure, len(f.OSTs)); {
		case !in && slots[clientB] > 0, in && slots[clientB] > 0 && fenced, in && r.Gen != 5, !in && !fenced && n < told:
			t.Errorf("cut at %d of %d: %s", n, to, state)
		case fenced && in && f.Tenure > c.m.Tenure(clientB):
			t.Errorf("cut at %d: the fence %d refuses tenure %d", n, f.Tenure, c.m.Tenure(clientB))
		default:
			states[state]++
		}
		// No tenure that anybody was given comes again.
		c.begin(0)
		c.put(clientB, 6)
		if got := c.m.Tenure(clientB); got <= last {
			t.Errorf("cut at %d: tenure %d, %d was given before", n, got, last)
		}
		c.kill()
	}
	for _, want := range []string{
		"in=true slots=3 fence=0 of 0", fmt.Sprintf("in=false slots=0 fence=%d of 3", tenure+1), fmt.Sprintf("in=false slots=0 fence=%d of 2", tenure+1),
		fmt.Sprintf("in=true slots=0 fence=%d of 2", tenure+1), fmt.Sprintf("in=false slots=0 fence=%d of 3", second+1),
		fmt.Sprintf("in=false slots=0 fence=%d of 1", second+1), "in=false slots=0 fence=0 of 0", "in=true slots=0 fence=0 of 0",
	} {
		if states[want] == 0 {
			t.Errorf("never seen: %s (%v)", want, states)
		}
	}
}

// TestClientRecords: an entry that is changed keeps its tenure and slots, that of
// a newer generation gets a new one and none; a failed replay is in it for good.
func TestClientRecords(t *testing.T) {
	b := served(t, Options{})
	r := reqOf(clientA, wire.OpMkdir, wire.RootFID, "d")
	b.ok(r, front.Exec{KeepSlot: true})
	tenure := b.m.Tenure(clientA)
	b.sync()
	_, n := b.e.ends()
	b.crash(n)
	// In recovery, and without being waited for.
	b.m.PutClient(recov.ClientRecord{Client: clientA, Gen: 1, Instance: 1, FailedAt: 77}, nil)
	b.sync()
	_, n = b.e.ends()
	b.crash(n)
	clients, slots, _ := b.table()
	if b.m.Tenure(clientA) != tenure || clients[clientA].FailedAt != 77 || slots[clientA] != 1 {
		t.Errorf("tenure %d, was %d, %+v, %d slots", b.m.Tenure(clientA), tenure, clients[clientA], slots[clientA])
	}
	b.begin(0)
	b.put(clientA, 2)
	clients, slots, fences := b.table()
	if b.m.Tenure(clientA) <= tenure || clients[clientA] != (recov.ClientRecord{Client: clientA, Gen: 2, Instance: 1}) || slots[clientA] != 0 || len(fences) != 0 {
		t.Errorf("tenure %d, was %d, %+v, %d slots", b.m.Tenure(clientA), tenure, clients[clientA], slots[clientA])
	}
	ch := make(chan error, 1)
	b.m.PutClient(recov.ClientRecord{Client: clientA, Gen: 1}, func(err error) { ch <- err })
	if err := <-ch; err != wire.ErrStaleClient {
		t.Errorf("an older generation: %v", err)
	}
	b.e.room = 3
	b.m.PutClient(recov.ClientRecord{Client: wire.ClientID{'N'}, Gen: 1}, func(err error) { ch <- err })
	if err := <-ch; err != wire.ErrNoSpc || b.m.Tenure(wire.ClientID{'N'}) != 0 {
		t.Errorf("on a full disk: %v", err)
	}
	b.m.DelClient(clientA, 2, false)
	if b.m.Tenure(clientA) != 0 || len(b.m.Clients()) != 1 {
		t.Error("still registered")
	}
	b.e.die()
	b.m.PutClient(recov.ClientRecord{Client: clientA, Gen: 3}, func(err error) { ch <- err })
	if err := <-ch; err == nil {
		t.Error("registered on a broken engine")
	}
}

// TestSlots: the newest result of a slot is there after a crash if its operation
// is, and only then; what changed nothing leaves the older one.
func TestSlots(t *testing.T) {
	b := served(t, Options{})
	type slot struct {
		id wire.ClientID
		n  uint16
	}
	var hist []recov.SlotRecord
	rng := rand.New(rand.NewPCG(4, 4))
	from, _ := b.e.ends()
	for i := range 60 {
		id := []wire.ClientID{clientA, clientB}[rng.IntN(2)]
		r := reqOf(id, wire.OpMkdir, wire.RootFID, fmt.Sprint("d", rng.IntN(40)))
		r.Slot = uint16(rng.IntN(3))
		if rng.IntN(4) == 0 {
			r.Op, r.Key = wire.OpCreate, nfsKey(uint32(i+1))
		}
		e := b.execute(r, execOf(r))
		if e.res.Transno != 0 && r.Key.IsZero() {
			hist = append(hist, recov.SlotRecord{Client: id, Gen: 1, Slot: r.Slot, XID: r.XID, Transno: e.res.Transno, Status: e.res.Status, Data: e.res.Data})
		}
	}
	if len(hist) < 15 {
		t.Fatal("too few", len(hist))
	}
	_, to := b.e.ends()
	for n := from; n <= to; n++ {
		c := &body{t: t, e: b.e.cut(n), o: b.o, now: b.now}
		c.open()
		tab, err := c.m.Table()
		if err != nil {
			t.Fatal(err)
		}
		want := map[slot]recov.SlotRecord{}
		for _, r := range hist {
			if r.Transno <= tab.Transno {
				want[slot{r.Client, r.Slot}] = r
			}
		}
		if len(tab.Slots) != len(want) {
			t.Errorf("cut at %d: %d slots, want %d", n, len(tab.Slots), len(want))
		}
		for _, r := range tab.Slots {
			w := want[slot{r.Client, r.Slot}]
			if fmt.Sprint(r) != fmt.Sprint(w) {
				t.Errorf("cut at %d: slot %d is %+v, want %+v", n, r.Slot, r, w)
			}
		}
		c.kill()
	}
}

// TestDamagedTable: damage in the client table costs what is damaged, and nobody
// may write what others believe to be closed.
func TestDamagedTable(t *testing.T) {
	b := served(t, Options{})
	c := wire.ClientID{'C'}
	b.put(c, 1)
	for i, id := range []wire.ClientID{clientA, clientB, c} {
		r := reqOf(id, wire.OpMkdir, wire.RootFID, fmt.Sprint(i))
		b.ok(r, front.Exec{KeepSlot: true})
		r = reqOf(id, wire.OpMkdir, wire.RootFID, fmt.Sprint("x", i))
		r.Slot = 1
		b.ok(r, front.Exec{KeepSlot: true})
	}
	tenureA, tenureB, tenureC := b.m.Tenure(clientA), b.m.Tenure(clientB), b.m.Tenure(c)
	b.sync()
	bt := b.e.NewBatch()
	v, err := b.e.Get(appendClientKey(nil, clientA), nil)
	if err != nil {
		t.Fatal(err)
	}
	v[5] ^= 1 // in the tenure
	bt.Set(appendClientKey(nil, clientA), v)
	bt.Set(append(appendClientKey(nil, clientA), 7), v)
	bt.Set(appendSlotKey(nil, clientB, 0), []byte("bad"))
	bt.Set(appendFenceKey(nil, c), []byte("bad"))
	bt.Set(appendFenceKey(nil, wire.ClientID{'D'}), []byte{1})
	bt.Set(append(appendFenceKey(nil, c), 1), []byte{1})
	if err := b.e.Apply(bt); err != nil {
		t.Fatal(err)
	}
	_, n := b.e.ends()
	b.crash(n)
	clients, slots, fences := b.table()
	if len(clients) != 2 || clients[clientA].Gen != 0 || slots[clientA] != 0 || slots[clientB] != 1 || slots[c] != 2 {
		t.Errorf("%d clients, slots %v", len(clients), slots)
	}
	if len(fences) != 3 || fences[clientA].Tenure <= max(tenureA, tenureB, tenureC) || len(fences[clientA].OSTs) != 3 {
		t.Errorf("fences %+v", fences)
	}
	if f := fences[c]; f.Tenure != tenureC || b.m.Tenure(c) != tenureC {
		t.Errorf("client C of tenure %d: fence %d", tenureC, f.Tenure)
	}
	// It is the same after the next start, and without complaints.
	_, n = b.e.ends()
	b.crash(n)
	if _, _, again := b.table(); fmt.Sprint(again) != fmt.Sprint(fences) {
		t.Errorf("fences %+v, were %+v", again, fences)
	}
	b.begin(0)
	b.put(clientA, 1)
	if b.m.Tenure(clientA) < fences[clientA].Tenure {
		t.Error("the fence refuses the client after it has come back")
	}
}

// TestLocalConnect: clients without a front.
func TestLocalConnect(t *testing.T) {
	b := newBody(t, Options{})
	id := wire.ClientID{'L'}
	connect := func(gen uint64) *wire.Reply {
		return call(b.m, &wire.Request{Header: wire.Header{Op: wire.OpConnect, Client: id, ClientGen: gen}})
	}
	rep := connect(3)
	if rep.Status != wire.OK || rep.Tenure == 0 || rep.Tenure != b.m.Tenure(id) {
		t.Fatalf("%v tenure %d", rep.Status, rep.Tenure)
	}
	if again := connect(3); again.Tenure != rep.Tenure {
		t.Errorf("tenure %d, was %d", again.Tenure, rep.Tenure)
	}
	clients, _, _ := b.table()
	if !clients[id].Local {
		t.Error("recovery would wait for it")
	}
	if old := connect(2); old.Status != wire.ErrStaleClient {
		t.Error(old.Status)
	}
	if newer := connect(4); newer.Tenure <= rep.Tenure {
		t.Errorf("tenure %d after %d", newer.Tenure, rep.Tenure)
	}
	leave := &wire.Request{Header: wire.Header{Op: wire.OpDisconnect, Client: id, ClientGen: 4}}
	if rep := call(b.m, leave); rep.Status != wire.OK || b.m.Tenure(id) != 0 {
		t.Error(rep.Status)
	}
	if rep := call(b.m, leave); rep.Status != wire.ErrUnknownClient {
		t.Error(rep.Status)
	}
	_, n := b.e.ends()
	b.crash(n)
	if clients, _, fences := b.table(); len(clients) != 0 || len(fences) != 0 {
		t.Errorf("%v %v", clients, fences)
	}
}
