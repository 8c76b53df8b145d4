package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// renames moves n files about between directories from eight goroutines, each
// with files of its own, replacing its own older ones; in the end every file
// must be at its last place, with its content, and nowhere else.
func renames(args []string) error {
	fl := flag.NewFlagSet("renames", flag.ContinueOnError)
	n := fl.Int("n", 4000, "renames")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	const workers, dirs = 8, 4
	for d := range dirs {
		if err := os.MkdirAll(filepath.Join(dir, fmt.Sprint("d", d)), 0o755); err != nil {
			return err
		}
	}
	var mu sync.Mutex
	final := map[string]string{} // path -> content
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			errs[w] = func() error {
				r := rand.New(rand.NewPCG(uint64(w), 8))
				at := map[string]string{}
				var paths []string
				place := func() string {
					return filepath.Join(dir, fmt.Sprint("d", r.IntN(dirs)), fmt.Sprintf("w%d-%d", w, r.IntN(40)))
				}
				for i := range 20 {
					p := filepath.Join(dir, fmt.Sprint("d", i%dirs), fmt.Sprintf("w%d-%d", w, i))
					c := fmt.Sprintf("file %d of %d", i, w)
					if err := os.WriteFile(p, []byte(c), 0o644); err != nil {
						return err
					}
					at[p] = c
					paths = append(paths, p)
				}
				for range *n / workers {
					i := r.IntN(len(paths))
					from, to := paths[i], place()
					if from == to {
						continue
					}
					if err := os.Rename(from, to); err != nil {
						return err
					}
					if _, over := at[to]; over {
						paths = slices.DeleteFunc(paths, func(p string) bool { return p == to })
						i = slices.Index(paths, from)
					}
					at[to] = at[from]
					delete(at, from)
					paths[i] = to
				}
				mu.Lock()
				defer mu.Unlock()
				for p, c := range at {
					final[p] = c
				}
				return nil
			}()
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := dropCaches(); err != nil {
		return err
	}
	found := 0
	for d := range dirs {
		es, err := os.ReadDir(filepath.Join(dir, fmt.Sprint("d", d)))
		if err != nil {
			return err
		}
		for _, e := range es {
			p := filepath.Join(dir, fmt.Sprint("d", d), e.Name())
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			want, ok := final[p]
			if !ok || string(b) != want {
				return fmt.Errorf("%s holds %q, want %q", p, b, want)
			}
			found++
		}
	}
	if found != len(final) {
		return fmt.Errorf("%d files, want %d", found, len(final))
	}
	// Loops and wrong kinds must be refused.
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "a/b")
	if err := os.MkdirAll(b, 0o755); err != nil {
		return err
	}
	if err := os.Rename(a, filepath.Join(b, "c")); !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("directory into itself: %v, want EINVAL", err)
	}
	if err := os.WriteFile(filepath.Join(b, "x"), nil, 0o644); err != nil {
		return err
	}
	e := filepath.Join(dir, "empty")
	if err := os.Mkdir(e, 0o755); err != nil {
		return err
	}
	if err := unix.Rename(e, b); !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("directory over a full one: %v, want ENOTEMPTY", err)
	}
	if err := unix.Rename(filepath.Join(b, "x"), e); !errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("file over directory: %v, want EISDIR", err)
	}
	return nil
}

