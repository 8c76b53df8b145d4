package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/client"
)

// dirUser is the user that a node's directories belong to, if root works in them and it is
// another one: files that root makes there could not be opened by the service.
type dirUser struct {
	uid, gid int
	groups   []int
	name     string
}

// dirOwner is nil if the process may work in dir as it is.
func dirOwner(dir string) (*dirUser, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	fi, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return nil, nil
	}
	o := &dirUser{uid: int(st.Uid), gid: int(st.Gid), name: strconv.Itoa(int(st.Uid))}
	u, err := user.LookupId(o.name)
	if err != nil {
		return o, nil // nobody has given it a name
	}
	o.name = u.Username
	if o.gid, err = strconv.Atoi(u.Gid); err != nil {
		return nil, fmt.Errorf("group of user %s: %w", o.name, err)
	}
	l, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %s: %w", o.name, err)
	}
	for _, g := range l {
		if n, err := strconv.Atoi(g); err == nil {
			o.groups = append(o.groups, n)
		}
	}
	return o, nil
}

// becomeOwner has this process go on as the user that dir belongs to, for good, if it is
// root's. What only root may read was read before.
func becomeOwner(dir string) error {
	o, err := dirOwner(dir)
	if o == nil || err != nil {
		return err
	}
	if err = syscall.Setgroups(o.groups); err == nil {
		err = syscall.Setgid(o.gid)
	}
	if err == nil {
		err = syscall.Setuid(o.uid)
	}
	if err != nil {
		return fmt.Errorf("go on as user %s, whom %s belongs to: %w", o.name, dir, err)
	}
	return nil
}

// asOwner opens as the user that the directories belong to.
func asOwner(open openFSFunc) openFSFunc {
	if open == nil {
		return nil
	}
	return func(ctx context.Context, cfg *config.Config, log *slog.Logger) (*client.FS, func() error, error) {
		if err := becomeOwner(cfg.DataDir); err != nil {
			return nil, nil, err
		}
		return open(ctx, cfg, log)
	}
}

// byOwner opens only where that makes no files of another user than the directories'. It is
// for what needs the rights that it was called with, too.
func byOwner(open openFSFunc) openFSFunc {
	if open == nil {
		return nil
	}
	return func(ctx context.Context, cfg *config.Config, log *slog.Logger) (*client.FS, func() error, error) {
		o, err := dirOwner(cfg.DataDir)
		if err == nil && o != nil {
			err = fmt.Errorf("%s belongs to user %s, whose baton could not open what root writes there: start baton first, or do this as that user (runuser -u %s -- baton ...)", cfg.DataDir, o.name, o.name)
		}
		if err != nil {
			return nil, nil, err
		}
		return open(ctx, cfg, log)
	}
}
