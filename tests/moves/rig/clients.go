package rig

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/uml"
)

// ClientConfig says what a kernel client does.
type ClientConfig struct {
	Name string
	// VIP is mounted with Options (default "vers=3", with IPv6 "vers=3,proto=tcp6").
	VIP     netip.Addr
	Options string
	// With are the workers (tests/kernel/work/moves.go), Flags further flags.
	With, Flags string
	Seed        uint64
	MemoryMiB   int
}

// Client is a kernel client at work.
type Client struct {
	ClientConfig
	i        int
	guest    *uml.Guest
	log      opLog
	verified int
	woken    int
}

// Op is an operation that has ended.
type Op struct {
	Worker, Op string
	Start      time.Time
	Took       time.Duration
}

// opLog reads a log that grows.
type opLog struct {
	mu   sync.Mutex
	f    *os.File
	rest []byte
	// clock is the file by which the guest's clock is compared with the host's, by
	// how much it was ahead lately.
	clock string
	ahead time.Duration
	ops   map[string][]Op // of a worker
}

// compare looks at the clock file. What is being written is looked at the next time.
func (l *opLog) compare() {
	if l.clock == "" {
		return
	}
	before, err1 := os.Stat(l.clock)
	b, err2 := os.ReadFile(l.clock)
	after, err3 := os.Stat(l.clock)
	us, err4 := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if errors.Join(err1, err2, err3, err4) == nil && bytes.HasSuffix(b, []byte("\n")) && before.ModTime().Equal(after.ModTime()) {
		l.ahead = time.UnixMicro(us).Sub(after.ModTime())
	}
}

func (l *opLog) read() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.compare()
	b, err := io.ReadAll(l.f)
	if err != nil {
		return err
	}
	b = append(l.rest, b...)
	end := bytes.LastIndexByte(b, '\n') + 1
	l.rest = slices.Clone(b[end:])
	for line := range bytes.Lines(b[:end]) {
		o, err := parseOp(string(line))
		if err != nil {
			return err
		}
		o.Start = o.Start.Add(-l.ahead)
		l.ops[o.Worker] = append(l.ops[o.Worker], o)
	}
	return nil
}

// parseOp reads "WORKER OP START-µs TOOK-µs".
func parseOp(line string) (o Op, err error) {
	f := strings.Fields(line)
	if len(f) != 4 {
		return o, fmt.Errorf("rig: log line %q", line)
	}
	start, err1 := strconv.ParseInt(f[2], 10, 64)
	took, err2 := strconv.ParseInt(f[3], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return o, fmt.Errorf("rig: log line %q: %w", line, err)
	}
	return Op{Worker: f[0], Op: f[1], Start: time.UnixMicro(start), Took: time.Duration(took) * time.Microsecond}, nil
}

// script mounts, and works in a directory of the client's own. The directory "all"
// is for files that clients share.
func (c *ClientConfig) script(i int) string {
	o, host := c.Options, c.VIP.String()
	if o == "" {
		o = "vers=3"
		if c.VIP.Is6() {
			o += ",proto=tcp6"
		}
	}
	if c.VIP.Is6() {
		host = "[" + host + "]"
	}
	return fmt.Sprintf(`mount -t nfs -o %s %s:/rw $MNT || exit 90
mkdir -p $MNT/all $MNT/%s || exit 91
cd $MNT/%s || exit 92
GODEBUG=asyncpreemptoff=1 $WORK moves -control $OUT -id %d -seed %d -with %s %s . || exit $?
cd /
umount $MNT || exit 93`, o, host, c.Name, c.Name, i, c.Seed, c.With, c.Flags)
}

