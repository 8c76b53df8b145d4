package sunrpc

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"github.com/baton-nfs/baton/internal/xdr"
)

const (
	// outKeep is the largest reply buffer a recycled Call keeps. It is also the largest reply that is
	// copied into the connection's queue; longer ones are queued by reference.
	outKeep = 16 << 10
	// payloadCopy is the largest payload that is copied: an iovec and a held buffer cost more.
	payloadCopy = 2 << 10
)

// Call is one RPC in progress. The transport hands it to Handler.ServeRPC, after which it belongs to the
// handler until exactly one of Finish, Fail, AuthError or Drop is called, from any goroutine. After that
// the Call is recycled and must not be touched.
type Call struct {
	Conn                  *Conn          // nil for UDP
	Remote, Local         netip.AddrPort // peer, and the service address the call arrived at
	XID, Prog, Vers, Proc uint32
	Cred                  Cred
	// Raw is everything from the credential's body on: credential body, verifier, arguments. Note that
	// Linux clients put a new stamp into the credential of a retransmission; Args are repeated exactly.
	// Raw and Args alias the receive buffer and are valid until the call is finished.
	Raw  []byte
	Args []byte // undecoded arguments
	// Out takes the result. The transport's header stands in front of it: handlers may truncate Out to
	// an offset they took from Out.Len, or call ResetOut, never Truncate(0).
	Out xdr.Writer
	// State is free for the handler and is kept when the Call is reused, so that it can cache per-call
	// memory. A recycled Call may also come with a nil State.
	State any

	srv     *Server
	ep      *endpoint
	udp     *udpSocket
	pktinfo []byte
	in      *buf // holds Raw and Args
	size    int  // record bytes charged to the connection's in-flight bytes
	fn      func(*Call)
	// weight is the length of the reply as given to GoReply, admitted whether the gate let it through,
	// reserved what of it has no buffer yet.
	weight   int
	admitted bool
	reserved int64
	payload  []byte
	bulks    []*buf
	outBuf   *buf   // behind Out.Buf after GrowOut
	base     []byte // the Call's own reply buffer, replyHeader long
	low      uint32
	high     uint32
}

var callPool = sync.Pool{New: func() any {
	c := new(Call)
	c.base = make([]byte, replyHeader, 1024)
	c.Out.Buf = c.base
	return c
}}

func newCall(s *Server, ep *endpoint, in *buf, size int) *Call {
	c := callPool.Get().(*Call)
	c.srv, c.ep, c.in, c.size = s, ep, in, size
	c.ResetOut()
	return c
}

// ResetOut discards what was appended to Out and any payload.
func (c *Call) ResetOut() {
	c.Out.Buf = c.Out.Buf[:replyHeader]
	c.payload = nil
}

// GrowOut gives Out room for n more bytes (at most MaxPayload) from the buffer pool, so that long results
// such as directory listings need no allocation and are sent without another copy.
func (c *Call) GrowOut(n int) {
	if cap(c.Out.Buf)-len(c.Out.Buf) >= n || c.outBuf != nil {
		return
	}
	b := getBuf(&c.srv.mem, len(c.Out.Buf)+n)
	m := copy(b.b, c.Out.Buf)
	c.outBuf = b
	c.Out.Buf = b.b[:m]
	c.charge(b)
}

// Go runs f(c) on the server's bounded worker pool. It may wait there for a free worker and, when the
// connection's peer does not read its replies, for room in the reply queue. f runs exactly once, also
// when the connection is closed meanwhile. ServeRPC must return right after Go.
func (c *Call) Go(f func(*Call)) {
	c.fn = f
	c.srv.pool.Submit(c)
}

func (c *Call) run() {
	if c.Conn != nil && c.weight > 0 && c.Conn.closed.Load() {
		c.discard()
		return
	}
	if c.Conn != nil && !c.admitted && (c.Conn.hold(c) || c.weight > 0 && !c.srv.admitBulk(c)) {
		return
	}
	f := c.fn
	c.fn = nil
	f(c)
}

// Bulk returns a page-aligned buffer of n bytes with arbitrary content; n must be at most MaxPayload. It
// belongs to the call and goes back to the pool when the reply has left or the call is dropped.
func (c *Call) Bulk(n int) []byte {
	b := getBuf(&c.srv.mem, min(n, MaxPayload))
	c.bulks = append(c.bulks, b)
	c.charge(b)
	return b.b[:n:n]
}

// SetPayload makes the transport send p, XDR-padded, after Out without copying it. p is usually a part
// of Bulk's buffer; other memory must not change any more. The result's length word is the handler's to
// append to Out.
func (c *Call) SetPayload(p []byte) { c.payload = p }

// Finish sends the reply: accepted, SUCCESS, Out, payload.
func (c *Call) Finish() { c.accept(0) }

// Fail sends an accepted reply with status s and no result; Out and payload are discarded.
func (c *Call) Fail(s AcceptStat) {
	c.ResetOut()
	if s == ProgMismatch {
		c.Out.Uint32(c.low)
		c.Out.Uint32(c.high)
	}
	if s == GarbageArgs {
		c.ep.garbage.Add(1)
	}
	c.accept(s)
}

// AuthError denies the call with the auth_stat given.
func (c *Call) AuthError(stat uint32) {
	c.ep.authErrors.Add(1)
	c.payload = nil
	c.Out.Buf = appendDenied(c.Out.Buf[:0], c.XID, authError)
	c.Out.Uint32(stat)
	c.send()
}

func (c *Call) denyMismatch() {
	c.payload = nil
	c.Out.Buf = appendDenied(c.Out.Buf[:0], c.XID, rpcMismatch)
	c.Out.Uint32(rpcVersion)
	c.Out.Uint32(rpcVersion)
	c.send()
}

// Drop ends the call without a reply.
func (c *Call) Drop() {
	c.ep.dropped.Add(1)
	c.discard()
}

func (c *Call) discard() {
	c.bulkEnd()
	if c.Conn != nil {
		c.Conn.unanswered(c)
	}
	c.free()
}

func (c *Call) accept(s AcceptStat) {
	appendAccepted(c.Out.Buf[:0], c.XID, s)
	c.send()
}

func (c *Call) send() {
	c.bulkEnd()
	n := len(c.Out.Buf) - markSize + len(c.payload) + xdr.Pad(len(c.payload))
	binary.BigEndian.PutUint32(c.Out.Buf, 1<<31|uint32(n))
	if c.Conn != nil {
		c.Conn.enqueue(c)
	} else {
		c.udp.send(c)
	}
	c.free()
}

// free recycles the Call; what the reply queue took over was removed from it before.
func (c *Call) free() {
	if c.in != nil {
		c.in.release()
	}
	for i, b := range c.bulks {
		b.release()
		c.bulks[i] = nil
	}
	c.bulks = c.bulks[:0]
	if c.outBuf == nil && cap(c.Out.Buf) <= outKeep {
		c.base = c.Out.Buf[:replyHeader] // it may have grown
	}
	c.Out.Buf = c.base
	if c.outBuf != nil {
		c.outBuf.release()
		c.outBuf = nil
	}
	if u := c.udp; u != nil {
		u.done()
	}
	c.Conn, c.srv, c.ep, c.udp, c.in, c.fn, c.weight = nil, nil, nil, nil, nil, nil, 0
	c.Raw, c.Args, c.payload = nil, nil, nil
	c.pktinfo = c.pktinfo[:0]
	callPool.Put(c)
}
