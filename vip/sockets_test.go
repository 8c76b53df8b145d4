package vip_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/vip"
	"golang.org/x/sys/unix"
)

// makeStates gives the machine sockets of the address in all states that stay.
func (w *world) makeStates(t *testing.T, addr netip.Addr) {
	t.Helper()
	l := w.a.listen(t, addr, 0)
	w.pair(t, l, addr) // ESTAB
	s, c := w.pair(t, l, addr)
	must(t, c.CloseWrite()) // CLOSE-WAIT
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want EOF", err)
	}
	s, _ = w.pair(t, l, addr)
	must(t, s.CloseWrite()) // FIN-WAIT-2
	s, c = w.pair(t, l, addr)
	must(t, s.CloseWrite()) // TIME-WAIT
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want EOF", err)
	}
	must(t, c.Close())
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want EOF", err)
	}
	// Not accepted: in the listener's queue.
	w.c.dial(t, addr, port(l))
	// SYN-RECV: the listener waits for the client's first data.
	deferring := w.a.listen(t, addr, 0, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60)
	})
	w.c.dial(t, addr, port(deferring))
	// By a listener for both families.
	wild := w.a.listen(t, netip.IPv6Unspecified(), 0)
	w.pair(t, wild, addr)
	// FIN-WAIT-1, closed by its process: the client takes no more data.
	s, _ = w.pair(t, l, addr)
	fill(t, s)
	must(t, s.CloseWrite())
	must(t, s.Close())
	must(t, w.a.Do(func() error {
		u, err := net.ListenPacket("udp", netip.AddrPortFrom(addr, 0).String())
		if err == nil {
			t.Cleanup(func() { u.Close() })
		}
		return err
	}))
}

// fill writes until no more fits.
func fill(t *testing.T, c *net.TCPConn) {
	t.Helper()
	must(t, c.SetWriteBuffer(1<<14))
	b := make([]byte, 1<<16)
	for {
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

var allStates = map[string]int{
	"tcp ESTAB": 3, "tcp CLOSE-WAIT": 1, "tcp FIN-WAIT-1": 1, "tcp FIN-WAIT-2": 1, "tcp TIME-WAIT": 1, "tcp SYN-RECV": 1, "tcp LISTEN": 2, "udp UNCONN": 1,
}

// 004.8, 004.19: Sockets finds sockets in every state, mapped ones too, Destroy
// leaves none but listeners, and connections of other addresses go on.
func TestDestroyLeavesNothing(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		addr := a.Prefix.Addr()
		own := netip.MustParseAddr("10.66.0.1")
		if addr.Is6() {
			own = netip.MustParseAddr("fd66::1")
		}
		w.a.take(t, a)
		s, c := w.pair(t, w.a.listen(t, own, 0), own)
		w.makeStates(t, addr)
		waitFor(t, "all states", func() bool { return maps.Equal(w.a.states(t, addr), allStates) || t.Failed() })
		n, err := w.a.k.Destroy(ctx, addr)
		if n != 8 || err != nil {
			t.Errorf("destroyed %d, %v; want 8", n, err)
		}
		if got, want := w.a.states(t, addr), (map[string]int{"tcp LISTEN": 2, "udp UNCONN": 1}); !maps.Equal(got, want) {
			t.Errorf("left %v, want %v", got, want)
		}
		if _, err := s.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if b := make([]byte, 1); read(c, b) != nil || b[0] != 'x' {
			t.Errorf("the connection of another address got %q", b)
		}
		if n, err := w.a.k.Destroy(ctx, addr); n != 0 || err != nil {
			t.Errorf("destroyed again %d, %v", n, err)
		}
	})
}

func read(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	return err
}

// 004.8: a socket that is left when its address goes away hangs its client when
// the address comes back, and no tickle helps. Sockets finds it while the address
// is away, and when Destroy has ended it the client is reset.
func TestStaleSocketIsFound(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		addr := a.Prefix.Addr()
		w.a.take(t, a)
		l := w.a.listen(t, addr, 2049)
		kept, client := w.pair(t, l, addr)
		closed, _ := w.pair(t, l, addr)
		must(t, w.a.k.Remove(ctx, a))
		must(t, closed.Close())
		want := map[string]int{"tcp ESTAB": 1, "tcp FIN-WAIT-1": 1, "tcp LISTEN": 1}
		if got := w.a.states(t, addr); !maps.Equal(got, want) {
			t.Errorf("sockets of the absent address %v, want %v", got, want)
		}

		// The client connects with the next machine, from the same port as before.
		w.b.take(t, a)
		other := w.b.serve(t, addr, 2049)
		must(t, w.b.k.Tickle(a, []vip.Conn{connOf(kept)}))
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the client's connection ended with %v, want a reset", err)
		}
		must(t, client.Close())
		var again net.Conn
		must(t, w.c.Do(func() (err error) {
			d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(connOf(kept).Remote)}
			again, err = d.DialContext(ctx, "tcp", connOf(kept).Local.String())
			return err
		}))
		defer again.Close()
		must(t, read(again, make([]byte, 1)))

		other.quietly(t, a)
		w.b.clean(t, addr)
		w.a.take(t, a)
		must(t, w.a.k.Tickle(a, []vip.Conn{connOf(kept)}))
		must(t, again.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
		if _, err := again.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("with a stale socket the client's connection ended with %v; it should hang", err)
		}
		if n, err := w.a.k.Destroy(ctx, addr); n < 1 || err != nil {
			t.Errorf("destroyed %d, %v; want some", n, err)
		}
		w.a.clean(t, addr)
		// The client answers only once in 500 ms.
		waitFor(t, "the client to be reset", func() bool {
			must(t, w.a.k.Tickle(a, []vip.Conn{connOf(kept)}))
			must(t, again.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
			_, err := again.Read(make([]byte, 1))
			return errors.Is(err, syscall.ECONNRESET)
		})
	})
}

// 004.8: sockets of an address that is away are destroyed as well.
func TestDestroyWithoutAddress(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		addr := a.Prefix.Addr()
		w.a.take(t, a)
		w.makeStates(t, addr)
		must(t, w.a.k.Remove(ctx, a))
		if _, err := w.a.k.Destroy(ctx, addr); err != nil {
			t.Error(err)
		}
		w.a.clean(t, addr)
	})
}

// What there is is destroyed although the time is over already.
func TestDestroyLate(t *testing.T) {
	w := newWorld(t)
	a := families["ipv4"]
	w.a.take(t, a)
	l := w.a.listen(t, a.Prefix.Addr(), 0)
	w.pair(t, l, a.Prefix.Addr())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := w.a.k.Destroy(ctx, a.Prefix.Addr()); n != 1 || err != nil {
		t.Errorf("destroyed %d, %v; want 1", n, err)
	}
}
