package ost

import (
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/wire"
)

// state is the superblock in memory and on the disk. Changes are made in memory
// at once; one goroutine writes, and those that came while it wrote share the
// next rewrite.
type state struct {
	mu      sync.Mutex
	sb      *super
	seq     uint64 // changes made
	durable uint64 // of them written
	waiting []stateWaiter
	closed  bool // nobody writes any more

	wake chan struct{}
	// recorded is the last_committed that the disk has: no replay up to it is
	// ever executed.
	recorded atomic.Uint64
}

type stateWaiter struct {
	done  func(error)
	drain bool
}

// change changes the superblock: f changes it in memory, with state.mu held, and
// reports whether it did. done, if not nil, is called by another goroutine when
// that and every earlier change is durable, or with what prevents it; the change
// stays in memory then and is written with the next one. With drain, done is
// called after everything that was admitted before the change was known has been
// executed.
func (t *Target) change(drain bool, f func(*super) bool, done func(error)) {
	s := &t.state
	s.mu.Lock()
	if f(s.sb) {
		s.seq++
	}
	closed := s.closed
	if done != nil && !closed {
		s.waiting = append(s.waiting, stateWaiter{done, drain})
	}
	s.mu.Unlock()
	if closed {
		if done != nil {
			done(wire.ErrTargetDown)
		}
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// changeNow is change for callers that wait.
func (t *Target) changeNow(f func(*super) bool) error {
	ch := make(chan error, 1)
	t.change(false, f, func(err error) { ch <- err })
	return <-ch
}

// writeState writes the superblock if it was changed and completes those who
// wait. It is called by one goroutine at a time.
func (t *Target) writeState() {
	s := &t.state
	s.mu.Lock()
	waiting := s.waiting
	s.waiting = nil
	seq, lc := s.seq, t.track.lc.Load()
	var b []byte
	if seq > s.durable {
		s.sb.LastCommitted = lc
		b = s.sb.encode()
	}
	s.mu.Unlock()
	var err error
	if b != nil {
		if err = writeSuper(t.fs, t.rootFD, b); err == nil {
			s.mu.Lock()
			s.durable = seq
			s.mu.Unlock()
			s.recorded.Store(lc)
		} else {
			t.log.Error("the superblock cannot be written", "err", err)
		}
	}
	// Also after a failure: to refuse more than the disk tells does no harm.
	t.publish()
	for _, w := range waiting {
		if w.drain && err == nil {
			t.drained.add(w.done)
		} else {
			w.done(err)
		}
	}
}

// stateWriter writes the superblock until the target stops.
func (t *Target) stateWriter() {
	defer t.wg.Done()
	for {
		select {
		case <-t.state.wake:
			t.writeState()
		case <-t.stop:
			t.state.mu.Lock()
			t.state.closed = true
			t.state.mu.Unlock()
			t.writeState()
			t.drained.close()
			return
		}
	}
}

// retryState has what could not be written tried again.
func (t *Target) retryState() {
	t.state.mu.Lock()
	behind := t.state.seq > t.state.durable
	t.state.mu.Unlock()
	if behind {
		t.change(false, func(*super) bool { return false }, nil)
	}
}

// publish makes the tables of the superblock those that admission looks at.
func (t *Target) publish() {
	t.state.mu.Lock()
	t.admit.set(t.state.sb, t.slots)
	t.state.mu.Unlock()
}
