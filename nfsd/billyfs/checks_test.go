package billyfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"path"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/util"
)

// checks are what any POSIX-like go-billy file system should do. They run over
// billyfs and, to make sure that they ask for the right thing, over the file
// systems of go-billy.
var checks = map[string]func(t *testing.T, f billy.Filesystem){
	"write then read": func(t *testing.T, f billy.Filesystem) {
		h := must(f.Create("a"))(t)
		n, err := h.Write([]byte("hello"))
		eq(t, n, 5)
		ok(t, err)
		pos, err := h.Seek(1, io.SeekStart)
		eq(t, pos, 1)
		ok(t, err)
		b := make([]byte, 3)
		_, err = io.ReadFull(h, b)
		ok(t, err)
		eq(t, string(b), "ell")
		ok(t, h.Close())
		eq(t, content(t, f, "/a"), "hello")
		_, err = h.Write([]byte("x"))
		if err == nil {
			t.Error("write after close")
		}
	},
	"name": func(t *testing.T, f billy.Filesystem) {
		h := must(f.Create("a"))(t)
		eq(t, h.Name(), "a")
		ok(t, h.Close())
		eq(t, must(f.Stat("a"))(t).Name(), "a")
	},
	"read at": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "0123456789")
		h := must(f.Open("a"))(t)
		defer h.Close()
		b := make([]byte, 4)
		n, err := h.ReadAt(b, 3)
		ok(t, err)
		eq(t, string(b[:n]), "3456")
		n, err = h.ReadAt(b, 8)
		eq(t, err, io.EOF)
		eq(t, string(b[:n]), "89")
		n, err = h.ReadAt(b, 10)
		eq(t, err, io.EOF)
		eq(t, n, 0)
		all, err := io.ReadAll(h)
		ok(t, err)
		eq(t, string(all), "0123456789")
	},
	"seek": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "0123456789")
		h := must(f.OpenFile("a", os.O_RDWR, 0))(t)
		defer h.Close()
		pos, err := h.Seek(-2, io.SeekEnd)
		ok(t, err)
		eq(t, pos, 8)
		_, err = h.Write([]byte("XY"))
		ok(t, err)
		pos, err = h.Seek(-4, io.SeekCurrent)
		ok(t, err)
		eq(t, pos, 6)
		b := make([]byte, 4)
		_, err = io.ReadFull(h, b)
		ok(t, err)
		eq(t, string(b), "67XY")
	},
	"seek before the start": func(t *testing.T, f billy.Filesystem) {
		h := must(f.Create("a"))(t)
		defer h.Close()
		if _, err := h.Seek(-1, io.SeekStart); err == nil {
			t.Error("no error")
		}
	},
	"hole": func(t *testing.T, f billy.Filesystem) {
		h := must(f.Create("a"))(t)
		must(h.Seek(70000, io.SeekStart))(t)
		must(h.Write([]byte("end")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "a"), strings.Repeat("\x00", 70000)+"end")
	},
	"append": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "one")
		h := must(f.OpenFile("a", os.O_WRONLY|os.O_APPEND, 0))(t)
		must(h.Write([]byte("two")))(t)
		must(h.Write([]byte("three")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "a"), "onetwothree")
	},
	"append to what others wrote": func(t *testing.T, f billy.Filesystem) {
		a := must(f.OpenFile("a", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644))(t)
		b := must(f.OpenFile("a", os.O_WRONLY|os.O_APPEND, 0))(t)
		for i := range 4 {
			must(a.Write([]byte(fmt.Sprint("a", i))))(t)
			must(b.Write([]byte(fmt.Sprint("b", i))))(t)
		}
		ok(t, a.Close())
		ok(t, b.Close())
		eq(t, content(t, f, "a"), "a0b0a1b1a2b2a3b3")
	},
	"exclusive": func(t *testing.T, f billy.Filesystem) {
		h := must(f.OpenFile("a", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600))(t)
		ok(t, h.Close())
		_, err := f.OpenFile("a", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		is(t, err, fs.ErrExist)
	},
	"exclusive on a dangling link": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.Symlink("nowhere", "l"))
		_, err := f.OpenFile("l", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		is(t, err, fs.ErrExist)
	},
	"truncate at open": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "long content")
		h := must(f.OpenFile("a", os.O_WRONLY|os.O_TRUNC, 0))(t)
		must(h.Write([]byte("x")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "a"), "x")
	},
	"open does not truncate": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "long content")
		h := must(f.OpenFile("a", os.O_WRONLY|os.O_CREATE, 0o600))(t)
		must(h.Write([]byte("L")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "a"), "Long content")
	},
	"truncate": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "0123456789")
		h := must(f.OpenFile("a", os.O_RDWR, 0))(t)
		ok(t, h.Truncate(4))
		ok(t, h.Truncate(6))
		ok(t, h.Close())
		eq(t, content(t, f, "a"), "0123\x00\x00")
		eq(t, must(f.Stat("a"))(t).Size(), 6)
	},
	"truncate shows no old data": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", strings.Repeat("x", 300000))
		h := must(f.OpenFile("a", os.O_RDWR, 0))(t)
		ok(t, h.Truncate(1))
		must(h.Seek(200000, io.SeekStart))(t)
		must(h.Write([]byte("y")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "a"), "x"+strings.Repeat("\x00", 199999)+"y")
	},
	"access modes": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "0123456789")
		r := must(f.Open("a"))(t)
		if _, err := r.Write([]byte("x")); err == nil {
			t.Error("write to a file opened for reading")
		}
		if err := r.Truncate(0); err == nil {
			t.Error("truncate of a file opened for reading")
		}
		ok(t, r.Close())
		w := must(f.OpenFile("a", os.O_WRONLY, 0))(t)
		if _, err := w.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read of a file opened for writing: %v", err)
		}
		ok(t, w.Close())
		eq(t, content(t, f, "a"), "0123456789")
	},
	"missing": func(t *testing.T, f billy.Filesystem) {
		for name, err := range map[string]error{
			"open":     second(f.Open("no")),
			"stat":     second(f.Stat("no")),
			"lstat":    second(f.Lstat("no")),
			"readlink": second(f.Readlink("no")),
			"readdir":  second(f.ReadDir("no/no")),
			"remove":   f.Remove("no"),
			"rename":   f.Rename("no", "yes"),
		} {
			if !errors.Is(err, fs.ErrNotExist) || !os.IsNotExist(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
	},
	"file in the way": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "x")
		_, err := f.Stat("a/b")
		is(t, err, syscall.ENOTDIR)
		is(t, f.MkdirAll("a/b", 0o755), syscall.ENOTDIR)
		is(t, f.MkdirAll("a", 0o755), syscall.ENOTDIR)
		_, err = f.ReadDir("a")
		is(t, err, syscall.ENOTDIR)
		eq(t, content(t, f, "a"), "x")
	},
	"parents are made": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/e/a", "x")
		ok(t, f.Rename("d/e/a", "g/h/b"))
		ok(t, f.Symlink("t", "i/j/l"))
		eq(t, content(t, f, "g/h/b"), "x")
		eq(t, names(t, f, "/"), "d/ g/ i/")
	},
	"mkdirall": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.MkdirAll("/d/e/f", 0o755))
		ok(t, f.MkdirAll("d/e", 0o755))
		ok(t, f.MkdirAll("/", 0o755))
		ok(t, f.MkdirAll("d/e/f/", 0o700))
		if !must(f.Stat("d/e/f"))(t).IsDir() {
			t.Error("not a directory")
		}
		eq(t, must(f.Stat("d/e/f"))(t).Mode().Perm(), 0o755)
	},
	"readdir": func(t *testing.T, f billy.Filesystem) {
		eq(t, names(t, f, "/"), "")
		for _, n := range []string{"d/zz", "d/a", "d/sub/x", "d/m.txt"} {
			put(t, f, n, "x"+n)
		}
		ok(t, f.Symlink("a", "d/link"))
		eq(t, names(t, f, "d"), "a link@ m.txt sub/ zz")
		eq(t, names(t, f, "/d/"), "a link@ m.txt sub/ zz")
		for _, fi := range must(f.ReadDir("d"))(t) {
			if fi.Name() == "m.txt" {
				eq(t, fi.Size(), int64(len("xd/m.txt")))
			}
		}
	},
	"readdir of many": func(t *testing.T, f billy.Filesystem) {
		var want []string
		for i := range 3000 {
			n := fmt.Sprintf("%05d", i*7919%3000)
			want = append(want, fmt.Sprintf("%05d", i))
			h := must(f.Create("d/" + n))(t)
			ok(t, h.Close())
		}
		eq(t, names(t, f, "d"), strings.Join(want, " "))
	},
	"remove": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/a", "x")
		is(t, f.Remove("d"), syscall.ENOTEMPTY)
		ok(t, f.Remove("d/a"))
		ok(t, f.Remove("d"))
		eq(t, names(t, f, "/"), "")
	},
	"remove a link, not its target": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/a", "x")
		ok(t, f.Symlink("d", "l"))
		ok(t, f.Remove("l"))
		eq(t, names(t, f, "/"), "d/")
	},
	"rename": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "a", "x")
		ok(t, f.Rename("a", "b"))
		eq(t, names(t, f, "/"), "b")
		put(t, f, "c", "y")
		ok(t, f.Rename("b", "c"))
		eq(t, names(t, f, "/"), "c")
		eq(t, content(t, f, "c"), "x")
		ok(t, f.Rename("c", "c"))
		eq(t, content(t, f, "c"), "x")
	},
	"rename directories": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/e/a", "x")
		ok(t, f.Rename("d/e", "e"))
		eq(t, content(t, f, "e/a"), "x")
		ok(t, f.Rename("e", "d"))
		eq(t, content(t, f, "d/a"), "x")
		eq(t, names(t, f, "/"), "d/")
	},
	"rename refused": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/a", "x")
		put(t, f, "e/a", "y")
		put(t, f, "f", "z")
		if err := f.Rename("d", "e"); !errors.Is(err, syscall.ENOTEMPTY) && !errors.Is(err, syscall.EEXIST) {
			t.Errorf("over a full directory: %v", err)
		}
		is(t, f.Rename("d", "f"), syscall.ENOTDIR)
		if err := f.Rename("f", "e"); !errors.Is(err, syscall.EISDIR) && !errors.Is(err, syscall.EEXIST) {
			t.Errorf("a file over a directory: %v", err)
		}
		is(t, f.Rename("d", "d/sub"), syscall.EINVAL)
		eq(t, names(t, f, "/"), "d/ e/ f")
		eq(t, content(t, f, "d/a")+content(t, f, "e/a")+content(t, f, "f"), "xyz")
	},
	"rename of an open file": func(t *testing.T, f billy.Filesystem) {
		h := must(f.Create("a"))(t)
		must(h.Write([]byte("one")))(t)
		ok(t, f.Rename("a", "b"))
		must(h.Write([]byte("two")))(t)
		ok(t, h.Close())
		eq(t, content(t, f, "b"), "onetwo")
		eq(t, names(t, f, "/"), "b")
	},
	"symlinks": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/a", "x")
		for link, target := range map[string]string{
			"rel": "d/a", "d/up": "../d/a", "dir": "d", "slash": "d/", "chain": "dir/up",
		} {
			ok(t, f.Symlink(target, link))
		}
		for _, p := range []string{"rel", "d/up", "dir/a", "slash/a", "chain", "d/../d/a"} {
			if got := content(t, f, p); got != "x" {
				t.Errorf("%s: %q", p, got)
			}
		}
		eq(t, must(f.Readlink("rel"))(t), "d/a")
		fi := must(f.Lstat("rel"))(t)
		if fi.Mode()&fs.ModeSymlink == 0 {
			t.Errorf("lstat: %v", fi.Mode())
		}
		if fi := must(f.Stat("rel"))(t); !fi.Mode().IsRegular() || fi.Size() != 1 {
			t.Errorf("stat: %v", fi)
		}
		is(t, f.Symlink("x", "rel"), fs.ErrExist)
		_, err := f.Readlink("d/a")
		is(t, err, syscall.EINVAL)
	},
	"absolute symlinks": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/a", "x")
		ok(t, f.Symlink("/d/a", "abs"))
		ok(t, f.Symlink("/d/", "e/dir"))
		eq(t, content(t, f, "abs"), "x")
		eq(t, content(t, f, "e/dir/a"), "x")
		eq(t, must(f.Readlink("abs"))(t), "/d/a")
	},
	"symlink loop": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.Symlink("b", "a"))
		ok(t, f.Symlink("a", "b"))
		_, err := f.Open("a")
		is(t, err, syscall.ELOOP)
		_, err = f.Stat("a/x")
		is(t, err, syscall.ELOOP)
		_, err = f.OpenFile("a", os.O_CREATE|os.O_WRONLY, 0o600)
		is(t, err, syscall.ELOOP)
	},
	"create through a dangling link": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.MkdirAll("d", 0o755))
		ok(t, f.Symlink("d/new", "l"))
		_, err := f.Open("l")
		is(t, err, fs.ErrNotExist)
		put(t, f, "l", "x")
		eq(t, content(t, f, "d/new"), "x")
	},
	"directories are not made behind a dangling link": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.Symlink("new", "l"))
		ok(t, f.Symlink("new/er", "m"))
		is(t, f.MkdirAll("l", 0o755), fs.ErrExist)
		_, err := f.Create("l/x")
		for _, err := range []error{err, f.MkdirAll("m/x", 0o755)} {
			if !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v", err)
			}
		}
		_, err = f.Create("m")
		is(t, err, fs.ErrNotExist)
		eq(t, names(t, f, "/"), "l@ m@")
		ok(t, f.MkdirAll("new", 0o755))
		put(t, f, "l/a/b", "x")
		eq(t, content(t, f, "new/a/b"), "x")
	},
	"links stay inside": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "top", "outside")
		put(t, f, "jail/etc/passwd", "inside")
		put(t, f, "jail/top", "inside top")
		ok(t, f.Symlink("/etc/passwd", "jail/abs"))
		j := must(f.Chroot("jail"))(t)
		eq(t, content(t, j, "abs"), "inside")
		eq(t, content(t, j, "top"), "inside top")
	},
	"open a directory for writing": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.MkdirAll("d", 0o755))
		for _, flag := range []int{os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_CREATE, os.O_WRONLY | os.O_TRUNC} {
			_, err := f.OpenFile("d", flag, 0o644)
			is(t, err, syscall.EISDIR)
		}
	},
	"long names": func(t *testing.T, f billy.Filesystem) {
		put(t, f, strings.Repeat("n", 255), "x")
		_, err := f.Create(strings.Repeat("n", 256))
		is(t, err, syscall.ENAMETOOLONG)
	},
	"odd names": func(t *testing.T, f billy.Filesystem) {
		for _, n := range []string{"a b", "\xff\xfe", "…", "-", "a\nb", "..."} {
			put(t, f, n, n)
			eq(t, content(t, f, n), n)
			if _, err := f.Stat(n); err != nil {
				t.Error(err)
			}
		}
		eq(t, len(must(f.ReadDir("/"))(t)), 6)
	},
	"modes": func(t *testing.T, f billy.Filesystem) {
		h := must(f.OpenFile("a", os.O_CREATE|os.O_WRONLY, 0o640))(t)
		ok(t, h.Close())
		eq(t, must(f.Stat("a"))(t).Mode(), 0o640)
	},
	"chmod and chtimes": func(t *testing.T, f billy.Filesystem) {
		c, can := f.(billy.Change)
		if !can {
			t.Skip("this file system cannot change attributes")
		}
		put(t, f, "a", "x")
		ok(t, f.Symlink("a", "l"))
		ok(t, c.Chmod("l", 0o604))
		when := time.Unix(1234567890, 123456789)
		ok(t, c.Chtimes("a", when, when))
		fi := must(f.Stat("a"))(t)
		eq(t, fi.Mode(), 0o604)
		if !fi.ModTime().Equal(when) {
			t.Errorf("mtime %v", fi.ModTime())
		}
		is(t, c.Chmod("no", 0o600), fs.ErrNotExist)
		h := must(f.OpenFile("a", os.O_WRONLY, 0))(t)
		must(h.Write([]byte("y")))(t)
		ok(t, h.Close())
		if fi := must(f.Stat("a"))(t); !fi.ModTime().After(when) {
			t.Errorf("mtime after a write: %v", fi.ModTime())
		}
	},
	"temporary files": func(t *testing.T, f billy.Filesystem) {
		ok(t, f.MkdirAll("tmp", 0o777))
		a := must(f.TempFile("tmp", "pre"))(t)
		b := must(f.TempFile("tmp", "pre"))(t)
		if a.Name() == b.Name() || !strings.HasPrefix(path.Base(a.Name()), "pre") {
			t.Errorf("%q %q", a.Name(), b.Name())
		}
		ok(t, a.Close())
		ok(t, b.Close())
		eq(t, len(must(f.ReadDir("tmp"))(t)), 2)
	},
	"remove all": func(t *testing.T, f billy.Filesystem) {
		put(t, f, "d/e/f/a", "x")
		put(t, f, "keep", "x")
		ok(t, f.Symlink("../../keep", "d/e/l"))
		ok(t, util.RemoveAll(f, "d"))
		eq(t, names(t, f, "/"), "keep")
	},
	"random I/O against a model": func(t *testing.T, f billy.Filesystem) {
		rng := rand.New(rand.NewSource(7))
		h := must(f.OpenFile("a", os.O_RDWR|os.O_CREATE, 0o600))(t)
		var model []byte
		grow := func(n int) {
			if n > len(model) {
				model = append(model, make([]byte, n-len(model))...)
			}
		}
		for range 300 {
			off, n := rng.Intn(900000), rng.Intn(200000)
			switch rng.Intn(8) {
			case 0:
				ok(t, h.Truncate(int64(off)))
				grow(off)
				model = model[:off:off]
			case 1, 2, 3:
				b := make([]byte, n)
				rng.Read(b)
				must(h.Seek(int64(off), io.SeekStart))(t)
				must(h.Write(b))(t)
				if n > 0 {
					grow(off + n)
					copy(model[off:], b)
				}
			default:
				b := make([]byte, n)
				m, err := h.ReadAt(b, int64(off))
				want := model[min(off, len(model)):min(off+n, len(model))]
				if !bytes.Equal(b[:m], want) || n > 0 && (err == io.EOF) != (m < n) {
					t.Fatalf("read %d at %d of %d: %d, %v", n, off, len(model), m, err)
				}
			}
		}
		ok(t, h.Close())
		if content(t, f, "a") != string(model) {
			t.Error("contents differ at the end")
		}
	},
}

// must gives a function that returns v or ends the test.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func second[T any](_ T, err error) error { return err }

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

func eq[T comparable](t testing.TB, got, want T) {
	t.Helper()
	if got != want {
		g, w := fmt.Sprintf("%.200q", fmt.Sprint(got)), fmt.Sprintf("%.200q", fmt.Sprint(want))
		t.Errorf("got %s, want %s", g, w)
	}
}

func put(t testing.TB, f billy.Filesystem, name, data string) {
	t.Helper()
	ok(t, util.WriteFile(f, name, []byte(data), 0o644))
}

func content(t testing.TB, f billy.Filesystem, name string) string {
	t.Helper()
	h := must(f.Open(name))(t)
	b, err := io.ReadAll(h)
	ok(t, err)
	ok(t, h.Close())
	return string(b)
}

// names lists a directory with the types as "ls -F" shows them.
func names(t testing.TB, f billy.Filesystem, dir string) string {
	t.Helper()
	var s []string
	for _, fi := range must(f.ReadDir(dir))(t) {
		n := fi.Name()
		switch {
		case fi.IsDir():
			n += "/"
		case fi.Mode()&fs.ModeSymlink != 0:
			n += "@"
		}
		s = append(s, n)
	}
	return strings.Join(s, " ")
}
