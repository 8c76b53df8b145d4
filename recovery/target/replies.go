package target

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Limits of reply tables.
const (
	// MaxClientSlots is the number of records kept per NFS client and VIP.
	MaxClientSlots = 1024
	// DefaultMaxSlots is the number of slots kept for all clients together,
	// about 100 bytes each.
	DefaultMaxSlots = 128 << 10
	firstSlots      = 16
)

// Record is the remembered result of one non-idempotent NFS call.
type Record struct {
	Port      uint16
	XID       uint32
	Proc      uint32
	Sum       uint64
	Transno   uint64
	Status    wire.Status
	FID       wire.FID // object the call made or changed
	Created   bool
	Truncate  wire.Truncate
	ClientGen uint64 // generation of the frontend that served the call
}

// Found is the outcome of a lookup in the reply table.
type Found uint8

// Outcomes of Replies.Lookup.
const (
	// NotFound: the call is new.
	NotFound Found = iota
	// Hit: the call was executed, the record is its result.
	Hit
	// PortMismatch: a record matches but for the source port.
	PortMismatch
)

// Replies is the table of reply records: a ring of slots per NFS client address
// and VIP. A slot's key in the engine stays the same when it is used again, so
// old records are overwritten and leave no tombstones. Records of failed calls
// live in memory only. Callers serialise all methods.
type Replies struct {
	clients  map[replyClient]*clientRing
	lru      clientRing // list head: next is the most recently used
	slots    int
	maxSlots int
	dropped  []replyClient // evicted, their stored records are still to be deleted
	keyBuf   []byte
	valBuf   []byte
}

type replyClient struct {
	vip  uint32
	addr [16]byte
}

type clientRing struct {
	key        replyClient
	slots      []slot
	heads      []int32 // hash buckets: 1 + slot, 0 ends a chain
	at         int     // slot to use next
	stored     bool    // some record is in the engine
	prev, next *clientRing
}

type slot struct {
	rec   Record
	used  bool
	chain int32
}

// NewReplies returns an empty table that keeps at most maxSlots slots; 0 means
// DefaultMaxSlots.
func NewReplies(maxSlots int) *Replies {
	if maxSlots <= 0 {
		maxSlots = DefaultMaxSlots
	}
	r := &Replies{clients: map[replyClient]*clientRing{}, maxSlots: max(maxSlots, firstSlots)}
	r.lru.next, r.lru.prev = &r.lru, &r.lru
	return r
}

// Clients is the number of NFS clients with records, Slots that of slots.
func (r *Replies) Clients() int { return len(r.clients) }

// Slots is the number of slots that all clients have together.
func (r *Replies) Slots() int { return r.slots }

func (c *clientRing) bucket(k *wire.ReplyKey) *int32 {
	h := uint32(k.Sum) ^ k.XID*2654435761 ^ k.Proc
	h ^= h >> 15
	return &c.heads[h&uint32(len(c.heads)-1)]
}

func (r *Replies) touch(c *clientRing) {
	if r.lru.next == c {
		return
	}
	r.unlink(c)
	c.prev, c.next = &r.lru, r.lru.next
	c.prev.next, c.next.prev = c, c
}

func (r *Replies) unlink(c *clientRing) {
	if c.prev != nil {
		c.prev.next, c.next.prev = c.next, c.prev
		c.prev, c.next = nil, nil
	}
}

// Lookup finds the record of a call. The same port is a hit. With another port
// the flags decide: FlagAnyPort makes it a hit, FlagForceNew makes the call
// new, neither gives PortMismatch. The newest matching record wins.
func (r *Replies) Lookup(vip uint32, k *wire.ReplyKey, flags wire.Flags) (Record, Found) {
	c := r.clients[replyClient{vip, k.Addr}]
	if c == nil {
		return Record{}, NotFound
	}
	var other *Record
	for i := *c.bucket(k); i != 0; i = c.slots[i-1].chain {
		rec := &c.slots[i-1].rec
		if rec.XID != k.XID || rec.Proc != k.Proc || rec.Sum != k.Sum {
			continue
		}
		if rec.Port == k.Port {
			r.touch(c)
			return *rec, Hit
		}
		if other == nil {
			other = rec
		}
	}
	switch {
	case other == nil || flags&wire.FlagForceNew != 0:
		return Record{}, NotFound
	case flags&wire.FlagAnyPort != 0:
		r.touch(c)
		return *other, Hit
	}
	return *other, PortMismatch
}

