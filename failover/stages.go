package failover

import (
	"time"
)

// Stage is a part of a teardown or a take-over that has a deadline and an event of its own.
type Stage string

// Stages of a teardown, in the order of a half-close; when connections are closed quietly StageRemove comes before
// StageClose. See docs/design.md.
const (
	StageRefuse Stage = "refuse"
	StageDrain  Stage = "drain"
	StageCommit Stage = "commit"
	StageClose  Stage = "close"
	StageClear  Stage = "clear"  // also of a take-over: what is left of the address's sockets is destroyed
	StageRemove Stage = "remove" // also when a take-over is undone
	StageTold   Stage = "told"
	StageFinish Stage = "finish" // also when a take-over is undone
)

// Stages of a take-over, in their order.
const (
	StageListen   Stage = "listen"
	StageReady    Stage = "ready"
	StageWait     Stage = "wait" // for the last owner to have given the address up
	StageBegin    Stage = "begin"
	StageServe    Stage = "serve" // StageClear comes before it
	StageAdd      Stage = "add"
	StageAnnounce Stage = "announce"
	StageTickle   Stage = "tickle"
	StageNotify   Stage = "notify"
)

// Result is what running a stage came to. Err is nil if it has done all it is for.
type Result struct {
	Err       error
	Drained   Drained
	Closed    Closed
	Destroyed int // sockets
	Remaining int // sockets that could not be destroyed
	Tickled   int // connections
	Clients   int // that are notified

	final bool // trying again is of no use
}

// add puts the counts of another attempt to r's.
func (r *Result) add(o Result) {
	d := r.Destroyed
	*r = o
	r.Destroyed += d
}

// StageReport tells how a stage has ended.
type StageReport struct {
	Stage Stage
	Took  time.Duration
	// Cut: its deadline has passed. Lost: and it did not come back after that.
	Cut, Lost bool
	BrokenOff bool // it was cut before its deadline, and not waited for
	Result    Result
}

// OK tells whether the stage has done all it is for.
func (s *StageReport) OK() bool { return !s.Lost && s.Result.Err == nil && s.Result.Remaining == 0 }

// What a machine is told.
type inputKind uint8

const (
	inTick    inputKind = iota // a timer that it asked for, or any moment
	inResult                   // of a run of stage
	inFence                    // another node serves the address
	inBreak                    // (take-over) it is to be broken off
	inProceed                  // (teardown) StageFinish may begin
)

type input struct {
	kind   inputKind
	now    time.Duration // of a clock that never goes back
	stage  Stage
	result Result
}

type actionKind uint8

const (
	actRun      actionKind = iota // run stage; its result is an input. attempt counts from 1
	actCut                        // the run of stage is to return now
	actTrouble                    // a run of stage has failed and will be repeated
	actStage                      // a stage has ended
	actFenced                     // the fence was noticed
	actAnnounce                   // announce the address once more; no result
	actTimer                      // a tick is due at
	actDone                       // that was all, but for actAnnounce
)

// action is an output of a machine.
type action struct {
	kind    actionKind
	stage   Stage
	step    step // of actRun
	attempt int
	at      time.Duration
	report  StageReport // of actStage, actTrouble
}

// grace is how long a stage that was cut may take to return: what it has reached is worth knowing. A busy machine, or one
// that stands still for a moment, must not make it lost.
const grace = 200 * time.Millisecond

// step says how a stage is run.
type step struct {
	stage Stage
	limit time.Duration // 0: none
	retry time.Duration // 0: once; else until the limit, with this pause

	refuse  Refuse  // of StageRefuse
	closing Closing // of StageClose
	clean   bool    // of StageTold
	stuck   bool    // of StageFinish: the machine still has the address
	reset   bool    // of StageClose: before it the kernel resets all connections
}

// sequence runs stages one after the other, each within its limit. It is the common part of the machines: a pure
// step function without a clock.
type sequence struct {
	next func() (step, bool)                    // the stage that comes; called when none runs
	over func(r StageReport, now time.Duration) // a stage has ended

	now     time.Duration
	started map[Stage]bool
	run     *running
	done    bool
	said    bool // actDone
	parked  time.Duration
	out     []action
}

