package billyfs

import (
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/willscott/go-nfs/file"

	"github.com/baton-nfs/baton/recovery/wire"
)

// FileInfo describes an object. It implements fs.FileInfo.
type FileInfo struct {
	name string
	attr wire.Attr
}

func newInfo(p string, a *wire.Attr) *FileInfo { return &FileInfo{name: path.Base(p), attr: *a} }

// Name is the last component of the path that was asked for.
func (i *FileInfo) Name() string { return i.name }

// Size is the length in bytes.
func (i *FileInfo) Size() int64 { return int64(min(i.attr.Size, wire.MaxFileSize)) }

// Mode gives type, permission, setuid, setgid and sticky bits.
func (i *FileInfo) Mode() fs.FileMode { return fileMode(&i.attr) }

// ModTime is the time of the last modification.
func (i *FileInfo) ModTime() time.Time { return time.Unix(0, i.attr.Mtime) }

// IsDir tells whether the object is a directory.
func (i *FileInfo) IsDir() bool { return i.attr.Type == wire.TypeDir }

// Sys returns a *file.FileInfo of github.com/willscott/go-nfs/file, which is
// what go-nfs looks for. Attr has everything else.
func (i *FileInfo) Sys() any {
	a := &i.attr
	return &file.FileInfo{
		Nlink: a.Nlink, UID: a.UID, GID: a.GID,
		Major: a.RdevMajor, Minor: a.RdevMinor, Fileid: a.FID.FileID(),
	}
}

// Attr returns all attributes. The caller must not change them.
func (i *FileInfo) Attr() *wire.Attr { return &i.attr }

// Attr returns the attributes behind a fs.FileInfo of this package, or nil.
func Attr(fi fs.FileInfo) *wire.Attr {
	if i, ok := fi.(*FileInfo); ok {
		return &i.attr
	}
	return nil
}

var typeModes = [...]fs.FileMode{
	wire.TypeDir:  fs.ModeDir,
	wire.TypeBlk:  fs.ModeDevice,
	wire.TypeChr:  fs.ModeDevice | fs.ModeCharDevice,
	wire.TypeLnk:  fs.ModeSymlink,
	wire.TypeSock: fs.ModeSocket,
	wire.TypeFifo: fs.ModeNamedPipe,
}

// The bits above the permissions, on disk and in Go.
const (
	bitSetuid = 0o4000
	bitSetgid = 0o2000
	bitSticky = 0o1000
)

func fileMode(a *wire.Attr) fs.FileMode {
	m := fs.FileMode(a.Mode & 0o777)
	if a.Mode&bitSetuid != 0 {
		m |= fs.ModeSetuid
	}
	if a.Mode&bitSetgid != 0 {
		m |= fs.ModeSetgid
	}
	if a.Mode&bitSticky != 0 {
		m |= fs.ModeSticky
	}
	if int(a.Type) < len(typeModes) {
		m |= typeModes[a.Type]
	}
	return m
}

func modeBits(m os.FileMode) uint32 {
	b := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		b |= bitSetuid
	}
	if m&fs.ModeSetgid != 0 {
		b |= bitSetgid
	}
	if m&fs.ModeSticky != 0 {
		b |= bitSticky
	}
	return b
}
