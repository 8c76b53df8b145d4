package replace

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// recorder notes the calls, and fails the one that it is told to.
type recorder struct {
	calls
	dir  string
	log  []string
	fail string
}

var errBroken = errors.New("broken")

func (r *recorder) call(what string) error {
	what = strings.ReplaceAll(what, r.dir, "DIR")
	r.log = append(r.log, what)
	if what == r.fail {
		return errBroken
	}
	return nil
}

type recorded struct {
	file
	r    *recorder
	path string
}

func (f *recorded) Write(b []byte) (int, error) {
	if err := f.r.call("write " + f.path); err != nil {
		n, _ := f.file.Write(b[:len(b)/2])
		return n, err
	}
	return f.file.Write(b)
}

func (f *recorded) Sync() error { return errors.Join(f.r.call("sync "+f.path), f.file.Sync()) }

func (f *recorded) Close() error { return errors.Join(f.r.call("close "+f.path), f.file.Close()) }

func record(dir, fail string) *recorder {
	r := &recorder{dir: dir, fail: fail}
	r.open = func(path string, flag int, perm fs.FileMode) (file, error) {
		if err := r.call("open " + path); err != nil {
			return nil, err
		}
		f, err := system.open(path, flag, perm)
		return &recorded{f, r, path}, err
	}
	r.rename = func(from, to string) error {
		if err := r.call("rename " + from + " " + to); err != nil {
			return err
		}
		return os.Rename(from, to)
	}
	r.remove = func(path string) error { return errors.Join(r.call("remove "+path), os.Remove(path)) }
	return r
}

var (
	written  = []string{"open DIR/f.new", "write DIR/f.new", "close DIR/f.new", "rename DIR/f.new DIR/f"}
	durable  = []string{"open DIR/f.new", "write DIR/f.new", "sync DIR/f.new", "close DIR/f.new", "rename DIR/f.new DIR/f", "open DIR", "sync DIR", "close DIR"}
	renaming = slices.Index(durable, "rename DIR/f.new DIR/f")
)

// The content is durable before the name is changed, and the name before it returns.
func TestOrder(t *testing.T) {
	for _, c := range []struct {
		flush bool
		want  []string
	}{{true, durable}, {false, written}} {
		dir := t.TempDir()
		r := record(dir, "")
		path := filepath.Join(dir, "f")
		for _, text := range []string{"first", "second, which is longer", "3"} {
			r.log = nil
			if err := r.replace(path, []byte(text), 0o640, c.flush); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(r.log, c.want) {
				t.Errorf("flush %v: %q, want %q", c.flush, r.log, c.want)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != text {
				t.Errorf("%q, %v", b, err)
			}
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o640 {
			t.Errorf("%v, %v", fi.Mode(), err)
		}
	}
}

// Whatever fails is told; until the name is changed the old content stays, and nothing
// is left beside it.
func TestErrors(t *testing.T) {
	for i, fail := range durable {
		dir := t.TempDir()
		path := filepath.Join(dir, "f")
		if err := File(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := record(dir, fail).replace(path, []byte("new"), 0o600, true); !errors.Is(err, errBroken) {
			t.Errorf("%s: %v", fail, err)
		}
		want := "old"
		if i > renaming {
			want = "new"
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v, want %q", fail, b, err, want)
		}
		if l, err := os.ReadDir(dir); err != nil || len(l) != 1 {
			t.Errorf("%s: %v, %v", fail, l, err)
		}
	}
}

// A directory that is not there is an error that names it.
func TestNoDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none", "f")
	for _, f := range []func(string, []byte, fs.FileMode) error{File, Unflushed} {
		if err := f(path, nil, 0o600); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Error(err)
		}
	}
}

// What a crash has left of an earlier attempt does no harm.
func TestLeftover(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path+suffix, []byte("something that is longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := File(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
}
