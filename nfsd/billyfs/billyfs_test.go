package billyfs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/helper/iofs"
	"github.com/go-git/go-billy/v5/memfs"
	"github.com/go-git/go-billy/v5/util"
	"github.com/google/go-cmp/cmp"
	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/file"

	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/baton-nfs/baton/nfsd/billyfs/billytest"
	"github.com/baton-nfs/baton/recovery/wire"
)

var _ nfs.UnixChange = (*billyfs.FS)(nil)

func open(t testing.TB, o billyfs.Options) *billyfs.FS {
	t.Helper()
	return must(billyfs.New(billytest.Open(t, billytest.Options{}), o))(t)
}

// sub makes a directory for one check.
func sub(t testing.TB, f *billyfs.FS, n int) billy.Filesystem {
	t.Helper()
	d := fmt.Sprint("check", n)
	ok(t, f.Mkdir(d, 0o755))
	return must(f.Chroot(d))(t)
}

func TestChecks(t *testing.T) {
	striped := billytest.Options{OSTs: 3, StripeSize: 64 << 10, StripeCount: 3}
	for name, f := range map[string]*billyfs.FS{
		"one stripe": open(t, billyfs.Options{Umask: 0o022}),
		"striped":    must(billyfs.New(billytest.Open(t, striped), billyfs.Options{Umask: 0o022}))(t),
		"durable":    open(t, billyfs.Options{Umask: 0o022, Durable: true}),
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			for check, run := range checks {
				n++
				f := sub(t, f, n)
				t.Run(check, func(t *testing.T) { run(t, f) })
			}
		})
	}
}

// The checks that do not hold for the kernel's file system below a directory,
// and those where go-billy's memory file system is not as POSIX wants.
var (
	kernelWrong = map[string]string{
		"links stay inside": "the file systems under test have no root of their own",
		"absolute symlinks": "the file systems under test have no root of their own",
	}
	memfsWrong = map[string]string{
		"access modes":                                    "truncates files opened for reading",
		"append to what others wrote":                     "the end is that of the time of opening",
		"directories are not made behind a dangling link": "makes them",
		"file in the way":                                 "does not know ENOTDIR",
		"links stay inside":                               "does not follow absolute links in an inner root",
		"long names":                                      "has no limit",
		"open a directory for writing":                    "opens directories",
		"remove":                                          "has its own error for full directories",
		"rename":                                          "rename onto itself loses the file",
		"rename refused":                                  "replaces whatever is there",
		"seek before the start":                           "accepts negative positions",
		"symlinks":                                        "does not follow links to directories everywhere",
	}
)

func TestChecksAgainstOthers(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o022))
	for name, x := range map[string]struct {
		make  func(t *testing.T) billy.Filesystem
		wrong map[string]string
	}{
		"kernel": {func(t *testing.T) billy.Filesystem { return osFS(t.TempDir()) }, kernelWrong},
		"memfs":  {func(*testing.T) billy.Filesystem { return memfs.New() }, memfsWrong},
	} {
		for check, run := range checks {
			t.Run(name+"/"+check, func(t *testing.T) {
				if why := x.wrong[check]; why != "" {
					t.Skip("does not hold here:", why)
				}
				run(t, x.make(t))
			})
		}
	}
}

// osFS is the kernel's file system below a directory, so that the checks are
// themselves checked against the kernel.
type osFS string

func (o osFS) p(name string) string { return string(o) + "/" + name }

func (o osFS) parents(name string) error { return os.MkdirAll(path.Dir(o.p(name)), 0o755) }

