package tcp

import (
	"math/bits"
	"sync"
)

const minBuf = 4 << 10

// bufs holds a pool for each power of two from minBuf up. The Go allocator
// aligns blocks of these sizes to 4 KiB.
var bufs [16]sync.Pool

func bufClass(n int) int { return bits.Len(uint(max(n, minBuf)-1)) - bits.Len(uint(minBuf-1)) }

// getBuf gives n bytes that begin at a page boundary; their content is
// arbitrary. The pointer goes back with putBuf.
func getBuf(n int) *[]byte {
	c := bufClass(n)
	p, _ := bufs[c].Get().(*[]byte)
	if p == nil {
		b := make([]byte, minBuf<<c)
		p = &b
	}
	*p = (*p)[:n]
	return p
}

func putBuf(p *[]byte) {
	*p = (*p)[:cap(*p)]
	bufs[bufClass(cap(*p))].Put(p)
}

// bufCost is what a buffer of n bytes really takes.
func bufCost(n int) int64 {
	if n == 0 {
		return 0
	}
	return minBuf << bufClass(n)
}

// budget limits the memory of what is being worked on. Those who wait are
// served in order.
type budget struct {
	mu    sync.Mutex
	free  int64
	queue []*claim
}

type claim struct {
	n  int64
	ch chan struct{}
}

// try takes n bytes if there are so many and nobody waits, or with force.
func (b *budget) try(n int64, force bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if force || len(b.queue) == 0 && b.free >= n {
		b.free -= n
		return true
	}
	return false
}

// take takes n bytes when there are so many. It gives up, without them, when
// halt is closed (halted) or poke is heard.
func (b *budget) take(n int64, halt, poke <-chan struct{}) (got, halted bool) {
	b.mu.Lock()
	if len(b.queue) == 0 && b.free >= n {
		b.free -= n
		b.mu.Unlock()
		return true, false
	}
	c := &claim{n: n, ch: make(chan struct{})}
	b.queue = append(b.queue, c)
	b.mu.Unlock()
	select {
	case <-c.ch:
		return true, false
	case <-halt:
		halted = true
	case <-poke:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-c.ch: // got it in the last moment
		if !halted {
			return true, false
		}
		b.free += n
	default:
		for i, x := range b.queue {
			if x == c {
				b.queue = append(b.queue[:i], b.queue[i+1:]...)
				break
			}
		}
	}
	b.serve()
	return false, halted
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	b.free += n
	b.serve()
	b.mu.Unlock()
}

func (b *budget) serve() {
	for len(b.queue) > 0 && b.free >= b.queue[0].n {
		b.free -= b.queue[0].n
		close(b.queue[0].ch)
		b.queue[0] = nil
		b.queue = b.queue[1:]
	}
}
