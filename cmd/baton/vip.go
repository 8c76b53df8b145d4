package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// vipAdmin is what a node does with floating addresses by order, and tells of them.
type vipAdmin interface {
	ListVIPs(ctx context.Context) ([]status.VIP, error)
	AddVIP(ctx context.Context, s mgs.VIPSpec) (status.VIP, error)
	SetVIP(ctx context.Context, s mgs.VIPSpec) (status.VIP, error)
	// RemoveVIP has an address given up for good; with force its node is gone.
	RemoveVIP(ctx context.Context, addr netip.Addr, force bool) error
	// MoveVIP assigns an address to a node and does not wait for the move; with force
	// the node that serves it is gone.
	MoveVIP(ctx context.Context, addr netip.Addr, to string, force bool) (control.VIPMoved, error)
	// DrainVIP has an address served by nobody, or again: by to, or whom the node chooses.
	DrainVIP(ctx context.Context, addr netip.Addr, drained bool, to string) (control.VIPMoved, error)
	ListNodes(ctx context.Context) ([]status.ClusterNode, error)
	DrainNode(ctx context.Context, node string, drained bool) error
	// Events are those of all nodes.
	Events(ctx context.Context, a control.EventsArgs) (control.Events, error)
}

// handleVIPs lets the commands below work on a running node.
func handleVIPs(ctl *control.Server, n vipAdmin) {
	ctl.Handle(control.CmdVIPs, func(ctx context.Context, _ json.RawMessage) (any, error) { return n.ListVIPs(ctx) })
	ctl.Handle(control.CmdNodes, func(ctx context.Context, _ json.RawMessage) (any, error) { return n.ListNodes(ctx) })
	handleArgs(ctl, control.CmdVIPAdd, func(ctx context.Context, s *mgs.VIPSpec) (any, error) { return n.AddVIP(ctx, *s) })
	handleArgs(ctl, control.CmdVIPSet, func(ctx context.Context, s *mgs.VIPSpec) (any, error) { return n.SetVIP(ctx, *s) })
	handleArgs(ctl, control.CmdVIPRemove, func(ctx context.Context, a *control.VIPArgs) (any, error) {
		return nil, n.RemoveVIP(ctx, a.Addr, a.Force)
	})
	handleArgs(ctl, control.CmdVIPMove, func(ctx context.Context, a *control.VIPArgs) (any, error) {
		return n.MoveVIP(ctx, a.Addr, a.To, a.Force)
	})
	handleArgs(ctl, control.CmdVIPDrain, func(ctx context.Context, a *control.VIPArgs) (any, error) {
		return n.DrainVIP(ctx, a.Addr, a.Drained, a.To)
	})
	handleArgs(ctl, control.CmdNodeDrain, func(ctx context.Context, a *control.NodeDrainArgs) (any, error) {
		return nil, n.DrainNode(ctx, a.Node, a.Drained)
	})
	handleArgs(ctl, control.CmdEvents, func(ctx context.Context, a *control.EventsArgs) (any, error) { return n.Events(ctx, *a) })
}

// handleArgs decodes a command's arguments. The registry is waited for no longer than
// the command waits.
func handleArgs[A any](ctl *control.Server, cmd string, f func(context.Context, *A) (any, error)) {
	ctl.Handle(cmd, func(ctx context.Context, raw json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, fmt.Errorf("arguments of %s: %w", cmd, err)
		}
		ctx, cancel := context.WithTimeout(ctx, commandTimeout)
		defer cancel()
		return f(ctx, &args)
	})
}

const anyNode = `

The command may be given on any node of the cluster.`

func (a *app) vipCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vip",
		Short: "List, add and move floating addresses",
		Long: `Floating addresses are what clients of a cluster mount from. Each is served by one
node at a time and moves, with everything that clients bind to it, when that node is
drained, stops or dies, or by order. The registry knows them; they are not in the
configuration.` + anyNode,
		Example: `  baton vip add 192.0.2.50/24 --prefer n1,n2
  baton vip list
  baton vip move 192.0.2.50 --to n2
  baton vip drain 192.0.2.50`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.vipListCmd(), a.vipAddCmd(), a.vipSetCmd(), a.vipRemoveCmd(), a.vipMoveCmd(), a.vipDrainCmd(), a.vipUndrainCmd())
	return cmd
}

