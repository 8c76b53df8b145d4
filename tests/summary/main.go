// Summary reads the output of `go test -json`, of any number of runs one after
// the other, shows failures with their output, lists what was skipped with the
// reasons, and ends with one line that counts tests:
//
//	N passed, N failed, N skipped
//
// Only tests without subtests are counted, and packages that did not build or
// died. It exits with 1 if anything failed, nothing ran, or a package named
// by -require passed no test.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is one line of `go test -json`.
type event struct {
	Action, Package, Test, Output, ImportPath, FailedBuild string
	Elapsed                                                float64
}

// test is one test, or a package if its name is empty.
type test struct {
	pkg, name string
	result    string // pass, fail, skip; run: not ended
	parent    bool   // has subtests
	// ran: the runner itself named it. A slash inside a subtest's own name looks
	// like a parent that never ran.
	ran    bool
	output []string
}

// What is shown of a failed test: its first lines, where the cause often is, and its
// last ones.
const (
	maxHead = 150
	maxTail = 200
)

type summary struct {
	tests map[[2]string]*test
	order []*test
	// buildOutput is what the compiler said, by import path.
	buildOutput map[string][]string
	bad         int // lines that are no events
	showEvery   io.Writer
}

func (s *summary) get(pkg, name string) *test {
	k := [2]string{pkg, name}
	t := s.tests[k]
	if t == nil {
		t = &test{pkg: pkg, name: name}
		s.tests[k] = t
		s.order = append(s.order, t)
	}
	return t
}

// add takes one line.
func (s *summary) add(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" {
		// Compilers and the go command itself write plain text at times.
		s.bad++
		fmt.Fprintf(s.showEvery, "%s\n", line)
		return
	}
	switch e.Action {
	case "build-output":
		s.buildOutput[e.ImportPath] = append(s.buildOutput[e.ImportPath], e.Output)
		return
	case "build-fail", "start":
		return
	}
	t := s.get(e.Package, e.Test)
	t.ran = true
	for i := range e.Test {
		if e.Test[i] == '/' {
			s.get(e.Package, e.Test[:i]).parent = true
		}
	}
	switch e.Action {
	case "output":
		t.output = append(t.output, e.Output)
	case "run", "pass", "fail", "skip":
		// The same test may come again in another run (race detector): it has
		// passed only if it passed every time.
		if t.result != "fail" {
			t.result = e.Action
		}
		if e.Action == "run" {
			return
		}
		if e.Action == "fail" && e.FailedBuild != "" {
			t.output = append(t.output, s.buildOutput[e.FailedBuild]...)
		}
		switch {
		case e.Test == "":
			fmt.Fprintf(s.showEvery, "%-4s %s (%.1f s)\n", e.Action, e.Package, e.Elapsed)
		case e.Action == "fail" || e.Elapsed >= 5 && !strings.Contains(e.Test, "/"):
			fmt.Fprintf(s.showEvery, "     %s %s.%s (%.1f s)\n", e.Action, e.Package, e.Test, e.Elapsed)
		}
	}
}

// reason returns why a test was skipped: its last line of output that is not
// the test framework's.
func (t *test) reason() string {
	for _, l := range slices.Backward(t.output) {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "===") || strings.HasPrefix(l, "---") {
			continue
		}
		// file.go:12: text
		if _, rest, ok := strings.Cut(l, ".go:"); ok {
			if _, text, ok := strings.Cut(rest, ": "); ok {
				l = text
			}
		}
		return strings.TrimSpace(strings.TrimPrefix(l, "SKIPPED, reason:"))
	}
	return "no reason given"
}

// What is told of a failure again at the end, where it is seen first.
const (
	maxCauses = 6
	maxCause  = 400
)

// causes returns the last lines in which the test itself, or a panic, says something,
// shortened.
func (t *test) causes() (l []string) {
	for _, x := range slices.Backward(t.output) {
		x = strings.TrimSpace(x)
		if !strings.Contains(x, "_test.go:") && !strings.HasPrefix(x, "panic:") && !strings.HasPrefix(x, "fatal error:") && !strings.HasPrefix(x, "WARNING: DATA RACE") {
			continue
		}
		if len(x) > maxCause {
			x = strings.ToValidUTF8(x[:maxCause], "") + " ..."
		}
		if l = append(l, x); len(l) == maxCauses {
			break
		}
	}
	slices.Reverse(l)
	return l
}

