package sim

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestCoverage checks that coverage.txt tells of every scenario of scenarios.txt what
// covers it, and that these tests exist.
func TestCoverage(t *testing.T) {
	var ids []string
	for _, f := range records(t, "scenarios.txt", 3) {
		if f[0] != "A" && f[0] != "P" {
			t.Errorf("%s: mark %q", f[1], f[0])
		}
		ids = append(ids, f[1])
	}
	slices.Sort(ids)
	if len(ids) < 350 || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Fatalf("%d scenarios, or one of them twice", len(ids))
	}
	checkCoverage(t, "coverage.txt", ids)
}

// TestSizeCoverage checks that som.txt tells what covers every use case, problem and
// requirement of sizes that the MDT keeps, and that these tests exist.
func TestSizeCoverage(t *testing.T) {
	ids := []string{"P 1.2", "P 3.1", "P 4.1", "P 4.2", "P 7.1", "P 8.1", "P 9.1", "P 9.2"}
	for group, n := range map[string]int{"UC ": 5, "P ": 6, "003.": 31, "size ": 8} {
		for i := range n {
			ids = append(ids, group+strconv.Itoa(i+1))
		}
	}
	slices.Sort(ids)
	checkCoverage(t, "som.txt", ids)
}

// checkCoverage checks a table of what covers ids, which are sorted.
func checkCoverage(t *testing.T, table string, ids []string) {
	t.Helper()
	tests := map[string]map[string]bool{}
	seen := map[string]bool{}
	for _, f := range records(t, table, 4) {
		id, list, state, note := f[0], f[1], f[2], f[3]
		if _, known := slices.BinarySearch(ids, id); !known || seen[id] {
			t.Errorf("%s: not to be here, or here twice", id)
		}
		seen[id] = true
		switch state {
		case "done", "part":
			if list == "" || state == "part" && note == "" {
				t.Errorf("%s: %s without a test or a note", id, state)
			}
		case "open", "n.a.":
			if list != "" || note == "" {
				t.Errorf("%s: %s with a test or without a reason", id, state)
			}
		default:
			t.Errorf("%s: state %q", id, state)
		}
		for x := range strings.SplitSeq(list, ";") {
			if x = strings.TrimSpace(x); x == "" {
				continue
			}
			pkg, name, _ := strings.Cut(x, " ")
			name, sub, _ := strings.Cut(name, "/")
			if tests[pkg] == nil {
				tests[pkg] = testsOf(t, pkg)
			}
			if !tests[pkg][name] {
				t.Errorf("%s: there is no test %s in %s", id, name, pkg)
			}
			if pkg == "tests/sim" && sub != "" && !slices.ContainsFunc(scenarios(), func(s scenario) bool { return s.name == sub }) {
				t.Errorf("%s: there is no scenario %s", id, sub)
			}
			if name == "TestNetworkScenarios" && sub != "" {
				text, err := os.ReadFile(filepath.Join("../..", pkg, "scenario_test.go"))
				if err != nil || !strings.Contains(string(text), strconv.Quote(sub)+": func(") {
					t.Errorf("%s: there is no scenario %s in %s: %v", id, sub, pkg, err)
				}
			}
			if name == "TestScenarios" && pkg == "recovery/target/recov" || name == "TestGolden" && pkg == "recovery/client/imp" {
				if _, err := os.Stat(filepath.Join("../..", pkg, "testdata", sub+".txt")); err != nil {
					t.Errorf("%s: %v", id, err)
				}
			}
		}
	}
	for _, id := range ids {
		if !seen[id] {
			t.Errorf("%s is missing from %s", id, table)
		}
	}
}

// records reads the lines of a table with n columns.
func records(t *testing.T, name string, n int) (l [][]string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if s.Text() == "" || strings.HasPrefix(s.Text(), "#") {
			continue
		}
		fields := strings.Split(s.Text(), "|")
		if len(fields) != n {
			t.Fatalf("%s: %q has not %d columns", name, s.Text(), n)
		}
		for i := range fields {
			fields[i] = strings.TrimSpace(fields[i])
		}
		l = append(l, fields)
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return l
}

// testsOf lists the test functions of a package of the repository.
func testsOf(t *testing.T, pkg string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", pkg, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in %s: %v", pkg, err)
	}
	found := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				found[fn.Name.Name] = true
			}
		}
	}
	return found
}
