package billyfs

import (
	"io"
	"io/fs"
	"sync"
	"syscall"

	"github.com/go-git/go-billy/v5"

	"github.com/baton-nfs/baton/recovery/wire"
)

// maxIO is the most that one request to the file system carries, in bytes.
const maxIO = 1 << 20

// File is an open file. Its methods are safe for concurrent use. It names the
// object, not its path, so it goes on working after a rename; when the last
// link to the object is removed its methods fail with ESTALE.
type File struct {
	fs     *FS
	name   string
	fid    wire.FID
	read   bool
	write  bool
	append bool
	sync   bool
	dir    bool

	mu     sync.Mutex
	attr   wire.Attr // as of the last write; size and times may be outdated
	pos    int64
	dirty  bool // something was written and not committed
	locked bool
	closed bool
}

var _ billy.File = (*File)(nil)

// Name is the path that was given to open.
func (h *File) Name() string { return h.name }

// Stat describes the open object.
func (h *File) Stat() (fs.FileInfo, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var a wire.Attr
	err := h.check()
	if err == nil {
		err = h.fs.attr(h.fid, &a)
	}
	if err != nil {
		return nil, pathErr("stat", h.name, err)
	}
	return newInfo(h.name, &a), nil
}

func (h *File) check() error {
	if h.closed {
		return fs.ErrClosed
	}
	return nil
}

// Read reads from the current position.
func (h *File) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.check()
	n := 0
	if err == nil {
		n, err = h.readAt(p, h.pos)
	}
	h.pos += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, h.err("read", err)
}

// ReadAt reads len(p) bytes from offset off; fewer come with an error, io.EOF at
// the end.
func (h *File) ReadAt(p []byte, off int64) (int, error) {
	h.mu.Lock()
	err := h.check()
	h.mu.Unlock()
	if err != nil {
		return 0, h.err("read", err)
	}
	n, err := h.readAt(p, off)
	return n, h.err("read", err)
}

func (h *File) err(op string, err error) error {
	if err == io.EOF {
		return err
	}
	return pathErr(op, h.name, err)
}

// readAt uses only what is fixed when the file is opened, so it needs no lock.
func (h *File) readAt(p []byte, off int64) (int, error) {
	switch {
	case !h.read:
		return 0, syscall.EBADF
	case h.dir:
		return 0, syscall.EISDIR
	case off < 0:
		return 0, syscall.EINVAL
	case len(p) == 0:
		return 0, nil
	}
	var a wire.Attr
	n := 0
	for n < len(p) {
		if err := h.fs.attr(h.fid, &a); err != nil {
			return n, err
		}
		m, eof, st, _ := h.fs.c.Read(h.fs.ctx, h.fs.o.Owner, &a, uint64(off)+uint64(n), p[n:min(len(p), n+maxIO)], true)
		if st != wire.OK {
			return n, toErr(st)
		}
		n += m
		if eof || m == 0 {
			break
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Write writes at the current position, or with O_APPEND at the end. Appending
// is atomic among the files of one FS and those it gave with Chroot; between
// programs it is not, as over NFS.
func (h *File) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, err := h.doWrite(p)
	return n, h.err("write", err)
}

func (h *File) doWrite(p []byte) (int, error) {
	if err := h.writable(); err != nil || len(p) == 0 {
		return 0, err
	}
	if h.append {
		l := h.fs.shared.appendLock(h.fid)
		l.Lock()
		defer l.Unlock()
		if err := h.fs.attr(h.fid, &h.attr); err != nil {
			return 0, err
		}
		h.pos = int64(h.attr.Size)
	}
	n, err := h.writeAt(p, h.pos)
	h.pos += int64(n)
	return n, err
}

func (h *File) writable() error {
	switch {
	case h.closed:
		return fs.ErrClosed
	case !h.write:
		return syscall.EBADF
	}
	return nil
}

// WriteAt writes at offset off. It fails on files opened with O_APPEND.
func (h *File) WriteAt(p []byte, off int64) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.writable()
	if err == nil && (h.append || off < 0) {
		err = syscall.EINVAL
	}
	var n int
	if err == nil {
		n, err = h.writeAt(p, off)
	}
	return n, h.err("write", err)
}

func (h *File) writeAt(p []byte, off int64) (int, error) {
	stable := wire.Unstable
	if h.sync {
		stable = wire.FileSync
	}
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+maxIO)]
		h.dirty = h.dirty || !h.sync
		_, st := h.fs.c.Write(h.fs.ctx, h.fs.o.Owner, &h.attr, uint64(off)+uint64(n), part, stable)
		if st != wire.OK {
			return n, toErr(st)
		}
		n += len(part)
	}
	return n, nil
}

