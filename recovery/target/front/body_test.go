package front

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// disk is what is left of a fakeBody when it dies: a log, of which a power
// failure loses what is not durable.
type disk struct {
	log     []entry
	durable int    // entries
	begun   uint64 // numbers are given in blocks; of the newest one
}

// entry is a transaction of a fakeBody. Its zero fields are not of that kind.
type entry struct {
	transno uint64
	who     string            // the operation
	writes  map[string]uint64 // versions of objects
	pre     [4]uint64
	key     wire.ReplyKey
	slot    *recov.SlotRecord
	put     *recov.ClientRecord
	del     *wire.ClientID
	target  *recov.TargetRecord
	vip     uint32
	epoch   uint64
}

func (d *disk) crash() { d.log = slices.Clip(d.log[:d.durable]) }

// fakeBody is a Body in memory, with objects that have versions. An operation
// names, in Request.Name, the objects that it changes and after a '#' itself.
// The order of the log is that of executions, under mu, as at an MDT.
type fakeBody struct {
	t  testing.TB
	mu sync.Mutex
	d  *disk

	clients map[wire.ClientID]recov.ClientRecord
	objects map[string]uint64
	ops     map[string]uint64 // transno by operation
	keys    map[wire.ReplyKey]entry
	vips    map[uint32]uint64
	tenures map[wire.ClientID]uint64

	last      uint64 // transno
	committed uint64
	begun     bool
	replayed  uint64
	replaying atomic.Int32
	gates     []gate
	dead      bool
	putFails  error // of the next PutClient or PutTarget
	slow      bool  // PutClient and RaiseVIP wait for somebody's commit
	puts      []put

	// Hooks of tests; all may be nil.
	later    func(who string, run func()) // executes: at once if nil
	doneLate func(who string, done func())
	onCall   func(what string) // DelClient and so on, before it is done
	onReplay func(mismatch bool)
	onCommit func()                      // CommitSoon
	onRaise  func(done func(error)) bool // true: it calls done
	polls    []func()                    // OpLockPoll requests that wait
	reads    []func()                    // of the op that blocks (OpStatfs)
	calls    []string                    // what was called, but for executions
	executed []string
}

type put struct {
	n    int // entries that have to be durable
	done func(error)
}

type gate struct {
	transno uint64
	rep     *wire.Reply
	done    func()
}

func newBody(t testing.TB, d *disk) *fakeBody {
	b := &fakeBody{
		t: t, d: d, clients: map[wire.ClientID]recov.ClientRecord{}, objects: map[string]uint64{}, ops: map[string]uint64{},
		keys: map[wire.ReplyKey]entry{}, vips: map[uint32]uint64{}, tenures: map[wire.ClientID]uint64{},
	}
	for i := range d.log {
		b.apply(i)
	}
	d.durable = len(d.log)
	b.last = max(b.last, d.begun*block)
	b.committed = b.last
	return b
}

func (b *fakeBody) apply(i int) {
	e := &b.d.log[i]
	b.last = max(b.last, e.transno)
	for k, v := range e.writes {
		b.objects[k] = v
	}
	if e.who != "" {
		if was := b.ops[e.who]; was != 0 {
			b.t.Errorf("%s is executed twice: as %d and %d", e.who, was, e.transno)
		}
		b.ops[e.who] = e.transno
	}
	if !e.key.IsZero() {
		b.keys[e.key] = *e
	}
	switch {
	case e.put != nil:
		if old, ok := b.clients[e.put.Client]; !ok || old.Gen != e.put.Gen {
			b.tenures[e.put.Client] = uint64(i + 1)
		}
		b.clients[e.put.Client] = *e.put
	case e.del != nil:
		delete(b.clients, *e.del)
		delete(b.tenures, *e.del)
	case e.vip != 0:
		b.vips[e.vip] = e.epoch
	}
}

func (b *fakeBody) append(e entry) {
	b.d.log = append(b.d.log, e)
	b.apply(len(b.d.log) - 1)
}

func (b *fakeBody) note(what string) {
	if b.onCall != nil {
		b.onCall(what)
	}
	b.mu.Lock()
	b.calls = append(b.calls, what)
	b.mu.Unlock()
}

