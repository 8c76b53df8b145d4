// Package node puts one node together: registry, metadata target, object
// targets, file system client, and the services on its addresses.
package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/fdstore"
	"github.com/baton-nfs/baton/internal/node/unit"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/nfsd"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/statd"
	"github.com/baton-nfs/baton/vip"
)

// Node is one running node. New makes it, Start brings it up, Stop takes it
// down; each is called once.
type Node struct {
	cfg     *config.Config
	log     *slog.Logger
	clock   clock.Strict
	started time.Time
	boot    uint64

	unlock  func()
	reg     mgs.Registry
	targets *targets // of a node that is alone
	cluster *cluster // nil for one
	fs      *client.FS
	nfs     *nfsd.Server
	lockd   *lockd.Server // nil without locks
	statd   *statd.Server
	names   *exports.NameCache
	// Of floating addresses; nil without. testNet is taken instead of the machine's,
	// testPortmap is asked instead of clients' portmappers.
	net         vip.Net
	testNet     vip.Net
	testPortmap func(host netip.Addr, prog uint32, netid string) (uint16, error)
	testDisk    func(objfs.FS) objfs.FS // is between the OSTs and their disks
	events      *events.Log

	deps    *unit.Deps
	portmap *unit.Portmap
	// svcMu guards units.
	svcMu sync.Mutex
	units []*unit.Unit // whose period of service has begun

	// run ends, by cancel, when nothing is served any more.
	run    context.Context
	cancel context.CancelFunc
	// answers ends, by endLost, when nothing is answered any more: lostData waits so long.
	answers  context.Context
	endLost  context.CancelFunc
	wg       sync.WaitGroup
	stopping atomic.Bool
	orderly  bool          // Stop has drained all addresses
	verifier atomic.Uint64 // changes of write verifiers since the start
	// verTurn, which has room for one, is held while they change, and while a unit gets
	// its own.
	verTurn chan struct{}
	// stale: data were lost and the verifiers could not be changed before the end.
	stale  atomic.Bool
	unsure unsure

	// Of a cluster: the frontend comes up in the background; up is set when all
	// fields of it are, failed tells that it cannot.
	up         atomic.Bool
	waits      atomic.Pointer[string] // what it waits for until then
	frontend   sync.WaitGroup
	noFrontend context.CancelFunc
	deaf       func() // ends the hearing of news
	failed     chan error

	// inherited are sockets of the process before; store keeps them for the next one, if
	// it is to have them, and is nil without a service manager that could.
	inherited *fdstore.Inherited
	store     Store

	rates rateKeeper
	load  loadKeeper
}

// Store keeps sockets over a restart of the process.
type Store interface {
	// Restarts tells whether this stop is the first half of a restart, after which
	// there is room for n descriptors.
	Restarts(ctx context.Context) (room int, err error)
	Put(*fdstore.Handover) error
}

// Keep has the node go on with sockets of the process before, nil if there are none,
// and leave its own to the next one. Call it before Start. The node closes what of
// them it does not use.
func (n *Node) Keep(inherited *fdstore.Inherited, store Store) {
	n.inherited, n.store = inherited, store
}

// New checks what can be checked without starting anything.
func New(cfg *config.Config, log *slog.Logger) (*Node, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Addrs()) == 0 && !cfg.Clustered() {
		return nil, errors.New("no service address: set nfs.addresses")
	}
	return &Node{cfg: cfg, log: log, failed: make(chan error, 1), verTurn: make(chan struct{}, 1)}, nil
}

// Failed tells, once and after Start, that the node cannot serve its addresses.
func (n *Node) Failed() <-chan error { return n.failed }

// lockDir takes the lock that keeps a second process away from the node's data.
func lockDir(dir string) (func(), error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("data directory %s is in use by another baton; stop it first (%w)", dir, err)
	}
	return func() { f.Close() }, nil
}

