package statustest

import (
	"time"

	"github.com/baton-nfs/baton/internal/status"
)

// Recovery is a cluster in which the MDT recovers and one OST is on a node that does
// not answer.
func Recovery() *status.Recovery {
	start := time.Date(2030, 1, 2, 3, 4, 0, 0, time.UTC)
	at := func(d time.Duration) *time.Time { t := start.Add(d); return &t }
	return &status.Recovery{
		Node: "n1",
		Watch: &status.RecoveryWatch{
			Connected: true, At: "n1", Since: start.Add(-time.Hour), Imperative: true, Incarnation: 5, Version: 16, State: "partial",
		},
		Registry: &status.RecoveryRegistry{
			Incarnation: 5, Version: 17, State: "partial", NonIR: 1, NotifyCount: 15, NotifyTotal: 37500 * time.Microsecond, NotifyMax: 12 * time.Millisecond, NotifyPending: 2,
			Nodes: []status.RecoveryNode{
				{Name: "n1", Watching: true, Imperative: true, Version: 16},
				{Name: "n2", Watching: true, Imperative: true, Version: 17, Current: true},
				{Name: "n3", Watching: true, Version: 17, Current: true},
				{Name: "n4"},
			},
		},
		Targets: []status.RecoveryTarget{
			{Name: "MDT0000", Kind: status.KindMDT, Node: "n1", Instance: 7, State: "RECOVERING", Version: 17, IR: "full", Factor: 5, Shortened: true,
				Start: at(0), Deadline: at(7500 * time.Millisecond), Hard: at(3 * time.Minute), Left: 2500 * time.Millisecond, Took: 5 * time.Second,
				Known: 4, Finished: 1, Evicted: 0, Replayed: 1234, Clients: []status.RecoveryClient{
					{ID: "01010101010101010101010101010101", Generation: 3, Node: "n1", State: status.ClientFinished},
					{ID: "02020202020202020202020202020202", Generation: 1, Node: "n2", State: status.ClientReplaying},
					{ID: "03030303030303030303030303030303", Generation: 9, State: status.ClientAway},
					{ID: "04040404040404040404040404040404", Generation: 2, State: status.ClientMissing},
				}},
			{Name: "OST0000", Kind: status.KindOST, Node: "n2", Instance: 3, State: "COMPLETE", Version: 2, IR: "startup", Factor: 5, Start: at(0), End: at(1250 * time.Millisecond),
				Took: 1250 * time.Millisecond, Known: 3, Finished: 2, Evicted: 1, Clients: []status.RecoveryClient{
					{ID: "01010101010101010101010101010101", Generation: 3, Node: "n1", State: status.ClientConnected},
				}},
			{Name: "OST0001", Kind: status.KindOST, Node: "n4", Instance: 2, Version: 3, NoIR: true, Error: "node n4 does not tell: context deadline exceeded"},
		},
	}
}
