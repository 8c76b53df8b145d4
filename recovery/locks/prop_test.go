package locks

import (
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/wire"
)

var seedFlag = flag.Uint64("locks.seed", 0, "run TestModel with this seed only")

const sec = int64(1e9)

// rig drives a table and its model with the same operations.
type rig struct {
	t     testing.TB
	tb    *Table
	m     *model
	store map[string]string
	pick  func(n int) int
	lim   Limits
	trace []string
	seen  map[string]int // what came up
}

func newRig(t testing.TB, pick func(int) int) *rig {
	r := &rig{t: t, pick: pick, store: map[string]string{}, seen: map[string]int{}, lim: Limits{HostIdle: 100 * sec}}
	r.tb = New(r.lim, 1)
	r.tb.Loaded(1)
	// Hosts 0 and 2 differ in the service address alone; 0 and 1 in the name.
	r.m = newModel(2, []int{0, 0, 1, 1}, []int{0, 0, 1, 2, 2, 3}, 2)
	r.m.now = 1000 * sec
	return r
}

func (r *rig) host(h int) wire.LockHost {
	names := []string{"a", "b", "a", "c"}
	return wire.LockHost{VIP: uint32(r.m.vipOf[h] + 1), Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(h&1 + 1)}), Name: names[h]}
}

func (r *rig) owner(o int) wire.LockOwner {
	k := wire.LockOwner{LockHost: r.host(r.m.hostOf[o]), OH: fmt.Sprint(o)}
	if o&1 == 0 {
		k.Svid = 7
	}
	return k
}

func (r *rig) ownerOf(k wire.LockOwner) int {
	for o := range r.m.hostOf {
		if w := r.owner(o); w.LockHost == k.LockHost && w.OH == k.OH {
			return o
		}
	}
	r.fail("unknown owner %v", k)
	return 0
}

func fidOf(file int) wire.FID { return wire.FID{Seq: 2, OID: uint32(file + 1)} }

func toRange(s, e int) wire.LockRange {
	w := wire.LockRange{Start: uint64(s), End: uint64(e)}
	if e == span-1 {
		w.End = wire.MaxLockOffset
	}
	return w
}

func fromRange(w wire.LockRange) (s, e int) { return int(w.Start), int(min(w.End, span-1)) }

func (r *rig) fail(format string, args ...any) {
	r.t.Helper()
	n := len(r.trace)
	r.t.Fatalf("%s\nstep %d, last operations:\n%s", fmt.Sprintf(format, args...), n, strings.Join(r.trace[max(0, n-25):], "\n"))
}

// text brings the table into the form of model.text.
func (r *rig) text(tb *Table) string {
	m := newModel(len(r.m.vips), r.m.vipOf, r.m.hostOf, 2)
	m.now = r.m.now
	for _, v := range tb.vips {
		m.vips[v.num-1] = mVIP{state: v.state, crash: v.crash, windowEnd: v.windowEnd, grace: v.grace}
	}
	l, eof := tb.List(wire.FID{}, 0, true, 0, 0)
	if !eof || !slices.IsSortedFunc(l, func(a, b wire.LockHolder) int { return int(int64(a.ID - b.ID)) }) {
		r.fail("list is out of order or short")
	}
	pending := map[uint64]bool{}
	for v := range m.vips {
		for _, g := range tb.Pending(uint32(v+1), 0, 0) {
			pending[g.ID] = true
		}
	}
	for _, h := range l {
		o, f := r.ownerOf(h.Owner), int(h.FID.OID-1)
		conf := m.vip(o).state
		if h.State == wire.LockUnconfirmed {
			conf = 0
		}
		s, e := fromRange(h.Range)
		x := mRange{owner: o, file: f, s: s, e: e, kind: kind(h.Exclusive) + 1, conf: conf}
		switch {
		case h.Share:
			m.shares = append(m.shares, mShare{o, f, h.ShareMode, h.ShareAccess, conf})
		case h.State == wire.LockWaiting:
			x.barge = tb.ids.get(h.ID).barge
			m.wait = append(m.wait, x)
		case pending[h.ID]:
			m.pend = append(m.pend, x)
			delete(pending, h.ID)
		default:
			if h.State == wire.LockGrantPending {
				r.fail("pending lock %v is not in Pending", h)
			}
			for i := s; i <= e; i++ {
				if m.plain[o][f][i].kind != 0 {
					r.fail("two locks of one owner at %d: %v", i, h)
				}
				m.plain[o][f][i] = cell{x.kind, conf}
			}
		}
	}
	if len(pending) > 0 {
		r.fail("Pending has locks that List has not")
	}
	for _, h := range tb.Hosts(0, true) {
		for i := range m.hosts {
			if r.host(i) == h.Host {
				m.hosts[i] = mHost{rec: true, state: h.State, notified: h.Notified,
					stage: int(tb.hosts[h.Host].stage), sticky: tb.hosts[h.Host].sticky}
			}
		}
	}
	return m.text()
}

