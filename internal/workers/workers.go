// Package workers is a bounded pool of persistent goroutines for work that may
// block.
package workers

import (
	"sync"
	"time"
)

// Pool runs a function on what is submitted. Idle goroutines are reused last-in
// first-out, so that a light load stays on few warm stacks; they end with Close
// only. What waits for a goroutine is queued in order: whoever submits bounds it.
//
// An elastic pool has more goroutines while its queue does not move, so that work
// which waits for something that is away does not keep everything else waiting.
type Pool[T any] struct {
	run func(T)
	max int
	wg  sync.WaitGroup
	// Of an elastic pool: the most goroutines while the queue stands still, and how
	// long that may be.
	limit int
	stall time.Duration

	mu      sync.Mutex
	idle    []*worker[T]
	n       int
	queue   []T // ring: head, count
	head    int
	count   int
	moved   uint64 // counts what was taken from the queue
	seen    uint64 // moved, when watched last
	watched bool   // the timer runs
	closing bool
}

type worker[T any] struct{ ch chan T }

// New returns a pool of at most max goroutines; they are started when there is
// work.
func New[T any](max int, run func(T)) *Pool[T] { return &Pool[T]{run: run, max: max, limit: max} }

// stallTime is how long the queue of an elastic pool may stand still.
const stallTime = 50 * time.Millisecond

// NewElastic returns a pool of max goroutines that has more, up to limit, while its
// queue does not move. These end as soon as there is nothing for them to do.
func NewElastic[T any](max, limit int, run func(T)) *Pool[T] {
	return &Pool[T]{run: run, max: max, limit: limit, stall: stallTime}
}

// Submit has t run once. It does not block. After Close it runs on a goroutine
// of its own, so that everything submitted runs.
func (p *Pool[T]) Submit(t T) {
	p.mu.Lock()
	if l := len(p.idle); l > 0 {
		w := p.idle[l-1]
		p.idle = p.idle[:l-1]
		p.mu.Unlock()
		w.ch <- t
		return
	}
	if p.n < p.max || p.closing {
		w := &worker[T]{ch: make(chan T, 1)}
		p.n++
		p.wg.Add(1)
		p.mu.Unlock()
		go p.work(w, t)
		return
	}
	if p.count == len(p.queue) {
		q := make([]T, max(64, 2*len(p.queue)))
		for i := range p.count {
			q[i] = p.queue[(p.head+i)%len(p.queue)]
		}
		p.queue, p.head = q, 0
	}
	p.queue[(p.head+p.count)%len(p.queue)] = t
	p.count++
	if p.limit > p.max && !p.watched {
		p.watch()
	}
	p.mu.Unlock()
}

// watch looks at the queue again later. The lock is held.
func (p *Pool[T]) watch() {
	p.watched, p.seen = true, p.moved
	time.AfterFunc(p.stall, p.look)
}

// look adds goroutines if the queue has stood still since it was watched.
func (p *Pool[T]) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watched = false
	if p.moved == p.seen {
		for range min(p.count, p.limit-p.n, p.max) {
			// Whoever has the others busy is waited for, so that Add may be called.
			p.n++
			p.wg.Add(1)
			go p.work(&worker[T]{ch: make(chan T, 1)}, p.take())
		}
	}
	if p.count > 0 {
		p.watch()
	}
}

// take removes the first of the queue. The lock is held.
func (p *Pool[T]) take() T {
	var none T
	t := p.queue[p.head]
	p.queue[p.head] = none
	p.head = (p.head + 1) % len(p.queue)
	p.count--
	p.moved++
	return t
}

func (p *Pool[T]) work(w *worker[T], t T) {
	defer p.wg.Done()
	for {
		p.run(t)
		p.mu.Lock()
		switch {
		case p.count > 0:
			t = p.take()
			p.mu.Unlock()
		case p.closing || p.n > p.max:
			p.n--
			p.mu.Unlock()
			return
		default:
			p.idle = append(p.idle, w)
			p.mu.Unlock()
			var ok bool
			if t, ok = <-w.ch; !ok {
				return
			}
		}
	}
}

// Close lets the queue run empty and waits for all goroutines.
func (p *Pool[T]) Close() {
	p.mu.Lock()
	p.closing = true
	idle := p.idle
	p.idle = nil
	p.n -= len(idle)
	p.mu.Unlock()
	for _, w := range idle {
		close(w.ch)
	}
	p.wg.Wait()
}
