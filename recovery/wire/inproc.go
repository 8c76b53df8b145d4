package wire

import (
	"context"
	"sync"
)

// InProc returns the in-process transport to t. Messages pass by reference;
// nothing is encoded.
func InProc(t Target) Conn { return &inproc{Target: t} }

type inproc struct {
	Target
	waiters waiterPool
}

// waiter is who waits in a Call.
type waiter struct {
	ch       chan error
	answered func()
	ended    func(error)
}

// waiterPool is part of a connection, whose callers wait again and again.
type waiterPool struct{ p sync.Pool }

func (p *waiterPool) get() *waiter {
	if w, ok := p.p.Get().(*waiter); ok {
		return w
	}
	w := &waiter{ch: make(chan error, 1)}
	w.ended = func(err error) { w.ch <- err }
	w.answered = func() { w.ch <- nil }
	return w
}

func (p *waiterPool) put(w *waiter) { p.p.Put(w) }

// Call waits for the answer even when ctx ends: in one process the target
// writes into rep until done, so an early return would hand it freed memory.
func (c *inproc) Call(_ context.Context, req *Request, rep *Reply) error {
	w := c.waiters.get()
	c.Handle(req, rep, w.answered)
	<-w.ch
	c.waiters.put(w)
	return nil
}

// Close implements Conn.
func (*inproc) Close() error { return nil }
