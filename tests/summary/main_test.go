package main

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"unicode/utf8"
)

func summarize(t *testing.T, in string, require ...string) (string, bool) {
	t.Helper()
	s := newSummary(io.Discard)
	if err := s.read(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	ok := s.finish(&b, require)
	return b.String(), ok
}

func last(s string) string {
	l := strings.Split(strings.TrimSpace(s), "\n")
	return l[len(l)-1]
}

func TestCounts(t *testing.T) {
	for _, c := range []struct {
		name, in string
		require  []string
		want     string
		ok       bool
	}{
		{"leaves only", `{"Action":"run","Package":"m/p","Test":"A"}
{"Action":"run","Package":"m/p","Test":"A/x"}
{"Action":"pass","Package":"m/p","Test":"A/x"}
{"Action":"skip","Package":"m/p","Test":"A/y"}
{"Action":"pass","Package":"m/p","Test":"A"}
{"Action":"pass","Package":"m/p"}`, []string{"p"}, "1 passed, 0 failed, 1 skipped", true},
		{"a failing leaf fails once", `{"Action":"fail","Package":"p","Test":"A/x"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`, nil, "0 passed, 1 failed, 0 skipped", false},
		{"a parent that fails alone", `{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`, nil, "1 passed, 1 failed, 0 skipped", false},
		{"a test that never ended", `{"Action":"run","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`, nil, "0 passed, 1 failed, 0 skipped", false},
		{"a package that does not build", `{"ImportPath":"p [p.test]","Action":"build-output","Output":"p.go:1: syntax error\n"}
{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}`, nil, "0 passed, 1 failed, 0 skipped", false},
		{"a slash in a subtest's own name", `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/random_I/O"}
{"Action":"pass","Package":"p","Test":"A/random_I/O"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`, nil, "1 passed, 0 failed, 0 skipped", true},
		{"failed first, passed with the race detector", `{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}
{"Action":"run","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`, nil, "0 passed, 1 failed, 0 skipped", false},
		{"passed first, died with the race detector", `{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}
{"Action":"run","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`, nil, "0 passed, 1 failed, 0 skipped", false},
		{"nothing", ``, nil, "0 passed, 1 failed, 0 skipped", false},
		{"a required suite that only skips", `{"Action":"skip","Package":"m/q","Test":"A"}
{"Action":"pass","Package":"m/q"}
{"Action":"pass","Package":"m/p","Test":"A"}`, []string{"q"}, "1 passed, 1 failed, 1 skipped", false},
	} {
		out, ok := summarize(t, c.in, c.require...)
		if last(out) != c.want || ok != c.ok {
			t.Errorf("%s: %v, %q; want %v, %q\n%s", c.name, ok, last(out), c.ok, c.want, out)
		}
	}
}

func TestReasonsAndOutput(t *testing.T) {
	out, _ := summarize(t, `{"Action":"output","Package":"p","Test":"A","Output":"    x_test.go:3: SKIPPED, reason: no moon: tonight\n"}
{"Action":"output","Package":"p","Test":"A","Output":"--- SKIP: A (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"B","Output":"    x_test.go:9: got 1\n"}
{"Action":"fail","Package":"p","Test":"B"}`)
	for _, want := range []string{"\n  no moon: tonight\n    p.A\n", "FAILED p B\n      x_test.go:9: got 1\n", "above:\n  p B\n    x_test.go:9: got 1\n\n0 passed"} {
		if !strings.Contains(out, want) {
			t.Errorf("summary lacks %q:\n%s", want, out)
		}
	}
}

// The end of a long output names the causes.
func TestCauses(t *testing.T) {
	x := &test{}
	for i := range 2 * maxCauses {
		x.output = append(x.output, fmt.Sprintf("    x_test.go:%d: step\n", i), "        more of it\n")
	}
	x.output = append(x.output, "    x_test.go:99: "+strings.Repeat("ü", maxCause)+"\n", "panic: oh\n", "--- FAIL: A (0.00s)\n")
	l := x.causes()
	if len(l) != maxCauses || l[0] != "x_test.go:8: step" || l[maxCauses-1] != "panic: oh" {
		t.Errorf("%q", l)
	}
	if y := l[maxCauses-2]; len(y) > maxCause+4 || !strings.HasPrefix(y, "x_test.go:99: ü") || !utf8.ValidString(y) {
		t.Errorf("%q", y)
	}
}
