package bed

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
)

// ip runs one `ip` command in the node's network namespace alone: it must see
// the PIDs that the test sees, to name other nodes by them.
func (n *Node) ip(args string) error {
	cmd := Command("ip", strings.Fields(args)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.Do(cmd.Start); err != nil {
		return fmt.Errorf("bed: ip: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("bed: ip %s: %w: %s", args, err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// AddBridge makes a bridge in the node and, if addr is valid, gives it that
// address. Interface names are at most 15 bytes.
//
// TCP on the bridge retransmits after 5 ms instead of 200 ms: User Mode Linux
// overlooks about one packet in 300 until the next one arrives, which would
// decide how long every serial test takes.
func (n *Node) AddBridge(name string, addr netip.Prefix) error {
	if err := n.ip("link add " + name + " type bridge forward_delay 0"); err != nil {
		return err
	}
	if addr.IsValid() {
		if err := n.AddAddr(name, addr); err != nil {
			return err
		}
	}
	if err := n.ip("link set " + name + " up"); err != nil || !addr.IsValid() {
		return err
	}
	return n.Retransmit(name, addr)
}

// AddAddr adds an address to an interface of the node.
func (n *Node) AddAddr(dev string, addr netip.Prefix) error {
	cmd := fmt.Sprintf("addr add %s dev %s", addr, dev)
	if addr.Addr().Is6() {
		cmd += " nodad"
	}
	return n.ip(cmd)
}

// AddTap makes a persistent tap interface and puts it on the bridge master.
func (n *Node) AddTap(name, master string) error {
	if err := n.ip("tuntap add " + name + " mode tap"); err != nil {
		return err
	}
	if err := n.ip("link set " + name + " master " + master); err != nil {
		return err
	}
	return n.ip("link set " + name + " up")
}

// Plug joins node n to the bridge master of node hub with a veth pair: dev in
// n with address addr, port in hub.
func (n *Node) Plug(hub *Node, master, port, dev string, addr netip.Prefix) error {
	if err := hub.ip(fmt.Sprintf("link add %s type veth peer name %s netns %d", port, dev, n.holder.Process.Pid)); err != nil {
		return err
	}
	if err := hub.ip("link set " + port + " master " + master); err != nil {
		return err
	}
	if err := hub.ip("link set " + port + " up"); err != nil {
		return err
	}
	if err := n.AddAddr(dev, addr); err != nil {
		return err
	}
	return n.ip("link set " + dev + " up")
}

// SetMAC gives an interface of the node a hardware address.
func (n *Node) SetMAC(dev, mac string) error { return n.ip("link set " + dev + " address " + mac) }

// SetLink switches an interface of the node on or off. Off, on the hub's side of a
// Plug, is a pulled cable.
func (n *Node) SetLink(dev string, up bool) error {
	return n.ip("link set " + dev + map[bool]string{true: " up", false: " down"}[up])
}

// DelLink removes an interface of the node, and with it the other end of a Plug.
func (n *Node) DelLink(dev string) error { return n.ip("link del " + dev) }

// DelAddr takes an address from an interface of the node.
func (n *Node) DelAddr(dev string, addr netip.Prefix) error {
	return n.ip(fmt.Sprintf("addr del %s dev %s", addr, dev))
}

// Retransmit makes TCP to the network of an address retransmit after 5 ms, as
// AddBridge does.
func (n *Node) Retransmit(dev string, addr netip.Prefix) error {
	cmd := fmt.Sprintf("route replace %s dev %s src %s rto_min 5ms", addr.Masked(), dev, addr.Addr())
	if addr.Addr().Is6() {
		cmd += " metric 128" // the kernel's own route has 256
	}
	return n.ip(cmd)
}

// Neighbour tells the node for good which hardware address an address has.
func (n *Node) Neighbour(dev string, addr netip.Addr, mac string) error {
	return n.ip(fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev %s", addr, mac, dev))
}
