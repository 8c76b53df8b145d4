package nfs3

import (
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The functions PutXxxOK encode the successful result of a procedure with its
// status word, the functions PutFailXxx the failed one. Attributes are optional
// (nil) wherever a pointer is taken, except in GETATTR.

// PutStatus encodes a status word alone: the failed result of GETATTR.
func PutStatus(w *xdr.Writer, st nfs.NFSStatus) { w.Uint32(uint32(st)) }

// PutFail encodes the failed result of proc without any attributes, for errors
// found before the objects are known.
func PutFail(w *xdr.Writer, proc nfs.NFSProcedure, st nfs.NFSStatus) {
	w.Uint32(uint32(st))
	for n := failWords[proc%NumProcs]; n > 0; n-- {
		w.Uint32(0)
	}
}

// failWords is the number of absent optional items in the failed result of each
// procedure: 1 for a post_op_attr, 2 for a wcc_data.
var failWords = [NumProcs]uint8{
	nfs.NFSProcedureSetAttr: 2, nfs.NFSProcedureLookup: 1, nfs.NFSProcedureAccess: 1,
	nfs.NFSProcedureReadlink: 1, nfs.NFSProcedureRead: 1, nfs.NFSProcedureWrite: 2,
	nfs.NFSProcedureCreate: 2, nfs.NFSProcedureMkDir: 2, nfs.NFSProcedureSymlink: 2,
	nfs.NFSProcedureMkNod: 2, nfs.NFSProcedureRemove: 2, nfs.NFSProcedureRmDir: 2,
	nfs.NFSProcedureRename: 4, nfs.NFSProcedureLink: 3, nfs.NFSProcedureReadDir: 1,
	nfs.NFSProcedureReadDirPlus: 1, nfs.NFSProcedureFSStat: 1, nfs.NFSProcedureFSInfo: 1,
	nfs.NFSProcedurePathConf: 1, nfs.NFSProcedureCommit: 2,
}

// PutFailPostOp encodes the failed result of LOOKUP (a: the directory), ACCESS,
// READLINK, READ, READDIR, READDIRPLUS, FSSTAT, FSINFO and PATHCONF.
func PutFailPostOp(w *xdr.Writer, st nfs.NFSStatus, a *wire.Attr, fsid uint64) {
	w.Uint32(uint32(st))
	PutPostOp(w, a, fsid)
}

// PutWccResult encodes the whole result, failed or not, of SETATTR (of the
// object), REMOVE and RMDIR (of the directory), and the failed result of WRITE,
// COMMIT (of the file), CREATE, MKDIR, SYMLINK and MKNOD (of the directory).
func PutWccResult(w *xdr.Writer, st nfs.NFSStatus, pre wire.PreAttr, post *wire.Attr, fsid uint64) {
	w.Uint32(uint32(st))
	PutWcc(w, pre, post, fsid)
}

// PutGetattrOK encodes GETATTR3resok.
func PutGetattrOK(w *xdr.Writer, a *wire.Attr, fsid uint64) {
	w.Uint32(0)
	PutAttr(w, a, fsid)
}

// PutLookupOK encodes LOOKUP3resok.
func PutLookupOK(w *xdr.Writer, fh []byte, obj, dir *wire.Attr, fsid uint64) {
	w.Uint32(0)
	w.Opaque(fh)
	PutPostOp(w, obj, fsid)
	PutPostOp(w, dir, fsid)
}

// PutAccessOK encodes ACCESS3resok.
func PutAccessOK(w *xdr.Writer, a *wire.Attr, fsid uint64, access uint32) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Uint32(access)
}

// PutReadlinkOK encodes READLINK3resok.
func PutReadlinkOK(w *xdr.Writer, a *wire.Attr, fsid uint64, target []byte) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Opaque(target)
}

// PutReadHead encodes READ3resok up to and including the length word of the
// data. The transport sends count bytes of data and Pad(count) zero bytes after it.
func PutReadHead(w *xdr.Writer, a *wire.Attr, fsid uint64, count uint32, eof bool) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Uint32(count)
	w.Bool(eof)
	w.Uint32(count)
}

// ReadHeadSize is the size in bytes of what PutReadHead writes with attributes.
const ReadHeadSize = 4 + 4 + AttrSize + 4 + 4 + 4

// Pad is the number of zero bytes that follow n bytes of opaque data (0..3).
func Pad(n uint32) uint32 { return -n & 3 }