// Start brings the node up. When it fails, everything it began is taken down.
func (n *Node) Start(ctx context.Context) (err error) {
	n.started = time.Now()
	if n.unlock, err = lockDir(n.cfg.DataDir); err != nil {
		return explain(err)
	}
	defer func() {
		if err != nil {
			err = explain(err)
			n.teardown(context.Background())
		}
	}()
	n.run, n.cancel = context.WithCancel(context.Background())
	n.answers, n.endLost = context.WithCancel(n.run)
	if !n.cfg.NFS.Floating || !n.cfg.Clustered() {
		if err = n.forgetFloating(); err != nil {
			return err
		}
	}
	if n.cfg.Clustered() {
		return n.startCluster()
	}
	if err = checkKey(ctx, n.cfg); err != nil {
		return err
	}
	key, err := config.LoadClusterKey(n.cfg.ClusterKeyFile, rand.Reader)
	if err != nil {
		return err
	}
	if n.fs, n.reg, n.targets, n.boot, err = openFS(ctx, n.cfg, n.log, &n.clock, n.lostData, n.targetFailed); err != nil {
		return err
	}
	return n.serve(ctx, key)
}

// startCluster begins to run targets and to bring the frontend up. Both may wait for
// other nodes, so it waits for neither.
func (n *Node) startCluster() (err error) {
	if err = n.prepareFloating(); err != nil {
		return err
	}
	if n.cluster, err = newCluster(n.cfg, n.log, &n.clock); err != nil {
		return err
	}
	n.reg, n.cluster.testDisk = n.cluster.reg, n.testDisk
	n.cluster.attend(n)
	n.cluster.boot()
	ctx, cancel := context.WithCancel(n.run)
	n.noFrontend = cancel
	if len(n.cfg.Addrs()) == 0 && !n.cfg.NFS.Floating {
		return nil
	}
	n.frontend.Go(func() {
		if err := n.startFrontend(ctx); err != nil && ctx.Err() == nil {
			n.failed <- explain(err)
		}
	})
	return nil
}

// startFrontend connects to the targets of the cluster and serves. It waits for
// registry and MDT; files on OSTs that are there do not need the others.
func (n *Node) startFrontend(ctx context.Context) error {
	c := n.cluster
	n.waitsFor(c.registryName())
	if err := c.meet(ctx); err != nil {
		return err
	}
	key, err := c.loadKey(ctx)
	if err != nil {
		return err
	}
	id, gen, err := n.reg.StartClient(ctx, c.name)
	if err != nil {
		return err
	}
	n.boot = gen
	lost := func() { n.lostData(n.reg) }
	n.fs, err = client.NewRemote(client.Options{
		ID: id, Gen: gen, Clock: n.clock.Now, Logger: n.log, Atime: n.cfg.FS.Atime == config.AtimeRelatime,
		Patience:     time.Duration(n.cfg.Recovery.JukeboxAfter),
		OnFlushError: func(int, uint64) { lost() },
		OnLostData:   func(int, int) { lost() },
		OnEvicted: func(k int) {
			if k > 0 {
				lost()
			}
		},
	}, client.Remote{MDT: c.reach(mdtName), OSTs: c.osts(), Import: importConfig(n.cfg), Watched: c.lives.has})
	if err != nil {
		return err
	}
	n.deaf = c.news.join(n.fs)
	c.fs.Store(n.fs)
	n.waitsFor("the metadata target (" + mdtName + ")")
	connected := make(chan struct{})
	n.frontend.Go(func() {
		t := time.NewTicker(tellWait)
		defer t.Stop()
		for {
			select {
			case <-connected:
				return
			case <-t.C:
				_, node, st := n.fs.MDTImport().Status()
				n.log.Warn("waiting for the MDT before the service addresses are served", "target", mdtName, "nodes", n.cfg.MDT.Nodes, "next", node, "why", st.Reason)
			}
		}
	})
	err = n.fs.Connect(ctx)
	close(connected)
	if err != nil {
		return err
	}
	if err := n.serve(ctx, key); err != nil {
		return err
	}
	n.startFloating()
	n.log.Info("serving the service addresses", "addresses", n.cfg.NFS.Addresses, "floating", n.cfg.NFS.Floating)
	return nil
}

