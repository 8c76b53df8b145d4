package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/statd/nsm"
)

// answers asks the portmapper of the address, by all its versions and ways, where each
// program is, and calls that there.
func (s *street) answers() {
	s.t.Helper()
	x, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	suffix := map[bool]string{true: "6"}[s.vip().Is6()]
	dial := func(network string, port uint16, prog, vers uint32) (c *sunrpc.Client) {
		s.t.Helper()
		s.ok(s.hub.Do(func() (err error) {
			c, err = sunrpc.Dial(x, network, netip.AddrPort{}, netip.AddrPortFrom(s.vip(), port), prog, vers, sunrpc.Cred{Flavor: sunrpc.AuthSys})
			return err
		}))
		return c
	}
	null := func(network string, port uint16, prog, vers uint32) {
		s.t.Helper()
		c := dial(network, port, prog, vers)
		defer c.Close()
		if _, err := c.Call(x, 0, nil); err != nil {
			s.t.Errorf("program %d version %d at %s port %d: %v", prog, vers, network, port, err)
		}
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, p := range []struct{ prog, vers uint32 }{
			{nfs3.Program, nfs3.Version}, {mount3.Program, mount3.Version}, {nlm.Program, nlm.Version4}, {nsm.Program, nsm.Version},
		} {
			if p.prog == nfs3.Program && network == "udp" {
				continue // unless nfs.udp is set
			}
			for _, vers := range []uint32{rpcbind.Vers3, rpcbind.Vers4} {
				var w xdr.Writer
				w.Uint32(p.prog)
				w.Uint32(p.vers)
				for _, t := range []string{network + suffix, "", ""} {
					w.String(t)
				}
				c := dial(network, 111, rpcbind.Program, vers)
				out, err := c.Call(x, 3, w.Buf) // GETADDR
				s.ok(err)
				at, err := rpcbind.ParseUaddr(string(xdr.NewReader(out).String(256)))
				c.Close()
				if err != nil || at.Addr() != s.vip() {
					s.t.Errorf("rpcbind version %d by %s: program %d is at %v (%v)", vers, network, p.prog, at, err)
					continue
				}
				null(network, at.Port(), p.prog, p.vers)
			}
		}
		for _, vers := range []uint32{rpcbind.VersPortmap, rpcbind.Vers3, rpcbind.Vers4} {
			null(network, 111, rpcbind.Program, vers)
		}
	}
}

// lockHost is a client host with an address of its own at the hub, and a portmapper, a
// lock and a status monitor there.
type lockHost struct {
	caller
	name string
	fh   []byte

	mu   sync.Mutex
	who  []netip.Addr // has called GRANTED
	told []notice
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
		h.who = append(h.who, c.Remote.Addr())
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

func (h *lockHost) grants() []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.who)
}

// notices are those since the last question.
func (h *lockHost) notices() []notice {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.told
	h.told = nil
	return l
}

// guest gives the hub address number i, from 1, for a client of its own.
func (s *street) guest(i int) netip.AddrPort {
	s.t.Helper()
	at := netip.MustParsePrefix(fmt.Sprintf(streets[s.vip().Is6()], 20+i))
	s.ok(s.hub.AddAddr("br0", at))
	return netip.AddrPortFrom(at.Addr(), 0)
}

// lockHost makes host number i, from 1, a client of the address.
func (s *street) lockHost(i int, fh []byte) *lockHost {
	s.t.Helper()
	h := &lockHost{caller: caller{s: s, from: s.guest(i), xid: uint32(i) << 20}, name: fmt.Sprint("host", i), fh: fh}
	at := h.from.Addr()
	const port = 4045
	table := &rpcbind.Table{}
	progs := (&rpcbind.Server{Table: table}).Programs()
	for prog, n := range map[uint32]func(uint32) uint32{nlm.Program: nlm.NumProcs, nsm.Program: func(uint32) uint32 { return 7 }} {
		for _, m := range rpcbind.Mappings(prog, []uint32{1, 4}, []netip.Addr{at}, port, port) {
			table.Set(m)
		}
		progs = append(progs, sunrpc.Program{Prog: prog, VersLow: 1, VersHigh: 4, NumProcs: n, Handler: h})
	}
	srv := sunrpc.NewServer(sunrpc.Config{Programs: progs})
	s.t.Cleanup(func() { srv.Close(); h.hang() })
	for _, p := range []uint16{111, port} {
		s.ok(s.hub.Do(func() error {
			_, err1 := srv.ListenTCP(netip.AddrPortFrom(at, p), sunrpc.ListenOptions{})
			_, err2 := srv.ListenUDP(netip.AddrPortFrom(at, p), sunrpc.ListenOptions{})
			return errors.Join(err1, err2)
		}))
	}
	return h
}

