package mdt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Inode is an object of the name space as the MDT stores it. In the cache it is
// an immutable snapshot: changes replace it.
type Inode struct {
	Attr wire.Attr

	// Directories.
	NextCookie uint64 // cookie of the next entry, from FirstCookie
	Entries    uint64 // entries without "." and ".."
	// DirStripeSize and DirStripeCount are the default layout of files made
	// below; Count 0 means the target's default.
	DirStripeSize  uint32
	DirStripeCount uint8

	// Regular files.
	HasVerf bool // Verf is the verifier of the exclusive create
	Verf    [8]byte
	HadData bool // the OSTs may have objects
	// Opens counts the clients that have an IO epoch open; Opener is the
	// client when there is only one.
	Opens  uint16
	Opener wire.ClientID
	// SizeVersion is the transno of the last operation that made the MDT's
	// size invalid: an epoch opened or a truncate.
	SizeVersion uint64

	link []byte // cached symlink target
}

// FirstCookie is the cookie of a directory's first entry; "." and ".." have 1
// and 2.
const FirstCookie = 3

// LogKind tells what a log record asks of the OSTs.
type LogKind uint8

// Kinds of log records.
const (
	LogUnlink   LogKind = 1
	LogTruncate LogKind = 2
)

// LogRec is a record of the unlink and truncate log: work that the OSTs have
// yet to do.
type LogRec struct {
	ID     uint64 // transno of the operation
	Kind   LogKind
	FID    wire.FID
	Layout wire.Layout
	Size   uint64 // LogTruncate: the new size
	// Client made it with Tenure, and punches the objects of a truncate. Zero: not
	// known.
	Client wire.ClientID
	Tenure uint64
}

// EpochRec is an open IO epoch.
type EpochRec struct {
	Transno uint64 // of the operation that opened it
	Tenure  uint64 // that its client had then; 0: not known
}

// Entry is a directory entry.
type Entry struct {
	FID    wire.FID
	Type   wire.FileType
	Cookie uint64
}

// Super is the superblock.
type Super struct {
	NextSeq uint64 // FID sequence of the next start
}

// ClientEntry is an entry of the client table.
type ClientEntry struct {
	recov.ClientRecord
	// Tenure numbers the entry among all that the target has ever made.
	Tenure uint64
}

// FenceRec is an eviction of which OSTs are still to be told: they have to refuse
// what the client sent with a lower tenure.
type FenceRec struct {
	Tenure uint64
	OSTs   []uint16 // ascending
}

// State is the part of the superblock that every transaction writes.
type State struct {
	Transno uint64 // of the transaction
	Time    int64  // newest timestamp given
	Inodes  uint64 // number of inodes
}

// Key prefixes, docs/design.md section 4.
const (
	prefixInode  = 'i'
	prefixName   = 'd'
	prefixCookie = 'c'
	prefixLink   = 's'
	prefixLog    = 'l'
	prefixEpoch  = 'e'
	prefixMeta   = 'm'
	prefixSlot   = 'x'

	metaClient = 'c'
	metaFence  = 'f'
	metaVIP    = 'v'
)

var (
	keySuper  = []byte("ms")
	keyState  = []byte("mt")
	keyTarget = []byte("mr")
)

// Formats of records. Those that have changed are read in the older form, too.
const (
	recFormat  = 1
	recFormat2 = 2
)

var errRecord = errors.New("malformed record")

var be = binary.BigEndian

func appendInodeKey(b []byte, f wire.FID) []byte { return f.Append(append(b, prefixInode)) }
func appendLinkKey(b []byte, f wire.FID) []byte  { return f.Append(append(b, prefixLink)) }
func appendLogKey(b []byte, id uint64) []byte    { return be.AppendUint64(append(b, prefixLog), id) }

func appendNameKey(b []byte, dir wire.FID, name []byte) []byte {
	return append(dir.Append(append(b, prefixName)), name...)
}

