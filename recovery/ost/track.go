package ost

import (
	"sync"
	"sync/atomic"
)

// dirtyNode says that an object has changes since transno that are not durable.
// An object has two: one collects changes while the other one's are flushed.
type dirtyNode struct {
	obj        *object
	transno    uint64
	prev, next *dirtyNode
	linked     bool
}

// tracker gives out transnos and knows below which of them everything is
// durable. Its list is in transno order because a node is linked with the
// number that was just given out.
type tracker struct {
	mu      sync.Mutex
	next    uint64 // the last transno given out
	ceiling uint64 // reserved durably
	head    *dirtyNode
	tail    *dirtyNode

	n  atomic.Int64  // linked nodes
	lc atomic.Uint64 // last_committed
}

// transno gives a number to an operation that dirties no object: the next one,
// or, if no is not 0, that of a replay.
func (k *tracker) transno(no uint64) uint64 {
	k.mu.Lock()
	t := k.number(no)
	k.raise()
	k.mu.Unlock()
	return t
}

// number gives the next number or moves on to a replay's, which is higher than
// all before it.
func (k *tracker) number(no uint64) uint64 {
	if no == 0 {
		k.next++
		return k.next
	}
	k.next = max(k.next, no)
	return no
}

// mark gives a number, as transno does, to a change of o that the kernel has and
// the disk has not. Called with o.mu held, after the change was made: a flush
// that begins later covers it.
func (k *tracker) mark(o *object, no uint64) uint64 {
	k.mu.Lock()
	t := k.number(no)
	k.add(o)
	k.raise()
	k.mu.Unlock()
	return t
}

// link has o flushed as mark does, for a change that has no number.
func (k *tracker) link(o *object) {
	k.mu.Lock()
	k.add(o)
	k.mu.Unlock()
}

func (k *tracker) add(o *object) {
	n := &o.nodes[o.active]
	if n.linked {
		return
	}
	n.obj, n.transno, n.linked = o, k.next, true
	n.prev, n.next = k.tail, nil
	if k.tail != nil {
		k.tail.next = n
	} else {
		k.head = n
	}
	k.tail = n
	k.n.Add(1)
	o.refs.Add(1)
}

// start lets new numbers begin above next, up to ceiling.
func (k *tracker) start(next, ceiling uint64) {
	k.mu.Lock()
	k.next, k.ceiling = next, ceiling
	k.raise()
	k.mu.Unlock()
}

// begin starts a flush of o: changes from now on are collected in the other
// node. It returns nil when o has none.
func (k *tracker) begin(o *object) *dirtyNode {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := &o.nodes[o.active]
	if !n.linked {
		return nil
	}
	o.active ^= 1
	return n
}

// end says that what n stood for is durable (or known to be lost, and counted
// as such before). The caller drops the object reference that the node held.
func (k *tracker) end(n *dirtyNode) {
	k.mu.Lock()
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		k.head = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	} else {
		k.tail = n.prev
	}
	n.prev, n.next, n.linked = nil, nil, false
	k.n.Add(-1)
	k.raise()
	k.mu.Unlock()
}

// dirty tells whether o has changes that no flush has begun to cover.
func (k *tracker) dirty(o *object) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return o.nodes[o.active].linked
}

func (k *tracker) raise() {
	if k.head == nil {
		k.lc.Store(k.next)
	} else if k.head.transno > k.lc.Load()+1 {
		k.lc.Store(k.head.transno - 1)
	}
}

// oldest appends up to max dirty objects, oldest first, each with a reference
// for the caller, whose changes began at or before limit.
func (k *tracker) oldest(out []*object, max int, limit uint64) []*object {
	k.mu.Lock()
	defer k.mu.Unlock()
	for n := k.head; n != nil && len(out) < max && n.transno <= limit; n = n.next {
		n.obj.refs.Add(1)
		out = append(out, n.obj)
	}
	return out
}

func (k *tracker) last() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.next
}

// room is the number of transnos left below the ceiling.
func (k *tracker) room() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ceiling - k.next
}
