// Package lockd is the Network Lock Manager server, versions 1, 3 and 4 (XNFS
// chapters 10 and 14): it turns NLM calls into requests to the lock table, which
// is the metadata target's, and calls clients back when a lock that they wait for
// has been given to them. It keeps nothing that a client could miss: after a
// crash or a move the table hands out unanswered grants once more.
package lockd

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/inflight"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Table is the way to the lock table. *client.FS is one.
type Table interface {
	// Submit gives req to the table; done is called once, perhaps from another
	// goroutine, and does not block. req and rep belong to the table until then.
	Submit(o client.Owner, req *wire.Request, rep *wire.Reply, done func())
	// Call gives req to the table and waits.
	Call(ctx context.Context, o client.Owner, req *wire.Request, rep *wire.Reply)
}

var _ Table = (*client.FS)(nil)

// Files checks file handles.
type Files interface {
	// LockFile gives the file that fh names if the caller may lock it. It may
	// block. fh aliases the call's arguments.
	LockFile(c *sunrpc.Call, fh []byte) (wire.FID, wire.Status)
}

// Caller is a connection to a client's lock manager (*sunrpc.Client).
type Caller interface {
	// Call makes one call. Errors other than *sunrpc.AcceptError and
	// *sunrpc.DenyError mean that the call may have been executed.
	Call(ctx context.Context, proc uint32, args []byte) ([]byte, error)
	Close() error
}

// Config configures a Server. Table is required; zero values mean the defaults.
type Config struct {
	Table  Table
	Logger *slog.Logger // default: discard

	// Portmap finds the port of a program at a client, asking from local over the
	// netid's transport. Default rpcbind.GetPort.
	Portmap func(ctx context.Context, local netip.Addr, server netip.AddrPort, prog, vers uint32, netid string) (uint16, error)
	// Dial connects to a client's lock manager from the service address local; an
	// error means that nothing was sent. Default: sunrpc.Dial from a reserved port
	// if the process may use one, with AUTH_SYS as root.
	Dial func(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, vers uint32) (Caller, error)
	// OnFenced is called when the table says that a service address has a newer owner
	// than this epoch, once for each Address. It must not block.
	OnFenced func(vip uint32, epoch uint64)
	// Now and AfterFunc are the clock of retries and of the hand-over statistics.
	// AfterFunc runs f on a goroutine of its own after d, unless stop comes first.
	Now       func() time.Time
	AfterFunc func(d time.Duration, f func()) (stop func() bool)

	// Parallel is the most clients that one service address calls at a time.
	// Default 64. At most half of them are clients that failed before.
	Parallel int
	// CallTimeout bounds one callback, PortmapTimeout one question for a port.
	// Default 5 s and 2 s.
	CallTimeout, PortmapTimeout time.Duration
	// Tries is how often a client is tried before a callback of which no copy can
	// have reached it is given up. Default 4.
	Tries int
	// RetryFirst is the wait after the first failure; it doubles up to RetryMax.
	// Default 500 ms and 30 s.
	RetryFirst, RetryMax time.Duration
	// MaxPending bounds the unanswered callbacks of one client, and 16 times as
	// many those of an address. Those beyond it are not made: their clients find
	// out when they ask again. Default 4096.
	MaxPending int
}

// Server makes the lock services of any number of addresses.
type Server struct {
	cfg Config
	log *slog.Logger
}

// New checks cfg and returns a Server.
func New(cfg Config) (*Server, error) {
	if cfg.Table == nil {
		return nil, errors.New("lockd: a lock table is needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Portmap == nil {
		cfg.Portmap = rpcbind.GetPort
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, vers uint32) (Caller, error) {
			c, err := sunrpc.DialReserved(ctx, rand.Int64N, network, local, remote, nlm.Program, vers, sunrpc.Cred{Flavor: sunrpc.AuthSys})
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.AfterFunc == nil {
		cfg.AfterFunc = func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }
	}
	def := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	defTime := func(p *time.Duration, v time.Duration) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&cfg.Parallel, 64)
	def(&cfg.Tries, 4)
	def(&cfg.MaxPending, 4096)
	defTime(&cfg.CallTimeout, 5*time.Second)
	defTime(&cfg.PortmapTimeout, 2*time.Second)
	defTime(&cfg.RetryFirst, 500*time.Millisecond)
	defTime(&cfg.RetryMax, 30*time.Second)
	return &Server{cfg: cfg, log: cfg.Logger}, nil
}

// Address is the lock service of one service address.
type Address struct {
	srv   *Server
	addr  netip.Addr
	owner client.Owner
	files Files
	dups  *inflight.Table[*op]
	count counters

	mu      sync.Mutex // Start and Stop
	eng     atomic.Pointer[engine]
	polling *poller
}

