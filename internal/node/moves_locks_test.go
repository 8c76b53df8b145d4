package node

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/statd/nsm"
)

// lockHost is a client host: it asks for locks, and its lock and status monitors are
// called back.
type lockHost struct {
	m    *moving
	name string
	addr netip.Addr
	rpc  *rpcClient
	fh   []byte
	tcp  uint16
	udp  uint16

	mu      sync.Mutex
	granted []netip.AddrPort // who has called GRANTED
	lost    int              // GRANTED calls that are not answered
	told    []notice
}

// notice is an SM_NOTIFY.
type notice struct {
	from  netip.Addr
	name  string
	state uint32
}

// ServeRPC implements sunrpc.Handler.
func (h *lockHost) ServeRPC(c *sunrpc.Call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case c.Prog == nlm.Program && nlm.Proc(c.Proc) == nlm.ProcGranted:
		var a nlm.TestArgs
		if a.Decode(xdr.NewReader(c.Args), c.Vers) != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		h.granted = append(h.granted, c.Remote)
		if h.lost > 0 {
			h.lost--
			c.Drop()
			return
		}
		nlm.PutRes(&c.Out, a.Cookie, nlm.Granted)
	case c.Prog == nsm.Program && c.Proc == 6: // NOTIFY
		var n nsm.StatChge
		if n.Decode(xdr.NewReader(c.Args)) != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		h.told = append(h.told, notice{c.Remote.Addr(), n.MonName, n.State})
	}
	c.Finish()
}

func (h *lockHost) grants() []netip.AddrPort {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.granted)
}

func (h *lockHost) notices() []notice {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.told)
}

// hosts are the client hosts by address; nodes ask it for their ports.
type hosts struct {
	mu sync.Mutex
	m  map[netip.Addr]*lockHost
}

func (l *hosts) port(host netip.Addr, _ uint32, netid string) (uint16, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch h := l.m[host]; {
	case h == nil:
		return 0, rpcbind.ErrNotRegistered
	case netid == rpcbind.UDP:
		return h.udp, nil
	default:
		return h.tcp, nil
	}
}

