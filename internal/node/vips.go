package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// vipSources is where what the commands for addresses show comes from on this node.
// A field that is nil has nothing.
type vipSources struct {
	// local describes the floating addresses here, by index.
	local func() map[uint32]status.VIPLocal
	log   interface {
		Since(seq uint64) ([]events.Event, uint64)
	}
}

// askEvents is the method by which nodes ask each other for events.
const askEvents = "events"

// floating is the registry's part for floating addresses.
func (n *Node) floating() (mgs.Floating, error) {
	if n.cluster == nil {
		return nil, errors.New("this node is alone: addresses move in a cluster only")
	}
	var reg any = n.cluster.reg
	f, ok := reg.(mgs.Floating)
	if !ok {
		return nil, errors.New("the registry has no floating addresses")
	}
	return f, nil
}

// view reads the registry.
func (n *Node) view(ctx context.Context) (mgs.Floating, mgs.View, error) {
	f, err := n.floating()
	if err != nil {
		return nil, mgs.View{}, err
	}
	v, err := f.Watch(ctx, "")
	return f, v, err
}

func findVIP(v *mgs.View, addr netip.Addr) (*mgs.VIP, error) {
	i := slices.IndexFunc(v.VIPs, func(x mgs.VIP) bool { return x.Addr == addr })
	switch {
	case i < 0:
		return nil, fmt.Errorf("there is no address %s; \"baton vip list\" shows them, \"baton vip add\" adds one", addr)
	case v.VIPs[i].Bits == 0:
		return nil, fmt.Errorf("%s does not float: a node has it in nfs.addresses, or it was removed", addr)
	}
	return &v.VIPs[i], nil
}

func vipStatus(v *mgs.VIP, local map[uint32]status.VIPLocal) status.VIP {
	s := status.VIP{Addr: v.Addr.String(), Index: v.Index, Epoch: v.Epoch, Verifier: v.Verifier, Floating: &status.Floating{
		Bits: v.Bits, Interface: v.Interface, Prefer: v.Prefer, Node: v.Node, Clean: v.Clean, Next: v.Next, MoveID: v.MoveID, Ready: v.Ready,
		Drained: v.Drained, Removed: v.Removed, NSMState: v.NSMState,
	}}
	if l, ok := local[v.Index]; ok {
		s.Floating.Local = &l
	}
	return s
}

func (n *Node) localVIPs() map[uint32]status.VIPLocal {
	if n.cluster != nil {
		if s := n.cluster.sources.Load(); s != nil && s.local != nil {
			return s.local()
		}
	}
	return nil
}

// ListVIPs describes the floating addresses, as the registry has them and as they are
// on this node.
func (n *Node) ListVIPs(ctx context.Context) ([]status.VIP, error) {
	_, v, err := n.view(ctx)
	if err != nil {
		return nil, err
	}
	l, local := []status.VIP{}, n.localVIPs()
	for i := range v.VIPs {
		if v.VIPs[i].Bits != 0 {
			l = append(l, vipStatus(&v.VIPs[i], local))
		}
	}
	return l, nil
}

// known refuses nodes that are not in the configuration.
func (n *Node) known(nodes ...string) error {
	for _, x := range nodes {
		if n.cluster != nil && n.cfg.Cluster.Addr(x) == "" {
			return fmt.Errorf("there is no node %q; \"baton node list\" shows them", x)
		}
	}
	return nil
}

// AddVIP enters a floating address.
func (n *Node) AddVIP(ctx context.Context, s mgs.VIPSpec) (status.VIP, error) {
	return n.change(s, func(f mgs.Floating) (mgs.VIP, error) { return f.AddVIP(ctx, s) })
}

// SetVIP changes the settings of a floating address.
func (n *Node) SetVIP(ctx context.Context, s mgs.VIPSpec) (status.VIP, error) {
	return n.change(s, func(f mgs.Floating) (mgs.VIP, error) { return f.SetVIP(ctx, s) })
}

