package statd

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

func TestNewWantsTable(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a server without a table")
	}
}

func TestStat(t *testing.T) {
	b := newBed(t, &table{}, nil)
	for _, network := range []string{"udp", "tcp"} {
		for _, from := range []string{localAddr, "127.0.0.2"} {
			b.must(network, from, nsm.ProcNull, nil)
			if got := b.res(network, from, nsm.ProcStat, &nsm.SMName{MonName: "anybody"}); got != (nsm.SMStatRes{ResStat: nsm.StatSucc, State: 3}) {
				t.Errorf("%s from %s: %+v", network, from, got)
			}
		}
	}
	b.a.SetState(0)
	if got := b.res("udp", localAddr, nsm.ProcStat, &nsm.SMName{}); got.ResStat != nsm.StatFail {
		t.Errorf("without a state: %+v", got)
	}
	for proc := uint32(1); proc < nsm.NumProcs; proc++ {
		if proc == nsm.ProcSimuCrash {
			continue
		}
		b.a.Start()
		_, err := b.call("tcp", localAddr, proc, &nsm.SMStat{State: 2000}, long)
		if ae := (*sunrpc.AcceptError)(nil); !errors.As(err, &ae) || ae.Stat != sunrpc.GarbageArgs {
			t.Errorf("procedure %d with garbage: %v", proc, err)
		}
	}
}

var (
	nlm  = nsm.MyID{MyName: "here", MyProg: 100021, MyVers: 4, MyProc: 16}
	nlm1 = nsm.MyID{MyName: "here", MyProg: 100021, MyVers: 1, MyProc: 16}
)

func mon(name string, id nsm.MyID, priv byte) *nsm.Mon {
	return &nsm.Mon{MonID: nsm.MonID{MonName: name, MyID: id}, Priv: [16]byte{priv}}
}

func TestMon(t *testing.T) {
	tb := &table{hosts: []wire.MonitoredHost{holder("192.0.2.9", "locker", 1)}}
	b := newBed(t, tb, func(c *Config) {
		c.Resolve = func(_ context.Context, name string) ([]netip.Addr, error) {
			switch name {
			case "two.example":
				return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::ffff:192.0.2.1"), netip.MustParseAddr("2001:db8::1")}, nil
			case "locker":
				return []netip.Addr{netip.MustParseAddr("192.0.2.9")}, nil
			}
			return nil, errors.New("no such host")
		}
	})
	succ := nsm.SMStatRes{ResStat: nsm.StatSucc, State: 3}
	fail := nsm.SMStatRes{ResStat: nsm.StatFail, State: 3}
	unmon := func(proc uint32, from string, args encoder) {
		t.Helper()
		var st nsm.SMStat
		if err := st.Decode(xdr.NewReader(b.must("udp", from, proc, args))); err != nil || st.State != 3 {
			t.Errorf("procedure %d: %+v %v", proc, st, err)
		}
	}
	type want map[string][]monitor // "name addr"
	check := func(w want) {
		t.Helper()
		got := want{}
		tb.set(func() {
			for _, h := range tb.hosts {
				got[h.Host.Name+" "+h.Host.Addr.String()] = decodeNote(h.Note)
			}
		})
		if d := cmp.Diff(w, got, cmp.AllowUnexported(monitor{})); d != "" {
			t.Error(d)
		}
	}
	m4, m1 := monitor{nlm, [16]byte{4}}, monitor{nlm1, [16]byte{1}}
	for _, c := range []struct {
		from string
		args *nsm.Mon
		want nsm.SMStatRes
	}{
		{localAddr, mon("two.example", nlm, 9), succ},
		{localAddr, mon("two.example", nlm1, 1), succ},
		{localAddr, mon("two.example", nlm, 4), succ}, // again: priv is replaced
		{localAddr, mon("192.0.2.77", nlm, 4), succ},
		{localAddr, mon("locker", nlm, 4), succ},
		{localAddr, mon("unknown.example", nlm, 1), fail},
		{localAddr, mon("", nlm, 1), fail},
		{localAddr, mon("a\nb", nlm, 1), fail},
		{localAddr, mon("192.0.2.78", nsm.MyID{MyName: strings.Repeat("n", 300)}, 1), fail}, // no room
		{"127.0.0.2", mon("192.0.2.79", nlm, 1), fail},                                      // another machine
	} {
		for _, network := range []string{"udp", "tcp"} {
			if got := b.res(network, c.from, nsm.ProcMon, c.args); got != c.want {
				t.Errorf("MON %q from %s over %s: %+v", c.args.MonID.MonName, c.from, network, got)
			}
		}
	}
	all := want{
		"two.example 192.0.2.1": {m1, m4}, "two.example 2001:db8::1": {m1, m4},
		"192.0.2.77 192.0.2.77": {m4}, "locker 192.0.2.9": {m4},
	}
	check(all)

	// Not from other machines, and only what was asked for.
	unmon(nsm.ProcUnmon, "127.0.0.2", &nsm.MonID{MonName: "locker", MyID: nlm})
	unmon(nsm.ProcUnmonAll, "127.0.0.2", &nlm)
	unmon(nsm.ProcUnmon, localAddr, &nsm.MonID{MonName: "locker", MyID: nlm1})
	check(all)
	unmon(nsm.ProcUnmon, localAddr, &nsm.MonID{MonName: "TWO.example", MyID: nlm1})
	all["two.example 192.0.2.1"], all["two.example 2001:db8::1"] = []monitor{m4}, []monitor{m4}
	check(all)
	unmon(nsm.ProcUnmonAll, localAddr, &nlm)
	check(want{"locker 192.0.2.9": nil}) // which has a lock
	if st := b.a.Stats(); st.Refused != 4 {
		t.Errorf("%d refused", st.Refused)
	}

	tb.set(func() { tb.down = true })
	if got := b.res("udp", localAddr, nsm.ProcMon, mon("192.0.2.1", nlm, 1)); got != fail {
		t.Errorf("with the table down: %+v", got)
	}
}

