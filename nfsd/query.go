package nfsd

import (
	"encoding/binary"

	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The procedures that change nothing. See procDef for the meaning of block.

func (o *op) getattr(block bool) bool {
	var a nfs3.FHArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.openAttr(a.FH, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.fail(st)
	}
	nfs3.PutGetattrOK(&o.c.Out, &o.attr, o.h.FSID)
	o.c.Finish()
	return true
}

func (o *op) access(block bool) bool {
	var a nfs3.AccessArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.openAttr(a.FH, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.fail(st)
	}
	nfs3.PutAccessOK(&o.c.Out, &o.attr, o.h.FSID, a.Access&accessBits(&o.attr, &o.cred, o.dec.ReadOnly))
	o.c.Finish()
	return true
}

// accessBits is what the caller may do. DELETE means entries of a directory, as
// RFC 1813 section 3.3.4 says; for files it depends on the directory and is not
// granted, like in other servers.
func accessBits(a *wire.Attr, c *wire.Cred, readOnly bool) uint32 {
	var m uint32
	if wire.MayAccess(a, c, wire.MayRead) {
		m |= nfs3.AccessRead
	}
	w := !readOnly && wire.MayAccess(a, c, wire.MayWrite)
	x := wire.MayAccess(a, c, wire.MayExec)
	if a.Type == wire.TypeDir {
		if x {
			m |= nfs3.AccessLookup
		}
		if w {
			m |= nfs3.AccessModify | nfs3.AccessExtend | nfs3.AccessDelete
		}
		return m
	}
	if x {
		m |= nfs3.AccessExecute
	}
	if w {
		m |= nfs3.AccessModify | nfs3.AccessExtend
	}
	return m
}

func (o *op) lookup(block bool) bool {
	var a nfs3.DirOpArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.open(a.FH, &o.h, block)
	if !ok {
		return false
	}
	if st == wire.OK {
		st = nfs3.CheckName(o.proc, a.Name)
	}
	if st != wire.OK {
		return o.fail(st)
	}
	q := o.newReq(wire.OpLookup)
	q.FID, q.Name = o.h.FID, a.Name
	if string(a.Name) == ".." && o.h.FID == o.set.roots[o.h.FSID] {
		// An export ends at its root.
		q.Name = dot
	}
	fs, owner := o.a.srv.fs, o.owner()
	if !fs.Try(owner, q, &o.rep) {
		if !block {
			return false
		}
		fs.Call(o.ctx, owner, q, &o.rep)
	}
	st = o.rep.Status
	if o.rep.HasDir && o.rep.DirAttr.Generation != o.h.Generation {
		return o.failAttr(wire.ErrStale, nil)
	}
	if st == wire.OK {
		if st, ok = fs.Complete(o.ctx, owner, &o.rep.Attr, block); !ok {
			return false
		}
	}
	if st != wire.OK {
		return o.failAttr(st, opt(&o.rep.DirAttr, o.rep.HasDir))
	}
	nfs3.PutLookupOK(&o.c.Out, o.encodeFH(&o.rep.Attr), &o.rep.Attr, opt(&o.rep.DirAttr, o.rep.HasDir), o.h.FSID)
	o.c.Finish()
	return true
}

var dot = []byte(".")

func (o *op) readlink(block bool) bool {
	var a nfs3.FHArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.open(a.FH, &o.h, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.fail(st)
	}
	q := o.newReq(wire.OpReadlink)
	q.FID = o.h.FID
	fs, owner := o.a.srv.fs, o.owner()
	if !fs.Try(owner, q, &o.rep) {
		if !block {
			return false
		}
		fs.Call(o.ctx, owner, q, &o.rep)
	}
	if o.rep.HasAttr && o.rep.Attr.Generation != o.h.Generation {
		return o.failAttr(wire.ErrStale, nil)
	}
	if o.rep.Status != wire.OK {
		return o.failAttr(o.rep.Status, opt(&o.rep.Attr, o.rep.HasAttr))
	}
	nfs3.PutReadlinkOK(&o.c.Out, &o.rep.Attr, o.h.FSID, o.rep.Data)
	o.c.Finish()
	return true
}

// udpMax is how much data a datagram carries beside the header and attributes,
// in bytes; a reply that does not fit could not be sent at all.
const udpMax = 32 << 10

// fits bounds a transfer size by what the call's transport can carry.
func (o *op) fits(n uint32) uint32 {
	if o.c.Conn == nil {
		return min(n, udpMax)
	}
	return n
}

func (o *op) read(block bool) bool {
	var a nfs3.ReadArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	count := min(a.Count, o.fits(o.a.srv.cfg.RTMax))
	if !block && count > o.a.srv.cfg.InlineRead {
		return false
	}
	st, ok := o.openAttr(a.FH, block)
	if !ok {
		return false
	}
	switch {
	case st != wire.OK:
		return o.fail(st)
	case o.attr.Type == wire.TypeDir:
		return o.failAttr(wire.ErrIsDir, &o.attr)
	case o.attr.Type != wire.TypeReg:
		return o.failAttr(wire.ErrInval, &o.attr)
	// The owner may always read: the file may have been open before its mode
	// changed. A file that may be executed may be read, or it could not be run.
	case o.cred.UID != o.attr.UID && !wire.MayAccess(&o.attr, &o.cred, wire.MayRead) && !wire.MayAccess(&o.attr, &o.cred, wire.MayExec):
		return o.failAttr(wire.ErrAcces, &o.attr)
	}
	if a.Offset < o.attr.Size && uint64(count) > o.attr.Size-a.Offset {
		count = uint32(o.attr.Size - a.Offset)
	}
	var buf []byte
	if a.Offset < o.attr.Size && count > 0 {
		buf = o.c.Bulk(int(count))
	}
	n, eof, st, ok := o.a.srv.fs.Read(o.ctx, o.owner(), &o.attr, a.Offset, buf, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.failAttr(st, &o.attr)
	}
	nfs3.PutReadHead(&o.c.Out, &o.attr, o.h.FSID, uint32(n), eof)
	if n > 0 {
		o.c.SetPayload(buf[:n])
	}
	o.c.Finish()
	return true
}

func (o *op) readdir(bool) bool {
	var a nfs3.ReaddirArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	return o.list(a.FH, a.Cookie, a.CookieVerf, 0, a.Count, false)
}

func (o *op) readdirplus(bool) bool {
	var a nfs3.ReaddirplusArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	return o.list(a.FH, a.Cookie, a.CookieVerf, a.DirCount, a.MaxCount, true)
}

func (o *op) list(fh []byte, cookie uint64, verf [8]byte, dirCount, maxCount uint32, plus bool) bool {
	maxCount = min(maxCount, o.fits(o.a.srv.cfg.DTMax))
	st, _ := o.openAttr(fh, true)
	if st != wire.OK {
		return o.fail(st)
	}
	if o.attr.Type != wire.TypeDir {
		return o.failAttr(wire.ErrNotDir, &o.attr)
	}
	// Cookies stay good for a directory's life, so its verifier never changes.
	// Clients that lost theirs may send zero.
	var own [8]byte
	binary.BigEndian.PutUint64(own[:], uint64(o.attr.Generation)|1<<32)
	if cookie != 0 && verf != own && verf != [8]byte{} {
		return o.failAttr(wire.ErrBadCookie, &o.attr)
	}
	// An entry with a name of one byte bounds how many can fit, so that one
	// request fills the reply and does not read much more than fits.
	per := nfs3.EntrySize(1)
	left := int(maxCount) - nfs3.ReaddirOverhead
	if plus {
		per = nfs3.EntryPlusSize(1, nfs3.HandleSize)
	}
	fs, owner := o.a.srv.fs, o.owner()
	q := o.newReq(wire.OpReaddir)
	q.FID, q.Cookie, q.Plus = o.h.FID, cookie, plus
	q.Count = uint32(max(left, 512))
	if plus && dirCount != 0 {
		q.Count = max(min(q.Count, dirCount), 512)
	}
	q.MaxEntries = uint32(max(left, 0)/per) + 1
	fs.Call(o.ctx, owner, q, &o.rep)
	if o.rep.Status != wire.OK {
		return o.failAttr(o.rep.Status, &o.attr)
	}
	o.c.GrowOut(int(maxCount) + 64)
	o.dw.Begin(&o.c.Out, &o.attr, o.h.FSID, &own, dirCount, maxCount)
	for i := range o.rep.Entries {
		e := &o.rep.Entries[i]
		if string(e.Name) == ".." && o.h.FID == o.set.roots[o.h.FSID] {
			// An export ends at its root.
			e.FID, e.Attr = o.attr.FID, o.attr
		}
		if !plus {
			if !o.dw.Add(e) {
				break
			}
			continue
		}
		if e.HasAttr && e.Attr.EpochOpen {
			if st, _ := fs.Complete(o.ctx, owner, &e.Attr, true); st != wire.OK {
				e.HasAttr = false
			}
		}
		var h []byte
		if e.HasAttr {
			h = o.encodeFH(&e.Attr)
		}
		if !o.dw.AddPlus(e, h) {
			break
		}
	}
	o.dw.End(o.rep.EOF)
	o.finish()
	return true
}

func (o *op) fsstat(bool) bool {
	var a nfs3.FHArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, _ := o.openAttr(a.FH, true)
	if st != wire.OK {
		return o.fail(st)
	}
	s, st := o.a.srv.fs.Statfs(o.ctx, o.owner())
	if st != wire.OK {
		return o.failAttr(st, &o.attr)
	}
	nfs3.PutFSStatOK(&o.c.Out, &o.attr, o.h.FSID, &s, 0)
	o.finish()
	return true
}

func (o *op) fsinfo(block bool) bool {
	var a nfs3.FHArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.openAttr(a.FH, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.fail(st)
	}
	cfg := &o.a.srv.cfg
	nfs3.PutFSInfoOK(&o.c.Out, &o.attr, o.h.FSID, &nfs3.FSInfo{
		RTMax: o.fits(cfg.RTMax), RTPref: o.fits(cfg.RTPref), RTMult: 4096,
		WTMax: o.fits(cfg.WTMax), WTPref: o.fits(cfg.WTPref), WTMult: 4096,
		DTPref: o.fits(cfg.DTPref), MaxFileSize: wire.MaxFileSize, TimeDelta: 1,
		Properties: nfs3.FSFLink | nfs3.FSFSymlink | nfs3.FSFHomogeneous | nfs3.FSFCanSetTime,
	})
	o.c.Finish()
	return true
}

func (o *op) pathconf(block bool) bool {
	var a nfs3.FHArgs
	r := o.args()
	if a.Decode(r) != nil {
		return o.garbage()
	}
	st, ok := o.openAttr(a.FH, block)
	if !ok {
		return false
	}
	if st != wire.OK {
		return o.fail(st)
	}
	nfs3.PutPathConfOK(&o.c.Out, &o.attr, o.h.FSID, &nfs3.PathConf{
		LinkMax: wire.MaxLinks, NameMax: wire.MaxNameLen, NoTrunc: true, ChownRestricted: true, CasePreserving: true,
	})
	o.c.Finish()
	return true
}
