package nfsd

import (
	"context"
	"net/netip"
	"sync"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// lockPort stands for the port of callers of the lock manager when their export
// is looked for: lock calls come from the client's kernel by a port of their own
// choice, also where files are mounted from reserved ones. exports(5) has an
// option of its own for this (insecure_locks), and refusing would tell programs
// that locks do not work on a file system that does.
const lockPort = 0

type lockMsg struct {
	req wire.Request
	rep wire.Reply
}

var lockMsgs = sync.Pool{New: func() any { return new(lockMsg) }}

// LockFile gives the file that a handle names, for the lock manager: the caller
// must have the handle's export, whatever its port and whether it may write
// there (locks are advisory), and the file must exist and be a regular one. It
// may block. Statuses: ErrBadHandle, ErrStale, ErrInval for what is no regular
// file, those of the export's check, and the target's.
func (a *Address) LockFile(c *sunrpc.Call, fh []byte) (wire.FID, wire.Status) {
	var h nfs3.Handle
	var err error
	if h, err = a.srv.cfg.Codec.Decode(fh); err != nil {
		return wire.FID{}, wire.ErrBadHandle
	}
	if _, _, st, _ := a.srv.decide(netip.AddrPortFrom(c.Remote.Addr(), lockPort), h.FSID, true); st != wire.OK {
		return wire.FID{}, st
	}
	// The type and the generation are the MDT's own: a file that is being
	// written does not need its objects asked for their sizes.
	m := lockMsgs.Get().(*lockMsg)
	defer lockMsgs.Put(m)
	m.req.Reset()
	m.rep.Reset()
	m.req.Op = wire.OpGetattr
	m.req.FID = h.FID
	fs, owner := a.srv.fs, a.owner()
	if !fs.Try(owner, &m.req, &m.rep) {
		fs.Call(context.Background(), owner, &m.req, &m.rep)
	}
	switch {
	case m.rep.Status != wire.OK:
		return wire.FID{}, m.rep.Status
	case m.rep.Attr.Generation != h.Generation:
		return wire.FID{}, wire.ErrStale
	case m.rep.Attr.Type != wire.TypeReg:
		return wire.FID{}, wire.ErrInval
	}
	return h.FID, wire.OK
}
