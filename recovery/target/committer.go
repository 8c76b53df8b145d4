package target

import (
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// lazyCommit bounds how long an operation that nobody waits for stays volatile.
const lazyCommit = 200 * time.Millisecond

var errClosing = errors.New("committer: closed")

// Committer makes applied operations durable in groups: while one flush runs,
// the next group gathers. It releases gated replies in transno order.
type Committer struct {
	sync   func() error
	onFail func(error)

	applied   atomic.Uint64
	committed atomic.Uint64
	syncs     atomic.Uint64

	mu      sync.Mutex
	cond    sync.Cond
	gate    Gate
	want    uint64 // highest transno that a waiter needs
	flushes []func(error)
	extra   bool // something without a transno was applied since the last flush began
	due     bool // flush though no reply waits
	timer   *time.Timer
	armed   bool
	closing bool
	err     error
	exited  chan struct{}
}

// NewCommitter starts a committer for a log that is durable up to transno.
// syncLog makes everything durable that was applied before the call. onFail is
// called once when it returns an error; it may be nil.
func NewCommitter(transno uint64, syncLog func() error, onFail func(error)) *Committer {
	c := &Committer{sync: syncLog, onFail: onFail, exited: make(chan struct{})}
	c.cond.L = &c.mu
	c.applied.Store(transno)
	c.committed.Store(transno)
	c.timer = time.AfterFunc(time.Hour, c.lazy)
	c.timer.Stop()
	go c.run()
	return c
}

func (c *Committer) lazy() {
	c.mu.Lock()
	c.armed = false
	c.mu.Unlock()
	c.Soon()
}

// Soon starts to make everything durable that was applied so far.
func (c *Committer) Soon() {
	c.mu.Lock()
	c.due = true
	c.cond.Signal()
	c.mu.Unlock()
}

// LastCommitted is the highest durable transno.
func (c *Committer) LastCommitted() uint64 { return c.committed.Load() }

// LastApplied is the highest transno in the engine.
func (c *Committer) LastApplied() uint64 { return c.applied.Load() }

// Syncs is the number of flushes so far.
func (c *Committer) Syncs() uint64 { return c.syncs.Load() }

// Waiting is the number of gated replies.
func (c *Committer) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gate.Len()
}

// Applied tells that transno t is in the engine. It is called in transno order.
// Nothing waits for it yet; it becomes durable with the next group or a moment
// later by itself.
func (c *Committer) Applied(t uint64) { c.applied.Store(t) }

// Lazy makes sure that what was applied becomes durable soon though no reply
// waits for it.
func (c *Committer) Lazy() {
	c.mu.Lock()
	if !c.armed && !c.closing && c.err == nil {
		c.armed = true
		c.timer.Reset(lazyCommit)
	}
	c.mu.Unlock()
}

// Extra tells that something was applied that has no transno. done, if not nil,
// is called when that and everything before it is durable, or with what prevents
// it; without it Lazy is. An error means that done is not called.
func (c *Committer) Extra(done func(error)) error {
	if done == nil {
		defer c.Lazy()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return c.err
	case c.closing:
		return errClosing
	}
	c.extra = true
	if done != nil {
		c.flushes = append(c.flushes, done)
		c.due = true
		c.cond.Signal()
	}
	return nil
}

// Gate holds a reply back until transno t is durable: done is called then, after
// rep.LastCommitted was set, or rep.Status to ErrTargetDown when the target failed
// meanwhile. It returns false when there is nothing to wait for: rep is final
// and the caller calls done itself. Callers who gate in transno order get their
// callbacks in transno order.
func (c *Committer) Gate(t uint64, rep *wire.Reply, done Completer) bool {
	if com := c.committed.Load(); t <= com {
		rep.LastCommitted = com
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if com := c.committed.Load(); t <= com {
		// A flush has ended since, which perhaps has released for the last time.
		rep.LastCommitted = com
		return false
	}
	if c.err != nil || c.closing {
		failReply(rep, c.committed.Load())
		return false
	}
	c.gate.Push(Waiter{Transno: t, Rep: rep, Done: done})
	if t > c.want {
		c.want = t
		c.cond.Signal()
	}
	return true
}

// failReply turns a reply whose durability is not known into one that has its client
// ask the target's next instance.
func failReply(rep *wire.Reply, committed uint64) {
	rep.Reset()
	rep.Status = wire.ErrTargetDown
	rep.LastCommitted = committed
}

func (c *Committer) run() {
	defer close(c.exited)
	var buf [64]Waiter
	for {
		c.mu.Lock()
		for c.err == nil && !c.closing && c.want <= c.committed.Load() && !c.due {
			c.cond.Wait()
		}
		if c.err != nil || c.closing && c.applied.Load() <= c.committed.Load() && !c.extra {
			c.mu.Unlock()
			return
		}
		c.due = false
		target, extra, flushes := c.applied.Load(), c.extra, len(c.flushes)
		c.extra = false
		c.mu.Unlock()

		if target > c.committed.Load() || extra {
			if err := c.sync(); err != nil {
				c.Fail(err)
				return
			}
			c.syncs.Add(1)
			c.committed.Store(target)
		}
		c.release(target, buf[:], false)
		c.flushed(flushes, nil)
	}
}

// release runs the callbacks gated up to committed without holding the lock.
func (c *Committer) release(committed uint64, buf []Waiter, failed bool) {
	for {
		n := 0
		c.mu.Lock()
		for n < len(buf) {
			w, ok := c.gate.Pop(committed)
			if !ok {
				break
			}
			buf[n] = w
			n++
		}
		c.mu.Unlock()
		if n == 0 {
			return
		}
		for i := range buf[:n] {
			w := &buf[i]
			if failed {
				failReply(w.Rep, c.committed.Load())
			} else {
				w.Rep.LastCommitted = committed
			}
			w.Done.Done()
			*w = Waiter{}
		}
	}
}

// flushed calls the first n callbacks of Extra.
func (c *Committer) flushed(n int, err error) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	n = min(n, len(c.flushes)) // after Fail there are none
	done := c.flushes[:n:n]
	if c.flushes = c.flushes[n:]; len(c.flushes) == 0 {
		c.flushes = nil
	}
	c.mu.Unlock()
	for _, f := range done {
		f(err)
	}
}

// Fail stops the committer: everything gated now or later gets ErrTargetDown. It may be
// called from any goroutine, also while a flush hangs.
func (c *Committer) Fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	c.cond.Signal()
	c.mu.Unlock()
	c.timer.Stop()
	if c.onFail != nil {
		c.onFail(err)
	}
	c.release(math.MaxUint64, make([]Waiter, 64), true)
	c.flushed(math.MaxInt, err)
}

// Err is the error that stopped the committer.
func (c *Committer) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close makes everything applied durable, releases all waiters and ends the
// goroutine. After a failure it does not wait, since a flush may hang for ever.
// Nothing may be applied after the call.
func (c *Committer) Close() error {
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.closing = true
	c.cond.Signal()
	c.mu.Unlock()
	c.timer.Stop()
	<-c.exited
	return c.Err()
}
