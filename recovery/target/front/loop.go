package front

import (
	"fmt"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func (f *Front) poke() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// maxBatch bounds the memory for actions that is kept.
const maxBatch = 1024

// loop carries out what the machine wants and nobody has done on the spot, until
// the target has been stopped and the last request has ended.
func (f *Front) loop() {
	defer close(f.ended)
	var batch []recov.Action
	for range f.wake {
		for {
			f.mu.Lock()
			if f.due {
				now := f.o.Clock.Now()
				f.due, f.timerAt = false, time.Time{}
				f.sweep(now)
				f.post(f.m.Tick(now))
			}
			if len(f.queue) == 0 {
				f.arm()
				over := f.over()
				f.mu.Unlock()
				if over {
					f.close()
					return
				}
				break
			}
			batch, f.queue = f.queue, batch[:0]
			f.mu.Unlock()
			for i := range batch {
				a := &batch[i]
				f.perform(a)
				if isFence(a.Kind) {
					f.mu.Lock()
					f.fences--
					f.mu.Unlock()
				}
			}
			clear(batch)
			if cap(batch) > maxBatch {
				batch = nil
			}
		}
	}
}

// perform carries out an action in the loop.
func (f *Front) perform(a *recov.Action) {
	x, _ := a.Handle.(*call)
	switch {
	case a.Kind != recov.ActExecute && a.Kind != actRaised:
		f.carryOut(a)
	case f.failed.Load() || a.Status != wire.OK:
		if a.Kind == recov.ActExecute {
			x.ticket = a.Ticket
		}
		x.notExecuted(wire.ErrTargetDown)
	case a.Kind == actRaised:
		f.spawn(func() { f.run(x) })
	case a.Replay:
		f.carryOut(a)
	default:
		one := *a // the loop uses its list again
		f.spawn(func() { f.carryOut(&one) })
	}
}

// isFence: no execution may overtake it.
func isFence(k recov.Kind) bool {
	switch k {
	case recov.ActPutClient, recov.ActDelClient, recov.ActPutTarget, recov.ActRecoveryEnd:
		return true
	}
	return false
}

// post hands actions to the loop. The lock is held.
func (f *Front) post(acts []recov.Action) {
	for i := range acts {
		f.postOne(&acts[i])
	}
}

func (f *Front) postOne(a *recov.Action) {
	f.scan(a)
	if a.Kind == recov.ActPutTarget && f.stopping.Load() {
		t := a.Target
		f.final = &t // written when all requests have ended
		return
	}
	if isFence(a.Kind) {
		f.fences++
	}
	f.queue = append(f.queue, *a)
}

// scan does the part of an action that must not be late. The lock is held.
func (f *Front) scan(a *recov.Action) {
	switch a.Kind {
	case recov.ActConnected:
		f.connected(a.Handle.(*call).c.s, a.Client, a.Gen)
	case recov.ActDelClient:
		f.disconnected(a.Client)
		delete(f.homes, a.Client)
	}
}

// arm sets the timer. The lock is held.
func (f *Front) arm() {
	now := f.o.Clock.Now()
	at, ok := f.m.NextTick(now)
	if f.remote > 0 && !f.stopping.Load() {
		// What the body has answered, the machine has to hear of in time.
		if t := f.swept.Add(f.m.Config().PingInterval); !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	if !ok || !f.timerAt.IsZero() && !at.Before(f.timerAt) {
		return
	}
	f.disarm()
	f.timerAt = at
	f.unarm = f.o.Clock.AfterFunc(max(at.Sub(now), 0), func() {
		f.mu.Lock()
		f.due = true
		f.mu.Unlock()
		f.poke()
	})
}

func (f *Front) disarm() {
	if f.unarm != nil {
		f.unarm()
	}
}

// over tells whether the last request has ended. The lock is held.
func (f *Front) over() bool {
	if f.final == nil {
		return false
	}
	for c := range f.conns {
		if c.load.inside() != 0 {
			return false
		}
	}
	return true
}

// close is the loop's last act.
func (f *Front) close() {
	f.tasks.Wait()
	f.disarm()
	f.mu.Lock()
	t, write := *f.final, !f.failed.Load() && !f.leaving
	f.mu.Unlock()
	if write {
		if err := f.body.PutTarget(t); err != nil {
			f.mu.Lock()
			f.err = fmt.Errorf("record the orderly stop: %w", err)
			f.mu.Unlock()
		} else {
			f.log.Info("target has stopped", "instance", t.Instance, "clean", t.Clean)
		}
	}
	f.state(recov.StateStopped)
}

func (f *Front) state(s recov.State) {
	if f.o.OnState != nil {
		f.o.OnState(s)
	}
}

// carryOut does what the machine wants. It is called by the loop, or for a
// single action by who brought the request; without the lock.
func (f *Front) carryOut(a *recov.Action) {
	switch a.Kind {
	case recov.ActExecute:
		x := a.Handle.(*call)
		x.ticket = a.Ticket
		x.exec = Exec{CheckVersions: a.CheckVersions, KeepSlot: !x.c.s.local && keepsSlot(x.req)}
		if a.Replay {
			x.exec.Transno = x.req.Transno
		}
		f.execute(x)
	case recov.ActReply:
		f.reply(a.Handle.(*call), a)
	case recov.ActDrop:
		// A late copy, or its client has gone on by another connection.
		x := a.Handle.(*call)
		x.rep.Status = wire.ErrTargetDown
		x.Done()
	case recov.ActConnected:
		f.welcome(a.Handle.(*call), a)
	case recov.ActLog:
		f.tell(a)
	case recov.ActWindowStart:
		f.state(recov.StateRecovering)
	case recov.ActWindowExtend:
		f.log.Debug("recovery window is longer", "until", a.Deadline)
	case recov.ActPutClient, recov.ActDelClient, recov.ActPutTarget, recov.ActRecoveryEnd, recov.ActCommit:
		if !f.failed.Load() {
			f.record(a)
		}
	}
}

// record has the body write something, or begin.
func (f *Front) record(a *recov.Action) {
	switch a.Kind {
	case recov.ActPutClient:
		if a.Ticket == 0 {
			f.body.PutClient(a.Entry, nil)
			return
		}
		id, ticket := a.Client, a.Ticket
		f.body.PutClient(a.Entry, func(err error) {
			if err != nil {
				f.log.Error("client cannot be registered", "client", name(id), "err", err)
			}
			f.event(func(now time.Time) []recov.Action { return f.m.Stored(id, ticket, err == nil, now) })
		})
	case recov.ActDelClient:
		f.body.DelClient(a.Client, a.Gen, a.Evicted)
	case recov.ActPutTarget:
		if err := f.body.PutTarget(a.Target); err != nil {
			f.Fail(fmt.Errorf("record the end of recovery: %w", err))
		}
	case recov.ActRecoveryEnd:
		f.body.Begin(a.Transno)
		f.open()
	case recov.ActCommit:
		f.body.CommitSoon()
	}
}

// open begins to serve.
func (f *Front) open() {
	f.mu.Lock()
	if f.stopping.Load() {
		f.mu.Unlock()
		return
	}
	f.serving.Store(true)
	held := f.held
	f.held = nil
	f.mu.Unlock()
	f.state(recov.StateFull)
	for _, x := range held {
		f.spawn(func() {
			f.mu.Lock()
			f.decide(x)
		})
	}
}

// spawn does something that may wait for the disk, so that the loop does not.
func (f *Front) spawn(fn func()) {
	f.tasks.Add(1)
	go func() {
		defer f.tasks.Done()
		fn()
	}()
}

// welcome answers a connect.
func (f *Front) welcome(x *call, a *recov.Action) {
	rep := x.rep
	rep.Instance, rep.Recovering, rep.Known = a.Instance, a.Recovering, a.Known
	rep.Transno, rep.LastCommitted = a.Transno, a.LastCommitted
	rep.Pingless = f.o.Pingless && !x.c.s.local
	rep.Tenure = f.body.Tenure(a.Client)
	f.log.Info("client is connected", "client", name(a.Client), "generation", a.Gen, "node", x.c.s.node,
		"known", a.Known, "recovering", a.Recovering)
	x.end()
}

func (f *Front) tell(a *recov.Action) {
	l := f.log
	if a.Client != (wire.ClientID{}) {
		l = l.With("client", name(a.Client))
	}
	switch {
	case a.Reason != "":
		l.Warn("client is evicted", "reason", a.Reason)
	case a.Warn:
		l.Warn(a.Text)
	default:
		l.Info(a.Text)
	}
}

func name(id wire.ClientID) string { return fmt.Sprintf("%x", id[:]) }
