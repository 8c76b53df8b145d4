package manager

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// Decision is what is to be done at the registry for one address: the period of
// service Epoch is abandoned, if so, and then the address is assigned, if so. Result
// has to follow.
type Decision struct {
	ID      uint64
	Index   uint32
	Addr    netip.Addr
	Epoch   uint64
	Abandon bool   // From is gone
	To      string // "": is not assigned
	From    string // serves it, or was to
	Reason  string
	// Planned: From lives, and gives the address up in order.
	Planned bool
}

// String describes the decision in a line.
func (d *Decision) String() string {
	s := ""
	if d.Abandon {
		s = fmt.Sprintf("period %d of %s at %s is over, ", d.Epoch, d.Addr, d.From)
	}
	switch {
	case d.To == "":
		s = strings.TrimSuffix(s, ", ")
	case d.Planned && d.To == d.From:
		s += fmt.Sprintf("%s is not moved", d.Addr)
	case d.Planned:
		s += fmt.Sprintf("move %s from %s to %s", d.Addr, d.From, d.To)
	default:
		s += fmt.Sprintf("%s goes to %s", d.Addr, d.To)
	}
	return s + ": " + d.Reason
}

// EventKind says what an Event is about.
type EventKind string

// Values of EventKind.
const (
	// NodeEvent: what is thought of Node has changed.
	NodeEvent EventKind = "node"
	// QuorumEvent: the leader may decide from now on, or not any more.
	QuorumEvent EventKind = "quorum"
	// AddressEvent: something about an address that is no decision: it cannot be
	// served, does not get on, was moved by somebody else.
	AddressEvent EventKind = "address"
	// DecisionEvent: the registry has taken a decision (Err: has not).
	DecisionEvent EventKind = "decision"
)

// Event is something that the administrator may want to know.
type Event struct {
	Kind     EventKind
	Node     string
	Index    uint32
	Addr     netip.Addr
	Epoch    uint64
	Move     uint64 // mgs.VIP.MoveID
	From, To string
	Text     string // what, and why
	Err      string
}

// Machine decides. Its methods are for one goroutine at a time. Times are readings of
// a steady clock that never go back. Between Lead and Resign it decides, at Tick.
type Machine struct {
	cfg   Config
	nodes map[string]*node
	order []*node // by name

	leads    bool
	term     uint64
	since    time.Duration // of Lead, of the first address, or of the end of a pause
	settled  bool
	quorum   bool
	seen     int    // nodes that have answered, this one too
	told     string // of the quorum
	ticked   time.Duration
	haveView bool
	addrs    map[uint32]*addr
	indexes  []uint32 // of addrs, sorted
	ids      uint64
	events   []Event

	version  Version // of the memory
	recalled Memory
}

// node is what is known of a node.
type node struct {
	name    string
	self    bool
	drained bool

	state       HealthState
	incarnation uint64
	slow        bool
	// suspected is when the suspicion began, slowSince when slow did.
	suspected, slowSince time.Duration

	report *Report
	// asked is when the question was asked that report answers, heard when it was
	// answered.
	asked, heard time.Duration

	dead string // why; "": it is not
	died time.Duration
	// fit: it gets addresses; unfit is why not. unready: that is because it cannot serve.
	fit                    bool
	unfit                  string
	fitSince, unreadySince time.Duration
	unready                bool
	ready                  time.Duration // when it was unready last
	said                   string        // the last event, without what changes all the time
}

// addr is a floating address.
type addr struct {
	v mgs.VIP
	// assigned is when the assignment was seen first, ready when the assigned node
	// listened, began when the period of service was seen first, free when nobody
	// served it any more.
	assigned, ready, began, free time.Duration
	// of is the process that was seen serving the period; 0: none was.
	of uint64
	// well is the last period of service that its node has said to serve.
	well uint64
	// by is the process that it is assigned to; 0: not known.
	by uint64
	// absent is since when its node says that it does not serve it; 0: it does not.
	absent time.Duration

	pending *Decision
	// tried is the last decision's To, triedAt the MoveID that it was made for: what
	// became of it may be known from the registry only.
	tried   string
	triedAt uint64
	retry   time.Duration // after an error
	errors  int

	own       bool // this leader knows who has assigned it
	mine      bool // this leader has
	manual    bool
	moves     int
	movedAt   time.Duration
	holdUntil time.Duration
	failed    map[string]failure
	said      string
}

// failure is a node that did not take the address.
type failure struct {
	at    time.Duration // the last one
	until time.Duration // others are preferred until then
	again time.Duration // it is not tried before, not even if all others have failed, too
	times int           // since it last served the address
}

// NewMachine returns a machine that does not lead.
func NewMachine(cfg Config) (*Machine, error) {
	if err := cfg.prepare(); err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg}
	m.reset()
	return m, nil
}

