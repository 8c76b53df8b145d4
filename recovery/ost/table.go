package ost

import (
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// objKey names an object.
type objKey struct {
	fid    wire.FID
	stripe uint8
}

func (k objKey) hash() uint64 {
	h := k.fid.Seq*0x9e3779b97f4a7c15 ^ uint64(k.fid.OID)*0xc2b2ae3d27d4eb4f ^ uint64(k.stripe)*0x165667b19e3779f9
	h ^= h >> 29
	h *= 0xbf58476d1ce4e5b9
	return h ^ h>>32
}

// dir is the fan-out directory. Objects made one after another share one, so
// that one fsync makes a whole group of names durable.
func (k objKey) dir() uint8 {
	h := (k.fid.Seq<<26 ^ uint64(k.fid.OID>>6)) * 0x9e3779b97f4a7c15
	return uint8(h >> 56)
}

const tableShards = 16

// table holds the objects in use and recently used.
type table struct {
	cap    int // objects per shard that are kept when idle
	shards [tableShards]shard
}

type shard struct {
	mu   sync.Mutex
	m    map[objKey]*object
	head *object // newest
	tail *object
}

func (t *table) init(maxObjects int) {
	t.cap = max(1, maxObjects/tableShards)
	for i := range t.shards {
		t.shards[i].m = make(map[objKey]*object)
	}
}

func (t *table) shard(k objKey) *shard { return &t.shards[k.hash()%tableShards] }

func (s *shard) push(o *object) {
	o.lruNext, o.lruPrev = s.head, nil
	if s.head != nil {
		s.head.lruPrev = o
	} else {
		s.tail = o
	}
	s.head = o
}

func (s *shard) unlink(o *object) {
	if o.lruPrev != nil {
		o.lruPrev.lruNext = o.lruNext
	} else {
		s.head = o.lruNext
	}
	if o.lruNext != nil {
		o.lruNext.lruPrev = o.lruPrev
	} else {
		s.tail = o.lruPrev
	}
	o.lruPrev, o.lruNext = nil, nil
}

// peek returns the object with a reference if it is in the table.
func (t *table) peek(k objKey) *object {
	s := t.shard(k)
	s.mu.Lock()
	o := s.m[k]
	if o != nil {
		o.refs.Add(1)
		o.used.Store(true)
	}
	s.mu.Unlock()
	return o
}

// get returns the object, made if it is not in the table, with a reference.
// victims are objects that were dropped from the table for it; the caller
// closes them.
func (t *table) get(k objKey, victims []*object) (*object, []*object) {
	s := t.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.m[k]; o != nil {
		o.refs.Add(1)
		o.used.Store(true)
		return o, victims
	}
	o := newObject(k)
	o.refs.Store(1)
	s.m[k] = o
	s.push(o)
	// Second chance: an object that was used since it was last looked at goes
	// round once more. Busy and dirty ones have references and stay.
	for tries := 0; len(s.m) > t.cap && tries < 16; tries++ {
		v := s.tail
		if v == o {
			break
		}
		s.unlink(v)
		if v.refs.Load() != 0 || v.used.Swap(false) {
			s.push(v)
			continue
		}
		delete(s.m, v.key)
		victims = append(victims, v)
	}
	return o, victims
}

// drop takes o out of the table if it is there.
func (t *table) drop(o *object) {
	s := t.shard(o.key)
	s.mu.Lock()
	if s.m[o.key] == o {
		delete(s.m, o.key)
		s.unlink(o)
	}
	s.mu.Unlock()
}

func (t *table) len() int {
	n := 0
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		n += len(s.m)
		s.mu.Unlock()
	}
	return n
}
