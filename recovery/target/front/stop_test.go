package front

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestStop: an orderly stop finishes what is under way, in the body too, and the
// next start needs no recovery (RS 136, CS 33b).
func TestStop(t *testing.T) {
	inRig(t, func(r *rig) {
		a, l := r.client("a").join(), r.local("l").join()
		r.want(a.do("w"), wire.OK)
		a.slot = 1
		var run []func()
		r.b.later = func(_ string, f func()) { run = append(run, f) }
		remote, own := a.do("x"), l.do("y")
		read := a.op(wire.OpStatfs)
		poll := a.op(wire.OpLockPoll)
		var err error
		stopped := false
		go func() { err = r.f.Stop(context.Background()); stopped = true }()
		synctest.Wait()
		r.want(a.do("z"), wire.ErrTargetDown)
		r.want(a.op(wire.OpGetattr), wire.ErrTargetDown)
		r.want(l.do("z"), wire.ErrTargetDown)
		r.want(a.connect(), wire.ErrTargetDown)
		clean := func() bool { return r.b.called("target instance 1 clean true") == 1 }
		for _, f := range run {
			if clean() || stopped {
				t.Error("stopped with a request in work")
			}
			f()
			synctest.Wait()
		}
		r.want(remote, wire.OK)
		r.want(own, wire.OK)
		if clean() || stopped {
			t.Error("stopped with a read in work")
		}
		r.b.reads[0]()
		synctest.Wait()
		r.want(read, wire.OK)
		if !clean() || !stopped || err != nil {
			t.Errorf("clean %t, stopped %t, %v", clean(), stopped, err)
		}
		r.waits(poll)
		r.b.reads = nil
		r.want(a.op(wire.OpPing), wire.ErrTargetDown)
		if err := r.f.Stop(context.Background()); err != nil {
			t.Errorf("stopped again: %v", err)
		}
		if r.f.State() != recov.StateStopped || r.states[len(r.states)-1] != recov.StateStopped {
			t.Errorf("state %v, told %v", r.f.State(), r.states)
		}
		if r.f.Evict(a.id) || r.f.Abort() {
			t.Error("evicted or aborted after the stop")
		}
		r.crash() // of what is stopped already
		if s := r.f.Status(); !s.Serving || len(s.Clients) != 1 {
			t.Errorf("status %+v", s)
		}
		if rep := r.want(a.connect(), wire.OK); rep.Recovering || !rep.Known || rep.Instance != 2 {
			t.Errorf("connected: %+v", rep)
		}
		r.want(a.do("x"), wire.OK)
	})
}

// TestStopInRecovery: what waits is answered, and the next start recovers again
// (SM 138).
func TestStopInRecovery(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, l := r.client("a").join(), r.client("b").join(), r.local("l")
		b1, a1 := b.do("x"), a.do("y")
		a.told, b.told = a1.rep.Transno, b1.rep.Transno
		r.crash()
		a.join()
		aside := r.send(a.c, replay(a1))
		own := l.connect()
		la := a.last()
		if err := r.f.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		r.want(aside, wire.ErrTargetDown)
		r.want(own, wire.ErrTargetDown)
		r.want(la, wire.ErrTargetDown)
		r.crash()
		a.join()
		b.join()
		r.want(r.send(b.c, replay(b1)), wire.OK)
		r.want(r.send(a.c, replay(a1)), wire.OK)
		a.last()
		r.want(b.last(), wire.OK)
	})
}

// TestStopGivesUp: a body that does not finish holds up Stop as long as its
// caller wants; nothing is recorded then.
func TestStopGivesUp(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").join()
		var run func()
		r.b.later = func(_ string, f func()) { run = f }
		going := a.do("x")
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := r.f.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stopped: %v", err)
		}
		run()
		synctest.Wait()
		r.want(going, wire.OK)
		if r.b.called("target instance 1 clean true") != 0 {
			t.Error("recorded as clean")
		}
	})
}

