package lockd

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// fakeTable is a lock table for tests: whole ranges only, no records, no
// deadlocks.
type fakeTable struct {
	mu      sync.Mutex
	next    uint64
	entries []*fakeEntry
	records map[fakeKey]wire.Status
	poll    func()
	pollRep *wire.Reply
	pollAt  uint64
	// executed counts requests that were not answered from a record, by Op.
	executed map[wire.Op]int
	freed    []wire.LockArgs
	freeCk   []uint64
	outcomes []fakeOutcome
	last     wire.LockArgs
	lastReq  wire.Request
	// force gives statuses instead of executing; hold delays answers until closed.
	force map[wire.Op]wire.Status
	// evict counts answers that are lost with the frontend's eviction.
	evict map[wire.Op]int
	hold  map[wire.Op]chan struct{}
	holds map[wire.Op]int // requests being delayed
	pages int
}

type fakeKey struct {
	addr [16]byte
	xid  uint32
	proc uint32
	sum  uint64
}

type fakeOutcome struct {
	ID  uint64
	Out wire.GrantOutcome
}

type fakeEntry struct {
	id, seq uint64
	fid     wire.FID
	args    wire.LockArgs
	state   wire.LockState
	share   bool
}

func newFakeTable() *fakeTable {
	return &fakeTable{
		next: 1, records: map[fakeKey]wire.Status{}, executed: map[wire.Op]int{},
		force: map[wire.Op]wire.Status{}, evict: map[wire.Op]int{}, hold: map[wire.Op]chan struct{}{}, holds: map[wire.Op]int{},
	}
}

func (t *fakeTable) Call(_ context.Context, o client.Owner, req *wire.Request, rep *wire.Reply) {
	done := make(chan struct{})
	t.Submit(o, req, rep, func() { close(done) })
	<-done
}

func (t *fakeTable) Submit(o client.Owner, req *wire.Request, rep *wire.Reply, done func()) {
	t.mu.Lock()
	req.VIP = o.VIP
	if ch := t.hold[req.Op]; ch != nil {
		t.holds[req.Op]++
		t.mu.Unlock()
		go func() {
			<-ch
			t.mu.Lock()
			t.execute(req, rep, done)
		}()
		return
	}
	t.execute(req, rep, done)
}

// execute runs with t.mu held and gives it back.
func (t *fakeTable) execute(req *wire.Request, rep *wire.Reply, done func()) {
	rep.Lock = &wire.LockReply{}
	if req.Op == wire.OpLockPoll {
		t.serve(req, rep, done)
		return
	}
	k := fakeKey{req.Key.Addr, req.Key.XID, req.Key.Proc, req.Key.Sum}
	st, found := t.records[k]
	forced, isForced := t.force[req.Op]
	switch {
	case isForced:
		st = forced
	case found && !req.Key.IsZero():
		rep.Reconstructed = true
	default:
		st = t.run(req, rep)
		if !req.Key.IsZero() {
			t.records[k] = st
		}
	}
	rep.Status = st
	if t.evict[req.Op] > 0 {
		t.evict[req.Op]--
		rep.Status = wire.ErrUnknownClient
	}
	old := t.wake()
	t.mu.Unlock()
	done()
	if old != nil {
		old()
	}
}

func (t *fakeTable) serve(req *wire.Request, rep *wire.Reply, done func()) {
	old := t.poll
	t.poll = nil
	if st, ok := t.force[wire.OpLockPoll]; ok {
		rep.Status = st
		t.mu.Unlock()
		done()
		return
	}
	if req.Cookie+1 != 0 {
		t.poll, t.pollRep, t.pollAt = done, rep, req.Cookie
		done = t.wake()
	}
	t.mu.Unlock()
	if old != nil {
		old()
	}
	if done != nil {
		done()
	}
}

