package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func mmapTest(args []string) error {
	dir, err := parse(flag.NewFlagSet("mmap", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	const size = 4<<20 + 1234
	name := filepath.Join(dir, "mapped")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	want := pattern(size, 1)
	if _, err := f.Write(want); err != nil {
		return err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(m)
	r := rand.New(rand.NewPCG(7, 7))
	for round := range 20 {
		for range 50 {
			off := r.IntN(size)
			b := pattern(min(1+r.IntN(9000), size-off), r.Uint64())
			copy(m[off:], b)
			copy(want[off:], b)
		}
		if err := unix.Msync(m, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync: %w", err)
		}
		// A write through the file must be seen in the mapping and not lose it.
		off := r.IntN(size - 100)
		b := pattern(100, r.Uint64())
		if _, err := f.WriteAt(b, int64(off)); err != nil {
			return err
		}
		copy(want[off:], b)
		if err := equal(m, want); err != nil {
			return fmt.Errorf("round %d: mapping: %w", round, err)
		}
		if round%5 == 4 {
			if err := f.Sync(); err != nil {
				return err
			}
			if err := dropCaches(); err != nil {
				return err
			}
			got, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if err := equal(got, want); err != nil {
				return fmt.Errorf("round %d: file: %w", round, err)
			}
		}
	}
	return nil
}

// lockFile takes a lock the way mail programs do on NFS: exclusive creation.
func lockFile(name string, r *rand.Rand) error {
	for end := time.Now().Add(2 * time.Minute); ; {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err == nil {
			return f.Close()
		}
		if !errors.Is(err, os.ErrExist) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("lock file %s was never released", name)
		}
		time.Sleep(time.Duration(1+r.IntN(15)) * time.Millisecond)
	}
}

// appendTest lets several clients append records to one file, each under a
// lock file. When all peers are done, every record must be there, whole, and
// each peer's in order.
func appendTest(args []string) error {
	fl := flag.NewFlagSet("append", flag.ContinueOnError)
	id := fl.Int("id", 0, "this client")
	peers := fl.Int("peers", 2, "number of clients")
	n := fl.Int("n", 200, "records of each client")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(uint64(*id), 3))
	name := filepath.Join(dir, "log")
	record := func(id, i int) string {
		return fmt.Sprintf("%d:%d:%s\n", id, i, strings.Repeat(string(rune('a'+i%26)), 1+(i*37)%3000))
	}
	for i := range *n {
		if err := lockFile(name+".lock", r); err != nil {
			return err
		}
		f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		_, err = f.WriteString(record(*id, i))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		if err := os.Remove(name + ".lock"); err != nil {
			return fmt.Errorf("release: %w", err)
		}
	}
	if err := os.WriteFile(fmt.Sprintf("%s.done%d", name, *id), nil, 0o644); err != nil {
		return err
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		es, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		done := 0
		for _, e := range es {
			if strings.Contains(e.Name(), ".done") {
				done++
			}
		}
		if done == *peers {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("only %d of %d clients finished", done, *peers)
		}
	}
	if err := dropCaches(); err != nil {
		return err
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	next := make([]int, *peers)
	for i, line := range strings.SplitAfter(string(b), "\n") {
		if line == "" {
			continue
		}
		var who, num int
		if _, err := fmt.Sscanf(line, "%d:%d:", &who, &num); err != nil || who >= *peers {
			return fmt.Errorf("line %d is damaged: %.60q", i, line)
		}
		if num != next[who] || line != record(who, num) {
			return fmt.Errorf("line %d: record %d of client %d, want number %d", i, num, who, next[who])
		}
		next[who]++
	}
	for who, got := range next {
		if got != *n {
			return fmt.Errorf("client %d has %d records, want %d", who, got, *n)
		}
	}
	return nil
}

func silly(args []string) error {
	dir, err := parse(flag.NewFlagSet("silly", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	for i := range 20 {
		name := filepath.Join(dir, fmt.Sprint("f", i))
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		want := pattern(100_000, uint64(i))
		if _, err := f.Write(want); err != nil {
			return err
		}
		if i%2 == 0 {
			err = os.Remove(name)
		} else {
			// Replaced by a rename while open: silly renaming as well.
			other := name + ".new"
			if err := os.WriteFile(other, []byte("new"), 0o644); err != nil {
				return err
			}
			err = os.Rename(other, name)
		}
		if err != nil {
			return err
		}
		more := pattern(50_000, uint64(i)+99)
		if _, err := f.WriteAt(more, 80_000); err != nil {
			return fmt.Errorf("write after removal: %w", err)
		}
		want = append(want[:80_000], more...)
		if err := f.Sync(); err != nil {
			return fmt.Errorf("fsync after removal: %w", err)
		}
		if err := dropCaches(); err != nil {
			return err
		}
		got := make([]byte, len(want)+1)
		n, err := f.ReadAt(got, 0)
		if err != nil && err != io.EOF {
			return fmt.Errorf("read after removal: %w", err)
		}
		if err := equal(got[:n], want); err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	time.Sleep(200 * time.Millisecond) // the last silly delete is asynchronous
	return noSilly(dir)
}

// holes runs random writes, truncations and reads on one file and compares
// with the same operations on memory.
func holes(args []string) error {
	fl := flag.NewFlagSet("holes", flag.ContinueOnError)
	seed := fl.Uint64("seed", 1, "seed")
	ops := fl.Int("ops", 3000, "operations")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	const limit = 6 << 20
	r := rand.New(rand.NewPCG(*seed, 5))
	name := filepath.Join(dir, "holes")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer func() { f.Close() }()
	var model []byte
	grow := func(n int) {
		if n > len(model) {
			model = append(model, make([]byte, n-len(model))...)
		}
	}
	for i := range *ops {
		what := ""
		switch k := r.IntN(100); {
		case k < 45:
			off, n := r.IntN(limit), 1+r.IntN(20000)
			if k < 10 {
				n = 1 + r.IntN(300000)
			}
			n = min(n, limit-off)
			b := pattern(n, r.Uint64())
			what = fmt.Sprintf("write %d at %d", n, off)
			if _, err = f.WriteAt(b, int64(off)); err == nil {
				grow(off + n)
				copy(model[off:], b)
			}
		case k < 60:
			n := r.IntN(limit)
			if k < 50 {
				n = min(len(model)+r.IntN(5000), limit)
			} else if k < 55 {
				n = max(0, len(model)-r.IntN(5000))
			}
			what = fmt.Sprintf("truncate %d to %d", len(model), n)
			if err = f.Truncate(int64(n)); err == nil {
				if n < len(model) {
					clear(model[n:])
					model = model[:n]
				}
				grow(n)
			}
		case k < 90:
			off, n := r.IntN(limit), 1+r.IntN(100000)
			what = fmt.Sprintf("read %d at %d", n, off)
			got := make([]byte, n)
			var m int
			if m, err = f.ReadAt(got, int64(off)); err == io.EOF {
				err = nil
			}
			if err == nil {
				err = equal(got[:m], model[min(off, len(model)):min(off+n, len(model))])
			}
		case k < 94:
			what = "fsync"
			err = f.Sync()
		case k < 97:
			what = "reopen"
			if err = f.Close(); err == nil {
				f, err = os.OpenFile(name, os.O_RDWR, 0)
			}
		default:
			what = "drop caches and compare"
			if err = f.Sync(); err == nil {
				err = dropCaches()
			}
			var got []byte
			if err == nil {
				got, err = os.ReadFile(name)
			}
			if err == nil {
				err = equal(got, model)
			}
		}
		if err != nil {
			return fmt.Errorf("operation %d, %s: %w", i, what, err)
		}
		if st, err := f.Stat(); err != nil || st.Size() != int64(len(model)) {
			return fmt.Errorf("operation %d, %s: size %d (%v), want %d", i, what, st.Size(), err, len(model))
		}
	}
	return nil
}

func direct(args []string) error {
	fl := flag.NewFlagSet("direct", flag.ContinueOnError)
	seed := fl.Uint64("seed", 1, "seed")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	name := filepath.Join(dir, "direct")
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC|unix.O_DIRECT, 0o644)
	if err != nil {
		return fmt.Errorf("open with O_DIRECT: %w", err)
	}
	defer unix.Close(fd)
	const size = 8 << 20
	raw := make([]byte, size+4096)
	shift := 4096 - int(uintptr(unsafe.Pointer(&raw[0]))%4096)
	buf := raw[shift : shift+size]
	r := rand.New(rand.NewPCG(*seed, 6))
	model := make([]byte, size)
	if n, err := unix.Pwrite(fd, buf, 0); err != nil || n != size {
		return fmt.Errorf("first write: %d, %w", n, err)
	}
	for i := range 400 {
		off := r.IntN(size/512) * 512
		n := min((1+r.IntN(512))*512, size-off)
		if i%10 == 0 {
			// NFS has no alignment rules; the server must not have any either.
			off, n = off+r.IntN(500), max(1, n-1000)
		}
		b := buf[:n]
		if i%2 == 0 {
			fill(b, r.Uint64())
			copy(model[off:], b)
			if got, err := unix.Pwrite(fd, b, int64(off)); err != nil || got != n {
				return fmt.Errorf("write %d at %d: %d, %w", n, off, got, err)
			}
		} else {
			got, err := unix.Pread(fd, b, int64(off))
			if err != nil {
				return fmt.Errorf("read %d at %d: %w", n, off, err)
			}
			if err := equal(b[:got], model[off:min(off+n, size)]); err != nil {
				return fmt.Errorf("read %d at %d: %w", n, off, err)
			}
		}
	}
	if err := dropCaches(); err != nil {
		return err
	}
	got, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	return equal(got, model)
}

func bigfile(args []string) error {
	fl := flag.NewFlagSet("bigfile", flag.ContinueOnError)
	limit := fl.Int64("max", math.MaxInt64, "the highest size that the server must allow")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	name := filepath.Join(dir, "big")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	var offs []int64
	for _, o := range []int64{0, 1<<31 - 7, 1<<32 - 7, 1<<40 - 7, 1<<40 + 1<<30, 1<<43 - 5000, 1<<52 - 3, 1<<62 - 7, math.MaxInt64 - 1<<20, math.MaxInt64 - 1000} {
		if o+1000 > 0 && o+1000 <= *limit {
			offs = append(offs, o)
		}
	}
	for _, o := range offs {
		if _, err := f.WriteAt(pattern(1000, uint64(o)), o); err != nil {
			return fmt.Errorf("write at %#x: %w", o, err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("fsync at %#x: %w", o, err)
		}
		if st, err := f.Stat(); err != nil || st.Size() != o+1000 {
			return fmt.Errorf("size after writing at %#x: %#x (%v)", o, st.Size(), err)
		}
	}
	if err := dropCaches(); err != nil {
		return err
	}
	for _, o := range offs {
		b := make([]byte, 1000)
		if _, err := f.ReadAt(b, o); err != nil && err != io.EOF {
			return fmt.Errorf("read at %#x: %w", o, err)
		}
		if err := equal(b, pattern(1000, uint64(o))); err != nil {
			return fmt.Errorf("at %#x: %w", o, err)
		}
		if o > 1<<20 {
			hole := make([]byte, 4096)
			if _, err := f.ReadAt(hole, o-1<<20); err != nil {
				return fmt.Errorf("read the hole before %#x: %w", o, err)
			}
			// Offsets near each other share the hole: data may be in it only if
			// another write was there.
			if o != math.MaxInt64-1000 && !bytes.Equal(hole, make([]byte, 4096)) {
				return fmt.Errorf("the hole before %#x is not zero", o)
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Blocks*512 > 64<<20 {
		return fmt.Errorf("%d bytes in %d writes of 1000 bytes use %d bytes of disk", st.Size, len(offs), st.Blocks*512)
	}
	for i := len(offs) - 1; i > 0; i-- {
		if err := f.Truncate(offs[i] + 10); err != nil {
			return fmt.Errorf("truncate to %#x: %w", offs[i]+10, err)
		}
		b := make([]byte, 1000)
		n, err := f.ReadAt(b, offs[i])
		if err != io.EOF {
			return fmt.Errorf("read after truncation at %#x: %v", offs[i], err)
		}
		if err := equal(b[:n], pattern(1000, uint64(offs[i]))[:10]); err != nil {
			return fmt.Errorf("after truncation at %#x: %w", offs[i], err)
		}
	}
	f.Close()
	return os.Remove(name)
}
