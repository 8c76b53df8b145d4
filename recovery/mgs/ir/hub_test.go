package ir

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// served is a hub as a target.
type served struct{ h *Hub }

type servedConn struct {
	c *Conn
}

func (s served) Accept(p wire.Peer) wire.Target            { return &servedConn{c: s.h.Accept(p.Node)} }
func (s served) TryHandle(*wire.Request, *wire.Reply) bool { return false }
func (s served) Handle(_ *wire.Request, rep *wire.Reply, done func()) {
	rep.Status = wire.ErrProto
	done()
}

func (c *servedConn) TryHandle(*wire.Request, *wire.Reply) bool { return false }
func (c *servedConn) Close() error                              { c.c.Close(); return nil }
func (c *servedConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.Reset()
	c.c.Handle(req, rep, done)
}

var _ io.Closer = (*servedConn)(nil)

func hubOf(inc uint64) *Hub {
	return NewHub(HubOptions{Config: Config{Startup: 30 * time.Second}, Incarnation: inc})
}

// pending is a request that a test made.
type pendingReq struct {
	rep  wire.Reply
	n    atomic.Int32
	done chan struct{}
}

func send(c *Conn, op wire.Op, body any) *pendingReq {
	var data []byte
	switch b := body.(type) {
	case []byte:
		data = b
	default:
		data, _ = json.Marshal(body)
	}
	x := &pendingReq{done: make(chan struct{})}
	c.Handle(&wire.Request{Header: wire.Header{Op: op, XID: 1}, Data: data}, &x.rep, func() {
		if x.n.Add(1) == 1 {
			close(x.done)
		}
	})
	return x
}

func (x *pendingReq) waits() bool { return x.n.Load() == 0 }

