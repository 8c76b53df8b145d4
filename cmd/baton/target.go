package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
)

// targetAdmin is what a node does with targets by order.
type targetAdmin interface {
	// ListTargets describes all targets of the cluster.
	ListTargets() []status.Target
	// StartTarget waits until the target serves or recovers.
	StartTarget(ctx context.Context, name, fenced string) error
	StopTarget(ctx context.Context, name string) error
	AbortRecovery(name string) error
	EvictClient(name, client string) error
	// Deactivate has this frontend's requests to a target fail, or wait again.
	Deactivate(name string, activate bool) error
}

// handleTargets lets the commands below work on a running node.
func handleTargets(ctl *control.Server, n targetAdmin) {
	ctl.Handle(control.CmdTargets, func(context.Context, json.RawMessage) (any, error) { return n.ListTargets(), nil })
	handle := func(cmd string, f func(context.Context, *control.TargetArgs) error) {
		ctl.Handle(cmd, func(ctx context.Context, raw json.RawMessage) (any, error) {
			var args control.TargetArgs
			if err := json.Unmarshal(raw, &args); err != nil {
				return nil, fmt.Errorf("arguments of %s: %w", cmd, err)
			}
			return nil, f(ctx, &args)
		})
	}
	handle(control.CmdTargetStart, func(ctx context.Context, a *control.TargetArgs) error { return n.StartTarget(ctx, a.Name, a.Fenced) })
	handle(control.CmdTargetStop, func(ctx context.Context, a *control.TargetArgs) error { return n.StopTarget(ctx, a.Name) })
	handle(control.CmdTargetAbort, func(_ context.Context, a *control.TargetArgs) error { return n.AbortRecovery(a.Name) })
	handle(control.CmdTargetEvict, func(_ context.Context, a *control.TargetArgs) error { return n.EvictClient(a.Name, a.Client) })
	handle(control.CmdTargetDeactivate, func(_ context.Context, a *control.TargetArgs) error { return n.Deactivate(a.Name, false) })
	handle(control.CmdTargetActivate, func(_ context.Context, a *control.TargetArgs) error { return n.Deactivate(a.Name, true) })
}

const targetNames = `

Targets are MGS, MDT0000, OST0000, OST0001 and so on. The command is given to the
baton that runs on this machine and concerns this node only.`

func (a *app) targetCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "target",
		Short: "Start, stop and move the targets of a cluster",
		Long: `Look at the targets of a cluster, and say where they run. To move one, stop it
where it runs and start it on another of its nodes; clients see a delay and no
error.` + targetNames,
		Example: `  baton target list
  baton target stop OST0001            # on the node where it runs
  baton target start OST0001           # on the node where it is to run
  baton target start MDT0000 --fenced n1   # n1 has lost its power`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.targetListCmd(), a.targetStartCmd(),
		a.targetOrder("stop NAME", "Stop a target on this node in order", `Stop a target on this node. Its next start, here or elsewhere, has nothing to
recover. A start that is under way is broken off.`+targetNames,
			`  baton target stop OST0001`, control.CmdTargetStop, 1),
		a.targetOrder("abort-recovery NAME", "End the recovery of a target at once", `End the recovery of a target that runs on this node at once, instead of waiting for
clients that do not come. These lose what they had there that was not on its disk.`+targetNames,
			`  baton target abort-recovery MDT0000`, control.CmdTargetAbort, 1),
		a.targetOrder("evict NAME CLIENT", "Remove a client from a target", `Remove a file system client, which is a frontend, from a target that runs on this
node. What it had there that was not on the disk is lost; it connects anew by
itself. CLIENT is its node's name, or its ID or the beginning of that.`+targetNames,
			`  baton target evict MDT0000 n3`, control.CmdTargetEvict, 2),
		a.targetOrder("deactivate NAME", "Have this frontend's requests to a target fail at once", `Have the requests of this node's frontend to a target fail with an I/O error at
once, instead of waiting for it, until it is activated again or baton restarts.`+targetNames,
			`  baton target deactivate OST0001`, control.CmdTargetDeactivate, 1),
		a.targetOrder("activate NAME", "Have this frontend's requests to a target wait for it again", `Undo deactivate: requests of this node's frontend wait for the target again.`+targetNames,
			`  baton target activate OST0001`, control.CmdTargetActivate, 1))
	return cmd
}

