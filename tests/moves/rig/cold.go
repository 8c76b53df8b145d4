package rig

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// Cold moves an address by hand: a server without a cluster, with a store of its own
// for each address, is stopped on one machine and started on another, with the
// address. It is the yardstick of what clients survive, and tries the
// workloads and checks without anything that is to be tested by them.
type Cold struct {
	net *Net
	dir string

	mu   sync.Mutex
	vips map[netip.Addr]*coldVIP
}

type coldVIP struct {
	prefix netip.Prefix
	node   string
	srv    *bed.Baton
}

// NewCold makes the service with its stores below dir.
func NewCold(n *Net, dir string, vips ...netip.Addr) *Cold {
	c := &Cold{net: n, dir: dir, vips: map[netip.Addr]*coldVIP{}}
	for i, a := range vips {
		c.vips[a] = &coldVIP{prefix: netip.PrefixFrom(a, Bits), node: n.Machines[i%len(n.Machines)].Name}
	}
	return c
}

// Name returns "cold".
func (c *Cold) Name() string { return "cold" }

// Nodes are all machines.
func (c *Cold) Nodes() (names []string) {
	for _, m := range c.net.Machines {
		names = append(names, m.Name)
	}
	return names
}

// Start starts each address's server.
func (c *Cold) Start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for a, v := range c.vips {
		if err := c.start(ctx, a, v, v.node); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cold) start(ctx context.Context, a netip.Addr, v *coldVIP, node string) error {
	b := c.net.Machine(node).Node()
	if b == nil {
		return fmt.Errorf("rig: %s has no power", node)
	}
	if err := b.AddAddr("eth0", v.prefix); err != nil {
		return err
	}
	v.node = node
	srv, err := bed.NewBaton(bed.Config{Node: b, Dir: filepath.Join(c.dir, a.String()), Addr: a, Exports: []bed.Export{{Path: "/rw"}}})
	if err != nil {
		return err
	}
	v.srv = srv
	if err := srv.Start(ctx); err != nil {
		return err
	}
	return b.Announce("eth0", a)
}

// Owner is the node that has the address.
func (c *Cold) Owner(a netip.Addr) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v := c.vips[a]; v.srv != nil {
		return v.node
	}
	return ""
}

// Move stops the server, moves the address and starts the server there.
func (c *Cold) Move(ctx context.Context, a netip.Addr, to string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.vips[a]
	if v.node == to {
		return nil
	}
	if err := v.srv.Stop(); err != nil {
		return err
	}
	b := c.net.Machine(v.node).Node()
	// What waits in TIME-WAIT or for a last acknowledgement would answer when the address returns.
	if out, err := b.Run(ctx, "ss", "-K", "-a", "-n", "-t", "src", a.String()); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	if err := b.DelAddr("eth0", v.prefix); err != nil {
		return err
	}
	return c.start(ctx, a, v, to)
}

// Kill cuts the power of the machine.
func (c *Cold) Kill(_ context.Context, node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.net.Machine(node).Off()
	for _, v := range c.vips {
		if v.node == node && v.srv != nil {
			err = errors.Join(err, v.srv.Kill9())
			v.srv = nil
		}
	}
	return err
}

// TakeOver starts the server of a dead machine elsewhere.
func (c *Cold) TakeOver(ctx context.Context, a netip.Addr, to string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.vips[a]
	if v.srv != nil {
		return nil
	}
	return c.start(ctx, a, v, to)
}

// Restart gives the machine power. Addresses that nobody has taken over come back with it.
func (c *Cold) Restart(ctx context.Context, node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.net.Machine(node).On(); err != nil {
		return err
	}
	for a, v := range c.vips {
		if v.node == node && v.srv == nil {
			if err := c.start(ctx, a, v, node); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Cold) signal(node string, sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.vips {
		if v.node == node && v.srv != nil {
			if err := syscall.Kill(v.srv.Pid(), sig); err != nil {
				return err
			}
		}
	}
	return nil
}

// Freeze stops the servers of the node.
func (c *Cold) Freeze(node string) error { return c.signal(node, syscall.SIGSTOP) }

// Thaw lets them go on.
func (c *Cold) Thaw(node string) error { return c.signal(node, syscall.SIGCONT) }

// Cut pulls the machine's cable.
func (c *Cold) Cut(node string) error { return c.net.Machine(node).Cut() }

// Mend plugs it in.
func (c *Cold) Mend(node string) error { return c.net.Machine(node).Mend() }

// Stop stops the servers and checks their stores.
func (c *Cold) Stop(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, v := range c.vips {
		if v.srv == nil {
			continue
		}
		if err := v.srv.Stop(); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, v.srv.Check(ctx))
		v.srv = nil
	}
	return errors.Join(errs...)
}

// Log returns the ends of the servers' logs.
func (c *Cold) Log() (s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for a, v := range c.vips {
		if v.srv != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			locks, err := c.net.Machine(v.node).Node().Run(ctx, v.srv.Bin(), "locks", "--config", v.srv.ConfigFile())
			cancel()
			s += fmt.Sprintf("--- %v at %s\n%s\nlocks: %v\n%s\n", a, v.node, v.srv.Log(), err, locks)
		}
	}
	return s
}