// Put remembers rec as the result of the call k. With a batch the record is
// stored in it (a successful operation's own batch); without one it is kept in
// memory only.
func (r *Replies) Put(b store.Batch, vip uint32, k *wire.ReplyKey, rec Record) {
	rec.Port, rec.XID, rec.Proc, rec.Sum = k.Port, k.XID, k.Proc, k.Sum
	c := r.ring(replyClient{vip, k.Addr})
	if c.at == len(c.slots) {
		r.grow(c)
	}
	i := c.at
	c.at++
	c.set(i, rec)
	if b == nil {
		return
	}
	c.stored = true
	r.keyBuf = AppendReplyKey(r.keyBuf[:0], vip, k.Addr, uint32(i))
	r.valBuf = AppendRecord(r.valBuf[:0], &rec)
	b.Set(r.keyBuf, r.valBuf)
	for _, d := range r.dropped {
		if r.clients[d] == nil {
			lo := AppendReplyKey(nil, d.vip, d.addr, 0)
			b.DeleteRange(lo, store.PrefixEnd(lo[:len(lo)-4]))
		}
	}
	r.dropped = r.dropped[:0]
}

// Forget drops the records of a client that drop selects, those that are stored
// in the batch given.
func (r *Replies) Forget(b store.Batch, vip uint32, addr [16]byte, drop func(*Record) bool) {
	c := r.clients[replyClient{vip, addr}]
	if c == nil {
		return
	}
	for i := range c.slots {
		if s := &c.slots[i]; s.used && drop(&s.rec) {
			c.set(i, Record{}) // no call has procedure 0
			r.keyBuf = AppendReplyKey(r.keyBuf[:0], vip, addr, uint32(i))
			b.Delete(r.keyBuf)
		}
	}
}

// ring finds or makes the ring of a client.
func (r *Replies) ring(k replyClient) *clientRing {
	c := r.clients[k]
	if c == nil {
		c = &clientRing{key: k, slots: make([]slot, 0, firstSlots)}
		c.resize(firstSlots)
		r.clients[k] = c
		r.slots += firstSlots
		// The records of an evicted client that comes back are overwritten
		// one by one; those that are left over are only older.
	}
	r.touch(c)
	r.shrink(c)
	return c
}

// grow makes room behind the last slot or starts the ring again.
func (r *Replies) grow(c *clientRing) {
	n := len(c.slots)
	if n < MaxClientSlots && n*2 <= r.maxSlots {
		r.slots += n
		c.resize(n * 2)
		r.shrink(c)
		return
	}
	c.at = 0
}

// shrink forgets whole clients, least recently used first, except keep.
func (r *Replies) shrink(keep *clientRing) {
	for r.slots > r.maxSlots {
		c := r.lru.prev
		if c == keep || c == &r.lru {
			return
		}
		r.unlink(c)
		delete(r.clients, c.key)
		r.slots -= len(c.slots)
		if c.stored {
			r.dropped = append(r.dropped, c.key)
		}
	}
}

// resize gives the ring n slots; the ones there are are in order of age.
func (c *clientRing) resize(n int) {
	slots := make([]slot, n)
	copy(slots, c.slots)
	c.slots, c.heads = slots, make([]int32, n)
	for i := range slots {
		if slots[i].used {
			c.link(i)
		}
	}
}

func (rec *Record) key() wire.ReplyKey {
	return wire.ReplyKey{Port: rec.Port, XID: rec.XID, Proc: rec.Proc, Sum: rec.Sum}
}

func (c *clientRing) link(i int) {
	k := c.slots[i].rec.key()
	h := c.bucket(&k)
	c.slots[i].chain = *h
	*h = int32(i + 1)
}

func (c *clientRing) set(i int, rec Record) {
	s := &c.slots[i]
	if s.used {
		k := s.rec.key()
		p := c.bucket(&k)
		for *p != 0 && *p != int32(i+1) {
			p = &c.slots[*p-1].chain
		}
		if *p != 0 {
			*p = s.chain
		}
	}
	s.rec, s.used = rec, true
	c.link(i)
}

// ReplyPrefix is the first byte of reply records' keys.
const ReplyPrefix = 'r'

const (
	replyKeyLen  = 1 + 4 + 16 + 4
	recordLen    = 1 + 1 + 2 + 4 + 4 + 8 + 8 + 4 + wire.FIDSize + 8 + 8 + 8
	recordFormat = 1
)

