package node

import (
	"context"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// paths are the ways from this process to targets on other nodes, and the attempts to
// get one, so that they can be cut when a node or a target is said to be gone: what is
// on its way then returns at once to who has sent it, who asks again, there or elsewhere.
type paths struct {
	mu   sync.Mutex // never held while anything is called
	open map[*path]struct{}
}

type path struct {
	node, target string
	began        time.Time
	// end ends the attempt, and once it has succeeded the path, without waiting.
	end func(error)
	// err, of a path, is why it has ended, or nil.
	err func() error
}

// dial connects to a target at a node. The path is among those that cut ends until
// the connection is closed.
func (p *paths) dial(ctx context.Context, node, target string, o tcp.BundleOptions) (wire.Conn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	x := &path{node: node, target: target, began: time.Now(), end: cancel, err: func() error { return nil }}
	p.mu.Lock()
	if p.open == nil {
		p.open = map[*path]struct{}{}
	}
	p.open[x] = struct{}{}
	p.mu.Unlock()
	b, err := tcp.DialBundle(ctx, o)
	if err != nil {
		p.remove(x)
		return nil, err
	}
	p.mu.Lock()
	x.end, x.err = b.Abort, b.Err
	p.mu.Unlock()
	// It may have been cut while it was made.
	if err := context.Cause(ctx); err != nil {
		b.Abort(err)
	}
	return &pathConn{b, p, x}, nil
}

// pathConn is a connection that is among the paths until it is closed.
type pathConn struct {
	*tcp.Bundle
	p *paths
	x *path
}

func (c *pathConn) Close() error {
	c.p.remove(c.x)
	return c.Bundle.Close()
}

func (p *paths) remove(x *path) {
	p.mu.Lock()
	delete(p.open, x)
	p.mu.Unlock()
}

// cut ends the paths to a target at a node, or to all there when target is empty, that
// were begun before a time, and tells how many there were. Requests without an answer are
// given back.
func (p *paths) cut(node, target string, before time.Time, why error) int {
	var ends []func(error)
	p.mu.Lock()
	for x := range p.open {
		if x.node == node && (target == "" || x.target == target) && x.began.Before(before) {
			ends = append(ends, x.end)
		}
	}
	p.mu.Unlock()
	for _, end := range ends {
		end(why)
	}
	return len(ends)
}

// to calls add with every node to which there is a path to the target, or an attempt.
func (p *paths) to(target string, add func(node string)) {
	var l []*path
	var errs []func() error
	p.mu.Lock()
	for x := range p.open {
		if x.target == target {
			l, errs = append(l, x), append(errs, x.err)
		}
	}
	p.mu.Unlock()
	for i, x := range l {
		if errs[i]() == nil {
			add(x.node)
		}
	}
}
