package locks

import (
	"fmt"
	"slices"
	"strings"

	"github.com/baton-nfs/baton/recovery/wire"
)

// The model: the same semantics, written as plainly as possible. Ranges have
// bytes 0..span-1, the last of which stands for everything up to the end of
// the file; every byte of every owner and file is a cell.
const span = 10

type cell struct {
	kind int // 0 free, 1 shared, 2 exclusive
	conf uint32
}

type mRange struct {
	owner, file, s, e int
	kind              int
	conf              uint32
	barge             bool
	asked             uint64 // when the request was made; 0 after a restart
}

type mShare struct {
	owner, file  int
	mode, access uint8
	conf         uint32
}

type mVIP struct {
	state, crash           uint32
	windowEnd, lastReclaim int64
	grace                  bool
}

type mHost struct {
	rec, sticky     bool
	state, notified uint32
	stage           int
	idleSince       int64
}

type model struct {
	now    int64
	vips   []mVIP
	hosts  []mHost
	vipOf  []int // of hosts
	hostOf []int // of owners
	plain  [][][span]cell
	pend   []mRange
	wait   []mRange // in the order of the queue
	shares []mShare
	ops    uint64
	// lastExcl tells by owner and file when an exclusive lock was given last.
	lastExcl map[[2]int]uint64
}

func newModel(vips int, vipOf, hostOf []int, files int) *model {
	m := &model{vips: make([]mVIP, vips), hosts: make([]mHost, len(vipOf)), vipOf: vipOf, hostOf: hostOf, lastExcl: map[[2]int]uint64{}}
	for range hostOf {
		m.plain = append(m.plain, make([][span]cell, files))
	}
	return m
}

func (m *model) vip(owner int) *mVIP { return &m.vips[m.vipOf[m.hostOf[owner]]] }

func (m *model) unconf(owner int, conf uint32) bool { return conf < m.vip(owner).crash }

func (m *model) yields(owner int, conf uint32) bool {
	return m.unconf(owner, conf) && m.vip(owner).windowEnd <= m.now
}

func clash(a, b int) bool { return a == 2 || b == 2 }

func (a mRange) meets(b mRange) bool { return a.file == b.file && a.s <= b.e && b.s <= a.e }

func (a mRange) same(b mRange) bool {
	return a.owner == b.owner && a.file == b.file && a.s == b.s && a.e == b.e && a.kind == b.kind
}

// inside tells whether b is the same owner's and in the range of a.
func (a mRange) inside(b mRange) bool {
	return a.owner == b.owner && a.file == b.file && a.s <= b.s && b.e <= a.e
}

// holders gives the owners whose locks are in the way. strict: also those that
// would yield.
func (m *model) holders(r mRange, strict bool) (l []int) {
	for o := range m.plain {
		if o == r.owner {
			continue
		}
		found := false
		for i := r.s; i <= r.e; i++ {
			c := m.plain[o][r.file][i]
			found = found || c.kind > 0 && clash(c.kind, r.kind) && (strict || !m.yields(o, c.conf))
		}
		for _, p := range m.pend {
			found = found || p.owner == o && p.meets(r) && clash(p.kind, r.kind) && (strict || !m.yields(o, p.conf))
		}
		if found {
			l = append(l, o)
		}
	}
	return l
}

// aheadOf gives the owners of conflicting requests among the first n waiting.
func (m *model) aheadOf(r mRange, n int) (l []int) {
	for _, w := range m.wait[:n] {
		if w.owner != r.owner && w.meets(r) && clash(w.kind, r.kind) {
			l = append(l, w.owner)
		}
	}
	return l
}

// reaches tells whether one of the owners from waits, through others, for to.
func (m *model) reaches(from []int, to int, seen map[int]bool) bool {
	for _, o := range from {
		if o == to {
			return true
		}
		if seen[o] {
			continue
		}
		seen[o] = true
		for i, w := range m.wait {
			if w.owner != o {
				continue
			}
			next := m.holders(w, false)
			if !w.barge {
				next = append(next, m.aheadOf(w, i)...)
			}
			if m.reaches(next, to, seen) {
				return true
			}
		}
	}
	return false
}

func (m *model) covered(r mRange) bool {
	for i := r.s; i <= r.e; i++ {
		ok := m.plain[r.owner][r.file][i].kind >= r.kind
		for _, p := range m.pend {
			ok = ok || r.inside(p) && p.kind == r.kind && p.s <= i && i <= p.e
		}
		if !ok {
			return false
		}
	}
	return true
}

func (m *model) anyGrace() bool {
	return slices.ContainsFunc(m.vips, func(v mVIP) bool { return v.grace })
}

