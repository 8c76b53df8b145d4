package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

// logBatch is how many log records are worked on together.
const logBatch = 256

// gatherUnlinks is how long the destroyer waits for more work after the first.
const gatherUnlinks = 50 * time.Millisecond

// recover finishes what a crash left undone, before anybody is served: the
// punches of logged truncations (their client died with this process), and IO
// epochs that are still open. Unlinked files' objects can wait for the destroyer.
func (t *targets) recover(ctx context.Context) error {
	start := time.Now()
	punched := 0
	var after uint64
	for {
		recs, err := t.mdt.PendingLogs(after, logBatch)
		if err != nil {
			return err
		}
		if len(recs) == 0 {
			break
		}
		after = recs[len(recs)-1].ID
		var done []uint64
		for i := range recs {
			if recs[i].Kind != mdt.LogTruncate {
				continue
			}
			if err := t.punch(ctx, &recs[i]); err != nil {
				return err
			}
			done = append(done, recs[i].ID)
		}
		if err := t.mdt.LogDone(done); err != nil {
			return err
		}
		punched += len(done)
	}
	// All clients died with the last process: nothing of theirs can be late.
	for _, f := range t.mdt.PendingFences() {
		for _, o := range f.OSTs {
			if err := t.mdt.FenceDone(f.ID, f.Tenure, o); err != nil {
				return err
			}
		}
	}
	left, _, err := t.mdt.StaleEpochs(wire.FID{}, 1<<20)
	if err != nil {
		return err
	}
	open := make([]wire.FID, len(left))
	for i := range left {
		open[i] = left[i].FID
	}
	if _, err := t.fs.CloseLeftEpochs(ctx, open); err != nil {
		return err
	}
	if punched > 0 || len(open) > 0 {
		t.log.Info("recovered from an unclean stop", "truncations", punched, "io_epochs", len(open), "took", time.Since(start).Round(time.Millisecond))
	}
	return nil
}

func (t *targets) punch(ctx context.Context, l *mdt.LogRec) error {
	// With the inode's ctime, so that a time that was set since is not overruled.
	var in wire.Reply
	switch st := t.call(ctx, t.mdt, &wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: l.FID}, &in); st {
	case wire.OK:
	case wire.ErrStale:
		return nil
	default:
		return fmt.Errorf("truncate %v: %w", l.FID, st)
	}
	for s := uint8(0); s < l.Layout.Count; s++ {
		i := int(l.Layout.OST[s])
		if i >= len(t.osts) {
			return fmt.Errorf("truncate %v: it has data on OST %d, which is not configured; add it", l.FID, i)
		}
		req := wire.Request{
			Header: wire.Header{Op: wire.OpPunch, Flags: wire.FlagWaitCommit},
			FID:    l.FID, Stripe: s, Size: l.Layout.ObjectSize(s, l.Size), LogID: l.ID, Time: in.Attr.Ctime,
		}
		var rep wire.Reply
		if st := t.call(ctx, t.osts[i], &req, &rep); st != wire.OK {
			return fmt.Errorf("truncate %v on %s: %w", l.FID, ostName(i), st)
		}
	}
	return nil
}

// destroyer removes the objects of unlinked files until ctx ends.
func (t *targets) destroyer(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	warned := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.mdt.LogWake():
			// Unlinks come in crowds, and only durable ones are worked on.
			time.Sleep(gatherUnlinks)
		case <-tick.C:
		}
		if err := t.runLogs(ctx); err != nil && ctx.Err() == nil {
			if !warned {
				t.log.Warn("objects of removed files could not be destroyed; trying again", "err", err)
			}
			warned = true
		} else {
			warned = false
		}
	}
}

// runLogs destroys the objects of all files whose unlink is durable.
func (t *targets) runLogs(ctx context.Context) error {
	for ctx.Err() == nil {
		recs, err := t.mdt.PendingLogs(t.logsDone, logBatch)
		if err != nil || len(recs) == 0 {
			return err
		}
		last := recs[len(recs)-1].ID
		unlinks := recs[:0]
		for _, l := range recs {
			// The punches of logged truncations are their clients' business.
			if l.Kind == mdt.LogUnlink {
				unlinks = append(unlinks, l)
			}
		}
		if err := t.destroy(unlinks); err != nil {
			return err
		}
		ids := make([]uint64, len(unlinks))
		for i := range unlinks {
			ids[i] = unlinks[i].ID
		}
		if err := t.mdt.LogDone(ids); err != nil {
			return err
		}
		// Ids rise, so what is done need not be passed again.
		t.logsDone = last
	}
	return ctx.Err()
}

// destroy removes the objects of a batch of files; all requests are under way
// together, so that they share flushes.
func (t *targets) destroy(recs []mdt.LogRec) error {
	type job struct {
		req wire.Request
		rep wire.Reply
	}
	var wg sync.WaitGroup
	var jobs []*job
	for i := range recs {
		l := &recs[i]
		for s := uint8(0); s < l.Layout.Count; s++ {
			o := int(l.Layout.OST[s])
			if o >= len(t.osts) {
				return fmt.Errorf("destroy %v: it has data on OST %d, which is not configured; add it", l.FID, o)
			}
			j := &job{req: wire.Request{
				Header: wire.Header{Op: wire.OpDestroy, Flags: wire.FlagWaitCommit, Client: t.id, ClientGen: t.gen},
				FID:    l.FID, Stripe: s,
			}}
			jobs = append(jobs, j)
			wg.Add(1)
			t.osts[o].Handle(&j.req, &j.rep, wg.Done)
		}
	}
	wg.Wait()
	for _, j := range jobs {
		if j.rep.Status != wire.OK {
			return fmt.Errorf("destroy %v stripe %d: %w", j.req.FID, j.req.Stripe, j.rep.Status)
		}
	}
	return nil
}
