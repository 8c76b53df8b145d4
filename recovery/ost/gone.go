package ost

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// maxGone bounds what is remembered of destroyed objects.
const maxGone = 1 << 17

// gone remembers the objects that were destroyed last. A write that was on its way
// when its file was removed must not make the object anew: nobody would ever
// destroy it again. FIDs are never reused, so the memory is never wrong.
type gone struct {
	mu   sync.Mutex
	m    map[objKey]struct{}
	ring []objKey
	at   int
}

func (g *gone) add(k objKey) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.m[k]; ok {
		return
	}
	if g.m == nil {
		g.m = make(map[objKey]struct{})
	}
	if len(g.ring) < maxGone {
		g.ring = append(g.ring, k)
	} else {
		delete(g.m, g.ring[g.at])
		g.ring[g.at] = k
		g.at = (g.at + 1) % maxGone
	}
	g.m[k] = struct{}{}
}

// check gives ErrStale for an object that was destroyed.
func (g *gone) check(k objKey) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.m[k]; ok {
		return wire.ErrStale
	}
	return nil
}
