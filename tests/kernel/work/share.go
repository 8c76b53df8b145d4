package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/tests/kernel/sharelog"
)

// shareFiles are those that all share, named after how they are locked, besides the
// cells of one file.
var shareFiles = []string{"whole", "range", "flock", "try"}

const (
	// shareMax is where a shared file is cut, some stripes of a server that
	// makes them as small as it can.
	shareMax = 400 << 10
	// shareOwn is how many files each guest has alone.
	shareOwn = 5
)

// sharer is one process that works on files which other processes, here and in
// the other guest, change as well.
type sharer struct {
	id      int // of all guests' processes
	dir     string
	control string
	hold    time.Duration
	strict  bool
	r       *rand.Rand
	journal *os.File
	status  *os.File

	files map[string]*shared
	done  int
	slow  time.Duration
	what  string // of the slowest
}

// shared is what a process knows of a file, or of a cell of one.
type shared struct {
	name, path string
	// base and length are a cell's place; length is 0 for a whole file.
	base   int64
	length int
	f, app *os.File // open for writing, and for appending
	// count is how often this process changed it: nobody else does in its name.
	count, version uint64
	mtime          time.Time
}

// share runs the processes of one guest, waits until the other guest's have ended
// too, and tells what all files are at the end. The host drives it with files in
// the control directory: "stop" ends the work, "quiet" answers that it has ended,
// "compare" asks for "final", a JSON object of sizes and contents, "dump" for "dump.txt".
func share(args []string) error {
	fl := flag.NewFlagSet("share", flag.ContinueOnError)
	control := fl.String("control", "", "control directory")
	seed := fl.Uint64("seed", 1, "seed")
	id := fl.Int("id", 0, "number of the guest, 0 or 1")
	peer := fl.String("peer", "", "address of the other guest")
	strict := fl.Bool("strict", false, "what stat(2) says must be true without opening the file")
	hold := fl.Duration("hold", 9*time.Second, "longest time to keep a lock")
	worker := fl.String("worker", "", "internal: be one process")
	dir, err := parse(fl, args)
	if err != nil {
		return err
	}
	kinds := []string{"files", "files", "cells", "author"}
	if *worker == "" {
		own := append([]string{"share"}, args[:len(args)-1]...)
		var wg sync.WaitGroup
		errs := make([]error, len(kinds)+1)
		for i := range errs {
			name := "reader"
			if i < len(kinds) {
				name = fmt.Sprint(i)
			}
			cmd := exec.Command("/proc/self/exe", append(slices.Clone(own), "-worker", name, dir)...)
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			// A preemption signal would cancel a lock that is waited for.
			cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=2")
			wg.Go(func() {
				if errs[i] = cmd.Run(); errs[i] != nil {
					os.WriteFile(filepath.Join(*control, "failed"), []byte(name), 0o644)
				}
			})
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			wg.Wait()
		}()
		for over := false; !over; {
			select {
			case <-ended:
				over = true
			case <-time.After(200 * time.Millisecond):
				if os.Remove(filepath.Join(*control, "dump")) == nil {
					dump(*control)
				}
			}
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
		return shareFinal(*control, dir)
	}
	s := &sharer{dir: dir, control: *control, hold: *hold, strict: *strict, files: map[string]*shared{}}
	if *worker == "reader" {
		return s.reader(*peer)
	}
	i := 0
	if _, err := fmt.Sscan(*worker, &i); err != nil || i >= len(kinds) {
		return fmt.Errorf("worker %q", *worker)
	}
	s.id = *id*len(kinds) + i
	s.r = rand.New(rand.NewPCG(*seed, uint64(s.id)))
	for name, f := range map[string]**os.File{"journal": &s.journal, "progress": &s.status} {
		if *f, err = os.Create(filepath.Join(*control, fmt.Sprintf("%s.%d", name, i))); err != nil {
			return err
		}
	}
	switch kinds[i] {
	case "files":
		err = s.run(func() error {
			name := shareFiles[s.r.IntN(len(shareFiles))]
			return s.turn(s.file(name, filepath.Join(s.dir, name)))
		})
	case "cells":
		err = s.run(func() error {
			k := s.r.IntN(sharelog.Cells)
			c := s.file(fmt.Sprint("cell", k), filepath.Join(s.dir, "cells"))
			c.base, c.length = int64(sharelog.CellAt(k)), sharelog.CellLen
			return s.turn(c)
		})
	case "author":
		err = s.author(*id)
	}
	fmt.Printf("process %d: %d operations, the longest %v: %s\n", s.id, s.done, s.slow.Round(time.Millisecond), s.what)
	return err
}

func (s *sharer) file(name, path string) *shared {
	if s.files[name] == nil {
		s.files[name] = &shared{name: name, path: path}
	}
	return s.files[name]
}

// run makes operations until the host says stop.
func (s *sharer) run(step func() error) error {
	for {
		if _, err := os.Stat(filepath.Join(s.control, "stop")); err == nil {
			return nil
		}
		if err := step(); err != nil {
			return fmt.Errorf("process %d after %d operations: %w", s.id, s.done, err)
		}
		s.done++
		s.tell("pausing")
		time.Sleep(time.Duration(s.r.IntN(30)) * time.Millisecond)
	}
}

// tell writes down what is done now, for who looks why nothing moves.
func (s *sharer) tell(format string, args ...any) {
	s.status.WriteAt(fmt.Appendf(nil, "%10d %-100s\n", s.done, fmt.Sprintf(format, args...)), 0)
}

func (s *sharer) took(start time.Time, format string, args ...any) {
	if d := time.Since(start); d > s.slow {
		s.slow, s.what = d, fmt.Sprintf(format, args...)+start.UTC().Format(", from 15:04:05")
	}
}

// note writes an operation down before it is begun.
func (s *sharer) note(o sharelog.Op) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	_, err = s.journal.Write(append(b, '\n'))
	return err
}

