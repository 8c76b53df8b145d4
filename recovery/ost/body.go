package ost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/baton-nfs/baton/recovery/ost/slots"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

var (
	_ front.Body   = (*Target)(nil)
	_ wire.Blocker = (*Target)(nil)
)

// MayBlock implements wire.Blocker: an operation may wait for the disk in the
// goroutine that gives it to the target.
func (t *Target) MayBlock(op wire.Op) bool {
	switch op {
	case wire.OpRead, wire.OpWrite, wire.OpPunch, wire.OpDestroy, wire.OpSyncObject, wire.OpSyncTarget, wire.OpStatfs:
		return true
	}
	return false
}

// Table implements front.Body.
func (t *Target) Table() (front.Table, error) {
	t.state.mu.Lock()
	defer t.state.mu.Unlock()
	s := t.state.sb
	tab := front.Table{Instance: t.instance, Target: t.prev, Transno: t.base}
	for _, id := range slices.SortedFunc(maps.Keys(s.Clients), compareIDs) {
		tab.Clients = append(tab.Clients, s.Clients[id])
	}
	for _, k := range t.kept {
		if r, ok := s.Clients[k.Client]; ok && r.Gen == k.Gen {
			tab.Slots = append(tab.Slots, recov.SlotRecord{
				Client: k.Client, Gen: k.Gen, Slot: k.Slot, XID: k.XID, Transno: k.Transno, Status: k.Status, Data: outcome(k.Count),
			})
		}
	}
	t.kept = nil
	return tab, nil
}

// outcome is what a slot keeps besides status and transno: the count, 4 bytes
// little-endian. Without it a write was complete.
func outcome(count uint32) []byte { return binary.LittleEndian.AppendUint32(nil, count) }

// refused tells why a data operation cannot be executed now: admission, the
// target's state, or a replay's number. The gate has been entered.
func (t *Target) refused(req *wire.Request, no uint64) wire.Status {
	if no != 0 {
		switch {
		case t.down.Load() || t.ended.Load():
			return wire.ErrTargetDown
		case t.begun.Load() || no > t.startTransno:
			// Recovery is over; or it is of another store.
			return wire.ErrProto
		}
		return wire.OK
	}
	if st := t.check(req); st != wire.OK {
		return st
	}
	switch {
	case t.ended.Load():
		return wire.ErrTargetDown
	case !t.begun.Load():
		return wire.ErrRecovering
	case t.track.room() < transnoStep/16:
		// The committer is slow to reserve more, or failing to.
		t.wake()
		return wire.ErrJukebox
	}
	return wire.OK
}

// apply executes a data operation of client by; results as write.
func (t *Target) apply(req *wire.Request, rep *wire.Reply, by wire.ClientID, no uint64) (*object, bool) {
	switch req.Op {
	case wire.OpWrite:
		return t.write(req, rep, by, no)
	case wire.OpPunch:
		return t.punch(req, rep, by, no)
	}
	return t.destroy(req, rep, by, no)
}

