package mdt

import (
	"errors"
	"fmt"

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

// OpenEpochs lists all open IO epochs, for closing those of clients that are
// gone: an OpCloseEpoch of any client also closes the epochs of clients that
// are not in the client table and of whose eviction all OSTs know.
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

// Sync waits until everything applied so far is durable.
func (m *MDT) Sync() error {
	ch := make(chan error, 1)
	if err := m.com.Extra(func(err error) { ch <- err }); err != nil {
		return err
	}
	return <-ch
}
