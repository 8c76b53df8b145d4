package mdt

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// slotOf is what the machine keeps of a result.
func slotOf(req *wire.Request, e *outcomeOf) *recov.SlotRecord {
	return &recov.SlotRecord{
		Client: req.Client, Gen: req.ClientGen, Slot: req.Slot, XID: req.XID,
		Transno: e.res.Transno, Status: e.res.Status, Data: e.res.Data,
	}
}

func (b *body) rebuild(req *wire.Request, s *recov.SlotRecord) *wire.Reply {
	rep := &wire.Reply{}
	r := *req
	b.m.Rebuild(&r, rep, s)
	return rep
}

// sameRebuilt compares a rebuilt answer with the first one: the same but for the
// attributes from before, and what a client keeps for a replay is the same.
func sameRebuilt(t *testing.T, name string, req *wire.Request, got, first *wire.Reply) {
	t.Helper()
	want := *first
	want.Reconstructed = true
	want.Pre, want.DirPre, want.DirPre2 = wire.PreAttr{}, wire.PreAttr{}, wire.PreAttr{}
	if d := sameAnswer(got, &want); d != "" {
		t.Errorf("%s: %s", name, d)
	}
	sameKept(t, name, req, got, first)
}

func sameKept(t *testing.T, name string, req *wire.Request, got, first *wire.Reply) {
	t.Helper()
	if d := cmp.Diff(replayOf(req, got), replayOf(req, first)); d != "" {
		t.Errorf("%s: kept for a replay: %s", name, d)
	}
}

