package front

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// session is a client's path: the connections that have one session number of
// one node. It serves one client.
type session struct {
	sessionKey
	link atomic.Pointer[link] // nil: the client is not connected by this session

	// Under the front's lock.
	conns  int
	client wire.ClientID // who has asked to connect
}

// link is a client that is connected.
type link struct {
	id    wire.ClientID
	gen   uint64
	heard atomic.Bool // since the last tick
	order order
}

// noSession is the machine's number of a connection by which the client is not
// connected.
const noSession = math.MaxUint64

// conn is a connection. It implements wire.Target for its transport.
type conn struct {
	f      *Front
	s      *session
	load   load // requests that are to be waited for
	closed atomic.Bool
}

// load counts requests: in the lower half those that are inside, in the upper half,
// which wraps, those that were given to the body and have left.
type load struct{ v atomic.Uint64 }

const (
	oneInside = 1
	oneLeft   = 1 << 32
)

func (l *load) enter() { l.v.Add(oneInside) }

// leave tells how many remain inside. done: the one that leaves took time.
func (l *load) leave(done bool) (inside uint32) {
	if done {
		return uint32(l.v.Add(oneLeft - oneInside))
	}
	return uint32(l.v.Add(^uint64(oneInside - 1)))
}

func (l *load) inside() uint32 { return uint32(l.v.Load()) }
func (l *load) left() uint32   { return uint32(l.v.Load() >> 32) }

// Accept implements wire.Acceptor. The target that it returns implements
// io.Closer. Connections that are to be one path need a session number; clients
// that are not in this process need one in any case.
func (f *Front) Accept(p wire.Peer) wire.Target {
	key := sessionKey{p.Node, p.Session, p.Local}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[key]
	if s == nil {
		s = &session{sessionKey: key}
		if key.num != 0 {
			f.sessions[key] = s
		}
	}
	s.conns++
	c := &conn{f: f, s: s}
	f.conns[c] = struct{}{}
	return c
}

// Close ends the connection. With the last one of a session the client is no
// longer connected.
func (c *conn) Close() error {
	f, s := c.f, c.s
	f.mu.Lock()
	if c.closed.Swap(true) {
		f.mu.Unlock()
		return nil
	}
	f.dropHeld(c, wire.ErrTargetDown)
	s.conns--
	if s.conns == 0 {
		f.lost(s)
	}
	f.forget(c)
	f.mu.Unlock()
	f.poke()
	return nil
}

// forget ends the account of a connection that is closed, if nothing of it is inside.
// The lock is held.
func (f *Front) forget(c *conn) {
	if _, ok := f.conns[c]; ok && c.closed.Load() && c.load.inside() == 0 {
		delete(f.conns, c)
		f.left += uint64(c.load.left())
	}
}

// lost ends a session. The lock is held.
func (f *Front) lost(s *session) {
	delete(f.sessions, s.sessionKey)
	linked := f.links[s.client] == s
	if linked {
		f.disconnected(s.client)
	}
	if s.num != 0 && s.client != (wire.ClientID{}) || linked {
		f.post(f.m.ConnLost(s.client, s.num, f.o.Clock.Now()))
	}
	if linked && !s.local && !f.stopping.Load() {
		// Its client may be gone for good, and nobody else repeats what it did.
		f.queue = append(f.queue, recov.Action{Kind: recov.ActCommit})
	}
}

// connected links a session to the client that it has connected. The lock is held.
func (f *Front) connected(s *session, id wire.ClientID, gen uint64) {
	f.disconnected(id)
	if s.conns == 0 {
		return // closed meanwhile
	}
	f.links[id] = s
	s.link.Store(&link{id: id, gen: gen})
	if !s.local {
		f.remote++
		f.homes[id] = s.node
	} else {
		delete(f.homes, id)
	}
}

// disconnected ends the link of a client, if it has one. The lock is held.
func (f *Front) disconnected(id wire.ClientID) {
	s := f.links[id]
	if s == nil {
		return
	}
	s.link.Store(nil)
	delete(f.links, id)
	if !s.local {
		f.remote--
	}
}

// sweep tells the machine which clients have been heard. The lock is held.
func (f *Front) sweep(now time.Time) {
	f.swept = now
	for id, s := range f.links {
		if l := s.link.Load(); l != nil && l.heard.Swap(false) {
			f.m.Heard(id, now)
		}
	}
}

// leave notes that a request that was waited for has been answered, after the body had
// it, if done.
func (c *conn) leave(done bool) {
	if c.load.leave(done) != 0 || !c.closed.Load() && !c.f.stopping.Load() {
		return
	}
	f := c.f
	f.mu.Lock()
	f.forget(c)
	f.mu.Unlock()
	f.poke()
}

