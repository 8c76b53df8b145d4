package failover

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/vip"
)

// network is where the machines of a test are: it writes down what is done, with the time since the test began.
type network struct {
	mu    sync.Mutex
	start time.Time
	lines []string
	has   map[netip.Addr][]string
	bad   []string
}

func newNetwork() *network { return &network{start: time.Now(), has: map[netip.Addr][]string{}} }

func (n *network) log(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lines = append(n.lines, fmt.Sprintf("%d ", time.Since(n.start).Milliseconds())+fmt.Sprintf(format, args...))
}

func (n *network) want(t *testing.T, lines ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if d := cmp.Diff(lines, n.lines); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for _, b := range n.bad {
		t.Error(b)
	}
	n.lines = nil
}

func (n *network) forget() {
	n.mu.Lock()
	n.lines = nil
	n.mu.Unlock()
}

// host is a machine of the network. A hook, if there is one for the method's name, is called first.
type host struct {
	n       *network
	name    string
	sockets []vip.Socket
	hooks   map[string]func(ctx context.Context) error
	keep    bool // Remove has no effect
}

func (n *network) host(name string) *host {
	return &host{n: n, name: name, hooks: map[string]func(context.Context) error{}}
}

func (h *host) do(ctx context.Context, what, method string) error {
	h.n.log("%s %s", h.name, what)
	if f := h.hooks[method]; f != nil {
		return f(ctx)
	}
	return nil
}

func (h *host) Has(a netip.Addr) (bool, error) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	return slices.Contains(h.n.has[a], h.name), nil
}

func (h *host) Check(vip.Address) error { return nil }

