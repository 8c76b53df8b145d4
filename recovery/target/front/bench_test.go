package front

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// benchBody does as little as a body can.
type benchBody struct {
	fakeBody
	mu      sync.Mutex
	transno uint64
	durable atomic.Uint64
}

func (b *benchBody) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	rep.LastCommitted = b.durable.Load()
	return true
}

func (b *benchBody) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	if req.Op.Modifies() {
		b.mu.Lock()
		b.transno++
		rep.Transno = b.transno
		b.mu.Unlock()
	}
	rep.LastCommitted = b.durable.Load()
	done()
}

func (b *benchBody) Execute(req *wire.Request, rep *wire.Reply, _ Exec, e Execution) {
	b.mu.Lock()
	b.transno++
	rep.Transno = b.transno
	if b.transno%64 == 0 { // as if group commit had run
		b.durable.Store(b.transno - 32)
	}
	e.Executed(recov.Result{Transno: b.transno, PreVersions: [4]uint64{1}})
	b.mu.Unlock()
	rep.LastCommitted = b.durable.Load()
	e.Done()
}

func (b *benchBody) LastCommitted() uint64  { return b.durable.Load() }
func (b *benchBody) VIPEpoch(uint32) uint64 { return 1 }

// BenchmarkFront measures what the front adds to a body that does nothing.
// "body" is the same request given to the body directly.
func BenchmarkFront(b *testing.B) {
	start := func(b *testing.B) (*benchBody, *Front) {
		body := &benchBody{fakeBody: *newBody(b, &disk{})}
		f, err := New(Options{Body: body})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Fail(errDead); <-f.ended })
		return body, f
	}
	join := func(b *testing.B, f *Front, n uint64, local bool) (wire.Target, wire.Request) {
		c := f.Accept(wire.Peer{Node: "n", Session: n, Local: local})
		var req wire.Request
		var rep wire.Reply
		req.Op, req.XID, req.ClientGen = wire.OpConnect, 1, 1
		binary.BigEndian.PutUint64(req.Client[:], n)
		c.Handle(&req, &rep, func() {})
		for f.Status().Recovery.Connected < int(n) {
		}
		req.Op, req.VIP, req.VIPEpoch = wire.OpCreate, 1, 1
		return c, req
	}
	run := func(b *testing.B, t wire.Target, req wire.Request) {
		b.ReportAllocs()
		var rep wire.Reply
		done := func() {}
		for b.Loop() {
			req.XID++
			rep.Reset()
			t.Handle(&req, &rep, done)
		}
		if rep.Status != wire.OK {
			b.Fatal(rep.Status)
		}
	}
	b.Run("modify/body", func(b *testing.B) {
		body, _ := start(b)
		run(b, body, wire.Request{Header: wire.Header{Op: wire.OpCreate}})
	})
	b.Run("modify/local", func(b *testing.B) {
		_, f := start(b)
		c, req := join(b, f, 1, true)
		run(b, c, req)
	})
	b.Run("modify/remote", func(b *testing.B) {
		_, f := start(b)
		c, req := join(b, f, 1, false)
		run(b, c, req)
	})
	b.Run("modify/8 remotes", func(b *testing.B) {
		_, f := start(b)
		var n atomic.Uint64
		var mu sync.Mutex
		b.SetParallelism(4)
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			mu.Lock()
			c, req := join(b, f, n.Add(1), false)
			mu.Unlock()
			var rep wire.Reply
			done := func() {}
			for pb.Next() {
				req.XID++
				rep.Reset()
				c.Handle(&req, &rep, done)
			}
		})
	})
	b.Run("read/body", func(b *testing.B) {
		body, _ := start(b)
		run(b, body, wire.Request{Header: wire.Header{Op: wire.OpGetattr}})
	})
	b.Run("read/remote", func(b *testing.B) {
		_, f := start(b)
		c, req := join(b, f, 1, false)
		req.Op = wire.OpGetattr
		run(b, c, req)
	})
	b.Run("read/try", func(b *testing.B) {
		_, f := start(b)
		c, req := join(b, f, 1, false)
		req.Op = wire.OpGetattr
		var rep wire.Reply
		b.ReportAllocs()
		for b.Loop() {
			if !c.TryHandle(&req, &rep) {
				b.Fatal("not answered")
			}
		}
	})
}