// take gives r to its owner, from others' locks that yield.
func (m *model) take(r mRange) {
	for o := range m.plain {
		if o == r.owner {
			continue
		}
		for i := r.s; i <= r.e; i++ {
			if c := &m.plain[o][r.file][i]; clash(c.kind, r.kind) && m.yields(o, c.conf) {
				*c = cell{}
			}
		}
	}
	var keep []mRange
	for _, p := range m.pend {
		if p.owner != r.owner && p.meets(r) && clash(p.kind, r.kind) && m.yields(p.owner, p.conf) {
			keep = append(keep, p.minus(r)...)
		} else {
			keep = append(keep, p)
		}
	}
	m.pend = keep
}

func (a mRange) minus(cut mRange) (l []mRange) {
	if x := a; a.s < cut.s {
		x.e = cut.s - 1
		l = append(l, x)
	}
	if x := a; a.e > cut.e {
		x.s = cut.e + 1
		l = append(l, x)
	}
	return l
}

func (m *model) set(r mRange) {
	for i := r.s; i <= r.e; i++ {
		m.plain[r.owner][r.file][i] = cell{r.kind, m.vip(r.owner).state}
	}
	m.gave(r)
	m.pend = slices.DeleteFunc(m.pend, func(p mRange) bool { return r.inside(p) && p.kind == r.kind })
	m.wait = slices.DeleteFunc(m.wait, func(w mRange) bool {
		return w.owner == r.owner && w.file == r.file && w.s == r.s && w.e == r.e && r.kind >= w.kind
	})
}

func (m *model) gave(r mRange) {
	m.ops++
	if r.kind == 2 {
		m.lastExcl[[2]int{r.owner, r.file}] = m.ops
	}
}

// confirm makes what the owner has in r confirmed, and of r's kind or, when an
// exclusive lock may be newer than the request for r, at least as strong.
func (m *model) confirm(r mRange) {
	if r.asked > m.lastExcl[[2]int{r.owner, r.file}] {
		for i := r.s; i <= r.e; i++ {
			m.plain[r.owner][r.file][i] = cell{r.kind, m.vip(r.owner).state}
		}
		m.gave(r)
		return
	}
	defer m.gave(r)
	for i := r.s; i <= r.e; i++ {
		c := &m.plain[r.owner][r.file][i]
		*c = cell{max(c.kind, r.kind), m.vip(r.owner).state}
	}
}

func (m *model) monitor(owner int) {
	if h := &m.hosts[m.hostOf[owner]]; !h.rec {
		h.rec, h.notified = true, m.vip(owner).state
	}
}

func (m *model) reclaimed(host int) {
	if v := &m.vips[m.vipOf[host]]; v.grace {
		m.hosts[host].stage = stageReclaimed
		v.lastReclaim = m.now
	}
}

func (m *model) graceOver(vip int) bool {
	members, known, reclaiming := 0, 0, 0
	for h := range m.hosts {
		if m.vipOf[h] == vip && m.hosts[h].stage != stageNone {
			members++
			switch m.hosts[h].stage {
			case stageKnown:
				known++
			case stageReclaimed:
				reclaiming++
			}
		}
	}
	v := &m.vips[vip]
	return m.now >= v.windowEnd || members > 0 && known == 0 && (reclaiming == 0 || m.now >= v.lastReclaim+reclaimQuiet)
}

func (m *model) endGrace(vip int) {
	m.vips[vip].grace = false
	for h := range m.hosts {
		if m.vipOf[h] == vip {
			m.hosts[h].stage = stageNone
		}
	}
	m.settle()
}

// settle grants whatever can be granted.
func (m *model) settle() {
	if m.anyGrace() {
		return
	}
	for i := 0; i < len(m.wait); i++ {
		w := m.wait[i]
		if len(m.holders(w, false)) > 0 || !w.barge && len(m.aheadOf(w, i)) > 0 {
			continue
		}
		m.take(w)
		m.wait = slices.Delete(m.wait, i, i+1)
		i--
		w.conf, w.barge = m.vip(w.owner).state, false
		m.pend = append(m.pend, w)
	}
}

func (m *model) count(host int) (n int) {
	for o, h := range m.hostOf {
		if h != host {
			continue
		}
		for _, f := range m.plain[o] {
			for _, c := range f {
				if c.kind > 0 {
					n++
				}
			}
		}
		for _, l := range [][]mRange{m.pend, m.wait} {
			for _, x := range l {
				if x.owner == o {
					n++
				}
			}
		}
		for _, s := range m.shares {
			if s.owner == o {
				n++
			}
		}
	}
	return n
}

// idle keeps the times since when hosts hold nothing; called after each step.
func (m *model) idle() {
	for i := range m.hosts {
		h := &m.hosts[i]
		if !h.rec || h.sticky || m.count(i) > 0 {
			h.idleSince = 0
		} else if h.idleSince == 0 {
			h.idleSince = m.now
		}
		if !h.rec && m.count(i) == 0 {
			*h = mHost{}
		}
	}
}

