package manager

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// lost is why the period of service of an address is over though its node has not
// ended it, "" if it is not.
func (m *Machine) lost(now time.Duration, a *addr) string {
	name := owner(&a.v)
	if name == "" {
		return ""
	}
	n := m.nodes[name]
	if n == nil {
		m.tell(a, "", "its node is not among the nodes of the cluster", "baton vip move --force if it is gone")
		return ""
	}
	moving := a.v.Next != name && a.v.Ready && now-a.ready >= m.cfg.MoveTimeout
	x := n.report.of(a.v.Index)
	switch {
	case n.dead != "":
		return "node " + name + " is dead: " + n.dead
	case a.of != 0 && a.of < n.incarnation:
		return "the process of node " + name + " that served it has ended, another one runs"
	case a.absent != 0 && m.present(now, n) && now-a.absent >= m.cfg.StartTimeout:
		return fmt.Sprintf("node %s has said for %v that it does not serve it", name, m.cfg.StartTimeout)
	case moving && m.mute(now, n):
		return fmt.Sprintf("node %s does not answer and has not given it up in %v: it is taken for frozen", name, m.cfg.MoveTimeout)
	case moving && m.present(now, n) && x != nil && x.State == Failed && x.Silent:
		return fmt.Sprintf("node %s could not remove it in %v, and drops all that comes for it", name, m.cfg.MoveTimeout)
	case moving && m.present(now, n) && x != nil && x.State == Failed && !x.mayAnswer():
		return fmt.Sprintf("node %s has failed with it and has not given it up in %v", name, m.cfg.MoveTimeout)
	}
	return ""
}

// decide says what is to be done about an address, nil for nothing. With balance,
// nothing else was to be done about any.
func (m *Machine) decide(now time.Duration, a *addr, balance bool) *Decision {
	d := &Decision{From: owner(&a.v)}
	if lost := m.lost(now, a); lost != "" {
		d.Abandon, d.Reason = true, lost
	}
	switch {
	case a.v.Removed, a.v.Drained: // nobody is to serve it
		if !d.Abandon {
			return nil
		}
	case d.From == "" || d.Abandon:
		m.unserved(now, a, d)
	default:
		m.served(now, a, d, balance)
	}
	if !d.Abandon && d.To == "" {
		return nil
	}
	if d.From == "" {
		d.From = a.v.Node // the last
	}
	a.tried, a.triedAt = d.To, a.v.MoveID
	return d
}

// unserved finds a node for an address that nobody serves, or whose node is gone.
func (m *Machine) unserved(now time.Duration, a *addr, d *Decision) {
	why := d.Reason
	next := m.nodes[a.v.Next]
	if next != nil && (a.by == 0 || next.incarnation > a.by && (next.fit || m.ordered(now, a))) {
		if a.by != 0 { // the new process may take its time, too
			a.assigned = now
		}
		a.by = next.incarnation
	}
	free := a.free
	if d.Abandon {
		free = now // until now it could not be taken
	}
	switch waited := now - max(a.assigned, a.free); {
	case d.Abandon && a.v.Next == d.From:
	case a.v.Next == "":
		why = cmp.Or(why, "nobody serves it")
	case next == nil:
		why = cmp.Or(why, "node "+a.v.Next+" is not in the cluster")
	case m.gone(now, a, next):
		why = cmp.Or(why, "node "+a.v.Next+", which was to serve it, is dead")
	case m.stops(now, next), next.drained:
		why = cmp.Or(why, "node "+a.v.Next+", which was to serve it, is to have no addresses: "+next.unfit)
	case m.broken(now, a, next):
		m.fail(now, a, a.v.Next, next.failedAt(a))
		why = cmp.Or(why, "node "+a.v.Next+" could not take it")
	case next.incarnation > a.by && !next.fit:
		why = cmp.Or(why, "the process of node "+a.v.Next+" that was to serve it has ended, another one runs")
	case !a.v.Ready && waited >= m.cfg.StartTimeout:
		m.fail(now, a, a.v.Next, max(a.assigned, a.free))
		why = cmp.Or(why, fmt.Sprintf("node %s was not ready to take it in %v", a.v.Next, m.cfg.StartTimeout))
	case a.v.Ready && now-max(a.ready, free) >= m.cfg.MoveTimeout:
		m.fail(now, a, a.v.Next, max(a.ready, free))
		why = cmp.Or(why, fmt.Sprintf("node %s has not begun to serve it in %v", a.v.Next, m.cfg.MoveTimeout))
	default:
		return // it is on its way
	}
	to, rule := m.choose(now, a, "", 0, true)
	switch {
	case to == nil:
		m.tell(a, "", "cannot be served: no node that may serve it is fit", m.whyNone(now, a))
		return
	case to.name == a.v.Next:
		if !d.Abandon { // only this one is left: it may go on trying
			a.assigned, a.ready = now, now
		}
		d.Reason = why
		return
	}
	d.To, d.Reason = to.name, why+"; "+rule
}

