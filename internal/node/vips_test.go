package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// The orders for addresses, given on a node without targets, change the registry on
// another.
func TestVIPOrders(t *testing.T) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := newCell(t)
	c.change = func(k *config.Config) {
		if k.Cluster.Node == "a" {
			k.Manager.Mode = config.ManagerExternal
		}
	}
	a, b := c.up("a"), c.up("b")
	until(t, "the registry", func() bool { return state(b, "MGS") == status.StateUp })
	addr, other := netip.MustParseAddr("127.0.9.1"), netip.MustParseAddr("127.0.9.2")
	refused := func(what, want string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	one := func() status.Floating {
		t.Helper()
		l, err := a.ListVIPs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(l, func(v status.VIP) bool { return v.Addr == addr.String() })
		if i < 0 {
			t.Fatalf("%+v", l)
		}
		return *l[i].Floating
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := a.AddVIP(ctx, mgs.VIPSpec{Addr: addr, Bits: 8, Prefer: []string{"a", "x"}})
	refused("a node that is none", `no node "x"`, err)
	_, err = a.AddVIP(ctx, mgs.VIPSpec{Addr: addr, Bits: 8, Prefer: []string{"a", "b"}})
	must(err)
	_, err = a.MoveVIP(ctx, other, "b", false)
	refused("an address that is none", "no address", err)
	_, err = a.MoveVIP(ctx, addr, "x", false)
	refused("to a node that is none", `no node "x"`, err)
	_, err = a.MoveVIP(ctx, addr, "c", false)
	refused("to a node that may not", "may not serve", err)
	// Whoever serves it: this is about the registry.
	reg := a.cluster.reg
	serve := func(node string) mgs.VIP {
		t.Helper()
		m, err := a.MoveVIP(ctx, addr, node, false)
		must(err)
		v, err := reg.Watch(ctx, "")
		must(err)
		i := slices.IndexFunc(v.VIPs, func(x mgs.VIP) bool { return x.Addr == addr })
		x, err := c.nodes[node].cluster.reg.Take(ctx, v.VIPs[i].Index, m.MoveID)
		must(err)
		return x
	}
	v := serve("b")
	index := v.Index
	if f := one(); f.State() != "served" || f.Node != "b" {
		t.Errorf("%+v", f)
	}
	// What this node has of it is shown.
	a.cluster.sources.Store(&vipSources{local: func() map[uint32]status.VIPLocal {
		return map[uint32]status.VIPLocal{index: {Node: "a", State: status.VIPListening}}
	}})
	if f := one(); f.Local == nil || f.Local.State != status.VIPListening {
		t.Errorf("%+v", f)
	}
	m, err := a.MoveVIP(ctx, addr, "a", false)
	must(err)
	if f := one(); m.From != "b" || m.To != "a" || m.MoveID != f.MoveID || f.State() != "moving" {
		t.Errorf("%+v, %+v", m, f)
	}
	nodes, err := b.ListNodes(ctx)
	must(err)
	if len(nodes) != 3 || !nodes[1].This || !slices.Equal(nodes[1].Serves, []string{addr.String()}) || !slices.Equal(nodes[0].Next, []string{addr.String()}) || nodes[0].Drained {
		t.Errorf("%+v", nodes)
	}
	// By force its owner is gone.
	_, err = a.MoveVIP(ctx, addr, "a", true)
	must(err)
	if f := one(); f.State() != "starting" || f.Node != "" || f.Clean {
		t.Errorf("%+v", f)
	}
	if v = serve("a"); !v.Crashed {
		t.Errorf("%+v", v)
	}
	// Drained by order, and given back to the best that answers and is not drained.
	must(b.DrainNode(ctx, "a", true))
	refused("a node that is none", `no node "x"`, b.DrainNode(ctx, "x", true))
	_, err = a.DrainVIP(ctx, addr, true, "")
	must(err)
	if f := one(); f.State() != "draining" || f.Next != "" {
		t.Errorf("%+v", f)
	}
	must(reg.Stopped(ctx, v.Index, v.Epoch))
	_, err = a.MoveVIP(ctx, addr, "b", false)
	refused("a drained address", "vip undrain", err)
	m, err = a.DrainVIP(ctx, addr, false, "")
	must(err)
	if f := one(); m.To != "b" || f.Next != "b" || f.Drained {
		t.Errorf("%+v, %+v", m, f)
	}
	must(b.DrainNode(ctx, "a", false))
	// A node with a manager leaves the choice to that, which finds nobody here.
	_, err = b.DrainVIP(ctx, addr, true, "")
	must(err)
	m, err = b.DrainVIP(ctx, addr, false, "")
	must(err)
	if f := one(); m.To != "" || f.Next != "" || f.Drained {
		t.Errorf("%+v, %+v", m, f)
	}
	m, err = b.DrainVIP(ctx, addr, false, "b")
	must(err)
	if f := one(); m.To != "b" || f.Next != "b" {
		t.Errorf("%+v, %+v", m, f)
	}
	_, err = a.SetVIP(ctx, mgs.VIPSpec{Addr: addr, Bits: 16})
	must(err)
	v = serve("b")
	must(a.RemoveVIP(ctx, addr, false))
	if f := one(); f.State() != "removing" || f.Bits != 16 {
		t.Errorf("%+v", f)
	}
	must(a.RemoveVIP(ctx, addr, true))
	if l, err := a.ListVIPs(ctx); err != nil || len(l) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	refused("an address that was removed", "does not float", a.RemoveVIP(ctx, addr, false))
	_, err = a.AddVIP(ctx, mgs.VIPSpec{Addr: netip.MustParseAddr("127.0.0.2"), Bits: 8})
	if err != nil { // it is a's by configuration, as soon as that serves
		refused("an address of a node", "nfs.addresses", err)
	}
}

// The fixed address of a node that is lost is given to another one by order, as after a crash;
// not while the node answers.
func TestFixedAddressOfALostNode(t *testing.T) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := newCell(t)
	c.start = map[string][]string{"c": {"MGS"}}
	c.up("c")
	a, b := c.up("a"), c.up("b")
	addr, free := netip.MustParseAddr("127.0.9.1"), netip.MustParseAddr("127.0.9.2")
	old, err := b.reg.Serve(ctx, addr, "b")
	if err != nil {
		t.Fatal(err)
	}
	refused := func(err error, want ...string) {
		t.Helper()
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("no %q in: %v", w, err)
			}
		}
	}
	refused(a.RemoveVIP(ctx, addr, true), "node b", "is alive", "nfs.addresses")
	refused(b.RemoveVIP(ctx, addr, true), "node b", "is alive")
	refused(a.RemoveVIP(ctx, addr, false), "does not float")
	refused(a.RemoveVIP(ctx, free, true), "no address")
	c.down("b", b)
	_, err = a.reg.Serve(ctx, addr, "a")
	refused(err, "node b", "vip remove "+addr.String()+" --force")
	_, err = a.AddVIP(ctx, mgs.VIPSpec{Addr: addr, Bits: 8})
	refused(err, "node b", "vip remove "+addr.String()+" --force")
	if err := a.RemoveVIP(ctx, addr, true); err != nil {
		t.Fatal(err)
	}
	refused(a.RemoveVIP(ctx, addr, true), "nobody serves it")
	v, err := a.reg.Serve(ctx, addr, "a")
	if err != nil || !v.Crashed || v.Node != "a" || v.Epoch != old.Epoch+1 || v.NSMState != old.NSMState+2 || v.Index != old.Index {
		t.Errorf("%+v after %+v, %v", v, old, err)
	}
}

