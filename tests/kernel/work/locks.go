package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/tests/kernel/lockmsg"
)

// agent runs programs for whoever connects, the connection being their standard
// input and output: a POSIX lock belongs to a process, so the suite needs many
// of them that it can drive one step at a time, and kill.
func agent(args []string) error {
	fl := flag.NewFlagSet("agent", flag.ContinueOnError)
	listen := fl.String("listen", fmt.Sprint(":", lockmsg.AgentPort), "address to listen on")
	if err := fl.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	quit := make(chan struct{})
	var once sync.Once
	for {
		c, err := l.Accept()
		if err != nil {
			select {
			case <-quit:
				return nil
			default:
				return err
			}
		}
		wg.Go(func() {
			err := serve(c.(*net.TCPConn))
			if errors.Is(err, errQuit) {
				once.Do(func() { close(quit); l.Close() })
			} else if err != nil {
				fmt.Println("agent:", err)
			}
		})
	}
}

var errQuit = errors.New("quit")

// serve runs the program that one connection asks for, and waits for it.
func serve(c *net.TCPConn) error {
	defer c.Close()
	// The line is read byte by byte: what follows is the program's.
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := c.Read(b); err != nil {
			return fmt.Errorf("command: %w", err)
		}
		if b[0] == '\n' {
			break
		}
		if line = append(line, b[0]); len(line) > 1<<16 {
			return errors.New("command is too long")
		}
	}
	var argv []string
	if err := json.Unmarshal(line, &argv); err != nil || len(argv) == 0 {
		return fmt.Errorf("command %q: %v", line, err)
	}
	switch argv[0] {
	case "quit":
		return errQuit
	case "work":
		argv[0] = "/proc/self/exe"
	}
	f, err := c.File()
	if err != nil {
		return err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, f, f
	// A preemption signal in the middle of F_SETLKW would cancel the request and
	// queue it again at the end.
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=2", "GOGC=off", "GOMEMLIMIT=64MiB")
	err = cmd.Start()
	f.Close()
	if err != nil {
		return err
	}
	c.Close()
	if err := cmd.Wait(); err != nil {
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			return err
		}
	}
	return nil
}

// lockOwner is one process that holds locks.
type lockOwner struct {
	mu    sync.Mutex
	out   *json.Encoder
	files map[int]*os.File
	next  int

	stop     atomic.Bool
	progress atomic.Int64
	hold     atomic.Int64 // OpHold, until it has been used
}

// owner serves requests from standard input until it ends. Each runs on its
// own thread, so that blocked ones do not stop others.
func owner(args []string) error {
	if len(args) == 1 {
		if err := os.Chdir(args[0]); err != nil {
			return err
		}
	}
	o := &lockOwner{out: json.NewEncoder(os.Stdout), files: map[int]*os.File{}}
	o.reply(lockmsg.Reply{Pid: os.Getpid()})
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var q lockmsg.Request
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			return err
		}
		go func() {
			r, err := o.do(q)
			r.ID = q.ID
			if err != nil {
				r.Err = err.Error()
				var no syscall.Errno
				if errors.As(err, &no) {
					r.Errno = int(no)
				}
			}
			o.reply(r)
		}()
	}
	// Without a word: standard output is the connection, which is gone.
	os.Exit(0)
	return nil
}

func (o *lockOwner) reply(r lockmsg.Reply) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.out.Encode(r) != nil {
		os.Exit(1)
	}
}

func (o *lockOwner) fd(n int) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.files[n]
	if f == nil {
		return 0, fmt.Errorf("no file %d", n)
	}
	return int(f.Fd()), nil
}

// monotonic returns the monotonic clock in nanoseconds.
func monotonic() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

var lockTypes = map[string]int16{lockmsg.Read: unix.F_RDLCK, lockmsg.Write: unix.F_WRLCK, lockmsg.Unlock: unix.F_UNLCK}

// setlk is F_SETLK or F_SETLKW.
func setlk(fd int, typ string, start, length int64, wait bool) error {
	cmd := unix.F_SETLK
	if wait {
		cmd = unix.F_SETLKW
	}
	return unix.FcntlFlock(uintptr(fd), cmd, &unix.Flock_t{Type: lockTypes[typ], Start: start, Len: length})
}

// isDenied tells whether another's lock is in the way.
func isDenied(err error) bool { return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) }

