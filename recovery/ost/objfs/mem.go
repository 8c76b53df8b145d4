package objfs

import (
	"math/rand/v2"
	"sort"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	pageSize   = 4096
	sectorSize = 512
)

type page [pageSize]byte

// image is one state of a file: pages that are absent are holes.
type image struct {
	pages map[int64]*page
	size  int64
}

type memNode struct {
	cur, dur image               // regular file: in the cache, on the disk
	dirty    map[int64]bool      // pages that differ, by number
	sizeDiff bool                // size was changed since the last sync
	ent, dEn map[string]*memNode // directory: in the cache, on the disk
	mtime    int64
	locked   bool
}

func newNode(dir bool) *memNode {
	n := &memNode{}
	if dir {
		n.ent, n.dEn = map[string]*memNode{}, map[string]*memNode{}
	} else {
		n.cur.pages, n.dur.pages, n.dirty = map[int64]*page{}, map[int64]*page{}, map[int64]bool{}
	}
	return n
}

// Mem is a file system in memory that remembers what is durable: data after
// Fdatasync of the file, names after Fdatasync of the directory. CrashClone
// gives what a power failure might leave. Safe for concurrent use.
type Mem struct {
	mu   sync.Mutex
	root *memNode
	fds  map[int]*memNode
	next int
	now  func() int64

	capacity int64 // pages; 0: no limit
	pages    int64
	openErr  error
	syncErr  error
	preadErr error
	syncs    int64
	noNowait bool
}

// NewMem returns an empty file system. now gives file times in ns.
func NewMem(now func() int64) *Mem {
	return &Mem{root: newNode(true), fds: map[int]*memNode{}, next: 3, now: now}
}

// SyncsNames implements FS: the model is as strict as POSIX.
func (m *Mem) SyncsNames() bool { return false }

// SetCapacity bounds the data pages of all files; writes beyond it get ENOSPC.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes / pageSize
}

// FailSync makes every sync fail with err (nil: no more) and, as kernels do,
// forget that the data were dirty.
func (m *Mem) FailSync(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncErr = err
}

// FailOpen makes every Open fail with err (nil: no more).
func (m *Mem) FailOpen(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.openErr = err
}

// FailRead makes every Pread fail with err (nil: no more).
func (m *Mem) FailRead(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.preadErr = err
}

// NoNowait makes PreadNowait give EOPNOTSUPP.
func (m *Mem) NoNowait() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.noNowait = true
}

// Syncs counts Fdatasync calls on files.
func (m *Mem) Syncs() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.syncs
}

// OpenFDs counts descriptors in use.
func (m *Mem) OpenFDs() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.fds)
}

// walk finds the directory that holds path's last name.
func (m *Mem) walk(path string) (*memNode, string, error) {
	d := m.root
	parts := strings.Split(path, "/")
	for _, p := range parts[:len(parts)-1] {
		n := d.ent[p]
		if n == nil {
			return nil, "", unix.ENOENT
		}
		if n.ent == nil {
			return nil, "", unix.ENOTDIR
		}
		d = n
	}
	return d, parts[len(parts)-1], nil
}

func (m *Mem) find(path string) (*memNode, error) {
	if path == "." {
		return m.root, nil
	}
	d, name, err := m.walk(path)
	if err != nil {
		return nil, err
	}
	n := d.ent[name]
	if n == nil {
		return nil, unix.ENOENT
	}
	return n, nil
}

// Open implements FS.
func (m *Mem) Open(path string, flags int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.openErr != nil {
		return -1, m.openErr
	}
	n, err := m.find(path)
	switch {
	case err == unix.ENOENT && flags&Create != 0:
		d, name, err := m.walk(path)
		if err != nil {
			return -1, err
		}
		n = newNode(false)
		n.mtime = m.now()
		d.ent[name] = n
	case err != nil:
		return -1, err
	case flags&Excl != 0:
		return -1, unix.EEXIST
	case n.ent == nil && flags&Directory != 0:
		return -1, unix.ENOTDIR
	case n.ent != nil && flags&ReadWrite != 0:
		return -1, unix.EISDIR
	}
	if flags&Trunc != 0 {
		m.truncate(n, 0)
	}
	fd := m.next
	m.next++
	m.fds[fd] = n
	return fd, nil
}

