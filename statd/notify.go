package statd

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

// tableRetry is the pause after the table could not be reached.
const tableRetry = time.Second

// notify runs the engine: it gives it the monitor list, the time and the
// attempts' outcomes, and does what it says.
func (a *Address) notify() {
	cfg := &a.srv.cfg
	n := notifier{
		a: a, results: make(chan inDone, cfg.Slots), cancels: make(map[uint64]context.CancelFunc),
		e: newEngine(engineConfig{
			Slots: cfg.Slots, Timeout: cfg.AttemptTimeout, Share: min(firstShare, cfg.AttemptTimeout),
			Backoff: cfg.Backoff, Max: cfg.BackoffMax, GiveUp: cfg.GiveUp, Jitter: cfg.Rand,
		}),
	}
	defer n.end()
	for {
		var timer <-chan time.Time
		release := func() {}
		wake := n.wake
		if !n.retry.IsZero() && (wake.IsZero() || n.retry.Before(wake)) {
			wake = n.retry
		}
		if !wake.IsZero() {
			timer, release = cfg.NewTimer(max(wake.Sub(cfg.Now()), 0))
		}
		select {
		case <-a.ctx.Done():
			release()
			return
		case <-a.kick:
			n.begin()
		case d := <-n.results:
			n.finish(d)
		case <-timer:
			n.step(inTick{})
			if !n.retry.IsZero() && !n.retry.After(cfg.Now()) {
				n.begin()
			}
		}
		release()
	}
}

type notifier struct {
	a       *Address
	e       *engine
	results chan inDone
	cancels map[uint64]context.CancelFunc // of attempts in progress
	wg      sync.WaitGroup                // attempts
	wake    time.Time
	retry   time.Time // when to read the monitor list again, zero: not
	args    []byte    // encoded StatChge of the engine's state
}

// begin reads the monitor list and gives it to the engine.
func (n *notifier) begin() {
	a := n.a
	n.retry = time.Time{}
	state := a.state.Load()
	if state == 0 {
		return
	}
	list, err := a.hosts(a.ctx)
	if err != nil {
		if a.ctx.Err() != nil {
			return
		}
		a.limited(slog.LevelWarn, "clients cannot be notified yet", "err", err)
		if errors.Is(err, wire.ErrStaleVIP) {
			return // somebody else has the address
		}
		n.retry = a.srv.cfg.Now().Add(tableRetry)
		return
	}
	if state != n.e.state {
		chge := nsm.StatChge{MonName: a.addr.String(), State: state}
		var w xdr.Writer
		chge.Encode(&w)
		n.args = w.Buf
	}
	hosts := toTell(list, a.owner.VIP, state)
	a.mu.Lock()
	if p := &a.progress; p.State != state || p.StartedAt.IsZero() {
		*p = Progress{State: state, StartedAt: a.srv.cfg.Now()}
		if len(hosts) > 0 {
			a.log.Info("clients are notified of a restart", "state", state, "clients", len(hosts))
		}
	}
	a.mu.Unlock()
	n.step(inBegin{State: state, Hosts: hosts})
}

// toTell groups the hosts that do not know of a state by address, in the order
// of the list.
func toTell(list []wire.MonitoredHost, vip, state uint32) []hostNames {
	at := make(map[netip.Addr]int)
	var hosts []hostNames
	for i := range list {
		h := &list[i]
		if h.Host.VIP != vip || h.Notified >= state || !h.Host.Addr.IsValid() {
			continue
		}
		j, ok := at[h.Host.Addr]
		if !ok {
			j = len(hosts)
			at[h.Host.Addr] = j
			hosts = append(hosts, hostNames{Addr: h.Host.Addr})
		}
		hosts[j].Names = append(hosts[j].Names, h.Host.Name)
	}
	return hosts
}

func (n *notifier) finish(d inDone) {
	n.cancels[d.ID]()
	delete(n.cancels, d.ID)
	n.step(d)
}

// step runs the engine and executes its outputs.
func (n *notifier) step(in any) {
	a := n.a
	out, wake := n.e.step(a.srv.cfg.Now(), in)
	n.wake = wake
	for _, o := range out {
		switch o := o.(type) {
		case outSend:
			n.send(o)
		case outCancel:
			n.cancels[o.ID]()
		case outTold:
			a.told.add(o, a.owner.VIP)
		case outFailed:
			a.limited(slog.LevelWarn, "a client could not be notified and was given up; it is tried again at the next start",
				"client", o.Host.Addr, "attempts", o.Tries, "err", o.Err)
		}
	}
	c := n.e.counts
	a.mu.Lock()
	p := &a.progress
	ended := p.FinishedAt.IsZero() && !p.StartedAt.IsZero() && c.Pending == 0
	p.Total, p.Notified, p.Pending, p.Failed = c.Total, c.Told, c.Pending, c.Failed
	switch {
	case ended:
		p.FinishedAt = a.srv.cfg.Now()
	case c.Pending > 0:
		p.FinishedAt = time.Time{}
	}
	a.mu.Unlock()
	if ended && c.Total > 0 {
		a.log.Info("the notifying of clients has ended", "state", n.e.state, "notified", c.Told, "failed", c.Failed)
	}
}

