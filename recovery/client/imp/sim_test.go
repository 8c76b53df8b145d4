package imp

import (
	"cmp"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

var simSeeds = flag.Int("sim.seeds", 300, "number of random schedules")
var simSeed = flag.Uint64("sim.seed", 0, "run this schedule only")

// The simulation: a few machines, one model target that crashes, restarts
// elsewhere, evicts and loses what is not committed, and a network that loses
// connections with what they carry. One step at a time, all chances from a seed.

type simRec struct {
	client  int
	xid     uint64
	slot    uint16
	transno uint64
}

type simSlot struct{ xid, transno uint64 }

type simMsg struct {
	r      *Request
	flags  wire.Flags
	xid    uint64
	slot   uint16
	trans  uint64
	commit bool
}

type simReply struct {
	r *Request
	o Outcome
}

// simConn is a connection of one client.
type simConn struct {
	client  int
	to      []simMsg
	back    []simReply
	held    []simReply // waits for its commit
	queued  *simMsg    // replay that waits for its turn
	last    *Request   // final ping that waits for the end of recovery
	giving  []simMsg   // closed: to be given back unanswered
	closed  bool       // broken; the machine may not know it yet
	dropped bool       // by the machine
	atConn  map[*Request]bool
	replayT uint64 // last replay sent
	resendX uint64
}

type simReq struct {
	Request
	done, kept, lost, released bool
	cancelled                  bool
	status                     wire.Status
	transno                    uint64
}

type simClient struct {
	pingless bool
	m        *Machine
	id       int
	conn     *simConn
	reqs     []*simReq
	xid      uint64
	attempt  uint64
	addr     int
	args     ConnectArgs
	trying   bool
	timer    int64
	open     []wire.FID
}

type sim struct {
	t       *testing.T
	rng     *rand.Rand
	seed    uint64
	now     int64
	clients []*simClient
	window  int
	evicts  bool
	hard    int64
	trace   []string

	// The target.
	up         bool
	addr       int
	instance   uint64
	recovering bool
	clean      bool
	log        []simRec
	committed  int // prefix of log that is durable
	commitT    uint64
	next       uint64
	slots      map[int]map[uint16]simSlot
	table      map[int]bool
	finished   map[int]bool
	present    map[int]bool
	floor      uint64
}

const simAddrs = 3

const simTrace = 120

func newSim(t *testing.T, seed uint64) *sim {
	s := &sim{t: t, rng: rand.New(rand.NewPCG(seed, 7)), seed: seed, up: true, instance: 1, next: 1,
		slots: map[int]map[uint16]simSlot{}, table: map[int]bool{}}
	s.evicts = s.rng.IntN(3) == 0
	s.window = 1 + s.rng.IntN(2)*3
	s.hard = 600
	for i := range 1 + s.rng.IntN(3) {
		c := &simClient{id: i, xid: uint64(i) << 32, pingless: s.rng.IntN(2) == 0}
		c.m = New(Config{
			Addrs: simAddrs, Slots: 1 + s.rng.IntN(6), Soft: 300, Hard: s.hard, PingInterval: time.Second, DeadAfter: 3 * time.Second,
			ConnectTimeout: 300 * time.Millisecond, BackoffMin: 10 * time.Millisecond, BackoffMax: 500 * time.Millisecond,
			RetryDelay: 50 * time.Millisecond, ReplayWindow: s.window,
			RequestTimeout: time.Duration(s.rng.IntN(2)) * 8 * time.Second, Locks: s.rng.IntN(4) == 0,
			Jitter: func(d time.Duration) time.Duration { return time.Duration(s.rng.Int64N(int64(d)/2 + 1)) },
		})
		s.clients = append(s.clients, c)
		c.m.Watched(true)
		c.m.Start(0)
		s.act(c)
	}
	return s
}

func (s *sim) logf(f string, a ...any) {
	s.trace = append(s.trace, fmt.Sprintf("%8d ", s.now/1e6)+fmt.Sprintf(f, a...))
}

func (s *sim) fatalf(f string, a ...any) {
	s.t.Helper()
	for _, l := range s.trace[max(0, len(s.trace)-simTrace):] {
		s.t.Log(l)
	}
	s.t.Fatalf("seed %d: %s", s.seed, fmt.Sprintf(f, a...))
}

// act executes a machine's actions and checks them.
func (s *sim) act(c *simClient) {
	for _, a := range c.m.Actions() {
		switch a.Kind {
		case ActSend:
			s.send(c, a)
		case ActComplete:
			r := a.Req.Handle.(*simReq)
			if r.done {
				s.fatalf("client %d: %d completed twice", c.id, r.XID)
			}
			r.done, r.kept, r.status = true, a.Kept, a.Status
			if a.FromTarget != (a.Status == wire.OK || a.Status == wire.ErrExist) {
				s.fatalf("client %d: %d completed with %v, FromTarget %v", c.id, r.XID, a.Status, a.FromTarget)
			}
			if r.transno = a.Req.Transno(); a.Status == wire.OK && !a.Req.Epoch().IsZero() && a.Kept {
				c.open = append(c.open, a.Req.Epoch())
			}
			s.logf("c%d complete %d %v kept=%v transno=%d", c.id, r.XID, a.Status, a.Kept, r.transno)
		case ActRelease:
			if a.Req.Kind() != Normal {
				continue
			}
			r := a.Req.Handle.(*simReq)
			if !r.kept || r.released || c.conn != nil && c.conn.atConn[a.Req] {
				s.fatalf("client %d: %d released: kept=%v released=%v", c.id, r.XID, r.kept, r.released)
			}
			r.released = true
			if !r.lost && r.transno > s.commitT {
				s.fatalf("client %d: %d released, transno %d is not committed (%d)", c.id, r.XID, r.transno, s.commitT)
			}
		case ActLost:
			if !a.Kept {
				a.Req.Handle.(*simReq).lost = true
			}
			s.logf("c%d lost %d", c.id, a.Req.XID)
		case ActConnect:
			if c.conn != nil && !(c.conn.closed && len(c.conn.atConn) == 0) {
				s.fatalf("client %d: connects while the old connection is in use", c.id)
			}
			c.attempt, c.addr, c.args, c.trying = a.Connect.Attempt, a.Addr, a.Connect, true
		case ActAbort:
			c.trying = false
		case ActDrop:
			s.cut(c)
			c.conn.dropped = true
		case ActLocks:
			c.m.Locks(s.rng.IntN(3))
			defer s.act(c)
		case ActTimer:
			c.timer = a.At
		case ActState:
			s.logf("c%d %v", c.id, a.State)
			if c.conn != nil {
				c.conn.replayT, c.conn.resendX = 0, 0
			}
		case ActEvent:
			s.logf("c%d %s", c.id, a.Event)
		}
	}
	if st := c.m.Stats(); st.HeldBytes > s.hard && st.Uncommitted+st.Unanswered > 1 {
		// Only a single request may exceed the limit, or those whose commit is waited for.
		n := 0
		for _, r := range c.reqs {
			if r.kept && !r.released && r.transno > st.LastCommitted {
				n++
			}
		}
		if n > 1 {
			s.fatalf("client %d: %d bytes held", c.id, st.HeldBytes)
		}
	}
}

func (s *sim) send(c *simClient, a Action) {
	cn := c.conn
	if cn == nil || cn.dropped {
		s.fatalf("client %d: sends %d without a connection", c.id, a.Req.XID)
	}
	if cn.atConn[a.Req] {
		s.fatalf("client %d: sends %d twice", c.id, a.Req.XID)
	}
	r := a.Req
	if r.Kind() == Normal {
		q := r.Handle.(*simReq)
		for o := range cn.atConn {
			if o.Slot() == r.Slot() && r.Slot() != 0 && o.Kind() == Normal && a.Flags&wire.FlagReplay == 0 {
				s.fatalf("client %d: slot %d used by %d and %d", c.id, r.Slot(), o.XID, r.XID)
			}
		}
		switch st := c.m.State(); {
		case a.Flags&wire.FlagReplay != 0:
			if q.Epoch().IsZero() && r.Transno() <= cn.replayT {
				s.fatalf("client %d: replay %d after %d", c.id, r.Transno(), cn.replayT)
			}
			cn.replayT = max(cn.replayT, r.Transno())
		case q.done:
			s.fatalf("client %d: sends %d after its completion", c.id, r.XID)
		case st != Full && st != Recover && st != Disconnected && st != Evicted && st != Closed && st != Connecting:
			s.fatalf("client %d: sends %d in %v", c.id, r.XID, st)
		}
		if a.Flags&wire.FlagResend != 0 && a.Flags&wire.FlagReplay == 0 {
			if r.XID <= cn.resendX {
				s.fatalf("client %d: resends %d after %d", c.id, r.XID, cn.resendX)
			}
			cn.resendX = r.XID
		}
	}
	cn.atConn[r] = true
	if cn.closed {
		cn.giving = append(cn.giving, simMsg{r: r, xid: r.XID})
		return
	}
	cn.to = append(cn.to, simMsg{r: r, flags: a.Flags, xid: r.XID, slot: r.Slot(), trans: r.Transno(), commit: r.WaitCommit})
	s.logf("c%d send %v %d slot=%d flags=%x transno=%d", c.id, r.Kind(), r.XID, r.Slot(), a.Flags, r.Transno())
}

// cut breaks a client's connection: what is on the way either got through or not.
func (s *sim) cut(c *simClient) {
	cn := c.conn
	if cn == nil || cn.closed {
		return
	}
	s.logf("c%d cut", c.id)
	for len(cn.to) > 0 && s.rng.IntN(2) == 0 && s.up {
		s.deliver(cn, 0)
	}
	cn.closed = true
	var back []simReply
	got := map[*Request]bool{}
	for _, b := range cn.back {
		if s.rng.IntN(2) == 0 {
			back = append(back, b)
			got[b.r] = true
		}
	}
	cn.back, cn.to, cn.held, cn.queued, cn.last = back, nil, nil, nil, nil
	for r := range cn.atConn {
		if !got[r] {
			cn.giving = append(cn.giving, simMsg{r: r, xid: r.XID})
		}
	}
	slices.SortFunc(cn.giving, func(a, b simMsg) int {
		return cmp.Or(cmp.Compare(a.r.Kind(), b.r.Kind()), cmp.Compare(a.xid, b.xid))
	})
	s.rng.Shuffle(len(cn.giving), func(i, j int) { cn.giving[i], cn.giving[j] = cn.giving[j], cn.giving[i] })
	delete(s.present, c.id)
}

// exec appends to the target's history.
func (s *sim) exec(rec simRec) {
	s.log = append(s.log, rec)
	s.next = max(s.next, rec.transno+1)
	if s.slots[rec.client] == nil {
		s.slots[rec.client] = map[uint16]simSlot{}
	}
	s.slots[rec.client][rec.slot] = simSlot{rec.xid, rec.transno}
}

func (s *sim) answer(cn *simConn, r *Request, o Outcome) {
	o.LastCommitted = s.commitT
	cn.back = append(cn.back, simReply{r, o})
}

// deliver lets the target handle message i of a connection.
func (s *sim) deliver(cn *simConn, i int) {
	m := cn.to[i]
	cn.to = slices.Delete(cn.to, i, i+1)
	c := cn.client
	switch {
	case !s.table[c]:
		s.answer(cn, m.r, Outcome{Status: wire.ErrUnknownClient})
	case m.r.Kind() == LastReplay:
		s.finished[c] = true
		if !s.recovering {
			s.answer(cn, m.r, Outcome{})
			return
		}
		cn.last = m.r
		s.advance()
	case m.r.Kind() == Sync:
		s.commit(len(s.log))
		s.answer(cn, m.r, Outcome{})
	case m.r.Kind() != Normal:
		s.answer(cn, m.r, Outcome{})
	case m.flags&wire.FlagReplay != 0:
		if m.trans <= s.commitT {
			s.answer(cn, m.r, Outcome{Transno: m.trans})
			return
		}
		for _, rec := range s.log {
			if rec.transno == m.trans {
				if rec.client != c || rec.xid != m.xid {
					s.fatalf("client %d replays %d, which is %d of client %d", c, m.trans, rec.xid, rec.client)
				}
				s.answer(cn, m.r, Outcome{Transno: m.trans})
				return
			}
		}
		if !s.recovering {
			s.fatalf("client %d replays %d outside recovery", c, m.trans)
		}
		if cn.queued != nil {
			cn.to = slices.Insert(cn.to, 0, m) // the window: stays in the queue
			return
		}
		cn.queued = &m
		s.advance()
	case s.recovering:
		s.answer(cn, m.r, Outcome{Status: wire.ErrRecovering})
	case !m.r.Modifies:
		s.answer(cn, m.r, Outcome{})
	default:
		o := Outcome{}
		if old, ok := s.slots[c][m.slot]; ok && old.xid == m.xid {
			if m.flags&wire.FlagResend == 0 {
				s.fatalf("client %d: %d came twice without FlagResend", c, m.xid)
			}
			o.Transno = old.transno
		} else if ok && old.xid > m.xid {
			s.fatalf("client %d: %d in slot %d after %d", c, m.xid, m.slot, old.xid)
		} else if m.xid%11 == 0 {
			s.answer(cn, m.r, Outcome{Status: wire.ErrExist})
			return
		} else {
			for _, rec := range s.log {
				if rec.client == c && rec.xid == m.xid {
					s.fatalf("client %d: %d executed twice", c, m.xid)
				}
			}
			o.Transno = s.next
			s.exec(simRec{c, m.xid, m.slot, o.Transno})
		}
		if m.r.OpensEpoch {
			o.Epoch = wire.FID{Seq: uint64(c) + 2, OID: uint32(m.xid % 5)}
		}
		if m.commit && o.Transno > s.commitT {
			cn.held = append(cn.held, simReply{m.r, o})
			return
		}
		s.answer(cn, m.r, o)
	}
}

// advance executes queued replays as far as the order allows, and ends recovery.
func (s *sim) advance() {
	for s.recovering {
		var low *simConn
		all := true
		for _, c := range s.clients {
			switch {
			case !s.table[c.id] || s.finished[c.id]:
			case s.present[c.id] && c.conn != nil && !c.conn.closed && c.conn.queued != nil:
				if low == nil || c.conn.queued.trans < low.queued.trans {
					low = c.conn
				}
			default:
				all = false
			}
		}
		if !all {
			return
		}
		if low == nil {
			s.endRecovery()
			return
		}
		m := low.queued
		low.queued = nil
		s.exec(simRec{low.client, m.xid, m.slot, m.trans})
		s.answer(low, m.r, Outcome{Transno: m.trans})
	}
}

func (s *sim) endRecovery() {
	s.logf("recovery ends")
	s.recovering = false
	s.next = max(s.next, s.floor+1)
	for _, c := range s.clients {
		if s.table[c.id] && !s.finished[c.id] {
			s.evict(c.id)
		}
		if c.conn != nil && c.conn.last != nil {
			s.answer(c.conn, c.conn.last, Outcome{})
			c.conn.last = nil
		}
	}
}

func (s *sim) evict(id int) {
	s.logf("evict c%d", id)
	delete(s.table, id)
	delete(s.slots, id)
	if cn := s.clients[id].conn; cn != nil {
		if cn.queued != nil {
			s.answer(cn, cn.queued.r, Outcome{Status: wire.ErrUnknownClient})
			cn.queued = nil
		}
		if cn.last != nil {
			s.answer(cn, cn.last, Outcome{Status: wire.ErrUnknownClient})
			cn.last = nil
		}
	}
}

func (s *sim) commit(n int) {
	if n <= s.committed {
		return
	}
	s.committed = n
	s.commitT = s.log[n-1].transno
	for _, c := range s.clients {
		if c.conn == nil || c.conn.closed {
			continue
		}
		c.conn.held = slices.DeleteFunc(c.conn.held, func(r simReply) bool {
			if r.o.Transno > s.commitT {
				return false
			}
			s.answer(c.conn, r.r, r.o)
			return true
		})
	}
}

func (s *sim) crash(clean bool) {
	s.logf("crash clean=%v", clean)
	if clean && s.recovering {
		clean = false
	}
	if clean {
		s.commit(len(s.log))
	}
	s.up = false // first, so that nothing more is delivered
	for _, c := range s.clients {
		s.cut(c)
		for range s.rng.IntN(2) {
			c.m.Down(s.now)
			s.act(c)
		}
	}
	s.clean = clean
	s.log = s.log[:s.committed]
	s.slots = map[int]map[uint16]simSlot{}
	s.next = s.commitT + 1
	for _, r := range s.log {
		if s.table[r.client] {
			s.exec2(r)
		}
	}
}

// exec2 rebuilds the reply slots from the history.
func (s *sim) exec2(r simRec) {
	if s.slots[r.client] == nil {
		s.slots[r.client] = map[uint16]simSlot{}
	}
	s.slots[r.client][r.slot] = simSlot{r.xid, r.transno}
}

func (s *sim) restart() {
	s.up = true
	s.instance++
	s.addr = s.rng.IntN(simAddrs)
	s.recovering = !s.clean && len(s.table) > 0
	s.finished, s.present, s.floor = map[int]bool{}, map[int]bool{}, s.commitT
	s.logf("restart: instance %d at %d, recovering %v", s.instance, s.addr, s.recovering)
	for _, c := range s.clients {
		// Without pings a client depends on the news.
		if s.rng.IntN(3) == 0 || c.pingless {
			c.m.Notice(s.now, s.instance, s.addr, 0)
			s.act(c)
		}
	}
}

// connect lets an attempt end. With fault, the reply may be lost.
func (s *sim) connect(c *simClient, fault bool) {
	c.trying = false
	if !s.up || c.addr != s.addr {
		if s.up && s.rng.IntN(3) == 0 {
			c.m.Connected(s.now, c.attempt, ConnectResult{Status: wire.ErrTargetDown})
		} else {
			c.m.ConnectFailed(s.now, c.attempt)
		}
		s.act(c)
		return
	}
	res := ConnectResult{Instance: s.instance, Recovering: s.recovering, Known: s.table[c.id], Pingless: c.pingless}
	if !res.Known && (s.recovering || c.args.Instance != 0 && s.rng.IntN(2) == 0) {
		res = ConnectResult{Status: wire.ErrUnknownClient}
	} else if !res.Known && c.args.Instance == 0 {
		// Only a client that knows it is new is entered: the reply to another one
		// may be lost, and it would never hear of its eviction.
		s.table[c.id] = true
	}
	res.LastCommitted = s.commitT
	if n := len(s.log); n > 0 {
		res.Transno = s.log[n-1].transno
	}
	s.floor = max(s.floor, c.args.Transno)
	if fault && s.rng.IntN(4) == 0 {
		c.m.ConnectFailed(s.now, c.attempt)
		s.act(c)
		return
	}
	old := c.conn
	c.conn = &simConn{client: c.id, atConn: map[*Request]bool{}}
	s.logf("c%d connected: %+v", c.id, res)
	if c.m.Connected(s.now, c.attempt, res) {
		if s.present != nil {
			s.present[c.id] = true
		}
	} else {
		c.conn = old
	}
	s.act(c)
}

func (s *sim) submit(c *simClient) {
	c.xid += 1 + uint64(s.rng.IntN(2))
	r := &simReq{}
	r.XID, r.Handle = c.xid, r
	r.Modifies = s.rng.IntN(4) > 0
	r.WaitCommit = r.Modifies && s.rng.IntN(3) == 0
	r.Bytes = int64(1 + s.rng.IntN(100))
	if s.rng.IntN(40) == 0 {
		r.Bytes = 1000
	}
	r.OpensEpoch = r.Modifies && s.rng.IntN(8) == 0
	if r.Modifies && len(c.open) > 0 && s.rng.IntN(4) == 0 {
		i := s.rng.IntN(len(c.open))
		r.Closes = []wire.FID{c.open[i]}
		c.open = slices.Delete(c.open, i, i+1)
	}
	c.reqs = append(c.reqs, r)
	c.m.Submit(&r.Request)
	s.act(c)
}

// pump moves one message or reply of a client; false when there is none.
func (s *sim) pump(c *simClient, dup bool) bool {
	cn := c.conn
	if c.trying {
		s.connect(c, dup)
		return true
	}
	if cn == nil {
		return false
	}
	ops := []func(){}
	if n := len(cn.to); n > 0 && !cn.closed && s.up && !(cn.queued != nil && cn.to[0].flags&wire.FlagReplay != 0) {
		ops = append(ops, func() { s.deliver(cn, 0) })
	}
	if n := len(cn.back); n > 0 {
		ops = append(ops, func() {
			i := s.rng.IntN(n)
			b := cn.back[i]
			cn.back = slices.Delete(cn.back, i, i+1)
			delete(cn.atConn, b.r)
			c.m.Reply(b.r, b.o)
			if dup && s.rng.IntN(8) == 0 && !cn.atConn[b.r] && len(c.m.acts) == 0 {
				c.m.Reply(b.r, b.o)
			}
			s.act(c)
		})
	}
	if n := len(cn.giving); n > 0 {
		ops = append(ops, func() {
			m := cn.giving[n-1]
			cn.giving = cn.giving[:n-1]
			delete(cn.atConn, m.r)
			c.m.Advance(s.now)
			c.m.Failed(m.r, false)
			s.act(c)
		})
	}
	if len(ops) == 0 {
		return false
	}
	ops[s.rng.IntN(len(ops))]()
	return true
}

func (s *sim) pass(d int64) {
	s.now += d
	for _, c := range s.clients {
		if c.timer <= s.now {
			c.m.Tick(s.now)
			s.act(c)
		}
	}
}

func (s *sim) step() {
	c := s.clients[s.rng.IntN(len(s.clients))]
	switch p := s.rng.IntN(1000); {
	case p < 250:
		s.submit(c)
	case p < 800:
		for range 1 + s.rng.IntN(6) {
			s.pump(c, true)
		}
	case p < 870 && s.up:
		s.commit(s.committed + s.rng.IntN(len(s.log)-s.committed+1))
	case p < 890:
		s.cut(c)
		if s.rng.IntN(2) == 0 {
			c.m.Down(s.now)
			s.act(c)
		}
	case p < 895 && s.up:
		s.crash(s.rng.IntN(4) == 0)
	case p < 920 && !s.up:
		s.restart()
	case p < 923 && s.up && s.evicts && !s.recovering && s.table[c.id]:
		s.evict(c.id)
	case p < 926 && s.up && s.evicts && s.recovering:
		s.endRecovery()
	case p < 930 && len(c.reqs) > 0:
		r := c.reqs[s.rng.IntN(len(c.reqs))]
		if !r.done {
			r.cancelled = true
			c.m.Cancel(&r.Request, wire.ErrTargetDown)
			s.act(c)
		}
	case p < 931 && s.evicts:
		c.m.Deactivate()
		s.act(c)
	case p < 940:
		c.m.Activate(s.now)
		s.act(c)
	case p < 999:
		s.pass(s.rng.Int64N(200e6))
	}
}

func (s *sim) run(steps int) {
	for range steps {
		s.step()
	}
	// No more faults: everything has to end.
	if !s.up {
		s.restart()
	}
	for _, c := range s.clients {
		c.m.Activate(s.now)
		s.act(c)
	}
	for i := 0; ; i++ {
		moved, open := false, 0
		for _, c := range s.clients {
			for s.pump(c, false) {
				moved = true
			}
			for _, r := range c.reqs {
				if !r.done {
					open++
				}
			}
		}
		if open == 0 && !moved {
			break
		}
		s.commit(len(s.log))
		if i > 200 {
			s.fatalf("%d requests never end", open)
		}
		s.pass(100e6)
	}
	s.check()
}

// check compares the callers' view with the target's final history.
func (s *sim) check() {
	type key struct {
		client int
		xid    uint64
	}
	n := map[key]int{}
	var last uint64
	for _, r := range s.log {
		n[key{r.client, r.xid}]++
		if r.transno <= last {
			s.fatalf("history out of order: %d after %d", r.transno, last)
		}
		last = r.transno
	}
	for _, c := range s.clients {
		for _, r := range c.reqs {
			k := n[key{c.id, r.XID}]
			switch {
			case k > 1:
				s.fatalf("client %d: %d executed %d times", c.id, r.XID, k)
			case !r.Modifies && k != 0, r.status == wire.ErrExist && k != 0:
				s.fatalf("client %d: %d is in the history", c.id, r.XID)
			case r.Modifies && r.status == wire.OK && !r.lost && k != 1:
				s.fatalf("client %d: %d was answered OK and is not in the history", c.id, r.XID)
			case !s.evicts && !r.cancelled && (r.lost || r.status != wire.OK && r.status != wire.ErrExist):
				s.fatalf("client %d: %d: %v, lost %v, without any reason", c.id, r.XID, r.status, r.lost)
			case r.status == wire.ErrTargetDown && !r.cancelled:
				s.fatalf("client %d: %d failed although nobody cancelled it", c.id, r.XID)
			case !r.Modifies && r.status == wire.ErrUnknownClient:
				s.fatalf("client %d: read %d failed by an eviction", c.id, r.XID)
			}
		}
		st, kept := c.m.Stats(), 0
		for _, r := range c.reqs {
			if r.kept && !r.released && r.Epoch().IsZero() && r.transno <= st.LastCommitted {
				kept++
			}
		}
		if kept > 0 && st.Uncommitted == 0 { // else an open epoch may wait for the commit of its close
			s.fatalf("client %d: %d committed requests are kept", c.id, kept)
		}
	}
}

// TestSimulation runs random schedules. A failure prints its seed and the last steps.
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		newSim(t, *simSeed).run(1500)
		return
	}
	n := *simSeeds
	if testing.Short() {
		n = min(n, 50)
	}
	ok, lost, failed := 0, 0, 0
	for seed := range n {
		s := newSim(t, uint64(seed)+1)
		s.run(1500)
		for _, c := range s.clients {
			for _, r := range c.reqs {
				switch {
				case r.lost:
					lost++
				case r.status == wire.OK || r.status == wire.ErrExist:
					ok++
				default:
					failed++
				}
			}
		}
	}
	t.Logf("%d schedules: %d requests succeeded, %d lost by evictions, %d failed", n, ok, lost, failed)
	if ok == 0 || n >= 50 && (lost == 0 || failed == 0) {
		t.Error("the schedules do not reach what they are for")
	}
}
