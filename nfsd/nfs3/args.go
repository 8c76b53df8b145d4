package nfs3

import (
	"math"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Every XxxArgs structure decodes the argument of the procedure of that name
// with Decode. Slices alias the record and are valid as long as it is. Decode
// overwrites every field.

// FHArgs is the argument of GETATTR, READLINK, FSSTAT, FSINFO and PATHCONF.
type FHArgs struct {
	FH []byte
}

// Decode reads the argument from r.
func (a *FHArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	return r.Err()
}

// DirOpArgs is diropargs3, the argument of LOOKUP, REMOVE and RMDIR.
type DirOpArgs struct {
	FH   []byte // directory
	Name []byte // up to 4096 bytes; see CheckName
}

// Decode reads the argument from r.
func (a *DirOpArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	return r.Err()
}

// SetattrArgs is SETATTR3args.
type SetattrArgs struct {
	FH         []byte
	Attr       wire.SetAttr
	Guard      bool  // sattrguard3.check
	GuardCtime int64 // ns since 1970; when Guard is set
}

// Decode reads the argument from r.
func (a *SetattrArgs) Decode(r *xdr.Reader) error {
	var err error
	a.FH = GetFH(r)
	if a.Attr, err = GetSattr(r); err != nil {
		return err
	}
	a.GuardCtime = 0
	if a.Guard = r.Bool(); a.Guard {
		a.GuardCtime = GetTime(r)
	}
	return r.Err()
}

// AccessArgs is ACCESS3args.
type AccessArgs struct {
	FH     []byte
	Access uint32
}

// Decode reads the argument from r.
func (a *AccessArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Access = r.Uint32()
	return r.Err()
}

// ReadArgs is READ3args. The server bounds Count by its rtmax.
type ReadArgs struct {
	FH     []byte
	Offset uint64
	Count  uint32
}

// Decode reads the argument from r.
func (a *ReadArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Offset = r.Uint64()
	a.Count = r.Uint32()
	return r.Err()
}

// WriteArgs is WRITE3args. Data aliases the record.
type WriteArgs struct {
	FH     []byte
	Offset uint64
	Count  uint32
	Stable wire.StableHow
	Data   []byte
}

// Decode reads the argument from r. The data's length is bounded by the record.
func (a *WriteArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Offset = r.Uint64()
	a.Count = r.Uint32()
	how := r.Uint32()
	a.Stable = wire.StableHow(how)
	a.Data = r.Opaque(r.Len())
	if err := r.Err(); err != nil {
		return err
	}
	if how > uint32(wire.FileSync) {
		return ErrBadEnum
	}
	return nil
}

// Check classifies the values: a count that differs from the data's length is
// ErrInval (RFC 1813 section 3.3.7), an end above wire.MaxFileSize ErrFBig.
func (a *WriteArgs) Check() wire.Status {
	if uint64(a.Count) != uint64(len(a.Data)) {
		return wire.ErrInval
	}
	if a.Offset > wire.MaxFileSize || uint64(a.Count) > wire.MaxFileSize-a.Offset {
		return wire.ErrFBig
	}
	return wire.OK
}

// CreateArgs is CREATE3args. Attr is valid for Unchecked and Guarded, Verf for
// Exclusive.
type CreateArgs struct {
	FH   []byte
	Name []byte
	How  wire.CreateHow
	Attr wire.SetAttr
	Verf [CreateVerfSize]byte
}

// Decode reads the argument from r.
func (a *CreateArgs) Decode(r *xdr.Reader) error {
	var err error
	a.FH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	how := r.Uint32()
	if err = r.Err(); err != nil {
		return err
	}
	a.How, a.Attr, a.Verf = wire.CreateHow(how), wire.SetAttr{}, [CreateVerfSize]byte{}
	switch {
	case how <= uint32(wire.Guarded):
		a.Attr, err = GetSattr(r)
		return err
	case how == uint32(wire.Exclusive):
		copy(a.Verf[:], r.FixedOpaque(CreateVerfSize))
		return r.Err()
	}
	return ErrBadEnum
}

// MkdirArgs is MKDIR3args.
type MkdirArgs struct {
	FH   []byte
	Name []byte
	Attr wire.SetAttr
}

// Decode reads the argument from r.
func (a *MkdirArgs) Decode(r *xdr.Reader) error {
	var err error
	a.FH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	a.Attr, err = GetSattr(r)
	return err
}

// SymlinkArgs is SYMLINK3args.
type SymlinkArgs struct {
	FH     []byte
	Name   []byte
	Attr   wire.SetAttr
	Target []byte // up to 8192 bytes; see CheckTarget
}

// Decode reads the argument from r.
func (a *SymlinkArgs) Decode(r *xdr.Reader) error {
	var err error
	a.FH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	if a.Attr, err = GetSattr(r); err != nil {
		return err
	}
	a.Target = r.String(maxDecodeTarget)
	return r.Err()
}

// MknodArgs is MKNOD3args. For regular files, directories and links, which
// MKNOD does not make, only Type is set and Check gives ErrBadType.
type MknodArgs struct {
	FH                   []byte
	Name                 []byte
	Type                 wire.FileType
	Attr                 wire.SetAttr
	RdevMajor, RdevMinor uint32 // character and block devices
}

// Decode reads the argument from r.
func (a *MknodArgs) Decode(r *xdr.Reader) error {
	var err error
	a.FH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	typ := r.Uint32()
	if err = r.Err(); err != nil {
		return err
	}
	a.Attr, a.RdevMajor, a.RdevMinor = wire.SetAttr{}, 0, 0
	if typ < uint32(wire.TypeReg) || typ > uint32(wire.TypeFifo) {
		return ErrBadEnum
	}
	a.Type = wire.FileType(typ)
	switch a.Type {
	case wire.TypeChr, wire.TypeBlk:
		if a.Attr, err = GetSattr(r); err != nil {
			return err
		}
		a.RdevMajor, a.RdevMinor = r.Uint32(), r.Uint32()
	case wire.TypeSock, wire.TypeFifo:
		if a.Attr, err = GetSattr(r); err != nil {
			return err
		}
	}
	return r.Err()
}

// Check gives ErrBadType for the types that MKNOD does not make.
func (a *MknodArgs) Check() wire.Status {
	switch a.Type {
	case wire.TypeChr, wire.TypeBlk, wire.TypeSock, wire.TypeFifo:
		return wire.OK
	}
	return wire.ErrBadType
}

// RenameArgs is RENAME3args.
type RenameArgs struct {
	FromFH, FromName []byte
	ToFH, ToName     []byte
}

// Decode reads the argument from r.
func (a *RenameArgs) Decode(r *xdr.Reader) error {
	a.FromFH = GetFH(r)
	a.FromName = r.String(maxDecodeName)
	a.ToFH = GetFH(r)
	a.ToName = r.String(maxDecodeName)
	return r.Err()
}

// LinkArgs is LINK3args.
type LinkArgs struct {
	FH    []byte // existing object
	DirFH []byte
	Name  []byte
}

// Decode reads the argument from r.
func (a *LinkArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.DirFH = GetFH(r)
	a.Name = r.String(maxDecodeName)
	return r.Err()
}

// ReaddirArgs is READDIR3args. Count bounds the size of READDIR3resok in bytes.
type ReaddirArgs struct {
	FH         []byte
	Cookie     uint64
	CookieVerf [CookieVerfSize]byte
	Count      uint32
}

// Decode reads the argument from r.
func (a *ReaddirArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Cookie = r.Uint64()
	copyVerf(&a.CookieVerf, r)
	a.Count = r.Uint32()
	return r.Err()
}

// ReaddirplusArgs is READDIRPLUS3args. DirCount bounds the bytes of names,
// cookies and fileids, MaxCount the size of READDIRPLUS3resok.
type ReaddirplusArgs struct {
	FH         []byte
	Cookie     uint64
	CookieVerf [CookieVerfSize]byte
	DirCount   uint32
	MaxCount   uint32
}

// Decode reads the argument from r.
func (a *ReaddirplusArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Cookie = r.Uint64()
	copyVerf(&a.CookieVerf, r)
	a.DirCount = r.Uint32()
	a.MaxCount = r.Uint32()
	return r.Err()
}

// CommitArgs is COMMIT3args. Count 0 means to the end of the file.
type CommitArgs struct {
	FH     []byte
	Offset uint64
	Count  uint32
}

// Decode reads the argument from r.
func (a *CommitArgs) Decode(r *xdr.Reader) error {
	a.FH = GetFH(r)
	a.Offset = r.Uint64()
	a.Count = r.Uint32()
	return r.Err()
}

// Check gives ErrInval when the range wraps around 2^64, as knfsd does.
func (a *CommitArgs) Check() wire.Status {
	if a.Offset > math.MaxUint64-uint64(a.Count) {
		return wire.ErrInval
	}
	return wire.OK
}

func copyVerf(dst *[8]byte, r *xdr.Reader) {
	*dst = [8]byte{}
	copy(dst[:], r.FixedOpaque(8))
}
