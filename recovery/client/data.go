package client

import (
	"cmp"
	"context"
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

// relatimeNs is the age after which an access time is renewed even when
// nothing was written since (24 hours, as Linux relatime).
const relatimeNs = int64(24 * 3600 * 1e9)

// Read reads into buf from offset off of the file that a describes (attributes
// as of Attr: current). It returns the bytes read; eof tells that they end at
// the file's end. Without block ok is false when that needs waiting for disk.
func (f *FS) Read(ctx context.Context, o Owner, a *wire.Attr, off uint64, buf []byte, block bool) (n int, eof bool, st wire.Status, ok bool) {
	if off >= a.Size {
		return 0, true, wire.OK, true
	}
	want := len(buf)
	if left := a.Size - off; uint64(want) >= left {
		want, eof = int(left), true
	}
	if want == 0 {
		return 0, eof, wire.OK, true
	}
	buf = buf[:want]
	var arr [4]piece
	m := f.get()
	defer f.put(m)
	for _, p := range pieces(arr[:0], &a.Layout, off, want) {
		c, st := f.ost(a, p.stripe)
		if st != wire.OK {
			return 0, false, st, true
		}
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpRead
		m.req.FID, m.req.Stripe = a.FID, p.stripe
		m.req.Offset = p.obj
		m.req.Bulk = buf[p.start : p.start+p.n]
		f.header(o, &m.req)
		if !c.TryHandle(&m.req, &m.rep) || m.rep.Status == wire.ErrTooLate {
			if !block {
				return 0, false, 0, false
			}
			m.rep.Reset()
			f.call(ctx, c, m)
		}
		if m.rep.Status != wire.OK {
			return 0, false, m.rep.Status, true
		}
		// Inside the file's size an object that is missing or short is a hole.
		clear(buf[p.start+int(m.rep.Count) : p.start+p.n])
	}
	f.touchAtime(o, a)
	return want, eof, wire.OK, true
}

func (f *FS) touchAtime(o Owner, a *wire.Attr) {
	if !f.o.Atime || a.Atime > a.Mtime && a.Atime > a.Ctime && f.o.Clock()-a.Atime < relatimeNs {
		return
	}
	m := f.get()
	m.req.Op = wire.OpTouchAtime
	m.req.FID = a.FID
	m.req.SetAttr.Mask = wire.SetAtime
	m.req.SetAttr.Atime = f.o.Clock()
	a.Atime = m.req.SetAttr.Atime
	f.Submit(o, &m.req, &m.rep, func() { f.put(m) })
}

// Write writes data at off. a holds the attributes before (as of Attr) and is
// brought up to date; pre is the weak cache consistency data, valid only when it
// is atomic with the write. It blocks until the data have the wanted stability
// and the file's IO epoch is durably open.
func (f *FS) Write(ctx context.Context, o Owner, a *wire.Attr, off uint64, data []byte, stable wire.StableHow) (pre wire.PreAttr, st wire.Status) {
	if off > wire.MaxFileSize || uint64(len(data)) > wire.MaxFileSize-off {
		return pre, wire.ErrFBig
	}
	if len(data) == 0 {
		return a.Pre(), wire.OK
	}
	e, st := f.epochs.acquire(ctx, f, o, a)
	if st != wire.OK {
		return pre, st
	}
	defer f.epochs.release(f, e)
	// Another node may have given the file a time that is still to come here.
	now := max(f.o.Clock(), a.Ctime+1)
	if a.Layout.Count <= 1 {
		p := piece{obj: off, n: len(data)}
		obPre, ob, st := f.writePiece(ctx, o, e, a, &p, data, stable, now)
		if st != wire.OK {
			return pre, st
		}
		if obPre.Valid {
			before := *a
			before.Merge(obPre.Mtime, obPre.Ctime)
			before.Size = obPre.Size
			pre = before.Pre()
		}
		g := merger{}
		g.add(&a.Layout, 0, &ob)
		g.apply(a)
		f.saw(a.Ctime)
		return pre, wire.OK
	}
	if st := f.writePieces(ctx, o, e, a, pieces(nil, &a.Layout, off, len(data)), data, stable, now); st != wire.OK {
		return pre, st
	}
	// The objects of a striped file have no common instant: no pre attributes.
	a.EpochOpen = true
	st, _ = f.Complete(ctx, o, a, true)
	return wire.PreAttr{}, st
}

// writePiece writes to one object. An OST that can write only a part says so
// without an error; it is asked again for the rest and tells the reason then.
func (f *FS) writePiece(ctx context.Context, o Owner, e *epoch, a *wire.Attr, p *piece, data []byte, stable wire.StableHow, now int64) (wire.PreAttr, wire.ObjAttr, wire.Status) {
	c, st := f.ost(a, p.stripe)
	if st != wire.OK {
		return wire.PreAttr{}, wire.ObjAttr{}, st
	}
	m := f.get()
	defer f.put(m)
	var pre wire.PreAttr
	renewed := 0
	for done := 0; ; {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpWrite
		m.req.FID, m.req.Stripe = a.FID, p.stripe
		m.req.Offset = p.obj + uint64(done)
		m.req.Bulk = data[p.start+done : p.start+p.n]
		m.req.Stable = stable
		if o.TwoNode && c.im != nil && stable != wire.Unstable {
			m.req.Stable, m.req.Flags = wire.Unstable, wire.FlagTwoNode
		}
		m.req.Time = now
		f.header(o, &m.req)
		f.call(ctx, c, m)
		f.noteFlush(a.Layout.OST[p.stripe], m.rep.FlushErrors)
		n := int(m.rep.Count)
		switch {
		case m.rep.Status == wire.ErrTooLate && renewed < maxRenewals:
			renewed++
			if st := f.epochs.renew(ctx, f, o, e); st != wire.OK {
				return wire.PreAttr{}, wire.ObjAttr{}, st
			}
			continue
		case m.rep.Status != wire.OK:
			return wire.PreAttr{}, wire.ObjAttr{}, m.rep.Status
		case n == 0 || n > p.n-done:
			return wire.PreAttr{}, wire.ObjAttr{}, wire.ErrIO
		}
		if done == 0 && n == p.n {
			// Of a write in two steps there is no state before.
			pre = m.rep.ObjPre
		}
		if done += n; done == p.n {
			return pre, m.rep.Obj, wire.OK
		}
	}
}

// writePieces writes the parts of a striped range, those of different stripes
// at the same time.
func (f *FS) writePieces(ctx context.Context, o Owner, e *epoch, a *wire.Attr, ps []piece, data []byte, stable wire.StableHow, now int64) wire.Status {
	type res struct{ st wire.Status }
	results := make(chan res, len(ps))
	for i := range ps {
		go func() {
			_, _, st := f.writePiece(ctx, o, e, a, &ps[i], data, stable, now)
			results <- res{st}
		}()
	}
	st := wire.OK
	for range ps {
		if r := <-results; r.st != wire.OK {
			st = r.st
		}
	}
	return st
}

// Commit makes everything written to the file durable, or with o.TwoNode leaves
// it to the two nodes that have it. a is brought up to date.
func (f *FS) Commit(ctx context.Context, o Owner, a *wire.Attr) wire.Status {
	if a.Type != wire.TypeReg {
		return wire.ErrInval
	}
	st := f.syncObjects(ctx, o, a, nil)
	if st != wire.OK {
		return st
	}
	st, _ = f.Complete(ctx, o, a, true)
	return st
}

// syncObjects flushes all objects of a file; each reply goes to mg if not nil.
func (f *FS) syncObjects(ctx context.Context, o Owner, a *wire.Attr, mg *merger) wire.Status {
	m := f.get()
	defer f.put(m)
	for s := uint8(0); s < a.Layout.Count; s++ {
		c, st := f.ost(a, s)
		if st != wire.OK {
			return st
		}
		if c.twoNode(o) {
			continue
		}
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpSyncObject
		m.req.FID, m.req.Stripe = a.FID, s
		f.header(o, &m.req)
		f.call(ctx, c, m)
		f.noteFlush(a.Layout.OST[s], m.rep.FlushErrors)
		if m.rep.Status != wire.OK {
			return m.rep.Status
		}
		if mg != nil {
			mg.add(&a.Layout, s, &m.rep.Obj)
		}
	}
	return wire.OK
}

// Setattr runs OpSetattr in req and, when it changes the size, the punches that
// belong to it, in order with other size changes of this client. A size change
// is durable when it returns, whatever req.Flags say: a punch must not come
// before its record, nor a write before the epoch that the size change opens.
func (f *FS) Setattr(ctx context.Context, o Owner, req *wire.Request, rep *wire.Reply) {
	if req.SetAttr.Mask&wire.SetSize == 0 {
		f.Call(ctx, o, req, rep)
		return
	}
	req.Flags |= wire.FlagWaitCommit
	o.TwoNode = false
	e := f.epochs.ref(f, req.FID)
	e.trunc.Lock()
	f.Call(ctx, o, req, rep)
	if rep.Status == wire.OK && rep.Truncate.LogID != 0 {
		st := wire.ErrTargetDown
		if !rep.Reconstructed {
			f.epochs.markOpen(f, e, req.Tenure)
			st = f.punch(ctx, o, e, &rep.Attr, rep.Truncate)
		} // else it may be another client's, or left to the MDT; the next attempt replaces it
		if st != wire.OK {
			rep.Status = st
		}
	}
	e.trunc.Unlock()
	f.epochs.release(f, e)
}

// Truncated finishes a size change that OpCreate made, durably: on an existing
// file, or on a new one that was given a size. What was answered from memory
// (Reply.Reconstructed) on an existing file is to be asked for again instead.
func (f *FS) Truncated(ctx context.Context, o Owner, a *wire.Attr, t wire.Truncate) wire.Status {
	if t.LogID == 0 {
		return wire.OK
	}
	if !f.finishing.enter() {
		return wire.ErrTargetDown // the record stays; the next start works on it
	}
	defer f.finishing.leave()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.work, cancel)()
	// Not taken for open: since the MDT opened the epoch, an older use of the file may
	// have ended and closed it.
	e := f.epochs.ref(f, a.FID)
	e.trunc.Lock()
	st := f.punch(ctx, o, e, a, t)
	e.trunc.Unlock()
	f.epochs.release(f, e)
	return st
}

