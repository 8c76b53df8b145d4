package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/wire"
)

// injector makes faults. What it does to a node it ends before it does the next
// thing to it.
type injector struct {
	*cluster
	rng *rand.Rand
	ctx context.Context
	wg  sync.WaitGroup

	mu   sync.Mutex
	busy map[*node]bool
}

// pause is how long messages may be held back without anybody being taken for
// dead, with a margin.
func (w *world) harmless() time.Duration { return w.cfg.recovery.PingTimeout / 4 }

func (in *injector) between(a, b time.Duration) time.Duration {
	in.mu.Lock()
	defer in.mu.Unlock()
	return a + time.Duration(in.rng.Int64N(int64(b-a)+1))
}

func (in *injector) n(k int) int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.rng.IntN(k)
}

// choose takes one of several.
func choose[T any](in *injector, l []T) T { return l[in.n(len(l))] }

// claim takes a node that nothing is done to now; nil if there is none.
func (in *injector) claim() *node {
	in.mu.Lock()
	defer in.mu.Unlock()
	var free []*node
	for _, n := range in.nodes {
		if !in.busy[n] {
			free = append(free, n)
		}
	}
	if len(free) == 0 {
		return nil
	}
	n := pick(in.rng, free)
	in.busy[n] = true
	return n
}

func (in *injector) release(n *node) {
	in.mu.Lock()
	delete(in.busy, n)
	in.mu.Unlock()
}

// on does something to a node for a while.
func (in *injector) on(what string, f func(*node)) {
	n := in.claim()
	if n == nil {
		return
	}
	in.count(what)
	in.trace("--- %s: %s", n.name, what)
	in.wg.Go(func() {
		defer in.release(n)
		f(n)
	})
}

// boot starts a node that is down.
func (n *node) boot() {
	n.w.net.change(func() { n.powered = true })
	n.start()
}

func (d *ostStore) failSync(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mem.FailSync(err)
}

// excuseAll notes that every frontend may lose what is not durable.
func (in *injector) excuseAll(why string) {
	in.excused(wire.ClientID{}, -1, why)
}

// takeOver gives the targets of a node to others.
func (in *injector) takeOver(n *node) {
	l := in.targets()
	if in.cfg.registry != nil {
		l = append(l, mgsName)
	}
	for _, t := range l {
		in.world.mu.Lock()
		if in.home[t] == n {
			var up []*node
			for _, k := range in.nodes {
				if k != n && k.proc != nil {
					up = append(up, k)
				}
			}
			if len(up) > 0 {
				in.home[t] = up[in.n(len(up))]
				in.seen["take-overs"]++
			}
		}
		in.world.cond.Broadcast()
		in.world.mu.Unlock()
	}
}

// everything runs all kinds of faults until ctx ends.
func everything(in *injector) {
	in.busy = map[*node]bool{}
	defer in.wg.Wait()
	evil := in.n(4)
	in.losses(in.n(4) * 5)
	for sleep(in.ctx, in.between(50*time.Millisecond, 6*time.Second)) == nil {
		switch p := in.n(100); {
		case p < 22:
			in.count("cuts")
			k := in.n(3)
			in.net.cutAll(func(c *conn) bool { return in.n(3) <= k })
		case p < 34:
			in.on("killed", func(n *node) { in.down(n, func() { n.die(false) }) })
		case p < 46:
			in.on("power lost", func(n *node) { in.down(n, func() { n.die(true) }) })
		case p < 54:
			in.on("stopped", func(n *node) { in.down(n, n.stop) })
		case p < 62:
			in.move()
		case p < 72:
			in.on("paused", func(n *node) { in.hang(n, evil) })
		case p < 82:
			in.split(evil)
		case p < 86 && evil > 1:
			in.evict()
		case p < 89 && evil > 1:
			in.abort()
		case p < 93 && evil > 2:
			in.badDisk()
		case p < 94:
			in.count("blackouts")
			in.trace("--- power is lost everywhere")
			for _, n := range in.nodes {
				n.die(true)
			}
			_ = sleep(in.ctx, in.between(0, 3*time.Second))
			for _, n := range in.nodes {
				n.boot()
			}
		}
	}
}

// down has a node away for a while.
func (in *injector) down(n *node, end func()) {
	end()
	if in.n(3) == 0 {
		_ = sleep(in.ctx, in.between(0, time.Second))
		in.takeOver(n)
	}
	_ = sleep(in.ctx, in.between(0, 5*time.Second))
	if in.n(8) == 0 {
		_ = sleep(in.ctx, in.between(0, 20*time.Second))
	}
	n.boot()
}

