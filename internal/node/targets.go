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
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

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

// targets are all of a node that is alone, in its own process.
type targets struct {
	log   *slog.Logger
	mdt   *host.MDT
	osts  []*host.OST
	fails failures
	// failed is called when one fails.
	failed func()
}

// mdtOptions are those that the kinds of nodes have in common.
func mdtOptions(cfg *config.Config, clk *clock.Strict, log *slog.Logger) host.MDTOptions {
	return host.MDTOptions{
		Name: mdtName, Dir: cfg.MDT.Dir, Clock: clk.Now, Logger: log,
		Engine: local.Options{Logger: log, CacheBytes: int64(cfg.MDT.BlockCache), MinFreeBytes: int64(cfg.FS.MinFree)},
		MDT: mdt.Options{
			StripeSize: uint32(cfg.FS.StripeSize), StripeCount: uint8(cfg.FS.StripeCount),
			InodeCache: cfg.MDT.InodeCache, DentryCache: cfg.MDT.InodeCache,
			Locks: mdt.LockLimits{
				PerHost: cfg.Locks.MaxPerClient, Total: cfg.Locks.MaxTotal, WaitersPerHost: cfg.Locks.MaxWaitingPerClient, Hosts: cfg.Locks.MaxHosts,
			},
		},
		Recovery: recoveryConfig(cfg), Import: importConfig(cfg),
	}
}

func ostOptions(cfg *config.Config, i int, clk *clock.Strict, log *slog.Logger) host.OSTOptions {
	return host.OSTOptions{
		Name: ostName(i), Logger: log, Recovery: recoveryConfig(cfg),
		OST: ost.Options{Index: uint16(i), Dir: cfg.OST[i].Dir, Clock: clk.Now, MinFreeBytes: uint64(cfg.FS.MinFree)},
	}
}

func recoveryConfig(cfg *config.Config) recov.Config {
	r := &cfg.Recovery
	return recov.Config{
		SoftMin: time.Duration(r.WindowMin), SoftMax: time.Duration(r.WindowMax), Hard: time.Duration(r.WindowHard), Step: time.Duration(r.WindowStep),
		PingInterval: time.Duration(r.PingInterval), PingTimeout: time.Duration(r.PingTimeout), CommitOnShare: r.CommitOnShare,
	}
}

// maxPause is the longest pause between attempts to reach a target: a target that
// has moved is to be found soon, and there are few nodes to ask.
const maxPause = time.Second

func importConfig(cfg *config.Config) imp.Config {
	r := &cfg.Recovery
	return imp.Config{
		Soft: int64(r.RetainSoft), Hard: int64(r.RetainHard), PingInterval: time.Duration(r.PingInterval), BackoffMax: maxPause,
	}
}

// here reaches a target in this process; get gives nil while it does not run.
func here(name string, get func() wire.Target) client.Target {
	return client.Target{Name: name, Addrs: []string{"here"}, Dial: func(context.Context, string) (wire.Conn, error) {
		t := get()
		if t == nil {
			return nil, fmt.Errorf("%s does not run", name)
		}
		return wire.Local(t, wire.NextSession()), nil
	}}
}

// OpenFS opens the file system in the node's directories without serving it,
// for commands that work while no server runs. The returned function closes it.
func OpenFS(ctx context.Context, cfg *config.Config, log *slog.Logger) (*client.FS, func() error, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clustered() {
		return nil, nil, fmt.Errorf("node %s is part of a cluster: its file system is reached while baton runs there with service addresses; start it, or name another node's --socket", cfg.Cluster.Node)
	}
	unlock, err := lockDir(cfg.DataDir)
	if err != nil {
		return nil, nil, err
	}
	var clk clock.Strict
	fs, _, t, _, err := openFS(ctx, cfg, log, &clk, func(reg mgs.Registry) {
		if _, err := reg.NewVerifiers(context.WithoutCancel(ctx), ""); err != nil {
			err = errors.Join(err, markLost(cfg.DataDir))
			log.Error("data were lost, and new write verifiers cannot be stored; the next start tries again", "err", err)
		}
	}, func() { noteFailed(cfg.DataDir, log) })
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return fs, func() error {
		err := errors.Join(fs.Close(ctx), t.close(ctx))
		unlock()
		return err
	}, nil
}

