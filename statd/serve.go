package statd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

type handler struct{ a *Address }

// tableWait bounds a local program's wait for the table, resolveWait that for
// the resolver.
const (
	tableWait   = 10 * time.Second
	resolveWait = 5 * time.Second
)

// ServeRPC answers an NSM call.
func (h handler) ServeRPC(c *sunrpc.Call) {
	a := h.a
	r := xdr.NewReader(c.Args)
	local := a.srv.local(c.Remote.Addr().Unmap())
	switch c.Proc {
	case nsm.ProcStat:
		var n nsm.SMName
		if n.Decode(r) != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		// Not resolved: anybody may ask, and would make this server ask others.
		a.finishRes(c, a.state.Load() != 0)
	case nsm.ProcMon:
		var m nsm.Mon
		switch {
		case m.Decode(r) != nil:
			c.Fail(sunrpc.GarbageArgs)
		case !local:
			a.refused(c)
			a.finishRes(c, false)
		default:
			c.Go(func(c *sunrpc.Call) {
				err := a.mon(&m)
				if err != nil {
					a.limited(slog.LevelWarn, "a host cannot be monitored", "host", m.MonID.MonName, "err", err)
				}
				a.finishRes(c, err == nil)
			})
		}
	case nsm.ProcUnmon:
		var id nsm.MonID
		if id.Decode(r) != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		a.unmonCall(c, local, func(h *wire.MonitoredHost) bool {
			return strings.EqualFold(h.Host.Name, id.MonName)
		}, id.MyID)
	case nsm.ProcUnmonAll:
		var id nsm.MyID
		if id.Decode(r) != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		a.unmonCall(c, local, func(*wire.MonitoredHost) bool { return true }, id)
	case nsm.ProcSimuCrash:
		if !local {
			a.refused(c)
			c.Drop()
			return
		}
		f := a.srv.cfg.SimuCrash
		if f == nil {
			c.Finish()
			return
		}
		c.Go(func(c *sunrpc.Call) {
			a.log.Warn("a crash is simulated by order of a local program")
			f(a.owner.VIP)
			c.Finish()
		})
	case nsm.ProcNotify:
		a.enqueue(c)
	default:
		c.Fail(sunrpc.ProcUnavail)
	}
}

func (a *Address) finishRes(c *sunrpc.Call, ok bool) {
	res := nsm.SMStatRes{ResStat: nsm.StatFail, State: a.state.Load()}
	if ok {
		res.ResStat = nsm.StatSucc
	}
	res.Encode(&c.Out)
	c.Finish()
}

// unmonCall answers UNMON and UNMON_ALL, whose result has no room for failures.
func (a *Address) unmonCall(c *sunrpc.Call, local bool, match func(*wire.MonitoredHost) bool, id nsm.MyID) {
	finish := func(c *sunrpc.Call) {
		res := nsm.SMStat{State: a.state.Load()}
		res.Encode(&c.Out)
		c.Finish()
	}
	if !local {
		a.refused(c)
		finish(c)
		return
	}
	c.Go(func(c *sunrpc.Call) {
		if err := a.unmon(match, id); err != nil {
			a.limited(slog.LevelWarn, "the monitoring of a host could not be ended", "err", err)
		}
		finish(c)
	})
}

func (a *Address) refused(c *sunrpc.Call) {
	a.stats.refused.Add(1)
	a.limited(slog.LevelWarn, "refused: only for programs of this machine", "client", c.Remote, "procedure", c.Proc)
}

// A monitor is a local program that wants to know of a host's restarts. The
// monitors of a host are its record's Note: a version word, a count, and that
// many my_id and priv.
type monitor struct {
	id   nsm.MyID
	priv [nsm.PrivSize]byte
}

const (
	noteVersion = 1
	// maxMonitors is above what fits into a note.
	maxMonitors = wire.MaxLockNote / (4 + 12 + nsm.PrivSize)
)

var errNoteFull = fmt.Errorf("the programs that monitor the host need more than %d bytes", wire.MaxLockNote)

func encodeNote(ms []monitor) ([]byte, error) {
	if len(ms) == 0 {
		return nil, nil
	}
	var w xdr.Writer
	w.Uint32(noteVersion)
	w.Uint32(uint32(len(ms)))
	for i := range ms {
		ms[i].id.Encode(&w)
		w.FixedOpaque(ms[i].priv[:])
	}
	if len(w.Buf) > wire.MaxLockNote {
		return nil, errNoteFull
	}
	return w.Buf, nil
}

