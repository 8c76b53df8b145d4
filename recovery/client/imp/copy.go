package imp

import (
	"math/bits"
	"sync"

	"github.com/baton-nfs/baton/recovery/wire"
)

// requestOverhead is what keeping a request costs besides its data, in bytes.
const requestOverhead = 2048

// size is the memory that a copy of req takes.
func size(req *wire.Request) int64 {
	n := len(req.Name) + len(req.Name2) + len(req.Data) + len(req.Bulk) + 8*len(req.LogIDs) + 64*len(req.Epochs)
	if req.Lock != nil {
		n += len(req.Lock.Note)
	}
	return requestOverhead + int64(n)
}

// Buffers are pooled by the power of two that holds them, 256 bytes to 4 MiB.
const (
	minShift = 8
	maxShift = 22
)

var buffers [maxShift - minShift + 1]sync.Pool // *[]byte

func getBuffer(n int) *[]byte {
	shift := max(bits.Len(uint(max(n, 1)-1)), minShift)
	if shift > maxShift {
		b := make([]byte, n)
		return &b
	}
	if b, ok := buffers[shift-minShift].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, 1<<shift)
	return &b
}

func putBuffer(b *[]byte) {
	n := len(*b)
	if shift := bits.Len(uint(n)) - 1; n == 1<<shift && shift >= minShift && shift <= maxShift {
		buffers[shift-minShift].Put(b)
	}
}

// keep copies what a replay needs of the answered request into o.kept.
func (o *op) keep(req *wire.Request, rep *wire.Reply) {
	k := &o.kept
	ids, epochs := k.LogIDs[:0], k.Epochs[:0]
	*k = *req
	k.Flags = o.flags &^ (wire.FlagWaitCommit | wire.FlagResend)
	k.Transno, k.PreVersions = rep.Transno, rep.PreVersions
	k.LogIDs = append(ids, req.LogIDs...)
	k.Epochs = append(epochs, req.Epochs...)
	n := len(req.Name) + len(req.Name2) + len(req.Data) + len(req.Bulk)
	if req.Lock != nil {
		n += len(req.Lock.Note)
	}
	if n > 0 {
		o.buf = getBuffer(n)
		b := *o.buf
		cut := func(src []byte) []byte {
			if src == nil {
				return nil
			}
			m := copy(b, src)
			d := b[:m:m]
			b = b[m:]
			return d
		}
		k.Name, k.Name2, k.Data, k.Bulk = cut(req.Name), cut(req.Name2), cut(req.Data), cut(req.Bulk)
		if req.Lock != nil {
			o.lock = *req.Lock
			o.lock.Note = cut(req.Lock.Note)
			k.Lock = &o.lock
		}
	} else if req.Lock != nil {
		o.lock = *req.Lock
		k.Lock = &o.lock
	}
	if o.im.o.Keep != nil {
		o.im.o.Keep(k, rep)
		return
	}
	Identity(k, rep)
}

// drop gives the copy's memory back.
func (o *op) drop() {
	if o.buf != nil {
		putBuffer(o.buf)
		o.buf = nil
	}
	o.kept = wire.Request{LogIDs: o.kept.LogIDs[:0], Epochs: o.kept.Epochs[:0]}
	o.lock = wire.LockArgs{}
}

// Identity completes a request that is kept for replay with what its first
// execution decided, so that the replay makes the same object at the same time.
func Identity(kept *wire.Request, rep *wire.Reply) {
	if !kept.Op.IsMDT() {
		return
	}
	kept.Made = wire.Made{Time: rep.Time}
	switch kept.Op {
	case wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod:
		kept.Made.FID, kept.Made.Generation, kept.Made.Layout = rep.Attr.FID, rep.Attr.Generation, rep.Attr.Layout
	}
}

// describe fills in what the machine has to know of req.
func describe(r *Request, req *wire.Request) {
	r.Modifies = req.Op.Modifies()
	r.WaitCommit = req.Flags&wire.FlagWaitCommit != 0
	r.Long = req.Op == wire.OpLockPoll
	if !r.Modifies {
		return
	}
	r.Bytes = size(req)
	switch req.Op {
	case wire.OpOpenEpoch:
		r.OpensEpoch = true
	case wire.OpCreate:
		r.OpensEpoch = req.Flags&wire.FlagOpenEpoch != 0
	case wire.OpSetattr:
		r.OpensEpoch = req.SetAttr.Mask&wire.SetSize != 0
	case wire.OpCloseEpoch:
		for i := range req.Epochs {
			r.Closes = append(r.Closes, req.Epochs[i].FID)
		}
	case wire.OpDisconnect:
		r.Leaves = true
	}
}

// opened is the IO epoch that the answered request has opened, or zero.
func opened(req *wire.Request, rep *wire.Reply) wire.FID {
	if rep.Status != wire.OK {
		return wire.FID{}
	}
	switch req.Op {
	case wire.OpOpenEpoch:
		return req.FID
	case wire.OpCreate:
		if rep.Created {
			return rep.Attr.FID
		}
	case wire.OpSetattr:
		if rep.Truncate.LogID != 0 {
			return req.FID
		}
	}
	return wire.FID{}
}
