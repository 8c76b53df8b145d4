package moves

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

// TestCheckersCatch does behind the clients' backs what a bad move would do, and
// expects each of them to notice.
func TestCheckersCatch(t *testing.T) {
	t.Setenv(moverEnv, "cold")
	w := newWorld(t, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a := w.vips[0]
	p, err := rig.NewProbe(ctx, w.net.Hub, a)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const shared = "/mnt/nfs/all/"
	for i, x := range []struct {
		name, with, flags, want string
		plant                   func(c *rig.Client) error
	}{
		{"data-is-lost", "seq", "", "bytes differ", func(*rig.Client) error {
			dir, err := p.Lookup("data-is-lost/seq0")
			if err != nil {
				return err
			}
			es, err := p.ReadDir(dir)
			for _, e := range es {
				if strings.HasPrefix(e.Name, "seq") {
					// It may have been removed meanwhile; then there is another one at the next attempt.
					p.Write("data-is-lost/seq0/"+e.Name, []byte("planted!"))
				}
			}
			return err
		}},
		{"executed-twice", "storm", "", "as if executed exactly once|no such file|names|must not exist|links", func(*rig.Client) error {
			dir, err := p.Lookup("executed-twice/storm0")
			if err != nil {
				return err
			}
			es, err := p.ReadDir(dir)
			if len(es) > 0 {
				p.Unlink(dir, es[0].Name, false) // a late second execution of a REMOVE; a directory stays
			}
			return err
		}},
		{"lock-given-twice", "lock", "-counters " + shared + "planted", "has counted to|together", func(*rig.Client) error {
			b := make([]byte, 72)
			b[7], b[71] = 1, 1 // somebody has written what he read before others counted
			return p.Write("all/planted", b)
		}},
		{"lock-is-lost", "lock", "-counters " + shared + "other -held " + shared + "nobody", "though another client holds it", func(c *rig.Client) error {
			return c.Order("held")
		}},
	} {
		c, err := w.net.StartClient(ctx, i, bed.Dir(t), rig.ClientConfig{Name: x.name, VIP: a, With: x.with, Flags: x.flags, Seed: uint64(i)})
		bed.Need(t, err)
		t.Cleanup(c.Kill)
		if x.name == "lock-is-lost" {
			all, err := p.Lookup("all")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Create(all, "nobody"); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Moving(ctx, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := c.Verify(ctx); err != nil {
			t.Fatalf("%s: before anything was planted: %v", x.name, err)
		}
		for c.Failed() == nil {
			if err := x.plant(c); err != nil {
				t.Fatalf("%s: %v", x.name, err)
			}
			short, end := context.WithTimeout(ctx, 5*time.Second)
			c.Verify(short)
			end()
			if ctx.Err() != nil {
				t.Fatalf("%s: the client does not notice", x.name)
			}
		}
		got := c.Failed().Error()
		ok := false
		for want := range strings.SplitSeq(x.want, "|") {
			ok = ok || strings.Contains(got, want)
		}
		if !ok {
			t.Errorf("%s: %s, want %s", x.name, got, x.want)
		}
		t.Logf("%s: %s", x.name, got)
	}
}
