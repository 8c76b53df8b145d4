package locks

import (
	"math"
	"slices"

	"github.com/baton-nfs/baton/recovery/wire"
)

// vip is a service address.
type vip struct {
	num       uint32
	state     uint32 // NSM state
	crash     uint32 // NSM state at the last crash: what was confirmed before is unconfirmed
	windowEnd int64  // end of the reclaim window or grace period
	grace     bool
	noEarly   bool   // not all hosts are known: grace lasts to its end
	damage    uint64 // the last damage that a grace period was held for
	rec       bool   // has a record
	dirty     bool

	locks, pending, waiting, shares int
	unconfLocks, unconfShares       int
	grants                          seqList

	// In grace.
	members, unreclaimed, awaiting int // hosts known, not yet reclaiming, still reclaiming
	lastReclaim                    int64
}

// Stages of a host in a grace period.
const (
	stageNone      = iota // not waited for
	stageKnown            // known since before
	stageReclaimed        // has reclaimed something
	stageDone             // has no more to reclaim
)

type host struct {
	key    wire.LockHost
	v      *vip
	n      int // entries
	first  *entry
	owners map[ownerKey]*owner

	waiting int
	stage   uint8

	// The record, when it is monitored.
	rec      bool
	sticky   bool // stays when it holds nothing
	since    int64
	state    uint32
	notified uint32
	note     []byte

	dirty, stored, dead bool

	idle               bool // in the list of hosts that hold nothing
	idleSince          int64
	idlePrev, idleNext *host
}

func (t *Table) findVIP(num uint32) *vip {
	if i, ok := slices.BinarySearchFunc(t.vips, num, cmpVIP); ok {
		return t.vips[i]
	}
	return nil
}

func cmpVIP(v *vip, num uint32) int {
	switch {
	case v.num < num:
		return -1
	case v.num > num:
		return 1
	}
	return 0
}

func (t *Table) makeVIP(num uint32) *vip {
	i, ok := slices.BinarySearchFunc(t.vips, num, cmpVIP)
	if !ok {
		v := &vip{num: num}
		if t.loaded && len(t.vips) > 0 {
			// Every address that was ever served has a record, whose key tells
			// its number even when it is damaged: this one has lost nothing.
			v.damage = t.damage
		}
		t.vips = slices.Insert(t.vips, i, v)
	}
	return t.vips[i]
}

func (t *Table) touchVIP(v *vip) {
	v.rec = true
	if !v.dirty {
		v.dirty = true
		t.dirtyVIPs = append(t.dirtyVIPs, v)
	}
}

func (t *Table) touchHost(h *host) {
	if !h.dirty {
		h.dirty = true
		t.dirtyHosts = append(t.dirtyHosts, h)
	}
}

func (t *Table) makeHost(k wire.LockHost) *host {
	if h := t.hosts[k]; h != nil {
		return h
	}
	return &host{key: k, v: t.makeVIP(k.VIP), owners: map[ownerKey]*owner{}}
}

// hostRoom tells whether one more host can be known, and makes room at the cost
// of the one that has held nothing for longest.
func (t *Table) hostRoom() bool {
	if len(t.hosts) >= t.lim.Hosts && t.idleHead != nil && !t.idleHead.v.grace {
		t.forgetHost(t.idleHead)
	}
	return len(t.hosts) < t.lim.Hosts
}

// monitor makes the host's record.
func (t *Table) monitor(h *host) {
	if h.rec {
		return
	}
	// The host has met the address in its present state: there is nothing to
	// tell it before the next.
	h.rec, h.since, h.notified = true, t.now, h.v.state
	t.recs++
	t.touchHost(h)
}

// forgetHost removes the record of a host that holds nothing.
func (t *Table) forgetHost(h *host) {
	t.idleRemove(h)
	t.setStage(h, stageNone)
	if h.rec {
		h.rec, h.dead = false, true
		t.recs--
		t.touchHost(h)
	}
	delete(t.hosts, h.key)
}

