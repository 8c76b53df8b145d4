package vip_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/vip"
	"golang.org/x/sys/unix"
)

// capture sees what arrives at the client.
type capture struct{ f *os.File }

func (h host) capture(t *testing.T) *capture {
	t.Helper()
	c := &capture{}
	must(t, h.Do(func() error {
		all := uint16(unix.ETH_P_ALL)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all<<8|all>>8))
		if err != nil {
			return err
		}
		c.f = os.NewFile(uintptr(fd), "capture")
		return nil
	}))
	t.Cleanup(func() { c.f.Close() })
	return c
}

// parse decodes source, destination and protocol (6 TCP, 17 UDP) of an IP packet.
func parse(b []byte) (src, dst netip.AddrPort, protocol byte) {
	var s, d netip.Addr
	switch {
	case len(b) >= 24 && b[0]>>4 == 4 && b[0]&15 == 5:
		s, d, protocol = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9]
		b = b[20:]
	case len(b) >= 44 && b[0]>>4 == 6:
		s, d, protocol = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), b[6]
		b = b[40:]
	default:
		return
	}
	return netip.AddrPortFrom(s, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(d, binary.BigEndian.Uint16(b[2:])), protocol
}

// until returns how many TCP segments of the connection arrived before a UDP
// packet from that port.
func (c *capture) until(t *testing.T, conn vip.Conn, port uint16) (n int) {
	t.Helper()
	b := make([]byte, 1<<16)
	must(t, c.f.SetReadDeadline(time.Now().Add(limit)))
	for {
		size, err := c.f.Read(b)
		must(t, err)
		switch src, dst, protocol := parse(b[:size]); {
		case protocol == 17 && src.Port() == port:
			return n
		case protocol == 6 && src == conn.Local && dst == conn.Remote:
			n++
		}
	}
}

// mark sends a UDP packet from the port to the client.
func (w *world) mark(t *testing.T, port int) {
	t.Helper()
	must(t, w.a.Do(func() error {
		c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{Port: port}}).Dial("udp", "10.66.0.3:9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("mark"))
		return err
	}))
}

// 004.18, 004.28 (option): a connection that is closed quietly sends nothing,
// whatever state it is in, and is gone at once; while the address is there, and in
// the order of a move, when it is away already (what an IPv6 socket sends leaves
// even then).
func TestCloseQuietlySendsNothing(t *testing.T) {
	kinds := []struct {
		name    string
		prepare func(t *testing.T, s, c *net.TCPConn)
		settled string // the client's state when it waits for nothing
	}{
		{"idle", func(t *testing.T, s, c *net.TCPConn) {}, "tcp ESTAB"},
		{"unread data", func(t *testing.T, s, c *net.TCPConn) {
			if _, err := c.Write([]byte("unread")); err != nil {
				t.Fatal(err)
			}
			waitReadable(t, s)
		}, "tcp ESTAB"},
		{"unsent data", func(t *testing.T, s, c *net.TCPConn) { fill(t, s) }, "tcp ESTAB"},
		{"linger 0", func(t *testing.T, s, c *net.TCPConn) { must(t, s.SetLinger(0)) }, "tcp ESTAB"},
		{"linger with unsent data", func(t *testing.T, s, c *net.TCPConn) {
			must(t, s.SetLinger(5))
			fill(t, s)
		}, "tcp ESTAB"},
		{"client has closed", func(t *testing.T, s, c *net.TCPConn) {
			must(t, c.CloseWrite())
			if _, err := s.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		}, "tcp FIN-WAIT-2"},
		{"half-closed", func(t *testing.T, s, c *net.TCPConn) {
			must(t, s.CloseWrite())
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		}, "tcp CLOSE-WAIT"},
	}
	each(t, func(t *testing.T, w *world, a vip.Address) {
		addr := a.Prefix.Addr()
		l := w.a.listen(t, addr, 2049)
		for _, k := range kinds {
			for _, away := range []bool{false, true} {
				name := k.name
				if away {
					name += ", address away"
				}
				t.Run(name, func(t *testing.T) {
					w.a.take(t, a)
					got := w.c.capture(t)
					s, c := w.pair(t, l, addr)
					k.prepare(t, s, c)
					rc, err := s.SyscallConn()
					must(t, err)
					if away {
						must(t, w.a.k.Remove(t.Context(), a))
					} else {
						// What the client sends from here on, the kernel resets.
						w.settle(t, c, k.settled)
						w.a.settle(t, s)
					}
					w.mark(t, 7001)
					got.until(t, connOf(s), 7001)
					must(t, vip.CloseQuietly(rc))
					w.a.clean(t, addr)
					if _, err := s.Write([]byte("x")); err == nil {
						t.Error("a connection that was closed quietly can be written to")
					}
					must(t, s.Close())
					// Longer than the timers that the connection had.
					time.Sleep(300 * time.Millisecond)
					w.mark(t, 7002)
					if n := got.until(t, connOf(s), 7002); n != 0 {
						t.Errorf("%d segments left", n)
					}
				})
			}
		}
	})
}