// TestFail: when the body has failed everybody is told so, and nothing more is
// executed. Nobody gets an answer that may not be true.
func TestFail(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, c, l := r.client("a").join(), r.client("b").join(), r.client("c").join(), r.local("l").join()
		r.want(b.do("x"), wire.OK)
		q := a.change("y")
		q.Flags = wire.FlagWaitCommit
		gated := r.send(a.c, q)
		r.waits(gated)
		q = l.change("w")
		q.Flags = wire.FlagWaitCommit
		here := r.send(l.c, q)
		r.waits(here)
		b.slot = 1
		block := make(chan struct{})
		r.b.onCall = func(what string) {
			if strings.HasPrefix(what, "del") {
				<-block
			}
		}
		r.f.Evict(c.id)
		synctest.Wait()
		behind := b.do("z") // waits for the eviction
		r.waits(behind)
		r.b.later = func(_ string, f func()) { t.Error("executed after the failure") }
		release := r.b.die()
		r.f.Fail(errors.New("disk is gone"))
		r.f.Fail(errors.New("another"))
		release()
		close(block)
		synctest.Wait()
		r.want(gated, wire.ErrTargetDown)
		r.want(here, wire.ErrTargetDown)
		r.want(behind, wire.ErrTargetDown)
		r.want(b.do("x"), wire.ErrTargetDown)
		r.want(l.do("x"), wire.ErrTargetDown)
		r.want(b.op(wire.OpGetattr), wire.ErrTargetDown)
		if err := r.f.Stop(context.Background()); err == nil || !strings.Contains(err.Error(), "disk is gone") {
			t.Errorf("stop: %v", err)
		}
		if s := r.f.Status(); s.Err == nil || s.Serving {
			t.Errorf("status %+v", s)
		}
		if r.b.called("target instance 1 clean true") != 0 {
			t.Error("recorded as clean")
		}
		if !r.log.has("target failed", "disk is gone") {
			t.Error("the log does not say why")
		}
	})
}

// TestFailInRecovery: replays put aside, final pings, held requests.
func TestFailInRecovery(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, l := r.client("a").join(), r.client("b").join(), r.local("l")
		b1, a1 := b.do("x"), a.do("y")
		a.told, b.told = a1.rep.Transno, b1.rep.Transno
		r.crash()
		a.join()
		aside := r.send(a.c, replay(a1))
		own := l.connect()
		la := a.last()
		r.told = nil
		r.f.Fail(errDead)
		synctest.Wait()
		if len(r.told) != 1 || r.told[0] != errDead {
			t.Errorf("its owner was told %v", r.told)
		}
		r.want(aside, wire.ErrTargetDown)
		r.want(own, wire.ErrTargetDown)
		r.want(la, wire.ErrTargetDown)
	})
}

// TestStartFails: what cannot be read or recorded at the start, or at the end of
// recovery.
func TestStartFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, d: &disk{}, cfg: cfg}
		if _, err := New(Options{}); err == nil {
			t.Error("started without a body")
		}
		r.b = newBody(t, r.d)
		r.b.putFails = errors.New("damaged")
		if _, err := New(r.options()); err == nil || !strings.Contains(err.Error(), "MDT0000") {
			t.Errorf("started without a table: %v", err)
		}
		r.b.putFails, r.b.dead = nil, true
		if _, err := New(r.options()); !errors.Is(err, errDead) {
			t.Errorf("started without a record: %v", err)
		}

		r.start()
		a := r.client("a").join()
		a1 := a.do("x")
		a.told = a1.rep.Transno + 10 // something is lost for good, so a record is needed
		r.crash()
		a.join()
		r.want(r.send(a.c, replay(a1)), wire.OK)
		r.b.putFails = errors.New("no space")
		r.want(a.last(), wire.OK) // recovery is over; the target is not
		r.want(a.do("x"), wire.ErrTargetDown)
		if err := r.f.Status().Err; err == nil || r.b.called("begin") != 0 {
			t.Errorf("%v, calls %q", err, r.b.calls)
		}
		r.end()
	})
}
