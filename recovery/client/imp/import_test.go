package imp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// fakeTarget executes requests in memory. A crash loses what is not committed.
type fakeTarget struct {
	mu         sync.Mutex
	instance   uint64
	known      bool
	recovering bool
	next       uint64
	committed  uint64
	log        []fakeRec
	slots      map[uint16]fakeRec
	conns      map[*fakeConn]bool
	down       bool
	errs       []string
}

type fakeRec struct {
	xid, transno uint64
	data         string
	made         wire.Made
}

func newFakeTarget() *fakeTarget {
	return &fakeTarget{instance: 1, next: 1, slots: map[uint16]fakeRec{}, conns: map[*fakeConn]bool{}}
}

var errDown = errors.New("nobody listens")

func (t *fakeTarget) dial(context.Context, string) (wire.Conn, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.down {
		return nil, errDown
	}
	c := &fakeConn{t: t, instance: t.instance, in: make(chan fakeMsg, 1024), quit: make(chan struct{}), gone: make(chan struct{})}
	t.conns[c] = true
	c.wg.Add(1)
	go c.serve()
	return c, nil
}

// fakeConn has one goroutine, which answers in order.
type fakeConn struct {
	t        *fakeTarget
	instance uint64 // to which it leads
	in       chan fakeMsg
	quit     chan struct{}
	once     sync.Once
	gone     chan struct{}
	wg       sync.WaitGroup
	mu       sync.RWMutex
	shut     bool
}

type fakeMsg struct {
	req  *wire.Request
	rep  *wire.Reply
	done func()
}

func (c *fakeConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	c.mu.RLock()
	if !c.shut {
		select {
		case c.in <- fakeMsg{req, rep, done}:
			c.mu.RUnlock()
			return
		default:
		}
	}
	c.mu.RUnlock()
	rep.Status = wire.ErrTargetDown
	done()
}

func (c *fakeConn) Call(_ context.Context, req *wire.Request, rep *wire.Reply) error {
	w := make(chan struct{})
	c.Handle(req, rep, func() { close(w) })
	<-w
	if rep.Status == wire.ErrTargetDown {
		return &wire.LostError{Sent: true, Err: errDown}
	}
	return nil
}

func (c *fakeConn) TryHandle(req *wire.Request, rep *wire.Reply) bool {
	rep.Status = wire.OK
	return req.Op == wire.OpGetattr
}

func (c *fakeConn) Done() <-chan struct{} { return c.gone }

// cut breaks the connection; what it holds comes back unanswered.
func (c *fakeConn) cut() { c.once.Do(func() { close(c.quit) }) }

func (c *fakeConn) Close() error { c.cut(); c.wg.Wait(); return nil }

func (c *fakeConn) serve() {
	defer c.wg.Done()
	var hold []fakeMsg // final ping
	for {
		select {
		case m := <-c.in:
			if c.t.handle(c.instance, m.req, m.rep) && rand.IntN(100) > 0 {
				m.done()
			} else {
				hold = append(hold, m) // the reply is lost
				c.cut()
			}
			continue
		case <-c.quit:
		}
		break
	}
	c.mu.Lock()
	c.shut = true
	c.mu.Unlock()
	c.t.mu.Lock()
	delete(c.t.conns, c)
	c.t.mu.Unlock()
	close(c.gone)
	for {
		select {
		case m := <-c.in:
			hold = append(hold, m)
			continue
		default:
		}
		break
	}
	for _, m := range hold {
		m.rep.Status = wire.ErrTargetDown
		m.done()
	}
}

