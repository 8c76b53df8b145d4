package node

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

func lock(t *testing.T, n *Node, f wire.FID, host byte, start, end uint64, reclaim bool) wire.Status {
	t.Helper()
	v := vips(t, n.reg)[0]
	req := wire.Request{Header: wire.Header{Op: wire.OpLock, Flags: wire.FlagWaitCommit}, FID: f, Lock: &wire.LockArgs{
		Owner:     wire.LockOwner{LockHost: wire.LockHost{Addr: netip.AddrFrom4([4]byte{127, 0, 0, host}), Name: "c" + string('0'+rune(host))}, Svid: 1},
		Range:     wire.LockRange{Start: start, End: end},
		Exclusive: true, Monitor: true, Reclaim: reclaim,
	}}
	var rep wire.Reply
	n.fs.Call(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}, &req, &rep)
	return rep.Status
}

func lockStatus(t *testing.T, n *Node) status.LockService {
	t.Helper()
	s := n.Status()
	if len(s.Locks) != 1 {
		t.Fatalf("lock services of %d addresses, want 1", len(s.Locks))
	}
	return s.Locks[0]
}

func wantLock(t *testing.T, got, want wire.Status) {
	t.Helper()
	if got != want {
		t.Fatalf("%v, want %v", got, want)
	}
}

// After an orderly stop locks are as before and nobody is told anything; after a
// kill they have to be confirmed, and clients hear of a new state.
func TestLocksOverRestarts(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	f := create(t, n, "f").FID
	wantLock(t, lock(t, n, f, 2, 0, 9, false), wire.OK)
	wantLock(t, lock(t, n, f, 3, 5, 5, false), wire.ErrLockDenied)
	first := lockStatus(t, n)
	if first.Granted != 1 || first.Hosts != 1 || first.NSMState%2 != 1 {
		t.Fatalf("%+v", first)
	}
	stop(t, n)
	n = start(t, c)
	if s := lockStatus(t, n); s.NSMState != first.NSMState || s.Granted != 1 || s.Unconfirmed != 0 || s.Notify.Total != 0 {
		t.Fatalf("after an orderly stop: %+v", s)
	}
	n = killed(t, c)
	s := lockStatus(t, n)
	if s.NSMState != first.NSMState+2 || s.Granted != 0 || s.Unconfirmed != 1 || s.Grace || s.Remaining <= 0 {
		t.Fatalf("after a kill: %+v", s)
	}
	// The client does not answer here, but it is tried.
	for end := time.Now().Add(30 * time.Second); lockStatus(t, n).Notify.Total != 1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("nobody is notified: %+v", lockStatus(t, n).Notify)
		}
	}
	wantLock(t, lock(t, n, f, 3, 20, 29, false), wire.OK)
	wantLock(t, lock(t, n, f, 3, 5, 5, false), wire.ErrLockDenied)
	wantLock(t, lock(t, n, f, 2, 0, 9, true), wire.OK)
	if s := lockStatus(t, n); s.Granted != 2 || s.Unconfirmed != 0 {
		t.Fatalf("after the reclaim: %+v", s)
	}
}

// The table is thrown away: its clients, and nobody else, get their locks back
// until the grace period ends, and the end comes early once they all have.
func TestForgetLocks(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	f := create(t, n, "f").FID
	wantLock(t, lock(t, n, f, 2, 0, 9, false), wire.OK)
	before := lockStatus(t, n).NSMState
	stop(t, n)
	c.ForgetLocks = true
	n = start(t, c)
	s := lockStatus(t, n)
	if !s.Grace || s.Granted != 0 || s.Forgotten != 1 || s.NSMState != before+2 || s.Hosts != 1 {
		t.Fatalf("%+v", s)
	}
	wantLock(t, lock(t, n, f, 3, 50, 59, false), wire.ErrLockGrace)
	wantLock(t, lock(t, n, f, 2, 0, 9, true), wire.OK)
	// A client asks for something new when its reclaims are through.
	wantLock(t, lock(t, n, f, 2, 100, 109, false), wire.OK)
	if s := lockStatus(t, n); s.Grace {
		t.Fatalf("the grace period goes on: %+v", s)
	}
	wantLock(t, lock(t, n, f, 3, 50, 59, false), wire.OK)
	wantLock(t, lock(t, n, f, 3, 0, 0, false), wire.ErrLockDenied)

	// SM_SIMU_CRASH forgets nothing.
	n.simuCrash(vips(t, n.reg)[0].Index)
	if s := lockStatus(t, n); s.Grace || s.Unconfirmed != 3 || s.NSMState != before+4 {
		t.Fatalf("after a simulated crash: %+v", s)
	}
}

func TestReleaseLocks(t *testing.T) {
	c := conf(t, t.TempDir())
	n := start(t, c)
	f := create(t, n, "f").FID
	wantLock(t, lock(t, n, f, 2, 0, 9, false), wire.OK)
	wantLock(t, lock(t, n, f, 3, 20, 29, false), wire.OK)
	res, err := n.Locks().Free(context.Background(), lockctl.FreeArgs{Client: "127.0.0.2"})
	if err != nil || len(res.Clients) != 1 || res.Clients[0].Freed != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	wantLock(t, lock(t, n, f, 3, 0, 9, false), wire.OK)
	if s := lockStatus(t, n); s.Granted != 2 {
		t.Fatalf("%+v", s)
	}
}

func TestNoLocks(t *testing.T) {
	c := conf(t, t.TempDir())
	c.Locks.Enabled = false
	n := start(t, c)
	if n.Locks() != nil || len(n.Status().Locks) != 0 {
		t.Error("a lock service without locks")
	}
	d := config.Default()
	if len(d.Addrs()) > 0 && !d.Locks.Enabled {
		t.Error("locks are off by default")
	}
}
