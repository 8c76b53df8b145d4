// Package config reads, checks, documents and completes baton's configuration:
// a TOML file, or the few flags of "baton serve".
//
// Loading is strict. Unknown keys are refused with their place in the file and
// the nearest known key, and every refused value is named with its key, the
// reason and a remedy, all problems of a file at once.
package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// DefaultPath is where the commands look for a configuration file when
// neither --config nor --data is given.
const DefaultPath = "/etc/baton/baton.toml"

// Size is a number of bytes. In TOML it is an integer or a string with a unit:
// "64 MiB", "1GiB", "4096".
type Size uint64

// Units of Size.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

var sizeUnits = []struct {
	name string
	n    Size
}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}}

// ParseSize reads a number of bytes with an optional binary unit.
func ParseSize(s string) (Size, error) {
	num, mult := strings.TrimSpace(s), Size(1)
	for _, u := range sizeUnits {
		if rest, ok := strings.CutSuffix(num, u.name); ok {
			num, mult = strings.TrimSpace(rest), u.n
			break
		}
	}
	n, err := strconv.ParseUint(num, 10, 64)
	if err != nil || n > uint64(^Size(0)/mult) || n*uint64(mult) > 1<<63-1 {
		return 0, fmt.Errorf("size %q: want a number of bytes, or a number with KiB, MiB, GiB or TiB", s)
	}
	return Size(n) * mult, nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := ParseSize(string(b))
	if err == nil {
		*s = v
	}
	return err
}

// String writes the size with the largest unit that divides it.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s >= u.n && s%u.n == 0 {
			return fmt.Sprintf("%d %s", uint64(s/u.n), u.name)
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// Duration is a time span. In TOML it is a string in Go's notation: "1.5s".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration %q: want a number with a unit, for example \"500ms\", \"10s\" or \"2m\"", b)
	}
	*d = Duration(v)
	return nil
}

// String writes the duration in Go's notation.
func (d Duration) String() string { return time.Duration(d).String() }

// Config is the whole configuration of one node. Complete fills the values
// that are derived from others; until then they are empty.
type Config struct {
	Node           string `toml:"node"`
	DataDir        string `toml:"data_dir"`
	ClusterKeyFile string `toml:"cluster_key_file"`

	NFS     NFS      `toml:"nfs"`
	Exports Exports  `toml:"exports"`
	Export  []Export `toml:"export"`
	Rpcbind Rpcbind  `toml:"rpcbind"`
	Locks   Locks    `toml:"locks"`
	FS      FS       `toml:"fs"`

	Cluster  Cluster  `toml:"cluster"`
	Registry Registry `toml:"registry"`
	MGS      MGS      `toml:"mgs"`
	MDT      MDT      `toml:"mdt"`
	OST      []OST    `toml:"ost"`
	Recovery Recovery `toml:"recovery"`
	Failover Failover `toml:"failover"`
	Manager  Manager  `toml:"manager"`

	Control Control `toml:"control"`
	HTTP    HTTP    `toml:"http"`
	Log     Log     `toml:"log"`

	// File is the file that the configuration was read from, "" for flags.
	File string `toml:"-"`
	// ForgetLocks asks for the lock table to be thrown away at this start, which
	// begins a grace period (--forget-locks). It is no key of the file, because
	// it must not happen at every start.
	ForgetLocks bool `toml:"-"`

	lines positions
}

// NFS configures the frontend.
type NFS struct {
	Addresses      []string `toml:"addresses"`
	Floating       bool     `toml:"floating"`
	Port           int      `toml:"port"`
	MountPort      int      `toml:"mount_port"`
	UDP            bool     `toml:"udp"`
	MaxConnections int      `toml:"max_connections"`
	ConnInflight   Size     `toml:"conn_inflight"`
	Inflight       Size     `toml:"inflight"`
	Workers        int      `toml:"workers"`
	Rtmax          Size     `toml:"rtmax"`
	Rtpref         Size     `toml:"rtpref"`
	Wtmax          Size     `toml:"wtmax"`
	Wtpref         Size     `toml:"wtpref"`
	Dtpref         Size     `toml:"dtpref"`
	DrainTimeout   Duration `toml:"drain_timeout"`
	// KeepConnections is KeepOnRestart or KeepNever.
	KeepConnections string `toml:"keep_connections"`
}

// Exports names the exports(5) file.
type Exports struct {
	File string `toml:"file"`
}

