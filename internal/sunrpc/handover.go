package sunrpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Server's sockets outlive it in another process: KeepSockets, Quiesce, Handover here; ListenOptions.File, Open and
// Adopt there. Nothing is refused and no connection ends: what comes meanwhile waits in the kernel.

// KeepSockets has the phases that follow leave listeners and their queues alone.
func (s *Server) KeepSockets() {
	s.mu.Lock()
	s.keep = true
	s.mu.Unlock()
}

// Handed are sockets that a Server has ended its part in. The files are the caller's.
type Handed struct {
	Sockets []*os.File // listeners and UDP sockets
	Conns   []*os.File // nothing of a record has been read, no reply is under way
}

// Handover gives the sockets away after KeepSockets and Quiesce, without a segment. A connection that stopped inside
// a record, or was cut off by Quiesce, is ended here, as by HalfClose.
func (s *Server) Handover(ctx context.Context) (h Handed, r DrainResult, err error) {
	ls, us := s.sockets(all)
	var errs []error
	keep := func(c syscall.Conn) {
		f, err := dupSocket(c)
		if err == nil {
			h.Sockets = append(h.Sockets, f)
		}
		errs = append(errs, err)
	}
	for _, l := range ls {
		keep(l.ln)
	}
	for _, u := range us {
		keep(u.pc)
	}
	conns := s.startDrain(all, endHanded)
	for _, c := range conns {
		c.closeCut(true)
	}
	s.waitGone(ctx, conns)
	r = s.finishConns(conns)
	s.CloseListeners()
	s.mu.Lock()
	h.Conns, s.handed = s.handed, nil
	s.mu.Unlock()
	return h, r, errors.Join(errs...)
}

// handOver ends this process's part in the connection; false: it cannot be given away.
func (c *Conn) handOver() bool {
	f, err := dupSocket(c.nc)
	if err != nil {
		c.srv.warn("connection cannot be handed over", c.remote, c.local, err)
		return false
	}
	c.srv.mu.Lock()
	c.srv.handed = append(c.srv.handed, f)
	c.srv.mu.Unlock()
	c.fail(nil, false) // the socket has another descriptor: nothing is sent
	c.orderly.Store(true)
	return true
}

// dupSocket returns another descriptor of a socket.
func dupSocket(c syscall.Conn) (*os.File, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var nfd int
	var derr error
	if err := rc.Control(func(fd uintptr) { nfd, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, fmt.Errorf("duplicate a socket: %w", derr)
	}
	return os.NewFile(uintptr(nfd), "socket"), nil
}

// Adopt serves a connection that another process has handed over. f is taken over. Limits hold as for new ones. The
// address has to be listened on.
func (s *Server) Adopt(f *os.File) error {
	nc, err := net.FileConn(f)
	_ = f.Close() // FileConn has its own duplicate
	if err != nil {
		return fmt.Errorf("sunrpc: adopt: %w", err)
	}
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		_ = nc.Close() // never used
		return errors.New("sunrpc: adopt: not a TCP connection")
	}
	_ = tc.SetKeepAliveConfig(keepAlive) // the default serves, too
	ap := tcpAddrPort(tc.LocalAddr())
	s.mu.Lock()
	var ep *endpoint
	for l := range s.listeners {
		if l.ep.addr == ap {
			ep = l.ep
		}
	}
	s.mu.Unlock()
	if ep == nil {
		_ = tc.Close() // never used
		return fmt.Errorf("sunrpc: adopt: nothing listens at %s", ap)
	}
	s.admit(ep, tc)
	return nil
}