// open opens the file, or keeps it open. Nothing of it may be locked: a process
// loses its locks with every descriptor that it closes.
func (s *sharer) open(f *shared) (err error) {
	if f.f != nil && s.r.IntN(3) > 0 {
		return nil
	}
	if err := f.close(); err != nil {
		return err
	}
	if f.f, err = os.OpenFile(f.path, os.O_RDWR|os.O_CREATE, 0o644); err == nil {
		f.app, err = os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND, 0)
	}
	return err
}

func (f *shared) close() error {
	if f.f == nil {
		return nil
	}
	err := errors.Join(f.f.Close(), f.app.Close())
	f.f, f.app = nil, nil
	return err
}

// lock takes the file's lock, and returns the function that gives it back.
func (s *sharer) lock(f *shared) (unlock func() error, err error) {
	fd := int(f.f.Fd())
	start, length := int64(0), int64(0)
	switch {
	case f.length > 0:
		start, length = f.base, int64(f.length)
	case f.name == "range":
		length = sharelog.HeadLen
	case f.name == "flock":
		return func() error { return unix.Flock(fd, unix.LOCK_UN) }, unix.Flock(fd, unix.LOCK_EX)
	}
	wait := f.name != "try"
	for {
		err = setlk(fd, "W", start, length, wait)
		if wait || !isDenied(err) {
			break
		}
		// Not from s.r, whose choices do not depend on how often somebody was in the way.
		time.Sleep(time.Duration(1+rand.IntN(20)) * time.Millisecond)
	}
	return func() error { return setlk(fd, "U", start, length, false) }, err
}

// turn takes the lock, compares the file with what its head tells and with what
// this process has done to it, changes it, compares again, and gives the lock back.
func (s *sharer) turn(f *shared) (err error) {
	start := time.Now()
	if err := s.open(f); err != nil {
		return err
	}
	s.tell("locking %s", f.name)
	unlock, err := s.lock(f)
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.name, err)
	}
	s.took(start, "open and lock %s", f.name)
	held := time.Now()
	defer func() {
		s.took(held, "read and change %s", f.name)
		start := time.Now()
		s.tell("unlocking %s", f.name)
		if uerr := unlock(); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unlock %s: %w", f.name, uerr))
		}
		s.took(start, "unlock %s", f.name)
	}()
	s.tell("reading %s", f.name)
	b, h, err := f.look()
	if err != nil {
		return err
	}
	if h.Counts[s.id] != f.count || h.Version < f.version {
		return fmt.Errorf("%s: head %+v, but process %d has changed it %d times and seen version %d", f.name, h, s.id, f.count, f.version)
	}
	o := s.op(f, b, h)
	if err := s.note(o); err != nil {
		return err
	}
	s.tell("changing %s to version %d", f.name, o.Version)
	want, err := o.Apply(bytes.Clone(b), &h)
	if err == nil {
		err = s.change(f, o, want)
	}
	if err != nil {
		return fmt.Errorf("%s: %+v: %w", f.name, o, err)
	}
	f.count, f.version = h.Counts[s.id], h.Version
	if s.r.IntN(3) > 0 {
		return nil
	}
	// From the server, not from memory.
	s.tell("comparing %s", f.name)
	if err := f.f.Sync(); err != nil {
		return err
	}
	if err := unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	if b, _, err = f.look(); err == nil {
		err = equal(b, want)
	}
	if err != nil {
		return fmt.Errorf("%s after %+v: %w\n%s", f.name, o, err, sharelog.Describe(b))
	}
	return nil
}

