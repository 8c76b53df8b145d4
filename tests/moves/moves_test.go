package moves

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/moves/rig"
	"github.com/baton-nfs/baton/tests/uml"
)

func TestMain(m *testing.M) {
	rig.Patient = os.Getenv(soakEnv) == ""
	bed.Main(m)
}

// patience is how long anything may take; only a hang takes longer.
const patience = 3 * time.Minute

// Environment.
const (
	// moverEnv chooses what moves addresses.
	moverEnv = "BATON_MOVER"
	// soakEnv set to anything makes TestMoves do the full number of moves.
	soakEnv = "BATON_SOAK"
	// seedEnv repeats a schedule.
	seedEnv = "BATON_SEED"
)

// world is a service on three nodes, and clients at work.
type world struct {
	t       *testing.T
	net     *rig.Net
	mover   rig.Mover
	watch   *rig.Watch
	vips    []netip.Addr
	clients []*rig.Client
	idle    *rig.Client
	began   time.Time
}

// newMover makes the chosen service, which moves vips.
func newMover(t *testing.T, dir string, vips ...netip.Addr) (*rig.Net, rig.Mover) {
	t.Helper()
	name := os.Getenv(moverEnv)
	if name == "" {
		name = rig.DefaultMover
	}
	n, m, err := rig.NewMover(name, dir, vips...)
	bed.Need(t, err)
	t.Cleanup(n.Close)
	return n, m
}

// newWorld starts the service; clients come later.
func newWorld(t *testing.T, vips int) *world {
	t.Helper()
	var as []netip.Addr
	for i := range vips {
		as = append(as, rig.VIP(i))
	}
	return newWorldOf(t, as...)
}

func newWorldOf(t *testing.T, vips ...netip.Addr) *world {
	t.Helper()
	if os.Getenv("BATON_KERNEL") != "1" {
		t.Skip("SKIPPED, reason: moves under kernel clients run only with BATON_KERNEL=1 (make test)")
	}
	bed.Need(t, uml.Available())
	w := &world{t: t, began: time.Now(), vips: vips}
	w.net, w.mover = newMover(t, bed.Dir(t), w.vips...)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		log := w.mover.Log()
		if err := w.mover.Stop(ctx); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("logs:\n%s", log)
		}
	})
	if err := w.mover.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for _, a := range w.vips {
		if err := w.net.Answers(ctx, a); err != nil {
			t.Fatalf("%v\n%s", err, w.mover.Log())
		}
	}
	w.watch = rig.NewWatch(w.net, w.vips...)
	t.Cleanup(func() {
		looks, found := w.watch.Stop()
		for _, f := range found {
			t.Errorf("watch: %s", f)
		}
		t.Logf("watched: %d looks", looks)
		if looks == 0 {
			t.Error("nobody has seen an address anywhere")
		}
	})
	return w
}

func (w *world) logf(format string, args ...any) {
	w.t.Helper()
	w.t.Logf("%6.2f s: %s", time.Since(w.began).Seconds(), fmt.Sprintf(format, args...))
}

// counter is the path of a counter file in a client.
func counter(a netip.Addr) string { return "/mnt/nfs/all/counter-" + a.String() }

// start boots clients: two that work at the first address, one that is idle there and
// holds a lock, and one that works at the second.
func (w *world) start(ctx context.Context, seed uint64) {
	w.t.Helper()
	const held = "-held /mnt/nfs/all/held"
	cs := []rig.ClientConfig{
		{Name: "one", VIP: w.vips[0], With: "seq,storm,lock", Flags: held + " -counters " + counter(w.vips[0])},
		{Name: "two", VIP: w.vips[0], With: "storm,lock", Flags: held + " -counters " + counter(w.vips[0])},
		{Name: "idle", VIP: w.vips[0], With: "idle", Flags: held},
	}
	if len(w.vips) > 1 {
		cs = append(cs, rig.ClientConfig{Name: "other", VIP: w.vips[1], With: "seq,storm,lock", Flags: "-counters " + counter(w.vips[1])})
	}
	w.boot(ctx, seed, cs...)
}

// boot boots clients and waits until those that hold a lock have it.
func (w *world) boot(ctx context.Context, seed uint64, cs ...rig.ClientConfig) {
	w.t.Helper()
	all := make([]*rig.Client, len(cs))
	errs := make([]error, len(cs))
	var wg sync.WaitGroup
	for i, c := range cs {
		c.Seed = seed
		dir := bed.Dir(w.t)
		wg.Go(func() { all[i], errs[i] = w.net.StartClient(ctx, i, dir, c) })
	}
	wg.Wait()
	for i, c := range all {
		bed.Need(w.t, errs[i])
		w.t.Cleanup(c.Kill)
		if c.Name == "idle" {
			w.idle = c
		}
		w.clients = append(w.clients, c)
	}
	for _, c := range w.clients {
		if err := c.Order("held"); err != nil {
			w.t.Fatal(err)
		}
	}
}