func (h *host) Add(ctx context.Context, a vip.Address) error {
	if err := h.do(ctx, "add", "add"); err != nil {
		return err
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	addr := a.Prefix.Addr()
	if len(h.n.has[addr]) > 0 {
		h.n.bad = append(h.n.bad, fmt.Sprintf("%s adds %s, which %s has", h.name, addr, h.n.has[addr]))
	}
	h.n.has[addr] = append(h.n.has[addr], h.name)
	return nil
}

func (h *host) Remove(ctx context.Context, a vip.Address) error {
	if err := h.do(ctx, "remove", "remove"); err != nil {
		return err
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	if h.keep {
		return nil
	}
	addr := a.Prefix.Addr()
	h.n.has[addr] = slices.DeleteFunc(h.n.has[addr], func(s string) bool { return s == h.name })
	return nil
}

func (h *host) Announce(vip.Address) error { return h.do(context.Background(), "announce", "announce") }

func (h *host) Sockets(netip.Addr) ([]vip.Socket, error) {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	return slices.Clone(h.sockets), nil
}

func (h *host) Destroy(ctx context.Context, _ netip.Addr) (int, error) {
	if f := h.hooks["destroy"]; f != nil {
		if err := f(ctx); err != nil {
			return 0, err
		}
	}
	h.n.mu.Lock()
	before := len(h.sockets)
	h.sockets = slices.DeleteFunc(h.sockets, func(s vip.Socket) bool { return s.Network == "tcp" && s.State != "LISTEN" })
	n := before - len(h.sockets)
	h.n.mu.Unlock()
	h.n.log("%s destroy %d", h.name, n)
	return n, nil
}

func (h *host) Tickle(_ vip.Address, conns []vip.Conn) error {
	return h.do(context.Background(), fmt.Sprintf("tickle %d", len(conns)), "tickle")
}
func (h *host) Added() ([]vip.Address, error) { return nil, nil }
func (h *host) Close() error                  { return nil }

// unit is what a host serves at an address, and is to serve.
type unit struct {
	h     *host
	conns []vip.Conn
}

func (u unit) Refuse(ctx context.Context, how Refuse) error {
	return u.h.do(ctx, "refuse "+string(how), "refuse")
}
func (u unit) Drain(ctx context.Context) (Drained, error) {
	err := u.h.do(ctx, "drain", "drain")
	return Drained{Conns: 3, Replies: 2}, err
}
func (u unit) Commit(ctx context.Context) error { return u.h.do(ctx, "commit", "commit") }
func (u unit) Close(ctx context.Context, how Closing) (Closed, error) {
	err := u.h.do(ctx, "close "+string(how), "close")
	return Closed{Orderly: 3}, err
}
func (u unit) Listen(ctx context.Context) error { return u.h.do(ctx, "listen", "listen") }
func (u unit) Begin(ctx context.Context) error  { return u.h.do(ctx, "begin", "begin") }
func (u unit) Serve(ctx context.Context) error  { return u.h.do(ctx, "serve", "serve") }
func (u unit) Conns() []vip.Conn                { return u.conns }
func (u unit) Notify(ctx context.Context) (Notified, error) {
	return Notified{Clients: 4}, u.h.do(ctx, "notify", "notify")
}
func (u unit) Finish(ctx context.Context) error { return u.h.do(ctx, "finish", "finish") }

var (
	testAddr = vip.Address{Prefix: netip.MustParsePrefix("192.0.2.9/24"), Interface: "eth0"}
	testConn = vip.Conn{Local: netip.MustParseAddrPort("192.0.2.9:2049"), Remote: netip.MustParseAddrPort("192.0.2.77:800")}
	subject  = Subject{Address: testAddr, VIP: 3, Epoch: 7, Move: 5, From: "a", To: "b", Reason: Move}
)

func newLog(t *testing.T) *events.Log {
	l, err := events.Open(events.Options{Node: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func eventLines(l *events.Log) []string {
	var out []string
	es, _ := l.Since(0)
	for i := range es {
		e := &es[i]
		s := fmt.Sprintf("%s %s %s %s", e.Attrs[attrRole], e.Kind, e.Stage, e.Took)
		var keys []string
		for k := range e.Attrs {
			if k != attrRole {
				keys = append(keys, k+"="+e.Attrs[k])
			}
		}
		slices.Sort(keys)
		s = strings.TrimSpace(s + " " + strings.Join(keys, " "))
		if e.Err != "" {
			s += ": " + strings.ReplaceAll(e.Err, "\n", "; ")
		}
		out = append(out, s)
	}
	return out
}

func sleep(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
}

// TestPlannedMove moves an address from one machine to another, quietly. 004.17, 004.19, 004.20, 004.24
func TestPlannedMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		a, b := n.host("a"), n.host("b")
		n.has[testAddr.Prefix.Addr()] = []string{"a"}
		a.hooks["drain"] = sleep(20 * time.Millisecond)
		b.sockets = []vip.Socket{
			{Network: "tcp", State: "LISTEN"}, {Network: "udp"}, {Network: "tcp", State: "TIME-WAIT"},
		}
		logA, logB := newLog(t), newLog(t)
		ra, rb := Runner{Net: a, Log: logA}, Runner{Net: b, Log: logB}
		ready, told := make(chan struct{}), make(chan struct{})
		took := make(chan AcquireReport, 1)
		go func() {
			took <- rb.Acquire(t.Context(), AcquireOptions{
				Subject: subject, Candidate: unit{b, []vip.Conn{testConn, {Local: netip.MustParseAddrPort("192.0.2.1:2049")}}},
				Ready:    func(context.Context) error { close(ready); return nil },
				Released: func(ctx context.Context) error { <-told; n.log("released"); return nil },
			})
		}()
		<-ready
		rep := ra.Release(t.Context(), ReleaseOptions{
			Subject: subject, Service: unit{h: a}, Closing: Quiet,
			Told: func(context.Context) error { n.log("told"); close(told); return nil },
		})
		if rep.Outcome != Clean || !rep.Told || rep.Err != nil || rep.Drained.Replies != 2 || rep.Closed.Orderly != 3 || rep.Took != 20*time.Millisecond {
			t.Errorf("released: %+v", rep)
		}
		got := <-took
		if got.Outcome != Serving || got.Err != nil || !got.Began || !got.Exposed || got.Destroyed != 1 || got.Tickled != 1 || got.Clients != 4 {
			t.Errorf("taken: %+v", got)
		}
		synctest.Wait()
		n.mu.Lock()
		var la, lb []string
		for _, l := range n.lines {
			if strings.Contains(l, " b ") || strings.HasSuffix(l, "released") {
				lb = append(lb, l)
			} else {
				la = append(la, l)
			}
		}
		n.mu.Unlock()
		if d := cmp.Diff([]string{"0 a refuse hold", "0 a drain", "20 a commit", "20 a remove", "20 a close quiet", "20 a destroy 0", "20 told", "20 a finish", "20 a destroy 0"}, la); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
		if d := cmp.Diff([]string{"0 b listen", "20 released", "20 b begin", "20 b destroy 1", "20 b serve", "20 b add", "20 b announce", "20 b tickle 1", "20 b notify"}, lb); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
		if d := cmp.Diff([]string{
			"release move begin 0s", "release stage refuse 0s", "release stage drain 20ms conns=3 replies=2", "release stage commit 0s",
			"release stage remove 0s", "release stage close 0s orderly=3", "release stage clear 0s", "release stage told 0s", "release stage finish 0s",
			"release move end 20ms conns=3 orderly=3 outcome=clean replies=2",
		}, eventLines(logA)); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
		if d := cmp.Diff([]string{
			"take move begin 0s", "take stage listen 0s", "take stage ready 0s", "take stage wait 20ms", "take stage begin 0s",
			"take stage clear 0s destroyed=1", "take stage serve 0s", "take stage add 0s", "take stage announce 0s",
			"take stage tickle 0s tickled=1", "take stage notify 0s clients=4", "take move end 20ms clients=4 destroyed=1 outcome=serving tickled=1",
		}, eventLines(logB)); d != "" {
			t.Errorf("-want +got:\n%s", d)
		}
		es, _ := logA.Since(0)
		if e := es[1]; e.Addr != testAddr.Prefix.Addr() || e.VIP != 3 || e.Epoch != 7 || e.Move != 5 || e.From != "a" || e.To != "b" || e.Reason != "move" {
			t.Errorf("event %+v", e)
		}
		// The last owner's Runner has nothing to announce; the new one's does so until the address is released.
		n.forget()
		time.Sleep(100 * time.Millisecond)
		n.want(t, "70 b announce", "70 b tickle 1")
		rb.Release(t.Context(), ReleaseOptions{Subject: subject, Service: unit{h: b}, Refuse: Reset})
		n.want(t, "120 b refuse reset", "120 b drain", "120 b commit", "120 b close half-close", "120 b destroy 0", "120 b remove", "120 b finish", "120 b destroy 0")
		time.Sleep(10 * time.Second)
		n.want(t)
		ra.Close()
		rb.Close()
	})
}

// TestAnnounceAgain: a lost announcement is made up for, until the Runner ends.
func TestAnnounceAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, again := range [][]time.Duration{nil, {}, {time.Second, 3 * time.Second}} {
			n := newNetwork()
			h := n.host("h")
			r := Runner{Net: h}
			h.hooks["announce"] = func(context.Context) error { return errors.New("no carrier") }
			rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: h}, Again: again, Deadlines: TakeDeadlines{Announce: 10 * time.Millisecond}})
			if rep.Outcome != Serving || rep.Err == nil || !strings.Contains(rep.Err.Error(), "announce: no carrier") {
				t.Errorf("%+v", rep)
			}
			n.forget()
			time.Sleep(2 * time.Second)
			switch {
			case again == nil:
				n.want(t, "60 h announce", "210 h announce", "1010 h announce")
			case len(again) == 0:
				n.want(t)
			default:
				n.want(t, "1010 h announce")
			}
			r.Close()
			time.Sleep(10 * time.Second)
			n.want(t)
		}
	})
}

