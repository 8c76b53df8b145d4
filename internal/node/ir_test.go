package node

import (
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/target/recov"
)

func recoveryOf(r *status.Recovery, target string) status.RecoveryTarget {
	for _, x := range r.Targets {
		if x.Name == target {
			return x
		}
	}
	return status.RecoveryTarget{}
}

// current tells whether everybody has the registry's table.
func current(r *status.Recovery, nodes int) bool {
	if r.Registry == nil || !r.Watch.Current || len(r.Registry.Nodes) != nodes {
		return false
	}
	for _, n := range r.Registry.Nodes {
		if !n.Current || !n.Watching {
			return false
		}
	}
	return r.Registry.NotifyPending == 0
}

// Every node has the registry's table, says the same of every target wherever that
// runs, and hears where a target has moved. A registry that is away is said to be, and
// when it is back everything is announced again: 001.113..001.116, 001.123..001.129,
// SM 102, CS 121.
func TestTableOfTargets(t *testing.T) {
	c := newCell(t)
	a := c.up("a")
	b, k := c.up("b"), c.up("c")
	c.ready(a)
	c.ready(b)
	c.all(b)
	nodes := []*Node{a, b, k}
	until(t, "the table at all nodes", func() bool {
		for _, n := range nodes {
			r := n.RecoveryStatus(ctx)
			if !current(&r, 3) || r.Registry.Version != 3 || r.Registry.State != "startup" || r.Registry.NonIR != 0 {
				return false
			}
			for _, x := range r.Targets {
				if x.State != recov.StateFull.String() || x.Node == "" || x.Instance == 0 || x.Version == 0 || x.IR != "startup" || x.Shortened {
					return false
				}
			}
		}
		return true
	})
	ra, rb := a.RecoveryStatus(ctx), b.RecoveryStatus(ctx)
	for _, target := range []string{mdtName, ostName(0), ostName(1)} {
		x, y := recoveryOf(&ra, target), recoveryOf(&rb, target)
		if x.Node != y.Node || x.Instance != y.Instance || x.Version != y.Version || len(x.Clients) != len(y.Clients) || len(x.Clients) < 2 {
			t.Errorf("%s: one node says %+v, another %+v", target, x, y)
		}
		for _, k := range x.Clients {
			if k.State != status.ClientConnected || target == mdtName && k.Node != "a" && k.Node != "b" {
				t.Errorf("%s: %+v", target, k)
			}
		}
	}
	if s := b.Status().IR; s == nil || s.Registry == nil || s.Registry.NotifyCount < 3 || !s.Connected {
		t.Errorf("for metrics: %+v", s)
	}
	if s := a.Status().IR; s == nil || s.Registry != nil || s.Version != 3 {
		t.Errorf("for metrics: %+v", s)
	}

	// A move: stopped there, started here.
	if err := b.StopTarget(ctx, ostName(0)); err != nil {
		t.Fatal(err)
	}
	until(t, "the news of the stop", func() bool {
		r := a.RecoveryStatus(ctx)
		return recoveryOf(&r, ostName(0)).State == recov.StateStopped.String() && r.Registry.Version == 4
	})
	if err := k.StartTarget(ctx, ostName(0), ""); err != nil {
		t.Fatal(err)
	}
	until(t, "the news of the start", func() bool {
		r := a.RecoveryStatus(ctx)
		x := recoveryOf(&r, ostName(0))
		return x.Node == "c" && x.State == recov.StateFull.String() && current(&r, 3)
	})

	// The registry moves: another incarnation, and everything is announced again.
	was := a.RecoveryStatus(ctx)
	if err := b.StopTarget(ctx, config.MGSName); err != nil {
		t.Fatal(err)
	}
	until(t, "the loss of the registry", func() bool {
		r := a.RecoveryStatus(ctx)
		return r.Registry == nil && r.RegistryError != "" && !r.Watch.Current && !r.Watch.Connected && r.Watch.Error != "" &&
			r.Watch.Version == was.Watch.Version && recoveryOf(&r, mdtName).State == recov.StateFull.String()
	})
	if err := k.StartTarget(ctx, config.MGSName, ""); err != nil {
		t.Fatal(err)
	}
	until(t, "the table of the new registry", func() bool {
		for _, n := range nodes {
			r := n.RecoveryStatus(ctx)
			if !current(&r, 3) || r.Registry.Version != 3 || r.Registry.Incarnation <= was.Registry.Incarnation || r.Watch.At != "c" {
				return false
			}
		}
		return true
	})

	// A node that stops in order tells the registry of its targets.
	c.down("b", b)
	until(t, "the stop of a node", func() bool {
		r := a.RecoveryStatus(ctx)
		return recoveryOf(&r, mdtName).State == recov.StateStopped.String()
	})
	c.down("a", a)
}

// A node that opts out makes the state partial, and its targets are marked; the others
// go on: SM 104, SM 105, 001.121, 001.122, 001.124.
func TestOptOut(t *testing.T) {
	c := newCell(t)
	c.change = func(k *config.Config) {
		k.Recovery.IRStartup = config.Duration(time.Millisecond)
		if k.Node == "c" {
			k.Recovery.Imperative = config.ImperativeOff
		}
	}
	a := c.up("a")
	b, k := c.up("b"), c.up("c")
	c.ready(a)
	c.all(b)
	until(t, "a partial state", func() bool {
		r := a.RecoveryStatus(ctx)
		x := recoveryOf(&r, ostName(1))
		return current(&r, 3) && r.Registry.State == "partial" && r.Registry.NonIR == 1 && x.NoIR && !recoveryOf(&r, mdtName).NoIR
	})
	if r := k.RecoveryStatus(ctx); r.Watch.Imperative || !r.Watch.Connected {
		t.Errorf("it opts out and says %+v", r.Watch)
	}
	x := create(t, a, "f")
	write(t, a, x, 0, "content", 0)
	c.down("c", k)
	until(t, "a full state", func() bool {
		r := a.RecoveryStatus(ctx)
		return r.Registry != nil && r.Registry.State == "full" && r.Registry.NonIR == 0
	})
	c.down("a", a)
}

// With the registry's node opting out nobody is told: 001.121.
func TestDisabled(t *testing.T) {
	c := newCell(t)
	c.change = func(k *config.Config) {
		if k.Node == "b" {
			k.Recovery.Imperative = config.ImperativeOff
		}
	}
	b := c.up("b")
	c.ready(b)
	until(t, "the state", func() bool {
		r := b.RecoveryStatus(ctx)
		return r.Registry != nil && r.Registry.State == "disabled"
	})
}

// A node that is alone says so, and shows its targets.
func TestRecoveryOfNodeAlone(t *testing.T) {
	n, err := New(conf(t, t.TempDir()), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer n.Stop(ctx)
	r := n.RecoveryStatus(ctx)
	if !r.Alone || r.Registry != nil || r.Watch != nil || len(r.Targets) < 2 {
		t.Errorf("%+v", r)
	}
	for _, x := range r.Targets {
		if x.State != recov.StateFull.String() || x.Instance == 0 || x.Error != "" {
			t.Errorf("%+v", x)
		}
	}
	var s strings.Builder
	if err := status.RecoveryText(&s, &r); err != nil || !strings.Contains(s.String(), "alone") {
		t.Errorf("%v: %s", err, s.String())
	}
	if st := n.Status(); st.IR != nil {
		t.Errorf("%+v", st.IR)
	}
}
