package health

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// meter counts what connections carry.
type meter struct{ bytes atomic.Int64 }

type metered struct {
	net.Conn
	m *meter
}

func (c *metered) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.m.bytes.Add(int64(n))
	return n, err
}

func (c *metered) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.m.bytes.Add(int64(n))
	return n, err
}

func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkNoise is what the beats of a cluster cost, at 5 per second, on the loopback interface
// without TLS: bytes in both directions, messages, and the CPU time of all nodes together. In a mesh each node holds
// state on all others; in a star the first four are what the others hold state on. One operation is two
// seconds: run it with -benchtime 1x.
func BenchmarkNoise(b *testing.B) {
	for _, c := range []struct {
		shape          string
		nodes, targets int
	}{
		{"mesh", 2, 1}, {"mesh", 4, 1}, {"mesh", 8, 1}, {"mesh", 16, 1}, {"mesh", 32, 1}, {"mesh", 64, 1}, {"mesh", 8, 8}, {"mesh", 8, 64},
		{"star", 8, 1}, {"star", 16, 1}, {"star", 32, 1}, {"star", 64, 1}, {"star", 64, 64}, {"none", 64, 64},
	} {
		b.Run(fmt.Sprintf("%s/nodes=%d/targets=%d", c.shape, c.nodes, c.targets), func(b *testing.B) {
			var m meter
			names := make([]string, c.nodes)
			addrs := map[string]string{}
			listeners := make([]net.Listener, c.nodes)
			for i := range names {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					b.Fatal(err)
				}
				names[i], listeners[i] = fmt.Sprintf("node%02d", i), l
				addrs[names[i]] = l.Addr().String()
			}
			pairs := 0
			nodes, servers := make([]*Health, c.nodes), make([]*tcp.Server, c.nodes)
			for i, name := range names {
				local := Local{VIPs: []VIP{{uint32(i), 1}}}
				var peers []string
				for j, peer := range names {
					if j == i {
						continue
					}
					peers = append(peers, peer)
					if c.shape == "mesh" || c.shape == "star" && (i < 4 || j < 4) {
						local.Peers = append(local.Peers, peer)
						if i < j {
							pairs++
						}
					}
				}
				for k := range c.targets {
					local.Targets = append(local.Targets, Target{Name: fmt.Sprintf("n%02d-ost%02d", i, k), Instance: 1, State: Serving})
				}
				h, err := Start(Options{
					Config: Config{Node: name, Peers: peers, Incarnation: 1, Lower: time.Minute}, Local: func() Local { return local },
					Dial: Dial(func(node string) tcp.DialOptions {
						return tcp.DialOptions{
							Addrs: []tcp.Endpoint{{Addr: addrs[node], Node: node}}, Node: name, Insecure: true,
							DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
								var d net.Dialer
								c, err := d.DialContext(ctx, network, addr)
								if err != nil {
									return nil, err
								}
								return &metered{c, &m}, nil
							},
						}
					}),
				})
				if err != nil {
					b.Fatal(err)
				}
				srv, err := tcp.NewServer(map[string]wire.Target{TargetName: h.Target()}, tcp.ServerOptions{Node: name, Insecure: true})
				if err != nil {
					b.Fatal(err)
				}
				go func() { _ = srv.Serve(listeners[i]) }()
				nodes[i], servers[i] = h, srv
			}
			b.Cleanup(func() {
				gone, cancel := context.WithCancel(context.Background())
				cancel()
				var wg sync.WaitGroup
				for i := range nodes {
					wg.Go(func() {
						nodes[i].Close()
						_ = servers[i].Close(gone)
					})
				}
				wg.Wait()
			})
			alive := func() (n int) {
				for _, h := range nodes {
					for _, p := range h.Status() {
						if p.State == StateAlive {
							n++
						}
					}
				}
				return n
			}
			for end := time.Now().Add(time.Minute); alive() != 2*pairs; time.Sleep(500 * time.Millisecond) {
				if time.Now().After(end) {
					b.Skipf("%d of %d peers are heard after a minute: this machine has too little time for so many nodes", alive(), 2*pairs)
				}
			}
			time.Sleep(500 * time.Millisecond)
			b.ResetTimer()
			bytes, used, began := m.bytes.Load(), cpu(), time.Now()
			for range b.N {
				time.Sleep(2 * time.Second)
			}
			span := time.Since(began).Seconds()
			b.ReportMetric(float64(pairs), "pairs")
			b.ReportMetric(float64(m.bytes.Load()-bytes)/span, "bytes/s")
			b.ReportMetric((cpu()-used).Seconds()*1000/span, "cpu-ms/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}
