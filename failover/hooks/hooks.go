// Package hooks translates what cluster managers call (Pacemaker's resource
// agents, keepalived's notifications, CTDB's event scripts and NFS callout) into
// what a running baton is asked to do (internal/control/vipctl), and its answers
// into the managers' exit codes.
//
// Every entry function may be called again, and by several processes at the same
// time; it returns when its stage is done, or when its context, which is the
// manager's time-out less a margin, has ended. The one line of its Exit says what
// was done.
package hooks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/control"
	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// Baton is the running baton of this node. When none runs, the errors are
// *control.NotRunningError; a refusal is a *control.RemoteError.
type Baton interface {
	Ping(ctx context.Context) error
	// Ready gives the reason for which it could serve no address now.
	Ready(ctx context.Context) error
	Take(ctx context.Context, a vipctl.TakeArgs) (vipctl.Result, error)
	Release(ctx context.Context, a vipctl.ReleaseArgs) (vipctl.Result, error)
	Check(ctx context.Context, a vipctl.CheckArgs) (vipctl.Result, error)
}

// Machine is what hooks do to the machine when no baton runs.
type Machine interface {
	// Has tells whether the machine has the address.
	Has(addr netip.Addr) (bool, error)
	// Remove takes the address away; one that is not there is no error.
	Remove(ctx context.Context, addr netip.Addr) error
}

// Env is the world of a hook.
type Env struct {
	Baton   Baton
	Machine Machine
	// Getenv reads the environment that the manager gave.
	Getenv func(string) string
	// Sleep waits for d or until the context ends.
	Sleep func(ctx context.Context, d time.Duration)
}

// Exit is how a hook ends.
type Exit struct {
	Code int
	// Text is one line, or empty.
	Text string
}

// Exit codes of the commands that belong to no manager.
const (
	OK         = 0
	Failure    = 1
	NotServing = 3 // check: the address is not served here (as of LSB's status)
)

// poll is the time between two looks at an address that is about to change.
const poll = 100 * time.Millisecond

func done(format string, a ...any) Exit { return Exit{OK, fmt.Sprintf(format, a...)} }

func failed(format string, a ...any) Exit { return Exit{Failure, fmt.Sprintf(format, a...)} }

// absent tells that no baton runs, so that nothing is served.
func absent(err error) bool {
	var nr *control.NotRunningError
	return errors.As(err, &nr)
}

// line makes one line of an answer.
func line(addr netip.Addr, r vipctl.Result) string {
	if r.Text == "" {
		return fmt.Sprintf("%s: %s", addr, r.State)
	}
	return fmt.Sprintf("%s: %s", addr, strings.TrimPrefix(r.Text, addr.String()+": "))
}

// why makes one line of an error.
func why(addr netip.Addr, what string, err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Sprintf("%s: %s: not done within the time-out; baton goes on with it", addr, what)
	}
	return fmt.Sprintf("%s: %s: %v", addr, what, err)
}

// Take has this node serve an address, as far as a.Stage says.
func Take(ctx context.Context, e *Env, a vipctl.TakeArgs) Exit {
	r, err := e.Baton.Take(ctx, a)
	if err != nil {
		return Exit{Failure, why(a.Addr, "take", err)}
	}
	// One that goes on by itself has its listeners, too.
	listens := a.Stage == vipctl.StageListen && (r.State == vipctl.Listening || r.State == vipctl.Taking)
	if r.State != vipctl.Serving && !listens {
		return failed("%s: take: %s (%s)", a.Addr, r.State, r.Text)
	}
	return Exit{OK, line(a.Addr, r)}
}

// Release has this node give an address up, as far as a.Stage says. If no baton
// runs, nothing is served; but a baton that died has left the address on the
// machine, where it must not stay.
func Release(ctx context.Context, e *Env, a vipctl.ReleaseArgs) Exit {
	r, err := e.Baton.Release(ctx, a)
	switch {
	case absent(err):
		return sweep(ctx, e, a.Addr, a.Given)
	case err != nil:
		return Exit{Failure, why(a.Addr, "release", err)}
	}
	return Exit{OK, line(a.Addr, r)}
}

