package vipagent

import (
	"fmt"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/recovery/mgs"
)

// State is how an address is at this node.
type State string

// States of an address.
const (
	Absent    State = "absent"
	Listening State = "listening" // listeners are open, the address is elsewhere
	Taking    State = "taking"
	Serving   State = "serving"
	Releasing State = "releasing"
	Failed    State = "failed" // it could not be taken or removed; tried again later
)

// situation is all that it depends on what is to be done about an address.
type situation struct {
	me  string
	vip mgs.VIP // as the registry said last
	// gone: the registry does not know the address (any more).
	gone bool

	state State
	epoch uint64 // Serving: of the period of service
	move  uint64 // Listening: for this assignment
	ready bool   // and the registry knows
	began uint64 // the newest period of service that this process has begun

	fence uint64 // somebody serves, or is to serve, with this epoch
	// barred is the assignment that this node does not follow, because it was told to
	// release the address; 0: none.
	barred  uint64
	given   bool   // a cluster manager adds and removes the address
	opened  bool   // Listening: the listeners were opened for one that is given
	hold    bool   // listen only
	held    bool   // Releasing: all is done but for listeners that hold the ports
	failing string // Serving: why the machine cannot have it any more
	leaving bool   // the node stops: nothing is taken any more
	last    bool   // the node stops now: everything is released
}

// step is what is to be done next.
type step struct {
	do     act
	reason failover.Reason
	text   string
}

type act int

const (
	doNothing act = iota
	doListen      // open the listeners
	doReady       // tell the registry that they are open
	doTake        // begin to serve
	doDrop        // close the listeners
	doRelease     // give the address up
	doAbandon     // the last period was of an earlier process of this node, which is dead
)

func (a act) String() string {
	return [...]string{"nothing", "listen", "ready", "take", "drop", "release", "abandon"}[a]
}

// mine tells whether the address is to be served here.
func (s *situation) mine() bool {
	return !s.gone && !s.vip.Removed && !s.leaving && s.vip.Next == s.me && (s.barred == 0 || s.barred != s.vip.MoveID)
}

// ended tells whether the last period of service is over.
func (s *situation) ended() bool { return s.vip.Clean || s.vip.Node == "" }

// orphaned: the last period of service was this node's, and this process has not
// begun it.
func (s *situation) orphaned() bool {
	return !s.gone && !s.ended() && s.vip.Node == s.me && s.vip.Epoch > s.began
}

// decide says what is to be done about an address. It is asked again whenever the
// registry or the node says something new, and when a step is done.
func decide(s *situation) step {
	switch s.state {
	case Serving:
		return s.serving()
	case Listening:
		switch {
		case !s.mine() || s.move != s.vip.MoveID:
			return step{do: doDrop, text: "the address was assigned anew"}
		case s.opened != s.given:
			return step{do: doDrop, text: "somebody else adds the address now"}
		case s.orphaned():
			return step{do: doAbandon}
		case s.ended() && !s.hold && s.fence <= s.vip.Epoch:
			return step{do: doTake}
		case !s.ready:
			return step{do: doReady}
		}
	case Absent, Failed:
		switch {
		case s.orphaned():
			return step{do: doAbandon}
		case s.mine():
			return step{do: doListen}
		}
	}
	return step{}
}

func (s *situation) serving() step {
	v := &s.vip
	switch {
	case s.fence > s.epoch:
		return step{doRelease, failover.Fenced, fmt.Sprintf("it has a newer owner: epoch %d after %d", s.fence, s.epoch)}
	case !s.gone && v.Epoch > s.epoch:
		return step{doRelease, failover.Fenced, fmt.Sprintf("the registry has given it to %s: epoch %d after %d", named(v.Node), v.Epoch, s.epoch)}
	case !s.gone && v.Epoch == s.epoch && (v.Node != s.me || v.Clean):
		return step{doRelease, failover.Fenced, "the registry says that this node has lost it"}
	case s.gone || v.Removed:
		return step{doRelease, failover.Remove, "the address was removed"}
	case s.last:
		return step{doRelease, failover.Stop, "the node stops"}
	case s.barred != 0 && s.barred == v.MoveID:
		return step{doRelease, failover.Stop, "it was released by order"}
	case v.Next == "":
		return step{doRelease, failover.Stop, "the address is assigned to nobody"}
	case v.Next != s.me && v.Ready:
		return step{doRelease, failover.Move, "node " + v.Next + " takes it"}
	case s.failing != "":
		return step{doRelease, failover.Failed, s.failing}
	}
	return step{}
}

func named(node string) string {
	if node == "" {
		return "nobody"
	}
	return "node " + node
}

// broken tells that what is being done makes no sense any more: of a take-over begun
// for the assignment move of an address whose epoch was base, or of listening.
func (s *situation) broken(move, base uint64) bool {
	return !s.mine() || s.vip.MoveID != move || s.vip.Epoch > base+1 || s.fence > base+1
}

// newer tells whether what the registry says was said after old, or is the same. Answers
// and watches come by different ways.
func newer(old, v *mgs.VIP) bool {
	switch {
	case v.Epoch != old.Epoch:
		return v.Epoch > old.Epoch
	case v.MoveID != old.MoveID:
		return v.MoveID > old.MoveID
	}
	// Within a period of service and an assignment these never go back.
	return end(v) >= end(old) && (v.Ready || !old.Ready)
}

// end tells how far the end of a period of service has come: an abandoned one may still
// turn out to have ended in order.
func end(v *mgs.VIP) int {
	switch {
	case v.Clean:
		return 2
	case v.Node == "":
		return 1
	}
	return 0
}
