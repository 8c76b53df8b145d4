package health

import (
	"slices"
	"time"
)

// PeerStatus describes a peer for display.
type PeerStatus struct {
	Name        string
	State       PeerState
	Incarnation uint64 // 0: never heard
	// Local and Remote tell whether this node and the peer are interested.
	Local, Remote bool
	// Connected: by a connection that this node has dialled.
	Connected bool
	// Silence is the time since the last beat, or since the interest began; Timeout
	// how long it may be.
	Silence, Timeout time.Duration
	Slow             bool // the node itself does not look at itself
	Targets          []TargetStatus
	VIPs             []VIP
	Stats
}

// TargetStatus describes a target for display.
type TargetStatus struct {
	Target
	// Current: no later instance is known elsewhere.
	Current bool
	Slow    bool
}

// Status describes all peers, by name. What it tells of an idle one is old.
func (m *Machine) Status(now time.Duration) []PeerStatus {
	l := make([]PeerStatus, 0, len(m.order))
	for _, p := range m.order {
		s := PeerStatus{
			Name: p.name, State: p.state, Incarnation: p.incarnation, Local: p.local, Remote: p.want, Connected: p.connected,
			Slow: p.self.slow, VIPs: slices.Clone(p.vips), Stats: p.stats,
		}
		if p.state != StateIdle {
			s.Silence, s.Timeout = now-p.heard, p.timeout()
		}
		for i := range p.targets {
			t := &p.targets[i]
			k := m.known[t.Name]
			s.Targets = append(s.Targets, TargetStatus{Target: t.Target, Slow: t.slow, Current: k != nil && k.node == p.name && k.instance == t.Instance})
		}
		l = append(l, s)
	}
	return l
}

// Present is what the events so far amount to: Reset and the events that lead from
// nothing to what holds now.
func (m *Machine) Present() []Event {
	keep := m.events
	m.events = []Event{{Kind: Reset}}
	for _, p := range m.order {
		switch p.state {
		case StateAlive:
			m.event(p, Event{Kind: Alive})
		case StateSuspect:
			m.event(p, Event{Kind: Suspect})
		}
		if p.self.slow {
			m.event(p, Event{Kind: Slow})
		}
		for _, v := range p.vips {
			m.event(p, Event{Kind: Serves, VIP: v})
		}
		for i := range p.targets {
			t := &p.targets[i]
			if k := m.known[t.Name]; k != nil && k.node == p.name {
				m.event(p, Event{Kind: TargetUp, Target: t.Name, Instance: k.instance})
			}
			if t.slow {
				m.event(p, Event{Kind: Slow, Target: t.Name, Instance: t.Instance})
			}
		}
	}
	e := m.events
	m.events = keep
	return e
}