// Address returns the lock service of the address addr, which the targets know
// by its VIP index and epoch. Its programs answer at once; clients are called
// back between Start and Stop.
func (s *Server) Address(addr netip.Addr, vip uint32, epoch uint64, files Files) *Address {
	a := &Address{srv: s, addr: addr.Unmap(), owner: client.Owner{VIP: vip, Epoch: epoch}, files: files, dups: inflight.New[*op]()}
	return a
}

// Programs are the entries for a sunrpc server.
func (a *Address) Programs() []sunrpc.Program {
	var l []sunrpc.Program
	for _, v := range []uint32{nlm.Version1, nlm.Version3, nlm.Version4} {
		l = append(l, sunrpc.Program{
			Prog: nlm.Program, VersLow: v, VersHigh: v,
			NumProcs: nlm.NumProcs, MaxArgs: nlm.MaxArgs, Handler: handler{a},
		})
	}
	return l
}

// Start begins to collect grants from the table and to call clients back. It
// does nothing when started already.
func (a *Address) Start() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.polling != nil {
		return
	}
	e := newEngine(a)
	a.eng.Store(e)
	a.polling = startPoller(a, e)
}

// EndCalls ends what is being sent to clients, and waits until no socket of it is
// left, whether the table answers or not. It may run beside Stop, which is still needed.
func (a *Address) EndCalls(ctx context.Context) error {
	if e := a.eng.Load(); e != nil {
		return e.endCalls(ctx)
	}
	return nil
}

// Stop ends the callbacks and waits until none is in progress; those that were
// not answered stay in the table, for the address's next owner. An error means
// that ctx ended first; the rest then ends by itself.
func (a *Address) Stop(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.polling
	if p == nil {
		return nil
	}
	a.polling = nil
	e := a.eng.Load()
	err := e.endCalls(ctx) // before the table is asked, which may not answer
	err = errors.Join(err, p.stop(ctx), e.stop(ctx))
	a.eng.Store(nil)
	return err
}

// fenced notes that another node owns the address now.
func (a *Address) fenced() {
	if a.count.fenced.Add(1) == 1 {
		a.srv.log.Error("this service address has a newer owner; its lock calls are no longer answered here", "vip", a.owner.VIP, "address", a.addr)
		if f := a.srv.cfg.OnFenced; f != nil {
			f(a.owner.VIP, a.owner.Epoch)
		}
	}
}

// counters are the figures behind Stats.
type counters struct {
	calls, granted, denied, blocked, deadlock, grace, noLocks, failed, dropped, fenced atomic.Uint64

	sent, accepted, refused, undelivered, overflow atomic.Uint64
	results, resultsLost                           atomic.Uint64
	handOvers, handOverNanos                       atomic.Uint64
}

// Stats are figures of one service address since it was made.
type Stats struct {
	Calls uint64 // all but NULL
	// Outcomes of LOCK, NM_LOCK and SHARE in either form.
	Granted, Denied, Blocked, Deadlock, Grace, NoLocks uint64
	Failed                                             uint64 // any other status, of any procedure
	Dropped                                            uint64 // not answered: the table could not be asked
	Fenced                                             uint64 // of these, because the address has a newer owner

	// Copies of GRANTED that were sent, and what became of the callbacks.
	CallbacksSent, CallbacksAccepted, CallbacksRefused, CallbacksUndelivered uint64
	CallbacksOverflow                                                        uint64 // not made because too many were pending
	CallbacksPending                                                         int
	// Results of _MSG calls that were sent, and that could not be.
	Results, ResultsLost uint64
	// HandOver is the mean time from a grant's arrival from the table to the
	// client's acceptance.
	HandOver time.Duration
}

// Stats gives the figures.
func (a *Address) Stats() Stats {
	c := &a.count
	s := Stats{
		Calls: c.calls.Load(), Granted: c.granted.Load(), Denied: c.denied.Load(), Blocked: c.blocked.Load(),
		Deadlock: c.deadlock.Load(), Grace: c.grace.Load(), NoLocks: c.noLocks.Load(), Failed: c.failed.Load(),
		Dropped: c.dropped.Load(), Fenced: c.fenced.Load(),
		CallbacksSent: c.sent.Load(), CallbacksAccepted: c.accepted.Load(), CallbacksRefused: c.refused.Load(),
		CallbacksUndelivered: c.undelivered.Load(), CallbacksOverflow: c.overflow.Load(),
		Results: c.results.Load(), ResultsLost: c.resultsLost.Load(),
	}
	if n := c.handOvers.Load(); n > 0 {
		s.HandOver = time.Duration(c.handOverNanos.Load() / n)
	}
	if e := a.eng.Load(); e != nil {
		s.CallbacksPending = e.pending()
	}
	return s
}
