package main

import (
	"context"
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
)

// recoveryAdmin tells how targets recover.
type recoveryAdmin interface {
	// RecoveryStatus asks other nodes for what it does not know; ctx bounds that.
	RecoveryStatus(ctx context.Context) status.Recovery
}

// handleRecovery lets the commands below work on a running node.
func handleRecovery(ctl *control.Server, n recoveryAdmin) {
	ctl.Handle(control.CmdRecovery, func(ctx context.Context, _ json.RawMessage) (any, error) { return n.RecoveryStatus(ctx), nil })
}

func (a *app) recoveryCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recovery",
		Short: "Show how targets recover, and who is told of their starts",
		Long: `Look at the recovery of targets after they have died, and at imperative recovery:
the registry (MGS) tells all nodes where a target has started, so that its clients
connect at once. Settings are recovery.imperative, ir_factor and ir_startup.`,
		Example: `  baton recovery status
  baton recovery status --json`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.recoveryStatusCmd())
	return cmd
}

func (a *app) recoveryStatusCmd() *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [--json]",
		Short: "Show the recovery of all targets and the registry's news",
		Long: `Show the recovery of every target, wherever it runs, with its clients, and the state
of imperative recovery. What does not answer within two seconds is said not to.

States of a target: WAITING for the first of its clients; RECOVERING: clients repeat
what was not on its disk, until the window ends; COMPLETE: it serves; STOPPED.
"told" is the state of imperative recovery when the target started: only with full
is the window shortened, to ir_factor tenths for clients that do not come.

States of imperative recovery: full: all nodes are told where targets have started;
partial: some are not, because they opt out or do not know how; startup: the
registry has started itself and does not vouch for anybody yet; disabled.

Every node should have the registry's table version. A node that is behind for long
cannot be told of anything: its clients find targets by time-outs.

Clients are connected; replaying; finished: wait for the others; away: were there
since the start and are not; missing: have not come since the start.`,
		Example: `  baton recovery status
  baton recovery status --json | jq -r '.targets[] | select(.state == "RECOVERING") | .name, .window_deadline'
  baton recovery status --json | jq -r '.targets[].clients[]? | select(.state == "missing") | .id'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r status.Recovery
			if err := t.do(cmd.Context(), a, control.CmdRecovery, &r); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(&r)
			}
			return status.RecoveryText(a.stdout, &r)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}
