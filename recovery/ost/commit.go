package ost

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// maxFailed bounds the failed flushes that are remembered.
const maxFailed = 64

// commits are those who wait until everything up to a transno is durable, and
// the wish that it be soon. One goroutine flushes for all: while it does, the next
// ones gather.
type commits struct {
	mu      sync.Mutex
	cond    sync.Cond
	want    uint64
	waiting []commitWaiter
	failed  []span // transnos of failed flushes, newest last
	closed  bool
}

type commitWaiter struct {
	transno uint64
	rep     *wire.Reply
	done    func()
}

// lost tells whether a flush of changes around transno has failed.
func (c *commits) lost(transno uint64) bool {
	for _, f := range c.failed {
		if f.from <= transno && transno <= f.to {
			return true
		}
	}
	return false
}

// flushFailed notes that the changes from one transno to another may be lost.
func (c *commits) flushFailed(from, to uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.failed) == maxFailed {
		c.failed = append(c.failed[:0], c.failed[1:]...)
	}
	c.failed = append(c.failed, span{from, to})
	for _, w := range c.waiting {
		if from <= w.transno {
			w.rep.Status = wire.ErrIO
		}
	}
}

// WaitCommit implements front.Body.
func (t *Target) WaitCommit(transno uint64, rep *wire.Reply, done func()) bool {
	c := &t.commits
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost(transno) || c.closed {
		rep.Status = wire.ErrIO
	}
	if c.closed || transno <= t.track.lc.Load() {
		t.trailer(rep)
		return false
	}
	c.waiting = append(c.waiting, commitWaiter{transno, rep, done})
	c.want = max(c.want, transno)
	c.cond.Signal()
	return true
}

// LastCommitted implements front.Body.
func (t *Target) LastCommitted() uint64 { return t.track.lc.Load() }

// CommitSoon implements front.Body.
func (t *Target) CommitSoon() {
	last := t.track.last()
	t.commits.mu.Lock()
	t.commits.want = max(t.commits.want, last)
	t.commits.cond.Signal()
	t.commits.mu.Unlock()
}

func (c *commits) close() {
	c.mu.Lock()
	c.closed = true
	c.cond.Signal()
	c.mu.Unlock()
}

// commitLoop serves commits until they are closed; who waits then is answered
// with what there is.
func (t *Target) commitLoop() {
	defer t.wg.Done()
	c := &t.commits
	for {
		c.mu.Lock()
		for c.want <= t.track.lc.Load() && len(c.waiting) == 0 && !c.closed {
			c.cond.Wait()
		}
		closed, want := c.closed, min(c.want, t.track.last())
		c.mu.Unlock()
		if !closed {
			_ = t.flushDirty(want, true) // errors are in c.failed
		}
		lc := t.track.lc.Load()
		var ready []commitWaiter
		c.mu.Lock()
		rest := c.waiting[:0]
		for _, w := range c.waiting {
			switch {
			case w.transno <= lc:
				ready = append(ready, w)
			case closed || w.transno > t.track.last():
				w.rep.Status = wire.ErrIO
				ready = append(ready, w)
			default:
				rest = append(rest, w)
			}
		}
		clear(c.waiting[len(rest):])
		c.waiting = rest
		if c.want > t.track.last() {
			c.want = lc // nobody has such a number
		}
		c.mu.Unlock()
		for _, w := range ready {
			t.trailer(w.rep)
			w.done()
		}
		if closed {
			return
		}
	}
}
