package failover

import (
	"slices"
	"time"
)

// DefaultDeadlines bound the stages of a teardown.
func DefaultDeadlines() Deadlines {
	return Deadlines{
		Refuse: 100 * time.Millisecond, Drain: 2 * time.Second, Commit: 2 * time.Second, Close: 300 * time.Millisecond,
		Clear: 300 * time.Millisecond, Remove: 500 * time.Millisecond,
		Finish: 500 * time.Millisecond,
	}
}

func (d *Deadlines) defaults() {
	def := DefaultDeadlines()
	for _, x := range []struct{ p, v *time.Duration }{
		{&d.Refuse, &def.Refuse}, {&d.Drain, &def.Drain}, {&d.Commit, &def.Commit}, {&d.Close, &def.Close},
		{&d.Clear, &def.Clear}, {&d.Remove, &def.Remove}, {&d.Finish, &def.Finish},
	} {
		if *x.p <= 0 {
			*x.p = *x.v
		}
	}
}

// TellTimeout bounds telling the registry, which is there or is not: who gives an address up tells it again later.
const TellTimeout = 2 * time.Second

// Pauses before a stage that failed is tried again.
const (
	clearRetry    = 10 * time.Millisecond
	addressRetry  = 20 * time.Millisecond
	tellRetry     = 100 * time.Millisecond
	announceRetry = 20 * time.Millisecond
)

// Outcome says how the giving up of an address has ended.
type Outcome string

// Outcomes of a teardown.
const (
	// Clean: everything acknowledged is durable and the address is away: the registry is told Stopped.
	Clean Outcome = "clean"
	// Unclean: the address is away, but not everything acknowledged is known to be durable. The next owner must act
	// as after a crash: the registry is told Abandoned, never Stopped.
	Unclean Outcome = "unclean"
	// Superseded: another node serves the address; the registry is told nothing.
	Superseded Outcome = "superseded"
	// Stuck: the machine still has the address, though nothing answers there. The registry must be told nothing, or two
	// machines would have it: remove it, or fence the machine.
	Stuck Outcome = "stuck"
)

// teardownConfig is what a teardown is to do.
type teardownConfig struct {
	fenced    bool // from the start
	refuse    Refuse
	closing   Closing
	given     bool          // somebody else removes the address
	tell      bool          // the registry, when clean
	abandon   bool          // tell it, when unclean
	park      time.Duration // StageFinish waits for inProceed, so long at most
	deadlines Deadlines
}

// teardown is the pure machine of giving up an address. Its rules:
//   - Every stage is run once (StageClear, StageRemove and StageTold repeatedly until they succeed), in the order of
//     its plan, and is cut at its deadline; whatever it was for, the next one follows.
//   - Connections are closed before the address is removed when they are half-closed, after it when quietly.
//   - Clean needs a drain that came back and a commit that succeeded. What a drain has cut off is no harm: it is not
//     answered any more.
//   - Sockets that cannot be destroyed do not keep the address here: on a machine without the address they are silent,
//     with it they would be a second owner's. A take-over by this machine looks again, before it adds the address.
//   - With a fence connections are reset first, as long as the address is here: a client that was drawn here after
//     another machine had taken the address has a connection that nobody else knows and can wake it from; with its
//     call acknowledged by this kernel it would wait for minutes.
//   - Nothing is told while the machine has the address.
//   - A fence at any moment ends what cannot matter any more (drain, commit, telling) at once.
type teardown struct {
	sequence
	cfg      teardownConfig
	fenced   bool
	proceed  bool
	drainOK  bool
	commitOK bool
	removed  bool
	told     bool
	reports  []StageReport
}

// Plans of a teardown.
var (
	planHalfClose = []Stage{StageRefuse, StageDrain, StageCommit, StageClose, StageClear, StageRemove, StageTold, StageFinish}
	planQuiet     = []Stage{StageRefuse, StageDrain, StageCommit, StageRemove, StageClose, StageClear, StageTold, StageFinish}
	// What answers ends first, then the address.
	planFenced = []Stage{StageRefuse, StageClose, StageRemove, StageClear, StageFinish}
)

func newTeardown(cfg teardownConfig) *teardown {
	cfg.deadlines.defaults()
	m := &teardown{cfg: cfg, fenced: cfg.fenced}
	if cfg.fenced {
		m.cfg.closing = Quiet
	}
	m.next, m.over = m.nextStage, m.stageOver
	return m
}

func (m *teardown) step(in input) []action {
	m.moved(in.now)
	switch in.kind {
	case inResult:
		m.result(in.stage, in.result)
	case inFence:
		m.fence()
	case inProceed:
		m.proceed = true
	}
	m.advance()
	return m.flush()
}

func (m *teardown) fence() {
	if m.fenced || m.done || m.told && m.removed {
		return // after it was told that the period has ended, another one is no news
	}
	m.fenced = true
	m.emit(action{kind: actFenced})
	if r := m.run; r != nil && (!slices.Contains(planFenced, r.stage) || r.stage == StageClose && m.cfg.closing != Quiet) {
		m.giveUp()
	}
	if !m.started[StageClose] {
		m.cfg.closing = Quiet
	}
}

func (m *teardown) plan() []Stage {
	switch {
	case m.fenced:
		return planFenced
	case m.cfg.closing == Quiet:
		return planQuiet
	}
	return planHalfClose
}

func (m *teardown) nextStage() (step, bool) {
	for _, st := range m.plan() {
		if m.started[st] {
			continue
		}
		d := &m.cfg.deadlines
		s := step{stage: st}
		switch st {
		case StageRefuse:
			s.limit, s.refuse = d.Refuse, m.cfg.refuse
			if m.fenced {
				s.refuse = Hold
			}
		case StageDrain:
			s.limit = d.Drain
		case StageCommit:
			s.limit = d.Commit
		case StageClose:
			s.limit, s.closing, s.reset = d.Close, m.cfg.closing, m.fenced
		case StageClear:
			s.limit, s.retry = d.Clear, clearRetry
		case StageRemove:
			if m.cfg.given {
				continue
			}
			s.limit, s.retry = d.Remove, addressRetry
		case StageTold:
			if o := m.outcome(); o == Clean && !m.cfg.tell || o == Unclean && !m.cfg.abandon || o == Stuck {
				continue
			}
			s.limit, s.retry, s.clean = TellTimeout, tellRetry, m.outcome() == Clean
		case StageFinish:
			if m.cfg.park > 0 && !m.proceed && m.outcome() != Stuck { // else the caller has to see to it
				if m.parked == 0 {
					m.parked = m.now + m.cfg.park
				}
				if m.now < m.parked {
					return step{}, true
				}
			}
			s.limit, s.retry, s.stuck = d.Finish, clearRetry, m.outcome() == Stuck
		}
		return s, true
	}
	return step{}, false
}

func (m *teardown) stageOver(r StageReport, _ time.Duration) {
	m.reports = append(m.reports, r)
	switch r.Stage {
	case StageDrain:
		m.drainOK = !r.Lost && r.Result.Err == nil
	case StageCommit:
		m.commitOK = r.OK()
	case StageRemove:
		m.removed = r.OK()
	case StageTold:
		m.told = r.OK()
	}
}

// outcome is what the teardown has come to so far.
func (m *teardown) outcome() Outcome {
	switch {
	case !m.cfg.given && m.started[StageRemove] && !m.removed && (m.run == nil || m.run.stage != StageRemove):
		return Stuck
	case m.fenced:
		return Superseded
	case m.drainOK && m.commitOK:
		return Clean
	}
	return Unclean
}
