package hooks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/tests/bed"
)

const (
	nfsPort, mountPort = bed.NFSPort, bed.MountPort
	exported           = "/rw"
)

// settings are those of all nodes besides the cluster's. The stages' deadlines bear a
// loaded machine: a commit that is late makes a move unclean.
const settings = `[manager]
mode = "external"
[failover]
drain_timeout = "10s"
commit_timeout = "10s"
close_timeout = "2s"
clear_timeout = "2s"
remove_timeout = "2s"
`

// newReal makes a site whose machines n1, n2, ... run baton itself. Registry and targets
// are on a machine that no cluster manager knows.
func newReal(t *testing.T, machines int, addrs ...string) *site {
	t.Helper()
	s := newSite(t, addrs...)
	store, err := bed.NewNode("store")
	bed.Need(t, err)
	s.store = &bed.Member{Name: "store", Addr: netip.MustParseAddr("192.0.2.9"), Start: []string{"MGS", "MDT0000", "OST0000", "OST0001"}, Node: store}
	if err := store.Plug(s.hub, "br0", "pstore", "eth0", netip.PrefixFrom(s.store.Addr, 24)); err != nil {
		t.Fatal(err)
	}
	var members []*bed.Member // in the order in which they are stopped
	s.members = map[string]*bed.Member{}
	for i := 1; i <= machines; i++ {
		m := &bed.Member{Name: fmt.Sprint("n", i), Addr: machineAddr(i), Floating: true}
		s.members[m.Name] = m
		members = append(members, m)
	}
	members = append(members, s.store)
	c, err := bed.NewCluster(bed.Config{Node: store, Dir: s.path("c"), Exports: []bed.Export{{Path: exported}}}, members...)
	if err != nil {
		t.Fatal(err)
	}
	c.Extra = settings
	s.cluster = c
	if err := c.StartMember(s.ctx, s.store); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, err := c.Baton(s.ctx, s.store, "events")
			lines := strings.Split(out, "\n")
			t.Logf("events: %v\n%s", err, strings.Join(lines[max(0, len(lines)-150):], "\n"))
			t.Log(c.Log())
		}
		store.Close()
	})
	for i := 1; i <= machines; i++ {
		s.boot(i)
	}
	for _, a := range s.addrs {
		s.wait("registry", func() bool {
			_, err := c.Baton(s.ctx, s.store, "vip", "add", netip.PrefixFrom(a, 24).String())
			return err == nil
		})
	}
	s.watch()
	return s
}

// batonOn starts baton on a machine and waits until it can serve addresses.
func (m *machine) batonOn() {
	m.s.t.Helper()
	x := m.s.members[m.Name()]
	x.Node = m.Machine.Node
	if err := m.s.cluster.StartMember(m.s.ctx, x); err != nil {
		m.s.t.Fatal(err)
	}
	m.s.wait("baton on "+m.Name(), func() bool {
		out, err := m.Sh(m.s.ctx, "baton vip list --json")
		if err == nil {
			// It knows of the addresses: there are none before they are entered.
			for _, a := range m.s.addrs {
				if strings.Contains(out, a.String()) {
					out, err = m.Sh(m.s.ctx, "baton hook release --given --stage drain --timeout 5s 192.0.2.199")
					return err == nil && strings.Contains(out, "not a floating address")
				}
			}
			return true
		}
		if x.Ended() {
			m.s.t.Fatalf("baton on %s has ended\n%s", m.Name(), m.s.cluster.Log())
		}
		return false
	})
}

// served is the node that serves an address, by the registry; "" if none does.
func (s *site) served(a netip.Addr) string {
	out, err := s.cluster.Baton(s.ctx, s.store, "vip", "list", "--json")
	if err != nil {
		return ""
	}
	var l []struct {
		Addr     netip.Addr `json:"addr"`
		Floating *struct {
			Node  string `json:"node"`
			Clean bool   `json:"clean"`
		} `json:"floating"`
	}
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		s.t.Fatalf("baton vip list: %v\n%s", err, out)
	}
	for _, v := range l {
		if v.Addr == a && v.Floating != nil && !v.Floating.Clean {
			return v.Floating.Node
		}
	}
	return ""
}

// owner waits until a node other than those given serves the address and has it.
func (s *site) owner(addr string, not ...string) (node string) {
	s.t.Helper()
	a := netip.MustParseAddr(addr)
	s.wait("owner of "+addr, func() bool {
		node = s.served(a)
		return node != "" && !slices.Contains(not, node) && s.holders(a) == node
	})
	return node
}

// settled is owner for when the manager may be about to move the address: the owner has
// to stay the same for longer than it needs to notice.
func (s *site) settled(addr string) (node string) {
	s.t.Helper()
	a := netip.MustParseAddr(addr)
	since := time.Now()
	s.wait("settled owner of "+addr, func() bool {
		now := s.served(a)
		if now == "" || now != node || s.holders(a) != now {
			node, since = now, time.Now()
			return false
		}
		return time.Since(since) > 8*time.Second
	})
	return node
}

