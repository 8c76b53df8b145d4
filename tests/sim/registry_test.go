package sim

import (
	"context"
	"time"

	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

const mgsName = mgs.TargetName

// registryConfig is of a cluster with a registry that tells where targets have started.
type registryConfig struct {
	startup time.Duration
	factor  int
}

// hostRegistry runs the registry whenever it is to be on this node. Of it there is the
// table of targets only: nobody asks for the document.
func (p *process) hostRegistry() {
	w := p.w
	for p.await(mgsName) {
		ctx, cancel := context.WithCancel(p.ctx)
		s := mgs.NewService(nil, p.logger(mgsName))
		s.UseTable(ir.NewHub(ir.HubOptions{Config: ir.Config{Startup: w.cfg.registry.startup}, Incarnation: w.nextGen(mgsName), Logger: p.logger(mgsName)}))
		p.mu.Lock()
		p.services[mgsName] = &service{mgs: s}
		p.mu.Unlock()
		w.trace("%s: the registry serves", p.node.name)
		w.poke()
		<-p.away(ctx, mgsName)
		cancel()
		p.mu.Lock()
		delete(p.services, mgsName)
		p.mu.Unlock()
		s.Close()
		w.net.change(func() { // as the transport does when a target is stopped
			for c := range w.net.conns {
				if c.to == p && c.target == mgsName {
					c.breaks()
				}
			}
		})
		w.trace("%s: the registry has stopped", p.node.name)
	}
}

// watch has the process take part in imperative recovery.
func (p *process) watch() {
	w := p.w
	if w.cfg.registry == nil {
		return
	}
	c, err := ir.NewClient(ir.Options{
		Node: p.node.name, Addrs: w.addrs(mgsName), Able: !w.optsOut(p.node.name), Logger: p.logger("news"),
		Dial: func(ctx context.Context, addr string) (wire.Conn, error) { return w.net.dial(ctx, p, addr, mgsName) },
		OnNews: func(t ir.Target) {
			w.count("news")
			w.trace("%s: hears that %s runs as %d at %s", p.node.name, t.Name, t.Instance, t.Node)
			p.tell(t.Name, t.Instance, t.Node)
		},
	})
	if err != nil {
		w.fault("%s: %v", p.node.name, err)
		return
	}
	p.news = c
	p.wg.Go(func() { p.hostRegistry() })
	p.wg.Go(func() { c.Run(p.ctx) })
}

// hear has f called with all news.
func (p *process) hear(f func(target string, instance uint64, addr string)) {
	p.mu.Lock()
	p.hears = append(p.hears, f)
	p.mu.Unlock()
}

func (p *process) tell(target string, instance uint64, addr string) {
	p.mu.Lock()
	l := p.hears
	p.mu.Unlock()
	for _, f := range l {
		f(target, instance, addr)
	}
}

// announce tells the registry of a target that takes connections.
func (p *process) announce(target string, f *front.Front) {
	if p.news == nil {
		return
	}
	w := p.w
	noIR := w.optsOut(target) || w.optsOut(p.node.name)
	p.news.Announce(target, f.Instance(), noIR, func(t ir.Taken) {
		w.trace("%s: %s is announced: %+v", p.node.name, target, t)
		if t.State == ir.StateFull && !t.Late && !noIR {
			w.count("windows shortened")
			f.Shorten(w.cfg.registry.factor)
		}
	})
}

func (p *process) withdraw(target string) {
	if p.news != nil {
		p.news.Withdraw(target)
	}
}

func (w *world) optsOut(what string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.optOut[what]
}

// table is the registry's table, as that says itself; false while it does not run.
func (w *world) table() (ir.Status, []ir.Target, bool) {
	w.mu.Lock()
	h := w.home[mgsName]
	w.mu.Unlock()
	if p := h.process(); p != nil {
		if s := p.get(mgsName); s != nil {
			return s.mgs.Table().Status()
		}
	}
	return ir.Status{}, nil, false
}

// eventually waits until ok holds, for a minute at most.
func (c *cluster) eventually(what string, ok func() bool) {
	for range 1200 {
		if ok() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.fault("not within a minute: %s", what)
}

// state waits until the registry is in a state and everybody who runs has its table.
func (c *cluster) state(want ir.State) {
	c.eventually("everybody has the table, and its state is "+string(want), func() bool {
		s, _, ok := c.table()
		if !ok || s.State != want || s.Pending > 0 {
			return false
		}
		for _, n := range c.nodes {
			if p := n.process(); p != nil {
				if k := p.news.Status(); !k.Connected || k.Incarnation != s.Incarnation || k.Version != s.Version {
					return false
				}
			}
		}
		return true
	})
}
