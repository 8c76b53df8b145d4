package sim

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/internal/fsck"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// cluster is a world under way, with its cluster manager.
type cluster struct {
	*world
	actors  []*actor
	lockers []*actor
	stop    context.CancelFunc
	done    sync.WaitGroup
}

// simulate runs f on a cluster of its own in simulated time, and reports what was
// wrong; how tells how to do it again.
func simulate(t *testing.T, seed uint64, cfg config, how string, f func(*cluster)) (seen map[string]int) {
	t.Helper()
	return simulateIn(t, seed, cfg, how, nil, f)
}

// simulateIn is simulate; change, unless nil, is called before anything runs.
func simulateIn(t *testing.T, seed uint64, cfg config, how string, change func(*world), f func(*cluster)) (seen map[string]int) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed, cfg)
		if change != nil {
			change(w)
		}
		c := &cluster{world: w}
		for _, n := range w.nodes {
			n.start()
		}
		ctx, cancel := context.WithCancel(context.Background())
		c.stop = cancel
		c.done.Go(func() { w.manage(ctx, w.rand("manager")) })
		limit := time.AfterFunc(cfg.limit, func() { w.hangs(how, "the run does not end") })
		f(c)
		c.shutdown(how)
		limit.Stop()
		seen = w.seen
		if l := w.problems(); len(l) > 0 {
			for _, s := range l {
				t.Error(s)
			}
			t.Errorf("again, with all events: %s", how)
		}
	})
	return seen
}

// hangs ends the program: simulated time would go on for ever.
func (w *world) hangs(how, what string) {
	for _, s := range w.problems() {
		fmt.Fprintln(os.Stderr, s)
	}
	fmt.Fprintf(os.Stderr, "seed %d, after %v: %s\nagain, with all events: %s\n", w.seed, time.Since(w.began), what, how)
	if w.tracing {
		buf := make([]byte, 8<<20)
		os.Stderr.Write(buf[:runtime.Stack(buf, true)])
	}
	os.Exit(1)
}

// serving waits until all service addresses are served.
func (c *cluster) serving() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.vips {
		for !v.ready {
			c.cond.Wait()
		}
	}
}

// addActors makes n clients, the last of which uses a two-node export if two is
// set, and a file that all of them write.
func (c *cluster) addActors(n int, two bool) {
	for i := range n {
		c.actors = append(c.actors, c.newActor(i, n, two && i == n-1))
	}
	c.each(func(a *actor) { a.setup() })
	c.shared = append(c.shared, c.actors[0].share(wire.RootFID, "all"))
}

// each has all clients do something at the same time.
func (c *cluster) each(f func(*actor)) {
	var wg sync.WaitGroup
	for _, a := range c.actors {
		wg.Go(func() { f(a) })
	}
	wg.Wait()
}

// heal ends all that is wrong with nodes, network and disks.
func (c *cluster) heal() {
	c.trace("everything heals")
	c.net.change(func() {
		c.net.filter = nil
		clear(c.net.blocked)
		c.net.work = nil
		for _, n := range c.nodes {
			n.paused, n.slow = false, 0
		}
	})
	for _, d := range c.osts {
		d.failSync(nil)
	}
	for _, n := range c.nodes {
		n.boot()
	}
}

// finish checks that all calls are answered, that everything drains and that what
// there is is what clients have been told.
func (c *cluster) finish() {
	c.each(func(a *actor) { a.settle() })
	if c.rand("finish").IntN(3) == 0 {
		// What is durable survives anything.
		c.trace("--- power is lost everywhere")
		c.count("blackouts")
		for _, n := range c.nodes {
			n.die(true)
		}
		time.Sleep(time.Second)
		c.heal()
		c.serving()
	}
	c.each(func(a *actor) { a.final() })
	c.unlocked()
	for range 120 {
		if c.pending() == "" {
			break
		}
		time.Sleep(500 * time.Millisecond)
	}
	if s := c.pending(); s != "" {
		c.fault("does not come to rest: %s", s)
	}
	c.each(func(a *actor) { a.final() })
}

// pending tells what is not at rest.
func (c *cluster) pending() string {
	for _, t := range c.targets() {
		s := c.running(t)
		if s == nil || !s.front.Status().Serving {
			return t + " does not serve"
		}
	}
	fes := c.frontends()
	if len(fes) < c.cfg.fronts {
		return "frontends are away"
	}
	for _, fe := range fes {
		for i, im := range fe.imports() {
			st := im.Stats()
			if im.State() != imp.Full || st.Uncommitted > 0 || st.Unanswered > 0 || st.Waiting > 0 || st.HeldBytes != 0 {
				return fmt.Sprintf("import %d of %s: %v %+v", i, fe.p.node.name, im.State(), st)
			}
		}
		if n := fe.fs.OpenEpochs(); n > 0 {
			return fmt.Sprintf("%d IO epochs of %s", n, fe.p.node.name)
		}
	}
	m := c.running(mdtName).mdt
	if l, err := m.Body().PendingLogs(0, 100); err != nil || len(l) > 0 {
		return fmt.Sprintf("log records %v, %v", l, err)
	}
	if l, wait, err := m.Body().StaleEpochs(wire.FID{}, 100); err != nil || len(l) > 0 || wait {
		return fmt.Sprintf("IO epochs of clients that are gone: %v, waiting %v, %v", l, wait, err)
	}
	if l := m.Body().PendingFences(); len(l) > 0 {
		return fmt.Sprintf("fences %v", l)
	}
	return ""
}

