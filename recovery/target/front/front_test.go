package front

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func (b *fakeBody) called(what string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, c := range b.calls {
		if strings.HasPrefix(c, what) {
			n++
		}
	}
	return n
}

func (b *fakeBody) ran(who string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, e := range b.executed {
		if e == who {
			n++
		}
	}
	return n
}

// TestServesAtOnce: a target without clients serves when New returns (RS 0a).
func TestServesAtOnce(t *testing.T) {
	inRig(t, func(r *rig) {
		if got := r.b.calls; !slices.Equal(got, []string{"target instance 1 clean false", "begin"}) {
			t.Errorf("New calls %q", got)
		}
		a := r.client("a")
		rep := r.want(a.connect(), wire.OK)
		if rep.Instance != 1 || rep.Known || rep.Recovering || rep.Tenure == 0 || rep.Tenure != r.b.Tenure(a.id) {
			t.Errorf("connected: %+v", rep)
		}
		r.want(a.op(wire.OpGetattr), wire.OK)
		r.want(a.op(wire.OpPing), wire.OK)
		rep = r.want(a.do("x"), wire.OK)
		if rep.Transno == 0 || rep.LastCommitted >= rep.Transno {
			t.Errorf("modified: transno %d, committed %d", rep.Transno, rep.LastCommitted)
		}
		r.b.commitAll()
		if rep := r.want(a.op(wire.OpPing), wire.OK); rep.LastCommitted != r.b.last {
			t.Errorf("last committed %d, want %d", rep.LastCommitted, r.b.last)
		}
		again := a.connect()
		if rep := r.want(again, wire.OK); !rep.Known || rep.LastCommitted != r.b.last || rep.Transno != r.b.last {
			t.Errorf("connected again: %+v", rep)
		}
		if s := r.f.Status(); s.Recovery.State != recov.StateFull || !s.Serving || len(s.Clients) != 1 ||
			s.Clients[0].Node != "node-a" || s.Clients[0].Session != 2 || !s.Clients[0].Connected || s.Clients[0].Tenure == 0 {
			t.Errorf("status %+v", s)
		}
		if !r.log.has("client is connected", "target=MDT0000", "node=node-a", "known=true") {
			t.Error("the log does not tell of the connect")
		}
	})
}

// TestInTheCallersGoroutine: in the usual cases the answer is there when Handle
// returns.
func TestInTheCallersGoroutine(t *testing.T) {
	inRig(t, func(r *rig) {
		a, l := r.client("a").join(), r.local("l").join()
		for _, req := range []wire.Request{a.change("x"), a.hdr(wire.OpPing), a.hdr(wire.OpLookup), l.change("y"), l.hdr(wire.OpLookup)} {
			k := a
			if req.Client == l.id {
				k = l
			}
			n := 0
			var rep wire.Reply
			k.c.Handle(&req, &rep, func() { n++ })
			if n != 1 || rep.Status != wire.OK {
				t.Errorf("%v: %d answers, %v", req.Op, n, rep.Status)
			}
		}
		get := a.hdr(wire.OpGetattr)
		var rep wire.Reply
		if !a.c.TryHandle(&get, &rep) || rep.Status != wire.OK {
			t.Error("TryHandle does not answer")
		}
		mk := a.change("x")
		if a.c.TryHandle(&mk, &rep) {
			t.Error("TryHandle modifies")
		}
		b := a.c.(interface{ MayBlock(wire.Op) bool })
		if b.MayBlock(wire.OpPing) || !b.MayBlock(wire.OpStatfs) {
			t.Error("MayBlock is not the body's")
		}
	})
}

