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
	"sync"
	"sync/atomic"
	"time"
)

// crashWorker works in a directory of its own and keeps a model of it. Every
// operation on a hard mount must succeed however often the server dies
// meanwhile, and take effect exactly once.
type crashWorker struct {
	dir   string
	r     *rand.Rand
	files map[string]*crashFile // base name -> content; hard links share it
	dirs  map[string]bool
	ops   atomic.Int64
	slow  atomic.Int64 // longest operation in nanoseconds
	next  int
}

type crashFile struct{ data []byte }

// step makes one random operation and changes the model accordingly.
func (w *crashWorker) step() error {
	w.next++
	fresh := fmt.Sprintf("f%d", w.next)
	p := func(n string) string { return filepath.Join(w.dir, n) }
	some := func() string {
		ns := make([]string, 0, len(w.files))
		for n := range w.files {
			ns = append(ns, n)
		}
		slices.Sort(ns)
		return ns[w.r.IntN(len(ns))]
	}
	k := w.r.IntN(100)
	if len(w.files) < 5 {
		k = 0
	} else if len(w.files) > 60 {
		k = 75
	}
	switch {
	case k < 30: // create, write, make stable
		f, err := os.OpenFile(p(fresh), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		b := pattern(w.r.IntN(40000), w.r.Uint64())
		_, err = f.Write(b)
		if err == nil && w.r.IntN(2) == 0 {
			err = f.Sync()
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		w.files[fresh] = &crashFile{b}
	case k < 50: // overwrite or extend
		n := some()
		f, err := os.OpenFile(p(n), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		m := w.files[n]
		off := w.r.IntN(len(m.data) + 5000)
		b := pattern(1+w.r.IntN(20000), w.r.Uint64())
		_, err = f.WriteAt(b, int64(off))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		if need := off + len(b); need > len(m.data) {
			m.data = append(m.data, make([]byte, need-len(m.data))...)
		}
		copy(m.data[off:], b)
	case k < 57: // truncate
		n := some()
		m := w.files[n]
		size := w.r.IntN(len(m.data) + 3000)
		if err := os.Truncate(p(n), int64(size)); err != nil {
			return err
		}
		if size < len(m.data) {
			m.data = slices.Clone(m.data[:size])
		} else {
			m.data = append(m.data, make([]byte, size-len(m.data))...)
		}
	case k < 70: // rename, sometimes over another file
		from, to := some(), fresh
		if w.r.IntN(3) == 0 {
			to = some()
		}
		if err := os.Rename(p(from), p(to)); err != nil {
			return err
		}
		// Renaming one link onto another of the same file does nothing.
		if from != to && w.files[from] != w.files[to] {
			w.files[to] = w.files[from]
			delete(w.files, from)
		}
	case k < 85: // remove
		n := some()
		if err := os.Remove(p(n)); err != nil {
			return err
		}
		delete(w.files, n)
	case k < 92: // hard link
		n := some()
		if err := os.Link(p(n), p(fresh)); err != nil {
			return err
		}
		w.files[fresh] = w.files[n]
	default: // directories
		d := fmt.Sprintf("dir%d", w.r.IntN(6))
		if w.dirs[d] {
			if err := os.Remove(p(d)); err != nil {
				return err
			}
			delete(w.dirs, d)
		} else {
			if err := os.Mkdir(p(d), 0o755); err != nil {
				return err
			}
			w.dirs[d] = true
		}
	}
	w.ops.Add(1)
	return nil
}

// verify compares the directory with the model.
func (w *crashWorker) verify() error {
	es, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range es {
		if w.dirs[e.Name()] && e.IsDir() {
			continue
		}
		m, ok := w.files[e.Name()]
		if !ok {
			errs = append(errs, fmt.Errorf("%s should not exist", e.Name()))
			continue
		}
		b, err := os.ReadFile(filepath.Join(w.dir, e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !bytes.Equal(b, m.data) {
			errs = append(errs, fmt.Errorf("%s: %w", e.Name(), equal(b, m.data)))
		}
	}
	if want := len(w.files) + len(w.dirs); len(es) != want {
		errs = append(errs, fmt.Errorf("%d entries, want %d", len(es), want))
	}
	return errors.Join(errs...)
}

// crash runs the workers. The host drives it with files in the control
// directory: "verify.N" makes all workers pause, the caches be dropped and
// everything be compared, answered by "verified.N"; "stop" ends the run.
func crash(args []string) error {
	fl := flag.NewFlagSet("crash", flag.ContinueOnError)
	control := fl.String("control", "", "control directory")
	seed := fl.Uint64("seed", 1, "seed")
	workers := fl.Int("workers", 4, "concurrent workers")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	var gate sync.RWMutex
	var stop atomic.Bool
	ws := make([]*crashWorker, *workers)
	errs := make([]error, *workers)
	var wg sync.WaitGroup
	for i := range ws {
		w := &crashWorker{dir: filepath.Join(dir, fmt.Sprint("w", i)), r: rand.New(rand.NewPCG(*seed, uint64(i))), files: map[string]*crashFile{}, dirs: map[string]bool{}}
		if err := os.Mkdir(w.dir, 0o755); err != nil {
			return err
		}
		ws[i] = w
		wg.Go(func() {
			for !stop.Load() {
				gate.RLock()
				start := time.Now()
				err := w.step()
				w.slow.Store(max(w.slow.Load(), int64(time.Since(start))))
				gate.RUnlock()
				if err != nil {
					errs[i] = fmt.Errorf("worker %d after %d operations: %w", i, w.ops.Load(), err)
					stop.Store(true)
					return
				}
			}
		})
	}
	check := func() error {
		gate.Lock()
		defer gate.Unlock()
		if err := dropCaches(); err != nil {
			return err
		}
		var errs []error
		var total, slow int64
		for i, w := range ws {
			if err := w.verify(); err != nil {
				errs = append(errs, fmt.Errorf("worker %d: %w", i, err))
			}
			total += w.ops.Load()
			slow = max(slow, w.slow.Swap(0))
		}
		fmt.Printf("verified after %d operations, the longest lately %v\n", total, time.Duration(slow).Round(time.Millisecond))
		return errors.Join(errs...)
	}
	var verr error
	for n := 1; !stop.Load(); {
		if _, err := os.Stat(filepath.Join(*control, "stop")); err == nil {
			stop.Store(true)
			break
		}
		if _, err := os.Stat(filepath.Join(*control, fmt.Sprint("verify.", n))); err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		verr = check()
		text := "ok"
		if verr != nil {
			text = verr.Error()
		}
		if err := os.WriteFile(filepath.Join(*control, fmt.Sprint("verified.", n)), []byte(text), 0o644); err != nil {
			return err
		}
		if verr != nil {
			stop.Store(true)
		}
		n++
	}
	wg.Wait()
	if err := errors.Join(append(errs, verr)...); err != nil {
		return err
	}
	return check()
}