// clientsOf are those that have mounted one of the addresses, or all others.
func (w *world) clientsOf(vips []netip.Addr, not bool) (cs []*rig.Client) {
	for _, c := range w.clients {
		if slices.Contains(vips, c.VIP) != not {
			cs = append(cs, c)
		}
	}
	return cs
}

// check fails the test if a client or the watch has found something.
func (w *world) check() {
	w.t.Helper()
	for _, c := range w.clients {
		if err := c.Failed(); err != nil {
			w.t.Fatal(err)
		}
	}
	if e, ok := w.mover.(interface{ Ended() string }); ok {
		if node := e.Ended(); node != "" {
			w.t.Fatalf("%s has ended by itself", node)
		}
	}
	if f := w.watch.Found(); len(f) > 0 {
		w.t.FailNow() // the watch tells what at the end
	}
}

// moving waits until the clients' busy workers have done something begun after t.
func (w *world) moving(ctx context.Context, cs []*rig.Client, t time.Time) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, c := range cs {
		if err := c.Moving(ctx, t); err != nil {
			w.tell()
			w.t.Fatal(err)
		}
	}
}

// longest is the longest operation of the clients between two times.
func (w *world) longest(cs []*rig.Client, from, to time.Time) (longest rig.Op, who string) {
	w.t.Helper()
	for _, c := range cs {
		o, err := c.Longest(from, to)
		if err != nil {
			w.t.Fatal(err)
		}
		if o.Took > longest.Took {
			longest, who = o, c.Name+" "+o.Worker
		}
	}
	return longest, who
}

// peers are the connections to NFS at an address, which a client keeps unless it
// was disturbed.
func (w *world) peers(a netip.Addr) (peers []string) {
	w.t.Helper()
	m := w.net.Machine(w.mover.Owner(a))
	if m == nil {
		w.t.Fatalf("nobody has %v", a)
	}
	ss, err := m.Node().Sockets(a)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, s := range ss {
		if s.State == "ESTAB" && s.Local.Port() == bed.NFSPort {
			peers = append(peers, s.Remote.String())
		}
	}
	slices.Sort(peers)
	// The kernel may list a socket twice when others come and go meanwhile.
	return slices.Compact(peers)
}

// clean fails the test unless the address is on its owner alone, and no other
// machine has a socket of it. Listeners of who was to take it may need a moment.
func (w *world) clean(ctx context.Context, a netip.Addr) {
	w.t.Helper()
	owner := w.mover.Owner(a)
	for _, m := range w.net.Machines {
		if b := m.Node(); b != nil {
			has, err := b.Has(a)
			if err != nil || has != (m.Name == owner) {
				w.t.Errorf("%s has %v: %v (%v); its owner is %q", m.Name, a, has, err, owner)
			}
		}
	}
	if stale := rig.Stale(w.net, a, owner, false); len(stale) > 0 {
		w.t.Errorf("%v is on %s, and there are sockets of it: %v", a, owner, stale)
	}
	for {
		stale := rig.Stale(w.net, a, owner, true)
		if len(stale) == 0 {
			return
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			w.t.Fatalf("%v is on %s, and its listeners stay elsewhere: %v", a, owner, stale)
		}
	}
}

// finish ends the clients, which compare everything once more, and compares the counters
// with what the clients have counted.
func (w *world) finish(ctx context.Context) {
	w.t.Helper()
	want := map[string]uint64{}
	rs := make([]rig.Result, len(w.clients))
	errs := make([]error, len(w.clients))
	var wg sync.WaitGroup
	for i, c := range w.clients {
		if c != w.idle {
			wg.Go(func() { rs[i], errs[i] = c.Finish(ctx) })
		}
	}
	wg.Wait()
	// Its lock is tried by the others until they end.
	if i := slices.Index(w.clients, w.idle); i >= 0 {
		rs[i], errs[i] = w.idle.Finish(ctx)
	}
	for i, c := range w.clients {
		if errs[i] != nil {
			w.t.Error(errs[i])
		}
		for name, n := range rs[i].Counts {
			want[name] += n
		}
		w.t.Logf("%s: %d operations, counted %v", c.Name, c.Ops(), rs[i].Counts)
	}
	for _, a := range w.vips {
		p, err := rig.NewProbe(ctx, w.net.Hub, a)
		if err != nil {
			w.t.Fatal(err)
		}
		parts, sum, err := p.Counter("all/" + filepath.Base(counter(a)))
		p.Close()
		if n := want[counter(a)]; err != nil || sum != n || n == 0 {
			w.t.Errorf("counter of %v: %d, parts %d (%v); the clients have counted to %d", a, sum, parts, err, n)
		}
	}
}

