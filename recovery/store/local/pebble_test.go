package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/baton-nfs/baton/recovery/store"
)

func open(t *testing.T, o Options) *Pebble {
	t.Helper()
	if o.MinFreeBytes == 0 && o.DiskUsage == nil {
		o.MinFreeBytes = -1
	}
	if o.MemTableBytes == 0 {
		o.MemTableBytes = 1 << 20
	}
	p, err := OpenPebble("db", o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func put(t *testing.T, p *Pebble, k, v string) error {
	t.Helper()
	b := p.NewBatch()
	b.Set([]byte(k), []byte(v))
	return p.Apply(b)
}

func get(p *Pebble, k string) string {
	v, err := p.Get([]byte(k), nil)
	if err != nil {
		return err.Error()
	}
	return string(v)
}

func TestEngine(t *testing.T) {
	p := open(t, Options{FS: vfs.NewMem()})
	for i := range 10 {
		if err := put(t, p, fmt.Sprint("k", i), fmt.Sprint("v", i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := get(p, "k3"); got != "v3" {
		t.Error(got)
	}
	if _, err := p.Get([]byte("none"), nil); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	b := p.NewBatch()
	b.Delete([]byte("k4"))
	b.DeleteRange([]byte("k6"), []byte("k8"))
	if err := p.Apply(b); err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(p.NewBatch()); err != nil {
		t.Error("empty batch:", err)
	}
	p.NewBatch().Close()
	it, err := p.NewIter([]byte("k2"), []byte("k9"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for ok := it.First(); ok; ok = it.Next() {
		got = append(got, string(it.Key())+"="+string(it.Value()))
	}
	if it.SeekGE([]byte("k6")); string(it.Key()) != "k8" {
		t.Errorf("seek: %q", it.Key())
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		t.Error(err)
	}
	if s := strings.Join(got, " "); s != "k2=v2 k3=v3 k5=v5 k8=v8" {
		t.Error(s)
	}
	if err := p.Sync(); err != nil {
		t.Error(err)
	}
	if m := p.Metrics(); m.Applies != 11 || m.Syncs != 1 || m.BytesApplied == 0 {
		t.Errorf("%+v", m)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestSyncIsDurable cuts the power after Sync, with the log rotated in between
// by filling memory tables.
func TestSyncIsDurable(t *testing.T) {
	mem := vfs.NewCrashableMem()
	p := open(t, Options{FS: mem, MemTableBytes: 256 << 10})
	big := strings.Repeat("x", 1000)
	n := 0
	for round := range 5 {
		for range 400 {
			if err := put(t, p, fmt.Sprintf("k%05d", n), big); err != nil {
				t.Fatal(err)
			}
			n++
		}
		if err := p.Sync(); err != nil {
			t.Fatal(err)
		}
		// Applied and not durable: may or may not survive.
		_ = put(t, p, "tail", fmt.Sprint(round))
		q := open(t, Options{FS: mem.CrashClone(vfs.CrashCloneCfg{}), MemTableBytes: 256 << 10})
		for i := range n {
			if get(q, fmt.Sprintf("k%05d", i)) != big {
				t.Fatalf("round %d: key %d of %d is lost", round, i, n)
			}
		}
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFailures breaks every kind of access to logs and manifests, also while
// the log is rotated: the process lives, the engine fails once, what was synced
// is there.
func TestFailures(t *testing.T) {
	kinds := map[string]func(op errorfs.Op) bool{
		"write": func(op errorfs.Op) bool { return op.Kind == errorfs.OpFileWrite },
		"sync": func(op errorfs.Op) bool {
			return op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSyncTo
		},
		"create": func(op errorfs.Op) bool { return op.Kind == errorfs.OpCreate || op.Kind == errorfs.OpReuseForWrite },
		"stat":   func(op errorfs.Op) bool { return op.Kind == errorfs.OpFileStat },
		"all":    func(op errorfs.Op) bool { return op.Kind.ReadOrWrite() == errorfs.OpIsWrite },
	}
	for _, file := range []string{".log", "MANIFEST"} {
		for kind, hit := range kinds {
			if file == "MANIFEST" && kind != "write" && kind != "sync" && kind != "all" {
				continue // manifests are made at the start only
			}
			t.Run(file+"-"+kind, func(t *testing.T) {
				mem := vfs.NewCrashableMem()
				var armed atomic.Bool
				inj := errorfs.InjectorFunc(func(op errorfs.Op) error {
					if armed.Load() && strings.Contains(op.Path, file) && hit(op) {
						return fs.ErrPermission
					}
					return nil
				})
				var failed atomic.Int32
				done := make(chan struct{})
				p := open(t, Options{FS: reuseFS{errorfs.Wrap(mem, inj)}, MemTableBytes: 256 << 10, OnFail: func(error) {
					if failed.Add(1) == 1 {
						close(done)
					}
				}})
				if err := errors.Join(put(t, p, "a", "1"), p.Sync()); err != nil {
					t.Fatal(err)
				}
				// Logs that were rotated are there to be used again.
				big := strings.Repeat("x", 4000)
				for i := range 200 {
					if err := put(t, p, fmt.Sprint("before", i), big); err != nil {
						t.Fatal(err)
					}
				}
				if err := errors.Join(p.db.Flush(), p.Sync()); err != nil {
					t.Fatal(err)
				}
				armed.Store(true)
				var err error
				for i := 0; err == nil && i < 5000; i++ {
					if err = put(t, p, fmt.Sprint("b", i), big); err == nil && i%10 == 0 {
						err = p.Sync()
					}
				}
				if !errors.Is(err, store.ErrFailed) || !errors.Is(p.Failed(), store.ErrFailed) {
					t.Fatalf("got %v", err)
				}
				<-done
				if err := put(t, p, "c", "1"); !errors.Is(err, store.ErrFailed) {
					t.Error(err)
				}
				if err := p.Sync(); !errors.Is(err, store.ErrFailed) {
					t.Error(err)
				}
				if err := p.Close(); !errors.Is(err, store.ErrFailed) {
					t.Error("close:", err)
				}
				if failed.Load() != 1 {
					t.Errorf("OnFail called %d times", failed.Load())
				}
				q := open(t, Options{FS: mem.CrashClone(vfs.CrashCloneCfg{})})
				if got := get(q, "a"); got != "1" {
					t.Error("synced key:", got)
				}
				if err := q.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// reuseFS has errors in files that are used again, too.
type reuseFS struct{ *errorfs.FS }

func (f reuseFS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(old, name, c)
	if err != nil {
		return nil, err
	}
	if err := file.Close(); err != nil {
		return nil, err
	}
	return f.OpenReadWrite(name, c)
}

// TestFatalf: Pebble's fatal errors unwind our calls and block its goroutines.
func TestFatalf(t *testing.T) {
	calls := make(chan error, 10)
	p := open(t, Options{FS: vfs.NewMem(), OnFail: func(err error) { calls <- err }})
	err := func() (err error) {
		defer p.recover(&err)
		p.fatalHere()
		return nil
	}()
	if !errors.Is(err, store.ErrFailed) {
		t.Error(err)
	}
	returned := make(chan struct{})
	go func() { // stays blocked for the rest of the test binary's life
		pebbleLog{p}.Fatalf("again")
		close(returned)
	}()
	select {
	case <-returned:
		t.Error("Fatalf returned")
	case <-time.After(20 * time.Millisecond):
	}
	if len(calls) != 1 {
		t.Errorf("OnFail called %d times", len(calls))
	}
	if err := p.Close(); !errors.Is(err, store.ErrFailed) {
		t.Error(err)
	}
}

func (p *Pebble) fatalHere() { pebbleLog{p}.Fatalf("test %d", 1) }

func TestReadOnly(t *testing.T) {
	mem := vfs.NewMem()
	if _, err := OpenPebble("db", Options{FS: mem, ReadOnly: true}); err == nil {
		t.Error("opened what does not exist")
	}
	p := open(t, Options{FS: mem})
	if err := errors.Join(put(t, p, "a", "1"), p.Sync(), p.Close()); err != nil {
		t.Fatal(err)
	}
	p = open(t, Options{FS: mem, ReadOnly: true})
	if get(p, "a") != "1" {
		t.Error(get(p, "a"))
	}
	if err := put(t, p, "b", "1"); !errors.Is(err, store.ErrReadOnly) {
		t.Error(err)
	}
	if err := p.Sync(); !errors.Is(err, store.ErrReadOnly) {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestRoom(t *testing.T) {
	now := time.Unix(1000, 0)
	var avail uint64
	asked := 0
	p := open(t, Options{FS: vfs.NewMem(), Now: func() time.Time { return now }, DiskUsage: func() (uint64, uint64, error) {
		asked++
		if avail == 0 {
			return 0, 0, os.ErrInvalid
		}
		return avail, 10 << 30, nil // reserve: 1 % = 102.4 MiB
	}})
	defer p.Close()
	for _, c := range []struct {
		avail uint64
		want  store.Room
	}{
		{1 << 30, store.RoomOK}, {103 << 20, store.RoomOK}, {102 << 20, store.RoomLow}, {25 << 20, store.RoomCritical},
		{6 << 20, store.RoomNone}, {0, store.RoomOK}, {2 << 30, store.RoomOK},
	} {
		now = now.Add(2 * time.Second)
		avail = c.avail
		if got := p.Room(); got != c.want {
			t.Errorf("%d available: %d, want %d", c.avail, got, c.want)
		}
		before := asked
		if p.Room() != c.want || asked != before {
			t.Error("the disk is asked every time")
		}
	}
}
