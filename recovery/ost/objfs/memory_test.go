package objfs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A Memory keeps what was stored over the death of its process, on real files
// and in the model; of what was not synced the model's power failure leaves a part.
func TestMemory(t *testing.T) {
	dir := t.TempDir()
	m := NewMem(func() int64 { return 1 })
	for _, x := range []struct {
		name string
		fs   func() FS
	}{{"mem", func() FS { m.Kill(); return m }}, {"linux", func() FS {
		l, err := NewLinux(dir)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}}} {
		t.Run(x.name, func(t *testing.T) {
			a, err := x.fs().OpenMemory("m")
			if err != nil {
				t.Fatal(err)
			}
			if a.Size() != 0 || a.Put([]byte{1}, 0) == nil || a.Get(make([]byte, 1), 0) == nil {
				t.Fatal("there is room before Grow")
			}
			for _, n := range []int64{1, MemoryChunk, MemoryChunk + 1, 5} {
				if err := a.Grow(n); err != nil {
					t.Fatal(err)
				}
			}
			if a.Size() != 2*MemoryChunk {
				t.Fatal(a.Size())
			}
			for _, off := range []int64{0, 4096, MemoryChunk - 5, MemoryChunk, 2*MemoryChunk - 5} {
				if err := a.Put([]byte("hello"), off); err != nil {
					t.Fatal(off, err)
				}
			}
			if a.Put([]byte("hello"), 2*MemoryChunk-4) == nil || a.Put([]byte("x"), -1) == nil {
				t.Fatal("stored outside of the room")
			}
			if err := a.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := a.Put([]byte("later"), 4096); err != nil {
				t.Fatal(err)
			}
			// Another process has it, whether this one has closed it or not.
			b, err := x.fs().OpenMemory("m")
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5)
			for off, want := range map[int64]string{0: "hello", 4096: "later", MemoryChunk - 5: "hello", 2*MemoryChunk - 5: "hello", 100: "\x00\x00\x00\x00\x00"} {
				if err := b.Get(got, off); err != nil || string(got) != want {
					t.Fatalf("at %d: %q %v, want %q", off, got, err, want)
				}
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			// A file that is not whole chunks: what there is room for later is zero.
			fs := x.fs()
			fd, err := fs.Open("m", ReadWrite)
			if err != nil {
				t.Fatal(err)
			}
			if err := fs.Truncate(fd, MemoryChunk+8); err != nil {
				t.Fatal(err)
			}
			if b, err = fs.OpenMemory("m"); err != nil || b.Size() != MemoryChunk {
				t.Fatal(b.Size(), err)
			}
			if err := b.Grow(2 * MemoryChunk); err != nil {
				t.Fatal(err)
			}
			if err := b.Get(got, MemoryChunk); err != nil || string(got) != "\x00\x00\x00\x00\x00" {
				t.Fatalf("%q %v", got, err)
			}
			if err := b.Get(got, 0); err != nil || string(got) != "hello" {
				t.Fatalf("%q %v", got, err)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
	seen := map[string]bool{}
	for seed := range uint64(40) {
		c, err := m.CrashClone(seed).OpenMemory("m")
		if err != nil {
			continue // the name was not durable
		}
		got := make([]byte, 5)
		if c.Size() > 0 {
			if err := c.Get(got, 4096); err != nil {
				t.Fatal(err)
			}
			seen[string(got)] = true
		}
	}
	if !seen["hello"] || !seen["later"] {
		t.Errorf("after power failures: %v", seen)
	}
}

// A file that somebody has cut gives an error, not a signal.
func TestMemoryFault(t *testing.T) {
	dir := t.TempDir()
	l, err := NewLinux(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Shut()
	m, err := l.OpenMemory("m")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Grow(MemoryChunk); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "m"), 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Put(bytes.Repeat([]byte{1}, 100), 5000); !errors.Is(err, errMemory) {
		t.Fatal(err)
	}
	if err := m.Get(make([]byte, 100), 5000); !errors.Is(err, errMemory) {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.OpenMemory("."); err == nil {
		t.Error("a directory as memory")
	}
}
