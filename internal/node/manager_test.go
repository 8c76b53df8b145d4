package node

import (
	"encoding/json"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// The node that runs the registry decides who serves floating addresses: it asks all
// nodes, gives the addresses to those that can serve, and takes them from one that
// stops. Nodes exchange beats with everybody as soon as there is such an address.
func TestManagerDecides(t *testing.T) {
	c := newFloatCell(t).managed()
	k, a, b := c.up("c"), c.up("a"), c.up("b")
	c.ready(a)
	c.ready(b)
	if got := a.Manager(); got.Leads {
		t.Errorf("a leads without the registry: %+v", got)
	}
	until(t, "c to lead", func() bool { return k.Manager().Leads })
	var mu sync.Mutex
	var events []manager.Event
	note := func(e manager.Event) {
		mu.Lock()
		events = append(events, e)
		mu.Unlock()
	}
	k.cluster.managing.onEvent.Store(&note)

	// c has no frontend.
	if _, err := c.reg(k).AddVIP(ctx, mgs.VIPSpec{Addr: floatAddr, Bits: 32, Interface: "lo", Prefer: []string{"c", "a", "b"}}); err != nil {
		t.Fatal(err)
	}
	c.become(a, vipagent.Serving)
	until(t, "everybody to hear everybody", func() bool {
		for _, n := range []*Node{a, b, k} {
			for _, p := range n.cluster.health.Status() {
				if p.State != health.StateAlive {
					return false
				}
			}
		}
		return true
	})
	until(t, "the opinion of all nodes", func() bool {
		s := k.Manager()
		return s.Leads && s.Term != 0 && s.Quorum && len(s.Nodes) == 3 && s.Nodes[0].Fit && s.Nodes[1].Fit && !s.Nodes[2].Fit && s.Nodes[2].Why != ""
	})

	// A node that stops has its address moved, in order.
	a.stopping.Store(true)
	c.become(b, vipagent.Serving)
	c.become(a, vipagent.Absent)
	if v := c.vip(k); v.Node != "b" || v.Epoch != 3 || v.NSMState != 1 {
		t.Errorf("%+v: it was to be given up in order", v)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.ContainsFunc(events, func(e manager.Event) bool {
		return e.Kind == manager.DecisionEvent && e.From == "a" && e.To == "b" && e.Err == ""
	}) {
		t.Errorf("events %+v", events)
	}
}

// With another mode nobody decides; questions are answered all the same.
func TestManagerOff(t *testing.T) {
	c := newFloatCell(t)
	k, b := c.up("c"), c.up("b")
	c.ready(b)
	if k.cluster.managing.m != nil || k.Manager().Leads {
		t.Error("there is a manager")
	}
	fn := b.cluster.asks.methods[reportMethod]
	got, err := fn(ctx, "a", json.RawMessage(`{"term":1}`))
	if r, ok := got.(*manager.Report); err != nil || !ok || !r.Ready || r.Incarnation == 0 || len(r.Hears) != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := fn(ctx, "a", json.RawMessage(`{"term":"x"}`)); err == nil {
		t.Error("a question that is none was answered")
	}
}

func TestLoad(t *testing.T) {
	var l loadKeeper
	at, n, ok := time.Unix(1e9, 0), uint64(1000), true
	step := func(d time.Duration, k uint64, want float64) {
		t.Helper()
		at, n = at.Add(d), n+k
		if got := l.now(at, func() (uint64, bool) { return n, ok }); got != want {
			t.Errorf("%v, not %v", got, want)
		}
	}
	step(0, 0, 0) // nothing is known yet
	step(2*time.Second, 100, 50)
	step(time.Millisecond, 1000, 50)
	n = 0
	step(time.Second, 0, 0) // an address has gone
	step(time.Second, 7, 7)
	ok = false
	step(time.Second, 7, 7)
}

// A node that stops waits for others to take its addresses, but not those that no other
// node may serve.
func TestStopWithAddressOfOneNode(t *testing.T) {
	c := newFloatCell(t).managed()
	managed := c.change
	c.change = func(k *config.Config) {
		managed(k)
		k.Failover.StopWait = config.Duration(10 * time.Minute)
	}
	k, a := c.up("c"), c.up("a")
	c.ready(a)
	v, err := c.reg(k).AddVIP(ctx, mgs.VIPSpec{Addr: floatAddr, Bits: 32, Interface: "lo", Prefer: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	c.become(a, vipagent.Serving)
	until(t, "a to hear c", func() bool { return a.cluster.lives.has("c") })
	if a.cluster.othersServe(&v) {
		t.Error("another node may serve the address")
	}
	v.Prefer = append(v.Prefer, "b")
	if a.cluster.othersServe(&v) {
		t.Error("a node that is away may serve the address")
	}
	v.Prefer = append(v.Prefer, "c")
	if !a.cluster.othersServe(&v) {
		t.Error("c may serve the address")
	}
	var stopped atomic.Bool
	go func() {
		c.down("a", a)
		stopped.Store(true)
	}()
	until(t, "a to stop", stopped.Load)
	if v := c.vip(k); !v.Clean {
		t.Errorf("%+v: it was to be given up in order", v)
	}
}
