package node

import (
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// mute is a target that answers when it is let go.
type mute struct {
	once  sync.Once
	asked chan struct{}
	free  chan struct{}
}

func (m *mute) TryHandle(*wire.Request, *wire.Reply) bool { return false }
func (m *mute) MayBlock(wire.Op) bool                     { return true }

func (m *mute) Handle(_ *wire.Request, _ *wire.Reply, done func()) {
	m.once.Do(func() { close(m.asked) })
	<-m.free
	done()
}

// What waits for a node that is said to be gone, a request as well as an attempt to
// connect, returns at once, and what goes to another node or target does not notice
// (LN 252; requirement 000.11).
func TestCutPathsReturnEverything(t *testing.T) {
	m := &mute{asked: make(chan struct{}), free: make(chan struct{})}
	srv, err := tcp.NewServer(map[string]wire.Target{"t": m, "other": m}, tcp.ServerOptions{Node: "n", Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deaf, err := net.Listen("tcp", "127.0.0.1:0") // nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(l); err != nil {
			t.Error(err)
		}
	})
	var p paths
	options := func(addr net.Addr, target string) tcp.BundleOptions {
		return tcp.BundleOptions{Bulk: true, DialOptions: tcp.DialOptions{
			Addrs: []tcp.Endpoint{{Addr: addr.String(), Node: "n"}}, Target: target, Node: "me", Insecure: true,
		}}
	}
	dial := func(target string) wire.Conn {
		c, err := p.dial(ctx, "n", target, options(l.Addr(), target))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c, other := dial("t"), dial("other")
	asked := make(chan error, 1)
	wg.Go(func() {
		var rep wire.Reply
		asked <- c.Call(ctx, &wire.Request{Header: wire.Header{Op: wire.OpGetattr, XID: 1}}, &rep)
	})
	<-m.asked
	dialled := make(chan error, 1)
	wg.Go(func() {
		_, err := p.dial(ctx, "n", "t", options(deaf.Addr(), "t"))
		dialled <- err
	})
	until(t, "the attempt", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.open) == 3
	})
	now := time.Now()
	if n := p.cut("elsewhere", "", now, errSuspected) + p.cut("n", "nothing", now, errSuspected) + p.cut("n", "t", now.Add(-time.Hour), errSuspected); n != 0 {
		t.Errorf("%d paths are cut that nobody meant", n)
	}
	if n := p.cut("n", "t", now, errSuspected); n != 2 {
		t.Errorf("%d paths are cut, there are 2", n)
	}
	if err := <-asked; !errors.Is(err, errSuspected) {
		t.Errorf("the request: %v", err)
	}
	if err := <-dialled; err == nil {
		t.Error("an attempt that was cut has succeeded")
	}
	count := 0
	p.to("t", func(string) { count++ })
	if count != 0 {
		t.Errorf("%d paths to a target, all of which were cut", count)
	}
	p.to("other", func(string) { count++ })
	if count != 1 || other.(*pathConn).Err() != nil {
		t.Errorf("%d paths to the other target, %v", count, other.(*pathConn).Err())
	}
	close(m.free)
	for _, c := range []wire.Conn{c, other} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(p.open) != 0 {
		t.Errorf("%d paths are left", len(p.open))
	}
	if err := srv.Close(ctx); err != nil {
		t.Error(err)
	}
	wg.Wait()
}
