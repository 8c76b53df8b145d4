package vip

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrTimeWait is wrapped by Destroy's error when all that is left is in TIME-WAIT
// and the kernel is too old to destroy such sockets. They end by themselves after
// 60 s, and give way to a client that connects anew.
var ErrTimeWait = errors.New("this kernel cannot destroy sockets in TIME-WAIT")

// Sizes and constants of linux/inet_diag.h.
const (
	diagReqSize = 56 // struct inet_diag_req_v2
	diagMsgSize = 72 // struct inet_diag_msg
	diagIDSize  = 48 // struct inet_diag_sockid

	diagBytecode = 1 // INET_DIAG_REQ_BYTECODE
	diagSrcCond  = 7 // INET_DIAG_BC_S_COND
)

// States of linux/tcp_states.h, as ss(8) writes them.
var states = [...]string{
	1: "ESTAB", 2: "SYN-SENT", 3: "SYN-RECV", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 6: "TIME-WAIT", 7: "UNCONN",
	8: "CLOSE-WAIT", 9: "LAST-ACK", 10: "LISTEN", 11: "CLOSING", 12: "SYN-RECV",
}

const (
	stateTimeWait = 6
	stateListen   = 10
	// allStates leaves out BOUND_INACTIVE (13): sockets that are bound and nothing
	// else. They take no segments.
	allStates = 1<<13 - 2
)

// diagSocket is a socket as inet_diag tells it.
type diagSocket struct {
	Conn
	family, state uint8
	id            [diagIDSize]byte
}

// parseDiag decodes struct inet_diag_msg. IPv4 addresses of IPv6 sockets come out as IPv4.
func parseDiag(b []byte) (diagSocket, bool) {
	if len(b) < diagMsgSize {
		return diagSocket{}, false
	}
	d := diagSocket{family: b[0], state: b[1], id: [diagIDSize]byte(b[4:])}
	addr := func(b []byte) netip.Addr {
		if d.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b))
		}
		return netip.AddrFrom16([16]byte(b)).Unmap()
	}
	d.Local = netip.AddrPortFrom(addr(d.id[4:20]), binary.BigEndian.Uint16(d.id[0:]))
	d.Remote = netip.AddrPortFrom(addr(d.id[20:36]), binary.BigEndian.Uint16(d.id[2:]))
	return d, true
}

func (d *diagSocket) stateName() string {
	if int(d.state) < len(states) && states[d.state] != "" {
		return states[d.state]
	}
	return fmt.Sprint("state-", d.state)
}

func diagRequest(family, protocol uint8, mask uint32) []byte {
	b := make([]byte, diagReqSize)
	b[0], b[1] = family, protocol
	nl.NativeEndian().PutUint32(b[4:], mask)
	return b
}

// sourceFilter is the bytecode "the source address is ip"; it matches mapped
// addresses of IPv6 sockets, too.
func sourceFilter(ip netip.Addr) []byte {
	a := ip.AsSlice()
	n := 4 + 8 + len(a)
	b := make([]byte, 12, n)
	b[0], b[1] = diagSrcCond, byte(n)
	nl.NativeEndian().PutUint16(b[2:], uint16(n+4)) // no match: jump beyond the end
	b[4] = unix.AF_INET
	if ip.Is6() {
		b[4] = unix.AF_INET6
	}
	b[5] = byte(ip.BitLen())
	nl.NativeEndian().PutUint32(b[8:], 0xffffffff) // any port
	return append(b, a...)
}

// list lists the sockets of a protocol that are bound to the address.
func (k *Kernel) list(protocol uint8, ip netip.Addr) ([]diagSocket, error) {
	var out []diagSocket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if family == unix.AF_INET && ip.Is6() {
			continue
		}
		msgs, err := ask(&k.diag, unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP,
			diagRequest(family, protocol, allStates), nl.NewRtAttr(diagBytecode, sourceFilter(ip)).Serialize())
		if errors.Is(err, unix.ENOENT) && family == unix.AF_INET6 && ip.Is4() {
			continue // no IPv6 at all
		}
		if err != nil {
			name := "CONFIG_INET_TCP_DIAG (module tcp_diag)"
			if protocol == unix.IPPROTO_UDP {
				name = "CONFIG_INET_UDP_DIAG (module udp_diag)"
			}
			return nil, fmt.Errorf("vip: list the sockets of %s: %w: the kernel needs %s", ip, err, name)
		}
		for _, m := range msgs {
			if d, ok := parseDiag(m); ok && d.Local.Addr() == ip {
				out = append(out, d)
			}
		}
	}
	return out, nil
}