// handle executes one request; false: the connection breaks.
func (t *fakeTarget) handle(instance uint64, req *wire.Request, rep *wire.Reply) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	rep.Reset()
	rep.XID, rep.Status = req.XID, wire.OK
	defer func() { rep.LastCommitted = t.committed }()
	slot := req.Slot
	switch {
	case t.down, t.instance != instance:
		return false
	case req.Op == wire.OpConnect:
		rep.Instance, rep.Recovering, rep.Known, rep.Transno = t.instance, t.recovering, t.known, t.next-1
		t.known = t.known || req.Cookie == 0
	case !t.known:
		rep.Status = wire.ErrUnknownClient
	case req.Flags&wire.FlagLastReplay != 0:
		t.recovering = false
	case req.Flags&wire.FlagReplay != 0:
		rep.Transno = req.Transno
		i := slices.IndexFunc(t.log, func(r fakeRec) bool { return r.transno == req.Transno })
		if i >= 0 && t.log[i].xid != req.XID {
			t.errs = append(t.errs, fmt.Sprintf("transno %d replayed by another request", req.Transno))
		}
		if i < 0 {
			if n := len(t.log); n > 0 && t.log[n-1].transno >= req.Transno {
				t.errs = append(t.errs, "replay out of order")
			}
			t.exec(slot, fakeRec{req.XID, req.Transno, string(req.Name) + string(req.Data) + string(req.Bulk), req.Made})
		}
	case t.recovering:
		rep.Status = wire.ErrRecovering
	case req.Op == wire.OpSyncTarget:
		t.committed = t.next - 1
	case req.Op.Modifies():
		if old, ok := t.slots[slot]; ok && old.xid >= req.XID {
			if old.xid > req.XID {
				t.errs = append(t.errs, "an older XID in a slot")
			}
			rep.Transno, rep.Reconstructed = old.transno, true
		} else {
			rep.Transno = t.next
			t.exec(slot, fakeRec{req.XID, t.next, string(req.Name) + string(req.Data) + string(req.Bulk), req.Made})
		}
		rep.Attr.FID = wire.FID{Seq: 9, OID: uint32(rep.Transno)}
		if req.Flags&wire.FlagWaitCommit != 0 {
			t.committed = max(t.committed, rep.Transno)
		}
		rep.Created = true
	}
	return true
}

func (t *fakeTarget) exec(slot uint16, r fakeRec) {
	t.log = append(t.log, r)
	t.slots[slot] = r
	t.next = r.transno + 1
}

// crash restarts the target; what is not committed is gone.
func (t *fakeTarget) crash() {
	t.mu.Lock()
	t.instance++
	t.recovering = t.known
	t.log = slices.DeleteFunc(t.log, func(r fakeRec) bool { return r.transno > t.committed })
	for s, r := range t.slots {
		if r.transno > t.committed {
			delete(t.slots, s)
		}
	}
	t.next = t.committed + 1
	t.mu.Unlock()
	t.cutAll()
}

func (t *fakeTarget) cutAll() {
	t.mu.Lock()
	var cs []*fakeConn
	for c := range t.conns {
		cs = append(cs, c)
	}
	t.mu.Unlock()
	for _, c := range cs {
		c.cut()
	}
}

func testOptions(t *fakeTarget) Options {
	return Options{
		Config: Config{BackoffMin: time.Millisecond, BackoffMax: 10 * time.Millisecond, RetryDelay: time.Millisecond, PingInterval: 20 * time.Millisecond, DeadAfter: time.Minute},
		Addrs:  []string{"a", "b"}, Dial: t.dial, Client: wire.ClientID{1}, Gen: 1,
	}
}

// leakCheck fails the test when goroutines outlive it.
func leakCheck(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for range 200 {
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
	})
}

func open(t *testing.T, o Options) *Import {
	t.Helper()
	im, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.Close() })
	return im
}

func waitState(t *testing.T, im *Import, s State) {
	t.Helper()
	for range 2000 {
		if im.State() == s {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("state %v, want %v", im.State(), s)
}

// TestExactlyOnce: many callers, connections that break, replies that are lost, a
// target that crashes and loses what it has not committed: every call succeeds
// and is executed once, with the data that it was called with, although callers
// reuse their buffers at once.
func TestExactlyOnce(t *testing.T) {
	leakCheck(t)
	tgt := newFakeTarget()
	im := open(t, testOptions(tgt))
	const callers, calls = 8, 400
	stop := make(chan struct{})
	var faults, wg sync.WaitGroup
	faults.Add(1)
	go func() {
		defer faults.Done()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			switch i % 4 {
			case 0:
				tgt.crash()
			case 2:
				tgt.mu.Lock()
				tgt.committed = tgt.committed + (tgt.next-1-tgt.committed)/2
				tgt.mu.Unlock()
			default:
				tgt.cutAll()
			}
		}
	}()
	for g := range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var req wire.Request
			var rep wire.Reply
			name, data := make([]byte, 0, 64), make([]byte, 0, 4096)
			for i := range calls {
				req.Reset()
				rep.Reset()
				name = fmt.Appendf(name[:0], "%d-%d:", g, i)
				data = append(data[:0], bytes.Repeat([]byte{byte('a' + i%26)}, 1+i*7)...)
				req.Op, req.FID, req.Name = wire.OpCreate, wire.RootFID, name
				switch i % 3 {
				case 0:
					req.Data = data
				case 1:
					req.Op, req.Bulk = wire.OpWrite, data
				case 2:
					req.Flags, req.Data = wire.FlagWaitCommit, data
				}
				fl := req.Flags
				if err := im.Call(context.Background(), &req, &rep); err != nil || rep.Status != wire.OK {
					t.Errorf("call %d-%d: %v %v", g, i, err, rep.Status)
					return
				}
				if req.Flags != fl {
					t.Errorf("flags are %x after the call, were %x", req.Flags, fl)
				}
			}
		}()
	}
	wg.Wait()
	close(stop)
	faults.Wait()
	var rep wire.Reply
	if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpSyncTarget}}, &rep); err != nil || rep.Status != wire.OK {
		t.Fatalf("sync: %v %v", err, rep.Status)
	}
	tgt.mu.Lock()
	defer tgt.mu.Unlock()
	for _, e := range tgt.errs {
		t.Error(e)
	}
	n := map[string]int{}
	for _, r := range tgt.log {
		n[r.data]++
	}
	for g := range callers {
		for i := range calls {
			want := fmt.Sprintf("%d-%d:", g, i) + string(bytes.Repeat([]byte{byte('a' + i%26)}, 1+i*7))
			if n[want] != 1 {
				t.Errorf("%d-%d executed %d times with its data", g, i, n[want])
			}
		}
	}
	if len(tgt.log) != callers*calls {
		t.Errorf("%d executions of %d calls", len(tgt.log), callers*calls)
	}
	t.Logf("%d instances", tgt.instance)
}

