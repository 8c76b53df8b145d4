package mgs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/baton-nfs/baton/recovery/wire"
)

var addrA, addrB = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")

// network connects Remotes to Services as fate has it. In a bubble of synctest
// its delays cost no time.
type network struct {
	mu sync.Mutex
	at map[string]*Service // by address
	// fate decides about a call; nil: nothing happens to it.
	fate  func() fate
	dials []string
	open  int // connections
	late  sync.WaitGroup
}

// fate is what becomes of a call.
type fate uint8

const (
	arrives    fate = iota
	neverSent       // the connection is lost before
	lostBefore      // the request is lost
	lostAfter       // the answer is lost
	copied          // and a copy of the request arrives some time later
	overtaken       // the request is lost with its connection, and arrives later
	silence         // no answer comes
	fates
)

type netConn struct {
	n      *network
	s      *Service
	from   string
	mu     sync.Mutex
	closed bool
}

func (n *network) dialer(from string) func(context.Context, string) (wire.Conn, error) {
	return func(_ context.Context, addr string) (wire.Conn, error) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.dials = append(n.dials, addr)
		s := n.at[addr]
		if s == nil {
			return nil, errors.New("connection refused")
		}
		n.open++
		return &netConn{n: n, s: s, from: from}, nil
	}
}

func (c *netConn) Handle(*wire.Request, *wire.Reply, func()) { panic("not used") }
func (c *netConn) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (c *netConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.n.mu.Lock()
		c.n.open--
		c.n.mu.Unlock()
	}
	return nil
}

// clone keeps a request for later.
func clone(req *wire.Request) *wire.Request {
	r := *req
	r.Name, r.Data = bytes.Clone(req.Name), bytes.Clone(req.Data)
	return &r
}

func (c *netConn) Call(ctx context.Context, req *wire.Request, rep *wire.Reply) error {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return &wire.LostError{Err: errors.New("connection closed")}
	}
	f := arrives
	c.n.mu.Lock()
	if c.n.fate != nil {
		f = c.n.fate()
	}
	c.n.mu.Unlock()
	to := c.s.Accept(wire.Peer{Node: c.from})
	later := func() {
		r := clone(req)
		c.n.late.Go(func() {
			time.Sleep(3 * time.Second)
			to.Handle(r, &wire.Reply{}, func() {})
		})
	}
	lost := &wire.LostError{Sent: true, Err: errors.New("connection reset")}
	switch f {
	case neverSent:
		return &wire.LostError{Err: errors.New("connection reset")}
	case lostBefore:
		return lost
	case overtaken:
		later()
		return lost
	case silence:
		<-ctx.Done()
		return &wire.LostError{Sent: true, Err: ctx.Err()}
	case copied:
		later()
	}
	if err := ctx.Err(); err != nil {
		return &wire.LostError{Err: err}
	}
	done := make(chan struct{})
	to.Handle(clone(req), rep, func() { close(done) })
	<-done // a poll is answered later
	if f == lostAfter {
		rep.Reset()
		return lost
	}
	return nil
}

func remote(t *testing.T, n *network, node string, change func(*RemoteOptions), addrs ...string) *Remote {
	t.Helper()
	o := RemoteOptions{Node: node, Addrs: addrs, Dial: n.dialer(node)}
	if change != nil {
		change(&o)
	}
	r, err := NewRemote(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// script does everything that a registry can do and returns what it said.
func script(t *testing.T, r Registry, node string) []string {
	t.Helper()
	var out []string
	say := func(err error, what ...any) {
		if err != nil {
			what = append(what, err)
		}
		out = append(out, fmt.Sprintf("%+v", what))
	}
	id, gen, err := r.StartClient(ctx, node)
	say(err, id, gen)
	id2, gen, err := r.StartClient(ctx, node)
	say(err, id2 == id, gen)
	v, err := r.Serve(ctx, addrA, node)
	say(err, v)
	w, err := r.Serve(ctx, addrB, node)
	say(err, w)
	say(r.Stopped(ctx, w.Index, w.Epoch))
	w, err = r.Serve(ctx, addrB, node)
	say(err, w)
	v, err = r.RaiseNSM(ctx, v.Index, v.Epoch, 40)
	say(err, v)
	v, err = r.Serve(ctx, addrA, node)
	say(err, v)
	l, err := r.NewVerifiers(ctx, node, v.Index)
	say(err, l)
	l, err = r.NewVerifiers(ctx, node)
	say(err, l)
	say(r.Stopped(ctx, v.Index, v.Epoch+1))
	say(r.Abandoned(ctx, v.Index, v.Epoch))
	say(r.Abandoned(ctx, 77, 1))
	v, err = r.Serve(ctx, netip.MustParseAddr("224.0.0.1"), node)
	say(err, v)
	n, err := r.OSTs(ctx)
	say(err, n)
	say(r.SetOSTs(ctx, 5))
	say(r.SetOSTs(ctx, 3))
	n, err = r.OSTs(ctx)
	say(err, n)
	for range 2 {
		made, err := r.Made(ctx, "OST0003")
		say(err, made)
		say(r.SetMade(ctx, "OST0003"))
	}
	say(r.SetMade(ctx, "OST 3"))
	for _, value := range []string{"one", "two"} {
		value, err = r.Agree(ctx, "key", value)
		say(err, value)
	}
	name, err := r.Identity(ctx)
	say(err, name)
	all, err := r.Clients(ctx)
	say(err, all)
	l, err = r.VIPs(ctx)
	say(err, l)
	return out
}

// A Remote says what the registry itself would.
func TestRemoteIsTheRegistry(t *testing.T) {
	file, err := Open(t.TempDir(), FileOptions{Rand: &counter{}})
	if err != nil {
		t.Fatal(err)
	}
	want := script(t, file, "n1")
	n := &network{at: map[string]*Service{"a": NewService(NewStored(&memory{}, &counter{}), nil)}}
	got := script(t, remote(t, n, "n1", nil, "a"), "n1")
	if d := cmp.Diff(want, got); d != "" {
		t.Error("(-file +remote)", d)
	}
	if len(n.dials) != 1 {
		t.Errorf("%d connections", len(n.dials))
	}
}

func TestRemoteSpeaksForItsNode(t *testing.T) {
	n := &network{}
	r := remote(t, n, "n1", nil, "a")
	_, _, err := r.StartClient(ctx, "n2")
	_, err2 := r.Serve(ctx, addrA, "")
	_, err3 := r.NewVerifiers(ctx, "n2")
	for _, err := range []error{err, err2, err3} {
		var e *Error
		if !errors.As(err, &e) || e.Code != CodeInvalid {
			t.Error(err)
		}
	}
	if len(n.dials) != 0 {
		t.Error(n.dials)
	}
	for _, o := range []RemoteOptions{{Node: "n1", Addrs: []string{"a"}}, {Node: "n1", Dial: n.dialer("")}, {Node: "", Addrs: []string{"a"}, Dial: n.dialer("")}} {
		if _, err := NewRemote(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

// Every call takes effect exactly once, whatever becomes of messages, connections
// and the registry's node. (CS 80, CS 121, CS 157a, SM 141)
func TestRemoteExactlyOnce(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	for seed := range uint64(rounds) {
		synctest.Test(t, func(t *testing.T) { exactlyOnce(t, seed) })
	}
}

func exactlyOnce(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	m := &memory{}
	n := &network{at: map[string]*Service{}}
	move := func() { // the registry is taken over, or restarted; sometimes it is nowhere
		for _, s := range n.at {
			s.Close()
		}
		clear(n.at)
		if x := rng.IntN(4); x < 3 {
			n.at[string(rune('a'+x))] = NewService(NewStored(m, rand.NewChaCha8([32]byte{byte(seed)})), nil)
		}
	}
	move()
	n.fate = func() fate {
		if rng.IntN(10) == 0 {
			move()
		}
		if rng.IntN(2) == 0 {
			return arrives
		}
		return fate(rng.IntN(int(fates)))
	}
	restless := make(chan struct{})
	n.late.Go(func() { // it comes back even if nobody calls
		for {
			select {
			case <-restless:
				return
			case <-time.After(2 * time.Second):
				n.mu.Lock()
				if len(n.at) == 0 {
					move()
				}
				n.mu.Unlock()
			}
		}
	})
	type seen struct {
		gens, epochs []uint64
		verifiers    []string
	}
	results := map[string]*seen{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range 3 {
		node := fmt.Sprintf("n%d", i+1)
		addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		r := remote(t, n, node, nil, "a", "b", "c")
		s := &seen{}
		results[node] = s
		for range 2 { // callers at the same time
			wg.Go(func() {
				for range 15 {
					_, g, err := r.StartClient(ctx, node)
					v, err2 := r.Serve(ctx, addr, node)
					l, err3 := r.NewVerifiers(ctx, node, v.Index)
					if err := errors.Join(err, err2, err3); err != nil {
						t.Errorf("seed %d: %v", seed, err)
						return
					}
					mu.Lock()
					s.gens, s.epochs = append(s.gens, g), append(s.epochs, v.Epoch)
					s.verifiers = append(s.verifiers, l[0].Verifier)
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	close(restless)
	n.late.Wait() // copies still on their way
	for node, s := range results {
		slices.Sort(s.gens)
		slices.Sort(s.epochs)
		for i := range s.gens {
			if s.gens[i] != uint64(i+1) || s.epochs[i] != uint64(i+1) {
				t.Errorf("seed %d: %s: generations %d, epochs %d", seed, node, s.gens, s.epochs)
				break
			}
		}
	}
	s, err := decode("the end", []byte(m.content()))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.VIPs) != 3 || len(s.Clients) != 3 {
		t.Errorf("seed %d: %s", seed, show(s))
	}
	for _, v := range s.VIPs {
		x := results[v.Node]
		if v.Epoch != 30 || s.Clients[v.Node].Generation != 30 || !slices.Contains(x.verifiers, v.Verifier) {
			t.Errorf("seed %d: in the end %s", seed, show(s))
		}
	}
}

// A node that was started before the registry waits for it, says so now and then,
// and goes on. (CS 27a)
func TestRemoteWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		n := &network{at: map[string]*Service{}}
		r := remote(t, n, "n1", func(o *RemoteOptions) {
			o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			}}))
		}, "a", "b")
		go func() {
			time.Sleep(95 * time.Second)
			n.mu.Lock()
			n.at["b"] = NewService(NewStored(&memory{}, &counter{}), nil)
			n.mu.Unlock()
		}()
		began := time.Now()
		if _, g, err := r.StartClient(ctx, "n1"); g != 1 || err != nil {
			t.Error(g, err)
		}
		if d := time.Since(began); d < 95*time.Second || d > 101*time.Second {
			t.Errorf("it took %v", d)
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 5 {
			t.Fatalf("%q", lines)
		}
		for i, want := range []string{"0s", "3", "1m", "1m3"} {
			if !strings.HasPrefix(lines[i], `level=WARN msg="waiting for the MGS" at="[a b]" for=`+want) || !strings.Contains(lines[i], "connection refused") {
				t.Error(lines[i])
			}
		}
		if lines[4] != `level=INFO msg="the MGS answers" at=b` {
			t.Error(lines[4])
		}
		// Both were tried in turn, with pauses that grow.
		if len(n.dials) < 20 || len(n.dials) > 100 || n.dials[0] != "a" || n.dials[1] != "b" || n.dials[2] != "a" {
			t.Errorf("%d: %q", len(n.dials), n.dials)
		}
	})
}

// A registry that has gone silent is left for the next address.
func TestRemoteLeavesASilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		n := &network{at: map[string]*Service{"a": NewService(NewStored(m, &counter{}), nil), "b": NewService(NewStored(m, &counter{n: 100}), nil)}}
		r := remote(t, n, "n1", nil, "a", "b")
		silent := false
		n.fate = func() fate {
			if silent {
				silent = false
				return silence
			}
			return arrives
		}
		if _, err := r.OSTs(ctx); err != nil {
			t.Fatal(err)
		}
		silent = true
		began := time.Now()
		if err := r.SetOSTs(ctx, 2); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("it took %v", d)
		}
		if !slices.Equal(n.dials, []string{"a", "b"}) || n.open != 1 {
			t.Errorf("%q, %d open", n.dials, n.open)
		}
	})
}

// A node that takes connections and does not say anything keeps nobody from the registry
// for long, and not at all who has known where that is.
func TestRemoteBesideAHangingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{at: map[string]*Service{"b": NewService(NewStored(&memory{}, &counter{}), nil)}}
		dial := n.dialer("n1")
		r := remote(t, n, "n1", func(o *RemoteOptions) {
			o.Dial = func(ctx context.Context, addr string) (wire.Conn, error) {
				if addr == "a" {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return dial(ctx, addr)
			}
		}, "a", "b")
		call := func(what string, want time.Duration, do func() error) {
			t.Helper()
			began := time.Now()
			if err := do(); err != nil || time.Since(began) != want {
				t.Errorf("%s: %v after %v, want it after %v", what, err, time.Since(began), want)
			}
		}
		osts := func() error {
			_, err := r.OSTs(ctx)
			return err
		}
		var rev string
		watch := func() error {
			v, err := r.Watch(ctx, rev)
			rev = v.Rev
			return err
		}
		call("the first call", firstDial, osts)
		call("a look", 0, watch)
		call("the first poll, where calls are answered", watchTime, watch)
		for range 3 {
			lose := true
			n.mu.Lock()
			n.fate = func() fate {
				if lose {
					lose = false
					return neverSent
				}
				return arrives
			}
			n.mu.Unlock()
			call("after the loss of a connection", 0, osts)
		}
	})
}

func TestRemoteEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &memory{}
		n := &network{}
		r := remote(t, n, "n1", nil, "a")
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		first := make(chan error)
		go func() {
			_, _, err := r.StartClient(short, "n1")
			first <- err
		}()
		synctest.Wait()
		// The second change waits for the first; reading does not.
		shorter, cancel2 := context.WithTimeout(ctx, time.Second)
		defer cancel2()
		if err := r.SetOSTs(shorter, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if _, err := r.OSTs(shorter); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if err := <-first; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") {
			t.Error(err)
		}
		// A caller that gives up while the answer is on its way leaves the
		// connection to the others. Its call arrives late, and does nothing then.
		n.at = map[string]*Service{"a": NewService(NewStored(m, &counter{}), nil)}
		if _, err := r.OSTs(ctx); err != nil {
			t.Fatal(err)
		}
		n.fate = func() fate { return silence }
		short, cancel = context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := r.SetOSTs(short, 9); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		n.fate = nil
		if n.open != 1 {
			t.Error("the connection was given up")
		}
		if _, g, err := r.StartClient(ctx, "n1"); g != 1 || err != nil {
			t.Error(g, err)
		}
		if x, err := r.OSTs(ctx); x != 0 || err != nil {
			t.Error(x, err)
		}
	})
}

// Close ends calls that wait, and nothing connects afterwards. (SA 280)
func TestRemoteClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{at: map[string]*Service{"a": NewService(NewStored(&memory{}, &counter{}), nil)}}
		r := remote(t, n, "n1", nil, "a", "b")
		if _, err := r.OSTs(ctx); err != nil {
			t.Fatal(err)
		}
		n.fate = func() fate { return neverSent }
		end := make(chan error)
		go func() { end <- r.SetOSTs(ctx, 1) }()
		synctest.Wait()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := <-end; !errors.Is(err, errClosed) {
			t.Error(err)
		}
		if _, err := r.VIPs(ctx); !errors.Is(err, errClosed) {
			t.Error(err)
		}
		if n.open != 0 {
			t.Errorf("%d connections stay open", n.open)
		}
	})
}

// Close while a connection is being made: it is closed when it is there.
func TestRemoteCloseWhileDialing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{at: map[string]*Service{"a": NewService(NewStored(&memory{}, &counter{}), nil)}}
		hold := make(chan struct{})
		r := remote(t, n, "n1", func(o *RemoteOptions) {
			dial := o.Dial
			o.Dial = func(ctx context.Context, addr string) (wire.Conn, error) { <-hold; return dial(ctx, addr) }
		}, "a")
		end := make(chan error)
		go func() { end <- r.SetOSTs(ctx, 1) }()
		synctest.Wait()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		close(hold)
		if err := <-end; !errors.Is(err, errClosed) || n.open != 0 {
			t.Errorf("%v, %d open", err, n.open)
		}
	})
}

