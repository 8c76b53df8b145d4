package mgs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

func isCode(err error, want Code) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == want
}

func floatSpec(i int) VIPSpec {
	return VIPSpec{Addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(50 + i)}), Bits: 24}
}

// Whatever nodes, managers and administrators do in any order: one node at a time has
// an address, epochs and assignments never go back, and a period counts as crashed
// exactly if the one before did not end in order. (004.7, 004.24)
func TestFloatingInvariants(t *testing.T) {
	rounds := uint64(300)
	if testing.Short() {
		rounds = 30
	}
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(seed, 2))
		s, err := newState(&counter{})
		if err != nil {
			t.Fatal(err)
		}
		nodes := []string{"n1", "n2", "n3"}
		type model struct {
			owner   string // "": nobody
			crashed bool
			epoch   uint64
			nsm     uint32
			move    uint64
		}
		m := map[uint32]*model{}
		for i := range 200 {
			x, n := uint32(rng.IntN(2)+1), nodes[rng.IntN(3)]
			v, _ := s.find(x)
			if v == nil {
				v = &VIP{Index: x}
			}
			was := *v
			epoch, move := was.Epoch-uint64(rng.IntN(8)/7), was.MoveID-uint64(rng.IntN(8)/7)
			spec := floatSpec(int(x))
			what := ""
			switch k := rng.IntN(20); {
			case k == 0:
				spec.Drained = rng.IntN(2) == 0
				_, err = s.setVIP(spec)
				what = "set"
			case k == 1:
				_, err = s.removeVIP(x)
				what = "remove"
			case k < 4:
				_, err = s.addVIP(&counter{}, spec)
				what = "add"
			case k < 8:
				if rng.IntN(6) == 0 {
					n = ""
				}
				_, err = s.assign(x, epoch, n)
				what = "assign"
			case k < 10:
				_, err = s.setReady(x, move, n)
				what = "ready"
			case k < 15:
				v, e := s.take(x, move, n)
				what, err = "take", e
				if err == nil {
					o := m[x]
					if o.owner != "" || v.Crashed != o.crashed || v.Epoch != o.epoch+1 || (v.NSMState > o.nsm) != o.crashed || was.Next != n || was.Drained || was.Removed {
						t.Fatalf("seed %d step %d: taken %+v by %s after %+v, %+v", seed, i, v, n, was, o)
					}
					o.owner, o.crashed = n, true
				}
			case k < 17:
				err = s.stopped(x, epoch)
				what = "stopped"
				if o := m[x]; err == nil {
					o.owner, o.crashed = "", false
				}
			case k == 17:
				err = s.abandoned(x, epoch)
				what = "abandoned"
				if o := m[x]; err == nil {
					o.owner = ""
				}
			case k == 18:
				err = s.setDrained(n, rng.IntN(2) == 0)
				what = "drain"
			default:
				if v, e := s.serve(&counter{}, spec.Addr, n); e == nil {
					o := m[v.Index]
					if o == nil { // new
						o = &model{}
						m[v.Index] = o
					}
					if was.Index == v.Index && was.Bits != 0 || o.owner != "" && o.owner != n {
						t.Fatalf("seed %d step %d: served %+v after %+v", seed, i, v, was)
					}
					o.owner, o.crashed = n, true
				}
				what = "serve"
			}
			b, e := s.encode()
			if e != nil {
				t.Fatal(e)
			}
			if s, e = decode("the registry", b); e != nil {
				t.Fatalf("seed %d step %d, %s: %v\n%s", seed, i, what, e, b)
			}
			for j := range s.VIPs {
				v := &s.VIPs[j]
				o := m[v.Index]
				if o == nil {
					o = &model{}
					m[v.Index] = o
				}
				if v.Epoch < o.epoch || v.MoveID < o.move || v.NSMState < o.nsm {
					t.Fatalf("seed %d step %d, %s: %+v after %+v", seed, i, what, v, o)
				}
				if o.owner != "" && (v.Node != o.owner || v.Clean) {
					t.Fatalf("seed %d step %d, %s (%v): %s has lost %+v", seed, i, what, err, o.owner, v)
				}
				o.epoch, o.move, o.nsm = v.Epoch, v.MoveID, v.NSMState
			}
		}
	}
}

