package recov

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// stage is how far a client is in recovery.
type stage uint8

const (
	stageReplay stage = iota // may have requests to replay
	stageLocks               // has replayed its requests
	stageWaits               // has replayed the locks that it holds
	stageDone                // has sent FlagLastReplay
)

type client struct {
	rec       ClientRecord
	stored    bool   // the entry is in the table
	put       uint64 // Ticket of the ActPutClient that writes it
	local     bool   // its newest connection is in the target's process
	gone      bool   // evicted or disconnected
	connected bool
	seen      bool // has connected to this instance
	conn      uint64
	heard     time.Time
	busy      int       // modifying requests under way
	answered  time.Time // the last of them
	slots     []slot

	// Of recovery.
	waited   bool // was in the table at the start
	told     uint64
	stage    stage
	queued   int // request replays put aside
	replayed map[uint64]wire.Status
	locks    map[uint64]wire.Status // by XID

	barrier, pending held // FlagLastReplay; connect before its entry is stored
}

// held is a handle that is answered later.
type held struct {
	h  any
	on bool
}

type slot struct {
	rec SlotRecord // XID 0: empty
	run *running
}

// running is an execution that was asked for.
type running struct {
	c      *client
	req    Request
	replay bool
	dup    held // newest copy of the request
}

// owner tells whose an operation is that is not durable. A client that was
// evicted and came back is another one: it does not replay the earlier one's.
type owner struct {
	transno uint64
	c       *client
	held    bool // its answer waits for the disk, so that nobody would replay it
}

// Machine is the recovery of one target. It is not safe for concurrent use.
type Machine struct {
	cfg      Config
	state    State
	instance uint64
	started  time.Time
	clients  map[wire.ClientID]*client
	order    []*client // by ID
	tickets  uint64
	runs     map[uint64]*running
	spare    []*running // ended, for reuse
	acts     []Action

	committed uint64
	base      uint64 // committed at the start
	last      uint64 // highest transno executed
	told      uint64 // highest transno that a client reported

	// Of recovery.
	next    uint64 // transno that replay waits for
	queue   replayHeap
	byNo    map[uint64]*queued
	lockQ   []*queued
	serial  uint64
	current *running

	soft, hard time.Time
	size       time.Duration // of the window, without progress
	moved      time.Time     // last progress; zero: none
	tenths     int           // of the usual time for clients to come; 0: they are not told
	word       time.Time     // when it was said that they are told
	early      time.Time     // when the time for clients to come is over; zero: as soft
	st         Status

	// Life signs of all clients: the last, and since when silence counts.
	heardAny, heardSince time.Time

	owners     []owner // of what is not durable, by transno
	stopping   bool
	cleanWhole bool
}

// New returns the machine of a target that was stopped or died with prev, and
// whose log ends at transno; everything up to that is durable. instance is
// higher than prev's. Slot records of unknown clients or other generations are
// ignored.
func New(cfg Config, instance uint64, prev TargetRecord, transno uint64, clients []ClientRecord, slots []SlotRecord) *Machine {
	cfg.defaults()
	m := &Machine{
		cfg: cfg, instance: instance, state: StateFull, cleanWhole: prev.Clean,
		clients: make(map[wire.ClientID]*client, len(clients)), runs: map[uint64]*running{}, byNo: map[uint64]*queued{},
		committed: transno, base: transno, last: transno, next: transno + 1, told: prev.Transno,
	}
	for _, r := range clients {
		if _, dup := m.clients[r.Client]; !dup {
			m.insert(&client{rec: r, stored: true})
		}
	}
	for _, r := range slots {
		c := m.clients[r.Client]
		if c == nil || c.rec.Gen != r.Gen || int(r.Slot) > MaxSlot {
			continue
		}
		if s := c.slot(r.Slot); s.rec.XID < r.XID {
			s.rec = r
		}
	}
	return m
}

func (m *Machine) insert(c *client) {
	m.clients[c.rec.Client] = c
	i, _ := slices.BinarySearchFunc(m.order, c, func(a, b *client) int {
		return bytes.Compare(a.rec.Client[:], b.rec.Client[:])
	})
	m.order = slices.Insert(m.order, i, c)
}

func (c *client) slot(n uint16) *slot {
	for len(c.slots) <= int(n) {
		c.slots = append(c.slots, slot{})
	}
	return &c.slots[n]
}

