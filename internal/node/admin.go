package node

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
)

// target finds a target that this node may have to do with.
func (n *Node) target(name string) (*cluster, *hosted, error) {
	if n.cluster == nil {
		return nil, nil, errors.New("this node is alone: its targets start and stop with it")
	}
	h := n.cluster.byName[name]
	if h == nil {
		return nil, nil, fmt.Errorf("there is no target %q; \"baton target list\" shows them", name)
	}
	return n.cluster, h, nil
}

// StartTarget starts a target on this node and waits until it serves or recovers.
// fenced names a node that can do nothing to its store any more.
func (n *Node) StartTarget(ctx context.Context, name, fenced string) error {
	c, h, err := n.target(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	if err := c.start(ctx, h, fenced); err != nil {
		return err
	}
	h.wanted.Store(true)
	return nil
}

// StopTarget stops a target on this node in order, or breaks its start off.
func (n *Node) StopTarget(ctx context.Context, name string) error {
	c, h, err := n.target(name)
	if err != nil {
		return err
	}
	h.wanted.Store(false)
	return c.stop(ctx, h)
}

// ListTargets describes all targets, also those that run elsewhere.
func (n *Node) ListTargets() []status.Target {
	var s status.Status
	n.targetStatus(&s)
	if n.cluster == nil {
		return s.Targets
	}
	if n.up.Load() {
		n.importStatus(&s)
	}
	l := make([]status.Target, 0, len(n.cluster.hosted))
	for _, h := range n.cluster.hosted {
		x := status.Target{Name: h.Name, Kind: h.kind, Dir: h.Dir, State: status.StateElsewhere}
		if h.MayRun(n.cluster.name) {
			x = n.hostedStatus(h)
			// Without a record, or without the directory, there is nothing to tell.
			if r, err := owner.Inspect(h.Dir); err == nil && r != nil {
				x.Owner = fmt.Sprintf("%s, %s, generation %d", r.Node, r.State, r.Generation)
			}
		}
		for _, im := range s.Imports {
			if im.Target == h.Name && im.State == status.ImportFull && im.Node != n.cluster.name {
				x.Node = im.Node
				if x.State == status.StateStopped {
					x.State, x.Reason = status.StateElsewhere, ""
				}
			}
		}
		l = append(l, x)
	}
	return l
}

// front is that of a target that runs here.
func (n *Node) front(name string) (*front.Front, error) {
	_, h, err := n.target(name)
	if err != nil {
		return nil, err
	}
	if f := h.front(); f != nil {
		return f, nil
	}
	if h.kind == status.KindMGS {
		return nil, errors.New("the registry has no clients to recover")
	}
	return nil, fmt.Errorf("%s does not run on this node; \"baton target list\" shows where it does: give the command there", name)
}

// AbortRecovery ends the recovery of a target that runs here: clients that are not
// through lose what they had there that was not on its disk.
func (n *Node) AbortRecovery(name string) error {
	f, err := n.front(name)
	if err != nil {
		return err
	}
	if !f.Abort() {
		return fmt.Errorf("%s is not in recovery", name)
	}
	n.log.Warn("recovery was ended by order", "target", name)
	return nil
}

// EvictClient removes a client, given by the name of the node whose frontend it is or by
// the beginning of its ID, from a target that runs here.
func (n *Node) EvictClient(name, who string) error {
	f, err := n.front(name)
	if err != nil {
		return err
	}
	var found []wire.ClientID
	for _, c := range f.Status().Clients {
		frontend := c.Client != host.AgentID(mdtName)
		if who != "" && (frontend && c.Node == who || strings.HasPrefix(fmt.Sprintf("%x", c.Client[:]), who)) {
			found = append(found, c.Client)
		}
	}
	switch {
	case len(found) == 0:
		return fmt.Errorf("%s has no client %q; \"baton target list --json\" shows them", name, who)
	case len(found) > 1:
		return fmt.Errorf("%q are %d clients of %s: give the ID of one, as \"baton target list --json\" shows it", who, len(found), name)
	}
	if !f.Evict(found[0]) {
		return fmt.Errorf("%s has no client %q any more", name, who)
	}
	n.log.Warn("client was evicted by order", "target", name, "client", fmt.Sprintf("%x", found[0][:]))
	return nil
}

// Deactivate has this frontend's requests to a target fail at once, instead of
// waiting for it; activate has them wait again.
func (n *Node) Deactivate(name string, activate bool) error {
	_, h, err := n.target(name)
	if err != nil {
		return err
	}
	if !n.up.Load() {
		return errors.New("this node serves no addresses (yet), so it sends nothing to targets")
	}
	var im *imp.Import
	switch h.kind {
	case status.KindMGS:
		return errors.New("only the MDT and OSTs can be deactivated")
	case status.KindMDT:
		im = n.fs.MDTImport()
	default:
		im = n.fs.OSTImport(h.index)
	}
	if activate {
		im.Activate()
	} else {
		im.Deactivate()
	}
	n.log.Warn("target was deactivated or activated by order", "target", name, "active", activate)
	return nil
}