// Execute implements front.Body.
func (t *Target) Execute(req *wire.Request, rep *wire.Reply, x front.Exec, e front.Execution) {
	rep.XID = req.XID
	switch req.Op {
	case wire.OpWrite, wire.OpPunch, wire.OpDestroy:
	case wire.OpSetVIPEpoch, wire.OpFence:
		t.raise(req, rep, x.Transno, waiter{rep: rep, exec: e})
		return
	default:
		rep.Status = wire.ErrNotSupp
		e.Executed(recov.Result{Status: rep.Status})
		t.complete(waiter{rep: rep, exec: e})
		return
	}
	by := req.Client
	if by == (wire.ClientID{}) {
		by = unknownClient // the zero client never replays
	}
	no := x.Transno
	res := recov.Result{}
	var o *object
	wait := false
	side := t.gate.enter()
	switch st := t.refused(req, no); {
	case st != wire.OK:
		rep.Status = st
		res.NotDone = true
	case no != 0 && (no <= t.track.last() || !t.open(req)):
		// Executed in this recovery, or durable, or the file is gone.
		rep.Transno, rep.Count = t.track.transno(no), uint32(len(req.Bulk))
	default:
		o, wait = t.apply(req, rep, by, no)
		// What had no effect for a reason that passes is to be asked again.
		res.NotDone = rep.Status == wire.ErrJukebox && rep.Transno == 0
	}
	if !res.NotDone {
		t.keepSlot(req, rep)
	}
	t.gate.leave(side)
	switch {
	case no == 0 || rep.Status == wire.OK || rep.Status == wire.ErrTargetDown:
	case rep.Status == wire.ErrJukebox:
		rep.Status, res.NotDone = wire.ErrRecovering, true // the client tries again
	default:
		// What was acknowledged is lost, and its client has to learn that.
		res.NotDone, res.Mismatch = false, true
	}
	res.Status, res.Transno = rep.Status, rep.Transno
	if rep.Status != wire.OK || req.Op == wire.OpWrite && int(rep.Count) != len(req.Bulk) {
		res.Data = outcome(rep.Count)
	}
	if e.Executed(res) {
		if o != nil {
			t.release(o)
		}
		if t.WaitCommit(rep.Transno, rep, e.Done) {
			return
		}
		o, wait = nil, false
	}
	t.finishData(req, rep, o, wait, waiter{rep: rep, exec: e})
}

// open tells whether a replay's file is in an IO epoch of its client, as far as
// the MDT has told; others are durable or gone.
func (t *Target) open(req *wire.Request) bool {
	epochs := t.epochs.Load()
	if epochs == nil || req.Op == wire.OpDestroy {
		return true
	}
	_, ok := (*epochs)[wire.EpochInfo{FID: req.FID, Client: req.Client}]
	return ok
}

// keepSlot notes the outcome for a resend after the process has died.
func (t *Target) keepSlot(req *wire.Request, rep *wire.Reply) {
	c, ok := t.admit.tables.Load().clients[req.Client]
	if !ok || c.gen != req.ClientGen {
		return
	}
	err := c.slots.Put(req.Slot, slots.Record{XID: req.XID, Transno: rep.Transno, Status: rep.Status, Count: rep.Count})
	if err != nil && !t.slotsBad.Swap(true) {
		t.log.Error("reply slots are not kept any more: requests resent after a crash may be executed twice", "err", err)
	}
}

// finishData makes durable what has to be, and completes w.
func (t *Target) finishData(req *wire.Request, rep *wire.Reply, o *object, wait bool, w waiter) {
	if wait && !rep.Obj.Exists && req.Op != wire.OpDestroy {
		// That it is missing must be durable, too: it may be a former object's
		// destruction.
		if err := t.dirs[o.key.dir()].sync(t.fs); err != nil {
			rep.Status = t.statusOf(err)
		}
	}
	if wait {
		t.stats.syncs.Add(1)
		clean := t.syncObject(o, w)
		t.release(o)
		if !clean {
			return
		}
	}
	t.complete(w)
}

// complete gives a request's reply.
func (t *Target) complete(w waiter) {
	t.trailer(w.rep)
	if w.exec != nil {
		w.exec.Done()
	} else {
		w.done()
	}
}

// Rebuild implements front.Body. It waits for the disk if the request asked for
// stable data and its object is not durable yet.
func (t *Target) Rebuild(req *wire.Request, rep *wire.Reply, slot *recov.SlotRecord) {
	rep.XID, rep.Status, rep.Transno, rep.Reconstructed = req.XID, slot.Status, slot.Transno, true
	if len(slot.Data) == 4 {
		rep.Count = binary.LittleEndian.Uint32(slot.Data)
	} else if req.Op == wire.OpWrite && slot.Status == wire.OK {
		rep.Count = uint32(len(req.Bulk))
	}
	if err := t.rebuildObject(req, rep); err != nil && rep.Status == wire.OK {
		rep.Status = t.statusOf(err)
	}
	t.trailer(rep)
}

