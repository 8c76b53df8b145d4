package billyfs

import (
	"os"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/util"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Stat describes the object that name leads to, following symbolic links.
func (f *FS) Stat(name string) (os.FileInfo, error) { return f.stat("stat", name, follow) }

// Lstat describes the object that name names, be it a symbolic link.
func (f *FS) Lstat(name string) (os.FileInfo, error) { return f.stat("lstat", name, 0) }

func (f *FS) stat(op, name string, fl walkFlags) (os.FileInfo, error) {
	pl, err := f.find(name, fl)
	if err != nil {
		return nil, pathErr(op, name, err)
	}
	return newInfo(name, &pl.attr), nil
}

// find is walk for objects that have to exist.
func (f *FS) find(name string, fl walkFlags) (place, error) {
	pl, err := f.walk(name, fl)
	if err == nil && !pl.found {
		err = syscall.ENOENT
	}
	return pl, err
}

// ReadDir lists a directory, sorted by name, without "." and "..". Entries that
// disappear meanwhile may be missing.
func (f *FS) ReadDir(name string) ([]os.FileInfo, error) {
	pl, err := f.walk(name, follow)
	if err == nil {
		err = pl.directory()
	}
	var infos []os.FileInfo
	for cookie, eof := uint64(0), false; err == nil && !eof; {
		cookie, eof, err = f.page(pl.attr.FID, cookie, func(i *FileInfo) { infos = append(infos, i) })
	}
	if err != nil {
		return nil, pathErr("readdir", name, err)
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].Name() < infos[j].Name() })
	return infos, nil
}

// Bounds of one page of a directory.
const (
	pageBytes   = 256 << 10
	pageEntries = 2048
)

// page gives the entries after cookie, as many as one request brings.
func (f *FS) page(dir wire.FID, cookie uint64, add func(*FileInfo)) (next uint64, eof bool, err error) {
	m := f.get(wire.OpReaddir)
	defer m.put()
	m.req.FID, m.req.Cookie, m.req.Plus = dir, cookie, true
	m.req.Count, m.req.MaxEntries = pageBytes, pageEntries
	if err := f.call(m); err != nil {
		return cookie, false, err
	}
	for i := range m.rep.Entries {
		e := &m.rep.Entries[i]
		cookie = e.Cookie
		if string(e.Name) == "." || string(e.Name) == ".." {
			continue
		}
		if e.HasAttr {
			err = f.complete(&e.Attr)
		} else {
			err = f.attr(e.FID, &e.Attr)
		}
		switch err {
		case nil:
			add(newInfo(string(e.Name), &e.Attr))
		case syscall.ENOENT, syscall.ESTALE:
			// Removed between the two requests.
		default:
			return cookie, false, err
		}
	}
	if len(m.rep.Entries) == 0 && !m.rep.EOF {
		return cookie, false, syscall.EIO
	}
	return cookie, m.rep.EOF, nil
}

// Mkdir makes one directory.
func (f *FS) Mkdir(name string, perm os.FileMode) error {
	pl, err := f.walk(name, 0)
	switch {
	case err != nil:
	case pl.found:
		err = syscall.EEXIST
	default:
		err = f.mkdirAt(pl.dir, pl.name, perm, &pl.attr)
	}
	return pathErr("mkdir", name, err)
}

// MkdirAll makes the directory name and those above it that are missing.
func (f *FS) MkdirAll(name string, perm os.FileMode) error {
	return pathErr("mkdir", name, f.mkdirAll(name, perm))
}

func (f *FS) mkdirAll(name string, perm os.FileMode) error {
	for at := 0; at < len(name); {
		end := strings.IndexByte(name[at:], '/')
		if end < 0 {
			end = len(name) - at
		}
		at += end
		pl, err := f.walk(name[:at], follow)
		if err != nil {
			return err
		}
		if !pl.found {
			if l, err := f.walk(name[:at], 0); err == nil && l.found {
				// A link that leads nowhere.
				return syscall.EEXIST
			}
			err = f.mkdirAt(pl.dir, pl.name, perm, &pl.attr)
			if err == syscall.EEXIST {
				pl, err = f.walk(name[:at], follow)
			}
			if err != nil {
				return err
			}
		} else if err := pl.directory(); err != nil {
			return err
		}
		at++
	}
	return nil
}

