package viptest

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/baton-nfs/baton/vip"
	"github.com/google/go-cmp/cmp"
)

var (
	addr = netip.MustParseAddr("192.0.2.1")
	a1   = vip.Address{Prefix: netip.PrefixFrom(addr, 24)}
	conn = vip.Conn{Local: netip.AddrPortFrom(addr, 2049), Remote: netip.MustParseAddrPort("192.0.2.9:700")}
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A planned move in the right order leaves no violation, and the log tells it.
func TestMove(t *testing.T) {
	n := NewNetwork()
	a, b := n.Machine("a"), n.Machine("b")
	ctx := t.Context()
	must(t, a.Add(ctx, a1))
	must(t, a.Announce(a1))
	if got := n.Reaches(addr); got != "a" {
		t.Errorf("reaches %q", got)
	}
	listen := vip.Socket{Conn: vip.Conn{Local: conn.Local}, Network: "tcp", State: "LISTEN"}
	a.SetSockets(addr, listen, vip.Socket{Conn: conn, Network: "tcp", State: "ESTAB"})
	count, err := a.Destroy(ctx, addr)
	must(t, err)
	if count != 1 {
		t.Errorf("destroyed %d, want 1", count)
	}
	if s, err := a.Sockets(addr); err != nil || !slices.Equal(s, []vip.Socket{listen}) {
		t.Errorf("sockets %v, %v", s, err)
	}
	must(t, a.Remove(ctx, a1))
	if got := n.Reaches(addr); got != "" {
		t.Errorf("reaches %q without owner", got)
	}
	must(t, b.Add(ctx, a1))
	must(t, b.Announce(a1))
	must(t, b.Tickle(a1, []vip.Conn{conn}))
	if v := n.Violations(); v != nil {
		t.Errorf("violations %q", v)
	}
	if got := n.Owners(addr); !slices.Equal(got, []string{"b"}) || n.Reaches(addr) != "b" {
		t.Errorf("owners %v, reaches %q", got, n.Reaches(addr))
	}
	if got := b.Tickled(); !slices.Equal(got, []vip.Conn{conn}) {
		t.Errorf("tickled %v", got)
	}
	want := `a add 192.0.2.1
a announce 192.0.2.1
a destroy 192.0.2.1 1
a remove 192.0.2.1
b add 192.0.2.1
b announce 192.0.2.1
b tickle 192.0.2.1 1
`
	if d := cmp.Diff(want, n.Lines()); d != "" {
		t.Error(d)
	}
}

func TestViolations(t *testing.T) {
	n := NewNetwork()
	a, b := n.Machine("a"), n.Machine("b")
	ctx := t.Context()
	must(t, a.Add(ctx, a1))
	a.Isolate(true)
	b.SetSockets(addr, vip.Socket{Conn: conn, Network: "tcp", State: "FIN-WAIT-1"})
	must(t, b.Add(ctx, a1))
	must(t, b.Tickle(a1, []vip.Conn{conn}))
	a.Isolate(false)
	must(t, a.Remove(ctx, a1))
	if err := a.Announce(a1); err == nil {
		t.Error("an absent address was announced")
	}
	want := []string{
		"192.0.2.1 is added at b, which has a stale socket of it: 192.0.2.1:2049 to 192.0.2.9:700 FIN-WAIT-1",
		"b tickles clients of 192.0.2.1 before it has announced it",
		"192.0.2.1 is at a and b",
		"192.0.2.1 is announced by a, which does not have it",
	}
	if d := cmp.Diff(want, n.Violations()); d != "" {
		t.Error(d)
	}
}

func TestFailuresAndHooks(t *testing.T) {
	n := NewNetwork()
	a := n.Machine("a")
	boom := errors.New("boom")
	a.Fail(Add, boom, 1)
	if err := a.Add(t.Context(), a1); !errors.Is(err, boom) {
		t.Errorf("first add: %v", err)
	}
	if has, err := a.Has(addr); has || err != nil {
		t.Errorf("a failed add had an effect: %v, %v", has, err)
	}
	must(t, a.Add(t.Context(), a1))

	ctx, cancel := context.WithCancel(t.Context())
	a.On(Remove, func(ctx context.Context, got netip.Addr) error {
		if got != addr {
			t.Errorf("hook of %v", got)
		}
		cancel()
		<-ctx.Done()
		return nil
	})
	if err := a.Remove(ctx, a1); !errors.Is(err, context.Canceled) {
		t.Errorf("remove: %v", err)
	}
	if has, _ := a.Has(addr); !has {
		t.Error("a broken off remove had an effect")
	}
}

// What one process has added, the next one finds; what others gave stays theirs.
func TestRestart(t *testing.T) {
	n := NewNetwork()
	a := n.Machine("a")
	must(t, a.Add(t.Context(), a1))
	other := vip.Address{Prefix: netip.MustParsePrefix("192.0.2.2/24")}
	a.Give(other)
	must(t, a.Add(t.Context(), other))
	must(t, a.Close())
	if _, err := a.Has(addr); err == nil {
		t.Error("a closed handle works")
	}
	a = n.Machine("a")
	if got, err := a.Added(); err != nil || !slices.Equal(got, []vip.Address{a1}) {
		t.Errorf("added %v, %v", got, err)
	}
	a.PowerOff()
	if got, err := a.Added(); err != nil || len(got) != 0 {
		t.Errorf("after a boot: %v, %v", got, err)
	}
}
