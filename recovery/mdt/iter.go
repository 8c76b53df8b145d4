package mdt

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// The functions below read an MDT's engine, also one opened read-only. Those
// that iterate pass damaged records to fn with an error and whatever the key
// says; an error from fn ends the iteration and is returned.

// ReadSuper reads the superblock; store.ErrNotFound when there is none.
func ReadSuper(e store.Engine) (Super, error) {
	v, err := e.Get(keySuper, nil)
	if err != nil {
		return Super{}, fmt.Errorf("superblock: %w", err)
	}
	return DecodeSuper(v)
}

// ReadState reads the transaction part of the superblock.
func ReadState(e store.Engine) (State, error) {
	v, err := e.Get(keyState, nil)
	if err != nil {
		return State{}, fmt.Errorf("superblock state: %w", err)
	}
	return DecodeState(v)
}

// ReadInode reads one inode; store.ErrNotFound when there is none.
func ReadInode(e store.Engine, f wire.FID) (*Inode, error) {
	v, err := e.Get(appendInodeKey(nil, f), nil)
	if err != nil {
		return nil, fmt.Errorf("inode %v: %w", f, err)
	}
	return DecodeInode(f, v)
}

// ReadEntry reads one directory entry; store.ErrNotFound when there is none.
func ReadEntry(e store.Engine, dir wire.FID, name []byte) (Entry, error) {
	v, err := e.Get(appendNameKey(nil, dir, name), nil)
	if err != nil {
		return Entry{}, fmt.Errorf("entry %v/%q: %w", dir, name, err)
	}
	return DecodeEntry(v)
}

// ReadLink reads a symlink's target.
func ReadLink(e store.Engine, f wire.FID) ([]byte, error) {
	v, err := e.Get(appendLinkKey(nil, f), nil)
	if err != nil {
		return nil, fmt.Errorf("symlink %v: %w", f, err)
	}
	return v, nil
}

func iterate(e store.Engine, lower, upper []byte, fn func(k, v []byte) error) error {
	it, err := e.NewIter(lower, upper)
	if err != nil {
		return err
	}
	defer it.Close()
	for ok := it.First(); ok; ok = it.Next() {
		if err := fn(it.Key(), it.Value()); err != nil {
			return err
		}
	}
	return it.Error()
}

func iteratePrefix(e store.Engine, prefix []byte, fn func(k, v []byte) error) error {
	return iterate(e, prefix, store.PrefixEnd(prefix), fn)
}

// IterInodes visits all inodes in FID order.
func IterInodes(e store.Engine, fn func(f wire.FID, in *Inode, err error) error) error {
	return iteratePrefix(e, []byte{prefixInode}, func(k, v []byte) error {
		if len(k) != 17 {
			return fn(wire.FID{}, nil, fmt.Errorf("inode key %x: %w", k, errRecord))
		}
		f := wire.GetFID(k[1:])
		in, err := DecodeInode(f, v)
		return fn(f, in, err)
	})
}

// IterNames visits all directory entries by directory and name; name is valid
// during the call.
func IterNames(e store.Engine, fn func(dir wire.FID, name []byte, ent Entry, err error) error) error {
	return iteratePrefix(e, []byte{prefixName}, func(k, v []byte) error {
		if len(k) < 18 || len(k) > 17+wire.MaxNameLen {
			return fn(wire.FID{}, nil, Entry{}, fmt.Errorf("entry key %x: %w", k, errRecord))
		}
		ent, err := DecodeEntry(v)
		return fn(wire.GetFID(k[1:]), k[17:], ent, err)
	})
}

// IterCookies visits all directories' entries by directory and cookie; name is
// valid during the call.
func IterCookies(e store.Engine, fn func(dir wire.FID, cookie uint64, child wire.FID, t wire.FileType, name []byte, err error) error) error {
	return iteratePrefix(e, []byte{prefixCookie}, func(k, v []byte) error {
		if len(k) != 25 {
			return fn(wire.FID{}, 0, wire.FID{}, 0, nil, fmt.Errorf("cookie key %x: %w", k, errRecord))
		}
		child, t, name, err := DecodeCookieRec(v)
		return fn(wire.GetFID(k[1:]), be.Uint64(k[17:]), child, t, name, err)
	})
}

