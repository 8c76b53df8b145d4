package owner

import (
	"fmt"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

// ErrNotOwner is the error of everything that would change a store which is not
// owned. It is a wire.ErrTargetDown, because whoever has asked has to look for
// the target elsewhere, and an EIO to those who know errors of disks only.
var ErrNotOwner error = notOwner{}

type notOwner struct{}

func (notOwner) Error() string   { return "this node does not own the store" }
func (notOwner) Unwrap() []error { return []error{wire.ErrTargetDown, unix.EIO} }

// The guards check the ownership before every change, and once more after
// everything that makes changes durable: a flush that ends when the store is not
// owned any more may have come too late for the next owner to see.

// change runs f if the store is owned.
func (w *Owner) change(f func() error) error {
	if !w.Valid() {
		return ErrNotOwner
	}
	return f()
}

// flush runs f if the store is owned, and succeeds if it still is.
func (w *Owner) flush(f func() error) error {
	if err := w.change(f); err != nil {
		return err
	}
	return w.Check()
}

// GuardEngine returns e, which changes nothing any more when w is not the store's
// owner. Its errors are store.ErrFailed as well.
func GuardEngine(e store.Engine, w *Owner) store.Engine { return &guardEngine{e, w} }

type guardEngine struct {
	store.Engine
	w *Owner
}

var errEngine = fmt.Errorf("%w: %w", store.ErrFailed, ErrNotOwner)

// Apply implements store.Engine.
func (g *guardEngine) Apply(b store.Batch) error {
	if !g.w.Valid() {
		b.Close()
		return errEngine
	}
	return g.Engine.Apply(b)
}

// Sync implements store.Engine.
func (g *guardEngine) Sync() error {
	if !g.w.Valid() {
		return errEngine
	}
	if err := g.Engine.Sync(); err != nil {
		return err
	}
	return g.Failed()
}

// Failed implements store.Engine.
func (g *guardEngine) Failed() error {
	if err := g.Engine.Failed(); err != nil {
		return err
	}
	if !g.w.Valid() {
		return errEngine
	}
	return nil
}

// GuardFS returns fs, which changes nothing any more when w is not the store's
// owner. Locks are not guarded.
func GuardFS(fs objfs.FS, w *Owner) objfs.FS { return &guardFS{fs, w} }

type guardFS struct {
	objfs.FS
	w *Owner
}

// Open implements objfs.FS.
func (g *guardFS) Open(path string, flags int) (int, error) {
	if flags&(objfs.Create|objfs.Trunc) != 0 && !g.w.Valid() {
		return -1, ErrNotOwner
	}
	return g.FS.Open(path, flags)
}

// Pwrite implements objfs.FS.
func (g *guardFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	if !g.w.Valid() {
		return 0, ErrNotOwner
	}
	return g.FS.Pwrite(fd, p, off)
}

// Truncate implements objfs.FS.
func (g *guardFS) Truncate(fd int, size int64) error {
	return g.w.change(func() error { return g.FS.Truncate(fd, size) })
}

// Fdatasync implements objfs.FS.
func (g *guardFS) Fdatasync(fd int) error {
	return g.w.flush(func() error { return g.FS.Fdatasync(fd) })
}

// StartWriteback implements objfs.FS.
func (g *guardFS) StartWriteback(fd int) error {
	return g.w.change(func() error { return g.FS.StartWriteback(fd) })
}

// Syncfs implements objfs.FS.
func (g *guardFS) Syncfs() error {
	return g.w.flush(g.FS.Syncfs)
}

// Remove implements objfs.FS.
func (g *guardFS) Remove(path string) error {
	return g.w.change(func() error { return g.FS.Remove(path) })
}

// Rename implements objfs.FS.
func (g *guardFS) Rename(from, to string) error {
	return g.w.change(func() error { return g.FS.Rename(from, to) })
}

// Mkdir implements objfs.FS.
func (g *guardFS) Mkdir(path string) error {
	return g.w.change(func() error { return g.FS.Mkdir(path) })
}

// GuardVFS returns fs, Pebble's file system, which changes nothing any more when
// w is not the store's owner: so nor do Pebble's background goroutines. It belongs
// below local.OpenPebble (Options.FS), which makes its errors a failure of the
// engine. Locks are not guarded.
func GuardVFS(fs vfs.FS, w *Owner) vfs.FS { return &guardVFS{fs, w} }

type guardVFS struct {
	vfs.FS
	w *Owner
}

func (g *guardVFS) file(open func() (vfs.File, error)) (vfs.File, error) {
	if !g.w.Valid() {
		return nil, ErrNotOwner
	}
	return g.wrap(open())
}

func (g *guardVFS) wrap(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &guardFile{f, g.w}, nil
}

// Create implements vfs.FS.
func (g *guardVFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return g.file(func() (vfs.File, error) { return g.FS.Create(name, c) })
}

// OpenReadWrite implements vfs.FS.
func (g *guardVFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return g.file(func() (vfs.File, error) { return g.FS.OpenReadWrite(name, c, opts...) })
}

// ReuseForWrite implements vfs.FS.
func (g *guardVFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return g.file(func() (vfs.File, error) { return g.FS.ReuseForWrite(oldname, newname, c) })
}

// OpenDir implements vfs.FS.
func (g *guardVFS) OpenDir(name string) (vfs.File, error) { return g.wrap(g.FS.OpenDir(name)) }

// Link implements vfs.FS.
func (g *guardVFS) Link(oldname, newname string) error {
	return g.w.change(func() error { return g.FS.Link(oldname, newname) })
}

// Remove implements vfs.FS.
func (g *guardVFS) Remove(name string) error {
	return g.w.change(func() error { return g.FS.Remove(name) })
}

// RemoveAll implements vfs.FS.
func (g *guardVFS) RemoveAll(name string) error {
	return g.w.change(func() error { return g.FS.RemoveAll(name) })
}

// Rename implements vfs.FS.
func (g *guardVFS) Rename(oldname, newname string) error {
	return g.w.change(func() error { return g.FS.Rename(oldname, newname) })
}

// MkdirAll implements vfs.FS.
func (g *guardVFS) MkdirAll(dir string, perm os.FileMode) error {
	return g.w.change(func() error { return g.FS.MkdirAll(dir, perm) })
}

// Unwrap implements vfs.FS.
func (g *guardVFS) Unwrap() vfs.FS { return g.FS }

// guardFile is a file that may be written.
type guardFile struct {
	vfs.File
	w *Owner
}

// Write implements vfs.File.
func (f *guardFile) Write(p []byte) (int, error) {
	if !f.w.Valid() {
		return 0, ErrNotOwner
	}
	return f.File.Write(p)
}

// WriteAt implements vfs.File.
func (f *guardFile) WriteAt(p []byte, off int64) (int, error) {
	if !f.w.Valid() {
		return 0, ErrNotOwner
	}
	return f.File.WriteAt(p, off)
}

// Preallocate implements vfs.File.
func (f *guardFile) Preallocate(off, n int64) error {
	return f.w.change(func() error { return f.File.Preallocate(off, n) })
}

// Sync implements vfs.File.
func (f *guardFile) Sync() error { return f.w.flush(f.File.Sync) }

// SyncData implements vfs.File.
func (f *guardFile) SyncData() error { return f.w.flush(f.File.SyncData) }

// SyncTo implements vfs.File.
func (f *guardFile) SyncTo(n int64) (full bool, err error) {
	err = f.w.flush(func() error {
		full, err = f.File.SyncTo(n)
		return err
	})
	return full, err
}
