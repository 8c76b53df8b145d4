package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// mover is one client's work while the address that it has mounted moves. Each
// operation is logged when it is done, so that the host can tell who was held up,
// when, and for how long.
type mover struct {
	control, dir string
	id           int
	seed         uint64
	lenient      bool
	clocked      time.Time

	gate sync.RWMutex // held by who works, so that everybody pauses for a comparison
	stop atomic.Bool

	logMu sync.Mutex
	log   *bufio.Writer

	workers []moveWorker
	counts  map[string]uint64 // of the counters: increments made here
	countMu sync.Mutex
}

// moveWorker is one thread of work.
type moveWorker interface {
	name() string
	// step does one operation or a few, and fails if a result is not what it must be.
	step() error
	// verify compares everything with what the steps must have made.
	verify() error
}

// A resetter can begin anew after a wrong result.
type resetter interface{ reset() error }

// did logs an operation that has just ended.
func (m *mover) did(worker, op string, start time.Time) {
	d := time.Since(start)
	m.logMu.Lock()
	fmt.Fprintf(m.log, "%s %s %d %d\n", worker, op, start.UnixMicro(), d.Microseconds())
	m.logMu.Unlock()
}

func (m *mover) flush() {
	m.logMu.Lock()
	defer m.logMu.Unlock()
	m.log.Flush()
}

// clock writes what time it is here to a file, whose time of modification is the host's: a
// guest's clock loses some hundred microseconds a second.
func (m *mover) clock() {
	if now := time.Now(); now.Sub(m.clocked) > 200*time.Millisecond {
		m.clocked = now
		os.WriteFile(filepath.Join(m.control, "clock"), fmt.Appendf(nil, "%d\n", time.Now().UnixMicro()), 0o644)
	}
}

func (m *mover) ordered(name string) bool {
	_, err := os.Stat(filepath.Join(m.control, name))
	return err == nil
}

