package wire

import (
	"fmt"
	"slices"
)

// AppendReply appends header and body of the answer r to a request of the
// given operation to b. Lists that the client can continue (OpReaddir's
// entries, OpLockList's locks, OpLockPoll's grants) are cut when they get too
// long for a message, and EOF is cleared then; a reply that is too long all
// the same becomes ErrServerFault. ReplyBulk says how many bytes of
// Request.Bulk follow.
func AppendReply(b []byte, op Op, r *Reply) []byte {
	l := layoutOf(op)
	if l == nil {
		l = &opLayout{}
	}
	start := len(b)
	b = append(b, CodecVersion, 0)
	b = be.AppendUint16(b, uint16(op))
	b = be.AppendUint32(b, uint32(r.Status))
	b = be.AppendUint32(b, 0) // length of the body, known at the end
	b = be.AppendUint32(b, uint32(ReplyBulk(op, r)))
	b = be.AppendUint64(b, r.XID)
	b = be.AppendUint64(b, r.Transno)
	b = be.AppendUint64(b, r.LastCommitted)
	b = appendI64(b, r.Time)
	for _, v := range r.PreVersions {
		b = be.AppendUint64(b, v)
	}
	eof := r.EOF
	b, cut := appendReplyBody(b, r, l)
	if len(b)-start > MaxReplySize {
		b = b[:start+ReplyHeaderSize]
		be.PutUint32(b[start+4:], uint32(ErrServerFault))
		b = be.AppendUint32(b, 0)
		eof = false
	}
	b[start+1] = bits(r.Reconstructed, r.Created, eof && !cut, r.Recovering, r.Known, r.Pingless)
	be.PutUint32(b[start+8:], uint32(len(b)-start-ReplyHeaderSize))
	return b
}

const replyFlags = 0x3f

// ReplyBulk is the number of bytes of Request.Bulk that belong to the answer.
func ReplyBulk(op Op, r *Reply) int {
	if r.Status != OK || !op.FillsBulk() {
		return 0
	}
	return int(r.Count)
}

// present selects what there is to send of r.
func (r *Reply) present() repField {
	var m repField
	set := func(f repField, on bool) {
		if on {
			m |= f
		}
	}
	set(pAttr, r.HasAttr)
	set(pPre, r.Pre.Valid)
	set(pDirAttr, r.HasDir)
	set(pDirAttr2, r.HasDir2)
	set(pDirPre, r.DirPre.Valid)
	set(pDirPre2, r.DirPre2.Valid)
	set(pTruncate, r.Truncate != Truncate{})
	set(pData, len(r.Data) > 0)
	set(pEntries, len(r.Entries) > 0)
	set(pStatfs, r.Statfs != Statfs{})
	set(pCount, r.Count != 0)
	set(pObjPre, r.ObjPre.Valid)
	set(pObj, r.Obj != ObjAttr{})
	set(pFlush, r.FlushErrors != 0)
	set(pPort, r.Port != 0)
	set(pInstance, r.Instance != 0)
	set(pLock, r.Lock != nil)
	return m
}

func appendReplyBody(b []byte, r *Reply, l *opLayout) (out []byte, cut bool) {
	start := len(b)
	m := r.present() & l.rep
	b = be.AppendUint32(b, uint32(m))
	if m&pAttr != 0 {
		b = appendAttr(b, &r.Attr)
	}
	if m&pPre != 0 {
		b = appendPre(b, &r.Pre)
	}
	if m&pDirAttr != 0 {
		b = appendAttr(b, &r.DirAttr)
	}
	if m&pDirAttr2 != 0 {
		b = appendAttr(b, &r.DirAttr2)
	}
	if m&pDirPre != 0 {
		b = appendPre(b, &r.DirPre)
	}
	if m&pDirPre2 != 0 {
		b = appendPre(b, &r.DirPre2)
	}
	if m&pTruncate != 0 {
		b = be.AppendUint64(b, r.Truncate.LogID)
		b = be.AppendUint64(b, r.Truncate.Size)
	}
	if m&pData != 0 {
		b = appendBytes(b, r.Data)
	}
	if m&pEntries != 0 {
		at := len(b)
		b = be.AppendUint32(b, 0)
		n := 0
		for i := range r.Entries {
			if len(b)-start > maxReplyBody {
				cut = true
				break
			}
			b = appendDirent(b, &r.Entries[i])
			n++
		}
		be.PutUint32(b[at:], uint32(n))
	}
	if m&pStatfs != 0 {
		s := &r.Statfs
		for _, v := range [...]uint64{s.Total, s.Free, s.Avail, s.Files, s.FilesFree, s.FilesAvail} {
			b = be.AppendUint64(b, v)
		}
	}
	if m&pCount != 0 {
		b = be.AppendUint32(b, r.Count)
	}
	if m&pObjPre != 0 {
		b = appendPre(b, &r.ObjPre)
	}
	if m&pObj != 0 {
		o := &r.Obj
		b = append(b, bits(o.Exists))
		b = be.AppendUint64(b, o.Size)
		b = be.AppendUint64(b, o.Used)
		b = appendI64(b, o.Mtime)
		b = appendI64(b, o.Ctime)
		b = be.AppendUint64(b, o.Version)
	}
	if m&pFlush != 0 {
		b = be.AppendUint64(b, r.FlushErrors)
	}
	if m&pPort != 0 {
		b = be.AppendUint16(b, r.Port)
	}
	if m&pInstance != 0 {
		b = be.AppendUint64(b, r.Instance)
		b = be.AppendUint64(b, r.Tenure)
	}
	if m&pLock != 0 {
		var c bool
		b, c = appendLockReply(b, start, r.Lock)
		cut = cut || c
	}
	return b, cut
}

