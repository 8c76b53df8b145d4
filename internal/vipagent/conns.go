package vipagent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
)

// MethodConns is the question by which a node tells others which connections one of its
// addresses has: connsArgs, connsResult.
const MethodConns = "conns"

// MethodKnown is the question by which the next owner of an address asks others which
// connections it had: knownArgs, knownResult. After a crash it may be one that has just
// come back, and that the last owner had no time to tell.
const MethodKnown = "conns-known"

// Bounds of what is told and kept. Clients beyond them reconnect without being woken up.
const (
	maxConns     = 4096 // of one address
	maxAddresses = 1024
)

// told is a connection in a message: the service port, and the client.
type told struct {
	Port   uint16         `json:"p"`
	Remote netip.AddrPort `json:"r"`
}

// connsArgs has the connections of an address, or what has changed since Base.
type connsArgs struct {
	Index uint32 `json:"index"`
	Epoch uint64 `json:"epoch"`
	// Seq numbers the list that the receiver has then; Base is that of the list to
	// which Add and Gone apply. Base 0: Add is the whole list.
	Seq  uint64 `json:"seq"`
	Base uint64 `json:"base,omitempty"`
	Add  []told `json:"add,omitempty"`
	Gone []told `json:"gone,omitempty"`
}

// connsResult tells which list the receiver has; another one than Seq: it needs the
// whole list.
type connsResult struct {
	Seq uint64 `json:"seq"`
}

// knownArgs names a period of service of an address, and how many of its connections
// the asker has been told in earlier answers.
type knownArgs struct {
	Index uint32 `json:"index"`
	Epoch uint64 `json:"epoch"`
	From  int    `json:"from,omitempty"`
}

// knownResult has its next connections, none if nothing more is known of that period.
type knownResult struct {
	Conns []told `json:"conns,omitempty"`
}

// maxPart bounds the connections in a message: with the longest addresses they take less
// than wire.MaxData.
const maxPart = 512

// asker asks another node.
type asker = func(ctx context.Context, node, method string, args, result any) error

// inParts is ask for lists of any length: one that a message has no room for goes in
// several, which the receiver takes for changes of the same list. Whoever has got a part
// only has not confirmed the list, and gets a whole one.
func inParts(ask asker) asker {
	return func(ctx context.Context, node, method string, args, result any) error {
		a, ok := args.(*connsArgs)
		if !ok || len(a.Gone)+len(a.Add) <= maxPart {
			return ask(ctx, node, method, args, result)
		}
		res := result.(*connsResult)
		part := connsArgs{Index: a.Index, Epoch: a.Epoch, Seq: a.Seq, Base: a.Base}
		for gone, add := a.Gone, a.Add; ; part.Base = a.Seq {
			n := min(len(gone), maxPart)
			m := min(len(add), maxPart-n)
			part.Gone, part.Add = gone[:n], add[:m]
			gone, add = gone[n:], add[m:]
			*res = connsResult{}
			if err := ask(ctx, node, method, &part, res); err != nil || res.Seq != a.Seq || len(gone)+len(add) == 0 {
				return err
			}
		}
	}
}

// book has the connections that clients have with addresses elsewhere.
type book struct {
	mu sync.Mutex
	m  map[uint32]*page
}

type page struct {
	node  string
	epoch uint64
	seq   uint64
	conns map[told]struct{}
}

// HandleConns takes what another node tells of its connections.
func (a *Agent) HandleConns(_ context.Context, from string, raw json.RawMessage) (any, error) {
	var args connsArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", MethodConns, err)
	}
	return a.book.enter(from, &args)
}

// HandleKnown tells another node what was told here of an address's connections.
func (a *Agent) HandleKnown(_ context.Context, _ string, raw json.RawMessage) (any, error) {
	var args knownArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", MethodKnown, err)
	}
	l := a.book.known(args.Index, args.Epoch)
	l = l[min(max(args.From, 0), len(l)):]
	return knownResult{Conns: l[:min(maxPart, len(l))]}, nil
}

func (b *book) enter(from string, a *connsArgs) (connsResult, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.m[a.Index]
	if p != nil && (a.Epoch < p.epoch || a.Epoch == p.epoch && from != p.node) {
		return connsResult{}, fmt.Errorf("address %d has epoch %d: what is told of epoch %d is old", a.Index, p.epoch, a.Epoch)
	}
	if p != nil && a.Epoch == p.epoch && a.Seq < p.seq {
		return connsResult{Seq: p.seq}, nil // it was long on its way
	}
	if a.Base != 0 && (p == nil || p.epoch != a.Epoch || p.seq != a.Base) {
		return connsResult{}, nil
	}
	if a.Base == 0 {
		if b.m == nil {
			b.m = map[uint32]*page{}
		}
		if p == nil && len(b.m) >= maxAddresses {
			return connsResult{}, fmt.Errorf("connections of %d addresses are known, more are not kept", len(b.m))
		}
		p = &page{node: from, epoch: a.Epoch, conns: map[told]struct{}{}}
		b.m[a.Index] = p
	}
	for _, c := range a.Gone {
		delete(p.conns, c)
	}
	for _, c := range a.Add {
		if len(p.conns) < maxConns && c.Remote.IsValid() {
			p.conns[c] = struct{}{}
		}
	}
	p.seq = a.Seq
	return connsResult{Seq: p.seq}, nil
}

// known gives what was told of an address's period of service, in a fixed order.
func (b *book) known(index uint32, epoch uint64) []told {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.m[index]
	if p == nil || p.epoch != epoch {
		return nil
	}
	return slices.SortedFunc(maps.Keys(p.conns), told.compare)
}

