// Package local keeps targets on the local machine: metadata in Pebble, file
// data in object files.
package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/store"
)

// Cache is a block cache that several engines may share.
type Cache = pebble.Cache

// NewCache makes a block cache of n bytes; the caller Unrefs it after the
// engines that use it are closed.
func NewCache(n int64) *Cache { return pebble.NewCache(n) }

// DefaultReserve is the largest amount of disk space that OpenPebble keeps
// free for the write-ahead log; disks smaller than 100 times of it keep 1 %.
const DefaultReserve = 256 << 20

// roomTTL is how long an answer about free space holds. It is short because
// others may fill the disk at any speed, and the log must not be the one to notice.
const roomTTL = time.Millisecond

// Options of OpenPebble. The zero value is usable.
type Options struct {
	// FS is the file system, the operating system's by default.
	FS vfs.FS
	// Logger receives the engine's messages; discarded when nil.
	Logger *slog.Logger
	// Cache is the shared block cache; when nil a private one of CacheBytes
	// (default 64 MiB) is made.
	Cache      *Cache
	CacheBytes int64
	// MemTableBytes is the size of one memory table, default 64 MiB.
	MemTableBytes uint64
	// OnFail is called once, from any goroutine, when the engine fails. It
	// must not block.
	OnFail func(error)
	// ReadOnly opens an existing store for reading.
	ReadOnly bool
	// MinFreeBytes is the reserve for store.Room: 0 for the default, negative
	// for none.
	MinFreeBytes int64
	// DiskUsage gives the free and total bytes of the store's disk; the
	// file system's figures when nil.
	DiskUsage func() (avail, total uint64, err error)
	// Now is the clock of the free space check, time.Now by default.
	Now func() time.Time
}

// Pebble is a store.Engine over one Pebble store.
type Pebble struct {
	db      *pebble.DB
	fs      *freezeFS
	log     *slog.Logger
	onFail  func(error)
	failed  atomic.Pointer[error]
	fatal   chan struct{} // closed when Pebble's own goroutines may hang
	hang    sync.Once     // closes it
	ro      bool
	applies atomic.Uint64
	syncs   atomic.Uint64
	bytes   atomic.Uint64
	stalls  atomic.Uint64
	batches sync.Pool

	usage     func() (avail, total uint64, err error)
	now       func() time.Time
	reserve   int64
	roomUntil atomic.Int64
	room      atomic.Uint32
}

var _ store.Engine = (*Pebble)(nil)

// OpenPebble opens or makes the store in dir.
func OpenPebble(dir string, o Options) (*Pebble, error) {
	fs := o.FS
	if fs == nil {
		fs = vfs.Default
	}
	p := &Pebble{fatal: make(chan struct{}), log: o.Logger, onFail: o.OnFail, ro: o.ReadOnly, usage: o.DiskUsage, now: o.Now, reserve: o.MinFreeBytes}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if p.now == nil {
		p.now = time.Now
	}
	if p.usage == nil {
		p.usage = func() (uint64, uint64, error) {
			u, err := fs.GetDiskUsage(dir)
			return u.AvailBytes, u.TotalBytes, err
		}
	}
	p.fs = &freezeFS{FS: fs, onFail: p.fail, spare: p.spare}

	cache := o.Cache
	if cache == nil {
		n := o.CacheBytes
		if n <= 0 {
			n = 64 << 20
		}
		cache = pebble.NewCache(n)
		defer cache.Unref()
	}
	mem := o.MemTableBytes
	if mem == 0 {
		mem = 64 << 20
	}
	opts := &pebble.Options{
		FS:                          p.fs,
		Cache:                       cache,
		FormatMajorVersion:          pebble.FormatNewest,
		MemTableSize:                mem,
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       2,
		// A burst must not stop writers; reads pay a little while
		// compactions catch up.
		L0StopWritesThreshold: 100,
		LBaseMaxBytes:         int64(mem),
		MaxOpenFiles:          1000,
		ReadOnly:              o.ReadOnly,
		ErrorIfNotExists:      o.ReadOnly,
		Logger:                pebbleLog{p},
	}
	// Creates look for names that do not exist, so filters pay on every level.
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	opts.EventListener = &pebble.EventListener{
		WriteStallBegin: func(info pebble.WriteStallBeginInfo) {
			p.stalls.Add(1)
			p.log.Warn("engine stalls writers", "reason", info.Reason)
		},
		BackgroundError: func(err error) { p.log.Error("engine background error", "err", err) },
		// Once the file system is frozen, tables lack what was swallowed.
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			if p.Failed() == nil {
				p.fail(fmt.Errorf("%s is damaged: %w", info.Path, info.Details))
			}
		},
	}
	db, err := p.open(dir, opts)
	if err == nil && p.Failed() != nil {
		err = p.Failed()
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	p.db = db
	return p, nil
}

