package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
)

// Cluster names the nodes of a service of several nodes, and this one.
type Cluster struct {
	// Node is empty when everything is in one process.
	Node   string   `toml:"node"`
	Listen string   `toml:"listen"`
	TLS    string   `toml:"tls"`
	TLSDir string   `toml:"tls_dir"`
	Start  []string `toml:"start"`
	// FileLocks guards the stores by locks of their file systems as well.
	FileLocks bool `toml:"file_locks"`

	Nodes []ClusterNode `toml:"nodes"`
}

// ClusterNode is one node of the cluster.
type ClusterNode struct {
	Name    string `toml:"name"`
	Address string `toml:"address"`
}

// Values of Cluster.TLS.
const (
	TLSMutual = "mutual"
	TLSOff    = "off"
)

// DefaultTLSDir is where a node's certificate is when nothing else is said.
const DefaultTLSDir = "/etc/baton/tls"

// ClusterPort is the port of targets when an address names none.
const ClusterPort = 7988

// Recovery configures how targets and their clients, the frontends, come
// through failures.
type Recovery struct {
	WindowMin    Duration `toml:"window_min"`
	WindowMax    Duration `toml:"window_max"`
	WindowHard   Duration `toml:"window_hard"`
	WindowStep   Duration `toml:"window_step"`
	PingInterval Duration `toml:"ping_interval"`
	PingTimeout  Duration `toml:"ping_timeout"`
	// SuppressPings is of the targets that run here.
	SuppressPings bool `toml:"suppress_pings"`

	CommitOnShare bool     `toml:"commit_on_share"`
	RetainSoft    Size     `toml:"retain_soft"`
	RetainHard    Size     `toml:"retain_hard"`
	Heartbeat     Duration `toml:"heartbeat"`
	JukeboxAfter  Duration `toml:"jukebox_after"`

	// Imperative recovery: the registry tells clients where targets have started.
	Imperative string   `toml:"imperative"`
	IRFactor   int      `toml:"ir_factor"`
	IRStartup  Duration `toml:"ir_startup"`
}

// Values of Recovery.Imperative.
const (
	ImperativeOn  = "on"
	ImperativeOff = "off"
)

// complete adds the port to addresses that have none, and listens where the
// others look for this node.
func (k *Cluster) complete() {
	k.Listen = withPort(k.Listen)
	for i := range k.Nodes {
		k.Nodes[i].Address = withPort(k.Nodes[i].Address)
	}
	if k.Listen == "" && k.Node != "" {
		k.Listen = k.Addr(k.Node)
	}
}

func withPort(s string) string {
	bare := s
	if host, ok := strings.CutPrefix(s, "["); ok && strings.Contains(host, ":") {
		bare = strings.TrimSuffix(host, "]")
	}
	if a, err := netip.ParseAddr(bare); err == nil {
		return netip.AddrPortFrom(a, ClusterPort).String()
	}
	return s
}

// MayRun tells whether a node is among those that may run the target.
func (t *Target) MayRun(node string) bool { return slices.Contains(t.Nodes, node) }

// Addr is the address, with port, where the targets on a node are reached; empty
// for a node that is not in the cluster.
func (k *Cluster) Addr(node string) string {
	for _, n := range k.Nodes {
		if n.Name == node {
			return n.Address
		}
	}
	return ""
}

// Clustered tells whether there are several nodes, or may be.
func (c *Config) Clustered() bool { return c.Cluster.Node != "" }

// Names of targets.
const (
	MGSName = "MGS"
	MDTName = "MDT0000"
)

// OSTName is the name of the object target of that index.
func OSTName(i int) string { return fmt.Sprintf("OST%04x", i) }

// OSTIndex is the index of an object target by its name.
func OSTIndex(name string) (int, error) {
	if n, ok := strings.CutPrefix(name, "OST"); ok {
		if i, err := strconv.ParseUint(n, 16, 16); err == nil && OSTName(int(i)) == name {
			return int(i), nil
		}
	}
	return 0, fmt.Errorf("%q is not the name of an object target; they are %s, %s and so on", name, OSTName(0), OSTName(1))
}

// Target is where a target is and who may run it.
type Target struct {
	Name  string
	Dir   string
	Nodes []string // none when everything is in one process
	key   string   // of its section
}