// tell shows what helps to understand a hang.
func (w *world) tell() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, c := range w.clients {
		short, end := context.WithTimeout(ctx, 3*time.Second)
		w.t.Logf("client %s:\n%.12000s", c.Name, c.Dump(short))
		end()
	}
	w.t.Logf("the service:\n%s", w.mover.Log())
	for _, m := range w.net.Machines {
		b := m.Node()
		if b == nil {
			w.t.Logf("%s has no power", m.Name)
			continue
		}
		for _, args := range [][]string{{"ip", "-br", "addr"}, {"ss", "-tnaoi"}} {
			out, err := b.Run(ctx, args[0], args[1:]...)
			w.t.Logf("%s: %v %v\n%.4000s", m.Name, args, err, out)
		}
	}
}

// backs are the times after which an address goes back to where it was.
var backs = []time.Duration{100 * time.Millisecond, time.Second, 3 * time.Second, time.Minute}

// TestMoves moves addresses in order and cuts the power of who has them, at random,
// and moves them back after 0.1 s to a minute, while kernel clients work. They see no
// error, everything is there, counters under locks are exact, each operation was executed
// once, an idle client keeps its lock, and who has mounted the other address keeps
// its connection.
func TestMoves(t *testing.T) {
	moves, kills, backs := 12, 6, backs[:3]
	if os.Getenv(soakEnv) != "" {
		moves, kills, backs = 100, 50, backs[:4]
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", seedEnv, seed)
	w := newWorld(t, 2)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(moves+kills)*time.Minute)
	defer cancel()
	w.start(ctx, seed)
	w.logf("clients work; it is %s", time.Now().UTC().Format("15:04:05"))

	// What the clients do undisturbed.
	t0 := time.Now()
	w.moving(ctx, w.clients, t0)
	w.pause(ctx, 3*time.Second)
	o, who := w.longest(w.clients, t0, time.Now())
	w.logf("undisturbed: the longest operation took %v (%s %s)", o.Took, who, o.Op)

	r := rand.New(rand.NewPCG(seed, 11))
	s := &schedule{w: w, r: r, stalls: map[string][]time.Duration{}}
	for i := 0; moves > 0 || kills > 0; i++ {
		vip := w.vips[0]
		if r.IntN(4) == 0 {
			vip = w.vips[1]
		}
		back := backs[i%len(backs)]
		from := w.mover.Owner(vip)
		var others []string
		for _, n := range w.mover.Nodes() {
			if n != from {
				others = append(others, n)
			}
		}
		to := others[r.IntN(len(others))]
		if r.IntN(moves+kills) < kills {
			kills--
			node := from
			if r.IntN(2) == 0 {
				node = s.decider(ctx, from)
			}
			s.kill(ctx, node, to, back)
		} else {
			moves--
			s.move(ctx, vip, to, back >= time.Second)
			w.pause(ctx, back)
		}
		if moves > 0 && w.mover.Owner(vip) != from {
			moves--
			s.move(ctx, vip, from, true)
		}
		if i%3 == 0 {
			s.wake(ctx)
		}
		if i%4 == 3 {
			s.verify(ctx)
		}
	}
	s.wake(ctx)
	s.verify(ctx)
	w.finish(ctx)
	for _, what := range []string{"move", "kill", "other address"} {
		d := s.stalls[what]
		slices.Sort(d)
		if len(d) > 0 {
			t.Logf("%s (%s): %d times, longest stall of a client: median %v, worst %v", what, w.mover.Name(), len(d), d[len(d)/2], d[len(d)-1])
		}
	}
}

// pause lets the clients work.
func (w *world) pause(ctx context.Context, d time.Duration) {
	w.t.Helper()
	for end := time.Now().Add(d); ; {
		w.check()
		left := time.Until(end)
		if left <= 0 {
			return
		}
		select {
		case <-time.After(min(left, 100*time.Millisecond)):
		case <-ctx.Done():
			w.t.Fatal("the time is over")
		}
	}
}

type schedule struct {
	w      *world
	r      *rand.Rand
	stalls map[string][]time.Duration
}

