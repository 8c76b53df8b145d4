package recov

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

var (
	simSeed = flag.Uint64("sim.seed", 0, "run one seed of the simulation, with its events")
	simRuns = flag.Uint64("sim.runs", 300, "number of seeds")
)

// A message reaches the other side if the connection it was sent over is still
// the one, after any delay, in any order, perhaps twice or not at all.
type simMsg struct {
	at      time.Time
	conn    uint64
	boot    int
	c       *simClient
	deliver func()
}

type simHandle struct {
	c     *simClient
	gen   uint64
	conn  uint64
	xid   uint64
	kind  string
	op    *simOp
	ended bool
}

type simOp struct {
	body, op string
	req      Request
	sent     time.Time
	transno  uint64
	durable  bool // the client was told so
}

type simState uint8

const (
	simConnecting simState = iota
	simReplay
	simLock
	simWait
	simLast
	simFull
	simDead
)

type simClient struct {
	s                  *sim
	id                 wire.ClientID
	name               string
	gen, xid, conn     uint64
	boot               int // the incarnation of the target that conn leads to
	instance           uint64
	told, committed    uint64
	state              simState
	next               time.Time // what is waited for is sent again
	list               []*simOp  // answered, in transno order
	at                 int       // next of list in replay
	failed             bool
	slots              [3]*simOp
	acked              []*simOp // of this life
	lockXID, waitXID   uint64
	pinged             time.Time
	ops, lives, passed int
}

type sim struct {
	t       *testing.T
	rng     *rand.Rand
	cfg     Config
	now     time.Time
	st      *store
	m       *Machine
	boot    int
	up      time.Time // when the target comes back
	known   map[wire.ClientID]bool
	net     []*simMsg
	running []Action
	waiting []func() bool // answers for the disk: send and report true when durable
	clients []*simClient
	conns   uint64
	pre     map[string][4]uint64 // by body and transno
	must    []*simOp             // of ended lives, durable
	calm    bool
	phase   int // of this recovery: 0 requests, 1 locks, 2 waiting
	lastT   uint64
	seen    map[string]int
	trace   bool
	stopped bool
	commits float64 // chance of a commit per step
}

func (s *sim) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("at %s: "+format, append([]any{s.now.Sub(epoch)}, args...)...)
}

func (s *sim) log(format string, args ...any) {
	if s.trace {
		s.t.Logf("%s "+format, append([]any{s.now.Sub(epoch)}, args...)...)
	}
}

func (s *sim) chance(p float64) bool { return s.rng.Float64() < p }

func (s *sim) post(c *simClient, conn uint64, deliver func()) {
	n := 1
	if !s.calm {
		if s.chance(0.04) {
			n = 0
		} else if s.chance(0.06) {
			n = 2
		}
	}
	for range n {
		d := time.Duration(s.rng.IntN(60)) * time.Millisecond
		if !s.calm && s.chance(0.05) {
			d *= 20
		}
		s.net = append(s.net, &simMsg{s.now.Add(d), conn, c.boot, c, deliver})
	}
}

// toTarget sends over the client's connection to this incarnation.
func (s *sim) toTarget(c *simClient, h simHandle, f func(h *simHandle) []Action) {
	h.c, h.gen, h.conn = c, c.gen, c.conn
	s.post(c, c.conn, func() {
		if s.m != nil {
			copy := h
			s.acts(f(&copy))
		}
	})
}

func (s *sim) acts(list []Action) {
	for _, a := range slices.Clone(list) {
		switch a.Kind {
		case ActLog:
			s.log("target: %s", a.Text)
		case ActPutTarget:
			s.st.append(entry{target: &a.Target})
			s.st.committed = len(s.st.log)
			s.stopped = s.m.State() == StateStopped
		case ActPutClient:
			s.st.append(entry{put: &a.Entry})
			if a.Ticket == 0 {
				continue
			}
			s.commit(len(s.st.log))
			s.acts(s.m.Stored(a.Client, a.Ticket, true, s.now))
		case ActDelClient:
			s.st.append(entry{del: &a.Client})
		case ActCommit:
			s.seen["shared commits"]++
		case ActDrop:
			s.end(a.Handle.(*simHandle))
		case ActExecute:
			h := a.Handle.(*simHandle)
			if st := s.m.State(); st == StateRecovering || st == StateWaiting {
				if !a.Replay || !s.known[h.c.id] {
					s.fail("%s#%d is served in recovery", h.c.name, h.xid)
				}
			}
			if s.chance(0.3) {
				s.running = append(s.running, a)
			} else {
				s.execute(a)
			}
		case ActReply, ActConnected:
			h := a.Handle.(*simHandle)
			s.end(h)
			boot := s.boot
			send := func() {
				durable := s.m.CommittedFor(h.c.id, h.gen)
				s.post(h.c, h.conn, func() {
					if h.c.gen == h.gen && h.c.state != simDead {
						h.c.reply(h, &a, durable)
					}
				})
			}
			if a.WaitCommit || h.op != nil && h.op.req.Flags&wire.FlagWaitCommit != 0 {
				wait := func() bool {
					if s.boot != boot {
						return true
					}
					if _, durable := s.st.lastTransno(); durable < a.Transno {
						return false
					}
					send()
					return true
				}
				if !wait() {
					s.waiting = append(s.waiting, wait)
				}
				continue
			}
			send()
		}
	}
}

