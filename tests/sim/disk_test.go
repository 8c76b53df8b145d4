package sim

import (
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/owner"
)

// Stores are on disks that several nodes can reach. What a node has written and
// not made durable is in its own memory: it survives the process, not the machine,
// and another node that takes the store does not see it.

// mdtStore is the disk of the MDT.
type mdtStore struct {
	w     *world
	owner ownerFile

	mu     sync.Mutex
	fs     *vfs.MemFS
	user   *process   // that has it open
	last   *node      // whose memory has what is not durable
	bare   *vfs.MemFS // fs without that
	rng    *rand.Rand
	opened int
	fails  int // if not 0, what fails from there on, counted in every life
}

func newMDTStore(w *world) *mdtStore {
	return &mdtStore{w: w, fs: vfs.NewCrashableMem(), rng: w.rand("mdt disk")}
}

// crash gives what is left on the disk of what was written.
func (d *mdtStore) crash() *vfs.MemFS {
	return d.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: d.rng.IntN(101), RNG: d.rng})
}

// attach gives the disk as a process that has just become the owner sees it.
func (d *mdtStore) attach(p *process) *vfs.MemFS {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.user != nil && d.user != p:
		// Its user was alive and does not know yet.
		d.w.trace("%s takes the MDT's store from %s", p.node.name, d.user.node.name)
		d.fs = d.crash()
		d.w.history.add(true, d.user.node, time.Now())
	case d.last != nil && d.last != p.node:
		d.fs = d.bare
	}
	d.user, d.last, d.bare = p, p.node, nil
	d.opened++
	return d.fs
}

// failAfter has every process that opens the store be told of errors after n calls.
func (d *mdtStore) failAfter(n int) {
	d.mu.Lock()
	d.fails = n
	d.mu.Unlock()
}

// left is called when a process has closed the store in order.
func (d *mdtStore) left(p *process) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.user == p {
		d.user, d.bare = nil, d.fs
	}
}

// died is called when a process has died, perhaps with its machine.
func (d *mdtStore) died(p *process, power bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.user == p {
		d.user = nil
		d.w.history.add(true, p.node, time.Now())
		d.bare = d.crash()
		// The dead process's goroutines end on the old one.
		d.fs = d.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: d.rng})
	}
	if power && d.last == p.node && d.bare != nil {
		d.fs, d.last = d.bare, nil
	}
}

// mdtFS is the disk as a process has it. Flushes of logs take time.
type mdtFS struct {
	d  *mdtStore
	p  *process
	mu sync.Mutex
	fs *vfs.MemFS
	n  atomic.Int64 // calls
}

// bad tells that the next call fails.
func (f *mdtFS) bad() error {
	f.d.mu.Lock()
	n := f.d.fails
	f.d.mu.Unlock()
	if n > 0 && f.n.Add(1) > int64(n) {
		return unix.EIO
	}
	return nil
}

func (f *mdtFS) on() *vfs.MemFS {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fs == nil {
		f.fs = f.d.attach(f.p)
	}
	return f.fs
}

func (f *mdtFS) log(name string, file vfs.File, err error) (vfs.File, error) {
	if err == nil && strings.HasSuffix(name, ".log") {
		file = &logFile{file, f}
	}
	return file, err
}

// logFile is a log, whose flushes take time.
type logFile struct {
	vfs.File
	f *mdtFS
}

func (l *logFile) slow() { l.f.p.slowDisk(l.f.d.rng, &l.f.d.mu) }

func (l *logFile) Sync() error {
	l.slow()
	return l.File.Sync()
}

func (l *logFile) SyncData() error {
	l.slow()
	return l.File.SyncData()
}

func (l *logFile) SyncTo(n int64) (bool, error) {
	l.slow()
	return l.File.SyncTo(n)
}

func (f *mdtFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := f.bad(); err != nil {
		return nil, err
	}
	file, err := f.on().Create(name, c)
	return f.log(name, file, err)
}

func (f *mdtFS) Link(oldname, newname string) error { return f.on().Link(oldname, newname) }

func (f *mdtFS) Open(name string, o ...vfs.OpenOption) (vfs.File, error) {
	if err := f.bad(); err != nil {
		return nil, err
	}
	return f.on().Open(name, o...)
}

func (f *mdtFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	return f.on().OpenReadWrite(name, c, o...)
}

func (f *mdtFS) OpenDir(name string) (vfs.File, error) { return f.on().OpenDir(name) }
func (f *mdtFS) Remove(name string) error              { return f.on().Remove(name) }
func (f *mdtFS) RemoveAll(name string) error           { return f.on().RemoveAll(name) }
func (f *mdtFS) Rename(oldname, newname string) error  { return f.on().Rename(oldname, newname) }

func (f *mdtFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.on().ReuseForWrite(oldname, newname, c)
	return f.log(newname, file, err)
}

func (f *mdtFS) MkdirAll(dir string, perm os.FileMode) error { return f.on().MkdirAll(dir, perm) }
func (f *mdtFS) Lock(name string) (io.Closer, error)         { return f.on().Lock(name) }
func (f *mdtFS) Stat(name string) (vfs.FileInfo, error)      { return f.on().Stat(name) }
func (f *mdtFS) PathBase(path string) string                 { return vfs.NewMem().PathBase(path) }
func (f *mdtFS) PathJoin(elem ...string) string              { return vfs.NewMem().PathJoin(elem...) }
func (f *mdtFS) PathDir(path string) string                  { return vfs.NewMem().PathDir(path) }
func (f *mdtFS) List(dir string) ([]string, error) {
	if err := f.bad(); err != nil {
		return nil, err
	}
	return f.on().List(dir)
}

