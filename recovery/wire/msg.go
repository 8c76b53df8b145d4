package wire

import (
	"context"
	"net/netip"
)

// Op is the operation that a Request asks for. The comment of each says which
// body fields of Request and Reply it uses; unnamed fields are zero.
type Op uint16

// Operations of every target.
const (
	// OpConnect registers the client (Header.Client, ClientGen). Cookie is the
	// Instance of the target that the client was connected to last, 0 for none;
	// Header.Transno is the highest transno that it was told, LastCommitted the
	// highest committed one; Time is the longest, in nanoseconds, that it has
	// waited for an answer of the target lately, 0 when unknown. Reply:
	// Transno = highest transno seen, LastCommitted, Instance, Recovering, Known,
	// and Tenure when the target is an MDT.
	OpConnect Op = 1 + iota
	// OpDisconnect removes the client from the client table.
	OpDisconnect
	// OpPing returns LastCommitted.
	OpPing
	// OpSetVIPEpoch raises durably the epoch of Header.VIP to Header.VIPEpoch
	// and fences older ones.
	OpSetVIPEpoch
	// OpSyncTarget makes everything executed so far durable.
	OpSyncTarget
	// OpStatfs: Reply.Statfs.
	OpStatfs
	// OpFence: Peer, Cookie: from now on, durably, requests of client Peer whose
	// Tenure is below Cookie are refused with ErrTooLate. An OST gets it from the
	// MDT when that has evicted the client.
	OpFence
	// OpBeat: Data (a beat of package health) -> Data (the beat of the node that
	// answers). For connections of kind Health only; no target of a store knows it.
	OpBeat
)