// wake gives the parked poll its grants if there are any.
func (t *fakeTable) wake() func() {
	if t.poll == nil {
		return nil
	}
	for _, e := range t.entries {
		if e.state == wire.LockGrantPending && e.seq > t.pollAt {
			t.pollRep.Lock.Grants = append(t.pollRep.Lock.Grants, wire.LockGrant{
				Seq: e.seq, ID: e.id, FID: e.fid, Owner: e.args.Owner, Range: e.args.Range, Exclusive: e.args.Exclusive, Note: e.args.Note,
			})
		}
	}
	if len(t.pollRep.Lock.Grants) == 0 {
		return nil
	}
	slices.SortFunc(t.pollRep.Lock.Grants, func(a, b wire.LockGrant) int { return int(a.Seq) - int(b.Seq) })
	p := t.poll
	t.poll = nil
	return p
}

func (t *fakeTable) id() uint64 { t.next++; return t.next }

func (t *fakeTable) conflict(fid wire.FID, a *wire.LockArgs) *fakeEntry {
	for _, e := range t.entries {
		if !e.share && e.fid == fid && e.state != wire.LockWaiting && e.args.Owner != a.Owner && e.args.Range.Overlaps(a.Range) && (e.args.Exclusive || a.Exclusive) {
			return e
		}
	}
	return nil
}

// each removes the entries that f says.
func (t *fakeTable) each(f func(*fakeEntry) bool) (n int) {
	t.entries = slices.DeleteFunc(t.entries, func(e *fakeEntry) bool {
		if f(e) {
			n++
			return true
		}
		return false
	})
	for _, e := range t.entries {
		if e.state == wire.LockWaiting && t.conflict(e.fid, &e.args) == nil {
			e.state, e.seq = wire.LockGrantPending, t.id()
		}
	}
	return n
}

func (t *fakeTable) run(req *wire.Request, rep *wire.Reply) wire.Status {
	t.executed[req.Op]++
	a := *req.Lock
	a.Note = append([]byte(nil), a.Note...)
	t.last, t.lastReq = a, *req
	switch req.Op {
	case wire.OpLockTest, wire.OpLock:
		for _, e := range t.entries {
			if req.Op == wire.OpLock && !e.share && e.fid == req.FID && e.args.Owner == a.Owner && e.args.Range == a.Range && e.state != wire.LockWaiting {
				e.state = wire.LockGranted
				return wire.OK
			}
		}
		if e := t.conflict(req.FID, &a); e != nil {
			rep.Lock.Holder = wire.LockHolder{ID: e.id, Owner: e.args.Owner, Range: e.args.Range, Exclusive: e.args.Exclusive}
			if req.Op == wire.OpLock && a.Block {
				t.entries = append(t.entries, &fakeEntry{id: t.id(), fid: req.FID, args: a, state: wire.LockWaiting})
				return wire.ErrLockBlocked
			}
			return wire.ErrLockDenied
		}
		if req.Op == wire.OpLock {
			t.entries = append(t.entries, &fakeEntry{id: t.id(), fid: req.FID, args: a, state: wire.LockGranted})
		}
	case wire.OpUnlock:
		t.each(func(e *fakeEntry) bool {
			return !e.share && e.fid == req.FID && e.args.Owner == a.Owner && a.Range.Contains(e.args.Range)
		})
	case wire.OpLockCancel:
		if t.each(func(e *fakeEntry) bool {
			return e.fid == req.FID && e.args.Owner == a.Owner && e.args.Range == a.Range && e.state != wire.LockGranted
		}) == 0 {
			return wire.ErrLockDenied
		}
	case wire.OpShare:
		for _, e := range t.entries {
			if e.share && e.fid == req.FID && e.args.Owner != a.Owner && (e.args.ShareMode&a.ShareAccess != 0 || a.ShareMode&e.args.ShareAccess != 0) {
				return wire.ErrLockDenied
			}
		}
		t.entries = append(t.entries, &fakeEntry{id: t.id(), fid: req.FID, args: a, share: true, state: wire.LockGranted})
	case wire.OpUnshare:
		t.each(func(e *fakeEntry) bool { return e.share && e.fid == req.FID && e.args.Owner == a.Owner })
	case wire.OpLockFree:
		t.freed = append(t.freed, a)
		t.freeCk = append(t.freeCk, req.Cookie)
		t.each(func(e *fakeEntry) bool {
			h := e.args.Owner.LockHost
			return h.Addr == a.Owner.Addr && (a.Owner.Name == "" || h.Name == a.Owner.Name)
		})
	case wire.OpLockGrantDone:
		t.outcomes = append(t.outcomes, fakeOutcome{a.ID, a.Grant})
		for _, e := range t.entries {
			if e.id == a.ID && e.state == wire.LockGrantPending && e.args.Owner.LockHost == a.Owner.LockHost {
				e.state = wire.LockGranted
				if a.Grant != wire.GrantAccepted {
					t.each(func(x *fakeEntry) bool { return x == e })
				}
				break
			}
		}
	case wire.OpLockList:
		t.pages++
		for _, e := range t.entries {
			if e.id > req.Cookie {
				rep.Lock.Locks = append(rep.Lock.Locks, wire.LockHolder{ID: e.id, FID: e.fid, Owner: e.args.Owner, State: e.state, Share: e.share})
			}
		}
		slices.SortFunc(rep.Lock.Locks, func(a, b wire.LockHolder) int { return int(a.ID) - int(b.ID) })
		rep.EOF = len(rep.Lock.Locks) <= 2 // short pages
		rep.Lock.Locks = rep.Lock.Locks[:min(2, len(rep.Lock.Locks))]
	}
	return wire.OK
}