func (m *model) advance(now, hostIdle int64) {
	m.now = now
	for i := range m.vips {
		v := &m.vips[i]
		if v.windowEnd > 0 && now >= v.windowEnd {
			v.windowEnd = 0
			m.settle()
		}
		if v.grace && m.graceOver(i) {
			m.endGrace(i)
		}
	}
	m.idle()
	for i := range m.hosts {
		h := &m.hosts[i]
		if h.idleSince > 0 && now-h.idleSince >= hostIdle {
			if m.vips[m.vipOf[i]].grace {
				h.idleSince = now
			} else {
				*h = mHost{}
			}
		}
	}
}

// closedTo is what a request of the host that is no reclaim does to grace.
func (m *model) closedTo(host int) bool {
	vip := m.vipOf[host]
	if h := &m.hosts[host]; m.vips[vip].grace && h.stage == stageReclaimed {
		h.stage = stageDone
		if m.graceOver(vip) {
			m.endGrace(vip)
		}
	}
	return m.vips[vip].grace
}

func (m *model) lock(r mRange, block, reclaim, monitor bool) wire.Status {
	host := m.hostOf[r.owner]
	v := m.vip(r.owner)
	ok := func() wire.Status {
		if monitor {
			m.monitor(r.owner)
		}
		if reclaim {
			m.reclaimed(host)
		}
		return wire.OK
	}
	if reclaim {
		if m.hosts[host].rec || m.count(host) > 0 {
			m.reclaimed(host)
		}
		if m.covered(r) {
			for _, p := range slices.Clone(m.pend) {
				if r.inside(p) && p.kind == r.kind {
					m.accept(p)
				}
			}
			for i := r.s; i <= r.e; i++ {
				m.plain[r.owner][r.file][i].conf = v.state
			}
			return ok()
		}
		if len(m.holders(r, true)) > 0 {
			return wire.ErrLockDenied
		}
		if !v.grace && v.windowEnd <= m.now {
			return wire.ErrLockGrace
		}
		m.set(r)
		return ok()
	}
	if m.closedTo(host) {
		return wire.ErrLockGrace
	}
	held := m.holders(r, false)
	if len(held) > 0 && !block {
		return wire.ErrLockDenied
	}
	covered := m.covered(r)
	if block && !(covered && len(held) == 0) {
		at := slices.IndexFunc(m.wait, func(w mRange) bool { return w.same(r) })
		n := at
		if at < 0 {
			n = len(m.wait)
		} else {
			r.barge = m.wait[at].barge
		}
		if m.reaches(held, r.owner, map[int]bool{}) {
			if at >= 0 {
				m.wait = slices.Delete(m.wait, at, at+1)
			}
			return wire.ErrLockDeadlock
		}
		var ahead []int
		if !r.barge {
			ahead = m.aheadOf(r, n)
		}
		if m.reaches(ahead, r.owner, map[int]bool{}) {
			ahead, r.barge = nil, true
		}
		if len(held)+len(ahead) > 0 {
			if at < 0 {
				m.ops++
				r.asked = m.ops
				m.wait = append(m.wait, r)
			} else {
				m.wait[at].barge = r.barge
			}
			if monitor {
				m.monitor(r.owner)
			}
			return wire.ErrLockBlocked
		}
	}
	if m.anyGrace() && !covered {
		return wire.ErrLockGrace
	}
	m.take(r)
	m.set(r)
	return ok()
}

func (m *model) accept(p mRange) {
	i := slices.IndexFunc(m.pend, p.same)
	p = m.pend[i]
	m.pend = slices.Delete(m.pend, i, i+1)
	m.confirm(p)
}

func (m *model) unlock(r mRange) {
	m.wait = slices.DeleteFunc(m.wait, r.inside)
	var keep []mRange
	for _, p := range m.pend {
		switch {
		case p.owner != r.owner || !p.meets(r):
			keep = append(keep, p)
		case m.unconf(p.owner, p.conf):
			keep = append(keep, p.minus(r)...)
		default:
			for _, x := range p.minus(r) {
				m.confirm(x)
			}
		}
	}
	m.pend = keep
	for i := r.s; i <= r.e; i++ {
		m.plain[r.owner][r.file][i] = cell{}
	}
}

func (m *model) cancel(r mRange) wire.Status {
	for _, l := range []*[]mRange{&m.wait, &m.pend} {
		if i := slices.IndexFunc(*l, r.same); i >= 0 {
			*l = slices.Delete(*l, i, i+1)
			return wire.OK
		}
	}
	return wire.ErrLockDenied
}

func (m *model) grantDone(p mRange, outcome wire.GrantOutcome) {
	i := slices.IndexFunc(m.pend, p.same)
	switch {
	case outcome == wire.GrantAccepted:
		m.accept(p)
	case !m.unconf(p.owner, m.pend[i].conf):
		m.pend = slices.Delete(m.pend, i, i+1)
	}
}