// Operations of the MDT. Cred is checked by the MDT unless noted. All modifying
// operations carry ReplyKey when they serve a non-idempotent NFS call.
// Directory post-attributes are in Reply.DirAttr with Reply.DirPre before.
const (
	// OpGetattr: FID -> Attr. No permission check.
	OpGetattr Op = 32 + iota
	// OpLookup: FID (directory), Name -> Attr (child), DirAttr. Checks search
	// permission. "." and ".." are understood; the frontend stops ".." at the
	// root of an export.
	OpLookup
	// OpReadlink: FID -> Data (target path), Attr.
	OpReadlink
	// OpCreate: FID (dir), Name, How, Verf, SetAttr, Flags&FlagOpenEpoch ->
	// Attr (child), DirPre, DirAttr, Created. UNCHECKED on an existing file
	// applies SetAttr.Size only (then Truncate in the reply asks the frontend
	// to punch the objects) after a write permission check.
	OpCreate
	// OpMkdir: FID, Name, SetAttr -> Attr, DirPre, DirAttr.
	OpMkdir
	// OpSymlink: FID, Name, Data (target path), SetAttr -> Attr, DirPre, DirAttr.
	OpSymlink
	// OpMknod: FID, Name, Type, RdevMajor, RdevMinor, SetAttr -> Attr, DirPre, DirAttr.
	OpMknod
	// OpRemove: FID, Name -> DirPre, DirAttr. Not for directories.
	OpRemove
	// OpRmdir: FID, Name -> DirPre, DirAttr.
	OpRmdir
	// OpRename: FID, Name (from), FID2, Name2 (to) -> DirPre, DirAttr (from),
	// DirPre2, DirAttr2 (to).
	OpRename
	// OpLink: FID (object), FID2, Name2 (new entry) -> Attr, DirPre2, DirAttr2.
	OpLink
	// OpSetattr: FID, SetAttr, Guard/GuardCtime, Time -> Pre, Attr, Truncate. Checks
	// ownership. It gets a timestamp after Time (the client's clock, 0: not told),
	// so that it counts as newer than what the client wrote to the OSTs before. A size change is logged for the OSTs (Truncate in the reply
	// names the log record), opens an IO epoch, and is complete when the
	// frontend has punched the objects and sent OpTruncateDone.
	OpSetattr
	// OpTruncateDone: LogIDs of truncate records whose punches are done.
	OpTruncateDone
	// OpReaddir: FID, Cookie, Count (bytes of Reply budget), MaxEntries, Plus
	// -> Entries, EOF, DirAttr. Checks read permission. "." and ".." are
	// entries with cookies 1 and 2.
	OpReaddir
	// OpOpenEpoch: FID -> Attr. Durably marks the cached size as not to be
	// trusted; idempotent per client.
	OpOpenEpoch
	// OpCloseEpoch: Epochs: size, used, mtime, ctime of files whose data are
	// durable; the MDT's attributes become valid again.
	OpCloseEpoch
	// OpSetLayout: FID (directory), Layout.StripeSize, Layout.Count: default
	// layout of files made below it afterwards.
	OpSetLayout
	// OpTouchAtime: FID, SetAttr.Atime; not durable by itself.
	OpTouchAtime

	// Lock operations use Request.Lock and Reply.Lock. The owner's VIP is
	// Header.VIP. Outcomes of OpLock and OpShare other than OK: ErrLockDenied,
	// ErrLockBlocked, ErrLockDeadlock, ErrLockGrace, ErrLockNoLocks, ErrStale.

	// OpLockTest: FID, Lock.Owner, Range, Exclusive -> OK when the lock would be
	// granted, else ErrLockDenied with Lock.Holder.
	OpLockTest
	// OpLock: FID, Lock.Owner, Range, Exclusive, Block, Reclaim, Monitor, Note.
	// OK: held. ErrLockBlocked: queued; a LockGrant follows. A repeated request
	// of an owner that has the lock is OK and acknowledges a pending grant.
	OpLock
	// OpUnlock: FID, Lock.Owner, Range. OK also when nothing was held. Takes
	// back a waiting request inside the range, too.
	OpUnlock
	// OpLockCancel: FID, Lock.Owner, Range, Exclusive: takes the waiting
	// request back, or the lock if its grant was not acknowledged yet;
	// ErrLockDenied when there is neither.
	OpLockCancel
	// OpLockGrantDone: Lock.ID, Lock.Owner.LockHost, Lock.Grant.
	OpLockGrantDone
	// OpShare, OpUnshare: FID, Lock.Owner (Svid 0), ShareMode, ShareAccess, Reclaim.
	OpShare
	OpUnshare
	// OpLockFree: Lock.Owner.LockHost (an empty Name means every name): the client
	// has restarted, all its locks, shares and waiting requests go. Cookie: its
	// new NSM state, 0 when it did not say; a state already known frees nothing.
	// -> Lock.Freed.
	OpLockFree
	// OpLockRelease: Lock.ID: removes one entry by order of the administrator;
	// ErrNoEnt.
	OpLockRelease
	// OpLockMonitor: Lock.Owner.LockHost, Note: adds the host to the monitor list.
	OpLockMonitor
	// OpLockUnmonitor: Lock.Owner.LockHost (an empty Name means every name):
	// removes hosts that hold nothing.
	OpLockUnmonitor
	// OpLockNotified: Lock.Owner.LockHost, Lock.NSMState: the host has been told
	// of that state.
	OpLockNotified
	// OpLockService: Lock.NSMState, Crashed, Forget, Window: the address begins
	// to be served. With Crashed and a state that is new, all locks of the
	// address become unconfirmed and Window begins; with Forget they are thrown
	// away and a grace period of Window begins. NSMState 0 changes nothing.
	// -> Lock.Service.
	OpLockService
	// OpLockList: FID (zero: all files), Cookie (0, or the last ID got),
	// MaxEntries, Lock.AllVIPs -> Lock.Locks in the order of ID, EOF.
	OpLockList
	// OpLockHosts: Lock.AllVIPs -> Lock.Hosts.
	OpLockHosts
	// OpLockPoll: Cookie (last LockGrant.Seq got) -> Lock.Grants after it for
	// Header.VIP, as soon as there are any and they are durable. A later OpLockPoll of the same
	// VIP ends an earlier one with none. Cookie MaxUint64 only ends the earlier one.
	OpLockPoll

	// OpOSTFetch: Count (index of the OST), Name (cursor, empty at first) -> Data
	// (an OSTInfo). What an OST has to know before it serves anybody.
	OpOSTFetch
)

