package node

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/baton-nfs/baton/internal/node/unit"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// Nothing is left of a unit that is given up while its period of service begins: a
// take-over does not wait for a target that does not answer.
func TestGivenUpWhileItBegins(t *testing.T) {
	n := start(t, conf(t, t.TempDir()))
	addr := netip.MustParseAddr("127.0.9.3")
	begin := func(deps *unit.Deps, finish func(*unit.Unit)) error {
		t.Helper()
		u := deps.New(addr)
		if err := u.Listen(false); err != nil {
			t.Fatal(err)
		}
		v, err := n.takeAddress(ctx, addr)
		if err != nil {
			t.Fatal(err)
		}
		finish(u)
		err = u.Begin(ctx, v, false)
		if slices.Contains(n.serving(), u) {
			t.Error("it is still among those that serve")
		}
		return err
	}
	ended := 0
	deps := *n.deps
	deps.Ended = func(u *unit.Unit) {
		ended++
		n.ended(u)
	}
	if err := begin(&deps, func(u *unit.Unit) { u.Finish(ctx) }); err == nil || ended != 0 {
		t.Errorf("given up before: %v, ended %d times", err, ended)
	}
	deps.Begun = func(ctx context.Context, u *unit.Unit) error {
		u.Finish(ctx)
		return n.begun(ctx, u)
	}
	if begin(&deps, func(*unit.Unit) {}); ended != 1 {
		t.Errorf("given up meanwhile: ended %d times", ended)
	}
}

// A unit that begins has the verifier that the registry has by then: data may have been
// lost since its period of service was given, and what was lost before that is in it.
func TestVerifierOfAUnitThatBegins(t *testing.T) {
	c := newCell(t)
	c.up("c")
	b := c.up("b")
	c.ready(b)
	c.all(b)
	addr := netip.MustParseAddr("127.0.9.4")
	for _, lost := range []string{"never", "before", "while it listens", "meanwhile"} {
		when := func(x string) {
			if x == lost {
				b.lostData(b.reg)
			}
		}
		when("before")
		u := b.deps.New(addr)
		if err := u.Listen(false); err != nil {
			t.Fatal(err)
		}
		when("while it listens")
		v, err := b.takeAddress(ctx, addr)
		if err != nil {
			t.Fatal(err)
		}
		when("meanwhile")
		if err := u.Begin(ctx, v, false); err != nil {
			t.Fatal(err)
		}
		l := vips(t, b.reg)
		i := slices.IndexFunc(l, func(x mgs.VIP) bool { return x.Index == v.Index })
		if got, want := u.NFS().Verifier(), l[i].VerifierBytes(); got != want {
			t.Errorf("data are lost %s: verifier %x, registered %x", lost, got, want)
		}
		if lost == "meanwhile" && u.NFS().Verifier() == v.VerifierBytes() {
			t.Error("nothing has changed")
		}
		if err := u.Finish(ctx); err != nil {
			t.Error(err)
		}
		if err := b.reg.Stopped(ctx, v.Index, v.Epoch); err != nil {
			t.Fatal(err)
		}
	}
}
