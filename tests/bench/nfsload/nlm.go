package nfsload

import (
	"errors"
	"fmt"
)

// Procedures of NLM 4, and GETPORT of the port mapper.
const (
	NLMTest     = 1
	NLMLock     = 2
	NLMUnlock   = 4
	pmapGetport = 3
)

// Statuses of NLM 4 (XNFS chapter 14).
const (
	NLMGranted     = 0
	NLMDenied      = 1
	NLMGracePeriod = 4
)

// ErrNotRegistered says that the server's port mapper knows no such program.
var ErrNotRegistered = errors.New("program is not registered")

// Getport asks for a program's TCP port; c speaks ProgPortmap.
func (c *Conn) Getport(prog uint32) (uint16, error) {
	b, err := c.Call(pmapGetport, func(c *Conn) {
		c.U32(prog)
		c.U32(version(prog))
		c.U32(6) // IPPROTO_TCP
		c.U32(0)
	})
	if err != nil {
		return 0, fmt.Errorf("GETPORT of program %d: %w", prog, err)
	}
	d := Decoder{B: b}
	port := d.U32()
	if d.Err != nil || port > 0xffff {
		return 0, fmt.Errorf("GETPORT of program %d: %w", prog, ErrProtocol)
	}
	if port == 0 {
		return 0, fmt.Errorf("GETPORT of program %d: %w", prog, ErrNotRegistered)
	}
	return uint16(port), nil
}

// Lock is a byte range of a file as a lock's owner names it.
type Lock struct {
	Caller string // caller_name
	Handle []byte
	Owner  uint32 // svid; the oh is made of it
	Off    uint64 // bytes
	Len    uint64 // bytes, 0 for everything from Off on
}

// LockCall appends the arguments of NLM_TEST, NLM_LOCK (exclusive, not blocking,
// no reclaim) or NLM_UNLOCK. The cookie is 4 bytes, as Linux's.
func (c *Conn) LockCall(proc uint32, cookie uint32, l *Lock) {
	c.U32(4)
	c.U32(cookie)
	switch proc {
	case NLMLock:
		c.U32(0)
		c.U32(1)
	case NLMTest:
		c.U32(1)
	}
	c.Opaque([]byte(l.Caller))
	c.Opaque(l.Handle)
	c.U32(8)
	c.U32(l.Owner)
	c.U32(0x62656e63)
	c.U32(l.Owner)
	c.U64(l.Off)
	c.U64(l.Len)
	if proc == NLMLock {
		c.U32(0)
		c.U32(1)
	}
}

// LockStat reads the status from the result of any of the three and checks the
// cookie.
func LockStat(cookie uint32, b []byte) (uint32, error) {
	d := Decoder{B: b}
	got := d.Opaque()
	stat := d.U32()
	if d.Err != nil || len(got) != 4 || got[0] != byte(cookie>>24) || got[1] != byte(cookie>>16) || got[2] != byte(cookie>>8) || got[3] != byte(cookie) {
		return 0, fmt.Errorf("lock result %x: %w", b, ErrProtocol)
	}
	return stat, nil
}

// LockNow makes one call and returns its status; c speaks ProgNLM.
func (c *Conn) LockNow(proc uint32, l *Lock) (uint32, error) {
	b, err := c.Call(proc, func(c *Conn) { c.LockCall(proc, 0, l) })
	if err != nil {
		return 0, err
	}
	return LockStat(0, b)
}
