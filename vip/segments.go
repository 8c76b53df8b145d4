package vip

import (
	"encoding/binary"
	"net/netip"
)

// Sizes of headers without options.
const (
	etherSize = 14
	arpSize   = 28
	ip4Size   = 20
	ip6Size   = 40
	tcpSize   = 20
	naSize    = 32 // neighbour advertisement with one option
)

var broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// arpFrame is a gratuitous ARP packet in an Ethernet frame (RFC 826, RFC 5227
// section 3): op 1 request, 2 reply. Linux takes a reply for gratuitous only if
// its target's hardware address is the sender's.
func arpFrame(op uint16, mac [6]byte, ip netip.Addr) []byte {
	b := make([]byte, 0, etherSize+arpSize)
	b = append(b, broadcast[:]...)
	b = append(b, mac[:]...)
	b = append(b, 0x08, 0x06)            // ARP
	b = append(b, 0, 1, 8, 0, 6, 4)      // Ethernet, IPv4, sizes of both addresses
	b = append(b, byte(op>>8), byte(op)) // operation
	b = append(b, mac[:]...)
	b = append(b, ip.AsSlice()...)
	if op == 1 {
		b = append(b, make([]byte, 6)...)
	} else {
		b = append(b, mac[:]...)
	}
	return append(b, ip.AsSlice()...)
}

// naFrame is an unsolicited neighbour advertisement to all nodes, with the
// override flag, in an Ethernet frame (RFC 4861 sections 4.4 and 7.2.6).
func naFrame(mac [6]byte, ip netip.Addr) []byte {
	all := netip.MustParseAddr("ff02::1")
	b := make([]byte, 0, etherSize+ip6Size+naSize)
	b = append(b, 0x33, 0x33, 0, 0, 0, 1)
	b = append(b, mac[:]...)
	b = append(b, 0x86, 0xdd) // IPv6
	b = append(b, ip6Header(58, naSize, 255, ip, all)...)
	na := make([]byte, naSize)
	na[0] = 136
	na[4] = 0x20 // override
	copy(na[8:24], ip.AsSlice())
	na[24], na[25] = 2, 1 // target link-layer address, in units of 8 bytes
	copy(na[26:32], mac[:])
	binary.BigEndian.PutUint16(na[2:], checksum(pseudo(58, ip, all, na), na))
	return append(b, na...)
}

func ip6Header(next byte, length int, hops byte, src, dst netip.Addr) []byte {
	b := make([]byte, 8, ip6Size)
	b[0] = 0x60
	binary.BigEndian.PutUint16(b[4:], uint16(length))
	b[6], b[7] = next, hops
	b = append(b, src.AsSlice()...)
	return append(b, dst.AsSlice()...)
}

// tickle is an IP packet with a TCP segment that has ACK set and nothing else:
// sequence and acknowledgment numbers are 0.
func tickle(c Conn) []byte {
	src, dst := c.Local.Addr(), c.Remote.Addr().WithZone("")
	t := make([]byte, tcpSize)
	binary.BigEndian.PutUint16(t[0:], c.Local.Port())
	binary.BigEndian.PutUint16(t[2:], c.Remote.Port())
	t[12] = tcpSize / 4 << 4
	t[13] = 0x10 // ACK
	binary.BigEndian.PutUint16(t[16:], checksum(pseudo(6, src, dst, t), t))
	if src.Is6() {
		return append(ip6Header(6, tcpSize, 64, src, dst), t...)
	}
	b := make([]byte, 12, ip4Size+tcpSize)
	b[0] = 4<<4 | ip4Size/4
	binary.BigEndian.PutUint16(b[2:], ip4Size+tcpSize)
	b[6] = 0x40 // do not fragment
	b[8], b[9] = 64, 6
	b = append(b, src.AsSlice()...)
	b = append(b, dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], checksum(0, b))
	return append(b, t...)
}

// pseudo is the sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
func pseudo(protocol byte, src, dst netip.Addr, payload []byte) uint32 {
	return sum(sum(uint32(protocol)+uint32(len(payload)), src.AsSlice()), dst.AsSlice())
}

// checksum is the Internet checksum of b (RFC 1071); start is added.
func checksum(start uint32, b []byte) uint16 {
	s := sum(start, b)
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// sum adds 16-bit words; b has an even length of at most some hundred bytes.
func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	return s
}