func (m *Machine) act(a Action) { m.acts = append(m.acts, a) }

func (m *Machine) logf(format string, args ...any) {
	m.act(Action{Kind: ActLog, Text: fmt.Sprintf(format, args...)})
}

// warnf tells of trouble with a client.
func (m *Machine) warnf(id wire.ClientID, format string, args ...any) {
	m.act(Action{Kind: ActLog, Client: id, Warn: true, Text: fmt.Sprintf("client %s "+format, append([]any{short(id)}, args...)...)})
}

func (m *Machine) drop(h any) { m.act(Action{Kind: ActDrop, Handle: h}) }

func (m *Machine) reply(h any, st wire.Status) { m.act(Action{Kind: ActReply, Handle: h, Status: st}) }

// set replaces a held handle and drops the one before.
func (m *Machine) set(x *held, h any) {
	if x.on {
		m.drop(x.h)
	}
	*x = held{h, true}
}

// Every event starts with an empty list; it is the caller's until the next one.
func (m *Machine) begin() { m.acts = m.acts[:0] }

// Start begins the target's service at now.
func (m *Machine) Start(now time.Time) []Action {
	m.begin()
	m.started, m.heardSince = now, now
	m.act(Action{Kind: ActPutTarget, Target: TargetRecord{Instance: m.instance, Transno: m.told}})
	for _, c := range slices.Clone(m.order) {
		if c.rec.Local {
			m.remove(c, "")
			// Its process may go on without the target, and what it has sent elsewhere
			// be on the way.
			m.acts[len(m.acts)-1].Evicted = true
			m.logf("local client %s is not waited for", short(c.rec.Client))
		}
	}
	switch {
	case len(m.order) == 0:
		m.logf("no clients, serving at once")
	case m.cleanWhole:
		m.logf("stopped in order before, %d clients, no recovery", len(m.order))
	default:
		m.state = StateWaiting
		for _, c := range m.order {
			c.waited = true
			c.replayed = map[uint64]wire.Status{}
			c.locks = map[uint64]wire.Status{}
		}
		m.st.Clients = len(m.order)
		m.logf("in recovery, waiting for the first of %d clients", len(m.order))
	}
	return m.acts
}

func (m *Machine) inRecovery() bool { return m.state == StateWaiting || m.state == StateRecovering }

func short(id wire.ClientID) string { return fmt.Sprintf("%x", id[:4]) }

// hear notes a sign of life. After a time in which nobody was heard the
// silence of the others begins anew: it was the target's.
func (m *Machine) hear(c *client, now time.Time) {
	if m.heardAny.IsZero() || now.Sub(m.heardAny) > 2*m.cfg.PingInterval {
		m.heardSince = now
	}
	m.heardAny = now
	if c != nil {
		c.heard = now
	}
}

// Heard notes a sign of life of a client that came on another way (health
// beats).
func (m *Machine) Heard(id wire.ClientID, now time.Time) {
	if c := m.clients[id]; c != nil {
		m.hear(c, now)
	}
}

// Connect handles an attempt to connect. The answer is ActConnected, or
// ActReply with ErrStaleClient, ErrUnknownClient (the client is not in the table
// and recovery is on, or it was evicted: it gives up what it had and asks again
// with Instance 0), ErrTargetDown (stopped or too many clients).
func (m *Machine) Connect(r Connect, now time.Time) []Action {
	m.begin()
	if m.state == StateStopped {
		m.reply(r.Handle, wire.ErrTargetDown)
		return m.acts
	}
	if !r.Own {
		m.arm(now)
	}
	c := m.clients[r.Client]
	if r.Transno > m.last+MaxAhead {
		m.reply(r.Handle, wire.ErrProto)
		return m.acts
	}
	if c != nil && r.Gen < c.rec.Gen {
		m.reply(r.Handle, wire.ErrStaleClient)
		return m.acts
	}
	if c != nil && r.Gen == c.rec.Gen && r.Conn != 0 && r.Conn < c.conn {
		m.drop(r.Handle)
		return m.acts
	}
	m.sizeWindow(r.Estimate)
	if c != nil && r.Gen > c.rec.Gen {
		m.remove(c, "was restarted")
		m.advance(now)
		c = nil
	}
	if c == nil {
		m.connectNew(r, now)
		return m.acts
	}
	if !c.stored {
		m.set(&c.pending, r.Handle)
		c.conn = r.Conn
		return m.acts
	}
	m.hear(c, now)
	m.told = max(m.told, r.Transno)
	if r.LastCommitted > m.committed {
		m.warnf(r.Client, "was told that %d is durable, the store ends at %d: data were lost or this is another store",
			r.LastCommitted, m.committed)
	}
	first := !c.seen
	c.connected, c.seen, c.conn, c.local = true, true, r.Conn, r.Local
	if m.inRecovery() && c.waited {
		m.reconnected(c, r, first, now)
	} else {
		m.settle(c)
	}
	m.connected(c, r.Handle, true)
	m.advance(now)
	return m.acts
}