func (f *mdtFS) Unwrap() vfs.FS { return nil }
func (f *mdtFS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: 1 << 40, TotalBytes: 1 << 40}, nil
}

// ostStore is the disk of an OST.
type ostStore struct {
	w     *world
	index int
	owner ownerFile

	mu   sync.Mutex
	mem  *objfs.Mem
	user *process
	last *node
	rng  *rand.Rand
	// deaths are when processes died that had the store open, since anything was lost. What
	// a node's memory has may be out of reach from then on, long before it is lost.
	deaths []time.Time
}

func newOSTStore(w *world, i int) *ostStore {
	return &ostStore{w: w, index: i, mem: objfs.NewMem(w.clock.Now), rng: w.rand("ost disk", i)}
}

// crash loses what is not durable, in a node's memory. The lock is held.
func (d *ostStore) crash(n *node) {
	if d.rng.IntN(2) == 0 {
		d.mem.Writeback(d.rng)
	}
	d.mem = d.mem.CrashClone(d.rng.Uint64())
	for _, at := range append(d.deaths, time.Now()) {
		d.w.history.add(false, n, at)
	}
	d.deaths = nil
}

func (d *ostStore) attach(p *process) *objfs.Mem {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.user != nil && d.user != p:
		d.w.trace("%s takes the store of OST %d from %s", p.node.name, d.index, d.user.node.name)
		d.crash(d.user.node)
	case d.last != nil && d.last != p.node:
		d.crash(d.last)
	}
	d.user, d.last = p, p.node
	return d.mem
}

func (d *ostStore) left(p *process, _ bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.user == p {
		d.user = nil
	}
}

func (d *ostStore) died(p *process, power bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.user == p {
		d.user = nil
		d.deaths = append(d.deaths, time.Now())
		d.mem.Kill()
	}
	if power && d.last == p.node {
		d.crash(p.node)
		d.last = nil
	}
}

// ostFS is the disk as a process has it: nothing of a dead process gets there.
type ostFS struct {
	objfs.FS // once it is locked
	d        *ostStore
	p        *process
	super    atomic.Int64 // descriptor of the superblock that is being written
}

func (f *ostFS) enter() bool {
	f.p.gate.RLock()
	if f.p.dead.Load() {
		f.p.gate.RUnlock()
		return false
	}
	return true
}

func (f *ostFS) Lock(path string) (func() error, error) {
	f.FS = f.d.attach(f.p)
	return f.FS.Lock(path)
}

func (f *ostFS) Open(path string, flags int) (int, error) {
	if !f.enter() {
		return -1, unix.EIO
	}
	defer f.p.gate.RUnlock()
	fd, err := f.FS.Open(path, flags)
	if path == "super.tmp" && err == nil {
		f.super.Store(int64(fd))
	}
	return fd, err
}

func (f *ostFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	if !f.enter() {
		return 0, unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Pwrite(fd, p, off)
}

func (f *ostFS) Truncate(fd int, size int64) error {
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Truncate(fd, size)
}

func (f *ostFS) Fdatasync(fd int) error {
	if int64(fd) == f.super.Load() {
		// No lock is held here, so time may pass.
		f.p.slowDisk(f.d.rng, &f.d.mu)
	}
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Fdatasync(fd)
}

func (f *ostFS) Syncfs() error {
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Syncfs()
}

func (f *ostFS) Remove(path string) error {
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Remove(path)
}

func (f *ostFS) Rename(from, to string) error {
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Rename(from, to)
}

func (f *ostFS) Mkdir(path string) error {
	if !f.enter() {
		return unix.EIO
	}
	defer f.p.gate.RUnlock()
	return f.FS.Mkdir(path)
}

// ownerFile is the record of ownership on shared storage.
type ownerFile struct {
	mu   sync.Mutex
	data []byte
}

// ownerStorage is the record as a process reaches it.
type ownerStorage struct {
	f *ownerFile
	p *process
}

var _ owner.Storage = (*ownerStorage)(nil)

func (s *ownerStorage) Read(b []byte) (int, error) {
	if err := s.p.storage(); err != nil {
		return 0, err
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return copy(b, s.f.data), nil
}

func (s *ownerStorage) Write(b []byte, off int64) error {
	if err := s.p.storage(); err != nil {
		return err
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if n := int(off) + len(b); n > len(s.f.data) {
		s.f.data = append(s.f.data, make([]byte, n-len(s.f.data))...)
	}
	copy(s.f.data[off:], b)
	return nil
}

func (s *ownerStorage) Close() error { return nil }

// hash mixes names into a seed.
func hash(what ...any) uint64 {
	h := fnv.New64()
	for _, x := range what {
		io.WriteString(h, "/")
		switch v := x.(type) {
		case string:
			io.WriteString(h, v)
		case int:
			h.Write([]byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)})
		}
	}
	return h.Sum64()
}