// states gives the states of a file's entries by the owner's svid.
func (t *fakeTable) states(fid wire.FID) map[uint32]wire.LockState {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := map[uint32]wire.LockState{}
	for _, e := range t.entries {
		if e.fid == fid {
			m[e.args.Owner.Svid] = e.state
		}
	}
	return m
}

func (t *fakeTable) count(op wire.Op) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.executed[op]
}

func (t *fakeTable) results() []fakeOutcome {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.outcomes)
}

func (t *fakeTable) setForce(op wire.Op, st wire.Status) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if st == wire.OK {
		delete(t.force, op)
	} else {
		t.force[op] = st
	}
}

// fakeFiles knows the handles "file0" to "file9".
type fakeFiles struct{}

func fileFID(n byte) wire.FID { return wire.FID{Seq: 2, OID: uint32(n)} }

func (fakeFiles) LockFile(_ *sunrpc.Call, fh []byte) (wire.FID, wire.Status) {
	switch s := string(fh); {
	case len(s) == 5 && s[:4] == "file":
		return fileFID(s[4] - '0'), wire.OK
	case s == "dir":
		return wire.FID{}, wire.ErrInval
	case s == "busy":
		return wire.FID{}, wire.ErrTargetDown
	}
	return wire.FID{}, wire.ErrStale
}

// fakeClock is a clock that tests move.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	timers []*fakeTimer
}

type fakeTimer struct {
	at time.Time
	f  func()
}

func newFakeClock() *fakeClock { return &fakeClock{now: time.Unix(1000, 0)} }

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) AfterFunc(d time.Duration, f func()) func() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &fakeTimer{c.now.Add(d), f}
	c.timers = append(c.timers, t)
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		n := len(c.timers)
		c.timers = slices.DeleteFunc(c.timers, func(x *fakeTimer) bool { return x == t })
		return len(c.timers) < n
	}
}

// waiting is the number of timers, and the time to the next.
func (c *fakeClock) waiting() (int, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var next time.Duration
	for i, t := range c.timers {
		if d := t.at.Sub(c.now); i == 0 || d < next {
			next = d
		}
	}
	return len(c.timers), next
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	var due []*fakeTimer
	c.timers = slices.DeleteFunc(c.timers, func(t *fakeTimer) bool {
		if t.at.After(c.now) {
			return false
		}
		due = append(due, t)
		return true
	})
	c.mu.Unlock()
	for _, t := range due {
		go t.f()
	}
}
