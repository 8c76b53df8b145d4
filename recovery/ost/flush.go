package ost

import (
	"fmt"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

// waiter is a request, or a function, that waits for a flush.
type waiter struct {
	rep  *wire.Reply
	done func()
	exec front.Execution // instead of done
	fn   func(error)
}

// flushQueue is the list of objects that the flushers work on. An object is in
// it at most once.
type flushQueue struct {
	mu         sync.Mutex
	cond       sync.Cond
	head, tail *object
	closed     bool
}

func (q *flushQueue) push(o *object) {
	q.mu.Lock()
	o.qnext = nil
	if q.tail != nil {
		q.tail.qnext = o
	} else {
		q.head = o
	}
	q.tail = o
	q.mu.Unlock()
	q.cond.Signal()
}

func (q *flushQueue) pop() *object {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.head == nil {
		if q.closed {
			return nil
		}
		q.cond.Wait()
	}
	o := q.head
	if q.head = o.qnext; q.head == nil {
		q.tail = nil
	}
	o.qnext = nil
	return o
}

// popAll takes everything that is in the queue, at least one object; nil when
// the queue is closed and empty.
func (q *flushQueue) popAll(out []*object) []*object {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.head == nil {
		if q.closed {
			return nil
		}
		q.cond.Wait()
	}
	for o := q.head; o != nil; {
		out = append(out, o)
		o, o.qnext = o.qnext, nil
	}
	q.head, q.tail = nil, nil
	return out
}

func (q *flushQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.cond.Broadcast()
}

// syncObject makes everything durable that was done to o before the call, then
// completes w. While a flush of o runs, those who come gather for the next one:
// however many wait, one flush is under way. A zero w starts a flush that
// nobody waits for. It reports whether there was nothing to wait for; w is not
// completed then.
func (t *Target) syncObject(o *object, w waiter) (clean bool) {
	o.smu.Lock()
	defer o.smu.Unlock()
	dirty := t.track.dirty(o)
	wants := w.rep != nil || w.fn != nil
	if o.flushing && !dirty && len(o.wait) == 0 {
		// What the caller wants is what is being flushed.
		if wants {
			o.cur = append(o.cur, w)
		}
		return false
	}
	if !dirty && !o.flushing && !o.queued {
		return true
	}
	if wants {
		o.wait = append(o.wait, w)
	}
	if !o.queued && (!o.flushing || dirty) {
		o.queued = true
		if !o.flushing {
			o.refs.Add(1)
			t.enqueue(o)
		}
	}
	return false
}

// syncNow is syncObject for callers that wait.
func (t *Target) syncNow(o *object) error {
	ch := make(chan error, 1)
	if t.syncObject(o, waiter{fn: func(err error) { ch <- err }}) {
		return nil
	}
	return <-ch
}

// enqueue gives o to be flushed. A new object needs a commit of the file
// system's journal, so new ones that come together share one. The others need
// no more than their own blocks on the disk: a syncfs would make them wait for
// each other and for a journal commit, while flushes of their own run side by
// side and the disk joins their barriers.
func (t *Target) enqueue(o *object) {
	if o.entryNew.Load() {
		t.gather.push(o)
	} else {
		t.queue.push(o)
	}
}

// startFlush takes the group that gathered. Called with smu held and flushing
// false.
func (t *Target) startFlush(o *object) *dirtyNode {
	o.queued, o.flushing = false, true
	o.cur, o.wait = o.wait, o.cur[:0]
	return t.track.begin(o)
}

// endFlush completes the group and hands the next one on. The reference that
// the queue held stays with the next group, or is dropped.
func (t *Target) endFlush(o *object, n *dirtyNode, err error, buf []waiter) []waiter {
	if err != nil {
		// Counted before last_committed can pass what is lost, so that no reply
		// shows the second without the first.
		t.flushErrors.Add(1)
		t.log.Error("flush failed: data may be lost", "fid", o.key.fid, "stripe", o.key.stripe, "err", err)
		if t.opts.OnFlushError != nil {
			t.opts.OnFlushError()
		}
	}
	if n != nil {
		if err != nil {
			o.mu.Lock()
			to := o.marked
			o.mu.Unlock()
			t.commits.flushFailed(n.transno, max(n.transno, to))
		}
		t.track.end(n)
	}
	o.smu.Lock()
	buf = append(buf[:0], o.cur...)
	clear(o.cur)
	o.cur = o.cur[:0]
	o.flushing = false
	again := o.queued || len(o.wait) > 0
	o.queued = again
	o.smu.Unlock()
	if again {
		t.enqueue(o)
	} else {
		t.release(o)
	}
	if n != nil {
		t.release(o)
	}
	for i, w := range buf {
		if w.fn != nil {
			w.fn(err)
		} else {
			if err != nil {
				w.rep.Status = wire.ErrIO
			}
			t.complete(w)
		}
		buf[i] = waiter{}
	}
	return buf
}

func (t *Target) flusher() {
	defer t.flushing.Done()
	var buf []waiter
	for {
		o := t.queue.pop()
		if o == nil {
			return
		}
		buf = t.flushOne(o, buf)
	}
}

func (t *Target) flushOne(o *object, buf []waiter) []waiter {
	o.smu.Lock()
	n := t.startFlush(o)
	o.smu.Unlock()
	var err error
	if n != nil {
		t.stats.flushes.Add(1)
		err = t.flush(o)
	}
	return t.endFlush(o, n, err, buf)
}

// grouper takes the objects that wait for a flush. Each alone needs a flush of
// the disk, and new ones a journal commit; those that came together share one
// syncfs. While that runs the next group gathers.
func (t *Target) grouper() {
	defer t.flushing.Done()
	var (
		objs []*object
		buf  []waiter
		one  sync.WaitGroup
		skip int
	)
	for {
		if objs = t.gather.popAll(objs[:0]); objs == nil {
			return
		}
		if len(objs) >= groupObjects && skip == 0 && t.dirtyBytes.Load() < syncfsBytes {
			began := time.Now()
			buf = t.flushGroup(objs, buf)
			if time.Since(began) > slowSyncfs {
				// Somebody else's data on the same file system go with ours.
				skip = 16
			}
			continue
		}
		if len(objs) >= groupObjects {
			skip = max(0, skip-1)
			for _, o := range objs {
				t.queue.push(o)
			}
			continue
		}
		// Few: each for itself, and waited for, so that the next ones gather.
		for _, o := range objs[1:] {
			one.Add(1)
			go func() {
				defer one.Done()
				t.flushOne(o, nil)
			}()
		}
		buf = t.flushOne(objs[0], buf)
		one.Wait()
	}
}

// snapshot is what one flush has to make durable.
type snapshot struct {
	segs               []*seg
	first              *seg
	entryNew, segNames bool
	punched            bool
	punchSeq           uint64
	prove              bool
	upTo               uint64 // transno of the newest change that it covers
	dead               bool
}

// prepare collects what is dirty and writes the header. Changes after it belong
// to the next flush.
func (t *Target) prepare(o *object) (s snapshot, err error) {
	t.dirtyBytes.Add(-o.dirtyBytes.Swap(0))
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dead.Load() {
		s.dead = true
		return s, nil
	}
	if !o.exists {
		return s, nil
	}
	if o.hdrDirty {
		if err := t.writeHeader(o); err != nil {
			return s, err
		}
	}
	o.inFlush = true
	s.first = o.find(0)
	t.collect(o, &s)
	s.punched = o.punchInst != 0
	s.prove = o.by.n > 1
	return s, nil
}

// collect adds to the snapshot what is dirty (mu held).
func (t *Target) collect(o *object, s *snapshot) {
	if p := o.segs.Load(); p != nil {
		for _, g := range *p {
			if g.dirty.Swap(false) && g != s.first {
				s.segs = append(s.segs, g)
			}
		}
	}
	s.entryNew = o.entryNew.Swap(false) || s.entryNew
	s.segNames, o.segDirNew = s.segNames || o.segDirNew, false
	s.punchSeq, s.upTo = o.punchSeq, o.marked
	o.after = writers{}
}

// finish ends what prepare began.
func (t *Target) finish(o *object, s *snapshot, err error) {
	if s.first == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.inFlush = false
	for _, fd := range o.zombies {
		t.closeFD(fd)
	}
	o.zombies = nil
	if err != nil {
		for _, g := range s.segs {
			g.dirty.Store(true)
		}
		s.first.dirty.Store(true)
		o.hdrDirty = true
		if s.entryNew {
			o.entryNew.Store(true)
		}
		o.segDirNew = o.segDirNew || s.segNames
		return
	}
	o.sure = max(o.sure, s.upTo)
	if s.prove || s.punched {
		o.by = o.after
	}
	t.refreshUsed(o, s.first)
}

// flush makes o durable: further segments, their names, segment 0 with the
// header, its name.
func (t *Target) flush(o *object) error {
	s, err := t.prepare(o)
	if err != nil {
		return err
	}
	err = t.flushFiles(o, &s)
	t.finish(o, &s, err)
	return err
}

func (t *Target) flushFiles(o *object, s *snapshot) error {
	if s.dead {
		return t.dirs[o.key.dir()].sync(t.fs)
	}
	if s.first == nil {
		return nil
	}
	if err := t.syncFiles(o, s); err != nil {
		return err
	}
	return t.settle(o, s)
}

func (t *Target) syncFiles(o *object, s *snapshot) error {
	for _, g := range s.segs {
		if err := t.fs.Fdatasync(g.fd); err != nil {
			return fmt.Errorf("sync segment: %w", err)
		}
	}
	if s.segNames {
		if err := t.syncPath(o.key.segDir()); err != nil {
			// Gone because the object is being destroyed? That holds mu.
			o.mu.Lock()
			dead := o.dead.Load()
			o.mu.Unlock()
			if !dead {
				return err
			}
		}
	}
	if err := t.fs.Fdatasync(s.first.fd); err != nil {
		return fmt.Errorf("sync object: %w", err)
	}
	if s.entryNew && !t.fs.SyncsNames() {
		return t.dirs[o.key.dir()].sync(t.fs)
	}
	return nil
}

// settle puts into the header, after the flush, that it has been, and makes that
// durable too, where replays or repetitions depend on it (order.go). With it the
// mark of an unsure truncate goes: data written after the truncate must not be
// cut off by a repetition.
func (t *Target) settle(o *object, s *snapshot) error {
	for s.punched || s.prove {
		o.mu.Lock()
		if o.dead.Load() {
			o.mu.Unlock()
			return nil
		}
		if s.punched && o.punchSeq != s.punchSeq {
			// Another truncate: it has to be durable, with all that was before it.
			t.collect(o, s)
			o.mu.Unlock()
			if err := t.syncFiles(o, s); err != nil {
				return err
			}
			continue
		}
		o.sure = max(o.sure, s.upTo)
		if s.punched {
			o.punchInst, o.punchSize = 0, 0
		}
		err := t.writeHeader(o)
		o.mu.Unlock()
		if err != nil {
			return err
		}
		if err := t.fs.Fdatasync(s.first.fd); err != nil {
			return fmt.Errorf("sync object: %w", err)
		}
		return nil
	}
	return nil
}

// dirState coalesces the fsyncs of one fan-out directory.
type dirState struct {
	fd      int
	mu      sync.Mutex
	cond    sync.Cond
	names   uint64 // changes made
	durable uint64 // changes known to be durable
	running bool
}

// changed is called after a name was made or removed.
func (d *dirState) changed() {
	d.mu.Lock()
	d.names++
	d.mu.Unlock()
}

type syncer interface{ Fdatasync(fd int) error }

// sync makes all changes before the call durable.
func (d *dirState) sync(fs syncer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := d.names
	for d.durable < want {
		if d.running {
			d.cond.Wait()
			continue
		}
		d.running = true
		upTo := d.names
		d.mu.Unlock()
		err := fs.Fdatasync(d.fd)
		d.mu.Lock()
		d.running = false
		if err == nil {
			d.durable = max(d.durable, upTo)
		}
		d.cond.Broadcast()
		if err != nil {
			return fmt.Errorf("sync directory: %w", err)
		}
	}
	return nil
}

// flushDirty makes every change with a transno up to limit durable and returns
// the first error. Many small objects are made durable with one syncfs instead
// of one journal commit each.
func (t *Target) flushDirty(limit uint64, wait bool) error {
	var (
		objs  []*object
		wg    sync.WaitGroup
		errMu sync.Mutex
		first error
	)
	fn := func(err error) {
		errMu.Lock()
		if first == nil {
			first = err
		}
		errMu.Unlock()
		wg.Done()
	}
	objs = t.track.oldest(objs, 1<<20, limit)
	if len(objs) >= syncfsObjects && t.dirtyBytes.Load() < syncfsBytes {
		objs = t.flushTogether(objs)
	}
	for _, o := range objs {
		w := waiter{}
		if wait {
			wg.Add(1)
			w.fn = fn
		}
		if t.syncObject(o, w) && wait {
			wg.Done()
		}
		t.release(o)
	}
	wg.Wait()
	return first
}

// flushTogether flushes the objects that nobody is flushing with one syncfs
// and returns the others.
func (t *Target) flushTogether(objs []*object) (rest []*object) {
	group := make([]*object, 0, len(objs))
	for _, o := range objs {
		o.smu.Lock()
		free := !o.queued && !o.flushing
		if free {
			o.queued = true // ours to flush; the reference stands for the queue's
			group = append(group, o)
		} else {
			rest = append(rest, o)
		}
		o.smu.Unlock()
	}
	t.flushGroup(group, nil)
	return rest
}

// flushGroup flushes objects that were taken out of a queue with one syncfs.
func (t *Target) flushGroup(objs []*object, buf []waiter) []waiter {
	type flush struct {
		o   *object
		n   *dirtyNode
		s   snapshot
		err error
	}
	group := make([]flush, 0, len(objs))
	for _, o := range objs {
		o.smu.Lock()
		f := flush{o: o, n: t.startFlush(o)}
		o.smu.Unlock()
		if f.n != nil {
			f.s, f.err = t.prepare(o)
		}
		group = append(group, f)
	}
	t.stats.flushes.Add(1)
	err := t.fs.Syncfs()
	if err != nil {
		err = fmt.Errorf("sync file system: %w", err)
	}
	for i := range group {
		f := &group[i]
		if f.n != nil {
			if f.err == nil {
				f.err = err
			}
			if f.err == nil {
				f.err = t.settle(f.o, &f.s)
			}
			t.finish(f.o, &f.s, f.err)
		}
		buf = t.endFlush(f.o, f.n, f.err, buf)
	}
	return buf
}
