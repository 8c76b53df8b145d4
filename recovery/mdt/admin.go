package mdt

import (
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

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
		if st := m.logDone(ids[:n]); st != wire.OK {
			return fmt.Errorf("log done: %w", st)
		}
		ids = ids[n:]
	}
	return nil
}

func (m *MDT) logDone(ids []uint64) wire.Status {
	m.seq.Lock()
	defer m.unlock()
	b := m.e.NewBatch()
	var kb []byte
	for _, id := range ids {
		kb = appendLogKey(kb[:0], id)
		b.Delete(kb)
	}
	if st := m.extra(b, nil); st != wire.OK {
		return st
	}
	for _, id := range ids {
		m.removePend(id)
	}
	return wire.OK
}

// OpenEpoch is an IO epoch that is open.
type OpenEpoch struct {
	FID    wire.FID
	Client wire.ClientID
	Layout wire.Layout
}

// StaleEpochs lists up to limit files, in order and after the one given (zero: from
// the first), with IO epochs of clients that are gone, or from before they were
// evicted, which some OST may have yet to be told of when pending is set. An
// OpCloseEpoch of any client closes those that are not pending along. It is cheap
// when there can be none.
func (m *MDT) StaleEpochs(after wire.FID, limit int) (out []OpenEpoch, pending bool, err error) {
	m.seq.Lock()
	none, lost := !m.staleEpochs, m.lostClients
	m.seq.Unlock()
	if none {
		return nil, false, nil
	}
	lower := []byte{prefixEpoch}
	if !after.IsZero() {
		lower = store.PrefixEnd(after.Append(lower))
	}
	whole := after.IsZero()
	err = iterate(m.e, lower, []byte{prefixEpoch + 1}, func(k, v []byte) error {
		if len(k) != 33 {
			return nil
		}
		f, c := wire.GetFID(k[1:]), wire.ClientID(k[17:33])
		r, err := DecodeEpoch(v)
		m.seq.Lock()
		stale, waits := err != nil || !m.current(c, r.Tenure), m.fences[c] != nil
		m.seq.Unlock()
		switch {
		case !stale:
			return nil
		case waits:
			pending = true
			return nil
		case len(out) == limit:
			whole = false
			return errEnough
		}
		if in, _ := m.inode(f, false); in != nil {
			out = append(out, OpenEpoch{f, c, in.Attr.Layout})
		}
		return nil
	})
	if err != nil && err != errEnough {
		return nil, false, fmt.Errorf("stale epochs: %w", err)
	}
	if whole && len(out) == 0 && !pending {
		m.seq.Lock()
		if m.lostClients == lost {
			m.staleEpochs = false
		}
		m.seq.Unlock()
	}
	return out, pending, nil
}

// Time is the newest timestamp that the target has given or knows of, in
// nanoseconds since 1970.
func (m *MDT) Time() int64 {
	m.seq.Lock()
	defer m.seq.Unlock()
	return m.state.Time
}

// Sync waits until everything applied so far is durable.
func (m *MDT) Sync() error {
	ch := make(chan error, 1)
	if err := m.com.Extra(func(err error) { ch <- err }); err != nil {
		return err
	}
	return <-ch
}