// readdirTest reads a directory of n lasting entries again and again while others
// come and go: each lasting entry must be seen exactly once each time.
func readdirTest(args []string) error {
	fl := flag.NewFlagSet("readdir", flag.ContinueOnError)
	n := fl.Int("n", 3000, "lasting entries")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	// Entries that will go are mixed with those that stay.
	for i := range *n {
		for _, k := range []string{"keep", "old"} {
			if err := touch(filepath.Join(dir, fmt.Sprintf("%s%06d", k, i))); err != nil {
				return err
			}
		}
	}
	var stop atomic.Bool
	var changes atomic.Int64
	var werr error
	var wg sync.WaitGroup
	wg.Go(func() {
		r := rand.New(rand.NewPCG(9, 9))
		for i := 0; !stop.Load(); i++ {
			p := filepath.Join(dir, fmt.Sprintf("new%06d", r.IntN(*n)))
			err := os.Remove(p)
			if errors.Is(err, os.ErrNotExist) {
				err = touch(p)
			}
			if err == nil && i < *n {
				err = os.Remove(filepath.Join(dir, fmt.Sprintf("old%06d", i)))
			}
			if err != nil {
				werr = err
				return
			}
			changes.Add(1)
		}
	})
	var rerr error
	const enough = 300
	for round := 0; rerr == nil && (round < 12 || changes.Load() < enough && round < 10000); round++ {
		if rerr = dropCaches(); rerr != nil {
			break
		}
		var names []string
		if names, rerr = readNames(dir); rerr != nil {
			break
		}
		seen := map[string]int{}
		for _, name := range names {
			seen[name]++
		}
		for i := range *n {
			if k := fmt.Sprintf("keep%06d", i); seen[k] != 1 {
				rerr = fmt.Errorf("round %d: %s seen %d times among %d entries after %d changes", round, k, seen[k], len(names), changes.Load())
				break
			}
		}
	}
	stop.Store(true)
	wg.Wait()
	if changes.Load() < enough {
		rerr = errors.Join(rerr, fmt.Errorf("only %d changes were made meanwhile", changes.Load()))
	}
	return errors.Join(rerr, werr)
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// bigdir works in a directory that somebody else filled with n files named
// entry-00000001 and so on: it reads all of it, looks at some, removes some, makes
// some, and reads it again.
func bigdir(args []string) error {
	fl := flag.NewFlagSet("bigdir", flag.ContinueOnError)
	n := fl.Int("n", 100000, "entries")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	want := make(map[string]bool, *n)
	name := func(i int) string { return fmt.Sprintf("entry-%08d", i) }
	for i := 1; i <= *n; i++ {
		want[name(i)] = true
	}
	check := func() error {
		if err := dropCaches(); err != nil {
			return err
		}
		start := time.Now()
		names, err := readNames(dir)
		if err != nil {
			return err
		}
		fmt.Printf("read %d entries: %.1f s\n", len(names), time.Since(start).Seconds())
		seen := make(map[string]bool, len(names))
		for _, n := range names {
			if seen[n] {
				return fmt.Errorf("%q was returned twice", n)
			}
			if seen[n] = true; !want[n] {
				return fmt.Errorf("%q should not be there", n)
			}
		}
		if len(names) != len(want) {
			return fmt.Errorf("%d names, want %d", len(names), len(want))
		}
		return nil
	}
	if err := check(); err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(uint64(*n), 4))
	start := time.Now()
	for range 1000 {
		if st, err := os.Lstat(filepath.Join(dir, name(1+r.IntN(*n)))); err != nil || !st.Mode().IsRegular() {
			return fmt.Errorf("stat: %v", err)
		}
	}
	fmt.Printf("1000 stats: %.2f s\n", time.Since(start).Seconds())
	start = time.Now()
	for i := range 1000 {
		old, fresh := name(1+i*(*n/1000)), fmt.Sprintf("new-%d", i)
		if err := os.Remove(filepath.Join(dir, old)); err != nil {
			return err
		}
		delete(want, old)
		if err := touch(filepath.Join(dir, fresh)); err != nil {
			return err
		}
		want[fresh] = true
	}
	fmt.Printf("1000 removals and creations: %.2f s\n", time.Since(start).Seconds())
	return check()
}