// decodeNote reads a Note; nil when there is none or it is not one of this
// package's.
func decodeNote(b []byte) []monitor {
	r := xdr.NewReader(b)
	if r.Uint32() != noteVersion {
		return nil
	}
	n := r.Uint32()
	if r.Err() != nil || n > maxMonitors {
		return nil
	}
	ms := make([]monitor, n)
	for i := range ms {
		_ = ms[i].id.Decode(r) // r keeps the error
		copy(ms[i].priv[:], r.FixedOpaque(nsm.PrivSize))
	}
	if r.Err() != nil {
		return nil
	}
	return ms
}

// maxMonAddrs bounds the addresses of a monitored name.
const maxMonAddrs = 16

var errNoAddress = errors.New("the name has no address")

// monAddrs finds the addresses that a mon_name stands for.
func (a *Address) monAddrs(name string) ([]netip.Addr, error) {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '\uFFFD' }) {
		return nil, errNoAddress
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{ip.Unmap().WithZone("")}, nil
	}
	ctx, cancel := context.WithTimeout(a.ctx, resolveWait)
	defer cancel()
	found, err := a.srv.cfg.Resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	var l []netip.Addr
	seen := make(map[netip.Addr]bool)
	for _, ip := range found {
		ip = ip.Unmap().WithZone("")
		if ip.IsValid() && !seen[ip] && len(l) < maxMonAddrs {
			seen[ip] = true
			l = append(l, ip)
		}
	}
	if len(l) == 0 {
		return nil, errNoAddress
	}
	return l, nil
}

// mon adds a monitor to all addresses of a host, durably.
func (a *Address) mon(m *nsm.Mon) error {
	addrs, err := a.monAddrs(m.MonID.MonName)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(a.ctx, tableWait)
	defer cancel()
	a.monMu.Lock()
	defer a.monMu.Unlock()
	hosts, err := a.hosts(ctx)
	if err != nil {
		return err
	}
	notes := make(map[wire.LockHost][]byte)
	for i := range hosts {
		if len(hosts[i].Note) > 0 {
			notes[hosts[i].Host] = hosts[i].Note
		}
	}
	for _, ip := range addrs {
		h := wire.LockHost{VIP: a.owner.VIP, Addr: ip, Name: m.MonID.MonName}
		ms := without(decodeNote(notes[h]), &m.MonID.MyID)
		note, err := encodeNote(append(ms, monitor{m.MonID.MyID, m.Priv}))
		if err != nil {
			return err
		}
		args := a.hostArgs(h)
		args.Note = note
		if _, err := a.call(ctx, wire.OpLockMonitor, wire.FlagWaitCommit, args, 0); err != nil {
			return fmt.Errorf("statd: monitor %v: %w", h, err)
		}
	}
	return nil
}

func without(ms []monitor, id *nsm.MyID) []monitor {
	keep := ms[:0]
	for _, m := range ms {
		if m.id != *id {
			keep = append(keep, m)
		}
	}
	return keep
}

// unmon takes a monitor away from all hosts that match, durably. Hosts that
// nobody monitors any more leave the list unless they hold locks.
func (a *Address) unmon(match func(*wire.MonitoredHost) bool, id nsm.MyID) error {
	ctx, cancel := context.WithTimeout(a.ctx, tableWait)
	defer cancel()
	a.monMu.Lock()
	defer a.monMu.Unlock()
	hosts, err := a.hosts(ctx)
	if err != nil {
		return err
	}
	for i := range hosts {
		h := &hosts[i]
		if len(h.Note) == 0 || !match(h) {
			continue
		}
		old := decodeNote(h.Note)
		n := len(old)
		ms := without(old, &id)
		if len(ms) == n {
			continue
		}
		op, args := wire.OpLockMonitor, a.hostArgs(h.Host)
		if len(ms) == 0 {
			op = wire.OpLockUnmonitor // which also clears the Note of those that stay
		}
		if args.Note, err = encodeNote(ms); err != nil {
			return err
		}
		if _, err := a.call(ctx, op, wire.FlagWaitCommit, args, 0); err != nil {
			return fmt.Errorf("statd: unmonitor %v: %w", h.Host, err)
		}
	}
	return nil
}