func (t *Target) rebuildObject(req *wire.Request, rep *wire.Reply) error {
	stable := rep.Status == wire.OK && rep.Transno > t.track.lc.Load() &&
		(req.Flags&wire.FlagWaitCommit != 0 || req.Op == wire.OpWrite && req.Stable != wire.Unstable)
	k := objKey{req.FID, req.Stripe}
	switch req.Op {
	case wire.OpDestroy:
		if stable {
			return t.dirs[k.dir()].sync(t.fs)
		}
		return nil
	case wire.OpWrite:
	case wire.OpPunch:
		if rep.Status == wire.OK && rep.Transno == 0 {
			// There was no object that would remember the truncate, and its client
			// has to know that, even if there is one now.
			return nil
		}
	default:
		return nil
	}
	o, err := t.lock(k, false)
	if err != nil {
		return err
	}
	defer t.release(o)
	o.mu.Lock()
	o.attr(&rep.Obj)
	o.mu.Unlock()
	o.io.RUnlock()
	if !stable {
		return nil
	}
	if !rep.Obj.Exists {
		return t.dirs[k.dir()].sync(t.fs)
	}
	return t.syncNow(o)
}

// PutClient implements front.Body.
func (t *Target) PutClient(r recov.ClientRecord, done func(error)) {
	if !r.Local {
		t.attach(r)
	}
	if done == nil {
		done = func(error) {}
	}
	t.putClient(r, func(recov.ClientRecord) wire.Status { return wire.OK }, done)
}

// putClient enters r in place of what check agrees to, a zero record for
// nothing; done gets check's status too.
func (t *Target) putClient(r recov.ClientRecord, check func(old recov.ClientRecord) wire.Status, done func(error)) {
	st, had := wire.OK, false
	t.change(false, func(s *super) bool {
		var old recov.ClientRecord
		old, had = s.Clients[r.Client]
		if st = check(old); st == wire.OK && !had && len(s.Clients) >= maxClients {
			st = wire.ErrJukebox
		}
		if st != wire.OK || had && old == r {
			return false
		}
		s.Clients[r.Client] = r
		return true
	}, func(err error) {
		switch {
		case st != wire.OK:
			err = fmt.Errorf("register client: %w", st)
		case err != nil && !had:
			t.DelClient(r.Client, r.Gen, false)
		}
		done(err)
	})
}

// attach gives a client its reply slots.
func (t *Target) attach(r recov.ClientRecord) {
	if t.slots == nil {
		return
	}
	if _, err := t.slots.Attach(r.Client, r.Gen); err != nil {
		t.log.Warn("no room for a client's reply slots: what it resends after a crash may be executed twice", "client", fmt.Sprintf("%x", r.Client[:4]), "err", err)
	}
}

// DelClient implements front.Body.
func (t *Target) DelClient(id wire.ClientID, gen uint64, _ bool) {
	removed := false
	t.change(false, func(s *super) bool {
		r, ok := s.Clients[id]
		if removed = ok && r.Gen <= gen; removed {
			delete(s.Clients, id)
		}
		return removed
	}, nil)
	if !removed {
		return
	}
	t.publish()
	t.detach(id)
}

// detach forgets a client's reply slots.
func (t *Target) detach(id wire.ClientID) {
	if t.slots == nil {
		return
	}
	if err := t.slots.Detach(id); err != nil {
		t.log.Warn("reply slots of a client that left cannot be cleared", "err", err)
	}
}

// flushAll makes everything durable, for a clean stop.
func (t *Target) flushAll() error {
	if err := t.flushDirty(^uint64(0), true); err != nil {
		return err
	}
	if t.track.n.Load() != 0 || t.flushErrors.Load() != 0 {
		return errors.New("some data could not be flushed")
	}
	if t.slots != nil {
		return t.slots.Sync()
	}
	return nil
}

// PutTarget implements front.Body. A clean stop ends all changes of data.
func (t *Target) PutTarget(r recov.TargetRecord) error {
	if r.Clean {
		t.ended.Store(true)
		t.gate.drain()
		if err := t.flushAll(); err != nil {
			return fmt.Errorf("stop ost %d: %w", t.opts.Index, err)
		}
	}
	err := t.changeNow(func(s *super) bool {
		s.Target, s.Clean = r, r.Clean
		return true
	})
	if err != nil {
		return fmt.Errorf("record state of ost %d: %w", t.opts.Index, err)
	}
	return nil
}