// Remove removes a file, a symbolic link or an empty directory.
func (f *FS) Remove(name string) error {
	pl, err := f.find(name, 0)
	switch {
	case err != nil:
	case pl.name == "":
		err = syscall.EBUSY
	default:
		op := wire.OpRemove
		if pl.attr.Type == wire.TypeDir {
			op = wire.OpRmdir
		}
		m := f.get(op)
		defer m.put()
		m.req.FID, m.req.Name = pl.dir, []byte(pl.name)
		err = f.call(m)
	}
	return pathErr("remove", name, err)
}

// Rename moves an object, replacing what has the new name: a file a file, a
// directory an empty directory.
func (f *FS) Rename(from, to string) error {
	return linkErr("rename", from, to, f.rename(from, to))
}

func (f *FS) rename(from, to string) error {
	src, err := f.find(from, 0)
	if err != nil {
		return err
	}
	dst, err := f.walk(to, makeParents)
	if err != nil {
		return err
	}
	switch {
	case src.name == "" || dst.name == "":
		return syscall.EBUSY
	case dst.slash && src.attr.Type != wire.TypeDir:
		return syscall.ENOTDIR
	}
	m := f.get(wire.OpRename)
	defer m.put()
	m.req.FID, m.req.Name = src.dir, []byte(src.name)
	m.req.FID2, m.req.Name2 = dst.dir, []byte(dst.name)
	return f.call(m)
}

// Symlink makes the symbolic link link. target is kept as it is.
func (f *FS) Symlink(target, link string) error {
	return linkErr("symlink", target, link, f.symlink(target, link))
}

func (f *FS) symlink(target, link string) error {
	switch {
	case target == "":
		return syscall.ENOENT
	case len(target) > wire.MaxSymlinkLen:
		return syscall.ENAMETOOLONG
	case strings.IndexByte(target, 0) >= 0:
		return syscall.EINVAL
	}
	pl, err := f.newName(link)
	if err != nil {
		return err
	}
	m := f.get(wire.OpSymlink)
	defer m.put()
	m.req.FID, m.req.Name, m.req.Data = pl.dir, []byte(pl.name), []byte(target)
	m.req.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: 0o777}
	return f.call(m)
}

// newName is the place of something to be made that is not a directory.
func (f *FS) newName(name string) (place, error) {
	pl, err := f.walk(name, makeParents)
	switch {
	case err != nil:
	case pl.found:
		err = syscall.EEXIST
	case pl.slash:
		err = syscall.ENOENT
	}
	return pl, err
}

// Readlink returns the target of a symbolic link as it was given.
func (f *FS) Readlink(link string) (string, error) {
	pl, err := f.find(link, 0)
	if err == nil && pl.attr.Type != wire.TypeLnk {
		err = syscall.EINVAL
	}
	var target string
	if err == nil {
		target, err = f.readlink(pl.attr.FID)
	}
	return target, pathErr("readlink", link, err)
}

// Link makes a hard link to the object at name.
func (f *FS) Link(name, link string) error {
	return linkErr("link", name, link, f.link(name, link))
}

func (f *FS) link(name, link string) error {
	src, err := f.find(name, 0)
	if err != nil {
		return err
	}
	if src.attr.Type == wire.TypeDir {
		return syscall.EPERM
	}
	dst, err := f.newName(link)
	if err != nil {
		return err
	}
	m := f.get(wire.OpLink)
	defer m.put()
	m.req.FID, m.req.FID2, m.req.Name2 = src.attr.FID, dst.dir, []byte(dst.name)
	return f.call(m)
}

// File types in the mode of Mknod, as in stat(2).
const (
	sIFMT   = 0o170000
	sIFIFO  = 0o010000
	sIFCHR  = 0o020000
	sIFBLK  = 0o060000
	sIFSOCK = 0o140000
)

// Mknod makes a special file of the type in mode, as mknod(2). go-nfs gives no
// type when it means a block device.
func (f *FS) Mknod(name string, mode, major, minor uint32) error {
	t := wire.TypeBlk
	switch mode & sIFMT {
	case 0, sIFBLK:
	case sIFCHR:
		t = wire.TypeChr
	case sIFIFO:
		t = wire.TypeFifo
	case sIFSOCK:
		t = wire.TypeSock
	default:
		return pathErr("mknod", name, syscall.EINVAL)
	}
	return pathErr("mknod", name, f.mknod(name, t, mode, major, minor))
}