func (o osFS) Create(name string) (billy.File, error) {
	return o.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o666)
}
func (o osFS) Open(name string) (billy.File, error) { return o.OpenFile(name, os.O_RDONLY, 0) }
func (o osFS) OpenFile(name string, flag int, perm os.FileMode) (billy.File, error) {
	if flag&os.O_CREATE != 0 {
		if err := o.parents(name); err != nil {
			return nil, err
		}
	}
	h, err := os.OpenFile(o.p(name), flag, perm)
	return osFile{h, name}, err
}
func (o osFS) Stat(name string) (os.FileInfo, error)  { return os.Stat(o.p(name)) }
func (o osFS) Lstat(name string) (os.FileInfo, error) { return os.Lstat(o.p(name)) }
func (o osFS) Rename(from, to string) error {
	if err := o.parents(to); err != nil {
		return err
	}
	return syscall.Rename(o.p(from), o.p(to)) // os.Rename checks some things itself
}
func (o osFS) Remove(name string) error                        { return os.Remove(o.p(name)) }
func (o osFS) Join(elem ...string) string                      { return path.Join(elem...) }
func (o osFS) TempFile(dir, prefix string) (billy.File, error) { return util.TempFile(o, dir, prefix) }
func (o osFS) MkdirAll(name string, perm os.FileMode) error    { return os.MkdirAll(o.p(name), perm) }
func (o osFS) Readlink(name string) (string, error)            { return os.Readlink(o.p(name)) }
func (o osFS) Chroot(p string) (billy.Filesystem, error)       { return osFS(o.p(p)), nil }
func (o osFS) Root() string                                    { return string(o) }
func (o osFS) Chmod(name string, mode os.FileMode) error       { return os.Chmod(o.p(name), mode) }
func (o osFS) Chown(name string, uid, gid int) error           { return os.Chown(o.p(name), uid, gid) }
func (o osFS) Lchown(name string, uid, gid int) error          { return os.Lchown(o.p(name), uid, gid) }
func (o osFS) Chtimes(name string, atime, mtime time.Time) error {
	return os.Chtimes(o.p(name), atime, mtime)
}
func (o osFS) Symlink(target, name string) error {
	if err := o.parents(name); err != nil {
		return err
	}
	return os.Symlink(target, o.p(name))
}
func (o osFS) ReadDir(name string) ([]os.FileInfo, error) {
	es, err := os.ReadDir(o.p(name))
	if err != nil {
		return nil, err
	}
	infos := make([]os.FileInfo, len(es))
	for i, e := range es {
		if infos[i], err = e.Info(); err != nil {
			return nil, err
		}
	}
	return infos, nil
}

type osFile struct {
	*os.File
	name string
}

func (h osFile) Name() string  { return h.name }
func (h osFile) Lock() error   { return errors.ErrUnsupported }
func (h osFile) Unlock() error { return errors.ErrUnsupported }

func TestTestFS(t *testing.T) {
	f := open(t, billyfs.Options{})
	for _, n := range []string{"a", "d/b", "d/e/c", "d/e/empty"} {
		put(t, f, n, strings.Repeat(n, len(n)))
	}
	ok(t, fstest.TestFS(iofs.New(f), "a", "d/b", "d/e/c", "d/e/empty"))
}

