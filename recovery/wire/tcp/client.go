package tcp

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Conn is a connection to a target. It implements wire.Conn.
//
// A request whose answer is lost ends with ErrTargetDown in its reply; Call and
// Start also give a *wire.LostError, which tells whether the target may have
// got it.
type Conn struct {
	o       DialOptions
	nc      net.Conn
	br      *bufio.Reader
	snd     sender
	w       watch
	node    string // of the server
	maxBulk int
	pool    sync.Pool // *pending
	ping    pingFrame
	stop    chan struct{}
	wg      sync.WaitGroup
	gone    chan struct{}
	open    sync.WaitGroup // requests accepted and not reported
	sibling atomic.Pointer[Conn]

	mu      sync.Mutex
	err     error
	away    bool // no new requests
	retired bool // ends when what was sent is answered
	window  int  // granted by the server
	credits int  // used of it
	lastTag uint64
	pend    map[uint64]*pending
	waitq   []*pending // for credits
}

var _ wire.Conn = (*Conn)(nil)

// pending is a request without answer. Its fields below are guarded by Conn.mu.
type pending struct {
	c    *Conn
	req  *wire.Request
	rep  *wire.Reply
	done func()      // Handle
	fn   func(error) // Start
	ch   chan struct{}
	err  error // result

	tag       uint64
	state     state
	credit    bool // counts against the window
	receiving bool // the reader writes into rep
	answered  bool // rep is complete
	dropped   bool // the server has not read it and will not
	abandoned error
	finished  bool // somebody reports the result
}

type state uint8

const (
	stateWait    state = iota // in waitq
	stateQueued               // in the sender's queue
	stateWriting              // the sender reads its memory
	stateSent
)

// Entries of Conn.pend whose caller has gone.
var abandonedCredit, abandonedPoll = &pending{credit: true}, &pending{}

// readBuffer is the size of a reader's buffer. Bulk bytes beyond what is in it
// are received straight into their destination.
const readBuffer = 32 << 10

// Node is the name of the node at the other end.
func (c *Conn) Node() string { return c.node }

// RemoteAddr is the address of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// MaxBulk is the largest Request.Bulk in bytes that the server takes.
func (c *Conn) MaxBulk() int { return c.maxBulk }

// Outstanding is the number of requests without answer and of those that wait
// for credits.
func (c *Conn) Outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pend) + len(c.waitq)
}

// Err is why the connection ended, or nil. After ErrGoAway requests that were
// sent are still answered.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && c.away {
		return ErrGoAway
	}
	return c.err
}

// Done is closed when the connection has ended and the result of every
// request has been reported.
func (c *Conn) Done() <-chan struct{} { return c.gone }

// TryHandle implements wire.Target: nothing can be answered without waiting.
func (c *Conn) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Handle implements wire.Target. It does not block; requests beyond the credits
// are sent when there are some. done runs in a goroutine of the connection and
// must not block. A lost answer appears as ErrTargetDown with XID 0.
func (c *Conn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	p := c.pool.Get().(*pending)
	p.req, p.rep, p.done = req, rep, done
	c.submit(p, true)
}

// Start is Handle whose callback gets what Call would return.
func (c *Conn) Start(req *wire.Request, rep *wire.Reply, done func(err error)) {
	p := c.pool.Get().(*pending)
	p.req, p.rep, p.fn = req, rep, done
	c.submit(p, true)
}

// Call implements wire.Conn. The error is nil or a *wire.LostError. When ctx
// ends while the request is being sent or its answer received, Call returns
// after that, since both use the caller's memory. An answer that comes later
// is thrown away.
func (c *Conn) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	if err := ctx.Err(); err != nil {
		lost(rep)
		return &wire.LostError{Err: err}
	}
	p := c.pool.Get().(*pending)
	p.req, p.rep = req, rep
	c.submit(p, false)
	select {
	case <-p.ch:
	case <-ctx.Done():
		if err, gone := c.abandon(p, ctx.Err()); gone {
			c.open.Done()
			lost(rep)
			return err // p may still be in a queue: it is not used again
		}
		<-p.ch
	}
	err := p.err
	c.recycle(p)
	return err
}

func lost(rep *wire.Reply) {
	rep.Reset()
	rep.Status = wire.ErrTargetDown
}

func (c *Conn) recycle(p *pending) {
	*p = pending{c: c, ch: p.ch}
	c.pool.Put(p)
}