// Operations of an OST. Objects are named by FID and Stripe; Offset and Size
// are offsets inside the object (the client maps file offsets to objects).
const (
	// OpRead: FID, Stripe, Offset, Bulk (destination) -> Count bytes; bytes
	// past the object's end are not read (Count is short), holes read as zero;
	// a missing object reads as empty. Reply.Obj as in OpObjAttr.
	OpRead Op = 96 + iota
	// OpWrite: FID, Stripe, Offset, Bulk, Stable, Time (mtime to set) ->
	// ObjPre, Obj, Count. The object is made on first write.
	OpWrite
	// OpPunch: FID, Stripe, Size, LogID, Time: truncate the object to Size;
	// applied once per LogID and never after a newer LogID. Makes no object
	// when Size is 0.
	OpPunch
	// OpSyncObject: FID, Stripe: make the object durable -> Obj. A failed
	// flush gives ErrIO and raises Reply.FlushErrors.
	OpSyncObject
	// OpObjAttr: FID, Stripe -> Obj.
	OpObjAttr
	// OpDestroy: FID, Stripe: destroy the object; OK when it does not exist.
	OpDestroy
)

// Operations of the MGS.
const (
	// OpRegistry: Name (method), Data (arguments) -> Data (result). Package mgs
	// defines the methods; it is the control plane, where speed does not count.
	OpRegistry Op = 128 + iota
	// OpAnnounce: Data (a target has started or was stopped) -> Data. Package mgs/ir
	// defines the data of this and the next two.
	OpAnnounce
	// OpWatch: Data (what the caller has of the table of targets) -> Data (what is
	// newer), as soon as there is something, or after some time without.
	OpWatch
	// OpWatchers: -> Data (who is told, and how the table is).
	OpWatchers

	// OpInspect: Name (a target) -> Data (its recovery, for administrators). It is
	// answered by the node that runs the target, not by the target.
	OpInspect

	// OpNode: Name (method), Data (arguments) -> Data (result). What nodes ask each
	// other about addresses; it is answered by a node, not by a target.
	OpNode

	// OpWatchVIPs: Data (the revision that the caller has of the floating addresses) ->
	// Data (all of them), as soon as there is another revision, or after some seconds.
	// Package mgs defines the data. A later one of the same connection ends an
	// earlier one.
	OpWatchVIPs
)

// Polls tells whether the operation waits for what others do, for any time. It
// counts against no window of requests, and nobody who leaves waits for it.
func (o Op) Polls() bool { return o == OpLockPoll || o == OpWatch || o == OpWatchVIPs }

// IsMDT tells whether the operation belongs to the MDT.
func (o Op) IsMDT() bool { return o >= 32 && o < 96 }

// IsOST tells whether the operation belongs to an OST.
func (o Op) IsOST() bool { return o >= 96 && o < 128 }

// Modifies tells whether the operation changes a target's durable state and so
// gets a transno.
func (o Op) Modifies() bool {
	switch o {
	case OpCreate, OpMkdir, OpSymlink, OpMknod, OpRemove, OpRmdir, OpRename,
		OpLink, OpSetattr, OpTruncateDone, OpOpenEpoch, OpCloseEpoch,
		OpSetLayout, OpWrite, OpPunch, OpDestroy, OpConnect, OpDisconnect, OpSetVIPEpoch, OpFence,
		OpLock, OpUnlock, OpLockCancel, OpLockGrantDone, OpShare, OpUnshare, OpLockFree,
		OpLockRelease, OpLockMonitor, OpLockUnmonitor, OpLockNotified, OpLockService:
		return true
	}
	return false
}

// Flags of a request.
type Flags uint16

// Request flags.
const (
	// FlagWaitCommit: the reply is given when the operation's transno is
	// durable (durability "disk").
	FlagWaitCommit Flags = 1 << iota
	// FlagReplay: the operation was executed before, Header.Transno says when.
	FlagReplay
	// FlagResend: the request was sent before and its reply is not known.
	FlagResend
	// FlagLastReplay: the client has nothing more to replay.
	FlagLastReplay
	// FlagAnyPort: a reply record that matches but for the port is the answer.
	FlagAnyPort
	// FlagForceNew: a reply record that matches but for the port is not of
	// this request; execute.
	FlagForceNew
	// FlagOpenEpoch: OpCreate opens the new file's IO epoch for the client.
	FlagOpenEpoch
	// FlagOwnerOverride: the owner passes permission checks that NFS servers
	// waive (READ, WRITE and size changes on files that were open before a chmod).
	FlagOwnerOverride
	// FlagNoWait: a client's import fails the request with ErrTargetDown when it
	// knows the target to be away. Targets ignore it.
	FlagNoWait
	// FlagTwoNode: the client keeps the request until it is durable and so need
	// not wait for that; but a client in the target's process does not survive it,
	// and its import makes the flag FlagWaitCommit. Targets ignore it.
	FlagTwoNode
)

