package manager

import (
	"cmp"
	"errors"
	"slices"
	"time"
)

// Version numbers memories; the leader's term comes first.
type Version struct {
	Term uint64 `json:"term,omitempty"`
	Seq  uint64 `json:"seq,omitempty"`
}

// Compare orders versions.
func (v Version) Compare(o Version) int {
	return cmp.Or(cmp.Compare(v.Term, o.Term), cmp.Compare(v.Seq, o.Seq))
}

// Memory is what a leader's successor has to know and the registry does not say.
type Memory struct {
	Version
	VIPs []Remembered `json:"vips,omitempty"` // by index
}

// Remembered is what is remembered of an address.
type Remembered struct {
	Index uint32 `json:"index"`
	// MoveID is of the assignment that the rest is about.
	MoveID uint64 `json:"move_id"`
	// Manual: somebody has moved it by hand to where it is.
	Manual bool `json:"manual,omitempty"`
	// Moves are those that count for the hold-off, which ends in Hold.
	Moves int           `json:"moves,omitempty"`
	Hold  time.Duration `json:"hold,omitempty"`
}

// Check refuses memories that are none. There may be none.
func (m *Memory) Check() error {
	if m == nil {
		return nil
	}
	if len(m.VIPs) > maxAddresses {
		return errors.New("manager: a memory is too long")
	}
	for _, r := range m.VIPs {
		if r.Moves < 0 || r.Moves > maxMoves || r.Hold < 0 {
			return errors.New("manager: a memory is out of range")
		}
	}
	return nil
}

// maxMoves bounds the doubling.
const maxMoves = 32

// maxRemembered bounds a memory, which has to fit into a message with the rest of a
// question or an answer. What is beyond it a successor does not know.
const maxRemembered = 128

// Keeper keeps the newest memory that a node was given. It is a value for one
// goroutine at a time.
type Keeper struct{ m *Memory }

// Answer takes a question's memory and fills in the answer's part. What is recalled is
// what was kept before the question.
func (k *Keeper) Answer(q *Question, r *Report) error {
	if err := q.Memory.Check(); err != nil {
		return err
	}
	if q.Recall {
		r.Memory = k.m
	}
	if q.Memory != nil && (k.m == nil || q.Memory.Compare(k.m.Version) > 0) {
		k.m = q.Memory
	}
	if k.m != nil {
		r.Kept = k.m.Version
	}
	return nil
}

// Question is what a node is to be asked now. Of the memory, it has the slices of the
// machine, which do not change any more.
func (m *Machine) Question(now time.Duration, node string) Question {
	q := Question{Term: m.term}
	n := m.nodes[node]
	if n == nil {
		return q
	}
	q.Recall = n.report == nil
	// A memory takes the place of what is asked for, and the answer may be lost.
	if m.version.Seq != 0 && n.report != nil && n.report.Kept != m.version {
		q.Memory = m.memory(now)
		q.Memory.VIPs = q.Memory.VIPs[:min(len(q.Memory.VIPs), maxRemembered)]
	}
	return q
}

// memory is what is remembered now. Holds are as of now, the version is that of the
// last change.
func (m *Machine) memory(now time.Duration) *Memory {
	mem := &Memory{Version: m.version}
	for _, a := range m.addrs {
		r := Remembered{Index: a.v.Index, MoveID: a.v.MoveID, Manual: a.manual, Moves: a.moves, Hold: max(a.holdUntil-now, 0)}
		if r.Manual || r.Moves > 0 {
			mem.VIPs = append(mem.VIPs, r)
		}
	}
	slices.SortFunc(mem.VIPs, func(a, b Remembered) int { return cmp.Compare(a.Index, b.Index) })
	return mem
}

// changed makes a new version of the memory.
func (m *Machine) changed() { m.version = Version{Term: m.term, Seq: m.version.Seq + 1} }

// recall takes over what an earlier leader has remembered, if it is the latest there is.
func (m *Machine) recall(now time.Duration, mem *Memory) {
	if mem == nil || mem.Term >= m.term || mem.Compare(m.recalled.Version) <= 0 {
		return
	}
	m.recalled = *mem
	for _, a := range m.addrs {
		m.remember(now, a)
	}
}

// remember looks up what an earlier leader has remembered of an address.
func (m *Machine) remember(now time.Duration, a *addr) {
	if a.own {
		return // this leader knows better
	}
	i, ok := slices.BinarySearchFunc(m.recalled.VIPs, a.v.Index, func(r Remembered, x uint32) int { return cmp.Compare(r.Index, x) })
	if !ok {
		return
	}
	r := &m.recalled.VIPs[i]
	a.moves, a.movedAt, a.holdUntil = r.Moves, now, now+min(r.Hold, m.cfg.HoldOffMax)
	// Who has made a later assignment is unknown.
	a.manual = r.Manual && r.MoveID == a.v.MoveID
	m.changed()
}
