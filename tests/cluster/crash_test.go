package cluster

import (
	"context"
	"encoding/json"
	"flag"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/node"
	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

var rounds = flag.Int("rounds", 2, "crashes and planned moves that TestPauses measures")

// inEtcd has the registry in an etcd that all three machines run.
func inEtcd(s *street) {
	s.etcd = true
	s.home["t"] = []string{"MDT0000", "OST0000"}
}

// manages is the node that decides who serves an address, "" while there is none.
func (s *street) manages(by string) string {
	x, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var r node.RegistryStatus
	out, err := s.nodes[by].Run(x, s.bin, "registry", "status", "--json", "--config", s.path(by, "baton.toml"))
	if err != nil || json.Unmarshal(out, &r) != nil {
		return ""
	}
	return r.Leader
}

// watch looks at the machines all the time: the address is on one at most, and while one
// has it no other has a socket of it with a peer. Machines that cannot know are excused.
type watch struct {
	s    *street
	quit chan struct{}
	done chan struct{}

	mu      sync.Mutex
	excused map[string]bool
	seen    int // looks at the address on one machine, and at the sockets of the others
}

func (s *street) watch() *watch {
	w := &watch{s: s, quit: make(chan struct{}), done: make(chan struct{}), excused: map[string]bool{}}
	go func() {
		defer close(w.done)
		for {
			w.look()
			select {
			case <-w.quit:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	s.t.Cleanup(func() {
		close(w.quit)
		<-w.done
		if w.seen == 0 {
			s.t.Error("nobody has seen the address anywhere")
		}
	})
	return w
}

func (w *watch) excuse(name string, yes bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.excused[name] = yes
}

// look counts only what is so twice, since machines are looked at one after the other.
func (w *watch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := func() (l []string) {
		for _, n := range frontends {
			if has, err := w.s.nodes[n].Has(w.s.vip()); err == nil && has && !w.excused[n] {
				l = append(l, n)
			}
		}
		return l
	}
	first := at()
	if len(first) == 0 {
		return
	}
	var stale []string
	for _, n := range frontends {
		if n == first[0] || w.excused[n] {
			continue
		}
		ss, err := w.s.nodes[n].Sockets(w.s.vip())
		if err != nil {
			return
		}
		for _, x := range ss {
			if !x.Listening() {
				stale = append(stale, n+": "+x.String())
			}
		}
	}
	if !slices.Equal(first, at()) {
		return
	}
	w.seen++
	if len(first) > 1 || len(stale) > 0 {
		w.s.t.Errorf("the address is at %v; sockets elsewhere: %q", first, stale)
	}
}

// knows waits until a node has heard of the address.
func (s *street) knows(name string) {
	s.t.Helper()
	s.until(name+" to know the address", func() bool { return s.local(name) != "" })
}

// crash cuts a machine off and kills its process: its kernel says no goodbye.
func (s *street) crash(w *watch, name string) {
	s.t.Helper()
	w.excuse(name, true)
	s.cable(name, false)
	s.procs[name].Kill()
}

// back starts a crashed machine again.
func (s *street) back(w *watch, name string) {
	s.t.Helper()
	s.start(name)
	s.until(name+" to have nothing of the address", func() bool { return !s.has(name) && s.sockets(name) == "" })
	s.cable(name, true)
	w.excuse(name, false)
	s.knows(name)
}

// without tells whether a machine does not have the address, nor a connection of it. It is
// asked often enough for a time that ends with a failback.
func (s *street) without(name string) func() bool {
	return func() bool {
		if has, err := s.nodes[name].Has(s.vip()); err != nil || has {
			return false
		}
		for line := range strings.Lines(s.sockets(name)) {
			if !strings.Contains(line, "LISTEN") && !strings.Contains(line, "UNCONN") {
				return false
			}
		}
		return true
	}
}

func (s *street) serves(name string) {
	s.t.Helper()
	s.until(name+" to serve", func() bool { return s.local(name) == "serving" })
}

// ghost is a client inside a machine that is frozen. Its call waits there in a socket,
// and must be neither executed nor answered when the machine goes on.
type ghost struct {
	s    *street
	conn net.Conn
	name []byte
}

// haunt sends the REMOVE of a file from inside a machine that has the address, though it
// may not be its any more.
func (s *street) haunt(at string, dir, name []byte) *ghost {
	s.t.Helper()
	// From the machine's own address: the other one may leave the machine.
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: s.host[at].Addr().AsSlice()}}
	var c net.Conn
	s.ok(s.nodes[at].Do(func() (err error) {
		c, err = d.Dial("tcp", s.nfs())
		return err
	}))
	_, err := c.Write(rpctest.Call(0x6057, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRemove), (&nfs3.DirOpArgs{FH: dir, Name: name}).Encode))
	s.ok(err)
	return &ghost{s, c, name}
}

// exorcised is called when the machine has nothing of the address any more: no answer
// may have come, which would be here by now.
func (g *ghost) exorcised() {
	g.s.t.Helper()
	defer g.conn.Close()
	g.s.ok(g.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)))
	b := make([]byte, 256)
	if n, err := g.conn.Read(b); n > 0 {
		g.s.t.Errorf("the machine that had lost the address said %x (%v)", b[:n], err)
	}
}

