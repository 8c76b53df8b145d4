package wire

func appendRequestBody(b []byte, r *Request, l *opLayout) []byte {
	f := l.req
	if f&rFID != 0 {
		b = r.FID.Append(b)
	}
	if f&rFID2 != 0 {
		b = r.FID2.Append(b)
	}
	if f&rName != 0 {
		b = appendBytes(b, r.Name)
	}
	if f&rName2 != 0 {
		b = appendBytes(b, r.Name2)
	}
	if f&rCred != 0 {
		c := &r.Cred
		b = be.AppendUint32(b, c.UID)
		b = be.AppendUint32(b, c.GID)
		b = append(b, c.NGIDs)
		for _, g := range c.GIDs[:min(int(c.NGIDs), len(c.GIDs))] {
			b = be.AppendUint32(b, g)
		}
	}
	if f&rKey != 0 {
		k := &r.Key
		if k.IsZero() {
			b = append(b, 0)
		} else {
			b = append(b, 1)
			b = append(b, k.Addr[:]...)
			b = be.AppendUint16(b, k.Port)
			b = be.AppendUint32(b, k.XID)
			b = be.AppendUint32(b, k.Proc)
			b = be.AppendUint64(b, k.Sum)
		}
	}
	if f&rSetAttr != 0 {
		b = appendSetAttr(b, &r.SetAttr)
	}
	if f&rGuard != 0 {
		b = append(b, bits(r.Guard))
		if r.Guard {
			b = appendI64(b, r.GuardCtime)
		}
	}
	if f&rHow != 0 {
		b = append(b, uint8(r.How))
		b = append(b, r.Verf[:]...)
	}
	if f&rType != 0 {
		b = append(b, uint8(r.Type))
		b = be.AppendUint32(b, r.RdevMajor)
		b = be.AppendUint32(b, r.RdevMinor)
	}
	if f&rData != 0 {
		b = appendBytes(b, r.Data)
	}
	if f&rCookie != 0 {
		b = be.AppendUint64(b, r.Cookie)
	}
	if f&rCount != 0 {
		b = be.AppendUint32(b, r.Count)
	}
	if f&rMaxEntries != 0 {
		b = be.AppendUint32(b, r.MaxEntries)
	}
	if f&rPlus != 0 {
		b = append(b, bits(r.Plus))
	}
	if f&rLayout != 0 {
		b = be.AppendUint32(b, r.Layout.StripeSize)
		b = append(b, r.Layout.Count)
	}
	if f&rLogIDs != 0 {
		b = be.AppendUint32(b, uint32(len(r.LogIDs)))
		for _, id := range r.LogIDs {
			b = be.AppendUint64(b, id)
		}
	}
	if f&rEpochs != 0 {
		b = be.AppendUint32(b, uint32(len(r.Epochs)))
		for i := range r.Epochs {
			e := &r.Epochs[i]
			b = e.FID.Append(b)
			b = be.AppendUint64(b, e.Size)
			b = be.AppendUint64(b, e.Used)
			b = appendI64(b, e.Mtime)
			b = appendI64(b, e.Ctime)
			b = be.AppendUint64(b, e.Seen)
		}
	}
	if f&rStripe != 0 {
		b = append(b, r.Stripe)
	}
	if f&rOffset != 0 {
		b = be.AppendUint64(b, r.Offset)
	}
	if f&rSize != 0 {
		b = be.AppendUint64(b, r.Size)
	}
	if f&rLogID != 0 {
		b = be.AppendUint64(b, r.LogID)
	}
	if f&rStable != 0 {
		b = append(b, uint8(r.Stable))
	}
	if f&rTime != 0 {
		b = appendI64(b, r.Time)
	}
	if f&rLock != 0 {
		b = appendLockArgs(b, r.Lock, l.lock)
	}
	if f&rBody != 0 {
		b = appendBytes(b, r.Data)
	}
	if f&rPeer != 0 {
		b = append(b, r.Peer[:]...)
	}
	if f&rMade != 0 && r.Flags&FlagReplay != 0 {
		b = appendMade(b, &r.Made)
	}
	return b
}

func appendMade(b []byte, m *Made) []byte {
	b = appendI64(m.FID.Append(b), m.Time)
	b = be.AppendUint32(b, m.Generation)
	return appendLayout(b, &m.Layout)
}

// epochSize is the encoded size of an EpochClose.
const epochSize = FIDSize + 40