// finish prints the summary to w and reports whether everything is well.
func (s *summary) finish(w io.Writer, require []string) bool {
	var passed, failed, skipped int
	passedIn := map[string]int{}
	failedIn := map[string]int{}
	reasons := map[string][]string{}
	var reasonOrder []string
	var fails []*test
	// Tests first: a package or parent failed by itself only if none of its
	// tests did.
	for _, t := range s.order {
		if t.name == "" || t.parent {
			continue
		}
		switch t.result {
		case "pass":
			passed++
			passedIn[t.pkg]++
		case "skip":
			skipped++
			r := t.reason()
			if reasons[r] == nil {
				reasonOrder = append(reasonOrder, r)
			}
			reasons[r] = append(reasons[r], t.pkg+"."+t.name)
		default: // failed, or the process ended before it could say
			failed++
			fails = append(fails, t)
			failedIn[t.pkg]++
			for n := t.name; ; {
				i := strings.LastIndexByte(n, '/')
				if i < 0 {
					break
				}
				n = n[:i]
				failedIn[t.pkg+"."+n]++
			}
		}
	}
	for _, t := range s.order {
		if !t.ran {
			continue
		}
		own := t.parent && failedIn[t.pkg+"."+t.name] == 0 || t.name == "" && failedIn[t.pkg] == 0
		if !own || t.result == "pass" || t.result == "skip" {
			continue
		}
		failed++
		failedIn[t.pkg]++
		fails = append(fails, t)
	}
	for _, t := range fails {
		fmt.Fprintf(w, "\nFAILED %s %s\n", t.pkg, t.name)
		for i, l := range t.output {
			switch left := len(t.output) - maxHead - maxTail; {
			case i < maxHead || i >= maxHead+left:
				fmt.Fprint(w, "  ", l)
			case i == maxHead:
				fmt.Fprintf(w, "  ... %d lines left out\n", left)
			}
		}
	}
	if len(reasonOrder) > 0 {
		fmt.Fprintf(w, "\nSkipped, with the reasons:\n")
		for _, r := range reasonOrder {
			fmt.Fprintf(w, "  %s\n", r)
			for _, n := range reasons[r] {
				fmt.Fprintf(w, "    %s\n", n)
			}
		}
	}
	if len(fails) > 0 {
		fmt.Fprintf(w, "\nFailed, with the last words of each; its output is above:\n")
	}
	for _, t := range fails {
		fmt.Fprintf(w, "  %s %s\n", t.pkg, t.name)
		for _, l := range t.causes() {
			fmt.Fprintf(w, "    %s\n", l)
		}
	}
	ok := failed == 0
	if passed+failed+skipped == 0 {
		fmt.Fprintln(w, "\nNothing ran at all.")
		failed, ok = 1, false
	}
	for _, p := range require {
		n := 0
		for pkg, c := range passedIn {
			if pkg == p || strings.HasSuffix(pkg, "/"+p) {
				n += c
			}
		}
		if n == 0 {
			fmt.Fprintf(w, "\nThe suite %s passed no test, and it must.\n", p)
			failed, ok = failed+1, false
		}
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	return ok
}

// read adds all lines of r.
func (s *summary) read(r io.Reader) error {
	br := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := br.ReadBytes('\n')
		if len(line) > 0 {
			s.add(bytes.TrimSuffix(line, []byte("\n")))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("summary: read: %w", err)
		}
	}
}

func newSummary(progress io.Writer) *summary {
	return &summary{tests: map[[2]string]*test{}, buildOutput: map[string][]string{}, showEvery: progress}
}

func main() {
	require := flag.String("require", "", "packages, separated by commas, that must pass at least one test")
	flag.Parse()
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var req []string
	if *require != "" {
		req = strings.Split(*require, ",")
	}
	if !s.finish(os.Stdout, req) {
		os.Exit(1)
	}
}
