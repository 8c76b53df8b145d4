package ost

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/wire"
)

const (
	// fastRead is the largest read that TryHandle answers.
	fastRead = 128 << 10
	// Sequential reads are kept raWindow ahead.
	raWindow = 8 << 20
)

// statusOf maps an error of the disk and logs what has no status of its own.
func (t *Target) statusOf(err error) wire.Status {
	var e unix.Errno
	var s wire.Status
	switch {
	case err == nil:
		return wire.OK
	case errors.As(err, &s):
		return s
	case errors.As(err, &e):
		switch e {
		case unix.ENOSPC:
			return wire.ErrNoSpc
		case unix.EDQUOT:
			return wire.ErrDQuot
		case unix.EFBIG:
			return wire.ErrFBig
		case unix.EROFS:
			return wire.ErrROFS
		case unix.EMFILE, unix.ENFILE, unix.ENOMEM:
			return wire.ErrJukebox
		}
	}
	t.log.Error("disk error", "err", err)
	return wire.ErrIO
}

// lock returns the object with a reference and io held shared or exclusively.
func (t *Target) lock(k objKey, exclusive bool) (*object, error) {
	for {
		o, err := t.acquire(k)
		if err != nil {
			return nil, err
		}
		if exclusive {
			o.io.Lock()
		} else {
			o.io.RLock()
		}
		if !o.dead.Load() && o.loaded.Load() {
			return o, nil
		}
		t.unlockObj(o, exclusive)
	}
}

func (t *Target) unlockObj(o *object, exclusive bool) {
	if exclusive {
		o.io.Unlock()
	} else {
		o.io.RUnlock()
	}
	t.release(o)
}

