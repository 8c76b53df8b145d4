package statd

import (
	"container/heap"
	"errors"
	"net/netip"
	"time"
)

// The engine schedules NOTIFY calls. It is a pure step function: it knows
// neither clocks nor sockets, so that its decisions can be replayed.
//
// A host that does not answer must not keep others waiting, and sockets are
// bounded. Hence two rules. Those with the fewest attempts go first. And while
// somebody waits for a slot, the oldest attempt that had its share of time
// gives way: a share that is short for a host's first attempt and doubles with
// every further one, so that slow hosts are reached, too.

// engineConfig holds the engine's parameters; all are required.
type engineConfig struct {
	Slots   int           // attempts at the same time
	Timeout time.Duration // of an attempt that nobody presses
	Share   time.Duration // of a host's first attempt when others wait
	Backoff time.Duration // after the first attempt; doubles
	Max     time.Duration // longest backoff
	GiveUp  time.Duration // since the host's first attempt
	// Jitter returns a number in [0, n); up to a quarter of the backoff is
	// taken off, so that hosts that fell silent together are spread out.
	Jitter func(n int64) int64
}

// target is a client address that is to be told.
type target struct {
	addr  netip.Addr
	names []string // of its host records
	tries int
	first time.Time // of the first attempt
	due   time.Time
	seq   uint64 // order of arrival, for ties
	phase phase
	gone  bool // running, but not wanted any more
}

type phase uint8

const (
	waiting phase = iota // for its time (engine.due)
	ready                // for a slot (engine.ready)
	running
	told
	failed
)

// attempt is a call in progress.
type attempt struct {
	id       uint64
	t        *target // nil when its outcome does not matter any more
	at       time.Time
	canceled bool
}

// inputs of the engine.
type (
	// inBegin: these hosts are to be told of State. With the state that the
	// engine works on already, it is the new list of hosts: new ones are
	// added, failed ones begin anew, those that are missing are left alone.
	// State is not 0.
	inBegin struct {
		State uint32
		Hosts []hostNames
	}
	// inDone: attempt ID ended.
	inDone struct {
		ID  uint64
		Err error
	}
	// inTick: time has passed.
	inTick struct{}
)

// hostNames is an address and the names of its host records.
type hostNames struct {
	Addr  netip.Addr
	Names []string
}

// outputs of the engine.
type (
	// outSend: start attempt ID at the host; it ends with inDone, at the
	// latest after the engine's Timeout.
	outSend struct {
		ID   uint64
		Addr netip.Addr
		TCP  bool
	}
	// outCancel: end attempt ID; inDone is expected for it.
	outCancel struct{ ID uint64 }
	// outTold: the host knows of State.
	outTold struct {
		State uint32
		Host  hostNames
	}
	// outFailed: the host was given up.
	outFailed struct {
		State uint32
		Host  hostNames
		Tries int
		Err   error
	}
)

// engineCounts is where a round stands, in client addresses.
type engineCounts struct{ Total, Told, Pending, Failed int }

type engine struct {
	cfg      engineConfig
	state    uint32
	targets  map[netip.Addr]*target
	due      dueHeap
	ready    readyHeap
	attempts []*attempt // running, in the order of their start
	id, seq  uint64
	counts   engineCounts
	out      []any
}

func newEngine(cfg engineConfig) *engine {
	return &engine{cfg: cfg, targets: make(map[netip.Addr]*target)}
}

// errNoAnswer is the outcome of attempts that were canceled.
var errNoAnswer = errors.New("no answer in time")

// step takes one input at time now. It returns what is to be done, valid until
// the next step, and when it wants a tick at the latest (zero: never).
func (e *engine) step(now time.Time, in any) ([]any, time.Time) {
	clear(e.out)
	e.out = e.out[:0]
	switch in := in.(type) {
	case inBegin:
		e.begin(now, in)
	case inDone:
		e.done(now, in)
	}
	return e.out, e.schedule(now)
}

func (e *engine) begin(now time.Time, in inBegin) {
	if in.State != e.state {
		for _, a := range e.attempts {
			a.t = nil
			e.cancel(a)
		}
		e.state, e.counts = in.State, engineCounts{}
		e.targets = make(map[netip.Addr]*target)
		e.due, e.ready = nil, nil
	}
	listed := make(map[netip.Addr]bool, len(in.Hosts))
	for _, h := range in.Hosts {
		listed[h.Addr] = true
		t := e.targets[h.Addr]
		if t == nil {
			t = &target{addr: h.Addr, phase: failed}
			e.targets[h.Addr] = t
			e.counts.Total++
			e.counts.Failed++ // taken back below
		}
		t.names, t.gone = h.Names, false
		switch t.phase {
		case told:
			e.out = append(e.out, outTold{e.state, hostNames{t.addr, t.names}})
		case failed:
			e.seq++
			t.tries, t.first, t.seq = 0, time.Time{}, e.seq
			t.phase, t.due = ready, now
			heap.Push(&e.ready, t)
			e.counts.Failed--
			e.counts.Pending++
		}
	}
	drop := func(ts []*target) []*target {
		keep := ts[:0]
		for _, t := range ts {
			if listed[t.addr] {
				keep = append(keep, t)
			} else {
				e.forget(t)
			}
		}
		clear(ts[len(keep):])
		return keep
	}
	e.due, e.ready = drop(e.due), drop(e.ready)
	heap.Init(&e.due)
	heap.Init(&e.ready)
	for _, a := range e.attempts {
		if a.t != nil {
			a.t.gone = !listed[a.t.addr]
		}
	}
}

