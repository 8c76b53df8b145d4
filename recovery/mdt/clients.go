package mdt

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The client table, the fences of those who were evicted, and the epochs of
// service addresses. Their changes are in the log in their order, but have no
// transno: nobody replays them, and they go on while recovery waits for numbers.

// fence is an eviction of which OSTs are still to be told.
type fence struct {
	FenceRec
	durable atomic.Bool // nobody is told before: the client might be back after a crash
}

// extra writes a change that has no transno; done, if not nil, is called when it
// is durable, or with what prevents it, unless extra fails. The sequencer's lock
// is held, but not when done is called.
func (m *MDT) extra(b store.Batch, done func(error)) wire.Status {
	if m.down.Load() {
		b.Close()
		return wire.ErrTargetDown
	}
	if err := m.e.Apply(b); err != nil {
		return m.broken(err)
	}
	return m.durable(done)
}

// durable calls done when everything applied so far is durable, or with what
// prevents it, unless durable fails.
func (m *MDT) durable(done func(error)) wire.Status {
	if m.com.Extra(done) != nil {
		return wire.ErrTargetDown
	}
	return wire.OK
}

// tenure gives a number that is higher than all before, also those of earlier
// starts: each start has a FID sequence of its own.
func (m *MDT) tenure() uint64 {
	m.nTenures++
	return m.startSeq<<32 | uint64(m.nTenures)
}

