// Package sunrpc is an ONC RPC version 2 (RFC 5531) server over TCP and UDP, and a small client.
//
// Every TCP connection has one reader goroutine, which cuts records out of pooled buffers and calls the
// program's Handler, and, once it is needed, one writer goroutine. What a handler answers before it
// returns leaves together with the other answers of that batch. Memory is bounded per connection and for
// the whole server: a reader at a limit stops reading, a call whose peer does not read is not started.
package sunrpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/workers"
)

// Handler answers the calls of a Program. ServeRPC runs on the connection's reader goroutine: it must
// not block, and uses Call.Go for anything that may. The Call may be finished before ServeRPC returns.
type Handler interface {
	ServeRPC(c *Call)
}

// Program is one registered program. Several entries may name the same Prog with disjoint version
// ranges; PROG_MISMATCH then names the lowest and highest of all.
type Program struct {
	Prog, VersLow, VersHigh uint32
	// NumProcs returns the number of procedures of a version: calls from there on get PROC_UNAVAIL.
	// Procedure 0 (NULL) is answered by the transport.
	NumProcs func(vers uint32) uint32
	// MaxArgs is the longest argument accepted, in bytes; longer is GARBAGE_ARGS. 0: MaxRecord.
	MaxArgs int
	Handler Handler
}

// Config configures a Server. Zero values mean the defaults given.
type Config struct {
	Programs []Program
	Logger   *slog.Logger // default: discard

	MaxRecord    int // longest record in bytes, default 1 MiB + 64 KiB
	MaxFragments int // fragments of a record, default 1024

	MaxConns          int // default 4096
	MaxConnsPerClient int // per address, default 1024

	MaxInflightBytesPerConn int // request bytes, default 16 MiB
	MaxInflightCallsPerConn int // default 256; also the calls in progress per UDP socket
	MaxOutBytesPerConn      int // reply bytes waiting, default 8 MiB; may be exceeded by the calls already running
	MaxInflightBytes        int // all buffers of the server, default 256 MiB, at least 4 MaxRecord

	// Workers run calls, default 64; up to 8 times as many while no call that waits
	// for one gets on.
	Workers int

	IdleTimeout     time.Duration // default 6 min; negative: never
	WriteTimeout    time.Duration // without progress while replies wait, default 60 s
	RecordTimeout   time.Duration // without progress inside a record, default 30 s
	DrainRecordWait time.Duration // for the rest of a begun record in Drain, default 100 ms

	// OnOpen is called once for every connection, before anything is read of it. It must
	// neither block nor use the Server.
	OnOpen func(*Conn)
	// OnClose is called once for every connection, after its last ServeRPC, on its reader goroutine.
	// Calls of it may still be in progress.
	OnClose func(*Conn)
	// Now is the clock for time-outs, default time.Now.
	Now func() time.Time
}

// ListenOptions modify ListenTCP and ListenUDP.
type ListenOptions struct {
	// AllowWildcard permits the unspecified address, which is otherwise refused: it would catch the
	// clients of service addresses that have moved away.
	AllowWildcard bool
	// FreeBind binds an address that the host does not have (yet).
	FreeBind bool
	// HoldOnDrain keeps the listener's port through Drain with SYNs dropped instead of refused, until
	// Close: a client whose SYN is dropped retries sooner than one that is refused.
	HoldOnDrain bool
	// File is a socket that listens already (for UDP: is bound) at the address. It is taken over, also
	// when an error is returned. Shared: somebody else holds it, too, and goes on when this Server ends,
	// so no filter is set on it and its queue is left alone.
	File   *os.File
	Shared bool
	// Held leaves connections in the accept queue and datagrams in the socket until Open.
	Held bool
}

var (
	errWildcard = errors.New("wildcard address not allowed")
	errClosed   = errors.New("server closed")
)