// hostEmpty is called when the last entry of a host has gone.
func (t *Table) hostEmpty(h *host) {
	if !h.rec {
		t.forgetHost(h)
	} else if !h.sticky {
		t.idleAdd(h)
	}
}

func (t *Table) idleAdd(h *host) {
	if h.idle {
		return
	}
	h.idle, h.idleSince, h.idlePrev, h.idleNext = true, t.now, t.idleTail, nil
	if t.idleTail != nil {
		t.idleTail.idleNext = h
	} else {
		t.idleHead = h
	}
	t.idleTail = h
}

func (t *Table) idleRemove(h *host) {
	if !h.idle {
		return
	}
	if h.idlePrev != nil {
		h.idlePrev.idleNext = h.idleNext
	} else {
		t.idleHead = h.idleNext
	}
	if h.idleNext != nil {
		h.idleNext.idlePrev = h.idlePrev
	} else {
		t.idleTail = h.idlePrev
	}
	h.idle, h.idlePrev, h.idleNext = false, nil, nil
}

func (t *Table) setStage(h *host, stage uint8) {
	v := h.v
	count := func(stage uint8, n int) {
		switch stage {
		case stageNone:
			return
		case stageKnown:
			v.unreclaimed += n
		case stageReclaimed:
			v.awaiting += n
		}
		v.members += n
	}
	count(h.stage, -1)
	h.stage = stage
	count(stage, 1)
}

// reclaimed notes that a host reclaims.
func (t *Table) reclaimed(h *host) {
	if h.v.grace {
		t.setStage(h, stageReclaimed)
		h.v.lastReclaim = t.now
	}
}

// graceOver tells whether the grace period's time is up or all known hosts have
// reclaimed what they held. With no host known it lasts to its end.
func (v *vip) graceOver(now int64) bool {
	if now >= v.windowEnd {
		return true
	}
	return !v.noEarly && v.members > 0 && v.unreclaimed == 0 && (v.awaiting == 0 || now >= v.lastReclaim+reclaimQuiet)
}

// startGrace begins a grace period, again if there is one: all hosts that are
// known have to reclaim.
func (t *Table) startGrace(v *vip) {
	if !v.grace {
		v.grace = true
		t.graces++
	}
	v.members, v.unreclaimed, v.awaiting = 0, 0, 0
	for _, h := range t.hosts {
		if h.v == v {
			h.stage = stageNone
			if h.rec {
				t.setStage(h, stageKnown)
			}
		}
	}
}

// endGrace gives waiting requests of other addresses what they waited for.
func (t *Table) endGrace(v *vip) {
	v.grace, v.noEarly = false, false
	t.graces--
	for _, h := range t.hosts {
		if h.v == v {
			h.stage = stageNone
		}
	}
	v.members, v.unreclaimed, v.awaiting = 0, 0, 0
	t.touchVIP(v)
	t.examineAll()
	t.settle()
}

// Free is OpLockFree: a client has restarted, everything of it goes. state is
// its new NSM state, 0 when unknown; a state that the host is known to be in
// changes nothing. An empty name means all names at the address. It returns how
// many entries went.
func (t *Table) Free(now int64, k wire.LockHost, allVIPs bool, nsmState uint32) (freed int) {
	k, _ = normal(k)
	t.advance(now)
	defer t.settle()
	for _, h := range t.match(k, allVIPs) {
		if nsmState != 0 && h.rec {
			if h.state == nsmState {
				continue
			}
			h.state = nsmState
			t.touchHost(h)
		}
		freed += t.clearHost(h)
	}
	return freed
}

