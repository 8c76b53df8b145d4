package lockd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// contend makes holder lock file1 and waiter wait for it.
func contend(t *testing.T, holder, waiter *peer) {
	t.Helper()
	want(t, "holder", holder.lock("file1", 1, 0, 10, false), nlm.Granted)
	want(t, "waiter", waiter.lock("file1", 2, 3, 4, true), nlm.Blocked)
}

func (b *bed) outcomes(n int) []fakeOutcome {
	b.t.Helper()
	until(b.t, fmt.Sprintf("%d outcomes", n), func() bool { return len(b.tab.results()) >= n })
	return b.tab.results()
}

func (b *bed) wantOutcome(out wire.GrantOutcome) {
	b.t.Helper()
	if o := b.outcomes(1); len(o) != 1 || o[0].Out != out {
		b.t.Fatalf("outcomes %+v, want %d", o, out)
	}
}

func TestGranted(t *testing.T) {
	everywhere(t, func(t *testing.T, vers uint32, nw string) {
		b := newBed(t, nil)
		h, w := b.peer(2, 4, "tcp"), b.peer(3, vers, nw)
		contend(t, h, w)
		want(t, "unlock", h.unlock("file1", 1, 0, 10), nlm.Granted)
		b.wantOutcome(wire.GrantAccepted)
		b.settled(fileFID(1), 2, wire.LockGranted)
		calls := w.got()
		if len(calls) != 1 {
			t.Fatalf("%d calls", len(calls))
		}
		c := calls[0]
		if c.proc != nlm.ProcGranted || c.vers != vers || c.nw != nw || c.from.Addr() != b.a.addr {
			t.Errorf("call %+v", c)
		}
		var a nlm.TestArgs
		if err := a.Decode(xdr.NewReader(c.args), vers); err != nil {
			t.Fatal(err)
		}
		if !a.Exclusive || string(a.Lock.CallerName) != "host-127.0.0.3" || string(a.Lock.FH) != "file1" || string(a.Lock.OH) != "oh" || a.Lock.Svid != 2 || a.Lock.Offset != 3 || a.Lock.Len != 4 {
			t.Errorf("arguments %+v", a)
		}
		s := b.a.Stats()
		if s.CallbacksSent != 1 || s.CallbacksAccepted != 1 || s.CallbacksPending != 0 || s.Blocked != 1 || s.HandOver <= 0 {
			t.Errorf("stats %+v", s)
		}
	})
}

// TestGrantedAsAsked: the client finds its request by the offset and length that
// it wrote, of which several mean the same range.
func TestGrantedAsAsked(t *testing.T) {
	b := newBed(t, nil)
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	want(t, "holder", h.lock("file1", 1, 0, 0, false), nlm.Granted)
	const off, n = 1 << 62, 1 << 63
	want(t, "waiter", w.lock("file1", 2, off, n, true), nlm.Blocked)
	h.unlock("file1", 1, 0, 0)
	b.wantOutcome(wire.GrantAccepted)
	var a nlm.TestArgs
	if err := a.Decode(xdr.NewReader(w.got()[0].args), 4); err != nil || a.Lock.Offset != off || a.Lock.Len != n {
		t.Errorf("%+v %v", a.Lock, err)
	}
}

