package health

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Config is what a Machine is made with. Node, Incarnation and Peers are required;
// zero durations mean the defaults.
type Config struct {
	// Node is the name of this node, Peers those of the others.
	Node  string
	Peers []string
	// Incarnation numbers the starts of this process; it has to rise, durably.
	Incarnation uint64
	// Interval is the time between two beats. Default 200 ms.
	Interval time.Duration
	// Lower and Upper bound the silence after which a peer is suspected. Defaults
	// 4 intervals and 5 s. For a peer with a longer interval they are at least 4 and
	// 8 of its intervals.
	Lower, Upper time.Duration
	// SlowAfter is how long a target with work may stand still before it is called
	// slow. Default 3 s.
	SlowAfter time.Duration
	// RedialMax bounds the pause between two attempts to connect. Default 1 s.
	RedialMax time.Duration
	// MaxKnown bounds the names of targets that are remembered. Default 4096.
	MaxKnown int
}

// DefaultInterval is the time between two beats unless Config says otherwise.
const DefaultInterval = 200 * time.Millisecond

// maxInterval bounds what a peer may say of its interval.
const maxInterval = 10 * time.Second

func (c *Config) prepare() error {
	for p, d := range map[*time.Duration]time.Duration{&c.Interval: DefaultInterval, &c.Upper: 5 * time.Second, &c.SlowAfter: 3 * time.Second, &c.RedialMax: time.Second} {
		if *p <= 0 {
			*p = d
		}
	}
	c.Interval = min(max(c.Interval.Truncate(time.Millisecond), time.Millisecond), maxInterval)
	if c.Lower <= 0 {
		c.Lower = 4 * c.Interval
	}
	c.Upper = max(c.Upper, c.Lower)
	if c.MaxKnown <= 0 {
		c.MaxKnown = 4096
	}
	if c.Node == "" || c.Incarnation == 0 {
		return errors.New("health: a node name and an incarnation are needed")
	}
	if slices.Contains(c.Peers, c.Node) {
		return fmt.Errorf("health: node %s is its own peer", c.Node)
	}
	return nil
}

// Kind says what an Event is about.
type Kind uint8

// Kinds of events.
const (
	// Reset: forget everything that earlier events said; what holds now follows.
	Reset Kind = iota
	// Alive: the peer is heard for the first time, or again after Suspect, after
	// Silence in all, or after a time without interest.
	Alive
	// Suspect: the peer was silent for Silence. It may be dead. What follows is
	// Alive, or Suspect again if there was no interest meanwhile.
	Suspect
	// Restarted: the peer runs as Incarnation; the process before it is dead, and was
	// heard the last time Silence ago. TargetGone of all targets that it ran follows.
	Restarted
	// TargetUp: the target runs at the peer, as Instance.
	TargetUp
	// TargetMoved is TargetUp of a target that ran at From before.
	TargetMoved
	// TargetGone: the peer says that Instance of the target no longer runs there.
	TargetGone
	// Slow: the target (without a name: the peer itself) has work and stands still.
	Slow
	// Steady ends Slow. It does not follow when the target or the peer has gone or
	// started anew.
	Steady
	// Serves: the peer says that it serves an address, in this epoch.
	Serves
)

// String gives the kind's name.
func (k Kind) String() string {
	if names := [...]string{"reset", "alive", "suspect", "restarted", "target up", "target moved", "target gone", "slow", "steady", "serves"}; int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("event-%d", uint8(k))
}

// Event is something that the node has learnt of a peer. Fields that its kind does
// not name are zero, but for Peer and Incarnation.
type Event struct {
	Kind        Kind
	Peer        string
	Incarnation uint64
	Target      string
	Instance    uint64
	From        string
	Silence     time.Duration
	VIP         VIP
}

// Local is what the node knows of itself. Targets and VIPs may be in any order.
type Local struct {
	Targets []Target
	VIPs    []VIP
	// Peers are the nodes that hold state here or on which this node holds some.
	Peers []string
}

// Machine is one node's view of its peers. Times are readings of a steady clock that
// never go back. Methods for a peer that is none of Config.Peers do nothing.
type Machine struct {
	cfg    Config
	peers  map[string]*peer
	order  []*peer // by name
	known  map[string]*known
	round  uint32
	local  Local
	events []Event
}