func (m *Mem) node(fd int) (*memNode, error) {
	n := m.fds[fd]
	if n == nil {
		return nil, unix.EBADF
	}
	return n, nil
}

// Close implements FS.
func (m *Mem) Close(fd int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fds[fd] == nil {
		return unix.EBADF
	}
	delete(m.fds, fd)
	return nil
}

// Pread implements FS.
func (m *Mem) Pread(fd int, p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(fd)
	if err != nil {
		return 0, err
	}
	if m.preadErr != nil {
		return 0, m.preadErr
	}
	if off >= n.cur.size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), n.cur.size-off)]
	for i := 0; i < len(p); {
		pg, in := (off+int64(i))/pageSize, (off+int64(i))%pageSize
		k := min(len(p)-i, int(pageSize-in))
		if src := n.cur.pages[pg]; src != nil {
			copy(p[i:i+k], src[in:])
		} else {
			clear(p[i : i+k])
		}
		i += k
	}
	return len(p), nil
}

// PreadNowait implements FS.
func (m *Mem) PreadNowait(fd int, p []byte, off int64) (int, error) {
	m.mu.Lock()
	no := m.noNowait
	m.mu.Unlock()
	if no {
		return 0, unix.EOPNOTSUPP
	}
	return m.Pread(fd, p, off)
}

// Pwrite implements FS.
func (m *Mem) Pwrite(fd int, p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(fd)
	if err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	n.mtime = m.now()
	for i := 0; i < len(p); {
		pg, in := (off+int64(i))/pageSize, (off+int64(i))%pageSize
		k := min(len(p)-i, int(pageSize-in))
		dst := n.cur.pages[pg]
		if dst == nil {
			if m.capacity > 0 && m.pages >= m.capacity {
				return i, unix.ENOSPC
			}
			m.pages++
			dst = new(page)
			n.cur.pages[pg] = dst
		}
		copy(dst[in:], p[i:i+k])
		n.dirty[pg] = true
		i += k
		if end := off + int64(i); end > n.cur.size {
			n.cur.size, n.sizeDiff = end, true
		}
	}
	return len(p), nil
}

func (m *Mem) truncate(n *memNode, size int64) {
	n.mtime = m.now()
	n.sizeDiff = true
	if size < n.cur.size {
		for pg := range n.cur.pages {
			if pg*pageSize >= size {
				delete(n.cur.pages, pg)
				n.dirty[pg] = true
				m.pages--
			}
		}
		if p := n.cur.pages[size/pageSize]; p != nil {
			clear(p[size%pageSize:])
			n.dirty[size/pageSize] = true
		}
	}
	n.cur.size = size
}

// Truncate implements FS.
func (m *Mem) Truncate(fd int, size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(fd)
	if err != nil {
		return err
	}
	m.truncate(n, size)
	return nil
}

func (n *memNode) persist() {
	if n.ent != nil {
		n.dEn = make(map[string]*memNode, len(n.ent))
		for k, v := range n.ent {
			n.dEn[k] = v
		}
		return
	}
	for pg := range n.dirty {
		if src := n.cur.pages[pg]; src != nil {
			c := *src
			n.dur.pages[pg] = &c
		} else {
			delete(n.dur.pages, pg)
		}
	}
	clear(n.dirty)
	n.dur.size, n.sizeDiff = n.cur.size, false
}

// Fdatasync implements FS.
func (m *Mem) Fdatasync(fd int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(fd)
	if err != nil {
		return err
	}
	if n.ent == nil {
		m.syncs++
	}
	if m.syncErr != nil {
		// The kernel marks the pages clean: a later sync succeeds and the disk
		// still has the old data.
		clear(n.dirty)
		return m.syncErr
	}
	n.persist()
	return nil
}

