package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// town is some nodes on the loopback interface.
type town struct {
	t     *testing.T
	nodes map[string]*node
	certs map[string]*ca.Node
	mu    sync.Mutex
	addrs map[string]string
}

// node is one process of a node of a town.
type node struct {
	town *town
	name string
	srv  *tcp.Server
	h    *Health
	done chan error

	hang   chan struct{} // Local waits for it when set
	frozen atomic.Bool   // connections dialled by it carry nothing

	mu     sync.Mutex
	local  Local
	events []Event
}

func newTown(t *testing.T, secure bool, names ...string) *town {
	w := &town{t: t, nodes: map[string]*node{}, addrs: map[string]string{}}
	noLeaks(t)
	if secure {
		dir := t.TempDir()
		c, err := ca.Create(dir, "test", ca.Options{})
		if err != nil {
			t.Fatal(err)
		}
		w.certs = map[string]*ca.Node{}
		for _, n := range names {
			if err := c.IssueNode(dir, n, ca.Options{}); err != nil {
				t.Fatal(err)
			}
			if w.certs[n], err = ca.LoadNode(dir, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return w
}

// noLeaks checks at the end that no goroutine of this package or of its connections
// is left.
func noLeaks(t *testing.T) {
	t.Cleanup(func() {
		var last string
		for range 1000 {
			buf := make([]byte, 1<<20)
			last = ""
			for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				for _, mine := range []string{"health.(*", "tcp.(*sconn)", "tcp.(*Conn)", "tcp.(*Server)"} {
					if strings.Contains(g, mine) {
						last = g
					}
				}
			}
			if last == "" {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Error("goroutine left behind:\n" + last)
	})
}

var timeouts = tcp.Timeouts{Handshake: 10 * time.Second, Frame: 10 * time.Second, Write: 60 * time.Second, Idle: 60 * time.Second}

// start starts a node; more changes what it is started with.
func (w *town) start(name string, peers []string, local Local, more func(*Options)) *node {
	w.t.Helper()
	n := &node{town: w, name: name, local: local, done: make(chan error, 1)}
	o := Options{
		Config:   Config{Node: name, Peers: peers, Incarnation: 1, Interval: 20 * time.Millisecond, Lower: 10 * time.Second, RedialMax: 50 * time.Millisecond},
		Dial:     Dial(n.dial),
		Local:    n.tell,
		OnEvents: n.heard,
	}
	if more != nil {
		more(&o)
	}
	h, err := Start(o)
	if err != nil {
		w.t.Fatal(err)
	}
	n.h = h
	so := tcp.ServerOptions{Node: name, Insecure: w.certs == nil, Timeouts: timeouts}
	if w.certs != nil {
		so.TLS = w.certs[name].Server()
	}
	if n.srv, err = tcp.NewServer(map[string]wire.Target{TargetName: h.Target()}, so); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	addr := w.addrs[name]
	w.mu.Unlock()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.addrs[name], w.nodes[name] = l.Addr().String(), n
	w.mu.Unlock()
	go func() { n.done <- n.srv.Serve(l) }()
	w.t.Cleanup(n.stop)
	return n
}

// stop ends a node as if its process had died: nobody says goodbye.
func (n *node) stop() {
	if n.h == nil {
		return
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	n.h.Close()
	_ = n.srv.Close(gone)
	if err := <-n.done; err != nil {
		n.town.t.Error(err)
	}
	n.h = nil
}

// dial leads to another node; the connection freezes with n.
func (n *node) dial(to string) tcp.DialOptions {
	n.town.mu.Lock()
	addr := n.town.addrs[to]
	n.town.mu.Unlock()
	o := tcp.DialOptions{Addrs: []tcp.Endpoint{{Addr: addr, Node: to}}, Node: n.name, Insecure: n.town.certs == nil, Timeouts: timeouts}
	if n.town.certs != nil {
		o.TLS = n.town.certs[n.name].Client(to)
	}
	if addr == "" {
		o.Addrs[0].Addr = "127.0.0.1:1"
	}
	o.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &ice{Conn: c, frozen: &n.frozen}, nil
	}
	return o
}

// ice is a connection that loses what is written while it is frozen.
type ice struct {
	net.Conn
	frozen *atomic.Bool
	lost   atomic.Bool
}

func (c *ice) Write(p []byte) (int, error) {
	if c.frozen.Load() {
		c.lost.Store(true) // what follows would not make sense to the other side
	}
	if c.lost.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (n *node) tell() Local {
	n.mu.Lock()
	l, hang := n.local, n.hang
	n.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return l
}

func (n *node) set(l Local) {
	n.mu.Lock()
	n.local = l
	n.mu.Unlock()
}

func (n *node) heard(e []Event) {
	n.mu.Lock()
	n.events = append(n.events, e...)
	n.mu.Unlock()
}

// wants waits for an event, and forgets it and those before it.
func (n *node) wants(want string) {
	n.town.t.Helper()
	var seen []string
	eventually(n.town.t, func() string { return fmt.Sprintf("%s: %q after %q", n.name, want, seen) }, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		seen = seen[:0]
		for i := range n.events {
			e := n.events[i]
			e.Silence = 0
			s := eventText(&e)
			if seen = append(seen, s); s == want {
				n.events = n.events[i+1:]
				return true
			}
		}
		return false
	})
}

// never checks the events that nobody waited for.
func (n *node) never(kinds ...Kind) {
	n.town.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range n.events {
		if slices.Contains(kinds, n.events[i].Kind) {
			n.town.t.Errorf("%s: %s", n.name, eventText(&n.events[i]))
		}
	}
}

func (n *node) status(peer string) PeerStatus {
	for _, s := range n.h.Status() {
		if s.Name == peer {
			return s
		}
	}
	return PeerStatus{}
}

func eventually(t *testing.T, what func() string, ok func() bool) {
	t.Helper()
	for range 4000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("never happened: ", what())
}

func text(s string) func() string { return func() string { return s } }

func served(instance uint64, names ...string) (l []Target) {
	for _, n := range names {
		l = append(l, Target{Name: n, Instance: instance, State: Serving})
	}
	return l
}

// Nodes that hold state on each other exchange beats by one connection, and stop when
// they no longer do (LN 303: the state after a link was up; requirement 000.30).
func TestNodesMeetAndPart(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("tls=%v", secure), func(t *testing.T) {
			w := newTown(t, secure, "a", "b", "c")
			a := w.start("a", []string{"b", "c"}, Local{Targets: served(3, "mdt"), VIPs: []VIP{{1, 7}}, Peers: []string{"b"}}, nil)
			b := w.start("b", []string{"a", "c"}, Local{Targets: served(4, "ost0"), Peers: []string{"a"}}, nil)
			c := w.start("c", []string{"a", "b"}, Local{}, nil)
			a.wants("b: alive incarnation=1")
			a.wants("b: target up ost0 instance=4")
			b.wants("a: alive incarnation=1")
			b.wants("a: target up mdt instance=3")
			eventually(t, text("the address is known"), func() bool { return slices.Equal(b.status("a").VIPs, []VIP{{1, 7}}) })
			eventually(t, text("one connection remains"), func() bool { return a.srv.Stats().Conns+b.srv.Stats().Conns == 1 })
			if !a.status("b").Connected || b.status("a").Connected {
				t.Error("it is not the lower node that has dialled")
			}
			a.set(Local{Targets: served(3, "mdt")})
			b.set(Local{Targets: served(4, "ost0")})
			eventually(t, text("both are idle"), func() bool { return a.status("b").State == StateIdle && b.status("a").State == StateIdle })
			eventually(t, text("the connection ends"), func() bool { return b.srv.Stats().Conns == 0 })
			sent := a.status("b").Sent + b.status("a").Sent
			time.Sleep(100 * time.Millisecond)
			if now := a.status("b").Sent + b.status("a").Sent; now != sent {
				t.Errorf("%d beats between idle nodes", now-sent)
			}
			if s := c.status("a").Stats; s != (Stats{}) || c.srv.Stats().Accepted != 0 {
				t.Errorf("a node without state was disturbed: %+v", s)
			}
			a.never(Suspect, TargetGone, Restarted)
			b.never(Suspect, TargetGone, Restarted)
		})
	}
}

// The node with the higher name alone is interested: it makes the other one dial.
func TestHigherNodeAsks(t *testing.T) {
	w := newTown(t, false)
	a := w.start("a", []string{"b"}, Local{Targets: served(3, "mdt")}, nil)
	b := w.start("b", []string{"a"}, Local{Peers: []string{"a"}}, nil)
	b.wants("a: target up mdt instance=3")
	a.wants("b: alive incarnation=1")
	eventually(t, text("the lower node has dialled"), func() bool { return a.status("b").Connected && !b.status("a").Connected })
	eventually(t, text("one connection remains"), func() bool { return a.srv.Stats().Conns == 0 && b.srv.Stats().Conns == 1 })
	b.set(Local{})
	eventually(t, text("both are idle"), func() bool { return a.status("b").State == StateIdle && b.status("a").State == StateIdle })
}

// LN 252, LN 211: a process that dies is suspected, the one that follows it makes everything dead that
// the first one had.
func TestDeathAndRestart(t *testing.T) {
	w := newTown(t, false)
	a := w.start("a", []string{"b"}, Local{Peers: []string{"b"}}, nil)
	b := w.start("b", []string{"a"}, Local{Targets: served(4, "ost0", "ost1"), Peers: []string{"a"}}, nil)
	a.wants("b: target up ost1 instance=4")
	b.stop()
	a.wants("b: suspect")
	a.never(TargetGone, Restarted)
	b = w.start("b", []string{"a"}, Local{Targets: served(5, "ost1"), Peers: []string{"a"}}, func(o *Options) { o.Incarnation = 2 })
	for _, e := range []string{"restarted incarnation=2", "target gone ost0 instance=4", "target gone ost1 instance=4", "alive incarnation=2", "target up ost1 instance=5"} {
		a.wants("b: " + e)
	}
	b.wants("a: alive incarnation=1")
	if s := a.status("b"); s.Suspicions == 0 || s.Restarts != 1 {
		t.Errorf("%+v", s.Stats)
	}
}

// LN 206, LN 209, LN 218: a path that swallows everything leads to a suspicion and to nothing else. All that was
// believed of the peer stays.
func TestWrongSuspicionIsHarmless(t *testing.T) {
	w := newTown(t, false)
	quick := func(o *Options) { o.Lower = 200 * time.Millisecond }
	a := w.start("a", []string{"b"}, Local{Peers: []string{"b"}}, quick)
	b := w.start("b", []string{"a"}, Local{Targets: served(4, "ost0"), Peers: []string{"a"}}, quick)
	a.wants("b: target up ost0 instance=4")
	a.frozen.Store(true)
	b.frozen.Store(true)
	a.wants("b: suspect")
	b.wants("a: suspect")
	eventually(t, text("nothing hangs in queues"), func() bool { s := a.status("b"); return s.State == StateSuspect && s.Dials > 2 })
	a.frozen.Store(false)
	b.frozen.Store(false)
	a.wants("b: alive incarnation=1")
	b.wants("a: alive incarnation=1")
	a.never(TargetGone, Restarted, TargetUp, TargetMoved)
	if s := a.status("b"); s.Wrong == 0 {
		t.Errorf("%+v", s.Stats)
	}
}

// A path that is open in one direction only is used: the node that is not supposed to dial does.
func TestOneWayPath(t *testing.T) {
	w := newTown(t, false)
	a := w.start("a", []string{"b"}, Local{Peers: []string{"b"}}, nil)
	a.frozen.Store(true)
	b := w.start("b", []string{"a"}, Local{Targets: served(4, "ost0"), Peers: []string{"a"}}, nil)
	a.wants("b: target up ost0 instance=4")
	b.wants("a: alive incarnation=1")
	got := a.status("b").Received
	eventually(t, text("beats go on"), func() bool { return a.status("b").Received > got+10 })
}

// SA 903, RS 65a (adapted): a node that hangs while it looks at its targets still sends beats. It is slow, not dead.
func TestHangingNodeIsSlow(t *testing.T) {
	w := newTown(t, false)
	a := w.start("a", []string{"b"}, Local{Peers: []string{"b"}}, func(o *Options) { o.SlowAfter = 200 * time.Millisecond })
	b := w.start("b", []string{"a"}, Local{Targets: served(4, "ost0"), Peers: []string{"a"}}, nil)
	a.wants("b: target up ost0 instance=4")
	hang := make(chan struct{})
	b.mu.Lock()
	b.hang = hang
	b.mu.Unlock()
	a.wants("b: slow")
	got := a.status("b").Received
	eventually(t, text("beats go on"), func() bool { return a.status("b").Received > got+5 })
	b.mu.Lock()
	b.hang = nil
	b.mu.Unlock()
	close(hang)
	a.wants("b: steady")
	a.never(Suspect, TargetGone)
}

// store is a target whose writes wait until it is opened.
type store struct {
	open chan struct{}
	wg   sync.WaitGroup
	done atomic.Int64
}

func (s *store) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (s *store) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	s.wg.Go(func() {
		<-s.open
		rep.XID, rep.Count = req.XID, uint32(len(req.Bulk))
		s.done.Add(1)
		done()
	})
}

// Beats do not wait for data (requirement 000.25): neither for a connection that is stuck with its window and its
// memory used up, nor for one that is busy all the time.
func TestBeatsBesideData(t *testing.T) {
	w := newTown(t, false)
	a := w.start("a", []string{"b"}, Local{Peers: []string{"b"}}, nil)
	b := w.start("b", []string{"a"}, Local{Targets: served(4, "ost0"), Peers: []string{"a"}}, nil)
	ost := &store{open: make(chan struct{})}
	if err := b.srv.SetTarget("ost0", ost); err != nil {
		t.Fatal(err)
	}
	o := a.dial("b")
	o.Target, o.Kind = "ost0", tcp.Bulk
	c, err := tcp.Dial(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var writers sync.WaitGroup
	data := make([]byte, 1<<20)
	for i := range 96 { // more than the window and than the memory of a connection
		writers.Go(func() {
			var rep wire.Reply
			for n := uint64(0); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				req := &wire.Request{Header: wire.Header{Op: wire.OpWrite, XID: uint64(i)<<32 | n}, Bulk: data}
				if err := c.Call(context.Background(), req, &rep); err != nil && !errors.Is(err, tcp.ErrClosed) {
					t.Error(err)
					return
				}
			}
		})
	}
	beats := func(phase string) {
		from := a.status("b").Received
		eventually(t, text("beats while data are "+phase), func() bool { return a.status("b").Received >= from+25 })
		t.Logf("data %s: longest gap between beats so far %v", phase, a.status("b").LongestGap)
	}
	a.wants("b: alive incarnation=1")
	eventually(t, text("the server reads no more data"), func() bool { return b.srv.Stats().MemoryInUse >= 30<<20 })
	beats("stuck")
	close(ost.open)
	from := ost.done.Load()
	beats("flowing")
	if n := ost.done.Load() - from; n == 0 {
		t.Error("no data flowed")
	}
	close(stop)
	writers.Wait()
	_ = c.Close()
	ost.wg.Wait()
	a.never(Suspect)
	b.never(Suspect)
}

// What is not a beat is refused, and does not end the connection; beats of nodes outside the cluster count for nobody.
func TestHostileBeats(t *testing.T) {
	w := newTown(t, false)
	b := w.start("b", []string{"a"}, Local{}, nil)
	dial := func(as string) *tcp.Conn {
		n := &node{town: w, name: as}
		o := n.dial("b")
		o.Target, o.Kind = TargetName, tcp.Health
		c, err := tcp.Dial(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	call := func(c *tcp.Conn, op wire.Op, data []byte) wire.Status {
		var rep wire.Reply
		if err := c.Call(context.Background(), &wire.Request{Header: wire.Header{Op: op, XID: 1}, Data: data}, &rep); err != nil {
			t.Fatal(err)
		}
		return rep.Status
	}
	good := (&Beat{Incarnation: 1, Seq: 1, Want: true}).Append(nil)
	stranger, a := dial("x"), dial("a")
	for _, x := range []struct {
		c    *tcp.Conn
		op   wire.Op
		data []byte
		want wire.Status
	}{
		{stranger, wire.OpBeat, good, wire.ErrAcces},
		{a, wire.OpBeat, nil, wire.ErrProto},
		{a, wire.OpBeat, good[:len(good)-1], wire.ErrProto},
		{a, wire.OpBeat, make([]byte, wire.MaxData), wire.ErrProto},
		{a, wire.OpPing, nil, wire.OK},
		{a, wire.OpBeat, good, wire.OK},
	} {
		if got := call(x.c, x.op, x.data); got != x.want {
			t.Errorf("operation %d with %d bytes: %v, want %v", x.op, len(x.data), got, x.want)
		}
	}
	b.wants("a: alive incarnation=1")
	if s := b.status("a"); s.Bad != 3 || s.Received != 1 {
		t.Errorf("%+v", s.Stats)
	}
	if s := b.status("x"); s.Name != "" {
		t.Errorf("a stranger is known: %+v", s)
	}
	// A flood is limited however fast it comes.
	limited := 0
	for seq := uint64(2); limited == 0 && seq < 1e6; seq++ {
		if call(a, wire.OpBeat, (&Beat{Incarnation: 1, Seq: seq, Want: true}).Append(nil)) == wire.ErrJukebox {
			limited++
		}
	}
	if s := b.status("a"); limited != 1 || s.Limited != 1 {
		t.Errorf("%d of a flood limited: %+v", limited, s.Stats)
	}
}

// Who does not take events gets the present state instead of an endless queue.
func TestEventsDoNotPileUp(t *testing.T) {
	w := newTown(t, false)
	hold, reached := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var n *node
	n = w.start("b", []string{"a"}, Local{}, func(o *Options) {
		o.OnEvents = func(e []Event) {
			once.Do(func() { close(reached); <-hold })
			n.heard(e)
		}
	})
	l := n.h.links["a"]
	const last = 3 * maxQueue
	for i := uint64(1); i <= last; i++ {
		b := &Beat{Incarnation: 1, Seq: i, Want: true, Targets: served(i, "mdt")}
		if err := l.heard(b.Append(nil), Request); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			<-reached
		}
		n.h.mu.Lock()
		if len(n.h.queue) > maxQueue {
			t.Fatalf("%d events wait", len(n.h.queue))
		}
		n.h.mu.Unlock()
	}
	close(hold)
	n.wants(": reset")
	n.wants("a: alive incarnation=1")
	n.wants(fmt.Sprintf("a: target up mdt instance=%d", last))
}

// A peer that takes connections and says nothing holds up nobody: neither the other peers nor the end.
func TestMutePeer(t *testing.T) {
	w := newTown(t, false)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, c); _ = c.Close() }()
		}
	}()
	w.addrs["b"] = l.Addr().String()
	a := w.start("a", []string{"b", "c"}, Local{Peers: []string{"b", "c"}}, func(o *Options) {
		o.Lower, o.DialTimeout = 100*time.Millisecond, time.Hour
	})
	w.start("c", []string{"a"}, Local{Targets: served(1, "mdt")}, nil)
	a.wants("b: suspect")
	eventually(t, text("attempts are given up"), func() bool { return a.status("b").Dials >= 2 })
	eventually(t, text("the other peer is heard"), func() bool { return a.status("c").Received > 20 })
}
