package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/go-git/go-billy/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// copyBuf is the buffer of a copy in bytes.
const copyBuf = 1 << 20

func (a *app) cpCmd(open openFSFunc) *cobra.Command {
	var t target
	var c copier
	cmd := &cobra.Command{
		Use:   "cp [-r] [-p] SRC... DST",
		Short: "Copy files into or out of the file system",
		Long: `Copy files between the file system and the local one. Paths of the side inside
begin with "baton:". Without -r symbolic links named as SRC are followed; with
-r links are copied as links. Existing files are overwritten. Files inside are
durable when the command ends, and every copy's size is checked. What cannot be
copied is reported and the rest goes on; the exit code is then 1.` + filesHelp,
		Example: `  baton cp --data /srv/baton notes.txt baton:/home/ann/
  baton cp -rp baton:/home /backup`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) < 2 {
				return usagef("want at least one SRC and DST")
			}
			srcs, dst := args[:len(args)-1], args[len(args)-1]
			into := strings.HasPrefix(dst, insidePrefix)
			for _, s := range srcs {
				if strings.HasPrefix(s, insidePrefix) == into {
					return usagef("one side has to be inside the file system: either all SRC or DST begin with %q", insidePrefix)
				}
			}
			inside, end, err := t.open(cmd.Context(), a, open)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, end()) }()
			c.src, c.dst, c.stderr = inside, localTree{}, a.stderr
			c.uid, c.gid = -1, -1
			if into {
				c.src, c.dst = localTree{}, inside
				c.uid, c.gid = os.Getuid(), os.Getgid()
			}
			c.umask = umask()
			c.buf = make([]byte, copyBuf)
			c.progress.open(a.stderr)
			return c.run(srcs, dst)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVarP(&c.recursive, "recursive", "r", false, "copy directories with everything below")
	cmd.Flags().BoolVarP(&c.preserve, "preserve", "p", false, "keep modes, owners (where permitted) and times")
	cmd.Flags().SortFlags = false
	return cmd
}

// copier copies from src to dst.
type copier struct {
	src, dst            tree
	recursive, preserve bool
	umask               os.FileMode
	uid, gid            int // of what is made, unless preserved; -1: as it comes
	stderr              io.Writer
	buf                 []byte
	progress            progress
	failed              int
}

func (c *copier) run(srcs []string, dst string) error {
	dst = strings.TrimPrefix(dst, insidePrefix)
	fi, err := c.dst.Stat(dst)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	intoDir := err == nil && fi.IsDir()
	if len(srcs) > 1 && !intoDir {
		return fmt.Errorf("%s: %w", dst, syscall.ENOTDIR)
	}
	for _, s := range srcs {
		s = strings.TrimPrefix(s, insidePrefix)
		to := dst
		// A source that ends in its directory itself ("." or "/") has no name;
		// its contents are meant.
		if b := path.Base(path.Clean(s)); intoDir && b != "." && b != ".." && b != "/" {
			to = path.Join(dst, b)
		}
		stat := c.src.Stat
		if c.recursive {
			stat = c.src.Lstat
		}
		fi, err := stat(s)
		if err != nil {
			c.fail(err)
			continue
		}
		c.copy(s, to, fi)
	}
	c.progress.end()
	if c.failed > 0 {
		return fmt.Errorf("%d of the objects were not copied", c.failed)
	}
	return nil
}

func (c *copier) fail(err error) {
	c.failed++
	c.progress.end()
	fmt.Fprintf(c.stderr, "baton: cp: %v\n", err)
}

func (c *copier) copy(from, to string, fi os.FileInfo) {
	var err error
	switch m := fi.Mode(); {
	case m.IsRegular():
		err = c.file(from, to, fi)
	case m.IsDir() && !c.recursive:
		err = fmt.Errorf("%s is a directory: use -r", from)
	case m.IsDir():
		err = c.dir(from, to, fi)
	case m&fs.ModeSymlink != 0:
		err = c.link(from, to, fi)
	default:
		err = fmt.Errorf("%s is a special file and left out", from)
	}
	if err != nil {
		c.fail(err)
	}
}

func (c *copier) dir(from, to string, fi os.FileInfo) error {
	perm := fi.Mode().Perm() &^ c.umask
	// The owner's rights are needed while the directory is filled.
	err := c.dst.Mkdir(to, perm|0o700)
	made := err == nil
	if errors.Is(err, fs.ErrExist) {
		var have os.FileInfo
		if have, err = c.dst.Stat(to); err == nil && !have.IsDir() {
			err = fmt.Errorf("%s: %w", to, syscall.ENOTDIR)
		}
	}
	if err != nil {
		return err
	}
	infos, err := c.src.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range infos {
		if n := e.Name(); n == "" || n == "." || n == ".." || strings.ContainsRune(n, '/') {
			c.fail(fmt.Errorf("%s holds an entry with the name %q, which cannot be copied", from, n))
			continue
		}
		c.copy(join(from, e.Name()), join(to, e.Name()), e)
	}
	if made && !c.preserve && perm != perm|0o700 {
		if err := c.dst.Chmod(to, perm); err != nil {
			return err
		}
	}
	return c.attributes(from, to, made, fi)
}

func join(dir, name string) string { return strings.TrimSuffix(dir, "/") + "/" + name }

