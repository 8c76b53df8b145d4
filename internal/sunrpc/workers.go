package sunrpc

import "sync"

// workers is a bounded pool of persistent goroutines. Idle ones are reused last-in first-out, so that a
// light load stays on few warm stacks. The queue of waiting calls is bounded by the servers' in-flight limits.
type workers struct {
	max int
	wg  sync.WaitGroup

	mu      sync.Mutex
	idle    []*worker
	n       int
	queue   []*Call // ring: head, count
	head    int
	count   int
	closing bool
}

type worker struct{ ch chan *Call }

// submit runs c.fn(c) on a worker. After close it runs on a goroutine of its own, so that every submitted
// function runs exactly once.
func (p *workers) submit(c *Call) {
	p.mu.Lock()
	if l := len(p.idle); l > 0 {
		w := p.idle[l-1]
		p.idle = p.idle[:l-1]
		p.mu.Unlock()
		w.ch <- c
		return
	}
	if p.n < p.max || p.closing {
		w := &worker{ch: make(chan *Call, 1)}
		p.n++
		p.wg.Add(1)
		p.mu.Unlock()
		go p.run(w, c)
		return
	}
	if p.count == len(p.queue) {
		q := make([]*Call, max(64, 2*len(p.queue)))
		for i := range p.count {
			q[i] = p.queue[(p.head+i)%len(p.queue)]
		}
		p.queue, p.head = q, 0
	}
	p.queue[(p.head+p.count)%len(p.queue)] = c
	p.count++
	p.mu.Unlock()
}

func (p *workers) run(w *worker, c *Call) {
	defer p.wg.Done()
	for {
		c.run()
		p.mu.Lock()
		switch {
		case p.count > 0:
			c = p.queue[p.head]
			p.queue[p.head] = nil
			p.head = (p.head + 1) % len(p.queue)
			p.count--
			p.mu.Unlock()
		case p.closing:
			p.n--
			p.mu.Unlock()
			return
		default:
			p.idle = append(p.idle, w)
			p.mu.Unlock()
			if c = <-w.ch; c == nil {
				return
			}
		}
	}
}

// close lets the queue run empty and waits for all workers.
func (p *workers) close() {
	p.mu.Lock()
	p.closing = true
	idle := p.idle
	p.idle = nil
	p.n -= len(idle)
	p.mu.Unlock()
	for _, w := range idle {
		w.ch <- nil
	}
	p.wg.Wait()
}
