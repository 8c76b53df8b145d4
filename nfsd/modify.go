package nfsd

import (
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The procedures that change something. They always run on a worker, and those
// that only wait for the MDT's commit give the worker back meanwhile.

func (o *op) write(bool) bool {
	var a nfs3.WriteArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.openAttr(a.FH, true)
	if st != wire.OK {
		return o.fail(st)
	}
	switch {
	case o.dec.ReadOnly:
		st = wire.ErrROFS
	case o.attr.Type == wire.TypeDir:
		st = wire.ErrIsDir
	case o.attr.Type != wire.TypeReg:
		st = wire.ErrInval
	// The owner may always write: the file may have been open before its mode changed.
	case o.cred.UID != o.attr.UID && !wire.MayAccess(&o.attr, &o.cred, wire.MayWrite):
		st = wire.ErrAcces
	default:
		st = a.Check()
	}
	var pre wire.PreAttr
	if st == wire.OK {
		st = o.dropPrivileges()
	}
	// The verifier from before: if the data are lost while the reply is on its
	// way, the one that tells of it must not come with these data.
	var verf [8]byte
	o.a.putVerifier(&verf)
	if st == wire.OK {
		pre, st = o.a.srv.fs.Write(o.ctx, o.owner(), &o.attr, a.Offset, a.Data, a.Stable)
	}
	if st != wire.OK {
		if o.dropped(st) {
			return true
		}
		nfs3.PutWccResult(&o.c.Out, nfs3.Status(o.proc, st), wire.PreAttr{}, &o.attr, o.h.FSID)
		o.finish()
		return true
	}
	nfs3.PutWriteOK(&o.c.Out, pre, &o.attr, o.h.FSID, a.Count, a.Stable, &verf)
	o.finish()
	return true
}

// dropPrivileges clears the setuid and setgid bits of a file that somebody other
// than root is about to change, as local file systems do, durably and before the
// first byte. The setgid bit of a file that its group may not execute means
// something else and stays.
func (o *op) dropPrivileges() wire.Status {
	drop := o.attr.Mode & 0o4000
	if o.attr.Mode&0o2010 == 0o2010 {
		drop |= 0o2000
	}
	if drop == 0 || o.cred.UID == 0 {
		return wire.OK
	}
	q := o.newReq(wire.OpSetattr)
	q.Cred = wire.Cred{}
	q.Flags = wire.FlagWaitCommit
	q.FID = o.h.FID
	q.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: o.attr.Mode &^ drop}
	fs, owner := o.a.srv.fs, o.owner()
	fs.Call(o.ctx, owner, q, &o.rep)
	if o.rep.Status != wire.OK {
		return o.rep.Status
	}
	st, _ := fs.Attr(o.ctx, owner, o.h.FID, &o.attr, true)
	return st
}

func (o *op) commit(bool) bool {
	var a nfs3.CommitArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.openAttr(a.FH, true)
	if st != wire.OK {
		return o.fail(st)
	}
	switch {
	case o.attr.Type == wire.TypeDir:
		st = wire.ErrIsDir
	case o.attr.Type != wire.TypeReg:
		st = wire.ErrInval
	case o.cred.UID != o.attr.UID && !wire.MayAccess(&o.attr, &o.cred, wire.MayWrite):
		st = wire.ErrAcces
	default:
		if st = a.Check(); st == wire.OK {
			st = o.a.srv.fs.Commit(o.ctx, o.owner(), &o.attr)
		}
		// After the flush: a loss that it has met is known.
		if u := o.a.srv.cfg.Unsure; st == wire.OK && u != nil && u() {
			st = wire.ErrJukebox
		}
	}
	if st != wire.OK {
		if o.dropped(st) {
			return true
		}
		nfs3.PutWccResult(&o.c.Out, nfs3.Status(o.proc, st), wire.PreAttr{}, &o.attr, o.h.FSID)
		o.finish()
		return true
	}
	// The verifier from after the flush: it tells of all losses up to it.
	var verf [8]byte
	o.a.putVerifier(&verf)
	nfs3.PutCommitOK(&o.c.Out, wire.PreAttr{}, &o.attr, o.h.FSID, &verf)
	o.finish()
	return true
}

func (o *op) setattr(bool) bool {
	var a nfs3.SetattrArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.open(a.FH, &o.h, true)
	if st == wire.OK {
		st = nfs3.CheckSattr(&a.Attr)
	}
	if st == wire.OK {
		st = o.current(&o.h)
	}
	if st != wire.OK {
		return o.fail(st)
	}
	if a.Guard {
		a.GuardCtime = o.guard(a.GuardCtime)
	} else if o.rep.Status == wire.OK {
		o.a.srv.fs.Later(o.ctx, o.owner(), &o.rep.Attr)
	}
	if !o.modify(wire.OpSetattr) {
		return true
	}
	o.req.FID = o.h.FID
	o.req.SetAttr = a.Attr
	o.req.Guard, o.req.GuardCtime = a.Guard, a.GuardCtime
	if a.Attr.Mask&wire.SetSize == 0 {
		return o.submit((*op).setattrDone)
	}
	o.req.Flags |= wire.FlagOwnerOverride
	fs, owner := o.a.srv.fs, o.owner()
	fs.Setattr(o.ctx, owner, &o.req, &o.rep)
	if o.resolvePort() {
		fs.Setattr(o.ctx, owner, &o.req, &o.rep)
	}
	if o.rep.Reconstructed {
		o.rep.Pre = wire.PreAttr{}
	}
	o.setattrDone()
	return true
}

