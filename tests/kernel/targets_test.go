package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// TestTargetsKilled lets a client work through one frontend, whose targets run on
// two other nodes. Those are killed, stopped, and their targets taken over by each
// other, again and again. The client must see nothing but delay: no error, each
// operation done exactly once, everything there.
// SM 50, RS 70c, HX IN 15, CS 41c.
func TestTargetsKilled(t *testing.T) {
	n := rounds(t, 50)
	front := &bed.Member{Name: "front", Addr: netip.MustParseAddr("127.0.0.2"), Serve: netip.MustParseAddr(serverAddr)}
	meta := &bed.Member{Name: "meta", Addr: netip.MustParseAddr("127.0.0.3"), Start: []string{"MGS", "MDT0000"}}
	data := &bed.Member{Name: "data", Addr: netip.MustParseAddr("127.0.0.4"), Start: []string{"OST0000", "OST0001"}}
	var c *bed.Cluster
	w := newWorldWith(t, bed.Config{}, func(cfg bed.Config) (s bed.Server, err error) {
		c, err = bed.NewCluster(cfg, front, meta, data)
		return c, err
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(n)*30*time.Second+2*time.Minute)
	defer cancel()
	m := w.crashClient(ctx, t)
	defer func() {
		if !t.Failed() {
			return
		}
		for _, b := range []*bed.Member{front, meta, data} {
			if b.Running() {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				out, err := c.Baton(ctx, b, "status")
				cancel()
				t.Logf("status of %s: %v\n%s", b.Name, err, out)
			}
		}
	}()
	restart := func(b *bed.Member) {
		if err := c.StartMember(ctx, b); err != nil {
			t.Fatal(err)
		}
	}
	baton := func(b *bed.Member, args ...string) {
		t.Helper()
		if out, err := c.Baton(ctx, b, args...); err != nil {
			t.Fatalf("%s: baton %v: %v\n%s\n%s", b.Name, args, err, out, c.Log())
		}
	}
	for i := 1; i <= n; i++ {
		m.work(ctx, t, 200, 800)
		var what string
		switch k := m.r.IntN(10); {
		case k < 3:
			what = "kill of the MDT's node"
			meta.Kill()
			restart(meta)
		case k < 6:
			what = "kill of the OSTs' node"
			data.Kill()
			restart(data)
		case k < 7:
			what = "kill of all targets at once"
			meta.Kill()
			data.Kill()
			restart(data)
			restart(meta)
		case k < 8:
			what = "an OST moved in order, and back"
			baton(data, "target", "stop", "OST0001")
			baton(meta, "target", "start", "OST0001")
			m.work(ctx, t, 200, 300)
			baton(meta, "target", "stop", "OST0001")
			baton(data, "target", "start", "OST0001")
		case k < 9:
			what = "the MDT moved in order, and back"
			baton(meta, "target", "stop", "MDT0000")
			baton(data, "target", "start", "MDT0000")
			m.work(ctx, t, 200, 300)
			baton(data, "target", "stop", "MDT0000")
			baton(meta, "target", "start", "MDT0000")
		default:
			what = "take-over of a dead node's OST, and its move back"
			data.Kill()
			baton(meta, "target", "start", "OST0000")
			restart(data)
			m.work(ctx, t, 200, 300)
			baton(meta, "target", "stop", "OST0000")
			baton(data, "target", "start", "OST0000")
		}
		if i%5 == 0 || i == n {
			short, cancel := context.WithTimeout(ctx, 2*time.Minute)
			m.verify(short, t, fmt.Sprintf("round %d, %s", i, what))
			cancel()
		}
	}
	m.end(ctx, t)
}
