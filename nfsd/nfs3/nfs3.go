// Package nfs3 encodes and decodes the 22 procedures of NFS version 3
// (RFC 1813). The server's direction works with the types of recovery/wire and
// allocates nothing: decoded slices alias the request's record, encoders append
// to a pooled buffer. The client's direction (files client_*.go) has plain
// structures for tests, benchmarks and tools.
//
// Status and procedure numbers are those of github.com/willscott/go-nfs.
//
// Decoding is strict about XDR (a violation is an error that the RPC layer
// answers with GARBAGE_ARGS) and lenient about values that have an NFS error of
// their own: over-long names, bad names and mismatched counts decode and are
// classified afterwards by the Check functions, so that the client gets a result
// with the right status. Bytes after the last argument are ignored.
package nfs3

import (
	"errors"
	"math"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// RPC identity of NFS version 3 (RFC 1813 section 3.1).
const (
	Program = 100003
	Version = 3
	// NumProcs is the number of procedures; they are numbered from 0.
	NumProcs = 22
)

// Sizes of RFC 1813 section 2.4, in bytes.
const (
	FHSize         = 64
	CookieVerfSize = 8
	CreateVerfSize = 8
	WriteVerfSize  = 8
)

// Decode limits, in bytes. They exceed the limits of the name space so that a
// name that is a little too long is answered NAMETOOLONG, not GARBAGE_ARGS.
const (
	maxDecodeName   = 4096
	maxDecodeTarget = 8192
)

// ACCESS bits (RFC 1813 section 3.3.4).
const (
	AccessRead    = 0x01
	AccessLookup  = 0x02
	AccessModify  = 0x04
	AccessExtend  = 0x08
	AccessDelete  = 0x10
	AccessExecute = 0x20
	AccessAll     = 0x3f
)

// FSINFO properties (RFC 1813 section 3.3.19).
const (
	FSFLink        = 0x01
	FSFSymlink     = 0x02
	FSFHomogeneous = 0x08
	FSFCanSetTime  = 0x10
)

// Values of time_how (RFC 1813 section 2.6).
const (
	dontChange      = 0
	setToServerTime = 1
	setToClientTime = 2
)

// Errors of the decoders besides those of package xdr. The RPC layer answers
// all of them with GARBAGE_ARGS.
var (
	ErrBadEnum = errors.New("nfs3: enumeration value out of range")
)

const nsPerSec = 1_000_000_000

// PutTime encodes ns, nanoseconds since 1970 UTC, as nfstime3. Its seconds are
// unsigned 32 bits: times before 1970 become 0, times after 2106-02-07
// 06:28:15 UTC become the last representable nanosecond.
func PutTime(w *xdr.Writer, ns int64) {
	sec, nsec := splitTime(ns)
	w.Uint32(sec)
	w.Uint32(nsec)
}

func splitTime(ns int64) (sec, nsec uint32) {
	if ns < 0 {
		return 0, 0
	}
	s := ns / nsPerSec
	if s > math.MaxUint32 {
		return math.MaxUint32, nsPerSec - 1
	}
	return uint32(s), uint32(ns % nsPerSec)
}

// GetTime decodes an nfstime3 to nanoseconds since 1970 UTC. Nanoseconds of
// 10^9 and more are taken as 999,999,999.
func GetTime(r *xdr.Reader) int64 {
	sec, nsec := r.Uint32(), r.Uint32()
	return int64(sec)*nsPerSec + int64(min(nsec, nsPerSec-1))
}

// RepresentableTime is ns as a client sees it after PutTime and GetTime.
func RepresentableTime(ns int64) int64 {
	sec, nsec := splitTime(ns)
	return int64(sec)*nsPerSec + int64(nsec)
}

// AttrSize is the encoded size of fattr3 in bytes.
const AttrSize = 84

// PutAttr encodes a as fattr3 (RFC 1813 section 2.6). fsid is the export's.
func PutAttr(w *xdr.Writer, a *wire.Attr, fsid uint64) {
	w.Uint32(uint32(a.Type))
	w.Uint32(a.Mode & 0o7777)
	w.Uint32(a.Nlink)
	w.Uint32(a.UID)
	w.Uint32(a.GID)
	w.Uint64(a.Size)
	w.Uint64(a.Used)
	w.Uint32(a.RdevMajor)
	w.Uint32(a.RdevMinor)
	w.Uint64(fsid)
	w.Uint64(a.FID.FileID())
	PutTime(w, a.Atime)
	PutTime(w, a.Mtime)
	PutTime(w, a.Ctime)
}

// PutPostOp encodes post_op_attr; a nil a means that there are no attributes.
func PutPostOp(w *xdr.Writer, a *wire.Attr, fsid uint64) {
	w.Bool(a != nil)
	if a != nil {
		PutAttr(w, a, fsid)
	}
}

// PutWcc encodes wcc_data: the state before (absent unless pre.Valid) and the
// attributes after the operation (absent when post is nil).
func PutWcc(w *xdr.Writer, pre wire.PreAttr, post *wire.Attr, fsid uint64) {
	w.Bool(pre.Valid)
	if pre.Valid {
		w.Uint64(pre.Size)
		PutTime(w, pre.Mtime)
		PutTime(w, pre.Ctime)
	}
	PutPostOp(w, post, fsid)
}

// putPostOpFH encodes post_op_fh3; an empty fh means that none follows.
func putPostOpFH(w *xdr.Writer, fh []byte) {
	w.Bool(len(fh) > 0)
	if len(fh) > 0 {
		w.Opaque(fh)
	}
}

// GetFH decodes an nfs_fh3 of at most 64 bytes; the result aliases the record.
func GetFH(r *xdr.Reader) []byte { return r.Opaque(FHSize) }

// GetSattr decodes sattr3. The mode is cut to its permission bits (07777).
func GetSattr(r *xdr.Reader) (wire.SetAttr, error) {
	var s wire.SetAttr
	if r.Bool() {
		s.Mask |= wire.SetMode
		s.Mode = r.Uint32() & 0o7777
	}
	if r.Bool() {
		s.Mask |= wire.SetUID
		s.UID = r.Uint32()
	}
	if r.Bool() {
		s.Mask |= wire.SetGID
		s.GID = r.Uint32()
	}
	if r.Bool() {
		s.Mask |= wire.SetSize
		s.Size = r.Uint64()
	}
	switch r.Uint32() {
	case dontChange:
	case setToServerTime:
		s.Mask |= wire.SetAtimeNow
	case setToClientTime:
		s.Mask |= wire.SetAtime
		s.Atime = GetTime(r)
	default:
		return s, ErrBadEnum
	}
	switch r.Uint32() {
	case dontChange:
	case setToServerTime:
		s.Mask |= wire.SetMtimeNow
	case setToClientTime:
		s.Mask |= wire.SetMtime
		s.Mtime = GetTime(r)
	default:
		return s, ErrBadEnum
	}
	return s, r.Err()
}

// CheckSattr classifies the values of s: a size above wire.MaxFileSize is
// ErrFBig, as knfsd answers. UID and GID 2^32-1 mean "no id" in POSIX and are
// ErrInval.
func CheckSattr(s *wire.SetAttr) wire.Status {
	switch {
	case s.Mask&wire.SetSize != 0 && s.Size > wire.MaxFileSize:
		return wire.ErrFBig
	case s.Mask&wire.SetUID != 0 && s.UID == math.MaxUint32,
		s.Mask&wire.SetGID != 0 && s.GID == math.MaxUint32:
		return wire.ErrInval
	}
	return wire.OK
}

// CheckName classifies a name argument of procedure proc.
//
//   - empty: ErrAcces (RFC 1813 section 3.2 "General comments", a; knfsd alike)
//   - longer than 255 bytes: ErrNameTooLong
//   - a slash or a NUL byte inside: ErrAcces (the same section, e, about characters
//     that a server can not handle; INVAL is not a legal answer to LOOKUP)
//   - "." and "..": fine for LOOKUP; ErrInval for RENAME; for RMDIR ErrInval (".")
//     and ErrExist (".."), as RFC 1813 section 3.3.13 says; ErrAcces for REMOVE
//     as knfsd answers; ErrExist for everything that makes an entry.
func CheckName(proc nfs.NFSProcedure, name []byte) wire.Status {
	if len(name) == 0 {
		return wire.ErrAcces
	}
	if len(name) > wire.MaxNameLen {
		return wire.ErrNameTooLong
	}
	if name[0] == '.' && (len(name) == 1 || len(name) == 2 && name[1] == '.') {
		return dotStatus(proc, len(name) == 2)
	}
	for _, c := range name {
		if c == '/' || c == 0 {
			return wire.ErrAcces
		}
	}
	return wire.OK
}

func dotStatus(proc nfs.NFSProcedure, dotdot bool) wire.Status {
	switch proc {
	case nfs.NFSProcedureLookup:
		return wire.OK
	case nfs.NFSProcedureRename:
		return wire.ErrInval
	case nfs.NFSProcedureRemove:
		return wire.ErrAcces
	case nfs.NFSProcedureRmDir:
		if !dotdot {
			return wire.ErrInval
		}
	}
	return wire.ErrExist
}

// CheckTarget classifies a symbolic link's text: empty is ErrNoEnt (POSIX
// symlink, knfsd), more than 4095 bytes ErrNameTooLong, a NUL byte ErrInval.
func CheckTarget(target []byte) wire.Status {
	if len(target) == 0 {
		return wire.ErrNoEnt
	}
	if len(target) > wire.MaxSymlinkLen {
		return wire.ErrNameTooLong
	}
	for _, c := range target {
		if c == 0 {
			return wire.ErrInval
		}
	}
	return wire.OK
}
