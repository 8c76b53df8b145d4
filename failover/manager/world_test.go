package manager

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// registry is the part of the registry's document that has to do with floating
// addresses, by the rules of mgs.Floating.
type registry struct {
	vips    []mgs.VIP
	drained []string
}

func refuse(code mgs.Code) error { return &mgs.Error{Code: code, Text: string(code)} }

func (r *registry) vip(index uint32) *mgs.VIP {
	for i := range r.vips {
		if r.vips[i].Index == index {
			return &r.vips[i]
		}
	}
	return nil
}

func (r *registry) add(addr string, prefer ...string) *mgs.VIP {
	r.vips = append(r.vips, mgs.VIP{Index: uint32(len(r.vips) + 1), Addr: netip.MustParseAddr(addr), Bits: 24, Prefer: prefer, Clean: true})
	return &r.vips[len(r.vips)-1]
}

func (r *registry) view() *mgs.View {
	return &mgs.View{VIPs: slices.Clone(r.vips), Drained: slices.Clone(r.drained)}
}

// same tells whether a view is still true.
func (r *registry) same(v *mgs.View) bool {
	return slices.Equal(v.Drained, r.drained) && slices.EqualFunc(v.VIPs, r.vips, func(a, b mgs.VIP) bool {
		return a.Index == b.Index && a.Node == b.Node && a.Next == b.Next && a.Epoch == b.Epoch && a.MoveID == b.MoveID &&
			a.Clean == b.Clean && a.Ready == b.Ready && a.Removed == b.Removed && a.Drained == b.Drained
	})
}

func (r *registry) assign(index uint32, epoch uint64, node string) (mgs.VIP, error) {
	v := r.vip(index)
	switch {
	case v == nil:
		return mgs.VIP{}, refuse(mgs.CodeNoVIP)
	case v.Removed:
		return mgs.VIP{}, refuse(mgs.CodeInvalid)
	case v.Epoch != epoch:
		return mgs.VIP{}, refuse(mgs.CodeSuperseded)
	case v.Next == node:
	case v.Drained:
		return mgs.VIP{}, refuse(mgs.CodeDrained)
	case v.Free() || v.Node != node:
		if len(v.Prefer) > 0 && !slices.Contains(v.Prefer, node) {
			return mgs.VIP{}, refuse(mgs.CodeInvalid)
		}
		if slices.Contains(r.drained, node) {
			return mgs.VIP{}, refuse(mgs.CodeDrained)
		}
		fallthrough
	default:
		v.Next, v.Ready = node, false
		v.MoveID++
	}
	return *v, nil
}

func (r *registry) abandon(index uint32, epoch uint64) error {
	v := r.vip(index)
	switch {
	case v == nil:
		return refuse(mgs.CodeNoVIP)
	case v.Epoch != epoch || v.Clean:
		return refuse(mgs.CodeSuperseded)
	}
	v.Node = ""
	return nil
}

// drain has nobody serve an address.
func (r *registry) drain(v *mgs.VIP) {
	v.Drained = true
	if v.Next != "" {
		v.Next, v.Ready = "", false
		v.MoveID++
	}
}

func (r *registry) setReady(index uint32, move uint64) error {
	v := r.vip(index)
	if v.MoveID != move || v.Next == "" {
		return refuse(mgs.CodeMoved)
	}
	v.Ready = true
	return nil
}

func (r *registry) stopped(index uint32, epoch uint64) error {
	v := r.vip(index)
	if v.Epoch != epoch || v.Node == "" {
		return refuse(mgs.CodeSuperseded)
	}
	v.Clean = true
	return nil
}

func (r *registry) take(index uint32, move uint64, node string) (uint64, error) {
	v := r.vip(index)
	switch {
	case v.MoveID != move || v.Next != node:
		return 0, refuse(mgs.CodeMoved)
	case !v.Clean && v.Node != "":
		return 0, refuse(mgs.CodeServed)
	}
	v.Epoch++
	v.Node, v.Clean, v.Ready = node, false, false
	return v.Epoch, nil
}

// tick is the step of a world.
const tick = 50 * time.Millisecond

// beat is the time between two beats.
const beat = 200 * time.Millisecond

