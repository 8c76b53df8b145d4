package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

// others are connections of a load generator, each with a small call twice a second. They
// do as the Linux client does: when a connection ends they make a new one at once and
// call again, one that is refused is tried again after 3 s, and a call that is not
// answered is waited for until TCP gives up or a minute has passed.
type others struct {
	dial *dialer
	root []byte
	quit chan struct{}
	wg   sync.WaitGroup
	all  []*other
}

type other struct {
	mu    sync.Mutex
	calls []call // lately
	err   error  // an answer that must not be
	began time.Time
}

type call struct {
	start time.Time
	took  time.Duration
	// ended is when its first connection was found to be over, dialed how long the last
	// new one took, both zero if it went through by the first; local is its port.
	ended  time.Time
	dialed time.Duration
	dials  int
	local  net.Addr
}

// tell says how a call went, with times since t0.
func (c *call) tell(t0 time.Time) string {
	s := fmt.Sprintf("begun %+v, took %v", c.start.Sub(t0).Round(time.Millisecond), c.took.Round(time.Millisecond))
	if c.dials > 0 {
		s += fmt.Sprintf(", connection over %+v, %d new ones, the last from %v in %v", c.ended.Sub(t0).Round(time.Millisecond), c.dials, c.local, c.dialed.Round(time.Millisecond))
	}
	return s
}

func newOthers(ctx context.Context, hub *bed.Node, a netip.Addr, n int) (*others, error) {
	o := &others{quit: make(chan struct{})}
	if n == 0 {
		return o, nil
	}
	o.dial = newDialer(hub, netip.AddrPortFrom(a, bed.NFSPort), n)
	p, err := rig.NewProbe(ctx, hub, a)
	if err != nil {
		return nil, err
	}
	o.root = p.Root
	p.Close()
	for i := range n {
		c := &other{}
		o.all = append(o.all, c)
		o.wg.Go(func() { o.work(c, time.Duration(i)*500*time.Millisecond/time.Duration(n)) })
	}
	// All are connected before anything is measured.
	_, err = o.longest(ctx, time.Now(), time.Now())
	return o, err
}

func (o *others) close() {
	close(o.quit)
	o.wg.Wait()
	if o.dial != nil {
		o.dial.close()
	}
}

// sleep returns false when the run is over.
func (o *others) sleep(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-o.quit:
		return false
	}
}

func (o *others) work(c *other, phase time.Duration) {
	var conn *nfsload.Conn
	buf := make([]byte, 4<<10) // of a reply
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	if !o.sleep(phase) {
		return
	}
	for {
		start := time.Now()
		x := call{start: start}
		c.mu.Lock()
		c.began = start
		c.mu.Unlock()
		for {
			if conn == nil {
				if x.ended.IsZero() {
					x.ended = time.Now()
				}
				dial := time.Now()
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				nc, err := o.dial.connect(ctx)
				cancel()
				if err != nil {
					if !o.sleep(3 * time.Second) {
						return
					}
					continue
				}
				conn = nfsload.NewConnBuffer(nc, nfsload.ProgNFS, buf)
				x.dials++
				x.dialed, x.local = time.Since(dial), nc.LocalAddr()
			}
			b, err := conn.Call(nfsload.ProcGetattr, func(c *nfsload.Conn) { c.Opaque(o.root) })
			if err == nil {
				d := nfsload.Decoder{B: b}
				err = d.Status(nfsload.ProcGetattr)
				var se *nfsload.StatusError
				if errors.As(err, &se) || errors.Is(err, nfsload.ErrProtocol) {
					c.mu.Lock()
					c.err = err
					c.mu.Unlock()
					return
				}
				break
			}
			conn.Close()
			conn = nil
			select {
			case <-o.quit:
				return
			default:
			}
		}
		x.took = time.Since(start)
		c.mu.Lock()
		if len(c.calls) > 2000 {
			c.calls = append(c.calls[:0], c.calls[1000:]...)
		}
		c.calls = append(c.calls, x)
		c.mu.Unlock()
		if !o.sleep(500 * time.Millisecond) {
			return
		}
	}
}

// longest waits until each connection has made a call after `to`, and returns the
// longest that was under way between from and now.
func (o *others) longest(ctx context.Context, from, to time.Time) (longest call, err error) {
	for i, c := range o.all {
		for {
			c.mu.Lock()
			var last call
			if n := len(c.calls); n > 0 {
				last = c.calls[n-1]
			}
			err := c.err
			began := c.began
			c.mu.Unlock()
			if err != nil {
				return call{}, fmt.Errorf("connection %d: %w", i, err)
			}
			if last.start.After(to) {
				break
			}
			select {
			case <-ctx.Done():
				return call{}, fmt.Errorf("connection %d: a call begun at %v is not answered: %w", i, began.UTC().Format("15:04:05.000"), ctx.Err())
			case <-time.After(20 * time.Millisecond):
			}
		}
		c.mu.Lock()
		for _, x := range c.calls {
			if x.start.Add(x.took).After(from) {
				if x.took > longest.took {
					longest = x
				}
			}
		}
		c.mu.Unlock()
	}
	return longest, nil
}