func (m *Machine) connectNew(r Connect, now time.Time) {
	switch {
	case m.inRecovery():
		m.reply(r.Handle, wire.ErrUnknownClient)
		return
	case r.Instance != 0:
		// No entry before the client has seen that it was evicted: if this
		// answer got lost, the next attempt would look like a reconnect.
		m.warnf(r.Client, "asks for what it had before its eviction")
		m.reply(r.Handle, wire.ErrUnknownClient)
		return
	case len(m.order) >= m.cfg.MaxClients:
		m.warnf(r.Client, "refused: %d clients are registered", len(m.order))
		m.reply(r.Handle, wire.ErrTargetDown)
		return
	}
	m.tickets++
	c := &client{
		rec: ClientRecord{Client: r.Client, Gen: r.Gen, Instance: m.instance, Local: r.Local},
		put: m.tickets, conn: r.Conn, local: r.Local, pending: held{r.Handle, true},
	}
	m.insert(c)
	m.hear(c, now)
	m.put(c)
	m.acts[len(m.acts)-1].Ticket = c.put
}

// put has a client's entry written.
func (m *Machine) put(c *client) {
	m.act(Action{Kind: ActPutClient, Client: c.rec.Client, Gen: c.rec.Gen, Entry: c.rec})
}

// settle notes that the target has come to a client's process, or has left it. In
// recovery such a client replays like the others.
func (m *Machine) settle(c *client) {
	if c.rec.Local == c.local {
		return
	}
	c.rec.Local = c.local
	m.put(c)
	if !c.local {
		return
	}
	for i := range m.owners {
		if o := &m.owners[i]; o.c == c {
			o.held = true // if the target dies now, the client does
		}
	}
}

// connected answers a connect.
func (m *Machine) connected(c *client, h any, known bool) {
	m.act(Action{
		Kind: ActConnected, Handle: h, Client: c.rec.Client, Gen: c.rec.Gen, Instance: m.instance,
		Known: known, Recovering: m.inRecovery(), Transno: m.last, LastCommitted: m.CommittedFor(c.rec.Client, c.rec.Gen),
	})
}

// Stored reports that the ActPutClient with the ticket was carried out, or
// failed: then the connect is answered with ErrIO and the client is not registered.
func (m *Machine) Stored(id wire.ClientID, ticket uint64, ok bool, now time.Time) []Action {
	m.begin()
	c := m.clients[id]
	if c == nil || c.put != ticket || c.stored {
		return m.acts // the client has left, and perhaps come back, meanwhile
	}
	p := c.pending
	c.pending = held{}
	if !ok {
		m.unlink(c)
		if p.on {
			m.reply(p.h, wire.ErrIO)
		}
		return m.acts
	}
	c.stored, c.seen = true, true
	if p.on {
		c.connected = true
		m.hear(c, now)
		m.connected(c, p.h, false)
	}
	return m.acts
}

// ConnLost notes that connection conn of a client is closed. Its state stays.
func (m *Machine) ConnLost(id wire.ClientID, conn uint64, now time.Time) []Action {
	m.begin()
	c := m.clients[id]
	if c == nil || c.conn != conn {
		return m.acts
	}
	c.connected = false
	for _, x := range []*held{&c.barrier, &c.pending} {
		if x.on {
			m.drop(x.h)
			*x = held{}
		}
	}
	m.advance(now)
	return m.acts
}

