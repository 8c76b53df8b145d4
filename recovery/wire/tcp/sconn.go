package tcp

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// sconn is a connection at the server. One goroutine reads requests and gives
// them to the target; the target's done puts the reply into the sender's queue.
type sconn struct {
	s      *Server
	nc     net.Conn
	br     *bufio.Reader
	snd    sender
	w      watch
	kind   Kind
	node   string
	since  time.Time // accepted
	window uint16
	target *served
	pong   pongFrame
	mem    budget

	t       wire.Target // the target's, for this connection
	blocker wire.Blocker
	closer  io.Closer
	given   sync.WaitGroup // requests at workers until Handle has returned

	stop     chan struct{} // closed by close
	draining chan struct{} // closed by drain
	halt     chan struct{} // closed by either
	wake     chan struct{} // a request has ended
	gone     chan struct{} // the reader has ended

	handling atomic.Uint64 // tag of the request that the reader is in Handle with
	mu       sync.Mutex
	err      error
	drained  bool
	inflight int // requests that count against the window
	polls    int
	used     int64 // memory of requests
}

// call is a request at the server, from its first byte until its reply has
// been sent. It owns the memory that request and reply use.
type call struct {
	c    *sconn
	req  wire.Request
	rep  wire.Reply
	op   wire.Op
	tag  uint64
	msg  []byte
	bulk *[]byte
	cost int64
	poll bool
	done func()
}

func newSconn(s *Server, nc net.Conn) *sconn {
	c := &sconn{
		s: s, nc: nc, since: time.Now(), br: bufio.NewReaderSize(nc, readBuffer), stop: make(chan struct{}), draining: make(chan struct{}),
		halt: make(chan struct{}), wake: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	c.pong.c = c
	c.mem.free = s.o.ConnMemory
	c.snd.init(nc, s.o.Timeouts.Write, c.close)
	return c
}

// accept lets the target know the connection.
func (c *sconn) accept(session uint64) {
	c.t = c.target.t
	if a, ok := c.t.(wire.Acceptor); ok {
		c.t = a.Accept(wire.Peer{Node: c.node, Session: session})
		c.closer, _ = c.t.(io.Closer)
	}
	var ok bool
	if c.blocker, ok = c.t.(wire.Blocker); !ok {
		c.blocker, _ = c.target.t.(wire.Blocker)
	}
}

// close ends the connection at once.
func (c *sconn) close(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	if !c.drained {
		close(c.halt)
	}
	c.mu.Unlock()
	close(c.stop)
	_ = rawConn(c.nc).Close()
	c.snd.close(err)
}

// drain makes the reader stop at the next frame.
func (c *sconn) drain() {
	c.mu.Lock()
	if !c.drained {
		c.drained = true
		close(c.draining)
		if c.err == nil {
			close(c.halt)
		}
	}
	c.mu.Unlock()
	_ = rawConn(c.nc).SetReadDeadline(time.Unix(1, 0))
}

// run is the reader goroutine.
func (c *sconn) run() {
	last, err := c.read()
	select {
	case <-c.draining:
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, errHalted) {
			c.farewell(last)
			err = ErrClosed
		}
	default:
	}
	switch {
	case errors.Is(err, ErrPeer):
		c.s.violations.Add(1)
		c.s.log.Warn("connection closed", "node", c.node, "peer", c.nc.RemoteAddr(), "target", c.target.name, "err", err)
	case err != io.EOF:
		c.s.log.Debug("connection ended", "node", c.node, "peer", c.nc.RemoteAddr(), "target", c.target.name, "err", err)
	}
	c.close(err)
}

// errHalted: the reader stopped while it waited for room.
var errHalted = errors.New("halted")

// farewell tells the client which requests have been read, and waits until the
// answers of all but polls have been taken.
func (c *sconn) farewell(last uint64) {
	c.w.set(working)
	c.snd.put(&goAwayFrame{last}, false)
	c.snd.flush(0)
	for {
		c.mu.Lock()
		n := c.inflight
		c.mu.Unlock()
		if n == 0 {
			break
		}
		select {
		case <-c.wake:
		case <-c.stop:
			return
		}
	}
	c.snd.drained()
	if w, ok := c.nc.(interface{ CloseWrite() error }); ok {
		_ = c.nc.SetWriteDeadline(time.Now().Add(time.Second))
		_ = w.CloseWrite()
	}
	raw := rawConn(c.nc)
	if c.nc != raw {
		if w, ok := raw.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		}
	}
	discard(raw, time.Second)
}

