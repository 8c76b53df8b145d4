package sim

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Locks in the simulation. A frontend does what lockd and statd do: it begins the lock
// service of its addresses, passes calls on, collects grants and calls clients back. A
// client takes locks and checks that nobody else has one that conflicts, and that under
// an exclusive one it sees what was written under the one before.

// lock is what a client asks for, and then believes to have.
type lock struct {
	a    *actor
	f    wire.FID
	r    wire.LockRange
	excl bool
	nsm  uint32 // of the address when it was got or reclaimed
	got  bool
}

func (l *lock) String() string {
	return fmt.Sprintf("%v %v exclusive %v of %s", l.f, l.r, l.excl, l.a.name())
}

// lockKey names a lock as the callback does.
type lockKey struct {
	name string
	f    wire.FID
	r    wire.LockRange
}

func (l *lock) key() lockKey { return lockKey{l.a.name(), l.f, l.r} }

// reclaimWindow is longer than all runs, so that no lock is given away before its
// client has had the time to reclaim it.
const reclaimWindow = 2 * time.Hour

// The frontend's part.

// beginLocks tells the lock table that the address is served from now on.
func (fe *frontend) beginLocks(vip uint32, epoch uint64, nsm uint32, crashed bool) wire.Status {
	req, rep := &wire.Request{}, &wire.Reply{}
	req.Op, req.Flags = wire.OpLockService, wire.FlagWaitCommit
	req.Lock = &wire.LockArgs{NSMState: nsm, Crashed: crashed, Window: int64(reclaimWindow)}
	fe.fs.Call(fe.p.ctx, client.Owner{VIP: vip, Epoch: epoch}, req, rep)
	return rep.Status
}

// collectGrants asks the lock table for grants, while the frontend serves the address.
func (fe *frontend) collectGrants(v *vip, epoch uint64, moved <-chan struct{}) {
	if !fe.begin() {
		return
	}
	go func() {
		defer fe.calls.Done()
		poll := func(cookie uint64) <-chan *wire.Reply {
			req, rep, ch := &wire.Request{}, &wire.Reply{}, make(chan *wire.Reply, 1)
			req.Op, req.Cookie = wire.OpLockPoll, cookie
			fe.fs.Submit(client.Owner{VIP: v.index, Epoch: epoch}, req, rep, func() { ch <- rep })
			return ch
		}
		for last := uint64(0); ; {
			ch := poll(last)
			select {
			case rep := <-ch:
				if rep.Status == wire.ErrStaleVIP {
					return
				}
				if rep.Status == wire.OK && rep.Lock != nil {
					for i := range rep.Lock.Grants {
						g := &rep.Lock.Grants[i]
						last = max(last, g.Seq)
						if fe.begin() {
							go fe.callBack(v, epoch, g, moved)
						}
					}
				}
				if rep.Status == wire.OK || fe.pause(moved) {
					continue
				}
			case <-moved:
			case <-fe.gone:
			case <-fe.w.calm:
			}
			<-poll(math.MaxUint64)
			<-ch
			return
		}
	}()
}

// pause waits a second; false when the frontend does not serve the address any more.
func (fe *frontend) pause(moved <-chan struct{}) bool {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-moved:
	case <-fe.gone:
	case <-fe.w.calm:
	}
	return false
}