func (o *lockOwner) do(q lockmsg.Request) (r lockmsg.Reply, err error) {
	switch q.Op {
	case lockmsg.OpOpen:
		f, err := os.OpenFile(q.Name, os.O_RDWR|os.O_CREATE, 0o666)
		if err != nil {
			return r, err
		}
		o.mu.Lock()
		o.next++
		r.N = int64(o.next)
		o.files[o.next] = f
		o.mu.Unlock()
		return r, nil
	case lockmsg.OpClock:
		r.N = monotonic()
		return r, nil
	case lockmsg.OpStop:
		o.stop.Store(true)
		return r, nil
	case lockmsg.OpHold:
		for o.hold.Store(q.HoldNs); o.hold.Load() != 0; {
			time.Sleep(time.Millisecond)
		}
		return r, nil
	case lockmsg.OpProgress:
		r.N = o.progress.Load()
		return r, nil
	}
	fd, err := o.fd(q.File)
	if err != nil {
		return r, err
	}
	switch q.Op {
	case lockmsg.OpClose:
		o.mu.Lock()
		f := o.files[q.File]
		delete(o.files, q.File)
		o.mu.Unlock()
		return r, f.Close()
	case lockmsg.OpLock:
		return r, setlk(fd, q.Type, q.Start, q.Len, q.Wait)
	case lockmsg.OpTest:
		l := unix.Flock_t{Type: lockTypes[q.Type], Start: q.Start, Len: q.Len}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &l); err != nil {
			return r, err
		}
		for name, typ := range lockTypes {
			if typ == l.Type {
				r.Type = name
			}
		}
		r.Start, r.Len, r.Pid = l.Start, l.Len, int(l.Pid)
		return r, nil
	case lockmsg.OpFlock:
		how := map[string]int{lockmsg.Read: unix.LOCK_SH, lockmsg.Write: unix.LOCK_EX, lockmsg.Unlock: unix.LOCK_UN}[q.Type]
		if !q.Wait {
			how |= unix.LOCK_NB
		}
		return r, unix.Flock(fd, how)
	case lockmsg.OpPingPong:
		for i := range q.N {
			if err := setlk(fd, lockmsg.Write, 0, 1, true); err != nil {
				return r, fmt.Errorf("lock %d: %w", i, err)
			}
			r.Times = append(r.Times, monotonic())
			time.Sleep(time.Duration(q.HoldNs))
			r.Times = append(r.Times, monotonic())
			if err := setlk(fd, lockmsg.Unlock, 0, 1, false); err != nil {
				return r, fmt.Errorf("unlock %d: %w", i, err)
			}
		}
		return r, nil
	case lockmsg.OpProbe:
		for i := 0; !o.stop.Load(); i = (i + 1) % q.N {
			start := q.Start + int64(i)*q.Step
			switch err := setlk(fd, lockmsg.Write, start, q.Len, false); {
			case err == nil:
				r.Times = append(r.Times, int64(i))
				if len(r.Times) > 1000 {
					return r, errors.New("too many successes")
				}
				if err := setlk(fd, lockmsg.Unlock, start, q.Len, false); err != nil {
					return r, fmt.Errorf("unlock of range %d: %w", i, err)
				}
			case !isDenied(err):
				return r, fmt.Errorf("range %d: %w", i, err)
			}
			r.N = o.progress.Add(1)
		}
		return r, nil
	case lockmsg.OpCount:
		for !o.stop.Load() {
			err := increment(fd, q.Wait, r.N%2 == 0, &o.hold)
			if !q.Wait && isDenied(err) {
				time.Sleep(3 * time.Millisecond)
				continue
			}
			if err != nil {
				return r, fmt.Errorf("after %d increments: %w", r.N, err)
			}
			r.N = o.progress.Add(1)
			// Let the others have it, with the queue empty now and then.
			time.Sleep(time.Duration(rand.Int64N(q.HoldNs + 1)))
		}
		return r, nil
	}
	return r, fmt.Errorf("unknown operation %q", q.Op)
}

// increment adds one to the decimal number that the file holds, under a lock on
// the whole file. What was written must be at the server when the lock is given
// back, with or without fsync.
//
// What is in hold is how long to wait between reading and writing, once.
func increment(fd int, wait, sync bool, hold *atomic.Int64) error {
	if err := setlk(fd, lockmsg.Write, 0, 0, wait); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	err := func() error {
		b := make([]byte, 64)
		n, err := unix.Pread(fd, b, 0)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		v := 0
		if n > 0 {
			if v, err = strconv.Atoi(strings.TrimSpace(string(bytes.TrimRight(b[:n], "\x00")))); err != nil {
				return fmt.Errorf("the file holds %q: %w", b[:n], err)
			}
		}
		time.Sleep(time.Duration(hold.Swap(0)))
		if _, err := unix.Pwrite(fd, fmt.Appendf(nil, "%019d\n", v+1), 0); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if sync {
			if err := unix.Fsync(fd); err != nil {
				return fmt.Errorf("fsync: %w", err)
			}
		}
		return nil
	}()
	if uerr := setlk(fd, lockmsg.Unlock, 0, 0, false); uerr != nil {
		err = errors.Join(err, fmt.Errorf("unlock: %w", uerr))
	}
	return err
}
