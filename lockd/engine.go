package lockd

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// engine makes the outgoing calls of one service address: GRANTED callbacks, and
// the results of _MSG calls. Every client machine has a queue of its own and is
// called by at most one worker at a time; workers are few and shared, and those
// clients that failed before never take more than half of them.
type engine struct {
	a      *Address
	policy policy
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // reports on their way, timers
	calls  sync.WaitGroup // workers, who alone call clients

	mu      sync.Mutex
	stopped bool
	hosts   map[netip.Addr]*host
	grants  map[uint64]*grant // by lock ID
	byLock  map[lockKey]*grant
	failing atomic.Int64 // grants that were tried in vain and wait for the next try
	// again holds the locks whose callbacks an earlier owner of the address, or
	// this one before a restart, may have sent. againAll: it is not known which.
	again    map[uint64]struct{}
	againAll bool

	fresh, suspect       []*host // ready for a worker
	running, busySuspect int
	serial               uint64
	results              int
	ports                map[portKey]portEntry
	timers               map[*timer]struct{}
}

// host is a client machine.
type host struct {
	addr    netip.Addr
	state   hostState
	fails   int // tries in a row that got no answer
	grants  []*grant
	results []*message
}

type hostState uint8

const (
	hostIdle hostState = iota
	hostReady
	hostRunning
	hostWaiting // a timer makes it ready
)

// grant is a callback on its way.
type grant struct {
	wire.LockGrant
	note    note
	cb      callback
	at      time.Time // arrival from the table
	serial  uint64
	other   bool // begin with the other transport
	settled bool // finished; a try may still be running
}

type lockKey struct {
	fid   wire.FID
	owner wire.LockOwner
	r     wire.LockRange
}

func (g *grant) key() lockKey { return lockKey{g.FID, g.Owner, g.Range} }

// message is the result of a _MSG call on its way to the client.
type message struct {
	addr netip.Addr
	vers uint32
	udp  bool
	proc nlm.Proc
	args []byte
}

type portKey struct {
	addr netip.Addr
	vers uint32
	udp  bool
}

type portEntry struct {
	port  uint16
	until time.Time
}

type timer struct{ stop func() bool }

const (
	// portTTL is how long a port is used without asking for it again.
	portTTL = 30 * time.Second
	// maxPorts bounds the ports remembered.
	maxPorts = 8192
	// maxHostResults and maxResults bound the results of _MSG calls that wait.
	maxHostResults = 256
	maxResults     = 4096
	// oneDatagram is less than the time after which the RPC client sends a
	// datagram again: the answer to a single copy is known to be about that one.
	oneDatagram = 400 * time.Millisecond
	// resultTimeout bounds the call that carries a result. Nobody needs its reply.
	resultTimeout = time.Second
)