func TestInfo(t *testing.T) {
	f := open(t, billyfs.Options{})
	ok(t, f.Mkdir("d", 0o777|fs.ModeSticky|fs.ModeSetgid))
	eq(t, must(f.Stat("d"))(t).Mode(), fs.ModeDir|0o777|fs.ModeSticky|fs.ModeSetgid)
	ok(t, f.Mknod("d/blk", 0o060640, 8, 17))
	ok(t, f.Mknod("d/chr", 0o020600, 1, 3))
	ok(t, f.Mkfifo("d/fifo", 0o600))
	ok(t, f.Socket("d/sock"))
	is(t, f.Mknod("d/reg", 0o100600, 0, 0), syscall.EINVAL)
	for n, want := range map[string]fs.FileMode{
		"blk": fs.ModeDevice | 0o640, "chr": fs.ModeDevice | fs.ModeCharDevice | 0o600,
		"fifo": fs.ModeNamedPipe | 0o600, "sock": fs.ModeSocket | 0o777,
	} {
		eq(t, must(f.Lstat("d/"+n))(t).Mode(), want)
		_, err := f.Open("d/" + n)
		is(t, err, syscall.ENXIO)
	}
	put(t, f, "a", "x")
	ok(t, f.Chown("a", 12, 34))
	ok(t, f.Lchown("a", -1, 35))
	ok(t, f.Chmod("a", fs.ModeSetuid|0o755))
	ok(t, f.Link("a", "d/hard"))
	fi := must(f.Stat("d/hard"))(t)
	want := &file.FileInfo{Nlink: 2, UID: 12, GID: 35, Fileid: billyfs.Attr(fi).FID.FileID()}
	if d := cmp.Diff(want, file.GetInfo(fi)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(&file.FileInfo{Nlink: 1, Major: 8, Minor: 17, Fileid: billyfs.Attr(must(f.Stat("d/blk"))(t)).FID.FileID()}, file.GetInfo(must(f.Stat("d/blk"))(t))); d != "" {
		t.Error(d)
	}
	eq(t, fi.Mode(), fs.ModeSetuid|0o755)
	is(t, f.Link("d", "d2"), syscall.EPERM)
	is(t, f.Link("a", "d/hard"), fs.ErrExist)
	if billyfs.Attr(must(os.Stat("."))(t)) != nil {
		t.Error("attributes of a foreign FileInfo")
	}
	if s, err := f.Statfs(); err != nil || s.Total == 0 || s.Avail == 0 {
		t.Errorf("statfs: %+v, %v", s, err)
	}
}

func TestErrors(t *testing.T) {
	f := open(t, billyfs.Options{})
	var pe *fs.PathError
	if _, err := f.Open("no"); !errors.As(err, &pe) || pe.Op != "open" || pe.Path != "no" {
		t.Errorf("%v", err)
	}
	var le *os.LinkError
	if err := f.Rename("no", "yes"); !errors.As(err, &le) || le.Old != "no" || le.New != "yes" {
		t.Errorf("%v", err)
	}
	for name, err := range map[string]error{
		"NUL":                  second(f.Stat("a\x00b")),
		"NUL in a link":        f.Symlink("a\x00", "l"),
		"unknown access mode":  second(f.OpenFile("a", 3, 0)),
		"readlink of the root": second(f.Readlink("/")),
	} {
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v", name, err)
		}
	}
	is(t, f.Remove("/"), syscall.EBUSY)
	is(t, f.Remove("."), syscall.EBUSY)
	is(t, f.Mkdir("/", 0o755), fs.ErrExist)
	is(t, f.Symlink("", "l"), fs.ErrNotExist)
	is(t, f.Symlink(strings.Repeat("x", wire.MaxSymlinkLen+1), "l"), syscall.ENAMETOOLONG)
	put(t, f, "a", "x")
	_, err := f.Open("a/")
	is(t, err, syscall.ENOTDIR)
	_, err = f.Create("new/")
	is(t, err, syscall.EISDIR)
	is(t, f.Rename("a", "b/"), syscall.ENOTDIR)
	_, err = billyfs.New(billytest.Open(t, billytest.Options{}), billyfs.Options{Root: "/no"})
	is(t, err, fs.ErrNotExist)

	h := must(f.OpenFile("a", os.O_RDWR, 0))(t).(*billyfs.File)
	must(h.Write([]byte("y")))(t)
	ok(t, f.Remove("a"))
	_, err = h.ReadAt(make([]byte, 1), 0)
	is(t, err, syscall.ESTALE)
	ok(t, h.Close())
	for op, err := range map[string]error{
		"close": h.Close(), "sync": h.Sync(), "truncate": h.Truncate(0), "lock": h.Lock(), "unlock": h.Unlock(),
		"read": second(h.Read(nil)), "write": second(h.Write(nil)), "seek": second(h.Seek(0, 0)), "stat": second(h.Stat()),
		"readat": second(h.ReadAt(nil, 0)), "writeat": second(h.WriteAt(nil, 0)),
	} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after close: %v", op, err)
		}
	}
}

func TestWriteAt(t *testing.T) {
	f := open(t, billyfs.Options{})
	h := must(f.Create("a"))(t).(*billyfs.File)
	must(h.WriteAt([]byte("def"), 3))(t)
	must(h.WriteAt([]byte("abc"), 0))(t)
	eq(t, must(h.Stat())(t).Size(), 6)
	_, err := h.WriteAt([]byte("x"), -1)
	is(t, err, syscall.EINVAL)
	is(t, h.Truncate(-1), syscall.EINVAL)
	ok(t, h.Close())
	eq(t, content(t, f, "a"), "abcdef")
}