// fakeLog is an event log.
type fakeLog []events.Event

func (l fakeLog) Since(seq uint64) ([]events.Event, uint64) {
	i := slices.IndexFunc(l, func(e events.Event) bool { return e.Seq > seq })
	if i < 0 {
		return nil, uint64(len(l))
	}
	return slices.Clone(l[i:]), uint64(len(l))
}

// Events of all nodes that answer come together, in pages, and go on where they were.
func TestEventsOfAllNodes(t *testing.T) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := newCell(t)
	a, b := c.up("a"), c.up("b")
	addr, other := netip.MustParseAddr("127.0.9.1"), netip.MustParseAddr("127.0.9.2")
	start := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	event := func(node string, seq int, at netip.Addr) events.Event {
		return events.Event{Seq: uint64(seq), Node: node, Time: start.Add(time.Duration(seq) * time.Second), Kind: events.Stage, Addr: at, Reason: strings.Repeat("x", 500)}
	}
	var la, lb fakeLog
	const n = 300 // more than an answer has room for
	for i := range n {
		lb = append(lb, event("b", i+1, []netip.Addr{addr, other, {}}[i%3]))
	}
	la = append(la, event("a", 1, addr))
	for _, x := range []struct {
		n *Node
		l fakeLog
	}{{a, la}, {b, lb}} {
		x.n.cluster.sources.Store(&vipSources{log: x.l})
	}
	until(t, "both nodes", func() bool { return a.cluster.ask(ctx, "b", askEvents, eventsAsk{}, &eventsPage{}) == nil })
	r, err := a.Events(ctx, control.EventsArgs{})
	if err != nil || len(r.Events) != n+1 || r.Next["a"] != 1 || r.Next["b"] != n || len(r.Silent) != 1 || r.Silent["c"] == "" {
		t.Fatalf("%d events, next %v, silent %v, %v", len(r.Events), r.Next, r.Silent, err)
	}
	if !slices.IsSortedFunc(r.Events, func(x, y events.Event) int { return x.Time.Compare(y.Time) }) {
		t.Error("they are not in order")
	}
	r, err = b.Events(ctx, control.EventsArgs{Since: map[string]uint64{"b": n - 30, "x": 7}, Addr: addr, After: start.Add((n - 15) * time.Second)})
	// 16 are not older, of which every third is of the other address.
	want := 0
	for _, e := range lb {
		if e.Seq > n-30 && e.Addr != other && !e.Time.Before(start.Add((n-15)*time.Second)) {
			want++
		}
	}
	if err != nil || len(r.Events) != want || want == 0 || r.Next["b"] != n || r.Next["x"] != 0 {
		t.Errorf("%d events, %d wanted, next %v, %v", len(r.Events), want, r.Next, err)
	}
	// What comes while somebody waits is told.
	got := make(chan error, 1)
	go func() {
		r, err := a.Events(ctx, control.EventsArgs{Since: map[string]uint64{"a": 1, "b": n}, Wait: control.MaxEventsWait})
		if err == nil && (len(r.Events) != 1 || r.Events[0].Seq != n+1) {
			err = fmt.Errorf("%+v", r)
		}
		got <- err
	}()
	b.cluster.sources.Store(&vipSources{log: append(slices.Clone(lb), event("b", n+1, addr))})
	if err := <-got; err != nil {
		t.Error(err)
	}
	// Nobody waits for longer than he wants.
	short, stop := context.WithCancel(ctx)
	stop()
	if _, err := a.Events(short, control.EventsArgs{Since: r.Next, Wait: time.Hour}); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A node that is alone has no floating addresses, and says so.
