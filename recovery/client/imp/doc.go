// Package imp is the client's side of a target's recovery: Lustre's import. An
// import stands for one target at one client, at whatever address that target
// currently is. It takes requests and answers each exactly once, however often
// the connection breaks and the target restarts meanwhile; to its callers a
// failure is delay.
//
// Machine is the protocol: a deterministic state machine without clock,
// goroutine or I/O. Import executes its actions over wire.Conn.
//
// # States
//
//	DISCONNECTED  no connection; waits for its time, or for the old connection
//	              to give back what it still holds
//	CONNECTING    one attempt at one address is on its way
//	REPLAY        the target restarted: what it executed and may have lost is sent
//	              again in transno order
//	REPLAY_LOCKS  locks that only this client remembers are sent again
//	REPLAY_WAIT   the final ping is sent; its answer comes when all clients are done
//	RECOVER       unanswered requests are sent again, in XID order
//	FULL          requests pass
//	EVICTED       the target has forgotten this client; what depended on it is lost
//	CLOSED        by the owner, or because a newer generation of this client exists
//
// # What becomes of a request
//
// A request that was never answered is resent (FlagResend) until it is, first
// after every reconnect; nobody is told of a connection that breaks once and
// comes back at the first attempt. A request that was answered and is not
// committed is kept, as a copy, and replayed (FlagReplay, Header.Transno,
// PreVersions) to a new instance of the target; every reply's last_committed
// prunes the list. A request that opened an IO epoch is kept until the epoch's
// close is committed. When an eviction makes a kept request unrepeatable its
// caller has its answer already: Options.OnEvicted tells the owner of the import
// which requests these were, before any later request is answered.
//
// At most Config.Slots modifying requests are unanswered at a time; each has a
// number of its own, the target's reply slot, that is used again only when the
// answer was seen. Replays carry the number of their first execution: numbers
// are reused in transno order, so the target's slots end up with the newest.
//
// # Memory
//
// Kept data are bounded: above Config.Soft bytes the target is asked to commit
// (OpSyncTarget), above Config.Hard no request whose data would have to be kept
// is sent. Requests that wait stay in their callers' buffers.
//
// # What the transport owes
//
// A wire.Conn has to give back every request it took, by calling done, soon
// after Close at the latest: until then the request's buffers are in use, and
// the import does not reconnect. A request that it gives back without an answer
// has Reply.Status ErrTargetDown (or what Options.NeverSent recognises). It must
// not deliver a request of a closed connection to the target after one of a
// newer connection; the target refuses those of connections it has replaced.
//
// # What the target owes
//
// It enters a client that is not in its table only when the client connects with
// instance 0. Were a client that names an instance entered, and the reply lost,
// its next connect would find it known, and it would never hear of its eviction.
package imp
