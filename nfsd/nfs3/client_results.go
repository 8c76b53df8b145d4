package nfs3

import (
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The XxxRes structures are results as a client sees them. Decode overwrites
// every field; slices alias the record. A failed result (Status not Ok) is
// decoded without error and carries the attributes that came with it.

// Fattr is fattr3. Times are nanoseconds since 1970 UTC.
type Fattr struct {
	Type                 wire.FileType
	Mode, Nlink          uint32
	UID, GID             uint32
	Size, Used           uint64
	RdevMajor, RdevMinor uint32
	FSID, FileID         uint64
	Atime, Mtime, Ctime  int64
}

func (a *Fattr) decode(r *xdr.Reader) error {
	typ := r.Uint32()
	a.Mode, a.Nlink = r.Uint32(), r.Uint32()
	a.UID, a.GID = r.Uint32(), r.Uint32()
	a.Size, a.Used = r.Uint64(), r.Uint64()
	a.RdevMajor, a.RdevMinor = r.Uint32(), r.Uint32()
	a.FSID, a.FileID = r.Uint64(), r.Uint64()
	a.Atime, a.Mtime, a.Ctime = GetTime(r), GetTime(r), GetTime(r)
	if err := r.Err(); err != nil {
		return err
	}
	if typ < uint32(wire.TypeReg) || typ > uint32(wire.TypeFifo) {
		return ErrBadEnum
	}
	a.Type = wire.FileType(typ)
	return nil
}

// PostOpAttr is post_op_attr.
type PostOpAttr struct {
	Present bool
	Attr    Fattr
}

func (p *PostOpAttr) decode(r *xdr.Reader) error {
	*p = PostOpAttr{Present: r.Bool()}
	if p.Present {
		return p.Attr.decode(r)
	}
	return r.Err()
}

// Wcc is wcc_data.
type Wcc struct {
	Before wire.PreAttr
	After  PostOpAttr
}

func (c *Wcc) decode(r *xdr.Reader) error {
	c.Before = wire.PreAttr{Valid: r.Bool()}
	if c.Before.Valid {
		c.Before.Size = r.Uint64()
		c.Before.Mtime, c.Before.Ctime = GetTime(r), GetTime(r)
	}
	return c.After.decode(r)
}

func getPostOpFH(r *xdr.Reader) []byte {
	if r.Bool() {
		return GetFH(r)
	}
	return nil
}

func getStatus(r *xdr.Reader) nfs.NFSStatus { return nfs.NFSStatus(r.Uint32()) }

// GetattrRes is GETATTR3res.
type GetattrRes struct {
	Status nfs.NFSStatus
	Attr   Fattr
}

// Decode reads the result from r.
func (x *GetattrRes) Decode(r *xdr.Reader) error {
	*x = GetattrRes{Status: getStatus(r)}
	if r.Err() != nil || x.Status != nfs.NFSStatusOk {
		return r.Err()
	}
	return x.Attr.decode(r)
}

// WccRes is SETATTR3res, REMOVE3res and RMDIR3res.
type WccRes struct {
	Status nfs.NFSStatus
	Wcc    Wcc
}

// Decode reads the result from r.
func (x *WccRes) Decode(r *xdr.Reader) error {
	*x = WccRes{Status: getStatus(r)}
	return x.Wcc.decode(r)
}

// LookupRes is LOOKUP3res.
type LookupRes struct {
	Status nfs.NFSStatus
	FH     []byte
	Obj    PostOpAttr
	Dir    PostOpAttr
}

// Decode reads the result from r.
func (x *LookupRes) Decode(r *xdr.Reader) error {
	*x = LookupRes{Status: getStatus(r)}
	if x.Status == nfs.NFSStatusOk {
		x.FH = GetFH(r)
		if err := x.Obj.decode(r); err != nil {
			return err
		}
	}
	return x.Dir.decode(r)
}

// AccessRes is ACCESS3res.
type AccessRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Access uint32
}

// Decode reads the result from r.
func (x *AccessRes) Decode(r *xdr.Reader) error {
	*x = AccessRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	x.Access = r.Uint32()
	return r.Err()
}

// ReadlinkRes is READLINK3res.
type ReadlinkRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Target []byte
}

// Decode reads the result from r.
func (x *ReadlinkRes) Decode(r *xdr.Reader) error {
	*x = ReadlinkRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	x.Target = r.String(maxDecodeTarget)
	return r.Err()
}

// ReadRes is READ3res.
type ReadRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Count  uint32
	EOF    bool
	Data   []byte
}

// Decode reads the result from r.
func (x *ReadRes) Decode(r *xdr.Reader) error {
	*x = ReadRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	x.Count = r.Uint32()
	x.EOF = r.Bool()
	x.Data = r.Opaque(r.Len())
	return r.Err()
}

// WriteRes is WRITE3res.
type WriteRes struct {
	Status    nfs.NFSStatus
	Wcc       Wcc
	Count     uint32
	Committed wire.StableHow
	Verf      [WriteVerfSize]byte
}

// Decode reads the result from r.
func (x *WriteRes) Decode(r *xdr.Reader) error {
	*x = WriteRes{Status: getStatus(r)}
	if err := x.Wcc.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	x.Count = r.Uint32()
	how := r.Uint32()
	copyVerf(&x.Verf, r)
	if err := r.Err(); err != nil {
		return err
	}
	if how > uint32(wire.FileSync) {
		return ErrBadEnum
	}
	x.Committed = wire.StableHow(how)
	return nil
}

