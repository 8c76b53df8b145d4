package rpcbind

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
)

// maxReply bounds a reply in bytes; the answers used here are short.
const maxReply = 8 << 10

// callTimeout bounds a call whose context has no deadline.
const callTimeout = 5 * time.Second

// errUnavail is an accepted call that the server does not offer: an unknown
// program, version or procedure.
var errUnavail = errors.New("rpcbind: program, version or procedure unavailable")

// client calls this machine's rpcbind over one stream socket, one call at a
// time. It is not sunrpc's client because the stream may be a unix socket.
type client struct {
	c net.Conn
}

// call sends one call of program 100000 and returns the results' bytes.
func (c *client) call(ctx context.Context, vers, proc uint32, args func(*xdr.Writer)) ([]byte, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(callTimeout)
	}
	c.c.SetDeadline(deadline)
	defer context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })()

	xid := rand.Uint32()
	msg := encodeCall(xid, vers, proc, args)
	rec := append(binary.BigEndian.AppendUint32(nil, uint32(len(msg))|1<<31), msg...)
	if _, err := c.c.Write(rec); err != nil {
		return nil, err
	}
	rep, err := readRecord(c.c)
	if err != nil {
		return nil, err
	}
	return decodeReply(rep, xid)
}

// encodeCall builds a call message (RFC 5531 section 9) with AUTH_SYS, which
// some rpcbinds want to see from local callers.
func encodeCall(xid, vers, proc uint32, args func(*xdr.Writer)) []byte {
	var w, cred xdr.Writer
	for _, v := range []uint32{xid, 0, 2, Program, vers, proc} {
		w.Uint32(v)
	}
	cred.Uint32(0) // stamp
	cred.String("baton")
	cred.Uint32(uint32(os.Geteuid()))
	cred.Uint32(uint32(os.Getegid()))
	cred.Uint32(0) // no further groups
	w.Uint32(1)
	w.Opaque(cred.Buf)
	w.Uint32(0)
	w.Uint32(0)
	if args != nil {
		args(&w)
	}
	return w.Buf
}

// readRecord reads one record of at most maxReply bytes in any fragments.
func readRecord(r io.Reader) ([]byte, error) {
	var rec []byte
	for frag := 0; ; frag++ {
		var h [4]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(h[:])
		last := n>>31 == 1
		if n &^= 1 << 31; int(n) > maxReply-len(rec) || frag > 64 {
			return nil, fmt.Errorf("rpcbind: reply longer than %d bytes", maxReply)
		}
		at := len(rec)
		rec = append(rec, make([]byte, n)...)
		if _, err := io.ReadFull(r, rec[at:]); err != nil {
			return nil, err
		}
		if last {
			return rec, nil
		}
	}
}

// decodeReply checks a reply message's header and returns the results.
func decodeReply(b []byte, xid uint32) ([]byte, error) {
	r := xdr.NewReader(b)
	if got := r.Uint32(); r.Err() == nil && got != xid {
		return nil, errors.New("rpcbind: reply to another call")
	}
	mtype, stat := r.Uint32(), r.Uint32()
	if r.Err() == nil && (mtype != 1 || stat > 1) {
		return nil, errors.New("rpcbind: not a reply")
	}
	if stat == 1 {
		return nil, errors.New("rpcbind: call denied")
	}
	r.Uint32()    // verifier flavor
	r.Opaque(400) // verifier
	accept := r.Uint32()
	switch {
	case r.Err() != nil:
		return nil, fmt.Errorf("rpcbind: reply: %w", r.Err())
	case accept >= 1 && accept <= 3:
		return nil, errUnavail
	case accept != 0:
		return nil, fmt.Errorf("rpcbind: call failed, accept_stat %d", accept)
	}
	return r.Rest(), nil
}

func (c *client) getport(ctx context.Context, prog, vers, prot uint32) (uint16, error) {
	return portResult(c.call(ctx, VersPortmap, pmapGetport, func(w *xdr.Writer) { putMapping(w, prog, vers, prot, 0) }))
}

// portResult reads GETPORT's result.
func portResult(res []byte, err error) (uint16, error) {
	if err != nil {
		return 0, err
	}
	r := xdr.NewReader(res)
	p := r.Uint32()
	if r.Err() != nil || p > 65535 {
		return 0, errors.New("rpcbind: GETPORT: bad reply")
	}
	return uint16(p), nil
}

func putMapping(w *xdr.Writer, prog, vers, prot, port uint32) {
	for _, v := range []uint32{prog, vers, prot, port} {
		w.Uint32(v)
	}
}