// world is a cluster in which time passes in ticks: beats, questions, the nodes' agents
// and the leader's machine, with the registry on the leader's node.
type world struct {
	now   time.Duration
	cfg   Config
	reg   registry
	nodes []*wnode
	lead  *wnode // nil: nobody has the registry
	// away: the registry refuses and cannot be read.
	away bool
	term uint64
	m    *Machine
	seen *mgs.View // what the machine was given last
	cut  map[[2]string]bool
	// decided and happened are called with what the machine says.
	decided  func(d *Decision, v *mgs.VIP, err error)
	happened func(e Event)
	served   func(n *wnode, index uint32, epoch uint64)
	delay    func() time.Duration // of an agent's step
	// late is how long after a change of the registry the leader hears of it.
	late    time.Duration
	answers []func() // not heard yet, with their times
	due     []time.Duration
}

// wnode is a node of a world.
type wnode struct {
	name        string
	up, frozen  bool
	incarnation uint64
	heard       map[string]*NodeHealth
	last        map[string]time.Duration // beat from
	quickest    map[string]time.Duration // until then not judged
	unready     string
	stopping    bool
	slow        bool
	load        float64
	// stuck: it does not listen; holds: it gives nothing up; fails: its units fail;
	// fumbles: they fail when they have begun a period of service.
	stuck, holds, fails, fumbles bool
	units                        map[uint32]*unit
	keep                         Keeper
	// of the leader's questions to it
	asked, answer time.Duration
	reply         *Report
	lag           time.Duration // of its answers
}

// unit is an address on a node.
type unit struct {
	state AddressState
	epoch uint64
	next  time.Duration // when it does its next step
	since time.Duration // when the state began
	// of Failed: the machine still has the address, and drops what comes for it
	stuck, silent bool
	// of Failed: the period of service is to be ended
	owes bool
	// the pause before the next try, and the assignment that it is for
	pause time.Duration
	move  uint64
	// of Failed: the assignment that it could not follow
	missed uint64
}

// retry is the pause of an agent after a failure.
const retry = 500 * time.Millisecond

// paused lets an agent wait before it tries again.
func (w *world) paused(u *unit) {
	u.pause = min(max(2*u.pause, retry), 15*time.Second)
	u.next = w.now + u.pause
}

func newWorld(cfg Config) *world {
	w := &world{
		now: time.Second, cfg: cfg, cut: map[[2]string]bool{}, decided: func(*Decision, *mgs.VIP, error) {}, happened: func(Event) {},
		served: func(*wnode, uint32, uint64) {}, delay: func() time.Duration { return 0 },
	}
	for _, name := range cfg.Nodes {
		n := &wnode{name: name}
		w.nodes = append(w.nodes, n)
		w.start(n)
	}
	return w
}

func (w *world) node(name string) *wnode {
	for _, n := range w.nodes {
		if n.name == name {
			return n
		}
	}
	panic("no node " + name)
}

func (w *world) start(n *wnode) {
	n.up, n.frozen, n.stopping = true, false, false
	n.incarnation++
	n.heard, n.last, n.units = map[string]*NodeHealth{}, map[string]time.Duration{}, map[uint32]*unit{}
	n.keep = Keeper{}
	for _, o := range w.nodes {
		n.heard[o.name] = &NodeHealth{Node: o.name}
		n.last[o.name] = w.now + 2*beat
		if o != n && o.heard[n.name] == nil {
			o.heard[n.name], o.last[n.name] = &NodeHealth{Node: n.name}, w.now+2*beat
		}
	}
}

func (w *world) kill(n *wnode) {
	n.up = false
	n.units = map[uint32]*unit{}
	if w.lead == n {
		w.resign()
	}
}

// takeLead has a node get the registry.
func (w *world) takeLead(n *wnode) {
	w.term++
	w.lead = n
	cfg := w.cfg
	cfg.Node = n.name
	var err error
	if w.m, err = NewMachine(cfg); err != nil {
		panic(err)
	}
	w.m.Lead(w.now, w.term)
	w.seen = nil
	for _, o := range w.nodes {
		o.asked, o.reply = 0, nil
	}
}

func (w *world) resign() {
	w.lead, w.m = nil, nil
}

func (n *wnode) runs() bool { return n.up && !n.frozen }