// write executes OpWrite of client by up to durability; no is the number of a
// replay. wait is true when the caller has to sync the object, which then still
// has a reference.
func (t *Target) write(req *wire.Request, rep *wire.Reply, by wire.ClientID, no uint64) (o *object, wait bool) {
	n := uint64(len(req.Bulk))
	if req.Offset > t.maxSize || n > t.maxSize-req.Offset {
		rep.Status = wire.ErrFBig
		return nil, false
	}
	o, err := t.lock(objKey{req.FID, req.Stripe}, false)
	if err != nil {
		rep.Status = t.statusOf(err)
		return nil, false
	}
	if n == 0 {
		o.mu.Lock()
		o.pre(&rep.ObjPre)
		o.attr(&rep.Obj)
		o.mu.Unlock()
		t.unlockObj(o, false)
		return nil, false
	}
	if segs := o.segs.Load(); segs != nil && len(*segs) > maxOpenSegs {
		o.io.RUnlock()
		err := t.closeSegs(o)
		o.io.RLock()
		if err != nil || o.dead.Load() || !o.loaded.Load() {
			t.unlockObj(o, false)
			rep.Status = wire.ErrJukebox
			return nil, false
		}
	}
	// What a replay needs was there before.
	if t.opts.MinFreeBytes > 0 && no == 0 && !t.reserveSpace(o, req.Offset, n) {
		o.mu.Lock()
		o.attr(&rep.Obj)
		o.mu.Unlock()
		t.unlockObj(o, false)
		rep.Status = wire.ErrNoSpc
		return nil, false
	}
	o.mu.Lock()
	if t.known(o, no) {
		rep.Transno, rep.Count = no, uint32(n)
		o.attr(&rep.Obj)
		o.mu.Unlock()
		t.unlockObj(o, false)
		return nil, false
	}
	if err := t.barrier(o, by); err != nil {
		o.mu.Unlock()
		t.unlockObj(o, false)
		rep.Status = t.statusOf(err)
		return nil, false
	}
	mine := span{req.Offset, req.Offset + n}
	o.enter(mine)
	o.mu.Unlock()
	done := uint64(0)
	p := req.Bulk
	created := false
	var last *seg
	for len(p) > 0 {
		off := req.Offset + done
		idx := uint32(off >> t.segShift)
		in := off & (t.segSize - 1)
		s := o.find(idx)
		if s == nil {
			o.mu.Lock()
			if !o.exists {
				created = true
				if err = t.gone.check(o.key); err == nil {
					t.firstTouch(o, req.Time)
				}
			}
			if err == nil {
				s, err = t.openSeg(o, idx, true)
			}
			o.mu.Unlock()
			if err != nil {
				break
			}
		}
		k := min(uint64(len(p)), t.segSize-in)
		var m int
		m, err = t.fs.Pwrite(s.fd, p[:k], int64(in)+headerSize)
		if m > 0 {
			s.dirty.Store(true)
			last = s
		}
		done += uint64(m)
		p = p[m:]
		if err != nil {
			break
		}
	}
	o.mu.Lock()
	o.leave(mine)
	if o.pre(&rep.ObjPre); created {
		rep.ObjPre = wire.PreAttr{Valid: true}
	}
	if done > 0 {
		if end := req.Offset + done; end > o.size {
			o.size = end
		}
		t.touch(o, req.Time)
		o.hdrDirty = true
		rep.Transno = t.changed(o, by, no)
		if last.idx > o.lastSeg {
			o.lastSeg = last.idx
			if herr := t.writeHeader(o); herr != nil {
				err, done = herr, 0
			}
		}
		t.refreshUsed(o, last)
	}
	o.attr(&rep.Obj)
	o.mu.Unlock()
	if done == 0 {
		t.unlockObj(o, false)
		rep.Status = t.statusOf(fmt.Errorf("write object: %w", err))
		return nil, false
	}
	// A short write that made progress is a success of that many bytes; the
	// client asks again for the rest and then gets the error.
	rep.Count = uint32(done)
	o.io.RUnlock()
	t.stats.writes.Add(1)
	t.stats.writeBytes.Add(done)
	o.dirtyBytes.Add(int64(done))
	if t.dirtyBytes.Add(int64(done)) > t.opts.DirtyLimitBytes {
		t.wake()
	}
	stable := req.Stable != wire.Unstable || req.Flags&wire.FlagWaitCommit != 0
	// Too many dirty objects would pin too many files: those who make more wait.
	if stable || t.track.n.Load() > int64(t.opts.MaxOpenFiles) {
		return o, true
	}
	// Small writes are left alone: they may be random, and pages under writeback
	// hold up those who change them again.
	if done >= hintWrite && o.hintBytes.Add(int64(done)) >= hintBytes {
		o.hintBytes.Store(0)
		t.hint(o, last)
	}
	t.release(o)
	return nil, false
}

// hint starts writeback of a segment.
func (t *Target) hint(o *object, s *seg) {
	o.io.RLock()
	if cur := o.find(s.idx); cur != nil && !o.dead.Load() {
		if err := t.fs.StartWriteback(cur.fd); err != nil && err != unix.ESPIPE {
			t.log.Debug("start of writeback failed", "err", err)
		}
	}
	o.io.RUnlock()
}

// closeSegs bounds the open segments of a huge sparse object: flush, then close
// all but the first.
func (t *Target) closeSegs(o *object) error {
	if err := t.syncNow(o); err != nil {
		return err
	}
	o.io.Lock()
	o.mu.Lock()
	t.dropSegs(o, func(s *seg) bool { return s.idx != 0 && !s.dirty.Load() })
	o.mu.Unlock()
	o.io.Unlock()
	return nil
}