func (m *model) share(s mShare, reclaim, monitor bool) wire.Status {
	host := m.hostOf[s.owner]
	v := m.vip(s.owner)
	if !reclaim && m.closedTo(host) {
		return wire.ErrLockGrace
	}
	if reclaim && (m.hosts[host].rec || m.count(host) > 0) {
		m.reclaimed(host)
	}
	same := func(x mShare) bool {
		return x.owner == s.owner && x.file == s.file && x.mode == s.mode && x.access == s.access
	}
	i := slices.IndexFunc(m.shares, same)
	if i < 0 {
		hit := func(x mShare) bool {
			return x.file == s.file && x.owner != s.owner && (x.mode&s.access != 0 || s.mode&x.access != 0)
		}
		for _, x := range m.shares {
			if hit(x) && (reclaim || !m.yields(x.owner, x.conf)) {
				return wire.ErrLockDenied
			}
		}
		if reclaim && !v.grace && v.windowEnd <= m.now || !reclaim && m.anyGrace() {
			return wire.ErrLockGrace
		}
		m.shares = slices.DeleteFunc(m.shares, hit)
		i = len(m.shares)
		m.shares = append(m.shares, s)
	}
	if m.unconf(s.owner, m.shares[i].conf) || m.shares[i].conf == 0 {
		m.shares[i].conf = v.state
	}
	if monitor {
		m.monitor(s.owner)
	}
	if reclaim {
		m.reclaimed(host)
	}
	return wire.OK
}

// drop removes everything that match says of (owner, file).
func (m *model) drop(match func(owner, file int) bool) {
	for o := range m.plain {
		for f := range m.plain[o] {
			if match(o, f) {
				m.plain[o][f] = [span]cell{}
			}
		}
	}
	gone := func(r mRange) bool { return match(r.owner, r.file) }
	m.pend = slices.DeleteFunc(m.pend, gone)
	m.wait = slices.DeleteFunc(m.wait, gone)
	m.shares = slices.DeleteFunc(m.shares, func(s mShare) bool { return match(s.owner, s.file) })
}

func (m *model) startGrace(vip int) {
	m.vips[vip].grace = true
	for h := range m.hosts {
		if m.vipOf[h] == vip {
			m.hosts[h].stage = stageNone
			if m.hosts[h].rec {
				m.hosts[h].stage = stageKnown
			}
		}
	}
}

func (m *model) service(vip int, state uint32, crashed, forget bool, window int64) {
	v := &m.vips[vip]
	if state <= v.state {
		return
	}
	v.state = state
	if forget {
		m.drop(func(o, _ int) bool { return m.vipOf[m.hostOf[o]] == vip })
	}
	if forget || crashed {
		v.crash, v.windowEnd = state, m.now+window
	}
	if forget || crashed && v.grace {
		m.startGrace(vip)
	}
}

// text is everything that shows, in a form that the table can be brought into.
func (m *model) text() string {
	var b strings.Builder
	mark := map[bool]string{true: "?"}
	for o := range m.plain {
		for f := range m.plain[o] {
			s := ""
			for _, c := range m.plain[o][f] {
				s += " " + ".sx"[c.kind:c.kind+1] + mark[c.kind > 0 && m.unconf(o, c.conf)]
			}
			if strings.Trim(s, " .") != "" {
				fmt.Fprintf(&b, "held o%d f%d%s\n", o, f, s)
			}
		}
	}
	var l []string
	for _, p := range m.pend {
		l = append(l, fmt.Sprintf("pending o%d f%d %d-%d %d%s\n", p.owner, p.file, p.s, p.e, p.kind, mark[m.unconf(p.owner, p.conf)]))
	}
	for _, s := range m.shares {
		l = append(l, fmt.Sprintf("share o%d f%d %d %d%s\n", s.owner, s.file, s.mode, s.access, mark[m.unconf(s.owner, s.conf)]))
	}
	slices.Sort(l)
	b.WriteString(strings.Join(l, ""))
	for _, w := range m.wait {
		fmt.Fprintf(&b, "wait o%d f%d %d-%d %d barge=%v\n", w.owner, w.file, w.s, w.e, w.kind, w.barge)
	}
	for i, v := range m.vips {
		fmt.Fprintf(&b, "vip%d state=%d crash=%d end=%d grace=%v\n", i, v.state, v.crash, v.windowEnd, v.grace)
	}
	for i, h := range m.hosts {
		if h.rec {
			fmt.Fprintf(&b, "host%d state=%d notified=%d stage=%d sticky=%v\n", i, h.state, h.notified, h.stage, h.sticky)
		}
	}
	return b.String()
}