func news(t *testing.T, x *pendingReq) News {
	t.Helper()
	if x.n.Load() != 1 || x.rep.Status != wire.OK {
		t.Fatalf("%d answers, status %v", x.n.Load(), x.rep.Status)
	}
	n, err := decodeNews(x.rep.Data, &Watch{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A watch holds no goroutine: it is answered by the announcement, by the timer, by the
// end of its connection and by Close, each time once.
func TestLongPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hubOf(1)
		up := func(instance uint64) {
			x := send(h.Accept("n1"), wire.OpAnnounce, Announcement{Target: "MDT0000", Node: "n1", Instance: instance, Up: true})
			taken, err := decodeTaken(x.rep.Data)
			if err != nil || taken.State != StateStartup || taken.Late || x.n.Load() != 1 {
				t.Fatalf("%+v, %v", taken, err)
			}
		}
		var conns []*Conn
		var waiting []*pendingReq
		for i := range 200 {
			c := h.Accept(fmt.Sprintf("w%d", i))
			w := Watch{Node: fmt.Sprintf("w%d", i), Able: true}
			if n := news(t, send(c, wire.OpWatch, w)); n.Version != 0 {
				t.Fatalf("%+v", n)
			}
			w.Incarnation = 1
			conns, waiting = append(conns, c), append(waiting, send(c, wire.OpWatch, w))
		}
		synctest.Wait()
		for _, x := range waiting {
			if !x.waits() {
				t.Fatal("answered though nothing has changed")
			}
		}
		up(7)
		for i, x := range waiting {
			if n := news(t, x); n.Version != 1 || len(n.Targets) != 1 || n.Targets[0].Instance != 7 {
				t.Fatalf("%+v", n)
			}
			waiting[i] = send(conns[i], wire.OpWatch, Watch{Node: fmt.Sprintf("w%d", i), Incarnation: 1, Version: 1, Able: true})
		}
		if s, _, _ := h.Status(); s.NotifyCount != 1 || s.Pending != 0 || len(s.Nodes) != 201 {
			t.Errorf("%+v", s)
		}
		time.Sleep(4 * time.Second)
		if !waiting[0].waits() {
			t.Error("answered before its time")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for i, x := range waiting {
			if n := news(t, x); n.Version != 1 || len(n.Targets) != 0 {
				t.Fatalf("%+v", n)
			}
			waiting[i] = send(conns[i], wire.OpWatch, Watch{Node: fmt.Sprintf("w%d", i), Incarnation: 1, Version: 1, Able: true})
		}
		conns[0].Close()
		if waiting[0].waits() || waiting[0].rep.Status != wire.ErrTargetDown {
			t.Error("not refused at the connection's end")
		}
		h.Close()
		for i, x := range waiting {
			if x.n.Load() != 1 || x.rep.Status != wire.ErrTargetDown {
				t.Fatalf("watch %d: %d answers, %v", i, x.n.Load(), x.rep.Status)
			}
		}
		for _, op := range []wire.Op{wire.OpWatch, wire.OpWatchers, wire.OpAnnounce} {
			body := any(Watch{Node: "w1"})
			if op == wire.OpAnnounce {
				body = Announcement{Target: "T", Node: "w1", Instance: 1}
			}
			if x := send(conns[1], op, body); x.n.Load() != 1 || x.rep.Status != wire.ErrTargetDown {
				t.Errorf("operation %d after Close: %v", op, x.rep.Status)
			}
		}
		for _, c := range conns {
			c.Close()
		}
		h.Close()
		time.Sleep(time.Minute)
	})
}

// What a node sends of others, or that is none, is refused and changes nothing.
func TestHostile(t *testing.T) {
	h := hubOf(1)
	defer h.Close()
	c := h.Accept("n1")
	long := strings.Repeat("n", 65)
	for _, x := range []struct {
		op   wire.Op
		body any
	}{
		{wire.OpWatch, Watch{Node: "n2"}},
		{wire.OpWatch, Watch{Node: long}},
		{wire.OpWatch, Watch{}},
		{wire.OpWatch, []byte(`{"node":"n1"} {}`)},
		{wire.OpWatch, []byte(`{"node":"n1","x":1}`)},
		{wire.OpWatch, []byte(`{"node":"n1","version":-1}`)},
		{wire.OpWatch, []byte(nil)},
		{wire.OpWatch, []byte(strings.Repeat("[", 1<<16))},
		{wire.OpAnnounce, Announcement{Target: "MDT0000", Node: "n2", Instance: 1}},
		{wire.OpAnnounce, Announcement{Target: "MDT 0", Node: "n1", Instance: 1}},
		{wire.OpAnnounce, Announcement{Target: long, Node: "n1", Instance: 1}},
		{wire.OpAnnounce, Announcement{Target: "MDT0000", Node: "n1"}},
		{wire.OpAnnounce, Announcement{Target: "MDT0000", Node: "n1", Instance: 1 << 63}},
	} {
		if r := send(c, x.op, x.body); r.n.Load() != 1 || r.rep.Status != wire.ErrProto {
			t.Errorf("%d %.80v: %d answers, %v", x.op, x.body, r.n.Load(), r.rep.Status)
		}
	}
	if s, l, _ := h.Status(); s.Version != 0 || len(l) != 0 {
		t.Errorf("%+v, %+v", s, l)
	}
	// Connections without a certificate say once who they are.
	open := h.Accept("")
	news(t, send(open, wire.OpWatch, Watch{Node: "n5", Able: true}))
	if r := send(open, wire.OpWatch, Watch{Node: "n6"}); r.rep.Status != wire.ErrProto {
		t.Error(r.rep.Status)
	}
	// The table and the list of nodes are bounded.
	for i := range maxTargets + 10 {
		r := send(c, wire.OpAnnounce, Announcement{Target: fmt.Sprintf("T%d", i), Node: "n1", Instance: 1, Up: true})
		if taken, err := decodeTaken(r.rep.Data); err != nil || taken.Late != (i >= maxTargets) {
			t.Fatalf("%d: %+v, %v", i, taken, err)
		}
	}
	for i := range maxNodes + 10 {
		h.Accept(fmt.Sprintf("%s%d", long[:61], i))
	}
	r := send(c, wire.OpWatchers, nil)
	s, err := decodeStatus(r.rep.Data)
	if err != nil || len(s.Nodes) != maxNodes {
		t.Errorf("%d nodes, %v", len(s.Nodes), err)
	}
	if r := send(h.Accept("other"), wire.OpWatch, Watch{Node: "other"}); r.rep.Status != wire.ErrTargetDown {
		t.Error(r.rep.Status)
	}
	open.Close()
	c.Close()
}

// cellar is a registry that can be somewhere else, or nowhere.
type cellar struct {
	mu sync.Mutex
	at map[string]*Hub
}

func (c *cellar) set(addr string, h *Hub) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = map[string]*Hub{addr: h}
}

