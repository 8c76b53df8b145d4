package hooks

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

// patience is what nothing may take: only a hang exceeds it.
const patience = 3 * time.Minute

// record is a line of the stub's log; see there.
type record struct {
	Begin, End   time.Time
	Node, Op     string
	Addr         string
	Given, Force bool
	Had, Has     bool
	State, Err   string
}

func (r record) String() string {
	s := fmt.Sprintf("%s %s %s", r.Node, r.Op, r.Addr)
	for _, f := range []struct {
		is   bool
		text string
	}{{r.Given, "given"}, {r.Force, "force"}, {r.Had, "had"}, {r.Has, "has"}} {
		if f.is {
			s += " " + f.text
		}
	}
	if r.State != "" {
		s += " -> " + r.State
	}
	if r.Err != "" {
		s += " (" + r.Err + ")"
	}
	return s
}

// site is some machines on a bridge. They run baton (newReal), or stubs that share a
// registry.
type site struct {
	t     *testing.T
	ctx   context.Context
	tree  string
	dir   string // shared with the machines as /srv/site, and under its own name
	hub   *bed.Node
	addrs []netip.Addr
	seen  int // records that step has consumed

	// Of baton itself.
	cluster *bed.Cluster
	store   *bed.Member
	members map[string]*bed.Member
	workers []*worker
	verf    map[netip.Addr][8]byte // write verifiers that clients know

	mu     sync.Mutex // guards what is below
	m      map[string]*machine
	dead   map[string]bool
	soiled map[soil]bool
}

// soil is an address on a machine where baton was killed: the dead process's sockets stay
// until the address is taken there again.
type soil struct {
	machine string
	addr    netip.Addr
}

// living are the machines that have power.
func (s *site) living() map[string]*machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := map[string]*machine{}
	for name, m := range s.m {
		if !s.dead[name] {
			l[name] = m
		}
	}
	return l
}

func machineAddr(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprint("192.0.2.", i)) }

type machine struct {
	*bed.Machine
	s     *site
	addr  netip.Addr
	lives int
	port  string
	stub  *bed.Proc
	procs map[string]*bed.Proc
}

