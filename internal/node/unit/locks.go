package unit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd"
)

// Locks is what serves locks on one service address.
type Locks struct {
	NLM *lockd.Address
	NSM *statd.Address
	// Forgotten counts the entries that the start threw away.
	Forgotten uint64
}

func (l *Locks) programs() []sunrpc.Program {
	return append(l.NLM.Programs(), l.NSM.Programs()...)
}

func (l *Locks) start() {
	l.NLM.Start()
	l.NSM.Start()
}

func (l *Locks) stop(ctx context.Context) error {
	return errors.Join(l.NLM.Stop(ctx), l.NSM.Stop(ctx))
}

// endCalls ends what is being sent to clients. It does not wait for any target.
func (l *Locks) endCalls(ctx context.Context) error {
	return errors.Join(l.NLM.EndCalls(ctx), l.NSM.EndCalls(ctx))
}

// lockServiceCall sends OpLockService for a service address.
func (d *Deps) lockServiceCall(ctx context.Context, v *mgs.VIP, a wire.LockArgs) (wire.LockServiceInfo, error) {
	req := wire.Request{Header: wire.Header{Op: wire.OpLockService, Flags: wire.FlagWaitCommit}, Lock: &a}
	var rep wire.Reply
	d.FS.Call(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}, &req, &rep)
	if rep.Status != wire.OK {
		return wire.LockServiceInfo{}, fmt.Errorf("lock service of %s: %w", v.Addr, rep.Status)
	}
	return rep.Lock.Service, nil
}

// beginLocks tells the lock table that an address is served from now on and in
// which state: after a crash its locks have to be reclaimed, after the loss of
// records, or when they are to be forgotten, there is a grace period. v gets the
// NSM state that is in force.
func (d *Deps) beginLocks(ctx context.Context, v *mgs.VIP, forget bool) (in wire.LockServiceInfo, forgotten uint64, err error) {
	now, err := d.lockServiceCall(ctx, v, wire.LockArgs{})
	if err != nil {
		return in, 0, err
	}
	forget = forget || now.Damaged
	// The registry may be older than the lock table (restored from a backup).
	if forget && !v.Crashed || v.Crashed && now.NSMState >= v.NSMState || now.NSMState > v.NSMState {
		// Clients reclaim only when they hear of a state that is new to them.
		bumped, err := d.Registry.RaiseNSM(ctx, v.Index, v.Epoch, now.NSMState)
		if err != nil {
			return in, 0, err
		}
		v.NSMState = bumped.NSMState
	}
	l := &d.Config.Locks
	a := wire.LockArgs{NSMState: v.NSMState, Crashed: v.Crashed, Forget: forget, Window: int64(l.ReclaimWindow)}
	if forget {
		a.Crashed, a.Window = true, int64(l.GracePeriod)
		forgotten = uint64(now.Granted) + uint64(now.Unconfirmed) + uint64(now.Waiting) + uint64(now.Shares)
	}
	if in = now; v.NSMState > now.NSMState {
		if in, err = d.lockServiceCall(ctx, v, a); err != nil {
			return in, 0, err
		}
	} // else it would change nothing: an address that moves in order keeps its state
	switch {
	case in.Grace:
		d.Log.Warn("the lock table was lost or thrown away; until the grace period ends clients can only reclaim their locks",
			"address", v.Addr, "clients", in.Hosts, "period", time.Duration(l.GracePeriod), "nsm_state", in.NSMState)
	case in.Unconfirmed > 0:
		d.Log.Info("the last run ended in a crash; clients are asked to confirm their locks, others wait for nothing but these",
			"address", v.Addr, "locks", in.Unconfirmed, "clients", in.Hosts, "window", time.Duration(l.ReclaimWindow), "nsm_state", in.NSMState)
	default:
		d.Log.Debug("locks", "address", v.Addr, "held", in.Granted, "waiting", in.Waiting, "nsm_state", in.NSMState)
	}
	return in, forgotten, nil
}

// SimuCrash acts as after a crash (SM_SIMU_CRASH): new state, locks unconfirmed,
// clients notified.
func (u *Unit) SimuCrash(ctx context.Context) error {
	if u.locks == nil {
		return nil
	}
	v, err := u.d.Registry.RaiseNSM(ctx, u.vip.Index, u.vip.Epoch, 0)
	if err == nil {
		v.Crashed = true
		_, _, err = u.d.beginLocks(ctx, &v, false)
	}
	if err != nil {
		return err
	}
	u.locks.NSM.SetState(v.NSMState)
	u.locks.NSM.Kick()
	return nil
}
