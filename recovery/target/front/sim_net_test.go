package front

import (
	"context"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// simConn is a connection: messages are encoded, get through in order, and may
// get through after the client has given it up.
type simConn struct {
	s    *sim
	c    *simClient
	srv  wire.Target
	boot *fakeBody // the incarnation of the target that it leads to

	mu     sync.Mutex
	to     [][]byte
	back   []simReply
	open   map[uint64]*simPending // by XID
	broken bool                   // for the client
	shut   bool                   // at the target
	local  bool                   // in one process: nothing is lost on the way
	given  chan struct{}          // everything has been given back
	ended  bool
	wake   chan struct{} // of serve; nil in the simulation
}

func (c *simConn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

type simReply struct {
	op  wire.Op
	xid uint64
	msg []byte
}

type simPending struct {
	req  *wire.Request
	rep  *wire.Reply
	done func(error)
}

var errBroken = &wire.LostError{Sent: true, Err: io.ErrUnexpectedEOF}

func (c *simConn) Start(req *wire.Request, rep *wire.Reply, done func(error)) {
	c.mu.Lock()
	if c.broken {
		c.mu.Unlock()
		done(&wire.LostError{Err: io.ErrClosedPipe})
		return
	}
	if c.open[req.XID] != nil {
		c.s.fault("%s sends %d twice over one connection", c.c.name, req.XID)
	}
	c.open[req.XID] = &simPending{req, rep, done}
	c.to = append(c.to, wire.AppendRequest(nil, req))
	c.mu.Unlock()
	c.poke()
}

func (c *simConn) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	w := make(chan error, 1)
	c.Start(req, rep, func(err error) { w <- err })
	select {
	case err := <-w:
		return err
	case <-ctx.Done():
		c.mu.Lock()
		p := c.open[req.XID]
		if p != nil {
			delete(c.open, req.XID)
		}
		c.mu.Unlock()
		if p == nil {
			return <-w
		}
		return ctx.Err()
	}
}

func (c *simConn) Handle(*wire.Request, *wire.Reply, func()) { panic("not used") }
func (c *simConn) TryHandle(*wire.Request, *wire.Reply) bool { return false }
func (c *simConn) Done() <-chan struct{}                     { return c.given }
func (c *simConn) Close() error                              { c.cut(); return nil }

func (c *simConn) isBroken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

func (c *simConn) cut() {
	c.mu.Lock()
	c.broken = true
	c.mu.Unlock()
	c.poke()
}

func (s *sim) dial(ctx context.Context, c *simClient) (wire.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.up || time.Now().Before(c.away) {
		return nil, io.ErrUnexpectedEOF
	}
	c.session++
	k := &simConn{s: s, c: c, boot: s.b, local: c.inside == s.b, open: map[uint64]*simPending{}, given: make(chan struct{})}
	k.srv = s.f.Accept(wire.Peer{Node: c.name, Session: c.session, Local: k.local})
	s.dials = append(s.dials, k)
	return k, nil
}

// deliver gives the target the next request of a connection.
func (s *sim) deliver(c *simConn) {
	c.mu.Lock()
	m := c.to[0]
	c.to = c.to[1:]
	c.mu.Unlock()
	req, rep := &wire.Request{}, &wire.Reply{}
	if err := wire.DecodeRequest(m, req); err != nil {
		s.t.Fatalf("request does not decode: %v", err)
	}
	s.calls.Add(1)
	var once atomic.Bool
	if c.srv.TryHandle(req, rep) {
		s.reply(c, req, rep, &once)
		return
	}
	rep.Reset()
	c.srv.Handle(req, rep, func() { s.reply(c, req, rep, &once) })
}

func (s *sim) reply(c *simConn, req *wire.Request, rep *wire.Reply, once *atomic.Bool) {
	if once.Swap(true) {
		s.fault("%v of %s is answered twice", req.Op, c.c.name)
		return
	}
	s.calls.Add(-1)
	if rep.XID != req.XID {
		s.fault("%v of %s: XID %d in the answer to %d", req.Op, c.c.name, rep.XID, req.XID)
	}
	b := wire.AppendReply(nil, req.Op, rep)
	c.mu.Lock()
	if !c.shut || c.local {
		c.back = append(c.back, simReply{req.Op, req.XID, b})
	}
	c.mu.Unlock()
	c.poke()
}

// receive gives the client the next reply, if there is one.
func (s *sim) receive(c *simConn) bool {
	c.mu.Lock()
	if len(c.back) == 0 {
		c.mu.Unlock()
		return false
	}
	b := c.back[0]
	c.back = c.back[1:]
	p := c.open[b.xid]
	delete(c.open, b.xid)
	c.mu.Unlock()
	if p == nil {
		return true // the caller had no patience
	}
	if _, err := wire.DecodeReply(b.msg, b.op, p.rep); err != nil {
		s.t.Fatalf("reply does not decode: %v", err)
	}
	p.done(nil)
	return true
}

// giveBack returns what a broken connection holds to the client.
func (s *sim) giveBack(c *simConn) {
	c.mu.Lock()
	var list []*simPending
	for x, p := range c.open {
		list = append(list, p)
		delete(c.open, x)
	}
	first := !c.ended
	c.ended = true
	c.mu.Unlock()
	slices.SortFunc(list, func(a, b *simPending) int { return int(int64(a.req.XID) - int64(b.req.XID)) })
	for _, p := range list {
		p.done(errBroken)
	}
	if first {
		close(c.given)
	}
}

// shutServer ends a connection at the target.
func (s *sim) shutServer(c *simConn) {
	c.mu.Lock()
	was := c.shut
	c.shut = true
	if !c.local {
		c.to = nil
	}
	c.mu.Unlock()
	if !was {
		c.srv.(io.Closer).Close()
	}
}

func (s *sim) cut(c *simConn) {
	s.logf("%s: connection breaks", c.c.name)
	for s.chance(0.5) && s.receive(c) {
	}
	c.cut()
	c.mu.Lock()
	c.back = nil
	c.mu.Unlock()
}

// hangUp brings a closed connection in the target's process to its end: what was
// sent is executed, and every answer is given.
func (s *sim) hangUp(c *simConn, to, back int, ended bool) bool {
	c.mu.Lock()
	open := len(c.open)
	c.mu.Unlock()
	switch {
	case to > 0:
		s.deliver(c)
	case back > 0:
		s.receive(c)
	case open == 0 && !ended:
		s.giveBack(c)
	default:
		s.shutServer(c)
		return false
	}
	return true
}

// pump moves something of a connection; false when there is nothing.
func (s *sim) pump(c *simConn) bool {
	c.mu.Lock()
	to, back, broken, shut, ended := len(c.to), len(c.back), c.broken, c.shut, c.ended
	c.mu.Unlock()
	if c.local && broken && s.up && c.boot == s.b {
		return s.hangUp(c, to, back, ended)
	}
	switch {
	case broken && !ended && (s.calm || s.chance(0.7)):
		s.giveBack(c)
	case broken && !shut && to > 0 && s.chance(0.3): // was in the target's buffer
		s.deliver(c)
	case broken && !shut:
		if s.calm || s.chance(0.5) {
			s.shutServer(c)
		}
	case broken:
		return false
	case back > 0 && (to == 0 || s.chance(0.5)):
		s.receive(c)
	case to > 0 && !shut:
		s.deliver(c)
	default:
		return false
	}
	return true
}