func (r *rig) rng() (s, e int) {
	s = r.pick(span)
	return s, s + r.pick(span-s)
}

func (r *rig) now(d int64) int64 {
	r.m.advance(r.m.now+d, r.lim.HostIdle)
	return r.m.now
}

// step does one operation on both and compares.
func (r *rig) step() {
	before := r.m.text()
	d := int64(r.pick(3)) * sec
	if r.pick(40) == 0 {
		d = int64(r.pick(150)) * sec
	}
	now := r.now(d)
	o, f := r.pick(len(r.m.hostOf)), r.pick(2)
	s, e := r.rng()
	k := 1 + r.pick(2)
	x := mRange{owner: o, file: f, s: s, e: e, kind: k}
	a := &wire.LockArgs{Owner: r.owner(o), Range: toRange(s, e), Exclusive: k == 2, Note: []byte{byte(o), byte(r.pick(2))}}
	var got, want wire.Status
	var holder wire.LockHolder
	name := ""
	switch p := r.pick(100); {
	case p < 50:
		a.Block, a.Reclaim, a.Monitor = r.pick(3) > 0, r.pick(6) == 0, r.pick(3) > 0
		name = fmt.Sprintf("lock %+v block=%v reclaim=%v monitor=%v", x, a.Block, a.Reclaim, a.Monitor)
		got, holder = r.tb.Lock(now, fidOf(f), a)
		want = r.m.lock(x, a.Block, a.Reclaim, a.Monitor)
	case p < 62:
		name = fmt.Sprintf("unlock %+v", x)
		got = r.tb.Unlock(now, fidOf(f), a)
		r.m.unlock(x)
	case p < 68: // mostly of something that is there
		if l := append(slices.Clone(r.m.wait), r.m.pend...); len(l) > 0 && r.pick(5) > 0 {
			x = l[r.pick(len(l))]
			a.Owner, a.Range, a.Exclusive = r.owner(x.owner), toRange(x.s, x.e), x.kind == 2
		}
		name = fmt.Sprintf("cancel %+v", x)
		got = r.tb.Cancel(now, fidOf(x.file), a)
		want = r.m.cancel(x)
	case p < 78:
		r.tb.Tick(now)
		vip := r.pick(2)
		out := wire.GrantOutcome(1 + r.pick(3))
		if l := r.tb.Pending(uint32(vip+1), 0, 0); len(l) > 0 {
			g := l[r.pick(len(l))]
			x.owner, x.file = r.ownerOf(g.Owner), int(g.FID.OID-1)
			x.s, x.e = fromRange(g.Range)
			x.kind = kind(g.Exclusive) + 1
			name = fmt.Sprintf("grantdone %d %+v %d", g.ID, x, out)
			if r.pick(8) == 0 {
				r.tb.GrantDone(now, r.host((r.m.hostOf[x.owner]+1)%4), g.ID, out) // not its own
				r.tb.GrantDone(now, g.Owner.LockHost, g.ID+1000, out)
			}
			got = r.tb.GrantDone(now, g.Owner.LockHost, g.ID, out)
			r.m.grantDone(x, out)
		}
	case p < 83:
		sh := mShare{owner: o, file: f, mode: uint8(r.pick(4)), access: uint8(r.pick(4))}
		if a.Owner.Svid != 0 { // share owners have none
			sh.owner = o ^ 1
			a.Owner = r.owner(sh.owner)
		}
		a.ShareMode, a.ShareAccess, a.Reclaim, a.Monitor = sh.mode, sh.access, r.pick(6) == 0, r.pick(3) > 0
		name = fmt.Sprintf("share %+v reclaim=%v", sh, a.Reclaim)
		got, holder = r.tb.Share(now, fidOf(f), a)
		want = r.m.share(sh, a.Reclaim, a.Monitor)
	case p < 86:
		if len(r.m.shares) > 0 {
			i := r.pick(len(r.m.shares))
			sh := r.m.shares[i]
			a.Owner, a.ShareMode, a.ShareAccess = r.owner(sh.owner), sh.mode, sh.access
			name = fmt.Sprintf("unshare %+v", sh)
			got = r.tb.Unshare(now, fidOf(sh.file), a)
			r.m.shares = slices.Delete(r.m.shares, i, i+1)
		} else {
			r.tb.Tick(now)
		}
	case p < 89:
		name = fmt.Sprintf("test %+v", x)
		r.tb.Tick(now)
		r.take()
		got, holder = r.tb.Test(now, fidOf(f), a)
		switch {
		case len(r.m.holders(x, false)) > 0:
			want = wire.ErrLockDenied
		case r.m.vip(o).grace || r.m.anyGrace() && !r.m.covered(x):
			want = wire.ErrLockGrace
		}
		if r.tb.Changed() {
			r.fail("test changes something")
		}
	case p < 90:
		h, state := r.pick(4), uint32(r.pick(4))
		name = fmt.Sprintf("free %v %d", r.host(h), state)
		known := r.m.hosts[h].rec && state != 0 && r.m.hosts[h].state == state
		freed := r.tb.Free(now, r.host(h), false, state)
		if known != (freed == 0) && r.m.count(h) > 0 {
			r.fail("%s: freed %d, state known: %v", name, freed, known)
		}
		if !known {
			if state != 0 && r.m.hosts[h].rec {
				r.m.hosts[h].state = state
			}
			r.m.drop(func(o, _ int) bool { return r.m.hostOf[o] == h })
		}
	case p < 91:
		r.tb.Tick(now)
		if l, _ := r.tb.List(wire.FID{}, 0, true, 0, 0); len(l) > 0 {
			h := l[r.pick(len(l))]
			name = fmt.Sprintf("release %v", h)
			x.owner, x.file = r.ownerOf(h.Owner), int(h.FID.OID-1)
			x.s, x.e = fromRange(h.Range)
			x.kind = kind(h.Exclusive) + 1
			entry := r.tb.ids.get(h.ID)
			got, _ = r.tb.Release(now, h.ID)
			switch {
			case h.Share:
				r.m.shares = slices.DeleteFunc(r.m.shares, func(s mShare) bool {
					return s.owner == x.owner && s.file == x.file && s.mode == h.ShareMode && s.access == h.ShareAccess
				})
			case entry.state != wire.LockGranted:
				r.m.cancel(x)
			default:
				for i := x.s; i <= x.e; i++ {
					r.m.plain[x.owner][x.file][i] = cell{}
				}
			}
		}
	case p < 92:
		name = fmt.Sprintf("gone f%d", f)
		r.tb.FileGone(now, fidOf(f))
		r.m.drop(func(_, file int) bool { return file == f })
	case p < 95:
		h := r.pick(4)
		mh := &r.m.hosts[h]
		switch r.pick(3) {
		case 0:
			name = fmt.Sprintf("monitor %v", r.host(h))
			got = r.tb.Monitor(now, r.host(h), []byte("n"))
			if !mh.rec {
				mh.rec, mh.notified = true, r.m.vips[r.m.vipOf[h]].state
			}
			mh.sticky = true
		case 1:
			name = fmt.Sprintf("unmonitor %v", r.host(h))
			got = r.tb.Unmonitor(now, r.host(h))
			mh.sticky = false
			if r.m.count(h) == 0 {
				*mh = mHost{}
			}
		case 2:
			state := r.m.vips[r.m.vipOf[h]].state
			name = fmt.Sprintf("notified %v %d", r.host(h), state)
			got = r.tb.Notified(now, r.host(h), state)
			if mh.rec {
				mh.notified = max(mh.notified, state)
			}
		}
	case p < 98:
		vip := r.pick(2)
		a := &wire.LockArgs{NSMState: r.m.vips[vip].state + uint32(r.pick(3)), Crashed: r.pick(3) > 0,
			Forget: r.pick(4) == 0, Window: int64(1+r.pick(40)) * sec}
		name = fmt.Sprintf("service %d %+v", vip, a)
		r.tb.Service(now, uint32(vip+1), a)
		r.m.service(vip, a.NSMState, a.Crashed, a.Forget, a.Window)
	default:
		name = "restart"
		r.tb.Tick(now)
		r.restart()
		if r.pick(4) > 0 {
			for vip := range 2 {
				a := &wire.LockArgs{NSMState: r.m.vips[vip].state + 2, Crashed: true, Window: 20 * sec}
				info := r.tb.Service(now, uint32(vip+1), a)
				r.m.service(vip, a.NSMState, true, false, a.Window)
				if info.Granted != 0 || info.NSMState != a.NSMState {
					r.fail("after a crash: %+v", info)
				}
			}
		}
	}
	r.trace = append(r.trace, fmt.Sprintf("%d: %s -> %v", now/sec, name, got))
	r.seen[got.String()]++
	if strings.Contains(before, "?") && !strings.Contains(r.m.text(), "?") {
		r.seen["all confirmed"]++
	}
	if strings.Contains(r.m.text(), "barge=true") {
		r.seen["barge"]++
	}
	if strings.Contains(before, "grace=true") && !strings.Contains(r.m.text(), "grace=true") {
		r.seen["end of grace"]++
	}
	if got != want {
		r.fail("%s gives %v, model %v\n%s", name, got, want, before)
	}
	if got == wire.ErrLockDenied && holder.ID != 0 {
		hs, he := fromRange(holder.Range)
		if holder.FID != fidOf(f) || !holder.Share && (hs > e || he < s) || holder.Owner == a.Owner || holder.State == wire.LockWaiting {
			r.fail("holder %+v is not in the way", holder)
		}
	}
	r.m.settle()
	r.m.idle()
	r.take()
	if d := cmp.Diff(r.m.text(), r.text(r.tb)); d != "" {
		r.fail("table differs from model (-model +table):\n%s\nbefore:\n%s\nmodel:\n%s", d, before, r.m.text())
	}
	r.check()
}

