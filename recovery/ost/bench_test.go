package ost

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// pump keeps depth requests outstanding until n are done, as a frontend with
// callbacks does.
func pump(b *testing.B, g *Target, depth int, fill func(r *rand.Rand, q *wire.Request)) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for w := range depth {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(uint64(w), 1))
			req, rep := &wire.Request{}, &wire.Reply{}
			ch := make(chan struct{}, 1)
			done := func() { ch <- struct{}{} }
			for left.Add(-1) >= 0 {
				req.Reset()
				rep.Reset()
				fill(r, req)
				if !g.TryHandle(req, rep) {
					g.Handle(req, rep, done)
					<-ch
				}
				if rep.Status != wire.OK {
					b.Error(rep.Status)
					return
				}
			}
		}()
	}
	wg.Wait()
	b.StopTimer()
}

func benchTarget(b *testing.B) *Target {
	g := open(b, Options{Dir: b.TempDir(), CommitInterval: 2e9})
	b.Cleanup(func() {
		if err := g.Close(); err != nil {
			b.Error(err)
		}
	})
	return g
}

func fillFile(b *testing.B, g *Target, size int) {
	buf := make([]byte, 1<<20)
	for off := 0; off < size; off += len(buf) {
		want(b, write(g, fid(1), uint64(off), buf, wire.Unstable), wire.OK)
	}
	want(b, op(g, wire.OpSyncObject, fid(1)), wire.OK)
}

func benchWrite(b *testing.B, depth int, st wire.StableHow) {
	g := benchTarget(b)
	fillFile(b, g, 64<<20)
	buf := make([]byte, 4096)
	b.SetBytes(4096)
	b.ReportAllocs()
	pump(b, g, depth, func(r *rand.Rand, q *wire.Request) {
		q.Op, q.FID, q.Offset, q.Bulk, q.Stable = wire.OpWrite, fid(1), uint64(r.IntN(16<<10))*4096, buf, st
	})
	if st != wire.Unstable {
		b.ReportMetric(float64(g.Stats().Flushes)/float64(b.N), "flushes/op")
	}
}

func BenchmarkWrite4K1(b *testing.B)          { benchWrite(b, 1, wire.Unstable) }
func BenchmarkWrite4K32(b *testing.B)         { benchWrite(b, 32, wire.Unstable) }
func BenchmarkWrite4KFileSync1(b *testing.B)  { benchWrite(b, 1, wire.FileSync) }
func BenchmarkWrite4KFileSync32(b *testing.B) { benchWrite(b, 32, wire.FileSync) }

// benchExecution is an execution of which somebody waits for the end.
type benchExecution struct{ ch chan struct{} }

func (*benchExecution) Executed(recov.Result) bool { return false }
func (e *benchExecution) Done()                    { e.ch <- struct{}{} }

// BenchmarkExecute4K1 is a remote client's write.
func BenchmarkExecute4K1(b *testing.B) {
	g := benchTarget(b)
	fillFile(b, g, 64<<20)
	c := remote(b, g, 1)
	buf := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 1))
	req, rep, e := &wire.Request{}, &wire.Reply{}, &benchExecution{make(chan struct{}, 1)}
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		req.Reset()
		rep.Reset()
		req.Header = wire.Header{Op: wire.OpWrite, Client: c.Client, ClientGen: 1, XID: uint64(i) + 1, Slot: uint16(i % 64)}
		req.FID, req.Offset, req.Bulk = fid(1), uint64(r.IntN(16<<10))*4096, buf
		g.Execute(req, rep, front.Exec{}, e)
		<-e.ch
		if rep.Status != wire.OK {
			b.Fatal(rep.Status)
		}
	}
}

// BenchmarkWrite4KFileSyncOld32 overwrites blocks of 32 objects.
func BenchmarkWrite4KFileSyncOld32(b *testing.B) {
	g := benchTarget(b)
	buf := make([]byte, 8<<20)
	for i := range uint32(32) {
		want(b, write(g, fid(i+1), 0, buf, wire.FileSync), wire.OK)
	}
	buf = buf[:4096]
	var next atomic.Uint32
	pump(b, g, 32, func(r *rand.Rand, q *wire.Request) {
		q.Op, q.FID, q.Offset, q.Bulk, q.Stable = wire.OpWrite, fid(next.Add(1)%32+1), uint64(r.IntN(2048))*4096, buf, wire.FileSync
	})
	b.ReportMetric(float64(g.Stats().Flushes)/float64(b.N), "flushes/op")
}

// BenchmarkWrite4KFileSyncFiles32 makes a new object with every stable write.
func BenchmarkWrite4KFileSyncFiles32(b *testing.B) {
	g := benchTarget(b)
	buf := make([]byte, 4096)
	var next atomic.Uint32
	pump(b, g, 32, func(r *rand.Rand, q *wire.Request) {
		q.Op, q.FID, q.Bulk, q.Stable = wire.OpWrite, fid(next.Add(1)), buf, wire.FileSync
	})
}

func BenchmarkWrite1MSync(b *testing.B) {
	g := benchTarget(b)
	buf := make([]byte, 1<<20)
	r := rand.New(rand.NewPCG(1, 1))
	for i := range buf {
		buf[i] = byte(r.Uint32()) // some disks are quick with zeros
	}
	b.SetBytes(1 << 20)
	for n := range b.N {
		rep := write(g, fid(1), uint64(n%1024)<<20, buf, wire.Unstable)
		want(b, rep, wire.OK)
		if n%32 == 31 || n == b.N-1 {
			want(b, op(g, wire.OpSyncObject, fid(1)), wire.OK)
		}
	}
}

func benchRead(b *testing.B, n, depth int) {
	g := benchTarget(b)
	fillFile(b, g, 64<<20)
	bufs := sync.Pool{New: func() any { p := make([]byte, n); return &p }}
	b.SetBytes(int64(n))
	b.ReportAllocs()
	pump(b, g, depth, func(r *rand.Rand, q *wire.Request) {
		p := bufs.Get().(*[]byte)
		q.Op, q.FID, q.Offset, q.Bulk = wire.OpRead, fid(1), uint64(r.IntN(64<<20/n)*n), *p
		bufs.Put(p) // what is read is not looked at
	})
}

func BenchmarkRead4K1(b *testing.B)  { benchRead(b, 4096, 1) }
func BenchmarkRead4K32(b *testing.B) { benchRead(b, 4096, 32) }
func BenchmarkRead1M1(b *testing.B)  { benchRead(b, 1<<20, 1) }

func BenchmarkObjAttr(b *testing.B) {
	g := benchTarget(b)
	fillFile(b, g, 1<<20)
	b.ReportAllocs()
	pump(b, g, 1, func(r *rand.Rand, q *wire.Request) { q.Op, q.FID = wire.OpObjAttr, fid(1) })
}
