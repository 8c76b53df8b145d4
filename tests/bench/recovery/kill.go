package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// How the MDT's node ends.
const (
	killProcess = "process" // its connections are reset
	killPower   = "power"   // it is silent, and nobody refuses connections
)

// otherNode is where the MDT goes on.
const otherNode = "other"

// relay stands for a machine in front of a server. When it has lost power it passes
// nothing on, and connections to it are made and stay silent.
type relay struct {
	l    net.Listener
	to   string
	off  atomic.Bool
	stop context.CancelFunc
	ctx  context.Context
	wg   sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newRelay(to string) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{l: l, to: to}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.wg.Go(r.accept)
	return r, nil
}

func (r *relay) accept() {
	for {
		c, err := r.l.Accept()
		if err != nil {
			return
		}
		if !r.keep(c) || r.off.Load() {
			continue
		}
		s, err := net.Dial("tcp", r.to)
		if err != nil || !r.keep(s) {
			c.Close()
			continue
		}
		for _, p := range [][2]net.Conn{{c, s}, {s, c}} {
			r.wg.Go(func() { r.pass(p[0], p[1]) })
		}
	}
}

// keep has close end the connection; false when that has begun.
func (r *relay) keep(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx.Err() != nil {
		c.Close()
		return false
	}
	r.conns = append(r.conns, c)
	return true
}

func (r *relay) pass(from, to net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if r.off.Load() {
			<-r.ctx.Done() // not even an end is passed on
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			to.Close()
			return
		}
	}
}

func (r *relay) close() {
	r.mu.Lock()
	r.stop()
	for _, c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.l.Close()
	r.wg.Wait()
}

// failover is what a rig has besides when the MDT is to go on at another node.
type failover struct {
	relay  *relay
	server *tcp.Server // of the other node
	served chan error
	addr   string
	hub    *ir.Hub // nil: nobody is told
	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc
	node   *ir.Client // of the other node
}

