package failover

import (
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"
)

// play is how a stage behaves in a transcript: what its runs come to, the last one for all further ones.
type play struct {
	after time.Duration // -1: when it is cut; -2: never
	res   Result
}

const (
	whenCut = -1
	never   = -2
)

// parsePlay reads "5 replies=3", "cut left=1", "hang", "1 error", "1 remain=2"; times are in milliseconds.
func parsePlay(s string) (play, error) {
	var p play
	for i, f := range strings.Fields(s) {
		name, val, _ := strings.Cut(f, "=")
		n, err := strconv.Atoi(val)
		switch {
		case i == 0 && f == "cut":
			p.after = whenCut
			continue
		case i == 0 && f == "hang":
			p.after = never
			continue
		case i == 0:
			n, err = strconv.Atoi(f)
			p.after = time.Duration(n) * time.Millisecond
		case f == "error":
			p.res.Err, err = errors.New("broken"), nil
		case name == "conns":
			p.res.Drained.Conns = n
		case name == "replies":
			p.res.Drained.Replies = n
		case name == "left":
			p.res.Drained.Left = n
		case name == "remain":
			p.res.Remaining = n
		case name == "destroyed":
			p.res.Destroyed = n
		default:
			err = fmt.Errorf("no such word")
		}
		if err != nil {
			return p, fmt.Errorf("%q: %w", f, err)
		}
	}
	return p, nil
}

type due struct {
	at time.Duration
	in input
}

// world is a machine with stages that behave as said. It is what a Runner is to a machine, without time.
type world struct {
	m     machine
	plays map[Stage][]play
	runs  map[Stage]*due // under way: its result
	due   []due          // to come
	wake  time.Duration  // -1: none
	now   time.Duration
	done  bool
	on    func(a action) // every action but timers
	ended func(Stage, Result)
}

func newWorld(m machine) *world {
	return &world{m: m, plays: map[Stage][]play{}, runs: map[Stage]*due{}, wake: -1, on: func(action) {}, ended: func(Stage, Result) {}}
}

func (w *world) step(in input) {
	w.wake = -1
	in.now = w.now
	if in.kind == inResult {
		w.ended(in.stage, in.result)
	}
	for _, a := range w.m.step(in) {
		switch a.kind {
		case actRun:
			p := play{after: time.Millisecond}
			if l := w.plays[a.stage]; len(l) > 0 {
				p = l[0]
				if len(l) > 1 {
					w.plays[a.stage] = l[1:]
				}
			}
			r := due{at: p.after, in: input{kind: inResult, stage: a.stage, result: p.res}}
			if p.after >= 0 {
				r.at += w.now
			}
			w.runs[a.stage] = &r
		case actCut:
			if r := w.runs[a.stage]; r != nil && (r.at == whenCut || r.at > w.now) {
				r.at = w.now
			}
		case actTimer:
			if w.wake < 0 || a.at < w.wake {
				w.wake = a.at
			}
			continue
		case actDone:
			w.done = true
		}
		w.on(a)
	}
}

// peek is when something comes next, -1: nothing.
func (w *world) peek() time.Duration {
	best, _ := w.first()
	return best.at
}

// first is what comes next, and of which stage if it is a result.
func (w *world) first() (due, Stage) {
	best := due{at: -1}
	consider := func(d due) {
		if d.at >= 0 && (best.at < 0 || d.at < best.at) {
			best = d
		}
	}
	var names []string
	for st := range w.runs {
		names = append(names, string(st))
	}
	sort.Strings(names)
	from := Stage("")
	for _, st := range names {
		b := best
		consider(*w.runs[Stage(st)])
		if best != b {
			from = Stage(st)
		}
	}
	for _, d := range w.due {
		b := best
		consider(d)
		if best != b {
			from = ""
		}
	}
	if w.wake >= 0 && (best.at < 0 || w.wake < best.at) {
		best, from = due{at: w.wake, in: input{kind: inTick}}, ""
	}
	return best, from
}

// next does what comes next, until the time given at the latest. Not: nothing comes.
func (w *world) next(limit time.Duration) bool {
	best, from := w.first()
	if best.at < 0 || best.at > limit {
		return false
	}
	if from != "" {
		delete(w.runs, from)
	} else {
		for i, d := range w.due {
			if d == best {
				w.due = append(w.due[:i:i], w.due[i+1:]...)
				break
			}
		}
	}
	w.now = max(w.now, best.at)
	w.step(best.in)
	return true
}

func describe(a action) string {
	switch a.kind {
	case actRun:
		s := "run " + string(a.stage)
		if a.attempt > 1 {
			s += fmt.Sprintf(" (%d)", a.attempt)
		}
		switch a.stage {
		case StageRefuse:
			s += " " + string(a.step.refuse)
		case StageClose:
			s += " " + string(a.step.closing)
		case StageTold:
			s += map[bool]string{true: " stopped", false: " abandoned"}[a.step.clean]
		}
		return s
	case actCut:
		return "CUT " + string(a.stage)
	case actTrouble, actStage:
		r := &a.report
		s := fmt.Sprintf("%s %s in %d ms", map[actionKind]string{actTrouble: "trouble with", actStage: "event:"}[a.kind], r.Stage, r.Took.Milliseconds())
		if r.Cut && !r.BrokenOff {
			s += ", cut"
		}
		if r.Lost && !r.BrokenOff {
			s += ", lost"
		}
		if d := r.Result.Drained; d != (Drained{}) {
			s += fmt.Sprintf(", %d conns %d replies %d left", d.Conns, d.Replies, d.Left)
		}
		if n := r.Result.Destroyed; n > 0 {
			s += fmt.Sprintf(", %d destroyed", n)
		}
		if err := r.failure(); err != nil {
			s += ", FAILED: " + err.Error()
		}
		return s
	case actFenced:
		return "event: fence"
	case actAnnounce:
		return "announce again"
	case actDone:
		return "done"
	}
	return "?"
}
