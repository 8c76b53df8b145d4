package mdt

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// outcome is what an answer is made of again: from a reply record, which has
// Status to Truncate, or from a reply slot.
type outcome struct {
	Status   wire.Status
	Transno  uint64
	FID      wire.FID // the object made, found or changed
	Created  bool
	Truncate wire.Truncate

	// Generation and Layout are the object's; with Time and Pre they are what the
	// client keeps for a replay. Time is 0 when nothing was changed.
	Generation uint32
	Layout     wire.Layout
	Time       int64
	Pre        [4]uint64
	// Count of the reply, or of the locks that were freed.
	Count uint32
}

// The stored form is a format byte, a byte of flags, Pre and, as the flags say,
// Time, the object, Truncate, Count.
const (
	outTime = 1 << iota
	outObject
	outCreated
	outTruncate
	outCount

	outAll = outTime | outObject | outCreated | outTruncate | outCount
	// maxOutcome is the size of the largest stored outcome in bytes.
	maxOutcome = 2 + 4*8 + 8 + wire.FIDSize + 4 + 5 + 2*wire.MaxStripes + 16 + 4
)

func appendOutcome(b []byte, o *outcome) []byte {
	var flags byte
	at := len(b) + 1
	b = append(b, recFormat, 0)
	for _, v := range o.Pre {
		b = be.AppendUint64(b, v)
	}
	if o.Time != 0 {
		flags |= outTime
		b = be.AppendUint64(b, uint64(o.Time))
	}
	if !o.FID.IsZero() {
		flags |= outObject
		b = be.AppendUint32(o.FID.Append(b), o.Generation)
		b = appendLayout(b, &o.Layout)
	}
	if o.Created {
		flags |= outCreated
	}
	if o.Truncate.LogID != 0 {
		flags |= outTruncate
		b = be.AppendUint64(be.AppendUint64(b, o.Truncate.LogID), o.Truncate.Size)
	}
	if o.Count != 0 {
		flags |= outCount
		b = be.AppendUint32(b, o.Count)
	}
	b[at] = flags
	return b
}

func decodeOutcome(v []byte) (outcome, error) {
	bad := func() (outcome, error) { return outcome{}, fmt.Errorf("result of an operation: %w", errRecord) }
	if len(v) < 2+4*8 || v[0] != recFormat || v[1]&^outAll != 0 {
		return bad()
	}
	flags := v[1]
	o := outcome{Created: flags&outCreated != 0}
	for i := range o.Pre {
		o.Pre[i] = be.Uint64(v[2+8*i:])
	}
	v = v[2+4*8:]
	if flags&outTime != 0 {
		if len(v) < 8 {
			return bad()
		}
		if o.Time, v = int64(be.Uint64(v)), v[8:]; o.Time == 0 {
			return bad()
		}
	}
	if flags&outObject != 0 {
		if len(v) < wire.FIDSize+4 {
			return bad()
		}
		o.FID, o.Generation = wire.GetFID(v), be.Uint32(v[wire.FIDSize:])
		var err error
		if o.Layout, v, err = getLayout(v[wire.FIDSize+4:]); err != nil || o.FID.IsZero() {
			return bad()
		}
	}
	if flags&outTruncate != 0 {
		if len(v) < 16 {
			return bad()
		}
		o.Truncate = wire.Truncate{LogID: be.Uint64(v), Size: be.Uint64(v[8:])}
		if v = v[16:]; o.Truncate.LogID == 0 {
			return bad()
		}
	}
	if flags&outCount != 0 {
		if len(v) < 4 {
			return bad()
		}
		if o.Count, v = be.Uint32(v), v[4:]; o.Count == 0 {
			return bad()
		}
	}
	if len(v) != 0 {
		return bad()
	}
	return o, nil
}

// outcome encodes the operation's outcome for its reply slot; made is its
// timestamp, 0 when it has changed nothing.
func (t *tx) outcome(made int64) []byte {
	o := outcome{
		FID: t.fid, Created: t.rep.Created, Truncate: t.rep.Truncate,
		Time: made, Pre: t.rep.PreVersions, Count: t.rep.Count,
	}
	if in := t.obj.cur; in != nil {
		o.Generation, o.Layout = in.Attr.Generation, in.Attr.Layout
	} else if in := t.obj.old; in != nil {
		o.Generation, o.Layout = in.Attr.Generation, in.Attr.Layout
	}
	if l := t.rep.Lock; l != nil {
		o.Count = l.Freed
	}
	return appendOutcome(make([]byte, 0, maxOutcome), &o)
}

// reconstruct makes the answer to an operation that was executed before.
// Attributes are today's. The sequencer's lock is held.
func (m *MDT) reconstruct(req *wire.Request, rep *wire.Reply, o *outcome) {
	rep.Reconstructed = true
	rep.Transno, rep.Created = o.Transno, o.Created
	if _, ok := m.pendID[o.Truncate.LogID]; ok {
		rep.Truncate = o.Truncate
	}
	if isLockOp(req.Op) {
		m.rebuildLock(req, rep, o)
		return
	}
	rep.Count = o.Count
	if !o.FID.IsZero() {
		if in, st := m.inode(o.FID, false); in != nil {
			rep.Attr, rep.HasAttr = in.Attr, true
		} else if st == wire.ErrStale && o.Time != 0 {
			// Removed since. The client needs to know what it has made, lest it
			// could not replay it.
			rep.Attr, rep.HasAttr = o.attr(req), true
		}
	}
	switch req.Op {
	case wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod, wire.OpRemove, wire.OpRmdir, wire.OpRename:
		if in, _ := m.inode(req.FID, false); in != nil && in.Attr.Type == wire.TypeDir {
			rep.DirAttr, rep.HasDir = in.Attr, true
		}
	}
	if req.Op == wire.OpRename || req.Op == wire.OpLink {
		if in, _ := m.inode(req.FID2, false); in != nil && in.Attr.Type == wire.TypeDir {
			rep.DirAttr2, rep.HasDir2 = in.Attr, true
		}
	}
}

// attr describes an object that has no links any more.
func (o *outcome) attr(req *wire.Request) wire.Attr {
	a := wire.Attr{
		FID: o.FID, Type: wire.TypeReg, Generation: o.Generation, Layout: o.Layout,
		Atime: o.Time, Mtime: o.Time, Ctime: o.Time, Version: o.Transno,
	}
	switch req.Op {
	case wire.OpMkdir:
		a.Type = wire.TypeDir
	case wire.OpSymlink:
		a.Type = wire.TypeLnk
	case wire.OpMknod:
		a.Type = req.Type
	}
	return a
}

// rebuildLock fills in what can be known of a lock operation's answer: how many
// locks it has freed, who is in the way now, the service's state now.
func (m *MDT) rebuildLock(req *wire.Request, rep *wire.Reply, o *outcome) {
	rep.Lock = &wire.LockReply{Freed: o.Count}
	if req.Lock == nil {
		return
	}
	switch {
	case req.Op == wire.OpLockService:
		rep.Lock.Service = m.locks.Info(req.VIP)
	case req.Op == wire.OpLock && o.Status == wire.ErrLockDenied:
		a := *req.Lock
		a.Owner.VIP = req.VIP
		_, rep.Lock.Holder = m.locks.Test(max(m.o.Clock(), m.state.Time), req.FID, &a)
	}
}

var _ = [1]struct{}{}[maxOutcome/(recov.MaxResult+1)] // it fits into a slot
