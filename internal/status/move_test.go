package status_test

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/status/statustest"
)

// The figures of a move come from what its two nodes tell, once each, in any order.
func TestSummarizeMove(t *testing.T) {
	addr := netip.MustParseAddr("192.0.2.50")
	all := statustest.MoveEvents(addr, 8)
	whole := status.MoveSummary{Replies: 12, Orderly: 4, Forced: 1, Destroyed: 2, Clients: 3, Pause: 14 * time.Millisecond, Total: 35 * time.Millisecond}
	without := func(drop func(e events.Event) bool) []events.Event { return slices.DeleteFunc(slices.Clone(all), drop) }
	addLast := slices.Clone(all)
	for i := range addLast {
		if addLast[i].Stage == "add" {
			addLast[i].Time = addLast[i].Time.Add(1500 * time.Microsecond)
		}
	}
	later := whole
	later.Pause = 14*time.Millisecond + 500*time.Microsecond
	backwards := slices.Clone(all)
	slices.Reverse(backwards)
	other := statustest.MoveEvents(addr, 7)
	for i := range other {
		other[i].Time = other[i].Time.Add(-time.Hour)
	}
	for _, x := range []struct {
		what string
		l    []events.Event
		from string
		want status.MoveSummary
	}{
		{"whole", all, "n1", whole},
		{"backwards", backwards, "n1", whole},
		{"the address comes after its services", addLast, "n1", later},
		{"with the move before", append(slices.Clone(other), all...), "n1", whole},
		{"without the ends", without(func(e events.Event) bool { return e.Kind == events.Move && e.Stage == events.End }), "n1",
			status.MoveSummary{Replies: 12, Orderly: 4, Forced: 1, Destroyed: 2, Clients: 3, Pause: 14 * time.Millisecond, Total: 30 * time.Millisecond}},
		{"the old node is dead", without(func(e events.Event) bool { return e.Node == "n1" }), "n1", status.MoveSummary{Clients: 3, Total: 30 * time.Millisecond}},
		{"the new node does not tell", without(func(e events.Event) bool { return e.Node == "n2" }), "n1",
			status.MoveSummary{Replies: 12, Orderly: 4, Forced: 1, Destroyed: 2, Total: 35 * time.Millisecond}},
		{"nobody had it", without(func(e events.Event) bool { return e.Node == "n1" }), "", status.MoveSummary{Clients: 3, Total: 30 * time.Millisecond}},
		{"nothing", nil, "n1", status.MoveSummary{}},
	} {
		got := status.SummarizeMove(addr, x.from, "n2", 8, x.l)
		if len(got.Events) != len(x.l) {
			t.Errorf("%s: %d events", x.what, len(got.Events))
		}
		x.want.Addr, x.want.From, x.want.To, x.want.MoveID, got.Events, x.want.Events = addr.String(), x.from, "n2", 8, nil, nil
		if d := cmp.Diff(x.want, got); d != "" {
			t.Errorf("%s (-want +got): %s", x.what, d)
		}
	}
}

func TestVIPsText(t *testing.T) {
	var b bytes.Buffer
	if err := status.VIPsText(&b, []status.VIP{{Addr: "192.0.2.1"}}); err != nil || b.String() != "there are no floating addresses: \"baton vip add\" adds one\n" {
		t.Errorf("%q, %v", b.String(), err)
	}
}
