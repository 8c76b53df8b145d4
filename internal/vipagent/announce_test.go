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

// silentRegistry does not answer.
type silentRegistry struct{ Registry }

func (silentRegistry) Watch(ctx context.Context, _ string) (mgs.View, error) {
	<-ctx.Done()
	return mgs.View{}, ctx.Err()
}

// A machine that was cut off hears the others again, too. What it has lost meanwhile it
// does not draw to itself, whether the registry says so or somebody's beat; nor what it may
// have lost.
func TestAnnounceAfterCutOff(t *testing.T) {
	lost := func(name string, silent bool, lose func(b *bed, v mgs.VIP), want int) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t)
				b.assign("a")
				v, err := b.reg.Take(t.Context(), b.vip().Index, b.vip().MoveID)
				if err != nil {
					t.Fatal(err)
				}
				at := vip.Address{Prefix: netip.PrefixFrom(addr, v.Bits), Interface: v.Interface}
				if err := b.net.Add(t.Context(), at); err != nil {
					t.Fatal(err)
				}
				k := newKeeper(b.a, &v)
				k.s.state, k.s.epoch, k.s.began, k.at = Serving, v.Epoch, v.Epoch, at
				b.a.keepers[v.Index] = k
				if silent {
					b.a.o.Registry = silentRegistry{}
				}
				n := 0
				b.net.On(viptest.Announce, func(context.Context, netip.Addr) error {
					n++
					return nil
				})
				lose(b, v)
				b.a.Announce()
				b.a.wg.Wait()
				if n != want {
					t.Errorf("announced %d times, want %d", n, want)
				}
				b.a.cancel()
			})
		})
	}
	lost("nothing", false, func(*bed, mgs.VIP) {}, len(announcePauses))
	lost("no registry", true, func(*bed, mgs.VIP) {}, 0)
	lost("by the registry", false, func(b *bed, v mgs.VIP) {
		if err := b.reg.Abandoned(b.ctx, v.Index, v.Epoch); err != nil {
			b.t.Fatal(err)
		}
		b.assign("b")
		if _, err := b.reg.Take(b.ctx, v.Index, b.vip().MoveID); err != nil {
			b.t.Fatal(err)
		}
	}, 0)
	lost("by a beat", false, func(b *bed, v mgs.VIP) { b.a.Superseded(v.Index, v.Epoch+1) }, 0)
}
