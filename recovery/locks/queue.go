package locks

import (
	"math"
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

// maxSearch bounds the deadlock search: so many blockers are looked at. A
// longer circle is not found, and its requests wait until one is cancelled.
const maxSearch = 100_000

// ahead finds a waiting request of another owner from before an ID that a
// request has to let pass.
func (f *file) ahead(o *owner, r wire.LockRange, excl bool, before uint64) *entry {
	if f == nil {
		return nil
	}
	e := f.wait[1].other(r, before, o, math.MinInt64)
	if e == nil && excl {
		e = f.wait[0].other(r, before, o, math.MinInt64)
	}
	return e
}

// enqueue makes a request wait, or refreshes the one that waits already.
func (t *Table) enqueue(w *entry, fid wire.FID, k *wire.LockOwner, a *wire.LockArgs, barge bool) wire.Status {
	if w == nil {
		if h := t.hosts[k.LockHost]; !t.room(k, 1) || h != nil && h.waiting >= t.lim.WaitersPerHost {
			return wire.ErrLockNoLocks
		}
		o := t.makeOwner(k)
		w = t.add(&entry{f: t.makeFile(fid), o: o, r: a.Range, excl: a.Exclusive, barge: barge, state: wire.LockWaiting,
			since: t.now, conf: o.h.v.state, note: slices.Clone(a.Note), asked: t.ops})
	} else if barge != w.barge || !slices.Equal(w.note, a.Note) {
		w.barge, w.note = barge, slices.Clone(a.Note)
		t.touch(w)
	}
	if a.Monitor {
		t.monitor(w.o.h)
	}
	return wire.ErrLockBlocked
}

// blockers appends what a request waits for: held locks in the way, and waiting
// requests in the way from before an ID (0: none of those).
func (t *Table) blockers(buf []*entry, f *file, o *owner, r wire.LockRange, excl bool, before uint64) []*entry {
	n := len(buf)
	for k := range 2 {
		if k == 1 || excl {
			buf = f.held[k].collect(buf, r, all)
			if before > 0 {
				buf = f.wait[k].collect(buf, r, before)
			}
		}
	}
	return append(buf[:n], slices.DeleteFunc(buf[n:], func(e *entry) bool { return e.o == o || e.yields(t.now) })...)
}

// circle tells whether o would wait for itself if its request waited for the
// held locks in its way (before 0) or for the requests before an ID, too.
func (t *Table) circle(f *file, o *owner, a *wire.LockArgs, before uint64) bool {
	if o == nil {
		return false // has nothing that others could wait for
	}
	t.mark++
	budget := maxSearch
	stack := t.stack[:0]
	var buf []*entry
	push := func(l []*entry) bool {
		for _, e := range l {
			if e.o == o {
				return true
			}
			if e.o.mark != t.mark {
				e.o.mark = t.mark
				stack = append(stack, e.o)
			}
		}
		budget -= len(l)
		return false
	}
	push(t.blockers(nil, f, o, a.Range, a.Exclusive, before))
	found := false
	for len(stack) > 0 && budget > 0 && !found {
		x := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, w := range x.waiting {
			before := w.id
			if w.barge {
				before = 0
			}
			buf = t.blockers(buf[:0], w.f, x, w.r, w.excl, before)
			if found = push(buf); found || budget <= 0 {
				break
			}
		}
	}
	clear(stack)
	t.stack = stack[:0]
	return found
}

// freed notes that nothing, or less, is held or waited for in a range.
func (t *Table) freed(f *file, r wire.LockRange) {
	if f.wait[0].root == nil && f.wait[1].root == nil {
		return
	}
	if f.freedSet {
		f.freed.Start, f.freed.End = min(f.freed.Start, r.Start), max(f.freed.End, r.End)
		return
	}
	f.freed, f.freedSet = r, true
	t.freedFiles = append(t.freedFiles, f)
}

// settle gives waiting requests what the operation has made free.
func (t *Table) settle() {
	if len(t.freedFiles) == 0 {
		return
	}
	if len(t.freedFiles) > 1 {
		slices.SortFunc(t.freedFiles, func(a, b *file) int { return compareFID(a.fid, b.fid) })
	}
	for i := 0; i < len(t.freedFiles); i++ { // grants may add to it
		f := t.freedFiles[i]
		f.freedSet = false
		t.freedFiles[i] = nil
		// While an address reclaims lost locks, nobody can know what is free.
		if t.graces == 0 && (f.wait[0].root != nil || f.wait[1].root != nil) {
			t.examine(f)
		}
	}
	t.freedFiles = t.freedFiles[:0]
}

// examine grants the waiting requests that overlap the freed range and that
// nothing is in the way of, in the order of the queue.
func (t *Table) examine(f *file) {
	l := f.wait[0].collect(nil, f.freed, all)
	l = f.wait[1].collect(l, f.freed, all)
	slices.SortFunc(l, byID)
	for _, w := range l {
		if t.closed(w.o.h.v) || t.conflict(f, w.o, w.r, w.excl, t.now) != nil ||
			!w.barge && f.ahead(w.o, w.r, w.excl, w.id) != nil {
			continue
		}
		t.takeAway(f, w.o, w.r, w.excl, t.now)
		t.unindex(w)
		w.state, w.since, w.conf, w.barge = wire.LockGrantPending, t.now, w.o.h.v.state, false
		t.index(w)
		t.touch(w)
	}
}

// examineAll looks at all waiting requests again: time has made locks free.
func (t *Table) examineAll() {
	for f := range t.waitFiles {
		t.freed(f, wire.LockRange{End: wire.MaxLockOffset})
	}
}
