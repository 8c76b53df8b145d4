package node

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
)

// patience is what nothing may take: only a hang exceeds it.
const patience = 60 * time.Second

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// cell is a cluster of nodes in this process: a and b are frontends, b and c may run
// everything.
type cell struct {
	t     *testing.T
	dir   string
	ports map[string]string
	start map[string][]string
	nodes map[string]*Node
	// change is applied to the configuration of every node, if set.
	change func(*config.Config)
	// prepare is called with every node before it starts, if set.
	prepare func(*Node)
}

func newCell(t *testing.T) *cell {
	c := &cell{t: t, dir: t.TempDir(), ports: map[string]string{}, nodes: map[string]*Node{},
		start: map[string][]string{"b": {"MGS", "MDT0000", "OST0000"}, "c": {"OST0001"}}}
	for _, n := range []string{"a", "b", "c"} {
		c.ports[n] = freePort(t)
	}
	return c
}

func (c *cell) conf(name string) *config.Config {
	if err := os.MkdirAll(filepath.Join(c.dir, name, "data"), 0o700); err != nil {
		c.t.Fatal(err)
	}
	k := conf(c.t, filepath.Join(c.dir, name))
	k.Node, k.Cluster.Node, k.Cluster.TLS, k.Cluster.Start = name, name, config.TLSOff, c.start[name]
	k.Cluster.Nodes = nil
	for _, n := range []string{"a", "b", "c"} {
		k.Cluster.Nodes = append(k.Cluster.Nodes, config.ClusterNode{Name: n, Address: c.ports[n]})
	}
	k.Cluster.Listen = c.ports[name]
	shared := []string{"b", "c"}
	k.MGS = config.MGS{Dir: filepath.Join(c.dir, "mgs"), Nodes: shared}
	k.MDT.Dir, k.MDT.Nodes = filepath.Join(c.dir, "mdt"), shared
	k.OST = []config.OST{{Dir: filepath.Join(c.dir, "ost0"), Nodes: shared}, {Dir: filepath.Join(c.dir, "ost1"), Nodes: shared}}
	k.Recovery.Heartbeat = config.Duration(2 * time.Second)
	k.Recovery.WindowMin, k.Recovery.WindowMax = config.Duration(5*time.Second), config.Duration(5*time.Second)
	k.ClusterKeyFile = filepath.Join(c.dir, "cluster.key")
	switch name {
	case "a":
		k.NFS.Addresses = []string{"127.0.0.2"}
	case "b":
		k.NFS.Addresses = []string{"127.0.0.3"}
	default:
		k.NFS.Addresses = nil
	}
	if c.change != nil {
		c.change(k)
	}
	return k
}

func (c *cell) up(name string) *Node {
	c.t.Helper()
	n, err := New(c.conf(name), slog.New(slog.NewTextHandler(c.t.Output(), nil)).With("node", name))
	if err != nil {
		c.t.Fatal(err)
	}
	if c.prepare != nil {
		c.prepare(n)
	}
	if err := n.Start(ctx); err != nil {
		c.t.Fatal(err)
	}
	c.nodes[name] = n
	c.t.Cleanup(func() { c.down(name, n) })
	return n
}

// down stops a node unless that has been done.
func (c *cell) down(name string, n *Node) {
	c.t.Helper()
	if c.nodes[name] != n {
		return
	}
	delete(c.nodes, name)
	if err := n.Stop(ctx); err != nil {
		c.t.Errorf("stop %s: %v", name, err)
	}
}

func (c *cell) ready(n *Node) {
	c.t.Helper()
	until(c.t, "the frontend", func() bool {
		select {
		case err := <-n.Failed():
			c.t.Fatal(err)
		default:
		}
		return n.FS() != nil
	})
}

func state(n *Node, target string) string {
	h := n.cluster.byName[target]
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state
}

// all waits until the MDT makes files on all OSTs.
func (c *cell) all(n *Node) {
	c.t.Helper()
	until(c.t, "all targets", func() bool {
		h := n.cluster.byName[mdtName]
		h.mu.Lock()
		m := h.mdt
		h.mu.Unlock()
		if m == nil {
			return false
		}
		for _, s := range m.OSTs() {
			if !s.Up || s.Free == 0 {
				return false
			}
		}
		return true
	})
}