func (n *Node) change(s mgs.VIPSpec, do func(mgs.Floating) (mgs.VIP, error)) (status.VIP, error) {
	f, err := n.floating()
	if err == nil {
		err = n.known(s.Prefer...)
	}
	if err != nil {
		return status.VIP{}, err
	}
	v, err := do(f)
	if err != nil {
		return status.VIP{}, err
	}
	return vipStatus(&v, n.localVIPs()), nil
}

// abandon tells the registry that the node which serves an address is gone.
func (n *Node) abandon(ctx context.Context, v *mgs.VIP) error {
	if v.Free() {
		return nil
	}
	n.log.Warn("the node that serves the address is declared gone by order", "addr", v.Addr, "peer", v.Node, "epoch", v.Epoch)
	return n.cluster.reg.Abandoned(ctx, v.Index, v.Epoch)
}

// abandonFixed tells the registry that the node which had an address in its nfs.addresses is
// gone for good, so that another one may have it there, or it may float. The order is refused
// if the node answers.
func (n *Node) abandonFixed(ctx context.Context, v *mgs.VIP) error {
	switch {
	case v.Free():
		return fmt.Errorf("%s does not float, and nobody serves it: it can be served by any node, and \"baton vip add\" adds it", v.Addr)
	case n.reaches(ctx, v.Node):
		return fmt.Errorf("node %s, which has %s in nfs.addresses, is alive: take the address out there and restart baton in order", v.Node, v.Addr)
	}
	return n.abandon(ctx, v)
}

// reachTime bounds the question whether a node is there.
const reachTime = 2 * time.Second

