package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// targets are the node's own MDT and OSTs.
type targets struct {
	log    *slog.Logger
	engine store.Engine
	mdt    *mdt.MDT
	mdtDir string
	reg    mgs.Registry
	osts   []*ost.Target
	dirs   []string
	fs     *client.FS
	// header of requests that the node itself sends.
	id  wire.ClientID
	gen uint64

	// logsDone is the id up to which runLogs has destroyed objects.
	logsDone uint64

	freeMu sync.Mutex
	free   []mdt.OSTState
	freeAt time.Time
	fails  failures
}

// failures remembers why targets failed, for the status display.
type failures struct {
	mu  sync.Mutex
	why map[string]string
	n   atomic.Int64
}

func (f *failures) note(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.why == nil {
		f.why = map[string]string{}
	}
	if _, ok := f.why[name]; !ok {
		f.why[name] = err.Error()
		f.n.Add(1)
	}
}

func (f *failures) get(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.why[name]
}

func ostName(i int) string { return config.OSTName(i) }

// mdtName is the metadata target's name in messages.
const mdtName = config.MDTName

// OpenFS opens the file system in the node's directories without serving it,
// for commands that work while no server runs. The returned function closes it.
func OpenFS(ctx context.Context, cfg *config.Config, log *slog.Logger) (*client.FS, func() error, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := alone(cfg); err != nil {
		return nil, nil, err
	}
	unlock, err := lockDir(cfg.DataDir)
	if err != nil {
		return nil, nil, err
	}
	var clk clock.Strict
	fs, _, t, _, err := openFS(ctx, cfg, log, &clk, func(reg mgs.Registry) { _, _ = reg.NewVerifiers(context.WithoutCancel(ctx), cfg.Cluster.Node) })
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return fs, func() error {
		err := errors.Join(fs.Close(ctx), t.runLogs(ctx), t.close())
		unlock()
		return err
	}, nil
}

// openFS opens registry and targets and connects a client to them, finishing
// what a crash left undone before it returns.
func openFS(ctx context.Context, cfg *config.Config, log *slog.Logger, clk *clock.Strict, lost func(mgs.Registry)) (_ *client.FS, _ mgs.Registry, _ *targets, boot uint64, err error) {
	reg, err := mgs.Open(cfg.MGS.Dir, mgs.FileOptions{})
	if err != nil {
		return nil, nil, nil, 0, err
	}
	if err = checkStores(ctx, cfg, reg); err != nil {
		return nil, nil, nil, 0, err
	}
	t := &targets{log: log, mdtDir: cfg.MDT.Dir, reg: reg}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	if t.id, t.gen, err = reg.StartClient(ctx, cfg.Cluster.Node); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = t.openOSTs(cfg, clk, lost); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = t.openMDT(cfg, clk); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = reg.SetOSTs(ctx, len(cfg.OST)); err != nil {
		return nil, nil, nil, 0, err
	}
	conns := make([]wire.Conn, len(t.osts))
	for i, o := range t.osts {
		conns[i] = wire.InProc(o)
	}
	fs, err := client.New(client.Options{
		MDT: wire.InProc(t.mdt), OSTs: conns, ID: t.id, Gen: t.gen, Clock: clk.Now, Logger: log,
		Atime: cfg.FS.Atime == config.AtimeRelatime,
	})
	if err != nil {
		return nil, nil, nil, 0, err
	}
	t.fs = fs
	if err = fs.Connect(ctx); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = t.recover(ctx); err != nil {
		return nil, nil, nil, 0, errors.Join(err, fs.Close(ctx))
	}
	// Once more: closing the epochs has brought in the times of objects.
	if err = t.advance(clk); err != nil {
		return nil, nil, nil, 0, errors.Join(err, fs.Close(ctx))
	}
	return fs, reg, t, t.gen, nil
}

func (t *targets) openOSTs(cfg *config.Config, clk *clock.Strict, lost func(mgs.Registry)) error {
	for i, oc := range cfg.OST {
		if err := os.MkdirAll(oc.Dir, 0o700); err != nil {
			return fmt.Errorf("%s: %w", ostName(i), err)
		}
		o, err := ost.Open(ost.Options{
			Index: uint16(i), Dir: oc.Dir, Clock: clk.Now, Logger: t.log, MinFreeBytes: uint64(cfg.FS.MinFree),
			OnFail: func(err error) { t.fails.note(ostName(i), err) },
			OnLost: func() error {
				t.log.Warn("the machine went down before all UNSTABLE data were flushed; write verifiers change so that clients send them again", "ost", ostName(i))
				_, err := t.reg.NewVerifiers(context.Background(), cfg.Cluster.Node)
				return err
			},
			OnFlushError: func() { lost(t.reg) },
		})
		if err != nil {
			return fmt.Errorf("%s in %s: %w", ostName(i), oc.Dir, err)
		}
		o.Begin(0)
		t.osts = append(t.osts, o)
		t.dirs = append(t.dirs, oc.Dir)
	}
	return nil
}

