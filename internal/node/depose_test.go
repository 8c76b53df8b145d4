package node

import (
	"testing"

	"github.com/baton-nfs/baton/failover/manager"
)

func TestFallen(t *testing.T) {
	hears := func(s manager.HealthState) []manager.NodeHealth {
		return []manager.NodeHealth{{Node: "other", State: manager.Alive}, {Node: "leader", State: s}}
	}
	dead, lives, never := hears(manager.Suspect), hears(manager.Alive), hears(manager.Unknown)
	for _, x := range []struct {
		what   string
		nodes  int
		own    []manager.NodeHealth
		others [][]manager.NodeHealth
		want   bool
	}{
		{"all others suspect it", 3, dead, [][]manager.NodeHealth{dead}, true},
		{"this node is cut off from all", 3, dead, nil, false},
		{"only the way from here is broken", 3, dead, [][]manager.NodeHealth{lives}, false},
		{"it is heard here", 3, lives, [][]manager.NodeHealth{dead}, false},
		{"a node that has just started does not know", 3, dead, [][]manager.NodeHealth{never}, false},
		{"a node that knows nothing of it", 3, dead, [][]manager.NodeHealth{nil}, false},
		{"three of five", 5, dead, [][]manager.NodeHealth{dead, dead}, true},
		{"two of five", 5, dead, [][]manager.NodeHealth{dead, never}, false},
		{"one of five hears it", 5, dead, [][]manager.NodeHealth{dead, dead, lives}, false},
		{"two nodes have no majority", 2, dead, nil, false},
	} {
		if got := fallen("leader", x.nodes, x.own, x.others); got != x.want {
			t.Errorf("%s: %v", x.what, got)
		}
	}
}
