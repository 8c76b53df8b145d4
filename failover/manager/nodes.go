package manager

import (
	"fmt"
	"time"
)

// Tick returns what is to be done now. It is called at least every Interval, and
// may be called at any time.
func (m *Machine) Tick(now time.Duration) []Decision {
	if !m.leads {
		return nil
	}
	if now-m.ticked > m.cfg.fresh() {
		m.paused(now)
	}
	m.ticked = now
	m.count(now)
	for _, n := range m.order {
		m.judge(now, n)
	}
	if !m.ready(now) {
		return nil
	}
	var l []Decision
	for _, balance := range []bool{false, true} {
		for _, i := range m.indexes {
			a := m.addrs[i]
			if a.pending != nil || now < a.retry || balance && owner(&a.v) == "" {
				continue
			}
			if d := m.decide(now, a, balance); d != nil {
				m.ids++
				d.ID, d.Index, d.Addr, d.Epoch = m.ids, a.v.Index, a.v.Addr, a.v.Epoch
				a.pending = d
				l = append(l, *d)
			}
		}
	}
	return l
}

// paused: this process has not run for a while, so what it has not heard meanwhile
// says nothing. Every clock that judges somebody begins anew.
func (m *Machine) paused(now time.Duration) {
	m.since = now
	for _, n := range m.order {
		n.suspected, n.slowSince, n.unreadySince = now, now, now
		if n.report != nil && !n.self {
			n.fitSince = now
		}
	}
	for _, a := range m.addrs {
		a.assigned, a.ready, a.free = now, now, now
		if a.absent != 0 {
			a.absent = now
		}
	}
}

// present tells that the node has answered lately. Questions are given up after askTime:
// with the age of the question a node that takes almost that long would come and go.
func (m *Machine) present(now time.Duration, n *node) bool {
	return n.report != nil && now-n.heard <= m.cfg.fresh()
}

// count finds out whether there is a quorum.
func (m *Machine) count(now time.Duration) {
	m.seen = 0
	for _, n := range m.order {
		if n.self || m.present(now, n) {
			m.seen++
		}
	}
	m.quorum = m.enough(m.seen)
	patience := settle
	if m.told != "" {
		patience = m.cfg.fresh()
	}
	if len(m.addrs) == 0 || !m.quorum && now-m.since < patience {
		return
	}
	text := "a majority of nodes answers: addresses are assigned"
	switch {
	case m.cfg.Quorum == Owner:
		text = "the node with the registry assigns addresses, whoever answers"
	case !m.quorum:
		text = "no majority of nodes answers: addresses stay where they are"
	}
	if text != m.told {
		m.told = text
		m.events = append(m.events, Event{Kind: QuorumEvent, Text: fmt.Sprintf("%s (%d of %d)", text, m.seen, len(m.order))})
	}
}

// enough tells whether so many nodes, the leader included, may decide.
func (m *Machine) enough(n int) bool { return m.cfg.Quorum == Owner || 2*n > len(m.order) }

// ready tells whether anything may be decided now.
func (m *Machine) ready(now time.Duration) bool {
	if !m.haveView || !m.quorum {
		return false
	}
	if !m.settled {
		for _, n := range m.order {
			if n.report == nil && (n.self || n.state != Suspect) && now-m.since < settle {
				return false // it has had no time to answer yet
			}
		}
		m.settled = true
	}
	return true
}

// judge forms the opinion of a node.
func (m *Machine) judge(now time.Duration, n *node) {
	was := n.dead
	n.dead = m.death(now, n)
	switch {
	case n.dead != "" && was == "":
		n.died = now
		m.say(n, "is dead", n.dead)
	case n.dead == "" && was != "" && n.state != Suspect:
		m.say(n, "is alive again", "")
	}
	unready := false
	n.unfit, unready = m.unfit(now, n)
	// One that can serve now and then, for moments, is of no use either.
	if unready && !n.unready && now-n.ready >= m.cfg.fresh() {
		n.unreadySince = now
	}
	if unready {
		n.ready = now
	}
	n.unready = unready
	if fit := n.unfit == ""; fit != n.fit {
		n.fit = fit
		if n.fitSince = now; fit {
			m.say(n, "can serve addresses", "")
		}
	}
	if n.unfit != "" && n.dead == "" && n.unfit != silent && n.unfit != unasked {
		m.say(n, "gets no addresses: "+n.unfit, n.reason())
	}
}

// Why a node gets no addresses, where the reason has a meaning of its own.
const (
	silent  = "it is silent"
	unasked = "it has not answered yet"
	useless = "it cannot serve"
)

