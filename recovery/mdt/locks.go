package mdt

import (
	"fmt"
	"math"
	"sync"

	"github.com/baton-nfs/baton/recovery/locks"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

// LockLimits bounds the lock table; zero fields mean its defaults.
type LockLimits = locks.Limits

// The lock table lives in memory, guarded by the sequencer's lock. What an
// operation changes in it goes into the operation's own batch as records, so
// that a lock is granted to nobody before it is durable, and all of them are
// there after a crash.

// lockPolls holds the frontends' requests that wait for grants, one per VIP.
type lockPolls struct {
	mu   sync.Mutex
	wait map[uint32]*lockPoll
	down bool
}

type lockPoll struct {
	after uint64
	rep   *wire.Reply
	done  func()
}

// fail answers all polls; none waits from then on.
func (p *lockPolls) fail() {
	p.mu.Lock()
	p.down = true
	w := p.wait
	p.wait = nil
	p.mu.Unlock()
	for _, x := range w {
		x.rep.Status = wire.ErrTargetDown
		x.done()
	}
}

// maxGrants bounds the grants of one reply.
const maxGrants = 256

// isLockOp tells whether the lock table executes the operation in a transaction.
func isLockOp(op wire.Op) bool { return op >= wire.OpLock && op <= wire.OpLockService }

// loadLocks reads the lock table. Damaged records are left out; the service
// addresses then start with a grace period, which Table.Damaged asks for.
func (m *MDT) loadLocks() error {
	m.locks = locks.New(m.o.Locks, m.state.Transno)
	err := iteratePrefix(m.e, []byte{locks.Prefix}, func(k, v []byte) error {
		if err := m.locks.Load(k, v); err != nil {
			m.log.Error("mdt: damaged lock record: the locks of all service addresses will be reclaimed by their clients", "key", fmt.Sprintf("%x", k), "err", err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("locks: %w", err)
	}
	m.locks.Loaded(m.state.Time)
	return nil
}

// takeLocks moves the lock table's changes into the transaction.
func (t *tx) takeLocks() {
	t.m.locks.Take(func(c locks.Change) {
		if c.Value == nil {
			t.batch().Delete(c.Key)
		} else {
			t.batch().Set(c.Key, c.Value)
		}
	})
}

// lockable takes the outcome of looking an object up and tells whether it can
// be locked: only regular files can.
func lockable(in *Inode, st wire.Status) wire.Status {
	switch {
	case in == nil:
		return st
	case in.Attr.Type != wire.TypeReg:
		return wire.ErrInval
	}
	return wire.OK
}

// lockOp executes a lock operation. Its outcome, which may be other than OK
// though something changed (a blocked request is queued), is in t.status.
func (t *tx) lockOp() wire.Status {
	m, req := t.m, t.req
	if req.Lock == nil {
		return wire.ErrProto
	}
	rep := &wire.LockReply{}
	t.rep.Lock = rep
	a := *req.Lock
	a.Owner.VIP = req.VIP
	now := t.now
	switch req.Op {
	case wire.OpLock, wire.OpShare:
		if req.Op == wire.OpLock && !a.Range.Valid() {
			return wire.ErrInval
		}
		if st := lockable(t.load(req.FID)); st != wire.OK {
			return st
		}
		if req.Op == wire.OpLock {
			t.status, rep.Holder = m.locks.Lock(now, req.FID, &a)
		} else {
			t.status, rep.Holder = m.locks.Share(now, req.FID, &a)
		}
	case wire.OpUnlock:
		if !a.Range.Valid() {
			return wire.ErrInval
		}
		t.status = m.locks.Unlock(now, req.FID, &a)
	case wire.OpLockCancel:
		t.status = m.locks.Cancel(now, req.FID, &a)
	case wire.OpUnshare:
		t.status = m.locks.Unshare(now, req.FID, &a)
	case wire.OpLockGrantDone:
		t.status = m.locks.GrantDone(now, a.Owner.LockHost, a.ID, a.Grant)
	case wire.OpLockFree:
		if req.Cookie > math.MaxUint32 {
			return wire.ErrInval
		}
		rep.Freed = uint32(m.locks.Free(now, a.Owner.LockHost, a.AllVIPs, uint32(req.Cookie)))
		if rep.Freed > 0 {
			// A client that has started again may use an XID again; the answer to
			// its first life would tell it that it has a lock.
			m.replies.Forget(t.batch(), req.VIP, wire.MakeReplyAddr(a.Owner.Addr), func(r *target.Record) bool { return r.Proc>>8 == wire.LockProgram })
		}
	case wire.OpLockRelease:
		var n int
		t.status, n = m.locks.Release(now, a.ID)
		rep.Freed = uint32(n)
	case wire.OpLockMonitor:
		if len(a.Note) > wire.MaxLockNote {
			return wire.ErrInval
		}
		t.status = m.locks.Monitor(now, a.Owner.LockHost, a.Note)
	case wire.OpLockUnmonitor:
		t.status = m.locks.Unmonitor(now, a.Owner.LockHost)
	case wire.OpLockNotified:
		t.status = m.locks.Notified(now, a.Owner.LockHost, a.NSMState)
	case wire.OpLockService:
		rep.Service = m.locks.Service(now, req.VIP, &a)
	default:
		return wire.ErrProto
	}
	t.takeLocks()
	return wire.OK
}

// lockQuery answers lock operations that change nothing.
func (m *MDT) lockQuery(req *wire.Request, rep *wire.Reply) {
	if req.Lock == nil {
		rep.Status = wire.ErrProto
		return
	}
	a := *req.Lock
	a.Owner.VIP = req.VIP
	rep.Lock = &wire.LockReply{}
	if req.Op == wire.OpLockTest {
		if !a.Range.Valid() {
			rep.Status = wire.ErrInval
			return
		}
		if rep.Status = lockable(m.inode(req.FID, false)); rep.Status != wire.OK {
			return
		}
	}
	m.seq.Lock()
	defer m.seq.Unlock()
	switch req.Op {
	case wire.OpLockTest:
		rep.Status, rep.Lock.Holder = m.locks.Test(max(m.o.Clock(), m.state.Time), req.FID, &a)
	case wire.OpLockList:
		n := int(min(req.MaxEntries, 4096))
		if n == 0 {
			n = 256
		}
		rep.Lock.Locks, rep.EOF = m.locks.List(req.FID, req.VIP, a.AllVIPs, req.Cookie, n)
	case wire.OpLockHosts:
		rep.Lock.Hosts = m.locks.Hosts(req.VIP, a.AllVIPs)
	}
}

// lockPoll answers with grants or waits for some.
func (m *MDT) lockPoll(req *wire.Request, rep *wire.Reply, done func()) {
	rep.Lock = &wire.LockReply{}
	m.seq.Lock()
	if st := m.core.View().Admit(&req.Header); st != wire.OK {
		m.seq.Unlock()
		rep.Status = st
		done()
		return
	}
	var g []wire.LockGrant
	if req.Cookie != math.MaxUint64 {
		g = m.locks.Pending(req.VIP, req.Cookie, maxGrants)
	}
	m.polls.mu.Lock()
	old := m.polls.wait[req.VIP]
	delete(m.polls.wait, req.VIP)
	queued, parked := false, false
	switch {
	case m.polls.down:
		rep.Status = wire.ErrTargetDown
	case req.Cookie == math.MaxUint64:
	case len(g) > 0:
		// What was granted may not be durable yet.
		rep.Lock.Grants = g
		queued = m.com.Gate(m.core.LastApplied(), rep, target.Func(done))
	default:
		if m.polls.wait == nil {
			m.polls.wait = map[uint32]*lockPoll{}
		}
		m.polls.wait[req.VIP] = &lockPoll{after: req.Cookie, rep: rep, done: done}
		parked = true
	}
	m.polls.mu.Unlock()
	m.seq.Unlock()
	if old != nil {
		old.done()
	}
	if !queued && !parked {
		done()
	}
}

// serveGrants gives new grants to the polls that wait for them, when they are
// durable. It runs under the sequencer's lock; the result is what the caller
// runs after it.
func (m *MDT) serveGrants() (after []func()) {
	if !m.locks.Granted() {
		return nil
	}
	m.polls.mu.Lock()
	defer m.polls.mu.Unlock()
	for vip, p := range m.polls.wait {
		g := m.locks.Pending(vip, p.after, maxGrants)
		if len(g) == 0 {
			continue
		}
		delete(m.polls.wait, vip)
		p.rep.Lock.Grants = g
		if !m.com.Gate(m.core.LastApplied(), p.rep, target.Func(p.done)) {
			after = append(after, p.done)
		}
	}
	return after
}

// TickLocks lets reclaim windows and grace periods end, not while the target is in
// recovery. The owner of the target calls it about once a second.
func (m *MDT) TickLocks() error {
	now := m.o.Clock()
	m.seq.Lock()
	next := m.locks.NextTick()
	if next == 0 || next > now || !m.begun {
		m.seq.Unlock()
		return nil
	}
	st := wire.ErrTargetDown
	var after []func()
	if !m.down.Load() {
		t := &m.t
		t.begin(&wire.Request{}, &wire.Reply{}, front.Exec{}, false)
		m.locks.Tick(now)
		t.takeLocks()
		st = t.commit(false)
		after = m.serveGrants()
	}
	m.unlock()
	for _, f := range after {
		f()
	}
	if st != wire.OK {
		return fmt.Errorf("lock table's clock: %w", st)
	}
	m.com.Lazy()
	return nil
}

// IterLocks visits all lock records (recovery/locks).
func IterLocks(e store.Engine, fn func(k, v []byte) error) error {
	return iteratePrefix(e, []byte{locks.Prefix}, fn)
}