// take stores the changes and compares the store with the table.
func (r *rig) take() {
	r.tb.Take(func(c Change) {
		if c.Value == nil {
			if _, ok := r.store[string(c.Key)]; !ok {
				r.fail("deletes %x, which is not stored", c.Key)
			}
			delete(r.store, string(c.Key))
			return
		}
		r.store[string(c.Key)] = string(c.Value)
	})
	if r.tb.Changed() {
		r.fail("changes left after Take")
	}
}

// restart loads a new table from the store and compares it with the old one.
func (r *rig) restart() {
	r.take()
	old := r.tb
	tb := New(r.lim, 1)
	for _, k := range sortedKeys(r.store) {
		if err := tb.Load([]byte(k), []byte(r.store[k])); err != nil {
			r.fail("load: %v", err)
		}
	}
	tb.Loaded(r.m.now)
	// What does not outlive a process: since when hosts hold nothing, who has
	// reclaimed, and in which order an owner asked.
	for _, l := range [][]mRange{r.m.wait, r.m.pend} {
		for i := range l {
			l[i].asked = 0
		}
	}
	for i := range r.m.hosts {
		r.m.hosts[i].idleSince = 0
	}
	for i, v := range r.m.vips {
		if v.grace {
			r.m.startGrace(i)
			r.m.vips[i].lastReclaim = 0
		}
	}
	a, _ := old.List(wire.FID{}, 0, true, 0, 0)
	b, _ := tb.List(wire.FID{}, 0, true, 0, 0)
	if d := cmp.Diff(a, b, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		r.fail("reloaded table differs:\n%s", d)
	}
	if d := cmp.Diff(old.Stats(), tb.Stats()); d != "" || tb.Damaged() {
		r.fail("reloaded stats differ:\n%s", d)
	}
	if d := cmp.Diff(old.Hosts(0, true), tb.Hosts(0, true), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		r.fail("reloaded hosts differ:\n%s", d)
	}
	for vip := uint32(1); vip <= 2; vip++ {
		ia, ib := old.Service(r.m.now, vip, &wire.LockArgs{}), tb.Service(r.m.now, vip, &wire.LockArgs{})
		ia.HostsReclaimed = 0
		if ia != ib {
			r.fail("reloaded service: %+v, was %+v", ib, ia)
		}
		strip := func(l []wire.LockGrant) map[uint64]string {
			m := map[uint64]string{}
			for _, g := range l {
				if tb == r.tb && g.Seq < old.next {
					r.fail("grant keeps its Seq over a restart")
				}
				g.Seq = 0
				m[g.ID] = fmt.Sprint(g)
			}
			return m
		}
		if d := cmp.Diff(strip(old.Pending(vip, 0, 0)), strip(tb.Pending(vip, 0, 0))); d != "" {
			r.fail("reloaded grants differ:\n%s", d)
		}
	}
	if tb.next < old.next {
		r.fail("IDs go back from %d to %d", old.next, tb.next)
	}
	r.tb = tb
	r.take()
}

