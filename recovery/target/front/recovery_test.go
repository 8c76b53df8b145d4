package front

import (
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestRecovery: replays of two clients run in the order of their numbers, the
// final pings wait for all, then new requests are served (RS 1, RD 1, RS 93b).
func TestRecovery(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, c := r.client("a").join(), r.client("b").join(), r.client("c")
		a1, b1, a2 := a.do("x"), b.do("y"), a.do("y")
		for _, q := range []*answer{a1, b1, a2} {
			r.want(q, wire.OK)
		}
		a.told, b.told = a2.rep.Transno, b1.rep.Transno
		r.crash()
		if st := r.f.State(); st != recov.StateWaiting {
			t.Fatalf("state %v", st)
		}
		if rep := r.want(a.connect(), wire.OK); !rep.Recovering || !rep.Known || rep.Instance != 2 {
			t.Errorf("connected: %+v", rep)
		}
		r.want(a.op(wire.OpPing), wire.OK)
		r.want(a.op(wire.OpGetattr), wire.ErrRecovering)
		r.want(a.op(wire.OpSyncTarget), wire.ErrRecovering)
		r.want(a.do("x"), wire.ErrRecovering)
		r.want(c.connect(), wire.ErrUnknownClient)
		r.want(c.op(wire.OpGetattr), wire.ErrRecovering)
		r.want(b.connect(), wire.OK)
		later := r.send(a.c, replay(a2))
		r.waits(later)
		s := r.f.Status()
		if s.Recovery.Queued != 1 || s.Clients[0].Queued != 1 || s.Clients[0].Stage != "requests" || s.Serving {
			t.Errorf("status %+v", s)
		}
		r.want(r.send(a.c, replay(a1)), wire.OK)
		r.waits(later)
		if rep := r.want(r.send(b.c, replay(b1)), wire.OK); rep.Transno != b1.rep.Transno {
			t.Errorf("replayed as %d, was %d", rep.Transno, b1.rep.Transno)
		}
		r.want(later, wire.OK)
		la := a.last()
		r.waits(la)
		if r.b.called("begin") != 0 {
			t.Error("Begin before the end of recovery")
		}
		r.want(b.last(), wire.OK)
		r.want(la, wire.OK)
		if r.b.called("begin") != 1 {
			t.Error("no Begin")
		}
		r.want(a.do("x"), wire.OK)
		r.want(b.op(wire.OpGetattr), wire.OK)
		c.join()
		if want := []recov.State{recov.StateStopped, recov.StateRecovering, recov.StateFull}; !slices.Equal(r.states, want) {
			t.Errorf("states %v, want %v", r.states, want)
		}
		if !r.log.has("recovery ended", "2 of 2 clients, 3 requests") {
			t.Error("the log does not tell of the end")
		}
		// Replays after the end: known ones are answered, others evict (SM 137).
		r.want(r.send(a.c, replay(a1)), wire.OK)
		q := replay(a2)
		q.Transno += 1000
		q.XID += 1000
		r.want(r.send(a.c, q), wire.ErrUnknownClient)
		r.want(a.op(wire.OpGetattr), wire.ErrUnknownClient)
	})
}

// TestReconnectInRecovery: a connection breaks with a replay put aside and with
// the final ping; both are asked for again (RS 62, RS 93a, RD 9).
func TestReconnectInRecovery(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		b1, a1 := b.do("x"), a.do("y")
		a.told, b.told = a1.rep.Transno, b1.rep.Transno
		r.crash()
		var slow atomic.Bool // Execute is slow to return
		r.b.doneLate = func(_ string, done func()) {
			done()
			if slow.Load() {
				time.Sleep(time.Millisecond)
			}
		}
		a.join()
		first := r.send(a.c, replay(a1))
		r.waits(first)
		a.close()
		a.join()
		second := r.send(a.c, replay(a1))
		r.want(first, wire.ErrTargetDown)
		r.waits(second)
		b.join()
		slow.Store(true)
		r.want(r.send(b.c, replay(b1)), wire.OK)
		time.Sleep(time.Second)
		slow.Store(false)
		r.want(second, wire.OK)
		l1 := a.last()
		a.close()
		r.want(l1, wire.ErrTargetDown)
		a.join()
		r.want(r.send(a.c, replay(a1)), wire.OK)
		l2 := a.last()
		r.want(b.last(), wire.OK)
		r.want(l2, wire.OK)
		if n := r.b.ran(string(a1.req.Name[2:])); n != 1 || r.b.called("rebuild") != 0 {
			t.Errorf("replayed %d times, rebuilt %d times", n, r.b.called("rebuild"))
		}
	})
}

