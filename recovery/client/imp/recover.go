package imp

import (
	"cmp"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// notYet is the reason of an import that never was connected.
const notYet = "not yet connected"

// Start is the input that the import is to be used from now on.
func (m *Machine) Start(now int64) {
	m.now, m.awaySince, m.retryAt = now, now, now
	m.reason = notYet
	m.step()
	m.arm()
}

// Tick is the input that time has passed.
func (m *Machine) Tick(now int64) {
	m.now = max(m.now, now)
	if m.timerAt <= m.now {
		m.timerAt = 0
	}
	m.syncWaits = false
	m.slow -= m.slow / 16
	switch {
	case m.state == Connecting && m.now >= m.deadline:
		m.act(Action{Kind: ActAbort})
		m.connectFailed()
	case m.state.connected():
		m.watch()
	}
	if m.state == Full {
		m.commitEarly()
	}
	m.step()
	m.arm()
}

// watch gives up a connection that is silent and pings one that is idle.
func (m *Machine) watch() {
	heard := max(m.lastHeard, m.busySince)
	if m.short > 0 && m.now-heard >= int64(m.cfg.DeadAfter) {
		m.lose("nothing heard", 0)
		return
	}
	if t := int64(m.cfg.RequestTimeout); t > 0 && m.state == Full {
		r := m.flight.head
		for r != nil && r.Long {
			r = r.next
		}
		if r != nil && m.now-r.at >= t {
			m.lose("request not answered", 0)
			return
		}
	}
	p := int64(m.cfg.PingInterval)
	if m.now-m.lastPing < p || m.now-min(m.lastSent, m.lastHeard) < p || m.pings >= maxPings {
		return
	}
	// What is not committed yet is asked for: only an answer tells that it is.
	if m.left || m.pingless && m.watched && m.short == 0 && m.replay.n == 0 {
		return
	}
	m.pings++
	m.lastPing = m.now
	m.send(&Request{kind: Ping}, 0)
}

// internal handles the return of a request of the machine's own; o is nil when
// it was not answered.
func (m *Machine) internal(r *Request, o *Outcome) {
	m.act(Action{Kind: ActRelease, Req: r})
	switch r.kind {
	case Ping:
		m.pings--
	case Sync:
		m.syncOut = false
	case Lock:
		m.locksOut--
	}
	if o == nil {
		return
	}
	switch o.Status {
	case wire.ErrUnknownClient:
		if m.state.connected() {
			m.evict(r.kind.String() + " refused")
		}
		return
	case wire.ErrStaleClient:
		m.stop(wire.ErrStaleClient)
		return
	case wire.ErrRecovering, wire.ErrTargetDown:
		m.lose("target answered "+o.Status.String(), m.pause(m.cfg.RetryDelay))
		return
	}
	switch {
	case r.kind == Sync:
		if o.Status != wire.OK {
			m.event(Event{Kind: EvSyncFailed, Status: o.Status})
		}
		// One that has not helped is not repeated at once.
		m.syncWaits = o.Status != wire.OK || m.committed < r.transno
	case r.kind == Lock && m.state == ReplayLocks && m.locksOut == 0:
		m.lastReplay()
	case r.kind == LastReplay && o.Status != wire.OK:
		m.lose("last replay answered "+o.Status.String(), m.pause(m.cfg.RetryDelay))
	case r.kind == LastReplay && m.state == ReplayWait:
		m.recover()
	}
}

// lose gives up the connection; another is tried after the delay, at the
// earliest when everything has been given back.
func (m *Machine) lose(reason string, delay time.Duration) {
	if !m.state.connected() {
		return
	}
	m.act(Action{Kind: ActDrop})
	m.cursor = nil
	m.awaySince, m.reason = m.now, reason
	m.again(delay)
	m.tried, m.round = 0, 0
	m.setState(Disconnected)
	m.arm()
}

// again sets the time of the next attempt. A connection that breaks as soon as it
// is in use does not make the import busy.
func (m *Machine) again(delay time.Duration) {
	if m.fullAt != 0 && m.now-m.fullAt < int64(m.cfg.BackoffMin) {
		delay = max(delay, m.pause(m.cfg.BackoffMin))
	}
	m.retryAt = m.now + int64(delay)
}

// step connects when it is time to.
func (m *Machine) step() {
	if m.state != Disconnected && m.state != Evicted || m.out > 0 || m.inactive || m.left || m.now < m.retryAt {
		if m.state == Disconnected || m.state == Evicted {
			m.arm()
		}
		return
	}
	m.attempt++
	m.deadline = m.now + int64(m.cfg.ConnectTimeout)
	m.setState(Connecting)
	m.act(Action{Kind: ActConnect, Addr: m.addr, Connect: ConnectArgs{
		Attempt: m.attempt, Instance: m.instance, Transno: m.highest, LastCommitted: m.committed,
		Waited: time.Duration(m.now - m.awaySince), Service: time.Duration(m.slow),
	}})
	m.arm()
}

// arm asks for the next Tick.
func (m *Machine) arm() {
	var at int64
	switch {
	case m.state == Connecting:
		at = m.deadline
	case m.state.connected():
		if m.timerAt > m.now && m.timerAt <= m.now+int64(m.cfg.PingInterval) {
			return
		}
		at = m.now + int64(m.cfg.PingInterval)/4
	case (m.state == Disconnected || m.state == Evicted) && m.out == 0 && !m.inactive && !m.left && m.retryAt > m.now:
		at = m.retryAt
	default:
		return
	}
	if at != m.timerAt {
		m.timerAt = at
		m.act(Action{Kind: ActTimer, At: at})
	}
}

func (m *Machine) pause(d time.Duration) time.Duration {
	if m.cfg.Jitter != nil {
		d += m.cfg.Jitter(d)
	}
	return d
}

// ConnectFailed is the input that the attempt has led to no connection.
func (m *Machine) ConnectFailed(now int64, attempt uint64) {
	m.now = max(m.now, now)
	if m.state == Connecting && attempt == m.attempt {
		m.connectFailed()
		m.step()
		m.arm()
	}
}

// connectFailed goes on to the next address, after a pause when all had their turn.
func (m *Machine) connectFailed() {
	m.report()
	m.setState(Disconnected)
	m.retryAt = m.now
	m.addr = (m.addr + 1) % m.cfg.Addrs
	if m.tried++; m.tried < m.cfg.Addrs {
		return
	}
	m.tried = 0
	d := m.cfg.BackoffMax
	if m.round < 32 {
		d = min(d, m.cfg.BackoffMin<<m.round)
		if d <= 0 {
			d = m.cfg.BackoffMax
		}
	}
	m.round++
	m.retryAt = m.now + int64(m.pause(d))
}

// report tells the owner and the impatient that the target is away.
func (m *Machine) report() {
	if m.reported {
		return
	}
	m.reported = true
	m.event(Event{Kind: EvLost, Reason: m.reason})
	for _, l := range []*list{&m.flight, &m.waitRead, &m.waitMod} {
		for r := l.head; r != nil; {
			next := r.next
			if r.NoWait && !r.out {
				m.finish(r, wire.ErrTargetDown)
			}
			r = next
		}
	}
}

// ConnectResult is the answer to OpConnect.
type ConnectResult struct {
	Status                 wire.Status
	Instance               uint64
	Recovering, Known      bool
	Transno, LastCommitted uint64
	// Local: the target is in this process and fails with it.
	Local bool
	// Pingless: the target does without pings while its node is watched.
	Pingless bool
}

// Connected is the input that the attempt was answered. It reports whether the
// connection is used from now on; if not, it is to be closed.
func (m *Machine) Connected(now int64, attempt uint64, c ConnectResult) bool {
	m.now = max(m.now, now)
	if m.state != Connecting || attempt != m.attempt {
		return false
	}
	defer m.arm()
	switch c.Status {
	case wire.OK:
	case wire.ErrStaleClient:
		m.stop(wire.ErrStaleClient)
		return false
	case wire.ErrUnknownClient, wire.ErrRecovering, wire.ErrJukebox:
		// It is there, but not for us yet; so stay with this address.
		if c.Status == wire.ErrUnknownClient && m.instance != 0 {
			m.evict("not in the client table")
			m.step() // as a new client
			return false
		}
		if !m.reported {
			m.reason = "connect refused: " + c.Status.String()
		}
		m.report()
		m.setState(Disconnected)
		m.retryAt = m.now + int64(m.pause(m.cfg.RetryDelay))
		m.step()
		return false
	default:
		m.event(Event{Kind: EvRefused, Status: c.Status})
		m.connectFailed()
		m.step()
		return false
	}
	m.tried, m.round = 0, 0
	if !c.Known && m.instance != 0 {
		m.evict("not in the client table")
		m.step() // as a new client
		return false
	}
	restarted := m.instance != 0 && c.Instance != m.instance
	m.local, m.pingless = c.Local, c.Pingless
	m.instance = c.Instance
	m.highest = max(m.highest, c.Transno)
	m.committed = max(m.committed, c.LastCommitted)
	m.prune(true)
	if !c.Recovering {
		// A target that needs no recovery has what it has committed, epochs too.
		for r := m.opens.head; r != nil; r = r.next {
			r.inst = m.instance
		}
	}
	n := m.unreplayed()
	if restarted || m.reported {
		m.event(Event{Kind: EvRestored, Instance: m.instance, N: n})
	}
	m.lastHeard, m.lastSent, m.busySince = m.now, m.now, m.now
	m.syncWaits = false
	if n == 0 && !c.Recovering {
		m.recover()
		return true
	}
	m.setState(Replay)
	m.cursor, m.inOpens = m.opens.head, true
	m.nextReplay()
	return true
}

func (m *Machine) unreplayed() int {
	n := 0
	for _, l := range []*list{&m.opens, &m.replay} {
		for r := l.head; r != nil; r = r.next {
			if r.inst != m.instance {
				n++
			}
		}
	}
	return n
}

// nextReplay sends as many replays as may be unanswered, in transno order, and
// goes on to the next stage after the last answer. Requests with open epochs are
// older than all others.
func (m *Machine) nextReplay() {
	for m.replaysOut < m.cfg.ReplayWindow {
		if m.cursor == nil {
			if !m.inOpens {
				break
			}
			m.inOpens, m.cursor = false, m.replay.head
			continue
		}
		r := m.cursor
		m.cursor = r.next
		if r.inst == m.instance || r.out {
			continue
		}
		m.replaysOut++
		r.replay = true
		m.send(r, wire.FlagReplay)
	}
	if m.replaysOut > 0 {
		return
	}
	m.setState(ReplayLocks)
	if m.cfg.Locks {
		m.askedLocks = true
		m.act(Action{Kind: ActLocks})
		return
	}
	m.lastReplay()
}

// replayed handles the answer to a replay. Whatever it says, the target judges
// after the last one.
func (m *Machine) replayed(r *Request, o *Outcome) {
	r.replay = false
	m.replaysOut--
	if r.dropped {
		m.act(Action{Kind: ActRelease, Req: r})
	}
	switch o.Status {
	case wire.ErrUnknownClient:
		if m.state.connected() {
			m.evict("replay refused")
		}
		return
	case wire.ErrStaleClient:
		m.stop(wire.ErrStaleClient)
		return
	case wire.ErrRecovering, wire.ErrTargetDown:
		r.maybe = true
		m.lose("target answered "+o.Status.String(), m.pause(m.cfg.RetryDelay))
		return
	}
	r.maybe, r.inst = false, m.instance
	m.prune(false)
	if o.Status != r.status {
		m.event(Event{Kind: EvReplayDiffers, Status: o.Status, Was: r.status})
	}
	if m.state == Replay {
		m.nextReplay()
	}
}

// Locks is the answer to ActLocks: locks 0..n-1 are to be replayed, the granted
// ones before those that wait.
func (m *Machine) Locks(n int) {
	if m.state != ReplayLocks || !m.askedLocks {
		return
	}
	m.askedLocks = false
	if n <= 0 {
		m.lastReplay()
		return
	}
	m.locksOut = n
	for i := range n {
		m.send(&Request{kind: Lock, XID: uint64(i)}, wire.FlagReplay)
	}
}

func (m *Machine) lastReplay() {
	m.setState(ReplayWait)
	m.send(&Request{kind: LastReplay}, wire.FlagLastReplay)
}

// recover sends the unanswered requests again, in XID order, and lets new ones pass.
func (m *Machine) recover() {
	m.setState(Recover)
	again := make([]*Request, 0, m.flight.n)
	for r := m.flight.head; r != nil; r = r.next {
		again = append(again, r)
	}
	slices.SortStableFunc(again, func(a, b *Request) int { return cmp.Compare(a.XID, b.XID) })
	for _, r := range again {
		r.unlink()
		m.flight.push(r)
		m.send(r, 0)
	}
	m.reported, m.fullAt = false, m.now
	m.setState(Full)
	m.flush()
	m.commitEarly()
}

// evict gives up everything that depended on the target's memory of this client.
func (m *Machine) evict(reason string) {
	m.retryAt = m.now
	if m.state == Closed {
		return
	}
	if m.state.connected() {
		m.act(Action{Kind: ActDrop})
		m.awaySince, m.reason = m.now, "evicted"
		m.again(0)
	}
	m.setState(Evicted)
	m.event(Event{Kind: EvEvicted, Reason: reason, Instance: m.instance, N: m.replay.n, Epochs: len(m.epochs), Unkept: m.unkept > m.committed, Transno: m.highest})
	m.forget(true)
	m.instance, m.highest, m.committed, m.unkept = 0, 0, 0, 0
	for r := m.flight.head; r != nil; {
		next := r.next
		switch {
		case !r.Modifies:
		case r.out:
			r.evicted = true
		default:
			m.finish(r, wire.ErrUnknownClient)
		}
		r = next
	}
	for r := m.waitMod.head; r != nil; r = m.waitMod.head {
		m.finish(r, wire.ErrUnknownClient)
	}
}

// forget releases everything kept.
func (m *Machine) forget(lost bool) {
	m.cursor = nil
	for _, l := range []*list{&m.opens, &m.replay} {
		for r := l.head; r != nil; r = l.head {
			if lost {
				m.act(Action{Kind: ActLost, Req: r, Kept: l == &m.opens})
			}
			r.opens = nil // they are on the list themselves, and gone already
			m.release(r)
		}
	}
	clear(m.epochs)
}

// failAll answers every request with st, those at the transport when they come back.
func (m *Machine) failAll(st wire.Status) {
	for _, l := range []*list{&m.flight, &m.waitRead, &m.waitMod} {
		for r := l.head; r != nil; {
			next := r.next
			if r.out {
				r.dead, r.deadSt = true, st
			} else {
				m.finish(r, st)
			}
			r = next
		}
	}
}

// hangUp ends the connection or the attempt at one.
func (m *Machine) hangUp() {
	switch {
	case m.state.connected():
		m.act(Action{Kind: ActDrop})
		m.awaySince = m.now
	case m.state == Connecting:
		m.act(Action{Kind: ActAbort})
	}
	m.cursor = nil
}

// stop ends the import for good.
func (m *Machine) stop(st wire.Status) {
	if m.state == Closed {
		return
	}
	m.hangUp()
	m.setState(Closed)
	m.fatal = st
	if st == wire.ErrStaleClient {
		m.event(Event{Kind: EvStale})
	}
	m.forget(st == wire.ErrStaleClient)
	m.failAll(st)
}

// Close is the input that the import is not needed any more. Requests fail with
// ErrTargetDown; those at the transport when it gives them back.
func (m *Machine) Close() { m.stop(wire.ErrTargetDown) }

// Deactivate is the administrator's order to wait no longer for the target:
// requests fail with ErrIO until Activate. What is kept for replay stays.
func (m *Machine) Deactivate() {
	if m.inactive || m.state == Closed {
		return
	}
	m.inactive = true
	m.hangUp()
	m.setState(Disconnected)
	m.reason = "deactivated"
	m.failAll(wire.ErrIO)
}

// Activate takes Deactivate back.
func (m *Machine) Activate(now int64) {
	m.now = max(m.now, now)
	if !m.inactive {
		return
	}
	m.inactive = false
	m.retryAt, m.tried, m.round = m.now, 0, 0
	m.step()
	m.arm()
}

// Notice is the news, as from the MGS, that the target runs as the instance (0:
// not told) at address addr (-1: not told); addrs is the number of addresses, 0
// when unchanged. It is a hint: it makes the import look at once.
func (m *Machine) Notice(now int64, instance uint64, addr, addrs int) {
	m.now = max(m.now, now)
	if addrs > 0 {
		m.cfg.Addrs = addrs
		m.addr %= addrs
	}
	if m.state == Closed || m.state.connected() && (instance == 0 || instance <= m.instance) {
		return
	}
	moved := addr >= 0 && addr < m.cfg.Addrs && addr != m.addr
	if moved {
		m.addr = addr
	}
	switch {
	case m.state.connected():
		m.lose("told of a restart", 0)
	case m.state == Connecting && (moved || addrs > 0):
		m.act(Action{Kind: ActAbort})
		m.setState(Disconnected)
	}
	m.tried, m.round = 0, 0 // it may be too early: the next attempts are to follow soon
	if m.state != Connecting {
		m.retryAt = m.now
	}
	m.step()
	m.arm()
}

// Down is the input that the connection has broken, for transports that notice
// without a request.
func (m *Machine) Down(now int64) {
	m.now = max(m.now, now)
	m.lose("connection closed", 0)
	m.step()
	m.arm()
}
