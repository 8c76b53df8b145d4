package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// Baton is the service itself: frontends a, b and c, between which addresses move, and
// a machine that runs all targets and is left alone. The registry is at an MGS there, or
// in an etcd of the frontends.
type Baton struct {
	net     *Net
	cluster *bed.Cluster
	vips    []netip.Addr
	o       BatonOptions
	members map[string]*bed.Member
}

// BatonOptions of NewBaton.
type BatonOptions struct {
	// Manual: nobody but orders move addresses (manager = "external"), and the test says
	// who is gone. Else baton's own manager moves them, too.
	Manual bool
	// Etcd: the frontends have the registry in an etcd of theirs, and one of the nodes is
	// elected to decide. So each of them can die that others need to move what it had.
	Etcd bool
}

// store is the machine that runs the targets.
const store = "store"

// NewBaton makes the service.
func NewBaton(n *Net, dir string, o BatonOptions, vips ...netip.Addr) (*Baton, error) {
	b := &Baton{net: n, vips: vips, o: o, members: map[string]*bed.Member{}}
	var ms []*bed.Member
	for _, m := range n.Machines {
		x := &bed.Member{Name: m.Name, Addr: m.Addr, Node: m.Node(), Floating: m.Name != store}
		if m.Name == store {
			x.Start = []string{"MDT0000", "OST0000", "OST0001"}
			if !o.Etcd {
				x.Start = append(x.Start, "MGS")
			}
		}
		ms = append(ms, x)
		b.members[m.Name] = x
	}
	c, err := bed.NewCluster(bed.Config{Node: n.Machine(store).Node(), Dir: dir, Exports: []bed.Export{{Path: "/rw"}}}, ms...)
	if err != nil {
		return nil, err
	}
	b.cluster = c
	if o.Etcd {
		c.Etcd = b.Nodes()
	}
	if o.Manual {
		c.Extra = managerExternal
	} else {
		c.Extra = managerBuiltin
		if Patient {
			c.Extra += managerPatient
		}
	}
	if Patient {
		c.Extra += failoverPatient
	}
	return b, nil
}

// Sections of the configuration. Addresses stay where a test has moved them.
const (
	managerExternal = "[manager]\nmode = \"external\"\n"
	managerBuiltin  = "[manager]\nmode = \"builtin\"\nfailback_delay = \"never\"\n"
	managerPatient  = "confirm = \"1s\"\nstart_timeout = \"1m\"\n"
	failoverPatient = "[failover]\ndrain_timeout = \"10s\"\ncommit_timeout = \"10s\"\nclose_timeout = \"2s\"\nclear_timeout = \"2s\"\nremove_timeout = \"2s\"\n"
)

// Patient makes nodes of NewBaton wait longer before they think that something is dead
// or cannot be done, so that they are right on a machine that stands still for a
// second. It is set before the first of them is made. Figures are taken without.
var Patient bool

// Name tells who decides.
func (b *Baton) Name() string {
	switch {
	case b.o.Manual:
		return "baton (by order)"
	case b.o.Etcd:
		return "baton (etcd)"
	}
	return "baton"
}

// Nodes are those that serve addresses.
func (b *Baton) Nodes() (names []string) {
	for _, m := range b.net.Machines {
		if m.Name != store {
			names = append(names, m.Name)
		}
	}
	return names
}

// Command gives a command of baton on the machine that is left alone.
func (b *Baton) Command(ctx context.Context, args ...string) (string, error) {
	return b.cluster.Baton(ctx, b.members[store], args...)
}

// Start starts all nodes and enters the addresses; address i is at node i first.
func (b *Baton) Start(ctx context.Context) error {
	for _, m := range b.net.Machines {
		if err := b.cluster.StartMember(ctx, b.members[m.Name]); err != nil {
			return err
		}
	}
	for _, m := range b.net.Machines {
		if err := b.ready(ctx, m.Name); err != nil {
			return err
		}
	}
	if err := b.Whole(ctx); err != nil {
		return err
	}
	nodes := b.Nodes()
	for i, a := range b.vips {
		if out, err := b.Command(ctx, "vip", "add", Prefix(a).String()); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		if err := b.Move(ctx, a, nodes[i%len(nodes)]); err != nil {
			return err
		}
	}
	return nil
}

