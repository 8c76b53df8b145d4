package owner

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// fileStorage is the file of records in a directory. The file is opened anew for
// every access: so a file that was removed or replaced is noticed, and network file
// systems ask their server.
type fileStorage struct {
	dir     int
	buffers atomic.Bool // the file system has no direct I/O
}

// NewFileStorage returns the storage in dir, which exists. Where the file system
// allows it the page cache is bypassed.
func NewFileStorage(dir string) (Storage, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &fileStorage{dir: fd}, nil
}

// Close implements Storage.
func (s *fileStorage) Close() error { return unix.Close(s.dir) }

// with opens the file, directly if possible, and runs f on it.
func (s *fileStorage) with(flags int, f func(fd int) error) error {
	for {
		buffers := s.buffers.Load()
		fl := flags | unix.O_CLOEXEC | unix.O_NOFOLLOW
		if !buffers {
			fl |= unix.O_DIRECT
		}
		fd, err := retry(func() (int, error) { return unix.Openat(s.dir, FileName, fl, 0o600) })
		if err == nil {
			err = f(fd)
			if cerr := unix.Close(fd); err == nil && cerr != unix.EINTR {
				err = cerr
			}
		}
		if err == unix.EINVAL && !buffers {
			s.buffers.Store(true)
			continue
		}
		return err
	}
}

func retry(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR {
			return n, err
		}
	}
}

// Read implements Storage.
func (s *fileStorage) Read(p []byte) (int, error) {
	n := 0
	err := s.with(unix.O_RDONLY, func(fd int) (err error) {
		if s.buffers.Load() {
			// What is cached may be older than what other nodes have written.
			_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
		}
		for n = 0; n < len(p); {
			var m int
			m, err = retry(func() (int, error) { return unix.Pread(fd, p[n:], int64(n)) })
			if err != nil || m == 0 {
				return err
			}
			n += m
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read record of ownership: %w", err)
	}
	return n, nil
}

// Write implements Storage.
func (s *fileStorage) Write(p []byte, off int64) error {
	made := false
	err := s.with(unix.O_WRONLY, func(fd int) error { return s.put(fd, p, off) })
	if err == unix.ENOENT {
		made = true
		err = s.with(unix.O_WRONLY|unix.O_CREAT, func(fd int) error { return s.put(fd, p, off) })
	}
	if err == nil && made {
		err = unix.Fsync(s.dir)
	}
	if err != nil {
		return fmt.Errorf("write record of ownership: %w", err)
	}
	return nil
}

func (s *fileStorage) put(fd int, p []byte, off int64) error {
	n, err := retry(func() (int, error) { return unix.Pwrite(fd, p, off) })
	if err == nil && n != len(p) {
		err = unix.EIO
	}
	if err == nil {
		err = unix.Fdatasync(fd)
	}
	return err
}
