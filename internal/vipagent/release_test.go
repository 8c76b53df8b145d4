package vipagent

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// For one address the last call counts, also if it comes while the address is still being
// given up: the release hears of the take at once, and does not forbid it later.
func TestTakeWhileReleased(t *testing.T) {
	b := newBed(t)
	draining, drained := make(chan struct{}, 1), make(chan struct{})
	b.a.o.New = func(a netip.Addr) Unit {
		u := newPlain(a).(*plain)
		u.drain = func(context.Context) {
			draining <- struct{}{}
			<-drained
		}
		return u
	}
	b.a.o.Deadlines.Drain = patience
	b.start()
	b.until("the address is known", func() bool { return b.a.find(addr) != nil })
	k := b.a.find(addr)
	take := func() error {
		_, err := b.a.TakeVIP(b.ctx, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe})
		return err
	}
	if err := take(); err != nil {
		t.Fatal(err)
	}
	released, taken := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := b.a.ReleaseVIP(b.ctx, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish})
		released <- err
	}()
	<-draining
	first := k.registry().MoveID
	go func() { taken <- take() }()
	select {
	case err := <-released:
		if err == nil || !strings.Contains(err.Error(), "again meanwhile") {
			t.Errorf("the release: %v", err)
		}
	case <-b.ctx.Done():
		t.Fatal("the release does not hear of the take")
	}
	k.bar(first) // as a release that has not heard of it would
	close(drained)
	if err := <-taken; err != nil {
		t.Error(err)
	}
	b.become(Serving)
	// Whoever else is to have it is not waited for.
	b.assign("b")
	if v := b.vip(); k.bar(first) < v.MoveID {
		b.until("the assignment is known", func() bool { return k.bar(first) == v.MoveID })
	}
	b.become(Absent)
}
