package nfs3

import (
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/recovery/wire"
)

// statusMap maps the targets' statuses. Those of the recovery protocol never
// reach a client as they are: whatever passes when somebody waits is JUKEBOX.
var statusMap = map[wire.Status]nfs.NFSStatus{
	wire.OK:             nfs.NFSStatusOk,
	wire.ErrPerm:        nfs.NFSStatusPerm,
	wire.ErrNoEnt:       nfs.NFSStatusNoEnt,
	wire.ErrIO:          nfs.NFSStatusIO,
	wire.ErrNXIO:        nfs.NFSStatusNXIO,
	wire.ErrAcces:       nfs.NFSStatusAccess,
	wire.ErrExist:       nfs.NFSStatusExist,
	wire.ErrXDev:        nfs.NFSStatusXDev,
	wire.ErrNoDev:       nfs.NFSStatusNoDev,
	wire.ErrNotDir:      nfs.NFSStatusNotDir,
	wire.ErrIsDir:       nfs.NFSStatusIsDir,
	wire.ErrInval:       nfs.NFSStatusInval,
	wire.ErrFBig:        nfs.NFSStatusFBig,
	wire.ErrNoSpc:       nfs.NFSStatusNoSPC,
	wire.ErrROFS:        nfs.NFSStatusROFS,
	wire.ErrMLink:       nfs.NFSStatusMlink,
	wire.ErrNameTooLong: nfs.NFSStatusNameTooLong,
	wire.ErrNotEmpty:    nfs.NFSStatusNotEmpty,
	wire.ErrDQuot:       nfs.NFSStatusDQuot,
	wire.ErrStale:       nfs.NFSStatusStale,
	wire.ErrBadHandle:   nfs.NFSStatusBadHandle,
	wire.ErrNotSync:     nfs.NFSStatusNotSync,
	wire.ErrBadCookie:   nfs.NFSStatusBadCookie,
	wire.ErrNotSupp:     nfs.NFSStatusNotSupp,
	wire.ErrTooSmall:    nfs.NFSStatusTooSmall,
	wire.ErrServerFault: nfs.NFSStatusServerFault,
	wire.ErrBadType:     nfs.NFSStatusBadType,
	wire.ErrJukebox:     nfs.NFSStatusJukebox,

	wire.ErrStaleVIP:      nfs.NFSStatusJukebox, // only if DropReply was not heeded
	wire.ErrStaleClient:   nfs.NFSStatusJukebox,
	wire.ErrUnknownClient: nfs.NFSStatusJukebox,
	wire.ErrRecovering:    nfs.NFSStatusJukebox,
	wire.ErrPortMismatch:  nfs.NFSStatusJukebox,
	wire.ErrTargetDown:    nfs.NFSStatusJukebox,
	wire.ErrTooLate:       nfs.NFSStatusIO, // the data were refused for good
	wire.ErrProto:         nfs.NFSStatusServerFault,
}

// DropReply tells that no reply at all must be sent for st: the VIP belongs to
// another node, which will answer the client's retransmission.
func DropReply(st wire.Status) bool { return st == wire.ErrStaleVIP }

// Status maps a target's status to the client's answer to proc. A status that
// has no meaning for proc becomes SERVERFAULT, which RFC 1813 section 2.6
// reserves for "does not map to any of the legal NFS version 3 protocol error
// values".
func Status(proc nfs.NFSProcedure, st wire.Status) nfs.NFSStatus {
	if st == wire.OK {
		return nfs.NFSStatusOk
	}
	s, ok := statusMap[st]
	if !ok || !Legal(proc, s) {
		return nfs.NFSStatusServerFault
	}
	return s
}

// Legal tells whether proc may be answered with s: the lists of RFC 1813
// section 3.3, and these deviations that real servers make and clients know:
// JUKEBOX, ACCES and NOTSUPP everywhere; FBIG for SETATTR of a size (POSIX
// truncate); PERM for the sticky bit in REMOVE, RMDIR, RENAME, and for CREATE,
// MKDIR, MKNOD, SYMLINK and LINK; ISDIR for REMOVE, READ, WRITE, COMMIT and LINK;
// TOOSMALL, NOTDIR and BAD_COOKIE for directory reads.
func Legal(proc nfs.NFSProcedure, s nfs.NFSStatus) bool {
	if s == nfs.NFSStatusOk {
		return true
	}
	b, ok := statusBit[s]
	return ok && proc < NumProcs && legal[proc]&b != 0
}

