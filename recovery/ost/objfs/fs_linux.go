package objfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writeStep bounds one write to the page cache. The kernel takes pages as large
// as a write, and then every later write of 4 KiB to such a page, and every
// sync after it, walks all its blocks.
const writeStep = 64 << 10

// Linux is the real file system below one directory.
type Linux struct {
	dir   int
	path  string
	names bool
	aio   *aio // nil where the kernel has none
}

// NewLinux opens dir, which it makes (with parents, mode 0700) if it does not
// exist.
func NewLinux(dir string) (*Linux, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("object store: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("object store: open %s: %w", dir, err)
	}
	l := &Linux{dir: fd, path: dir}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err == nil {
		switch st.Type {
		// ext4 and XFS make an inode and its first name in one transaction, which
		// an fdatasync of the inode waits for; btrfs logs the name with the inode.
		case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
			l.names = true
		}
	}
	// Without it syncs block a thread each, which is slower and nothing else.
	if a, err := newAIO(); err == nil {
		l.aio = a
	}
	return l, nil
}

// SyncsNames implements FS.
func (l *Linux) SyncsNames() bool { return l.names }

// Shut closes the directory.
func (l *Linux) Shut() error {
	if l.aio != nil {
		l.aio.close()
	}
	return unix.Close(l.dir)
}

// Open implements FS.
func (l *Linux) Open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(l.dir, path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Close implements FS. EINTR from close means that the descriptor is gone.
func (l *Linux) Close(fd int) error {
	if err := unix.Close(fd); err != nil && err != unix.EINTR {
		return err
	}
	return nil
}

// Pread implements FS.
func (l *Linux) Pread(fd int, p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// PreadNowait implements FS with preadv2 and RWF_NOWAIT.
func (l *Linux) PreadNowait(fd int, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	// The offset is passed as two longs; 64-bit kernels use only the low one.
	n, _, e := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(off>>32), unix.RWF_NOWAIT)
	switch e {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, unix.EAGAIN
	case unix.ENOSYS, unix.EINVAL:
		return 0, unix.EOPNOTSUPP
	}
	return 0, e
}

// Pwrite implements FS.
func (l *Linux) Pwrite(fd int, p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pwrite(fd, p[n:min(len(p), n+writeStep)], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			return n, unix.EIO
		}
		n += m
	}
	return n, nil
}

// Truncate implements FS.
func (l *Linux) Truncate(fd int, size int64) error {
	return retry(func() error { return unix.Ftruncate(fd, size) })
}

// Fdatasync implements FS. Linux makes all of a directory durable with either
// call.
func (l *Linux) Fdatasync(fd int) error {
	if l.aio != nil {
		if err := l.aio.fdatasync(fd); err != errNoAIO {
			return err
		}
	}
	// Not repeated on EINTR by intent: no Linux file system returns it here,
	// and a second call would report success for what the first one lost.
	return unix.Fdatasync(fd)
}

// StartWriteback implements FS with sync_file_range.
func (l *Linux) StartWriteback(fd int) error {
	return unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}

// Readahead implements FS with posix_fadvise, which does not wait for the data.
func (l *Linux) Readahead(fd int, off, n int64) error {
	return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED)
}

// Fstat implements FS.
func (l *Linux) Fstat(fd int) (Stat, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Stat{}, err
	}
	return Stat{
		Size: st.Size, Used: st.Blocks * 512,
		Mtime: st.Mtim.Nano(), Dir: st.Mode&unix.S_IFMT == unix.S_IFDIR,
	}, nil
}

// Statfs implements FS.
func (l *Linux) Statfs() (Space, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(l.dir, &st) }); err != nil {
		return Space{}, err
	}
	bs := uint64(st.Bsize)
	return Space{
		Total: st.Blocks * bs, Free: st.Bfree * bs, Avail: st.Bavail * bs,
		Files: st.Files, FilesFree: st.Ffree, FilesAvail: st.Ffree,
	}, nil
}

// Syncfs implements FS.
func (l *Linux) Syncfs() error { return unix.Syncfs(l.dir) }

// Remove implements FS.
func (l *Linux) Remove(path string) error {
	err := retry(func() error { return unix.Unlinkat(l.dir, path, 0) })
	if err == unix.EISDIR || err == unix.EPERM {
		return retry(func() error { return unix.Unlinkat(l.dir, path, unix.AT_REMOVEDIR) })
	}
	return err
}

// Rename implements FS.
func (l *Linux) Rename(from, to string) error {
	return retry(func() error { return unix.Renameat(l.dir, from, l.dir, to) })
}

// Mkdir implements FS.
func (l *Linux) Mkdir(path string) error {
	return retry(func() error { return unix.Mkdirat(l.dir, path, 0o700) })
}

// ReadDir implements FS.
func (l *Linux) ReadDir(path string) ([]string, error) {
	fd, err := l.Open(path, ReadOnly|Directory)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return names, nil
}

// Lock implements FS with flock.
func (l *Linux) Lock(path string) (func() error, error) {
	fd, err := l.Open(path, ReadWrite|Create)
	if err != nil {
		return nil, err
	}
	if err := retry(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return func() error { return unix.Close(fd) }, nil
}

func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
