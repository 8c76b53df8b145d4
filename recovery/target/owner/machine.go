package owner

import (
	"errors"
	"fmt"
	"time"
)

// Config configures a Machine. Node, Incarnation and Interval are required.
type Config struct {
	Node, Boot  string
	Incarnation [16]byte
	// Interval is the time between heartbeats, at most MaxInterval and the same
	// on all nodes that may own the store.
	Interval time.Duration
	// Check: the store is wanted for a checker.
	Check bool
	// Wait for an owner that is alive, instead of failing.
	Wait bool
	// Fenced is a node that can do nothing to the store any more: what it owns when
	// the attempt begins is taken at once.
	Fenced string
	// Exclusive: no other process of this kernel has the store, so what one had is
	// taken at once.
	Exclusive bool
	// Generation is the lowest generation to take when the record is damaged and
	// does not say what comes next.
	Generation uint64
}

// The times of the protocol, by the interval of who they are about.
func limit(i time.Duration) int64 { return 2 * int64(i) }
func watch(i time.Duration) int64 { return 3 * int64(i) }

// slow is how long a claim may take from the read that it builds on.
func slow(own, recorded time.Duration) int64 { return int64(min(own, recorded)) / 4 }

// settle is how long a claim waits until it is looked at. It is longer than slow
// of any other contender, as far as intervals are not too different, and short
// enough for the claim to be used before its own limit.
func settle(own, recorded time.Duration) int64 {
	return min(int64(max(own, recorded))*3/10, int64(own)*14/10)
}

// damagedStep is added to the generation when a copy is damaged: it may have had
// a higher one than the other, over which an old owner's write has come late.
const damagedStep = 1 << 16

// Kind of an action.
type Kind uint8

// Actions.
const (
	// ActRead: read the file and call Read.
	ActRead Kind = iota
	// ActWrite: write Record durably to copy Slot and call Wrote.
	ActWrite
	// ActMark: write Record durably to the mark and call Wrote.
	ActMark
	// ActTimer: call Tick at At. It replaces earlier ones.
	ActTimer
	// ActAcquired: the store is owned, with Record, until At; before it was as Prev
	// says.
	ActAcquired
	// ActExtend: the store is owned until At.
	ActExtend
	// ActRefused: the store will not be owned, Err says why. It is the last action.
	ActRefused
	// ActLost: the store is not owned any more, Err says why. It is the last
	// action.
	ActLost
	// ActReleased answers Release; with Err the store was not left in order. It is
	// the last action.
	ActReleased
	// ActWanted: the node of Record would like to have the store.
	ActWanted
)

// Action is what the caller of a Machine has to do.
type Action struct {
	Kind   Kind
	Slot   int
	Record Record
	Prev   *Record
	At     int64
	Err    error
}

// ErrHeld is the error, wrapped in a *HeldError, of a store that somebody else
// has.
var ErrHeld = errors.New("the store belongs to another node")

// HeldError tells who has a store.
type HeldError struct{ Record Record }

// Error says what can be done.
func (e *HeldError) Error() string {
	r := &e.Record
	what := "a target that runs"
	if r.State == Checking {
		what = "a checker that runs"
	}
	return fmt.Sprintf("the store belongs to %s on node %q (generation %d, alive): stop it there first; if the node hangs, power it off and say that it is fenced",
		what, r.Node, r.Generation)
}

// Unwrap makes it an ErrHeld.
func (e *HeldError) Unwrap() error { return ErrHeld }

type phase uint8

const (
	phLook   phase = iota // between the looks of a contender
	phRead                // a look
	phMark                // writes the mark
	phFirst               // writes the claim's first copy
	phSecond              // writes its second copy
	phSettle              // waits
	phVerify              // looks whether the claim is there
	phHeld                // owner between heartbeats
	phBeatRead
	phBeatWrite
	phLeaveRead // after Release
	phLeaveWrite
	phEnd
)