// passes tells whether recovery has no say about a request once the target
// serves: one that changes nothing, or of a client in this process.
func (c *conn) passes(req *wire.Request) bool {
	switch {
	case req.Flags&(wire.FlagReplay|wire.FlagLastReplay) != 0:
		return false
	case req.Op == wire.OpOSTFetch:
		return true
	case req.Op.Modifies() && (!c.s.local || req.Flags&wire.FlagResend != 0 || req.Op == wire.OpConnect || req.Op == wire.OpDisconnect):
		// A resend may be of a time when the target was elsewhere.
		return false
	}
	l := c.s.link.Load()
	if l == nil || l.gen != req.ClientGen || l.id != req.Client {
		return false
	}
	if !c.s.local && !l.heard.Load() {
		l.heard.Store(true)
	}
	return true
}

// inTime tells whether the body knows the request's VIP epoch already.
func (f *Front) inTime(req *wire.Request) bool {
	return req.VIP == 0 || req.VIPEpoch <= f.body.VIPEpoch(req.VIP)
}

// TryHandle implements wire.Target.
func (c *conn) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	f := c.f
	if !f.serving.Load() || !c.passes(req) || !f.inTime(req) {
		return false
	}
	c.load.enter()
	ok := f.serving.Load() && f.body.TryHandle(req, rep)
	c.leave(false)
	return ok
}

// MayBlock tells whether the body may wait for the disk in a request with this
// operation, for transports that then call Handle where it harms nobody.
func (c *conn) MayBlock(op wire.Op) bool { return c.f.mayBlock != nil && c.f.mayBlock(op) }

// Handle implements wire.Target.
func (c *conn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	f := c.f
	x := newCall(c, req, rep, done)
	if f.stopping.Load() {
		x.refuse(wire.ErrTargetDown)
		return
	}
	x.enter()
	if f.serving.Load() && c.passes(req) && f.inTime(req) {
		f.pass(x)
		return
	}
	lc := f.body.LastCommitted()
	f.mu.Lock()
	f.m.Committed(lc)
	f.decide(x)
}

// decide shows a request to the machine. The lock is held; decide gives it back.
func (f *Front) decide(x *call) {
	req, s := x.req, x.c.s
	serving := f.serving.Load()
	now := f.o.Clock.Now()
	x.at = now
	var acts []recov.Action
	switch {
	case f.stopping.Load():
		f.mu.Unlock()
		x.refuse(wire.ErrTargetDown)
		return
	case serving && x.c.passes(req):
		f.mu.Unlock()
		f.execute(x)
		return
	case !serving && (req.Op == wire.OpOSTFetch || s.local && req.Op != wire.OpConnect && f.links[req.Client] != s):
		if !f.hold(x) {
			f.mu.Unlock()
			x.refuse(wire.ErrRecovering)
			return
		}
	case req.Op == wire.OpConnect:
		if req.Client == (wire.ClientID{}) || s.num == noSession || s.num == 0 && !s.local ||
			s.client != (wire.ClientID{}) && s.client != req.Client {
			f.mu.Unlock()
			x.refuse(wire.ErrProto)
			return
		}
		s.client = req.Client
		acts = f.m.Connect(recov.Connect{
			Client: req.Client, Gen: req.ClientGen, Conn: s.num, Instance: req.Cookie, Transno: req.Transno,
			LastCommitted: req.LastCommitted, Estimate: time.Duration(req.Time), Local: s.local, Own: s.local && req.Client == f.o.Own, Handle: x,
		}, now)
		if n := len(acts) - 1; s.local && !serving && n >= 0 && acts[n].Handle == any(x) && acts[n].Status == wire.ErrUnknownClient && f.hold(x) {
			acts = acts[:n] // it is let in after recovery
		}
	default:
		num := s.num
		if f.links[req.Client] != s {
			num = noSession
		}
		if req.Op == wire.OpDisconnect {
			acts = f.m.Disconnect(req.Client, req.ClientGen, num, x, now)
			break
		}
		r := recov.Request{
			Client: req.Client, Gen: req.ClientGen, Conn: num, XID: req.XID, Slot: req.Slot, Transno: req.Transno,
			Flags: req.Flags, PreVersions: req.PreVersions, Class: classOf(req.Op), Handle: x,
		}
		if waitsAlways(req.Op) {
			r.Flags |= wire.FlagWaitCommit
		}
		acts = f.m.Request(r, now)
	}
	if len(acts) != 1 || !f.here(x, &acts[0]) {
		f.post(acts)
		f.mu.Unlock()
		f.poke()
		return
	}
	f.scan(&acts[0])
	a := acts[0] // the list is the machine's
	f.mu.Unlock()
	f.carryOut(&a)
}

// hold keeps a request until the target serves. The lock is held.
func (f *Front) hold(x *call) bool {
	if len(f.held) >= maxHeld {
		return false
	}
	f.held = append(f.held, x)
	return true
}

// here tells whether the caller's goroutine may carry out the only action that
// its request has led to. The lock is held.
func (f *Front) here(x *call, a *recov.Action) bool {
	switch a.Kind {
	case recov.ActReply, recov.ActDrop, recov.ActConnected:
		return a.Handle == any(x)
	case recov.ActExecute:
		return a.Handle == any(x) && !a.Replay && f.fences == 0
	}
	return false
}
