package hooks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/control/vipctl"
)

// CTDBTimeout is how long an event may take when nothing else is said: less than
// CTDB's TakeoverTimeout of 9 s.
const CTDBTimeout = 8 * time.Second

// Part says where among CTDB's event scripts this one is.
type Part string

// Parts. CTDB adds and removes addresses in 10.interface; scripts run in the
// order of their numbers.
const (
	Before Part = "before" // numbers below 10: takeip before the address is there, releaseip while it is
	After  Part = "after"  // numbers above 10
)

// maxAddrs bounds the addresses of one machine that CTDB may manage.
const maxAddrs = 4096

// CTDBAddrs are the addresses to look at when an event names none: those in
// environment variable BATON_ADDRESSES, else all of CTDB's public_addresses (lines
// of "address/bits interfaces"), whose text the caller gives.
func CTDBAddrs(getenv func(string) string, public string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	if list := strings.Fields(getenv("BATON_ADDRESSES")); len(list) > 0 {
		for _, s := range list {
			a, err := ParseAddr(s)
			if err != nil {
				return nil, fmt.Errorf("BATON_ADDRESSES: %w", err)
			}
			addrs = append(addrs, a)
		}
		return addrs, nil
	}
	sc := bufio.NewScanner(strings.NewReader(public))
	for n := 1; sc.Scan(); n++ {
		f := strings.Fields(sc.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		a, err := ParseAddr(f[0])
		if err != nil {
			return nil, fmt.Errorf("public_addresses line %d: %w", n, err)
		}
		if addrs = append(addrs, a); len(addrs) > maxAddrs {
			return nil, fmt.Errorf("public_addresses: more than %d addresses", maxAddrs)
		}
	}
	return addrs, sc.Err()
}

// ctdbOurs tells whether an event's address is for baton: CTDB may have others, for
// other services; then BATON_ADDRESSES says which are baton's.
func ctdbOurs(e *Env, addr netip.Addr) (bool, error) {
	if e.Getenv("BATON_ADDRESSES") == "" {
		return true, nil
	}
	all, err := CTDBAddrs(e.Getenv, "")
	return slices.Contains(all, addr), err
}

// CTDBEvent handles an event of an event script (ctdb-script.options(5), ctdb 4.17):
// args are the event and its arguments. addrs are those of CTDBAddrs.
//
// CTDB takes addresses only after it has released them on all nodes that live:
// the last owner may be declared gone.
func CTDBEvent(ctx context.Context, e *Env, part Part, addrs []netip.Addr, args []string) Exit {
	if len(args) == 0 {
		return Exit{Failure, "no event given"}
	}
	switch event := args[0]; event {
	case "takeip", "releaseip":
		if len(args) != 4 {
			return failed("event %s: want interface, address and mask bits, have %q", event, args[1:])
		}
		addr, err := ParseAddr(args[2])
		if err != nil {
			return failed("event %s: %v", event, err)
		}
		return ctdbMove(ctx, e, event, part, addr)
	case "startup":
		if part == Before {
			return Ready(ctx, e)
		}
	case "init":
		if part == Before {
			return each(addrs, func(a netip.Addr) Exit { return ReleaseAll(ctx, e, vipctl.ReleaseArgs{Addr: a, Given: true}) })
		}
	case "shutdown":
		// CTDB itself tells of no releases, and 10.interface drops the addresses. Until
		// then new connections are held, not refused.
		stage := vipctl.StageDrain
		if part == After {
			stage = vipctl.StageFinish
		}
		return each(addrs, func(a netip.Addr) Exit {
			return Release(ctx, e, vipctl.ReleaseArgs{Addr: a, Stage: stage, Given: true})
		})
	case "monitor":
		if part == Before {
			return ctdbMonitor(ctx, e, addrs)
		}
	}
	return Exit{}
}

func ctdbMove(ctx context.Context, e *Env, event string, part Part, addr netip.Addr) Exit {
	ours, err := ctdbOurs(e, addr)
	switch {
	case err != nil:
		return Exit{Failure, err.Error()}
	case !ours:
		return done("%s: not among BATON_ADDRESSES: left alone", addr)
	}
	switch {
	case event == "takeip" && part == Before:
		return Take(ctx, e, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageListen, Given: true, Force: true})
	case event == "takeip":
		return Take(ctx, e, vipctl.TakeArgs{Addr: addr, Stage: vipctl.StageServe, Given: true, Force: true})
	case part == Before:
		return Release(ctx, e, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageDrain, Given: true})
	}
	return Release(ctx, e, vipctl.ReleaseArgs{Addr: addr, Stage: vipctl.StageFinish, Given: true})
}

