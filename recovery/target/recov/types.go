package recov

import (
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// VersionMismatch is the status of a replay whose PreVersions differ from the
// versions of the objects.
const VersionMismatch = wire.ErrNotSync

// MaxAhead bounds the numbers that clients may name: replays and reports of
// transnos further ahead of the store are refused with ErrProto.
const MaxAhead = 1 << 40

// Class is what recovery has to know of an operation.
type Class uint8

// Classes of operations.
const (
	// ClassRead changes nothing. It is not tracked: Executed is not called.
	ClassRead Class = 1 + iota
	// ClassModify gets a transno and has a reply slot.
	ClassModify
	// ClassOpen is ClassModify, but a replay is executed again, at once, even
	// when the original is committed: it rebuilds state in memory and is
	// idempotent. Such requests stay in the client's list until closed.
	ClassOpen
	// ClassLock is the replay of a lock that the client holds.
	ClassLock
	// ClassWait is the replay of a lock request that waits in a queue.
	// Request.Transno orders those of all clients.
	ClassWait
	// ClassPing asks for a sign of life.
	ClassPing
)

// Request describes a request.
type Request struct {
	Client      wire.ClientID
	Gen         uint64 // boot generation of the client
	Conn        uint64 // number of the connection it came by, as in Connect; 0: not known
	XID         uint64
	Slot        uint16 // reply slot, below Config.MaxSlots; ClassModify and ClassOpen
	Transno     uint64 // of replays
	Flags       wire.Flags
	PreVersions [4]uint64
	Class       Class
	Handle      any // the caller's; comes back in actions
}

// Connect describes an OpConnect.
type Connect struct {
	Client wire.ClientID
	Gen    uint64
	// Conn numbers connections in the order they were accepted, from 1.
	// Connects and requests of older connections are dropped. 0: not known.
	Conn          uint64
	Instance      uint64 // the target's instance it was connected to last, 0: never
	Transno       uint64 // highest transno it was told
	LastCommitted uint64 // highest committed transno it was told
	// Estimate is how long the client waits for an answer, including what it
	// has waited already.
	Estimate time.Duration
	// Local: the client dies with the target; its next start does not wait for it.
	// The client may have lived elsewhere when the target died the last time.
	Local bool
	// Own: it is the target's own client. That it connects says nothing of when others
	// will, so it does not begin the window.
	Own    bool
	Handle any
}

// Result is the outcome of an execution.
type Result struct {
	Ticket  uint64 // of ActExecute
	Status  wire.Status
	Transno uint64 // 0 when nothing was changed
	// PreVersions are the versions that the operation met, 0 for none; with
	// commit-on-share they tell whose work it builds on.
	PreVersions [4]uint64
	// Mismatch: a replay's PreVersions were not met (or it failed though it had
	// succeeded before); nothing was changed.
	Mismatch bool
	// NotDone: nothing was executed, the client is to ask again; the slot keeps
	// no result.
	NotDone bool
	// Held: the answer waits until Transno is durable, whatever the request asked
	// for, because nobody would replay it.
	Held bool
	// Data is kept in the reply slot, at most MaxResult bytes; the machine takes it over.
	Data []byte
}

// Kind is what an Action asks for.
type Kind uint8

// Kinds of actions. Every answer carries what CommittedFor says.
const (
	// ActExecute: execute Req now. Ticket is not 0 when Executed must be called.
	// With Replay a modifying operation gets the number Req.Transno; with
	// CheckVersions Req.PreVersions must be met.
	ActExecute Kind = 1 + iota
	// ActReply: answer Handle with Status and Transno. With Reconstructed the
	// operation was executed before and Data is the slot's result, nil when that is
	// gone.
	// WaitCommit: not before Transno is durable.
	ActReply
	// ActConnected: answer the connect Handle with Status OK, Instance,
	// Recovering, Known, Transno, LastCommitted.
	ActConnected
	// ActDrop: forget Handle without an answer.
	ActDrop
	// ActPutClient: write Entry durably, then call Stored with Ticket. Without a
	// Ticket the order of the log is enough, as for ActDelClient.
	ActPutClient
	// ActDelClient: remove the records of Client durably: the entry, the slots,
	// and with Evicted everything that the client holds. Close its connections.
	ActDelClient
	// ActPutTarget: write Target durably, and what ActPutClient and ActDelClient
	// wrote before it, before anything else happens. With Target.Clean everything
	// executed must be durable, too.
	ActPutTarget
	// ActWindowStart, ActWindowExtend: the recovery window ends at Deadline, or earlier
	// for clients that are told that the target is back (Machine.Shorten).
	ActWindowStart
	ActWindowExtend
	// ActRecoveryEnd: new requests are served, with numbers after Transno.
	ActRecoveryEnd
	// ActCommit: make everything executed so far durable soon.
	ActCommit
	// ActLog: tell the administrator Text, which is about Client if that is not
	// zero. Warn: it is trouble. Reason: that of Client's eviction.
	ActLog
)

// Action is something for the caller to do.
type Action struct {
	Kind          Kind
	Handle        any
	Req           Request
	Ticket        uint64
	Replay        bool
	CheckVersions bool
	Client        wire.ClientID
	Gen           uint64
	Status        wire.Status
	Transno       uint64
	LastCommitted uint64
	Instance      uint64
	Data          []byte
	Reconstructed bool
	WaitCommit    bool
	Known         bool
	Recovering    bool
	Evicted       bool
	Entry         ClientRecord
	Target        TargetRecord
	Deadline      time.Time
	Text, Reason  string
	Warn          bool
}

// Config has a Machine's limits. Zero fields get the defaults.
type Config struct {
	// MaxSlots is the number of reply slots of each client, so of its modifying
	// requests in flight: 1..4096, default 64.
	MaxSlots int
	// MaxClients bounds the client table, default 4096.
	MaxClients int
	// SoftMin and SoftMax bound the recovery window that is computed from the
	// clients' estimates: defaults 15 s and 60 s. Hard ends recovery whatever
	// happens, default 180 s. Step is given after progress, default 10 s.
	SoftMin, SoftMax, Hard, Step time.Duration
	// PingInterval is how often clients are heard at least, default 5 s. A
	// client that is silent for PingTimeout is evicted, default 6 intervals;
	// negative: never.
	PingInterval, PingTimeout time.Duration
	// CommitOnShare: an answer waits for the disk when the operation builds on
	// another client's that is not durable. Without it a client may fail in
	// recovery because another one, or only an answer to another one, is lost.
	// What builds on a local client's operation waits in any case.
	CommitOnShare bool
}

func (c *Config) defaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if c.MaxSlots <= 0 {
		c.MaxSlots = 64
	}
	c.MaxSlots = min(c.MaxSlots, MaxSlot+1)
	if c.MaxClients <= 0 {
		c.MaxClients = 4096
	}
	def(&c.SoftMin, 15*time.Second)
	def(&c.SoftMax, 60*time.Second)
	def(&c.Hard, 180*time.Second)
	def(&c.Step, 10*time.Second)
	c.SoftMax = max(c.SoftMax, c.SoftMin)
	c.Hard = max(c.Hard, c.SoftMax)
	def(&c.PingInterval, 5*time.Second)
	def(&c.PingTimeout, 6*c.PingInterval)
}