// TestLateAnnouncement: a process that was stopped, and goes on when another one has the address, does not draw it to
// itself by an announcement that was due meanwhile.
func TestLateAnnouncement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, x := range []struct {
			confirm func(context.Context) bool
			want    []string
		}{
			{nil, nil},
			{func(context.Context) bool { return false }, nil},
			{func(context.Context) bool { return true }, []string{"3000 h announce"}},
			{func(ctx context.Context) bool { <-ctx.Done(); return false }, nil},
		} {
			n := newNetwork()
			h := n.host("h")
			r := Runner{Net: h, Clock: Clock{Timer: func(d time.Duration) (<-chan time.Time, func()) {
				if d > 0 && d <= 50*time.Millisecond {
					d = 3 * time.Second // it stood still
				}
				timer := time.NewTimer(d)
				return timer.C, func() { timer.Stop() }
			}}}
			rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: h}, Again: []time.Duration{50 * time.Millisecond, time.Second}, Confirm: x.confirm})
			if rep.Outcome != Serving {
				t.Errorf("%+v", rep)
			}
			n.forget()
			time.Sleep(10 * time.Second)
			n.want(t, x.want...)
			r.Close()
		}
	})
}

// TestTickleAgain: clients that have not come back are woken again, others are not.
func TestTickleAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		h := n.host("h")
		log := newLog(t)
		r := Runner{Net: h, Log: log}
		defer r.Close()
		other := testConn
		other.Remote = netip.AddrPortFrom(other.Remote.Addr(), other.Remote.Port()+1)
		tickles := 0
		h.hooks["tickle"] = func(context.Context) error {
			if tickles++; tickles == 3 {
				return errors.New("no buffer")
			}
			return nil
		}
		rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h, []vip.Conn{testConn, other}}})
		if rep.Outcome != Serving || rep.Tickled != 2 {
			t.Errorf("%+v", rep)
		}
		n.forget()
		comes := func(c vip.Conn) {
			n.mu.Lock()
			h.sockets = append(h.sockets, vip.Socket{Network: "tcp", State: "ESTAB", Conn: c})
			n.mu.Unlock()
		}
		comes(other)
		time.Sleep(100 * time.Millisecond)
		n.want(t, "50 h announce", "50 h tickle 1")
		time.Sleep(200 * time.Millisecond)
		n.want(t, "200 h announce", "200 h tickle 1")
		comes(testConn)
		time.Sleep(time.Second)
		n.want(t, "1000 h announce")
		es, _ := log.Since(0)
		if e := es[len(es)-1]; e.Stage != "tickle" || e.Err != "no buffer" {
			t.Errorf("%+v", e)
		}
	})
}