// match finds the hosts that a request means, in order.
func (t *Table) match(k wire.LockHost, allVIPs bool) []*host {
	if k.Name != "" && !allVIPs {
		if h := t.hosts[k]; h != nil {
			return []*host{h}
		}
		return nil
	}
	var l []*host
	for _, h := range t.hosts {
		if h.key.Addr == k.Addr && (k.Name == "" || h.key.Name == k.Name) && (allVIPs || h.key.VIP == k.VIP) {
			l = append(l, h)
		}
	}
	slices.SortFunc(l, func(a, b *host) int { return compareHosts(a.key, b.key) })
	return l
}

func (t *Table) clearHost(h *host) int {
	var l []*entry
	for e := h.first; e != nil; e = e.hostNext {
		l = append(l, e)
	}
	slices.SortFunc(l, byID)
	for _, e := range l {
		t.free(e)
	}
	return len(l)
}

// Monitor is OpLockMonitor: the host stays monitored whether it holds something
// or not. ErrLockNoLocks when too many hosts are known.
func (t *Table) Monitor(now int64, k wire.LockHost, note []byte) wire.Status {
	k, ok := normal(k)
	if !ok || len(note) > wire.MaxLockNote {
		return wire.ErrProto
	}
	t.advance(now)
	h := t.hosts[k]
	if h == nil {
		if !t.hostRoom() {
			return wire.ErrLockNoLocks
		}
		h = t.makeHost(k)
		t.hosts[k] = h
	}
	t.idleRemove(h)
	t.monitor(h)
	if !h.sticky || !slices.Equal(h.note, note) {
		h.sticky, h.note = true, slices.Clone(note)
		t.touchHost(h)
	}
	return wire.OK
}

// Unmonitor is OpLockUnmonitor: hosts that hold nothing go, others when they
// hold nothing any more. An empty name means all names at the address.
func (t *Table) Unmonitor(now int64, k wire.LockHost) wire.Status {
	k, _ = normal(k)
	t.advance(now)
	for _, h := range t.match(k, false) {
		switch {
		case h.n == 0:
			t.forgetHost(h)
		case h.sticky || len(h.note) > 0:
			h.sticky, h.note = false, nil
			t.touchHost(h)
		}
	}
	return wire.OK
}

// Notified is OpLockNotified: the host has been told of its address's NSM
// state. It does nothing when the host is not monitored any more or knows a
// later state.
func (t *Table) Notified(now int64, k wire.LockHost, state uint32) wire.Status {
	k, _ = normal(k)
	t.advance(now)
	if h := t.hosts[k]; h != nil && h.rec && h.notified < state {
		h.notified = state
		t.touchHost(h)
	}
	return wire.OK
}

// Service is OpLockService: the address begins to be served in a newer NSM
// state. After a crash everything of it is unconfirmed and a reclaim window
// begins; with Forget, or when records were damaged, everything of it goes and
// a grace period begins. A state that is not newer changes nothing.
func (t *Table) Service(now int64, num uint32, a *wire.LockArgs) wire.LockServiceInfo {
	t.advance(now)
	defer t.settle()
	if a.NSMState == 0 {
		return t.info(t.findVIP(num), num)
	}
	v := t.makeVIP(num)
	if a.NSMState <= v.state {
		return t.info(v, num)
	}
	v.state = a.NSMState
	t.touchVIP(v)
	end := max(now+min(max(a.Window, 0), maxWindow), 1)
	switch {
	case a.Forget || v.damage < t.damage:
		for _, e := range t.vipEntries(v) {
			t.free(e)
		}
		v.noEarly = v.noEarly || v.damage < t.hostDamage
		v.crash, v.windowEnd, v.damage = v.state, end, t.damage
		t.startGrace(v)
	case a.Crashed:
		v.crash, v.windowEnd = v.state, end
		v.unconfLocks, v.unconfShares = v.locks, v.shares
		if v.grace {
			t.startGrace(v)
		}
		t.granted = t.granted || v.pending > 0
	}
	return t.info(v, num)
}

// Info describes the lock service of one service address.
func (t *Table) Info(num uint32) wire.LockServiceInfo { return t.info(t.findVIP(num), num) }

