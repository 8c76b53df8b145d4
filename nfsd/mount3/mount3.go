// Package mount3 encodes and decodes the MOUNT protocol, version 3 (RFC 1813
// appendix I) and the procedures whose encoding version 1 (RFC 1094 appendix A)
// shares, in both directions. Status and procedure numbers are those of
// github.com/willscott/go-nfs.
//
// Paths decode up to 4096 bytes so that one that is too long can be answered
// with MountStatusErrNameTooLong; see CheckPath.
package mount3

import (
	"bytes"
	"errors"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// RPC identity of the MOUNT protocol.
const (
	Program = 100005
	Version = 3
	// VersionOld is MOUNT version 1; see ServesOld.
	VersionOld = 1
	NumProcs   = 6
)

// Limits of RFC 1813 section 5.1.3 in bytes.
const (
	MaxPath = nfs.MntPathLen
	MaxName = nfs.MNTNameLen
)

const (
	maxDecodePath  = 4096
	maxFlavors     = 64
	maxListEntries = 1 << 16 // client's direction
)

// ErrTooMany is the client's error for a list that is longer than it accepts.
var ErrTooMany = errors.New("mount3: list too long")

// ServesOld tells whether a call of MOUNT version 1 can be served with the
// codecs of version 3: arguments and results of NULL, DUMP, UMNT, UMNTALL and
// EXPORT are the same. MNT is not (its handles have 32 bytes and mean NFS
// version 2) and gets PROG_MISMATCH.
func ServesOld(proc nfs.MountProcedure) bool {
	return proc < NumProcs && proc != nfs.MountProcMount
}

// DecodePath decodes the argument of MNT and UMNT. The result aliases the record.
func DecodePath(r *xdr.Reader) ([]byte, error) {
	p := r.String(maxDecodePath)
	return p, r.Err()
}

// EncodePath appends the argument of MNT and UMNT.
func EncodePath(w *xdr.Writer, path string) { w.String(path) }

// CheckPath classifies a path: ErrNoEnt when empty or not absolute, as servers
// answer what is not exported; ErrNameTooLong above 1024 bytes or with a
// component above 255; ErrInval with a NUL byte.
func CheckPath(p []byte) nfs.MountStatus {
	switch {
	case len(p) > MaxPath:
		return nfs.MountStatusErrNameTooLong
	case bytes.IndexByte(p, 0) >= 0:
		return nfs.MountStatusErrInval
	case len(p) == 0 || p[0] != '/':
		return nfs.MountStatusErrNoEnt
	}
	for len(p) > 0 {
		n := bytes.IndexByte(p[1:], '/') + 1
		if n == 0 {
			n = len(p)
		}
		if n-1 > MaxName {
			return nfs.MountStatusErrNameTooLong
		}
		p = p[n:]
	}
	return nfs.MountStatusOk
}

// Status maps a target's status to mountstat3. What passes when somebody waits
// is ErrServerFault: MOUNT has no JUKEBOX; a server does better to hold the call.
func Status(st wire.Status) nfs.MountStatus {
	switch st {
	case wire.OK:
		return nfs.MountStatusOk
	case wire.ErrPerm:
		return nfs.MountStatusErrPerm
	case wire.ErrNoEnt, wire.ErrStale, wire.ErrBadHandle:
		return nfs.MountStatusErrNoEnt
	case wire.ErrIO:
		return nfs.MountStatusErrIO
	case wire.ErrAcces:
		return nfs.MountStatusErrAcces
	case wire.ErrNotDir:
		return nfs.MountStatusErrNotDir
	case wire.ErrInval:
		return nfs.MountStatusErrInval
	case wire.ErrNameTooLong:
		return nfs.MountStatusErrNameTooLong
	case wire.ErrNotSupp:
		return nfs.MountStatusErrNotSupp
	}
	return nfs.MountStatusErrServerFault
}

// PutMntOK encodes mountres3 with handle fh and the RPC flavors that the export
// accepts, the preferred one first.
func PutMntOK(w *xdr.Writer, fh []byte, flavors ...uint32) {
	w.Uint32(uint32(nfs.MountStatusOk))
	w.Opaque(fh)
	w.Uint32(uint32(len(flavors)))
	for _, f := range flavors {
		w.Uint32(f)
	}
}

// PutMntFail encodes a failed mountres3.
func PutMntFail(w *xdr.Writer, st nfs.MountStatus) { w.Uint32(uint32(st)) }

// MntRes is mountres3 as a client sees it. FH aliases the record.
type MntRes struct {
	Status  nfs.MountStatus
	FH      []byte
	Flavors []uint32
}

// Decode reads the result from r.
func (x *MntRes) Decode(r *xdr.Reader) error {
	*x = MntRes{Status: nfs.MountStatus(r.Uint32())}
	if r.Err() != nil || x.Status != nfs.MountStatusOk {
		return r.Err()
	}
	x.FH = r.Opaque(nfs.FHSize)
	n := r.Uint32()
	if r.Err() == nil && n > maxFlavors {
		return ErrTooMany
	}
	for ; n > 0 && r.Err() == nil; n-- {
		x.Flavors = append(x.Flavors, r.Uint32())
	}
	return r.Err()
}

// DumpEntry is one mountbody: who has mounted what.
type DumpEntry struct {
	Hostname  string
	Directory string
}

// PutDump encodes the result of DUMP. Strings are cut to the protocol's limits.
// Entries beyond limit bytes in all (0: none) are left out, since the list
// answers UDP too; it reports how many were encoded.
func PutDump(w *xdr.Writer, entries []DumpEntry, limit int) int {
	end := listEnd(w, limit)
	for i := range entries {
		e := &entries[i]
		host, dir := cut(e.Hostname, MaxName), cut(e.Directory, MaxPath)
		if len(w.Buf)+4+strSize(host)+strSize(dir) > end {
			w.Uint32(0)
			return i
		}
		w.Uint32(1)
		w.String(host)
		w.String(dir)
	}
	w.Uint32(0)
	return len(entries)
}

// DecodeDump decodes the result of DUMP.
func DecodeDump(r *xdr.Reader) ([]DumpEntry, error) {
	var l []DumpEntry
	for r.Bool() {
		host, dir := r.String(MaxName), r.String(MaxPath)
		if r.Err() != nil {
			break
		}
		if len(l) == maxListEntries {
			return nil, ErrTooMany
		}
		l = append(l, DumpEntry{string(host), string(dir)})
	}
	return l, r.Err()
}

// ExportEntry is one exportnode: a path and who may mount it. No groups means
// everybody.
type ExportEntry struct {
	Dir    string
	Groups []string
}

// PutExports encodes the result of EXPORT; limits as PutDump.
func PutExports(w *xdr.Writer, entries []ExportEntry, limit int) int {
	end := listEnd(w, limit)
	for i := range entries {
		e := &entries[i]
		dir := cut(e.Dir, MaxPath)
		n := 4 + strSize(dir) + 4
		for _, g := range e.Groups {
			n += 4 + strSize(cut(g, MaxName))
		}
		if len(w.Buf)+n > end {
			w.Uint32(0)
			return i
		}
		w.Uint32(1)
		w.String(dir)
		for _, g := range e.Groups {
			w.Uint32(1)
			w.String(cut(g, MaxName))
		}
		w.Uint32(0)
	}
	w.Uint32(0)
	return len(entries)
}

// DecodeExports decodes the result of EXPORT.
func DecodeExports(r *xdr.Reader) ([]ExportEntry, error) {
	var l []ExportEntry
	total := 0
	for r.Bool() {
		e := ExportEntry{Dir: string(r.String(MaxPath))}
		for r.Bool() {
			g := r.String(MaxName)
			if total++; total > maxListEntries {
				return nil, ErrTooMany
			}
			e.Groups = append(e.Groups, string(g))
		}
		if r.Err() != nil {
			break
		}
		if total++; total > maxListEntries {
			return nil, ErrTooMany
		}
		l = append(l, e)
	}
	return l, r.Err()
}

// listEnd is the buffer length that a list may reach before its end word.
func listEnd(w *xdr.Writer, limit int) int {
	if limit <= 0 {
		return int(^uint(0) >> 1)
	}
	return len(w.Buf) + limit - 4
}

func strSize(s string) int { return 4 + (len(s)+3)&^3 }

func cut(s string, n int) string { return s[:min(len(s), n)] }
