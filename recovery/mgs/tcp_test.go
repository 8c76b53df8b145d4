package mgs

import (
	"context"
	"net"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// The registry fails over between two nodes that see its directory, over real
// connections with certificates. (CS 27a, CS 121, SM 141)
func TestOverTCP(t *testing.T) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	certs, dir := t.TempDir(), t.TempDir()
	auth, err := ca.Create(certs, "test", ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	nodes := map[string]*ca.Node{}
	for _, n := range []string{"n1", "n2", "n3"} {
		if err := auth.IssueNode(certs, n, ca.Options{}); err != nil {
			t.Fatal(err)
		}
		if nodes[n], err = ca.LoadNode(certs, n); err != nil {
			t.Fatal(err)
		}
	}
	// n1 and n2 have their ports from the start.
	addrs, listeners := map[string]string{}, map[string]net.Listener{}
	for _, n := range []string{"n1", "n2"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addrs[n], listeners[n] = l.Addr().String(), l
	}
	r, err := NewRemote(RemoteOptions{
		Node: "n3", Addrs: []string{"n1", "n2"}, Attempt: 5 * time.Second, BackoffMin: 5 * time.Millisecond, BackoffMax: 50 * time.Millisecond,
		Dial: func(ctx context.Context, node string) (wire.Conn, error) {
			c, err := tcp.Dial(ctx, tcp.DialOptions{Addrs: []tcp.Endpoint{{Addr: addrs[node], Node: node}}, Target: "MGS", Node: "n3", TLS: nodes["n3"].Client(node)})
			if err != nil {
				return nil, err // not a nil *tcp.Conn in an interface
			}
			return c, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()

	var wg sync.WaitGroup
	servers := map[string]*tcp.Server{}
	for n, l := range listeners {
		s, err := tcp.NewServer(nil, tcp.ServerOptions{Node: n, TLS: nodes[n].Server()})
		if err != nil {
			t.Fatal(err)
		}
		servers[n] = s
		wg.Go(func() {
			if err := s.Serve(l); err != nil {
				t.Error(err)
			}
		})
	}
	run := func(node string) (stop func()) {
		f, err := Open(dir, FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s := NewService(f.Stored, nil)
		if err := servers[node].SetTarget("MGS", s); err != nil {
			t.Fatal(err)
		}
		return func() {
			s.Close()
			if err := servers[node].StopTarget(ctx, "MGS"); err != nil {
				t.Error(err)
			}
		}
	}
	first := make(chan uint64)
	go func() { // before there is a registry
		_, g, err := r.StartClient(ctx, "n3")
		if err != nil {
			t.Error(err)
		}
		first <- g
	}()
	time.Sleep(20 * time.Millisecond)
	stop := run("n2")
	if g := <-first; g != 1 {
		t.Error(g)
	}
	v, err := r.Serve(ctx, addrA, "n3")
	if err != nil || v.Epoch != 1 {
		t.Fatalf("%+v, %v", v, err)
	}
	f, err := r.AddVIP(ctx, floatSpec(0))
	if err != nil {
		t.Fatal(err)
	}
	seen, err := r.Watch(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	gen := uint64(1)
	for i := range 6 {
		type news struct {
			View
			err error
		}
		watched := make(chan news, 1)
		go func(rev string) {
			w, err := r.Watch(ctx, rev)
			watched <- news{w, err}
		}(seen.Rev)
		stop()
		stop = run([]string{"n1", "n2"}[i%2])
		_, g, err := r.StartClient(ctx, "n3")
		if gen++; err != nil || g != gen {
			t.Fatalf("take-over %d: generation %d, %v", i, g, err)
		}
		// Who watches learns of a change that was made after the take-over.
		if f, err = r.Assign(ctx, f.Index, f.Epoch, []string{"n1", "n2"}[i%2]); err != nil {
			t.Fatal(err)
		}
		w := <-watched
		for w.err == nil && w.Rev == seen.Rev {
			w.View, w.err = r.Watch(ctx, seen.Rev)
		}
		if seen = w.View; w.err != nil || len(w.VIPs) != 2 || w.VIPs[1].MoveID != uint64(i+1) {
			t.Fatalf("take-over %d: %+v", i, w)
		}
		// The address is still n3's.
		l, err := r.VIPs(ctx)
		if err != nil || len(l) != 2 || !reflect.DeepEqual(l[0], v) {
			t.Fatalf("take-over %d: %+v, %v", i, l, err)
		}
	}
	if err := r.Stopped(ctx, v.Index, v.Epoch); err != nil {
		t.Error(err)
	}
	stop()
	for _, s := range servers {
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
}
