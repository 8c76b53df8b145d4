package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/workers"
	"github.com/baton-nfs/baton/recovery/wire"
)

// ServerOptions configure a Server. Node is required, and TLS unless Insecure
// is set; zero numbers mean the defaults.
type ServerOptions struct {
	// Node is the name of this node, that of its certificate.
	Node string
	// TLS holds this node's certificate and the cluster's CA. It has to demand
	// and verify client certificates.
	TLS *tls.Config
	// Insecure allows connections without TLS when TLS is nil.
	Insecure bool
	Timeouts Timeouts
	// Requests that a client may have unanswered on a connection, by kind.
	// Defaults 256, 64 and 4.
	ControlWindow, BulkWindow, HealthWindow uint16
	// MaxBulk is the largest bulk of one request in bytes. Default and most
	// wire.MaxBulk.
	MaxBulk int
	// ConnMemory and TotalMemory bound the bytes of bulk buffers and large
	// replies of one connection and of all together. A connection at a limit
	// is not read from; but each may have one request in work whatever the
	// others have. Defaults 32 MiB and 512 MiB.
	ConnMemory, TotalMemory int64
	// MaxConns bounds connections, MaxHandshakes those of them that have not
	// yet said who they are. Defaults 1024 and 128.
	MaxConns, MaxHandshakes int
	// MaxPolls bounds the requests of a connection that wait for others (Op.Polls). They
	// take no credits. Default 1024.
	MaxPolls int
	// Workers bounds, for each target, the goroutines that run requests which
	// block (wire.Blocker). Default 64.
	Workers int
	// Allow, if set, decides about a connection whose node is authenticated; its
	// error is told to the client.
	Allow  func(node, target string, kind Kind) error
	Logger *slog.Logger
}

// ServerStats are counters since the start, and gauges.
type ServerStats struct {
	Conns         int
	Accepted      uint64
	Refused       uint64 // in the handshake
	Requests      uint64
	BadRequests   uint64 // answered with ErrProto
	Violations    uint64 // connections closed because of what they sent
	Timeouts      uint64 // connections closed because of silence or slowness
	MemoryInUse   int64
	MemoryWaiting int // connections that are not read from for want of memory
}

// Server serves targets on any number of listeners.
type Server struct {
	o   ServerOptions
	log *slog.Logger
	mem budget
	// grace is how long Close waits for goroutines after the connections have
	// been closed.
	grace time.Duration

	mu        sync.Mutex
	targets   map[string]*served
	stopped   []*served // targets whose workers may still run
	conns     map[*sconn]struct{}
	shaking   map[net.Conn]struct{}
	listeners map[net.Listener]struct{}
	closing   bool
	wg        sync.WaitGroup

	calls sync.Pool

	accepted, refused, requests, bad, violations, timeouts atomic.Uint64
}

// served is a target. Its workers are its own, so that one whose disk hangs does
// not stop the others.
type served struct {
	t    wire.Target
	name string
	pool *workers.Pool[*call]
}

func newServed(name string, t wire.Target, n int) *served {
	return &served{t: t, name: name, pool: workers.New(n, (*call).work)}
}

// NewServer returns a server of the given targets by name.
func NewServer(targets map[string]wire.Target, o ServerOptions) (*Server, error) {
	o.Timeouts.defaults()
	def := func(p *int64, v int64) {
		if *p <= 0 {
			*p = v
		}
	}
	defInt := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	defWin := func(p *uint16, v uint16) {
		if *p == 0 {
			*p = v
		}
	}
	defWin(&o.ControlWindow, 256)
	defWin(&o.BulkWindow, 64)
	defWin(&o.HealthWindow, 4)
	defInt(&o.MaxBulk, wire.MaxBulk)
	o.MaxBulk = min(o.MaxBulk, wire.MaxBulk)
	def(&o.ConnMemory, 32<<20)
	def(&o.TotalMemory, 512<<20)
	defInt(&o.MaxConns, 1024)
	defInt(&o.MaxHandshakes, 128)
	defInt(&o.MaxPolls, 1024)
	defInt(&o.Workers, 64)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Node == "" || len(o.Node) > maxName:
		return nil, errors.New("serve targets: a node name of at most 255 bytes is needed")
	case o.TLS == nil && !o.Insecure:
		return nil, errors.New("serve targets: no TLS configuration, and going without was not asked for")
	case o.TLS != nil && (o.TLS.ClientAuth != tls.RequireAndVerifyClientCert || o.TLS.ClientCAs == nil):
		return nil, errors.New("serve targets: the TLS configuration does not demand client certificates of the cluster's CA")
	}
	if o.TLS != nil {
		o.TLS = o.TLS.Clone()
		o.TLS.DynamicRecordSizingDisabled = true
	}
	s := &Server{
		o: o, log: o.Logger, grace: closeGrace, targets: map[string]*served{}, conns: map[*sconn]struct{}{},
		shaking: map[net.Conn]struct{}{}, listeners: map[net.Listener]struct{}{},
	}
	s.mem.free = o.TotalMemory
	s.calls.New = func() any {
		c := new(call)
		c.done = c.finish
		return c
	}
	for name, t := range targets {
		s.targets[name] = newServed(name, t, o.Workers)
	}
	return s, nil
}

