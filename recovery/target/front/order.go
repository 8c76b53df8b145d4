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

// ordered tells whether others may build on what a request has done, and need
// not wait for the disk then. Only an MDT has versions that tell.
func ordered(req *wire.Request, res *recov.Result, wait bool) bool {
	return res.Transno != 0 && !wait && req.Flags&wire.FlagWaitCommit == 0 && req.Op.IsMDT()
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
