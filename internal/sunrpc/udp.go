package sunrpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const maxDatagram = 64 << 10

// udpSocket is one service address over UDP, with one reader goroutine.
type udpSocket struct {
	srv      *Server
	ep       *endpoint
	pc       *net.UDPConn
	wildcard bool // the local address differs from call to call and must be given with each reply
	v6       bool
	held     bool // the reader is not started; under Server.mu
	stopping atomic.Bool
	mute     atomic.Bool   // no reply leaves any more
	quiet    chan struct{} // capacity 1: a call has finished while stopping
	done_    chan struct{} // the reader has ended
}

// ListenUDP starts to serve datagrams at addr (port 0: any) and returns the address bound. Replies leave
// from the address that was asked.
func (s *Server) ListenUDP(addr netip.AddrPort, opts ListenOptions) (netip.AddrPort, error) {
	network, addr, err := checkAddr("udp", addr, opts)
	if err != nil {
		opts.closeFile()
		return netip.AddrPort{}, err
	}
	u := &udpSocket{
		srv: s, wildcard: addr.Addr().IsUnspecified(), v6: network == "udp6",
		quiet: make(chan struct{}, 1), done_: make(chan struct{}),
	}
	free := control(opts)
	lc := net.ListenConfig{Control: func(network, address string, rc syscall.RawConn) error {
		if err := free(network, address, rc); err != nil || !u.wildcard {
			return err
		}
		var serr error
		err := rc.Control(func(fd uintptr) {
			if u.v6 {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			} else {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			}
		})
		return errors.Join(err, serr)
	}}
	var pc net.PacketConn
	if opts.File == nil {
		pc, err = lc.ListenPacket(context.Background(), network, addr.String())
	} else {
		pc, err = net.FilePacketConn(opts.File)
		_ = opts.File.Close() // FilePacketConn has its own duplicate
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("sunrpc: %w", err)
	}
	var ok bool
	if u.pc, ok = pc.(*net.UDPConn); !ok {
		_ = pc.Close() // never used
		return netip.AddrPort{}, fmt.Errorf("sunrpc: listen %s: the socket that was passed is not UDP", addr)
	}
	_ = u.pc.SetReadBuffer(1 << 20) // more than the default helps, less still works
	ap := u.pc.LocalAddr().(*net.UDPAddr).AddrPort()
	bound := netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.refusing {
		_ = pc.Close() // never used
		return netip.AddrPort{}, fmt.Errorf("sunrpc: listen %s: %w", addr, errClosed)
	}
	u.ep = s.endpoint("udp", bound)
	s.udps[u] = struct{}{}
	if opts.Held && !s.opened {
		u.held = true
		return bound, nil
	}
	s.wg.Add(1)
	go u.serve()
	return bound, nil
}

func (u *udpSocket) serve() {
	defer u.srv.wg.Done()
	defer close(u.done_)
	buf := make([]byte, maxDatagram)
	oob := make([]byte, 128)
	for {
		var n, noob int
		var from netip.AddrPort
		var err error
		if u.wildcard {
			n, noob, _, from, err = u.pc.ReadMsgUDPAddrPort(buf, oob)
		} else {
			n, from, err = u.pc.ReadFromUDPAddrPort(buf)
		}
		if err != nil {
			if u.stopping.Load() || errors.Is(err, net.ErrClosed) {
				return
			}
			// An ICMP error for an earlier reply, say; one datagram's trouble is not the socket's.
			u.srv.warn("UDP receive failed", netip.AddrPort{}, u.ep.addr, err)
			select {
			case <-u.srv.stop:
				return
			case <-time.After(time.Millisecond):
			}
			continue
		}
		u.ep.bytesIn.Add(uint64(n))
		cfg := &u.srv.cfg
		if u.ep.inflightUDP.Load() >= int64(cfg.MaxInflightCallsPerConn) ||
			u.srv.mem.used.Load() >= int64(cfg.MaxInflightBytes) || n > cfg.MaxRecord {
			u.ep.dropped.Add(1)
			continue // the client will ask again
		}
		in := getBuf(&u.srv.mem, max(n, 1))
		rec := in.b[:copy(in.b, buf[:n])]
		c := newCall(u.srv, u.ep, in, n)
		u.ep.inflightUDP.Add(1)
		c.udp = u
		c.Remote = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		c.Local = u.ep.addr
		if u.wildcard {
			u.readPktinfo(c, oob[:noob])
		}
		if !u.srv.dispatch(c, rec) {
			u.ep.garbage.Add(1)
			c.discard()
		}
	}
}

// readPktinfo sets c.Local to the datagram's destination and prepares the control message that makes
// the reply leave from there.
func (u *udpSocket) readPktinfo(c *Call, oob []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			pi := *(*unix.Inet4Pktinfo)(unsafe.Pointer(&m.Data[0]))
			c.Local = netip.AddrPortFrom(netip.AddrFrom4(pi.Addr), u.ep.addr.Port())
			c.pktinfo = append(c.pktinfo[:0], unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: pi.Addr})...)
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			pi := *(*unix.Inet6Pktinfo)(unsafe.Pointer(&m.Data[0]))
			c.Local = netip.AddrPortFrom(netip.AddrFrom16(pi.Addr), u.ep.addr.Port())
			c.pktinfo = append(c.pktinfo[:0], unix.PktInfo6(&unix.Inet6Pktinfo{Addr: pi.Addr, Ifindex: pi.Ifindex})...)
		}
	}
}

// send sends c's reply as one datagram, without the record mark. A reply that does not fit or cannot be
// sent is lost, as datagrams are.
func (u *udpSocket) send(c *Call) {
	if u.mute.Load() {
		u.ep.dropped.Add(1)
		return
	}
	b := c.Out.Buf[markSize:]
	if len(c.payload) > 0 {
		b = append(c.Out.Buf, c.payload...)
		b = append(b, padding[:-len(c.payload)&3]...)
		c.Out.Buf = b
		b = b[markSize:]
	}
	var n int
	var err error
	if u.wildcard {
		n, _, err = u.pc.WriteMsgUDPAddrPort(b, c.pktinfo, c.Remote)
	} else {
		n, err = u.pc.WriteToUDPAddrPort(b, c.Remote)
	}
	if err != nil {
		u.ep.dropped.Add(1)
		if !errors.Is(err, net.ErrClosed) {
			u.srv.warn("UDP reply not sent", c.Remote, c.Local, err)
		}
		return
	}
	u.ep.bytesOut.Add(uint64(n))
}

// done takes a finished call off the books.
func (u *udpSocket) done() {
	u.ep.inflightUDP.Add(-1)
	if u.stopping.Load() {
		select {
		case u.quiet <- struct{}{}:
		default:
		}
	}
}

// stopReading returns when nothing is read any more.
func (u *udpSocket) stopReading() {
	u.srv.mu.Lock()
	held := u.held
	u.held = false
	u.srv.mu.Unlock()
	u.stopping.Store(true)
	if held {
		close(u.done_)
	}
	_ = u.pc.SetReadDeadline(time.Unix(1, 0)) // a closed socket needs no waking
	<-u.done_
}

// drained waits until every call of the socket is answered, or ctx ends, and returns how many are not. Nothing
// is answered after it.
func (u *udpSocket) drained(ctx context.Context) int {
	for u.ep.inflightUDP.Load() > 0 && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-u.quiet:
		}
	}
	u.mute.Store(true)
	return int(u.ep.inflightUDP.Load())
}
