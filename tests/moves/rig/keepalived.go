package rig

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
)

// peerNode is what runs on one machine of a service made of Ganesha and a program
// that moves addresses.
type peerNode struct {
	ganesha *bed.Ganesha
	proc    *bed.Proc // the program
	pid     int       // of Ganesha
}

// peers is Ganesha on all machines, with the same exported directory.
type peers struct {
	net  *Net
	dir  string
	vips []netip.Addr

	mu    sync.Mutex
	nodes map[string]*peerNode
}

func (p *peers) Nodes() (names []string) {
	for _, m := range p.net.Machines {
		names = append(names, m.Name)
	}
	return names
}

// startGanesha starts the server of a machine.
func (p *peers) startGanesha(ctx context.Context, m *Machine) (*peerNode, error) {
	dir := filepath.Join(p.dir, m.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	// A dead server's PID file keeps the next one from starting.
	os.Remove(filepath.Join(dir, "ganesha.pid"))
	g, err := bed.NewGanesha(bed.Config{Node: m.Node(), Dir: dir, Addr: m.Addr, Exports: []bed.Export{{Path: "/rw"}}})
	if err != nil {
		return nil, err
	}
	g.Root = filepath.Join(p.dir, "export")
	if err := g.Start(ctx); err != nil {
		return nil, err
	}
	return &peerNode{ganesha: g, pid: g.Pid()}, nil
}

// Owner is the node that has the address.
func (p *peers) Owner(a netip.Addr) string { return p.net.owner(a) }

// Kill cuts the power of the machine.
func (p *peers) Kill(_ context.Context, node string) error {
	err := p.net.Machine(node).Off()
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.nodes[node]; n != nil {
		err = errors.Join(err, n.ganesha.Kill9())
		if n.proc != nil {
			n.proc.Kill()
		}
		delete(p.nodes, node)
	}
	return err
}

func (p *peers) signal(node string, sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nodes[node]
	if n == nil {
		return fmt.Errorf("rig: %s does not run", node)
	}
	return errors.Join(syscall.Kill(-n.pid, sig), n.proc.Signal(sig))
}

// Freeze stops the processes of the node.
func (p *peers) Freeze(node string) error { return p.signal(node, syscall.SIGSTOP) }

// Thaw lets them go on.
func (p *peers) Thaw(node string) error { return p.signal(node, syscall.SIGCONT) }

// Cut pulls the machine's cable.
func (p *peers) Cut(node string) error { return p.net.Machine(node).Cut() }

// Mend plugs it in.
func (p *peers) Mend(node string) error { return p.net.Machine(node).Mend() }

// Stop ends everything.
func (p *peers) Stop(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, n := range p.nodes {
		if n.proc != nil {
			n.proc.Kill()
		}
		errs = append(errs, n.ganesha.Kill9(), n.ganesha.Stop())
	}
	clear(p.nodes)
	return errors.Join(errs...)
}

// until waits until the address is where ok says, and nowhere else, and NFS answers.
func (p *peers) until(ctx context.Context, a netip.Addr, ok func(node string) bool) error {
	for {
		var has []string
		for _, m := range p.net.Machines {
			if b := m.Node(); b != nil && !m.IsCut() {
				if h, err := b.Has(a); err == nil && h {
					has = append(has, m.Name)
				}
			}
		}
		if len(has) == 1 && ok(has[0]) {
			return p.net.Answers(ctx, a)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %v is on %v\n%s", ErrNotServed, a, has, p.Log())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Log returns the ends of the logs.
func (p *peers) Log() string {
	var b strings.Builder
	for _, m := range p.net.Machines {
		for _, name := range []string{"keepalived.log", "ctdb.log", "ganesha.log"} {
			if text, err := os.ReadFile(filepath.Join(p.dir, m.Name, name)); err == nil {
				fmt.Fprintf(&b, "--- %s %s\n%s\n", m.Name, name, text[max(0, len(text)-3000):])
			}
		}
	}
	return b.String()
}

// Keepalived is Ganesha on all machines behind addresses that keepalived elects a
// master for (VRRP). A planned move raises the priority of the node that is to have the
// address: it takes it from the one that has it, which is the shortest
// interruption that keepalived knows.
type Keepalived struct {
	peers
	// Advert is advert_int.
	Advert time.Duration
}

// NewKeepalived makes the service; the error wraps bed.ErrUnavailable if packages are missing.
func NewKeepalived(n *Net, dir string, advert time.Duration, vips ...netip.Addr) (*Keepalived, error) {
	if _, err := bed.LookPath("keepalived"); err != nil {
		return nil, fmt.Errorf("rig: package keepalived: %w", err)
	}
	return &Keepalived{peers{net: n, dir: dir, vips: vips, nodes: map[string]*peerNode{}}, advert}, nil
}

// Name tells the interval of VRRP's adverts.
func (k *Keepalived) Name() string {
	return fmt.Sprintf("ganesha + keepalived (advert_int %v)", k.Advert)
}

func (k *Keepalived) prio(node string, i int) string {
	return filepath.Join(k.dir, node, fmt.Sprint("prio-", i))
}

func (k *Keepalived) config(node string) string {
	// Different ones: of two equal nodes both become master for a moment.
	base := 150 - 50*k.net.Machine(node).i
	var b strings.Builder
	fmt.Fprintf(&b, "global_defs {\n router_id %s\n vrrp_version 3\n}\n", node)
	for i := range k.vips {
		fmt.Fprintf(&b, "track_file prio%d {\n file %q\n weight 1\n init_file 0\n}\n", i, k.prio(node, i))
	}
	for i, a := range k.vips {
		fmt.Fprintf(&b, `vrrp_instance v%d {
 state BACKUP
 interface eth0
 virtual_router_id %d
 priority %d
 advert_int %g
 virtual_ipaddress {
  %v/%d dev eth0
 }
 track_file {
  prio%d
 }
}
`, i, 51+i, base, k.Advert.Seconds(), a, Bits, i)
	}
	return b.String()
}

func (k *Keepalived) start(ctx context.Context, m *Machine) error {
	n, err := k.startGanesha(ctx, m)
	if err != nil {
		return err
	}
	dir := filepath.Join(k.dir, m.Name)
	conf := filepath.Join(dir, "keepalived.conf")
	if err := os.WriteFile(conf, []byte(k.config(m.Name)), 0o644); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "keepalived.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := bed.Command("keepalived", "-n", "-l", "-D", "-P", "-f", conf, "-p", "/run/keepalived.pid", "-r", "/run/vrrp.pid")
	cmd.Stdout, cmd.Stderr = log, log
	if n.proc, err = m.Node().Spawn(cmd); err != nil {
		return err
	}
	k.mu.Lock()
	k.nodes[m.Name] = n
	k.mu.Unlock()
	return nil
}

// prefer gives the node the highest priority for address number i.
func (k *Keepalived) prefer(i int, node string) error {
	for _, m := range k.net.Machines {
		v := "0\n"
		if m.Name == node {
			v = "103\n"
		}
		// keepalived looks when the file is closed after writing.
		if err := os.WriteFile(k.prio(m.Name, i), []byte(v), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Start starts everything; address i is at machine i first.
func (k *Keepalived) Start(ctx context.Context) error {
	for _, m := range k.net.Machines {
		if err := os.MkdirAll(filepath.Join(k.dir, m.Name), 0o755); err != nil {
			return err
		}
	}
	for i := range k.vips {
		if err := k.prefer(i, k.net.Machines[i%len(k.net.Machines)].Name); err != nil {
			return err
		}
	}
	for _, m := range k.net.Machines {
		if err := k.start(ctx, m); err != nil {
			return err
		}
	}
	for i, a := range k.vips {
		want := k.net.Machines[i%len(k.net.Machines)].Name
		if err := k.until(ctx, a, func(node string) bool { return node == want }); err != nil {
			return err
		}
	}
	return nil
}

// Move prefers another node, and waits until it has the address alone.
func (k *Keepalived) Move(ctx context.Context, a netip.Addr, to string) error {
	for i, b := range k.vips {
		if b == a {
			if err := k.prefer(i, to); err != nil {
				return err
			}
		}
	}
	return k.until(ctx, a, func(node string) bool { return node == to })
}

// TakeOver waits until VRRP has elected somebody, who keeps the address then.
func (k *Keepalived) TakeOver(ctx context.Context, a netip.Addr, _ string) error {
	if err := k.until(ctx, a, func(string) bool { return true }); err != nil {
		return err
	}
	for i, b := range k.vips {
		if b == a {
			return k.prefer(i, k.Owner(a))
		}
	}
	return nil
}

// Restart gives the node power and starts everything there.
func (k *Keepalived) Restart(ctx context.Context, node string) error {
	m := k.net.Machine(node)
	if err := m.On(); err != nil {
		return err
	}
	return k.start(ctx, m)
}
