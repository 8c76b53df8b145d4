package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/control/lockctl/lockctltest"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/metrics"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
	"github.com/baton-nfs/baton/recovery/client"
)

// fakeNode notes what is done to it.
type fakeNode struct {
	mu       sync.Mutex
	log      []string
	startErr error
	reload   error
	probe    error
	block    chan struct{} // Start waits for it
	stop     func(context.Context) error
	release  func(vipctl.ReleaseArgs)
	unready  error
	locks    *lockctltest.Table // nil: no locks are served

	order      error         // result of orders for targets
	startTakes time.Duration // the start of one

	vips fakeVIPs
}

func (f *fakeNode) note(s string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, s)
}

func (f *fakeNode) Start(ctx context.Context) error {
	f.note("start")
	if f.block != nil {
		select {
		case <-f.block:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return f.startErr
}

func (f *fakeNode) Stop(ctx context.Context) error {
	f.note("stop")
	if f.stop != nil {
		return f.stop(ctx)
	}
	return nil
}

func (f *fakeNode) ReloadExports() error {
	f.note("reload")
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reload
}

func (f *fakeNode) setReload(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reload = err
}

func (f *fakeNode) Status() status.Status { return *statustest.Sample() }
func (f *fakeNode) FS() *client.FS        { return nil }

func (f *fakeNode) Locks() *lockctl.Admin {
	if f.locks == nil {
		return nil
	}
	return lockctl.New(f.locks, lockctltest.ListVIPs, func() time.Time { return lockctltest.Now })
}

// Failed never tells anything.
func (f *fakeNode) Failed() <-chan error { return nil }

func (f *fakeNode) ListTargets() []status.Target {
	return []status.Target{
		{Name: "MGS", State: status.StateUp, Node: "n1", Owner: "n1, owned, generation 3"},
		{Name: "MDT0000", State: status.StateRecovering, Reason: "waits", Node: "n1", Instance: 7, Known: 3, Connected: 1, WindowLeft: 9 * time.Second, Clients: 3},
		{Name: "OST0000", State: status.StateStarting, Reason: "waits for MDT0000"},
	}
}

func (f *fakeNode) StartTarget(_ context.Context, name, fenced string) error {
	f.note("start " + name + " " + fenced)
	time.Sleep(f.startTakes)
	return f.order
}

func (f *fakeNode) StopTarget(_ context.Context, name string) error {
	f.note("stop " + name)
	return f.order
}

func (f *fakeNode) AbortRecovery(name string) error {
	f.note("abort " + name)
	return f.order
}

func (f *fakeNode) EvictClient(name, client string) error {
	f.note("evict " + name + " " + client)
	return f.order
}

func (f *fakeNode) Deactivate(name string, activate bool) error {
	f.note(fmt.Sprint("activate ", name, " ", activate))
	return f.order
}

func (f *fakeNode) TakeVIP(_ context.Context, a vipctl.TakeArgs) (vipctl.Result, error) {
	return vipctl.Result{State: vipctl.Serving, Text: a.Addr.String() + ": " + a.Stage}, nil
}

func (f *fakeNode) ReleaseVIP(_ context.Context, a vipctl.ReleaseArgs) (vipctl.Result, error) {
	if f.release != nil {
		f.release(a)
	}
	return vipctl.Result{State: vipctl.Absent, Text: a.Addr.String() + ": " + a.Stage}, nil
}

func (f *fakeNode) CheckVIP(_ context.Context, a vipctl.CheckArgs) (vipctl.Result, error) {
	return vipctl.Result{State: vipctl.Absent, Text: a.Addr.String()}, nil
}

func (f *fakeNode) ReadyVIP(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.unready
}

func (f *fakeNode) RecoveryStatus(context.Context) status.Recovery { return *statustest.Recovery() }

func (f *fakeNode) Metrics() prometheus.Collector {
	return metrics.NewCollector(f.Status)
}
func (f *fakeNode) Probe(context.Context) error { f.note("probe"); return f.probe }

// bed runs the CLI in the test's process.
type bed struct {
	t       *testing.T
	node    *fakeNode
	signals chan os.Signal
	mu      sync.Mutex
	states  []string
	every   time.Duration
	now     time.Time
	dir     string

	shutdown chan struct{} // of the machine
	released atomic.Bool   // it is no longer held up
}

func newBed(t *testing.T) *bed {
	dir, err := os.MkdirTemp("", "cli") // short, for the socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &bed{t: t, node: &fakeNode{}, signals: make(chan os.Signal, 4), now: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), dir: dir}
}

func (b *bed) app(stdout, stderr io.Writer) *app {
	return &app{
		stdout: stdout, stderr: stderr,
		newNode: func(*config.Config, *slog.Logger) (service, error) { return b.node, nil },
		daemon: daemon{
			signals: func() (<-chan os.Signal, func()) { return b.signals, func() {} },
			notify: func(s string) {
				b.mu.Lock()
				b.states = append(b.states, s)
				b.mu.Unlock()
			},
			watchdog:  func() time.Duration { return b.every },
			monotonic: func() string { return "MONOTONIC_USEC=1" },
			inhibit:   func(*slog.Logger) (<-chan struct{}, func()) { return b.shutdown, func() { b.released.Store(true) } },
		},
		now:           func() time.Time { return b.now },
		defaultConfig: filepath.Join(b.dir, "none.toml"),
	}
}

// run gives the exit code, standard output and standard error.
func (b *bed) run(args ...string) (int, string, string) {
	var out, errs syncBuffer
	code := b.app(&out, &errs).run(args)
	return code, out.String(), errs.String()
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// serve starts "baton serve" in the background; the channel gets its end.
func (b *bed) serve(extra ...string) (*syncBuffer, chan int) {
	var errs syncBuffer
	end := make(chan int, 1)
	args := append([]string{"serve", "--data", b.dir, "--export", "/home=/", "--http", "off"}, extra...)
	go func() { end <- b.app(io.Discard, &errs).run(args) }()
	return &errs, end
}

func (b *bed) waitFor(what string, ok func() bool) {
	b.t.Helper()
	for i := 0; !ok(); i++ {
		if i == 5000 {
			b.t.Fatalf("no %s; node %v, states %q", what, b.node.log, b.states)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (b *bed) notified(s string) func() bool {
	return func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return strings.Contains(strings.Join(b.states, "|"), s)
	}
}

// TestGolden runs command lines against a running fake server and none.
func TestGolden(t *testing.T) {
	b := newBed(t)
	b.node.locks = lockctltest.Sample()
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	dead := filepath.Join(b.dir, "dead")
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "reload-error" {
				b.node.setReload(nil)
				if d.Input != "" {
					b.node.setReload(errors.New(d.Input))
				}
				return "ok\n"
			}
			if d.Cmd == "unready" {
				b.node.mu.Lock()
				defer b.node.mu.Unlock()
				b.node.unready = nil
				if d.Input != "" {
					b.node.unready = errors.New(d.Input)
				}
				return "ok\n"
			}
			if d.Cmd == "date" {
				now, err := time.Parse(time.DateOnly, strings.TrimSpace(d.Input))
				if err != nil {
					t.Fatal(err)
				}
				b.now = now
				return "ok\n"
			}
			if d.Cmd == "move" { // a file
				if err := os.Rename(filepath.Join(b.dir, d.CmdArgs[0].Key), filepath.Join(b.dir, d.CmdArgs[1].Key)); err != nil {
					t.Fatal(err)
				}
				return "ok\n"
			}
			if d.Cmd == "file" {
				name := d.CmdArgs[0].Key
				if err := os.WriteFile(filepath.Join(b.dir, name), []byte(d.Input), 0o600); err != nil {
					t.Fatal(err)
				}
				return "ok\n"
			}
			args := strings.Fields(d.Input)
			for i := range args {
				args[i] = strings.NewReplacer("$DEAD", dead, "$DIR", b.dir).Replace(args[i])
			}
			code, out, errs := b.run(args[1:]...)
			res := out + errs
			if d.HasArg("brief") {
				res = res[:min(len(res), 200)] + "...\n"
			}
			res = strings.ReplaceAll(res, b.dir, "$DIR")
			return res + "exit " + string(rune('0'+code)) + "\n"
		})
	})
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("serve ended with %d", code)
	}
}