// AppendReplyKey appends the engine key of a slot.
func AppendReplyKey(b []byte, vip uint32, addr [16]byte, slot uint32) []byte {
	b = append(b, ReplyPrefix)
	b = binary.BigEndian.AppendUint32(b, vip)
	b = append(b, addr[:]...)
	return binary.BigEndian.AppendUint32(b, slot)
}

// ParseReplyKey decodes what AppendReplyKey wrote.
func ParseReplyKey(k []byte) (vip uint32, addr [16]byte, slot uint32, err error) {
	if len(k) != replyKeyLen || k[0] != ReplyPrefix {
		return 0, addr, 0, errors.New("reply key: malformed")
	}
	copy(addr[:], k[5:21])
	slot = binary.BigEndian.Uint32(k[21:])
	if slot >= MaxClientSlots {
		return 0, addr, 0, fmt.Errorf("reply key: slot %d is out of range", slot)
	}
	return binary.BigEndian.Uint32(k[1:5]), addr, slot, nil
}

// AppendRecord appends the stored form of rec.
func AppendRecord(b []byte, rec *Record) []byte {
	var created byte
	if rec.Created {
		created = 1
	}
	b = append(b, recordFormat, created)
	b = binary.BigEndian.AppendUint16(b, rec.Port)
	b = binary.BigEndian.AppendUint32(b, rec.XID)
	b = binary.BigEndian.AppendUint32(b, rec.Proc)
	b = binary.BigEndian.AppendUint64(b, rec.Sum)
	b = binary.BigEndian.AppendUint64(b, rec.Transno)
	b = binary.BigEndian.AppendUint32(b, uint32(rec.Status))
	b = rec.FID.Append(b)
	b = binary.BigEndian.AppendUint64(b, rec.Truncate.LogID)
	b = binary.BigEndian.AppendUint64(b, rec.Truncate.Size)
	return binary.BigEndian.AppendUint64(b, rec.ClientGen)
}

// DecodeRecord decodes what AppendRecord wrote.
func DecodeRecord(v []byte) (Record, error) {
	if len(v) != recordLen || v[0] != recordFormat || v[1] > 1 {
		return Record{}, errors.New("reply record: malformed")
	}
	be := binary.BigEndian
	return Record{
		Created: v[1] == 1, Port: be.Uint16(v[2:]), XID: be.Uint32(v[4:]), Proc: be.Uint32(v[8:]),
		Sum: be.Uint64(v[12:]), Transno: be.Uint64(v[20:]), Status: wire.Status(be.Uint32(v[28:])),
		FID:       wire.GetFID(v[32:]),
		Truncate:  wire.Truncate{LogID: be.Uint64(v[48:]), Size: be.Uint64(v[56:])},
		ClientGen: be.Uint64(v[64:]),
	}, nil
}

// Load reads all stored records. Damaged ones are passed to bad and left out:
// losing one costs at most a wrong answer to a retransmission, refusing to
// start would cost everything.
func (r *Replies) Load(e store.Engine, bad func(key []byte, err error)) error {
	it, err := e.NewIter([]byte{ReplyPrefix}, []byte{ReplyPrefix + 1})
	if err != nil {
		return fmt.Errorf("load reply records: %w", err)
	}
	defer it.Close()
	type stored struct {
		slot uint32
		rec  Record
	}
	var cur replyClient
	var recs []stored
	flush := func() {
		if len(recs) == 0 {
			return
		}
		var top uint32
		for _, s := range recs {
			top = max(top, s.slot)
		}
		n := firstSlots
		for n <= int(top) {
			n *= 2
		}
		c := &clientRing{key: cur, stored: true}
		c.resize(n)
		sort.Slice(recs, func(i, j int) bool { return recs[i].rec.Transno < recs[j].rec.Transno })
		for _, s := range recs {
			c.set(int(s.slot), s.rec)
			c.at = int(s.slot) + 1
		}
		r.clients[cur] = c
		r.slots += n
		r.touch(c)
		r.shrink(c)
		recs = recs[:0]
	}
	for ok := it.First(); ok; ok = it.Next() {
		vip, addr, n, err := ParseReplyKey(it.Key())
		if err == nil {
			var rec Record
			if rec, err = DecodeRecord(it.Value()); err == nil {
				if k := (replyClient{vip, addr}); k != cur || len(recs) == 0 {
					flush()
					cur = k
				}
				recs = append(recs, stored{n, rec})
				continue
			}
		}
		bad(it.Key(), err)
	}
	flush()
	if err := it.Error(); err != nil {
		return fmt.Errorf("load reply records: %w", err)
	}
	return nil
}
