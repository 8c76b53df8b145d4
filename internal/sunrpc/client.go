package sunrpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
)

// Errors that Client.Call returns for replies other than success; see also AcceptError and DenyError.
var (
	ErrBadReply   = errors.New("sunrpc: malformed reply")
	ErrBadNetwork = errors.New("sunrpc: network is neither tcp nor udp")
)

// AcceptError is an accepted reply other than SUCCESS.
type AcceptError struct {
	Stat      AcceptStat
	Low, High uint32 // versions served, with ProgMismatch
}

func (e *AcceptError) Error() string {
	switch e.Stat {
	case ProgUnavail:
		return "sunrpc: program unavailable"
	case ProgMismatch:
		return fmt.Sprintf("sunrpc: program version mismatch, server has %d to %d", e.Low, e.High)
	case ProcUnavail:
		return "sunrpc: procedure unavailable"
	case GarbageArgs:
		return "sunrpc: garbage arguments"
	}
	return fmt.Sprintf("sunrpc: accept_stat %d", uint32(e.Stat))
}

// DenyError is a denied call: an authentication error, or, with Mismatch, an RPC version mismatch.
type DenyError struct {
	Mismatch bool
	AuthStat uint32
}

func (e *DenyError) Error() string {
	if e.Mismatch {
		return "sunrpc: RPC version mismatch"
	}
	return fmt.Sprintf("sunrpc: authentication error %d", e.AuthStat)
}

const (
	maxClientReply = 4 << 20
	// First and longest wait before a datagram is sent again.
	udpRetry    = 500 * time.Millisecond
	udpRetryMax = 8 * time.Second
)

// Client makes calls to one program of one server; any number at a time. It does not reconnect: after an
// error of the connection, every Call fails and the owner dials anew.
type Client struct {
	nc         net.Conn
	udp        bool
	prog, vers uint32
	cred       []byte // encoded credential and verifier
	done       chan struct{}

	wmu sync.Mutex // writes

	mu      sync.Mutex
	xid     uint32
	pending map[uint32]chan []byte
	err     error
}

// Dial connects to remote over network "tcp" or "udp", from local unless that is the zero AddrPort. The
// credential is sent with every call; AUTH_SYS credentials carry an empty machine name.
func Dial(ctx context.Context, network string, local, remote netip.AddrPort, prog, vers uint32, cred Cred) (*Client, error) {
	var d net.Dialer
	switch network {
	case "tcp":
		if local.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(local)
		}
	case "udp":
		if local.IsValid() {
			d.LocalAddr = net.UDPAddrFromAddrPort(local)
		}
	default:
		return nil, ErrBadNetwork
	}
	nc, err := d.DialContext(ctx, network, remote.String())
	if err != nil {
		return nil, fmt.Errorf("sunrpc: %w", err)
	}
	if t, ok := nc.(*net.TCPConn); ok {
		// A socket that waits (TIME-WAIT) for what may still arrive would occupy a reserved port for a minute, and
		// must not be left of an address that moves away. Whoever closes has what it wanted, or has given up.
		_ = t.SetLinger(0)
	}
	c := &Client{
		nc: nc, udp: network == "udp", prog: prog, vers: vers, cred: appendCred(nil, &cred),
		done: make(chan struct{}), xid: rand.Uint32(), pending: make(map[uint32]chan []byte),
	}
	go c.read()
	return c, nil
}

func appendCred(b []byte, cr *Cred) []byte {
	w := xdr.Writer{Buf: b}
	w.Uint32(cr.Flavor)
	if cr.Flavor == AuthSys {
		n := min(int(cr.NGIDs), maxGIDs)
		w.Uint32(uint32(20 + 4*n))
		w.Uint32(0) // stamp
		w.Uint32(0) // machine name
		w.Uint32(cr.UID)
		w.Uint32(cr.GID)
		w.Uint32(uint32(n))
		for _, g := range cr.GIDs[:n] {
			w.Uint32(g)
		}
	} else {
		w.Uint32(0)
	}
	w.Uint32(AuthNone)
	w.Uint32(0)
	return w.Buf
}