func TestFloatingLimits(t *testing.T) {
	one := func(change func(*state, *VIP)) *state {
		s := &state{NextIndex: 1, Client: strings.Repeat("00", 16)}
		if _, err := s.addVIP(&counter{}, floatSpec(0)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.assign(1, 1, "n1"); err != nil {
			t.Fatal(err)
		}
		change(s, &s.VIPs[0])
		return s
	}
	same := func(*state, *VIP) {}
	top := func(_ *state, v *VIP) { v.MoveID = maxCount }
	many := func(s *state, _ *VIP) {
		for i := range maxNodes {
			if err := s.setDrained(fmt.Sprintf("d%d", i), true); err != nil {
				t.Fatal(err)
			}
		}
	}
	wide := floatSpec(0)
	for i := range maxPrefer + 1 {
		wide.Prefer = append(wide.Prefer, fmt.Sprint("n", i))
	}
	drained := floatSpec(0)
	drained.Drained = true
	for _, x := range []struct {
		what string
		s    *state
		do   func(*state) error
		want Code
	}{
		{"moves by assignment", one(top), func(s *state) error { _, err := s.assign(1, 1, "n2"); return err }, CodeLimit},
		{"moves by removal", one(top), func(s *state) error { _, err := s.removeVIP(1); return err }, CodeLimit},
		{"moves by drain", one(top), func(s *state) error { _, err := s.setVIP(drained); return err }, CodeLimit},
		{"epoch", one(func(_ *state, v *VIP) { v.Epoch = maxCount }), func(s *state) error { _, err := s.take(1, 1, ""); return err }, CodeLimit},
		{"NSM state", one(func(_ *state, v *VIP) { v.NSMState, v.Clean = maxNSMState, false }), func(s *state) error { _, err := s.take(1, 1, ""); return err }, CodeLimit},
		{"preferred nodes", one(same), func(s *state) error { _, err := s.setVIP(wide); return err }, CodeInvalid},
		{"drained nodes", one(many), func(s *state) error { return s.setDrained("x", true) }, CodeLimit},
		{"indexes", one(func(s *state, _ *VIP) { s.NextIndex = 1<<32 - 1 }), func(s *state) error { _, err := s.addVIP(&counter{}, floatSpec(1)); return err }, CodeLimit},
		{"no randomness", one(same), func(s *state) error { _, err := s.addVIP(&failing{}, floatSpec(1)); return err }, ""},
	} {
		before := encoded(t, x.s)
		if err := x.do(x.s); err == nil || x.want != "" && !isCode(err, x.want) {
			t.Errorf("%s: %v", x.what, err)
		}
		if string(before) != string(encoded(t, x.s)) {
			t.Errorf("%s: something has changed", x.what)
		}
	}
}

// fullFloating is a registry of n addresses with the longest names.
func fullFloating(t *testing.T, n int) *state {
	t.Helper()
	s := &state{NextIndex: 1<<32 - 1 - maxVIPs, Client: strings.Repeat("00", 16)}
	long := func(i int) string { return fmt.Sprintf("%s%03d", strings.Repeat("n", 61), i) }
	for i := range n {
		v := VIP{Index: s.NextIndex, Epoch: maxCount, Verifier: "0123456789abcdef", NSMState: maxNSMState, Node: long(0), Bits: 128, Interface: strings.Repeat("i", maxInterface), Next: long(1), MoveID: maxCount, Ready: true}
		v.Addr = netip.AddrFrom16([16]byte{0xfd, 0x80, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, byte(i >> 8), byte(i)})
		for j := range maxPrefer {
			v.Prefer = append(v.Prefer, long(j))
		}
		s.VIPs = append(s.VIPs, v)
		s.NextIndex++
	}
	for i := range maxNodes {
		s.Drained = append(s.Drained, long(i))
	}
	return s
}

// They go by in pages that fit.
func TestFloatingPagesFit(t *testing.T) {
	s := fullFloating(t, 300)
	v, err := s.view()
	if err != nil {
		t.Fatal(err)
	}
	after, seen := uint32(0), 0
	for more := true; more; {
		p := pollResult{View: v}
		if p.VIPs, p.More, err = pageOf(v.VIPs, after); err != nil || len(p.VIPs) == 0 {
			t.Fatal(len(p.VIPs), err)
		}
		b, err := encodeReply(&p, nil)
		if err != nil || len(b) > wire.MaxData {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		r, err := s.page(after)
		if err != nil {
			t.Fatal(err)
		}
		if b, err = encodeReply(r, nil); err != nil || len(b) > wire.MaxData {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		seen += len(p.VIPs)
		after, more = p.VIPs[len(p.VIPs)-1].Index, p.More
	}
	if seen != 300 {
		t.Error(seen)
	}
	if p, more, err := pageOf(v.VIPs, 1<<32-1); len(p) != 0 || more || err != nil {
		t.Error(p, more, err)
	}
}

// bothRegistry is what nodes have.
type bothRegistry interface {
	Registry
	Floating
}

func floatingScript(t *testing.T, r bothRegistry) (out []string) {
	t.Helper()
	say := func(err error, what ...any) {
		if err != nil {
			what = append(what, err)
		}
		out = append(out, fmt.Sprintf("%+v", what))
	}
	vip := func(v VIP, err error) VIP { say(err, v); return v }
	a := floatSpec(0)
	a.Interface, a.Prefer = "eth0", []string{"n1", "n2"}
	v := vip(r.AddVIP(ctx, a))
	vip(r.AddVIP(ctx, floatSpec(0)))
	a.Prefer = []string{"n2", "n1"}
	was := a
	a.Was = &was // not what it is
	vip(r.SetVIP(ctx, a))
	was.Prefer = []string{"n1", "n2"}
	vip(r.SetVIP(ctx, a))
	vip(r.SetVIP(ctx, a)) // it is no more
	v = vip(r.Assign(ctx, v.Index, v.Epoch, "n1"))
	vip(r.SetReady(ctx, v.Index, v.MoveID))
	vip(r.SetReady(ctx, v.Index, v.MoveID+1))
	v = vip(r.Take(ctx, v.Index, v.MoveID))
	vip(r.Take(ctx, v.Index, v.MoveID))
	say(r.Abandoned(ctx, v.Index, v.Epoch))
	v = vip(r.Take(ctx, v.Index, v.MoveID))
	if !v.Crashed {
		t.Errorf("%+v", v)
	}
	vip(r.Serve(ctx, v.Addr, "n1"))
	say(r.SetDrained(ctx, "n2", true))
	vip(r.Assign(ctx, v.Index, v.Epoch, "n2"))
	w := vip(r.AddVIP(ctx, floatSpec(1)))
	vip(r.RemoveVIP(ctx, v.Index))
	vip(r.RemoveVIP(ctx, 77))
	view, err := r.Watch(ctx, "")
	say(err, view)
	say(r.Stopped(ctx, v.Index, v.Epoch))
	vip(r.RemoveVIP(ctx, w.Index))
	view, err = r.Watch(ctx, view.Rev)
	say(err, view)
	return out
}

// A change is refused if it was made from settings that are others by now: a drain
// that came between is not undone.
func TestSettingsChangedMeanwhile(t *testing.T) {
	r := NewStored(&memory{}, &counter{})
	v, err := r.AddVIP(ctx, floatSpec(0))
	if err != nil {
		t.Fatal(err)
	}
	was := v.Spec()
	drain, prefer := was, was
	drain.Drained, prefer.Prefer = true, []string{"n9"}
	drain.Was, prefer.Was = &was, &was
	if v, err = r.SetVIP(ctx, drain); err != nil || !v.Drained {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err = r.SetVIP(ctx, prefer); !isCode(err, CodeChanged) {
		t.Errorf("%v, want that the settings have changed", err)
	}
	was, prefer = v.Spec(), v.Spec()
	prefer.Prefer, prefer.Was = []string{"n9"}, &was
	if v, err = r.SetVIP(ctx, prefer); err != nil || !v.Drained || len(v.Prefer) != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

// A Remote says what the registry itself would.
func TestRemoteFloatingIsTheRegistry(t *testing.T) {
	file, err := Open(t.TempDir(), FileOptions{Rand: &counter{}})
	if err != nil {
		t.Fatal(err)
	}
	want := floatingScript(t, file)
	n := &network{at: map[string]*Service{"a": NewService(NewStored(&memory{}, &counter{}), nil)}}
	got := floatingScript(t, remote(t, n, "n1", nil, "a"))
	if d := cmp.Diff(want, got); d != "" {
		t.Error("(-file +remote)", d)
	}
	if len(n.dials) != 2 { // for calls and who wants the addresses at once, and for news
		t.Errorf("%d connections", len(n.dials))
	}
}

// An assignment is a node's own.
func TestRemoteFloatingIdentity(t *testing.T) {
	n := &network{at: map[string]*Service{"a": NewService(NewStored(&memory{}, &counter{}), nil)}}
	r1, r2 := remote(t, n, "n1", nil, "a"), remote(t, n, "n2", nil, "a")
	v, err := r1.AddVIP(ctx, floatSpec(0))
	if err != nil {
		t.Fatal(err)
	}
	if v, err = r1.Assign(ctx, v.Index, v.Epoch, "n2"); err != nil {
		t.Fatal(err)
	}
	if _, err := r1.SetReady(ctx, v.Index, v.MoveID); !isCode(err, CodeMoved) {
		t.Error(err)
	}
	if _, err := r1.Take(ctx, v.Index, v.MoveID); !isCode(err, CodeMoved) {
		t.Error(err)
	}
	if v, err = r2.Take(ctx, v.Index, v.MoveID); err != nil || v.Node != "n2" || v.Crashed {
		t.Error(v, err)
	}
}

// failingWaiter is a storage that says it knows of changes, and does not.
type failingWaiter struct {
	memory
	waits int
}

func (f *failingWaiter) Wait(context.Context, uint64) error {
	f.mu.Lock()
	f.waits++
	f.mu.Unlock()
	return errors.New("cannot watch")
}

// Watch returns with the change: at once if this process made it, or the storage tells
// of it, else after the next look; and after some time without.
func TestStoredWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := &memory{}, &failingWaiter{}
		file, err := Open(t.TempDir(), FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		one := NewStored(m, &counter{})
		flaky := NewStored(f, &counter{})
		for _, x := range []struct {
			what          string
			watch, change *Stored
			most          time.Duration
		}{
			{"its own change", one, one, 0},
			{"that of another process", one, NewStored(m, &counter{}), reread},
			{"a file", file.Stored, file.Stored, 0},
			{"own change, the storage fails to tell", flaky, flaky, 0},
			{"other's change, the storage fails to tell", flaky, NewStored(f, &counter{}), reread},
		} {
			v, err := x.watch.Watch(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			same, err := x.watch.Watch(ctx, v.Rev)
			if d := time.Since(began); err != nil || d != watchTime || !cmp.Equal(v, same, cmpopts.EquateComparable(netip.Addr{})) {
				t.Errorf("%s: without news after %v: %+v, %v", x.what, d, same, err)
			}
			var at time.Time
			var wg sync.WaitGroup
			wg.Go(func() {
				time.Sleep(1234 * time.Millisecond)
				// What a View does not contain is no news.
				if _, _, err := x.change.StartClient(ctx, "n1"); err != nil {
					t.Error(err)
				}
				time.Sleep(1000 * time.Millisecond)
				at = time.Now()
				if err := x.change.SetDrained(ctx, "n9", len(v.Drained) == 0); err != nil {
					t.Error(err)
				}
			})
			next, err := x.watch.Watch(ctx, v.Rev)
			late := time.Since(at)
			wg.Wait()
			if err != nil || next.Rev == v.Rev || len(next.Drained) == len(v.Drained) || late > x.most {
				t.Errorf("%s: %+v after %v, %v", x.what, next, late, err)
			}
		}
		if f.waits == 0 || f.waits > 100 {
			t.Errorf("%d waits", f.waits)
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		v, err := one.Watch(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := one.Watch(short, v.Rev); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		// Nobody's copy is another's.
		if _, err := one.AddVIP(ctx, VIPSpec{Addr: addrA, Bits: 24, Prefer: []string{"n1"}}); err != nil {
			t.Fatal(err)
		}
		a, err := one.Watch(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		a.VIPs[0].Prefer[0], a.VIPs[0].Node = "x", "x"
		if b, err := one.Watch(ctx, ""); err != nil || b.VIPs[0].Prefer[0] != "n1" || b.VIPs[0].Node != "" {
			t.Errorf("%+v, %v", b, err)
		}
	})
}

func pollRequest(a pollArgs) *wire.Request {
	b, err := json.Marshal(&a)
	if err != nil {
		panic(err)
	}
	return &wire.Request{Header: wire.Header{Op: wire.OpWatchVIPs, XID: 4}, Data: b}
}

// polled begins a poll; the channel gets its reply.
func polled(to wire.Target, a pollArgs) <-chan *wire.Reply {
	rep, ch := &wire.Reply{Data: []byte("old")}, make(chan *wire.Reply, 2)
	req := pollRequest(a)
	to.Handle(req, rep, func() { ch <- rep })
	clear(req.Data) // it is the connection's again
	return ch
}

func readPoll(t *testing.T, rep *wire.Reply) (res pollResult) {
	t.Helper()
	if rep.Status != wire.OK || rep.XID != 4 {
		t.Fatalf("%+v", rep)
	}
	if err := decodeAnswer(rep.Data, &res); err != nil {
		t.Fatal(err)
	}
	return res
}

// A poll holds up nobody: not the connection, not the end of the service.
func TestServicePolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := NewStored(&memory{}, &counter{})
		s := NewService(reg, nil)
		c := s.Accept(wire.Peer{Node: "n1"})
		a := pollArgs{Node: "n1"}
		a.Rev = readPoll(t, <-polled(c, a)).Rev
		first := polled(c, a)
		synctest.Wait()
		// The connection goes on, and brings the news itself.
		if rep := handle(t, c, request(methodSetDrained, call{Node: "n1", Session: sessionName("a"), Seq: 1, Args: json.RawMessage(`{"node":"n2","drained":true}`)})); rep.Status != wire.OK {
			t.Fatal(rep.Status)
		}
		res := readPoll(t, <-first)
		if !slices.Equal(res.Drained, []string{"n2"}) || res.Rev == a.Rev {
			t.Errorf("%+v", res)
		}
		// One poll of a connection at a time; other connections have theirs.
		a.Rev = res.Rev
		first, other := polled(c, a), polled(s.Accept(wire.Peer{Node: "n2"}), pollArgs{Node: "n2", Rev: a.Rev})
		second := polled(c, a)
		if rep := <-first; rep.Status != wire.ErrTargetDown {
			t.Errorf("%+v", rep)
		}
		began := time.Now()
		if res := readPoll(t, <-second); res.Rev != a.Rev || time.Since(began) != watchTime {
			t.Errorf("%+v after %v", res, time.Since(began))
		}
		readPoll(t, <-other)
		// A connection that ends takes its poll with it.
		last := polled(c, a)
		if err := c.(*connection).Close(); err != nil {
			t.Error(err)
		}
		if rep := <-last; rep.Status != wire.ErrTargetDown {
			t.Errorf("%+v", rep)
		}
		if rep := <-polled(c, a); rep.Status != wire.ErrTargetDown {
			t.Errorf("%+v", rep)
		}
		// So does the service, in this process, too.
		remaining := []<-chan *wire.Reply{polled(s, a), polled(s.Accept(wire.Peer{Local: true}), a), polled(s, a)}
		s.Close()
		remaining = append(remaining, polled(s, a))
		for _, ch := range remaining {
			if rep := <-ch; rep.Status != wire.ErrTargetDown || len(rep.Data) != 0 {
				t.Errorf("%+v", rep)
			}
		}
	})
}

func TestServiceRefusesBadPolls(t *testing.T) {
	s := NewService(NewStored(&memory{}, &counter{}), nil)
	defer s.Close()
	for _, data := range []string{``, `{`, `[]`, `null`, `{"rev":""}`, `{"node":"a b","rev":""}`, `{"node":"n1","rev":"` + strings.Repeat("r", maxRev+1) + `"}`, `{"node":"n1","rev":"","after":-1}`, `{"node":"n1","rev":"","more":1}`, `{"node":"n2","rev":""}`} {
		rep, done := &wire.Reply{}, 0
		s.Accept(wire.Peer{Node: "n1"}).Handle(&wire.Request{Header: wire.Header{Op: wire.OpWatchVIPs}, Data: []byte(data)}, rep, func() { done++ })
		if done != 1 || rep.Status != wire.ErrProto {
			t.Errorf("%s: %v, %d", data, rep.Status, done)
		}
	}
	// A storage that fails is said, one in other hands left.
	m := &failingLoad{err: errors.New("disk gone")}
	rep := <-polled(NewService(NewStored(m, nil), nil), pollArgs{Node: "n1"})
	if err := decodeAnswer(rep.Data, &pollResult{}); rep.Status != wire.OK || !isCode(err, CodeStorage) {
		t.Errorf("%v, %v", rep.Status, err)
	}
	m.err = ErrFenced
	if rep := <-polled(NewService(NewStored(m, nil), nil), pollArgs{Node: "n1"}); rep.Status != wire.ErrTargetDown {
		t.Error(rep.Status)
	}
}

type failingLoad struct {
	memory
	err error
}

func (f *failingLoad) Load(context.Context) ([]byte, uint64, error) { return nil, 0, f.err }

// Watchers see every address go its way, whatever becomes of messages and of the
// registry's node, and in the end what is so.
func TestRemoteWatch(t *testing.T) {
	rounds := uint64(20)
	if testing.Short() {
		rounds = 4
	}
	for seed := range rounds {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			m := &memory{}
			n := &network{at: map[string]*Service{}}
			at := 0
			move := func() {
				for _, s := range n.at {
					s.end() // Close would wait for polls that wait for the network
				}
				clear(n.at)
				at++
				n.at[string(rune('a'+at%2))] = NewService(NewStored(m, rand.NewChaCha8([32]byte{byte(seed)})), nil)
			}
			move()
			var quiet bool
			n.fate = func() fate {
				if quiet {
					return arrives
				}
				if rng.IntN(15) == 0 {
					move()
				}
				return fate(rng.IntN(int(fates)))
			}
			watching, end := context.WithCancel(ctx)
			last := map[string]View{}
			var mu sync.Mutex
			var wg sync.WaitGroup
			for _, node := range []string{"n1", "n2"} {
				r := remote(t, n, node, nil, "a", "b")
				wg.Go(func() {
					var v View
					for watching.Err() == nil {
						w, err := r.Watch(watching, v.Rev)
						if err != nil {
							if watching.Err() == nil {
								t.Error(err)
							}
							return
						}
						for i := range v.VIPs {
							if w.VIPs[i].Epoch < v.VIPs[i].Epoch || w.VIPs[i].MoveID < v.VIPs[i].MoveID {
								t.Errorf("seed %d: %+v after %+v", seed, w.VIPs[i], v.VIPs[i])
							}
						}
						v = w
						mu.Lock()
						last[node] = v
						mu.Unlock()
					}
				})
			}
			r := remote(t, n, "n3", nil, "a", "b")
			for i := range 20 {
				v, err := r.AddVIP(ctx, floatSpec(i%3))
				if err == nil {
					if v, err = r.Assign(ctx, v.Index, v.Epoch, "n3"); err == nil && v.Free() {
						_, err = r.Take(ctx, v.Index, v.MoveID)
					} else if err == nil {
						err = r.Stopped(ctx, v.Index, v.Epoch)
					}
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			n.mu.Lock()
			quiet = true
			n.mu.Unlock()
			n.late.Wait()
			want, err := NewStored(m, nil).Watch(ctx, "")
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute) // for whoever waits for an answer that was lost
			mu.Lock()
			for _, node := range []string{"n1", "n2"} {
				if d := cmp.Diff(want, last[node], cmpopts.EquateComparable(netip.Addr{})); d != "" {
					t.Errorf("seed %d: %s has %s", seed, node, d)
				}
			}
			mu.Unlock()
			end()
			wg.Wait()
			n.late.Wait()
			for _, s := range n.at {
				s.Close()
			}
		})
	}
}

// Pages of a view belong together although it changes between them.
// One watcher that waits holds up neither a look nor a watcher that has missed something,
// and news reach all at once.
func TestRemoteWatchersTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := NewStored(&memory{}, rand.NewChaCha8([32]byte{}))
		s := NewService(reg, nil)
		defer s.Close()
		r := remote(t, &network{at: map[string]*Service{"a": s}}, "n1", nil, "a")
		began := time.Now()
		look := func(rev string) View {
			t.Helper()
			v, err := r.Watch(ctx, rev)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		first := look("")
		if err := reg.SetDrained(ctx, "n2", true); err != nil {
			t.Fatal(err)
		}
		now := look(first.Rev)
		views := make([]View, 3)
		var wg sync.WaitGroup
		for i := range views {
			wg.Go(func() { views[i] = look(now.Rev) })
		}
		synctest.Wait()
		for _, rev := range []string{"", first.Rev} {
			if v := look(rev); v.Rev != now.Rev || !slices.Equal(v.Drained, []string{"n2"}) {
				t.Errorf("from %q: %+v, want revision %s", rev, v, now.Rev)
			}
		}
		if err := reg.SetDrained(ctx, "n3", true); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		for _, v := range views {
			if !slices.Equal(v.Drained, []string{"n2", "n3"}) {
				t.Errorf("%+v", v)
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}

func TestRemoteWatchPages(t *testing.T) {
	m := &memory{}
	reg := NewStored(m, rand.NewChaCha8([32]byte{}))
	var err error
	if m.doc, err = fullFloating(t, 300).encode(); err != nil {
		t.Fatal(err)
	}
	s := NewService(reg, nil)
	defer s.Close()
	n := &network{at: map[string]*Service{"a": s}}
	calls, changes := 0, 0
	n.fate = func() fate {
		if calls++; calls%5 == 0 && changes < 3 {
			changes++
			if _, err := reg.NewVerifiers(ctx, fmt.Sprintf("%s000", strings.Repeat("n", 61)), 1<<32-1-maxVIPs); err != nil {
				t.Error(err)
			}
		}
		return arrives
	}
	got, err := remote(t, n, "n1", nil, "a").Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	want, err := reg.Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" || changes != 3 || len(got.VIPs) != 300 {
		t.Errorf("%d changes; %s", changes, d)
	}
}

// A registry that breaks the protocol is not believed.
func TestRemoteWatchBadServer(t *testing.T) {
	const vip = `{"index":1,"addr":"192.0.2.1","epoch":1,"verifier":"1112131415161718","nsm_state":1,"bits":24}`
	for data, want := range map[string]string{
		``: "answer", `{}`: "neither", `{"result":{"rev":"","vips":null,"drained":null}}`: "is none",
		`{"result":{"rev":"1","vips":[` + vip + `,` + vip + `],"drained":null}}`:                              "is none",
		`{"result":{"rev":"1","vips":[{"index":1}],"drained":null}}`:                                          "is none",
		`{"result":{"rev":"1","vips":[` + strings.Replace(vip, "24", "99", 1) + `],"drained":null}}`:          "is none",
		`{"result":{"rev":"1","vips":[],"drained":["b","a"]}}`:                                                "is none",
		`{"result":{"rev":"1","vips":[],"drained":["a b"]}}`:                                                  "is none",
		`{"result":{"rev":"1","vips":[],"drained":null,"more":true}}`:                                         "is none",
		`{"result":{"rev":"1","vips":[` + vip + `],"drained":null,"more":true}}`:                              "is none",
		`{"error":{"code":"storage","text":"disk"}}`:                                                          "disk",
		`{"result":{"rev":"` + strings.Repeat("1", maxRev+1) + `","vips":[` + vip + `],"drained":null}}`:      "is none",
		`{"result":{"rev":"1","vips":[` + vip + `],"drained":null,"other":` + strings.Repeat("1", 20) + `1}}`: "other",
	} {
		r, err := NewRemote(RemoteOptions{Node: "n1", Addrs: []string{"a"}, Dial: func(context.Context, string) (wire.Conn, error) {
			return wire.InProc(fixed{wire.OK, data}), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if v, err := r.Watch(ctx, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", data, v, err)
		}
	}
	n := &network{}
	if _, err := remote(t, n, "n1", nil, "a").Watch(ctx, strings.Repeat("r", maxRev+1)); !isCode(err, CodeInvalid) {
		t.Error(err)
	}
}

// Who reads the addresses does not wait for who waits for news of them, nor disturbs it.
func TestRemoteReadsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := NewStored(&memory{}, &counter{})
		s := NewService(reg, nil)
		r := remote(t, &network{at: map[string]*Service{"a": s}}, "n1", nil, "a")
		v, err := r.Watch(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		news := make(chan View)
		go func() {
			w, err := r.Watch(ctx, v.Rev)
			if err != nil {
				t.Error(err)
			}
			news <- w
		}()
		synctest.Wait()
		began := time.Now()
		for range 2 {
			if w, err := r.Watch(ctx, ""); err != nil || w.Rev != v.Rev {
				t.Errorf("%+v, %v", w, err)
			}
		}
		if _, err := reg.AddVIP(ctx, floatSpec(1)); err != nil {
			t.Fatal(err)
		}
		if w := <-news; len(w.VIPs) != 1 {
			t.Errorf("%+v", w)
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

// Close ends a Watch that waits.
func TestRemoteWatchCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewService(NewStored(&memory{}, &counter{}), nil)
		n := &network{at: map[string]*Service{"a": s}}
		r := remote(t, n, "n1", nil, "a")
		v, err := r.Watch(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		n.fate = func() fate { return neverSent }
		end := make(chan error)
		go func() { _, err := r.Watch(ctx, v.Rev); end <- err }()
		synctest.Wait()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := r.Watch(short, v.Rev); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err) // one at a time
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := <-end; !errors.Is(err, errClosed) || n.open != 0 {
			t.Errorf("%v, %d open", err, n.open)
		}
		s.Close()
	})
}
