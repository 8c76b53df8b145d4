// Package statd is the network status monitor (NSM version 1, XNFS Version 3W
// chapter 11) of floating service addresses. It frees the locks of clients
// that say that they have restarted, keeps the monitor list for local programs,
// and tells clients when a service address has come back after a crash.
//
// The monitor list, the state numbers and the locks are the MDT's; this package
// keeps nothing that a crash could lose.
package statd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

// Table carries lock operations to the MDT. *client.FS is one.
type Table interface {
	// Call gives req to the MDT and waits. No answer is ErrTargetDown in rep.
	Call(ctx context.Context, o client.Owner, req *wire.Request, rep *wire.Reply)
}

// Caller is an RPC client of one program at one host. *sunrpc.Client is one.
type Caller interface {
	Call(ctx context.Context, proc uint32, args []byte) ([]byte, error)
	Close() error
}

// Config is what a Server needs. Table is required; zero values of the rest
// mean the defaults given.
type Config struct {
	Table  Table
	Logger *slog.Logger // default: discard

	// Now is the clock; only differences count. Default time.Now.
	Now func() time.Time
	// NewTimer returns a channel that gets a value after d, and a function that
	// releases the timer. Default time.NewTimer.
	NewTimer func(d time.Duration) (<-chan time.Time, func())
	// Rand returns a number in [0, n). Default math/rand/v2.
	Rand func(n int64) int64

	// Portmap asks the portmapper at host, from the address local if that is
	// valid, for the port of a program on a network id of package rpcbind.
	// Default rpcbind.GetPort with port 111.
	Portmap func(ctx context.Context, local, host netip.Addr, prog, vers uint32, netid string) (uint16, error)
	// Dial connects to a program over network "tcp" or "udp", from the address
	// local if that is valid. Default: from a reserved port if that is allowed
	// and one is free, else from any.
	Dial func(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, prog, vers uint32) (Caller, error)
	// Resolve finds the addresses of a host name. Default: the system's resolver.
	Resolve func(ctx context.Context, name string) ([]netip.Addr, error)

	// SimuCrash makes a service address act as after a crash: a new state
	// number at the MDT and Address.SetState. It runs on a worker of the RPC
	// server. Default: SIMU_CRASH is ignored.
	SimuCrash func(vip uint32)

	// Slots is how many NOTIFY calls an address makes at the same time. Default 256.
	Slots int
	// AttemptTimeout bounds one attempt to reach a client (its portmapper and
	// its status monitor). Default 3 s.
	AttemptTimeout time.Duration
	// Backoff is the pause after the first attempt; it doubles up to
	// BackoffMax. Default 2 s and 120 s.
	Backoff, BackoffMax time.Duration
	// GiveUp is how long a client that does not answer is tried. Default 15 min.
	GiveUp time.Duration
}

// firstShare is what a client has for its first answer while others wait for
// their turn.
const firstShare = 100 * time.Millisecond

// Server serves any number of service addresses.
type Server struct {
	cfg Config
	log *slog.Logger
	// local tells whether a caller is a program of this machine.
	local func(netip.Addr) bool
}

// New returns a server. It fails if there is no table.
func New(cfg Config) (*Server, error) {
	if cfg.Table == nil {
		return nil, errors.New("statd: a table is needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.NewTimer == nil {
		cfg.NewTimer = func(d time.Duration) (<-chan time.Time, func()) {
			t := time.NewTimer(d)
			return t.C, func() { t.Stop() }
		}
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Int64N
	}
	if cfg.Portmap == nil {
		cfg.Portmap = func(ctx context.Context, local, host netip.Addr, prog, vers uint32, netid string) (uint16, error) {
			return rpcbind.GetPort(ctx, local, netip.AddrPortFrom(host, 0), prog, vers, netid)
		}
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, prog, vers uint32) (Caller, error) {
			c, err := sunrpc.DialReserved(ctx, cfg.Rand, network, local, remote, prog, vers, sunrpc.Cred{})
			if err != nil {
				return nil, err
			}
			return c, nil
		}
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		}
	}
	if cfg.Slots <= 0 {
		cfg.Slots = 256
	}
	for _, p := range []struct {
		d   *time.Duration
		def time.Duration
	}{{&cfg.AttemptTimeout, 3 * time.Second}, {&cfg.Backoff, 2 * time.Second},
		{&cfg.BackoffMax, 2 * time.Minute}, {&cfg.GiveUp, 15 * time.Minute}} {
		if *p.d <= 0 {
			*p.d = p.def
		}
	}
	return &Server{cfg: cfg, log: cfg.Logger, local: netip.Addr.IsLoopback}, nil
}

