// Package vip moves floating service addresses (VIPs) on this machine: it adds
// and removes them, announces them to the network, finds and destroys the
// sockets that are bound to them, and wakes clients up whose connections were
// made with another machine. It knows nothing of NFS and decides nothing.
package vip

import (
	"context"
	"errors"
	"net/netip"
)

// Address is a floating address with its place.
type Address struct {
	// Prefix is the address itself with the length of its network's prefix.
	Prefix netip.Prefix
	// Interface has it, or is to have it. Empty: the interface that has an address
	// of the same network.
	Interface string
}

// Conn names a TCP connection from the machine's side.
type Conn struct {
	Local  netip.AddrPort
	Remote netip.AddrPort
}

// Socket is a socket bound to an address.
type Socket struct {
	Conn
	Network string // "tcp" or "udp"
	State   string // of TCP, as ss(8) writes it: "ESTAB", "FIN-WAIT-1", "TIME-WAIT", "LISTEN", ...
}

// ErrUnable is in errors of Net.Add that say what Check says, too: the kernel was not
// asked to add the address.
var ErrUnable = errors.New("vip: the machine cannot have the address")

// Net is what package vip does to the machine's network. Its methods are safe for
// concurrent use; each names address and remedy in its errors. viptest has one
// without a kernel.
type Net interface {
	// Has tells whether the machine has the address, on whatever interface.
	Has(addr netip.Addr) (bool, error)
	// Check tells, without changing anything, why Add could not give the machine the
	// address now: no such interface, or one that is down. Add may still fail when it
	// returns nil.
	Check(a Address) error
	// Add gives the address to the interface (IPv6 without duplicate address
	// detection), and returns when the kernel delivers what arrives for it. An
	// address that is there already is no error.
	Add(ctx context.Context, a Address) error
	// Remove takes the address away; one that is not there is no error.
	Remove(ctx context.Context, a Address) error
	// Announce tells the network where the address is now: gratuitous ARP request
	// and reply (RFC 5227), or an unsolicited neighbour advertisement (RFC 4861
	// section 7.2.6). Its socket stays open until Close.
	Announce(a Address) error
	// Sockets lists the sockets bound to the address: TCP in any state, TIME-WAIT
	// too, and UDP; listeners included.
	Sockets(addr netip.Addr) ([]Socket, error)
	// Destroy destroys the address's TCP sockets except listeners, until none is
	// left or ctx ends, and returns how many there were. While the machine has the
	// address peers get a reset.
	Destroy(ctx context.Context, addr netip.Addr) (int, error)
	// Tickle sends a segment for each connection that its client answers with its
	// sequence numbers, upon which this machine's kernel, which does not know the
	// connection, resets it exactly: the client reconnects at once. It is sent
	// after Announce. All Local addresses are a's.
	Tickle(a Address, conns []Conn) error
	// Added lists the addresses that Add has given to the machine, by this or an
	// earlier process, and that are still there.
	Added() ([]Address, error)
	// Close releases the sockets that are kept open. Addresses stay.
	Close() error
}
