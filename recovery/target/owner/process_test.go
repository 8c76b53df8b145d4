package owner

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const childEnv = "BATON_OWNER_CHILD"

func TestMain(m *testing.M) {
	if args := os.Getenv(childEnv); args != "" {
		child(strings.Fields(args))
		return
	}
	os.Exit(m.Run())
}

// child owns a store and says what it believes until its input ends: lines with
// the time before Valid was asked. Arguments: node, directory, options.
func child(args []string) {
	lost := make(chan error, 1)
	o := Options{Node: args[0], Dir: args[1], Interval: 500 * time.Millisecond, OnLost: func(err error) { lost <- err }}
	for _, a := range args[2:] {
		switch a {
		case "wait":
			o.Wait = true
		case "exclusive":
			o.Exclusive = true
		}
	}
	w, err := Open(ctx, o)
	if err != nil {
		fmt.Println("refused", err)
		return
	}
	now := BootClock().Now
	fmt.Println("owned", now(), w.Record().Generation)
	end := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(end) }()
	said := false
	for {
		select {
		case <-end:
			fmt.Println("released", w.Release(ctx))
			return
		case err := <-lost:
			fmt.Println("lost", now(), err)
		default:
		}
		at := now()
		if w.Valid() {
			fmt.Println("valid", at)
		} else if !said {
			said = true
			fmt.Println("invalid", at)
		}
		time.Sleep(time.Millisecond)
	}
}

type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Closer
	lines chan []string
}

func startChild(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(os.Args[0]), lines: make(chan []string, 1<<16)}
	p.cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(args, " "))
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.in = in
	go func() {
		defer close(p.lines)
		s := bufio.NewScanner(out)
		for s.Scan() {
			p.lines <- strings.Fields(s.Text())
		}
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(unix.SIGCONT)
		_ = p.cmd.Process.Kill()
		for range p.lines {
		}
		_ = p.cmd.Wait()
	})
	return p
}

// expect waits for a line of a kind; those of "valid" in between are given to f.
func (p *process) expect(kind string, f func(at int64)) []string {
	p.t.Helper()
	limit := time.After(30 * time.Second)
	for {
		select {
		case l, ok := <-p.lines:
			switch {
			case !ok:
				p.t.Fatalf("the process has ended before it said %q", kind)
			case l[0] == kind:
				return l
			case l[0] == "valid" && f != nil:
				f(p.num(l[1]))
			case l[0] == "lost":
				p.t.Skip("this machine stands still for seconds:", l)
			case l[0] != "valid" && l[0] != "invalid":
				p.t.Fatalf("%v instead of %q", l, kind)
			}
		case <-limit:
			p.t.Fatalf("%q was not said", kind)
		}
	}
}

func (p *process) generation(owned []string) int64 { return p.num(owned[2]) }

func (p *process) num(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// A process that is stopped loses the store to another one, and believes in it at
// no moment after the other does: also when it goes on (MM 7 with an owner that is
// not dead).
func TestStoppedProcess(t *testing.T) {
	dir := t.TempDir()
	a := startChild(t, "a", dir)
	first := a.generation(a.expect("owned", nil))
	b := startChild(t, "b", dir, "wait")
	// It waits as long as a lives.
	for range 300 {
		a.expect("valid", nil)
	}
	a.signal(unix.SIGSTOP)
	owned := b.expect("owned", nil)
	since, second := b.num(owned[1]), b.generation(owned)
	a.signal(unix.SIGCONT)
	late := func(at int64) {
		if at >= since {
			t.Errorf("a believes %v after b owns the store", time.Duration(at-since))
		}
	}
	a.expect("lost", late)
	b.expect("valid", nil)
	if err := a.in.Close(); err != nil {
		t.Error(err)
	}
	if l := a.expect("released", late); l[1] == "<nil>" {
		t.Error("a has released what it has lost")
	}
	if err := b.in.Close(); err != nil {
		t.Error(err)
	}
	if l := b.expect("released", nil); l[1] != "<nil>" {
		t.Error(l)
	}
	c := startChild(t, "c", dir)
	third := c.generation(c.expect("owned", nil))
	if second <= first || third <= second {
		t.Errorf("generations %d, %d, %d", first, second, third)
	}
}

// A killed process's store is taken over at once by the next on the same machine
// that holds its lock, a store in use is not.
func TestKilledProcess(t *testing.T) {
	dir := t.TempDir()
	a := startChild(t, "a", dir)
	a.expect("owned", nil)
	b := startChild(t, "b", dir)
	if l := b.expect("refused", nil); !strings.Contains(strings.Join(l, " "), `node "a"`) {
		t.Error(l)
	}
	a.signal(unix.SIGKILL)
	_ = a.cmd.Wait()
	c := startChild(t, "a", dir, "exclusive")
	c.expect("owned", nil)
}

// Records are written to the file and read back, in a directory that loses them.
func TestFileStorage(t *testing.T) {
	dir := t.TempDir()
	for _, buffered := range []bool{false, true} {
		st, err := NewFileStorage(dir)
		if err != nil {
			t.Fatal(err)
		}
		f := st.(*fileStorage)
		f.buffers.Store(buffered)
		buf := pageBuffer(FileSize)
		if n, err := st.Read(buf); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		block := pageBuffer(BlockSize)
		r := Record{Node: "a", Generation: 1, Seq: 2, Interval: time.Second, State: Owned}
		r.encode(block)
		if err := st.Write(block, BlockSize); err != nil {
			t.Fatal(err)
		}
		var s Snapshot
		n, err := st.Read(buf)
		s.decode(buf[:n])
		if err != nil || n != 2*BlockSize || !s.Slots[0].Empty || !s.Slots[1].OK || s.Slots[1].Record != r || !s.Mark.Empty {
			t.Fatalf("%d %v %+v", n, err, s)
		}
		if got, err := Inspect(dir); err != nil || got == nil || *got != r {
			t.Error(got, err)
		}
		if st2, err := os.Stat(dir + "/" + FileName); err != nil || st2.Mode().Perm() != 0o600 {
			t.Error(st2, err)
		}
		if f.buffers.Load() != buffered {
			t.Log("no direct I/O here")
		}
		if err := os.Remove(dir + "/" + FileName); err != nil {
			t.Fatal(err)
		}
		if n, err := st.Read(buf); n != 0 || err != nil {
			t.Error(n, err)
		}
		if got, err := Inspect(dir); got != nil || err != nil {
			t.Error(got, err)
		}
		if err := os.Symlink("/etc/passwd", dir+"/"+FileName); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Read(buf); !errors.Is(err, unix.ELOOP) {
			t.Error(err)
		}
		if err := st.Write(block, 0); !errors.Is(err, unix.ELOOP) {
			t.Error(err)
		}
		if err := os.Remove(dir + "/" + FileName); err != nil {
			t.Fatal(err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	}
}