// Targets lists MGS, MDT and OSTs, in this order. With the registry in etcd there is
// no MGS.
func (c *Config) Targets() []Target {
	l := []Target{{MGSName, c.MGS.Dir, c.MGS.Nodes, "mgs"}, {MDTName, c.MDT.Dir, c.MDT.Nodes, "mdt"}}
	if c.InEtcd() {
		l = l[1:]
	}
	for i, o := range c.OST {
		l = append(l, Target{OSTName(i), o.Dir, o.Nodes, fmt.Sprintf("ost[%d]", i)})
	}
	return l
}

// LoadTLS reads this node's certificate; without TLS there is none.
func (c *Config) LoadTLS() (*ca.Node, error) {
	if !c.Clustered() || c.Cluster.TLS == TLSOff {
		return nil, nil
	}
	return ca.LoadNode(c.Cluster.TLSDir, c.Cluster.Node)
}

func (v *validator) cluster() {
	k := &v.c.Cluster
	if !v.c.Clustered() {
		if len(k.Nodes) > 0 {
			v.bad("cluster.nodes", nil, "which of these nodes this one is has not been said", "set cluster.node to its name")
		}
		alone := func(key string, set bool) {
			if set {
				v.bad(key, nil, "means something in a cluster only", "remove it, or set cluster.node and list the nodes in [[cluster.nodes]]")
			}
		}
		alone("cluster.listen", k.Listen != "")
		alone("cluster.start", len(k.Start) > 0)
		for _, t := range v.c.Targets() {
			alone(t.key+".nodes", len(t.Nodes) > 0)
		}
		return
	}
	if !v.nodeName("cluster.node", k.Node) {
		return
	}
	if v.c.Node != k.Node {
		v.bad("node", v.c.Node, "not the same as cluster.node", "remove it")
	}
	v.nodes()
	if k.Listen != "" {
		v.addrPort("cluster.listen", k.Listen)
	}
	v.oneOf("cluster.tls", k.TLS, TLSMutual, TLSOff)
	if v.abs("cluster.tls_dir", k.TLSDir, "the directory of certificates") && k.TLS == TLSMutual {
		if _, err := v.c.LoadTLS(); err != nil {
			v.bad("cluster.tls_dir", k.TLSDir, err.Error(), fmt.Sprintf("issue one with \"baton ca issue %s\" where the cluster's CA is, and copy ca.pem, %[1]s.pem and %[1]s.key here", k.Node))
		}
	}
	v.roles()
}

// nodeName checks a name as certificates have it.
func (v *validator) nodeName(key, name string) bool {
	err := ca.CheckName(name)
	if err == nil && len(name) <= maxNodeName {
		return true
	}
	v.bad(key, name, "not a node name", fmt.Sprintf("use at most %d lower-case letters, digits, hyphens and dots, a letter first, and not \"ca\"", maxNodeName))
	return false
}

func (v *validator) addrPort(key, s string) (netip.AddrPort, bool) {
	ap, err := netip.ParseAddrPort(s)
	switch {
	case err != nil || ap.Port() == 0:
		v.bad(key, s, "not an IP address with or without port", "write it as 192.0.2.1:"+strconv.Itoa(ClusterPort)+" or [2001:db8::1]:"+strconv.Itoa(ClusterPort))
	case ap.Addr().IsMulticast():
		v.bad(key, s, "a multicast address", "give the node's own address")
	default:
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), true
	}
	return netip.AddrPort{}, false
}

// nodes checks the list of nodes.
func (v *validator) nodes() {
	k := &v.c.Cluster
	names, addrs := map[string]bool{}, map[netip.AddrPort]string{}
	for i, n := range k.Nodes {
		key := fmt.Sprintf("cluster.nodes[%d].", i)
		if v.nodeName(key+"name", n.Name) && names[n.Name] {
			v.bad(key+"name", n.Name, "there are two nodes of this name", "give each node its own")
		}
		names[n.Name] = true
		ap, ok := v.addrPort(key+"address", n.Address)
		switch {
		case !ok:
		case ap.Addr().IsUnspecified():
			v.bad(key+"address", n.Address, "others cannot connect to a wildcard", "give the node's own address")
		case addrs[ap] != "":
			v.bad(key+"address", n.Address, "node "+addrs[ap]+" has the same", "give each node its own")
		default:
			addrs[ap] = n.Name
		}
	}
	if !names[k.Node] {
		v.bad("cluster.node", k.Node, "not among [[cluster.nodes]]", "add it to the list, which is the same on all nodes")
	}
}