// ClientID is the UUID of a frontend's file system client.
type ClientID [16]byte

// Header is part of every request.
type Header struct {
	XID           uint64 // client-unique, rising; orders requests without transno
	Op            Op
	Flags         Flags
	Client        ClientID
	ClientGen     uint64 // boot generation of the client
	Transno       uint64 // for replays
	LastCommitted uint64 // the highest the client knows
	VIP           uint32 // index of the served address in the MGS's VIP table; 0: none
	VIPEpoch      uint64
	PreVersions   [4]uint64
	Credits       uint16
	// Slot is the client's reply slot of a modifying request, from 0.
	Slot uint16
	// Tenure is the number of the client's entry in the MDT's client table
	// (Reply.Tenure of its OpConnect there), 0 for none. It rises with every new
	// entry, so that an OST can tell what was sent before an eviction.
	Tenure uint64
}

// ReplyKey identifies an NFS call for at-most-once execution: the client's
// address, source port, RPC xid, procedure and a checksum over credential and
// arguments. The zero key means that no reply record is kept.
type ReplyKey struct {
	Addr [16]byte // IPv6 or IPv4-mapped
	Port uint16
	XID  uint32
	Proc uint32 // program<<8 | procedure
	Sum  uint64
}

// IsZero tells whether no reply record is wanted.
func (k *ReplyKey) IsZero() bool { return k.Proc == 0 }

// MakeReplyAddr gives the key form of an address.
func MakeReplyAddr(a netip.Addr) [16]byte { return a.As16() }

// CreateHow selects the mode of OpCreate (RFC 1813 createmode3).
type CreateHow uint8

// Create modes.
const (
	Unchecked CreateHow = 0
	Guarded   CreateHow = 1
	Exclusive CreateHow = 2
)

// StableHow is the stability a write asks for or has got (RFC 1813 stable_how).
type StableHow uint8

// Stabilities.
const (
	Unstable StableHow = 0
	DataSync StableHow = 1
	FileSync StableHow = 2
)

// EpochClose carries one file's attributes when its IO epoch closes.
type EpochClose struct {
	FID          FID
	Size, Used   uint64
	Mtime, Ctime int64
	// Seen is the Attr.Version the client last saw; informative.
	Seen uint64
}

// Made is what the first execution of an operation at the MDT has decided. A
// replay carries it, so that it makes the same object at the same time.
type Made struct {
	// FID, Generation and Layout are of the object that the operation made.
	FID        FID
	Generation uint32
	Layout     Layout
	// Time is the operation's timestamp, Reply.Time.
	Time int64
}

// Request is a message to a target. Name, Name2, Data and Bulk alias the
// caller's buffers and are valid until the reply is given; a target that keeps
// them copies them.
type Request struct {
	Header
	Key ReplyKey

	FID, FID2   FID
	Name, Name2 []byte
	Cred        Cred
	SetAttr     SetAttr
	Guard       bool
	GuardCtime  int64
	How         CreateHow
	Verf        [8]byte
	Type        FileType
	RdevMajor   uint32
	RdevMinor   uint32
	Data        []byte
	Cookie      uint64
	Count       uint32
	MaxEntries  uint32
	Plus        bool
	Layout      Layout
	LogIDs      []uint64
	Epochs      []EpochClose

	Stripe uint8
	Offset uint64
	Size   uint64
	LogID  uint64
	Stable StableHow
	Time   int64
	Bulk   []byte

	// Lock is the body of lock operations; targets copy what they keep.
	Lock *LockArgs

	// Peer is the client that OpFence is about.
	Peer ClientID
	// Made travels with FlagReplay to an MDT.
	Made Made
}

// Reset clears r for reuse but keeps the capacity of its slices' owners.
func (r *Request) Reset() { *r = Request{} }

