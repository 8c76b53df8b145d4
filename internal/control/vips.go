package control

import (
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/failover/events"
)

// Commands for floating addresses and the nodes that serve them. CmdVIPAdd and
// CmdVIPSet have an mgs.VIPSpec as argument and a status.VIP as result.
const (
	CmdVIPs      = "vips" // result: []status.VIP
	CmdVIPAdd    = "vip-add"
	CmdVIPSet    = "vip-set"
	CmdVIPRemove = "vip-remove" // argument: VIPArgs
	CmdVIPMove   = "vip-move"   // argument: VIPArgs, result: VIPMoved
	CmdVIPDrain  = "vip-drain"  // argument: VIPArgs, result: VIPMoved
	CmdNodes     = "nodes"      // result: []status.ClusterNode
	CmdNodeDrain = "node-drain" // argument: NodeDrainArgs
	CmdEvents    = "events"     // argument: EventsArgs, result: Events
)

// VIPArgs name a floating address and what is to be done to it.
type VIPArgs struct {
	Addr netip.Addr `json:"addr"`
	// To (CmdVIPMove, CmdVIPDrain without Drained) is the node that is to serve it; with
	// CmdVIPDrain it may be empty.
	To string `json:"to,omitempty"`
	// Force (CmdVIPMove, CmdVIPRemove): the node that serves it is known to be gone.
	Force bool `json:"force,omitempty"`
	// Drained (CmdVIPDrain): nobody is to serve it, or somebody again.
	Drained bool `json:"drained,omitempty"`
}

// VIPMoved is what the registry says after an assignment; the move itself follows.
type VIPMoved struct {
	MoveID uint64 `json:"move_id"`
	From   string `json:"from,omitempty"` // serves it at present
	To     string `json:"to,omitempty"`
}

// NodeDrainArgs say whether a node is to have addresses.
type NodeDrainArgs struct {
	Node    string `json:"node"`
	Drained bool   `json:"drained"`
}

// EventsArgs ask for events of all nodes.
type EventsArgs struct {
	// Since are, by node, the numbers of the last events that the caller has; of a
	// node that is not there all are meant.
	Since map[string]uint64 `json:"since,omitempty"`
	// After, unless zero, leaves out what is older.
	After time.Time `json:"after,omitzero"`
	// Addr, unless zero, leaves out what is of another address.
	Addr netip.Addr `json:"addr,omitzero"`
	// Wait is how long to wait for the first event, in ns; at most MaxEventsWait.
	Wait time.Duration `json:"wait,omitempty"`
}

// MaxEventsWait bounds EventsArgs.Wait.
const MaxEventsWait = 10 * time.Second

// Events are those of all nodes that answer, by time.
type Events struct {
	Events []events.Event `json:"events"`
	// Next is the Since of the next call.
	Next map[string]uint64 `json:"next"`
	// Silent are the nodes that do not answer, with the reasons.
	Silent map[string]string `json:"silent,omitempty"`
}
