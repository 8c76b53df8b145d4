package front

import (
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// What recovery has to know of operations. Those of IO epochs are plain ones:
// epochs are in the target's store, nothing in memory depends on their replay.

func classOf(op wire.Op) recov.Class {
	switch {
	case op == wire.OpPing:
		return recov.ClassPing
	case op.Modifies():
		return recov.ClassModify
	}
	return recov.ClassRead
}

// waitsAlways: operations whose answer is worth nothing before they are durable.
// So no replay of a lock operation is ever needed.
func waitsAlways(op wire.Op) bool {
	return op == wire.OpSetVIPEpoch || op == wire.OpFence || isLock(op)
}

func isLock(op wire.Op) bool {
	return op >= wire.OpLockTest && op <= wire.OpLockPoll && op.Modifies()
}

// keepsSlot tells whether the outcome is to be written with the operation: at an
// MDT, unless the reply record of an NFS call has it or the operation may be
// repeated. An OST keeps its slots itself.
func keepsSlot(req *wire.Request) bool {
	if !req.Op.IsMDT() || !req.Key.IsZero() {
		return false
	}
	switch req.Op {
	case wire.OpOpenEpoch, wire.OpCloseEpoch, wire.OpTruncateDone:
		// An epoch is open or not, a log record is there or not; a frontend opens,
		// closes and truncates a file one after the other.
		return false
	case wire.OpLockGrantDone, wire.OpLockMonitor, wire.OpLockNotified, wire.OpLockService:
		// Named by an ID or a state that is never given again, or additions to a set.
		// Not so the others: a lock may have been given back, or asked for, since.
		return false
	}
	return true
}