func (s *sim) end(h *simHandle) {
	if h.ended {
		s.fail("%s#%d %s is ended twice", h.c.name, h.xid, h.kind)
	}
	h.ended = true
}

func (s *sim) execute(a Action) {
	h := a.Handle.(*simHandle)
	res := Result{Ticket: a.Ticket}
	order := map[Class]int{ClassModify: 0, ClassLock: 1, ClassWait: 2}[a.Req.Class]
	if a.Replay {
		if order < s.phase {
			s.fail("%s of %s is executed after those of a later kind", h.kind, h.c.name)
		}
		s.phase = order
	}
	if order == 0 {
		last, _ := s.st.lastTransno()
		res = s.st.execute(&a, h.op.op, h.op.body, max(last+1, s.m.NextTransno()))
		if res.Transno != 0 {
			if res.Transno <= last {
				s.fail("%s: transno %d after %d", h.op.body, res.Transno, last)
			}
			s.pre[fmt.Sprint(h.op.body, res.Transno)] = res.PreVersions
		}
		if a.Replay {
			if a.Req.Transno <= s.lastT {
				s.fail("%s: replay of %d after %d", h.op.body, a.Req.Transno, s.lastT)
			}
			s.lastT = a.Req.Transno
			s.seen["replays"]++
			if res.Mismatch {
				s.seen["mismatches"]++
				if s.cfg.CommitOnShare {
					s.log("%v but was %v", res.PreVersions, a.Req.PreVersions)
					s.fail("%s: versions differ in spite of commit-on-share", h.op.body)
				}
			}
		}
	}
	s.log("%s#%d %s executed: %s transno %d versions %v", h.c.name, h.xid, h.kind, res.Status, res.Transno, res.PreVersions)
	s.acts(s.m.Executed(res, s.now))
}

func (s *sim) commit(n int) {
	if n <= s.st.committed {
		return
	}
	s.st.committed = n
	_, d := s.st.lastTransno()
	s.m.Committed(d)
	s.waiting = slices.DeleteFunc(s.waiting, func(f func() bool) bool { return f() })
}

func (s *sim) crash() {
	s.log("target dies, %d of %d durable", s.st.committed, len(s.st.log))
	s.seen["target crashes"]++
	s.m, s.running = nil, nil
	s.boot++
	s.up = s.now.Add(time.Duration(s.rng.IntN(2000)) * time.Millisecond)
}

func (s *sim) start() {
	s.st.crash()
	s.m = s.st.open(s.cfg)
	s.known = map[wire.ClientID]bool{}
	for id := range s.m.clients {
		s.known[id] = true
	}
	s.phase, s.lastT, s.stopped = 0, 0, false
	s.log("target starts")
	s.acts(s.m.Start(s.now))
	if s.m.State() == StateWaiting {
		s.seen["recoveries"]++
	}
}

func (s *sim) step() {
	s.now = s.now.Add(time.Duration(1+s.rng.IntN(30)) * time.Millisecond)
	if s.m == nil && !s.now.Before(s.up) {
		s.start()
	}
	s.rng.Shuffle(len(s.net), func(i, j int) { s.net[i], s.net[j] = s.net[j], s.net[i] })
	due := s.net
	s.net = nil
	for _, m := range due {
		switch {
		case m.at.After(s.now):
			s.net = append(s.net, m)
		case m.boot == s.boot && m.conn == m.c.conn:
			m.deliver()
		}
	}
	if s.m != nil {
		s.target()
	}
	for _, c := range s.clients {
		c.step()
	}
}

