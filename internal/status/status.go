// Package status holds what a running node tells about itself: the structures
// behind "baton status", its JSON form and the metrics, and their rendering as
// text. It knows nothing of how the figures come about.
package status

import (
	"cmp"
	"slices"
	"time"
)

// Status is one look at a node. Counters run from the start of the process.
type Status struct {
	Version string `json:"version"`
	Node    string `json:"node"`
	PID     int    `json:"pid"`
	// Boot counts the node's starts.
	Boot    uint64        `json:"boot"`
	Now     time.Time     `json:"now"`
	Uptime  time.Duration `json:"uptime_ns"`
	DataDir string        `json:"data_dir"`
	// Rpcbind tells how clients find the ports: "system", "own" or "off".
	Rpcbind string `json:"rpcbind"`
	// Waits is what the frontend of a cluster's node waits for before it serves its
	// addresses.
	Waits string `json:"waits,omitempty"`
	// Stopping is set during an orderly stop.
	Stopping bool `json:"stopping,omitempty"`

	Memory  Memory   `json:"memory"`
	Targets []Target `json:"targets"`
	// Imports are this frontend's ways to the targets of a cluster.
	Imports []Import `json:"imports,omitempty"`
	// Peers are the other nodes of a cluster, by name.
	Peers     []Peer    `json:"peers,omitempty"`
	Addresses []Address `json:"addresses"`
	VIPs      []VIP     `json:"vips"`
	// Locks are the lock services; none when locks.enabled is false.
	Locks   []LockService `json:"locks"`
	Exports []Export      `json:"exports"`
	Clients []Client      `json:"clients"`
	// Procs are the procedures that were called at least once.
	Procs []Proc `json:"procs"`
	// IR is the node's part in imperative recovery, in a cluster.
	IR *IR `json:"imperative_recovery,omitempty"`
}

// Memory is the process's memory in bytes.
type Memory struct {
	RSS        uint64 `json:"rss"`
	Heap       uint64 `json:"heap"`
	InFlight   uint64 `json:"in_flight"` // requests and replies in memory
	Goroutines int    `json:"goroutines"`
}

// States of a target.
const (
	StateUp         = "up"
	StateRecovering = "recovering"
	StateFull       = "full" // below min_free: no new data
	StateFailed     = "failed"
	StateDown       = "down"
	// Of targets in a cluster, on a node that may run them.
	StateStopped  = "stopped"
	StateStarting = "starting"
	StateStopping = "stopping"
	// StateElsewhere: it is for other nodes, or runs on one.
	StateElsewhere = "elsewhere"
)

// Kinds of targets.
const (
	KindMGS = "MGS"
	KindMDT = "MDT"
	KindOST = "OST"
)

// Target is one MGS, MDT or OST.
type Target struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"`
	State string `json:"state"`
	// Reason says why the state is not up.
	Reason        string  `json:"reason,omitempty"`
	Dir           string  `json:"dir"`
	Transno       uint64  `json:"transno"`
	LastCommitted uint64  `json:"last_committed"`
	Clients       int     `json:"clients"` // entries of the client table
	Dirty         uint64  `json:"dirty"`   // bytes not durable yet
	Bytes         uint64  `json:"bytes"`   // used by the target
	Free          uint64  `json:"free"`    // of its file system
	Files         uint64  `json:"files"`   // inodes of an MDT; an OST does not count its objects
	LogRecords    uint64  `json:"log_records"`
	FlushErrors   uint64  `json:"flush_errors"`
	Ops           uint64  `json:"ops"`
	OpsPerSec     float64 `json:"ops_per_sec"`

	// Node is where the target runs, as far as this node knows.
	Node string `json:"node,omitempty"`
	// Owner is the owner record in the directory, if this node sees it.
	Owner string `json:"owner,omitempty"`
	// Instance numbers the target's starts.
	Instance uint64 `json:"instance,omitempty"`
	// Of recovery: clients that it waits for or waited for, those of them that are
	// connected, and what is left of the window.
	Known      int           `json:"known,omitempty"`
	Connected  int           `json:"connected,omitempty"`
	WindowLeft time.Duration `json:"window_left_ns,omitempty"`
	Evicted    int           `json:"evicted,omitempty"` // since the start
	// Of an MDT: evicted clients of which OSTs are yet to be told, and log records
	// that wait for OSTs which are away.
	Fences      int `json:"fences,omitempty"`
	WaitingLogs int `json:"waiting_logs,omitempty"`
	// Table is the client table of a target that runs here.
	Table []TargetClient `json:"table,omitempty"`
}

