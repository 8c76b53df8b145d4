package imp

import (
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// State is the state of an import.
type State uint8

// States; the package comment describes them.
const (
	Disconnected State = iota
	Connecting
	Replay
	ReplayLocks
	ReplayWait
	Recover
	Full
	Evicted
	Closed
)

// String gives Lustre's name of the state.
func (s State) String() string {
	names := [...]string{"DISCONNECTED", "CONNECTING", "REPLAY", "REPLAY_LOCKS", "REPLAY_WAIT", "RECOVER", "FULL", "EVICTED", "CLOSED"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("STATE_%d", uint8(s))
}

// connected tells whether a connection is in use.
func (s State) connected() bool { return s >= Replay && s <= Full }

// ActionKind tells what an Action asks for.
type ActionKind uint8

// Actions.
const (
	// ActSend: give Req to the connection with Flags. Requests of the machine
	// itself come without a Handle.
	ActSend ActionKind = iota
	// ActComplete: Req is answered. FromTarget: with the reply that came, else
	// with Status. Kept: the request is kept for replay and still the machine's.
	ActComplete
	// ActRelease: the machine does not need Req any more.
	ActRelease
	// ActLost: Req was answered before and is lost now, or, with Kept, only the
	// IO epoch that it opened is; ActRelease follows.
	ActLost
	// ActConnect: connect to address Addr and send OpConnect with Connect;
	// answer with Machine.Connected or ConnectFailed.
	ActConnect
	// ActAbort: forget the connect attempt.
	ActAbort
	// ActDrop: close the connection; every request it holds is then given back
	// through Reply or Failed.
	ActDrop
	// ActLocks: tell the number of locks to replay with Machine.Locks.
	ActLocks
	// ActTimer: call Tick at At, instead of any earlier wish.
	ActTimer
	// ActState: the state is State now.
	ActState
	// ActEvent: something to log.
	ActEvent
)

// ConnectArgs go into OpConnect.
type ConnectArgs struct {
	Attempt uint64 // names the attempt in the answer
	// Instance of the target connected to last (0: never, or evicted), highest
	// transno and last_committed it has told.
	Instance, Transno, LastCommitted uint64
	// Waited is how long the target has been away for this client.
	Waited time.Duration
	// Service is the longest that a request has waited for its answer lately,
	// to the precision of ticks.
	Service time.Duration
}

// Action is something that the machine's owner has to do.
type Action struct {
	Kind       ActionKind
	State      State
	Flags      wire.Flags
	Kept       bool
	FromTarget bool
	Status     wire.Status
	Req        *Request
	Addr       int
	Connect    ConnectArgs
	At         int64
	Event      Event
}

// EventKind is the kind of a log event.
type EventKind uint8

// Events.
const (
	// EvLost: the connection is gone and the first attempt to reconnect failed.
	EvLost EventKind = iota
	// EvRestored: connected again; Instance, and N requests to replay.
	EvRestored
	// EvEvicted: the target has forgotten this client. N answered requests and
	// Epochs IO epochs are lost.
	EvEvicted
	// EvReplayDiffers: a replay's status was Status instead of Was.
	EvReplayDiffers
	// EvStale: a newer generation of this client is connected; final.
	EvStale
	// EvRefused: the connect was answered with Status.
	EvRefused
	// EvSyncFailed: the request to commit was answered with Status.
	EvSyncFailed
)

// Event is something that a log should tell.
type Event struct {
	Kind        EventKind
	Reason      string
	Status, Was wire.Status
	Instance    uint64
	N, Epochs   int
	// Unkept (EvEvicted): requests that were answered and not kept may be lost.
	Unkept bool
	// Transno (EvEvicted) is the highest that the target had told.
	Transno uint64
}

// String describes the event in one line.
func (e Event) String() string {
	switch e.Kind {
	case EvLost:
		return "connection lost: " + e.Reason
	case EvRestored:
		return fmt.Sprintf("connected again: instance %d, %d requests to replay", e.Instance, e.N)
	case EvEvicted:
		s := fmt.Sprintf("evicted: %s: %d answered requests and %d IO epochs lost", e.Reason, e.N, e.Epochs)
		if e.Unkept {
			s += ", and what was answered here and not durable"
		}
		return s
	case EvReplayDiffers:
		return fmt.Sprintf("replay answered %v, first execution %v", e.Status, e.Was)
	case EvStale:
		return "a newer generation of this client is connected"
	case EvRefused:
		return "connect refused: " + e.Status.String()
	case EvSyncFailed:
		return "commit failed: " + e.Status.String()
	}
	return fmt.Sprintf("event %d", e.Kind)
}
