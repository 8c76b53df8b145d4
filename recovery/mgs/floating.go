package mgs

import (
	"context"
	"net/netip"
)

// Floating is the part of the registry that has to do with addresses that move.
// What applies to Registry's methods applies to these.
//
// A move has three steps: Assign names the next owner; that one opens its
// listeners and says so (SetReady); the present one gives the address up and says
// so (Stopped), or is declared gone (Abandoned); then the next owner begins its
// period of service (Take).
type Floating interface {
	// AddVIP enters a floating address. One that is there already with the same
	// settings is returned as it is; with others it is refused with CodeExists.
	AddVIP(ctx context.Context, s VIPSpec) (VIP, error)
	// SetVIP changes the settings of a floating address, which is found by s.Addr.
	SetVIP(ctx context.Context, s VIPSpec) (VIP, error)
	// RemoveVIP marks an address as to be given up; it is forgotten, except for its
	// index and epoch, when it was (Stopped). Assign is refused from then on.
	RemoveVIP(ctx context.Context, index uint32) (VIP, error)
	// Assign names the node that is to serve the address ("": nobody), and by epoch
	// the period of service in which that was decided. A node that it is assigned to
	// already is no change. MoveID rises with every change.
	Assign(ctx context.Context, index uint32, epoch uint64, node string) (VIP, error)
	// SetReady tells that the node of the assignment with this MoveID listens.
	SetReady(ctx context.Context, index uint32, moveID uint64) (VIP, error)
	// Take begins a period of service of the assigned node, as Serve does, if the one
	// before has ended.
	Take(ctx context.Context, index uint32, moveID uint64) (VIP, error)
	// SetDrained marks a node as one that is to have no addresses, or takes the mark
	// away.
	SetDrained(ctx context.Context, node string, drained bool) error
	// Watch returns the addresses and drained nodes as soon as the revision is
	// another one than rev, or after some seconds as they are. Revisions have no
	// order. rev "" returns at once.
	Watch(ctx context.Context, rev string) (View, error)
}

// VIPSpec are the settings of a floating address.
type VIPSpec struct {
	Addr netip.Addr `json:"addr"`
	// Bits is the length of the network's prefix, from 1.
	Bits int `json:"bits"`
	// Interface has the address on every node; empty: the one with the network.
	Interface string `json:"interface,omitempty"`
	// Prefer are the nodes that may serve the address, the best first; none: any.
	Prefer []string `json:"prefer,omitempty"`
}

// View is what all nodes have to know of floating addresses.
type View struct {
	Rev     string   `json:"rev"`
	VIPs    []VIP    `json:"vips"`    // all, fixed ones too
	Drained []string `json:"drained"` // nodes, sorted
}
