package recov

import (
	"container/heap"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// queued is a replay that is put aside.
type queued struct {
	c      *client
	req    Request
	serial uint64 // order of arrival
}

type replayHeap []*queued

func (h replayHeap) Len() int           { return len(h) }
func (h replayHeap) Less(i, j int) bool { return byTransno(h[i], h[j]) < 0 }
func (h replayHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *replayHeap) Push(x any)        { *h = append(*h, x.(*queued)) }
func (h *replayHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return x
}

// arm starts the window at the first attempt to connect.
func (m *Machine) arm(now time.Time) {
	if m.state != StateWaiting {
		return
	}
	m.state = StateRecovering
	m.st.Start = now
	m.soft, m.hard = now.Add(m.cfg.SoftMin), now.Add(m.cfg.Hard)
	m.size = m.cfg.SoftMin
	m.act(Action{Kind: ActWindowStart, Deadline: m.soft})
	m.logf("recovery window of %s begins, %s at most", m.cfg.SoftMin, m.cfg.Hard)
	m.hurry()
}

// sizeWindow makes the window long enough for two of a client's waiting times.
func (m *Machine) sizeWindow(estimate time.Duration) {
	if m.state != StateRecovering {
		return
	}
	if d := min(2*max(0, min(estimate, m.cfg.SoftMax)), m.cfg.SoftMax); d > m.size {
		m.size = d
		m.extend(m.st.Start.Add(d), 0)
		m.hurry()
	}
}

// What is left at least of the window and of a step when clients are told that the
// target is back. They are told in milliseconds, but may have to get up themselves.
const (
	leastWindow = 2 * time.Second
	leastStep   = time.Second
)

// part is what remains of a time when clients are told.
func (m *Machine) part(d, least time.Duration) time.Duration {
	return max(d*time.Duration(m.tenths)/10, min(d, least))
}

// Shorten tells that all clients are told that the target is back, so that it need not
// wait for their time-outs: clients that have not come yet are given only this many
// tenths (1..10) of the window, from now on or from its begin if that is later, and of
// what progress adds to it. For those that have come, nothing changes. The last word
// counts; it ends with the recovery.
func (m *Machine) Shorten(tenths int, now time.Time) []Action {
	m.begin()
	if !m.inRecovery() || tenths < 1 || tenths > 10 || tenths == m.tenths {
		return m.acts
	}
	m.tenths, m.word = tenths, now
	m.logf("clients are told that the target is back, so it waits for those that do not come %d/10 of the usual time", tenths)
	m.hurry()
	return m.acts
}

// hurry sets the time for clients that have not come, if it is to be shorter.
func (m *Machine) hurry() {
	if m.tenths == 0 || m.state != StateRecovering {
		return
	}
	begin := m.st.Start
	if m.word.After(begin) {
		begin = m.word
	}
	m.early = begin.Add(m.part(m.size, leastWindow))
	if t := m.moved.Add(m.part(m.cfg.Step, leastStep)); !m.moved.IsZero() && t.After(m.early) {
		m.early = t
	}
}

// deadline is when the window runs out for somebody.
func (m *Machine) deadline() time.Time {
	if !m.early.IsZero() && m.early.Before(m.soft) && m.absent() {
		return m.early
	}
	return m.soft
}

// absent tells whether recovery waits for clients that have not come yet.
func (m *Machine) absent() bool {
	return slices.ContainsFunc(m.order, func(c *client) bool { return c.waited && !c.seen })
}

// extend moves the deadline to t if that is later by at least least.
func (m *Machine) extend(t time.Time, least time.Duration) {
	if t.After(m.hard) {
		t = m.hard
	}
	if d := t.Sub(m.soft); d > least || d > 0 && t.Equal(m.hard) {
		m.soft = t
		m.act(Action{Kind: ActWindowExtend, Deadline: t})
	}
}

// progress extends the window; small steps are not worth a message.
func (m *Machine) progress(now time.Time) {
	if m.state == StateRecovering {
		m.moved = now
		m.extend(now.Add(m.cfg.Step), m.cfg.Step/4)
		m.hurry()
	}
}

// reconnected notes a known client's connect in recovery. It may replay from the
// start; how far it has come stays true.
func (m *Machine) reconnected(c *client, r Connect, first bool, now time.Time) {
	c.told = r.Transno
	if c.barrier.on {
		m.drop(c.barrier.h) // it was asked for over a connection that is gone
		c.barrier = held{}
	}
	if first {
		b := 0
		for d := now.Sub(m.st.Start); d >= time.Second<<b && b < ReconnectBuckets-1; b++ {
		}
		m.st.Reconnects[b]++
		m.progress(now)
	}
}

func (m *Machine) recovering(c *client, r Request, now time.Time) {
	switch {
	case !c.waited:
		m.reply(r.Handle, wire.ErrRecovering)
	case r.Flags&wire.FlagLastReplay != 0:
		m.set(&c.barrier, r.Handle)
		m.reach(c, stageDone, now)
		m.advance(now)
	case r.Class == ClassPing:
		m.reply(r.Handle, wire.OK)
	case r.Flags&wire.FlagReplay == 0:
		m.reply(r.Handle, wire.ErrRecovering)
	case r.Class == ClassLock || r.Class == ClassWait:
		m.replayLock(c, r, now)
	case r.Class == ClassModify || r.Class == ClassOpen:
		m.replay(c, r, now)
	default:
		m.reply(r.Handle, wire.ErrProto)
	}
}

func (m *Machine) reach(c *client, s stage, now time.Time) {
	if c.stage < s {
		c.stage = s
		m.progress(now)
	}
}

// replay puts a request replay in its place, or answers it when it was executed.
func (m *Machine) replay(c *client, r Request, now time.Time) {
	if r.Transno == 0 || r.Transno > m.base+MaxAhead || r.XID == 0 || int(r.Slot) >= m.cfg.MaxSlots {
		m.reply(r.Handle, wire.ErrProto)
		return
	}
	s := c.slot(r.Slot)
	if st, ok := c.replayed[r.Transno]; ok || r.Transno <= m.base && r.Class != ClassOpen {
		switch {
		case s.rec.XID == r.XID:
			m.fromSlot(r.Handle, &s.rec)
		case ok:
			m.known(r.Handle, r.Transno, st)
		case c.rec.FailedAt != 0 && r.Transno >= c.rec.FailedAt:
			m.known(r.Handle, 0, VersionMismatch)
		default:
			m.known(r.Handle, r.Transno, wire.OK)
		}
		return
	}
	if cur := m.current; cur != nil && cur.c == c && cur.req.XID == r.XID && cur.req.Transno == r.Transno {
		m.set(&cur.dup, r.Handle)
		return
	}
	if q := m.byNo[r.Transno]; q != nil {
		if q.c != c || q.req.XID != r.XID {
			m.warnf(r.Client, "replays transno %d, which is another request's", r.Transno)
			m.reply(r.Handle, wire.ErrProto)
			return
		}
		// The copy's handle and body count, the older may be of a dead connection.
		m.drop(q.req.Handle)
		q.req = r
		return
	}
	if c.queued >= m.cfg.MaxSlots {
		m.reply(r.Handle, wire.ErrProto)
		return
	}
	m.serial++
	q := &queued{c: c, req: r, serial: m.serial}
	c.queued++
	m.byNo[r.Transno] = q
	heap.Push(&m.queue, q)
	m.advance(now)
}

func (m *Machine) replayLock(c *client, r Request, now time.Time) {
	if r.XID == 0 {
		m.reply(r.Handle, wire.ErrProto)
		return
	}
	if r.Class == ClassLock {
		m.reach(c, stageLocks, now)
	} else {
		m.reach(c, stageWaits, now)
	}
	if st, ok := c.locks[r.XID]; ok {
		m.known(r.Handle, 0, st)
		return
	}
	if cur := m.current; cur != nil && cur.c == c && cur.req.XID == r.XID {
		m.set(&cur.dup, r.Handle)
		return
	}
	mine := 0
	for _, q := range m.lockQ {
		if q.c != c {
			continue
		}
		if q.req.XID == r.XID {
			m.drop(q.req.Handle)
			q.req = r
			return
		}
		mine++
	}
	if mine >= m.cfg.MaxSlots {
		m.reply(r.Handle, wire.ErrProto)
		return
	}
	m.serial++
	m.lockQ = append(m.lockQ, &queued{c: c, req: r, serial: m.serial})
	m.advance(now)
}

func (m *Machine) unqueue(c *client) { m.unqueueWith(c, wire.ErrUnknownClient) }

// unqueueWith answers what a client has in the queues with st.
func (m *Machine) unqueueWith(c *client, st wire.Status) {
	mine := func(q *queued) bool {
		if q.c == c {
			m.reply(q.req.Handle, st)
		}
		return q.c == c
	}
	if c.queued > 0 {
		m.queue = slices.DeleteFunc(m.queue, func(q *queued) bool {
			if q.c == c {
				delete(m.byNo, q.req.Transno)
			}
			return mine(q)
		})
		heap.Init(&m.queue)
		c.queued = 0
	}
	m.lockQ = slices.DeleteFunc(m.lockQ, mine)
}

// advance executes what is next, as far as one can go, and ends recovery when
// all are through.
func (m *Machine) advance(now time.Time) {
	if m.state != StateRecovering {
		return
	}
	for m.current == nil {
		if q := m.pick(); q != nil {
			m.current = m.execute(q.c, q.req, true)
			return
		}
		if !m.evictFailed() {
			break
		}
	}
	if m.current == nil && len(m.queue) == 0 && len(m.lockQ) == 0 && m.reached(stageDone) {
		m.end(now)
	}
}

// evictFailed evicts a client that has ended its replay and whose versions did
// not match.
func (m *Machine) evictFailed() bool {
	for _, c := range m.order {
		if c.rec.FailedAt != 0 && c.stage == stageDone && c.queued == 0 {
			m.remove(c, "its replay depends on what is lost")
			return true
		}
	}
	return false
}

// reached tells whether all clients that recovery waits for have come to s.
func (m *Machine) reached(s stage) bool {
	for _, c := range m.order {
		if c.waited && c.stage < s {
			return false
		}
	}
	return true
}

// pick takes the next replay out of the queues.
func (m *Machine) pick() *queued {
	if len(m.queue) > 0 {
		q := m.queue[0]
		t := q.req.Transno
		if t > m.next && !m.skip(t) {
			return nil
		}
		heap.Pop(&m.queue)
		delete(m.byNo, t)
		q.c.queued--
		return q
	}
	if len(m.lockQ) == 0 || !m.reached(stageLocks) {
		return nil
	}
	i := slices.IndexFunc(m.lockQ, func(q *queued) bool { return q.req.Class == ClassLock })
	if i < 0 {
		if !m.reached(stageWaits) {
			return nil
		}
		i = slices.Index(m.lockQ, slices.MinFunc(m.lockQ, byTransno))
	}
	q := m.lockQ[i]
	m.lockQ = slices.Delete(m.lockQ, i, i+1)
	return q
}

// skip decides whether the hole before t can be closed by nobody. The lowest
// queued number is t, so a client with something in the queue has no lower one.
func (m *Machine) skip(t uint64) bool {
	for _, c := range m.order {
		if c.waited && c.stage == stageReplay && c.queued == 0 && (!c.seen || c.told >= m.next) {
			return false
		}
	}
	m.st.Gaps++
	if m.st.VersionRecovery {
		m.logf("transno %d to %d are lost with a client, versions decide from here", m.next, t-1)
	} else {
		m.logf("transno %d to %d: no client was told of them", m.next, t-1)
	}
	m.next = t
	return true
}

func (m *Machine) executedReplay(run *running, res Result, now time.Time) {
	c, r := run.c, &run.req
	if m.current == run {
		m.current = nil
	}
	a := Action{Kind: ActReply, Handle: r.Handle, Status: res.Status}
	switch {
	case res.NotDone:
	case r.Class == ClassLock || r.Class == ClassWait:
		m.st.LockReplays++
		if c.locks != nil {
			c.locks[r.XID] = res.Status
		}
	default:
		a.Transno = r.Transno
		m.st.Replayed++
		m.last = max(m.last, r.Transno)
		m.next = max(m.next, r.Transno+1)
		if res.Mismatch {
			m.st.Failed++
			a.Status, a.Transno = VersionMismatch, 0
			if c.rec.FailedAt == 0 && !c.gone {
				// Before anything with a higher number: once that is durable, the
				// client would take this one for durable, too.
				c.rec.FailedAt = r.Transno
				m.put(c)
				m.warnf(r.Client, "replays transno %d, which meets other versions than before: it will be evicted", r.Transno)
			}
		} else {
			res.Transno = r.Transno
			if s := c.slot(r.Slot); s.rec.XID < r.XID {
				s.rec = slotOf(c, r, res)
			}
			m.own(c, r.Transno, false)
		}
		if c.replayed != nil {
			c.replayed[r.Transno] = a.Status
		}
	}
	if c.gone {
		a.Status, a.Transno = wire.ErrUnknownClient, 0
	}
	m.act(a)
	if run.dup.on {
		a.Handle, a.Reconstructed = run.dup.h, !res.NotDone && !c.gone
		m.act(a)
	}
	if !res.NotDone {
		m.progress(now)
	}
	m.advance(now)
}

// expire acts when the window has run out.
func (m *Machine) expire(now time.Time) {
	if now.Before(m.deadline()) {
		return
	}
	over := !now.Before(m.hard)
	n := 0
	evict := func(why string, cond func(*client) bool) {
		for _, c := range slices.Clone(m.order) {
			if c.waited && c.stage != stageDone && cond(c) {
				m.remove(c, why)
				n++
			}
		}
	}
	switch {
	case over:
		evict("not through with its replay at the hard limit", func(*client) bool { return true })
	case now.Before(m.soft):
		evict("told that the target is back, and not there at the end of the shorter window", func(c *client) bool { return !c.seen })
		m.advance(now)
		return
	default:
		evict("not there at the end of the recovery window", func(c *client) bool { return !c.connected })
		if n == 0 {
			evict("silent at the end of the recovery window", func(c *client) bool {
				return c.queued == 0 && c.busy == 0 && !slices.ContainsFunc(m.lockQ, func(q *queued) bool { return q.c == c })
			})
		}
	}
	if !over && (!m.reached(stageDone) || len(m.queue) > 0 || len(m.lockQ) > 0) {
		m.extend(now.Add(m.cfg.Step), 0) // for those who are left
	}
	m.advance(now)
	if m.state == StateRecovering && !m.soft.After(now) {
		m.soft = now.Add(m.cfg.Step) // what executes is waited for
	}
}

// Abort ends recovery at once: clients that are not through are evicted. It
// reports whether the target was in recovery.
func (m *Machine) Abort(now time.Time) (bool, []Action) {
	m.begin()
	if !m.inRecovery() {
		return false, m.acts
	}
	m.st.Aborted = true
	if m.state == StateWaiting {
		m.state = StateRecovering
		m.st.Start, m.soft, m.hard = now, now, now
	}
	m.logf("recovery aborted by the administrator")
	for _, c := range slices.Clone(m.order) {
		if c.waited && c.stage != stageDone {
			m.remove(c, "recovery aborted")
		}
	}
	m.advance(now)
	return true, m.acts
}

func (m *Machine) end(now time.Time) {
	m.state = StateFull
	m.st.End = now
	m.heardSince = now
	for _, c := range m.order {
		c.replayed, c.locks = nil, nil
		if c.waited {
			m.st.Finished++
			m.settle(c)
		}
	}
	m.last = m.NextTransno() - 1
	// Who goes on builds on what the evicted have not replayed: if the evictions were
	// lost, they might do so after the next start.
	m.act(Action{Kind: ActPutTarget, Target: TargetRecord{Instance: m.instance, Transno: m.last}})
	m.logf("recovery ended after %s: %d of %d clients, %d requests and %d locks replayed, %d gaps",
		now.Sub(m.st.Start), m.st.Finished, m.st.Clients, m.st.Replayed, m.st.LockReplays, m.st.Gaps)
	m.act(Action{Kind: ActRecoveryEnd, Transno: m.last})
	for _, c := range m.order {
		if c.barrier.on {
			m.reply(c.barrier.h, wire.OK)
			c.barrier = held{}
		}
	}
}
