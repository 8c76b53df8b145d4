package imp

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Clock gives the time in nanoseconds of a steady clock, and timers.
type Clock struct {
	Now func() int64
	// AfterFunc calls f once in d, from any goroutine, unless stopped.
	AfterFunc func(d time.Duration, f func()) (stop func() bool)
}

// SystemClock is the machine's own clock.
func SystemClock() Clock {
	start := time.Now()
	return Clock{
		Now: func() int64 { return int64(time.Since(start)) + 1 },
		AfterFunc: func(d time.Duration, f func()) func() bool {
			return time.AfterFunc(d, f).Stop
		},
	}
}

// Options configure an Import. Addrs, Dial and Client are required.
type Options struct {
	// Config is the machine's; Addrs in it is set, Jitter defaults to up to half
	// of the pause.
	Config Config
	Addrs  []string
	// Dial connects to the target at addr. ctx ends with the attempt.
	Dial func(ctx context.Context, addr string) (wire.Conn, error)
	// Client and Gen identify the client in the target's table.
	Client wire.ClientID
	Gen    uint64
	// XID gives the XIDs of requests, rising, to any goroutine, without blocking.
	// Default: from the time of day on.
	XID    func() uint64
	Clock  Clock // default SystemClock
	Logger *slog.Logger
	// Keep completes a copy for replay by what the reply says. Default Identity.
	// It must not keep rep.
	Keep func(kept *wire.Request, rep *wire.Reply)
	// Locks gives the locks to replay after a restart of the target, the granted
	// ones first. nil: the target remembers all.
	Locks func() []wire.Request
	// Watched tells whether somebody else watches the node at an address and ends the
	// connection when it is gone; then a target that allows it gets no pings while
	// nothing is uncommitted. It must not block or call the import. nil: nobody.
	Watched func(addr string) bool
	// OnConnect is called with the answer to a connect that succeeded, before any
	// request is sent over that connection. It must not call the import.
	OnConnect func(rep *wire.Reply)
	// OnEvicted is called when the target has forgotten the client. No request is
	// answered before it returns; what it is given is valid until then. It must
	// not call the import's Close or Call.
	OnEvicted func(Loss)
	// OnState is called with each new state. The same holds for it.
	OnState func(State)
}

// Loss is what an eviction has cost.
type Loss struct {
	// Requests were answered, and are lost.
	Requests []*wire.Request
	// Unkept: more may be lost that were not kept, because the target was in
	// this process.
	Unkept bool
	// Epochs are the IO epochs that were open.
	Epochs []wire.FID
	// Transno is the highest that the target had told.
	Transno uint64
}

// starter is a Conn that tells what became of requests it could not get an answer to.
type starter interface {
	Start(req *wire.Request, rep *wire.Reply, done func(err error))
}

// ender is a Conn that tells its end.
type ender interface{ Done() <-chan struct{} }

// Import is a wire.Conn to a target wherever it is. It replaces the XIDs of
// requests, because those in one reply slot have to rise. OpConnect is answered
// by the import itself, from its own connect, once the target can be reached.
// Its methods are safe for concurrent use.
type Import struct {
	o      Options
	log    *slog.Logger
	wake   chan struct{}
	exited chan struct{}
	dials  sync.WaitGroup
	fast   atomic.Pointer[wire.Conn] // for TryHandle, while FULL

	waiters sync.Pool // *waiter

	mu     sync.Mutex
	m      *Machine
	addrs  []string
	conn   wire.Conn
	start  starter
	local  bool     // conn is to a target in this process
	queue  []Action // for the loop, in order
	busy   bool     // the loop executes actions
	tick   bool
	closed bool
	info   wire.Reply // the connect's
	cancel context.CancelFunc
	ended  <-chan struct{} // of conn

	// Of the loop.
	stopTimer func() bool
	lockReqs  []wire.Request
	evicting  bool
	loss      Loss
	lost      []*wire.Request
	epochs    []wire.FID
	release   []*op
}