// TestRebuild loses the answer of every kind of operation and makes it again from
// the slot, from memory and after a crash (RS 39-like resends: a request that was
// executed is answered, not executed again).
func TestRebuild(t *testing.T) {
	b := served(t, Options{RootMode: 0o777})
	b.e.allow()
	type op struct {
		name  string
		req   *wire.Request
		first *outcomeOf
	}
	var ops []op
	do := func(name string, r *wire.Request) *outcomeOf {
		t.Helper()
		b.now += 1000
		r.Slot = uint16(len(ops))
		e := b.execute(r, front.Exec{KeepSlot: true})
		// At once, while nothing else has happened: attributes are today's.
		sameRebuilt(t, name, r, b.rebuild(r, slotOf(r, e)), &e.rep)
		ops = append(ops, op{name, r, e})
		return e
	}
	c := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	c.Flags |= wire.FlagOpenEpoch
	c.Key = nfsKey(1)
	f := do("create", c).rep.Attr.FID
	twice := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	twice.Flags, twice.Key = c.Flags, c.Key
	do("a retransmission, answered from the reply record", twice)
	dr := reqOf(clientA, wire.OpMkdir, wire.RootFID, "d")
	d := do("mkdir", dr).rep.Attr.FID
	s := reqOf(clientA, wire.OpSymlink, d, "s")
	s.Data = []byte("to")
	do("symlink", s)
	n := reqOf(clientA, wire.OpMknod, d, "n")
	n.Type, n.RdevMajor = wire.TypeChr, 5
	do("mknod", n)
	l := reqOf(clientA, wire.OpLink, f, "")
	l.FID2, l.Name2 = d, []byte("l")
	do("link", l)
	mv := reqOf(clientA, wire.OpRename, d, "n")
	mv.FID2, mv.Name2 = wire.RootFID, []byte("n2")
	do("rename", mv)
	cut := reqOf(clientA, wire.OpSetattr, f, "")
	cut.SetAttr = wire.SetAttr{Mask: wire.SetSize, Size: 100}
	log := do("truncate", cut).rep.Truncate.LogID
	b.sync()
	if l, err := b.m.PendingLogs(0, 10); err != nil || len(l) != 1 || l[0].Client != clientA || l[0].ID != log || l[0].FID != f {
		t.Errorf("logs %+v %v", l, err)
	}
	do("chmod", reqOf(clientA, wire.OpSetattr, f, ""))
	again := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	again.SetAttr = wire.SetAttr{Mask: wire.SetSize, Size: 200}
	log2 := do("create of what is there", again).rep.Truncate.LogID
	same := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	do("create without a change", same)
	td := reqOf(clientA, wire.OpTruncateDone, wire.FID{}, "")
	td.LogIDs = []uint64{log, log2}
	do("truncate done", td)
	cl := reqOf(clientA, wire.OpCloseEpoch, wire.FID{}, "")
	cl.Epochs = []wire.EpochClose{{FID: f, Size: 3}}
	if e := do("close", cl); e.rep.Count != 1 {
		t.Fatal("nothing was closed")
	}
	do("open", reqOf(clientA, wire.OpOpenEpoch, f, ""))
	la := reqOf(clientA, wire.OpSetLayout, d, "")
	la.Layout = wire.Layout{StripeSize: 64 << 10, Count: 2}
	do("layout", la)
	do("remove", reqOf(clientA, wire.OpRemove, wire.RootFID, "n2"))
	do("rmdir that fails", reqOf(clientA, wire.OpRmdir, wire.RootFID, "d"))
	do("remove that fails", reqOf(clientA, wire.OpRemove, wire.RootFID, "none"))
	do("create that fails", reqOf(clientB, wire.OpCreate, f, "x"))
	do("setattr without a change", &wire.Request{Header: reqOf(clientA, wire.OpSetattr, f, "").Header, FID: f})
	e := reqOf(clientA, wire.OpMkdir, d, "e")
	do("mkdir below", e)
	do("rmdir", reqOf(clientA, wire.OpRmdir, d, "e"))

	// After a crash from the records of what has changed something.
	b.sync()
	_, end := b.e.ends()
	b.crash(end)
	tab, err := b.m.Table()
	if err != nil {
		t.Fatal(err)
	}
	slots := map[uint16]*recov.SlotRecord{}
	for i := range tab.Slots {
		slots[tab.Slots[i].Slot] = &tab.Slots[i]
	}
	for i, o := range ops {
		r := slots[uint16(i)]
		if changed := o.first.rep.Transno != 0 && !o.first.rep.Reconstructed; changed != (r != nil) {
			t.Errorf("%s: has a record: %v, has changed something: %v", o.name, r != nil, changed)
			continue
		}
		if r == nil {
			continue
		}
		if d := cmp.Diff(r, slotOf(o.req, o.first)); d != "" {
			t.Errorf("%s: %s", o.name, d)
		}
		rep := b.rebuild(o.req, r)
		if rep.Status != o.first.rep.Status || rep.Transno != o.first.rep.Transno || !rep.Reconstructed || rep.Created != o.first.rep.Created || rep.Count != o.first.rep.Count {
			t.Errorf("%s: %+v", o.name, rep)
		}
		if rep.Truncate.LogID != 0 {
			t.Errorf("%s asks for a punch that is done", o.name)
		}
		sameKept(t, o.name, o.req, rep, &o.first.rep)
	}
}

// TestRebuildOfTheGone: an object that was removed before its maker got the answer
// is told all the same, so that the maker can replay what it did.
func TestRebuildOfTheGone(t *testing.T) {
	b := served(t, Options{})
	for _, op := range []wire.Op{wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod} {
		b.sync()
		n, _ := b.e.ends()
		r := reqOf(clientA, op, wire.RootFID, fmt.Sprint("x", op))
		r.Type, r.Data = wire.TypeFifo, []byte("to")
		first := b.ok(r, execOf(r))
		del := reqOf(clientB, wire.OpRemove, wire.RootFID, string(r.Name))
		if op == wire.OpMkdir {
			del.Op = wire.OpRmdir
		}
		gone := b.ok(del, execOf(del))
		got := b.rebuild(r, slotOf(r, first))
		sameKept(t, string(r.Name), r, got, &first.rep)
		if a := &got.Attr; !got.HasAttr || a.FID != first.rep.Attr.FID || a.Nlink != 0 || a.Type != first.rep.Attr.Type || !got.HasDir {
			t.Errorf("op %d: %+v", op, got)
		}
		b.crash(n)
		for _, k := range []*wire.Request{replayOf(r, got), replayOf(del, &gone.rep)} {
			if e := b.replay(k); e.res.Mismatch {
				t.Errorf("replay of op %d: %v", k.Op, e.rep.Status)
			}
		}
		if _, err := ReadEntry(b.e, wire.RootFID, r.Name); err == nil {
			t.Errorf("op %d: it is there", op)
		}
		b.begin(0)
	}
}