// hang ends the connection, without anything left of it here.
func (k *caller) hang() {
	if k.conn != nil {
		k.conn.(*net.TCPConn).SetLinger(0)
		k.conn.Close()
		k.conn = nil
	}
}

func (h *lockHost) lk(off uint64) nlm.Lock {
	return nlm.Lock{CallerName: []byte(h.name), FH: h.fh, OH: []byte("o" + h.name), Svid: 1, Offset: off, Len: 10}
}

// want makes a call of NLM 4 whose answer is a status.
func (h *lockHost) want(what string, want nlm.Stat, proc nlm.Proc, a interface{ Encode(*xdr.Writer, uint32) }) {
	h.s.t.Helper()
	if got := h.ask(proc, a); got != want {
		h.s.t.Fatalf("%s: %s is told %v, want %v", what, h.name, got, want)
	}
}

func (h *lockHost) ask(proc nlm.Proc, a interface{ Encode(*xdr.Writer, uint32) }) nlm.Stat {
	h.s.t.Helper()
	var res lockRes
	h.call(nlm.Program, nlm.Version4, uint32(proc), func(w *xdr.Writer) { a.Encode(w, nlm.Version4) }, &res)
	return res.Stat
}

type lockRes struct{ nlm.Res }

func (r *lockRes) Decode(x *xdr.Reader) error { return r.Res.Decode(x, nlm.Version4) }

// lock asks for 10 bytes.
func (h *lockHost) lock(what string, want nlm.Stat, off uint64, block, reclaim bool) {
	h.s.t.Helper()
	h.want(what, want, nlm.ProcLock, &nlm.LockArgs{Cookie: []byte{1}, Block: block, Exclusive: true, Lock: h.lk(off), Reclaim: reclaim, State: 1})
}

func (h *lockHost) unlock(off uint64) {
	h.s.t.Helper()
	h.want("unlock", nlm.Granted, nlm.ProcUnlock, &nlm.UnlockArgs{Cookie: []byte{1}, Lock: h.lk(off)})
}

// rebooted tells the address that the host has restarted.
func (h *lockHost) rebooted(state uint32) {
	h.s.t.Helper()
	h.call(nsm.Program, nsm.Version, 6, (&nsm.StatChge{MonName: h.name, State: state}).Encode, nothing{})
}

type nothing struct{}

func (nothing) Decode(*xdr.Reader) error { return nil }

// notified waits until the host is told of a crash, by its address.
func (h *lockHost) notified() (state uint32) {
	h.s.t.Helper()
	var l []notice
	h.s.until("SM_NOTIFY to "+h.name, func() bool {
		l = h.notices()
		return len(l) > 0
	})
	for _, n := range l {
		if n.from != h.s.vip() || n.name != h.s.vip().String() || n.state%2 != 1 {
			h.s.t.Errorf("%s was told %+v", h.name, n)
		}
	}
	return l[0].state
}

// reset waits until the connection is reset, though nothing is sent by it.
func (h *lockHost) reset(what string) {
	h.s.t.Helper()
	h.s.ok(h.conn.SetReadDeadline(time.Now().Add(patience)))
	if n, err := h.conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		h.s.t.Errorf("%s: the idle connection of %s gave %d bytes, %v; want a reset", what, h.name, n, err)
	}
	h.hang()
}

// wire is what a machine has sent in the name of the address.
type frame struct {
	from string // hardware address
	what string // NA, FIN, RST, tickle
	port uint16 // TCP: the client's
}