// Seek sets the position of the next Read or Write. It may lie behind the end.
func (h *File) Seek(offset int64, whence int) (int64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.check()
	base := int64(0)
	switch {
	case err != nil:
	case whence == io.SeekStart:
	case whence == io.SeekCurrent:
		base = h.pos
	case whence == io.SeekEnd:
		var a wire.Attr
		if err = h.fs.attr(h.fid, &a); err == nil {
			base = int64(min(a.Size, wire.MaxFileSize))
		}
	default:
		err = syscall.EINVAL
	}
	// Adding may overflow, which shows as a negative sum too.
	if err == nil && base+offset < 0 {
		err = syscall.EINVAL
	}
	if err != nil {
		return h.pos, pathErr("seek", h.name, err)
	}
	h.pos = base + offset
	return h.pos, nil
}

// Truncate sets the file's size; what is added reads as zero. The position
// stays.
func (h *File) Truncate(size int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.writable()
	if err == nil && size < 0 {
		err = syscall.EINVAL
	}
	if err == nil {
		err = h.fs.setattrFID(h.fid, wire.SetAttr{Mask: wire.SetSize, Size: uint64(size)})
	}
	return pathErr("truncate", h.name, err)
}

// Sync makes everything that was written durable.
func (h *File) Sync() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	err := h.check()
	if err == nil {
		err = h.commit()
	}
	return pathErr("sync", h.name, err)
}

func (h *File) commit() error {
	if !h.dirty {
		return nil
	}
	a := h.attr
	if st := h.fs.c.Commit(h.fs.ctx, h.fs.o.Owner, &a); st != wire.OK {
		return toErr(st)
	}
	h.dirty = false
	return nil
}

// Lock takes the object's advisory lock and waits until it is free. Locks are
// known only to the FS they were taken through and to those Chroot made of it:
// they exclude neither other processes nor NFS clients. Locking twice through
// one File is one lock.
func (h *File) Lock() error {
	h.mu.Lock()
	err, held := h.check(), h.locked
	h.mu.Unlock()
	if err != nil || held {
		return pathErr("lock", h.name, err)
	}
	if err := h.fs.shared.locks.lock(h.fs.ctx, h.fid); err != nil {
		return pathErr("lock", h.name, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.locked {
		h.fs.shared.locks.unlock(h.fid)
		return pathErr("lock", h.name, h.check())
	}
	h.locked = true
	return nil
}

// Unlock gives the advisory lock back if it is held.
func (h *File) Unlock() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.check(); err != nil {
		return pathErr("unlock", h.name, err)
	}
	h.unlock()
	return nil
}

func (h *File) unlock() {
	if h.locked {
		h.locked = false
		h.fs.shared.locks.unlock(h.fid)
	}
}

// Close makes what was written durable, gives up the lock and ends the use of
// the file, also when it returns an error.
func (h *File) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.check(); err != nil {
		return pathErr("close", h.name, err)
	}
	h.unlock()
	err := h.commit()
	if err == syscall.ESTALE || err == syscall.ENOENT {
		// The file was removed: there is nothing left to keep.
		err = nil
	}
	h.closed = true
	return pathErr("close", h.name, err)
}