func newEngine(a *Address) *engine {
	c := &a.srv.cfg
	e := &engine{
		a: a, policy: policy{c.Tries, c.RetryFirst, c.RetryMax},
		hosts: make(map[netip.Addr]*host), grants: make(map[uint64]*grant), byLock: make(map[lockKey]*grant),
		ports: make(map[portKey]portEntry), timers: make(map[*timer]struct{}), again: make(map[uint64]struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// endCalls ends all calls to clients and waits, no longer than ctx, until their sockets
// are closed. It needs no answer from anybody.
func (e *engine) endCalls(ctx context.Context) error {
	e.mu.Lock()
	e.stopped = true
	for t := range e.timers {
		t.stop()
	}
	clear(e.timers)
	e.mu.Unlock()
	e.cancel()
	return wait(ctx, &e.calls)
}

// stop ends everything and waits, no longer than ctx, until nothing runs.
func (e *engine) stop(ctx context.Context) error {
	return errors.Join(e.endCalls(ctx), wait(ctx, &e.wg))
}

func wait(ctx context.Context, wg *sync.WaitGroup) error {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// after runs f on a goroutine of its own after d unless the engine stops.
func (e *engine) after(d time.Duration, f func()) {
	t := new(timer)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped {
		return
	}
	e.timers[t] = struct{}{}
	t.stop = e.a.srv.cfg.AfterFunc(d, func() {
		e.mu.Lock()
		_, ok := e.timers[t]
		delete(e.timers, t)
		if ok = ok && !e.stopped; ok {
			e.wg.Add(1)
		}
		e.mu.Unlock()
		if ok {
			f()
			e.wg.Done()
		}
	})
}

// pending is the number of callbacks that are not answered.
func (e *engine) pending() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.grants)
}

// add takes grants from the table.
func (e *engine) add(l []wire.LockGrant) {
	cfg := &e.a.srv.cfg
	now := cfg.Now()
	for i := range l {
		g := &grant{LockGrant: l[i], at: now}
		var err error
		if g.note, err = decodeNote(l[i].Note); err == nil && !g.Owner.Addr.IsValid() {
			err = errNote
		}
		if err != nil {
			e.a.srv.log.Error("a client cannot be told of its lock; it will ask for it again", "owner", g.Owner.LockHost, "file", g.FID, "err", err)
			e.report(g, wire.GrantUndelivered)
			continue
		}
		e.mu.Lock()
		_, again := e.again[g.ID]
		delete(e.again, g.ID)
		g.cb.maybe = again || e.againAll
		h := e.host(g.Owner.Addr)
		switch {
		case e.stopped, e.grants[g.ID] != nil:
		case len(h.grants) >= cfg.MaxPending, len(e.grants) >= 16*cfg.MaxPending:
			if e.a.count.overflow.Add(1) == 1 {
				e.a.srv.log.Warn("too many clients do not answer GRANTED callbacks; further ones are not made", "host", g.Owner.LockHost)
			}
		default:
			e.serial++
			g.serial = e.serial
			e.grants[g.ID] = g
			e.byLock[g.key()] = g
			h.grants = append(h.grants, g)
			e.schedule(h)
		}
		e.drop(h)
		e.mu.Unlock()
	}
}

// send queues the result of a _MSG call; false means that it is lost.
func (e *engine) send(m *message) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopped || e.results >= maxResults {
		return false
	}
	h := e.host(m.addr)
	if len(h.results) >= maxHostResults {
		return false
	}
	e.results++
	h.results = append(h.results, m)
	// Who calls is there.
	h.fails = 0
	if h.state == hostWaiting {
		h.state = hostIdle
	}
	e.schedule(h)
	return true
}

// host finds or makes the queue of a client. The caller holds e.mu.
func (e *engine) host(addr netip.Addr) *host {
	h := e.hosts[addr]
	if h == nil {
		h = &host{addr: addr}
		e.hosts[addr] = h
	}
	return h
}

// drop forgets a host that has nothing to do. The caller holds e.mu.
func (e *engine) drop(h *host) {
	if h.state == hostIdle && len(h.grants) == 0 && len(h.results) == 0 && e.hosts[h.addr] == h {
		delete(e.hosts, h.addr)
	}
}

// schedule makes an idle host that has something to do ready. The caller holds
// e.mu.
func (e *engine) schedule(h *host) {
	if e.stopped || h.state != hostIdle || len(h.grants) == 0 && len(h.results) == 0 {
		return
	}
	h.state = hostReady
	if h.fails > 0 {
		e.suspect = append(e.suspect, h)
	} else {
		e.fresh = append(e.fresh, h)
	}
	if e.running < e.a.srv.cfg.Parallel {
		e.running++
		e.calls.Add(1)
		go e.worker()
	}
}

// next takes a ready host. The caller holds e.mu.
func (e *engine) next() (h *host, suspect bool) {
	take := func(q *[]*host) *host {
		h := (*q)[0]
		(*q)[0] = nil
		if *q = (*q)[1:]; len(*q) == 0 {
			*q = nil
		}
		return h
	}
	switch {
	case e.stopped:
		return nil, false
	case len(e.fresh) > 0:
		return take(&e.fresh), false
	case len(e.suspect) > 0 && e.busySuspect < max(1, e.a.srv.cfg.Parallel/2):
		return take(&e.suspect), true
	}
	return nil, false
}

// worker serves ready hosts, one job of each at a time, until there is none.
func (e *engine) worker() {
	defer e.calls.Done()
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		h, suspect := e.next()
		if h == nil {
			e.running--
			return
		}
		if suspect {
			e.busySuspect++
		}
		h.state = hostRunning
		switch {
		case len(h.results) > 0:
			m := h.results[0]
			h.results = h.results[1:]
			e.results--
			e.mu.Unlock()
			ok := e.deliver(m)
			e.mu.Lock()
			if ok {
				e.a.count.results.Add(1)
			} else {
				e.a.count.resultsLost.Add(1)
			}
			h.state = hostIdle
		case len(h.grants) > 0:
			e.call(h)
		default: // everything was settled meanwhile
			h.state = hostIdle
		}
		if suspect {
			e.busySuspect--
		}
		e.schedule(h)
		e.drop(h)
	}
}