// punch executes a logged size change on all objects, after those before it that
// failed, in an open epoch; e.trunc is held.
func (f *FS) punch(ctx context.Context, o Owner, e *epoch, a *wire.Attr, t wire.Truncate) wire.Status {
	if t.LogID <= f.epochs.lost.Load() {
		return wire.ErrTargetDown // left to the MDT
	}
	// One that failed and cut nothing off that this one leaves is not needed
	// any more; the MDT has dropped its record. It may also be t itself.
	e.undone = slices.DeleteFunc(e.undone, func(u wire.Truncate) bool {
		return u.LogID == t.LogID || u.LogID < t.LogID && u.Size >= t.Size
	})
	e.undone = append(e.undone, t)
	slices.SortFunc(e.undone, func(a, b wire.Truncate) int { return cmp.Compare(a.LogID, b.LogID) })
	f.epochs.keep(e)
	if !e.open.Load() {
		switch st := f.epochs.open(ctx, f, o, e); st {
		case wire.OK:
		case wire.ErrStale:
			e.undone = nil // removed meanwhile
			return wire.OK
		default:
			e.retry.Store(true)
			return st
		}
	}
	st := f.punchUndone(ctx, o, e, a)
	if st == wire.OK && t.LogID <= f.epochs.lost.Load() {
		return wire.ErrTargetDown // perhaps not executed
	}
	return st
}