func (k *caller) create(dir, name []byte) {
	var cr nfs3.CreateRes
	k.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCreate), (&nfs3.CreateArgs{FH: dir, Name: name, How: wire.Guarded}).Encode, &cr)
	if cr.Status != nfs.NFSStatusOk {
		k.s.t.Fatalf("create %s: %v", name, cr.Status)
	}
}

// goesOn waits until the client is answered again, and returns how long it waited at
// most for one answer.
func (s *street) goesOn(k *caller) time.Duration {
	s.t.Helper()
	n := k.calls.Load()
	s.until("the client to get on", func() bool { return k.calls.Load() > n+10 })
	return k.pause().Round(time.Millisecond)
}

// The registry is in an etcd of the three machines, and the one of them that is elected
// decides who serves the address: nobody gives an order. Its node loses its power, is
// frozen, cut off, stopped, drained; it is preferred, so that the address returns every
// time. 004.1, 004.8, 004.22, 004.24, 004.32.
func TestElectedManager(t *testing.T) {
	s := newStreet(t, "builtin", inEtcd, func(s *street) {
		s.more = "failback_delay = \"3s\"\nhold_off = \"1s\"\nhold_off_max = \"1s\""
	})
	s.all()
	s.must("vip", "add", s.at.String(), "--prefer", "n1,n2")
	s.alone("n1")
	w := s.watch()
	k, gone := s.client()
	other := &caller{s: s, xid: 1 << 20}
	dir := other.mount()
	other.conn.Close()
	other.conn = nil
	gone("start", "n1")
	taken := func(what string) {
		t.Helper()
		s.serves("n2")
		t.Logf("%s: longest call %v; %s manages", what, s.goesOn(k), s.manages("t"))
	}

	s.crash(w, "n1")
	taken("power cut")
	s.back(w, "n1")
	gone("failback", "n1")

	file := []byte("ghost")
	other.create(dir, file)
	other.conn.Close()
	other.conn = nil
	w.excuse("n1", true)
	s.ok(s.procs["n1"].Signal(syscall.SIGSTOP))
	g := s.haunt("n1", dir, file)
	taken("frozen")
	s.ok(s.procs["n1"].Signal(syscall.SIGCONT))
	s.until("n1 to have nothing of the address", s.without("n1"))
	g.exorcised()
	w.excuse("n1", false)
	gone("thaw and failback", "n1")
	if st := other.remove(dir, file); st != nfs.NFSStatusOk {
		t.Errorf("the file that a machine was to remove which did not have the address any more: %v", st)
	}

	w.excuse("n1", true)
	s.cable("n1", false)
	taken("cable pulled")
	g = s.haunt("n1", dir, file)
	s.cable("n1", true)
	s.until("n1 to have nothing of the address", s.without("n1"))
	g.exorcised()
	w.excuse("n1", false)
	gone("cable plugged in, failback", "n1")

	if err := s.procs["n1"].Stop(patience); err != nil {
		t.Error(err)
	}
	taken("orderly stop")
	if s.has("n1") || s.sockets("n1") != "" {
		t.Errorf("n1 has stopped, and has (%v) the address: %s", s.has("n1"), s.sockets("n1"))
	}
	s.start("n1")
	gone("restart and failback", "n1")

	s.must("node", "drain", "n1")
	taken("drain")
	s.alone("n2")
	s.must("node", "undrain", "n1")
	gone("undrain and failback", "n1")
}

