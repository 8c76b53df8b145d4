package lockctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/control/lockctl/lockctltest"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/google/go-cmp/cmp"
)

var ctx = context.Background()

func newAdmin(t *lockctltest.Table) *Admin {
	return New(t, lockctltest.ListVIPs, func() time.Time { return lockctltest.Now })
}

// ids lists all pages.
func ids(t *testing.T, a *Admin, args ListArgs) string {
	t.Helper()
	var s []string
	for range 1000 {
		p, err := a.List(ctx, args)
		if err != nil {
			t.Fatalf("%+v: %v", args, err)
		}
		for _, l := range p.Locks {
			s = append(s, fmt.Sprint(l.ID))
		}
		if p.EOF {
			return strings.Join(s, " ")
		}
		if p.Next <= args.After {
			t.Fatalf("%+v: the next page is after %d", args, p.Next)
		}
		args.After = p.Next
	}
	t.Fatal("no end")
	return ""
}

func TestListFilters(t *testing.T) {
	a := newAdmin(lockctltest.Sample())
	for _, c := range []struct {
		args ListArgs
		want string
	}{
		{ListArgs{}, "3 4 7 8 9 10 11"},
		{ListArgs{After: 8}, "9 10 11"},
		{ListArgs{File: "/home/mail box"}, "3 7 10 11"},
		{ListArgs{File: "[0x2:0x6:0x0]"}, "4"},
		{ListArgs{Client: "192.0.2.77"}, "3 4 8"},
		{ListArgs{Client: "::ffff:192.0.2.77"}, "3 4 8"},
		{ListArgs{Client: "localhost"}, "10 11"},
		{ListArgs{Client: "local"}, ""},
		{ListArgs{State: "waiting"}, "7"},
		{ListArgs{State: "unconfirmed", Client: "node7"}, "4"},
		{ListArgs{State: "unconfirmed", Client: "localhost"}, ""},
	} {
		if got := ids(t, a, c.args); got != c.want {
			t.Errorf("%+v: got %s, want %s", c.args, got, c.want)
		}
	}
	for file, want := range map[string]string{
		"/nosuch": "no such file: \"/nosuch\"", "[0x": "want [0xSEQ:0xOID:0xVER]", "[0x0:0x0:0x0]": "names no file",
	} {
		if _, err := a.List(ctx, ListArgs{File: file}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("file %q: %v", file, err)
		}
	}
}

func TestListEntry(t *testing.T) {
	a := newAdmin(lockctltest.Sample())
	p, err := a.List(ctx, ListArgs{})
	if err != nil {
		t.Fatal(err)
	}
	at := lockctltest.Now.Add(-time.Hour)
	want := map[int]status.Lock{
		0: {ID: 3, FID: "[0x2:0x5:0x0]", Path: "/home/mail box", Kind: "write", End: wire.MaxLockOffset, ToEOF: true, Client: "node7", ClientAddr: "192.0.2.77",
			Svid: 4242, OH: "34323432406e6f646537", Addr: "192.0.2.10", State: "granted", Since: at, Age: time.Hour},
		2: {ID: 7, FID: "[0x2:0x5:0x0]", Path: "/home/mail box", Kind: "write", Start: 10, End: 10, Client: "evil\x1b[2J", ClientAddr: "192.0.2.78",
			Svid: 1, OH: "00ff", Addr: "192.0.2.10", State: "waiting", Since: at.Add(2 * time.Second), Age: time.Hour - 2*time.Second},
		3: {ID: 8, FID: "[0x2:0x4:0x0]", Kind: "read", Start: 1 << 62, End: 1<<62 + 1, Client: "node7", ClientAddr: "192.0.2.77",
			Svid: 4243, OH: "34323433406e6f646537", Addr: "2001:db8::1", State: "grant-pending", Since: at.Add(3 * time.Second), Age: time.Hour - 3*time.Second},
		4: {ID: 9, FID: "[0x2:0x4:0x0]", Kind: "share", Mode: "write", Access: "both", ClientAddr: "192.0.2.79", OH: "646f73",
			Addr: "192.0.2.10", State: "granted", Since: at, Age: time.Hour},
	}
	for i, w := range want {
		if d := cmp.Diff(w, p.Locks[i]); d != "" {
			t.Errorf("entry %d (-want +got):\n%s", i, d)
		}
	}
	if a.paths.names != nil {
		t.Error("the last page keeps the paths in memory")
	}
}

