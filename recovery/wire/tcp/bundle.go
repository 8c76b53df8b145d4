package tcp

import (
	"context"
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/recovery/wire"
)

// BundleOptions are what DialBundle needs. Kind has no meaning; a Session of 0
// means a new one.
type BundleOptions struct {
	DialOptions
	// Bulk asks for a second connection, for requests with much data.
	Bulk bool
}

// bulkFrom is the size of Request.Bulk in bytes from which on a request goes by
// the bulk connection.
const bulkFrom = 16 << 10

// Bundle is one path to a target: a control and perhaps a bulk connection of one
// session, which end together. It implements wire.Conn; requests are given to
// the target in no particular order.
//
// When one connection breaks, the other is cut, and all requests without answer
// are lost. When the server says on one of them that it is leaving, no new
// requests are taken, those that it has read are still answered, and then both
// end.
type Bundle struct {
	control, bulk *Conn // bulk may be nil
	session       uint64
	gone          chan struct{}
}

var _ wire.Conn = (*Bundle)(nil)

// DialBundle connects to the first endpoint that serves the target, with both
// connections to the same node. The error joins those of all endpoints.
func DialBundle(ctx context.Context, o BundleOptions) (*Bundle, error) {
	if err := o.prepare(); err != nil {
		return nil, err
	}
	return firstOf(ctx, &o.DialOptions, func(e Endpoint) (*Bundle, error) { return dialBundle(ctx, o, e) })
}

func dialBundle(ctx context.Context, o BundleOptions, e Endpoint) (*Bundle, error) {
	d := o.DialOptions
	if d.Session == 0 {
		d.Session = wire.NextSession()
	}
	d.Kind = Control
	control, err := dial(ctx, d, e)
	if err != nil {
		return nil, err
	}
	b := &Bundle{control: control, session: d.Session, gone: control.gone}
	if !o.Bulk {
		return b, nil
	}
	d.Kind = Bulk
	if b.bulk, err = dial(ctx, d, e); err != nil {
		control.Close()
		return nil, fmt.Errorf("bulk connection: %w", err)
	}
	link(control, b.bulk)
	b.gone = make(chan struct{})
	go func() {
		<-b.control.gone
		<-b.bulk.gone
		close(b.gone)
	}()
	if n := b.bulk.node; n != control.node {
		b.Close()
		return nil, fmt.Errorf("%w: control connection to %q, bulk connection to %q", ErrIdentity, control.node, n)
	}
	return b, nil
}

// conn is the connection for a request.
func (b *Bundle) conn(req *wire.Request) *Conn {
	if b.bulk != nil && len(req.Bulk) >= bulkFrom {
		return b.bulk
	}
	return b.control
}

// TryHandle implements wire.Target: nothing can be answered without waiting.
func (b *Bundle) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Handle implements wire.Target, like Conn.Handle.
func (b *Bundle) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	b.conn(req).Handle(req, rep, done)
}

// Start is Handle whose callback gets what Call would return.
func (b *Bundle) Start(req *wire.Request, rep *wire.Reply, done func(err error)) {
	b.conn(req).Start(req, rep, done)
}

// Call implements wire.Conn, like Conn.Call.
func (b *Bundle) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	return b.conn(req).Call(ctx, req, rep)
}

// Close ends both connections, reports ErrClosed for everything that is not
// answered, and waits for their goroutines. It must not be called from a done
// callback; Abort may be.
func (b *Bundle) Close() error {
	b.Abort(ErrClosed)
	<-b.gone
	return nil
}

// Abort ends the path like Close, for the given reason and without waiting.
func (b *Bundle) Abort(reason error) {
	b.control.fail(reason)
	if b.bulk != nil {
		b.bulk.fail(reason)
	}
}

// Done is closed when both connections have ended and the result of every
// request has been reported.
func (b *Bundle) Done() <-chan struct{} { return b.gone }

// Err is why the path ended, or nil. After ErrGoAway requests that were read are
// still answered.
func (b *Bundle) Err() error { return b.control.Err() }

// Node is the name of the node at the other end.
func (b *Bundle) Node() string { return b.control.node }

// Session is the number that the target knows the path by.
func (b *Bundle) Session() uint64 { return b.session }

// MaxBulk is the largest Request.Bulk in bytes that the server takes.
func (b *Bundle) MaxBulk() int { return b.control.maxBulk }

// Outstanding is the number of requests without answer and of those that wait
// for credits.
func (b *Bundle) Outstanding() int {
	n := b.control.Outstanding()
	if b.bulk != nil {
		n += b.bulk.Outstanding()
	}
	return n
}

// link makes two connections end together.
func link(a, b *Conn) {
	a.sibling.Store(b)
	b.sibling.Store(a)
	// What has happened before was told to nobody.
	for _, c := range []*Conn{a, b} {
		if err := c.Err(); err != nil {
			c.follow(err)
		}
	}
}

// follow makes the other connection of the bundle end too. Called without locks.
func (c *Conn) follow(err error) {
	switch o := c.sibling.Load(); {
	case o == nil:
	case errors.Is(err, ErrGoAway):
		o.retire()
	default:
		o.fail(err)
	}
}

// retire takes no new requests and gives those back that were not sent. When the
// others are answered the connection ends.
func (c *Conn) retire() {
	c.mu.Lock()
	c.away, c.retired = true, true
	never := c.takeWaiting()
	c.mu.Unlock()
	for _, p := range never {
		p.report(notSent(ErrGoAway))
	}
	c.endIfIdle()
}

// endIfIdle ends a retired connection that waits for nothing but polls, which a
// server that is leaving does not answer.
func (c *Conn) endIfIdle() {
	c.mu.Lock()
	idle := true
	for _, p := range c.pend {
		if p.credit && p != abandonedCredit {
			idle = false
			break
		}
	}
	c.mu.Unlock()
	if idle {
		c.fail(ErrGoAway)
	}
}