// TestMissingClient: who does not come is evicted at the end of the window, and
// the log says so (RS 0d, RD 0a).
func TestMissingClient(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		b1, a1 := b.do("x"), a.do("y")
		a.told = a1.rep.Transno
		r.crash()
		time.Sleep(time.Hour) // nobody comes
		if r.f.State() != recov.StateWaiting {
			t.Errorf("state %v", r.f.State())
		}
		a.join()
		r.waits(r.send(a.c, replay(a1)))
		la := a.last()
		time.Sleep(9 * time.Second)
		r.waits(la)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		r.want(la, wire.OK)
		if !r.log.has("client is evicted", "target=MDT0000", "client=62", "reason=\"not there at the end of the recovery window\"") {
			t.Error("the log does not tell of the eviction")
		}
		if r.b.called("del 62 gen 1 evicted true") != 1 {
			t.Errorf("calls %q", r.b.calls)
		}
		r.want(b.connect(), wire.ErrUnknownClient)
		b.instance = 0
		b.join()
		r.want(r.send(b.c, resend(b1)), wire.OK)
	})
}

// TestVersionsDiffer: a client whose replay builds on what is lost is marked in
// the log before anything later is executed, is told nothing of what is durable
// from there on, and is evicted (RV 2b, RV 10b).
func TestVersionsDiffer(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, c := r.client("a").join(), r.client("b").join(), r.client("c").join()
		r.want(b.do("x"), wire.OK)
		a1, a2, c1 := a.do("x"), a.do("y"), c.do("z")
		a.told, c.told = a2.rep.Transno, c1.rep.Transno
		r.crash()
		a.join()
		c.join()
		bad, good := r.send(a.c, replay(a1)), r.send(c.c, replay(c1))
		r.waits(bad)
		time.Sleep(11 * time.Second) // b is evicted
		synctest.Wait()
		if rep := r.want(bad, wire.ErrNotSync); rep.Transno != 0 {
			t.Errorf("transno %d of what failed", rep.Transno)
		}
		r.want(r.send(a.c, replay(a2)), wire.OK)
		r.want(good, wire.OK)
		r.b.commitAll()
		if rep := r.want(a.op(wire.OpPing), wire.OK); rep.LastCommitted >= a1.rep.Transno {
			t.Errorf("client is told that %d is durable, its %d failed", rep.LastCommitted, a1.rep.Transno)
		}
		if rep := r.want(c.op(wire.OpPing), wire.OK); rep.LastCommitted < c1.rep.Transno {
			t.Errorf("last committed %d", rep.LastCommitted)
		}
		at := -1
		for i, e := range r.d.log {
			if e.put != nil && e.put.FailedAt != 0 {
				at = i
			}
			if e.transno > a1.rep.Transno && at < 0 {
				t.Error("something later is executed before the verdict is in the log")
			}
		}
		if at < 0 {
			t.Error("no verdict in the log")
		}
		r.want(a.last(), wire.ErrUnknownClient)
		r.want(c.last(), wire.OK)
	})
}

// TestLocalClientWaits: during recovery requests of a client in the target's
// process wait, up to a limit, and those of an OST that starts; the window begins
// all the same (SM 140a, SM 140b).
func TestLocalClientWaits(t *testing.T) {
	inRig(t, func(r *rig) {
		a, l := r.client("a").join(), r.local("l").join()
		l1 := l.change("x")
		l1.Flags = wire.FlagWaitCommit
		done := r.send(l.c, l1)
		r.waits(done)
		r.b.commitAll()
		r.want(done, wire.OK)
		a1 := a.do("x")
		a.told = a1.rep.Transno
		r.crash()
		if r.b.called("del 6c gen 1 evicted true") != 1 {
			t.Errorf("the dead local client is still in the table: %q", r.b.calls)
		}
		ost := r.client("o")
		ost.dial()
		fetch := ost.op(wire.OpOSTFetch)
		r.waits(fetch)
		l.gen, l.instance = 2, 0 // it has died with the target
		l.dial()
		early := l.op(wire.OpGetattr)
		conn := r.send(l.c, l.connectReq())
		r.waits(conn)
		if r.f.State() != recov.StateRecovering {
			t.Errorf("state %v", r.f.State())
		}
		gone := *l
		gone.peer.Session += 100
		gone.c = r.accept(gone.peer)
		lost := gone.op(wire.OpGetattr)
		r.waits(lost)
		gone.close()
		r.want(lost, wire.ErrTargetDown)
		var more []*answer
		for range maxHeld - 3 {
			more = append(more, ost.op(wire.OpOSTFetch))
		}
		if n := r.f.Status().Held; n != maxHeld {
			t.Errorf("%d held", n)
		}
		r.want(ost.op(wire.OpOSTFetch), wire.ErrRecovering)
		r.want(l.op(wire.OpGetattr), wire.ErrRecovering)
		a.join()
		r.want(r.send(a.c, replay(a1)), wire.OK)
		r.waits(conn)
		r.want(a.last(), wire.OK)
		r.want(conn, wire.OK)
		if early.n.Load() != 1 { // before or after the connect, as it comes
			t.Error("a held request is not answered")
		}
		r.want(fetch, wire.OK)
		for _, m := range more {
			r.want(m, wire.OK)
		}
		r.want(l.do("y"), wire.OK)
		r.want(ost.op(wire.OpOSTFetch), wire.OK)
	})
}

