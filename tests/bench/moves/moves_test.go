package main

import (
	"net"
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

func TestStages(t *testing.T) {
	t0 := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out strings.Builder
	stages(&out, `{"time":"2026-01-02T03:04:05.0125Z","node":"a","kind":"stage","stage":"drain","took":2500000,"attrs":{"conns":"7","cut":"deadline","role":"release"},"err":"late"}
no events of node c: away
{"time":"2026-01-02T03:04:05.1Z","node":"b","kind":"move","stage":"end"}
`, t0)
	want := `    +12.5 ms  a      stage    drain    took    2.5 ms  conns=7  cut=deadline  late
   +100.0 ms  b      move     end      took    0.0 ms
`
	if out.String() != want {
		t.Errorf("%s, want\n%s", out.String(), want)
	}
}

func TestCallIsTold(t *testing.T) {
	t0 := time.Unix(100, 0)
	c := call{start: t0.Add(-5 * time.Millisecond), took: 30 * time.Millisecond}
	if got, want := c.tell(t0), "begun -5ms, took 30ms"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	c.ended, c.dialed, c.dials, c.local = t0.Add(20*time.Millisecond), 2*time.Millisecond, 1, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 9}
	if got, want := c.tell(t0), "begun -5ms, took 30ms, connection over 20ms, 1 new ones, the last from 192.0.2.1:9 in 2ms"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