func (c *copier) link(from, to string, fi os.FileInfo) error {
	target, err := c.src.Readlink(from)
	if err != nil {
		return err
	}
	err = c.dst.Symlink(target, to)
	if errors.Is(err, fs.ErrExist) {
		if have, rerr := c.dst.Readlink(to); rerr == nil && have == target {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	return c.attributes(from, to, true, fi)
}

func (c *copier) file(from, to string, fi os.FileInfo) (err error) {
	in, err := c.src.OpenFile(from, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	_, serr := c.dst.Lstat(to)
	made := errors.Is(serr, fs.ErrNotExist)
	out, err := c.dst.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fi.Mode().Perm()&^c.umask)
	if err != nil {
		return err
	}
	n, err := c.data(out, in, from, fi.Size())
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("copy %s: %w", from, err)
	}
	if n != fi.Size() {
		return fmt.Errorf("copy %s: %d bytes were copied of a file of %d: it changed meanwhile", from, n, fi.Size())
	}
	have, err := c.dst.Stat(to)
	if err != nil {
		return err
	}
	if have.Size() != n {
		return fmt.Errorf("copy %s: %s has %d bytes after %d were written", from, to, have.Size(), n)
	}
	return c.attributes(from, to, made, fi)
}

// data copies the contents and returns the number of bytes.
func (c *copier) data(out io.Writer, in io.Reader, name string, size int64) (int64, error) {
	var n int64
	for {
		m, err := in.Read(c.buf)
		if m > 0 {
			if _, err := out.Write(c.buf[:m]); err != nil {
				return n, err
			}
			n += int64(m)
			c.progress.show(name, n, size)
		}
		switch err {
		case nil:
		case io.EOF:
			return n, nil
		default:
			return n, err
		}
	}
}

// attributes gives the copy its owner, mode and times.
func (c *copier) attributes(from, to string, made bool, fi os.FileInfo) error {
	uid, gid := c.uid, c.gid
	if c.preserve {
		uid, gid = ownerOf(fi)
	}
	if (uid >= 0 || gid >= 0) && (c.preserve || made && (uid != 0 || gid != 0)) {
		// Giving files away is root's privilege; cp(1) does not complain either.
		if err := c.dst.Lchown(to, uid, gid); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	if !c.preserve {
		return nil
	}
	if fi.Mode()&fs.ModeSymlink == 0 {
		if err := c.dst.Chmod(to, fi.Mode()); err != nil {
			return err
		}
	}
	return c.dst.Lchtimes(to, accessTime(fi), fi.ModTime())
}

func ownerOf(fi os.FileInfo) (uid, gid int) {
	if a := billyfs.Attr(fi); a != nil {
		return int(a.UID), int(a.GID)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid), int(st.Gid)
	}
	return -1, -1
}

func accessTime(fi os.FileInfo) time.Time {
	if a := billyfs.Attr(fi); a != nil {
		return time.Unix(0, a.Atime)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Atim.Unix())
	}
	return fi.ModTime()
}

// umask reads the process's umask, which can only be done by setting it.
func umask() os.FileMode {
	m := syscall.Umask(0)
	syscall.Umask(m)
	return os.FileMode(m) & os.ModePerm
}

// localTree is the local file system.
type localTree struct{}

func (localTree) Stat(name string) (os.FileInfo, error)  { return os.Stat(name) }
func (localTree) Lstat(name string) (os.FileInfo, error) { return os.Lstat(name) }

func (localTree) ReadDir(name string) ([]os.FileInfo, error) {
	es, err := os.ReadDir(name)
	if err != nil {
		return nil, err
	}
	infos := make([]os.FileInfo, 0, len(es))
	for _, e := range es {
		fi, err := os.Lstat(filepath.Join(name, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		infos = append(infos, fi)
	}
	return infos, nil
}

func (localTree) OpenFile(name string, flag int, perm os.FileMode) (billy.File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return localFile{f}, nil
}

// localFile gives a local file the methods that go-billy wants.
type localFile struct{ *os.File }

func (localFile) Lock() error   { return errors.ErrUnsupported }
func (localFile) Unlock() error { return errors.ErrUnsupported }

func (localTree) Mkdir(name string, perm os.FileMode) error { return os.Mkdir(name, perm) }
func (localTree) Symlink(target, link string) error         { return os.Symlink(target, link) }
func (localTree) Readlink(link string) (string, error)      { return os.Readlink(link) }
func (localTree) Chmod(name string, mode os.FileMode) error { return os.Chmod(name, mode) }
func (localTree) Lchown(name string, uid, gid int) error    { return os.Lchown(name, uid, gid) }

func (localTree) Lchtimes(name string, atime, mtime time.Time) error {
	ts := []unix.Timespec{timespec(atime), timespec(mtime)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "chtimes", Path: name, Err: err}
	}
	return nil
}

func timespec(t time.Time) unix.Timespec { return unix.NsecToTimespec(t.UnixNano()) }

// Progress of a copy is shown from progressAfter on, every progressEvery.
const (
	progressAfter = time.Second
	progressEvery = 500 * time.Millisecond
)

// progress writes a line about the file being copied to a terminal.
type progress struct {
	w     io.Writer // nil: none
	next  time.Time
	shown bool
}

// isTerminal tells whether somebody watches what is written to w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	tty := false
	err = rc.Control(func(fd uintptr) {
		_, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
		tty = err == nil
	})
	return err == nil && tty
}

// open turns the progress on if w is a terminal.
func (p *progress) open(w io.Writer) {
	if isTerminal(w) {
		p.w, p.next = w, time.Now().Add(progressAfter)
	}
}

func (p *progress) show(name string, n, size int64) {
	if p.w == nil || time.Now().Before(p.next) {
		return
	}
	p.next = time.Now().Add(progressEvery)
	p.shown = true
	percent := int64(100)
	if size > 0 {
		percent = min(100, int64(float64(n)/float64(size)*100))
	}
	const mib = 1 << 20
	fmt.Fprintf(p.w, "\r\x1b[K%s: %d of %d MiB, %d%%", printable(name), n/mib, size/mib, percent)
}

// end clears the line.
func (p *progress) end() {
	if p.shown {
		p.shown = false
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
