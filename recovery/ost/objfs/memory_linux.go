package objfs

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// mapping is a Memory over shared mappings of a file, one for each chunk.
type mapping struct {
	fd     int
	mu     sync.Mutex // growing
	chunks atomic.Pointer[[][]byte]
}

// OpenMemory implements FS.
func (l *Linux) OpenMemory(path string) (Memory, error) {
	fd, err := l.Open(path, ReadWrite|Create)
	if err != nil {
		return nil, fmt.Errorf("open memory: %w", err)
	}
	m := &mapping{fd: fd}
	m.chunks.Store(new([][]byte))
	st, err := l.Fstat(fd)
	if err == nil && st.Size%MemoryChunk != 0 {
		// What is not a whole chunk would be in the way of zeros.
		err = l.Truncate(fd, st.Size/MemoryChunk*MemoryChunk)
	}
	if err == nil {
		err = m.Grow(st.Size / MemoryChunk * MemoryChunk)
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("open memory: %w", err)
	}
	return m, nil
}

// Size implements Memory.
func (m *mapping) Size() int64 { return int64(len(*m.chunks.Load())) * MemoryChunk }

// Grow implements Memory. The blocks are allocated before they are mapped: a
// store to a hole would raise SIGBUS on a full disk.
func (m *mapping) Grow(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.Size() < size {
		off := m.Size()
		if err := m.allocate(off); err != nil {
			return fmt.Errorf("allocate: %w", err)
		}
		b, err := unix.Mmap(m.fd, off, MemoryChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map: %w", err)
		}
		old := *m.chunks.Load()
		next := append(old[:len(old):len(old)], b)
		m.chunks.Store(&next)
	}
	return nil
}

func (m *mapping) allocate(off int64) error {
	err := retry(func() error { return unix.Fallocate(m.fd, 0, off, MemoryChunk) })
	if err != unix.EOPNOTSUPP {
		return err
	}
	// What is there already stays.
	b := make([]byte, MemoryChunk)
	for n := 0; n < len(b); {
		k, err := unix.Pread(m.fd, b[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if k == 0 {
			break
		}
		n += k
	}
	for n := 0; n < len(b); {
		k, err := unix.Pwrite(m.fd, b[n:], off+int64(n))
		if err != nil && err != unix.EINTR {
			return err
		}
		n += max(k, 0)
	}
	return nil
}

var errMemory = errors.New("memory fault: the file was cut or its disk failed")

// Put implements Memory.
func (m *mapping) Put(p []byte, off int64) error { return m.move(p, off, true) }

// Get implements Memory.
func (m *mapping) Get(p []byte, off int64) error { return m.move(p, off, false) }

// move copies; a fault (SIGBUS) becomes an error.
func (m *mapping) move(p []byte, off int64, put bool) (err error) {
	chunks, in := *m.chunks.Load(), int(off%MemoryChunk)
	if off < 0 || off/MemoryChunk >= int64(len(chunks)) || len(p) > MemoryChunk-in {
		return unix.EFAULT
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			err = errMemory
		}
	}()
	at := chunks[off/MemoryChunk][in:]
	if put {
		copy(at, p)
	} else {
		copy(p, at)
	}
	return nil
}

// Sync implements Memory. Linux writes what was stored in shared mappings along
// with the file's other pages.
func (m *mapping) Sync() error { return unix.Fdatasync(m.fd) }

// Close implements Memory. No other call may be under way.
func (m *mapping) Close() error {
	var errs []error
	for _, b := range *m.chunks.Load() {
		errs = append(errs, unix.Munmap(b))
	}
	m.chunks.Store(new([][]byte))
	errs = append(errs, unix.Close(m.fd))
	return errors.Join(errs...)
}
