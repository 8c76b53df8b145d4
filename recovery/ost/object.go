package ost

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Segments of an object that are kept open at a time.
const maxOpenSegs = 64

// mtimeSlack is how much newer the kernel's mtime must be than the header to
// count: the kernel's clock for file times ticks coarsely.
const mtimeSlack = 50e6

// seg is an open segment file.
type seg struct {
	idx   uint32
	fd    int
	dirty atomic.Bool
	used  int64 // bytes allocated; object.mu
}

// object is an object in the table. Lock order: io, mu, then the table's shard
// or the tracker; smu is a leaf of its own kind (see flush.go).
type object struct {
	key  objKey
	refs atomic.Int32 // callers, dirty nodes, queued flushes
	used atomic.Bool
	dead atomic.Bool // destroyed; io

	lruPrev, lruNext *object // shard.mu

	// io is held shared by reads and writes, and exclusively by what changes
	// or removes segments under them.
	io     sync.RWMutex
	loaded atomic.Bool

	mu         sync.Mutex
	exists     bool
	size       uint64
	mtime      int64
	ctime      int64
	version    uint64
	logID      uint64
	punchSize  uint64
	punchEnd   uint64
	punchInst  uint64
	punchSeq   uint64        // counts logged punches while open
	puncher    wire.ClientID // who made those that are not known to be durable
	sureLog    uint64
	lastSeg    uint32
	multi      bool
	hdrDirty   bool
	entryNew   atomic.Bool // name in the fan-out directory is not durable; changed under mu
	segDirNew  bool        // names in the segment directory are not durable
	segDirMade bool
	inFlush    bool
	zombies    []int // descriptors to close after the flush
	present    map[uint32]struct{}
	segs       atomic.Pointer[[]*seg] // sorted; changed under mu

	// For replays, see order.go: marked is the transno of the newest change that
	// this start knows of, newest that of the newest ever, sure that up to which
	// everything is durable; by are those who made changes after sure, after
	// those of changes since the flush under way began.
	marked, newest, sure uint64
	by, after            writers

	spans   []span // writes under way
	waiting int    // writes that wait for them
	cond    sync.Cond

	nodes      [2]dirtyNode // tracker.mu
	active     uint8        // tracker.mu
	dirtyBytes atomic.Int64
	hintBytes  atomic.Int64

	// Sequential readers: where the last read ended and how far was read ahead.
	readEnd, raEnd atomic.Uint64

	smu       sync.Mutex
	queued    bool
	flushing  bool
	cur, wait []waiter
	qnext     *object
}

func newObject(k objKey) *object {
	o := &object{key: k}
	o.cond.L = &o.mu
	return o
}

func (k objKey) name() string {
	return fmt.Sprintf("%016x-%08x-%08x-%02x", k.fid.Seq, k.fid.OID, k.fid.Ver, k.stripe)
}

func dirName(d uint8) string    { return fmt.Sprintf("o/%02x", d) }
func (k objKey) path() string   { return dirName(k.dir()) + "/" + k.name() }
func (k objKey) segDir() string { return k.path() + ".s" }
func segName(i uint32) string   { return fmt.Sprintf("%06x", i) }

// parseName undoes objKey.name.
func parseName(s string) (objKey, bool) {
	var k objKey
	if len(s) != 16+1+8+1+8+1+2 {
		return k, false
	}
	p := strings.Split(s, "-")
	if len(p) != 4 {
		return k, false
	}
	seq, e1 := strconv.ParseUint(p[0], 16, 64)
	oid, e2 := strconv.ParseUint(p[1], 16, 32)
	ver, e3 := strconv.ParseUint(p[2], 16, 32)
	str, e4 := strconv.ParseUint(p[3], 16, 8)
	k = objKey{fid: wire.FID{Seq: seq, OID: uint32(oid), Ver: uint32(ver)}, stripe: uint8(str)}
	return k, e1 == nil && e2 == nil && e3 == nil && e4 == nil && k.name() == s
}

func (o *object) find(idx uint32) *seg {
	p := o.segs.Load()
	if p == nil {
		return nil
	}
	for _, s := range *p {
		if s.idx == idx {
			return s
		}
	}
	return nil
}

func (o *object) addSeg(s *seg) {
	var l []*seg
	if p := o.segs.Load(); p != nil {
		l = slices.Clone(*p)
	}
	l = append(l, s)
	slices.SortFunc(l, func(a, b *seg) int { return int(a.idx) - int(b.idx) })
	o.segs.Store(&l)
}

