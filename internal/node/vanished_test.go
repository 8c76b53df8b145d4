package node

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

// An address that vanishes from the machine of its node comes back there; if it cannot,
// another node takes it, after an orderly end.
func TestFloatingAddressVanishes(t *testing.T) {
	c := newFloatCell(t).managed()
	k, a, b := c.up("c"), c.up("a"), c.up("b")
	c.ready(a)
	c.ready(b)
	if _, err := c.reg(k).AddVIP(ctx, mgs.VIPSpec{Addr: floatAddr, Bits: 32, Interface: "lo", Prefer: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	c.become(a, vipagent.Serving)
	epoch := c.vip(k).Epoch
	machine := c.net.Machine("a")
	vanish := func() {
		t.Helper()
		if err := machine.Remove(ctx, vip.Address{Prefix: netip.PrefixFrom(floatAddr, 32), Interface: "lo"}); err != nil {
			t.Fatal(err)
		}
	}
	// Those that repeat the first one may be due while it is away.
	machine.On(viptest.Announce, func(context.Context, netip.Addr) error {
		if has, err := machine.Has(floatAddr); err != nil || !has {
			return errors.New("the address is away")
		}
		return nil
	})
	vanish()
	until(t, "the address to come back", func() bool { return c.net.Reaches(floatAddr) == "a" })
	if v := c.vip(k); v.Epoch != epoch || v.Node != "a" {
		t.Errorf("%+v, want epoch %d still", v, epoch)
	}
	machine.Fail(viptest.Add, errors.New("the interface is gone"), 1<<20)
	vanish()
	c.become(b, vipagent.Serving)
	if v := c.vip(k); v.Node != "b" || v.NSMState != 1 {
		t.Errorf("%+v: it was to be given up in order", v)
	}
	until(t, "clients to reach b", func() bool { return c.net.Reaches(floatAddr) == "b" })
}