// served moves an address that is served, if there is need, or if it belongs elsewhere.
func (m *Machine) served(now time.Duration, a *addr, d *Decision, balance bool) {
	n := m.nodes[d.From]
	if n == nil || n.unfit == silent {
		return // until it is known what became of the node
	}
	leave, need := m.leave(now, n)
	ends := false // the node has nothing to give up, and is about to say so
	if x := n.report.of(a.v.Index); leave == "" && x != nil && x.State == Failed && x.Epoch == a.v.Epoch && m.present(now, n) {
		m.fail(now, a, n.name, n.failedAt(a))
		leave, need, ends = "node "+n.name+" has failed with it", true, !x.Stuck
		if x.Reason != "" {
			leave += ": " + x.Reason
		}
	}
	if a.v.Next != d.From {
		m.moving(now, a, d, leave)
		return
	}
	switch {
	case m.moves(now) >= m.cfg.ParallelMoves:
		return
	case need, leave != "" && now >= a.holdUntil:
		least := time.Duration(0)
		if n.unready {
			// When what all nodes were waiting for comes back, some notice it later.
			least = m.cfg.UnreadyAfter
		}
		to, rule := m.choose(now, a, d.From, least, false)
		if to == nil && ends {
			return // it is about to be unserved
		}
		if to == nil {
			m.tell(a, "", leave+", but no other node that may serve it is fit", m.whyNone(now, a))
			return
		}
		d.To, d.Reason, d.Planned = to.name, leave+"; "+rule, true
	case leave != "":
	case balance:
		if to, why := m.balance(now, a, n); to != nil {
			d.To, d.Reason, d.Planned = to.name, why, true
		}
	default:
		if to, why := m.better(now, a, n); to != nil {
			d.To, d.Reason, d.Planned = to.name, why, true
		}
	}
}

// moving looks after a planned move that is under way.
func (m *Machine) moving(now time.Duration, a *addr, d *Decision, leave string) {
	next := m.nodes[a.v.Next]
	stuck := m.nodes[d.From].report.of(a.v.Index)
	why := ""
	switch {
	case next == nil:
		why = "node " + a.v.Next + " is not in the cluster"
	case m.gone(now, a, next):
		why = "node " + a.v.Next + ", which was to take it, is dead"
	case m.stops(now, next), next.drained:
		why = "node " + a.v.Next + ", which was to take it, is to have no addresses: " + next.unfit
	case m.broken(now, a, next):
		m.fail(now, a, a.v.Next, next.failedAt(a))
		why = "node " + a.v.Next + " could not take it"
	case !a.v.Ready && now-a.assigned >= m.cfg.StartTimeout:
		m.fail(now, a, a.v.Next, a.assigned)
		why = fmt.Sprintf("node %s was not ready to take it in %v", a.v.Next, m.cfg.StartTimeout)
	case a.v.Ready && now-a.ready >= m.cfg.MoveTimeout && stuck != nil && stuck.mayAnswer():
		m.tell(a, a.v.Next, fmt.Sprintf("the machine of node %s still has it: nobody serves it until it is removed there by hand, or that machine is off", d.From), stuck.Reason)
		return
	case a.v.Ready && now-a.ready >= m.cfg.MoveTimeout:
		m.tell(a, a.v.Next, fmt.Sprintf("node %s has not given it up in %v; it lives, so it keeps it until it does", d.From, m.cfg.MoveTimeout), leave)
		return
	default:
		return
	}
	d.Planned = true
	if leave != "" {
		if to, rule := m.choose(now, a, d.From, 0, false); to != nil && to.name != a.v.Next {
			d.To, d.Reason = to.name, why+"; "+rule
			return
		}
	}
	d.To, d.Reason = d.From, why+"; it stays at "+d.From
}