// LocalAddr returns the client's own address.
func (c *Client) LocalAddr() netip.AddrPort {
	switch a := c.nc.LocalAddr().(type) {
	case *net.TCPAddr:
		return a.AddrPort()
	case *net.UDPAddr:
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// Close ends the client; calls in progress fail. A TCP connection is reset, and nothing of it remains here. It waits
// for the client's goroutine.
func (c *Client) Close() error {
	err := c.nc.Close()
	<-c.done
	return err
}

// Call calls procedure proc with encoded arguments and returns the encoded result, which the caller
// owns. Errors: AcceptError, DenyError, ErrBadReply, ctx's, and those of the connection. Over UDP the
// call is sent again, with the same xid, until ctx ends.
func (c *Client) Call(ctx context.Context, proc uint32, args []byte) ([]byte, error) {
	ch := make(chan []byte, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	c.xid++
	xid := c.xid
	c.pending[xid] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, xid)
		c.mu.Unlock()
	}()

	w := xdr.Writer{Buf: make([]byte, 0, markSize+24+len(c.cred)+len(args))}
	w.Uint32(1<<31 | uint32(24+len(c.cred)+len(args)))
	w.Uint32(xid)
	w.Uint32(msgCall)
	w.Uint32(rpcVersion)
	w.Uint32(c.prog)
	w.Uint32(c.vers)
	w.Uint32(proc)
	w.Buf = append(append(w.Buf, c.cred...), args...)
	msg := w.Buf
	if c.udp {
		msg = msg[markSize:]
	}

	var resend <-chan time.Time
	for wait := udpRetry; ; wait = min(2*wait, udpRetryMax) {
		c.wmu.Lock()
		if dl, ok := ctx.Deadline(); ok {
			_ = c.nc.SetWriteDeadline(dl) // an error shows in Write
		} else {
			_ = c.nc.SetWriteDeadline(time.Time{})
		}
		n, err := c.nc.Write(msg)
		c.wmu.Unlock()
		if err != nil && !c.udp {
			if n > 0 {
				_ = c.nc.Close() // a record was cut in two: the stream is of no use any more
			}
			return nil, fmt.Errorf("sunrpc: %w", err)
		}
		if c.udp {
			resend = time.After(wait)
		}
		select {
		case rep := <-ch:
			return decodeReply(rep)
		case <-ctx.Done():
			return nil, fmt.Errorf("sunrpc: %w", ctx.Err())
		case <-c.done:
			select {
			case rep := <-ch:
				return decodeReply(rep)
			default:
			}
			return nil, c.err
		case <-resend:
		}
	}
}

// decodeReply decodes everything after the xid.
func decodeReply(b []byte) ([]byte, error) {
	r := xdr.NewReader(b)
	if r.Uint32() != msgReply {
		return nil, ErrBadReply
	}
	switch r.Uint32() {
	case msgAccepted:
		r.Uint32()
		r.Opaque(maxAuthBody)
		stat := AcceptStat(r.Uint32())
		var e *AcceptError
		if stat != 0 {
			e = &AcceptError{Stat: stat}
			if stat == ProgMismatch {
				e.Low, e.High = r.Uint32(), r.Uint32()
			}
		}
		if r.Err() != nil {
			return nil, ErrBadReply
		}
		if e != nil {
			return nil, e
		}
		return r.Rest(), nil
	case msgDenied:
		e := &DenyError{Mismatch: r.Uint32() == rpcMismatch}
		if !e.Mismatch {
			e.AuthStat = r.Uint32()
		}
		if r.Err() != nil {
			return nil, ErrBadReply
		}
		return nil, e
	}
	return nil, ErrBadReply
}

// read distributes replies until the connection ends.
func (c *Client) read() {
	defer close(c.done)
	var err error
	buf := make([]byte, maxDatagram)
	for {
		var rep []byte
		if c.udp {
			var n int
			n, err = c.nc.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				break
			}
			if err != nil {
				// Port unreachable, say: the server may be back for the next attempt. The pause
				// keeps a lasting error from spinning.
				time.Sleep(time.Millisecond)
				continue
			}
			rep = append([]byte(nil), buf[:n]...)
		} else if rep, err = readRecord(c.nc); err != nil {
			break
		}
		if len(rep) < 4 {
			continue
		}
		xid := binary.BigEndian.Uint32(rep)
		c.mu.Lock()
		ch := c.pending[xid]
		delete(c.pending, xid) // a second reply to a resent call finds nobody
		c.mu.Unlock()
		if ch != nil {
			ch <- rep[4:]
		}
	}
	c.mu.Lock()
	c.err = fmt.Errorf("sunrpc: %w", err)
	c.mu.Unlock()
	_ = c.nc.Close() // may be what ended the loop
}

// readRecord reads one record of at most maxClientReply bytes and a bounded number of fragments.
func readRecord(r io.Reader) ([]byte, error) {
	var rec []byte
	var mark [markSize]byte
	for range 1024 {
		if _, err := io.ReadFull(r, mark[:]); err != nil {
			return nil, err
		}
		m := binary.BigEndian.Uint32(mark[:])
		n := int(m & (1<<31 - 1))
		if n > maxClientReply-len(rec) {
			return nil, errRecordSize
		}
		at := len(rec)
		rec = append(rec, make([]byte, n)...)
		if _, err := io.ReadFull(r, rec[at:]); err != nil {
			return nil, err
		}
		if m>>31 != 0 {
			return rec, nil
		}
	}
	return nil, errFragments
}
