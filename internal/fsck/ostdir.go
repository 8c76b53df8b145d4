package fsck

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// ObjectStore is an object target that does not run.
type ObjectStore interface {
	// Index is the OST's number in layouts.
	Index() uint16
	// Walk calls f for every object and for every file that is none. Objects
	// may be removed meanwhile.
	Walk(f func(ost.ObjectInfo)) error
	// Remove destroys an object durably.
	Remove(fid wire.FID, stripe uint8) error
	// SetAside moves what Walk has shown out of the store and returns where to.
	SetAside(i ost.ObjectInfo) (string, error)
}

// ErrInUse says that a server, or another check, has a store open.
var ErrInUse = errors.New("it is in use; stop baton (systemctl stop baton) and run the check again")

// asideDir is the directory of an OST for objects that were set aside.
const asideDir = "lost+found"

// Dir is the ObjectStore over the files of an OST.
type Dir struct {
	index uint16
	fs    *guardFS
	t     *ost.Target
}

// NewDir opens an OST's files. It writes to them only if repair is set, and
// then only what Remove and SetAside do: whether the store was stopped in an
// orderly way stays recorded for the next start, which depends on it. The Dir
// owns fs from then on, also after an error. log may be nil.
func NewDir(fs objfs.FS, index uint16, repair bool, log *slog.Logger) (*Dir, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	fd, err := fs.Open(superName, objfs.ReadOnly)
	if err != nil {
		fs.Shut()
		if err == unix.ENOENT {
			return nil, fmt.Errorf("OST %d: %w", index, ErrNoStore)
		}
		return nil, fmt.Errorf("OST %d: open the superblock: %w", index, err)
	}
	fs.Close(fd)
	g := &guardFS{FS: fs, repair: repair}
	t, err := ost.Open(ost.Options{Index: index, FS: g, Logger: log, CommitInterval: -1})
	if err != nil {
		if errors.Is(err, ost.ErrLocked) {
			err = ErrInUse
		}
		return nil, fmt.Errorf("OST %d: %w", index, err)
	}
	t.Begin(0)
	return &Dir{index: index, fs: g, t: t}, nil
}

// Close releases the store.
func (d *Dir) Close() error { return d.t.Close() }

// Index implements ObjectStore.
func (d *Dir) Index() uint16 { return d.index }

// Walk implements ObjectStore.
func (d *Dir) Walk(f func(ost.ObjectInfo)) error { return d.t.WalkObjects(f) }

// Remove implements ObjectStore.
func (d *Dir) Remove(fid wire.FID, stripe uint8) error {
	req := wire.Request{Header: wire.Header{Op: wire.OpDestroy, Flags: wire.FlagWaitCommit}, FID: fid, Stripe: stripe}
	var rep wire.Reply
	if err := wire.InProc(d.t).Call(context.Background(), &req, &rep); err != nil {
		return fmt.Errorf("destroy %v stripe %d: %w", fid, stripe, err)
	}
	if rep.Status != wire.OK {
		return fmt.Errorf("destroy %v stripe %d: %w", fid, stripe, rep.Status)
	}
	return nil
}

// SetAside implements ObjectStore. The files go to the directory lost+found of
// the store, under their own names.
func (d *Dir) SetAside(i ost.ObjectInfo) (string, error) {
	from := i.Name
	if from == "" {
		var err error
		if from, err = d.locate(i.FID, i.Stripe); err != nil {
			return "", err
		}
	}
	if err := d.fs.Mkdir(asideDir); err != nil && err != unix.EEXIST {
		return "", fmt.Errorf("make %s: %w", asideDir, err)
	}
	names, err := d.fs.ReadDir(asideDir)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", asideDir, err)
	}
	taken := map[string]bool{}
	for _, n := range names {
		taken[n] = true
	}
	to := path.Base(from)
	for n := 1; taken[to] || taken[to+".s"]; n++ {
		to = fmt.Sprintf("%s.%d", path.Base(from), n)
	}
	to = asideDir + "/" + to
	// The further segments first: an object without them is damaged, they
	// without an object are an interrupted destruction.
	if !strings.HasSuffix(from, ".s") {
		if err := d.fs.Rename(from+".s", to+".s"); err != nil && err != unix.ENOENT {
			return "", fmt.Errorf("move %s: %w", from, err)
		}
	}
	if err := d.fs.Rename(from, to); err != nil {
		return "", fmt.Errorf("move %s: %w", from, err)
	}
	for _, dir := range []string{".", asideDir, path.Dir(from)} {
		if err := d.sync(dir); err != nil {
			return "", fmt.Errorf("sync %s: %w", dir, err)
		}
	}
	return to, nil
}

