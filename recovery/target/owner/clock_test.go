package owner

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The clock is CLOCK_BOOTTIME, or a little less.
func TestBootClock(t *testing.T) {
	now := BootClock().Now
	last := int64(0)
	for range 20000 {
		var before, after unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &before); err != nil {
			t.Fatal(err)
		}
		n := now()
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &after); err != nil {
			t.Fatal(err)
		}
		if n > after.Nano() || n < before.Nano()-int64(2*trust) || n < last-int64(2*trust) {
			t.Fatalf("%d between %d and %d, before %d", n, before.Nano(), after.Nano(), last)
		}
		last = n
	}
}

// After the machine has slept the difference of before does not count: here it is
// one that no machine has.
func TestBootClockAfterSleep(t *testing.T) {
	c := &bootClock{start: time.Now()}
	right := c.now()
	d := c.last.Load()
	if d == nil {
		t.Skip("the process was interrupted between two readings")
	}
	c.last.Store(&bootDiff{at: d.at - trust, diff: d.diff - int64(time.Hour)})
	if n := c.now(); n < right {
		t.Errorf("%d after %d", n, right)
	}
}
