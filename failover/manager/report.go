package manager

import (
	"fmt"
	"time"
)

// HealthState is what a node thinks of another one by its beats.
type HealthState string

// Values of HealthState.
const (
	Unknown HealthState = ""        // not heard yet, and not long enough to suspect it
	Alive   HealthState = "alive"   // heard
	Suspect HealthState = "suspect" // silent for too long
)

// NodeHealth is what a node hears of another one.
type NodeHealth struct {
	Node        string      `json:"node"`
	State       HealthState `json:"state,omitempty"`
	Incarnation uint64      `json:"incarnation,omitempty"` // of the process; 0: never heard
	// Silence is the time since the last beat.
	Silence time.Duration `json:"silence,omitempty"`
	// Suspected is how long it has been a suspect.
	Suspected time.Duration `json:"suspected,omitempty"`
	// Slow: beats come, and say that the node does not get on.
	Slow bool `json:"slow,omitempty"`
}

// AddressState is how far a node is with an address.
type AddressState string

// Values of AddressState.
const (
	Absent    AddressState = "absent"
	Listening AddressState = "listening"
	Taking    AddressState = "taking" // set before the registry is asked for the period
	Serving   AddressState = "serving"
	Releasing AddressState = "releasing"
	Failed    AddressState = "failed"
)

// Address is a node's part in an address.
type Address struct {
	Index uint32       `json:"index"`
	Epoch uint64       `json:"epoch,omitempty"` // of the period of service there
	State AddressState `json:"state"`
	// Since is how long it has been so.
	Since time.Duration `json:"since,omitempty"`
	// Move (of Failed) is the assignment that the node could not follow (mgs.VIP.MoveID);
	// 0: it does not say.
	Move   uint64 `json:"move,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Stuck (of Failed): the node's machine still has the address. Silent: nothing that
	// comes for it is answered.
	Stuck  bool `json:"stuck,omitempty"`
	Silent bool `json:"silent,omitempty"`
}

// mayAnswer tells that the machine has the address and somebody may be answered there,
// if only by a reset.
func (a *Address) mayAnswer() bool { return a.Stuck && !a.Silent }

// holds tells that the node has to do with the period of service.
func (a *Address) holds() bool { return a.State != Absent && a.State != Listening }

// Question is what the leader asks every node (method "report").
type Question struct {
	Term uint64 `json:"term"`
	// Memory, if there is one, is for the node to keep.
	Memory *Memory `json:"memory,omitempty"`
	// Recall asks for what the node has kept.
	Recall bool `json:"recall,omitempty"`
}

// Report is a node's answer.
type Report struct {
	// Incarnation is that of its beats.
	Incarnation uint64 `json:"incarnation"`
	// Ready: it can serve NFS (the frontend is up, the MDT answers); else Reason says
	// why not.
	Ready  bool   `json:"ready,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Stopping: its addresses have to go elsewhere.
	Stopping bool `json:"stopping,omitempty"`
	// Load is in calls per second.
	Load      float64      `json:"load,omitempty"`
	Addresses []Address    `json:"addresses,omitempty"`
	Hears     []NodeHealth `json:"hears,omitempty"`
	// Kept numbers the memory that the node has, Memory is it, when asked for.
	Kept   Version `json:"kept,omitzero"`
	Memory *Memory `json:"memory,omitempty"`
}

// Limits of what others tell.
const (
	maxAddresses = 4096
	maxHears     = 1024
	maxReason    = 512
)

// Check refuses reports that are none.
func (r *Report) Check() error {
	switch {
	case r == nil:
		return fmt.Errorf("manager: no report")
	case len(r.Addresses) > maxAddresses, len(r.Hears) > maxHears, len(r.Reason) > maxReason:
		return fmt.Errorf("manager: a report is too long")
	case r.Load != r.Load || r.Load < 0:
		return fmt.Errorf("manager: the load of a report is no number")
	}
	return r.Memory.Check()
}

// of is what the report says of an address; nil: nothing.
func (r *Report) of(index uint32) *Address {
	if r != nil {
		for i := range r.Addresses {
			if r.Addresses[i].Index == index {
				return &r.Addresses[i]
			}
		}
	}
	return nil
}

// stuck tells that the node's machine still has the address, and cannot serve it.
func (r *Report) stuck(a *addr) bool {
	x := r.of(a.v.Index)
	return x != nil && x.Stuck
}

// hears is what the report says of another node; nil: nothing.
func (r *Report) hears(node string) *NodeHealth {
	for i := range r.Hears {
		if r.Hears[i].Node == node {
			return &r.Hears[i]
		}
	}
	return nil
}
