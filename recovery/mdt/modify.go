package mdt

import (
	"math"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/wire"
)

// tx is one modifying operation under the sequencer's lock. Nothing of it is
// visible before commit; an operation that fails just drops it.
type tx struct {
	m       *MDT
	req     *wire.Request
	rep     *wire.Reply
	b       store.Batch
	now     int64
	transno uint64 // the number that commit will assign

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
	view    bool // the client table or VIP epochs changed
	gateAt  uint64
	// outcome is the status of an operation that was committed and still has
	// another one than OK (lock operations).
	outcome wire.Status
	kb, vb  []byte
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

func (t *tx) begin(req *wire.Request, rep *wire.Reply) {
	t.req, t.rep, t.b = req, rep, nil
	t.now = t.m.tick()
	t.transno = t.m.core.NextTransno()
	clear(t.inodes)
	clear(t.dents)
	t.inodes, t.dents = t.inodes[:0], t.dents[:0]
	t.dir, t.dir2, t.obj = report{}, report{}, report{}
	t.fid, t.delta, t.unlink, t.view = wire.FID{}, 0, false, false
	t.addPend, t.delPend = t.addPend[:0], t.delPend[:0]
	t.gateAt = t.m.core.LastApplied()
	t.outcome = wire.OK
}

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

// modify executes an operation that changes the target's state.
func (m *MDT) modify(req *wire.Request, rep *wire.Reply, done func()) {
	m.stats.modifies.Add(1)
	m.seq.Lock()
	if m.down.Load() {
		m.seq.Unlock()
		rep.Status = wire.ErrTargetDown
		done()
		return
	}
	// Asked again under the lock: when a fence has been raised, nothing older
	// is executed after it.
	if st := m.core.View().Admit(&req.Header); st != wire.OK {
		m.seq.Unlock()
		rep.Status, rep.LastCommitted = st, m.com.LastCommitted()
		done()
		return
	}
	wait := req.Flags&wire.FlagWaitCommit != 0
	switch req.Op {
	case wire.OpConnect, wire.OpDisconnect, wire.OpSetVIPEpoch:
		wait = true // fences are worth nothing before they are durable
	}
	t := &m.t
	t.begin(req, rep)
	applied := m.core.LastApplied()
	rep.Status = t.run()
	if rep.Status != wire.OK {
		m.stats.errors.Add(1)
	}
	changed := m.core.LastApplied() != applied
	queued := false
	if wait {
		// Also when the target has failed meanwhile: the gate knows what is durable
		// and turns the rest into errors.
		queued = m.com.Gate(t.gateAt, rep, done)
	} else {
		rep.LastCommitted = m.com.LastCommitted()
	}
	unlinked := t.unlink
	t.req, t.rep = nil, nil
	after := m.serveGrants()
	m.seq.Unlock()
	if !queued {
		done()
	}
	for _, f := range after {
		f()
	}
	if changed && !wait {
		m.com.Lazy()
	}
	if unlinked {
		select {
		case m.logWake <- struct{}{}:
		default:
		}
	}
}

// run finds the operation's reply record or executes and commits it.
func (t *tx) run() wire.Status {
	m, req := t.m, t.req
	keyed := !req.Key.IsZero()
	if keyed {
		rec, found := m.replies.Lookup(req.VIP, &req.Key, req.Flags)
		switch found {
		case target.Hit:
			m.stats.replays.Add(1)
			return t.reconstruct(&rec)
		case target.PortMismatch:
			t.rep.Port = rec.Port
			return wire.ErrPortMismatch
		}
	}
	if r := m.e.Room(); r != store.RoomOK && !roomFor(req, r) {
		return wire.ErrNoSpc
	}
	st := t.exec()
	if st == wire.OK {
		if st = t.commit(keyed); st == wire.OK {
			st = t.outcome
			keyed = false // recorded
		}
	} else if t.b != nil {
		t.b.Close()
		t.b = nil
	}
	ok := st == wire.OK
	t.fill(ok)
	if !ok && keyed && memorable(st) {
		m.replies.Put(nil, req.VIP, &req.Key, target.Record{Status: st, Transno: m.core.LastApplied(), FID: t.fid, ClientGen: req.ClientGen})
	}
	return st
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
		wire.OpConnect, wire.OpDisconnect, wire.OpSetVIPEpoch,
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
		return t.logDone(t.req.LogIDs)
	case wire.OpOpenEpoch:
		return t.openEpochOp()
	case wire.OpCloseEpoch:
		return t.closeEpochs()
	case wire.OpSetLayout:
		return t.setLayout()
	case wire.OpTouchAtime:
		return t.touchAtime()
	case wire.OpConnect:
		return t.connect()
	case wire.OpDisconnect:
		return t.disconnect()
	case wire.OpSetVIPEpoch:
		return t.setVIPEpoch()
	}
	if isLockOp(t.req.Op) {
		return t.lockOp()
	}
	return wire.ErrProto
}

