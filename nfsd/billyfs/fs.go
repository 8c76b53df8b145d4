// Package billyfs gives Go programs a go-billy file system over baton's file
// system client, without NFS in between.
//
// Paths are slash-separated and relative to Options.Root, whether or not they
// begin with a slash. They are walked component by component as a kernel does:
// symbolic links are followed (at most 40), ".." leaves a directory for the one
// it was reached through, and neither links nor ".." lead out of the root: an
// absolute link target starts at the root, and ".." there stays there.
//
// As go-billy's conventions have it, OpenFile with O_CREATE, Rename and Symlink
// make missing parent directories (mode 0755 before umask).
//
// Failures are *fs.PathError, or *os.LinkError where two paths are involved,
// around a syscall.Errno, so that errors.Is works with fs.ErrNotExist,
// fs.ErrExist and fs.ErrPermission.
package billyfs

import (
	"context"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"

	"github.com/go-git/go-billy/v5"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// maxLinks bounds how many symbolic links one path may lead through.
const maxLinks = 40

// Options configure a FS. The zero value is root's view of the whole name
// space, without waiting for commits of metadata.
type Options struct {
	// Cred is the identity that permissions are checked for.
	Cred wire.Cred
	// Owner names the service address that requests are made for.
	Owner client.Owner
	// Umask is taken off the mode of everything that is made.
	Umask os.FileMode
	// Root is the directory that the paths begin at; "" is the top. It is
	// looked up once, by New.
	Root string
	// Durable makes every modification wait until it survives a power failure.
	// Without it only File.Close, File.Sync and writes to O_SYNC files wait.
	Durable bool
	// Context ends waiting for remote targets; nil never does.
	Context context.Context
}

// FS is a go-billy file system. Its methods are safe for concurrent use. It
// holds no resources of its own; the client it was made from must outlive it.
type FS struct {
	c        *client.FS
	o        Options
	ctx      context.Context
	rootFID  wire.FID
	rootPath string
	shared   *shared
}

// shared is what a FS has in common with those that Chroot made from it.
type shared struct {
	locks  lockTable
	append [64]sync.Mutex
}

func (s *shared) appendLock(fid wire.FID) *sync.Mutex {
	return &s.append[(uint64(fid.OID)+fid.Seq)%uint64(len(s.append))]
}

// Interfaces that users of go-billy and go-nfs ask for.
var (
	_ billy.Filesystem = (*FS)(nil)
	_ billy.Change     = (*FS)(nil)
	_ billy.Capable    = (*FS)(nil)
)

// New returns a view of c. It fails when o.Root is not a directory that
// o.Cred can reach.
func New(c *client.FS, o Options) (*FS, error) {
	f := &FS{c: c, o: o, ctx: o.Context, rootFID: wire.RootFID, rootPath: "/", shared: new(shared)}
	if f.ctx == nil {
		f.ctx = context.Background()
	}
	f.shared.locks.init()
	return f.chroot("open", o.Root)
}

// Chroot returns a FS whose root is the directory p. Advisory locks are shared
// with f.
func (f *FS) Chroot(p string) (billy.Filesystem, error) {
	n, err := f.chroot("chroot", p)
	if err != nil {
		return nil, err
	}
	return n, nil
}

func (f *FS) chroot(op, p string) (*FS, error) {
	pl, err := f.walk(p, follow)
	if err == nil {
		err = pl.directory()
	}
	if err != nil {
		return nil, &fs.PathError{Op: op, Path: p, Err: err}
	}
	n := *f
	n.rootFID = pl.attr.FID
	n.rootPath = path.Join(f.rootPath, path.Clean("/"+p))
	return &n, nil
}

// Root is the path of the file system's root in the whole name space.
func (f *FS) Root() string { return f.rootPath }

// Join joins path elements with slashes and cleans the result.
func (f *FS) Join(elem ...string) string { return path.Join(elem...) }

// Capabilities tells that everything go-billy knows of is there.
func (f *FS) Capabilities() billy.Capability { return billy.AllCapabilities }

// msg is a request with its reply.
type msg struct {
	req wire.Request
	rep wire.Reply
}

var msgs = sync.Pool{New: func() any { return new(msg) }}

func (f *FS) get(op wire.Op) *msg {
	m := msgs.Get().(*msg)
	m.req.Reset()
	m.rep.Reset()
	m.req.Op, m.req.Cred = op, f.o.Cred
	if f.o.Durable && op.Modifies() {
		m.req.Flags = wire.FlagWaitCommit
	}
	return m
}

func (m *msg) put() {
	m.req.Reset()
	m.rep.Reset()
	msgs.Put(m)
}

func (f *FS) call(m *msg) error {
	f.c.Call(f.ctx, f.o.Owner, &m.req, &m.rep)
	return toErr(m.rep.Status)
}

// attr reads current attributes.
func (f *FS) attr(fid wire.FID, a *wire.Attr) error {
	st, _ := f.c.Attr(f.ctx, f.o.Owner, fid, a, true)
	return toErr(st)
}

func (f *FS) complete(a *wire.Attr) error {
	if !a.EpochOpen {
		return nil
	}
	st, _ := f.c.Complete(f.ctx, f.o.Owner, a, true)
	return toErr(st)
}

// How walk treats a path.
type walkFlags uint8

const (
	// follow: a symbolic link as the last component is followed.
	follow walkFlags = 1 << iota
	// makeParents: missing directories before the last component are made.
	makeParents
)

// place is where a path leads.
type place struct {
	dir  wire.FID // the directory that holds name
	name string   // "" when the path ends in the root, "." or ".."
	// found tells whether attr is valid: the object there.
	found bool
	attr  wire.Attr
	// slash: the path ends in a slash, so only a directory will do.
	slash bool
}

func (p *place) directory() error {
	switch {
	case !p.found:
		return syscall.ENOENT
	case p.attr.Type != wire.TypeDir:
		return syscall.ENOTDIR
	}
	return nil
}

// walk finds where p leads. A missing last component is no error.
func (f *FS) walk(p string, fl walkFlags) (place, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return place{}, syscall.EINVAL
	}
	var stackBuf [16]wire.FID
	stack := append(stackBuf[:0], f.rootFID)
	var pl place
	// links counts those followed; what is longer than tail in rest came from the
	// last one, and what a link names is not made for it.
	links, tail := 0, 0
	rest := p
	for {
		rest = strings.TrimLeft(rest, "/")
		if rest == "" {
			break
		}
		name, after, more := strings.Cut(rest, "/")
		rest = strings.TrimLeft(after, "/")
		last := rest == ""
		pl.slash = pl.slash || last && more
		dir := stack[len(stack)-1]
		switch name {
		case ".":
			continue
		case "..":
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		if len(name) > wire.MaxNameLen {
			return pl, syscall.ENAMETOOLONG
		}
		err := f.lookup(dir, name, &pl.attr)
		if err == syscall.ENOENT {
			if last {
				pl.dir, pl.name = dir, name
				return pl, nil
			}
			if fl&makeParents != 0 && !(links > 0 && len(rest) >= tail) {
				err = f.mkdirAt(dir, name, 0o755, &pl.attr)
				if err == syscall.EEXIST {
					err = f.lookup(dir, name, &pl.attr)
				}
			}
		}
		if err != nil {
			return pl, err
		}
		switch {
		case pl.attr.Type == wire.TypeLnk && (!last || pl.slash || fl&follow != 0):
			if links++; links > maxLinks {
				return pl, syscall.ELOOP
			}
			target, err := f.readlink(pl.attr.FID)
			if err != nil {
				return pl, err
			}
			if target == "" {
				return pl, syscall.ENOENT
			}
			if target[0] == '/' {
				stack = stack[:1]
			}
			tail = len(rest)
			if last {
				rest = target
			} else {
				rest = target + "/" + rest
			}
		case last:
			if pl.slash && pl.attr.Type != wire.TypeDir {
				return pl, syscall.ENOTDIR
			}
			pl.dir, pl.name, pl.found = dir, name, true
			return pl, f.complete(&pl.attr)
		case pl.attr.Type == wire.TypeDir:
			stack = append(stack, pl.attr.FID)
		default:
			return pl, syscall.ENOTDIR
		}
	}
	pl.dir, pl.name = stack[len(stack)-1], ""
	if err := f.attr(pl.dir, &pl.attr); err != nil {
		return pl, err
	}
	pl.found = true
	return pl, nil
}

func (f *FS) lookup(dir wire.FID, name string, a *wire.Attr) error {
	m := f.get(wire.OpLookup)
	defer m.put()
	m.req.FID, m.req.Name = dir, []byte(name)
	err := f.call(m)
	if err == nil {
		*a = m.rep.Attr
	}
	return err
}

func (f *FS) readlink(fid wire.FID) (string, error) {
	m := f.get(wire.OpReadlink)
	defer m.put()
	m.req.FID = fid
	if err := f.call(m); err != nil {
		return "", err
	}
	return string(m.rep.Data), nil
}

func (f *FS) mode(perm os.FileMode) wire.SetAttr {
	return wire.SetAttr{Mask: wire.SetMode, Mode: modeBits(perm &^ f.o.Umask)}
}

func (f *FS) mkdirAt(dir wire.FID, name string, perm os.FileMode, a *wire.Attr) error {
	m := f.get(wire.OpMkdir)
	defer m.put()
	m.req.FID, m.req.Name = dir, []byte(name)
	m.req.SetAttr = f.mode(perm)
	err := f.call(m)
	if err == nil {
		*a = m.rep.Attr
	}
	return err
}

// errnos gives statuses the numbers that programs know.
var errnos = map[wire.Status]syscall.Errno{
	wire.ErrPerm: syscall.EPERM, wire.ErrNoEnt: syscall.ENOENT, wire.ErrIO: syscall.EIO,
	wire.ErrNXIO: syscall.ENXIO, wire.ErrAcces: syscall.EACCES, wire.ErrExist: syscall.EEXIST,
	wire.ErrXDev: syscall.EXDEV, wire.ErrNoDev: syscall.ENODEV, wire.ErrNotDir: syscall.ENOTDIR,
	wire.ErrIsDir: syscall.EISDIR, wire.ErrInval: syscall.EINVAL, wire.ErrFBig: syscall.EFBIG,
	wire.ErrNoSpc: syscall.ENOSPC, wire.ErrROFS: syscall.EROFS, wire.ErrMLink: syscall.EMLINK,
	wire.ErrNameTooLong: syscall.ENAMETOOLONG, wire.ErrNotEmpty: syscall.ENOTEMPTY,
	wire.ErrDQuot: syscall.EDQUOT, wire.ErrStale: syscall.ESTALE, wire.ErrNotSupp: syscall.ENOTSUP,
	wire.ErrJukebox: syscall.EAGAIN, wire.ErrRecovering: syscall.EAGAIN,
	wire.ErrStaleVIP: syscall.ESTALE, wire.ErrStaleClient: syscall.ESTALE,
}

func toErr(st wire.Status) error {
	if st == wire.OK {
		return nil
	}
	if e, ok := errnos[st]; ok {
		return e
	}
	return syscall.EIO
}

func pathErr(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

func linkErr(op, from, to string, err error) error {
	if err == nil {
		return nil
	}
	return &os.LinkError{Op: op, Old: from, New: to, Err: err}
}

// lockTable holds the advisory locks of files, by FID.
type lockTable struct {
	mu sync.Mutex
	m  map[wire.FID]*lockEntry
}

type lockEntry struct {
	sem  chan struct{} // full while locked
	refs int
}

func (t *lockTable) init() { t.m = make(map[wire.FID]*lockEntry) }

func (t *lockTable) lock(ctx context.Context, fid wire.FID) error {
	t.mu.Lock()
	e := t.m[fid]
	if e == nil {
		e = &lockEntry{sem: make(chan struct{}, 1)}
		t.m[fid] = e
	}
	e.refs++
	t.mu.Unlock()
	select {
	case e.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		t.unref(fid, e)
		return ctx.Err()
	}
}

func (t *lockTable) unlock(fid wire.FID) {
	t.mu.Lock()
	e := t.m[fid]
	t.mu.Unlock()
	if e != nil {
		<-e.sem
		t.unref(fid, e)
	}
}

func (t *lockTable) unref(fid wire.FID, e *lockEntry) {
	t.mu.Lock()
	if e.refs--; e.refs == 0 {
		delete(t.m, fid)
	}
	t.mu.Unlock()
}
