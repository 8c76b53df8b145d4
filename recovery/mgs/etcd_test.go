package mgs_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/etcd"
	"github.com/baton-nfs/baton/recovery/wire"
)

// members are an etcd cluster in this process. Its keys are forgotten with it.
type members struct {
	t     *testing.T
	dir   string
	peers []etcd.Peer
	run   map[string]*etcd.Member
}

func newMembers(t *testing.T, n int) *members {
	t.Helper()
	m := &members{t: t, dir: t.TempDir(), run: map[string]*etcd.Member{}}
	var free []netip.AddrPort
	for range 2 * n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		free = append(free, l.Addr().(*net.TCPAddr).AddrPort())
	}
	for i := range n {
		m.peers = append(m.peers, etcd.Peer{Name: fmt.Sprintf("m%d", i), Client: free[2*i], Peer: free[2*i+1]})
	}
	t.Cleanup(func() {
		for _, p := range m.peers {
			m.stop(p.Name)
		}
	})
	return m
}

func (m *members) start(name string) {
	x, err := etcd.StartMember(context.Background(), etcd.MemberOptions{
		Name: name, Dir: filepath.Join(m.dir, name), Members: m.peers, NoSync: true, Heartbeat: 50 * time.Millisecond, Election: 500 * time.Millisecond,
	})
	if err != nil {
		m.t.Error(err)
		return
	}
	m.run[name] = x
}

func (m *members) stop(name string) {
	if x := m.run[name]; x != nil {
		delete(m.run, name)
		if err := x.Close(); err != nil {
			m.t.Error(err)
		}
	}
}

func (m *members) all() {
	for _, p := range m.peers {
		m.start(p.Name)
	}
}

// storage is one with a connection of its own, whose calls take no longer than a time.
func (m *members) storage(prefix string, timeout time.Duration) etcd.Storage {
	m.t.Helper()
	c, err := etcd.New(etcd.Options{Endpoints: etcd.Endpoints(m.peers, "", false), Prefix: prefix, Timeout: timeout, Probe: 2 * time.Second})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { c.Close() })
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, _, err := c.Storage().Load(context.Background()); err == nil {
			return c.Storage()
		} else if time.Now().After(end) {
			m.t.Fatal(err)
		}
	}
}

// local is a service in this process as a Remote reaches it.
func local(s *mgs.Service) func(context.Context, string) (wire.Conn, error) {
	return func(context.Context, string) (wire.Conn, error) { return wire.Local(s, wire.NextSession()), nil }
}

// patience is how long a call may take while nothing is wrong.
const patience = 20 * time.Second

var random = regexp.MustCompile(`\b[0-9a-f]{16,32}\b|\[[0-9 ]{30,}\]`)

// The registry in etcd says what the one in a file does.
func TestEtcdIsTheRegistry(t *testing.T) {
	file, err := mgs.Open(t.TempDir(), mgs.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m := newMembers(t, 1)
	m.all()
	s := m.storage("/one", patience)
	hide := func(l []string) []string {
		for i := range l {
			l[i] = random.ReplaceAllString(l[i], "RANDOM")
		}
		return l
	}
	want := hide(mgs.Script(t, file, "n1"))
	if d := cmp.Diff(want, hide(mgs.Script(t, mgs.NewStored(s, rand.Reader), "n1"))); d != "" {
		t.Error("(-file +etcd)", d)
	}
	r, err := mgs.NewRemote(mgs.RemoteOptions{Node: "n1", Addrs: []string{"here"}, Dial: local(mgs.NewService(mgs.NewStored(m.storage("/two", patience), rand.Reader), nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if d := cmp.Diff(want, hide(mgs.Script(t, r, "n1"))); d != "" {
		t.Error("(-file +etcd by messages)", d)
	}
	mgs.Conflicts(t, 10, m.storage("/three", patience), m.storage("/three", patience))
	// A change by one process is told to another one.
	a, b := mgs.NewStored(s, rand.Reader), mgs.NewStored(m.storage("/one", patience), rand.Reader)
	v, err := b.Watch(context.Background(), "")
	if err != nil {
		t.Fatal(err)
	}
	changed := make(chan mgs.View, 1)
	go func() {
		v, err := b.Watch(context.Background(), v.Rev)
		if err != nil {
			t.Error(err)
		}
		changed <- v
	}()
	if _, err := a.AddVIP(context.Background(), mgs.VIPSpec{Addr: netip.MustParseAddr("192.0.2.77"), Bits: 24}); err != nil {
		t.Fatal(err)
	}
	if w := <-changed; w.Rev == v.Rev || len(w.VIPs) != len(v.VIPs)+1 {
		t.Errorf("%+v after %+v", w, v)
	}
}

// While members come and go, every call takes effect exactly once.
func TestEtcdExactlyOnce(t *testing.T) {
	m := newMembers(t, 3)
	m.all()
	const nodes, each = 3, 15
	var wg sync.WaitGroup
	var mu sync.Mutex
	gens := map[string][]uint64{}
	epochs := map[string][]uint64{}
	crashed := 0
	for i := range nodes {
		node, addr := fmt.Sprintf("n%d", i), netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		r, err := mgs.NewRemote(mgs.RemoteOptions{Node: node, Addrs: []string{"here"}, Dial: local(mgs.NewService(mgs.NewStored(m.storage("", time.Second), rand.Reader), nil))})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			for range each {
				_, g, err := r.StartClient(ctx, node)
				v, err2 := r.Serve(ctx, addr, node)
				err3 := r.Stopped(ctx, v.Index, v.Epoch)
				if err := errors.Join(err, err2, err3); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				gens[node], epochs[node] = append(gens[node], g), append(epochs[node], v.Epoch)
				if v.Crashed {
					crashed++
				}
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for i := 0; ; i++ {
		select {
		case <-done:
		default:
			name := m.peers[i%3].Name
			m.stop(name)
			m.start(name)
			if !t.Failed() {
				continue
			}
		}
		break
	}
	<-done
	want := make([]uint64, each)
	for i := range want {
		want[i] = uint64(i + 1)
	}
	for node, l := range gens {
		if !slices.Equal(l, want) || !slices.Equal(epochs[node], want) {
			t.Errorf("%s: generations %d, epochs %d", node, l, epochs[node])
		}
	}
	if crashed != 0 {
		t.Errorf("%d periods that ended in order are not known to", crashed)
	}
}
