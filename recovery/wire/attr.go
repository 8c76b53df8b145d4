package wire

// FileType is an object's type with the numbers of ftype3 (RFC 1813 section 2.6).
type FileType uint8

// File types.
const (
	TypeReg  FileType = 1
	TypeDir  FileType = 2
	TypeBlk  FileType = 3
	TypeChr  FileType = 4
	TypeLnk  FileType = 5
	TypeSock FileType = 6
	TypeFifo FileType = 7
)

// MaxStripes is the largest number of OSTs that one file is spread over.
const MaxStripes = 16

// Limits of the name space.
const (
	MaxNameLen    = 255
	MaxSymlinkLen = 4095
	MaxLinks      = 65000
	// MaxFileSize is the largest file size and offset, 2^63-1 bytes.
	MaxFileSize = 1<<63 - 1
)

// Layout tells where a regular file's data is: byte b is in stripe
// (b / StripeSize) % Count, on OST[stripe]. The zero Layout (Count 0) belongs
// to objects that have no data.
type Layout struct {
	StripeSize uint32 // bytes, a multiple of 64 KiB
	Count      uint8  // 1..MaxStripes
	OST        [MaxStripes]uint16
}

// Attr holds an object's attributes. Times are nanoseconds since 1970 UTC.
type Attr struct {
	FID        FID
	Type       FileType
	Mode       uint32 // permission bits and setuid/setgid/sticky (07777)
	Nlink      uint32
	UID, GID   uint32
	RdevMajor  uint32
	RdevMinor  uint32
	Size       uint64 // bytes
	Used       uint64 // bytes allocated
	Atime      int64
	Mtime      int64
	Ctime      int64
	Generation uint32
	// Version is the transno of the last change (version-based recovery).
	Version uint64
	// Parent is the parent directory; directories only.
	Parent FID
	Layout Layout
	// EpochOpen tells that an IO epoch is open: Size, Used, Mtime and Ctime
	// are then hints and the OSTs have the truth.
	EpochOpen bool
	// EpochShared tells that more than one client has an IO epoch open.
	EpochShared bool
	// MtimeAt is the ctime that Mtime belongs to, when what changed since at the
	// MDT has left Mtime alone and an IO epoch is open; 0: Ctime.
	MtimeAt int64
}

// MtimeSince is the ctime of the change that set Mtime last, as far as a tells.
func (a *Attr) MtimeSince() int64 {
	if a.MtimeAt != 0 {
		return a.MtimeAt
	}
	return a.Ctime
}

// Merge makes a, of a file in an IO epoch, follow the times of its objects: the
// newest change decides ctime, the newest that sets mtime decides that. ctime is 0
// when there are no objects.
func (a *Attr) Merge(mtime, ctime int64) {
	at := a.MtimeSince()
	if ctime > at {
		a.Mtime, at = mtime, ctime
	}
	a.Ctime = max(a.Ctime, ctime)
	if a.MtimeAt = at; at == a.Ctime {
		a.MtimeAt = 0
	}
}

// PreAttr is what weak cache consistency data needs of an object's state
// before an operation (RFC 1813 wcc_attr).
type PreAttr struct {
	Valid        bool
	Size         uint64
	Mtime, Ctime int64
}

// Pre returns the wcc_attr of a.
func (a *Attr) Pre() PreAttr {
	return PreAttr{Valid: true, Size: a.Size, Mtime: a.Mtime, Ctime: a.Ctime}
}

// SetMask selects the fields of a SetAttr.
type SetMask uint16

// SetAttr fields. SetAtimeNow and SetMtimeNow ask for the server's clock.
const (
	SetMode SetMask = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime
	SetMtime
	SetAtimeNow
	SetMtimeNow
)

// SetAttr lists attributes to set (RFC 1813 sattr3).
type SetAttr struct {
	Mask         SetMask
	Mode         uint32
	UID, GID     uint32
	Size         uint64
	Atime, Mtime int64
}

// Cred is the identity an operation runs as, after the export's squash rules.
type Cred struct {
	UID, GID uint32
	NGIDs    uint8
	GIDs     [16]uint32
}

// InGroup tells whether gid is the credential's primary or a supplementary group.
func (c *Cred) InGroup(gid uint32) bool {
	if c.GID == gid {
		return true
	}
	for i := 0; i < int(c.NGIDs) && i < len(c.GIDs); i++ {
		if c.GIDs[i] == gid {
			return true
		}
	}
	return false
}

// Permission bits for MayAccess.
const (
	MayRead  = 4
	MayWrite = 2
	MayExec  = 1
)

// MayAccess checks the POSIX permission bits of a for c: want is a mask of
// MayRead, MayWrite and MayExec. UID 0 may do everything, but may execute a
// regular file only if some execute bit is set.
func MayAccess(a *Attr, c *Cred, want uint32) bool {
	if c.UID == 0 {
		if want&MayExec != 0 && a.Type != TypeDir && a.Mode&0o111 == 0 {
			return false
		}
		return true
	}
	m := a.Mode
	switch {
	case c.UID == a.UID:
		m >>= 6
	case c.InGroup(a.GID):
		m >>= 3
	}
	return m&want == want
}
