package mdt

import (
	"bytes"

	"github.com/baton-nfs/baton/recovery/wire"
)

// target of a new name: the directory, checked for search permission, and what
// is there. A name that exists is reported before missing write permission, as
// Linux does.
func (t *tx) newName(f wire.FID, name []byte, r *report, pre *wire.PreAttr) (*Inode, Entry, wire.Status) {
	dir, st := t.openDir(f, r, pre)
	if dir == nil {
		return nil, Entry{}, st
	}
	if st := checkName(name); st != wire.OK {
		return nil, Entry{}, st
	}
	if !wire.MayAccess(&dir.Attr, &t.req.Cred, wire.MayExec) {
		return nil, Entry{}, wire.ErrAcces
	}
	if isDot(name) {
		return nil, Entry{}, wire.ErrExist
	}
	ent, st := t.m.entry(f, name, false)
	if st != wire.OK {
		return nil, Entry{}, st
	}
	return dir, ent, wire.OK
}

// freshName is newName for operations that need the name to be free.
func (t *tx) freshName(f wire.FID, name []byte, r *report, pre *wire.PreAttr) (*Inode, wire.Status) {
	dir, ent, st := t.newName(f, name, r, pre)
	switch {
	case st != wire.OK:
		return nil, st
	case !ent.FID.IsZero():
		return nil, wire.ErrExist
	case !wire.MayAccess(&dir.Attr, &t.req.Cred, wire.MayWrite):
		return nil, wire.ErrAcces
	}
	return dir, wire.OK
}

func (t *tx) create() wire.Status {
	req := t.req
	if req.How > wire.Exclusive {
		return wire.ErrProto
	}
	dir, ent, st := t.newName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	if st != wire.OK {
		return st
	}
	if !ent.FID.IsZero() {
		return t.createExisting(ent)
	}
	if !wire.MayAccess(&dir.Attr, &req.Cred, wire.MayWrite) {
		return wire.ErrAcces
	}
	l, st := t.layout(dir)
	if st != wire.OK {
		return st
	}
	if req.SetAttr.Mask&wire.SetSize != 0 && req.SetAttr.Size > wire.MaxFileSize {
		return wire.ErrFBig
	}
	dir = t.edit(dir)
	in, st := t.newInode(dir, wire.TypeReg)
	if st != wire.OK {
		return st
	}
	in.Attr.Layout = l
	if req.How == wire.Exclusive {
		in.HasVerf, in.Verf = true, req.Verf
	}
	if req.Flags&wire.FlagOpenEpoch != 0 {
		if st := t.openEpoch(in); st != wire.OK {
			return st
		}
	}
	if req.SetAttr.Mask&wire.SetSize != 0 && req.SetAttr.Size > 0 {
		mtime := in.Attr.Mtime
		if st := t.truncate(in, req.SetAttr.Size); st != wire.OK {
			return st
		}
		in.Attr.Mtime = mtime
	}
	t.addEntry(dir, req.Name, in)
	t.rep.Created = true
	return wire.OK
}

// createExisting is CREATE of a name that is there (RFC 1813 section 3.3.8).
// UNCHECKED succeeds for a regular file; other types get ErrExist.
func (t *tx) createExisting(ent Entry) wire.Status {
	req := t.req
	if req.How == wire.Guarded || ent.Type != wire.TypeReg {
		return wire.ErrExist
	}
	in, st := t.loadEntry(ent)
	if in == nil {
		return st
	}
	if req.How == wire.Exclusive {
		if !in.HasVerf || in.Verf != req.Verf {
			return wire.ErrExist
		}
		t.obj.old, t.fid = in, in.Attr.FID
		t.show(in.Attr.Version)
		return wire.OK
	}
	t.obj.old, t.fid = in, in.Attr.FID
	if req.SetAttr.Mask&wire.SetSize == 0 {
		return wire.OK
	}
	if !t.mayWrite(in) {
		return wire.ErrAcces
	}
	return t.truncate(t.edit(in), req.SetAttr.Size)
}

// mayWrite checks write permission, which the owner passes with
// FlagOwnerOverride.
func (t *tx) mayWrite(in *Inode) bool {
	c := &t.req.Cred
	return wire.MayAccess(&in.Attr, c, wire.MayWrite) ||
		t.req.Flags&wire.FlagOwnerOverride != 0 && c.UID == in.Attr.UID
}

