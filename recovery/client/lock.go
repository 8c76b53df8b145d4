package client

import "sync"

// longLock is a mutex that is held while targets are asked, which takes as long
// as they are away. Who waits for it waits for them, and simulated time goes on
// meanwhile (testing/synctest), which it does not for a sync.Mutex. The zero value
// is unlocked.
type longLock struct {
	mu   sync.Mutex
	cond sync.Cond
	held bool
}

func (l *longLock) Lock() {
	l.mu.Lock()
	for l.held {
		l.cond.L = &l.mu
		l.cond.Wait()
	}
	l.held = true
	l.mu.Unlock()
}

func (l *longLock) Unlock() {
	l.mu.Lock()
	l.held = false
	l.mu.Unlock()
	l.cond.Signal()
}

// gate lets work in until it is closed, and then waits for what is inside. The
// zero value is open.
type gate struct {
	mu     sync.Mutex
	cond   sync.Cond
	inside int
	closed bool
}

// enter reports whether the gate is open; leave has to follow if it is.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.inside++
	}
	return !g.closed
}

func (g *gate) leave() {
	g.mu.Lock()
	g.inside--
	last := g.inside == 0
	g.mu.Unlock()
	if last {
		g.cond.Broadcast()
	}
}

func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	for g.inside > 0 {
		g.cond.L = &g.mu
		g.cond.Wait()
	}
	g.mu.Unlock()
}