// op is a request on its way. Its owner is, in turn, who submits it, the
// transport, and who executes its actions; kept and keptRep belong to replays.
type op struct {
	r     Request
	mr    *Request // &r, or the machine's own
	im    *Import
	req   *wire.Request
	rep   *wire.Reply
	done  func()
	flags wire.Flags // the caller's
	ping  bool       // a ping instead of the caller's OpConnect
	answd bool       // answered by the target
	again bool       // sent before
	here  bool       // sent to a target in this process
	refs  atomic.Int32

	kept    wire.Request
	keptRep *wire.Reply
	buf     *[]byte
	lock    wire.LockArgs
	copied  bool
	replay  bool // at the transport as a replay

	doneFn func()      // o.returned
	backFn func(error) // o.returnedErr
}

var ops sync.Pool

func newOp() *op {
	if o, ok := ops.Get().(*op); ok {
		return o
	}
	o := new(op)
	o.doneFn, o.backFn = o.returned, o.returnedErr
	o.r.Handle, o.mr = o, &o.r
	return o
}

var _ wire.Conn = (*Import)(nil)

// Open starts an import; it connects at once, in the background.
func Open(o Options) (*Import, error) {
	if len(o.Addrs) == 0 || o.Dial == nil || o.Client == (wire.ClientID{}) {
		return nil, errors.New("import: addresses, Dial and Client are needed")
	}
	if o.Clock.Now == nil {
		o.Clock = SystemClock()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.XID == nil {
		var x atomic.Uint64
		x.Store(uint64(time.Now().UnixNano()))
		o.XID = func() uint64 { return x.Add(1) }
	}
	o.Config.Addrs = len(o.Addrs)
	o.Config.Locks = o.Locks != nil
	if o.Config.Jitter == nil {
		o.Config.Jitter = func(d time.Duration) time.Duration { return time.Duration(rand.Int64N(int64(d)/2 + 1)) }
	}
	im := &Import{
		o: o, log: o.Logger, wake: make(chan struct{}, 1), exited: make(chan struct{}),
		m: New(o.Config), addrs: slices.Clone(o.Addrs),
	}
	im.waiters.New = func() any {
		c := make(chan struct{}, 1)
		return &waiter{c, func() { c <- struct{}{} }}
	}
	im.mu.Lock()
	im.m.Start(o.Clock.Now())
	im.post()
	im.mu.Unlock()
	go im.loop()
	return im, nil
}

// post hands the machine's actions to the loop. The lock is held.
func (im *Import) post() {
	acts := im.m.Actions()
	if len(acts) == 0 {
		return
	}
	im.queue = append(im.queue, acts...)
	im.poke()
}

func (im *Import) poke() {
	select {
	case im.wake <- struct{}{}:
	default:
	}
}

// Handle implements wire.Target.
func (im *Import) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	im.submit(im.get(req, rep, done))
}

func (im *Import) get(req *wire.Request, rep *wire.Reply, done func()) *op {
	o := newOp()
	o.im, o.req, o.rep, o.done, o.flags = im, req, rep, done, req.Flags
	o.refs.Store(2) // ActComplete, and ActRelease or that it is not kept
	if req.Op == wire.OpConnect {
		o.ping = true
		o.kept.Op, o.kept.Client, o.kept.ClientGen = wire.OpPing, im.o.Client, im.o.Gen
	} else {
		describe(&o.r, req)
	}
	o.r.NoWait = req.Flags&wire.FlagNoWait != 0
	return o
}

func (im *Import) submit(o *op) {
	im.mu.Lock()
	x := im.o.XID()
	o.r.XID, o.req.XID, o.kept.XID = x, x, x
	im.m.Submit(&o.r)
	acts := im.m.Actions()
	if len(acts) == 1 && len(im.queue) == 0 && !im.busy && acts[0].Req == &o.r {
		// The usual case costs no other goroutine.
		a, conn, st, local := acts[0], im.conn, im.start, im.local
		o.req.LastCommitted = im.m.committed
		im.mu.Unlock()
		if a.Kind == ActSend {
			o.send(conn, st, local, a.Flags)
		} else {
			o.complete(&a)
		}
		return
	}
	im.queue = append(im.queue, acts...)
	if len(acts) > 0 {
		im.poke()
	}
	im.mu.Unlock()
}

// send gives a caller's request to the transport.
func (o *op) send(conn wire.Conn, st starter, local bool, fl wire.Flags) {
	req := o.req
	if o.ping {
		req = &o.kept
	}
	req.Flags = o.flags | fl
	o.here = local
	if local && o.flags&wire.FlagTwoNode != 0 {
		req.Flags |= wire.FlagWaitCommit
	}
	if o.r.slot != 0 {
		req.Slot = o.r.slot - 1
	}
	if o.again {
		o.rep.Reset()
	}
	o.again = true
	o.pass(conn, st, req, o.rep)
}

func (o *op) pass(conn wire.Conn, st starter, req *wire.Request, rep *wire.Reply) {
	switch {
	case conn == nil:
		o.failed(true)
	case st != nil:
		st.Start(req, rep, o.backFn)
	default:
		conn.Handle(req, rep, o.doneFn)
	}
}

// returnedErr is the transport's callback of Start.
func (o *op) returnedErr(err error) {
	if err != nil {
		o.failed(wire.NeverSent(err))
		return
	}
	o.returned()
}

func (o *op) failed(neverSent bool) {
	im := o.im
	im.mu.Lock()
	im.m.Advance(im.o.Clock.Now())
	im.m.Failed(o.mr, neverSent)
	im.react()
}

// returned is the transport's callback: there is an answer in the reply.
func (o *op) returned() {
	rep := o.rep
	if o.replay {
		rep = o.keptRep
	}
	if rep.Status == wire.ErrTargetDown {
		o.failed(false)
		return
	}
	im := o.im
	out := Outcome{Status: rep.Status, Transno: rep.Transno, LastCommitted: rep.LastCommitted}
	if o.r.Modifies && !o.replay {
		if o.r.OpensEpoch {
			out.Epoch = opened(o.req, rep)
		}
		// Before the lock is taken and the caller has its buffers back. The
		// machine may find that it is not needed.
		if !o.here && (rep.Transno > rep.LastCommitted || !out.Epoch.IsZero()) {
			o.copied = true
			o.keep(o.req, rep)
		}
	}
	im.mu.Lock()
	if rep.Status > 20000 {
		im.m.Advance(im.o.Clock.Now())
	}
	im.m.Reply(o.mr, out)
	im.react()
}

// react executes the actions that a returned request has led to: here, if they
// only give requests back to their callers, which is usual, else in the loop.
// The lock is held; react gives it back.
func (im *Import) react() {
	acts := im.m.Actions()
	here := len(im.queue) == 0 && !im.busy
	for i := range acts {
		here = here && (acts[i].Kind == ActComplete || acts[i].Kind == ActRelease)
	}
	if !here {
		im.queue = append(im.queue, acts...)
		im.fastPath()
		im.poke()
		im.mu.Unlock()
		return
	}
	var few [8]Action
	mine := append(few[:0], acts...)
	if im.closed {
		im.poke()
	}
	im.mu.Unlock()
	for i := range mine {
		im.giveBack(&mine[i])
	}
}

// fastPath opens or closes the way of TryHandle. The lock is held.
func (im *Import) fastPath() {
	switch full := im.m.State() == Full && im.conn != nil; {
	case !full && im.fast.Load() != nil:
		im.fast.Store(nil)
	case full && im.fast.Load() == nil:
		c := im.conn
		im.fast.Store(&c)
	}
}

func (im *Import) giveBack(a *Action) {
	o := a.Req.Handle.(*op)
	switch {
	case a.Kind == ActComplete:
		o.complete(a)
	case a.Req.kind == Normal:
		o.unref(1)
	}
}

func (o *op) complete(a *Action) {
	done, n := o.done, int32(2)
	o.req.Flags = o.flags
	switch {
	case !a.FromTarget:
		o.rep.Reset()
		o.rep.Status, o.rep.XID = a.Status, o.req.XID
	case o.ping && a.Status == wire.OK:
		last := o.rep.LastCommitted
		o.im.mu.Lock()
		*o.rep = o.im.info
		o.im.mu.Unlock()
		o.rep.XID, o.rep.LastCommitted = o.req.XID, max(last, o.rep.LastCommitted)
	}
	o.answd = a.FromTarget
	o.req, o.rep, o.done = nil, nil, nil
	if a.Kept {
		n = 1
	}
	o.unref(n)
	done()
}

func (o *op) unref(n int32) {
	if o.refs.Add(-n) > 0 {
		return
	}
	if o.copied || o.ping {
		o.drop()
	}
	closes := o.r.Closes[:0]
	o.r = Request{Handle: o, Closes: closes}
	o.ping, o.answd, o.again, o.here, o.copied, o.replay = false, false, false, false, false, false
	o.im = nil
	ops.Put(o)
}