// Server serves the configured programs on any number of addresses.
type Server struct {
	cfg    Config
	progs  atomic.Pointer[[]*program]
	pool   *workers.Pool[*Call]
	mem    gauge
	bulk   bulkGate
	room   roomGate
	clock  atomic.Int64 // coarse, UnixNano
	connID atomic.Uint64
	wg     sync.WaitGroup // everything but workers
	stop   chan struct{}
	log    limiter

	waitMu  sync.Mutex
	waiters map[*Conn]struct{} // readers that wait for admission
	waiting atomic.Int64
	short   chan struct{} // to the janitor, capacity 1: readers wait for memory

	mu        sync.Mutex
	closed    bool
	listeners map[*listener]struct{}
	udps      map[*udpSocket]struct{}
	conns     map[*Conn]struct{}
	peers     map[netip.Addr]*peer // that have connections
	endpoints map[endpointKey]*endpoint
	connsGone chan struct{} // closed and replaced when a connection ends or is quiet
	opened    bool          // Open was called
	refusing  bool          // Refuse or a later phase was called: nothing is admitted any more but what was queued
	silence   func(syscall.RawConn) error
	keep      bool       // KeepSockets was called
	handed    []*os.File // by connections, for Handover
}

type program struct {
	Program
	low, high uint32            // over all entries of the same number
	procs     [][]atomic.Uint64 // calls by version - VersLow, procedure
}

type endpointKey struct {
	network string
	addr    netip.AddrPort
}

// endpoint counts what happens at one service address.
type endpoint struct {
	endpointKey
	conns                        atomic.Int64
	accepted, rejected           atomic.Uint64
	calls, bytesIn, bytesOut     atomic.Uint64
	authErrors, garbage, dropped atomic.Uint64
	inflightUDP                  atomic.Int64
}

type listener struct {
	ln   *net.TCPListener
	ep   *endpoint
	opts ListenOptions
	done chan struct{} // the accept goroutine has ended
	held bool          // and was not started; under Server.mu
}

// maxVersions and maxProcs bound the tables of a program; real ones stay far below.
const (
	maxVersions = 64
	maxProcs    = 4096
)

// elastic bounds the workers, in multiples of Config.Workers, while all of them
// wait for something.
const elastic = 8

// NewServer returns a server with its workers and time-outs running; Close ends them. It panics if a
// program has no handler, no NumProcs or an absurd version range: a mistake of the caller.
func NewServer(cfg Config) *Server {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	defTime := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	def(&cfg.MaxRecord, MaxPayload+64<<10)
	def(&cfg.MaxFragments, 1024)
	def(&cfg.MaxConns, 4096)
	def(&cfg.MaxConnsPerClient, 1024)
	def(&cfg.MaxInflightBytesPerConn, 16<<20)
	def(&cfg.MaxInflightCallsPerConn, 256)
	def(&cfg.MaxOutBytesPerConn, 8<<20)
	def(&cfg.MaxInflightBytes, 256<<20)
	def(&cfg.Workers, 64)
	defTime(&cfg.IdleTimeout, 6*time.Minute)
	defTime(&cfg.WriteTimeout, time.Minute)
	defTime(&cfg.RecordTimeout, 30*time.Second)
	defTime(&cfg.DrainRecordWait, 100*time.Millisecond)
	cfg.MaxInflightBytes = max(cfg.MaxInflightBytes, 4*cfg.MaxRecord)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Server{
		cfg: cfg, stop: make(chan struct{}), short: make(chan struct{}, 1),
		waiters: make(map[*Conn]struct{}), listeners: make(map[*listener]struct{}),
		udps: make(map[*udpSocket]struct{}), conns: make(map[*Conn]struct{}),
		peers: make(map[netip.Addr]*peer), endpoints: make(map[endpointKey]*endpoint),
		connsGone: make(chan struct{}),
	}
	s.pool = workers.NewElastic(cfg.Workers, elastic*cfg.Workers, (*Call).run)
	s.mem.freed = s.bufFreed
	s.log.next = make(map[string]logState)
	s.clock.Store(cfg.Now().UnixNano())
	s.progs.Store(new([]*program))
	s.addPrograms(cfg.Programs)
	s.wg.Add(1)
	go s.janitor()
	return s
}