func (a *app) vipListCmd() *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list [--json]",
		Short: "Show the floating addresses and who serves them",
		Long: `Show the floating addresses as the registry has them, and as they are on the node
that is asked ("here").

States: served; moving: from node to next; starting: next is to serve it, and nobody
does; stopping: its node gives it up; not served; draining and drained: nobody is to
serve it (baton vip undrain); removing. "next" is ready when it listens.` + anyNode,
		Example: `  baton vip list
  baton vip list --json | jq -r '.[] | select(.floating.node == "n1") | .addr'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var l []status.VIP
			if err := t.do(cmd.Context(), a, control.CmdVIPs, &l); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(l)
			}
			return status.VIPsText(a.stdout, l)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

// vipPrefix reads an address with the length of its network's prefix.
func vipPrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(vipctl.Unbracket(s))
	if err != nil || p.Bits() == 0 {
		return p, usagef("%q is not an address with the length of its network's prefix, like 192.0.2.50/24 or 2001:db8::50/64", s)
	}
	return p, nil
}

// vipAddr reads an address; a prefix length is allowed and not looked at.
func vipAddr(s string) (netip.Addr, error) {
	host, _, _ := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(vipctl.Unbracket(host))
	if err != nil {
		return addr, usagef("%q is not an address", s)
	}
	return addr.Unmap(), nil
}

// call gives one command with arguments.
func (t *target) call(ctx context.Context, a *app, cmd string, args, result any) error {
	socket, err := t.path(a)
	if err != nil {
		return err
	}
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeoutCause(ctx, commandTimeout, errors.New("no answer in time; the order may still be carried out"))
	defer cancel()
	if err := control.Do(ctx, socket, cmd, args, result); err != nil {
		if ctx.Err() != nil {
			return errors.Join(err, context.Cause(ctx))
		}
		return err
	}
	return nil
}

// showJSON prints what an order came to, only as JSON: without, success is silent.
func (a *app) showJSON(asJSON bool, v any) error {
	if !asJSON {
		return nil
	}
	return a.printJSON(v)
}

func (a *app) vipAddCmd() *cobra.Command {
	var t target
	var asJSON bool
	var s mgs.VIPSpec
	cmd := &cobra.Command{
		Use:   "add ADDR/BITS [--prefer NODES] [--interface NAME]",
		Short: "Add a floating address",
		Long: `Add a floating address to the registry. The manager has it served by the best of the
preferred nodes, or by any node; with an external manager, or none, nobody serves it
before "baton vip move" or a hook says who. An address that is there already with the
same settings is no error.

The address may not be in use by anything else in the network, nor be in nfs.addresses
of a node.` + anyNode,
		Example: `  baton vip add 192.0.2.50/24 --prefer n1,n2
  baton vip add 2001:db8::50/64 --interface eth0`,
		Args: names(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := vipPrefix(args[0])
			if err != nil {
				return err
			}
			s.Addr, s.Bits = p.Addr(), p.Bits()
			var v status.VIP
			if err := t.call(cmd.Context(), a, control.CmdVIPAdd, &s, &v); err != nil {
				return err
			}
			return a.showJSON(asJSON, &v)
		},
	}
	t.add(cmd)
	vipSettings(cmd, &s)
	cmd.Flags().BoolVar(&s.Drained, "drained", false, "nobody is to serve it before \"baton vip undrain\"")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the address as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func vipSettings(cmd *cobra.Command, s *mgs.VIPSpec) {
	cmd.Flags().StringSliceVar(&s.Prefer, "prefer", nil, "`NODES` that may serve it, the best first (default any)")
	cmd.Flags().StringVar(&s.Interface, "interface", "", "`NAME` of the interface on every node (default the one that has the network)")
}

func (a *app) vipSetCmd() *cobra.Command {
	var t target
	var asJSON bool
	var s mgs.VIPSpec
	cmd := &cobra.Command{
		Use:   "set ADDR[/BITS] [--prefer NODES] [--interface NAME]",
		Short: "Change the settings of a floating address",
		Long: `Change settings of a floating address; those that are not given stay. Interface and
prefix apply from the next time that a node takes the address over. --prefer ""
allows all nodes.` + anyNode,
		Example: `  baton vip set 192.0.2.50 --prefer n2,n3
  baton vip set 192.0.2.50/25 --interface eth1`,
		Args: names(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr, err := vipAddr(args[0])
			if err != nil {
				return err
			}
			v, err := a.findVIP(cmd.Context(), &t, addr)
			if err != nil {
				return err
			}
			n := mgs.VIPSpec{Addr: addr, Bits: v.Floating.Bits, Interface: v.Floating.Interface, Prefer: v.Floating.Prefer, Drained: v.Floating.Drained}
			was := n
			n.Was = &was
			if strings.Contains(args[0], "/") {
				p, err := vipPrefix(args[0])
				if err != nil {
					return err
				}
				n.Bits = p.Bits()
			}
			if cmd.Flags().Changed("prefer") {
				n.Prefer = s.Prefer
			}
			if cmd.Flags().Changed("interface") {
				n.Interface = s.Interface
			}
			var now status.VIP
			if err := t.call(cmd.Context(), a, control.CmdVIPSet, &n, &now); err != nil {
				return err
			}
			return a.showJSON(asJSON, &now)
		},
	}
	t.add(cmd)
	vipSettings(cmd, &s)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the address as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

// findVIP asks for one floating address.
func (a *app) findVIP(ctx context.Context, t *target, addr netip.Addr) (*status.VIP, error) {
	var l []status.VIP
	if err := t.call(ctx, a, control.CmdVIPs, nil, &l); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(l, func(v status.VIP) bool { return v.Addr == addr.String() && v.Floating != nil })
	if i < 0 {
		return nil, fmt.Errorf("there is no floating address %s; \"baton vip list\" shows them, \"baton vip add\" adds one", addr)
	}
	return &l[i], nil
}

func (a *app) vipRemoveCmd() *cobra.Command {
	var t target
	var asJSON bool
	var v control.VIPArgs
	cmd := &cobra.Command{
		Use:   "remove ADDR [--force]",
		Short: "Remove a floating address",
		Long: `Remove a floating address: the node that serves it gives it up in order, and nobody
