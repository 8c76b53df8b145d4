package etcd

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// conns are the connections to members, so that those to a dead one can be ended.
type conns struct {
	mu   sync.Mutex
	open map[*tracked]string // the address that was dialled
}

// tracked is a connection that leaves the list when it is closed.
type tracked struct {
	net.Conn
	l *conns
}

// Close implements net.Conn.
func (c *tracked) Close() error {
	c.l.mu.Lock()
	delete(c.l.open, c)
	c.l.mu.Unlock()
	return c.Conn.Close()
}

// dial is for grpc.WithContextDialer.
func (l *conns) dial(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &tracked{conn, l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = map[*tracked]string{}
	}
	l.open[c] = addr
	return c, nil
}

// Cut ends the connections to the member whose clients' port is at an address, because
// its machine is silent: requests and watches there go to another member at once, and
// not when the connection turns out to be dead. They are made anew.
func (c *Client) Cut(addr netip.AddrPort) (n int) {
	var l []*tracked
	c.conns.mu.Lock()
	for x, a := range c.conns.open {
		if a == addr.String() {
			l = append(l, x)
		}
	}
	c.conns.mu.Unlock()
	for _, x := range l {
		if x.Close() == nil {
			n++
		}
	}
	return n
}
