package unit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"

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
	// Of the system's rpcbind: turn is held while it is talked to.
	turn  chan struct{}
	addrs map[netip.Addr]bool
	reg   *rpcbind.Registrar // nil while nothing is registered
}

// NewPortmap decides how ports are made known.
func NewPortmap(ctx context.Context, cfg *config.Config, log *slog.Logger) *Portmap {
	p := &Portmap{cfg: cfg, log: log, mode: cfg.Rpcbind.Mode, turn: make(chan struct{}, 1), addrs: map[netip.Addr]bool{}}
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
	return p.mode
}

func (p *Portmap) off() {
	p.mu.Lock()
	p.mode = config.RpcbindOff
	p.mu.Unlock()
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

// add registers an address's ports with the system's rpcbind, if that is to know them.
func (p *Portmap) add(ctx context.Context, addr netip.Addr) error {
	return p.set(ctx, addr, true)
}

func (p *Portmap) remove(ctx context.Context, addr netip.Addr) error {
	return p.set(ctx, addr, false)
}

func (p *Portmap) set(ctx context.Context, addr netip.Addr, there bool) error {
	if p.Mode() != config.RpcbindSystem {
		return nil
	}
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("rpcbind: %w", ctx.Err())
	}
	defer func() { <-p.turn }()
	if p.addrs[addr] == there {
		return nil
	}
	before := len(p.mappings(p.list()))
	if there {
		p.addrs[addr] = true
	} else {
		delete(p.addrs, addr)
	}
	// Entries have no address, so only the first and the last of a family matter.
	want := p.mappings(p.list())
	if len(want) == before {
		return nil
	}
	var err error
	if p.reg != nil {
		err = p.reg.Stop(ctx)
		p.reg = nil
	}
	if len(want) == 0 {
		return err
	}
	r := &rpcbind.Registrar{System: p.sys, Mappings: want, Logger: p.log}
	if err := r.Start(ctx); err != nil {
		delete(p.addrs, addr)
		return fmt.Errorf("rpcbind: %w; set rpcbind.mode = \"own\" or \"off\"", err)
	}
	p.reg = r
	return nil
}

func (p *Portmap) list() (l []netip.Addr) {
	for a := range p.addrs {
		l = append(l, a)
	}
	return l
}

// Close takes back what is still registered.
func (p *Portmap) Close(ctx context.Context) error {
	var errs []error
	p.turn <- struct{}{}
	addrs := p.list()
	<-p.turn
	for _, a := range addrs {
		errs = append(errs, p.remove(ctx, a))
	}
	return errors.Join(errs...)
}