// TestStuckService: what hangs does not hold the address, and is waited for in the end. 004.22
func TestStuckService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		a := n.host("a")
		n.has[testAddr.Prefix.Addr()] = []string{"a"}
		free := make(chan struct{})
		hang := func(context.Context) error { <-free; return nil }
		for _, m := range []string{"refuse", "drain", "commit", "close", "destroy", "finish"} {
			a.hooks[m] = hang
		}
		log := newLog(t)
		r := Runner{Net: a, Log: log}
		abandoned := false
		rep := r.Release(t.Context(), ReleaseOptions{
			Subject: subject, Service: unit{h: a}, Closing: Quiet,
			Told:      func(context.Context) error { t.Error("told"); return nil },
			Abandon:   func(context.Context) error { abandoned = true; return nil },
			Deadlines: Deadlines{Drain: time.Second},
		})
		if rep.Outcome != Unclean || !abandoned || !rep.Told || rep.Err == nil {
			t.Errorf("%+v", rep)
		}
		if want := 300 + 1200 + 2200 + 500 + 500 + 700; rep.Took != time.Duration(want)*time.Millisecond {
			t.Errorf("took %v", rep.Took)
		}
		if has, _ := a.Has(testAddr.Prefix.Addr()); has {
			t.Error("the address is still here")
		}
		lines := eventLines(log)
		if want := "release stage commit 2.2s cut=lost: not done within 2.2s"; !slices.Contains(lines, want) {
			t.Errorf("no %q in\n%s", want, strings.Join(lines, "\n"))
		}
		closed := make(chan struct{})
		go func() { r.Close(); close(closed) }()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("closed while calls are under way")
		default:
		}
		close(free)
		<-closed
	})
}