// Address is one service address of a Server. Programs answers at once; NOTIFY
// calls are dropped unanswered, so that clients repeat them, until Start and
// from Stop on.
type Address struct {
	srv   *Server
	log   *slog.Logger
	addr  netip.Addr
	owner client.Owner
	state atomic.Uint32
	stats counters
	quiet limiter

	monMu sync.Mutex // serializes changes of notes in the monitor list

	ctx    context.Context // ends when Stop begins
	cancel context.CancelFunc
	kick   chan struct{} // to the notifier, capacity 1
	told   toldQueue
	calls  chan *sunrpc.Call // NOTIFY calls, to listen
	backs  chan struct{}     // one token per callback in progress

	mu       sync.Mutex
	running  bool
	stopped  bool
	progress Progress

	wg       sync.WaitGroup // everything but the recorder
	recorder chan struct{}  // closed when the recorder has ended
}

// maxCalls bounds the NOTIFY calls that wait for an answer, maxBacks the
// callbacks in progress, per address.
const (
	maxCalls = 256
	maxBacks = 64
)

// Address returns the service of addr, which is the VIP with the given index
// and epoch. state is its NSM state number, 0 if it has none yet: then nobody
// is notified until SetState.
func (s *Server) Address(addr netip.Addr, vip uint32, epoch uint64, state uint32) *Address {
	a := &Address{
		srv: s, log: s.log.With("address", addr.Unmap()), addr: addr.Unmap(),
		owner: client.Owner{VIP: vip, Epoch: epoch},
		kick:  make(chan struct{}, 1), calls: make(chan *sunrpc.Call, maxCalls),
		backs: make(chan struct{}, maxBacks), recorder: make(chan struct{}),
	}
	a.quiet.now = s.cfg.Now
	a.told.wake = make(chan struct{}, 1)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.state.Store(state)
	return a
}

// Programs is the service for a sunrpc server, on TCP and UDP.
func (a *Address) Programs() []sunrpc.Program {
	return []sunrpc.Program{{
		Prog: nsm.Program, VersLow: nsm.Version, VersHigh: nsm.Version,
		NumProcs: func(uint32) uint32 { return nsm.NumProcs },
		MaxArgs:  nsm.MaxArgs,
		Handler:  handler{a},
	}}
}

// Start begins to act on NOTIFY calls and to notify the hosts that have not
// been told of the address's state. The MDT must know that state by then
// (OpLockService), and the address's lock service must answer: clients reclaim
// at once. Only the first Start counts.
func (a *Address) Start() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running || a.stopped {
		return
	}
	a.running = true
	a.wg.Go(a.listen)
	a.wg.Go(a.notify)
	go a.record()
	a.Kick()
}

// SetState changes the state number and notifies the hosts of it. As with
// Start, the MDT must know it already.
func (a *Address) SetState(state uint32) {
	a.state.Store(state)
	a.Kick()
}

// Kick makes the notifier read the monitor list again: hosts that were given
// up are tried once more.
func (a *Address) Kick() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// EndCalls ends what is being sent to clients, and waits until no socket of it is
// left, whether the MDT answers or not. It may run beside Stop, which is still needed.
func (a *Address) EndCalls(ctx context.Context) error {
	a.cancel()
	a.mu.Lock()
	running := a.running || a.stopped
	a.mu.Unlock()
	if !running {
		return nil
	}
	done := make(chan struct{})
	go func() { a.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("statd: calls to clients have not ended: %w", ctx.Err())
	}
}

// Stop ends the service and waits for its goroutines. What clients have been
// told by then is recorded at the MDT while ctx lasts. The error is ctx's, when
// the MDT did not answer in time.
func (a *Address) Stop(ctx context.Context) error {
	a.mu.Lock()
	running := a.running
	a.running, a.stopped = false, true
	a.mu.Unlock()
	a.cancel()
	if !running {
		return nil
	}
	done := make(chan struct{})
	go func() {
		a.wg.Wait()
		a.told.close(ctx)
		<-a.recorder
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("statd: stop: %w", ctx.Err())
	}
}

// Progress tells where the notifying of clients stands, for the current state.
type Progress struct {
	State uint32
	// Client addresses that had to be told, and what became of them. Failed
	// ones stay unnotified in the table.
	Total, Notified, Pending, Failed int
	// StartedAt is zero before the first reading of the monitor list,
	// FinishedAt while anything is pending.
	StartedAt, FinishedAt time.Time
	// Errors is a sample of the latest failed attempts, newest last.
	Errors []string
}

