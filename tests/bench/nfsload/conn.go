// Package nfsload is an NFSv3 load generator: a client that keeps many calls
// outstanding on a connection and spends as little as possible on each, so
// that on a small machine most of the time is left to the server. Calls are
// encoded by hand into one buffer; one goroutine per connection writes
// calls and takes whatever replies have arrived.
package nfsload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Programs.
const (
	ProgPortmap = 100000
	ProgNFS     = 100003
	ProgMount   = 100005
	ProgNLM     = 100021
)

// version is the one version of a program that is used.
func version(prog uint32) uint32 {
	switch prog {
	case ProgPortmap:
		return 2
	case ProgNLM:
		return 4
	}
	return 3
}

// maxReply bounds one reply; a READDIRPLUS or READ reply is little over 1 MiB.
const maxReply = 2 << 20

// maxDepth is the highest number of calls outstanding on one connection, a power
// of two.
const maxDepth = 1 << 12

// stall is how long a Run waits for any reply. A server that loses a call must
// fail the run with a message, not hang it.
const stall = 30 * time.Second

// ErrProtocol is wrapped by errors about replies that make no sense.
var ErrProtocol = errors.New("malformed reply")

// StatusError is an NFS or MOUNT status other than 0.
type StatusError struct {
	Proc, Status uint32
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("procedure %d: status %d", e.Proc, e.Status)
}

// Conn is one connection. It is not safe for concurrent use.
type Conn struct {
	nc   net.Conn
	prog uint32
	vers uint32
	// xids are the XIDs of the slots' last calls. The low 12 bits are the slot, the
	// others count: a server may take a call with an old XID for a retransmission.
	xids [maxDepth]uint32
	cred []byte // encoded credential and verifier

	out   []byte // encoded calls, without payloads
	cuts  []cut  // payloads that belong between the bytes of out
	extra int    // payload bytes in cuts after the current call's start
	start int    // where the current call starts in out

	in         []byte
	head, tail int

	// Batch makes Run collect all calls that it can make before it writes them.
	// A closed loop then falls into step with the server: the whole window
	// travels in one segment each way, and the figures say little about
	// calls that come one by one. Without it every call is written by itself.
	Batch bool
}

type cut struct {
	at   int // index in out before which the payload goes
	data []byte
}

// NewConn makes a Conn over an established connection. Calls carry AUTH_SYS for
// root without further groups.
func NewConn(nc net.Conn, prog uint32) *Conn {
	return NewConnBuffer(nc, prog, make([]byte, 256<<10))
}

// NewConnBuffer is NewConn with a buffer for replies, which belongs to the Conn and grows
// as needed.
func NewConnBuffer(nc net.Conn, prog uint32, buf []byte) *Conn {
	c := &Conn{nc: nc, prog: prog, vers: version(prog), in: buf}
	for i, base := 0, uint32(time.Now().UnixNano()); i < maxDepth; i++ {
		c.xids[i] = base&^(maxDepth-1) | uint32(i)
	}
	if t, ok := nc.(*net.TCPConn); ok {
		t.SetNoDelay(true)
	}
	body := appendU32(nil, 0)
	body = appendOpaque(body, []byte("bench"))
	body = appendU32(body, 0, 0, 0)
	c.cred = appendU32(nil, 1)
	c.cred = appendOpaque(c.cred, body)
	c.cred = appendU32(c.cred, 0, 0)
	return c
}

// Close closes the connection.
func (c *Conn) Close() error { return c.nc.Close() }

