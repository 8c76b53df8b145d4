package mdt

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func diskBed(b *testing.B) *bed {
	b.Helper()
	e, err := local.OpenPebble(b.TempDir(), local.Options{})
	if err != nil {
		b.Fatal(err)
	}
	bd := &bed{t: b, e: e}
	bd.openMDT()
	b.Cleanup(bd.close)
	return bd
}

// BenchmarkCreate makes durable creates on a real disk, as an NFS server
// would: with reply records, and with a number of requests outstanding.
func BenchmarkCreate(b *testing.B) {
	for _, outstanding := range []int{1, 32, 64} {
		b.Run(fmt.Sprint("outstanding=", outstanding), func(b *testing.B) {
			bd := diskBed(b)
			dir := bd.mkdir(wire.RootFID, "d")
			type slot struct {
				req  wire.Request
				rep  wire.Reply
				name []byte
			}
			free := make(chan *slot, outstanding)
			var bad atomic.Int64
			for range outstanding {
				free <- &slot{}
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				s := <-free
				s.rep.Reset()
				s.name = fmt.Appendf(s.name[:0], "file%08d", i)
				s.req = wire.Request{
					Header: wire.Header{Op: wire.OpCreate, Client: testClient, Flags: wire.FlagWaitCommit | wire.FlagOpenEpoch},
					Key:    wire.ReplyKey{Addr: [16]byte{1}, Port: 1, XID: uint32(i), Proc: 9, Sum: uint64(i)},
					FID:    dir, Name: s.name, SetAttr: mode(0o644),
				}
				bd.m.Handle(&s.req, &s.rep, func() {
					if s.rep.Status != wire.OK {
						bad.Add(1)
					}
					free <- s
				})
			}
			for range outstanding {
				<-free
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
			st := bd.m.Stats()
			b.ReportMetric(float64(b.N)/float64(max(st.Syncs, 1)), "ops/sync")
			if bad.Load() > 0 {
				b.Fatal(bad.Load(), "creates failed")
			}
		})
	}
}

func BenchmarkTry(b *testing.B) {
	bd := diskBed(b)
	dir := bd.mkdir(wire.RootFID, "dir")
	const n = 1000
	fids := make([]wire.FID, n)
	names := make([][]byte, n)
	for i := range fids {
		names[i] = fmt.Appendf(nil, "file%08d", i)
		rep := &wire.Reply{}
		bd.m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpCreate, Client: testClient}, FID: dir, Name: names[i], SetAttr: mode(0o644)}, rep, func() {})
		fids[i] = rep.Attr.FID
	}
	bench := func(name string, fill func(req *wire.Request, i int)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				rep := &wire.Reply{}
				req := &wire.Request{Header: wire.Header{Client: testClient}}
				for i := 0; pb.Next(); i++ {
					fill(req, i%n)
					if !bd.m.TryHandle(req, rep) || rep.Status != wire.OK {
						b.Error("miss", rep.Status)
						return
					}
				}
			})
		})
	}
	bench("getattr", func(req *wire.Request, i int) { req.Op, req.FID = wire.OpGetattr, fids[i] })
	bench("lookup", func(req *wire.Request, i int) { req.Op, req.FID, req.Name = wire.OpLookup, dir, names[i] })
}

func BenchmarkReaddirPlus(b *testing.B) {
	for _, cached := range []bool{true, false} {
		b.Run(fmt.Sprint("cached=", cached), func(b *testing.B) {
			bd := diskBed(b)
			if !cached {
				if err := bd.m.Close(); err != nil {
					b.Fatal(err)
				}
				bd.o.InodeCache = 64
				bd.openMDT()
			}
			dir := bd.mkdir(wire.RootFID, "dir")
			const n = 10000
			for i := range n {
				bd.m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpCreate, Client: testClient}, FID: dir, Name: fmt.Appendf(nil, "file%08d", i), SetAttr: mode(0o644)}, &wire.Reply{}, func() {})
			}
			b.ReportAllocs()
			b.ResetTimer()
			entries := 0
			rep := &wire.Reply{}
			req := &wire.Request{Header: wire.Header{Op: wire.OpReaddir, Client: testClient}, FID: dir, Count: 32 << 10, Plus: true}
			for range b.N {
				rep.Reset()
				bd.m.Handle(req, rep, func() {})
				entries += len(rep.Entries)
				if req.Cookie = 0; !rep.EOF {
					req.Cookie = rep.Entries[len(rep.Entries)-1].Cookie
				}
			}
			b.ReportMetric(float64(entries)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// BenchmarkModify makes creates that nobody waits for, of a client in this
// process and of one behind recovery, with reply records or reply slots.
func BenchmarkModify(b *testing.B) {
	for _, kind := range []string{"local", "remote", "slot"} {
		b.Run(kind, func(b *testing.B) {
			bd := diskBed(b)
			dir := bd.mkdir(wire.RootFID, "d")
			var name []byte
			rep := &wire.Reply{}
			e := &countOf{}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				rep.Reset()
				name = fmt.Appendf(name[:0], "file%08d", i)
				req := wire.Request{
					Header: wire.Header{Op: wire.OpCreate, Client: testClient, Flags: wire.FlagOpenEpoch, XID: uint64(i + 1), Slot: uint16(i % 64)},
					FID:    dir, Name: name, SetAttr: mode(0o644),
				}
				if kind != "slot" {
					req.Key = wire.ReplyKey{Addr: [16]byte{1}, Port: 1, XID: uint32(i), Proc: 9, Sum: uint64(i)}
				}
				if kind == "local" {
					bd.m.Handle(&req, rep, e.Done)
				} else {
					bd.m.Execute(&req, rep, front.Exec{KeepSlot: kind == "slot"}, e)
				}
				if rep.Status != wire.OK {
					b.Fatal(rep.Status)
				}
			}
			if e.n != b.N {
				b.Fatal(e.n, "answers")
			}
		})
	}
}

type countOf struct{ n int }

func (c *countOf) Executed(recov.Result) bool { return false }
func (c *countOf) Done()                      { c.n++ }
