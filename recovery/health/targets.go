package health

import "time"

// seen is a target of a peer's last beat.
type seen struct {
	Target
	// since is when it was first seen at this progress with work.
	since time.Duration
	slow  bool
}

// learn compares a beat's targets with those of the one before. anew: the peer was
// silent in between, which says nothing about its targets' progress.
func (m *Machine) learn(now time.Duration, p *peer, b *Beat, anew bool) {
	// The first pass only takes away: a target is never up twice.
	for i, j := 0, 0; i < len(p.targets); i++ {
		o := &p.targets[i]
		for j < len(b.Targets) && b.Targets[j].Name < o.Name {
			j++
		}
		if j == len(b.Targets) || b.Targets[j].Name != o.Name || !b.Targets[j].State.up() {
			m.gone(p, o)
		}
	}
	old := p.targets
	p.targets = make([]seen, 0, len(b.Targets))
	for i, t := range b.Targets {
		for len(old) > 0 && old[0].Name < t.Name {
			old = old[1:]
		}
		s := seen{Target: b.Targets[i], since: now}
		m.up(p, &t)
		if len(old) > 0 && old[0].Name == t.Name && old[0].Instance == t.Instance {
			m.progress(now, p, &old[0], &s, anew)
		}
		p.targets = append(p.targets, s)
	}
	self := seen{Target: Target{Work: 1, Progress: uint64(b.Round)}, since: now}
	if p.self.Work != 0 {
		m.progress(now, p, &p.self, &self, anew)
	}
	p.self = self
}

// up takes the word of a peer that it runs a target.
func (m *Machine) up(p *peer, t *Target) {
	if !t.State.up() {
		return
	}
	k := m.known[t.Name]
	if k == nil {
		if len(m.known) >= m.cfg.MaxKnown {
			return
		}
		k = &known{}
		m.known[t.Name] = k
	}
	e := Event{Kind: TargetUp, Target: t.Name, Instance: t.Instance}
	switch {
	case t.Instance < k.instance, t.Instance == k.instance && k.node != "":
		return
	case k.node != "" && k.node != p.name:
		e.Kind, e.From = TargetMoved, k.node
	}
	k.node, k.instance = p.name, t.Instance
	m.event(p, e)
}

// gone takes the word of a peer that it no longer runs a target. What another peer
// has said since counts more.
func (m *Machine) gone(p *peer, t *seen) {
	if k := m.known[t.Name]; k != nil && k.node == p.name {
		k.node = ""
		m.event(p, Event{Kind: TargetGone, Target: t.Name, Instance: k.instance})
	}
}

// progress finds out whether a target stands still.
func (m *Machine) progress(now time.Duration, p *peer, old, s *seen, anew bool) {
	stuck := old.Work > 0 && s.Work > 0 && s.Progress == old.Progress
	if stuck {
		s.slow = old.slow
		if !anew {
			s.since = old.since
		}
	}
	switch {
	case old.slow && !stuck:
		m.event(p, Event{Kind: Steady, Target: s.Name, Instance: s.Instance})
	case stuck && !s.slow && now-s.since >= m.cfg.SlowAfter:
		s.slow = true
		m.event(p, Event{Kind: Slow, Target: s.Name, Instance: s.Instance})
	}
}
