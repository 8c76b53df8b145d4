package node

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/metrics"
	"github.com/baton-nfs/baton/internal/node/unit"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/target/front"
)

// rateKeeper turns counters into rates over the last seconds.
type rateKeeper struct {
	mu   sync.Mutex
	last *status.Status
	prev *status.Status
}

// rateSpan is the least time between the two samples that rates are made from.
const rateSpan = 2 * time.Second

// apply fills in s's rates from an earlier sample and keeps s for later ones.
func (r *rateKeeper) apply(s *status.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil || s.Now.Sub(r.last.Now) >= rateSpan {
		c := *s
		c.Targets = append([]status.Target(nil), s.Targets...)
		c.Addresses = append([]status.Address(nil), s.Addresses...)
		c.Clients = append([]status.Client(nil), s.Clients...)
		c.Procs = append([]status.Proc(nil), s.Procs...)
		r.prev, r.last = r.last, &c
	}
	if r.prev != nil {
		s.SetRates(r.prev)
	}
}

// Status describes the node as it is now.
func (n *Node) Status() status.Status {
	now := time.Now()
	s := status.Status{
		Version: status.Version, Node: n.cfg.Node, PID: os.Getpid(), Now: now,
		Uptime: now.Sub(n.started), DataDir: n.cfg.DataDir, Stopping: n.stopping.Load(),
	}
	n.targetStatus(&s)
	n.peerStatus(&s)
	if w := n.waits.Load(); w != nil && !n.up.Load() {
		s.Waits = *w
	}
	if n.up.Load() {
		s.Boot, s.Rpcbind = n.boot, n.portmap.Mode()
		n.importStatus(&s)
		n.serviceStatus(&s)
		n.lockStatus(&s)
		for _, e := range n.nfs.Exports().Exports() {
			x := status.Export{Path: e.Path, Dir: e.Dir, FSID: strconv.FormatUint(e.FSID, 16)}
			for i := range e.Clients {
				x.Clients = append(x.Clients, status.ExportClient{Spec: e.Clients[i].Spec(), Options: e.Clients[i].Options.String()})
			}
			s.Exports = append(s.Exports, x)
		}
	}
	n.irStatus(&s)
	var ms runtime.MemStats
	runtime.ReadMemStats(&ms)
	s.Memory.Heap, s.Memory.Goroutines, s.Memory.RSS = ms.HeapAlloc, runtime.NumGoroutine(), rss()
	s.Sort()
	n.rates.apply(&s)
	return s
}

func rss() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize())
}

// dirFree is the space that is left for ordinary users in a directory's file system.
func dirFree(dir string) uint64 {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0
	}
	return st.Bavail * uint64(st.Bsize)
}

func (n *Node) minFree() uint64 { return uint64(n.cfg.FS.MinFree) }

func (n *Node) targetStatus(s *status.Status) {
	t := n.targets
	if n.cluster != nil {
		for _, h := range n.cluster.hosted {
			if h.MayRun(n.cluster.name) {
				s.Targets = append(s.Targets, n.hostedStatus(h))
			}
		}
		return
	}
	s.Targets = append(s.Targets, n.mdtStatus(t.mdt, t.fails.get(mdtName)))
	for i, o := range t.osts {
		s.Targets = append(s.Targets, n.ostStatus(o, n.cfg.OST[i].Dir, t.fails.get(ostName(i))))
	}
}

// hostedStatus describes a target that runs here or may.
func (n *Node) hostedStatus(h *hosted) status.Target {
	h.mu.Lock()
	state, reason, m, t, o := h.state, h.reason, h.mgs, h.mdt, h.ost
	h.mu.Unlock()
	x := status.Target{Name: h.Name, Kind: h.kind, Dir: h.Dir}
	switch {
	case t != nil:
		x = n.mdtStatus(t, "")
	case o != nil:
		x = n.ostStatus(o, h.Dir, "")
	}
	if m != nil || t != nil || o != nil {
		x.Node = n.cluster.name
	}
	if state != status.StateUp {
		x.State, x.Reason = state, reason
	} else if x.State == "" {
		x.State = state
	}
	return x
}

