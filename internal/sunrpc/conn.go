package sunrpc

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// inPlaceMax is the largest record for whose missing part the reader waits inside its chunk. A
	// longer one gets a buffer of its own, into which the kernel writes the rest.
	inPlaceMax = 8 << 10
	chunkTiny  = 4 << 10 // while memory is short
	chunkMin   = 16 << 10
	chunkMax   = 128 << 10
	// flushBytes is the length of the reply queue at which a batch is flushed early, in bytes.
	flushBytes = 64 << 10
)

var (
	errRecordSize   = errors.New("record over the size limit")
	errFragments    = errors.New("record of too many fragments")
	errNotRPC       = errors.New("record is not an RPC call")
	errConnClosed   = errors.New("connection closed")
	errWriteStalled = errors.New("peer does not read")
	errRecordStall  = errors.New("record incomplete for too long")
	errIdle         = errors.New("idle")
	errPressure     = errors.New("closed to free memory")
)

// Conn is one TCP connection. A Conn is never reused: a Call's reply goes to the connection it came from
// or nowhere.
type Conn struct {
	srv    *Server
	ep     *endpoint
	nc     *net.TCPConn
	rc     syscall.RawConn
	id     uint64
	peer   *peer
	remote netip.AddrPort
	local  netip.AddrPort
	value  atomic.Pointer[any]

	alive  atomic.Bool
	closed atomic.Bool   // nothing is read, no reply is sent any more
	cut    atomic.Bool   // closed, but the socket is still open
	wake   chan struct{} // to the reader, capacity 1
	parked atomic.Bool   // the reader waits on wake

	inflight   atomic.Int64 // calls handed to a handler and not finished
	inBytes    atomic.Int64 // record bytes of those
	outBytes   atomic.Int64 // reply bytes queued and not yet taken by the kernel
	bulk       atomic.Int64 // reply bytes of GoReply's calls that are neither held nor queued yet
	replies    atomic.Int64
	lastRead   atomic.Int64 // coarse clock, ns
	lastWrite  atomic.Int64 // coarse clock of the last progress, ns
	partial    atomic.Bool  // a record has begun and is incomplete
	partialAt  atomic.Int64
	draining   atomic.Bool
	drainStart atomic.Int64 // replies when the drain began
	quiet      atomic.Bool  // drained: every reply has reached the peer's kernel
	ending     atomic.Int32
	orderly    atomic.Bool

	// Owned by the reader goroutine.
	chunk     *buf
	r, w      int // unparsed bytes in chunk
	want      int // bytes of chunk from r on that the next step needs
	chunkSize int
	limited   bool // the last read was kept short on purpose
	large     bool // the last record was a large one: expect another, do not read far ahead
	asm       *buf // record under assembly
	asmLen    int
	inFrag    bool
	fragLeft  int
	fragLast  bool
	frags     int
	rn        int
	rerr      error
	readFn    func(uintptr) bool
	graceEnd  time.Time

	roomWant int64       // what the connection stands in the server's roomGate for
	roomKey  lineKey     // and where
	roomGot  atomic.Bool // and whether it was promised

	mu sync.Mutex
	outQueue
}

// ID returns a number unique to this connection within its Server.
func (c *Conn) ID() uint64 { return c.id }

// Remote returns the peer's address.
func (c *Conn) Remote() netip.AddrPort { return c.remote }

// Local returns the service address the connection was made to.
func (c *Conn) Local() netip.AddrPort { return c.local }

// Alive reports whether the peer can still send and be sent to, as far as is known: false after its
// FIN, after an error, and after the server closed the connection. The kernel is asked (a system call),
// because a FIN or RST may have come that the reader has not got to yet.
func (c *Conn) Alive() bool {
	if !c.alive.Load() {
		return false
	}
	established := false
	err := c.rc.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		established = err == nil && info.State == unix.BPF_TCP_ESTABLISHED
	})
	return err == nil && established
}

// SetValue stores v for Value: a slot for the handler's per-connection cache.
func (c *Conn) SetValue(v any) { c.value.Store(&v) }

// Value returns what SetValue stored last, or nil.
func (c *Conn) Value() any {
	if p := c.value.Load(); p != nil {
		return *p
	}
	return nil
}

