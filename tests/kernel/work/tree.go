package main

import (
	"archive/tar"
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// entry is one object of a generated tree.
type entry struct {
	path   string // relative
	kind   byte   // tar type
	mode   int64
	mtime  int64 // seconds
	size   int64
	target string // symlink target, or path of the file that a hard link names
	seed   uint64
}

// entries returns a tree of n objects that depends on the seed alone:
// directories before their content, sizes as in a source tree.
func entries(n int, seed uint64) []entry {
	r := rand.New(rand.NewPCG(seed, 1))
	dirs := []string{""}
	var files []int
	var out []entry
	for len(out) < n {
		e := entry{mtime: 1_500_000_000 + r.Int64N(1e8), seed: r.Uint64()}
		parent := dirs[r.IntN(len(dirs))]
		name := fmt.Sprintf("%s%06d", []string{"a", "src-", "Ünï ", "x.y."}[r.IntN(4)], len(out))
		if r.IntN(50) == 0 {
			for len(name) < 200 {
				name += "-long"
			}
		}
		e.path = filepath.Join(parent, name)
		switch k := r.IntN(100); {
		case k < 8:
			e.kind, e.mode = tar.TypeDir, []int64{0o755, 0o700, 0o2775, 0o1777}[r.IntN(4)]
			if len(parent) < 600 {
				dirs = append(dirs, e.path)
			}
		case k < 11:
			e.kind, e.mode, e.target = tar.TypeSymlink, 0o777, "../target/"+name
		case k < 14 && len(files) > 0:
			t := out[files[r.IntN(len(files))]]
			e.kind, e.mode, e.mtime, e.size, e.seed, e.target = tar.TypeLink, t.mode, t.mtime, t.size, t.seed, t.path
		default:
			e.kind, e.mode = tar.TypeReg, []int64{0o644, 0o755, 0o600, 0o444}[r.IntN(4)]
			switch s := r.IntN(1000); {
			case s < 50:
			case s < 900:
				e.size = 1 + r.Int64N(8192)
			case s < 998:
				e.size = r.Int64N(65536)
			default:
				e.size = r.Int64N(2 << 20)
			}
			files = append(files, len(out))
		}
		out = append(out, e)
	}
	return out
}

func tree(args []string) error {
	if len(args) == 0 {
		return errors.New("tree: tar or verify")
	}
	f := flag.NewFlagSet("tree", flag.ContinueOnError)
	n := f.Int("n", 20000, "objects")
	seed := f.Uint64("seed", 1, "seed")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	es := entries(*n, *seed)
	switch args[0] {
	case "tar":
		return writeTar(f.Arg(0), es)
	case "verify":
		return verifyTree(f.Arg(0), es)
	}
	return fmt.Errorf("tree: unknown %q", args[0])
}

func writeTar(file string, es []entry) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	bw := bufio.NewWriterSize(out, 1<<20)
	w := tar.NewWriter(bw)
	for _, e := range es {
		h := &tar.Header{Name: e.path, Typeflag: e.kind, Mode: e.mode, ModTime: time.Unix(e.mtime, 0), Linkname: e.target, Format: tar.FormatPAX}
		if e.kind == tar.TypeReg {
			h.Size = e.size
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if e.kind == tar.TypeReg {
			if _, err := w.Write(pattern(int(e.size), e.seed)); err != nil {
				return err
			}
		}
	}
	return errors.Join(w.Close(), bw.Flush(), out.Close())
}

func verifyTree(dir string, es []entry) error {
	links := map[string]uint64{} // path of a file -> its number of names
	for _, e := range es {
		if e.kind == tar.TypeReg {
			links[e.path]++
		} else if e.kind == tar.TypeLink {
			links[e.target]++
		}
	}
	var errs []error
	for _, e := range es {
		if err := verifyEntry(filepath.Join(dir, e.path), e, links); err != nil {
			errs = append(errs, fmt.Errorf("%q: %w", e.path, err))
			if len(errs) == 10 {
				break
			}
		}
	}
	found := -1 // the root itself
	if err := filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { found++; return nil }); err != nil {
		errs = append(errs, err)
	}
	if found != len(es) {
		errs = append(errs, fmt.Errorf("a walk finds %d objects, want %d", found, len(es)))
	}
	return errors.Join(errs...)
}

func verifyEntry(p string, e entry, links map[string]uint64) error {
	st, err := os.Lstat(p)
	if err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	switch e.kind {
	case tar.TypeDir:
		if !st.IsDir() {
			return fmt.Errorf("is %v, want a directory", st.Mode())
		}
	case tar.TypeSymlink:
		t, err := os.Readlink(p)
		if err != nil || t != e.target {
			return fmt.Errorf("symlink to %q (%v), want %q", t, err, e.target)
		}
		return nil
	default:
		if !st.Mode().IsRegular() {
			return fmt.Errorf("is %v, want a file", st.Mode())
		}
		name := e.path
		if e.kind == tar.TypeLink {
			name = e.target
		}
		if uint64(sys.Nlink) != links[name] {
			return fmt.Errorf("%d links, want %d", sys.Nlink, links[name])
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := equal(b, pattern(int(e.size), e.seed)); err != nil {
			return err
		}
		if st.Size() != e.size {
			return fmt.Errorf("size %d, want %d", st.Size(), e.size)
		}
	}
	if int64(sys.Mode&0o7777) != e.mode {
		return fmt.Errorf("mode %o, want %o", sys.Mode&0o7777, e.mode)
	}
	if sys.Mtim.Sec != e.mtime || sys.Mtim.Nsec != 0 {
		return fmt.Errorf("mtime %d.%09d, want %d", sys.Mtim.Sec, sys.Mtim.Nsec, e.mtime)
	}
	return nil
}
