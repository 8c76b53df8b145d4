package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
)

// node is a machine.
type node struct {
	w    *world
	name string

	// Under the network's lock.
	paused  bool // nothing gets in or out, and no I/O ends
	powered bool
	slow    time.Duration // what a flush takes longer

	// Under the world's lock.
	boots int
	procs int
	proc  *process
	front bool // it has a frontend
}

// process is one life of the program on a node.
type process struct {
	w    *world
	node *node
	boot string
	num  int
	dead atomic.Bool
	gate sync.RWMutex // held shared while the disk is changed
	ctx  context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	news *ir.Client // nil without a registry

	mu       sync.Mutex
	services map[string]*service
	fe       *frontend
	hears    []func(target string, instance uint64, addr string) // of news
}

// service is a target that runs in a process.
type service struct {
	front *front.Front // of an MDT or OST
	mdt   *host.MDT
	ost   *host.OST
	mgs   *mgs.Service
}

// endpoint is what connections are made to.
type endpoint interface {
	wire.Acceptor
	wire.Target
}

func (s *service) stop(ctx context.Context) error {
	if s.mdt != nil {
		return s.mdt.Stop(ctx)
	}
	return s.ost.Stop(ctx)
}

// service gives the target in service, nil if it does not run here.
func (p *process) service(name string) endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s := p.services[name]; {
	case s == nil:
		return nil
	case s.mgs != nil:
		return s.mgs
	default:
		return s.front
	}
}

func (p *process) get(name string) *service {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.services[name]
}

func (n *node) process() *process {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.proc
}

// start begins a life of the program.
func (n *node) start() *process {
	w := n.w
	w.mu.Lock()
	if n.proc != nil {
		w.mu.Unlock()
		return n.proc
	}
	n.procs++
	p := &process{w: w, node: n, boot: fmt.Sprintf("%s/%d", n.name, n.boots), num: n.procs, services: map[string]*service{}}
	p.ctx, p.end = context.WithCancel(context.Background())
	n.proc = p
	w.mu.Unlock()
	w.trace("%s: process %d starts", n.name, p.num)
	p.watch()
	p.wg.Go(func() { p.host(mdtName) })
	for i := range w.osts {
		p.wg.Go(func() { p.host(ostName(i)) })
	}
	if n.front {
		p.wg.Go(p.serveFrontend)
	}
	return p
}

// host runs a target whenever it is to be on this node.
func (p *process) host(target string) {
	w := p.w
	for p.await(target) {
		ctx, cancel := context.WithCancel(p.ctx)
		failed := make(chan error, 1)
		s, err := p.open(ctx, target, func(err error) { failed <- err })
		if err != nil {
			cancel()
			w.trace("%s: start of %s: %v", p.node.name, target, err)
			w.count("failed starts")
			_ = sleep(p.ctx, 200*time.Millisecond)
			continue
		}
		p.mu.Lock()
		p.services[target] = s
		p.mu.Unlock()
		w.trace("%s: %s serves, %v", p.node.name, target, s.front.State())
		p.announce(target, s.front)
		w.poke()
		clean := false
		select {
		case err := <-failed:
			w.trace("%s: %s failed: %v", p.node.name, target, err)
			w.count("failed targets")
		case <-p.away(ctx, target):
			clean = !p.dead.Load()
		}
		cancel()
		p.withdraw(target)
		p.mu.Lock()
		delete(p.services, target)
		p.mu.Unlock()
		stop, done := context.WithTimeout(context.Background(), 10*time.Second)
		if !clean {
			done()
		}
		err = s.stop(stop)
		done()
		w.trace("%s: %s has stopped (clean %v): %v", p.node.name, target, clean, err)
		// A target forgets the client in its own process when it stops, though in order
		// and though the process goes on: of an OST that client takes what was not durable
		// for lost, and OSTs that start before the MDT knows it again do not wait for it.
		which := -1
		if target != mdtName {
			which = w.ost(target).index
		}
		w.excused(clientID(p.node.name), which, target+" has left the frontend's process")
		p.left(target, err == nil)
		w.poke()
		if p.ctx.Err() == nil {
			_ = sleep(p.ctx, 100*time.Millisecond)
		}
	}
}

// left notes that a store has been closed.
func (p *process) left(target string, clean bool) {
	if target == mdtName {
		p.w.mdt.left(p)
		return
	}
	p.w.ost(target).left(p, clean)
}

// await waits until a target is to be on this node; false when the process ends.
func (p *process) await(target string) bool {
	w := p.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.home[target] != p.node && !p.dead.Load() && p.ctx.Err() == nil {
		w.cond.Wait()
	}
	return !p.dead.Load() && p.ctx.Err() == nil
}

// away is closed when a target is not to be here any more.
func (p *process) away(ctx context.Context, target string) <-chan struct{} {
	ch := make(chan struct{})
	w := p.w
	p.wg.Go(func() {
		defer close(ch)
		w.mu.Lock()
		defer w.mu.Unlock()
		for w.home[target] == p.node && !p.dead.Load() && ctx.Err() == nil {
			w.cond.Wait()
		}
	})
	context.AfterFunc(ctx, w.poke)
	return ch
}

