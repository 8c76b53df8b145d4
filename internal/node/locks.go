package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd"
	"github.com/baton-nfs/baton/statd/nsm"
)

// lockService is what serves locks on one service address.
type lockService struct {
	nlm *lockd.Address
	nsm *statd.Address
	// forgotten counts the entries that the start threw away.
	forgotten uint64
}

func (l *lockService) programs() []sunrpc.Program {
	return append(l.nlm.Programs(), l.nsm.Programs()...)
}

func (l *lockService) start() {
	l.nlm.Start()
	l.nsm.Start()
}

func (l *lockService) stop(ctx context.Context) error {
	return errors.Join(l.nlm.Stop(ctx), l.nsm.Stop(ctx))
}

// startLockd makes the lock and status monitors; addresses are added by listen.
func (n *Node) startLockd() (err error) {
	if !n.cfg.Locks.Enabled {
		return nil
	}
	if n.lockd, err = lockd.New(lockd.Config{Table: n.fs, Logger: n.log}); err != nil {
		return err
	}
	n.statd, err = statd.New(statd.Config{
		Table: n.fs, Logger: n.log, GiveUp: time.Duration(n.cfg.Locks.NotifyTimeout), SimuCrash: n.simuCrash,
	})
	return err
}

// lockServiceCall sends OpLockService for a service address.
func (n *Node) lockServiceCall(ctx context.Context, v *mgs.VIP, a wire.LockArgs) (wire.LockServiceInfo, error) {
	req := wire.Request{Header: wire.Header{Op: wire.OpLockService, Flags: wire.FlagWaitCommit}, Lock: &a}
	var rep wire.Reply
	n.fs.Call(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}, &req, &rep)
	if rep.Status != wire.OK {
		return wire.LockServiceInfo{}, fmt.Errorf("lock service of %s: %w", v.Addr, rep.Status)
	}
	return rep.Lock.Service, nil
}

// beginLocks tells the lock table that an address is served from now on and in
// which state: after a crash its locks have to be reclaimed, after the loss of
// records, or when they are to be forgotten, there is a grace period. v gets the
// NSM state that is in force.
func (n *Node) beginLocks(ctx context.Context, v *mgs.VIP, forget bool) (forgotten uint64, err error) {
	now, err := n.lockServiceCall(ctx, v, wire.LockArgs{})
	if err != nil {
		return 0, err
	}
	forget = forget || now.Damaged
	// The registry may be older than the lock table (restored from a backup).
	if forget && !v.Crashed || v.Crashed && now.NSMState >= v.NSMState || now.NSMState > v.NSMState {
		// Clients reclaim only when they hear of a state that is new to them.
		bumped, err := n.reg.RaiseNSM(ctx, v.Index, v.Epoch, now.NSMState)
		if err != nil {
			return 0, err
		}
		v.NSMState = bumped.NSMState
	}
	a := wire.LockArgs{NSMState: v.NSMState, Crashed: v.Crashed, Forget: forget, Window: int64(n.cfg.Locks.ReclaimWindow)}
	if forget {
		a.Crashed, a.Window = true, int64(n.cfg.Locks.GracePeriod)
		forgotten = uint64(now.Granted) + uint64(now.Unconfirmed) + uint64(now.Waiting) + uint64(now.Shares)
	}
	in, err := n.lockServiceCall(ctx, v, a)
	if err != nil {
		return 0, err
	}
	switch {
	case in.Grace:
		n.log.Warn("the lock table was lost or thrown away; until the grace period ends clients can only reclaim their locks",
			"address", v.Addr, "clients", in.Hosts, "period", time.Duration(n.cfg.Locks.GracePeriod), "nsm_state", in.NSMState)
	case in.Unconfirmed > 0:
		n.log.Info("the last run ended in a crash; clients are asked to confirm their locks, others wait for nothing but these",
			"address", v.Addr, "locks", in.Unconfirmed, "clients", in.Hosts, "window", time.Duration(n.cfg.Locks.ReclaimWindow), "nsm_state", in.NSMState)
	default:
		n.log.Debug("locks", "address", v.Addr, "held", in.Granted, "waiting", in.Waiting, "nsm_state", in.NSMState)
	}
	return forgotten, nil
}