// discard reads until the other side has closed, so that its unread data do
// not turn our close into a reset which destroys what it has not read yet.
func discard(nc net.Conn, limit time.Duration) {
	_ = nc.SetReadDeadline(time.Now().Add(limit))
	var b [4096]byte
	for range 1 << 16 {
		if _, err := nc.Read(b[:]); err != nil {
			return
		}
	}
}

// read serves requests until the connection ends or is drained; last is the
// tag of the last one that was read.
func (c *sconn) read() (last uint64, err error) {
	for {
		select {
		case <-c.draining:
			return last, nil
		default:
		}
		c.w.set(waiting)
		c.need(prefixSize)
		if _, err := c.br.Peek(1); err != nil {
			return last, err
		}
		c.w.set(inFrame)
		h, err := c.br.Peek(prefixSize)
		if err != nil {
			return last, truncated(err)
		}
		var pre prefix
		if err := pre.decode(h); err != nil {
			return last, err
		}
		_, _ = c.br.Discard(prefixSize)
		switch pre.typ {
		case framePing:
			c.pong.send()
			continue
		case frameRequest:
		default:
			return last, fmt.Errorf("%w: frame of type %d from a client", ErrPeer, pre.typ)
		}
		if pre.tag != last+1 {
			return last, fmt.Errorf("%w: request %d after %d", ErrPeer, pre.tag, last)
		}
		if err := c.request(&pre); err != nil {
			return last, err
		}
		last = pre.tag
	}
}

// need sends the replies that are queued before a read that may block.
func (c *sconn) need(n int) {
	if c.br.Buffered() < n {
		c.snd.flush(0)
	}
}

// request reads one request and gives it to the target.
func (c *sconn) request(pre *prefix) error {
	x := c.s.calls.Get().(*call)
	x.c, x.tag = c, pre.tag
	if cap(x.msg) < int(pre.msg) {
		x.msg = make([]byte, pre.msg)
	}
	x.msg = x.msg[:pre.msg]
	c.need(len(x.msg))
	if _, err := io.ReadFull(c.br, x.msg); err != nil {
		x.recycle()
		return truncated(err)
	}
	c.s.requests.Add(1)
	op, xid, ok := wire.RequestID(x.msg)
	if !ok {
		x.recycle()
		return fmt.Errorf("%w: request of %d bytes without a header", ErrPeer, pre.msg)
	}
	x.op = op
	err := wire.DecodeRequest(x.msg, &x.req)
	want := 0
	if err == nil {
		want = wire.RequestBulk(x.msg)
	}
	if err == nil && (want > c.s.o.MaxBulk || op.SendsBulk() && int(pre.bulk) != want || !op.SendsBulk() && pre.bulk != 0) {
		err = fmt.Errorf("%w: bulk of %d bytes in a frame with %d", ErrPeer, want, pre.bulk)
	}
	if err == nil && (c.kind == Health && op != wire.OpPing && op != wire.OpBeat || c.kind != Health && op == wire.OpBeat) {
		err = fmt.Errorf("operation %d on a connection of kind %v", op, c.kind)
	}
	x.poll = op.Polls()
	if err != nil {
		// The frame is intact: only this request is refused.
		c.s.bad.Add(1)
		c.s.log.Debug("bad request", "node", c.node, "target", c.target.name, "err", err)
		if _, err := c.br.Discard(int(pre.bulk)); err != nil {
			x.recycle()
			return truncated(err)
		}
		x.poll = false
		if !c.room() {
			x.recycle()
			return errHalted
		}
		return c.refuse(x, xid, wire.ErrProto)
	}
	if x.poll {
		c.mu.Lock()
		full := c.polls >= c.s.o.MaxPolls
		if !full {
			c.polls++
		}
		c.mu.Unlock()
		if full {
			x.poll = false
			return c.refuse(x, xid, wire.ErrJukebox)
		}
		return c.execute(x)
	}
	if !c.room() || !c.reserve(x, want) {
		x.recycle()
		return errHalted
	}
	if want > 0 {
		x.bulk = getBuf(want)
		x.req.Bulk = *x.bulk
		if op.SendsBulk() {
			c.w.set(inFrame)
			c.need(want)
			if _, err := io.ReadFull(c.br, x.req.Bulk); err != nil {
				c.end(x)
				return truncated(err)
			}
		}
	}
	return c.execute(x)
}

