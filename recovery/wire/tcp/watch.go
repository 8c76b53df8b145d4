package tcp

import (
	"sync/atomic"
	"time"
)

// What a reader does.
const (
	waiting uint64 = iota // for a frame
	inFrame               // has a part of one
	working               // does not read
)

// watch tells a connection's watchdog what its reader does. The reader pays
// one atomic store per change and no clock.
type watch struct{ v atomic.Uint64 }

// set is called by the reader only.
func (w *watch) set(state uint64) { w.v.Store((w.v.Load()>>2+1)<<2 | state) }

// watchdog looks at a watch at every tick.
type watchdog struct {
	t    *Timeouts
	last uint64
	same time.Duration
}

// look is called once a tick. quiet is how long the reader has been waiting for
// a frame; dead tells that a timeout is over.
func (d *watchdog) look(w *watch, tick time.Duration) (quiet time.Duration, dead bool) {
	v := w.v.Load()
	if v != d.last {
		d.last, d.same = v, 0
		return 0, false
	}
	d.same += tick
	switch v & 3 {
	case waiting:
		return d.same, d.same >= d.t.Idle
	case inFrame:
		return 0, d.same >= d.t.Frame
	}
	return 0, false
}
