// Package lockctltest has a lock table and a directory tree in memory, for
// tests of what administers locks.
package lockctltest

import (
	"context"
	"net/netip"
	"path"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Now is the time at which samples are looked at.
var Now = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// Table plays the metadata target. Its fields may be set before it is used.
type Table struct {
	mu    sync.Mutex
	Locks []wire.LockHolder // in the order of ID
	Hosts []wire.MonitoredHost
	Info  wire.LockServiceInfo
	Dirs  map[wire.FID][]wire.Dirent
	// Fail makes operations fail.
	Fail map[wire.Op]wire.Status
	// Epochs are those that the target knows; requests with older ones fail.
	Epochs map[uint32]uint64
	// Calls counts operations.
	Calls map[wire.Op]int
	// NotDurable counts changes that did not wait until they are durable.
	NotDurable int
}

// Call implements lockctl.FS.
func (t *Table) Call(_ context.Context, o client.Owner, req *wire.Request, rep *wire.Reply) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.Calls == nil {
		t.Calls = map[wire.Op]int{}
	}
	t.Calls[req.Op]++
	if rep.Status = t.Fail[req.Op]; rep.Status != wire.OK {
		return
	}
	if o.VIP != 0 && o.Epoch < t.Epochs[o.VIP] {
		rep.Status = wire.ErrStaleVIP
		return
	}
	if (req.Op == wire.OpLockRelease || req.Op == wire.OpLockFree) && req.Flags&wire.FlagWaitCommit == 0 {
		t.NotDurable++
	}
	rep.Lock = &wire.LockReply{}
	switch req.Op {
	case wire.OpLockList:
		rep.EOF = true
		for _, h := range t.Locks[t.find(req.Cookie+1):] {
			switch {
			case !req.FID.IsZero() && h.FID != req.FID:
			case len(rep.Lock.Locks) == int(req.MaxEntries):
				rep.EOF = false
				return
			default:
				rep.Lock.Locks = append(rep.Lock.Locks, h)
			}
		}
	case wire.OpLockHosts:
		rep.Lock.Hosts = slices.Clone(t.Hosts)
	case wire.OpLockRelease:
		i := t.find(req.Lock.ID)
		if i == len(t.Locks) || t.Locks[i].ID != req.Lock.ID {
			rep.Status = wire.ErrNoEnt
			return
		}
		t.Locks = slices.Delete(t.Locks, i, i+1)
	case wire.OpLockFree:
		who := req.Lock.Owner.LockHost
		who.VIP = o.VIP
		rep.Lock.Freed = t.remove(func(h *wire.LockHolder) bool {
			x := h.Owner.LockHost
			if who.Name == "" {
				x.Name = ""
			}
			return x == who
		})
	case wire.OpLockService:
		rep.Lock.Service = t.Info
	case wire.OpReaddir:
		for _, e := range t.Dirs[req.FID] {
			if e.Cookie > req.Cookie {
				rep.Entries = append(rep.Entries, e)
			}
			if len(rep.Entries) == 2 { // several pages, also of small directories
				return
			}
		}
		rep.EOF = true
	default:
		rep.Status = wire.ErrProto
	}
}

// find gives the place of the first entry that has at least this ID.
func (t *Table) find(id uint64) int {
	return sort.Search(len(t.Locks), func(i int) bool { return t.Locks[i].ID >= id })
}

func (t *Table) remove(match func(*wire.LockHolder) bool) uint32 {
	n := len(t.Locks)
	t.Locks = slices.DeleteFunc(t.Locks, func(h wire.LockHolder) bool { return match(&h) })
	return uint32(n - len(t.Locks))
}

// Resolve implements lockctl.FS.
func (t *Table) Resolve(_ context.Context, at wire.FID, name string) (wire.Attr, wire.Status) {
	t.mu.Lock()
	defer t.mu.Unlock()
walk:
	for _, s := range strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/") {
		for _, e := range t.Dirs[at] {
			if string(e.Name) == s {
				at = e.FID
				continue walk
			}
		}
		return wire.Attr{}, wire.ErrNoEnt
	}
	return wire.Attr{FID: at}, wire.OK
}

// FID is a file's identity in Sample.
func FID(oid uint32) wire.FID { return wire.FID{Seq: 2, OID: oid} }

