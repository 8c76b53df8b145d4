package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control/lockctl"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/fdstore"
	"github.com/baton-nfs/baton/internal/node"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/client"
)

// service is what the daemon needs of a *node.Node.
type service interface {
	// Start brings the targets up and begins to serve; when it fails, nothing
	// runs. ctx bounds the start only.
	Start(ctx context.Context) error
	// Stop drains the clients for the configured time, flushes and closes the
	// targets. When ctx ends it cuts everything short.
	Stop(ctx context.Context) error
	// ReloadExports reads the exports again; on an error the old ones stay.
	ReloadExports() error
	Status() status.Status
	Metrics() prometheus.Collector
	// FS is the file system, for the commands that work on files; it may be nil.
	FS() *client.FS
	// Locks is the administrator's way to the lock table, nil when locks are off.
	Locks() *lockctl.Admin
	// Failed tells, once and after Start, that the addresses cannot be served.
	Failed() <-chan error
	targetAdmin
	recoveryAdmin
	vipctl.Mover
	vipAdmin
	// Probe goes the way of a client's call through frontend and targets.
	Probe(ctx context.Context) error
}

type nodeFunc func(*config.Config, *slog.Logger) (service, error)

func newNode(cfg *config.Config, log *slog.Logger) (service, error) {
	n, err := node.New(cfg, log)
	if err != nil || !underSystemd() {
		return n, err
	}
	n.Keep(fdstore.Receive(cfg.DataDir, log), fdstore.Systemd{Notify: os.Getenv("NOTIFY_SOCKET")})
	return n, nil
}