// CreateRes is CREATE3res, MKDIR3res, SYMLINK3res and MKNOD3res. FH is nil when
// the server sent none.
type CreateRes struct {
	Status nfs.NFSStatus
	FH     []byte
	Obj    PostOpAttr
	Dir    Wcc
}

// Decode reads the result from r.
func (x *CreateRes) Decode(r *xdr.Reader) error {
	*x = CreateRes{Status: getStatus(r)}
	if x.Status == nfs.NFSStatusOk {
		x.FH = getPostOpFH(r)
		if err := x.Obj.decode(r); err != nil {
			return err
		}
	}
	return x.Dir.decode(r)
}

// RenameRes is RENAME3res.
type RenameRes struct {
	Status   nfs.NFSStatus
	From, To Wcc
}

// Decode reads the result from r.
func (x *RenameRes) Decode(r *xdr.Reader) error {
	*x = RenameRes{Status: getStatus(r)}
	if err := x.From.decode(r); err != nil {
		return err
	}
	return x.To.decode(r)
}

// LinkRes is LINK3res.
type LinkRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Dir    Wcc
}

// Decode reads the result from r.
func (x *LinkRes) Decode(r *xdr.Reader) error {
	*x = LinkRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil {
		return err
	}
	return x.Dir.decode(r)
}

// DirEntry is entry3 or entryplus3.
type DirEntry struct {
	FileID uint64
	Name   []byte
	Cookie uint64
	Attr   PostOpAttr // READDIRPLUS
	FH     []byte     // READDIRPLUS; nil when the server sent none
}

// ReaddirRes is READDIR3res (Plus false before Decode) and READDIRPLUS3res
// (Plus true). Decode reuses the capacity of Entries.
type ReaddirRes struct {
	Plus       bool
	Status     nfs.NFSStatus
	Dir        PostOpAttr
	CookieVerf [CookieVerfSize]byte
	Entries    []DirEntry
	EOF        bool
}

// Decode reads the result from r.
func (x *ReaddirRes) Decode(r *xdr.Reader) error {
	*x = ReaddirRes{Plus: x.Plus, Entries: x.Entries[:0], Status: getStatus(r)}
	if err := x.Dir.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	copyVerf(&x.CookieVerf, r)
	for r.Bool() {
		e := DirEntry{FileID: r.Uint64(), Name: r.String(maxDecodeName), Cookie: r.Uint64()}
		if x.Plus {
			if err := e.Attr.decode(r); err != nil {
				return err
			}
			e.FH = getPostOpFH(r)
		}
		if err := r.Err(); err != nil {
			return err
		}
		x.Entries = append(x.Entries, e)
	}
	x.EOF = r.Bool()
	return r.Err()
}

// FSStatRes is FSSTAT3res. Invarsec is in seconds.
type FSStatRes struct {
	Status   nfs.NFSStatus
	Obj      PostOpAttr
	Statfs   wire.Statfs
	Invarsec uint32
}

// Decode reads the result from r.
func (x *FSStatRes) Decode(r *xdr.Reader) error {
	*x = FSStatRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	s := &x.Statfs
	s.Total, s.Free, s.Avail = r.Uint64(), r.Uint64(), r.Uint64()
	s.Files, s.FilesFree, s.FilesAvail = r.Uint64(), r.Uint64(), r.Uint64()
	x.Invarsec = r.Uint32()
	return r.Err()
}

// FSInfoRes is FSINFO3res.
type FSInfoRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Info   FSInfo
}

// Decode reads the result from r.
func (x *FSInfoRes) Decode(r *xdr.Reader) error {
	*x = FSInfoRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	f := &x.Info
	f.RTMax, f.RTPref, f.RTMult = r.Uint32(), r.Uint32(), r.Uint32()
	f.WTMax, f.WTPref, f.WTMult = r.Uint32(), r.Uint32(), r.Uint32()
	f.DTPref = r.Uint32()
	f.MaxFileSize = r.Uint64()
	f.TimeDelta = GetTime(r)
	f.Properties = r.Uint32()
	return r.Err()
}

// PathConfRes is PATHCONF3res.
type PathConfRes struct {
	Status nfs.NFSStatus
	Obj    PostOpAttr
	Conf   PathConf
}

// Decode reads the result from r.
func (x *PathConfRes) Decode(r *xdr.Reader) error {
	*x = PathConfRes{Status: getStatus(r)}
	if err := x.Obj.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	p := &x.Conf
	p.LinkMax, p.NameMax = r.Uint32(), r.Uint32()
	p.NoTrunc, p.ChownRestricted = r.Bool(), r.Bool()
	p.CaseInsensitive, p.CasePreserving = r.Bool(), r.Bool()
	return r.Err()
}

// CommitRes is COMMIT3res.
type CommitRes struct {
	Status nfs.NFSStatus
	Wcc    Wcc
	Verf   [WriteVerfSize]byte
}

// Decode reads the result from r.
func (x *CommitRes) Decode(r *xdr.Reader) error {
	*x = CommitRes{Status: getStatus(r)}
	if err := x.Wcc.decode(r); err != nil || x.Status != nfs.NFSStatusOk {
		return err
	}
	copyVerf(&x.Verf, r)
	return r.Err()
}