func (d *Dir) sync(dir string) error {
	fd, err := d.fs.Open(dir, objfs.ReadOnly|objfs.Directory)
	if err != nil {
		return err
	}
	defer d.fs.Close(fd)
	return d.fs.Fdatasync(fd)
}

// locate finds the first segment of an object among the directories.
func (d *Dir) locate(f wire.FID, stripe uint8) (string, error) {
	base := fmt.Sprintf("%016x-%08x-%08x-%02x", f.Seq, f.OID, f.Ver, stripe)
	dirs, err := d.fs.ReadDir("o")
	if err != nil {
		return "", fmt.Errorf("locate %s: %w", base, err)
	}
	for _, dir := range dirs {
		p := "o/" + dir + "/" + base
		fd, err := d.fs.Open(p, objfs.ReadOnly)
		if err == nil {
			d.fs.Close(fd)
			return p, nil
		}
	}
	return "", fmt.Errorf("locate %s: %w", base, unix.ENOENT)
}

// Names of an OST's superblock.
const (
	superName = "super"
	superTemp = "super.tmp"
)

// Descriptors of the superblock's files while they are in memory only.
const (
	fdSuper = 1<<30 + iota
	fdTemp
)

// guardFS keeps a check from changing a store: the target that reads it
// believes that it writes its superblock, which stays in memory. Other changes
// are refused, except removals and renames of a repair.
type guardFS struct {
	objfs.FS
	repair bool

	mu          sync.Mutex
	super, temp []byte // nil: not written
}

func (g *guardFS) mem(fd int) *[]byte {
	switch fd {
	case fdSuper:
		return &g.super
	case fdTemp:
		return &g.temp
	}
	return nil
}

// Open implements objfs.FS.
func (g *guardFS) Open(p string, flags int) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case p == superTemp:
		if flags&objfs.Trunc != 0 {
			g.temp = []byte{}
		}
		return fdTemp, nil
	case p == superName && g.super != nil:
		return fdSuper, nil
	case flags&(objfs.Create|objfs.Trunc) != 0:
		return -1, unix.EROFS
	}
	return g.FS.Open(p, flags)
}

// Close implements objfs.FS.
func (g *guardFS) Close(fd int) error {
	if g.mem(fd) != nil {
		return nil
	}
	return g.FS.Close(fd)
}

