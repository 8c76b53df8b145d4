package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/spf13/cobra"
)

// certWarning is how long before its end a certificate is warned of.
const certWarning = 30 * 24 * time.Hour

func (a *app) caCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca {init | issue | show}",
		Short: "Make and show the certificates of a cluster",
		Long: `Make and show the certificates by which the nodes of a cluster know each other.

A cluster has one certificate authority: ca.pem, which every node has, and its
key ca.key. Who has that key can make nodes of the cluster: keep it on one
machine only, better on none that is always on. Each node has a certificate
NODE.pem with its name and the key to it, NODE.key.

Nothing is ever overwritten. To renew, move the old files away first.`,
		Example: `  baton ca init --name store1 --dir /root/store1-ca
  baton ca issue n1 --dir /root/store1-ca
  baton ca show`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(a.caInitCmd(), a.caIssueCmd(), a.caShowCmd())
	return cmd
}

func dirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", config.DefaultTLSDir, "`DIR` of the certificates")
	cmd.Flags().SortFlags = false
}

func (a *app) caInitCmd() *cobra.Command {
	var name, dir string
	cmd := &cobra.Command{
		Use:   "init --name NAME [--dir DIR]",
		Short: "Make the certificate authority of a cluster",
		Long: `Make the certificate authority of a cluster: ca.pem and ca.key in DIR, which is
made if needed. It is valid for 20 years.`,
		Example: `  baton ca init --name store1
  baton ca init --name store1 --dir /root/store1-ca`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			if name == "" {
				return usagef("--name is missing: give the cluster a name")
			}
			if err := ca.CheckCluster(name); err != nil {
				return &usageError{err}
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return fmt.Errorf("directory of certificates: %w", err)
			}
			c, err := ca.Create(dir, name, ca.Options{Now: a.now})
			if errors.Is(err, ca.ErrExists) {
				return fmt.Errorf("%w; \"baton ca show --dir %s\" shows what is there", err, dir)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, `made the authority of cluster %s, valid until %s:
  %s  for every node
  %s  for nobody: who has it can make nodes of the cluster
next: baton ca issue NODE --dir %s
`, name, day(c.Cert.NotAfter), filepath.Join(dir, ca.CAFile), filepath.Join(dir, ca.CAKeyFile), dir)
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the cluster, for people to read")
	dirFlag(cmd, &dir)
	return cmd
}

func (a *app) caIssueCmd() *cobra.Command {
	var dir string
	var hosts []string
	cmd := &cobra.Command{
		Use:   "issue NODE [--dir DIR] [--host HOST...]",
		Short: "Make the certificate of a node",
		Long: `Make the certificate of a node: NODE.pem and NODE.key in DIR, where ca.pem and
ca.key are. NODE is the name that the configuration has in [[cluster.nodes]]. It
is valid for 5 years, but not longer than the authority's.

Nodes know each other by NODE alone. --host adds names and addresses for other
programs that check them; each name given so is one more that the node could
pass for.

To renew, move NODE.pem and NODE.key away and issue again: both certificates
are good until they end.`,
		Example: `  baton ca issue n1
  baton ca issue n2 --dir /root/store1-ca --host n2.example.org --host 192.0.2.2`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("give the name of one node")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			node := args[0]
			if err := ca.CheckName(node); err != nil {
				return &usageError{err}
			}
			c, err := ca.Load(dir)
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%w; name the directory of the cluster's authority with --dir, or make one with \"baton ca init\"", err)
			}
			if err != nil {
				return err
			}
			err = c.IssueNode(dir, node, ca.Options{Now: a.now, Hosts: hosts})
			if errors.Is(err, ca.ErrExists) {
				return fmt.Errorf("%w; to renew it, move %s.pem and %[2]s.key away first", err, node)
			}
			if err != nil {
				return err
			}
			n, err := ca.LoadNode(dir, node)
			if err != nil {
				return err
			}
			cp, kp := ca.NodePaths(dir, node)
			_, err = fmt.Fprintf(a.stdout, `made the certificate of node %s, valid until %s:
  %s
  %s
  %s
copy these three to cluster.tls_dir on that node, by default %s
`, node, day(n.Cert.NotAfter), filepath.Join(dir, ca.CAFile), cp, kp, config.DefaultTLSDir)
			return err
		},
	}
	cmd.Flags().StringArrayVar(&hosts, "host", nil, "further name or IP address `HOST` in the certificate; may be repeated")
	dirFlag(cmd, &dir)
	return cmd
}

func (a *app) caShowCmd() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "show [--dir DIR]",
		Short: "Show certificates and what is wrong with them",
		Long: `Show the certificates in DIR: the authorities, then the nodes. Key tells whether
the private key is there as well. What has ended, will end within 30 days, or
cannot be used is said below; the exit code is 1 if anything cannot be used.`,
		Example: `  baton ca show
  baton ca show --dir /root/store1-ca`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := ca.List(dir)
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%w; name the directory with --dir", err)
			}
			if err != nil {
				return err
			}
			return a.showCerts(l)
		},
	}
	dirFlag(cmd, &dir)
	return cmd
}

func (a *app) showCerts(l []ca.Entry) error {
	now := a.now()
	t := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\tname\tkey\tvalid from\tuntil\talso for")
	var warnings []string
	bad := 0
	for i := range l {
		e := &l[i]
		kind, key, from, until, also := "node", "no", "-", "-", "-"
		if e.CA {
			kind = "authority"
		}
		if e.Key {
			key = "yes"
		}
		if c := e.Cert; c != nil {
			from, until = day(c.NotBefore), day(c.NotAfter)
			var hosts []string
			for _, h := range c.DNSNames {
				if h != e.Name {
					hosts = append(hosts, h)
				}
			}
			for _, ip := range c.IPAddresses {
				hosts = append(hosts, ip.String())
			}
			if len(hosts) > 0 {
				also = strings.Join(hosts, " ")
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", kind, e.Name, key, from, until, also)
		warnings = slices.Concat(warnings, e.Warnings(now, certWarning))
		if !e.Usable(now) {
			bad++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, w := range warnings {
		fmt.Fprintln(a.stdout, "warning:", w)
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d certificates cannot be used", bad, len(l))
	}
	return nil
}

func day(t time.Time) string { return t.Format(time.DateOnly) }