func (l *hosts) add(m *moving, i byte) *lockHost {
	m.t.Helper()
	h := &lockHost{m: m, name: fmt.Sprintf("host%d", i), addr: netip.AddrFrom4([4]byte{127, 0, 8, i})}
	var progs []sunrpc.Program
	for prog, f := range map[uint32]func(uint32) uint32{nlm.Program: nlm.NumProcs, nsm.Program: func(uint32) uint32 { return 7 }} {
		progs = append(progs, sunrpc.Program{Prog: prog, VersLow: 1, VersHigh: 4, NumProcs: f, Handler: h})
	}
	srv := sunrpc.NewServer(sunrpc.Config{Programs: progs})
	m.t.Cleanup(func() { srv.Close() })
	tcp, err := srv.ListenTCP(netip.AddrPortFrom(h.addr, 0), sunrpc.ListenOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	udp, err := srv.ListenUDP(netip.AddrPortFrom(h.addr, 0), sunrpc.ListenOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	h.tcp, h.udp = tcp.Port(), udp.Port()
	h.rpc = m.client()
	h.rpc.from = netip.AddrPortFrom(h.addr, 0)
	h.rpc.xid = uint32(i) << 20
	l.mu.Lock()
	l.m[h.addr] = h
	l.mu.Unlock()
	return h
}

func (h *lockHost) lk(off, n uint64) nlm.Lock {
	return nlm.Lock{CallerName: []byte(h.name), FH: h.fh, OH: []byte("o" + h.name), Svid: 1, Offset: off, Len: n}
}

type nlmArgs interface {
	Encode(w *xdr.Writer, vers uint32)
}

func (h *lockHost) ask(proc nlm.Proc, a nlmArgs) nlm.Stat {
	h.m.t.Helper()
	out := h.rpc.answer(h.rpc.next(), nlm.Program, nlm.Version4, uint32(proc), encoded{a})
	var res nlm.Res
	if err := res.Decode(xdr.NewReader(out), nlm.Version4); err != nil {
		h.m.t.Fatal(err)
	}
	return res.Stat
}

type encoded struct{ a nlmArgs }

func (e encoded) Encode(w *xdr.Writer) { e.a.Encode(w, nlm.Version4) }

func (h *lockHost) lock(off, n uint64, block, reclaim bool) nlm.Stat {
	h.m.t.Helper()
	return h.ask(nlm.ProcLock, &nlm.LockArgs{Cookie: []byte{1}, Block: block, Exclusive: true, Lock: h.lk(off, n), Reclaim: reclaim, State: 1})
}

func (h *lockHost) cancel(off, n uint64) nlm.Stat {
	h.m.t.Helper()
	return h.ask(nlm.ProcCancel, &nlm.CancelArgs{Cookie: []byte{1}, Block: true, Exclusive: true, Lock: h.lk(off, n)})
}

func (h *lockHost) unlock(off, n uint64) nlm.Stat {
	h.m.t.Helper()
	return h.ask(nlm.ProcUnlock, &nlm.UnlockArgs{Cookie: []byte{1}, Lock: h.lk(off, n)})
}

func wantStat(t *testing.T, what string, got, want nlm.Stat) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
}

// unconfirmed counts the address's locks that have to be reclaimed.
func (m *moving) unconfirmed() uint64 {
	m.t.Helper()
	for _, s := range m.on.Status().Locks {
		if s.Addr == floatAddr.String() {
			return s.Unconfirmed
		}
	}
	m.t.Fatal("no lock service of the address")
	return 0
}

// Locks stay with the address: granted, waiting, cancelled and given back while it
// moves. Nobody hears of a planned move. After a crash those who have locks are told from
// the address, in its name, and confirm; others wait only for what they may lose. The
// restart of a client is heeded by an owner that has never seen it. own 11, 12, 13, 14;
// 004.2 to 004.6, 004.29, 004.30.
func TestLocksOverMoves(t *testing.T) {
	m := &moving{floatCell: newFloatCell(t)}
	l := &hosts{m: map[netip.Addr]*lockHost{}}
	plain := m.prepare
	m.prepare = func(n *Node) {
		plain(n)
		n.testPortmap = l.port
	}
	m.begin()
	k := m.client()
	dir := k.mount()
	fh := k.make(dir, "locked")
	h1, h2, h3 := l.add(m, 1), l.add(m, 2), l.add(m, 3)
	all := []*lockHost{h1, h2, h3}
	for _, h := range all {
		h.fh = fh
	}
	state := m.vip(m.a).NSMState

	// A lock that is held and one that is waited for; given back after the move.
	wantStat(t, "lock", h1.lock(0, 10, false, false), nlm.Granted)
	wantStat(t, "lock that is taken", h2.lock(0, 10, true, false), nlm.Blocked)
	wantStat(t, "another one waits", h3.lock(0, 10, true, false), nlm.Blocked)
	m.move()
	wantStat(t, "after the move it is still held", h3.lock(5, 1, false, false), nlm.Denied)
	wantStat(t, "cancel after the move", h3.cancel(0, 10), nlm.Granted)
	wantStat(t, "unlock after the move", h1.unlock(0, 10), nlm.Granted)
	until(t, "GRANTED by the new owner", func() bool { return len(h2.grants()) > 0 })
	if g := h2.grants(); g[0].Addr() != floatAddr {
		t.Errorf("GRANTED came from %v", g)
	}
	wantStat(t, "granted to who waited", h1.lock(0, 1, false, false), nlm.Denied)
	wantStat(t, "unlock", h2.unlock(0, 10), nlm.Granted)
	wantStat(t, "nobody has it, the cancelled one neither", h1.lock(0, 10, false, false), nlm.Granted)
	if g := h3.grants(); len(g) != 0 {
		t.Errorf("the cancelled one was called: %v", g)
	}

	// GRANTED is sent and not answered, and the address moves.
	h2.mu.Lock()
	h2.granted, h2.lost = nil, 1
	h2.mu.Unlock()
	wantStat(t, "wait again", h2.lock(0, 10, true, false), nlm.Blocked)
	wantStat(t, "unlock", h1.unlock(0, 10), nlm.Granted)
	until(t, "GRANTED that is lost", func() bool { return len(h2.grants()) == 1 })
	m.move()
	until(t, "GRANTED again, by the next owner", func() bool { return len(h2.grants()) >= 2 })
	wantStat(t, "it has the lock", h1.lock(0, 1, false, false), nlm.Denied)

	// Nobody was told anything: locks went with the address.
	wantStat(t, "one of its own", h1.lock(100, 10, false, false), nlm.Granted)
	m.move()
	m.move()
	if n := m.unconfirmed(); n != 0 {
		t.Errorf("%d locks are unconfirmed after planned moves", n)
	}
	for _, h := range all {
		if n := h.notices(); len(n) != 0 {
			t.Errorf("%s was told of a planned move: %v", h.name, n)
		}
	}
	if v := m.vip(m.a); v.NSMState != state {
		t.Errorf("NSM state %d, it was %d", v.NSMState, state)
	}

	// A crash. Who asks for what somebody had waits, who asks for something else does not.
	m.crash()
	if n := m.unconfirmed(); n != 2 {
		t.Errorf("%d locks are unconfirmed, want 2", n)
	}
	wantStat(t, "what conflicts with nothing", h3.lock(1000, 10, false, false), nlm.Granted)
	if s := h3.lock(0, 10, false, false); s != nlm.Denied && s != nlm.DeniedGracePeriod {
		t.Fatalf("what is not confirmed yet: %v", s)
	}
	// More than one crash if the last owner was quick to take the address anew.
	v := m.vip(m.a)
	if v.NSMState < state+2 || v.NSMState%2 != 1 {
		t.Errorf("NSM state %d, it was %d", v.NSMState, state)
	}
	for _, h := range []*lockHost{h1, h2} {
		until(t, "SM_NOTIFY to "+h.name, func() bool {
			return slices.ContainsFunc(h.notices(), func(n notice) bool { return n.state == v.NSMState })
		})
		for _, n := range h.notices() {
			if n.from != floatAddr || n.name != floatAddr.String() || n.state <= state || n.state > v.NSMState || n.state%2 != 1 {
				t.Errorf("%s was told %+v", h.name, n)
			}
		}
	}
	wantStat(t, "confirmed", h1.lock(100, 10, false, true), nlm.Granted)
	wantStat(t, "confirmed", h2.lock(0, 10, false, true), nlm.Granted)
	if n := m.unconfirmed(); n != 0 {
		t.Errorf("%d locks are still unconfirmed", n)
	}
	wantStat(t, "confirmed and held", h3.lock(0, 10, false, false), nlm.Denied)
	wantStat(t, "confirmed and held", h3.lock(100, 10, false, false), nlm.Denied)

	// h2 restarts, which an owner hears that has never seen it.
	m.move()
	h2.rpc.close()
	tell := nsm.StatChge{MonName: h2.name, State: 3}
	h2.rpc.answer(h2.rpc.next(), nsm.Program, nsm.Version, 6, &tell)
	wantStat(t, "its locks are gone", h3.lock(0, 10, false, false), nlm.Granted)
	wantStat(t, "those of others are not", h3.lock(100, 10, false, false), nlm.Denied)
}