// read executes OpRead. With fast it only takes what is in memory and needs no
// waiting, and reports whether that was all.
func (t *Target) read(o *object, req *wire.Request, rep *wire.Reply, fast bool) bool {
	if fast {
		if !o.mu.TryLock() {
			return false
		}
	} else {
		o.mu.Lock()
	}
	size := o.size
	exists := o.exists
	o.attr(&rep.Obj)
	o.mu.Unlock()
	if !exists || req.Offset >= size {
		return true
	}
	n := min(uint64(len(req.Bulk)), size-req.Offset)
	p := req.Bulk[:n]
	off := req.Offset
	for len(p) > 0 {
		idx := uint32(off >> t.segShift)
		in := off & (t.segSize - 1)
		k := min(uint64(len(p)), t.segSize-in)
		s := o.find(idx)
		if s == nil {
			if fast {
				return false
			}
			o.mu.Lock()
			var err error
			s, err = t.openSeg(o, idx, false)
			o.mu.Unlock()
			if err != nil {
				rep.Status = t.statusOf(fmt.Errorf("read object: %w", err))
				return true
			}
		}
		m := 0
		if s != nil {
			var err error
			if fast {
				m, err = t.fs.PreadNowait(s.fd, p[:k], int64(in)+headerSize)
				if err == unix.EOPNOTSUPP {
					t.noNowait.Store(true)
				}
				// Short: the rest is not in memory, or a hole at the end.
				if err != nil || uint64(m) < k {
					return false
				}
			} else if m, err = t.fs.Pread(s.fd, p[:k], int64(in)+headerSize); err != nil {
				rep.Status = t.statusOf(fmt.Errorf("read object: %w", err))
				return true
			}
		}
		clear(p[m:k])
		p = p[k:]
		off += k
	}
	rep.Count = uint32(n)
	return true
}

// readahead keeps a sequential reader's data coming.
func (t *Target) readahead(o *object, off, n uint64) {
	end := off + n
	prev := o.readEnd.Swap(end)
	if prev != off || off == 0 {
		o.raEnd.Store(end)
		return
	}
	ra := max(o.raEnd.Load(), end)
	if ra-end > raWindow/2 {
		return
	}
	s := o.find(uint32(ra >> t.segShift))
	if s == nil {
		return
	}
	o.raEnd.Store(ra + raWindow)
	in := int64(ra & (t.segSize - 1))
	// Only a hint: an error changes nothing.
	_ = t.fs.Readahead(s.fd, in+headerSize, min(raWindow, int64(t.segSize)-in))
}

// punch executes OpPunch; by, no and wait as for write.
func (t *Target) punch(req *wire.Request, rep *wire.Reply, by wire.ClientID, no uint64) (o *object, wait bool) {
	if req.Size > t.maxSize {
		rep.Status = wire.ErrFBig
		return nil, false
	}
	o, err := t.lock(objKey{req.FID, req.Stripe}, true)
	if err != nil {
		rep.Status = t.statusOf(err)
		return nil, false
	}
	o.mu.Lock()
	if err = t.barrier(o, by); err != nil {
		o.mu.Unlock()
		t.unlockObj(o, true)
		rep.Status = t.statusOf(err)
		return nil, false
	}
	o.pre(&rep.ObjPre)
	switch {
	case t.known(o, no):
		rep.Transno = no
	case !o.exists && req.Size == 0:
		// Nothing is changed, so it gets no number and nobody replays it: by then
		// there may be something to cut off.
		if no != 0 {
			rep.Transno = t.track.transno(no)
		}
	case o.exists && req.LogID != 0 && req.LogID <= o.logID:
		rep.Transno = t.track.transno(no)
	case !o.exists && t.gone.check(o.key) != nil:
		err = wire.ErrStale
	default:
		// Before the header is written, so that a process crash keeps it.
		mtime, ctime := o.mtime, o.ctime
		t.touch(o, req.Time)
		if err = t.truncateTo(o, req.Size, req.LogID, req.LogID != 0); err != nil {
			o.mtime, o.ctime = mtime, ctime
		}
		if o.exists {
			o.hdrDirty = true
			rep.Transno = t.changed(o, by, no)
			if req.LogID != 0 {
				o.puncher = by
			}
		}
	}
	o.attr(&rep.Obj)
	o.mu.Unlock()
	o.io.Unlock()
	if err != nil {
		t.release(o)
		rep.Status = t.statusOf(err)
		return nil, false
	}
	if req.Flags&wire.FlagWaitCommit != 0 {
		return o, true
	}
	t.release(o)
	return nil, false
}