// Mkfifo makes a named pipe.
func (f *FS) Mkfifo(name string, mode uint32) error {
	return pathErr("mkfifo", name, f.mknod(name, wire.TypeFifo, mode, 0, 0))
}

// Socket makes the name of a socket, mode 0777 before umask.
func (f *FS) Socket(name string) error {
	return pathErr("socket", name, f.mknod(name, wire.TypeSock, 0o777, 0, 0))
}

func (f *FS) mknod(name string, t wire.FileType, mode, major, minor uint32) error {
	pl, err := f.newName(name)
	if err != nil {
		return err
	}
	m := f.get(wire.OpMknod)
	defer m.put()
	m.req.FID, m.req.Name, m.req.Type = pl.dir, []byte(pl.name), t
	if t == wire.TypeBlk || t == wire.TypeChr {
		m.req.RdevMajor, m.req.RdevMinor = major, minor
	}
	m.req.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: mode & 0o7777 &^ modeBits(f.o.Umask)}
	return f.call(m)
}

// TempFile makes a new file, mode 0600, with a name that begins with prefix.
func (f *FS) TempFile(dir, prefix string) (billy.File, error) { return util.TempFile(f, dir, prefix) }

// Chmod changes permission, setuid, setgid and sticky bits.
func (f *FS) Chmod(name string, mode os.FileMode) error {
	return f.setattr("chmod", name, follow, wire.SetAttr{Mask: wire.SetMode, Mode: modeBits(mode)})
}

// Chown changes owner and group; -1 leaves one as it is.
func (f *FS) Chown(name string, uid, gid int) error {
	return f.setattr("chown", name, follow, owners(uid, gid))
}

// Lchown is Chown that does not follow a symbolic link.
func (f *FS) Lchown(name string, uid, gid int) error {
	return f.setattr("lchown", name, 0, owners(uid, gid))
}

func owners(uid, gid int) wire.SetAttr {
	var s wire.SetAttr
	if uid >= 0 {
		s.Mask |= wire.SetUID
		s.UID = uint32(uid)
	}
	if gid >= 0 {
		s.Mask |= wire.SetGID
		s.GID = uint32(gid)
	}
	return s
}

// Chtimes changes the times of access and modification; a zero time leaves one
// as it is.
func (f *FS) Chtimes(name string, atime, mtime time.Time) error {
	return f.setattr("chtimes", name, follow, times(atime, mtime))
}

// Lchtimes is Chtimes that does not follow a symbolic link.
func (f *FS) Lchtimes(name string, atime, mtime time.Time) error {
	return f.setattr("chtimes", name, 0, times(atime, mtime))
}

func times(atime, mtime time.Time) wire.SetAttr {
	var s wire.SetAttr
	if !atime.IsZero() {
		s.Mask |= wire.SetAtime
		s.Atime = atime.UnixNano()
	}
	if !mtime.IsZero() {
		s.Mask |= wire.SetMtime
		s.Mtime = mtime.UnixNano()
	}
	return s
}

func (f *FS) setattr(op, name string, fl walkFlags, s wire.SetAttr) error {
	pl, err := f.find(name, fl)
	if err == nil && s.Mask != 0 {
		err = f.setattrFID(pl.attr.FID, s)
	}
	return pathErr(op, name, err)
}

func (f *FS) setattrFID(fid wire.FID, s wire.SetAttr) error {
	m := f.get(wire.OpSetattr)
	defer m.put()
	m.req.FID, m.req.SetAttr = fid, s
	if s.Mask&wire.SetSize != 0 {
		// The client's later writes rely on the epoch that a size change opens,
		// so it has to be durable. A file that was open may be resized by its
		// owner whatever its mode is now; open has checked.
		m.req.Flags |= wire.FlagWaitCommit | wire.FlagOwnerOverride
	}
	f.c.Setattr(f.ctx, f.o.Owner, &m.req, &m.rep)
	return toErr(m.rep.Status)
}