func appendU32(b []byte, vs ...uint32) []byte {
	for _, v := range vs {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func appendOpaque(b, data []byte) []byte {
	b = appendU32(b, uint32(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&3)...)
}

// U32, U64, Opaque append arguments to the current call.
func (c *Conn) U32(v uint32) { c.out = binary.BigEndian.AppendUint32(c.out, v) }

// U64 appends a 64-bit number.
func (c *Conn) U64(v uint64) { c.out = binary.BigEndian.AppendUint64(c.out, v) }

// Opaque appends a counted byte string with its padding.
func (c *Conn) Opaque(b []byte) {
	c.U32(uint32(len(b)))
	c.out = append(c.out, b...)
	for range -len(b) & 3 {
		c.out = append(c.out, 0)
	}
}

// Payload appends a counted byte string, a multiple of 4 bytes long, without
// copying it if it is large. It must not change until it was sent.
func (c *Conn) Payload(b []byte) {
	if len(b) < 16<<10 {
		c.Opaque(b)
		return
	}
	c.U32(uint32(len(b)))
	c.cuts = append(c.cuts, cut{len(c.out), b})
	c.extra += len(b)
}

// begin starts the call of a slot, end completes its record mark.
func (c *Conn) begin(slot int, proc uint32) {
	c.xids[slot] += maxDepth
	c.start, c.extra = len(c.out), 0
	c.out = appendU32(c.out, 0, c.xids[slot], 0, 2, c.prog, c.vers, proc)
	c.out = append(c.out, c.cred...)
}

func (c *Conn) end() {
	binary.BigEndian.PutUint32(c.out[c.start:], 1<<31|uint32(len(c.out)-c.start-4+c.extra))
}

func (c *Conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	var err error
	if len(c.cuts) == 0 {
		_, err = c.nc.Write(c.out)
	} else {
		var bufs net.Buffers
		at := 0
		for _, p := range c.cuts {
			bufs = append(bufs, c.out[at:p.at], p.data)
			at = p.at
		}
		if at < len(c.out) {
			bufs = append(bufs, c.out[at:])
		}
		_, err = bufs.WriteTo(c.nc)
	}
	c.out, c.cuts = c.out[:0], c.cuts[:0]
	return err
}

// fill reads more input; it makes room for a record of need bytes first.
func (c *Conn) fill(need int) error {
	if c.head == c.tail {
		c.head, c.tail = 0, 0
	}
	if len(c.in)-c.head < need || c.tail == len(c.in) {
		if want := max(4*need, 256<<10); len(c.in) < want {
			b := make([]byte, want)
			c.tail = copy(b, c.in[c.head:c.tail])
			c.in = b
		} else {
			c.tail = copy(c.in, c.in[c.head:c.tail])
		}
		c.head = 0
	}
	n, err := c.nc.Read(c.in[c.tail:])
	c.tail += n
	if n > 0 {
		return nil
	}
	return err
}

// next returns the body of the next complete reply in the buffer and its slot;
// ok is false if there is none, and then need is how many bytes the record has.
func (c *Conn) next() (slot int, body []byte, ok bool, need int, err error) {
	b := c.in[c.head:c.tail]
	if len(b) < 4 {
		return 0, nil, false, 4, nil
	}
	mark := binary.BigEndian.Uint32(b)
	n := int(mark &^ (1 << 31))
	if mark&(1<<31) == 0 {
		return c.nextFragments(b)
	}
	if n > maxReply {
		return 0, nil, false, 0, fmt.Errorf("record of %d bytes: %w", n, ErrProtocol)
	}
	if len(b) < 4+n {
		return 0, nil, false, 4 + n, nil
	}
	c.head += 4 + n
	slot, body, err = c.accept(b[4 : 4+n])
	return slot, body, err == nil, 0, err
}

// nextFragments is next for a reply in several fragments.
func (c *Conn) nextFragments(b []byte) (slot int, body []byte, ok bool, need int, err error) {
	var rec []byte
	at := 0
	for {
		if len(b) < at+4 {
			return 0, nil, false, at + 4, nil
		}
		mark := binary.BigEndian.Uint32(b[at:])
		n := int(mark &^ (1 << 31))
		if n > maxReply || len(rec)+n > maxReply {
			return 0, nil, false, 0, fmt.Errorf("record of %d bytes: %w", len(rec)+n, ErrProtocol)
		}
		if len(b) < at+4+n {
			return 0, nil, false, at + 4 + n, nil
		}
		rec = append(rec, b[at+4:at+4+n]...)
		at += 4 + n
		if mark&(1<<31) != 0 {
			break
		}
	}
	c.head += at
	slot, body, err = c.accept(rec)
	return slot, body, err == nil, 0, err
}

// accept checks the reply's header and returns what follows it.
func (c *Conn) accept(r []byte) (slot int, body []byte, err error) {
	if len(r) < 24 {
		return 0, nil, fmt.Errorf("%d bytes: %w", len(r), ErrProtocol)
	}
	xid := binary.BigEndian.Uint32(r)
	slot = int(xid % maxDepth)
	if xid != c.xids[slot] || binary.BigEndian.Uint32(r[4:]) != 1 || binary.BigEndian.Uint32(r[8:]) != 0 {
		return 0, nil, fmt.Errorf("xid %#x, reply %x: %w", xid, r[4:12], ErrProtocol)
	}
	vl := int(binary.BigEndian.Uint32(r[16:]))
	if vl > 400 || len(r) < 24+vl {
		return 0, nil, fmt.Errorf("verifier of %d bytes: %w", vl, ErrProtocol)
	}
	if s := binary.BigEndian.Uint32(r[20+vl:]); s != 0 {
		return 0, nil, fmt.Errorf("call not accepted, accept_stat %d: %w", s, ErrProtocol)
	}
	return slot, r[24+vl:], nil
}

// Worker makes the calls of one connection and takes their replies. Slots are
// numbered from 0; each has at most one call outstanding.
type Worker interface {
	// Next appends the arguments of the slot's next call to c and returns its
	// procedure. ok is false (and nothing appended) if there is none.
	Next(c *Conn, slot int) (proc uint32, ok bool)
	// Reply takes the result of the slot's call (valid during the call only)
	// and returns how many operations it completed.
	Reply(slot int, body []byte) (done int, err error)
}

// Funcs is a Worker made of two functions.
type Funcs struct {
	NextFunc  func(c *Conn, slot int) (uint32, bool)
	ReplyFunc func(slot int, body []byte) (int, error)
}

// Next calls NextFunc.
func (f *Funcs) Next(c *Conn, slot int) (uint32, bool) { return f.NextFunc(c, slot) }

// Reply calls ReplyFunc.
func (f *Funcs) Reply(slot int, body []byte) (int, error) { return f.ReplyFunc(slot, body) }

// CheckStatus is a ReplyFunc for replies whose status alone matters; each is
// one operation.
func CheckStatus(proc uint32) func(int, []byte) (int, error) {
	return func(_ int, b []byte) (int, error) {
		d := Decoder{B: b}
		return 1, d.Status(proc)
	}
}

// Run keeps depth calls outstanding until the deadline passes or no slot has a
// next call, and waits for the last reply. It returns the completed operations.
func (c *Conn) Run(depth int, deadline time.Time, w Worker) (int64, error) {
	if depth > maxDepth {
		return 0, fmt.Errorf("depth %d is above %d", depth, maxDepth)
	}
	var ops int64
	outstanding := 0
	var werr error // of a write
	send := func(slot int) {
		start := len(c.out)
		c.begin(slot, 0)
		proc, ok := w.Next(c, slot)
		if !ok {
			c.out = c.out[:start]
			return
		}
		binary.BigEndian.PutUint32(c.out[c.start+24:], proc)
		c.end()
		outstanding++
		if !c.Batch && werr == nil {
			werr = c.flush()
		}
	}
	if err := c.nc.SetDeadline(time.Now().Add(stall)); err != nil {
		return 0, err
	}
	lastDeadline := time.Now()
	for slot := range depth {
		send(slot)
	}
	more := true
	for {
		if werr == nil {
			werr = c.flush()
		}
		if werr != nil {
			return ops, werr
		}
		if outstanding == 0 {
			return ops, nil
		}
		need := 4
		got := 0
		for {
			slot, body, ok, n, err := c.next()
			if err != nil {
				return ops, err
			}
			if !ok {
				if got > 0 {
					break
				}
				if err := c.fill(max(n, need)); err != nil {
					if err == io.EOF {
						err = io.ErrUnexpectedEOF
					}
					return ops, fmt.Errorf("after %d operations, %d calls outstanding, %d bytes of a record here: %w", ops, outstanding, c.tail-c.head, err)
				}
				now := time.Now()
				if more && !now.Before(deadline) {
					more = false
				}
				if now.Sub(lastDeadline) > time.Second {
					lastDeadline = now
					if err := c.nc.SetDeadline(now.Add(stall)); err != nil {
						return ops, err
					}
				}
				continue
			}
			got++
			outstanding--
			done, err := w.Reply(slot, body)
			if err != nil {
				return ops, err
			}
			ops += int64(done)
			if more {
				send(slot)
			}
		}
	}
}

// oneCall is a Worker for a single call.
type oneCall struct {
	proc  uint32
	args  func(c *Conn)
	sent  bool
	reply []byte
}

func (o *oneCall) Next(c *Conn, _ int) (uint32, bool) {
	if o.sent {
		return 0, false
	}
	o.sent = true
	if o.args != nil {
		o.args(c)
	}
	return o.proc, true
}

func (o *oneCall) Reply(_ int, body []byte) (int, error) {
	o.reply = append([]byte(nil), body...)
	return 1, nil
}

// Call makes one call and returns its result.
func (c *Conn) Call(proc uint32, args func(c *Conn)) ([]byte, error) {
	o := &oneCall{proc: proc, args: args}
	_, err := c.Run(1, time.Now().Add(time.Minute), o)
	return o.reply, err
}
