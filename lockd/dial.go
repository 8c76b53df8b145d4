package lockd

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"syscall"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd/nlm"
)

// dialer is the default of Config.Dial. Some clients take callbacks from
// reserved ports only, so these are tried first.
type dialer struct {
	refused atomic.Bool // the process may not use reserved ports
}

// Reserved ports in use for outgoing calls: above the ones that services are
// configured on by hand.
const (
	minReserved = 665
	maxReserved = 1023
)

func (d *dialer) dial(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, vers uint32) (Caller, error) {
	cred := sunrpc.Cred{Flavor: sunrpc.AuthSys}
	for range 4 {
		if d.refused.Load() {
			break
		}
		port := uint16(minReserved + rand.IntN(maxReserved-minReserved+1))
		c, err := sunrpc.Dial(ctx, network, netip.AddrPortFrom(local, port), remote, nlm.Program, vers, cred)
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			d.refused.Store(true)
		case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, syscall.EADDRNOTAVAIL):
		default:
			return nil, err
		}
	}
	c, err := sunrpc.Dial(ctx, network, netip.AddrPortFrom(local, 0), remote, nlm.Program, vers, cred)
	if err != nil {
		return nil, err
	}
	return c, nil
}
