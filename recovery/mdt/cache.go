package mdt

import (
	"hash/maphash"
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/wire"
)

// The caches are filled by readers without the sequencer's lock. A reader that
// read the engine before a change must not put what it read into the cache after
// the change, so every shard counts the writers' updates: a fill is dropped when
// the count moved since before the engine was read.

const cacheShards = 64

// inodeCache maps FIDs to immutable inodes. Eviction is by clock.
type inodeCache struct{ shards [cacheShards]inodeShard }

type inodeShard struct {
	mu   sync.RWMutex
	m    map[uint64]*inodeSlot
	ring []*inodeSlot
	hand int
	max  int
	gen  uint64
	_    [32]byte
}

type inodeSlot struct {
	ino   *Inode
	idx   int
	ref   atomic.Bool
	dirty bool // has an access time that is not in the engine; stays
}

func newInodeCache(n int) *inodeCache {
	c := &inodeCache{}
	for i := range c.shards {
		c.shards[i].m = make(map[uint64]*inodeSlot)
		c.shards[i].max = max(n/cacheShards, 4)
	}
	return c
}

func (c *inodeCache) shard(f wire.FID) *inodeShard {
	h := (f.FileID()) * 0x9E3779B97F4A7C15
	return &c.shards[h>>(64-6)]
}

func (c *inodeCache) get(f wire.FID) *Inode {
	s := c.shard(f)
	s.mu.RLock()
	e := s.m[f.FileID()]
	if e == nil {
		s.mu.RUnlock()
		return nil
	}
	in := e.ino
	s.mu.RUnlock()
	if !e.ref.Load() {
		e.ref.Store(true)
	}
	if in.Attr.FID != f {
		return nil
	}
	return in
}

// gen is to be read before the engine, for fill.
func (c *inodeCache) gen(f wire.FID) uint64 {
	s := c.shard(f)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.gen
}

// gens reads all shards' counts.
func (c *inodeCache) gens(g *[cacheShards]uint64) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		g[i] = s.gen
		s.mu.RUnlock()
	}
}

func (c *inodeCache) shardIndex(f wire.FID) int {
	return int(f.FileID() * 0x9E3779B97F4A7C15 >> (64 - 6))
}

// fill adds what a reader found in the engine, unless a writer was faster.
func (c *inodeCache) fill(in *Inode, gen uint64) {
	s := c.shard(in.Attr.FID)
	s.mu.Lock()
	if s.gen == gen {
		if _, ok := s.m[in.Attr.FID.FileID()]; !ok {
			s.add(in, false)
		}
	}
	s.mu.Unlock()
}

// put replaces an inode; dirty keeps it in the cache until a put without.
func (c *inodeCache) put(in *Inode, dirty bool) {
	s := c.shard(in.Attr.FID)
	s.mu.Lock()
	s.gen++
	if e := s.m[in.Attr.FID.FileID()]; e != nil {
		e.ino, e.dirty = in, dirty
	} else {
		s.add(in, dirty)
	}
	s.mu.Unlock()
}

func (s *inodeShard) add(in *Inode, dirty bool) {
	if len(s.ring) >= s.max {
		// Two rounds of the hand find a victim unless all are dirty.
		for range 2 * len(s.ring) {
			if s.hand >= len(s.ring) {
				s.hand = 0
			}
			v := s.ring[s.hand]
			if !v.dirty && !v.ref.Swap(false) {
				s.drop(v)
				break
			}
			s.hand++
		}
	}
	e := &inodeSlot{ino: in, idx: len(s.ring), dirty: dirty}
	s.ring = append(s.ring, e)
	s.m[in.Attr.FID.FileID()] = e
}

func (s *inodeShard) drop(v *inodeSlot) {
	last := s.ring[len(s.ring)-1]
	s.ring[v.idx] = last
	last.idx = v.idx
	s.ring[len(s.ring)-1] = nil
	s.ring = s.ring[:len(s.ring)-1]
	delete(s.m, v.ino.Attr.FID.FileID())
}

func (c *inodeCache) remove(f wire.FID) {
	s := c.shard(f)
	s.mu.Lock()
	s.gen++
	if e := s.m[f.FileID()]; e != nil {
		s.drop(e)
	}
	s.mu.Unlock()
}