func TestAloneHasNoFloatingAddresses(t *testing.T) {
	n, err := New(conf(t, t.TempDir()), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, e1 := n.ListVIPs(ctx)
	_, e2 := n.ListNodes(ctx)
	_, e3 := n.AddVIP(ctx, mgs.VIPSpec{})
	_, e4 := n.MoveVIP(ctx, netip.Addr{}, "a", true)
	_, e5 := n.DrainVIP(ctx, netip.Addr{}, true, "")
	_, e6 := n.Events(ctx, control.EventsArgs{})
	for i, err := range []error{e1, e2, e3, e4, e5, e6, n.RemoveVIP(ctx, netip.Addr{}, true), n.DrainNode(ctx, "a", true)} {
		if err == nil || !strings.Contains(err.Error(), "alone") {
			t.Errorf("%d: %v", i+1, err)
		}
	}
}

func TestBestNode(t *testing.T) {
	for _, x := range []struct {
		prefer, drained []string
		last            string
		silent          string
		want            string
	}{
		{nil, nil, "", "", ""},
		{nil, nil, "c", "", "c"},
		{nil, []string{"c"}, "c", "", ""},
		{[]string{"a", "b"}, nil, "c", "", "a"},
		{[]string{"a", "b"}, nil, "c", "a", "b"},
		{[]string{"a", "b"}, []string{"b"}, "c", "a", "a"},
		{[]string{"a", "b"}, []string{"a", "b"}, "c", "", ""},
	} {
		if got := bestNode(&mgs.VIP{Prefer: x.prefer, Node: x.last}, x.drained, map[string]bool{x.silent: true}); got != x.want {
			t.Errorf("%+v: %q", x, got)
		}
	}
}
