package lockd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// patience bounds waiting for what must happen; it is not a measurement.
const patience = 20 * time.Second

// bed is a lock service on loopback over a fake table.
type bed struct {
	t     *testing.T
	tab   *fakeTable
	a     *Address
	rpc   *sunrpc.Server
	tcp   netip.AddrPort
	udp   netip.AddrPort
	peers *peers
}

// peers answers the service's questions for ports.
type peers struct {
	mu    sync.Mutex
	m     map[netip.Addr]*peer
	asked map[netip.Addr]int
}

func (p *peers) port(_ context.Context, _ netip.Addr, server netip.AddrPort, prog, vers uint32, netid string) (uint16, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked[server.Addr()]++
	x := p.m[server.Addr()]
	if prog != nlm.Program || x == nil {
		return 0, errors.New("portmapper unreachable")
	}
	if x.only != "" && x.only != netid {
		return 0, rpcbind.ErrNotRegistered
	}
	if netid == rpcbind.UDP {
		return x.udp.Port(), nil
	}
	return x.tcp.Port(), nil
}

func (p *peers) add(x *peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.m[x.addr] = x
}

func (p *peers) questions(a netip.Addr) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked[a]
}

func newBed(t *testing.T, change func(*Config)) *bed {
	t.Helper()
	b := &bed{t: t, tab: newFakeTable(), peers: &peers{m: map[netip.Addr]*peer{}, asked: map[netip.Addr]int{}}}
	cfg := Config{Table: b.tab, Portmap: b.peers.port, RetryFirst: time.Millisecond, RetryMax: 4 * time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.a = s.Address(netip.MustParseAddr("127.0.0.1"), 7, 3, fakeFiles{})
	b.rpc = sunrpc.NewServer(sunrpc.Config{Programs: b.a.Programs()})
	t.Cleanup(func() { b.rpc.Close() })
	any := netip.MustParseAddrPort("127.0.0.1:0")
	if b.tcp, err = b.rpc.ListenTCP(any, sunrpc.ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	if b.udp, err = b.rpc.ListenUDP(any, sunrpc.ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	b.a.Start()
	t.Cleanup(b.stop)
	// What is granted before the first poll counts as told of already.
	until(t, "the poll", func() bool { b.tab.mu.Lock(); defer b.tab.mu.Unlock(); return b.tab.poll != nil })
	return b
}

func (b *bed) stop() {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := b.a.Stop(ctx); err != nil {
		b.t.Errorf("stop: %v", err)
	}
}

// until waits for cond.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: did not happen", what)
		}
	}
}

// peer is an NFS client: it asks from its address, and serves callbacks.
type peer struct {
	b        *bed
	addr     netip.Addr
	vers     uint32
	nw       string
	rpc      *sunrpc.Client
	srv      *sunrpc.Server
	tcp, udp netip.AddrPort
	only     string // netid on which its lock manager is registered, "" both
	// answer handles a call to the peer's lock manager. It may drop it.
	mu     sync.Mutex
	answer func(c *sunrpc.Call, n int)
	calls  []peerCall
}

// peerCall is a call that a peer's lock manager got.
type peerCall struct {
	proc nlm.Proc
	vers uint32
	nw   string
	from netip.AddrPort
	args []byte
}

// peer connects a client with the address 127.0.0.n.
func (b *bed) peer(n byte, vers uint32, nw string) *peer {
	b.t.Helper()
	p := &peer{b: b, addr: netip.AddrFrom4([4]byte{127, 0, 0, n}), vers: vers, nw: nw}
	p.answer = reply(nlm.Granted)
	p.dial()
	p.srv = sunrpc.NewServer(sunrpc.Config{Programs: []sunrpc.Program{{
		Prog: nlm.Program, VersLow: 1, VersHigh: 4, NumProcs: nlm.NumProcs, Handler: p,
	}}})
	b.t.Cleanup(func() { p.srv.Close() })
	var err error
	if p.tcp, err = p.srv.ListenTCP(netip.AddrPortFrom(p.addr, 0), sunrpc.ListenOptions{}); err != nil {
		b.t.Fatal(err)
	}
	if p.udp, err = p.srv.ListenUDP(netip.AddrPortFrom(p.addr, 0), sunrpc.ListenOptions{}); err != nil {
		b.t.Fatal(err)
	}
	b.peers.add(p)
	return p
}

func (p *peer) dial() {
	p.b.t.Helper()
	to := p.b.tcp
	if p.nw == "udp" {
		to = p.b.udp
	}
	c, err := sunrpc.Dial(context.Background(), p.nw, netip.AddrPortFrom(p.addr, 0), to, nlm.Program, p.vers, sunrpc.Cred{Flavor: sunrpc.AuthSys})
	if err != nil {
		p.b.t.Fatal(err)
	}
	p.b.t.Cleanup(func() { c.Close() })
	p.rpc = c
}

