// Package recov is a target's side of recovery, as a step machine: who may
// connect, which request is executed now, which is put aside, who is evicted,
// and when recovery is over (Lustre manual, chapter "Lustre File System
// Recovery").
//
// A Machine has no clock, lock, goroutine or I/O. Its caller serialises the
// calls, gives the time with each of them and carries out the Actions that come
// back, in their order. Requests are described by what recovery has to know of
// them; the caller's own request travels along as an opaque handle.
//
// # Start
//
// A target reads its TargetRecord, ClientRecords and SlotRecords, raises the
// instance number and calls New and Start. With clients in the table and no
// clean stop before, it is in recovery: StateWaiting until somebody else, known or
// not, tries to connect, for ever if nobody does; then StateRecovering with a
// window that always ends. Otherwise it serves at once (StateFull).
//
// # Recovery
//
// Only clients of the table are served, and only connects, replays, pings.
// Replays run one at a time in the order of their transno over all clients.
// A replay ahead of the next number is put aside. A hole in the numbers is
// skipped when nobody can have it: each client has shown a higher number, has
// ended its replay, or said at its connect that it was never told so high a
// number. A client that has not come yet may have anything. Every replay is
// tried, and the caller compares the versions of the objects with the replay's
// PreVersions: on a mismatch nothing is changed, the replay fails, and its
// client is evicted when its replay is at its end. That verdict is in the
// client's record before anything later is executed, so it stands if the target
// dies again.
//
// After the requests come locks that are held, then lock requests that wait,
// each kind when all clients are through with the one before; a client's first
// request of a kind says that it is through with the earlier ones. The answer
// to FlagLastReplay is held until all have sent it: the barrier. Then resends
// and new requests are served.
//
// # The window
//
// It begins with the first attempt to connect and is sized from what clients
// say about their waiting times (Config.SoftMin, SoftMax). Progress (a known
// client's first connect, an executed replay) extends it by Config.Step, never
// beyond Config.Hard. When all clients are told that the target is back (Shorten), those
// that have not come are waited for a part of that only. When it runs out, clients that are not there are evicted;
// when all are there, those that are silent. At the hard limit all who have not
// ended their replay are evicted. What is executing is waited for: callers
// report every execution.
//
// # Exactly once
//
// Each modifying request names one of the client's reply slots; a client uses a
// slot again only after the answer. The slot's newest result is written in the
// transaction of the operation. A request with the XID in the slot is answered
// from there; a lower XID is a late copy of something answered long ago and is
// dropped; one with the XID that is executing gets that one's result. Slots are
// bound to the client's generation: a client that was restarted starts with
// empty ones.
//
// An answer waits for the disk (WaitCommit) when the operation builds on one
// that is not durable and that nobody may be there to replay: on one whose own
// answer waits, and with Config.CommitOnShare on any of another client. What is
// above the committed number and was not executed through the machine is a local
// client's, which bypasses it while the target serves, or the target's own work;
// nobody would replay that, so what builds on it waits always.
//
// # What callers have to do
//
// The list that an event returns is valid until the next event: a caller that
// executes at once and reports Executed while it goes through a list goes
// through a copy. Every answer carries CommittedFor's value as LastCommitted. A
// slot's Data hold whatever the caller needs to build the answer again, the
// PreVersions included. Clients evicted learn it by ErrUnknownClient, at their
// next connect at the latest, and come back with Instance 0; only that makes a
// new entry, so that a lost answer cannot turn an eviction into a reconnect.
//
// ActPutClient is answered by Stored. ActDelClient is written in the order of
// the log, so that nothing that came after an eviction survives a crash without
// it, and is made durable soon: a client whose eviction is lost is waited for
// again after the next start. Evictions of recovery are durable before it ends
// (ActPutTarget), since what comes after builds on what was not replayed.
//
// Requests that came over a connection older than the client's newest are
// recognised by Conn. A handle is ended by exactly one ActReply or ActDrop; the
// memory of an executing request is the caller's until then.
package recov
