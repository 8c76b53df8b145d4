// Package vipagent brings the floating addresses of a node to what the registry says.
// One goroutine follows the registry, and one for each address takes it, serves it, and
// gives it up (decide.go says when, package failover how). The agent tells the nodes
// that may be next which connections an address has, and acts when somebody else turns
// out to be its owner. While the registry is away everything stays as it is.
package vipagent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
)

// Registry is what the agent needs of mgs.Registry and mgs.Floating.
type Registry interface {
	mgs.Floating
	Stopped(ctx context.Context, index uint32, epoch uint64) error
	Abandoned(ctx context.Context, index uint32, epoch uint64) error
}

// Unit is what is served at one address; it is used once.
type Unit interface {
	failover.Service
	// Listen opens the listeners; with absent the machine need not have the address.
	Listen(absent bool) error
	// Begin begins the period of service that the registry has given. After a crash
	// (v.Crashed) it sees to it that clients send unstable data again.
	Begin(ctx context.Context, v mgs.VIP) error
	Serve() error
	Notify(ctx context.Context) (failover.Notified, error)
	// Mute comes in Finish's place when the machine still has the address: nothing that
	// comes to its ports is answered, until Finish.
	Mute(ctx context.Context) error
	// Changed gets a value after connections have come or gone.
	Changed() <-chan struct{}
}

// Options are what an Agent needs; all but the last group are required.
type Options struct {
	// Node is this node, Others are all others of the cluster.
	Node     string
	Others   []string
	Registry Registry
	Net      vip.Net
	// New makes the services of an address.
	New func(addr netip.Addr) Unit
	// Ask asks another node (MethodConns, MethodKnown).
	Ask    func(ctx context.Context, node, method string, args, result any) error
	Events *events.Log
	Log    *slog.Logger

	// Refuse is what becomes of new connections while an address is given up.
	Refuse failover.Refuse
	// Closing is how connections end: HalfClose, or Quiet where somebody who may take
	// the address next knows them.
	Closing   failover.Closing
	Deadlines failover.Deadlines
	// Given is the file in which addresses that a cluster manager adds and removes are
	// recorded; empty: they are known to this process only.
	Given string
	// Retry is the pause after a failure, which doubles up to RetryMax. Default 500 ms
	// and 15 s.
	Retry, RetryMax time.Duration
}

// Times that need no setting.
const (
	registryTime = 5 * time.Second        // a call of the registry
	askTime      = 300 * time.Millisecond // a question to other nodes that clients wait for
	knownTime    = time.Second            // a question to another node that nothing waits for
	tellPause    = 50 * time.Millisecond  // changes of connections are put together this long
	tellAgain    = time.Second            // whether a node has the list of connections is asked this often
	beginTime    = 30 * time.Second       // targets may be in recovery when an address is taken
	holdTime     = 10 * time.Minute       // listeners hold the ports for a cluster manager
)

// Agent is the agent of a node. Its methods are safe for concurrent use.
type Agent struct {
	o     Options
	log   *slog.Logger
	book  book
	given givenFile
	// runner does the moves.
	runner *failover.Runner

	ctx    context.Context // ends the following of the registry
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// views counts how often the registry was asked by follow.
	views atomic.Uint64

	// mu comes before a keeper's.
	mu      sync.Mutex
	keepers map[uint32]*keeper
	leaving bool
	last    bool
	changed chan struct{} // closed and replaced when an address is in another state
}

// New returns an agent that does nothing yet; HandleConns works.
func New(o Options) *Agent {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Retry <= 0 {
		o.Retry = 500 * time.Millisecond
	}
	if o.RetryMax <= 0 {
		o.RetryMax = 15 * time.Second
	}
	o.Ask = inParts(o.Ask)
	a := &Agent{o: o, log: o.Log, runner: &failover.Runner{Net: o.Net, Log: o.Events}, keepers: map[uint32]*keeper{}, changed: make(chan struct{})}
	a.given.path = o.Given
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a
}

// Clean takes away the addresses that an earlier process of this node has left, of those
// in only if that is not nil: nobody serves them. It is to be called before anything
// listens. Without a socket a client's connection cannot be taken for one of theirs
// later.
func Clean(ctx context.Context, n vip.Net, only []netip.Addr, log *slog.Logger) error {
	l, err := n.Added()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range l {
		addr := a.Prefix.Addr()
		if only != nil && !slices.Contains(only, addr) {
			continue
		}
		k, err := n.Destroy(ctx, addr)
		if err != nil {
			log.Warn("sockets of an address that an earlier process has left", "address", addr, "err", err)
		}
		if err = n.Remove(ctx, a); err != nil {
			errs = append(errs, err)
			continue
		}
		log.Info("an address that an earlier process has left was removed; it comes back when the registry gives it to this node", "address", addr, "sockets", k)
	}
	return errors.Join(errs...)
}

// Start begins to follow the registry.
func (a *Agent) Start() { a.wg.Go(a.follow) }

// follow brings what the registry says to the keepers.
func (a *Agent) follow() {
	pause, told := a.o.Retry, false
	for rev := ""; a.ctx.Err() == nil; {
		asked := a.views.Add(1)
		v, err := a.o.Registry.Watch(a.ctx, rev)
		if err != nil {
			if a.ctx.Err() != nil {
				return
			}
			if !told {
				told = true
				a.log.Warn("the registry does not tell of floating addresses; they stay as they are", "err", err)
			}
			wait(a.ctx, pause)
			pause = min(2*pause, a.o.RetryMax)
			continue
		}
		if told {
			a.log.Info("the registry tells of floating addresses again")
		}
		pause, told, rev = a.o.Retry, false, v.Rev
		a.apply(&v)
		a.forget(&v, asked)
	}
}

