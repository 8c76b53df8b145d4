package client

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// An epoch is this client's right to change a file's data while the MDT's idea
// of the file's size is suspended (SOM). It is open at the MDT, durably, from
// before the first write is acknowledged until the closer has flushed the
// objects and told the MDT the size.
type epoch struct {
	fid  wire.FID
	refs int // under the shard's lock
	// closing is not nil while the closer works on the epoch; closed at its end.
	closing chan struct{}
	last    int64 // UnixNano of the last release, under the shard's lock
	// untouched: opened by the create and not used since, so there are no objects but
	// those that other clients have made.
	// Under the shard's lock, or closing being set.
	untouched bool
	// kept: even if it counts as not open here the MDT may have it open, because a close
	// was skipped, the create was answered from memory or the size was changed, and it
	// has to be closed. Under the shard's lock.
	kept bool

	mu   longLock // serialises opening
	open atomic.Bool

	trunc longLock // serialises size changes: MDT first, then punches
	// undone are size changes that the MDT has made and the OSTs have not
	// executed, by log id. Nothing is written before they were tried again: a
	// recovery executes them, and would cut off what was written after them.
	// Guarded by trunc, or by closing being set; retry tells that there are any.
	undone []wire.Truncate
	retry  atomic.Bool
	// logs are size changes whose punches the OSTs have executed; their records are
	// reported to the MDT once the objects were flushed. Guarded like undone.
	logs []wire.Truncate
	// relost tells that an OST has forgotten punches of the file: those in logs
	// are undone again. Set at any time, cleared with trunc held.
	relost atomic.Bool
}

const epochShards = 64

type epochTable struct {
	shards [epochShards]struct {
		mu sync.Mutex
		m  map[wire.FID]*epoch
		// closed is the transno of the newest OpCloseEpoch for files of this shard, or
		// the highest one before an eviction.
		closed uint64
	}
	n atomic.Int64
	// lost is the highest transno, and so truncate record, before an eviction by the
	// MDT: what was to be done for older records is the MDT's.
	lost atomic.Uint64
}

func (t *epochTable) init() {
	for i := range t.shards {
		t.shards[i].m = make(map[wire.FID]*epoch)
	}
}

func (t *epochTable) shard(fid wire.FID) int {
	return int((fid.OID ^ uint32(fid.Seq)*2654435761) % epochShards)
}

// ref gives the file's epoch, open or not, and keeps it from being closed.
func (t *epochTable) ref(f *FS, fid wire.FID) *epoch {
	s := &t.shards[t.shard(fid)]
	for {
		s.mu.Lock()
		e := s.m[fid]
		if e == nil {
			e = &epoch{fid: fid}
			s.m[fid] = e
			t.n.Add(1)
		}
		if e.closing == nil {
			e.refs++
			e.untouched = false
			s.mu.Unlock()
			return e
		}
		wait := e.closing
		s.mu.Unlock()
		<-wait
	}
}

// acquire is ref plus opening the epoch at the MDT, durably, if it is not open.
// a tells the file and its layout. Size changes that failed at the OSTs are
// tried again.
func (t *epochTable) acquire(ctx context.Context, f *FS, o Owner, a *wire.Attr) (*epoch, wire.Status) {
	e := t.ref(f, a.FID)
	st := wire.OK
	if !e.open.Load() {
		st = t.open(ctx, f, o, e)
	}
	if st == wire.OK && (e.retry.Load() || e.relost.Load()) {
		e.trunc.Lock()
		st = f.punchUndone(ctx, o, e, a)
		e.trunc.Unlock()
	}
	if st != wire.OK {
		t.release(f, e)
		return nil, st
	}
	return e, wire.OK
}

func (t *epochTable) open(ctx context.Context, f *FS, o Owner, e *epoch) wire.Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	for range maxRenewals {
		if e.open.Load() {
			return wire.OK
		}
		if st := t.openOnce(ctx, f, o, e); st != wire.OK {
			return st
		}
	}
	return wire.ErrTargetDown
}

func (t *epochTable) openOnce(ctx context.Context, f *FS, o Owner, e *epoch) wire.Status {
	m := f.get()
	defer f.put(m)
	m.req.Op = wire.OpOpenEpoch
	m.req.Flags = wire.FlagWaitCommit
	m.req.FID = e.fid
	f.Call(ctx, o, &m.req, &m.rep)
	if m.rep.Status == wire.OK {
		t.markOpen(f, e, m.req.Tenure)
	}
	return m.rep.Status
}

// markOpen notes that the MDT has opened the epoch, unless it has evicted this
// client since the request got its tenure: then the next use asks again.
func (t *epochTable) markOpen(f *FS, e *epoch, tenure uint64) {
	s := &t.shards[t.shard(e.fid)]
	s.mu.Lock()
	if tenure == f.tenure.Load() {
		e.open.Store(true)
	}
	s.mu.Unlock()
}

