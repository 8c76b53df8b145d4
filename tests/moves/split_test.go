package moves

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
	"github.com/baton-nfs/baton/tests/moves/rig"
)

// pinned is a client that goes on talking to one machine, whoever has the address: its
// network was told for good where that is.
type pinned struct {
	t    *testing.T
	node *bed.Node
	p    *rig.Probe
	conn io.Closer // p's
	addr netip.Addr
	// answers of the calls that were sent, in their order.
	answers chan error
	sent    int
}

var pinAddr = netip.MustParsePrefix("10.77.0.60/24")

// pin connects to the address at its present owner.
func (w *world) pin(ctx context.Context, a netip.Addr) *pinned {
	w.t.Helper()
	n, err := bed.NewNode("pin")
	bed.Need(w.t, err)
	w.t.Cleanup(func() { n.Close() })
	if err := n.Plug(w.net.Hub, "br0", "p-pin", "eth0", pinAddr); err != nil {
		w.t.Fatal(err)
	}
	if err := n.Neighbour("eth0", a, w.net.Machine(w.mover.Owner(a)).MAC()); err != nil {
		w.t.Fatal(err)
	}
	x := &pinned{t: w.t, node: n, addr: a, answers: make(chan error, 16)}
	if x.p, err = rig.NewProbe(ctx, n, a); err != nil {
		w.t.Fatal(err)
	}
	x.conn = x.p
	w.t.Cleanup(func() { x.p.Close() })
	// It is served as anybody is.
	if _, err := x.p.Mkdir(x.p.Root, "pinned"); err != nil {
		w.t.Fatal(err)
	}
	if _, err := x.p.Create(x.p.Root, "keep"); err != nil {
		w.t.Fatal(err)
	}
	return x
}

// calls are what a machine that has lost its address must neither do nor answer.
func (x *pinned) calls(round int) []func(c *nfsload.Conn) uint32 {
	return []func(c *nfsload.Conn) uint32{
		func(c *nfsload.Conn) uint32 { c.Opaque(x.p.Root); return nfsload.ProcGetattr },
		func(c *nfsload.Conn) uint32 {
			c.Dirop(x.p.Root, fmt.Appendf(nil, "ghost%d", round))
			c.U32(1)
			c.Sattr(0o644)
			return nfsload.ProcCreate
		},
		func(c *nfsload.Conn) uint32 { c.Dirop(x.p.Root, []byte("keep")); return nfsload.ProcRemove },
		func(c *nfsload.Conn) uint32 { c.Dirop(x.p.Root, []byte("pinned")); return nfsload.ProcLookup },
	}
}

// send sends all calls at once on the connection there is, and does not wait for answers.
func (x *pinned) send(round int) {
	calls := x.calls(round)
	x.sent += len(calls)
	next := 0
	go func() {
		answered := 0
		_, err := x.p.Run(len(calls), time.Now(), &nfsload.Funcs{
			NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
				if next == len(calls) {
					return 0, false
				}
				next++
				return calls[next-1](c), true
			},
			ReplyFunc: func(_ int, body []byte) (int, error) {
				answered++
				d := nfsload.Decoder{B: body}
				x.answers <- d.Status(0)
				return 1, nil
			},
		})
		if err == nil {
			err = errors.New("all calls were answered")
		}
		for range len(calls) - answered {
			x.answers <- err
		}
	}()
}

// again makes a new connection to the same machine, if it takes one.
func (x *pinned) again(ctx context.Context) (*pinned, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := x.node.DialContext(ctx, "tcp", netip.AddrPortFrom(x.addr, bed.NFSPort).String())
	if err != nil {
		return nil, err
	}
	x.t.Cleanup(func() { c.Close() })
	p := &rig.Probe{Conn: nfsload.NewConn(c, nfsload.ProgNFS), Root: x.p.Root}
	return &pinned{t: x.t, node: x.node, p: p, conn: c, addr: x.addr, answers: make(chan error, 16)}, nil
}

