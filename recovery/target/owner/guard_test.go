package owner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// takeable is an owner whose store can be taken from it at any moment.
func takeable(t testing.TB, dir string) (w *Owner, take func()) {
	t.Helper()
	var jump atomic.Int64
	clk := BootClock()
	now := clk.Now
	clk.Now = func() int64 { return now() + jump.Load() }
	w, err := Open(ctx, Options{Node: "a", Dir: dir, Interval: 2 * time.Second, Clock: clk})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return w, func() { jump.Store(int64(time.Minute)) }
}

func TestErrNotOwner(t *testing.T) {
	var e unix.Errno
	var st wire.Status
	for _, err := range []error{ErrNotOwner, errEngine, fmt.Errorf("write: %w", ErrNotOwner)} {
		if !errors.Is(err, ErrNotOwner) || !errors.As(err, &e) || e != unix.EIO || !errors.As(err, &st) || st != wire.ErrTargetDown {
			t.Errorf("%v: %v %v", err, e, st)
		}
	}
	if !errors.Is(errEngine, store.ErrFailed) {
		t.Error(errEngine)
	}
}

// Every change of an object file system is refused after the loss, a flush that ends
// after it does not count, and reading goes on.
func TestGuardFS(t *testing.T) {
	w, take := takeable(t, t.TempDir())
	mem := objfs.NewMem(func() int64 { return 1 })
	calls := map[string]int{}
	spy := &spyFS{FS: mem, calls: calls}
	fs := GuardFS(spy, w)
	fd, err := fs.Open("x", objfs.ReadWrite|objfs.Create)
	if err != nil {
		t.Fatal(err)
	}
	changes := map[string]func() error{
		"open":      func() error { _, err := fs.Open("y", objfs.ReadWrite|objfs.Create); return err },
		"trunc":     func() error { _, err := fs.Open("x", objfs.ReadWrite|objfs.Trunc); return err },
		"pwrite":    func() error { _, err := fs.Pwrite(fd, []byte("data"), 0); return err },
		"truncate":  func() error { return fs.Truncate(fd, 2) },
		"fdatasync": func() error { return fs.Fdatasync(fd) },
		"writeback": func() error { return fs.StartWriteback(fd) },
		"syncfs":    func() error { return fs.Syncfs() },
		"mkdir":     func() error { return fs.Mkdir("d") },
		"rename":    func() error { return fs.Rename("y", "z") },
		"remove":    func() error { return fs.Remove("z") },
	}
	order := []string{"open", "trunc", "pwrite", "truncate", "fdatasync", "writeback", "syncfs", "mkdir", "rename", "remove"}
	for _, n := range order {
		if err := changes[n](); err != nil {
			t.Errorf("%s while owned: %v", n, err)
		}
	}
	for _, n := range []string{"fdatasync", "syncfs"} {
		w, take := takeable(t, t.TempDir())
		spy := &spyFS{FS: mem, calls: calls, during: take}
		var err error
		if g := GuardFS(spy, w); n == "syncfs" {
			err = g.Syncfs()
		} else {
			err = g.Fdatasync(fd)
		}
		if !errors.Is(err, ErrNotOwner) {
			t.Errorf("%s during which the store was lost: %v", n, err)
		}
	}
	take()
	clear(calls)
	for _, n := range order {
		if err := changes[n](); !errors.Is(err, ErrNotOwner) {
			t.Errorf("%s after the loss: %v", n, err)
		}
	}
	if len(calls) != 0 {
		t.Errorf("reached the disk: %v", calls)
	}
	buf := make([]byte, 2)
	if n, err := fs.Pread(fd, buf, 0); n != 2 || err != nil || string(buf) != "da" {
		t.Error(n, err, string(buf))
	}
	if _, err := fs.Open("x", objfs.ReadOnly); err != nil {
		t.Error(err)
	}
}

// spyFS counts what changes something.
type spyFS struct {
	objfs.FS
	calls  map[string]int
	during func()
}

func (s *spyFS) Open(p string, fl int) (int, error) {
	if fl&(objfs.Create|objfs.Trunc) != 0 {
		s.calls["open"]++
	}
	return s.FS.Open(p, fl)
}
func (s *spyFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	s.calls["pwrite"]++
	return s.FS.Pwrite(fd, p, off)
}
func (s *spyFS) Truncate(fd int, n int64) error { s.calls["truncate"]++; return s.FS.Truncate(fd, n) }
func (s *spyFS) Fdatasync(fd int) error {
	s.calls["fdatasync"]++
	if s.during != nil {
		s.during()
	}
	return s.FS.Fdatasync(fd)
}
func (s *spyFS) StartWriteback(fd int) error { s.calls["writeback"]++; return s.FS.StartWriteback(fd) }
func (s *spyFS) Syncfs() error {
	s.calls["syncfs"]++
	if s.during != nil {
		s.during()
	}
	return s.FS.Syncfs()
}
func (s *spyFS) Remove(p string) error        { s.calls["remove"]++; return s.FS.Remove(p) }
func (s *spyFS) Rename(from, to string) error { s.calls["rename"]++; return s.FS.Rename(from, to) }
func (s *spyFS) Mkdir(p string) error         { s.calls["mkdir"]++; return s.FS.Mkdir(p) }

