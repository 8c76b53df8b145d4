package manager

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// What a leader has to remember of many addresses fits into a question, and into an
// answer beside the rest.
func TestMemoryIsBounded(t *testing.T) {
	m, err := NewMachine(DefaultConfig("a", "a", "b", "c"))
	if err != nil {
		t.Fatal(err)
	}
	m.Lead(time.Second, 1)
	v := mgs.View{Rev: "1"}
	for i := range uint32(1024) {
		v.VIPs = append(v.VIPs, mgs.VIP{Index: i + 1, Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Bits: 16, Epoch: 9, MoveID: 1 << 40, Next: "a", Node: "a"})
	}
	m.View(2*time.Second, &v)
	for i := range v.VIPs {
		v.VIPs[i].MoveID++
		v.VIPs[i].Next = "b" // by hand
	}
	m.View(3*time.Second, &v)
	m.Report(4*time.Second, "b", 3*time.Second, &Report{Incarnation: 1})
	q := m.Question(4*time.Second, "b")
	if q.Memory == nil || len(q.Memory.VIPs) == 0 || q.Memory.Check() != nil {
		t.Fatalf("%+v", q.Memory)
	}
	b, err := json.Marshal(&q)
	if err != nil || len(b) > 16<<10 {
		t.Errorf("%d bytes: %v", len(b), err)
	}
	if n := len(m.status(4 * time.Second).VIPs); n != len(v.VIPs) {
		t.Errorf("%d are shown", n)
	}
}

// A new leader learns what a node has kept for its predecessor before the node is given
// anything else to keep, also if the first answer is lost.
func TestMemoryIsRecalledFirst(t *testing.T) {
	var k Keeper
	old := &Memory{Version: Version{Term: 3, Seq: 7}, VIPs: []Remembered{{Index: 1, MoveID: 4, Manual: true}}}
	if err := k.Answer(&Question{Memory: old}, &Report{}); err != nil {
		t.Fatal(err)
	}
	// A leader that sends both at once.
	var r Report
	next := &Memory{Version: Version{Term: 4, Seq: 1}}
	if err := k.Answer(&Question{Memory: next, Recall: true}, &r); err != nil || r.Memory != old || r.Kept != next.Version {
		t.Errorf("%+v, %v", r, err)
	}

	k = Keeper{m: old}
	m, err := NewMachine(DefaultConfig("a", "a", "b", "c"))
	if err != nil {
		t.Fatal(err)
	}
	m.Lead(time.Second, 4)
	v := mgs.View{Rev: "1", VIPs: []mgs.VIP{
		{Index: 1, Addr: netip.MustParseAddr("192.0.2.10"), Bits: 24, Epoch: 2, MoveID: 4, Next: "b", Node: "b", Prefer: []string{"c", "b"}},
		{Index: 2, Addr: netip.MustParseAddr("192.0.2.11"), Bits: 24, Epoch: 2, MoveID: 4, Next: "b", Node: "b"},
	}}
	m.View(time.Second, &v)
	v.VIPs[1].Next, v.VIPs[1].MoveID = "c", 5 // there is something to remember at once
	m.View(time.Second, &v)
	for now := 2 * time.Second; now < 5*time.Second; now += time.Second {
		q := m.Question(now, "b")
		r := &Report{Incarnation: 1}
		if err := k.Answer(&q, r); err != nil {
			t.Fatal(err)
		}
		if now > 2*time.Second { // the first is lost
			m.Report(now, "b", now, r)
		}
	}
	if a := m.addrs[1]; !a.manual {
		t.Errorf("that the address was moved by hand is forgotten: %+v", a)
	}
	if k.m.Term != 4 || len(k.m.VIPs) != 2 {
		t.Errorf("the node keeps %+v", k.m)
	}
}