// settle waits until the client's end of a connection is in a state and has
// nothing that was not acknowledged.
func (w *world) settle(t *testing.T, c *net.TCPConn, state string) {
	t.Helper()
	local := connOf(c)
	waitFor(t, "the client's end to settle", func() bool {
		ss, err := w.c.k.Sockets(local.Local.Addr())
		must(t, err)
		for _, s := range ss {
			if s.Conn == local {
				return s.Network+" "+s.State == state && outq(t, c) == 0
			}
		}
		return false
	})
}

// settle waits until the server's end of a connection has got the client's
// acknowledgment of its FIN, if it has sent one.
func (h host) settle(t *testing.T, s *net.TCPConn) {
	t.Helper()
	waitFor(t, "the server's end to settle", func() bool {
		return h.states(t, connOf(s).Local.Addr())["tcp FIN-WAIT-1"] == 0
	})
}

// outq returns how much the peer has not acknowledged.
func outq(t *testing.T, c *net.TCPConn) (n int) {
	t.Helper()
	rc, err := c.SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }))
	must(t, err)
	return n
}

// The capture sees what an ordinary close sends.
func TestCaptureSeesClose(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		addr := a.Prefix.Addr()
		w.a.take(t, a)
		l := w.a.listen(t, addr, 2049)
		got := w.c.capture(t)
		s, _ := w.pair(t, l, addr)
		w.mark(t, 7001)
		got.until(t, connOf(s), 7001)
		must(t, s.Close())
		w.mark(t, 7002)
		if got.until(t, connOf(s), 7002) == 0 {
			t.Error("no FIN was captured")
		}
	})
}

// waitReadable waits until there is something to read, and leaves it there.
func waitReadable(t *testing.T, c *net.TCPConn) {
	t.Helper()
	rc, err := c.SyscallConn()
	must(t, err)
	must(t, rc.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return !errors.Is(err, unix.EAGAIN)
	}))
}

func TestCloseQuietlyErrors(t *testing.T) {
	w := newWorld(t)
	a := families["ipv4"]
	w.a.take(t, a)
	l := w.a.listen(t, a.Prefix.Addr(), 2049)
	raw := func(c syscall.Conn) syscall.RawConn {
		rc, err := c.SyscallConn()
		must(t, err)
		return rc
	}
	if err := vip.CloseQuietly(raw(l)); err == nil || !strings.Contains(err.Error(), "listens") {
		t.Errorf("listener: %v", err)
	}
	u, err := w.c.DialContext(t.Context(), "udp", "10.66.0.50:9")
	must(t, err)
	defer u.Close()
	if err := vip.CloseQuietly(raw(u.(*net.UDPConn))); err == nil || !strings.Contains(err.Error(), "no TCP socket") {
		t.Errorf("UDP: %v", err)
	}
	s, _ := w.pair(t, l, a.Prefix.Addr())
	rc := raw(s)
	must(t, s.Close())
	if err := vip.CloseQuietly(rc); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	// The listener still works.
	w.pair(t, l, a.Prefix.Addr())
}