func TestPermissions(t *testing.T) {
	c := billytest.Open(t, billytest.Options{})
	root := must(billyfs.New(c, billyfs.Options{}))(t)
	ok(t, root.Mkdir("home", 0o755))
	ok(t, root.Chown("home", 1000, 100))
	put(t, root, "secret", "x")
	ok(t, root.Chmod("secret", 0o600))
	ok(t, root.Mkdir("closed", 0o700))

	user := must(billyfs.New(c, billyfs.Options{Cred: wire.Cred{UID: 1000, GID: 100}, Umask: 0o027}))(t)
	h := must(user.OpenFile("home/a", os.O_RDWR|os.O_CREATE, 0o444))(t)
	must(h.Write([]byte("created read-only, but open for writing")))(t)
	ok(t, h.Truncate(7))
	ok(t, h.Close())
	fi := must(user.Stat("home/a"))(t)
	eq(t, fi.Mode(), 0o440)
	eq(t, fi.Size(), 7)
	eq(t, billyfs.Attr(fi).UID, 1000)
	eq(t, billyfs.Attr(fi).GID, 100)
	_, err := user.OpenFile("home/a", os.O_WRONLY, 0)
	is(t, err, fs.ErrPermission)
	_, err = user.Open("secret")
	is(t, err, fs.ErrPermission)
	_, err = user.Create("new")
	is(t, err, fs.ErrPermission)
	_, err = user.Stat("closed/x")
	is(t, err, fs.ErrPermission)
	_, err = user.ReadDir("closed")
	is(t, err, fs.ErrPermission)
	is(t, user.Chmod("secret", 0o666), fs.ErrPermission)
	is(t, user.Remove("secret"), fs.ErrPermission)
	if !os.IsPermission(user.Remove("secret")) {
		t.Error("os.IsPermission")
	}
}

func TestRoots(t *testing.T) {
	c := billytest.Open(t, billytest.Options{})
	top := must(billyfs.New(c, billyfs.Options{}))(t)
	put(t, top, "a/b/x", "inner")
	put(t, top, "x", "outer")
	in := must(billyfs.New(c, billyfs.Options{Root: "a/b"}))(t)
	eq(t, in.Root(), "/a/b")
	for _, p := range []string{"x", "/x", "../x", "../../x", "/../../x", "./x", "//x", "b/../x"} {
		if p == "b/../x" {
			ok(t, in.Mkdir("b", 0o755))
		}
		eq(t, content(t, in, p), "inner")
	}
	ok(t, in.Symlink("../../../x", "up"))
	eq(t, content(t, in, "up"), "inner")
	eq(t, must(in.Chroot("b"))(t).Root(), "/a/b/b")
	_, err := in.Chroot("x")
	is(t, err, syscall.ENOTDIR)
	// Links are followed to where they lead, ".." from there.
	ok(t, top.Symlink("a/b", "short"))
	eq(t, content(t, top, "short/../b/x"), "inner")
	_, err = top.Stat("short/../x")
	is(t, err, fs.ErrNotExist)
}

// connSpy notes the flags of requests.
type connSpy struct {
	wire.Conn
	mu    sync.Mutex
	flags map[wire.Op]wire.Flags // those that all requests had
}

func (s *connSpy) note(req *wire.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.flags[req.Op]; ok {
		s.flags[req.Op] = old & req.Flags
	} else {
		s.flags[req.Op] = req.Flags
	}
}

func (s *connSpy) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	s.note(req)
	return s.Conn.Call(ctx, req, rep)
}

