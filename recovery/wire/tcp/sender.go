package tcp

import (
	"net"
	"runtime"
	"sync"
	"time"
)

// Frames leave in batches: header bytes of many frames side by side, small
// bulks copied in between, large ones sent from where they are.
const (
	copyBulk   = 8 << 10 // smaller bulks are copied
	batchBytes = 4 << 20
	batchHead  = 160 << 10 // so that the header buffer is usually kept
	batchItems = 256
	keepHead   = 256 << 10 // a larger header buffer is not kept
)

// outgoing is a frame to send.
type outgoing interface {
	// encode appends prefix and message to b and returns the bulk to send after.
	// ok is false if there is nothing to send any more.
	encode(b []byte) (head, bulk []byte, ok bool)
	// sent is called once when the bytes have been given to the kernel, or with
	// the error if that failed, also when the frame was not encoded any more; not
	// after encode has said false. The frame's memory is not used after.
	sent(err error)
}

// sender is the outgoing side of a connection. Whoever finds it idle and may
// block sends what there is; else the connection's writer goroutine does.
type sender struct {
	nc      net.Conn
	plain   bool // writev is possible
	timeout time.Duration
	onError func(error) // called once, without locks

	mu     sync.Mutex
	q      []outgoing
	busy   bool // somebody sends
	closed error
	idle   sync.Cond // busy fell
	wake   chan struct{}

	// owned by who set busy
	batch []outgoing
	live  []outgoing
	head  []byte
	marks []mark
	bufs  net.Buffers
	iov   net.Buffers
}

// mark is a place in the header bytes where a bulk belongs.
type mark struct {
	at   int
	bulk []byte
}

func (s *sender) init(nc net.Conn, timeout time.Duration, onError func(error)) {
	_, s.plain = nc.(*net.TCPConn)
	s.nc, s.timeout, s.onError = nc, timeout, onError
	s.idle.L = &s.mu
	s.wake = make(chan struct{}, 1)
}

// many is the number of queued frames at which the writer goroutine begins
// though the caller of put would send them later.
const many = 16

// put queues a frame. With kick the writer goroutine is woken; else the caller
// calls flush before it blocks. It returns false when the sender is closed.
func (s *sender) put(o outgoing, kick bool) bool {
	s.mu.Lock()
	if s.closed != nil {
		s.mu.Unlock()
		return false
	}
	s.q = append(s.q, o)
	kick = (kick || len(s.q) >= many) && !s.busy
	s.mu.Unlock()
	if kick {
		s.kick()
	}
	return true
}

func (s *sender) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// kickQueued wakes the writer goroutine if there is something to send.
func (s *sender) kickQueued() {
	s.mu.Lock()
	some := len(s.q) > 0 && !s.busy
	s.mu.Unlock()
	if some {
		s.kick()
	}
}

// gather lets goroutines that are ready run first: what they put goes out with
// the same system call, which costs more than all else of a small request.
func gather() { runtime.Gosched() }

// flush sends what is queued, unless somebody else is at it, who then sends it.
// After the given number of batches the rest is left to the writer goroutine; 0
// is no limit.
func (s *sender) flush(rounds int) {
	s.mu.Lock()
	if s.busy {
		s.mu.Unlock()
		return
	}
	s.busy = true
	more := false
	for n := 0; len(s.q) > 0 && s.closed == nil; n++ {
		if more = rounds > 0 && n == rounds; more {
			break
		}
		s.batch, s.q = s.q, s.batch[:0]
		s.mu.Unlock()
		err := s.send()
		s.mu.Lock()
		if err != nil && s.closed == nil {
			s.closed = err
			s.mu.Unlock()
			s.onError(err)
			s.mu.Lock()
		}
	}
	s.busy = false
	var rest []outgoing
	if s.closed != nil {
		rest, s.q = s.q, nil
	}
	err := s.closed
	s.idle.Broadcast()
	s.mu.Unlock()
	if more {
		s.kick()
	}
	for _, o := range rest {
		o.sent(err)
	}
}

// close refuses further frames and gives what is queued back with err. The
// connection's socket must have been closed, so that a send under way ends.
func (s *sender) close(err error) {
	s.mu.Lock()
	if s.closed == nil {
		s.closed = err
	}
	s.mu.Unlock()
	s.flush(0)
}

// drained waits until everything queued has been given to the kernel or has
// failed.
func (s *sender) drained() {
	s.flush(0)
	s.mu.Lock()
	for s.busy {
		s.idle.Wait()
	}
	s.mu.Unlock()
}

// send sends the batch.
func (s *sender) send() error {
	var err error
	for rest := s.batch; len(rest) > 0; {
		s.head, s.marks, s.live = s.head[:0], s.marks[:0], s.live[:0]
		size := 0
		n := 0
		for n < len(rest) && n < batchItems && size < batchBytes && len(s.head) < batchHead && err == nil {
			o := rest[n]
			n++
			head, bulk, ok := o.encode(s.head)
			if !ok {
				continue
			}
			s.head = head
			s.live = append(s.live, o)
			size += len(bulk)
			if len(bulk) < copyBulk {
				s.head = append(s.head, bulk...)
			} else {
				s.marks = append(s.marks, mark{len(s.head), bulk})
			}
		}
		if err != nil {
			for _, o := range rest {
				o.sent(err)
			}
			break
		}
		err = s.write()
		for _, o := range s.live {
			o.sent(err)
		}
		clear(s.live)
		clear(s.marks)
		rest = rest[n:]
	}
	clear(s.batch)
	if cap(s.head) > keepHead {
		s.head = nil
	}
	return err
}

func (s *sender) write() error {
	if len(s.head) == 0 {
		return nil
	}
	if err := s.nc.SetWriteDeadline(time.Now().Add(s.timeout)); err != nil {
		return err
	}
	if len(s.marks) == 0 {
		_, err := s.nc.Write(s.head)
		return err
	}
	s.iov = s.iov[:0]
	at := 0
	for _, m := range s.marks {
		s.iov = append(s.iov, s.head[at:m.at], m.bulk)
		at = m.at
	}
	if at < len(s.head) {
		s.iov = append(s.iov, s.head[at:])
	}
	defer clear(s.iov)
	if !s.plain {
		for _, p := range s.iov {
			if _, err := s.nc.Write(p); err != nil {
				return err
			}
		}
		return nil
	}
	s.bufs = s.iov // WriteTo consumes its receiver
	_, err := s.bufs.WriteTo(s.nc)
	s.bufs = nil
	return err
}