func (b *fakeBody) Table() (Table, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.putFails != nil {
		return Table{}, b.putFails
	}
	t := Table{Transno: b.last}
	for _, e := range b.d.log {
		switch {
		case e.target != nil:
			t.Target = *e.target
		case e.slot != nil:
			t.Slots = append(t.Slots, *e.slot)
		case e.del != nil:
			t.Slots = slices.DeleteFunc(t.Slots, func(s recov.SlotRecord) bool { return s.Client == *e.del })
		}
	}
	t.Instance = t.Target.Instance + 1
	for _, c := range b.clients {
		t.Clients = append(t.Clients, c)
	}
	return t, nil
}

// commit makes the first n entries of the log durable.
func (b *fakeBody) commit(n int) {
	b.mu.Lock()
	if b.dead {
		b.mu.Unlock()
		return
	}
	b.d.durable = max(b.d.durable, min(n, len(b.d.log)))
	for _, e := range b.d.log[:b.d.durable] {
		b.committed = max(b.committed, e.transno)
	}
	var free []gate
	b.gates = slices.DeleteFunc(b.gates, func(g gate) bool {
		if g.transno <= b.committed {
			g.rep.LastCommitted = b.committed
			free = append(free, g)
			return true
		}
		return false
	})
	var puts []put
	b.puts = slices.DeleteFunc(b.puts, func(p put) bool {
		if p.n <= b.d.durable {
			puts = append(puts, p)
			return true
		}
		return false
	})
	b.mu.Unlock()
	for _, g := range free {
		g.done()
	}
	for _, p := range puts {
		p.done(nil)
	}
}

// whenDurable calls done when what is in the log now is durable.
func (b *fakeBody) whenDurable(done func(error)) {
	b.mu.Lock()
	n := len(b.d.log)
	if b.slow {
		b.puts = append(b.puts, put{n, done})
		b.mu.Unlock()
		return
	}
	b.mu.Unlock()
	b.commit(n)
	done(nil)
}

func (b *fakeBody) commitAll() { b.commit(1 << 60) }

// die fails the body; the front is told by its owner.
func (b *fakeBody) die() (release func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dead = true
	gates, puts := b.gates, b.puts
	b.gates, b.puts = nil, nil
	return func() { // answers what waited for the disk
		for _, g := range gates {
			g.rep.Reset()
			g.rep.Status = wire.ErrIO
			g.done()
		}
		for _, p := range puts {
			p.done(errDead)
		}
	}
}

func (b *fakeBody) admit(req *wire.Request) wire.Status {
	c, ok := b.clients[req.Client]
	switch {
	case req.Op == wire.OpOSTFetch:
	case !ok || req.ClientGen > c.Gen:
		return wire.ErrUnknownClient
	case req.ClientGen < c.Gen:
		return wire.ErrStaleClient
	case req.VIP != 0 && req.VIPEpoch < b.vips[req.VIP]:
		return wire.ErrStaleVIP
	case req.VIP != 0 && req.VIPEpoch > b.vips[req.VIP]:
		b.t.Errorf("%v is executed with VIP epoch %d, the body knows %d", req.Op, req.VIPEpoch, b.vips[req.VIP])
	}
	return wire.OK
}

func (b *fakeBody) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	if req.Op != wire.OpGetattr {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.read(req, rep)
	return true
}

func (b *fakeBody) read(req *wire.Request, rep *wire.Reply) {
	rep.XID = req.XID
	if b.dead {
		rep.Status = wire.ErrTargetDown
		return
	}
	if !b.begun {
		b.t.Errorf("%v before Begin", req.Op)
	}
	rep.Status, rep.LastCommitted = b.admit(req), b.committed
}

func (b *fakeBody) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	switch {
	case req.Op == wire.OpConnect || req.Op == wire.OpDisconnect:
		b.t.Errorf("%v gets to the body", req.Op)
	case req.Op.Modifies():
		b.mu.Lock()
		c, ok := b.clients[req.Client]
		remote := ok && !c.Local
		b.mu.Unlock()
		if remote {
			b.t.Errorf("%v of a remote client bypasses recovery", req.Op)
		}
		b.Execute(req, rep, Exec{}, local{done})
		return
	}
	b.mu.Lock()
	b.read(req, rep)
	switch {
	case req.Op == wire.OpLockPoll && !b.dead:
		b.polls = append(b.polls, done)
		done = nil
	case req.Op == wire.OpStatfs && !b.dead:
		b.reads = append(b.reads, done)
		done = nil
	}
	b.mu.Unlock()
	if done != nil {
		done()
	}
}

