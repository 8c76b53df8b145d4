package main

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/config"
)

// A stop gets the time that it may need by the configuration: to have floating addresses
// taken, or to go through the stages of giving them up, before the fixed ones are drained
// and everything is closed. Whatever the first part takes, the others have their own.
func TestStopTimes(t *testing.T) {
	cfg := config.Default()
	cfg.NFS.DrainTimeout = config.Duration(10 * time.Second)
	f := &cfg.Failover
	f.StopWait = config.Duration(2 * time.Minute)
	f.RefuseTimeout, f.DrainTimeout, f.CommitTimeout = config.Duration(time.Second), config.Duration(20*time.Second), config.Duration(30*time.Second)
	f.CloseTimeout, f.ClearTimeout, f.RemoveTimeout, f.FinishTimeout = f.RefuseTimeout, f.RefuseTimeout, f.RefuseTimeout, f.RefuseTimeout
	for _, c := range []struct {
		what           string
		node, mode     string
		floating       bool
		want, deadline time.Duration // of draining, and besides closing
	}{
		{"a single node", "", config.ManagerBuiltin, false, 10 * time.Second, 40 * time.Second},
		{"no floating addresses", "n1", config.ManagerBuiltin, false, 10 * time.Second, 40 * time.Second},
		{"a cluster manager", "n1", config.ManagerExternal, true, 75 * time.Second, 105 * time.Second},
		{"the builtin manager", "n1", config.ManagerBuiltin, true, 195 * time.Second, 225 * time.Second},
	} {
		cfg.Cluster.Node, cfg.Manager.Mode, cfg.NFS.Floating = c.node, c.mode, c.floating
		if got := drainTime(cfg); got != c.want {
			t.Errorf("%s: %v for draining, want %v", c.what, got, c.want)
		}
		begin := time.Now()
		var end time.Time
		n := &fakeNode{stop: func(ctx context.Context) error {
			end, _ = ctx.Deadline()
			return nil
		}}
		s := &server{node: n, log: slog.New(slog.DiscardHandler)}
		if err := s.stop(context.Background(), drainTime(cfg), nil); err != nil {
			t.Fatal(err)
		}
		if got := end.Sub(begin); got < c.deadline || got >= stopTime(c.want) {
			t.Errorf("%s: the stop may take %v, want %v", c.what, got, c.deadline)
		}
	}
}
