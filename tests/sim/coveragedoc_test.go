package sim

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated part of docs/coverage.md anew")

const (
	coverageDoc = "../../docs/coverage.md"
	// docMark begins the generated part.
	docMark = "<!-- From here on generated from tests/sim/coverage.txt: go test ./tests/sim -run TestCoverageDoc -update -->\n"
)

// TestCoverageDoc checks that docs/coverage.md says what coverage.txt says, and
// nothing of the same scenarios above.
func TestCoverageDoc(t *testing.T) {
	doc, err := os.ReadFile(coverageDoc)
	if err != nil {
		t.Fatal(err)
	}
	head, tail, ok := bytes.Cut(doc, []byte(docMark))
	if !ok {
		t.Fatalf("%s has no line %q", coverageDoc, docMark)
	}
	want := coverageTables(t)
	for line := range strings.Lines(string(head)) {
		ids, _, _ := strings.Cut(strings.TrimPrefix(line, "| "), " | ")
		if !strings.HasPrefix(line, "| ") || ids == "id" {
			continue
		}
		for id := range strings.SplitSeq(ids, ", ") {
			if strings.Contains(want, "\n| "+id+" | ") {
				t.Errorf("%s is in the table by hand, too", id)
			}
		}
	}
	if string(tail) == want {
		return
	}
	if !*update {
		t.Fatalf("%s is not what coverage.txt says: run go test ./tests/sim -run TestCoverageDoc -update", coverageDoc)
	}
	if err := os.WriteFile(coverageDoc, []byte(string(head)+docMark+want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestCoverageByHand checks that the tables by hand have a line for each scenario and
// requirement of moves of addresses, and that the tests they name exist.
func TestCoverageByHand(t *testing.T) {
	doc, err := os.ReadFile(coverageDoc)
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(string(doc), docMark)
	missing := map[string]bool{}
	for prefix, n := range map[string]int{"own ": 18, "004.": 33} {
		for i := range n {
			missing[prefix+strconv.Itoa(i+1)] = true
		}
	}
	tests := map[string]map[string]bool{}
	for line := range strings.Lines(head) {
		f := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(f) < 2 || !strings.HasPrefix(line, "| ") || strings.TrimSpace(f[0]) == "id" {
			continue
		}
		if len(f) != 4 {
			t.Fatalf("%q has not 4 columns", line)
		}
		for i := range f {
			f[i] = strings.TrimSpace(f[i])
		}
		id, list, state := f[0], f[2], f[3]
		if !missing[id] {
			t.Errorf("%s: not to be here, or here twice", id)
		}
		delete(missing, id)
		if state != "done" && !strings.HasPrefix(state, "done: ") && !strings.HasPrefix(state, "part: ") {
			t.Errorf("%s: state %q", id, state)
		}
		named := 0
		for group := range strings.SplitSeq(list, "; ") {
			pkg, names, ok := strings.Cut(strings.TrimPrefix(group, "`"), "` ")
			if !ok {
				t.Errorf("%s: %q names no package", id, group)
				continue
			}
			if tests[pkg] == nil {
				tests[pkg] = testsOf(t, pkg)
			}
			for name := range strings.SplitSeq(names, ", ") {
				named++
				if !tests[pkg][name] {
					t.Errorf("%s: there is no test %s in %s", id, name, pkg)
				}
			}
		}
		if named == 0 {
			t.Errorf("%s: no test", id)
		}
	}
	for id := range missing {
		t.Errorf("%s is missing", id)
	}
}

// coverageTables makes one table for each group of scenarios.
func coverageTables(t *testing.T) string {
	covered := map[string][]string{}
	for _, f := range records(t, "coverage.txt", 4) {
		covered[f[0]] = f
	}
	text, err := os.ReadFile("scenarios.txt")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	counts := map[string]int{}
	first := true
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch name, group := strings.CutPrefix(line, "# "); {
		case group && first:
			first = false // what the file is
		case group:
			fmt.Fprintf(&b, "\n## %s\n\n| id | | scenario | test | state |\n|---|---|---|---|---|\n", name)
		case line != "":
			f := strings.SplitN(line, "|", 3)
			for i := range f {
				f[i] = strings.TrimSpace(f[i])
			}
			c := covered[f[1]]
			if len(f) != 3 || c == nil {
				t.Fatalf("%q is not covered", line)
			}
			counts[c[2]]++
			state := c[2]
			if c[3] != "" {
				state += ": " + c[3]
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", f[1], f[0], f[2], shortTests(c[1]), state)
		}
	}
	return fmt.Sprintf("\n%d done, %d in part, %d open, %d cannot apply.\n%s", counts["done"], counts["part"], counts["open"], counts["n.a."], b.String())
}

// shortTests names each package once: `pkg` TestA, TestB; `pkg2` TestC.
func shortTests(list string) string {
	var order []string
	names := map[string][]string{}
	for x := range strings.SplitSeq(list, ";") {
		if x = strings.TrimSpace(x); x == "" {
			continue
		}
		pkg, name, _ := strings.Cut(x, " ")
		if names[pkg] == nil {
			order = append(order, pkg)
		}
		names[pkg] = append(names[pkg], name)
	}
	for i, pkg := range order {
		order[i] = "`" + pkg + "` " + strings.Join(names[pkg], ", ")
	}
	return strings.Join(order, "; ")
}
