// Package sim runs whole clusters in simulated time: real targets behind real
// recovery on disks that can lose power, real frontends over real imports, NFS
// clients that send their calls again until they are answered, and a network that
// loses, delays and cuts. Everything that happens by chance comes from a seed.
package sim

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

const mdtName = "MDT0000"

func ostName(i int) string { return fmt.Sprintf("OST%04x", i) }

// config is what a run is made of.
type config struct {
	osts, fronts, vips int
	apart              bool // targets and frontends on nodes of their own
	stripes            uint8
	stripeSize         uint32
	segShift           uint8
	clients            int  // of a named scenario
	locks              bool // some clients take locks

	recovery       recov.Config
	imports        imp.Config
	ownerInterval  time.Duration
	commitInterval time.Duration
	epochIdle      time.Duration
	patience       time.Duration
	stopTime       time.Duration
	flush          time.Duration // longest usual flush
	slowest        time.Duration // longest usual delay of a message
	keepalive      time.Duration // when an end notices that the other one's machine is gone
	registry       *registryConfig
	limit          time.Duration // of a run
}

func defaultConfig() config {
	return config{
		osts: 2, fronts: 2, vips: 2, clients: 2, stripes: 1, stripeSize: 64 << 10, segShift: 17,
		recovery: recov.Config{
			SoftMin: 4 * time.Second, SoftMax: 8 * time.Second, Hard: 30 * time.Second, Step: 2 * time.Second,
			PingInterval: time.Second, PingTimeout: 8 * time.Second, MaxSlots: 16, CommitOnShare: true,
		},
		imports: imp.Config{
			Slots: 8, Soft: 64 << 10, Hard: 192 << 10, PingInterval: time.Second, DeadAfter: 3 * time.Second, ConnectTimeout: time.Second,
			BackoffMin: 20 * time.Millisecond, BackoffMax: time.Second, RetryDelay: 200 * time.Millisecond,
		},
		ownerInterval: time.Second, commitInterval: time.Second, epochIdle: 500 * time.Millisecond, patience: 10 * time.Second, stopTime: 20 * time.Second,
		flush: 4 * time.Millisecond, slowest: 100 * time.Millisecond, keepalive: 6 * time.Second, limit: time.Hour,
	}
}

// world is a cluster and what is known of it from outside.
type world struct {
	t       *testing.T
	seed    uint64
	cfg     config
	tracing bool
	clock   clock.Strict
	net     *network
	mdt     *mdtStore
	osts    []*ostStore
	nodes   []*node
	began   time.Time
	zombies sync.WaitGroup
	badDisk atomic.Bool // there was one

	mu     sync.Mutex
	cond   *sync.Cond // home, vips, processes
	home   map[string]*node
	gens   map[string]uint64
	vips   []*vip
	faults []string
	seen   map[string]int
	told   map[*service]told // by targets about themselves
	excuse map[excuse]string // why a frontend may lose data that only it had
	fids   map[wire.FID]string
	shared []*sharedFile
	optOut map[string]bool // nodes and targets that take no part in imperative recovery
	// Locks that clients believe to have, and that they wait for.
	locked, wanted []*lock
	lockFile       *lockedFile
	callLoss       *rand.Rand    // callbacks
	calm           chan struct{} // closed when there are to be no more callbacks

	history history
}

// excuse is for a frontend, all if zero, and an OST, all if negative.
type excuse struct {
	fe  wire.ClientID
	ost int
}

// vip is a service address, as the registry has it.
type vip struct {
	index uint32
	epoch uint64
	owner *frontend // nil: nobody serves it
	clean bool      // the last owner has stopped in order
	ready bool      // the owner may answer
	nsm   uint32    // the NSM state
	verf  uint64
	moved chan struct{} // closed when connections to the owner end
}