// forget drops a pending target.
func (e *engine) forget(t *target) {
	delete(e.targets, t.addr)
	e.counts.Total--
	e.counts.Pending--
}

func (e *engine) done(now time.Time, in inDone) {
	var a *attempt
	for i, x := range e.attempts {
		if x.id == in.ID {
			a = x
			e.attempts = append(e.attempts[:i], e.attempts[i+1:]...)
			break
		}
	}
	if a == nil || a.t == nil {
		return
	}
	t := a.t
	switch {
	case in.Err == nil:
		t.phase = told
		e.counts.Pending--
		e.counts.Told++
		e.out = append(e.out, outTold{e.state, hostNames{t.addr, t.names}})
	case t.gone:
		e.forget(t)
	case now.Sub(t.first) >= e.cfg.GiveUp:
		t.phase = failed
		e.counts.Pending--
		e.counts.Failed++
		e.out = append(e.out, outFailed{e.state, hostNames{t.addr, t.names}, t.tries, in.Err})
	default:
		wait := e.cfg.Max
		if n := t.tries - 1; n < 16 {
			wait = min(e.cfg.Backoff<<n, e.cfg.Max)
		}
		wait -= time.Duration(e.cfg.Jitter(int64(wait/4) + 1))
		e.seq++
		t.phase, t.due, t.seq = waiting, now.Add(wait), e.seq
		heap.Push(&e.due, t)
	}
}

func (e *engine) cancel(a *attempt) {
	if !a.canceled {
		a.canceled = true
		e.out = append(e.out, outCancel{a.id})
	}
}

// share is how long an attempt keeps its slot when somebody waits for it.
func (e *engine) share(a *attempt) time.Duration {
	if a.t == nil || a.t.gone {
		return 0
	}
	if n := a.t.tries - 1; n < 16 {
		return min(e.cfg.Share<<n, e.cfg.Timeout)
	}
	return e.cfg.Timeout
}

func (e *engine) schedule(now time.Time) (wake time.Time) {
	for len(e.due) > 0 && !e.due[0].due.After(now) {
		t := heap.Pop(&e.due).(*target)
		t.phase = ready
		heap.Push(&e.ready, t)
	}
	for len(e.ready) > 0 && len(e.attempts) < e.cfg.Slots {
		t := heap.Pop(&e.ready).(*target)
		if t.tries == 0 {
			t.first = now
		}
		t.tries++
		t.phase = running
		e.id++
		e.attempts = append(e.attempts, &attempt{id: e.id, t: t, at: now})
		e.out = append(e.out, outSend{ID: e.id, Addr: t.addr, TCP: t.tries%2 == 0})
	}
	earlier := func(at time.Time) {
		if wake.IsZero() || at.Before(wake) {
			wake = at
		}
	}
	// Canceled attempts free a slot as soon as they have ended.
	press := len(e.ready)
	for _, a := range e.attempts {
		if a.canceled {
			press--
		}
	}
	for _, a := range e.attempts {
		end := a.at.Add(e.cfg.Timeout)
		if press > 0 {
			end = a.at.Add(e.share(a))
		}
		switch {
		case a.canceled:
		case !end.After(now):
			e.cancel(a)
			press--
		default:
			earlier(end)
		}
	}
	if len(e.due) > 0 {
		earlier(e.due[0].due)
	}
	return wake
}

// dueHeap orders targets by time.
type dueHeap []*target

func (h dueHeap) Len() int      { return len(h) }
func (h dueHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *dueHeap) Push(x any)   { *h = append(*h, x.(*target)) }
func (h *dueHeap) Pop() any     { return pop((*[]*target)(h)) }
func (h dueHeap) Less(i, j int) bool {
	if !h[i].due.Equal(h[j].due) {
		return h[i].due.Before(h[j].due)
	}
	return h[i].seq < h[j].seq
}

// readyHeap orders targets by attempts, then by time.
type readyHeap []*target

func (h readyHeap) Len() int      { return len(h) }
func (h readyHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *readyHeap) Push(x any)   { *h = append(*h, x.(*target)) }
func (h *readyHeap) Pop() any     { return pop((*[]*target)(h)) }
func (h readyHeap) Less(i, j int) bool {
	if h[i].tries != h[j].tries {
		return h[i].tries < h[j].tries
	}
	return dueHeap(h).Less(i, j)
}

func pop(h *[]*target) *target {
	n := len(*h) - 1
	t := (*h)[n]
	(*h)[n] = nil
	*h = (*h)[:n]
	return t
}