// Sockets implements Net. Sockets that are bound and neither listen nor are
// connected are left out for TCP. A UDP socket is UNCONN, or ESTAB if connected.
func (k *Kernel) Sockets(addr netip.Addr) ([]Socket, error) {
	end, err := k.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	addr = addr.Unmap().WithZone("")
	var out []Socket
	for _, p := range []struct {
		protocol uint8
		name     string
	}{{unix.IPPROTO_TCP, "tcp"}, {unix.IPPROTO_UDP, "udp"}} {
		ds, err := k.list(p.protocol, addr)
		if err != nil {
			return nil, err
		}
		for _, d := range ds {
			out = append(out, Socket{Conn: d.Conn, Network: p.name, State: d.stateName()})
		}
	}
	return out, nil
}

// Destroy implements Net. Orphans (closed, waiting for their peers) of kernels
// before 6.11 resist, and so do sockets in TIME-WAIT of some (ErrTimeWait).
func (k *Kernel) Destroy(ctx context.Context, addr netip.Addr) (int, error) {
	end, err := k.begin()
	if err != nil {
		return 0, err
	}
	defer end()
	addr = addr.Unmap().WithZone("")
	seen := map[[diagIDSize]byte]struct{}{}
	for wait := time.Duration(0); ; wait = min(wait+200*time.Microsecond, 5*time.Millisecond) {
		ds, err := k.list(unix.IPPROTO_TCP, addr)
		if err != nil {
			return len(seen), err
		}
		left, stuck := 0, 0
		for _, d := range ds {
			if d.state == stateListen {
				continue
			}
			left++
			seen[d.id] = struct{}{}
			err := k.kill(&d)
			switch {
			case errors.Is(err, unix.EOPNOTSUPP) && d.state == stateTimeWait:
				stuck++
			case errors.Is(err, unix.EOPNOTSUPP):
				return len(seen), fmt.Errorf("vip: destroy a socket of %s (%s): %w: the kernel needs CONFIG_INET_DIAG_DESTROY", addr, d.stateName(), err)
			case errors.Is(err, unix.EPERM):
				return len(seen), fmt.Errorf("vip: destroy a socket of %s: %w: the process needs CAP_NET_ADMIN (run it as root, or AmbientCapabilities=CAP_NET_ADMIN)", addr, err)
			case err != nil && !errors.Is(err, unix.ENOENT):
				return len(seen), fmt.Errorf("vip: destroy a socket of %s (%s): %w", addr, d.stateName(), err)
			}
		}
		switch {
		case left == 0:
			return len(seen), nil
		case left == stuck:
			return len(seen), fmt.Errorf("vip: %d sockets of %s stay for up to 60 s: %w", stuck, addr, ErrTimeWait)
		}
		// The first look after destroying something is at once: usually it is the last.
		if wait == 0 {
			continue
		}
		select {
		case <-ctx.Done():
			of := addr.String()
			if addr.Is6() {
				of = "[" + of + "]" // ss wants it so
			}
			return len(seen), fmt.Errorf("vip: %d sockets of %s are still there (ss -tan src %s): %w", left, addr, of, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// destroy has the kernel destroy one socket; ENOENT: it is gone already.
func (k *Kernel) destroy(d *diagSocket) error {
	b := diagRequest(d.family, unix.IPPROTO_TCP, allStates)
	copy(b[8:], d.id[:])
	_, err := ask(&k.diag, unix.NETLINK_INET_DIAG, unix.SOCK_DESTROY, unix.NLM_F_ACK, b)
	return err
}
