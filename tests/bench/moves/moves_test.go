package main

import (
	"strings"
	"testing"
	"time"
)

func TestCell(t *testing.T) {
	ms := func(n ...int) (d []time.Duration) {
		for _, x := range n {
			d = append(d, time.Duration(x)*time.Millisecond)
		}
		return d
	}
	for _, x := range []struct {
		d    []time.Duration
		want string
	}{{nil, "–"}, {ms(7), "7 / 7"}, {ms(30, 10, 20), "20 / 30"}, {ms(40, 10, 30, 20), "25 / 40"}} {
		if got := cell(x.d); got != x.want {
			t.Errorf("%v: %q, want %q", x.d, got, x.want)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	var out strings.Builder
	for _, conns := range []string{"", "0", "x", "5001"} {
		if err := table(t.Context(), &out, options{services: "cold", conns: conns, kinds: "planned", n: 1}); err == nil || !strings.Contains(err.Error(), "-conns") {
			t.Errorf("-conns %q: %v", conns, err)
		}
	}
}