// TestTargetComesToItsClient: the target restarts in the process of a client
// that was elsewhere before. The client takes part in recovery; then it is local,
// who builds on its work waits, and the next start does not wait for it (own 15).
func TestTargetComesToItsClient(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		a1 := a.do("x")
		a.slot = 1
		a2 := a.do("y")
		r.b.commit(len(r.d.log) - 1)
		a.told = a2.rep.Transno
		r.crash()
		a.peer.Local = true
		if rep := r.want(a.connect(), wire.OK); !rep.Known || !rep.Recovering {
			t.Errorf("connected: %+v", rep)
		}
		r.want(a.do("z"), wire.ErrRecovering)
		r.want(r.send(a.c, replay(a2)), wire.OK)
		la := a.last()
		r.waits(la)
		b.join()
		r.want(b.last(), wire.OK)
		r.want(la, wire.OK)
		if c := r.f.Status().Clients; !c[0].Local || c[1].Local {
			t.Errorf("clients %+v", c)
		}
		// The answer to a1 was lost; its slot is still known.
		if rep := r.want(r.send(a.c, resend(a1)), wire.OK); !rep.Reconstructed || rep.Transno != a1.rep.Transno {
			t.Errorf("reply to the copy: %+v", rep)
		}
		on := b.do("y")
		r.want(on, wire.OK) // the end of recovery was durable
		r.want(a.do("z"), wire.OK)
		on = b.do("z")
		r.waits(on)
		r.b.commitAll()
		r.want(on, wire.OK)
		r.crash()
		if len(r.f.Status().Clients) != 1 {
			t.Errorf("clients %+v", r.f.Status().Clients)
		}

		// Its next life asks in recovery: the old one is not waited for.
		b.join()
		a.gen, a.instance, a.told = 2, 0, 0
		own := a.connect()
		r.waits(own)
		r.want(b.last(), wire.OK)
		r.want(own, wire.OK)
	})
}

// TestLocalWorkIsShared: an answer that builds on a local client's operation
// waits for the disk, without commit on share; others do not.
func TestLocalWorkIsShared(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, l := r.client("a").join(), r.client("b").join(), r.local("l").join()
		r.want(l.do("x"), wire.OK)
		r.want(a.do("y"), wire.OK)
		r.want(b.do("y"), wire.OK)
		on := a.do("x")
		r.waits(on)
		after := b.do("x z")
		r.waits(after)
		if r.f.Status().Recovery.SharedCommits != 2 {
			t.Errorf("status %+v", r.f.Status().Recovery)
		}
		r.b.commitAll()
		synctest.Wait()
		if rep := r.want(on, wire.OK); rep.LastCommitted < rep.Transno {
			t.Errorf("answered before it is durable: %+v", rep)
		}
		r.want(after, wire.OK)
		r.want(a.do("x"), wire.OK)
	})
}