// addPrograms makes programs known, in addition to those that are.
func (s *Server) addPrograms(programs []Program) {
	progs := slices.Clone(*s.progs.Load())
	for _, p := range programs {
		if p.Handler == nil || p.NumProcs == nil || p.VersHigh < p.VersLow || p.VersHigh-p.VersLow >= maxVersions {
			panic(fmt.Sprintf("sunrpc: bad program entry %d", p.Prog))
		}
		if p.MaxArgs == 0 {
			p.MaxArgs = s.cfg.MaxRecord
		}
		e := &program{Program: p, low: p.VersLow, high: p.VersHigh}
		for v := p.VersLow; ; v++ {
			e.procs = append(e.procs, make([]atomic.Uint64, min(max(p.NumProcs(v), 1), maxProcs)))
			if v == p.VersHigh {
				break
			}
		}
		progs = append(progs, e)
	}
	for i, a := range progs {
		e := *a // the published entry may be in use
		for _, b := range progs {
			if e.Prog == b.Prog {
				e.low, e.high = min(e.low, b.VersLow), max(e.high, b.VersHigh)
			}
		}
		progs[i] = &e
	}
	s.progs.Store(&progs)
}

// Open makes programs known in addition to Config.Programs, and begins to serve the addresses that are
// listened on with ListenOptions.Held, and what has come there meanwhile. Later ones are served at once. It
// may be called once, and panics as NewServer does.
func (s *Server) Open(programs ...Program) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed || s.refusing:
		return fmt.Errorf("sunrpc: open: %w", errClosed)
	case s.opened:
		return errors.New("sunrpc: opened already")
	}
	s.addPrograms(programs)
	s.opened = true
	for l := range s.listeners {
		if l.held {
			l.held = false
			s.wg.Add(1)
			go s.accept(l)
		}
	}
	for u := range s.udps {
		if u.held {
			u.held = false
			s.wg.Add(1)
			go u.serve()
		}
	}
	return nil
}

// dispatch checks a record and answers it or hands it to its program. It reports false for a record
// that is not an RPC message; the call is then still the caller's.
func (s *Server) dispatch(c *Call, rec []byte) bool {
	v, stat := decodeCall(c, rec)
	switch v {
	case vGarbage:
		return false
	case vIgnore:
		c.discard()
		return true
	}
	c.ep.calls.Add(1)
	switch v {
	case vMismatch:
		c.denyMismatch()
		return true
	case vAuthError:
		c.AuthError(stat)
		return true
	}
	var known *program
	for _, p := range *s.progs.Load() {
		if p.Prog != c.Prog {
			continue
		}
		known = p
		if c.Vers < p.VersLow || c.Vers > p.VersHigh {
			continue
		}
		procs := p.procs[c.Vers-p.VersLow]
		switch {
		case c.Proc >= uint32(len(procs)):
			c.Fail(ProcUnavail)
		case c.Proc == 0:
			procs[0].Add(1)
			c.Finish()
		case len(c.Args) > p.MaxArgs:
			c.Fail(GarbageArgs)
		default:
			procs[c.Proc].Add(1)
			p.Handler.ServeRPC(c)
		}
		return true
	}
	if known == nil {
		c.Fail(ProgUnavail)
		return true
	}
	c.low, c.high = known.low, known.high
	c.Fail(ProgMismatch)
	return true
}

// ListenTCP starts to accept connections at addr (port 0: any) and returns the address bound.
func (s *Server) ListenTCP(addr netip.AddrPort, opts ListenOptions) (netip.AddrPort, error) {
	network, addr, err := checkAddr("tcp", addr, opts)
	if err != nil {
		opts.closeFile()
		return netip.AddrPort{}, err
	}
	lc := net.ListenConfig{
		Control:         control(opts),
		KeepAliveConfig: keepAlive,
	}
	// Go listens with MPTCP by default, whose sockets refuse the filter that holds off SYNs, and which
	// would bind a client to the host instead of the service address.
	lc.SetMultipathTCP(false)
	ln, err := listenTCP(&lc, network, addr, opts.File)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("sunrpc: %w", err)
	}
	l := &listener{ln: ln, opts: opts, done: make(chan struct{})}
	bound := tcpAddrPort(ln.Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.refusing {
		_ = ln.Close() // never used
		return netip.AddrPort{}, fmt.Errorf("sunrpc: listen %s: %w", addr, errClosed)
	}
	l.ep = s.endpoint("tcp", bound)
	s.listeners[l] = struct{}{}
	if opts.Held && !s.opened {
		l.held = true
		return bound, nil
	}
	s.wg.Add(1)
	go s.accept(l)
	return bound, nil
}