// TryHandle implements wire.Target: what the target can answer at once, while it
// is there. Requests that modify are not tried, since they have to be accounted for.
func (im *Import) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	c := im.fast.Load()
	if c == nil || req.Op.Modifies() || !(*c).TryHandle(req, rep) {
		return false
	}
	switch rep.Status {
	case wire.ErrRecovering, wire.ErrUnknownClient, wire.ErrStaleClient, wire.ErrTargetDown:
		rep.Reset()
		return false
	}
	return true
}

type waiter struct {
	c    chan struct{}
	done func()
}

// Call implements wire.Conn. When ctx ends, Call returns at once if the request
// waits for the target, else when the transport gives it back, since it uses the
// caller's memory; the fate of a request that was sent is then unknown. Failures
// of the transport are not errors: the import tries on.
func (im *Import) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	w := im.waiters.Get().(*waiter)
	o := im.get(req, rep, w.done)
	o.refs.Add(1)
	im.submit(o)
	var err error
	select {
	case <-w.c:
	case <-ctx.Done():
		im.mu.Lock()
		im.m.Cancel(&o.r, wire.ErrTargetDown)
		im.post()
		im.mu.Unlock()
		<-w.c
		if !o.answd {
			err = ctx.Err()
		}
	}
	im.waiters.Put(w)
	o.unref(1)
	return err
}

// Close ends the import and its connection. Requests fail with ErrTargetDown.
// It returns when the transport has given everything back.
func (im *Import) Close() error {
	im.mu.Lock()
	im.closed = true
	im.m.Close()
	im.post()
	im.fastPath()
	im.poke()
	im.mu.Unlock()
	<-im.exited
	return nil
}

// Ready tells whether requests pass to the target now. It is cheap.
func (im *Import) Ready() bool { return im.fast.Load() != nil }

// Here tells whether the target is, or was last, in this process.
func (im *Import) Here() bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.local
}

// State returns the state.
func (im *Import) State() State {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.m.State()
}

// Status returns the state, the address of the connection or of the next attempt,
// and figures, for displays.
func (im *Import) Status() (s State, addr string, st Stats) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.m.Advance(im.o.Clock.Now())
	st = im.m.Stats()
	return im.m.State(), im.addrs[st.Addr%len(im.addrs)], st
}

// Stats returns the figures of Status.
func (im *Import) Stats() Stats {
	_, _, st := im.Status()
	return st
}

// Holds gives the addresses at which there is, or may be, what the target remembers of
// this client: that of the connection, or while there is none all of them. There are none
// before the first connect, and after the client has taken leave.
func (im *Import) Holds() []string {
	im.mu.Lock()
	defer im.mu.Unlock()
	switch i, ok := im.m.Holds(); {
	case !ok:
		return nil
	case i < 0:
		return slices.Clone(im.addrs)
	default:
		return []string{im.addrs[i%len(im.addrs)]}
	}
}

// Deactivate is the administrator's order to wait no longer: requests fail with
// ErrIO until Activate.
func (im *Import) Deactivate() { im.input(func(int64) { im.m.Deactivate() }) }

// Activate takes Deactivate back.
func (im *Import) Activate() { im.input(im.m.Activate) }

// ForgetEpoch tells that the file's IO epoch ends without OpCloseEpoch, because
// the file was removed.
func (im *Import) ForgetEpoch(fid wire.FID) { im.input(func(int64) { im.m.ForgetEpoch(fid) }) }

// Notice passes the news that the target runs as the given instance at addr. A
// nil addrs leaves the list of addresses as it is; addr is added if it is not in
// the list.
func (im *Import) Notice(instance uint64, addr string, addrs []string) {
	im.input(func(now int64) {
		n := len(im.addrs)
		if addrs != nil {
			im.addrs = slices.Clone(addrs)
		}
		i := slices.Index(im.addrs, addr)
		if i < 0 && addr != "" {
			i = len(im.addrs)
			im.addrs = append(im.addrs, addr)
		}
		if addrs == nil && len(im.addrs) == n {
			n = 0
		} else {
			n = len(im.addrs)
		}
		im.m.Notice(now, instance, i, n)
	})
}

func (im *Import) input(f func(now int64)) {
	now := im.o.Clock.Now()
	im.mu.Lock()
	f(now)
	im.post()
	im.fastPath()
	im.mu.Unlock()
}