func (r *rig) newFailover() error {
	f := &failover{served: make(chan error, 1)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	r.fail = f
	var err error
	if f.relay, err = newRelay(r.addr); err != nil {
		return err
	}
	if f.server, err = tcp.NewServer(nil, tcp.ServerOptions{Node: otherNode, Insecure: true}); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	f.addr = l.Addr().String()
	go func() { f.served <- f.server.Serve(l) }()
	if !r.p.told {
		return nil
	}
	f.hub = ir.NewHub(ir.HubOptions{Config: ir.Config{Startup: time.Nanosecond}, Incarnation: 1})
	s := mgs.NewService(nil, nil) // the table of targets only
	s.UseTable(f.hub)
	if err := r.srv.SetTarget(mgs.TargetName, s); err != nil {
		return err
	}
	f.node, err = r.watch(f.ctx, otherNode, func(ir.Target) {})
	return err
}

// watchOptions are those of a node's watch at the registry.
func (r *rig) watchOptions(node string, news func(ir.Target)) ir.Options {
	return ir.Options{
		Node: node, Addrs: []string{r.addr}, Able: true, OnNews: news,
		Dial: func(ctx context.Context, addr string) (wire.Conn, error) {
			c, err := tcp.Dial(ctx, tcp.DialOptions{Addrs: []tcp.Endpoint{{Addr: addr}}, Target: mgs.TargetName, Node: node, Insecure: true})
			if err != nil {
				return nil, err
			}
			return c, nil
		},
	}
}

// watch connects a node to the registry until ctx ends.
func (r *rig) watch(ctx context.Context, node string, news func(ir.Target)) (*ir.Client, error) {
	c, err := ir.NewClient(r.watchOptions(node, news))
	if err == nil {
		r.fail.wg.Go(func() { c.Run(ctx) })
	}
	return c, err
}

// told waits until n nodes watch.
func (f *failover) told(ctx context.Context, n int) error {
	for ctx.Err() == nil {
		k := 0
		s, _, _ := f.hub.Status()
		for _, x := range s.Nodes {
			if x.Watching {
				k++
			}
		}
		if k == n && s.State == ir.StateFull {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

func (f *failover) close(ctx context.Context) error {
	f.cancel()
	f.wg.Wait()
	if f.hub != nil {
		f.hub.Close()
	}
	if f.relay != nil {
		f.relay.close()
	}
	if f.server == nil || f.addr == "" {
		return nil
	}
	return errors.Join(f.server.Close(ctx), <-f.served)
}

// killed is what a run with the end of a node has measured, from that.
type killed struct {
	started   time.Duration // the target is in service on the other node
	connected time.Duration // the last frontend that lives has connected there
	served    time.Duration // the last frontend has its first new answer
	recovery  time.Duration // the target's own, from its first client to the end
	replayed  uint64
}

// runKill lets frontends make operations, kills the node of the MDT, starts it on the
// other node after p.away, and measures until all are served; all is checked.
func (p plan) runKill(ctx context.Context) (res killed, err error) {
	if p.dead && p.clients < 2 {
		return res, errors.New("with one frontend dead there is none to measure")
	}
	r, err := newRig(ctx, p)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, r.close(context.WithoutCancel(ctx))) }()
	b, err := r.begin(ctx)
	defer b.abandon()
	if err != nil {
		return res, err
	}
	stops := make([]func(), len(b.fs))
	if p.told {
		for i, f := range b.fs {
			// Each by itself, so that one can die.
			fctx, cancel := context.WithCancel(r.fail.ctx)
			stops[i] = cancel
			if _, err := r.watch(fctx, fmt.Sprintf("frontend%d", i), func(t ir.Target) { f.Notice(t.Name, t.Instance, r.fail.addr) }); err != nil {
				return res, err
			}
		}
		if err := r.fail.told(ctx, len(b.fs)+1); err != nil {
			return res, err
		}
	}
	runtime.GC()
	kill := time.Now()
	if p.kill == killPower {
		r.fail.relay.off.Store(true)
	}
	if err := r.crash(); err != nil {
		return res, err
	}
	alive := b.fs
	if p.dead {
		alive = b.fs[:p.clients-1]
		last := p.clients - 1
		if stops[last] != nil {
			stops[last]()
		}
		if err := b.fs[last].Abandon(); err != nil {
			return res, err
		}
	}
	answered := make(chan error, 1)
	go func() {
		answered <- each(alive, func(f *frontend) error {
			_, err := f.create(ctx, "new")
			return err
		})
	}()
	wait := time.NewTimer(p.away - time.Since(kill))
	select {
	case <-wait.C:
	case <-ctx.Done():
		return res, ctx.Err()
	}
	r.home = r.fail.server
	if err := r.start(ctx); err != nil {
		return res, err
	}
	res.started = time.Since(kill)
	if p.told {
		f := r.mdt.Front()
		r.fail.node.Announce(mdtName, f.Instance(), false, func(t ir.Taken) {
			if t.State == ir.StateFull {
				f.Shorten(p.factor)
			}
		})
	}
	for res.connected == 0 {
		if r.here() >= len(alive) {
			res.connected = time.Since(kill)
		}
		select {
		case err := <-answered:
			if err != nil {
				return res, err
			}
			answered <- nil
			if res.connected == 0 {
				res.connected = time.Since(kill)
			}
		case <-ctx.Done():
			return res, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	select {
	case err := <-answered:
		if err != nil {
			return res, err
		}
	case <-ctx.Done():
		return res, ctx.Err()
	}
	res.served = time.Since(kill)
	st := r.mdt.Front().Status().Recovery
	res.recovery, res.replayed = st.End.Sub(st.Start), st.Replayed
	if (st.Tenths != 0) != p.told {
		return res, fmt.Errorf("%w: the window is %d/10, clients were told: %v", errWrong, st.Tenths, p.told)
	}
	return res, b.checkAll(ctx, alive, st)
}

// here counts the frontends that are connected to the target.
func (r *rig) here() (n int) {
	agent := host.AgentID(mdtName)
	for _, c := range r.mdt.Front().Status().Clients {
		if c.Connected && c.Client != agent {
			n++
		}
	}
	return n
}

// killTable runs the combinations of told or not, one frontend dead or none, and writes a
// line for each.
func killTable(ctx context.Context, w io.Writer, ops, clients string, p plan, rounds int, how string) error {
	ns, ks, err := sizes(ops, clients)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "Command: `go run ./tests/bench/recovery %s`; %s; %d CPUs; medians of %d rounds.\n\n",
		how, time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU(), rounds)
	fmt.Fprintln(w, "| killed | operations | frontends | one is dead | told | target is back ms | all have connected ms | all are served ms | recovery ms |")
	fmt.Fprintln(w, "|---|---:|---:|---|---|---:|---:|---:|---:|")
	ways := strings.Split(p.kill, ",")
	for _, kill := range ways {
		if kill != killProcess && kill != killPower {
			return fmt.Errorf("%q is not a way to die: %s or %s", kill, killProcess, killPower)
		}
	}
	for _, kill := range ways {
		for _, n := range ns {
			for _, k := range ks {
				for _, dead := range []bool{false, true} {
					for _, told := range []bool{false, true} {
						q := p
						q.kill, q.ops, q.clients, q.dead, q.told = kill, n, k, dead, told
						var started, connected, served, recovery []float64
						for range rounds {
							r, err := q.runKill(ctx)
							if err != nil {
								return fmt.Errorf("%s, %d operations of %d frontends, one dead %v, told %v: %w", kill, n, k, dead, told, err)
							}
							started, connected = append(started, ms(r.started)), append(connected, ms(r.connected))
							served, recovery = append(served, ms(r.served)), append(recovery, ms(r.recovery))
						}
						fmt.Fprintf(w, "| %s | %d | %d | %v | %v | %.0f | %.0f | %.0f | %.0f |\n",
							kill, n, k, yes(dead), yes(told), median(started), median(connected), median(served), median(recovery))
					}
				}
			}
		}
	}
	return nil
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