// DecodeReply decodes header and body, all of b, of the answer to a request of
// the given operation into r. Nothing in r aliases b; the capacity of r's Data
// and Entries is used again (names of entries live in Data's memory). bulk is
// how many bytes belong to the beginning of Request.Bulk. Errors wrap
// ErrCodec; r is Reset then.
func DecodeReply(b []byte, op Op, r *Reply) (bulk int, err error) {
	r.Reset()
	got, body, n, err := header(b, ReplyHeaderSize, "reply")
	if err != nil {
		return 0, err
	}
	l := layoutOf(op)
	switch {
	case l == nil || got != op:
		return 0, fmt.Errorf("%w: reply to operation %d, asked was %d", ErrCodec, got, op)
	case b[1]&^replyFlags != 0:
		return 0, fmt.Errorf("%w: reply with unknown flags %#x", ErrCodec, b[1])
	}
	f := b[1]
	r.Reconstructed, r.Created, r.EOF, r.Recovering, r.Known, r.Pingless = f&1 != 0, f&2 != 0, f&4 != 0, f&8 != 0, f&16 != 0, f&32 != 0
	r.Status = Status(be.Uint32(b[4:]))
	r.XID = be.Uint64(b[16:])
	r.Transno = be.Uint64(b[24:])
	r.LastCommitted = be.Uint64(b[32:])
	r.Time = int64(be.Uint64(b[40:]))
	for i := range r.PreVersions {
		r.PreVersions[i] = be.Uint64(b[48+8*i:])
	}
	d := decoder{b: body}
	decodeReplyBody(&d, r, l)
	if d.err == "" && (n > MaxBulk || int(n) != ReplyBulk(op, r)) {
		d.fail("bulk does not match the count")
	}
	if err := d.end(); err != nil {
		r.Reset()
		return 0, fmt.Errorf("reply to operation %d: %w", op, err)
	}
	return int(n), nil
}

func decodeReplyBody(d *decoder, r *Reply, l *opLayout) {
	m := repField(d.u32())
	if m&^(l.rep&^pBulk) != 0 {
		d.fail("fields that the operation does not have")
		return
	}
	if m&pAttr != 0 {
		decodeAttr(d, &r.Attr)
		r.HasAttr = true
	}
	if m&pPre != 0 {
		r.Pre = decodePre(d)
	}
	if m&pDirAttr != 0 {
		decodeAttr(d, &r.DirAttr)
		r.HasDir = true
	}
	if m&pDirAttr2 != 0 {
		decodeAttr(d, &r.DirAttr2)
		r.HasDir2 = true
	}
	if m&pDirPre != 0 {
		r.DirPre = decodePre(d)
	}
	if m&pDirPre2 != 0 {
		r.DirPre2 = decodePre(d)
	}
	if m&pTruncate != 0 {
		r.Truncate = Truncate{LogID: d.u64(), Size: d.u64()}
	}
	if m&pData != 0 {
		r.Data = append(r.Data[:0], d.bytes(MaxData)...)
	}
	if m&pEntries != 0 {
		n := d.count(MaxReplySize, minDirent)
		// Names go into one block that is large enough never to move.
		names := slices.Grow(r.Data[:0], len(d.b)-n*minDirent)
		r.Entries = slices.Grow(r.Entries[:0], n)
		for range n {
			if d.err != "" {
				break
			}
			var e Dirent
			names = decodeDirent(d, &e, names)
			r.Entries = append(r.Entries, e)
		}
		r.Data = names
	}
	if m&pStatfs != 0 {
		r.Statfs = Statfs{Total: d.u64(), Free: d.u64(), Avail: d.u64(), Files: d.u64(), FilesFree: d.u64(), FilesAvail: d.u64()}
	}
	if m&pCount != 0 {
		r.Count = d.u32()
	}
	if m&pObjPre != 0 {
		r.ObjPre = decodePre(d)
	}
	if m&pObj != 0 {
		r.Obj = ObjAttr{Exists: d.flags(1) != 0, Size: d.u64(), Used: d.u64(), Mtime: d.i64(), Ctime: d.i64(), Version: d.u64()}
	}
	if m&pFlush != 0 {
		r.FlushErrors = d.u64()
	}
	if m&pPort != 0 {
		r.Port = d.u16()
	}
	if m&pInstance != 0 {
		r.Instance, r.Tenure = d.u64(), d.u64()
	}
	if m&pLock != 0 {
		r.Lock = decodeLockReply(d)
	}
}

