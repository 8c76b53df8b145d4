// Package ost is the object storage target: it keeps the data of files in
// objects, which are files of a local file system, and answers the OST
// operations of recovery/wire. docs/design.md section 5 describes the layout.
package ost

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/ost/slots"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

const (
	// maxSegShift is the size of a segment in production, 1 TiB.
	maxSegShift = 40
	minSegShift = 12

	// transnoStep is how many transnos are reserved durably at a time.
	transnoStep = 1 << 24

	flushers = 32

	// From this many dirty objects on, with less dirty data than syncfsBytes,
	// one syncfs is cheaper than a flush of each.
	syncfsObjects = 64
	syncfsBytes   = 64 << 20
	// From this many new objects on that wait for a flush, they share a syncfs,
	// unless the last one took longer than slowSyncfs.
	groupObjects = 4
	slowSyncfs   = 50 * time.Millisecond

	// hintBytes of new data in one object make the target start their
	// writeback, so that a later COMMIT finds little to do.
	hintBytes = 16 << 20
	hintWrite = 64 << 10 // the smallest write that counts

	fanOut = 256
)

// Options configure a target.
type Options struct {
	// Index is the OST's number in layouts.
	Index uint16
	// Dir is the directory of the store; used when FS is nil.
	Dir string
	// FS is the disk; nil: Linux files below Dir. The target shuts it down.
	FS objfs.FS
	// BootID identifies the running kernel; "" reads Linux's. When it is the
	// same at two starts, what the first one wrote is still in the kernel.
	BootID string
	// Clock gives ns since 1970 UTC; nil: the system's.
	Clock func() int64
	// Logger; nil: slog's default.
	Logger *slog.Logger
	// MaxOpenFiles bounds idle objects that are kept open; 0: 1024. It is
	// lowered to a quarter of RLIMIT_NOFILE.
	MaxOpenFiles int
	// DirtyLimitBytes of data not yet durable start a flush at once; 0: 256 MiB.
	DirtyLimitBytes int64
	// CommitInterval between background flushes; 0: 2 s; negative: none.
	CommitInterval time.Duration
	// MinFreeBytes are kept free for others on the same file system: writes
	// that need space get ErrNoSpc before.
	MinFreeBytes uint64
	// OnLost is called by Open when data that were not flushed may be lost, before
	// the store forgets that; an error ends Open. Frontends elsewhere have copies
	// and replay them; those that were in this process have none. OnFlushError is
	// called after a failed flush, before anything can tell of it in a reply. Both
	// have to make the write verifiers change, durably, of those concerned.
	OnLost       func() error
	OnFlushError func()
	// OnFail is called once when the target cannot go on; it must not block.
	OnFail func(error)
	// SegShift makes segments of 1<<SegShift bytes (12..40), fixed when the
	// store is made; 0: 40.
	SegShift uint8
}

// ErrLocked says that another process has the store open.
var ErrLocked = errors.New("object store is in use by another process")

// Target is an object storage target. It implements front.Body.
type Target struct {
	fs       objfs.FS
	log      *slog.Logger
	clock    func() int64
	opts     Options
	segShift uint8
	segSize  uint64
	maxSize  uint64

	unlock   func() error
	rootFD   int
	dirs     [fanOut]dirState
	instance uint64
	lost     map[uint64]bool
	lostData bool

	// base is the transno up to which what the last run did is durable; prev and
	// kept are what it has left for recovery.
	base uint64
	prev recov.TargetRecord
	kept []slots.Kept
	// startTransno is one that the last run did not exceed.
	startTransno uint64
	// unclean: the run before this one, which began at startedAt, was not
	// stopped in an orderly way.
	unclean       bool
	startedAt     int64
	table         table
	track         tracker
	queue, gather flushQueue
	gone          gone
	admit         admission
	gate          gate
	drained       drainQueue
	commits       commits
	state         state
	slots         *slots.File // nil: cannot be had
	slotsBad      atomic.Bool
	begun         atomic.Bool // recovery is over
	ended         atomic.Bool // stopped in order: nothing is changed any more
	// epochs of files that may be replayed to; nil: not known.
	epochs    atomic.Pointer[map[wire.EpochInfo]struct{}]
	truncates []wire.ObjTruncate // learnt, for Begin
	// cut are the truncates that were finished at Begin, by log id: they are as good as
	// executed in objects that are made later. Not changed after Begin.
	cut         map[objKey]uint64
	blocks      sync.Pool
	openFDs     atomic.Int64
	dirtyBytes  atomic.Int64
	flushErrors atomic.Uint64
	damaged     atomic.Uint64
	noNowait    atomic.Bool
	space       spaceBudget
	stats       counters

	down     atomic.Bool
	failOnce sync.Once

	wg       sync.WaitGroup // those that may wait for the flushers
	flushing sync.WaitGroup // flushers and grouper
	kick     chan struct{}
	stop     chan struct{}
}