// TargetClient is a file system client in a target's table.
type TargetClient struct {
	ID         string `json:"id"` // hex
	Generation uint64 `json:"generation"`
	// Node from which it is or was connected; empty: it is in this process, or has not
	// come since the target's start.
	Node      string `json:"node,omitempty"`
	Connected bool   `json:"connected"`
}

// Import is this node's way to a target of a cluster.
type Import struct {
	Target string `json:"target"`
	// State is FULL while requests pass.
	State string `json:"state"`
	// Node is where the target is, or is looked for next.
	Node string `json:"node"`
	// Away is how long requests have not passed, Reason why.
	Away   time.Duration `json:"away_ns,omitempty"`
	Reason string        `json:"reason,omitempty"`
	// Inactive: the administrator has requests fail at once.
	Inactive    bool   `json:"inactive,omitempty"`
	Waiting     int    `json:"waiting"`     // requests that wait for it to come back, or their turn
	Unanswered  int    `json:"unanswered"`  // requests on their way
	Uncommitted int    `json:"uncommitted"` // answered, and kept for replay
	Kept        uint64 `json:"kept_bytes"`
}

// ImportFull is the state in which requests pass.
const ImportFull = "FULL"

// Address is one service address and port.
type Address struct {
	Addr       string `json:"addr"`
	Port       int    `json:"port"`
	Net        string `json:"net"`  // "tcp" or "udp"
	Name       string `json:"name"` // "nfs", "mountd", "rpcbind"
	State      string `json:"state"`
	Conns      int    `json:"conns"`
	ConnsTotal uint64 `json:"conns_total"`
	Refused    uint64 `json:"refused"` // connections over the limit
	Calls      uint64 `json:"calls"`
	Errors     uint64 `json:"errors"` // calls with an RPC error
	// Malformed counts records and datagrams that were no RPC call.
	Malformed      uint64  `json:"malformed"`
	InFlight       int     `json:"in_flight"` // calls
	BytesIn        uint64  `json:"bytes_in"`
	BytesOut       uint64  `json:"bytes_out"`
	CallsPerSec    float64 `json:"calls_per_sec"`
	BytesInPerSec  float64 `json:"bytes_in_per_sec"`
	BytesOutPerSec float64 `json:"bytes_out_per_sec"`
}

// VIP is a service address's identity towards the targets.
type VIP struct {
	Addr     string `json:"addr"`
	Index    uint32 `json:"index"`
	Epoch    uint64 `json:"epoch"`
	Verifier string `json:"verifier"` // 16 hex digits
	// VerifierChanges counts changes since the start: each is a lost flush.
	VerifierChanges uint64 `json:"verifier_changes"`

	// Floating is what the registry has of an address that moves; nil for another, and
	// in a Status.
	Floating *Floating `json:"floating,omitempty"`
}

// Export is one exported directory.
type Export struct {
	Path    string         `json:"path"`
	Dir     string         `json:"dir"`
	FSID    string         `json:"fsid"` // hex
	Source  string         `json:"source,omitempty"`
	Clients []ExportClient `json:"clients"`
}

// ExportClient tells who may use an export how.
type ExportClient struct {
	Spec    string `json:"spec"`
	Options string `json:"options"`
}

// Client is one client host.
type Client struct {
	Addr        string        `json:"addr"`
	Conns       int           `json:"conns"`
	Idle        time.Duration `json:"idle_ns"` // since its last call
	Calls       uint64        `json:"calls"`
	BytesIn     uint64        `json:"bytes_in"`
	BytesOut    uint64        `json:"bytes_out"`
	CallsPerSec float64       `json:"calls_per_sec"`
	Mounts      []string      `json:"mounts"` // paths, as far as MOUNT knows
}

// Proc is one RPC procedure's counters.
type Proc struct {
	Program   string        `json:"program"` // "nfs3", "mount3"
	Name      string        `json:"name"`
	Calls     uint64        `json:"calls"`
	Errors    uint64        `json:"errors"`   // replies with a status that is not OK
	Replayed  uint64        `json:"replayed"` // answered from a reply record
	Time      time.Duration `json:"time_ns"`  // sum over all calls
	PerSec    float64       `json:"per_sec"`
	MeanMicro float64       `json:"mean_us"`
}