func newConn(s *Server, ep *endpoint, nc *net.TCPConn) (*Conn, error) {
	rc, err := nc.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Conn{
		srv: s, ep: ep, nc: nc, rc: rc, id: s.connID.Add(1),
		remote: tcpAddrPort(nc.RemoteAddr()), local: tcpAddrPort(nc.LocalAddr()),
		wake: make(chan struct{}, 1), want: markSize, chunkSize: chunkMin,
	}
	c.kick = make(chan struct{}, 1)
	c.readFn = c.readOnce
	c.writeFn = c.writeOnce
	c.alive.Store(true)
	now := s.clock.Load()
	c.lastRead.Store(now)
	c.lastWrite.Store(now)
	return c, nil
}

// serve is the reader goroutine.
func (c *Conn) serve() {
	defer c.srv.connDone(c)
	err := c.readLoop()
	c.alive.Store(false)
	switch {
	case errors.Is(err, errDrained):
		c.finishDrain()
	case errors.Is(err, io.EOF):
		// The peer may have shut down only its sending side: what it asked for is still answered.
		c.orderly.Store(c.await(awaitQuiet, 0) == nil)
	case c.closed.Load(), errors.Is(err, unix.ECONNRESET), errors.Is(err, net.ErrClosed):
	default:
		c.ep.garbage.Add(1)
		c.srv.warn("connection closed", c.remote, c.local, err)
	}
	c.dropInput()
	if c.cut.Load() && c.awaitEnding() == endSilent {
		c.endSilently()
	}
	c.fail(nil, false)
	c.closeCut(true)
}

var errDrained = errors.New("drained")

func (c *Conn) readLoop() error {
	for {
		if c.closed.Load() {
			return errConnClosed
		}
		if c.draining.Load() {
			// Whole records are behind us. One that has begun is given a moment to arrive.
			if !c.midRecord() {
				return errDrained
			}
			now := time.Now()
			if c.graceEnd.IsZero() {
				c.graceEnd = now.Add(c.srv.cfg.DrainRecordWait)
			}
			if !now.Before(c.graceEnd) {
				return errDrained
			}
			if err := c.nc.SetReadDeadline(c.graceEnd); err != nil {
				return err
			}
		}
		err := c.rc.Read(c.readFn)
		if err == nil {
			err = c.rerr
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue // only a drain sets deadlines
			}
			return err
		}
		c.ep.bytesIn.Add(uint64(c.rn))
		c.lastRead.Store(c.srv.clock.Load())
		c.beginBatch()
		err = c.parse()
		c.endBatch()
		if err != nil {
			return err
		}
		if mid := c.midRecord(); mid != c.partial.Load() {
			c.partialAt.Store(c.srv.clock.Load())
			c.partial.Store(mid)
		}
	}
}

func (c *Conn) midRecord() bool { return c.asm != nil || c.w > c.r }

// readOnce is the RawConn callback: one nonblocking read to where the next bytes belong.
func (c *Conn) readOnce(fd uintptr) bool {
	direct := c.inFrag && c.r == c.w
	var dst []byte
	if direct {
		dst = c.asm.b[c.asmLen : c.asmLen+c.fragLeft]
	} else {
		dst = c.space()
	}
	n, err := unix.Read(int(fd), dst)
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), dst)
	}
	if err == unix.EAGAIN {
		// An idle connection holds no buffer.
		if c.r == c.w && c.chunk != nil {
			c.chunk.release()
			c.chunk = nil
		}
		return false
	}
	c.rn, c.rerr = n, nil
	switch {
	case err != nil:
		c.rn, c.rerr = 0, err
	case n == 0:
		c.rerr = io.EOF
	case direct:
		c.asmLen += n
		c.fragLeft -= n
	default:
		c.w += n
		if !c.limited && n == len(dst) && n >= c.chunkSize/2 && c.srv.mem.used.Load() < int64(c.srv.cfg.MaxInflightBytes/4) {
			c.chunkSize = min(2*c.chunkSize, chunkMax)
		} else if n < c.chunkSize/16 && c.chunkSize > chunkMin {
			c.chunkSize /= 2
		}
	}
	return true
}

// space returns the room to read into, with a fresh chunk if the current one is used up.
func (c *Conn) space() []byte {
	have := c.w - c.r
	if c.chunk != nil {
		alone := c.chunk.refs.Load() == 1
		if alone && have == 0 {
			c.r, c.w = 0, 0
		}
		if room := len(c.chunk.b) - c.w; room < c.want-have || room < 2<<10 {
			if alone && c.r > 0 && len(c.chunk.b) >= c.want {
				copy(c.chunk.b, c.chunk.b[c.r:c.w])
				c.r, c.w = 0, have
			} else {
				old := c.chunk
				c.chunk = c.newChunk()
				copy(c.chunk.b, old.b[c.r:c.w])
				c.r, c.w = 0, have
				old.release()
			}
		}
	} else {
		c.chunk = c.newChunk()
		c.r, c.w = 0, 0
	}
	dst := c.chunk.b[c.w:]
	c.limited = false
	switch {
	case c.draining.Load():
		dst, c.limited = dst[:c.want-have], true
	case c.large && len(dst) > inPlaceMax:
		dst, c.limited = dst[:inPlaceMax], true
	}
	return dst
}