// IterLinks visits all symlink targets; target is valid during the call.
func IterLinks(e store.Engine, fn func(f wire.FID, target []byte, err error) error) error {
	return iteratePrefix(e, []byte{prefixLink}, func(k, v []byte) error {
		if len(k) != 17 {
			return fn(wire.FID{}, nil, fmt.Errorf("symlink key %x: %w", k, errRecord))
		}
		return fn(wire.GetFID(k[1:]), v, nil)
	})
}

// IterLogs visits the unlink and truncate records with IDs above after, in
// order of their IDs.
func IterLogs(e store.Engine, after uint64, fn func(l LogRec, err error) error) error {
	return iterate(e, appendLogKey(nil, after+1), []byte{prefixLog + 1}, func(k, v []byte) error {
		if len(k) != 9 {
			return fn(LogRec{}, fmt.Errorf("log key %x: %w", k, errRecord))
		}
		id := be.Uint64(k[1:])
		l, err := DecodeLogRec(id, v)
		l.ID = id
		return fn(l, err)
	})
}

// IterEpochs visits the open IO epochs.
func IterEpochs(e store.Engine, fn func(f wire.FID, c wire.ClientID, r EpochRec, err error) error) error {
	return iteratePrefix(e, []byte{prefixEpoch}, func(k, v []byte) error {
		if len(k) != 33 {
			return fn(wire.FID{}, wire.ClientID{}, EpochRec{}, fmt.Errorf("epoch key %x: %w", k, errRecord))
		}
		r, err := DecodeEpoch(v)
		return fn(wire.GetFID(k[1:]), wire.ClientID(k[17:33]), r, err)
	})
}

// IterClients visits the client table. Of a damaged entry c.Client is set if the
// key tells it.
func IterClients(e store.Engine, fn func(c ClientEntry, err error) error) error {
	return iteratePrefix(e, []byte{prefixMeta, metaClient}, func(k, v []byte) error {
		if len(k) != 18 {
			return fn(ClientEntry{}, fmt.Errorf("client key %x: %w", k, errRecord))
		}
		id := wire.ClientID(k[2:18])
		c, err := DecodeClient(id, v)
		c.Client = id
		return fn(c, err)
	})
}

// IterFences visits the evictions of which OSTs are still to be told.
func IterFences(e store.Engine, fn func(c wire.ClientID, f FenceRec, err error) error) error {
	return iteratePrefix(e, []byte{prefixMeta, metaFence}, func(k, v []byte) error {
		if len(k) != 18 {
			return fn(wire.ClientID{}, FenceRec{}, fmt.Errorf("fence key %x: %w", k, errRecord))
		}
		f, err := DecodeFence(v)
		return fn(wire.ClientID(k[2:18]), f, err)
	})
}

// IterSlots visits the results of reply slots.
func IterSlots(e store.Engine, fn func(c wire.ClientID, slot uint16, r recov.SlotRecord, err error) error) error {
	return iteratePrefix(e, []byte{prefixSlot}, func(k, v []byte) error {
		if len(k) != 19 {
			return fn(wire.ClientID{}, 0, recov.SlotRecord{}, fmt.Errorf("slot key %x: %w", k, errRecord))
		}
		id, slot := wire.ClientID(k[1:17]), be.Uint16(k[17:])
		var r recov.SlotRecord
		err := r.Decode(v)
		if err == nil && (r.Client != id || r.Slot != slot) {
			err = errRecord
		}
		return fn(id, slot, r, err)
	})
}

// ReadTarget reads the target's own record of the client table;
// store.ErrNotFound when there is none.
func ReadTarget(e store.Engine) (recov.TargetRecord, error) {
	v, err := e.Get(keyTarget, nil)
	if err != nil {
		return recov.TargetRecord{}, fmt.Errorf("target record: %w", err)
	}
	var r recov.TargetRecord
	if err := r.Decode(v); err != nil {
		return recov.TargetRecord{}, fmt.Errorf("target record: %w", err)
	}
	return r, nil
}

