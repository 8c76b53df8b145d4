package client

import (
	"context"
	"fmt"
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// flushers is how many files Flush works on at a time.
const flushers = 64

// Flush makes everything durable that was acknowledged to o's address before it was
// called: operations at the MDT, UNSTABLE data at the OSTs. What other addresses of
// this process have written goes with it, since an IO epoch does not tell for whom a
// file was written; its epochs stay open. ErrStaleVIP means that the address has a
// newer owner.
func (f *FS) Flush(ctx context.Context, o Owner) error {
	m := f.get()
	defer f.put(m)
	// An epoch that is in force already is answered when all before it is durable.
	m.req.Op, m.req.Flags = wire.OpSetVIPEpoch, wire.FlagWaitCommit
	if f.Call(ctx, o, &m.req, &m.rep); m.rep.Status != wire.OK {
		return fmt.Errorf("client: flush the MDT: %w", m.rep.Status)
	}
	fids := make(chan wire.FID)
	errs := make(chan error, flushers)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for range flushers {
		wg.Go(func() {
			for fid := range fids {
				if st := f.flushFile(ctx, fid); st != wire.OK {
					errs <- fmt.Errorf("client: flush %v: %w", fid, st)
					cancel()
					return
				}
			}
		})
	}
	written := f.epochs.written()
feed:
	for _, fid := range written {
		select {
		case fids <- fid:
		case <-ctx.Done():
			break feed
		}
	}
	close(fids)
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return ctx.Err()
	}
}

func (f *FS) flushFile(ctx context.Context, fid wire.FID) wire.Status {
	var a wire.Attr
	st := f.rawAttr(ctx, fid, &a)
	if st == wire.OK {
		st = f.syncObjects(ctx, Owner{}, &a, nil)
	}
	if st == wire.ErrStale || st == wire.ErrNoEnt {
		return wire.OK // it is gone
	}
	return st
}

// written lists the files that this client may have written without their data being
// durable: an epoch that was closed was flushed before.
func (t *epochTable) written() (l []wire.FID) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		for fid, e := range s.m {
			if !e.untouched {
				l = append(l, fid)
			}
		}
		s.mu.Unlock()
	}
	return l
}
