package objfs

import "golang.org/x/sys/unix"

// memMemory is a Memory of a Mem: a file whose stored pages reach the disk like
// all others. So they survive Kill, and CrashClone leaves any mixture of old and new.
type memMemory struct {
	m  *Mem
	fd int
}

// OpenMemory implements FS.
func (m *Mem) OpenMemory(path string) (Memory, error) {
	fd, err := m.Open(path, ReadWrite|Create)
	if err != nil {
		return nil, err
	}
	x := &memMemory{m, fd}
	if err := m.Truncate(fd, x.Size()); err != nil {
		return nil, err
	}
	return x, nil
}

// Size implements Memory.
func (x *memMemory) Size() int64 {
	st, err := x.m.Fstat(x.fd)
	if err != nil {
		return 0
	}
	return st.Size / MemoryChunk * MemoryChunk
}

// Grow implements Memory.
func (x *memMemory) Grow(size int64) error {
	size = (size + MemoryChunk - 1) / MemoryChunk * MemoryChunk
	if x.Size() >= size {
		return nil
	}
	return x.m.Truncate(x.fd, size)
}

// Put implements Memory.
func (x *memMemory) Put(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > x.Size() {
		return unix.EFAULT
	}
	_, err := x.m.Pwrite(x.fd, p, off)
	return err
}

// Get implements Memory.
func (x *memMemory) Get(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > x.Size() {
		return unix.EFAULT
	}
	_, err := x.m.Pread(x.fd, p, off)
	return err
}

// Sync implements Memory.
func (x *memMemory) Sync() error { return x.m.Fdatasync(x.fd) }

// Close implements Memory.
func (x *memMemory) Close() error { return x.m.Close(x.fd) }
