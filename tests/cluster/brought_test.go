package cluster

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/tests/bed"
)

// street is three machines on a bridge: t runs the targets, n1 and n2 serve a floating
// address. The client is at the bridge.
type street struct {
	t    *testing.T
	dir  string
	bin  string
	mode string // manager.mode
	more string // lines of [manager]
	// confirm is manager.confirm: longer than its default, since nodes stand still on a busy
	// machine, unless figures are taken.
	confirm string
	etcd    bool // the registry is in an etcd that all three run, not at an MGS
	// home is where targets start, run where they may run.
	home map[string][]string
	run  []string
	mgs  []string
	// far: the machines do not see each other's locks of files.
	far   bool
	hub   *bed.Node
	nodes map[string]*bed.Node
	procs map[string]*bed.Proc
	// at is the floating address, host are the machines' own, gate is the client's.
	at   netip.Prefix
	host map[string]netip.Prefix
	gate netip.Prefix
}

var (
	frontends = []string{"n1", "n2"}
	// streets are the networks with IPv4 and with IPv6.
	streets = map[bool]string{false: "10.77.0.%d/24", true: "fd77::%d/64"}
)

// six is the street with IPv6 addresses alone.
func six(s *street) { s.number(true) }

// number gives out addresses.
func (s *street) number(six bool) {
	addr := func(i int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf(streets[six], i)) }
	s.at, s.gate = addr(100), addr(1)
	s.host = map[string]netip.Prefix{"t": addr(10), "n1": addr(11), "n2": addr(12)}
}

// vip is the floating address, nfs where it is connected to.
func (s *street) vip() netip.Addr { return s.at.Addr() }
func (s *street) nfs() string     { return netip.AddrPortFrom(s.vip(), bed.NFSPort).String() }

