package recov

import (
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/wire"
)

// TestHeld: a result that the executing target holds until it is durable is given
// to nobody earlier, not to a copy of the request, not from its slot, and what
// builds on it waits, too.
func TestHeld(t *testing.T) {
	now := time.Unix(1000, 0)
	a, b := wire.ClientID{'A'}, wire.ClientID{'B'}
	m := New(Config{}, 2, TargetRecord{Instance: 1, Clean: true}, 10, []ClientRecord{{Client: a, Gen: 1}, {Client: b, Gen: 1}}, nil)
	m.Start(now)
	for _, id := range []wire.ClientID{a, b} {
		m.Connect(Connect{Client: id, Gen: 1, Conn: 1, Instance: 1, Handle: "connect"}, now)
	}
	request := func(id wire.ClientID, xid uint64, h string) Action {
		t.Helper()
		l := m.Request(Request{Client: id, Gen: 1, Conn: 1, XID: xid, Class: ClassModify, Handle: h}, now)
		if len(l) == 0 {
			return Action{}
		}
		return l[len(l)-1]
	}
	executed := func(tk uint64, res Result) map[any]bool {
		t.Helper()
		res.Ticket = tk
		waits := map[any]bool{}
		for _, x := range m.Executed(res, now) {
			if x.Kind == ActReply {
				waits[x.Handle] = x.WaitCommit
			}
		}
		return waits
	}
	first := request(a, 1, "first")
	request(a, 1, "copy")
	if w := executed(first.Ticket, Result{Transno: 11, Held: true}); !w["first"] || !w["copy"] {
		t.Errorf("waits: %v", w)
	}
	if x := request(a, 1, "late copy"); x.Kind != ActReply || !x.WaitCommit || x.Transno != 11 {
		t.Errorf("%+v", x)
	}
	next := request(b, 1, "next")
	if w := executed(next.Ticket, Result{Transno: 12, PreVersions: [4]uint64{11}}); !w["next"] {
		t.Errorf("what builds on it: %v", w)
	}
	m.Committed(12)
	if x := request(a, 1, "at last"); x.Kind != ActReply || x.WaitCommit {
		t.Errorf("%+v", x)
	}
	// Without it nobody waits.
	first = request(a, 2, "first")
	if w := executed(first.Ticket, Result{Transno: 13}); w["first"] {
		t.Errorf("waits: %v", w)
	}
}