// op chooses the next change of contents b with head h.
func (s *sharer) op(f *shared, b []byte, h sharelog.Head) sharelog.Op {
	size := int64(len(b))
	o := sharelog.Op{File: f.name, Version: h.Version + 1, Writer: s.id, Kind: sharelog.Write, Len: 1 + s.r.Int64N(30000)}
	switch k := s.r.IntN(10); {
	case f.length > 0:
		o.Off = sharelog.HeadLen + s.r.Int64N(size-sharelog.HeadLen)
		o.Len = 1 + s.r.Int64N(size-o.Off)
	case size == 0:
		o.Off = sharelog.HeadLen
	case size > shareMax:
		o.Kind, o.Off, o.Len = sharelog.Truncate, sharelog.HeadLen+s.r.Int64N(size/2), 0
	case k < 4:
		o.Kind, o.Off = sharelog.Append, size
	case k < 6:
		o.Off = sharelog.HeadLen + s.r.Int64N(size-sharelog.HeadLen+1)
	case k < 7: // with a hole before it
		o.Off = size + s.r.Int64N(80000)
	default:
		o.Kind, o.Off, o.Len = sharelog.Truncate, sharelog.HeadLen+s.r.Int64N(size+20000), 0
	}
	return o
}

// change does the operation, after which the file must hold want.
func (s *sharer) change(f *shared, o sharelog.Op, want []byte) (err error) {
	switch o.Kind {
	case sharelog.Write:
		_, err = f.f.WriteAt(o.Data(), f.base+o.Off)
	case sharelog.Append:
		_, err = f.app.Write(o.Data())
	case sharelog.Truncate:
		if s.r.IntN(2) == 0 {
			err = f.f.Truncate(o.Off)
		} else {
			err = os.Truncate(f.path, o.Off)
		}
	}
	if err != nil {
		return err
	}
	if s.hold > 0 && s.r.IntN(60) == 0 {
		// The server dies while what is half done is partly there, and the lock is held.
		if s.r.IntN(2) == 0 {
			if err := f.f.Sync(); err != nil {
				return err
			}
		}
		d := time.Duration(s.r.Int64N(int64(s.hold)))
		s.tell("holding %s for %v", f.name, d)
		time.Sleep(d)
	}
	if _, err := f.f.WriteAt(want[:sharelog.HeadLen], f.base); err != nil {
		return err
	}
	if f.length == 0 {
		return f.sizes(int64(len(want)))
	}
	return nil
}

// sizes fails unless the file is as long as it should be, asked by name and by descriptor.
func (f *shared) sizes(want int64) error {
	for name, stat := range map[string]func() (os.FileInfo, error){"fstat": f.f.Stat, "stat": func() (os.FileInfo, error) { return os.Stat(f.path) }} {
		st, err := stat()
		if err != nil {
			return err
		}
		if st.Size() != want {
			return fmt.Errorf("%s says %d bytes, want %d", name, st.Size(), want)
		}
		if st.ModTime().Before(f.mtime) {
			return fmt.Errorf("%s says that it was modified at %v, which was %v before", name, st.ModTime(), f.mtime)
		}
		f.mtime = st.ModTime()
	}
	return nil
}

// look reads the file or the cell, whose size and contents must be what the head says.
func (f *shared) look() ([]byte, sharelog.Head, error) {
	var b []byte
	var err error
	if f.length > 0 {
		b = make([]byte, f.length)
		_, err = f.f.ReadAt(b, f.base)
	} else {
		b, err = io.ReadAll(io.NewSectionReader(f.f, 0, 1<<40))
	}
	if err != nil && !(f.length > 0 && errors.Is(err, io.EOF)) {
		return nil, sharelog.Head{}, err
	}
	h, err := sharelog.Check(b)
	if err == nil && f.length == 0 {
		err = f.sizes(int64(len(b)))
	}
	if err != nil {
		return nil, h, fmt.Errorf("%s: %w", f.name, err)
	}
	return b, h, nil
}

// published is what an author tells of a file that he has closed.
type published struct {
	Path    string
	Version uint64
	Size    int64
}

