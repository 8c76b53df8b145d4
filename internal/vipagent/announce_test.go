package vipagent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

// said is a registry that says what the test wants.
type said struct {
	Registry
	v   mgs.View
	err error
}

func (s *said) Watch(context.Context, string) (mgs.View, error) {
	return mgs.View{VIPs: slices.Clone(s.v.VIPs)}, s.err
}

// A machine that is heard again may have drawn an address to itself: it is announced
// where it is served, and only as long as it is.
func TestAnnounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := viptest.NewNetwork()
		m := n.Machine("n1")
		at := vip.Address{Prefix: netip.MustParsePrefix("192.0.2.10/24")}
		if err := m.Add(t.Context(), at); err != nil {
			t.Fatal(err)
		}
		reg := &said{v: mgs.View{VIPs: []mgs.VIP{{Index: 1, Addr: at.Prefix.Addr(), Node: "n1", Epoch: 4}}}}
		a := New(Options{Node: "n1", Net: m, Registry: reg})
		k := newKeeper(a, &mgs.VIP{Index: 1, Addr: at.Prefix.Addr(), Node: "n1"})
		k.at = at
		a.keepers[1] = k
		count := func() (c int) {
			for _, op := range n.Log() {
				if op.Kind == viptest.Announce {
					c++
				}
			}
			return c
		}
		a.Announce() // not served
		a.wg.Wait()
		if c := count(); c != 0 {
			t.Errorf("an address that is not served was announced %d times", c)
		}
		k.s.state, k.s.epoch = Serving, 4
		for _, x := range []func(*mgs.VIP){
			func(v *mgs.VIP) { v.Node = "n2" },
			func(v *mgs.VIP) { v.Node = "" },
			func(v *mgs.VIP) { v.Epoch = 6 },
			func(v *mgs.VIP) { v.Clean = true },
			func(v *mgs.VIP) { v.Index = 2 },
			func(*mgs.VIP) { reg.err = errors.New("away") },
		} { // this machine was away, and does not know it yet
			now := reg.v.VIPs[0]
			x(&reg.v.VIPs[0])
			a.Announce()
			a.wg.Wait()
			if c := count(); c != 0 {
				t.Errorf("an address that is another's, %+v, was announced %d times", reg.v.VIPs[0], c)
			}
			reg.v.VIPs[0], reg.err = now, nil
		}
		a.Announce()
		a.wg.Wait()
		if c := count(); c != len(announcePauses) {
			t.Errorf("announced %d times", c)
		}
		a.Announce()
		synctest.Wait() // once; then it is given up
		k.become(Releasing, "")
		a.wg.Wait()
		if c := count(); c != len(announcePauses)+1 {
			t.Errorf("announced %d times", c)
		}
		a.cancel()
		a.Announce()
		a.wg.Wait()
		if v := n.Violations(); len(v) > 0 {
			t.Error(v)
		}
	})
}
