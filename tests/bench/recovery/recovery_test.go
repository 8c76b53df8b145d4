package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// What frontends were told and a crash of the MDT has lost is replayed exactly, with
// one replay at a time or several, and whether all frontends come back or one does not:
// RS 4a, RS 5, RD 0a, RV 11a.
func TestReplayIsExact(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, p := range []plan{
		{ops: 300, clients: 1},
		{ops: 301, clients: 1, ahead: 1},
		{ops: 1000, clients: 4},
		{ops: 500, clients: 16},
		{ops: 400, clients: 4, dead: true},
	} {
		t.Run(fmt.Sprintf("%d of %d, dead %v, ahead %d", p.ops, p.clients, p.dead, p.ahead), func(t *testing.T) {
			p.window, p.step = time.Second, time.Second
			r, err := p.run(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if p.ahead == 1 && r.ahead != 1 || p.ahead == 0 && p.clients == 1 && r.ahead < 2 {
				t.Errorf("%d replays at a time", r.ahead)
			}
			if p.dead && r.served < p.window {
				t.Errorf("served after %v, before the window of %v was over", r.served, p.window)
			}
		})
	}
}

// The MDT's node is killed and the target goes on at another one, which frontends are told
// or find out: everything is replayed exactly, and only who is told has the shorter window:
// SM 100, 001.119.
func TestFailoverIsExact(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, p := range []plan{
		{kill: killProcess},
		{kill: killProcess, told: true, dead: true},
		{kill: killPower, told: true},
		{kill: killPower, told: true, dead: true},
	} {
		t.Run(fmt.Sprintf("%s, told %v, dead %v", p.kill, p.told, p.dead), func(t *testing.T) {
			p.ops, p.clients, p.window, p.step, p.away, p.factor = 300, 4, 4*time.Second, 4*time.Second, 100*time.Millisecond, 5
			r, err := p.runKill(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if r.started > r.connected || r.connected > r.served || p.dead && r.recovery < p.window/2 {
				t.Errorf("%+v", r)
			}
		})
	}
	var b strings.Builder
	if err := killTable(ctx, &b, "40", "2", plan{kill: killProcess, window: time.Second, step: time.Second, away: 10 * time.Millisecond, factor: 5}, 1, "x"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| process | 40 | 2 | no | no | ", "| process | 40 | 2 | no | yes | ", "| process | 40 | 2 | yes | no | ", "| process | 40 | 2 | yes | yes | "} {
		if strings.Count(b.String(), want) != 1 {
			t.Errorf("no line %q in\n%s", want, b.String())
		}
	}
	if killTable(ctx, &b, "1", "1", plan{kill: "x"}, 1, "") == nil {
		t.Error("a way to die that is none was taken")
	}
}

func TestTable(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var b strings.Builder
	if err := table(ctx, &b, "20,50", "1,2", plan{window: time.Second}, 2, ""); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| 20 | 1 | ", "| 20 | 2 | ", "| 50 | 1 | ", "| 50 | 2 | "} {
		if strings.Count(b.String(), want) != 1 {
			t.Errorf("no line %q in\n%s", want, b.String())
		}
	}
	if table(ctx, &b, "0", "1", plan{}, 1, "") == nil || table(ctx, &b, "1", "1x", plan{}, 1, "") == nil {
		t.Error("numbers that are none were taken")
	}
	if table(ctx, &b, "1", "1", plan{dead: true}, 1, "") == nil {
		t.Error("one frontend, and that dead, was measured")
	}
}