func decodeRequestBody(d *decoder, r *Request, l *opLayout) {
	f := l.req
	if f&rFID != 0 {
		r.FID = d.fid()
	}
	if f&rFID2 != 0 {
		r.FID2 = d.fid()
	}
	if f&rName != 0 {
		r.Name = d.bytes(MaxNameLen)
	}
	if f&rName2 != 0 {
		r.Name2 = d.bytes(MaxNameLen)
	}
	if f&rCred != 0 {
		c := &r.Cred
		c.UID, c.GID = d.u32(), d.u32()
		if c.NGIDs = d.u8(); int(c.NGIDs) > len(c.GIDs) {
			d.fail("too many groups")
			c.NGIDs = 0
		}
		for i := range c.GIDs[:c.NGIDs] {
			c.GIDs[i] = d.u32()
		}
	}
	if f&rKey != 0 && d.flags(1) != 0 {
		k := &r.Key
		copy(k.Addr[:], d.take(len(k.Addr)))
		k.Port, k.XID, k.Proc, k.Sum = d.u16(), d.u32(), d.u32(), d.u64()
		if k.Proc == 0 {
			d.fail("empty reply key")
		}
	}
	if f&rSetAttr != 0 {
		decodeSetAttr(d, &r.SetAttr)
	}
	if f&rGuard != 0 && d.flags(1) != 0 {
		r.Guard, r.GuardCtime = true, d.i64()
	}
	if f&rHow != 0 {
		r.How = CreateHow(d.u8())
		copy(r.Verf[:], d.take(len(r.Verf)))
	}
	if f&rType != 0 {
		r.Type = FileType(d.u8())
		r.RdevMajor, r.RdevMinor = d.u32(), d.u32()
	}
	if f&rData != 0 {
		r.Data = d.bytes(MaxSymlinkLen)
	}
	if f&rCookie != 0 {
		r.Cookie = d.u64()
	}
	if f&rCount != 0 {
		r.Count = d.u32()
	}
	if f&rMaxEntries != 0 {
		r.MaxEntries = d.u32()
	}
	if f&rPlus != 0 {
		r.Plus = d.flags(1) != 0
	}
	if f&rLayout != 0 {
		r.Layout.StripeSize, r.Layout.Count = d.u32(), d.u8()
	}
	if f&rLogIDs != 0 {
		for range d.count(MaxLogIDs, 8) {
			r.LogIDs = append(r.LogIDs, d.u64())
		}
	}
	if f&rEpochs != 0 {
		for range d.count(MaxEpochs, epochSize) {
			r.Epochs = append(r.Epochs, EpochClose{
				FID: d.fid(), Size: d.u64(), Used: d.u64(), Mtime: d.i64(), Ctime: d.i64(), Seen: d.u64(),
			})
		}
	}
	if f&rStripe != 0 {
		r.Stripe = d.u8()
	}
	if f&rOffset != 0 {
		r.Offset = d.u64()
	}
	if f&rSize != 0 {
		r.Size = d.u64()
	}
	if f&rLogID != 0 {
		r.LogID = d.u64()
	}
	if f&rStable != 0 {
		r.Stable = StableHow(d.u8())
	}
	if f&rTime != 0 {
		r.Time = d.i64()
	}
	if f&rLock != 0 {
		r.Lock = decodeLockArgs(d, r.Lock, l.lock)
	} else {
		r.Lock = nil
	}
	if f&rBody != 0 {
		r.Data = d.bytes(MaxData)
	}
	if f&rPeer != 0 {
		copy(r.Peer[:], d.take(len(r.Peer)))
	}
	if f&rMade != 0 && r.Flags&FlagReplay != 0 {
		m := &r.Made
		m.FID, m.Time, m.Generation = d.fid(), d.i64(), d.u32()
		decodeLayout(d, &m.Layout)
	}
}

func appendSetAttr(b []byte, s *SetAttr) []byte {
	b = be.AppendUint16(b, uint16(s.Mask))
	b = be.AppendUint32(b, s.Mode)
	b = be.AppendUint32(b, s.UID)
	b = be.AppendUint32(b, s.GID)
	b = be.AppendUint64(b, s.Size)
	b = appendI64(b, s.Atime)
	return appendI64(b, s.Mtime)
}

func decodeSetAttr(d *decoder, s *SetAttr) {
	s.Mask = SetMask(d.u16())
	s.Mode, s.UID, s.GID = d.u32(), d.u32(), d.u32()
	s.Size, s.Atime, s.Mtime = d.u64(), d.i64(), d.i64()
}