// TestUnconnected: who has not connected, or not by this connection, gets nothing.
func TestUnconnected(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").dial()
		r.want(a.op(wire.OpGetattr), wire.ErrUnknownClient)
		r.want(a.do("x"), wire.ErrUnknownClient)
		r.want(a.op(wire.OpDisconnect), wire.OK)
		a.join()
		a.dial()
		r.want(a.do("x"), wire.ErrTargetDown)
		r.want(a.op(wire.OpGetattr), wire.ErrTargetDown)
		r.want(a.op(wire.OpDisconnect), wire.ErrTargetDown)
		var rep wire.Reply
		get := a.hdr(wire.OpGetattr)
		if a.c.TryHandle(&get, &rep) {
			t.Error("TryHandle answers an unconnected client")
		}

		// A bulk connection of the right session is as good as the first.
		a.join()
		bulk := *a
		bulk.c = r.accept(a.peer)
		r.want(bulk.do("x"), wire.OK)
		r.want(bulk.op(wire.OpGetattr), wire.OK)

		// Another node's connection with the same number is not.
		bulk.peer.Node = "elsewhere"
		bulk.c = r.accept(bulk.peer)
		r.want(bulk.do("x"), wire.ErrTargetDown)
		r.want(bulk.op(wire.OpGetattr), wire.ErrTargetDown)

		// Nor may a session serve two clients, or one without a name.
		b := r.client("b")
		b.c = a.c
		r.want(r.send(b.c, b.connectReq()), wire.ErrProto)
		r.want(b.do("x"), wire.ErrUnknownClient)
		b.id = wire.ClientID{}
		b.dial()
		r.want(r.send(b.c, b.connectReq()), wire.ErrProto)
		b = r.client("b")
		b.c = r.accept(wire.Peer{Node: "b"})
		r.want(r.send(b.c, b.connectReq()), wire.ErrProto)
		b.c = r.accept(wire.Peer{Node: "b", Session: noSession})
		r.want(r.send(b.c, b.connectReq()), wire.ErrProto)

		// Generations.
		a.gen = 2
		r.want(a.do("x"), wire.ErrUnknownClient)
		r.want(a.op(wire.OpGetattr), wire.ErrUnknownClient)
		r.want(a.connect(), wire.ErrUnknownClient)
		a.instance = 0
		a.join()
		r.want(a.do("x"), wire.OK)
		a.gen = 1
		r.want(a.do("x"), wire.ErrStaleClient)
		r.want(a.op(wire.OpGetattr), wire.ErrStaleClient)
		r.want(a.connect(), wire.ErrStaleClient)
	})
}

// TestSessions: a session lives as long as one of its connections; a newer one
// replaces it, and what is late changes nothing (SM 153, RS 44b).
func TestSessions(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").join()
		control := a.c
		bulk := r.accept(a.peer)
		connected := func() bool { return r.f.Status().Recovery.Connected == 1 }
		control.(io.Closer).Close()
		synctest.Wait()
		if !connected() || r.b.called("commit") != 0 {
			t.Error("one of two connections is closed, and the client counts as gone")
		}
		r.want(r.send(bulk, a.change("x")), wire.OK)
		bulk.(io.Closer).Close()
		bulk.(io.Closer).Close()
		synctest.Wait()
		if connected() || r.b.called("commit") != 1 {
			t.Errorf("connected %t, %d commits", connected(), r.b.called("commit"))
		}

		a.join()
		old := *a
		a.join()
		r.want(a.do("x"), wire.OK)
		r.want(old.do("x"), wire.ErrTargetDown)
		r.want(old.op(wire.OpGetattr), wire.ErrTargetDown)
		r.want(old.op(wire.OpDisconnect), wire.ErrTargetDown)
		r.want(r.send(old.c, old.connectReq()), wire.ErrTargetDown)
		old.close()
		if !connected() {
			t.Error("the end of an old session disconnects the new one")
		}
		r.want(a.op(wire.OpGetattr), wire.OK)
		r.want(r.send(a.c, a.connectReq()), wire.OK) // twice by one session
		r.want(a.do("x"), wire.OK)

		r.want(a.op(wire.OpDisconnect), wire.OK)
		r.want(a.op(wire.OpGetattr), wire.ErrUnknownClient)
		r.want(a.do("x"), wire.ErrUnknownClient)
		if len(r.f.Status().Clients) != 0 || r.b.called("del 61 gen 1 evicted false") != 1 {
			t.Errorf("calls %q", r.b.calls)
		}
	})
}