// local executes for a client that recovery has nothing to do with.
type local struct{ done func() }

func (local) Executed(recov.Result) bool { return false }
func (l local) Done()                    { l.done() }

func (b *fakeBody) Execute(req *wire.Request, rep *wire.Reply, x Exec, e Execution) {
	if x.Transno != 0 {
		if b.replaying.Add(1) != 1 {
			b.t.Error("two replays at a time")
		}
		defer b.replaying.Add(-1)
	}
	run := func() { b.execute(req, rep, x, e) }
	if b.later != nil {
		_, who := objects(req)
		b.later(who, run)
		return
	}
	run()
}

func (b *fakeBody) execute(req *wire.Request, rep *wire.Reply, x Exec, e Execution) {
	b.mu.Lock()
	res := recov.Result{NotDone: true, Status: wire.ErrTargetDown}
	if !b.dead {
		res = b.operate(req, rep, x)
	}
	rep.Status, rep.Transno, rep.PreVersions, rep.LastCommitted = res.Status, res.Transno, res.PreVersions, b.committed
	wait := e.Executed(res)
	if (wait || req.Flags&wire.FlagWaitCommit != 0) && res.Transno > b.committed && !b.dead {
		b.gates = append(b.gates, gate{res.Transno, rep, e.Done})
		b.mu.Unlock()
		return
	}
	b.mu.Unlock()
	if b.doneLate != nil {
		_, who := objects(req)
		b.doneLate(who, e.Done)
		return
	}
	e.Done()
}

func objects(req *wire.Request) (names []string, who string) {
	switch req.Op {
	case wire.OpOpenEpoch:
		return []string{req.FID.String()}, "open " + req.FID.String()
	case wire.OpCloseEpoch:
		return []string{req.Epochs[0].FID.String()}, "close " + req.Epochs[0].FID.String()
	}
	list, who, _ := strings.Cut(string(req.Name), "#")
	return strings.Fields(list), who
}

func (b *fakeBody) operate(req *wire.Request, rep *wire.Reply, x Exec) recov.Result {
	replay := x.Transno != 0
	names, who := objects(req)
	b.executed = append(b.executed, who)
	e := entry{transno: b.last + 1, who: who, writes: map[string]uint64{}, key: req.Key}
	switch {
	case replay && (b.begun || x.Transno <= b.replayed || x.Transno <= b.last):
		b.t.Errorf("%s is replayed as %d after %d, begun %t", who, x.Transno, max(b.last, b.replayed), b.begun)
	case replay:
		b.replayed, e.transno = x.Transno, x.Transno
	case !b.begun:
		b.t.Errorf("%s is executed before Begin", who)
	default:
		if st := b.admit(req); st != wire.OK {
			return recov.Result{NotDone: true, Status: st}
		}
		if old, ok := b.keys[req.Key]; ok && !req.Key.IsZero() {
			rep.Reconstructed = true
			return recov.Result{Transno: old.transno, PreVersions: old.pre, Data: []byte(who)}
		}
	}
	if was := b.ops[who]; was != 0 && !replay && (req.Op == wire.OpOpenEpoch || req.Op == wire.OpCloseEpoch) {
		return recov.Result{Data: []byte(who)} // nothing left to do
	}
	for i, n := range names {
		e.pre[i] = b.objects[n]
		e.writes[n] = e.transno
	}
	res := recov.Result{Transno: e.transno, PreVersions: e.pre, Data: []byte(who)}
	if replay && b.onReplay != nil {
		b.onReplay(x.CheckVersions && e.pre != req.PreVersions)
	}
	switch {
	case x.CheckVersions && e.pre != req.PreVersions:
		return recov.Result{Status: wire.ErrNotSync, PreVersions: e.pre, Mismatch: true}
	case slices.Contains(names, "refused"):
		return recov.Result{Status: wire.ErrExist, Data: []byte(who)}
	case slices.Contains(names, "busy"):
		return recov.Result{Status: wire.ErrJukebox, NotDone: true}
	}
	if x.KeepSlot {
		e.slot = &recov.SlotRecord{
			Client: req.Client, Gen: req.ClientGen, Slot: req.Slot, XID: req.XID, Transno: e.transno, Data: res.Data,
		}
	}
	b.append(e)
	return res
}