func (f *FS) punchUndone(ctx context.Context, o Owner, e *epoch, a *wire.Attr) wire.Status {
	if e.relost.Swap(false) {
		// An OST that has them still does nothing twice.
		e.undone = append(e.logs, e.undone...)
		e.logs = nil
		slices.SortFunc(e.undone, func(a, b wire.Truncate) int { return cmp.Compare(a.LogID, b.LogID) })
	}
	renewed := 0
	for {
		// In this order: what an eviction leaves to the MDT is not made with a new tenure.
		// Others may have written since.
		tenure := f.tenure.Load()
		lost := f.epochs.lost.Load()
		left := func(t wire.Truncate) bool { return t.LogID <= lost }
		e.undone, e.logs = slices.DeleteFunc(e.undone, left), slices.DeleteFunc(e.logs, left)
		if len(e.undone) == 0 {
			break
		}
		st := f.punchOne(ctx, o, e, a, e.undone[0], tenure)
		if st == wire.ErrTooLate && renewed < maxRenewals {
			renewed++
			if st = f.epochs.renew(ctx, f, o, e); st == wire.OK {
				continue
			}
		}
		if st != wire.OK {
			e.retry.Store(true)
			return st
		}
		e.undone = e.undone[1:]
	}
	e.retry.Store(false)
	return wire.OK
}