func TestCallbackOutcomes(t *testing.T) {
	unavail := func(c *sunrpc.Call, _ int) { c.Fail(sunrpc.ProcUnavail) }
	broken := func(c *sunrpc.Call, _ int) { c.Fail(sunrpc.SystemErr) }
	for _, c := range []struct {
		name   string
		nw     string
		change func(w *peer)
		out    wire.GrantOutcome
		calls  int
	}{
		{"denied", "tcp", func(w *peer) { w.setAnswer(reply(nlm.Denied)) }, wire.GrantRefused, 1},
		{"denied by datagram", "udp", func(w *peer) { w.setAnswer(reply(nlm.Denied)) }, wire.GrantRefused, 1},
		// The answer to the first copy is lost, and the client denies the second:
		// it may have the lock.
		{"denied the second time", "tcp", func(w *peer) { w.setAnswer(first(1, broken, reply(nlm.Denied))) }, wire.GrantAccepted, 2},
		{"first datagram lost", "udp", func(w *peer) { w.setAnswer(first(1, ignore, reply(nlm.Denied))) }, wire.GrantAccepted, 2},
		{"granted the third time", "tcp", func(w *peer) { w.setAnswer(first(2, broken, reply(nlm.Granted))) }, wire.GrantAccepted, 3},
		{"absent", "tcp", func(w *peer) { w.b.peers.mu.Lock(); delete(w.b.peers.m, w.addr); w.b.peers.mu.Unlock() }, wire.GrantUndelivered, 0},
		// Three tries by both transports, then it is there again.
		{"starting", "tcp", func(w *peer) { w.setAnswer(first(6, unavail, reply(nlm.Denied))) }, wire.GrantRefused, 7},
		{"in its grace period", "tcp", func(w *peer) { w.setAnswer(first(2, reply(nlm.DeniedGracePeriod), reply(nlm.Granted))) }, wire.GrantAccepted, 3},
		{"not registered", "udp", func(w *peer) { w.register("nothing") }, wire.GrantUndelivered, 0},
		{"other transport", "tcp", func(w *peer) { w.register(rpcbind.UDP) }, wire.GrantAccepted, 1},
		{"garbage in the reply", "tcp", func(w *peer) {
			w.setAnswer(first(1, func(c *sunrpc.Call, _ int) { c.Out.Uint32(0xffffffff); c.Finish() }, reply(nlm.Denied)))
		}, wire.GrantAccepted, 2},
		{"another status", "tcp", func(w *peer) { w.setAnswer(reply(nlm.Failed)) }, wire.GrantRefused, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, nil)
			h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, c.nw)
			contend(t, h, w)
			c.change(w)
			h.unlock("file1", 1, 0, 10)
			b.wantOutcome(c.out)
			// A datagram is sent again when its answer is late.
			if n := len(w.got()); n < c.calls || n > c.calls && c.nw != "udp" {
				t.Errorf("%d calls, want %d", n, c.calls)
			}
			_, held := b.tab.states(fileFID(1))[2]
			if held != (c.out == wire.GrantAccepted) {
				t.Errorf("the lock is held: %v", held)
			}
			if c.out == wire.GrantUndelivered {
				if n := b.peers.questions(w.addr); n != 8 {
					t.Errorf("%d questions for its port, want 4 tries by two transports", n)
				}
			}
			if s := b.a.Stats(); s.CallbacksPending != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// TestSilentClient: a copy may have arrived, so the lock stays, however long the
// client is silent, and the tries become rarer.
func TestSilentClient(t *testing.T) {
	clk := newFakeClock()
	b := newBed(t, func(c *Config) {
		c.Now, c.AfterFunc = clk.Now, clk.AfterFunc
		c.RetryFirst, c.RetryMax, c.CallTimeout = time.Second, 30*time.Second, 20*time.Millisecond
	})
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	w.setAnswer(ignore)
	h.unlock("file1", 1, 0, 10)
	for i, wait := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		until(t, "the next try is set", func() bool { n, _ := clk.waiting(); return n == 1 })
		if n, d := clk.waiting(); n != 1 || d != wait*time.Second {
			t.Fatalf("try %d: %d timers, the next in %v", i+1, n, d)
		}
		if b.a.Stats().CallbacksPending != 1 || b.tab.states(fileFID(1))[2] != wire.LockGrantPending || len(b.tab.results()) != 0 {
			t.Fatalf("try %d: the lock is given up", i+1)
		}
		clk.advance(wait * time.Second)
	}
	// Both transports were tried.
	nws := map[string]int{}
	for _, c := range w.got() {
		nws[c.nw]++
	}
	if nws["udp"] == 0 || nws["tcp"] == 0 {
		t.Errorf("tries %v", nws)
	}
	// An answer in a call of its own ends it, from that client only.
	id := uint64(0)
	b.tab.mu.Lock()
	for _, e := range b.tab.entries {
		if e.state == wire.LockGrantPending {
			id = e.id
		}
	}
	b.tab.mu.Unlock()
	ck := putCookie(7, id)
	h.call(nlm.ProcGrantedRes, &nlm.Res{Cookie: ck[:], Stat: nlm.Granted}, nil)
	foreign := putCookie(8, id)
	w.call(nlm.ProcGrantedRes, &nlm.Res{Cookie: foreign[:], Stat: nlm.Granted}, nil)
	if b.a.Stats().CallbacksPending != 1 {
		t.Fatal("somebody else's answer was taken")
	}
	w.call(nlm.ProcGrantedRes, &nlm.Res{Cookie: ck[:], Stat: nlm.Granted}, nil)
	b.wantOutcome(wire.GrantAccepted)
	// Twice, and late, does nothing.
	w.call(nlm.ProcGrantedRes, &nlm.Res{Cookie: ck[:], Stat: nlm.Denied}, nil)
	w.call(nlm.ProcGrantedRes, &nlm.Res{Cookie: []byte("what"), Stat: nlm.Denied}, nil)
	b.settled(fileFID(1), 2, wire.LockGranted)
	if o := b.tab.results(); len(o) != 1 {
		t.Errorf("outcomes %+v", o)
	}
}