// call makes one try with the oldest grant of h. The caller holds e.mu, which is
// released meanwhile.
func (e *engine) call(h *host) {
	g, mark := h.grants[0], e.serial
	e.mu.Unlock()
	ev := e.try(g)
	e.mu.Lock()
	h.state = hostIdle
	if e.stopped {
		return
	}
	// A client that cannot be reached at all is so for all its locks; others may
	// be waiting for each of them.
	tried := []*grant{g}
	if ev == evNotSent {
		for _, o := range h.grants {
			if o != g && o.serial <= mark && o.note.vers == g.note.vers {
				tried = append(tried, o)
			}
		}
	}
	var wait time.Duration
	for _, t := range tried {
		if t.settled {
			continue
		}
		act := t.cb.step(ev, &e.policy)
		if act.outcome == 0 {
			if t.cb.failures == 1 {
				e.failing.Add(1)
			}
			if t == g {
				wait = act.wait
			}
			continue
		}
		e.finish(t, act.outcome)
	}
	if ev == evGranted || ev == evDenied {
		h.fails = 0
		return
	}
	h.fails++
	// The next one has its turn first, so that a lock that the client keeps
	// silent about does not stand in the way of the others.
	if len(h.grants) > 0 && h.grants[0] == g {
		h.grants = append(h.grants[1:], g)
	}
	if len(h.grants) == 0 && len(h.results) == 0 {
		return
	}
	if wait == 0 {
		wait = e.policy.wait(h.fails)
	}
	h.state = hostWaiting
	e.mu.Unlock()
	e.after(wait, func() {
		e.mu.Lock()
		if h.state == hostWaiting {
			h.state = hostIdle
			e.schedule(h)
			e.drop(h)
		}
		e.mu.Unlock()
	})
	e.mu.Lock()
}

// finish takes a grant out and tells the table of the outcome. The caller holds
// e.mu.
func (e *engine) finish(g *grant, out wire.GrantOutcome) {
	e.forget(g)
	c := &e.a.count
	switch out {
	case wire.GrantAccepted:
		c.accepted.Add(1)
		c.handOvers.Add(1)
		c.handOverNanos.Add(uint64(e.a.srv.cfg.Now().Sub(g.at)))
	case wire.GrantRefused:
		c.refused.Add(1)
	case wire.GrantUndelivered:
		c.undelivered.Add(1)
		e.a.srv.log.Warn("a client could not be told that it has its lock, which goes to the next one", "host", g.Owner.LockHost, "file", g.FID, "range", g.Range)
	}
	e.reportLocked(g, out)
}

// forget takes a grant out of the tables. The caller holds e.mu.
func (e *engine) forget(g *grant) {
	if g.settled {
		return
	}
	g.settled = true
	if g.cb.failures > 0 {
		e.failing.Add(-1)
	}
	delete(e.grants, g.ID)
	if e.byLock[g.key()] == g {
		delete(e.byLock, g.key())
	}
	h := e.hosts[g.Owner.Addr]
	if h == nil {
		return
	}
	for i, o := range h.grants {
		if o == g {
			h.grants = append(h.grants[:i:i], h.grants[i+1:]...)
			break
		}
	}
	e.drop(h)
}

