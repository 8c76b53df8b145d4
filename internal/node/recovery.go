package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// askTime bounds a question to another node for a display.
const askTime = 2 * time.Second

// RecoveryStatus describes the recovery of all targets. Those on other nodes are asked
// for; what does not answer in time is said not to.
func (n *Node) RecoveryStatus(ctx context.Context) status.Recovery {
	c := n.cluster
	if c == nil {
		return n.aloneRecovery()
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	r := status.Recovery{Node: c.name}
	var st ir.Status
	var err error
	names := map[string]string{}
	var wg sync.WaitGroup
	wg.Go(func() {
		if st, err = c.ir.Ask(ctx); err != nil {
			return
		}
		// Without them clients that are not connected have an ID only.
		if l, err := n.reg.Clients(ctx); err == nil {
			for node, id := range l {
				names[fmt.Sprintf("%x", id[:])] = node
			}
		}
	})
	w := c.ir.Status()
	known := map[string]ir.Target{}
	for _, t := range w.Targets {
		known[t.Name] = t
	}
	r.Targets = make([]status.RecoveryTarget, 0, len(c.hosted))
	for _, h := range c.hosted {
		if h.kind != status.KindMGS {
			r.Targets = append(r.Targets, status.RecoveryTarget{Name: h.Name, Kind: h.kind})
		}
	}
	for i := range r.Targets {
		wg.Go(func() { n.recoveryOf(ctx, &r.Targets[i], known) })
	}
	wg.Wait()
	if err != nil {
		r.RegistryError = err.Error()
	} else {
		r.Registry = registryStatus(&st)
	}
	r.Watch = &status.RecoveryWatch{
		Connected: w.Connected, At: w.At, Since: w.Since, Imperative: w.Able, Incarnation: w.Incarnation, Version: w.Version, State: string(w.State),
		Current: w.Connected && err == nil && w.Incarnation == st.Incarnation && w.Version == st.Version,
	}
	if w.Err != nil {
		r.Watch.Error = w.Err.Error()
	}
	for i := range r.Targets {
		for j := range r.Targets[i].Clients {
			if k := &r.Targets[i].Clients[j]; k.Node == "" {
				k.Node = names[k.ID]
			}
		}
	}
	return r
}

// recoveryOf fills in what is known of a target, by whoever runs it.
func (n *Node) recoveryOf(ctx context.Context, x *status.RecoveryTarget, known map[string]ir.Target) {
	c := n.cluster
	if !c.localRecovery(x) {
		t, listed := known[x.Name]
		at := t.Node
		if !listed || !t.Up {
			at = n.imported(x.Name)
		}
		x.Node, x.Instance = at, t.Instance
		switch {
		case at == "" && listed:
			x.State = recov.StateStopped.String()
			x.Node = t.Node
		case at == "":
			x.Error = "nobody knows where it runs"
		default:
			if err := c.inspect(ctx, at, x); err != nil {
				x.Error = fmt.Sprintf("node %s does not tell: %v", at, err)
			}
		}
	}
	if t, ok := known[x.Name]; ok {
		x.Version = t.Version
		x.NoIR = x.NoIR || t.NoIR
	}
}

// imported is the node with which this node's frontend has a target, "" if none.
func (n *Node) imported(name string) string {
	if !n.up.Load() {
		return ""
	}
	var s status.Status
	n.importStatus(&s)
	for _, im := range s.Imports {
		if im.Target == name && im.State == status.ImportFull && im.Node != n.cluster.name {
			return im.Node
		}
	}
	return ""
}

// localRecovery describes a target that runs on this node; false if it does not.
func (c *cluster) localRecovery(x *status.RecoveryTarget) bool {
	h := c.byName[x.Name]
	if h == nil {
		return false
	}
	f := h.front()
	if f == nil {
		return false
	}
	x.Node, x.Kind = c.name, h.kind
	describeRecovery(x, f)
	x.NoIR, x.Factor = c.noIR(), c.cfg.Recovery.IRFactor
	if t, ok := c.ir.Announced(x.Name); ok {
		x.IR = string(t.State)
	}
	return true
}

// describeRecovery fills in what a front tells. The MDT's own client is left out.
func describeRecovery(x *status.RecoveryTarget, f *front.Front) {
	st, now := f.Status(), time.Now()
	r := &st.Recovery
	x.State, x.Instance = r.State.String(), r.Instance
	x.Known, x.Finished, x.Evicted, x.Replayed, x.Shortened = r.Clients, r.Finished, r.Evicted, r.Replayed, r.Tenths != 0
	at := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	x.Start, x.End = at(r.Start), at(r.End)
	if !st.Serving {
		x.Deadline, x.Hard = at(r.Deadline), at(r.Hard)
		x.Left = max(r.Deadline.Sub(now), 0)
	}
	switch {
	case r.Start.IsZero():
	case r.End.IsZero():
		x.Took = now.Sub(r.Start)
	default:
		x.Took = r.End.Sub(r.Start)
	}
	for i := range st.Clients {
		if k := &st.Clients[i]; k.Client != host.AgentID(mdtName) || x.Kind != status.KindMDT {
			x.Clients = append(x.Clients, status.RecoveryClient{
				ID: fmt.Sprintf("%x", k.Client[:]), Generation: k.Gen, Node: k.Node, State: clientState(k, !st.Serving),
			})
		}
	}
}

func clientState(k *front.Client, recovering bool) string {
	switch {
	case recovering && k.Missing:
		return status.ClientMissing
	case !k.Connected:
		return status.ClientAway
	case recovering && k.Finished:
		return status.ClientFinished
	case recovering && k.Stage != "":
		return status.ClientReplaying
	}
	return status.ClientConnected
}

func (n *Node) aloneRecovery() status.Recovery {
	r := status.Recovery{Node: n.cfg.Node, Alone: true}
	add := func(name, kind string, f *front.Front) {
		x := status.RecoveryTarget{Name: name, Kind: kind, Node: n.cfg.Node}
		describeRecovery(&x, f)
		r.Targets = append(r.Targets, x)
	}
	add(mdtName, status.KindMDT, n.targets.mdt.Front())
	for i, o := range n.targets.osts {
		add(ostName(i), status.KindOST, o.Front())
	}
	return r
}

// inspectName is the name by which every node of a cluster answers what others ask a
// node, and not a target.
const inspectName = "NODE"

// inspected answers for this node.
type inspected struct {
	c    *cluster
	from string // who asks
}

// Accept implements wire.Acceptor.
func (s inspected) Accept(p wire.Peer) wire.Target { return inspected{s.c, p.Node} }

// MayBlock implements wire.Blocker: to decide may mean to wait for the registry.
func (inspected) MayBlock(op wire.Op) bool { return op == wire.OpNode }

// TryHandle implements wire.Target.
func (inspected) TryHandle(*wire.Request, *wire.Reply) bool { return false }

// Handle implements wire.Target.
func (s inspected) Handle(req *wire.Request, rep *wire.Reply, done func()) {
	rep.Reset()
	rep.XID = req.XID
	x := status.RecoveryTarget{Name: string(req.Name)}
	switch {
	case req.Op == wire.OpPing:
	case req.Op == wire.OpNode:
		s.c.asks.answer(s.c.ctx, s.from, req, rep)
	case req.Op != wire.OpInspect:
		rep.Status = wire.ErrNotSupp
	case !s.c.localRecovery(&x):
		rep.Status = wire.ErrNoEnt
	default:
		b, err := json.Marshal(&x)
		if err == nil && len(b) > wire.MaxData { // the figures, then, without the list
			x.Clients = nil
			b, err = json.Marshal(&x)
		}
		if err != nil {
			rep.Status = wire.ErrServerFault
		}
		rep.Data = append(rep.Data, b...)
	}
	done()
}

var errNotThere = errors.New("it does not run there")

// inspect asks the node which runs a target about it.
func (c *cluster) inspect(ctx context.Context, node string, x *status.RecoveryTarget) error {
	if node == c.name {
		return errNotThere
	}
	conn, err := tcp.Dial(ctx, c.dialOptions(node, inspectName))
	if err != nil {
		return err
	}
	defer conn.Close()
	req := wire.Request{Header: wire.Header{Op: wire.OpInspect, XID: 1}, Name: []byte(x.Name)}
	var rep wire.Reply
	if err := conn.Call(ctx, &req, &rep); err != nil {
		return err
	}
	switch rep.Status {
	case wire.OK:
	case wire.ErrNoEnt:
		return errNotThere
	default:
		return rep.Status
	}
	var got status.RecoveryTarget
	if err := json.Unmarshal(rep.Data, &got); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	got.Name, got.Kind, got.Node = x.Name, x.Kind, node
	*x = got
	return nil
}
