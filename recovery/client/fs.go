// Package client is the file system client of the targets: the part of a
// frontend that knows where names and data live. It maps file ranges to
// objects, keeps IO epochs, and carries the recovery protocol's client side.
// It knows nothing of NFS.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Options configure a FS. MDT, OSTs and Clock are required.
type Options struct {
	MDT  wire.Conn
	OSTs []wire.Conn
	// ID and Gen identify this client in the targets' client tables.
	ID  wire.ClientID
	Gen uint64
	// Clock gives strictly rising nanoseconds since 1970. It is shared with the
	// MDT when both are in one process, so that the newest ctime wins honestly; the
	// clocks of different nodes may be a few seconds apart.
	Clock  func() int64
	Logger *slog.Logger
	// OnFlushError is called when an OST reports that acknowledged UNSTABLE data
	// were lost by a failed flush, before any reply that depends on it. It has
	// to change the write verifiers durably. total counts the failures since the
	// OST's start.
	OnFlushError func(ost int, total uint64)
	// EpochIdle is how long a file stays in its IO epoch after the last write.
	// Default 1 s.
	EpochIdle time.Duration
	// MaxEpochs is how many epochs may be open before idle ones are closed
	// early. Default 65536.
	MaxEpochs int
	// Atime: record access times as relatime does.
	Atime bool

	// Of a FS over imports (NewRemote):

	// Patience is how long a request waits for an OST that is away before it
	// fails with ErrTargetDown, which NFS clients see as JUKEBOX. Default 30 s.
	Patience time.Duration
	// MaxWaiting is how many requests may wait for one OST that is away; more
	// fail at once. Default 32.
	MaxWaiting int
	// OnLostData is called when an OST has forgotten this client and with it
	// UNSTABLE data that were acknowledged, before a request to it is answered
	// again. Like OnFlushError it has to change the write verifiers durably.
	OnLostData func(ost int, requests int)
	// OnEvicted is called when the MDT has forgotten this client; lost
	// operations were answered and are gone.
	OnEvicted func(lost int)
}

// Owner names the service address a request is made for; targets refuse it
// when its epoch is old.
type Owner struct {
	VIP   uint32
	Epoch uint64
	// TwoNode: what is asked to be durable need not be when it is answered, as
	// long as this process keeps it and the target is on another node.
	TwoNode bool
}

// FS is a file system client. Its methods are safe for concurrent use.
type FS struct {
	o      Options
	log    *slog.Logger
	xid    atomic.Uint64
	pool   sync.Pool // *msg
	mdt    wire.Conn
	osts   []*ostConn
	mdtImp *imp.Import // nil without imports
	// imports are all by the names of their targets; nil without.
	imports map[string]*imp.Import
	tenure  atomic.Uint64
	latest  atomic.Int64 // see saw

	epochs    epochTable
	flushMu   sync.Mutex
	flushSeen []atomic.Uint64 // the newest Reply.FlushErrors of each OST
	flushLost atomic.Uint64

	stop chan struct{}
	// work ends what Close waits for when its time is over.
	work   context.Context
	unwork context.CancelFunc
	wg     sync.WaitGroup
	closed atomic.Bool
	// finishing is entered by what completions start in the background, which may be
	// after the program has stopped serving; Close waits for it.
	finishing gate
}

type msg struct {
	req wire.Request
	rep wire.Reply
}

// New returns a FS; Connect must succeed before it is used.
func New(o Options) (*FS, error) {
	if o.MDT == nil || len(o.OSTs) == 0 || o.Clock == nil {
		return nil, errors.New("client: MDT, at least one OST and a clock are needed")
	}
	f := newFS(o)
	f.mdt = o.MDT
	for _, c := range o.OSTs {
		f.osts = append(f.osts, &ostConn{Conn: c})
	}
	f.flushSeen = make([]atomic.Uint64, len(f.osts))
	return f, nil
}

