package sunrpc

import (
	"slices"
	"sync/atomic"
)

// peer is one client address. While memory is short the addresses take turns, not the connections: a client
// can have as many of those as it likes.
type peer struct {
	conns int          // under Server.mu
	held  atomic.Int64 // bytes that the gates gave to its connections
}

// little is what a client may hold, in bytes, and still count as one that holds nothing.
const little = 64 << 10

// lineKey is who takes turns. On each address, connections that have taken what they asked for do not stand
// behind those of which nothing is known yet.
type lineKey struct {
	p      *peer
	proven bool
}

func (c *Conn) lineKey() lineKey {
	return lineKey{c.peer, c.replies.Load() > 0 && c.outBytes.Load() == 0}
}

// line is a waiting line in which every key has its turn; those of the same key are served in their order.
type line[T comparable] struct {
	queues map[lineKey]*lineQueue[T]
	ring   []*lineQueue[T] // none is empty; the first has its turn
}

type lineQueue[T comparable] struct {
	key lineKey
	l   []T
}

func (l *line[T]) empty() bool { return len(l.ring) == 0 }

func (l *line[T]) push(k lineKey, x T) {
	q := l.queues[k]
	if q == nil {
		if l.queues == nil {
			l.queues = make(map[lineKey]*lineQueue[T])
		}
		q = &lineQueue[T]{key: k}
		l.queues[k] = q
		l.ring = append(l.ring, q)
	}
	q.l = append(q.l, x)
}

// next takes off the one that has its turn if it is let, else the first that is let out of turn.
func (l *line[T]) next(let, outOfTurn func(T) bool) (x T, ok bool) {
	if l.empty() {
		return x, false
	}
	i := 0
	if !let(l.ring[0].l[0]) {
		i = slices.IndexFunc(l.ring, func(q *lineQueue[T]) bool { return outOfTurn(q.l[0]) })
	}
	if i < 0 {
		return x, false
	}
	q := l.ring[i]
	x = q.l[0]
	q.l = slices.Delete(q.l, 0, 1)
	l.ring = slices.Delete(l.ring, i, i+1)
	if len(q.l) > 0 {
		l.ring = append(l.ring, q)
	} else {
		delete(l.queues, q.key)
	}
	return x, true
}

// remove takes x off, which stands under k if it is there at all.
func (l *line[T]) remove(k lineKey, x T) bool {
	q := l.queues[k]
	if q == nil {
		return false
	}
	i := slices.Index(q.l, x)
	if i < 0 {
		return false
	}
	q.l = slices.Delete(q.l, i, i+1)
	if len(q.l) == 0 {
		delete(l.queues, k)
		i = slices.Index(l.ring, q)
		l.ring = slices.Delete(l.ring, i, i+1)
	}
	return true
}