// TestReplayIdentity: a replayed create names the object that the first execution made.
func TestReplayIdentity(t *testing.T) {
	leakCheck(t)
	tgt := newFakeTarget()
	im := open(t, testOptions(tgt))
	var rep wire.Reply
	if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpCreate}, Name: []byte("x")}, &rep); err != nil {
		t.Fatal(err)
	}
	fid := rep.Attr.FID
	tgt.crash()
	for range 2000 {
		tgt.mu.Lock()
		n := len(tgt.log)
		tgt.mu.Unlock()
		if n > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	tgt.mu.Lock()
	defer tgt.mu.Unlock()
	if len(tgt.log) != 1 || tgt.log[0].made.FID != fid || tgt.log[0].data != "x" {
		t.Errorf("replayed %+v, want object %v", tgt.log, fid)
	}
}

// TestEvicted: the owner hears what is lost, with its contents, before any call fails.
func TestEvicted(t *testing.T) {
	leakCheck(t)
	tgt := newFakeTarget()
	o := testOptions(tgt)
	var told atomic.Int32
	lost := make(chan string, 16)
	o.OnEvicted = func(l Loss) {
		for _, r := range l.Requests {
			lost <- string(r.Data)
		}
		for range l.Epochs {
			lost <- "epoch"
		}
		told.Add(1)
	}
	im := open(t, o)
	call := func(r *wire.Request) wire.Status {
		var rep wire.Reply
		if err := im.Call(context.Background(), r, &rep); err != nil {
			t.Fatal(err)
		}
		return rep.Status
	}
	if st := call(&wire.Request{Header: wire.Header{Op: wire.OpOpenEpoch, Flags: wire.FlagWaitCommit}, FID: wire.FID{Seq: 5}}); st != wire.OK {
		t.Fatal(st)
	}
	if st := call(&wire.Request{Header: wire.Header{Op: wire.OpSymlink}, Data: []byte("precious")}); st != wire.OK {
		t.Fatal(st)
	}
	tgt.mu.Lock()
	tgt.known = false
	tgt.mu.Unlock()
	st := call(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, Name: []byte("n")})
	if told.Load() == 0 {
		t.Error("a call returned before the owner was told")
	}
	if st != wire.ErrUnknownClient {
		t.Errorf("remove: %v", st)
	}
	if a, b := <-lost, <-lost; a != "precious" || b != "epoch" {
		t.Errorf("lost %q, %q", a, b)
	}
	if st := call(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, Name: []byte("n")}); st != wire.OK {
		t.Errorf("as a new client: %v", st)
	}
}