func (a *app) targetListCmd() *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list [--json]",
		Short: "Show all targets, where they run and who owns their stores",
		Long: `Show all targets of the cluster as this node sees them. The states are up;
recovering: waits for clients to repeat what was not on its disk; full: less than
fs.min_free left; starting and stopping; stopped; failed: has taken itself down;
elsewhere: runs on another node, or is for others.

The owner record is in the target's directory; it says who has or had the store,
and "clean" when that one has stopped in order.`,
		Example: `  baton target list
  baton target list --json | jq -r '.[] | select(.state == "recovering") | .name'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var l []status.Target
			if err := t.do(cmd.Context(), a, control.CmdTargets, &l); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(l)
			}
			return status.TargetsText(a.stdout, l)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) targetStartCmd() *cobra.Command {
	var t target
	args := control.TargetArgs{}
	cmd := &cobra.Command{
		Use:   "start NAME [--fenced NODE]",
		Short: "Start a target on this node",
		Long: `Start a target on this node and wait until it serves or recovers. A target that
runs elsewhere is refused: stop it there. If its node has died, the store is taken
over after three intervals of recovery.heartbeat without a sign of life; --fenced
says that the node has been powered off, so that nothing has to be waited for. Never
say that of a node that may be alive: two nodes would write to one store.` + targetNames,
		Example: `  baton target start OST0001
  baton target start MDT0000 --fenced n1`,
		Args: names(1),
		RunE: func(cmd *cobra.Command, names []string) error {
			args.Name = names[0]
			return a.waitForStart(cmd.Context(), &t, &args)
		},
	}
	t.add(cmd)
	cmd.Flags().StringVar(&args.Fenced, "fenced", "", "`NODE` that had the target and is powered off")
	cmd.Flags().SortFlags = false
	return cmd
}

// names takes exactly n arguments.
func names(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("usage: %s", cmd.UseLine())
		}
		return nil
	}
}

// startProgress is how often a start that takes long is asked what it waits for.
const startProgress = 500 * time.Millisecond

// waitForStart starts a target and says what it waits for. There is no limit: who
// breaks the command off leaves the start going on.
func (a *app) waitForStart(ctx context.Context, t *target, args *control.TargetArgs) error {
	if ctx == nil {
		ctx = context.Background()
	}
	socket, err := t.path(a)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- control.Do(ctx, socket, control.CmdTargetStart, args, nil) }()
	tick := time.NewTicker(startProgress)
	defer tick.Stop()
	said := ""
	for {
		select {
		case err := <-done:
			return err
		case <-tick.C:
		}
		var l []status.Target
		if err := t.do(ctx, a, control.CmdTargets, &l); err != nil {
			continue // the start itself tells what is wrong
		}
		for _, x := range l {
			if x.Name == args.Name && x.State == status.StateStarting && x.Reason != said {
				said = x.Reason
				fmt.Fprintf(a.stderr, "%s: %s\n", x.Name, said)
			}
		}
	}
}

// targetOrder makes a command for a target, and with two arguments for a client.
func (a *app) targetOrder(use, short, long, example, order string, n int) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: names(n),
		RunE: func(cmd *cobra.Command, names []string) error {
			args := control.TargetArgs{Name: names[0]}
			if n > 1 {
				args.Client = names[1]
			}
			socket, err := t.path(a)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), orderTimeout, errors.New("no answer in time; the order may still be carried out"))
			defer cancel()
			if err := control.Do(ctx, socket, order, &args, nil); err != nil {
				if ctx.Err() != nil {
					return errors.Join(err, context.Cause(ctx))
				}
				return err
			}
			return nil
		},
	}
	t.add(cmd)
	cmd.Flags().SortFlags = false
	return cmd
}

// orderTimeout bounds the stop of a target, which waits for its disk.
const orderTimeout = 2 * time.Minute
