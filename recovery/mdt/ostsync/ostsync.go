// Package ostsync carries out at the OSTs what the MDT has logged: it fences
// clients that were evicted, finishes what they have left half done (punches of
// truncated files, IO epochs) and destroys the objects of removed files. An OST
// that is away holds up only what concerns it.
package ostsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

const (
	// batch is how many log records are worked on together.
	batch = 256
	// gather is how long a removal waits for others to share flushes with.
	gather = 50 * time.Millisecond
	// interval between passes without a reason.
	interval = time.Second
)

// Sync does the work of one MDT. Once and Run are not to be called together.
type Sync struct {
	m   *mdt.MDT
	fs  *client.FS
	log *slog.Logger

	// Up to seen the log was gone through; first is the lowest record before that
	// waits for one of the OSTs in away, or has failed and is to be tried again; 0 for
	// none. left is what MDT.Left said.
	seen, first uint64
	again       bool // one has failed
	away        map[int]bool
	left        uint64

	kick chan struct{}

	mu   sync.Mutex
	st   Status
	pass chan struct{} // closed at the end of the next pass that begins
}

// Status tells what is left to do, as of the last pass, and what has been done.
type Status struct {
	Fences      int    // clients of whose eviction some OST does not know
	Waiting     int    // log records that wait for an OST that is away
	Away        []int  // these OSTs
	Epochs      uint64 // files whose IO epochs were closed for clients that are gone
	Punched     uint64 // truncates finished for them
	Destroyed   uint64 // removed files whose objects were destroyed
	LastFailure string
}

// New returns a Sync that works through fs, a client in the MDT's process.
func New(m *mdt.MDT, fs *client.FS, log *slog.Logger) *Sync {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Sync{m: m, fs: fs, log: log, kick: make(chan struct{}, 1), pass: make(chan struct{})}
}

// Status returns the figures.
func (s *Sync) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.st
	st.Away = append([]int(nil), st.Away...)
	return st
}

// Run works until ctx ends.
func (s *Sync) Run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		s.mu.Lock()
		done := s.pass
		s.pass = make(chan struct{})
		s.mu.Unlock()
		failure := ""
		if err := s.Once(ctx); err != nil && ctx.Err() == nil {
			failure = err.Error()
		}
		s.mu.Lock()
		news := failure != "" && s.st.LastFailure != failure
		s.st.LastFailure = failure
		s.mu.Unlock()
		if news {
			s.log.Warn("work at the OSTs could not be finished; trying again", "err", failure)
		}
		close(done)
		select {
		case <-ctx.Done():
			return
		case <-s.m.FenceWake():
		case <-s.kick:
		case <-s.m.LogWake():
			// Unlinks come in crowds, and only durable ones are worked on.
			select {
			case <-ctx.Done():
				return
			case <-time.After(gather):
			}
		case <-tick.C:
		}
	}
}

// settleAgain is the pause between passes that Settle asks for.
const settleAgain = 20 * time.Millisecond

// Settle waits until nothing is left of clients that are gone: they are fenced
// everywhere, their truncates are finished and their IO epochs closed. Run is to be
// at work meanwhile.
func (s *Sync) Settle(ctx context.Context) error {
	for {
		s.mu.Lock()
		pass := s.pass
		s.mu.Unlock()
		select {
		case s.kick <- struct{}{}:
		default:
		}
		select {
		case <-ctx.Done():
			return s.unsettled(ctx.Err())
		case <-pass:
		}
		if done, err := s.settled(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return s.unsettled(ctx.Err())
		case <-time.After(settleAgain):
		}
	}
}

func (s *Sync) unsettled(err error) error {
	if st := s.Status(); st.LastFailure != "" {
		return fmt.Errorf("finish what clients that are gone have left: %w (%s)", err, st.LastFailure)
	}
	return fmt.Errorf("finish what clients that are gone have left: %w", err)
}

func (s *Sync) settled() (bool, error) {
	if !s.m.Settled() {
		return false, nil
	}
	for after := uint64(0); ; {
		recs, err := s.m.PendingLogs(after, batch)
		if err != nil || len(recs) == 0 {
			return err == nil, err
		}
		for i := range recs {
			if l := &recs[i]; l.Kind == mdt.LogTruncate && s.m.LeftBy(l.Client, l.Tenure) {
				return false, nil
			}
		}
		after = recs[len(recs)-1].ID
	}
}

