package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/etcd"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/wire"
)

// etcdCell is a cell whose three nodes are the members of an embedded etcd.
func etcdCell(t *testing.T) *cell {
	t.Helper()
	c := newCell(t)
	c.start = map[string][]string{"b": {"MDT0000", "OST0000"}, "c": {"OST0001"}}
	// The members have the same ports, so each node needs an address of its own.
	for i, n := range []string{"a", "b", "c"} {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.7.%d:0", i+1))
		if err != nil {
			t.Fatal(err)
		}
		c.ports[n] = l.Addr().String()
		l.Close()
	}
	var free []int
	for len(free) < 2 {
		l, err := net.Listen("tcp", "127.0.7.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		free = append(free, l.Addr().(*net.TCPAddr).Port)
	}
	c.change = func(k *config.Config) {
		k.MGS.Nodes = nil
		r := &k.Registry
		r.Kind, r.Members, r.ClientPort, r.PeerPort = config.RegistryEmbedded, []string{"a", "b", "c"}, free[0], free[1]
		r.Heartbeat, r.ElectionTimeout, r.Lease = config.Duration(50*time.Millisecond), config.Duration(500*time.Millisecond), config.Duration(2*time.Second)
	}
	return c
}

// leaders are the nodes that say that they lead.
func leaders(nodes ...*Node) (l []*Node) {
	for _, n := range nodes {
		if n.cluster.etcd.election.Leads() {
			l = append(l, n)
		}
	}
	return l
}

// watching waits until the nodes have the table of one that was elected.
func watching(t *testing.T, nodes ...*Node) *Node {
	t.Helper()
	until(t, "the table of targets at all nodes", func() bool {
		for _, n := range nodes {
			if r := n.RecoveryStatus(ctx); !current(&r, len(nodes)) {
				return false
			}
		}
		return len(leaders(nodes...)) == 1
	})
	return leaders(nodes...)[0]
}

// With the registry in etcd there is no MGS: the nodes serve, one of them is elected and
// tells all where targets run; when it stops, another one does. Without a majority of
// etcd's members nobody is elected and nothing can begin, and what is served goes on.
func TestRegistryInEtcd(t *testing.T) {
	c := etcdCell(t)
	a := c.up("a")
	until(t, "what it waits for", func() bool { return strings.Contains(a.Status().Waits, "etcd") })
	b, k := c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	x := create(t, a, "one")
	write(t, a, x, 0, "one", wire.Unstable)
	if got := content(t, b, x.FID); got != "one" {
		t.Fatalf("%q", got)
	}
	lead := watching(t, a, b, k)
	for _, n := range []*Node{a, b, k} {
		if l := n.ListTargets(); len(l) != 3 || l[0].Name != mdtName {
			t.Errorf("targets %+v", l)
		}
		var elected manager.Leader = n.cluster.etcd.election
		if elected.Leads() != (n == lead) || (elected.Term() != 0) != (n == lead) || (n.cluster.table() != nil) != (n == lead) {
			t.Errorf("node %s leads: %v, term %d", n.cluster.name, elected.Leads(), elected.Term())
		}
		if st := n.cluster.ir.Status(); st.Incarnation != lead.cluster.etcd.election.Term() {
			t.Errorf("node %s has the table of term %d", n.cluster.name, st.Incarnation)
		}
	}

	// Two of the three members end, and nothing else does.
	for _, n := range []*Node{a, k} {
		n.cluster.etcd.halt()
		n.cluster.etcd.member.Wait()
	}
	until(t, "the end of leadership", func() bool {
		return len(leaders(a, b, k)) == 0 && b.cluster.table() == nil && a.cluster.table() == nil && k.cluster.table() == nil
	})
	for _, n := range []*Node{a, b} {
		name := "without etcd at " + n.cluster.name
		y := create(t, n, name)
		write(t, n, y, 0, name, wire.FileSync)
		if got := content(t, a, y.FID); got != name {
			t.Errorf("%q", got)
		}
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	_, err := b.reg.Serve(short, netip.MustParseAddr("192.0.2.77"), "b")
	cancel()
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer from the registry") {
		t.Errorf("a new registration: %v", err)
	}
	// What the caller has given up was not given up by etcd, perhaps: it is made once.
	done := make(chan error, 1)
	go func() { done <- b.reg.SetOSTs(ctx, 2) }()
	for _, n := range []*Node{a, k} {
		e := n.cluster.etcd
		member, halt := context.WithCancel(context.Background())
		e.halt = halt
		e.member.Go(func() { e.keepMember(member) })
	}
	if err := <-done; err != nil {
		t.Errorf("a call that waited: %v", err)
	}
	before := watching(t, a, b, k)

	// The elected node stops in order.
	rest := []*Node{a, b, k}
	name := before.cluster.name
	for i, n := range rest {
		if n == before {
			rest = append(rest[:i], rest[i+1:]...)
			break
		}
	}
	term := before.cluster.etcd.election.Term()
	c.down(name, before)
	until(t, "another leader", func() bool {
		return len(leaders(rest...)) == 1 && leaders(rest...)[0].cluster.etcd.election.Term() > term
	})
	until(t, "its table at both", func() bool {
		now := leaders(rest...)
		for _, n := range rest {
			if st := n.cluster.ir.Status(); len(now) != 1 || !st.Connected || st.Incarnation != now[0].cluster.etcd.election.Term() || st.State == ir.StateDisabled {
				return false
			}
		}
		return true
	})
}

// A node that knows a cluster does not begin another one where etcd is empty: it waits
// until its registry is there.
func TestEmptyEtcdIsNotANewCluster(t *testing.T) {
	c := etcdCell(t)
	k := c.conf("b")
	id := strings.Repeat("ab", 16)
	if err := writeMark(k.DataDir+"/"+identityFile, id); err != nil {
		t.Fatal(err)
	}
	one := c.change
	c.change = func(k *config.Config) { one(k); k.Registry.Members = []string{"b"} }
	b := c.up("b")
	s := b.cluster.etcd.client.Storage()
	until(t, "etcd", func() bool { _, _, err := s.Load(ctx); return err == nil })
	until(t, "what the MDT waits for", func() bool { return state(b, mdtName) == "starting" })
	if doc, _, err := s.Load(ctx); doc != nil || err != nil {
		t.Fatalf("%s %v", doc, err)
	}
	doc := fmt.Sprintf(`{"format":1,"client":%q,"generation":3,"next_index":1,"vips":[],"osts":2}`, id)
	if err := s.Replace(ctx, []byte(doc)); err != nil {
		t.Fatal(err)
	}
	// The registry says that the targets were made, so their empty directories are refused.
	until(t, "the refusal of an empty disk", func() bool {
		h := b.cluster.byName[mdtName]
		h.mu.Lock()
		defer h.mu.Unlock()
		return strings.Contains(h.reason, "mount its disk")
	})
}

// Somebody empties etcd under running nodes, or puts another registry there: what is served
// goes on, nothing is written, and with the right document everything goes on.
func TestEtcdIsEmptiedUnderRunningNodes(t *testing.T) {
	c := newFloatCell(t)
	float := c.change
	inEtcd := etcdCell(t)
	c.ports = inEtcd.ports
	c.start = map[string][]string{"c": {mdtName, ostName(0), ostName(1)}}
	c.change = func(k *config.Config) {
		float(k)
		inEtcd.change(k)
		k.Registry.Members = []string{"c"}
	}
	n, a, b := c.serving()
	k := &rpcClient{t: t, at: func() netip.AddrPort { return served(a, b) }}
	defer k.close()
	dir := k.mount()
	fh := k.make(dir, "before")
	verf := k.commit(fh)
	epoch := c.vip(a).Epoch

	s := n.cluster.etcd.client.Storage()
	good, _, err := s.Load(ctx)
	if err != nil || good == nil {
		t.Fatal(err)
	}
	cli, err := clientv3.New(clientv3.Config{Endpoints: etcdEndpoints(t, n), DialTimeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	refused := func() {
		t.Helper()
		for _, x := range []*Node{a, b} { // who watch
			l := x.cluster.etcd.storage
			until(t, "the refusal at "+x.cluster.name, func() bool {
				l.mu.Lock()
				defer l.mu.Unlock()
				return !l.last.IsZero()
			})
		}
	}
	if _, err := cli.Delete(ctx, strings.TrimSuffix(strings.TrimPrefix(s.Name(), "etcd key "), "registry"), clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	refused()
	lost := make(chan struct{})
	go func() {
		defer close(lost)
		a.lostData(a.reg)
	}()
	short, cancel := context.WithTimeout(ctx, time.Second)
	_, aerr := c.reg(b).AddVIP(short, mgs.VIPSpec{Addr: netip.MustParseAddr("127.0.9.8"), Bits: 32})
	cancel()
	if !errors.Is(aerr, context.DeadlineExceeded) {
		t.Errorf("a change: %v", aerr)
	}
	k.make(dir, "meanwhile")
	if st, o := addressState(a), c.net.Owners(floatAddr); st != vipagent.Serving || len(o) != 1 || o[0] != "a" {
		t.Errorf("the address is %s, at %v", st, o)
	}
	if doc, _, err := s.Load(ctx); doc != nil || err != nil {
		t.Errorf("%s, %v", doc, err)
	}
	select {
	case <-lost:
		t.Error("new verifiers are there, which are nowhere")
	default:
	}

	other := fmt.Sprintf(`{"format":1,"client":%q,"generation":3,"next_index":1,"vips":[],"osts":2}`, strings.Repeat("ab", 16))
	if err := s.Swap(ctx, 0, []byte(other)); err != nil {
		t.Fatal(err)
	}
	k.make(dir, "with another registry")
	if doc, _, err := s.Load(ctx); string(doc) != other || err != nil {
		t.Errorf("%s, %v", doc, err)
	}
	if _, err := cli.Delete(ctx, strings.TrimPrefix(s.Name(), "etcd key ")); err != nil {
		t.Fatal(err)
	}

	if _, err := ImportRegistry(ctx, n.cfg, n.log, good, false); err != nil {
		t.Fatal(err)
	}
	<-lost
	if now := k.commit(fh); now == verf {
		t.Error("the write verifier is the old one")
	}
	c.assign(a, "b")
	c.become(b, vipagent.Serving)
	if v := c.vip(a); v.Node != "b" || v.Epoch != epoch+1 || v.NSMState != 1 {
		t.Errorf("%+v", v)
	}
	k.make(dir, "after")
}

func etcdEndpoints(t *testing.T, n *Node) []string {
	t.Helper()
	peers, err := EtcdPeers(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	return etcd.Endpoints(peers, n.cluster.name, false)
}