// maxLogs bounds the unreported truncate records of one file.
const maxLogs = 256

func (f *FS) punchOne(ctx context.Context, o Owner, e *epoch, a *wire.Attr, t wire.Truncate, tenure uint64) wire.Status {
	m := f.get()
	defer f.put(m)
	var mg merger
	missing := false
	for s := uint8(0); s < a.Layout.Count; s++ {
		c, st := f.ost(a, s)
		if st != wire.OK {
			return st
		}
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpPunch
		m.req.FID, m.req.Stripe = a.FID, s
		m.req.Size = a.Layout.ObjectSize(s, t.Size)
		m.req.LogID = t.LogID
		m.req.Time = a.MtimeSince() // not newer than a time that was set since
		f.header(o, &m.req)
		m.req.Tenure = tenure
		f.call(ctx, c, m)
		f.noteFlush(a.Layout.OST[s], m.rep.FlushErrors)
		if m.rep.Status != wire.OK {
			return m.rep.Status
		}
		missing = missing || !m.rep.Obj.Exists
		mg.add(&a.Layout, s, &m.rep.Obj)
	}
	if !missing && len(e.logs) < maxLogs {
		e.logs = append(e.logs, t)
	} else {
		// An object that does not exist cannot remember that it was cut: a
		// recovery would do it again, on data that were written since. So the
		// record must be gone before the next write.
		if st := f.syncObjects(ctx, Owner{VIP: o.VIP, Epoch: o.Epoch}, a, nil); st != wire.OK {
			return st
		}
		e.logs = append(e.logs, t)
		ids := make([]uint64, len(e.logs))
		for i := range ids {
			ids[i] = e.logs[i].LogID
		}
		if st := f.reportLogs(ctx, ids, wire.FlagWaitCommit); st != wire.OK {
			return st
		}
		e.logs = e.logs[:0]
	}
	a.Size, a.Used = t.Size, mg.used
	return wire.OK
}

// Created tells that the OpCreate with the given transno and FlagOpenEpoch has
// opened the file's IO epoch and that this is durable. It does not block.
func (f *FS) Created(fid wire.FID, transno uint64) { f.epochs.created(fid, transno) }

// Recreated tells that an OpCreate with FlagOpenEpoch was answered from memory
// (Reply.Reconstructed). If it was this client that executed it, the file is in an IO
// epoch of this client, which is closed in time. It does not block.
func (f *FS) Recreated(fid wire.FID) { f.epochs.created(fid, 0) }