func (s *sim) target() {
	if at, ok := s.m.NextTick(s.now); ok && !s.now.Before(at) {
		s.acts(s.m.Tick(s.now))
	}
	if len(s.running) > 0 && s.chance(0.3) {
		i := s.rng.IntN(len(s.running))
		a := s.running[i]
		s.running = slices.Delete(s.running, i, i+1)
		s.execute(a)
	}
	if s.chance(s.commits) || s.calm {
		s.commit(s.st.committed + s.rng.IntN(len(s.st.log)-s.st.committed+1))
	}
	if st := s.m.Status(); st.State == StateRecovering && s.now.Sub(st.Start) > s.cfg.Hard+10*time.Second {
		s.fail("recovery does not end: %+v %+v", st, s.m.Clients())
	}
	if s.calm {
		if s.stopped {
			s.crash()
		}
		return
	}
	switch {
	case s.stopped:
		s.log("target has stopped")
		s.crash()
	case s.chance(0.004):
		s.crash()
	case s.chance(0.0005):
		s.log("target is told to stop")
		s.seen["stops"]++
		s.acts(s.m.Stop(s.now))
	case s.m.State() == StateRecovering && s.chance(0.001):
		s.seen["told"]++
		s.acts(s.m.Shorten(1+s.rng.IntN(10), s.now))
	case s.chance(0.0005):
		_, acts := s.m.Abort(s.now)
		s.acts(acts)
	case s.chance(0.0005):
		_, acts := s.m.Evict(s.clients[s.rng.IntN(len(s.clients))].id, s.now)
		s.acts(acts)
	}
}

// endLife forgets what the client had: it restarted or was evicted.
func (c *simClient) endLife(why string) {
	c.s.log("%s: %s", c.name, why)
	c.s.seen[why]++
	for _, o := range c.acked {
		if o.durable {
			c.s.must = append(c.s.must, o)
		}
	}
	c.acked, c.list, c.slots = nil, nil, [3]*simOp{}
	c.instance, c.told, c.committed, c.failed = 0, 0, 0, false
	c.lives++
	c.reconnect()
}

func (c *simClient) reconnect() {
	if c.s.m != nil && c.s.chance(0.5) {
		c.s.acts(c.s.m.ConnLost(c.id, c.conn, c.s.now))
	}
	c.s.conns++
	c.conn, c.state, c.next = c.s.conns, simConnecting, c.s.now
}

func (c *simClient) step() {
	s := c.s
	if c.state == simDead {
		return
	}
	if !s.calm {
		switch {
		case s.chance(0.0007):
			c.gen++
			c.xid += 1_000_000
			c.endLife("client crashes")
		case s.chance(0.0003) && len(s.clients) > 1 && c != s.clients[0]:
			c.endLife("client is gone for ever")
			c.state, c.conn = simDead, 0
			return
		case s.chance(0.004):
			c.reconnect()
		}
	}
	if c.boot != s.boot && c.state != simConnecting && s.chance(0.05) {
		c.reconnect() // it has noticed that the target died
	}
	if c.state == simFull {
		c.work()
		return
	}
	if s.now.Before(c.next) {
		return
	}
	if c.state != simConnecting && s.chance(0.1) {
		c.reconnect()
	}
	c.next = s.now.Add(300 * time.Millisecond)
	if c.state == simConnecting {
		s.conns++
		c.conn, c.boot = s.conns, s.boot // each attempt is a connection
		r := Connect{
			Client: c.id, Gen: c.gen, Conn: c.conn, Instance: c.instance, Transno: c.told, LastCommitted: c.committed,
			Estimate: time.Duration(s.rng.IntN(3000)) * time.Millisecond,
		}
		s.toTarget(c, simHandle{kind: "connect"}, func(h *simHandle) []Action {
			r.Handle = h
			return s.m.Connect(r, s.now)
		})
		return
	}
	if c.state == simReplay && c.at < len(c.list) {
		o := c.list[c.at]
		r := o.req
		r.Flags |= wire.FlagReplay
		c.send(r, "replay", o)
		return
	}
	if c.state == simReplay {
		c.state = simLock
	}
	switch c.state {
	case simLock:
		c.send(Request{XID: c.lockXID, Class: ClassLock, Flags: wire.FlagReplay}, "lock", nil)
	case simWait:
		c.send(Request{XID: c.waitXID, Class: ClassWait, Flags: wire.FlagReplay, Transno: c.waitXID}, "wait", nil)
	case simLast:
		c.xid++
		c.send(Request{XID: c.xid, Class: ClassPing, Flags: wire.FlagLastReplay}, "last", nil)
	}
}