// send starts an attempt. The engine bounds how many there are.
func (n *notifier) send(o outSend) {
	a, args := n.a, n.args
	ctx, cancel := context.WithCancel(a.ctx)
	n.cancels[o.ID] = cancel
	a.stats.sent.Add(1)
	n.wg.Go(func() {
		err := a.srv.reach(ctx, a.addr, o.Addr, o.TCP, nsm.Program, nsm.Version, nsm.ProcNotify, args)
		if err != nil {
			if ctx.Err() != nil {
				err = errNoAnswer
			}
			if a.ctx.Err() == nil {
				a.stats.sendErrors.Add(1)
				a.sample(o.Addr, err)
			}
		}
		n.results <- inDone{ID: o.ID, Err: err} // has room for every attempt
	})
}

// sample keeps an error for Progress.
func (a *Address) sample(host netip.Addr, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := &a.progress
	if len(p.Errors) >= maxErrors {
		p.Errors = slices.Delete(p.Errors, 0, len(p.Errors)-maxErrors+1)
	}
	p.Errors = append(p.Errors, host.String()+": "+err.Error())
}

// end waits for the attempts, which the end of the address's context cancels,
// and keeps the outcome of those that succeeded.
func (n *notifier) end() {
	n.wg.Wait()
	for {
		select {
		case d := <-n.results:
			n.cancels[d.ID]()
			if d.Err != nil {
				continue
			}
			out, _ := n.e.step(n.a.srv.cfg.Now(), d)
			for _, o := range out {
				if o, ok := o.(outTold); ok {
					n.a.told.add(o, n.a.owner.VIP)
				}
			}
		default:
			return
		}
	}
}

// toldQueue holds what is to be recorded at the MDT: at most one entry per
// host record.
type toldQueue struct {
	wake chan struct{} // capacity 1

	mu     sync.Mutex
	order  []wire.LockHost
	states map[wire.LockHost]uint32
	flush  context.Context // when closed: how long the rest may take
}

func (q *toldQueue) add(o outTold, vip uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.states == nil {
		q.states = make(map[wire.LockHost]uint32)
	}
	for _, name := range o.Host.Names {
		h := wire.LockHost{VIP: vip, Addr: o.Host.Addr, Name: name}
		if _, ok := q.states[h]; !ok {
			q.order = append(q.order, h)
		}
		q.states[h] = o.State
	}
	q.poke()
}

func (q *toldQueue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close lets the recorder end once the queue is empty or ctx ends.
func (q *toldQueue) close(ctx context.Context) {
	q.mu.Lock()
	q.flush = ctx
	q.mu.Unlock()
	q.poke()
}

// take returns the oldest entry, and the queue's ending if it is closed.
func (q *toldQueue) take() (h wire.LockHost, state uint32, ok bool, flush context.Context) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.order) > 0 {
		h, ok = q.order[0], true
		state = q.states[h]
		q.order = q.order[1:]
		delete(q.states, h)
	}
	return h, state, ok, q.flush
}

// record tells the MDT which hosts have been told. It does not wait for the
// disk: a host whose record is lost is told once more of the same state, which
// means nothing to it.
func (a *Address) record() {
	defer close(a.recorder)
	q := &a.told
	for {
		h, state, ok, flush := q.take()
		switch {
		case !ok && flush != nil:
			return
		case !ok:
			<-q.wake
			continue
		}
		for {
			ctx := a.ctx
			if flush != nil {
				ctx = flush
			}
			args := a.hostArgs(h)
			args.NSMState = state
			_, err := a.call(ctx, wire.OpLockNotified, 0, args, 0)
			if err == nil || errors.Is(err, wire.ErrNoEnt) {
				break
			}
			a.limited(slog.LevelWarn, "it could not be recorded that a client was notified", "client", h.Addr, "err", err)
			if !errors.Is(err, wire.ErrTargetDown) && !errors.Is(err, wire.ErrRecovering) {
				break
			}
			if flush != nil {
				return // it is told again at the next start
			}
			if !a.srv.pause(a.ctx, tableRetry) {
				for flush == nil { // Stop has begun, and gives a last time
					<-q.wake
					q.mu.Lock()
					flush = q.flush
					q.mu.Unlock()
				}
			}
		}
	}
}
