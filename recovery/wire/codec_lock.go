package wire

import "net/netip"

// maxZone bounds the zone of an IPv6 address, an interface's name.
const maxZone = 64

// hostFits tells whether h can be encoded.
func hostFits(h *LockHost) bool {
	return len(h.Name) <= MaxLockHostName && len(h.Addr.Zone()) <= maxZone
}

func appendAddr(b []byte, a netip.Addr) []byte {
	switch {
	case !a.IsValid():
		return append(b, 0)
	case a.Is4():
		p := a.As4()
		return append(append(b, 4), p[:]...)
	}
	p := a.As16()
	b = append(append(b, 16), p[:]...)
	z := a.Zone()
	return appendString(b, z[:min(len(z), maxZone)])
}

func decodeAddr(d *decoder) netip.Addr {
	switch d.u8() {
	case 0:
	case 4:
		var p [4]byte
		copy(p[:], d.take(4))
		return netip.AddrFrom4(p)
	case 16:
		var p [16]byte
		copy(p[:], d.take(16))
		a := netip.AddrFrom16(p)
		if z := d.bytes(maxZone); len(z) > 0 {
			a = a.WithZone(string(z))
		}
		return a
	default:
		d.fail("no address")
	}
	return netip.Addr{}
}

func appendHost(b []byte, h *LockHost) []byte {
	b = be.AppendUint32(b, h.VIP)
	b = appendAddr(b, h.Addr)
	return appendString(b, h.Name[:min(len(h.Name), MaxLockHostName)])
}

func decodeHost(d *decoder) LockHost {
	return LockHost{VIP: d.u32(), Addr: decodeAddr(d), Name: string(d.bytes(MaxLockHostName))}
}

func appendOwner(b []byte, o *LockOwner) []byte {
	b = appendHost(b, &o.LockHost)
	b = be.AppendUint32(b, o.Svid)
	return appendString(b, o.OH[:min(len(o.OH), MaxLockOwnerOH)])
}

func decodeOwner(d *decoder) LockOwner {
	return LockOwner{LockHost: decodeHost(d), Svid: d.u32(), OH: string(d.bytes(MaxLockOwnerOH))}
}

func appendRange(b []byte, r LockRange) []byte {
	b = be.AppendUint64(b, r.Start)
	return be.AppendUint64(b, r.End)
}

func decodeRange(d *decoder) LockRange { return LockRange{Start: d.u64(), End: d.u64()} }

func appendNote(b, n []byte) []byte { return appendBytes(b, n[:min(len(n), MaxLockNote)]) }

// decodeNote copies: what is decoded outlives the message.
func decodeNote(d *decoder) []byte { return append([]byte(nil), d.bytes(MaxLockNote)...) }

const lockArgsBits = 0x7f

func appendLockArgs(b []byte, a *LockArgs, f lockField) []byte {
	if a == nil {
		return append(b, 0)
	}
	b = append(b, 1, bits(a.Exclusive, a.Block, a.Reclaim, a.Monitor, a.Crashed, a.Forget, a.AllVIPs))
	if f&lHost != 0 {
		b = appendHost(b, &a.Owner.LockHost)
	}
	if f&lOwner != 0 {
		b = be.AppendUint32(b, a.Owner.Svid)
		b = appendString(b, a.Owner.OH)
	}
	if f&lRange != 0 {
		b = appendRange(b, a.Range)
	}
	if f&lNote != 0 {
		b = appendBytes(b, a.Note)
	}
	if f&lShare != 0 {
		b = append(b, a.ShareMode, a.ShareAccess)
	}
	if f&lID != 0 {
		b = be.AppendUint64(b, a.ID)
	}
	if f&lGrant != 0 {
		b = append(b, uint8(a.Grant))
	}
	if f&(lService|lNSM) != 0 {
		b = be.AppendUint32(b, a.NSMState)
	}
	if f&lService != 0 {
		b = appendI64(b, a.Window)
	}
	return b
}

// decodeLockArgs decodes into a, or a new LockArgs. Note aliases the message.
func decodeLockArgs(d *decoder, a *LockArgs, f lockField) *LockArgs {
	if d.flags(1) == 0 {
		return nil
	}
	if a == nil {
		a = new(LockArgs)
	} else {
		*a = LockArgs{}
	}
	x := d.flags(lockArgsBits)
	a.Exclusive, a.Block, a.Reclaim, a.Monitor = x&1 != 0, x&2 != 0, x&4 != 0, x&8 != 0
	a.Crashed, a.Forget, a.AllVIPs = x&16 != 0, x&32 != 0, x&64 != 0
	if f&lHost != 0 {
		a.Owner.LockHost = decodeHost(d)
	}
	if f&lOwner != 0 {
		a.Owner.Svid, a.Owner.OH = d.u32(), string(d.bytes(MaxLockOwnerOH))
	}
	if f&lRange != 0 {
		a.Range = decodeRange(d)
	}
	if f&lNote != 0 {
		a.Note = d.bytes(MaxLockNote)
	}
	if f&lShare != 0 {
		a.ShareMode, a.ShareAccess = d.u8(), d.u8()
	}
	if f&lID != 0 {
		a.ID = d.u64()
	}
	if f&lGrant != 0 {
		a.Grant = GrantOutcome(d.u8())
	}
	if f&(lService|lNSM) != 0 {
		a.NSMState = d.u32()
	}
	if f&lService != 0 {
		a.Window = d.i64()
	}
	return a
}

// Smallest encoded sizes of list elements.
const (
	minHost   = 4 + 1 + 2
	minOwner  = minHost + 4 + 2
	minHolder = 8 + FIDSize + minOwner + 16 + 2 + 8 + 2
	minGrant  = 8 + 8 + FIDSize + minOwner + 16 + 1 + 2
	minMonHst = minHost + 8 + 12 + 2
)

