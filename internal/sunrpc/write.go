package sunrpc

import (
	"errors"
	"runtime"
	"slices"
	"unsafe"

	"github.com/baton-nfs/baton/internal/xdr"
	"golang.org/x/sys/unix"
)

const (
	tailSize = 32 << 10
	maxIov   = 64
	// maxWritev bounds one system call, in bytes, so that progress is seen.
	maxWritev = 4 << 20
)

// seg is a piece of output; own is released when it has been written.
type seg struct {
	b   []byte
	own *buf
}

// outQueue is a connection's output. q collects replies under Conn.mu. Whoever sets writing owns wq, wi,
// iov, wn, werr and wblock until it clears writing or hands over to the writer goroutine.
type outQueue struct {
	q        []seg
	tail     *buf // small replies are copied here, one after the other
	tailUsed int
	tailOpen bool // the last element of q ends at tailUsed
	held     []*Call
	batching bool // the reader is at work and will flush
	writing  bool
	handoff  bool // writing, and the writer goroutine is to go on
	kicked   bool
	started  bool // the writer goroutine exists
	kick     chan struct{}

	wq      []seg
	wi      int
	iov     []unix.Iovec
	wn      int
	werr    error
	wblock  bool
	writeFn func(uintptr) bool
}

// enqueue queues call's reply and sees to it that it is flushed: by the reader at the end of its batch,
// by whoever is writing already, right here if this was the only call in progress, or by the writer
// goroutine, which then finds the replies of other calls too.
func (c *Conn) enqueue(call *Call) {
	out, payload := call.Out.Buf, call.payload
	c.mu.Lock()
	if c.closed.Load() {
		c.mu.Unlock()
		c.unanswered(call)
		return
	}
	if len(out) <= outKeep {
		c.pushCopy(out)
	} else {
		var own *buf
		if call.outBuf != nil && &call.outBuf.b[0] == &out[0] {
			own, call.outBuf = call.outBuf, nil
		}
		c.push(seg{out, own})
		call.Out.Buf = call.base
	}
	if len(payload) > payloadCopy {
		c.push(seg{b: payload})
		for i, b := range call.bulks {
			// The last reference travels behind the payload.
			c.push(seg{own: b})
			call.bulks[i] = nil
		}
		call.bulks = call.bulks[:0]
	} else if len(payload) > 0 {
		c.pushCopy(payload)
	}
	if p := xdr.Pad(len(payload)); p > 0 {
		c.pushCopy(padding[:p])
	}
	n := len(out) + len(payload) + xdr.Pad(len(payload))
	if c.outBytes.Add(int64(n)) == int64(n) {
		c.lastWrite.Store(c.srv.clock.Load())
	}
	c.replies.Add(1)
	c.inBytes.Add(int64(-call.size))
	left := c.inflight.Add(-1)
	switch {
	case c.batching || c.writing || c.kicked:
	case left == 0:
		c.flush(false)
	default:
		c.kickWriter()
	}
	c.mu.Unlock()
	c.nudge()
}

var padding [4]byte

// push and pushCopy append to q. The caller holds c.mu.
func (c *Conn) push(s seg) {
	c.q = append(c.q, s)
	c.tailOpen = false
}

func (c *Conn) pushCopy(p []byte) {
	if c.tail == nil || len(c.tail.b)-c.tailUsed < len(p) {
		if c.tail != nil {
			c.tail.release()
		}
		c.tail = getBuf(&c.srv.mem, tailSize)
		c.tailUsed, c.tailOpen = 0, false
	}
	at := c.tailUsed
	c.tailUsed += copy(c.tail.b[at:], p)
	if c.tailOpen {
		s := &c.q[len(c.q)-1]
		s.b = s.b[:len(s.b)+len(p)]
		return
	}
	c.tail.retain()
	c.q = append(c.q, seg{c.tail.b[at:c.tailUsed], c.tail})
	c.tailOpen = true
}

func (c *Conn) beginBatch() {
	c.mu.Lock()
	c.batching = true
	c.mu.Unlock()
}

func (c *Conn) endBatch() {
	c.mu.Lock()
	c.batching = false
	if !c.writing && len(c.q) > 0 {
		c.flush(false)
	}
	c.mu.Unlock()
}

func (c *Conn) flushNow() {
	c.mu.Lock()
	if !c.writing && len(c.q) > 0 {
		c.flush(false)
	}
	c.mu.Unlock()
}