// peerStatus tells what is thought of the other nodes.
func (n *Node) peerStatus(s *status.Status) {
	if n.cluster == nil {
		return
	}
	for _, p := range n.cluster.health.Status() {
		x := status.Peer{
			Node: p.Name, State: p.State.String(), Incarnation: p.Incarnation, Mine: p.Local, Theirs: p.Remote, Silence: p.Silence, Timeout: p.Timeout,
			Slow: p.Slow, Sent: p.Sent, Received: p.Received, Refused: p.Limited + p.Bad, Suspicions: p.Suspicions, Wrong: p.Wrong, Restarts: p.Restarts,
			Connects: p.Dials, LongestGap: p.LongestGap,
		}
		if p.State != health.StateIdle {
			for _, t := range p.Targets {
				x.Targets = append(x.Targets, status.PeerTarget{Name: t.Name, Instance: t.Instance, State: t.State.String(), Slow: t.Slow, Stale: !t.Current && (t.State == health.Recovering || t.State == health.Serving)})
			}
		}
		s.Peers = append(s.Peers, x)
	}
}

func (n *Node) importStatus(s *status.Status) {
	if n.cluster == nil {
		return
	}
	add := func(name string, im *imp.Import) {
		state, node, st := im.Status()
		s.Imports = append(s.Imports, status.Import{
			Target: name, State: state.String(), Node: node, Away: st.Away, Reason: st.Reason, Inactive: st.Inactive, Waiting: st.Waiting,
			Unanswered: st.Unanswered, Uncommitted: st.Uncommitted, Kept: uint64(max(st.HeldBytes, 0)),
		})
	}
	add(mdtName, n.fs.MDTImport())
	for i := range n.fs.OSTs() {
		add(ostName(i), n.fs.OSTImport(i))
	}
}

// mdtStatus describes a running MDT; failure is empty if it has none.
func (n *Node) mdtStatus(t *host.MDT, failure string) status.Target {
	ms := t.Body().Stats()
	m := status.Target{
		Name: mdtName, Kind: status.KindMDT, Dir: n.cfg.MDT.Dir, Free: dirFree(n.cfg.MDT.Dir),
		Transno: ms.Transno, LastCommitted: ms.LastCommitted,
		Bytes: ms.Engine.DiskBytes, Files: ms.Inodes, LogRecords: uint64(ms.PendingTruncates), Ops: ms.Ops + ms.TryHits,
	}
	n.condition(&m, t.Front(), ms.Down, failure)
	work := t.Sync().Status()
	m.Fences, m.WaitingLogs = work.Fences, work.Waiting
	return m
}

func (n *Node) ostStatus(t *host.OST, dir, failure string) status.Target {
	os := t.Body().Stats()
	x := status.Target{
		Name: t.Name(), Kind: status.KindOST, Dir: dir, Free: dirFree(dir),
		Transno: os.Transno, LastCommitted: os.LastCommitted, Dirty: uint64(max(os.DirtyBytes, 0)),
		FlushErrors: os.FlushErrors, Ops: os.Reads + os.FastReads + os.Writes,
	}
	n.condition(&x, t.Front(), os.Failed, failure)
	return x
}