// IterVIPs visits the fencing epochs of VIPs.
func IterVIPs(e store.Engine, fn func(vip uint32, epoch uint64, err error) error) error {
	return iteratePrefix(e, []byte{prefixMeta, metaVIP}, func(k, v []byte) error {
		if len(k) != 6 {
			return fn(0, 0, fmt.Errorf("VIP key %x: %w", k, errRecord))
		}
		epoch, err := decodeU64Rec(v)
		return fn(be.Uint32(k[2:]), epoch, err)
	})
}

// IterReplies visits the stored reply records.
func IterReplies(e store.Engine, fn func(vip uint32, addr [16]byte, slot uint32, rec target.Record, err error) error) error {
	return iteratePrefix(e, []byte{target.ReplyPrefix}, func(k, v []byte) error {
		vip, addr, slot, err := target.ParseReplyKey(k)
		if err != nil {
			return fn(vip, addr, slot, target.Record{}, err)
		}
		rec, err := target.DecodeRecord(v)
		return fn(vip, addr, slot, rec, err)
	})
}

// Repair writes corrections to the engine of a stopped MDT. All changes take
// effect together with Apply.
type Repair struct{ b store.Batch }

// NewRepair starts a set of corrections.
func NewRepair(e store.Engine) *Repair { return &Repair{e.NewBatch()} }

// PutInode stores an inode under in.Attr.FID.
func (r *Repair) PutInode(in *Inode) {
	r.b.Set(appendInodeKey(nil, in.Attr.FID), AppendInode(nil, in))
}

// DeleteInode removes an inode and its symlink target.
func (r *Repair) DeleteInode(f wire.FID) {
	r.b.Delete(appendInodeKey(nil, f))
	r.b.Delete(appendLinkKey(nil, f))
}

// DeleteLink removes a symlink's target.
func (r *Repair) DeleteLink(f wire.FID) { r.b.Delete(appendLinkKey(nil, f)) }

// PutName stores a directory entry and its cookie.
func (r *Repair) PutName(dir wire.FID, name []byte, ent Entry) {
	r.b.Set(appendNameKey(nil, dir, name), AppendEntry(nil, &ent))
	r.b.Set(appendCookieKey(nil, dir, ent.Cookie), appendCookieRec(nil, ent.FID, ent.Type, name))
}

// DeleteName removes a directory entry, without its cookie.
func (r *Repair) DeleteName(dir wire.FID, name []byte) { r.b.Delete(appendNameKey(nil, dir, name)) }

// DeleteCookie removes a cookie's record.
func (r *Repair) DeleteCookie(dir wire.FID, cookie uint64) {
	r.b.Delete(appendCookieKey(nil, dir, cookie))
}

// PutLog stores a log record under l.ID.
func (r *Repair) PutLog(l *LogRec) { r.b.Set(appendLogKey(nil, l.ID), AppendLogRec(nil, l)) }

// DeleteLog removes a log record.
func (r *Repair) DeleteLog(id uint64) { r.b.Delete(appendLogKey(nil, id)) }

// DeleteEpoch removes an open IO epoch.
func (r *Repair) DeleteEpoch(f wire.FID, c wire.ClientID) { r.b.Delete(appendEpochKey(nil, f, c)) }

// PutSuper stores the superblock.
func (r *Repair) PutSuper(s *Super) { r.b.Set(keySuper, appendSuper(nil, s)) }

// PutState stores the superblock's transaction part, for corrected counts.
func (r *Repair) PutState(s *State) { r.b.Set(keyState, appendState(nil, s)) }

// DeleteRaw removes a key that no other method can name.
func (r *Repair) DeleteRaw(key []byte) { r.b.Delete(key) }

// Apply makes the corrections durable.
func (r *Repair) Apply(e store.Engine) error {
	if err := e.Apply(r.b); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	if err := e.Sync(); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	return nil
}