func newWorld(t *testing.T, seed uint64, cfg config) *world {
	w := &world{
		t: t, seed: seed, cfg: cfg, tracing: tracing, began: time.Now(), home: map[string]*node{}, gens: map[string]uint64{},
		seen: map[string]int{}, excuse: map[excuse]string{}, fids: map[wire.FID]string{}, optOut: map[string]bool{},
		calm: make(chan struct{}), told: map[*service]told{},
	}
	w.callLoss = w.rand("callbacks")
	w.cond = sync.NewCond(&w.mu)
	w.net = newNetwork(w)
	w.mdt = newMDTStore(w)
	for i := range cfg.osts {
		w.osts = append(w.osts, newOSTStore(w, i))
	}
	n := cfg.fronts
	if cfg.apart {
		n += cfg.osts + 1
		if cfg.registry != nil {
			n++
		}
	}
	n = max(n, 2)
	for i := range n {
		w.nodes = append(w.nodes, &node{w: w, name: fmt.Sprintf("n%d", i), powered: true, front: i < cfg.fronts})
	}
	at := 0
	if cfg.apart {
		at = cfg.fronts
	}
	w.home[mdtName] = w.nodes[at%n]
	for i := range w.osts {
		at++
		w.home[ostName(i)] = w.nodes[at%n]
	}
	if cfg.registry != nil {
		w.home[mgsName] = w.nodes[n-1]
	}
	for i := range cfg.vips {
		w.vips = append(w.vips, &vip{index: uint32(i + 1), verf: uint64(1000*(i+1)) + 1, clean: true, nsm: 1, moved: make(chan struct{})})
	}
	return w
}

func (w *world) node(name string) *node {
	for _, n := range w.nodes {
		if n.name == name {
			return n
		}
	}
	panic("no node " + name)
}

func (w *world) ost(target string) *ostStore {
	for i, d := range w.osts {
		if ostName(i) == target {
			return d
		}
	}
	panic("no target " + target)
}

// addrs are the nodes on which a target may be.
func (w *world) addrs(string) (l []string) {
	for _, n := range w.nodes {
		l = append(l, n.name)
	}
	return l
}

// targets are all targets.
func (w *world) targets() []string {
	l := []string{mdtName}
	for i := range w.osts {
		l = append(l, ostName(i))
	}
	return l
}

// running gives the target in service, nil if it is not.
func (w *world) running(target string) *service {
	w.mu.Lock()
	h := w.home[target]
	w.mu.Unlock()
	if p := h.process(); p != nil {
		return p.get(target)
	}
	return nil
}

// poke has everybody look again who waits for something of the world.
func (w *world) poke() {
	w.mu.Lock()
	w.cond.Broadcast()
	w.mu.Unlock()
}

// fault notes that something is wrong.
func (w *world) fault(format string, a ...any) {
	s := fmt.Sprintf(format, a...)
	w.trace("FAULT %s", s)
	w.mu.Lock()
	w.faults = append(w.faults, fmt.Sprintf("at %.6f: %s", time.Since(w.began).Seconds(), s))
	w.mu.Unlock()
}

func (w *world) count(what string) {
	w.mu.Lock()
	w.seen[what]++
	w.mu.Unlock()
}

func (w *world) trace(format string, a ...any) {
	if w.tracing {
		w.t.Logf("%11.6f "+format, append([]any{time.Since(w.began).Seconds()}, a...)...)
	}
}

// traceLog puts what the program logs into the trace.
type traceLog struct {
	w    *world
	name string
}

func (l traceLog) Write(b []byte) (int, error) {
	l.w.trace("%s: %s", l.name, strings.TrimSpace(string(b)))
	return len(b), nil
}

func (p *process) logger(what string) *slog.Logger {
	if !p.w.tracing {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(traceLog{p.w, p.node.name}, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}})).With("in", what)
}

// rand gives a source of chance of its own, by name.
func (w *world) rand(what ...any) *rand.Rand {
	return rand.New(rand.NewPCG(w.seed, hash(what...)))
}

type randReader struct{ r *rand.Rand }

func (r randReader) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(r.r.Uint32())
	}
	return len(b), nil
}

func (w *world) reader(what ...any) io.Reader { return randReader{w.rand(what...)} }

func (w *world) uint32s(what ...any) func() uint32 {
	r := w.rand(what...)
	return r.Uint32 // called under the target's lock
}

func (w *world) importConfig(p *process, what string) imp.Config {
	c := w.cfg.imports
	var mu sync.Mutex
	r := w.rand("jitter", p.node.name, p.num, what)
	c.Jitter = func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(r.Int64N(int64(d)/2 + 1))
	}
	return c
}

// nanos is the steady clock; it is never 0.
func nanos() int64 { return time.Now().UnixNano() }

func afterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// The registry.

// nextGen numbers the lives of a node's frontend.
func (w *world) nextGen(node string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gens[node]++
	return w.gens[node]
}

func (w *world) verifier(vip uint32) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.vips[vip-1].verf
}

