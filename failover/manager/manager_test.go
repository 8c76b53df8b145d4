package manager

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// bed is a cluster of nodes whose beats and answers are the test's, with a real registry.
type bed struct {
	t   *testing.T
	reg *mgs.File
	ctx context.Context

	mu     sync.Mutex
	down   map[string]time.Time
	leads  bool
	term   uint64
	change chan struct{}
	calls  []string
	events []Event
	away   bool
}

func (b *bed) Leads() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leads
}

func (b *bed) Term() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.term
}

func (b *bed) Changed() <-chan struct{} { return b.change }

func (b *bed) lead(on bool) {
	b.mu.Lock()
	b.leads = on
	if on {
		b.term++
	}
	b.mu.Unlock()
	select {
	case b.change <- struct{}{}:
	default:
	}
}

func (b *bed) isDown(node string) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, ok := b.down[node]
	return at, ok
}

func (b *bed) kill(node string) {
	b.mu.Lock()
	b.down[node] = time.Now()
	b.mu.Unlock()
}

func (b *bed) health() (l []NodeHealth) {
	for _, n := range []string{"b", "c"} {
		h := NodeHealth{Node: n, State: Alive, Incarnation: 1}
		if at, ok := b.isDown(n); ok {
			if h.Silence = time.Since(at); h.Silence > 4*beat {
				h.State = Suspect
			}
		}
		l = append(l, h)
	}
	return l
}