// Bits of an encoded Attr: which rare parts follow, and the booleans.
const (
	attrParent = 1 << iota
	attrRdev
	attrLayout
	attrEpochOpen
	attrEpochShared
	attrMtimeAt
	attrBits = 1<<iota - 1
)

func appendAttr(b []byte, a *Attr) []byte {
	f := bits(!a.Parent.IsZero(), a.RdevMajor != 0 || a.RdevMinor != 0, a.Layout != Layout{}, a.EpochOpen, a.EpochShared, a.MtimeAt != 0)
	b = append(b, f, uint8(a.Type))
	b = a.FID.Append(b)
	b = be.AppendUint32(b, a.Mode)
	b = be.AppendUint32(b, a.Nlink)
	b = be.AppendUint32(b, a.UID)
	b = be.AppendUint32(b, a.GID)
	b = be.AppendUint64(b, a.Size)
	b = be.AppendUint64(b, a.Used)
	b = appendI64(b, a.Atime)
	b = appendI64(b, a.Mtime)
	b = appendI64(b, a.Ctime)
	b = be.AppendUint32(b, a.Generation)
	b = be.AppendUint64(b, a.Version)
	if f&attrParent != 0 {
		b = a.Parent.Append(b)
	}
	if f&attrRdev != 0 {
		b = be.AppendUint32(b, a.RdevMajor)
		b = be.AppendUint32(b, a.RdevMinor)
	}
	if f&attrLayout != 0 {
		b = appendLayout(b, &a.Layout)
	}
	if f&attrMtimeAt != 0 {
		b = appendI64(b, a.MtimeAt)
	}
	return b
}

func appendLayout(b []byte, l *Layout) []byte {
	n := min(l.Count, MaxStripes)
	b = be.AppendUint32(b, l.StripeSize)
	b = append(b, n)
	for _, o := range l.OST[:n] {
		b = be.AppendUint16(b, o)
	}
	return b
}

func decodeLayout(d *decoder, l *Layout) {
	l.StripeSize = d.u32()
	if l.Count = d.u8(); l.Count > MaxStripes {
		d.fail("too many stripes")
		l.Count = 0
	}
	for i := range l.OST[:l.Count] {
		l.OST[i] = d.u16()
	}
}

func decodeAttr(d *decoder, a *Attr) {
	f := d.flags(attrBits)
	a.Type = FileType(d.u8())
	a.FID = d.fid()
	a.Mode, a.Nlink, a.UID, a.GID = d.u32(), d.u32(), d.u32(), d.u32()
	a.Size, a.Used = d.u64(), d.u64()
	a.Atime, a.Mtime, a.Ctime = d.i64(), d.i64(), d.i64()
	a.Generation, a.Version = d.u32(), d.u64()
	if f&attrParent != 0 {
		a.Parent = d.fid()
	}
	if f&attrRdev != 0 {
		a.RdevMajor, a.RdevMinor = d.u32(), d.u32()
	}
	if f&attrLayout != 0 {
		decodeLayout(d, &a.Layout)
	}
	if f&attrMtimeAt != 0 {
		a.MtimeAt = d.i64()
	}
	a.EpochOpen, a.EpochShared = f&attrEpochOpen != 0, f&attrEpochShared != 0
}

func appendPre(b []byte, p *PreAttr) []byte {
	b = be.AppendUint64(b, p.Size)
	b = appendI64(b, p.Mtime)
	return appendI64(b, p.Ctime)
}

func decodePre(d *decoder) PreAttr {
	return PreAttr{Valid: true, Size: d.u64(), Mtime: d.i64(), Ctime: d.i64()}
}

// minDirent is the encoded size of an entry without name and attributes.
const minDirent = 8 + FIDSize + 1 + 1 + 2

func appendDirent(b []byte, e *Dirent) []byte {
	b = be.AppendUint64(b, e.Cookie)
	b = e.FID.Append(b)
	b = append(b, uint8(e.Type), bits(e.HasAttr))
	b = appendBytes(b, e.Name[:min(len(e.Name), MaxNameLen)])
	if e.HasAttr {
		b = appendAttr(b, &e.Attr)
	}
	return b
}

func decodeDirent(d *decoder, e *Dirent, names []byte) []byte {
	e.Cookie, e.FID, e.Type = d.u64(), d.fid(), FileType(d.u8())
	e.HasAttr = d.flags(1) != 0
	at := len(names)
	names = append(names, d.bytes(MaxNameLen)...)
	e.Name = names[at:len(names):len(names)]
	if e.HasAttr {
		decodeAttr(d, &e.Attr)
	}
	return names
}