// refused waits for the outcome of each call: an error, or an answer other than success.
func (x *pinned) refused(ctx context.Context) {
	x.t.Helper()
	end := time.AfterFunc(time.Second, func() { x.conn.Close() }) // after what is on its way
	defer end.Stop()
	for ; x.sent > 0; x.sent-- {
		select {
		case err := <-x.answers:
			if err == nil {
				x.t.Error("a machine that had lost the address answered a call with success")
			} else {
				x.t.Logf("outcome of a call to the machine that had lost the address: %v", err)
			}
		case <-ctx.Done():
			x.t.Fatal("a call to the machine that had lost the address has no outcome")
		}
	}
}

// nothing fails unless what the late calls were to do has not been done.
func (w *world) nothing(ctx context.Context, a netip.Addr, rounds int) {
	w.t.Helper()
	p, err := rig.NewProbe(ctx, w.net.Hub, a)
	if err != nil {
		w.t.Fatal(err)
	}
	defer p.Close()
	for i := range rounds {
		name := fmt.Sprint("ghost", i)
		var se *nfsload.StatusError
		if _, err := p.Lookup(name); !errors.As(err, &se) || se.Status != 2 {
			w.t.Errorf("%s: %v, want that it does not exist: the late CREATE had an effect", name, err)
		}
	}
	if _, err := p.Lookup("keep"); err != nil {
		w.t.Errorf("keep: %v: the late REMOVE had an effect", err)
	}
}

// batonWorld is newWorld for tests of what only baton promises.
func batonWorld(t *testing.T) (*world, *rig.Baton) {
	t.Helper()
	w := newWorld(t, 2)
	b, ok := w.mover.(*rig.Baton)
	if !ok {
		t.Skipf("SKIPPED, reason: %s promises nothing about nodes that come back; set %s=baton", w.mover.Name(), moverEnv)
	}
	return w, b
}

// gone waits until a machine has neither the address nor a socket of it.
func (w *world) gone(ctx context.Context, node string, a netip.Addr) {
	w.t.Helper()
	for {
		m := w.net.Machine(node).Node()
		has, err := m.Has(a)
		if err != nil {
			w.t.Fatal(err)
		}
		ss, err := m.Sockets(a)
		if err != nil {
			w.t.Fatal(err)
		}
		if !has && len(ss) == 0 {
			return
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			w.t.Fatalf("%s keeps %v (%v) or sockets of it: %v", node, a, has, ss)
		}
	}
}

// TestFrozenNode freezes the node that has an address, lets another one take it, and
// thaws it: it has calls in its sockets that came before and after. None may be
// answered with success or do anything, and the address must go from there.
func TestFrozenNode(t *testing.T) {
	splitBrain(t, func(w *world, node string) error { return w.mover.Freeze(node) }, func(w *world, node string) error { return w.mover.Thaw(node) })
}

// TestCablePulled pulls the cable of the node that has an address, and plugs it in when
// another one has taken it.
func TestCablePulled(t *testing.T) {
	splitBrain(t, func(w *world, node string) error { return w.mover.Cut(node) }, func(w *world, node string) error { return w.mover.Mend(node) })
}

func splitBrain(t *testing.T, stop, goOn func(w *world, node string) error) {
	w, _ := batonWorld(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	w.start(ctx, 1)
	w.moving(ctx, w.clients, time.Now())
	a := w.vips[0]
	for round := range 3 {
		node := w.mover.Owner(a)
		var to string
		for _, n := range w.mover.Nodes() {
			if n != node && n != w.mover.Owner(w.vips[1]) {
				to = n
			}
		}
		if round == 0 {
			x := w.pin(ctx, a)
			w.logf("%s has %v and stops", node, a)
			w.watch.Excuse(node, true)
			if err := stop(w, node); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { goOn(w, node) })
			x.send(0) // arrives before anybody else has the address
			w.takenOver(ctx, node, to)
			second, late := x.again(ctx)
			if late == nil {
				second.send(1) // arrives when another one has it
			}
			w.logf("a new connection to %s: %v", node, late)
			if err := goOn(w, node); err != nil {
				t.Fatal(err)
			}
			w.gone(ctx, node, a)
			w.watch.Excuse(node, false)
			// Nothing of the address is left there, so what was not answered never will be.
			x.refused(ctx)
			if late == nil {
				second.refused(ctx)
			}
			w.nothing(ctx, a, 2)
		} else { // without the pinned client, back and forth
			w.watch.Excuse(node, true)
			if err := stop(w, node); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { goOn(w, node) })
			w.takenOver(ctx, node, to)
			if err := goOn(w, node); err != nil {
				t.Fatal(err)
			}
			w.gone(ctx, node, a)
			w.watch.Excuse(node, false)
		}
		t1 := time.Now()
		w.moving(ctx, w.clients, t1)
		w.clean(ctx, a)
		w.check()
		w.logf("round %d: %v went from %s to %s", round, a, node, w.mover.Owner(a))
	}
	w.finish(ctx)
}

