package sunrpc

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// bulkGate keeps calls with long replies from being started when there is no memory for the reply. A
// call's own record is small, so that many can be admitted before any of their replies exists; without
// the gate every connection could get one such reply that it never reads.
type bulkGate struct {
	reserved atomic.Int64 // bytes of replies that were let through and have no buffer yet
	out      atomic.Int64 // bytes of replies queued on all connections
	n        atomic.Int64 // calls in lines

	mu      sync.Mutex
	lines   [2][]*Call // first come, first served: of peers that read, and of backlogged ones
	closing bool
}

// Lines of the gate.
const (
	lineReading = iota
	lineBacklog
)

// backlog is how much the kernel may have left to send for a peer that counts as reading, in bytes.
const backlog = 128 << 10

// line finds the line for c: a peer that has not taken its last replies yet must not keep memory from one
// that has.
func (c *Call) line() int {
	n := 0
	err := c.Conn.rc.Control(func(fd uintptr) {
		if v, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			n = v
		}
	})
	if err == nil && n >= backlog {
		return lineBacklog
	}
	return lineReading
}

// GoReply is Go for a call whose reply takes about n bytes. It is started when there is memory for them.
func (c *Call) GoReply(n int, f func(*Call)) {
	c.weight = min(n, MaxPayload)
	c.Go(f)
}

// bulkRoom tells whether a reply of w bytes may be made. Replies always get a part of the memory, whatever
// holds the rest, because they are sure to go away (they are sent, or their connection is closed), and at
// least one is always let through. The caller holds the gate's mu.
func (s *Server) bulkRoom(w int64, line int) bool {
	g := &s.bulk
	limit := int64(s.cfg.MaxInflightBytes)
	reserved := g.reserved.Load()
	replies := reserved + g.out.Load()
	switch {
	case replies == 0:
		return true
	case line == lineBacklog:
		return replies+w <= limit/4
	}
	return s.mem.used.Load()+reserved+w <= limit || replies+w <= limit/8*3
}

// admitBulk lets c through or keeps it until there is room.
func (s *Server) admitBulk(c *Call) bool {
	g := &s.bulk
	line := lineReading
	if s.mem.used.Load() > int64(s.cfg.MaxInflightBytes/4) {
		line = c.line()
	}
	g.mu.Lock()
	c.Conn.bulk.Add(int64(c.weight))
	if g.closing || len(g.lines[line]) == 0 && s.bulkRoom(int64(c.weight), line) {
		g.let(c)
		g.mu.Unlock()
		return true
	}
	g.lines[line] = append(g.lines[line], c)
	g.n.Add(1)
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
	for i := range g.lines {
		l := g.lines[i]
		for len(l) > 0 && (g.closing || s.bulkRoom(int64(l[0].weight), i)) {
			g.let(l[0])
			start = append(start, l[0])
			l[0] = nil
			l = l[1:]
			g.n.Add(-1)
		}
		g.lines[i] = l
	}
	g.mu.Unlock()
	for _, c := range start {
		s.pool.Submit(c)
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
