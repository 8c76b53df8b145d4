package failover

import (
	"fmt"
	"time"
)

// TakeDeadlines bound the stages of a take-over. Zero values mean the defaults.
type TakeDeadlines struct {
	Listen time.Duration // default 2 s
	Ready  time.Duration // default 2 s
	Wait   time.Duration // default 30 s: the last owner's stages, and who notices that it has died
	Begin  time.Duration // default 5 s: targets may be recovering
	Clear  time.Duration // default 300 ms
	Serve  time.Duration // default 2 s
	Add    time.Duration // default 500 ms

	Announce time.Duration // default 100 ms
	Tickle   time.Duration // default 500 ms
	Notify   time.Duration // default 2 s
	Undo     time.Duration // default 500 ms; of each of the stages that undo a take-over
}

func (d *TakeDeadlines) defaults() {
	for _, x := range []struct {
		p *time.Duration
		v time.Duration
	}{
		{&d.Listen, 2 * time.Second}, {&d.Ready, 2 * time.Second}, {&d.Wait, 30 * time.Second}, {&d.Begin, 5 * time.Second},
		{&d.Clear, 300 * time.Millisecond}, {&d.Serve, 2 * time.Second}, {&d.Add, 500 * time.Millisecond},
		{&d.Announce, 100 * time.Millisecond}, {&d.Tickle, 500 * time.Millisecond}, {&d.Notify, 2 * time.Second},
		{&d.Undo, 500 * time.Millisecond},
	} {
		if *x.p <= 0 {
			*x.p = x.v
		}
	}
}

// Outcomes of a take-over.
const (
	// Serving: the address is here and calls are answered.
	Serving Outcome = "serving"
	// NotTaken: it could not be taken; what was done is undone.
	NotTaken Outcome = "not-taken"
	// BrokenOff: it was not to be taken any more; what was done is undone.
	BrokenOff Outcome = "broken-off"
	// (Stuck: as BrokenOff or NotTaken, but the address could not be removed again.)
)

// takeConfig is what a take-over is to do.
type takeConfig struct {
	given     bool // somebody else adds the address, after StageListen
	ready     bool // there is somebody to be told that listeners are open
	wait      bool // StageWait has its limit; else it ends with its result only
	again     []time.Duration
	deadlines TakeDeadlines
}

// defaultAgain is when the address is announced again, after the first time: a client or switch that has missed it
// would go on asking the last owner for up to 48 s.
var defaultAgain = []time.Duration{50 * time.Millisecond, 200 * time.Millisecond, time.Second}

// takeover is the pure machine of taking an address over. Its rules:
//   - Each stage runs once (StageClear, StageAdd and StageAnnounce repeatedly until they succeed).
//   - Listeners are open, and hold what comes, before the address is here, and calls are answered (StageServe) before
//     it is added: so no SYN meets a closed port, and none waits. Nothing is answered before StageBegin, since nothing
//     is served before it.
//   - What fails up to StageAdd ends the take-over, and what was done is undone: the address is removed if it may have
//     been added, then listeners and service end, then what sockets there are.
//   - What fails afterwards does not: the address is served, and undoing that would make it worse. It is said.
//   - A fence breaks it off as well; when the address is announced already, what follows is left out instead, so that it
//     can be given up at once.
//   - An address that somebody else adds is cleared before the listeners open: later its connections may be new ones.
type takeover struct {
	sequence
	cfg     takeConfig
	broken  bool  // off
	ceded   bool  // another node serves the address, which was announced
	undo    bool  // undoing
	failed  Stage // that ended it
	err     error
	serving bool
	stuck   bool
	again   []time.Duration // when to announce again
	reports []StageReport
}

func newTakeover(cfg takeConfig) *takeover {
	cfg.deadlines.defaults()
	if cfg.again == nil {
		cfg.again = defaultAgain
	}
	m := &takeover{cfg: cfg}
	m.next, m.over = m.nextStage, m.stageOver
	return m
}

func (m *takeover) step(in input) []action {
	m.moved(in.now)
	switch in.kind {
	case inResult:
		m.result(in.stage, in.result)
	case inFence:
		m.cede()
	case inBreak:
		m.breakOff()
	}
	m.advance()
	for len(m.again) > 0 && m.again[0] <= m.now {
		for len(m.again) > 0 && m.again[0] <= m.now {
			m.again = m.again[1:] // a late tick announces once
		}
		m.emit(action{kind: actAnnounce})
	}
	if len(m.again) > 0 {
		m.emit(action{kind: actTimer, at: m.again[0]})
	}
	return m.flush()
}