// StartClient boots guest number i and waits until it works.
func (n *Net) StartClient(ctx context.Context, i int, dir string, c ClientConfig) (*Client, error) {
	work, err := bed.Build("./tests/kernel/work")
	if err != nil {
		return nil, err
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 256
	}
	cl := &Client{ClientConfig: c, i: i, log: opLog{ops: map[string][]Op{}}}
	var six netip.Prefix
	if c.VIP.Is6() {
		six = Prefix(Six(GuestAddr(i)))
	}
	g, err := uml.Start(ctx, uml.Config{
		Node: n.Hub, Tap: fmt.Sprint("tap", i), Addr: Prefix(GuestAddr(i)), Addr6: six, Dir: dir, Work: work,
		MemoryMiB: c.MemoryMiB, Script: c.script(i), Hostname: c.Name, StateDir: filepath.Join(dir, "state"),
	})
	if err != nil {
		return nil, err
	}
	cl.guest = g
	cl.log.clock = g.Path("clock")
	if err := cl.await(ctx, "working"); err != nil {
		out, _ := os.ReadFile(g.Path("guest.log"))
		g.Kill()
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	if cl.log.f, err = os.Open(g.Path("ops.log")); err != nil {
		g.Kill()
		return nil, err
	}
	return cl, nil
}

// Failed is what the client has found wrong; nil so far.
func (c *Client) Failed() error {
	if b, err := os.ReadFile(c.guest.Path("failed")); err == nil {
		return fmt.Errorf("client %s: %s", c.Name, b)
	}
	select {
	case <-c.guest.Done():
		b, _ := os.ReadFile(c.guest.Path("guest.log"))
		k, _ := os.ReadFile(c.guest.Path("console.log"))
		return fmt.Errorf("client %s has ended:\n%s\n%s", c.Name, b, k)
	default:
		return nil
	}
}

func (c *Client) until(ctx context.Context, what string, ok func() (bool, error)) error {
	for {
		if done, err := ok(); done || err != nil {
			return err
		}
		if err := c.Failed(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("client %s: waited in vain for %s: %w", c.Name, what, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// await waits for a file of the client's window.
func (c *Client) await(ctx context.Context, name string) error {
	return c.until(ctx, name, func() (bool, error) {
		_, err := os.Stat(c.guest.Path(name))
		return err == nil, nil
	})
}

// Order writes a file that the client looks for.
func (c *Client) Order(name string) error { return os.WriteFile(c.guest.Path(name), nil, 0o644) }

// Verify has the client compare everything.
func (c *Client) Verify(ctx context.Context) error {
	c.verified++
	if err := c.Order(fmt.Sprint("verify.", c.verified)); err != nil {
		return err
	}
	name := fmt.Sprint("verified.", c.verified)
	if err := c.await(ctx, name); err != nil {
		return err
	}
	return c.until(ctx, name, func() (bool, error) {
		b, err := os.ReadFile(c.guest.Path(name))
		if err != nil || len(b) == 0 {
			return false, err
		}
		if string(b) != "ok" {
			return false, fmt.Errorf("client %s: %s", c.Name, b)
		}
		return true, nil
	})
}

// Wake has the idle worker do something, and returns how long that took.
func (c *Client) Wake(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	if err := c.Rouse(); err != nil {
		return 0, err
	}
	err := c.Awake(ctx)
	return time.Since(start), err
}

// Rouse has the idle worker do something, and does not wait for it.
func (c *Client) Rouse() error {
	c.woken++
	return c.Order(fmt.Sprint("wake.", c.woken))
}

// Awake waits until the idle worker has done it.
func (c *Client) Awake(ctx context.Context) error {
	return c.await(ctx, fmt.Sprint("woke.", c.woken))
}

// Dump asks the client's kernel what hangs, and returns what it says.
func (c *Client) Dump(ctx context.Context) string {
	os.Remove(c.guest.Path("dump.txt"))
	if err := c.Order("dump"); err != nil {
		return err.Error()
	}
	for {
		if b, err := os.ReadFile(c.guest.Path("dump.txt")); err == nil {
			return string(b)
		}
		select {
		case <-ctx.Done():
			return "client " + c.Name + " does not answer"
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// busy tells whether a worker works without being told to.
func busy(worker string) bool { return !strings.HasPrefix(worker, "idle") }

// WorkersOf are the names of the client's busy workers.
func (c *Client) workers() (names []string) {
	for i, w := range strings.Split(c.With, ",") {
		if name := fmt.Sprint(w, i); busy(name) {
			names = append(names, name)
		}
	}
	return names
}

// Moving waits until each busy worker has done something that it began after t.
func (c *Client) Moving(ctx context.Context, t time.Time) error {
	return c.until(ctx, "all workers to get on", func() (bool, error) {
		if err := c.log.read(); err != nil {
			return false, err
		}
		c.log.mu.Lock()
		defer c.log.mu.Unlock()
		for _, w := range c.workers() {
			ops := c.log.ops[w]
			if len(ops) == 0 || ops[len(ops)-1].Start.Before(t) {
				return false, nil
			}
		}
		return true, nil
	})
}

// Longest is the longest operation that was under way between from and to. Waiting
// for a lock that others hold is no stall.
func (c *Client) Longest(from, to time.Time) (longest Op, err error) {
	if err := c.log.read(); err != nil {
		return longest, err
	}
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for _, ops := range c.log.ops {
		// They are in the order of their ends.
		for i := len(ops) - 1; i >= 0; i-- {
			o := ops[i]
			if o.Start.Add(o.Took).Before(from) {
				break
			}
			if o.Start.Before(to) && o.Op != "lock" && o.Took > longest.Took {
				longest = o
			}
		}
	}
	return longest, nil
}

// Wrong is the number of wrong results so far, of a lenient client.
func (c *Client) Wrong() (n int) {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for _, ops := range c.log.ops {
		for _, o := range ops {
			if o.Op == "WRONG" {
				n++
			}
		}
	}
	return n
}

// Ahead is by how much the guest's clock is before the host's.
func (c *Client) Ahead() time.Duration {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	return c.log.ahead
}

// Ops is the number of operations so far.
func (c *Client) Ops() (n int) {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for _, ops := range c.log.ops {
		n += len(ops)
	}
	return n
}

// Result is what a client's run came to.
type Result struct {
	// Counts are the increments of each counter that the client has made.
	Counts map[string]uint64 `json:"counts"`
	Output string            `json:"-"`
}

// Finish has the client compare everything for the last time, and end.
func (c *Client) Finish(ctx context.Context) (r Result, err error) {
	if err := c.Order("stop"); err != nil {
		return r, err
	}
	g, err := c.guest.Wait(ctx)
	r.Output = g.Output
	if err != nil {
		return r, fmt.Errorf("client %s: %w\n%s", c.Name, err, g.Output)
	}
	if g.Status != 0 {
		return r, fmt.Errorf("client %s: status %d\n%s\nkernel:\n%s", c.Name, g.Status, g.Output, g.Dmesg)
	}
	sc := bufio.NewScanner(strings.NewReader(g.Dmesg))
	for sc.Scan() {
		for _, bad := range []string{"BUG:", "Oops", "general protection", "NFS: server error", "lockd: failed to reclaim lock"} {
			if strings.Contains(sc.Text(), bad) {
				return r, fmt.Errorf("client %s: its kernel says: %s", c.Name, sc.Text())
			}
		}
	}
	b, err := os.ReadFile(c.guest.Path("result.json"))
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

// Kill ends the client at once.
func (c *Client) Kill() { c.guest.Kill() }
