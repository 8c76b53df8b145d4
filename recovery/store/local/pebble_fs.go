package local

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// freezeFS stands between Pebble and the disk. Pebble answers a failed write
// of its log or manifest with an exit of the process or with a panic that
// cannot be recovered from (WAL rotation panics while its mutex is released),
// which must not happen to a process that serves other targets too. So the
// first such error freezes the file system instead: the error is reported
// through onFail, and from then on every change is swallowed and reported as
// done. Pebble goes on in memory, on the disk time stands still as in a power
// cut, and the engine above refuses all results from that moment on.
//
// Order makes that safe: a change that depends on a swallowed one is issued
// later, so it is swallowed as well.
type freezeFS struct {
	vfs.FS
	frozen atomic.Bool
	onFail func(error)
	// spare, if set, tells whether n bytes can be taken that are not needed yet.
	spare func(n int64) bool
}

// critical tells whether Pebble cannot continue after a write error on name.
// Errors on tables are left to Pebble, which retries flushes and compactions.
func critical(name string) bool {
	b := filepath.Base(name)
	return strings.HasSuffix(b, ".log") || strings.HasPrefix(b, "MANIFEST-") || strings.HasPrefix(b, "marker.")
}

// fail freezes and hides err.
func (f *freezeFS) fail(err error) {
	if f.frozen.CompareAndSwap(false, true) {
		f.onFail(err)
	}
}

func (f *freezeFS) file(name string, file vfs.File, err error) (vfs.File, error) {
	if err != nil {
		if !critical(name) {
			return nil, err
		}
		f.fail(err)
		return sinkFile{}, nil
	}
	return &freezeFile{File: file, fs: f, critical: critical(name)}, nil
}

func (f *freezeFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if f.frozen.Load() {
		return sinkFile{}, nil
	}
	file, err := f.FS.Create(name, c)
	return f.file(name, file, err)
}

func (f *freezeFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if f.frozen.Load() {
		return sinkFile{}, nil
	}
	file, err := f.FS.ReuseForWrite(oldname, newname, c)
	return f.file(newname, file, err)
}

func (f *freezeFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	if f.frozen.Load() {
		return sinkFile{}, nil
	}
	file, err := f.FS.OpenReadWrite(name, c, opts...)
	if err != nil {
		return nil, err
	}
	return &freezeFile{File: file, fs: f, critical: critical(name)}, nil
}

func (f *freezeFS) OpenDir(name string) (vfs.File, error) {
	file, err := f.FS.OpenDir(name)
	if err != nil {
		return nil, err
	}
	// A directory's fsync covers new logs and manifests.
	return &freezeFile{File: file, fs: f, critical: true}, nil
}

func (f *freezeFS) change(name string, op func() error) error {
	if f.frozen.Load() {
		return nil
	}
	err := op()
	if err != nil && critical(name) && !os.IsNotExist(err) {
		f.fail(err)
		return nil
	}
	return err
}

func (f *freezeFS) Link(oldname, newname string) error {
	return f.change(newname, func() error { return f.FS.Link(oldname, newname) })
}

func (f *freezeFS) Remove(name string) error {
	if f.frozen.Load() {
		return nil
	}
	return f.FS.Remove(name)
}

func (f *freezeFS) RemoveAll(name string) error {
	if f.frozen.Load() {
		return nil
	}
	return f.FS.RemoveAll(name)
}

func (f *freezeFS) Rename(oldname, newname string) error {
	return f.change(newname, func() error { return f.FS.Rename(oldname, newname) })
}

func (f *freezeFS) MkdirAll(dir string, perm os.FileMode) error {
	if f.frozen.Load() {
		return nil
	}
	return f.FS.MkdirAll(dir, perm)
}

func (f *freezeFS) Unwrap() vfs.FS { return f.FS }

// freezeFile applies freezeFS's rule to one open file.
type freezeFile struct {
	vfs.File
	fs       *freezeFS
	critical bool
}

func (f *freezeFile) check(err error) error {
	if err != nil && f.critical {
		f.fs.fail(err)
		return nil
	}
	return err
}

func (f *freezeFile) Write(p []byte) (int, error) {
	if f.fs.frozen.Load() {
		return len(p), nil
	}
	n, err := f.File.Write(p)
	if err != nil && f.check(err) == nil {
		return len(p), nil
	}
	return n, err
}

func (f *freezeFile) WriteAt(p []byte, off int64) (int, error) {
	if f.fs.frozen.Load() {
		return len(p), nil
	}
	n, err := f.File.WriteAt(p, off)
	if err != nil && f.check(err) == nil {
		return len(p), nil
	}
	return n, err
}

// Preallocate does nothing when it would take the disk's reserve: a log's
// preallocation is bigger than what a full disk has left for removals and for
// the next start.
func (f *freezeFile) Preallocate(off, n int64) error {
	if f.fs.frozen.Load() || f.fs.spare != nil && !f.fs.spare(n) {
		return nil
	}
	return f.File.Preallocate(off, n)
}

func (f *freezeFile) Sync() error {
	if f.fs.frozen.Load() {
		return nil
	}
	return f.check(f.File.Sync())
}

func (f *freezeFile) SyncData() error {
	if f.fs.frozen.Load() {
		return nil
	}
	return f.check(f.File.SyncData())
}

func (f *freezeFile) SyncTo(n int64) (bool, error) {
	if f.fs.frozen.Load() {
		return true, nil
	}
	full, err := f.File.SyncTo(n)
	if err != nil && f.check(err) == nil {
		return true, nil
	}
	return full, err
}

// Stat is asked of a log that is used again.
func (f *freezeFile) Stat() (vfs.FileInfo, error) {
	fi, err := f.File.Stat()
	if err != nil && (f.fs.frozen.Load() || f.check(err) == nil) {
		return sinkInfo{}, nil
	}
	return fi, err
}

func (f *freezeFile) Close() error {
	err := f.File.Close()
	if f.fs.frozen.Load() {
		return nil
	}
	return f.check(err)
}

// sinkFile is what a frozen file system opens for writing.
type sinkFile struct{}

func (sinkFile) Close() error                           { return nil }
func (sinkFile) Read([]byte) (int, error)               { return 0, io.EOF }
func (sinkFile) ReadAt([]byte, int64) (int, error)      { return 0, io.EOF }
func (sinkFile) Write(p []byte) (int, error)            { return len(p), nil }
func (sinkFile) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (sinkFile) Preallocate(int64, int64) error         { return nil }
func (sinkFile) Stat() (vfs.FileInfo, error)            { return sinkInfo{}, nil }
func (sinkFile) Sync() error                            { return nil }
func (sinkFile) SyncTo(int64) (bool, error)             { return true, nil }
func (sinkFile) SyncData() error                        { return nil }
func (sinkFile) Prefetch(int64, int64) error            { return nil }
func (sinkFile) Fd() uintptr                            { return vfs.InvalidFd }

// sinkInfo describes a sinkFile: an empty file.
type sinkInfo struct{}

func (sinkInfo) Name() string           { return "" }
func (sinkInfo) Size() int64            { return 0 }
func (sinkInfo) Mode() os.FileMode      { return 0o600 }
func (sinkInfo) ModTime() time.Time     { return time.Time{} }
func (sinkInfo) IsDir() bool            { return false }
func (sinkInfo) Sys() any               { return nil }
func (sinkInfo) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }
