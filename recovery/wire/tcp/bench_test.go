package tcp

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
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

// blocks is nothing whose data operations are run by workers.
type blocks struct{ nothing }

func (blocks) MayBlock(op wire.Op) bool { return op.IsOST() }

// starter is what imports use.
type starter interface {
	wire.Conn
	Start(req *wire.Request, rep *wire.Reply, done func(error))
}

func cpu() float64 {
	var ru syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return float64(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkTransport compares one path to a target: in this process, over TCP
// and over TLS, by callers that wait for each answer, in Call (call) or after
// Start. Client and server share the processors.
func BenchmarkTransport(b *testing.B) {
	for _, how := range []string{"local", "tcp", "tls"} {
		var c starter = wire.Local(nothing{}, 1)
		if how != "local" {
			bd := newBed(b, how == "tls", nil)
			if err := bd.srv.SetTarget("house", blocks{}); err != nil {
				b.Fatal(err)
			}
			c = bd.bundle(nil)
		}
		for _, x := range []struct {
			name    string
			op      wire.Op
			size    int
			callers []int
		}{
			{"getattr", wire.OpGetattr, 0, []int{1, 16, 64}},
			{"write-4K", wire.OpWrite, 4 << 10, []int{1, 16, 64}},
			{"read-1M", wire.OpRead, 1 << 20, []int{1, 4, 16}},
			{"write-1M", wire.OpWrite, 1 << 20, []int{1, 4, 16}},
		} {
			for _, callers := range x.callers {
				for _, way := range []string{"call", "start"} {
					b.Run(fmt.Sprintf("%s/%s/%d/%s", how, x.name, callers, way), func(b *testing.B) {
						bench(b, c, x.op, x.size, callers, way == "start")
					})
				}
			}
		}
	}
}

func bench(b *testing.B, c starter, op wire.Op, size, callers int, start bool) {
	b.ReportAllocs()
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	used := cpu()
	for range callers {
		wg.Go(func() {
			req := request(op, 1)
			req.Bulk = make([]byte, size)
			rep := new(wire.Reply)
			ch := make(chan error, 1)
			done := func(err error) { ch <- err }
			for left.Add(-1) >= 0 {
				rep.Reset()
				var err error
				if start {
					c.Start(req, rep, done)
					err = <-ch
				} else {
					err = c.Call(ctx, req, rep)
				}
				if err != nil || rep.Status != wire.OK {
					b.Error(err, rep.Status)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric((cpu()-used)/float64(b.N)/1e3, "cpu-µs/op")
	if size >= 1<<20 {
		b.ReportMetric(float64(b.N)*float64(size)/1e6/b.Elapsed().Seconds(), "MB/s")
	} else {
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
	}
}
