package owner

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// bootClock reads CLOCK_BOOTTIME, which runs on while the machine sleeps. That is a
// system call, the monotonic clock is not; both differ by the time that the machine
// has slept. A machine that goes to sleep and wakes up takes much longer than trust
// for it, awake, so the difference of a moment ago is still true.
type bootClock struct {
	start time.Time
	last  atomic.Pointer[bootDiff]
}

type bootDiff struct {
	at   int64 // monotonic
	diff int64 // what to add to the monotonic clock
}

const trust = int64(time.Millisecond)

// now is never later than CLOCK_BOOTTIME, and at most trust earlier.
func (c *bootClock) now() int64 {
	m := int64(time.Since(c.start))
	if d := c.last.Load(); d != nil && m-d.at < trust {
		return m + d.diff
	}
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 1<<63 - 1 // cannot happen; nothing would be owned
	}
	b := t.Nano()
	// If the process was stopped between the readings they do not belong together.
	if after := int64(time.Since(c.start)); after-m < trust {
		c.last.Store(&bootDiff{at: after, diff: b - after})
	}
	return b
}

// BootClock is the machine's clock.
func BootClock() Clock {
	c := &bootClock{start: time.Now()}
	return Clock{
		Now:       c.now,
		AfterFunc: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
	}
}
