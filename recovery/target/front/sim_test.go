package front

import (
	"context"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run one seed of the simulation, with its events")
	simFirst = flag.Uint64("sim.first", 1, "first seed")
	simRuns  = flag.Uint64("sim.runs", 1000, "number of seeds")
)

// The simulation: real imports, a real front, a fakeBody; time is virtual. All
// chances come from the seed, one event at a time; only goroutines that an event
// wakes at once run in the order that the scheduler likes.
type sim struct {
	t     *testing.T
	rng   *rand.Rand
	trace bool
	calm  bool
	// gentle: connections break and the target dies, but nobody stays away, and
	// answers wait for what they build on. Then no client loses anything.
	gentle   bool
	cfg      recov.Config
	d        *disk
	b        *fakeBody
	f        *Front
	up       bool
	stopping atomic.Bool // the target is told to stop; false again when it has
	upAt     time.Time
	conns    []*simConn
	clients  []*simClient
	guest    *simClient // into whose process the target comes
	local    *simLocal
	seed     uint64
	boot     int
	vip      atomic.Uint64
	commits  float64
	seen     map[string]int
	must     []*simOp // of ended lives

	mu    sync.Mutex // what goroutines of imports and fronts touch
	later []simRun
	dials []*simConn
	calls atomic.Int64 // requests that the fronts have not answered
	bad   []string
}

type simRun struct {
	who string
	run func()
}

type simOp struct {
	who     string
	req     wire.Request
	rep     wire.Reply
	done    atomic.Bool
	durable bool // its client was told so
	wait    bool // FlagWaitCommit
	lost    bool // by an eviction
	closes  bool // the epoch is among those to be closed
	c       *simClient
}

type simClient struct {
	s       *sim
	name    string
	id      wire.ClientID
	gen     uint64
	im      *imp.Import
	closing chan struct{}
	away    time.Time // cut off until then
	dead    bool
	inside  *fakeBody // the target has come into its process
	session uint64
	n       int
	ops     []*simOp // of this life
	open    []wire.FID
}

func (s *sim) logf(format string, args ...any) {
	if s.trace {
		s.t.Logf("%8.3f "+format, append([]any{time.Since(simStart).Seconds()}, args...)...)
	}
}

// Bubbles begin at this time.
var simStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func (s *sim) chance(p float64) bool { return s.rng.Float64() < p }

func (s *sim) count(what string) {
	s.mu.Lock()
	s.seen[what]++
	s.mu.Unlock()
}

func (s *sim) fault(format string, args ...any) {
	s.mu.Lock()
	s.bad = append(s.bad, fmt.Sprintf(format, args...))
	s.mu.Unlock()
}

// start begins an incarnation of the target.
func (s *sim) start() {
	b := newBody(s.t, s.d)
	last := b.last
	b.slow = true
	b.later = func(who string, run func()) { s.postpone(0.3, who, run) }
	b.doneLate = func(who string, done func()) { s.postpone(0.1, who+" done", done) }
	b.onReplay = func(mismatch bool) {
		s.count("replays")
		if mismatch {
			s.count("mismatches")
			if s.cfg.CommitOnShare {
				s.fault("versions differ in spite of commit-on-share")
			}
		}
	}
	o := Options{Name: "MDT0000", Body: b, Config: s.cfg}
	if s.trace {
		o.Logger = slog.New(slog.NewTextHandler(simLog{s}, nil))
	}
	f, err := New(o)
	if err != nil {
		s.t.Fatal(err)
	}
	if f.State() == recov.StateWaiting {
		s.count("recoveries")
	}
	s.boot++
	s.mu.Lock()
	s.b, s.f, s.up = b, f, true
	if s.guest != nil {
		s.guest.inside = b
	}
	s.mu.Unlock()
	s.logf("target starts: %v, the log ends at %d", f.State(), last)
	if s.local != nil {
		s.local.start()
	}
}

// postpone does something now, or later when the driver wants. Its goroutine
// may be any; so chance decides by what it is.
func (s *sim) postpone(p float64, who string, run func()) {
	h := fnv.New32()
	fmt.Fprint(h, who, s.seed, s.boot)
	if float64(h.Sum32()%1000) >= p*1000 {
		run()
		return
	}
	s.mu.Lock()
	s.later = append(s.later, simRun{who, run})
	s.mu.Unlock()
}

type simLog struct{ s *sim }

