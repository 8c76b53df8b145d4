package vipagent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/recovery/mgs"
	netbed "github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

func TestMain(m *testing.M) { netbed.Main(m) }

var at = vip.Address{Prefix: netip.PrefixFrom(addr, 24), Interface: "eth0"}

func (b *bed) has() bool {
	b.t.Helper()
	has, err := b.net.Has(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	return has
}

// An address that somebody has taken from the machine while it is served comes back.
func TestLostAddressComesBack(t *testing.T) {
	b := newBed(t)
	log, err := events.Open(events.Options{Node: "a"})
	if err != nil {
		t.Fatal(err)
	}
	b.a.o.Events = log
	b.start()
	b.assign("a")
	b.become(Serving)
	epoch := b.vip().Epoch
	if err := b.net.Remove(b.ctx, at); err != nil {
		t.Fatal(err)
	}
	b.until("the address is back, and announced", func() bool {
		return b.has() && b.network.Reaches(addr) == "a" && strings.HasSuffix(b.network.Lines(), "a announce 192.0.2.9\n")
	})
	if r := b.a.Reports()[0]; r.State != Serving || r.Epoch != epoch {
		t.Errorf("%+v, want epoch %d", r, epoch)
	}
	b.until("it is in the log", func() bool {
		l, _ := log.Since(0)
		for _, e := range l {
			if e.Kind == events.Node && e.Addr == addr && e.Epoch == epoch && strings.Contains(e.Reason, "has it again") {
				return true
			}
		}
		return false
	})
}

// One that cannot come back is given up in order, and the node says why; when it can
// have it again, and nobody else does, it takes it.
func TestLostAddressIsGivenUp(t *testing.T) {
	b := newBed(t)
	b.a.o.Retry, b.a.o.RetryMax = time.Hour, time.Hour
	b.start()
	b.assign("a")
	b.become(Serving)
	epoch := b.vip().Epoch
	b.net.Fail(viptest.Add, errors.New("the interface is down"), 1<<20)
	if err := b.net.Remove(b.ctx, at); err != nil {
		t.Fatal(err)
	}
	b.become(Failed)
	if r := b.a.Reports()[0]; !strings.Contains(r.Reason, "the interface is down") || r.Stuck || r.Move != b.vip().MoveID {
		t.Errorf("%+v", r)
	}
	if v := b.vip(); !v.Clean || v.Epoch != epoch {
		t.Errorf("not given up in order: %+v", v)
	}
	if n := strings.Count(b.network.Lines(), "interface is down"); n != lookFails {
		t.Errorf("%d tries, want %d", n, lookFails)
	}
	b.net.Fail(viptest.Add, nil, 0)
	b.assign("b")
	b.become(Absent)
	b.assign("a")
	b.become(Serving)
}

// An address is not added, or does not stay, unless it is to be served here.
func TestLostAddressOfOthers(t *testing.T) {
	// lose is called before the look, or when the address is added.
	other := func(b *bed, v mgs.VIP) {
		if err := b.reg.Abandoned(b.ctx, v.Index, v.Epoch); err != nil {
			b.t.Error(err)
		}
		b.assign("b")
		if _, err := b.reg.Stored.Take(b.ctx, v.Index, b.vip().MoveID); err != nil {
			b.t.Error(err)
		}
	}
	for _, x := range []struct {
		what   string
		lose   func(b *bed, k *keeper, v mgs.VIP)
		during bool
		adds   int
		has    bool
	}{
		{"nothing", func(*bed, *keeper, mgs.VIP) {}, false, 1, true},
		{"the registry has given it to another one", func(b *bed, _ *keeper, v mgs.VIP) { other(b, v) }, false, 0, false},
		{"while it is added", func(b *bed, _ *keeper, v mgs.VIP) { other(b, v) }, true, 1, false},
		{"the registry does not answer", func(b *bed, _ *keeper, _ mgs.VIP) { b.a.o.Registry = silentRegistry{} }, false, 0, false},
		{"nor any more", func(b *bed, _ *keeper, _ mgs.VIP) { b.a.o.Registry = silentRegistry{} }, true, 1, false},
		{"a beat tells of another one", func(b *bed, _ *keeper, v mgs.VIP) { b.a.Superseded(v.Index, v.Epoch+1) }, false, 0, false},
		{"while it is added, too", func(b *bed, _ *keeper, v mgs.VIP) { b.a.Superseded(v.Index, v.Epoch+1) }, true, 1, false},
		{"a cluster manager adds it", func(_ *bed, k *keeper, _ mgs.VIP) { k.s.given = true }, false, 0, false},
		{"it is being given up", func(_ *bed, k *keeper, _ mgs.VIP) { k.become(Releasing, "") }, false, 0, false},
		{"it is to be given up", func(b *bed, k *keeper, v mgs.VIP) { k.bar(v.MoveID) }, false, 0, false},
		{"the node stops", func(b *bed, _ *keeper, _ mgs.VIP) { b.a.leave(true) }, false, 0, false},
		{"while it is added, and more", func(b *bed, _ *keeper, _ mgs.VIP) { b.a.leave(true) }, true, 1, false},
	} {
		t.Run(x.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				b.assign("a")
				v, err := b.reg.Take(t.Context(), b.vip().Index, b.vip().MoveID)
				if err != nil {
					t.Fatal(err)
				}
				k := newKeeper(b.a, &v)
				k.s.state, k.s.epoch, k.s.began, k.at = Serving, v.Epoch, v.Epoch, at
				b.a.keepers[v.Index] = k
				g := guard{epoch: v.Epoch}
				adds := 0
				b.net.On(viptest.Add, func(context.Context, netip.Addr) error {
					if adds++; x.during {
						x.lose(b, k, v)
					}
					return nil
				})
				if !x.during {
					x.lose(b, k, v)
				}
				g.look(k)
				if adds != x.adds || b.has() != x.has {
					t.Errorf("added %d times, the machine has it: %v; want %d, %v", adds, b.has(), x.adds, x.has)
				}
				if n := strings.Count(b.network.Lines(), "announce"); n > 0 != x.has {
					t.Errorf("announced %d times", n)
				}
				b.a.cancel()
			})
		})
	}
}