func (o *ListenOptions) closeFile() {
	if o.File != nil {
		_ = o.File.Close() // never used
	}
}

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// listenTCP listens at addr, or takes over a socket that does.
func listenTCP(lc *net.ListenConfig, network string, addr netip.AddrPort, f *os.File) (*net.TCPListener, error) {
	if f == nil {
		ln, err := lc.Listen(context.Background(), network, addr.String())
		if err != nil {
			return nil, err
		}
		return ln.(*net.TCPListener), nil
	}
	ln, err := net.FileListener(f)
	_ = f.Close() // FileListener has its own duplicate
	if err != nil {
		return nil, err
	}
	if l, ok := ln.(*net.TCPListener); ok && tcpAddrPort(ln.Addr()) == addr {
		return l, nil
	}
	_ = ln.Close() // never used
	return nil, fmt.Errorf("listen %s: the socket that was passed is bound to %s", addr, ln.Addr())
}

func checkAddr(network string, addr netip.AddrPort, opts ListenOptions) (string, netip.AddrPort, error) {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	switch {
	case !addr.IsValid():
		return "", addr, fmt.Errorf("sunrpc: listen %s: invalid address", addr)
	case addr.Addr().IsUnspecified() && !opts.AllowWildcard:
		return "", addr, fmt.Errorf("sunrpc: listen %s: %w", addr, errWildcard)
	case addr.Addr().Is4():
		return network + "4", addr, nil
	}
	return network + "6", addr, nil
}

func control(opts ListenOptions) func(string, string, syscall.RawConn) error {
	return func(network, _ string, rc syscall.RawConn) error {
		if !opts.FreeBind {
			return nil
		}
		var serr error
		err := rc.Control(func(fd uintptr) {
			if network[len(network)-1] == '6' {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
			} else {
				serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
			}
		})
		return errors.Join(err, serr)
	}
}

// endpoint returns the counters of an address; they outlive the listener. The caller holds s.mu.
func (s *Server) endpoint(network string, addr netip.AddrPort) *endpoint {
	k := endpointKey{network, addr}
	ep := s.endpoints[k]
	if ep == nil {
		ep = &endpoint{endpointKey: k}
		s.endpoints[k] = ep
	}
	return ep
}