// PutWriteOK encodes WRITE3resok.
func PutWriteOK(w *xdr.Writer, pre wire.PreAttr, post *wire.Attr, fsid uint64, count uint32, committed wire.StableHow, verf *[WriteVerfSize]byte) {
	w.Uint32(0)
	PutWcc(w, pre, post, fsid)
	w.Uint32(count)
	w.Uint32(uint32(committed))
	w.FixedOpaque(verf[:])
}

// PutCreateOK encodes the successful result of CREATE, MKDIR, SYMLINK and MKNOD.
// An empty fh is encoded as an absent handle.
func PutCreateOK(w *xdr.Writer, fh []byte, obj *wire.Attr, dirPre wire.PreAttr, dir *wire.Attr, fsid uint64) {
	w.Uint32(0)
	putPostOpFH(w, fh)
	PutPostOp(w, obj, fsid)
	PutWcc(w, dirPre, dir, fsid)
}

// PutRename encodes RENAME3res, failed or not.
func PutRename(w *xdr.Writer, st nfs.NFSStatus, fromPre wire.PreAttr, from *wire.Attr, toPre wire.PreAttr, to *wire.Attr, fsid uint64) {
	w.Uint32(uint32(st))
	PutWcc(w, fromPre, from, fsid)
	PutWcc(w, toPre, to, fsid)
}

// PutLink encodes LINK3res, failed or not: obj is the linked object.
func PutLink(w *xdr.Writer, st nfs.NFSStatus, obj *wire.Attr, dirPre wire.PreAttr, dir *wire.Attr, fsid uint64) {
	w.Uint32(uint32(st))
	PutPostOp(w, obj, fsid)
	PutWcc(w, dirPre, dir, fsid)
}

// PutFSStatOK encodes FSSTAT3resok. invarsec is the time in seconds for which
// the figures are not expected to change.
func PutFSStatOK(w *xdr.Writer, a *wire.Attr, fsid uint64, s *wire.Statfs, invarsec uint32) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Uint64(s.Total)
	w.Uint64(s.Free)
	w.Uint64(s.Avail)
	w.Uint64(s.Files)
	w.Uint64(s.FilesFree)
	w.Uint64(s.FilesAvail)
	w.Uint32(invarsec)
}

// FSInfo holds the static figures of FSINFO3resok (RFC 1813 section 3.3.19), in
// bytes but for TimeDelta (nanoseconds) and Properties (FSF bits).
type FSInfo struct {
	RTMax, RTPref, RTMult uint32
	WTMax, WTPref, WTMult uint32
	DTPref                uint32
	MaxFileSize           uint64
	TimeDelta             int64
	Properties            uint32
}

// PutFSInfoOK encodes FSINFO3resok.
func PutFSInfoOK(w *xdr.Writer, a *wire.Attr, fsid uint64, f *FSInfo) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Uint32(f.RTMax)
	w.Uint32(f.RTPref)
	w.Uint32(f.RTMult)
	w.Uint32(f.WTMax)
	w.Uint32(f.WTPref)
	w.Uint32(f.WTMult)
	w.Uint32(f.DTPref)
	w.Uint64(f.MaxFileSize)
	PutTime(w, f.TimeDelta)
	w.Uint32(f.Properties)
}

// PathConf holds PATHCONF3resok (RFC 1813 section 3.3.20).
type PathConf struct {
	LinkMax, NameMax                                          uint32
	NoTrunc, ChownRestricted, CaseInsensitive, CasePreserving bool
}

// PutPathConfOK encodes PATHCONF3resok.
func PutPathConfOK(w *xdr.Writer, a *wire.Attr, fsid uint64, p *PathConf) {
	w.Uint32(0)
	PutPostOp(w, a, fsid)
	w.Uint32(p.LinkMax)
	w.Uint32(p.NameMax)
	w.Bool(p.NoTrunc)
	w.Bool(p.ChownRestricted)
	w.Bool(p.CaseInsensitive)
	w.Bool(p.CasePreserving)
}

// PutCommitOK encodes COMMIT3resok.
func PutCommitOK(w *xdr.Writer, pre wire.PreAttr, post *wire.Attr, fsid uint64, verf *[WriteVerfSize]byte) {
	w.Uint32(0)
	PutWcc(w, pre, post, fsid)
	w.FixedOpaque(verf[:])
}
