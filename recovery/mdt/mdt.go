// Package mdt is the metadata target: the name space (inodes, directory
// entries, symlinks), file layouts, the log of work that object targets have
// yet to do, IO epochs, and the reply records of NFS calls.
//
// Reads run in the caller's goroutine, from caches or the engine. Modifying
// operations run one after the other under the sequencer's lock: check, build
// one batch, apply it, update the caches. Nothing is flushed under the lock;
// the committer makes groups durable and releases the replies that wait.
//
// Open brings back what the log holds. Until Begin only replays are executed;
// they keep their transnos. The target's own changes of its tables are in the log,
// too, but have no transno.
package mdt

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/locks"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

// OSTState tells about one object target for the allocation of stripes.
type OSTState struct {
	Index uint16
	Up    bool
	Free  uint64 // bytes
}

// Options of Open. Only Engine is required.
type Options struct {
	Engine store.Engine
	// Clock gives nanoseconds since 1970 UTC, the system's clock by default.
	// Timestamps are made strictly rising from it.
	Clock func() int64
	// Rand gives inode generations, cryptographically random by default.
	Rand   func() uint32
	Logger *slog.Logger
	// OSTs lists the object targets; a single one with index 0 when nil. It is
	// called under the sequencer's lock and must be fast.
	OSTs func() []OSTState
	// StripeSize (bytes, default 1 MiB) and StripeCount (default 1) are the
	// layout of files below directories without an own default.
	StripeSize  uint32
	StripeCount uint8
	// COS (commit on share) holds reads back until what they show is durable.
	COS bool
	// InodeCache and DentryCache are numbers of cached objects, default 128k each.
	InodeCache, DentryCache int
	// ReplySlots bounds the reply records of all NFS clients together.
	ReplySlots int
	// Locks bounds the lock table.
	Locks LockLimits
	// Space gives the data bytes of the file system for OpStatfs.
	Space func() (total, free, avail uint64)
	// RootMode (default 0755), RootUID and RootGID are of the root directory
	// when it is made at the first start.
	RootMode         uint32
	RootUID, RootGID uint32
	// OnFail is called once when the target fails. It must not block.
	OnFail func(error)
}

// MDT is a metadata target. It implements wire.Target and front.Body.
//
// Callbacks are called without locks held, but for front.Execution's Executed; they
// must not block.
//
// Replies given to Handle and TryHandle must have been Reset.
type MDT struct {
	o   Options
	e   store.Engine
	log *slog.Logger
	com *target.Committer

	view      atomic.Pointer[target.View]
	down      atomic.Bool
	failed    sync.Once
	inodes    *inodeCache
	dents     *dentryCache
	logWake   chan struct{}
	fenceWake chan struct{}
	polls     lockPolls

	// seq is the sequencer's lock: it guards everything below and the order of
	// transnos, batches, cache updates and gated replies.
	seq     sync.Mutex
	core    *target.Core
	replies *target.Replies
	locks   *locks.Table
	begun   bool // recovery is over: new operations are executed
	state   State
	super   Super
	// startSeq is the FID sequence that this start has taken. It also is the upper
	// half of the tenures that it gives; nTenures counts them.
	startSeq uint64
	nTenures uint32
	// staleEpochs: there may be IO epochs of clients that are gone, or from before
	// they were evicted. lostClients counts removals from the table, and fences that
	// are complete.
	staleEpochs bool
	lostClients uint64
	fidSeq      uint64
	fidOID      uint32
	nextOST     int
	clients     map[wire.ClientID]*ClientEntry
	fences      map[wire.ClientID]*fence
	pend        map[wire.FID][]pendTrunc
	pendID      map[uint64]wire.FID
	dirty       map[wire.FID]struct{} // inodes with unwritten access times
	t           tx
	closed      bool
	// engineErr is for unlock: the engine has failed.
	engineErr error

	stats struct {
		ops, tryHits, tryMisses, modifies, errors, replays atomic.Uint64
	}
}

type pendTrunc struct{ id, size uint64 }

