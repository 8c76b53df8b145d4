package sim

import (
	"context"
	"flag"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

var tracing bool

var (
	simSeed = flag.Uint64("sim.seed", 0, "run one seed, with its events")
	simRuns = flag.Uint64("sim.runs", 2000, "number of seeds")
)

func TestProto(t *testing.T) {
	tracing = testing.Verbose()
	for i := range *simRuns {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, i+1, defaultConfig())
			for _, n := range w.nodes {
				n.start()
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan bool)
			go func() { w.manage(ctx, w.rand("manager")); close(done) }()
			w.mu.Lock()
			for !w.vips[0].ready || !w.vips[1].ready {
				w.cond.Wait()
			}
			fe, ep := w.vips[0].owner, w.vips[0].epoch
			w.mu.Unlock()
			o := client.Owner{VIP: 1, Epoch: ep}
			q := &wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: wire.RootFID, Name: []byte("a"), SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o644}}
			rep := fe.modify(o, q)
			w.trace("create: %v", rep.Status)
			_, _, st := fe.write(o, rep.Attr.FID, 0, []byte("hallo"), wire.Unstable)
			w.trace("write: %v", st)
			_, st = fe.commit(o, rep.Attr.FID)
			w.trace("commit: %v", st)
			time.Sleep(5 * time.Second)
			w.nodes[0].die(false)
			time.Sleep(5 * time.Second)
			w.nodes[0].start()
			time.Sleep(20 * time.Second)
			cancel()
			<-done
			for _, n := range w.nodes {
				n.stop()
			}
			w.zombies.Wait()
			for _, f := range w.problems() {
				t.Error(f)
			}
		})
	}
}