// An engine takes no batch and tells of no flush after the loss.
func TestGuardEngine(t *testing.T) {
	w, take := takeable(t, t.TempDir())
	e, err := local.OpenPebble("x", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	g := GuardEngine(e, w)
	put := func(k string) error {
		b := g.NewBatch()
		b.Set([]byte(k), []byte("v"))
		return g.Apply(b)
	}
	if err := errors.Join(put("one"), g.Sync(), g.Failed()); err != nil {
		t.Fatal(err)
	}
	if err := put("two"); err != nil {
		t.Fatal(err)
	}
	take()
	for what, err := range map[string]error{"apply": put("three"), "sync": g.Sync(), "failed": g.Failed()} {
		if !errors.Is(err, ErrNotOwner) || !errors.Is(err, store.ErrFailed) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := g.Get([]byte("three"), nil); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	if v, err := g.Get([]byte("one"), nil); err != nil || string(v) != "v" {
		t.Error(v, err)
	}
	if e.Failed() != nil || e.Metrics().Syncs != 1 {
		t.Error("the engine below was asked to sync", e.Failed(), e.Metrics().Syncs)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// files is what a directory tree holds.
func files(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, i os.FileInfo, err error) error {
		if err != nil || i.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %d %v %x\n", path, i.Size(), i.ModTime(), data[max(0, len(data)-64):])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// After the loss nothing of Pebble writes to the disk any more, in the middle of
// flushes and compactions as they may be; the engine has failed, and what was
// acknowledged before is there for the next owner.
func TestGuardVFS(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "db")
	for round := range 2 {
		w, take := takeable(t, t.TempDir())
		var failed atomic.Int32
		var cause atomic.Value
		e, err := local.OpenPebble(data, local.Options{
			FS: GuardVFS(vfs.Default, w), MinFreeBytes: -1, MemTableBytes: 256 << 10, CacheBytes: 1 << 20,
			OnFail: func(err error) { failed.Add(1); cause.Store(err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		g := GuardEngine(e, w)
		var wg sync.WaitGroup
		acked := make([]int, 4)
		for n := range 4 {
			wg.Go(func() {
				val := make([]byte, 500)
				for i := range 1 << 20 {
					b := g.NewBatch()
					b.Set(fmt.Appendf(nil, "%d/%d/%d", round, n, i), val)
					if g.Apply(b) != nil || g.Sync() != nil {
						return
					}
					acked[n] = i + 1
				}
			})
		}
		for deadline := time.Now().Add(10 * time.Second); e.Metrics().L0Files == 0 && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
		take()
		wg.Wait()
		// Calls that had passed the guard before may still be at their write.
		before := files(t, data)
		for same := 0; same < 3; same++ {
			time.Sleep(20 * time.Millisecond)
			if now := files(t, data); now != before {
				before, same = now, 0
			}
		}
		for i := range 2000 { // by somebody who does not ask
			b := e.NewBatch()
			b.Set(fmt.Appendf(nil, "late/%d", i), make([]byte, 1000))
			if e.Apply(b) != nil {
				break
			}
		}
		if err := e.Sync(); !errors.Is(err, ErrNotOwner) {
			t.Error(err)
		}
		time.Sleep(50 * time.Millisecond)
		_ = e.Close()
		if after := files(t, data); after != before {
			t.Errorf("round %d: the store has changed after the loss:\n%s\n%s", round, before, after)
		}
		if failed.Load() != 1 || !errors.Is(cause.Load().(error), ErrNotOwner) {
			t.Errorf("failed %d times: %v", failed.Load(), cause.Load())
		}

		// The next owner.
		w2, _ := takeable(t, t.TempDir())
		e2, err := local.OpenPebble(data, local.Options{FS: GuardVFS(vfs.Default, w2), MinFreeBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		for n, k := range acked {
			if k == 0 {
				t.Error("nothing was acknowledged: the test does not test")
			}
			for i := range k {
				if _, err := e2.Get(fmt.Appendf(nil, "%d/%d/%d", round, n, i), nil); err != nil {
					t.Fatalf("round %d: acknowledged key %d/%d: %v", round, n, i, err)
				}
			}
		}
		if _, err := e2.Get([]byte("late/1"), nil); !errors.Is(err, store.ErrNotFound) {
			t.Error(err)
		}
		if err := e2.Close(); err != nil {
			t.Error(err)
		}
	}
}