// Machine is the protocol for one attempt to own a store. Its caller serialises
// the calls, gives the time in nanoseconds of a steady clock with each, and
// carries out the actions. One read or write is under way at a time.
type Machine struct {
	c       Config
	ph      phase
	acts    []Action
	next    int64 // what phLook, phSettle and phHeld wait for
	started int64 // of the last read

	// Of a contender.
	base     Snapshot // unchanged since baseAt
	baseAt   int64
	based    bool
	fenced   *[16]byte // incarnation
	looked   bool
	markAt   int64
	markSeq  uint64
	seen     uint64        // highest generation
	recorded time.Duration // interval that the claim goes by
	claimed  int64         // beginning of the read that the claim builds on
	slot     int           // of the claim's first copy

	rec     Record // newest own one
	prev    *Record
	until   int64
	mark    Record // last seen
	beatErr error
	leaving bool
}

// NewMachine returns a Machine; Start begins.
func NewMachine(c Config) *Machine { return &Machine{c: c} }

// Actions returns what is to be done since the last call, in order. The slice is
// valid until the next input.
func (m *Machine) Actions() []Action {
	a := m.acts
	m.acts = m.acts[:0]
	return a
}

func (m *Machine) act(a Action) { m.acts = append(m.acts, a) }

func (m *Machine) timer(at int64) { m.act(Action{Kind: ActTimer, At: at}) }

func (m *Machine) read(now int64, ph phase) {
	m.ph, m.started = ph, now
	m.act(Action{Kind: ActRead})
}

// Start begins the attempt.
func (m *Machine) Start(now int64) { m.read(now, phRead) }

// refuse ends the attempt.
func (m *Machine) refuse(err error) {
	m.ph = phEnd
	m.act(Action{Kind: ActRefused, Err: err})
}

func (m *Machine) lose(err error) {
	m.ph = phEnd
	m.act(Action{Kind: ActLost, Err: fmt.Errorf("%w: %w", ErrNotOwner, err)})
}

func (m *Machine) released(err error) {
	m.ph = phEnd
	m.act(Action{Kind: ActReleased, Err: err})
}

// Tick tells that time has passed. A timer that fires too early, by a clock that
// differs a little, is set again.
func (m *Machine) Tick(now int64) {
	at := m.next
	switch m.ph {
	case phLook, phSettle:
	case phHeld:
		at = min(m.next, m.until)
	case phBeatRead, phBeatWrite:
		at = m.until
	default:
		return
	}
	if now < at {
		m.timer(at)
		return
	}
	switch m.ph {
	case phLook:
		m.read(now, phRead)
	case phSettle:
		m.read(now, phVerify)
	case phHeld:
		if !m.expired(now) {
			m.beat(now)
		}
	default:
		m.expired(now)
	}
}

// Expired tells that the caller has found the time up to which the store is owned
// over.
func (m *Machine) Expired() {
	switch m.ph {
	case phHeld, phBeatRead, phBeatWrite:
		if !m.leaving {
			m.lose(m.late())
		}
	}
}

func (m *Machine) late() error {
	if m.beatErr != nil {
		return fmt.Errorf("no heartbeat in time, the last attempt failed: %w", m.beatErr)
	}
	return errors.New("no heartbeat in time: storage or process were stopped")
}

// expired loses the store if it is too late.
func (m *Machine) expired(now int64) bool {
	switch {
	case now < m.until:
		return false
	case m.leaving:
		m.released(fmt.Errorf("%w: %w", ErrNotOwner, m.late()))
	default:
		m.lose(m.late())
	}
	return true
}

// Cancel ends an attempt that has not succeeded yet.
func (m *Machine) Cancel(err error) {
	if m.ph < phHeld {
		m.refuse(err)
	}
}

// Release gives the store back in order; what used it must have ended.
func (m *Machine) Release(now int64) {
	switch m.ph {
	case phHeld:
		m.leaving = true
		m.read(now, phLeaveRead)
	case phBeatRead, phBeatWrite:
		m.leaving = true
	case phEnd:
		m.released(ErrNotOwner)
	}
}

