package lockctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Free releases everything that a client holds or waits for, as if it had
// restarted; it is durable when it returns.
func (a *Admin) Free(ctx context.Context, args FreeArgs) (*FreeResult, error) {
	w := newWho(args.Client)
	if w == nil {
		return nil, errors.New("release: no client named")
	}
	hosts, err := a.holders(ctx, w)
	if err != nil {
		return nil, err
	}
	m, err := a.names(ctx)
	if err != nil {
		return nil, err
	}
	var vips, addrs []string
	for _, h := range hosts {
		vips = append(vips, m.addr(h.VIP))
		addrs = append(addrs, addrText(h.Addr))
	}
	slices.Sort(addrs)
	addrs, vips = slices.Compact(addrs), slices.Compact(vips) // vips: in the order of their index
	switch {
	case len(hosts) == 0:
		return nil, fmt.Errorf("no such client: %q holds no locks and waits for none", args.Client)
	case len(addrs) > 1:
		return nil, fmt.Errorf("several clients call themselves %q: give the address of one: %s", args.Client, strings.Join(addrs, ", "))
	case len(vips) > 1 && !args.AllAddresses:
		return nil, fmt.Errorf("%q has locks towards several service addresses (%s): to release them all, give --all-addresses", args.Client, strings.Join(vips, ", "))
	}
	res := &FreeResult{Clients: []Freed{}}
	for _, h := range hosts {
		req := &wire.Request{Lock: &wire.LockArgs{Owner: wire.LockOwner{LockHost: h}}}
		req.Op, req.Flags = wire.OpLockFree, wire.FlagWaitCommit
		v, ok := m[h.VIP]
		if !ok {
			v = mgs.VIP{Index: h.VIP}
		}
		rep, err := a.call(ctx, v, req)
		if err != nil {
			res.Failed = fmt.Sprintf("locks of %s towards %s: %v", addrText(h.Addr), m.addr(h.VIP), err)
			break
		}
		res.Clients = append(res.Clients, Freed{Client: h.Name, ClientAddr: addrText(h.Addr), Addr: m.addr(h.VIP), Freed: rep.Lock.Freed})
	}
	return res, nil
}

// holders finds the clients of a selection that have entries in the lock table,
// in the order of service address, address and name. The list of monitored
// clients does not have them all.
func (a *Admin) holders(ctx context.Context, w *who) ([]wire.LockHost, error) {
	seen := map[wire.LockHost]bool{}
	var hosts []wire.LockHost
	for after := uint64(0); ; {
		page, eof, err := a.page(ctx, wire.FID{}, after, pageLocks)
		if err != nil {
			return nil, err
		}
		for i := range page {
			if h := page[i].Owner.LockHost; w.match(&h) && !seen[h] {
				seen[h] = true
				hosts = append(hosts, h)
			}
			after = page[i].ID
		}
		if eof {
			break
		}
	}
	slices.SortFunc(hosts, compareHosts)
	return hosts, nil
}

func compareHosts(a, b wire.LockHost) int {
	return cmp.Or(cmp.Compare(a.VIP, b.VIP), a.Addr.Compare(b.Addr), cmp.Compare(a.Name, b.Name))
}

// HostKey is the place of a client in the list of monitored clients.
type HostKey struct {
	VIP  uint32     `json:"vip"`
	Addr netip.Addr `json:"addr"`
	Name []byte     `json:"name"`
}

// HostsArgs are the arguments of control.CmdLockHosts.
type HostsArgs struct {
	// After is HostsResult.Next of the page before.
	After *HostKey `json:"after,omitempty"`
}

// HostsResult is a page of the monitored clients, in the order of service
// address, address and name. Next is nil on the last page.
type HostsResult struct {
	Hosts []status.LockHost `json:"hosts"`
	Next  *HostKey          `json:"next,omitempty"`
}

// Hosts returns a page of the clients that are told of restarts.
func (a *Admin) Hosts(ctx context.Context, args HostsArgs) (*HostsResult, error) {
	req := &wire.Request{Lock: &wire.LockArgs{AllVIPs: true}}
	req.Op = wire.OpLockHosts
	rep, err := a.call(ctx, mgs.VIP{}, req)
	if err != nil {
		return nil, fmt.Errorf("list monitored clients: %w", err)
	}
	l := rep.Lock.Hosts
	slices.SortFunc(l, func(a, b wire.MonitoredHost) int { return compareHosts(a.Host, b.Host) })
	if k := args.After; k != nil {
		at := wire.LockHost{VIP: k.VIP, Addr: k.Addr, Name: string(k.Name)}
		i, found := slices.BinarySearchFunc(l, at, func(h wire.MonitoredHost, at wire.LockHost) int { return compareHosts(h.Host, at) })
		if found {
			i++
		}
		l = l[i:]
	}
	m, err := a.names(ctx)
	if err != nil {
		return nil, err
	}
	now := a.now()
	res := &HostsResult{Hosts: []status.LockHost{}}
	for i := range l {
		h := &l[i]
		if i == pageHosts {
			last := l[i-1].Host
			res.Next = &HostKey{VIP: last.VIP, Addr: last.Addr, Name: []byte(last.Name)}
			break
		}
		since := time.Unix(0, h.Since)
		state := m[h.Host.VIP].NSMState
		res.Hosts = append(res.Hosts, status.LockHost{
			Client: h.Host.Name, ClientAddr: addrText(h.Host.Addr), Addr: m.addr(h.Host.VIP), State: h.State, NSMState: state,
			NotifiedState: h.Notified, Notified: h.Notified >= state, Locks: h.Locks, Since: since.UTC(), Age: max(now.Sub(since), 0),
		})
	}
	return res, nil
}

// Services describes the lock service of the addresses given, as far as the
// lock table knows it: all but notifications, callbacks, calls and Forgotten.
// ctx should be short: it is for the node's status, which a failed target must
// not hold up.
func (a *Admin) Services(ctx context.Context, vips []mgs.VIP) ([]status.LockService, error) {
	var l []status.LockService
	for _, v := range vips {
		req := &wire.Request{Lock: &wire.LockArgs{}}
		req.Op = wire.OpLockService
		rep, err := a.call(ctx, v, req)
		if err != nil {
			return l, fmt.Errorf("lock service of %s: %w", v.Addr, err)
		}
		l = append(l, Service(v, &rep.Lock.Service, a.now()))
	}
	return l, nil
}

// Service makes a status of what OpLockService returned.
func Service(v mgs.VIP, i *wire.LockServiceInfo, now time.Time) status.LockService {
	s := status.LockService{
		Addr: v.Addr.String(), Index: v.Index, NSMState: i.NSMState, Granted: uint64(i.Granted), Unconfirmed: uint64(i.Unconfirmed),
		Waiting: uint64(i.Waiting), Shares: uint64(i.Shares), Hosts: uint64(i.Hosts), Grace: i.Grace,
		HostsReclaimed: uint64(i.HostsReclaimed), Damaged: i.Damaged,
	}
	if i.WindowEnd != 0 {
		s.Remaining = max(time.Unix(0, i.WindowEnd).Sub(now), 0)
	}
	return s
}
