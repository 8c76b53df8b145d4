package wire

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
)

// Local returns a connection to a target in this process that begins and ends
// like one over the network: the target accepts it (Peer.Local), it tells its end
// (Done) and refuses requests after. Messages pass by reference and nothing is
// encoded, so that a request's memory is in use until the target has answered.
//
// Only OpConnect and what polls (Op.Polls), which wait for other clients and not for
// the disk, are executed on copies: Close and the context of Call give them back at
// once.
//
// The result has Start and Done as well, like a tcp.Bundle.
func Local(t Target, session uint64) *LocalConn {
	c := &LocalConn{t: t, gone: make(chan struct{}), copies: map[*localReq]bool{}}
	if a, ok := t.(Acceptor); ok {
		c.t = a.Accept(Peer{Session: session, Local: true})
		c.closer, _ = c.t.(io.Closer)
	}
	c.open.Store(1)
	return c
}

// LocalConn is a Conn to a target in this process.
type LocalConn struct {
	t       Target
	waiters waiterPool
	closer  io.Closer
	giving  atomic.Int64 // calls of the target's methods, with shut when there will be no more
	open    atomic.Int64 // requests that were not given back, and one until the target has been closed
	gone    chan struct{}

	mu     sync.Mutex
	closed bool
	copies map[*localReq]bool
}

var _ Conn = (*LocalConn)(nil)

// localReq is a request at the target.
type localReq struct {
	c    *LocalConn
	rep  *Reply
	done func()      // Handle
	fn   func(error) // Start
	back func()      // x.answered
	own  *copies     // executed instead, if set
}

type copies struct {
	req Request
	rep Reply
}

var localReqs sync.Pool

func newLocalReq() *localReq {
	if x, ok := localReqs.Get().(*localReq); ok {
		return x
	}
	x := new(localReq)
	x.back = x.answered
	return x
}

// TryHandle implements Target.
func (c *LocalConn) TryHandle(req *Request, rep *Reply) bool {
	if !c.enter() {
		return false
	}
	ok := c.t.TryHandle(req, rep)
	c.leave()
	return ok
}

// Handle implements Target. After Close the reply's status is ErrTargetDown.
func (c *LocalConn) Handle(req *Request, rep *Reply, done func()) {
	x := newLocalReq()
	x.c, x.rep, x.done = c, rep, done
	c.give(x, req)
}

// Start is Handle whose callback gets a *LostError if there is no answer.
func (c *LocalConn) Start(req *Request, rep *Reply, done func(err error)) {
	x := newLocalReq()
	x.c, x.rep, x.fn = c, rep, done
	c.give(x, req)
}

// Call implements Conn. It waits for the answer even when ctx ends, since the
// target uses the caller's memory, but for operations that are executed on copies.
func (c *LocalConn) Call(ctx context.Context, req *Request, rep *Reply) error {
	w := c.waiters.get()
	x := newLocalReq()
	x.c, x.rep, x.fn = c, rep, w.ended
	c.give(x, req)
	var err error
	if onCopies(req.Op) {
		select {
		case err = <-w.ch:
		case <-ctx.Done():
			c.giveBack(x, &LostError{Sent: true, Err: ctx.Err()})
			err = <-w.ch
		}
	} else {
		err = <-w.ch
	}
	c.waiters.put(w)
	return err
}

// Close ends the connection: requests that are executed on copies are given back,
// the target answers the others some time, and then Done is closed.
func (c *LocalConn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	var back []*localReq
	for x := range c.copies {
		back = append(back, x)
	}
	c.mu.Unlock()
	c.left(c.giving.Add(shut))
	for _, x := range back {
		c.giveBack(x, &LostError{Sent: true, Err: ErrClosed})
	}
	return nil
}

// Done is closed when the connection was closed and every request has been given
// back.
func (c *LocalConn) Done() <-chan struct{} { return c.gone }

// onCopies tells operations that wait for what other clients do. None of them has
// slices but OpWatch and OpWatchVIPs, whose Data are used only until the target's Handle returns.
func onCopies(op Op) bool { return op == OpConnect || op.Polls() }

func (c *LocalConn) give(x *localReq, req *Request) {
	if onCopies(req.Op) {
		x.own = &copies{req: *req}
	}
	if !c.enter() {
		x.report(&LostError{Err: ErrClosed})
		return
	}
	c.open.Add(1)
	switch {
	case x.own == nil:
		c.t.Handle(req, x.rep, x.back)
	case c.remember(x):
		c.t.Handle(&x.own.req, &x.own.rep, x.back)
	default:
		x.report(&LostError{Err: ErrClosed})
		c.release()
	}
	c.leave()
}

// shut is far above the number of calls at a time.
const shut = 1 << 62

// enter precedes every call of the target.
func (c *LocalConn) enter() bool {
	for {
		n := c.giving.Load()
		if n >= shut {
			return false
		}
		if c.giving.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (c *LocalConn) leave() { c.left(c.giving.Add(-1)) }

// left closes the target after the last call.
func (c *LocalConn) left(n int64) {
	if n != shut {
		return
	}
	if c.closer != nil {
		_ = c.closer.Close()
	}
	c.release()
}

// release follows every request that was given back.
func (c *LocalConn) release() {
	if c.open.Add(-1) == 0 {
		close(c.gone)
	}
}

// remember enters a request that Close has to give back.
func (c *LocalConn) remember(x *localReq) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.copies[x] = true
	}
	return !c.closed
}

// answered is the target's callback.
func (x *localReq) answered() {
	c := x.c
	if x.own != nil {
		if !c.claim(x) {
			return // given back before
		}
		*x.rep = x.own.rep
	}
	x.report(nil)
	c.release()
}

// claim decides who reports a request that is executed on copies.
func (c *LocalConn) claim(x *localReq) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	mine := c.copies[x]
	delete(c.copies, x)
	return mine
}

func (c *LocalConn) giveBack(x *localReq, err error) {
	if c.claim(x) {
		x.report(err)
		c.release()
	}
}

// report tells the caller. A request that the target may still answer is not used
// again.
func (x *localReq) report(err error) {
	if err != nil {
		x.rep.Reset()
		x.rep.Status = ErrTargetDown
	}
	done, fn := x.done, x.fn
	if x.own == nil {
		x.c, x.rep, x.done, x.fn = nil, nil, nil, nil
		localReqs.Put(x)
	}
	if done != nil {
		done()
	} else {
		fn(err)
	}
}
