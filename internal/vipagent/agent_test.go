package vipagent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

// patience is only for tests that hang.
const patience = 30 * time.Second

var addr = netip.MustParseAddr("192.0.2.9")

// document is a registry's storage in memory.
type document struct {
	mu  sync.Mutex
	doc []byte
	rev uint64
}

func (d *document) Name() string { return "memory" }

func (d *document) Load(context.Context) ([]byte, uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.doc, d.rev, nil
}

func (d *document) Swap(_ context.Context, rev uint64, doc []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if rev != d.rev {
		return mgs.ErrConflict
	}
	d.doc, d.rev = doc, rev+1
	return nil
}

// registry is one whose answers can be late.
type registry struct {
	*mgs.Stored
	taken chan struct{} // gets a value when Take was done; nil: answers come at once
	let   chan struct{} // has Take's answer come
	news  chan struct{} // and what Watch says after its first answer
	ended func()        // called before Stopped; nil: nothing
}

func (r *registry) Stopped(ctx context.Context, index uint32, epoch uint64) error {
	if r.ended != nil {
		r.ended()
	}
	return r.Stored.Stopped(ctx, index, epoch)
}

func (r *registry) Take(ctx context.Context, index uint32, move uint64) (mgs.VIP, error) {
	v, err := r.Stored.Take(ctx, index, move)
	if r.taken != nil {
		r.taken <- struct{}{}
		<-r.let
	}
	return v, err
}

func (r *registry) Watch(ctx context.Context, rev string) (mgs.View, error) {
	if r.news != nil && rev != "" {
		select {
		case <-r.news:
		case <-ctx.Done():
		}
	}
	return r.Stored.Watch(ctx, rev)
}

// plain is a Unit that does nothing.
type plain struct {
	changed chan struct{}
	drain   func(context.Context) // nil: at once
	conns   func() []vip.Conn     // nil: none

	muted, finished atomic.Bool
}

func newPlain(netip.Addr) Unit { return &plain{changed: make(chan struct{}, 1)} }

func (*plain) Refuse(context.Context, failover.Refuse) error { return nil }
func (p *plain) Drain(ctx context.Context) (failover.Drained, error) {
	if p.drain != nil {
		p.drain(ctx)
	}
	return failover.Drained{}, nil
}
func (*plain) Commit(context.Context) error { return nil }
func (p *plain) Conns() []vip.Conn {
	if p.conns != nil {
		return p.conns()
	}
	return nil
}
func (*plain) Close(context.Context, failover.Closing) (failover.Closed, error) {
	return failover.Closed{}, nil
}
func (p *plain) Mute(context.Context) error {
	p.muted.Store(true)
	return nil
}
func (p *plain) Finish(context.Context) error {
	p.finished.Store(true)
	return nil
}
func (*plain) Listen(bool) error                    { return nil }
func (*plain) Begin(context.Context, mgs.VIP) error { return nil }
func (*plain) Serve() error                         { return nil }
func (*plain) Notify(context.Context) (failover.Notified, error) {
	return failover.Notified{}, nil
}
func (p *plain) Changed() <-chan struct{} { return p.changed }

// bed is an agent of node a.
type bed struct {
	t   *testing.T
	ctx context.Context
	reg *registry
	net *viptest.Net
	a   *Agent

	network *viptest.Network
}

// newBed makes an agent that has not started.
func newBed(t *testing.T) *bed {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	b := &bed{t: t, ctx: ctx, reg: &registry{Stored: mgs.NewStored(&document{}, rand.Reader)}, network: viptest.NewNetwork()}
	b.net = b.network.Machine("a")
	b.a = New(Options{
		Node: "a", Others: []string{"b"}, Registry: b.reg, Net: b.net, New: newPlain, Retry: time.Millisecond, RetryMax: 5 * time.Millisecond, Given: filepath.Join(t.TempDir(), "given"),
		Ask: func(context.Context, string, string, any, any) error { return errors.New("away") },
	})
	if _, err := b.reg.AddVIP(ctx, mgs.VIPSpec{Addr: addr, Bits: 24, Interface: "eth0"}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bed) start() {
	b.a.Start()
	b.t.Cleanup(func() { b.a.Stop(b.ctx) })
}

func (b *bed) vip() mgs.VIP {
	b.t.Helper()
	v, err := b.reg.Watch(b.ctx, "")
	if err != nil {
		b.t.Fatal(err)
	}
	return v.VIPs[0]
}

func (b *bed) assign(node string) {
	b.t.Helper()
	v := b.vip()
	if _, err := b.reg.Assign(b.ctx, v.Index, v.Epoch, node); err != nil {
		b.t.Fatal(err)
	}
}

// until waits for what the agent comes to.
func (b *bed) until(what string, ok func() bool) {
	b.t.Helper()
	for {
		changed := b.a.changes()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // the registry tells nobody here
		case <-b.ctx.Done():
			b.t.Fatalf("%s: %+v, registry %+v", what, b.a.Reports(), b.vip())
		}
	}
}