// TestFencedRelease: a fence cuts the drain; with reason Fenced there is none. 004.24
func TestFencedRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, reason := range []Reason{Move, Fenced} {
			n := newNetwork()
			a := n.host("a")
			n.has[testAddr.Prefix.Addr()] = []string{"a"}
			a.sockets = []vip.Socket{{Network: "tcp", State: "ESTAB"}}
			a.hooks["drain"] = sleep(time.Second)
			fence := make(chan struct{})
			time.AfterFunc(30*time.Millisecond, func() { close(fence) })
			s := subject
			s.Reason = reason
			r := Runner{Net: a}
			rep := r.Release(t.Context(), ReleaseOptions{
				Subject: s, Service: unit{h: a}, Fenced: fence,
				Told:    func(context.Context) error { t.Error("told"); return nil },
				Abandon: func(context.Context) error { t.Error("abandoned"); return nil },
			})
			if rep.Outcome != Superseded || rep.Told || rep.Destroyed != 1 {
				t.Errorf("%+v", rep)
			}
			if reason == Fenced {
				n.want(t, "0 a refuse hold", "0 a destroy 1", "0 a close quiet", "0 a remove", "0 a destroy 0", "0 a finish", "0 a destroy 0")
			} else {
				n.want(t, "0 a refuse hold", "0 a drain", "30 a destroy 1", "30 a close quiet", "30 a remove", "30 a destroy 0", "30 a finish", "30 a destroy 0")
			}
			r.Close()
		}
	})
}

// TestStuckAddress: what cannot be removed is said, and nothing is told.
func TestStuckAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		a := n.host("a")
		addr := testAddr.Prefix.Addr()
		n.has[addr] = []string{"a"}
		a.hooks["remove"] = func(context.Context) error { return errors.New("operation not permitted") }
		r := Runner{Net: a}
		o := ReleaseOptions{Subject: subject, Service: unit{h: a}, Told: func(context.Context) error { t.Error("told"); return nil }}
		rep := r.Release(t.Context(), o)
		if rep.Outcome != Stuck || rep.Told || !strings.Contains(fmt.Sprint(rep.Err), "remove: operation not permitted") {
			t.Errorf("%+v", rep)
		}
		delete(a.hooks, "remove")
		a.keep = true // another program has it added again
		if rep := r.Release(t.Context(), o); rep.Outcome != Stuck || !strings.Contains(fmt.Sprint(rep.Err), "the machine still has 192.0.2.9") {
			t.Errorf("%+v", rep)
		}
		// Once more, when it can be.
		a.keep = false
		o.Reason = Fenced
		if rep := r.Release(t.Context(), o); rep.Outcome != Superseded || rep.Err != nil {
			t.Errorf("%+v", rep)
		}
		r.Close()
	})
}

// TestTold: the registry that is away for a moment is told when it is back.
func TestTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		a := n.host("a")
		r := Runner{Net: a}
		calls := 0
		rep := r.Release(t.Context(), ReleaseOptions{Subject: subject, Service: unit{h: a}, Told: func(context.Context) error {
			if calls++; calls < 4 {
				return errors.New("no leader")
			}
			return nil
		}})
		if rep.Outcome != Clean || !rep.Told || calls != 4 || rep.Took != 300*time.Millisecond || rep.Err != nil {
			t.Errorf("%d calls: %+v", calls, rep)
		}
		rep = r.Release(t.Context(), ReleaseOptions{Subject: subject, Service: unit{h: a}, Told: func(context.Context) error { return errors.New("no leader") }})
		if rep.Outcome != Clean || rep.Told || rep.Took != TellTimeout || !strings.Contains(fmt.Sprint(rep.Err), "told: no leader") {
			t.Errorf("%+v", rep)
		}
		r.Close()
	})
}