// SetTarget begins to serve a target. A target of the same name must have been
// stopped.
func (s *Server) SetTarget(name string, t wire.Target) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case name == "" || len(name) > maxName:
		return fmt.Errorf("serve target %q: bad name", name)
	case s.targets[name] != nil:
		return fmt.Errorf("serve target %q: there is one of that name", name)
	case s.closing:
		return fmt.Errorf("serve target %q: %w", name, ErrClosed)
	}
	s.targets[name] = newServed(name, t, s.o.Workers)
	return nil
}

// StopTarget no longer serves a target: its connections are drained as by
// Close. When it returns nil nothing of the server calls the target any more. After
// an error that holds once a target's Handle has returned; calling again waits for
// it. An unknown name is no error.
func (s *Server) StopTarget(ctx context.Context, name string) error {
	s.mu.Lock()
	if t := s.targets[name]; t != nil {
		s.stopped = append(s.stopped, t)
		delete(s.targets, name)
	}
	var conns []*sconn
	for c := range s.conns {
		if c.target.name == name {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	if err := drain(ctx, conns); err != nil {
		return fmt.Errorf("stop serving target %q: %w", name, err)
	}
	s.mu.Lock()
	var idle []*served
	s.stopped = slices.DeleteFunc(s.stopped, func(t *served) bool {
		if t.name == name {
			idle = append(idle, t)
		}
		return t.name == name
	})
	s.mu.Unlock()
	for _, t := range idle {
		t.pool.Close()
	}
	return nil
}

// Serve accepts connections until the listener fails or the server closes,
// when it returns nil. It closes l.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil
	}
	s.listeners[l] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	delay := time.Duration(0)
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			closing := s.closing
			s.mu.Unlock()
			var ne net.Error
			switch {
			case closing:
				return nil
			case errors.Is(err, net.ErrClosed) || !errors.As(err, &ne):
				return fmt.Errorf("serve targets on %s: %w", l.Addr(), err)
			}
			// Out of descriptors, or the connection was gone already.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Warn("cannot accept a connection", "listener", l.Addr(), "err", err)
			time.Sleep(delay)
			continue
		}
		delay = 0
		s.accepted.Add(1)
		s.mu.Lock()
		if s.closing || len(s.shaking) >= s.o.MaxHandshakes || len(s.conns)+len(s.shaking) >= s.o.MaxConns {
			s.mu.Unlock()
			s.refused.Add(1)
			_ = nc.Close()
			continue
		}
		s.shaking[nc] = struct{}{}
		s.wg.Add(1)
		s.mu.Unlock()
		go s.serve(nc)
	}
}

// serve runs a connection: its goroutine becomes the reader.
func (s *Server) serve(nc net.Conn) {
	defer s.wg.Done()
	c, err := s.handshake(nc)
	if err != nil {
		s.refused.Add(1)
		level := slog.LevelWarn
		if errors.Is(err, ErrNoTarget) {
			level = slog.LevelDebug // clients look for targets on all nodes that may have them
		}
		s.log.Log(context.Background(), level, "connection refused", "peer", nc.RemoteAddr(), "err", err)
		_ = nc.Close()
		s.mu.Lock()
		delete(s.shaking, nc)
		s.mu.Unlock()
	} else {
		s.wg.Add(1)
		go c.writer()
		c.run()
	}
	if c != nil {
		s.leave(c)
	}
}

// enter makes a connection one of its target's, from when on it is drained with
// it. Called with mu held.
func (s *Server) enter(c *sconn, t *served) {
	c.target = t
	s.conns[c] = struct{}{}
	delete(s.shaking, rawConn(c.nc))
}

// leave ends a connection that was entered and is not read any more.
func (s *Server) leave(c *sconn) {
	c.close(ErrClosed)
	c.given.Wait()
	if c.closer != nil {
		if err := c.closer.Close(); err != nil {
			s.log.Warn("closing a connection at its target failed", "node", c.node, "target", c.target.name, "err", err)
		}
	}
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	close(c.gone)
}

func (s *Server) window(k Kind) uint16 {
	switch k {
	case Control:
		return s.o.ControlWindow
	case Bulk:
		return s.o.BulkWindow
	case Health:
		return s.o.HealthWindow
	}
	return 0
}