func (b *bed) ask(ctx context.Context, node string, q *Question) (*Report, error) {
	if _, ok := b.isDown(node); ok {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	r := &Report{Incarnation: 1, Ready: true, Hears: b.health()}
	v, err := b.reg.Watch(ctx, "")
	if err != nil {
		return nil, err
	}
	for i := range v.VIPs {
		if x := &v.VIPs[i]; owner(x) == node {
			r.Addresses = append(r.Addresses, Address{Index: x.Index, Epoch: x.Epoch, State: Serving})
		}
	}
	return r, nil
}

func (b *bed) Watch(ctx context.Context, rev string) (mgs.View, error) {
	b.mu.Lock()
	away := b.away
	b.mu.Unlock()
	if away {
		return mgs.View{}, errors.New("away")
	}
	return b.reg.Watch(ctx, rev)
}

func (b *bed) note(s string) {
	b.mu.Lock()
	b.calls = append(b.calls, s)
	b.mu.Unlock()
}

func (b *bed) Assign(ctx context.Context, index uint32, epoch uint64, node string) (mgs.VIP, error) {
	b.note("assign " + node)
	return b.reg.Assign(ctx, index, epoch, node)
}

func (b *bed) Abandoned(ctx context.Context, index uint32, epoch uint64) error {
	b.note("abandoned")
	return b.reg.Abandoned(ctx, index, epoch)
}

// agents do for all nodes what the registry says, until ctx ends.
func (b *bed) agents() {
	for rev := ""; b.ctx.Err() == nil; {
		v, err := b.reg.Watch(b.ctx, rev)
		if err != nil {
			return
		}
		rev = v.Rev
		for i := range v.VIPs {
			x := &v.VIPs[i]
			_, nextDown := b.isDown(x.Next)
			_, ownerDown := b.isDown(owner(x))
			switch {
			case x.Next == "" || nextDown:
			case x.Free() && x.Ready:
				_, err = b.reg.Take(b.ctx, x.Index, x.MoveID)
			case x.Next != owner(x) && !x.Ready:
				_, err = b.reg.SetReady(b.ctx, x.Index, x.MoveID)
			case x.Next != owner(x) && !x.Free() && !ownerDown:
				err = b.reg.Stopped(b.ctx, x.Index, x.Epoch)
			}
			if err != nil && b.ctx.Err() == nil {
				b.t.Log(err)
			}
		}
	}
}

func (b *bed) owner() string {
	l, err := b.reg.VIPs(b.ctx)
	if err != nil || len(l) != 1 {
		b.t.Fatal(l, err)
	}
	return owner(&l[0])
}

func (b *bed) until(what string, ok func() bool) {
	b.t.Helper()
	for range 12000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.t.Fatalf("%s: does not come about; the registry was told %q, the owner is %q", what, b.calls, b.owner())
}

// A manager assigns addresses while its process leads, with a real registry: new ones,
// those of a node that dies, those of a node that is drained. It stops when it leads no
// more and begins anew when it does again; without the registry it does nothing.
func TestManager(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg, err := mgs.Open(t.TempDir(), mgs.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		b := &bed{t: t, reg: reg, ctx: ctx, down: map[string]time.Time{}, change: make(chan struct{}, 1)}
		var floating []bool
		g, err := New(Options{
			Config: DefaultConfig("a", "a", "b", "c"), Registry: b, Leader: b, Health: b.health, Ask: b.ask,
			OnEvent:    func(e Event) { b.mu.Lock(); b.events = append(b.events, e); b.mu.Unlock() },
			OnFloating: func(on bool) { b.mu.Lock(); floating = append(floating, on); b.mu.Unlock() },
		})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		wg.Go(func() { g.Run(ctx) })
		wg.Go(b.agents)
		v, err := reg.AddVIP(ctx, mgs.VIPSpec{Addr: netip.MustParseAddr("192.0.2.10"), Bits: 24, Prefer: []string{"c", "b", "a"}})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if o := b.owner(); o != "" || len(b.calls) != 0 || g.Status().Leads {
			t.Fatalf("who does not lead has decided: %q, owner %q", b.calls, o)
		}
		b.lead(true)
		b.until("the new address to be served", func() bool { return b.owner() == "c" })
		if s := g.Status(); !s.Leads || s.Term != 1 || !s.Quorum || len(s.Nodes) != 3 || !s.Nodes[2].Fit {
			t.Errorf("status %+v", s)
		}

		b.kill("c")
		b.until("the dead node's address to move", func() bool { return b.owner() == "b" })
		if !slices.Equal(b.calls, []string{"assign c", "abandoned", "assign b"}) {
			t.Errorf("the registry was told %q", b.calls)
		}
		b.mu.Lock()
		var decided []Event
		for _, e := range b.events {
			if e.Kind == DecisionEvent {
				decided = append(decided, e)
			}
		}
		b.mu.Unlock()
		if len(decided) != 2 || decided[1].From != "c" || decided[1].To != "b" || decided[1].Err != "" || decided[1].Move != 2 {
			t.Errorf("events %+v", decided)
		}

		if err := reg.SetDrained(ctx, "b", true); err != nil {
			t.Fatal(err)
		}
		b.until("the drained node's address to move", func() bool { return b.owner() == "a" })

		b.lead(false)
		b.until("the manager to stop", func() bool { return !g.Status().Leads })
		n := len(b.calls)
		if err := reg.SetDrained(ctx, "b", false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if len(b.calls) != n {
			t.Errorf("decided without leading: %q", b.calls[n:])
		}
		b.lead(true)
		b.until("failback", func() bool { return b.owner() == "b" })

		// The registry is away: nobody is given what the drained node has.
		b.lead(false)
		b.until("the manager to stop", func() bool { return !g.Status().Leads })
		b.mu.Lock()
		b.away, n = true, len(b.calls)
		b.mu.Unlock()
		if err := reg.SetDrained(ctx, "b", true); err != nil {
			t.Fatal(err)
		}
		b.lead(true)
		time.Sleep(time.Minute)
		if len(b.calls) != n {
			t.Errorf("decided without the registry: %q", b.calls[n:])
		}
		b.mu.Lock()
		b.away = false
		b.mu.Unlock()
		b.until("the registry to be back", func() bool { return b.owner() == "a" })

		if _, err := reg.RemoveVIP(ctx, v.Index); err != nil {
			t.Fatal(err)
		}
		if err := reg.Stopped(ctx, v.Index, vipOf(t, reg).Epoch); err != nil {
			t.Fatal(err)
		}
		b.until("the manager to know that there is nothing to ask for", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(floating)%2 == 0 && !floating[len(floating)-1]
		})
	})
}

