package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/tests/bed"
)

// dialer connects to an IPv4 address from a node. bed.Node has a thread of its own join the
// node for each connection; with hundreds that have to be made anew at once, that is most
// of what they wait for. A socket stays in the network in which it was made, so these are
// made beforehand, by one thread.
type dialer struct {
	to     netip.AddrPort
	spare  chan int // sockets
	quit   chan struct{}
	wg     sync.WaitGroup
	failed chan error // room for one: why there are no more sockets
}

// newDialer keeps n sockets ready.
func newDialer(from *bed.Node, to netip.AddrPort, n int) *dialer {
	d := &dialer{to: to, spare: make(chan int, n), quit: make(chan struct{}), failed: make(chan error, 1)}
	d.wg.Go(func() {
		err := from.Do(func() error {
			for {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("socket: %w", err)
				}
				select {
				case d.spare <- fd:
				case <-d.quit:
					return unix.Close(fd)
				}
			}
		})
		if err != nil {
			d.failed <- err
		}
	})
	return d
}

// close closes the sockets that nobody has used. Nobody may be connecting.
func (d *dialer) close() {
	close(d.quit)
	d.wg.Wait()
	for {
		select {
		case fd := <-d.spare:
			unix.Close(fd)
		default:
			return
		}
	}
}

func (d *dialer) connect(ctx context.Context) (net.Conn, error) {
	var fd int
	select {
	case fd = <-d.spare:
	case err := <-d.failed:
		d.failed <- err
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: d.to.Addr().As4(), Port: int(d.to.Port())})
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close() // FileConn has a duplicate
	if err == unix.EINPROGRESS {
		err = established(ctx, f)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w", d.to, err)
	}
	return net.FileConn(f)
}

// established waits until a connection that is being made is there.
func established(ctx context.Context, f *os.File) error {
	if t, ok := ctx.Deadline(); ok {
		if err := f.SetWriteDeadline(t); err != nil {
			return err
		}
	}
	defer context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	err = rc.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 {
			return false
		}
		var e int
		if e, cerr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); cerr == nil && e != 0 {
			cerr = unix.Errno(e)
		}
		return true
	})
	if err == nil {
		err = cerr
	}
	return err
}