// kickWriter wakes the writer goroutine, starting it the first time. The caller holds c.mu.
func (c *Conn) kickWriter() {
	if !c.started {
		c.started = true
		c.srv.wg.Add(1)
		go c.writer()
	}
	c.kicked = true
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// writer is the goroutine that takes over when a nonblocking write did not take everything and
// collects the replies of calls finished elsewhere.
func (c *Conn) writer() {
	defer c.srv.wg.Done()
	for range c.kick {
		// Who was woken last runs first: without stepping back the writer would send every reply alone
		// while the goroutines that make the next ones are ready to run.
		if c.inflight.Load() > 0 {
			runtime.Gosched()
		}
		c.mu.Lock()
		c.kicked = false
		if c.handoff || !c.writing && !c.batching && len(c.q) > 0 {
			c.handoff = false
			c.flush(true)
		}
		closed := c.closed.Load()
		c.mu.Unlock()
		if closed {
			return
		}
	}
}

// flush writes until the queue is empty. The caller holds c.mu, which is released during writes, and
// either nobody is writing or the caller has taken the handoff. Without block, a full socket buffer
// hands over to the writer goroutine.
func (c *Conn) flush(block bool) {
	c.writing = true
	for !c.closed.Load() {
		if c.wi == len(c.wq) {
			if len(c.q) == 0 {
				break
			}
			c.wq, c.q = c.q, c.wq[:0]
			c.wi = 0
			c.tailOpen = false
		}
		c.mu.Unlock()
		c.wblock = block
		err := c.rc.Write(c.writeFn)
		if err == nil {
			err = c.werr
		}
		if err == nil {
			c.advance(c.wn)
		}
		if err != nil && err != unix.EAGAIN {
			if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
				err = nil // the peer went away: nothing to report
			}
			c.fail(err, true)
		}
		c.mu.Lock()
		if err == unix.EAGAIN && !c.closed.Load() {
			c.handoff = true
			c.kickWriter()
			return
		}
		if c.outBytes.Load() <= c.outLimit()/2 {
			c.resubmit()
		}
	}
	c.writing = false
	if c.closed.Load() {
		c.dropOutput()
	} else if c.tail != nil {
		c.tail.release()
		c.tail = nil
		c.tailOpen = false
	}
}

// writeOnce is the RawConn callback: one writev of what fits.
func (c *Conn) writeOnce(fd uintptr) bool {
	iov, total := c.iov[:0], 0
	for _, s := range c.wq[c.wi:] {
		if len(s.b) == 0 {
			continue
		}
		v := unix.Iovec{Base: unsafe.SliceData(s.b)}
		v.SetLen(len(s.b))
		iov = append(iov, v)
		if total += len(s.b); len(iov) == maxIov || total >= maxWritev {
			break
		}
	}
	c.iov = iov
	c.wn, c.werr = 0, nil
	if len(iov) == 0 {
		return true
	}
	var n uintptr
	var e unix.Errno
	for {
		n, _, e = unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if e != unix.EINTR {
			break
		}
	}
	clear(iov)
	switch {
	case e == 0:
		c.wn = int(n)
	case e == unix.EAGAIN && c.wblock:
		return false
	default:
		c.werr = e
	}
	return true
}

// advance takes n written bytes off wq, and empty elements.
func (c *Conn) advance(n int) {
	c.ep.bytesOut.Add(uint64(n))
	c.lastWrite.Store(c.srv.clock.Load())
	left := n
	for c.wi < len(c.wq) {
		s := &c.wq[c.wi]
		if len(s.b) > left {
			s.b = s.b[left:]
			break
		}
		left -= len(s.b)
		if s.own != nil {
			s.own.release()
		}
		*s = seg{}
		c.wi++
	}
	c.outBytes.Add(int64(-n))
	c.nudge()
}

// dropOutput releases everything queued. The caller holds c.mu and nobody is writing.
func (c *Conn) dropOutput() {
	for _, s := range c.wq[c.wi:] {
		if s.own != nil {
			s.own.release()
		}
	}
	for _, s := range c.q {
		if s.own != nil {
			s.own.release()
		}
	}
	c.wq, c.q, c.wi = nil, nil, 0
	if c.tail != nil {
		c.tail.release()
		c.tail = nil
	}
	c.tailOpen = false
	c.handoff = false
	c.outBytes.Store(0)
}

// hold keeps a call whose worker would only add to a queue that the peer does not read; it is
// resubmitted when half of the queue has left, or the connection is closed.
func (c *Conn) hold(call *Call) bool {
	if c.waiting(call) < c.outLimit() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() || c.waiting(call) < c.outLimit() {
		return false
	}
	c.bulk.Add(-int64(call.weight))
	c.held = append(c.held, call)
	return true
}

// waiting is the length of the replies that wait before call's. When memory is short those in the making
// count, too, so that one connection does not stand in the gate's line many times.
func (c *Conn) waiting(call *Call) int64 {
	n := c.outBytes.Load()
	if c.srv.mem.used.Load() > int64(c.srv.cfg.MaxInflightBytes/2) {
		n += c.bulk.Load() - int64(call.weight)
	}
	return n
}

// resubmit gives held calls another try, as many as there is room for in the queue. Whenever one has ended
// there is another occasion. The caller holds c.mu.
func (c *Conn) resubmit() {
	if len(c.held) == 0 {
		return
	}
	n, limit := 0, c.outLimit()
	for bytes := c.outBytes.Load() + c.bulk.Load(); n < len(c.held) && bytes < limit; n++ {
		bytes += int64(c.held[n].weight)
		c.unhold(c.held[n])
	}
	c.held = slices.Delete(c.held, 0, n)
}

func (c *Conn) unhold(call *Call) {
	c.bulk.Add(int64(call.weight))
	c.srv.pool.Submit(call)
}