// keep has the epoch closed even if it does not count as open.
func (t *epochTable) keep(e *epoch) {
	s := &t.shards[t.shard(e.fid)]
	s.mu.Lock()
	e.kept = true
	s.mu.Unlock()
}

// maxRenewals bounds how often one request opens its epoch anew: each time the
// MDT must have evicted this client.
const maxRenewals = 3

// renew opens the epoch anew after an OST has refused a request because the MDT
// has evicted this client, which may not have noticed yet.
func (t *epochTable) renew(ctx context.Context, f *FS, o Owner, e *epoch) wire.Status {
	e.open.Store(false)
	return t.open(ctx, f, o, e)
}

func (t *epochTable) release(f *FS, e *epoch) {
	s := &t.shards[t.shard(e.fid)]
	s.mu.Lock()
	e.refs--
	e.last = time.Now().UnixNano()
	if e.refs == 0 && !e.open.Load() && !e.kept {
		delete(s.m, e.fid)
		t.n.Add(-1)
	}
	s.mu.Unlock()
}

// created enters the epoch that the create with the given transno has opened.
// It does not wait: it is called from completions. Readers may see a file
// before its create is answered, so the file may have been written meanwhile,
// and that epoch even be closed again. Then the entry does not count as open:
// the next write asks the MDT.
func (t *epochTable) created(fid wire.FID, transno uint64) {
	s := &t.shards[t.shard(fid)]
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.m[fid]
	if e == nil {
		e = &epoch{fid: fid, last: time.Now().UnixNano(), untouched: transno > s.closed}
		s.m[fid] = e
		t.n.Add(1)
	}
	switch {
	case e.closing != nil || e.open.Load():
	case transno > s.closed:
		e.open.Store(true)
	default:
		e.kept = true
	}
}

// lostAll marks all epochs as not open, also those opened up to transno by
// creates whose answers are still on their way: the MDT has forgotten them. The
// tenure has been taken back before.
func (t *epochTable) lostAll(transno uint64) {
	t.lost.Store(max(t.lost.Load(), transno))
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		s.closed = max(s.closed, transno)
		for _, e := range s.m {
			e.open.Store(false)
			e.untouched = false
		}
		s.mu.Unlock()
	}
}

// lostPunch notes that an OST has forgotten a punch that it had answered.
func (t *epochTable) lostPunch(fid wire.FID) {
	s := &t.shards[t.shard(fid)]
	s.mu.Lock()
	if e := s.m[fid]; e != nil {
		e.relost.Store(true)
	}
	s.mu.Unlock()
}

// lostPunches is lostPunch for all files.
func (t *epochTable) lostPunches() {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		for _, e := range s.m {
			e.relost.Store(true)
		}
		s.mu.Unlock()
	}
}

// untouched tells that this client opened the file's epoch by creating it and has
// not used it since.
func (t *epochTable) untouched(fid wire.FID) bool {
	s := &t.shards[t.shard(fid)]
	s.mu.Lock()
	e := s.m[fid]
	yes := e != nil && e.untouched
	s.mu.Unlock()
	return yes
}

// opened tells that this client has the file's epoch open.
func (t *epochTable) opened(fid wire.FID) bool {
	s := &t.shards[t.shard(fid)]
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.m[fid]
	return e != nil && e.open.Load()
}

// closeBatch is how many epochs are closed in one MDT transaction.
const closeBatch = 512

// closer closes idle epochs until the FS is closed.
func (f *FS) closer() {
	defer f.wg.Done()
	tick := time.NewTicker(f.o.EpochIdle / 4)
	defer tick.Stop()
	for {
		select {
		case <-f.stop:
			return
		case <-tick.C:
		}
		idle := f.o.EpochIdle
		if f.epochs.n.Load() > int64(f.o.MaxEpochs) {
			idle = 0
		}
		for {
			n, err := f.closeEpochs(f.work, idle)
			if err != nil {
				f.log.Warn("closing IO epochs failed; sizes are asked of the OSTs until it works", "err", err)
			}
			if n < closeBatch || err != nil {
				break
			}
		}
	}
}

// OpenEpochs is the number of files in an IO epoch of this client.
func (f *FS) OpenEpochs() int { return int(f.epochs.n.Load()) }