// move gives a target to another node in order.
func (in *injector) move() {
	t := choose(in, in.targets())
	n := choose(in, in.nodes)
	in.count("moves")
	in.trace("--- %s moves to %s", t, n.name)
	in.world.mu.Lock()
	if n.proc != nil {
		in.home[t] = n
	}
	in.world.cond.Broadcast()
	in.world.mu.Unlock()
}

// hang stops a node's network and disk for a while; after a long time others take
// its targets and addresses.
func (in *injector) hang(n *node, evil int) {
	set := func(v bool) { in.net.change(func() { n.paused = v }) }
	set(true)
	if evil == 0 || in.n(2) == 0 {
		_ = sleep(in.ctx, in.between(0, in.harmless()))
		set(false)
		return
	}
	in.excuseAll("a node hung for long")
	in.count("hung for long")
	_ = sleep(in.ctx, in.between(0, 10*time.Second))
	if in.n(2) == 0 {
		in.takeOver(n)
	}
	if fe := n.frontend(); fe != nil && in.n(2) == 0 {
		for _, v := range in.vips {
			in.depose(v, fe)
		}
	}
	_ = sleep(in.ctx, in.between(0, 15*time.Second))
	set(false)
}

// depose has a service address taken from a frontend which is taken for dead.
func (w *world) depose(v *vip, fe *frontend) {
	w.mu.Lock()
	if v.owner == fe {
		v.leave(false)
	}
	w.cond.Broadcast()
	w.mu.Unlock()
}

// split cuts the way between two nodes for a while.
func (in *injector) split(evil int) {
	a, b := choose(in, in.nodes), choose(in, in.nodes)
	if a == b {
		return
	}
	oneWay := in.n(3) == 0
	d := in.between(0, in.harmless())
	if evil > 0 && in.n(2) == 0 {
		d = in.between(0, 25*time.Second)
		in.excuseAll("partitioned for long")
		in.count("partitioned for long")
	}
	in.count("partitions")
	in.trace("--- %s and %s are apart for %v, one way %v", a.name, b.name, d, oneWay)
	set := func(v bool) {
		in.net.change(func() {
			for _, k := range [][2]string{{a.name, b.name}, {b.name, a.name}} {
				if v {
					in.net.blocked[k] = true
				} else {
					delete(in.net.blocked, k)
				}
				if oneWay {
					break
				}
			}
		})
	}
	set(true)
	in.wg.Go(func() {
		_ = sleep(in.ctx, d)
		set(false)
	})
}

// evict is an administrator's order.
func (in *injector) evict() {
	t, n := choose(in, in.targets()), choose(in, in.nodes)
	s := in.running(t)
	if s == nil {
		return
	}
	in.excused(clientID(n.name), -1, "evicted by order")
	in.count("evictions by order")
	in.trace("--- %s evicts the frontend of %s: %v", t, n.name, s.front.Evict(clientID(n.name)))
}

// abort is an administrator's order.
func (in *injector) abort() {
	t := choose(in, in.targets())
	s := in.running(t)
	if s == nil {
		return
	}
	in.excuseAll("recovery was aborted")
	ok := s.front.Abort()
	in.trace("--- recovery of %s is aborted: %v", t, ok)
	if ok {
		in.count("recoveries aborted")
	}
}

// badDisk has an OST's flushes fail for a while.
func (in *injector) badDisk() {
	i := in.n(len(in.osts))
	d := in.osts[i]
	in.excused(wire.ClientID{}, i, "flushes failed")
	in.count("bad disks")
	in.trace("--- flushes of OST %d fail", i)
	in.world.badDisk.Store(true)
	d.failSync(unix.EIO)
	in.wg.Go(func() {
		_ = sleep(in.ctx, in.between(0, 2*time.Second))
		d.failSync(nil)
	})
}

// losses has messages lost with their connections, per mille.
func (in *injector) losses(rate int) {
	if rate == 0 {
		return
	}
	rng := in.world.rand("losses") // under the network's lock
	in.net.change(func() {
		in.net.filter = func(m *message) (v verdict) {
			if m.op == wire.OpPing || rng.IntN(1000) >= rate {
				return v
			}
			in.world.count("messages lost")
			switch rng.IntN(3) {
			case 0:
				v.cut = true
			case 1:
				v.cutAt = true
			default:
				v.delay = time.Duration(rng.IntN(int(3 * time.Second)))
			}
			return v
		}
	})
}

func againRandom(seed uint64) string {
	return fmt.Sprintf("go test ./tests/sim -v -run TestRandom -sim.seed=%d", seed)
}
