package node

import (
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
)

// noIR: this node takes no part in imperative recovery.
func (c *cluster) noIR() bool { return c.cfg.Recovery.Imperative == config.ImperativeOff }

// tableConfig is for the table of targets, if the registry runs here.
func (c *cluster) tableConfig() ir.Config {
	return ir.Config{Disabled: c.noIR(), Startup: time.Duration(c.cfg.Recovery.IRStartup)}
}

// watchOptions are those of the node's watch at the registry: what it tells reaches
// everybody in this process.
func (c *cluster) watchOptions() ir.Options {
	at := c.reach(config.MGSName)
	return ir.Options{
		Node: c.name, Addrs: at.Addrs, Dial: at.Dial, Able: !c.noIR(), BackoffMax: maxPause, Logger: c.log,
		OnNews: func(t ir.Target) { c.heard(t.Name, t.Instance, t.Node) },
	}
}

// announce tells the registry that a target takes connections here. When all its
// clients are told, it need not wait as long for them.
func (c *cluster) announce(h *hosted) {
	f := h.front()
	if f == nil {
		return // the registry itself
	}
	c.ir.Announce(h.Name, f.Instance(), c.noIR(), func(t ir.Taken) {
		if t.State == ir.StateFull && !t.Late && !c.noIR() {
			f.Shorten(c.cfg.Recovery.IRFactor)
		}
	})
}

// table is the table of targets, if the registry runs here, or nil.
func (c *cluster) table() *ir.Hub {
	if c.etcd != nil {
		return c.etcd.table()
	}
	h := c.byName[config.MGSName]
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mgs == nil {
		return nil
	}
	return h.mgs.Service().Table()
}

// irStatus is what metrics show without asking anybody.
func (n *Node) irStatus(s *status.Status) {
	c := n.cluster
	if c == nil {
		return
	}
	w := c.ir.Status()
	s.IR = &status.IR{Connected: w.Connected, Imperative: w.Able, Incarnation: w.Incarnation, Version: w.Version, State: string(w.State)}
	if t := c.table(); t != nil {
		if st, _, ok := t.Status(); ok {
			s.IR.Registry = registryStatus(&st)
		}
	}
}

func registryStatus(st *ir.Status) *status.RecoveryRegistry {
	r := &status.RecoveryRegistry{
		Incarnation: st.Incarnation, Version: st.Version, State: string(st.State), StartupLeft: st.StartupLeft, NonIR: st.NonIR,
		NotifyCount: st.NotifyCount, NotifyTotal: st.NotifyTotal, NotifyMax: st.NotifyMax, NotifyPending: st.Pending,
	}
	for _, n := range st.Nodes {
		r.Nodes = append(r.Nodes, status.RecoveryNode{Name: n.Name, Watching: n.Watching, Imperative: n.Able, Version: n.Version, Current: n.Version == st.Version})
	}
	return r
}