// closeEpochs flushes and closes up to closeBatch epochs that were idle for at
// least idle, and reports their finished truncations. It returns how many it closed.
func (f *FS) closeEpochs(ctx context.Context, idle time.Duration) (int, error) {
	var batch []*epoch
	limit := time.Now().Add(-idle).UnixNano()
	done := make(chan struct{})
	for i := range f.epochs.shards {
		s := &f.epochs.shards[i]
		s.mu.Lock()
		for _, e := range s.m {
			if e.refs == 0 && e.closing == nil && e.last <= limit && len(batch) < closeBatch {
				e.closing = done
				batch = append(batch, e)
			}
		}
		s.mu.Unlock()
		if len(batch) == closeBatch {
			break
		}
	}
	if len(batch) == 0 {
		return 0, nil
	}
	items := make([]closeItem, len(batch))
	for i, e := range batch {
		items[i].e = e
	}
	f.flushForClose(ctx, items)
	closes := make([]wire.EpochClose, 0, len(batch))
	var logs []uint64
	var firstErr error
	failed := make(map[wire.FID]bool)
	fail := func(err error, which []wire.EpochClose) {
		if firstErr == nil {
			firstErr = err
		}
		for i := range which {
			failed[which[i].FID] = true
		}
	}
	for i := range items {
		it := &items[i]
		switch it.st {
		case wire.OK:
			closes = append(closes, it.result())
			for _, t := range it.e.logs {
				logs = append(logs, t.LogID)
			}
		case wire.ErrStale, wire.ErrNoEnt:
			// The file is gone, and its epoch and truncate records with it.
		default:
			failed[it.e.fid] = true
			fail(fmt.Errorf("client: flush %v before its IO epoch closes: %w", it.e.fid, it.st), nil)
		}
	}
	var transno uint64
	var kept map[wire.FID]bool
	again := 0
	// If the report is lost in a crash, the closing of the epochs is too, and the
	// records are worked on again. An epoch stays open until its records are
	// reported: later writes must not meet an old record in a recovery.
	if st := f.reportLogs(ctx, logs, 0); st != wire.OK {
		fail(fmt.Errorf("client: report finished truncations: %w", st), closes)
	} else if len(closes) > 0 {
		m := f.get()
		m.req.Op = wire.OpCloseEpoch
		m.req.Epochs = closes
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		transno = m.rep.Transno
		st, n := m.rep.Status, int(m.rep.Count)
		f.put(m)
		if st != wire.OK {
			fail(fmt.Errorf("client: close IO epochs: %w", st), closes)
		} else if n < len(closes) {
			kept = f.keptOpen(ctx, closes)
		}
	}
	for _, e := range batch {
		s := &f.epochs.shards[f.epochs.shard(e.fid)]
		s.mu.Lock()
		e.closing = nil
		s.closed = max(s.closed, transno)
		if e.kept = kept[e.fid]; e.kept {
			e.open.Store(false)
			e.untouched = false
			again++
		}
		if e.kept || failed[e.fid] {
			e.last = time.Now().UnixNano()
		} else {
			delete(s.m, e.fid)
			f.epochs.n.Add(-1)
		}
		s.mu.Unlock()
	}
	close(done)
	return len(batch) - again, firstErr
}

// keptOpen gives the files, of some whose closing the MDT has skipped because another
// client has opened or truncated them meanwhile, that are still in an IO epoch: they
// have to be closed again.
func (f *FS) keptOpen(ctx context.Context, closes []wire.EpochClose) map[wire.FID]bool {
	kept := make(map[wire.FID]bool)
	for i := range closes {
		var a wire.Attr
		switch st := f.rawAttr(ctx, closes[i].FID, &a); st {
		case wire.OK:
			kept[a.FID] = a.EpochOpen
		case wire.ErrStale, wire.ErrNoEnt:
		default:
			kept[closes[i].FID] = true
		}
	}
	return kept
}

// maxLogIDs bounds the records of one OpTruncateDone.
const maxLogIDs = 4096

// reportLogs sends OpTruncateDone for truncate records whose punches are durable.
func (f *FS) reportLogs(ctx context.Context, ids []uint64, flags wire.Flags) wire.Status {
	m := f.get()
	defer f.put(m)
	for len(ids) > 0 {
		n := min(len(ids), maxLogIDs)
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpTruncateDone
		m.req.Flags = flags
		m.req.LogIDs = ids[:n]
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		if m.rep.Status != wire.OK {
			return m.rep.Status
		}
		ids = ids[n:]
	}
	return wire.OK
}

// closeItem is a file on its way to OpCloseEpoch.
type closeItem struct {
	e  *epoch
	a  wire.Attr
	st wire.Status
	mg merger
}

func (it *closeItem) result() wire.EpochClose {
	return wire.EpochClose{FID: it.e.fid, Size: it.mg.size, Used: it.mg.used, Mtime: it.mg.mtime, Ctime: it.mg.ctime, Seen: it.a.Version}
}