func (l simLog) Write(p []byte) (int, error) {
	l.s.t.Logf("%8.3f %s", time.Since(simStart).Seconds(), strings.TrimSpace(string(p)))
	return len(p), nil
}

// crash ends the target's process.
func (s *sim) crash() {
	s.logf("target dies, %d of %d durable", s.d.durable, len(s.d.log))
	s.count("crashes")
	s.mu.Lock()
	s.up = false
	later := s.later
	s.later = nil
	s.mu.Unlock()
	for _, c := range s.all() {
		if c.boot == s.b {
			c.cut()
		}
	}
	s.d.crash()
	release := s.b.die()
	f := s.f
	f.Fail(errDead)
	release()
	runAll(later)
	for _, c := range s.all() {
		if c.boot == s.b {
			s.shutServer(c)
		}
	}
	if s.local != nil {
		s.local.died()
	}
	synctest.Wait()
	s.mu.Lock()
	later, s.later = s.later, nil // begun meanwhile
	s.mu.Unlock()
	runAll(later)
	synctest.Wait()
	select {
	case <-f.ended:
	default:
		s.t.Fatal("a failed front does not end")
	}
	if n := s.calls.Load(); n != 0 {
		s.t.Fatalf("%d requests are not answered", n)
	}
	for _, c := range s.clients {
		if c.inside == s.b && c.closing == nil && !c.dead {
			c.endLife(true)
		}
	}
	s.upAt = time.Now().Add(time.Duration(s.rng.IntN(800)) * time.Millisecond)
}

func runAll(later []simRun) {
	slices.SortFunc(later, func(a, b simRun) int { return strings.Compare(a.who, b.who) })
	for _, r := range later {
		r.run()
	}
}

func (s *sim) all() []*simConn {
	s.mu.Lock()
	// Whoever was woken at the same moment dials in any order.
	slices.SortFunc(s.dials, func(a, b *simConn) int { return strings.Compare(a.c.name, b.c.name) })
	s.conns = append(s.conns, s.dials...)
	s.dials = nil
	s.mu.Unlock()
	return s.conns
}

func (c *simClient) open1() {
	c.gen++
	rng := rand.New(rand.NewPCG(c.gen, uint64(c.id[0])))
	o := imp.Options{
		Addrs: []string{"x"}, Client: c.id, Gen: c.gen,
		Dial: func(ctx context.Context, _ string) (wire.Conn, error) { return c.s.dial(ctx, c) },
		Config: imp.Config{
			Slots: 3, Soft: 1 << 20, PingInterval: time.Second / 2, DeadAfter: 3 * time.Second / 2, ConnectTimeout: time.Second,
			BackoffMin: 10 * time.Millisecond, BackoffMax: 500 * time.Millisecond, RetryDelay: 50 * time.Millisecond,
			Jitter: func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d)/2 + 1)) },
		},
		OnEvicted: func(l imp.Loss) {
			c.s.count("evictions")
			c.s.mu.Lock()
			defer c.s.mu.Unlock()
			for _, r := range l.Requests {
				_, who := objects(r)
				for _, o := range c.ops {
					if o.who == who {
						o.lost = true
					}
				}
			}
		},
	}
	if c.s.trace {
		o.Logger = slog.New(slog.NewTextHandler(simLog{c.s}, nil)).With("import", c.name)
	}
	im, err := imp.Open(o)
	if err != nil {
		c.s.t.Fatal(err)
	}
	c.im = im
}

// endLife ends the client's process; what it was told to be durable has to stay.
func (c *simClient) endLife(again bool) {
	c.s.logf("%s dies, again %t", c.name, again)
	c.s.count("client deaths")
	im := c.im
	c.closing = make(chan struct{})
	go func() { im.Close(); close(c.closing) }()
	c.dead = !again
	c.s.must = append(c.s.must, c.ops...)
	c.ops, c.open = nil, nil
}