// Targets on several nodes, started in any order, moved by hand under what is not
// durable yet, are one file system for all frontends. RS 0a, CS 5d.
func TestClusterOfNodes(t *testing.T) {
	c := newCell(t)
	a := c.up("a")
	until(t, "what it waits for", func() bool { return strings.Contains(a.Status().Waits, "MGS") })
	b, k := c.up("b"), c.up("c")
	c.ready(a)
	if w := a.Status().Waits; w != "" {
		t.Errorf("it serves, and waits for %s", w)
	}
	c.ready(b)
	c.all(b)
	for _, n := range []*Node{a, b} {
		if len(n.Status().Exports) != 1 {
			t.Errorf("%+v", n.Status().Exports)
		}
	}
	ver := verifiers(t, a.reg)
	files := map[string]wire.Attr{}
	check := func(when string) {
		t.Helper()
		for _, n := range []*Node{a, b} {
			for name, x := range files {
				if got := content(t, n, x.FID); got != name {
					t.Errorf("%s: %q in %s", when, got, name)
				}
			}
		}
	}
	put := func(n *Node, name string) {
		x := create(t, n, name)
		write(t, n, x, 0, name, wire.Unstable)
		files[name] = x
	}
	move := func(from, to *Node, target string) {
		t.Helper()
		if err := from.StopTarget(ctx, target); err != nil {
			t.Fatal(err)
		}
		if err := to.StartTarget(ctx, target, ""); err != nil {
			t.Fatal(err)
		}
	}
	for i, step := range []func(){
		func() {},
		func() { move(b, k, mdtName) },
		func() { move(b, k, ostName(0)) },
		func() { move(k, b, mdtName); move(k, b, ostName(1)) },
		func() { move(b, k, "MGS") },
	} {
		for _, n := range []*Node{a, b} {
			for f := range 3 {
				put(n, fmt.Sprintf("%s%d.%d", n.cluster.name, i, f))
			}
		}
		step()
		check(fmt.Sprint("step ", i))
	}
	// A frontend where a target was has kept no copies of what it did there, and its
	// clients may have to send data again; others never, when nothing was lost.
	now := vips(t, a.reg)
	if i := slices.IndexFunc(now, func(v mgs.VIP) bool { return v.Node == "a" }); now[i].Verifier != ver[i] {
		t.Error("the write verifier changed though nothing was lost")
	}
	ver = verifiers(t, a.reg)
	// A target is nowhere twice, and what its owner is comes with the refusal.
	if err := b.StartTarget(ctx, ostName(0), ""); err == nil || !errors.Is(err, owner.ErrHeld) {
		t.Errorf("start of a target that runs elsewhere: %v", err)
	}
	if err := a.StartTarget(ctx, ostName(0), ""); err == nil || !strings.Contains(err.Error(), "not among the nodes") {
		t.Errorf("start where it may not run: %v", err)
	}
	if got := state(b, ostName(0)); got != status.StateStopped {
		t.Error(got)
	}
	// Everything is stopped and started again, nothing is lost, and nobody has to
	// recover anything.
	for _, x := range []struct {
		name string
		n    *Node
	}{{"a", a}, {"b", b}, {"c", k}} {
		c.down(x.name, x.n)
	}
	b, k, a = c.up("b"), c.up("c"), c.up("a")
	_ = k
	c.ready(a)
	c.ready(b)
	c.all(b)
	check("after a restart of all nodes")
	if now := verifiers(t, a.reg); !slices.Equal(now, ver) {
		t.Error("write verifiers changed by an orderly restart")
	}
}

// A disk that is not mounted is not taken for a new target, nor for a new
// registry, and swapped directories are noticed.
func TestClusterStores(t *testing.T) {
	c := newCell(t)
	b := c.up("b")
	c.ready(b)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(target, want string) {
		t.Helper()
		if err := b.StartTarget(ctx, target, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error about %q", target, err, want)
		}
	}
	at := func(dir string) string { return filepath.Join(c.dir, dir) }
	do(b.StartTarget(ctx, ostName(1), ""))
	c.all(b)
	do(b.StopTarget(ctx, ostName(0)))
	do(b.StopTarget(ctx, ostName(1)))
	do(os.Rename(at("ost0"), at("away")))
	refused(ostName(0), "mount its disk")
	do(os.Mkdir(at("ost0"), 0o700))
	refused(ostName(0), "mount its disk")
	do(os.RemoveAll(at("ost0")))
	do(os.Rename(at("ost1"), at("ost0")))
	do(os.Rename(at("away"), at("ost1")))
	refused(ostName(0), "is the store of")
	refused(ostName(1), "is the store of")
	do(os.Rename(at("ost0"), at("away")))
	do(os.Rename(at("ost1"), at("ost0")))
	do(os.Rename(at("away"), at("ost1")))
	do(b.StartTarget(ctx, ostName(0), ""))
	do(b.StartTarget(ctx, ostName(1), ""))
	do(b.StopTarget(ctx, "MGS"))
	do(os.Rename(at("mgs"), at("away")))
	refused("MGS", "mount its disk")
	do(os.Mkdir(at("mgs"), 0o700))
	refused("MGS", "mount its disk")
	do(os.RemoveAll(at("mgs")))
	do(os.Rename(at("away"), at("mgs")))
	do(b.StartTarget(ctx, "MGS", ""))
}

