package front

import (
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// call is a request from Handle until its answer. Its owner is, in turn, who
// brings it, the machine (as a handle), the queue, and the body (as an
// Execution).
type call struct {
	c    *conn
	req  *wire.Request
	rep  *wire.Reply
	done func()
	in   bool // counted in c.load
	at   time.Time

	ticket uint64 // 0: for Body.Handle
	exec   Exec
	// Of the machine's answer after an execution: with refused it replaces the
	// body's.
	refused bool
	status  wire.Status
	// The place of the answer in order, if order is not nil.
	order *order
	turn  uint64

	passed func() // x.through: the body's Handle is done
	final  func() // x.Done
}

var calls sync.Pool

func newCall(c *conn, req *wire.Request, rep *wire.Reply, done func()) *call {
	x, ok := calls.Get().(*call)
	if !ok {
		x = new(call)
		x.passed, x.final = x.through, x.Done
	}
	x.c, x.req, x.rep, x.done = c, req, rep, done
	return x
}

func (x *call) recycle() {
	*x = call{passed: x.passed, final: x.final}
	calls.Put(x)
}

// enter has Stop wait for the call.
func (x *call) enter() {
	x.in = true
	x.c.load.enter()
}

// end answers the request.
func (x *call) end() {
	c, done, in := x.c, x.done, x.in
	x.rep.XID = x.req.XID // a failed body's answer may be bare
	x.recycle()
	done()
	if in {
		c.leave(true)
	}
}

// through answers a request that the body has handled by itself.
func (x *call) through() {
	if x.rep.Status == wire.ErrIO && x.c.f.failed.Load() {
		x.answer(wire.ErrTargetDown)
	}
	x.end()
}

// refuse answers a request that nothing is known of.
func (x *call) refuse(st wire.Status) {
	x.rep.Status = st
	x.end()
}

// pass gives a request to the body that recovery has no say about.
func (f *Front) pass(x *call) {
	if x.req.Op != wire.OpLockPoll {
		f.body.Handle(x.req, x.rep, x.passed)
		return
	}
	// It may wait for ever; nobody waits for it.
	c, req, rep, done, in := x.c, x.req, x.rep, x.done, x.in
	x.recycle()
	f.body.Handle(req, rep, done)
	if in {
		c.leave(false)
	}
}

// execute gives a request to the body, after that has learned of its VIP epoch.
func (f *Front) execute(x *call) {
	if x.exec.Transno == 0 && !f.inTime(x.req) {
		f.raise(x)
		return
	}
	f.run(x)
}

func (f *Front) run(x *call) {
	if x.ticket == 0 {
		f.pass(x)
		return
	}
	f.body.Execute(x.req, x.rep, x.exec, x)
}

// raise has the body learn of a VIP epoch before a request that names it is
// executed. Requests with the same one wait together.
func (f *Front) raise(x *call) {
	k := raiseKey{x.req.VIP, x.req.VIPEpoch}
	f.mu.Lock()
	waiting, asked := f.raises[k]
	f.raises[k] = append(waiting, x)
	f.mu.Unlock()
	if !asked {
		f.body.RaiseVIP(k.vip, k.epoch, func(err error) { f.raised(k, err) })
	}
}

// actRaised, an action of the front's own: the VIP epoch that Handle waited for
// is known, or with a Status it cannot be made known.
const actRaised recov.Kind = 255

func (f *Front) raised(k raiseKey, err error) {
	st := wire.OK
	if err != nil {
		f.log.Error("epoch of a service address cannot be raised", "vip", k.vip, "epoch", k.epoch, "err", err)
		st = wire.ErrTargetDown
	}
	f.mu.Lock()
	for _, x := range f.raises[k] {
		f.queue = append(f.queue, recov.Action{Kind: actRaised, Handle: x, Status: st})
	}
	delete(f.raises, k)
	f.mu.Unlock()
	f.poke()
}

// notExecuted ends a request that was to be executed.
func (x *call) notExecuted(st wire.Status) {
	if x.ticket != 0 {
		x.Executed(recov.Result{Status: st, NotDone: true})
	}
	x.rep.Status = st
	x.Done()
}

// Executed implements Execution.
func (x *call) Executed(res recov.Result) (wait bool) {
	f := x.c.f
	res.Ticket = x.ticket
	others := false
	always := !res.NotDone && waitsAlways(x.req.Op)
	f.mu.Lock()
	now := x.at
	if x.exec.Transno != 0 || now.Before(f.swept) {
		now = f.o.Clock.Now() // the clock is not cheap, and most requests are short
	}
	acts := f.m.Executed(res, now)
	for i := range acts {
		a := &acts[i]
		switch {
		case a.Kind == recov.ActReply && a.Handle == any(x):
			wait = a.WaitCommit || always
			x.refused, x.status = a.Status != res.Status, a.Status
			x.enqueue(&res, wait)
			continue
		case a.Kind == recov.ActReply && a.Reconstructed: // to a copy of x
			a.Handle.(*call).enqueue(&res, a.WaitCommit || always)
		case a.Kind == recov.ActCommit:
			continue // the answer waits, so the body does that anyway
		}
		f.postOne(a)
		others = true
	}
	f.mu.Unlock()
	if others {
		f.poke()
	}
	return wait
}

// Done implements Execution.
func (x *call) Done() {
	f, req, rep := x.c.f, x.req, x.rep
	switch {
	case x.refused:
		x.answer(x.status)
	case rep.Status == wire.ErrIO && f.failed.Load():
		// Nobody knows whether it stays; the client asks the next instance.
		x.answer(wire.ErrTargetDown)
	}
	if l := x.c.s.link.Load(); l == nil || l.id != req.Client || l.gen != req.ClientGen || !f.serving.Load() {
		f.mu.Lock()
		f.m.Committed(rep.LastCommitted)
		rep.LastCommitted = f.m.CommittedFor(req.Client, req.ClientGen)
		f.mu.Unlock()
	}
	if x.order != nil {
		x.order.end(x)
		return
	}
	x.end()
}

// answer makes the reply one that has nothing but a status.
func (x *call) answer(st wire.Status) {
	lc := x.rep.LastCommitted
	x.rep.Reset()
	x.rep.Status, x.rep.LastCommitted = st, lc
}

// reply gives an answer of the machine's.
func (f *Front) reply(x *call, a *recov.Action) {
	req, rep := x.req, x.rep
	rep.Status, rep.LastCommitted = a.Status, f.body.LastCommitted()
	if a.Transno == 0 && !a.Reconstructed {
		x.Done()
		return
	}
	if f.failed.Load() {
		rep.Status = wire.ErrTargetDown
		x.Done()
		return
	}
	rep.Transno, rep.Reconstructed = a.Transno, a.Reconstructed
	if req.Flags&wire.FlagReplay != 0 {
		x.Done() // the rest of the answer its client has had long ago
		return
	}
	if a.Reconstructed {
		f.body.Rebuild(req, rep, &recov.SlotRecord{
			Client: req.Client, Gen: req.ClientGen, Slot: req.Slot, XID: req.XID,
			Transno: a.Transno, Status: a.Status, Data: a.Data,
		})
	}
	wait := a.WaitCommit || req.Flags&wire.FlagWaitCommit != 0 || req.Op == wire.OpWrite && req.Stable != wire.Unstable || waitsAlways(req.Op)
	if !wait || a.Transno == 0 || !f.body.WaitCommit(a.Transno, rep, x.final) {
		x.Done()
	}
}