func newStreet(t *testing.T, mode string, set ...func(*street)) *street {
	t.Helper()
	bin, err := bed.Build("./cmd/baton")
	if err != nil {
		t.Fatal(err)
	}
	s := &street{t: t, dir: bed.Dir(t), bin: bin, mode: mode, confirm: "1s", nodes: map[string]*bed.Node{}, procs: map[string]*bed.Proc{}}
	s.home, s.run, s.mgs = map[string][]string{"t": {"MGS", "MDT0000", "OST0000"}}, []string{"t"}, []string{"t"}
	s.number(false)
	for _, f := range set {
		f(s)
	}
	node := func(name string) *bed.Node {
		n, err := bed.NewNode(name)
		if errors.Is(err, bed.ErrUnavailable) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close() })
		return n
	}
	s.hub = node("hub")
	s.ok(s.hub.AddBridge("br0", s.gate))
	for name, addr := range s.host {
		n := node(name)
		s.nodes[name] = n
		s.ok(n.Plug(s.hub, "br0", "p"+name, "eth0", addr))
		// As docs/operations.md wants them.
		for _, key := range []string{"arp_announce=2", "promote_secondaries=1"} {
			if out, err := n.Run(ctx, "sysctl", "-qw", "net.ipv4.conf.all."+key); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	s.ok(os.WriteFile(s.path("exports"), []byte("/disk *(rw,insecure,no_root_squash,dir=/)\n"), 0o600))
	t.Cleanup(func() {
		for name, p := range s.procs {
			p.Kill()
			if t.Failed() {
				b, _ := os.ReadFile(s.path(name, "log"))
				t.Logf("end of the log of %s:\n%s", name, b[max(0, len(b)-6000):])
			}
		}
	})
	return s
}

func (s *street) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *street) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// start starts a node's baton.
func (s *street) start(name string) {
	s.t.Helper()
	s.ok(os.MkdirAll(s.path(name), 0o700))
	list := func(l []string) string {
		b, err := json.Marshal(append([]string{}, l...))
		s.ok(err)
		return string(b)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "data_dir = %q\ncluster_key_file = %q\n[cluster]\nnode = %q\ntls = \"off\"\nstart = %s\nfile_locks = %v\n", s.path(name), s.path("cluster.key"), name, list(s.home[name]), !s.far)
	for n, addr := range s.host {
		fmt.Fprintf(&b, "[[cluster.nodes]]\nname = %q\naddress = %q\n", n, addr.Addr())
	}
	fmt.Fprintf(&b, `[nfs]
addresses = []
floating = %v
[exports]
file = %q
[rpcbind]
mode = "own"
[http]
address = ""
[fs]
min_free = "1 MiB"
[manager]
mode = %q
confirm = %q
%s
[failover]
drain_timeout = "10s"
commit_timeout = "10s"
[recovery]
window_min = "2s"
window_max = "5s"
[control]
socket = %q
[mdt]
dir = %q
nodes = %s
[[ost]]
dir = %q
nodes = %s
`, name != "t", s.path("exports"), s.mode, s.confirm, s.more, s.path(name, "s"), s.path("mdt"), list(s.run), s.path("ost0"), list(s.run))
	if s.etcd {
		b.WriteString("[registry]\nkind = \"etcd-embedded\"\nmembers = [\"n1\", \"n2\", \"t\"]\n")
	} else {
		fmt.Fprintf(&b, "[mgs]\ndir = %q\nnodes = %s\n", s.path("mgs"), list(s.mgs))
	}
	s.ok(os.WriteFile(s.path(name, "baton.toml"), []byte(b.String()), 0o600))
	log, err := os.OpenFile(s.path(name, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	s.ok(err)
	defer log.Close()
	cmd := bed.Command(s.bin, "serve", "--config", s.path(name, "baton.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	s.procs[name], err = s.nodes[name].Spawn(cmd)
	s.ok(err)
}

func (s *street) order(name string, args ...string) (string, error) {
	x, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(x, s.bin, append(args, "--socket", s.path(name, "s"))...).CombinedOutput()
	return string(out), err
}

func (s *street) until(what string, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// cable cuts a machine off the bridge, or plugs it in again.
func (s *street) cable(name string, up bool) {
	s.t.Helper()
	state := map[bool]string{true: "up", false: "down"}[up]
	if out, err := s.hub.Run(ctx, "ip", "link", "set", "p"+name, state); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
}

// local is how the address is at a node.
func (s *street) local(name string) string {
	out, err := s.order(name, "vip", "list", "--json")
	var l []status.VIP
	if err != nil || json.Unmarshal([]byte(out), &l) != nil {
		return ""
	}
	for _, v := range l {
		if v.Addr == s.vip().String() && v.Floating != nil && v.Floating.Local != nil {
			return v.Floating.Local.State
		}
	}
	return ""
}

// has tells whether a machine has the address.
func (s *street) has(name string) bool {
	s.t.Helper()
	out, err := s.nodes[name].Run(ctx, "ip", "-o", "addr", "show")
	s.ok(err)
	return strings.Contains(string(out), " "+s.vip().String()+"/")
}

// sockets are those of the address on a machine, listeners and datagrams too.
func (s *street) sockets(name string) string {
	s.t.Helper()
	of := s.vip().String()
	if s.vip().Is6() {
		of = "[" + of + "]"
	}
	out, err := s.nodes[name].Run(ctx, "ss", "-Htuan", "src", of)
	s.ok(err)
	return string(out)
}

// alone waits until the owner has the address and nobody else anything of it.
func (s *street) alone(owner string) {
	s.t.Helper()
	s.until(owner+" to serve", func() bool { return s.local(owner) == "serving" })
	for _, n := range frontends {
		if n == owner {
			if !s.has(n) {
				s.t.Errorf("%s serves and does not have the address", n)
			}
			continue
		}
		s.until(n+" to have nothing of the address", func() bool { return !s.has(n) && s.sockets(n) == "" })
	}
}

// caller is a client that repeats a call with its XID until it is answered.
type caller struct {
	s       *street
	from    netip.AddrPort // where it connects from, unless that is any address
	conn    net.Conn
	xid     uint32
	mu      sync.Mutex
	longest time.Duration
	story   string // of the longest call
	calls   atomic.Int64
}

// long is a wait whose cause is worth a look.
const long = 3 * time.Second

// dial connects to NFS at the address, from an address of the hub's or from any. An idle
// connection sends nothing, so that its end is not found out by itself.
func (s *street) dial(from netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 2 * time.Second, KeepAlive: -1}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	err = s.hub.Do(func() (err error) {
		c, err = d.Dial("tcp", s.nfs())
		return err
	})
	return c, err
}

func (k *caller) once(rec []byte, xid uint32) ([]byte, error) {
	if k.conn == nil {
		c, err := k.s.dial(k.from)
		if err != nil {
			return nil, err
		}
		k.conn = c
	}
	k.conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := k.conn.Write(rec); err != nil {
		return nil, err
	}
	return rpctest.Reply(k.conn, xid)
}

func (k *caller) call(prog, vers, proc uint32, args func(*xdr.Writer), res interface{ Decode(*xdr.Reader) error }) {
	k.xid++
	rec := rpctest.Call(k.xid, prog, vers, proc, args)
	began := time.Now()
	var story strings.Builder
	for {
		had := k.conn != nil
		out, err := k.once(rec, k.xid)
		fmt.Fprintf(&story, "%v after %.3f s, on a connection that was there: %v: %v\n", time.Now().UTC().Format("15:04:05.000"), time.Since(began).Seconds(), had, err)
		if err == nil {
			if err := res.Decode(xdr.NewReader(bytes.Clone(out))); err != nil {
				k.s.t.Error(err)
			}
			break
		}
		if k.conn != nil {
			k.conn.Close()
			k.conn = nil
		}
		if time.Since(began) > patience {
			k.s.t.Errorf("no answer: %v", err)
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
	k.calls.Add(1)
	k.mu.Lock()
	if took := time.Since(began); took > k.longest {
		k.longest, k.story = took, tail(story.String(), 4000)
	}
	k.mu.Unlock()
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// pause is the longest time of a call since the last question.
func (k *caller) pause() time.Duration {
	k.mu.Lock()
	d, story := k.longest, k.story
	k.longest = 0
	k.mu.Unlock()
	if d > long {
		k.s.t.Logf("a call that took %v:\n%s", d, story)
		k.s.explain()
	}
	return d
}

// explain logs what the nodes say of the last moves.
func (s *street) explain() {
	x, cancel := context.WithTimeout(ctx, 5*time.Second) // one may be frozen
	defer cancel()
	out, err := exec.CommandContext(x, s.bin, "events", "--socket", s.path("t", "s")).CombinedOutput()
	s.t.Logf("events: %v\n%s", err, tail(string(out), 8000))
	for name := range s.procs {
		b, err := os.ReadFile(s.path(name, "log"))
		s.t.Logf("end of the log of %s: %v\n%s", name, err, tail(string(b), 5000))
	}
}

func (k *caller) mount() []byte {
	var res mount3.MntRes
	k.call(mount3.Program, mount3.Version, uint32(nfs.MountProcMount), func(w *xdr.Writer) { mount3.EncodePath(w, "/disk") }, &res)
	if res.Status != nfs.MountStatusOk {
		k.s.t.Fatal("mount:", res.Status)
	}
	return bytes.Clone(res.FH)
}

// storm makes, renames and removes files until stop; each call has to be executed
// exactly once.
func (k *caller) storm(dir []byte, stop <-chan struct{}) {
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		name, other := fmt.Appendf(nil, "s%d", i), fmt.Appendf(nil, "t%d", i)
		how, verf := wire.Guarded, [nfs3.CreateVerfSize]byte{}
		if i%2 == 1 {
			how = wire.Exclusive
			binary.BigEndian.PutUint64(verf[:], uint64(i))
		}
		var cr nfs3.CreateRes
		k.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCreate), (&nfs3.CreateArgs{FH: dir, Name: name, How: how, Verf: verf}).Encode, &cr)
		var mv nfs3.RenameRes
		k.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRename), (&nfs3.RenameArgs{FromFH: dir, FromName: name, ToFH: dir, ToName: other}).Encode, &mv)
		rm := k.remove(dir, other)
		if cr.Status != nfs.NFSStatusOk || mv.Status != nfs.NFSStatusOk || rm != nfs.NFSStatusOk {
			k.s.t.Errorf("%s: create %v (%v), rename %v, remove %v", name, cr.Status, how, mv.Status, rm)
			return
		}
	}
}

func (k *caller) remove(dir, name []byte) nfs.NFSStatus {
	var rm nfs3.WccRes
	k.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRemove), (&nfs3.DirOpArgs{FH: dir, Name: name}).Encode, &rm)
	return rm.Status
}

