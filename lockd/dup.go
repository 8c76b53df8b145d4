package lockd

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// dupTable knows the modifying calls that are being executed, so that a
// retransmission that overtakes its original waits for it and is then answered
// from the reply record.
type dupTable struct {
	shards [16]struct {
		mu sync.Mutex
		m  map[dupKey]*dupEntry
	}
}

// dupKey is a ReplyKey without the port.
type dupKey struct {
	addr [16]byte
	xid  uint32
	proc uint32
	sum  uint64
}

// dupEntry is part of its op, so that a call needs no allocation.
type dupEntry struct {
	key     dupKey
	waiting []*op
}

// maxHeld bounds the duplicates held for one call; more are dropped, and the
// client sends them again.
const maxHeld = 4

func (t *dupTable) init() {
	for i := range t.shards {
		t.shards[i].m = make(map[dupKey]*dupEntry)
	}
}

// begin registers o's call. It returns false when the same call is being executed:
// o is held or its call is dropped, and o may already be running elsewhere.
func (t *dupTable) begin(o *op, k *wire.ReplyKey) bool {
	key := dupKey{addr: k.Addr, xid: k.XID, proc: k.Proc, sum: k.Sum}
	s := &t.shards[k.XID%uint32(len(t.shards))]
	s.mu.Lock()
	e := s.m[key]
	if e == nil {
		o.dup.key = key
		o.running = true
		s.m[key] = &o.dup
		s.mu.Unlock()
		return true
	}
	held := len(e.waiting) < maxHeld
	if held {
		e.waiting = append(e.waiting, o)
	}
	s.mu.Unlock()
	if !held {
		o.a.count.dropped.Add(1)
		o.c.Drop()
	}
	return false
}

// end lets held duplicates of o's call run.
func (t *dupTable) end(o *op) {
	if !o.running {
		return
	}
	o.running = false
	e := &o.dup
	s := &t.shards[e.key.xid%uint32(len(t.shards))]
	s.mu.Lock()
	delete(s.m, e.key)
	w := e.waiting
	e.waiting = nil
	s.mu.Unlock()
	for _, d := range w {
		d.c.Go(d.onPool)
	}
}
