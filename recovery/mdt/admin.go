package mdt

import (
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/recovery/wire"
)

// internal runs fn as an operation of the target itself.
func (m *MDT) internal(op wire.Op, fn func(t *tx) wire.Status) error {
	m.seq.Lock()
	var after []func()
	defer func() {
		m.seq.Unlock()
		for _, f := range after {
			f()
		}
	}()
	if m.down.Load() {
		return wire.ErrTargetDown
	}
	t := &m.t
	t.begin(&wire.Request{Header: wire.Header{Op: op}}, &wire.Reply{})
	st := fn(t)
	if st == wire.OK {
		st = t.commit(false)
	} else if t.b != nil {
		t.b.Close()
	}
	after = m.serveGrants()
	return st.Err()
}

// LogWake is signalled when an unlink record was written.
func (m *MDT) LogWake() <-chan struct{} { return m.logWake }

var errEnough = errors.New("enough")

// PendingLogs returns up to limit durable unlink and truncate records with IDs
// above after, in order. Objects may be destroyed for a record only when it is
// durable, which those returned are.
func (m *MDT) PendingLogs(after uint64, limit int) ([]LogRec, error) {
	committed := m.com.LastCommitted()
	var logs []LogRec
	err := IterLogs(m.e, after, func(l LogRec, err error) error {
		if l.ID > committed || len(logs) >= limit {
			return errEnough
		}
		if err != nil {
			m.damaged("log record", l.ID, err)
			return nil
		}
		logs = append(logs, l)
		return nil
	})
	if err != nil && err != errEnough {
		return nil, fmt.Errorf("pending logs: %w", err)
	}
	return logs, nil
}

// LogDone removes records whose work the OSTs have made durable. That it is
// forgotten in a crash is harmless: the work is done again.
func (m *MDT) LogDone(ids []uint64) error {
	for len(ids) > 0 {
		n := min(len(ids), maxBatchItems)
		if err := m.internal(0, func(t *tx) wire.Status { return t.logDone(ids[:n]) }); err != nil {
			return fmt.Errorf("log done: %w", err)
		}
		ids = ids[n:]
	}
	m.com.Lazy()
	return nil
}

// OpenEpoch is an IO epoch that is open.
type OpenEpoch struct {
	FID    wire.FID
	Client wire.ClientID
	Layout wire.Layout
}

// OpenEpochs lists all open IO epochs, for closing those of clients that are
// gone: an OpCloseEpoch of any client also closes the epochs of clients that
// are not in the client table.
func (m *MDT) OpenEpochs() ([]OpenEpoch, error) {
	var out []OpenEpoch
	err := IterEpochs(m.e, func(f wire.FID, c wire.ClientID, _ uint64, err error) error {
		if err != nil {
			m.damaged("epoch", f, err)
			return nil
		}
		if in, _ := m.inode(f, false); in != nil {
			out = append(out, OpenEpoch{f, c, in.Attr.Layout})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open epochs: %w", err)
	}
	return out, nil
}

// DropClients removes the clients that drop selects from the client table,
// durably. Their open IO epochs stay until somebody closes them.
func (m *MDT) DropClients(drop func(wire.ClientID) bool) error {
	var ids []wire.ClientID
	m.view.Load().EachClient(func(id wire.ClientID, _ uint64) {
		if drop(id) {
			ids = append(ids, id)
		}
	})
	if len(ids) == 0 {
		return nil
	}
	err := m.internal(wire.OpDisconnect, func(t *tx) wire.Status {
		for _, id := range ids {
			if m.core.Disconnect(id) {
				t.view = true
				t.del(appendClientKey(t.kb, id))
			}
		}
		return wire.OK
	})
	if err == nil {
		err = m.Sync()
	}
	if err != nil {
		return fmt.Errorf("drop clients: %w", err)
	}
	return nil
}

// Clients lists the client table.
func (m *MDT) Clients() map[wire.ClientID]uint64 {
	out := map[wire.ClientID]uint64{}
	m.view.Load().EachClient(func(id wire.ClientID, gen uint64) { out[id] = gen })
	return out
}

// Sync waits until everything executed so far is durable.
func (m *MDT) Sync() error {
	ch := make(chan struct{}, 1)
	var rep wire.Reply
	if m.com.Gate(m.com.LastApplied(), &rep, func() { ch <- struct{}{} }) {
		<-ch
	}
	return rep.Status.Err()
}
