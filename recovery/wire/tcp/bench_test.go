package tcp

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

// nothing answers at once and touches no data, so that the transport alone is
// measured.
type nothing struct{}

func (nothing) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (nothing) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.XID = req.XID
	rep.Count = uint32(len(req.Bulk))
	rep.HasAttr = req.Op == wire.OpGetattr
	done()
}

func BenchmarkTransport(b *testing.B) {
	for _, how := range []string{"inproc", "plain", "tls"} {
		var c wire.Conn = wire.InProc(nothing{})
		if how != "inproc" {
			bd := newBed(b, how == "tls", nil)
			if err := bd.srv.SetTarget("nothing", nothing{}); err != nil {
				b.Fatal(err)
			}
			c = bd.dial(func(o *DialOptions) { o.Target = "nothing" })
		}
		for _, x := range []struct {
			op   wire.Op
			size int
		}{{wire.OpGetattr, 0}, {wire.OpWrite, 4 << 10}, {wire.OpRead, 1 << 20}, {wire.OpWrite, 1 << 20}} {
			for _, callers := range []int{1, 16} {
				name := fmt.Sprintf("%s/%s-%dK/callers-%d", how, map[wire.Op]string{wire.OpGetattr: "getattr", wire.OpRead: "read", wire.OpWrite: "write"}[x.op], x.size>>10, callers)
				b.Run(name, func(b *testing.B) {
					b.ReportAllocs()
					b.SetBytes(int64(x.size))
					var left atomic.Int64
					left.Store(int64(b.N))
					var wg sync.WaitGroup
					b.ResetTimer()
					for range callers {
						wg.Add(1)
						go func() {
							defer wg.Done()
							req := request(x.op, 1)
							req.Bulk = make([]byte, x.size)
							rep := new(wire.Reply)
							for left.Add(-1) >= 0 {
								rep.Reset()
								if err := c.Call(ctx, req, rep); err != nil || rep.Status != wire.OK {
									b.Error(err, rep.Status)
									return
								}
							}
						}()
					}
					wg.Wait()
					b.StopTimer()
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
				})
			}
		}
	}
}
