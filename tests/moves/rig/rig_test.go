package rig

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) {
	Patient = true
	bed.Main(m)
}

// TestMovers moves an address of each service that is compared, and cuts the power of
// its owner, with a probe that reads what it wrote before.
func TestMovers(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: CTDB alone needs most of a minute")
	}
	for _, name := range []string{"cold", "baton", "baton-etcd", "baton-manual", "keepalived", "ctdb"} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
			defer cancel()
			a := VIP(0)
			n, m, err := NewMover(name, bed.Dir(t), a)
			bed.Need(t, err)
			defer n.Close()
			err = m.Start(ctx)
			bed.Need(t, err)
			write := func(text string) {
				t.Helper()
				p, err := NewProbe(ctx, n.Hub, a)
				if err != nil {
					t.Fatalf("%v\n%s", err, m.Log())
				}
				defer p.Close()
				if text == "first" {
					if _, err := p.Create(p.Root, "file"); err != nil {
						t.Fatal(err)
					}
				} else if b, err := p.Read("file", 100); err != nil || len(b) == 0 {
					t.Fatalf("read %q, %v", b, err)
				}
				if err := p.Write("file", []byte(text)); err != nil {
					t.Fatal(err)
				}
			}
			write("first")
			from := m.Owner(a)
			others := slices.DeleteFunc(m.Nodes(), func(x string) bool { return x == from })
			start := time.Now()
			if err := m.Move(ctx, a, others[0]); err != nil {
				t.Fatalf("%v\n%s", err, m.Log())
			}
			t.Logf("moved in %v", time.Since(start))
			if got := m.Owner(a); got != others[0] {
				t.Fatalf("moved to %q, want %q", got, others[0])
			}
			write("second")
			start = time.Now()
			if err := m.Kill(ctx, others[0]); err != nil {
				t.Fatal(err)
			}
			if err := m.TakeOver(ctx, a, from); err != nil {
				t.Fatalf("%v\n%s", err, m.Log())
			}
			t.Logf("taken over in %v", time.Since(start))
			write("third")
			if err := m.Restart(ctx, others[0]); err != nil {
				t.Fatalf("%v\n%s", err, m.Log())
			}
			if err := m.Move(ctx, a, others[0]); err != nil {
				t.Fatalf("%v\n%s", err, m.Log())
			}
			write("fourth")
			if e, ok := m.(interface {
				Events(context.Context) (string, error)
			}); ok {
				events, err := e.Events(ctx)
				if err != nil {
					t.Error(err)
				}
				t.Logf("events:\n%s", events)
			}
			if err := m.Stop(ctx); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestWatchFinds plants an address on two machines, and a socket on one that does
// not have the address.
func TestWatchFinds(t *testing.T) {
	n, err := NewNet("a", "b")
	bed.Need(t, err)
	defer n.Close()
	a := VIP(0)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	first := NewCold(n, bed.Dir(t), a)
	if err := first.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer first.Stop(ctx)
	find := func(text string) {
		t.Helper()
		w := NewWatch(n, a)
		defer w.Stop()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			found := w.Found()
			if text == "" {
				if w.mu.Lock(); w.looks > 5 {
					w.mu.Unlock()
					if len(found) > 0 {
						t.Fatalf("found %q, though all is well", found)
					}
					return
				}
				w.mu.Unlock()
				continue
			}
			if len(found) > 0 {
				if !strings.Contains(found[0], text) {
					t.Fatalf("found %q, want %q", found, text)
				}
				return
			}
			if time.Now().After(end) {
				t.Fatalf("did not find %q", text)
			}
		}
	}
	find("")
	b := n.Machine("b").Node()
	if err := b.AddAddr("eth0", first.vips[a].prefix); err != nil {
		t.Fatal(err)
	}
	find("10.77.0.101 is on a and b")
	// A connection made there stays when the address goes.
	p, err := b.DialContext(ctx, "tcp", "10.77.0.101:2049")
	if err == nil {
		p.Close()
		t.Fatal("b answers at an address that nobody serves there")
	}
	l := listen(t, b, "10.77.0.101:2050")
	defer l.Close()
	c, err := b.DialContext(ctx, "tcp", "10.77.0.101:2050")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := b.DelAddr("eth0", first.vips[a].prefix); err != nil {
		t.Fatal(err)
	}
	find("10.77.0.101 is on a, and b has")
}

func TestOpLog(t *testing.T) {
	name := filepath.Join(t.TempDir(), "ops.log")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := Client{log: opLog{f: r, ops: map[string][]Op{}}}
	us := func(n int64) time.Time { return time.UnixMicro(n) }
	longest := func(from, to int64) string {
		t.Helper()
		o, err := c.Longest(us(from), us(to))
		if err != nil {
			t.Fatal(err)
		}
		return o.Op
	}
	// A line may come in pieces.
	for _, piece := range []string{"seq0 write 1000 50\nseq0 write2 2", "000 500\n", "lock1 lock 1000 9000\nseq0 read 3000 20\n"} {
		if _, err := f.WriteString(piece); err != nil {
			t.Fatal(err)
		}
		longest(0, 1)
	}
	for _, x := range []struct {
		from, to int64
		want     string
	}{{0, 900, ""}, {1000, 1100, "write"}, {2100, 2200, "write2"}, {2600, 5000, "read"}, {0, 9000, "write2"}} {
		if got := longest(x.from, x.to); got != x.want {
			t.Errorf("between %d and %d: %q, want %q", x.from, x.to, got, x.want)
		}
	}
	// A guest whose clock is 2 s late began this 100 µs after it was 5 s.
	c.log.clock = filepath.Join(t.TempDir(), "clock")
	if err := os.WriteFile(c.log.clock, []byte("8000000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(c.log.clock, us(10e6), us(10e6)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("seq0 late 3000100 7000\n"); err != nil {
		t.Fatal(err)
	}
	if got := longest(5e6, 6e6); got != "late" || c.Ahead() != -2*time.Second {
		t.Errorf("a late clock: %q, ahead %v", got, c.Ahead())
	}
	for _, bad := range []string{"", "a b c d", "a b 1", "a b 1 2 3"} {
		if o, err := parseOp(bad); err == nil {
			t.Errorf("%q: %+v", bad, o)
		}
	}
	if !bytes.Contains([]byte((&ClientConfig{Name: "x", VIP: VIP(0), With: "seq"}).script(1)), []byte("10.77.0.101:/rw")) {
		t.Error("the script does not mount the address")
	}
}

func listen(t *testing.T, n *bed.Node, addr string) (l net.Listener) {
	t.Helper()
	if err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return l
}
