package node

import (
	"context"
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/node/unit"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/statd"
)

// startLockd makes the lock and status monitors; units use them.
func (n *Node) startLockd() (err error) {
	if !n.cfg.Locks.Enabled {
		return nil
	}
	l := lockd.Config{Table: n.fs, Logger: n.log, OnFenced: n.fenced}
	s := statd.Config{Table: n.fs, Logger: n.log, GiveUp: time.Duration(n.cfg.Locks.NotifyTimeout), SimuCrash: n.simuCrash}
	if ask := n.testPortmap; ask != nil {
		l.Portmap = func(_ context.Context, _ netip.Addr, host netip.AddrPort, prog, _ uint32, netid string) (uint16, error) {
			return ask(host.Addr(), prog, netid)
		}
		s.Portmap = func(_ context.Context, _, host netip.Addr, prog, _ uint32, netid string) (uint16, error) {
			return ask(host, prog, netid)
		}
	}
	if n.lockd, err = lockd.New(l); err != nil {
		return err
	}
	n.statd, err = statd.New(s)
	return err
}

// simuCrash acts for one address as after a crash (SM_SIMU_CRASH).
func (n *Node) simuCrash(index uint32) {
	for _, u := range n.serving() {
		if u.VIP().Index != index {
			continue
		}
		if err := u.SimuCrash(n.run); err != nil {
			n.log.Error("SM_SIMU_CRASH failed", "vip", index, "err", err)
			return
		}
	}
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
	by := map[uint32]*unit.Locks{}
	var vips []mgs.VIP
	for _, u := range n.serving() {
		if u.Locks() == nil {
			continue
		}
		by[u.VIP().Index] = u.Locks()
		vips = append(vips, u.VIP())
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
		x.Forgotten = sv.Forgotten
		p := sv.NSM.Progress()
		x.Notify = status.LockNotify{Total: uint64(p.Total), Notified: uint64(p.Notified), Pending: uint64(p.Pending), Failed: uint64(p.Failed)}
		c := sv.NLM.Stats()
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
