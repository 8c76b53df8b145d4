// Package target holds what metadata and object targets share: the transno
// counter and last_committed, the client table, fencing by VIP epoch and client
// generation, reply records for at-most-once execution, and the committer that
// makes groups of operations durable.
package target

import (
	"maps"

	"github.com/baton-nfs/baton/recovery/wire"
)

// View is an immutable picture of who may send requests. Readers use it
// without locks.
type View struct {
	clients map[wire.ClientID]uint64 // generation
	vips    map[uint32]uint64        // epoch
}

// Admit decides whether a request may be executed: OK, ErrStaleVIP,
// ErrStaleClient or ErrUnknownClient. OpConnect and OpSetVIPEpoch pass, Core
// decides about them.
func (v *View) Admit(h *wire.Header) wire.Status {
	switch h.Op {
	case wire.OpConnect, wire.OpSetVIPEpoch:
		return wire.OK
	}
	if h.VIP != 0 && h.VIPEpoch < v.vips[h.VIP] {
		return wire.ErrStaleVIP
	}
	return v.AdmitClient(h)
}

// AdmitClient is Admit as far as the sender is concerned, not the service address.
func (v *View) AdmitClient(h *wire.Header) wire.Status {
	gen, ok := v.clients[h.Client]
	switch {
	case !ok || h.ClientGen > gen:
		// A newer generation has to connect first, so that the old one is fenced.
		return wire.ErrUnknownClient
	case h.ClientGen < gen:
		return wire.ErrStaleClient
	}
	return wire.OK
}

// VIPEpoch returns the fencing epoch of vip, 0 when none was set.
func (v *View) VIPEpoch(vip uint32) uint64 { return v.vips[vip] }

// ClientGen returns the registered generation of a client.
func (v *View) ClientGen(id wire.ClientID) (uint64, bool) {
	g, ok := v.clients[id]
	return g, ok
}

// Clients returns the number of registered clients.
func (v *View) Clients() int { return len(v.clients) }

// EachClient calls fn for every registered client.
func (v *View) EachClient(fn func(id wire.ClientID, gen uint64)) {
	for id, g := range v.clients {
		fn(id, g)
	}
}

// EachVIP calls fn for every VIP with an epoch.
func (v *View) EachVIP(fn func(vip uint32, epoch uint64)) {
	for vip, e := range v.vips {
		fn(vip, e)
	}
}

// Core is the pure part of a target: no clock, no I/O, no goroutine, no lock.
// Its caller serialises calls and stores durably what the methods report as
// changed.
type Core struct {
	view      *View
	transno   uint64 // last assigned
	applied   uint64
	committed uint64
}

// NewCore returns the core of a target whose log ends at transno; everything
// up to it is committed.
func NewCore(transno uint64) *Core {
	return &Core{
		view:      &View{clients: map[wire.ClientID]uint64{}, vips: map[uint32]uint64{}},
		transno:   transno,
		applied:   transno,
		committed: transno,
	}
}

// View returns the current picture; it is replaced by changes, never altered.
func (c *Core) View() *View { return c.view }

func (c *Core) change(fn func(*View)) {
	v := &View{clients: maps.Clone(c.view.clients), vips: maps.Clone(c.view.vips)}
	fn(v)
	c.view = v
}

// Connect registers generation gen of a client: ErrStaleClient for a generation
// older than the registered one, else OK and whether the table changed.
func (c *Core) Connect(id wire.ClientID, gen uint64) (wire.Status, bool) {
	old, ok := c.view.clients[id]
	switch {
	case ok && gen < old:
		return wire.ErrStaleClient, false
	case ok && gen == old:
		return wire.OK, false
	}
	c.change(func(v *View) { v.clients[id] = gen })
	return wire.OK, true
}

// Disconnect removes a client and reports whether it was registered.
func (c *Core) Disconnect(id wire.ClientID) bool {
	if _, ok := c.view.clients[id]; !ok {
		return false
	}
	c.change(func(v *View) { delete(v.clients, id) })
	return true
}

// SetVIPEpoch raises the epoch of vip: ErrStaleVIP when epoch is older than the
// current one, ErrProto for VIP 0, else OK and whether it rose.
func (c *Core) SetVIPEpoch(vip uint32, epoch uint64) (wire.Status, bool) {
	if vip == 0 {
		return wire.ErrProto, false
	}
	old := c.view.vips[vip]
	switch {
	case epoch < old:
		return wire.ErrStaleVIP, false
	case epoch == old:
		return wire.OK, false
	}
	c.change(func(v *View) { v.vips[vip] = epoch })
	return wire.OK, true
}

// NextTransno is the number that AssignTransno would give.
func (c *Core) NextTransno() uint64 { return c.transno + 1 }

// AssignTransno gives the next transno. Numbers are given in log order.
func (c *Core) AssignTransno() uint64 {
	c.transno++
	return c.transno
}

// SkipTo makes the next transno at least t+1.
func (c *Core) SkipTo(t uint64) { c.transno = max(c.transno, t) }

// Applied notes that the operation with transno t is in the engine.
func (c *Core) Applied(t uint64) { c.applied = max(c.applied, t) }

// Committed notes that everything up to t is durable.
func (c *Core) Committed(t uint64) { c.committed = max(c.committed, min(t, c.applied)) }

// LastApplied is the highest transno in the engine.
func (c *Core) LastApplied() uint64 { return c.applied }

// LastCommitted is the highest transno known to be durable.
func (c *Core) LastCommitted() uint64 { return c.committed }

// Completer is told that a reply is complete.
type Completer interface{ Done() }

// Func is a function as a Completer.
type Func func()

// Done calls f.
func (f Func) Done() { f() }

// Waiter is a reply that is held until its transno is durable.
type Waiter struct {
	Transno uint64
	Rep     *wire.Reply
	Done    Completer
}

// Gate is a queue of waiters in the order of their transnos: a ring that grows
// to the largest number that ever waited at once. The zero Gate is empty.
type Gate struct {
	ring    []Waiter
	head, n int
}

// Push appends w. A waiter with a smaller transno than one before it waits for
// that one too.
func (g *Gate) Push(w Waiter) {
	if g.n == len(g.ring) {
		ring := make([]Waiter, max(64, 2*len(g.ring)))
		for i := range g.n {
			ring[i] = g.ring[(g.head+i)&(len(g.ring)-1)]
		}
		g.ring, g.head = ring, 0
	}
	g.ring[(g.head+g.n)&(len(g.ring)-1)] = w
	g.n++
}

// Pop takes the first waiter if its transno is at most committed.
func (g *Gate) Pop(committed uint64) (Waiter, bool) {
	if g.n == 0 || g.ring[g.head].Transno > committed {
		return Waiter{}, false
	}
	w := g.ring[g.head]
	g.ring[g.head] = Waiter{}
	g.head = (g.head + 1) & (len(g.ring) - 1)
	g.n--
	return w, true
}

// Len is the number of waiters.
func (g *Gate) Len() int { return g.n }
