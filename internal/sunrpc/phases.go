package sunrpc

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
)

// The phases in which a Server is taken down whose service address moves to another machine: Refuse, Quiesce, then
// HalfClose or CloseQuietly, and CloseListeners. Drain does all of it at once. Each concerns all addresses of the
// Server: a Server that goes through phases serves one. It is not used again after them; Close is still due.

// Quiesced is what Quiesce came to.
type Quiesced struct {
	Conns   int // connections there were
	Replies int // to calls that were in progress when it began, over TCP
	Left    int // connections cut off because calls or replies were not through in time
	LeftUDP int // calls over UDP that were not finished in time and are not answered any more
}

// Refuse stops new connections and serves those that the kernel has completed. With hold the ports stay, SYNs are
// dropped and datagrams wait, until CloseListeners; else listeners are closed, so that new connections are reset.
// An error says that a filter could not be set: connections are then made that nobody serves.
func (s *Server) Refuse(hold bool) error {
	s.mu.Lock()
	s.refusing = true
	s.mu.Unlock()
	ls, _ := s.sockets(all)
	var errs []error
	for _, l := range ls {
		err := s.stopAccepting(l)
		if hold {
			errs = append(errs, err)
		} else {
			s.closeListener(l)
		}
	}
	return errors.Join(errs...)
}

func all(netip.Addr) bool { return true }

// Quiesce stops reading at a record boundary, which a record that has begun gets a moment to reach
// (Config.DrainRecordWait), and returns when all calls are finished and their replies acknowledged by the peers'
// kernels (SIOCOUTQ is 0), or when ctx ends. What is not through by then is cut off: no reply of it leaves any more,
// so that what the caller makes durable afterwards is all that was acknowledged. The sockets stay open and silent.
func (s *Server) Quiesce(ctx context.Context) Quiesced {
	s.mu.Lock()
	s.refusing = true
	s.mu.Unlock()
	ls, us := s.sockets(all)
	for _, l := range ls {
		_ = s.stopAccepting(l) // Refuse has reported it
	}
	for _, u := range us {
		u.stopReading()
	}
	conns := s.startDrain(all, endUnsaid)
	s.waitConns(ctx, conns, func(c *Conn) bool { return c.quiet.Load() })
	q := Quiesced{Conns: len(conns)}
	for _, u := range us {
		q.LeftUDP += u.drained(ctx)
	}
	for _, c := range conns {
		if !c.quiet.Load() {
			c.cutOff()
			if c.cut.Load() {
				q.Left++
			}
		}
		q.Replies += int(c.replies.Load() - c.drainStart.Load())
	}
	return q
}

// HalfClose shuts each connection down for sending and discards its input until the peer closes, too. What is left
// when ctx ends, or was cut off by Quiesce, is reset.
func (s *Server) HalfClose(ctx context.Context) DrainResult {
	conns := s.startDrain(all, endOrderly)
	for _, c := range conns {
		c.closeCut(true)
	}
	s.waitGone(ctx, conns)
	return s.finishConns(conns)
}

// CloseQuietly ends each connection without a segment: silence, which is given the connection's socket, makes it so
// that closing it sends nothing (vip.CloseQuietly). Connections that Quiesce did not see to, or not in time, are cut
// off first, which makes it the way to end a service at once. A connection that silence fails for is reset: if the
// machine no longer has the address, nothing leaves all the same. Orderly are those that were quiet before. When ctx
// ends the rest is reset, too; the error is the first of silence's.
func (s *Server) CloseQuietly(ctx context.Context, silence func(syscall.RawConn) error) (DrainResult, error) {
	s.mu.Lock()
	s.refusing = true
	var firstErr error
	s.silence = func(rc syscall.RawConn) error {
		err := silence(rc)
		s.mu.Lock()
		if err != nil && firstErr == nil {
			firstErr = err
		}
		s.mu.Unlock()
		return err
	}
	s.mu.Unlock()
	ls, us := s.sockets(all)
	for _, u := range us {
		u.mute.Store(true)
	}
	for _, l := range ls {
		_ = s.stopAccepting(l) // Refuse has reported it
	}
	for _, u := range us {
		u.stopReading()
	}
	conns := s.startDrain(all, endSilent)
	for _, c := range conns {
		if !c.quiet.Load() {
			c.cutOff()
		}
	}
	s.waitGone(ctx, conns)
	r := s.finishConns(conns)
	s.mu.Lock()
	defer s.mu.Unlock()
	if firstErr != nil {
		return r, fmt.Errorf("sunrpc: connections could not be closed silently: %w", firstErr)
	}
	return r, nil
}

// DropAll has the kernel drop whatever comes to the ports that Refuse and Quiesce have kept, until CloseListeners:
// not even what belongs to no connection any more is answered by a reset. It is for a machine that cannot get rid of
// the address. An error says that some port is not silent.
func (s *Server) DropAll() error {
	ls, us := s.sockets(all)
	if len(ls) == 0 {
		return errors.New("sunrpc: the listeners are closed: what comes is refused")
	}
	var errs []error
	drop := func(c syscall.Conn, ep *endpoint) {
		rc, err := c.SyscallConn()
		var ferr error
		if err == nil {
			err = rc.Control(func(fd uintptr) { ferr = dropAll(int(fd)) })
		}
		if err = errors.Join(err, ferr); err != nil {
			errs = append(errs, fmt.Errorf("sunrpc: what comes to %s cannot be dropped by a socket filter: %w", ep.addr, err))
		}
	}
	for _, l := range ls {
		drop(l.ln, l.ep)
	}
	for _, u := range us {
		drop(u.pc, u.ep)
	}
	return errors.Join(errs...)
}

// CloseListeners closes the listeners and the UDP sockets that Refuse and Quiesce have kept.
func (s *Server) CloseListeners() {
	ls, us := s.sockets(all)
	for _, l := range ls {
		_ = s.stopAccepting(l) // closed anyway
		s.closeListener(l)
	}
	for _, u := range us {
		u.mute.Store(true)
		u.stopReading()
		s.closeUDP(u)
	}
}

// ending says how a drained connection ends.
type ending int32

const (
	endUnsaid ending = iota
	endOrderly
	endSilent
	endHanded
	endGone // the socket is closed
)

// end says how the connection is to end once it is quiet; what was said first counts.
func (c *Conn) end(how ending) {
	if how != endUnsaid && c.ending.CompareAndSwap(int32(endUnsaid), int32(how)) {
		c.nudge()
	}
}

// awaitEnding blocks the reader, which has stopped reading, until it is said how the connection ends.
func (c *Conn) awaitEnding() ending {
	c.parked.Store(true)
	defer c.parked.Store(false)
	for {
		if c.closed.Load() && !c.cut.Load() {
			return endGone
		}
		if how := ending(c.ending.Load()); how != endUnsaid {
			return how
		}
		<-c.wake
	}
}

// endSilently closes the connection without a segment.
func (c *Conn) endSilently() {
	quiet := !c.closed.Load()
	if c.srv.silence(c.rc) != nil {
		c.kill()
		return
	}
	c.fail(nil, false)
	c.closeCut(false)
	c.orderly.Store(quiet)
}
