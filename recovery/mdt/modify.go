package mdt

import (
	"math"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// tx is one modifying operation under the sequencer's lock. Nothing of it is
// visible before commit; an operation that fails just drops it.
//
// A replay has to make what the first execution made, so an operation depends on
// nothing but the request, what it finds in the inodes that it edits, and, for
// what is not decided by these, Request.Made.
type tx struct {
	m   *MDT
	req *wire.Request
	rep *wire.Reply
	b   store.Batch
	x   front.Exec
	// remote: somebody may replay the operation, and needs the outcome for that.
	remote bool
	// now is the operation's timestamp. edit may raise it, so an operation edits
	// all that it changes before it uses now.
	now     int64
	transno uint64 // the number that commit will assign
	raise   int64  // least State.Time afterwards

	inodes  []staged
	dents   []stagedDent
	dir     report // what the reply shows, by the state after the operation
	dir2    report
	obj     report
	fid     wire.FID // for the reply record
	delta   int      // of the number of inodes
	addPend []pendAdd
	delPend []uint64
	unlink  bool // an unlink record was written
	gateAt  uint64
	// shown is the transno of an earlier operation whose effect the answer tells.
	shown uint64
	// held: the answer waits for the disk, because the operation is none that could
	// be replayed.
	held bool
	// mismatch: a replay has found other versions than before, or failed; lost: the
	// engine failed.
	mismatch, lost bool
	data           []byte // encoded outcome
	// status is that of an operation that was committed; lock operations may have
	// another one than OK.
	status wire.Status
	kb, vb []byte
}

type staged struct {
	old     *Inode // nil: new
	in      *Inode
	deleted bool
}

type stagedDent struct {
	dir  wire.FID
	name []byte
	ent  Entry
}

type report struct{ old, cur *Inode }

type pendAdd struct {
	f wire.FID
	p pendTrunc
}

func (t *tx) begin(req *wire.Request, rep *wire.Reply, x front.Exec, remote bool) {
	t.req, t.rep, t.b, t.x, t.remote = req, rep, nil, x, remote
	if t.replay() {
		t.now, t.transno = req.Made.Time, x.Transno
	} else {
		t.m.follow(req.Time)
		t.now, t.transno = t.m.tick(), t.m.core.NextTransno()
	}
	t.raise, t.shown, t.held, t.mismatch, t.lost, t.data = 0, 0, false, false, false, nil
	clear(t.inodes)
	clear(t.dents)
	t.inodes, t.dents = t.inodes[:0], t.dents[:0]
	t.dir, t.dir2, t.obj = report{}, report{}, report{}
	t.fid, t.delta, t.unlink = wire.FID{}, 0, false
	t.addPend, t.delPend = t.addPend[:0], t.delPend[:0]
	t.gateAt = t.m.core.LastApplied()
	t.status = wire.OK
}

func (t *tx) replay() bool { return t.x.Transno != 0 }

func (t *tx) batch() store.Batch {
	if t.b == nil {
		t.b = t.m.e.NewBatch()
	}
	return t.b
}

func (t *tx) set(k, v []byte) {
	t.kb, t.vb = k[:0], v[:0]
	t.batch().Set(k, v)
}

func (t *tx) del(k []byte) {
	t.kb = k[:0]
	t.batch().Delete(k)
}

// load returns an object as this operation sees it.
func (t *tx) load(f wire.FID) (*Inode, wire.Status) {
	for i := range t.inodes {
		if s := &t.inodes[i]; s.in.Attr.FID == f {
			if s.deleted {
				return nil, wire.ErrStale
			}
			return s.in, wire.OK
		}
	}
	return t.m.inode(f, false)
}

// loadEntry loads what a directory entry names; that it is missing is damage.
func (t *tx) loadEntry(ent Entry) (*Inode, wire.Status) {
	in, st := t.load(ent.FID)
	if st == wire.ErrStale {
		return nil, t.m.damaged("inode of an entry", ent.FID, store.ErrNotFound)
	}
	return in, st
}

// edit returns a copy of in that commit stores, the same one when the operation
// edits the object again.
func (t *tx) edit(in *Inode) *Inode {
	for i := range t.inodes {
		if t.inodes[i].in.Attr.FID == in.Attr.FID {
			return t.inodes[i].in
		}
	}
	// An OST's clock may have been ahead; ctime never goes back.
	t.now = max(t.now, in.Attr.Ctime+1)
	c := *in
	t.inodes = append(t.inodes, staged{old: in, in: &c})
	for _, r := range [...]*report{&t.dir, &t.dir2, &t.obj} {
		if r.old == in {
			r.cur = &c
		}
	}
	return &c
}

func (t *tx) deleteInode(in *Inode) {
	for i := range t.inodes {
		if t.inodes[i].in == in {
			t.inodes[i].deleted = true
		}
	}
	t.delta--
	if in.Attr.Type == wire.TypeLnk {
		t.del(appendLinkKey(t.kb, in.Attr.FID))
	}
}

// modify executes an operation that changes the target's state, for its client
// in this process, or, with e, for one that recovery has let through. c is told
// when the reply is complete.
func (m *MDT) modify(req *wire.Request, rep *wire.Reply, x front.Exec, e front.Execution, c target.Completer) {
	m.stats.modifies.Add(1)
	m.seq.Lock()
	// Asked under the lock: when a fence has been raised, nothing older is executed
	// after it.
	if st := m.admit(req, x); st != wire.OK {
		rep.Status, rep.LastCommitted = st, m.com.LastCommitted()
		if e != nil {
			e.Executed(recov.Result{Status: st, NotDone: st != wire.ErrProto, Mismatch: st == wire.ErrProto && x.CheckVersions})
		}
		m.seq.Unlock()
		c.Done()
		return
	}
	wait := req.Flags&wire.FlagWaitCommit != 0
	t := &m.t
	t.begin(req, rep, x, e != nil)
	rep.Status = t.run()
	if rep.Status != wire.OK {
		m.stats.errors.Add(1)
	}
	changed := rep.Transno == t.transno
	gate := t.gateAt
	if e != nil {
		res := t.result()
		if !wait {
			gate = res.Transno
		}
		wait = (e.Executed(res) || res.Held || wait) && !t.lost
	}
	queued := false
	if wait {
		// Also when the target has failed meanwhile: the gate knows what is durable
		// and turns the rest into errors.
		queued = m.com.Gate(gate, rep, c)
	} else {
		rep.LastCommitted = m.com.LastCommitted()
	}
	unlinked := t.unlink
	t.req, t.rep = nil, nil
	after := m.serveGrants()
	m.unlock()
	if !queued {
		c.Done()
	}
	for _, f := range after {
		f()
	}
	if changed && !wait {
		m.com.Lazy()
	}
	if unlinked {
		wake(m.logWake)
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// admit decides whether an operation may be executed now.
func (m *MDT) admit(req *wire.Request, x front.Exec) wire.Status {
	switch {
	case m.down.Load():
		return wire.ErrTargetDown
	case x.Transno == 0 && !m.begun:
		return wire.ErrRecovering
	case x.Transno == 0:
		return m.core.View().Admit(&req.Header)
	case m.begun || x.Transno <= m.core.LastApplied() || req.Made.Time <= 0 || req.Made.Time > math.MaxInt64/2 || !replayable(req.Op):
		return wire.ErrProto
	case m.e.Room() == store.RoomNone:
		return wire.ErrTargetDown // recovery waits for space; below that the reserve is for this
	}
	return m.core.View().AdmitClient(&req.Header)
}

// replayable tells which operations may be answered before they are durable.
func replayable(op wire.Op) bool {
	return op.IsMDT() && op.Modifies() && !isLockOp(op)
}

// run finds the operation's reply record or executes and commits it.
func (t *tx) run() wire.Status {
	m, req := t.m, t.req
	keyed := !req.Key.IsZero()
	if keyed && !t.replay() {
		rec, found := m.replies.Lookup(req.VIP, &req.Key, req.Flags)
		switch found {
		case target.Hit:
			m.stats.replays.Add(1)
			// Its client may be gone, so nobody might replay it. A second client
			// must not try to.
			t.show(rec.Transno)
			t.fid = rec.FID // for the slot: this answer may be lost, too
			m.reconstruct(req, t.rep, &outcome{Status: rec.Status, Transno: rec.Transno, FID: rec.FID, Created: rec.Created, Truncate: rec.Truncate})
			return rec.Status
		case target.PortMismatch:
			t.rep.Port = rec.Port
			return wire.ErrPortMismatch
		}
	}
	if !t.replay() {
		if r := m.e.Room(); r != store.RoomOK && !roomFor(req, r) {
			return wire.ErrNoSpc
		}
	}
	st := t.exec()
	if st == wire.OK {
		if st = t.commit(keyed); st == wire.OK {
			st = t.status
			keyed = false // recorded
		}
	}
	if t.b != nil { // not applied
		t.b.Close()
		t.b = nil
	}
	ok := st == wire.OK
	t.fill(ok)
	if t.replay() && !ok {
		t.mismatch = t.x.CheckVersions && !t.lost
		return st
	}
	if !ok && keyed && memorable(st) {
		m.replies.Put(nil, req.VIP, &req.Key, target.Record{Status: st, Transno: m.core.LastApplied(), FID: t.fid, ClientGen: req.ClientGen})
	}
	return st
}

// show notes that the answer tells of an earlier operation's effect, which has to
// be durable first.
func (t *tx) show(transno uint64) {
	t.shown, t.held = transno, true
	t.gateAt = max(t.gateAt, transno)
}

// result is what the operation's Execution is told.
func (t *tx) result() recov.Result {
	if t.lost {
		// Whether it will ever be durable is not known: the client asks the next start.
		t.rep.Status = wire.ErrTargetDown
		return recov.Result{Status: wire.ErrTargetDown, NotDone: true}
	}
	r := recov.Result{
		Status: t.rep.Status, Transno: t.rep.Transno, PreVersions: t.rep.PreVersions,
		Mismatch: t.mismatch, Held: t.held, Data: t.data,
	}
	if r.Transno == 0 {
		r.Transno = t.shown
	}
	if r.Data == nil && r.Status == wire.OK {
		r.Data = t.outcome(0)
	}
	return r
}

// memorable tells which failures a retransmission gets again. Others are about
// the server's state, not about the call.
func memorable(st wire.Status) bool {
	switch st {
	case wire.ErrIO, wire.ErrNoSpc, wire.ErrServerFault, wire.ErrJukebox:
		return false
	}
	return st < 20000
}

// roomFor tells whether an operation may still run when the disk is nearly full.
func roomFor(req *wire.Request, r store.Room) bool {
	switch req.Op {
	case wire.OpRemove, wire.OpRmdir, wire.OpTruncateDone, wire.OpCloseEpoch,
		wire.OpUnlock, wire.OpLockCancel, wire.OpLockGrantDone, wire.OpUnshare, wire.OpLockFree,
		wire.OpLockRelease, wire.OpLockUnmonitor, wire.OpLockNotified, wire.OpLockService:
		return r < store.RoomNone
	case wire.OpRename, wire.OpTouchAtime:
		return r < store.RoomCritical
	case wire.OpSetattr:
		return r < store.RoomCritical || r < store.RoomNone && req.SetAttr.Mask&wire.SetSize != 0 && req.SetAttr.Size == 0
	}
	return false
}

func (t *tx) exec() wire.Status {
	switch t.req.Op {
	case wire.OpCreate:
		return t.create()
	case wire.OpMkdir:
		return t.mkdir()
	case wire.OpSymlink:
		return t.symlink()
	case wire.OpMknod:
		return t.mknod()
	case wire.OpRemove:
		return t.remove()
	case wire.OpRmdir:
		return t.rmdir()
	case wire.OpRename:
		return t.rename()
	case wire.OpLink:
		return t.hardlink()
	case wire.OpSetattr:
		return t.setattr()
	case wire.OpTruncateDone:
		return t.truncateDone()
	case wire.OpOpenEpoch:
		return t.openEpochOp()
	case wire.OpCloseEpoch:
		return t.closeEpochs()
	case wire.OpSetLayout:
		return t.setLayout()
	case wire.OpTouchAtime:
		return t.touchAtime()
	}
	if isLockOp(t.req.Op) {
		return t.lockOp()
	}
	return wire.ErrProto
}

// preVersions gives the versions that the operation has met, in the order in
// which it has touched the inodes; 0 for new ones.
func (t *tx) preVersions() (v [4]uint64) {
	for i := range min(len(t.inodes), len(v)) {
		if old := t.inodes[i].old; old != nil {
			v[i] = old.Attr.Version
		}
	}
	return v
}

// commit assigns the transno, writes everything as one batch and shows it to
// readers. An operation that changed nothing gets no transno, a replay always has
// its own. A replay that meets other versions than the first execution fails with
// recov.VersionMismatch.
func (t *tx) commit(keyed bool) wire.Status {
	m, req := t.m, t.req
	pre := t.preVersions()
	if t.x.CheckVersions && pre != req.PreVersions {
		return recov.VersionMismatch
	}
	for i := range t.inodes {
		// Nobody can unlock what is gone.
		if s := &t.inodes[i]; s.deleted && m.locks.HasFile(s.in.Attr.FID) {
			m.locks.FileGone(t.now, s.in.Attr.FID)
			t.takeLocks()
		}
	}
	if t.b == nil && len(t.inodes) == 0 && !t.replay() {
		if keyed {
			// Repeating it must give the same answer, in memory is enough: it
			// changed nothing.
			m.replies.Put(nil, req.VIP, &req.Key, target.Record{Status: t.status, Transno: m.core.LastApplied(), FID: t.fid, ClientGen: req.ClientGen})
		}
		return wire.OK
	}
	b := t.batch()
	t.rep.PreVersions, t.rep.Time = pre, t.now
	for i := range t.inodes {
		s := &t.inodes[i]
		if s.deleted {
			if s.old != nil {
				t.del(appendInodeKey(t.kb, s.in.Attr.FID))
			}
			continue
		}
		s.in.Attr.Version = t.transno
		t.set(appendInodeKey(t.kb, s.in.Attr.FID), AppendInode(t.vb, s.in))
	}
	if keyed {
		m.replies.Put(b, req.VIP, &req.Key, target.Record{
			Status: t.status, Transno: t.transno, FID: t.fid, Created: t.rep.Created, Truncate: t.rep.Truncate, ClientGen: req.ClientGen,
		})
	}
	if t.remote {
		t.held = t.held || isLockOp(req.Op)
		t.data = t.outcome(t.now)
	}
	if t.x.KeepSlot {
		r := recov.SlotRecord{
			Client: req.Client, Gen: req.ClientGen, Slot: req.Slot, XID: req.XID,
			Transno: t.transno, Status: t.status, Data: t.data,
		}
		t.set(appendSlotKey(t.kb, req.Client, req.Slot), r.Append(t.vb))
	}
	if t.replay() && t.now < m.o.Clock()+maxSkew {
		t.raise = max(t.raise, t.now)
	}
	m.core.SkipTo(t.transno)
	m.state.Transno, m.state.Time = t.transno, max(m.state.Time, t.raise)
	m.state.Inodes += uint64(t.delta)
	t.set(append(t.kb, keyState...), appendState(t.vb, &m.state))
	t.b = nil
	if err := m.e.Apply(b); err != nil {
		t.lost = true
		t.rep.Reset()
		t.rep.XID = req.XID
		return m.broken(err)
	}
	m.core.Applied(t.transno)
	m.com.Applied(t.transno)
	t.gateAt = t.transno
	t.rep.Transno = t.transno

	for i := range t.inodes {
		s := &t.inodes[i]
		if len(m.dirty) > 0 {
			delete(m.dirty, s.in.Attr.FID)
		}
		if s.deleted {
			m.inodes.remove(s.in.Attr.FID)
		} else {
			m.inodes.put(s.in, false)
		}
	}
	for i := range t.dents {
		d := &t.dents[i]
		m.dents.put(d.dir, d.name, d.ent)
	}
	for _, p := range t.addPend {
		m.addPend(p.f, p.p)
	}
	for _, id := range t.delPend {
		m.removePend(id)
	}
	return wire.OK
}

func (m *MDT) removePend(id uint64) {
	f, ok := m.pendID[id]
	if !ok {
		return
	}
	delete(m.pendID, id)
	ps := m.pend[f]
	for i := range ps {
		if ps[i].id == id {
			ps = append(ps[:i:i], ps[i+1:]...)
			break
		}
	}
	if len(ps) == 0 {
		delete(m.pend, f)
	} else {
		m.pend[f] = ps
	}
}

// fill puts attributes into the reply: as they are now after success, as they
// were after a failure.
func (t *tx) fill(ok bool) {
	pick := func(r *report) *Inode {
		if ok && r.cur != nil {
			return r.cur
		}
		return r.old
	}
	if in := pick(&t.dir); in != nil {
		t.rep.DirAttr, t.rep.HasDir = in.Attr, true
	}
	if in := pick(&t.dir2); in != nil {
		t.rep.DirAttr2, t.rep.HasDir2 = in.Attr, true
	}
	if in := pick(&t.obj); in != nil {
		t.rep.Attr, t.rep.HasAttr = in.Attr, true
	}
	if !ok {
		t.rep.Created, t.rep.Truncate, t.rep.Count = false, wire.Truncate{}, 0
	}
}

// openDir loads the directory that an operation changes and notes its state
// before for weak cache consistency.
func (t *tx) openDir(f wire.FID, r *report, pre *wire.PreAttr) (*Inode, wire.Status) {
	in, st := t.load(f)
	if in == nil {
		return nil, st
	}
	if in.Attr.Type != wire.TypeDir {
		return nil, wire.ErrNotDir
	}
	r.old = in
	*pre = in.Attr.Pre()
	return in, wire.OK
}

// newFID gives a FID that was never used, to a replay the one that it has made.
func (t *tx) newFID() (wire.FID, wire.Status) {
	m := t.m
	if t.replay() {
		f := t.req.Made.FID
		if f.Seq < wire.FirstSeq || f.Seq >= m.startSeq || f.OID == 0 || f.Ver != 0 {
			return wire.FID{}, wire.ErrProto
		}
		switch _, st := m.inode(f, false); st {
		case wire.ErrStale:
			return f, wire.OK
		case wire.OK:
			return wire.FID{}, wire.ErrExist
		default:
			return wire.FID{}, st
		}
	}
	if m.fidOID == math.MaxUint32 {
		if st := m.nextSequence(); st != wire.OK {
			return wire.FID{}, st
		}
	}
	m.fidOID++
	return wire.FID{Seq: m.fidSeq, OID: m.fidOID}, wire.OK
}

// nextSequence takes a new FID sequence. It is durable before a FID of it is told
// to anybody, since the next start takes the one after it.
func (m *MDT) nextSequence() wire.Status {
	if m.super.NextSeq > wire.MaxSeq {
		return wire.ErrNoSpc
	}
	next := Super{NextSeq: m.super.NextSeq + 1}
	b := m.e.NewBatch()
	b.Set(keySuper, appendSuper(nil, &next))
	err := m.e.Apply(b)
	if err == nil {
		err = m.e.Sync()
	}
	if err != nil {
		return m.broken(err)
	}
	m.fidSeq, m.fidOID, m.super = m.super.NextSeq, 0, next
	return wire.OK
}

// newInode makes an object in dir for the request's credential: attributes that
// the caller may set are taken, others ignored (as Linux's server does).
func (t *tx) newInode(dir *Inode, typ wire.FileType) (*Inode, wire.Status) {
	f, st := t.newFID()
	if st != wire.OK {
		return nil, st
	}
	c, sa := &t.req.Cred, &t.req.SetAttr
	in := &Inode{Attr: wire.Attr{
		FID: f, Type: typ, Nlink: 1, UID: c.UID, GID: c.GID,
		Atime: t.now, Mtime: t.now, Ctime: t.now,
	}}
	a := &in.Attr
	if t.replay() {
		a.Generation = t.req.Made.Generation
	} else {
		a.Generation = t.m.o.Rand()
	}
	if sa.Mask&wire.SetMode != 0 {
		a.Mode = sa.Mode & 0o7777
	}
	if dir.Attr.Mode&modeSetgid != 0 {
		a.GID = dir.Attr.GID
		if typ == wire.TypeDir {
			a.Mode |= modeSetgid
		}
	}
	if sa.Mask&wire.SetUID != 0 && c.UID == 0 {
		a.UID = sa.UID
	}
	if sa.Mask&wire.SetGID != 0 && (c.UID == 0 || c.InGroup(sa.GID)) {
		a.GID = sa.GID
	}
	if typ != wire.TypeDir && a.Mode&modeSetgid != 0 && c.UID != 0 && !c.InGroup(a.GID) {
		a.Mode &^= modeSetgid
	}
	if sa.Mask&wire.SetAtime != 0 && sa.Mask&wire.SetAtimeNow == 0 {
		a.Atime = sa.Atime
	}
	if sa.Mask&wire.SetMtime != 0 && sa.Mask&wire.SetMtimeNow == 0 {
		a.Mtime = sa.Mtime
	}
	t.inodes = append(t.inodes, staged{in: in})
	t.obj.old, t.obj.cur = nil, in
	t.fid = f
	t.delta++
	return in, wire.OK
}

// Mode bits.
const (
	modeSetuid = 0o4000
	modeSetgid = 0o2000
	modeSticky = 0o1000
)

// addEntry enters an object into a directory that is being edited.
func (t *tx) addEntry(dir *Inode, name []byte, in *Inode) {
	ent := Entry{FID: in.Attr.FID, Type: in.Attr.Type, Cookie: dir.NextCookie}
	dir.NextCookie++
	dir.Entries++
	t.touchDir(dir)
	d := dir.Attr.FID
	t.set(appendNameKey(t.kb, d, name), AppendEntry(t.vb, &ent))
	t.set(appendCookieKey(t.kb, d, ent.Cookie), appendCookieRec(t.vb, ent.FID, ent.Type, name))
	t.dents = append(t.dents, stagedDent{d, name, ent})
}

// dropEntry takes a name out of a directory that is being edited; replaced
// tells that addEntry follows for the same name.
func (t *tx) dropEntry(dir *Inode, name []byte, ent Entry, replaced bool) {
	dir.Entries--
	t.touchDir(dir)
	d := dir.Attr.FID
	if !replaced {
		t.del(appendNameKey(t.kb, d, name))
		t.dents = append(t.dents, stagedDent{d, name, Entry{}})
	}
	t.del(appendCookieKey(t.kb, d, ent.Cookie))
}

// touch sets ctime alone. While an IO epoch is open mtime goes on to be as old as it
// is: an object may have a newer one, which is not lost by a change of something else.
func (in *Inode) touch(now int64) {
	a := &in.Attr
	if a.EpochOpen && a.MtimeAt == 0 {
		a.MtimeAt = a.Ctime
	}
	a.Ctime = now
}

func (t *tx) touchDir(dir *Inode) {
	dir.Attr.Mtime, dir.Attr.Ctime = t.now, t.now
	dir.Attr.Size = dirSize(dir.Entries)
	dir.Attr.Used = dir.Attr.Size
}

// unlinkInode takes one link from an object that is being edited; the last one
// deletes it and leaves the log record by which its data are destroyed.
func (t *tx) unlinkInode(in *Inode) {
	a := &in.Attr
	a.Nlink--
	in.touch(t.now)
	if a.Nlink > 0 {
		return
	}
	t.deleteInode(in)
	if a.Type != wire.TypeReg {
		return
	}
	if in.Opens > 0 {
		t.dropEpochs(in, func(wire.ClientID, bool) bool { return true })
	}
	for _, p := range t.m.pend[a.FID] {
		t.del(appendLogKey(t.kb, p.id))
		t.delPend = append(t.delPend, p.id)
	}
	if in.HadData && a.Layout.Count > 0 {
		t.putLog(&LogRec{ID: t.transno, Kind: LogUnlink, FID: a.FID, Layout: a.Layout, Client: t.req.Client, Tenure: t.tenure()})
		t.unlink = true
	}
}

func (t *tx) putLog(l *LogRec) {
	t.set(appendLogKey(t.kb, l.ID), AppendLogRec(t.vb, l))
}

// mayDelete applies the sticky bit's rule.
func mayDelete(c *wire.Cred, dir, in *Inode) bool {
	return dir.Attr.Mode&modeSticky == 0 || c.UID == 0 || c.UID == in.Attr.UID || c.UID == dir.Attr.UID
}

// layout chooses the OSTs of a new file: round robin over those that are up,
// those with less than a quarter of the best one's free space only if needed. With
// none up it is any: a file needs no object before it is written, and a writer waits
// for the OST as those of older files do. A replay's file gets the ones that it had.
func (t *tx) layout(dir *Inode) (wire.Layout, wire.Status) {
	m := t.m
	if t.replay() {
		l := t.req.Made.Layout
		if l.Count == 0 || l.Count > wire.MaxStripes || l.StripeSize == 0 {
			return wire.Layout{}, wire.ErrProto
		}
		return l, wire.OK
	}
	size, count := m.o.StripeSize, m.o.StripeCount
	if dir.DirStripeCount > 0 {
		size, count = dir.DirStripeSize, dir.DirStripeCount
	}
	osts := m.o.OSTs()
	if len(osts) == 0 {
		return wire.Layout{}, wire.ErrJukebox
	}
	var best uint64
	up := 0
	for _, o := range osts {
		if o.Up {
			best = max(best, o.Free)
			up++
		}
	}
	none := up == 0
	if none {
		up = len(osts)
	}
	l := wire.Layout{StripeSize: size, Count: min(count, uint8(min(up, wire.MaxStripes)))}
	n := 0
	start := m.nextOST
	m.nextOST = (m.nextOST + int(l.Count)) % len(osts)
	for pass := 0; pass < 2 && n < int(l.Count); pass++ {
		for i := range osts {
			o := &osts[(start+i)%len(osts)]
			if (o.Up || none) && (o.Free >= best/4) == (pass == 0) && n < int(l.Count) {
				l.OST[n] = o.Index
				n++
			}
		}
	}
	return l, wire.OK
}
