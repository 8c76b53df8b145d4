package recov

import (
	"cmp"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Request handles any request but connect and disconnect. The answer may be
// ErrRecovering (keep it and send it again after recovery, or after the client
// has connected), ErrUnknownClient (evicted or never connected), ErrStaleClient,
// ErrTargetDown, or ErrProto.
func (m *Machine) Request(r Request, now time.Time) []Action {
	m.begin()
	c := m.clients[r.Client]
	switch {
	case m.state == StateStopped:
		m.reply(r.Handle, wire.ErrTargetDown)
		return m.acts
	case c != nil && r.Gen < c.rec.Gen:
		m.reply(r.Handle, wire.ErrStaleClient)
		return m.acts
	case m.inRecovery() && (c == nil || r.Gen > c.rec.Gen) && r.Flags&(wire.FlagReplay|wire.FlagLastReplay) == 0:
		// Who replays believes to be known, so it was evicted.
		m.reply(r.Handle, wire.ErrRecovering)
		return m.acts
	case c == nil || r.Gen > c.rec.Gen || !c.stored:
		m.reply(r.Handle, wire.ErrUnknownClient)
		return m.acts
	case r.Conn != 0 && r.Conn != c.conn:
		m.drop(r.Handle)
		return m.acts
	case !c.seen:
		m.reply(r.Handle, wire.ErrRecovering)
		return m.acts
	}
	m.hear(c, now)
	switch {
	case m.inRecovery():
		m.recovering(c, r, now)
	case r.Class == ClassPing:
		m.reply(r.Handle, wire.OK)
	case r.Flags&wire.FlagReplay != 0:
		m.lateReplay(c, r)
	case r.Class == ClassRead:
		m.act(Action{Kind: ActExecute, Handle: r.Handle, Req: r})
	case r.Class == ClassModify || r.Class == ClassOpen:
		m.modify(c, r)
	default:
		m.reply(r.Handle, wire.ErrProto)
	}
	return m.acts
}

func (m *Machine) fromSlot(h any, s *SlotRecord) {
	m.st.Reconstructed++
	m.act(Action{
		Kind: ActReply, Handle: h, Status: s.Status, Transno: s.Transno, Data: s.Data,
		Reconstructed: true, WaitCommit: s.Transno > m.committed && m.owner(s.Transno).held,
	})
}

// modify executes a modifying request once, or answers it from its slot.
func (m *Machine) modify(c *client, r Request) {
	if r.XID == 0 || int(r.Slot) >= m.cfg.MaxSlots {
		m.reply(r.Handle, wire.ErrProto)
		return
	}
	s := c.slot(r.Slot)
	switch {
	case s.run != nil && s.run.req.XID == r.XID:
		m.set(&s.run.dup, r.Handle)
	case s.run != nil && s.run.req.XID > r.XID, s.rec.XID > r.XID:
		m.drop(r.Handle)
	case s.run != nil:
		// The client used the slot again without having got the answer.
		m.reply(r.Handle, wire.ErrProto)
	case s.rec.XID == r.XID:
		m.fromSlot(r.Handle, &s.rec)
	default:
		s.run = m.execute(c, r, false)
	}
}

func (m *Machine) execute(c *client, r Request, replay bool) *running {
	m.tickets++
	var run *running
	if n := len(m.spare); n > 0 {
		run, m.spare = m.spare[n-1], m.spare[:n-1]
	} else {
		run = new(running)
	}
	*run = running{c: c, req: r, replay: replay}
	m.runs[m.tickets] = run
	c.busy++
	m.act(Action{
		Kind: ActExecute, Handle: r.Handle, Req: r, Ticket: m.tickets, Replay: replay,
		CheckVersions: replay && r.Transno > m.base,
	})
	return run
}

// lateReplay answers a replay after recovery: a copy of one that was executed,
// or one of something durable.
func (m *Machine) lateReplay(c *client, r Request) {
	switch {
	case r.Class == ClassLock || r.Class == ClassWait:
		// Only a client that took part in recovery is still registered.
		m.known(r.Handle, 0, wire.OK)
	case r.Class != ClassModify && r.Class != ClassOpen || r.Transno == 0 || int(r.Slot) >= m.cfg.MaxSlots:
		m.reply(r.Handle, wire.ErrProto)
	case r.Class == ClassOpen && r.Transno <= m.base:
		m.execute(c, r, true)
	case r.XID != 0 && c.slot(r.Slot).rec.XID == r.XID:
		m.fromSlot(r.Handle, &c.slot(r.Slot).rec)
	case r.Transno < m.next:
		m.known(r.Handle, r.Transno, wire.OK)
	default:
		m.remove(c, "replays what recovery did not have")
		m.reply(r.Handle, wire.ErrUnknownClient)
	}
}

// known answers with a result that is known without its slot.
func (m *Machine) known(h any, transno uint64, st wire.Status) {
	m.st.Reconstructed++
	m.act(Action{Kind: ActReply, Handle: h, Status: st, Transno: transno, Reconstructed: true})
}

// Executed reports the outcome of an ActExecute with a ticket. Unknown tickets
// are ignored.
func (m *Machine) Executed(res Result, now time.Time) []Action {
	m.begin()
	run := m.runs[res.Ticket]
	if run == nil {
		return m.acts
	}
	delete(m.runs, res.Ticket)
	c, r := run.c, &run.req
	c.busy--
	c.answered = now
	if len(res.Data) > MaxResult {
		res.Data = nil
	}
	defer m.recycle(run)
	if run.replay {
		m.executedReplay(run, res, now)
		m.stopped()
		return m.acts
	}
	s := c.slot(r.Slot)
	s.run = nil
	if !res.NotDone {
		m.last = max(m.last, res.Transno)
		if s.rec.XID < r.XID {
			s.rec = slotOf(c, r, res)
		}
	}
	a := Action{Kind: ActReply, Handle: r.Handle, Status: res.Status, Transno: res.Transno}
	switch {
	case c.gone:
		// Executed, but whether it stays is no longer the client's to know.
		a.Status, a.Transno = wire.ErrUnknownClient, 0
	case !res.NotDone:
		a.WaitCommit = m.share(c, &res) || res.Held
	}
	m.act(a)
	if run.dup.on {
		a.Handle = run.dup.h
		if a.Reconstructed = !res.NotDone && !c.gone; a.Reconstructed {
			a.Data = res.Data
		}
		m.act(a)
	}
	m.own(c, res.Transno, a.WaitCommit || r.Flags&wire.FlagWaitCommit != 0)
	m.stopped()
	return m.acts
}

// maxSpare bounds the executions that are kept for reuse.
const maxSpare = 1024

func (m *Machine) recycle(run *running) {
	*run = running{}
	if len(m.spare) < maxSpare {
		m.spare = append(m.spare, run)
	}
}

func slotOf(c *client, r *Request, res Result) SlotRecord {
	return SlotRecord{
		Client: c.rec.Client, Gen: c.rec.Gen, Slot: r.Slot, XID: r.XID,
		Transno: res.Transno, Status: res.Status, Data: res.Data,
	}
}

// share tells whether the answer has to wait for the disk: with commit-on-share
// when the operation builds on another client's that is not durable, always when
// it builds on one that nobody would replay: one that is not answered yet, and
// one that did not come through the machine, that is, a local client's or the
// target's own.
func (m *Machine) share(c *client, res *Result) bool {
	if res.Transno == 0 {
		return false
	}
	for _, v := range res.PreVersions {
		if v <= m.committed {
			continue
		}
		if o := m.owner(v); o.held || m.cfg.CommitOnShare && o.c != c {
			m.st.SharedCommits++
			m.act(Action{Kind: ActCommit})
			return true
		}
	}
	return false
}

// own notes whose an operation is. They come in the order of transno, but for
// repeated answers.
func (m *Machine) own(c *client, transno uint64, held bool) {
	if transno <= m.committed {
		return
	}
	o := owner{transno, c, held || c.rec.Local}
	if n := len(m.owners); n == 0 || m.owners[n-1].transno < transno {
		m.owners = append(m.owners, o)
	} else if i, found := m.ownerAt(transno); found {
		m.owners[i].held = m.owners[i].held || o.held
	} else {
		m.owners = slices.Insert(m.owners, i, o)
	}
}

func (m *Machine) ownerAt(transno uint64) (int, bool) {
	return slices.BinarySearchFunc(m.owners, transno, func(o owner, t uint64) int { return cmp.Compare(o.transno, t) })
}

// owner tells whose the operation is that is not durable. Unknown ones count as
// held.
func (m *Machine) owner(transno uint64) owner {
	if i, found := m.ownerAt(transno); found {
		return m.owners[i]
	}
	return owner{held: true}
}
