package main

import (
	"context"
	"fmt"
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
			p.window = time.Second
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