func TestNote(t *testing.T) {
	var ms []monitor
	for i := range 20 {
		ms = append(ms, monitor{nsm.MyID{MyProg: uint32(i)}, [16]byte{byte(i)}})
		b, err := encodeNote(ms)
		if err != nil {
			if i < 5 || !errors.Is(err, errNoteFull) {
				t.Errorf("%d monitors: %v", i+1, err)
			}
			break
		}
		if got := decodeNote(b); !slices.Equal(got, ms) {
			t.Errorf("%+v", got)
		}
		for n := range b {
			if got := decodeNote(b[:n]); got != nil {
				t.Errorf("cut to %d bytes: %v", n, got)
			}
		}
	}
	if decodeNote([]byte{0, 0, 0, 1, 255, 255, 255, 255}) != nil || decodeNote([]byte("else")) != nil {
		t.Error("a bad note decodes")
	}
}

func TestSimuCrash(t *testing.T) {
	var crashed atomic.Uint32
	b := newBed(t, &table{}, func(c *Config) { c.SimuCrash = func(vip uint32) { crashed.Add(vip) } })
	if _, err := b.call("udp", "127.0.0.2", nsm.ProcSimuCrash, nil, 300*time.Millisecond); !noAnswer(err) {
		t.Errorf("from another machine: %v", err)
	}
	if crashed.Load() != 0 {
		t.Error("another machine has crashed the address")
	}
	b.must("udp", localAddr, nsm.ProcSimuCrash, nil)
	if crashed.Load() != testVIP {
		t.Errorf("crashed %d", crashed.Load())
	}
}