// report tells the caller; the lock is not held and p.finished is set.
func (p *pending) report(err error) {
	c := p.c
	p.tell(err)
	c.open.Done()
}

func (p *pending) tell(err error) {
	if err != nil {
		lost(p.rep)
	}
	switch done, fn := p.done, p.fn; {
	case done != nil:
		p.c.recycle(p)
		done()
	case fn != nil:
		p.c.recycle(p)
		fn(err)
	default:
		p.err = err
		p.ch <- struct{}{}
	}
}

func notSent(err error) error { return &wire.LostError{Err: err} }
func unknown(err error) error { return &wire.LostError{Sent: true, Err: err} }

// submit takes a new request. Without async the caller may block, and sends.
func (c *Conn) submit(p *pending, async bool) {
	st := wire.CheckRequest(p.req)
	if st == wire.OK && len(p.req.Bulk) > c.maxBulk && (p.req.Op.SendsBulk() || p.req.Op.FillsBulk()) {
		st = wire.ErrProto
	}
	if st != wire.OK {
		p.finished = true
		p.rep.Reset()
		p.rep.XID, p.rep.Status = p.req.XID, st
		p.tell(nil)
		return
	}
	p.credit = !p.req.Op.Polls()
	c.mu.Lock()
	err := c.err
	if err == nil && c.away {
		err = ErrGoAway
	}
	if err != nil {
		p.finished = true
		c.mu.Unlock()
		p.tell(notSent(err))
		return
	}
	c.open.Add(1)
	if p.credit && (c.credits >= c.window || len(c.waitq) > 0) {
		c.waitq = append(c.waitq, p)
		c.mu.Unlock()
		c.admit()
		return
	}
	c.enqueue(p)
	c.mu.Unlock()
	c.queue(p, async)
	if !async {
		gather()
		c.snd.flush(4)
	}
}

// enqueue marks p as to be sent; queue follows after the lock is released.
func (c *Conn) enqueue(p *pending) {
	p.state = stateQueued
	if p.credit {
		c.credits++
	}
}

func (c *Conn) queue(p *pending, kick bool) {
	if !c.snd.put(p, kick) {
		p.sent(c.reason())
	}
}

func (c *Conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		return ErrClosed
	}
	return c.err
}

// encode implements outgoing.
func (p *pending) encode(b []byte) (head, bulk []byte, ok bool) {
	c := p.c
	c.mu.Lock()
	if p.finished { // abandoned
		c.mu.Unlock()
		return b, nil, false
	}
	if c.away || c.err != nil {
		err := c.err
		if err == nil {
			err = ErrGoAway
		}
		p.finished = true
		c.uncredit(p)
		c.mu.Unlock()
		p.report(notSent(err))
		return b, nil, false
	}
	p.state = stateWriting
	c.lastTag++
	p.tag = c.lastTag
	c.pend[p.tag] = p
	c.mu.Unlock()
	at := len(b)
	pre := prefix{typ: frameRequest, tag: p.tag}
	if p.req.Op.SendsBulk() {
		bulk = p.req.Bulk
		pre.bulk = uint32(len(bulk))
	}
	b = pre.append(b)
	b = wire.AppendRequest(b, p.req)
	be.PutUint32(b[at+4:], uint32(len(b)-at-prefixSize))
	return b, bulk, true
}

// sent implements outgoing.
func (p *pending) sent(err error) {
	c := p.c
	c.mu.Lock()
	if p.finished { // abandoned before it was encoded
		c.mu.Unlock()
		return
	}
	if p.state != stateWriting {
		p.finished = true
		c.uncredit(p)
		c.mu.Unlock()
		p.report(notSent(err))
		return
	}
	p.state = stateSent
	if err == nil {
		err = c.err // fail left it to us
	}
	switch {
	case p.receiving: // the reader finishes it
		c.mu.Unlock()
		return
	case p.answered:
		err = nil
	case p.dropped:
		err = notSent(ErrGoAway)
	case err != nil:
		delete(c.pend, p.tag)
		err = unknown(err)
	case p.abandoned != nil:
		c.pend[p.tag] = p.tombstone()
		err = unknown(p.abandoned)
	default:
		c.mu.Unlock()
		return
	}
	p.finished = true
	c.mu.Unlock()
	p.report(err)
}

func (p *pending) tombstone() *pending {
	if p.credit {
		return abandonedCredit
	}
	return abandonedPoll
}

func (c *Conn) uncredit(p *pending) {
	if p.credit && p.state != stateWait {
		c.credits--
	}
}