// A service that breaks the protocol is not asked again.
func TestRemoteGivesUpOnABadServer(t *testing.T) {
	for _, x := range []struct {
		st   wire.Status
		data string
		want string
	}{
		{wire.ErrProto, "", "PROTO"},
		{wire.ErrServerFault, "", "SERVERFAULT"},
		{wire.OK, "", "answer"},
		{wire.OK, "{}", "neither"},
		{wire.OK, `{"result":{"osts":-1}}`, "the answer is none"},
		{wire.OK, `{"result":{"more":1}}`, "more"},
		{wire.OK, `{"error":{"code":"limit","text":"enough"}}`, "enough"},
	} {
		r, err := NewRemote(RemoteOptions{Node: "n1", Addrs: []string{"a"}, Dial: func(context.Context, string) (wire.Conn, error) {
			return wire.InProc(fixed{x.st, x.data}), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.OSTs(ctx); err == nil || !strings.Contains(err.Error(), x.want) || !strings.HasPrefix(err.Error(), "mgs: ") {
			t.Errorf("%v %q: %v", x.st, x.data, err)
		}
	}
}

// fixed always gives the same answer.
type fixed struct {
	st   wire.Status
	data string
}

func (f fixed) TryHandle(*wire.Request, *wire.Reply) bool { return false }

func (f fixed) Handle(_ *wire.Request, rep *wire.Reply, done func()) {
	rep.Status, rep.Data = f.st, append(rep.Data[:0], f.data...)
	done()
}

// Many VIPs come in pages, which belong together.
func TestRemotePages(t *testing.T) {
	m := &memory{}
	reg := NewStored(m, rand.NewChaCha8([32]byte{}))
	s := &state{NextIndex: 1, Client: strings.Repeat("00", 16)}
	for i := range maxVIPs {
		if _, err := s.serve(reg.rand, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}).Next(), fmt.Sprintf("n%d", i%2+1)); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if m.doc, err = s.encode(); err != nil {
		t.Fatal(err)
	}
	n := &network{at: map[string]*Service{"a": NewService(reg, nil)}}
	calls, changes := 0, 0
	n.fate = func() fate {
		// A change between two pages, three times.
		if calls++; calls%2 == 0 && changes < 3 {
			changes++
			if _, err := reg.NewVerifiers(ctx, "n2", 2); err != nil {
				t.Error(err)
			}
		}
		return arrives
	}
	r := remote(t, n, "n1", nil, "a")
	got, err := r.VIPs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(vips(t, reg), got, cmpopts.EquateComparable(netip.Addr{})); d != "" || changes != 3 {
		t.Errorf("%d changes; %s", changes, d)
	}
	if len(got) != maxVIPs {
		t.Error(len(got))
	}
	l, err := r.NewVerifiers(ctx, "n1")
	if err != nil || len(l) != maxVIPs/2 || l[0].Verifier == got[0].Verifier || l[0].Node != "n1" {
		t.Errorf("%d new verifiers, %v", len(l), err)
	}
}

// FuzzAnswer gives a Remote what its server may answer: an error or a result that
// makes sense, and an end.
func FuzzAnswer(f *testing.F) {
	const vip = `{"index":1,"addr":"192.0.2.1","epoch":1,"verifier":"1112131415161718","nsm_state":1,"node":"n1"}`
	for _, s := range []string{
		`{"result":{"id":"1112131415161718191a1b1c1d1e1f20","generation":1}}`, `{"result":{"vip":` + vip + `,"crashed":true}}`,
		`{"result":{"vips":[` + vip + `],"tag":3}}`, `{"result":{"vips":[` + vip + `],"tag":3,"more":true}}`, `{"result":{"vips":[],"more":true}}`,
		`{"result":{}}`, `{"result":null}`, `{"error":{"code":"served","node":"n2","text":"x"}}`, `{"result":{"osts":3}}`, `{"result":{"rev":"1","vips":[` + vip + `],"drained":["n1"]}}`, `{"result":{"rev":"1","vips":[` + vip + `],"more":true}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := NewRemote(RemoteOptions{Node: "n1", Addrs: []string{"a"}, Dial: func(context.Context, string) (wire.Conn, error) {
			return wire.InProc(fixed{wire.OK, string(data)}), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if _, g, err := r.StartClient(ctx, "n1"); err == nil && g == 0 {
			t.Error("generation 0")
		}
		if v, err := r.Serve(ctx, addrA, "n1"); err == nil && (v.Index == 0 || v.Epoch == 0 || !v.Addr.IsValid() || v.VerifierBytes() == [8]byte{} && v.Verifier != "0000000000000000") {
			t.Errorf("%+v", v)
		}
		if l, err := r.VIPs(ctx); err == nil && len(l) > maxVIPs {
			t.Error(len(l))
		}
		if n, err := r.OSTs(ctx); err == nil && (n < 0 || n > maxOSTs) {
			t.Error(n)
		}
		_, _ = r.NewVerifiers(ctx, "n1")
		_ = r.Stopped(ctx, 1, 1)
		if v, err := r.Watch(ctx, ""); err == nil && (v.Rev == "" || len(v.VIPs) > maxVIPs || len(v.Drained) > maxNodes) {
			t.Errorf("%+v", v)
		}
	})
}