func TestNotify(t *testing.T) {
	tb := &table{hosts: []wire.MonitoredHost{
		holder("127.0.0.2", "one", 5),
		holder("127.0.0.3", "n1.example.org", 1), holder("127.0.0.3", "n2", 2), holder("127.0.0.3", "N3", 4),
		{Host: wire.LockHost{VIP: testVIP + 1, Addr: netip.MustParseAddr("127.0.0.4"), Name: "elsewhere"}, Locks: 9},
	}}
	b := newBed(t, tb, nil)
	b.a.Start()
	locks := func(addr, name string) uint32 { return tb.host(addr, name).Locks }

	b.notify("udp", "127.0.0.5", "one", 7)       // from an address without locks, with another's name
	b.notify("udp", "127.0.0.4", "elsewhere", 7) // towards another service address
	b.notify("udp", "127.0.0.2", "one", 0)       // no state
	if got := locks("127.0.0.2", "one") + locks("127.0.0.4", "elsewhere"); got != 14 {
		t.Errorf("%d of 14 locks left", got)
	}
	b.notify("udp", "127.0.0.2", "dhcp-2.example", 7) // the only host there, whatever its name
	if tb.host("127.0.0.2", "one").State != 7 || locks("127.0.0.2", "one") != 0 {
		t.Errorf("not freed: %+v", tb.host("127.0.0.2", "one"))
	}
	// It takes locks again; copies of the call do nothing, over either transport.
	tb.set(func() { tb.hosts[0].Locks = 3 })
	for _, network := range []string{"udp", "tcp", "udp"} {
		b.notify(network, "127.0.0.2", "one", 7)
	}
	if locks("127.0.0.2", "one") != 3 {
		t.Error("a repeated NOTIFY has freed locks")
	}
	b.notify("tcp", "127.0.0.2", "one", 9)
	if locks("127.0.0.2", "one") != 0 {
		t.Error("the second restart was ignored")
	}

	// Several hosts behind one address.
	b.notify("udp", "127.0.0.3", "unknown", 7)
	b.notify("udp", "127.0.0.3", "n1.else.org", 7)
	if got := locks("127.0.0.3", "n1.example.org") + locks("127.0.0.3", "n2") + locks("127.0.0.3", "N3"); got != 7 {
		t.Errorf("a name of nobody's has freed locks: %d of 7 left", got)
	}
	b.notify("udp", "127.0.0.3", "N1", 7)
	b.notify("udp", "127.0.0.3", "n3.example.org.", 7)
	if locks("127.0.0.3", "n1.example.org") != 0 || locks("127.0.0.3", "n2") != 2 || locks("127.0.0.3", "N3") != 0 {
		t.Errorf("left: %d %d %d", locks("127.0.0.3", "n1.example.org"), locks("127.0.0.3", "n2"), locks("127.0.0.3", "N3"))
	}
	want := Stats{NotifyActed: 4, LocksFreed: 13, IgnoredUnmonitored: 2, IgnoredNoState: 1, IgnoredSameState: 3, IgnoredAmbiguous: 2}
	got := b.a.Stats()
	got.Sent, got.SendErrors = 0, 0 // the hosts that are not there
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestNotifyUnanswered: what cannot be made durable is not acknowledged, so
// that the client repeats it.
func TestNotifyUnanswered(t *testing.T) {
	tb := &table{hosts: []wire.MonitoredHost{holder("127.0.0.2", "one", 5)}}
	b := newBed(t, tb, nil)
	chge := &nsm.StatChge{MonName: "one", State: 7}
	short := 300 * time.Millisecond
	if _, err := b.call("udp", "127.0.0.2", nsm.ProcNotify, chge, short); !noAnswer(err) {
		t.Errorf("before Start: %v", err)
	}
	tb.set(func() { tb.down = true })
	b.a.Start()
	if _, err := b.call("udp", "127.0.0.2", nsm.ProcNotify, chge, short); !noAnswer(err) {
		t.Errorf("with the table down: %v", err)
	}
	tb.set(func() { tb.down = false; tb.stale = true })
	if _, err := b.call("udp", "127.0.0.2", nsm.ProcNotify, chge, short); !noAnswer(err) {
		t.Errorf("without the address: %v", err)
	}
	if st := b.a.Stats(); st.NotifyDropped < 3 || st.NotifyActed != 0 {
		t.Errorf("%+v", st)
	}
	tb.set(func() { tb.stale = false })
	b.notify("udp", "127.0.0.2", "one", 7)
	if tb.host("127.0.0.2", "one").Locks != 0 {
		t.Error("not freed")
	}
	if err := b.a.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := b.call("udp", "127.0.0.2", nsm.ProcNotify, chge, short); !noAnswer(err) {
		t.Errorf("after Stop: %v", err)
	}
}

// TestNotifyFlood: many calls at once cost few readings of the monitor list.
func TestNotifyFlood(t *testing.T) {
	tb := &table{}
	b := newBed(t, tb, nil)
	b.a.Start()
	done := make(chan struct{})
	for range 20 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 5 {
				_, _ = b.call("tcp", "127.0.0.9", nsm.ProcNotify, &nsm.StatChge{MonName: "x", State: 1}, long)
			}
		}()
	}
	for range 20 {
		<-done
	}
	if n := b.a.Stats().IgnoredUnmonitored; n != 100 {
		t.Errorf("%d of 100 answered", n)
	}
	tb.set(func() {
		if tb.lists > 50 {
			t.Errorf("%d readings of the monitor list for 100 calls", tb.lists)
		}
	})
}

