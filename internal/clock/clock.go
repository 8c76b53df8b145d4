// Package clock gives the strictly rising time that file timestamps are made of.
package clock

import (
	"sync/atomic"
	"time"
)

// Strict is a clock whose readings are nanoseconds since 1970 UTC and strictly
// rise: two changes never carry the same time, so clients that compare ctime or
// mtime notice each of them. It follows the wall clock, and runs ahead of it by
// a nanosecond per reading while that stands still or goes back.
type Strict struct {
	last atomic.Int64
	// Wall is the underlying clock; time.Now when nil.
	Wall func() time.Time
}

// Now returns the next reading.
func (c *Strict) Now() int64 {
	var now int64
	if c.Wall != nil {
		now = c.Wall().UnixNano()
	} else {
		now = time.Now().UnixNano()
	}
	for {
		last := c.last.Load()
		if now <= last {
			now = last + 1
		}
		if c.last.CompareAndSwap(last, now) {
			return now
		}
	}
}

// NotBefore makes all later readings greater than t, for example the newest
// time found in a store whose wall clock was ahead.
func (c *Strict) NotBefore(t int64) {
	for {
		last := c.last.Load()
		if t <= last || c.last.CompareAndSwap(last, t) {
			return
		}
	}
}