func (t *targets) openMDT(cfg *config.Config, clk *clock.Strict) error {
	if err := os.MkdirAll(cfg.MDT.Dir, 0o700); err != nil {
		return fmt.Errorf("%s: %w", mdtName, err)
	}
	var m atomic.Pointer[mdt.MDT]
	fail := func(err error) {
		t.fails.note(mdtName, err)
		if m := m.Load(); m != nil {
			// The engine calls this from inside an operation that may hold the
			// target's locks.
			go m.Fail(err)
		}
	}
	e, err := local.OpenPebble(cfg.MDT.Dir, local.Options{
		Logger: t.log, CacheBytes: int64(cfg.MDT.BlockCache), OnFail: fail, MinFreeBytes: int64(cfg.FS.MinFree),
	})
	if err != nil {
		return fmt.Errorf("%s in %s: %w", mdtName, cfg.MDT.Dir, err)
	}
	t.engine = e
	t.mdt, err = mdt.Open(mdt.Options{
		Engine: e, Clock: clk.Now, Logger: t.log, OSTs: t.ostStates, StripeSize: uint32(cfg.FS.StripeSize),
		StripeCount: uint8(cfg.FS.StripeCount), InodeCache: cfg.MDT.InodeCache, DentryCache: cfg.MDT.InodeCache,
		OnFail: func(err error) { t.fails.note(mdtName, err) },
		Locks: mdt.LockLimits{
			PerHost: cfg.Locks.MaxPerClient, Total: cfg.Locks.MaxTotal, WaitersPerHost: cfg.Locks.MaxWaitingPerClient, Hosts: cfg.Locks.MaxHosts,
		},
	})
	if err != nil {
		return fmt.Errorf("%s in %s: %w", mdtName, cfg.MDT.Dir, err)
	}
	m.Store(t.mdt)
	// All its clients were in this process, so there is nothing to recover.
	t.mdt.Begin(0)
	return t.advance(clk)
}

// advance makes the clock's later readings newer than all times that the MDT
// knows of: the wall clock may have been put back since the last run, and a
// change must never look older than what it changed.
func (t *targets) advance(clk *clock.Strict) error {
	st, err := mdt.ReadState(t.engine)
	if err != nil {
		return fmt.Errorf("%s: %w", mdtName, err)
	}
	clk.NotBefore(st.Time)
	return nil
}

// ostStates tells the MDT where new objects may go. The MDT calls it with its
// lock held, so the figures are renewed at most once a second.
func (t *targets) ostStates() []mdt.OSTState {
	t.freeMu.Lock()
	defer t.freeMu.Unlock()
	if t.free != nil && time.Since(t.freeAt) < time.Second {
		return t.free
	}
	l := make([]mdt.OSTState, len(t.osts))
	for i, o := range t.osts {
		l[i] = mdt.OSTState{Index: uint16(i)}
		var rep wire.Reply
		st := t.call(context.Background(), o, &wire.Request{Header: wire.Header{Op: wire.OpStatfs}}, &rep)
		if st == wire.OK {
			l[i].Up, l[i].Free = true, rep.Statfs.Avail
		}
	}
	t.free, t.freeAt = l, time.Now()
	return l
}

// call sends a request of the node itself and waits.
func (t *targets) call(ctx context.Context, to wire.Target, req *wire.Request, rep *wire.Reply) wire.Status {
	req.Client, req.ClientGen = t.id, t.gen
	rep.Reset()
	if err := wire.InProc(to).Call(ctx, req, rep); err != nil {
		return wire.ErrTargetDown
	}
	return rep.Status
}

// raiseEpoch fences all older owners of a service address at every target.
func (t *targets) raiseEpoch(ctx context.Context, v mgs.VIP) error {
	to := []wire.Target{t.mdt}
	for _, o := range t.osts {
		to = append(to, o)
	}
	for _, x := range to {
		var rep wire.Reply
		req := wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch, Flags: wire.FlagWaitCommit, VIP: v.Index, VIPEpoch: v.Epoch}}
		if st := t.call(ctx, x, &req, &rep); st != wire.OK {
			return fmt.Errorf("raise the epoch of %s: %w", v.Addr, st)
		}
	}
	return nil
}

func (t *targets) probe(ctx context.Context, fs *client.FS) error {
	var a wire.Attr
	if st, _ := fs.Attr(ctx, client.Owner{}, wire.RootFID, &a, true); st != wire.OK {
		return fmt.Errorf("%s: %w", mdtName, st)
	}
	var errs []error
	for i, o := range t.osts {
		var rep wire.Reply
		if st := t.call(ctx, o, &wire.Request{Header: wire.Header{Op: wire.OpPing}}, &rep); st != wire.OK {
			errs = append(errs, fmt.Errorf("%s: %w", ostName(i), st))
		}
	}
	return errors.Join(errs...)
}

func (t *targets) close() error {
	var errs []error
	if t.mdt != nil {
		errs = append(errs, t.mdt.Close())
	}
	if t.engine != nil {
		errs = append(errs, t.engine.Close())
	}
	for i, o := range t.osts {
		if err := o.Close(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", ostName(i), err))
		}
	}
	return errors.Join(errs...)
}
