package locks

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Prefix is the first byte of all record keys. The second tells the kind:
//
//	k m              table: damage counters, reserved IDs
//	k v VIP          service address
//	k h VIP ADDR NAME  monitored host; ADDR with its length in one byte
//	k l ID           lock, waiting request or share
//
// Numbers are big-endian. A value is a version byte, the body, and the CRC-32C
// of key, version and body.
const Prefix = 'k'

const (
	kindMeta  = 'm'
	kindVIP   = 'v'
	kindHost  = 'h'
	kindEntry = 'l'

	recordVersion = 1

	maxID = 1 << 63 // counters in records are below
)

// ErrRecord is wrapped by all errors of Load and DecodeRecord.
var ErrRecord = errors.New("damaged lock record")

// MetaRecord is the table's own record.
type MetaRecord struct {
	Damage     uint64 // how often damage was found
	HostDamage uint64 // the last time that hosts may have been lost
	Reserved   uint64 // IDs below were or may be in use
}

// VIPRecord is the record of a service address.
type VIPRecord struct {
	VIP            uint32
	State, Crash   uint32 // NSM state now and at the last crash
	WindowEnd      int64  // nanoseconds since 1970, 0 when none
	Grace, NoEarly bool
	Damage         uint64 // MetaRecord.Damage that a grace period was held for
}

// HostRecord is the record of a monitored host. Host.Locks is not stored.
type HostRecord struct {
	Host   wire.MonitoredHost
	Sticky bool // put on the list by OpLockMonitor
}

// EntryRecord is the record of a lock, a waiting request or a share. Its State
// is never LockUnconfirmed: that follows from Confirmed being below the
// service address's VIPRecord.Crash.
type EntryRecord struct {
	Holder    wire.LockHolder
	Confirmed uint32 // NSM state in which it was last confirmed
	Barge     bool   // waits without a place in the queue
	Note      []byte
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal appends the checksum to value.
func seal(key, value []byte) []byte {
	return binary.BigEndian.AppendUint32(value, crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value))
}

func appendBytes(b, x []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(x))), x...)
}

func appendString(b []byte, x string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(x))), x...)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	x, _ := a.MarshalBinary() // never fails
	return append(append(b, byte(len(x))), x...)
}

func bits(l ...bool) (b byte) {
	for i, x := range l {
		if x {
			b |= 1 << i
		}
	}
	return b
}

func entryKey(b []byte, id uint64) []byte {
	return binary.BigEndian.AppendUint64(append(b, Prefix, kindEntry), id)
}

func (e *entry) value(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, recordVersion, bits(e.excl, e.share, e.barge), byte(e.state), e.mode, e.access)
	b = e.f.fid.Append(b)
	b = be.AppendUint64(b, e.r.Start)
	b = be.AppendUint64(b, e.r.End)
	b = be.AppendUint64(b, uint64(e.since))
	b = be.AppendUint32(b, e.conf)
	b = be.AppendUint32(b, e.o.h.key.VIP)
	b = be.AppendUint32(b, e.o.svid)
	b = appendAddr(b, e.o.h.key.Addr)
	b = appendString(b, e.o.h.key.Name)
	b = appendString(b, e.o.oh)
	return appendBytes(b, e.note)
}

func hostKey(b []byte, k wire.LockHost) []byte {
	b = binary.BigEndian.AppendUint32(append(b, Prefix, kindHost), k.VIP)
	return append(appendAddr(b, k.Addr), k.Name...)
}

func (h *host) value(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, recordVersion, bits(h.sticky))
	b = be.AppendUint64(b, uint64(h.since))
	b = be.AppendUint32(b, h.state)
	b = be.AppendUint32(b, h.notified)
	return appendBytes(b, h.note)
}

func vipKey(b []byte, num uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, Prefix, kindVIP), num)
}