// State is what a target does with requests.
type State uint8

// States of a target.
const (
	// StateWaiting: in recovery, nobody has tried to connect; no time runs.
	StateWaiting State = 1 + iota
	// StateRecovering: in recovery, the window is open.
	StateRecovering
	// StateFull: serving.
	StateFull
	// StateStopped: stopped in order.
	StateStopped
)

// String gives the state's name as status output has it.
func (s State) String() string {
	switch s {
	case StateWaiting:
		return "WAITING"
	case StateRecovering:
		return "RECOVERING"
	case StateFull:
		return "COMPLETE"
	case StateStopped:
		return "STOPPED"
	}
	return "NONE"
}

// ReconnectBuckets is the number of classes in Status.Reconnects.
const ReconnectBuckets = 10

// Status describes a target's recovery for administrators. The counts of
// clients are those of this start's recovery and stay after its end.
type Status struct {
	State    State
	Instance uint64
	// Start is when the window began, Deadline when it ends as things are, Hard
	// its latest end, End when recovery was over; zero when not (yet).
	Start, Deadline, Hard, End time.Time
	// Tenths of the usual time are waited for clients that do not come, because all are
	// told that the target is back (Shorten); 0: they are not told.
	Tenths int
	// Clients were in the table at the start. Connected are connected now (of
	// all clients after recovery); Finished have ended their replay; Evicted
	// counts evictions since the start of the target, for whatever reason.
	Clients, Connected, Finished, Evicted int
	// Registered is the number of entries in the client table now.
	Registered int
	// Replayed and LockReplays were executed, Failed of them had other versions.
	Replayed, LockReplays, Failed uint64
	// Reconstructed answers came from reply slots or recovery's memory.
	Reconstructed uint64
	// Queued replays are put aside; Executing are under way.
	Queued, Executing int
	// Gaps is the number of holes that were skipped, VersionRecovery tells that
	// one of them may be a missing client's.
	Gaps            uint64
	VersionRecovery bool
	Aborted         bool
	// NextTransno is the number that recovery waits for, or the next new one.
	NextTransno   uint64
	LastCommitted uint64
	// Reconnects counts known clients by the time from the window's start to
	// their first connect: below 1 s, 2 s, 4 s and so on; the last is open.
	Reconnects [ReconnectBuckets]int
	// SharedCommits counts answers that wait for the disk because the operation
	// builds on one that could be lost without its client.
	SharedCommits uint64
}
