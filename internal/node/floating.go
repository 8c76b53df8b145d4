package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/failover/manager"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/node/unit"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/vip"
)

// Files in the data directory: what happened to addresses, which this node has added
// (for kernels that do not remember), and which a cluster manager adds.
const (
	eventsFile = "events.jsonl"
	addedFile  = "addresses.json"
	givenFile  = "given-addresses"
)

// openNet opens the machine's network; tests put another one in its place. With check
// the log says which settings do not suit floating addresses.
func (n *Node) openNet(check bool) (vip.Net, error) {
	if n.testNet != nil {
		return n.testNet, nil
	}
	k, err := vip.Open(vip.Options{StateFile: n.addedPath(), Log: n.log})
	if err != nil {
		return nil, fmt.Errorf("floating addresses: %w", err)
	}
	if !check {
		return k, nil
	}
	wrong, err := k.Settings()
	if err != nil {
		n.log.Warn("the kernel's settings could not be read", "err", err)
	}
	for _, w := range wrong {
		n.log.Warn("floating addresses: " + w.String())
	}
	return k, nil
}

func (n *Node) addedPath() string { return filepath.Join(n.cfg.DataDir, addedFile) }

// forgetFloating takes away what an earlier process of this node has left on the machine,
// of a node that serves no floating addresses any more. Addresses that this node's own
// record does not have may be another baton's.
func (n *Node) forgetFloating() error {
	l, err := vip.Recorded(n.addedPath())
	if err != nil || len(l) == 0 {
		return err
	}
	k, err := n.openNet(false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(n.run, startAgain)
	defer cancel()
	err = vipagent.Clean(ctx, k, l, n.log)
	if err = errors.Join(err, k.Close()); err != nil {
		return fmt.Errorf("addresses that an earlier process has left on this machine, when it served floating ones: %w", err)
	}
	// Whoever adds them from now on has nothing to do with this node.
	return os.Remove(n.addedPath())
}

// prepareFloating takes away what an earlier process has left on the machine, before
// anything listens: nobody serves it, and somebody else may.
func (n *Node) prepareFloating() (err error) {
	// The node that decides who serves what may serve nothing itself.
	n.events, err = events.Open(events.Options{Node: n.cfg.Cluster.Node, Path: filepath.Join(n.cfg.DataDir, eventsFile), Logger: n.log})
	if err != nil || !n.cfg.NFS.Floating {
		return err
	}
	if n.net, err = n.openNet(true); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(n.run, startAgain)
	defer cancel()
	if err = vipagent.Clean(ctx, n.net, nil, n.log); err != nil {
		return fmt.Errorf("addresses that an earlier process has left on this machine: %w", err)
	}
	return nil
}

// attend connects what the cluster part asks with what this node knows of addresses.
func (c *cluster) attend(n *Node) {
	c.sources.Store(&vipSources{local: n.localAddresses, log: n.events})
	vitals, addresses := n.vitals, n.reportAddresses
	log := func(e manager.Event) {
		n.events.Append(events.Event{
			Kind: kindOf(e.Kind), Addr: e.Addr, VIP: e.Index, Epoch: e.Epoch, Move: e.Move, From: e.From, To: cmp.Or(e.To, e.Node), Reason: e.Text, Err: e.Err,
		})
	}
	c.managing.vitals.Store(&vitals)
	c.managing.addresses.Store(&addresses)
	c.managing.onEvent.Store(&log)
	if n.cfg.NFS.Floating {
		c.managing.floating.Store(true)
	}
}

// kindOf gives the log's kind of what the manager tells.
func kindOf(k manager.EventKind) string {
	if k == manager.NodeEvent || k == manager.QuorumEvent {
		return events.Node
	}
	return events.Decision
}

// reportAddresses is AddressReports for the node that decides.
func (n *Node) reportAddresses() (l []manager.Address) {
	now := time.Now()
	for _, r := range n.AddressReports() {
		l = append(l, manager.Address{Index: r.Index, Epoch: r.Epoch, State: manager.AddressState(r.State), Since: max(now.Sub(r.Since), 0), Move: r.Move, Reason: r.Reason, Stuck: r.Stuck, Silent: r.Silent})
	}
	return short(l)
}

// startFloating begins to serve the floating addresses that the registry gives to this
// node.
func (n *Node) startFloating() {
	if n.net == nil {
		return
	}
	c, f := n.cluster, &n.cfg.Failover
	o := vipagent.Options{
		Node: c.name, Registry: c.reg, Net: n.net, Ask: c.ask, Events: n.events, Log: n.log,
		New:     func(addr netip.Addr) vipagent.Unit { return floatingUnit{n.deps.New(addr), n} },
		Refuse:  failover.Refuse(f.Refuse),
		Closing: failover.Quiet,
		Deadlines: failover.Deadlines{
			Refuse: time.Duration(f.RefuseTimeout), Drain: time.Duration(f.DrainTimeout), Commit: time.Duration(f.CommitTimeout), Close: time.Duration(f.CloseTimeout),
			Clear: time.Duration(f.ClearTimeout), Remove: time.Duration(f.RemoveTimeout), Finish: time.Duration(f.FinishTimeout),
		},
	}
	if n.cfg.Manager.Mode == config.ManagerExternal {
		o.Given = filepath.Join(n.cfg.DataDir, givenFile)
	}
	if f.Close == config.CloseHalfClose {
		o.Closing = failover.HalfClose
	}
	for i := range n.cfg.Cluster.Nodes {
		if name := n.cfg.Cluster.Nodes[i].Name; name != c.name {
			o.Others = append(o.Others, name)
		}
	}
	a := vipagent.New(o)
	c.agent.Store(a)
	a.Start()
}

// floatingUnit is a unit whose period of service the registry has given by Take.
type floatingUnit struct {
	*unit.Unit
	n *Node
}

// Begin implements vipagent.Unit. Locks that are to be forgotten at this start are
// those of fixed addresses: a floating one may be taken at any time.
func (u floatingUnit) Begin(ctx context.Context, v mgs.VIP) error {
	v, err := u.n.afterCrash(ctx, v)
	if err != nil {
		return err
	}
	return u.Unit.Begin(ctx, v, false)
}

// silenceFloating gives all floating addresses up. Somebody may take them first.
func (n *Node) silenceFloating(ctx context.Context) {
	if n.cluster == nil {
		return
	}
	a := n.cluster.agent.Load()
	if a == nil {
		return
	}
	if n.cfg.Manager.Mode == config.ManagerBuiltin {
		wctx, cancel := context.WithTimeout(ctx, time.Duration(n.cfg.Failover.StopWait))
		a.Leave(wctx, n.cluster.othersServe)
		cancel()
	}
	a.Silence()
}

// stopFloating ends what has to do with floating addresses, and gives up those that there
// are still.
func (n *Node) stopFloating(ctx context.Context) error {
	if n.net == nil {
		return nil
	}
	if n.cluster != nil {
		if a := n.cluster.agent.Load(); a != nil {
			// The rest of the stop needs its time, too. This is what Config.GiveUpTime has
			// besides the wait.
			sctx, cancel := context.WithTimeout(ctx, n.cfg.Failover.Stages()+time.Duration(n.cfg.NFS.DrainTimeout))
			defer cancel()
			if !a.Stop(sctx) {
				n.log.Warn("the registry could not be told that addresses were given up; their next owners act as after a crash")
			}
			n.cluster.agent.Store(nil)
		}
	}
	err := n.net.Close()
	n.net = nil
	return err
}

// othersServe tells whether another node that answers beats may serve an address.
func (c *cluster) othersServe(v *mgs.VIP) bool {
	return slices.ContainsFunc(c.cfg.Cluster.Nodes, func(x config.ClusterNode) bool {
		return x.Name != c.name && c.lives.has(x.Name) && (len(v.Prefer) == 0 || slices.Contains(v.Prefer, x.Name))
	})
}

// superseded tells the agent that somebody serves an address with an epoch.
func (c *cluster) superseded(index uint32, epoch uint64) {
	if a := c.agent.Load(); a != nil {
		a.Superseded(index, epoch)
	}
}

// fenced is called when a target says that an address has a newer owner.
func (n *Node) fenced(index uint32, epoch uint64) {
	if n.cluster != nil {
		n.cluster.superseded(index, epoch+1)
	}
}

// ofAgent answers what other nodes ask of this one's addresses.
func (c *cluster) ofAgent(answer func(*vipagent.Agent, context.Context, string, json.RawMessage) (any, error)) func(context.Context, string, json.RawMessage) (any, error) {
	return func(ctx context.Context, from string, args json.RawMessage) (any, error) {
		a := c.agent.Load()
		if a == nil {
			return nil, errors.New("this node serves no floating addresses (yet)")
		}
		return answer(a, ctx, from, args)
	}
}

// AddressReports tells how the floating addresses are on this node.
func (n *Node) AddressReports() []vipagent.Report {
	if n.cluster == nil {
		return nil
	}
	a := n.cluster.agent.Load()
	if a == nil {
		return nil
	}
	return a.Reports()
}

// localAddresses is AddressReports for displays, by index.
func (n *Node) localAddresses() map[uint32]status.VIPLocal {
	m := map[uint32]status.VIPLocal{}
	for _, r := range n.AddressReports() {
		m[r.Index] = status.VIPLocal{Node: n.cluster.name, Epoch: r.Epoch, State: string(r.State), Since: r.Since, Reason: r.Reason}
	}
	return m
}

var errNoFloating = errors.New("this node serves no floating addresses: set nfs.floating = true, or wait until it has found the registry and the MDT (\"baton status\")")

var errStops = errors.New("this node stops and takes no addresses")

func (n *Node) agent() (*vipagent.Agent, error) {
	if n.cluster != nil {
		if a := n.cluster.agent.Load(); a != nil {
			return a, nil
		}
	}
	if n.stopping.Load() {
		return nil, errStops
	}
	return nil, errNoFloating
}

// unserved is how an address is at a node without an agent.
func (n *Node) unserved(addr netip.Addr) vipctl.Result {
	yet := " (yet)"
	if n.stopping.Load() {
		yet = " any more: it stops"
	}
	return vipctl.Result{State: vipctl.Unknown, Text: addr.String() + ": this node serves no floating addresses" + yet}
}

// TakeVIP implements vipctl.Mover.
func (n *Node) TakeVIP(ctx context.Context, args vipctl.TakeArgs) (vipctl.Result, error) {
	a, err := n.agent()
	if err == nil && n.stopping.Load() {
		err = errStops
	}
	if err != nil {
		return vipctl.Result{}, err
	}
	return a.TakeVIP(ctx, args)
}

// ReadyVIP implements vipctl.Mover. It is what the manager is told of this node.
func (n *Node) ReadyVIP(context.Context) error {
	r := manager.Report{Reason: "its frontend has not started"}
	if n.cluster != nil {
		n.vitals(&r)
	}
	switch {
	case r.Stopping:
		return errStops
	case n.cluster == nil:
		return errNoFloating
	case !r.Ready:
		return fmt.Errorf("this node cannot serve addresses: %s", r.Reason)
	}
	return nil
}

// ReleaseVIP implements vipctl.Mover.
func (n *Node) ReleaseVIP(ctx context.Context, args vipctl.ReleaseArgs) (vipctl.Result, error) {
	a, err := n.agent()
	if err != nil {
		return n.unserved(args.Addr), nil
	}
	return a.ReleaseVIP(ctx, args)
}

// CheckVIP implements vipctl.Mover.
func (n *Node) CheckVIP(ctx context.Context, args vipctl.CheckArgs) (vipctl.Result, error) {
	a, err := n.agent()
	if err != nil {
		return n.unserved(args.Addr), nil
	}
	return a.CheckVIP(ctx, args)
}