func (v *vip) value(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, recordVersion, bits(v.grace, v.noEarly))
	b = be.AppendUint32(b, v.state)
	b = be.AppendUint32(b, v.crash)
	b = be.AppendUint64(b, uint64(v.windowEnd))
	return be.AppendUint64(b, v.damage)
}

// reader takes a record apart; after the first short read all is zero and bad
// is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		return nil
	}
	x := r.b[:n:n]
	r.b = r.b[n:]
	return x
}

func (r *reader) u8() byte {
	if x := r.take(1); x != nil {
		return x[0]
	}
	return 0
}

func (r *reader) u32() uint32 {
	if x := r.take(4); x != nil {
		return binary.BigEndian.Uint32(x)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if x := r.take(8); x != nil {
		return binary.BigEndian.Uint64(x)
	}
	return 0
}

func (r *reader) bytes(limit int) []byte {
	x := r.take(2)
	if x == nil {
		return nil
	}
	n := int(binary.BigEndian.Uint16(x))
	if n > limit {
		r.bad = true
		return nil
	}
	if n == 0 {
		return nil
	}
	return slices.Clone(r.take(n))
}

func (r *reader) flags(n int) [8]bool {
	x := r.u8()
	if x>>n != 0 {
		r.bad = true
	}
	var l [8]bool
	for i := range l {
		l[i] = x>>i&1 != 0
	}
	return l
}

func (r *reader) addr() netip.Addr {
	var a netip.Addr
	x := r.take(int(r.u8()))
	if r.bad {
		return a
	}
	if err := a.UnmarshalBinary(x); err != nil || a != a.Unmap() || len(a.Zone()) > maxZone {
		r.bad = true
	}
	return a
}

// DecodeRecord reads one record of the prefix: a *MetaRecord, *VIPRecord,
// *HostRecord or *EntryRecord. The error wraps ErrRecord. Nothing of the
// arguments is kept.
func DecodeRecord(key, value []byte) (any, error) {
	fail := func(why string) (any, error) {
		return nil, fmt.Errorf("key %x: %w: %s", key[:min(len(key), 64)], ErrRecord, why)
	}
	if len(key) < 2 || key[0] != Prefix {
		return fail("key")
	}
	if len(value) < 5 {
		return fail("short")
	}
	body, sum := value[:len(value)-4], value[len(value)-4:]
	if crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, body) != binary.BigEndian.Uint32(sum) {
		return fail("checksum")
	}
	if body[0] != recordVersion {
		return fail("version")
	}
	k, v := &reader{b: key[2:]}, &reader{b: body[1:]}
	var rec any
	ok := true
	switch key[1] {
	case kindMeta:
		x := &MetaRecord{Damage: v.u64(), HostDamage: v.u64(), Reserved: v.u64()}
		rec, ok = x, max(x.Damage, x.HostDamage, x.Reserved) < maxID
	case kindVIP:
		f := v.flags(2)
		x := &VIPRecord{VIP: k.u32(), Grace: f[0], NoEarly: f[1], State: v.u32(), Crash: v.u32(), WindowEnd: int64(v.u64()), Damage: v.u64()}
		rec, ok = x, x.WindowEnd >= 0 && x.Crash <= x.State && x.Damage < maxID
	case kindHost:
		h := &HostRecord{Sticky: v.flags(1)[0]}
		h.Host.Host = wire.LockHost{VIP: k.u32(), Addr: k.addr(), Name: string(k.b)}
		k.b = nil
		h.Host.Since, h.Host.State, h.Host.Notified = int64(v.u64()), v.u32(), v.u32()
		h.Host.Note = v.bytes(wire.MaxLockNote)
		rec, ok = h, len(h.Host.Host.Name) <= wire.MaxLockHostName
	case kindEntry:
		rec, ok = decodeEntry(k, v)
	default:
		return fail("kind")
	}
	if !ok || k.bad || v.bad || len(k.b) > 0 || len(v.b) > 0 {
		return fail("contents")
	}
	return rec, nil
}

