package front

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// rig is a front with a fakeBody, in a synctest bubble: its time is virtual.
type rig struct {
	t      *testing.T
	d      *disk
	b      *fakeBody
	f      *Front
	cfg    recov.Config
	log    lines
	states []recov.State
	told   []error // by OnFail
	open   []*answer
	conns  []wire.Target
}

type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) has(parts ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		n := 0
		for _, p := range parts {
			if strings.Contains(line, p) {
				n++
			}
		}
		if n == len(parts) {
			return true
		}
	}
	return false
}

var cfg = recov.Config{
	SoftMin: 10 * time.Second, SoftMax: 40 * time.Second, Hard: 60 * time.Second, Step: 5 * time.Second,
	PingInterval: 5 * time.Second, PingTimeout: 30 * time.Second, MaxSlots: 8,
}

// inRig runs a test with a target that has never run before.
func inRig(t *testing.T, fn func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, d: &disk{}, cfg: cfg}
		r.start()
		fn(r)
		r.end()
	})
}

func (r *rig) start() {
	r.t.Helper()
	r.b = newBody(r.t, r.d)
	f, err := New(r.options())
	if err != nil {
		r.t.Fatal(err)
	}
	r.f = f
	synctest.Wait()
}

func (r *rig) options() Options {
	return Options{
		Name: "MDT0000", Body: r.b, Config: r.cfg, OnState: func(s recov.State) { r.states = append(r.states, s) },
		OnFail: func(err error) { r.told = append(r.told, err) },
		Logger: slog.New(slog.NewTextHandler(&r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// kill ends the target as a crash does. What was not durable is lost.
func (r *rig) kill() {
	r.t.Helper()
	release := r.b.die()
	r.f.Fail(errDead)
	release()
	for _, p := range r.b.polls {
		p()
	}
	for _, p := range r.b.reads {
		p()
	}
	for _, c := range r.conns {
		c.(io.Closer).Close()
	}
	r.conns = nil
	synctest.Wait()
	select {
	case <-r.f.ended:
	default:
		r.t.Error("a failed front does not end")
	}
	r.answered()
	r.d.crash()
}

func (r *rig) crash() {
	r.t.Helper()
	r.kill()
	r.start()
}

// answered checks that every request so far has got one answer.
func (r *rig) answered() {
	r.t.Helper()
	for _, a := range r.open {
		if n := a.n.Load(); n != 1 {
			r.t.Errorf("%v %s has %d answers", a.req.Op, a.req.Name, n)
		}
	}
	r.open = nil
}

func (r *rig) end() {
	r.t.Helper()
	r.b.commitAll()
	synctest.Wait()
	r.kill()
}

// answer is a request and, when it has come, its reply.
type answer struct {
	req wire.Request
	rep wire.Reply
	n   atomic.Int32
}

func (a *answer) done() { a.n.Add(1) }

func (r *rig) send(c wire.Target, req wire.Request) *answer {
	a := &answer{req: req}
	r.open = append(r.open, a)
	c.Handle(&a.req, &a.rep, a.done)
	synctest.Wait()
	return a
}

// want checks that a request was answered with the status.
func (r *rig) want(a *answer, st wire.Status) *wire.Reply {
	r.t.Helper()
	n := a.n.Load()
	if n != 1 || a.rep.Status != st {
		r.t.Errorf("%v %s: %d answers, status %v, want %v", a.req.Op, a.req.Name, n, a.rep.Status, st)
	}
	if n == 1 && a.rep.XID != a.req.XID {
		r.t.Errorf("%v %s: XID %d in the answer to %d", a.req.Op, a.req.Name, a.rep.XID, a.req.XID)
	}
	return &a.rep
}

func (r *rig) waits(a *answer) {
	r.t.Helper()
	if a.n.Load() != 0 {
		r.t.Errorf("%v %s is answered: %v", a.req.Op, a.req.Name, a.rep.Status)
	}
}

func (r *rig) accept(p wire.Peer) wire.Target {
	c := r.f.Accept(p)
	r.conns = append(r.conns, c)
	return c
}

// client is a remote client, or one in the target's process.
type client struct {
	r        *rig
	id       wire.ClientID
	gen, xid uint64
	peer     wire.Peer
	c        wire.Target
	slot     uint16
	instance uint64
	told     uint64
}

func (r *rig) client(name string) *client {
	k := &client{r: r, gen: 1, peer: wire.Peer{Node: "node-" + name}}
	copy(k.id[:], name)
	return k
}

func (r *rig) local(name string) *client {
	k := r.client(name)
	k.peer = wire.Peer{Local: true}
	return k
}

// dial makes a connection of a new session.
func (k *client) dial() *client {
	k.peer.Session++
	k.c = k.r.accept(k.peer)
	return k
}

func (k *client) hdr(op wire.Op) wire.Request {
	k.xid++
	return wire.Request{Header: wire.Header{Op: op, Client: k.id, ClientGen: k.gen, XID: k.xid, Slot: k.slot}}
}

func (k *client) connectReq() wire.Request {
	q := k.hdr(wire.OpConnect)
	q.Cookie, q.Transno, q.Flags = k.instance, k.told, wire.FlagWaitCommit
	return q
}

// connect dials and connects.
func (k *client) connect() *answer {
	k.dial()
	a := k.r.send(k.c, k.connectReq())
	if a.n.Load() == 1 && a.rep.Status == wire.OK {
		k.instance = a.rep.Instance
	}
	return a
}

// join connects a client that has to be let in.
func (k *client) join() *client {
	k.r.t.Helper()
	k.r.want(k.connect(), wire.OK)
	return k
}

func (k *client) op(op wire.Op) *answer { return k.r.send(k.c, k.hdr(op)) }

// change makes the request of an operation on objects.
func (k *client) change(objects string) wire.Request {
	q := k.hdr(wire.OpMkdir)
	q.Name = append([]byte(objects+"#"), k.id[0], byte('0'+k.xid/100), byte('0'+k.xid/10%10), byte('0'+k.xid%10))
	return q
}

func (k *client) do(objects string) *answer { return k.r.send(k.c, k.change(objects)) }

// replay makes an answered request one that is replayed.
func replay(a *answer) wire.Request {
	q := a.req
	q.Flags |= wire.FlagReplay
	q.Transno, q.PreVersions = a.rep.Transno, a.rep.PreVersions
	return q
}

func resend(a *answer) wire.Request {
	q := a.req
	q.Flags |= wire.FlagResend
	return q
}

func (k *client) last() *answer {
	q := k.hdr(wire.OpPing)
	q.Flags = wire.FlagLastReplay
	return k.r.send(k.c, q)
}

func (k *client) close() {
	k.c.(io.Closer).Close()
	synctest.Wait()
}
