package sunrpc

import (
	"sync"
	"sync/atomic"
)

// bulkGate keeps calls with long replies from being started when there is no memory for the reply. A
// call's own record is small, so that many can be admitted before any of their replies exists; without
// the gate every connection could get one such reply that it never reads.
type bulkGate struct {
	reserved atomic.Int64 // bytes of replies that were let through and have no buffer yet
	out      atomic.Int64 // bytes of replies queued on all connections
	n        atomic.Int64 // len(held)

	mu      sync.Mutex
	held    []*Call // first come, first served
	closing bool
}

// GoReply is Go for a call whose reply takes about n bytes. It is started when there is memory for them.
func (c *Call) GoReply(n int, f func(*Call)) {
	c.weight = min(n, MaxPayload)
	c.Go(f)
}

// bulkRoom tells whether a reply of w bytes may be made. Only unread replies are sure to go away (they are
// sent, or their connection is closed), so replies always get an eighth of the memory, whatever holds the
// rest, and at least one is always let through. The caller holds the gate's mu.
func (s *Server) bulkRoom(w int64) bool {
	g := &s.bulk
	limit := int64(s.cfg.MaxInflightBytes)
	replies := g.reserved.Load() + g.out.Load()
	return s.mem.used.Load()+g.reserved.Load()+w <= limit || replies+w <= limit/8 || replies == 0
}

// admitBulk lets c through or keeps it until there is room.
func (s *Server) admitBulk(c *Call) bool {
	g := &s.bulk
	g.mu.Lock()
	c.Conn.bulk.Add(int64(c.weight))
	if g.closing || len(g.held) == 0 && s.bulkRoom(int64(c.weight)) {
		g.let(c)
		g.mu.Unlock()
		return true
	}
	g.held = append(g.held, c)
	g.n.Store(int64(len(g.held)))
	g.mu.Unlock()
	s.callJanitor()
	s.bulkFreed() // what was freed between the check and the count saw nobody waiting
	return false
}

func (g *bulkGate) let(c *Call) {
	c.admitted = true
	c.reserved = int64(c.weight)
	g.reserved.Add(c.reserved)
}

// bulkFreed starts held calls that there is room for now.
func (s *Server) bulkFreed() {
	g := &s.bulk
	if g.n.Load() == 0 {
		return
	}
	var start []*Call
	g.mu.Lock()
	for len(g.held) > 0 && (g.closing || s.bulkRoom(int64(g.held[0].weight))) {
		g.let(g.held[0])
		start = append(start, g.held[0])
		g.held[0] = nil
		g.held = g.held[1:]
	}
	g.n.Store(int64(len(g.held)))
	g.mu.Unlock()
	for _, c := range start {
		s.pool.submit(c)
	}
}

// closeBulk lets everything through from now on.
func (s *Server) closeBulk() {
	s.bulk.mu.Lock()
	s.bulk.closing = true
	s.bulk.mu.Unlock()
	s.bulkFreed()
}

// charged moves n bytes of c's reservation to the buffer that it just got.
func (c *Call) charged(n int) {
	if k := min(int64(n), c.reserved); k > 0 {
		c.reserved -= k
		c.srv.bulk.reserved.Add(-k)
	}
}

// bulkEnd gives back what c has reserved: its reply is queued next, or there is none.
func (c *Call) bulkEnd() {
	if !c.admitted {
		return
	}
	c.admitted = false
	c.Conn.bulk.Add(-int64(c.weight))
	c.weight = 0
	if c.reserved > 0 {
		c.srv.bulk.reserved.Add(-c.reserved)
		c.reserved = 0
		c.srv.bulkFreed()
	}
}
