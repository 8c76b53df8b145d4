package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
)

// eventsWait is how long the running baton waits for news in one call.
const eventsWait = 2 * time.Second

func (a *app) eventsCmd() *cobra.Command {
	var t target
	var asJSON, follow bool
	var since, address string
	cmd := &cobra.Command{
		Use:   "events [-f] [--since TIME] [--address ADDR]",
		Short: "Show what happened to floating addresses",
		Long: `Show the events of all nodes that answer: every move of a floating address with its
stages and how long each took, who decided it and why, fences, drains, and nodes that
came or went. Every node keeps the last of its own. Times are those of the nodes'
clocks, in UTC.

Kinds: move: begins or has ended; stage: of giving an address up (refuse, drain,
commit, close, clear, remove, told, finish) or of taking it over (listen, begin, clear,
add, announce, serve, tickle, notify); decision; fence; drain; node.

With --json every event is one line.` + anyNode,
		Example: `  baton events --since 10m
  baton events -f --address 192.0.2.50
  baton events --json | jq -r 'select(.err) | .node + ": " + .err'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			args := control.EventsArgs{}
			var err error
			if since != "" {
				if args.After, err = a.sinceTime(since); err != nil {
					return err
				}
			}
			if address != "" {
				if args.Addr, err = vipAddr(address); err != nil {
					return err
				}
			}
			return a.showEvents(cmd.Context(), &t, args, follow, asJSON)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens from now on")
	cmd.Flags().StringVar(&since, "since", "", "leave out what is older: a `TIME` like 10m, or 2030-01-02T03:04:05Z")
	cmd.Flags().StringVar(&address, "address", "", "only what concerns this `ADDR`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one event on a line")
	cmd.Flags().SortFlags = false
	return cmd
}

// sinceTime reads a time, or how long ago it was.
func (a *app) sinceTime(s string) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return a.now().Add(-d), nil
	}
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return at, usagef("--since %q: give a time like 10m (ago) or 2030-01-02T03:04:05Z", s)
	}
	return at, nil
}

func (a *app) showEvents(ctx context.Context, t *target, args control.EventsArgs, follow, asJSON bool) error {
	var silent silence
	for {
		var r control.Events
		if err := t.call(ctx, a, control.CmdEvents, &args, &r); err != nil {
			return err
		}
		silent.tell(a, r.Silent)
		for i := range r.Events {
			if asJSON {
				j, err := json.Marshal(&r.Events[i])
				if err != nil {
					return err
				}
				if _, err := a.stdout.Write(append(j, '\n')); err != nil {
					return err
				}
			} else if _, err := fmt.Fprint(a.stdout, status.EventText(&r.Events[i])); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		args.Since, args.Wait = r.Next, eventsWait
	}
}

// silence are the nodes that have been said not to tell of events.
type silence map[string]bool

// tell says which nodes do not, once for each time.
func (s *silence) tell(a *app, silent map[string]string) {
	if *s == nil {
		*s = silence{}
	}
	for _, n := range slices.Sorted(maps.Keys(silent)) {
		if !(*s)[n] {
			fmt.Fprintf(a.stderr, "no events of node %s: %s\n", n, silent[n])
		}
	}
	clear(*s)
	for n := range silent {
		(*s)[n] = true
	}
}