// Orders for targets reach the node, their failures the administrator, and a start
// that takes long says what it waits for.
func TestTargetOrders(t *testing.T) {
	b := newBed(t)
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	seen := len(b.node.log)
	for _, args := range [][]string{
		{"start", "OST0001", "--fenced", "n2"}, {"stop", "OST0001"}, {"abort-recovery", "MDT0000"}, {"evict", "MDT0000", "n3"},
		{"deactivate", "OST0001"}, {"activate", "OST0001"},
	} {
		if code, out, errs := b.run(append(append([]string{"target"}, args...), "--data", b.dir)...); code != 0 || out+errs != "" {
			t.Errorf("%v: %d, %q", args, code, out+errs)
		}
	}
	want := []string{"start OST0001 n2", "stop OST0001", "abort MDT0000", "evict MDT0000 n3", "activate OST0001 false", "activate OST0001 true"}
	if got := b.node.log[seen:]; !slices.Equal(got, want) {
		t.Errorf("the node was told %q", got)
	}
	b.node.order, b.node.startTakes = errors.New("it runs elsewhere"), 3*startProgress
	code, out, errs := b.run("target", "start", "OST0000", "--data", b.dir)
	if code != exitFailure || out != "" || errs != "OST0000: waits for MDT0000\nbaton: it runs elsewhere\n" {
		t.Errorf("%d, %q, %q", code, out, errs)
	}
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("serve ended with %d", code)
	}
}