// handshake authenticates a connection, finds its target and has it accepted
// there before the client hears that it is connected. A connection returned with
// an error has been entered all the same.
func (s *Server) handshake(nc net.Conn) (*sconn, error) {
	if err := nc.SetDeadline(time.Now().Add(s.o.Timeouts.Handshake)); err != nil {
		return nil, err
	}
	raw := nc
	if s.o.TLS != nil {
		t := tls.Server(nc, s.o.TLS)
		if err := t.Handshake(); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		nc = t
	}
	c := newSconn(s, nc)
	b, err := readHandshake(c.br)
	if err != nil {
		return nil, err
	}
	h, err := decodeHello(b)
	if err != nil {
		return nil, err
	}
	code, text := s.admit(c, &h)
	if code == codeOK {
		c.accept(h.session)
	}
	w := welcome{code: code, version: min(MaxVersion, h.max), window: c.window, maxBulk: uint32(s.o.MaxBulk), node: s.o.Node, text: text}
	_, err = nc.Write(w.encode())
	if code != codeOK {
		// Else the RST of the close may overtake the answer.
		if t, ok := raw.(*net.TCPConn); ok {
			_ = t.CloseWrite()
			discard(raw, time.Second)
		}
		return nil, fmt.Errorf("%w: %s (node %q, target %q, versions %d to %d)", codeErrors[code], text, h.node, h.target, h.min, h.max)
	}
	if err != nil {
		return c, err
	}
	return c, raw.SetDeadline(time.Time{})
}

func (s *Server) admit(c *sconn, h *hello) (uint16, string) {
	if h.min > MaxVersion || h.max < MinVersion || h.min > h.max {
		return codeVersion, fmt.Sprintf("this node speaks versions %d to %d, asked for were %d to %d", MinVersion, MaxVersion, h.min, h.max)
	}
	if t, ok := c.nc.(*tls.Conn); ok {
		st := t.ConnectionState()
		if len(st.PeerCertificates) == 0 {
			return codeIdentity, "no certificate"
		}
		if err := st.PeerCertificates[0].VerifyHostname(h.node); err != nil {
			return codeIdentity, fmt.Sprintf("the certificate is not of node %q", h.node)
		}
	}
	if h.node == "" {
		return codeIdentity, "the node has no name"
	}
	if c.window = s.window(h.kind); c.window == 0 {
		return codeRefused, fmt.Sprintf("unknown kind of connection %d", h.kind)
	}
	c.kind, c.node = h.kind, h.node
	s.mu.Lock()
	t := s.targets[h.target]
	s.mu.Unlock()
	if t != nil && s.o.Allow != nil {
		if err := s.o.Allow(h.node, h.target, h.kind); err != nil {
			return codeRefused, err.Error()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return codeBusy, "the node is stopping"
	case t == nil || s.targets[h.target] != t:
		return codeNoTarget, fmt.Sprintf("there is no target %q on node %q", h.target, s.o.Node)
	}
	s.enter(c, t)
	return codeOK, ""
}

// Cut ends the connections of a node that were accepted before a time, but those of kind
// Health, at once and without waiting, and tells how many there were. What they have
// queued is thrown away.
func (s *Server) Cut(node string, before time.Time, why error) int {
	var conns []*sconn
	s.mu.Lock()
	for c := range s.conns {
		if c.node == node && c.kind != Health && c.since.Before(before) {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.close(why)
	}
	return len(conns)
}

// Stats returns the server's figures.
func (s *Server) Stats() ServerStats {
	st := ServerStats{
		Accepted: s.accepted.Load(), Refused: s.refused.Load(), Requests: s.requests.Load(),
		BadRequests: s.bad.Load(), Violations: s.violations.Load(), Timeouts: s.timeouts.Load(),
	}
	s.mu.Lock()
	st.Conns = len(s.conns)
	s.mu.Unlock()
	s.mem.mu.Lock()
	st.MemoryInUse, st.MemoryWaiting = s.o.TotalMemory-s.mem.free, len(s.mem.queue)
	s.mem.mu.Unlock()
	return st
}

// Close stops accepting and reading, tells the clients, lets the requests that
// were read finish and their replies leave until ctx ends, and then closes the
// connections. Polls that wait are not waited for, nor those of
// connections that broke before; their targets must still answer them some
// time. The error is ctx's if requests were cut off. The targets are not closed.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for nc := range s.shaking {
		_ = nc.Close()
	}
	conns := make([]*sconn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	err := drain(ctx, conns)
	// Only a target whose Handle does not return can hold a reader now.
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		s.mu.Lock()
		idle := slices.AppendSeq(slices.Clone(s.stopped), maps.Values(s.targets))
		s.mu.Unlock()
		for _, t := range idle {
			t.pool.Close()
		}
		close(done)
	}()
	t := time.NewTimer(s.grace)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		err = errors.Join(err, errHangs)
	}
	if err != nil {
		return fmt.Errorf("close the target server: %w", err)
	}
	return nil
}

const closeGrace = 10 * time.Second

var errHangs = errors.New("a target does not return from a request")

// drain ends connections in order until ctx ends, and then the rest at once.
func drain(ctx context.Context, conns []*sconn) error {
	for _, c := range conns {
		c.drain()
	}
	for _, c := range conns {
		select {
		case <-c.gone:
		case <-ctx.Done():
			for _, c := range conns {
				c.close(ErrClosed)
			}
			return ctx.Err()
		}
	}
	return nil
}
