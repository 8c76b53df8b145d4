package rpcbind

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
)

// Registrar keeps mappings registered with the system's rpcbind.
type Registrar struct {
	System   System
	Mappings []Mapping
	// Every is the time between checks that the registration still stands
	// (rpcbind forgets it when it restarts); 0: 30 s.
	Every  time.Duration
	Logger *slog.Logger

	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// Start registers all mappings and begins to check them. When it fails,
// nothing runs and Stop is not needed.
func (r *Registrar) Start(ctx context.Context) error {
	if r.Logger == nil {
		r.Logger = slog.New(slog.DiscardHandler)
	}
	if r.Every <= 0 {
		r.Every = 30 * time.Second
	}
	if err := r.register(ctx); err != nil {
		return err
	}
	ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	r.wg.Go(func() { r.watch(ctx) })
	return nil
}

// Stop ends the checks and unregisters.
func (r *Registrar) Stop(ctx context.Context) error {
	r.cancel()
	r.wg.Wait()
	c, err := r.System.dial(ctx)
	if err != nil {
		return err
	}
	defer c.c.Close()
	return r.unset(ctx, c)
}

func (r *Registrar) watch(ctx context.Context) {
	t := time.NewTicker(r.Every)
	defer t.Stop()
	down := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		ok, err := r.check(ctx)
		if err == nil && !ok {
			r.Logger.Info("rpcbind has lost the registrations, registering again")
			err = r.register(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil && !down {
			r.Logger.Warn("rpcbind does not answer; clients that ask it for ports cannot mount", "err", err)
		}
		if err == nil && down {
			r.Logger.Info("rpcbind answers again")
		}
		down = err != nil
	}
}

// check tells whether every mapping is registered as it should be.
func (r *Registrar) check(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c, err := r.System.dial(ctx)
	if err != nil {
		return false, err
	}
	defer c.c.Close()
	for _, m := range r.Mappings {
		if is6(m.Netid) {
			continue // GETADDR does not answer for IPv6 over IPv4
		}
		p, err := c.getport(ctx, m.Prog, m.Vers, netidProto(m.Netid))
		if err != nil {
			return false, err
		}
		if p != m.Port {
			return false, nil
		}
	}
	return true, nil
}

func netidProto(netid string) uint32 {
	if netid == UDP || netid == UDP6 {
		return protoUDP
	}
	return protoTCP
}

func (r *Registrar) register(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c, err := r.System.dial(ctx)
	if err != nil {
		return err
	}
	defer c.c.Close()
	// What a predecessor left is removed first: SET refuses to change a port.
	if err := r.unset(ctx, c); err != nil {
		return err
	}
	for _, m := range r.Mappings {
		ok, err := boolCall(c.call(ctx, Vers4, rpcbSet, func(w *xdr.Writer) {
			putRpcb(w, m.Prog, m.Vers, m.Netid, m.listed(), "superuser")
		}))
		if errors.Is(err, errUnavail) { // an old portmapper
			if is6(m.Netid) {
				continue
			}
			ok, err = boolCall(c.call(ctx, VersPortmap, pmapSet, func(w *xdr.Writer) {
				putMapping(w, m.Prog, m.Vers, netidProto(m.Netid), uint32(m.Port))
			}))
		}
		if err != nil {
			return fmt.Errorf("rpcbind: register program %d version %d on %s: %w", m.Prog, m.Vers, m.Netid, err)
		}
		if !ok {
			return fmt.Errorf("rpcbind: program %d version %d on %s is registered by another server or rpcbind refuses us; stop the other server (rpcinfo -p shows it) or run baton as root", m.Prog, m.Vers, m.Netid)
		}
	}
	return nil
}

// unset removes the mappings' programs and versions on all networks. What is
// not registered is no error.
func (r *Registrar) unset(ctx context.Context, c *client) error {
	type pv struct{ prog, vers uint32 }
	var done []pv
	for _, m := range r.Mappings {
		k := pv{m.Prog, m.Vers}
		if slices.Contains(done, k) {
			continue
		}
		done = append(done, k)
		_, err := boolCall(c.call(ctx, Vers4, rpcbUnset, func(w *xdr.Writer) { putRpcb(w, m.Prog, m.Vers, "", "", "superuser") }))
		if errors.Is(err, errUnavail) {
			_, err = boolCall(c.call(ctx, VersPortmap, pmapUnset, func(w *xdr.Writer) { putMapping(w, m.Prog, m.Vers, 0, 0) }))
		}
		if err != nil {
			return fmt.Errorf("rpcbind: unregister program %d version %d: %w", m.Prog, m.Vers, err)
		}
	}
	return nil
}

func boolCall(res []byte, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	r := xdr.NewReader(res)
	ok := r.Uint32() != 0
	return ok, r.Err()
}