// Read is the result of ActRead.
func (m *Machine) Read(now int64, s *Snapshot, err error) {
	switch m.ph {
	case phRead:
		if err != nil {
			m.refuse(err)
			return
		}
		m.look(now, s)
	case phVerify:
		m.verify(now, s, err)
	case phBeatRead:
		switch {
		case m.expired(now):
		case m.leaving:
			m.leave(s, err)
		case err != nil:
			m.beatFailed(now, err)
		default:
			m.beatRead(s)
		}
	case phLeaveRead:
		if !m.expired(now) {
			m.leave(s, err)
		}
	}
}

// Wrote is the result of ActWrite and ActMark.
func (m *Machine) Wrote(now int64, err error) {
	switch m.ph {
	case phMark: // nobody depends on it
		m.lookLater(now)
	case phFirst, phSecond:
		switch {
		case err != nil:
			m.refuse(err)
		case now > m.claimed+slow(m.c.Interval, m.recorded):
			m.again(now)
		case m.ph == phFirst:
			m.rec.Seq++
			m.ph = phSecond
			m.act(Action{Kind: ActWrite, Slot: 1 - m.slot, Record: m.rec})
		default:
			m.ph = phSettle
			m.next = now + settle(m.c.Interval, m.recorded)
			m.timer(m.next)
		}
	case phBeatWrite:
		m.rec.Late = m.rec.Late || err != nil
		if m.expired(now) {
			return
		}
		if err == nil {
			m.beatErr = nil
			m.until = m.started + limit(m.c.Interval)
		}
		switch {
		case m.leaving:
			m.read(now, phLeaveRead)
		case err != nil:
			m.beatFailed(now, err)
		default:
			m.act(Action{Kind: ActExtend, At: m.until})
			m.waitBeat(m.started + int64(m.c.Interval))
		}
	case phLeaveWrite:
		m.released(err)
	}
}

// interval that a record's owner is taken to have.
func interval(r *Record) time.Duration {
	if r == nil {
		return MaxInterval
	}
	return r.Interval
}

// look decides by what a contender has read.
func (m *Machine) look(now int64, s *Snapshot) {
	r := s.record()
	if r != nil {
		m.seen = max(m.seen, r.Generation)
	}
	if !m.based || s.Slots != m.base.Slots {
		if m.based && !m.c.Wait && m.alive(r) {
			m.refuse(&HeldError{*r})
			return
		}
		m.base, m.based, m.baseAt = *s, true, now
	}
	if !m.looked && r != nil && m.c.Fenced != "" && r.Node == m.c.Fenced {
		// Not what the node does when it has been started again.
		f := r.Incarnation
		m.fenced = &f
	}
	m.looked = true
	free := s.fresh()
	if s.settled() {
		free = r.State == Clean || m.fenced != nil && r.Incarnation == *m.fenced || m.c.Exclusive && r.Boot == m.c.Boot
	}
	switch {
	case free, m.started >= m.baseAt+watch(interval(r)):
		m.claim(s)
	case m.c.Wait && r != nil && now >= m.markAt:
		m.markAt = now + int64(m.c.Interval)
		m.markSeq++
		m.ph = phMark
		mark := Record{Node: m.c.Node, Boot: m.c.Boot, Incarnation: m.c.Incarnation, Seq: m.markSeq, Interval: m.c.Interval, State: wanted}
		m.act(Action{Kind: ActMark, Record: mark})
	default:
		m.lookLater(now)
	}
}

// alive tells that the record is a new one of somebody who has the store.
func (m *Machine) alive(r *Record) bool {
	old := m.base.record()
	return r != nil && r.State != Clean && r.Incarnation != m.c.Incarnation && (old == nil || *r != *old)
}

func (m *Machine) lookLater(now int64) {
	i := interval(m.base.record())
	m.ph = phLook
	m.next = max(now, min(now+int64(min(i, m.c.Interval))/2, m.baseAt+watch(i)))
	m.timer(m.next)
}