func (c *cellar) dial(_ context.Context, addr string) (wire.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.at[addr]; h != nil {
		return wire.Local(served{h}, wire.NextSession()), nil
	}
	return nil, fmt.Errorf("there is nobody at %s", addr)
}

// A client finds the registry wherever it is, announces again what runs when that has
// started anew, gets the table, and tells of every change once: SM 102, SM 103, CS 27a,
// CS 27b, CS 80, CS 121.
func TestClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		var where cellar
		var mu sync.Mutex
		heard := map[string][]string{}
		var wg sync.WaitGroup
		start := func(node string, able bool) *Client {
			c, err := NewClient(Options{Node: node, Addrs: []string{"x", "y"}, Dial: where.dial, Able: able, OnNews: func(x Target) {
				mu.Lock()
				heard[node] = append(heard[node], fmt.Sprint(x.Name, " ", x.Instance, " ", x.Node))
				mu.Unlock()
			}})
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() { c.Run(ctx) })
			return c
		}
		expect := func(node string, want ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if fmt.Sprint(heard[node]) != fmt.Sprint(want) {
				t.Errorf("%s has heard %q, want %q", node, heard[node], want)
			}
			heard[node] = nil
		}
		a, b, off := start("a", true), start("b", true), start("off", false)
		var answers []Taken
		a.Announce("MDT0000", 7, false, func(x Taken) { answers = append(answers, x) })
		time.Sleep(10 * time.Second)
		if s := a.Status(); s.Connected || s.Err == nil || s.Incarnation != 0 {
			t.Errorf("%+v", s)
		}
		if _, err := a.Ask(ctx); err == nil {
			t.Error("asked a registry that is not there")
		}
		h := hubOf(1)
		where.set("y", h)
		time.Sleep(2 * time.Second)
		expect("a", "MDT0000 7 a")
		expect("b", "MDT0000 7 a")
		b.Announce("OST0000", 3, true, nil) // opts out
		b.Announce("OST0001", 4, false, nil)
		expect("a", "OST0001 4 b")
		if s := off.Status(); !s.Connected || s.At != "y" || s.Version != 3 || len(s.Targets) != 3 || !s.Targets[1].NoIR {
			t.Errorf("%+v", s)
		}
		time.Sleep(30 * time.Second)
		if s, err := b.Ask(ctx); err != nil || s.State != StatePartial || s.NonIR != 1 || s.Version != 3 || s.NotifyCount != 3 || len(s.Nodes) != 3 {
			t.Errorf("%+v, %v", s, err)
		}
		expect("off")
		expect("b", "OST0001 4 b")
		a.Withdraw("MDT0000")
		a.Flush(ctx, time.Second)
		synctest.Wait()
		if s := b.Status(); s.Version != 4 || s.Targets[0].Up {
			t.Errorf("%+v", s)
		}
		if _, ok := a.Announced("MDT0000"); ok {
			t.Error("withdrawn, and announced")
		}
		expect("a")
		a.Announce("MDT0000", 8, false, func(x Taken) { answers = append(answers, x) })
		expect("b", "MDT0000 8 a")
		// The registry starts anew elsewhere.
		where.set("x", hubOf(2))
		h.Close()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for _, c := range []*Client{a, b, off} {
			if s := c.Status(); !s.Connected || s.At != "x" || s.Incarnation != 2 || s.Version != 3 || len(s.Targets) != 3 {
				t.Errorf("%+v", s)
			}
		}
		if len(answers) != 3 || answers[2].Incarnation != 2 || answers[2].State != StateStartup {
			t.Errorf("%+v", answers)
		}
		if x, ok := a.Announced("MDT0000"); !ok || x != answers[1] { // as it was when the target started
			t.Errorf("%+v, %v", x, ok)
		}
		cancel()
		wg.Wait()
		where.mu.Lock()
		defer where.mu.Unlock()
		for _, h := range where.at {
			h.Close()
		}
	})
}

