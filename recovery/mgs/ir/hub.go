package ir

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Clock gives the time and timers.
type Clock struct {
	Now func() time.Time
	// AfterFunc calls f once in d, from any goroutine, unless stopped.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)
}

func systemClock() Clock {
	return Clock{
		Now:       time.Now,
		AfterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}

// HubOptions of NewHub. Incarnation is required.
type HubOptions struct {
	Config
	// Incarnation numbers the starts of the registry.
	Incarnation uint64
	Clock       Clock // default: the machine's
	Logger      *slog.Logger
}

// Hub serves a table. A watch that waits holds no goroutine and no worker: it is
// answered by who brings the news, or by a timer. Its methods are safe for concurrent
// use; none of them blocks.
type Hub struct {
	clock Clock
	log   *slog.Logger

	mu     sync.Mutex // never held while a request is answered
	t      *Table
	conns  uint64
	closed bool
	unarm  func() bool
	armed  time.Time // when the timer fires, zero: none is set
	firing sync.WaitGroup
}

// watch is a request that waits.
type watch struct {
	rep  *wire.Reply
	done func()
}

// NewHub returns the table of a registry that has started now.
func NewHub(o HubOptions) *Hub {
	if o.Clock.Now == nil {
		o.Clock = systemClock()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Hub{clock: o.Clock, log: o.Logger, t: NewTable(o.Config, o.Incarnation, o.Clock.Now())}
}

// Conn is the hub for what comes by one connection. Its owner calls Close when the
// connection has ended.
type Conn struct {
	h   *Hub
	num uint64
	// node is that of the certificate, "" in one process: then the first watch names it.
	node          string
	authenticated bool
}

// Accept takes a connection, of an authenticated node unless node is "".
func (h *Hub) Accept(node string) *Conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conns++
	c := &Conn{h: h, num: h.conns, node: node, authenticated: node != ""}
	if c.authenticated {
		h.t.Connected(node)
	}
	return c
}

// Close refuses what the connection has waiting.
func (c *Conn) Close() {
	h := c.h
	h.mu.Lock()
	var out []Answer
	if c.node != "" {
		out = h.take(h.t.Gone(c.num, c.node, c.authenticated, h.clock.Now()))
	}
	h.mu.Unlock()
	h.give(out)
}

// take arms the timer and copies answers, which are given without the lock. The lock
// is held.
func (h *Hub) take(out []Answer) []Answer {
	if len(out) > 0 {
		out = append([]Answer(nil), out...)
	}
	at, ok := h.t.NextTick()
	if h.closed || !ok || !h.armed.IsZero() && !at.Before(h.armed) {
		return out
	}
	h.disarm()
	h.armed = at
	h.firing.Add(1)
	fired := sync.OnceFunc(h.firing.Done)
	stop := h.clock.AfterFunc(max(at.Sub(h.clock.Now()), 0), func() {
		defer fired()
		h.tick(at)
	})
	h.unarm = func() bool {
		ok := stop()
		if ok {
			fired()
		}
		return ok
	}
	return out
}

// disarm takes the timer back. The lock is held.
func (h *Hub) disarm() {
	if h.unarm != nil {
		h.unarm()
		h.unarm, h.armed = nil, time.Time{}
	}
}

// tick is the timer that was set for at.
func (h *Hub) tick(at time.Time) {
	h.mu.Lock()
	if h.closed || !h.armed.Equal(at) {
		h.mu.Unlock()
		return
	}
	h.unarm, h.armed = nil, time.Time{}
	out := h.take(h.t.Tick(h.clock.Now()))
	h.mu.Unlock()
	h.give(out)
}

// give answers watches.
func (h *Hub) give(out []Answer) {
	for i := range out {
		w := out[i].Handle.(*watch)
		if out[i].News == nil {
			w.rep.Status = wire.ErrTargetDown
		} else {
			w.rep.Data, w.rep.Status = appendJSON(w.rep.Data, out[i].News)
		}
		w.done()
	}
}

func appendJSON(b []byte, v any) ([]byte, wire.Status) {
	j, err := json.Marshal(v)
	if err != nil || len(j) > wire.MaxData {
		return b, wire.ErrServerFault
	}
	return append(b, j...), wire.OK
}

// Close refuses all watches, and every request from now on. What the timer was doing
// has been done when it returns.
func (h *Hub) Close() {
	h.mu.Lock()
	var out []Answer
	if !h.closed {
		h.closed = true
		out = append(out, h.t.Close()...)
		h.disarm()
	}
	h.mu.Unlock()
	h.give(out)
	h.firing.Wait()
}

// Serves tells whether the operation is the hub's.
func Serves(op wire.Op) bool {
	return op == wire.OpAnnounce || op == wire.OpWatch || op == wire.OpWatchers
}

// Handle answers a request of the connection; done is called once, before Handle
// returns or, for a watch, later. rep has been reset.
func (c *Conn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	h := c.h
	var err error
	switch req.Op {
	case wire.OpWatch:
		var w Watch
		if w, err = decodeWatch(req.Data); err == nil {
			err = c.same(w.Node)
		}
		if err == nil {
			h.watch(c, w, &watch{rep, done})
			return
		}
	case wire.OpAnnounce:
		var a Announcement
		if a, err = decodeAnnouncement(req.Data); err == nil && c.authenticated && a.Node != c.node {
			err = errOther
		}
		if err == nil {
			h.announce(a, rep, done)
			return
		}
	default:
		s, _, ok := h.Status()
		if rep.Status = wire.ErrTargetDown; ok {
			rep.Data, rep.Status = appendJSON(rep.Data, &s)
		}
	}
	if err != nil {
		h.log.Debug("registry: bad request", "op", req.Op, "node", c.node, "err", err)
		rep.Status = wire.ErrProto
	}
	done()
}

// same binds a connection to the node that it has named first.
func (c *Conn) same(node string) error {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	if c.node == "" {
		c.node = node
	}
	if c.node != node {
		return errOther
	}
	return nil
}

func (h *Hub) watch(c *Conn, w Watch, x *watch) {
	out := []Answer{{Handle: x}}
	h.mu.Lock()
	if !h.closed {
		out = h.take(h.t.Watch(w, c.num, x, h.clock.Now()))
	}
	h.mu.Unlock()
	h.give(out)
}

func (h *Hub) announce(a Announcement, rep *wire.Reply, done func()) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		rep.Status = wire.ErrTargetDown
		done()
		return
	}
	was := h.t.version
	taken, out := h.t.Announce(a, h.clock.Now())
	changed := h.t.version != was
	out = h.take(out)
	h.mu.Unlock()
	if changed {
		h.log.Info("targets have changed", "target", a.Target, "node", a.Node, "instance", a.Instance, "up", a.Up, "version", taken.Version, "state", taken.State)
	}
	rep.Data, rep.Status = appendJSON(rep.Data, &taken)
	h.give(out)
	done()
}

// Status returns the table's figures and entries; false when it is closed.
func (h *Hub) Status() (Status, []Target, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.t.Status(h.clock.Now()), h.t.Targets(), !h.closed
}

// ask makes a call that is answered with JSON.
func ask(ctx context.Context, conn wire.Conn, op wire.Op, xid uint64, body any) ([]byte, error) {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	req := wire.Request{Header: wire.Header{Op: op, XID: xid}, Data: data}
	var rep wire.Reply
	if err := conn.Call(ctx, &req, &rep); err != nil {
		return nil, err
	}
	if rep.Status != wire.OK {
		return nil, rep.Status
	}
	return rep.Data, nil
}