// StartWriteback implements FS; pages reach the disk in Writeback only.
func (m *Mem) StartWriteback(int) error { return nil }

// Readahead implements FS.
func (m *Mem) Readahead(int, int64, int64) error { return nil }

// Fstat implements FS.
func (m *Mem) Fstat(fd int) (Stat, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.node(fd)
	if err != nil {
		return Stat{}, err
	}
	return Stat{Size: n.cur.size, Used: int64(len(n.cur.pages)) * pageSize, Mtime: n.mtime, Dir: n.ent != nil}, nil
}

// Statfs implements FS.
func (m *Mem) Statfs() (Space, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	total := uint64(1 << 40)
	if m.capacity > 0 {
		total = uint64(m.capacity * pageSize)
	}
	free := total - uint64(m.pages*pageSize)
	return Space{Total: total, Free: free, Avail: free, Files: 1 << 20, FilesFree: 1 << 19, FilesAvail: 1 << 19}, nil
}

// Syncfs implements FS.
func (m *Mem) Syncfs() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.syncErr != nil {
		return m.syncErr
	}
	for n := range m.nodes() {
		n.persist()
	}
	return nil
}

// nodes lists all nodes that names or descriptors reach.
func (m *Mem) nodes() map[*memNode]bool {
	seen := map[*memNode]bool{}
	var add func(n *memNode)
	add = func(n *memNode) {
		if seen[n] {
			return
		}
		seen[n] = true
		for _, c := range n.ent {
			add(c)
		}
		for _, c := range n.dEn {
			add(c)
		}
	}
	add(m.root)
	for _, n := range m.fds {
		add(n)
	}
	return seen
}

// Remove implements FS.
func (m *Mem) Remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, name, err := m.walk(path)
	if err != nil {
		return err
	}
	n := d.ent[name]
	if n == nil {
		return unix.ENOENT
	}
	if len(n.ent) > 0 {
		return unix.ENOTEMPTY
	}
	m.pages -= int64(len(n.cur.pages))
	delete(d.ent, name)
	return nil
}

// Rename implements FS.
func (m *Mem) Rename(from, to string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d1, n1, err := m.walk(from)
	if err != nil {
		return err
	}
	d2, n2, err := m.walk(to)
	if err != nil {
		return err
	}
	n := d1.ent[n1]
	if n == nil {
		return unix.ENOENT
	}
	delete(d1.ent, n1)
	d2.ent[n2] = n
	return nil
}

// Mkdir implements FS.
func (m *Mem) Mkdir(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, name, err := m.walk(path)
	if err != nil {
		return err
	}
	if d.ent[name] != nil {
		return unix.EEXIST
	}
	d.ent[name] = newNode(true)
	return nil
}

// ReadDir implements FS.
func (m *Mem) ReadDir(path string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find(path)
	if err != nil {
		return nil, err
	}
	if n.ent == nil {
		return nil, unix.ENOTDIR
	}
	names := make([]string, 0, len(n.ent))
	for k := range n.ent {
		names = append(names, k)
	}
	sort.Strings(names)
	return names, nil
}

// Lock implements FS.
func (m *Mem) Lock(path string) (func() error, error) {
	fd, err := m.Open(path, ReadWrite|Create)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	n := m.fds[fd]
	held := n.locked
	n.locked = true
	m.mu.Unlock()
	if held {
		m.Close(fd)
		return nil, unix.EWOULDBLOCK
	}
	return func() error {
		m.mu.Lock()
		n.locked = false
		m.mu.Unlock()
		return m.Close(fd)
	}, nil
}

// Shut implements FS.
func (m *Mem) Shut() error { return nil }

