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
	share
	n atomic.Int64 // calls in lines

	mu      sync.Mutex
	lines   [2]line[*Call] // of peers that read, and of backlogged ones
	closing bool
}

// Lines of the gate.
const (
	lineReading = iota
	lineBacklog
)

// backlog is how much the kernel may have left to send for a peer that counts as reading, in bytes.
const backlog = 128 << 10

// chooseLine finds the line for c: a peer that has not taken its last replies yet must not keep memory from one
// that has.
func (c *Call) chooseLine() int {
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

// GoReply is Go for a call whose reply takes about n bytes. It is started when there is memory for them. When
// the connection has been closed meanwhile the call is dropped without running f: its work is the reply.
func (c *Call) GoReply(n int, f func(*Call)) {
	c.weight = min(n, MaxPayload)
	if c.Conn != nil {
		c.Conn.bulk.Add(int64(c.weight))
		c.fn = f // before somebody else has it
		if c.Conn.hold(c) {
			// It must not make others wait for a worker that would find out no more.
			return
		}
	}
	c.Go(f)
}

// bulkRoom tells whether the reply of c may be made. At least one always is. Replies are sure to go away (they
// are sent, or their connection is closed), but those of many peers that do not read take a while. The
// caller holds the gate's mu.
func (s *Server) bulkRoom(c *Call, line int) bool {
	w := int64(c.weight)
	replies := s.bulk.total()
	switch {
	case replies == 0:
		return true
	case line == lineBacklog && replies+w > s.part(repliesSlow):
		return false
	}
	return s.taken()+w <= s.part(repliesTaken)
}

// admitBulk lets c through or keeps it until there is room.
func (s *Server) admitBulk(c *Call) bool {
	g := &s.bulk
	line := lineReading
	if s.mem.used.Load() > int64(s.cfg.MaxInflightBytes/4) {
		line = c.chooseLine()
	}
	g.mu.Lock()
	if g.closing || g.lines[line].empty() && s.bulkRoom(c, line) || s.bulkSpare(c, line) {
		g.let(c)
		g.mu.Unlock()
		return true
	}
	g.lines[line].push(c.Conn.lineKey(), c)
	g.n.Add(1)
	g.mu.Unlock()
	s.callJanitor()
	s.bulkFreed() // what was freed between the check and the count saw nobody waiting
	return false
}

func (s *Server) bulkSpare(c *Call, line int) bool {
	return line == lineReading && s.spare(c.Conn.peer, &s.bulk.share, repliesMost, int64(c.weight))
}

func (g *bulkGate) let(c *Call) {
	c.admitted = true
	c.reserved = int64(c.weight)
	g.promise(c.Conn.peer, c.reserved)
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
		for {
			c, ok := g.lines[i].next(
				func(c *Call) bool { return g.closing || s.bulkRoom(c, i) },
				func(c *Call) bool { return c.Conn.closed.Load() || s.bulkSpare(c, i) },
			)
			if !ok {
				break
			}
			g.let(c)
			start = append(start, c)
			g.n.Add(-1)
		}
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

// charge accounts for b, which c just got for its reply: what was promised is a buffer now.
func (c *Call) charge(b *buf) {
	if !c.admitted {
		return
	}
	c.srv.bulk.charge(b, c.Conn.peer)
	k := min(int64(len(b.b)), c.reserved)
	c.reserved -= k
	c.srv.bulk.promise(c.Conn.peer, -k)
}

// bulkEnd gives back what c has reserved: its reply is queued next, or there is none.
func (c *Call) bulkEnd() {
	if c.weight == 0 || c.Conn == nil {
		return
	}
	c.Conn.bulk.Add(-int64(c.weight))
	c.admitted, c.weight = false, 0
	if c.reserved > 0 {
		c.srv.bulk.promise(c.Conn.peer, -c.reserved)
		c.reserved = 0
		c.srv.memFreed()
	}
}