// commit assigns the transno, writes everything as one batch and shows it to
// readers. An operation that changed nothing gets no transno.
func (t *tx) commit(keyed bool) wire.Status {
	m, req := t.m, t.req
	for i := range t.inodes {
		// Nobody can unlock what is gone.
		if s := &t.inodes[i]; s.deleted && m.locks.HasFile(s.in.Attr.FID) {
			m.locks.FileGone(t.now, s.in.Attr.FID)
			t.takeLocks()
		}
	}
	if t.b == nil && len(t.inodes) == 0 {
		if keyed {
			// Repeating it must give the same answer, in memory is enough: it
			// changed nothing.
			m.replies.Put(nil, req.VIP, &req.Key, target.Record{Status: t.outcome, Transno: m.core.LastApplied(), FID: t.fid, ClientGen: req.ClientGen})
		}
		return wire.OK
	}
	b := t.batch()
	for i := range t.inodes {
		s := &t.inodes[i]
		if s.old != nil && i < len(t.rep.PreVersions) {
			t.rep.PreVersions[i] = s.old.Attr.Version
		}
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
			Status: t.outcome, Transno: t.transno, FID: t.fid, Created: t.rep.Created, Truncate: t.rep.Truncate, ClientGen: req.ClientGen,
		})
	}
	m.core.AssignTransno()
	m.state.Transno = t.transno
	m.state.Inodes += uint64(t.delta)
	t.set(append(t.kb, keyState...), appendState(t.vb, &m.state))
	if m.superDirty {
		// A new FID sequence is taken with the first commit after it was chosen.
		t.set(append(t.kb, keySuper...), appendSuper(t.vb, &m.super))
		m.superDirty = false
	}
	t.b = nil
	if err := m.e.Apply(b); err != nil {
		m.down.Store(true)
		m.com.Fail(err)
		t.rep.Reset()
		t.rep.XID = req.XID
		return wire.ErrIO
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
	if t.view {
		m.view.Store(m.core.View())
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
		t.rep.Created, t.rep.Truncate = false, wire.Truncate{}
	}
}

// reconstruct answers a repeated call from its record. Attributes are today's.
func (t *tx) reconstruct(rec *target.Record) wire.Status {
	m, req, rep := t.m, t.req, t.rep
	rep.Reconstructed = true
	rep.Transno, rep.Created = rec.Transno, rec.Created
	t.gateAt = max(t.gateAt, rec.Transno)
	if _, ok := m.pendID[rec.Truncate.LogID]; ok {
		rep.Truncate = rec.Truncate
	}
	if !rec.FID.IsZero() {
		if in, _ := m.inode(rec.FID, false); in != nil {
			rep.Attr, rep.HasAttr = in.Attr, true
		}
	}
	if req.Op != wire.OpSetattr && req.Op != wire.OpLink {
		if in, _ := m.inode(req.FID, false); in != nil && in.Attr.Type == wire.TypeDir {
			rep.DirAttr, rep.HasDir = in.Attr, true
		}
	}
	if req.Op == wire.OpRename || req.Op == wire.OpLink {
		if in, _ := m.inode(req.FID2, false); in != nil && in.Attr.Type == wire.TypeDir {
			rep.DirAttr2, rep.HasDir2 = in.Attr, true
		}
	}
	return rec.Status
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

// newFID gives a FID that was never used.
func (t *tx) newFID() (wire.FID, wire.Status) {
	m := t.m
	if m.fidOID == math.MaxUint32 {
		if m.super.NextSeq > wire.MaxSeq {
			return wire.FID{}, wire.ErrNoSpc
		}
		m.fidSeq, m.fidOID = m.super.NextSeq, 0
		m.super.NextSeq++
		m.superDirty = true
	}
	m.fidOID++
	return wire.FID{Seq: m.fidSeq, OID: m.fidOID}, wire.OK
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
		Atime: t.now, Mtime: t.now, Ctime: t.now, Generation: t.m.o.Rand(),
	}}
	a := &in.Attr
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

func (t *tx) touchDir(dir *Inode) {
	dir.Attr.Mtime, dir.Attr.Ctime = t.now, t.now
	dir.Attr.Size = dirSize(dir.Entries)
	dir.Attr.Used = dir.Attr.Size
}

// unlinkInode takes one link from an object; the last one deletes it and leaves
// the log record by which its data are destroyed.
func (t *tx) unlinkInode(in *Inode) {
	in = t.edit(in)
	a := &in.Attr
	a.Nlink--
	a.Ctime = t.now
	if a.Nlink > 0 {
		return
	}
	t.deleteInode(in)
	if a.Type != wire.TypeReg {
		return
	}
	if in.Opens > 0 {
		t.dropEpochs(in, func(wire.ClientID) bool { return true })
	}
	for _, p := range t.m.pend[a.FID] {
		t.del(appendLogKey(t.kb, p.id))
		t.delPend = append(t.delPend, p.id)
	}
	if in.HadData && a.Layout.Count > 0 {
		t.putLog(&LogRec{ID: t.transno, Kind: LogUnlink, FID: a.FID, Layout: a.Layout})
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
// those with less than a quarter of the best one's free space only if needed.
func (t *tx) layout(dir *Inode) (wire.Layout, wire.Status) {
	m := t.m
	size, count := m.o.StripeSize, m.o.StripeCount
	if dir.DirStripeCount > 0 {
		size, count = dir.DirStripeSize, dir.DirStripeCount
	}
	osts := m.o.OSTs()
	var best uint64
	up := 0
	for _, o := range osts {
		if o.Up {
			best = max(best, o.Free)
			up++
		}
	}
	if up == 0 {
		return wire.Layout{}, wire.ErrJukebox
	}
	l := wire.Layout{StripeSize: size, Count: min(count, uint8(min(up, wire.MaxStripes)))}
	n := 0
	start := m.nextOST
	m.nextOST = (m.nextOST + int(l.Count)) % len(osts)
	for pass := 0; pass < 2 && n < int(l.Count); pass++ {
		for i := range osts {
			o := &osts[(start+i)%len(osts)]
			if o.Up && (o.Free >= best/4) == (pass == 0) && n < int(l.Count) {
				l.OST[n] = o.Index
				n++
			}
		}
	}
	return l, wire.OK
}