// newChunk keeps the chunks of readers that wait, which nothing else limits, from taking the memory.
func (c *Conn) newChunk() *buf {
	n, mem := c.chunkSize, c.srv.mem.used.Load()
	switch limit := int64(c.srv.cfg.MaxInflightBytes); {
	case mem > limit/2:
		n = chunkTiny
	case mem > limit/4:
		n = chunkMin
	}
	return getBuf(&c.srv.mem, max(n, c.want))
}

// parse cuts records (RFC 5531 §11) out of what was read and delivers them.
func (c *Conn) parse() error {
	for {
		avail := c.w - c.r
		if c.inFrag {
			if n := min(avail, c.fragLeft); n > 0 {
				copy(c.asm.b[c.asmLen:], c.chunk.b[c.r:c.r+n])
				c.r += n
				c.asmLen += n
				c.fragLeft -= n
			}
			if c.fragLeft > 0 {
				c.want = markSize
				return nil
			}
			c.inFrag = false
			if c.fragLast {
				own, n := c.fitRecord(c.asm, c.asmLen), c.asmLen
				c.asm, c.asmLen, c.frags = nil, 0, 0
				c.large = n > inPlaceMax
				if err := c.deliver(own.b[:n], own); err != nil {
					return err
				}
			}
			continue
		}
		if avail < markSize {
			c.want = markSize
			return nil
		}
		mark := binary.BigEndian.Uint32(c.chunk.b[c.r:])
		last, n := mark>>31 != 0, int(mark&(1<<31-1))
		if n > c.srv.cfg.MaxRecord-c.asmLen {
			return errRecordSize
		}
		if c.asm == nil && last {
			if avail-markSize >= n {
				rec := c.chunk.b[c.r+markSize : c.r+markSize+n : c.r+markSize+n]
				c.r += markSize + n
				c.large = n > inPlaceMax
				c.chunk.retain()
				if err := c.deliver(rec, c.chunk); err != nil {
					return err
				}
				continue
			}
			if n <= inPlaceMax {
				c.want = markSize + n
				return nil
			}
		}
		if c.frags++; c.frags > c.srv.cfg.MaxFragments {
			return errFragments
		}
		if c.asm == nil {
			size := max(n, 1)
			if !last {
				// Room for whatever follows: who holds the memory of a part must not wait for more.
				size = c.srv.cfg.MaxRecord
			}
			b, err := c.recordBuf(size)
			if err != nil {
				return err
			}
			c.asm = b
		}
		c.r += markSize
		c.inFrag, c.fragLeft, c.fragLast = true, n, last
	}
}

// deliver hands a record to the dispatcher. It takes over one reference to own.
func (c *Conn) deliver(rec []byte, own *buf) error {
	if err := c.await(awaitAdmission, 0); err != nil {
		own.release()
		return err
	}
	call := newCall(c.srv, c.ep, own, len(rec))
	call.Conn, call.Remote, call.Local = c, c.remote, c.local
	c.inflight.Add(1)
	c.inBytes.Add(int64(len(rec)))
	if !c.srv.dispatch(call, rec) {
		call.discard()
		return errNotRPC
	}
	if c.outBytes.Load() >= flushBytes {
		c.flushNow()
	}
	return nil
}

// What the reader waits for.
const (
	awaitAdmission = iota // room for one more call
	awaitShare            // room for a record of n bytes among the connection's own
	awaitRoom             // that the roomGate has promised the memory
	awaitQuiet            // every call finished, every reply with the kernel
)