func sortedKeys(m map[string]string) []string {
	l := make([]string, 0, len(m))
	for k := range m {
		l = append(l, k)
	}
	slices.Sort(l)
	return l
}

// check verifies what holds in every state, without the model.
func (r *rig) check() {
	if why := checkTable(r.tb); why != "" {
		r.fail("%s", why)
	}
	n := 0
	for k, v := range r.store {
		if k[1] != kindEntry {
			continue
		}
		n++
		e := r.tb.ids.get(binary.BigEndian.Uint64([]byte(k[2:])))
		if e == nil || string(seal([]byte(k), e.value(nil))) != v {
			r.fail("record %x is not of the entry's state", k)
		}
	}
	if n != r.tb.ids.live {
		r.fail("%d records, %d entries", n, r.tb.ids.live)
	}
	hosts := 0
	for k, v := range r.store {
		if k[1] == kindHost {
			hosts++
			rec, err := DecodeRecord([]byte(k), []byte(v))
			if err != nil {
				r.fail("%v", err)
			}
			h := r.tb.hosts[rec.(*HostRecord).Host.Host]
			if h == nil || !h.rec || string(seal([]byte(k), h.value(nil))) != v {
				r.fail("host record %x is not of the host's state", k)
			}
		}
	}
	if hosts != r.tb.recs {
		r.fail("%d host records, %d monitored", hosts, r.tb.recs)
	}
}