// Disconnect takes a client out of the table at its own wish, which came by
// connection conn (0: not known).
func (m *Machine) Disconnect(id wire.ClientID, gen, conn uint64, h any, now time.Time) []Action {
	m.begin()
	c := m.clients[id]
	switch {
	case m.state == StateStopped:
		m.reply(h, wire.ErrTargetDown)
	case c == nil || gen > c.rec.Gen:
		m.reply(h, wire.OK)
	case gen < c.rec.Gen:
		m.reply(h, wire.ErrStaleClient)
	case conn != 0 && conn != c.conn:
		m.drop(h)
	default:
		m.remove(c, "")
		m.reply(h, wire.OK)
		m.advance(now)
	}
	return m.acts
}

// Evict removes a client by order of the administrator; it reports whether the
// client was registered.
func (m *Machine) Evict(id wire.ClientID, now time.Time) (bool, []Action) {
	m.begin()
	c := m.clients[id]
	if c == nil || m.state == StateStopped {
		return false, m.acts
	}
	m.remove(c, "by the administrator")
	m.advance(now)
	return true, m.acts
}

func (m *Machine) unlink(c *client) {
	c.gone, c.connected = true, false
	delete(m.clients, c.rec.Client)
	m.order = slices.DeleteFunc(m.order, func(x *client) bool { return x == c })
}

// remove takes a client out of the table and answers what it has waiting. With
// a reason it is an eviction. What is executing goes on to its end.
func (m *Machine) remove(c *client, why string) {
	m.unlink(c)
	if why != "" {
		m.st.Evicted++
		m.warnf(c.rec.Client, "evicted: %s", why)
		m.acts[len(m.acts)-1].Reason = why
	}
	if c.waited && m.inRecovery() && c.stage != stageDone {
		m.st.VersionRecovery = true
	}
	m.act(Action{Kind: ActDelClient, Client: c.rec.Client, Gen: c.rec.Gen, Evicted: why != ""})
	m.unqueue(c)
	for _, x := range []*held{&c.barrier, &c.pending} {
		if x.on {
			m.reply(x.h, wire.ErrUnknownClient)
			*x = held{}
		}
	}
}

// Stop ends service in order: nothing new is accepted. When nothing executes
// any more ActPutTarget follows, marked clean unless recovery was on; with it
// the machine has ended.
func (m *Machine) Stop(now time.Time) []Action {
	m.begin()
	if m.state == StateStopped {
		return m.acts
	}
	m.cleanWhole = m.state == StateFull
	m.state = StateStopped
	m.st.End = now
	for _, c := range m.order {
		m.unqueueWith(c, wire.ErrTargetDown)
		for _, x := range []*held{&c.barrier, &c.pending} {
			if x.on {
				m.reply(x.h, wire.ErrTargetDown)
				*x = held{}
			}
		}
	}
	m.stopping = true
	m.stopped()
	return m.acts
}

func (m *Machine) stopped() {
	if m.stopping && len(m.runs) == 0 {
		m.stopping = false
		m.act(Action{Kind: ActPutTarget, Target: TargetRecord{
			Instance: m.instance, Clean: m.cleanWhole, Transno: max(m.told, m.last),
		}})
	}
}

// Committed notes that everything up to transno is durable.
func (m *Machine) Committed(transno uint64) {
	if transno <= m.committed {
		return
	}
	m.committed = transno
	n := 0
	for n < len(m.owners) && m.owners[n].transno <= transno {
		n++
	}
	m.owners = slices.Delete(m.owners, 0, n)
}

// CommittedFor gives the LastCommitted of answers to a client: not what is
// durable if that covers a replay of its that failed, and 0 for clients that are
// not registered, since what is durable may not be theirs.
func (m *Machine) CommittedFor(id wire.ClientID, gen uint64) uint64 {
	c := m.clients[id]
	switch {
	case c == nil || c.rec.Gen != gen:
		return 0
	case c.rec.FailedAt != 0:
		return min(m.committed, c.rec.FailedAt-1)
	}
	return m.committed
}

// Tick lets time have its effects: the end of the recovery window, and the
// eviction of clients that are not heard.
func (m *Machine) Tick(now time.Time) []Action {
	m.begin()
	switch m.state {
	case StateRecovering:
		m.expire(now)
	case StateFull:
		m.evictSilent(now)
	}
	return m.acts
}

func (m *Machine) silentSince(c *client) time.Time {
	t := m.heardSince
	for _, x := range [...]time.Time{c.heard, c.answered} {
		if x.After(t) {
			t = x
		}
	}
	return t
}