// tap listens to the network.
type tap struct {
	fd   int
	done chan struct{}
	mu   sync.Mutex
	seen []frame
}

// listen begins to note the address's frames (IPv6) that reach the hub.
func (s *street) listen() *tap {
	s.t.Helper()
	p := &tap{done: make(chan struct{})}
	s.ok(s.hub.Do(func() error {
		ifi, err := net.InterfaceByName("br0")
		if err != nil {
			return err
		}
		const proto = unix.ETH_P_IPV6&0xff<<8 | unix.ETH_P_IPV6>>8
		if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
			return err
		}
		return errors.Join(unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index}),
			unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}))
	}))
	quit := make(chan struct{})
	go func() {
		defer close(p.done)
		b := make([]byte, 2048)
		for {
			n, err := unix.Read(p.fd, b)
			if err == nil {
				if f, ok := parseFrame(b[:n], s.vip()); ok {
					p.mu.Lock()
					p.seen = append(p.seen, f)
					p.mu.Unlock()
				}
				continue
			}
			select {
			case <-quit:
				return
			default:
			}
		}
	}()
	s.t.Cleanup(func() {
		close(quit)
		<-p.done
		unix.Close(p.fd)
	})
	return p
}

// parseFrame looks for what is sent by addr and matters.
func parseFrame(b []byte, addr netip.Addr) (f frame, ok bool) {
	const ip, payload = 14, 14 + 40
	if len(b) < payload+20 {
		return f, false
	}
	f.from = net.HardwareAddr(b[6:12]).String()
	src, _ := netip.AddrFromSlice(b[ip+8 : ip+24])
	body := b[payload:]
	switch b[ip+6] {
	case 58: // ICMPv6: unsolicited, override, with the target and its hardware address (RFC 4861 section 4.4)
		if len(body) < 32 || body[0] != 136 || body[4]&0x60 != 0x20 {
			return f, false
		}
		target, _ := netip.AddrFromSlice(body[8:24])
		f.what = "NA"
		return f, target == addr && body[24] == 2 && net.HardwareAddr(body[26:32]).String() == f.from
	case 6:
		f.port = binary.BigEndian.Uint16(body[2:])
		switch flags := body[13] & 0x17; {
		case flags&4 != 0:
			f.what = "RST"
		case flags&1 != 0:
			f.what = "FIN"
		case flags == 0x10 && binary.BigEndian.Uint64(body[4:]) == 0:
			f.what = "tickle"
		}
		return f, src == addr && f.what != ""
	}
	return f, false
}

// has waits until something was seen.
func (p *tap) has(s *street, f frame) {
	s.t.Helper()
	s.until(fmt.Sprintf("%+v", f), func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return slices.Contains(p.seen, f)
	})
}

// take is what was seen since the last question.
func (p *tap) take() []frame {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.seen
	p.seen = nil
	return l
}

func (s *street) mac(name string) (mac string) {
	s.t.Helper()
	s.ok(s.nodes[name].Do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = ifi.HardwareAddr.String()
		}
		return err
	}))
	return mac
}

