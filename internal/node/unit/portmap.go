package unit

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/statd/nsm"
)

// Portmap makes the ports of a node's units known: through the system's rpcbind, whose
// entries are for all addresses of a family together, or by answering on every service
// address.
type Portmap struct {
	cfg *config.Config
	log *slog.Logger
	sys rpcbind.System

	mu   sync.Mutex
	mode string
	// without: of the own portmappers the one that was to be opened last is not there.
	without bool
	// Of the system's rpcbind: addrs are to be known there, whose changes are numbered;
	// heard is the last change that it was told of, err what came of that.
	addrs   map[netip.Addr]bool
	changes uint64
	heard   uint64
	err     error
	// lacks: rpcbind does not have what was wanted last. It is told again after a pause,
	// which doubles, until closed.
	lacks  bool
	pause  time.Duration
	again  *time.Timer
	closed bool
	// idle is closed when it knows all; nil: it does, and nobody talks to it.
	idle chan struct{}

	// Of the goroutine that talks to it.
	reg *rpcbind.Registrar // nil while nothing is registered
	has families           // that are registered
}

// families are those of addresses. Entries of rpcbind have no address, so nothing else
// matters of them.
type families struct{ v4, v6 bool }

func familiesOf(addrs []netip.Addr) (f families) {
	for _, a := range addrs {
		f.v4, f.v6 = f.v4 || a.Is4(), f.v6 || a.Is6()
	}
	return f
}

// NewPortmap decides how ports are made known.
func NewPortmap(ctx context.Context, cfg *config.Config, log *slog.Logger) *Portmap {
	p := &Portmap{cfg: cfg, log: log, mode: cfg.Rpcbind.Mode, addrs: map[netip.Addr]bool{}}
	if p.mode == config.RpcbindAuto {
		p.mode = config.RpcbindOwn
		if p.sys.Available(ctx) {
			p.mode = config.RpcbindSystem
		}
	}
	return p
}

// Mode is config.RpcbindOwn, RpcbindSystem or RpcbindOff.
func (p *Portmap) Mode() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == config.RpcbindOwn && p.without {
		return config.RpcbindOff
	}
	return p.mode
}

// own tells whether an address is to have a portmapper of its own.
func (p *Portmap) own() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode == config.RpcbindOwn
}

// opened takes note of whether an address has got its own portmapper. Of one that has not,
// with rpcbind.mode "auto", the system's rpcbind may be the cause, started since: then it is
// used from now on, which is returned. Otherwise the next address may have more luck.
func (p *Portmap) opened(ok bool) (system bool) {
	system = !ok && p.cfg.Rpcbind.Mode == config.RpcbindAuto && p.sys.Available(context.Background())
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.without = !ok && !system; system {
		p.mode = config.RpcbindSystem
	}
	return system
}

// mappings lists what is answered for addresses.
func (p *Portmap) mappings(addrs []netip.Addr) []rpcbind.Mapping {
	cfg := p.cfg
	port, mount, udp := uint16(cfg.NFS.Port), uint16(cfg.NFS.MountPort), uint16(0)
	if cfg.NFS.UDP {
		udp = port
	}
	l := rpcbind.Mappings(nfs3.Program, []uint32{nfs3.Version}, addrs, port, udp)
	l = append(l, rpcbind.Mappings(mount3.Program, []uint32{mount3.VersionOld, mount3.Version}, addrs, mount, mount)...)
	if !cfg.Locks.Enabled {
		return l
	}
	n, s := uint16(cfg.Locks.NLMPort), uint16(cfg.Locks.StatdPort)
	l = append(l, rpcbind.Mappings(nlm.Program, []uint32{nlm.Version1, nlm.Version3, nlm.Version4}, addrs, n, n)...)
	return append(l, rpcbind.Mappings(nsm.Program, []uint32{nsm.Version}, addrs, s, s)...)
}