func (t *tx) mkdir() wire.Status {
	req := t.req
	dir, st := t.freshName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	if st != wire.OK {
		return st
	}
	dir = t.edit(dir)
	in, st := t.newInode(dir, wire.TypeDir)
	if st != wire.OK {
		return st
	}
	in.Attr.Nlink, in.Attr.Parent, in.NextCookie = 2, req.FID, FirstCookie
	in.Attr.Size, in.Attr.Used = dirSize(0), dirSize(0)
	in.DirStripeSize, in.DirStripeCount = dir.DirStripeSize, dir.DirStripeCount
	dir.Attr.Nlink++
	t.addEntry(dir, req.Name, in)
	return wire.OK
}

func (t *tx) symlink() wire.Status {
	req := t.req
	dir, st := t.freshName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	switch {
	case st != wire.OK:
		return st
	case len(req.Data) == 0:
		return wire.ErrNoEnt // as Linux
	case len(req.Data) > wire.MaxSymlinkLen:
		return wire.ErrNameTooLong
	case bytes.IndexByte(req.Data, 0) >= 0:
		return wire.ErrInval
	}
	dir = t.edit(dir)
	in, st := t.newInode(dir, wire.TypeLnk)
	if st != wire.OK {
		return st
	}
	in.Attr.Mode = 0o777
	in.Attr.Size = uint64(len(req.Data))
	if len(req.Data) <= maxCachedLink {
		in.link = bytes.Clone(req.Data)
	}
	t.batch().Set(appendLinkKey(t.kb, in.Attr.FID), req.Data)
	t.addEntry(dir, req.Name, in)
	return wire.OK
}

func (t *tx) mknod() wire.Status {
	req := t.req
	switch req.Type {
	case wire.TypeChr, wire.TypeBlk, wire.TypeSock, wire.TypeFifo:
	default:
		return wire.ErrBadType
	}
	dir, st := t.freshName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	if st != wire.OK {
		return st
	}
	dev := req.Type == wire.TypeChr || req.Type == wire.TypeBlk
	if dev && req.Cred.UID != 0 {
		return wire.ErrPerm
	}
	dir = t.edit(dir)
	in, st := t.newInode(dir, req.Type)
	if st != wire.OK {
		return st
	}
	if dev {
		in.Attr.RdevMajor, in.Attr.RdevMinor = req.RdevMajor, req.RdevMinor
	}
	t.addEntry(dir, req.Name, in)
	return wire.OK
}

// hardlink enters FID into the directory FID2 as Name2.
func (t *tx) hardlink() wire.Status {
	req := t.req
	in, st := t.load(req.FID)
	if in == nil {
		return st
	}
	t.obj.old, t.fid = in, req.FID
	dir, ent, st := t.newName(req.FID2, req.Name2, &t.dir2, &t.rep.DirPre2)
	switch {
	case st != wire.OK:
		return st
	case in.Attr.Type == wire.TypeDir:
		return wire.ErrIsDir // as Linux's server
	case !ent.FID.IsZero():
		return wire.ErrExist
	case !wire.MayAccess(&dir.Attr, &req.Cred, wire.MayWrite):
		return wire.ErrAcces
	case in.Attr.Nlink >= wire.MaxLinks:
		return wire.ErrMLink
	}
	in, dir = t.edit(in), t.edit(dir)
	in.Attr.Nlink++
	in.touch(t.now)
	t.addEntry(dir, req.Name2, in)
	return wire.OK
}

// oldName finds an entry that is to be taken away.
func (t *tx) oldName(f wire.FID, name []byte, r *report, pre *wire.PreAttr) (dir, in *Inode, ent Entry, st wire.Status) {
	if dir, st = t.openDir(f, r, pre); dir == nil {
		return nil, nil, ent, st
	}
	if st = checkName(name); st != wire.OK {
		return nil, nil, ent, st
	}
	if !wire.MayAccess(&dir.Attr, &t.req.Cred, wire.MayWrite|wire.MayExec) {
		return nil, nil, ent, wire.ErrAcces
	}
	if ent, st = t.m.entry(f, name, false); st != wire.OK {
		return nil, nil, ent, st
	}
	if ent.FID.IsZero() {
		return nil, nil, ent, wire.ErrNoEnt
	}
	if in, st = t.loadEntry(ent); in == nil {
		return nil, nil, ent, st
	}
	if !mayDelete(&t.req.Cred, dir, in) {
		return nil, nil, ent, wire.ErrPerm
	}
	return dir, in, ent, wire.OK
}