// A long lock table goes through the socket in pages.
func TestManyLocks(t *testing.T) {
	b := newBed(t)
	const n = 100000
	b.node.locks = lockctltest.Sample()
	first := b.node.locks.Locks[0]
	b.node.locks.Locks = nil
	for i := range n {
		first.ID = uint64(i + 1)
		b.node.locks.Locks = append(b.node.locks.Locks, first)
	}
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	code, out, errs := b.run("locks", "--data", b.dir)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); code != 0 || len(lines) != n+1 || !strings.HasPrefix(lines[n], "  100000  /home/mail box  0-EOF") {
		t.Errorf("%d: %d lines, the last %q; %s", code, len(lines), lines[len(lines)-1], errs)
	}
	code, out, errs = b.run("locks", "--data", b.dir, "--json")
	var l []status.Lock
	if err := json.Unmarshal([]byte(out), &l); code != 0 || err != nil || len(l) != n || l[n-1].ID != n {
		t.Errorf("%d: %d entries, %v; %s", code, len(l), err, errs)
	}
	var ids []string
	for i := range 2*lockctl.MaxRelease + 1 {
		ids = append(ids, strconv.Itoa(i+1))
	}
	code, out, errs = b.run(append([]string{"locks", "release", "--data", b.dir}, ids...)...)
	if got := strings.Count(out, "released "); code != 0 || got != len(ids) || len(b.node.locks.Locks) != n-got {
		t.Errorf("%d: %d of %d released, %d left; %s", code, got, len(ids), len(b.node.locks.Locks), errs)
	}
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("serve ended with %d", code)
	}
}

// A baton without lock service says so.
func TestNoLocks(t *testing.T) {
	b := newBed(t)
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	for _, args := range [][]string{{"locks"}, {"locks", "hosts"}, {"locks", "release", "1"}, {"locks", "release", "--client", "c"}} {
		code, out, errs := b.run(append(args, "--data", b.dir)...)
		if code != exitFailure || out != "" || errs != "baton: the running baton serves no locks (locks.enabled), or not yet\n" {
			t.Errorf("%v: %d %s %s", args, code, out, errs)
		}
	}
	b.signals <- syscall.SIGTERM
	<-end
}