// disturb does something to addresses, and tells what their clients and the others
// saw of it. Whoever is not concerned must keep its connection.
func (s *schedule) disturb(ctx context.Context, what string, vips []netip.Addr, settle bool, do func() error) {
	w := s.w
	w.t.Helper()
	peers := map[netip.Addr][]string{}
	for _, a := range w.vips {
		if !slices.Contains(vips, a) {
			peers[a] = w.peers(a)
			if len(peers[a]) == 0 {
				w.t.Fatalf("nobody is connected to %v", a)
			}
		}
	}
	t0 := time.Now()
	if err := do(); err != nil {
		w.tell()
		w.t.Fatalf("%s: %v", what, err)
	}
	t1 := time.Now()
	for _, a := range vips {
		w.clean(ctx, a)
	}
	if settle {
		w.moving(ctx, w.clients, t1)
	}
	t2 := time.Now()
	for a, before := range peers {
		w.clean(ctx, a)
		if after := w.peers(a); !slices.Equal(before, after) {
			w.t.Errorf("%s: connections of %v were %v and are %v", what, a, before, after)
		}
	}
	o, who := w.longest(w.clientsOf(vips, false), t0, t2)
	x, whox := w.longest(w.clientsOf(vips, true), t0, t2)
	w.logf("%s took %v; longest %v (%s %s); at other addresses %v (%s %s)", what, t1.Sub(t0).Round(time.Millisecond), o.Took, who, o.Op, x.Took, whox, x.Op)
	if o.Took > long {
		w.events(ctx)
	}
	if settle {
		kind, _, _ := cutWord(what)
		if len(vips) > 0 {
			s.stalls[kind] = append(s.stalls[kind], o.Took)
		}
		if whox != "" {
			s.stalls["other address"] = append(s.stalls["other address"], x.Took)
		}
	}
	w.check()
}

// long is a stall whose cause is worth a look.
const long = 3 * time.Second

// events logs what the nodes say of the last moves.
func (w *world) events(ctx context.Context) {
	w.t.Helper()
	e, ok := w.mover.(interface {
		Events(context.Context) (string, error)
	})
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := e.Events(ctx)
	w.t.Logf("events: %v\n%s", err, out[max(0, len(out)-8000):])
}

func cutWord(s string) (word, rest string, ok bool) {
	for i, r := range s {
		if r == ' ' {
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

func (s *schedule) move(ctx context.Context, a netip.Addr, to string, settle bool) {
	s.w.t.Helper()
	s.disturb(ctx, fmt.Sprintf("move %v from %s to %s", a, s.w.mover.Owner(a), to), []netip.Addr{a}, settle, func() error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if err := s.w.mover.Move(ctx, a, to); err != nil {
			return err
		}
		if got := s.w.mover.Owner(a); got != to {
			return fmt.Errorf("it is at %q", got)
		}
		return nil
	})
}

// decider is the node that decides who takes an address over, where the service tells; else
// the other one.
func (s *schedule) decider(ctx context.Context, other string) string {
	s.w.t.Helper()
	d, ok := s.w.mover.(interface {
		Decider(context.Context) (string, error)
	})
	if !ok {
		return other
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	node, err := d.Decider(ctx)
	if err != nil {
		s.w.tell()
		s.w.t.Fatal(err)
	}
	if node == "" {
		return other
	}
	s.w.logf("%s decides", node)
	return node
}

// kill cuts the power of a node, lets its addresses be taken over, and gives it power
// after a while.
func (s *schedule) kill(ctx context.Context, node, to string, away time.Duration) {
	w := s.w
	w.t.Helper()
	var hit []netip.Addr
	for _, a := range w.vips {
		if w.mover.Owner(a) == node {
			hit = append(hit, a)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s.disturb(ctx, fmt.Sprintf("kill %s, which has %v", node, hit), hit, true, func() error {
		if err := w.mover.Kill(ctx, node); err != nil {
			return err
		}
		for _, b := range hit {
			if err := w.mover.TakeOver(ctx, b, to); err != nil {
				return err
			}
		}
		return nil
	})
	w.pause(ctx, away)
	s.disturb(ctx, "restart "+node, nil, false, func() error { return w.mover.Restart(ctx, node) })
}

// wake has the idle client do something.
func (s *schedule) wake(ctx context.Context) {
	s.w.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	d, err := s.w.idle.Wake(ctx)
	if err != nil {
		s.w.tell()
		s.w.t.Fatal(err)
	}
	s.w.logf("the idle client woke up, which took %v", d.Round(time.Millisecond))
}

// verify has all clients compare everything.
func (s *schedule) verify(ctx context.Context) {
	s.w.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, c := range s.w.clients {
		if err := c.Verify(ctx); err != nil {
			s.w.tell()
			s.w.t.Fatal(err)
		}
	}
	s.w.logf("verified")
}