// shutdown stops everything in order and checks the stores.
func (c *cluster) shutdown(how string) {
	c.stop()
	c.done.Wait()
	for _, n := range c.nodes {
		if fe := n.frontend(); fe != nil {
			fe.stop()
		}
	}
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		wg.Go(n.stop)
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); c.zombies.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(10 * time.Minute):
		c.hangs(how, "the cluster does not stop")
	}
	c.fsck()
}

func (n *node) frontend() *frontend {
	if p := n.process(); p != nil {
		return p.frontend()
	}
	return nil
}

func (c *cluster) fsck() {
	dirs := make([]string, len(c.osts))
	for i := range dirs {
		dirs[i] = ostName(i)
	}
	rep, err := fsck.Open(context.Background(), fsck.OpenOptions{
		MDTDir: "mdt", OSTDirs: dirs, VFS: c.mdt.fs, OSTFS: func(i int) objfs.FS { return c.osts[i].mem },
	})
	if err != nil {
		c.fault("fsck: %v", err)
		return
	}
	for _, f := range rep.Findings {
		if f.Class == fsck.ObjectUnfinished {
			continue // a note that power was lost, there is nothing in it
		}
		// A failed flush may lose what it was to make durable; and when both nodes of a
		// two-node export have died, an IO epoch or a file may be lost whose data are not.
		lossy := slices.ContainsFunc(c.actors, func(a *actor) bool { return a.two && a.isLossy() })
		if (c.badDisk.Load() || lossy) && (f.Class == fsck.ObjectMissing || f.Class == fsck.SizeWrong) || lossy && f.Class == fsck.ObjectOrphan {
			continue
		}
		c.fault("fsck: %+v", f)
	}
}

// watch checks what must hold at any time, until ctx ends.
func (c *cluster) watch(ctx context.Context) {
	// A request that is let in while there is room may fill it.
	most := int64(c.cfg.imports.Hard) + int64(c.cfg.imports.Slots)*(64*cellSize+4096)
	for n := 0; sleep(ctx, 20*time.Millisecond) == nil; n++ {
		if n%8 == 0 {
			c.look()
		}
		for _, fe := range c.frontends() {
			for i, im := range fe.imports() {
				if st := im.Stats(); st.HeldBytes < 0 || st.HeldBytes > most {
					c.fault("import %d of %s holds %d bytes, limit is %d", i, fe.p.node.name, st.HeldBytes, most)
					return
				}
			}
		}
	}
}

// look reads everything that an administrator can see of targets, whatever they are doing:
// it takes no time and nothing of it goes backwards in one life of a target.
func (c *cluster) look() {
	began := time.Now()
	for _, t := range c.targets() {
		s := c.running(t)
		if s == nil {
			continue
		}
		st := s.front.Status()
		r := &st.Recovery
		n := 0
		for _, k := range r.Reconnects {
			n += k
		}
		if r.Connected > r.Registered || r.Finished > r.Clients || n > r.Clients || len(st.Clients) != r.Registered || st.Held < 0 {
			c.fault("%s says of itself: %+v", t, st)
		}
		c.mu.Lock()
		was := c.told[s]
		c.told[s] = told{r.Evicted, r.Replayed, r.LastCommitted}
		c.mu.Unlock()
		if r.Evicted < was.evicted || r.Replayed < was.replayed || r.LastCommitted < was.committed {
			c.fault("%s: what it said before, %+v, was more than %+v", t, was, r)
		}
		if s.mdt != nil {
			_, _, _ = s.mdt.Body().Stats(), s.mdt.Sync().Status(), s.mdt.OSTs()
		} else {
			_ = s.ost.Body().Stats()
		}
	}
	if took := time.Since(began); took > 0 {
		c.fault("looking took %v", took)
	}
}

// told is what a target has said of itself.
type told struct {
	evicted             int
	replayed, committed uint64
}

// schedule runs clients and faults at random.
func schedule(c *cluster, faults func(*injector), ops int) {
	rng := c.rand("schedule")
	c.serving()
	c.addActors(2+rng.IntN(3), rng.IntN(2) == 0)
	if c.cfg.locks {
		c.addLockers(2 + c.rand("lockers").IntN(3))
	}
	pause := time.Duration(20+rng.IntN(300)) * time.Millisecond
	until := time.Now().Add(time.Duration(5+rng.IntN(40)) * time.Second)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	in := &injector{cluster: c, rng: rng, ctx: ctx}
	wg.Go(func() { faults(in) })
	wg.Go(func() { c.watch(ctx) })
	ended := make(chan struct{})
	go func() {
		over := func() bool { return time.Now().After(until) }
		var wg sync.WaitGroup
		for _, a := range c.lockers {
			wg.Go(func() {
				for range ops {
					if over() {
						return
					}
					a.lockStep()
					time.Sleep(time.Duration(a.rng.Int64N(int64(pause))))
				}
			})
		}
		c.each(func(a *actor) { a.run(ops, pause, over) })
		wg.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(time.Until(until)):
	}
	cancel()
	wg.Wait()
	c.heal()
	select {
	case <-ended:
	case <-time.After(5 * time.Minute):
		for _, a := range slices.Concat(c.actors, c.lockers) {
			a.mu.Lock()
			if a.stuck != "" {
				c.fault("%s: %s has had no answer for %v", a.name(), a.stuck, time.Since(a.since))
			}
			a.mu.Unlock()
		}
		c.hangs(fmt.Sprintf("go test ./tests/sim -v -run TestRandom -sim.seed=%d", c.seed), "calls are not answered")
	}
	c.finish()
}