// callBack tells a client that it has a lock, until it has answered. Calls and answers get
// lost. That a client does not want the lock is no reason to give it to others: then it has
// given it back, or does so.
func (fe *frontend) callBack(v *vip, epoch uint64, g *wire.LockGrant, moved <-chan struct{}) {
	defer fe.calls.Done()
	w := fe.w
	key := lockKey{g.Owner.Name, g.FID, g.Range}
	for tries := 1; ; tries++ {
		if fe.p.storage() != nil {
			return
		}
		w.mu.Lock()
		luck := w.callLoss.IntN(4)
		serves := v.owner == fe && v.epoch == epoch && !(tries > 1 && fe.settled[key])
		w.mu.Unlock()
		if !serves {
			return
		}
		if luck > 0 {
			if has := w.granted(g); !has {
				return
			} else if luck > 1 {
				break
			}
		}
		w.mu.Lock()
		delete(fe.settled, key)
		w.mu.Unlock()
		if !fe.pause(moved) {
			return
		}
	}
	w.trace("%s: %s has answered that it has %v %v", fe.p.node.name, g.Owner.Name, g.FID, g.Range)
	for {
		req, rep, done := &wire.Request{}, &wire.Reply{}, make(chan bool, 1)
		req.Op, req.FID, req.Flags = wire.OpLockGrantDone, g.FID, wire.FlagWaitCommit
		req.Lock = &wire.LockArgs{Owner: wire.LockOwner{LockHost: g.Owner.LockHost}, ID: g.ID, Grant: wire.GrantAccepted}
		fe.fs.Submit(client.Owner{VIP: v.index, Epoch: epoch}, req, rep, func() { done <- true })
		if <-done; rep.Status == wire.OK || rep.Status == wire.ErrStaleVIP || !fe.pause(moved) {
			return
		}
	}
}

// settle ends callbacks that were tried and are needed no longer, since the client has the
// lock or has given it back.
func (fe *frontend) settle(k lockKey) {
	fe.w.mu.Lock()
	fe.settled[k] = true
	fe.w.mu.Unlock()
}

// The client's part.

// granted is a callback; it tells whether the client has the lock.
func (w *world) granted(g *wire.LockGrant) bool {
	k := lockKey{g.Owner.Name, g.FID, g.Range}
	w.mu.Lock()
	var l *lock
	has := slices.ContainsFunc(w.locked, func(l *lock) bool { return l.key() == k })
	for _, x := range w.wanted {
		if x.key() == k && x.excl == g.Exclusive && !has {
			l = x
		}
	}
	w.mu.Unlock()
	if l != nil {
		w.count("locks by callback")
		w.gets(l)
	}
	return l != nil || has
}

// gets notes that a client believes to have a lock, and checks that nobody else does.
func (w *world) gets(l *lock) {
	w.mu.Lock()
	var other *lock
	for _, x := range w.locked {
		if x != l && x.a != l.a && x.f == l.f && x.r.Overlaps(l.r) && (x.excl || l.excl) {
			other = x
		}
	}
	if !l.got {
		w.locked = append(w.locked, l)
	}
	l.got = true
	w.seen["locks"]++
	w.cond.Broadcast()
	w.mu.Unlock()
	w.trace("%s: has lock %v", l.a.name(), l)
	if other != nil {
		w.fault("lock %v is given though there is %v", l, other)
	}
}

// want notes what the client waits for, nil for nothing.
func (a *actor) want(l *lock) {
	a.w.mu.Lock()
	a.w.wanted = slices.DeleteFunc(a.w.wanted, func(x *lock) bool { return x.a == a })
	if l != nil {
		a.w.wanted = append(a.w.wanted, l)
	}
	a.w.mu.Unlock()
}

// lockCall makes a call of NLM until it is answered; copies of it have the same XID.
func (a *actor) lockCall(op wire.Op, l *lock, with wire.LockArgs) wire.Status {
	with.Owner = wire.LockOwner{LockHost: wire.LockHost{Addr: netip.AddrFrom4([4]byte{10, byte(a.id)}), Name: a.name()}, Svid: uint32(a.id), OH: "o"}
	with.Range, with.Exclusive = l.r, l.excl
	a.xid++
	xid := a.xid
	what := fmt.Sprintf("op %d of lock %v, %+v", op, l, with.Reclaim)
	_, st, _ := ask(a, what, func(fe *frontend, o client.Owner) (*wire.Reply, wire.Status) {
		args := with
		rep := fe.modify(o, &wire.Request{
			Header: wire.Header{Op: op, Flags: wire.FlagAnyPort}, FID: l.f, Lock: &args,
			Key: wire.ReplyKey{Addr: [16]byte{10, byte(a.id)}, Port: a.port, XID: xid, Proc: wire.LockProgram<<8 | uint32(op), Sum: uint64(xid)},
		})
		if rep.Status == wire.OK {
			fe.settle(l.key())
		}
		return rep, rep.Status
	})
	a.w.trace("%s: %s: %v", a.name(), what, st)
	a.ops++
	return st
}

