package front

import (
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Body is what a target does when recovery has no say: the MDT or an OST. Its
// methods are safe for concurrent use unless noted.
//
// As a wire.Target it executes requests of admitted clients: reads of anybody,
// and modifying requests of clients in the same process, which are never
// replayed. Admission is by client generation, VIP epoch and, at an OST,
// Tenure; OpConnect and OpDisconnect never get there.
type Body interface {
	wire.Target

	// Table reads what the last run has left. It is called once, before anything
	// else.
	Table() (Table, error)

	// Execute executes a modifying request that recovery has let through, and
	// tells e of it. Of a replay (x.Transno not 0) neither VIP epoch nor reply
	// records are asked; replays come one at a time, in the order of Transno.
	Execute(req *wire.Request, rep *wire.Reply, x Exec, e Execution)

	// Rebuild makes the answer to a request that was executed before, from what
	// its slot has kept. Attributes are today's, those from before are not valid.
	Rebuild(req *wire.Request, rep *wire.Reply, slot *recov.SlotRecord)

	// WaitCommit calls done when everything up to transno is durable, after turning
	// rep into ErrIO, or ErrTargetDown when the body has failed, if it will never be.
	// False: there is nothing to wait for and done is not called.
	WaitCommit(transno uint64, rep *wire.Reply, done func()) bool

	// LastCommitted is the highest transno up to which everything is durable.
	LastCommitted() uint64

	// CommitSoon makes everything executed so far durable without being waited for.
	CommitSoon()

	// PutClient registers a client, or changes its record, in the order of the
	// log; done, if not nil, is called when that is durable, or with what
	// prevents it. The body's own admission knows the client before done.
	PutClient(r recov.ClientRecord, done func(error))

	// DelClient removes a client, its slot records and, if evicted, what is to
	// be fenced because of it, in the order of the log, and makes that durable
	// soon. When it returns the client is not admitted any more.
	DelClient(id wire.ClientID, gen uint64, evicted bool)

	// PutTarget records the target's state durably, after what PutClient and
	// DelClient have written, and after everything that was executed when r.Clean is
	// set.
	PutTarget(r recov.TargetRecord) error

	// Begin tells that recovery has ended: new operations get numbers above
	// transno. It is called once, before the first request that is not a replay.
	Begin(transno uint64)

	// Tenure numbers a registered client's entry in the table; 0 at an OST.
	Tenure(id wire.ClientID) uint64

	// VIPEpoch is the epoch of a service address, RaiseVIP makes it at least
	// epoch, durably, and has waited for older requests when it calls done.
	VIPEpoch(vip uint32) uint64
	RaiseVIP(vip uint32, epoch uint64, done func(error))
}

// Table is what a target's last run has left.
type Table struct {
	// Instance is the number of this start, higher than that of every other.
	Instance uint64
	Target   recov.TargetRecord
	// Transno is the end of the log: everything up to it is durable.
	Transno uint64
	Clients []recov.ClientRecord
	Slots   []recov.SlotRecord
}

// Exec says how a request is executed.
type Exec struct {
	// Transno is the number that a replay gets again, 0 for other requests.
	Transno uint64
	// CheckVersions: an MDT compares the versions that the replay meets with
	// Request.PreVersions; when they differ, or the replay fails, nothing is
	// changed and Result.Mismatch is set. An OST has no versions to compare.
	CheckVersions bool
	// KeepSlot: a SlotRecord for the request's Client, ClientGen, Slot and XID is
	// to be written in the operation's transaction, because nothing else would
	// tell a resend after a crash what became of it.
	KeepSlot bool
}

// Execution is told what becomes of a request.
type Execution interface {
	// Executed is called once, when the operation has been applied or refused and
	// before any later operation is applied, if the target has an order. It
	// tells whether the reply has to wait until the operation is durable, besides
	// what FlagWaitCommit and StableHow ask for. It may be called with the body's
	// locks held, must not block and must not call the body. res.Ticket is not
	// set; res.Data belongs to the callee afterwards.
	Executed(res recov.Result) (wait bool)
	// Done is called once, after Executed and perhaps by another goroutine: the
	// reply is complete, and as durable as it has to be. It must not block.
	Done()
}
