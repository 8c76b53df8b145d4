package mdt

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/store"
)

// logEngine is an engine in memory whose log can lose its end, at any batch.
// With held set, Sync waits until the test calls allow, so that what is durable
// does not depend on the time.
type logEngine struct {
	mu      sync.Mutex
	cond    sync.Cond
	keys    []string // ascending
	vals    map[string][]byte
	log     [][]logChange
	durable int // batches
	held    bool
	dead    bool
	fail    atomic.Bool // Apply fails
	room    store.Room
}

// logChange is a change of a batch: with del a deletion, with upper of a range.
type logChange struct {
	key, value, upper []byte
	del               bool
}

var _ store.Engine = (*logEngine)(nil)

func newLogEngine() *logEngine {
	e := &logEngine{vals: map[string][]byte{}}
	e.cond.L = &e.mu
	return e
}

// cut gives the engine that a start finds when the first n batches have survived.
func (e *logEngine) cut(n int) *logEngine {
	e.mu.Lock()
	log := e.log[:n:n]
	e.mu.Unlock()
	c := newLogEngine()
	for _, b := range log {
		c.apply(b)
	}
	c.log, c.durable, c.held = log, n, e.held
	return c
}

// die makes every later change fail.
func (e *logEngine) die() {
	e.mu.Lock()
	e.dead = true
	e.cond.Broadcast()
	e.mu.Unlock()
}

// hold stops Sync, allow lets it run.
func (e *logEngine) hold()  { e.setHeld(true) }
func (e *logEngine) allow() { e.setHeld(false) }

func (e *logEngine) setHeld(on bool) {
	e.mu.Lock()
	e.held = on
	e.cond.Broadcast()
	e.mu.Unlock()
}

// ends gives the number of durable batches and of all.
func (e *logEngine) ends() (durable, all int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.durable, len(e.log)
}

func (e *logEngine) apply(b []logChange) {
	for _, c := range b {
		k := string(c.key)
		i, found := slices.BinarySearch(e.keys, k)
		switch {
		case c.upper != nil:
			j, _ := slices.BinarySearch(e.keys, string(c.upper))
			for _, k := range e.keys[i:j] {
				delete(e.vals, k)
			}
			e.keys = slices.Delete(e.keys, i, j)
		case c.del && found:
			delete(e.vals, k)
			e.keys = slices.Delete(e.keys, i, i+1)
		case !c.del:
			if !found {
				e.keys = slices.Insert(e.keys, i, k)
			}
			e.vals[k] = c.value
		}
	}
}

func (e *logEngine) Get(key, buf []byte) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, ok := e.vals[string(key)]
	if !ok {
		return nil, store.ErrNotFound
	}
	return append(buf[:0], v...), nil
}

func (e *logEngine) NewIter(lower, upper []byte) (store.Iter, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	i, j := 0, len(e.keys)
	if lower != nil {
		i, _ = slices.BinarySearch(e.keys, string(lower))
	}
	if upper != nil {
		j, _ = slices.BinarySearch(e.keys, string(upper))
	}
	it := &logIter{at: -1}
	for _, k := range e.keys[i:max(i, j)] {
		it.keys, it.vals = append(it.keys, k), append(it.vals, e.vals[k])
	}
	return it, nil
}

func (e *logEngine) NewBatch() store.Batch { return &logBatch{} }

func (e *logEngine) Apply(b store.Batch) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dead || e.fail.Load() {
		return store.ErrFailed
	}
	c := b.(*logBatch).c
	e.apply(c)
	e.log = append(e.log, c)
	return nil
}

func (e *logEngine) Sync() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.log)
	for e.held && !e.dead {
		e.cond.Wait()
	}
	if e.dead {
		return store.ErrFailed
	}
	e.durable = max(e.durable, n)
	return nil
}

func (e *logEngine) Failed() error          { return nil }
func (e *logEngine) Room() store.Room       { return e.room }
func (e *logEngine) Metrics() store.Metrics { return store.Metrics{} }
func (e *logEngine) Close() error           { return nil }

type logBatch struct{ c []logChange }

func (b *logBatch) Set(k, v []byte) {
	b.c = append(b.c, logChange{key: bytes.Clone(k), value: append([]byte{}, v...)})
}
func (b *logBatch) Delete(k []byte) { b.c = append(b.c, logChange{key: bytes.Clone(k), del: true}) }
func (b *logBatch) DeleteRange(l, u []byte) {
	b.c = append(b.c, logChange{key: bytes.Clone(l), upper: bytes.Clone(u)})
}
func (b *logBatch) Len() int { return len(b.c) }
func (b *logBatch) Close()   {}

type logIter struct {
	keys []string
	vals [][]byte
	at   int
}

func (i *logIter) First() bool { i.at = 0; return i.Valid() }
func (i *logIter) Next() bool  { i.at++; return i.Valid() }
func (i *logIter) Valid() bool { return i.at >= 0 && i.at < len(i.keys) }
func (i *logIter) SeekGE(k []byte) bool {
	i.at, _ = slices.BinarySearch(i.keys, string(k))
	return i.Valid()
}
func (i *logIter) Key() []byte   { return []byte(i.keys[i.at]) }
func (i *logIter) Value() []byte { return i.vals[i.at] }
func (i *logIter) Error() error  { return nil }
func (i *logIter) Close() error  { return nil }