type counters struct {
	reads, fastReads, writes, readBytes, writeBytes, syncs, flushes atomic.Uint64
}

// Stats are counters since the start and current figures.
type Stats struct {
	Index                     uint16
	Transno, LastCommitted    uint64
	Objects, OpenFiles, Dirty int
	DirtyBytes                int64
	Reads, FastReads, Writes  uint64
	ReadBytes, WriteBytes     uint64
	// Syncs counts requests that waited for a flush, Flushes those made for them.
	Syncs, Flushes        uint64
	FlushErrors, Damaged  uint64
	LostUnflushed, Failed bool
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Open opens the store, making it if the directory is empty, and starts the
// target. When the last one did not stop cleanly but the kernel is the same,
// everything that it wrote is made durable first. Nothing but replays is executed
// before Begin.
func Open(opts Options) (*Target, error) {
	t := &Target{
		fs: opts.FS, log: opts.Logger, clock: opts.Clock, rootFD: -1,
		kick: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	if t.log == nil {
		t.log = slog.Default()
	}
	t.log = t.log.With("ost", opts.Index)
	if t.clock == nil {
		t.clock = func() int64 { return time.Now().UnixNano() }
	}
	if opts.BootID == "" {
		id, err := bootID()
		if err != nil {
			return nil, fmt.Errorf("open ost %d: %w", opts.Index, err)
		}
		opts.BootID = id
	}
	if len(opts.BootID) > maxBootID {
		return nil, fmt.Errorf("open ost %d: boot id of %d bytes", opts.Index, len(opts.BootID))
	}
	if opts.SegShift == 0 {
		opts.SegShift = maxSegShift
	}
	if opts.SegShift < minSegShift || opts.SegShift > maxSegShift {
		return nil, fmt.Errorf("open ost %d: segment shift %d", opts.Index, opts.SegShift)
	}
	if opts.MaxOpenFiles <= 0 {
		opts.MaxOpenFiles = 1024
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && uint64(opts.MaxOpenFiles) > lim.Cur/4 {
		opts.MaxOpenFiles = max(tableShards, int(lim.Cur/4))
	}
	if opts.DirtyLimitBytes <= 0 {
		opts.DirtyLimitBytes = 256 << 20
	}
	if opts.CommitInterval == 0 {
		opts.CommitInterval = 2 * time.Second
	}
	t.opts = opts
	t.blocks.New = func() any { return new([headerSize]byte) }
	t.state.wake = make(chan struct{}, 1)
	t.gate.cond.L = &t.gate.mu
	t.drained.cond.L = &t.drained.mu
	t.commits.cond.L = &t.commits.mu
	t.queue.cond.L = &t.queue.mu
	t.gather.cond.L = &t.gather.mu
	t.table.init(opts.MaxOpenFiles)
	if t.fs == nil {
		fs, err := objfs.NewLinux(opts.Dir)
		if err != nil {
			return nil, fmt.Errorf("open ost %d: %w", opts.Index, err)
		}
		t.fs = fs
	}
	for i := range t.dirs {
		t.dirs[i].fd = -1
		t.dirs[i].cond.L = &t.dirs[i].mu
	}
	if err := t.start(); err != nil {
		t.closeFiles()
		return nil, fmt.Errorf("open ost %d: %w", opts.Index, err)
	}
	t.flushing.Add(flushers + 1)
	for range flushers {
		go t.flusher()
	}
	go t.grouper()
	t.wg.Add(4)
	go t.committer()
	go t.stateWriter()
	go t.drainer()
	go t.commitLoop()
	return t, nil
}

func (t *Target) start() error {
	unlock, err := t.fs.Lock("lock")
	if err == unix.EWOULDBLOCK {
		return ErrLocked
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	t.unlock = unlock
	if t.rootFD, err = t.fs.Open(".", objfs.ReadOnly|objfs.Directory); err != nil {
		return fmt.Errorf("open store directory: %w", err)
	}
	sb, err := readSuper(t.fs)
	if err != nil {
		return err
	}
	if sb == nil {
		if sb, err = t.format(); err != nil {
			return err
		}
	}
	if sb.Index != t.opts.Index {
		return fmt.Errorf("the store belongs to ost %d", sb.Index)
	}
	t.segShift, t.segSize = sb.SegShift, 1<<sb.SegShift
	// Segment numbers have 32 bits.
	t.maxSize = min(wire.MaxFileSize, uint64(1)<<(sb.SegShift+31)-1)
	for i := range t.dirs {
		if t.dirs[i].fd, err = t.fs.Open(dirName(uint8(i)), objfs.ReadOnly|objfs.Directory); err != nil {
			return fmt.Errorf("open object directory: %w", err)
		}
	}
	t.unclean, t.startedAt = !sb.Clean, t.clock()
	if err := t.takeOver(sb); err != nil {
		return err
	}
	t.refreshSpace(0)
	return nil
}

// takeOver finds out what is left of the run before and begins a new one.
func (t *Target) takeOver(sb *super) error {
	if !sb.Clean && sb.BootID == t.opts.BootID {
		if err := t.fs.Syncfs(); err != nil {
			t.log.Error("data of the last run could not be made durable", "err", err)
			t.flushErrors.Add(1)
			t.lostData = true
		}
	} else if !sb.Clean {
		t.lostData = true
	}
	t.startTransno, t.base = sb.Ceiling, sb.Ceiling
	if t.lostData || !sb.Began {
		// What is above is lost, or was not repeated yet when recovery ended.
		t.base = sb.LastCommitted
		if !sb.Clean {
			if len(sb.Lost) >= maxLost {
				sb.Lost = sb.Lost[1:]
			}
			sb.Lost = append(sb.Lost, sb.Instance)
		}
	}
	if t.lostData {
		t.log.Warn("the store was not closed before power was lost: unflushed data may be gone")
		if t.opts.OnLost != nil {
			if err := t.opts.OnLost(); err != nil {
				return fmt.Errorf("tell of lost data: %w", err)
			}
		}
	}
	t.lost = make(map[uint64]bool, len(sb.Lost))
	for _, i := range sb.Lost {
		t.lost[i] = true
	}
	t.prev = sb.Target
	t.prev.Clean = t.prev.Clean && sb.Clean
	t.openSlots(sb)
	sb.Instance++
	sb.Clean, sb.Began, sb.BootID = false, false, t.opts.BootID
	sb.LastCommitted = t.base
	if err := writeSuper(t.fs, t.rootFD, sb.encode()); err != nil {
		return err
	}
	t.instance = sb.Instance
	t.state.sb = sb
	t.state.recorded.Store(t.base)
	t.track.start(t.base, t.base)
	t.publish()
	return nil
}

// openSlots reads the reply slots if they are of the run before and nothing that
// they tell of is lost. Without slots, requests resent after a crash may be
// executed twice, which is no reason not to start.
func (t *Target) openSlots(sb *super) {
	f, err := slots.Open(t.fs, "slots", maxClients)
	if err == nil {
		t.kept, err = f.Load(slots.Start{Instance: sb.Instance + 1, Boot: t.opts.BootID}, func(s slots.Start) bool {
			// A start that failed before it wrote the superblock has done nothing.
			mine := s.Instance == sb.Instance || s.Instance == sb.Instance+1
			return mine && !t.lostData && (sb.Clean || s.Boot == t.opts.BootID)
		}, func(id wire.ClientID) (uint64, bool) {
			r, ok := sb.Clients[id]
			return r.Gen, ok
		})
	}
	if err != nil {
		t.log.Warn("no reply slots", "err", err)
		if f != nil {
			f.Close()
		}
		t.kept = nil
		return
	}
	t.slots = f
	for _, r := range sb.Clients {
		if !r.Local {
			t.attach(r)
		}
	}
}

// format makes the directories and a first superblock, in this order, so that a
// store without a superblock has no objects.
func (t *Target) format() (*super, error) {
	mk := func(p string) error {
		if err := t.fs.Mkdir(p); err != nil && err != unix.EEXIST {
			return fmt.Errorf("format: %w", err)
		}
		return nil
	}
	if err := mk("o"); err != nil {
		return nil, err
	}
	for i := range fanOut {
		if err := mk(dirName(uint8(i))); err != nil {
			return nil, err
		}
		names, err := t.fs.ReadDir(dirName(uint8(i)))
		if err != nil {
			return nil, fmt.Errorf("format: %w", err)
		}
		if len(names) > 0 {
			return nil, fmt.Errorf("format: %s has objects but there is no superblock", dirName(uint8(i)))
		}
	}
	for _, d := range []string{"o", "."} {
		if err := t.syncPath(d); err != nil {
			return nil, fmt.Errorf("format: %w", err)
		}
	}
	s := &super{
		Index: t.opts.Index, SegShift: t.opts.SegShift, Clean: true, BootID: t.opts.BootID,
		Epochs: map[uint32]uint64{}, Clients: map[wire.ClientID]recov.ClientRecord{}, Fences: map[wire.ClientID]uint64{},
	}
	if _, err := rand.Read(s.UUID[:]); err != nil {
		return nil, fmt.Errorf("format: %w", err)
	}
	return s, nil
}

// Close flushes everything, marks the store clean and releases it. Requests
// that come later get ErrTargetDown; no request may be in Handle any more. An
// error means that the store is not marked clean.
func (t *Target) Close() error {
	if t.down.Swap(true) && t.isStopped() {
		return nil
	}
	err := t.flushAll()
	t.halt()
	if err == nil {
		s := t.state.sb
		s.Clean, s.LastCommitted = true, t.track.lc.Load()
		if t.begun.Load() {
			s.Ceiling = t.track.last()
		}
		err = writeSuper(t.fs, t.rootFD, s.encode())
	}
	t.closeFiles()
	if err != nil {
		return fmt.Errorf("close ost %d: %w", t.opts.Index, err)
	}
	return nil
}

// halt ends the target's goroutines after what they have to do.
func (t *Target) halt() {
	close(t.stop)
	t.commits.close()
	t.wg.Wait()
	t.queue.close()
	t.gather.close()
	t.flushing.Wait()
}

func (t *Target) isStopped() bool {
	select {
	case <-t.stop:
		return true
	default:
		return false
	}
}

func (t *Target) closeFiles() {
	for i := range t.table.shards {
		s := &t.table.shards[i]
		s.mu.Lock()
		for _, o := range s.m {
			o.mu.Lock()
			t.dropSegs(o, func(*seg) bool { return true })
			o.mu.Unlock()
		}
		clear(s.m)
		s.mu.Unlock()
	}
	for i := range t.dirs {
		if t.dirs[i].fd >= 0 {
			t.fs.Close(t.dirs[i].fd)
		}
	}
	if t.rootFD >= 0 {
		t.fs.Close(t.rootFD)
	}
	if t.slots != nil {
		if err := t.slots.Close(); err != nil {
			t.log.Error("close of the reply slots failed", "err", err)
		}
	}
	if t.unlock != nil {
		t.unlock()
	}
	t.fs.Shut()
}

// fail stops the target for good.
func (t *Target) fail(err error) {
	t.failOnce.Do(func() {
		t.down.Store(true)
		t.log.Error("target failed", "err", err)
		if t.opts.OnFail != nil {
			t.opts.OnFail(err)
		}
	})
}

// LostUnflushed tells whether this start found that data which had been
// acknowledged as UNSTABLE may have been lost.
func (t *Target) LostUnflushed() bool { return t.lostData }

// FlushErrors counts failed flushes since the start; each may have lost data
// that had been acknowledged as UNSTABLE.
func (t *Target) FlushErrors() uint64 { return t.flushErrors.Load() }

// Stats returns the current figures.
func (t *Target) Stats() Stats {
	return Stats{
		Index: t.opts.Index, Transno: t.track.last(), LastCommitted: t.track.lc.Load(),
		Objects: t.table.len(), OpenFiles: int(t.openFDs.Load()), Dirty: int(t.track.n.Load()),
		DirtyBytes: t.dirtyBytes.Load(), Reads: t.stats.reads.Load(), FastReads: t.stats.fastReads.Load(),
		Writes: t.stats.writes.Load(), ReadBytes: t.stats.readBytes.Load(), WriteBytes: t.stats.writeBytes.Load(),
		Syncs: t.stats.syncs.Load(), Flushes: t.stats.flushes.Load(),
		FlushErrors: t.flushErrors.Load(), Damaged: t.damaged.Load(),
		LostUnflushed: t.lostData, Failed: t.down.Load(),
	}
}

// committer flushes in the background and keeps transnos and space ahead.
func (t *Target) committer() {
	defer t.wg.Done()
	var tick <-chan time.Time
	if t.opts.CommitInterval > 0 {
		tk := time.NewTicker(t.opts.CommitInterval)
		defer tk.Stop()
		tick = tk.C
	}
	for {
		select {
		case <-t.stop:
			return
		case <-t.kick:
		case <-tick:
		}
		if t.begun.Load() && t.track.room() < transnoStep/2 {
			if err := t.reserve(); err != nil {
				if !t.isStopped() {
					t.fail(err)
				}
				return
			}
		}
		t.retryState()
		t.refreshSpace(0)
		if t.opts.CommitInterval > 0 {
			// Errors are counted where they happen.
			_ = t.flushDirty(t.track.last(), true)
		}
	}
}

// reserve raises the durable ceiling of transnos.
func (t *Target) reserve() error {
	var ceiling uint64
	if err := t.changeNow(func(s *super) bool {
		s.Ceiling += transnoStep
		ceiling = s.Ceiling
		return true
	}); err != nil {
		return err
	}
	t.track.mu.Lock()
	t.track.ceiling = ceiling
	t.track.mu.Unlock()
	return nil
}

// Commit flushes everything that was done before the call; it is what the
// background committer does every CommitInterval.
func (t *Target) Commit() error { return t.flushDirty(t.track.last(), true) }

func (t *Target) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}
