package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
)

// hosted is a target of the cluster, as far as this node has to do with it.
type hosted struct {
	config.Target
	kind  string
	index int // of an OST
	// wanted: it is started with the node, or was started by order, and was not
	// stopped since nor found elsewhere.
	wanted atomic.Bool

	// op is held while the target is being started or stopped; mu guards the rest
	// and is never held while waiting. op comes first.
	op     sync.Mutex
	mu     sync.Mutex
	state  string // of status
	reason string // what a start waits for, or why the target does not run
	cancel context.CancelFunc
	// Of a target that runs, one of the three.
	mgs    *host.MGS
	mdt    *host.MDT
	ost    *host.OST
	unlock func()
	deaf   func() // ends the target's hearing of news
}

// set notes what becomes of the target.
func (h *hosted) set(state, reason string) {
	h.mu.Lock()
	h.state, h.reason = state, reason
	h.mu.Unlock()
}

// running is the target for connections in this process, nil while it does not run.
func (h *hosted) running() wire.Target {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.mgs != nil:
		return h.mgs.Service()
	case h.mdt != nil:
		return h.mdt.Front()
	case h.ost != nil:
		return h.ost.Front()
	}
	return nil
}

// instance numbers the starts of a target that runs here; 0: it does not.
func (h *hosted) instance() uint64 {
	if f := h.front(); f != nil {
		return f.Instance()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mgs != nil {
		return h.mgs.Instance()
	}
	return 0
}

// errNotStopped: a target is to be started that runs here already, or nearly.
var errNotStopped = errors.New("the target is not stopped")

// start runs a target on this node, until ctx ends at most. Fenced names a node that
// can do nothing to the store any more.
func (c *cluster) start(ctx context.Context, h *hosted, fenced string) error {
	if !h.MayRun(c.name) {
		return fmt.Errorf("node %s is not among the nodes of %s (%v): start it on one of them", c.name, h.Name, h.Nodes)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.mu.Lock()
	switch h.state {
	case status.StateStopped, status.StateFailed:
	default:
		defer h.mu.Unlock()
		return fmt.Errorf("%s on node %s: %w, but %s", h.Name, c.name, errNotStopped, h.state)
	}
	h.state, h.reason, h.cancel = status.StateStarting, "", cancel
	h.mu.Unlock()
	h.op.Lock()
	defer h.op.Unlock()
	err := c.run(ctx, h, fenced)
	if err == nil {
		h.set(status.StateUp, "")
		c.log.Info("target runs here", "target", h.Name, "dir", h.Dir)
		return nil
	}
	err = explain(err)
	h.set(status.StateStopped, err.Error())
	return err
}

// run does the work of start; h.op is held.
func (c *cluster) run(ctx context.Context, h *hosted, fenced string) (err error) {
	if h.kind != status.KindMGS {
		h.set(status.StateStarting, "waits for "+c.registryName())
		if err := c.meet(ctx); err != nil {
			return err
		}
	}
	h.set(status.StateStarting, "looks at its directory")
	if err := c.directory(ctx, h); err != nil {
		return err
	}
	own := &owner.Options{
		Node: c.name, Dir: h.Dir, Interval: time.Duration(c.cfg.Recovery.Heartbeat), Fenced: fenced, Logger: c.log.With("target", h.Name),
		OnWanted: func(node string) { c.log.Debug("another node asks for the store", "target", h.Name, "node", node) },
	}
	unlock := func() {}
	if c.cfg.Cluster.FileLocks {
		if unlock, err = lockStore(h.Dir); err != nil {
			return fmt.Errorf("start %s: %w", h.Name, err)
		}
		own.Exclusive = true
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	h.set(status.StateStarting, "takes its store")
	owned := func(ctx context.Context) error {
		h.set(status.StateStarting, "owns its store and opens it")
		return c.checkStore(ctx, h)
	}
	// That it fails is found out at any time, also before it is entered below.
	onFail := func(err error) { c.background(func() { c.failed(h, err) }) }
	var m *host.MGS
	var t *host.MDT
	var o *host.OST
	switch h.kind {
	case status.KindMGS:
		m, err = host.StartMGS(ctx, host.MGSOptions{Dir: h.Dir, Owner: own, Owned: owned, Table: c.tableConfig(), Logger: c.log, OnFail: onFail})
		if err == nil {
			err = adopt(ctx, m.Registry())
		}
	case status.KindMDT:
		mo := mdtOptions(c.cfg, c.clock, c.log)
		mo.Owner, mo.Owned, mo.OnFail, mo.OSTs = own, owned, onFail, c.osts()
		mo.Pingless, mo.Watched = c.cfg.Recovery.SuppressPings, c.lives.has
		if !c.cfg.Cluster.FileLocks {
			mo.Engine.FS = noVFSLocks{vfs.Default}
		}
		if t, err = host.StartMDT(ctx, mo); err == nil {
			c.clock.NotBefore(t.Body().Time())
		}
	default:
		oo := ostOptions(c.cfg, h.index, c.clock, c.log)
		oo.Owner, oo.Owned, oo.OnFail, oo.MDT = own, owned, onFail, c.reach(mdtName)
		oo.Pingless = c.cfg.Recovery.SuppressPings
		found := newWaiter(mdtName)
		oo.Found = found.node
		defer c.news.join(found)()
		oo.OnWait = func(why string) { h.set(status.StateStarting, why) }
		if !c.cfg.Cluster.FileLocks || c.testDisk != nil {
			fs, err := objfs.NewLinux(h.Dir)
			if err != nil {
				return fmt.Errorf("start %s: %w", h.Name, err)
			}
			if oo.OST.FS = fs; !c.cfg.Cluster.FileLocks {
				oo.OST.FS = noFSLocks{fs}
			}
			if c.testDisk != nil {
				oo.OST.FS = c.testDisk(oo.OST.FS)
			}
		}
		o, err = host.StartOST(ctx, oo)
	}
	if err != nil {
		if m != nil {
			err = errors.Join(err, m.Stop(context.WithoutCancel(ctx)))
		}
		return err
	}
	deaf := func() {}
	if t != nil {
		deaf = c.news.join(t)
	}
	h.mu.Lock()
	h.mgs, h.mdt, h.ost, h.unlock, h.deaf = m, t, o, unlock, deaf
	h.mu.Unlock()
	if err := c.srv.SetTarget(h.Name, h.running()); err != nil {
		return errors.Join(err, c.halt(context.WithoutCancel(ctx), h))
	}
	c.news.runs(h.Name, h.instance(), c.name)
	c.announce(h)
	return nil
}

// stop stops a target in order: its next start, anywhere, has nothing to recover. A
// start that is under way is broken off.
func (c *cluster) stop(ctx context.Context, h *hosted) error {
	h.mu.Lock()
	if h.state == status.StateStarting {
		h.cancel()
	}
	h.mu.Unlock()
	h.op.Lock()
	defer h.op.Unlock()
	if h.running() == nil {
		h.set(status.StateStopped, "")
		return nil
	}
	h.set(status.StateStopping, "")
	err := c.halt(ctx, h)
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	h.set(status.StateStopped, reason)
	c.log.Info("target does not run here any more", "target", h.Name, "err", err)
	return err
}

// failed takes a target down that has failed by itself.
func (c *cluster) failed(h *hosted, why error) {
	h.op.Lock()
	defer h.op.Unlock()
	if h.running() == nil {
		return // its start has failed, or it was stopped meanwhile
	}
	if h.alive() {
		return // it was started again since
	}
	c.log.Error("target has failed and is taken down", "target", h.Name, "err", why)
	ctx, cancel := context.WithTimeout(context.Background(), haltTime)
	defer cancel()
	if err := c.halt(ctx, h); err != nil {
		c.log.Debug("target was not closed in order", "target", h.Name, "err", err)
	}
	h.set(status.StateFailed, why.Error())
	c.background(func() {
		select {
		case <-c.ctx.Done():
		case <-time.After(startAgain):
			c.keep(h)
		}
	})
}

// alive tells that the target which runs has not failed.
func (h *hosted) alive() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.mgs != nil:
		return h.mgs.Err() == nil
	case h.mdt != nil:
		return h.mdt.Err() == nil
	case h.ost != nil:
		return h.ost.Err() == nil
	}
	return false
}

// haltTime bounds the end of a target that nobody waits for.
const haltTime = 30 * time.Second

// halt ends what runs; h.op is held. New connections in this process do not find
// it any more.
func (c *cluster) halt(ctx context.Context, h *hosted) error {
	h.mu.Lock()
	m, t, o, unlock, deaf := h.mgs, h.mdt, h.ost, h.unlock, h.deaf
	h.mgs, h.mdt, h.ost, h.unlock, h.deaf = nil, nil, nil, nil, nil
	h.mu.Unlock()
	c.news.gone(h.Name, c.name)
	deaf()
	var err error
	switch {
	case m != nil:
		err = m.Stop(ctx)
	case t != nil:
		err = t.Stop(ctx)
	case o != nil:
		err = o.Stop(ctx)
	}
	err = errors.Join(err, c.srv.StopTarget(ctx, h.Name))
	c.ir.Withdraw(h.Name)
	unlock()
	return err
}

// storeLock is the file by which processes of one machine keep off a store.
const storeLock = "node.lock"

func lockStore(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, storeLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock its store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("its store in %s is in use by another process of this machine: %w", dir, owner.ErrHeld)
		}
		return nil, fmt.Errorf("lock its store: %w; if its file system has no locks, set cluster.file_locks = false", err)
	}
	return func() { f.Close() }, nil
}

// noVFSLocks and noFSLocks are file systems without locks.
type (
	noVFSLocks struct{ vfs.FS }
	noFSLocks  struct{ objfs.FS }
)

func (noVFSLocks) Lock(string) (io.Closer, error)   { return ioNop{}, nil }
func (noFSLocks) Lock(string) (func() error, error) { return func() error { return nil }, nil }

type ioNop struct{}

func (ioNop) Close() error { return nil }

// adopt enters the targets of a node that was alone into a registry that has
// become that of a cluster.
func adopt(ctx context.Context, reg mgs.Registry) error {
	osts, err := reg.OSTs(ctx)
	if err != nil || osts == 0 {
		return err
	}
	made, err := reg.Made(ctx, mdtName)
	if err != nil || made {
		return err
	}
	for i := range osts {
		if err := reg.SetMade(ctx, ostName(i)); err != nil {
			return err
		}
	}
	return reg.SetMade(ctx, mdtName)
}