// TestGivenRelease: a cluster manager removes the address between the stages.
func TestGivenRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		a := n.host("a")
		n.has[testAddr.Prefix.Addr()] = []string{"a"}
		r := Runner{Net: a}
		finish := make(chan struct{})
		drained := make(chan struct{})
		go func() {
			<-drained
			time.Sleep(700 * time.Millisecond)
			close(finish)
		}()
		rep := r.Release(t.Context(), ReleaseOptions{
			Subject: subject, Service: unit{h: a}, Given: true, Finish: finish, Closing: Quiet,
			OnStage: func(s StageReport) {
				if s.Stage == StageClear {
					close(drained)
				}
			},
		})
		if rep.Outcome != Clean || rep.Told {
			t.Errorf("%+v", rep)
		}
		n.want(t, "0 a refuse hold", "0 a drain", "0 a commit", "0 a close quiet", "0 a destroy 0", "700 a finish", "700 a destroy 0")
		r.Close()
	})
}

// TestListenTake: a node waits for the registry between listening and taking.
func TestListenTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		b := n.host("b")
		r := Runner{Net: b}
		o := AcquireOptions{Subject: subject, Candidate: unit{h: b}, Again: []time.Duration{}}
		taking, _ := r.Listen(t.Context(), o)
		if taking == nil {
			t.Fatal("not listening")
		}
		time.Sleep(time.Hour)
		n.want(t, "0 b listen")
		if rep := taking.Take(t.Context()); rep.Outcome != Serving {
			t.Errorf("%+v", rep)
		}
		n.want(t, "3600000 b begin", "3600000 b destroy 0", "3600000 b serve", "3600000 b add", "3600000 b announce", "3600000 b notify")

		taking, _ = r.Listen(t.Context(), o)
		rep := taking.BreakOff()
		if rep.Outcome != BrokenOff || rep.Began || rep.Exposed || rep.Err == nil {
			t.Errorf("%+v", rep)
		}
		n.want(t, "3600000 b listen", "3600000 b finish")

		b.hooks["listen"] = func(context.Context) error { return errors.New("port in use") }
		taking, rep = r.Listen(t.Context(), o)
		if taking != nil || rep.Outcome != NotTaken || rep.Stage != StageListen || !strings.Contains(fmt.Sprint(rep.Err), "port in use") {
			t.Errorf("%v, %+v", taking, rep)
		}
		r.Close()
	})
}

// TestBrokenOff: the end of the context, or a fence, undoes a take-over.
func TestBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		b := n.host("b")
		r := Runner{Net: b}
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Millisecond)
		defer cancel()
		block := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		rep := r.Acquire(ctx, AcquireOptions{Subject: subject, Candidate: unit{h: b}, Released: block})
		if rep.Outcome != BrokenOff || rep.Began {
			t.Errorf("%+v", rep)
		}
		n.want(t, "0 b listen", "40 b finish")
		fence := make(chan struct{}, 1)
		b.hooks["begin"] = func(ctx context.Context) error { fence <- struct{}{}; <-ctx.Done(); return ctx.Err() }
		rep = r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: b}, Fenced: fence})
		if rep.Outcome != BrokenOff || !rep.Began || rep.Exposed {
			t.Errorf("%+v", rep)
		}
		n.want(t, "40 b listen", "40 b begin", "40 b finish")
		// Nobody says that it is free.
		rep = r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: b}, Released: block, Deadlines: TakeDeadlines{Wait: time.Second}})
		if rep.Outcome != NotTaken || rep.Stage != StageWait {
			t.Errorf("%+v", rep)
		}
		r.Close()
	})
}

// TestCannotAdd: nothing was answered at an address that the kernel was never asked to
// add.
func TestCannotAdd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		b := n.host("b")
		r := Runner{Net: b}
		b.hooks["add"] = func(context.Context) error { return fmt.Errorf("no such interface: %w", vip.ErrUnable) }
		rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: b}})
		if rep.Outcome != NotTaken || rep.Stage != StageAdd || !rep.Began || rep.Exposed || !strings.Contains(fmt.Sprint(rep.Err), "no such interface") {
			t.Errorf("%+v", rep)
		}
		// It may have been added if only one of several tries says less.
		tries := 0
		b.hooks["add"] = func(context.Context) error {
			if tries++; tries == 2 {
				return errors.New("the kernel refuses")
			}
			return vip.ErrUnable
		}
		if rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: b}}); rep.Outcome != NotTaken || !rep.Exposed || tries < 3 {
			t.Errorf("%+v, %d tries", rep, tries)
		}
		r.Close()
	})
}