// ready waits until the node answers commands about addresses.
func (b *Baton) ready(ctx context.Context, node string) error {
	for {
		out, err := b.cluster.Baton(ctx, b.members[node], "vip", "list")
		if err == nil {
			return nil
		}
		if b.members[node].Ended() {
			return fmt.Errorf("rig: %s has ended\n%s", node, b.Log())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("rig: %s does not get ready: %w\n%s\n%s", node, err, out, b.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Owner is the node that serves the address, by the registry, while it has it. A
// registry that has just lost one of its machines is asked again.
func (b *Baton) Owner(a netip.Addr) string {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		s, err := b.served(ctx, a)
		if err == nil {
			return s
		}
		select {
		case <-ctx.Done():
			return ""
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// served asks the registry who serves an address; "" if nobody does.
func (b *Baton) served(ctx context.Context, a netip.Addr) (string, error) {
	out, err := b.Command(ctx, "vip", "list", "--json")
	if err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	var l []struct {
		Addr     netip.Addr `json:"addr"`
		Floating *struct {
			Node  string `json:"node"`
			Clean bool   `json:"clean"`
		} `json:"floating"`
	}
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		return "", fmt.Errorf("rig: baton vip list: %w\n%s", err, out)
	}
	for _, v := range l {
		if v.Addr == a && v.Floating != nil && !v.Floating.Clean {
			return v.Floating.Node, nil
		}
	}
	return "", nil
}

// Move gives the order to move, and waits until the node serves the address.
func (b *Baton) Move(ctx context.Context, a netip.Addr, to string) error {
	for {
		out, err := b.Command(ctx, "vip", "move", a.String(), "--to", to)
		if err != nil {
			return fmt.Errorf("%w\n%s\n%s", err, out, b.Log())
		}
		// A manager may call an order off, as when it takes the node for dead.
		short, cancel := context.WithTimeout(ctx, 30*time.Second)
		err = b.until(short, a, func(node string) bool { return node == to })
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// until waits until the node that serves the address is one that ok takes, and has it.
func (b *Baton) until(ctx context.Context, a netip.Addr, ok func(string) bool) error {
	for {
		node, err := b.served(ctx, a)
		if err == nil && node != "" && ok(node) {
			if m := b.net.Machine(node).Node(); m != nil {
				if has, herr := m.Has(a); herr == nil && has && b.net.ping(ctx, a) == nil {
					return nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %v is at %q: %w\n%s", ErrNotServed, a, node, err, b.Log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Kill cuts the power of a node.
func (b *Baton) Kill(_ context.Context, node string) error {
	err := b.net.Machine(node).Off()
	b.members[node].Kill()
	return err
}

// TakeOver waits until another node serves the address. The test orders that where
// there is no manager that does.
func (b *Baton) TakeOver(ctx context.Context, a netip.Addr, to string) error {
	was, err := b.served(ctx, a)
	if err != nil {
		return err
	}
	if b.o.Manual {
		if out, err := b.Command(ctx, "vip", "move", a.String(), "--to", to, "--force"); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return b.until(ctx, a, func(node string) bool { return node == to })
	}
	// The manager may have decided before it was asked who served it.
	return b.until(ctx, a, func(node string) bool { return node != was || !b.dead(node) })
}

// dead tells whether a node is without power, pulled off the network, or frozen.
func (b *Baton) dead(node string) bool {
	m := b.net.Machine(node)
	return m.Node() == nil || m.IsCut() || m.Frozen()
}

// Restart gives a node power and starts the service there. It returns when another one
// can die.
func (b *Baton) Restart(ctx context.Context, node string) error {
	if err := b.start(ctx, node); err != nil {
		return err
	}
	if err := b.ready(ctx, node); err != nil {
		return err
	}
	return b.Whole(ctx)
}

func (b *Baton) start(ctx context.Context, node string) error {
	m := b.net.Machine(node)
	if err := m.On(); err != nil {
		return err
	}
	x := b.members[node]
	x.Node = m.Node()
	return b.cluster.StartMember(ctx, x)
}

// Freeze stops the node's processes where they are.
func (b *Baton) Freeze(node string) error {
	b.net.Machine(node).SetFrozen(true)
	return b.members[node].Signal(syscall.SIGSTOP)
}

// Thaw lets them go on.
func (b *Baton) Thaw(node string) error {
	b.net.Machine(node).SetFrozen(false)
	return b.members[node].Signal(syscall.SIGCONT)
}

// Cut pulls a node's cable.
func (b *Baton) Cut(node string) error { return b.net.Machine(node).Cut() }

// Mend plugs it in.
func (b *Baton) Mend(node string) error { return b.net.Machine(node).Mend() }

// Registry stops an MGS, or starts it again.
func (b *Baton) Registry(ctx context.Context, on bool) error {
	verb := "stop"
	if on {
		verb = "start"
	}
	out, err := b.Command(ctx, "target", verb, "MGS")
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// Ended is a node whose process has ended without being killed; "" if all run.
func (b *Baton) Ended() string {
	for name, x := range b.members {
		if x.Ended() {
			return name
		}
	}
	return ""
}

// Events are what all nodes have logged about addresses, a line each.
func (b *Baton) Events(ctx context.Context) (string, error) {
	return b.Command(ctx, "events")
}

// Stop stops the frontends, then the rest, and checks the stores.
func (b *Baton) Stop(ctx context.Context) error {
	if err := b.cluster.Stop(); err != nil {
		return err
	}
	return b.cluster.Check(ctx)
}

// Log returns the ends of the nodes' logs, and who has which address.
func (b *Baton) Log() string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var s strings.Builder
	s.WriteString(b.cluster.Log())
	for _, args := range [][]string{{"vip", "list"}, {"events"}, {"locks"}} {
		out, err := b.Command(ctx, args...)
		lines := strings.Split(out, "\n")
		fmt.Fprintf(&s, "--- baton %s: %v\n%s\n", strings.Join(args, " "), err, strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
	return s.String()
}
