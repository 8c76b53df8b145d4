package statd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
)

// table is a lock table with hosts only: each holds Locks locks.
type table struct {
	mu    sync.Mutex
	hosts []wire.MonitoredHost
	down  bool
	away  context.Context // out of reach until this ends
	stale bool
	lists int
	ops   []string // modifying operations, in order
}

func (tb *table) Call(ctx context.Context, o client.Owner, req *wire.Request, rep *wire.Reply) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	rep.Lock = new(wire.LockReply)
	h := req.Lock.Owner.LockHost
	switch {
	case ctx.Err() != nil || tb.down || tb.away != nil && tb.away.Err() == nil:
		rep.Status = wire.ErrTargetDown
		return
	case tb.stale || o.Epoch != 4:
		rep.Status = wire.ErrStaleVIP
		return
	}
	match := func(x *wire.MonitoredHost) bool {
		return x.Host.VIP == o.VIP && x.Host.Addr == h.Addr && (h.Name == "" || x.Host.Name == h.Name)
	}
	i := slices.IndexFunc(tb.hosts, func(x wire.MonitoredHost) bool { return match(&x) })
	if req.Op.Modifies() {
		tb.ops = append(tb.ops, fmt.Sprintf("op %d %v", req.Op, h))
		if req.Op != wire.OpLockNotified && req.Flags&wire.FlagWaitCommit == 0 {
			rep.Status = wire.ErrProto
			return
		}
	}
	switch req.Op {
	case wire.OpLockHosts:
		tb.lists++
		rep.Lock.Hosts = slices.Clone(tb.hosts)
	case wire.OpLockMonitor:
		if i < 0 {
			tb.hosts = append(tb.hosts, wire.MonitoredHost{Host: h})
			i = len(tb.hosts) - 1
		}
		tb.hosts[i].Note = slices.Clone(req.Lock.Note)
	case wire.OpLockUnmonitor:
		if i >= 0 {
			tb.hosts[i].Note = nil
		}
		tb.hosts = slices.DeleteFunc(tb.hosts, func(x wire.MonitoredHost) bool { return match(&x) && x.Locks == 0 })
	case wire.OpLockNotified:
		if i < 0 {
			rep.Status = wire.ErrNoEnt
			return
		}
		tb.hosts[i].Notified = req.Lock.NSMState
	case wire.OpLockFree:
		for i := range tb.hosts {
			x := &tb.hosts[i]
			if match(x) && x.State != uint32(req.Cookie) {
				x.State = uint32(req.Cookie)
				rep.Lock.Freed += x.Locks
				x.Locks = 0
			}
		}
	default:
		rep.Status = wire.ErrProto
	}
}

func (tb *table) host(addr, name string) *wire.MonitoredHost {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	for _, x := range tb.hosts {
		if x.Host.Addr == netip.MustParseAddr(addr) && x.Host.Name == name {
			return &x
		}
	}
	return nil
}

func (tb *table) set(f func()) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	f()
}

const testVIP = 7

func holder(addr, name string, locks uint32) wire.MonitoredHost {
	return wire.MonitoredHost{Host: wire.LockHost{VIP: testVIP, Addr: netip.MustParseAddr(addr), Name: name}, Locks: locks}
}

// host is another machine: an address with a portmapper and programs.
type host struct {
	addr netip.Addr
	srv  *sunrpc.Server
	pm   netip.AddrPort

	mu   sync.Mutex
	got  []heard
	mute int // calls to leave unanswered
}

// heard is a call that a host's program has got.
type heard struct {
	proc uint32
	from netip.AddrPort
	udp  bool
	args []byte
}

func (h *host) ServeRPC(c *sunrpc.Call) {
	h.mu.Lock()
	h.got = append(h.got, heard{c.Proc, c.Remote, c.Conn == nil, slices.Clone(c.Args)})
	mute := h.mute > 0
	if mute {
		h.mute--
	}
	h.mu.Unlock()
	if mute {
		c.Drop()
		return
	}
	c.Finish()
}

func (h *host) calls() []heard {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.got)
}

// notifies are the NOTIFY calls heard; copies from one socket count once.
func (h *host) notifies(t *testing.T) []nsm.StatChge {
	t.Helper()
	var l []nsm.StatChge
	seen := map[netip.AddrPort]bool{}
	for _, c := range h.calls() {
		if seen[c.from] {
			continue
		}
		seen[c.from] = true
		var n nsm.StatChge
		if err := n.Decode(xdr.NewReader(c.args)); err != nil || c.proc != nsm.ProcNotify {
			t.Errorf("procedure %d: %v", c.proc, err)
		}
		l = append(l, n)
	}
	return l
}

