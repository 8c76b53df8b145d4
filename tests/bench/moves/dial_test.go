package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// here is a dialer with n sockets of this network.
func here(t *testing.T, to netip.AddrPort, n int) *dialer {
	t.Helper()
	d := &dialer{to: to, spare: make(chan int, n), quit: make(chan struct{}), failed: make(chan error, 1)}
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		d.spare <- fd
	}
	t.Cleanup(d.close)
	return d
}

func TestDialer(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := l.Addr().(*net.TCPAddr).AddrPort()
	d := here(t, to, 3)
	c, err := d.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if s.RemoteAddr().String() != c.LocalAddr().String() {
		t.Errorf("%v is connected to %v", c.LocalAddr(), s.RemoteAddr())
	}
	if _, err := s.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	c.Close()
	l.Close()
	if _, err := d.connect(t.Context()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	// No more sockets are made, and why.
	d.failed <- os.ErrPermission
	<-d.spare
	for range 2 {
		if _, err := d.connect(t.Context()); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%v", err)
		}
	}
}

// A connection that is not answered ends with the context.
func TestDialerGivesUp(t *testing.T) {
	// A full accept queue: SYNs are dropped.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	a, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(a.(*unix.SockaddrInet4).Port))
	d := here(t, to, 8)
	for range 8 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		c, err := d.connect(ctx)
		cancel()
		if err == nil {
			defer c.Close()
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		return
	}
	t.Error("the queue takes all connections")
}