func newFS(o Options) *FS {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.EpochIdle <= 0 {
		o.EpochIdle = time.Second
	}
	if o.MaxEpochs <= 0 {
		o.MaxEpochs = 65536
	}
	if o.Patience <= 0 {
		o.Patience = 30 * time.Second
	}
	if o.MaxWaiting <= 0 {
		o.MaxWaiting = 32
	}
	f := &FS{o: o, log: o.Logger, stop: make(chan struct{})}
	f.work, f.unwork = context.WithCancel(context.Background())
	f.pool.New = func() any { return new(msg) }
	f.epochs.init()
	// The XID starts at a point that an earlier incarnation cannot have reached.
	f.xid.Store(uint64(time.Now().UnixNano()))
	return f
}

// Connect registers the client with the targets and starts the background
// closing of idle epochs. Over imports it waits, until ctx ends, for the MDT
// only: files on OSTs that are there work without the others.
func (f *FS) Connect(ctx context.Context) error {
	m := f.get()
	defer f.put(m)
	connect := func(c wire.Conn, what string) error {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpConnect
		m.req.Flags = wire.FlagWaitCommit
		f.header(Owner{}, &m.req)
		if err := c.Call(ctx, &m.req, &m.rep); err != nil {
			return fmt.Errorf("client: connect to %s: %w", what, err)
		}
		if m.rep.Status != wire.OK {
			return fmt.Errorf("client: connect to %s: %w", what, m.rep.Status)
		}
		return nil
	}
	if err := connect(f.mdt, "the MDT"); err != nil {
		return err
	}
	f.tenure.Store(m.rep.Tenure)
	for i, c := range f.osts {
		if c.im != nil {
			continue
		}
		if err := connect(c, fmt.Sprintf("OST %d", i)); err != nil {
			return err
		}
		f.flushSeen[i].Store(m.rep.FlushErrors)
	}
	f.wg.Add(1)
	go f.closer()
	return nil
}

// Close flushes and closes all IO epochs and disconnects. What is not done when ctx
// ends is left to the targets.
func (f *FS) Close(ctx context.Context) error {
	if f.closed.Swap(true) {
		return nil
	}
	defer f.unwork()
	close(f.stop)
	limit := context.AfterFunc(ctx, f.unwork)
	f.wg.Wait()
	f.finishing.close()
	limit()
	var first error
	for {
		n, err := f.closeEpochs(ctx, 0)
		if err != nil && first == nil {
			first = err
		}
		if n == 0 || err != nil {
			break
		}
	}
	if err := f.disconnect(ctx); err != nil && first == nil {
		first = err
	}
	return first
}

// disconnect takes the client out of the targets' tables. Targets that are away
// are not waited for: they have to do without it.
func (f *FS) disconnect(ctx context.Context) error {
	m := f.get()
	defer f.put(m)
	var errs []error
	leave := func(c wire.Conn, im *imp.Import) {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpDisconnect
		m.req.Flags = wire.FlagWaitCommit | wire.FlagNoWait
		f.header(Owner{}, &m.req)
		switch err := c.Call(ctx, &m.req, &m.rep); {
		case err != nil:
			errs = append(errs, fmt.Errorf("client: disconnect: %w", err))
		case m.rep.Status == wire.ErrTargetDown && im != nil:
			// It is away; what this client has done there is durable.
		case m.rep.Status != wire.OK:
			errs = append(errs, fmt.Errorf("client: disconnect: %w", m.rep.Status))
		}
		if im != nil {
			errs = append(errs, im.Close())
		}
	}
	for _, c := range f.osts {
		leave(c, c.im)
	}
	leave(f.mdt, f.mdtImp)
	return errors.Join(errs...)
}

func (f *FS) get() *msg { return f.pool.Get().(*msg) }

func (f *FS) put(m *msg) {
	m.req.Reset()
	m.rep.Reset()
	f.pool.Put(m)
}

func (f *FS) header(o Owner, req *wire.Request) {
	req.XID = f.xid.Add(1)
	req.Client, req.ClientGen = f.o.ID, f.o.Gen
	req.VIP, req.VIPEpoch = o.VIP, o.Epoch
	req.Tenure = f.tenure.Load()
}

