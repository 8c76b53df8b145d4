package node

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/clock"
)

// Nodes ask each other by name, get the answer or the error's text, and find each other
// again after a restart.
func TestAsks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cell := newCell(t)
	run := func(name string) *cluster {
		t.Helper()
		c, err := newCluster(cell.conf(name), slog.New(slog.DiscardHandler), &clock.Strict{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	answers := func(c *cluster) {
		c.asks.handle("double", func(_ context.Context, from string, args json.RawMessage) (any, error) {
			var n int
			if err := json.Unmarshal(args, &n); err != nil {
				return nil, err
			}
			if n < 0 {
				return nil, errors.New("too small")
			}
			return 2 * n, nil
		})
	}
	a := run("a")
	defer a.close(ctx)
	if err := a.ask(ctx, "b", "double", 1, nil); err == nil {
		t.Error("a node that is not there has answered")
	}
	b := run("b")
	answers(b)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			var got int
			if err := a.ask(ctx, "b", "double", i, &got); err != nil || got != 2*i {
				t.Errorf("double %d: %d, %v", i, got, err)
			}
		})
	}
	wg.Wait()
	if err := a.ask(ctx, "b", "double", -1, nil); err == nil || !strings.HasSuffix(err.Error(), "too small") {
		t.Errorf("an error came as %v", err)
	}
	if err := a.ask(ctx, "b", "nothing", 1, nil); err == nil {
		t.Error("an unknown method was answered")
	}
	a.asks.mu.Lock()
	conns := len(a.asks.conns)
	a.asks.mu.Unlock()
	if conns != 1 {
		t.Errorf("%d connections to one node", conns)
	}

	b.close(ctx)
	if err := a.ask(ctx, "b", "double", 1, nil); err == nil {
		t.Error("a node that has ended has answered")
	}
	b = run("b")
	defer b.close(ctx)
	answers(b)
	until(t, "the node's new process", func() bool {
		var got int
		c, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		return a.ask(c, "b", "double", 4, &got) == nil && got == 8
	})
}
