package failover

import (
	"context"
	"errors"
	"time"

	"github.com/baton-nfs/baton/failover/events"
)

const (
	roleRelease = "release"
	roleTake    = "take"
)

// ReleaseOptions say how an address is given up. Subject and Service are required.
type ReleaseOptions struct {
	Subject
	Service Service
	Refuse  Refuse  // default Hold
	Closing Closing // default HalfClose
	// Given: somebody else removes the address, after StageClear or later.
	Given bool
	// Fenced is closed, or gets a value, when another node is known to serve the address. With reason Fenced it is
	// so from the start.
	Fenced <-chan struct{}
	// Told tells the registry that the address was given up in order. It is called, repeatedly within TellTimeout
	// until it succeeds, only if that is so; the next owner may go on from there.
	Told func(ctx context.Context) error
	// Abandon, if not nil, tells the registry in Told's place that the address is not served here any more but not
	// everything is known to be durable. Without it the caller does so after Release.
	Abandon func(ctx context.Context) error
	// Mute, if not nil, is called in Service.Finish's place when the machine still has the address: the ports are kept,
	// and whatever comes to them is dropped. The caller calls Finish when the address is away.
	Mute func(ctx context.Context) error
	// Finish, if not nil, is what the last stage waits for, at most FinishWait (default 1 min).
	Finish     <-chan struct{}
	FinishWait time.Duration
	// OnStage is called when a stage has ended. It must not block.
	OnStage   func(StageReport)
	Deadlines Deadlines // zero values mean DefaultDeadlines
}

// ReleaseReport is what giving an address up came to.
type ReleaseReport struct {
	Outcome Outcome
	// Told: the registry knows. If not although Outcome is Clean, or Unclean, it is still to be told Stopped, or
	// Abandoned.
	Told bool
	// Silent (of Stuck): Mute was called and has done so, and no socket of a connection is left.
	Silent    bool
	Drained   Drained
	Closed    Closed
	Destroyed int // sockets
	Remaining int // sockets that could not be destroyed
	Stages    []StageReport
	Took      time.Duration
	Err       error // what has failed, stage by stage; also of a move that is Clean
}

// Release gives an address up. A teardown that has begun ends: the deadlines bound it, not ctx, of which only values
// are used.
func (r *Runner) Release(ctx context.Context, o ReleaseOptions) ReleaseReport {
	if o.Refuse == "" {
		o.Refuse = Hold
	}
	if o.Closing == "" {
		o.Closing = HalfClose
	}
	cfg := teardownConfig{
		fenced: o.Reason == Fenced, refuse: o.Refuse, closing: o.Closing, given: o.Given, tell: o.Told != nil, abandon: o.Abandon != nil,
		deadlines: o.Deadlines,
	}
	if o.Finish != nil {
		cfg.park = o.FinishWait
		if cfg.park <= 0 {
			cfg.park = time.Minute
		}
	}
	r.stopSettling(o.addr())
	m := newTeardown(cfg)
	d := r.drive(ctx, m, &o.Subject, roleRelease)
	d.run = func(ctx context.Context, st step, attempt int) Result {
		return r.releaseStage(ctx, &o, st, attempt)
	}
	d.begin()
	n := 0
	d.until(func() bool {
		for ; n < len(m.reports) && o.OnStage != nil; n++ {
			o.OnStage(m.reports[n])
		}
		return d.done
	}, o.Fenced, nil, o.Finish)
	rep := ReleaseReport{Outcome: m.outcome(), Told: m.told, Stages: m.reports, Took: d.now()}
	for i := range m.reports {
		s := &m.reports[i]
		switch s.Stage {
		case StageDrain:
			rep.Drained = s.Result.Drained
		case StageClose:
			rep.Closed = s.Result.Closed
			rep.Destroyed += s.Result.Destroyed
		case StageClear, StageFinish:
			rep.Silent = s.Stage == StageFinish && rep.Outcome == Stuck && o.Mute != nil && s.OK()
			rep.Destroyed += s.Result.Destroyed
			rep.Remaining = s.Result.Remaining
		}
	}
	rep.Err = errors.Join(d.errs...)
	d.end(rep.Outcome, map[string]int{
		events.Conns: rep.Drained.Conns, events.Replies: rep.Drained.Replies, events.Left: rep.Drained.Left,
		events.Orderly: rep.Closed.Orderly, events.Forced: rep.Closed.Forced,
		events.Destroyed: rep.Destroyed, events.Remaining: rep.Remaining,
	})
	return rep
}

// resetTime is the part of StageClose that a fence leaves to resets.
const resetTime = 100 * time.Millisecond

func (r *Runner) releaseStage(ctx context.Context, o *ReleaseOptions, st step, attempt int) Result {
	switch st.stage {
	case StageRefuse:
		return Result{Err: o.Service.Refuse(ctx, st.refuse)}
	case StageDrain:
		n, err := o.Service.Drain(ctx)
		return Result{Drained: n, Err: err}
	case StageCommit:
		return Result{Err: o.Service.Commit(ctx)}
	case StageClose:
		var res Result
		var derr error
		if st.reset {
			short, cancel := context.WithTimeout(ctx, resetTime)
			res.Destroyed, derr = r.Net.Destroy(short, o.addr())
			cancel()
		}
		var err error
		res.Closed, err = o.Service.Close(ctx, st.closing)
		res.Err = errors.Join(derr, err)
		return res
	case StageClear:
		return r.clear(ctx, o.addr())
	case StageRemove:
		return r.remove(ctx, o.Address)
	case StageTold:
		if st.clean {
			return Result{Err: o.Told(ctx)}
		}
		return Result{Err: o.Abandon(ctx)}
	case StageFinish:
		if attempt == 1 {
			end := o.Service.Finish
			if st.stuck && o.Mute != nil {
				end = o.Mute
			}
			if err := end(ctx); err != nil {
				return Result{Err: err, final: true}
			}
		}
		return r.clear(ctx, o.addr())
	}
	return Result{Err: errors.New("no such stage")}
}