// mdtHeader is header for a request to the MDT.
func (f *FS) mdtHeader(o Owner, req *wire.Request) {
	f.header(o, req)
	if req.Op == wire.OpSetattr && f.mdtImp != nil {
		req.Time = max(f.o.Clock(), f.latest.Load()+slack) // another node's clock may be behind
	}
	if o.TwoNode && f.mdtImp != nil && req.Flags&wire.FlagWaitCommit != 0 {
		req.Flags = req.Flags&^wire.FlagWaitCommit | wire.FlagTwoNode
	}
}

// Try asks the MDT for an answer that needs no waiting; false means none.
func (f *FS) Try(o Owner, req *wire.Request, rep *wire.Reply) bool {
	f.mdtHeader(o, req)
	return f.mdt.TryHandle(req, rep)
}

// Submit gives req to the MDT; done is called once, perhaps from another
// goroutine, and must not block. req and rep belong to the FS until then.
// ErrUnknownClient means that the MDT has evicted this client meanwhile and the
// request's fate is not known: one with a reply key, or without an effect, is to
// be submitted again.
func (f *FS) Submit(o Owner, req *wire.Request, rep *wire.Reply, done func()) {
	f.mdtHeader(o, req)
	f.mdt.Handle(req, rep, done)
}

// Call gives req to the MDT and waits. A transport failure appears as
// ErrTargetDown in rep, ErrUnknownClient means the same as for Submit; Call itself
// repeats what may be repeated.
func (f *FS) Call(ctx context.Context, o Owner, req *wire.Request, rep *wire.Reply) {
	for range maxRenewals {
		f.mdtHeader(o, req)
		if err := f.mdt.Call(ctx, req, rep); err != nil {
			rep.Status = wire.ErrTargetDown
		}
		if rep.Status != wire.ErrUnknownClient || req.Op.Modifies() && req.Key.IsZero() && !repeatable(req.Op) {
			return
		}
		rep.Reset()
	}
	rep.Status = wire.ErrTargetDown
}

// repeatable tells that executing the operation twice is the same as once.
func repeatable(op wire.Op) bool {
	switch op {
	case wire.OpOpenEpoch, wire.OpTruncateDone, wire.OpConnect, wire.OpDisconnect, wire.OpSetVIPEpoch, wire.OpLockService:
		return true
	}
	return false
}

// Attr reads an object's attributes, with size and times from the OSTs while an
// IO epoch is open. Without block it gives ok=false when that needs waiting.
func (f *FS) Attr(ctx context.Context, o Owner, fid wire.FID, a *wire.Attr, block bool) (st wire.Status, ok bool) {
	m := f.get()
	m.req.Op = wire.OpGetattr
	m.req.FID = fid
	if !f.Try(o, &m.req, &m.rep) {
		if !block {
			f.put(m)
			return 0, false
		}
		f.Call(ctx, o, &m.req, &m.rep)
	}
	st = m.rep.Status
	if st == wire.OK {
		*a = m.rep.Attr
	}
	f.put(m)
	if st == wire.OK && a.EpochOpen {
		return f.Complete(ctx, o, a, block)
	}
	return st, true
}

// Complete replaces the hints in a by what the OSTs know if an IO epoch is open.
func (f *FS) Complete(ctx context.Context, o Owner, a *wire.Attr, block bool) (st wire.Status, ok bool) {
	if !a.EpochOpen || a.Type != wire.TypeReg || a.Layout.Count == 0 {
		return wire.OK, true
	}
	if !a.EpochShared && f.epochs.untouched(a.FID) {
		return wire.OK, true // nobody has made objects yet
	}
	m := f.get()
	defer f.put(m)
	var mg merger
	for s := uint8(0); s < a.Layout.Count; s++ {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpObjAttr
		m.req.FID, m.req.Stripe = a.FID, s
		c, st := f.ost(a, s)
		if st != wire.OK {
			return st, true
		}
		f.header(o, &m.req)
		if !c.TryHandle(&m.req, &m.rep) || m.rep.Status == wire.ErrTooLate {
			if !block {
				return 0, false
			}
			m.rep.Reset()
			f.call(ctx, c, m)
		}
		if m.rep.Status != wire.OK {
			return m.rep.Status, true
		}
		mg.add(&a.Layout, s, &m.rep.Obj)
	}
	mg.apply(a)
	f.saw(a.Ctime)
	return wire.OK, true
}