// TestAway: what happens while the target cannot be reached.
func TestAway(t *testing.T) {
	leakCheck(t)
	tgt := newFakeTarget()
	tgt.down = true
	o := testOptions(tgt)
	im := open(t, o)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	var rep wire.Reply
	if err := im.Call(ctx, &wire.Request{Header: wire.Header{Op: wire.OpGetattr}}, &rep); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled call: %v", err)
	}
	if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpStatfs, Flags: wire.FlagNoWait}}, &rep); err != nil || rep.Status != wire.ErrTargetDown {
		t.Errorf("impatient call: %v %v", err, rep.Status)
	}
	if im.TryHandle(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}}, &rep) {
		t.Error("answered by nobody")
	}
	got := make(chan wire.Status, 1)
	var waiting wire.Reply
	im.Handle(&wire.Request{Header: wire.Header{Op: wire.OpRemove}}, &waiting, func() { got <- waiting.Status })
	im.Deactivate()
	if st := <-got; st != wire.ErrIO {
		t.Errorf("deactivated: %v", st)
	}
	im.Activate()
	tgt.mu.Lock()
	tgt.down = false
	tgt.mu.Unlock()
	im.Notice(1, "c", nil)
	// The import's own connect answers OpConnect.
	if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpConnect}}, &rep); err != nil || rep.Status != wire.OK || rep.Instance != 1 {
		t.Errorf("connect: %v %+v", err, rep)
	}
	waitState(t, im, Full)
	if !im.TryHandle(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}}, &rep) || im.TryHandle(&wire.Request{Header: wire.Header{Op: wire.OpRemove}}, &rep) {
		t.Error("TryHandle answers the wrong requests")
	}
	im.Close()
	if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpRemove}}, &rep); err != nil || rep.Status != wire.ErrTargetDown {
		t.Errorf("closed: %v %v", err, rep.Status)
	}
}

// TestClock: with a clock that stands still nothing is retried; when it moves, the next attempt is made.
func TestClock(t *testing.T) {
	leakCheck(t)
	tgt := newFakeTarget()
	o := testOptions(tgt)
	var now atomic.Int64
	now.Store(1)
	timers := make(chan func(), 64)
	o.Clock = Clock{Now: now.Load, AfterFunc: func(_ time.Duration, f func()) func() bool {
		timers <- f
		return func() bool { return true }
	}}
	dials := make(chan string, 64)
	var refuse atomic.Bool
	refuse.Store(true)
	o.Dial = func(ctx context.Context, addr string) (wire.Conn, error) {
		dials <- addr
		if refuse.Load() {
			return nil, errDown
		}
		return tgt.dial(ctx, addr)
	}
	o.Config.Jitter = func(time.Duration) time.Duration { return 0 }
	im := open(t, o)
	if a, b := <-dials, <-dials; a != "a" || b != "b" {
		t.Errorf("dialled %s, %s", a, b)
	}
	waitState(t, im, Disconnected)
	select {
	case <-dials:
		t.Error("dialled again although no time has passed")
	case <-time.After(20 * time.Millisecond):
	}
	refuse.Store(false)
	now.Add(int64(time.Second))
	for range len(timers) {
		(<-timers)()
	}
	<-dials
}

func benchConns(b *testing.B, f func(b *testing.B, c wire.Conn)) {
	b.Run("direct", func(b *testing.B) { f(b, wire.InProc(&nullTarget{})) })
	b.Run("import", func(b *testing.B) {
		im, err := Open(Options{
			Addrs: []string{"a"}, Client: wire.ClientID{1}, Gen: 1,
			Dial: func(context.Context, string) (wire.Conn, error) { return wire.InProc(&nullTarget{}), nil },
		})
		if err != nil {
			b.Fatal(err)
		}
		defer im.Close()
		var rep wire.Reply
		if err := im.Call(context.Background(), &wire.Request{Header: wire.Header{Op: wire.OpPing}}, &rep); err != nil {
			b.Fatal(err)
		}
		f(b, im)
	})
}

// nullTarget answers at once; every 64th modification commits all.
type nullTarget struct{ transno, committed atomic.Uint64 }

func (t *nullTarget) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.Status, rep.Instance = wire.OK, 1
	if req.Op.Modifies() {
		rep.Transno = t.transno.Add(1)
		if rep.Transno%64 == 0 || req.Flags&wire.FlagWaitCommit != 0 {
			t.committed.Store(rep.Transno)
		}
	}
	rep.LastCommitted = t.committed.Load()
	done()
}

func (t *nullTarget) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func BenchmarkCall(b *testing.B) {
	data := make([]byte, 4096)
	for _, c := range []struct {
		name string
		req  wire.Request
	}{
		{"getattr", wire.Request{Header: wire.Header{Op: wire.OpGetattr}}},
		{"create-commit", wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagWaitCommit}, Name: data[:8]}},
		{"create-kept", wire.Request{Header: wire.Header{Op: wire.OpCreate}, Name: data[:8]}},
		{"write4k-kept", wire.Request{Header: wire.Header{Op: wire.OpWrite}, Bulk: data}},
	} {
		b.Run(c.name, func(b *testing.B) {
			benchConns(b, func(b *testing.B, conn wire.Conn) {
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					req := c.req
					var rep wire.Reply
					for pb.Next() {
						rep.Reset()
						if err := conn.Call(context.Background(), &req, &rep); err != nil || rep.Status != wire.OK {
							b.Error(err, rep.Status)
							return
						}
					}
				})
			})
		})
	}
}