// settled: nothing is left to be done, not even to announce the address again.
func (m *takeover) settled() bool { return m.done && len(m.again) == 0 }

// breakOff has what was done undone; once the address is served it is not broken off but given up, by a teardown.
func (m *takeover) breakOff() {
	if m.broken || m.undo || m.done || m.started[StageAnnounce] {
		return
	}
	m.broken = true
	m.emit(action{kind: actFenced})
	m.startUndo("", nil)
	m.giveUp()
}

// cede leaves out what remains of a take-over that somebody else has come after.
func (m *takeover) cede() {
	if !m.started[StageAnnounce] || m.undo {
		m.breakOff()
		return
	}
	if m.ceded || m.done {
		return
	}
	m.ceded, m.serving, m.again = true, true, nil
	m.emit(action{kind: actFenced})
	m.giveUp()
}

func (m *takeover) startUndo(st Stage, err error) {
	if !m.undo {
		m.undo, m.failed, m.err = true, st, err
	}
}

func (m *takeover) plan() []Stage {
	switch {
	case m.undo && (m.started[StageAdd] || m.cfg.given && m.started[StageServe]):
		return []Stage{StageRemove, StageFinish, StageClear}
	case m.undo && m.started[StageListen]:
		return []Stage{StageFinish}
	case m.undo, m.ceded:
		return nil
	case m.cfg.given:
		return []Stage{StageClear, StageListen, StageReady, StageWait, StageBegin, StageServe, StageAnnounce, StageTickle, StageNotify}
	}
	return []Stage{StageListen, StageReady, StageWait, StageBegin, StageClear, StageServe, StageAdd, StageAnnounce, StageTickle, StageNotify}
}

// undoKey tells a stage of the undoing from the same one on the way up.
func (m *takeover) undoKey(st Stage) Stage {
	if m.undo {
		return "undo " + st
	}
	return st
}

func (m *takeover) nextStage() (step, bool) {
	for _, st := range m.plan() {
		if m.started[m.undoKey(st)] {
			continue
		}
		d := &m.cfg.deadlines
		s := step{stage: st}
		switch st {
		case StageListen:
			s.limit = d.Listen
		case StageReady:
			if !m.cfg.ready {
				continue
			}
			s.limit = d.Ready
		case StageWait:
			if m.cfg.wait {
				s.limit = d.Wait
			}
		case StageBegin:
			s.limit = d.Begin
		case StageClear:
			s.limit, s.retry = d.Clear, clearRetry
		case StageServe:
			s.limit = d.Serve
		case StageAdd:
			s.limit, s.retry = d.Add, addressRetry
		case StageAnnounce:
			s.limit, s.retry = d.Announce, announceRetry
		case StageTickle:
			s.limit = d.Tickle
		case StageNotify:
			s.limit = d.Notify
		case StageRemove:
			if m.cfg.given {
				continue
			}
			s.limit, s.retry = d.Undo, addressRetry
		case StageFinish:
			s.limit, s.retry = d.Undo, clearRetry
		}
		if m.undo {
			s.limit = d.Undo
			m.started[m.undoKey(st)] = true
		}
		return s, true
	}
	return step{}, false
}

func (m *takeover) stageOver(r StageReport, now time.Duration) {
	m.reports = append(m.reports, r)
	if m.undo {
		m.stuck = m.stuck || r.Stage == StageRemove && !r.OK()
		return
	}
	switch r.Stage {
	case StageAnnounce:
		if m.ceded {
			return
		}
		for _, d := range m.cfg.again {
			m.again = append(m.again, now+d)
		}
	case StageTickle:
	case StageNotify:
		m.serving = true
	default:
		if !r.OK() {
			m.startUndo(r.Stage, r.failure())
		}
	}
}

// failure is why a stage was not OK.
func (s *StageReport) failure() error {
	switch {
	case s.Result.Err != nil:
		return s.Result.Err
	case s.BrokenOff:
		return fmt.Errorf("broken off after %v", s.Took)
	case s.Lost:
		return fmt.Errorf("not done within %v", s.Took)
	case s.Result.Remaining > 0:
		return fmt.Errorf("%d sockets cannot be destroyed", s.Result.Remaining)
	}
	return nil
}

func (m *takeover) outcome() Outcome {
	switch {
	case m.stuck:
		return Stuck
	case m.broken:
		return BrokenOff
	case m.serving:
		return Serving
	}
	return NotTaken
}