// An answer that is none ends the connection, and the whole table is asked for.
func TestClientDistrusts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		h := hubOf(1)
		liar := &lying{h: h}
		c, err := NewClient(Options{Node: "a", Addrs: []string{"x"}, Able: true, Dial: func(context.Context, string) (wire.Conn, error) {
			return wire.Local(liar, wire.NextSession()), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { c.Run(ctx); close(done) }()
		for _, s := range []string{`{}`, `x`, `{"incarnation":1,"version":0,"state":"odd"}`,
			`{"incarnation":1,"version":2,"state":"full","targets":[{"name":"T","node":"n","instance":1,"up":true,"version":2},{"name":"U","node":"n","instance":1,"up":true,"version":1}]}`} {
			liar.set(s)
			time.Sleep(5 * time.Second)
			if st := c.Status(); st.Connected || st.Err == nil || len(st.Targets) != 0 {
				t.Errorf("%s: %+v", s, st)
			}
		}
		liar.set("")
		send(h.Accept("n"), wire.OpAnnounce, Announcement{Target: "T", Node: "n", Instance: 1, Up: true})
		time.Sleep(5 * time.Second)
		if st := c.Status(); !st.Connected || st.Version != 1 {
			t.Errorf("%+v", st)
		}
		cancel()
		<-done
		h.Close()
	})
}

// lying answers watches with what it is told to.
type lying struct {
	h   *Hub
	mu  sync.Mutex
	say string
}

func (l *lying) set(s string) {
	l.mu.Lock()
	l.say = s
	l.mu.Unlock()
}
func (l *lying) Accept(p wire.Peer) wire.Target {
	return &lyingConn{servedConn{c: l.h.Accept(p.Node)}, l}
}
func (l *lying) TryHandle(*wire.Request, *wire.Reply) bool {
	return false
}
func (l *lying) Handle(_ *wire.Request, rep *wire.Reply, done func()) { done() }

type lyingConn struct {
	servedConn
	l *lying
}

func (c *lyingConn) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	c.l.mu.Lock()
	say := c.l.say
	c.l.mu.Unlock()
	if say == "" || req.Op != wire.OpWatch {
		c.servedConn.Handle(req, rep, done)
		return
	}
	rep.Reset()
	rep.Data = append(rep.Data, say...)
	done()
}

func FuzzDecode(f *testing.F) {
	for _, v := range []any{
		Watch{Node: "n", Incarnation: 1, Version: 2, Able: true}, Announcement{Target: "T", Node: "n", Instance: 3, Up: true},
		News{Incarnation: 1, Version: 2, State: StateFull, Targets: []Target{{Name: "T", Node: "n", Instance: 3, Up: true, Version: 2}}},
		Taken{Incarnation: 1, State: StatePartial}, Status{Incarnation: 1, State: StateDisabled, Nodes: []Node{{Name: "n"}}},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if w, err := decodeWatch(b); err == nil && !ValidName(w.Node) {
			t.Errorf("%+v", w)
		}
		if a, err := decodeAnnouncement(b); err == nil && (!ValidName(a.Target) || !ValidName(a.Node) || a.Instance == 0) {
			t.Errorf("%+v", a)
		}
		if n, err := decodeNews(b, &Watch{Incarnation: 1, Version: 1}); err == nil && (len(n.Targets) > pageTargets || n.Incarnation == 1 && n.Version < 1) {
			t.Errorf("%+v", n)
		}
		if x, err := decodeTaken(b); err == nil && !x.State.valid() {
			t.Errorf("%+v", x)
		}
		if s, err := decodeStatus(b); err == nil && len(s.Nodes) > maxNodes {
			t.Errorf("%+v", s)
		}
		h := hubOf(1)
		c := h.Accept("n")
		for _, op := range []wire.Op{wire.OpWatch, wire.OpAnnounce, wire.OpWatch} {
			send(c, op, b)
		}
		c.Close()
		h.Close()
	})
}
