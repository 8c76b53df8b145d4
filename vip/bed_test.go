package vip_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/vip"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { bed.Main(m) }

// limit bounds what should take milliseconds; it is no measure of anything.
const limit = 60 * time.Second

// host is a machine of a test's network with the package at work.
type host struct {
	*bed.Node
	k *vip.Kernel
}

// world is two machines and a client on a bridge.
type world struct {
	t       *testing.T
	a, b, c host
}

// families are the floating addresses of all tests that do the same for both.
var families = map[string]vip.Address{
	"ipv4": {Prefix: netip.MustParsePrefix("10.66.0.50/24")},
	"ipv6": {Prefix: netip.MustParsePrefix("fd66::50/64")},
}

// namespaces says why this machine cannot make any.
var namespaces = sync.OnceValue(func() error {
	n, err := bed.NewNode("probe")
	if err == nil {
		err = n.Close()
	}
	return err
})

// each runs a test for both families, in a world of its own each.
func each(t *testing.T, f func(t *testing.T, w *world, a vip.Address)) {
	t.Helper()
	bed.Need(t, namespaces())
	for name, a := range families {
		t.Run(name, func(t *testing.T) { f(t, newWorld(t), a) })
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	hub, err := bed.NewNode("hub")
	bed.Need(t, err)
	t.Cleanup(func() { hub.Close() })
	must(t, hub.AddBridge("br0", netip.Prefix{}))
	w := &world{t: t}
	for i, h := range []*host{&w.a, &w.b, &w.c} {
		name := string(rune('a' + i))
		h.Node, err = bed.NewNode(name)
		bed.Need(t, err)
		t.Cleanup(func() { h.Close() })
		must(t, h.Plug(hub, "br0", "p"+name, "eth0", netip.MustParsePrefix(fmt.Sprintf("10.66.0.%d/24", i+1))))
		must(t, h.AddAddr("eth0", netip.MustParsePrefix(fmt.Sprintf("fd66::%d/64", i+1))))
		h.k = h.open(t, vip.Options{})
	}
	// A port without listener refuses: packets go both ways.
	for _, to := range []string{"10.66.0.1:9", "10.66.0.2:9", "[fd66::1]:9", "[fd66::2]:9"} {
		waitFor(t, "the network to "+to, func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			_, err := w.c.DialContext(ctx, "tcp", to)
			return errors.Is(err, syscall.ECONNREFUSED)
		})
	}
	return w
}

func (h *host) open(t *testing.T, o vip.Options) (k *vip.Kernel) {
	t.Helper()
	must(t, h.Do(func() (err error) {
		k, err = vip.Open(o)
		return err
	}))
	t.Cleanup(func() { must(t, k.Close()) })
	return k
}

// ip runs an ip command on the machine and returns what it says.
func (h *host) ip(t *testing.T, args string) string {
	t.Helper()
	cmd := bed.Command("ip", strings.Fields(args)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, h.Do(cmd.Start))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, &out)
	}
	return out.String()
}

// sysctl sets a value below /proc/sys/net on the machine.
func (h *host) sysctl(t *testing.T, path, value string) {
	t.Helper()
	must(t, h.Do(func() error { return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0) }))
}

// take adds and announces the address.
func (h *host) take(t *testing.T, a vip.Address) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	must(t, h.k.Add(ctx, a))
	must(t, h.k.Announce(a))
}

// listen listens at the address, which need not be there (IP_FREEBIND), with more
// socket options if need be.
func (h *host) listen(t *testing.T, addr netip.Addr, port int, opts ...func(fd int) error) *net.TCPListener {
	t.Helper()
	lc := net.ListenConfig{Control: func(network, _ string, rc syscall.RawConn) error {
		var err error
		cerr := rc.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1), freebind6(network, int(fd)))
			for _, o := range opts {
				err = errors.Join(err, o(int(fd)))
			}
		})
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(false)
	var l net.Listener
	must(t, h.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(addr, uint16(port)).String())
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func freebind6(network string, fd int) error {
	if network != "tcp6" {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
}

func (h *host) dial(t *testing.T, addr netip.Addr, port int) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	c, err := h.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, uint16(port)).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	must(t, c.SetDeadline(time.Now().Add(limit)))
	return c.(*net.TCPConn)
}

// pair connects the client with a listener and returns both ends, the server's first.
func (w *world) pair(t *testing.T, l *net.TCPListener, addr netip.Addr) (s, c *net.TCPConn) {
	t.Helper()
	c = w.c.dial(t, addr, port(l))
	must(t, l.SetDeadline(time.Now().Add(limit)))
	s, err := l.AcceptTCP()
	must(t, err)
	t.Cleanup(func() { s.Close() })
	must(t, s.SetDeadline(time.Now().Add(limit)))
	return s, c
}

func port(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

// connOf names a connection by its server's end.
func connOf(s *net.TCPConn) vip.Conn {
	return vip.Conn{Local: s.LocalAddr().(*net.TCPAddr).AddrPort(), Remote: s.RemoteAddr().(*net.TCPAddr).AddrPort()}
}

// states returns how many TCP sockets of the address are in which state.
func (h *host) states(t *testing.T, addr netip.Addr) map[string]int {
	t.Helper()
	ss, err := h.k.Sockets(addr)
	must(t, err)
	out := map[string]int{}
	for _, s := range ss {
		if s.Local.Addr() != addr {
			t.Errorf("a socket of another address: %+v", s)
		}
		out[s.Network+" "+s.State]++
	}
	return out
}

// clean fails unless the machine has only listeners of the address.
func (h *host) clean(t *testing.T, addr netip.Addr) {
	t.Helper()
	ss, err := h.k.Sockets(addr)
	must(t, err)
	for _, s := range ss {
		if s.Network == "tcp" && s.State != "LISTEN" {
			t.Errorf("%s has a socket of %s: %+v", h.Name(), addr, s)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitFor waits for something outside the process that gives no notice.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