// table is what the own portmapper of an address answers.
func (p *Portmap) table(addr netip.Addr) *rpcbind.Table {
	t := &rpcbind.Table{}
	addrs, port := []netip.Addr{addr}, uint16(p.cfg.Rpcbind.Port)
	own := rpcbind.Mappings(rpcbind.Program, []uint32{rpcbind.VersPortmap, rpcbind.Vers3, rpcbind.Vers4}, addrs, port, port)
	for _, m := range append(p.mappings(addrs), own...) {
		t.Set(m)
	}
	return t
}

// want notes whether an address's ports are to be known to the system's rpcbind, and has
// it told; false: that is so already. It waits for nothing: what was wanted last is what
// becomes of it, however long rpcbind takes.
func (p *Portmap) want(addr netip.Addr, known bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode != config.RpcbindSystem || p.addrs[addr] == known {
		return false
	}
	if known {
		p.addrs[addr] = true
	} else {
		delete(p.addrs, addr)
	}
	p.change()
	return true
}

// change has rpcbind told of what is wanted. p.mu is held.
func (p *Portmap) change() {
	p.changes++
	if p.idle == nil {
		p.idle = make(chan struct{})
		go p.tell()
	}
}

// Pauses before rpcbind is told again.
const (
	rpcbindRetry    = time.Second
	rpcbindRetryMax = 30 * time.Second
)

// later tells rpcbind again after a pause, if it lacks anything. p.mu is held.
func (p *Portmap) later() {
	if p.again != nil {
		p.again.Stop()
		p.again = nil
	}
	if !p.lacks || p.closed {
		p.pause = 0
		return
	}
	p.pause = min(max(2*p.pause, rpcbindRetry), rpcbindRetryMax)
	p.again = time.AfterFunc(p.pause, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.lacks && !p.closed && p.idle == nil {
			p.change()
		}
	})
}

// settled waits until rpcbind knows what was wanted last, and returns what came of it.
func (p *Portmap) settled(ctx context.Context) error {
	p.mu.Lock()
	idle := p.idle
	p.mu.Unlock()
	if idle != nil {
		select {
		case <-idle:
		case <-ctx.Done():
			return fmt.Errorf("rpcbind: %w", context.Cause(ctx))
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// tell tells rpcbind of changes until it knows all. Every conversation has an end of its
// own; settled waits for it.
func (p *Portmap) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.heard != p.changes {
		change, addrs := p.changes, slices.Collect(maps.Keys(p.addrs))
		p.mu.Unlock()
		err := p.register(addrs)
		lacks := p.has != familiesOf(addrs)
		p.mu.Lock()
		if p.lacks && !lacks && len(addrs) > 0 {
			p.log.Info("the system's rpcbind knows the ports now")
		}
		p.heard, p.err, p.lacks = change, err, lacks
	}
	p.later()
	close(p.idle)
	p.idle = nil
}

// register has rpcbind know the ports of addresses, and no others.
func (p *Portmap) register(addrs []netip.Addr) error {
	want := familiesOf(addrs)
	if want == p.has {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), rpcbindTime)
	defer cancel()
	var err error
	if p.reg != nil {
		err = p.reg.Stop(ctx)
	}
	p.reg, p.has = nil, families{}
	if want == p.has {
		return err
	}
	r := &rpcbind.Registrar{System: p.sys, Mappings: p.mappings(addrs), Logger: p.log}
	if err := r.Start(ctx); err != nil {
		return fmt.Errorf("rpcbind: %w; set rpcbind.mode = \"own\" or \"off\"", err)
	}
	p.reg, p.has = r, want
	return nil
}

// rpcbindTime bounds a conversation with the system's rpcbind.
const rpcbindTime = 10 * time.Second

// Close takes back what is still registered.
func (p *Portmap) Close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	if p.again != nil {
		p.again.Stop()
	}
	addrs := slices.Collect(maps.Keys(p.addrs))
	p.mu.Unlock()
	for _, a := range addrs {
		p.want(a, false)
	}
	return p.settled(ctx)
}