// dropSegs closes the open segments for which f is true. Called with io held
// exclusively and mu held.
func (t *Target) dropSegs(o *object, f func(*seg) bool) {
	p := o.segs.Load()
	if p == nil {
		return
	}
	var keep []*seg
	for _, s := range *p {
		switch {
		case !f(s):
			keep = append(keep, s)
		case o.inFlush:
			o.zombies = append(o.zombies, s.fd)
		default:
			t.closeFD(s.fd)
		}
	}
	o.segs.Store(&keep)
}

func (t *Target) closeFD(fd int) {
	t.openFDs.Add(-1)
	if err := t.fs.Close(fd); err != nil {
		t.log.Error("close of an object file failed", "err", err)
	}
}

func (t *Target) openFile(path string, flags int) (int, error) {
	fd, err := t.fs.Open(path, flags)
	if err == nil {
		t.openFDs.Add(1)
	}
	return fd, err
}

// acquire returns the object, loaded and with a reference.
func (t *Target) acquire(k objKey) (*object, error) {
	var buf [4]*object
	o, victims := t.table.get(k, buf[:0])
	t.evict(victims)
	if !o.loaded.Load() {
		o.io.Lock()
		var err error
		if !o.loaded.Load() && !o.dead.Load() {
			o.mu.Lock()
			if err = t.load(o); err != nil {
				t.dropSegs(o, func(*seg) bool { return true })
				o.exists = false
			} else {
				o.loaded.Store(true)
			}
			o.mu.Unlock()
		}
		o.io.Unlock()
		if err != nil {
			t.release(o)
			return nil, err
		}
	}
	return o, nil
}

// evict closes objects that were dropped from the table.
func (t *Target) evict(victims []*object) {
	for _, v := range victims {
		v.mu.Lock()
		t.dropSegs(v, func(*seg) bool { return true })
		v.mu.Unlock()
	}
}

// release gives a reference back.
func (t *Target) release(o *object) {
	if o.refs.Add(-1) == 0 && o.dead.Load() {
		o.mu.Lock()
		t.dropSegs(o, func(*seg) bool { return true })
		o.mu.Unlock()
	}
}

// load reads the object's state from its files. Called with io held
// exclusively and mu held.
func (t *Target) load(o *object) error {
	t.dropSegs(o, func(*seg) bool { return true })
	o.exists, o.present, o.segDirMade, o.punchInst = false, nil, false, 0
	fd, err := t.openFile(o.key.path(), objfs.ReadWrite)
	if err == unix.ENOENT {
		// Further segments may be left where power was lost; see below.
		if len(t.lost) > 0 {
			if removed, _ := t.removeFiles(o); removed {
				t.dirs[o.key.dir()].changed()
			}
		}
		return nil
	}
	if err == unix.EROFS {
		fd, err = t.openFile(o.key.path(), objfs.ReadOnly)
	}
	if err != nil {
		return fmt.Errorf("open object: %w", err)
	}
	s := &seg{fd: fd}
	o.addSeg(s)
	h, st, err := t.readHeader(fd, o.key, 0)
	if errors.Is(err, errUnfinished) {
		t.dropSegs(o, func(*seg) bool { return true })
		t.log.Warn("object was created but never flushed before power was lost", "fid", o.key.fid, "stripe", o.key.stripe)
		// Removed, not reused: should power fail again, a new header must not
		// meet the old content. If this fails the object is missing all the same.
		// With it further segments, which would be taken for those of the object
		// that is made anew.
		_, _ = t.removeFiles(o)
		t.dirs[o.key.dir()].changed()
		return nil
	}
	if err != nil {
		return err
	}
	s.used = st.Used
	o.exists = true
	o.lastSeg, o.multi, o.version, o.logID = h.LastSeg, h.Multi, h.Version, h.LogID
	o.mtime, o.ctime = h.Mtime, h.Ctime
	newest := st.Mtime
	last := st
	if o.multi {
		if err := t.loadSegDir(o); err != nil {
			return err
		}
	}
	if o.lastSeg > 0 {
		last = objfs.Stat{}
		if _, ok := o.present[o.lastSeg]; ok {
			ls, err := t.openSeg(o, o.lastSeg, true)
			if err != nil {
				return err
			}
			if last, err = t.fs.Fstat(ls.fd); err != nil {
				return err
			}
			ls.used = last.Used
			newest = max(newest, last.Mtime)
		}
	}
	data := uint64(max(0, last.Size-headerSize))
	if data > t.segSize {
		return fmt.Errorf("%w: segment of %d bytes", errDamaged, data)
	}
	o.size = uint64(o.lastSeg)<<t.segShift + data
	if o.size > t.maxSize {
		return fmt.Errorf("%w: size %d", errDamaged, o.size)
	}
	if o.sureLog = h.SureLog; o.newest == 0 {
		o.marked, o.sure, o.newest = h.Durable, h.Durable, h.Version
		if h.Replay && h.Version > max(h.Durable, t.state.recorded.Load()) {
			o.by.add(unknownClient)
		}
	}
	if newest > h.Written+mtimeSlack {
		o.mtime, o.ctime = newest, max(newest, o.ctime)
		o.version = max(o.version, t.startTransno)
	} else if t.unclean && h.Written < t.startedAt && newest > h.Written-mtimeSlack {
		// Something may have been written right after the header, too soon for
		// the kernel's clock to show it. A time that nobody has seen makes clients
		// that cached the file look again.
		o.mtime++
		o.ctime++
	}
	o.punchInst = 0
	if h.PunchInst != 0 && t.lost[h.PunchInst] {
		// Power was lost after this truncate was recorded and before it was
		// known to be durable. Nothing durable can be behind it: a flush clears
		// the mark first. It does not count as executed: what came before it may be
		// replayed, and then it has to be executed again, by its own replay or its
		// log record.
		t.log.Info("repeating a truncate that was interrupted", "fid", o.key.fid, "size", h.PunchSize)
		o.logID = h.SureLog
		if err := t.truncateTo(o, h.PunchSize, h.SureLog, true); err != nil {
			return err
		}
		if h.PunchEnd > h.PunchSize {
			if err := t.truncateTo(o, h.PunchEnd, h.SureLog, true); err != nil {
				return err
			}
		}
		o.puncher = unknownClient
		o.version = max(o.version, t.startTransno)
		t.track.link(o)
	} else if o.segDirNew {
		// A segment was made anew: its name has to become durable even if this
		// object is closed before anything is written to it.
		t.track.link(o)
	}
	return nil
}