func (m *Machine) reset() {
	m.nodes, m.order = map[string]*node{}, nil
	for _, name := range m.cfg.Nodes {
		if m.nodes[name] != nil {
			continue
		}
		n := &node{name: name, self: name == m.cfg.Node}
		if n.self {
			n.state = Alive
		}
		m.nodes[name] = n
		m.order = append(m.order, n)
	}
	slices.SortFunc(m.order, func(a, b *node) int { return cmp.Compare(a.name, b.name) })
	m.addrs, m.indexes = map[uint32]*addr{}, nil
	m.leads, m.settled, m.quorum, m.haveView, m.seen = false, false, false, false, 0
	m.told, m.version, m.recalled = "", Version{}, Memory{}
}

// Lead begins a term. Nothing of an earlier one counts; results of its decisions are
// ignored.
func (m *Machine) Lead(now time.Duration, term uint64) {
	m.reset()
	m.leads, m.term = true, term
	m.begin(now)
}

// begin is when the nodes are asked for the first time.
func (m *Machine) begin(now time.Duration) {
	m.since, m.ticked, m.settled = now, now, false
	for _, n := range m.order {
		n.suspected, n.unreadySince, n.fitSince = now, now, now
	}
}

// Resign ends the term.
func (m *Machine) Resign() { m.reset() }

// Events returns what happened since the last call. The slice is the caller's.
func (m *Machine) Events() []Event {
	e := m.events
	m.events = nil
	return e
}

// Floating tells whether there is anything to decide about.
func (m *Machine) Floating() bool { return len(m.addrs) > 0 }

// Lost tells that the registry cannot be read: nothing is decided until View.
func (m *Machine) Lost() { m.haveView = false }

// View takes what the registry says. It keeps nothing of it but strings.
func (m *Machine) View(now time.Duration, v *mgs.View) {
	if !m.leads {
		return
	}
	m.haveView = true
	for _, n := range m.order {
		n.drained = slices.Contains(v.Drained, n.name)
	}
	if len(m.addrs) == 0 {
		m.begin(now)
	}
	there := map[uint32]bool{}
	for i := range v.VIPs {
		if x := &v.VIPs[i]; x.Bits != 0 {
			there[x.Index] = true
			m.vip(now, x)
		}
	}
	maps.DeleteFunc(m.addrs, func(i uint32, _ *addr) bool { return !there[i] })
	m.indexes = slices.Sorted(maps.Keys(m.addrs))
}

// vip takes what the registry says of one address.
func (m *Machine) vip(now time.Duration, v *mgs.VIP) {
	a := m.addrs[v.Index]
	if a == nil {
		a = &addr{v: *v, assigned: now, ready: now, began: now, free: now, failed: map[string]failure{}}
		m.addrs[v.Index] = a
		if n := m.nodes[v.Next]; n != nil {
			a.by = n.incarnation
		}
		m.remember(now, a)
		return
	}
	// Numbers never fall; what is read may be older than what a decision has returned.
	if v.Epoch < a.v.Epoch || v.MoveID < a.v.MoveID {
		return
	}
	old := a.v
	a.v = *v
	if v.MoveID != old.MoveID {
		a.assigned, a.ready, a.by = now, now, 0
		if n := m.nodes[v.Next]; n != nil {
			a.by = n.incarnation
		}
		m.moved(now, a, &old)
	}
	if v.Ready && !old.Ready {
		a.ready = now
	}
	if v.Epoch != old.Epoch {
		a.began, a.of, a.absent = now, 0, 0
	}
	if owner(v) == "" && owner(&old) != "" {
		a.free = now
	}
}

// owner is the node that has the address, though it may be dead; "": none.
func owner(v *mgs.VIP) string {
	if v.Clean {
		return ""
	}
	return v.Node
}

// moved takes note of a new assignment.
func (m *Machine) moved(now time.Duration, a *addr, old *mgs.VIP) {
	mine := a.tried != "" && a.v.Next == a.tried && a.v.MoveID == a.triedAt+1
	a.own, a.mine = true, mine
	a.manual = !mine && a.v.Next != "" && (len(a.v.Prefer) == 0 || a.v.Prefer[0] != a.v.Next)
	switch {
	case mine || a.v.Removed:
	case a.v.Drained:
		m.tell(a, "", "drained: nobody is to serve it", "")
	case a.v.Next != "":
		m.tell(a, a.v.Next, "moved by hand, or by the command of another program", "")
	}
	if a.v.Next != old.Next && old.Next != "" {
		m.hold(now, a)
	}
	m.changed()
}

