package recov

import (
	"fmt"
	"maps"
	"strings"

	"github.com/baton-nfs/baton/recovery/wire"
)

// store is a target's store for tests: a log of which a crash loses the end,
// and a name space with versions.
type store struct {
	log       []entry
	committed int // entries of log that are durable
	names     map[string]uint64
	done      map[string]bool // bodies executed in the log
}

type entry struct {
	transno uint64 // 0: not of an operation
	body    string // the operation's identity and what it does
	writes  map[string]uint64
	slot    SlotRecord
	put     *ClientRecord
	del     *wire.ClientID
	target  *TargetRecord
}

func newStore() *store {
	return &store{names: map[string]uint64{"/": 0}, done: map[string]bool{}}
}

func (s *store) append(e entry) {
	for k, v := range e.writes {
		if v == 0 {
			delete(s.names, k)
		} else {
			s.names[k] = v
		}
	}
	if e.transno != 0 {
		s.done[e.body] = true
	}
	s.log = append(s.log, e)
}

// lastTransno of what is in the log, and of what is durable.
func (s *store) lastTransno() (last, durable uint64) {
	for i, e := range s.log {
		last = max(last, e.transno)
		if i < s.committed {
			durable = max(durable, e.transno)
		}
	}
	return last, durable
}

// crash loses what is not durable.
func (s *store) crash() {
	n := newStore()
	for _, e := range s.log[:s.committed] {
		n.append(e)
	}
	n.committed = len(n.log)
	*s = *n
}

// open makes the machine of the next instance.
func (s *store) open(cfg Config) *Machine {
	var target TargetRecord
	clients := map[wire.ClientID]ClientRecord{}
	var slots []SlotRecord
	for _, e := range s.log {
		switch {
		case e.put != nil:
			clients[e.put.Client] = *e.put
		case e.del != nil:
			delete(clients, *e.del)
		case e.target != nil:
			target = *e.target
		case e.slot.XID != 0:
			var r SlotRecord
			if err := r.Decode(e.slot.Append(nil)); err != nil {
				panic(err)
			}
			slots = append(slots, r)
		}
	}
	var cl []ClientRecord
	for _, c := range clients {
		cl = append(cl, c)
	}
	last, _ := s.lastTransno()
	return New(cfg, target.Instance+1, target, last, cl, slots)
}

// missing: the root is always there, as old as the store.
func (s *store) missing(p string) bool { return p != "/" && s.names[p] == 0 }

func parent(p string) string {
	if i := strings.LastIndexByte(p, '/'); i > 0 {
		return p[:i]
	}
	return "/"
}

// do executes an operation at transno t. With check nil versions do not matter.
//
//	create P, unlink P, rename P Q, link P Q: check parents and objects, change the objects
//	setattr P: checks and changes the object
//	touch P: neither checks nor changes versions
//	append P [Q]: checks and changes both (simulation)
func (s *store) do(op string, t uint64, check *[4]uint64) (pre [4]uint64, w map[string]uint64, st wire.Status, mismatch bool) {
	f := strings.Fields(op)
	v := s.names
	a, b := f[1], f[len(f)-1]
	w = map[string]uint64{}
	switch f[0] {
	case "create":
		pre = [4]uint64{v[parent(a)], v[a]}
		w[a] = t
		switch {
		case s.missing(parent(a)):
			st = wire.ErrNoEnt
		case v[a] != 0:
			st = wire.ErrExist
		}
	case "unlink":
		pre = [4]uint64{v[parent(a)], v[a]}
		w[a] = 0
	case "rename":
		pre = [4]uint64{v[parent(a)], v[parent(b)], v[a], v[b]}
		w[a], w[b] = 0, t
	case "link":
		pre = [4]uint64{v[parent(b)], v[a], v[b]}
		w[a], w[b] = t, t
		if v[b] != 0 {
			st = wire.ErrExist
		}
	case "setattr":
		pre = [4]uint64{v[a]}
		w[a] = t
	case "touch":
		check = nil
	case "append":
		pre = [4]uint64{v[a], v[b]}
		w[a], w[b] = t, t
	default:
		panic("op " + op)
	}
	if f[0] != "create" && f[0] != "append" && s.missing(a) {
		st = wire.ErrNoEnt
	}
	if check != nil && *check != pre || check != nil && st != 0 {
		return pre, nil, VersionMismatch, true
	}
	if st != 0 {
		w = nil
	}
	return pre, w, st, false
}

// execute carries out an ActExecute of a modifying operation.
func (s *store) execute(a *Action, op, body string, transno uint64) Result {
	res := Result{Ticket: a.Ticket, Data: []byte(body)}
	var check *[4]uint64
	if a.Replay {
		transno = a.Req.Transno
		if a.CheckVersions {
			check = &a.Req.PreVersions
		}
	}
	pre, w, st, mismatch := s.do(op, transno, check)
	res.PreVersions, res.Status, res.Mismatch = pre, st, mismatch
	if w != nil {
		if s.done[body] {
			panic(fmt.Sprintf("%s is executed twice", body))
		}
		res.Transno = transno
		r := &a.Req
		s.append(entry{transno: transno, body: body, writes: maps.Clone(w), slot: SlotRecord{
			Client: r.Client, Gen: r.Gen, Slot: r.Slot, XID: r.XID, Transno: transno, Data: res.Data,
		}})
	}
	return res
}
