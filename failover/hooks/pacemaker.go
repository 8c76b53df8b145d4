package hooks

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// Exit codes of OCF resource agents (OCF Resource Agent API 1.1, section 3.6).
const (
	ocfSuccess       = 0
	ocfGeneric       = 1
	ocfArgs          = 2
	ocfUnimplemented = 3
	ocfInstalled     = 5
	ocfConfigured    = 6
	ocfNotRunning    = 7
)

// Roles of a resource: parameter role of the agent.
const (
	RoleWhole = "whole" // it adds the address and serves it
	RolePost  = "post"  // below the address's resource: listeners, and what remains at the end
	RolePre   = "pre"   // above it: serves, and drains while the address is there
)

// ocfDefault is the time-out that is assumed when Pacemaker gives none.
const ocfDefault = 20 * time.Second

// PacemakerTimeout is how long an action may take: what Pacemaker allows, less a
// margin to tell of it.
func PacemakerTimeout(getenv func(string) string) time.Duration {
	d := ocfDefault
	if ms, err := strconv.ParseInt(getenv("OCF_RESKEY_CRM_meta_timeout"), 10, 64); err == nil && ms > 0 && ms < int64(24*time.Hour/time.Millisecond) {
		d = time.Duration(ms) * time.Millisecond
	}
	return Margin(d)
}

// Margin takes off a time-out what telling of it needs.
func Margin(d time.Duration) time.Duration { return d - min(d/10, time.Second) }

// Pacemaker executes an action of the resource agent; parameters are in the
// environment (OCF_RESKEY_ip, OCF_RESKEY_role). Codes are OCF's.
//
// That Pacemaker starts a resource here means that it was stopped everywhere else,
// or that its node was fenced: so the last owner may be declared gone.
func Pacemaker(ctx context.Context, e *Env, action string) Exit {
	switch action {
	case "start", "stop", "monitor", "status", "validate-all":
	default:
		return Exit{ocfUnimplemented, fmt.Sprintf("action %q is not implemented", action)}
	}
	addr, role, err := ocfParameters(e.Getenv)
	if err != nil {
		return Exit{ocfConfigured, err.Error()}
	}
	switch action {
	case "start":
		return ocfStart(ctx, e, addr, role)
	case "stop":
		return ocfStop(ctx, e, addr, role)
	case "validate-all":
		return done("%s, role %s", addr, role)
	}
	return ocfMonitor(ctx, e, addr, role)
}

// PacemakerUnset is how an action ends if baton's configuration cannot be read: the
// node is not set up for the resource. Whether something runs, which stop has to
// know, cannot be told.
func PacemakerUnset(action string, err error) Exit {
	if action == "stop" {
		return Exit{ocfGeneric, err.Error()}
	}
	return Exit{ocfInstalled, err.Error()}
}

func ocfParameters(getenv func(string) string) (netip.Addr, string, error) {
	role := getenv("OCF_RESKEY_role")
	switch role {
	case "":
		role = RoleWhole
	case RoleWhole, RolePost, RolePre:
	default:
		return netip.Addr{}, "", fmt.Errorf("parameter role=%q: use %s, %s or %s", role, RoleWhole, RolePre, RolePost)
	}
	ip := getenv("OCF_RESKEY_ip")
	if ip == "" {
		return netip.Addr{}, "", fmt.Errorf("parameter ip is missing: the floating address")
	}
	addr, err := ParseAddr(ip)
	if err != nil {
		return netip.Addr{}, "", fmt.Errorf("parameter ip: %w", err)
	}
	return addr, role, nil
}

func ocfStart(ctx context.Context, e *Env, addr netip.Addr, role string) Exit {
	a := vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe, Given: role != RoleWhole, Force: true}
	if role == RolePost {
		a.Stage = vipctl.StageListen
	}
	return Take(ctx, e, a)
}

func ocfStop(ctx context.Context, e *Env, addr netip.Addr, role string) Exit {
	a := vipctl.ReleaseArgs{Addr: addr, Given: role != RoleWhole}
	switch role {
	case RolePre:
		a.Stage = vipctl.StageDrain
		return Release(ctx, e, a)
	case RolePost:
		a.Stage = vipctl.StageFinish
		return Release(ctx, e, a)
	}
	return ReleaseAll(ctx, e, a)
}

func ocfMonitor(ctx context.Context, e *Env, addr netip.Addr, role string) Exit {
	switch role {
	case RolePost:
		// It is there from the listeners' opening to their end.
		r, err := e.Baton.Check(ctx, vipctl.CheckArgs{Addr: addr})
		return ocfState(e, addr, role, r, err, r.State == vipctl.Serving || r.State == vipctl.Listening || r.State == vipctl.Taking || r.State == vipctl.Releasing)
	case RolePre:
		r, err := settle(ctx, e, addr, vipctl.Taking)
		if err == nil && r.State == vipctl.Releasing {
			return Exit{ocfNotRunning, line(addr, r)} // drained; the rest is post's
		}
		return ocfState(e, addr, role, r, err, r.State == vipctl.Serving)
	}
	r, err := settle(ctx, e, addr, vipctl.Taking, vipctl.Releasing)
	return ocfState(e, addr, role, r, err, r.State == vipctl.Serving)
}

func ocfState(e *Env, addr netip.Addr, role string, r vipctl.Result, err error, runs bool) Exit {
	switch {
	case absent(err):
		if role == RoleWhole {
			// Pacemaker must stop what is half there before it starts it elsewhere.
			if has, herr := e.Machine.Has(addr); herr != nil || has {
				return Exit{ocfGeneric, fmt.Sprintf("%s: no baton runs, but the machine has the address", addr)}
			}
		}
		return Exit{ocfNotRunning, fmt.Sprintf("%s: no baton runs", addr)}
	case err != nil:
		return Exit{ocfGeneric, why(addr, "check", err)}
	case runs:
		return Exit{ocfSuccess, line(addr, r)}
	case r.State == vipctl.Failed, r.State == vipctl.Taking, r.State == vipctl.Releasing:
		return Exit{ocfGeneric, line(addr, r)}
	}
	return Exit{ocfNotRunning, line(addr, r)}
}