func (t *tx) remove() wire.Status {
	req := t.req
	if isDot(req.Name) {
		return wire.ErrIsDir
	}
	dir, in, ent, st := t.oldName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	if st != wire.OK {
		return st
	}
	if in.Attr.Type == wire.TypeDir {
		return wire.ErrIsDir
	}
	dir, in = t.edit(dir), t.edit(in)
	t.dropEntry(dir, req.Name, ent, false)
	t.unlinkInode(in)
	return wire.OK
}

func (t *tx) rmdir() wire.Status {
	req := t.req
	switch string(req.Name) {
	case ".":
		return wire.ErrInval // RFC 1813 section 3.3.13
	case "..":
		return wire.ErrExist
	}
	dir, in, ent, st := t.oldName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	switch {
	case st != wire.OK:
		return st
	case in.Attr.Type != wire.TypeDir:
		return wire.ErrNotDir
	case in.Entries > 0:
		return wire.ErrNotEmpty
	}
	dir, in = t.edit(dir), t.edit(in)
	dir.Attr.Nlink--
	t.dropEntry(dir, req.Name, ent, false)
	t.deleteInode(in)
	return wire.OK
}

// maxDepth bounds the walk to the root, against loops in a damaged store.
const maxDepth = 1 << 20

// below tells whether directory f is dir or below it.
func (t *tx) below(f, dir wire.FID) (bool, wire.Status) {
	for range maxDepth {
		if f == dir {
			return true, wire.OK
		}
		if f == wire.RootFID {
			return false, wire.OK
		}
		in, st := t.load(f)
		if in == nil {
			if st == wire.ErrStale {
				st = t.m.damaged("parent directory", f, errRecord)
			}
			return false, st
		}
		f = in.Attr.Parent
	}
	return false, t.m.damaged("directory loop", f, errRecord)
}

func (t *tx) rename() wire.Status {
	req := t.req
	c := &req.Cred
	if isDot(req.Name) || isDot(req.Name2) {
		return wire.ErrInval
	}
	to, st := t.openDir(req.FID2, &t.dir2, &t.rep.DirPre2)
	if to == nil {
		return st
	}
	from, src, sent, st := t.oldName(req.FID, req.Name, &t.dir, &t.rep.DirPre)
	if st != wire.OK {
		return st
	}
	if st := checkName(req.Name2); st != wire.OK {
		return st
	}
	if !wire.MayAccess(&to.Attr, c, wire.MayWrite|wire.MayExec) {
		return wire.ErrAcces
	}
	dent, st := t.m.entry(req.FID2, req.Name2, false)
	if st != wire.OK {
		return st
	}
	if dent.FID == src.Attr.FID {
		return wire.OK // two names of one object: POSIX wants nothing done
	}
	isDir := src.Attr.Type == wire.TypeDir
	moved := req.FID != req.FID2
	if isDir && moved {
		in, st := t.below(req.FID2, src.Attr.FID)
		if st != wire.OK {
			return st
		}
		if in {
			return wire.ErrInval
		}
		// Its ".." changes.
		if !wire.MayAccess(&src.Attr, c, wire.MayWrite) {
			return wire.ErrAcces
		}
	}
	var dst *Inode
	if !dent.FID.IsZero() {
		if dst, st = t.loadEntry(dent); dst == nil {
			return st
		}
		dstDir := dst.Attr.Type == wire.TypeDir
		switch {
		case !mayDelete(c, to, dst):
			return wire.ErrPerm
		case isDir && !dstDir:
			return wire.ErrNotDir
		case !isDir && dstDir:
			return wire.ErrIsDir
		case dstDir && dst.Entries > 0:
			return wire.ErrNotEmpty
		}
	}
	from, to = t.edit(from), t.edit(to)
	if t.dir2.cur == nil { // one directory, reported twice
		t.dir2.cur = to
	}
	src = t.edit(src)
	if dst != nil {
		dst = t.edit(dst)
	}
	t.dropEntry(from, req.Name, sent, false)
	if dst != nil {
		t.dropEntry(to, req.Name2, dent, true)
		if dst.Attr.Type == wire.TypeDir {
			to.Attr.Nlink--
			t.deleteInode(dst)
		} else {
			t.unlinkInode(dst)
		}
	}
	src.touch(t.now)
	if isDir && moved {
		src.Attr.Parent = req.FID2
		from.Attr.Nlink--
		to.Attr.Nlink++
	}
	t.addEntry(to, req.Name2, src)
	return wire.OK
}