// stops tells that a node wants to have no addresses because it stops.
func (m *Machine) stops(now time.Duration, n *node) bool {
	return n.report != nil && n.report.Stopping && m.present(now, n)
}

// broken tells that the assigned node says that it cannot take the address.
func (m *Machine) broken(now time.Duration, a *addr, n *node) bool {
	x := n.report.of(a.v.Index)
	if x == nil || x.State != Failed || !m.present(now, n) {
		return false
	}
	// A node may be faster than the answer of the registry to the leader.
	return x.Move == a.v.MoveID || x.Move == 0 && n.asked-x.Since >= a.assigned
}

// failedAt is since when the node says that it has failed with the address.
func (n *node) failedAt(a *addr) time.Duration {
	x := n.report.of(a.v.Index)
	at := n.asked - x.Since
	if x.Move == a.v.MoveID {
		at = max(at, a.assigned) // it may have failed with others before
	}
	return at
}

// Of a node that has failed, and all others have, too: the pause after the first time
// doubles up to the most.
const (
	againPause    = time.Second
	againPauseMax = 15 * time.Second
)

// fail notes that a node has failed with the address since the given time, so that
// others are tried first. The same failure is noted once.
func (m *Machine) fail(now time.Duration, a *addr, name string, since time.Duration) {
	f := a.failed[name]
	if f.times > 0 && since <= f.at {
		return
	}
	f.at, f.times = now, min(f.times+1, maxMoves)
	f.until = now + doubled(m.cfg.HoldOff, f.times, m.cfg.HoldOffMax)
	f.again = now + doubled(againPause, f.times, againPauseMax)
	a.failed[name] = f
}

// moves counts the planned moves under way that may still be expected to end.
func (m *Machine) moves(now time.Duration) (k int) {
	for _, i := range m.indexes {
		a := m.addrs[i]
		switch o := owner(&a.v); {
		case a.pending != nil && a.pending.Planned:
			k++
		case o != "" && a.v.Next != "" && a.v.Next != o && now-max(a.assigned, a.ready) < m.cfg.MoveTimeout:
			k++
		}
	}
	return k
}

// addresses counts those that a node serves or is to serve.
func (m *Machine) addresses(n *node) (k int) {
	for _, i := range m.indexes {
		a := m.addrs[i]
		to := a.v.Next
		if a.pending != nil && a.pending.To != "" {
			to = a.pending.To
		}
		if to == n.name {
			k++
		}
	}
	return k
}

// may lists the nodes that may serve an address. With preferences, the best is first.
func (m *Machine) may(a *addr) []*node {
	if len(a.v.Prefer) == 0 {
		return m.order
	}
	var l []*node
	for _, name := range a.v.Prefer {
		if n := m.nodes[name]; n != nil {
			l = append(l, n)
		}
	}
	return l
}