// newHost starts a machine whose program prog is on the networks given.
func newHost(t *testing.T, addr string, prog, vers uint32, netids ...string) *host {
	t.Helper()
	h := &host{addr: netip.MustParseAddr(addr)}
	var tab rpcbind.Table
	pm := &rpcbind.Server{Table: &tab}
	h.srv = sunrpc.NewServer(sunrpc.Config{Programs: append(pm.Programs(), sunrpc.Program{Prog: prog, VersLow: vers, VersHigh: vers,
		NumProcs: func(uint32) uint32 { return 32 }, Handler: h})})
	t.Cleanup(func() { h.srv.Close() })
	h.pm = listen(t, h.srv, h.addr)
	for _, n := range netids {
		tab.Set(rpcbind.Mapping{Prog: prog, Vers: vers, Netid: n, Port: h.pm.Port()})
	}
	return h
}

// listen serves TCP and UDP on one port of addr.
func listen(t *testing.T, s *sunrpc.Server, addr netip.Addr) netip.AddrPort {
	t.Helper()
	for range 20 {
		tcp, err := s.ListenTCP(netip.AddrPortFrom(addr, 0), sunrpc.ListenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.ListenUDP(tcp, sunrpc.ListenOptions{}); err == nil {
			return tcp
		}
	}
	t.Fatal("no port that is free on TCP and UDP")
	return netip.AddrPort{}
}

// bed is a server with one address, and the machines around it.
type bed struct {
	t     *testing.T
	tb    *table
	s     *Server
	a     *Address
	at    netip.AddrPort // of the address's NSM
	mu    sync.Mutex
	hosts map[netip.Addr]*host
}

const (
	vipAddr   = "127.0.0.10"
	localAddr = "127.0.0.1"
)

func newBed(t *testing.T, tb *table, change func(*Config)) *bed {
	t.Helper()
	b := &bed{t: t, tb: tb, hosts: map[netip.Addr]*host{}}
	cfg := Config{
		Table: tb,
		Portmap: func(ctx context.Context, local, host netip.Addr, prog, vers uint32, netid string) (uint16, error) {
			b.mu.Lock()
			h := b.hosts[host]
			b.mu.Unlock()
			if h == nil {
				<-ctx.Done() // a dead machine
				return 0, ctx.Err()
			}
			return rpcbind.GetPort(ctx, local, h.pm, prog, vers, netid)
		},
		AttemptTimeout: 2 * time.Second, Backoff: 20 * time.Millisecond, BackoffMax: 100 * time.Millisecond,
	}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	// Every machine of the test is on loopback; only one of them is "local".
	s.local = func(a netip.Addr) bool { return a == netip.MustParseAddr(localAddr) }
	b.s, b.a = s, s.Address(netip.MustParseAddr(vipAddr), testVIP, 4, 3)
	rpc := sunrpc.NewServer(sunrpc.Config{Programs: b.a.Programs()})
	t.Cleanup(func() {
		if err := b.a.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		rpc.Close()
	})
	b.at = listen(t, rpc, netip.MustParseAddr(vipAddr))
	return b
}

func (b *bed) add(h *host) *host {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hosts[h.addr] = h
	return h
}

type encoder interface{ Encode(*xdr.Writer) }

// call calls the address from another one; the result is nil when no answer
// comes within wait.
func (b *bed) call(network, from string, proc uint32, args encoder, wait time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	c, err := sunrpc.Dial(ctx, network, netip.AddrPortFrom(netip.MustParseAddr(from), 0), b.at, nsm.Program, nsm.Version, sunrpc.Cred{})
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	var w xdr.Writer
	if args != nil {
		args.Encode(&w)
	}
	return c.Call(ctx, proc, w.Buf)
}

const long = 20 * time.Second // for what must come

func (b *bed) must(network, from string, proc uint32, args encoder) []byte {
	b.t.Helper()
	res, err := b.call(network, from, proc, args, long)
	if err != nil {
		b.t.Fatalf("procedure %d over %s from %s: %v", proc, network, from, err)
	}
	return res
}

func (b *bed) res(network, from string, proc uint32, args encoder) nsm.SMStatRes {
	b.t.Helper()
	var res nsm.SMStatRes
	if err := res.Decode(xdr.NewReader(b.must(network, from, proc, args))); err != nil {
		b.t.Fatal(err)
	}
	return res
}

func (b *bed) notify(network, from, name string, state uint32) {
	b.t.Helper()
	if res := b.must(network, from, nsm.ProcNotify, &nsm.StatChge{MonName: name, State: state}); len(res) != 0 {
		b.t.Errorf("NOTIFY has a result: %x", res)
	}
}

// until waits for a condition.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", long, what)
		}
	}
}

func noAnswer(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
