package bed

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Socket is a socket of a node, as /proc/net shows it.
type Socket struct {
	Network       string // "tcp" or "udp"
	State         string // of TCP, as ss(8) writes it; "UNCONN" of an unconnected UDP socket
	Local, Remote netip.AddrPort
}

func (s Socket) String() string {
	return fmt.Sprintf("%s %s %v %v", s.Network, s.State, s.Local, s.Remote)
}

// Listening tells whether the socket has no peer: nobody hangs on it.
func (s Socket) Listening() bool { return s.State == "LISTEN" || s.State == "UNCONN" }

var tcpStates = []string{1: "ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT", "UNCONN", "CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "SYN-RECV"}

// Sockets lists the sockets in the node's network that are bound to the address:
// TCP in all states, and UDP.
func (n *Node) Sockets(addr netip.Addr) (all []Socket, err error) {
	err = n.Do(func() error {
		for _, name := range []string{"tcp", "tcp6", "udp", "udp6"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/net/%s", unix.Gettid(), name))
			if os.IsNotExist(err) && strings.HasSuffix(name, "6") {
				continue
			}
			if err != nil {
				return fmt.Errorf("bed: sockets of %s: %w", n.name, err)
			}
			ss, err := parseSockets(name[:3], b)
			if err != nil {
				return fmt.Errorf("bed: /proc/net/%s: %w", name, err)
			}
			for _, s := range ss {
				if s.Local.Addr() == addr {
					all = append(all, s)
				}
			}
		}
		return nil
	})
	return all, err
}

// parseSockets reads what a file of /proc/net says.
func parseSockets(network string, b []byte) (all []Socket, err error) {
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 4 || f[0] == "sl" {
			continue
		}
		s := Socket{Network: network}
		if s.Local, err = hexAddr(f[1]); err != nil {
			return nil, err
		}
		if s.Remote, err = hexAddr(f[2]); err != nil {
			return nil, err
		}
		st, err := strconv.ParseUint(f[3], 16, 8)
		if err != nil || st == 0 || int(st) >= len(tcpStates) {
			return nil, fmt.Errorf("state %q", f[3])
		}
		s.State = tcpStates[st]
		all = append(all, s)
	}
	return all, sc.Err()
}

// hexAddr reads "0100007F:0016": 32-bit words in the machine's order (little
// endian), then the port.
func hexAddr(s string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	if !ok || err != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, fmt.Errorf("address %q", s)
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	p, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port %q", s)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), nil
}

// Has tells whether an interface of the node has the address.
func (n *Node) Has(addr netip.Addr) (has bool, err error) {
	err = n.Do(func() error {
		as, err := net.InterfaceAddrs()
		if err != nil {
			return fmt.Errorf("bed: addresses of %s: %w", n.name, err)
		}
		for _, a := range as {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == addr {
				has = true
			}
		}
		return nil
	})
	return has, err
}

// Announce tells the network of the interface, by a gratuitous ARP request and
// reply, that the IPv4 address is here now.
func (n *Node) Announce(dev string, addr netip.Addr) error {
	return n.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return fmt.Errorf("bed: announce: %w", err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("bed: announce: %w", err)
		}
		defer unix.Close(fd)
		ip := addr.As4()
		for op := byte(1); op <= 2; op++ {
			f := slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ifi.HardwareAddr, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, op},
				ifi.HardwareAddr, ip[:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ip[:])
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
				return fmt.Errorf("bed: announce: %w", err)
			}
		}
		return nil
	})
}