// lock asks for a lock, and waits for it as long as patience if it is not free; nil when
// the client does not get it.
func (a *actor) lock(f *file, from, to int, excl bool, patience time.Duration) *lock {
	l := &lock{a: a, f: f.fid, r: wire.LockRange{Start: uint64(from * cellSize), End: uint64(to*cellSize) - 1}, excl: excl, nsm: a.nsm()}
	a.want(l)
	defer a.want(nil)
	for until := time.Now().Add(patience); ; {
		switch st := a.lockCall(wire.OpLock, l, wire.LockArgs{Block: patience > 0, Monitor: true}); {
		case st == wire.OK:
			a.w.gets(l)
		case st == wire.ErrLockBlocked && patience > 0, st == wire.ErrLockDenied && patience == 0:
		default:
			a.failf("lock %v: %v", l, st)
		}
		if patience == 0 {
			break
		}
		if a.w.waits(l, min(a.again, time.Until(until))) {
			return l
		}
		if !time.Now().Before(until) {
			break
		}
	}
	a.want(nil)
	a.w.mu.Lock()
	got := l.got
	a.w.mu.Unlock()
	switch {
	case got:
		return l
	case patience > 0:
		a.w.count("locks given up")
		if st := a.lockCall(wire.OpLockCancel, l, wire.LockArgs{Block: true}); st != wire.OK && st != wire.ErrLockDenied {
			a.failf("cancel of lock %v: %v", l, st)
		}
	}
	return nil
}

// waits until the client has the lock, or d has passed.
func (w *world) waits(l *lock, d time.Duration) bool {
	t := time.AfterFunc(d, w.poke)
	defer t.Stop()
	until := time.Now().Add(d)
	w.mu.Lock()
	defer w.mu.Unlock()
	for !l.got && time.Now().Before(until) {
		w.cond.Wait()
	}
	return l.got
}

// nsm is the state of the client's service address.
func (a *actor) nsm() uint32 {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	return a.v.nsm
}

// reclaim does what the client does when it is told that its address was served anew
// after a crash.
func (a *actor) reclaim(l *lock) {
	for n := a.nsm(); l.nsm != n; n = a.nsm() {
		a.w.count("locks reclaimed")
		if st := a.lockCall(wire.OpLock, l, wire.LockArgs{Reclaim: true, Monitor: true}); st != wire.OK {
			a.failf("reclaim of lock %v: %v", l, st)
		}
		l.nsm = n
	}
}

func (a *actor) unlock(l *lock) {
	a.w.mu.Lock()
	a.w.locked = slices.DeleteFunc(a.w.locked, func(x *lock) bool { return x == l })
	a.w.mu.Unlock()
	if st := a.lockCall(wire.OpUnlock, l, wire.LockArgs{}); st != wire.OK {
		a.failf("unlock %v: %v", l, st)
	}
}

// lockedFile is a file whose sectors are read and written under locks only.
type lockedFile struct {
	f    *file
	last []uint32 // what was written last to each sector
}

const lockedCells = 6

// addLockers makes n clients that take locks of one file.
func (c *cluster) addLockers(n int) {
	for range n {
		id := len(c.actors) + len(c.lockers)
		c.lockers = append(c.lockers, c.newActor(id, id+1, false))
	}
	a := c.lockers[0]
	a.createLocked()
}

