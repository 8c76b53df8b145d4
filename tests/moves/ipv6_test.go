package moves

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/moves/rig"
)

// TestMovesIPv6 moves an IPv6 address there and back, cuts the power of who has it and
// moves it once more, while a kernel client that has mounted it by tcp6 writes, makes and
// removes files, and counts under a lock; it sees what the clients of TestMoves see.
func TestMovesIPv6(t *testing.T) {
	a := rig.Six(rig.VIP(0))
	w := newWorldOf(t, a)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	w.boot(ctx, 6, rig.ClientConfig{Name: "six", VIP: a, With: "seq,storm,lock", Flags: "-counters " + counter(a)})
	w.moving(ctx, w.clients, time.Now())
	s := &schedule{w: w, stalls: map[string][]time.Duration{}}
	first := w.mover.Owner(a)
	others := make([]string, 0, 2)
	for _, n := range w.mover.Nodes() {
		if n != first {
			others = append(others, n)
		}
	}
	s.move(ctx, a, others[0], true)
	s.move(ctx, a, first, true)
	s.kill(ctx, first, others[0], time.Second)
	s.verify(ctx)
	s.move(ctx, a, first, true)
	s.verify(ctx)
	// The mount is of this family, and all of it: nothing has gone by IPv4.
	if peers := w.peers(a); len(peers) == 0 {
		t.Error("nobody is connected to the address")
	} else if p, err := netip.ParseAddrPort(peers[0]); err != nil || p.Addr() != rig.Six(rig.GuestAddr(0)) {
		t.Errorf("connected are %v (%v)", peers, err)
	}
	w.finish(ctx)
}
