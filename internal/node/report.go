package node

import (
	"slices"
	"strings"

	"github.com/baton-nfs/baton/failover/manager"
)

// Bounds of what a report says of why addresses have failed, in bytes: of one, of all.
const (
	reasonMax  = 200
	reasonsMax = 4 << 10
	// movesMax bounds the failed addresses whose assignment is said, too: of others it is
	// seen in Since, if later.
	movesMax = 128
)

// short leaves out of a report what the node that decides can do without: a node whose
// report has no room in a message (wire.MaxData) would not count for the majority. An
// address that is not listed is absent.
func short(l []manager.Address) []manager.Address {
	l = slices.DeleteFunc(l, func(a manager.Address) bool { return a.State == manager.Absent })
	room, moves := reasonsMax, movesMax
	for i := range l {
		a := &l[i]
		if a.State != manager.Failed {
			a.Since = 0 // it is not looked at
		}
		if len(a.Reason) > reasonMax {
			a.Reason = strings.ToValidUTF8(a.Reason[:reasonMax], "") + "..."
		}
		if room -= len(a.Reason); room < 0 {
			a.Reason = ""
		}
		if a.Move != 0 {
			if moves--; moves < 0 {
				a.Move = 0
			}
		}
	}
	return l
}
