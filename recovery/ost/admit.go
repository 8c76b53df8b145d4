package ost

import (
	"maps"
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/ost/slots"
	"github.com/baton-nfs/baton/recovery/wire"
)

// admission answers from a copy of the superblock's tables that is replaced as a
// whole, so that the data path takes no lock.
type admission struct{ tables atomic.Pointer[tables] }

type tables struct {
	epochs  map[uint32]uint64
	clients map[wire.ClientID]admitted
	fences  map[wire.ClientID]uint64
}

type admitted struct {
	gen   uint64
	slots *slots.Area // nil: none are kept
}

func (a *admission) set(s *super, f *slots.File) {
	t := &tables{maps.Clone(s.Epochs), make(map[wire.ClientID]admitted, len(s.Clients)), maps.Clone(s.Fences)}
	for id, r := range s.Clients {
		t.clients[id] = admitted{r.Gen, f.Area(id, r.Gen)}
	}
	a.tables.Store(t)
}

// check refuses requests of a VIP's former owner, of clients that are not
// registered, and of those that were fenced. VIP 0 and the zero client are not
// checked, nor are the requests that change these tables.
func (a *admission) check(h *wire.Header) wire.Status {
	switch h.Op {
	case wire.OpSetVIPEpoch, wire.OpFence:
		return wire.OK
	}
	t := a.tables.Load()
	if h.VIP != 0 && h.VIPEpoch < t.epochs[h.VIP] {
		return wire.ErrStaleVIP
	}
	if h.Client == (wire.ClientID{}) || h.Op == wire.OpConnect {
		return wire.OK
	}
	c, ok := t.clients[h.Client]
	switch {
	case !ok:
		return wire.ErrUnknownClient
	case h.ClientGen < c.gen:
		return wire.ErrStaleClient
	case h.ClientGen > c.gen:
		// A new life of the client that has not connected yet.
		return wire.ErrUnknownClient
	case len(t.fences) > 0 && h.Tenure < t.fences[h.Client]:
		return wire.ErrTooLate
	}
	return wire.OK
}

// gate counts the modifying requests under way, so that one can wait until those
// that were admitted by older tables are through. Who enters while somebody waits
// is not held up: it counts for the other side. The order is: enter, check, and
// execute; and on the other hand: new tables, then drain.
type gate struct {
	side atomic.Uint32
	n    [2]struct {
		atomic.Int64
		_ [56]byte // a cache line of its own
	}
	drains sync.Mutex // one at a time
	mu     sync.Mutex
	cond   sync.Cond
}

// enter gives the side to leave by.
func (g *gate) enter() uint32 {
	for {
		s := g.side.Load() & 1
		g.n[s].Add(1)
		if g.side.Load()&1 == s {
			return s
		}
		// Sides were changed in between: it is not known who waits for this one.
		g.leave(s)
	}
}

func (g *gate) leave(s uint32) {
	if g.n[s].Add(-1) == 0 && g.side.Load()&1 != s {
		g.mu.Lock()
		g.cond.Broadcast()
		g.mu.Unlock()
	}
}

// drain waits for all who entered before the call.
func (g *gate) drain() {
	g.drains.Lock()
	defer g.drains.Unlock()
	old := g.side.Load() & 1
	g.side.Add(1)
	g.mu.Lock()
	for g.n[old].Load() != 0 {
		g.cond.Wait()
	}
	g.mu.Unlock()
}

// drainQueue calls functions after the gate was drained; those that come
// together share one drain.
type drainQueue struct {
	mu     sync.Mutex
	cond   sync.Cond
	list   []func(error)
	closed bool
}

func (q *drainQueue) add(done func(error)) {
	q.mu.Lock()
	q.list = append(q.list, done)
	q.mu.Unlock()
	q.cond.Signal()
}

func (q *drainQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.cond.Signal()
}

// drainer serves the queue until it is closed and empty.
func (t *Target) drainer() {
	defer t.wg.Done()
	q := &t.drained
	for {
		q.mu.Lock()
		for len(q.list) == 0 && !q.closed {
			q.cond.Wait()
		}
		list := q.list
		q.list = nil
		q.mu.Unlock()
		if len(list) == 0 {
			return
		}
		t.gate.drain()
		for _, done := range list {
			done(nil)
		}
	}
}