// A node that was alone can become the first of a cluster: everything is kept.
func TestAloneBecomesCluster(t *testing.T) {
	dir := t.TempDir()
	c := conf(t, dir)
	n := start(t, c)
	f := create(t, n, "f")
	write(t, n, f, 0, "kept", wire.Unstable)
	ver := verifiers(t, n.reg)
	stop(t, n)
	cl := newCell(t)
	c.Node, c.Cluster.Node, c.Cluster.TLS, c.Cluster.Listen = "a", "a", config.TLSOff, cl.ports["a"]
	c.Cluster.Nodes = []config.ClusterNode{{Name: "a", Address: cl.ports["a"]}}
	c.Cluster.Start = []string{"MGS", "MDT0000", "OST0000", "OST0001"}
	alone := []string{"a"}
	c.MGS.Nodes, c.MDT.Nodes = alone, alone
	for i := range c.OST {
		c.OST[i].Nodes = alone
	}
	n = start(t, c)
	cl.ready(n)
	cl.all(n)
	if got := content(t, n, f.FID); got != "kept" {
		t.Errorf("%q", got)
	}
	if now := verifiers(t, n.reg); !slices.Equal(now, ver) {
		t.Error("the write verifier changed")
	}
}

// New write verifiers are stored before anything goes on that depends on them. If
// the node is stopped meanwhile, its next start changes them.
func TestVerifiersWaitForTheRegistry(t *testing.T) {
	c := newCell(t)
	c.start = map[string][]string{"c": {"MGS"}, "b": {mdtName, ostName(0), ostName(1)}}
	k, b := c.up("c"), c.up("b")
	c.ready(b)
	c.all(b)
	fh := mount(t, b, "/data")
	registry := func(up bool) {
		t.Helper()
		var err error
		if up {
			err = k.StartTarget(ctx, "MGS", "")
		} else {
			err = k.StopTarget(ctx, "MGS")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	lost := func() chan struct{} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.lostData(b.reg)
		}()
		select {
		case <-done:
			t.Error("it goes on though the new verifiers are not stored")
		case <-time.After(300 * time.Millisecond):
		}
		return done
	}
	old := commitVerf(t, b, fh)
	registry(false)
	done := lost()
	registry(true)
	<-done
	now := commitVerf(t, b, fh)
	if reg := [8]byte(decodeVerf(t, b.reg)); now == old || now != reg {
		t.Errorf("%x after %x, registered %x", now, old, reg)
	}
	registry(false)
	done = lost()
	c.down("b", b)
	<-done
	registry(true)
	b = c.up("b")
	c.ready(b)
	c.all(b)
	if v := commitVerf(t, b, mount(t, b, "/data")); v == now {
		t.Errorf("the verifier is %x as before", v)
	}
}

// A frontend that would do harm is refused, with what to do: its address is served by
// another node, or its handles would be worth nothing there.
func TestFrontendRefused(t *testing.T) {
	c := newCell(t)
	c.start = map[string][]string{"b": {"MGS", mdtName, ostName(0), ostName(1)}}
	b := c.up("b")
	c.ready(b)
	refused := func(want string, change func(*config.Config)) {
		t.Helper()
		c.change = change
		a := c.up("a")
		select {
		case err := <-a.Failed():
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want an error about %q", err, want)
			}
		case <-time.After(patience):
			t.Error("not refused")
		}
		if a.FS() != nil {
			t.Error("it serves")
		}
		c.down("a", a)
	}
	refused("node b", func(k *config.Config) { k.NFS.Addresses = []string{"127.0.0.3"} })
	key := filepath.Join(c.dir, "other.key")
	refused("copy the file", func(k *config.Config) { k.ClusterKeyFile = key })
	if _, err := os.Stat(key); err == nil {
		t.Error("the key that was made for nothing is still there")
	}
	c.change = nil
	c.ready(c.up("a"))
}

// The start of a frontend that waits for registry or MDT is broken off, leaves nothing
// behind, and succeeds the next time (CS 23b).
func TestStartBrokenOff(t *testing.T) {
	c := newCell(t)
	c.start = map[string][]string{"b": {"MGS"}}
	before := runtime.NumGoroutine()
	a := c.up("a") // there is no MGS
	time.Sleep(50 * time.Millisecond)
	c.down("a", a)
	b := c.up("b") // there is no MDT
	a = c.up("a")
	until(t, "the frontend knows the registry", func() bool {
		a.cluster.mu.Lock()
		defer a.cluster.mu.Unlock()
		return a.cluster.met
	})
	time.Sleep(50 * time.Millisecond) // it looks for the MDT
	c.down("a", a)
	c.down("b", b)
	until(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
	c.start = map[string][]string{"b": {"MGS", mdtName, ostName(0), ostName(1)}}
	b = c.up("b")
	a = c.up("a")
	c.ready(b)
	c.ready(a)
}