func TestCallback(t *testing.T) {
	tb := &table{hosts: []wire.MonitoredHost{holder("127.0.0.2", "one", 5)}}
	tb.hosts[0].Notified = 3
	b := newBed(t, tb, func(c *Config) {
		c.Resolve = func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.2")}, nil
		}
		c.NewTimer = func(d time.Duration) (<-chan time.Time, func()) {
			t := time.NewTimer(d / 10)
			return t.C, func() { t.Stop() }
		}
	})
	nlmd := b.add(newHost(t, localAddr, nlm.MyProg, nlm.MyVers, rpcbind.TCP, rpcbind.UDP))
	nlmd.mute = 1 // the first copy is lost
	b.a.Start()
	for _, m := range []*nsm.Mon{mon("one", nlm, 42), mon("127.0.0.2", nlm, 43), mon("one", nlm1, 1)} {
		if got := b.res("udp", localAddr, nsm.ProcMon, m); got.ResStat != nsm.StatSucc {
			t.Fatalf("%+v", got)
		}
	}
	b.notify("udp", "127.0.0.2", "one.example", 11)
	b.notify("udp", "127.0.0.2", "one.example", 11)
	// Version 1 of the program is not served: two of the three arrive.
	until(t, "callbacks", func() bool { st := b.a.Stats(); return st.Callbacks == 2 && st.CallbacksFailed == 1 })
	seen := map[nsm.Status]bool{}
	for _, c := range nlmd.calls() {
		var st nsm.Status
		if err := st.Decode(xdr.NewReader(c.args)); err != nil || c.proc != nlm.MyProc {
			t.Errorf("procedure %d: %v", c.proc, err)
		}
		seen[st] = true
	}
	if want := map[nsm.Status]bool{{MonName: "one", State: 11, Priv: [16]byte{42}}: true, {MonName: "127.0.0.2", State: 11, Priv: [16]byte{43}}: true}; !cmp.Equal(want, seen) {
		t.Errorf("callbacks: %v", seen)
	}
	if tb.host("127.0.0.2", "one").Locks != 0 {
		t.Error("the locks were not freed")
	}
}