func TestForgetLocks(t *testing.T) {
	b := newBed(t)
	var out syncBuffer
	end := make(chan int, 1)
	go func() {
		end <- b.app(&out, io.Discard).run([]string{"serve", "--data", b.dir, "--export", "/home=/", "--http", "off", "--forget-locks"})
	}()
	b.waitFor("readiness", b.notified("READY=1"))
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("exit %d", code)
	}
	want := "locks: threw away 17 entries of 2001:db8::1; 3 clients are told to reclaim, and until then, for at most 1m1s, no other locks are granted there\n"
	if got := out.String(); !strings.Contains(got, want) || strings.Contains(got, "192.0.2.10;") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestServeLifecycle(t *testing.T) {
	b := newBed(t)
	errs, end := b.serve("--log-level", "debug")
	b.waitFor("readiness", b.notified("READY=1"))
	if fi, err := os.Stat(config.SocketPath(b.dir)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("control socket: %v, %v", fi, err)
	}
	b.node.setReload(errors.New("exports:3: unknown option \"rx\""))
	b.signals <- syscall.SIGHUP
	b.waitFor("failed reload", b.notified("READY=1\nSTATUS=serving; the last reload of the exports failed"))
	b.node.setReload(nil)
	b.signals <- syscall.SIGHUP
	b.waitFor("second reload", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return len(b.states) == 5 })
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("exit %d: %s", code, errs)
	}
	want := "READY=1\nSTATUS=serving|RELOADING=1\nMONOTONIC_USEC=1|READY=1\nSTATUS=serving; the last reload of the exports failed|" +
		"RELOADING=1\nMONOTONIC_USEC=1|READY=1\nSTATUS=serving|STOPPING=1\nEXTEND_TIMEOUT_USEC=50000000\nSTATUS=stopping"
	if got := strings.Join(b.states, "|"); got != want {
		t.Errorf("states %q\nwant   %q", got, want)
	}
	if got := strings.Join(b.node.log, " "); got != "start reload reload stop" {
		t.Errorf("node: %s", got)
	}
	if !strings.Contains(errs.String(), `unknown option`) {
		t.Errorf("the reload's error is not in the log:\n%s", errs)
	}
	if _, err := os.Stat(config.SocketPath(b.dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket stays: %v", err)
	}
}

// A shutdown of the machine stops the node, and goes on when that is done.
func TestServeUntilShutdown(t *testing.T) {
	b := newBed(t)
	b.shutdown = make(chan struct{})
	b.node.stop = func(context.Context) error {
		if b.released.Load() {
			return errors.New("the machine does not wait")
		}
		return nil
	}
	errs, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	close(b.shutdown)
	if code := <-end; code != 0 || !b.released.Load() {
		t.Errorf("exit %d, lock released: %v: %s", code, b.released.Load(), errs)
	}
}

func TestServeTwice(t *testing.T) {
	b := newBed(t)
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	code, _, errs := b.run("serve", "--data", b.dir, "--export", "/x=/", "--http", "off")
	if code != exitFailure || !strings.Contains(errs, "another baton is running on "+b.dir) {
		t.Errorf("second serve: %d %s", code, errs)
	}
	b.signals <- syscall.SIGINT
	if code := <-end; code != 0 {
		t.Errorf("first serve ended with %d", code)
	}
}

// A cluster manager's hooks wait while a node that stops gives its addresses up. All else
// is refused; no baton is told of, and none started, before that one has ended.
func TestHooksWhileStopping(t *testing.T) {
	b := newBed(t)
	listing, listed := make(chan struct{}), make(chan struct{})
	b.node.vips.list = func(ctx context.Context) {
		close(listing)
		<-ctx.Done()
		close(listed)
	}
	drain := make(chan struct{})
	b.node.stop = func(context.Context) error {
		select {
		case <-listed:
		default:
			return errors.New("a command of before still works on the node")
		}
		<-drain
		return nil
	}
	asked := make(chan struct{}, 2)
	b.node.release = func(vipctl.ReleaseArgs) {
		asked <- struct{}{}
		<-drain
	}
	errs, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	go b.run("vip", "list", "--data", b.dir)
	<-listing
	b.signals <- syscall.SIGTERM
	b.waitFor("stop", func() bool { b.node.mu.Lock(); defer b.node.mu.Unlock(); return slices.Contains(b.node.log, "stop") })
	released := make(chan string, 1)
	go func() {
		code, out, errs := b.run("hook", "release", "--data", b.dir, "192.0.2.50")
		released <- fmt.Sprint(code, " ", out, errs)
	}()
	<-asked
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"hook health", exitFailure, "this baton stops"},
		{"hook check 192.0.2.50", 3, "192.0.2.50"},
		{"status", exitFailure, "this baton stops"},
		{"serve --export /x=/ --http off", exitFailure, "another baton has not stopped yet"},
	} {
		code, out, errs := b.run(append(strings.Fields(c.args), "--data", b.dir)...)
		if code != c.code || !strings.Contains(out+errs, c.want) {
			t.Errorf("%s: exit %d: %s%s", c.args, code, out, errs)
		}
	}
	select {
	case r := <-released:
		t.Errorf("released before the drain has ended: %s", r)
	default:
	}
	close(drain)
	if r := <-released; r != "0 192.0.2.50: drain\n" {
		t.Errorf("release: %q", r)
	}
	if code := <-end; code != 0 {
		t.Errorf("exit %d: %s", code, errs)
	}
	if code, _, errs := b.run("hook", "check", "--data", b.dir, "192.0.2.50"); code != 3 || !strings.Contains(errs, "no baton runs") {
		t.Errorf("after the stop: exit %d: %s", code, errs)
	}
}