func (c *simClient) send(r Request, kind string, o *simOp) {
	r.Client, r.Gen, r.Conn = c.id, c.gen, c.conn
	c.s.toTarget(c, simHandle{kind: kind, xid: r.XID, op: o}, func(h *simHandle) []Action {
		r.Handle = h
		return c.s.m.Request(r, c.s.now)
	})
}

// work sends new operations, and again those whose answer does not come.
func (c *simClient) work() {
	s := c.s
	if s.now.Sub(c.pinged) > time.Second {
		c.pinged = s.now
		c.xid++
		c.send(Request{XID: c.xid, Class: ClassPing}, "ping", nil)
	}
	for i, o := range c.slots {
		switch {
		case o != nil && s.now.Sub(o.sent) > 400*time.Millisecond:
			o.sent = s.now
			r := o.req
			r.Flags |= wire.FlagResend
			c.send(r, "op", o)
			if s.chance(0.1) {
				c.reconnect()
				return
			}
		case o == nil && !s.calm && s.chance(0.15):
			// A client does one thing at a time with an object.
			var free []string
			for n := range 6 {
				name := fmt.Sprintf("/o%d", n)
				if !slices.ContainsFunc(c.slots[:], func(p *simOp) bool { return p != nil && strings.Contains(p.op+" ", name+" ") }) {
					free = append(free, name)
				}
			}
			a, b := free[s.rng.IntN(len(free))], free[s.rng.IntN(len(free))]
			c.xid++
			c.ops++
			o = &simOp{
				body: fmt.Sprintf("%s/%d#%d", c.name, c.gen, c.xid), op: "append " + a + " " + b, sent: s.now,
				req: Request{XID: c.xid, Slot: uint16(i), Class: ClassModify},
			}
			if s.chance(0.1) {
				o.req.Flags |= wire.FlagWaitCommit
			}
			c.slots[i] = o
			c.send(o.req, "op", o)
		}
	}
}

func (c *simClient) reply(h *simHandle, a *Action, durable uint64) {
	s := c.s
	if h.kind == "connect" && c.state != simConnecting {
		return // a copy
	}
	switch a.Status {
	case wire.ErrUnknownClient:
		if h.kind != "connect" || c.instance != 0 {
			c.endLife("client learns of its eviction")
		}
		return
	case wire.ErrTargetDown:
		if c.state != simConnecting {
			c.reconnect()
		}
		return
	case wire.OK, VersionMismatch:
	default:
		s.fail("%s#%d %s: %s", c.name, h.xid, h.kind, a.Status)
	}
	c.committed = max(c.committed, durable)
	for _, o := range c.acked {
		o.durable = o.durable || o.transno <= durable
	}
	step := func(from, to simState) {
		if c.state == from {
			c.state, c.next = to, s.now
		}
	}
	switch h.kind {
	case "connect":
		c.connected(a)
	case "replay":
		if c.state != simReplay || c.at >= len(c.list) || c.list[c.at] != h.op {
			return // a copy
		}
		if a.Status == wire.OK && a.Transno != h.op.transno {
			s.fail("%s: replayed as %d, was %d", h.op.body, a.Transno, h.op.transno)
		}
		if a.Status == VersionMismatch { // c will be evicted
			c.failed = true
			c.acked = slices.DeleteFunc(c.acked, func(o *simOp) bool { return o == h.op })
		}
		c.at++
		c.next = s.now
	case "lock":
		step(simLock, simWait)
	case "wait":
		step(simWait, simLast)
	case "last":
		if c.failed {
			s.fail("%s has passed the barrier though its replay failed", c.name)
		}
		c.passed++
		step(simLast, simFull)
	case "op":
		i := slices.Index(c.slots[:], h.op)
		if i < 0 {
			return
		}
		if a.Status != wire.OK || a.Transno == 0 {
			s.fail("%s: %s transno %d", h.op.body, a.Status, a.Transno)
		}
		if a.Reconstructed && string(a.Data) != h.op.body {
			s.fail("%s gets the answer of %q", h.op.body, a.Data)
		}
		if a.Reconstructed {
			s.seen["reconstructed"]++
		}
		o := h.op
		c.slots[i] = nil
		o.transno, o.req.Transno = a.Transno, a.Transno
		o.req.PreVersions = s.pre[fmt.Sprint(o.body, a.Transno)]
		c.told = max(c.told, a.Transno)
		o.durable = o.transno <= durable
		c.acked = append(c.acked, o)
		c.list = append(c.list, o)
		slices.SortFunc(c.list, func(a, b *simOp) int { return int(a.transno) - int(b.transno) })
		c.prune()
	}
}