// guard turns the ctime that a SETATTR is guarded by into the MDT's. While an IO
// epoch is open the client was told an object's ctime, which the MDT does not
// know. The MDT decides all the same, since a retransmission has to find its
// record first; a ctime that nothing has makes it refuse.
func (o *op) guard(ctime int64) int64 {
	fs, owner := o.a.srv.fs, o.owner()
	q := o.newReq(wire.OpGetattr)
	q.FID = o.h.FID
	fs.Call(o.ctx, owner, q, &o.rep)
	if o.rep.Status != wire.OK || !o.rep.Attr.EpochOpen {
		return ctime
	}
	raw := o.rep.Attr.Ctime
	if st, _ := fs.Complete(o.ctx, owner, &o.rep.Attr, true); st != wire.OK || o.rep.Attr.Ctime != ctime {
		return -1
	}
	return raw
}

func (o *op) setattrDone() {
	if o.dropped(o.rep.Status) {
		return
	}
	o.withObject(func(o *op) {
		nfs3.PutWccResult(&o.c.Out, o.status(), o.rep.Pre, opt(&o.rep.Attr, o.rep.HasAttr), o.h.FSID)
		o.finish()
	})
}

// withObject runs f once rep.Attr is complete, on a worker if the OSTs have to
// be asked. While an IO epoch is open the MDT's state before the operation is
// not the whole truth, so it is left out.
func (o *op) withObject(f func(*op)) {
	if !o.rep.HasAttr || !o.rep.Attr.EpochOpen {
		f(o)
		return
	}
	o.rep.Pre = wire.PreAttr{}
	fs, owner := o.a.srv.fs, o.owner()
	if st, ok := fs.Complete(o.ctx, owner, &o.rep.Attr, false); ok {
		o.rep.HasAttr = st == wire.OK
		f(o)
		return
	}
	o.c.Go(func(*sunrpc.Call) {
		st, _ := fs.Complete(o.ctx, owner, &o.rep.Attr, true)
		o.rep.HasAttr = st == wire.OK
		f(o)
	})
}

// dirOp decodes what all procedures that make or remove an entry have in common.
// It returns false when the call was answered or is being held.
func (o *op) dirOp(fh, name []byte, sa *wire.SetAttr, code wire.Op) bool {
	st, _ := o.open(fh, &o.h, true)
	if st == wire.OK {
		st = nfs3.CheckName(o.proc, name)
	}
	if st == wire.OK && sa != nil {
		st = nfs3.CheckSattr(sa)
	}
	if st == wire.OK {
		st = o.current(&o.h)
	}
	if st != wire.OK {
		o.fail(st)
		return false
	}
	if !o.modify(code) {
		return false
	}
	o.req.FID, o.req.Name = o.h.FID, name
	if sa != nil {
		o.req.SetAttr = *sa
	}
	return true
}

func (o *op) create(bool) bool {
	var a nfs3.CreateArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	if !o.dirOp(a.FH, a.Name, &a.Attr, wire.OpCreate) {
		return true
	}
	o.req.How, o.req.Verf = a.How, a.Verf
	o.req.Flags |= wire.FlagOpenEpoch | wire.FlagOwnerOverride
	return o.submit((*op).createDone)
}

func (o *op) createDone() {
	if o.rep.Status == wire.OK && o.proc == nfs.NFSProcedureCreate {
		// A new file may have been given a size, too.
		switch {
		case o.rep.Truncate.LogID != 0 && o.rep.Reconstructed && !o.rep.Created:
			o.rep.Status = wire.ErrTargetDown // see Truncated
		case o.rep.Truncate.LogID != 0 || !o.rep.Attr.EpochOpen:
		case o.rep.Reconstructed:
			o.a.srv.fs.Recreated(o.rep.Attr.FID)
		case o.rep.Created:
			o.a.srv.fs.Created(o.rep.Attr.FID, o.rep.Transno)
			o.madeDone()
			return
		}
		if o.rep.Truncate.LogID != 0 && o.rep.Status == wire.OK {
			o.c.Go(func(*sunrpc.Call) {
				if st := o.a.srv.fs.Truncated(o.ctx, o.owner(), &o.rep.Attr, o.rep.Truncate); st != wire.OK {
					o.rep.Status = st
				}
				o.withObject((*op).madeDone)
			})
			return
		}
	}
	o.withObject((*op).madeDone)
}

