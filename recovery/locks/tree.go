package locks

import "github.com/baton-nfs/baton/recovery/wire"

// node links an entry into a tree.
type node struct {
	l, r *entry
	max  uint64 // highest Range.End below and here
	min  uint64 // lowest ID below and here
}

// Slots of an entry's nodes. An entry is in at most one tree per slot.
const (
	slotFile  = 0 // file.held or file.wait
	slotOwner = 1 // fileOwner.own
)

// tree is an interval treap of entries in the order of (Start, ID). Its shape
// depends on the entries only: priorities are hashes of the IDs.
type tree struct {
	root *entry
	slot uint8
}

func less(a, b *entry) bool {
	return a.r.Start < b.r.Start || a.r.Start == b.r.Start && a.id < b.id
}

// hash32 spreads IDs evenly (the finalizer of splitmix64).
func hash32(x uint64) uint32 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return uint32(x >> 32)
}

func (t *tree) fix(e *entry) {
	n := &e.n[t.slot]
	n.max, n.min = e.r.End, e.id
	for _, c := range [2]*entry{n.l, n.r} {
		if c != nil {
			cn := &c.n[t.slot]
			n.max, n.min = max(n.max, cn.max), min(n.min, cn.min)
		}
	}
}

func (t *tree) insert(e *entry) { t.root = t.ins(t.root, e) }

func (t *tree) ins(root, e *entry) *entry {
	if root == nil {
		e.n[t.slot] = node{}
		t.fix(e)
		return e
	}
	if e.prio > root.prio {
		n := &e.n[t.slot]
		n.l, n.r = t.split(root, e)
		t.fix(e)
		return e
	}
	n := &root.n[t.slot]
	if less(e, root) {
		n.l = t.ins(n.l, e)
	} else {
		n.r = t.ins(n.r, e)
	}
	t.fix(root)
	return root
}

func (t *tree) split(root, at *entry) (l, r *entry) {
	if root == nil {
		return nil, nil
	}
	n := &root.n[t.slot]
	if less(root, at) {
		n.r, r = t.split(n.r, at)
		l = root
	} else {
		l, n.l = t.split(n.l, at)
		r = root
	}
	t.fix(root)
	return l, r
}

func (t *tree) remove(e *entry) { t.root = t.del(t.root, e) }

func (t *tree) del(root, e *entry) *entry {
	if root == nil {
		return nil
	}
	n := &root.n[t.slot]
	if root == e {
		m := t.join(n.l, n.r)
		*n = node{}
		return m
	}
	if less(e, root) {
		n.l = t.del(n.l, e)
	} else {
		n.r = t.del(n.r, e)
	}
	t.fix(root)
	return root
}

func (t *tree) join(l, r *entry) *entry {
	switch {
	case l == nil:
		return r
	case r == nil:
		return l
	case l.prio > r.prio:
		n := &l.n[t.slot]
		n.r = t.join(n.r, r)
		t.fix(l)
		return l
	}
	n := &r.n[t.slot]
	n.l = t.join(l, n.l)
	t.fix(r)
	return r
}

// collect appends the entries that overlap r and have an ID below before to
// buf, in the order of Start.
func (t *tree) collect(buf []*entry, r wire.LockRange, before uint64) []*entry {
	return t.walk(t.root, buf, r, before)
}

func (t *tree) walk(e *entry, buf []*entry, r wire.LockRange, before uint64) []*entry {
	if e == nil {
		return buf
	}
	n := &e.n[t.slot]
	if n.max < r.Start || n.min >= before {
		return buf
	}
	buf = t.walk(n.l, buf, r, before)
	if e.r.Start > r.End {
		return buf
	}
	if e.r.End >= r.Start && e.id < before {
		buf = append(buf, e)
	}
	return t.walk(n.r, buf, r, before)
}

// other finds the first entry that overlaps r, has an ID below before, belongs
// to another owner than o and does not yield at the time now.
func (t *tree) other(r wire.LockRange, before uint64, o *owner, now int64) *entry {
	return t.find(t.root, r, before, o, now)
}

func (t *tree) find(e *entry, r wire.LockRange, before uint64, o *owner, now int64) *entry {
	if e == nil {
		return nil
	}
	n := &e.n[t.slot]
	if n.max < r.Start || n.min >= before {
		return nil
	}
	if x := t.find(n.l, r, before, o, now); x != nil || e.r.Start > r.End {
		return x
	}
	if e.r.End >= r.Start && e.id < before && e.o != o && !e.yields(now) {
		return e
	}
	return t.find(n.r, r, before, o, now)
}

// seqList keeps entries in the order of rising keys. Removed ones leave holes
// that are squeezed out when they are the majority.
type seqList struct {
	l    []seqItem
	live int
}

type seqItem struct {
	key uint64
	e   *entry
}

// add appends; key is higher than all before it.
func (s *seqList) add(key uint64, e *entry) {
	s.l = append(s.l, seqItem{key, e})
	s.live++
}

// after gives the index of the first item whose key is above key.
func (s *seqList) after(key uint64) int {
	lo, hi := 0, len(s.l)
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); s.l[m].key <= key {
			lo = m + 1
		} else {
			hi = m
		}
	}
	return lo
}

func (s *seqList) get(key uint64) *entry {
	if i := s.after(key); i > 0 && s.l[i-1].key == key {
		return s.l[i-1].e
	}
	return nil
}

func (s *seqList) remove(key uint64) {
	i := s.after(key) - 1
	if i < 0 || s.l[i].key != key || s.l[i].e == nil {
		return
	}
	s.l[i].e = nil
	s.live--
	if s.live == 0 {
		s.l = nil
		return
	}
	if len(s.l) < 64 || s.live > len(s.l)/2 {
		return
	}
	l := make([]seqItem, 0, s.live+s.live/4)
	for _, it := range s.l {
		if it.e != nil {
			l = append(l, it)
		}
	}
	s.l = l
}
