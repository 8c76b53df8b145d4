package statd

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/baton-nfs/baton/internal/rpcbind"
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
