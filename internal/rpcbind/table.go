// Package rpcbind answers portmap version 2 and rpcbind versions 3 and 4
// (RFC 1833) from a table, registers services with the system's rpcbind, and
// asks a host's rpcbind for ports.
//
// The server never forwards calls (CALLIT, BCAST, INDIRECT): those only help
// attackers. Addresses it answers with are the ones that the question came
// to, so that a client of a floating address stays with that address.
package rpcbind

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Program is the RPC program number of rpcbind and portmap.
const Program = 100000

// Versions of the program.
const (
	VersPortmap = 2
	Vers3       = 3
	Vers4       = 4
)

// Network ids (RFC 5665 section 5.1).
const (
	TCP  = "tcp"
	UDP  = "udp"
	TCP6 = "tcp6"
	UDP6 = "udp6"
)

// Bounds of what others may put into the table.
const (
	maxEntries = 256 // so that DUMP fits into one datagram
	maxNetid   = 64
	maxAddr    = 256
	maxOwner   = 128
)

// ownerBaton owns the entries that Set makes; no call can remove them.
const ownerBaton = "baton"

// Mapping says where a program's version is served on a network.
type Mapping struct {
	Prog, Vers uint32
	Netid      string
	// Host is the address served, invalid for every address of this server.
	Host  netip.Addr
	Port  uint16
	Owner string
}

// Mappings lists a program's versions on the networks of addrs' families: on
// TCP if tcp is not 0, on UDP if udp is not 0, on every address.
func Mappings(prog uint32, versions []uint32, addrs []netip.Addr, tcp, udp uint16) []Mapping {
	var ms []Mapping
	for _, six := range []bool{false, true} {
		if !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Unmap().Is6() == six }) {
			continue
		}
		for _, v := range versions {
			for _, n := range []struct {
				netid string
				port  uint16
			}{{TCP, tcp}, {UDP, udp}} {
				if n.port == 0 {
					continue
				}
				if six {
					n.netid += "6"
				}
				ms = append(ms, Mapping{Prog: prog, Vers: v, Netid: n.netid, Port: n.port})
			}
		}
	}
	return ms
}

// uaddr is the mapping's universal address with local instead of a wildcard;
// "" if local is of another family.
func (m *Mapping) uaddr(local netip.Addr) string {
	h := m.Host
	if !h.IsValid() {
		if local = local.Unmap(); local.Is6() != is6(m.Netid) {
			return ""
		}
		h = local
	}
	return FormatUaddr(netip.AddrPortFrom(h, m.Port))
}

// listed is the universal address as DUMP shows it: wildcards stay.
func (m *Mapping) listed() string {
	h := m.Host
	if !h.IsValid() {
		if h = netip.IPv4Unspecified(); is6(m.Netid) {
			h = netip.IPv6Unspecified()
		}
	}
	return FormatUaddr(netip.AddrPortFrom(h, m.Port))
}

func is6(netid string) bool { return strings.HasSuffix(netid, "6") }

func knownNetid(n string) bool { return n == TCP || n == UDP || n == TCP6 || n == UDP6 }

// FormatUaddr writes an address as a universal address (RFC 5665 section
// 5.2.3): the host, then the port's two bytes in decimal, joined by dots.
func FormatUaddr(a netip.AddrPort) string {
	return fmt.Sprintf("%s.%d.%d", a.Addr().Unmap().WithZone(""), a.Port()>>8, a.Port()&0xff)
}

// ParseUaddr reads a universal address.
func ParseUaddr(s string) (netip.AddrPort, error) {
	bad := fmt.Errorf("universal address %.64q: want HOST.P1.P2", s)
	if len(s) > maxAddr {
		return netip.AddrPort{}, bad
	}
	j := strings.LastIndexByte(s, '.')
	if j < 0 {
		return netip.AddrPort{}, bad
	}
	i := strings.LastIndexByte(s[:j], '.')
	if i < 0 {
		return netip.AddrPort{}, bad
	}
	a, err := netip.ParseAddr(s[:i])
	hi, err1 := strconv.ParseUint(s[i+1:j], 10, 8)
	lo, err2 := strconv.ParseUint(s[j+1:], 10, 8)
	if err != nil || err1 != nil || err2 != nil {
		return netip.AddrPort{}, bad
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(hi<<8|lo)), nil
}

// Table is a set of mappings, at most one per program, version and network id.
// It is safe for concurrent use.
type Table struct {
	mu sync.RWMutex
	m  []Mapping // in the order of registration
}

// Set adds one of this server's own mappings and replaces what was there.
func (t *Table) Set(m Mapping) {
	m.Owner = ownerBaton
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m = slices.DeleteFunc(t.m, func(x Mapping) bool { return x.Prog == m.Prog && x.Vers == m.Vers && x.Netid == m.Netid })
	t.m = append(t.m, m)
}

// Unset removes all own mappings of a program.
func (t *Table) Unset(prog uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m = slices.DeleteFunc(t.m, func(x Mapping) bool { return x.Prog == prog && x.Owner == ownerBaton })
}

// List returns all mappings in the order of their registration.
func (t *Table) List() []Mapping {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Clone(t.m)
}

// add is SET of a caller: true if the mapping is in the table afterwards.
func (t *Table) add(m Mapping) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range t.m {
		if x.Prog == m.Prog && x.Vers == m.Vers && x.Netid == m.Netid {
			return x.Host == m.Host && x.Port == m.Port
		}
	}
	if len(t.m) >= maxEntries {
		return false
	}
	t.m = append(t.m, m)
	return true
}

// remove is UNSET of a caller; an empty netid means all. Own mappings stay.
func (t *Table) remove(prog, vers uint32, match func(netid string) bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.m)
	t.m = slices.DeleteFunc(t.m, func(x Mapping) bool {
		return x.Prog == prog && x.Vers == vers && match(x.Netid) && x.Owner != ownerBaton
	})
	return len(t.m) < n
}

// find returns the mapping of exactly this version, or, unless exact is set,
// of the program's highest version (RFC 1833 section 2.2.1: the caller learns
// the right versions from PROG_MISMATCH).
func (t *Table) find(prog, vers uint32, netid string, exact bool) (Mapping, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	best := -1
	for i := range t.m {
		x := &t.m[i]
		if x.Prog != prog || x.Netid != netid {
			continue
		}
		if x.Vers == vers {
			return *x, true
		}
		if !exact && (best < 0 || x.Vers > t.m[best].Vers) {
			best = i
		}
	}
	if best < 0 {
		return Mapping{}, false
	}
	return t.m[best], true
}
