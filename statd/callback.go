package statd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"syscall"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/statd/nsm"
)

// Retries of callbacks to local programs.
const (
	backTries = 6
	backPause = time.Second // doubles
)

// callback tells a local program in the background that a host has restarted
// (XNFS: the procedure that SM_MON named).
func (a *Address) callback(m monitor, host string, state uint32) {
	select {
	case a.backs <- struct{}{}:
	default:
		a.stats.backsFailed.Add(1)
		a.limited(slog.LevelWarn, "a local program was not told of a host's restart: too many calls in progress", "host", host)
		return
	}
	// The caller is listen, which wg waits for itself, so that wg is not 0.
	a.wg.Go(func() {
		defer func() { <-a.backs }()
		st := nsm.Status{MonName: host, State: state, Priv: m.priv}
		var w xdr.Writer
		st.Encode(&w)
		var err error
		for try := range backTries {
			if try > 0 && !a.srv.pause(a.ctx, backPause<<(try-1)) {
				return
			}
			ctx, cancel := context.WithTimeout(a.ctx, a.srv.cfg.AttemptTimeout)
			err = a.srv.reach(ctx, netip.Addr{}, netip.AddrFrom4([4]byte{127, 0, 0, 1}), try%2 == 1, m.id.MyProg, m.id.MyVers, m.id.MyProc, w.Buf)
			cancel()
			if err == nil {
				a.stats.backs.Add(1)
				return
			}
		}
		a.stats.backsFailed.Add(1)
		a.limited(slog.LevelWarn, "a local program could not be told of a host's restart", "host", host,
			"program", m.id.MyProg, "err", err)
	})
}

// reach makes one call to a program that the host's portmapper knows.
func (s *Server) reach(ctx context.Context, local, host netip.Addr, tcp bool, prog, vers, proc uint32, args []byte) error {
	network, netid := "udp", rpcbind.UDP
	if tcp {
		network, netid = "tcp", rpcbind.TCP
	}
	if host.Is6() {
		netid += "6"
	}
	port, err := s.cfg.Portmap(ctx, local, host, prog, vers, netid)
	if err != nil {
		return fmt.Errorf("port over %s: %w", network, err)
	}
	c, err := s.cfg.Dial(ctx, network, local, netip.AddrPortFrom(host, port), prog, vers)
	if err != nil {
		return fmt.Errorf("connect over %s: %w", network, err)
	}
	defer c.Close()
	if _, err := c.Call(ctx, proc, args); err != nil {
		return fmt.Errorf("call over %s: %w", network, err)
	}
	return nil
}

// Reserved ports that are tried: the range that NFS clients use, above most
// well-known services.
const (
	reservedLow  = 665
	reservedHigh = 1023
	reservedTry  = 8
)

// dialReserved dials from a port below 1024, since some clients believe only
// those, or from any port if that is not to be had. A zero local address is
// replaced with the wildcard.
func dialReserved(ctx context.Context, rnd func(int64) int64, network string, local netip.Addr, remote netip.AddrPort, prog, vers uint32) (Caller, error) {
	if !local.IsValid() {
		if local = netip.IPv4Unspecified(); remote.Addr().Is6() {
			local = netip.IPv6Unspecified()
		}
	}
	var cred sunrpc.Cred // AUTH_NONE
	for range reservedTry {
		from := netip.AddrPortFrom(local, uint16(reservedLow+rnd(reservedHigh-reservedLow+1)))
		c, err := sunrpc.Dial(ctx, network, from, remote, prog, vers, cred)
		switch {
		case err == nil:
			return c, nil
		case !portTaken(err):
			if !portForbidden(err) {
				return nil, err
			}
			return anyPort(ctx, network, local, remote, prog, vers)
		}
	}
	return anyPort(ctx, network, local, remote, prog, vers)
}

func anyPort(ctx context.Context, network string, local netip.Addr, remote netip.AddrPort, prog, vers uint32) (Caller, error) {
	return sunrpc.Dial(ctx, network, netip.AddrPortFrom(local, 0), remote, prog, vers, sunrpc.Cred{})
}

func portTaken(err error) bool {
	return errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

func portForbidden(err error) bool { return errors.Is(err, fs.ErrPermission) }
