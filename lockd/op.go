package lockd

import (
	"github.com/cespare/xxhash/v2"

	"github.com/baton-nfs/baton/internal/inflight"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// op is the state of one NLM call. It stays with its sunrpc.Call object, so that
// a call needs hardly an allocation of its own.
type op struct {
	c *sunrpc.Call
	a *Address

	vers uint32
	// proc is the request, in its synchronous form; with async the result goes to
	// the client as a call of result.
	proc, result nlm.Proc
	async        bool

	// The decoded arguments. Slices alias the call's.
	cookie []byte
	lock   nlm.Lock // SHARE, UNSHARE and FREE_ALL use CallerName, FH and OH only
	state  uint32   // FREE_ALL

	args wire.LockArgs
	req  wire.Request
	rep  wire.Reply
	note [noteMax]byte
	rd   xdr.Reader

	dup inflight.Entry[*op]

	// done is the bound callback given to the table, onPool the one given to the
	// worker pool.
	done   func()
	onPool func(*sunrpc.Call)
}

type handler struct{ a *Address }

// ServeRPC answers an NLM call or hands it to a worker: requests have to look
// their file up and take a turn at the table.
func (h handler) ServeRPC(c *sunrpc.Call) {
	o, _ := c.State.(*op)
	if o == nil {
		o = new(op)
		o.done = o.completed
		o.onPool = func(*sunrpc.Call) { o.run() }
		c.State = o
	}
	o.c, o.a, o.vers = c, h.a, c.Vers
	p := nlm.Proc(c.Proc)
	if !nlm.Served(c.Vers, p) {
		c.Fail(sunrpc.ProcUnavail)
		return
	}
	h.a.count.calls.Add(1)
	if p >= nlm.ProcTestRes && p <= nlm.ProcGrantedRes {
		o.serveResult(p)
		return
	}
	o.proc, o.result, o.async = nlm.Async(p)
	if o.decode() != nil {
		c.Fail(sunrpc.GarbageArgs)
		return
	}
	if o.proc == nlm.ProcGranted {
		// This server asks nobody for locks.
		o.finish(nlm.Denied)
		return
	}
	c.Go(o.onPool)
}

// serveResult takes an answer that a client gives in a call of its own. Only
// GRANTED_RES can belong to something that was asked.
func (o *op) serveResult(p nlm.Proc) {
	o.rd.Reset(o.c.Args)
	var res nlm.Res
	var err error
	if p == nlm.ProcTestRes {
		var x nlm.TestRes
		err = x.Decode(&o.rd, o.vers)
	} else {
		err = res.Decode(&o.rd, o.vers)
	}
	if err != nil {
		o.c.Fail(sunrpc.GarbageArgs)
		return
	}
	if e := o.a.eng.Load(); e != nil && p == nlm.ProcGrantedRes {
		e.answered(clientAddr(o.c.Remote), res.Cookie, res.Stat)
	}
	o.c.Finish()
}

// decode reads the arguments of o.proc and prepares o.args.
func (o *op) decode() error {
	o.rd.Reset(o.c.Args)
	r, l := &o.rd, &o.args
	// The strings of the last call that this object served are used again when
	// they are the same: most calls of a client differ in little.
	name, oh := l.Owner.Name, l.Owner.OH
	*l = wire.LockArgs{}
	o.state, o.lock = 0, nlm.Lock{}
	var err error
	switch o.proc {
	case nlm.ProcTest, nlm.ProcGranted:
		var x nlm.TestArgs
		err = x.Decode(r, o.vers)
		o.cookie, o.lock, l.Exclusive = x.Cookie, x.Lock, x.Exclusive
	case nlm.ProcLock, nlm.ProcNMLock:
		var x nlm.LockArgs
		err = x.Decode(r, o.vers)
		o.cookie, o.lock, l.Exclusive = x.Cookie, x.Lock, x.Exclusive
		l.Block, l.Reclaim = x.Block, x.Reclaim
		l.Monitor = o.proc == nlm.ProcLock
	case nlm.ProcCancel:
		var x nlm.CancelArgs
		err = x.Decode(r, o.vers)
		o.cookie, o.lock, l.Exclusive = x.Cookie, x.Lock, x.Exclusive
		l.Block = x.Block
	case nlm.ProcUnlock:
		var x nlm.UnlockArgs
		err = x.Decode(r, o.vers)
		o.cookie, o.lock = x.Cookie, x.Lock
	case nlm.ProcShare, nlm.ProcUnshare:
		var x nlm.ShareArgs
		err = x.Decode(r, o.vers)
		o.cookie = x.Cookie
		o.lock = nlm.Lock{CallerName: x.CallerName, FH: x.FH, OH: x.OH}
		l.ShareMode, l.ShareAccess = uint8(x.Mode), uint8(x.Access)
		l.Reclaim = x.Reclaim
		// The owner is told of a restart, since it can reclaim.
		l.Monitor = o.proc == nlm.ProcShare
	case nlm.ProcFreeAll:
		var x nlm.Notify
		err = x.Decode(r, o.vers)
		o.cookie, o.lock.CallerName, o.state = nil, x.Name, x.State
	}
	if err != nil {
		return err
	}
	if string(o.lock.CallerName) != name {
		name = string(o.lock.CallerName)
	}
	if string(o.lock.OH) != oh {
		oh = string(o.lock.OH)
	}
	l.Owner = wire.LockOwner{
		LockHost: wire.LockHost{VIP: o.a.owner.VIP, Addr: clientAddr(o.c.Remote), Name: name},
		Svid:     o.lock.Svid, OH: oh,
	}
	return nil
}

var opOf = [...]wire.Op{
	nlm.ProcTest: wire.OpLockTest, nlm.ProcLock: wire.OpLock, nlm.ProcNMLock: wire.OpLock,
	nlm.ProcCancel: wire.OpLockCancel, nlm.ProcUnlock: wire.OpUnlock,
	nlm.ProcShare: wire.OpShare, nlm.ProcUnshare: wire.OpUnshare, nlm.ProcFreeAll: wire.OpLockFree,
}

// run executes the request; it may block.
func (o *op) run() {
	l := &o.args
	o.req.Reset()
	o.rep.Reset()
	if o.proc != nlm.ProcFreeAll {
		fid, st := o.a.files.LockFile(o.c, o.lock.FH)
		if st == wire.OK && o.proc != nlm.ProcShare && o.proc != nlm.ProcUnshare {
			l.Range, st = nlm.Range(o.vers, o.lock.Offset, o.lock.Len)
		}
		if st != wire.OK {
			o.answer(st)
			return
		}
		o.req.FID = fid
	}
	if l.Block && opOf[o.proc] == wire.OpLock {
		n := note{vers: o.vers, udp: o.c.Conn == nil, offset: o.lock.Offset, len: o.lock.Len, fh: o.lock.FH}
		l.Note = n.append(o.note[:0])
	}
	o.req.Op = opOf[o.proc]
	o.req.Cookie = uint64(o.state)
	o.req.Lock = l
	if o.proc != nlm.ProcTest {
		// A copy that comes by another port is still the same call: were it
		// executed after the unlock that followed its original, it would take a
		// lock that nobody knows of and nobody gives back.
		o.req.Flags = wire.FlagWaitCommit | wire.FlagAnyPort
		o.req.Key = wire.ReplyKey{
			Addr: o.c.Remote.Addr().As16(), Port: o.c.Remote.Port(), XID: o.c.XID,
			Proc: nlm.Program<<8 | o.c.Proc, Sum: o.checksum(),
		}
		if !o.dup.Running() {
			switch o.a.dups.Begin(&o.dup, &o.req.Key, o) {
			case inflight.Held:
				return
			case inflight.Full:
				o.a.count.dropped.Add(1)
				o.c.Drop()
				return
			}
		}
	}
	o.a.srv.cfg.Table.Submit(o.a.owner, &o.req, &o.rep, o.done)
}

// checksum covers version, arguments and who calls, but not the credential's
// stamp, which clients renew when they send a call again.
func (o *op) checksum() uint64 {
	c := &o.c.Cred
	return xxhash.Sum64(o.c.Args) ^ (uint64(c.UID)<<32|uint64(o.vers)<<8|uint64(c.Flavor)+1)*0x9e3779b97f4a7c15
}

func (o *op) completed() {
	st := o.rep.Status
	if st == wire.ErrUnknownClient {
		// The MDT has evicted this node while it had the request. If it was executed,
		// its reply record has the answer. A client whose connection is gone asks again
		// itself, unless it has died, and then nobody may give it locks.
		if o.c.Conn != nil && !o.c.Conn.Alive() {
			o.a.count.dropped.Add(1)
			o.c.Drop()
			return
		}
		o.c.Go(o.onPool)
		return
	}
	if e := o.a.eng.Load(); st == wire.OK && e != nil && (o.req.Op == wire.OpLock || o.req.Op == wire.OpUnlock || o.req.Op == wire.OpLockCancel) {
		e.settle(o.req.FID, &o.args.Owner, o.args.Range)
	}
	o.answer(st)
}

// answer gives the client the outcome in its version's terms, or nothing.
func (o *op) answer(st wire.Status) {
	s, ok := nlm.StatFor(o.vers, st)
	if !ok {
		o.a.count.dropped.Add(1)
		if st == wire.ErrStaleVIP {
			o.a.fenced()
		}
		o.release()
		o.c.Drop()
		return
	}
	o.tally(st)
	o.finish(s)
}

// release lets held duplicates of the call run.
func (o *op) release() {
	for _, d := range o.a.dups.End(&o.dup) {
		d.c.Go(d.onPool)
	}
}

func (o *op) tally(st wire.Status) {
	c := &o.a.count
	takes := o.req.Op == wire.OpLock || o.req.Op == wire.OpShare
	switch st {
	case wire.OK:
		if takes {
			c.granted.Add(1)
		}
	case wire.ErrLockDenied:
		if takes {
			c.denied.Add(1)
		}
	case wire.ErrLockBlocked:
		c.blocked.Add(1)
	case wire.ErrLockDeadlock:
		c.deadlock.Add(1)
	case wire.ErrLockGrace:
		c.grace.Add(1)
	case wire.ErrLockNoLocks:
		c.noLocks.Add(1)
	default:
		c.failed.Add(1)
	}
}

// finish encodes the result and sends it: in the reply, or after an empty reply
// in a call to the client's lock manager.
func (o *op) finish(s nlm.Stat) {
	a, c := o.a, o.c
	if !o.async {
		o.encode(&c.Out, s)
		o.release()
		c.Finish()
		return
	}
	var w xdr.Writer
	o.encode(&w, s)
	m := &message{
		addr: clientAddr(c.Remote), vers: o.vers, udp: c.Conn == nil,
		proc: o.result, args: w.Buf,
	}
	o.release()
	c.Finish()
	e := a.eng.Load()
	if e == nil || !e.send(m) {
		a.count.resultsLost.Add(1)
	}
}

func (o *op) encode(w *xdr.Writer, s nlm.Stat) {
	switch o.proc {
	case nlm.ProcTest:
		x := nlm.TestRes{Cookie: o.cookie, Stat: s}
		if s == nlm.Denied && o.rep.Lock != nil {
			h := &o.rep.Lock.Holder
			x.Holder = nlm.Holder{Exclusive: h.Exclusive, Svid: h.Owner.Svid, OH: []byte(h.Owner.OH)}
			x.Holder.Offset, x.Holder.Len = nlm.OffsetLen(h.Range)
		}
		x.Encode(w, o.vers)
	case nlm.ProcShare, nlm.ProcUnshare:
		x := nlm.ShareRes{Cookie: o.cookie, Stat: s}
		x.Encode(w, o.vers)
	case nlm.ProcFreeAll:
	default:
		nlm.PutRes(w, o.cookie, s)
	}
}