// reaches tells whether a node answers; two that have no business exchange no beats.
func (n *Node) reaches(ctx context.Context, node string) bool {
	if node == n.cluster.name || n.cluster.lives.has(node) {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	return n.known(node) == nil && n.cluster.ask(ctx, node, askEvents, eventsAsk{}, &eventsPage{}) == nil
}

// RemoveVIP has an address given up for good. With force the node that serves it is
// known to be gone; then it may be a fixed address, too.
func (n *Node) RemoveVIP(ctx context.Context, addr netip.Addr, force bool) error {
	f, view, err := n.view(ctx)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(view.VIPs, func(x mgs.VIP) bool { return x.Addr == addr }); force && i >= 0 && view.VIPs[i].Bits == 0 {
		return n.abandonFixed(ctx, &view.VIPs[i])
	}
	v, err := findVIP(&view, addr)
	if err != nil {
		return err
	}
	x, err := f.RemoveVIP(ctx, v.Index)
	if err == nil && force && x.Removed {
		err = n.abandon(ctx, &x)
	}
	return err
}

// assignTries bounds how often an assignment is decided anew because a period of
// service has ended meanwhile.
const assignTries = 4

// MoveVIP assigns an address to a node; the move itself follows. With force the node
// that serves it is known to be gone.
func (n *Node) MoveVIP(ctx context.Context, addr netip.Addr, to string, force bool) (control.VIPMoved, error) {
	if err := n.known(to); err != nil {
		return control.VIPMoved{}, err
	}
	for try := 1; ; try++ {
		f, view, err := n.view(ctx)
		if err != nil {
			return control.VIPMoved{}, err
		}
		v, err := findVIP(&view, addr)
		if err != nil {
			return control.VIPMoved{}, err
		}
		m := control.VIPMoved{To: to}
		if !v.Free() {
			m.From = v.Node
		}
		x, err := f.Assign(ctx, v.Index, v.Epoch, to)
		if err == nil && force && m.From != to {
			err = n.abandon(ctx, v)
		}
		var e *mgs.Error
		if errors.As(err, &e) && e.Code == mgs.CodeSuperseded && try < assignTries {
			continue
		}
		m.MoveID = x.MoveID
		if err == nil {
			n.log.Info("address was assigned by order", "addr", addr, "from", m.From, "to", to, "move", m.MoveID, "force", force)
		}
		return m, err
	}
}

// DrainVIP has an address served by nobody, or again: then by the given node, or by whom
// the builtin manager chooses, to which the order of a node would be one of an
// administrator: it would leave the address there. Without that manager it is the best of
// those that are not drained and not known to be silent.
func (n *Node) DrainVIP(ctx context.Context, addr netip.Addr, drained bool, to string) (control.VIPMoved, error) {
	var view mgs.View
	var x mgs.VIP
	for try := 1; ; try++ { // the settings may change between the question and the order
		f, now, err := n.view(ctx)
		if err != nil {
			return control.VIPMoved{}, err
		}
		v, err := findVIP(&now, addr)
		if err != nil {
			return control.VIPMoved{}, err
		}
		was, s := v.Spec(), v.Spec()
		s.Was, s.Drained = &was, drained
		view = now
		if x, err = f.SetVIP(ctx, s); err == nil {
			break
		}
		var e *mgs.Error
		if !errors.As(err, &e) || e.Code != mgs.CodeChanged || try == assignTries {
			return control.VIPMoved{}, err
		}
	}
	n.log.Info("address is drained, or no longer, by order", "addr", addr, "drained", drained)
	m := control.VIPMoved{MoveID: x.MoveID}
	if !x.Free() {
		m.From = x.Node
	}
	if drained {
		return m, nil
	}
	if to == "" && n.cfg.Manager.Mode != config.ManagerBuiltin {
		to = bestNode(&x, view.Drained, n.silent())
	}
	if to == "" {
		return m, nil
	}
	return n.MoveVIP(ctx, addr, to, false)
}

// bestNode chooses who gets an address back: of its preferred nodes, or, without any,
// the one that had it last.
func bestNode(v *mgs.VIP, drained []string, silent map[string]bool) string {
	l := v.Prefer
	if len(l) == 0 && v.Node != "" {
		l = []string{v.Node}
	}
	l = slices.DeleteFunc(slices.Clone(l), func(x string) bool { return slices.Contains(drained, x) })
	for _, x := range l {
		if !silent[x] {
			return x
		}
	}
	if len(l) > 0 {
		return l[0]
	}
	return ""
}

// silent are the nodes that do not answer beats.
func (n *Node) silent() map[string]bool {
	m := map[string]bool{}
	for _, p := range n.cluster.health.Status() {
		if p.State == health.StateSuspect {
			m[p.Name] = true
		}
	}
	return m
}

// ListNodes describes the nodes of the cluster with regard to floating addresses.
func (n *Node) ListNodes(ctx context.Context) ([]status.ClusterNode, error) {
	_, v, err := n.view(ctx)
	if err != nil {
		return nil, err
	}
	var s status.Status
	n.peerStatus(&s)
	l := []status.ClusterNode{}
	for _, c := range n.cfg.Cluster.Nodes {
		x := status.ClusterNode{Name: c.Name, This: c.Name == n.cluster.name, State: status.PeerIdle, Drained: slices.Contains(v.Drained, c.Name), Serves: []string{}}
		if x.This {
			x.State = "this"
		}
		for _, p := range s.Peers {
			if p.Node == c.Name {
				x.State, x.Silence, x.Slow = p.State, p.Silence, p.Slow
			}
		}
		for i := range v.VIPs {
			a := &v.VIPs[i]
			switch {
			case a.Bits == 0:
			case !a.Free() && a.Node == c.Name:
				x.Serves = append(x.Serves, a.Addr.String())
			case a.Next == c.Name:
				x.Next = append(x.Next, a.Addr.String())
			}
		}
		l = append(l, x)
	}
	return l, nil
}

// DrainNode marks a node as one that is to have no addresses, or takes the mark away.
// The manager moves what it has.
func (n *Node) DrainNode(ctx context.Context, node string, drained bool) error {
	f, err := n.floating()
	if err == nil {
		err = n.known(node)
	}
	if err == nil {
		err = f.SetDrained(ctx, node, drained)
	}
	if err == nil {
		n.log.Info("node is drained, or no longer, by order", "peer", node, "drained", drained)
	}
	return err
}

// eventsAsk is the argument of askEvents.
type eventsAsk struct {
	Since uint64     `json:"since"`
	After time.Time  `json:"after,omitzero"`
	Addr  netip.Addr `json:"addr,omitzero"`
}

// eventsPage is its result: some events behind Since, and what to ask for next.
type eventsPage struct {
	Events []events.Event `json:"events"`
	Next   uint64         `json:"next"`
	More   bool           `json:"more,omitempty"`
}

// eventsBytes bounds the events of a page, one of which is far smaller than the rest
// of an answer.
const eventsBytes = wire.MaxData / 2

// localEvents is what this node's log has.
func (c *cluster) localEvents(a eventsAsk) (p eventsPage, err error) {
	s := c.sources.Load()
	if s == nil || s.log == nil {
		return p, nil
	}
	l, next := s.log.Since(a.Since)
	size := 0
	for i := range l {
		e := &l[i]
		if e.Time.Before(a.After) || a.Addr.IsValid() && e.Addr.IsValid() && e.Addr != a.Addr {
			continue
		}
		b, err := json.Marshal(e)
		if err != nil {
			return p, err
		}
		if size += len(b); size > eventsBytes && len(p.Events) > 0 {
			p.Next, p.More = p.Events[len(p.Events)-1].Seq, true
			return p, nil
		}
		p.Events = append(p.Events, *e)
	}
	p.Next = next
	return p, nil
}

func (c *cluster) answerEvents(_ context.Context, _ string, raw json.RawMessage) (any, error) {
	var a eventsAsk
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, err
	}
	return c.localEvents(a)
}