// condition fills in what the front knows of a running target, and its state.
// The MDT's own client is not counted.
func (n *Node) condition(x *status.Target, f *front.Front, failed bool, failure string) {
	st, agent := f.Status(), host.AgentID(mdtName)
	r := &st.Recovery
	x.Instance, x.Known, x.Connected, x.Evicted = r.Instance, r.Clients, r.Connected, r.Evicted
	for _, c := range st.Clients {
		if c.Client != agent {
			x.Clients++
			x.Table = append(x.Table, status.TargetClient{ID: fmt.Sprintf("%x", c.Client[:]), Generation: c.Gen, Node: c.Node, Connected: c.Connected})
		}
	}
	x.State = status.StateUp
	switch {
	case failed || failure != "":
		x.State, x.Reason = status.StateFailed, failure
	case !st.Serving:
		x.State, x.Reason = status.StateRecovering, "waits for its clients to repeat what was not on its disk"
		if !r.Deadline.IsZero() {
			x.WindowLeft = max(time.Until(r.Deadline), 0)
		}
	case x.Free < n.minFree():
		x.State, x.Reason = status.StateFull, "less than min_free left on the disk"
	}
}

func (n *Node) serviceStatus(s *status.Status) {
	clients := map[netip.Addr]*status.Client{}
	client := func(a netip.Addr) *status.Client {
		a = a.Unmap()
		c := clients[a]
		if c == nil {
			c = &status.Client{Addr: a.String()}
			clients[a] = c
		}
		return c
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	vips, err := n.reg.VIPs(ctx)
	if err != nil {
		n.log.Warn("status: the write verifiers shown may be old", "err", err)
	}
	procs := map[[2]uint32]uint64{}
	for _, u := range n.serving() {
		n.unitStatus(s, u, procs, client)
		ver := u.VIP().Verifier
		for _, v := range vips {
			if v.Index == u.VIP().Index {
				ver = v.Verifier
			}
		}
		s.VIPs = append(s.VIPs, status.VIP{Addr: u.Addr().String(), Index: u.VIP().Index, Epoch: u.VIP().Epoch, Verifier: ver, VerifierChanges: n.verifier.Load()})
	}
	for _, m := range n.nfs.Mounts() {
		c := client(m.Client)
		c.Mounts = append(c.Mounts, m.Path)
	}
	for _, c := range clients {
		s.Clients = append(s.Clients, *c)
	}
	for k, calls := range procs {
		p := status.Proc{Calls: calls}
		switch k[0] {
		case nfs3.Program:
			p.Program, p.Name = "nfs3", nfs.NFSProcedure(k[1]).String()
		case mount3.Program:
			p.Program, p.Name = "mount3", nfs.MountProcedure(k[1]).String()
		default:
			p.Program, p.Name = "rpcbind", fmt.Sprint(k[1])
		}
		s.Procs = append(s.Procs, p)
	}
}

// unitStatus adds what the servers of a unit tell.
func (n *Node) unitStatus(s *status.Status, u *unit.Unit, procs map[[2]uint32]uint64, client func(netip.Addr) *status.Client) {
	for _, srv := range u.Servers() {
		st := srv.Stats()
		s.Memory.InFlight += uint64(max(st.BufferBytes, 0))
		for _, a := range st.Addrs {
			s.Addresses = append(s.Addresses, status.Address{
				Addr: a.Addr.Addr().String(), Port: int(a.Addr.Port()), Net: a.Network, Name: u.Ports()[a.Addr], State: n.state(),
				Conns: int(a.Conns), ConnsTotal: a.Accepted, Refused: a.Rejected, Calls: a.Calls, Errors: a.AuthErrors,
				Malformed: a.Garbage, InFlight: int(a.Inflight), BytesIn: a.BytesIn, BytesOut: a.BytesOut,
			})
		}
		for _, p := range st.Procs {
			procs[[2]uint32{p.Prog, p.Proc}] += p.Calls
		}
		for _, c := range srv.Conns() {
			x := client(c.Remote.Addr())
			x.Conns++
			x.Calls += c.Replies
			if x.Conns == 1 || c.Idle < x.Idle {
				x.Idle = c.Idle
			}
		}
	}
}

func (n *Node) state() string {
	if n.stopping.Load() {
		return "draining"
	}
	return status.StateUp
}

// Metrics is the node's status in Prometheus's form.
func (n *Node) Metrics() prometheus.Collector { return metrics.NewCollector(n.Status) }
