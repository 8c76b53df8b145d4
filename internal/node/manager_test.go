package node

import (
	"encoding/json"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// assigned is the address as the registry has it.
func assigned(t *testing.T, n *Node, index uint32) mgs.VIP {
	t.Helper()
	l := vips(t, n.reg)
	i := slices.IndexFunc(l, func(v mgs.VIP) bool { return v.Index == index })
	if i < 0 {
		t.Fatalf("no address %d among %+v", index, l)
	}
	return l[i]
}

// The node that runs the registry decides who serves floating addresses: it asks all
// nodes, gives the addresses to those that can serve, and takes them from one that
// stops. Nodes exchange beats with everybody as soon as there is such an address.
func TestManagerDecides(t *testing.T) {
	c := newCell(t)
	a, b, k := c.up("a"), c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	if got := a.Manager(); got.Leads {
		t.Errorf("a leads without the registry: %+v", got)
	}
	until(t, "b to lead", func() bool { return b.Manager().Leads })
	var mu sync.Mutex
	var events []manager.Event
	note := func(e manager.Event) {
		mu.Lock()
		events = append(events, e)
		mu.Unlock()
	}
	b.cluster.managing.onEvent.Store(&note)

	v, err := b.cluster.reg.AddVIP(ctx, mgs.VIPSpec{Addr: netip.MustParseAddr("127.0.0.77"), Bits: 8, Prefer: []string{"c", "a", "b"}})
	if err != nil {
		t.Fatal(err)
	}
	// c has no frontend.
	until(t, "the address to be assigned", func() bool { return assigned(t, b, v.Index).Next == "a" })
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
		s := b.Manager()
		return s.Leads && s.Term != 0 && s.Quorum && len(s.Nodes) == 3 && s.Nodes[0].Fit && s.Nodes[1].Fit && !s.Nodes[2].Fit && s.Nodes[2].Why != ""
	})

	// It serves the address; how that is done is not the manager's business.
	at := manager.Address{Index: v.Index, State: manager.Serving}
	if _, err := a.cluster.reg.SetReady(ctx, v.Index, assigned(t, a, v.Index).MoveID); err != nil {
		t.Fatal(err)
	}
	taken, err := a.cluster.reg.Take(ctx, v.Index, assigned(t, a, v.Index).MoveID)
	if err != nil {
		t.Fatal(err)
	}
	at.Epoch = taken.Epoch
	list := func() []manager.Address { return []manager.Address{at} }
	a.cluster.managing.addresses.Store(&list)

	// A node that stops has its address moved, and is asked until it has given it up.
	a.stopping.Store(true)
	until(t, "the address to move away from a node that stops", func() bool { return assigned(t, b, v.Index).Next == "b" })
	if v := assigned(t, b, v.Index); v.Node != "a" || v.Clean {
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
	c := newCell(t)
	c.change = func(k *config.Config) { k.Manager.Mode = config.ManagerExternal }
	b := c.up("b")
	c.ready(b)
	if b.cluster.managing.m != nil || b.Manager().Leads {
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
