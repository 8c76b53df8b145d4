package locks

import (
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

var none wire.LockHolder

// check normalises the arguments of a request about a range or a share.
func check(a *wire.LockArgs, share bool) (wire.LockOwner, bool) {
	k, ok := normalOwner(a.Owner)
	if share {
		k.Svid = 0 // a share belongs to the host and its handle
		return k, ok && a.ShareMode <= 3 && a.ShareAccess <= 3
	}
	return k, ok && a.Range.Valid() && len(a.Note) <= wire.MaxLockNote
}

// Lock is OpLock. With ErrLockDenied and ErrLockDeadlock the holder is one that
// is in the way; ErrProto means arguments out of bounds.
func (t *Table) Lock(now int64, fid wire.FID, a *wire.LockArgs) (wire.Status, wire.LockHolder) {
	k, ok := check(a, false)
	if !ok {
		return wire.ErrProto, none
	}
	t.advance(now)
	defer t.settle()
	v := t.makeVIP(k.VIP)
	if !a.Reclaim && t.closedTo(v, k.LockHost) {
		return wire.ErrLockGrace, none
	}
	f, o := t.files[fid], t.findOwner(&k)
	if a.Reclaim {
		return t.reclaim(v, f, o, fid, &k, a)
	}
	var w *entry
	fo := t.fos[foKey{f, o}]
	if fo != nil {
		w = exact(fo.waiting, a.Range, a.Exclusive)
	}
	held := t.conflict(f, o, a.Range, a.Exclusive, now)
	if held != nil && !a.Block {
		return wire.ErrLockDenied, held.holder()
	}
	covered := held == nil && fo != nil && fo.covers(a.Range, a.Exclusive)
	if a.Block && !covered {
		barge, before := false, all
		if w != nil {
			barge, before = w.barge, w.id
		}
		var ahead *entry
		if !barge {
			ahead = f.ahead(o, a.Range, a.Exclusive, before)
		}
		if held != nil && t.circle(f, o, a, 0) {
			h := held.holder()
			if w != nil {
				t.free(w)
			}
			return wire.ErrLockDeadlock, h
		}
		if ahead != nil && t.circle(f, o, a, before) {
			// Queueing would close a circle that only the order of the queue
			// makes: the request does not take part in the order.
			ahead, barge = nil, true
		}
		if held != nil || ahead != nil {
			if held == nil {
				held = ahead
			}
			return t.enqueue(w, fid, &k, a, barge), held.holder()
		}
	}
	if !covered && t.graces > 0 {
		return wire.ErrLockGrace, none
	}
	if d := fo.growth(a.Range, a.Exclusive, v); !t.room(&k, d) {
		return wire.ErrLockNoLocks, none
	}
	f, o = t.makeFile(fid), t.makeOwner(&k)
	t.takeAway(f, o, a.Range, a.Exclusive, now)
	t.grant(f, o, a.Range, a.Exclusive)
	if a.Monitor {
		t.monitor(o.h)
	}
	return wire.OK, none
}

// closedTo tells whether a service address gives out no new locks: it is in
// grace, or lock records were lost and it has not begun a grace period yet. A
// request of a host that has reclaimed shows that it is done with that, which
// may end the grace period.
func (t *Table) closedTo(v *vip, k wire.LockHost) bool {
	if v.grace {
		if h := t.hosts[k]; h != nil && h.stage == stageReclaimed {
			t.setStage(h, stageDone)
			if v.graceOver(t.now) {
				t.endGrace(v)
			}
		}
	}
	return t.closed(v)
}

func (t *Table) closed(v *vip) bool { return v.grace || v.damage < t.damage }

// grant makes r the owner's; nobody is in the way.
func (t *Table) grant(f *file, o *owner, r wire.LockRange, excl bool) {
	var reuse *entry
	if fo := t.fos[foKey{f, o}]; fo != nil {
		// The request acknowledges pending grants of the same locks, and makes
		// waiting for them superfluous.
		for _, e := range slices.Clone(fo.pending) {
			if e.excl == excl && r.Contains(e.r) {
				if reuse == nil {
					reuse = e
				} else {
					t.remove(e)
				}
			}
		}
		t.set(f, o, r, excl, reuse)
		for _, e := range slices.Clone(fo.waiting) {
			if e.r == r && (excl || !e.excl) {
				t.free(e)
			}
		}
	} else {
		t.set(f, o, r, excl, nil)
	}
	t.gave(f, o, excl)
}

// reclaim is Lock for what the client says to have held before.
func (t *Table) reclaim(v *vip, f *file, o *owner, fid wire.FID, k *wire.LockOwner, a *wire.LockArgs) (wire.Status, wire.LockHolder) {
	if h := t.hosts[k.LockHost]; h != nil {
		t.reclaimed(h)
	}
	if fo := t.fos[foKey{f, o}]; fo != nil {
		if fo.covers(a.Range, a.Exclusive) {
			for _, e := range slices.Clone(fo.pending) {
				if e.excl == a.Exclusive && a.Range.Contains(e.r) {
					t.adopt(e, e.r)
				}
			}
			for _, e := range fo.own.collect(nil, a.Range, all) {
				if e.unconfirmed() {
					t.set(f, o, common(e.r, a.Range), e.excl, nil)
				}
			}
			if a.Monitor {
				t.monitor(o.h)
			}
			return wire.OK, none
		}
	}
	// Even what would yield to a new request is in the way here: two claims
	// to one range cannot both be right, and this one has no record.
	if e := t.conflict(f, o, a.Range, a.Exclusive, -1<<63); e != nil {
		return wire.ErrLockDenied, e.holder()
	}
	if !t.closed(v) && v.windowEnd <= t.now {
		return wire.ErrLockGrace, none
	}
	if d := t.fos[foKey{f, o}].growth(a.Range, a.Exclusive, v); !t.room(k, d) {
		return wire.ErrLockNoLocks, none
	}
	f, o = t.makeFile(fid), t.makeOwner(k)
	t.grant(f, o, a.Range, a.Exclusive)
	if a.Monitor {
		t.monitor(o.h)
	}
	t.reclaimed(o.h)
	return wire.OK, none
}

// Test is OpLockTest: what Lock without Block would say. It changes nothing.
func (t *Table) Test(now int64, fid wire.FID, a *wire.LockArgs) (wire.Status, wire.LockHolder) {
	k, ok := check(a, false)
	if !ok {
		return wire.ErrProto, none
	}
	f, o := t.files[fid], t.findOwner(&k)
	if e := t.conflict(f, o, a.Range, a.Exclusive, now); e != nil {
		return wire.ErrLockDenied, e.holder()
	}
	if v := t.findVIP(k.VIP); v == nil && t.damage > 0 && len(t.vips) == 0 || v != nil && (v.damage < t.damage || v.grace && now < v.windowEnd) {
		return wire.ErrLockGrace, none
	}
	if fo := t.fos[foKey{f, o}]; t.graces > 0 && (fo == nil || !fo.covers(a.Range, a.Exclusive)) {
		for _, v := range t.vips {
			if v.grace && now < v.windowEnd {
				return wire.ErrLockGrace, none
			}
		}
	}
	return wire.OK, none
}

// Unlock is OpUnlock: the owner's locks in the range go, and its waiting
// requests inside it.
func (t *Table) Unlock(now int64, fid wire.FID, a *wire.LockArgs) wire.Status {
	k, ok := check(a, false)
	if !ok {
		return wire.ErrProto
	}
	t.advance(now)
	defer t.settle()
	f, o := t.files[fid], t.findOwner(&k)
	fo := t.fos[foKey{f, o}]
	if fo == nil {
		return wire.OK
	}
	for _, e := range slices.Clone(fo.waiting) {
		if a.Range.Contains(e.r) {
			t.free(e)
		}
	}
	for _, e := range slices.Clone(fo.pending) {
		switch {
		case !e.r.Overlaps(a.Range):
		case a.Range.Contains(e.r):
			t.free(e)
		case e.unconfirmed():
			t.cut(e, a.Range)
		default:
			// Whoever gives back a part has the rest; the answer to a callback
			// for a range that no longer exists could not tell.
			rest := minus(e.r, a.Range)
			t.freed(f, a.Range)
			t.adopt(e, rest...)
		}
	}
	for _, e := range fo.own.collect(nil, a.Range, all) {
		if a.Range.Contains(e.r) {
			t.free(e)
		} else {
			t.cut(e, a.Range)
		}
	}
	return wire.OK
}

// Cancel is OpLockCancel: the waiting request goes, or the lock that it became
// if the holder has not acknowledged it; else ErrLockDenied.
func (t *Table) Cancel(now int64, fid wire.FID, a *wire.LockArgs) wire.Status {
	k, ok := check(a, false)
	if !ok {
		return wire.ErrProto
	}
	t.advance(now)
	defer t.settle()
	fo := t.fos[foKey{t.files[fid], t.findOwner(&k)}]
	if fo == nil {
		return wire.ErrLockDenied
	}
	e := exact(fo.waiting, a.Range, a.Exclusive)
	if e == nil {
		e = exact(fo.pending, a.Range, a.Exclusive)
	}
	if e == nil {
		return wire.ErrLockDenied
	}
	t.free(e)
	return wire.OK
}

// GrantDone is OpLockGrantDone: what became of the callback for a lock. It does
// nothing when the lock is not pending any more. A lock that is unconfirmed is
// not taken away: its client may have accepted it before the crash.
func (t *Table) GrantDone(now int64, host wire.LockHost, id uint64, outcome wire.GrantOutcome) wire.Status {
	host, _ = normal(host)
	t.advance(now)
	defer t.settle()
	e := t.ids.get(id)
	if e == nil || e.state != wire.LockGrantPending || e.o.h.key != host {
		return wire.OK
	}
	switch outcome {
	case wire.GrantAccepted:
		t.adopt(e, e.r)
	case wire.GrantRefused, wire.GrantUndelivered:
		if !e.unconfirmed() {
			t.free(e)
		}
	default:
		return wire.ErrProto
	}
	return wire.OK
}

// Share is OpShare. Equal reservations of an owner count once.
func (t *Table) Share(now int64, fid wire.FID, a *wire.LockArgs) (wire.Status, wire.LockHolder) {
	k, ok := check(a, true)
	if !ok {
		return wire.ErrProto, none
	}
	t.advance(now)
	defer t.settle()
	v := t.makeVIP(k.VIP)
	if a.Reclaim {
		if h := t.hosts[k.LockHost]; h != nil {
			t.reclaimed(h)
		}
	} else if t.closedTo(v, k.LockHost) {
		return wire.ErrLockGrace, none
	}
	f, o := t.files[fid], t.findOwner(&k)
	same := f.share(o, a.ShareMode, a.ShareAccess)
	if same == nil {
		var inWay []*entry
		for _, e := range f.shareList() {
			if e.o != o && (e.mode&a.ShareAccess != 0 || a.ShareMode&e.access != 0) {
				if a.Reclaim || !e.yields(now) {
					return wire.ErrLockDenied, e.holder()
				}
				inWay = append(inWay, e)
			}
		}
		if a.Reclaim && !t.closed(v) && v.windowEnd <= now || !a.Reclaim && t.graces > 0 {
			return wire.ErrLockGrace, none
		}
		if !t.room(&k, 1) {
			return wire.ErrLockNoLocks, none
		}
		f, o = t.makeFile(fid), t.makeOwner(&k)
		t.add(&entry{f: f, o: o, share: true, mode: a.ShareMode, access: a.ShareAccess,
			state: wire.LockGranted, since: now, conf: v.state})
		for _, e := range inWay {
			t.remove(e)
		}
	} else if same.unconfirmed() {
		t.unindex(same)
		same.conf = v.state
		t.index(same)
		t.touch(same)
	}
	if a.Monitor {
		t.monitor(o.h)
	}
	if a.Reclaim {
		t.reclaimed(o.h)
	}
	return wire.OK, none
}

// Unshare is OpUnshare; OK also when there is no such reservation.
func (t *Table) Unshare(now int64, fid wire.FID, a *wire.LockArgs) wire.Status {
	k, ok := check(a, true)
	if !ok {
		return wire.ErrProto
	}
	t.advance(now)
	defer t.settle()
	if e := t.files[fid].share(t.findOwner(&k), a.ShareMode, a.ShareAccess); e != nil {
		t.remove(e)
	}
	return wire.OK
}

func (f *file) shareList() []*entry {
	if f == nil {
		return nil
	}
	return f.shares
}

func (f *file) share(o *owner, mode, access uint8) *entry {
	for _, e := range f.shareList() {
		if e.o == o && e.mode == mode && e.access == access {
			return e
		}
	}
	return nil
}

// Release is OpLockRelease: one entry goes, whatever it is; ErrNoEnt.
func (t *Table) Release(now int64, id uint64) (wire.Status, int) {
	t.advance(now)
	defer t.settle()
	e := t.ids.get(id)
	if e == nil {
		return wire.ErrNoEnt, 0
	}
	t.free(e)
	return wire.OK, 1
}

// FileGone removes everything on a file that has lost its last name.
func (t *Table) FileGone(now int64, fid wire.FID) {
	t.advance(now)
	if f := t.files[fid]; f != nil {
		for _, e := range f.entries() {
			t.remove(e)
		}
	}
	t.settle()
}

// exact finds the entry of a list with that range and kind.
func exact(l []*entry, r wire.LockRange, excl bool) *entry {
	for _, e := range l {
		if e.r == r && e.excl == excl {
			return e
		}
	}
	return nil
}

// minus gives the up to two parts of r that are not in cut, which overlaps it.
func minus(r, cut wire.LockRange) []wire.LockRange {
	var l []wire.LockRange
	if r.Start < cut.Start {
		l = append(l, wire.LockRange{Start: r.Start, End: cut.Start - 1})
	}
	if r.End > cut.End {
		l = append(l, wire.LockRange{Start: cut.End + 1, End: r.End})
	}
	return l
}

func common(a, b wire.LockRange) wire.LockRange {
	return wire.LockRange{Start: max(a.Start, b.Start), End: min(a.End, b.End)}
}

// around is r with the byte before and the byte after it.
func around(r wire.LockRange) wire.LockRange {
	if r.Start > 0 {
		r.Start--
	}
	r.End++ // at most 2^63
	return r
}

// covers tells whether the owner has every byte of r at least so strongly,
// pending grants of exactly this kind inside r included (the request would
// acknowledge them).
func (fo *fileOwner) covers(r wire.LockRange, excl bool) bool {
	l := fo.own.collect(nil, r, all)
	for _, e := range fo.pending {
		if e.excl == excl && r.Contains(e.r) {
			l = append(l, e)
		}
	}
	if len(fo.pending) > 0 {
		slices.SortFunc(l, func(a, b *entry) int {
			if less(a, b) {
				return -1
			}
			return 1
		})
	}
	at := r.Start
	for _, e := range l {
		if excl && !e.excl || e.r.End < at {
			continue
		}
		if e.r.Start > at {
			return false
		}
		if at = e.r.End + 1; at > r.End {
			return true
		}
	}
	return false
}

// growth tells how many entries set would add for a request.
func (fo *fileOwner) growth(r wire.LockRange, excl bool, v *vip) int {
	if fo == nil {
		return 1
	}
	d := 1
	for _, e := range fo.own.collect(nil, around(r), all) {
		switch {
		case e.excl == excl && e.conf >= v.crash:
			d--
		case e.r.Overlaps(r):
			d += len(minus(e.r, r)) - 1
		}
	}
	for _, e := range fo.pending {
		if e.excl == excl && r.Contains(e.r) {
			d--
		}
	}
	return d
}

// room tells whether a host may have n more entries.
func (t *Table) room(k *wire.LockOwner, n int) bool {
	if n <= 0 {
		return true
	}
	h := t.hosts[k.LockHost]
	if h == nil {
		return t.ids.live+n <= t.lim.Total && n <= t.lim.PerHost && t.hostRoom()
	}
	return t.ids.live+n <= t.lim.Total && h.n+n <= t.lim.PerHost
}

// conflict finds a held lock of another owner that is in the way of a request.
func (t *Table) conflict(f *file, o *owner, r wire.LockRange, excl bool, now int64) *entry {
	if f == nil {
		return nil
	}
	e := f.held[1].other(r, all, o, now)
	if excl {
		if s := f.held[0].other(r, all, o, now); s != nil && (e == nil || less(s, e)) {
			e = s
		}
	}
	return e
}

// takeAway removes what other owners' unconfirmed locks have of a range that is
// given to o.
func (t *Table) takeAway(f *file, o *owner, r wire.LockRange, excl bool, now int64) {
	for k := range 2 {
		if k == 0 && !excl {
			continue
		}
		var l []*entry
		if f.held[k].root != nil {
			l = f.held[k].collect(nil, r, all)
		}
		for _, e := range l {
			if e.o == o || !e.yields(now) {
				continue
			}
			if r.Contains(e.r) {
				t.remove(e)
			} else {
				t.cut(e, r)
			}
		}
	}
}

// set makes r a confirmed lock of the owner, in place of all that it has there
// but pending grants, and joined with its neighbours of the same kind. reuse is
// a pending entry that becomes the lock.
func (t *Table) set(f *file, o *owner, r wire.LockRange, excl bool, reuse *entry) {
	v := o.h.v
	n, since := r, t.now
	var joins, inside []*entry
	if fo := t.fos[foKey{f, o}]; fo != nil {
		for _, e := range fo.own.collect(nil, around(r), all) {
			if e.excl == excl && !e.unconfirmed() {
				n.Start, n.End = min(n.Start, e.r.Start), max(n.End, e.r.End)
				since = min(since, e.since)
				joins = append(joins, e)
				continue
			}
			if !e.r.Overlaps(r) {
				continue
			}
			if e.excl && !excl {
				t.freed(f, r)
			}
			if e.excl == excl {
				since = min(since, e.since)
			}
			if r.Contains(e.r) {
				inside = append(inside, e)
			} else {
				t.cut(e, r)
			}
		}
	}
	if reuse == nil && len(inside) == 0 && len(joins) == 1 && joins[0].r == n {
		return
	}
	joins = append(joins, inside...)
	base := reuse
	if base == nil && len(joins) > 0 {
		base, joins = joins[0], joins[1:]
	}
	if base == nil {
		t.add(&entry{f: f, o: o, r: n, excl: excl, state: wire.LockGranted, since: since, conf: v.state})
	} else {
		if base.excl == excl {
			since = min(since, base.since)
		}
		t.unindex(base)
		base.r, base.excl, base.state, base.since, base.conf, base.note = n, excl, wire.LockGranted, since, v.state, nil
		t.index(base)
		t.touch(base)
	}
	for _, e := range joins {
		t.remove(e)
	}
}

// gave notes that the owner has got a lock just now.
func (t *Table) gave(f *file, o *owner, excl bool) {
	if fo := t.fos[foKey{f, o}]; fo != nil && excl {
		fo.lastExcl = t.ops
	}
}

// adopt makes a pending entry, or the given parts of it, an ordinary confirmed
// lock. A shared one replaces what the owner has, as a request that is granted at
// once would. But where that is exclusive, and may have been got after the
// request for the pending one was made, it stays: which of the two the client
// means is unknown then.
func (t *Table) adopt(e *entry, parts ...wire.LockRange) {
	f, o := e.f, e.o
	if !e.excl && e.asked <= t.fos[foKey{f, o}].lastExcl {
		var gaps []wire.LockRange
		for _, p := range parts {
			at, done := p.Start, false
			for _, x := range t.fos[foKey{f, o}].own.collect(nil, p, all) {
				if !x.excl {
					continue
				}
				has := common(x.r, p) // set may change x
				if x.unconfirmed() {
					t.set(f, o, has, true, nil)
				}
				if has.Start > at {
					gaps = append(gaps, wire.LockRange{Start: at, End: has.Start - 1})
				}
				if at = has.End + 1; at > p.End {
					done = true
				}
			}
			if !done {
				gaps = append(gaps, wire.LockRange{Start: at, End: p.End})
			}
		}
		parts = gaps
	}
	if len(parts) == 0 {
		t.remove(e)
		return
	}
	excl := e.excl
	for i, p := range parts {
		if i == 0 {
			t.set(f, o, p, excl, e)
		} else {
			t.set(f, o, p, excl, nil)
		}
	}
	t.gave(f, o, excl)
}

// free removes an entry and notes what waiting requests may profit.
func (t *Table) free(e *entry) {
	t.remove(e)
	if !e.share {
		t.freed(e.f, e.r)
	}
}

// cut takes r, which overlaps but does not contain its range, out of a held
// lock.
func (t *Table) cut(e *entry, r wire.LockRange) {
	parts := minus(e.r, r)
	t.freed(e.f, r)
	t.unindex(e)
	e.r = parts[0]
	t.index(e)
	t.touch(e)
	if len(parts) > 1 {
		t.add(&entry{f: e.f, o: e.o, r: parts[1], since: e.since, note: e.note, conf: e.conf, state: e.state, excl: e.excl, asked: e.asked})
	}
}