// claim begins to write the claim.
func (m *Machine) claim(s *Snapshot) {
	m.rec = Record{Node: m.c.Node, Boot: m.c.Boot, Incarnation: m.c.Incarnation, Interval: m.c.Interval, State: Owned}
	if m.c.Check {
		m.rec.State = Checking
	}
	m.recorded, m.claimed, m.slot, m.prev = m.c.Interval, m.started, s.older(), nil
	m.rec.Generation = m.seen + 1
	r := s.record()
	if r != nil {
		p := *r
		m.prev, m.recorded = &p, p.Interval
	}
	switch {
	case !s.damaged():
	case r != nil:
		m.rec.Generation += damagedStep
	default:
		m.rec.Generation = max(m.rec.Generation, m.c.Generation)
	}
	m.nextSeq(s)
	m.ph = phFirst
	m.act(Action{Kind: ActWrite, Slot: m.slot, Record: m.rec})
}

// nextSeq gives the own record the next number.
func (m *Machine) nextSeq(s *Snapshot) {
	for i := range s.Slots {
		if p := &s.Slots[i]; p.OK {
			m.rec.Seq = max(m.rec.Seq, p.Record.Seq)
		}
	}
	m.rec.Seq++
}

// again begins from the start after a claim that counts for nothing. What it has
// left keeps the store from being free: it is watched.
func (m *Machine) again(now int64) {
	m.based = false
	m.read(now, phRead)
}

// verify looks whether the claim has won.
func (m *Machine) verify(now int64, s *Snapshot, err error) {
	if err != nil {
		m.refuse(err)
		return
	}
	mine := 0
	for i := range s.Slots {
		if p := &s.Slots[i]; p.OK && p.Record.Incarnation == m.c.Incarnation && p.Record.Generation == m.rec.Generation {
			mine++
		}
	}
	// The claim counts as the first heartbeat.
	m.until = m.claimed + limit(m.c.Interval)
	if mine < 2 || now >= m.until {
		m.again(now)
		return
	}
	m.mark = s.Mark.Record
	m.act(Action{Kind: ActAcquired, Record: m.rec, Prev: m.prev, At: m.until})
	m.beat(now)
}

// beat begins a heartbeat, which may never end.
func (m *Machine) beat(now int64) {
	m.timer(m.until)
	m.read(now, phBeatRead)
}

// own tells whether the record is still this one's. Two damaged copies are nobody's:
// who claims the store never has both half written, and finds out if one is written
// over.
func (m *Machine) own(s *Snapshot) error {
	switch r := s.record(); {
	case r == nil && s.fresh():
		return errors.New("the record was removed")
	case r != nil && r.Incarnation != m.c.Incarnation:
		return fmt.Errorf("node %q has taken the store (generation %d)", r.Node, r.Generation)
	}
	return nil
}

func (m *Machine) beatRead(s *Snapshot) {
	if err := m.own(s); err != nil {
		m.lose(err)
		return
	}
	if k := &s.Mark; k.OK && k.Record != m.mark {
		m.mark = k.Record
		if k.Record.Incarnation != m.c.Incarnation {
			m.act(Action{Kind: ActWanted, Record: k.Record})
		}
	}
	m.nextSeq(s)
	m.ph = phBeatWrite
	m.act(Action{Kind: ActWrite, Slot: s.older(), Record: m.rec})
}

func (m *Machine) beatFailed(now int64, err error) {
	m.beatErr = err
	m.waitBeat(now + int64(m.c.Interval)/8)
}

func (m *Machine) waitBeat(at int64) {
	m.ph, m.next = phHeld, at
	m.timer(min(at, m.until))
}

// leave writes the clean record over an own one.
func (m *Machine) leave(s *Snapshot, err error) {
	if err == nil {
		if err = m.own(s); err != nil {
			err = fmt.Errorf("%w: %w", ErrNotOwner, err)
		}
	}
	if err != nil {
		m.released(err)
		return
	}
	m.rec.State = Clean
	m.nextSeq(s)
	m.ph = phLeaveWrite
	m.act(Action{Kind: ActWrite, Slot: s.older(), Record: m.rec})
}