// How long a client waits when the node of its address loses its power, and when the
// address is moved in order. In every other crash the node is the one that decides.
func TestPauses(t *testing.T) {
	s := newStreet(t, "builtin", inEtcd, func(s *street) {
		if *rounds > 2 {
			s.confirm = "300ms" // as by default
		}
	})
	s.all()
	s.must("vip", "add", s.at.String())
	var owner string
	s.until("somebody to serve", func() bool {
		for _, n := range frontends {
			if s.local(n) == "serving" {
				owner = n
				return true
			}
		}
		return false
	})
	w := s.watch()
	k, gone := s.client()
	gone("start", owner)
	rest := func(n string) string { return map[string]string{"n1": "n2", "n2": "n1"}[n] }
	crashes, planned := map[bool][]time.Duration{}, []time.Duration(nil)
	move := func(to string) {
		t.Helper()
		k.pause()
		s.must("vip", "move", s.vip().String(), "--to", to)
		planned = append(planned, s.goesOn(k))
		s.alone(to)
		owner = to
	}
	for i := range *rounds {
		leader := ""
		decides := func(ok func() bool) {
			s.until("somebody to decide", func() bool { leader = s.manages(rest(owner)); return leader != "" && ok() })
		}
		decides(func() bool { return true })
		if leader == "t" && i%2 == 0 { // which may not die here: it gives that up
			s.ok(s.procs["t"].Stop(patience))
			s.start("t")
			decides(func() bool { return leader != "t" })
			s.goesOn(k)
		}
		if leader == rest(owner) && i%2 == 0 || leader == owner && i%2 == 1 {
			move(rest(owner))
		}
		k.pause()
		at := time.Now()
		s.crash(w, owner)
		s.serves(rest(owner))
		d := s.goesOn(k)
		t.Logf("%s crash %d of %s, %s decides: %v", at.UTC().Format("15:04:05.000"), i, owner, leader, d)
		crashes[leader == owner] = append(crashes[leader == owner], d)
		s.back(w, owner)
		s.until(owner+" to be fit", func() bool {
			for _, n := range []string{"t", rest(owner)} { // either may decide
				if out, err := s.order(n, "node", "list"); err != nil || strings.Contains(out, "suspect") {
					return false
				}
			}
			return true
		})
		s.alone(rest(owner))
		move(owner)
	}
	sum := func(what string, l []time.Duration) {
		if len(l) == 0 {
			return
		}
		slices.Sort(l)
		t.Logf("%s: %d, median %v, worst %v: %v", what, len(l), l[len(l)/2], l[len(l)-1], l)
		if worst := l[len(l)-1]; worst > patience/2 {
			t.Errorf("%s: a call took %v", what, worst)
		}
	}
	sum("crash of a node that does not decide", crashes[false])
	sum("crash of the node that decides", crashes[true])
	sum("planned", planned)
}

// The node of the MDT and the OST dies, too, together with nothing of the address: its
// clients wait until the targets run elsewhere, which is by order, and go on.
func TestAddressOutlivesTargets(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	s := newStreet(t, "builtin", inEtcd, func(s *street) { s.run = []string{"t", "n1", "n2"} })
	s.all()
	s.must("vip", "add", s.at.String(), "--prefer", "n1")
	s.alone("n1")
	s.watch()
	k, gone := s.client()
	gone("start", "n1")
	s.cable("t", false)
	s.procs["t"].Kill()
	for _, target := range []string{"MDT0000", "OST0000"} {
		s.until(target+" to start", func() bool {
			_, err := s.order("n2", "target", "start", target)
			return err == nil
		})
	}
	d := s.goesOn(k)
	t.Logf("targets moved by order: longest call %v", d)
	s.alone("n1")
	s.cable("t", true)
	s.start("t")
	gone("start of t without its targets", "n1")
}

// The node of the address and of the registry dies. Another node that is to have the
// MGS takes it over without an order, and then the address is given to another node.
func TestRegistryDiesWithOwner(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, reason: -short")
	}
	s := newStreet(t, "builtin", func(s *street) {
		s.far, s.mgs = true, []string{"n1", "t"}
		s.home["n1"], s.home["t"] = []string{"MGS"}, []string{"MDT0000", "OST0000", "MGS"}
	})
	s.start("n1")
	s.until("the registry at n1", func() bool {
		out, err := s.order("n1", "target", "list")
		return err == nil && strings.Contains(out, "up")
	})
	s.all()
	s.must("vip", "add", s.at.String(), "--prefer", "n1,n2")
	s.alone("n1")
	w := s.watch()
	k, gone := s.client()
	gone("start", "n1")
	s.crash(w, "n1")
	s.serves("n2")
	t.Logf("the registry's node died with the address: longest call %v", s.goesOn(k))
	s.back(w, "n1")
	gone("the node is back", "n2")
}
