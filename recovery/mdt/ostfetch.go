package mdt

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Bounds of one OpOSTFetch: bytes of the answer, and entries that it looks at.
const (
	fetchBytes   = 48 << 10
	fetchEntries = 16 << 10
)

// fetchStages are the key ranges that OpOSTFetch goes through. Its cursor is the
// number of the range and the part behind the prefix of the last key seen, so
// what is there all the time is told whatever else changes.
var fetchStages = [...]struct {
	prefix []byte
	suffix int // bytes of a key behind the prefix
	// add puts what an entry says into the answer.
	add func(m *MDT, o *wire.OSTInfo, ost uint16, key, value []byte) error
}{
	{[]byte{prefixMeta, metaVIP}, 4, fetchVIP},
	{[]byte{prefixMeta, metaClient}, 16, fetchClient},
	{[]byte{prefixMeta, metaFence}, 16, fetchFence},
	{[]byte{prefixEpoch}, 32, fetchEpoch},
	{[]byte{prefixLog}, 8, fetchLog},
}

// ostFetch tells an OST what it has to know before it serves anybody.
func (m *MDT) ostFetch(req *wire.Request, rep *wire.Reply) {
	stage, after := 0, req.Name
	if len(after) > 0 {
		stage, after = int(after[0]), after[1:]
	}
	if stage >= len(fetchStages) || len(after) > fetchStages[stage].suffix || req.Count > 0xffff {
		rep.Status = wire.ErrInval
		return
	}
	var o wire.OSTInfo
	left := fetchEntries
	for ; stage < len(fetchStages); stage, after = stage+1, nil {
		last, full, err := m.fetchStage(stage, after, uint16(req.Count), &o, &left)
		if err != nil {
			rep.Status = m.damaged("what an OST asks for", fmt.Sprintf("OST%04x", req.Count), err)
			return
		}
		if full {
			o.Next = append([]byte{byte(stage)}, last...)
			break
		}
	}
	rep.Data = wire.AppendOSTInfo(rep.Data[:0], &o)
}

// fetchStage goes through one range behind after, until the answer is full, and
// returns what is behind the prefix of the last key that it has seen.
func (m *MDT) fetchStage(stage int, after []byte, ost uint16, o *wire.OSTInfo, left *int) (last []byte, full bool, err error) {
	s := &fetchStages[stage]
	last = append(last, after...)
	lower := append(append([]byte(nil), s.prefix...), after...)
	if len(after) > 0 {
		lower = append(lower, 0) // the next key
	}
	it, err := m.e.NewIter(lower, store.PrefixEnd(s.prefix))
	if err != nil {
		return nil, false, err
	}
	defer it.Close()
	for ok := it.First(); ok; ok = it.Next() {
		k := it.Key()[len(s.prefix):]
		if len(k) != s.suffix {
			continue // damage that Open has told of
		}
		if *left--; *left < 0 || o.Size() > fetchBytes {
			return last, true, nil
		}
		if err := s.add(m, o, ost, k, it.Value()); err != nil {
			return nil, false, err
		}
		last = append(last[:0], k...)
	}
	return nil, false, it.Error()
}

func fetchVIP(_ *MDT, o *wire.OSTInfo, _ uint16, k, v []byte) error {
	epoch, err := decodeU64Rec(v)
	if err != nil {
		return err
	}
	o.VIPs = append(o.VIPs, wire.VIPEpoch{VIP: be.Uint32(k), Epoch: epoch})
	return nil
}

func fetchClient(_ *MDT, o *wire.OSTInfo, _ uint16, k, v []byte) error {
	c, err := DecodeClient(wire.ClientID(k), v)
	if err != nil {
		return err
	}
	o.Clients = append(o.Clients, wire.ClientInfo{ID: c.Client, Gen: c.Gen, Tenure: c.Tenure})
	return nil
}

func fetchFence(_ *MDT, o *wire.OSTInfo, ost uint16, k, v []byte) error {
	f, err := DecodeFence(v)
	if err != nil {
		return err
	}
	for _, i := range f.OSTs {
		if i == ost {
			o.Fences = append(o.Fences, wire.Fence{ID: wire.ClientID(k), Tenure: f.Tenure})
		}
	}
	return nil
}

func fetchEpoch(m *MDT, o *wire.OSTInfo, ost uint16, k, _ []byte) error {
	f := wire.GetFID(k)
	in, st := m.inode(f, false)
	if st == wire.ErrStale {
		return nil // removed since the iterator was made
	}
	// That an inode is unreadable is no reason to lose data.
	if in == nil || hasStripe(&in.Attr.Layout, ost) {
		o.Epochs = append(o.Epochs, wire.EpochInfo{FID: f, Client: wire.ClientID(k[wire.FIDSize:])})
	}
	return nil
}

func fetchLog(m *MDT, o *wire.OSTInfo, ost uint16, k, v []byte) error {
	l, err := DecodeLogRec(be.Uint64(k), v)
	if err != nil {
		m.damaged("log record", be.Uint64(k), err)
		return nil
	}
	// Objects are destroyed for durable removals only.
	if l.Kind == LogUnlink && hasStripe(&l.Layout, ost) && l.ID <= m.com.LastCommitted() {
		o.Unlinked = append(o.Unlinked, l.FID)
	}
	if l.Kind != LogTruncate || !hasStripe(&l.Layout, ost) {
		return nil
	}
	var maker wire.ClientID
	m.seq.Lock()
	if m.current(l.Client, l.Tenure) {
		maker = l.Client
	}
	m.seq.Unlock()
	in, _ := m.inode(l.FID, false)
	if in == nil {
		return nil // removed since the iterator was made, or not readable
	}
	for s, i := range l.Layout.OST[:l.Layout.Count] {
		if i == ost {
			o.Truncates = append(o.Truncates, wire.ObjTruncate{
				FID: l.FID, Stripe: uint8(s), Size: l.Layout.ObjectSize(uint8(s), l.Size), LogID: l.ID, Time: in.Attr.MtimeSince(), Client: maker,
			})
		}
	}
	return nil
}

func hasStripe(l *wire.Layout, ost uint16) bool {
	for _, i := range l.OST[:l.Count] {
		if i == ost {
			return true
		}
	}
	return false
}