func (p *Pebble) open(dir string, opts *pebble.Options) (db *pebble.DB, err error) {
	defer p.recover(&err)
	return pebble.Open(dir, opts)
}

// fail marks the engine failed, the first time with a call of OnFail.
func (p *Pebble) fail(err error) {
	err = fmt.Errorf("%w: %w", store.ErrFailed, err)
	if !p.failed.CompareAndSwap(nil, &err) {
		return
	}
	p.fs.frozen.Store(true)
	p.log.Error("store failed", "err", err)
	if p.onFail != nil {
		p.onFail(err)
	}
}

// hangs notes that goroutines of Pebble may be blocked from now on.
func (p *Pebble) hangs() { p.hang.Do(func() { close(p.fatal) }) }

func (p *Pebble) hanging() bool {
	select {
	case <-p.fatal:
		return true
	default:
		return false
	}
}

// fatalPanic carries a Fatalf up a stack of ours.
type fatalPanic struct{ error }

// recover turns a panic of Pebble below one of the engine's calls into an error.
func (p *Pebble) recover(err *error) {
	v := recover()
	if v == nil {
		return
	}
	e, ok := v.(error)
	if !ok {
		e = fmt.Errorf("%v", v)
	}
	p.hangs()
	p.fail(e)
	*err = p.Failed()
}

// pebbleLog is Pebble's logger. Its Fatalf must not return and must not end
// the process: below one of our own calls it unwinds the stack, in Pebble's
// goroutines it blocks for ever.
type pebbleLog struct{ p *Pebble }

func (l pebbleLog) Infof(format string, args ...any) {
	if l.p.log.Enabled(context.Background(), slog.LevelDebug) {
		l.p.log.Debug("pebble: " + fmt.Sprintf(format, args...))
	}
}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.p.log.Error("pebble: " + fmt.Sprintf(format, args...))
}

func (l pebbleLog) Fatalf(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	l.p.hangs()
	l.p.fail(err)
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		if strings.Contains(f.Function, "store/local.(*Pebble).") && !strings.HasSuffix(f.Function, ".fail") {
			panic(fatalPanic{err})
		}
		if !more {
			break
		}
	}
	select {}
}

// Failed implements store.Engine.
func (p *Pebble) Failed() error {
	if e := p.failed.Load(); e != nil {
		return *e
	}
	return nil
}

// Get implements store.Engine.
func (p *Pebble) Get(key, buf []byte) (_ []byte, err error) {
	defer p.recover(&err)
	v, c, err := p.db.Get(key)
	if err != nil {
		if errors.Is(err, pebble.ErrNotFound) {
			return nil, store.ErrNotFound
		}
		return nil, fmt.Errorf("get: %w", err)
	}
	buf = append(buf[:0], v...)
	if err := c.Close(); err != nil {
		return nil, fmt.Errorf("get: %w", err)
	}
	return buf, nil
}

// NewIter implements store.Engine.
func (p *Pebble) NewIter(lower, upper []byte) (_ store.Iter, err error) {
	defer p.recover(&err)
	it, err := p.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return nil, fmt.Errorf("iterate: %w", err)
	}
	return pebbleIter{it}, nil
}

type pebbleIter struct{ *pebble.Iterator }

// batch adapts a Pebble batch. Its writes go to memory and cannot fail.
type batch struct {
	b *pebble.Batch
	p *Pebble
}

func (b *batch) Set(k, v []byte)         { _ = b.b.Set(k, v, nil) }
func (b *batch) Delete(k []byte)         { _ = b.b.Delete(k, nil) }
func (b *batch) DeleteRange(l, u []byte) { _ = b.b.DeleteRange(l, u, nil) }
func (b *batch) Len() int                { return b.b.Len() }
func (b *batch) Close()                  { _ = b.b.Close(); b.put() }

func (b *batch) put() {
	p := b.p
	*b = batch{}
	p.batches.Put(b)
}

// NewBatch implements store.Engine.
func (p *Pebble) NewBatch() store.Batch {
	b, _ := p.batches.Get().(*batch)
	if b == nil {
		b = new(batch)
	}
	b.b, b.p = p.db.NewBatch(), p
	return b
}

