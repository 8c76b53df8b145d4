package wire

import (
	"context"
	"sync"
)

// InProc returns the in-process transport to t. Messages pass by reference;
// nothing is encoded.
func InProc(t Target) Conn { return inproc{t} }

type inproc struct{ Target }

// waiter is who waits in a Call.
type waiter struct {
	ch       chan error
	answered func()
	ended    func(error)
}

var waiters = sync.Pool{New: func() any {
	w := &waiter{ch: make(chan error, 1)}
	w.ended = func(err error) { w.ch <- err }
	w.answered = func() { w.ch <- nil }
	return w
}}

// Call waits for the answer even when ctx ends: in one process the target
// writes into rep until done, so an early return would hand it freed memory.
func (c inproc) Call(_ context.Context, req *Request, rep *Reply) error {
	w := waiters.Get().(*waiter)
	c.Handle(req, rep, w.answered)
	<-w.ch
	waiters.Put(w)
	return nil
}

func (inproc) Close() error { return nil }
