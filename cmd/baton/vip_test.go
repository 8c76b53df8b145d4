package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// fakeVIPs are the addresses of a fakeNode. What becomes of a move depends on its
// address: that of .50 succeeds, n2 cannot take .57, .53 is assigned anew meanwhile, .52
// is taken by nobody, .55 is not given up, and of .54 the nodes tell nothing.
type fakeVIPs struct {
	list   func(context.Context) // nil: at once
	mu     sync.Mutex
	orders []string
	moved  map[string]control.VIPMoved
	told   map[string]bool // the events of the move
}

func (f *fakeNode) vipOrder(format string, a ...any) {
	f.vips.mu.Lock()
	defer f.vips.mu.Unlock()
	f.vips.orders = append(f.vips.orders, fmt.Sprintf(format, a...))
}

func (f *fakeNode) ListVIPs(ctx context.Context) ([]status.VIP, error) {
	if f.vips.list != nil {
		f.vips.list(ctx)
	}
	f.vips.mu.Lock()
	defer f.vips.mu.Unlock()
	l := statustest.VIPs()
	for i := range l {
		v := &l[i]
		m, ok := f.vips.moved[v.Addr]
		if !ok {
			continue
		}
		v.Floating.Next, v.Floating.MoveID, v.Floating.Ready, v.Floating.Drained = m.To, m.MoveID, false, false
		switch v.Addr[len(v.Addr)-2:] {
		case "50", "54":
			v.Floating.Node, v.Floating.Clean = m.To, false
		case "53":
			v.Floating.Next, v.Floating.MoveID = "n3", m.MoveID+1
		case "55":
			v.Floating.Ready = true
		}
	}
	return l, nil
}

func settings(s *mgs.VIPSpec) string {
	return fmt.Sprintf("%v/%d %q %q %v", s.Addr, s.Bits, s.Interface, s.Prefer, s.Drained)
}

func (f *fakeNode) AddVIP(_ context.Context, s mgs.VIPSpec) (status.VIP, error) {
	f.vipOrder("add %s", settings(&s))
	if f.order != nil {
		return status.VIP{}, f.order
	}
	return status.VIP{Addr: s.Addr.String(), Index: 9, Epoch: 1, Verifier: "00000000000000c8", Floating: &status.Floating{Bits: s.Bits, Prefer: s.Prefer, Interface: s.Interface, Drained: s.Drained, Clean: true, NSMState: 1}}, nil
}

func (f *fakeNode) SetVIP(_ context.Context, s mgs.VIPSpec) (status.VIP, error) {
	f.vipOrder("set %s, was %s", settings(&s), settings(s.Was))
	return status.VIP{Addr: s.Addr.String()}, f.order
}

func (f *fakeNode) RemoveVIP(_ context.Context, addr netip.Addr, force bool) error {
	f.vipOrder("remove %s %v", addr, force)
	return f.order
}

func (f *fakeNode) MoveVIP(_ context.Context, addr netip.Addr, to string, force bool) (control.VIPMoved, error) {
	f.vipOrder("move %s to %s %v", addr, to, force)
	f.vips.mu.Lock()
	defer f.vips.mu.Unlock()
	if to == "n9" {
		return control.VIPMoved{}, errors.New(`there is no node "n9"; "baton node list" shows them`)
	}
	m := control.VIPMoved{MoveID: 8, From: "n1", To: to}
	if f.vips.moved == nil {
		f.vips.moved, f.vips.told = map[string]control.VIPMoved{}, map[string]bool{}
	}
	f.vips.moved[addr.String()], f.vips.told[addr.String()] = m, false
	return m, nil
}

func (f *fakeNode) DrainVIP(_ context.Context, addr netip.Addr, drained bool, to string) (control.VIPMoved, error) {
	f.vipOrder("drain %s %v %q", addr, drained, to)
	return control.VIPMoved{MoveID: 5, From: "n1"}, f.order
}

func (f *fakeNode) ListNodes(context.Context) ([]status.ClusterNode, error) {
	return statustest.Nodes(), f.order
}

func (f *fakeNode) DrainNode(_ context.Context, node string, drained bool) error {
	f.vipOrder("drain node %s %v", node, drained)
	return f.order
}

