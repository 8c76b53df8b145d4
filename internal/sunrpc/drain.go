package sunrpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// DrainResult says how the connections of a drain ended.
type DrainResult struct {
	Orderly int // everything answered, the peer has taken all of it and closed its side
	Forced  int // reset at the deadline, or broken by the peer before it had taken everything
	Replies int // replies to calls that were in progress when the drain began
}

// Drain ends the service of all addresses in an orderly way: connections in the accept queue are taken
// and served, listeners closed, reading stops at a record boundary, calls in progress finish, their replies
// are delivered (SIOCOUTQ is 0), then each connection is shut down for sending and its input discarded until
// the peer closes too. What is left when ctx ends is reset. The server stays usable: addresses may be
// listened on again, and Close is still due.
func (s *Server) Drain(ctx context.Context) DrainResult {
	return s.drain(ctx, func(netip.Addr) bool { return true })
}

// DrainAddr is Drain for one service address, with all its ports; other addresses are not disturbed.
func (s *Server) DrainAddr(ctx context.Context, addr netip.Addr) DrainResult {
	addr = addr.Unmap()
	return s.drain(ctx, func(a netip.Addr) bool { return a == addr })
}

func (s *Server) drain(ctx context.Context, match func(netip.Addr) bool) DrainResult {
	ls, us := s.sockets(match)
	for _, l := range ls {
		_ = s.stopAccepting(l) // without the filter the rest still holds
		if !l.opts.HoldOnDrain {
			s.closeListener(l)
		}
	}
	for _, u := range us {
		u.stopReading()
	}
	conns := s.startDrain(match, endOrderly)
	s.waitGone(ctx, conns)
	for _, u := range us {
		u.drained(ctx)
		s.closeUDP(u)
	}
	return s.finishConns(conns)
}

// sockets lists listeners and UDP sockets.
func (s *Server) sockets(match func(netip.Addr) bool) (ls []*listener, us []*udpSocket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.listeners {
		if match(l.ep.addr.Addr()) {
			ls = append(ls, l)
		}
	}
	for u := range s.udps {
		if match(u.ep.addr.Addr()) {
			us = append(us, u)
		}
	}
	return ls, us
}

// startDrain has the connections stop reading, and says how they are to end once they are quiet. Those whose end is
// said already stay as they are.
func (s *Server) startDrain(match func(netip.Addr) bool, how ending) []*Conn {
	s.mu.Lock()
	var conns []*Conn
	for c := range s.conns {
		if match(c.local.Addr()) {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.end(how)
		if !c.draining.Swap(true) {
			c.drainStart.Store(c.replies.Load())
			_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // wakes the reader; a closed connection needs no waking
		}
	}
	return conns
}

// finishConns resets what is left of conns and counts how they have ended.
func (s *Server) finishConns(conns []*Conn) DrainResult {
	for _, c := range conns {
		c.kill() // no effect on those that have ended
	}
	// Bounded: a failed connection's reader has nothing left to wait for.
	s.waitGone(context.Background(), conns)
	var r DrainResult
	for _, c := range conns {
		if c.orderly.Load() {
			r.Orderly++
		} else {
			r.Forced++
		}
		r.Replies += int(c.replies.Load() - c.drainStart.Load())
	}
	return r
}

// waitGone waits until none of conns is registered any more, or ctx ends.
func (s *Server) waitGone(ctx context.Context, conns []*Conn) {
	s.waitConns(ctx, conns, func(*Conn) bool { return false })
}

// waitConns waits until each of conns is done or registered no more, or ctx ends. Neither is ever undone, so each
// is waited for in turn, and hundreds that change one after the other are not all looked at every time.
func (s *Server) waitConns(ctx context.Context, conns []*Conn, done func(*Conn) bool) {
	for {
		s.mu.Lock()
		for len(conns) > 0 {
			if _, ok := s.conns[conns[0]]; ok && !done(conns[0]) {
				break
			}
			conns = conns[1:]
		}
		gone := s.connsGone
		s.mu.Unlock()
		if len(conns) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-gone:
		}
	}
}