func (w *world) linked(a, b string) bool { return !w.cut[[2]string{a, b}] && !w.cut[[2]string{b, a}] }

// reaches tells whether a node can use the registry.
func (w *world) reaches(n *wnode) bool {
	return !w.away && w.lead != nil && w.lead.runs() && w.linked(n.name, w.lead.name)
}

// report is what a node answers.
func (w *world) report(n *wnode, q *Question) *Report {
	r := &Report{Incarnation: n.incarnation, Ready: n.unready == "", Reason: n.unready, Stopping: n.stopping, Load: n.load}
	for _, i := range sorted(n.units) {
		u := n.units[i]
		r.Addresses = append(r.Addresses, Address{Index: i, Epoch: u.epoch, State: u.state, Since: w.now - u.since, Move: u.missed, Stuck: u.stuck, Silent: u.silent})
	}
	r.Hears = w.hears(n)
	if err := n.keep.Answer(q, r); err != nil {
		panic(err)
	}
	return r
}

func (w *world) hears(n *wnode) (l []NodeHealth) {
	for _, o := range w.nodes {
		if h := n.heard[o.name]; o != n && h != nil {
			x := *h
			x.Silence = max(w.now-n.last[o.name], 0)
			if x.State == Suspect {
				x.Suspected = max(x.Silence-4*beat, 0)
			}
			l = append(l, x)
		}
	}
	return l
}

func sorted[V any](m map[uint32]V) []uint32 {
	l := make([]uint32, 0, len(m))
	for i := range m {
		l = append(l, i)
	}
	slices.Sort(l)
	return l
}

// step lets one tick pass.
func (w *world) step() {
	w.now += tick
	w.beats()
	for _, n := range w.nodes {
		if n.runs() {
			w.agent(n)
		}
	}
	if w.m == nil || !w.lead.runs() {
		return
	}
	w.ask()
	if w.away {
		w.m.Lost()
		w.seen = nil
	} else if w.hear(); len(w.due) == 0 && (w.seen == nil || !w.reg.same(w.seen)) {
		w.seen = w.reg.view()
		w.m.View(w.now, w.seen)
	}
	w.m.Health(w.now, w.hears(w.lead))
	for _, d := range w.m.Tick(w.now) {
		w.carryOut(&d)
	}
	for _, e := range w.m.Events() {
		w.happened(e)
	}
}

func (w *world) beats() {
	for i, n := range w.nodes {
		if !n.runs() {
			continue
		}
		if (w.now/tick+time.Duration(i))%(beat/tick) == 0 {
			for _, o := range w.nodes {
				if o == n || !o.runs() || !w.linked(n.name, o.name) {
					continue
				}
				h := o.heard[n.name]
				h.State, h.Incarnation, h.Slow = Alive, n.incarnation, n.slow
				o.last[n.name] = w.now
			}
		}
	}
	for _, n := range w.nodes {
		if !n.runs() {
			continue
		}
		if n.quickest == nil {
			n.quickest = map[string]time.Duration{}
		}
		for _, o := range w.nodes {
			if h := n.heard[o.name]; o != n && h.State != Suspect && w.now-n.last[o.name] >= 4*beat && w.now >= n.quickest[o.name] {
				h.State = Suspect
			}
		}
	}
}

// thaw lets a frozen node go on; like the real one, it judges nobody at first.
func (w *world) thaw(n *wnode) {
	n.frozen = false
	if n.quickest == nil {
		n.quickest = map[string]time.Duration{}
	}
	for _, o := range w.nodes {
		n.quickest[o.name] = w.now + 4*beat
	}
}

// ask exchanges questions and answers between the leader and all nodes.
func (w *world) ask() {
	for _, n := range w.nodes {
		if n.reply != nil && w.now >= n.answer {
			r := n.reply
			n.reply = nil
			if n.runs() && w.linked(n.name, w.lead.name) {
				w.m.Report(w.now, n.name, n.asked, r)
			}
		}
		if n.reply == nil && (n.asked == 0 || w.now-n.asked >= beat) {
			n.asked, n.answer = w.now, w.now+tick
			if n.runs() && w.linked(n.name, w.lead.name) {
				q := w.m.Question(w.now, n.name)
				n.reply = w.report(n, &q)
				n.answer = w.now + max(n.lag, tick)
			}
			if n.answer > w.now+askTime { // nobody waits so long
				n.reply, n.answer = &Report{Load: -1}, w.now+askTime
			}
		}
	}
}

