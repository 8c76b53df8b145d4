package rig

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// CTDB is Ganesha on all machines with addresses that CTDB assigns. CTDB resets the
// connections of an address that it takes away, and wakes those up that it knows when it
// has given the address to another machine; it learns of them when it monitors, every 15 s.
type CTDB struct {
	peers
	// Tuned notices a dead node after about 4 s; the default is 25 to 30 s.
	Tuned bool
}

// NewCTDB makes the service; the error wraps bed.ErrUnavailable if packages are missing.
func NewCTDB(n *Net, dir string, tuned bool, vips ...netip.Addr) (*CTDB, error) {
	if _, err := bed.LookPath("ctdbd"); err != nil {
		return nil, fmt.Errorf("rig: package ctdb: %w", err)
	}
	return &CTDB{peers{net: n, dir: dir, vips: vips, nodes: map[string]*peerNode{}}, tuned}, nil
}

// Name tells how fast CTDB notices a dead node.
func (c *CTDB) Name() string {
	if c.Tuned {
		return "ganesha + CTDB (KeepaliveInterval 1, KeepaliveLimit 3)"
	}
	return "ganesha + CTDB (defaults)"
}

// ctdbScript tells CTDB of the connections to NFS, as its script for the kernel's server
// does. It also resets those of an address that is about to be taken away: CTDB's own
// way of doing that does not find sockets that have IPv4 addresses inside IPv6 ones, as
// Ganesha's do.
const ctdbScript = `#!/bin/sh
[ -n "$CTDB_BASE" ] || CTDB_BASE=/etc/ctdb
. "${CTDB_BASE}/functions"
case "$1" in
releaseip) ss -K -n -t src "$3" >/dev/null ;;
monitor) update_tickles 2049 ;;
esac
exit 0
`

func (c *CTDB) start(ctx context.Context, m *Machine) error {
	n, err := c.startGanesha(ctx, m)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.dir, m.Name)
	etc := filepath.Join(dir, "etc-ctdb")
	var nodes, public strings.Builder
	for _, x := range c.net.Machines {
		fmt.Fprintln(&nodes, x.Addr)
	}
	for _, a := range c.vips {
		fmt.Fprintf(&public, "%v/%d eth0\n", a, Bits)
	}
	// An order to move an address is not undone.
	tunables := "NoIPFailback=1\n"
	if c.Tuned {
		tunables += "KeepaliveInterval=1\nKeepaliveLimit=3\n"
	}
	// The daemon's directories are the machine's own.
	setup := fmt.Sprintf(`set -e
rm -rf %[1]s; cp -a /etc/ctdb %[1]s
mkdir -p %[1]s/events/legacy /run/ctdb
for s in 00.ctdb 01.reclock 10.interface; do ln -sf /usr/share/ctdb/events/legacy/$s.script %[1]s/events/legacy/$s.script; done
mount --bind %[1]s /etc/ctdb
mount -t tmpfs tmpfs /var/lib/ctdb
mkdir -p /var/lib/ctdb/volatile /var/lib/ctdb/persistent /var/lib/ctdb/state`, etc)
	if out, err := m.Node().Run(ctx, "sh", "-c", setup); err != nil {
		return fmt.Errorf("rig: ctdb: %w\n%s", err, out)
	}
	for name, text := range map[string]string{
		"ctdb.conf": fmt.Sprintf("[logging]\nlog level = NOTICE\n[cluster]\nrecovery lock = %s\n[legacy]\nrealtime scheduling = false\n",
			filepath.Join(c.dir, "reclock")),
		"nodes":                           nodes.String(),
		"public_addresses":                public.String(),
		"ctdb.tunables":                   tunables,
		"events/legacy/09.ganesha.script": ctdbScript,
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	log, err := os.OpenFile(filepath.Join(dir, "ctdb.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := bed.Command("ctdbd", "-i")
	cmd.Stdout, cmd.Stderr = log, log
	if n.proc, err = m.Node().Spawn(cmd); err != nil {
		return err
	}
	c.mu.Lock()
	c.nodes[m.Name] = n
	c.mu.Unlock()
	return nil
}

// healthy waits until CTDB says that the node takes part.
func (c *CTDB) healthy(ctx context.Context, m *Machine) error {
	for {
		out, err := m.Node().Run(ctx, "ctdb", "nodestatus")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("rig: ctdb on %s does not get healthy: %w\n%s\n%s", m.Name, err, out, c.Log())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Start starts everything; address i is at machine i first.
func (c *CTDB) Start(ctx context.Context) error {
	for _, m := range c.net.Machines {
		if err := c.start(ctx, m); err != nil {
			return err
		}
	}
	for _, m := range c.net.Machines {
		if err := c.healthy(ctx, m); err != nil {
			return err
		}
	}
	for i, a := range c.vips {
		if err := c.until(ctx, a, func(string) bool { return true }); err != nil {
			return err
		}
		if err := c.Move(ctx, a, c.net.Machines[i%len(c.net.Machines)].Name); err != nil {
			return err
		}
	}
	return nil
}

// Move orders CTDB to move the address, and waits until it has.
func (c *CTDB) Move(ctx context.Context, a netip.Addr, to string) error {
	m := c.net.Machine(to)
	if c.Owner(a) != to {
		if out, err := m.Node().Run(ctx, "ctdb", "moveip", a.String(), fmt.Sprint(m.i)); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
	}
	return c.until(ctx, a, func(node string) bool { return node == to })
}

// TakeOver waits until CTDB has given the address to somebody.
func (c *CTDB) TakeOver(ctx context.Context, a netip.Addr, _ string) error {
	return c.until(ctx, a, func(string) bool { return true })
}

// Restart gives the node power and starts everything there.
func (c *CTDB) Restart(ctx context.Context, node string) error {
	m := c.net.Machine(node)
	if err := m.On(); err != nil {
		return err
	}
	if err := c.start(ctx, m); err != nil {
		return err
	}
	return c.healthy(ctx, m)
}