// blockShift divides transnos into blocks: new operations get numbers of a block
// that no earlier start has given numbers of, so that one that was given out
// before a crash and lost with it is never given again.
const blockShift = 32

// Open starts the metadata target on its engine, and makes an empty name space
// when the engine is empty. Nothing but replays is executed until Begin.
func Open(o Options) (*MDT, error) {
	if o.Engine == nil {
		return nil, errors.New("open mdt: no engine")
	}
	if o.Clock == nil {
		o.Clock = func() int64 { return time.Now().UnixNano() }
	}
	if o.Rand == nil {
		o.Rand = func() uint32 {
			var b [4]byte
			_, _ = rand.Read(b[:])
			return binary.LittleEndian.Uint32(b[:])
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OSTs == nil {
		one := []OSTState{{Index: 0, Up: true, Free: 1 << 40}}
		o.OSTs = func() []OSTState { return one }
	}
	if o.StripeSize == 0 {
		o.StripeSize = 1 << 20
	}
	if o.StripeCount == 0 {
		o.StripeCount = 1
	}
	if o.InodeCache == 0 {
		o.InodeCache = 128 << 10
	}
	if o.DentryCache == 0 {
		o.DentryCache = 128 << 10
	}
	if o.RootMode == 0 {
		o.RootMode = 0o755
	}
	m := &MDT{
		o: o, e: o.Engine, log: o.Logger,
		inodes: newInodeCache(o.InodeCache), dents: newDentryCache(o.DentryCache),
		logWake: make(chan struct{}, 1), fenceWake: make(chan struct{}, 1),
		clients: map[wire.ClientID]*ClientEntry{}, fences: map[wire.ClientID]*fence{},
		replies: target.NewReplies(o.ReplySlots),
		pend:    map[wire.FID][]pendTrunc{}, pendID: map[uint64]wire.FID{},
		dirty: map[wire.FID]struct{}{},
	}
	m.t.m = m
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("open mdt: %w", err)
	}
	m.com = target.NewCommitter(m.core.LastApplied(), m.e.Sync, m.fail)
	m.view.Store(m.core.View())
	return m, nil
}

// load reads or makes the superblock and all tables, and takes a fresh FID
// sequence durably.
func (m *MDT) load() error {
	sup, err := ReadSuper(m.e)
	fresh := errors.Is(err, store.ErrNotFound)
	if err != nil && !fresh {
		return err
	}
	b := m.e.NewBatch()
	if fresh {
		m.super.NextSeq = wire.FirstSeq
	} else {
		m.super = sup
		if m.state, err = ReadState(m.e); err != nil {
			return err
		}
	}
	if m.super.NextSeq < wire.FirstSeq || m.super.NextSeq > wire.MaxSeq {
		return fmt.Errorf("superblock: FID sequence %d is out of range", m.super.NextSeq)
	}
	m.startSeq, m.fidSeq = m.super.NextSeq, m.super.NextSeq
	m.staleEpochs = !fresh
	m.super.NextSeq++
	if fresh {
		m.state.Transno = 1
	}
	m.core = target.NewCore(m.state.Transno)
	if fresh {
		now := m.tick()
		root := &Inode{
			Attr: wire.Attr{
				FID: wire.RootFID, Type: wire.TypeDir, Mode: m.o.RootMode & 0o7777, Nlink: 2,
				UID: m.o.RootUID, GID: m.o.RootGID, Size: dirSize(0), Used: dirSize(0),
				Atime: now, Mtime: now, Ctime: now, Generation: m.o.Rand(),
				Version: m.state.Transno, Parent: wire.RootFID,
			},
			NextCookie: FirstCookie,
		}
		b.Set(appendInodeKey(nil, wire.RootFID), AppendInode(nil, root))
		m.state.Inodes = 1
	}
	b.Set(keySuper, appendSuper(nil, &m.super))
	b.Set(keyState, appendState(nil, &m.state))
	if err := m.loadClients(b); err != nil {
		b.Close()
		return err
	}
	if err := m.e.Apply(b); err != nil {
		return err
	}
	if err := m.e.Sync(); err != nil {
		return err
	}
	if err := IterVIPs(m.e, func(vip uint32, epoch uint64, err error) error {
		if err != nil {
			// Fencing must not be forgotten: this is not something to go on without.
			return fmt.Errorf("epoch of VIP %d: %w", vip, err)
		}
		m.core.SetVIPEpoch(vip, epoch)
		return nil
	}); err != nil {
		return err
	}
	if err := IterLogs(m.e, 0, func(l LogRec, err error) error {
		if err != nil {
			m.log.Error("mdt: damaged log record", "id", l.ID, "err", err)
			return nil
		}
		if l.Kind == LogTruncate {
			m.addPend(l.FID, pendTrunc{l.ID, l.Size})
		}
		return nil
	}); err != nil {
		return err
	}
	if err := m.loadLocks(); err != nil {
		return err
	}
	return m.replies.Load(m.e, func(key []byte, err error) {
		m.log.Error("mdt: damaged reply record", "key", fmt.Sprintf("%x", key), "err", err)
	})
}

func (m *MDT) addPend(f wire.FID, p pendTrunc) {
	m.pend[f] = append(m.pend[f], p)
	m.pendID[p.id] = f
}

// tick gives the next timestamp, larger than all before, also across restarts.
func (m *MDT) tick() int64 {
	m.state.Time = max(m.o.Clock(), m.state.Time+1)
	return m.state.Time
}

// maxAhead bounds how far timestamps follow a client's clock, in nanoseconds: one
// that is wrong by more has to be set right.
const maxAhead = int64(10 * time.Second)

// follow makes later timestamps newer than a client's, t (0: none).
func (m *MDT) follow(t int64) {
	if t > m.state.Time {
		m.state.Time = max(m.state.Time, min(t, m.o.Clock()+maxAhead))
	}
}

// fail stops the target; the committer has failed or is about to.
func (m *MDT) fail(err error) {
	m.down.Store(true)
	m.polls.fail()
	m.failed.Do(func() {
		m.log.Error("mdt: target failed", "err", err)
		if m.o.OnFail != nil {
			m.o.OnFail(err)
		}
	})
}

// broken stops the target after an error of the engine. The sequencer's lock is
// held; who waits for the disk is told by unlock.
func (m *MDT) broken(err error) wire.Status {
	m.down.Store(true)
	m.engineErr = err
	return wire.ErrIO
}

// unlock gives the sequencer's lock back.
func (m *MDT) unlock() {
	err := m.engineErr
	m.engineErr = nil
	m.seq.Unlock()
	if err != nil {
		m.com.Fail(err)
	}
}

// Fail stops the target because of an error met elsewhere, such as the
// engine's OnFail: replies that wait get ErrTargetDown, as later requests do.
func (m *MDT) Fail(err error) {
	m.fail(err)
	m.com.Fail(err)
}

// Down tells whether the target has failed or is closed.
func (m *MDT) Down() bool { return m.down.Load() }

// Close makes everything durable and refuses requests from then on. The engine
// stays open. Modifying requests must have ended.
func (m *MDT) Close() error {
	m.seq.Lock()
	if m.closed {
		m.seq.Unlock()
		return nil
	}
	m.closed = true
	if !m.down.Load() {
		m.flushAtimes()
	}
	m.down.Store(true)
	m.unlock()
	m.polls.fail()
	if err := m.com.Close(); err != nil {
		return fmt.Errorf("close mdt: %w", err)
	}
	m.seq.Lock()
	defer m.seq.Unlock()
	b := m.e.NewBatch()
	b.Set(keyState, appendState(nil, &m.state))
	if err := m.e.Apply(b); err != nil {
		return fmt.Errorf("close mdt: %w", err)
	}
	if err := m.e.Sync(); err != nil {
		return fmt.Errorf("close mdt: %w", err)
	}
	return nil
}

// Stats are counters since the start and gauges.
type Stats struct {
	Transno, LastCommitted  uint64
	Inodes                  uint64
	Ops, Modifies, Errors   uint64
	TryHits, TryMisses      uint64
	Reconstructed           uint64 // answers from reply records
	Syncs                   uint64
	Waiting                 int // replies waiting for durability
	Clients                 int
	ReplyClients, ReplySlot int
	CachedInodes            int
	CachedDentries          int
	PendingTruncates        int
	Down                    bool
	Engine                  store.Metrics
}

// Stats returns figures for status displays; it takes the sequencer's lock for
// a moment.
func (m *MDT) Stats() Stats {
	s := Stats{
		LastCommitted: m.com.LastCommitted(), Ops: m.stats.ops.Load(), Modifies: m.stats.modifies.Load(),
		Errors: m.stats.errors.Load(), TryHits: m.stats.tryHits.Load(), TryMisses: m.stats.tryMisses.Load(),
		Reconstructed: m.stats.replays.Load(), Syncs: m.com.Syncs(), Waiting: m.com.Waiting(),
		Clients: m.view.Load().Clients(), CachedInodes: m.inodes.len(), CachedDentries: m.dents.len(),
		Down: m.down.Load(), Transno: m.com.LastApplied(), Engine: m.e.Metrics(),
	}
	m.seq.Lock()
	s.Inodes = m.state.Inodes
	s.ReplyClients, s.ReplySlot = m.replies.Clients(), m.replies.Slots()
	s.PendingTruncates = len(m.pendID)
	m.seq.Unlock()
	return s
}

// Handle implements wire.Target.
func (m *MDT) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	m.stats.ops.Add(1)
	rep.XID = req.XID
	if m.down.Load() {
		rep.Status = wire.ErrTargetDown
		done()
		return
	}
	switch req.Op {
	case wire.OpConnect, wire.OpDisconnect, wire.OpSetVIPEpoch:
		m.control(req, rep, done)
		return
	case wire.OpLockPoll:
		m.lockPoll(req, rep, done)
		return
	case wire.OpOSTFetch:
		m.ostFetch(req, rep)
		rep.LastCommitted = m.com.LastCommitted()
		done()
		return
	}
	if req.Op.Modifies() || req.Op == wire.OpTouchAtime {
		m.modify(req, rep, front.Exec{}, nil, target.Func(done))
		return
	}
	if rep.Status = m.view.Load().Admit(&req.Header); rep.Status != wire.OK {
		rep.LastCommitted = m.com.LastCommitted()
		done()
		return
	}
	if req.Op == wire.OpSyncTarget {
		if !m.com.Gate(m.com.LastApplied(), rep, target.Func(done)) {
			done()
		}
		return
	}
	v := m.read(req, rep, false)
	if m.o.COS && v > m.com.LastCommitted() {
		if m.com.Gate(v, rep, target.Func(done)) {
			return
		}
	}
	rep.LastCommitted = m.com.LastCommitted()
	if rep.Status != wire.OK {
		m.stats.errors.Add(1)
	}
	done()
}

// TryHandle implements wire.Target: getattr, lookup and readlink of cached
// objects, and ping.
func (m *MDT) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	switch req.Op {
	case wire.OpGetattr, wire.OpLookup, wire.OpReadlink, wire.OpPing:
	default:
		return false
	}
	rep.XID = req.XID
	if m.down.Load() {
		rep.Status = wire.ErrTargetDown
		return true
	}
	if rep.Status = m.view.Load().Admit(&req.Header); rep.Status == wire.OK {
		v := m.read(req, rep, true)
		if v == missed || m.o.COS && v > m.com.LastCommitted() {
			m.stats.tryMisses.Add(1)
			data := rep.Data[:0]
			rep.Status, rep.HasAttr, rep.HasDir, rep.Data = wire.OK, false, false, data
			return false
		}
	}
	m.stats.tryHits.Add(1)
	rep.LastCommitted = m.com.LastCommitted()
	return true
}

func dirSize(entries uint64) uint64 { return 4096 * (1 + entries/64) }