// stopAccepting stops SYNs and takes the connections that the kernel has completed: closing the listener would
// reset them. What is held for Open stays in the queue: nobody could answer it. It may be called again. An error
// means that SYNs are not stopped; the rest is done all the same.
func (s *Server) stopAccepting(l *listener) error {
	var ferr error
	s.mu.Lock()
	alone := !s.keep && !l.opts.Shared // else what comes is for another process
	s.mu.Unlock()
	rc, err := l.ln.SyscallConn()
	if err == nil && alone {
		err = rc.Control(func(fd uintptr) { ferr = dropSYN(int(fd)) })
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	if err == nil && ferr != nil {
		ferr = fmt.Errorf("sunrpc: new connections to %s cannot be held off by a socket filter: %w", l.ep.addr, ferr)
	}
	s.mu.Lock()
	held := l.held
	s.mu.Unlock()
	if held {
		return errors.Join(err, ferr)
	}
	_ = l.ln.SetDeadline(time.Unix(1, 0)) // ends the accept goroutine
	<-l.done
	if err == nil && alone {
		err = rc.Control(func(fd uintptr) {
			for {
				nfd, _, err := unix.Accept4(int(fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				if err == unix.EINTR || err == unix.ECONNABORTED {
					continue
				}
				if err != nil {
					return // EAGAIN: the queue is empty
				}
				if nc := adopt(nfd); nc != nil {
					s.admit(l.ep, nc)
				}
			}
		})
	}
	return errors.Join(err, ferr)
}

func (s *Server) closeListener(l *listener) {
	_ = l.ln.Close() // may have been closed by Close
	s.mu.Lock()
	delete(s.listeners, l)
	s.mu.Unlock()
}

func (s *Server) closeUDP(u *udpSocket) {
	_ = u.pc.Close() // may have been closed by Close
	s.mu.Lock()
	delete(s.udps, u)
	s.mu.Unlock()
}

// adopt makes a *net.TCPConn of an accepted descriptor.
func adopt(fd int) *net.TCPConn {
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // latency only
	f := os.NewFile(uintptr(fd), "")
	c, err := net.FileConn(f)
	_ = f.Close() // FileConn has its own duplicate
	if err != nil {
		return nil
	}
	nc, _ := c.(*net.TCPConn)
	return nc
}

// dropSYN makes a listener ignore SYNs. Segments of handshakes already under way pass: the program
// looks at the flags byte of the TCP header, with which the filter's view of the packet begins.
func dropSYN(fd int) error {
	const synAck, syn = 0x12, 0x02
	return attach(fd, []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: synAck},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: syn, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x40000},
	})
}

// dropAll makes a socket ignore everything.
func dropAll(fd int) error {
	return attach(fd, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}})
}

// attach gives a socket a filter in the place of the one that it has.
func attach(fd int, prog []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
}

// finishDrain runs on the reader goroutine once it has stopped reading. Whoever wants it to end early
// calls fail.
func (c *Conn) finishDrain() {
	if c.await(awaitQuiet, 0) != nil {
		return
	}
	for d := 50 * time.Microsecond; ; d = min(2*d, 5*time.Millisecond) {
		n := 0
		var ierr error
		err := c.rc.Control(func(fd uintptr) { n, ierr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err != nil || ierr != nil || c.closed.Load() {
			return
		}
		if n == 0 {
			break
		}
		time.Sleep(d)
	}
	whole := !c.midRecord()
	c.dropInput()
	c.quiet.Store(true)
	c.srv.mu.Lock()
	c.srv.connChanged()
	c.srv.mu.Unlock()
	switch c.awaitEnding() {
	case endHanded:
		// The next process would take the rest of a record for its beginning.
		if !whole || !c.handOver() {
			c.endOrderly()
		}
	case endOrderly:
		c.endOrderly()
	case endSilent:
		c.endSilently()
	}
}

// endOrderly shuts down for sending and discards input until the peer closes, too.
func (c *Conn) endOrderly() {
	if c.nc.CloseWrite() != nil {
		return
	}
	if c.nc.SetReadDeadline(time.Time{}) != nil {
		return
	}
	scratch := getBuf(&c.srv.mem, chunkMin)
	defer scratch.release()
	for {
		_, err := c.nc.Read(scratch.b)
		if err == nil {
			continue
		}
		if os.IsTimeout(err) {
			// The deadline that woke the reader was set after it had noticed the drain by itself.
			if c.nc.SetReadDeadline(time.Time{}) == nil {
				continue
			}
		}
		// After our FIN a reset is as good an end as a FIN: the peer had taken everything.
		c.orderly.Store(!c.closed.Load())
		return
	}
}
