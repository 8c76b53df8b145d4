// Package locks is the lock table of the MDT: byte-range locks, share
// reservations, waiting requests and monitored clients of NLM and NSM. It is a
// pure state machine: time comes in as an argument, there is no I/O, no
// goroutine, no mutex (the caller serialises) and nothing random; equal calls
// give equal results and records.
//
// What makes it safe to lose the process at any moment: every change is handed
// out as records (Take) that the caller stores in the transaction of the
// operation that caused it, and Load builds the same table from them.
//
// A lock that a waiting request gets is kept beside the owner's own locks until
// its holder has acknowledged it, so that a grant that is refused or taken back
// leaves what the owner held before (an upgrade that fails keeps the shared
// lock).
package locks

import (
	"math"
	"slices"
	"strings"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Defaults of Limits.
const (
	DefaultPerHost        = 100_000
	DefaultTotal          = 1_000_000
	DefaultWaitersPerHost = 10_000
	DefaultHosts          = 65_536
	DefaultHostIdle       = int64(600e9)
)

const (
	all = uint64(math.MaxUint64)
	// reclaimQuiet: a host that has reclaimed and is silent for so long, in
	// nanoseconds, has no more to reclaim.
	reclaimQuiet = int64(10e9)
	// maxWindow bounds reclaim windows, in nanoseconds.
	maxWindow = int64(24 * 3600e9)
	// maxZone bounds the zone of an IPv6 address, in bytes.
	maxZone = 64
)

// Limits bounds a table. Zero values mean the defaults.
type Limits struct {
	PerHost        int   // locks, waiting requests and shares of one host
	Total          int   // the same of all hosts
	WaitersPerHost int   // waiting requests of one host
	Hosts          int   // hosts that hold something or are monitored
	HostIdle       int64 // nanoseconds that a host stays monitored when it holds nothing
}

// Stats counts what is in a table. Locks are held locks whether confirmed or
// not; Unconfirmed counts unconfirmed locks and shares; Pending the locks whose
// callback is not yet answered; Hosts the monitored ones.
type Stats struct{ Locks, Unconfirmed, Waiting, Pending, Shares, Hosts int }

// Table is a lock table. It is not safe for concurrent use.
type Table struct {
	lim   Limits
	next  uint64 // next ID or Seq
	limit uint64 // IDs below this are reserved in the store

	ids   seqList // all entries by ID
	files map[wire.FID]*file
	fos   map[foKey]*fileOwner
	hosts map[wire.LockHost]*host
	vips  []*vip // by number
	recs  int    // monitored hosts

	graces     int    // service addresses in grace
	damage     uint64 // how often damage was found so far
	hostDamage uint64 // the last time that it may have hit host records

	waitFiles          map[*file]struct{} // files with waiting requests
	freedFiles         []*file
	idleHead, idleTail *host
	granted            bool
	now                int64  // of the running operation
	ops                uint64 // operations since the start

	metaDirty  bool
	dirtyVIPs  []*vip
	dirtyHosts []*host
	dirty      []*entry
	lost       [][]byte // keys of damaged records to delete
	loading    []*entry
	loaded     bool
	enc        []byte
	mark       uint64 // of the deadlock search
	stack      []*owner
}

type foKey struct {
	f *file
	o *owner
}

// entry is a held lock, a waiting request or a share reservation.
type entry struct {
	id    uint64
	o     *owner
	f     *file
	r     wire.LockRange
	since int64
	seq   uint64 // of the grant, LockGrantPending only
	asked uint64 // Table.ops when the request came; 0 after a restart; waiting and pending
	note  []byte // waiting and pending
	conf  uint32 // NSM state in which it was confirmed
	prio  uint32

	state               wire.LockState // LockGranted, LockGrantPending or LockWaiting
	excl, share         bool
	barge               bool // waiting: does not queue behind earlier requests
	mode, access        uint8
	dirty, stored, dead bool
	n                   [2]node
	hostPrev, hostNext  *entry
}

// unconfirmed: held before the last crash of its service address.
func (e *entry) unconfirmed() bool { return e.conf < e.o.h.v.crash }

// yields: unconfirmed and its reclaim window has passed.
func (e *entry) yields(now int64) bool {
	return e.state != wire.LockWaiting && e.unconfirmed() && e.o.h.v.windowEnd <= now
}

func (e *entry) visibleState() wire.LockState {
	if e.state != wire.LockWaiting && e.unconfirmed() {
		return wire.LockUnconfirmed
	}
	return e.state
}

func (e *entry) holder() wire.LockHolder {
	h := wire.LockHolder{ID: e.id, FID: e.f.fid, Owner: e.o.key(), State: e.visibleState(), Since: e.since}
	if e.share {
		h.Share, h.ShareMode, h.ShareAccess = true, e.mode, e.access
	} else {
		h.Range, h.Exclusive = e.r, e.excl
	}
	return h
}

// file is an object with entries.
type file struct {
	fid        wire.FID
	held, wait [2]tree // shared, exclusive
	shares     []*entry
	refs       int
	freed      wire.LockRange // hull of what became free in this step
	freedSet   bool
}

// fileOwner is what one owner has on one file.
type fileOwner struct {
	own     tree // held and acknowledged; disjoint
	pending []*entry
	waiting []*entry
	// lastExcl is Table.ops when an exclusive lock was last given here.
	lastExcl uint64
}

type owner struct {
	h       *host
	svid    uint32
	oh      string
	refs    int
	waiting []*entry
	mark    uint64
}

func (o *owner) key() wire.LockOwner {
	return wire.LockOwner{LockHost: o.h.key, Svid: o.svid, OH: o.oh}
}

type ownerKey struct {
	svid uint32
	oh   string
}

// kind gives the tree index of shared and exclusive.
func kind(excl bool) int {
	if excl {
		return 1
	}
	return 0
}

// New makes an empty table. IDs and grant Seqs are handed out from firstID on,
// or from above all that the loaded records know of if that is higher.
func New(l Limits, firstID uint64) *Table {
	def := func(p *int, d int) {
		if *p <= 0 {
			*p = d
		}
	}
	def(&l.PerHost, DefaultPerHost)
	def(&l.Total, DefaultTotal)
	def(&l.WaitersPerHost, DefaultWaitersPerHost)
	def(&l.Hosts, DefaultHosts)
	if l.HostIdle <= 0 {
		l.HostIdle = DefaultHostIdle
	}
	return &Table{
		lim: l, next: max(firstID, 1),
		files: map[wire.FID]*file{}, fos: map[foKey]*fileOwner{}, hosts: map[wire.LockHost]*host{},
		waitFiles: map[*file]struct{}{},
	}
}

// newID hands out the next ID or Seq. They are reserved in the store in large
// steps, so that none is used twice even when nothing of it was kept.
func (t *Table) newID() uint64 {
	id := t.next
	t.next++
	if t.next > t.limit {
		t.limit = t.next + 1<<20
		t.metaDirty = true
	}
	return id
}

// normal brings a host into the form in which it is compared, and tells whether
// it is within bounds.
func normal(h wire.LockHost) (wire.LockHost, bool) {
	h.Addr = h.Addr.Unmap()
	return h, len(h.Name) <= wire.MaxLockHostName && len(h.Addr.Zone()) <= maxZone
}

func normalOwner(o wire.LockOwner) (wire.LockOwner, bool) {
	h, ok := normal(o.LockHost)
	o.LockHost = h
	return o, ok && len(o.OH) <= wire.MaxLockOwnerOH
}

func compareHosts(a, b wire.LockHost) int {
	switch {
	case a.VIP < b.VIP:
		return -1
	case a.VIP > b.VIP:
		return 1
	}
	if c := a.Addr.Compare(b.Addr); c != 0 {
		return c
	}
	return strings.Compare(a.Name, b.Name)
}

func byID(a, b *entry) int {
	switch {
	case a.id < b.id:
		return -1
	case a.id > b.id:
		return 1
	}
	return 0
}

func compareFID(a, b wire.FID) int {
	var x, y [wire.FIDSize]byte
	a.Put(x[:])
	b.Put(y[:])
	return slices.Compare(x[:], y[:])
}

// findOwner gives the owner if it has entries, else nil.
func (t *Table) findOwner(k *wire.LockOwner) *owner {
	if h := t.hosts[k.LockHost]; h != nil {
		return h.owners[ownerKey{k.Svid, k.OH}]
	}
	return nil
}

// The makers give the known object, or a new one that becomes known with its
// first entry.

func (t *Table) makeOwner(k *wire.LockOwner) *owner {
	if o := t.findOwner(k); o != nil {
		return o
	}
	k.OH = strings.Clone(k.OH)
	return &owner{h: t.makeHost(k.LockHost), svid: k.Svid, oh: k.OH}
}

func (t *Table) makeFile(fid wire.FID) *file {
	if f := t.files[fid]; f != nil {
		return f
	}
	return &file{fid: fid}
}

// add makes an entry known; id 0 takes a new one.
func (t *Table) add(e *entry) *entry {
	if e.id == 0 {
		e.id = t.newID()
	}
	e.prio = hash32(e.id)
	t.ids.add(e.id, e)
	f, o, h := e.f, e.o, e.o.h
	if f.refs++; f.refs == 1 {
		t.files[f.fid] = f
	}
	if h.n == 0 {
		t.hosts[h.key] = h
		t.idleRemove(h)
	}
	h.n++
	if o.refs++; o.refs == 1 {
		h.owners[ownerKey{o.svid, o.oh}] = o
	}
	e.hostNext = h.first
	if h.first != nil {
		h.first.hostPrev = e
	}
	h.first = e
	t.index(e)
	t.touch(e)
	return e
}

// remove forgets an entry. What it leaves free is the caller's to settle.
func (t *Table) remove(e *entry) {
	t.unindex(e)
	t.ids.remove(e.id)
	f, o, h := e.f, e.o, e.o.h
	k := foKey{f, o}
	if fo := t.fos[k]; fo != nil && fo.own.root == nil && len(fo.pending)+len(fo.waiting) == 0 {
		delete(t.fos, k)
	}
	if e.hostPrev != nil {
		e.hostPrev.hostNext = e.hostNext
	} else {
		h.first = e.hostNext
	}
	if e.hostNext != nil {
		e.hostNext.hostPrev = e.hostPrev
	}
	e.hostPrev, e.hostNext = nil, nil
	if o.refs--; o.refs == 0 {
		delete(h.owners, ownerKey{o.svid, o.oh})
	}
	if h.n--; h.n == 0 {
		t.hostEmpty(h)
	}
	if f.refs--; f.refs == 0 {
		delete(t.files, f.fid)
	}
	e.dead = true
	t.touch(e)
}

// touch notes that the entry's record changes.
func (t *Table) touch(e *entry) {
	if !e.dirty {
		e.dirty = true
		t.dirty = append(t.dirty, e)
	}
}

// index puts an entry into the structures that depend on its range and state;
// unindex takes it out, and is called before either changes.
func (t *Table) index(e *entry) {
	f, v := e.f, e.o.h.v
	unconf := 0
	if e.state != wire.LockWaiting && e.unconfirmed() {
		unconf = 1
	}
	if e.share {
		v.shares++
		v.unconfShares += unconf
		f.shares = append(f.shares, e)
		return
	}
	k := foKey{f, e.o}
	fo := t.fos[k]
	if fo == nil {
		fo = &fileOwner{own: tree{slot: slotOwner}}
		t.fos[k] = fo
	}
	switch e.state {
	case wire.LockWaiting:
		v.waiting++
		e.o.h.waiting++
		fo.waiting = append(fo.waiting, e)
		e.o.waiting = append(e.o.waiting, e)
		f.wait[kind(e.excl)].insert(e)
		t.waitFiles[f] = struct{}{}
		return
	case wire.LockGrantPending:
		v.pending++
		fo.pending = append(fo.pending, e)
		e.seq = t.newID()
		v.grants.add(e.seq, e)
		t.granted = true
	default:
		fo.own.insert(e)
	}
	v.locks++
	v.unconfLocks += unconf
	f.held[kind(e.excl)].insert(e)
}

func (t *Table) unindex(e *entry) {
	f, v := e.f, e.o.h.v
	unconf := 0
	if e.state != wire.LockWaiting && e.unconfirmed() {
		unconf = 1
	}
	if e.share {
		v.shares--
		v.unconfShares -= unconf
		f.shares = drop(f.shares, e)
		return
	}
	fo := t.fos[foKey{f, e.o}]
	switch e.state {
	case wire.LockWaiting:
		v.waiting--
		e.o.h.waiting--
		fo.waiting = drop(fo.waiting, e)
		e.o.waiting = drop(e.o.waiting, e)
		f.wait[kind(e.excl)].remove(e)
		if f.wait[0].root == nil && f.wait[1].root == nil {
			delete(t.waitFiles, f)
		}
	case wire.LockGrantPending:
		v.pending--
		fo.pending = drop(fo.pending, e)
		v.grants.remove(e.seq)
		e.seq = 0
	default:
		fo.own.remove(e)
	}
	if e.state != wire.LockWaiting {
		v.locks--
		v.unconfLocks -= unconf
		f.held[kind(e.excl)].remove(e)
	}
}

func drop(l []*entry, e *entry) []*entry {
	i := slices.Index(l, e)
	l = slices.Delete(l, i, i+1)
	if len(l) == 0 {
		return nil
	}
	return l
}

// HasFile tells whether anything is recorded for a file.
func (t *Table) HasFile(fid wire.FID) bool { return t.files[fid] != nil }

// Stats counts the table's contents.
func (t *Table) Stats() Stats {
	s := Stats{Hosts: t.recs}
	for _, v := range t.vips {
		s.Locks += v.locks
		s.Unconfirmed += v.unconfLocks + v.unconfShares
		s.Waiting += v.waiting
		s.Pending += v.pending
		s.Shares += v.shares
	}
	return s
}

// List gives up to max entries (0: all) with an ID above afterID in the order
// of ID: held and waiting locks and shares, of one file (zero FID: all files)
// and of one service address or all. eof: there are no more.
func (t *Table) List(fid wire.FID, vip uint32, allVIPs bool, afterID uint64, max int) (l []wire.LockHolder, eof bool) {
	add := func(e *entry) bool {
		if e == nil || e.id <= afterID || !allVIPs && e.o.h.key.VIP != vip {
			return true
		}
		if max > 0 && len(l) == max {
			return false
		}
		l = append(l, e.holder())
		return true
	}
	if fid.IsZero() {
		for _, it := range t.ids.l[t.ids.after(afterID):] {
			if !add(it.e) {
				return l, false
			}
		}
		return l, true
	}
	f := t.files[fid]
	if f == nil {
		return nil, true
	}
	for _, e := range f.entries() {
		if !add(e) {
			return l, false
		}
	}
	return l, true
}

// entries gives all entries of a file by ID.
func (f *file) entries() []*entry {
	every := wire.LockRange{End: all}
	l := slices.Clone(f.shares)
	for k := range 2 {
		l = f.held[k].collect(l, every, all)
		l = f.wait[k].collect(l, every, all)
	}
	slices.SortFunc(l, byID)
	return l
}

// Pending gives up to max (0: all) locks of a service address whose holder has
// not yet answered the callback, with a Seq above afterSeq, by Seq. Locks that
// were pending when their address crashed are among them: the client may still
// wait for them.
func (t *Table) Pending(vip uint32, afterSeq uint64, max int) []wire.LockGrant {
	v := t.findVIP(vip)
	if v == nil {
		return nil
	}
	var l []wire.LockGrant
	for _, it := range v.grants.l[v.grants.after(afterSeq):] {
		if max > 0 && len(l) == max {
			break
		}
		if e := it.e; e != nil {
			l = append(l, wire.LockGrant{Seq: e.seq, ID: e.id, FID: e.f.fid, Owner: e.o.key(), Range: e.r,
				Exclusive: e.excl, Note: slices.Clone(e.note)})
		}
	}
	return l
}

// Granted tells whether new grants appeared since the last call.
func (t *Table) Granted() bool {
	g := t.granted
	t.granted = false
	return g
}
