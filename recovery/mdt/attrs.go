package mdt

import (
	"errors"
	"math"
	"time"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

const settable = wire.SetMode | wire.SetUID | wire.SetGID | wire.SetSize |
	wire.SetAtime | wire.SetMtime | wire.SetAtimeNow | wire.SetMtimeNow

func (t *tx) setattr() wire.Status {
	req := t.req
	in, st := t.load(req.FID)
	if in == nil {
		return st
	}
	t.obj.old, t.fid = in, req.FID
	t.rep.Pre = in.Attr.Pre()
	if req.Guard && req.GuardCtime != in.Attr.Ctime {
		return wire.ErrNotSync
	}
	sa := req.SetAttr
	if sa.Mask&^settable != 0 {
		return wire.ErrProto
	}
	if sa.Mask == 0 {
		return wire.OK
	}
	if st := t.maySet(in, &sa); st != wire.OK {
		return st
	}
	in = t.edit(in)
	in.HasVerf = false // the exclusive create is complete
	a := &in.Attr
	if sa.Mask&wire.SetSize != 0 {
		if st := t.truncate(in, sa.Size); st != wire.OK {
			return st
		}
	}
	t.setOwner(in, &sa)
	switch {
	case sa.Mask&wire.SetAtimeNow != 0:
		a.Atime = t.now
	case sa.Mask&wire.SetAtime != 0:
		a.Atime = sa.Atime
	}
	switch {
	case sa.Mask&wire.SetMtimeNow != 0:
		a.Mtime = t.now
	case sa.Mask&wire.SetMtime != 0:
		a.Mtime = sa.Mtime
	}
	if sa.Mask&(wire.SetMtimeNow|wire.SetMtime|wire.SetSize) != 0 {
		a.Ctime, a.MtimeAt = t.now, 0
	} else {
		in.touch(t.now)
	}
	return wire.OK
}

// maySet checks ownership and permissions for a SETATTR, as Linux's
// setattr_prepare and its NFS server do.
func (t *tx) maySet(in *Inode, sa *wire.SetAttr) wire.Status {
	c, a := &t.req.Cred, &in.Attr
	if sa.Mask&wire.SetSize != 0 {
		switch {
		case a.Type == wire.TypeDir:
			return wire.ErrIsDir
		case a.Type != wire.TypeReg:
			return wire.ErrInval
		case sa.Size > wire.MaxFileSize:
			return wire.ErrFBig
		case !t.mayWrite(in):
			return wire.ErrAcces
		}
	}
	if c.UID == 0 {
		return wire.OK
	}
	owner := c.UID == a.UID
	if sa.Mask&wire.SetUID != 0 && (!owner || sa.UID != a.UID) {
		return wire.ErrPerm
	}
	if sa.Mask&wire.SetGID != 0 && (!owner || sa.GID != a.GID && !c.InGroup(sa.GID)) {
		return wire.ErrPerm
	}
	if sa.Mask&wire.SetMode != 0 && !owner {
		return wire.ErrPerm
	}
	explicit := sa.Mask&wire.SetAtime != 0 && sa.Mask&wire.SetAtimeNow == 0 ||
		sa.Mask&wire.SetMtime != 0 && sa.Mask&wire.SetMtimeNow == 0
	if explicit && !owner {
		return wire.ErrPerm
	}
	if sa.Mask&(wire.SetAtimeNow|wire.SetMtimeNow) != 0 && !owner && !wire.MayAccess(a, c, wire.MayWrite) {
		return wire.ErrAcces
	}
	return wire.OK
}

// setOwner applies mode, uid and gid. A change of owner or group takes the
// setuid bit from everything but directories, and the setgid bit if the group
// may execute; for root too, as in Linux.
func (t *tx) setOwner(in *Inode, sa *wire.SetAttr) {
	c, a := &t.req.Cred, &in.Attr
	if sa.Mask&wire.SetUID != 0 {
		a.UID = sa.UID
	}
	if sa.Mask&wire.SetGID != 0 {
		a.GID = sa.GID
	}
	if sa.Mask&wire.SetMode != 0 {
		a.Mode = sa.Mode & 0o7777
		if a.Mode&modeSetgid != 0 && c.UID != 0 && !c.InGroup(a.GID) {
			a.Mode &^= modeSetgid
		}
	}
	if sa.Mask&(wire.SetUID|wire.SetGID) != 0 && a.Type != wire.TypeDir {
		a.Mode = dropPrivileges(a.Mode)
	}
}

func dropPrivileges(mode uint32) uint32 {
	mode &^= modeSetuid
	if mode&0o010 != 0 {
		mode &^= modeSetgid
	}
	return mode
}

// truncate sets the size of a regular file that is being edited. Unless the
// file has no data that could be in the way, it leaves a log record and opens
// an IO epoch: until the objects are cut, they and not the MDT know the size.
func (t *tx) truncate(in *Inode, size uint64) wire.Status {
	a := &in.Attr
	if size > wire.MaxFileSize {
		return wire.ErrFBig
	}
	old := a.Size
	a.Size, a.Mtime, a.Ctime, a.MtimeAt = size, t.now, t.now, 0
	if t.req.Cred.UID != 0 {
		a.Mode = dropPrivileges(a.Mode)
	}
	if size == 0 && !in.HadData || size == old && in.Opens == 0 {
		return wire.OK
	}
	a.Used = min(a.Used, (size+4095)&^4095)
	if st := t.openEpoch(in); st != wire.OK {
		return st
	}
	in.SizeVersion = t.transno
	// A pending cut to the same or a larger size is covered by this one. A
	// smaller one is not: what lay behind it must read as zeros.
	for _, p := range t.m.pend[a.FID] {
		if p.size >= size {
			t.del(appendLogKey(t.kb, p.id))
			t.delPend = append(t.delPend, p.id)
		}
	}
	t.putLog(&LogRec{ID: t.transno, Kind: LogTruncate, FID: a.FID, Layout: a.Layout, Size: size, Client: t.req.Client, Tenure: t.tenure()})
	t.addPend = append(t.addPend, pendAdd{a.FID, pendTrunc{t.transno, size}})
	t.rep.Truncate = wire.Truncate{LogID: t.transno, Size: size}
	return wire.OK
}

// maxBatchItems bounds the lists in requests.
const maxBatchItems = 4096

// truncateDone removes truncate records whose punches are done.
func (t *tx) truncateDone() wire.Status {
	if len(t.req.LogIDs) > maxBatchItems {
		return wire.ErrProto
	}
	for _, id := range t.req.LogIDs {
		if _, ok := t.m.pendID[id]; !ok {
			continue // superseded and gone already
		}
		t.del(appendLogKey(t.kb, id))
		t.delPend = append(t.delPend, id)
	}
	return wire.OK
}

// hasEpoch tells whether client has an IO epoch of in open, and whether that is
// of its present entry in the client table: one from before an eviction says
// nothing of what it may write now.
func (t *tx) hasEpoch(in *Inode, client wire.ClientID) (has, current bool, st wire.Status) {
	if in.Opens == 0 || in.Opens == 1 && in.Opener != client {
		return false, false, wire.OK
	}
	if in.Opens == 1 && !t.m.staleEpochs || in.SizeVersion == t.transno {
		return true, true, wire.OK // perhaps opened by this very operation
	}
	var kb [33]byte
	v, err := t.m.e.Get(appendEpochKey(kb[:0], in.Attr.FID, client), nil)
	if errors.Is(err, store.ErrNotFound) {
		return false, false, wire.OK
	}
	var r EpochRec
	if err == nil {
		r, err = DecodeEpoch(v)
	}
	if err != nil {
		return false, false, t.m.damaged("epoch", in.Attr.FID, err)
	}
	return true, t.m.current(client, r.Tenure), wire.OK
}

// openEpoch opens the client's IO epoch of a file that is being edited.
func (t *tx) openEpoch(in *Inode) wire.Status {
	has, current, st := t.hasEpoch(in, t.req.Client)
	if st != wire.OK || has && current {
		return st
	}
	if !has {
		in.Opens++
		in.Opener = wire.ClientID{}
		if in.Opens == 1 {
			in.Opener = t.req.Client
		}
	}
	in.Attr.EpochOpen, in.HadData, in.SizeVersion = true, true, t.transno
	in.Attr.EpochShared = in.Opens > 1
	t.set(appendEpochKey(t.kb, in.Attr.FID, t.req.Client), AppendEpoch(t.vb, EpochRec{t.transno, t.tenure()}))
	return wire.OK
}

func (t *tx) openEpochOp() wire.Status {
	in, st := t.load(t.req.FID)
	if in == nil {
		return st
	}
	t.obj.old, t.fid = in, t.req.FID
	if in.Attr.Type != wire.TypeReg {
		return wire.ErrInval
	}
	_, current, st := t.hasEpoch(in, t.req.Client)
	if st != wire.OK {
		return st
	}
	if current {
		// Only this open, not everything since, must be durable.
		t.gateAt = in.Attr.Version
		return wire.OK
	}
	return t.openEpoch(t.edit(in))
}

// tenure is that of the request's client.
func (t *tx) tenure() uint64 {
	if e := t.m.clients[t.req.Client]; e != nil {
		return e.Tenure
	}
	return 0
}

// dropEpochs closes the epochs of a file that is being edited that which selects
// by client and whether they are of its present entry in the client table.
func (t *tx) dropEpochs(in *Inode, which func(c wire.ClientID, current bool) bool) {
	if in.Opens == 1 && !t.m.staleEpochs {
		if which(in.Opener, true) {
			t.del(appendEpochKey(t.kb, in.Attr.FID, in.Opener))
			in.Opens, in.Opener = 0, wire.ClientID{}
		}
	} else if in.Opens > 0 {
		var left []wire.ClientID
		err := iteratePrefix(t.m.e, in.Attr.FID.Append([]byte{prefixEpoch}), func(k, v []byte) error {
			if len(k) != 33 {
				return nil
			}
			id := wire.ClientID(k[17:33])
			r, err := DecodeEpoch(v)
			if which(id, err == nil && t.m.current(id, r.Tenure)) {
				t.del(appendEpochKey(t.kb, in.Attr.FID, id))
			} else {
				left = append(left, id)
			}
			return nil
		})
		if err != nil {
			// Then they stay; a size that is asked for too often is no harm.
			t.m.damaged("epochs", in.Attr.FID, err)
			return
		}
		in.Opens, in.Opener = uint16(min(len(left), 0xffff)), wire.ClientID{}
		if len(left) == 1 {
			in.Opener = left[0]
		}
	}
	in.Attr.EpochOpen, in.Attr.EpochShared = in.Opens > 0, in.Opens > 1
}

// closeEpochs takes over the sizes of files whose data are durable. Files that
// are gone, sizes collected before a newer truncate or open, and files with
// truncates that the OSTs have yet to do, are skipped;
// Reply.Count tells how many were taken.
//
// What a replay could not decide in the same way is answered when it is durable:
// that a file was skipped, more files than the reply has versions for, and the
// epochs of clients that are gone.
func (t *tx) closeEpochs() wire.Status {
	if len(t.req.Epochs) > maxBatchItems {
		return wire.ErrProto
	}
	for i := range t.req.Epochs {
		e := &t.req.Epochs[i]
		in, st := t.load(e.FID)
		if in == nil {
			if st == wire.ErrStale {
				continue
			}
			return st
		}
		if in.Attr.Type != wire.TypeReg || in.Opens == 0 || e.Size > wire.MaxFileSize ||
			e.Seen != 0 && e.Seen < in.SizeVersion || len(t.m.pend[e.FID]) > 0 {
			continue
		}
		in = t.edit(in)
		t.dropEpochs(in, func(c wire.ClientID, current bool) bool {
			if current {
				return c == t.req.Client
			}
			// Nobody else can close the epoch of a client that was evicted, nor that
			// client itself. But until all OSTs refuse what it wrote with it, they decide
			// the size.
			gone := t.m.fences[c] == nil && !t.replay()
			t.held = t.held || gone
			return gone
		})
		a := &in.Attr
		a.Size, a.Used = e.Size, e.Used
		if e.Ctime < math.MaxInt64/2 {
			a.Merge(e.Mtime, e.Ctime)
			// Later changes here must have a later ctime, within reason.
			if e.Ctime == a.Ctime && e.Ctime < t.now+maxSkew {
				t.raise = max(t.raise, e.Ctime)
			}
		}
		if !a.EpochOpen {
			a.MtimeAt = 0
		}
		t.rep.Count++
	}
	if n := len(t.req.Epochs); n != int(t.rep.Count) || n > len(t.rep.PreVersions) {
		if t.replay() {
			return recov.VersionMismatch
		}
		t.held = t.rep.Count > 0
	}
	return wire.OK
}

func (t *tx) setLayout() wire.Status {
	req := t.req
	in, st := t.load(req.FID)
	if in == nil {
		return st
	}
	t.obj.old, t.fid = in, req.FID
	l := &req.Layout
	switch {
	case in.Attr.Type != wire.TypeDir:
		return wire.ErrNotDir
	case req.Cred.UID != 0 && req.Cred.UID != in.Attr.UID:
		return wire.ErrPerm
	case l.Count > wire.MaxStripes || l.Count > 0 && (l.StripeSize == 0 || l.StripeSize%(64<<10) != 0):
		return wire.ErrInval
	}
	in = t.edit(in)
	in.DirStripeSize, in.DirStripeCount = l.StripeSize, l.Count
	if l.Count == 0 {
		in.DirStripeSize = 0
	}
	in.Attr.Ctime = t.now
	return wire.OK
}

// maxSkew is how far a timestamp of an OST may push the MDT's ahead.
const maxSkew = int64(time.Minute)

// maxDirtyAtimes bounds the inodes that wait with a new access time.
const maxDirtyAtimes = 4096

// touchAtime notes an access time in the cache; it is written with the next
// change of the object, when many have gathered, or at Close.
func (t *tx) touchAtime() wire.Status {
	m := t.m
	in, st := m.inode(t.req.FID, false)
	if in == nil {
		return st
	}
	if t.req.SetAttr.Atime <= in.Attr.Atime {
		return wire.OK
	}
	c := *in
	c.Attr.Atime = t.req.SetAttr.Atime
	m.inodes.put(&c, true)
	m.dirty[c.Attr.FID] = struct{}{}
	if len(m.dirty) >= maxDirtyAtimes {
		m.flushAtimes()
	}
	return wire.OK
}

// flushAtimes writes access times that are only in the cache. They are no
// change that has a version, so they need no transno.
func (m *MDT) flushAtimes() {
	b := m.e.NewBatch()
	for f := range m.dirty {
		if in := m.inodes.get(f); in != nil {
			b.Set(appendInodeKey(nil, f), AppendInode(nil, in))
			m.inodes.put(in, false)
		}
	}
	clear(m.dirty)
	if err := m.e.Apply(b); err != nil {
		m.broken(err)
	}
}