// Begin implements front.Body. Targets without recovery call it after Open, with
// 0. When the numbers cannot be reserved durably, the target fails.
func (t *Target) Begin(transno uint64) {
	var start uint64
	err := t.changeNow(func(s *super) bool {
		start = max(transno, s.Ceiling)
		s.Ceiling, s.Began = start+transnoStep, true
		return true
	})
	if err != nil {
		t.fail(fmt.Errorf("begin service: %w", err))
		return
	}
	t.track.start(start, start+transnoStep)
	t.begun.Store(true)
	t.epochs.Store(nil)
	t.finishTruncates()
	t.CommitSoon()
}

// Tenure implements front.Body: an OST gives none.
func (t *Target) Tenure(wire.ClientID) uint64 { return 0 }

// VIPEpoch implements front.Body.
func (t *Target) VIPEpoch(vip uint32) uint64 { return t.admit.tables.Load().epochs[vip] }

// RaiseVIP implements front.Body.
func (t *Target) RaiseVIP(vip uint32, epoch uint64, done func(error)) {
	st := wire.OK
	t.change(true, func(s *super) bool {
		ok := false
		ok, st = raised(s.Epochs, vip, epoch, maxEpochs)
		return ok
	}, func(err error) {
		if err == nil {
			err = st.Err()
		}
		done(err)
	})
}

// raised sets a table's entry unless that makes the table too large.
func raised[K comparable](m map[K]uint64, k K, v uint64, limit int) (bool, wire.Status) {
	if old, ok := m[k]; ok && old >= v {
		return false, wire.OK
	} else if !ok && len(m) >= limit {
		return false, wire.ErrJukebox
	}
	m[k] = v
	return true, wire.OK
}

// raise executes OpSetVIPEpoch and OpFence; no is a replay's number.
func (t *Target) raise(req *wire.Request, rep *wire.Reply, no uint64, w waiter) {
	st := wire.OK
	finish := func(err error) {
		notDone := err != nil
		switch {
		case notDone:
			st = t.statusOf(err)
		case st != wire.OK:
			notDone = st == wire.ErrJukebox
		case no != 0 || t.begun.Load():
			rep.Transno = t.track.transno(no)
		}
		rep.Status = st
		if w.exec != nil {
			if !notDone {
				t.keepSlot(req, rep)
			}
			w.exec.Executed(recov.Result{Status: st, Transno: rep.Transno, NotDone: notDone})
		}
		t.complete(w)
	}
	fence := req.Op == wire.OpFence
	if t.down.Load() {
		finish(wire.ErrTargetDown)
		return
	}
	if fence && req.Peer == (wire.ClientID{}) || !fence && req.VIP == 0 {
		st = wire.ErrProto
		finish(nil)
		return
	}
	t.change(true, func(s *super) (ok bool) {
		switch {
		case fence:
			ok, st = raised(s.Fences, req.Peer, req.Cookie, maxFences)
		case req.VIPEpoch < s.Epochs[req.VIP] && no == 0:
			st = wire.ErrStaleVIP
		default:
			ok, st = raised(s.Epochs, req.VIP, req.VIPEpoch, maxEpochs)
		}
		return ok
	}, finish)
}

// register executes OpConnect and OpDisconnect of clients that are in the
// target's process and do without recovery.
func (t *Target) register(req *wire.Request, rep *wire.Reply, done func()) {
	st := wire.OK
	finish := func(err error) {
		if err != nil {
			st = t.statusOf(err)
		}
		if rep.Status = st; st == wire.OK {
			rep.Transno = t.track.last()
		}
		t.complete(waiter{rep: rep, done: done})
	}
	if req.Op == wire.OpDisconnect {
		t.DelClient(req.Client, req.ClientGen, false)
		t.change(false, func(*super) bool { return false }, finish)
		return
	}
	if req.Client == (wire.ClientID{}) {
		st = wire.ErrProto
		finish(nil)
		return
	}
	t.putClient(recov.ClientRecord{Client: req.Client, Gen: req.ClientGen, Instance: t.instance, Local: true},
		func(old recov.ClientRecord) wire.Status {
			if req.ClientGen < old.Gen {
				return wire.ErrStaleClient
			}
			return wire.OK
		}, finish)
}
