package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/spf13/cobra"
)

// commandTimeout bounds a command's conversation with the running baton.
const commandTimeout = 30 * time.Second

// target are the flags that name a running baton.
type target struct{ config, data, socket string }

func (t *target) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&t.data, "data", "", "data `DIR` of the running baton")
	fl.StringVar(&t.config, "config", "", "configuration `FILE` of the running baton (default "+config.DefaultPath+" if it exists)")
	fl.StringVar(&t.socket, "socket", "", "its control socket's `PATH`")
}

// path finds the control socket.
func (t *target) path(a *app) (string, error) {
	n := 0
	for _, s := range []string{t.config, t.data, t.socket} {
		if s != "" {
			n++
		}
	}
	switch {
	case n > 1:
		return "", usagef("give one of --data, --config and --socket")
	case t.socket != "":
		return t.socket, nil
	case t.data != "":
		abs, err := filepath.Abs(t.data)
		if err != nil {
			return "", err
		}
		return config.SocketPath(abs), nil
	case t.config == "" && !fileExists(a.defaultConfig):
		return config.SocketPath(config.Default().DataDir), nil
	case t.config == "":
		t.config = a.defaultConfig
	}
	c, err := config.Read(t.config)
	if err != nil {
		return "", err
	}
	if err := c.Complete(); err != nil {
		return "", err
	}
	return c.Control.Socket, nil
}

// do calls the running baton once.
func (t *target) do(ctx context.Context, a *app, cmd string, result any) error {
	socket, err := t.path(a)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	return control.Do(ctx, socket, cmd, nil, result)
}

func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func (a *app) statusCmd() *cobra.Command {
	var t target
	var asJSON, all bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "status [--json]",
		Short: "Show targets, addresses, exports, clients and rates",
		Long: `Show what a running baton does: its targets with their transaction numbers
(highest given, highest durable), service addresses, exports, clients and
procedures.

Rates are means over the last seconds as the server keeps them; with
--interval they are measured over that time.`,
		Example: `  baton status
  baton status --data /srv/baton --interval 2s
  baton status --json | jq '.targets[] | {name, transno, last_committed}'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var st status.Status
			if interval < 0 || interval > time.Hour {
				return usagef("--interval %v: use 0s to 1h", interval)
			}
			if err := t.do(cmd.Context(), a, control.CmdStatus, &st); err != nil {
				return err
			}
			if interval > 0 {
				first := st
				select {
				case <-time.After(interval):
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				}
				st = status.Status{}
				if err := t.do(cmd.Context(), a, control.CmdStatus, &st); err != nil {
					return err
				}
				st.SetRates(&first)
			}
			st.Sort()
			if asJSON {
				return a.printJSON(&st)
			}
			o := status.TextOptions{MaxClients: 20}
			if all {
				o.MaxClients = 0
			}
			return st.Text(a.stdout, o)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&all, "all", false, "show all clients, not only 20")
	cmd.Flags().DurationVar(&interval, "interval", 0, "measure rates over this `TIME`")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) exportfsCmd() *cobra.Command {
	var t target
	var reload, verbose, asJSON bool
	cmd := &cobra.Command{
		Use:   "exportfs [-r] [-v]",
		Short: "List or reload the exports",
		Long: `List the exports of a running baton, or with -r make it read its exports file
again. If any line is refused, it is named with file, line and reason, the old
exports stay in force, and the exit code is 1.`,
		Example: `  baton exportfs
  baton exportfs -v
  $EDITOR /etc/baton/exports && baton exportfs -r`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var exps []status.Export
			if !reload {
				if err := t.do(cmd.Context(), a, control.CmdExports, &exps); err != nil {
					return err
				}
				return a.showExports(exps, verbose, asJSON)
			}
			err := t.do(cmd.Context(), a, control.CmdReload, &exps)
			var re *control.RemoteError
			if errors.As(err, &re) && re.Code == control.CodeFailed {
				return fmt.Errorf("exports not reloaded:\n%s\nThe old exports stay in force", re.Text)
			}
			if err != nil {
				return err
			}
			if verbose || asJSON {
				return a.showExports(exps, verbose, asJSON)
			}
			return nil
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVarP(&reload, "reload", "r", false, "read the exports file again")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show directories, file system ids and where each export comes from")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) showExports(exps []status.Export, verbose, asJSON bool) error {
	st := status.Status{Exports: exps}
	st.Sort()
	if asJSON {
		if st.Exports == nil {
			st.Exports = []status.Export{}
		}
		return a.printJSON(st.Exports)
	}
	return status.ExportsText(a.stdout, st.Exports, verbose)
}