func vipOf(t *testing.T, reg *mgs.File) mgs.VIP {
	l, err := reg.VIPs(context.Background())
	if err != nil || len(l) != 1 {
		t.Fatal(l, err)
	}
	return l[0]
}

func TestOptions(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("no options")
	}
	for _, c := range []Config{{}, {Node: "x", Nodes: []string{"a"}}, {Node: "a", Nodes: []string{"a"}, Quorum: "none"}} {
		if _, err := NewMachine(c); err == nil {
			t.Errorf("%+v", c)
		}
	}
	for n, want := range map[int]Quorum{1: Owner, 2: Owner, 3: Majority, 4: Majority} {
		m, err := NewMachine(Config{Node: "a", Nodes: []string{"a", "b", "c", "d"}[:n]})
		if err != nil || m.cfg.Quorum != want {
			t.Errorf("%d nodes: %v, %v", n, m.cfg.Quorum, err)
		}
	}
}

// An answer that is heard long after the question, because the process was stopped
// meanwhile, shows nobody present; nor does one show that a node is cut off that was
// asked before the silence began.
func TestOldAnswers(t *testing.T) {
	m, err := NewMachine(DefaultConfig("a", "a", "b", "c"))
	if err != nil {
		t.Fatal(err)
	}
	m.Lead(time.Second, 1)
	m.View(time.Second, &mgs.View{VIPs: []mgs.VIP{{Index: 1, Addr: netip.MustParseAddr("192.0.2.10"), Bits: 24}}})
	r := &Report{Incarnation: 1, Ready: true, Hears: []NodeHealth{{Node: "c", State: Suspect}}}
	m.Report(time.Minute, "b", 2*time.Second, r)
	m.Tick(time.Minute)
	if m.quorum || m.seen != 1 {
		t.Errorf("quorum %v, %d seen", m.quorum, m.seen)
	}
	asked := time.Minute + 100*time.Millisecond
	m.Health(asked+200*time.Millisecond, []NodeHealth{{Node: "c", State: Suspect, Incarnation: 1, Suspected: 100 * time.Millisecond}})
	m.Report(asked+800*time.Millisecond, "b", asked, r)
	m.Tick(asked + 800*time.Millisecond)
	if !m.quorum || m.nodes["c"].dead != "" {
		t.Errorf("quorum %v, c is dead: %q", m.quorum, m.nodes["c"].dead)
	}
	m.Report(asked+1500*time.Millisecond, "b", asked+800*time.Millisecond, r)
	m.Tick(asked + 1500*time.Millisecond)
	if m.nodes["c"].dead == "" {
		t.Error("c is not dead")
	}
}

// Reports and memories that are none change nothing.
func TestBadReports(t *testing.T) {
	m, err := NewMachine(DefaultConfig("a", "a", "b", "c"))
	if err != nil {
		t.Fatal(err)
	}
	m.Lead(time.Second, 1)
	nan := 0.0
	nan /= nan
	for _, r := range []*Report{
		nil,
		{Load: nan},
		{Load: -1},
		{Addresses: make([]Address, maxAddresses+1)},
		{Hears: make([]NodeHealth, maxHears+1)},
		{Memory: &Memory{VIPs: []Remembered{{Moves: -1}}}},
		{Memory: &Memory{VIPs: []Remembered{{Moves: maxMoves + 1}}}},
		{Memory: &Memory{VIPs: []Remembered{{Hold: -1}}}},
	} {
		m.Report(2*time.Second, "b", time.Second, r)
		if m.nodes["b"].report != nil {
			t.Errorf("%+v was taken", r)
		}
	}
	m.Report(2*time.Second, "x", time.Second, &Report{})
	var k Keeper
	if err := k.Answer(&Question{Memory: &Memory{VIPs: make([]Remembered, maxAddresses+1)}}, &Report{}); err == nil {
		t.Error("a memory that is too long was kept")
	}
}
