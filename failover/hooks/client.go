package hooks

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// Socket is the Baton behind a control socket. Each call has a connection of its
// own, so calls may be made concurrently.
type Socket string

// Ping implements Baton.
func (s Socket) Ping(ctx context.Context) error {
	return control.Do(ctx, string(s), control.CmdPing, nil, nil)
}

// Ready implements Baton.
func (s Socket) Ready(ctx context.Context) error {
	return control.Do(ctx, string(s), vipctl.CmdReady, nil, nil)
}

// Take implements Baton.
func (s Socket) Take(ctx context.Context, a vipctl.TakeArgs) (r vipctl.Result, err error) {
	err = control.Do(ctx, string(s), vipctl.CmdTake, &a, &r)
	return r, err
}

// Release implements Baton.
func (s Socket) Release(ctx context.Context, a vipctl.ReleaseArgs) (r vipctl.Result, err error) {
	err = control.Do(ctx, string(s), vipctl.CmdRelease, &a, &r)
	return r, err
}

// Check implements Baton.
func (s Socket) Check(ctx context.Context, a vipctl.CheckArgs) (r vipctl.Result, err error) {
	err = control.Do(ctx, string(s), vipctl.CmdCheck, &a, &r)
	return r, err
}

// Local is the machine itself.
type Local struct{}

// Has implements Machine.
func (Local) Has(addr netip.Addr) (bool, error) {
	_, ok, err := find(addr)
	return ok, err
}

// find gives the interface that has an address, with the address in CIDR notation.
func find(addr netip.Addr) (place [2]string, ok bool, err error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return place, false, err
	}
	for _, i := range ifs {
		as, err := i.Addrs()
		if err != nil {
			continue // the interface has gone
		}
		for _, a := range as {
			p, err := netip.ParsePrefix(a.String())
			if err == nil && p.Addr().Unmap() == addr {
				return [2]string{i.Name, p.String()}, true, nil
			}
		}
	}
	return place, false, nil
}

// Remove implements Machine with ip(8).
func (Local) Remove(ctx context.Context, addr netip.Addr) error {
	for range 8 { // several interfaces may have it
		place, ok, err := find(addr)
		if err != nil || !ok {
			return err
		}
		cmd := exec.CommandContext(ctx, "ip", "address", "del", place[1], "dev", place[0])
		if out, err := cmd.CombinedOutput(); err != nil {
			if _, still, ferr := find(addr); ferr == nil && !still {
				return nil // somebody else was faster
			}
			return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return errors.New("it comes back: something else adds it")
}

// Sleep is the Sleep of a real Env.
func Sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
