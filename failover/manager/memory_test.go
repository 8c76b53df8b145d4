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