// execute lets the target execute a request that end will be called for.
func (c *sconn) execute(x *call) error {
	c.w.set(working)
	c.handling.Store(x.tag)
	switch {
	case !x.poll && c.t.TryHandle(&x.req, &x.rep):
		x.finish()
	case c.blocker != nil && c.blocker.MayBlock(x.op):
		c.handling.Store(0)
		c.given.Add(1)
		c.target.pool.Submit(x)
	default:
		// It may take long: what is finished does not wait for it.
		c.snd.kickQueued()
		c.t.Handle(&x.req, &x.rep, x.done)
	}
	c.handling.Store(0)
	return nil
}

// work runs in a worker.
func (x *call) work() {
	c := x.c
	defer c.given.Done()
	select {
	case <-c.stop: // to the client it is lost like one that was on the wire
		c.end(x)
	default:
		c.t.Handle(&x.req, &x.rep, x.done)
	}
}

// refuse answers a request that the target does not get.
func (c *sconn) refuse(x *call, xid uint64, st wire.Status) error {
	c.mu.Lock()
	c.inflight++
	c.mu.Unlock()
	x.rep.XID, x.rep.Status = xid, st
	c.handling.Store(x.tag)
	x.finish()
	c.handling.Store(0)
	return nil
}

// room waits until the client has fewer requests in work than it was granted.
// Clients that keep to their credits never make it wait for long.
func (c *sconn) room() bool {
	for {
		c.mu.Lock()
		ok := c.inflight < int(c.window)
		c.mu.Unlock()
		if ok {
			return true
		}
		c.w.set(working)
		c.snd.flush(0)
		select {
		case <-c.wake:
		case <-c.halt:
			return false
		}
	}
}

// reserve takes the memory that a request needs for its bulk and a long reply.
func (c *sconn) reserve(x *call, bulk int) bool {
	x.cost = bufCost(bulk)
	switch x.op {
	case wire.OpReaddir:
		// Attributes make entries up to eight times as long as the budget counts.
		x.cost += min(8*int64(min(x.req.Count, 1<<20))+4<<10, wire.MaxReplySize)
	case wire.OpLockList, wire.OpLockHosts:
		x.cost += 1 << 20
	}
	x.cost = min(x.cost, c.s.o.ConnMemory)
	if x.cost > 0 {
		c.mu.Lock()
		c.used += x.cost
		c.mu.Unlock()
		if !c.claim(&c.mem, x.cost) {
			c.unuse(x)
			return false
		}
		if !c.claim(&c.s.mem, x.cost) {
			c.mem.give(x.cost)
			c.unuse(x)
			return false
		}
	}
	c.mu.Lock()
	c.inflight++
	c.mu.Unlock()
	return true
}

// claim takes n bytes, which are part of c.used, from b. One request of each
// connection gets them in any case: what others hold may be waiting for it.
func (c *sconn) claim(b *budget, n int64) bool {
	for {
		c.mu.Lock()
		only := c.used == n
		c.mu.Unlock()
		if b.try(n, only) {
			return true
		}
		c.w.set(working)
		c.snd.flush(0)
		if got, halted := b.take(n, c.halt, c.wake); got || halted {
			return got
		}
	}
}

func (c *sconn) unuse(x *call) {
	c.mu.Lock()
	c.used -= x.cost
	c.mu.Unlock()
	x.cost = 0
}

// finish is the target's done.
func (x *call) finish() {
	c, tag := x.c, x.tag
	// Large replies leave at once.
	large := x.rep.Count >= copyBulk
	if !c.snd.put(x, large) {
		c.end(x)
		return
	}
	// x may be gone by now. While the reader is still at this request it will
	// find the reply in the queue before it waits for input; asked before put,
	// that would not be certain.
	if !large && c.handling.Load() != tag {
		c.snd.kickQueued()
	}
}

