package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// network carries messages between processes. They are really encoded; each
// takes its time; those of one direction of one connection arrive in order. What
// a broken connection carried gets through up to some byte, and perhaps late.
type network struct {
	w *world

	mu      sync.Mutex
	conns   map[*conn]bool     // not over
	serial  map[string]int     // of connections, by their ends
	blocked map[[2]string]bool // from node, to node
	healed  *sync.Cond         // blocked or a node's state has changed
	filter  func(*message) verdict
	work    func(*message) time.Duration // what a target takes longer for what may block
}

// verdict is what a filter does with a message.
type verdict struct {
	cut   bool          // the connection breaks before it is sent
	cutAt bool          // the connection breaks when it has arrived
	delay time.Duration // more than usual
}

// message is a request or a reply on its way.
type message struct {
	c     *conn
	reply bool
	op    wire.Op
	tag   uint64
	head  []byte
	bulk  []byte
	at    time.Time
	fin   bool // the end of the stream
	cutAt bool
	xid   uint64
}

func newNetwork(w *world) *network {
	n := &network{w: w, conns: map[*conn]bool{}, serial: map[string]int{}, blocked: map[[2]string]bool{}}
	n.healed = sync.NewCond(&n.mu)
	return n
}

// flow is one direction of a connection.
type flow struct {
	c       *conn
	reply   bool
	rng     *rand.Rand
	last    time.Time
	queue   []*message
	busy    bool // somebody delivers
	stalled bool
	over    bool // nothing more arrives
}

// conn is a path from a process to a target: a control and a bulk connection. It
// implements wire.Conn as the real transport's bundle does.
type conn struct {
	n       *network
	name    string
	from    *process
	to      *process
	target  string
	session uint64
	gone    chan struct{}

	// Under the network's lock.
	to_, back [2]*flow
	srv       [2]wire.Target
	pend      map[uint64]*pending
	tags      uint64
	cut       bool // nothing that is sent from now on arrives
	closed    bool // the client's end knows
	shut      bool // the server's end knows
	inside    int  // calls of the target's methods
	stopped   bool // the target has been told
	silent    bool // a machine without power says nothing
}

type pending struct {
	req  *wire.Request
	rep  *wire.Reply
	done func(error)
}

var errBroken = errors.New("connection broken")

// passes tells whether messages get from one node to another. The lock is held.
func (n *network) passes(from, to *node) bool {
	return !n.blocked[[2]string{from.name, to.name}] && !from.paused && !to.paused
}

// change alters who can reach whom and lets go what is free.
func (n *network) change(f func()) {
	n.mu.Lock()
	f()
	var flows []*flow
	for c := range n.conns {
		for _, f := range [...]*flow{c.to_[0], c.to_[1], c.back[0], c.back[1]} {
			if f.stalled && n.passes(f.ends()) {
				f.stalled = false
				flows = append(flows, f)
			}
		}
	}
	n.healed.Broadcast()
	now := time.Now()
	for _, f := range flows {
		// What has waited arrives in a burst, each connection's at its time.
		d := f.delay()
		for i, m := range f.queue {
			if t := now.Add(d + time.Duration(i)); m.at.Before(t) {
				m.at = t
			}
			f.last = m.at
		}
		f.arm()
	}
	n.mu.Unlock()
}

func (f *flow) ends() (from, to *node) {
	if f.reply {
		return f.c.to.node, f.c.from.node
	}
	return f.c.from.node, f.c.to.node
}

// delay is how long the next message takes.
func (f *flow) delay() time.Duration {
	switch r := f.rng.IntN(100); {
	case r < 80:
		return time.Duration(50_000 + f.rng.IntN(500_000))
	case r < 97:
		return time.Duration(200_000 + f.rng.IntN(8_000_000))
	}
	return time.Duration(1_000_000 + f.rng.IntN(int(f.c.n.w.cfg.slowest)))
}

