package nfsd

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// dupTable knows the non-idempotent calls that are being executed, so that a
// retransmission that overtakes its original waits for it and is then answered
// from the reply record instead of being executed beside it.
type dupTable struct {
	shards [16]struct {
		mu sync.Mutex
		m  map[dupKey]*dupEntry
	}
}

// dupKey is a ReplyKey without the port: a client may send a call again from
// another port.
type dupKey struct {
	addr [16]byte
	xid  uint32
	proc uint32
	sum  uint64
}

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

// begin registers o's call, or holds o (or drops its call) when the same call is
// being executed; it returns nil then, and o may already be running elsewhere: it
// must not be touched any more.
func (t *dupTable) begin(o *op, k *wire.ReplyKey) *dupEntry {
	key := dupKey{addr: k.Addr, xid: k.XID, proc: k.Proc, sum: k.Sum}
	s := &t.shards[k.XID%uint32(len(t.shards))]
	s.mu.Lock()
	e := s.m[key]
	if e == nil {
		e = &dupEntry{key: key}
		s.m[key] = e
		s.mu.Unlock()
		return e
	}
	held := len(e.waiting) < maxHeld
	if held {
		e.waiting = append(e.waiting, o)
	}
	s.mu.Unlock()
	if !held {
		o.c.Drop()
	}
	return nil
}

func (t *dupTable) end(e *dupEntry) {
	s := &t.shards[e.key.xid%uint32(len(t.shards))]
	s.mu.Lock()
	delete(s.m, e.key)
	w := e.waiting
	s.mu.Unlock()
	for _, o := range w {
		o.c.Go(o.onPool)
	}
}