takes it. Clients that have it mounted wait until it is added again.

--force says that the node which serves it is gone (powered off, say), so that nobody
is waited for. Never say that of a node that may be alive. With it ADDR may also be an
address that a lost node had in nfs.addresses: then another node can have it there.` + anyNode,
		Example: `  baton vip remove 192.0.2.50`,
		Args:    names(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if v.Addr, err = vipAddr(args[0]); err != nil {
				return err
			}
			if err := t.call(cmd.Context(), a, control.CmdVIPRemove, &v, nil); err != nil {
				return err
			}
			return a.showJSON(asJSON, &v)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&v.Force, "force", false, "the node that serves it is gone")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the order as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) vipDrainCmd() *cobra.Command {
	return a.vipDrainOrder("drain ADDR", "Have an address served by nobody", `Have the node that serves the address give it up in order, with nobody to take it,
until "baton vip undrain". Clients wait meanwhile.`+anyNode, `  baton vip drain 192.0.2.50`, true)
}

func (a *app) vipUndrainCmd() *cobra.Command {
	return a.vipDrainOrder("undrain ADDR [--to NODE]", "Have an address served again", `Have a drained address served again: by the node given, else by the one that
the manager chooses. Where another program manages the addresses: else by the best of
its preferred nodes that is not drained and answers, else by the node that had it last.`+anyNode, `  baton vip undrain 192.0.2.50
  baton vip undrain 192.0.2.50 --to n2`, false)
}

func (a *app) vipDrainOrder(use, short, long, example string, drained bool) *cobra.Command {
	var t target
	var asJSON bool
	args := control.VIPArgs{Drained: drained}
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: names(1),
		RunE: func(cmd *cobra.Command, names []string) error {
			var err error
			if args.Addr, err = vipAddr(names[0]); err != nil {
				return err
			}
			var m control.VIPMoved
			if err := t.call(cmd.Context(), a, control.CmdVIPDrain, &args, &m); err != nil {
				return err
			}
			return a.showJSON(asJSON, &m)
		},
	}
	t.add(cmd)
	if !drained {
		cmd.Flags().StringVar(&args.To, "to", "", "`NODE` that is to serve it")
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the assignment as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) nodeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "List the nodes of a cluster, and keep addresses away from some",
		Long: `Look at the nodes of a cluster and the floating addresses that they serve, and take
the addresses away from a node before work on it.` + anyNode,
		Example: `  baton node list
  baton node drain n2`,
		Args: noCommand,
		RunE: giveCommand,
	}
	cmd.AddCommand(a.nodeListCmd(),
		a.nodeOrder("drain NODE", "Have a node serve no floating addresses", `Have the manager move all floating addresses away from a node, in order, and give it
none until "baton node undrain". What else runs there, targets for one, goes on. With
an external manager, or none, only new addresses are kept away: move those that it has
by "baton vip move".`+anyNode, `  baton node drain n2`, true),
		a.nodeOrder("undrain NODE", "Allow a node to serve floating addresses again", `Allow a drained node to serve floating addresses again. The manager gives it those
that prefer it.`+anyNode, `  baton node undrain n2`, false))
	return cmd
}

func (a *app) nodeListCmd() *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list [--json]",
		Short: "Show the nodes and the floating addresses that they serve",
		Long: `Show the nodes of the cluster: their health as the node that is asked sees it, which
floating addresses they serve by the registry's word, and whether they are drained.

Health: this: the node that is asked; alive; suspect: silent for too long; waiting: not
heard yet; idle: the two have nothing to do with each other, so that nothing is known.` + anyNode,
		Example: `  baton node list
  baton node list --json | jq -r '.[] | select(.drained) | .name'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var l []status.ClusterNode
			if err := t.do(cmd.Context(), a, control.CmdNodes, &l); err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(l)
			}
			return status.NodesText(a.stdout, l)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().SortFlags = false
	return cmd
}

func (a *app) nodeOrder(use, short, long, example string, drained bool) *cobra.Command {
	var t target
	var asJSON bool
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: names(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d := control.NodeDrainArgs{Node: args[0], Drained: drained}
			if err := t.call(cmd.Context(), a, control.CmdNodeDrain, &d, nil); err != nil {
				return err
			}
			return a.showJSON(asJSON, &d)
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the order as JSON")
	cmd.Flags().SortFlags = false
	return cmd
}