func (n *Node) waitsFor(what string) { n.waits.Store(&what) }

// tellWait is how often it is told that a start waits.
const tellWait = 10 * time.Second

// serve brings the services on the addresses up over n.fs.
func (n *Node) serve(ctx context.Context, key []byte) (err error) {
	n.nfs, err = nfsd.New(nfsd.Config{
		FS: n.fs, Codec: nfs3.NewCodec(key), Logger: n.log,
		RTMax: uint32(n.cfg.NFS.Rtmax), WTMax: uint32(n.cfg.NFS.Wtmax),
		OnFenced: n.fenced, Unsure: n.unsure.holds.Load,
		RTPref: uint32(n.cfg.NFS.Rtpref), WTPref: uint32(n.cfg.NFS.Wtpref), DTPref: uint32(n.cfg.NFS.Dtpref),
	})
	if err != nil {
		return err
	}
	n.names = exports.NewNameCache(exports.NameConfig{Resolver: exports.SystemResolver{}})
	n.wg.Go(func() { n.names.Run(n.run) })
	if err = n.loadExports(ctx); err != nil {
		return err
	}
	if err = n.startLockd(); err != nil {
		return err
	}
	n.portmap = unit.NewPortmap(ctx, n.cfg, n.log)
	n.deps = &unit.Deps{
		Config: n.cfg, Log: n.log, FS: n.fs, NFS: n.nfs, Lockd: n.lockd, Statd: n.statd, Registry: n.reg, Portmap: n.portmap,
		MaxConns: n.maxConns(), Begun: n.begun, Ended: n.ended, Silence: vip.CloseQuietly, Inherited: n.inherited, Verifiers: n.verifier.Load,
	}
	if err = n.serveFixed(ctx); err != nil {
		return err
	}
	n.up.Store(true)
	return nil
}

// begun enters a unit and gives it its verifier as it is now: data may have been lost
// since the address was registered.
func (n *Node) begun(ctx context.Context, u *unit.Unit) error {
	select {
	case n.verTurn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-n.verTurn }()
	n.svcMu.Lock()
	n.units = append(n.units, u)
	n.tellServed()
	n.svcMu.Unlock()
	if n.cluster != nil && n.verifier.Load() == u.Verifiers() {
		return nil // only this node changes the verifiers of what it serves
	}
	vips, err := n.reg.VIPs(ctx)
	for _, v := range vips {
		if v.Index == u.VIP().Index {
			u.NFS().SetVerifier(v.VerifierBytes())
		}
	}
	return err
}

// ended forgets a unit.
func (n *Node) ended(u *unit.Unit) {
	n.svcMu.Lock()
	defer n.svcMu.Unlock()
	n.units = slices.DeleteFunc(slices.Clone(n.units), func(x *unit.Unit) bool { return x == u })
	n.tellServed()
}

// tellServed has beats tell what is served. svcMu is held.
func (n *Node) tellServed() {
	if n.cluster == nil {
		return
	}
	l := make([]health.VIP, 0, len(n.units))
	for _, u := range n.units {
		l = append(l, health.VIP{Index: u.VIP().Index, Epoch: u.VIP().Epoch})
	}
	n.cluster.vips.Store(&l)
}

// serving lists the units there are.
func (n *Node) serving() []*unit.Unit {
	n.svcMu.Lock()
	defer n.svcMu.Unlock()
	return slices.Clone(n.units)
}

// takeAddress begins a period of service. What a process of a cluster had of data
// that were not on a disk yet has died with it, and an OST may have died, too: then
// clients have to send them again.
func (n *Node) takeAddress(ctx context.Context, addr netip.Addr) (mgs.VIP, error) {
	v, err := n.reg.Serve(ctx, addr, n.cfg.Cluster.Node)
	if err != nil {
		return v, err
	}
	return n.afterCrash(ctx, v)
}