// Many entries come in pages, whole and once each, also when a filter leaves few.
func TestManyLocks(t *testing.T) {
	const n = 100000
	tab := lockctltest.Sample()
	tab.Locks = nil
	for i := range n {
		o := wire.LockOwner{LockHost: wire.LockHost{VIP: 1, Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Name: "c"}}
		tab.Locks = append(tab.Locks, wire.LockHolder{ID: uint64(i + 1), FID: lockctltest.FID(5), Owner: o, State: wire.LockGranted})
	}
	tab.Locks[77777].State = wire.LockWaiting
	a := newAdmin(tab)
	got := strings.Fields(ids(t, a, ListArgs{}))
	if len(got) != n || got[0] != "1" || got[n-1] != fmt.Sprint(n) || got[5000] != "5001" {
		t.Errorf("%d entries of %d", len(got), n)
	}
	if w := (n + pageLocks - 1) / pageLocks; tab.Calls[wire.OpLockList] > w {
		t.Errorf("%d calls of the target for %d pages", tab.Calls[wire.OpLockList], w)
	}
	if tab.Calls[wire.OpReaddir] > 10 {
		t.Errorf("the tree was walked for every page: %d calls", tab.Calls[wire.OpReaddir])
	}
	if got := ids(t, a, ListArgs{State: "waiting"}); got != "77778" {
		t.Errorf("the only one that waits: %s", got)
	}
}

// The longest answers that clients can provoke fit into a reply.
func TestLongestNames(t *testing.T) {
	tab := lockctltest.Sample()
	tab.Locks = nil
	name, oh := strings.Repeat("\x01", wire.MaxLockHostName), strings.Repeat("\x00", wire.MaxLockOwnerOH)
	for i := range 5000 {
		o := wire.LockOwner{LockHost: wire.LockHost{VIP: 1, Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Name: name}, OH: oh}
		tab.Locks = append(tab.Locks, wire.LockHolder{ID: uint64(i + 1), FID: lockctltest.FID(5), Owner: o, State: wire.LockGranted})
		tab.Hosts = append(tab.Hosts, wire.MonitoredHost{Host: o.LockHost})
	}
	tab.Dirs[wire.RootFID] = append(tab.Dirs[wire.RootFID], wire.Dirent{Cookie: 9, FID: lockctltest.FID(5), Type: wire.TypeReg, Name: []byte(strings.Repeat("\x01", maxPath-1))})
	a := newAdmin(tab)
	p, err := a.List(ctx, ListArgs{})
	if err != nil {
		t.Fatal(err)
	}
	h, err := a.Hosts(ctx, HostsArgs{})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{p, h} {
		if j, err := json.Marshal(v); err != nil || len(j) > 60<<20 {
			t.Errorf("%T: %d bytes, %v", v, len(j), err)
		}
	}
}

func TestRelease(t *testing.T) {
	tab := lockctltest.Sample()
	a := newAdmin(tab)
	res, err := a.Release(ctx, ReleaseArgs{IDs: []uint64{7, 5, 0, 9, 7, 1 << 63}})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Released) != 2 || res.Released[0].ID != 7 || res.Released[0].Path != "/home/mail box" || res.Released[1].ID != 9 {
		t.Errorf("released %+v", res.Released)
	}
	if d := cmp.Diff([]uint64{5, 0, 7, 1 << 63}, res.Missing); d != "" || res.Failed != "" {
		t.Errorf("missing %s, failed %q", d, res.Failed)
	}
	if got := ids(t, a, ListArgs{}); got != "3 4 8 10 11" {
		t.Errorf("left: %s", got)
	}
	tab.Fail = map[wire.Op]wire.Status{wire.OpLockRelease: wire.ErrIO}
	if res, err = a.Release(ctx, ReleaseArgs{IDs: []uint64{3, 4}}); err != nil || res.Failed != "lock 3: status IO" || len(res.Released)+len(res.Missing) > 0 {
		t.Errorf("failing target: %+v, %v", res, err)
	}
	// Somebody else was quicker.
	tab.Fail = map[wire.Op]wire.Status{wire.OpLockRelease: wire.ErrNoEnt}
	if res, err = a.Release(ctx, ReleaseArgs{IDs: []uint64{3}}); err != nil || len(res.Missing) != 1 {
		t.Errorf("gone meanwhile: %+v, %v", res, err)
	}
	if _, err := a.Release(ctx, ReleaseArgs{IDs: make([]uint64, MaxRelease+1)}); err == nil {
		t.Error("more IDs than permitted")
	}
	if tab.NotDurable > 0 {
		t.Errorf("%d changes were not waited for", tab.NotDurable)
	}
}