func appendCookieKey(b []byte, dir wire.FID, cookie uint64) []byte {
	return be.AppendUint64(dir.Append(append(b, prefixCookie)), cookie)
}

func appendEpochKey(b []byte, f wire.FID, c wire.ClientID) []byte {
	return append(f.Append(append(b, prefixEpoch)), c[:]...)
}

func appendClientKey(b []byte, c wire.ClientID) []byte {
	return append(append(b, prefixMeta, metaClient), c[:]...)
}

func appendFenceKey(b []byte, c wire.ClientID) []byte {
	return append(append(b, prefixMeta, metaFence), c[:]...)
}

func appendVIPKey(b []byte, vip uint32) []byte {
	return be.AppendUint32(append(b, prefixMeta, metaVIP), vip)
}

func appendSlotKey(b []byte, c wire.ClientID, slot uint16) []byte {
	return be.AppendUint16(append(append(b, prefixSlot), c[:]...), slot)
}

// Flags of stored inodes.
const (
	inoVerf = 1 << iota
	inoHadData
	inoOpen
	inoMtimeAt
)

const inodeHead = 1 + 1 + 2 + 6*4 + 2*8 + 3*8 + 4 + 8

// AppendInode appends the stored form of in. The FID is in the key.
func AppendInode(b []byte, in *Inode) []byte {
	a := &in.Attr
	var flags uint16
	if in.HasVerf {
		flags |= inoVerf
	}
	if in.HadData {
		flags |= inoHadData
	}
	if in.Opens > 0 {
		flags |= inoOpen
	}
	if a.MtimeAt != 0 {
		flags |= inoMtimeAt
	}
	b = append(b, recFormat, byte(a.Type))
	b = be.AppendUint16(b, flags)
	for _, v := range [...]uint32{a.Mode, a.Nlink, a.UID, a.GID, a.RdevMajor, a.RdevMinor} {
		b = be.AppendUint32(b, v)
	}
	for _, v := range [...]uint64{a.Size, a.Used, uint64(a.Atime), uint64(a.Mtime), uint64(a.Ctime)} {
		b = be.AppendUint64(b, v)
	}
	b = be.AppendUint32(b, a.Generation)
	b = be.AppendUint64(b, a.Version)
	switch a.Type {
	case wire.TypeDir:
		b = a.Parent.Append(b)
		b = be.AppendUint64(b, in.NextCookie)
		b = be.AppendUint64(b, in.Entries)
		b = be.AppendUint32(b, in.DirStripeSize)
		b = append(b, in.DirStripeCount)
	case wire.TypeReg:
		b = be.AppendUint64(b, in.SizeVersion)
		b = appendLayout(b, &a.Layout)
		if in.HasVerf {
			b = append(b, in.Verf[:]...)
		}
		if in.Opens > 0 {
			b = be.AppendUint16(b, in.Opens)
			b = append(b, in.Opener[:]...)
		}
		if a.MtimeAt != 0 {
			b = be.AppendUint64(b, uint64(a.MtimeAt))
		}
	}
	return b
}

func appendLayout(b []byte, l *wire.Layout) []byte {
	b = be.AppendUint32(b, l.StripeSize)
	n := min(l.Count, wire.MaxStripes)
	b = append(b, n)
	for _, o := range l.OST[:n] {
		b = be.AppendUint16(b, o)
	}
	return b
}

func getLayout(v []byte) (l wire.Layout, rest []byte, err error) {
	if len(v) < 5 || v[4] > wire.MaxStripes || len(v) < 5+2*int(v[4]) {
		return l, nil, errRecord
	}
	l.StripeSize, l.Count = be.Uint32(v), v[4]
	if l.Count > 0 && l.StripeSize == 0 {
		return l, nil, errRecord
	}
	v = v[5:]
	for i := range int(l.Count) {
		l.OST[i] = be.Uint16(v[2*i:])
	}
	return l, v[2*int(l.Count):], nil
}

