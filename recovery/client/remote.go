package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Target says how a target is reached, at whatever address it is now.
type Target struct {
	// Name is the target's, by which news name it.
	Name string
	// Addrs are the addresses at which it may be.
	Addrs []string
	// Dial connects to it at one of them.
	Dial func(ctx context.Context, addr string) (wire.Conn, error)
}

// Remote are the targets of a FS that may be on other nodes, restart and move.
type Remote struct {
	MDT  Target
	OSTs []Target
	// Import configures the imports.
	Import imp.Config
	// Clock is the imports' clock; zero: the system's.
	Clock imp.Clock
}

// mdtReplays is how many replays the MDT is given at a time. The path to it is one
// connection, on which it gets everything in order, as that takes; data go to an OST by
// another connection than the rest.
const mdtReplays = 8

// NewRemote returns a FS over imports; MDT and OSTs of o are not used. It begins
// to connect at once; Connect waits for that. Close ends the imports.
func NewRemote(o Options, r Remote) (*FS, error) {
	if o.Clock == nil || len(r.OSTs) == 0 {
		return nil, errors.New("client: at least one OST and a clock are needed")
	}
	if r.Clock.Now == nil {
		r.Clock = imp.SystemClock()
	}
	f := newFS(o)
	f.flushSeen = make([]atomic.Uint64, len(r.OSTs))
	f.imports = make(map[string]*imp.Import, 1+len(r.OSTs))
	open := func(t *Target, change func(*imp.Options)) (*imp.Import, error) {
		io := imp.Options{
			Config: r.Import, Addrs: t.Addrs, Dial: t.Dial, Client: o.ID, Gen: o.Gen, Clock: r.Clock,
			Logger: f.log.With("target", t.Name),
			// The FS numbers its requests itself, but only the import knows their order.
			XID: func() uint64 { return f.xid.Add(1) },
		}
		change(&io)
		im, err := imp.Open(io)
		if err != nil {
			return nil, fmt.Errorf("client: %s: %w", t.Name, err)
		}
		f.imports[t.Name] = im
		return im, nil
	}
	var err error
	f.mdtImp, err = open(&r.MDT, func(io *imp.Options) {
		if io.Config.ReplayWindow == 0 {
			io.Config.ReplayWindow = mdtReplays
		}
		io.OnConnect = func(rep *wire.Reply) { f.tenure.Store(rep.Tenure) }
		io.OnEvicted = f.mdtEvicted
	})
	for i := 0; err == nil && i < len(r.OSTs); i++ {
		c := &ostConn{patience: patience{after: r.Clock.AfterFunc, limit: f.o.Patience}}
		c.renew()
		c.im, err = open(&r.OSTs[i], func(io *imp.Options) {
			io.OnConnect = func(rep *wire.Reply) { f.flushSeen[i].CompareAndSwap(0, rep.FlushErrors) }
			io.OnEvicted = func(l imp.Loss) { f.ostEvicted(i, l) }
			io.OnState = func(s imp.State) { c.passes(s == imp.Full || s == imp.Closed) }
		})
		c.Conn = c.im
		f.osts = append(f.osts, c)
	}
	if err != nil {
		return nil, errors.Join(err, f.closeImports())
	}
	f.mdt = f.mdtImp
	return f, nil
}

func (f *FS) closeImports() error {
	var errs []error
	for _, c := range f.osts {
		if c.im != nil {
			errs = append(errs, c.im.Close())
		}
	}
	if f.mdtImp != nil {
		errs = append(errs, f.mdtImp.Close())
	}
	return errors.Join(errs...)
}

// Abandon ends a FS over imports without closing its IO epochs and without taking
// leave of the targets. Requests that wait fail with ErrTargetDown.
func (f *FS) Abandon() error {
	if f.closed.Swap(true) {
		return nil
	}
	close(f.stop)
	f.unwork()
	err := f.closeImports()
	f.wg.Wait()
	return err
}

// Notice passes the news that a target runs at addr, as the instance (0: not told), to
// the import of that target, if there is one. It is a hint: the import looks there at
// once. Notice does not block.
func (f *FS) Notice(target string, instance uint64, addr string) {
	if im := f.imports[target]; im != nil {
		im.Notice(instance, addr, nil)
	}
}

// MDTImport is the import of the MDT, nil without imports.
func (f *FS) MDTImport() *imp.Import { return f.mdtImp }

// OSTImport is the import of an OST, nil without imports.
func (f *FS) OSTImport(i int) *imp.Import { return f.osts[i].im }

// OSTs is the number of OSTs.
func (f *FS) OSTs() int { return len(f.osts) }

// ostConn is the path to an OST.
type ostConn struct {
	wire.Conn
	im      *imp.Import  // nil without imports
	waiting atomic.Int32 // requests that were given while it was away
	patience
}

// patience ends the wait of requests that an OST had, or was to get, when it went
// away, and that would hold what others need until it comes back.
type patience struct {
	after func(time.Duration, func()) (stop func() bool)
	limit time.Duration

	mu   sync.Mutex
	ctx  context.Context // of requests that are given now
	end  context.CancelFunc
	stop func() bool // the timer, while the OST is away
}

// renew begins a new context. The lock is held, or nobody else knows p.
func (p *patience) renew() { p.ctx, p.end = context.WithCancel(context.Background()) }

// passes tells whether requests pass to the OST from now on.
func (p *patience) passes(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case yes && p.stop != nil:
		p.stop()
		p.stop = nil
	case !yes && p.stop == nil:
		p.stop = p.after(p.limit, p.over)
	}
}

// over ends the waits that have begun.
func (p *patience) over() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		return // it came back just now
	}
	p.end()
	p.renew()
}

// context ends with ctx, or when the OST has been away for too long.
func (p *patience) context(ctx context.Context) (context.Context, context.CancelFunc) {
	p.mu.Lock()
	own := p.ctx
	p.mu.Unlock()
	if ctx.Done() == nil {
		return own, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(own, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// Away tells that requests to an OST would have to wait for it.
func (f *FS) Away(ost int) bool { return f.osts[ost].away() }

// SubmitOST gives req to an OST; done is called once, perhaps from another
// goroutine, and must not block. req and rep belong to the FS until then.
func (f *FS) SubmitOST(ost int, req *wire.Request, rep *wire.Reply, done func()) {
	f.header(Owner{}, req)
	f.osts[ost].Handle(req, rep, done)
}

// away tells that requests would have to wait for the OST.
func (c *ostConn) away() bool { return c.im != nil && !c.im.Ready() }

// call sends m to an OST and waits for the answer; that there is none appears as
// ErrTargetDown. Only so many wait for an OST that is away, and only for so long,
// because they hold what others need who have nothing to do with it.
func (f *FS) call(ctx context.Context, c *ostConn, m *msg) {
	switch {
	case c.im == nil:
	case c.away():
		if c.waiting.Add(1) > int32(f.o.MaxWaiting) {
			c.waiting.Add(-1)
			m.rep.Reset()
			m.rep.Status = wire.ErrTargetDown
			return
		}
		defer c.waiting.Add(-1)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.o.Patience)
		defer cancel()
	default:
		var cancel context.CancelFunc
		ctx, cancel = c.context(ctx)
		defer cancel()
	}
	for range maxRenewals {
		if err := c.Call(ctx, &m.req, &m.rep); err != nil {
			m.rep.Status = wire.ErrTargetDown
		}
		switch {
		case m.rep.Status == wire.ErrUnknownClient:
			// Whether it was executed or not, data at a place may be written again.
		case m.rep.Status == wire.ErrTooLate && !m.req.Op.Modifies():
			// The MDT has evicted this client since the request was made, and this
			// client notices at the latest when it asks there.
			var a wire.Attr
			f.rawAttr(ctx, wire.RootFID, &a)
			m.req.XID, m.req.Tenure = f.xid.Add(1), f.tenure.Load()
		default:
			return
		}
		m.rep.Reset()
	}
	m.rep.Status = wire.ErrTargetDown
}

// twoNode tells whether the OST's data survive either node while this client
// keeps them, too.
func (c *ostConn) twoNode(o Owner) bool { return o.TwoNode && c.im != nil && !c.im.Here() }

// mdtEvicted is called when the MDT has forgotten this client, before it is
// connected again. What the client has written stays where it is: the MDT has it
// flushed before it closes the epochs.
func (f *FS) mdtEvicted(loss imp.Loss) {
	f.tenure.Store(0)
	f.epochs.lostAll(loss.Transno)
	n := 0
	for _, r := range loss.Requests {
		switch r.Op {
		case wire.OpOpenEpoch, wire.OpCloseEpoch, wire.OpTruncateDone:
			// Of no value any more.
		default:
			n++
			f.log.Error("an operation that was answered is lost", "op", uint16(r.Op), "dir", r.FID, "name", slog.StringValue(string(r.Name)))
		}
	}
	f.log.Warn("the MDT has evicted this client; files are opened for writing anew", "epochs", len(loss.Epochs), "lost", n)
	if f.o.OnEvicted != nil {
		f.o.OnEvicted(n)
	}
}

// ostEvicted is called when an OST has forgotten this client, before it is
// connected again.
func (f *FS) ostEvicted(ost int, loss imp.Loss) {
	n := 0
	if loss.Unkept {
		n++
		f.epochs.lostPunches()
	}
	for _, r := range loss.Requests {
		switch r.Op {
		case wire.OpWrite:
			n++
		case wire.OpPunch:
			f.epochs.lostPunch(r.FID)
		}
	}
	if n == 0 {
		return
	}
	f.log.Error("an OST has lost acknowledged data; write verifiers change and clients send the data again", "ost", ost, "writes", n)
	if f.o.OnLostData != nil {
		f.o.OnLostData(ost, n)
	}
}