// checkTable looks for broken invariants, the first of which is that nobody
// holds what conflicts with what another holds.
func checkTable(t *Table) string {
	var l []*entry
	for _, it := range t.ids.l {
		if it.e != nil {
			l = append(l, it.e)
		}
	}
	if len(l) != t.ids.live {
		return "live count of the ID list"
	}
	refs, orefs, hn := map[*file]int{}, map[*owner]int{}, map[*host]int{}
	for i, a := range l {
		refs[a.f]++
		orefs[a.o]++
		hn[a.o.h]++
		if t.files[a.f.fid] != a.f || t.hosts[a.o.h.key] != a.o.h || a.o.h.owners[ownerKey{a.o.svid, a.o.oh}] != a.o {
			return "entry of an unknown file, owner or host"
		}
		for _, b := range l[i+1:] {
			if a.f != b.f || a.share != b.share || a.state == wire.LockWaiting || b.state == wire.LockWaiting {
				continue
			}
			switch {
			case a.share:
				if a.o != b.o && (a.mode&b.access != 0 || b.mode&a.access != 0) {
					return fmt.Sprintf("conflicting shares %v %v", a.holder(), b.holder())
				}
			case a.o != b.o:
				if a.r.Overlaps(b.r) && (a.excl || b.excl) {
					return fmt.Sprintf("conflicting locks %v %v", a.holder(), b.holder())
				}
			case a.state == wire.LockGranted && b.state == wire.LockGranted:
				if a.r.Overlaps(b.r) || around(a.r).Overlaps(b.r) && a.excl == b.excl && !a.unconfirmed() && !b.unconfirmed() {
					return fmt.Sprintf("locks of one owner overlap or are not joined: %v %v", a.holder(), b.holder())
				}
			}
		}
	}
	if len(refs) != len(t.files) || len(hn) > len(t.hosts) || len(t.freedFiles) > 0 {
		return "something empty is kept"
	}
	for f, n := range refs {
		if f.refs != n {
			return "file references"
		}
		for _, tr := range []*tree{&f.held[0], &f.held[1], &f.wait[0], &f.wait[1]} {
			if why := checkTree(tr); why != "" {
				return why
			}
		}
		_, waits := t.waitFiles[f]
		if waits != (f.wait[0].root != nil || f.wait[1].root != nil) {
			return "set of files with waiting requests"
		}
	}
	owners := 0
	for _, h := range t.hosts {
		owners += len(h.owners)
		if h.n != hn[h] || h.n == 0 && !h.rec || h.idle != (h.n == 0 && !h.sticky) {
			return fmt.Sprintf("host %v: %d entries, idle %v, want %d", h.key, h.n, h.idle, hn[h])
		}
	}
	for o, n := range orefs {
		if o.refs != n {
			return "owner references"
		}
	}
	if owners != len(orefs) {
		return "owners without entries"
	}
	for _, v := range t.vips {
		var c vip
		for _, e := range l {
			if e.o.h.v != v {
				continue
			}
			u := 0
			if e.state != wire.LockWaiting && e.unconfirmed() {
				u = 1
			}
			switch {
			case e.share:
				c.shares++
				c.unconfShares += u
			case e.state == wire.LockWaiting:
				c.waiting++
			default:
				c.locks++
				c.unconfLocks += u
				if e.state == wire.LockGrantPending {
					c.pending++
				}
			}
		}
		if c.locks != v.locks || c.shares != v.shares || c.waiting != v.waiting || c.pending != v.pending ||
			c.unconfLocks != v.unconfLocks || c.unconfShares != v.unconfShares || v.grants.live != v.pending {
			return fmt.Sprintf("counters of address %d", v.num)
		}
	}
	for _, fo := range t.fos {
		if fo.own.root == nil && len(fo.pending)+len(fo.waiting) == 0 {
			return "empty owner of a file kept"
		}
		if why := checkTree(&fo.own); why != "" {
			return why
		}
	}
	return ""
}

