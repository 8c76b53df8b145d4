// Package inflight knows the non-idempotent calls that are being executed, so
// that a retransmission that overtakes its original waits for it and is then
// answered from the reply record instead of being executed beside it.
package inflight

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// MaxHeld bounds the duplicates held for one call; more are to be dropped, and
// the client sends them again.
const MaxHeld = 4

const shards = 16

// key is a ReplyKey without the port: a client may send a call again from
// another port.
type key struct {
	addr [16]byte
	xid  uint32
	proc uint32
	sum  uint64
}

// Entry is one call's place in a Table; T names a call. It belongs to the call's
// own memory, so that a call needs no allocation, and must stay where it is
// while Running.
type Entry[T any] struct {
	key     key
	waiting []T
	running bool
}

// Running tells whether the entry is in the table.
func (e *Entry[T]) Running() bool { return e.running }

// Verdict is what becomes of a call.
type Verdict uint8

// Verdicts of Begin.
const (
	// Run: nobody executes the call; it is entered and may run.
	Run Verdict = iota
	// Held: the same call is being executed; this one comes out of End. It may
	// already have: its owner must not touch it any more.
	Held
	// Full: the same call is being executed, and enough duplicates wait.
	Full
)

// Table holds the calls that are being executed. It is safe for concurrent use.
type Table[T any] struct {
	shards [shards]struct {
		mu sync.Mutex
		m  map[key]*Entry[T]
	}
}

// New returns an empty table.
func New[T any]() *Table[T] {
	t := new(Table[T])
	for i := range t.shards {
		t.shards[i].m = make(map[key]*Entry[T])
	}
	return t
}

// Begin enters a call with the key k, or holds it back.
func (t *Table[T]) Begin(e *Entry[T], k *wire.ReplyKey, call T) Verdict {
	kk := key{addr: k.Addr, xid: k.XID, proc: k.Proc, sum: k.Sum}
	s := &t.shards[k.XID%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.m[kk]
	switch {
	case first == nil:
		e.key, e.running = kk, true
		s.m[kk] = e
		return Run
	case len(first.waiting) >= MaxHeld:
		return Full
	}
	first.waiting = append(first.waiting, call)
	return Held
}

// End takes a call out and returns the duplicates that waited for it, which may
// run now. It does nothing for an entry that is not Running.
func (t *Table[T]) End(e *Entry[T]) []T {
	if !e.running {
		return nil
	}
	s := &t.shards[e.key.xid%shards]
	s.mu.Lock()
	delete(s.m, e.key)
	w := e.waiting
	e.waiting, e.running = nil, false
	s.mu.Unlock()
	return w
}

// Len is the number of calls in the table.
func (t *Table[T]) Len() int {
	n := 0
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		n += len(s.m)
		s.mu.Unlock()
	}
	return n
}
