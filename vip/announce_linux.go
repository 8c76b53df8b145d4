package vip

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Announce implements Net. An interface that resolves no addresses (loopback,
// tunnels) needs no announcement, and one that is no Ethernet gets an error.
func (k *Kernel) Announce(a Address) error {
	end, err := k.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := check(a); err != nil {
		return err
	}
	ip := a.Prefix.Addr()
	l, _, err := k.place(a)
	switch {
	case err != nil:
		return err
	case l.quiet:
		return nil
	case !l.ether || len(l.mac) != 6:
		return fmt.Errorf("vip: announce %s: interface %s is no Ethernet: the network must be told otherwise", ip, l.name)
	case k.packet.err != nil:
		return fmt.Errorf("vip: announce %s: %w", ip, k.packet.err)
	}
	frames := [][]byte{naFrame([6]byte(l.mac), ip)}
	if ip.Is4() {
		frames = [][]byte{arpFrame(1, [6]byte(l.mac), ip), arpFrame(2, [6]byte(l.mac), ip)}
	}
	for _, f := range frames {
		to := &unix.SockaddrLinklayer{Protocol: uint16(f[13])<<8 | uint16(f[12]), Ifindex: l.index, Halen: 6}
		copy(to.Addr[:], f[:6])
		if err := k.send(k.packet.fd, f, nil, to); err != nil {
			return fmt.Errorf("vip: announce %s on %s: %w", ip, l.name, err)
		}
	}
	return nil
}

// send sends one packet, and waits a little when the kernel has no room for it.
func (k *Kernel) send(fd int, b, oob []byte, to unix.Sockaddr) error {
	for try := 0; ; try++ {
		_, err := unix.SendmsgN(fd, b, oob, to, 0)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) || try == 20 {
			return err
		}
		k.pause(time.Millisecond)
	}
}

// Segments of Tickle leave in groups of tickleGroup, one every ticklePause: 500
// need 4 ms, also on a machine where every pause takes longer than it should, which
// is so when the first clients are back and want the processors. The answers, and
// what clients do next, come at the same rate; a group to one client is less than
// what the kernel keeps while it looks for the neighbour.
const (
	tickleGroup = 128
	ticklePause = time.Millisecond
)

// Tickle implements Net. It sends to every client once before it sends to one
// again, so that neighbours are being resolved before much is queued for them. It
// goes on after errors and returns the first one.
func (k *Kernel) Tickle(a Address, conns []Conn) error {
	end, err := k.begin()
	if err != nil {
		return err
	}
	defer end()
	if err := check(a); err != nil {
		return err
	}
	ip := a.Prefix.Addr()
	failed := 0
	var first error
	l, _, err := k.place(a)
	if err != nil {
		return err
	}
	start := k.now()
	for i, c := range inTurns(conns) {
		if i > 0 && i%tickleGroup == 0 {
			if early := time.Duration(i/tickleGroup)*ticklePause - k.now().Sub(start); early > 0 {
				k.pause(early)
			}
		}
		if err := k.tickle(ip, l.index, c); err != nil {
			if failed++; first == nil {
				first = err
			}
		}
	}
	if first != nil {
		return fmt.Errorf("vip: tickle %d of %d connections of %s: %w: these clients reconnect when their own time-outs end", failed, len(conns), ip, first)
	}
	return nil
}

func (k *Kernel) tickle(ip netip.Addr, index int, c Conn) error {
	c = Conn{
		Local:  netip.AddrPortFrom(c.Local.Addr().Unmap(), c.Local.Port()),
		Remote: netip.AddrPortFrom(c.Remote.Addr().Unmap(), c.Remote.Port()),
	}
	r := c.Remote.Addr()
	if c.Local.Addr() != ip || r.Is4() != ip.Is4() || !r.IsValid() {
		return fmt.Errorf("%s to %s is no connection of the address", c.Local, c.Remote)
	}
	if ip.Is4() {
		if k.raw4.err != nil {
			return k.raw4.err
		}
		// The source decides about the route where there is policy routing.
		oob := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: ip.As4()})
		return k.send(k.raw4.fd, tickle(c), oob, &unix.SockaddrInet4{Addr: r.As4()})
	}
	if k.raw6.err != nil {
		return k.raw6.err
	}
	info := &unix.Inet6Pktinfo{Addr: ip.As16()}
	to := &unix.SockaddrInet6{Addr: r.As16()}
	if r.IsLinkLocalUnicast() {
		info.Ifindex, to.ZoneId = uint32(index), uint32(index)
	}
	return k.send(k.raw6.fd, tickle(c), unix.PktInfo6(info), to)
}

// inTurns orders connections so that each client has one before any has its next.
func inTurns(conns []Conn) []Conn {
	turns := map[netip.Addr]int{}
	var rounds [][]Conn
	for _, c := range conns {
		n := turns[c.Remote.Addr()]
		turns[c.Remote.Addr()]++
		if n == len(rounds) {
			rounds = append(rounds, nil)
		}
		rounds[n] = append(rounds[n], c)
	}
	out := make([]Conn, 0, len(conns))
	for _, r := range rounds {
		out = append(out, r...)
	}
	return out
}