func TestServeSecondSignal(t *testing.T) {
	b := newBed(t)
	entered := make(chan struct{})
	b.node.stop = func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	}
	errs, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	b.signals <- syscall.SIGTERM
	<-entered
	b.signals <- syscall.SIGHUP // means nothing now
	b.signals <- syscall.SIGTERM
	if code := <-end; code != exitFailure || !strings.Contains(errs.String(), "stop: context canceled") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestServeSignalWhileStarting(t *testing.T) {
	b := newBed(t)
	b.node.block = make(chan struct{})
	errs, end := b.serve()
	b.signals <- syscall.SIGTERM
	if code := <-end; code != exitFailure || !strings.Contains(errs.String(), "stopped by terminated while starting") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if len(b.states) != 0 {
		t.Errorf("notified %q", b.states)
	}
}

// What is wrong with the connections between nodes is in the log.
func TestServeSaysWhatIsWrongWithTLS(t *testing.T) {
	b := newBed(t)
	tls := filepath.Join(b.dir, "tls")
	for _, args := range [][]string{{"ca", "init", "--name", "c", "--dir", tls}, {"ca", "issue", "n1", "--dir", tls}} {
		if code, _, errs := b.run(args...); code != 0 {
			t.Fatal(errs)
		}
	}
	issued := b.now
	for _, x := range []struct {
		tls  string
		now  time.Time
		want string // in the log; empty: no warning
	}{
		{`"mutual"`, issued, ""},
		{`"mutual"`, issued.AddDate(5, 0, -10), "the certificate of node n1 expires on"},
		{`"mutual"`, issued.AddDate(6, 0, 0), "the certificate of node n1 has expired on"},
		{`"off"`, issued, `cluster.tls is off: connections between nodes are neither encrypted nor authenticated, and whoever reaches the port can read and change everything\" listen=192.0.2.1:7988`},
	} {
		b.now, b.states = x.now, nil
		file := filepath.Join(b.dir, "cluster.toml")
		text := "data_dir = " + strconv.Quote(b.dir) + "\n[cluster]\nnode = \"n1\"\ntls = " + x.tls + "\ntls_dir = " + strconv.Quote(tls) + `
[[cluster.nodes]]
name = "n1"
address = "192.0.2.1"
[nfs]
addresses = []
[mgs]
nodes = ["n1"]
[mdt]
nodes = ["n1"]
[[ost]]
nodes = ["n1"]
[http]
address = ""
`
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var errs syncBuffer
		end := make(chan int, 1)
		go func() { end <- b.app(io.Discard, &errs).run([]string{"serve", "--config", file}) }()
		b.waitFor("readiness", b.notified("READY=1"))
		b.signals <- syscall.SIGTERM
		if code := <-end; code != 0 {
			t.Errorf("exit %d: %s", code, errs.String())
		}
		if log := errs.String(); strings.Contains(log, "WARN") != (x.want != "") || !strings.Contains(log, strings.ReplaceAll(x.want, `\"`, `"`)) {
			t.Errorf("tls = %s on %v:\n%s", x.tls, x.now, log)
		}
	}
}