func (s *Server) accept(l *listener) {
	defer s.wg.Done()
	defer close(l.done)
	for {
		nc, err := l.ln.AcceptTCP()
		if err != nil {
			var ne net.Error
			if errors.Is(err, net.ErrClosed) || errors.As(err, &ne) && ne.Timeout() {
				return // closed or draining
			}
			// Out of descriptors or memory: trying again at once would spin.
			s.warn("accept failed", netip.AddrPort{}, l.ep.addr, err)
			select {
			case <-s.stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if l.opts.File != nil {
			_ = nc.SetKeepAliveConfig(keepAlive) // the listener did not know it; the default serves, too
		}
		s.admit(l.ep, nc)
	}
}

var errTooMany = errors.New("too many connections")

// admit takes over an accepted connection.
func (s *Server) admit(ep *endpoint, nc *net.TCPConn) {
	c, err := newConn(s, ep, nc)
	if err == nil {
		client := c.remote.Addr()
		s.mu.Lock()
		p := s.peers[client]
		if s.closed || len(s.conns) >= s.cfg.MaxConns || p != nil && p.conns >= s.cfg.MaxConnsPerClient {
			err = errTooMany
		} else {
			if p == nil {
				p = new(peer)
				s.peers[client] = p
			}
			p.conns++
			c.peer = p
			s.conns[c] = struct{}{}
			ep.conns.Add(1)
			ep.accepted.Add(1)
			s.wg.Add(1)
			if s.cfg.OnOpen != nil {
				s.cfg.OnOpen(c)
			}
			go c.serve()
		}
		s.mu.Unlock()
	}
	if err != nil {
		ep.rejected.Add(1)
		_ = nc.SetLinger(0) // best effort
		_ = nc.Close()
		if c != nil {
			s.warn("connection refused", c.remote, c.local, err)
		}
	}
}

// connDone is the last act of a reader goroutine.
func (s *Server) connDone(c *Conn) {
	if s.cfg.OnClose != nil {
		s.cfg.OnClose(c)
	}
	s.mu.Lock()
	delete(s.conns, c)
	if c.peer.conns--; c.peer.conns == 0 {
		delete(s.peers, c.remote.Addr())
	}
	c.ep.conns.Add(-1)
	s.connChanged()
	s.mu.Unlock()
	s.wg.Done()
}

// connChanged lets those look again who wait for connections to end or to be quiet. The caller holds s.mu.
func (s *Server) connChanged() {
	close(s.connsGone)
	s.connsGone = make(chan struct{})
}

// Close ends everything at once: connections are reset, calls that were submitted to workers still end
// and their replies are discarded. It returns when all goroutines of the server have ended; handlers
// that finish calls from goroutines of their own may still do so later.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.wg.Wait()
		return nil
	}
	s.closed = true
	close(s.stop)
	for l := range s.listeners {
		_ = l.ln.Close() // may be closed by a drain
	}
	for u := range s.udps {
		_ = u.pc.Close()
	}
	conns := make([]*Conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.kill()
	}
	s.closeBulk()
	s.wg.Wait()
	s.pool.Close()
	return nil
}

// bufFreed looks who can go on after the memory in use has fallen by n to now.
func (s *Server) bufFreed(now, n int64) {
	s.memFreed()
	if s.waiting.Load() == 0 {
		return
	}
	// Waking all of them for every buffer would be most of the work. See Conn.ready and outLimit.
	fell := func(to int64) bool { return now < to && to <= now+n }
	if !fell(int64(s.cfg.MaxInflightBytes/2)+1) && !fell(s.part(admitMore)) && !fell(s.part(admitAny)) {
		return
	}
	s.waitMu.Lock()
	for c := range s.waiters {
		if c.ready(awaitAdmission, 0) {
			c.nudge()
		}
	}
	s.waitMu.Unlock()
}

// memFreed looks who can go on after memory was freed or promises were taken back.
func (s *Server) memFreed() {
	s.bulkFreed()
	s.roomFreed()
}

func (s *Server) addWaiter(c *Conn) {
	s.waitMu.Lock()
	s.waiters[c] = struct{}{}
	s.waiting.Add(1)
	s.waitMu.Unlock()
	s.callJanitor()
}

// memShort tells whether somebody waits for memory, or soon may.
func (s *Server) memShort() bool {
	return s.mem.used.Load() >= s.part(recordsTaken) || s.bulk.n.Load() > 0 || s.room.n.Load() > 0
}

// callJanitor gets the connections that hold memory without reading looked at soon.
func (s *Server) callJanitor() {
	if s.memShort() {
		select {
		case s.short <- struct{}{}:
		default:
		}
	}
}

func (s *Server) removeWaiter(c *Conn) {
	s.waitMu.Lock()
	delete(s.waiters, c)
	s.waiting.Add(-1)
	s.waitMu.Unlock()
}

// giveBack is by how much the memory in use must have fallen for the rest to be given back to the system
// at once, in bytes. While it stays below that, giveBackPool is how much of the pool's buffers must have been
// dropped since.
const (
	giveBack     = 32 << 20
	giveBackPool = 16 << 20
)