// The same with a kernel: clients reach the addresses again after they were removed, and
// after the interface was down, which takes IPv6 addresses away.
func TestLostAddressOfKernel(t *testing.T) {
	hub, err := netbed.NewNode("hub")
	netbed.Need(t, err)
	t.Cleanup(func() { hub.Close() })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(hub.AddBridge("br0", netip.Prefix{}))
	nodes := map[string]*netbed.Node{}
	for i, name := range []string{"a", "c"} {
		n, err := netbed.NewNode(name)
		netbed.Need(t, err)
		t.Cleanup(func() { n.Close() })
		must(n.Plug(hub, "br0", "p"+name, "eth0", netip.MustParsePrefix(fmt.Sprintf("10.66.0.%d/24", i+1))))
		must(n.AddAddr("eth0", netip.MustParsePrefix(fmt.Sprintf("fd66::%d/64", i+1))))
		nodes[name] = n
	}
	ip := func(args string) {
		t.Helper()
		cmd := netbed.Command("ip", strings.Fields(args)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		must(nodes["a"].Do(cmd.Start))
		if err := cmd.Wait(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, &out)
		}
	}
	b := newBed(t)
	var k *vip.Kernel
	must(nodes["a"].Do(func() (err error) {
		k, err = vip.Open(vip.Options{})
		return err
	}))
	t.Cleanup(func() { must(k.Close()) })
	b.a.o.Net, b.a.runner.Net = k, k
	addrs := []netip.Prefix{netip.MustParsePrefix("10.66.0.50/24"), netip.MustParsePrefix("fd66::50/64")}
	for _, p := range addrs {
		// Without its interface: the network that tells which one goes as well.
		v, err := b.reg.AddVIP(b.ctx, mgs.VIPSpec{Addr: p.Addr(), Bits: p.Bits()})
		must(err)
		_, err = b.reg.Assign(b.ctx, v.Index, v.Epoch, "a")
		must(err)
	}
	b.start()
	served := func() (n int) {
		for _, r := range b.a.Reports() {
			if r.State == Serving {
				n++
			}
		}
		return n
	}
	b.until("both are served", func() bool { return served() == 2 })
	reached := func(p netip.Prefix) bool {
		ctx, cancel := context.WithTimeout(b.ctx, time.Second)
		defer cancel()
		// Nobody listens at that port; the address answers.
		_, err := nodes["c"].DialContext(ctx, "tcp", netip.AddrPortFrom(p.Addr(), 9).String())
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	all := func(what string) {
		t.Helper()
		b.until(what, func() bool { return reached(addrs[0]) && reached(addrs[1]) && served() == 2 })
	}
	all("at first")
	epochs := func() (l []uint64) {
		for _, r := range b.a.Reports() {
			l = append(l, r.Epoch)
		}
		return l
	}
	before := epochs()
	for range 2 { // the second time nothing of the machine's own is left
		ip("addr del 10.66.0.50/24 dev eth0")
		ip("addr del fd66::50/64 dev eth0")
		all("removed by hand")
		ip("link set eth0 down")
		ip("link set eth0 up")
		all("the interface was down")
	}
	if e := epochs(); !slices.Equal(e, before) {
		t.Errorf("epochs %v, were %v", e, before)
	}
	// As long as it is down the IPv6 address cannot be here.
	ip("link set eth0 down")
	b.until("it has failed", func() bool {
		for _, r := range b.a.Reports() {
			if r.Addr == addrs[1].Addr() && r.State == Failed {
				return strings.Contains(r.Reason, "interface")
			}
		}
		return false
	})
	ip("link set eth0 up")
	ip("addr add fd66::1/64 dev eth0")
	all("the interface is up again")
}