// send puts a message on its way. The lock is held.
func (f *flow) send(m *message, extra time.Duration) {
	if f.over || f.c.cut {
		return
	}
	m.at = time.Now().Add(f.delay() + extra)
	if !m.at.After(f.last) {
		m.at = f.last.Add(1)
	}
	f.last = m.at
	f.queue = append(f.queue, m)
	if len(f.queue) == 1 && !f.busy {
		f.arm()
	}
}

// arm has the first message delivered at its time. The lock is held.
func (f *flow) arm() {
	if len(f.queue) > 0 && !f.stalled {
		time.AfterFunc(time.Until(f.queue[0].at), f.pump)
	}
}

// pump delivers what is due.
func (f *flow) pump() {
	n := f.c.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if f.busy || f.stalled {
		return
	}
	f.busy = true
	for len(f.queue) > 0 && !f.over {
		m := f.queue[0]
		if m.at.After(time.Now()) {
			break
		}
		if !n.passes(f.ends()) {
			f.stalled = true
			break
		}
		f.queue = f.queue[1:]
		f.deliver(m)
	}
	f.busy = false
	f.arm()
}

// deliver gives a message to its end. The lock is held, and given up meanwhile.
func (f *flow) deliver(m *message) {
	c, n := f.c, f.c.n
	switch {
	case m.fin && !m.reply:
		c.endServer()
	case m.fin:
		c.endClient()
	case m.reply:
		p := c.pend[m.tag]
		delete(c.pend, m.tag)
		if p == nil {
			return // the caller had no patience
		}
		n.mu.Unlock()
		err := m.decodeReply(p)
		if err != nil {
			n.w.fault("reply of %s does not decode: %v", c.target, err)
		}
		p.done(nil)
		n.mu.Lock()
		if m.cutAt {
			c.breaks()
		}
	default:
		lane := 0
		if f == c.to_[1] {
			lane = 1
		}
		srv := c.srv[lane]
		if c.shut || srv == nil {
			return
		}
		c.inside++
		n.mu.Unlock()
		c.execute(srv, m)
		n.mu.Lock()
		c.leave()
		if m.cutAt {
			c.breaks()
		}
	}
}

func (m *message) decodeReply(p *pending) error {
	k, err := wire.DecodeReply(m.head, m.op, p.rep)
	if err != nil {
		return err
	}
	if k != len(m.bulk) || k > len(p.req.Bulk) && k > 0 {
		return fmt.Errorf("%d bytes of bulk, announced %d", len(m.bulk), k)
	}
	copy(p.req.Bulk, m.bulk)
	return nil
}

// leave notes that a call of the target has returned. The lock is held.
func (c *conn) leave() {
	c.inside--
	c.stop()
}

// stop closes the connection at the target, after the last call. The lock is
// held, and given up meanwhile.
func (c *conn) stop() {
	if !c.shut || c.inside > 0 || c.stopped {
		return
	}
	c.stopped = true
	c.over()
	c.n.mu.Unlock()
	for _, t := range c.srv {
		t.(io.Closer).Close()
	}
	c.n.mu.Lock()
}

// execute gives a request to the target, as the real transport does.
func (c *conn) execute(srv wire.Target, m *message) {
	req, rep := &wire.Request{}, &wire.Reply{}
	if err := wire.DecodeRequest(m.head, req); err != nil {
		c.n.w.fault("request to %s does not decode: %v", c.target, err)
		return
	}
	req.Bulk = m.bulk
	if m.op.FillsBulk() {
		req.Bulk = make([]byte, wire.RequestBulk(m.head))
	}
	if c.n.w.tracing {
		c.n.w.trace("%s > %s", c.name, describe(req))
	}
	answer := func() { c.answer(m, req, rep) }
	if srv.TryHandle(req, rep) {
		answer()
		return
	}
	rep.Reset()
	if b, ok := srv.(wire.Blocker); ok && b.MayBlock(req.Op) {
		var more time.Duration
		c.n.mu.Lock()
		c.inside++
		if c.n.work != nil {
			more = c.n.work(m)
		}
		c.n.mu.Unlock()
		c.n.w.zombies.Go(func() {
			time.Sleep(more)
			srv.Handle(req, rep, answer)
			c.n.mu.Lock()
			c.leave()
			c.n.mu.Unlock()
		})
		return
	}
	srv.Handle(req, rep, answer)
}