// wait waits unless ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (a *Agent) apply(v *mgs.View) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range v.VIPs {
		x := &v.VIPs[i]
		if x.Bits == 0 {
			continue // fixed
		}
		a.keeper(x).update(x)
	}
	a.changedNow()
}

// forget takes note of the addresses that a view does not have any more. It is of follow's
// question with a number; answers to others may have told of an address since.
func (a *Agent) forget(v *mgs.View, asked uint64) {
	there := map[uint32]bool{}
	for i := range v.VIPs {
		there[v.VIPs[i].Index] = v.VIPs[i].Bits != 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, k := range a.keepers {
		if !there[i] {
			k.removed(asked)
		}
	}
}

// keeper gives that of an address. a.mu is held.
func (a *Agent) keeper(v *mgs.VIP) *keeper {
	k := a.keepers[v.Index]
	if k == nil {
		k = newKeeper(a, v)
		a.keepers[v.Index] = k
		if a.ctx.Err() == nil { // else Stop waits already
			a.wg.Go(k.run)
		}
	}
	return k
}

// find gives the keeper of an address, nil if there is none.
func (a *Agent) find(addr netip.Addr) *keeper {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range a.keepers {
		if k.addr == addr {
			return k
		}
	}
	return nil
}

func (a *Agent) all() []*keeper {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := make([]*keeper, 0, len(a.keepers))
	for _, k := range a.keepers {
		l = append(l, k)
	}
	slices.SortFunc(l, func(x, y *keeper) int { return int(x.index) - int(y.index) })
	return l
}

// change tells those who wait that an address is in another state. It is called without
// a keeper's lock.
func (a *Agent) change() {
	a.mu.Lock()
	a.changedNow()
	a.mu.Unlock()
}

// changedNow is change for those who hold a.mu.
func (a *Agent) changedNow() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// changes gives the channel that is closed by the next change.
func (a *Agent) changes() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// Report is how an address is at this node.
type Report struct {
	Index  uint32     `json:"index"`
	Addr   netip.Addr `json:"addr"`
	Epoch  uint64     `json:"epoch,omitempty"` // served, or taken; of Failed: that cannot be given up
	State  State      `json:"state"`
	Since  time.Time  `json:"since"`
	Reason string     `json:"reason,omitempty"` // of Failed
	Move   uint64     `json:"move,omitempty"`   // of Failed: the assignment that could not be followed
	// Stuck: the machine still has the address, which is not served here any more.
	// Silent: nothing that comes to its ports is answered.
	Stuck  bool `json:"stuck,omitempty"`
	Silent bool `json:"silent,omitempty"`
	Conns  int  `json:"conns,omitempty"`
}

// Reports lists all floating addresses that this node knows of, by index.
func (a *Agent) Reports() []Report {
	l := []Report{}
	for _, k := range a.all() {
		if r := k.report(); r.State != Absent || !k.isGone() {
			l = append(l, r)
		}
	}
	return l
}

// Superseded tells that somebody serves an address with this epoch, by whomever it is
// known: if this node serves an older one, it ends that at once.
func (a *Agent) Superseded(index uint32, epoch uint64) {
	a.mu.Lock()
	k := a.keepers[index]
	a.mu.Unlock()
	if k != nil {
		k.fenced(epoch)
	}
}

// Leaving tells whether Leave was called: the node stops.
func (a *Agent) Leaving() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.leaving
}

// Leave takes no more addresses and waits, until ctx ends, for those that are served to
// be assigned to others and to move there. others tells whether another node may serve an
// address; what only this one may serve is not waited for.
func (a *Agent) Leave(ctx context.Context, others func(v *mgs.VIP) bool) {
	a.leave(false)
	for {
		changed := a.changes()
		if !slices.ContainsFunc(a.all(), func(k *keeper) bool {
			v := k.registry()
			return k.busy() && others(&v)
		}) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (a *Agent) leave(last bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leaving, a.last = true, a.last || last
	for _, k := range a.keepers {
		k.leave(a.last)
	}
}

// busy tells whether anything is served.
func (a *Agent) busy() bool {
	return slices.ContainsFunc(a.all(), (*keeper).busy)
}

func (k *keeper) busy() bool {
	s := k.now()
	return s != Absent && s != Failed
}

// Silence releases what is still served. It returns when nothing is answered any more at the
// floating addresses; each is bounded by the deadlines of its stages.
func (a *Agent) Silence() {
	a.leave(true)
	for {
		changed := a.changes()
		if !a.busy() {
			return
		}
		<-changed
	}
}

// Stop does what Silence does and ends the agent. It returns when all is done, calls too that
// a stage has left behind at its deadline. The registry is told for as long as ctx lasts.
// Unless all periods of service have ended in order it is false.
func (a *Agent) Stop(ctx context.Context) (orderly bool) {
	a.Silence()
	orderly = true
	for _, k := range a.all() {
		orderly = k.settle(ctx) && orderly
		k.letPorts()
	}
	a.mu.Lock()
	a.cancel()
	a.mu.Unlock()
	a.wg.Wait()
	a.runner.Close()
	return orderly
}

func (a *Agent) call(f func(ctx context.Context) (mgs.VIP, error)) error {
	ctx, cancel := context.WithTimeout(a.ctx, registryTime)
	defer cancel()
	v, err := f(ctx)
	if err == nil {
		a.mu.Lock()
		k := a.keeper(&v)
		a.mu.Unlock()
		k.news(&v)
	}
	return err
}