func (c *simClient) prune() {
	if c.state == simFull || c.state == simConnecting {
		c.list = slices.DeleteFunc(c.list, func(o *simOp) bool { return o.transno <= c.committed })
	}
}

func (c *simClient) connected(a *Action) {
	s := c.s
	s.log("%s: connected %d known=%t recovering=%t", c.name, a.Instance, a.Known, a.Recovering)
	if c.instance != 0 && !a.Known {
		s.fail("%s is not told of its eviction", c.name)
	}
	c.committed = max(c.committed, a.LastCommitted)
	c.prune()
	if c.lockXID == 0 || a.Instance != c.instance {
		c.xid += 2
		c.lockXID, c.waitXID = c.xid-1, c.xid
	}
	changed := c.instance != 0 && a.Instance != c.instance
	c.instance, c.next = a.Instance, s.now
	c.at, c.failed = 0, c.failed && !changed
	if a.Recovering {
		c.state = simReplay
		return
	}
	if changed && len(c.list) > 0 {
		s.fail("%s: no recovery, but %d operations are not durable", c.name, len(c.list))
	}
	c.state = simFull
	for _, o := range c.slots {
		if o != nil {
			o.sent = time.Time{}
		}
	}
}

func runSim(t *testing.T, seed uint64, trace bool) map[string]int {
	s := &sim{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), now: epoch, st: newStore(), trace: trace,
		pre: map[string][4]uint64{}, seen: map[string]int{},
	}
	s.cfg = Config{
		SoftMin: 2 * time.Second, SoftMax: 6 * time.Second, Hard: 15 * time.Second, Step: time.Second,
		PingInterval: 2 * time.Second, PingTimeout: 8 * time.Second, MaxSlots: 3, CommitOnShare: seed%2 == 0,
	}
	s.commits = 0.005 + 0.1*s.rng.Float64()*s.rng.Float64()
	s.st.append(entry{target: &TargetRecord{}})
	s.st.committed = 1
	for i := range 2 + s.rng.IntN(4) {
		c := &simClient{s: s, name: string(rune('a' + i)), gen: 1, state: simConnecting}
		c.id[0] = byte(i + 1)
		s.clients = append(s.clients, c)
	}
	for range 1500 {
		s.step()
	}
	// Then nothing fails any more and everybody has to come to rest.
	s.calm = true
	s.log("calm")
	for n := 0; ; n++ {
		s.step()
		rest := s.m != nil && s.m.State() == StateFull && s.st.committed == len(s.st.log)
		for _, c := range s.clients {
			rest = rest && (c.state == simDead || c.state == simFull && c.slots == [3]*simOp{})
		}
		if rest {
			break
		}
		if n > 4000 {
			for _, c := range s.clients {
				t.Logf("%s state %d instance %d open %v", c.name, c.state, c.instance, c.slots)
			}
			s.fail("no rest: %+v", s.m.Status())
		}
	}
	at := map[string]uint64{}
	for _, e := range s.st.log {
		if e.transno == 0 {
			continue
		}
		if at[e.body] != 0 {
			s.fail("%s is in the log twice", e.body)
		}
		at[e.body] = e.transno
	}
	check := func(o *simOp) {
		if at[o.body] != o.transno {
			s.fail("%s was acknowledged as %d (durable %t), the log has %d", o.body, o.transno, o.durable, at[o.body])
		}
		s.seen["checked"]++
	}
	for _, o := range s.must {
		check(o)
	}
	for _, c := range s.clients {
		for _, o := range c.acked {
			check(o)
		}
		s.seen["operations"] += c.ops
		s.seen["barriers passed"] += c.passed
	}
	return s.seen
}

// TestSimulation runs clients and a target through random faults: dying
// clients and targets, clients that never come back, answers and requests that
// are lost, doubled, late and out of order. Acknowledged work of clients that
// were not evicted, and work that was acknowledged as durable, is in the log
// once, with the number it was acknowledged with.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		t.Log(runSim(t, *simSeed, true))
		return
	}
	total := map[string]int{}
	for seed := uint64(1); seed <= *simRuns && !t.Failed(); seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			for k, v := range runSim(t, seed, false) {
				total[k] += v
			}
		})
	}
	t.Log(total)
	if *simRuns >= 100 && !t.Failed() {
		for _, k := range []string{"recoveries", "replays", "mismatches", "reconstructed", "shared commits", "stops", "barriers passed", "client learns of its eviction"} {
			if total[k] == 0 {
				t.Errorf("no %s in all runs", k)
			}
		}
	}
}