func (c *conn) answer(m *message, req *wire.Request, rep *wire.Reply) {
	if c.n.w.tracing {
		c.n.w.trace("%s < %s", c.name, describeReply(req, rep))
	}
	if rep.Status == wire.ErrTooLate {
		c.n.w.count("refused " + opName(m.op))
	}
	r := &message{c: c, reply: true, op: m.op, tag: m.tag, xid: req.XID, head: wire.AppendReply(nil, m.op, rep)}
	if k := wire.ReplyBulk(m.op, rep); k > 0 {
		r.bulk = slices.Clone(req.Bulk[:k])
	}
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.shut || c.to.dead.Load() {
		return
	}
	f := c.back[0]
	if m.big() {
		f = c.back[1]
	}
	c.n.post(f, r)
}

// request gives what a message that is no reply asks for.
func (m *message) request() (q wire.Request) {
	if err := wire.DecodeRequest(m.head, &q); err != nil {
		m.c.n.w.fault("request to %s does not decode: %v", m.c.target, err)
	}
	return q
}

// big tells whether a message goes by the bulk connection.
func (m *message) big() bool { return m.op == wire.OpWrite || m.op == wire.OpRead }

// post sends a message unless the filter wants something else. The lock is held.
func (n *network) post(f *flow, m *message) {
	var v verdict
	if n.filter != nil && !f.c.cut {
		v = n.filter(m)
	}
	if v.cut {
		n.w.trace("%s breaks before op %d", f.c.name, m.op)
		f.c.breaks()
		return
	}
	m.cutAt = v.cutAt
	f.send(m, v.delay)
}

// Start implements the transport's part of an import.
func (c *conn) Start(req *wire.Request, rep *wire.Reply, done func(error)) { c.start(req, rep, done) }

func (c *conn) start(req *wire.Request, rep *wire.Reply, done func(error)) (tag uint64) {
	if st := wire.CheckRequest(req); st != wire.OK {
		rep.Reset()
		rep.Status = st
		done(nil)
		return 0
	}
	m := &message{c: c, op: req.Op, xid: req.XID, head: wire.AppendRequest(nil, req)}
	if req.Op.SendsBulk() {
		m.bulk = slices.Clone(req.Bulk)
	}
	n := c.n
	n.mu.Lock()
	if c.closed || c.from.dead.Load() {
		n.mu.Unlock()
		rep.Status = wire.ErrTargetDown
		done(&wire.LostError{Err: errBroken})
		return 0
	}
	c.tags++
	m.tag = c.tags
	c.pend[m.tag] = &pending{req, rep, done}
	f := c.to_[0]
	if m.big() {
		f = c.to_[1]
	}
	n.post(f, m)
	n.mu.Unlock()
	return m.tag
}

// Handle implements wire.Target.
func (c *conn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	c.start(req, rep, func(err error) {
		if err != nil {
			rep.Reset()
			rep.Status = wire.ErrTargetDown
		}
		done()
	})
}

// TryHandle implements wire.Target.
func (c *conn) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Call implements wire.Conn.
func (c *conn) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	w := make(chan error, 1)
	tag := c.start(req, rep, func(err error) { w <- err })
	select {
	case err := <-w:
		return err
	case <-ctx.Done():
	}
	c.n.mu.Lock()
	p := c.pend[tag]
	delete(c.pend, tag)
	c.n.mu.Unlock()
	if p == nil {
		return <-w
	}
	rep.Reset()
	rep.Status = wire.ErrTargetDown
	return &wire.LostError{Sent: true, Err: ctx.Err()}
}

