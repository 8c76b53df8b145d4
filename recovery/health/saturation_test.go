package health

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// street is a network in memory in which every connection carries so many bytes per
// second in each direction.
type street struct {
	rate  int
	ports map[string]chan net.Conn
}

type slowConn struct {
	net.Conn
	rate int
}

func (c *slowConn) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		k := min(len(p), 16<<10)
		time.Sleep(time.Duration(k) * time.Second / time.Duration(c.rate))
		k, err = c.Conn.Write(p[:k])
		n, p = n+k, p[k:]
	}
	return n, err
}

func (s *street) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case s.ports[addr] <- &slowConn{there, s.rate}:
		return &slowConn{here, s.rate}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// port implements net.Listener.
type port struct {
	name string
	in   chan net.Conn
	end  chan struct{}
	once sync.Once
}

func (p *port) Accept() (net.Conn, error) {
	select {
	case c := <-p.in:
		return c, nil
	case <-p.end:
		return nil, net.ErrClosed
	}
}

func (p *port) Close() error   { p.once.Do(func() { close(p.end) }); return nil }
func (p *port) Addr() net.Addr { return &net.UnixAddr{Name: p.name, Net: "street"} }

// disk is a target whose requests all take their time.
type disk struct{ written atomic.Int64 }

func (d *disk) TryHandle(*wire.Request, *wire.Reply) bool { return false }
func (d *disk) MayBlock(wire.Op) bool                     { return true }

func (d *disk) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	time.Sleep(2 * time.Second)
	d.written.Add(int64(len(req.Bulk)))
	rep.XID, rep.Count = req.XID, uint32(len(req.Bulk))
	done()
}

// Beats do not wait for data (requirement 000.25). The bulk and the control connection of a path to a target are full,
// and so is the target's disk: what is small and goes that way takes much longer than the silence after which a peer
// is suspected, while beats come as always and nobody is suspected. Time is virtual, so that only a queue can
// make a beat late.
func TestBeatsBesideFullPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &street{rate: 4 << 20, ports: map[string]chan net.Conn{"a": make(chan net.Conn), "b": make(chan net.Conn)}}
		d := &disk{}
		type end struct {
			h   *Health
			srv *tcp.Server
			l   *port
		}
		var ends []end
		options := func(from string) func(string) tcp.DialOptions {
			return func(to string) tcp.DialOptions {
				return tcp.DialOptions{Addrs: []tcp.Endpoint{{Addr: to, Node: to}}, Node: from, Insecure: true, DialContext: s.dial}
			}
		}
		var served sync.WaitGroup
		for i, name := range []string{"a", "b"} {
			peer := []string{"b", "a"}[i]
			l := Local{Peers: []string{peer}}
			if name == "b" {
				l.Targets = []Target{{Name: "ost0", Instance: 1, State: Serving}}
			}
			h, err := Start(Options{
				Config: Config{Node: name, Peers: []string{peer}, Incarnation: 1}, Dial: Dial(options(name)), Local: func() Local { return l },
			})
			if err != nil {
				t.Fatal(err)
			}
			srv, err := tcp.NewServer(map[string]wire.Target{TargetName: h.Target(), "ost0": d}, tcp.ServerOptions{Node: name, Insecure: true})
			if err != nil {
				t.Fatal(err)
			}
			e := end{h, srv, &port{name: name, in: s.ports[name], end: make(chan struct{})}}
			served.Go(func() {
				if err := srv.Serve(e.l); err != nil {
					t.Error(err)
				}
			})
			ends = append(ends, e)
		}
		o := tcp.BundleOptions{Bulk: true, DialOptions: options("a")("b")}
		o.Target = "ost0"
		path, err := tcp.DialBundle(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		var writers sync.WaitGroup
		var xid atomic.Uint64
		call := func(op wire.Op, data []byte) time.Duration {
			began := time.Now()
			var rep wire.Reply
			req := &wire.Request{Header: wire.Header{Op: op, XID: xid.Add(1)}, Bulk: data}
			if err := path.Call(context.Background(), req, &rep); err != nil && !errors.Is(err, tcp.ErrClosed) {
				t.Error(err)
			}
			return time.Since(began)
		}
		big, small := make([]byte, 1<<20), make([]byte, 12<<10)
		for i := range 400 {
			data := small // goes by the control connection
			if i%5 == 0 {
				data = big
			}
			writers.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						call(wire.OpWrite, data)
					}
				}
			})
		}
		time.Sleep(10 * time.Second)
		var before [2]PeerStatus
		for i := range ends {
			before[i] = ends[i].h.Status()[0]
		}
		const span = 10 * time.Second
		began := time.Now()
		if took := call(wire.OpGetattr, nil); took <= before[0].Timeout {
			t.Errorf("a small request on the data path took %v: it is not full, the limit for beats is %v", took, before[0].Timeout)
		}
		time.Sleep(span - time.Since(began))
		for i := range ends {
			p := ends[i].h.Status()[0]
			if n := p.Received - before[i].Received; n < uint64(span/DefaultInterval)-2 {
				t.Errorf("%s was heard %d times in %v", p.Name, n, span)
			}
			if p.State != StateAlive || p.Suspicions != 0 || p.LongestGap > 2*DefaultInterval || p.Timeout > 4*DefaultInterval || p.Unsent != 0 || p.Breaks != 0 {
				t.Errorf("%+v", p)
			}
		}
		if d.written.Load() == 0 {
			t.Error("no data flowed")
		}
		close(stop)
		writers.Wait()
		_ = path.Close()
		for _, e := range ends {
			e.h.Close()
		}
		for _, e := range ends {
			if err := e.srv.Close(t.Context()); err != nil {
				t.Error(err)
			}
			_ = e.l.Close()
		}
		served.Wait()
	})
}
