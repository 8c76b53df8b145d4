package sim

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// cellSize is the unit of the data model, a sector, which a disk writes as a whole.
const cellSize = 512

// ack is an answer that a frontend has given for a two-node export: what it says
// is durable survives one of the two nodes.
type ack struct {
	fe *frontend
	at time.Time
}

// cell is what a client knows of a sector of a file.
type cell struct {
	cur  uint32   // number of the write that was acknowledged last, 0: a hole
	old  []uint32 // what else it may be if the last ones were lost
	verf uint64   // 0: durable; else the verifier with which cur was acknowledged
	two  *ack     // cur is durable as long as one of two nodes lives
}

// file is an object in the model: a directory or a regular file.
type file struct {
	fid   wire.FID
	kids  map[string]*file // of a directory
	links int
	mode  uint32

	cells []cell
	cut   int // the size in cells that is durable by itself
}

func newFile(dir bool, mode uint32) *file {
	f := &file{links: 1, mode: mode}
	if dir {
		f.kids = map[string]*file{}
	}
	return f
}

func (f *file) names() []string {
	l := make([]string, 0, len(f.kids))
	for n := range f.kids {
		l = append(l, n)
	}
	sort.Strings(l)
	return l
}

// wrote is the acknowledgement of a write of version ver to cells [from, to).
func (f *file) wrote(from, to int, ver uint32, verf uint64, stable bool, two *ack) {
	for len(f.cells) < to {
		f.cells = append(f.cells, cell{})
	}
	for i := from; i < to; i++ {
		c := &f.cells[i]
		if stable && two == nil {
			*c = cell{cur: ver}
			continue
		}
		if c.cur != ver { // else it is sent again
			c.old = append(c.old, c.cur)
		}
		c.cur, c.two = ver, two
		if c.verf = verf; stable {
			c.verf = 0
		}
	}
}

// committed is the acknowledgement of a COMMIT; it gives the cells that have to be
// written again.
func (f *file) committed(mine func(i int) bool, verf uint64, two *ack) (again []int) {
	for i := range f.cells {
		c := &f.cells[i]
		switch {
		case !mine(i) || c.verf == 0:
		case c.verf != verf:
			again = append(again, i)
		case two != nil:
			c.verf, c.two = 0, two
		default:
			*c = cell{cur: c.cur}
		}
	}
	return again
}

func (f *file) truncated(size int) {
	if size < len(f.cells) {
		f.cells = slices.Clone(f.cells[:size])
	}
	for len(f.cells) < size {
		f.cells = append(f.cells, cell{})
	}
	f.cut = size
}

// fill makes the data of a write.
func fill(b []byte, ver uint32) {
	for i := 0; i < len(b); i += 4 {
		binary.LittleEndian.PutUint32(b[i:], ver)
	}
}

// version reads a sector; ok is false when it is none that was ever written.
func version(b []byte) (v uint32, ok bool) {
	v = binary.LittleEndian.Uint32(b)
	for i := 4; i < len(b); i += 4 {
		if binary.LittleEndian.Uint32(b[i:]) != v {
			return v, false
		}
	}
	return v, true
}

// risk tells whether what a cell has may be lost by what has happened since.
func (w *world) risk(c *cell, v *vip) bool {
	if c.verf != 0 && c.verf != w.verifier(v.index) {
		return true
	}
	return c.two != nil && w.bothDied(c.two, false)
}

// check compares what was read of cells [from, ...) with the model. size is the
// file's, in cells; only those that are mine are judged.
func (f *file) check(w *world, v *vip, mine func(int) bool, from int, data []byte, size int) error {
	for i := 0; i*cellSize < len(data); i++ {
		at := from + i
		if !mine(at) {
			continue
		}
		var c cell
		if at < len(f.cells) {
			c = f.cells[at]
		}
		b := data[i*cellSize : (i+1)*cellSize]
		got, ok := version(b)
		if !ok {
			return fmt.Errorf("%v: sector %d is torn: %x", f.fid, at, b[:16])
		}
		if c.cur == 0 && w.badDisk.Load() {
			continue // a failed flush may lose that something was cut off
		}
		if got != c.cur && !(w.risk(&c, v) && slices.Contains(c.old, got)) {
			return fmt.Errorf("%v: sector %d of %d has write %x, acknowledged is %x (verifier %d, now %d; at risk %v; before %x)",
				f.fid, at, size, got, c.cur, c.verf, w.verifier(v.index), w.risk(&c, v), c.old)
		}
	}
	return nil
}

// least is the smallest size in cells that the file can have, as far as cells are
// mine.
func (f *file) least(w *world, v *vip, mine func(int) bool) int {
	n := f.cut
	if w.badDisk.Load() {
		n = 0 // see check
	}
	for i := range f.cells {
		c := &f.cells[i]
		if mine(i) && (c.cur != 0 || len(c.old) > 0) && !w.risk(c, v) {
			n = max(n, i+1)
		}
	}
	return n
}

// history of what has lost data that were not durable: when stores lost them.
type history struct {
	mu   sync.Mutex
	mdt  []loss
	osts []loss
}

// loss is that what a store had in a node's memory is lost.
type loss struct {
	at time.Time
	n  *node
}

func (h *history) add(mdt bool, n *node, at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := loss{at, n}
	if mdt {
		h.mdt = append(h.mdt, l)
	} else {
		h.osts = append(h.osts, l)
	}
}

// bothDied tells whether an acknowledgement may be void because the frontend that
// gave it and a target on another node have died close to each other.
func (w *world) bothDied(a *ack, mdt bool) bool {
	a.fe.mu.Lock()
	ended := slices.Clone(a.fe.ended)
	a.fe.mu.Unlock()
	w.history.mu.Lock()
	defer w.history.mu.Unlock()
	losses := w.history.osts
	if mdt {
		losses = w.history.mdt
	}
	for _, e := range ended {
		for _, l := range losses {
			t := l.at
			if l.n == a.fe.p.node {
				continue // for what is there they wait for the disk
			}
			if !e.Before(a.at) && !t.Before(a.at) && t.Before(e.Add(20*time.Second)) && e.Before(t.Add(60*time.Second)) {
				return true
			}
		}
	}
	return false
}

// rwLock is for clients that must not do something at the same time. Who waits
// lets simulated time go on.
type rwLock struct {
	mu      sync.Mutex
	cond    *sync.Cond
	readers int
	writer  bool
}

func newRWLock() *rwLock {
	l := &rwLock{}
	l.cond = sync.NewCond(&l.mu)
	return l
}

func (l *rwLock) lock(exclusive bool) {
	l.mu.Lock()
	for l.writer || exclusive && l.readers > 0 {
		l.cond.Wait()
	}
	if exclusive {
		l.writer = true
	} else {
		l.readers++
	}
	l.mu.Unlock()
}

func (l *rwLock) unlock(exclusive bool) {
	l.mu.Lock()
	if exclusive {
		l.writer = false
	} else {
		l.readers--
	}
	l.cond.Broadcast()
	l.mu.Unlock()
}