// open starts a target.
func (p *process) open(ctx context.Context, target string, fail func(error)) (*service, error) {
	w := p.w
	own := owner.Options{
		Node: p.node.name, Wait: true, Exclusive: true, Boot: p.boot, Rand: w.reader("owner", p.node.name, p.num, target),
		Interval: w.cfg.ownerInterval, Clock: owner.Clock{Now: nanos, AfterFunc: afterFunc}, Logger: p.logger(target),
	}
	if target == mdtName {
		own.Storage = &ownerStorage{&w.mdt.owner, p}
		m, err := host.StartMDT(ctx, host.MDTOptions{
			Name: mdtName, Dir: "mdt",
			Engine:   local.Options{FS: &mdtFS{d: w.mdt, p: p}, MemTableBytes: 256 << 10, CacheBytes: 1 << 20, MinFreeBytes: -1},
			MDT:      mdt.Options{StripeSize: w.cfg.stripeSize, StripeCount: w.cfg.stripes, Rand: w.uint32s("gen", p.node.name, p.num), InodeCache: 1024, DentryCache: 1024, ReplySlots: 4096},
			Owner:    &own,
			Recovery: w.cfg.recovery, OSTs: p.targets(), Import: w.importConfig(p, target),
			Clock: w.clock.Now, Logger: p.logger(target), OnFail: fail,
		})
		if err != nil {
			return nil, err
		}
		p.hear(m.Notice)
		return &service{front: m.Front(), mdt: m}, nil
	}
	d := w.ost(target)
	own.Storage = &ownerStorage{&d.owner, p}
	t, err := host.StartOST(ctx, host.OSTOptions{
		Name: target,
		OST: ost.Options{
			Index: uint16(d.index), FS: &ostFS{d: d, p: p}, BootID: p.boot, Clock: w.clock.Now, CommitInterval: w.cfg.commitInterval,
			SegShift: w.cfg.segShift, MaxOpenFiles: 64,
		},
		Owner: &own, Recovery: w.cfg.recovery, MDT: p.target(mdtName), Logger: p.logger(target), OnFail: fail,
	})
	if err != nil {
		return nil, err
	}
	return &service{front: t.Front(), ost: t}, nil
}

// target tells how the process reaches a target.
func (p *process) target(name string) client.Target {
	return client.Target{Name: name, Addrs: p.w.addrs(name), Dial: func(ctx context.Context, addr string) (wire.Conn, error) {
		return p.w.net.dial(ctx, p, addr, name)
	}}
}

func (p *process) targets() (l []client.Target) {
	for i := range p.w.osts {
		l = append(l, p.target(ostName(i)))
	}
	return l
}

// storage waits while the node's I/O hangs.
func (p *process) storage() error {
	n := p.w.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for p.node.paused && !p.dead.Load() {
		n.healed.Wait()
	}
	if p.dead.Load() {
		return errDead
	}
	return nil
}

var errDead = errors.New("the process is dead")

// slowDisk passes the time that a flush takes.
func (p *process) slowDisk(rng *rand.Rand, mu *sync.Mutex) {
	if p.storage() != nil {
		return
	}
	mu.Lock()
	d := time.Duration(rng.IntN(int(p.w.cfg.flush)))
	if rng.IntN(100) < 3 {
		d *= 20
	}
	mu.Unlock()
	p.w.net.mu.Lock()
	d += p.node.slow
	p.w.net.mu.Unlock()
	time.Sleep(d)
	_ = p.storage()
}

// die ends the process at once; with power the machine loses what it has in memory.
func (n *node) die(power bool) {
	w := n.w
	w.mu.Lock()
	p := n.proc
	n.proc = nil
	if power {
		n.boots++
	}
	w.mu.Unlock()
	if power {
		w.net.change(func() { n.powered = false })
	}
	if p == nil {
		if power {
			n.lost(&process{w: w, node: n})
		}
		return
	}
	w.trace("%s: process %d dies, power %v", n.name, p.num, power)
	p.gate.Lock()
	p.dead.Store(true)
	p.gate.Unlock()
	w.net.died(p, power)
	w.mdt.died(p, power)
	for _, d := range w.osts {
		d.died(p, power)
	}
	p.end()
	w.net.change(func() { n.paused = false }) // what hung ends
	if fe := p.frontend(); fe != nil {
		fe.died()
	}
	w.poke()
	w.zombies.Go(p.wg.Wait)
}

// lost is the end of power of a node without a process.
func (n *node) lost(p *process) {
	n.w.mdt.died(p, true)
	for _, d := range n.w.osts {
		d.died(p, true)
	}
}

// stop ends the process in order.
func (n *node) stop() {
	w := n.w
	w.mu.Lock()
	p := n.proc
	w.mu.Unlock()
	if p == nil {
		return
	}
	w.trace("%s: process %d is told to stop", n.name, p.num)
	if fe := p.frontend(); fe != nil {
		fe.stop()
	}
	p.end()
	w.poke()
	p.wg.Wait()
	w.mu.Lock()
	if n.proc == p {
		n.proc = nil
	}
	w.mu.Unlock()
	w.trace("%s: process %d has stopped", n.name, p.num)
}
