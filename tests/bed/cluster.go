package bed

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Member is one node of a Cluster. Without a Node of their own all of them are processes
// in the cluster's.
type Member struct {
	Name string
	// Addr is where its targets listen; any address of 127.0.0.0/8 will do.
	Addr netip.Addr
	// Serve is the address that it serves NFS at; none if it is not valid.
	Serve netip.Addr
	// Start are the targets that it starts by itself.
	Start []string
	// Node runs it; nil: the cluster's.
	Node *Node
	// Floating lets it serve addresses that the registry gives it.
	Floating bool

	proc *Proc
	log  *os.File
}

// Cluster runs `baton serve` as several nodes of one service. Every member may
// run every target. As a Server it is all of them together, in their order.
type Cluster struct {
	c       Config
	bin     string
	members []*Member
	// Extra is added to each member's configuration.
	Extra string
	// OSTs is their number. Default 2.
	OSTs int
	// Plain leaves connections between members unencrypted.
	Plain bool
	// Etcd are the members that keep the registry in an etcd of theirs; without them it
	// is at an MGS.
	Etcd []string
}

// NewCluster builds ./cmd/baton (once per process) and makes the members' setting.
func NewCluster(c Config, members ...*Member) (*Cluster, error) {
	bin, err := Build("./cmd/baton")
	if err != nil {
		return nil, err
	}
	if c.NFSPort == 0 {
		c.NFSPort, c.MountPort = NFSPort, MountPort
	}
	return &Cluster{c: c, bin: bin, members: members, OSTs: 2}, nil
}

// Name returns "baton".
func (s *Cluster) Name() string { return "baton" }

// Addr returns the first member's service address.
func (s *Cluster) Addr() netip.Addr { return s.c.Addr }

// Pid returns the PID of the first member or 0.
func (s *Cluster) Pid() int {
	if p := s.members[0].proc; p != nil {
		return p.Pid()
	}
	return 0
}

// Pids returns the PIDs of all members that run.
func (s *Cluster) Pids() (pids []int) {
	for _, m := range s.members {
		if m.proc != nil {
			pids = append(pids, m.proc.Pid())
		}
	}
	return pids
}

// ConfigFile returns the path of a member's configuration.
func (s *Cluster) ConfigFile(m *Member) string {
	return filepath.Join(s.c.Dir, m.Name, "baton.toml")
}

func (s *Cluster) quoted(names []string) string {
	q := make([]string, len(names))
	for i, n := range names {
		q[i] = fmt.Sprintf("%q", n)
	}
	return "[" + strings.Join(q, ", ") + "]"
}

func (s *Cluster) config(m *Member) string {
	var b strings.Builder
	dir := filepath.Join(s.c.Dir, m.Name)
	var names []string
	for _, x := range s.members {
		names = append(names, x.Name)
	}
	all := s.quoted(names)
	fmt.Fprintf(&b, "data_dir = %q\ncluster_key_file = %q\n[cluster]\nnode = %q\ntls_dir = %q\nstart = %s\n",
		filepath.Join(dir, "data"), filepath.Join(s.c.Dir, "cluster.key"), m.Name, filepath.Join(s.c.Dir, "tls"), s.quoted(m.Start))
	if s.Plain {
		b.WriteString("tls = \"off\"\n")
	}
	for _, x := range s.members {
		fmt.Fprintf(&b, "[[cluster.nodes]]\nname = %q\naddress = %q\n", x.Name, x.Addr)
	}
	if len(s.Etcd) > 0 {
		fmt.Fprintf(&b, "[registry]\nkind = \"etcd-embedded\"\nmembers = %s\n", s.quoted(s.Etcd))
	} else {
		fmt.Fprintf(&b, "[mgs]\ndir = %q\nnodes = %s\n", filepath.Join(s.c.Dir, "mgs"), all)
	}
	fmt.Fprintf(&b, "[mdt]\ndir = %q\nnodes = %s\n", filepath.Join(s.c.Dir, "mdt"), all)
	for i := range s.OSTs {
		fmt.Fprintf(&b, "[[ost]]\ndir = %q\nnodes = %s\n", filepath.Join(s.c.Dir, fmt.Sprint("ost", i)), all)
	}
	switch {
	case m.Floating:
		fmt.Fprintf(&b, "[nfs]\naddresses = []\nfloating = true\nport = %d\nmount_port = %d\n", s.c.NFSPort, s.c.MountPort)
	case m.Serve.IsValid():
		fmt.Fprintf(&b, "[nfs]\naddresses = [%q]\nport = %d\nmount_port = %d\n", m.Serve, s.c.NFSPort, s.c.MountPort)
	default:
		b.WriteString("[nfs]\naddresses = []\n")
	}
	fmt.Fprintf(&b, "[exports]\nfile = %q\n", filepath.Join(s.c.Dir, "exports"))
	fmt.Fprintf(&b, "[rpcbind]\nmode = %q\n[http]\naddress = \"\"\n%s%s",
		map[bool]string{true: "own", false: "off"}[(m.Serve.IsValid() || m.Floating) && s.c.NFSPort == NFSPort], s.c.locks(), s.Extra)
	return b.String()
}

