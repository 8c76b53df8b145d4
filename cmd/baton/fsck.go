package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/fsck"
	"github.com/baton-nfs/baton/internal/node"
)

// exitError ends the program with a code of its own; what there is to say was
// said.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func (a *app) fsckCmd() *cobra.Command {
	var data, file string
	var repair, asJSON, verbose bool
	cmd := &cobra.Command{
		Use:   "fsck [--repair] (--data DIR | --config FILE)",
		Short: "Check the stores of a stopped baton against each other",
		Long: `fsck reads all targets of a node that does not run and checks them against each
other: records, names and cookies, link counts, the tree, logs, layouts,
objects and sizes. With --repair it mends what it finds; nothing that might be
data is thrown away: files without a name go to /lost+found, objects without a
file to lost+found of their object target. Copy the directories first.

In a cluster it is given on a node that sees the directories of the MDT and all
OSTs; it refuses those whose targets run on any node. Run by root it goes on as the
user that the data directory belongs to.

Exit codes: 0 nothing is wrong (any more), 1 something is, 2 the check could
not be made.`,
		Example: `  baton fsck --data /srv/baton
  baton fsck --config /etc/baton/baton.toml --json
  baton fsck --data /srv/baton --repair`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.stoppedConfig(data, file)
			if err != nil {
				return err
			}
			o := fsck.OpenOptions{MDTDir: cfg.MDT.Dir, Repair: repair, Logger: newLogger(config.Log{Level: "warn", Format: "text"}, a.stderr)}
			for _, x := range cfg.OST {
				o.OSTDirs = append(o.OSTDirs, x.Dir)
			}
			if isTerminal(a.stderr) {
				o.Progress = progressLine(a.stderr)
			}
			ctx := cmd.Context()
			if ctx == nil {
				ctx = context.Background()
			}
			if err := becomeOwner(cfg.DataDir); err != nil {
				fmt.Fprintf(a.stderr, "baton: %v\n", err)
				return &exitError{fsck.ExitCannot}
			}
			leave, err := node.TakeStores(ctx, cfg)
			if err != nil {
				fmt.Fprintf(a.stderr, "baton: %v\n", err)
				return &exitError{fsck.ExitCannot}
			}
			defer leave()
			rep, err := fsck.Open(ctx, o)
			if o.Progress != nil {
				fmt.Fprint(a.stderr, "\r\033[K")
			}
			if err != nil {
				fmt.Fprintf(a.stderr, "baton: %v\n", err)
				return &exitError{fsck.ExitCannot}
			}
			if asJSON {
				err = rep.WriteJSON(a.stdout)
			} else {
				err = rep.WriteText(a.stdout, verbose)
			}
			if err != nil {
				return err
			}
			if code := rep.ExitCode(); code != fsck.ExitClean {
				return &exitError{code}
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&data, "data", "", "data `DIR` of the stopped baton")
	fl.StringVar(&file, "config", "", "its configuration `FILE`")
	fl.BoolVar(&repair, "repair", false, "mend what is wrong")
	fl.BoolVar(&asJSON, "json", false, "print the report as JSON")
	fl.BoolVarP(&verbose, "verbose", "v", false, "also list notes: work that the next start finishes")
	return cmd
}

// stoppedConfig is the configuration of a node that does not run.
func (a *app) stoppedConfig(data, file string) (*config.Config, error) {
	if data != "" && file != "" {
		return nil, usagef("give one of --data and --config")
	}
	cfg := config.Default()
	switch {
	case data != "":
		abs, err := filepath.Abs(data)
		if err != nil {
			return nil, err
		}
		cfg.DataDir = abs
	case file == "" && fileExists(a.defaultConfig):
		file = a.defaultConfig
		fallthrough
	case file != "":
		var err error
		if cfg, err = config.Read(file); err != nil {
			return nil, err
		}
	default:
		return nil, usagef("say which one with --data or --config")
	}
	return cfg, cfg.Complete()
}

// progressLine shows a phase's progress on one line of a terminal.
func progressLine(w io.Writer) func(phase string, done, total uint64) {
	var last time.Time
	return func(phase string, done, total uint64) {
		if time.Since(last) < 200*time.Millisecond {
			return
		}
		last = time.Now()
		if total > 0 {
			fmt.Fprintf(w, "\r\033[K%s: %d of %d", phase, done, total)
		} else {
			fmt.Fprintf(w, "\r\033[K%s: %d", phase, done)
		}
	}
}
