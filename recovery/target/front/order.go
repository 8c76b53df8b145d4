package front

import (
	"slices"
	"sync"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// order gives the answers to a client's modifying requests in the order in which
// they were executed. A client whose target dies repeats what it has an answer
// to; had it one to an operation, and none to an own one that this builds on, the
// former could not be repeated.
//
// Answers that wait for the disk are not in it: what builds on them waits, too.
type order struct {
	given uint64 // the newest turn; under the front's lock

	mu    sync.Mutex
	last  uint64 // the turn that was answered last
	busy  bool   // somebody answers
	early []*call
}

// enqueue gives x the next turn, if others may build on what it has done and need
// not wait for the disk then. Only an MDT has versions that tell. The front's
// lock is held.
func (x *call) enqueue(res *recov.Result, wait bool) {
	l := x.c.s.link.Load()
	if l == nil || res.Transno == 0 || wait || x.req.Flags&wire.FlagWaitCommit != 0 || !x.req.Op.IsMDT() {
		return
	}
	l.order.given++
	x.order, x.turn = &l.order, l.order.given
}

// end answers x when its turn has come, and those that were waiting for it.
func (o *order) end(x *call) {
	o.mu.Lock()
	if o.busy || x.turn != o.last+1 {
		o.early = append(o.early, x)
		o.mu.Unlock()
		return
	}
	o.busy = true
	for x != nil {
		o.last = x.turn
		o.mu.Unlock()
		x.end()
		x = nil
		o.mu.Lock()
		if i := slices.IndexFunc(o.early, func(e *call) bool { return e.turn == o.last+1 }); i >= 0 {
			x = o.early[i]
			o.early = slices.Delete(o.early, i, i+1)
		}
	}
	o.busy = false
	o.mu.Unlock()
}