func TestFree(t *testing.T) {
	tab := lockctltest.Sample()
	a := newAdmin(tab)
	for _, c := range []struct {
		args FreeArgs
		want string
	}{
		{FreeArgs{}, "no client named"},
		{FreeArgs{Client: "nosuch"}, `no such client: "nosuch" holds no locks and waits for none`},
		{FreeArgs{Client: "localhost"}, `several clients call themselves "localhost": give the address of one: 192.0.2.81, 192.0.2.82`},
		{FreeArgs{Client: "node7"}, `"node7" has locks towards several service addresses (192.0.2.10, 2001:db8::1): to release them all, give --all-addresses`},
	} {
		if _, err := a.Free(ctx, c.args); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.args, err)
		}
	}
	if len(tab.Locks) != 7 {
		t.Fatalf("a refused command removed locks: %d left", len(tab.Locks))
	}
	for _, c := range []struct {
		args FreeArgs
		want []Freed
		left string
	}{
		{FreeArgs{Client: "192.0.2.82"}, []Freed{{"localhost", "192.0.2.82", "192.0.2.10", 1}}, "3 4 7 8 9 10"},
		{FreeArgs{Client: "evil\x1b[2J"}, []Freed{{"evil\x1b[2J", "192.0.2.78", "192.0.2.10", 1}}, "3 4 8 9 10"},
		{FreeArgs{Client: "node7", AllAddresses: true}, []Freed{{"node7", "192.0.2.77", "192.0.2.10", 2}, {"node7", "192.0.2.77", "2001:db8::1", 1}}, "9 10"},
	} {
		res, err := a.Free(ctx, c.args)
		if err != nil {
			t.Fatalf("%+v: %v", c.args, err)
		}
		if d := cmp.Diff(c.want, res.Clients); d != "" || res.Failed != "" {
			t.Errorf("%+v (-want +got): %s%s", c.args, d, res.Failed)
		}
		if got := ids(t, a, ListArgs{}); got != c.left {
			t.Errorf("%+v: left %s, want %s", c.args, got, c.left)
		}
	}
	tab.Epochs[1]++ // another node has the address now
	res, err := a.Free(ctx, FreeArgs{Client: "192.0.2.81"})
	if err != nil || res.Failed != "locks of 192.0.2.81 towards 192.0.2.10: status STALE_VIP" || len(res.Clients) != 0 {
		t.Errorf("stale epoch: %+v, %v", res, err)
	}
	if tab.NotDurable > 0 {
		t.Errorf("%d changes were not waited for", tab.NotDurable)
	}
}

func TestHosts(t *testing.T) {
	tab := lockctltest.Sample()
	a := newAdmin(tab)
	res, err := a.Hosts(ctx, HostsArgs{})
	if err != nil || res.Next != nil || len(res.Hosts) != 3 {
		t.Fatalf("%+v, %v", res, err)
	}
	at := lockctltest.Now.Add(-time.Hour)
	want := []status.LockHost{
		{Client: "node7", ClientAddr: "192.0.2.77", Addr: "192.0.2.10", State: 21, NSMState: 7, NotifiedState: 7, Notified: true, Locks: 2, Since: at, Age: time.Hour},
		{Client: "evil\x1b[2J", ClientAddr: "192.0.2.78", Addr: "192.0.2.10", NSMState: 7, NotifiedState: 5, Locks: 1, Since: at, Age: time.Hour},
		{Client: "node7", ClientAddr: "192.0.2.77", Addr: "2001:db8::1", NSMState: 3, NotifiedState: 3, Notified: true, Locks: 1, Since: at, Age: time.Hour},
	}
	if d := cmp.Diff(want, res.Hosts); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}

	tab.Hosts = nil
	const n = 2*pageHosts + 1
	for i := range n {
		tab.Hosts = append(tab.Hosts, wire.MonitoredHost{Host: wire.LockHost{VIP: 1 + uint32(i%2), Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Name: fmt.Sprintf("\xff%d", i)}})
	}
	seen, args := map[string]bool{}, HostsArgs{}
	for pages := 1; ; pages++ {
		res, err := a.Hosts(ctx, args)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range res.Hosts {
			seen[h.Addr+h.ClientAddr+h.Client] = true
		}
		if res.Next == nil {
			if len(seen) != n || pages != 3 {
				t.Errorf("%d hosts of %d on %d pages", len(seen), n, pages)
			}
			break
		}
		// As it goes through the socket: names are no valid text.
		j, err := json.Marshal(HostsArgs{After: res.Next})
		if err != nil {
			t.Fatal(err)
		}
		args = HostsArgs{}
		if err := json.Unmarshal(j, &args); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServices(t *testing.T) {
	tab := lockctltest.Sample()
	a := newAdmin(tab)
	l, err := a.Services(ctx, lockctltest.VIPs()[:1])
	if err != nil {
		t.Fatal(err)
	}
	want := []status.LockService{{Addr: "192.0.2.10", Index: 1, NSMState: 7, Granted: 5, Unconfirmed: 1, Waiting: 1, Shares: 1, Hosts: 3, Remaining: 42 * time.Second}}
	if d := cmp.Diff(want, l); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	tab.Info.WindowEnd = lockctltest.Now.Add(-time.Second).UnixNano()
	if l, err = a.Services(ctx, lockctltest.VIPs()); err != nil || len(l) != 2 || l[0].Remaining != 0 {
		t.Errorf("window over: %+v, %v", l, err)
	}
	tab.Fail = map[wire.Op]wire.Status{wire.OpLockService: wire.ErrTargetDown}
	if _, err = a.Services(ctx, lockctltest.VIPs()); !errors.Is(err, wire.ErrTargetDown) {
		t.Errorf("target down: %v", err)
	}
	dead, cancel := context.WithCancel(ctx)
	cancel()
	if _, err = a.List(dead, ListArgs{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}