// Apply implements store.Engine.
func (p *Pebble) Apply(sb store.Batch) (err error) {
	if p.ro {
		return store.ErrReadOnly
	}
	if err := p.Failed(); err != nil {
		return err
	}
	defer p.recover(&err)
	b := sb.(*batch)
	if b.b.Empty() {
		b.Close()
		return nil
	}
	n := uint64(b.b.Len())
	if err := p.db.Apply(b.b, pebble.NoSync); err != nil {
		p.fail(err)
	}
	if err := p.Failed(); err != nil {
		return err
	}
	b.Close()
	p.applies.Add(1)
	p.bytes.Add(n)
	return nil
}

// Sync implements store.Engine. An empty log record with Sync waits until the
// log is durable up to it. That covers earlier batches in older log files too:
// Pebble rotates the log under the commit mutex, and rotateWAL closes the old
// log (record.LogWriter.Close flushes and fsyncs it, failing which is fatal)
// before it makes the new one.
func (p *Pebble) Sync() (err error) {
	if p.ro {
		return store.ErrReadOnly
	}
	if err := p.Failed(); err != nil {
		return err
	}
	defer p.recover(&err)
	if err := p.db.LogData(nil, pebble.Sync); err != nil {
		p.fail(err)
	}
	// A frozen file system lies to Pebble, so its word counts only when
	// nothing failed meanwhile.
	if err := p.Failed(); err != nil {
		return err
	}
	p.syncs.Add(1)
	return nil
}

// Room implements store.Engine; the disk is asked at most once in roomTTL.
func (p *Pebble) Room() store.Room {
	if p.reserve < 0 {
		return store.RoomOK
	}
	now := p.now().UnixNano()
	until := p.roomUntil.Load()
	if now < until && until-now <= int64(roomTTL) {
		return store.Room(p.room.Load())
	}
	// One caller asks; the others go on with the old answer.
	if !p.roomUntil.CompareAndSwap(until, now+int64(roomTTL)) {
		return store.Room(p.room.Load())
	}
	avail, total, err := p.usage()
	if err != nil {
		// Unknown is not full: file systems in memory have no figures.
		p.room.Store(uint32(store.RoomOK))
		return store.RoomOK
	}
	reserve := p.reserveOf(total)
	r := store.RoomOK
	switch {
	case avail < reserve/16:
		r = store.RoomNone
	case avail < reserve/4:
		r = store.RoomCritical
	case avail < reserve:
		r = store.RoomLow
	}
	p.room.Store(uint32(r))
	return r
}

// reserveOf is the space to keep free on a disk of total bytes.
func (p *Pebble) reserveOf(total uint64) uint64 {
	if p.reserve == 0 {
		return min(total/100, DefaultReserve)
	}
	return uint64(max(p.reserve, 0))
}

// spare tells whether n bytes can be taken without touching the reserve.
func (p *Pebble) spare(n int64) bool {
	avail, total, err := p.usage()
	return err != nil || avail >= uint64(n)+p.reserveOf(total)
}

// Metrics implements store.Engine.
func (p *Pebble) Metrics() store.Metrics {
	m := store.Metrics{Applies: p.applies.Load(), Syncs: p.syncs.Load(), BytesApplied: p.bytes.Load(), WriteStalls: p.stalls.Load()}
	if p.hanging() {
		return m // Pebble's mutex may be held by a blocked goroutine
	}
	pm := p.db.Metrics()
	m.DiskBytes = pm.DiskSpaceUsage()
	m.WALBytes = pm.WAL.Size
	m.L0Files = pm.Levels[0].TablesCount
	m.ReadAmp = int64(pm.ReadAmp())
	m.MemTables = pm.MemTable.Count
	m.CacheHits, m.CacheMisses = pm.BlockCache.Hits, pm.BlockCache.Misses
	return m
}

// Close implements store.Engine. After a fatal error inside Pebble, goroutines
// of it may be blocked for ever; then the store is abandoned as it is, with
// its lock, until the process ends.
func (p *Pebble) Close() error {
	closed := make(chan error, 1)
	go func() { closed <- p.closeDB() }()
	select {
	case err := <-closed:
		return err
	case <-p.fatal:
		return p.Failed()
	}
}

func (p *Pebble) closeDB() (err error) {
	if p.hanging() {
		return p.Failed()
	}
	defer p.recover(&err)
	if err := p.db.Close(); err != nil {
		if ferr := p.Failed(); ferr != nil {
			return ferr
		}
		return fmt.Errorf("close store: %w", err)
	}
	return p.Failed()
}
