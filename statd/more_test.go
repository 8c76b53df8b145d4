package statd

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

func TestJudge(t *testing.T) {
	from := netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		hosts string // "NAME=STATE"
		name  string
		state uint32
		want  string // names acted on
		v     verdict
	}{
		{"", "a", 3, "", unmonitored},
		{"a=0", "a", 0, "", noState},
		{"a=0", "a", 3, "a", actOn},
		{"a=3", "a", 3, "", sameState},
		{"a=5", "a", 3, "a", actOn}, // numbers may go back when a host is installed anew
		{"a=0", "other", 3, "a", actOn},
		{"a=0 b=0", "other", 3, "", ambiguous},
		{"a=0 b=0", "", 3, "", ambiguous},
		{"a=0 b=0", "B.example", 3, "b", actOn},
		{"a=3 b=0", "a", 3, "", sameState},
		{"a=0 a.example=0", "other", 3, "a a.example", actOn}, // one host's two names
		{"a=3 a.example=0", "a.example", 3, "a.example", actOn},
		{"a.one=0 a.two=0", "a", 3, "", ambiguous},
		{"a.one=0 a.two=0", "a.one.", 3, "a.one", actOn},
		{"a.one=0 a.two=0", "a.three", 3, "", ambiguous},
		{"a=0 a.one=0 a.two=0", "a.one", 3, "a a.one", actOn},
		{"10.0.0.1=0 10.0.0.2=0", "10.0.0.2", 3, "10.0.0.2", actOn},
		{"10.0.0.1=0 10.0.0.2=0", "10", 3, "", ambiguous},
		{"192.0.2.1=0", "a", 3, "192.0.2.1", actOn},
		{"192.0.2.1=0 a=0", "b", 3, "192.0.2.1 a", actOn},
		{"192.0.2.1=0 a=0 b=0", "b", 3, "192.0.2.1 b", actOn},
		{"192.0.2.1=0 a=0 b=0", "c", 3, "192.0.2.1", ambiguous}, // who monitors the address is told
	} {
		var at []*wire.MonitoredHost
		for _, f := range bytes.Fields([]byte(c.hosts)) {
			name, state, _ := bytes.Cut(f, []byte("="))
			h := &wire.MonitoredHost{Host: wire.LockHost{Addr: from, Name: string(name)}}
			fmt.Sscan(string(state), &h.State)
			at = append(at, h)
		}
		acts, v := judge(at, from, &nsm.StatChge{MonName: c.name, State: c.state})
		got := ""
		for i, h := range acts {
			if i > 0 {
				got += " "
			}
			got += h.Host.Name
		}
		if got != c.want || v != c.v {
			t.Errorf("%q, NOTIFY %q %d: acts on %q, verdict %d; want %q, %d", c.hosts, c.name, c.state, got, v, c.want, c.v)
		}
	}
}

func FuzzNote(f *testing.F) {
	b, _ := encodeNote([]monitor{{nlm, [16]byte{1}}, {nlm1, [16]byte{2}}})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		ms := decodeNote(b)
		if again, err := encodeNote(ms); err == nil && !cmp.Equal(ms, decodeNote(again), cmp.AllowUnexported(monitor{})) && len(ms) > 0 {
			t.Errorf("%v", ms)
		}
	})
}

// caller is a program that answers after a time.
type caller struct {
	f func(ctx context.Context) error
}

func (c caller) Call(ctx context.Context, _ uint32, _ []byte) ([]byte, error) { return nil, c.f(ctx) }
func (caller) Close() error                                                   { return nil }