// destroy executes OpDestroy; by, no and wait as for write.
func (t *Target) destroy(req *wire.Request, rep *wire.Reply, by wire.ClientID, no uint64) (o *object, wait bool) {
	k := objKey{req.FID, req.Stripe}
	// Not lock: a damaged object must go, too.
	for {
		var buf [4]*object
		var victims []*object
		o, victims = t.table.get(k, buf[:0])
		t.evict(victims)
		o.io.Lock()
		if !o.dead.Load() {
			break
		}
		o.io.Unlock()
		t.release(o)
	}
	t.gone.add(k)
	o.mu.Lock()
	removed, err := t.removeFiles(o)
	if removed {
		t.dirs[k.dir()].changed()
	}
	switch {
	case err != nil:
	case removed || o.exists:
		o.dead.Store(true)
		o.exists = false
		rep.Transno = t.changed(o, by, no)
	case no != 0 || t.begun.Load():
		rep.Transno = t.track.transno(no)
	}
	o.mu.Unlock()
	if o.dead.Load() {
		t.table.drop(o)
	} else if err == nil && req.Flags&wire.FlagWaitCommit != 0 {
		// Destroyed before, perhaps not durably.
		err = t.dirs[k.dir()].sync(t.fs)
	}
	o.io.Unlock()
	if err != nil {
		rep.Status = t.statusOf(fmt.Errorf("destroy object: %w", err))
		t.release(o)
		return nil, false
	}
	if req.Flags&wire.FlagWaitCommit != 0 {
		return o, true
	}
	t.release(o)
	return nil, false
}

// removeFiles removes the object's files, segment 0 last so that a destroy that
// was interrupted can be repeated. removed: there was a file.
func (t *Target) removeFiles(o *object) (removed bool, err error) {
	rm := func(path string) error {
		err := t.fs.Remove(path)
		if err == unix.ENOENT {
			return nil
		}
		removed = removed || err == nil
		return err
	}
	if !o.loaded.Load() || !o.exists || o.multi || len(t.lost) > 0 {
		names, err := t.fs.ReadDir(o.key.segDir())
		if err != nil && err != unix.ENOENT {
			return removed, err
		}
		for _, n := range names {
			if err := rm(o.key.segDir() + "/" + n); err != nil {
				return removed, err
			}
		}
		if err == nil {
			if err := rm(o.key.segDir()); err != nil {
				return removed, err
			}
		}
	}
	return removed, rm(o.key.path())
}

// spaceBudget is how much may be written before the file system is asked again.
type spaceBudget struct{ left atomic.Int64 }

// spaceStep bounds the budget, in bytes, because other targets and programs take
// from the same file system.
const spaceStep = 2 << 20

// refreshSpace renews the budget, for a write of n bytes at least.
func (t *Target) refreshSpace(n uint64) {
	if t.opts.MinFreeBytes == 0 {
		return
	}
	if sp, err := t.fs.Statfs(); err == nil {
		left := int64(min(sp.Avail, 1<<62)) - int64(min(t.opts.MinFreeBytes, 1<<62))
		t.space.left.Store(min(left, max(spaceStep, int64(min(n, 1<<62)))))
	}
}

// reserveSpace tells whether n bytes at off may be written without going below
// the free space to keep. Overwriting what is allocated is always allowed.
func (t *Target) reserveSpace(o *object, off, n uint64) bool {
	o.mu.Lock()
	full := o.exists && off+n <= o.size && o.allocated() >= o.size
	o.mu.Unlock()
	if full || t.space.left.Add(-int64(n)) >= 0 {
		return true
	}
	t.refreshSpace(n)
	return t.space.left.Add(-int64(n)) >= 0
}
