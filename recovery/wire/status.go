package wire

import "fmt"

// Status is the result of an operation at a target. Values below 20000 are the
// NFSv3 numbers of RFC 1813 section 2.6 so that the mapping table stays short;
// values from 20000 on are internal to the recovery protocol and never reach an
// NFS client.
type Status uint32

// Statuses of file operations.
const (
	OK             Status = 0
	ErrPerm        Status = 1
	ErrNoEnt       Status = 2
	ErrIO          Status = 5
	ErrNXIO        Status = 6
	ErrAcces       Status = 13
	ErrExist       Status = 17
	ErrXDev        Status = 18
	ErrNoDev       Status = 19
	ErrNotDir      Status = 20
	ErrIsDir       Status = 21
	ErrInval       Status = 22
	ErrFBig        Status = 27
	ErrNoSpc       Status = 28
	ErrROFS        Status = 30
	ErrMLink       Status = 31
	ErrNameTooLong Status = 63
	ErrNotEmpty    Status = 66
	ErrDQuot       Status = 69
	ErrStale       Status = 70
	ErrBadHandle   Status = 10001
	ErrNotSync     Status = 10002
	ErrBadCookie   Status = 10003
	ErrNotSupp     Status = 10004
	ErrTooSmall    Status = 10005
	ErrServerFault Status = 10006
	ErrBadType     Status = 10007
	ErrJukebox     Status = 10008
)

// Statuses of the recovery protocol.
const (
	// ErrStaleVIP: the request names a VIP epoch older than the target's; the
	// sender no longer owns that address and must stop serving it.
	ErrStaleVIP Status = 20001 + iota
	// ErrStaleClient: the client's generation is older than the registered one.
	ErrStaleClient
	// ErrUnknownClient: the client is not in the client table (evicted, or
	// never connected); it must connect afresh.
	ErrUnknownClient
	// ErrRecovering: the target is in recovery and the request is not a replay.
	ErrRecovering
	// ErrPortMismatch: a reply record matches the request in all but the
	// source port; the frontend decides (FlagAnyPort or FlagForceNew).
	ErrPortMismatch
	// ErrTargetDown: the target is stopped or failed; wait and retry.
	ErrTargetDown
	// ErrTooLate: a data operation carries an IO epoch that was fenced.
	ErrTooLate
	// ErrProto: the message is malformed for its opcode.
	ErrProto
	// ErrLockDenied: somebody else has a lock in the way.
	ErrLockDenied
	// ErrLockBlocked: the request waits in the queue.
	ErrLockBlocked
	// ErrLockDeadlock: waiting would close a circle of waiting owners.
	ErrLockDeadlock
	// ErrLockGrace: the lock table was lost and only reclaims are served; or a
	// reclaim came too late.
	ErrLockGrace
	// ErrLockNoLocks: a limit on locks is reached.
	ErrLockNoLocks
)

var statusNames = map[Status]string{
	OK: "OK", ErrPerm: "PERM", ErrNoEnt: "NOENT", ErrIO: "IO", ErrNXIO: "NXIO",
	ErrAcces: "ACCES", ErrExist: "EXIST", ErrXDev: "XDEV", ErrNoDev: "NODEV",
	ErrNotDir: "NOTDIR", ErrIsDir: "ISDIR", ErrInval: "INVAL", ErrFBig: "FBIG",
	ErrNoSpc: "NOSPC", ErrROFS: "ROFS", ErrMLink: "MLINK",
	ErrNameTooLong: "NAMETOOLONG", ErrNotEmpty: "NOTEMPTY", ErrDQuot: "DQUOT",
	ErrStale: "STALE", ErrBadHandle: "BADHANDLE", ErrNotSync: "NOT_SYNC",
	ErrBadCookie: "BAD_COOKIE", ErrNotSupp: "NOTSUPP", ErrTooSmall: "TOOSMALL",
	ErrServerFault: "SERVERFAULT", ErrBadType: "BADTYPE", ErrJukebox: "JUKEBOX",
	ErrStaleVIP: "STALE_VIP", ErrStaleClient: "STALE_CLIENT",
	ErrUnknownClient: "UNKNOWN_CLIENT", ErrRecovering: "RECOVERING",
	ErrPortMismatch: "PORT_MISMATCH", ErrTargetDown: "TARGET_DOWN",
	ErrTooLate: "TOO_LATE", ErrProto: "PROTO",
	ErrLockDenied: "LOCK_DENIED", ErrLockBlocked: "LOCK_BLOCKED", ErrLockDeadlock: "LOCK_DEADLOCK",
	ErrLockGrace: "LOCK_GRACE", ErrLockNoLocks: "LOCK_NO_LOCKS",
}

// String gives the status's name without its protocol prefix.
func (s Status) String() string {
	if n, ok := statusNames[s]; ok {
		return n
	}
	return fmt.Sprintf("STATUS_%d", uint32(s))
}

// Error makes a non-OK Status usable as an error.
func (s Status) Error() string { return "status " + s.String() }

// Err returns nil for OK and the status itself otherwise.
func (s Status) Err() error {
	if s == OK {
		return nil
	}
	return s
}