// Writeback persists a random part of what is dirty, as the kernel does on its
// own between syncs: some pages of some files, with the size they need.
func (m *Mem) Writeback(r *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.ordered() {
		if n.ent != nil || len(n.dirty) == 0 || r.IntN(2) == 0 {
			continue
		}
		for _, pg := range sortedPages(n.dirty) {
			src := n.cur.pages[pg]
			if src == nil || r.IntN(2) == 0 {
				continue
			}
			c := *src
			n.dur.pages[pg] = &c
			if end := min((pg+1)*pageSize, n.cur.size); end > n.dur.size {
				n.dur.size = end
			}
		}
	}
}

// ordered lists the nodes in an order that does not depend on map iteration,
// so that a seed repeats.
func (m *Mem) ordered() []*memNode {
	var out []*memNode
	seen := map[*memNode]bool{}
	var add func(n *memNode)
	add = func(n *memNode) {
		if n == nil || seen[n] {
			return
		}
		seen[n] = true
		out = append(out, n)
		for _, k := range names(n.ent, n.dEn) {
			add(n.ent[k])
			add(n.dEn[k])
		}
	}
	add(m.root)
	return out
}

func names(a, b map[string]*memNode) []string {
	var s []string
	for k := range a {
		s = append(s, k)
	}
	for k := range b {
		if a[k] == nil {
			s = append(s, k)
		}
	}
	sort.Strings(s)
	return s
}

func sortedPages(d map[int64]bool) []int64 {
	s := make([]int64, 0, len(d))
	for pg := range d {
		s = append(s, pg)
	}
	sort.Slice(s, func(i, j int) bool { return s[i] < s[j] })
	return s
}

// Kill models the death of the process that used m: descriptors and locks are
// gone, everything written stays.
func (m *Mem) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.fds {
		n.locked = false
	}
	clear(m.fds)
}

// CrashClone returns what a power failure at this moment might leave: every
// name that was not synced is there or not, every dirty page is old, new, or
// torn at sectors, every unsynced size is old or new. The same seed and history
// give the same result. m itself goes on unchanged.
func (m *Mem) CrashClone(seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))
	c := NewMem(m.now)
	c.capacity = m.capacity
	done := map[*memNode]*memNode{}
	var clone func(n *memNode) *memNode
	clone = func(n *memNode) *memNode {
		if k := done[n]; k != nil {
			return k
		}
		k := newNode(n.ent != nil)
		done[n] = k
		k.mtime = n.mtime
		if n.ent != nil {
			for _, name := range names(n.ent, n.dEn) {
				pick := n.dEn[name]
				if pick != n.ent[name] && r.IntN(2) == 0 {
					pick = n.ent[name]
				}
				if pick != nil {
					k.ent[name] = clone(pick)
				}
			}
			k.persist()
			return k
		}
		n.crash(r, k)
		c.pages += int64(len(k.cur.pages))
		return k
	}
	c.root = clone(m.root)
	return c
}

// crash fills k, an empty file, with a possible state of n after power loss.
func (n *memNode) crash(r *rand.Rand, k *memNode) {
	size := n.dur.size
	if r.IntN(2) == 0 {
		size = n.cur.size
	}
	k.cur.size = size
	put := func(pg int64, p *page) {
		if p != nil && pg*pageSize < size {
			c := *p
			if end := size - pg*pageSize; end < pageSize {
				clear(c[end:])
			}
			k.cur.pages[pg] = &c
		}
	}
	for pg, p := range n.dur.pages {
		put(pg, p)
	}
	for _, pg := range sortedPages(n.dirty) {
		old, now := n.dur.pages[pg], n.cur.pages[pg]
		switch r.IntN(3) {
		case 0: // old
		case 1:
			if now != nil {
				put(pg, now)
			} else {
				delete(k.cur.pages, pg)
			}
		case 2:
			var t page
			if old != nil {
				t = *old
			}
			for s := 0; s < pageSize; s += sectorSize {
				if r.IntN(2) == 0 {
					if now != nil {
						copy(t[s:s+sectorSize], now[s:])
					} else {
						clear(t[s : s+sectorSize])
					}
				}
			}
			put(pg, &t)
		}
	}
	for pg := range k.cur.pages {
		k.dirty[pg] = true
	}
	k.persist()
}