// janitor enforces the time-outs and keeps the coarse clock.
func (s *Server) janitor() {
	defer s.wg.Done()
	const tick = time.Second
	t := time.NewTicker(tick)
	defer t.Stop()
	var peak, before int64 // of the memory in use, in this period and the one before
	var dropped int64      // bytes of buffers that the pool gave up and that were not given back yet
	for n := 0; ; n++ {
		select {
		case <-s.stop:
			return
		case <-t.C:
			if n%8 == 7 {
				dropped += trimBufs()
				if before-peak >= giveBack || peak < giveBack && dropped >= giveBackPool {
					// An idle process collects no garbage for minutes.
					debug.FreeOSMemory()
					dropped = 0
				}
				before, peak = peak, 0
			}
			peak = max(peak, s.mem.used.Load())
		case <-s.short:
			select {
			case <-s.stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		s.sweep(s.cfg.Now())
		if s.waiting.Load() > 0 || s.bulk.n.Load() > 0 || s.room.n.Load() > 0 {
			s.callJanitor()
		}
	}
}

// pressureStall is how long a connection may make no progress with its replies while memory is short.
const pressureStall = time.Second

// pressureSilence is how long nothing may arrive of a record that was begun while memory is short.
const pressureSilence = 3 * time.Second

// sweep closes connections that have used up their time.
func (s *Server) sweep(now time.Time) {
	t := now.UnixNano()
	s.clock.Store(t)
	short := s.memShort()
	var hogs []*Conn
	s.mu.Lock()
	conns := make([]*Conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		out := c.outBytes.Load()
		stalled := time.Duration(t - c.lastWrite.Load())
		silent := time.Duration(t - c.lastRead.Load())
		switch {
		case out > 0 && stalled > s.cfg.WriteTimeout:
			c.fail(errWriteStalled, true)
		case out > 0:
			if short && stalled >= pressureStall {
				hogs = append(hogs, c)
			}
		case c.partial.Load() && !c.parked.Load() && (silent > s.cfg.RecordTimeout ||
			short && (silent > pressureSilence || time.Duration(t-c.partialAt.Load()) > s.cfg.RecordTimeout)):
			c.fail(errRecordStall, true)
		case s.cfg.IdleTimeout > 0 && silent > s.cfg.IdleTimeout && c.inflight.Load() == 0 && !c.parked.Load():
			c.srv.cfg.Logger.Debug("connection closed", "remote", c.remote, "local", c.local, "err", errIdle)
			c.fail(nil, false)
		}
	}
	if len(hogs) == 0 {
		return
	}
	// The biggest first, and no more than it takes.
	size := make(map[*Conn]int64, len(hogs))
	for _, c := range hogs {
		size[c] = c.outBytes.Load()
	}
	slices.SortFunc(hogs, func(a, b *Conn) int { return cmp.Compare(size[b], size[a]) })
	for _, c := range hogs {
		if s.mem.used.Load() < int64(s.cfg.MaxInflightBytes)/4*3 && s.bulk.n.Load() == 0 && s.room.n.Load() == 0 {
			break
		}
		c.fail(errPressure, true)
	}
}

// limiter lets one message of a kind through per second.
type limiter struct {
	mu   sync.Mutex
	next map[string]logState
}

type logState struct {
	until      int64
	suppressed int
}

func (s *Server) warn(msg string, remote, local netip.AddrPort, err error) {
	text := err.Error()
	// Only this package's errors are kinds of their own; system errors may contain addresses.
	key := msg
	switch {
	case errors.Is(err, errRecordSize), errors.Is(err, errFragments), errors.Is(err, errNotRPC),
		errors.Is(err, errWriteStalled), errors.Is(err, errRecordStall), errors.Is(err, errPressure):
		key = text
	}
	now := time.Now().UnixNano()
	s.log.mu.Lock()
	st := s.log.next[key]
	if now < st.until {
		st.suppressed++
		s.log.next[key] = st
		s.log.mu.Unlock()
		return
	}
	s.log.next[key] = logState{until: now + int64(time.Second)}
	s.log.mu.Unlock()
	s.cfg.Logger.Warn(msg, "remote", remote, "local", local, "err", text, "suppressed", st.suppressed)
}
