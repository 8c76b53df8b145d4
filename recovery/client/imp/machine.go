package imp

import (
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Config configures a Machine. Zero fields get the defaults named.
type Config struct {
	// Addrs is the number of addresses at which the target may be. Default 1.
	Addrs int
	// Slots bounds the unanswered modifying requests. Default 64.
	Slots int
	// Soft and Hard bound the bytes kept for replay: above Soft the target is
	// asked to commit, above Hard requests wait. Default 64 MiB and 4 times Soft.
	Soft, Hard int64
	// PingInterval: a ping is sent when nothing else passed for so long. Default 5 s.
	PingInterval time.Duration
	// DeadAfter: a connection on which something is unanswered and nothing was
	// heard for so long is given up. Default 3 times PingInterval.
	DeadAfter time.Duration
	// RequestTimeout: a connection that leaves one request unanswered for so
	// long is given up, even if it answers others. Not for Long requests and
	// not during recovery, when the target may hold requests. 0: never.
	RequestTimeout time.Duration
	// ConnectTimeout bounds one attempt at one address. Default 2 s.
	ConnectTimeout time.Duration
	// BackoffMin is the pause when all addresses were tried in vain; it doubles
	// up to BackoffMax. Defaults 50 ms, 5 s.
	BackoffMin, BackoffMax time.Duration
	// RetryDelay is the pause when the target answers that it is not ready for
	// this client. Default 500 ms.
	RetryDelay time.Duration
	// ReplayWindow is how many replays may be unanswered. Default 1: a target
	// that sees this client's next replay then knows that no earlier one is on
	// its way. More need a transport that delivers in order.
	ReplayWindow int
	// Locks: ask for locks to replay (ActLocks).
	Locks bool
	// Jitter gives what is added to a pause. nil: nothing.
	Jitter func(time.Duration) time.Duration
}

func (c *Config) defaults() {
	def := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	c.Addrs = max(c.Addrs, 1)
	if c.Slots <= 0 {
		c.Slots = 64
	}
	c.Slots = min(c.Slots, 1<<16-1)
	if c.Soft <= 0 {
		c.Soft = 64 << 20
	}
	if c.Hard <= 0 {
		c.Hard = 4 * c.Soft
	}
	c.Hard = max(c.Hard, c.Soft)
	def(&c.PingInterval, 5*time.Second)
	def(&c.DeadAfter, 3*c.PingInterval)
	def(&c.ConnectTimeout, 2*time.Second)
	def(&c.BackoffMin, 50*time.Millisecond)
	def(&c.BackoffMax, 5*time.Second)
	c.BackoffMax = max(c.BackoffMax, c.BackoffMin)
	def(&c.RetryDelay, 500*time.Millisecond)
	c.ReplayWindow = max(c.ReplayWindow, 1)
}

// maxPings bounds the pings that are unanswered at a time.
const maxPings = 4

// Machine is the import's state machine. Its methods are its inputs; what it
// wants done is in Actions afterwards. Time enters through Tick and the inputs
// with a now, in nanoseconds of any steady clock. Submit and Reply use the last
// time told, which is exact enough for time-outs of seconds; before a failure
// Advance should tell it. Not safe for concurrent use.
type Machine struct {
	cfg   Config
	acts  []Action
	now   int64
	state State

	waitMod, waitRead list // not yet sent
	flight            list // unanswered: at the transport, or parked until it is back
	replay            list // answered, not committed; transno order
	opens             list // committed, with an open IO epoch; transno order
	epochs            map[wire.FID]*Request
	closedEarly       map[wire.FID]earlyClose
	earlyLimit        int
	opening           int // OpensEpoch requests in flight
	seq               uint64

	slots    []uint16 // free ones
	held     int64    // bytes of replay
	reserved int64    // bytes of requests in flight that will be kept

	// What the target has told.
	instance, highest, committed uint64
	// The target is in this process: nothing is kept for it, and unkept is the
	// highest transno of what would have been.
	local  bool
	unkept uint64
	// The target does without pings, as long as its node is watched.
	pingless, watched bool

	out, short          int // requests at the transport; without the Long ones
	pings, replaysOut   int
	locksOut            int
	askedLocks          bool
	syncOut, syncWaits  bool // a Sync is on its way; none before the next tick
	lastHeard, lastSent int64
	lastPing, busySince int64
	slow                int64 // longest wait for an answer lately

	cursor  *Request // next to replay
	inOpens bool     // cursor is in opens

	addr, tried, round int
	attempt            uint64
	deadline, retryAt  int64
	timerAt            int64
	awaySince, fullAt  int64
	reason             string
	reported           bool // the owner was told that the target is away
	inactive           bool
	left               bool
	fatal              wire.Status
}

// earlyClose is the close of an epoch whose opener was not answered yet.
type earlyClose struct{ transno, seq uint64 }

// New returns a machine in state DISCONNECTED; Start makes it connect.
func New(cfg Config) *Machine {
	cfg.defaults()
	m := &Machine{
		cfg: cfg, epochs: map[wire.FID]*Request{}, closedEarly: map[wire.FID]earlyClose{},
		earlyLimit: 1024, slots: make([]uint16, cfg.Slots),
	}
	for i := range m.slots {
		m.slots[i] = uint16(cfg.Slots - i)
	}
	return m
}

// Actions gives what is to be done, in order, and forgets it. The slice is
// valid until the next input.
func (m *Machine) Actions() []Action {
	a := m.acts
	m.acts = m.acts[:0]
	return a
}

// State returns the state.
func (m *Machine) State() State { return m.state }

// Stats are a machine's figures.
type Stats struct {
	Waiting, Unanswered, Uncommitted, OpenEpochs int
	HeldBytes                                    int64 // uncommitted or about to be
	Instance, Transno, LastCommitted             uint64
	AtTransport, FreeSlots                       int
	Inactive, Reported/* known to be away */ bool
	// Away is how long requests have not passed, 0 if they do, and Reason why.
	Away   time.Duration
	Reason string
	// Addr is the address of the connection, or of the next attempt.
	Addr int
	// Pingless: the target is not pinged while nothing is uncommitted.
	Pingless bool
}

// Stats returns the figures.
func (m *Machine) Stats() Stats {
	s := Stats{
		Waiting: m.waitMod.n + m.waitRead.n, Unanswered: m.flight.n, Uncommitted: m.replay.n,
		OpenEpochs: len(m.epochs), HeldBytes: m.held + m.reserved,
		Instance: m.instance, Transno: m.highest, LastCommitted: m.committed,
		AtTransport: m.out, FreeSlots: len(m.slots), Inactive: m.inactive, Reported: m.reported, Addr: m.addr,
		Pingless: m.pingless && m.watched && m.state == Full,
	}
	if m.state != Full {
		s.Away, s.Reason = time.Duration(max(m.now-m.awaySince, 1)), m.reason
	}
	return s
}

// Watched is the input that somebody else watches the node at the address of the
// connection, and tells when it is gone, or that nobody does any more.
func (m *Machine) Watched(on bool) { m.watched = on }

// Holds tells whether the target remembers this client, as far as this knows, and the
// number of the address at which it does, -1 when there is no connection.
func (m *Machine) Holds() (addr int, ok bool) {
	switch {
	case m.instance == 0 || m.state == Closed:
		return -1, false
	case m.state.connected():
		return m.addr, true
	}
	return -1, true
}

func (m *Machine) act(a Action) { m.acts = append(m.acts, a) }

func (m *Machine) event(e Event) { m.act(Action{Kind: ActEvent, Event: e}) }

func (m *Machine) setState(s State) {
	if m.state != s {
		m.state = s
		m.act(Action{Kind: ActState, State: s})
	}
}

// Advance tells the time and nothing else.
func (m *Machine) Advance(now int64) { m.now = max(m.now, now) }

// Submit takes a request of a caller. The XIDs of modifying requests have to rise
// from call to call, so that those of one slot rise.
func (m *Machine) Submit(r *Request) {
	r.kind = Normal
	m.seq++
	r.seq = m.seq
	switch {
	case m.fatal != wire.OK:
		m.finish(r, m.fatal)
	case m.state == Closed:
		m.finish(r, wire.ErrTargetDown)
	case m.inactive:
		m.finish(r, wire.ErrIO)
	case m.state == Full && !r.Modifies, m.state == Full && m.waitMod.n == 0 && m.room(r):
		m.first(r)
	case r.NoWait && m.reported:
		m.finish(r, wire.ErrTargetDown)
	case r.Modifies:
		m.waitMod.push(r)
		m.commitEarly()
	default:
		m.waitRead.push(r)
	}
	if m.left {
		m.left = false
		m.step()
	}
}

// room tells whether a modifying request may be sent: there is a slot, and
// memory to keep it afterwards. One that alone exceeds the limit may, alone.
func (m *Machine) room(r *Request) bool {
	return len(m.slots) > 0 && (!r.retained() || m.roomFor(r.Bytes))
}

func (m *Machine) roomFor(n int64) bool {
	kept := m.held + m.reserved
	return kept == 0 || kept+n <= m.cfg.Hard
}

// first sends a request that was never sent.
func (m *Machine) first(r *Request) {
	r.unlink()
	if r.Modifies {
		r.slot = m.slots[len(m.slots)-1]
		m.slots = m.slots[:len(m.slots)-1]
		if r.retained() {
			m.reserved += r.Bytes
		}
	}
	if r.OpensEpoch {
		m.opening++
	}
	m.flight.push(r)
	m.send(r, 0)
}

func (m *Machine) send(r *Request, fl wire.Flags) {
	if r.maybe {
		fl |= wire.FlagResend
	}
	r.out, r.at = true, m.now
	m.out++
	if !r.Long {
		if m.short == 0 {
			m.busySince = m.now
		}
		m.short++
	}
	m.lastSent = m.now
	m.act(Action{Kind: ActSend, Req: r, Flags: fl})
}

// back notes that the transport has given r back.
func (m *Machine) back(r *Request) {
	r.out = false
	m.out--
	if !r.Long {
		m.short--
	}
}

// Outcome is what the machine needs of a reply.
type Outcome struct {
	Status                 wire.Status
	Transno, LastCommitted uint64
	// Epoch is the IO epoch that the request has opened, or zero.
	Epoch wire.FID
}

// Reply is the input that r was answered. Answers to requests that are not at
// the transport are ignored: they are duplicates.
func (m *Machine) Reply(r *Request, o Outcome) {
	if !r.out {
		return
	}
	m.back(r)
	m.lastHeard = m.now
	// A target that has forgotten this client has committed without it.
	if m.instance != 0 && o.Status != wire.ErrUnknownClient && o.LastCommitted > m.committed {
		m.committed = o.LastCommitted
		m.prune(false)
	}
	switch {
	case r.kind != Normal:
		m.internal(r, &o)
	case r.replay:
		m.replayed(r, &o)
	default:
		if !r.Long {
			m.slow = max(m.slow, m.now-r.at)
		}
		m.answered(r, &o)
	}
	m.afterBack()
}

// afterBack does what the return of a request makes possible.
func (m *Machine) afterBack() {
	if m.opening == 0 && len(m.closedEarly) > 0 {
		clear(m.closedEarly)
	}
	switch {
	case m.state == Full:
		m.flush()
		m.commitEarly()
	case m.out == 0:
		m.step()
	}
}

// answered handles the answer to a request of a caller.
func (m *Machine) answered(r *Request, o *Outcome) {
	switch o.Status {
	case wire.ErrRecovering, wire.ErrTargetDown:
		m.park(r)
		m.lose("target answered "+o.Status.String(), m.pause(m.cfg.RetryDelay))
		return
	case wire.ErrUnknownClient:
		r.maybe = true
		r.evicted = r.Modifies
		if m.state.connected() {
			m.evict("request refused")
		}
		if r.list != nil {
			m.park(r)
		}
		return
	case wire.ErrStaleClient:
		m.park(r)
		m.stop(wire.ErrStaleClient)
		return
	}
	if r.evicted && o.Transno > o.LastCommitted {
		// Executed, but nothing would repeat it if the target failed now.
		m.finish(r, wire.ErrUnknownClient)
		return
	}
	m.settle(r)
	kept := m.state != Closed && !r.evicted && m.keep(r, o)
	m.act(Action{Kind: ActComplete, Req: r, FromTarget: true, Kept: kept, Status: o.Status})
	if len(r.Closes) > 0 && o.Status == wire.OK {
		m.closeEpochs(r, o.Transno)
	}
	if r.Leaves && o.Status == wire.OK {
		m.forget(false)
		m.instance, m.highest, m.committed = 0, 0, 0
		m.left = true
	}
}

// keep puts an answered request among those to be replayed, if it has to be.
func (m *Machine) keep(r *Request, o *Outcome) bool {
	if !r.Modifies || o.Transno == 0 || m.instance == 0 {
		return false
	}
	m.highest = max(m.highest, o.Transno)
	r.transno, r.inst, r.status, r.maybe = o.Transno, m.instance, o.Status, false
	if m.local {
		m.unkept = max(m.unkept, r.transno)
		return false
	}
	if r.OpensEpoch && !o.Epoch.IsZero() && o.Status == wire.OK {
		m.openEpoch(r, o.Epoch)
	}
	switch {
	case r.transno > m.committed:
		m.replay.insertByTransno(r)
		m.held += r.Bytes
	case !r.epoch.IsZero():
		m.opens.insertByTransno(r)
	default:
		return false
	}
	return true
}

// openEpoch makes r the request that is kept until the epoch is closed, unless
// a newer one or the close was answered before it.
func (m *Machine) openEpoch(r *Request, fid wire.FID) {
	if c, ok := m.closedEarly[fid]; ok && c.transno > r.transno {
		return
	}
	old := m.epochs[fid]
	if old != nil && old.transno > r.transno {
		return
	}
	r.epoch = fid
	m.epochs[fid] = r
	if old != nil {
		m.closed(old)
	}
}

// closed ends the keeping of an opener for the sake of its epoch.
func (m *Machine) closed(r *Request) {
	r.epoch = wire.FID{}
	if r.list == &m.opens {
		m.release(r)
	}
}

func (m *Machine) closeEpochs(r *Request, transno uint64) {
	for _, fid := range r.Closes {
		o := m.epochs[fid]
		switch {
		case o != nil && o.transno < transno:
			delete(m.epochs, fid)
			if r.list == &m.replay && o.list == &m.opens {
				r.opens = append(r.opens, o) // until the close is committed
			} else {
				m.closed(o)
			}
		case o == nil && m.opening > 0:
			m.closedEarly[fid] = earlyClose{transno, m.seq}
		}
	}
	if len(m.closedEarly) > m.earlyLimit {
		m.tidyEarly()
	}
}

// tidyEarly forgets early closes that no opener in flight can be older than.
func (m *Machine) tidyEarly() {
	oldest := m.seq + 1
	for r := m.flight.head; r != nil; r = r.next {
		if r.OpensEpoch {
			oldest = min(oldest, r.seq)
		}
	}
	for fid, c := range m.closedEarly {
		if c.seq < oldest {
			delete(m.closedEarly, fid)
		}
	}
	m.earlyLimit = max(1024, 2*len(m.closedEarly))
}

// ForgetEpoch ends an epoch that goes without a close, as that of a removed file.
func (m *Machine) ForgetEpoch(fid wire.FID) {
	if r := m.epochs[fid]; r != nil {
		delete(m.epochs, fid)
		m.closed(r)
	}
}

// prune forgets what the target has committed. What a restarted target has
// committed says nothing of requests that it was not sent again, unless it says so
// in the answer to the connect.
func (m *Machine) prune(connect bool) {
	for r := m.replay.head; r != nil && r.transno <= m.committed && (connect || r.inst == m.instance); r = m.replay.head {
		if r.epoch.IsZero() {
			m.release(r)
			continue
		}
		m.unkeep(r)
		m.opens.insertByTransno(r)
	}
}

// unkeep takes r out of the lists of kept requests.
func (m *Machine) unkeep(r *Request) {
	if m.cursor == r {
		m.cursor = r.next
	}
	if r.list == &m.replay {
		m.held -= r.Bytes
	}
	r.unlink()
}

// release gives a kept request back to its owner.
func (m *Machine) release(r *Request) {
	m.unkeep(r)
	if !r.epoch.IsZero() && m.epochs[r.epoch] == r {
		delete(m.epochs, r.epoch)
	}
	for _, o := range r.opens {
		m.closed(o)
	}
	r.opens = nil
	if r.out {
		r.dropped = true // the transport still has it
		return
	}
	m.act(Action{Kind: ActRelease, Req: r})
}

// settle ends a request's time in flight.
func (m *Machine) settle(r *Request) {
	if r.list == &m.flight {
		if r.retained() {
			m.reserved -= r.Bytes
		}
		if r.OpensEpoch {
			m.opening--
		}
		if r.slot != 0 {
			m.slots = append(m.slots, r.slot)
		}
	}
	r.unlink()
}

// finish answers a request with a status of the import's own.
func (m *Machine) finish(r *Request, st wire.Status) {
	m.settle(r)
	m.act(Action{Kind: ActComplete, Req: r, Status: st})
}

// park keeps a request that came back without an answer for the resend, or
// answers it when it must not be sent again.
func (m *Machine) park(r *Request) {
	r.maybe = true
	switch {
	case r.dead:
		m.finish(r, r.deadSt)
	case r.evicted:
		m.finish(r, wire.ErrUnknownClient)
	}
}

// Failed is the input that the transport has given r back without an answer.
// neverSent: for sure the target has not seen it.
func (m *Machine) Failed(r *Request, neverSent bool) {
	if !r.out {
		return
	}
	m.back(r)
	maybe := r.maybe || !neverSent
	switch {
	case r.kind != Normal:
		m.internal(r, nil)
	case r.replay:
		r.replay = false
		m.replaysOut--
		if r.dropped {
			m.act(Action{Kind: ActRelease, Req: r})
		}
	default:
		m.park(r)
	}
	r.maybe = maybe
	m.lose("transport failed", 0)
	m.afterBack()
}

// Cancel is the input that r's caller does not want to wait any longer. A
// request that is not at the transport is answered with st now, another one when
// the transport gives it back without an answer.
func (m *Machine) Cancel(r *Request, st wire.Status) {
	switch {
	case r.list == nil || r.list == &m.replay || r.list == &m.opens:
	case r.out:
		r.dead, r.deadSt = true, st
	default:
		m.finish(r, st)
	}
}

// flush sends what waited for slots, memory or the connection.
func (m *Machine) flush() {
	for r := m.waitRead.head; r != nil; r = m.waitRead.head {
		m.first(r)
	}
	for r := m.waitMod.head; r != nil && m.room(r); r = m.waitMod.head {
		m.first(r)
	}
}

// commitEarly asks the target to commit when too much is kept, or when a
// request waits for memory.
func (m *Machine) commitEarly() {
	if m.syncOut || m.syncWaits || m.state != Full || m.held == 0 {
		return
	}
	w := m.waitMod.head
	if m.held > m.cfg.Soft || m.local || w != nil && w.retained() && !m.roomFor(w.Bytes) {
		m.syncOut = true
		m.send(&Request{kind: Sync, transno: m.highest}, 0)
	}
}
