package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// stormWorker makes, names and removes things under a few names again and again.
// An operation that was executed twice, or not at all, gives a result that cannot
// be; one that is executed later than its reply finds another object of the same
// name, which the model then misses.
type stormWorker struct {
	m       *mover
	id, dir string
	base    string // the first dir
	r       *rand.Rand
	things  map[string]*thing
	tokens  int
	resets  int
}

// thing is what a name stands for; hard links share it.
type thing struct {
	kind  byte // 'f', 'd' or 'l'
	token int  // of a symlink its target, of a file its mode
	ino   uint64
	links int
}

const stormNames = 12

func newStormWorker(m *mover, id, dir string, r *rand.Rand) *stormWorker {
	return &stormWorker{m: m, id: id, dir: dir, base: dir, r: r, things: map[string]*thing{}}
}

func (w *stormWorker) name() string { return w.id }

// result fails unless err is the errno that must come, or nil for 0.
func (w *stormWorker) result(op, name string, err error, want syscall.Errno) error {
	if want == 0 && err == nil || want != 0 && errors.Is(err, want) {
		return nil
	}
	w0 := "success"
	if want != 0 {
		w0 = want.Error()
	}
	return fmt.Errorf("%s %s: got %v, want %s, as if executed exactly once", op, name, err, w0)
}

func (w *stormWorker) step() error {
	names := make([]string, 2)
	for i := range names {
		names[i] = fmt.Sprint("n", w.r.IntN(stormNames))
	}
	a, b := names[0], names[1]
	pa, pb := filepath.Join(w.dir, a), filepath.Join(w.dir, b)
	x, y := w.things[a], w.things[b]
	exists := func(t *thing) syscall.Errno {
		if t != nil {
			return syscall.EEXIST
		}
		return 0
	}
	w.tokens++
	mode := os.FileMode(0o400 | w.tokens%0o377)
	start := time.Now()
	var op string
	var err error
	var want syscall.Errno
	var after func()
	switch w.r.IntN(7) {
	case 0: // EXCLUSIVE CREATE
		op, want = "create", exists(x)
		var f *os.File
		if f, err = os.OpenFile(pa, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode); err == nil {
			err = f.Close()
		}
		after = func() { w.things[a] = &thing{kind: 'f', token: int(mode), links: 1} }
	case 1: // REMOVE, RMDIR
		switch {
		case x == nil:
			op, want, err = "remove", syscall.ENOENT, syscall.Unlink(pa)
		case x.kind == 'd':
			op, err = "rmdir", syscall.Rmdir(pa)
		default:
			op, err = "remove", syscall.Unlink(pa)
		}
		after = func() { x.links--; delete(w.things, a) }
	case 2, 3: // RENAME
		op, err = "rename", syscall.Rename(pa, pb)
		switch {
		case x == nil:
			want = syscall.ENOENT
		case a == b || x == y:
			after = func() {}
		case y != nil && y.kind == 'd' && x.kind != 'd':
			want = syscall.EISDIR
		case y != nil && y.kind != 'd' && x.kind == 'd':
			want = syscall.ENOTDIR
		default:
			after = func() {
				if y != nil {
					y.links--
				}
				w.things[b] = x
				delete(w.things, a)
			}
		}
	case 4: // MKDIR
		op, want, err = "mkdir", exists(x), syscall.Mkdir(pa, 0o755)
		after = func() { w.things[a] = &thing{kind: 'd'} }
	case 5: // SYMLINK
		op, want, err = "symlink", exists(x), syscall.Symlink(fmt.Sprint("t", w.tokens), pa)
		token := w.tokens
		after = func() { w.things[a] = &thing{kind: 'l', token: token, links: 1} }
	case 6: // LINK
		if x != nil && x.kind != 'f' {
			return nil
		}
		op, err = "link", syscall.Link(pa, pb)
		switch {
		case x == nil:
			want = syscall.ENOENT
		case y != nil:
			want = syscall.EEXIST
		default:
			after = func() { w.things[b] = x; x.links++ }
		}
	}
	w.m.did(w.id, op, start)
	if err := w.result(op, a+" "+b, err, want); err != nil {
		return err
	}
	if want == 0 && after != nil {
		after()
	}
	for _, n := range names {
		if err := w.look(n); err != nil {
			return fmt.Errorf("after %s %s %s: %w", op, a, b, err)
		}
	}
	return nil
}

// look compares a name with the model. An object keeps its number.
func (w *stormWorker) look(name string) error {
	p := filepath.Join(w.dir, name)
	t := w.things[name]
	var st syscall.Stat_t
	err := syscall.Lstat(p, &st)
	if t == nil {
		if !errors.Is(err, syscall.ENOENT) {
			return fmt.Errorf("%s: lstat gives %v, but it must not exist", name, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if t.ino == 0 {
		t.ino = st.Ino
	}
	kind := map[uint32]byte{syscall.S_IFREG: 'f', syscall.S_IFDIR: 'd', syscall.S_IFLNK: 'l'}[st.Mode&syscall.S_IFMT]
	if kind != t.kind || st.Ino != t.ino {
		return fmt.Errorf("%s is %c with number %d, want %c with %d", name, kind, st.Ino, t.kind, t.ino)
	}
	if t.kind != 'd' && int(st.Nlink) != t.links {
		return fmt.Errorf("%s has %d links, want %d", name, st.Nlink, t.links)
	}
	switch t.kind {
	case 'f':
		if st.Mode&0o777 != uint32(t.token) {
			return fmt.Errorf("%s has mode %o, want %o", name, st.Mode&0o777, t.token)
		}
	case 'l':
		if got, err := os.Readlink(p); err != nil || got != fmt.Sprint("t", t.token) {
			return fmt.Errorf("%s is a link to %q (%v), want t%d", name, got, err, t.token)
		}
	}
	return nil
}

// reset begins in another directory: late executions may still change this one.
func (w *stormWorker) reset() error {
	w.resets++
	clear(w.things)
	w.dir = fmt.Sprintf("%s.r%d", w.base, w.resets)
	return os.Mkdir(w.dir, 0o755)
}

func (w *stormWorker) verify() error {
	es, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	var errs []error
	var got, want []string
	for _, e := range es {
		got = append(got, e.Name())
	}
	for n := range w.things {
		want = append(want, n)
		errs = append(errs, w.look(n))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		errs = append(errs, fmt.Errorf("names %v, want %v", got, want))
	}
	return errors.Join(errs...)
}
