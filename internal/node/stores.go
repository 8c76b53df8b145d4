package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
)

// checkStores refuses to make a new part of a store that is there already. A
// missing directory is a disk that is not mounted much more often than a new
// target: an empty OST would give zeros for data, an empty MDT would give the
// numbers of old objects to new files.
func checkStores(ctx context.Context, cfg *config.Config, reg *mgs.File) error {
	type part struct{ name, dir string }
	parts := []part{{mdtName, cfg.MDT.Dir}}
	for i, o := range cfg.OST {
		parts = append(parts, part{ostName(i), o.Dir})
	}
	made, err := reg.OSTs(ctx)
	if err != nil {
		return err
	}
	if len(cfg.OST) < made {
		return fmt.Errorf("the configuration has %d OSTs, the store was made with %d: add the missing [[ost]] tables", len(cfg.OST), made)
	}
	for i, p := range parts {
		used, err := inUse(p.dir)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", p.name, err)
		case reg.Fresh() && used:
			return fmt.Errorf("%s in %s is not empty, but %s is missing: restore it from a backup, or give empty directories for a new store",
				p.name, p.dir, filepath.Join(cfg.MGS.Dir, mgs.FileName))
		case !used && made > 0 && i <= made: // the MDT, and that many OSTs after it
			return fmt.Errorf("%s: %s is empty or missing, but belongs to the store: mount its disk or restore it from a backup", p.name, p.dir)
		}
	}
	return nil
}

// inUse tells whether a directory holds anything but what a new file system does,
// and what is made there before a target is.
func inUse(dir string) (bool, error) {
	es, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, e := range es {
		switch e.Name() {
		case "lost+found", owner.FileName, storeLock, storeMark:
		default:
			return true, nil
		}
	}
	return false, nil
}

// checkKey refuses to make a new cluster key for addresses that were served
// under another one: all handles that clients hold would become stale.
func checkKey(ctx context.Context, cfg *config.Config) error {
	if _, err := os.Stat(cfg.ClusterKeyFile); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	reg, err := mgs.Open(cfg.MGS.Dir, mgs.FileOptions{})
	if err != nil {
		return err
	}
	vips, err := reg.VIPs(ctx)
	if err != nil {
		return err
	}
	if len(vips) > 0 {
		return fmt.Errorf("cluster key %s is missing: restore it from a copy (a new key makes all file handles stale; to accept that, make one: head -c %d /dev/urandom > %s; chmod 600 %s)",
			cfg.ClusterKeyFile, config.ClusterKeySize, cfg.ClusterKeyFile, cfg.ClusterKeyFile)
	}
	return nil
}

// explain adds the remedy to errors that have one and come from far below.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%w; raise the limit of open files (ulimit -n, LimitNOFILE= of systemd) to 65536", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; mount the file system writable, after checking its disk", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, wire.ErrNoSpc):
		return fmt.Errorf("%w; free some space on the disks of the targets and start again", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w; give the directory to the user that runs baton", err)
	}
	return err
}

// maxConns is nfs.max_connections, or less where the limit of open files asks
// for it: connections must leave half of what is free to the targets, because a
// store that cannot open its files fails.
func (n *Node) maxConns() int {
	want := n.cfg.NFS.MaxConnections
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil || lim.Cur > 1<<30 {
		return want
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return want
	}
	most := max((int(lim.Cur)-len(open))/2/n.addresses(), 16)
	if want <= most {
		return want
	}
	n.log.Warn("fewer connections than nfs.max_connections: the limit of open files is too low (ulimit -n, LimitNOFILE= of systemd)",
		"max_connections", want, "taken", most, "limit", lim.Cur)
	return most
}

// floatingUsual is how many floating addresses a node is expected to serve at a time.
const floatingUsual = 4

// addresses is about how many service addresses this node serves.
func (n *Node) addresses() int {
	if n.cfg.NFS.Floating {
		return len(n.cfg.Addrs()) + floatingUsual
	}
	return max(len(n.cfg.Addrs()), 1)
}

// TakeStores owns the stores of a cluster's targets for the time of a check, so that
// no node starts them meanwhile. A store whose target runs is refused. The stores of
// a node that is alone need none of it.
func TakeStores(ctx context.Context, cfg *config.Config) (leave func(), err error) {
	var ends []func()
	leave = func() {
		for _, end := range ends {
			end()
		}
	}
	if !cfg.Clustered() {
		return leave, nil
	}
	for _, t := range cfg.Targets() {
		if t.Name == config.MGSName {
			continue
		}
		if err := takeForCheck(ctx, cfg, t.Dir, &ends); err != nil {
			leave()
			return nil, fmt.Errorf("%s in %s: %w", t.Name, t.Dir, err)
		}
	}
	return leave, nil
}

func takeForCheck(ctx context.Context, cfg *config.Config, dir string, ends *[]func()) error {
	o := owner.Options{Node: cfg.Cluster.Node, Dir: dir, Interval: time.Duration(cfg.Recovery.Heartbeat), Check: true}
	unlock := func() {}
	if cfg.Cluster.FileLocks {
		var err error
		if unlock, err = lockStore(dir); err != nil {
			return err
		}
		o.Exclusive = true
	}
	own, err := owner.Open(ctx, o)
	if err != nil {
		unlock()
		return err
	}
	*ends = append(*ends, func() {
		_ = own.Release(context.WithoutCancel(ctx)) // else others wait before they take it
		unlock()
	})
	return nil
}