func TestServeStartFails(t *testing.T) {
	b := newBed(t)
	b.node.startErr = errors.New("mdt: no space")
	errs, end := b.serve()
	if code := <-end; code != exitFailure || !strings.Contains(errs.String(), "baton: mdt: no space\n") {
		t.Errorf("exit %d: %s", code, errs)
	}
	// A surrounding service that cannot start takes the node down again.
	b = newBed(t)
	errs, end = b.serve("--http", "127.0.0.1:1", "--http", "192.0.2.1:80")
	if code := <-end; code != exitUsage || !strings.Contains(errs.String(), "not a loopback address") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if err := os.WriteFile(config.SocketPath(b.dir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	errs, end = b.serve()
	if code := <-end; code != exitFailure || !strings.Contains(errs.String(), "not a socket") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if got := strings.Join(b.node.log, " "); got != "start stop" {
		t.Errorf("node: %s", got)
	}
}

func TestWatchdog(t *testing.T) {
	b := newBed(t)
	b.every = 15 * time.Millisecond
	_, end := b.serve()
	b.waitFor("watchdog", b.notified("WATCHDOG=1"))
	b.signals <- syscall.SIGTERM
	<-end

	b = newBed(t)
	b.every = 15 * time.Millisecond
	b.node.probe = errors.New("mdt: disk gone")
	errs, end := b.serve()
	b.waitFor("failed probe", func() bool { return strings.Contains(errs.String(), "disk gone") })
	b.signals <- syscall.SIGTERM
	<-end
	if b.notified("WATCHDOG=1")() {
		t.Error("the watchdog was fed though the probe failed")
	}
}

func TestStatusInterval(t *testing.T) {
	b := newBed(t)
	srv := control.NewServer(nil)
	n := uint64(0)
	srv.Handle(control.CmdStatus, func(context.Context, jsonRaw) (any, error) {
		st := statustest.Sample()
		st.Now = st.Now.Add(time.Duration(n) * time.Second)
		st.Targets[0].Ops = 1000 + n*70
		n++
		return st, nil
	})
	if err := srv.Start(config.SocketPath(b.dir)); err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	code, out, errs := b.run("status", "--data", b.dir, "--interval", "1ms", "--json")
	if code != 0 || !strings.Contains(out, `"ops_per_sec": 70`) {
		t.Errorf("%d %s %s", code, out, errs)
	}
}

func TestLogFormats(t *testing.T) {
	for format, want := range map[string]string{
		"text":    "level=WARN msg=\"a b\" k=1 who=\"x y\" g.n=2\n",
		"json":    `"level":"WARN","msg":"a b","k":1,"who":"x y","g":{"n":2}}` + "\n",
		"journal": "<4>a b k=1 who=\"x y\" g.n=2\n",
	} {
		t.Setenv("JOURNAL_STREAM", "")
		var b bytes.Buffer
		log := newLogger(config.Log{Level: "warn", Format: format}, &b)
		if h, ok := log.Handler().(*journalHandler); ok {
			h.out.send = nil
		}
		log.Info("not shown")
		log.With("k", 1).Warn("a b", "who", "x y", slog.Group("g", "n", 2))
		if got := b.String(); !strings.HasSuffix(got, want) || strings.Contains(got, "not shown") {
			t.Errorf("%s: %q, want %q", format, got, want)
		}
	}
}

func TestJournalFields(t *testing.T) {
	var msg string
	var fields map[string]string
	h := &journalHandler{out: &journalOut{send: func(m string, _ journalPriority, f map[string]string) error { msg, fields = m, f; return nil }}}
	slog.New(h).With("addr", "10.0.0.1").WithGroup("t").With("x-y", 3).Error("down\nnow", "err", errors.New("e f"))
	if msg != "down\nnow addr=10.0.0.1 t.x-y=3 t.err=\"e f\"" {
		t.Errorf("message %q", msg)
	}
	if fields["BATON_ADDR"] != "10.0.0.1" || fields["BATON_T_X_Y"] != "3" || fields["BATON_T_ERR"] != "e f" || len(fields) != 3 {
		t.Errorf("fields %v", fields)
	}
}
