package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/recovery/mgs"
)

var ctx = context.Background()

// patience is what nothing may take: only a hang exceeds it.
const patience = 60 * time.Second

// cluster is an embedded cluster, all members in this process.
type cluster struct {
	t       *testing.T
	dir     string
	tls     bool
	peers   []Peer
	members map[string]*Member
}

// ports are free ports of an address.
func ports(t *testing.T, n int) (l []uint16) {
	t.Helper()
	for range n {
		s, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		l = append(l, uint16(s.Addr().(*net.TCPAddr).Port))
	}
	return l
}

func newCluster(t *testing.T, n int, tls bool) *cluster {
	t.Helper()
	c := &cluster{t: t, dir: t.TempDir(), tls: tls, members: map[string]*Member{}}
	l := ports(t, 2*n)
	local := netip.MustParseAddr("127.0.0.1")
	for i := range n {
		c.peers = append(c.peers, Peer{fmt.Sprintf("n%d", i+1), netip.AddrPortFrom(local, l[2*i]), netip.AddrPortFrom(local, l[2*i+1])})
	}
	if tls {
		a, err := ca.Create(c.dir, "test", ca.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range c.peers {
			if err := a.IssueNode(c.dir, p.Name, ca.Options{Hosts: []string{"127.0.0.1"}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		for _, m := range c.members {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return c
}

func (c *cluster) files(node string) *Files {
	if !c.tls {
		return nil
	}
	cert, key := ca.NodePaths(c.dir, node)
	return &Files{CA: filepath.Join(c.dir, ca.CAFile), Cert: cert, Key: key}
}

func (c *cluster) start(names ...string) {
	c.t.Helper()
	for _, n := range names {
		m, err := StartMember(ctx, MemberOptions{
			Name: n, Dir: filepath.Join(c.dir, n), Members: c.peers, TLS: c.files(n), NoSync: true,
			Heartbeat: 50 * time.Millisecond, Election: 500 * time.Millisecond, Logger: testLog(c.t, n),
		})
		if err != nil {
			c.t.Fatal(err)
		}
		c.members[n] = m
	}
}

func (c *cluster) stop(n string) {
	c.t.Helper()
	m := c.members[n]
	delete(c.members, n)
	if err := m.Close(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) all() (l []string) {
	for _, p := range c.peers {
		l = append(l, p.Name)
	}
	return l
}

func testLog(t *testing.T, n string) *slog.Logger {
	return slog.New(slog.NewTextHandler(&bytes.Buffer{}, &slog.HandlerOptions{Level: slog.LevelWarn})).With("member", n)
}

// client is that of a node.
func (c *cluster) client(node string, change func(*Options)) *Client {
	c.t.Helper()
	o := Options{Endpoints: Endpoints(c.peers, node, c.tls), MaxDocument: EmbeddedMaxDocument, Timeout: 2 * time.Second, Probe: 2 * time.Second}
	if c.tls {
		n, err := ca.LoadNode(c.dir, node)
		if err != nil {
			c.t.Fatal(err)
		}
		o.TLS = n.Client("")
	}
	if change != nil {
		change(&o)
	}
	x, err := New(o)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { x.Close() })
	return x
}

// eventually tries until f has no error.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func TestThreeMembers(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, true)
	c.start("n1")
	x := c.client("n1", nil)
	s := x.Storage()
	if _, _, err := s.Load(ctx); !errors.Is(err, mgs.ErrUnavailable) {
		t.Fatalf("one of three members answers: %v", err)
	}
	c.start("n2", "n3")
	eventually(t, "the members find each other", func() error { _, _, err := s.Load(ctx); return err })
	doc, rev, err := s.Load(ctx)
	if err != nil || doc != nil || rev != 0 {
		t.Fatalf("of an empty etcd: %q %d %v", doc, rev, err)
	}
	if err := s.Swap(ctx, 7, []byte("no")); !errors.Is(err, mgs.ErrConflict) {
		t.Fatalf("swap of what is not there: %v", err)
	}
	waited := make(chan error, 1)
	go func() { waited <- s.Wait(ctx, 0) }()
	if err := s.Swap(ctx, 0, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	_, one, err := s.Load(ctx)
	if err != nil || one == 0 {
		t.Fatal(one, err)
	}
	if err := s.Swap(ctx, 0, []byte("two")); !errors.Is(err, mgs.ErrConflict) {
		t.Fatalf("swap of an old revision: %v", err)
	}
	// With one member less everything goes on, also by the endpoint that is gone.
	c.stop("n1")
	// One that was made, and whose answer was lost, is made.
	swap := func(rev uint64, text string) error {
		err := s.Swap(ctx, rev, []byte(text))
		if errors.Is(err, mgs.ErrConflict) {
			if doc, _, lerr := s.Load(ctx); lerr == nil && string(doc) == text {
				return nil
			}
		}
		return err
	}
	eventually(t, "two of three members", func() error { return swap(one, "two") })
	_, two, err := s.Load(ctx)
	if err != nil || two == one {
		t.Fatal(two, err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	if err := s.Wait(short, two); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("wait without a change: %v", err)
	}
	cancel()
	// Without a majority: a clear error in bounded time, and the wait goes on.
	c.stop("n2")
	go func() { waited <- s.Wait(ctx, two) }()
	err = s.Swap(ctx, two, []byte("three"))
	if !errors.Is(err, mgs.ErrUnavailable) || !strings.Contains(err.Error(), "no majority") {
		t.Fatalf("without a majority: %v", err)
	}
	c.start("n2", "n1")
	// The change was made or not; either way there is one document.
	eventually(t, "the majority is back", func() error { _, _, err := s.Load(ctx); return err })
	doc, rev, err = s.Load(ctx)
	if err != nil || string(doc) != "two" && string(doc) != "three" || (rev == two) != (string(doc) == "two") {
		t.Fatalf("%q of revision %d: %v", doc, rev, err)
	}
	if rev == two {
		eventually(t, "write again", func() error { return swap(two, "three") })
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	leaders := 0
	eventually(t, "status", func() error {
		leaders = 0
		for _, m := range x.Members(ctx) {
			if m.Error != "" {
				return errors.New(m.Error)
			}
			names[m.Name] = true
			if m.Leader {
				leaders++
			}
		}
		if leaders != 1 {
			return fmt.Errorf("%d leaders", leaders)
		}
		return nil
	})
	if len(names) != 3 || !names["n1"] || !names["n2"] || !names["n3"] {
		t.Errorf("members %v", names)
	}
}

// patient is for a member that has much to do, or a machine that has.
func patient(o *Options) { o.Timeout = 20 * time.Second }

func one(t *testing.T) (*cluster, *Client) {
	c := newCluster(t, 1, false)
	c.start("n1")
	x := c.client("n1", patient)
	eventually(t, "the member answers", func() error { _, _, err := x.Storage().Load(ctx); return err })
	return c, x
}

func TestLimits(t *testing.T) {
	t.Parallel()
	c, x := one(t)
	big := bytes.Repeat([]byte("x"), EmbeddedMaxDocument)
	var refused *mgs.Error
	if err := x.Storage().Swap(ctx, 0, append(big, 'x')); !errors.As(err, &refused) || refused.Code != mgs.CodeLimit {
		t.Fatalf("a document that is too large: %v", err)
	}
	if err := x.Storage().Swap(ctx, 0, big); err != nil {
		t.Fatalf("the largest document: %v", err)
	}
	got, _, err := x.Storage().Load(ctx)
	if err != nil || !bytes.Equal(got, big) {
		t.Fatalf("%d bytes came back: %v", len(got), err)
	}
	// The server's own limit.
	y := c.client("n1", func(o *Options) {
		patient(o)
		o.MaxDocument, o.Prefix = 2*EmbeddedMaxDocument, "/y/"
	})
	if err := y.Storage().Swap(ctx, 0, append(big, big...)); err == nil || errors.Is(err, mgs.ErrUnavailable) || !strings.Contains(err.Error(), "max-request-bytes") {
		t.Fatalf("more than the server takes: %v", err)
	}
	// Another prefix is another registry.
	if doc, rev, err := y.Storage().Load(ctx); doc != nil || rev != 0 || err != nil {
		t.Fatal(rev, err)
	}
}

func TestFreeze(t *testing.T) {
	t.Parallel()
	_, x := one(t)
	s := x.Storage()
	r := mgs.NewStored(s, rand.Reader)
	id, err := r.Identity(ctx)
	if err != nil {
		t.Fatal(err)
	}
	doc, rev, err := s.Freeze(ctx)
	if err != nil || !bytes.Contains(doc, []byte(id)) || rev == 0 {
		t.Fatalf("%s %d %v", doc, rev, err)
	}
	if err := r.SetOSTs(ctx, 3); !errors.Is(err, ErrFrozen) {
		t.Fatalf("a frozen registry: %v", err)
	}
	if again, err := r.Identity(ctx); err != nil || again != id {
		t.Fatalf("%s %v", again, err)
	}
	if f, err := s.Frozen(ctx); err != nil || !f {
		t.Fatal(f, err)
	}
	if err := s.Replace(ctx, doc); err != nil {
		t.Fatal(err)
	}
	if err := r.SetOSTs(ctx, 3); err != nil {
		t.Fatal(err)
	}
	if f, err := s.Frozen(ctx); err != nil || f {
		t.Fatal(f, err)
	}
}

func TestPassword(t *testing.T) {
	t.Parallel()
	c, x := one(t)
	cli, err := x.get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, u := range []string{"root", "baton", "other"} {
		_, err = cli.UserAdd(ctx, u, "secret of "+u)
		do(err)
		_, err = cli.RoleAdd(ctx, u)
		do(err)
		_, err = cli.UserGrantRole(ctx, u, u)
		do(err)
	}
	_, err = cli.RoleGrantPermission(ctx, "baton", "/baton/", clientv3.GetPrefixRangeEnd("/baton/"), clientv3.PermissionType(clientv3.PermReadWrite))
	do(err)
	_, err = cli.AuthEnable(ctx)
	do(err)
	as := func(user, password string) Storage {
		return c.client("n1", func(o *Options) {
			patient(o)
			o.User, o.Password = user, password
		}).Storage()
	}
	if err := as("baton", "secret of baton").Swap(ctx, 0, []byte("doc")); err != nil {
		t.Fatal(err)
	}
	for _, w := range []struct{ user, password, want string }{
		{"", "", "wants a password"}, {"baton", "wrong", "correct registry.user"}, {"other", "secret of other", "read and write access"},
	} {
		_, _, err := as(w.user, w.password).Load(ctx)
		if err == nil || errors.Is(err, mgs.ErrUnavailable) || !strings.Contains(err.Error(), w.want) {
			t.Errorf("user %q: %v", w.user, err)
		}
	}
}

// A member that has lost its directory must not be let in as if it had never promised
// anything; one that was removed and added joins.
func TestDirectoryLost(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, false)
	c.start(c.all()...)
	x := c.client("n1", nil)
	eventually(t, "the members find each other", func() error { _, _, err := x.Storage().Load(ctx); return err })
	c.stop("n3")
	o := MemberOptions{Name: "n3", Dir: filepath.Join(c.dir, "empty"), Members: c.peers, NoSync: true, Heartbeat: 50 * time.Millisecond, Election: 500 * time.Millisecond}
	if m, err := StartMember(ctx, o); err == nil {
		m.Close()
		t.Fatal("a member without its memory was started")
	} else if !strings.Contains(err.Error(), "member remove") {
		t.Fatalf("no remedy: %v", err)
	}
	cli, err := x.get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l, err := cli.MemberList(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range l.Members {
		if m.Name == "n3" {
			eventually(t, "remove it", func() error { _, err := cli.MemberRemove(ctx, m.ID); return err })
			eventually(t, "add it", func() error { _, err := cli.MemberAdd(ctx, m.PeerURLs); return err })
		}
	}
	o.Dir = filepath.Join(c.dir, "new")
	m, err := StartMember(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	c.members["n3"] = m
	select {
	case <-m.Ready():
	case <-time.After(patience):
		t.Fatal("the member that was added again does not join")
	}
}

// watcher records who leads, as all elections say at any time.
type watcher struct {
	mu    sync.Mutex
	terms map[uint64]string
}

func (w *watcher) run(t *testing.T, ctx context.Context, es map[string]*Election) {
	for ctx.Err() == nil {
		var leads []string
		for n, e := range es {
			// Who said so first must still say so after the second.
			if term := e.Term(); term != 0 {
				w.mu.Lock()
				if was := w.terms[term]; was != "" && was != n {
					t.Errorf("term %d is of %s and %s", term, was, n)
				}
				w.terms[term] = n
				w.mu.Unlock()
				leads = append(leads, n)
			}
		}
		if len(leads) > 1 {
			still := 0
			for _, n := range leads {
				if es[n].Leads() {
					still++
				}
			}
			if still > 1 {
				t.Errorf("%v lead at the same time", leads)
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func TestElection(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3, false)
	c.start(c.all()...)
	es := map[string]*Election{}
	ends := map[string]func(){}
	clients := map[string]*Client{}
	for _, n := range c.all() {
		clients[n] = c.client(n, func(o *Options) { o.Timeout = time.Second })
		e, err := clients[n].NewElection(ElectionOptions{Node: n, TTL: 2 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		es[n] = e
		run, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() { defer close(done); e.Run(run) }()
		ends[n] = func() { cancel(); <-done }
		t.Cleanup(ends[n])
	}
	w := &watcher{terms: map[uint64]string{}}
	watch, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { w.run(t, watch, es) })
	defer wg.Wait()
	defer cancel()
	// agreed waits until the living ones agree on a leader that says so itself.
	agreed := func(nodes ...string) (leader string, term uint64) {
		t.Helper()
		eventually(t, "all know the leader", func() error {
			leader = ""
			for _, n := range nodes {
				l, at := es[n].Leader()
				if l == "" || leader != "" && (l != leader || at != term) {
					return fmt.Errorf("%s says %q of %d, another one %q of %d", n, l, at, leader, term)
				}
				leader, term = l, at
			}
			if es[leader].Term() != term {
				return fmt.Errorf("%s does not lead", leader)
			}
			return nil
		})
		return leader, term
	}
	first, term1 := agreed("n1", "n2", "n3")
	// An orderly end: another one takes over without waiting for the lease.
	began := time.Now()
	ends[first]()
	if es[first].Leads() {
		t.Error("it leads after its end")
	}
	var rest []string
	for _, n := range c.all() {
		if n != first {
			rest = append(rest, n)
		}
	}
	second, term2 := agreed(rest...)
	if second == first || term2 <= term1 {
		t.Errorf("%s of %d after %s of %d", second, term2, first, term1)
	}
	t.Logf("hand-over after %v", time.Since(began))
	// The key is removed: the leader notices, and somebody is elected.
	cli, err := clients[rest[0]].get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Delete(ctx, "/baton/leader"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another term", func() error {
		if _, term := es[rest[0]].Leader(); term <= term2 {
			return fmt.Errorf("term %d", term)
		}
		return nil
	})
	third, term3 := agreed(rest...)
	// Without a majority nobody leads any more.
	changed := es[third].Changed()
	c.stop("n1")
	c.stop("n2")
	select {
	case <-changed:
	case <-time.After(patience):
		t.Fatal("the leader leads on without a majority")
	}
	if es[third].Leads() {
		t.Error("it leads without a majority")
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if l, err := es[third].Await(short); err == nil {
		t.Errorf("%s leads without a majority", l)
	}
	c.start("n1", "n2")
	_, term4 := agreed(rest...)
	if term4 <= term3 {
		t.Errorf("term %d after %d", term4, term3)
	}
}

// The tenure ends by the leader's own clock, whatever etcd does meanwhile.
func TestTenureEndsByTheClock(t *testing.T) {
	t.Parallel()
	_, x := one(t)
	var mu sync.Mutex
	var ahead time.Duration
	e, err := x.NewElection(ElectionOptions{Node: "n1", Clock: func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return bootTime() + ahead
	}})
	if err != nil {
		t.Fatal(err)
	}
	run, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); e.Run(run) }()
	defer func() { cancel(); <-done }()
	if n, err := e.Await(ctx); err != nil || n != "n1" || !e.Leads() {
		t.Fatal(n, err)
	}
	e.mu.Lock() // nothing is renewed meanwhile
	mu.Lock()
	ahead = 3 * time.Second // the process was stopped, and nothing else has run yet
	mu.Unlock()
	if e.mine.valid(e.o.Clock()) {
		t.Error("it leads after its lease can have ended")
	}
	e.mu.Unlock()
	mine := tenure{5, lasts(10*time.Second, 3*time.Second)}
	for at, want := range map[time.Duration]bool{10 * time.Second: true, 12*time.Second + 699*time.Millisecond: true, 12*time.Second + 700*time.Millisecond: false, 13 * time.Second: false} {
		if mine.valid(at) != want {
			t.Errorf("at %v", at)
		}
	}
	eventually(t, "it is elected again, or has renewed", func() error {
		if !e.Leads() {
			return errors.New("it does not lead")
		}
		return nil
	})
}