// choose finds the best node for an address, another one than not, that has been fit for
// at least a time. Those that have failed with it lately are left out, or with all come
// last, after a pause.
func (m *Machine) choose(now time.Duration, a *addr, not string, least time.Duration, all bool) (to *node, rule string) {
	var l, again []*node
	for _, n := range m.may(a) {
		switch {
		case !n.fit || n.name == not || now-n.fitSince < least || n.report.stuck(a):
		case now < a.failed[n.name].until:
			again = append(again, n)
		default:
			l = append(l, n)
		}
	}
	switch {
	case len(l) > 0 && len(a.v.Prefer) > 0:
		return l[0], fmt.Sprintf("%s is the best of its nodes that is fit", l[0].name)
	case len(l) > 0:
		to = slices.MinFunc(l, m.fewer)
		return to, fmt.Sprintf("%s has the fewest addresses (%d)", to.name, m.addresses(to))
	case len(again) > 0 && all:
		// Everybody has failed: in turn.
		to = slices.MinFunc(again, func(x, y *node) int {
			return cmp.Or(cmp.Compare(a.failed[x.name].again, a.failed[y.name].again), cmp.Compare(x.name, y.name))
		})
		if now >= a.failed[to.name].again {
			return to, to.name + " tries again"
		}
	}
	return nil, ""
}

// fewer orders nodes for balanced placement.
func (m *Machine) fewer(x, y *node) int {
	lx, ly := 0.0, 0.0
	if x.report != nil && y.report != nil {
		lx, ly = x.report.Load, y.report.Load
	}
	return cmp.Or(cmp.Compare(m.addresses(x), m.addresses(y)), cmp.Compare(lx, ly), cmp.Compare(x.name, y.name))
}

// settledAt tells that an address may be moved without need.
func (m *Machine) settledAt(now time.Duration, a *addr) bool {
	return m.cfg.FailbackDelay != Never && !a.manual && now >= a.holdUntil && now-a.began >= m.cfg.FailbackDelay
}

// welcomes tells that a node may be given an address without need.
func (m *Machine) welcomes(now time.Duration, a *addr, n *node) bool {
	return n.fit && now-n.fitSince >= m.cfg.FailbackDelay && now >= a.failed[n.name].until
}

// better finds the node that an address returns to, because it prefers that.
func (m *Machine) better(now time.Duration, a *addr, at *node) (*node, string) {
	if len(a.v.Prefer) == 0 || !m.settledAt(now, a) {
		return nil, ""
	}
	for _, n := range m.may(a) {
		if n == at {
			break
		}
		if m.welcomes(now, a, n) {
			return n, fmt.Sprintf("%s is preferred and has been fit for %v", n.name, m.cfg.FailbackDelay)
		}
	}
	return nil, ""
}

// balance finds a node that has at least two addresses less, for an address that
// prefers none.
func (m *Machine) balance(now time.Duration, a *addr, at *node) (*node, string) {
	if len(a.v.Prefer) > 0 || !m.settledAt(now, a) {
		return nil, ""
	}
	best := at
	for _, n := range m.order {
		if m.welcomes(now, a, n) && m.fewer(n, best) < 0 {
			best = n
		}
	}
	if k := m.addresses(at); m.addresses(best)+1 < k {
		return best, fmt.Sprintf("%s has %d addresses, %s has %d", at.name, k, best.name, m.addresses(best))
	}
	return nil, ""
}

// whyNone lists why no node is chosen.
func (m *Machine) whyNone(now time.Duration, a *addr) string {
	var l []string
	for _, n := range m.may(a) {
		why := n.why()
		if why == "" && n.report.stuck(a) {
			why = "its machine still has the address from before"
		}
		if why == "" && now < a.failed[n.name].until {
			why = "it has failed with the address lately"
		}
		if why != "" {
			l = append(l, n.name+": "+why)
		}
	}
	if len(m.may(a)) == 0 {
		return "none of the nodes that it prefers is in the cluster"
	}
	return strings.Join(l, "; ")
}