// Modifications wait for their commit exactly when they are asked to, and an IO
// epoch that may not be durable is not used.
func TestDurable(t *testing.T) {
	for _, durable := range []bool{false, true} {
		spy := &connSpy{flags: map[wire.Op]wire.Flags{}}
		c := billytest.Open(t, billytest.Options{Wrap: func(c wire.Conn) wire.Conn { spy.Conn = c; return spy }})
		f := must(billyfs.New(c, billyfs.Options{Durable: durable}))(t)
		put(t, f, "d/a", "x")
		ok(t, f.Symlink("a", "l"))
		ok(t, f.Mkfifo("p", 0o600))
		ok(t, f.Link("d/a", "b"))
		ok(t, f.Rename("b", "c"))
		ok(t, f.Chmod("c", 0o600))
		ok(t, f.Remove("c"))
		ok(t, f.Mkdir("e", 0o700))
		ok(t, f.Remove("e"))
		spy.mu.Lock()
		for _, op := range []wire.Op{wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod, wire.OpLink, wire.OpRename, wire.OpSetattr, wire.OpRemove, wire.OpRmdir} {
			fl, seen := spy.flags[op]
			if !seen || (fl&wire.FlagWaitCommit != 0) != durable {
				t.Errorf("durable %v, op %d: seen %v, flags %b", durable, op, seen, fl)
			}
		}
		_, opened := spy.flags[wire.OpOpenEpoch]
		if opened == durable || (spy.flags[wire.OpCreate]&wire.FlagOpenEpoch != 0) != durable {
			t.Errorf("durable %v: epoch opened by the first write: %v", durable, opened)
		}
		spy.flags = map[wire.Op]wire.Flags{}
		spy.mu.Unlock()
		h := must(f.OpenFile("d/a", os.O_WRONLY|os.O_TRUNC, 0))(t)
		ok(t, h.Close())
		spy.mu.Lock()
		if spy.flags[wire.OpSetattr]&wire.FlagWaitCommit == 0 {
			t.Error("a size change does not wait for its commit")
		}
		spy.mu.Unlock()
	}
}