func (b *bed) state() State {
	if l := b.a.Reports(); len(l) > 0 {
		return l[0].State
	}
	return ""
}

func (b *bed) become(s State) {
	b.t.Helper()
	b.until(string(s), func() bool { return b.state() == s })
}

// A period of service that the registry gives when the take-over was broken off already
// is ended: else nobody could ever take the address from this node.
func TestTakenTooLate(t *testing.T) {
	b := newBed(t)
	b.reg.taken, b.reg.let, b.reg.news = make(chan struct{}), make(chan struct{}), make(chan struct{})
	b.assign("a")
	b.start()
	<-b.reg.taken
	b.a.leave(false)
	b.become(Absent)
	close(b.reg.let)
	k := b.a.find(addr)
	b.until("the answer", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.s.began != 0
	})
	close(b.reg.news)
	b.until("the period of service ends", func() bool { v := b.vip(); return v.Free() && v.Clean })
}

// A node whose machine cannot have the address, as it has no such interface, is never
// ready for it: the owner would give it up for nothing. When it can, it is.
func TestNotReadyWithoutInterface(t *testing.T) {
	b := newBed(t)
	b.assign("b")
	v := b.vip()
	if _, err := b.reg.Take(b.ctx, v.Index, v.MoveID); err != nil {
		t.Fatal(err)
	}
	b.net.Fail(viptest.Check, errors.New("the machine has no interface eth0"), 1<<20)
	b.assign("a")
	b.start()
	tries := func() int { return strings.Count(b.network.Lines(), "check") }
	b.until("it is tried again", func() bool { return tries() > 2 })
	if v := b.vip(); v.Ready || v.Node != "b" || v.Clean {
		t.Errorf("the owner gives it up: %+v", v)
	}
	if r := b.a.Reports()[0]; r.State != Failed || r.Move != b.vip().MoveID || !strings.Contains(r.Reason, "no interface eth0") {
		t.Errorf("%+v, registry %+v", r, b.vip())
	}
	b.net.Fail(viptest.Check, nil, 0)
	b.until("it is ready", func() bool { return b.vip().Ready })
	b.become(Listening)
}

// An address that was begun and could not be added has failed with that assignment.
func TestFailedMoveIsReported(t *testing.T) {
	b := newBed(t)
	b.net.Fail(viptest.Add, errors.New("the kernel refuses"), 1<<20)
	b.start()
	b.assign("a")
	b.become(Failed)
	if r, v := b.a.Reports()[0], b.vip(); r.Move != v.MoveID || v.Epoch == 0 {
		t.Errorf("%+v, registry %+v", r, v)
	}
	b.net.Fail(viptest.Add, nil, 0)
	b.become(Serving)
	if r := b.a.Reports()[0]; r.Move != 0 {
		t.Errorf("%+v", r)
	}
}

// Ports are held after a release only if that release was told to.
func TestPortsHeldOnce(t *testing.T) {
	b := newBed(t)
	b.start()
	// The cluster manager drains what is not here.
	b.until("the address is known", func() bool { return b.a.find(addr) != nil })
	if _, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageDrain, Given: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe}); err != nil {
		t.Fatal(err)
	}
	b.become(Serving)
	b.assign("")
	b.become(Absent)
}

// A cluster manager that has an address drained hears of the end also if somebody else
// serves the address by then.
func TestFencedWhileDrained(t *testing.T) {
	b := newBed(t)
	draining := make(chan struct{})
	b.a.o.New = func(a netip.Addr) Unit {
		u := newPlain(a).(*plain)
		u.drain = func(ctx context.Context) {
			close(draining)
			<-ctx.Done()
		}
		return u
	}
	b.a.o.Deadlines.Drain = patience
	b.start()
	b.until("the address is known", func() bool { return b.a.find(addr) != nil })
	if _, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageListen, Given: true}); err != nil {
		t.Fatal(err)
	}
	if err := b.net.Add(b.ctx, vip.Address{Prefix: netip.PrefixFrom(addr, 24), Interface: "eth0"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe, Given: true}); err != nil {
		t.Fatal(err)
	}
	v := b.vip()
	go func() {
		<-draining
		b.a.Superseded(v.Index, v.Epoch+1)
	}()
	if _, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageDrain, Given: true}); err != nil {
		t.Fatal(err)
	}
	if s := b.state(); s != Releasing {
		t.Errorf("the ports are not held any more: %s", s)
	}
	if _, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish, Given: true}); err != nil {
		t.Fatal(err)
	}
	b.become(Absent)
}

// An agent that stops does not wait for a cluster manager that is to have the ports
// closed.
func TestStopHoldsNoPorts(t *testing.T) {
	b := newBed(t)
	b.assign("a")
	v, err := b.reg.Take(b.ctx, b.vip().Index, b.vip().MoveID)
	if err != nil {
		t.Fatal(err)
	}
	k := newKeeper(b.a, &v)
	k.s.state, k.s.epoch, k.unit, k.s.given, k.keepPorts = Serving, v.Epoch, newPlain(addr), true, true
	k.teller = k.startTeller(k.unit, v.Epoch)
	k.leave(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		k.release(decide(&k.s))
	}()
	select {
	case <-done:
	case <-b.ctx.Done():
		t.Fatal("the release goes on")
	}
	b.a.cancel()
	b.a.runner.Close()
}