func decodeEntry(k, v *reader) (*EntryRecord, bool) {
	e := &EntryRecord{}
	h := &e.Holder
	h.ID = k.u64()
	f := v.flags(3)
	h.Exclusive, h.Share, e.Barge = f[0], f[1], f[2]
	h.State = wire.LockState(v.u8())
	h.ShareMode, h.ShareAccess = v.u8(), v.u8()
	if fid := v.take(wire.FIDSize); fid != nil {
		h.FID = wire.GetFID(fid)
	}
	h.Range = wire.LockRange{Start: v.u64(), End: v.u64()}
	h.Since = int64(v.u64())
	e.Confirmed = v.u32()
	h.Owner.VIP, h.Owner.Svid = v.u32(), v.u32()
	h.Owner.Addr = v.addr()
	h.Owner.Name = string(v.bytes(wire.MaxLockHostName))
	h.Owner.OH = string(v.bytes(wire.MaxLockOwnerOH))
	e.Note = v.bytes(wire.MaxLockNote)
	switch {
	case h.ID == 0 || h.ID >= maxID || !h.Range.Valid() || h.FID.IsZero() || e.Barge && h.State != wire.LockWaiting:
		return e, false
	case h.Share:
		return e, h.State == wire.LockGranted && h.Range == wire.LockRange{} && h.Owner.Svid == 0 &&
			!h.Exclusive && h.ShareMode <= 3 && h.ShareAccess <= 3
	case h.State != wire.LockGranted && h.State != wire.LockGrantPending && h.State != wire.LockWaiting:
		return e, false
	}
	return e, h.ShareMode == 0 && h.ShareAccess == 0
}

// Change is a record to store, or to delete when Value is nil.
type Change struct{ Key, Value []byte }

// Changed tells whether Take has something to hand out.
func (t *Table) Changed() bool {
	return t.metaDirty || len(t.lost)+len(t.dirtyVIPs)+len(t.dirtyHosts)+len(t.dirty) > 0
}

// Take hands out the record changes since the last Take and forgets them. The
// slices are valid during the call only.
func (t *Table) Take(fn func(Change)) {
	buf := t.enc
	put := func(key func([]byte) []byte, value func([]byte) []byte) {
		buf = key(buf[:0])
		n := len(buf)
		if value == nil {
			fn(Change{Key: buf})
			return
		}
		buf = value(buf)
		buf = append(buf[:n], seal(buf[:n], buf[n:])...)
		fn(Change{Key: buf[:n:n], Value: buf[n:]})
	}
	for _, k := range t.lost {
		fn(Change{Key: k})
	}
	t.lost = nil
	if t.metaDirty {
		t.metaDirty = false
		put(func(b []byte) []byte { return append(b, Prefix, kindMeta) }, func(b []byte) []byte {
			b = binary.BigEndian.AppendUint64(append(b, recordVersion), t.damage)
			b = binary.BigEndian.AppendUint64(b, t.hostDamage)
			return binary.BigEndian.AppendUint64(b, t.limit)
		})
	}
	for _, v := range t.dirtyVIPs {
		v.dirty = false
		put(func(b []byte) []byte { return vipKey(b, v.num) }, v.value)
	}
	for _, h := range t.dirtyHosts {
		h.dirty = false
		key := func(b []byte) []byte { return hostKey(b, h.key) }
		if !h.dead {
			h.stored = true
			put(key, h.value)
		} else if h.stored {
			put(key, nil)
		}
	}
	for _, e := range t.dirty {
		e.dirty = false
		key := func(b []byte) []byte { return entryKey(b, e.id) }
		if !e.dead {
			e.stored = true
			put(key, e.value)
		} else if e.stored {
			put(key, nil)
		}
	}
	clear(t.dirty)
	clear(t.dirtyHosts)
	t.dirty, t.dirtyHosts, t.dirtyVIPs = t.dirty[:0], t.dirtyHosts[:0], t.dirtyVIPs[:0]
	if cap(t.dirty) > 4096 {
		t.dirty = nil
	}
	t.enc = buf
}