// ServeRPC notes the call and answers it as the test wants.
func (p *peer) ServeRPC(c *sunrpc.Call) {
	nw := "tcp"
	if c.Conn == nil {
		nw = "udp"
	}
	p.mu.Lock()
	p.calls = append(p.calls, peerCall{nlm.Proc(c.Proc), c.Vers, nw, c.Remote, append([]byte(nil), c.Args...)})
	n, f := len(p.calls), p.answer
	p.mu.Unlock()
	f(c, n)
}

// register leaves the peer's lock manager registered on one netid only.
func (p *peer) register(netid string) {
	p.b.peers.mu.Lock()
	defer p.b.peers.mu.Unlock()
	p.only = netid
}

func (p *peer) setAnswer(f func(c *sunrpc.Call, n int)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = f
}

func (p *peer) got() []peerCall {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]peerCall(nil), p.calls...)
}

// reply answers GRANTED with st and everything else with nothing.
func reply(st nlm.Stat) func(*sunrpc.Call, int) {
	return func(c *sunrpc.Call, _ int) {
		if nlm.Proc(c.Proc) == nlm.ProcGranted {
			var a nlm.TestArgs
			if a.Decode(xdr.NewReader(c.Args), c.Vers) != nil {
				c.Fail(sunrpc.GarbageArgs)
				return
			}
			nlm.PutRes(&c.Out, a.Cookie, st)
		}
		c.Finish()
	}
}

// first runs f on the first n calls and then g.
func first(n int, f, g func(*sunrpc.Call, int)) func(*sunrpc.Call, int) {
	return func(c *sunrpc.Call, i int) {
		if i <= n {
			f(c, i)
		} else {
			g(c, i)
		}
	}
}

func ignore(c *sunrpc.Call, _ int) { c.Drop() }

type codec interface {
	Decode(*xdr.Reader, uint32) error
	Encode(*xdr.Writer, uint32)
}

func (p *peer) try(proc nlm.Proc, args codec) ([]byte, error) {
	var w xdr.Writer
	args.Encode(&w, p.vers)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return p.rpc.Call(ctx, uint32(proc), w.Buf)
}

func (p *peer) call(proc nlm.Proc, args, res codec) {
	p.b.t.Helper()
	out, err := p.try(proc, args)
	if err != nil {
		p.b.t.Fatalf("%v: %v", proc, err)
	}
	if res == nil {
		if len(out) != 0 {
			p.b.t.Fatalf("%v: %d bytes of result, want none", proc, len(out))
		}
		return
	}
	r := xdr.NewReader(out)
	if err := res.Decode(r, p.vers); err != nil || r.Len() != 0 {
		p.b.t.Fatalf("%v: result %x: %v, %d bytes left", proc, out, err, r.Len())
	}
}

var cookie = []byte{0xc0, 0, 0, 1}

func (p *peer) lk(fh string, svid uint32, off, n uint64) nlm.Lock {
	return nlm.Lock{CallerName: []byte("host-" + p.addr.String()), FH: []byte(fh), OH: []byte("oh"), Svid: svid, Offset: off, Len: n}
}

func (p *peer) res(proc nlm.Proc, args codec) nlm.Stat {
	p.b.t.Helper()
	var r nlm.Res
	p.call(proc, args, &r)
	if string(r.Cookie) != string(cookie) {
		p.b.t.Fatalf("%v: cookie %x", proc, r.Cookie)
	}
	return r.Stat
}

func (p *peer) lock(fh string, svid uint32, off, n uint64, block bool) nlm.Stat {
	p.b.t.Helper()
	return p.res(nlm.ProcLock, &nlm.LockArgs{Cookie: cookie, Block: block, Exclusive: true, Lock: p.lk(fh, svid, off, n)})
}

func (p *peer) unlock(fh string, svid uint32, off, n uint64) nlm.Stat {
	p.b.t.Helper()
	return p.res(nlm.ProcUnlock, &nlm.UnlockArgs{Cookie: cookie, Lock: p.lk(fh, svid, off, n)})
}

func (p *peer) cancel(fh string, svid uint32, off, n uint64) nlm.Stat {
	p.b.t.Helper()
	return p.res(nlm.ProcCancel, &nlm.CancelArgs{Cookie: cookie, Block: true, Exclusive: true, Lock: p.lk(fh, svid, off, n)})
}

func (p *peer) test(fh string, svid uint32, off, n uint64) nlm.TestRes {
	p.b.t.Helper()
	var r nlm.TestRes
	p.call(nlm.ProcTest, &nlm.TestArgs{Cookie: cookie, Exclusive: true, Lock: p.lk(fh, svid, off, n)}, &r)
	return r
}

// want checks a status.
func want(t *testing.T, what string, got, want nlm.Stat) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: %v, want %v", what, got, want)
	}
}

func (b *bed) settled(fid wire.FID, svid uint32, st wire.LockState) {
	b.t.Helper()
	until(b.t, "lock state "+st.String(), func() bool { return b.tab.states(fid)[svid] == st })
}

// raw is a TCP connection with chosen XIDs.
type raw struct {
	t *testing.T
	net.Conn
}