// takenOver lets all addresses of a node be taken over.
func (w *world) takenOver(ctx context.Context, node, to string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, a := range w.vips {
		if w.mover.Owner(a) == node || a == w.vips[0] {
			if err := w.mover.TakeOver(ctx, a, to); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// TestRegistryLost stops the MGS: nothing moves then, and nobody who is served
// notices. When it is back, addresses move again.
func TestRegistryLost(t *testing.T) {
	t.Setenv(moverEnv, "baton")
	w, b := batonWorld(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	w.withoutRegistry(ctx, "c", func() error { return b.Registry(ctx, false) }, func() error { return b.Registry(ctx, true) })
}

// TestQuorumLost cuts the power of two of the three machines that have the registry in
// etcd. Both addresses are at the third: nothing moves, and nobody who is served notices. When
// the two are back, with what they had on their disks, addresses move again.
func TestQuorumLost(t *testing.T) {
	t.Setenv(moverEnv, "baton-etcd")
	w, b := batonWorld(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	left := w.mover.Owner(w.vips[0])
	if err := w.mover.Move(ctx, w.vips[1], left); err != nil {
		t.Fatal(err)
	}
	w.withoutRegistry(ctx, "c", func() error { return b.Quorum(ctx, left, false) }, func() error { return b.Quorum(ctx, left, true) })
}

// withoutRegistry takes the registry away for a while. An order to move the first address
// has no effect then.
func (w *world) withoutRegistry(ctx context.Context, to string, off, on func() error) {
	t := w.t
	t.Helper()
	w.start(ctx, 1)
	w.moving(ctx, w.clients, time.Now())
	node := map[netip.Addr]string{}
	peers := map[netip.Addr][]string{}
	for _, a := range w.vips {
		node[a], peers[a] = w.mover.Owner(a), w.peers(a)
	}
	if err := off(); err != nil {
		t.Fatal(err)
	}
	w.logf("the registry is away; addresses are at %v", node)
	short, end := context.WithTimeout(ctx, 5*time.Second)
	err := w.mover.Move(short, w.vips[0], to)
	end()
	if err == nil {
		t.Error("an address moved without the registry")
	}
	w.pause(ctx, 10*time.Second)
	w.moving(ctx, w.clients, time.Now())
	for _, a := range w.vips {
		m := w.net.Machine(node[a]).Node()
		has, err := m.Has(a)
		if err != nil || !has {
			t.Errorf("%s has %v: %v, %v", node[a], a, has, err)
		}
	}
	if err := on(); err != nil {
		w.tell()
		t.Fatal(err)
	}
	for w.mover.Owner(w.vips[0]) == "" {
		w.pause(ctx, 100*time.Millisecond)
	}
	// The order that was not answered may be carried out now, or never.
	for _, a := range w.vips {
		if w.mover.Owner(a) != node[a] {
			continue
		}
		if after := w.peers(a); !slices.Equal(after, peers[a]) {
			t.Errorf("connections of %v were %v and are %v", a, peers[a], after)
		}
	}
	w.logf("the registry is back")
	s := &schedule{w: w, stalls: map[string][]time.Duration{}}
	for _, to := range []string{"c", "b", "a"} {
		if w.mover.Owner(w.vips[0]) != to {
			s.move(ctx, w.vips[0], to, true)
		}
	}
	w.finish(ctx)
}
