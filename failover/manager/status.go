package manager

import "time"

// Status describes a manager.
type Status struct {
	// Leads: this process decides, in this term.
	Leads bool   `json:"leads"`
	Term  uint64 `json:"term,omitempty"`
	// Quorum: so many nodes answer that it may.
	Quorum bool         `json:"quorum,omitempty"`
	Nodes  []NodeStatus `json:"nodes,omitempty"` // by name
	// VIPs are those of which there is something to remember, by index.
	VIPs []Remembered `json:"vips,omitempty"`
}

// NodeStatus is what the leader thinks of a node.
type NodeStatus struct {
	Name string `json:"name"`
	Fit  bool   `json:"fit"`           // gets addresses
	Why  string `json:"why,omitempty"` // it is not fit
	Dead bool   `json:"dead,omitempty"`
	// Load is in calls per second.
	Load float64 `json:"load,omitempty"`
}

// status describes the machine.
func (m *Machine) status(now time.Duration) Status {
	if !m.leads {
		return Status{}
	}
	s := Status{Leads: true, Term: m.term, Quorum: m.quorum, VIPs: m.memory(now).VIPs}
	for _, n := range m.order {
		x := NodeStatus{Name: n.name, Fit: n.fit, Why: n.why(), Dead: n.dead != ""}
		if n.report != nil {
			x.Load = n.report.Load
		}
		s.Nodes = append(s.Nodes, x)
	}
	return s
}
