package wire

import (
	"fmt"
	"net/netip"
)

// LockProgram is the RPC program number of lock calls (NLM) in reply keys.
const LockProgram = 100021

// MaxLockOffset is the last byte of every range that reaches to the end of the
// file, however long it becomes: 2^63-1, as in POSIX.
const MaxLockOffset = 1<<63 - 1

// LockRange is the byte range Start..End, both included, with
// Start <= End <= MaxLockOffset.
type LockRange struct{ Start, End uint64 }

// Valid tells whether r is a range.
func (r LockRange) Valid() bool { return r.Start <= r.End && r.End <= MaxLockOffset }

// Overlaps tells whether two ranges have a byte in common.
func (r LockRange) Overlaps(o LockRange) bool { return r.Start <= o.End && o.Start <= r.End }

// Contains tells whether every byte of o is in r.
func (r LockRange) Contains(o LockRange) bool { return r.Start <= o.Start && o.End <= r.End }

// String gives "START-END", with "EOF" for MaxLockOffset.
func (r LockRange) String() string {
	if r.End == MaxLockOffset {
		return fmt.Sprintf("%d-EOF", r.Start)
	}
	return fmt.Sprintf("%d-%d", r.Start, r.End)
}

// Limits of lock owners' names in bytes (XNFS: LM_MAXSTRLEN, MAXNETOBJ_SZ).
const (
	MaxLockHostName = 1024
	MaxLockOwnerOH  = 1024
	// MaxLockNote bounds LockArgs.Note.
	MaxLockNote = 256
)

// LockHost is an NFS client as lock owner: the address that its calls come
// from and the name that it gives itself (caller_name), towards one service
// address. Clients behind one address differ by name, clients with one name by
// address. Ports are no part of it.
type LockHost struct {
	VIP  uint32
	Addr netip.Addr // unmapped
	Name string     // at most MaxLockHostName bytes
}

// String gives name@address/vip.
func (h LockHost) String() string { return fmt.Sprintf("%q@%s/%d", h.Name, h.Addr, h.VIP) }

// LockOwner is a process of a client (XNFS nlm_lock: svid and oh). Two owners
// are the same only if all fields are.
type LockOwner struct {
	LockHost
	Svid uint32
	OH   string // opaque, at most MaxLockOwnerOH bytes
}

// LockState is the state of an entry in the lock table.
type LockState uint8

// Lock states.
const (
	// LockGranted: held, and its holder knows it.
	LockGranted LockState = 1
	// LockGrantPending: held; the holder waited for it and has not yet
	// answered the GRANTED callback.
	LockGrantPending LockState = 2
	// LockUnconfirmed: held before the service address was taken over after a
	// crash, and not yet reclaimed.
	LockUnconfirmed LockState = 3
	// LockWaiting: a blocked request in the queue.
	LockWaiting LockState = 4
)

// String gives the state's name.
func (s LockState) String() string {
	switch s {
	case LockGranted:
		return "granted"
	case LockGrantPending:
		return "grant-pending"
	case LockUnconfirmed:
		return "unconfirmed"
	case LockWaiting:
		return "waiting"
	}
	return fmt.Sprintf("state-%d", uint8(s))
}

// LockArgs is the body of lock requests.
type LockArgs struct {
	Owner     LockOwner // Owner.VIP is ignored: Header.VIP counts
	Range     LockRange
	Exclusive bool
	Block     bool // wait in the queue when the lock is not free
	Reclaim   bool // the client held the lock before a restart of the server
	// Monitor: the client is to be told of restarts (all but NM_LOCK and
	// non-monitored shares).
	Monitor bool
	// Note is the frontend's own: it comes back in LockGrant. What is needed to
	// make the callback (handle, protocol version, transport).
	Note []byte

	// Share reservations (OpShare, OpUnshare): XNFS fsh4_mode and fsh4_access,
	// 0 none, 1 read, 2 write, 3 both.
	ShareMode, ShareAccess uint8

	// ID names a lock or waiting request (OpLockGrantDone, OpLockRelease).
	ID uint64
	// Grant is the outcome of a callback (OpLockGrantDone).
	Grant GrantOutcome

	// NSMState, Window and Crashed are of OpLockService.
	NSMState uint32
	Window   int64 // nanoseconds
	Crashed  bool
	Forget   bool

	// AllVIPs widens OpLockList, OpLockFree and OpLockHosts to all service addresses.
	AllVIPs bool
}

// GrantOutcome tells what became of a GRANTED callback.
type GrantOutcome uint8

// Outcomes of a callback.
const (
	// GrantAccepted: the client has taken the lock.
	GrantAccepted GrantOutcome = 1
	// GrantRefused: the client answered, for sure to the first copy of the
	// callback that it got, that it does not wait for this lock.
	GrantRefused GrantOutcome = 2
	// GrantUndelivered: no copy of the callback can have reached the client.
	GrantUndelivered GrantOutcome = 3
)

// LockHolder describes an entry of the lock table.
type LockHolder struct {
	ID        uint64
	FID       FID
	Owner     LockOwner
	Range     LockRange
	Exclusive bool
	State     LockState
	Since     int64 // nanoseconds since 1970
	// Share: a share reservation; ShareMode and ShareAccess are set, Range is not.
	Share                  bool
	ShareMode, ShareAccess uint8
}

// LockGrant is a lock that was given to a waiting request; the client has to be
// called back.
type LockGrant struct {
	Seq       uint64 // rises; OpLockPoll resumes after it
	ID        uint64
	FID       FID
	Owner     LockOwner
	Range     LockRange
	Exclusive bool
	Note      []byte
}

// MonitoredHost is a client that is to be told of restarts.
type MonitoredHost struct {
	Host  LockHost
	Since int64
	// State is the client's own NSM state as last heard, 0 when unknown.
	State uint32
	// Notified is the service address's NSM state that the client has been
	// told last; 0 when none.
	Notified uint32
	// Locks counts its granted and waiting locks and its shares.
	Locks uint32
	// Note is what OpLockMonitor gave: who on this machine wants to know of the
	// host's restarts (SM_MON).
	Note []byte
}

// LockServiceInfo describes the lock service of one service address.
type LockServiceInfo struct {
	NSMState  uint32
	WindowEnd int64 // end of the reclaim window or grace period, 0 when none
	Grace     bool  // lock records were lost: classic grace period
	// Damaged: lock records were unreadable, and no grace period has been
	// started for this address since.
	Damaged                        bool
	Granted, Unconfirmed, Waiting  uint32
	Shares, Hosts, HostsUnnotified uint32
	HostsReclaimed                 uint32 // in a grace period
}

// LockReply is the lock part of a Reply.
type LockReply struct {
	Holder  LockHolder // OpLockTest, OpLock: who is in the way
	Locks   []LockHolder
	Grants  []LockGrant
	Hosts   []MonitoredHost
	Service LockServiceInfo
	// Freed counts the locks that OpLockFree and OpLockRelease removed.
	Freed uint32
}