// Pread implements objfs.FS.
func (g *guardFS) Pread(fd int, p []byte, off int64) (int, error) {
	m := g.mem(fd)
	if m == nil {
		return g.FS.Pread(fd, p, off)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if off >= int64(len(*m)) {
		return 0, nil
	}
	return copy(p, (*m)[off:]), nil
}

// Pwrite implements objfs.FS.
func (g *guardFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	m := g.mem(fd)
	if m == nil {
		return 0, unix.EROFS
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if off != int64(len(*m)) {
		return 0, unix.EROFS
	}
	*m = append(*m, p...)
	return len(p), nil
}

// Fstat implements objfs.FS.
func (g *guardFS) Fstat(fd int) (objfs.Stat, error) {
	if m := g.mem(fd); m != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		return objfs.Stat{Size: int64(len(*m))}, nil
	}
	return g.FS.Fstat(fd)
}

// Truncate implements objfs.FS.
func (g *guardFS) Truncate(int, int64) error { return unix.EROFS }

// Fdatasync implements objfs.FS.
func (g *guardFS) Fdatasync(fd int) error {
	if g.mem(fd) != nil || !g.repair {
		return nil
	}
	return g.FS.Fdatasync(fd)
}

// Syncfs implements objfs.FS. The target calls it when the store was not
// closed; there is nothing of ours to make durable.
func (g *guardFS) Syncfs() error { return nil }

// OpenMemory implements objfs.FS.
func (g *guardFS) OpenMemory(string) (objfs.Memory, error) { return nil, unix.EROFS }

// Mkdir implements objfs.FS.
func (g *guardFS) Mkdir(p string) error {
	if !g.repair || p != asideDir {
		return unix.EROFS
	}
	return g.FS.Mkdir(p)
}

// Remove implements objfs.FS.
func (g *guardFS) Remove(p string) error {
	if !g.repair {
		return unix.EROFS
	}
	return g.FS.Remove(p)
}

// Rename implements objfs.FS.
func (g *guardFS) Rename(from, to string) error {
	if from == superTemp && to == superName {
		g.mu.Lock()
		g.super, g.temp = g.temp, nil
		g.mu.Unlock()
		return nil
	}
	if !g.repair {
		return unix.EROFS
	}
	return g.FS.Rename(from, to)
}

// OpenOptions tell Open where a stopped node's stores are.
type OpenOptions struct {
	MDTDir string
	// OSTDirs in the order of the OSTs' indices.
	OSTDirs []string
	Repair  bool

	Progress    func(phase string, done, total uint64)
	Logger      *slog.Logger
	MaxFindings int

	// VFS and OSTFS replace the operating system's file system in tests.
	VFS   vfs.FS
	OSTFS func(i int) objfs.FS
}

// Open opens the stores of a stopped node, runs the check, and closes them. The
// error wraps ErrInUse when a server runs on them, and ErrNoStore when there is
// nothing to check.
func Open(ctx context.Context, o OpenOptions) (rep *Report, err error) {
	var osts []ObjectStore
	defer func() {
		for _, s := range osts {
			if cerr := s.(*Dir).Close(); cerr != nil && err == nil {
				rep, err = nil, fmt.Errorf("fsck: %w", cerr)
			}
		}
	}()
	// The metadata target first: a running server has it open before others.
	e, err := openMDT(&o)
	if err != nil {
		return nil, fmt.Errorf("fsck: MDT in %s: %w", o.MDTDir, err)
	}
	defer func() {
		if cerr := e.Close(); cerr != nil && err == nil {
			rep, err = nil, fmt.Errorf("fsck: %w", cerr)
		}
	}()
	for i, dir := range o.OSTDirs {
		var fs objfs.FS
		if o.OSTFS != nil {
			fs = o.OSTFS(i)
		} else {
			if _, err := os.Stat(dir); err != nil {
				return nil, fmt.Errorf("fsck: OST %d: %w (%w)", i, ErrNoStore, err)
			}
			if fs, err = objfs.NewLinux(dir); err != nil {
				return nil, fmt.Errorf("fsck: OST %d: %w", i, err)
			}
		}
		d, err := NewDir(fs, uint16(i), o.Repair, nil)
		if err != nil {
			return nil, fmt.Errorf("fsck: in %s: %w", dir, err)
		}
		osts = append(osts, d)
	}
	return Run(ctx, Options{MDT: e, OSTs: osts, Repair: o.Repair, Progress: o.Progress, Logger: o.Logger, MaxFindings: o.MaxFindings})
}

func openMDT(o *OpenOptions) (store.Engine, error) {
	// Read-only first also for a repair: opening for writing would make a store.
	open := func(ro bool) (*local.Pebble, error) {
		e, err := local.OpenPebble(o.MDTDir, local.Options{FS: o.VFS, ReadOnly: ro, MinFreeBytes: -1})
		if err != nil {
			// Pebble's lock: flock's error, or its own words for this process.
			if errors.Is(err, unix.EAGAIN) || strings.Contains(err.Error(), "lock held by current process") {
				return nil, ErrInUse
			}
			if errors.Is(err, os.ErrNotExist) || strings.Contains(err.Error(), "does not exist") {
				return nil, fmt.Errorf("%w (%w)", ErrNoStore, err)
			}
			return nil, err
		}
		return e, nil
	}
	if o.VFS == nil {
		if _, err := os.Stat(o.MDTDir); err != nil {
			return nil, fmt.Errorf("%w (%w)", ErrNoStore, err)
		}
	}
	e, err := open(true)
	if err != nil || !o.Repair {
		return e, err
	}
	if _, err := mdt.ReadSuper(e); errors.Is(err, store.ErrNotFound) {
		it, ierr := e.NewIter(nil, nil)
		if ierr != nil {
			e.Close()
			return nil, ierr
		}
		empty := !it.First()
		it.Close()
		if empty {
			e.Close()
			return nil, ErrNoStore
		}
	}
	if err := e.Close(); err != nil {
		return nil, err
	}
	return open(false)
}
