package ost

import (
	"fmt"
	"math"

	"github.com/baton-nfs/baton/recovery/wire"
)

// trailer fills what every reply carries. FlushErrors is the start's number, 32
// bits, and the count of its failed flushes; it is read after LastCommitted, see
// endFlush.
func (t *Target) trailer(rep *wire.Reply) {
	rep.LastCommitted = t.track.lc.Load()
	rep.FlushErrors = t.instance<<32 | min(t.flushErrors.Load(), math.MaxUint32)
}

// check decides whether the request may be executed.
func (t *Target) check(req *wire.Request) wire.Status {
	if t.down.Load() {
		return wire.ErrTargetDown
	}
	return t.admit.check(&req.Header)
}

// TryHandle implements wire.Target: reads of up to 128 KiB from the page cache,
// attributes of objects in the table, pings, and syncs of clean objects.
func (t *Target) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	switch req.Op {
	case wire.OpRead:
		if len(req.Bulk) > fastRead || t.noNowait.Load() {
			return false
		}
	case wire.OpObjAttr, wire.OpSyncObject:
	case wire.OpPing:
		rep.XID = req.XID
		rep.Status = t.check(req)
		t.trailer(rep)
		return true
	default:
		return false
	}
	rep.XID = req.XID
	if st := t.check(req); st != wire.OK {
		rep.Status = st
		t.trailer(rep)
		return true
	}
	o := t.table.peek(objKey{req.FID, req.Stripe})
	if o == nil {
		return false
	}
	ok := false
	if o.loaded.Load() && o.io.TryRLock() {
		if o.loaded.Load() && !o.dead.Load() {
			ok = t.tryObject(o, req, rep)
		}
		o.io.RUnlock()
	}
	t.release(o)
	if ok {
		t.trailer(rep)
	} else {
		rep.Obj = wire.ObjAttr{}
	}
	return ok
}

func (t *Target) tryObject(o *object, req *wire.Request, rep *wire.Reply) bool {
	if req.Op == wire.OpRead {
		if !t.read(o, req, rep, true) {
			return false
		}
		if rep.Count > 0 {
			o.readEnd.Store(req.Offset + uint64(rep.Count))
		}
		t.stats.fastReads.Add(1)
		t.stats.readBytes.Add(uint64(rep.Count))
		return true
	}
	if req.Op == wire.OpSyncObject {
		o.smu.Lock()
		busy := o.queued || o.flushing || t.track.dirty(o)
		o.smu.Unlock()
		if busy {
			return false
		}
	}
	if !o.mu.TryLock() {
		return false
	}
	o.attr(&rep.Obj)
	o.mu.Unlock()
	// A missing object may be one whose destruction is not durable.
	return rep.Obj.Exists || req.Op != wire.OpSyncObject
}

// Handle implements wire.Target: requests of clients that never replay. Those
// that wait for a flush or for the superblock are completed by other goroutines;
// Handle returns before.
func (t *Target) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.XID = req.XID
	w := waiter{rep: rep, done: done}
	var o *object
	wait := false
	switch req.Op {
	case wire.OpWrite, wire.OpPunch, wire.OpDestroy:
		side := t.gate.enter()
		if rep.Status = t.refused(req, 0); rep.Status == wire.OK {
			o, wait = t.apply(req, rep, wire.ClientID{}, 0)
		}
		t.gate.leave(side)
		t.finishData(req, rep, o, wait, w)
		return
	}
	if st := t.check(req); st != wire.OK {
		rep.Status = st
		t.complete(w)
		return
	}
	switch req.Op {
	case wire.OpRead:
		t.handleRead(req, rep)
	case wire.OpSyncObject:
		var err error
		if o, err = t.lock(objKey{req.FID, req.Stripe}, false); err != nil {
			rep.Status = t.statusOf(err)
			break
		}
		o.mu.Lock()
		o.attr(&rep.Obj)
		o.mu.Unlock()
		o.io.RUnlock()
		wait = true
	case wire.OpObjAttr:
		ob, err := t.lock(objKey{req.FID, req.Stripe}, false)
		if err != nil {
			rep.Status = t.statusOf(err)
			break
		}
		ob.mu.Lock()
		ob.attr(&rep.Obj)
		ob.mu.Unlock()
		t.unlockObj(ob, false)
	case wire.OpStatfs:
		t.statfs(rep)
	case wire.OpPing:
	case wire.OpConnect, wire.OpDisconnect:
		t.register(req, rep, done)
		return
	case wire.OpSetVIPEpoch, wire.OpFence:
		t.raise(req, rep, 0, w)
		return
	case wire.OpSyncTarget:
		if err := t.flushDirty(t.track.last(), true); err != nil {
			rep.Status = t.statusOf(err)
		}
	default:
		rep.Status = wire.ErrNotSupp
		if req.Op == 0 {
			rep.Status = wire.ErrProto
		}
	}
	t.finishData(req, rep, o, wait, w)
}

func (t *Target) handleRead(req *wire.Request, rep *wire.Reply) {
	o, err := t.lock(objKey{req.FID, req.Stripe}, false)
	if err != nil {
		rep.Status = t.statusOf(err)
		return
	}
	t.readahead(o, req.Offset, uint64(len(req.Bulk)))
	t.read(o, req, rep, false)
	t.unlockObj(o, false)
	t.stats.reads.Add(1)
	t.stats.readBytes.Add(uint64(rep.Count))
}

func (t *Target) statfs(rep *wire.Reply) {
	sp, err := t.fs.Statfs()
	if err != nil {
		rep.Status = t.statusOf(fmt.Errorf("statfs: %w", err))
		return
	}
	sub := func(a, b uint64) uint64 { return a - min(a, b) }
	rep.Statfs = wire.Statfs{
		Total: sp.Total, Free: sub(sp.Free, t.opts.MinFreeBytes), Avail: sub(sp.Avail, t.opts.MinFreeBytes),
		Files: sp.Files, FilesFree: sp.FilesFree, FilesAvail: sp.FilesAvail,
	}
}