// Done is closed when everything has been given back.
func (c *conn) Done() <-chan struct{} { return c.gone }

// Close implements wire.Conn: what was sent may still arrive.
func (c *conn) Close() error {
	n := c.n
	n.mu.Lock()
	if !c.closed {
		for _, f := range c.to_ {
			f.send(&message{c: c, fin: true}, 0)
		}
		c.late(n.w.cfg.keepalive)
		c.endClient()
	}
	n.mu.Unlock()
	return nil
}

// late has the target notice the connection's end at the latest then. The lock is held.
func (c *conn) late(d time.Duration) {
	time.AfterFunc(d, func() {
		c.n.mu.Lock()
		c.endServer()
		c.n.mu.Unlock()
	})
}

// endServer: the target notices the end. The lock is held.
func (c *conn) endServer() {
	if c.shut {
		return
	}
	c.shut, c.cut = true, true
	for _, f := range c.to_ {
		f.over, f.queue = true, nil
	}
	if !c.closed && !c.silent {
		c.cut = false
		for _, f := range c.back {
			f.send(&message{c: c, reply: true, fin: true}, 0)
		}
		c.cut = true
	}
	c.stop()
}

// endClient: the client notices the end and gets back what was not answered. The
// lock is held, and given up meanwhile.
func (c *conn) endClient() {
	if c.closed {
		return
	}
	c.closed = true
	for _, f := range c.back {
		f.over, f.queue = true, nil
	}
	tags := make([]uint64, 0, len(c.pend))
	for t := range c.pend {
		tags = append(tags, t)
	}
	slices.Sort(tags)
	var list []*pending
	for _, t := range tags {
		list = append(list, c.pend[t])
	}
	clear(c.pend)
	c.over()
	c.n.mu.Unlock()
	for _, p := range list {
		p.rep.Reset()
		p.rep.Status = wire.ErrTargetDown
		p.done(&wire.LostError{Sent: true, Err: errBroken})
	}
	close(c.gone)
	c.n.mu.Lock()
}

// over forgets a connection that both ends know to be over. The lock is held.
func (c *conn) over() {
	if c.closed && c.shut {
		delete(c.n.conns, c)
	}
}

// breaks cuts the connection now, at some byte of what it carries each way. The
// ends notice sooner or later. The lock is held.
func (c *conn) breaks() {
	if c.cut {
		return
	}
	c.cut = true
	for _, f := range [...]*flow{c.to_[0], c.to_[1], c.back[0], c.back[1]} {
		total := 0
		for _, m := range f.queue {
			total += len(m.head) + len(m.bulk) + 1
		}
		left := 0
		if total > 0 {
			left = f.rng.IntN(total + 1)
		}
		for i, m := range f.queue {
			if left -= len(m.head) + len(m.bulk) + 1; left < 0 {
				f.queue = f.queue[:i]
				break
			}
		}
	}
	r := c.back[0].rng
	soon := func() time.Duration {
		if c.silent && c.from.dead.Load() {
			return c.n.w.cfg.keepalive
		}
		if r.IntN(4) > 0 {
			return time.Duration(r.IntN(int(3 * time.Millisecond)))
		}
		return time.Duration(r.IntN(int(2 * time.Second)))
	}
	tell := soon()
	if c.silent {
		tell = time.Duration(r.IntN(int(c.n.w.cfg.keepalive)))
	}
	c.late(soon())
	time.AfterFunc(tell, func() {
		c.n.mu.Lock()
		c.endClient()
		c.n.mu.Unlock()
	})
}

// died ends all connections of a process: at once if only the process died, and
// only after a time-out of the other end if its machine has.
func (n *network) died(p *process, power bool) {
	n.mu.Lock()
	var list []*conn
	for c := range n.conns {
		if c.from == p || c.to == p {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b *conn) int { return int(int64(a.session) - int64(b.session)) })
	for _, c := range list {
		c.silent = power
		c.breaks()
		if c.from == p {
			c.endClient()
			continue
		}
		if power {
			for _, f := range c.back {
				f.queue = nil
			}
		}
		c.endServer()
	}
	n.mu.Unlock()
}