// openFS opens registry and targets and connects a client to them, finishing
// what a crash left undone before it returns. lost is called when data were lost, failed when
// a target fails.
func openFS(ctx context.Context, cfg *config.Config, log *slog.Logger, clk *clock.Strict, lost func(mgs.Registry), failed func()) (_ *client.FS, _ mgs.Registry, _ *targets, boot uint64, err error) {
	reg, err := mgs.Open(cfg.MGS.Dir, mgs.FileOptions{})
	if err != nil {
		return nil, nil, nil, 0, err
	}
	if err = checkStores(ctx, cfg, reg); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = lostBefore(ctx, cfg.DataDir, reg); err != nil {
		return nil, nil, nil, 0, err
	}
	t := &targets{log: log, osts: make([]*host.OST, len(cfg.OST)), failed: failed}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close(context.WithoutCancel(ctx)))
		}
	}()
	id, gen, err := reg.StartClient(ctx, "")
	if err != nil {
		return nil, nil, nil, 0, err
	}
	start := time.Now()
	if err = t.start(ctx, cfg, clk, reg, lost); err != nil {
		return nil, nil, nil, 0, err
	}
	if err = reg.SetOSTs(ctx, len(cfg.OST)); err != nil {
		return nil, nil, nil, 0, err
	}
	conns := make([]wire.Conn, len(t.osts))
	for i, o := range t.osts {
		conns[i] = inside(o.Front())
	}
	fs, err := client.New(client.Options{
		MDT: inside(t.mdt.Front()), OSTs: conns, ID: id, Gen: gen, Clock: clk.Now, Logger: log,
		Atime: cfg.FS.Atime == config.AtimeRelatime,
	})
	if err != nil {
		return nil, nil, nil, 0, err
	}
	if err = fs.Connect(ctx); err != nil {
		return nil, nil, nil, 0, err
	}
	// What the clients of the last run, which have died with it, have left half done.
	if err = t.mdt.Sync().Settle(ctx); err != nil {
		return nil, nil, nil, 0, errors.Join(err, fs.Close(ctx))
	}
	if st := t.mdt.Sync().Status(); st.Punched > 0 || st.Epochs > 0 {
		log.Info("recovered from an unclean stop", "truncations", st.Punched, "io_epochs", st.Epochs, "took", time.Since(start).Round(time.Millisecond))
	}
	// Once more: closing the epochs has brought in the times of objects.
	clk.NotBefore(t.mdt.Body().Time())
	return fs, reg, t, gen, nil
}

// inside is the frontend's connection to a target in its process, with nothing in
// between.
func inside(f *front.Front) wire.Conn {
	return wire.InProc(f.Accept(wire.Peer{Session: wire.NextSession(), Local: true}))
}

// start starts the MDT, and then the OSTs, which ask it. All their clients are in
// this process, so that nobody is waited for.
func (t *targets) start(ctx context.Context, cfg *config.Config, clk *clock.Strict, reg mgs.Registry, lost func(mgs.Registry)) error {
	for _, x := range cfg.Targets() {
		if err := os.MkdirAll(x.Dir, 0o700); err != nil {
			return fmt.Errorf("%s: %w", x.Name, err)
		}
	}
	mo := mdtOptions(cfg, clk, t.log)
	mo.Recovery.PingTimeout = -1
	mo.OnFail = func(err error) {
		t.fails.note(mdtName, err)
		t.failed()
	}
	running := make([]atomic.Pointer[host.OST], len(cfg.OST))
	for i := range cfg.OST {
		mo.OSTs = append(mo.OSTs, here(ostName(i), func() wire.Target {
			if o := running[i].Load(); o != nil {
				return o.Front()
			}
			return nil
		}))
	}
	// Until an OST has been started its start is what is waited for.
	mo.Import.BackoffMax = 20 * time.Millisecond
	m, err := host.StartMDT(ctx, mo)
	if err != nil {
		return err
	}
	t.mdt = m
	// Later readings are newer than all times that the MDT knows of: the wall clock
	// may have been put back since the last run, and a change must never look older
	// than what it changed.
	clk.NotBefore(m.Body().Time())
	for i := range cfg.OST {
		oo := ostOptions(cfg, i, clk, t.log)
		oo.Recovery.PingTimeout = -1
		oo.MDT = here(mdtName, func() wire.Target { return m.Front() })
		oo.OnFail = func(err error) {
			t.fails.note(ostName(i), err)
			t.failed()
		}
		oo.OST.OnLost = func() error {
			t.log.Warn("the machine went down before all UNSTABLE data were flushed; write verifiers change so that clients send them again", "ost", ostName(i))
			_, err := reg.NewVerifiers(context.Background(), "")
			return err
		}
		oo.OST.OnFlushError = func() { lost(reg) }
		o, err := host.StartOST(ctx, oo)
		if err != nil {
			return err
		}
		t.osts[i] = o
		running[i].Store(o)
	}
	select {
	case <-m.AllThere():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the OSTs: %w", ctx.Err())
	}
}

func (t *targets) probe(ctx context.Context, fs *client.FS) error {
	if err := probeMDT(ctx, fs); err != nil {
		return err
	}
	var errs []error
	for i := range t.osts {
		req := wire.Request{Header: wire.Header{Op: wire.OpPing, Flags: wire.FlagNoWait}}
		var rep wire.Reply
		done := make(chan struct{})
		fs.SubmitOST(i, &req, &rep, func() { close(done) })
		<-done
		if rep.Status != wire.OK {
			errs = append(errs, fmt.Errorf("%s: %w", ostName(i), rep.Status))
		}
	}
	return errors.Join(errs...)
}

func probeMDT(ctx context.Context, fs *client.FS) error {
	var a wire.Attr
	if st, _ := fs.Attr(ctx, client.Owner{}, wire.RootFID, &a, true); st != wire.OK {
		return fmt.Errorf("%s: %w", mdtName, st)
	}
	return nil
}

// close stops the targets, the MDT first, because it works at the others.
func (t *targets) close(ctx context.Context) error {
	var errs []error
	if t.mdt != nil {
		errs = append(errs, t.mdt.Stop(ctx))
	}
	for _, o := range t.osts {
		if o != nil {
			errs = append(errs, o.Stop(ctx))
		}
	}
	return errors.Join(errs...)
}