// newOp makes a request that was never made before.
func (c *simClient) newOp(rng *rand.Rand) *simOp {
	c.n++
	o := &simOp{c: c}
	q := &o.req
	q.Op = wire.OpMkdir
	names := fmt.Sprintf("o%d", rng.IntN(6))
	if rng.IntN(10) < 4 {
		names += fmt.Sprintf(" o%d", 6+rng.IntN(4))
	}
	switch p := rng.IntN(100); {
	case p < 3:
		names = "refused"
	case p < 10:
		q.Op, q.FID = wire.OpOpenEpoch, wire.FID{Seq: uint64(c.id[0])<<16 | c.gen, OID: uint32(c.n)}
	case p < 17 && len(c.open) > 0:
		i := rng.IntN(len(c.open))
		q.Op, q.Epochs = wire.OpCloseEpoch, []wire.EpochClose{{FID: c.open[i]}}
		c.open = slices.Delete(c.open, i, i+1)
	case p < 30:
		q.Op = wire.OpGetattr
	}
	if q.Op == wire.OpMkdir {
		q.Name = fmt.Appendf(nil, "%s#%s/%d/%d", names, c.name, c.gen, c.n)
		if rng.IntN(2) == 0 {
			q.Key = wire.ReplyKey{Proc: 1, Port: uint16(c.id[0]), XID: uint32(c.gen), Sum: uint64(c.n)}
		}
	}
	if rng.IntN(7) == 0 && q.Op.Modifies() {
		q.Flags, o.wait = wire.FlagWaitCommit, true
	}
	q.Client, q.ClientGen = c.id, c.gen
	if rng.IntN(3) == 0 {
		q.VIP, q.VIPEpoch = 1, c.s.vip.Load()
	}
	_, o.who = objects(q)
	c.ops = append(c.ops, o)
	return o
}

// answered notes the answer to an operation.
func (o *simOp) answered() {
	// Who has been evicted meanwhile is not told what is durable.
	o.durable = o.wait || o.rep.Transno <= o.rep.LastCommitted
	o.done.Store(true)
}

func (c *simClient) submit() {
	o := c.newOp(c.s.rng)
	c.s.count("operations")
	c.im.Handle(&o.req, &o.rep, o.answered)
}

func (c *simClient) step() {
	s := c.s
	if c.closing != nil {
		select {
		case <-c.closing:
			c.closing = nil
			if !c.dead {
				c.open1()
			}
		default:
		}
		return
	}
	if c.dead {
		return
	}
	going := 0
	for _, o := range c.ops {
		if !o.done.Load() {
			going++
		}
		if o.req.Op == wire.OpOpenEpoch && o.done.Load() && o.rep.Status == wire.OK && !o.closes {
			o.closes = true
			c.open = append(c.open, o.req.FID)
		}
	}
	if s.calm {
		return
	}
	if going < 6 && s.chance(0.4) {
		c.submit()
	}
	if s.gentle {
		return
	}
	switch {
	case s.chance(0.0004):
		c.endLife(true)
	case s.chance(0.0001) && c != s.clients[0]:
		c.endLife(false)
	case s.chance(0.0004):
		c.away = time.Now().Add(time.Duration(s.rng.IntN(7000)) * time.Millisecond)
		s.count("partitions")
	}
}

// simLocal is a client in the target's process. Its answers wait for the disk.
type simLocal struct {
	s     *sim
	id    wire.ClientID
	gen   uint64
	c     wire.Target
	ready atomic.Bool
	n     int
	ops   []*simOp // of this life
}

func (l *simLocal) start() {
	l.gen++
	l.ops = nil
	l.ready.Store(false)
	l.c = l.s.f.Accept(wire.Peer{Local: true, Session: l.gen})
	req, rep := &wire.Request{Header: wire.Header{Op: wire.OpConnect, Client: l.id, ClientGen: l.gen, XID: 1}}, &wire.Reply{}
	ready := &l.ready
	l.s.calls.Add(1)
	l.c.Handle(req, rep, func() {
		l.s.calls.Add(-1)
		ready.Store(rep.Status == wire.OK)
	})
}

func (l *simLocal) died() {
	l.c.(io.Closer).Close()
	l.s.must = append(l.s.must, l.ops...)
	l.ops = nil
	l.ready.Store(false)
}

func (l *simLocal) step() {
	s := l.s
	if s.calm || !s.up || !l.ready.Load() || !s.chance(0.1) {
		return
	}
	l.n++
	o := &simOp{}
	q := &o.req
	q.Header = wire.Header{Op: wire.OpMkdir, Client: l.id, ClientGen: l.gen, XID: uint64(l.n) + 1, Flags: wire.FlagWaitCommit}
	q.Name = fmt.Appendf(nil, "o%d o%d#local/%d", s.rng.IntN(6), 6+s.rng.IntN(4), l.n)
	_, o.who = objects(q)
	l.ops = append(l.ops, o)
	s.count("local operations")
	s.calls.Add(1)
	l.c.Handle(q, &o.rep, func() {
		s.calls.Add(-1)
		o.durable = true
		o.done.Store(true)
	})
}