// cutAll breaks connections that pred chooses.
func (n *network) cutAll(pred func(*conn) bool) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []*conn
	for c := range n.conns {
		if pred(c) {
			list = append(list, c)
		}
	}
	for _, c := range list {
		c.breaks()
	}
	return len(list)
}

// dial connects a process to a target that may be at addr.
func (n *network) dial(ctx context.Context, p *process, addr, target string) (wire.Conn, error) {
	to := n.w.node(addr)
	if p.dead.Load() {
		return nil, errBroken
	}
	if to == p.node {
		if t := p.service(target); t != nil {
			if n.w.tracing {
				return wire.Local(&localTrace{t, n.w, p.node.name + ">" + target, t}, wire.NextSession()), nil
			}
			return wire.Local(t, wire.NextSession()), nil
		}
		return nil, errRefused
	}
	stop := context.AfterFunc(ctx, func() {
		n.mu.Lock()
		n.healed.Broadcast()
		n.mu.Unlock()
	})
	defer stop()
	n.mu.Lock()
	defer n.mu.Unlock()
	for !(n.passes(p.node, to) && n.passes(to, p.node) && to.powered) && ctx.Err() == nil {
		n.healed.Wait()
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	key := p.node.name + ">" + target + "@" + addr
	n.serial[key]++
	c := &conn{n: n, name: fmt.Sprintf("%s#%d", key, n.serial[key]), from: p, target: target, gone: make(chan struct{}), pend: map[uint64]*pending{}}
	h := fnv.New64()
	io.WriteString(h, c.name)
	rng := rand.New(rand.NewPCG(n.w.seed, h.Sum64()))
	n.mu.Unlock()
	err := sleep(ctx, time.Duration(100_000+rng.IntN(2_000_000)))
	n.mu.Lock()
	if err != nil {
		return nil, err
	}
	q := to.process()
	if q == nil || p.dead.Load() {
		return nil, errRefused
	}
	t := q.service(target)
	if t == nil {
		return nil, errRefused
	}
	c.to, c.session = q, wire.NextSession()
	for i := range c.to_ {
		c.to_[i] = &flow{c: c, rng: rand.New(rand.NewPCG(rng.Uint64(), 1))}
		c.back[i] = &flow{c: c, reply: true, rng: rand.New(rand.NewPCG(rng.Uint64(), 2))}
	}
	n.mu.Unlock()
	peer := wire.Peer{Node: p.node.name, Session: c.session}
	c.srv = [2]wire.Target{t.Accept(peer), t.Accept(peer)}
	n.mu.Lock()
	n.conns[c] = true
	if q.dead.Load() {
		c.breaks()
	}
	return c, nil
}

// localTrace shows the requests of a connection inside a process.
type localTrace struct {
	wire.Target
	w    *world
	name string
	acc  wire.Acceptor
}

func (l *localTrace) Accept(p wire.Peer) wire.Target {
	return &localTrace{l.acc.Accept(p), l.w, l.name, nil}
}

func (l *localTrace) Close() error { return l.Target.(io.Closer).Close() }

func (l *localTrace) MayBlock(op wire.Op) bool {
	b, ok := l.Target.(wire.Blocker)
	return ok && b.MayBlock(op)
}

func (l *localTrace) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	ok := l.Target.TryHandle(req, rep)
	if ok {
		l.w.trace("%s >< %s: %s", l.name, describe(req), describeReply(req, rep))
	}
	return ok
}

func (l *localTrace) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	l.w.trace("%s > %s", l.name, describe(req))
	q := *req
	l.Target.Handle(req, rep, func() {
		l.w.trace("%s < %s", l.name, describeReply(&q, rep))
		done()
	})
}