// admit moves requests from waitq to the sender as far as credits allow.
func (c *Conn) admit() {
	for {
		c.mu.Lock()
		var p *pending
		for len(c.waitq) > 0 && c.credits < c.window && p == nil {
			if q := c.waitq[0]; !q.finished {
				p = q
			}
			c.waitq[0] = nil
			c.waitq = c.waitq[1:]
		}
		if p == nil {
			c.mu.Unlock()
			return
		}
		c.enqueue(p)
		c.mu.Unlock()
		c.queue(p, true)
	}
}

// abandon ends a Call whose context has ended. gone is false when somebody
// reports the result at once or soon.
func (c *Conn) abandon(p *pending, why error) (err error, gone bool) {
	c.mu.Lock()
	if p.finished || p.receiving || p.answered {
		c.mu.Unlock()
		return nil, false
	}
	switch p.state {
	case stateWriting:
		p.abandoned = why
		c.mu.Unlock()
		return nil, false
	case stateSent:
		c.pend[p.tag] = p.tombstone()
		p.finished = true
		c.mu.Unlock()
		return unknown(why), true
	}
	p.finished = true
	c.uncredit(p)
	c.mu.Unlock()
	c.admit()
	return notSent(why), true
}

// fail ends the connection. Every request is reported by exactly one: those
// that the sender holds by sent, the one that the reader holds by the reader,
// the others here.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	never := c.takeWaiting()
	var fate []*pending
	for tag, p := range c.pend {
		switch {
		case p == abandonedCredit || p == abandonedPoll:
			delete(c.pend, tag)
		case p.state == stateSent && !p.receiving:
			p.finished = true
			delete(c.pend, tag)
			fate = append(fate, p)
		}
	}
	c.mu.Unlock()
	close(c.stop)
	_ = rawConn(c.nc).Close()
	// Before anybody is told: then nothing more goes by the other connection.
	c.follow(err)
	c.snd.close(err)
	for _, p := range never {
		p.report(notSent(err))
	}
	for _, p := range fate {
		p.report(unknown(err))
	}
}

// rawConn is the socket below TLS: closing it never waits.
func rawConn(nc net.Conn) net.Conn {
	if t, ok := nc.(*tls.Conn); ok {
		return t.NetConn()
	}
	return nc
}

// Close ends the connection, reports ErrClosed for everything that is not
// answered, and waits for the connection's goroutines. It must not be called
// from a done callback; Abort may be.
func (c *Conn) Close() error {
	c.Abort(ErrClosed)
	<-c.gone
	return nil
}

// Abort ends the connection like Close, for the given reason and without
// waiting.
func (c *Conn) Abort(reason error) { c.fail(reason) }

// pingFrame breaks silence.
type pingFrame struct{}

func (p *pingFrame) encode(b []byte) ([]byte, []byte, bool) {
	pre := prefix{typ: framePing}
	return pre.append(b), nil, true
}

func (p *pingFrame) sent(error) {}

// writer sends what Handle queues and watches over the timeouts.
func (c *Conn) writer() {
	defer c.wg.Done()
	every := c.o.Timeouts.tick()
	t := time.NewTicker(every)
	defer t.Stop()
	dog := watchdog{t: &c.o.Timeouts}
	for {
		select {
		case <-c.stop:
			return
		case <-c.snd.wake:
			gather()
			c.snd.flush(0)
		case <-t.C:
			quiet, dead := dog.look(&c.w, every)
			if dead {
				c.fail(fmt.Errorf("%w: nothing was heard for %v", ErrTimeout, dog.same))
				return
			}
			if quiet >= c.o.Timeouts.Idle/4 {
				c.snd.put(&c.ping, false)
				c.snd.flush(0)
			}
		}
	}
}

func (c *Conn) reader() {
	err := c.read()
	if errors.Is(err, io.EOF) {
		c.mu.Lock()
		if c.away {
			err = ErrGoAway
		}
		c.mu.Unlock()
	}
	c.fail(err)
	c.wg.Done()
	c.wg.Wait()
	c.snd.drained()
	c.open.Wait()
	close(c.gone)
}

