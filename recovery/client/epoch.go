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

	mu   sync.Mutex // serialises opening
	open atomic.Bool

	trunc sync.Mutex // serialises size changes: MDT first, then punches
	// logs are truncate records whose punches the OSTs have executed; they are
	// reported to the MDT once the objects were flushed. Guarded by trunc, or by
	// closing being set.
	logs []uint64
}

func (e *epoch) markOpen() { e.open.Store(true) }

const epochShards = 64

type epochTable struct {
	shards [epochShards]struct {
		mu sync.Mutex
		m  map[wire.FID]*epoch
	}
	n atomic.Int64
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
			s.mu.Unlock()
			return e
		}
		wait := e.closing
		s.mu.Unlock()
		<-wait
	}
}

// acquire is ref plus opening the epoch at the MDT, durably, if it is not open.
func (t *epochTable) acquire(ctx context.Context, f *FS, o Owner, fid wire.FID) (*epoch, wire.Status) {
	e := t.ref(f, fid)
	if e.open.Load() {
		return e, wire.OK
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.open.Load() {
		return e, wire.OK
	}
	m := f.get()
	defer f.put(m)
	m.req.Op = wire.OpOpenEpoch
	m.req.Flags = wire.FlagWaitCommit
	m.req.FID = fid
	f.Call(ctx, o, &m.req, &m.rep)
	if m.rep.Status != wire.OK {
		t.release(f, e)
		return nil, m.rep.Status
	}
	e.open.Store(true)
	return e, wire.OK
}

func (t *epochTable) release(f *FS, e *epoch) {
	s := &t.shards[t.shard(e.fid)]
	s.mu.Lock()
	e.refs--
	e.last = time.Now().UnixNano()
	if e.refs == 0 && !e.open.Load() {
		delete(s.m, e.fid)
		t.n.Add(-1)
	}
	s.mu.Unlock()
}

func (t *epochTable) created(f *FS, fid wire.FID) {
	e := t.ref(f, fid)
	e.open.Store(true)
	t.release(f, e)
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
			n, err := f.closeEpochs(context.Background(), idle)
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
	var firstErr error
	m := f.get()
	defer f.put(m)
	var logs []uint64
	closes := make([]wire.EpochClose, 0, len(batch))
	failed := make(map[wire.FID]bool)
	for _, e := range batch {
		ec, st := f.flushForClose(ctx, m, e.fid)
		switch st {
		case wire.OK:
			closes = append(closes, ec)
			logs = append(logs, e.logs...)
		case wire.ErrStale, wire.ErrNoEnt:
			// The file is gone, and its epoch and truncate records with it.
		default:
			failed[e.fid] = true
			firstErr = fmt.Errorf("client: flush %v before its IO epoch closes: %w", e.fid, st)
		}
	}
	if len(logs) > 0 {
		// Reported again with the epoch if it is lost; doing a punch that was
		// done is harmless.
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpTruncateDone
		m.req.LogIDs = logs
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		if m.rep.Status != wire.OK {
			firstErr = fmt.Errorf("client: report finished truncations: %w", m.rep.Status)
		}
	}
	if len(closes) > 0 {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpCloseEpoch
		m.req.Epochs = closes
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		if m.rep.Status != wire.OK {
			firstErr = fmt.Errorf("client: close IO epochs: %w", m.rep.Status)
			for i := range closes {
				failed[closes[i].FID] = true
			}
		}
	}
	for _, e := range batch {
		s := &f.epochs.shards[f.epochs.shard(e.fid)]
		s.mu.Lock()
		e.closing = nil
		if failed[e.fid] {
			e.last = time.Now().UnixNano()
		} else {
			delete(s.m, e.fid)
			f.epochs.n.Add(-1)
		}
		s.mu.Unlock()
	}
	close(done)
	return len(batch), firstErr
}

func (f *FS) flushForClose(ctx context.Context, m *msg, fid wire.FID) (wire.EpochClose, wire.Status) {
	m.req.Reset()
	m.rep.Reset()
	m.req.Op = wire.OpGetattr
	m.req.FID = fid
	f.Call(ctx, Owner{}, &m.req, &m.rep)
	if m.rep.Status != wire.OK {
		return wire.EpochClose{}, m.rep.Status
	}
	a := m.rep.Attr
	var mg merger
	if st := f.syncObjects(ctx, Owner{}, &a, &mg); st != wire.OK {
		return wire.EpochClose{}, st
	}
	return wire.EpochClose{FID: fid, Size: mg.size, Used: mg.used, Mtime: mg.mtime, Ctime: mg.ctime, Seen: a.Version}, wire.OK
}

// CloseLeftEpochs closes epochs that an earlier incarnation of this client left
// open when it died with its node.
func (f *FS) CloseLeftEpochs(ctx context.Context, fids []wire.FID) error {
	m := f.get()
	defer f.put(m)
	for len(fids) > 0 {
		n := min(len(fids), closeBatch)
		var closes []wire.EpochClose
		for _, fid := range fids[:n] {
			e := f.epochs.ref(f, fid)
			e.trunc.Lock()
			inUse := e.open.Load()
			var ec wire.EpochClose
			st := wire.OK
			if !inUse {
				ec, st = f.flushForClose(ctx, m, fid)
			}
			e.trunc.Unlock()
			f.epochs.release(f, e)
			switch {
			case inUse:
			case st == wire.OK:
				closes = append(closes, ec)
			case st == wire.ErrStale || st == wire.ErrNoEnt:
			default:
				return fmt.Errorf("client: close the IO epoch of %v left by a crash: %w", fid, st)
			}
		}
		fids = fids[n:]
		if len(closes) == 0 {
			continue
		}
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpCloseEpoch
		m.req.Epochs = closes
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		if m.rep.Status != wire.OK {
			return fmt.Errorf("client: close IO epochs left by a crash: %w", m.rep.Status)
		}
	}
	return nil
}
