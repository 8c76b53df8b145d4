package sunrpc

import (
	"sync"
	"sync/atomic"
)

// Two gates give memory: the roomGate for long records, the bulkGate for long replies. In sixteenths of
// MaxInflightBytes: long records get what makes the memory taken no more than 10, so that replies always
// have a part, and 2 whatever holds the rest; replies get what makes it no more than 15. Up to 19 is for
// clients that hold nothing. However many connections of others stand in line or sit on what they got,
// such a client gets one record or reply at a time.
const (
	recordsTaken  = 10 // memory taken, with the record
	recordsAlways = 2  // records
	recordsMost   = 12 // records, for a client that holds nothing
	repliesTaken  = 15
	repliesSlow   = 4  // replies, for peers with a backlog
	repliesMost   = 17 // with recordsAlways spareTaken
	spareTaken    = 19
	// The memory in use at which no further call is begun of a connection that has some in progress, and
	// of any connection. Between spareTaken and admitAny is what nothing else limits: the chunks of
	// readers that wait.
	admitMore = 16
	admitAny  = 20
)

// part returns a number of sixteenths of the memory, in bytes.
func (s *Server) part(sixteenths int64) int64 {
	return int64(s.cfg.MaxInflightBytes) / 16 * sixteenths
}

// share is the memory that a gate has given.
type share struct {
	used     atomic.Int64 // bytes of buffers
	promised atomic.Int64 // bytes that are no buffers yet
}

func (a *share) total() int64 { return a.used.Load() + a.promised.Load() }

// promise gives n bytes to p, or takes the promise back when n is negative.
func (a *share) promise(p *peer, n int64) {
	a.promised.Add(n)
	p.held.Add(n)
}

// charge makes b, a fresh buffer, part of the share until it is released.
func (a *share) charge(b *buf, p *peer) {
	b.share, b.peer = a, p
	a.used.Add(int64(len(b.b)))
	p.held.Add(int64(len(b.b)))
}

// roomGate hands out the memory for long records. Whoever has begun one may take long to send the rest, and
// holds the memory meanwhile.
type roomGate struct {
	share
	n atomic.Int64 // connections in the line

	mu   sync.Mutex
	line line[*Conn]
}

// taken is the memory in use and promised.
func (s *Server) taken() int64 {
	return s.mem.used.Load() + s.bulk.promised.Load() + s.room.promised.Load()
}

// spare tells whether p holds nothing and may have n bytes of a share beyond what the others are given.
func (s *Server) spare(p *peer, a *share, most, n int64) bool {
	return p.held.Load() < little && a.total()+n <= s.part(most) && s.taken()+n <= s.part(spareTaken)
}

// recordRoom tells whether there is memory for a record of n bytes. At least one always gets it.
func (s *Server) recordRoom(n int64) bool {
	records := s.room.total()
	return records == 0 || s.taken()+n <= s.part(recordsTaken) || records+n <= s.part(recordsAlways)
}

func (s *Server) recordSpare(c *Conn, n int64) bool {
	return s.spare(c.peer, &s.room.share, recordsMost, n)
}

// recordBuf returns a buffer for a record of n bytes when there is memory for it.
func (c *Conn) recordBuf(n int) (*buf, error) {
	size := int64(bufSize(n))
	if err := c.await(awaitShare, size); err != nil {
		return nil, err
	}
	if err := c.takeRoom(size); err != nil {
		return nil, err
	}
	b := getBuf(&c.srv.mem, n)
	c.srv.room.charge(b, c.peer)
	c.srv.room.promise(c.peer, -size)
	return b, nil
}

// fitRecord replaces b, which holds a record of n bytes, by a smaller buffer if that does: a record of several
// fragments got the largest.
func (c *Conn) fitRecord(b *buf, n int) *buf {
	if bufSize(n) == len(b.b) {
		return b
	}
	small := getBuf(&c.srv.mem, n)
	copy(small.b, b.b[:n])
	c.srv.room.charge(small, c.peer)
	b.release()
	return small
}

// takeRoom waits until the memory for a record is promised.
func (c *Conn) takeRoom(size int64) error {
	s := c.srv
	g := &s.room
	if g.n.Load() == 0 && s.recordRoom(size) {
		g.promise(c.peer, size)
		return nil
	}
	g.mu.Lock()
	if g.line.empty() && s.recordRoom(size) || s.recordSpare(c, size) {
		g.promise(c.peer, size)
		g.mu.Unlock()
		return nil
	}
	c.roomWant, c.roomKey = size, c.lineKey()
	c.roomGot.Store(false)
	g.line.push(c.roomKey, c)
	g.n.Add(1)
	g.mu.Unlock()
	s.callJanitor()
	s.roomFreed() // what was freed between the check and the count saw nobody waiting
	err := c.await(awaitRoom, 0)
	if err != nil {
		g.mu.Lock()
		if g.line.remove(c.roomKey, c) {
			g.n.Add(-1)
		} else {
			g.promise(c.peer, -size)
		}
		g.mu.Unlock()
		s.memFreed()
	}
	return err
}

// roomFreed promises memory to connections in the line.
func (s *Server) roomFreed() {
	g := &s.room
	if g.n.Load() == 0 {
		return
	}
	g.mu.Lock()
	for {
		c, ok := g.line.next(
			func(c *Conn) bool { return s.recordRoom(c.roomWant) },
			func(c *Conn) bool { return s.recordSpare(c, c.roomWant) },
		)
		if !ok {
			break
		}
		g.n.Add(-1)
		g.promise(c.peer, c.roomWant)
		c.roomGot.Store(true)
		c.nudge()
	}
	g.mu.Unlock()
}