// touch makes an empty file with one CREATE (O_EXCL and mknod would need a
// SETATTR as well).
func touch(p string) error {
	f, err := os.OpenFile(p, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// readonly tries every kind of change on a read-only export.
func readonly(args []string) error {
	dir, err := parse(flag.NewFlagSet("readonly", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	if _, err := os.ReadDir(dir); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	p := filepath.Join(dir, "x")
	for what, err := range map[string]error{
		"create":  os.WriteFile(p, nil, 0o644),
		"mkdir":   os.Mkdir(p, 0o755),
		"symlink": os.Symlink("y", p),
		"mknod":   unix.Mknod(p, unix.S_IFIFO|0o644, 0),
		"chmod":   os.Chmod(dir, 0o711),
		"utimes":  os.Chtimes(dir, time.Unix(1, 0), time.Unix(1, 0)),
	} {
		if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
			return fmt.Errorf("%s: %v, want EROFS", what, err)
		}
	}
	return nil
}

// squash checks that root acts as nobody on a root_squash export whose root
// directory anybody may write to.
func squash(args []string) error {
	dir, err := parse(flag.NewFlagSet("squash", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	p := filepath.Join(dir, fmt.Sprint("squashed", os.Getpid()))
	if err := os.Mkdir(p, 0o755); err != nil {
		return err
	}
	st, err := os.Stat(p)
	if err != nil {
		return err
	}
	if uid := st.Sys().(*syscall.Stat_t).Uid; uid == 0 {
		return errors.New("root made a directory that belongs to root")
	}
	return os.Remove(p)
}

func names(args []string) error {
	dir, err := parse(flag.NewFlagSet("names", flag.ContinueOnError), args)
	if err != nil {
		return err
	}
	p := func(n string) string { return filepath.Join(dir, n) }
	for _, n := range []string{strings.Repeat("n", 255), "with space", "ünï", "\xff\xfe raw", "new\nline", "a:b", "..x", "-f", "*"} {
		if err := os.WriteFile(p(n), []byte(n), 0o644); err != nil {
			return fmt.Errorf("%q: %w", n, err)
		}
	}
	if err := os.WriteFile(p(strings.Repeat("n", 256)), nil, 0o644); !errors.Is(err, unix.ENAMETOOLONG) {
		return fmt.Errorf("name of 256 bytes: %v, want ENAMETOOLONG", err)
	}
	if err := dropCaches(); err != nil {
		return err
	}
	got, err := readNames(dir)
	if err != nil {
		return err
	}
	for _, n := range got {
		if b, err := os.ReadFile(p(n)); err != nil || string(b) != n {
			return fmt.Errorf("%q holds %q (%v)", n, b, err)
		}
	}
	if len(got) != 9 {
		return fmt.Errorf("%d names, want 9: %q", len(got), got)
	}

	// Hard links.
	var st unix.Stat_t
	for i := range 5 {
		if err := os.Link(p("a:b"), p(fmt.Sprint("link", i))); err != nil {
			return err
		}
	}
	if err := os.Remove(p("a:b")); err != nil {
		return err
	}
	if err := unix.Lstat(p("link3"), &st); err != nil || st.Nlink != 5 {
		return fmt.Errorf("link count %d (%v), want 5", st.Nlink, err)
	}
	if err := os.Link(p("link0"), p("link1")); !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("link over an entry: %v, want EEXIST", err)
	}

	// Symlinks of every length that NFS can carry.
	for _, n := range []int{1, 60, 255, 1024, 4000} {
		t := strings.Repeat("t", n)
		if err := os.Symlink(t, p(fmt.Sprint("sym", n))); err != nil {
			return fmt.Errorf("symlink of %d bytes: %w", n, err)
		}
		if err := dropCaches(); err != nil {
			return err
		}
		if got, err := os.Readlink(p(fmt.Sprint("sym", n))); err != nil || got != t {
			return fmt.Errorf("symlink of %d bytes: got %d (%v)", n, len(got), err)
		}
	}

	// Special files.
	for n, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK, "chr": unix.S_IFCHR, "blk": unix.S_IFBLK} {
		dev := 0
		if mode == unix.S_IFCHR || mode == unix.S_IFBLK {
			dev = int(unix.Mkdev(259, 0x12345))
		}
		if err := unix.Mknod(p(n), mode|0o640, dev); err != nil {
			return fmt.Errorf("mknod %s: %w", n, err)
		}
		if err := dropCaches(); err != nil {
			return err
		}
		if err := unix.Lstat(p(n), &st); err != nil || st.Mode != mode|0o640 || int(st.Rdev) != dev {
			return fmt.Errorf("%s: mode %o rdev %#x (%v), want %o %#x", n, st.Mode, st.Rdev, err, mode|0o640, dev)
		}
	}

	// Directories count their subdirectories.
	for i := range 3 {
		if err := os.MkdirAll(p(fmt.Sprintf("dir/sub%d", i)), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Lstat(p("dir"), &st); err != nil || (st.Nlink != 5 && st.Nlink != 1) {
		return fmt.Errorf("directory with 3 subdirectories has %d links (%v)", st.Nlink, err)
	}
	if err := unix.Rmdir(p("dir")); !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("rmdir of a full directory: %v", err)
	}
	if err := unix.Rmdir(p("fifo")); !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("rmdir of a fifo: %v", err)
	}
	if err := unix.Unlink(p("dir")); !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("unlink of a directory: %v", err)
	}

	// Times, to the nanosecond, survive a write that came before them.
	f, err := os.Create(p("times"))
	if err != nil {
		return err
	}
	if _, err := f.Write(bytes.Repeat([]byte("x"), 100_000)); err != nil {
		return err
	}
	at, mt := time.Unix(1_234_567_890, 123_456_789), time.Unix(987_654_321, 987_654_321)
	if err := os.Chtimes(p("times"), at, mt); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := dropCaches(); err != nil {
		return err
	}
	if err := unix.Lstat(p("times"), &st); err != nil || st.Mtim.Nano() != mt.UnixNano() || st.Atim.Nano() != at.UnixNano() {
		return fmt.Errorf("times %d %d (%v), want %d %d", st.Atim.Nano(), st.Mtim.Nano(), err, at.UnixNano(), mt.UnixNano())
	}
	var sf unix.Statfs_t
	if err := unix.Statfs(dir, &sf); err != nil || sf.Blocks == 0 || sf.Bavail > sf.Blocks {
		return fmt.Errorf("statfs %+v (%v)", sf, err)
	}
	return nil
}
