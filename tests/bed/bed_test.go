package bed

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

func newNode(t *testing.T, name string) *Node {
	t.Helper()
	n, err := NewNode(name)
	Need(t, err)
	t.Cleanup(func() { n.Close() })
	return n
}

func TestNodeIsolatesAndDies(t *testing.T) {
	n := newNode(t, "a")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := n.Run(ctx, "sh", "-c", "ip -o link; echo pid $$; ls /run")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(out), ": <"); got != 1 {
		t.Errorf("new node has %d interfaces, want the loopback alone:\n%s", got, out)
	}
	p, err := n.Spawn(Command("sh", "-c", "sleep 1000 & sleep 1001"))
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("a process of the node outlived it")
	}
}

func TestNodeDiesWithItsTest(t *testing.T) {
	if os.Getenv("BED_CHILD") != "" {
		n, err := NewNode("child")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Spawn(Command("sleep", "98765")); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(os.Getenv("BED_CHILD"), nil, 0o644)
		select {}
	}
	newNode(t, "probe")
	flag := filepath.Join(t.TempDir(), "ready")
	exe, _ := os.Executable()
	cmd := exec.Command(exe, "-test.run=^TestNodeDiesWithItsTest$")
	cmd.Env = append(os.Environ(), "BED_CHILD="+flag)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the child to start", func() bool { _, err := os.Stat(flag); return err == nil })
	cmd.Process.Kill()
	cmd.Wait()
	waitFor(t, "the orphan to be killed", func() bool {
		out, _ := exec.Command("pgrep", "-xf", "sleep 98765").Output()
		return len(out) == 0
	})
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestPlug(t *testing.T) {
	hub, a := newNode(t, "hub"), newNode(t, "a")
	if err := hub.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	if err := a.Plug(hub, "br0", "pa", "eth0", netip.MustParsePrefix("10.77.0.2/24")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	// Port 9 has no listener: a refusal proves that packets go both ways.
	_, err := a.DialContext(ctx, "tcp", "10.77.0.1:9")
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("dial over the bridge: %v, want connection refused", err)
	}
}

func TestGaneshaRestarts(t *testing.T) {
	n := newNode(t, "g")
	// Ganesha finds no address family usable when there is only the loopback.
	if err := n.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	g, err := NewGanesha(Config{Node: n, Dir: Dir(t), Addr: netip.MustParseAddr("10.77.0.1"), Exports: []Export{{Path: "/rw"}}})
	Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := g.Start(ctx); err != nil {
		t.Fatal(err)
	}
	u, err := ProcUsage(g.Pid())
	if err != nil || u.RSS == 0 {
		t.Errorf("usage of a running server: %+v, %v", u, err)
	}
	if err := g.Kill9(); err != nil {
		t.Fatal(err)
	}
	if err := g.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestBatonRestarts(t *testing.T) {
	n := newNode(t, "b")
	if err := n.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	b, err := NewBaton(Config{Node: n, Dir: Dir(t), Addr: netip.MustParseAddr("10.77.0.1"), Exports: []Export{{Path: "/rw"}, {Path: "/ro", ReadOnly: true}}})
	Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	for range 2 {
		if err := b.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if err := b.Kill9(); err != nil {
			t.Fatal(err)
		}
		if err := b.Check(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestStatFields(t *testing.T) {
	f := statFields("12 (a) b) S 1 2 3")
	if len(f) != 4 || f[0] != "S" {
		t.Errorf("fields %q", f)
	}
	if kb := statusKB("Name:\tx\nVmRSS:\t  123 kB\n", "VmRSS:"); kb != 123 {
		t.Errorf("VmRSS = %d", kb)
	}
}

// A machine has the tree's files, its own name, and takes with it what it wrote.
func TestMachine(t *testing.T) {
	if testing.Short() || os.Getenv("BATON_KERNEL") == "" {
		t.Skip("SKIPPED, reason: set BATON_KERNEL=1 for suites that make a Debian tree")
	}
	tree, err := DebTree()
	Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir := Dir(t)
	m, err := NewMachine("m1", tree, filepath.Join(dir, "m1"))
	Need(t, err)
	defer m.Close()
	if err := m.Write(ctx, "/etc/new/file", "text\n", 0o640); err != nil {
		t.Fatal(err)
	}
	if err := m.Share(ctx, dir, "/srv/shared"); err != nil {
		t.Fatal(err)
	}
	out, err := m.Sh(ctx, "uname -n; cat /etc/new/file /etc/debian_version; stat -c %a /etc/new/file; echo out >/srv/shared/out; echo /dev/shm/*; ls /dev/null")
	if err != nil || !strings.HasPrefix(out, "m1\ntext\n12.") || !strings.Contains(out, "\n640\n/dev/shm/*\n/dev/null\n") {
		t.Errorf("%q, %v", out, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(b) != "out\n" {
		t.Errorf("shared: %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(tree, "etc/new")); err == nil {
		t.Error("the tree was written to")
	}
}
