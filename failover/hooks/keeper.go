package hooks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// Role is what keepalived's state of an instance means for its address.
type Role string

// Roles.
const (
	Master Role = "master" // the address is to be served here
	Backup Role = "backup" // somebody else is master, and will take the address
	Leave  Role = "leave"  // this node takes no part any more: it must not serve
)

// VRRPRole gives the role of a state as keepalived writes it (keepalived.conf(5)).
// States that change nothing give false.
func VRRPRole(state string) (Role, bool) {
	switch state {
	case "MASTER":
		return Master, true
	case "BACKUP":
		return Backup, true
	case "FAULT", "STOP", "DELETED":
		return Leave, true
	}
	return "", false
}

// KeeperOptions are the times of a Keeper.
type KeeperOptions struct {
	// ForceAfter is how long a new master leaves the last owner to give the address
	// up in order, before it declares it gone.
	ForceAfter time.Duration
	// Handover is how long one that is master no more serves on, until the new
	// master takes the address.
	Handover time.Duration
	// Recheck is the time between two looks at a settled address; 0: none.
	Recheck time.Duration
}

// Bounds of the pause after a call that failed.
const (
	retryMin = 200 * time.Millisecond
	retryMax = 2 * time.Second
)

// Op is a call of a Keeper.
type Op string

// Ops.
const (
	OpTake   Op = "take"
	OpDrain  Op = "drain"
	OpFinish Op = "finish"
	OpCheck  Op = "check"
	OpSweep  Op = "sweep" // no baton runs: remove what it has left
)

// Call is what a Keeper wants to be called. At most one is under way; its end is
// told by Keeper.Done.
type Call struct {
	ID     int
	Op     Op
	Force  bool
	Within time.Duration // bound of the wait; 0: none
}

// Actions are what a step of a Keeper comes to.
type Actions struct {
	// Drop: the wait for the call under way is to end; its Done does not come.
	Drop bool
	Call *Call
	// Wake asks for a Tick at that time, unless zero. It replaces an earlier one.
	Wake time.Time
	// Settled is set when what is wanted was reached, or something is to be said
	// about why not (Code Failure: the Keeper goes on trying).
	Settled *Exit
}

// Keeper brings one address to what keepalived says, in the order in which it was
// said. It is a pure step machine, not safe for concurrent use.
//
// A backup keeps on serving until the master takes the address by the registry:
// that keeps the pause short, and if the master cannot, the address is not lost.
type Keeper struct {
	addr netip.Addr
	o    KeeperOptions

	want    Role
	since   time.Time
	settled bool
	keeping bool // settled as a backup that serves
	// unsure: a wait was dropped; the call may still reach baton after the next ones.
	unsure bool

	id    int
	call  Call // the one under way if call.ID != 0
	wake  time.Time
	retry time.Duration
	said  string // the last failure
	text  string // what giving up came to
}

// NewKeeper returns a Keeper that nothing is wanted of yet.
func NewKeeper(addr netip.Addr, o KeeperOptions) *Keeper { return &Keeper{addr: addr, o: o} }

// Unsure tells it that somebody else's call may be under way.
func (k *Keeper) Unsure() { k.unsure = true }

// Settled tells whether what is wanted was reached.
func (k *Keeper) Settled() bool { return k.want == "" || k.settled }

// Want tells what is wanted now. The same again changes nothing.
func (k *Keeper) Want(now time.Time, r Role) (a Actions) {
	if r == k.want {
		a.Wake = k.wake
		return a
	}
	k.want, k.since, k.settled, k.keeping = r, now, false, false
	k.retry, k.said, k.text, k.wake = 0, "", "", time.Time{}
	if k.call.ID != 0 {
		k.call, a.Drop, k.unsure = Call{}, true, true
	}
	k.next(now, &a)
	return a
}

// Tick tells that the time of Wake has come.
func (k *Keeper) Tick(now time.Time) (a Actions) {
	if k.want == "" || k.call.ID != 0 || k.wake.IsZero() || now.Before(k.wake) {
		a.Wake = k.wake
		return a
	}
	k.wake = time.Time{}
	if k.settled {
		k.start(&a, Call{Op: OpCheck})
	} else {
		k.next(now, &a)
	}
	return a
}