// maxFlushes bounds the object flushes that are under way together.
const maxFlushes = 1024

// flushForClose flushes the files' objects, all at once so that the OSTs can
// share disk flushes, and collects what the MDT is to be told. Failures are in
// the items.
func (f *FS) flushForClose(ctx context.Context, items []closeItem) {
	for len(items) > 0 {
		n, flushes := 0, 0
		for n < len(items) && flushes < maxFlushes {
			it := &items[n]
			if it.st = f.rawAttr(ctx, it.e.fid, &it.a); it.st == wire.OK && (len(it.e.undone) > 0 || it.e.relost.Load()) {
				it.st = f.punchUndone(ctx, Owner{}, it.e, &it.a)
			}
			flushes += int(it.a.Layout.Count)
			n++
		}
		f.syncItems(items[:n], flushes)
		items = items[n:]
	}
}

func (f *FS) syncItems(items []closeItem, flushes int) {
	type flush struct {
		it *closeItem
		m  *msg
	}
	under := make([]flush, 0, flushes)
	var wg sync.WaitGroup
	for i := range items {
		it := &items[i]
		if it.e.untouched && !it.a.EpochShared {
			// If others have changed it, they have told the MDT.
			it.mg.size, it.mg.used = it.a.Size, it.a.Used
			continue
		}
		for s := uint8(0); it.st == wire.OK && s < it.a.Layout.Count; s++ {
			c, st := f.ost(&it.a, s)
			if st != wire.OK {
				it.st = st
				break
			}
			m := f.get()
			m.req.Op, m.req.Flags = wire.OpSyncObject, wire.FlagNoWait
			m.req.FID, m.req.Stripe = it.a.FID, s
			f.header(Owner{}, &m.req)
			under = append(under, flush{it, m})
			wg.Add(1)
			c.Handle(&m.req, &m.rep, wg.Done)
		}
	}
	wg.Wait()
	for _, x := range under {
		s := x.m.req.Stripe
		f.noteFlush(x.it.a.Layout.OST[s], x.m.rep.FlushErrors)
		if x.m.rep.Status != wire.OK {
			x.it.st = x.m.rep.Status
		}
		x.it.mg.add(&x.it.a.Layout, s, &x.m.rep.Obj)
		f.put(x.m)
	}
}

// rawAttr reads what the MDT knows of an object.
func (f *FS) rawAttr(ctx context.Context, fid wire.FID, a *wire.Attr) wire.Status {
	m := f.get()
	defer f.put(m)
	m.req.Op = wire.OpGetattr
	m.req.FID = fid
	f.Call(ctx, Owner{}, &m.req, &m.rep)
	if m.rep.Status == wire.OK {
		*a = m.rep.Attr
	}
	return m.rep.Status
}

// CloseLeftEpochs closes epochs of clients that are gone, of files that are not in
// use by this client, and returns of how many files. Files that cannot be flushed
// now are left as they are; the error is that of the first of them.
func (f *FS) CloseLeftEpochs(ctx context.Context, fids []wire.FID) (closed int, err error) {
	for len(fids) > 0 {
		n := min(len(fids), closeBatch)
		k, e := f.closeLeft(ctx, fids[:n])
		closed += k
		if e != nil && err == nil {
			err = e
		}
		fids = fids[n:]
	}
	return closed, err
}

func (f *FS) closeLeft(ctx context.Context, fids []wire.FID) (int, error) {
	var items []closeItem
	defer func() {
		for i := range items {
			items[i].e.trunc.Unlock()
			f.epochs.release(f, items[i].e)
		}
	}()
	for _, fid := range fids {
		e := f.epochs.ref(f, fid)
		e.trunc.Lock()
		if e.open.Load() {
			// In use again: the closer closes it.
			e.trunc.Unlock()
			f.epochs.release(f, e)
			continue
		}
		items = append(items, closeItem{e: e})
	}
	f.flushForClose(ctx, items)
	var closes []wire.EpochClose
	var first error
	for i := range items {
		it := &items[i]
		switch it.st {
		case wire.OK:
			closes = append(closes, it.result())
		case wire.ErrStale, wire.ErrNoEnt:
		default:
			if first == nil {
				first = fmt.Errorf("client: close the IO epoch that is left of %v: %w", it.e.fid, it.st)
			}
		}
	}
	if len(closes) == 0 {
		return 0, first
	}
	m := f.get()
	defer f.put(m)
	m.req.Op = wire.OpCloseEpoch
	m.req.Epochs = closes
	f.Call(ctx, Owner{}, &m.req, &m.rep)
	if m.rep.Status != wire.OK {
		return 0, fmt.Errorf("client: close IO epochs that are left: %w", m.rep.Status)
	}
	return int(m.rep.Count), first
}