// maxAhead bounds how far another node's clock may be ahead of this one's, in
// nanoseconds. One that is wrong by more has to be set right.
const maxAhead = int64(10 * time.Second)

// slack is how much newer than what an object has a time is that is set after it, in
// nanoseconds: an OST that was killed may make the object newer by a few when it starts
// and repeats changes.
const slack = 1000

// saw notes the ctime of a change. What this client changes at the MDT after it has
// to be newer, or the times that it sets would count as older than that change.
func (f *FS) saw(ctime int64) {
	if f.mdtImp == nil {
		return // nobody else writes
	}
	for {
		last := f.latest.Load()
		if ctime <= last || ctime > f.o.Clock()+maxAhead || f.latest.CompareAndSwap(last, ctime) {
			return
		}
	}
}

// Later has an OpSetattr that follows be newer than what other clients have written to
// the file that a describes, as the MDT knows it: their nodes' clocks may be ahead. It
// asks OSTs only while another client has an IO epoch open, and does not wait for those
// that are away. It may block.
func (f *FS) Later(ctx context.Context, o Owner, a *wire.Attr) {
	if f.mdtImp == nil || !a.EpochOpen || !a.EpochShared && f.epochs.opened(a.FID) {
		return
	}
	for s := uint8(0); s < a.Layout.Count; s++ {
		if c, st := f.ost(a, s); st != wire.OK || c.away() {
			return
		}
	}
	c := *a
	// Without an answer the MDT's clock has to do.
	_, _ = f.Complete(ctx, o, &c, true)
}

// merger folds what objects say into an inode's attributes: the size is the
// furthest byte, the times are those of the side that changed last.
type merger struct {
	size, used   uint64
	mtime, ctime int64
	exists       bool
}

func (g *merger) add(l *wire.Layout, s uint8, ob *wire.ObjAttr) {
	if !ob.Exists {
		return
	}
	g.exists = true
	g.size = max(g.size, l.FileEnd(s, ob.Size))
	g.used += ob.Used
	if ob.Ctime > g.ctime {
		g.ctime, g.mtime = ob.Ctime, ob.Mtime
	}
}

func (g *merger) apply(a *wire.Attr) {
	a.Size, a.Used = g.size, g.used
	a.Merge(g.mtime, g.ctime)
}

func (f *FS) ost(a *wire.Attr, s uint8) (*ostConn, wire.Status) {
	i := int(a.Layout.OST[s])
	if i >= len(f.osts) {
		return nil, wire.ErrIO
	}
	return f.osts[i], wire.OK
}

// noteFlush makes sure that a failed flush has changed the write verifiers
// before the reply that told of it is used. told is Reply.FlushErrors: the number
// of the OST's start in the upper 32 bits, and how many flushes have failed since. A
// new start by itself has lost nothing, and replies of an old one come late.
func (f *FS) noteFlush(ost uint16, told uint64) {
	seen := &f.flushSeen[ost]
	if told <= seen.Load() {
		return
	}
	f.flushMu.Lock()
	defer f.flushMu.Unlock()
	last := seen.Load()
	if told <= last {
		return
	}
	total := told & math.MaxUint32
	lost := total
	if told>>32 == last>>32 {
		lost -= last & math.MaxUint32
	}
	if lost > 0 {
		f.log.Error("an OST could not flush acknowledged data; write verifiers change and clients send the data again", "ost", ost, "failures", total)
		if f.o.OnFlushError != nil {
			f.o.OnFlushError(int(ost), total)
		}
		f.flushLost.Add(lost)
	}
	seen.Store(told)
}