// roles checks who runs what.
func (v *validator) roles() {
	k := &v.c.Cluster
	mine := map[string]bool{} // of all targets: may this node run it
	for _, t := range v.c.Targets() {
		key := t.key + ".nodes"
		if len(t.Nodes) == 0 {
			v.bad(key, nil, "nobody may run "+t.Name, "list the nodes that see its directory, the usual one first")
		}
		for i, n := range t.Nodes {
			switch {
			case !slices.ContainsFunc(k.Nodes, func(x ClusterNode) bool { return x.Name == n }):
				v.bad(key, n, "not among [[cluster.nodes]]", "correct the name or add the node")
			case slices.Contains(t.Nodes[:i], n):
				v.bad(key, n, "listed twice", "remove one")
			}
		}
		mine[t.Name] = t.MayRun(k.Node)
	}
	for i, s := range k.Start {
		may, known := mine[s]
		switch {
		case s == MGSName && v.c.InEtcd():
			v.bad("cluster.start", s, "with registry.kind = "+strconv.Quote(v.c.Registry.Kind)+" there is no MGS", "remove it")
		case !known:
			v.bad("cluster.start", s, "there is no such target", fmt.Sprintf("use %s, %s, %s ... %s", MGSName, MDTName, OSTName(0), OSTName(len(v.c.OST)-1)))
		case !may:
			v.bad("cluster.start", s, "node "+k.Node+" is not among the target's nodes", "remove it, or add the node there")
		case slices.Contains(k.Start[:i], s):
			v.bad("cluster.start", s, "listed twice", "remove one")
		}
	}
	if len(v.c.NFS.Addresses) > 0 || v.c.NFS.Floating || v.c.Member() {
		return
	}
	for _, may := range mine {
		if may {
			return
		}
	}
	v.bad("cluster.node", k.Node, "the node has neither service addresses nor targets", "give it nfs.addresses or nfs.floating, or list it as a node of a target")
}

func (v *validator) recovery() {
	r := &v.c.Recovery
	span := func(key string, d, least, most Duration) {
		if d < least || d > most {
			v.bad(key, d, "out of range", fmt.Sprintf("use %s to %s", tomlValue(least), tomlValue(most)))
		}
	}
	const tenth, hour = Duration(100 * time.Millisecond), Duration(time.Hour)
	span("recovery.window_min", r.WindowMin, tenth, hour)
	span("recovery.window_max", r.WindowMax, r.WindowMin, hour)
	span("recovery.window_hard", r.WindowHard, r.WindowMax, 24*hour)
	span("recovery.window_step", r.WindowStep, tenth, hour)
	span("recovery.ping_interval", r.PingInterval, tenth, Duration(5*time.Minute))
	span("recovery.ping_timeout", r.PingTimeout, 2*r.PingInterval, hour)
	span("recovery.heartbeat", r.Heartbeat, tenth, Duration(time.Minute))
	span("recovery.jukebox_after", r.JukeboxAfter, tenth, hour)
	v.oneOf("recovery.imperative", r.Imperative, ImperativeOn, ImperativeOff)
	if r.IRFactor < 1 || r.IRFactor > 10 {
		v.bad("recovery.ir_factor", r.IRFactor, "out of range", "use 1 to 10; 10 leaves the window as it is")
	}
	span("recovery.ir_startup", r.IRStartup, Duration(5*time.Second), hour)
	if r.RetainSoft < MiB || r.RetainSoft > TiB {
		v.bad("recovery.retain_soft", r.RetainSoft, "out of range", "use 1 MiB to 1 TiB")
	}
	if r.RetainHard < r.RetainSoft || r.RetainHard > TiB {
		v.bad("recovery.retain_hard", r.RetainHard, "out of range", "use at least recovery.retain_soft, and at most 1 TiB")
	}
}