func (f *fakeNode) Events(ctx context.Context, a control.EventsArgs) (control.Events, error) {
	f.vips.mu.Lock()
	defer f.vips.mu.Unlock()
	r := control.Events{Events: []events.Event{}, Next: map[string]uint64{"n1": 10, "n2": 20}, Silent: map[string]string{"n3": "does not answer"}}
	if _, moving := f.vips.moved[a.Addr.String()]; !moving {
		// Somebody looks at what was.
		if a.Since == nil {
			r.Events = statustest.MoveEvents(netip.MustParseAddr("192.0.2.50"), 8)
			r.Events = slices.DeleteFunc(r.Events, func(e events.Event) bool {
				return e.Time.Before(a.After) || a.Addr.IsValid() && e.Addr != a.Addr
			})
			r.Events = append(r.Events, events.Event{Seq: 3, Time: time.Date(2030, 1, 2, 3, 5, 0, 0, time.UTC), Node: "n1", Kind: events.Node, Err: "node n3 does\nnot answer"})
			return r, nil
		}
		return r, errors.New("baton is stopping") // ends a -f
	}
	if f.vips.told[a.Addr.String()] || a.Since == nil {
		return r, nil
	}
	f.vips.told[a.Addr.String()] = true
	l := statustest.MoveEvents(a.Addr, 8)
	switch s := a.Addr.String(); s[len(s)-2:] {
	case "50":
		r.Events = l
	case "54": // it is served, but a client was not woken up
		for i := range l {
			if e := &l[i]; e.Node == "n2" && e.Kind == events.Move && e.Stage == events.End {
				e.Attrs[failover.AttrOutcome], e.Err = string(failover.Serving), "tickle: 1 of 5 connections"
			}
		}
		r.Events = l
	case "57":
		r.Events = append(l[:3], events.Event{Time: l[3].Time, Node: "n2", Kind: events.Move, Stage: events.End, Addr: a.Addr, To: "n2", Move: 8, Err: "add: no interface has the network"})
	case "52", "53":
		r.Events = l[:2]
	case "55":
		r.Events = l[:4]
	}
	return r, nil
}

// Orders for addresses reach the node as they were given, and failures the caller.
func TestVIPOrders(t *testing.T) {
	b := newBed(t)
	_, end := b.serve()
	b.waitFor("readiness", b.notified("READY=1"))
	for _, line := range []string{
		"vip add 192.0.2.60/24 --prefer n1,n2 --interface eth0 --drained",
		"vip add 2001:db8::50/64", "vip add [2001:DB8:0::051]/64",
		"vip set 192.0.2.51 --prefer n3",
		"vip set 192.0.2.50/25 --interface eth1",
		"vip set 192.0.2.54 --prefer=",
		"vip remove 192.0.2.50", "vip remove 192.0.2.50/24 --force", "vip remove [2001:DB8:0::050]", "vip remove ::ffff:192.0.2.50",
		"vip drain 192.0.2.50", "vip undrain 192.0.2.50", "vip undrain 192.0.2.50 --to n2",
		"node drain n2", "node undrain n2",
		"vip move 192.0.2.54 --to n1 --force --no-wait --json",
	} {
		if code, out, errs := b.run(append(strings.Fields(line), "--data", b.dir)...); code != 0 || (out+errs != "") != strings.Contains(line, "--json") {
			t.Errorf("%s: %d, %q", line, code, out+errs)
		}
	}
	want := []string{
		`add 192.0.2.60/24 "eth0" ["n1" "n2"] true`,
		`add 2001:db8::50/64 "" [] false`,
		`add 2001:db8::51/64 "" [] false`,
		`set 192.0.2.51/24 "eth0" ["n3"] false, was 192.0.2.51/24 "eth0" [] false`,
		`set 192.0.2.50/25 "eth1" ["n1" "n2"] false, was 192.0.2.50/24 "" ["n1" "n2"] false`,
		`set 192.0.2.54/24 "" [] true, was 192.0.2.54/24 "" [] true`,
		"remove 192.0.2.50 false", "remove 192.0.2.50 true",
		"remove 2001:db8::50 false", "remove 192.0.2.50 false",
		`drain 192.0.2.50 true ""`, `drain 192.0.2.50 false ""`, `drain 192.0.2.50 false "n2"`,
		"drain node n2 true", "drain node n2 false",
		"move 192.0.2.54 to n1 true",
	}
	if !slices.Equal(b.node.vips.orders, want) {
		t.Errorf("the node was told\n%s", strings.Join(b.node.vips.orders, "\n"))
	}
	// What is printed is what the node says, not what was before.
	if code, out, errs := b.run("vip", "set", "192.0.2.50", "--prefer=", "--json", "--data", b.dir); code != 0 || strings.Contains(out, "n1") || !strings.Contains(out, "192.0.2.50") {
		t.Errorf("%d, %q, %q", code, out, errs)
	}
	b.node.order = errors.New("mgs: no")
	for _, line := range []string{"vip add 192.0.2.60/24", "vip set 192.0.2.51", "vip remove 192.0.2.50", "vip drain 192.0.2.50", "node drain n2", "node list"} {
		if code, out, errs := b.run(append(strings.Fields(line), "--data", b.dir)...); code != exitFailure || out != "" || errs != "baton: mgs: no\n" {
			t.Errorf("%s: %d, %q, %q", line, code, out, errs)
		}
	}
	b.signals <- syscall.SIGTERM
	if code := <-end; code != 0 {
		t.Errorf("serve ended with %d", code)
	}
}