type running struct {
	step
	from, end time.Duration // end: the limit; when cut, of the grace
	busy      bool          // a run is under way
	cut, off  bool
	retryAt   time.Duration
	attempt   int
	result    Result
}

func (s *sequence) emit(a action) { s.out = append(s.out, a) }

// flush returns the actions and forgets them.
func (s *sequence) flush() []action {
	if s.done && !s.said {
		s.said = true
		s.emit(action{kind: actDone})
	} else if at, ok := s.wake(); ok {
		s.emit(action{kind: actTimer, at: at})
	}
	out := s.out
	s.out = nil
	return out
}

// moved takes over the time of an input; a clock that goes back is not followed.
func (s *sequence) moved(now time.Duration) { s.now = max(s.now, now) }

// advance does what is due.
func (s *sequence) advance() {
	for !s.done {
		r := s.run
		switch {
		case r == nil:
			st, ok := s.next()
			if !ok {
				s.done = true
				return
			}
			if st.stage == "" {
				return
			}
			if s.started == nil {
				s.started = make(map[Stage]bool)
			}
			s.started[st.stage] = true
			s.run = &running{step: st, from: s.now, end: s.now + st.limit}
			s.start()
		case r.limit > 0 && s.now >= r.end && r.busy && !r.cut:
			s.emit(action{kind: actCut, stage: r.stage})
			r.cut, r.end = true, s.now+grace
		case (r.limit > 0 || r.cut) && s.now >= r.end && r.busy:
			s.finish(true)
		case !r.busy && r.limit > 0 && s.now >= r.end:
			r.cut = true
			s.finish(false)
		case !r.busy && s.now >= r.retryAt:
			s.start()
		default:
			return
		}
	}
}

func (s *sequence) start() {
	s.run.busy = true
	s.run.attempt++
	s.emit(action{kind: actRun, stage: s.run.stage, step: s.run.step, attempt: s.run.attempt})
}

// result takes the result of a run. One that was given up is not waited for any more, and is ignored.
func (s *sequence) result(stage Stage, res Result) {
	r := s.run
	if r == nil || r.stage != stage || !r.busy {
		return
	}
	r.busy = false
	r.result.add(res)
	failed := res.Err != nil || res.Remaining > 0
	if !failed || res.final || r.retry == 0 || r.cut || r.limit > 0 && s.now >= r.end {
		if r.limit > 0 && s.now >= r.end {
			r.cut = true
		}
		s.finish(false)
		return
	}
	if r.attempt == 1 {
		s.emit(action{kind: actTrouble, stage: stage, report: s.report(false)})
	}
	r.retryAt = s.now + r.retry
}

func (s *sequence) report(lost bool) StageReport {
	r := s.run
	return StageReport{Stage: r.stage, Took: s.now - r.from, Cut: r.cut, Lost: lost, BrokenOff: r.off, Result: r.result}
}

func (s *sequence) finish(lost bool) {
	rep := s.report(lost)
	s.run = nil
	s.emit(action{kind: actStage, stage: rep.Stage, report: rep})
	s.over(rep, s.now)
}

// giveUp ends the stage that runs at once.
func (s *sequence) giveUp() {
	r := s.run
	if r == nil {
		return
	}
	busy := r.busy
	if busy && !r.cut {
		s.emit(action{kind: actCut, stage: r.stage})
	}
	r.cut, r.off = true, true
	s.finish(busy)
}

// wake is when advance has something to do next if nothing else happens.
func (s *sequence) wake() (time.Duration, bool) {
	r := s.run
	switch {
	case s.done:
		return 0, false
	case r == nil:
		return s.parked, s.parked > s.now
	case r.busy && r.limit == 0 && !r.cut:
		return 0, false
	case !r.busy && (r.limit == 0 || r.retryAt < r.end):
		return r.retryAt, true
	}
	return r.end, true
}
