// Package front is a target's recovery in service: it stands between the
// transports and a target's Body, and lets the state machine of package recov
// decide who may connect and which request is executed when. It has the clock,
// the locks and the connections that recov does without.
//
// # Ways of a request
//
// While the target serves, requests that change nothing, and those of clients in
// the same process, go straight to the body; recovery has no say. Everything else
// is shown to the machine under the front's lock. When that says nothing but
// "execute", the caller's goroutine does so: no other goroutine, no garbage. What
// else the machine wants done is done by one goroutine, in the order in which it
// was wanted. No execution of a request overtakes what is written in the order of
// the log (entries of clients, the target's record, the end of recovery); nothing
// else needs an order. Executions that had to wait for that each get a goroutine,
// but replays, which come one after the other.
//
// Until the target serves, requests of clients in its process and of OSTs that
// start wait here, maxHeld at most; the rest of them is told ErrRecovering. But a
// client that lived elsewhere when the target died, and into whose process the
// target has come, takes part in recovery like any other.
//
// # Every request is answered
//
// Once, also when it is dropped as late (ErrTargetDown; its connection is gone,
// or of no use), when the target is stopped, and when it fails. Only requests that
// the body keeps do not end: those of a body that hangs, and OpLockPoll, which
// ends when the body is closed.
//
// # Memory
//
// Replays that are put aside stay in their connection's memory. The machine keeps
// at most Config.MaxSlots of each client, the transport bounds them in bytes.
//
// # Locks
//
// The body's locks come before the front's: Execution.Executed and the callbacks
// that the body is given take the front's lock, and the front calls no body method
// with its lock held.
package front