// reach waits until the node alone serves the address, clients are answered, and no
// other machine has anything of it. A move in order keeps the write verifier of what
// clients know, a crash does not.
func (s *site) reach(what, addr, node string, orderly bool) {
	s.t.Helper()
	a := netip.MustParseAddr(addr)
	begin := time.Now()
	s.wait(fmt.Sprintf("%s: %s on %s", what, addr, node), func() bool { return s.served(a) == node && s.holders(a) == node })
	took, waited := time.Since(begin), time.Duration(0)
	s.mu.Lock()
	delete(s.soiled, soil{node, a}) // taking the address has destroyed what was left
	s.mu.Unlock()
	for _, w := range s.workers {
		if w.c.addr != a {
			continue
		}
		w.more(what)
		waited = time.Duration(w.c.slow.Swap(0))
		v := w.verifier()
		if before, ok := s.verf[a]; ok && (v == before) != orderly {
			s.t.Errorf("%s: %s: the write verifier was %x and is %x; in order: %v", what, addr, before, v, orderly)
		}
		s.verf[a] = v
	}
	var left map[string][]bed.Socket
	s.wait(what+": only "+node+" with sockets of "+addr, func() bool {
		left = s.stale(a, node, true)
		return len(left) == 0
	})
	s.t.Logf("%s: %s on %s after %v; the longest call took %v", what, addr, node, took.Round(time.Millisecond), waited.Round(time.Millisecond))
}

// stages lists what a node has done about an address after a time, of the events that it
// has kept: "drain", "clear", ..., in order.
func (s *site) stages(addr, node string, after time.Time) (l []string) {
	s.t.Helper()
	out, err := s.cluster.Baton(s.ctx, s.store, "events", "--json")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range bytes.Lines([]byte(out)) {
		var e events.Event
		if err := json.Unmarshal(line, &e); err != nil {
			s.t.Fatalf("event %q: %v", line, err)
		}
		if e.Kind == events.Stage && e.Addr.String() == addr && e.Node == node && e.Time.After(after) {
			l = append(l, e.Stage)
		}
	}
	return l
}

// givenMove checks that a move around the manager's own address went through the stages
// that leave it alone.
func (s *site) givenMove(what, addr, from, to string, after time.Time) {
	s.t.Helper()
	gave, took := s.stages(addr, from, after), s.stages(addr, to, after)
	if !subsequence(gave, "refuse", "drain", "commit", "clear", "told", "finish") || slices.Contains(gave, "remove") {
		s.t.Errorf("%s: %s gave %s up by %q", what, from, addr, gave)
	}
	if !subsequence(took, "listen", "begin", "serve", "announce") || slices.Contains(took, "add") {
		s.t.Errorf("%s: %s took %s by %q", what, to, addr, took)
	}
}

func subsequence(l []string, want ...string) bool {
	for _, x := range l {
		if len(want) > 0 && x == want[0] {
			want = want[1:]
		}
	}
	return len(want) == 0
}

// stale finds sockets of an address on machines other than its owner, but for soiled ones;
// only those with a peer unless all is set.
func (s *site) stale(a netip.Addr, owner string, all bool) map[string][]bed.Socket {
	stale := map[string][]bed.Socket{}
	for name, m := range s.living() {
		if name == owner {
			continue
		}
		ss, err := m.Sockets(a)
		if err != nil {
			continue // it has just lost its power
		}
		s.mu.Lock()
		soiled := s.soiled[soil{name, a}]
		s.mu.Unlock()
		for _, x := range ss {
			if !soiled && (all || !x.Listening()) {
				stale[name] = append(stale[name], x)
			}
		}
	}
	return stale
}

// watch looks at all machines until the test ends: an address is on one machine at most,
// and while one has it, no other has a socket of it with a peer.
func (s *site) watch() {
	quit, done := make(chan struct{}), make(chan struct{})
	s.t.Cleanup(func() {
		close(quit)
		<-done
	})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
			for _, a := range s.addrs {
				s.look(a)
			}
		}
	}()
}

// look looks at one address. Machines are looked at one after the other, so what is
// seen counts only if it is there in a second round, too.
func (s *site) look(a netip.Addr) {
	has := func() (names []string) {
		for name, m := range s.living() {
			if ok, err := m.Has(a); err == nil && ok {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	first := has()
	switch {
	case len(first) > 1:
		if again := has(); slices.Equal(first, again) {
			s.t.Errorf("%v is on %s", a, strings.Join(first, " and "))
		}
	case len(first) == 1:
		stale := s.stale(a, first[0], false)
		if len(stale) > 0 && slices.Equal(first, has()) {
			s.t.Errorf("%v is on %s, and others have %v", a, first[0], stale)
		}
	}
}

// finish ends a test: clients have seen everything answered, and the stores are sound.
func (s *site) finish() {
	s.t.Helper()
	for _, w := range s.workers {
		w.end()
	}
	s.workers = nil
	if err := s.cluster.Stop(); err != nil {
		s.t.Error(err)
	}
	if err := s.cluster.Check(s.ctx); err != nil {
		s.t.Error(err)
	}
}