// TestManyHosts runs a whole notifier on a clock of its own: of 5,000 hosts a
// third is dead.
func TestManyHosts(t *testing.T) {
	const n, slots, latency = 5000, 256, 5 * time.Millisecond
	tb := &table{}
	live := 0
	for i := range n {
		if i%3 != 0 {
			live++
		}
		tb.hosts = append(tb.hosts, holder(fmt.Sprintf("10.0.%d.%d", i/250, i%250), fmt.Sprint("h", i), 1))
	}
	index := map[netip.Addr]int{}
	for i, h := range tb.hosts {
		index[h.Host.Addr] = i
	}
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now, most := 0, 0
		lastTold := time.Time{}
		enter := func(d int) {
			mu.Lock()
			defer mu.Unlock()
			now += d
			most = max(most, now)
		}
		s, err := New(Config{
			Table: tb, Slots: slots,
			Portmap: func(ctx context.Context, local, host netip.Addr, _, _ uint32, _ string) (uint16, error) {
				if local != netip.MustParseAddr(vipAddr) {
					t.Errorf("asked from %v", local)
				}
				enter(1)
				if index[host]%3 == 0 {
					<-ctx.Done()
					enter(-1)
					return 0, ctx.Err()
				}
				return 1, nil
			},
			Dial: func(context.Context, string, netip.Addr, netip.AddrPort, uint32, uint32) (Caller, error) {
				return caller{func(context.Context) error {
					time.Sleep(latency)
					enter(-1)
					mu.Lock()
					lastTold = time.Now()
					mu.Unlock()
					return nil
				}}, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		a := s.Address(netip.MustParseAddr(vipAddr), testVIP, 4, 3)
		start := time.Now()
		a.Start()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		bound := time.Duration((n-live)/slots+1)*firstShare + time.Duration(n/slots+1)*latency
		if p := a.Progress(); p.Total != n || p.Notified != live || p.Pending != n-live || p.Failed != 0 || !p.FinishedAt.IsZero() {
			t.Errorf("after 3 s: %+v", p)
		}
		if d := lastTold.Sub(start); d > bound {
			t.Errorf("a host waited %v, bound %v", d, bound)
		}
		time.Sleep(25 * time.Minute)
		synctest.Wait()
		if p := a.Progress(); p.Notified != live || p.Pending != 0 || p.Failed != n-live || p.FinishedAt.IsZero() || len(p.Errors) != maxErrors {
			t.Errorf("in the end: %+v", p)
		}
		if most > slots {
			t.Errorf("%d attempts at a time, %d allowed", most, slots)
		}
		if err := a.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		for i, h := range tb.hosts {
			if (h.Notified == 3) != (i%3 != 0) {
				t.Fatalf("%v: notified of %d", h.Host, h.Notified)
			}
		}
	})
}

// TestStopInTheMiddle ends a notifier whose hosts are all dead but one, and whose table
// is gone when the one that is not has been told.
func TestStopInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{}
		for i := range 1000 {
			tb.hosts = append(tb.hosts, holder(fmt.Sprintf("10.0.%d.%d", i/250, i%250), "h", 1))
		}
		s, err := New(Config{Table: tb, Portmap: func(ctx context.Context, _, host netip.Addr, _, _ uint32, _ string) (uint16, error) {
			if host != tb.hosts[0].Host.Addr {
				<-ctx.Done()
				return 0, ctx.Err()
			}
			tb.set(func() { tb.down = true })
			return 1, nil
		}, Dial: func(context.Context, string, netip.Addr, netip.AddrPort, uint32, uint32) (Caller, error) {
			return caller{func(context.Context) error { return nil }}, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		a := s.Address(netip.MustParseAddr(vipAddr), testVIP, 4, 3)
		a.Start()
		time.Sleep(500 * time.Millisecond)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.Stop(ctx); err != nil || time.Since(start) > time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestEndCalls: no connection to a client is left, though the table does not answer.
func TestEndCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{hosts: []wire.MonitoredHost{holder("10.0.0.1", "h", 1)}}
		called, closed := false, false
		s, err := New(Config{Table: tb, Portmap: func(context.Context, netip.Addr, netip.Addr, uint32, uint32, string) (uint16, error) {
			return 1, nil
		}, Dial: func(context.Context, string, netip.Addr, netip.AddrPort, uint32, uint32) (Caller, error) {
			return closer{caller{func(ctx context.Context) error {
				called = true
				<-ctx.Done()
				return ctx.Err()
			}}, &closed}, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		a := s.Address(netip.MustParseAddr(vipAddr), testVIP, 4, 3)
		if err := a.EndCalls(t.Context()); err != nil {
			t.Error(err)
		}
		a = s.Address(netip.MustParseAddr(vipAddr), testVIP, 4, 3)
		a.Start()
		synctest.Wait()
		tb.set(func() { tb.down = true })
		began := time.Now()
		if err := a.EndCalls(t.Context()); err != nil || !called || !closed || time.Since(began) != 0 {
			t.Errorf("%v; called %v, closed %v, after %v", err, called, closed, time.Since(began))
		}
		if err := a.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

type closer struct {
	caller
	closed *bool
}

func (c closer) Close() error {
	*c.closed = true
	return nil
}
