package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/node"
	"github.com/baton-nfs/baton/recovery/mgs"
)

func (a *app) registryCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "registry",
		Short: "Show, save and move the registry of a cluster",
		Long: `Look at the registry: service addresses with their owners and epochs, the nodes'
clients, the targets that were made. It is in a file that the MGS serves, or in
etcd (registry.kind). These commands go to it themselves, as the configuration
says; no baton need run, but for the members of an embedded etcd.`,
		Example: `  baton registry status
  baton registry export /root/registry.json`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.registryStatusCmd(), a.registryExportCmd(), a.registryImportCmd())
	return cmd
}

// registryFlags name the configuration.
type registryFlags struct{ data, file string }

func (f *registryFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.file, "config", "", "configuration `FILE`, by default "+config.DefaultPath)
	cmd.Flags().StringVar(&f.data, "data", "", "data `DIR` of a node that is alone")
	cmd.Flags().SortFlags = false
}

// load reads a configuration that is right.
func (f *registryFlags) load(a *app) (*config.Config, error) {
	cfg, err := a.stoppedConfig(f.data, f.file)
	if err != nil {
		return nil, err
	}
	return cfg, cfg.Validate()
}

func oneFile(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("give the name of one file, or -")
	}
	return nil
}

func withTime(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return context.WithTimeout(ctx, commandTimeout)
}