// prepare makes what all members share and, unless they are plain, the certificates.
func (s *Cluster) prepare(ctx context.Context) error {
	if err := os.MkdirAll(s.c.Dir, 0o755); err != nil {
		return err
	}
	single := Baton{c: s.c}
	_, exports := single.config()
	if err := os.WriteFile(filepath.Join(s.c.Dir, "exports"), []byte(exports), 0o644); err != nil {
		return err
	}
	tls := filepath.Join(s.c.Dir, "tls")
	if _, err := os.Stat(tls); err == nil || s.Plain {
		return nil
	}
	for _, args := range append([][]string{{"ca", "init", "--name", "bed", "--dir", tls}}, s.issue(tls)...) {
		if out, err := s.c.Node.Run(ctx, s.bin, args...); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
	}
	return nil
}

func (s *Cluster) issue(dir string) (cmds [][]string) {
	for _, m := range s.members {
		cmds = append(cmds, []string{"ca", "issue", "--dir", dir, "--host", m.Addr.String(), m.Name})
	}
	return cmds
}

// StartMember starts one member, and does not wait for it.
func (s *Cluster) StartMember(ctx context.Context, m *Member) error {
	if err := s.prepare(ctx); err != nil {
		return fmt.Errorf("bed: cluster: %w", err)
	}
	dir := filepath.Join(s.c.Dir, m.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("bed: cluster: %w", err)
	}
	if err := os.WriteFile(s.ConfigFile(m), []byte(s.config(m)), 0o644); err != nil {
		return fmt.Errorf("bed: cluster: %w", err)
	}
	if m.log == nil {
		f, err := os.OpenFile(filepath.Join(dir, "baton.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return fmt.Errorf("bed: cluster: %w", err)
		}
		m.log = f
	}
	cmd := Command(s.bin, "serve", "--config", s.ConfigFile(m))
	cmd.Stdout, cmd.Stderr = m.log, m.log
	p, err := s.node(m).Spawn(cmd)
	if err != nil {
		return err
	}
	m.proc = p
	return nil
}

func (s *Cluster) node(m *Member) *Node {
	if m.Node != nil {
		return m.Node
	}
	return s.c.Node
}

// Start starts the members that do not run, and waits until those that serve NFS do.
func (s *Cluster) Start(ctx context.Context) error {
	for _, m := range s.members {
		if m.proc == nil {
			if err := s.StartMember(ctx, m); err != nil {
				return err
			}
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, m := range s.members {
		p, name := m.proc, m.Name
		go func() {
			select {
			case <-p.Done():
				cancel(fmt.Errorf("bed: node %s ended while starting: %v", name, p.Err()))
			case <-ctx.Done():
			}
		}()
	}
	for _, m := range s.members {
		if m.Serve.IsValid() {
			if err := waitAnswers(ctx, s.node(m), m.Serve, s.c.NFSPort, s.c.MountPort, m.proc); err != nil {
				return fmt.Errorf("%w (%w)\n%s", err, context.Cause(ctx), s.Log())
			}
		}
	}
	return nil
}

// Kill kills the member.
func (m *Member) Kill() {
	if m.proc != nil {
		m.proc.Kill()
		m.proc = nil
	}
}

// Signal sends a signal to the member's processes.
func (m *Member) Signal(sig syscall.Signal) error {
	if m.proc == nil {
		return nil
	}
	return m.proc.Signal(sig)
}

// Running tells whether the member runs.
func (m *Member) Running() bool { return m.proc != nil }

// Ended tells whether the member was started, and has ended without being killed.
func (m *Member) Ended() bool {
	if m.proc == nil {
		return false
	}
	select {
	case <-m.proc.Done():
		return true
	default:
		return false
	}
}

// Kill9 kills all members.
func (s *Cluster) Kill9() error {
	for _, m := range s.members {
		m.Kill()
	}
	return nil
}

// Stop ends the members with SIGTERM, one after the other.
func (s *Cluster) Stop() error {
	var errs []error
	for _, m := range s.members {
		if m.proc != nil {
			if err := m.proc.Stop(time.Minute); err != nil {
				errs = append(errs, fmt.Errorf("bed: stop %s: %w\n%s", m.Name, err, s.memberLog(m)))
			}
			m.proc = nil
		}
		if m.log != nil {
			m.log.Close()
			m.log = nil
		}
	}
	return errors.Join(errs...)
}

// Baton runs a command of the program for a member, and returns what it printed.
func (s *Cluster) Baton(ctx context.Context, m *Member, args ...string) (string, error) {
	out, err := s.node(m).Run(ctx, s.bin, append(args, "--config", s.ConfigFile(m))...)
	return string(out), err
}

func (s *Cluster) memberLog(m *Member) string {
	return tail(filepath.Join(s.c.Dir, m.Name, "baton.log"), 4096)
}

// Log returns the ends of all members' logs.
func (s *Cluster) Log() string {
	var b strings.Builder
	for _, m := range s.members {
		fmt.Fprintf(&b, "--- %s\n%s\n", m.Name, s.memberLog(m))
	}
	return b.String()
}

// Check runs `baton fsck` on the stopped cluster's stores.
func (s *Cluster) Check(ctx context.Context) error {
	if out, err := s.c.Node.Run(ctx, s.bin, "fsck", "--config", s.ConfigFile(s.members[0])); err != nil {
		return fmt.Errorf("bed: baton fsck: %w\n%s", err, out)
	}
	return nil
}