// Sort brings all lists into their canonical order: targets by kind and name,
// addresses by address, name, port and net, clients by address, procedures
// by program and calls.
func (s *Status) Sort() {
	kind := map[string]int{KindMGS: 0, KindMDT: 1, KindOST: 2}
	slices.SortFunc(s.Targets, func(a, b Target) int {
		return cmp.Or(cmp.Compare(kind[a.Kind], kind[b.Kind]), cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
	})
	slices.SortFunc(s.Addresses, func(a, b Address) int {
		return cmp.Or(cmp.Compare(a.Addr, b.Addr), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Net, b.Net))
	})
	slices.SortFunc(s.VIPs, func(a, b VIP) int { return cmp.Compare(a.Index, b.Index) })
	slices.SortFunc(s.Locks, func(a, b LockService) int { return cmp.Compare(a.Index, b.Index) })
	slices.SortFunc(s.Exports, func(a, b Export) int { return cmp.Compare(a.Path, b.Path) })
	slices.SortFunc(s.Clients, func(a, b Client) int { return cmp.Compare(a.Addr, b.Addr) })
	slices.SortFunc(s.Procs, func(a, b Proc) int {
		return cmp.Or(cmp.Compare(a.Program, b.Program), cmp.Compare(b.Calls, a.Calls), cmp.Compare(a.Name, b.Name))
	})
}

// Rate estimates a counter's growth per second as an exponentially weighted
// mean over about five seconds. The zero Rate is ready to use. It is not safe
// for concurrent use.
type Rate struct {
	last  uint64
	at    time.Time
	value float64
}

// rateWindow is the time constant of Rate.
const rateWindow = 5 * time.Second

// Observe notes the counter's value at a time and returns the rate. A counter
// that fell starts anew.
func (r *Rate) Observe(now time.Time, count uint64) float64 {
	dt := now.Sub(r.at)
	switch {
	case r.at.IsZero() || count < r.last:
		r.last, r.at, r.value = count, now, 0
		return 0
	case dt <= 0:
		return r.value
	}
	rate := float64(count-r.last) / dt.Seconds()
	w := float64(dt) / float64(dt+rateWindow)
	r.value += w * (rate - r.value)
	if r.value < 1e-3 {
		r.value = 0
	}
	r.last, r.at = count, now
	return r.value
}

// Value returns the rate as of the last Observe.
func (r *Rate) Value() float64 { return r.value }

// SetRates replaces the rates of s by those between an earlier status and s.
// Things that the earlier one does not have get their counters' mean over the
// same time; a counter that fell (a restart) gets 0.
func (s *Status) SetRates(earlier *Status) {
	dt := s.Now.Sub(earlier.Now).Seconds()
	if dt <= 0 {
		return
	}
	rate := func(now, before uint64) float64 {
		if now < before {
			return 0
		}
		return float64(now-before) / dt
	}
	targets := map[string]Target{}
	for _, t := range earlier.Targets {
		targets[t.Name] = t
	}
	for i := range s.Targets {
		t := &s.Targets[i]
		t.OpsPerSec = rate(t.Ops, targets[t.Name].Ops)
	}
	type addrKey struct {
		addr, net, name string
		port            int
	}
	addrs := map[addrKey]Address{}
	for _, a := range earlier.Addresses {
		addrs[addrKey{a.Addr, a.Net, a.Name, a.Port}] = a
	}
	for i := range s.Addresses {
		a := &s.Addresses[i]
		b := addrs[addrKey{a.Addr, a.Net, a.Name, a.Port}]
		a.CallsPerSec = rate(a.Calls, b.Calls)
		a.BytesInPerSec = rate(a.BytesIn, b.BytesIn)
		a.BytesOutPerSec = rate(a.BytesOut, b.BytesOut)
	}
	clients := map[string]Client{}
	for _, c := range earlier.Clients {
		clients[c.Addr] = c
	}
	for i := range s.Clients {
		c := &s.Clients[i]
		c.CallsPerSec = rate(c.Calls, clients[c.Addr].Calls)
	}
	procs := map[[2]string]Proc{}
	for _, p := range earlier.Procs {
		procs[[2]string{p.Program, p.Name}] = p
	}
	for i := range s.Procs {
		p := &s.Procs[i]
		b := procs[[2]string{p.Program, p.Name}]
		p.PerSec = rate(p.Calls, b.Calls)
		if n := p.Calls - b.Calls; p.Calls > b.Calls && p.Time >= b.Time {
			p.MeanMicro = float64((p.Time - b.Time).Microseconds()) / float64(n)
		} else {
			p.MeanMicro = 0
		}
	}
}
