package sunrpc

import (
	"sync"
	"sync/atomic"
)

// MaxPayload is the largest n that Call.Bulk accepts, in bytes.
const MaxPayload = 1 << 20

// classSizes are the capacities of pooled buffers in bytes. Every one is a multiple of the page size, and
// the Go allocator aligns blocks of these sizes to pages. 1 MiB + 64 KiB is a record with a full payload.
var classSizes = [...]int{
	4 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 1<<20 + 64<<10, 2 << 20, 4 << 20,
}

// classRetain bounds the bytes that one class keeps for reuse.
const classRetain = 32 << 20

// buf is a reference-counted pooled buffer, charged to one server's memory gauge while in use.
type buf struct {
	b     []byte
	refs  atomic.Int32
	class int // index into classSizes; -1: not pooled
	gauge *gauge
	// share and peer are of whom the memory is, if a gate gave it.
	share *share
	peer  *peer
}

// gauge is the memory in use by one server, in bytes. freed is called after a decrease, by n to now.
type gauge struct {
	used  atomic.Int64
	freed func(now, n int64)
}

// class is one size class: a LIFO stack, because the buffer used last is still in the CPU's cache.
// sync.Pool is not used: it forgets buffers at every collection, and allocating them again is what
// would cause the next one.
type class struct {
	mu   sync.Mutex
	free []*buf
	low  int // fewest free buffers since the last trim
}

var classes [len(classSizes)]class

func classFor(n int) int {
	for i, s := range classSizes {
		if n <= s {
			return i
		}
	}
	return -1
}

// bufSize is the size of the buffer that getBuf returns for n bytes.
func bufSize(n int) int {
	if ci := classFor(n); ci >= 0 {
		return classSizes[ci]
	}
	return n
}

// getBuf returns a buffer of at least n bytes with one reference. Its content is arbitrary.
func getBuf(g *gauge, n int) *buf {
	ci := classFor(n)
	var b *buf
	if ci >= 0 {
		n = classSizes[ci]
		c := &classes[ci]
		c.mu.Lock()
		if l := len(c.free); l > 0 {
			b = c.free[l-1]
			c.free[l-1] = nil
			c.free = c.free[:l-1]
			c.low = min(c.low, l-1)
		}
		c.mu.Unlock()
	}
	if b == nil {
		b = &buf{b: make([]byte, n), class: ci}
	}
	b.refs.Store(1)
	b.gauge = g
	g.used.Add(int64(n))
	return b
}

func (b *buf) retain() { b.refs.Add(1) }

func (b *buf) release() {
	if b.refs.Add(-1) != 0 {
		return
	}
	g, a, p := b.gauge, b.share, b.peer
	b.gauge, b.share, b.peer = nil, nil, nil
	n := len(b.b)
	if b.class >= 0 {
		c := &classes[b.class]
		c.mu.Lock()
		if (len(c.free)+1)*n <= classRetain {
			c.free = append(c.free, b)
		}
		c.mu.Unlock()
	}
	if a != nil {
		a.used.Add(int64(-n))
		p.held.Add(int64(-n))
	}
	g.freed(g.used.Add(int64(-n)), int64(n))
}

// trimBufs gives back half of what was not needed since the last call, and returns how many bytes that are.
func trimBufs() (bytes int64) {
	for i := range classes {
		c := &classes[i]
		c.mu.Lock()
		n := (c.low + 1) / 2
		if l := len(c.free); n > 0 && n <= l {
			// The bottom of the stack was unused for longest.
			copy(c.free, c.free[n:])
			clear(c.free[l-n:])
			c.free = c.free[:l-n]
			bytes += int64(n * classSizes[i])
		}
		c.low = len(c.free)
		c.mu.Unlock()
	}
	return bytes
}