var errRefused = errors.New("connection refused")

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func describe(q *wire.Request) string {
	s := fmt.Sprintf("%s xid %d", opName(q.Op), q.XID)
	if q.FID != (wire.FID{}) {
		s += fmt.Sprintf(" %v", q.FID)
	}
	if len(q.Name) > 0 {
		s += fmt.Sprintf(" %q", q.Name)
	}
	if len(q.Name2) > 0 {
		s += fmt.Sprintf(" %v %q", q.FID2, q.Name2)
	}
	if q.Op == wire.OpWrite || q.Op == wire.OpRead {
		s += fmt.Sprintf(" stripe %d at %d+%d stable %d", q.Stripe, q.Offset, len(q.Bulk), q.Stable)
	}
	if q.Op == wire.OpPunch {
		s += fmt.Sprintf(" stripe %d size %d log %d", q.Stripe, q.Size, q.LogID)
	}
	if len(q.Epochs) > 0 {
		s += fmt.Sprintf(" epochs %v", q.Epochs)
	}
	if q.Tenure != 0 {
		s += fmt.Sprintf(" tenure %x", q.Tenure)
	}
	if q.Flags&wire.FlagReplay != 0 {
		s += fmt.Sprintf(" REPLAY %d", q.Transno)
	}
	if q.Flags&wire.FlagResend != 0 {
		s += " RESEND"
	}
	if q.Flags&wire.FlagLastReplay != 0 {
		s += " LAST"
	}
	return s
}

func describeReply(q *wire.Request, r *wire.Reply) string {
	s := fmt.Sprintf("%s xid %d: %v", opName(q.Op), q.XID, r.Status)
	if r.Transno != 0 {
		s += fmt.Sprintf(" transno %d", r.Transno)
	}
	s += fmt.Sprintf(" committed %d", r.LastCommitted)
	if q.Op.IsOST() && r.Obj.Exists {
		s += fmt.Sprintf(" size %d", r.Obj.Size)
	}
	if r.Reconstructed {
		s += " RECONSTRUCTED"
	}
	if q.Op == wire.OpConnect {
		s += fmt.Sprintf(" instance %d known %v recovering %v tenure %x", r.Instance, r.Known, r.Recovering, r.Tenure)
	}
	return s
}

var opNames = map[wire.Op]string{
	wire.OpConnect: "CONNECT", wire.OpDisconnect: "DISCONNECT", wire.OpPing: "PING", wire.OpSetVIPEpoch: "SETVIP", wire.OpSyncTarget: "SYNCTARGET",
	wire.OpStatfs: "STATFS", wire.OpFence: "FENCE", wire.OpGetattr: "GETATTR", wire.OpLookup: "LOOKUP", wire.OpCreate: "CREATE", wire.OpMkdir: "MKDIR",
	wire.OpRemove: "REMOVE", wire.OpRmdir: "RMDIR", wire.OpRename: "RENAME", wire.OpLink: "LINK", wire.OpSetattr: "SETATTR", wire.OpTruncateDone: "TRUNCATEDONE",
	wire.OpReaddir: "READDIR", wire.OpOpenEpoch: "OPENEPOCH", wire.OpCloseEpoch: "CLOSEEPOCH", wire.OpOSTFetch: "OSTFETCH", wire.OpRead: "READ",
	wire.OpWrite: "WRITE", wire.OpPunch: "PUNCH", wire.OpSyncObject: "SYNCOBJECT", wire.OpObjAttr: "OBJATTR", wire.OpDestroy: "DESTROY", wire.OpSymlink: "SYMLINK",
	wire.OpAnnounce: "ANNOUNCE", wire.OpWatch: "WATCH", wire.OpWatchers: "WATCHERS", wire.OpWatchVIPs: "WATCHVIPS",
}

func opName(o wire.Op) string {
	if s := opNames[o]; s != "" {
		return s
	}
	return fmt.Sprintf("op %d", o)
}