// encode implements outgoing.
func (x *call) encode(b []byte) (head, bulk []byte, ok bool) {
	n := wire.ReplyBulk(x.op, &x.rep)
	if n > len(x.req.Bulk) {
		x.c.s.log.Error("target gives more data than asked for", "target", x.c.target.name, "count", n, "asked", len(x.req.Bulk))
		xid := x.rep.XID
		x.rep.Reset()
		x.rep.XID, x.rep.Status = xid, wire.ErrServerFault
		n = 0
	}
	at := len(b)
	pre := prefix{typ: frameReply, window: x.c.window, bulk: uint32(n), tag: x.tag}
	b = pre.append(b)
	b = wire.AppendReply(b, x.op, &x.rep)
	be.PutUint32(b[at+4:], uint32(len(b)-at-prefixSize))
	return b, x.req.Bulk[:n], true
}

// sent implements outgoing.
func (x *call) sent(error) { x.c.end(x) }

// end gives back what a request has taken.
func (c *sconn) end(x *call) {
	c.mu.Lock()
	if x.poll {
		c.polls--
	} else {
		c.inflight--
	}
	c.used -= x.cost
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	if x.cost > 0 {
		c.mem.give(x.cost)
		c.s.mem.give(x.cost)
	}
	x.recycle()
}

// Larger parts of calls are not kept.
const (
	keepMsg     = 8 << 10
	keepData    = 64 << 10
	keepEntries = 256
)

func (x *call) recycle() {
	s := x.c.s
	if x.bulk != nil {
		putBuf(x.bulk)
	}
	logIDs, epochs, lock := x.req.LogIDs[:0], x.req.Epochs[:0], x.req.Lock
	x.req.Reset()
	if cap(epochs) <= keepEntries && cap(logIDs) <= keepEntries {
		x.req.LogIDs, x.req.Epochs = logIDs, epochs
	}
	x.req.Lock = lock
	x.rep.Reset()
	if cap(x.rep.Data) > keepData || cap(x.rep.Entries) > keepEntries {
		x.rep = wire.Reply{}
	}
	if cap(x.msg) > keepMsg {
		x.msg = nil
	}
	x.c, x.bulk, x.cost, x.poll = nil, nil, 0, false
	s.calls.Put(x)
}

// pongFrame answers pings; one answer serves all that came before it.
type pongFrame struct {
	c      *sconn
	queued atomic.Bool
}

func (p *pongFrame) send() {
	if p.queued.CompareAndSwap(false, true) {
		p.c.snd.put(p, false)
	}
}

func (p *pongFrame) encode(b []byte) ([]byte, []byte, bool) {
	p.queued.Store(false)
	pre := prefix{typ: framePong}
	return pre.append(b), nil, true
}

func (p *pongFrame) sent(error) {}

type goAwayFrame struct{ last uint64 }

func (g *goAwayFrame) encode(b []byte) ([]byte, []byte, bool) {
	pre := prefix{typ: frameGoAway, tag: g.last}
	return pre.append(b), nil, true
}

func (g *goAwayFrame) sent(error) {}

// writer sends replies that are given outside the reader, and watches over the
// timeouts.
func (c *sconn) writer() {
	defer c.s.wg.Done()
	every := c.s.o.Timeouts.tick()
	t := time.NewTicker(every)
	defer t.Stop()
	dog := watchdog{t: &c.s.o.Timeouts}
	for {
		select {
		case <-c.stop:
			return
		case <-c.snd.wake:
			gather()
			c.snd.flush(0)
		case <-t.C:
			_, dead := dog.look(&c.w, every)
			if dog.same > 0 && dog.last&3 == working {
				// The client must not take for death that its pings are not read.
				c.pong.send()
				c.snd.flush(0)
			}
			if dead {
				c.s.timeouts.Add(1)
				c.s.log.Warn("connection closed", "node", c.node, "peer", c.nc.RemoteAddr(), "target", c.target.name, "err", fmt.Errorf("%w for %v", ErrTimeout, dog.same))
				c.close(ErrTimeout)
				return
			}
		}
	}
}
