package nlm

import (
	"fmt"
	"math"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Stat is nlm4_stats; versions 1 and 3 have the values up to DeniedGracePeriod
// (nlm_stats).
type Stat uint32

// Statuses.
const (
	Granted           Stat = 0
	Denied            Stat = 1
	DeniedNoLocks     Stat = 2
	Blocked           Stat = 3
	DeniedGracePeriod Stat = 4
	Deadlck           Stat = 5
	ROFS              Stat = 6
	StaleFH           Stat = 7
	FBig              Stat = 8
	Failed            Stat = 9
)

var statNames = [...]string{
	"GRANTED", "DENIED", "DENIED_NOLOCKS", "BLOCKED", "DENIED_GRACE_PERIOD", "DEADLCK", "ROFS", "STALE_FH", "FBIG", "FAILED",
}

// String gives the status's name without its prefix.
func (s Stat) String() string {
	if int(s) < len(statNames) {
		return statNames[s]
	}
	return fmt.Sprintf("STAT_%d", uint32(s))
}

// statMap is the one place where outcomes become protocol statuses. What is in
// none of the two tables below is Failed.
var statMap = map[wire.Status]Stat{
	wire.OK:              Granted,
	wire.ErrLockDenied:   Denied,
	wire.ErrLockNoLocks:  DeniedNoLocks,
	wire.ErrLockBlocked:  Blocked,
	wire.ErrLockGrace:    DeniedGracePeriod,
	wire.ErrLockDeadlock: Deadlck,
	wire.ErrROFS:         ROFS,
	wire.ErrStale:        StaleFH,
	wire.ErrBadHandle:    StaleFH,
	wire.ErrNoEnt:        StaleFH,
	wire.ErrFBig:         FBig,
	wire.ErrNoSpc:        DeniedNoLocks,
	wire.ErrDQuot:        DeniedNoLocks,
}

// dropped are outcomes that say nothing about the lock: the request's fate is
// not known here, or somebody else has to answer.
var dropped = map[wire.Status]bool{
	wire.ErrJukebox:       true,
	wire.ErrStaleVIP:      true,
	wire.ErrStaleClient:   true,
	wire.ErrUnknownClient: true,
	wire.ErrRecovering:    true,
	wire.ErrPortMismatch:  true,
	wire.ErrTargetDown:    true,
}

// StatFor maps a target's status to what a client of version vers is told.
// answer is false when it must be told nothing, so that it sends the request
// again: an error would make its program fail, and a grant or a denial could be
// wrong.
//
// Versions 1 and 3 know five statuses, and their clients take a reply with
// another one for damaged. A deadlock is a denial there, and all else means that
// the lock could not be had for the lack of something.
func StatFor(vers uint32, st wire.Status) (s Stat, answer bool) {
	if dropped[st] {
		return Failed, false
	}
	s, ok := statMap[st]
	if !ok {
		s = Failed
	}
	return s.In(vers), true
}

// In gives the status as version vers has it.
func (s Stat) In(vers uint32) Stat {
	switch {
	case wide(vers) || s <= DeniedGracePeriod:
		return s
	case s == Deadlck:
		return Denied
	}
	return DeniedNoLocks
}

// Range converts an offset and a length of version vers to a range. A length of
// 0, and an end beyond what the version's offsets can name (2^63-1 in version 4),
// mean to the end of the file. ErrFBig: the offset itself is beyond that.
func Range(vers uint32, off, n uint64) (wire.LockRange, wire.Status) {
	last := uint64(wire.MaxLockOffset)
	if !wide(vers) {
		last = math.MaxUint32
	}
	if off > last {
		return wire.LockRange{}, wire.ErrFBig
	}
	if n == 0 || n-1 > last-off {
		return wire.LockRange{Start: off, End: wire.MaxLockOffset}, wire.OK
	}
	end := off + n - 1
	if end == last {
		// The last byte that can be named is the last that can be locked: the
		// same lock as with length 0, and it has to be found under both names.
		end = wire.MaxLockOffset
	}
	return wire.LockRange{Start: off, End: end}, wire.OK
}

// OffsetLen is the reverse of Range.
func OffsetLen(r wire.LockRange) (off, n uint64) {
	if r.End >= wire.MaxLockOffset {
		return r.Start, 0
	}
	return r.Start, r.End - r.Start + 1
}

// Clip makes a range fit into the 32 bits of versions 1 and 3: a start beyond
// them becomes the last byte that they can name, and what reaches beyond reaches
// to the end of the file. Clients show it to programs that ask who holds a lock;
// so it is better roughly right than refused.
func Clip(off, n uint64) (uint64, uint64) {
	if off > math.MaxUint32 {
		return math.MaxUint32, 0
	}
	if n > math.MaxUint32-off {
		n = 0
	}
	return off, n
}