// madeDone answers CREATE, MKDIR, SYMLINK and MKNOD.
func (o *op) madeDone() {
	dir := opt(&o.rep.DirAttr, o.rep.HasDir)
	if o.rep.Status != wire.OK {
		if o.dropped(o.rep.Status) {
			return
		}
		nfs3.PutWccResult(&o.c.Out, o.status(), o.rep.DirPre, dir, o.h.FSID)
		o.finish()
		return
	}
	var fh []byte
	if o.rep.HasAttr {
		fh = o.encodeFH(&o.rep.Attr)
	}
	nfs3.PutCreateOK(&o.c.Out, fh, opt(&o.rep.Attr, o.rep.HasAttr), o.rep.DirPre, dir, o.h.FSID)
	o.finish()
}

func (o *op) mkdir(bool) bool {
	var a nfs3.MkdirArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	if !o.dirOp(a.FH, a.Name, &a.Attr, wire.OpMkdir) {
		return true
	}
	return o.submit((*op).madeDone)
}

func (o *op) symlink(bool) bool {
	var a nfs3.SymlinkArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	if st := nfs3.CheckTarget(a.Target); st != wire.OK {
		return o.fail(st)
	}
	if !o.dirOp(a.FH, a.Name, &a.Attr, wire.OpSymlink) {
		return true
	}
	o.req.Data = a.Target
	return o.submit((*op).madeDone)
}

func (o *op) mknod(bool) bool {
	var a nfs3.MknodArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	if st := a.Check(); st != wire.OK {
		return o.fail(st)
	}
	if !o.dirOp(a.FH, a.Name, &a.Attr, wire.OpMknod) {
		return true
	}
	o.req.Type, o.req.RdevMajor, o.req.RdevMinor = a.Type, a.RdevMajor, a.RdevMinor
	return o.submit((*op).madeDone)
}

// remove is REMOVE and RMDIR.
func (o *op) remove(bool) bool {
	var a nfs3.DirOpArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	code := wire.OpRemove
	if o.proc == nfs.NFSProcedureRmDir {
		code = wire.OpRmdir
	}
	if !o.dirOp(a.FH, a.Name, nil, code) {
		return true
	}
	return o.submit(func(o *op) {
		nfs3.PutWccResult(&o.c.Out, o.status(), o.rep.DirPre, opt(&o.rep.DirAttr, o.rep.HasDir), o.h.FSID)
		o.finish()
	})
}

func (o *op) rename(bool) bool {
	var a nfs3.RenameArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.open(a.ToFH, &o.h2, true)
	if st == wire.OK && o.dec.ReadOnly {
		st = wire.ErrROFS
	}
	if st == wire.OK {
		st, _ = o.open(a.FromFH, &o.h, true)
	}
	if st == wire.OK && o.h.FSID != o.h2.FSID {
		st = wire.ErrXDev
	}
	if st == wire.OK {
		st = nfs3.CheckName(o.proc, a.ToName)
	}
	if st == wire.OK {
		st = o.current(&o.h2)
	}
	if st != wire.OK {
		return o.fail(st)
	}
	if !o.dirOp(a.FromFH, a.FromName, nil, wire.OpRename) {
		return true
	}
	o.req.FID2, o.req.Name2 = o.h2.FID, a.ToName
	return o.submit(func(o *op) {
		nfs3.PutRename(&o.c.Out, o.status(), o.rep.DirPre, opt(&o.rep.DirAttr, o.rep.HasDir), o.rep.DirPre2, opt(&o.rep.DirAttr2, o.rep.HasDir2), o.h.FSID)
		o.finish()
	})
}

func (o *op) link(bool) bool {
	var a nfs3.LinkArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.open(a.DirFH, &o.h2, true)
	if st == wire.OK && o.dec.ReadOnly {
		st = wire.ErrROFS
	}
	if st == wire.OK {
		st, _ = o.open(a.FH, &o.h, true)
	}
	if st == wire.OK && o.h.FSID != o.h2.FSID {
		st = wire.ErrXDev
	}
	if st == wire.OK {
		st = nfs3.CheckName(o.proc, a.Name)
	}
	if st == wire.OK {
		st = o.current(&o.h2)
	}
	if st == wire.OK {
		st = o.current(&o.h)
	}
	if st != wire.OK {
		return o.fail(st)
	}
	if !o.modify(wire.OpLink) {
		return true
	}
	o.req.FID, o.req.FID2, o.req.Name2 = o.h.FID, o.h2.FID, a.Name
	return o.submit(func(o *op) {
		o.withObject(func(o *op) {
			nfs3.PutLink(&o.c.Out, o.status(), opt(&o.rep.Attr, o.rep.HasAttr), o.rep.DirPre2, opt(&o.rep.DirAttr2, o.rep.HasDir2), o.h.FSID)
			o.finish()
		})
	})
}