func (c *Conn) ready(what int, n int64) bool {
	cfg := &c.srv.cfg
	calls, in, out := c.inflight.Load(), c.inBytes.Load(), c.outBytes.Load()
	mem := c.srv.mem.used.Load()
	switch what {
	case awaitAdmission:
		// What the gates gave to others must not stop a connection with nothing in progress.
		return calls+out == 0 && mem < c.srv.part(admitAny) ||
			calls < int64(cfg.MaxInflightCallsPerConn) && in < int64(cfg.MaxInflightBytesPerConn) &&
				out < c.outLimit() && mem < c.srv.part(admitMore)
	case awaitShare:
		return calls == 0 || in+n <= int64(cfg.MaxInflightBytesPerConn)
	case awaitRoom:
		return c.roomGot.Load()
	default:
		return calls == 0 && out == 0
	}
}

// await blocks the reader until ready. Queued replies are flushed first: waiting for them to leave
// would otherwise never end.
func (c *Conn) await(what int, n int64) error {
	if c.ready(what, n) {
		return nil
	}
	c.endBatch()
	if what == awaitAdmission {
		c.srv.addWaiter(c)
	}
	c.parked.Store(true)
	for !c.ready(what, n) && !c.closed.Load() {
		<-c.wake
	}
	// The peer was not read from and may have time now.
	now := c.srv.clock.Load()
	c.lastRead.Store(now)
	c.partialAt.Store(now)
	c.parked.Store(false)
	if what == awaitAdmission {
		c.srv.removeWaiter(c)
	}
	if c.closed.Load() {
		return errConnClosed
	}
	if what != awaitQuiet {
		c.beginBatch()
	}
	return nil
}

// nudge lets a parked reader look again.
func (c *Conn) nudge() {
	if c.parked.Load() {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

// outLimit is the queue length in bytes above which the connection is served no further; under memory
// pressure one full reply is all a connection may have waiting.
func (c *Conn) outLimit() int64 {
	l := int64(c.srv.cfg.MaxOutBytesPerConn)
	if c.srv.mem.used.Load() > int64(c.srv.cfg.MaxInflightBytes/2) {
		l = min(l, MaxPayload/2)
	}
	return l
}

// unanswered takes a call off the books that gets no reply.
func (c *Conn) unanswered(call *Call) {
	c.inBytes.Add(int64(-call.size))
	c.inflight.Add(-1)
	c.mu.Lock()
	if c.outBytes.Load() <= c.outLimit()/2 {
		c.resubmit()
	}
	c.mu.Unlock()
	c.nudge()
}

func (c *Conn) dropInput() {
	if c.chunk != nil {
		c.chunk.release()
		c.chunk = nil
	}
	if c.asm != nil {
		c.asm.release()
		c.asm = nil
	}
}

// fail closes the connection: at once and with RST if reset is set, so that no socket stays behind that
// still wants to send; else the kernel goes on delivering what it has taken. Calls in progress go on
// and their replies are discarded. err, if not nil, is logged.
func (c *Conn) fail(err error, reset bool) {
	held, first := c.shut(false)
	if !first {
		return
	}
	if err != nil {
		c.srv.warn("connection closed", c.remote, c.local, err)
	}
	c.closeSocket(reset)
	c.release(held)
}

// kill is fail with a reset, also for a connection that was cut off.
func (c *Conn) kill() {
	c.fail(nil, true)
	c.closeCut(true)
}

// cutOff has the connection end but for its socket: nothing is read, replies are discarded, and no segment is sent
// but what the kernel has taken. The reader then waits for awaitEnding.
func (c *Conn) cutOff() {
	held, first := c.shut(true)
	if !first {
		return
	}
	_ = c.nc.SetDeadline(time.Unix(1, 0)) // wakes reader and writer
	c.release(held)
}

// closeCut closes the socket of a connection that was cut off.
func (c *Conn) closeCut(reset bool) {
	if c.cut.Swap(false) {
		c.closeSocket(reset)
		c.release(nil)
	}
}

// shut marks the connection closed and returns the calls that were held; not first: it was already.
func (c *Conn) shut(cut bool) (held []*Call, first bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() {
		return nil, false
	}
	c.cut.Store(cut) // who sees closed sees this
	c.closed.Store(true)
	c.alive.Store(false)
	held = c.held
	c.held = nil
	if !c.writing {
		c.dropOutput()
	}
	return held, true
}

func (c *Conn) closeSocket(reset bool) {
	if reset {
		_ = c.nc.SetLinger(0) // best effort: the socket may be gone already
	}
	_ = c.nc.Close() // nothing to do about a failed close
}

// release wakes whoever waits on a connection that was shut, and lets its held calls go.
func (c *Conn) release(held []*Call) {
	select {
	case c.kick <- struct{}{}:
	default:
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
	for _, call := range held {
		c.unhold(call)
	}
}

func tcpAddrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
