// Command baton is a clustered NFS version 3 file service: the daemon and the
// commands around it.
//
// Exit codes: 0 success, 1 failure, 2 wrong usage.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/node"
	"github.com/spf13/cobra"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// app is what the commands need of the world.
type app struct {
	stdout, stderr io.Writer
	newNode        nodeFunc
	daemon         daemon
	now            func() time.Time
	// defaultConfig is read when no flag names a configuration.
	defaultConfig string
}

func main() {
	a := &app{stdout: os.Stdout, stderr: os.Stderr, newNode: newNode, daemon: systemDaemon(), now: time.Now, defaultConfig: config.DefaultPath}
	os.Exit(a.run(os.Args[1:]))
}

// usageError is a mistake in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, a ...any) error { return &usageError{fmt.Errorf(format, a...)} }

// run executes a command line and returns the exit code.
func (a *app) run(args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteC()
	if err == nil {
		return exitOK
	}
	var xe *exitError
	if errors.As(err, &xe) {
		return xe.code
	}
	fmt.Fprintf(a.stderr, "baton: %v\n", err)
	var ue *usageError
	if errors.As(err, &ue) {
		fmt.Fprintf(a.stderr, "Try \"%s --help\".\n", cmd.CommandPath())
		return exitUsage
	}
	return exitFailure
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "baton",
		Short: "A clustered NFS version 3 file service",
		Long: `baton serves a file system to standard NFS version 3 clients. A node that is alone
holds everything in one process: the metadata target, the object storage targets and
the NFS frontend; in a cluster they are spread over several nodes.

Exit codes: 0 success, 1 failure, 2 wrong usage.`,
		Example: `  baton serve --data /srv/baton --export /home=/
  mount -t nfs 127.0.0.1:/home /mnt
  baton status --data /srv/baton`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noCommand,
		RunE:          giveCommand,
	}
	root.SuggestionsMinimumDistance = 2
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	for _, c := range []*cobra.Command{a.serveCmd(), a.statusCmd(), a.exportfsCmd(), a.locksCmd(), a.targetCmd(), a.vipCmd(), a.nodeCmd(), a.eventsCmd(), a.recoveryCmd(), a.registryCmd(), a.hookCmd(), a.configCmd(), a.caCmd(), a.versionCmd(), a.manCmd()} {
		root.AddCommand(c)
	}
	root.AddCommand(a.fileCmds(node.OpenFS)...)
	root.AddCommand(a.fsckCmd())
	return root
}

// noCommand is the Args of a command that has others below it: what gets there
// is not one of them.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	msg := fmt.Sprintf("unknown command %q", args[0])
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		msg += fmt.Sprintf(", did you mean %q?", s[0])
	}
	return usagef("%s", msg)
}

func giveCommand(cmd *cobra.Command, _ []string) error {
	cmd.Help()
	return usagef("no command given")
}

// noArgs refuses arguments that are not flags.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("unexpected argument %q", args[0])
	}
	return nil
}
