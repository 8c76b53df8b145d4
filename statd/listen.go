package statd

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

// listEvery is the shortest time between two readings of the monitor list for
// NOTIFY calls: what comes meanwhile is answered from the next one, so that a
// flood of calls costs a bounded number of readings.
const listEvery = 100 * time.Millisecond

// enqueue hands a NOTIFY call to listen. A call without an answer is repeated
// by its client, so one that there is no room for is dropped.
func (a *Address) enqueue(c *sunrpc.Call) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running {
		select {
		case a.calls <- c:
			return
		default:
			a.limited(slog.LevelWarn, "too many SM_NOTIFY calls at once, some were dropped")
		}
	}
	a.stats.dropped.Add(1)
	c.Drop()
}

// listen acts on NOTIFY calls, in the order of their arrival, as many as have
// come with each reading of the monitor list.
func (a *Address) listen() {
	defer func() {
		for { // nothing is added after Stop has begun
			select {
			case c := <-a.calls:
				a.stats.dropped.Add(1)
				c.Drop()
			default:
				return
			}
		}
	}()
	for {
		var batch []*sunrpc.Call
		select {
		case <-a.ctx.Done():
			return
		case c := <-a.calls:
			batch = append(batch, c)
		}
		for more := true; more && len(batch) < maxCalls; {
			select {
			case c := <-a.calls:
				batch = append(batch, c)
			default:
				more = false
			}
		}
		a.notified(batch)
		if !a.srv.pause(a.ctx, listEvery) {
			return
		}
	}
}

// notified answers NOTIFY calls. A call is answered when what it asks for is
// durable, and not at all if the table cannot be reached.
func (a *Address) notified(batch []*sunrpc.Call) {
	hosts, err := a.hosts(a.ctx)
	if err != nil {
		a.limited(slog.LevelWarn, "SM_NOTIFY calls are left unanswered", "err", err)
		for _, c := range batch {
			a.stats.dropped.Add(1)
			c.Drop()
		}
		return
	}
	byAddr := make(map[netip.Addr][]*wire.MonitoredHost)
	for i := range hosts {
		h := &hosts[i]
		if h.Host.VIP == a.owner.VIP {
			ip := h.Host.Addr.Unmap()
			byAddr[ip] = append(byAddr[ip], h)
		}
	}
	for _, c := range batch {
		var n nsm.StatChge
		if n.Decode(xdr.NewReader(c.Args)) != nil {
			c.Fail(sunrpc.GarbageArgs)
			continue
		}
		from := c.Remote.Addr().Unmap().WithZone("")
		if a.restarted(byAddr[from], from, &n) {
			c.Finish()
		} else {
			a.stats.dropped.Add(1)
			c.Drop()
		}
	}
}

// restarted acts on one NOTIFY; false if that has to be tried again.
func (a *Address) restarted(at []*wire.MonitoredHost, from netip.Addr, n *nsm.StatChge) bool {
	acts, v := judge(at, from, n)
	attrs := []any{"client", from, "mon_name", n.MonName, "state", n.State}
	switch v {
	case noState:
		a.stats.noState.Add(1)
		a.limited(slog.LevelInfo, "SM_NOTIFY without a state ignored", attrs...)
	case unmonitored:
		a.stats.unmonitored.Add(1)
		a.limited(slog.LevelInfo, "SM_NOTIFY from an address that is not monitored ignored", attrs...)
	case sameState:
		a.stats.sameState.Add(1)
	case ambiguous:
		a.stats.ambiguous.Add(1)
		a.limited(slog.LevelWarn, "SM_NOTIFY ignored: the address has several hosts, and the name is none of theirs; "+
			"if locks of a host that has restarted stay, remove them with \"baton locks release\"", attrs...)
	}
	var freed uint32
	for _, h := range acts {
		rep, err := a.call(a.ctx, wire.OpLockFree, wire.FlagWaitCommit, a.hostArgs(h.Host), uint64(n.State))
		if errors.Is(err, wire.ErrNoEnt) {
			continue // gone since the list was read
		}
		if err != nil {
			a.limited(slog.LevelWarn, "the locks of a client that has restarted could not be freed", append(attrs, "err", err)...)
			return false
		}
		h.State = n.State // for further copies of the call in this batch
		freed += rep.Freed
		for _, m := range decodeNote(h.Note) {
			a.callback(m, h.Host.Name, n.State)
		}
	}
	if v == actOn {
		a.stats.acted.Add(1)
		a.stats.freed.Add(uint64(freed))
		a.log.Info("a client has restarted, its locks are freed", append(attrs, "locks", freed)...)
	}
	return true
}

// verdict is what a NOTIFY call comes to.
type verdict uint8

const (
	actOn verdict = iota
	noState
	unmonitored
	sameState
	ambiguous
)

// judge decides which hosts a NOTIFY call from an address is about, given the
// monitored hosts with that address. The address is what counts: mon_name is
// the name that the client's status monitor has for itself, which need not be
// the one that its lock manager uses. It only serves to tell hosts apart that
// share an address.
func judge(at []*wire.MonitoredHost, from netip.Addr, n *nsm.StatChge) ([]*wire.MonitoredHost, verdict) {
	if n.State == 0 {
		// The table could not tell a repetition from a second restart.
		return nil, noState
	}
	if len(at) == 0 {
		return nil, unmonitored
	}
	// Records that name the address itself are about every host there.
	var byAddr, named, matched []*wire.MonitoredHost
	for _, h := range at {
		if ip, err := netip.ParseAddr(h.Host.Name); err == nil && ip.Unmap() == from {
			byAddr = append(byAddr, h)
			continue
		}
		named = append(named, h)
		if sameHost(h.Host.Name, n.MonName) {
			matched = append(matched, h)
		}
	}
	if len(matched) > 0 {
		named = matched
	}
	v := sameState
	if !oneHost(named) {
		named, v = nil, ambiguous
	}
	var acts []*wire.MonitoredHost
	for _, h := range append(byAddr, named...) {
		if h.State != n.State {
			acts = append(acts, h)
		}
	}
	if len(acts) > 0 && v != ambiguous {
		v = actOn
	}
	return acts, v
}

// sameHost tells whether two names may be those of one host: they are equal,
// or one is the other without its domain.
func sameHost(a, b string) bool {
	a, b = strings.TrimSuffix(a, "."), strings.TrimSuffix(b, ".")
	la, lb := firstLabel(a), firstLabel(b)
	return strings.EqualFold(a, b) || (len(la) == len(a) || len(lb) == len(b)) && strings.EqualFold(la, lb)
}

// firstLabel is a host name without its domain; an IP address is left whole.
func firstLabel(s string) string {
	if _, err := netip.ParseAddr(s); err == nil {
		return s
	}
	label, _, _ := strings.Cut(s, ".")
	return label
}

// oneHost tells whether all records may be one host's.
func oneHost(hs []*wire.MonitoredHost) bool {
	var long string // a name with its domain, if there is one
	for _, h := range hs {
		if len(h.Host.Name) > len(long) {
			long = h.Host.Name
		}
	}
	for _, h := range hs {
		if !sameHost(h.Host.Name, long) {
			return false
		}
	}
	return true
}