const sharePort = 7020

// author changes files that nobody else changes, without locks, and closes them.
// Then he tells the other guest, and waits until it has looked.
func (s *sharer) author(id int) error {
	l, err := net.Listen("tcp", fmt.Sprint(":", sharePort))
	if err != nil {
		return err
	}
	defer l.Close()
	s.tell("waiting for the reader")
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	in := bufio.NewReader(c)
	dir := filepath.Join(s.dir, fmt.Sprint("own", id))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	contents := map[string][]byte{}
	return s.run(func() error {
		start := time.Now()
		name := fmt.Sprintf("own%d/f%d", id, s.r.IntN(shareOwn))
		f := s.file(name, filepath.Join(s.dir, name))
		s.tell("opening %s", name)
		if err := errors.Join(f.close(), s.open(f)); err != nil {
			return err
		}
		b, h, err := f.look()
		if err == nil {
			err = equal(b, contents[name])
		}
		if err != nil {
			return fmt.Errorf("own file %s: %w\n%s", name, err, sharelog.Describe(b))
		}
		for range 1 + s.r.IntN(4) {
			o := s.op(f, b, h)
			if err := s.note(o); err != nil {
				return err
			}
			s.tell("changing %s to version %d", name, o.Version)
			if b, err = o.Apply(b, &h); err == nil {
				err = s.change(f, o, b)
			}
			if err != nil {
				return fmt.Errorf("own file %s: %+v: %w", name, o, err)
			}
		}
		contents[name] = b
		if err := f.close(); err != nil {
			return err
		}
		s.took(start, "change own file %s", name)
		s.tell("telling of %s", name)
		if err := json.NewEncoder(c).Encode(published{name, h.Version, h.Size}); err != nil {
			return err
		}
		if _, err := in.ReadString('\n'); err != nil {
			return fmt.Errorf("the other guest's reader: %w", err)
		}
		return nil
	})
}

// reader looks at what the other guest's author has closed.
func (s *sharer) reader(peer string) error {
	var c net.Conn
	for {
		var err error
		if c, err = net.Dial("tcp", net.JoinHostPort(peer, fmt.Sprint(sharePort))); err == nil {
			break
		}
		if _, err := os.Stat(filepath.Join(s.control, "stop")); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	defer c.Close()
	in := bufio.NewScanner(c)
	n := 0
	for ; in.Scan(); n++ {
		var p published
		if err := json.Unmarshal(in.Bytes(), &p); err != nil {
			return err
		}
		if err := s.readPublished(p); err != nil {
			return fmt.Errorf("the other guest's file, told of as %+v: %w", p, err)
		}
		if _, err := fmt.Fprintln(c, "seen"); err != nil {
			return err
		}
	}
	fmt.Printf("reader: %d files\n", n)
	if err := in.Err(); err != nil {
		return fmt.Errorf("the other guest's author: %w", err)
	}
	return nil
}

func (s *sharer) readPublished(p published) error {
	f := &shared{name: p.Path, path: filepath.Join(s.dir, p.Path)}
	if s.strict {
		// Nothing is cached, so that this, too, is what the server says.
		if st, err := os.Stat(f.path); err != nil || st.Size() != p.Size {
			return fmt.Errorf("stat before open: %v, %w", st, err)
		}
	}
	var err error
	if f.f, err = os.Open(f.path); err != nil {
		return err
	}
	defer f.f.Close()
	st, err := f.f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != p.Size {
		return fmt.Errorf("fstat says %d bytes", st.Size())
	}
	_, h, err := f.look()
	if err != nil {
		return err
	}
	if h.Version != p.Version || h.Size != p.Size {
		return fmt.Errorf("it holds %+v", h)
	}
	return nil
}

// shareFile is what a file is at the end.
type shareFile struct {
	Size int64
	Data []byte
}

// shareFinal tells the host that the work has ended, and then what all files are.
func shareFinal(control, dir string) error {
	if err := os.WriteFile(filepath.Join(control, "quiet"), nil, 0o644); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(filepath.Join(control, "compare")); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := dropCaches(); err != nil {
		return err
	}
	all := map[string]shareFile{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		all[strings.TrimPrefix(path, dir+"/")] = shareFile{st.Size(), b}
		return nil
	})
	if err != nil {
		return err
	}
	out, err := json.Marshal(all)
	if err != nil {
		return err
	}
	tmp := filepath.Join(control, "final.tmp")
	if err := os.WriteFile(tmp, out, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(control, "final"))
}