func checkTree(t *tree) string {
	var last *entry
	var walk func(e *entry) (hi, lo uint64, why string)
	walk = func(e *entry) (uint64, uint64, string) {
		if e == nil {
			return 0, all, ""
		}
		n := e.n[t.slot]
		h1, l1, why := walk(n.l)
		if why != "" {
			return 0, 0, why
		}
		if last != nil && !less(last, e) {
			return 0, 0, "tree order"
		}
		last = e
		h2, l2, why := walk(n.r)
		if why != "" {
			return 0, 0, why
		}
		if n.max != max(h1, h2, e.r.End) || n.min != min(l1, l2, e.id) {
			return 0, 0, "tree bounds"
		}
		for _, c := range []*entry{n.l, n.r} {
			if c != nil && c.prio > e.prio {
				return 0, 0, "tree heap"
			}
		}
		return n.max, n.min, ""
	}
	_, _, why := walk(t.root)
	return why
}

// TestModel runs random operations on a table and on a naive model of it.
func TestModel(t *testing.T) {
	seeds, steps := 16, 1500
	if testing.Short() {
		seeds, steps = 6, 600
	}
	seen := map[string]int{}
	for i := range seeds {
		seed := uint64(i)
		if *seedFlag != 0 {
			seed = *seedFlag
		} else if i >= seeds/2 {
			seed = rand.Uint64()
		}
		rnd := rand.New(rand.NewPCG(seed, 1))
		func() {
			defer func() {
				if t.Failed() {
					t.Logf("repeat with -locks.seed=%d", seed)
				}
			}()
			r := newRig(t, rnd.IntN)
			for range steps {
				r.step()
			}
			for k, n := range r.seen {
				seen[k] += n
			}
		}()
	}
	for _, k := range []string{"OK", "LOCK_DENIED", "LOCK_BLOCKED", "LOCK_DEADLOCK", "LOCK_GRACE", "barge", "all confirmed", "end of grace"} {
		if seen[k] < 5 && *seedFlag == 0 {
			t.Errorf("%q came up %d times", k, seen[k])
		}
	}
	t.Log(seen)
}

// FuzzTable drives the table and the model with operations from bytes.
func FuzzTable(f *testing.F) {
	for seed := range uint64(4) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		b := make([]byte, 600)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := newRig(t, func(n int) int {
			if len(b) == 0 {
				return 0
			}
			x := int(b[0])
			b = b[1:]
			return x % n
		})
		for i := 0; len(b) > 0 && i < 400; i++ {
			r.step()
		}
	})
}