func appendHolder(b []byte, h *LockHolder) []byte {
	b = be.AppendUint64(b, h.ID)
	b = h.FID.Append(b)
	b = appendOwner(b, &h.Owner)
	b = appendRange(b, h.Range)
	b = append(b, uint8(h.State), bits(h.Exclusive, h.Share), h.ShareMode, h.ShareAccess)
	return appendI64(b, h.Since)
}

func decodeHolder(d *decoder) (h LockHolder) {
	h.ID, h.FID, h.Owner, h.Range = d.u64(), d.fid(), decodeOwner(d), decodeRange(d)
	h.State = LockState(d.u8())
	f := d.flags(3)
	h.Exclusive, h.Share = f&1 != 0, f&2 != 0
	h.ShareMode, h.ShareAccess, h.Since = d.u8(), d.u8(), d.i64()
	return h
}

// Parts of an encoded LockReply.
const (
	lockHolder = 1 << iota
	lockLocks
	lockGrants
	lockHosts
	lockService
	lockFreed
	lockParts = 1<<iota - 1
)

// appendLockReply appends l to a reply whose body starts at b[start]. cut tells
// that locks or grants were left out.
func appendLockReply(b []byte, start int, l *LockReply) (out []byte, cut bool) {
	m := bits(l.Holder != LockHolder{}, len(l.Locks) > 0, len(l.Grants) > 0, len(l.Hosts) > 0, l.Service != LockServiceInfo{}, l.Freed != 0)
	b = append(b, m)
	if m&lockHolder != 0 {
		b = appendHolder(b, &l.Holder)
	}
	if m&lockLocks != 0 {
		at := len(b)
		b = be.AppendUint32(b, 0)
		n := 0
		for ; n < len(l.Locks) && len(b)-start <= maxReplyBody; n++ {
			b = appendHolder(b, &l.Locks[n])
		}
		cut = cut || n < len(l.Locks)
		be.PutUint32(b[at:], uint32(n))
	}
	if m&lockGrants != 0 {
		at := len(b)
		b = be.AppendUint32(b, 0)
		n := 0
		for ; n < len(l.Grants) && len(b)-start <= maxReplyBody; n++ {
			g := &l.Grants[n]
			b = be.AppendUint64(b, g.Seq)
			b = be.AppendUint64(b, g.ID)
			b = g.FID.Append(b)
			b = appendOwner(b, &g.Owner)
			b = appendRange(b, g.Range)
			b = append(b, bits(g.Exclusive))
			b = appendNote(b, g.Note)
		}
		cut = cut || n < len(l.Grants)
		be.PutUint32(b[at:], uint32(n))
	}
	if m&lockHosts != 0 {
		b = be.AppendUint32(b, uint32(len(l.Hosts)))
		for i := range l.Hosts {
			h := &l.Hosts[i]
			b = appendHost(b, &h.Host)
			b = appendI64(b, h.Since)
			b = be.AppendUint32(b, h.State)
			b = be.AppendUint32(b, h.Notified)
			b = be.AppendUint32(b, h.Locks)
			b = appendNote(b, h.Note)
		}
	}
	if m&lockService != 0 {
		s := &l.Service
		b = append(b, bits(s.Grace, s.Damaged))
		b = be.AppendUint32(b, s.NSMState)
		b = appendI64(b, s.WindowEnd)
		for _, v := range [...]uint32{s.Granted, s.Unconfirmed, s.Waiting, s.Shares, s.Hosts, s.HostsUnnotified, s.HostsReclaimed} {
			b = be.AppendUint32(b, v)
		}
	}
	if m&lockFreed != 0 {
		b = be.AppendUint32(b, l.Freed)
	}
	return b, cut
}

func decodeLockReply(d *decoder) *LockReply {
	l := new(LockReply)
	m := d.flags(lockParts)
	if m&lockHolder != 0 {
		l.Holder = decodeHolder(d)
	}
	if m&lockLocks != 0 {
		n := d.count(MaxReplySize, minHolder)
		l.Locks = make([]LockHolder, 0, n)
		for range n {
			l.Locks = append(l.Locks, decodeHolder(d))
		}
	}
	if m&lockGrants != 0 {
		n := d.count(MaxReplySize, minGrant)
		l.Grants = make([]LockGrant, 0, n)
		for range n {
			l.Grants = append(l.Grants, LockGrant{
				Seq: d.u64(), ID: d.u64(), FID: d.fid(), Owner: decodeOwner(d), Range: decodeRange(d),
				Exclusive: d.flags(1) != 0, Note: decodeNote(d),
			})
		}
	}
	if m&lockHosts != 0 {
		n := d.count(MaxReplySize, minMonHst)
		l.Hosts = make([]MonitoredHost, 0, n)
		for range n {
			l.Hosts = append(l.Hosts, MonitoredHost{
				Host: decodeHost(d), Since: d.i64(), State: d.u32(), Notified: d.u32(), Locks: d.u32(), Note: decodeNote(d),
			})
		}
	}
	if m&lockService != 0 {
		s := &l.Service
		f := d.flags(3)
		s.Grace, s.Damaged = f&1 != 0, f&2 != 0
		s.NSMState, s.WindowEnd = d.u32(), d.i64()
		for _, p := range [...]*uint32{&s.Granted, &s.Unconfirmed, &s.Waiting, &s.Shares, &s.Hosts, &s.HostsUnnotified, &s.HostsReclaimed} {
			*p = d.u32()
		}
	}
	if m&lockFreed != 0 {
		l.Freed = d.u32()
	}
	return l
}
