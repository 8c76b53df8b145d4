package tcp

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Endpoint is where a target may be.
type Endpoint struct {
	// Addr is host:port.
	Addr string
	// Node is the name that the node there must have; empty: any node of the
	// cluster (then TLS.ServerName counts, if set, or TLS's own verification).
	Node string
}

// DialOptions are what Dial needs. Addrs, Target and Node are required, and
// TLS unless Insecure is set.
type DialOptions struct {
	// Addrs are tried in order.
	Addrs []Endpoint
	// Target is the target's name at the server.
	Target string
	// Node is the name of this node, that of its certificate.
	Node string
	// Kind defaults to Control.
	Kind Kind
	// Session is the path that the connection belongs to (wire.Peer), 0 for none.
	Session uint64
	// TLS holds this node's certificate and the cluster's CA.
	TLS *tls.Config
	// Insecure allows a connection without TLS when TLS is nil.
	Insecure bool
	// LocalAddr is the source address, if valid.
	LocalAddr netip.Addr
	Timeouts  Timeouts
	// DialContext replaces net.Dialer, for tests.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Dial connects to the first endpoint that serves the target. The error joins
// those of all endpoints.
func Dial(ctx context.Context, o DialOptions) (*Conn, error) {
	if err := o.prepare(); err != nil {
		return nil, err
	}
	return firstOf(ctx, &o, func(e Endpoint) (*Conn, error) { return dial(ctx, o, e) })
}

// prepare checks the options and completes them.
func (o *DialOptions) prepare() error {
	o.Timeouts.defaults()
	if o.Kind == 0 {
		o.Kind = Control
	}
	switch {
	case len(o.Addrs) == 0 || o.Target == "" || o.Node == "":
		return errors.New("dial target: address, target and node name are needed")
	case len(o.Target) > maxName || len(o.Node) > maxName:
		return errors.New("dial target: name too long")
	case o.TLS == nil && !o.Insecure:
		return errors.New("dial target: no TLS configuration, and going without was not asked for")
	}
	if o.DialContext == nil {
		d := &net.Dialer{}
		if o.LocalAddr.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(o.LocalAddr, 0))
		}
		o.DialContext = d.DialContext
	}
	return nil
}

// firstOf tries the endpoints in turn.
func firstOf[T any](ctx context.Context, o *DialOptions, try func(Endpoint) (T, error)) (T, error) {
	var errs []error
	for _, e := range o.Addrs {
		c, err := try(e)
		if err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("dial target %s at %s: %w", o.Target, e.Addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	var none T
	return none, errors.Join(errs...)
}

func dial(ctx context.Context, o DialOptions, e Endpoint) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, o.Timeouts.Handshake)
	defer cancel()
	nc, err := o.DialContext(ctx, "tcp", e.Addr)
	if err != nil {
		return nil, err
	}
	// The context's end closes the socket, whatever it waits for.
	raw := nc
	release := context.AfterFunc(ctx, func() { _ = raw.Close() })
	c, err := handshake(ctx, o, e, nc)
	if !release() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = raw.Close()
		return nil, errors.Join(err, ctx.Err())
	}
	c.wg.Add(2)
	go c.reader()
	go c.writer()
	return c, nil
}

func handshake(ctx context.Context, o DialOptions, e Endpoint, nc net.Conn) (*Conn, error) {
	if o.TLS != nil {
		cfg := o.TLS.Clone()
		cfg.DynamicRecordSizingDisabled = true
		if e.Node != "" {
			cfg.ServerName = e.Node
		}
		t := tls.Client(nc, cfg)
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		nc = t
	}
	h := hello{min: MinVersion, max: MaxVersion, kind: o.Kind, session: o.Session, node: o.Node, target: o.Target}
	if _, err := nc.Write(h.encode()); err != nil {
		return nil, err
	}
	br := bufio.NewReaderSize(nc, readBuffer)
	b, err := readHandshake(br)
	if err != nil {
		return nil, err
	}
	w, err := decodeWelcome(b)
	if err != nil {
		return nil, err
	}
	if w.code != codeOK {
		known, ok := codeErrors[w.code]
		if !ok {
			known = ErrRefused
		}
		return nil, fmt.Errorf("%w: %s", known, w.text)
	}
	switch {
	case w.version < MinVersion || w.version > MaxVersion:
		return nil, fmt.Errorf("%w: the node chose %d", ErrVersion, w.version)
	case w.window == 0:
		return nil, fmt.Errorf("%w: the node grants no requests", ErrPeer)
	case e.Node != "" && w.node != e.Node:
		return nil, fmt.Errorf("%w: %q, expected %q", ErrIdentity, w.node, e.Node)
	}
	c := &Conn{
		o: o, nc: nc, br: br, node: w.node, window: int(w.window), maxBulk: int(min(w.maxBulk, wire.MaxBulk)),
		stop: make(chan struct{}), gone: make(chan struct{}), pend: map[uint64]*pending{},
	}
	c.pool.New = func() any { return &pending{c: c, ch: make(chan struct{}, 1)} }
	c.snd.init(nc, o.Timeouts.Write, c.fail)
	return c, nil
}