// DecodeInode decodes what AppendInode wrote for the object f.
func DecodeInode(f wire.FID, v []byte) (*Inode, error) {
	if len(v) < inodeHead || v[0] != recFormat {
		return nil, fmt.Errorf("inode %v: %w", f, errRecord)
	}
	in := &Inode{}
	a := &in.Attr
	a.FID, a.Type = f, wire.FileType(v[1])
	flags := be.Uint16(v[2:])
	if a.Type < wire.TypeReg || a.Type > wire.TypeFifo || flags > inoVerf|inoHadData|inoOpen|inoMtimeAt {
		return nil, fmt.Errorf("inode %v: %w", f, errRecord)
	}
	for i, p := range [...]*uint32{&a.Mode, &a.Nlink, &a.UID, &a.GID, &a.RdevMajor, &a.RdevMinor} {
		*p = be.Uint32(v[4+4*i:])
	}
	a.Size, a.Used = be.Uint64(v[28:]), be.Uint64(v[36:])
	a.Atime, a.Mtime, a.Ctime = int64(be.Uint64(v[44:])), int64(be.Uint64(v[52:])), int64(be.Uint64(v[60:]))
	a.Generation, a.Version = be.Uint32(v[68:]), be.Uint64(v[72:])
	v = v[inodeHead:]
	in.HadData = flags&inoHadData != 0
	switch a.Type {
	case wire.TypeDir:
		if len(v) != wire.FIDSize+8+8+4+1 || v[36] > wire.MaxStripes {
			return nil, fmt.Errorf("inode %v: %w", f, errRecord)
		}
		a.Parent = wire.GetFID(v)
		in.NextCookie, in.Entries = be.Uint64(v[16:]), be.Uint64(v[24:])
		in.DirStripeSize, in.DirStripeCount = be.Uint32(v[32:]), v[36]
		return in, nil
	case wire.TypeReg:
		if len(v) < 8 {
			return nil, fmt.Errorf("inode %v: %w", f, errRecord)
		}
		in.SizeVersion = be.Uint64(v)
		var err error
		if a.Layout, v, err = getLayout(v[8:]); err != nil {
			return nil, fmt.Errorf("inode %v: %w", f, err)
		}
		if flags&inoVerf != 0 {
			if len(v) < 8 {
				return nil, fmt.Errorf("inode %v: %w", f, errRecord)
			}
			in.HasVerf = true
			v = v[copy(in.Verf[:], v):]
		}
		if flags&inoOpen != 0 {
			if len(v) < 18 {
				return nil, fmt.Errorf("inode %v: %w", f, errRecord)
			}
			in.Opens = be.Uint16(v)
			copy(in.Opener[:], v[2:])
			a.EpochOpen, a.EpochShared = in.Opens > 0, in.Opens > 1
			if in.Opens == 0 {
				return nil, fmt.Errorf("inode %v: %w", f, errRecord)
			}
			v = v[18:]
		}
		if flags&inoMtimeAt != 0 {
			if len(v) < 8 || be.Uint64(v) == 0 {
				return nil, fmt.Errorf("inode %v: %w", f, errRecord)
			}
			a.MtimeAt = int64(be.Uint64(v))
			v = v[8:]
		}
	}
	if len(v) != 0 {
		return nil, fmt.Errorf("inode %v: %w", f, errRecord)
	}
	return in, nil
}

// AppendEntry appends the stored form of a name's entry (`d` keys).
func AppendEntry(b []byte, e *Entry) []byte {
	b = e.FID.Append(append(b, recFormat))
	b = append(b, byte(e.Type))
	return be.AppendUint64(b, e.Cookie)
}

