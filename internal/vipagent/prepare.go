package vipagent

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/failover"
)

// aheadTime bounds what is made durable, and then how long the successor is asked to take
// the connections, while clients are still served. What needs longer is left to the stages
// of the move, and connections that nobody knows end by a half-close, for which every client
// pays.
const aheadTime = 2 * time.Second

// prepare does what can be done before an address is given up, while its clients are
// served: what is durable now need not be made so when they wait, and who may be next
// gets the connections. It returns how connections end, quietly if somebody knows them,
// and who does. A fence ends it at once. Whatever fails is done, or found, by the stages
// that follow.
func (k *keeper) prepare(u Unit, t *teller, fencing <-chan struct{}) (closing failover.Closing, know []string) {
	ctx, cancel := context.WithCancel(k.a.ctx)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	k.a.wg.Go(func() {
		select {
		case <-fencing:
			cancel()
		case <-done:
		}
	})
	k.commitAhead(ctx, u)
	// Last, since it is to have all connections.
	if k.a.o.Closing == failover.HalfClose {
		return failover.HalfClose, nil
	}
	nodes, ready := k.successors()
	limit := askTime // some may be away
	if ready {
		limit = aheadTime
	}
	asking, end := context.WithTimeout(ctx, limit)
	defer end()
	if know = t.whole(asking, nodes); len(know) > 0 {
		return failover.Quiet, know
	}
	return failover.HalfClose, nil
}

// commitAhead returns when what was acknowledged so far is durable, or after aheadTime.
func (k *keeper) commitAhead(ctx context.Context, u Unit) {
	ctx, cancel := context.WithTimeout(ctx, aheadTime)
	start, ended := time.Now(), make(chan error, 1)
	k.a.wg.Go(func() {
		defer cancel()
		ended <- u.Commit(ctx)
	})
	select {
	case err := <-ended:
		k.log.Debug("made durable ahead of giving the address up", "took", time.Since(start), "err", err)
	case <-ctx.Done(): // a Commit that does not heed it is not waited for
		k.log.Debug("not made durable ahead of giving the address up", "err", ctx.Err())
	}
}