// A whole service moves with an IPv6 address between machines that have IPv6 addresses
// alone: all programs answer at it before and after; idle connections end without a
// segment of the last owner, and by a reset of the next one; locks stay, or are reclaimed
// after a power cut; nothing of the address is left where it was. Clients of another
// address, on one of the machines, are not concerned, and are still monitored.
// 004.1, 004.2, 004.3, 004.5, 004.6, 004.8, 004.18.
func TestServiceOverIPv6(t *testing.T) {
	s := newStreet(t, "off", six)
	s.all()
	near := *s // the street with the other address
	near.at = netip.MustParsePrefix("fd77::101/64")
	for _, x := range []*street{s, &near} {
		s.must("vip", "add", x.at.String())
		// As somebody may write it who has just written one with a port.
		s.must("vip", "move", "["+strings.ToUpper(x.vip().String())+"]", "--to", "n1")
		x.alone("n1")
		x.answers()
	}
	w := s.watch()
	k := &caller{s: s}
	dir := k.mount()
	k.create(dir, []byte("locked"))
	var file nfs3.LookupRes
	k.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureLookup), (&nfs3.DirOpArgs{FH: dir, Name: []byte("locked")}).Encode, &file)
	k.hang()
	fh := slices.Clone(file.FH)
	h1, h2, h3 := s.lockHost(1, fh), s.lockHost(2, fh), s.lockHost(3, fh)
	n1, n2 := near.lockHost(4, fh), near.lockHost(5, fh)
	p := s.listen()

	h1.lock("a lock", nlm.Granted, 0, false, false)
	h1.lock("another one", nlm.Granted, 100, false, false)
	h2.lock("taken", nlm.Blocked, 0, true, false)
	n1.lock("by the other address", nlm.Granted, 200, false, false)
	n2.lock("by the other address", nlm.Granted, 300, false, false)
	h3.lock("taken by the other address's client", nlm.Denied, 200, false, false)

	planned := func(from, to string) {
		t.Helper()
		port := h3.conn.LocalAddr().(*net.TCPAddr).AddrPort().Port()
		p.take()
		s.must("vip", "move", s.vip().String(), "--to", to)
		s.alone(to)
		h3.reset("planned move")
		p.has(s, frame{s.mac(to), "NA", 0})
		p.has(s, frame{s.mac(to), "tickle", port})
		p.has(s, frame{s.mac(to), "RST", port})
		for _, f := range p.take() {
			if f.from == s.mac(from) && (f.what == "FIN" || f.what == "RST") {
				t.Errorf("the last owner has sent %+v", f)
			}
		}
		s.answers()
		h3.lock("still held", nlm.Denied, 5, false, false)
		h3.lock("still held by the other address's client", nlm.Denied, 300, false, false)
	}
	planned("n1", "n2")
	h1.unlock(0)
	s.until("GRANTED", func() bool { return len(h2.grants()) > 0 })
	if g := h2.grants(); g[0] != s.vip() {
		t.Errorf("GRANTED came from %v", g)
	}
	h3.lock("of who has waited", nlm.Denied, 0, false, false)

	// Both addresses hear of their clients' restarts, n2 of one that it has never
	// seen before.
	n1.rebooted(3)
	h3.lock("of a client that has restarted", nlm.Granted, 200, false, false)
	h3.lock("of one that has not", nlm.Denied, 300, false, false)
	h1.rebooted(3)
	h3.lock("of a client that has restarted", nlm.Granted, 100, false, false)
	h3.lock("of one that has not", nlm.Denied, 0, false, false)
	h3.unlock(100)
	h1.lock("as before", nlm.Granted, 100, false, false)
	planned("n2", "n1")
	planned("n1", "n2")
	for _, h := range []*lockHost{h1, h2, h3, n1, n2} {
		if l := h.notices(); len(l) > 0 {
			t.Errorf("%s was told of a planned move: %+v", h.name, l)
		}
	}

	// n2 dies with the address. Its clients are told, and nobody else.
	p.take()
	was := n2.conn
	// The other nodes are told of a connection up to 50 ms after it was made, and nothing
	// shows from outside that they know. Of one that they do not know nobody wakes the client.
	time.Sleep(2 * time.Second)
	s.crash(w, "n2")
	s.must("vip", "move", s.vip().String(), "--to", "n1", "--force")
	s.until("n1 to serve", func() bool { return s.local("n1") == "serving" })
	h3.reset("power cut")
	p.has(s, frame{s.mac("n1"), "NA", 0})
	s.answers()
	h3.lock("not confirmed yet, but it conflicts with nothing", nlm.Granted, 1000, false, false)
	if a, b := h1.notified(), h2.notified(); a != b {
		t.Errorf("NSM state %d for one, %d for the other", a, b)
	}
	h1.lock("reclaim", nlm.Granted, 100, false, true)
	h2.lock("reclaim", nlm.Granted, 0, false, true)
	h3.lock("confirmed", nlm.Denied, 100, false, false)
	h3.lock("confirmed", nlm.Denied, 0, false, false)
	h3.lock("of the other address's client", nlm.Denied, 300, false, false)
	n2.lock("in no grace period", nlm.Granted, 400, false, false)
	if n2.conn != was {
		t.Error("a client of the other address has lost its connection")
	}
	s.back(w, "n2")
	s.alone("n1")
	near.alone("n1")

	// The other address's clients are monitored by it all the time.
	if l := slices.Concat(n1.notices(), n2.notices()); len(l) > 0 {
		t.Errorf("clients of the other address were told %+v", l)
	}
	h1.notices()
	h2.notices()
	s.must("vip", "move", s.vip().String(), "--to", "n2")
	s.alone("n2")
	s.crash(w, "n1")
	s.must("vip", "move", near.vip().String(), "--to", "n2", "--force")
	s.until("n2 to serve both", func() bool { return near.local("n2") == "serving" })
	n2.notified()
	n2.lock("reclaim", nlm.Granted, 300, false, true)
	for _, h := range []*lockHost{h1, h2} {
		if l := h.notices(); len(l) > 0 {
			t.Errorf("%s was told of a crash of another address's node: %+v", h.name, l)
		}
	}
	s.back(w, "n1")
	s.alone("n2")
	near.alone("n2")
	near.answers()
}

