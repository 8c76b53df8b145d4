package node

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/baton-nfs/baton/internal/node/unit"
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