var statusBit, legal = buildLegal()

func buildLegal() (map[nfs.NFSStatus]uint32, [NumProcs]uint32) {
	bits := map[nfs.NFSStatus]uint32{}
	for _, s := range statusMap {
		if _, ok := bits[s]; !ok && s != nfs.NFSStatusOk {
			bits[s] = 1 << len(bits)
		}
	}
	var l [NumProcs]uint32
	add := func(procs []nfs.NFSProcedure, sts ...nfs.NFSStatus) {
		for _, p := range procs {
			for _, s := range sts {
				l[p] |= bits[s]
			}
		}
	}
	type ps = []nfs.NFSProcedure
	var all ps
	for p := nfs.NFSProcedureGetAttr; p < NumProcs; p++ {
		all = append(all, p)
	}
	add(all, nfs.NFSStatusIO, nfs.NFSStatusStale, nfs.NFSStatusBadHandle, nfs.NFSStatusServerFault,
		nfs.NFSStatusJukebox, nfs.NFSStatusAccess, nfs.NFSStatusNotSupp)
	makes := ps{nfs.NFSProcedureCreate, nfs.NFSProcedureMkDir, nfs.NFSProcedureSymlink,
		nfs.NFSProcedureMkNod, nfs.NFSProcedureLink, nfs.NFSProcedureRename}
	changesDir := append(append(ps{}, makes...), nfs.NFSProcedureRemove, nfs.NFSProcedureRmDir)
	add(makes, nfs.NFSStatusExist, nfs.NFSStatusNoSPC, nfs.NFSStatusDQuot, nfs.NFSStatusInval)
	add(changesDir, nfs.NFSStatusNotDir, nfs.NFSStatusNameTooLong, nfs.NFSStatusROFS,
		nfs.NFSStatusPerm, nfs.NFSStatusNoEnt)
	add(ps{nfs.NFSProcedureLookup}, nfs.NFSStatusNoEnt, nfs.NFSStatusNotDir, nfs.NFSStatusNameTooLong)
	add(ps{nfs.NFSProcedureSetAttr}, nfs.NFSStatusPerm, nfs.NFSStatusInval, nfs.NFSStatusNoSPC,
		nfs.NFSStatusROFS, nfs.NFSStatusDQuot, nfs.NFSStatusNotSync, nfs.NFSStatusFBig,
		nfs.NFSStatusIsDir)
	add(ps{nfs.NFSProcedureReadlink}, nfs.NFSStatusInval)
	add(ps{nfs.NFSProcedureRead}, nfs.NFSStatusNXIO, nfs.NFSStatusInval, nfs.NFSStatusIsDir)
	add(ps{nfs.NFSProcedureWrite}, nfs.NFSStatusFBig, nfs.NFSStatusDQuot, nfs.NFSStatusNoSPC,
		nfs.NFSStatusROFS, nfs.NFSStatusInval, nfs.NFSStatusIsDir, nfs.NFSStatusNXIO)
	add(ps{nfs.NFSProcedureCommit}, nfs.NFSStatusInval, nfs.NFSStatusIsDir, nfs.NFSStatusNoSPC,
		nfs.NFSStatusDQuot)
	add(ps{nfs.NFSProcedureCreate}, nfs.NFSStatusIsDir, nfs.NFSStatusFBig)
	add(ps{nfs.NFSProcedureMkNod}, nfs.NFSStatusBadType)
	add(ps{nfs.NFSProcedureMkDir, nfs.NFSProcedureRename, nfs.NFSProcedureLink}, nfs.NFSStatusMlink)
	add(ps{nfs.NFSProcedureRemove, nfs.NFSProcedureRename, nfs.NFSProcedureLink}, nfs.NFSStatusIsDir)
	add(ps{nfs.NFSProcedureRmDir}, nfs.NFSStatusInval, nfs.NFSStatusExist)
	add(ps{nfs.NFSProcedureRmDir, nfs.NFSProcedureRename}, nfs.NFSStatusNotEmpty)
	add(ps{nfs.NFSProcedureRename, nfs.NFSProcedureLink}, nfs.NFSStatusXDev)
	add(ps{nfs.NFSProcedureReadDir, nfs.NFSProcedureReadDirPlus}, nfs.NFSStatusNotDir,
		nfs.NFSStatusBadCookie, nfs.NFSStatusTooSmall, nfs.NFSStatusInval)
	return bits, l
}