// vipEntries gives all entries of a service address by ID.
func (t *Table) vipEntries(v *vip) []*entry {
	var l []*entry
	for _, it := range t.ids.l {
		if it.e != nil && it.e.o.h.v == v {
			l = append(l, it.e)
		}
	}
	return l
}

func (t *Table) info(v *vip, num uint32) wire.LockServiceInfo {
	if v == nil {
		return wire.LockServiceInfo{Damaged: t.damage > 0 && len(t.vips) == 0}
	}
	i := wire.LockServiceInfo{
		NSMState: v.state, WindowEnd: v.windowEnd, Grace: v.grace, Damaged: v.damage < t.damage,
		Granted: uint32(v.locks - v.unconfLocks), Unconfirmed: uint32(v.unconfLocks + v.unconfShares),
		Waiting: uint32(v.waiting), Shares: uint32(v.shares),
	}
	for _, h := range t.hosts {
		if h.v == v && h.rec {
			i.Hosts++
			if h.notified < v.crash {
				i.HostsUnnotified++
			}
		}
	}
	if v.grace {
		i.HostsReclaimed = uint32(v.members - v.unreclaimed)
	}
	return i
}

// Hosts gives the monitored hosts of one service address or of all, in order.
func (t *Table) Hosts(num uint32, allVIPs bool) []wire.MonitoredHost {
	var l []wire.MonitoredHost
	for _, h := range t.hosts {
		if h.rec && (allVIPs || h.key.VIP == num) {
			l = append(l, wire.MonitoredHost{Host: h.key, Since: h.since, State: h.state, Notified: h.notified,
				Locks: uint32(h.n), Note: slices.Clone(h.note)})
		}
	}
	slices.SortFunc(l, func(a, b wire.MonitoredHost) int { return compareHosts(a.Host, b.Host) })
	return l
}

// Damaged tells whether lock records were unreadable and a service address that
// is known has had no grace period since.
func (t *Table) Damaged() bool {
	if t.damage == 0 {
		return false
	}
	for _, v := range t.vips {
		if v.damage < t.damage {
			return true
		}
	}
	return len(t.vips) == 0
}

// NextTick is the time at which Tick has something to do; 0: never.
func (t *Table) NextTick() int64 {
	next := int64(math.MaxInt64)
	for _, v := range t.vips {
		if v.windowEnd > 0 {
			next = min(next, v.windowEnd)
		}
		if v.grace && !v.noEarly && v.members > 0 && v.unreclaimed == 0 {
			due := v.lastReclaim
			if v.awaiting > 0 {
				due += reclaimQuiet
			}
			next = min(next, due)
		}
	}
	if t.idleHead != nil {
		next = min(next, t.idleHead.idleSince+t.lim.HostIdle)
	}
	if next == math.MaxInt64 {
		return 0
	}
	return max(next, 1)
}

// Tick does what is due: ends reclaim windows and grace periods, gives waiting
// requests what only locks were in the way of that nobody reclaimed, and
// forgets hosts that have held nothing for long. Every other operation does so,
// too, before its own work.
func (t *Table) Tick(now int64) {
	t.advance(now)
	t.settle()
}

func (t *Table) advance(now int64) {
	t.now = now
	t.ops++
	if n := t.NextTick(); n == 0 || now < n {
		return
	}
	for _, v := range t.vips {
		if v.windowEnd > 0 && now >= v.windowEnd {
			v.windowEnd = 0
			t.touchVIP(v)
			if !v.grace {
				t.examineAll()
			}
		}
		if v.grace && v.graceOver(now) {
			t.endGrace(v)
		}
	}
	t.settle()
	for h := t.idleHead; h != nil && now-h.idleSince >= t.lim.HostIdle; h = t.idleHead {
		if h.v.grace {
			// It may have locks to reclaim.
			t.idleRemove(h)
			t.idleAdd(h)
			continue
		}
		t.forgetHost(h)
	}
}