// TestLateAdd: an address that comes after nobody waits for it does not stay.
func TestLateAdd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		b := n.host("b")
		r := Runner{Net: b}
		b.hooks["add"] = func(context.Context) error { time.Sleep(5 * time.Second); return nil }
		rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: b}})
		if rep.Outcome != NotTaken || rep.Stage != StageAdd || !rep.Began || !rep.Exposed {
			t.Errorf("%+v", rep)
		}
		r.Close()
		n.want(t, "0 b listen", "0 b begin", "0 b destroy 0", "0 b serve", "0 b add",
			"700 b remove", "700 b finish", "700 b destroy 0", "5000 b remove")
		if has, _ := b.Has(testAddr.Prefix.Addr()); has {
			t.Error("the address is here")
		}
	})
}

// TestStoodStill: a process that stood still while a stage had a short limit takes what the stage comes to, unless it was
// away for so long that another node may have the address.
func TestStoodStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, x := range []struct {
			late time.Duration // of the tick at the stage's limit
			more time.Duration // until the stage is done
			want Outcome
		}{
			{0, 50 * time.Millisecond, NotTaken},
			{900 * time.Millisecond, 50 * time.Millisecond, Serving},
			{900 * time.Millisecond, grace + time.Millisecond, NotTaken},
			{1100 * time.Millisecond, 50 * time.Millisecond, NotTaken},
		} {
			n := newNetwork()
			h := n.host("h")
			limit := TakeDeadlines{Add: 507 * time.Millisecond}
			clock := Clock{Timer: func(d time.Duration) (<-chan time.Time, func()) {
				if d == limit.Add {
					d += x.late
				}
				timer := time.NewTimer(d)
				return timer.C, func() { timer.Stop() }
			}}
			h.hooks["add"] = sleep(limit.Add + x.late + x.more)
			r := Runner{Net: h, Clock: clock}
			rep := r.Acquire(t.Context(), AcquireOptions{Subject: subject, Candidate: unit{h: h}, Again: []time.Duration{}, Deadlines: limit})
			if rep.Outcome != x.want {
				t.Errorf("%v late, %v more: %+v", x.late, x.more, rep)
			}
			r.Close()
		}
		// Giving an address up is not given up, however long it was.
		n := newNetwork()
		h := n.host("h")
		d := Deadlines{Commit: 507 * time.Millisecond}
		h.hooks["commit"] = sleep(d.Commit + 10*time.Second + 50*time.Millisecond)
		r := Runner{Net: h, Clock: Clock{Timer: func(x time.Duration) (<-chan time.Time, func()) {
			if x == d.Commit {
				x += 10 * time.Second
			}
			timer := time.NewTimer(x)
			return timer.C, func() { timer.Stop() }
		}}}
		if rep := r.Release(t.Context(), ReleaseOptions{Subject: subject, Service: unit{h: h}, Deadlines: d}); rep.Outcome != Clean {
			t.Errorf("%+v", rep)
		}
		r.Close()
	})
}

// TestConcurrent: a Runner moves several addresses at once.
func TestConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		h := n.host("h")
		r := Runner{Net: h, Log: newLog(t)}
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				s := subject
				s.Address.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 24)
				for range 5 {
					if rep := r.Acquire(t.Context(), AcquireOptions{Subject: s, Candidate: unit{h: h}}); rep.Outcome != Serving {
						t.Errorf("%+v", rep)
					}
					if rep := r.Release(t.Context(), ReleaseOptions{Subject: s, Service: unit{h: h}}); rep.Outcome != Clean {
						t.Errorf("%+v", rep)
					}
				}
			})
		}
		wg.Wait()
		r.Close()
		for _, b := range n.bad {
			t.Error(b)
		}
	})
}