func (b *fakeBody) Rebuild(req *wire.Request, rep *wire.Reply, slot *recov.SlotRecord) {
	if _, who := objects(req); len(slot.Data) > 0 && string(slot.Data) != who {
		b.t.Errorf("%s gets the answer of %s", who, slot.Data)
	}
	b.note("rebuild")
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.d.log {
		if e.transno == slot.Transno {
			rep.PreVersions = e.pre
		}
	}
}

func (b *fakeBody) WaitCommit(transno uint64, rep *wire.Reply, done func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case transno <= b.committed:
		rep.LastCommitted = b.committed
		return false
	case b.dead:
		rep.Status = wire.ErrIO
		return false
	}
	b.gates = append(b.gates, gate{transno, rep, done})
	return true
}

func (b *fakeBody) LastCommitted() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.committed
}

func (b *fakeBody) CommitSoon() {
	b.note("commit")
	if b.onCommit != nil {
		b.onCommit()
	}
}

func (b *fakeBody) fails() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.putFails
	b.putFails = nil
	if b.dead && err == nil {
		err = errDead
	}
	return err
}

var errDead = errors.New("the body is dead")

func (b *fakeBody) PutClient(r recov.ClientRecord, done func(error)) {
	b.note(fmt.Sprintf("put %x gen %d failed at %d", r.Client[:1], r.Gen, r.FailedAt))
	err := b.fails()
	if err == nil {
		b.mu.Lock()
		b.append(entry{put: &r})
		b.mu.Unlock()
		if done != nil {
			b.whenDurable(done)
		}
		return
	}
	if done != nil {
		done(err)
	}
}

func (b *fakeBody) DelClient(id wire.ClientID, gen uint64, evicted bool) {
	b.note(fmt.Sprintf("del %x gen %d evicted %t", id[:1], gen, evicted))
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.dead {
		return
	}
	if _, ok := b.clients[id]; !ok {
		b.t.Errorf("client %x is removed and was not there", id[:1])
	}
	b.append(entry{del: &id})
}

func (b *fakeBody) PutTarget(r recov.TargetRecord) error {
	b.note(fmt.Sprintf("target instance %d clean %t", r.Instance, r.Clean))
	if err := b.fails(); err != nil {
		return err
	}
	b.mu.Lock()
	b.append(entry{target: &r})
	b.mu.Unlock()
	b.commitAll()
	return nil
}

func (b *fakeBody) Begin(transno uint64) {
	b.note("begin")
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.begun {
		b.t.Error("Begin is called twice")
	}
	if transno < b.last {
		b.t.Errorf("Begin above %d, the log ends at %d", transno, b.last)
	}
	b.d.begun = max(b.d.begun, transno/block) + 1
	b.begun, b.last = true, b.d.begun*block
}

const block = 1000

func (b *fakeBody) Tenure(id wire.ClientID) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.tenures[id]
}

func (b *fakeBody) VIPEpoch(vip uint32) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.vips[vip]
}

func (b *fakeBody) RaiseVIP(vip uint32, epoch uint64, done func(error)) {
	b.note(fmt.Sprintf("raise vip %d to %d", vip, epoch))
	finish := func(err error) {
		if err == nil {
			b.mu.Lock()
			if epoch > b.vips[vip] {
				b.append(entry{vip: vip, epoch: epoch})
			}
			b.mu.Unlock()
			b.whenDurable(done)
			return
		}
		done(err)
	}
	if b.onRaise != nil && b.onRaise(finish) {
		return
	}
	finish(b.fails())
}

func (b *fakeBody) MayBlock(op wire.Op) bool { return op == wire.OpStatfs }

var _ Body = (*fakeBody)(nil)