// DecodeEntry decodes what AppendEntry wrote.
func DecodeEntry(v []byte) (Entry, error) {
	if len(v) != 26 || v[0] != recFormat || v[17] < byte(wire.TypeReg) || v[17] > byte(wire.TypeFifo) {
		return Entry{}, fmt.Errorf("directory entry: %w", errRecord)
	}
	return Entry{FID: wire.GetFID(v[1:]), Type: wire.FileType(v[17]), Cookie: be.Uint64(v[18:])}, nil
}

func appendCookieRec(b []byte, f wire.FID, t wire.FileType, name []byte) []byte {
	b = f.Append(append(b, recFormat))
	return append(append(b, byte(t)), name...)
}

// DecodeCookieRec decodes the value of a `c` key; name aliases v.
func DecodeCookieRec(v []byte) (f wire.FID, t wire.FileType, name []byte, err error) {
	if len(v) < 19 || len(v) > 18+wire.MaxNameLen || v[0] != recFormat ||
		v[17] < byte(wire.TypeReg) || v[17] > byte(wire.TypeFifo) {
		return f, 0, nil, fmt.Errorf("directory cookie: %w", errRecord)
	}
	return wire.GetFID(v[1:]), wire.FileType(v[17]), v[18:], nil
}

// AppendLogRec appends the stored form of a log record; its ID is in the key.
// Without a client it is that of older versions.
func AppendLogRec(b []byte, l *LogRec) []byte {
	format := byte(recFormat)
	if l.Client != (wire.ClientID{}) {
		format = recFormat2
	}
	b = l.FID.Append(append(b, format, byte(l.Kind)))
	b = be.AppendUint64(b, l.Size)
	if format == recFormat2 {
		b = be.AppendUint64(append(b, l.Client[:]...), l.Tenure)
	}
	return appendLayout(b, &l.Layout)
}

// DecodeLogRec decodes what AppendLogRec wrote.
func DecodeLogRec(id uint64, v []byte) (LogRec, error) {
	bad := func() (LogRec, error) { return LogRec{}, fmt.Errorf("log record %d: %w", id, errRecord) }
	if len(v) < 26 || v[0] < recFormat || v[0] > recFormat2 || v[1] < byte(LogUnlink) || v[1] > byte(LogTruncate) {
		return bad()
	}
	l := LogRec{ID: id, Kind: LogKind(v[1]), FID: wire.GetFID(v[2:]), Size: be.Uint64(v[18:])}
	rest := v[26:]
	if v[0] == recFormat2 {
		if len(rest) < len(l.Client)+8 {
			return bad()
		}
		if rest = rest[copy(l.Client[:], rest):]; l.Client == (wire.ClientID{}) {
			return bad()
		}
		l.Tenure, rest = be.Uint64(rest), rest[8:]
	}
	var err error
	if l.Layout, rest, err = getLayout(rest); err != nil || len(rest) != 0 {
		return bad()
	}
	return l, nil
}

// AppendEpoch appends the stored form of an IO epoch; file and client are in the key.
func AppendEpoch(b []byte, e EpochRec) []byte {
	return be.AppendUint64(be.AppendUint64(append(b, recFormat2), e.Transno), e.Tenure)
}

// DecodeEpoch decodes what AppendEpoch or an older version wrote.
func DecodeEpoch(v []byte) (EpochRec, error) {
	if len(v) == 17 && v[0] == recFormat2 {
		return EpochRec{Transno: be.Uint64(v[1:]), Tenure: be.Uint64(v[9:])}, nil
	}
	n, err := decodeU64Rec(v)
	return EpochRec{Transno: n}, err
}

// The last byte of the superblock is not used any more: whether the last stop was
// orderly is in the target record.
func appendSuper(b []byte, s *Super) []byte {
	return append(be.AppendUint64(append(b, recFormat), s.NextSeq), 0)
}

// DecodeSuper decodes the superblock.
func DecodeSuper(v []byte) (Super, error) {
	if len(v) != 10 || v[0] != recFormat || v[9] > 1 {
		return Super{}, fmt.Errorf("superblock: %w", errRecord)
	}
	return Super{NextSeq: be.Uint64(v[1:])}, nil
}

