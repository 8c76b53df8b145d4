// Package rig is the bed of everything that is about floating addresses: nodes on a
// bridge, each a machine of its own that can lose its power or its cable, servers
// of several kinds between which an address moves, real kernel clients that log
// every operation, and a watch that looks at all nodes meanwhile.
package rig

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/baton-nfs/baton/tests/bed"
)

// Bits is the length of the network's prefix with IPv4.
const Bits = 24

// Six is the address of the same machine, guest or service with IPv6.
func Six(a netip.Addr) netip.Addr {
	b := netip.MustParseAddr("fd77::").As16()
	b[15] = a.As4()[3]
	return netip.AddrFrom16(b)
}

// Prefix is an address with the length of its network's prefix.
func Prefix(a netip.Addr) netip.Prefix {
	if a.Is6() {
		return netip.PrefixFrom(a, 64)
	}
	return netip.PrefixFrom(a, Bits)
}

// HubAddr is the address of the hub, where guests and load generators run.
var HubAddr = netip.MustParseAddr("10.77.0.1")

// VIP is the floating address number i, from 0.
func VIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, byte(101 + i)}) }

// Taps is how many guests there can be.
const Taps = 5

// GuestAddr is the address of guest number i, from 0.
func GuestAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, 0, byte(11 + i)}) }

// Net is a bridge and the machines around it.
type Net struct {
	Hub      *bed.Node
	Machines []*Machine
}

// Machine is a node on the bridge. It is replaced by a new one when its power comes
// back: nothing of a kernel survives that.
type Machine struct {
	Name string
	Addr netip.Addr

	hub *bed.Node
	i   int

	mu     sync.Mutex
	node   *bed.Node // nil without power
	cut    bool
	frozen bool
}

// NewNet makes a network with a machine for each name.
func NewNet(names ...string) (_ *Net, err error) {
	n := &Net{}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.Hub, err = bed.NewNode("hub"); err != nil {
		return nil, err
	}
	if err := n.Hub.AddBridge("br0", Prefix(HubAddr)); err != nil {
		return nil, err
	}
	if err := addSix(n.Hub, "br0", HubAddr); err != nil {
		return nil, err
	}
	for i := range Taps {
		if err := n.Hub.AddTap(fmt.Sprint("tap", i), "br0"); err != nil {
			return nil, err
		}
	}
	for i, name := range names {
		m := &Machine{Name: name, Addr: netip.AddrFrom4([4]byte{10, 77, 0, byte(2 + i)}), hub: n.Hub, i: i}
		n.Machines = append(n.Machines, m)
		if err := m.On(); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// addSix gives an interface its IPv6 address besides.
func addSix(b *bed.Node, dev string, a netip.Addr) error {
	six := Prefix(Six(a))
	if err := b.AddAddr(dev, six); err != nil {
		return err
	}
	return b.Retransmit(dev, six)
}

// Close ends everything that runs on the network.
func (n *Net) Close() {
	for _, m := range n.Machines {
		if b := m.Node(); b != nil {
			b.Close()
		}
	}
	if n.Hub != nil {
		n.Hub.Close()
	}
}

// Machine returns the machine with that name, or nil.
func (n *Net) Machine(name string) *Machine {
	for _, m := range n.Machines {
		if m.Name == name {
			return m
		}
	}
	return nil
}

func (m *Machine) port() string { return "p-" + m.Name }

// MAC is the hardware address of the machine's eth0, the same after each start.
func (m *Machine) MAC() string { return fmt.Sprintf("02:77:00:00:00:%02x", 2+m.i) }

// Node is the machine as it is now; nil without power.
func (m *Machine) Node() *bed.Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.node
}

// On gives the machine power: a node with its own address and nothing else.
func (m *Machine) On() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.node != nil {
		return fmt.Errorf("rig: %s has power", m.Name)
	}
	b, err := bed.NewNode(m.Name)
	if err != nil {
		return err
	}
	addr := Prefix(m.Addr)
	if err := b.Plug(m.hub, "br0", m.port(), "eth0", addr); err != nil {
		b.Close()
		return err
	}
	m.node, m.cut, m.frozen = b, false, false
	if err := b.SetMAC("eth0", m.MAC()); err != nil {
		return err
	}
	if err := b.Retransmit("eth0", addr); err != nil {
		return err
	}
	return addSix(b, "eth0", m.Addr)
}

// Off is a power cut: the cable goes dead first, so that nobody's kernel says
// goodbye, and then everything is gone.
func (m *Machine) Off() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.node == nil {
		return nil
	}
	err := m.hub.DelLink(m.port())
	m.node.Close()
	m.node = nil
	return err
}

// Cut pulls the machine's cable.
func (m *Machine) Cut() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut = true
	return m.hub.SetLink(m.port(), false)
}

// Mend plugs it in again.
func (m *Machine) Mend() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut = false
	return m.hub.SetLink(m.port(), true)
}

// SetFrozen notes that the machine's processes stand still, or go on.
func (m *Machine) SetFrozen(frozen bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frozen = frozen
}

// Frozen tells whether they stand still.
func (m *Machine) Frozen() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.frozen
}

// IsCut tells whether the cable is pulled.
func (m *Machine) IsCut() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cut
}