// Done tells how a call has ended. r is its result unless err is set; for OpSweep
// err is nil or what has failed.
func (k *Keeper) Done(now time.Time, id int, r vipctl.Result, err error) (a Actions) {
	if id != k.call.ID || id == 0 {
		a.Wake = k.wake
		return a
	}
	c := k.call
	k.call = Call{}
	switch {
	case k.settled:
		k.recheck(now, r, err, &a)
	case c.Op == OpTake:
		k.taken(now, c, r, err, &a)
	case c.Op == OpCheck:
		k.checked(now, r, err, &a)
	case absent(err) && c.Op != OpSweep:
		k.start(&a, Call{Op: OpSweep})
	case err != nil:
		k.again(now, err, &a)
	case c.Op == OpDrain:
		k.text = line(k.addr, r)
		k.start(&a, Call{Op: OpFinish})
	case c.Op == OpFinish && k.unsure:
		k.unsure = false
		k.at(now.Add(poll), &a) // look again whether it stays so
	case c.Op == OpSweep:
		k.settle(now, Exit{OK, fmt.Sprintf("%s: no baton runs, nothing is served", k.addr)}, &a)
	default:
		k.settle(now, Exit{OK, k.text}, &a)
	}
	return a
}

// next begins what is wanted.
func (k *Keeper) next(now time.Time, a *Actions) {
	if k.want != Master {
		k.start(a, Call{Op: OpCheck})
		return
	}
	c := Call{Op: OpTake}
	if left := k.since.Add(k.o.ForceAfter).Sub(now); left > 0 {
		c.Within = left
	} else {
		c.Force = true
	}
	k.start(a, c)
}

func (k *Keeper) start(a *Actions, c Call) {
	k.id++
	c.ID = k.id
	k.call, k.wake = c, time.Time{}
	a.Call, a.Wake = &c, time.Time{}
}

func (k *Keeper) at(t time.Time, a *Actions) { k.wake, a.Wake = t, t }

func (k *Keeper) settle(now time.Time, x Exit, a *Actions) {
	k.settled, k.retry, k.said = true, 0, ""
	a.Settled = &x
	if k.o.Recheck > 0 {
		k.at(now.Add(k.o.Recheck), a)
	}
}

// again tries once more after a while, and says why, once.
func (k *Keeper) again(now time.Time, err error, a *Actions) {
	if text := why(k.addr, string(k.want), err); text != k.said {
		k.said = text
		a.Settled = &Exit{Failure, text}
	}
	k.retry = min(max(2*k.retry, retryMin), retryMax)
	k.at(now.Add(k.retry), a)
}

func (k *Keeper) taken(now time.Time, c Call, r vipctl.Result, err error, a *Actions) {
	switch {
	case err == nil && r.State == vipctl.Serving && k.unsure:
		k.unsure = false
		k.at(now.Add(poll), a) // once more: a release may have come after it
	case err == nil && r.State == vipctl.Serving:
		k.settle(now, Exit{OK, line(k.addr, r)}, a)
	case !c.Force && errors.Is(err, context.DeadlineExceeded):
		k.next(now, a) // with force
	case err == nil:
		k.again(now, fmt.Errorf("%s (%s)", r.State, r.Text), a)
	default:
		k.again(now, err, a)
	}
}

// checked goes on with giving the address up.
func (k *Keeper) checked(now time.Time, r vipctl.Result, err error, a *Actions) {
	waited := now.Sub(k.since) >= k.o.Handover
	switch {
	case absent(err):
		k.start(a, Call{Op: OpSweep})
	case err != nil:
		k.again(now, err, a)
	case r.State == vipctl.Absent || r.State == vipctl.Unknown || r.State == vipctl.Listening:
		text := k.text
		if text == "" {
			text = fmt.Sprintf("%s: not served here", k.addr)
		}
		k.settle(now, Exit{OK, text}, a)
	case r.State == vipctl.Taking || r.State == vipctl.Failed:
		k.start(a, Call{Op: OpDrain}) // breaks it off; there is nothing to hand over
	case !waited:
		k.at(now.Add(poll), a)
	case k.want == Backup && r.State == vipctl.Serving:
		k.keeping = true
		k.settle(now, Exit{OK, fmt.Sprintf("%s: still served here: the master has not taken it", k.addr)}, a)
	default:
		k.start(a, Call{Op: OpDrain}) // a release that was begun is finished, too
	}
}

// recheck looks whether what was reached still holds.
func (k *Keeper) recheck(now time.Time, r vipctl.Result, err error, a *Actions) {
	holds := true
	switch k.want {
	case Master:
		// After a partition the other side may have had the address, and be backup now.
		holds = err == nil && (r.State == vipctl.Serving || r.State == vipctl.Taking) || err != nil && !absent(err)
	case Leave:
		// A release that somebody has begun late is finished, too.
		holds = err != nil || r.State != vipctl.Serving && r.State != vipctl.Releasing
	case Backup:
		if k.keeping && err == nil && r.State != vipctl.Serving {
			k.keeping = false
			a.Settled = &Exit{OK, fmt.Sprintf("%s: no longer served here", k.addr)}
		}
	}
	if holds {
		k.at(now.Add(k.o.Recheck), a)
		return
	}
	k.settled, k.since = false, now
	k.next(now, a)
}