// ReleaseAll goes through both stages of giving an address up.
func ReleaseAll(ctx context.Context, e *Env, a vipctl.ReleaseArgs) Exit {
	a.Stage = vipctl.StageDrain
	x := Release(ctx, e, a)
	if ctx.Err() != nil {
		return x
	}
	// Also after a failure: what can be closed is closed, and what counts is that
	// nothing is left.
	a.Stage = vipctl.StageFinish
	y := Release(ctx, e, a)
	switch {
	case y.Code != OK:
		return y
	case x.Code != OK:
		return done("%s; before: %s", y.Text, x.Text)
	}
	return x
}

// sweep removes what a dead baton has left.
func sweep(ctx context.Context, e *Env, addr netip.Addr, given bool) Exit {
	if given {
		return done("%s: no baton runs, nothing is served", addr)
	}
	has, err := e.Machine.Has(addr)
	if err != nil {
		return failed("%s: no baton runs; whether the machine has the address: %v", addr, err)
	}
	if !has {
		return done("%s: no baton runs, nothing is served", addr)
	}
	if err := e.Machine.Remove(ctx, addr); err != nil {
		return failed("%s: no baton runs, and the address that it has left is not removed: %v; remove it with \"ip address del\"", addr, err)
	}
	return done("%s: no baton runs; the address that it has left was removed", addr)
}

// Check tells whether this node serves an address: OK, NotServing or Failure.
func Check(ctx context.Context, e *Env, addr netip.Addr) Exit {
	r, err := e.Baton.Check(ctx, vipctl.CheckArgs{Addr: addr})
	switch {
	case absent(err):
		return Exit{NotServing, fmt.Sprintf("%s: no baton runs", addr)}
	case err != nil:
		return Exit{Failure, why(addr, "check", err)}
	case r.State == vipctl.Serving:
		return Exit{OK, line(addr, r)}
	case r.State == vipctl.Failed:
		return Exit{Failure, line(addr, r)}
	}
	return Exit{NotServing, line(addr, r)}
}

// Health tells whether a baton runs and answers.
func Health(ctx context.Context, e *Env) Exit {
	return well(e.Baton.Ping(ctx), "baton runs")
}

// Ready tells whether a baton runs and could serve an address. During a recovery of the
// MDT no node is ready: a node that serves an address must not lose it by that alone.
func Ready(ctx context.Context, e *Env) Exit {
	return well(e.Baton.Ready(ctx), "baton runs and can serve addresses")
}

func well(err error, text string) Exit {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return failed("baton does not answer within the time-out")
	case err != nil:
		return failed("%v", err)
	}
	return done("%s", text)
}

// settle looks at an address until it is in none of the states in which it is about
// to change, or until the context ends: then the last state counts.
func settle(ctx context.Context, e *Env, addr netip.Addr, changing ...string) (vipctl.Result, error) {
	last, err := e.Baton.Check(ctx, vipctl.CheckArgs{Addr: addr})
	for err == nil && slices.Contains(changing, last.State) && ctx.Err() == nil {
		e.Sleep(ctx, poll)
		r, err := e.Baton.Check(ctx, vipctl.CheckArgs{Addr: addr})
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			return r, err
		}
		last = r
	}
	return last, err
}

// ParseAddr reads an address that a manager gave, which may have a prefix length
// and, with IPv6, brackets.
func ParseAddr(s string) (netip.Addr, error) {
	bare := vipctl.Unbracket(s)
	a, err := netip.ParseAddr(bare)
	if err != nil {
		if p, perr := netip.ParsePrefix(bare); perr == nil {
			a, err = p.Addr(), nil
		}
	}
	if err != nil || a.Zone() != "" || a.IsUnspecified() {
		return netip.Addr{}, fmt.Errorf("address %q: give an IPv4 or IPv6 address without a zone", s)
	}
	return a.Unmap(), nil
}
