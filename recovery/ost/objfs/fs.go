// Package objfs is the disk below an object storage target: file operations on
// paths relative to one directory, with descriptors as plain integers so that
// the data path costs one interface call and one system call. Linux is the real
// one; Mem is an in-memory one for tests that can lose power.
package objfs

import "golang.org/x/sys/unix"

// Open flags. The values are Linux's, so that the real implementation passes
// them on.
const (
	ReadWrite = unix.O_RDWR
	ReadOnly  = unix.O_RDONLY
	Create    = unix.O_CREAT
	Excl      = unix.O_EXCL
	Trunc     = unix.O_TRUNC
	Directory = unix.O_DIRECTORY
)

// Stat is what the target needs of a file's attributes.
type Stat struct {
	Size  int64 // bytes
	Used  int64 // bytes allocated
	Mtime int64 // ns since 1970 UTC, by the file system's own clock
	Dir   bool
}

// Space holds a file system's figures in bytes and files.
type Space struct {
	Total, Free, Avail           uint64
	Files, FilesFree, FilesAvail uint64
}

// FS is a directory tree on one file system. Errors are (or wrap)
// unix.Errno values. Calls are safe for concurrent use; a descriptor must not
// be closed while another call uses it. EINTR is never returned.
type FS interface {
	// Open opens path with the flags above. New files have mode 0600.
	Open(path string, flags int) (fd int, err error)
	Close(fd int) error
	// Pread reads up to len(p) bytes; fewer only at the end of the file or on
	// an error.
	Pread(fd int, p []byte, off int64) (int, error)
	// PreadNowait reads what is in memory and returns EAGAIN if nothing is, or
	// EOPNOTSUPP if the file system cannot tell.
	PreadNowait(fd int, p []byte, off int64) (int, error)
	// Pwrite writes all of p; when it fails in the middle it returns the
	// number of bytes written and the error.
	Pwrite(fd int, p []byte, off int64) (int, error)
	Truncate(fd int, size int64) error
	// Fdatasync makes the file's data and size durable; for directories it is
	// fsync and makes their entries durable.
	Fdatasync(fd int) error
	// SyncsNames tells that Fdatasync of a file that was just made also makes
	// its name durable, because the file system's journal has both in one
	// transaction; the directory need not be synced then.
	SyncsNames() bool
	// StartWriteback begins writing the file's dirty pages without waiting.
	StartWriteback(fd int) error
	// Readahead begins reading [off, off+n) into memory.
	Readahead(fd int, off, n int64) error
	Fstat(fd int) (Stat, error)
	Statfs() (Space, error)
	// Syncfs makes everything that was written to the file system durable.
	Syncfs() error
	// Remove removes a file or an empty directory.
	Remove(path string) error
	Rename(from, to string) error
	Mkdir(path string) error
	// ReadDir lists the names in a directory.
	ReadDir(path string) ([]string, error)
	// Lock takes the exclusive lock on a file, which it makes, and fails with
	// EWOULDBLOCK when somebody else has it. The lock ends with unlock or the
	// process.
	Lock(path string) (unlock func() error, err error)
	// OpenMemory opens a file as memory, making it if there is none.
	OpenMemory(path string) (Memory, error)
	// Shut releases what the FS itself holds.
	Shut() error
}

// MemoryChunk is the step in which a Memory grows, in bytes.
const MemoryChunk = 256 << 10

// Memory is a file that is used like memory: what Put has stored survives the
// process without a system call. Of what was not synced a power failure leaves
// anything. Calls are safe for concurrent use; those of Put and Get on the same
// bytes are the caller's to order.
type Memory interface {
	// Size is the room there is, a multiple of MemoryChunk.
	Size() int64
	// Grow makes room for size bytes; what is new reads as zeros.
	Grow(size int64) error
	// Put and Get copy to and from the room at off. The bytes lie in one chunk.
	// An error means that the memory is not to be had any more.
	Put(p []byte, off int64) error
	Get(p []byte, off int64) error
	// Sync makes everything stored before the call durable.
	Sync() error
	Close() error
}