// afterCrash gives an address whose last period of service did not end in order, in a
// cluster, another write verifier.
func (n *Node) afterCrash(ctx context.Context, v mgs.VIP) (mgs.VIP, error) {
	if n.cluster == nil || !v.Crashed {
		return v, nil
	}
	l, err := n.reg.NewVerifiers(ctx, n.cfg.Cluster.Node, v.Index)
	if err != nil {
		return v, err
	}
	for i := range l {
		if l[i].Index == v.Index {
			v.Verifier = l[i].Verifier
		}
	}
	return v, nil
}

// serveFixed serves the addresses that the configuration gives to this node.
func (n *Node) serveFixed(ctx context.Context) error {
	var l []*unit.Unit
	for _, addr := range n.cfg.Addrs() {
		u := n.deps.New(addr)
		if err := n.beginFixed(ctx, u, addr); err != nil {
			u.Finish(ctx)
			return err
		}
		l = append(l, u)
		n.log.Info("listening", "address", addr, "port", n.cfg.NFS.Port, "mount_port", n.cfg.NFS.MountPort, "vip", u.VIP().Index, "epoch", u.VIP().Epoch)
	}
	for _, u := range l {
		if err := u.Serve(); err != nil {
			return err
		}
		u.Adopt()
	}
	n.inherited.Close()
	for _, u := range l {
		if _, err := u.Notify(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) beginFixed(ctx context.Context, u *unit.Unit, addr netip.Addr) error {
	if err := u.Listen(false); err != nil {
		return err
	}
	v, err := n.takeAddress(ctx, addr)
	if err != nil {
		return err
	}
	return u.Begin(ctx, v, n.cfg.ForgetLocks)
}

// Stop takes the node down in an orderly way: clients' calls are finished and
// answered, everything acknowledged is made durable. ctx bounds the drain.
func (n *Node) Stop(ctx context.Context) error {
	n.stopping.Store(true)
	if n.cluster != nil {
		n.noFrontend()
		n.frontend.Wait()
	}
	n.silenceFloating(ctx)
	dctx, cancel := context.WithTimeout(ctx, time.Duration(n.cfg.NFS.DrainTimeout))
	defer cancel()
	kept := n.keeping(ctx)
	defer kept.Close()
	var wg sync.WaitGroup
	for _, u := range n.serving() {
		wg.Go(func() {
			if kept == nil {
				n.drain(dctx, u)
			} else {
				kept.take(dctx, u)
			}
		})
	}
	wg.Wait()
	// Nothing is answered any more, and what follows waits for the calls that are held.
	n.endLost()
	ferr := n.stopFloating(ctx)
	if n.cluster != nil {
		n.cluster.vips.Store(nil)
	}
	n.orderly = true
	err := errors.Join(ferr, n.teardown(ctx))
	if err == nil {
		kept.put()
	}
	return err
}

// drain ends the service of a fixed address in an orderly way.
func (n *Node) drain(ctx context.Context, u *unit.Unit) {
	if err := u.Refuse(ctx, failover.Reset); err != nil {
		n.log.Warn("new connections are not refused", "address", u.Addr(), "err", err)
	}
	d, err := u.Drain(ctx)
	if err != nil {
		n.log.Warn("the drain has not ended well", "address", u.Addr(), "err", err)
	}
	c, err := u.Close(ctx, failover.HalfClose)
	if err != nil {
		n.log.Warn("connections have not ended well", "address", u.Addr(), "err", err)
	}
	n.log.Info("drained", "address", u.Addr(), "orderly", c.Orderly, "forced", c.Forced, "replies", d.Replies)
}

// leaveTime bounds the leave that a node takes of the other nodes, which may be
// stopping, too: what it has left behind is then finished by the MDT.
const leaveTime = 10 * time.Second

func (n *Node) teardown(ctx context.Context) error {
	if n.noFrontend != nil {
		n.noFrontend()
		n.frontend.Wait()
	}
	n.inherited.Close()
	errs := []error{n.stopFloating(ctx)}
	fixed := n.serving()
	for _, u := range fixed {
		errs = append(errs, u.Finish(ctx))
	}
	if n.portmap != nil {
		errs = append(errs, n.portmap.Close(ctx))
	}
	if n.cancel != nil {
		n.cancel()
	}
	n.noMoreTries()
	n.wg.Wait()
	if n.cluster != nil {
		errs = append(errs, n.leave(ctx, fixed), n.cluster.close(ctx))
	} else {
		if n.fs != nil {
			errs = append(errs, n.fs.Close(ctx))
		}
		if n.targets != nil {
			errs = append(errs, n.targets.close(ctx))
		}
		if n.orderly && errors.Join(errs...) == nil {
			// Everything is durable: the next start need not ask clients for their locks.
			errs = append(errs, n.stopped(ctx, fixed))
		}
	}
	if n.events != nil {
		errs = append(errs, n.events.Close())
	}
	if n.unlock != nil {
		n.unlock()
	}
	return errors.Join(errs...)
}

// stopped ends the periods of service of fixed addresses.
func (n *Node) stopped(ctx context.Context, fixed []*unit.Unit) error {
	var errs []error
	for _, u := range fixed {
		errs = append(errs, n.reg.Stopped(ctx, u.VIP().Index, u.VIP().Epoch))
	}
	return errors.Join(errs...)
}

// leave ends the part of a cluster's frontend in this node, while the targets here
// still run. That others are away is no error: nothing acknowledged is lost, and
// the next start acts as after a crash.
func (n *Node) leave(ctx context.Context, fixed []*unit.Unit) error {
	if n.fs == nil {
		return nil
	}
	n.deaf()
	defer n.cluster.fs.Store(nil)
	lctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	err := n.fs.Close(lctx)
	if err == nil && n.orderly && !n.stale.Load() {
		err = n.stopped(lctx, fixed)
	}
	if err != nil {
		n.log.Warn("the node could not take leave of the others in order; the next start acts as after a crash", "err", err)
	}
	return nil
}

// ReloadExports reads the exports again. On an error the old ones stay.
func (n *Node) ReloadExports() error {
	if !n.up.Load() {
		return errors.New("the service addresses are not served yet, or there are none: nothing to reload")
	}
	return n.loadExports(context.Background())
}

func (n *Node) loadExports(ctx context.Context) error {
	var b exports.Builder
	if text := n.cfg.ExportsText(); text != "" {
		from := n.cfg.File
		if from == "" {
			from = "command line"
		}
		b.Add(from, []byte(text))
	}
	if n.cfg.Exports.File != "" {
		src, err := os.ReadFile(n.cfg.Exports.File)
		switch {
		case err == nil:
			b.Add(n.cfg.Exports.File, src)
		case !errors.Is(err, os.ErrNotExist):
			return fmt.Errorf("exports: %w", err)
		}
	}
	t, err := b.Table(n.names)
	if err != nil {
		return err
	}
	old := n.nfs.Exports()
	n.names.SetHosts(t.Hosts())
	if err := n.nfs.SetExports(ctx, t); err != nil {
		n.names.SetHosts(old.Hosts())
		return err
	}
	for _, w := range t.Warnings() {
		n.log.Warn("exports: " + w.Error())
	}
	if len(t.Exports()) == 0 {
		n.log.Warn("nothing is exported; add a line to the exports file and run: baton exportfs -r", "file", n.cfg.Exports.File)
	}
	return nil
}

// FS is the node's file system client, from Start to Stop; in a cluster nil until
// the service addresses are served.
func (n *Node) FS() *client.FS {
	if !n.up.Load() {
		return nil
	}
	return n.fs
}

// Probe goes through the data path: an attribute read at the MDT and a status
// from every OST. In a cluster a target that is away is a delay, not a failure of
// this node.
func (n *Node) Probe(ctx context.Context) error {
	switch {
	case n.stopping.Load():
		return errors.New("stopping")
	case n.cluster == nil:
		return n.targets.probe(ctx, n.fs)
	case n.up.Load() && n.fs.MDTImport().Ready():
		return probeMDT(ctx, n.fs)
	}
	return nil
}