const (
	// eventsPause is how often the nodes are asked while a caller waits.
	eventsPause = 100 * time.Millisecond
	// eventsAnswer bounds the wait for a node's answer.
	eventsAnswer = time.Second
	// maxEventPages bounds what is taken from one node in one call.
	maxEventPages = 256
)

// Events collects the events of all nodes. Nodes that do not answer are named, and not
// asked again in this call.
func (n *Node) Events(ctx context.Context, a control.EventsArgs) (control.Events, error) {
	r := control.Events{Events: []events.Event{}, Next: map[string]uint64{}, Silent: map[string]string{}}
	if n.cluster == nil {
		return r, errors.New("this node is alone: no address moves, and there are no events")
	}
	ctx, cancel := context.WithTimeout(ctx, min(max(a.Wait, 0), control.MaxEventsWait)+eventsAnswer)
	defer cancel()
	for node, seq := range a.Since {
		if n.known(node) == nil {
			r.Next[node] = seq
		}
	}
	end := time.Now().Add(min(a.Wait, control.MaxEventsWait))
	for {
		n.gather(ctx, a, &r)
		if len(r.Events) > 0 || !time.Now().Before(end) {
			break
		}
		t := time.NewTimer(eventsPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return r, ctx.Err()
		}
	}
	slices.SortStableFunc(r.Events, func(x, y events.Event) int { return x.Time.Compare(y.Time) })
	return r, nil
}

// gather asks every node once.
func (n *Node) gather(ctx context.Context, a control.EventsArgs, r *control.Events) {
	ctx, cancel := context.WithTimeout(ctx, eventsAnswer)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range n.cfg.Cluster.Nodes {
		mu.Lock()
		since, silent := r.Next[c.Name], r.Silent[c.Name] != ""
		mu.Unlock()
		if silent {
			continue
		}
		wg.Go(func() {
			l, next, err := n.eventsOf(ctx, c.Name, eventsAsk{Since: since, After: a.After, Addr: a.Addr})
			mu.Lock()
			defer mu.Unlock()
			r.Events = append(r.Events, l...)
			if err != nil {
				r.Silent[c.Name] = err.Error()
			} else {
				r.Next[c.Name] = next
			}
		})
	}
	wg.Wait()
}

// eventsOf gets the events of one node.
func (n *Node) eventsOf(ctx context.Context, node string, a eventsAsk) (l []events.Event, next uint64, err error) {
	for range maxEventPages {
		var p eventsPage
		if node == n.cluster.name {
			p, err = n.cluster.localEvents(a)
		} else {
			err = n.cluster.ask(ctx, node, askEvents, a, &p)
		}
		if err != nil {
			return nil, a.Since, err
		}
		l = append(l, p.Events...)
		if a.Since = p.Next; !p.More {
			break
		}
	}
	return l, a.Since, nil
}