func (s *sim) step() {
	if !s.up && !time.Now().Before(s.upAt) {
		s.guest = nil
		if c := s.clients[s.rng.IntN(len(s.clients))]; !s.gentle && s.chance(0.3) && !c.dead {
			s.logf("the target comes to %s", c.name)
			s.count("came to a client")
			s.guest = c
		}
		s.start()
	}
	conns := s.all()
	s.conns = slices.DeleteFunc(conns, func(c *simConn) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.broken && c.shut && c.ended && len(c.open) == 0
	})
	for _, c := range s.clients {
		c.step()
		synctest.Wait()
	}
	if s.local != nil {
		s.local.step()
	}
	if n := len(s.conns); n > 0 {
		for range 1 + s.rng.IntN(4*n) {
			c := s.conns[s.rng.IntN(n)]
			if time.Now().Before(c.c.away) && !c.isBroken() && !c.local {
				continue
			}
			if s.pump(c) {
				synctest.Wait()
			}
		}
		if !s.calm && s.chance(0.01) {
			if c := s.conns[s.rng.IntN(n)]; !c.local {
				s.cut(c)
				s.count("broken connections")
			}
		}
	}
	s.target()
	synctest.Wait()
	if s.calm || s.chance(0.5) {
		time.Sleep(time.Duration(s.rng.IntN(25)) * time.Millisecond)
		synctest.Wait()
	}
	s.mu.Lock()
	bad := s.bad
	s.mu.Unlock()
	if len(bad) > 0 {
		s.t.Fatalf("at %s: %s", time.Since(simStart), strings.Join(bad, "; "))
	}
}

// target lets something happen at the target.
func (s *sim) target() {
	if !s.up {
		return
	}
	s.mu.Lock()
	var run func()
	if n := len(s.later); n > 0 && (s.calm || s.chance(0.5)) {
		slices.SortStableFunc(s.later, func(a, b simRun) int { return strings.Compare(a.who, b.who) })
		i := s.rng.IntN(n)
		run = s.later[i].run
		s.later = slices.Delete(s.later, i, i+1)
	}
	s.mu.Unlock()
	if run != nil {
		run()
	}
	if s.chance(s.commits) || s.calm || s.stopping.Load() {
		s.b.mu.Lock()
		from, to := s.d.durable, len(s.d.log)
		s.b.mu.Unlock()
		s.b.commit(from + s.rng.IntN(to-from+1))
	}
	st := s.f.Status()
	if st.Recovery.State == recov.StateRecovering && time.Since(st.Recovery.Start) > s.cfg.Hard+10*time.Second {
		s.t.Fatalf("recovery does not end: %+v", st)
	}
	select {
	case <-s.f.ended:
		s.stopping.Store(false)
		s.crash()
		return
	default:
	}
	if s.calm {
		return
	}
	switch {
	case s.chance(0.002):
		s.stopping.Store(false)
		s.crash()
	case s.stopping.Load():
	case s.chance(0.0003):
		s.logf("target is told to stop")
		s.count("stops")
		s.stopping.Store(true)
		f, t := s.f, s.t
		go func() {
			if err := f.Stop(context.Background()); err != nil && !f.failed.Load() {
				t.Errorf("stop: %v", err)
			}
		}()
	case s.gentle:
	case s.chance(0.0003):
		s.f.Abort()
	case s.chance(0.0006):
		s.f.Evict(s.clients[s.rng.IntN(len(s.clients))].id)
	}
	if s.chance(0.002) {
		s.vip.Add(1)
	}
}

func (s *sim) run() {
	s.start()
	for _, c := range s.clients {
		c.open1()
	}
	for range 2000 {
		s.step()
	}
	// Then nothing fails any more and everybody comes to rest.
	s.calm = true
	s.logf("calm")
	for n := 0; ; n++ {
		s.step()
		rest := s.up && s.f.serving.Load() && !s.stopping.Load()
		open := ""
		for _, c := range s.clients {
			rest = rest && c.closing == nil
			for _, o := range c.ops {
				if !o.done.Load() {
					open += " " + o.who
					rest = false
				}
			}
		}
		if rest {
			break
		}
		if n > 6000 {
			s.t.Fatalf("no rest: up %t, open %s, target %+v", s.up, open, s.f.Status())
		}
	}
	s.check()
	for _, c := range s.clients {
		if !c.dead {
			go c.im.Close()
		}
	}
	for range 200 { // connections give back what they hold
		s.step()
	}
	s.crash()
	for _, c := range s.all() {
		c.cut()
		s.giveBack(c)
	}
	synctest.Wait()
}