// Once does what can be done now and waits for it. The error is the first of what
// could not be done though the OSTs are there.
func (s *Sync) Once(ctx context.Context) error {
	return errors.Join(s.fences(), s.logs(ctx), s.epochs(ctx))
}

// job is a request to an OST.
type job struct {
	ost int
	req wire.Request
	rep wire.Reply
}

// run gives all jobs to their OSTs, so that they can share flushes, and waits. The
// error is that of the first that failed.
func (s *Sync) run(jobs []*job) error {
	var wg sync.WaitGroup
	for _, j := range jobs {
		j.req.Flags |= wire.FlagWaitCommit | wire.FlagNoWait
		wg.Add(1)
		s.fs.SubmitOST(j.ost, &j.req, &j.rep, wg.Done)
	}
	wg.Wait()
	return outcome(jobs)
}

// outcome is the error of the first of some jobs that failed.
func outcome(jobs []*job) error {
	for _, j := range jobs {
		if j.rep.Status != wire.OK {
			return fmt.Errorf("%v stripe %d on OST %d: %w", j.req.FID, j.req.Stripe, j.ost, j.rep.Status)
		}
	}
	return nil
}

// fences tells OSTs which clients were evicted.
func (s *Sync) fences() error {
	pending := s.m.PendingFences()
	left := len(pending)
	var jobs []*job
	for _, f := range pending {
		for _, o := range f.OSTs {
			if int(o) < s.fs.OSTs() && !s.fs.Away(int(o)) {
				jobs = append(jobs, &job{ost: int(o), req: wire.Request{Header: wire.Header{Op: wire.OpFence}, Peer: f.ID, Cookie: f.Tenure}})
			}
		}
	}
	// Each may fail by itself.
	_ = s.run(jobs)
	var errs []error
	for _, j := range jobs {
		if j.rep.Status != wire.OK {
			errs = append(errs, fmt.Errorf("fence client %x at OST %d: %w", j.req.Peer, j.ost, j.rep.Status))
		} else if err := s.m.FenceDone(j.req.Peer, j.req.Cookie, uint16(j.ost)); err != nil {
			errs = append(errs, err)
		}
	}
	if len(jobs) > 0 {
		left = len(s.m.PendingFences())
	}
	s.mu.Lock()
	s.st.Fences = left
	s.mu.Unlock()
	return errors.Join(errs...)
}

// logs goes through the log: what is new, what waited for an OST that is back or for a
// client that is gone, and what has failed in the last pass. What fails holds up only
// the later records of the same file; the error is the first failure.
func (s *Sync) logs(ctx context.Context) error {
	away := map[int]bool{}
	for i := range s.fs.OSTs() {
		if s.fs.Away(i) {
			away[i] = true
		}
	}
	for i := range s.away {
		if !away[i] && s.first != 0 {
			s.seen, s.first = min(s.seen, s.first-1), 0
			s.setWaiting(0, away)
		}
	}
	if left := s.m.Left(); left != s.left {
		s.left, s.seen, s.first = left, 0, 0
		s.setWaiting(0, away)
	}
	if s.again {
		s.seen, s.first, s.again = min(s.seen, s.first-1), 0, false
		s.setWaiting(0, away)
	}
	s.away = away
	failed := map[wire.FID]error{}
	var failure error
	for ctx.Err() == nil {
		recs, err := s.m.PendingLogs(s.seen, batch)
		if err != nil || len(recs) == 0 {
			return errors.Join(failure, err)
		}
		first, waiting := s.first, 0
		var now []mdt.LogRec
		for i := range recs {
			l := &recs[i]
			switch {
			case l.Kind == mdt.LogTruncate && !s.m.LeftBy(l.Client, l.Tenure):
				// Its maker punches.
			case slices.ContainsFunc(l.Layout.OST[:l.Layout.Count], func(o uint16) bool { return away[int(o)] }):
				waiting++
				if first == 0 {
					first = l.ID
				}
			default:
				now = append(now, *l)
			}
		}
		left, err := s.work(ctx, now, failed)
		if err != nil {
			return errors.Join(failure, err) // the next pass begins here
		}
		for _, l := range left {
			if failure == nil {
				failure = failed[l.FID]
			}
			if s.again = true; first == 0 || l.ID < first {
				first = l.ID
			}
		}
		s.seen, s.first = recs[len(recs)-1].ID, first
		s.setWaiting(waiting, away)
	}
	return ctx.Err()
}