// readHeader reads and checks the header of an open segment file.
func (t *Target) readHeader(fd int, k objKey, idx uint32) (header, objfs.Stat, error) {
	st, err := t.fs.Fstat(fd)
	if err != nil {
		return header{}, st, fmt.Errorf("stat object: %w", err)
	}
	bp := t.blocks.Get().(*[headerSize]byte)
	defer t.blocks.Put(bp)
	n, err := t.fs.Pread(fd, bp[:headerLen], 0)
	if err != nil {
		return header{}, st, fmt.Errorf("read object header: %w", err)
	}
	h, err := decodeHeader(bp[:n])
	if err == nil && (h.FID != k.fid || h.Stripe != k.stripe || h.Segment != idx) {
		err = fmt.Errorf("%w: belongs to %v stripe %d segment %d", errDamaged, h.FID, h.Stripe, h.Segment)
	}
	if errors.Is(err, errDamaged) {
		t.damaged.Add(1)
		t.log.Error("damaged object", "fid", k.fid, "stripe", k.stripe, "segment", idx, "err", err)
	}
	return h, st, err
}

// loadSegDir learns which segments there are and removes those that a truncate
// or an unfinished write left behind the end.
func (t *Target) loadSegDir(o *object) error {
	names, err := t.fs.ReadDir(o.key.segDir())
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read segment directory: %w", err)
	}
	o.segDirMade = true
	o.present = make(map[uint32]struct{}, len(names))
	removed := false
	for _, n := range names {
		i, err := strconv.ParseUint(n, 16, 32)
		if err != nil || segName(uint32(i)) != n || uint32(i) > o.lastSeg || i == 0 {
			if err := t.fs.Remove(o.key.segDir() + "/" + n); err != nil && err != unix.ENOENT {
				return fmt.Errorf("remove left-over segment: %w", err)
			}
			removed = true
			continue
		}
		o.present[uint32(i)] = struct{}{}
	}
	if removed {
		return t.syncPath(o.key.segDir())
	}
	return nil
}