// Connections that were accepted when the next owner had the list already are known to it
// before it may begin.
func TestLateConnections(t *testing.T) {
	b, next := newBed(t), newBed(t)
	conn := func(port uint16) vip.Conn {
		return vip.Conn{Local: netip.AddrPortFrom(addr, 2049), Remote: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.77"), port)}
	}
	var late atomic.Bool
	b.a.o.New = func(a netip.Addr) Unit {
		u := newPlain(a).(*plain)
		u.conns = func() []vip.Conn {
			if late.Load() {
				return []vip.Conn{conn(700), conn(701)}
			}
			return []vip.Conn{conn(700)}
		}
		u.drain = func(context.Context) { late.Store(true) }
		return u
	}
	b.a.o.Ask = func(ctx context.Context, node, method string, args, result any) error {
		raw, err := json.Marshal(args)
		if err != nil {
			return err
		}
		r, err := next.a.HandleConns(ctx, "a", raw)
		if err == nil {
			*result.(*connsResult) = r.(connsResult)
		}
		return err
	}
	var known []told
	b.reg.ended = func() { known = next.a.book.known(b.vip().Index, b.vip().Epoch) }
	b.start()
	b.assign("a")
	b.become(Serving)
	b.assign("b")
	if _, err := b.reg.SetReady(b.ctx, b.vip().Index, b.vip().MoveID); err != nil {
		t.Fatal(err)
	}
	b.become(Absent)
	if want := []told{{2049, conn(700).Remote}, {2049, conn(701).Remote}}; !slices.Equal(known, want) {
		t.Errorf("the next owner knows of %v, want %v", known, want)
	}
}

// The machine still has an address that was given up: whoever decides hears of which
// period of service it is.
func TestStuckIsReported(t *testing.T) {
	b := newBed(t)
	u := newPlain(addr).(*plain)
	b.a.o.New = func(netip.Addr) Unit { return u }
	b.start()
	b.assign("a")
	b.become(Serving)
	epoch := b.vip().Epoch
	b.net.Fail(viptest.Remove, errors.New("the kernel refuses"), 1<<20)
	b.assign("")
	b.become(Failed)
	if r := b.a.Reports()[0]; r.Epoch != epoch || !r.Stuck || !r.Silent || !strings.Contains(r.Reason, "ip addr del 192.0.2.9/24 dev eth0") {
		t.Errorf("%+v, want epoch %d", r, epoch)
	}
	if !u.muted.Load() || u.finished.Load() {
		t.Error("the ports are not kept silent")
	}
	// A cluster manager must not take it for given up.
	late, cancel := context.WithTimeout(b.ctx, 50*time.Millisecond)
	defer cancel()
	if r, err := b.a.ReleaseVIP(late, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish}); err == nil {
		t.Errorf("the release says %+v", r)
	}
	// Nor does it help that the kernel does not complain.
	b.net.Fail(viptest.Remove, nil, 0)
	b.net.On(viptest.Has, func(context.Context, netip.Addr) error { return errors.New("not known") })
	tries := func() int { return strings.Count(b.network.Lines(), "remove") }
	n := tries()
	b.until("it is tried again", func() bool { return tries() > n+1 })
	if v := b.vip(); v.Free() {
		t.Errorf("the registry was told: %+v", v)
	}
	b.net.On(viptest.Has, nil)
	b.until("it is told", func() bool { v := b.vip(); return v.Free() })
	b.become(Absent)
	if r := b.a.Reports()[0]; r.Epoch != 0 || r.Stuck {
		t.Errorf("%+v", r)
	}
	if !u.finished.Load() {
		t.Error("the ports are still kept")
	}
}

// The agent ends while an address that is stuck is seen to.
func TestStopWhileStuck(t *testing.T) {
	b := newBed(t)
	b.a.Start()
	b.assign("a")
	b.become(Serving)
	b.net.Fail(viptest.Remove, errors.New("the kernel refuses"), 1<<20)
	b.assign("")
	b.become(Failed)
	time.AfterFunc(10*time.Millisecond, func() { b.net.Fail(viptest.Remove, nil, 0) })
	if !b.a.Stop(b.ctx) {
		t.Error("not stopped in order")
	}
	if v := b.vip(); !v.Free() {
		t.Errorf("the registry was not told: %+v", v)
	}
	// Whoever comes late starts nothing that nobody waits for.
	if _, err := b.reg.AddVIP(b.ctx, mgs.VIPSpec{Addr: addr.Next(), Bits: 24, Interface: "eth0"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr.Next(), Stage: vipctl.StageServe}); err == nil {
		t.Error("an agent that has stopped takes an address")
	}
	b.a.wg.Wait()
}