// seal appends the checksum of a record that starts at from. What fences depend on
// has one, since an error in it would be noticed by nothing else.
func seal(b []byte, from int) []byte {
	return be.AppendUint32(b, crc32.Checksum(b[from:], castagnoli))
}

// unseal checks and removes what seal has appended.
func unseal(v []byte) ([]byte, bool) {
	n := len(v) - 4
	if n < 0 || crc32.Checksum(v[:n], castagnoli) != be.Uint32(v[n:]) {
		return nil, false
	}
	return v[:n], true
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// AppendClient appends the stored form of an entry of the client table.
func AppendClient(b []byte, c *ClientEntry) []byte {
	n := len(b)
	return seal(c.ClientRecord.Append(be.AppendUint64(append(b, recFormat2), c.Tenure)), n)
}

// DecodeClient decodes what AppendClient wrote for the client id. Older versions
// wrote the generation alone, and only of clients in the target's process: the
// entry is Local and has no tenure then.
func DecodeClient(id wire.ClientID, v []byte) (ClientEntry, error) {
	if gen, err := decodeU64Rec(v); err == nil {
		return ClientEntry{ClientRecord: recov.ClientRecord{Client: id, Gen: gen, Local: true}}, nil
	}
	v, ok := unseal(v)
	if !ok || len(v) < 9 || v[0] != recFormat2 {
		return ClientEntry{}, fmt.Errorf("client %x: %w", id, errRecord)
	}
	c := ClientEntry{Tenure: be.Uint64(v[1:])}
	if err := c.Decode(v[9:]); err != nil {
		return ClientEntry{}, fmt.Errorf("client %x: %w", id, err)
	}
	if c.Client != id || c.Tenure == 0 {
		return ClientEntry{}, fmt.Errorf("client %x: %w", id, errRecord)
	}
	return c, nil
}

// AppendFence appends the stored form of a fence; its client is in the key.
func AppendFence(b []byte, f *FenceRec) []byte {
	n := len(b)
	b = be.AppendUint64(append(b, recFormat), f.Tenure)
	for _, o := range f.OSTs {
		b = be.AppendUint16(b, o)
	}
	return seal(b, n)
}

// DecodeFence decodes what AppendFence wrote.
func DecodeFence(v []byte) (FenceRec, error) {
	v, ok := unseal(v)
	if !ok || len(v) < 11 || len(v)%2 == 0 || v[0] != recFormat {
		return FenceRec{}, fmt.Errorf("fence: %w", errRecord)
	}
	f := FenceRec{Tenure: be.Uint64(v[1:])}
	for v = v[9:]; len(v) > 0; v = v[2:] {
		o := be.Uint16(v)
		if n := len(f.OSTs); n > 0 && f.OSTs[n-1] >= o {
			return FenceRec{}, fmt.Errorf("fence: %w", errRecord)
		}
		f.OSTs = append(f.OSTs, o)
	}
	return f, nil
}

func appendState(b []byte, s *State) []byte {
	b = be.AppendUint64(append(b, recFormat), s.Transno)
	b = be.AppendUint64(b, uint64(s.Time))
	return be.AppendUint64(b, s.Inodes)
}

// DecodeState decodes the superblock's transaction part.
func DecodeState(v []byte) (State, error) {
	if len(v) != 25 || v[0] != recFormat {
		return State{}, fmt.Errorf("superblock state: %w", errRecord)
	}
	return State{Transno: be.Uint64(v[1:]), Time: int64(be.Uint64(v[9:])), Inodes: be.Uint64(v[17:])}, nil
}

func appendU64Rec(b []byte, n uint64) []byte { return be.AppendUint64(append(b, recFormat), n) }

func decodeU64Rec(v []byte) (uint64, error) {
	if len(v) != 9 || v[0] != recFormat {
		return 0, errRecord
	}
	return be.Uint64(v[1:]), nil
}
