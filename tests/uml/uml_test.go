package uml

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

func node(t *testing.T) *bed.Node {
	t.Helper()
	if os.Getenv("BATON_KERNEL") != "1" {
		t.Skip("SKIPPED, reason: guests are booted only with BATON_KERNEL=1 (make test)")
	}
	n, err := bed.NewNode("uml")
	bed.Need(t, err)
	t.Cleanup(func() { n.Close() })
	if err := n.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	if err := n.AddTap("tap0", "br0"); err != nil {
		t.Fatal(err)
	}
	return n
}

func boots(t *testing.T) {
	n := node(t)
	work, err := bed.Build("./tests/kernel/work")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r, err := Run(ctx, Config{Node: n, Tap: "tap0", Addr: netip.MustParsePrefix("10.77.0.11/24"), Dir: bed.Dir(t), Work: work,
		Script: "uname -r; ping -c1 -W2 10.77.0.1 >/dev/null || cat /proc/net/dev; grep nfs /proc/filesystems; exit 7"})
	bed.Need(t, err)
	if r.Status != 7 || !strings.Contains(r.Output, "nfs4") {
		t.Fatalf("status %d, want 7; output:\n%s\nconsole:\n%s", r.Status, r.Output, r.Console)
	}
}

func TestBoots(t *testing.T) { boots(t) }

func TestBootsWithShim(t *testing.T) {
	t.Setenv(ShimEnv, "1")
	boots(t)
}

func TestTimeLimit(t *testing.T) {
	n := node(t)
	work, err := bed.Build("./tests/kernel/work")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g, err := Start(ctx, Config{Node: n, Tap: "tap0", Addr: netip.MustParsePrefix("10.77.0.11/24"), Dir: bed.Dir(t), Work: work, Script: "sleep 1000"})
	bed.Need(t, err)
	short, cancel2 := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel2()
	if _, err := g.Wait(short); err == nil {
		t.Fatal("a guest that sleeps finished in time")
	}
}