func (m *Machine) evictSilent(now time.Time) {
	// Who hears nobody has lost its own network.
	if m.cfg.PingTimeout < 0 || m.heardAny.IsZero() || now.Sub(m.heardAny) > m.cfg.PingInterval {
		return
	}
	for _, c := range slices.Clone(m.order) {
		if silent := now.Sub(m.silentSince(c)); c.canBeSilent() && silent > m.cfg.PingTimeout {
			m.remove(c, fmt.Sprintf("not heard for %s", silent.Round(time.Millisecond)))
		}
	}
}

// canBeSilent: a client whose request is under way is owed an answer, and one in
// the target's process is there as long as the target is.
func (c *client) canBeSilent() bool { return c.stored && c.busy == 0 && !c.rec.Local }

// NextTick returns when Tick has something to do at the earliest, which may be
// now, and false when that depends on other events.
func (m *Machine) NextTick(now time.Time) (time.Time, bool) {
	switch m.state {
	case StateRecovering:
		return m.deadline(), true
	case StateFull:
		if m.cfg.PingTimeout < 0 || m.heardAny.IsZero() {
			return time.Time{}, false
		}
		var first time.Time
		for _, c := range m.order {
			if t := m.silentSince(c); c.canBeSilent() && (first.IsZero() || t.Before(first)) {
				first = t
			}
		}
		at := first.Add(m.cfg.PingTimeout + 1)
		if at.Before(now) {
			at = now
		}
		// Later than this nobody is evicted before somebody else is heard.
		return at, !first.IsZero() && at.Sub(m.heardAny) <= m.cfg.PingInterval
	}
	return time.Time{}, false
}

// Config returns the limits, with the defaults filled in.
func (m *Machine) Config() Config { return m.cfg }

// Instance numbers the target's starts. It does not change.
func (m *Machine) Instance() uint64 { return m.instance }

// Executing is the number of modifying requests that are being executed.
func (m *Machine) Executing() int { return len(m.runs) }

// State returns what the target does with requests.
func (m *Machine) State() State { return m.state }

// NextTransno is the number that the next new operation gets at least: higher
// than all that were executed or told to a client, even if they are lost.
func (m *Machine) NextTransno() uint64 { return max(m.last, m.told) + 1 }

// Status returns the figures for administrators.
func (m *Machine) Status() Status {
	s := m.st
	s.State, s.Instance = m.state, m.instance
	s.Deadline, s.Hard, s.Tenths = m.deadline(), m.hard, m.tenths
	s.Registered = len(m.order)
	s.Queued, s.Executing = len(m.queue)+len(m.lockQ), len(m.runs)
	s.LastCommitted = m.committed
	s.NextTransno = m.NextTransno()
	if m.inRecovery() {
		s.NextTransno = m.next
	}
	s.Connected = 0
	for _, c := range m.order {
		if c.connected {
			s.Connected++
		}
		if m.inRecovery() && c.waited && c.stage == stageDone {
			s.Finished++
		}
	}
	return s
}

// ClientStatus describes an entry of the client table.
type ClientStatus struct {
	ClientRecord
	Connected bool
	Heard     time.Time // zero: not since the start
	Finished  bool      // in recovery: has ended its replay
	Missing   bool      // in recovery: has not connected
	Failed    bool      // in recovery: a replay had other versions
	Stage     string    // in recovery, of clients that are waited for: what it replays
	Queued    int       // replays put aside
	Executing int
}

func (s stage) String() string {
	return [...]string{"requests", "locks", "waiting locks", "done"}[s]
}

// Clients lists the client table by client ID.
func (m *Machine) Clients() []ClientStatus {
	out := make([]ClientStatus, 0, len(m.order))
	for _, c := range m.order {
		s := ClientStatus{ClientRecord: c.rec, Connected: c.connected, Heard: c.heard, Queued: c.queued, Executing: c.busy}
		if m.inRecovery() && c.waited {
			s.Stage, s.Finished, s.Missing, s.Failed = c.stage.String(), c.stage == stageDone, !c.seen, c.rec.FailedAt != 0
		}
		out = append(out, s)
	}
	return out
}

func byTransno(a, b *queued) int {
	if n := cmp.Compare(a.req.Transno, b.req.Transno); n != 0 {
		return n
	}
	return cmp.Compare(a.serial, b.serial)
}