// hear gives the leader the answers of the registry that are due. They come in order.
func (w *world) hear() {
	for len(w.due) > 0 && w.now >= w.due[0] {
		w.answers[0]()
		w.answers, w.due = w.answers[1:], w.due[1:]
	}
}

var errAway = errors.New("registry is away")

// carryOut does at the registry what was decided.
func (w *world) carryOut(d *Decision) {
	var v *mgs.VIP
	var err error
	switch {
	case w.away:
		err = errAway
	case d.Abandon:
		err = w.reg.abandon(d.Index, d.Epoch)
	}
	if err == nil && d.To != "" {
		var x mgs.VIP
		if x, err = w.reg.assign(d.Index, d.Epoch, d.To); err == nil {
			v = &x
		}
	}
	w.decided(d, v, err)
	if w.late == 0 {
		w.m.Result(w.now, d.ID, v, err)
		return
	}
	m, id := w.m, d.ID
	w.answers = append(w.answers, func() { m.Result(w.now, id, v, err) })
	w.due = append(w.due, w.now+w.late)
}

// agent brings a node's units to what the registry says.
func (w *world) agent(n *wnode) {
	for _, i := range sorted(n.units) {
		u := n.units[i]
		for _, o := range w.nodes {
			// A peer's beats tell of a later period of service.
			if x := o.units[i]; o != n && o.runs() && w.linked(n.name, o.name) && x != nil && x.state == Serving && u.state == Serving && x.epoch > u.epoch {
				u.state, u.epoch = Absent, 0
			}
		}
	}
	if !w.reaches(n) {
		return
	}
	for i := range w.reg.vips {
		v := &w.reg.vips[i]
		u := n.units[v.Index]
		if u == nil {
			u = &unit{state: Absent}
			n.units[v.Index] = u
		}
		if u.move != v.MoveID {
			u.move, u.pause = v.MoveID, 0
			if u.state == Failed {
				u.next = w.now
			}
		}
		if w.now < u.next {
			continue
		}
		was := u.state
		switch u.state {
		case Absent:
			switch {
			case owner(v) == n.name: // of an earlier process
				_ = w.reg.abandon(v.Index, v.Epoch)
			case v.Next != n.name || n.stuck || n.unready != "":
			case n.fails:
				u.state, u.missed = Failed, v.MoveID
				w.paused(u)
			default:
				u.state = Listening
			}
		case Listening:
			switch {
			case v.Next != n.name:
				u.state = Absent
			case n.fails:
				u.state, u.missed = Failed, v.MoveID
			case !v.Ready:
				_ = w.reg.setReady(v.Index, v.MoveID)
			case owner(v) == "":
				if e, err := w.reg.take(v.Index, v.MoveID, n.name); err == nil {
					u.state, u.epoch = Taking, e
				}
			}
		case Taking:
			if n.fumbles {
				u.state, u.since, u.owes, u.missed = Failed, w.now, true, v.MoveID
				w.paused(u)
				continue
			}
			u.state = Serving
			w.served(n, v.Index, u.epoch)
		case Serving:
			switch {
			case v.Epoch > u.epoch || v.Node != n.name:
				u.state, u.epoch = Absent, 0
			case (v.Next == "" || v.Removed || v.Next != n.name && v.Ready) && !n.holds:
				u.state = Releasing
			}
		case Releasing:
			if w.reg.stopped(v.Index, u.epoch) == nil {
				u.state, u.epoch = Absent, 0
			}
		case Failed:
			switch {
			case u.stuck:
			case u.owes:
				_ = w.reg.abandon(v.Index, u.epoch)
				u.owes, u.epoch = false, 0
			case v.Next != n.name:
				u.state = Absent
			case n.fails && u.epoch == 0:
				u.missed = v.MoveID
				w.paused(u)
			case u.epoch == 0: // it tries again
				u.state = Listening
			}
		}
		if u.state != Failed {
			u.missed = 0
		}
		if u.state != was {
			u.next, u.since = max(u.next, w.now+w.delay()), w.now
		}
	}
}