// TestClientPolls: a client that asks again for the lock that it could not be
// told of is answered, and not called any more.
func TestClientPolls(t *testing.T) {
	clk := newFakeClock()
	b := newBed(t, func(c *Config) {
		c.Now, c.AfterFunc, c.CallTimeout = clk.Now, clk.AfterFunc, 20*time.Millisecond
	})
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	w.setAnswer(ignore)
	h.unlock("file1", 1, 0, 10)
	until(t, "the first try fails", func() bool { n, _ := clk.waiting(); return n == 1 })
	want(t, "poll", w.lock("file1", 2, 3, 4, true), nlm.Granted)
	if s := b.a.Stats(); s.CallbacksPending != 0 {
		t.Errorf("stats %+v", s)
	}
	n := len(w.got())
	clk.advance(time.Minute)
	b.stop() // waits for what the timer started
	if m := len(w.got()); m != n {
		t.Errorf("called %d times more", m-n)
	}
	b.settled(fileFID(1), 2, wire.LockGranted)
}

// TestRestart: whoever serves the address next tells the client again, and does
// not believe a denial then, because the earlier one may have been accepted.
func TestRestart(t *testing.T) {
	b := newBed(t, func(c *Config) { c.CallTimeout = 50 * time.Millisecond })
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	// Some locks before it, so that the list has several pages.
	for i := range 5 {
		want(t, "filler", h.lock("file2", uint32(10+i), uint64(i), 1, false), nlm.Granted)
	}
	contend(t, h, w)
	// The client takes the lock, and its answer is lost with the server.
	stuck := make(chan struct{})
	b.tab.mu.Lock()
	b.tab.hold[wire.OpLockGrantDone] = stuck
	b.tab.mu.Unlock()
	h.unlock("file1", 1, 0, 10)
	until(t, "the answer is on its way", func() bool { b.tab.mu.Lock(); defer b.tab.mu.Unlock(); return b.tab.holds[wire.OpLockGrantDone] == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	if err := b.a.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop with a report under way: %v", err)
	}
	cancel()
	w.setAnswer(reply(nlm.Denied))
	b.tab.mu.Lock()
	delete(b.tab.hold, wire.OpLockGrantDone)
	b.tab.mu.Unlock()
	b.a.Start()
	if o := b.outcomes(1); o[0].Out != wire.GrantAccepted {
		t.Fatalf("outcomes %+v", o)
	}
	b.settled(fileFID(1), 2, wire.LockGranted)
	if b.tab.pages < 3 {
		t.Errorf("%d pages", b.tab.pages)
	}
	close(stuck)
	// A grant that was made after the start is nobody else's.
	want(t, "next waiter", w.lock("file1", 3, 0, 10, true), nlm.Blocked)
	w.unlock("file1", 2, 3, 4)
	until(t, "refused", func() bool { return b.a.Stats().CallbacksRefused == 1 })
}

// TestDeadClientsDelayNobody: clients that hang use up their share of workers and
// no more.
func TestDeadClientsDelayNobody(t *testing.T) {
	release := make(chan struct{})
	var mu sync.Mutex
	hanging := 0
	b := newBed(t, func(c *Config) {
		c.Parallel = 4
		port := c.Portmap
		c.Portmap = func(ctx context.Context, local netip.Addr, server netip.AddrPort, prog, vers uint32, netid string) (uint16, error) {
			if server.Addr().As4()[3] < 100 {
				return port(ctx, local, server, prog, vers, netid)
			}
			if local != netip.MustParseAddr("127.0.0.1") {
				return 0, errors.New("not asked from the service address")
			}
			mu.Lock()
			hanging++
			mu.Unlock()
			select {
			case <-release:
			case <-ctx.Done():
			}
			return 0, errors.New("no answer")
		}
		c.PortmapTimeout = time.Hour
		c.Tries = 1000
	})
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	var dead []*peer
	for i := range byte(10) {
		dead = append(dead, b.peer(100+i, 4, "tcp"))
	}
	for i, d := range dead {
		// Each of them has failed before.
		addr := d.addr
		e := b.a.eng.Load()
		e.mu.Lock()
		e.host(addr).fails = 1
		e.mu.Unlock()
		n := uint64(100 + i)
		want(t, "holder", h.lock("file1", uint32(100+i), n, 1, false), nlm.Granted)
		want(t, "dead waiter", d.lock("file1", 2, n, 1, true), nlm.Blocked)
		want(t, "unlock", h.unlock("file1", uint32(100+i), n, 1), nlm.Granted)
	}
	until(t, "half of the workers hang", func() bool { mu.Lock(); defer mu.Unlock(); return hanging == 2 })
	contend(t, h, w)
	h.unlock("file1", 1, 0, 10)
	b.wantOutcome(wire.GrantAccepted)
	mu.Lock()
	if hanging != 2 {
		t.Errorf("%d workers hang", hanging)
	}
	mu.Unlock()
	if s := b.a.Stats(); s.CallbacksPending != 10 {
		t.Errorf("stats %+v", s)
	}
	// Stop does not wait for them.
	b.stop()
	close(release)
}

// TestOneTryTellsOfAllLocks: many locks of a client that is not there do not
// take their tries one after the other, since others wait for each.
func TestOneTryTellsOfAllLocks(t *testing.T) {
	b := newBed(t, nil)
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	want(t, "holder", h.lock("file1", 1, 0, 0, false), nlm.Granted)
	const n = 50
	for i := range uint64(n) {
		want(t, "waiter", w.lock("file1", uint32(10+i), i*10, 10, true), nlm.Blocked)
	}
	b.peers.mu.Lock()
	delete(b.peers.m, w.addr)
	b.peers.mu.Unlock()
	h.unlock("file1", 1, 0, 0)
	for _, o := range b.outcomes(n) {
		if o.Out != wire.GrantUndelivered {
			t.Fatalf("%+v", o)
		}
	}
	if q := b.peers.questions(w.addr); q > 20 {
		t.Errorf("%d questions for the port of one client", q)
	}
	if s := b.tab.states(fileFID(1)); len(s) != 0 {
		t.Errorf("%d locks are left", len(s))
	}
}

// TestPending: what a client leaves unanswered is bounded.
func TestPendingIsBounded(t *testing.T) {
	clk := newFakeClock()
	b := newBed(t, func(c *Config) {
		c.Now, c.AfterFunc, c.MaxPending, c.CallTimeout = clk.Now, clk.AfterFunc, 3, 20*time.Millisecond
	})
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	w.setAnswer(ignore)
	want(t, "holder", h.lock("file1", 1, 0, 0, false), nlm.Granted)
	for i := range uint64(10) {
		want(t, "waiter", w.lock("file1", uint32(10+i), i*10, 10, true), nlm.Blocked)
	}
	h.unlock("file1", 1, 0, 0)
	until(t, "the rest is not called", func() bool { s := b.a.Stats(); return s.CallbacksOverflow == 7 && s.CallbacksPending == 3 })
	for _, st := range b.tab.states(fileFID(1)) {
		if st != wire.LockGrantPending {
			t.Errorf("a lock is %v", st)
		}
	}
}

// TestTableAway: the outcome of a callback reaches the table however long that
// is away, and a poll that fails is repeated.
func TestTableAway(t *testing.T) {
	b := newBed(t, nil)
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	b.tab.setForce(wire.OpLockGrantDone, wire.ErrTargetDown)
	h.unlock("file1", 1, 0, 10)
	until(t, "accepted", func() bool { return b.a.Stats().CallbacksAccepted == 1 })
	if len(b.tab.results()) != 0 {
		t.Fatal("the outcome arrived")
	}
	b.tab.setForce(wire.OpLockGrantDone, wire.OK)
	b.wantOutcome(wire.GrantAccepted)
	if len(w.got()) != 1 {
		t.Errorf("%d calls", len(w.got()))
	}
}

// TestNewerOwner: an address that has moved collects nothing more here.
func TestNewerOwner(t *testing.T) {
	b := newBed(t, nil)
	b.stop()
	b.tab.setForce(wire.OpLockPoll, wire.ErrStaleVIP)
	b.a.Start()
	until(t, "fenced", func() bool { return b.a.Stats().Fenced == 1 })
	<-b.a.polling.done
}

// TestPollEndedByAnother: a poll that somebody else ended is repeated after a
// pause, not at once.
func TestPollEndedByAnother(t *testing.T) {
	clk := newFakeClock()
	b := newBed(t, func(c *Config) { c.Now, c.AfterFunc = clk.Now, clk.AfterFunc })
	parked := func() bool { b.tab.mu.Lock(); defer b.tab.mu.Unlock(); return b.tab.poll != nil }
	until(t, "the poll waits", parked)
	b.tab.Call(context.Background(), b.a.owner, &wire.Request{Header: wire.Header{Op: wire.OpLockPoll}, Cookie: 1<<64 - 1}, new(wire.Reply))
	until(t, "the pause", func() bool { n, _ := clk.waiting(); return n == 1 })
	if parked() {
		t.Error("polls at once")
	}
	clk.advance(pollPause)
	until(t, "the poll waits again", parked)
}

// TestDamagedNote: a request whose note cannot be read is given up, so that the
// client asks anew.
func TestDamagedNote(t *testing.T) {
	b := newBed(t, nil)
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	b.tab.mu.Lock()
	for _, e := range b.tab.entries {
		if e.state == wire.LockWaiting {
			e.args.Note = []byte("?")
		}
	}
	b.tab.mu.Unlock()
	h.unlock("file1", 1, 0, 10)
	b.wantOutcome(wire.GrantUndelivered)
}

// TestStopStart: nothing runs after Stop, and both may be repeated.
func TestStopStart(t *testing.T) {
	b := newBed(t, nil)
	b.a.Start()
	b.stop()
	b.stop()
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	h.unlock("file1", 1, 0, 10)
	w.call(nlm.ProcTestMsg, &nlm.TestArgs{Cookie: cookie, Lock: w.lk("file4", 1, 0, 1)}, nil)
	until(t, "the result is lost", func() bool { return b.a.Stats().ResultsLost == 1 })
	if n := len(w.got()); n != 0 {
		t.Errorf("%d calls while stopped", n)
	}
	b.a.Start()
	b.wantOutcome(wire.GrantAccepted)
	b.stop()
	b.tab.mu.Lock()
	defer b.tab.mu.Unlock()
	if b.tab.poll != nil {
		t.Error("a poll is left behind")
	}
}

// stuckCaller is a connection on which no answer comes.
type stuckCaller struct{ closed, called chan struct{} }

func (c *stuckCaller) Call(ctx context.Context, _ uint32, _ []byte) ([]byte, error) {
	close(c.called)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (c *stuckCaller) Close() error {
	close(c.closed)
	return nil
}

// TestEndCalls: no connection to a client is left, though the table does not answer
// any more and the client does not either.
func TestEndCalls(t *testing.T) {
	c := &stuckCaller{make(chan struct{}), make(chan struct{})}
	b := newBed(t, func(cfg *Config) {
		cfg.CallTimeout = time.Hour
		cfg.Dial = func(context.Context, string, netip.Addr, netip.AddrPort, uint32) (Caller, error) { return c, nil }
	})
	h, w := b.peer(2, 4, "tcp"), b.peer(3, 4, "tcp")
	contend(t, h, w)
	h.unlock("file1", 1, 0, 10)
	select {
	case <-c.called:
	case <-time.After(patience):
		t.Fatal("no callback")
	}
	b.tab.mu.Lock() // the table is stuck
	err := b.a.EndCalls(t.Context())
	select {
	case <-c.closed:
	default:
		t.Error("a connection is open")
	}
	stopping, stop := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- b.a.Stop(stopping) }()
	again := b.a.EndCalls(t.Context()) // beside Stop
	b.tab.mu.Unlock()
	if err != nil || again != nil {
		t.Error(err, again)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	stop()
	if n := len(w.got()); n != 0 {
		t.Errorf("%d calls", n)
	}
}

func TestNewNeedsTable(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no error without a table")
	}
}