func (c *Conn) read() error {
	var big []byte
	for {
		c.w.set(waiting)
		if _, err := c.br.Peek(1); err != nil {
			return err
		}
		c.w.set(inFrame)
		h, err := c.br.Peek(prefixSize)
		if err != nil {
			return truncated(err)
		}
		var pre prefix
		if err := pre.decode(h); err != nil {
			return err
		}
		_, _ = c.br.Discard(prefixSize)
		switch pre.typ {
		case framePong:
			continue
		case frameGoAway:
			c.goAway(pre.tag)
			continue
		case frameReply:
		default:
			return fmt.Errorf("%w: frame of type %d from a server", ErrPeer, pre.typ)
		}
		var msg []byte
		if pre.msg <= readBuffer {
			if msg, err = c.br.Peek(int(pre.msg)); err != nil {
				return truncated(err)
			}
		} else {
			if cap(big) < int(pre.msg) {
				big = make([]byte, pre.msg)
			}
			msg = big[:pre.msg]
			if _, err := io.ReadFull(c.br, msg); err != nil {
				return truncated(err)
			}
		}
		if err := c.reply(&pre, msg); err != nil {
			return err
		}
		if cap(big) > keepHead {
			big = nil
		}
	}
}

// truncated makes the end of data inside a frame an error of its own.
func truncated(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// reply takes one reply whose message is in msg, and its bulk from the stream.
func (c *Conn) reply(pre *prefix, msg []byte) error {
	c.mu.Lock()
	p := c.pend[pre.tag]
	if p == nil || p.answered || p.receiving {
		c.mu.Unlock()
		return fmt.Errorf("%w: reply to request %d, which is not open", ErrPeer, pre.tag)
	}
	orphan := p == abandonedCredit || p == abandonedPoll
	if !orphan {
		p.receiving = true
	}
	c.mu.Unlock()

	var err error
	if orphan {
		if len(msg) <= readBuffer {
			_, err = c.br.Discard(len(msg))
		}
		if err == nil {
			_, err = c.br.Discard(int(pre.bulk))
		}
		err = truncated(err)
	} else if err = c.receive(p, pre, msg); err != nil {
		// The others first: c.err tells sent that no answer will come.
		c.fail(err)
	}

	c.mu.Lock()
	if pre.window != 0 {
		c.window = int(pre.window)
	}
	if p.credit {
		c.credits--
	}
	delete(c.pend, pre.tag)
	report := false
	if !orphan {
		p.receiving, p.answered = false, err == nil
		if p.state == stateSent {
			p.finished, report = true, true
		}
	}
	retired := c.retired
	c.mu.Unlock()
	if report {
		if err != nil {
			p.report(unknown(err))
		} else {
			p.report(nil)
		}
	}
	c.admit()
	if retired {
		c.endIfIdle()
	}
	return err
}

// receive decodes a reply and reads its bulk into the caller's buffer.
func (c *Conn) receive(p *pending, pre *prefix, msg []byte) error {
	n, err := wire.DecodeReply(msg, p.req.Op, p.rep)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrPeer, err)
	case n != int(pre.bulk) || n > len(p.req.Bulk):
		return fmt.Errorf("%w: reply with %d bytes of bulk, %d announced, room for %d", ErrPeer, pre.bulk, n, len(p.req.Bulk))
	case p.rep.XID != p.req.XID:
		return fmt.Errorf("%w: reply to XID %#x, asked was %#x", ErrPeer, p.rep.XID, p.req.XID)
	}
	if len(msg) <= readBuffer {
		_, _ = c.br.Discard(len(msg))
	}
	if n > 0 {
		if _, err := io.ReadFull(c.br, p.req.Bulk[:n]); err != nil {
			return truncated(err)
		}
	}
	return nil
}

// takeWaiting ends all requests that were never sent. Called with mu held.
func (c *Conn) takeWaiting() (never []*pending) {
	for _, p := range c.waitq {
		if !p.finished {
			p.finished = true
			never = append(never, p)
		}
	}
	c.waitq = nil
	return never
}

// goAway handles the server's farewell: requests after last have not been read.
func (c *Conn) goAway(last uint64) {
	c.mu.Lock()
	c.away = true
	never := c.takeWaiting()
	for tag, p := range c.pend {
		if tag <= last {
			continue
		}
		delete(c.pend, tag)
		switch {
		case p == abandonedCredit || p == abandonedPoll:
		case p.state == stateSent:
			p.finished = true
			never = append(never, p)
		default:
			p.dropped = true
		}
	}
	retired := c.retired
	c.mu.Unlock()
	c.follow(ErrGoAway)
	for _, p := range never {
		p.report(notSent(ErrGoAway))
	}
	if retired {
		c.endIfIdle()
	}
}