// Export is one export given in the configuration itself. Name is the path
// that clients mount, Path the directory inside the file system, Clients and
// Options the fields of exports(5).
type Export struct {
	Name    string   `toml:"name"`
	Path    string   `toml:"path"`
	Clients []string `toml:"clients"`
	Options string   `toml:"options"`
}

// Modes of the rpcbind section.
const (
	RpcbindAuto   = "auto"
	RpcbindSystem = "system"
	RpcbindOwn    = "own"
	RpcbindOff    = "off"
)

// Rpcbind tells how clients find the ports.
type Rpcbind struct {
	Mode string `toml:"mode"`
	Port int    `toml:"port"`
}

// Locks configures NLM, NSM and the lock table.
type Locks struct {
	Enabled             bool     `toml:"enabled"`
	NLMPort             int      `toml:"nlm_port"`
	StatdPort           int      `toml:"statd_port"`
	ReclaimWindow       Duration `toml:"reclaim_window"`
	GracePeriod         Duration `toml:"grace_period"`
	NotifyTimeout       Duration `toml:"notify_timeout"`
	MaxTotal            int      `toml:"max_total"`
	MaxPerClient        int      `toml:"max_per_client"`
	MaxWaitingPerClient int      `toml:"max_waiting_per_client"`
	MaxHosts            int      `toml:"max_hosts"`
}

// Values of NFS.KeepConnections.
const (
	KeepOnRestart = "restart"
	KeepNever     = "never"
)

// Values of FS.Durability and FS.Atime.
const (
	DurabilityDisk = "disk"
	AtimeRelatime  = "relatime"
	AtimeOff       = "off"
)

// FS holds defaults of the file system.
type FS struct {
	StripeCount int    `toml:"stripe_count"`
	StripeSize  Size   `toml:"stripe_size"`
	Durability  string `toml:"durability"`
	Atime       string `toml:"atime"`
	MinFree     Size   `toml:"min_free"`
}

// MGS configures the registry.
type MGS struct {
	Dir   string   `toml:"dir"`
	Nodes []string `toml:"nodes"`
}

// MDT configures the metadata target.
type MDT struct {
	Dir        string   `toml:"dir"`
	Nodes      []string `toml:"nodes"`
	BlockCache Size     `toml:"block_cache"`
	InodeCache int      `toml:"inode_cache"`
}

// OST configures one object storage target.
type OST struct {
	Dir   string   `toml:"dir"`
	Nodes []string `toml:"nodes"`
}

// Control configures the socket of the local commands.
type Control struct {
	Socket string `toml:"socket"`
}

// HTTP configures /metrics and /healthz.
type HTTP struct {
	Address     string `toml:"address"`
	AllowRemote bool   `toml:"allow_remote"`
}

// Log configures messages.
type Log struct {
	Level  string `toml:"level"`
	Format string `toml:"format"`
}