// RaiseEpoch has the targets refuse what comes for earlier periods of service of
// o's VIP: the MDT durably, and all OSTs that are there. The others learn of it from
// the MDT when they start, and by the first request of this period. When ctx ends,
// OSTs that have not answered are not waited for: whether they know is unknown.
func (f *FS) RaiseEpoch(ctx context.Context, o Owner) error {
	all := make([]int, len(f.osts))
	for i := range all {
		all[i] = i
	}
	// A move waits for this, so nobody waits for another.
	first := f.raiseOSTs(o, all)
	m := f.get()
	defer f.put(m)
	m.req.Op, m.req.Flags = wire.OpSetVIPEpoch, wire.FlagWaitCommit
	f.Call(ctx, o, &m.req, &m.rep)
	away, err := first(ctx)
	if m.rep.Status != wire.OK {
		return fmt.Errorf("client: raise the epoch of VIP %d at the MDT: %w", o.VIP, m.rep.Status)
	}
	if len(away) > 0 && err == nil {
		// One that has started meanwhile may have asked the MDT too early. From now on
		// none does.
		_, err = f.raiseOSTs(o, away)(ctx)
	}
	return err
}

// raiseOSTs sends the epoch to OSTs. The function that it returns waits for the answers;
// away are the OSTs that are not there.
func (f *FS) raiseOSTs(o Owner, osts []int) func(context.Context) (away []int, err error) {
	type answer struct {
		ost int
		st  wire.Status
	}
	answers := make(chan answer, len(osts))
	for _, i := range osts {
		m := f.get()
		m.req.Op, m.req.Flags = wire.OpSetVIPEpoch, wire.FlagWaitCommit|wire.FlagNoWait
		f.header(o, &m.req)
		f.osts[i].Handle(&m.req, &m.rep, func() {
			st := m.rep.Status
			f.put(m)
			answers <- answer{i, st}
		})
	}
	return func(ctx context.Context) (away []int, err error) {
		var errs []error
		for late := slices.Clone(osts); len(late) > 0; {
			select {
			case a := <-answers:
				late = slices.DeleteFunc(late, func(i int) bool { return i == a.ost })
				switch {
				case a.st == wire.OK:
				case a.st == wire.ErrTargetDown && f.osts[a.ost].im != nil:
					away = append(away, a.ost)
				default:
					errs = append(errs, fmt.Errorf("client: raise the epoch of VIP %d at OST %d: %w", o.VIP, a.ost, a.st))
				}
			case <-ctx.Done():
				err := fmt.Errorf("client: raise the epoch of VIP %d: OSTs %v have not answered: %w", o.VIP, late, context.Cause(ctx))
				return away, errors.Join(append(errs, err)...)
			}
		}
		return away, errors.Join(errs...)
	}
}

// FlushErrors is the number of failed flushes that the OSTs have told of since
// Connect. A program that writes through the FS checks it before and after: if
// it rose, data written in between may be lost.
func (f *FS) FlushErrors() uint64 { return f.flushLost.Load() }

// Statfs adds up the OSTs' space and the MDT's files.
func (f *FS) Statfs(ctx context.Context, o Owner) (wire.Statfs, wire.Status) {
	m := f.get()
	defer f.put(m)
	m.req.Op = wire.OpStatfs
	f.Call(ctx, o, &m.req, &m.rep)
	if m.rep.Status != wire.OK {
		return wire.Statfs{}, m.rep.Status
	}
	sum := wire.Statfs{Files: m.rep.Statfs.Files, FilesFree: m.rep.Statfs.FilesFree, FilesAvail: m.rep.Statfs.FilesAvail}
	for i, c := range f.osts {
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpStatfs
		m.req.Flags = wire.FlagNoWait
		f.header(o, &m.req)
		if f.call(ctx, c, m); m.rep.Status != wire.OK {
			f.log.Warn("statfs leaves out an OST that does not answer", "ost", i, "status", m.rep.Status)
			continue
		}
		sum.Total += m.rep.Statfs.Total
		sum.Free += m.rep.Statfs.Free
		sum.Avail += m.rep.Statfs.Avail
	}
	if sum.FilesFree == 0 && sum.Free > 0 {
		// The MDT makes inodes as long as there is space and may not know of it.
		sum.FilesFree, sum.FilesAvail = sum.Free/4096, sum.Avail/4096
		sum.Files += sum.FilesFree
	}
	return sum, wire.OK
}