func (a *actor) createLocked() {
	root := newFile(true, 0o755)
	root.fid = wire.RootFID
	a.createNamed(root, "locked")
	a.w.lockFile = &lockedFile{f: root.kids["locked"], last: make([]uint32, lockedCells)}
	if a.w.lockFile.f == nil {
		a.failf("there is no file to lock")
		a.w.lockFile.f = root
	}
}

// lockStep takes a lock, does something under it and gives it back.
func (a *actor) lockStep() {
	from := a.rng.IntN(lockedCells)
	to := min(from+1+a.rng.IntN(3), lockedCells)
	excl, patience := a.rng.IntN(3) > 0, time.Duration(0)
	if a.rng.IntN(3) > 0 {
		patience = time.Duration(1+a.rng.IntN(40)) * time.Second
	}
	l := a.lock(a.w.lockFile.f, from, to, excl, patience)
	if l == nil {
		return
	}
	for range 1 + a.rng.IntN(2) {
		a.reclaim(l)
		a.underLock(from, to, excl)
		time.Sleep(time.Duration(a.rng.IntN(400)) * time.Millisecond)
	}
	a.reclaim(l)
	a.unlock(l)
}

// underLock reads what was written last and, with an exclusive lock, writes anew.
func (a *actor) underLock(from, to int, write bool) {
	lf := a.w.lockFile
	what := fmt.Sprintf("read %v cells %d-%d under lock", lf.f.fid, from, to)
	c, st, _ := ask(a, what, func(fe *frontend, o client.Owner) (content, wire.Status) {
		data, at, st := fe.read(o, lf.f.fid, uint64(from*cellSize), (to-from)*cellSize)
		return content{data, at}, st
	})
	if !a.expect(what, st, wire.OK) {
		return
	}
	data := append(c.data, make([]byte, (to-from)*cellSize-len(c.data))...)
	for i := from; i < to; i++ {
		if v, ok := version(data[(i-from)*cellSize:][:cellSize]); (!ok || v != lf.last[i]) && !a.w.badDisk.Load() {
			a.failf("%s: sector %d has %x, written was %x", what, i, v, lf.last[i])
		}
	}
	if !write {
		return
	}
	a.ver++
	ver := uint32(a.id+1)<<24 | a.ver
	fill(data, ver)
	what = fmt.Sprintf("write %v cells %d-%d version %x under lock", lf.f.fid, from, to, ver)
	_, st, _ = ask(a, what, func(fe *frontend, o client.Owner) (uint64, wire.Status) {
		verf, _, st := fe.write(o, lf.f.fid, uint64(from*cellSize), data, wire.FileSync)
		return verf, st
	})
	a.w.trace("%s: %s: %v", a.name(), what, st)
	if a.expect(what, st, wire.OK) {
		for i := from; i < to; i++ {
			lf.last[i] = ver
		}
	}
}

// unlocked checks that no lock and no waiting request is left, and ends the callbacks.
func (c *cluster) unlocked() {
	if !c.cfg.locks {
		return
	}
	if l, st := c.lockTable(); st != wire.OK || len(l) > 0 {
		c.fault("the lock table has %v, %+v", st, l)
	}
	close(c.calm)
}

// lockTable lists all locks and waiting requests.
func (c *cluster) lockTable() ([]wire.LockHolder, wire.Status) {
	rep, st, _ := ask(c.lockers[0], "list locks", func(fe *frontend, o client.Owner) (*wire.Reply, wire.Status) {
		rep := &wire.Reply{}
		fe.fs.Call(fe.p.ctx, o, &wire.Request{Header: wire.Header{Op: wire.OpLockList}, MaxEntries: 100, Lock: &wire.LockArgs{AllVIPs: true}}, rep)
		return rep, rep.Status
	})
	if st != wire.OK {
		return nil, st
	}
	return rep.Lock.Locks, st
}