// all starts all nodes and waits for the frontends.
func (s *street) all() {
	s.t.Helper()
	for _, n := range []string{"t", "n1", "n2"} {
		if s.procs[n] == nil {
			s.start(n)
		}
	}
	for _, n := range []string{"n1", "n2", "t"} {
		s.until(n+" to be ready", func() bool {
			out, err := s.order(n, "vip", "list", "--json")
			return err == nil && strings.HasPrefix(strings.TrimSpace(out), "[")
		})
	}
}

func (s *street) must(args ...string) {
	s.t.Helper()
	began := time.Now()
	if out, err := s.order("t", args...); err != nil {
		s.t.Fatalf("baton %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	s.t.Logf("baton %s: %v", strings.Join(args, " "), time.Since(began).Round(time.Millisecond))
}

// client begins a storm of calls. What it gives is called after something has happened
// to the address: it waits until the owner is alone with it and the client gets on.
func (s *street) client() (k *caller, gone func(what, owner string)) {
	k = &caller{s: s}
	dir := k.mount()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		k.storm(dir, stop)
	}()
	s.t.Cleanup(func() {
		close(stop)
		<-done
		if k.conn != nil {
			k.conn.Close()
		}
	})
	return k, func(what, owner string) {
		s.t.Helper()
		s.alone(owner)
		n := k.calls.Load()
		s.until("the client to get on", func() bool { return k.calls.Load() > n+10 })
		s.t.Logf("%s: longest call %v", what, k.pause().Round(time.Millisecond))
	}
}

// A floating address with real machines: moved in order, after a power cut, while its
// node is frozen, and while its cable is pulled. A client sees every call answered as
// if it were executed once; only the owner has anything of the address. 004.1, 004.8,
// 004.22, 004.24, 004.32.
func TestBroughtAddress(t *testing.T) {
	t.Run("ipv4", func(t *testing.T) { testBrought(t) })
	t.Run("ipv6", func(t *testing.T) { testBrought(t, six) })
}

func testBrought(t *testing.T, set ...func(*street)) {
	s := newStreet(t, "off", set...)
	s.all()
	must := s.must
	must("vip", "add", s.at.String())
	must("vip", "move", s.vip().String(), "--to", "n1")
	s.alone("n1")
	k, gone := s.client()
	gone("start", "n1")
	for _, to := range []string{"n2", "n1", "n2"} {
		must("vip", "move", s.vip().String(), "--to", to)
		gone("planned move", to)
	}
	force := func(to string) {
		t.Helper()
		must("vip", "move", s.vip().String(), "--to", to, "--force")
	}
	s.cable("n2", false)
	s.procs["n2"].Kill()
	force("n1")
	s.until("n1 to serve", func() bool { return s.local("n1") == "serving" })
	t.Logf("power cut: longest call so far %v", k.pause().Round(time.Millisecond))
	s.cable("n2", true)
	s.start("n2")
	gone("power cut, and back", "n1")

	s.ok(s.procs["n1"].Signal(syscall.SIGSTOP))
	force("n2")
	s.until("n2 to serve", func() bool { return s.local("n2") == "serving" })
	n := k.calls.Load()
	s.until("the client to get on", func() bool { return k.calls.Load() > n+10 })
	s.ok(s.procs["n1"].Signal(syscall.SIGCONT))
	gone("freeze and thaw", "n2")

	s.cable("n2", false)
	force("n1")
	s.until("n1 to serve", func() bool { return s.local("n1") == "serving" })
	n = k.calls.Load()
	s.until("the client to get on", func() bool { return k.calls.Load() > n+10 })
	s.cable("n2", true)
	gone("cable", "n1")
	must("vip", "move", s.vip().String(), "--to", "n2")
	gone("planned move afterwards", "n2")
}

// The manager gives an address to its preferred node, to the other one when that loses
// its power, and back when the other one stops in order: without any command.
func TestManagedAddress(t *testing.T) {
	t.Run("ipv4", func(t *testing.T) { testManaged(t) })
	t.Run("ipv6", func(t *testing.T) { testManaged(t, six) })
}

func testManaged(t *testing.T, set ...func(*street)) {
	s := newStreet(t, "builtin", set...)
	s.all()
	s.must("vip", "add", s.at.String(), "--prefer", "n1,n2")
	s.alone("n1")
	_, gone := s.client()
	gone("start", "n1")
	s.cable("n1", false)
	s.procs["n1"].Kill()
	s.until("n2 to serve", func() bool { return s.local("n2") == "serving" })
	s.cable("n1", true)
	s.start("n1")
	gone("power cut", "n2")
	if err := s.procs["n2"].Stop(patience); err != nil {
		t.Error(err)
	}
	gone("n2 stopped", "n1")
}
