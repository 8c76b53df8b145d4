package main

import (
	"fmt"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/spf13/cobra"
)

func (a *app) configCmd() *cobra.Command {
	var print bool
	var check string
	cmd := &cobra.Command{
		Use:   "config {--print-default | --check FILE}",
		Short: "Print the default configuration or check a file",
		Example: `  baton config --print-default > /etc/baton/baton.toml
  baton config --check /etc/baton/baton.toml`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case print == (check != ""):
				return usagef("give either --print-default or --check FILE")
			case print:
				_, err := fmt.Fprint(a.stdout, config.PrintDefault())
				return err
			}
			if _, err := config.Load(check); err != nil {
				return fmt.Errorf("refused:\n%w", err)
			}
			fmt.Fprintf(a.stdout, "%s: ok\n", check)
			return nil
		},
	}
	cmd.Flags().BoolVar(&print, "print-default", false, "print a commented file with all keys and their defaults")
	cmd.Flags().StringVar(&check, "check", "", "check `FILE` and name everything that is wrong")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  baton version",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(a.stdout, "baton %s\n", status.Build())
			return err
		},
	}
}