// Statfs gives the space of the whole file system.
func (f *FS) Statfs() (wire.Statfs, error) {
	s, st := f.c.Statfs(f.ctx, f.o.Owner)
	return s, pathErr("statfs", f.rootPath, toErr(st))
}

// Create makes or truncates a file, mode 0666 before umask, for reading and
// writing.
func (f *FS) Create(name string) (billy.File, error) {
	return f.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o666)
}

// Open opens a file for reading. A directory can be opened but not read.
func (f *FS) Open(name string) (billy.File, error) { return f.OpenFile(name, os.O_RDONLY, 0) }

// OpenFile opens name. It understands O_RDONLY, O_WRONLY, O_RDWR, O_APPEND,
// O_CREATE, O_EXCL, O_TRUNC and O_SYNC. The result is a *File.
func (f *FS) OpenFile(name string, flag int, perm os.FileMode) (billy.File, error) {
	h, err := f.open(name, flag, perm)
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	return h, nil
}

// createTries bounds how often open starts again when others make and remove
// the file at the same time.
const createTries = 16

func (f *FS) open(name string, flag int, perm os.FileMode) (*File, error) {
	h := &File{fs: f, name: name, append: flag&os.O_APPEND != 0, sync: flag&os.O_SYNC == os.O_SYNC}
	var want uint32
	switch flag & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR) {
	case os.O_RDONLY:
		h.read, want = true, wire.MayRead
	case os.O_WRONLY:
		h.write, want = true, wire.MayWrite
	case os.O_RDWR:
		h.read, h.write, want = true, true, wire.MayRead|wire.MayWrite
	default:
		return nil, syscall.EINVAL
	}
	if flag&os.O_TRUNC != 0 {
		want |= wire.MayWrite
	}
	create, excl := flag&os.O_CREATE != 0, flag&os.O_EXCL != 0 && flag&os.O_CREATE != 0
	fl := follow
	switch {
	case excl:
		fl = makeParents
	case create:
		fl |= makeParents
	}
	var pl place
	for try := 0; ; try++ {
		var err error
		if pl, err = f.walk(name, fl); err != nil {
			return nil, err
		}
		switch {
		case pl.found && excl:
			return nil, syscall.EEXIST
		case !pl.found && !create:
			return nil, syscall.ENOENT
		case !pl.found && pl.slash:
			return nil, syscall.EISDIR
		}
		if pl.found {
			break
		}
		a, err := f.createAt(pl.dir, pl.name, perm)
		if err == nil {
			h.fid, h.attr = a.FID, a
			return h, nil
		}
		if err != syscall.EEXIST || excl || try == createTries {
			return nil, err
		}
	}
	switch pl.attr.Type {
	case wire.TypeReg:
	case wire.TypeDir:
		if want&wire.MayWrite != 0 || create {
			return nil, syscall.EISDIR
		}
	case wire.TypeLnk:
		return nil, syscall.ELOOP
	default:
		// Nobody is behind a special file of another node.
		return nil, syscall.ENXIO
	}
	if !wire.MayAccess(&pl.attr, &f.o.Cred, want) {
		return nil, syscall.EACCES
	}
	h.fid, h.attr, h.dir = pl.attr.FID, pl.attr, pl.attr.Type == wire.TypeDir
	if flag&os.O_TRUNC != 0 {
		if err := f.setattrFID(h.fid, wire.SetAttr{Mask: wire.SetSize}); err != nil {
			return nil, err
		}
		if err := f.attr(h.fid, &h.attr); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (f *FS) createAt(dir wire.FID, name string, perm os.FileMode) (wire.Attr, error) {
	m := f.get(wire.OpCreate)
	defer m.put()
	m.req.FID, m.req.Name, m.req.How = dir, []byte(name), wire.Guarded
	m.req.SetAttr = f.mode(perm)
	if f.o.Durable {
		// Only an epoch that is durable may be used by writes; otherwise the
		// first write opens it.
		m.req.Flags |= wire.FlagOpenEpoch
	}
	if err := f.call(m); err != nil {
		return wire.Attr{}, err
	}
	if f.o.Durable && m.rep.Created && m.rep.Attr.EpochOpen {
		f.c.Created(m.rep.Attr.FID, m.rep.Transno)
	}
	return m.rep.Attr, f.complete(&m.rep.Attr)
}