func TestConcurrentAppend(t *testing.T) {
	f := open(t, billyfs.Options{})
	const writers, lines = 6, 40
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			h, err := f.OpenFile("log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range lines {
				if _, err := fmt.Fprintf(h, "%d %02d\n", w, i); err != nil {
					t.Error(err)
				}
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got := strings.Split(strings.TrimSuffix(content(t, f, "log"), "\n"), "\n")
	next := [writers]int{}
	for _, l := range got {
		var w, i int
		if _, err := fmt.Sscanf(l, "%d %d", &w, &i); err != nil || len(l) != 4 || i != next[w] {
			t.Fatalf("line %q", l)
		}
		next[w]++
	}
	eq(t, len(got), writers*lines)
}

func TestLock(t *testing.T) {
	f := open(t, billyfs.Options{})
	put(t, f, "a", "x")
	a, b := must(f.Open("a"))(t), must(must(f.Chroot("/"))(t).Open("a"))(t)
	ok(t, a.Lock())
	ok(t, a.Lock())
	got := make(chan error)
	go func() { got <- b.Lock() }()
	select {
	case err := <-got:
		t.Fatalf("lock of another file while it is held: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	ok(t, a.Unlock())
	ok(t, <-got)
	ok(t, a.Unlock())
	go func() { got <- a.Lock() }()
	ok(t, b.Close())
	ok(t, <-got)
	ok(t, a.Close())

	ctx, cancel := context.WithCancel(context.Background())
	g := must(billyfs.New(billytest.Open(t, billytest.Options{}), billyfs.Options{Context: ctx}))(t)
	put(t, g, "a", "x")
	a, b = must(g.Open("a"))(t), must(g.Open("a"))(t)
	ok(t, a.Lock())
	cancel()
	is(t, b.Lock(), context.Canceled)
}

func TestSync(t *testing.T) {
	f := open(t, billyfs.Options{})
	h := must(f.OpenFile("a", os.O_WRONLY|os.O_CREATE|os.O_SYNC, 0o600))(t).(*billyfs.File)
	must(h.Write([]byte("x")))(t)
	ok(t, h.Sync())
	ok(t, h.Close())
	h = must(f.OpenFile("a", os.O_WRONLY, 0o600))(t).(*billyfs.File)
	must(h.Write([]byte("yz")))(t)
	ok(t, h.Sync())
	ok(t, h.Close())
	eq(t, content(t, f, "a"), "yz")
}

func remote(f *billyfs.FS) *billyfs.Remote {
	return billyfs.NewRemote(func(args, result any) error {
		raw, err := json.Marshal(args)
		if err != nil {
			return err
		}
		if len(raw) > 1<<20-1000 {
			return fmt.Errorf("request of %d bytes", len(raw))
		}
		got, err := f.ServeControl(context.Background(), raw)
		if err != nil {
			return err
		}
		if raw, err = json.Marshal(got); err != nil {
			return err
		}
		return json.Unmarshal(raw, result)
	})
}

func TestRemote(t *testing.T) {
	f := open(t, billyfs.Options{})
	r := remote(f)
	data := make([]byte, 3<<20+77)
	rand.New(rand.NewSource(1)).Read(data)
	ok(t, r.Mkdir("d", 0o750))
	is(t, r.Mkdir("d", 0o750), fs.ErrExist)
	h := must(r.OpenFile("d/\xff", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o640))(t)
	must(h.Write(data))(t)
	ok(t, h.Close())
	eq(t, content(t, f, "d/\xff"), string(data))
	h = must(r.OpenFile("d/\xff", os.O_RDONLY, 0))(t)
	must(h.Seek(5, io.SeekStart))(t)
	got, err := io.ReadAll(h)
	ok(t, err)
	if !bytes.Equal(got, data[5:]) {
		t.Error("contents differ")
	}
	b := make([]byte, 1<<20)
	n, err := h.ReadAt(b, int64(len(data)-10))
	eq(t, n, 10)
	eq(t, err, io.EOF)
	ok(t, h.Close())
	ok(t, r.Symlink("\xff", "d/l"))
	eq(t, must(r.Readlink("d/l"))(t), "\xff")
	eq(t, must(r.Stat("d/l"))(t).Size(), int64(len(data)))
	when := time.Unix(99, 7)
	ok(t, r.Lchtimes("d/\xff", when, when))
	ok(t, r.Chmod("d/l", 0o604))
	ok(t, r.Lchown("d/\xff", 3, 4))
	want, have := must(f.Stat("d/l"))(t), must(r.Stat("d/l"))(t)
	if d := cmp.Diff(billyfs.Attr(want), billyfs.Attr(have)); d != "" {
		t.Error(d)
	}
	eq(t, have.Mode(), 0o604)
	for i := range 2100 {
		x := must(f.Create(fmt.Sprintf("m/%04d", i)))(t)
		ok(t, x.Close())
	}
	infos := must(r.ReadDir("m"))(t)
	eq(t, len(infos), 2100)
	eq(t, infos[2099].Name(), "2099")
	ok(t, r.Remove("d/l"))
	_, err = r.Lstat("d/l")
	is(t, err, fs.ErrNotExist)
	_, err = r.ReadDir("d/\xff")
	is(t, err, syscall.ENOTDIR)
	_, err = r.OpenFile("no", os.O_RDONLY, 0)
	is(t, err, fs.ErrNotExist)
	for _, bad := range []string{``, `[]`, `{"op":"nosuch"}`} {
		if _, err := f.ServeControl(context.Background(), json.RawMessage(bad)); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	for _, bad := range []string{
		`{"op":"read","count":-1}`, `{"op":"read","count":1073741824}`, `{"op":"write","fid":{"Seq":1,"OID":1},"data":"eA=="}`,
		`{"op":"truncate","offset":-5}`, `{"op":"commit","fid":{"Seq":1,"OID":1}}`, `{"op":"stat","path":"AA=="}`,
		`{"op":"read","count":5,"fid":{"Seq":99,"OID":1}}`,
	} {
		rep, err := f.ServeControl(context.Background(), json.RawMessage(bad))
		if raw, _ := json.Marshal(rep); err != nil || !bytes.Contains(raw, []byte(`"errno"`)) {
			t.Errorf("%s: %s, %v", bad, raw, err)
		}
	}
}