// simuCrash acts for one address as after a crash (SM_SIMU_CRASH): new state,
// locks unconfirmed, clients notified.
func (n *Node) simuCrash(index uint32) {
	for _, s := range n.serving() {
		if s.locks == nil || s.vip.Index != index {
			continue
		}
		v, err := n.reg.RaiseNSM(context.Background(), index, s.vip.Epoch, 0)
		if err == nil {
			v.Crashed = true
			_, err = n.beginLocks(context.Background(), &v, false)
		}
		if err != nil {
			n.log.Error("SM_SIMU_CRASH failed", "vip", index, "err", err)
			return
		}
		s.locks.nsm.SetState(v.NSMState)
		s.locks.nsm.Kick()
	}
}

// lockMappings lists the ports of the lock services for rpcbind.
func (n *Node) lockMappings() []rpcbind.Mapping {
	if !n.cfg.Locks.Enabled {
		return nil
	}
	p, s := uint16(n.cfg.Locks.NLMPort), uint16(n.cfg.Locks.StatdPort)
	l := rpcbind.Mappings(nlm.Program, []uint32{nlm.Version1, nlm.Version3, nlm.Version4}, n.cfg.Addrs(), p, p)
	return append(l, rpcbind.Mappings(nsm.Program, []uint32{nsm.Version}, n.cfg.Addrs(), s, s)...)
}

// Locks is the administrator's way to the lock table, nil when locks are off.
func (n *Node) Locks() *lockctl.Admin {
	if !n.up.Load() || n.lockd == nil {
		return nil
	}
	return lockctl.New(n.fs, n.reg.VIPs, time.Now)
}

// statusTimeout bounds the questions to the lock table for one status.
const statusTimeout = 2 * time.Second

func (n *Node) lockStatus(s *status.Status) {
	adm := n.Locks()
	if adm == nil {
		return
	}
	by := map[uint32]*lockService{}
	var vips []mgs.VIP
	for _, x := range n.serving() {
		if x.locks == nil {
			continue
		}
		by[x.vip.Index] = x.locks
		vips = append(vips, x.vip)
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	l, err := adm.Services(ctx, vips)
	if err != nil {
		n.log.Warn("status of the lock table", "err", err)
		return
	}
	for i := range l {
		x := &l[i]
		sv := by[x.Index]
		if sv == nil {
			continue
		}
		x.Forgotten = sv.forgotten
		p := sv.nsm.Progress()
		x.Notify = status.LockNotify{Total: uint64(p.Total), Notified: uint64(p.Notified), Pending: uint64(p.Pending), Failed: uint64(p.Failed)}
		c := sv.nlm.Stats()
		x.Callbacks = status.LockCallbacks{
			Sent: c.CallbacksSent, Pending: uint64(c.CallbacksPending), Accepted: c.CallbacksAccepted,
			Refused: c.CallbacksRefused, Undelivered: c.CallbacksUndelivered, MeanMicro: float64(c.HandOver.Nanoseconds()) / 1e3,
		}
		x.Calls = []status.LockCalls{
			{Outcome: status.LockCallGranted, Calls: c.Granted}, {Outcome: status.LockCallDenied, Calls: c.Denied},
			{Outcome: status.LockCallNoLocks, Calls: c.NoLocks}, {Outcome: status.LockCallBlocked, Calls: c.Blocked},
			{Outcome: status.LockCallGrace, Calls: c.Grace}, {Outcome: status.LockCallDeadlock, Calls: c.Deadlock},
			{Outcome: status.LockCallFailed, Calls: c.Failed}, {Outcome: status.LockCallDropped, Calls: c.Dropped},
		}
	}
	s.Locks = l
}