// maxErrors bounds Progress.Errors.
const maxErrors = 8

// Progress returns a copy.
func (a *Address) Progress() Progress {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.progress
	p.Errors = append([]string(nil), p.Errors...)
	return p
}

// Stats counts what happened at an address since it was made.
type Stats struct {
	// NotifyActed counts NOTIFY calls that were acted on, LocksFreed the locks,
	// shares and waiting requests that went with them.
	NotifyActed, LocksFreed uint64
	// NOTIFY calls that were answered and ignored: not from the address of a
	// monitored host; with a state that is known already; without a state;
	// from an address with several hosts none of which has the name.
	IgnoredUnmonitored, IgnoredSameState, IgnoredNoState, IgnoredAmbiguous uint64
	// NotifyDropped counts NOTIFY calls that were not answered, so that the
	// client repeats them: the table was out of reach, or too many waited.
	NotifyDropped uint64
	// Refused counts MON, UNMON, UNMON_ALL and SIMU_CRASH from other machines.
	Refused uint64
	// Callbacks counts local programs that were told of a client's restart,
	// CallbacksFailed those that could not be.
	Callbacks, CallbacksFailed uint64
	// Sent counts attempts to notify a client, SendErrors those that failed.
	Sent, SendErrors uint64
}

type counters struct {
	acted, freed, unmonitored, sameState, noState, ambiguous, dropped,
	refused, backs, backsFailed, sent, sendErrors atomic.Uint64
}

// Stats returns the counts.
func (a *Address) Stats() Stats {
	c := &a.stats
	return Stats{
		NotifyActed: c.acted.Load(), LocksFreed: c.freed.Load(),
		IgnoredUnmonitored: c.unmonitored.Load(), IgnoredSameState: c.sameState.Load(),
		IgnoredNoState: c.noState.Load(), IgnoredAmbiguous: c.ambiguous.Load(),
		NotifyDropped: c.dropped.Load(), Refused: c.refused.Load(),
		Callbacks: c.backs.Load(), CallbacksFailed: c.backsFailed.Load(),
		Sent: c.sent.Load(), SendErrors: c.sendErrors.Load(),
	}
}

// call makes one lock operation for the address.
func (a *Address) call(ctx context.Context, op wire.Op, flags wire.Flags, args *wire.LockArgs, cookie uint64) (*wire.LockReply, error) {
	req := wire.Request{Lock: args, Cookie: cookie}
	req.Op, req.Flags = op, flags
	var rep wire.Reply
	a.srv.cfg.Table.Call(ctx, a.owner, &req, &rep)
	if err := rep.Status.Err(); err != nil {
		return nil, err
	}
	if rep.Lock == nil {
		rep.Lock = new(wire.LockReply)
	}
	return rep.Lock, nil
}

// hosts reads the address's monitor list.
func (a *Address) hosts(ctx context.Context) ([]wire.MonitoredHost, error) {
	rep, err := a.call(ctx, wire.OpLockHosts, 0, new(wire.LockArgs), 0)
	if err != nil {
		return nil, fmt.Errorf("statd: read the monitor list: %w", err)
	}
	return rep.Hosts, nil
}

func (a *Address) hostArgs(h wire.LockHost) *wire.LockArgs {
	h.VIP = a.owner.VIP
	return &wire.LockArgs{Owner: wire.LockOwner{LockHost: h}}
}

// pause waits for d; false when ctx ended first.
func (s *Server) pause(ctx context.Context, d time.Duration) bool {
	c, release := s.cfg.NewTimer(d)
	defer release()
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return false
	}
}

// limiter lets one message of a kind through per logEvery.
type limiter struct {
	now  func() time.Time
	mu   sync.Mutex
	last map[string]logState
}

type logState struct {
	at         time.Time
	suppressed int
}

const logEvery = 10 * time.Second

// ok tells whether a message may be logged, and how many of its kind were not.
// Kinds are few and constant.
func (l *limiter) ok(kind string) (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	s, seen := l.last[kind]
	if seen && now.Sub(s.at) < logEvery {
		s.suppressed++
		l.last[kind] = s
		return 0, false
	}
	if l.last == nil {
		l.last = make(map[string]logState)
	}
	l.last[kind] = logState{at: now}
	return s.suppressed, true
}

// limited logs at most one message of its kind per logEvery.
func (a *Address) limited(level slog.Level, msg string, args ...any) {
	if n, ok := a.quiet.ok(msg); ok {
		if n > 0 {
			args = append(args, "suppressed", n)
		}
		a.log.Log(context.Background(), level, msg, args...)
	}
}