// answered takes a GRANTED_RES, the answer of clients that give it in a call of
// their own.
func (e *engine) answered(from netip.Addr, cookie []byte, st nlm.Stat) {
	id, ok := cookieID(e.a.owner.VIP, cookie)
	if !ok {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	g := e.grants[id]
	if g == nil || g.Owner.Addr != from || st == nlm.DeniedGracePeriod {
		return
	}
	ev := evDenied
	if st == nlm.Granted {
		ev = evGranted
	}
	if act := g.cb.step(ev, &e.policy); act.outcome != 0 {
		e.finish(g, act.outcome)
	}
}

// settle ends a callback that is no longer needed, because the client has asked
// for the lock again and got it, or has given it back. Only callbacks that were
// tried in vain are looked at: a reply may be older than the grant, and then the
// first try has to be made.
func (e *engine) settle(fid wire.FID, owner *wire.LockOwner, r wire.LockRange) {
	if e.failing.Load() == 0 {
		return
	}
	e.mu.Lock()
	if g := e.byLock[lockKey{fid, *owner, r}]; g != nil && g.cb.failures > 0 {
		e.forget(g)
	}
	e.mu.Unlock()
}

// report tells the table of an outcome, until it has heard it.
func (e *engine) report(g *grant, out wire.GrantOutcome) {
	e.mu.Lock()
	e.reportLocked(g, out)
	e.mu.Unlock()
}

func (e *engine) reportLocked(g *grant, out wire.GrantOutcome) {
	if e.stopped {
		return
	}
	e.wg.Add(1)
	go e.submit(&outcome{e: e, g: g, out: out})
}

// outcome is a report on its way.
type outcome struct {
	e     *engine
	g     *grant
	out   wire.GrantOutcome
	req   wire.Request
	rep   wire.Reply
	args  wire.LockArgs
	fails int
}

// submit sends the report. Its completion gives back what was added to e.wg.
func (e *engine) submit(o *outcome) {
	o.req.Reset()
	o.rep.Reset()
	o.args = wire.LockArgs{Owner: wire.LockOwner{LockHost: o.g.Owner.LockHost}, ID: o.g.ID, Grant: o.out}
	o.req.Op = wire.OpLockGrantDone
	o.req.Flags = wire.FlagWaitCommit
	o.req.FID = o.g.FID
	o.req.Lock = &o.args
	e.a.srv.cfg.Table.Submit(e.a.owner, &o.req, &o.rep, o.completed)
}

func (o *outcome) completed() {
	e := o.e
	defer e.wg.Done()
	st := o.rep.Status
	if st == wire.ErrStaleVIP {
		e.a.fenced()
		return
	}
	if _, known := nlm.StatFor(nlm.Version4, st); known {
		if st != wire.OK {
			e.a.srv.log.Warn("the lock table refused a callback's outcome", "owner", o.g.Owner.LockHost, "file", o.g.FID, "status", st)
		}
		return
	}
	o.fails++
	e.after(e.policy.wait(o.fails), func() {
		e.mu.Lock()
		stopped := e.stopped
		if !stopped {
			e.wg.Add(1)
		}
		e.mu.Unlock()
		if !stopped {
			e.submit(o)
		}
	})
}

// transports gives the order in which the transports are tried.
func transports(first string) [2]string {
	if first == "udp" {
		return [2]string{"udp", "tcp"}
	}
	return [2]string{"tcp", "udp"}
}

func network(udp bool) string {
	if udp {
		return "udp"
	}
	return "tcp"
}

// try sends GRANTED once, by the transport that the request came by or, if
// nothing can be sent by that, by the other one.
func (e *engine) try(g *grant) event {
	cookie := putCookie(e.a.owner.VIP, g.ID)
	args := nlm.TestArgs{
		Cookie: cookie[:], Exclusive: g.Exclusive,
		Lock: nlm.Lock{
			CallerName: []byte(g.Owner.Name), FH: g.note.fh, OH: []byte(g.Owner.OH),
			Svid: g.Owner.Svid, Offset: g.note.offset, Len: g.note.len,
		},
	}
	var w xdr.Writer
	args.Encode(&w, g.note.vers)
	for _, nw := range transports(network(g.note.udp != g.other)) {
		timeout := e.a.srv.cfg.CallTimeout
		if nw == "udp" && !g.cb.maybe {
			timeout = min(timeout, oneDatagram)
		}
		res, sent, err := e.exchange(g.Owner.Addr, nw, g.note.vers, nlm.ProcGranted, w.Buf, timeout)
		if sent {
			e.a.count.sent.Add(1)
		}
		var x nlm.Res
		if err == nil {
			err = x.Decode(xdr.NewReader(res), g.note.vers)
		}
		var denied *sunrpc.DenyError
		var accept *sunrpc.AcceptError
		switch {
		case err == nil && x.Stat == nlm.Granted:
			return evGranted
		case err == nil && x.Stat == nlm.DeniedGracePeriod:
			// The client's lock manager is starting and has not looked.
			return evNotSent
		case err == nil:
			return evDenied
		case !sent, errors.As(err, &denied):
			continue
		case errors.As(err, &accept) && accept.Stat != sunrpc.SystemErr:
			continue
		}
		g.other = !g.other
		return evNoAnswer
	}
	return evNotSent
}

// deliver sends the result of a _MSG call by the transport that the call came by.
func (e *engine) deliver(m *message) bool {
	_, sent, _ := e.exchange(m.addr, network(m.udp), m.vers, m.proc, m.args, resultTimeout)
	return sent
}

// exchange makes one call to a client's lock manager. sent tells that the call
// may have reached it.
func (e *engine) exchange(addr netip.Addr, nw string, vers uint32, proc nlm.Proc, args []byte, timeout time.Duration) (res []byte, sent bool, err error) {
	k := portKey{addr, vers, nw == "udp"}
	port, err := e.port(k)
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(e.ctx, timeout)
	defer cancel()
	c, err := e.a.srv.cfg.Dial(ctx, nw, e.a.addr, netip.AddrPortFrom(addr, port), vers)
	if err == nil {
		sent = true
		res, err = c.Call(ctx, uint32(proc), args)
		_ = c.Close() // nothing is lost with it
	}
	if err != nil {
		e.mu.Lock()
		delete(e.ports, k)
		e.mu.Unlock()
	}
	return res, sent, err
}

// port gives the port of a client's lock manager.
func (e *engine) port(k portKey) (uint16, error) {
	cfg := &e.a.srv.cfg
	e.mu.Lock()
	p, ok := e.ports[k]
	e.mu.Unlock()
	now := cfg.Now()
	if ok && now.Before(p.until) {
		return p.port, nil
	}
	ctx, cancel := context.WithTimeout(e.ctx, cfg.PortmapTimeout)
	defer cancel()
	port, err := cfg.Portmap(ctx, e.a.addr, netip.AddrPortFrom(k.addr, 0), nlm.Program, k.vers, netid(k))
	if err != nil {
		return 0, err
	}
	if port == 0 {
		return 0, rpcbind.ErrNotRegistered
	}
	e.mu.Lock()
	if len(e.ports) >= maxPorts {
		clear(e.ports)
	}
	e.ports[k] = portEntry{port, now.Add(portTTL)}
	e.mu.Unlock()
	return port, nil
}

func netid(k portKey) string {
	switch {
	case k.udp && k.addr.Is4():
		return rpcbind.UDP
	case k.udp:
		return rpcbind.UDP6
	case k.addr.Is4():
		return rpcbind.TCP
	}
	return rpcbind.TCP6
}