// newSite makes the network; it skips the test where that cannot be.
func newSite(t *testing.T, addrs ...string) *site {
	t.Helper()
	if testing.Short() || os.Getenv("BATON_KERNEL") == "" {
		t.Skip("SKIPPED, reason: set BATON_KERNEL=1 for suites that make a Debian tree and namespaces")
	}
	tree, err := bed.DebTree()
	bed.Need(t, err)
	hub, err := bed.NewNode("hub")
	bed.Need(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	s := &site{t: t, ctx: ctx, tree: tree, dir: bed.Dir(t), hub: hub, m: map[string]*machine{}, dead: map[string]bool{}, soiled: map[soil]bool{}, verf: map[netip.Addr][8]byte{}}
	t.Cleanup(func() {
		defer cancel()
		if t.Failed() {
			for _, r := range s.records() {
				t.Logf("%s %s", r.Begin.Format("05.000"), r)
			}
		}
		for _, m := range s.m {
			m.Close()
		}
		hub.Close()
	})
	for _, a := range addrs {
		s.addrs = append(s.addrs, netip.MustParseAddr(a))
	}
	if err := hub.AddBridge("br0", netip.MustParsePrefix("192.0.2.254/24")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.path("registry"), 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// boot makes machine n1, n2, ... with 192.0.2.1, ... and starts baton, or its stub.
func (s *site) boot(i int) *machine {
	s.t.Helper()
	name := fmt.Sprint("n", i)
	lives := 0
	if old := s.m[name]; old != nil {
		lives = old.lives + 1
	}
	root := s.path(fmt.Sprintf("%s.%d", name, lives))
	bm, err := bed.NewMachine(name, s.tree, root)
	bed.Need(s.t, err)
	m := &machine{Machine: bm, s: s, addr: machineAddr(i), lives: lives, port: fmt.Sprintf("p%d-%d", i, lives), procs: map[string]*bed.Proc{}}
	s.mu.Lock()
	s.m[name] = m
	delete(s.dead, name)
	for _, a := range s.addrs {
		delete(s.soiled, soil{name, a})
	}
	s.mu.Unlock()
	if err := m.Plug(s.hub, "br0", m.port, "eth0", netip.PrefixFrom(m.addr, 24)); err != nil {
		s.t.Fatal(err)
	}
	packaging, err := filepath.Abs("../../packaging")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range []struct{ pkg, out, in string }{{"./cmd/baton", "", "/usr/bin/baton"}, {"./tests/hooks/stub", "", "/usr/bin/stub"}, {"", s.dir, "/srv/site"}, {"", s.dir, s.dir}, {"", packaging, "/usr/share/baton"}} {
		if f.pkg != "" {
			if f.out, err = bed.Build(f.pkg); err != nil {
				s.t.Fatal(err)
			}
		}
		if err := m.Share(s.ctx, f.out, f.in); err != nil {
			s.t.Fatal(err)
		}
	}
	m.serve()
	return m
}

// spawn starts a program of the machine; its output goes to a file.
func (m *machine) spawn(name, path string, args ...string) *bed.Proc {
	m.s.t.Helper()
	log, err := os.OpenFile(m.s.path(m.Name()+"."+name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		m.s.t.Fatal(err)
	}
	defer log.Close()
	cmd := m.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := m.Spawn(cmd)
	if err != nil {
		m.s.t.Fatal(err)
	}
	m.procs[name] = p
	return p
}

// socket is where baton's commands expect the socket if nothing is configured.
const socket = "/var/lib/baton/control.sock"

// serve starts baton, or the stub.
func (m *machine) serve() {
	m.s.t.Helper()
	if m.s.cluster != nil {
		m.sh("mkdir -p /etc/baton && ln -sf " + m.s.cluster.ConfigFile(m.s.members[m.Name()]) + " /etc/baton/baton.toml")
		m.batonOn()
		return
	}
	m.sh("mkdir -p " + filepath.Dir(socket))
	var list []string
	for _, a := range m.s.addrs {
		list = append(list, a.String())
	}
	m.stub = m.spawn("stub", "/usr/bin/stub", "-node", m.Name(), "-registry", "/srv/site/registry", "-log", "/srv/site/records", "-socket", socket, "-addresses", strings.Join(list, ","))
	m.s.wait("a stub on "+m.Name(), func() bool {
		_, err := m.Sh(m.s.ctx, "baton hook health")
		return err == nil
	})
}

// sh runs a command that must succeed.
func (m *machine) sh(script string) string {
	m.s.t.Helper()
	out, err := m.Sh(m.s.ctx, script)
	if err != nil {
		m.s.t.Fatalf("%s: %v", m.Name(), err)
	}
	return out
}

func (m *machine) write(path, text string) {
	m.s.t.Helper()
	if err := m.Write(m.s.ctx, path, text, 0o644); err != nil {
		m.s.t.Fatal(err)
	}
}

// killBaton kills baton, or the stub.
func (m *machine) killBaton() {
	if m.stub != nil {
		m.stub.Kill()
		return
	}
	m.s.mu.Lock()
	for _, a := range m.s.addrs {
		m.s.soiled[soil{m.Name(), a}] = true
	}
	m.s.mu.Unlock()
	m.s.members[m.Name()].Kill()
}

// stopBaton ends baton in order.
func (m *machine) stopBaton() {
	m.s.t.Helper()
	x := m.s.members[m.Name()]
	if err := x.Signal(syscall.SIGTERM); err != nil {
		m.s.t.Fatal(err)
	}
	m.s.wait("end of baton on "+m.Name(), x.Ended)
	x.Kill() // so that it can be started again
}

// kill ends a machine as a power cut does: the cable first.
func (m *machine) kill() {
	m.s.t.Helper()
	m.s.mu.Lock()
	m.s.dead[m.Name()] = true
	m.s.mu.Unlock()
	if err := m.s.hub.SetLink(m.port, false); err != nil {
		m.s.t.Fatal(err)
	}
	m.Close()
	_ = m.s.hub.DelLink(m.port) // one that is gone is no error
	if x := m.s.members[m.Name()]; x != nil {
		x.Kill()
	}
}

// wait waits until ok, and fails the test after a while.
func (s *site) wait(what string, ok func() bool) {
	s.t.Helper()
	end := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(end) {
			s.logs()
			s.t.Fatalf("no %s after %v", what, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// logs shows the ends of what programs have said.
func (s *site) logs() {
	files, _ := filepath.Glob(s.path("*.log"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil {
			s.t.Logf("%s:\n%s", filepath.Base(f), b[max(0, len(b)-3000):])
		}
	}
}

func (s *site) records() (rs []record) {
	b, err := os.ReadFile(s.path("records"))
	if err != nil {
		return nil
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		var r record
		if err := json.Unmarshal(sc.Bytes(), &r); err != nil {
			s.t.Errorf("record %q: %v", sc.Text(), err)
			continue
		}
		rs = append(rs, r)
	}
	return rs
}

// step waits until the address is served by the node alone, and returns the records
// since the last step, of all addresses.
func (s *site) step(what string, addr string, node string) []record {
	s.t.Helper()
	begin := time.Now()
	a := netip.MustParseAddr(addr)
	s.wait(fmt.Sprintf("%s: %s on %s", what, addr, node), func() bool { return s.answers(a) == node && s.holders(a) == node })
	rs := s.records()
	new := rs[s.seen:]
	s.seen = len(rs)
	s.t.Logf("%s: %s on %s after %v", what, addr, node, time.Since(begin).Round(time.Millisecond))
	return new
}

// answers asks who serves an address; "" is nobody.
func (s *site) answers(a netip.Addr) string {
	s.hub.Run(s.ctx, "ip", "neigh", "flush", "dev", "br0") // the stub does not announce
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	c, err := s.hub.DialContext(ctx, "tcp", netip.AddrPortFrom(a, 2049).String())
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return ""
	}
	return strings.TrimSpace(line)
}

// holders are the living machines that have the address.
func (s *site) holders(a netip.Addr) string {
	var names []string
	for name, m := range s.living() {
		if has, err := m.Has(a); err == nil && has {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// of picks the records of a node ("": all) and address that changed something: those
// whose Op begins with one of ops.
func of(rs []record, node, addr string, ops ...string) (picked []record) {
	for _, r := range rs {
		if (node == "" || r.Node == node) && r.Addr == addr {
			for _, op := range ops {
				if strings.HasPrefix(r.Op, op) {
					picked = append(picked, r)
					break
				}
			}
		}
	}
	return picked
}

// sequence checks that records with these texts (as String writes them, without the
// address and from the beginning) came one after the other, each after the one before had
// ended. Others may be between them: calls may be made again.
func (s *site) sequence(what string, rs []record, want ...string) {
	s.t.Helper()
	i := 0
	var last time.Time
	for _, r := range rs {
		if i < len(want) && strings.HasPrefix(strings.Replace(r.String(), " "+r.Addr, "", 1), want[i]) && !r.Begin.Before(last) {
			i++
			last = r.End
		}
	}
	if i < len(want) {
		s.t.Errorf("%s: no %q after the %d before it", what, want[i], i)
		for _, r := range rs {
			s.t.Logf("    %s", r)
		}
	}
}