// Default returns the built-in configuration. It is not completed.
func Default() *Config {
	return &Config{
		DataDir: "/var/lib/baton",
		NFS: NFS{
			Addresses:       []string{"127.0.0.1"},
			Port:            2049,
			MountPort:       20048,
			MaxConnections:  4096,
			ConnInflight:    16 * MiB,
			Inflight:        256 * MiB,
			Rtmax:           MiB,
			Rtpref:          MiB,
			Wtmax:           MiB,
			Wtpref:          MiB,
			Dtpref:          MiB,
			DrainTimeout:    Duration(10 * time.Second),
			KeepConnections: KeepOnRestart,
		},
		Exports: Exports{File: "/etc/baton/exports"},
		Rpcbind: Rpcbind{Mode: RpcbindAuto, Port: 111},
		Locks: Locks{
			Enabled:             true,
			NLMPort:             4045,
			StatdPort:           4046,
			ReclaimWindow:       Duration(90 * time.Second),
			GracePeriod:         Duration(90 * time.Second),
			NotifyTimeout:       Duration(15 * time.Minute),
			MaxTotal:            1000000,
			MaxPerClient:        100000,
			MaxWaitingPerClient: 10000,
			MaxHosts:            65536,
		},
		FS: FS{
			StripeCount: 1,
			StripeSize:  MiB,
			Durability:  DurabilityDisk,
			Atime:       AtimeRelatime,
			MinFree:     64 * MiB,
		},
		Cluster: Cluster{TLS: TLSMutual, TLSDir: DefaultTLSDir, FileLocks: true},
		Registry: Registry{
			Kind: RegistryMGS, Prefix: "/baton", MaxDocument: 1520 * KiB, ClientPort: 7989, PeerPort: 7990,
			Heartbeat: Duration(100 * time.Millisecond), ElectionTimeout: Duration(500 * time.Millisecond), Lease: Duration(3 * time.Second),
		},
		MDT: MDT{BlockCache: 64 * MiB, InodeCache: 100000},
		Recovery: Recovery{
			WindowMin:    Duration(15 * time.Second),
			WindowMax:    Duration(time.Minute),
			WindowHard:   Duration(3 * time.Minute),
			WindowStep:   Duration(10 * time.Second),
			PingInterval: Duration(5 * time.Second),
			PingTimeout:  Duration(30 * time.Second),
			RetainSoft:   64 * MiB,
			RetainHard:   256 * MiB,
			Heartbeat:    Duration(2 * time.Second),
			JukeboxAfter: Duration(25 * time.Second),
			Imperative:   ImperativeOn,
			IRFactor:     5,
			IRStartup:    Duration(30 * time.Second),
		},
		Failover: Failover{
			Refuse:        RefuseHold,
			Close:         CloseAuto,
			RefuseTimeout: Duration(100 * time.Millisecond),
			DrainTimeout:  Duration(2 * time.Second),
			CommitTimeout: Duration(2 * time.Second),
			CloseTimeout:  Duration(300 * time.Millisecond),
			ClearTimeout:  Duration(300 * time.Millisecond),
			RemoveTimeout: Duration(500 * time.Millisecond),
			FinishTimeout: Duration(500 * time.Millisecond),
			StopWait:      Duration(5 * time.Second),
		},
		Manager: Manager{
			Mode:          ManagerBuiltin,
			Quorum:        QuorumAuto,
			Confirm:       Duration(300 * time.Millisecond),
			UnreadyAfter:  Duration(5 * time.Second),
			StartTimeout:  Duration(5 * time.Second),
			MoveTimeout:   Duration(15 * time.Second),
			FailbackDelay: Delay(30 * time.Second),
			HoldOff:       Duration(10 * time.Second),
			HoldOffMax:    Duration(10 * time.Minute),
			ParallelMoves: 4,
		},
		HTTP: HTTP{Address: "127.0.0.1:9633"},
		Log:  Log{Level: "info", Format: "text"},
	}
}

// Complete fills in what was left to be derived: node name and addresses, target
// directories, the key file and the control socket.
func (c *Config) Complete() error {
	if c.Node == "" {
		c.Node = c.Cluster.Node
	}
	if c.Node == "" {
		h, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("node name: %w; set node in the configuration", err)
		}
		c.Node = h
	}
	if c.ClusterKeyFile == "" {
		c.ClusterKeyFile = filepath.Join(c.DataDir, "cluster.key")
	}
	if len(c.OST) == 0 {
		c.OST = []OST{{}, {}}
	}
	// A directory that several nodes have to see is not derived from what is
	// each one's own.
	derive := func(dir *string, nodes []string, name string) {
		if *dir == "" && len(nodes) <= 1 {
			*dir = filepath.Join(c.DataDir, name)
		}
	}
	derive(&c.MGS.Dir, c.MGS.Nodes, "")
	derive(&c.MDT.Dir, c.MDT.Nodes, "mdt")
	for i := range c.OST {
		derive(&c.OST[i].Dir, c.OST[i].Nodes, fmt.Sprintf("ost%d", i))
	}
	c.Cluster.complete()
	if c.Control.Socket == "" {
		c.Control.Socket = SocketPath(c.DataDir)
	}
	return nil
}

// SocketPath is the control socket's place when the configuration names none.
func SocketPath(dataDir string) string { return filepath.Join(dataDir, "control.sock") }

// Addrs returns the service addresses. The configuration must be valid.
func (c *Config) Addrs() []netip.Addr {
	as := make([]netip.Addr, 0, len(c.NFS.Addresses))
	for _, s := range c.NFS.Addresses {
		if a, err := netip.ParseAddr(s); err == nil {
			as = append(as, a.Unmap())
		}
	}
	return as
}

// ExportsText returns the [[export]] tables (and --export flags) as text in
// the syntax of exports(5), one line each in their order, for the parser that
// also reads the exports file. The configuration must be valid.
func (c *Config) ExportsText() string {
	var b strings.Builder
	for _, e := range c.Export {
		b.WriteString(octal(e.Name))
		for _, cl := range e.Clients {
			b.WriteString(" " + cl + "(")
			if e.Options != "" {
				b.WriteString(e.Options + ",")
			}
			b.WriteString("dir=" + octal(e.Path) + ")")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// octal escapes whatever may mean something in an exports file.
func octal(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("/._-+@:%", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "\\%03o", c)
		}
	}
	return b.String()
}
