package mdt

import (
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

var _ front.Body = (*MDT)(nil)

// Table implements front.Body. Without a target record, or with a damaged one, the
// stop counts as unclean and the instance is one that the target cannot have had.
func (m *MDT) Table() (front.Table, error) {
	m.seq.Lock()
	defer m.seq.Unlock()
	t := front.Table{Transno: m.core.LastApplied()}
	var last uint64 // instance
	for _, c := range m.clients {
		t.Clients = append(t.Clients, c.ClientRecord)
		last = max(last, c.Instance)
	}
	var err error
	t.Target, err = ReadTarget(m.e)
	switch {
	case err == nil:
		last = t.Target.Instance
	case errors.Is(err, store.ErrFailed):
		return t, fmt.Errorf("client table: %w", err)
	default:
		if !errors.Is(err, store.ErrNotFound) {
			m.log.Error("mdt: damaged target record: it counts as an unclean stop", "err", err)
		}
		// Each start takes a FID sequence, too.
		last = max(last, m.startSeq)
	}
	t.Instance = last + 1
	err = IterSlots(m.e, func(id wire.ClientID, slot uint16, r recov.SlotRecord, err error) error {
		if err != nil {
			m.log.Error("mdt: damaged slot record", "client", fmt.Sprintf("%x", id), "slot", slot, "err", err)
			return nil
		}
		t.Slots = append(t.Slots, r)
		return nil
	})
	if err != nil {
		return t, fmt.Errorf("client table: %w", err)
	}
	return t, nil
}

// Execute implements front.Body.
func (m *MDT) Execute(req *wire.Request, rep *wire.Reply, x front.Exec, e front.Execution) {
	m.stats.ops.Add(1)
	rep.XID = req.XID
	if req.Op == wire.OpSetVIPEpoch && x.Transno == 0 {
		m.control(req, rep, func() {
			e.Executed(recov.Result{Status: rep.Status})
			e.Done()
		})
		return
	}
	m.modify(req, rep, x, e, e)
}

// Rebuild implements front.Body.
func (m *MDT) Rebuild(req *wire.Request, rep *wire.Reply, slot *recov.SlotRecord) {
	var o outcome
	if len(slot.Data) > 0 {
		var err error
		if o, err = decodeOutcome(slot.Data); err != nil {
			m.log.Error("mdt: damaged result in a reply slot", "client", fmt.Sprintf("%x", slot.Client), "slot", slot.Slot, "err", err)
		}
	}
	o.Status, o.Transno = slot.Status, slot.Transno
	rep.XID, rep.Status = req.XID, slot.Status
	rep.PreVersions, rep.Time = o.Pre, o.Time
	m.seq.Lock()
	defer m.seq.Unlock()
	m.reconstruct(req, rep, &o)
}

// WaitCommit implements front.Body.
func (m *MDT) WaitCommit(transno uint64, rep *wire.Reply, done func()) bool {
	return m.com.Gate(transno, rep, target.Func(done))
}

// LastCommitted is the highest durable transno.
func (m *MDT) LastCommitted() uint64 { return m.com.LastCommitted() }

// CommitSoon implements front.Body.
func (m *MDT) CommitSoon() { m.com.Soon() }

// PutTarget implements front.Body.
func (m *MDT) PutTarget(r recov.TargetRecord) error {
	m.seq.Lock()
	if r.Clean && !m.down.Load() {
		m.flushAtimes()
	}
	b := m.e.NewBatch()
	b.Set(keyTarget, r.Append(nil))
	// The log keeps its order, so what was executed is durable with it.
	done := make(chan error, 1)
	st := m.extra(b, func(err error) { done <- err })
	m.unlock()
	err := st.Err()
	if err == nil {
		err = <-done
	}
	if err != nil {
		return fmt.Errorf("target record: %w", err)
	}
	return nil
}

// Begin implements front.Body. New operations get numbers of the next block, which
// is taken durably. When that fails, so has the target.
func (m *MDT) Begin(transno uint64) {
	m.seq.Lock()
	if m.begun || m.down.Load() {
		m.seq.Unlock()
		return
	}
	n := (max(transno, m.core.LastApplied())>>blockShift + 1) << blockShift
	m.state.Transno = n
	b := m.e.NewBatch()
	b.Set(keyState, appendState(nil, &m.state))
	if err := m.e.Apply(b); err != nil {
		m.broken(err)
		m.unlock()
		return
	}
	m.core.SkipTo(n)
	m.core.Applied(n)
	m.com.Applied(n)
	m.seq.Unlock()
	if m.Sync() != nil {
		return
	}
	m.seq.Lock()
	m.begun = true
	m.seq.Unlock()
}