// TestConnectIsLost: the connection breaks while the entry is being written; the
// next attempt works (SM 28, SM 29a).
func TestConnectIsLost(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a")
		var block chan struct{}
		r.b.onCall = func(what string) {
			if strings.HasPrefix(what, "put") && block != nil {
				<-block
			}
		}
		block = make(chan struct{})
		first := a.connect()
		r.waits(first)
		a.close()
		a.dial()
		again := r.send(a.c, a.connectReq())
		r.waits(again)
		close(block)
		synctest.Wait()
		r.want(first, wire.ErrTargetDown)
		r.want(again, wire.OK)
		r.want(a.do("x"), wire.OK)

		b := r.client("b")
		block = nil
		r.b.putFails = errors.New("no space")
		r.want(b.connect(), wire.ErrIO)
		b.join()
		if !r.log.has("cannot be registered", "no space") {
			t.Error("the log does not say why")
		}
	})
}

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
		if r.b.called("del 6c gen 1 evicted false") != 1 {
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

// TestSilence: a client that only reads, which the machine does not see, is
// heard; one that says nothing is evicted; nobody is when nobody is heard (SM 26a).
func TestSilence(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, l := r.client("a").join(), r.client("b").join(), r.local("l").join()
		r.want(l.do("x"), wire.OK)
		for range 50 {
			time.Sleep(time.Second)
			r.want(a.op(wire.OpGetattr), wire.OK)
		}
		r.want(b.op(wire.OpGetattr), wire.ErrUnknownClient)
		if !r.log.has("client is evicted", "client=62", "reason=\"not heard for 3") {
			t.Error("the log does not tell of the eviction")
		}
		time.Sleep(time.Hour)
		r.want(a.op(wire.OpGetattr), wire.OK)
		r.want(l.op(wire.OpGetattr), wire.OK)
		b.instance = 0
		b.join()
		for range 50 { // by other ways
			time.Sleep(time.Second)
			r.want(a.op(wire.OpGetattr), wire.OK)
			r.f.Heard(b.id, time.Now())
		}
		r.want(b.op(wire.OpGetattr), wire.OK)
	})
}

// TestQuietTarget: a target nobody talks to has no timer that fires again and again.
func TestQuietTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, d: &disk{}, cfg: cfg}
		r.b = newBody(t, r.d)
		o := r.options()
		var fired atomic.Int32
		o.Clock = SystemClock()
		o.Clock.AfterFunc = func(d time.Duration, f func()) func() bool {
			return time.AfterFunc(d, func() { fired.Add(1); f() }).Stop
		}
		var err error
		if r.f, err = New(o); err != nil {
			t.Fatal(err)
		}
		a, b := r.client("a").join(), r.client("b").join()
		time.Sleep(100 * time.Second)
		if n := fired.Load(); n > 25 {
			t.Errorf("with connected clients the timer fires %d times in 100 s", n)
		}
		a.close()
		b.close()
		time.Sleep(10 * time.Second)
		fired.Store(0)
		time.Sleep(time.Hour)
		if n := fired.Load(); n > 1 {
			t.Errorf("without connections the timer fires %d times in an hour", n)
		}
		r.end()
	})
}

// TestEvict: the administrator evicts a client, with a request of its under way
// (CS 91, SM 10a, SM 146).
func TestEvict(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		var run func()
		r.b.later = func(_ string, f func()) { run = f }
		going := a.do("x")
		copied := r.send(a.c, resend(going))
		r.b.later = nil
		if !r.f.Evict(a.id) || r.f.Evict(a.id) {
			t.Error("Evict does not tell whether the client was there")
		}
		synctest.Wait()
		if r.b.called("del 61 gen 1 evicted true") != 1 {
			t.Errorf("calls %q", r.b.calls)
		}
		r.want(a.op(wire.OpGetattr), wire.ErrUnknownClient)
		r.want(a.do("x"), wire.ErrUnknownClient)
		r.waits(going)
		run()
		synctest.Wait()
		r.want(going, wire.ErrUnknownClient)
		if rep := r.want(copied, wire.ErrUnknownClient); rep.Reconstructed {
			t.Error("an evicted client's answer is reconstructed")
		}
		r.want(b.do("x"), wire.OK)
		if s := r.f.Status(); s.Recovery.Evicted != 1 || len(s.Clients) != 1 {
			t.Errorf("status %+v", s)
		}

		// The body executes what it has got before it hears of the eviction.
		block := make(chan struct{})
		r.b.onCall = func(what string) {
			if strings.HasPrefix(what, "del") {
				<-block
			}
		}
		r.b.later = func(_ string, f func()) { run = f }
		going = b.do("y")
		r.f.Evict(b.id)
		run()
		synctest.Wait()
		if rep := r.want(going, wire.ErrUnknownClient); rep.Transno != 0 || rep.LastCommitted != 0 {
			t.Errorf("an evicted client is told of %d, %d durable", rep.Transno, rep.LastCommitted)
		}
		close(block)
		synctest.Wait()
	})
}

