package vipagent

import (
	"net/netip"
	"testing"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// What is done about an address follows from what the registry says and how it is here.
func TestDecide(t *testing.T) {
	const me, other = "a", "b"
	free := mgs.VIP{Epoch: 4, Clean: true, Next: me, MoveID: 7}
	served := mgs.VIP{Epoch: 4, Node: me, Next: me, MoveID: 7}
	with := func(v mgs.VIP, f func(*mgs.VIP)) mgs.VIP {
		f(&v)
		return v
	}
	for _, x := range []struct {
		what   string
		s      situation
		do     act
		reason failover.Reason
	}{
		{"assigned here", situation{vip: free, state: Absent}, doListen, ""},
		{"assigned here after a failure", situation{vip: free, state: Failed}, doListen, ""},
		{"assigned elsewhere", situation{vip: with(free, func(v *mgs.VIP) { v.Next = other }), state: Absent}, doNothing, ""},
		{"barred", situation{vip: free, state: Absent, barred: 7}, doNothing, ""},
		{"barred for an assignment before", situation{vip: free, state: Absent, barred: 6}, doListen, ""},
		{"the node stops", situation{vip: free, state: Absent, leaving: true}, doNothing, ""},
		{"of an earlier process", situation{vip: served, state: Absent, began: 0}, doAbandon, ""},
		{"of this process, which has ended it", situation{vip: with(served, func(v *mgs.VIP) { v.Next = other }), state: Absent, began: 4}, doNothing, ""},
		{"ready and free", situation{vip: free, state: Listening, move: 7, ready: true}, doTake, ""},
		{"free before it is ready", situation{vip: free, state: Listening, move: 7}, doTake, ""},
		{"held back", situation{vip: free, state: Listening, move: 7, ready: true, hold: true}, doNothing, ""},
		{"given now, and not when the listeners were opened", situation{vip: free, state: Listening, move: 7, ready: true, given: true}, doDrop, ""},
		{"given", situation{vip: free, state: Listening, move: 7, ready: true, given: true, opened: true}, doTake, ""},
		{"somebody has a newer epoch than the registry told", situation{vip: free, state: Listening, move: 7, ready: true, fence: 5}, doNothing, ""},
		{"served by another one", situation{vip: with(served, func(v *mgs.VIP) { v.Node = other }), state: Listening, move: 7}, doReady, ""},
		{"and it knows", situation{vip: with(served, func(v *mgs.VIP) { v.Node = other }), state: Listening, move: 7, ready: true}, doNothing, ""},
		{"assigned anew", situation{vip: free, state: Listening, move: 6}, doDrop, ""},
		{"gone", situation{vip: free, state: Listening, move: 7, gone: true}, doDrop, ""},
		{"serving", situation{vip: served, state: Serving, epoch: 4}, doNothing, ""},
		{"the next one does not listen yet", situation{vip: with(served, func(v *mgs.VIP) { v.Next = other }), state: Serving, epoch: 4}, doNothing, ""},
		{"the next one listens", situation{vip: with(served, func(v *mgs.VIP) { v.Next, v.Ready = other, true }), state: Serving, epoch: 4}, doRelease, failover.Move},
		{"assigned to nobody", situation{vip: with(served, func(v *mgs.VIP) { v.Next = "" }), state: Serving, epoch: 4}, doRelease, failover.Stop},
		{"removed", situation{vip: with(served, func(v *mgs.VIP) { v.Removed = true }), state: Serving, epoch: 4}, doRelease, failover.Remove},
		{"released by order", situation{vip: served, state: Serving, epoch: 4, barred: 7}, doRelease, failover.Stop},
		{"stopping, and nobody has taken it yet", situation{vip: served, state: Serving, epoch: 4, leaving: true}, doNothing, ""},
		{"stopping now", situation{vip: served, state: Serving, epoch: 4, leaving: true, last: true}, doRelease, failover.Stop},
		{"the machine cannot have it", situation{vip: served, state: Serving, epoch: 4, failing: "no interface"}, doRelease, failover.Failed},
		{"nor any more", situation{vip: served, state: Serving, epoch: 4, failing: "no interface", fence: 5}, doRelease, failover.Fenced},
		{"a higher epoch in the registry", situation{vip: with(served, func(v *mgs.VIP) { v.Epoch, v.Node = 5, other }), state: Serving, epoch: 4}, doRelease, failover.Fenced},
		{"declared gone", situation{vip: with(served, func(v *mgs.VIP) { v.Node = "" }), state: Serving, epoch: 4}, doRelease, failover.Fenced},
		{"a peer serves it", situation{vip: served, state: Serving, epoch: 4, fence: 5}, doRelease, failover.Fenced},
		{"fenced before all else", situation{vip: with(served, func(v *mgs.VIP) { v.Removed = true }), state: Serving, epoch: 4, fence: 5}, doRelease, failover.Fenced},
	} {
		x.s.me = me
		if got := decide(&x.s); got.do != x.do || got.reason != x.reason {
			t.Errorf("%s: %v %s (%s), want %v %s", x.what, got.do, got.reason, got.text, x.do, x.reason)
		}
	}
}

// Lists of connections: changes apply to the list they were made from only, and what is
// told of an older period of service, or by somebody else, is refused.
func TestBook(t *testing.T) {
	var b book
	c := func(port uint16) told { return told{Port: port} }
	c1, c2 := c(1), c(2)
	c1.Remote, c2.Remote = mustPort("192.0.2.1:700"), mustPort("192.0.2.2:700")
	enter := func(from string, a connsArgs, want uint64) {
		t.Helper()
		a.Index = 1
		if r, err := b.enter(from, &a); err != nil || r.Seq != want {
			t.Errorf("%+v: %+v, %v, want %d", a, r, err, want)
		}
	}
	has := func(epoch uint64, want int) {
		t.Helper()
		if l := b.known(1, epoch); len(l) != want {
			t.Errorf("epoch %d: %v, want %d", epoch, l, want)
		}
	}
	enter("b", connsArgs{Epoch: 3, Seq: 5, Base: 4, Add: []told{c1}}, 0) // the whole list is wanted
	enter("b", connsArgs{Epoch: 3, Seq: 6, Add: []told{c1}}, 6)
	enter("b", connsArgs{Epoch: 3, Seq: 7, Base: 6, Add: []told{c2}}, 7)
	has(3, 2)
	has(2, 0)
	enter("b", connsArgs{Epoch: 3, Seq: 9, Base: 8, Gone: []told{c1}}, 0)
	has(3, 2)
	enter("b", connsArgs{Epoch: 3, Seq: 9, Base: 7, Gone: []told{c1}}, 9)
	has(3, 1)
	enter("b", connsArgs{Epoch: 3, Seq: 6, Add: []told{c1, c2}}, 9) // a list that comes late
	has(3, 1)
	for _, x := range []struct {
		from  string
		epoch uint64
	}{{"c", 3}, {"b", 2}} {
		if _, err := b.enter(x.from, &connsArgs{Index: 1, Epoch: x.epoch, Seq: 1}); err == nil {
			t.Errorf("%+v: taken", x)
		}
	}
	enter("c", connsArgs{Epoch: 4, Seq: 1}, 1)
	has(4, 0)
	has(3, 0)
	var many connsArgs
	for i := range maxConns + 10 {
		x := c(uint16(i))
		x.Remote = c1.Remote
		many.Add = append(many.Add, x)
	}
	many.Epoch, many.Seq = 5, 1
	enter("c", many, 1)
	has(5, maxConns)
}

func mustPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