// moves runs the workers. The host drives it with files in the control directory:
// "verify.N" has everybody pause, the caches be dropped and everything be compared,
// answered by "verified.N"; "stop" ends the run with a comparison. What the
// run came to is in "result.json", and an error at once in "failed".
func moves(args []string) error {
	fl := flag.NewFlagSet("moves", flag.ContinueOnError)
	control := fl.String("control", "", "control directory")
	id := fl.Int("id", 0, "number of this client, up to 7")
	seed := fl.Uint64("seed", 1, "seed")
	with := fl.String("with", "seq,storm,lock", "workers: seq, storm, lock, idle, light")
	counters := fl.String("counters", "", "counter files of the lock worker, absolute, separated by commas")
	lenient := fl.Bool("lenient", false, "log wrong results as operations named WRONG, begin anew, and go on")
	held := fl.String("held", "", "file whose first byte the idle worker locks for ever, and the lock workers try")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	if *id < 0 || *id >= counterSlots {
		return fmt.Errorf("id %d", *id)
	}
	debug.SetGCPercent(400)
	unix.Umask(0)
	out, err := os.Create(filepath.Join(*control, "ops.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	m := &mover{control: *control, dir: dir, id: *id, seed: *seed, lenient: *lenient, log: bufio.NewWriterSize(out, 1<<16), counts: map[string]uint64{}}
	for i, kind := range strings.Split(*with, ",") {
		r := rand.New(rand.NewPCG(*seed, uint64(*id*100+i)))
		name := fmt.Sprintf("%s%d", kind, i)
		own := filepath.Join(dir, name)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		var w moveWorker
		switch kind {
		case "seq":
			w = &seqWorker{m: m, id: name, dir: own, r: r}
		case "storm":
			w = newStormWorker(m, name, own, r)
		case "lock":
			w, err = newLockWorker(m, name, strings.Split(*counters, ","), *held, r)
		case "idle":
			w, err = newIdleWorker(m, name, own, *held)
		case "light":
			w, err = newLightWorker(m, name, own)
		default:
			err = fmt.Errorf("worker %q", kind)
		}
		if err != nil {
			return err
		}
		m.workers = append(m.workers, w)
	}
	err = m.run()
	m.flush()
	if err != nil {
		m.failed(err)
		return err
	}
	b, err := json.Marshal(struct {
		Counts map[string]uint64 `json:"counts"`
	}{m.counts})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(*control, "result.json"), b, 0o644)
}

// failed tells the host what is wrong: the file is there with all of it, or not yet.
func (m *mover) failed(err error) {
	f, cerr := os.CreateTemp(m.control, "failed-*")
	if cerr != nil {
		return
	}
	fmt.Fprint(f, err)
	if f.Close() == nil {
		os.Rename(f.Name(), filepath.Join(m.control, "failed"))
	}
}

func (m *mover) run() error {
	errs := make([]error, len(m.workers))
	var wg sync.WaitGroup
	for i, w := range m.workers {
		wg.Go(func() {
			for !m.stop.Load() {
				m.gate.RLock()
				start := time.Now()
				err := w.step()
				if x, ok := w.(resetter); ok && err != nil && m.lenient {
					fmt.Printf("%s: WRONG: %v\n", w.name(), err)
					m.did(w.name(), "WRONG", start)
					err = x.reset()
				}
				m.gate.RUnlock()
				if err != nil {
					errs[i] = fmt.Errorf("%s: %w", w.name(), err)
					m.failed(errs[i])
					m.stop.Store(true)
				}
			}
		})
	}
	if err := os.WriteFile(filepath.Join(m.control, "working"), nil, 0o644); err != nil {
		return err
	}
	for n := 1; !m.stop.Load(); {
		m.flush()
		m.clock()
		if m.ordered("stop") {
			m.stop.Store(true)
			break
		}
		if m.ordered("dump") {
			os.Rename(filepath.Join(m.control, "dump"), filepath.Join(m.control, "dumping"))
			m.dump()
		}
		if !m.ordered(fmt.Sprint("verify.", n)) {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		verr := m.verifyOrDump()
		text := "ok"
		if verr != nil {
			text = verr.Error()
			m.stop.Store(true)
		}
		if err := os.WriteFile(filepath.Join(m.control, fmt.Sprint("verified.", n)), []byte(text), 0o644); err != nil {
			return err
		}
		errs = append(errs, verr)
		n++
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return m.verify()
}

// verifyOrDump is verify, during which the host may ask for a dump.
func (m *mover) verifyOrDump() error {
	done := make(chan error, 1)
	go func() { done <- m.verify() }()
	for {
		select {
		case err := <-done:
			return err
		case <-time.After(100 * time.Millisecond):
			m.flush()
			m.clock()
			if m.ordered("dump") {
				os.Rename(filepath.Join(m.control, "dump"), filepath.Join(m.control, "dumping"))
				m.dump()
			}
		}
	}
}

// dump writes what helps to understand a hang to "dump.txt": connections, locks,
// the mounts' calls, and what the kernel's blocked threads do.
func (m *mover) dump() { dump(m.control) }

func dump(control string) {
	var b []byte
	os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0o200)
	for _, name := range []string{"/proc/uptime", "/proc/interrupts", "/proc/net/dev", "/proc/net/arp", "/proc/net/tcp", "/proc/net/udp", "/proc/locks", "/proc/self/mountstats"} {
		text, err := os.ReadFile(name)
		b = fmt.Appendf(b, "== %s %v\n%s\n", name, err, text)
	}
	text, err := exec.Command("dmesg").CombinedOutput()
	b = fmt.Appendf(b, "== dmesg %v\n%s\n", err, text)
	os.WriteFile(filepath.Join(control, "dump.tmp"), b, 0o644)
	os.Rename(filepath.Join(control, "dump.tmp"), filepath.Join(control, "dump.txt"))
}

func (m *mover) verify() error {
	m.gate.Lock()
	defer m.gate.Unlock()
	if err := dropCaches(); err != nil {
		return err
	}
	var errs []error
	for _, w := range m.workers {
		if err := w.verify(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", w.name(), err))
		}
	}
	return errors.Join(errs...)
}

// seqWorker writes files from the beginning to the end, a piece and an fsync at a
// time, and reads each back from the server when it is full.
type seqWorker struct {
	m       *mover
	id, dir string
	r       *rand.Rand
	n       int
	f       *os.File
	seed    uint64
	size    int
}

const seqFull = 2 << 20

func (w *seqWorker) name() string { return w.id }

func (w *seqWorker) path() string { return filepath.Join(w.dir, fmt.Sprint("seq", w.n)) }

func (w *seqWorker) step() error {
	if w.f == nil {
		w.n++
		w.seed, w.size = w.r.Uint64(), 0
		start := time.Now()
		f, err := os.OpenFile(w.path(), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
		if err != nil {
			return err
		}
		w.m.did(w.id, "create", start)
		w.f = f
	}
	n := min(1+w.r.IntN(48<<10), seqFull-w.size)
	b := pattern(seqFull, w.seed)[w.size : w.size+n]
	start := time.Now()
	if _, err := w.f.Write(b); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	w.m.did(w.id, "write+fsync", start)
	w.size += n
	if w.size < seqFull {
		return nil
	}
	if err := w.verify(); err != nil {
		return err
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	w.f = nil
	start = time.Now()
	if err := os.Remove(w.path()); err != nil {
		return err
	}
	w.m.did(w.id, "remove", start)
	return nil
}

func (w *seqWorker) reset() error {
	w.f.Close()
	w.f = nil
	return nil
}

// verify reads the file from the server.
func (w *seqWorker) verify() error {
	if w.f == nil {
		return nil
	}
	if err := unix.Fadvise(int(w.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	start := time.Now()
	b, err := io.ReadAll(io.NewSectionReader(w.f, 0, 1<<40))
	if err != nil {
		return err
	}
	w.m.did(w.id, "read", start)
	if err := equal(b, pattern(seqFull, w.seed)[:w.size]); err != nil {
		return fmt.Errorf("%s: %w", w.path(), err)
	}
	return nil
}

// A counter file has a number for each client and their sum, and is changed only
// under a lock of the whole file.
const counterSlots = 8

// lockWorker increments counters.
type lockWorker struct {
	m      *mover
	id     string
	names  []string
	files  []*os.File
	own    []uint64 // increments made here
	seen   []uint64 // the newest sum
	held   string
	heldF  *os.File
	r      *rand.Rand
	probes int
}

func newLockWorker(m *mover, id string, names []string, held string, r *rand.Rand) (*lockWorker, error) {
	w := &lockWorker{m: m, id: id, held: held, r: r}
	for _, n := range names {
		f, err := os.OpenFile(n, os.O_CREATE|os.O_RDWR, 0o666)
		if err != nil {
			return nil, err
		}
		w.names, w.files, w.own, w.seen = append(w.names, n), append(w.files, f), append(w.own, 0), append(w.seen, 0)
	}
	return w, nil
}

func (w *lockWorker) name() string { return w.id }

// flock does fcntl(2) with a lock of the first length bytes (0: all).
func flock(f *os.File, cmd int, typ int16, length int64) error {
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: typ, Len: length})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (w *lockWorker) step() error {
	i := w.r.IntN(len(w.files))
	start := time.Now()
	if err := flock(w.files[i], unix.F_SETLKW, unix.F_WRLCK, 0); err != nil {
		return fmt.Errorf("lock %s: %w", w.names[i], err)
	}
	w.m.did(w.id, "lock", start)
	start = time.Now()
	err := w.count(i)
	if err != nil {
		return fmt.Errorf("%s: %w", w.names[i], err)
	}
	if err := w.files[i].Sync(); err != nil {
		return err
	}
	w.m.did(w.id, "count", start)
	start = time.Now()
	if err := flock(w.files[i], unix.F_SETLK, unix.F_UNLCK, 0); err != nil {
		return fmt.Errorf("unlock %s: %w", w.names[i], err)
	}
	w.m.did(w.id, "unlock", start)
	w.m.countMu.Lock()
	w.m.counts[w.names[i]]++
	w.m.countMu.Unlock()
	if w.probes++; w.probes%8 == 0 && w.held != "" && w.m.ordered("held") {
		return w.probe()
	}
	return nil
}

func readCounter(f *os.File) (v [counterSlots + 1]uint64, err error) {
	var b [8 * len(v)]byte
	n, err := f.ReadAt(b[:], 0)
	if n == 0 && errors.Is(err, io.EOF) {
		return v, nil
	}
	if err != nil {
		return v, fmt.Errorf("%d bytes: %w", n, err)
	}
	sum := uint64(0)
	for i := range v {
		v[i] = binary.BigEndian.Uint64(b[8*i:])
		if i < counterSlots {
			sum += v[i]
		}
	}
	if sum != v[counterSlots] {
		return v, fmt.Errorf("counter %v: the parts are %d together", v, sum)
	}
	return v, nil
}

func (w *lockWorker) count(i int) error {
	v, err := readCounter(w.files[i])
	if err != nil {
		return err
	}
	if v[w.m.id] != w.own[i] || v[counterSlots] < w.seen[i] {
		return fmt.Errorf("counter %v, but client %d has counted to %d and seen %d", v, w.m.id, w.own[i], w.seen[i])
	}
	v[w.m.id]++
	v[counterSlots]++
	var b [8 * len(v)]byte
	for k := range v {
		binary.BigEndian.PutUint64(b[8*k:], v[k])
	}
	if _, err := w.files[i].WriteAt(b[:], 0); err != nil {
		return err
	}
	w.own[i], w.seen[i] = v[w.m.id], v[counterSlots]
	return nil
}

// probe fails if the lock that the idle client holds is given to this one.
func (w *lockWorker) probe() error {
	if w.heldF == nil {
		f, err := os.OpenFile(w.held, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		w.heldF = f
	}
	start := time.Now()
	err := flock(w.heldF, unix.F_SETLK, unix.F_WRLCK, 1)
	if err == nil {
		return fmt.Errorf("%s: locked, though another client holds it", w.held)
	}
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("try to lock %s: %w", w.held, err)
	}
	w.m.did(w.id, "try", start)
	return nil
}

func (w *lockWorker) verify() error { return nil }

// idleWorker does nothing until the host says so ("wake.N", answered by "woke.N"),
// and holds a lock and an open file all the time.
type idleWorker struct {
	m       *mover
	id, dir string
	n       int
	first   int // n when the open file was empty
	heldF   *os.File
	f       *os.File
}

func newIdleWorker(m *mover, id, dir, held string) (*idleWorker, error) {
	w := &idleWorker{m: m, id: id, dir: dir, n: 1, first: 1}
	var err error
	if w.f, err = os.OpenFile(filepath.Join(dir, "open"), os.O_CREATE|os.O_RDWR, 0o644); err != nil {
		return nil, err
	}
	if held == "" {
		return w, nil
	}
	if w.heldF, err = os.OpenFile(held, os.O_CREATE|os.O_RDWR, 0o666); err != nil {
		return nil, err
	}
	if err := flock(w.heldF, unix.F_SETLK, unix.F_WRLCK, 1); err != nil {
		return nil, fmt.Errorf("lock %s: %w", held, err)
	}
	return w, nil
}

func (w *idleWorker) name() string { return w.id }

func (w *idleWorker) step() error {
	if !w.m.ordered(fmt.Sprint("wake.", w.n)) {
		time.Sleep(10 * time.Millisecond)
		return nil
	}
	start := time.Now()
	text := fmt.Appendf(nil, "%08d", w.n)
	if _, err := w.f.WriteAt(text, int64(8*(w.n-w.first))); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	w.m.did(w.id, "wake", start)
	start = time.Now()
	name := filepath.Join(w.dir, fmt.Sprint("wake", w.n))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	w.m.did(w.id, "create", start)
	if w.n > w.first {
		start = time.Now()
		if err := os.Remove(filepath.Join(w.dir, fmt.Sprint("wake", w.n-1))); err != nil {
			return err
		}
		w.m.did(w.id, "remove", start)
	}
	if w.heldF != nil { // its other bytes can be had, and given back
		start = time.Now()
		for _, typ := range []int16{unix.F_WRLCK, unix.F_UNLCK} {
			if err := unix.FcntlFlock(w.heldF.Fd(), unix.F_SETLKW, &unix.Flock_t{Type: typ, Start: 100, Len: 1}); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		}
		w.m.did(w.id, "lock", start)
	}
	return w.woke()
}

// woke answers the host.
func (w *idleWorker) woke() error {
	w.m.flush()
	err := os.WriteFile(filepath.Join(w.m.control, fmt.Sprint("woke.", w.n)), nil, 0o644)
	w.n++
	return err
}

// reset makes the open file empty. A name that is left is not used again.
func (w *idleWorker) reset() error {
	w.first = w.n + 1
	return errors.Join(w.f.Truncate(0), w.woke())
}

func (w *idleWorker) verify() error {
	b, err := os.ReadFile(filepath.Join(w.dir, "open"))
	if err != nil {
		return err
	}
	var want []byte
	for i := w.first; i < w.n; i++ {
		want = fmt.Appendf(want, "%08d", i)
	}
	return equal(b, want)
}

// lightWorker has one small call every 10 ms, and no load otherwise.
type lightWorker struct {
	m    *mover
	id   string
	f    *os.File
	next time.Time
	n    uint64
}

func newLightWorker(m *mover, id, dir string) (*lightWorker, error) {
	f, err := os.OpenFile(filepath.Join(dir, "light"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o644)
	if err != nil {
		return nil, err
	}
	return &lightWorker{m: m, id: id, f: f, next: time.Now()}, nil
}

func (w *lightWorker) name() string { return w.id }

func (w *lightWorker) step() error {
	time.Sleep(time.Until(w.next))
	w.next = time.Now().Add(10 * time.Millisecond)
	w.n++
	var b, c [8]byte
	binary.BigEndian.PutUint64(b[:], w.n)
	start := time.Now()
	if _, err := w.f.WriteAt(b[:], 0); err != nil {
		return err
	}
	w.m.did(w.id, "write", start)
	start = time.Now()
	if _, err := w.f.ReadAt(c[:], 0); err != nil {
		return err
	}
	w.m.did(w.id, "read", start)
	if b != c {
		return fmt.Errorf("read %x, want %x", c, b)
	}
	return nil
}

func (w *lightWorker) verify() error { return nil }