func (a *app) registryStatusCmd() *cobra.Command {
	var f registryFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [--json] [--config FILE]",
		Short: "Show where the registry is, and how it does",
		Long: `Show the registry: where it is, and what it has. In etcd: its members, which of them
leads them, and the node that was elected to tell all where targets run. Exit code
1 if it cannot be read.`,
		Example: `  baton registry status
  baton registry status --json | jq '.members[] | select(.error != null)'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load(a)
			if err != nil {
				return err
			}
			ctx, cancel := withTime(cmd)
			defer cancel()
			r, err := node.RegistryState(ctx, cfg, nil)
			if err != nil {
				return err
			}
			if asJSON {
				err = a.printJSON(r)
			} else {
				err = registryText(a.stdout, r)
			}
			if err == nil && r.Error != "" {
				err = &exitError{exitFailure}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	f.add(cmd)
	return cmd
}

func registryText(w io.Writer, r *node.RegistryStatus) error {
	state := fmt.Sprintf("%d bytes: %d service addresses, clients of %d nodes, %d OSTs", r.Bytes, r.Addresses, r.Nodes, r.OSTs)
	switch {
	case r.Error != "":
		state = r.Error
	case r.Identity == "":
		state = "there is none yet"
	}
	fmt.Fprintf(w, "registry (%s): %s\n  %s\n", r.Kind, r.Place, state)
	if r.Identity != "" {
		fmt.Fprintf(w, "  identity %s\n", r.Identity)
	}
	if r.Revision != 0 {
		fmt.Fprintf(w, "  revision %d\n", r.Revision)
	}
	if r.Frozen {
		fmt.Fprintln(w, "  frozen: it was exported to go on elsewhere")
	}
	if r.Members == nil {
		return nil
	}
	elected := "nobody"
	if r.Leader != "" {
		elected = fmt.Sprintf("%s, term %d", r.Leader, r.Term)
	}
	fmt.Fprintf(w, "  elected: %s\n\n", elected)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "MEMBER\tENDPOINT\tVERSION\tSIZE\tSTATE")
	for _, m := range r.Members {
		name, state := m.Name, "ok"
		if name == "" {
			name = "-"
		}
		switch {
		case m.Error != "":
			state = m.Error
		case m.Leader:
			state = "ok, leader of the members"
		}
		version, size := m.Version, "-"
		if version == "" {
			version = "-"
		} else {
			size = config.Size(m.Size).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", name, m.Endpoint, version, size, state)
	}
	return t.Flush()
}

func (a *app) registryExportCmd() *cobra.Command {
	var f registryFlags
	var freeze bool
	cmd := &cobra.Command{
		Use:   "export [--freeze] [--config FILE] FILE",
		Short: "Write the registry to a file",
		Long: `Write the registry to FILE, which must not exist; - is the standard output. Without
--freeze it is a copy for a backup: what changes later is not in it, so a cluster
must not go on from it while the registry itself is there.

With --freeze the registry refuses all changes from then on, because the cluster is to
go on from FILE somewhere else. What is served goes on meanwhile. The MGS has to be
stopped first; its file is renamed to registry.json.exported.`,
		Example: `  baton registry export /root/registry.json
  baton registry export --freeze /root/registry.json`,
		Args: oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			if freeze && args[0] == "-" {
				return usagef("--freeze needs a file")
			}
			cfg, err := f.load(a)
			if err != nil {
				return err
			}
			ctx, cancel := withTime(cmd)
			defer cancel()
			if args[0] == "-" {
				doc, _, err := node.ExportRegistry(ctx, cfg, nil, false)
				if err == nil {
					_, err = a.stdout.Write(doc)
				}
				return err
			}
			doc, place, err := export(ctx, cfg, args[0], freeze)
			if err != nil {
				return err
			}
			d, err := mgs.Inspect(args[0], doc)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "exported %s, %d bytes, identity %s\n", place, len(doc), d.Identity)
			if freeze {
				fmt.Fprintf(a.stdout, "it is frozen now: set registry.kind on all nodes, and \"baton registry import %s\"\n", args[0])
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&freeze, "freeze", false, "refuse changes from now on")
	f.add(cmd)
	return cmd
}

// export writes the registry to a new file. What keeps the file from being written is found
// out before the registry is frozen.
func export(ctx context.Context, cfg *config.Config, path string, freeze bool) (doc []byte, place string, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, "", fmt.Errorf("%s exists and is not overwritten", path)
	}
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, "", err
	}
	defer d.Close()
	if freeze && cfg.InEtcd() {
		if doc, _, err = node.ExportRegistry(ctx, cfg, nil, false); err == nil {
			err = write(f, d, doc)
		}
	} else if freeze {
		err = becomeOwner(cfg.DataDir)
	}
	if err != nil {
		return nil, "", err
	}
	if doc, place, err = node.ExportRegistry(ctx, cfg, nil, freeze); err != nil {
		return nil, "", err
	}
	if err = write(f, d, doc); err == nil && freeze {
		err = node.FreezeRegistry(ctx, cfg)
	}
	if err != nil && freeze && cfg.InEtcd() {
		err = &node.FrozenError{Err: err}
	}
	return doc, place, err
}

// write makes b the content of a file in a directory, durably.
func write(f, dir *os.File, b []byte) error {
	if err := f.Truncate(int64(len(b))); err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return errors.Join(f.Sync(), dir.Sync())
}

func (a *app) registryImportCmd() *cobra.Command {
	var f registryFlags
	var force bool
	cmd := &cobra.Command{
		Use:   "import [--force] [--config FILE] FILE",
		Short: "Make the content of a file the registry",
		Long: `Make FILE, which "baton registry export" has written, the registry where the
configuration has it. A registry that is there is overwritten only with --force. Run by
root it writes that of an MGS as the user that the data directory belongs to.

Nodes that know the cluster wait until its registry is there. One that is new makes an
empty registry if there is none: start those afterwards.`,
		Example: `  baton registry import /root/registry.json`,
		Args:    oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := f.load(a)
			if err != nil {
				return err
			}
			var doc []byte
			if args[0] == "-" {
				doc, err = io.ReadAll(io.LimitReader(os.Stdin, mgs.MaxDocument+1))
			} else {
				doc, err = readBounded(args[0], mgs.MaxDocument)
			}
			if err != nil {
				return err
			}
			if !cfg.InEtcd() {
				if err := becomeOwner(cfg.DataDir); err != nil {
					return err
				}
			}
			ctx, cancel := withTime(cmd)
			defer cancel()
			place, err := node.ImportRegistry(ctx, cfg, nil, doc, force)
			if errors.Is(err, node.ErrRegistryExists) {
				return fmt.Errorf("%w; if it is really to be replaced, give --force", err)
			}
			if err != nil {
				return err
			}
			d, err := mgs.Inspect(args[0], doc)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "imported into %s, %d bytes, identity %s\n", place, len(doc), d.Identity)
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "overwrite the registry that is there, frozen or not")
	f.add(cmd)
	return cmd
}

func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most+1))
}