// TestAbort: the administrator ends recovery (RS 33a, RS 34).
func TestAbort(t *testing.T) {
	inRig(t, func(r *rig) {
		if r.f.Abort() {
			t.Error("aborted what is over")
		}
		a, b := r.client("a").join(), r.client("b").join()
		b1, a1 := b.do("x"), a.do("y")
		a.told, b.told = a1.rep.Transno, b1.rep.Transno
		r.crash()
		a.join()
		aside := r.send(a.c, replay(a1))
		r.waits(aside)
		if !r.f.Abort() {
			t.Error("not aborted")
		}
		synctest.Wait()
		r.want(aside, wire.ErrUnknownClient)
		if s := r.f.Status(); !s.Serving || !s.Recovery.Aborted || len(s.Clients) != 0 {
			t.Errorf("status %+v", s)
		}
		c := r.client("c").join()
		if rep := r.want(c.do("x"), wire.OK); rep.Transno <= a1.rep.Transno {
			t.Errorf("number %d is given again", rep.Transno)
		}
	})
}

// TestResendAfterCrash: the outcome of an operation that nothing else tells is
// found in its slot after a crash; an NFS call's in its reply record (SM 107,
// RS 102d).
func TestResendAfterCrash(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").join()
		key := wire.ReplyKey{Proc: 1, XID: 7}
		one := a.do("x")
		a.slot = 1
		q := a.change("y")
		q.Key = key
		two := r.send(a.c, q)
		a.slot = 2
		q = a.change("z")
		q.Op = wire.OpOpenEpoch
		three := r.send(a.c, q)
		var kept []uint16
		for _, e := range r.d.log {
			if e.slot != nil {
				kept = append(kept, e.slot.Slot)
			}
		}
		if !slices.Equal(kept, []uint16{0}) {
			t.Errorf("slots kept: %v", kept)
		}
		r.b.commitAll()
		r.crash()
		a.told = three.rep.Transno
		a.join()
		r.want(a.last(), wire.OK)
		for _, x := range []*answer{one, two} {
			if rep := r.want(r.send(a.c, resend(x)), wire.OK); !rep.Reconstructed || rep.Transno != x.rep.Transno {
				t.Errorf("%s: %+v", x.req.Name, rep)
			}
		}
	})
}

// TestHostile: whatever comes gets one answer, and the target goes on.
func TestHostile(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").join()
		with := func(fn func(q *wire.Request)) wire.Request {
			q := a.change("x")
			fn(&q)
			return q
		}
		for _, q := range []wire.Request{
			with(func(q *wire.Request) { q.Slot = uint16(r.cfg.MaxSlots) }),
			with(func(q *wire.Request) { q.Slot = 65535 }),
			with(func(q *wire.Request) { q.XID = 0 }),
			with(func(q *wire.Request) { q.Flags = wire.FlagReplay }),
			with(func(q *wire.Request) { q.Flags, q.Op = wire.FlagReplay, wire.OpGetattr }),
		} {
			r.want(r.send(a.c, q), wire.ErrProto)
		}
		far := a.connectReq()
		far.Transno = 1 << 60
		r.want(r.send(a.c, far), wire.ErrProto)
		odd := a.connectReq()
		odd.Time = -1 << 63
		r.want(r.send(a.c, odd), wire.OK)
		r.want(r.send(a.c, with(func(q *wire.Request) { q.Op = wire.Op(9999) })), wire.OK) // the body's to refuse
		r.want(r.send(a.c, with(func(q *wire.Request) { q.Op, q.Flags = wire.OpPing, wire.FlagLastReplay })), wire.OK)
		r.want(a.do("x"), wire.OK)

		b := r.client("b").join()
		a1 := a.do("y")
		a.told, b.told = a1.rep.Transno, a1.rep.Transno
		r.crash()
		a.join()
		b.join()
		q := replay(a1)
		q.Transno = 1 << 60
		r.want(r.send(a.c, q), wire.ErrProto)
		q.Transno = 0
		r.want(r.send(a.c, q), wire.ErrProto)
		q = replay(a1)
		q.Op = wire.OpGetattr
		r.want(r.send(a.c, q), wire.ErrProto)
		// Somebody else's number, and more than there are slots.
		q = replay(a1)
		q.Transno += 100
		aside := r.send(a.c, q)
		q.Client = b.id
		q.XID++
		r.want(r.send(b.c, q), wire.ErrProto)
		for i := range uint64(20) {
			q := replay(a1)
			q.XID += i + 1
			q.Transno += 101 + i
			x := r.send(a.c, q)
			if i < uint64(r.cfg.MaxSlots-1) {
				r.waits(x)
			} else {
				r.want(x, wire.ErrProto)
			}
		}
		r.waits(aside)
		a.last()
		b.last()
		r.want(aside, wire.OK)
		if !r.f.serving.Load() {
			t.Error("recovery does not end")
		}
	})
}
