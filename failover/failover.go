// Package failover moves a service address between nodes: it has the pure state
// machines of giving one up (teardown) and of taking one over, and the Runner
// that carries out what they say. What is moved is behind interfaces; the
// package knows neither NFS nor the kernel.
package failover

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/vip"
)

// Refuse says what becomes of new connections while an address is given up.
type Refuse string

// Values of Refuse.
const (
	// Hold drops SYNs, so that clients send them again, in the end to the next owner.
	Hold Refuse = "hold"
	// Reset has the kernel refuse them, after which Linux clients wait 3 s.
	Reset Refuse = "reset"
)

// Closing says how connections end that were drained.
type Closing string

// Values of Closing.
const (
	// HalfClose sends FIN after the last reply and waits for the client's FIN while
	// the address is still there.
	HalfClose Closing = "half-close"
	// Quiet sends nothing: the connection vanishes here when the address is away,
	// and the next owner, which knows it, has the client reset it. A client that
	// got a FIN would send its SYN at once, to an address that is held.
	Quiet Closing = "quiet"
)

// Drained is what finishing the calls of an address came to.
type Drained struct {
	Conns   int // connections, those from the accept queue included
	Replies int // to calls that were in progress when it began
	Left    int // connections whose calls or replies were not through at the deadline
}

// Closed is what closing connections came to.
type Closed struct {
	Orderly int // both sides have closed, or, quiet, everything was acknowledged
	Forced  int // reset, or destroyed
}

// Service is what a node serves at one address, seen by the one who takes it down.
// The methods are called in this order, each once, some not at all; each returns
// soon after its context ends, with what was reached so far.
type Service interface {
	// Refuse stops new connections as said and takes those that the kernel has
	// completed.
	Refuse(ctx context.Context, how Refuse) error
	// Drain stops reading at a record boundary, finishes the calls in progress, and
	// returns when all replies were acknowledged by the clients' kernels.
	Drain(ctx context.Context) (Drained, error)
	// Commit makes everything durable that was acknowledged at the address, UNSTABLE
	// data too.
	Commit(ctx context.Context) error
	// Conns lists the connections there still are.
	Conns() []vip.Conn
	// Close ends the connections as said. After Quiet no segment leaves.
	Close(ctx context.Context, how Closing) (Closed, error)
	// Finish ends listeners and whatever is left. Nothing of the address remains in
	// the process.
	Finish(ctx context.Context) error
}

// Notified is what telling clients of a new owner came to.
type Notified struct {
	Clients int // that are told by SM_NOTIFY, in the background
}

// Candidate is what a node is to serve at one address, seen by the one who brings
// it up. The methods are called in this order, each once.
type Candidate interface {
	// Listen opens the listeners while the machine does not have the address.
	Listen(ctx context.Context) error
	// Begin begins a period of service: the registry gives it its epoch, and all
	// targets are told, so that no earlier owner can do anything any more.
	Begin(ctx context.Context) error
	// Serve has calls answered from now on.
	Serve(ctx context.Context) error
	// Conns are the connections that clients had with the last owner, as far as they are
	// known. They are asked for again after the take-over, when more may be known.
	Conns() []vip.Conn
	// Notify tells clients that they have to reclaim their locks, if so.
	Notify(ctx context.Context) (Notified, error)
	// Finish undoes what was done, when the take-over has failed.
	Finish(ctx context.Context) error
}

// Reason says why an address is given up.
type Reason string

// Reasons.
const (
	Move    Reason = "move"    // another node takes it
	Stop    Reason = "stop"    // the node stops, or is drained, and nobody takes it yet
	Remove  Reason = "remove"  // nobody is to serve it any more
	Fenced  Reason = "fenced"  // another node serves it already: nothing is drained
	Failed  Reason = "failed"  // this node cannot serve it
	Crashed Reason = "crashed" // (take-over) the last owner did not give it up in order
)

// Deadlines bound the stages of a teardown.
type Deadlines struct {
	Refuse, Drain, Commit, Close time.Duration // stage 1
	Clear, Remove                time.Duration // stage 2
	Finish                       time.Duration // stage 3
}
