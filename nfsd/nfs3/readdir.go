package nfs3

import (
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// EntrySize is the encoded size in bytes of one entry3 with a name of nameLen
// bytes, its "value follows" word included. It is also what READDIRPLUS's
// dircount counts for the entry.
func EntrySize(nameLen int) int { return 4 + 8 + 4 + pad4(nameLen) + 8 }

// EntryPlusSize is the encoded size in bytes of one entryplus3 with attributes
// and a handle of fhLen bytes; fhLen 0 means that no handle follows.
func EntryPlusSize(nameLen, fhLen int) int {
	n := EntrySize(nameLen) + 4 + AttrSize + 4
	if fhLen > 0 {
		n += 4 + pad4(fhLen)
	}
	return n
}

// ReaddirOverhead is the size in bytes of a READDIR3resok or READDIRPLUS3resok
// with directory attributes and no entries: what is left of count or maxcount
// is the entries'.
const ReaddirOverhead = 4 + AttrSize + CookieVerfSize + 4 + 4

func pad4(n int) int { return (n + 3) &^ 3 }

// DirWriter encodes READDIR3res and READDIRPLUS3res within the client's limits.
// Use: Begin, then Add or AddPlus until one returns false, then End.
//
// count and maxcount bound the resok structure, so without the status word
// (RFC 1813 sections 3.3.16 and 3.3.17). The server bounds them by its own limit
// before Begin. The zero DirWriter is ready for use.
type DirWriter struct {
	w        *xdr.Writer
	start    int // of the status word
	left     int // bytes left for entries
	dirLeft  int // bytes left of dircount
	n        int
	dir      *wire.Attr
	fsid     uint64
	overfull bool
}

// Begin starts a result: dir are the directory's attributes or nil. maxCount is
// READDIR's count or READDIRPLUS's maxcount; dirCount is READDIRPLUS's dircount
// (0: not limited, as for READDIR; some clients send 0 in READDIRPLUS too).
func (d *DirWriter) Begin(w *xdr.Writer, dir *wire.Attr, fsid uint64, verf *[CookieVerfSize]byte, dirCount, maxCount uint32) {
	*d = DirWriter{w: w, start: len(w.Buf), dir: dir, fsid: fsid}
	w.Uint32(0)
	PutPostOp(w, dir, fsid)
	w.FixedOpaque(verf[:])
	used := len(w.Buf) - d.start - 4 + 8 // status word off, list end and eof on
	d.left = int(maxCount) - used
	d.dirLeft = int(maxCount)
	if dirCount != 0 {
		d.dirLeft = int(dirCount)
	}
}

// Left is the number of bytes left for entries; it sizes the request to the MDT.
func (d *DirWriter) Left() int { return max(0, min(d.left, d.dirLeft)) }

// Entries is the number of entries encoded.
func (d *DirWriter) Entries() int { return d.n }

// Add encodes an entry3. False means that it does not fit; the result is then
// complete but for End(false).
func (d *DirWriter) Add(e *wire.Dirent) bool {
	if !d.take(EntrySize(len(e.Name)), 0) {
		return false
	}
	d.put(e)
	return true
}

// AddPlus encodes an entryplus3 with e's attributes when it has them and the
// handle fh unless empty. False means that it does not fit. dircount never
// refuses the first entry, so that a small dircount cannot stop a listing.
func (d *DirWriter) AddPlus(e *wire.Dirent, fh []byte) bool {
	size := EntryPlusSize(len(e.Name), len(fh))
	if !e.HasAttr {
		size -= AttrSize
	}
	if !d.take(size, EntrySize(len(e.Name))) {
		return false
	}
	d.put(e)
	var a *wire.Attr
	if e.HasAttr {
		a = &e.Attr
	}
	PutPostOp(d.w, a, d.fsid)
	putPostOpFH(d.w, fh)
	return true
}

func (d *DirWriter) take(size, dirSize int) bool {
	if d.overfull || size > d.left || d.n > 0 && dirSize > d.dirLeft {
		d.overfull = true
		return false
	}
	d.left -= size
	d.dirLeft -= dirSize
	d.n++
	return true
}

func (d *DirWriter) put(e *wire.Dirent) {
	d.w.Uint32(1)
	d.w.Uint64(e.FID.FileID())
	d.w.Opaque(e.Name)
	d.w.Uint64(e.Cookie)
}

// End completes the result. eof tells that the directory has no entries after
// the last one that was passed to Add; it is ignored when an entry did not fit.
// When no entry fitted, or there is none and eof is false (which would send the
// client into a loop), the result becomes TOOSMALL, and End returns that status.
func (d *DirWriter) End(eof bool) nfs.NFSStatus {
	w := d.w
	if d.left < 0 || d.n == 0 && (d.overfull || !eof) {
		w.Buf = w.Buf[:d.start]
		PutFailPostOp(w, nfs.NFSStatusTooSmall, d.dir, d.fsid)
		return nfs.NFSStatusTooSmall
	}
	w.Uint32(0)
	w.Bool(eof && !d.overfull)
	return nfs.NFSStatusOk
}
