package kernel

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/kernel/lockmsg"
	"github.com/baton-nfs/baton/tests/uml"
)

// Lock types, as short as scenarios want them.
const (
	rd = lockmsg.Read
	wr = lockmsg.Write
	un = lockmsg.Unlock
)

// maxOffset is the last byte that a lock can cover.
const maxOffset = math.MaxInt64

// patience is how long anything may take that should happen at once. It only
// keeps a broken server from hanging the suite.
const patience = 100 * time.Second

// lockGuest is a guest with a host name of its own, on which the suite runs lock
// owners, one step at a time.
type lockGuest struct {
	w     *world
	i     int
	name  string
	state string // the guest's /var/lib/nfs
	m     *uml.Guest

	owners []*owner // all that were ever started
}

// lockClient boots guest number i with the export mounted. state is what an
// earlier life of the guest had as /var/lib/nfs, or an empty directory.
func (w *world) lockClient(t *testing.T, i int, options, state string) *lockGuest {
	t.Helper()
	g := &lockGuest{w: w, i: i, name: fmt.Sprintf("client%c", 'a'+i), state: state}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g.m = w.start(ctx, t, i, guest{options: options, dir: "locks", script: "$WORK agent", mem: 512, host: g.name, state: state})
	t.Cleanup(g.m.Kill)
	for {
		c, err := g.dial()
		if err == nil {
			// A program that ends at once; the agent must be there.
			fmt.Fprintln(c, `["true"]`)
			io.ReadAll(c)
			c.Close()
			return g
		}
		select {
		case <-g.m.Done():
			finish(ctx, t, g.m)
			t.Fatalf("guest %s ended early", g.name)
		case <-ctx.Done():
			g.m.Kill()
			finish(ctx, t, g.m)
			t.Fatalf("guest %s: no agent: %v", g.name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (g *lockGuest) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return g.w.node.DialContext(ctx, "tcp", fmt.Sprintf("10.77.0.%d:%d", 11+g.i, lockmsg.AgentPort))
}

// quit ends the agent and expects the guest to unmount cleanly, without a lock
// that its kernel could not reclaim.
func (g *lockGuest) quit(t *testing.T) {
	t.Helper()
	for _, o := range g.owners {
		o.end()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if c, err := g.dial(); err != nil {
		t.Errorf("guest %s: %v", g.name, err)
		g.m.Kill()
	} else {
		fmt.Fprintln(c, `["quit"]`)
		defer c.Close()
	}
	checkLocks(t, g.name, finish(ctx, t, g.m))
}

// checkLocks fails the test if a guest's kernel says that it has lost locks.
func checkLocks(t *testing.T, name string, r uml.Result) {
	t.Helper()
	for line := range strings.Lines(r.Dmesg) {
		for _, bad := range []string{"failed to reclaim", "cannot monitor", "rejected NSM", "lost lock"} {
			if strings.Contains(line, bad) {
				t.Errorf("guest %s: kernel: %s", name, strings.TrimSpace(line))
			}
		}
	}
	var said []string
	for line := range strings.Lines(r.Dmesg) {
		if strings.Contains(line, "lockd") || strings.Contains(line, "statd") || strings.Contains(line, "nfs: server") {
			said = append(said, strings.TrimSpace(line))
		}
	}
	if len(said) > 0 {
		t.Logf("guest %s's kernel:\n%s", name, strings.Join(said[max(0, len(said)-15):], "\n"))
	}
}

// sh runs a shell command in the guest, in the shared directory, and fails the
// test unless it succeeds.
func (g *lockGuest) sh(t *testing.T, script string) string {
	t.Helper()
	c, err := g.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	argv, _ := json.Marshal([]string{"sh", "-c", "(" + script + "\n); echo status $?"})
	fmt.Fprintf(c, "%s\n", argv)
	b, err := io.ReadAll(c)
	out, ok := strings.CutSuffix(string(b), "status 0\n")
	if err != nil || !ok {
		t.Fatalf("guest %s: %s: %v\n%s", g.name, script, err, b)
	}
	return out
}

// owner is a process in a guest: the owner of its locks.
type owner struct {
	t    *testing.T
	g    *lockGuest
	c    net.Conn
	pid  int
	dead chan struct{} // closed when the process has ended

	mu   sync.Mutex
	next int
	wait map[int]chan lockmsg.Reply
}

// owner starts a process; its files are below dir ("" is the shared directory).
// It ends with the test.
func (g *lockGuest) owner(t *testing.T, dir string) *owner {
	t.Helper()
	c, err := g.dial()
	if err != nil {
		t.Fatal(err)
	}
	o := &owner{t: t, g: g, c: c, dead: make(chan struct{}), wait: map[int]chan lockmsg.Reply{}}
	argv := []string{"work", "owner"}
	if dir != "" {
		argv = append(argv, dir)
	}
	line, _ := json.Marshal(argv)
	fmt.Fprintf(c, "%s\n", line)
	hello := make(chan lockmsg.Reply, 1)
	o.wait[0] = hello
	go func() {
		defer close(o.dead)
		in := bufio.NewScanner(c)
		in.Buffer(nil, 16<<20)
		for in.Scan() {
			var r lockmsg.Reply
			if json.Unmarshal(in.Bytes(), &r) != nil {
				r = lockmsg.Reply{Err: in.Text(), Errno: -1}
			}
			o.mu.Lock()
			ch := o.wait[r.ID]
			delete(o.wait, r.ID)
			o.mu.Unlock()
			if ch != nil {
				ch <- r
			}
		}
	}()
	g.owners = append(g.owners, o)
	t.Cleanup(o.end)
	select {
	case r := <-hello:
		if r.Err != "" {
			t.Fatalf("guest %s: %s", g.name, r.Err)
		}
		o.pid = r.Pid
	case <-time.After(patience):
		t.Fatalf("guest %s: a new process does not answer", g.name)
	}
	return o
}

// end lets the process end, which gives back its locks; it does not wait for that.
func (o *owner) end() {
	o.c.Close()
	<-o.dead
}

// kill sends a signal to the process and waits for its end.
func (o *owner) kill(sig string) {
	o.t.Helper()
	o.g.sh(o.t, fmt.Sprintf("kill -%s %d", sig, o.pid))
	select {
	case <-o.dead:
	case <-time.After(patience):
		o.t.Fatalf("process %d of %s outlives signal %s", o.pid, o.g.name, sig)
	}
}

// call is a request on its way.
type call struct {
	o *owner
	q lockmsg.Request
	r chan lockmsg.Reply
}

// start sends a request.
func (o *owner) start(q lockmsg.Request) *call {
	o.t.Helper()
	c := &call{o: o, r: make(chan lockmsg.Reply, 1)}
	o.mu.Lock()
	o.next++
	q.ID = o.next
	o.wait[q.ID] = c.r
	o.mu.Unlock()
	c.q = q
	b, _ := json.Marshal(q)
	if _, err := o.c.Write(append(b, '\n')); err != nil {
		o.t.Fatalf("process %d of %s: %v", o.pid, o.g.name, err)
	}
	return c
}

func (c *call) String() string {
	return fmt.Sprintf("%s %s %d+%d by process %d of %s", c.q.Op, c.q.Type, c.q.Start, c.q.Len, c.o.pid, c.o.g.name)
}

// reply waits for the outcome.
func (c *call) reply() lockmsg.Reply {
	c.o.t.Helper()
	select {
	case r := <-c.r:
		c.r <- r
		return r
	case <-c.o.dead:
		c.o.t.Fatalf("%v: the process ended", c)
	case <-time.After(patience):
		c.o.t.Fatalf("%v: no outcome in %v\n%s", c, patience, c.o.g.w.showLocks())
	}
	panic("not reached")
}

// ok waits for success.
func (c *call) ok() lockmsg.Reply {
	c.o.t.Helper()
	r := c.reply()
	if r.Err != "" {
		c.o.t.Fatalf("%v: %s", c, r.Err)
	}
	return r
}

// ended tells whether the outcome is there already.
func (c *call) ended() bool { return len(c.r) > 0 }

// lockFile is a file that a process has open.
type lockFile struct {
	o *owner
	n int
}

func (o *owner) open(name string) *lockFile {
	o.t.Helper()
	return &lockFile{o, int(o.start(lockmsg.Request{Op: lockmsg.OpOpen, Name: name}).ok().N)}
}

// do starts an operation on the file.
func (f *lockFile) do(q lockmsg.Request) *call {
	f.o.t.Helper()
	q.File = f.n
	return f.o.start(q)
}

func (f *lockFile) lock(typ string, start, length int64, wait bool) *call {
	f.o.t.Helper()
	return f.do(lockmsg.Request{Op: lockmsg.OpLock, Type: typ, Start: start, Len: length, Wait: wait})
}

// get takes a lock that must be free, or gives one back.
func (f *lockFile) get(typ string, start, length int64) {
	f.o.t.Helper()
	f.lock(typ, start, length, false).ok()
}

// denied fails the test unless a lock is refused because of another.
func (f *lockFile) denied(typ string, start, length int64) {
	f.o.t.Helper()
	f.lock(typ, start, length, false).denied()
}

func (c *call) denied() {
	c.o.t.Helper()
	if r := c.reply(); !isDenied(r) {
		c.o.t.Fatalf("%v: errno %d %q, want EAGAIN", c, r.Errno, r.Err)
	}
}

func isDenied(r lockmsg.Reply) bool {
	return r.Errno == int(syscall.EAGAIN) || r.Errno == int(syscall.EACCES)
}

// queued starts a blocking request and gives it the time to reach the queue: at the
// server, which tells, or in the client, when another process there has the lock.
func (f *lockFile) queued(typ string, start, length int64) *call {
	f.o.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	waiting := func() (n int, err error) {
		es, err := f.o.g.w.lockTable(ctx)
		for _, e := range es {
			if e.State == "waiting" {
				n++
			}
		}
		return n, err
	}
	before, err := waiting()
	c := f.lock(typ, start, length, true)
	time.Sleep(150 * time.Millisecond)
	for end := time.Now().Add(time.Second); err == nil && !c.ended() && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		var n int
		if n, err = waiting(); n > before {
			break
		}
	}
	if c.ended() {
		f.o.t.Fatalf("%v: did not wait: %+v", c, c.reply())
	}
	return c
}

func (f *lockFile) test(typ string, start, length int64) lockmsg.Reply {
	f.o.t.Helper()
	return f.do(lockmsg.Request{Op: lockmsg.OpTest, Type: typ, Start: start, Len: length}).ok()
}

func (f *lockFile) flock(typ string, wait bool) *call {
	f.o.t.Helper()
	return f.do(lockmsg.Request{Op: lockmsg.OpFlock, Type: typ, Wait: wait})
}

func (f *lockFile) close() {
	f.o.t.Helper()
	f.do(lockmsg.Request{Op: lockmsg.OpClose}).ok()
}

// lengthOf gives l_len for start..end, both included.
func lengthOf(start, end int64) int64 {
	if end == maxOffset {
		return 0
	}
	return end - start + 1
}

// heldRange is one range of a lock map.
type heldRange struct {
	typ        string
	start, end int64
}

func (h heldRange) String() string {
	if h.end == maxOffset {
		return fmt.Sprintf("%s %d-EOF", h.typ, h.start)
	}
	return fmt.Sprintf("%s %d-%d", h.typ, h.start, h.end)
}

// lockMap asks with F_GETLK what others than f's process have locked. Adjacent
// ranges of one type come out as one: whose they are cannot be seen.
func (f *lockFile) lockMap() string {
	f.o.t.Helper()
	var held []heldRange
	asked := 0
	todo := []heldRange{{"", 0, maxOffset}}
	for len(todo) > 0 {
		q := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if asked++; asked > 5000 {
			f.o.t.Fatal("the holders' ranges have no end")
		}
		r := f.test(wr, q.start, lengthOf(q.start, q.end))
		if r.Type == un {
			continue
		}
		end := int64(maxOffset)
		if r.Len != 0 {
			end = r.Start + r.Len - 1
		}
		h := heldRange{r.Type, max(r.Start, q.start), min(end, q.end)}
		if h.start > h.end {
			f.o.t.Fatalf("asked for %v, told of %+v", q, r)
		}
		held = append(held, h)
		if h.start > q.start {
			todo = append(todo, heldRange{"", q.start, h.start - 1})
		}
		if h.end < q.end {
			todo = append(todo, heldRange{"", h.end + 1, q.end})
		}
	}
	return mapString(held)
}

// mapString sorts and merges ranges.
func mapString(held []heldRange) string {
	slices.SortFunc(held, func(a, b heldRange) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	var out []string
	for i := 0; i < len(held); i++ {
		h := held[i]
		for i+1 < len(held) && held[i+1].typ == h.typ && held[i+1].start == h.end+1 {
			i++
			h.end = held[i].end
		}
		out = append(out, h.String())
	}
	return strings.Join(out, ", ")
}

// wantMap fails the test unless the map is as written.
func (f *lockFile) wantMap(want string) {
	f.o.t.Helper()
	if got := f.lockMap(); got != want {
		f.o.t.Fatalf("locked: %q, want %q", got, want)
	}
}

// clockOffset returns what has to be added to the guest's monotonic clock to get
// the time since base here, and how wrong that may be.
func (o *owner) clockOffset(base time.Time) (offset, slack time.Duration) {
	o.t.Helper()
	slack = time.Hour
	for range 40 {
		a := time.Since(base)
		r := o.start(lockmsg.Request{Op: lockmsg.OpClock}).ok()
		b := time.Since(base)
		if (b-a)/2 < slack {
			slack = (b - a) / 2
			offset = a + slack - time.Duration(r.N)
		}
	}
	return offset, slack
}

// nsmState reads the state number that a guest's status monitor keeps.
func nsmState(t *testing.T, dir string) uint32 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "state"))
	if err != nil || len(b) < 4 {
		t.Fatalf("state number: %x, %v", b, err)
	}
	return binary.NativeEndian.Uint32(b)
}

// tableEntry is one entry of the server's lock table, as `baton locks --json`
// prints it.
type tableEntry struct {
	State string `json:"state"`
}

var errNoTable = errors.New("the server cannot show its lock table")

// showLocks returns the server's lock table for error messages.
func (w *world) showLocks() string {
	b, ok := w.srv.(*bed.Baton)
	if !ok {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, _ := w.node.Run(ctx, b.Bin(), "locks", "--config", b.ConfigFile())
	return string(out[:min(len(out), 8192)])
}

// lockTable asks a running server for its lock table.
func (w *world) lockTable(ctx context.Context) ([]tableEntry, error) {
	b, ok := w.srv.(*bed.Baton)
	if !ok {
		return nil, errNoTable
	}
	out, err := w.node.Run(ctx, b.Bin(), "locks", "--json", "--config", b.ConfigFile())
	if err != nil {
		return nil, err
	}
	var es []tableEntry
	if err := json.Unmarshal(out, &es); err == nil {
		return es, nil
	}
	var obj struct {
		Locks []tableEntry `json:"locks"`
	}
	if err := json.Unmarshal(out, &obj); err != nil {
		return nil, fmt.Errorf("lock table: %w\n%.500s", err, out)
	}
	return obj.Locks, nil
}
