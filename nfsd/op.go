package nfsd

import (
	"context"

	"github.com/cespare/xxhash/v2"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/inflight"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// op is the state of one NFS call. It stays with its sunrpc.Call object, so
// that a call needs no allocation of its own.
type op struct {
	c    *sunrpc.Call
	a    *Address
	proc nfs.NFSProcedure
	ctx  context.Context

	h, h2 nfs3.Handle
	dec   *exports.Decision
	set   *exportSet
	cred  wire.Cred
	attr  wire.Attr
	req   wire.Request
	rep   wire.Reply
	fh    [nfs3.HandleSize]byte
	dw    nfs3.DirWriter
	rd    xdr.Reader

	// after runs when a submitted request is answered; done is the bound
	// callback given to the file system, slow the one given to the worker pool.
	after  func(*op)
	done   func()
	onPool func(*sunrpc.Call)
	dup    inflight.Entry[*op]
}

type nfsHandler struct{ a *Address }

// procDef says how a procedure runs. run returns false when it would have to
// wait and block is false; it has then written nothing.
type procDef struct {
	run func(o *op, block bool) bool
	// inline: worth a try on the connection's reader goroutine.
	inline bool
}

var procs = [nfs3.NumProcs]procDef{
	nfs.NFSProcedureGetAttr:     {(*op).getattr, true},
	nfs.NFSProcedureSetAttr:     {(*op).setattr, false},
	nfs.NFSProcedureLookup:      {(*op).lookup, true},
	nfs.NFSProcedureAccess:      {(*op).access, true},
	nfs.NFSProcedureReadlink:    {(*op).readlink, true},
	nfs.NFSProcedureRead:        {(*op).read, true},
	nfs.NFSProcedureWrite:       {(*op).write, false},
	nfs.NFSProcedureCreate:      {(*op).create, false},
	nfs.NFSProcedureMkDir:       {(*op).mkdir, false},
	nfs.NFSProcedureSymlink:     {(*op).symlink, false},
	nfs.NFSProcedureMkNod:       {(*op).mknod, false},
	nfs.NFSProcedureRemove:      {(*op).remove, false},
	nfs.NFSProcedureRmDir:       {(*op).remove, false},
	nfs.NFSProcedureRename:      {(*op).rename, false},
	nfs.NFSProcedureLink:        {(*op).link, false},
	nfs.NFSProcedureReadDir:     {(*op).readdir, false},
	nfs.NFSProcedureReadDirPlus: {(*op).readdirplus, false},
	nfs.NFSProcedureFSStat:      {(*op).fsstat, false},
	nfs.NFSProcedureFSInfo:      {(*op).fsinfo, true},
	nfs.NFSProcedurePathConf:    {(*op).pathconf, true},
	nfs.NFSProcedureCommit:      {(*op).commit, false},
}

// ServeRPC answers an NFS call or hands it to a worker.
func (h nfsHandler) ServeRPC(c *sunrpc.Call) {
	o, _ := c.State.(*op)
	if o == nil {
		o = &op{ctx: context.Background()}
		o.done = o.completed
		o.onPool = func(*sunrpc.Call) { procs[o.proc].run(o, true) }
		c.State = o
	}
	o.c, o.a, o.proc = c, h.a, nfs.NFSProcedure(c.Proc)
	if c.Conn != nil && c.Conn.Value() == nil {
		h.a.srv.connOpened(c.Conn)
	}
	p := &procs[o.proc]
	if p.run == nil {
		c.Fail(sunrpc.ProcUnavail)
		return
	}
	if p.inline && p.run(o, false) {
		return
	}
	if n := o.replySize(); n > 0 {
		c.GoReply(n, o.onPool)
		return
	}
	c.Go(o.onPool)
}

// replySize is about how long the reply can be, 0 when it is short. It looks at
// the count that the client gives, in arguments that were not checked yet.
func (o *op) replySize() int {
	skip, most := 0, o.a.srv.cfg.DTMax // bytes between the handle and the count
	switch o.proc {
	case nfs.NFSProcedureRead:
		skip, most = 8, o.a.srv.cfg.RTMax
	case nfs.NFSProcedureReadDir:
		skip = 16
	case nfs.NFSProcedureReadDirPlus:
		skip = 20
	default:
		return 0
	}
	r := o.args()
	nfs3.GetFH(r)
	r.Skip(skip)
	return int(min(r.Uint32(), most))
}

// args returns a reader over the call's arguments.
func (o *op) args() *xdr.Reader {
	o.rd = *xdr.NewReader(o.c.Args)
	return &o.rd
}

func (o *op) garbage() bool {
	o.c.Fail(sunrpc.GarbageArgs)
	return true
}

// open checks a file handle and the caller's right to use its export, and sets
// o.dec, o.set and o.cred. ok is false when it would have to wait.
func (o *op) open(fh []byte, h *nfs3.Handle, block bool) (st wire.Status, ok bool) {
	var err error
	if *h, err = o.a.srv.cfg.Codec.Decode(fh); err != nil {
		return wire.ErrBadHandle, true
	}
	o.dec, o.set, st, ok = o.a.srv.decide(o.c.Remote, h.FSID, block)
	if !ok || st != wire.OK {
		return st, ok
	}
	cr := &o.c.Cred
	o.cred = wire.Cred{UID: cr.UID, GID: cr.GID, NGIDs: cr.NGIDs, GIDs: cr.GIDs}
	o.dec.Squash(&o.cred, cr.Flavor)
	return wire.OK, true
}

// openAttr is open plus the object's current attributes in o.attr.
func (o *op) openAttr(fh []byte, block bool) (st wire.Status, ok bool) {
	if st, ok = o.open(fh, &o.h, block); !ok || st != wire.OK {
		return st, ok
	}
	st, ok = o.a.srv.fs.Attr(o.ctx, o.owner(), o.h.FID, &o.attr, block)
	if ok && st == wire.OK && o.attr.Generation != o.h.Generation {
		st = wire.ErrStale
	}
	return st, ok
}

// current makes sure that h's generation is its object's. FIDs are not used
// twice by one store, but they are by another store that was made under the same
// cluster key: handles from before must not reach into it. o.req and o.rep are
// used. It may block.
func (o *op) current(h *nfs3.Handle) wire.Status {
	q := o.newReq(wire.OpGetattr)
	q.FID = h.FID
	fs, owner := o.a.srv.fs, o.owner()
	if !fs.Try(owner, q, &o.rep) {
		fs.Call(o.ctx, owner, q, &o.rep)
	}
	// Any error is the MDT's to give: a retransmission must find its record first.
	if o.rep.Status == wire.OK && o.rep.Attr.Generation != h.Generation {
		return wire.ErrStale
	}
	return wire.OK
}

// fail answers with an error and no attributes.
func (o *op) fail(st wire.Status) bool {
	if o.dropped(st) {
		return true
	}
	nfs3.PutFail(&o.c.Out, o.proc, nfs3.Status(o.proc, st))
	o.finish()
	return true
}

// failAttr answers with an error and the object's attributes, for procedures
// whose failed result is a post_op_attr.
func (o *op) failAttr(st wire.Status, a *wire.Attr) bool {
	if o.dropped(st) {
		return true
	}
	nfs3.PutFailPostOp(&o.c.Out, nfs3.Status(o.proc, st), a, o.h.FSID)
	o.finish()
	return true
}

// dropped gives no answer at all when this node has lost the address: the new
// owner answers the retransmission.
func (o *op) dropped(st wire.Status) bool {
	if !nfs3.DropReply(st) {
		return false
	}
	if o.a.Fenced.Add(1) == 1 {
		o.a.srv.log.Error("this service address has a newer owner; calls to it are no longer answered here", "vip", o.a.vip)
		if f := o.a.srv.cfg.OnFenced; f != nil {
			f(o.a.vip, o.a.epoch.Load())
		}
	}
	o.release()
	o.c.Drop()
	return true
}

func (o *op) finish() {
	o.release()
	o.c.Finish()
}

// release lets held duplicates of the call run.
func (o *op) release() {
	for _, d := range o.a.srv.dups.End(&o.dup) {
		d.c.Go(d.onPool)
	}
}

// owner is who the call's requests are made for: the service address, and how
// durable the export wants to have them.
func (o *op) owner() client.Owner {
	w := o.a.owner()
	w.TwoNode = o.dec != nil && o.dec.Durability == exports.DurabilityTwoNode
	return w
}

// newReq clears the request and sets what every request carries.
func (o *op) newReq(code wire.Op) *wire.Request {
	o.req.Reset()
	o.rep.Reset()
	o.req.Op = code
	o.req.Cred = o.cred
	return &o.req
}

// modify starts a non-idempotent call: it refuses read-only exports, and makes
// sure that a duplicate of a running call waits for it. False means that the
// call was answered or is being held.
func (o *op) modify(code wire.Op) bool {
	if o.dec.ReadOnly {
		o.fail(wire.ErrROFS)
		return false
	}
	r := o.newReq(code)
	r.Flags = wire.FlagWaitCommit
	r.Key = wire.ReplyKey{
		Addr: o.c.Remote.Addr().As16(),
		Port: o.c.Remote.Port(),
		XID:  o.c.XID,
		Proc: nfs3.Program<<8 | uint32(o.proc),
		Sum:  o.checksum(),
	}
	if o.dup.Running() {
		return true
	}
	switch o.a.srv.dups.Begin(&o.dup, &r.Key, o) {
	case inflight.Run:
		return true
	case inflight.Full:
		o.c.Drop()
	}
	return false
}

// checksum covers the arguments and who calls, but not the credential's stamp,
// which clients renew when they send a call again.
func (o *op) checksum() uint64 {
	h := xxhash.Sum64(o.c.Args)
	c := &o.c.Cred
	return h ^ (uint64(c.UID)<<32|uint64(c.GID)+1)*0x9e3779b97f4a7c15 ^ uint64(c.Flavor)<<17
}

// submit sends o.req to the MDT; after runs with the answer in o.rep and must
// not block.
func (o *op) submit(after func(*op)) bool {
	o.after = after
	o.a.srv.fs.Submit(o.owner(), &o.req, &o.rep, o.done)
	return true
}

func (o *op) completed() {
	if o.resolvePort() || o.evicted() {
		after := o.after
		o.c.Go(func(*sunrpc.Call) { o.submit(after) })
		return
	}
	if o.rep.Reconstructed {
		o.rep.Pre, o.rep.DirPre, o.rep.DirPre2 = wire.PreAttr{}, wire.PreAttr{}, wire.PreAttr{}
	}
	if o.dropped(o.rep.Status) {
		return
	}
	o.after(o)
}

// resolvePort decides what to do when a reply record matches in all but the
// source port, and prepares the request to be given again. While the connection
// the recorded call came by lives, its reply was or will be delivered there, so
// this is another call; if that connection is dead, this is the retransmission.
func (o *op) resolvePort() bool {
	if o.rep.Status != wire.ErrPortMismatch {
		return false
	}
	// A call whose own connection is dead may be the original that was read after
	// its retransmission: it must not be executed as another call either.
	gone := o.c.Conn != nil && !o.c.Conn.Alive()
	if !gone && o.a.srv.connAlive(o.c.Local.Addr(), o.c.Remote.Addr(), o.rep.Port) {
		o.req.Flags |= wire.FlagForceNew
	} else {
		o.req.Flags |= wire.FlagAnyPort
	}
	o.rep.Reset()
	return true
}

// evicted tells that the MDT has evicted this node while it had the request, and
// prepares the request to be given again: if it was executed, its reply record
// has the answer.
func (o *op) evicted() bool {
	if o.rep.Status != wire.ErrUnknownClient {
		return false
	}
	o.rep.Reset()
	return true
}

// status is the answer's NFS status.
func (o *op) status() nfs.NFSStatus { return nfs3.Status(o.proc, o.rep.Status) }

// encodeFH puts the handle of an object in the call's export into o.fh.
func (o *op) encodeFH(a *wire.Attr) []byte {
	o.a.srv.cfg.Codec.Encode(nfs3.Handle{FSID: o.h.FSID, FID: a.FID, Generation: a.Generation}, &o.fh)
	return o.fh[:]
}

func opt(a *wire.Attr, has bool) *wire.Attr {
	if has {
		return a
	}
	return nil
}
