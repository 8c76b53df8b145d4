package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

// timeline prints what the nodes of a service that keeps events did from t0 on, with
// times since then.
func timeline(ctx context.Context, w io.Writer, m rig.Mover, t0 time.Time) {
	b, ok := m.(*rig.Baton)
	if !ok {
		return
	}
	out, err := b.Command(ctx, "events", "--json", "--since", t0.UTC().Format(time.RFC3339Nano))
	if err != nil {
		fmt.Fprintf(w, "no events: %v\n", err)
		return
	}
	stages(w, out, t0)
}

// stages prints events that are given as JSON, one on a line.
func stages(w io.Writer, lines string, t0 time.Time) {
	for s := bufio.NewScanner(strings.NewReader(lines)); s.Scan(); {
		var e events.Event
		if json.Unmarshal(s.Bytes(), &e) != nil {
			continue // what is said of nodes that do not answer
		}
		fmt.Fprintf(w, "  %+7.1f ms  %-6s %-8s %-8s took %6.1f ms", ms(e.Time.Sub(t0)), e.Node, e.Kind, e.Stage, ms(e.Took))
		for _, a := range []string{events.Conns, events.Replies, events.Left, events.Orderly, events.Forced, events.Destroyed, events.Tickled, "cut"} {
			if v := e.Attrs[a]; v != "" {
				fmt.Fprintf(w, "  %s=%s", a, v)
			}
		}
		if e.Err != "" {
			fmt.Fprintf(w, "  %s", e.Err)
		}
		fmt.Fprintln(w)
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