func (s *sim) check() {
	at := map[string]uint64{}
	last := uint64(0)
	for _, e := range s.d.log {
		if e.who == "" {
			continue
		}
		if at[e.who] != 0 {
			s.t.Errorf("%s is in the log twice", e.who)
		}
		if e.transno <= last {
			s.t.Errorf("%d follows %d in the log", e.transno, last)
		}
		at[e.who], last = e.transno, e.transno
	}
	one := func(o *simOp, over bool) {
		if !o.done.Load() || !o.req.Op.Modifies() {
			return
		}
		s.seen["answer "+o.rep.Status.String()]++
		switch {
		case o.rep.Status != wire.OK:
			// What a local client hears after its own death does not count.
			if s.gentle && o.c != nil && o.rep.Status != wire.ErrExist && o.rep.Status != wire.ErrStaleVIP {
				s.t.Errorf("%s: %v though nobody was evicted", o.who, o.rep.Status)
			}
			if o.rep.Status == wire.ErrExist && at[o.who] != 0 {
				s.t.Errorf("%s was refused and is in the log", o.who)
			}
		case at[o.who] == 0 && (o.durable || !o.lost && !over), at[o.who] != 0 && o.rep.Transno != 0 && at[o.who] != o.rep.Transno:
			s.t.Errorf("%s was answered as %d (durable %t, lost %t), the log has %d", o.who, o.rep.Transno, o.durable, o.lost, at[o.who])
		case o.lost && s.gentle:
			s.t.Errorf("%s is lost", o.who)
		default:
			s.count("checked")
		}
	}
	for _, o := range s.must {
		one(o, true)
	}
	for _, c := range s.clients {
		for _, o := range c.ops {
			one(o, false)
		}
	}
	if s.local != nil {
		for _, o := range s.local.ops {
			one(o, true)
		}
	}
}

func runSim(t *testing.T, seed uint64, trace bool) map[string]int {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &sim{
		t: t, rng: rng, seed: seed, trace: trace, d: &disk{}, seen: map[string]int{},
		cfg: recov.Config{
			SoftMin: time.Second, SoftMax: 3 * time.Second, Hard: 8 * time.Second, Step: time.Second / 2,
			PingInterval: time.Second, PingTimeout: 4 * time.Second, MaxSlots: 3,
		},
	}
	s.vip.Store(1)
	s.gentle = seed%4 == 0
	s.cfg.CommitOnShare = seed%4 < 2
	if s.gentle {
		s.cfg.SoftMin, s.cfg.SoftMax, s.cfg.Hard, s.cfg.PingTimeout = 60*time.Second, 60*time.Second, 600*time.Second, time.Minute
	}
	s.commits = 0.002 + 0.1*rng.Float64()*rng.Float64()
	for i := range 1 + rng.IntN(4) {
		c := &simClient{s: s, name: string(rune('a' + i))}
		c.id[0] = byte(i + 1)
		s.clients = append(s.clients, c)
	}
	if rng.IntN(2) == 0 {
		s.local = &simLocal{s: s, id: wire.ClientID{200}}
	}
	s.run()
	return s.seen
}

// TestSimulation runs imports and a front through random faults: connections
// that break with what they carry, targets that die and lose what is not
// durable, clients that die, are cut off or evicted, stops and aborts. What was
// acknowledged is in the log once, with its number, if it was durable or its
// client was not evicted; nothing is executed twice; every request is answered
// once; recovery ends, and everybody comes to rest afterwards.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that the order is always the same
		synctest.Test(t, func(t *testing.T) { t.Log(runSim(t, *simSeed, true)) })
		return
	}
	runs := *simRuns
	if testing.Short() {
		runs = min(runs, 100)
	}
	total := map[string]int{}
	for seed := *simFirst; seed < *simFirst+runs && !t.Failed(); seed++ {
		synctest.Test(t, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			}()
			for k, v := range runSim(t, seed, false) {
				total[k] += v
			}
		})
	}
	t.Log(total)
	if runs >= 100 && !t.Failed() {
		for _, k := range []string{"recoveries", "replays", "mismatches", "evictions", "stops", "client deaths", "local operations", "checked"} {
			if total[k] == 0 {
				t.Errorf("no %s in all runs", k)
			}
		}
	}
}
