package mgs

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TargetName is the registry's name as a target.
const TargetName = "MGS"

// Service is the registry as a target of other nodes. It answers OpRegistry, OpWatchVIPs,
// OpPing and what a table of targets does; OpConnect and OpDisconnect are accepted and mean
// nothing, since no state of the registry belongs to a connection.
type Service struct {
	reg *Stored
	hub *ir.Hub // nil: there is no table of targets
	log *slog.Logger
	ctx context.Context
	end context.CancelFunc
	// work is held shared by requests under way.
	work sync.RWMutex
}

// NewService returns the target of a registry. log may be nil.
func NewService(reg *Stored, log *slog.Logger) *Service {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Service{reg: reg, log: log}
	s.ctx, s.end = context.WithCancel(context.Background())
	return s
}

var _ wire.Acceptor = (*Service)(nil)

// UseTable has the service answer for the table of targets as well. It is called
// before the first request; the service closes the hub.
func (s *Service) UseTable(h *ir.Hub) { s.hub = h }

// Table is the table of targets, or nil.
func (s *Service) Table() *ir.Hub { return s.hub }

// Close makes the service refuse all requests, so that callers look for the
// registry elsewhere, and waits for those under way.
func (s *Service) Close() {
	s.end()
	if s.hub != nil {
		s.hub.Close()
	}
	s.work.Lock()
	defer s.work.Unlock()
}

// Accept implements wire.Acceptor: what comes from an authenticated node may only
// name that node as its caller.
func (s *Service) Accept(p wire.Peer) wire.Target {
	c := &connection{s: s, node: p.Node}
	if s.hub != nil {
		c.table = s.hub.Accept(p.Node)
	}
	return c
}

// TryHandle implements wire.Target.
func (s *Service) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Handle implements wire.Target, for callers in this process.
func (s *Service) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	if req.Op == wire.OpWatchVIPs {
		s.watch("", req, rep, done, s.context)
		return
	}
	s.handle("", req, rep, done)
}

func (s *Service) context(bool) context.Context { return s.ctx }

// connection is the service for what comes from one node.
type connection struct {
	s     *Service
	node  string
	table *ir.Conn // nil: there is no table of targets

	mu     sync.Mutex         // never held while waiting
	end    context.CancelFunc // of the last OpWatchVIPs that waits, nil: there was none
	closed bool
}

// Close implements io.Closer.
func (c *connection) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.end != nil {
		c.end()
	}
	c.mu.Unlock()
	if c.table != nil {
		c.table.Close()
	}
	return nil
}

func (c *connection) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (c *connection) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	if req.Op == wire.OpWatchVIPs {
		c.s.watch(c.node, req, rep, done, c.poll)
		return
	}
	if c.table == nil || !ir.Serves(req.Op) {
		c.s.handle(c.node, req, rep, done)
		return
	}
	rep.Reset()
	rep.XID = req.XID
	c.table.Handle(req, rep, done)
}

// poll begins an OpWatchVIPs, which ends the one before if it waits.
func (c *connection) poll(waits bool) context.Context {
	if !waits {
		return c.s.ctx
	}
	ctx, end := context.WithCancel(c.s.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		c.end()
	}
	if c.end = end; c.closed {
		end()
	}
	return ctx
}

// watch answers an OpWatchVIPs from a goroutine of its own, which Close waits for: when
// there is news, after some time without, or when the context that begin gives ends.
func (s *Service) watch(from string, req *wire.Request, rep *wire.Reply, done func(), begin func(waits bool) context.Context) {
	rep.Reset()
	rep.XID = req.XID
	a, err := decodePoll(req.Data)
	if err == nil && from != "" && a.Node != from {
		err = invalid("node %s calls as node %s", from, a.Node)
	}
	if err != nil {
		s.log.Debug("registry: bad request", "node", from, "err", err)
		rep.Status = wire.ErrProto
		done()
		return
	}
	ctx := begin(a.waits())
	s.work.RLock()
	if ctx.Err() != nil {
		s.work.RUnlock()
		rep.Status = wire.ErrTargetDown
		done()
		return
	}
	go func() {
		reply, err := s.reg.poll(ctx, a)
		if err == nil || ctx.Err() == nil {
			rep.Data, rep.Status = s.answer("watch", a.Node, reply, err, rep.Data)
		} else {
			rep.Status = wire.ErrTargetDown
		}
		s.work.RUnlock()
		done()
	}()
}

// handle executes a request before it returns, so it may wait for the disk.
// There are few requests, and the storage takes one change at a time anyway.
func (s *Service) handle(from string, req *wire.Request, rep *wire.Reply, done func()) {
	rep.Reset()
	rep.XID = req.XID
	s.execute(from, req, rep)
	done()
}

func (s *Service) execute(from string, req *wire.Request, rep *wire.Reply) {
	s.work.RLock()
	defer s.work.RUnlock()
	switch {
	case s.ctx.Err() != nil:
		rep.Status = wire.ErrTargetDown
	case req.Op == wire.OpRegistry:
		rep.Data, rep.Status = s.registry(from, req, rep.Data)
	case req.Op == wire.OpConnect:
		rep.Instance, rep.Known = 1, true
	case req.Op != wire.OpPing && req.Op != wire.OpDisconnect:
		rep.Status = wire.ErrNotSupp
	}
}

// registry appends the answer to a call to b.
func (s *Service) registry(from string, req *wire.Request, b []byte) ([]byte, wire.Status) {
	c, err := decodeCall(req)
	if err == nil && from != "" && c.Node != from {
		err = invalid("node %s calls as node %s", from, c.Node)
	}
	if err != nil {
		s.log.Debug("registry: bad request", "node", from, "err", err)
		return b, wire.ErrProto
	}
	reply, err := s.reg.execute(s.ctx, c)
	return s.answer(string(req.Name), c.Node, reply, err, b)
}

// answer appends a call's answer, or its error, to b.
func (s *Service) answer(method, node string, reply []byte, err error, b []byte) ([]byte, wire.Status) {
	var refused *Error
	switch {
	case err == nil:
	case errors.Is(err, ErrFenced) || s.ctx.Err() != nil:
		s.log.Debug("registry: not served here any more", "err", err)
		return b, wire.ErrTargetDown
	case errors.Is(err, ErrUnavailable): // the caller sends it again, so that it is executed once
		s.log.Debug("registry: no answer", "method", method, "node", node, "err", err)
		return b, wire.ErrTargetDown
	case !errors.As(err, &refused):
		s.log.Error("registry", "method", method, "node", node, "err", err)
		refused = &Error{Code: CodeStorage, Text: "the node of the registry: " + err.Error()}
	}
	if refused != nil {
		if reply, err = encodeReply(nil, refused); err != nil {
			return b, wire.ErrServerFault
		}
	}
	if len(reply) > wire.MaxData {
		return b, wire.ErrServerFault
	}
	return append(b, reply...), wire.OK
}