// syncPath makes the names in a directory durable.
func (t *Target) syncPath(path string) error {
	fd, err := t.fs.Open(path, objfs.ReadOnly|objfs.Directory)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	err = t.fs.Fdatasync(fd)
	t.fs.Close(fd)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// writeHeader writes segment 0's header from the object's state (mu held).
func (t *Target) writeHeader(o *object) error {
	s := o.find(0)
	if s == nil {
		return fmt.Errorf("write object header: %w", unix.EBADF)
	}
	h := header{
		FID: o.key.fid, Stripe: o.key.stripe, LastSeg: o.lastSeg, Multi: o.multi, Replay: o.by.replayable(),
		Version: o.version, LogID: o.logID, PunchSize: o.punchSize, PunchEnd: o.punchEnd, PunchInst: o.punchInst,
		SureLog: o.sureLog, Durable: o.sure,
		Mtime: o.mtime, Ctime: o.ctime,
	}
	if err := t.putHeader(s.fd, &h); err != nil {
		return err
	}
	s.dirty.Store(true)
	o.hdrDirty = false
	return nil
}

func (t *Target) putHeader(fd int, h *header) error {
	bp := t.blocks.Get().(*[headerSize]byte)
	defer t.blocks.Put(bp)
	h.Written = t.clock()
	h.encode(bp[:])
	if _, err := t.fs.Pwrite(fd, bp[:], 0); err != nil {
		return fmt.Errorf("write object header: %w", err)
	}
	return nil
}

// openSeg returns segment idx, opened if need be, and made if create. nil
// without an error: the segment does not exist. Called with mu held (and io at
// least shared).
func (t *Target) openSeg(o *object, idx uint32, create bool) (*seg, error) {
	if s := o.find(idx); s != nil {
		return s, nil
	}
	if idx == 0 {
		if !create {
			return nil, nil
		}
		return t.createFirst(o)
	}
	_, have := o.present[idx]
	if !have && !create {
		return nil, nil
	}
	path := o.key.segDir() + "/" + segName(idx)
	if have {
		fd, err := t.openFile(path, objfs.ReadWrite)
		if err != nil && err != unix.ENOENT {
			return nil, fmt.Errorf("open segment: %w", err)
		}
		if err == nil {
			_, st, err := t.readHeader(fd, o.key, idx)
			if err == nil {
				s := &seg{idx: idx, fd: fd, used: st.Used}
				o.addSeg(s)
				return s, nil
			}
			t.closeFD(fd)
			if !errors.Is(err, errUnfinished) {
				return nil, err
			}
			// Never flushed: what is in it may be anything. Removed for the
			// same reason as an unfinished object.
			if err := t.fs.Remove(path); err != nil && err != unix.ENOENT {
				return nil, fmt.Errorf("remove unfinished segment: %w", err)
			}
			o.segDirNew = true
		}
		delete(o.present, idx)
		if !create {
			return nil, nil
		}
	}
	if !o.exists {
		if _, err := t.createFirst(o); err != nil {
			return nil, err
		}
	}
	if !o.segDirMade {
		if !o.multi {
			// The mark is in the file before the directory is there, so that
			// nothing in the directory is ever overlooked.
			o.multi = true
			if err := t.writeHeader(o); err != nil {
				o.multi = false
				return nil, err
			}
		}
		err := t.fs.Mkdir(o.key.segDir())
		if err != nil && err != unix.EEXIST {
			return nil, fmt.Errorf("make segment directory: %w", err)
		}
		o.entryNew.Store(true)
		t.dirs[o.key.dir()].changed()
		if err := t.loadSegDir(o); err != nil {
			return nil, err
		}
		o.segDirMade = true
		if o.present == nil {
			o.present = make(map[uint32]struct{})
		}
	}
	fd, err := t.openFile(path, objfs.ReadWrite|objfs.Create|objfs.Trunc)
	if err != nil {
		return nil, fmt.Errorf("create segment: %w", err)
	}
	o.segDirNew = true
	h := header{FID: o.key.fid, Stripe: o.key.stripe, Segment: idx}
	if err := t.putHeader(fd, &h); err != nil {
		t.closeFD(fd)
		t.fs.Remove(path)
		return nil, err
	}
	s := &seg{idx: idx, fd: fd, used: headerSize}
	s.dirty.Store(true)
	o.present[idx] = struct{}{}
	o.addSeg(s)
	return s, nil
}

// createFirst makes the object: segment 0 with its header.
func (t *Target) createFirst(o *object) (*seg, error) {
	fd, err := t.openFile(o.key.path(), objfs.ReadWrite|objfs.Create|objfs.Trunc)
	if err != nil {
		return nil, fmt.Errorf("create object: %w", err)
	}
	s := &seg{fd: fd, used: headerSize}
	o.addSeg(s)
	done := t.cut[o.key]
	o.size, o.lastSeg, o.multi, o.logID, o.punchInst, o.sureLog = 0, 0, false, done, 0, done
	o.sure, o.by = 0, writers{}
	o.present, o.segDirMade = nil, false
	if err := t.writeHeader(o); err != nil {
		t.fs.Remove(o.key.path())
		o.segs.Store(nil)
		t.closeFD(fd)
		return nil, err
	}
	o.exists = true
	o.entryNew.Store(true)
	t.dirs[o.key.dir()].changed()
	return s, nil
}

// allocated is the object's Used (mu held): segments that are not open count
// with nothing.
func (o *object) allocated() uint64 {
	var n int64
	if p := o.segs.Load(); p != nil {
		for _, s := range *p {
			n += max(0, s.used-headerSize)
		}
	}
	return uint64(n)
}

func (o *object) attr(a *wire.ObjAttr) {
	*a = wire.ObjAttr{
		Exists: o.exists, Size: o.size, Used: o.allocated(),
		Mtime: o.mtime, Ctime: o.ctime, Version: o.version,
	}
	if !o.exists {
		*a = wire.ObjAttr{}
	}
}

func (o *object) pre(p *wire.PreAttr) {
	*p = wire.PreAttr{Valid: true}
	if o.exists {
		p.Size, p.Mtime, p.Ctime = o.size, o.mtime, o.ctime
	}
}

// touch sets the times of a change (mu held). ctime rises with every change,
// also when requests overtake each other by a little.
func (t *Target) touch(o *object, at int64) {
	if at == 0 {
		at = t.clock()
	}
	if at <= o.ctime && o.ctime-at < 1e9 {
		at = o.ctime + 1
	}
	o.mtime, o.ctime = at, at
}

// firstTouch sets the times that the header of a new object starts with, one
// step before those that its first operation sets.
func (t *Target) firstTouch(o *object, at int64) {
	if at == 0 {
		at = t.clock()
	}
	o.mtime, o.ctime = at, at-1
}

// refreshUsed asks the file system for a segment's allocation unless it is
// known to be complete.
func (t *Target) refreshUsed(o *object, s *seg) {
	end := int64(t.segSize)
	if s.idx == o.lastSeg {
		end = int64(o.size - uint64(s.idx)<<t.segShift)
	}
	if s.used >= end+headerSize {
		return
	}
	if st, err := t.fs.Fstat(s.fd); err == nil {
		s.used = st.Used
	}
}

// truncateTo sets the object's size, io held exclusively and mu held. With
// pending the header says that the truncate may not be durable yet.
//
// The order is: file size, header, removal of segments. A process that dies
// after the first leaves an unacknowledged truncate done but not recorded (it
// is repeated); after the second, segments behind the end that load removes.
// What a power failure may leave is told in header.PunchInst: the kernel may
// write the header before the new size, so the header does not claim that the
// truncate is done until an fdatasync between them says so.
func (t *Target) truncateTo(o *object, size, logID uint64, pending bool) error {
	last := uint32(0)
	if size > 0 {
		last = uint32((size - 1) >> t.segShift)
	}
	if _, err := t.openSeg(o, 0, true); err != nil {
		return err
	}
	s, err := t.openSeg(o, last, true)
	if err != nil {
		return err
	}
	if err := t.fs.Truncate(s.fd, int64(size-uint64(last)<<t.segShift)+headerSize); err != nil {
		return fmt.Errorf("truncate object: %w", err)
	}
	s.dirty.Store(true)
	oldLast := o.lastSeg
	o.lastSeg, o.size = last, size
	sureLog := o.logID
	o.logID = max(o.logID, logID)
	if pending {
		if o.punchInst == 0 {
			o.sureLog = sureLog
		}
		if o.punchInst == 0 || size < o.punchSize {
			o.punchSize = size
		}
		o.punchEnd, o.punchInst = size, t.instance
		o.punchSeq++
	}
	// When this fails the truncate is done all the same, and the next flush
	// writes the header again.
	o.hdrDirty = true
	err = t.writeHeader(o)
	if oldLast > last {
		if rerr := t.removeBehind(o, last); rerr != nil {
			// What is left behind the end must not show when the object grows
			// again: loading removes it or fails.
			o.loaded.Store(false)
			return rerr
		}
	}
	if err != nil {
		return err
	}
	if st, err := t.fs.Fstat(s.fd); err == nil {
		s.used = st.Used
	}
	return nil
}

// removeBehind removes the segments behind last (io held exclusively, mu held).
func (t *Target) removeBehind(o *object, last uint32) error {
	t.dropSegs(o, func(s *seg) bool { return s.idx > last })
	if !o.segDirMade {
		return nil
	}
	for i := range o.present {
		if i <= last {
			continue
		}
		if err := t.fs.Remove(o.key.segDir() + "/" + segName(i)); err != nil && err != unix.ENOENT {
			return fmt.Errorf("remove segment: %w", err)
		}
		delete(o.present, i)
	}
	// Durable before the object can grow again: an old segment that came back
	// would show its data.
	return t.syncPath(o.key.segDir())
}