// reason is what the node itself says of why it cannot serve.
func (n *node) reason() string {
	if n.unfit == useless && n.report != nil {
		return n.report.Reason
	}
	return ""
}

// why is why the node gets no addresses.
func (n *node) why() string {
	if r := n.reason(); r != "" {
		return n.unfit + ": " + r
	}
	return n.unfit
}

// silence is since when nothing at all was heard of a node that is suspected. One that
// answers though its beats are missing has the time of an answer more.
func (m *Machine) silence(n *node) time.Duration {
	if n.report != nil && n.asked >= n.suspected {
		return n.heard + m.cfg.fresh()
	}
	return n.suspected
}

// death is why a node is dead, "" if it is not. That a process was started again ends
// its periods of service, not the node.
func (m *Machine) death(now time.Duration, n *node) string {
	if n.self || n.state != Suspect {
		return ""
	}
	since := m.silence(n)
	// Only who was asked since the silence began shows that this node is not the one
	// that is cut off.
	answers, vouchers := 0, 0
	for _, o := range m.order {
		if o.self || o == n || !m.present(now, o) || o.asked < since {
			continue
		}
		answers++
		if h := o.report.hears(n.name); h != nil && h.State == Alive && h.Silence < 3*m.cfg.Interval {
			vouchers++
		}
	}
	if !m.enough(answers + 1) {
		return n.dead // if it was
	}
	need := m.cfg.Confirm
	switch {
	case vouchers == 0:
	case 2*vouchers > answers:
		need = max(m.cfg.UnreadyAfter, 2*need)
	default:
		need *= 2
	}
	switch {
	case now-since < need:
		return ""
	case vouchers > 0:
		return fmt.Sprintf("no beats and no answer for %v since it was suspected; %d of %d other nodes hear it, but it cannot be told anything", need, vouchers, answers)
	}
	if answers == 0 {
		return fmt.Sprintf("no beats and no answer for %v since it was suspected", need)
	}
	return fmt.Sprintf("no beats and no answer for %v since it was suspected, and none of %d other nodes hears it", need, answers)
}

// ordered tells that somebody else has assigned an address only just now. Who assigns it to
// a node that is dead, or whose process is, knows more: that node may just have come back.
func (m *Machine) ordered(now time.Duration, a *addr) bool {
	return !a.mine && now-a.assigned < m.cfg.fresh()
}

// gone tells that the node which is to take an address is dead.
func (m *Machine) gone(now time.Duration, a *addr, n *node) bool {
	return n.dead != "" && (n.died >= a.assigned || !m.ordered(now, a))
}

// unfit is why a node gets no addresses, "" if it does, and whether that is because it
// cannot serve.
func (m *Machine) unfit(now time.Duration, n *node) (why string, unready bool) {
	switch {
	case n.dead != "":
		return "it is dead", false
	case n.state == Suspect && now < m.silence(n):
	case n.state == Suspect:
		return silent, false
	case !m.present(now, n) && now-m.since < m.cfg.fresh():
		return unasked, false
	}
	switch r := n.report; {
	case r == nil || !m.present(now, n):
		return "it does not answer", true
	case r.Stopping:
		return "it stops", false
	case !r.Ready:
		return useless, true
	case n.drained:
		return "it is drained", false
	case n.tooSlow(now, &m.cfg):
		return "it is slow", false
	}
	return "", false
}

// leave is why a node that lives has to give its addresses up, "" if it has not to.
// Need is false when it serves all the same.
func (m *Machine) leave(now time.Duration, n *node) (why string, need bool) {
	switch {
	case n.dead != "" || n.unfit == silent:
		return "", false
	case n.report != nil && n.report.Stopping && m.present(now, n):
		return "node " + n.name + " stops", true
	case n.drained:
		return "node " + n.name + " is drained", true
	case n.unready && now-n.unreadySince >= m.cfg.UnreadyAfter:
		return fmt.Sprintf("node %s has been of no use for %v, %s", n.name, m.cfg.UnreadyAfter, n.why()), true
	case n.tooSlow(now, &m.cfg):
		return fmt.Sprintf("node %s has been slow for %v", n.name, m.cfg.SlowAfter), false
	}
	return "", false
}

func (n *node) tooSlow(now time.Duration, c *Config) bool {
	return c.SlowAfter > 0 && n.slow && now-n.slowSince >= c.SlowAfter
}

// mute tells that a node does not answer and cannot be asked to give anything up.
func (m *Machine) mute(now time.Duration, n *node) bool {
	return n.unready && !m.present(now, n) && now-n.unreadySince >= m.cfg.UnreadyAfter
}