// setWaiting adds n to the records that wait, or makes them 0.
func (s *Sync) setWaiting(n int, away map[int]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n == 0 {
		s.st.Waiting = 0
	}
	s.st.Waiting += n
	s.st.Away = slices.Sorted(maps.Keys(away))
}

// work carries out log records: punches in their order, each before the next of the
// same file, and destroys. It gives those that are left: failed has their files, and
// those whose earlier records are left.
func (s *Sync) work(ctx context.Context, recs []mdt.LogRec, failed map[wire.FID]error) (left []*mdt.LogRec, err error) {
	type destroy struct {
		l    *mdt.LogRec
		jobs []*job
	}
	var destroys []destroy
	var all []*job
	var done []uint64
	var punched, destroyed uint64
	fail := func(l *mdt.LogRec, err error) {
		failed[l.FID] = err
		left = append(left, l)
	}
	for i := range recs {
		l := &recs[i]
		if failed[l.FID] != nil {
			left = append(left, l)
			continue
		}
		jobs, err := s.jobs(l)
		switch {
		case err != nil:
			fail(l, err)
		case l.Kind == mdt.LogUnlink:
			for _, j := range jobs {
				j.req.Op = wire.OpDestroy
			}
			all = append(all, jobs...)
			destroys = append(destroys, destroy{l, jobs})
		default:
			if err := s.punch(ctx, l, jobs); err != nil {
				fail(l, err)
				continue
			}
			done = append(done, l.ID)
			punched++
		}
	}
	_ = s.run(all) // each may fail by itself
	for _, d := range destroys {
		if err := outcome(d.jobs); err != nil {
			fail(d.l, fmt.Errorf("destroy objects: %w", err))
			continue
		}
		done = append(done, d.l.ID)
		destroyed++
	}
	if err := s.m.LogDone(done); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.st.Punched += punched
	s.st.Destroyed += destroyed
	s.mu.Unlock()
	return left, nil
}

// jobs makes one for each object of a record's file.
func (s *Sync) jobs(l *mdt.LogRec) (jobs []*job, err error) {
	for st := uint8(0); st < l.Layout.Count; st++ {
		o := int(l.Layout.OST[st])
		if o >= s.fs.OSTs() {
			return nil, fmt.Errorf("%v has data on OST %d, which is not configured; add it", l.FID, o)
		}
		jobs = append(jobs, &job{ost: o, req: wire.Request{FID: l.FID, Stripe: st}})
	}
	return jobs, nil
}

func (s *Sync) punch(ctx context.Context, l *mdt.LogRec, jobs []*job) error {
	// With the inode's ctime, so that a time that was set since is not overruled.
	get := wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: l.FID}
	var in wire.Reply
	switch s.fs.Call(ctx, client.Owner{}, &get, &in); in.Status {
	case wire.OK:
	case wire.ErrStale:
		return nil
	default:
		return fmt.Errorf("truncate %v: %w", l.FID, in.Status)
	}
	for _, j := range jobs {
		j.req.Op, j.req.LogID, j.req.Time = wire.OpPunch, l.ID, in.Attr.MtimeSince()
		j.req.Size = l.Layout.ObjectSize(j.req.Stripe, l.Size)
	}
	if err := s.run(jobs); err != nil {
		return fmt.Errorf("truncate: %w", err)
	}
	return nil
}

// epochs closes what clients that are gone have left open, once their data cannot
// change any more.
func (s *Sync) epochs(ctx context.Context) error {
	var after wire.FID
	var first error
	for ctx.Err() == nil {
		stale, _, err := s.m.StaleEpochs(after, batch)
		if err != nil || len(stale) == 0 {
			return errors.Join(first, err)
		}
		after = stale[len(stale)-1].FID
		stale = slices.DeleteFunc(stale, func(e mdt.OpenEpoch) bool {
			return slices.ContainsFunc(e.Layout.OST[:e.Layout.Count], func(o uint16) bool { return s.fs.Away(int(o)) })
		})
		fids := make([]wire.FID, 0, len(stale))
		for _, e := range stale {
			if n := len(fids); n == 0 || fids[n-1] != e.FID {
				fids = append(fids, e.FID)
			}
		}
		n, err := s.fs.CloseLeftEpochs(ctx, fids)
		if err != nil && first == nil {
			first = err
		}
		s.mu.Lock()
		s.st.Epochs += uint64(n)
		s.mu.Unlock()
	}
	return ctx.Err()
}