// hold begins the time in which the address is not moved without need.
func (m *Machine) hold(now time.Duration, a *addr) {
	if a.moves > 0 && now-a.movedAt > m.cfg.HoldOffMax+m.holdOff(a.moves) {
		a.moves = 0
	}
	a.moves = min(a.moves+1, maxMoves)
	a.movedAt, a.holdUntil = now, now+m.holdOff(a.moves)
}

// holdOff is the time after so many moves.
func (m *Machine) holdOff(moves int) time.Duration {
	return doubled(m.cfg.HoldOff, moves, m.cfg.HoldOffMax)
}

// doubled is d for the first time, twice as much for the next, and so on.
func doubled(d time.Duration, times int, most time.Duration) time.Duration {
	for ; times > 1 && d < most; times-- {
		d *= 2
	}
	return min(d, most)
}

// Health takes what this node's beats say of the others: all of them, as it is now.
func (m *Machine) Health(now time.Duration, l []NodeHealth) {
	if !m.leads {
		return
	}
	for i := range l {
		n := m.nodes[l[i].Node]
		if n == nil || n.self {
			continue
		}
		if l[i].State == Suspect && n.state != Suspect {
			// A new leader has heard the silence before it led.
			n.suspected = now - min(max(l[i].Suspected, 0), now)
		}
		if l[i].Slow && !n.slow {
			n.slowSince = now
		}
		n.state, n.slow = l[i].State, l[i].Slow
		m.process(n, l[i].Incarnation)
	}
}

// process takes note of a node's present process. Those before are dead.
func (m *Machine) process(n *node, incarnation uint64) {
	if incarnation <= n.incarnation {
		return
	}
	if n.incarnation != 0 {
		m.say(n, "its process was started again: the one before is dead", "")
		n.report = nil
	}
	n.incarnation = incarnation
}

// Report takes a node's answer to what it was asked at the given time. The machine
// keeps r and does not change it.
func (m *Machine) Report(now time.Duration, name string, asked time.Duration, r *Report) {
	n := m.nodes[name]
	if !m.leads || n == nil || r.Check() != nil || n.report != nil && asked <= n.asked {
		return
	}
	if r.Incarnation < n.incarnation {
		return // of a process that is dead
	}
	m.process(n, r.Incarnation)
	// An answer that this process was stopped before may be as old as the stop was long.
	n.report, n.asked, n.heard = r, asked, min(now, asked+askTime)
	m.recall(now, r.Memory)
	for _, a := range m.addrs {
		if owner(&a.v) != name || a.began > asked {
			continue
		}
		x := r.of(a.v.Index)
		switch {
		case x != nil && x.holds() && x.Epoch == a.v.Epoch:
			a.of, a.absent = r.Incarnation, 0
			if x.State == Serving && a.well != x.Epoch {
				a.well, a.said = x.Epoch, ""
				delete(a.failed, name)
			}
		case x != nil && (x.State == Releasing || x.State == Taking):
			a.absent = 0 // it may not know its epoch yet; targets may take their time
		case a.absent == 0:
			a.absent = now
		}
	}
}

// Result tells what became of a decision: the address as the registry returned it, if
// it has, or the error.
func (m *Machine) Result(now time.Duration, id uint64, v *mgs.VIP, err error) {
	for _, a := range m.addrs {
		d := a.pending
		if d == nil || d.ID != id {
			continue
		}
		e := Event{Kind: DecisionEvent, Index: d.Index, Addr: d.Addr, Epoch: d.Epoch, From: d.From, To: d.To, Text: d.String()}
		if err != nil {
			a.errors = min(a.errors+1, maxMoves)
			a.retry = now + doubled(m.cfg.Interval, a.errors, 10*m.cfg.Interval)
			e.Err = err.Error()
		} else {
			a.errors = 0
			if v != nil {
				m.vip(now, v)
			} else if d.Abandon && a.v.Epoch == d.Epoch && owner(&a.v) == d.From {
				a.v.Node, a.free = "", now
			}
		}
		e.Move = a.v.MoveID
		m.events = append(m.events, e)
		a.pending = nil
		return
	}
}

// say tells something of a node, once; more may change without being told again.
func (m *Machine) say(n *node, text, more string) {
	if n.said != text {
		n.said = text
		if more != "" {
			text += ": " + more
		}
		m.events = append(m.events, Event{Kind: NodeEvent, Node: n.name, Text: text})
	}
}

// tell tells something of an address, as say does of a node.
func (m *Machine) tell(a *addr, to, text, more string) {
	if a.said != text {
		a.said = text
		if more != "" {
			text += ": " + more
		}
		m.events = append(m.events, Event{Kind: AddressEvent, Index: a.v.Index, Addr: a.v.Addr, Epoch: a.v.Epoch, Move: a.v.MoveID, From: owner(&a.v), To: to, Text: text})
	}
}
