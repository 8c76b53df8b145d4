package failover

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// TestGolden runs the transcripts of both machines. A stage succeeds after 1 ms unless its behaviour is given.
//
//	teardown [closing=half-close|quiet] [refuse=hold|reset] [fenced] [given] [abandon] [park=MS]
//	takeover [given] [wait]
//	STAGE = RUN; RUN; ...     what its runs come to: see parsePlay
//	at MS fence|break|proceed|released|until
//
// 004.10 to 004.25: the order of the stages, their bounds, and what a failure does.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			out, err := transcript(d)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			return out
		})
	})
}

func transcript(d *datadriven.TestData) (string, error) {
	var w *world
	var outcome func() string
	arg := func(name, def string) string {
		for _, a := range d.CmdArgs {
			if a.Key == name && len(a.Vals) == 0 {
				return "true"
			} else if a.Key == name {
				return a.Vals[0]
			}
		}
		return def
	}
	switch d.Cmd {
	case "teardown":
		park, err := strconv.Atoi(arg("park", "0"))
		if err != nil {
			return "", err
		}
		m := newTeardown(teardownConfig{
			fenced: arg("fenced", "") != "", refuse: Refuse(arg("refuse", "hold")), closing: Closing(arg("closing", "half-close")),
			given: arg("given", "") != "", tell: true, abandon: arg("abandon", "") != "", park: time.Duration(park) * time.Millisecond,
		})
		w = newWorld(m)
		outcome = func() string { return fmt.Sprintf("%s, told: %v", m.outcome(), m.told) }
	case "takeover":
		m := newTakeover(takeConfig{given: arg("given", "") != "", ready: true, wait: arg("wait", "") != ""})
		w = newWorld(m)
		outcome = func() string {
			s := string(m.outcome())
			if m.failed != "" {
				s += fmt.Sprintf(" by %s: %v", m.failed, m.err)
			}
			return s
		}
	default:
		return "", fmt.Errorf("no command %q", d.Cmd)
	}
	limit := 100 * time.Second
	for line := range strings.Lines(d.Input) {
		line = strings.TrimSpace(line)
		if st, runs, ok := strings.Cut(line, " = "); ok {
			for r := range strings.SplitSeq(runs, ";") {
				p, err := parsePlay(r)
				if err != nil {
					return "", err
				}
				w.plays[Stage(st)] = append(w.plays[Stage(st)], p)
			}
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != "at" {
			return "", fmt.Errorf("bad line %q", line)
		}
		ms, err := strconv.Atoi(f[1])
		if err != nil {
			return "", err
		}
		at := time.Duration(ms) * time.Millisecond
		switch f[2] {
		case "fence":
			w.due = append(w.due, due{at, input{kind: inFence}})
		case "break":
			w.due = append(w.due, due{at, input{kind: inBreak}})
		case "proceed":
			w.due = append(w.due, due{at, input{kind: inProceed}})
		case "released":
			w.plays[StageWait] = nil
			w.due = append(w.due, due{at, input{kind: inResult, stage: StageWait}})
		case "until":
			limit = at
		default:
			return "", fmt.Errorf("bad line %q", line)
		}
	}
	var out strings.Builder
	w.on = func(a action) {
		fmt.Fprintf(&out, "%6d %s\n", w.now.Milliseconds(), describe(a))
		if a.kind == actDone {
			fmt.Fprintf(&out, "       %s\n", outcome())
		}
	}
	w.step(input{kind: inTick})
	for w.next(limit) {
	}
	if !w.done {
		fmt.Fprintf(&out, "       (not done)\n")
	}
	return out.String(), nil
}