// loadClients reads the client table, fences and epochs of service addresses;
// what has to be changed in them goes into b.
func (m *MDT) loadClients(b store.Batch) error {
	err := IterClients(m.e, func(c ClientEntry, err error) error {
		switch {
		case err == nil:
			if c.Tenure == 0 {
				c.Tenure = m.tenure()
				b.Set(appendClientKey(nil, c.Client), AppendClient(nil, &c))
			}
			m.clients[c.Client] = &c
			m.core.Connect(c.Client, c.Gen)
		case c.Client == wire.ClientID{}:
			m.log.Error("mdt: damaged client record", "err", err)
		default:
			// It is a stranger from now on, and must not write what it does not know
			// to be closed.
			m.log.Error("mdt: damaged client record, the client is evicted", "client", fmt.Sprintf("%x", c.Client), "err", err)
			b.Delete(appendClientKey(nil, c.Client))
			m.setFence(b, c.Client, m.tenure())
			return m.dropSlots(b, c.Client)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := IterFences(m.e, func(id wire.ClientID, f FenceRec, err error) error {
		switch {
		case err != nil && id == wire.ClientID{}:
			m.log.Error("mdt: damaged fence", "err", err)
			return nil
		case err != nil:
			// Everything that the client may have sent before now, and all OSTs.
			m.log.Error("mdt: damaged fence", "client", fmt.Sprintf("%x", id), "err", err)
			t := m.tenure()
			if c := m.clients[id]; c != nil {
				t = c.Tenure
			}
			m.setFence(b, id, t)
		case m.fences[id] == nil:
			m.fences[id] = &fence{FenceRec: f}
		}
		return nil
	}); err != nil {
		return err
	}
	for _, f := range m.fences {
		f.durable.Store(true) // before Open returns
	}
	return IterVIPs(m.e, func(vip uint32, epoch uint64, err error) error {
		if err != nil {
			// Fencing must not be forgotten: this is not something to go on without.
			return fmt.Errorf("epoch of VIP %d: %w", vip, err)
		}
		m.core.SetVIPEpoch(vip, epoch)
		return nil
	})
}

// dropSlots removes a client's slot records, one by one: a range deletion would
// make every read of the engine slower for a while.
func (m *MDT) dropSlots(b store.Batch, id wire.ClientID) error {
	return iteratePrefix(m.e, append([]byte{prefixSlot}, id[:]...), func(k, _ []byte) error {
		b.Delete(k)
		return nil
	})
}

// setFence enters that all OSTs have to refuse what the client sends with a tenure
// below the one given.
func (m *MDT) setFence(b store.Batch, id wire.ClientID, tenure uint64) *fence {
	f := &fence{FenceRec: FenceRec{Tenure: tenure}}
	if old := m.fences[id]; old != nil {
		f.Tenure = max(f.Tenure, old.Tenure)
	}
	for _, o := range m.o.OSTs() {
		f.OSTs = append(f.OSTs, o.Index)
	}
	slices.Sort(f.OSTs)
	if f.OSTs = slices.Compact(f.OSTs); len(f.OSTs) == 0 {
		return nil
	}
	b.Set(appendFenceKey(nil, id), AppendFence(nil, &f.FenceRec))
	m.fences[id] = f
	return f
}

// PutClient implements front.Body. A new entry, and that of a newer generation,
// gets a new tenure. An older generation than the registered one is refused with
// ErrStaleClient.
func (m *MDT) PutClient(r recov.ClientRecord, done func(error)) {
	var tenure uint64
	if st := m.putClient(r, &tenure, done); st != wire.OK {
		m.log.Warn("mdt: client cannot be registered", "client", fmt.Sprintf("%x", r.Client), "err", st)
		if done != nil {
			done(st)
		}
	}
}

// putClient also gives the entry's tenure, before done is called.
func (m *MDT) putClient(r recov.ClientRecord, tenure *uint64, done func(error)) wire.Status {
	m.seq.Lock()
	defer m.unlock()
	old := m.clients[r.Client]
	e := &ClientEntry{ClientRecord: r}
	b := m.e.NewBatch()
	switch {
	case old != nil && r.Gen < old.Gen:
		b.Close()
		return wire.ErrStaleClient
	case old != nil && r.Gen == old.Gen:
		e.Tenure = old.Tenure
	case m.e.Room() == store.RoomNone:
		b.Close()
		return wire.ErrNoSpc
	default:
		e.Tenure = m.tenure()
		if err := m.dropSlots(b, r.Client); err != nil {
			b.Close()
			return m.damaged("reply slots", fmt.Sprintf("%x", r.Client), err)
		}
	}
	*tenure = e.Tenure
	b.Set(appendClientKey(nil, r.Client), AppendClient(nil, e))
	if st := m.extra(b, done); st != wire.OK {
		return st
	}
	m.clients[r.Client] = e
	m.core.Connect(r.Client, r.Gen)
	m.view.Store(m.core.View())
	return wire.OK
}

// DelClient implements front.Body. It does nothing when the client is registered
// with another generation.
func (m *MDT) DelClient(id wire.ClientID, gen uint64, evicted bool) {
	if st := m.delClient(id, gen, evicted, nil); st != wire.OK {
		m.log.Error("mdt: client cannot be removed", "client", fmt.Sprintf("%x", id), "err", st)
	}
}

func (m *MDT) delClient(id wire.ClientID, gen uint64, evicted bool, done func(error)) wire.Status {
	m.seq.Lock()
	defer m.unlock()
	e := m.clients[id]
	if e == nil || e.Gen != gen {
		if done == nil {
			return wire.OK
		}
		return m.durable(done)
	}
	// Not admitted any more, whatever becomes of the record.
	delete(m.clients, id)
	m.lostClients++
	m.staleEpochs = true
	m.core.Disconnect(id)
	m.view.Store(m.core.View())
	b := m.e.NewBatch()
	b.Delete(appendClientKey(nil, id))
	if err := m.dropSlots(b, id); err != nil {
		b.Close()
		return m.broken(err)
	}
	if evicted {
		if f := m.setFence(b, id, e.Tenure+1); f != nil {
			done = func(err error) {
				if err == nil {
					f.durable.Store(true)
					wake(m.fenceWake)
				}
			}
		}
	}
	st := m.extra(b, done)
	if done == nil {
		m.com.Soon()
	}
	return st
}

// current tells whether a tenure is of a client's present entry in the table. The
// sequencer's lock is held.
func (m *MDT) current(id wire.ClientID, tenure uint64) bool {
	e := m.clients[id]
	return e != nil && tenure >= e.Tenure
}

// LeftBy tells whether what a client made with a tenure is left to others: it was
// evicted since or is gone, and all OSTs refuse what it may still send.
func (m *MDT) LeftBy(id wire.ClientID, tenure uint64) bool {
	m.seq.Lock()
	defer m.seq.Unlock()
	return !m.current(id, tenure) && m.fences[id] == nil
}

// Settled tells that no client is to be fenced any more and that no IO epoch is
// open, as far as the last StaleEpochs has seen, of a client that is gone.
func (m *MDT) Settled() bool {
	m.seq.Lock()
	defer m.seq.Unlock()
	return len(m.fences) == 0 && !m.staleEpochs
}

// Left changes when there may be more that is left to others.
func (m *MDT) Left() uint64 {
	m.seq.Lock()
	defer m.seq.Unlock()
	return m.lostClients
}

// Tenure implements front.Body.
func (m *MDT) Tenure(id wire.ClientID) uint64 {
	m.seq.Lock()
	defer m.seq.Unlock()
	if e := m.clients[id]; e != nil {
		return e.Tenure
	}
	return 0
}

// Clients lists the client table.
func (m *MDT) Clients() map[wire.ClientID]uint64 {
	out := map[wire.ClientID]uint64{}
	m.view.Load().EachClient(func(id wire.ClientID, gen uint64) { out[id] = gen })
	return out
}

// PendingFence is an eviction of which the OSTs in the list are still to be told
// (OpFence): they refuse what the client sends with a lower tenure.
type PendingFence struct {
	ID     wire.ClientID
	Tenure uint64
	OSTs   []uint16
}

// PendingFences lists the durable evictions that OSTs are still to be told of, by
// client.
func (m *MDT) PendingFences() []PendingFence {
	m.seq.Lock()
	defer m.seq.Unlock()
	var out []PendingFence
	for id, f := range m.fences {
		if f.durable.Load() {
			out = append(out, PendingFence{id, f.Tenure, slices.Clone(f.OSTs)})
		}
	}
	slices.SortFunc(out, func(a, b PendingFence) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	return out
}

// FenceWake is signalled when there is a new PendingFence.
func (m *MDT) FenceWake() <-chan struct{} { return m.fenceWake }

// FenceDone tells that an OST durably refuses what the client sends with a tenure
// below the one given. When the last one does, others may close the client's IO
// epochs. What a crash makes of it is harmless: the OST is told again.
func (m *MDT) FenceDone(id wire.ClientID, tenure uint64, ost uint16) error {
	m.seq.Lock()
	defer m.unlock()
	f := m.fences[id]
	if f == nil || tenure < f.Tenure {
		return nil
	}
	i, found := slices.BinarySearch(f.OSTs, ost)
	if !found {
		return nil
	}
	left := &fence{FenceRec: FenceRec{Tenure: f.Tenure, OSTs: slices.Delete(slices.Clone(f.OSTs), i, i+1)}}
	left.durable.Store(true) // the eviction is, or nobody would have been told
	b := m.e.NewBatch()
	if len(left.OSTs) == 0 {
		b.Delete(appendFenceKey(nil, id))
	} else {
		b.Set(appendFenceKey(nil, id), AppendFence(nil, &left.FenceRec))
	}
	if st := m.extra(b, nil); st != wire.OK {
		return fmt.Errorf("fence of client %x: %w", id, st)
	}
	if len(left.OSTs) == 0 {
		delete(m.fences, id)
		m.lostClients++
	} else {
		m.fences[id] = left
	}
	return nil
}

// VIPEpoch implements front.Body.
func (m *MDT) VIPEpoch(vip uint32) uint64 { return m.view.Load().VIPEpoch(vip) }

// RaiseVIP implements front.Body. Under the sequencer's lock nothing older is
// executing, and is not admitted afterwards.
func (m *MDT) RaiseVIP(vip uint32, epoch uint64, done func(error)) {
	st := m.raiseVIP(vip, epoch, done)
	if st == wire.ErrStaleVIP {
		// It is higher already, though perhaps not durable.
		st = m.durable(done)
	}
	if st != wire.OK {
		done(st)
	}
}

// raiseVIP fails with ErrStaleVIP for an older epoch than there is, else calls
// done when it is durable.
func (m *MDT) raiseVIP(vip uint32, epoch uint64, done func(error)) wire.Status {
	m.seq.Lock()
	defer m.unlock()
	switch {
	case m.down.Load():
		return wire.ErrTargetDown
	case m.e.Room() == store.RoomNone:
		return wire.ErrNoSpc
	}
	st, changed := m.core.SetVIPEpoch(vip, epoch)
	if st != wire.OK {
		return st
	}
	if !changed {
		return m.durable(done) // it may not be yet
	}
	m.view.Store(m.core.View())
	b := m.e.NewBatch()
	b.Set(appendVIPKey(nil, vip), appendU64Rec(nil, epoch))
	return m.extra(b, done)
}

// control executes what is about clients and service addresses rather than
// files. It is answered when it is durable. OpConnect and OpDisconnect are for
// clients in the target's process; a front has its own.
func (m *MDT) control(req *wire.Request, rep *wire.Reply, done func()) {
	fin := func(err error) {
		rep.LastCommitted = m.com.LastCommitted()
		if err != nil {
			rep.Status = statusOf(err)
		}
		done()
	}
	var st wire.Status
	switch req.Op {
	case wire.OpConnect:
		rep.Transno = m.com.LastApplied()
		st = m.putClient(recov.ClientRecord{Client: req.Client, Gen: req.ClientGen, Local: true}, &rep.Tenure, fin)
	case wire.OpDisconnect:
		if st = m.view.Load().Admit(&req.Header); st == wire.OK {
			st = m.delClient(req.Client, req.ClientGen, false, fin)
		}
	default:
		st = m.raiseVIP(req.VIP, req.VIPEpoch, fin)
	}
	if st != wire.OK {
		fin(st)
	}
}

// statusOf gives the status of an error that ends a request.
func statusOf(err error) wire.Status {
	var st wire.Status
	if errors.As(err, &st) {
		return st
	}
	return wire.ErrIO
}
