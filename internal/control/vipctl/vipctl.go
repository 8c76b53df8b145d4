// Package vipctl has the commands by which the hooks of cluster managers move
// floating addresses (package control): their names, arguments and results.
package vipctl

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/baton-nfs/baton/internal/control"
)

// Commands. They can be given again, and by several callers at the same time: those
// for one address wait for each other, and a release that comes while a take is
// under way breaks it off. When the caller has gone, only the wait ends: what was begun
// goes on.
const (
	CmdTake    = "vip-take"    // TakeArgs; Result
	CmdRelease = "vip-release" // ReleaseArgs; Result
	CmdCheck   = "vip-check"   // CheckArgs; Result
	CmdReady   = "vip-ready"   // whether this node could serve an address; an error says why not
)

// Stages of TakeArgs.
const (
	StageListen = "listen" // the listeners are open, the address is not here yet
	StageServe  = "serve"  // the address is here and calls are answered
)

// Stages of ReleaseArgs.
const (
	StageDrain  = "drain"  // nothing is answered any more and no connection is left
	StageFinish = "finish" // nothing is left
)

// States of a Result.
const (
	Serving   = "serving"
	Listening = "listening"
	Taking    = "taking"
	Releasing = "releasing"
	Absent    = "absent"
	Unknown   = "unknown" // no such address, or this node serves none (yet)
	Failed    = "failed"
)

// TakeArgs ask for an address to be assigned to this node and served.
type TakeArgs struct {
	Addr netip.Addr `json:"addr"`
	// Stage is what the call waits for.
	Stage string `json:"stage"`
	// Given: the cluster manager adds the address and removes it; this node only
	// uses it. After StageListen it then waits for StageServe.
	Given bool `json:"given,omitempty"`
	// Force: the node that had the address last is known to be gone.
	Force bool `json:"force,omitempty"`
}

// ReleaseArgs ask for an address to be given up.
type ReleaseArgs struct {
	Addr  netip.Addr `json:"addr"`
	Stage string     `json:"stage"`
	// Given: the address is left where it is.
	Given bool `json:"given,omitempty"`
	// To is the node that is to serve it; empty: nobody for now.
	To string `json:"to,omitempty"`
}

// CheckArgs ask how an address is here.
type CheckArgs struct {
	Addr netip.Addr `json:"addr"`
}

// Result tells how the address is and what was done, in one line.
type Result struct {
	State string `json:"state"`
	Text  string `json:"text"`
}

// Mover does what the commands ask for. The context bounds the wait, not the work.
type Mover interface {
	TakeVIP(ctx context.Context, a TakeArgs) (Result, error)
	ReleaseVIP(ctx context.Context, a ReleaseArgs) (Result, error)
	CheckVIP(ctx context.Context, a CheckArgs) (Result, error)
	// ReadyVIP gives the reason for which no address could be served here now.
	ReadyVIP(ctx context.Context) error
}

// Register lets a server take the commands.
func Register(s *control.Server, m Mover) {
	handle(s, CmdTake, func(ctx context.Context, a TakeArgs) (Result, error) {
		if err := check(a.Addr, a.Stage, StageListen, StageServe); err != nil {
			return Result{}, err
		}
		a.Addr = a.Addr.Unmap()
		return m.TakeVIP(ctx, a)
	})
	handle(s, CmdRelease, func(ctx context.Context, a ReleaseArgs) (Result, error) {
		if err := check(a.Addr, a.Stage, StageDrain, StageFinish); err != nil {
			return Result{}, err
		}
		a.Addr = a.Addr.Unmap()
		return m.ReleaseVIP(ctx, a)
	})
	handle(s, CmdCheck, func(ctx context.Context, a CheckArgs) (Result, error) {
		if err := check(a.Addr, ""); err != nil {
			return Result{}, err
		}
		a.Addr = a.Addr.Unmap()
		return m.CheckVIP(ctx, a)
	})
	s.Handle(CmdReady, func(ctx context.Context, _ json.RawMessage) (any, error) { return nil, m.ReadyVIP(ctx) })
}

func handle[T any](s *control.Server, cmd string, f func(context.Context, T) (Result, error)) {
	s.HandleWait(cmd, func(ctx context.Context, raw json.RawMessage) (any, error) {
		var args T
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, fmt.Errorf("arguments of %s: %w", cmd, err)
		}
		r, err := f(ctx, args)
		if err != nil {
			return nil, err
		}
		return &r, nil
	})
}

func check(addr netip.Addr, stage string, stages ...string) error {
	if !addr.IsValid() || addr.Zone() != "" || addr.IsUnspecified() {
		return fmt.Errorf("address %q is none that can be served: give an IPv4 or IPv6 address without a zone", addr)
	}
	for _, s := range stages {
		if s == stage {
			return nil
		}
	}
	if len(stages) > 0 {
		return fmt.Errorf("stage %q: want one of %q", stage, stages)
	}
	return nil
}

// Unbracket takes the brackets away that belong around an IPv6 address before a port, and
// that people write without a port, too. What follows them stays.
func Unbracket(s string) string {
	if host, rest, ok := strings.Cut(s, "]"); ok && strings.HasPrefix(host, "[") && strings.Contains(host, ":") {
		return host[1:] + rest
	}
	return s
}
