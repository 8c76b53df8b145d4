package vipagent

import (
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

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
		a := New(Options{Node: "n1", Net: m})
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
		k.s.state = Serving
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