// Somebody else decides where an IPv6 address is, by hooks, written in ways that are not
// the shortest: baton moves it, or serves it where it was added, and what a dead process has
// left is taken away.
func TestHooksOverIPv6(t *testing.T) {
	s := newStreet(t, "external", six)
	s.all()
	s.must("vip", "add", "[FD77:0:0:0::0100]/64", "--interface", "eth0")
	try := func(name string, args ...string) error {
		x, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		args = append([]string{"hook"}, append(args, "--socket", s.path(name, "s"), "--timeout", "60s")...)
		out, err := s.nodes[name].Run(x, s.bin, args...)
		if err != nil {
			err = fmt.Errorf("baton %v at %s: %w\n%s", args, name, err, out)
		}
		return err
	}
	hook := func(name string, args ...string) {
		t.Helper()
		s.ok(try(name, args...))
	}
	ip := func(name, verb string, more ...string) {
		t.Helper()
		if out, err := s.nodes[name].Run(ctx, "ip", append([]string{"addr", verb, s.at.String(), "dev", "eth0"}, more...)...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	const name = "[fd77::0:100]"
	for _, n := range []string{"n2", "n1"} { // which need a moment to find the MDT
		s.until(n+" to be ready", func() bool { return try(n, "take", name) == nil })
		hook(n, "check", name)
		if n == "n2" {
			hook(n, "release", name)
		}
	}
	s.alone("n1")
	s.answers()
	w := s.watch()
	k, gone := s.client()
	gone("start", "n1")
	hook("n1", "release", name, "--to", "n2")
	hook("n2", "take", name)
	gone("moved by hooks", "n2")

	// The address is added and removed by somebody else.
	hook("n2", "release", name)
	give := func(to string) {
		t.Helper()
		hook(to, "take", name, "--given", "--stage", "listen")
		ip(to, "add", "nodad")
		hook(to, "take", name, "--given")
	}
	give("n1")
	gone("given", "n1")
	s.answers()
	hook("n1", "release", name, "--given", "--stage", "drain")
	ip("n1", "del")
	hook("n1", "release", name, "--given", "--stage", "finish")
	give("n2")
	gone("given to the other one", "n2")
	hook("n2", "release", name, "--given", "--stage", "drain")
	ip("n2", "del")
	hook("n2", "release", name, "--given", "--stage", "finish")

	// Its process dies; the machine goes on, and has the address until the hook comes.
	// Its kernel keeps what is left of connections until the address returns.
	hook("n1", "take", name)
	gone("baton's own again", "n1")
	w.excuse("n1", true)
	s.procs["n1"].Kill()
	if !s.has("n1") {
		t.Error("the address went with the process")
	}
	hook("n1", "release", name)
	if s.has("n1") {
		t.Error("the machine keeps the address of a dead process")
	}
	hook("n2", "take", name, "--force")
	s.serves("n2")
	t.Logf("process killed: longest call %v", s.goesOn(k))
	s.start("n1")
	s.knows("n1")
	hook("n2", "release", name, "--to", "n1")
	hook("n1", "take", name)
	w.excuse("n1", false)
	gone("and back", "n1")
}