// known is what is remembered of a target, also after it has gone.
type known struct {
	node     string // where it runs, "" for nowhere
	instance uint64 // the highest of all times
}

// New returns a machine whose peers are all idle.
func New(cfg Config) (*Machine, error) {
	if err := cfg.prepare(); err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg, peers: map[string]*peer{}, known: map[string]*known{}}
	for _, name := range cfg.Peers {
		if name == "" || m.peers[name] != nil {
			return nil, fmt.Errorf("health: peer %q is named twice or has no name", name)
		}
		p := &peer{cfg: &m.cfg, name: name, dials: cfg.Node < name, backoff: cfg.Interval, tokens: burst}
		m.peers[name] = p
		m.order = append(m.order, p)
	}
	slices.SortFunc(m.order, func(a, b *peer) int { return strings.Compare(a.name, b.name) })
	return m, nil
}

// Events returns what was learnt since the last call. The slice is the caller's.
func (m *Machine) Events() []Event {
	e := m.events
	m.events = nil
	return e
}

func (m *Machine) event(p *peer, e Event) {
	e.Peer, e.Incarnation = p.name, p.incarnation
	m.events = append(m.events, e)
}

// SetLocal says what this node is and in whom it is interested. The machine keeps
// l's lists and does not change them. What cannot be sent is refused, and then
// nothing changes.
func (m *Machine) SetLocal(now time.Duration, l Local) error {
	l.Targets = slices.Clone(l.Targets)
	l.VIPs = slices.Clone(l.VIPs)
	slices.SortFunc(l.Targets, func(a, b Target) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(l.VIPs, func(a, b VIP) int { return cmp.Compare(a.Index, b.Index) })
	if err := (&Beat{Targets: l.Targets, VIPs: l.VIPs}).Check(); err != nil {
		return err
	}
	m.local = l
	m.round++
	for _, p := range m.order {
		if on := slices.Contains(l.Peers, p.name); on != p.local {
			p.local, p.told = on, 0
		}
		p.now = max(p.now, now)
		p.watch(now)
	}
	return nil
}

// Beat fills b with the next beat to a peer. Its lists are the machine's and do not
// change. It is false for an unknown peer.
func (m *Machine) Beat(name string, b *Beat) bool {
	p := m.peers[name]
	if p == nil {
		return false
	}
	p.seq++
	if !p.local && p.told == 0 {
		p.told = p.seq
	}
	p.stats.Sent++
	*b = Beat{
		Incarnation: m.cfg.Incarnation, Seq: p.seq, Echo: p.lastSeq, Interval: m.cfg.Interval, Want: p.local,
		Round: m.round, Targets: m.local.Targets, VIPs: m.local.VIPs,
	}
	return true
}

// Allow tells whether a beat that has come from a peer may be looked at. Beats
// beyond a multiple of the usual rate may not, and those of unknown nodes.
func (m *Machine) Allow(now time.Duration, name string) bool {
	p := m.peers[name]
	return p != nil && p.allow(now)
}

// Via says how a beat came.
type Via uint8

// Ways of a beat.
const (
	// Request: by a connection that the peer has dialled.
	Request Via = iota
	// Answer: as the answer to a beat.
	Answer
)

// Heard takes a beat that was received from a peer, and reports whether it is news.
// It does not keep b's lists.
func (m *Machine) Heard(now time.Duration, name string, b *Beat, via Via) bool {
	p := m.peers[name]
	if p == nil {
		return false
	}
	p.look(now)
	switch {
	case b.Incarnation == p.incarnation && b.Seq <= p.lastSeq,
		// A process that was not heard to end may still have beats on their way. Who is
		// silent may have come back with a clock that was set back.
		b.Incarnation < p.incarnation && (p.state == StateAlive || p.state == StateWaiting):
		p.stats.Late++
		return false
	}
	p.stats.Received++
	again, silence := p.state == StateSuspect, time.Duration(0)
	if again {
		silence = now - p.heard
	}
	if b.Incarnation != p.incarnation {
		m.restart(p, b.Incarnation)
	} else {
		p.arrived(now)
	}
	served := p.newVIPs(b.VIPs)
	p.hear(now, b, via)
	p.watch(now)
	if p.state == StateWaiting || p.state == StateSuspect {
		p.state = StateAlive
		m.event(p, Event{Kind: Alive, Silence: silence})
	}
	for _, v := range served {
		m.event(p, Event{Kind: Serves, VIP: v})
	}
	m.learn(now, p, b, again)
	return true
}

// restart makes everything that the peer had dead.
func (m *Machine) restart(p *peer, incarnation uint64) {
	first := p.incarnation == 0
	p.incarnation = incarnation
	if first {
		return
	}
	p.stats.Restarts++
	m.event(p, Event{Kind: Restarted, Silence: p.now - p.heard})
	for i := range p.targets {
		m.gone(p, &p.targets[i])
	}
	p.targets, p.vips, p.self = p.targets[:0], p.vips[:0], seen{}
}

// Connected tells that an attempt to connect has succeeded. False: it is no longer
// wanted, the connection has to be closed.
func (m *Machine) Connected(now time.Duration, name string, attempt uint64) bool {
	p := m.peers[name]
	if p == nil || !p.dialing || p.attempt != attempt {
		return false
	}
	p.look(now)
	p.dialing, p.connected, p.answered, p.answer, p.nextSend = false, true, false, now, now
	return true
}

// Broke tells that an attempt to connect has failed, or that the connection which
// came of it has ended.
func (m *Machine) Broke(now time.Duration, name string, attempt uint64) {
	p := m.peers[name]
	if p == nil || p.attempt != attempt || !p.dialing && !p.connected {
		return
	}
	p.look(now)
	p.nextDial = now
	if p.connected {
		p.stats.Breaks++
		p.hint(now)
	}
	if !p.connected || !p.answered {
		p.pauseDial(now)
	}
	p.dialing, p.connected = false, false
}

// Left tells that the last connection that the peer has dialled has ended.
func (m *Machine) Left(now time.Duration, name string) {
	p := m.peers[name]
	if p == nil || p.state == StateIdle {
		return
	}
	p.look(now)
	p.stats.Breaks++
	if !p.connected {
		// Else it was the connection of a peer that has heard nothing for a while, and now
		// hears this node by its own one again.
		p.hint(now)
	}
	p.askAt = min(p.askAt, now+p.interval())
}

// Step is what there is to do for a peer, in this order.
type Step struct {
	// Drop: close the connection to the peer, or break off connecting.
	Drop bool
	// Dial, if not 0, is the number of an attempt to connect that has to begin. It
	// ends with Connected or Broke.
	Dial uint64
	// Send: send the next beat (Beat) by the connection.
	Send bool
}

// Tick says what there is to do for a peer now. It has to be called at the time that
// Due gives, and may be called earlier.
func (m *Machine) Tick(now time.Duration, name string) (s Step) {
	p := m.peers[name]
	if p == nil {
		return s
	}
	p.look(now)
	if p.judged() && now >= p.deadline() {
		p.state = StateSuspect
		p.stats.Suspicions++
		m.event(p, Event{Kind: Suspect, Silence: now - p.heard})
		p.cut()
		p.nextDial, p.backoff = now, p.cfg.Interval
		if !p.local {
			// What the peer wanted has probably ended with it.
			p.want, p.open = false, false
		}
		p.watch(now)
	}
	if p.connected && now >= p.mute() {
		p.cut()
		p.pauseDial(now)
	}
	if p.asks() && now >= p.askAt {
		p.ask = true
	}
	if !p.holds() {
		p.cut()
	}
	s.Drop, p.drop = p.drop, false
	if p.holds() && !p.connected && !p.dialing && now >= p.nextDial {
		p.attempt++
		p.dialing = true
		p.stats.Dials++
		s.Dial = p.attempt
	}
	if p.connected && now >= p.nextSend {
		s.Send = true
		p.nextSend = max(p.nextSend+p.cfg.Interval, now+p.cfg.Interval/2)
	}
	return s
}

// Note counts what the machine does not see, in the peer's Stats.
func (m *Machine) Note(name string, count func(*Stats)) {
	if p := m.peers[name]; p != nil {
		count(&p.stats)
	}
}

// Due is when Tick has to be called next for a peer unless something happens before;
// ok is false when there is no such time. It is to be asked after every input: the
// node counts as having stood still when it does not keep to what was said last.
func (m *Machine) Due(name string) (at time.Duration, ok bool) {
	p := m.peers[name]
	if p == nil {
		return 0, false
	}
	if at, ok = p.due(); ok {
		p.promised = max(at, p.now)
	}
	return at, ok
}