// Dirent is a directory entry. Attr is set when the request asked for it
// (Plus) and HasAttr is true.
type Dirent struct {
	Cookie  uint64
	FID     FID
	Type    FileType
	Name    []byte
	HasAttr bool
	Attr    Attr
}

// ObjAttr is what an OST knows of an object.
type ObjAttr struct {
	Exists       bool
	Size, Used   uint64
	Mtime, Ctime int64
	Version      uint64
}

// Statfs holds space figures in bytes and files.
type Statfs struct {
	Total, Free, Avail           uint64
	Files, FilesFree, FilesAvail uint64
}

// Truncate asks the frontend to punch the objects of a file after an
// operation that changed its size. LogID 0: nothing to do.
type Truncate struct {
	LogID uint64
	Size  uint64
}

// Reply is a target's answer. Slices are owned by the reply until it is reused.
type Reply struct {
	XID           uint64
	Status        Status
	Transno       uint64
	LastCommitted uint64
	PreVersions   [4]uint64
	// Reconstructed: the operation had been executed before, and this is the
	// recorded result; Pre, DirPre and DirPre2 are not valid then.
	Reconstructed bool

	Attr              Attr
	Pre               PreAttr
	DirAttr, DirAttr2 Attr
	HasDir, HasDir2   bool // DirAttr, DirAttr2 are valid (also in failures)
	HasAttr           bool // Attr is valid (also in failures)
	DirPre, DirPre2   PreAttr
	Created           bool
	Truncate          Truncate
	Data              []byte
	Entries           []Dirent
	EOF               bool
	Statfs            Statfs

	Count  uint32
	ObjPre PreAttr
	Obj    ObjAttr
	// FlushErrors is in every reply of an OST: the number of its start in the upper
	// 32 bits, and how many flushes have failed since, at most MaxUint32.
	FlushErrors uint64
	Port        uint16 // with ErrPortMismatch: the recorded port

	// Time is the timestamp that a modifying operation of an MDT was given, for
	// Made.
	Time int64

	// Instance numbers the target's starts (OpConnect); it rises durably.
	Instance uint64
	// Tenure numbers the entry in an MDT's client table (OpConnect).
	Tenure uint64
	// Recovering: the target waits for replays of its clients (OpConnect).
	Recovering bool
	// Known: the client was in the table, with this generation, before this
	// OpConnect.
	Known bool
	// Pingless: the target does without pings of this client on this connection as
	// long as somebody else watches the client's node (OpConnect).
	Pingless bool

	// Lock is set by lock operations.
	Lock *LockReply
}

// Reset clears r for reuse and keeps Entries' and Data's capacity.
func (r *Reply) Reset() {
	e, d := r.Entries[:0], r.Data[:0]
	*r = Reply{Entries: e, Data: d}
}

// Target executes requests. Implementations are the MDT, an OST and the MGS.
type Target interface {
	// Handle executes req, fills rep and calls done exactly once, before it
	// returns or later from another goroutine. done must not block. With
	// FlagWaitCommit done is called when the transno is durable.
	Handle(req *Request, rep *Reply, done func())
	// TryHandle executes req only if that needs no waiting for disk or other
	// requests; it reports whether rep is the answer.
	TryHandle(req *Request, rep *Reply) bool
}

// Peer tells who is at the other end of a connection.
type Peer struct {
	// Node is the authenticated name of the other node, "" in one process.
	Node string
	// Session is chosen by the client and rises with each of its attempts to
	// connect: connections of one session are one path, and what comes by an
	// older one is late. 0 is no session: nothing is told of other connections.
	Session uint64
	// Local: the client is in this process and dies with the target.
	Local bool
}

// Acceptor is a Target that treats connections apart. Transports call Accept,
// which must not block, for every connection and give its requests to the Target
// returned; when that implements io.Closer, Close is called once, after Handle has
// returned from the last request. Some may not have been answered then.
type Acceptor interface {
	Accept(Peer) Target
}

// Conn is a client's path to one target.
type Conn interface {
	Target
	// Call is Handle for callers that wait. A non-nil error means that no
	// answer came (transport failure or ctx); the operation's fate is unknown.
	Call(ctx context.Context, req *Request, rep *Reply) error
	// Close ends the connection.
	Close() error
}