func (c *inodeCache) len() int {
	n := 0
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		n += len(s.ring)
		s.mu.RUnlock()
	}
	return n
}

// dentryCache maps (directory, name) to an entry; the zero FID means that the
// name does not exist.
type dentryCache struct {
	seed   maphash.Seed
	shards [cacheShards]dentryShard
}

type dentryShard struct {
	mu   sync.RWMutex
	m    map[uint64]*dentrySlot
	ring []*dentrySlot
	hand int
	max  int
	gen  uint64
	_    [32]byte
}

type dentrySlot struct {
	dir  wire.FID
	name string
	ent  Entry
	hash uint64
	next *dentrySlot // same hash
	idx  int
	ref  atomic.Bool
}

func newDentryCache(n int) *dentryCache {
	c := &dentryCache{seed: maphash.MakeSeed()}
	for i := range c.shards {
		c.shards[i].m = make(map[uint64]*dentrySlot)
		c.shards[i].max = max(n/cacheShards, 4)
	}
	return c
}

func (c *dentryCache) hash(dir wire.FID, name []byte) uint64 {
	h := maphash.Bytes(c.seed, name) ^ dir.FileID()*0x9E3779B97F4A7C15
	return h ^ h>>29
}

func (s *dentryShard) find(h uint64, dir wire.FID, name []byte) *dentrySlot {
	for e := s.m[h]; e != nil; e = e.next {
		if e.dir == dir && e.name == string(name) {
			return e
		}
	}
	return nil
}

// get returns the entry, whether the cache knows about the name, and the gen
// for fill.
func (c *dentryCache) get(dir wire.FID, name []byte) (ent Entry, known bool, gen uint64) {
	h := c.hash(dir, name)
	s := &c.shards[h&(cacheShards-1)]
	s.mu.RLock()
	gen = s.gen
	e := s.find(h, dir, name)
	if e == nil {
		s.mu.RUnlock()
		return Entry{}, false, gen
	}
	ent = e.ent
	s.mu.RUnlock()
	if !e.ref.Load() {
		e.ref.Store(true)
	}
	return ent, true, gen
}

func (c *dentryCache) fill(dir wire.FID, name []byte, ent Entry, gen uint64) {
	h := c.hash(dir, name)
	s := &c.shards[h&(cacheShards-1)]
	s.mu.Lock()
	if s.gen == gen && s.find(h, dir, name) == nil {
		s.add(h, dir, name, ent)
	}
	s.mu.Unlock()
}

// put is a writer's update.
func (c *dentryCache) put(dir wire.FID, name []byte, ent Entry) {
	h := c.hash(dir, name)
	s := &c.shards[h&(cacheShards-1)]
	s.mu.Lock()
	s.gen++
	if e := s.find(h, dir, name); e != nil {
		e.ent = ent
	} else {
		s.add(h, dir, name, ent)
	}
	s.mu.Unlock()
}

func (s *dentryShard) add(h uint64, dir wire.FID, name []byte, ent Entry) {
	if len(s.ring) >= s.max {
		for range 2 * len(s.ring) {
			if s.hand >= len(s.ring) {
				s.hand = 0
			}
			v := s.ring[s.hand]
			if !v.ref.Swap(false) {
				s.drop(v)
				break
			}
			s.hand++
		}
	}
	e := &dentrySlot{dir: dir, name: string(name), ent: ent, hash: h, next: s.m[h], idx: len(s.ring)}
	s.m[h] = e
	s.ring = append(s.ring, e)
}

func (s *dentryShard) drop(v *dentrySlot) {
	last := s.ring[len(s.ring)-1]
	s.ring[v.idx] = last
	last.idx = v.idx
	s.ring[len(s.ring)-1] = nil
	s.ring = s.ring[:len(s.ring)-1]
	e := s.m[v.hash]
	if e == v {
		if v.next == nil {
			delete(s.m, v.hash)
		} else {
			s.m[v.hash] = v.next
		}
		return
	}
	for ; e != nil; e = e.next {
		if e.next == v {
			e.next = v.next
			return
		}
	}
}

func (c *dentryCache) len() int {
	n := 0
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		n += len(s.ring)
		s.mu.RUnlock()
	}
	return n
}