// verifierChange is a frontend's report of lost data.
func (w *world) verifierChange(fe *frontend, why string, ost int) {
	w.mu.Lock()
	for _, v := range w.vips {
		if v.owner == fe {
			v.verf++
		}
	}
	var excused string
	for _, e := range [...]excuse{{fe.id, ost}, {fe.id, -1}, {wire.ClientID{}, ost}, {wire.ClientID{}, -1}} {
		if excused == "" {
			excused = w.excuse[e]
		}
	}
	w.seen["verifier changes"]++
	w.mu.Unlock()
	fe.end()
	w.trace("%s: verifiers change: %s (%s)", fe.p.node.name, why, excused)
	if excused == "" {
		w.fault("%s: verifiers change though nothing can be lost: %s", fe.p.node.name, why)
	}
}

// excused notes why data that only a frontend had may be lost.
func (w *world) excused(fe wire.ClientID, ost int, why string) {
	w.mu.Lock()
	w.excuse[excuse{fe, ost}] = why
	w.mu.Unlock()
}

// evicted is a frontend's report that the MDT has forgotten it.
func (w *world) evicted(fe *frontend, lost int) {
	w.count("evictions by the MDT")
	w.trace("%s: evicted by the MDT, %d lost", fe.p.node.name, lost)
	if lost > 0 {
		fe.end()
	}
}

// deadFrontend: nobody has stopped it, so what only it had is lost.
func (w *world) deadFrontend(fe *frontend) {
	w.mu.Lock()
	for _, v := range w.vips {
		if v.owner == fe {
			v.leave(false)
		}
	}
	w.cond.Broadcast()
	w.mu.Unlock()
}

func (w *world) stoppedFrontend(fe *frontend) {
	w.mu.Lock()
	for _, v := range w.vips {
		if v.owner == fe {
			v.leave(fe.stopErr == nil)
		}
	}
	w.cond.Broadcast()
	w.mu.Unlock()
}

// leave ends a period of service. The world's lock is held.
func (v *vip) leave(clean bool) {
	v.owner, v.ready, v.clean = nil, false, clean
	close(v.moved)
	v.moved = make(chan struct{})
}

// serve gives a service address to a frontend; whoever has it now is declared gone.
func (w *world) serve(v *vip, fe *frontend) {
	w.mu.Lock()
	v.epoch++
	epoch := v.epoch
	if v.owner != nil {
		v.leave(false)
	}
	crashed := !v.clean
	if crashed {
		v.verf++
		v.nsm += 2
	}
	nsm, moved := v.nsm, v.moved
	v.owner, v.ready, v.clean = fe, false, false
	w.cond.Broadcast()
	w.mu.Unlock()
	w.trace("%s: takes address %d, epoch %d", fe.p.node.name, v.index, epoch)
	st := fe.raise(v.index, epoch)
	if w.cfg.locks && st == wire.OK {
		if st = fe.beginLocks(v.index, epoch, nsm, crashed); st == wire.OK {
			fe.collectGrants(v, epoch, moved)
		}
	}
	w.mu.Lock()
	if v.owner == fe && v.epoch == epoch && st == wire.OK {
		v.ready = true
		w.trace("%s: serves address %d, epoch %d", fe.p.node.name, v.index, epoch)
	}
	w.cond.Broadcast()
	w.mu.Unlock()
}

// manage keeps every service address on some frontend, until ctx ends: what a
// cluster manager does.
func (w *world) manage(ctx context.Context, rng *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	asked := map[*vip]*frontend{}
	for {
		for _, v := range w.vips {
			w.mu.Lock()
			free := v.owner == nil
			w.mu.Unlock()
			if !free {
				continue
			}
			fes := w.frontends()
			if len(fes) == 0 {
				continue
			}
			fe := fes[(int(v.index)-1)%len(fes)]
			if rng.IntN(3) == 0 {
				fe = fes[rng.IntN(len(fes))]
			}
			asked[v] = fe
			wg.Go(func() { w.serve(v, fe) })
			_ = sleep(ctx, time.Millisecond)
		}
		if sleep(ctx, time.Duration(100+rng.IntN(400))*time.Millisecond) != nil {
			return
		}
	}
}

// frontends lists those that are up and not cut off, by node.
func (w *world) frontends() (l []*frontend) {
	for _, n := range w.nodes {
		if p := n.process(); p != nil && !n.isPaused() {
			if fe := p.frontend(); fe != nil && !fe.isOver() {
				l = append(l, fe)
			}
		}
	}
	return l
}

func (n *node) isPaused() bool {
	n.w.net.mu.Lock()
	defer n.w.net.mu.Unlock()
	return n.paused
}

func (fe *frontend) isOver() bool {
	fe.mu.Lock()
	defer fe.mu.Unlock()
	return fe.over
}

// problems gives what is wrong so far.
func (w *world) problems() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.faults)
}
