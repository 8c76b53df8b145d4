package front

import (
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
	})
}

// A node that is alive speaks for the clients that are connected from it, for no others,
// and for none that are not connected: they have to come back in time.
func TestNodeSpeaksForItsClients(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		alive := func(node string) bool { return node == "node-b" }
		pass := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Second) {
				r.want(a.op(wire.OpGetattr), wire.OK)
				r.f.Alive(alive)
			}
		}
		pass(100 * time.Second)
		r.want(b.op(wire.OpGetattr), wire.OK)
		b.close()
		pass(20 * time.Second)
		if v := r.f.Vitals(); !slices.Contains(v.Nodes, "node-b") {
			t.Error("a client that is not connected is forgotten at once")
		}
		r.want(b.connect(), wire.OK)
		pass(100 * time.Second)
		r.want(b.op(wire.OpGetattr), wire.OK)
		b.close()
		pass(40 * time.Second)
		if v := r.f.Vitals(); !slices.Equal(v.Nodes, []string{"node-a"}) {
			t.Errorf("nodes %q have clients", v.Nodes)
		}
		r.want(b.connect(), wire.ErrUnknownClient)
		r.want(a.op(wire.OpGetattr), wire.OK)
	})
}

// The vitals tell a target that works from one that stands still and from one that has
// nothing to do; what waits for other clients in recovery is no work of its.
func TestVitals(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		v := r.f.Vitals()
		if v.Instance != 1 || !v.Serving || v.Work != 0 || len(v.Nodes) != 2 {
			t.Errorf("at rest: %+v", v)
		}
		old := v.Progress
		q := a.change("x")
		q.Flags |= wire.FlagWaitCommit
		w := r.send(a.c, q)
		r.waits(w)
		get, rep := b.hdr(wire.OpGetattr), wire.Reply{}
		if !b.c.TryHandle(&get, &rep) {
			t.Error("nothing is answered at once")
		}
		if v = r.f.Vitals(); v.Work != 1 || v.Progress != old {
			t.Errorf("while the disk does nothing: %+v, progress was %d", v, old)
		}
		r.b.commitAll()
		r.want(w, wire.OK)
		if v = r.f.Vitals(); v.Work != 0 || v.Progress == old {
			t.Errorf("done: %+v, progress was %d", v, old)
		}
		old = v.Progress
		a.close()
		if v = r.f.Vitals(); v.Progress != old {
			t.Errorf("progress %d went to %d with a connection", old, v.Progress)
		}
		r.crash()
		if v = r.f.Vitals(); v.Instance != 2 || v.Serving || v.Work != 0 || len(v.Nodes) != 0 {
			t.Errorf("started again: %+v", v)
		}
		r.want(b.connect(), wire.OK)
		last := b.last()
		r.waits(last)
		if v = r.f.Vitals(); v.Work != 0 || !slices.Equal(v.Nodes, []string{"node-b"}) {
			t.Errorf("waiting for a client: %+v", v)
		}
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

// TestAnswersToCopiesInOrder: the same when the earlier operation's answer goes to
// a copy that came by a newer connection.
func TestAnswersToCopiesInOrder(t *testing.T) {
	inRig(t, func(r *rig) {
		a, b := r.client("a").join(), r.client("b").join()
		var run func()
		r.b.later = func(_ string, f func()) { run = f }
		first := a.do("x")
		r.b.later = nil
		a.join()
		again := r.send(a.c, resend(first))
		block := make(chan struct{})
		r.b.onCommit = func() { <-block }
		b.close() // keeps the front's goroutine busy
		run()
		r.want(first, wire.OK)
		a.slot = 1
		second := a.do("x")
		if second.req.Name[0] != 'x' || r.b.ran(string(second.req.Name[2:])) != 1 {
			t.Error("the second operation is not executed")
		}
		r.waits(again)
		r.waits(second)
		close(block)
		synctest.Wait()
		r.want(again, wire.OK)
		r.want(second, wire.OK)
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