func TestNotifier(t *testing.T) {
	told := holder("127.0.0.24", "told", 1)
	told.Notified = 3
	other := holder("127.0.0.25", "other", 1)
	other.Host.VIP++
	tb := &table{hosts: []wire.MonitoredHost{
		holder("127.0.0.20", "dead", 1),
		holder("127.0.0.21", "udp", 1), holder("127.0.0.22", "tcp", 1),
		holder("127.0.0.23", "both", 1), holder("127.0.0.23", "both.example", 1), told, other,
	}}
	b := newBed(t, tb, func(c *Config) { c.GiveUp = 5 * time.Second })
	u := b.add(newHost(t, "127.0.0.21", nsm.Program, 1, rpcbind.UDP))
	tc := b.add(newHost(t, "127.0.0.22", nsm.Program, 1, rpcbind.TCP))
	both := b.add(newHost(t, "127.0.0.23", nsm.Program, 1, rpcbind.UDP, rpcbind.TCP))
	no := []*host{b.add(newHost(t, "127.0.0.24", nsm.Program, 1, rpcbind.UDP)), b.add(newHost(t, "127.0.0.25", nsm.Program, 1, rpcbind.UDP))}
	if p := b.a.Progress(); !p.StartedAt.IsZero() {
		t.Errorf("before Start: %+v", p)
	}
	b.a.Start()
	until(t, "all but the dead one recorded", func() bool {
		for _, h := range []*wire.MonitoredHost{tb.host("127.0.0.21", "udp"), tb.host("127.0.0.22", "tcp"),
			tb.host("127.0.0.23", "both"), tb.host("127.0.0.23", "both.example")} {
			if h.Notified != 3 {
				return false
			}
		}
		return true
	})
	for _, h := range []*host{u, tc, both} {
		if d := cmp.Diff([]nsm.StatChge{{MonName: vipAddr, State: 3}}, h.notifies(t)); d != "" {
			t.Errorf("%v: %s", h.addr, d)
		}
		for _, c := range h.calls() {
			if c.from.Addr() != netip.MustParseAddr(vipAddr) {
				t.Errorf("%v was called from %v", h.addr, c.from)
			}
			if c.udp != (h != tc) {
				t.Errorf("%v was called over UDP: %v", h.addr, c.udp)
			}
			if os.Geteuid() == 0 && c.from.Port() >= 1024 {
				t.Errorf("%v was called from port %d", h.addr, c.from.Port())
			}
		}
	}
	until(t, "the dead one given up", func() bool { return b.a.Progress().Failed == 1 })
	p := b.a.Progress()
	if p.State != 3 || p.Total != 4 || p.Notified != 3 || p.Pending != 0 || p.StartedAt.IsZero() || p.FinishedAt.Before(p.StartedAt) ||
		len(p.Errors) == 0 || !strings.Contains(p.Errors[len(p.Errors)-1], "127.0.0.20") {
		t.Errorf("%+v", p)
	}
	if tb.host("127.0.0.20", "dead").Notified != 0 {
		t.Error("the dead host is recorded as notified")
	}

	// It comes back, and somebody asks for another try.
	back := b.add(newHost(t, "127.0.0.20", nsm.Program, 1, rpcbind.UDP))
	b.a.Kick()
	until(t, "the returned host recorded", func() bool { return tb.host("127.0.0.20", "dead").Notified == 3 })
	if p := b.a.Progress(); p.Failed != 0 || p.Notified != 4 || p.FinishedAt.IsZero() {
		t.Errorf("%+v", p)
	}
	if n := len(u.notifies(t)) + len(both.notifies(t)) + len(back.notifies(t)); n != 3 {
		t.Errorf("%d calls to three hosts", n)
	}

	// The address crashes again.
	for _, h := range []*host{u, tc, both, back} {
		h.mu.Lock()
		h.got = nil
		h.mu.Unlock()
	}
	b.a.SetState(5)
	until(t, "the new state recorded", func() bool {
		return tb.host("127.0.0.21", "udp").Notified == 5 && tb.host("127.0.0.22", "tcp").Notified == 5 &&
			tb.host("127.0.0.23", "both.example").Notified == 5 && tb.host("127.0.0.24", "told").Notified == 5
	})
	for _, h := range []*host{u, tc, both, back, no[0]} {
		if d := cmp.Diff([]nsm.StatChge{{MonName: vipAddr, State: 5}}, h.notifies(t)); d != "" {
			t.Errorf("%v: %s", h.addr, d)
		}
	}
	if len(no[1].calls()) != 0 {
		t.Error("a host of another service address was notified")
	}
}

// TestNotifierTableDown: the list is read when the table is back; what was told
// while it was away again is recorded by Stop.
func TestNotifierTableDown(t *testing.T) {
	tb := &table{down: true, hosts: []wire.MonitoredHost{holder("127.0.0.21", "h", 1)}}
	b := newBed(t, tb, func(c *Config) {
		c.NewTimer = func(d time.Duration) (<-chan time.Time, func()) {
			t := time.NewTimer(min(d, 10*time.Millisecond))
			return t.C, func() { t.Stop() }
		}
		start := time.Now() // and a clock that is a hundred times as fast
		c.Now = func() time.Time { return start.Add(100 * time.Since(start)) }
		c.AttemptTimeout = 1000 * time.Second
	})
	h := b.add(newHost(t, "127.0.0.21", nsm.Program, 1, rpcbind.UDP))
	b.a.Start()
	time.Sleep(20 * time.Millisecond)
	h.mu.Lock()
	h.mute = 1
	h.mu.Unlock()
	tb.set(func() { tb.down = false })
	until(t, "a first call", func() bool { return len(h.calls()) > 0 })
	tb.set(func() { tb.away = b.a.ctx })
	until(t, "told", func() bool { return b.a.Progress().Notified == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	if err := b.a.Stop(ctx); err != nil {
		t.Error(err)
	}
	if tb.host("127.0.0.21", "h").Notified != 3 {
		t.Error("Stop has not recorded what was told")
	}
}

func TestStopIsBounded(t *testing.T) {
	tb := &table{hosts: []wire.MonitoredHost{holder("127.0.0.20", "dead", 1)}}
	b := newBed(t, tb, nil)
	b.a.Start()
	until(t, "an attempt", func() bool { return b.a.Stats().Sent > 0 })
	if err := b.a.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	b.a.Start() // has no effect any more
	if err := b.a.Stop(context.Background()); err != nil {
		t.Error(err)
	}
}