// TestAnswersInOrder: a client gets no answer to what may build on an own
// operation that is not answered yet, unless it waits for the disk.
func TestAnswersInOrder(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		var dones []func()
		r.b.doneLate = func(_ string, done func()) { dones = append(dones, done) }
		var open []*answer
		for a.slot = 0; a.slot < 4; a.slot++ {
			open = append(open, a.do("x"))
		}
		other := b.do("y")
		dones[4]()
		r.want(other, wire.OK)
		q := a.change("z")
		q.Flags = wire.FlagWaitCommit
		durable := r.send(a.c, q)
		r.b.commitAll()
		r.want(durable, wire.OK)
		dones[2]()
		dones[3]()
		dones[1]()
		for _, o := range open {
			r.waits(o)
		}
		dones[0]()
		for _, o := range open {
			r.want(o, wire.OK)
		}
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

// TestResend: a request that comes again while its original is running, after it,
// and after a newer one (RS 203, RS 55, SM 137).
func TestResend(t *testing.T) {
	inRig(t, func(r *rig) {
		a := r.client("a").join()
		var run func()
		r.b.later = func(_ string, f func()) { run = f }
		first := a.do("x")
		old := *a
		a.join()
		second := r.send(a.c, resend(first))
		third := r.send(a.c, resend(first))
		r.want(second, wire.ErrTargetDown) // a newer copy has come
		r.b.later = nil
		run()
		synctest.Wait()
		r.want(first, wire.OK)
		if rep := r.want(third, wire.OK); !rep.Reconstructed || rep.Transno != first.rep.Transno || rep.PreVersions != first.rep.PreVersions {
			t.Errorf("reply to the copy: %+v", rep)
		}
		if rep := r.want(r.send(a.c, resend(first)), wire.OK); !rep.Reconstructed || rep.Transno != first.rep.Transno {
			t.Errorf("reply to a later copy: %+v", rep)
		}
		wait := resend(first)
		wait.Flags |= wire.FlagWaitCommit
		durable := r.send(a.c, wait)
		r.waits(durable)
		r.b.commitAll()
		if rep := r.want(durable, wire.OK); rep.LastCommitted < rep.Transno {
			t.Errorf("answered before it is durable: %+v", rep)
		}
		r.want(r.send(old.c, resend(first)), wire.ErrTargetDown)
		r.want(a.do("x"), wire.OK)
		r.want(r.send(a.c, resend(first)), wire.ErrTargetDown) // its slot has a newer one
		if n := r.b.ran(string(first.req.Name[2:])); n != 1 {
			t.Errorf("executed %d times", n)
		}
		// Refused and unfinished ones.
		no := a.do("refused")
		r.want(no, wire.ErrExist)
		if rep := r.want(r.send(a.c, resend(no)), wire.ErrExist); !rep.Reconstructed {
			t.Error("a failure is found out again")
		}
		busy := a.do("busy")
		r.want(busy, wire.ErrJukebox)
		r.want(r.send(a.c, resend(busy)), wire.ErrJukebox)
		if n := r.b.ran(string(busy.req.Name[5:])); n != 2 {
			t.Errorf("in progress: tried %d times", n)
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

// TestVIPEpochs: a request with an epoch that the body does not know raises it
// first, once for all that name it, without holding up others (own 3).
func TestVIPEpochs(t *testing.T) {
	inRig(t, func(r *rig) {
		a, l := r.client("a").join(), r.local("l").join()
		vip := func(q wire.Request, epoch uint64, slot uint16) wire.Request {
			q.VIP, q.VIPEpoch, q.Slot = 3, epoch, slot
			return q
		}
		var raised func(error)
		r.b.onRaise = func(done func(error)) bool { raised = done; return true }
		var wait []*answer
		wait = append(wait, r.send(a.c, vip(a.change("x"), 5, 1)), r.send(a.c, vip(a.change("y"), 5, 2)),
			r.send(a.c, vip(a.hdr(wire.OpGetattr), 5, 0)), r.send(l.c, vip(l.change("z"), 5, 0)))
		for _, w := range wait {
			r.waits(w)
		}
		r.want(a.do("v"), wire.OK)
		if r.b.called("raise") != 1 {
			t.Errorf("%d raised", r.b.called("raise"))
		}
		var rep wire.Reply
		get := vip(a.hdr(wire.OpGetattr), 5, 0)
		if a.c.TryHandle(&get, &rep) {
			t.Error("TryHandle answers with an epoch that the body does not know")
		}
		raised(nil)
		synctest.Wait()
		for _, w := range wait {
			r.want(w, wire.OK)
		}
		r.want(r.send(a.c, vip(a.hdr(wire.OpGetattr), 5, 0)), wire.OK)
		r.want(r.send(a.c, vip(a.hdr(wire.OpGetattr), 4, 0)), wire.ErrStaleVIP)
		r.want(r.send(a.c, vip(a.change("x"), 4, 1)), wire.ErrStaleVIP)
		r.want(r.send(l.c, vip(l.change("x"), 4, 1)), wire.ErrStaleVIP)

		// It cannot be raised: nothing is executed, and it may be asked again.
		no := r.send(a.c, vip(a.change("x"), 6, 1))
		read := r.send(a.c, vip(a.hdr(wire.OpGetattr), 6, 0))
		raised(errors.New("no space"))
		synctest.Wait()
		r.want(no, wire.ErrTargetDown)
		r.want(read, wire.ErrTargetDown)
		r.b.onRaise = nil
		r.want(r.send(a.c, resend(no)), wire.OK)
	})
}

// TestNothingOvertakesTheTable: an operation that comes after an eviction is
// executed after that is in the log; reads and answers go on meanwhile.
func TestNothingOvertakesTheTable(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		b1 := b.do("w")
		b.slot = 1
		block := make(chan struct{})
		r.b.onCall = func(what string) {
			if strings.HasPrefix(what, "del") {
				<-block
			}
		}
		r.f.Evict(a.id)
		synctest.Wait()
		op := b.do("x")
		r.waits(op)
		r.want(b.op(wire.OpGetattr), wire.OK)
		r.want(r.send(b.c, resend(b1)), wire.OK)
		r.want(a.do("x"), wire.ErrUnknownClient)
		close(block)
		synctest.Wait()
		r.want(op, wire.OK)
		var order []string
		for _, e := range r.d.log {
			if e.del != nil {
				order = append(order, "del")
			} else if e.writes["x"] != 0 {
				order = append(order, "x")
			}
		}
		if !slices.Equal(order, []string{"del", "x"}) {
			t.Errorf("log %v", order)
		}
	})
}

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
// executed (SM 24a's other side: no answer that may not be true).
func TestFail(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b, c, l := r.client("a").join(), r.client("b").join(), r.client("c").join(), r.local("l").join()
		r.want(b.do("x"), wire.OK)
		q := a.change("y")
		q.Flags = wire.FlagWaitCommit
		gated := r.send(a.c, q)
		r.waits(gated)
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
		r.f.Fail(errDead)
		synctest.Wait()
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

// TestHostile: whatever comes gets one answer, and the target goes on (RO 8e).
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

// TestWhatIsKept: which outcomes are written with the operation, and which
// answers always wait for the disk.
func TestWhatIsKept(t *testing.T) {
	var kept, waits []string
	for op := wire.Op(1); op < 200; op++ {
		q := wire.Request{Header: wire.Header{Op: op}}
		if !op.Modifies() {
			if classOf(op) == recov.ClassModify || waitsAlways(op) {
				t.Errorf("op %d", op)
			}
			continue
		}
		if classOf(op) != recov.ClassModify {
			t.Errorf("op %d is of class %d", op, classOf(op))
		}
		if waitsAlways(op) {
			waits = append(waits, fmt.Sprint(op))
		}
		if keepsSlot(&q) {
			kept = append(kept, fmt.Sprint(op))
		}
		q.Key.Proc = 1
		if keepsSlot(&q) {
			t.Errorf("op %d: slot and reply record", op)
		}
	}
	num := func(ops ...wire.Op) (s []string) {
		for _, o := range ops {
			s = append(s, fmt.Sprint(o))
		}
		return s
	}
	if want := num(wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod, wire.OpRemove, wire.OpRmdir, wire.OpRename, wire.OpLink,
		wire.OpSetattr, wire.OpSetLayout, wire.OpLock, wire.OpUnlock, wire.OpLockCancel, wire.OpShare, wire.OpUnshare, wire.OpLockFree,
		wire.OpLockRelease, wire.OpLockUnmonitor); !slices.Equal(kept, want) {
		t.Errorf("kept: %v, want %v", kept, want)
	}
	if want := num(wire.OpSetVIPEpoch, wire.OpFence, wire.OpLock, wire.OpUnlock, wire.OpLockCancel, wire.OpLockGrantDone, wire.OpShare,
		wire.OpUnshare, wire.OpLockFree, wire.OpLockRelease, wire.OpLockMonitor, wire.OpLockUnmonitor, wire.OpLockNotified,
		wire.OpLockService); !slices.Equal(waits, want) {
		t.Errorf("wait: %v, want %v", waits, want)
	}
	if classOf(wire.OpPing) != recov.ClassPing || classOf(wire.OpStatfs) != recov.ClassRead {
		t.Error("classes of ping and statfs")
	}
}