// TestRebuildDamaged: of a result that cannot be read the status is left.
func TestRebuildDamaged(t *testing.T) {
	b := served(t, Options{})
	r := reqOf(clientA, wire.OpMkdir, wire.RootFID, "d")
	e := b.ok(r, execOf(r))
	for _, data := range [][]byte{nil, {}, {1}, []byte("garbage garbage garbage garbage garbage"), e.res.Data[:len(e.res.Data)-1]} {
		s := slotOf(r, e)
		s.Data = data
		rep := b.rebuild(r, s)
		if rep.Status != wire.OK || rep.Transno != e.rep.Transno || rep.HasAttr || !rep.HasDir || !rep.Reconstructed || rep.Time != 0 {
			t.Errorf("data %x: %+v", data, rep)
		}
	}
}

// TestRebuildLocks: what can be known of a lock operation.
func TestRebuildLocks(t *testing.T) {
	b := served(t, Options{})
	b.e.allow()
	c := reqOf(clientA, wire.OpCreate, wire.RootFID, "f")
	f := b.ok(c, front.Exec{}).rep.Attr.FID
	do := func(r *wire.Request) (*outcomeOf, *wire.Reply) {
		t.Helper()
		r.Client, r.ClientGen, r.VIPEpoch, r.XID = clientA, 1, 0, lastXID.Add(1)
		e := b.execute(r, front.Exec{})
		got := b.rebuild(r, slotOf(r, e))
		if got.Status != e.rep.Status || got.Transno != e.res.Transno || got.Lock == nil || !got.Reconstructed {
			t.Errorf("op %d: %v, was %v, transno %d, lock %v", r.Op, got.Status, e.rep.Status, got.Transno, got.Lock)
			got.Lock = &wire.LockReply{}
		}
		return e, got
	}
	s := lockReq(wire.OpLockService, wire.FID{}, testOwner(1, 1), 0, 0, false, false)
	s.Lock.NSMState = 1
	if e, got := do(s); got.Lock.Service != e.rep.Lock.Service || got.Lock.Service.NSMState != 1 {
		t.Errorf("service %+v, was %+v", got.Lock, e.rep.Lock)
	}
	do(lockReq(wire.OpLock, f, testOwner(1, 1), 0, 9, true, false))
	if e, got := do(lockReq(wire.OpLock, f, testOwner(2, 1), 5, 6, true, false)); e.rep.Status != wire.ErrLockDenied || got.Lock.Holder.Owner != e.rep.Lock.Holder.Owner {
		t.Errorf("%v, holder %+v", e.rep.Status, got.Lock.Holder)
	}
	do(lockReq(wire.OpLock, f, testOwner(2, 1), 5, 6, true, true))
	if e, got := do(lockReq(wire.OpLockFree, wire.FID{}, testOwner(1, 1), 0, 0, false, false)); e.rep.Lock.Freed != 1 || got.Lock.Freed != 1 {
		t.Errorf("freed %d, was %d", got.Lock.Freed, e.rep.Lock.Freed)
	}
	r := lockReq(wire.OpUnlock, f, testOwner(2, 1), 0, 99, false, false)
	do(r)
	r.Lock = nil
	if got := b.rebuild(r, &recov.SlotRecord{Status: wire.OK}); got.Lock == nil {
		t.Error("without a body")
	}
}
