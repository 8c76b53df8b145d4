package node

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/recovery/wire"
)

// A report has room in a message, however many addresses a node has to do with, and
// whatever has failed. No address that is here is left out.
func TestReportsFit(t *testing.T) {
	const most = 1024 // addresses of a registry
	for _, failed := range []int{0, 10, most / 2} {
		var l []manager.Address
		for i := range most {
			a := manager.Address{Index: uint32(i + 1), Epoch: 12345, State: manager.Serving, Since: 40 * 24 * time.Hour}
			switch {
			case i < failed:
				a.Since, a.Move = time.Hour, 12345
				a.State, a.Reason = manager.Failed, fmt.Sprintf("take-over: add: %d: %s", i, strings.Repeat("é", 300))
			case i%4 == 3:
				a.State, a.Epoch = manager.Absent, 0
			}
			l = append(l, a)
		}
		r := &manager.Report{Addresses: short(l), Hears: make([]manager.NodeHealth, 16)}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > wire.MaxData {
			t.Errorf("with %d failed: %d bytes", failed, len(b))
		}
		if err := r.Check(); err != nil {
			t.Error(err)
		}
		here := map[uint32]manager.Address{}
		for _, a := range r.Addresses {
			here[a.Index] = a
		}
		for i := range most {
			a, ok := here[uint32(i+1)]
			if ok == (i >= failed && i%4 == 3) {
				t.Fatalf("address %d: listed %v", i+1, ok)
			}
			if i < min(failed, 10) && (a.Since == 0 || !strings.Contains(a.Reason, "take-over")) {
				t.Errorf("why it has failed is missing: %+v", a)
			}
			if i < min(failed, 10) && a.Move == 0 {
				t.Errorf("with what it has failed is missing: %+v", a)
			}
		}
	}
}
