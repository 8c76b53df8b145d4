package ost

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Everything at once: clients that come and go, fences, epochs, commits, data of
// local and other clients to the same objects, and a stop. Each request gets its
// answer, and what was acknowledged as stable is there.
func TestBodyConcurrently(t *testing.T) {
	m := objfs.NewMem(func() int64 { return time.Now().UnixNano() })
	g := open(t, Options{FS: m, SegShift: 14, MaxOpenFiles: 16, CommitInterval: time.Millisecond})
	var wg sync.WaitGroup
	var answers, asked atomic.Int64
	for w := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 9))
			c := recov.ClientRecord{Client: wire.ClientID{byte(w + 1)}, Gen: 1}
			if err := register(g, c); err != nil {
				t.Error(err)
			}
			var tenure uint64
			for i := range 200 {
				q := writeOf(c, uint64(i+1), fid(uint32(r.IntN(6)*64)), uint64(w)*3000, string(make([]byte, 1+r.IntN(2999))))
				q.Tenure = tenure
				q.VIP, q.VIPEpoch = 1, uint64(i)
				asked.Add(1)
				switch r.IntN(12) {
				case 0:
					q.Op, q.Size, q.LogID = wire.OpPunch, uint64(20000+r.IntN(20000)), uint64(w*1000+i)
				case 1:
					tenure++
					q = &wire.Request{Header: wire.Header{Op: wire.OpFence}, Peer: c.Client, Cookie: tenure}
				case 2:
					g.RaiseVIP(uint32(2+w), uint64(i), func(err error) {
						if err != nil {
							t.Error(err)
						}
						answers.Add(1)
					})
					continue
				case 3:
					c.Gen++
					g.DelClient(c.Client, c.Gen-1, true)
					if err := register(g, c); err != nil {
						t.Error(err)
					}
					answers.Add(1)
					continue
				case 4:
					g.CommitSoon()
					if rep := call(g, &wire.Request{Header: wire.Header{Op: wire.OpSyncObject}, FID: q.FID}); rep.Status != wire.OK {
						t.Error(rep.Status)
					}
					answers.Add(1)
					continue
				case 5:
					want(t, write(g, q.FID, q.Offset, q.Bulk, wire.FileSync), wire.OK)
					answers.Add(1)
					continue
				}
				q.Stable = wire.StableHow(r.IntN(3))
				rep, res := execute(g, q, front.Exec{})
				if rep.Status != wire.OK || res.NotDone {
					t.Errorf("%v: %v", q.Op, rep.Status)
				}
				if lc := g.LastCommitted(); rep.LastCommitted > lc {
					t.Errorf("last committed fell from %d to %d", rep.LastCommitted, lc)
				}
				n := rep.Transno
				if !g.WaitCommit(n, rep, func() {
					if rep.Status != wire.OK || rep.LastCommitted < n {
						t.Errorf("waited for %d: %v, %d is committed", n, rep.Status, rep.LastCommitted)
					}
					answers.Add(1)
				}) {
					answers.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if err := g.PutTarget(recov.TargetRecord{Instance: 1, Clean: true}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); answers.Load() != asked.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d answers to %d requests", answers.Load(), asked.Load())
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if n := g.openFDs.Load(); n != 0 {
		t.Fatalf("%d descriptors leaked", n)
	}
}