func putRpcb(w *xdr.Writer, prog, vers uint32, netid, addr, owner string) {
	w.Uint32(prog)
	w.Uint32(vers)
	w.String(netid)
	w.String(addr)
	w.String(owner)
}

// ErrNotRegistered means that a host's rpcbind does not know the program.
var ErrNotRegistered = errors.New("rpcbind: program not registered")

// GetPort asks the rpcbind at server (port 111 if 0) for the port of a
// program on netid (UDP, TCP, UDP6 or TCP6), with a socket of that kind bound
// to local if that is valid. IPv4 uses portmap 2, IPv6 rpcbind 4 and 3.
func GetPort(ctx context.Context, local netip.Addr, server netip.AddrPort, prog, vers uint32, netid string) (uint16, error) {
	if server.Port() == 0 {
		server = netip.AddrPortFrom(server.Addr(), 111)
	}
	network := "tcp"
	if netid == UDP || netid == UDP6 {
		network = "udp"
	}
	from := netip.AddrPort{}
	if local.IsValid() {
		from = netip.AddrPortFrom(local, 0)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ask := func(v, proc uint32, w *xdr.Writer) ([]byte, error) {
		c, err := sunrpc.Dial(ctx, network, from, server, Program, v, sunrpc.Cred{})
		if err != nil {
			return nil, err
		}
		defer c.Close()
		return c.Call(ctx, proc, w.Buf)
	}
	var port uint16
	var err error
	var w xdr.Writer
	if is6(netid) {
		putRpcb(&w, prog, vers, netid, "", "")
		port, err = addrResult(ask(Vers4, rpcbGetaddr, &w))
		var ae *sunrpc.AcceptError
		if errors.As(err, &ae) && ae.Stat == sunrpc.ProgMismatch {
			port, err = addrResult(ask(Vers3, rpcbGetaddr, &w))
		}
	} else {
		putMapping(&w, prog, vers, netidProto(netid), 0)
		port, err = portResult(ask(VersPortmap, pmapGetport, &w))
	}
	switch {
	case err != nil:
		return 0, fmt.Errorf("rpcbind at %s: %w", server, err)
	case port == 0:
		return 0, fmt.Errorf("rpcbind at %s: program %d version %d on %s: %w", server, prog, vers, netid, ErrNotRegistered)
	}
	return port, nil
}

// addrResult reads GETADDR's result; an empty address is port 0.
func addrResult(res []byte, err error) (uint16, error) {
	if err != nil {
		return 0, err
	}
	r := xdr.NewReader(res)
	ua := string(r.String(maxAddr))
	if r.Err() != nil || ua == "" {
		return 0, r.Err()
	}
	a, err := ParseUaddr(ua)
	return a.Port(), err
}

// System is the rpcbind of this machine. The zero System is the usual one.
type System struct {
	Addr   string // TCP address; "": 127.0.0.1:111
	Socket string // unix socket; "": /run/rpcbind.sock
}

func (s System) addr() string {
	if s.Addr == "" {
		return "127.0.0.1:111"
	}
	return s.Addr
}

func (s System) socket() string {
	if s.Socket == "" {
		return "/run/rpcbind.sock"
	}
	return s.Socket
}

// Available tells whether the system's rpcbind answers within a second.
func (s System) Available(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.addr())
	if err != nil {
		return false
	}
	defer conn.Close()
	_, err = (&client{c: conn}).call(ctx, VersPortmap, pmapNull, nil)
	return err == nil
}

// dial connects for registrations: over loopback TCP from a privileged port,
// else over the unix socket, which tells rpcbind our uid. The TCP way comes
// first since it cannot reach the rpcbind of another network namespace.
func (s System) dial(ctx context.Context) (*client, error) {
	var first error
	for range 8 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 600 + rand.IntN(1024-600)}}
		conn, err := d.DialContext(ctx, "tcp", s.addr())
		if err == nil {
			return &client{c: conn}, nil
		}
		if first == nil {
			first = err
		}
		if !errors.Is(err, syscall.EADDRINUSE) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			break
		}
	}
	if !errors.Is(first, os.ErrPermission) && !errors.Is(first, syscall.EADDRINUSE) && !errors.Is(first, syscall.EADDRNOTAVAIL) {
		return nil, fmt.Errorf("rpcbind: %w", first)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.socket())
	if err != nil {
		return nil, fmt.Errorf("rpcbind: no privileged port (%w), and %w", first, err)
	}
	return &client{c: conn}, nil
}