// ctdbMonitor tells whether baton is well, and has it serve addresses that CTDB has
// given to this machine and that it does not serve, as after its restart. A node that
// has an address keeps it while the MDT recovers, which concerns all nodes; one that has
// none is to get none before it could serve it.
func ctdbMonitor(ctx context.Context, e *Env, addrs []netip.Addr) Exit {
	if x := Health(ctx, e); x.Code != OK {
		return x
	}
	var has atomic.Bool
	x := each(addrs, func(a netip.Addr) Exit {
		r, err := settle(ctx, e, a, vipctl.Taking, vipctl.Releasing)
		if err != nil {
			return failed("%s", why(a, "check", err))
		}
		here, err := e.Machine.Has(a)
		if here {
			has.Store(true)
		}
		switch {
		case err != nil:
			return failed("%s: whether the machine has the address: %v", a, err)
		case r.State == vipctl.Failed:
			return failed("%s", line(a, r))
		case here && (r.State == vipctl.Absent || r.State == vipctl.Listening || r.State == vipctl.Unknown):
			return Take(ctx, e, vipctl.TakeArgs{Addr: a, Stage: vipctl.StageServe, Given: true, Force: true})
		}
		return Exit{}
	})
	switch {
	case x.Code == OK && !has.Load():
		return Ready(ctx, e)
	case x.Code == OK && x.Text == "":
		x.Text = "baton runs"
	}
	return x
}

// CalloutOps are the operations of CTDB's NFS callout that there are, as its
// operation "register" prints them.
var CalloutOps = []string{"startup", "shutdown", "monitor-pre", "takeip-pre", "takeip", "releaseip-pre", "releaseip"}

// CTDBCallout handles an operation of the NFS callout, which 06.nfs and 60.nfs call
// (ctdb 4.17).
func CTDBCallout(ctx context.Context, e *Env, addrs []netip.Addr, args []string) Exit {
	if len(args) == 0 {
		return failed("no operation given")
	}
	args = slices.Clone(args)
	part := After
	switch args[0] {
	case "register":
		return Exit{OK, strings.Join(CalloutOps, "\n")}
	case "takeip-pre", "releaseip-pre":
		part, args[0] = Before, strings.TrimSuffix(args[0], "-pre")
	case "takeip", "releaseip":
	case "shutdown": // 60.nfs calls it
	case "startup":
		part = Before
	case "monitor-pre":
		part, args[0] = Before, "monitor"
	default:
		return Exit{} // the callout's rule: unknown operations succeed
	}
	return CTDBEvent(ctx, e, part, addrs, args)
}

// each does f for all addresses, some at the same time, and puts the lines together;
// the first failure gives the code.
func each(addrs []netip.Addr, f func(netip.Addr) Exit) Exit {
	exits := make([]Exit, len(addrs))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8) // the control socket takes 32 connections
	for i, a := range addrs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			exits[i] = f(a)
		})
	}
	wg.Wait()
	var all Exit
	var texts []string
	var errs []error
	for _, x := range exits {
		if x.Code != OK {
			errs = append(errs, errors.New(x.Text))
			if all.Code == OK {
				all.Code = x.Code
			}
		}
		if x.Text != "" {
			texts = append(texts, x.Text)
		}
	}
	if len(errs) > 0 { // who reads it wants to know what is wrong
		texts = texts[:0]
		for _, err := range errs {
			texts = append(texts, err.Error())
		}
	}
	all.Text = strings.Join(texts, "; ")
	return all
}
