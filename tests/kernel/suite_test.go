package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/uml"
)

func TestMain(m *testing.M) { bed.Main(m) }

const serverAddr = "10.77.0.1"

// lockingMount is how tests whose programs lock files on their own mount: with
// nolock their locks stay in the client, with vers=3 alone the server gives them.
const lockingMount = "vers=3"

var exports = []bed.Export{{Path: "/rw"}, {Path: "/ro", ReadOnly: true}, {Path: "/sq", RootSquash: true}}

// world is one server in a node with a bridge and two tap interfaces.
type world struct {
	node *bed.Node
	srv  bed.Server
	work string
}

// guest is what one client of a test does.
type guest struct {
	// script runs under sh -e in a directory of its own on the mounted export.
	script string
	// options of the mount; "" mounts without -o. export is "/rw" if empty.
	options, export string
	// server is the address to mount from, serverAddr if empty.
	server string
	// dir is the directory's name on the export, the test's name if empty.
	dir string
	// raw runs the script without mounting anything.
	raw bool
	// share is a directory of the host that the guest sees as $SHARE.
	share string
	mem   int
	// host and state are the guest's host name and its /var/lib/nfs (uml.Config).
	host, state string
}

// newWorld makes a node and starts the chosen server in it.
func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, bed.ServerName(), bed.Config{})
}

// newWorldOf makes a node and starts the named server in it. Of the
// configuration, what every world has is filled in.
func newWorldOf(t *testing.T, server string, c bed.Config) *world {
	t.Helper()
	return newWorldWith(t, c, func(c bed.Config) (bed.Server, error) { return bed.NewServer(server, c) })
}

// newWorldWith makes a node and starts the server that mk makes for it.
func newWorldWith(t *testing.T, c bed.Config, mk func(bed.Config) (bed.Server, error)) *world {
	t.Helper()
	if os.Getenv("BATON_KERNEL") != "1" {
		t.Skip("SKIPPED, reason: the kernel client's suite runs only with BATON_KERNEL=1 (make test)")
	}
	bed.Need(t, uml.Available())
	n, err := bed.NewNode("world")
	bed.Need(t, err)
	t.Cleanup(func() { n.Close() })
	if err := n.AddBridge("br0", netip.MustParsePrefix(serverAddr+"/24")); err != nil {
		t.Fatal(err)
	}
	for _, tap := range []string{"tap0", "tap1"} {
		if err := n.AddTap(tap, "br0"); err != nil {
			t.Fatal(err)
		}
	}
	w := &world{node: n}
	c.Node, c.Dir, c.Addr, c.Exports = n, bed.Dir(t), netip.MustParseAddr(serverAddr), exports
	w.srv, err = mk(c)
	bed.Need(t, err)
	if w.work, err = bed.Build("./tests/kernel/work"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := w.srv.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.srv.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", w.srv.Log())
		}
		w.check(t)
	})
	return w
}

// check checks the stopped server's store, if it can be checked.
func (w *world) check(t *testing.T) {
	t.Helper()
	c, ok := w.srv.(bed.Checker)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := c.Check(ctx); err != nil {
		t.Error(err)
	}
}

var unsafeName = regexp.MustCompile(`[^A-Za-z0-9]+`)

// shell returns the guest's whole script.
func (w *world) shell(t *testing.T, g guest) string {
	if g.raw {
		return g.script
	}
	if g.export == "" {
		g.export = "/rw"
	}
	o := ""
	if g.options != "" {
		o = "-o " + g.options
	}
	if g.server == "" {
		g.server = serverAddr
	}
	if g.dir == "" {
		g.dir = unsafeName.ReplaceAllString(t.Name(), "-")
	}
	return fmt.Sprintf(`mount -t nfs %s %s:%s $MNT || exit 90
D=$MNT
if [ %s = /rw ]; then D=$MNT/%s; mkdir -p $D || exit 91; fi
cd $D || exit 92
cat >/run/test.sh <<'END_OF_TEST'
%s
END_OF_TEST
sh -e /run/test.sh || exit $?
cd /
umount $MNT || exit 93`, o, g.server, g.export, g.export, g.dir, g.script)
}

// start boots guest number i.
func (w *world) start(ctx context.Context, t *testing.T, i int, g guest) *uml.Guest {
	t.Helper()
	m, err := uml.Start(ctx, uml.Config{
		Node: w.node, Tap: fmt.Sprint("tap", i), Addr: netip.MustParsePrefix(fmt.Sprintf("10.77.0.%d/24", 11+i)),
		Dir: bed.Dir(t), Work: w.work, Share: g.share, MemoryMiB: g.mem, Script: w.shell(t, g),
		Hostname: g.host, StateDir: g.state,
	})
	bed.Need(t, err)
	return m
}

// finish waits for a guest and fails the test unless its script ended with 0.
func finish(ctx context.Context, t *testing.T, m *uml.Guest) uml.Result {
	t.Helper()
	r, err := m.Wait(ctx)
	if err != nil {
		t.Errorf("%v\noutput:\n%s", err, r.Output)
		return r
	}
	if r.Status != 0 {
		why := map[int]string{90: " (mount failed)", 91: " (mkdir failed)", 92: " (cd failed)", 93: " (umount failed)"}[r.Status]
		t.Errorf("guest's status %d%s\noutput:\n%s\nkernel:\n%s", r.Status, why, lastLines(r.Output, 60), lastLines(r.Dmesg, 15))
	}
	for _, bad := range []string{"BUG:", "Oops", "general protection", "NFS: server error"} {
		if strings.Contains(r.Dmesg, bad) {
			t.Errorf("the guest's kernel complained:\n%s", lastLines(r.Dmesg, 40))
		}
	}
	return r
}

// run runs guests at once and returns their results.
func (w *world) run(t *testing.T, limit time.Duration, gs ...guest) []uml.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var ms []*uml.Guest
	for i, g := range gs {
		ms = append(ms, w.start(ctx, t, i, g))
	}
	rs := make([]uml.Result, len(ms))
	var wg sync.WaitGroup
	for i, m := range ms {
		wg.Go(func() { rs[i] = finish(ctx, t, m) })
	}
	wg.Wait()
	for _, r := range rs {
		t.Logf("output:\n%s", lastLines(r.Output, 25))
	}
	return rs
}

func lastLines(s string, n int) string {
	l := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(l[max(0, len(l)-n):], "\n")
}

// need skips the test with a reason if a program is missing.
func need(t *testing.T, progs ...string) {
	t.Helper()
	for _, p := range progs {
		_, err := bed.LookPath(p)
		bed.Need(t, err)
	}
}