// Load takes one record of the prefix, before Loaded. A damaged record is left
// out and gives an error, which is no reason to stop: from then on Damaged is
// true and no service address gives out new locks before it has had a grace
// period. Nothing of the arguments is kept.
func (t *Table) Load(key, value []byte) error {
	rec, err := DecodeRecord(key, value)
	if err != nil {
		t.lost = append(t.lost, slices.Clone(key))
		return err
	}
	switch r := rec.(type) {
	case *MetaRecord:
		t.damage, t.hostDamage, t.limit = max(t.damage, r.Damage), max(t.hostDamage, r.HostDamage), r.Reserved
	case *VIPRecord:
		v := t.makeVIP(r.VIP)
		v.rec, v.state, v.crash, v.windowEnd = true, r.State, r.Crash, r.WindowEnd
		v.grace, v.noEarly, v.damage = r.Grace, r.NoEarly, r.Damage
		t.damage = max(t.damage, r.Damage)
	case *HostRecord:
		h := t.makeHost(r.Host.Host)
		h.rec, h.stored, h.sticky, h.since = true, true, r.Sticky, r.Host.Since
		h.state, h.notified, h.note = r.Host.State, r.Host.Notified, r.Host.Note
		t.hosts[h.key] = h
		t.recs++
	case *EntryRecord:
		l := &r.Holder
		f := t.files[l.FID]
		if f == nil {
			f = &file{fid: l.FID}
			t.files[l.FID] = f
		}
		o := t.findOwner(&l.Owner)
		if o == nil {
			h := t.makeHost(l.Owner.LockHost)
			t.hosts[h.key] = h
			o = &owner{h: h, svid: l.Owner.Svid, oh: l.Owner.OH}
			h.owners[ownerKey{o.svid, o.oh}] = o
		}
		t.loading = append(t.loading, &entry{id: l.ID, o: o, f: f, r: l.Range, since: l.Since, note: r.Note,
			conf: r.Confirmed, state: l.State, excl: l.Exclusive, share: l.Share, barge: r.Barge,
			mode: l.ShareMode, access: l.ShareAccess, stored: true})
	}
	return nil
}

// Loaded ends the loading. The changes that it makes (damaged records go) are
// handed out by Take like others.
func (t *Table) Loaded(now int64) {
	t.now = now
	defer func() { t.loaded = true }()
	slices.SortFunc(t.loading, byID)
	last := uint64(0)
	if n := len(t.loading); n > 0 {
		last = t.loading[n-1].id
	}
	t.next = max(t.next, t.limit, last+1)
	for _, e := range t.loading {
		e.dirty = true // it is stored already
		t.add(e)
		e.dirty = false
	}
	t.loading = nil
	hosts := make([]*host, 0, len(t.hosts))
	for _, h := range t.hosts {
		hosts = append(hosts, h)
	}
	slices.SortFunc(hosts, func(a, b *host) int { return compareHosts(a.key, b.key) })
	if len(t.lost) > 0 {
		t.damage++
		t.metaDirty = true
		for _, k := range t.lost {
			switch {
			case len(k) == 6 && k[1] == kindVIP:
				t.makeVIP(binary.BigEndian.Uint32(k[2:]))
			case len(k) < 2 || k[1] != kindEntry:
				t.hostDamage = t.damage
			}
		}
		for _, h := range hosts {
			// Its record may be among the lost ones, and it has to be told.
			if h.n > 0 {
				t.monitor(h)
			}
		}
	}
	for _, h := range hosts {
		if h.n == 0 && !h.sticky {
			t.idleAdd(h)
		}
	}
	for _, v := range t.vips {
		if v.grace {
			t.graces++
			t.startGrace(v)
		}
	}
	t.granted = slices.ContainsFunc(t.vips, func(v *vip) bool { return v.pending > 0 })
}