// VIPs are the service addresses of Sample.
func VIPs() []mgs.VIP {
	return []mgs.VIP{
		{Index: 1, Addr: netip.MustParseAddr("192.0.2.10"), Epoch: 4, NSMState: 7},
		{Index: 2, Addr: netip.MustParseAddr("2001:db8::1"), Epoch: 2, NSMState: 3},
	}
}

// ListVIPs is VIPs as a registry gives them.
func ListVIPs(context.Context) ([]mgs.VIP, error) { return VIPs(), nil }

// Sample returns a table with a few entries of each kind.
func Sample() *Table {
	at := Now.Add(-time.Hour).UnixNano()
	owner := func(vip uint32, addr, name string, svid uint32, oh string) wire.LockOwner {
		return wire.LockOwner{LockHost: wire.LockHost{VIP: vip, Addr: netip.MustParseAddr(addr), Name: name}, Svid: svid, OH: oh}
	}
	n7, n7b := owner(1, "192.0.2.77", "node7", 4242, "4242@node7"), owner(2, "192.0.2.77", "node7", 4243, "4243@node7")
	evil := owner(1, "192.0.2.78", "evil\x1b[2J", 1, "\x00\xff")
	local1, local2 := owner(1, "192.0.2.81", "localhost", 5, "5@l"), owner(1, "192.0.2.82", "localhost", 5, "5@l")
	entry := func(cookie uint64, f wire.FID, typ wire.FileType, name string) wire.Dirent {
		return wire.Dirent{Cookie: cookie, FID: f, Type: typ, Name: []byte(name)}
	}
	sec := int64(time.Second)
	return &Table{
		Epochs: map[uint32]uint64{1: 4, 2: 2},
		Dirs: map[wire.FID][]wire.Dirent{
			wire.RootFID: {entry(1, wire.RootFID, wire.TypeDir, "."), entry(2, wire.RootFID, wire.TypeDir, ".."),
				entry(3, FID(2), wire.TypeDir, "home"), entry(4, FID(9), wire.TypeLnk, "link")},
			FID(2): {entry(1, FID(2), wire.TypeDir, "."), entry(2, wire.RootFID, wire.TypeDir, ".."),
				entry(3, FID(5), wire.TypeReg, "mail box"), entry(4, FID(3), wire.TypeDir, "x")},
			FID(3): {entry(3, FID(6), wire.TypeReg, "evil\x1b[31m")},
		},
		Locks: []wire.LockHolder{
			{ID: 3, FID: FID(5), Owner: n7, Range: wire.LockRange{Start: 0, End: wire.MaxLockOffset}, Exclusive: true, State: wire.LockGranted, Since: at},
			{ID: 4, FID: FID(6), Owner: n7, Range: wire.LockRange{Start: 0, End: 99}, State: wire.LockUnconfirmed, Since: at + sec},
			{ID: 7, FID: FID(5), Owner: evil, Range: wire.LockRange{Start: 10, End: 10}, Exclusive: true, State: wire.LockWaiting, Since: at + 2*sec},
			{ID: 8, FID: FID(4), Owner: n7b, Range: wire.LockRange{Start: 1 << 62, End: 1<<62 + 1}, State: wire.LockGrantPending, Since: at + 3*sec},
			{ID: 9, FID: FID(4), Owner: owner(1, "192.0.2.79", "", 0, "dos"), Share: true, ShareMode: 2, ShareAccess: 3, State: wire.LockGranted, Since: at},
			{ID: 10, FID: FID(5), Owner: local1, Range: wire.LockRange{Start: 50, End: 59}, State: wire.LockGranted, Since: at},
			{ID: 11, FID: FID(5), Owner: local2, Range: wire.LockRange{Start: 50, End: 59}, State: wire.LockGranted, Since: at},
		},
		Hosts: []wire.MonitoredHost{
			{Host: n7b.LockHost, Since: at, Notified: 3, Locks: 1},
			{Host: evil.LockHost, Since: at, Notified: 5, Locks: 1},
			{Host: n7.LockHost, Since: at, State: 21, Notified: 7, Locks: 2},
		},
		Info: wire.LockServiceInfo{NSMState: 7, WindowEnd: Now.Add(42 * time.Second).UnixNano(), Granted: 5, Unconfirmed: 1, Waiting: 1, Shares: 1, Hosts: 3, HostsUnnotified: 1},
	}
}
