package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
)

func (a *app) vipMoveCmd() *cobra.Command {
	var t target
	m := mover{t: &t, a: a}
	cmd := &cobra.Command{
		Use:   "move ADDR --to NODE [--force] [--no-wait]",
		Short: "Move a floating address to another node",
		Long: `Move a floating address to another node in order: connections are drained, nothing is
lost, and clients see a short pause. The stages are shown as they end, and then what
it came to: calls that were finished, connections closed in order and others, clients
that are told to reclaim locks, and the pause: from the end of the drain to the first
moment at which the new node serves, by the nodes' clocks.

--force says that the node which serves the address is gone (powered off, say), so
that nobody is waited for. Never say that of a node that may be alive.

The exit code is 1 if the move fails or does not end in time; it may still go on then.` + anyNode,
		Example: `  baton vip move 192.0.2.50 --to n2
  baton vip move 192.0.2.50 --to n2 --force     # n1 has lost its power
  baton vip move 192.0.2.50 --to n2 --json | jq .pause_ns`,
		Args: names(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr, err := vipAddr(args[0])
			if err != nil {
				return err
			}
			if m.args.To == "" {
				return usagef("give the node by --to; \"baton node list\" shows them")
			}
			if m.timeout <= 0 {
				return usagef("--timeout %v: give more than 0s", m.timeout)
			}
			m.args.Addr = addr
			return m.run(cmd.Context())
		},
	}
	t.add(cmd)
	cmd.Flags().StringVar(&m.args.To, "to", "", "`NODE` that is to serve it")
	cmd.Flags().BoolVar(&m.args.Force, "force", false, "the node that serves it is gone")
	cmd.Flags().BoolVar(&m.noWait, "no-wait", false, "do not wait for the move")
	cmd.Flags().DurationVar(&m.timeout, "timeout", 30*time.Second, "how long to wait at most")
	cmd.Flags().BoolVar(&m.json, "json", false, "print only what it came to, as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

// mover carries out one move and shows it.
type mover struct {
	t            *target
	a            *app
	args         control.VIPArgs
	noWait, json bool
	timeout      time.Duration

	moved  control.VIPMoved
	next   map[string]uint64
	silent silence
	seen   []events.Event  // of the move
	ended  map[string]bool // nodes that have told the move's end
}

const (
	// moveWait is how long one look for events takes.
	moveWait = 500 * time.Millisecond
	// lastEvents is how long the events of a move are waited for that has ended by the
	// registry's word.
	lastEvents = 3 * time.Second
)

func (m *mover) run(ctx context.Context) error {
	if ctx == nil {
		ctx = context.Background()
	}
	v, err := m.a.findVIP(ctx, m.t, m.args.Addr)
	if err != nil {
		return err
	}
	f := v.Floating
	if f.State() == "served" && f.Node == m.args.To {
		return m.there(f)
	}
	// From here on, events are news.
	var r control.Events
	if err := m.t.call(ctx, m.a, control.CmdEvents, &control.EventsArgs{Addr: m.args.Addr, After: m.a.now()}, &r); err != nil {
		return err
	}
	m.silent.tell(m.a, r.Silent)
	m.next = r.Next
	if err := m.t.call(ctx, m.a, control.CmdVIPMove, &m.args, &m.moved); err != nil {
		return err
	}
	switch {
	case m.noWait && m.json:
		return m.a.printJSON(&m.moved)
	case m.noWait:
		fmt.Fprintf(m.a.stdout, "%s is assigned to node %s, move %d\n", m.args.Addr, m.args.To, m.moved.MoveID)
		return nil
	}
	failed := m.follow(ctx)
	s := status.SummarizeMove(m.args.Addr, m.moved.From, m.args.To, m.moved.MoveID, m.seen)
	if failed != nil {
		s.Error = failed.Error()
	}
	if m.json {
		if err := m.a.printJSON(&s); err != nil {
			return err
		}
	} else if err := status.MoveText(m.a.stdout, &s); err != nil {
		return err
	}
	return failed
}

// there is the end of a move that has nothing to do.
func (m *mover) there(f *status.Floating) error {
	if m.json {
		return m.a.printJSON(&status.MoveSummary{Addr: m.args.Addr.String(), From: f.Node, To: f.Node, MoveID: f.MoveID})
	}
	fmt.Fprintf(m.a.stdout, "%s is served by node %s already\n", m.args.Addr, f.Node)
	return nil
}

// follow shows the events of the move until it has ended, and tells why it has failed.
func (m *mover) follow(ctx context.Context) error {
	end := time.Now().Add(m.timeout)
	var taken time.Time // when the registry said so
	for {
		if err := m.look(ctx); err != nil || m.over() {
			return err
		}
		v, err := m.a.findVIP(ctx, m.t, m.args.Addr)
		switch {
		case err != nil:
			return fmt.Errorf("the move cannot be followed any more and may go on: %w", err)
		case v.Floating.MoveID != m.moved.MoveID:
			return fmt.Errorf("the address was assigned anew meanwhile, %s: \"baton events --address %s\" shows by whom", assigned(v.Floating), m.args.Addr)
		case v.Floating.State() == "served" && taken.IsZero():
			taken = time.Now()
		case !taken.IsZero() && time.Since(taken) > lastEvents:
			return nil // a node does not tell of its events
		case time.Now().After(end):
			return m.stuck(v)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func assigned(f *status.Floating) string {
	if f.Next == "" {
		return "to nobody"
	}
	return "to node " + f.Next
}

// over tells whether both nodes have told the end of the move, as far as they will.
func (m *mover) over() bool {
	from := m.moved.From
	return m.ended[m.args.To] && (from == "" || from == m.args.To || m.args.Force || m.ended[from] || m.silent[from])
}

// look waits for events; its error is what they say the move has failed by.
func (m *mover) look(ctx context.Context) error {
	var r control.Events
	if err := m.t.call(ctx, m.a, control.CmdEvents, &control.EventsArgs{Since: m.next, Addr: m.args.Addr, Wait: moveWait}, &r); err != nil {
		return fmt.Errorf("the move cannot be followed any more and may go on: %w", err)
	}
	m.silent.tell(m.a, r.Silent)
	m.next = r.Next
	var failed error
	for i := range r.Events {
		e := &r.Events[i]
		if e.Addr != m.args.Addr || e.Move != 0 && e.Move != m.moved.MoveID {
			continue
		}
		m.seen = append(m.seen, *e)
		if !m.json {
			fmt.Fprint(m.a.stdout, status.ProgressText(e, m.seen[0].Time))
		}
		if e.Kind != events.Move || e.Stage != events.End || e.Move != m.moved.MoveID {
			continue
		}
		if m.ended == nil {
			m.ended = map[string]bool{}
		}
		m.ended[e.Node] = true
		// Of an address that is served, the error is of what some clients were not told.
		if e.Node == m.args.To && e.Err != "" && e.Attrs[failover.AttrOutcome] != string(failover.Serving) {
			failed = fmt.Errorf("node %s could not take the address over: %s; remove the cause there, or move it to another node", m.args.To, e.Err)
		}
	}
	return failed
}

// stuck says who is waited for.
func (m *mover) stuck(v *status.VIP) error {
	f := v.Floating
	held := !f.Clean && f.Node != ""
	switch {
	case held && !f.Ready:
		return fmt.Errorf("node %s was not ready in %v: see that it runs and may serve addresses (\"baton node list\", its log); node %s goes on serving until then, \"baton vip move %s --to %s\" calls it off",
			m.args.To, m.timeout, f.Node, m.args.Addr, f.Node)
	case held:
		return fmt.Errorf("node %s did not give the address up in %v: look at its log; if that node is gone, say so with --force", f.Node, m.timeout)
	}
	return fmt.Errorf("node %s did not take the address over in %v, and nobody serves it: look at its log, or move it to another node", m.args.To, m.timeout)
}