func (t told) compare(u told) int {
	return cmp.Or(t.Remote.Compare(u.Remote), cmp.Compare(t.Port, u.Port))
}

// snapshot is the connections of an address at one time.
func snapshot(u Unit) map[told]struct{} {
	m := map[told]struct{}{}
	for _, c := range u.Conns() {
		if len(m) == maxConns {
			break
		}
		m[told{c.Local.Port(), c.Remote}] = struct{}{}
	}
	return m
}

// teller tells the nodes that may serve an address next which connections it has.
type teller struct {
	k     *keeper
	u     Unit
	epoch uint64

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	seq uint64

	// Of whole and rest: the list that was told last, and its number.
	said   map[told]struct{}
	saidAs uint64
}

func (k *keeper) startTeller(u Unit, epoch uint64) *teller {
	t := &teller{k: k, u: u, epoch: epoch}
	t.ctx, t.cancel = context.WithCancel(k.a.ctx)
	boxes := make(map[string]chan struct{}, len(k.a.o.Others))
	for _, node := range k.a.o.Others {
		box := make(chan struct{}, 1)
		box <- struct{}{} // the list as it is now
		boxes[node] = box
		t.wg.Go(func() { t.keep(node, box) })
	}
	t.wg.Go(func() {
		for {
			select {
			case <-t.ctx.Done():
				return
			case <-u.Changed():
			}
			for _, box := range boxes {
				again(box)
			}
			wait(t.ctx, tellPause)
		}
	})
	return t
}

func (t *teller) next() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seq++
	return t.seq
}

// keep keeps one node informed.
func (t *teller) keep(node string, box chan struct{}) {
	var base uint64
	var has map[told]struct{}
	pause := t.k.a.o.Retry
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-box:
		case <-time.After(tellAgain):
			// It may have been started anew, and know nothing: then it does not have the list
			// to which no change applies.
		}
		if !t.k.successor(node) {
			base = 0
			wait(t.ctx, t.k.a.o.RetryMax)
			again(box)
			continue
		}
		list := snapshot(t.u)
		args := connsArgs{Index: t.k.index, Epoch: t.epoch, Seq: t.next(), Base: base}
		for c := range list {
			if _, ok := has[c]; base == 0 || !ok {
				args.Add = append(args.Add, c)
			}
		}
		for c := range has {
			if _, ok := list[c]; base != 0 && !ok {
				args.Gone = append(args.Gone, c)
			}
		}
		var res connsResult
		ctx, cancel := context.WithTimeout(t.ctx, registryTime)
		err := t.k.a.o.Ask(ctx, node, MethodConns, &args, &res)
		cancel()
		if err == nil && res.Seq == args.Seq {
			base, has, pause = args.Seq, list, t.k.a.o.Retry
			continue
		}
		if base = 0; err != nil {
			wait(t.ctx, pause)
			// One that is back may be asked to take the address the next moment.
			pause = min(2*pause, tellAgain)
		}
		again(box)
	}
}

// again has a look taken at a box, once if it is asked for more often.
func again(box chan struct{}) {
	select {
	case box <- struct{}{}:
	default:
	}
}

// stop ends the telling.
func (t *teller) stop() {
	t.cancel()
	t.wg.Wait()
}

// whole tells nodes the complete list, for as long as ctx lasts, and returns which have it.
// It comes after stop.
func (t *teller) whole(ctx context.Context, nodes []string) (know []string) {
	t.said, t.saidAs = snapshot(t.u), t.next()
	args := connsArgs{Index: t.k.index, Epoch: t.epoch, Seq: t.saidAs}
	for c := range t.said {
		args.Add = append(args.Add, c)
	}
	return t.tell(ctx, nodes, &args)
}

// rest tells nodes which have the list of whole what has come since.
func (t *teller) rest(ctx context.Context, nodes []string) {
	args := connsArgs{Index: t.k.index, Epoch: t.epoch, Base: t.saidAs}
	for c := range snapshot(t.u) {
		if _, ok := t.said[c]; !ok {
			args.Add = append(args.Add, c)
		}
	}
	if len(args.Add) == 0 {
		return
	}
	args.Seq = t.next()
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if know := t.tell(ctx, nodes, &args); len(know) == 0 {
		t.k.log.Info("nobody knows of connections that came when the address was given up; their clients find out by themselves", "connections", len(args.Add))
	}
}

// tell tells nodes and returns which have the list then.
func (t *teller) tell(ctx context.Context, nodes []string, args *connsArgs) (know []string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, node := range nodes {
		wg.Go(func() {
			var res connsResult
			if err := t.k.a.o.Ask(ctx, node, MethodConns, args, &res); err != nil {
				t.k.log.Debug("a node was not told of the connections", "node", node, "err", err)
				return
			}
			if res.Seq == args.Seq {
				mu.Lock()
				know = append(know, node)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return know
}

// successor tells whether a node may serve the address next.
func (k *keeper) successor(node string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maySucceed(&k.s.vip, node)
}

func maySucceed(v *mgs.VIP, node string) bool {
	return len(v.Prefer) == 0 || slices.Contains(v.Prefer, node)
}

// successors are all nodes that may serve the address next, or the one that is to, and
// whether that is ready to.
func (k *keeper) successors() (nodes []string, ready bool) {
	k.mu.Lock()
	v := k.s.vip
	k.mu.Unlock()
	if v.Next != "" && v.Next != k.a.o.Node {
		return []string{v.Next}, v.Ready
	}
	for _, n := range k.a.o.Others {
		if maySucceed(&v, n) {
			nodes = append(nodes, n)
		}
	}
	return nodes, false
}
