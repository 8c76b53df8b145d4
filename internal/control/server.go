package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a Server.
const (
	maxConns    = 256              // a cluster manager asks for each of its addresses at the same time
	idleTimeout = 30 * time.Second // for the next request, and for a reader of a reply
)

// HandlerFunc executes a command. args is nil or valid JSON; the result is
// encoded as JSON. ctx ends when the server closes (and see HandleWait).
type HandlerFunc func(ctx context.Context, args json.RawMessage) (any, error)

type handler struct {
	f HandlerFunc
	// waits: its context ends when the client has gone, too, and Retire does not end it.
	waits bool
}

// Server answers commands on a unix socket.
type Server struct {
	log      *slog.Logger
	handlers map[string]handler

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// work is ctx for handlers that Retire ends; busy are those.
	work   context.Context
	retire context.CancelFunc
	busy   sync.WaitGroup

	mu      sync.Mutex
	l       *net.UnixListener
	conns   map[net.Conn]struct{}
	closed  bool
	retired string // what Retire was given
}

// NewServer returns a server that knows only CmdPing.
func NewServer(log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{log: log, handlers: map[string]handler{}, conns: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.work, s.retire = context.WithCancel(s.ctx)
	s.Handle(CmdPing, func(context.Context, json.RawMessage) (any, error) { return nil, nil })
	return s
}

// Handle sets the function of a command. It must not be called after Start.
func (s *Server) Handle(name string, f HandlerFunc) { s.handlers[name] = handler{f: f} }

// HandleWait is Handle for a command that may wait long for what goes on without it:
// its context ends when the client has gone, too, so that those who gave up do not use
// up the connections. It is answered until Close, also after Retire.
func (s *Server) HandleWait(name string, f HandlerFunc) { s.handlers[name] = handler{f, true} }

// Start listens on path and serves in the background until Close. A socket
// that a dead process left is replaced; a live one gives ErrInUse.
func (s *Server) Start(path string) error {
	l, err := listen(path)
	if err != nil {
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		l.Close()
		return fmt.Errorf("control socket %s: %w", path, net.ErrClosed)
	}
	s.l = l
	s.wg.Go(func() { s.accept(l) })
	return nil
}

func listen(path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		fi, serr := os.Lstat(path)
		if serr != nil {
			return nil, serr
		}
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, errors.New("the path exists and is not a socket; remove it")
		}
		c, derr := net.DialUnix("unix", nil, addr)
		if derr == nil {
			c.Close()
			return nil, ErrInUse
		}
		if !errors.Is(derr, syscall.ECONNREFUSED) {
			return nil, derr
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unix", addr)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Retire ends handlers' contexts and waits for them, and refuses commands from then on
// with CodeEnding and a reason; those of HandleWait go on.
func (s *Server) Retire(reason string) {
	s.mu.Lock()
	s.retired = reason
	s.mu.Unlock()
	s.retire()
	s.busy.Wait()
}

// Close stops listening, removes the socket, ends handlers' contexts and waits
// for them. It may be called more than once.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	if s.l != nil {
		s.l.Close()
	}
	s.cancel()
	// Reading ends at once; a reply in progress may still be written.
	for c := range s.conns {
		c.SetReadDeadline(time.Unix(1, 0))
		c.SetWriteDeadline(time.Now().Add(time.Second))
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) accept(l *net.UnixListener) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("control socket: accept failed", "err", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		s.mu.Lock()
		ok := !s.closed && len(s.conns) < maxConns
		if ok {
			s.conns[c] = struct{}{}
			s.wg.Add(1)
		}
		s.mu.Unlock()
		if !ok {
			c.Close()
			continue
		}
		go s.serve(c)
	}
}

// allowed checks the peer's uid: root or our own.
func allowed(c *net.UnixConn) (uid uint32, ok bool) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, false
	}
	var cred *unix.Ucred
	if cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return 0, false
	}
	return cred.Uid, cred.Uid == 0 || int(cred.Uid) == os.Geteuid()
}

func (s *Server) serve(c *net.UnixConn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.Close()
		s.wg.Done()
	}()
	if uid, ok := allowed(c); !ok {
		s.log.Warn("control socket: refused", "uid", uid)
		return
	}
	sc := bufio.NewScanner(c)
	sc.Buffer(make([]byte, 0, 4096), maxRequest)
	for {
		if !s.deadlines(c) || !sc.Scan() {
			if errors.Is(sc.Err(), bufio.ErrTooLong) {
				s.write(c, &response{V: Version, Code: CodeBad, Error: fmt.Sprintf("request longer than %d bytes", maxRequest)})
			}
			return
		}
		if line := bytes.TrimSpace(sc.Bytes()); len(line) > 0 {
			if !s.write(c, s.execute(c, line)) {
				return
			}
		}
	}
}

// deadlines allows the next request its time, unless the server is closing.
func (s *Server) deadlines(c *net.UnixConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	c.SetReadDeadline(time.Now().Add(idleTimeout))
	return true
}

// watch gives a context that ends when the peer has closed the connection; one that
// only has no more requests still reads. Nothing is read meanwhile, so requests may be
// there already. stop waits for the watcher.
func (s *Server) watch(c *net.UnixConn) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(s.ctx)
	rc, err := c.SyscallConn()
	if err != nil {
		return ctx, cancel
	}
	s.mu.Lock()
	if !s.closed {
		c.SetReadDeadline(time.Time{})
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		gone := false
		rc.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd)}}
			n, err := unix.Poll(p, 0)
			gone = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
			return gone // else again at the next event
		})
		if gone {
			cancel()
		}
	}()
	return ctx, func() {
		c.SetReadDeadline(time.Unix(1, 0))
		<-done
		cancel()
	}
}

// begin enters a handler that Retire waits for, unless that was called.
func (s *Server) begin() (retired string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired == "" {
		s.busy.Add(1)
	}
	return s.retired
}

func (s *Server) execute(c *net.UnixConn, line []byte) *response {
	fail := func(code, format string, a ...any) *response {
		return &response{V: Version, Code: code, Error: fmt.Sprintf(format, a...)}
	}
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		return fail(CodeBad, "request not understood: %v", err)
	}
	if req.V != Version {
		return fail(CodeVersion, "this baton speaks version %d of the control protocol, not %d: use the commands of the baton that is running", Version, req.V)
	}
	h, ok := s.handlers[req.Cmd]
	if !ok {
		return fail(CodeUnknown, "unknown command %q", req.Cmd)
	}
	ctx, stop := s.work, s.busy.Done
	if h.waits {
		ctx, stop = s.watch(c)
	} else if reason := s.begin(); reason != "" {
		return fail(CodeEnding, "%s", reason)
	}
	res, err := h.f(ctx, req.Args)
	stop()
	if err != nil {
		return fail(CodeFailed, "%v", err)
	}
	j, err := json.Marshal(res)
	if err != nil {
		return fail(CodeFailed, "%s: %v", req.Cmd, err)
	}
	if len(j) > maxResponse-1024 {
		return fail(CodeFailed, "%s: the answer has %d bytes, more than %d", req.Cmd, len(j), maxResponse)
	}
	return &response{V: Version, Result: j}
}

func (s *Server) write(c *net.UnixConn, r *response) bool {
	j, err := json.Marshal(r)
	if err != nil {
		return false
	}
	s.mu.Lock()
	if !s.closed {
		c.SetWriteDeadline(time.Now().Add(idleTimeout))
	}
	s.mu.Unlock()
	_, err = c.Write(append(j, '\n'))
	return err == nil
}
