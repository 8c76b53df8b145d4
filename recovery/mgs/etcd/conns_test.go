package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// relay passes connections on to a member until the machine behind it falls silent:
// from then on those that are open carry nothing, and are not closed.
type relay struct {
	net.Listener
	to     string
	mu     sync.Mutex
	conns  []net.Conn
	silent bool
	wg     sync.WaitGroup
}

func newRelay(t *testing.T, to netip.AddrPort) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l, to: to.String()}
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m, err := net.Dial("tcp", r.to)
			if err != nil {
				c.Close()
				continue
			}
			r.mu.Lock()
			r.silent = false // a new connection passes
			quiet := &quiet{r: r}
			r.conns = append(r.conns, c, m)
			r.mu.Unlock()
			r.wg.Go(func() { io.Copy(quiet.over(m), c) })
			r.wg.Go(func() { io.Copy(quiet.over(c), m) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.mu.Lock()
		for _, c := range r.conns {
			c.Close()
		}
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

// quiet is one connection of a relay; it loses everything once it is silenced.
type quiet struct {
	r    *relay
	gone bool
}

type lossy struct {
	q *quiet
	w io.Writer
}

func (q *quiet) over(w io.Writer) io.Writer { return lossy{q, w} }

func (l lossy) Write(b []byte) (int, error) {
	l.q.r.mu.Lock()
	if l.q.r.silent {
		l.q.gone = true
	}
	gone := l.q.gone
	l.q.r.mu.Unlock()
	if gone {
		return len(b), nil
	}
	return l.w.Write(b)
}

func (r *relay) addr() netip.AddrPort { return netip.MustParseAddrPort(r.Addr().String()) }

// A member's machine falls silent: what is asked there and watched there waits until
// its connection is cut.
func TestCut(t *testing.T) {
	t.Parallel()
	c, direct := one(t)
	r := newRelay(t, c.peers[0].Client)
	x := c.client("n1", func(o *Options) {
		o.Endpoints, o.Timeout, o.Probe = []string{"http://" + r.Addr().String()}, patience, time.Hour
	})
	s := x.Storage()
	if err := s.Swap(ctx, 0, []byte("one")); err != nil {
		t.Fatal(err)
	}
	_, rev, err := s.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	waited, asked := make(chan error, 1), make(chan error, 1)
	go func() { waited <- s.Wait(ctx, rev) }()
	r.mu.Lock()
	r.silent = true
	r.mu.Unlock()
	go func() {
		_, _, err := s.Load(ctx)
		asked <- err
	}()
	if err := direct.Storage().Swap(ctx, rev, []byte("two")); err != nil {
		t.Fatal(err)
	}
	if n := x.Cut(netip.MustParseAddrPort("192.0.2.1:7989")); n != 0 {
		t.Errorf("%d connections to somebody else were cut", n)
	}
	select {
	case err := <-asked:
		t.Fatalf("a silent member answered: %v", err)
	case <-time.After(50 * time.Millisecond): // nothing tells that an answer does not come
	}
	if n := x.Cut(r.addr()); n != 1 {
		t.Errorf("%d connections were cut", n)
	}
	if err := <-asked; err != nil {
		t.Errorf("the request was not sent again: %v", err)
	}
	if err := <-waited; err != nil {
		t.Errorf("the watch did not go on: %v", err)
	}
}

// The tenure of a leader that is dead for certain is ended before its lease; one of an
// earlier term is left alone.
func TestDepose(t *testing.T) {
	t.Parallel()
	c, _ := one(t)
	run := map[string]*Election{}
	for _, n := range []string{"a", "b"} {
		e, err := c.client("n1", nil).NewElection(ElectionOptions{Node: n, TTL: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		run[n] = e
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, e := range run {
		wg.Go(func() { e.Run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	var first string
	eventually(t, "somebody leads, and knows it", func() error {
		for n, e := range run {
			if l, _ := e.Leader(); l == n && e.Leads() {
				first = n
				return nil
			}
		}
		return errors.New("nobody does")
	})
	other := map[string]string{"a": "b", "b": "a"}[first]
	_, term := run[first].Leader()
	if err := run[other].Depose(ctx, term+1000); err != nil {
		t.Fatal(err)
	}
	if n, k := run[first].Leader(); n != first || k != term || !run[first].Leads() {
		t.Fatalf("deposed by the number of another term: %s %d", n, k)
	}
	changed := run[first].Changed()
	if err := run[other].Depose(ctx, term); err != nil {
		t.Fatal(err)
	}
	<-changed // it knows
	eventually(t, "another term", func() error {
		for _, e := range run {
			if n, k := e.Leader(); n == "" || k <= term {
				return fmt.Errorf("%s leads in term %d", n, k)
			}
		}
		if !run["a"].Leads() && !run["b"].Leads() {
			return errors.New("who leads does not know it yet")
		}
		return nil
	})
	if err := run[other].Depose(ctx, term); err != nil {
		t.Errorf("a tenure that has ended: %v", err)
	}
	if run["a"].Leads() && run["b"].Leads() {
		t.Error("both lead")
	}
}
