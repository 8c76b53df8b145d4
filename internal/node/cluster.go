package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/replace"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/mgs/ir"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/owner"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

// cluster is what a node has to do with the others: the targets that run here, the
// server by which the others reach them, and the ways to those that do not.
type cluster struct {
	cfg    *config.Config
	log    *slog.Logger
	clock  *clock.Strict
	name   string
	tls    *ca.Node // nil: connections are not protected
	srv    *tcp.Server
	reg    *mgs.Remote
	etcd   *inEtcd // nil: the registry is with the MGS
	ir     *ir.Client
	hosted []*hosted // as in the configuration
	byName map[string]*hosted
	news   news
	health *health.Health
	lives  lives
	paths  paths
	asks   asks
	agent  atomic.Pointer[vipagent.Agent] // of floating addresses, while they are served
	// sources are nil while this node has nothing to do with floating addresses.
	sources atomic.Pointer[vipSources]
	// incarnation numbers this process among those of the node.
	incarnation uint64
	managing    managing
	testDisk    func(objfs.FS) objfs.FS
	// fs is the frontend's client while there is one, vips what it serves.
	fs   atomic.Pointer[client.FS]
	vips atomic.Pointer[[]health.VIP]

	ctx    context.Context // ends the starts
	cancel context.CancelFunc
	// watching ends the watch at the registry, which is told of the stops before.
	watching context.Context
	unwatch  context.CancelFunc
	// business are the nodes with which this one had some when it had taken leave of
	// all: none.
	business []string
	wg       sync.WaitGroup
	// mu guards the beginning of background work against its end, and met.
	mu      sync.Mutex
	closing bool
	met     bool // the registry was asked who it is
	// marking is held while identityFile is looked at and written; no lock is taken in it.
	marking sync.Mutex
}

// newCluster listens for the other nodes and serves nothing yet.
func newCluster(cfg *config.Config, log *slog.Logger, clk *clock.Strict) (*cluster, error) {
	c := &cluster{cfg: cfg, log: log, clock: clk, name: cfg.Cluster.Node, byName: map[string]*hosted{}}
	var err error
	if c.tls, err = cfg.LoadTLS(); err != nil {
		return nil, err
	}
	osts := 0
	for _, t := range cfg.Targets() {
		h := &hosted{Target: t, state: status.StateStopped}
		switch t.Name {
		case config.MGSName:
			h.kind = status.KindMGS
		case mdtName:
			h.kind = status.KindMDT
		default:
			h.kind, h.index = status.KindOST, osts
			osts++
		}
		c.hosted = append(c.hosted, h)
		c.byName[t.Name] = h
	}
	c.asks.handle(askEvents, c.answerEvents)
	so := tcp.ServerOptions{Node: c.name, Insecure: c.tls == nil, Logger: log, Allow: c.allow}
	if c.tls != nil {
		so.TLS = c.tls.Server()
	}
	if c.srv, err = tcp.NewServer(nil, so); err != nil {
		return nil, err
	}
	c.asks.handle(vipagent.MethodConns, c.ofAgent((*vipagent.Agent).HandleConns))
	c.asks.handle(vipagent.MethodKnown, c.ofAgent((*vipagent.Agent).HandleKnown))
	c.asks.handle(vipagent.MethodGivesUp, c.ofAgent((*vipagent.Agent).HandleGivesUp))
	if err := c.srv.SetTarget(inspectName, inspected{c: c}); err != nil {
		return nil, err
	}
	if cfg.InEtcd() {
		if c.etcd, err = newInEtcd(c); err != nil {
			return nil, err
		}
	}
	if c.reg, err = mgs.NewRemote(c.registryOptions()); err != nil {
		return nil, err
	}
	if c.ir, err = ir.NewClient(c.watchOptions()); err != nil {
		return nil, err
	}
	c.answerManager()
	if err := c.newManager(); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", cfg.Cluster.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen for the other nodes on cluster.listen: %w", err)
	}
	if err := c.startHealth(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.watching, c.unwatch = context.WithCancel(context.Background())
	c.background(func() {
		if err := c.srv.Serve(l); err != nil {
			log.Error("other nodes cannot connect any more", "listen", cfg.Cluster.Listen, "err", err)
		}
	})
	if c.etcd != nil {
		c.etcd.start()
	}
	c.background(func() { c.ir.Run(c.watching) })
	c.startManager()
	log.Info("listening for the other nodes", "listen", cfg.Cluster.Listen)
	return c, nil
}

// registryOptions are how this node's calls reach the registry.
func (c *cluster) registryOptions() mgs.RemoteOptions {
	o := mgs.RemoteOptions{Node: c.name, BackoffMax: maxPause, Logger: c.log}
	if c.etcd != nil {
		// What keeps calls waiting is said where it is known (loud).
		o.Addrs, o.Dial, o.Logger = []string{c.cfg.Registry.Kind}, c.etcd.own, nil
		return o
	}
	at := c.reach(config.MGSName)
	o.Addrs, o.Dial = at.Addrs, at.Dial
	return o
}

// registryName is the registry in messages.
func (c *cluster) registryName() string {
	if c.etcd != nil {
		return "the registry (etcd)"
	}
	return "the registry (MGS)"
}

// allow decides about a connection of a node whose certificate was verified.
func (c *cluster) allow(node, target string, kind tcp.Kind) error {
	switch {
	case c.cfg.Cluster.Addr(node) == "":
		return fmt.Errorf("node %q is not among cluster.nodes of node %s", node, c.name)
	case (target == health.TargetName) != (kind == tcp.Health):
		return fmt.Errorf("target %q is not reached by a connection of kind %v", target, kind)
	}
	return nil
}

// background runs f, which the end of the cluster part waits for. It runs nothing
// once that has begun.
func (c *cluster) background(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.wg.Go(f)
	}
}

// reach is the way to a target: the names of the nodes that may run it are its
// addresses.
func (c *cluster) reach(name string) client.Target {
	if name == config.MGSName && c.etcd != nil {
		return client.Target{Name: name, Addrs: []string{"the elected node"}, Dial: c.etcd.dial}
	}
	h := c.byName[name]
	return client.Target{Name: name, Addrs: h.Nodes, Dial: func(ctx context.Context, node string) (wire.Conn, error) {
		if node == c.name {
			t := h.running()
			if t == nil {
				return nil, fmt.Errorf("%s does not run on this node", name)
			}
			return wire.Local(t, wire.NextSession()), nil
		}
		return c.paths.dial(ctx, node, name, tcp.BundleOptions{Bulk: h.kind == status.KindOST, DialOptions: c.dialOptions(node, name)})
	}}
}

// dialOptions are those for a connection to what a node serves.
func (c *cluster) dialOptions(node, target string) tcp.DialOptions {
	o := tcp.DialOptions{
		Addrs: []tcp.Endpoint{{Addr: c.cfg.Cluster.Addr(node), Node: node}}, Target: target, Node: c.name, Insecure: c.tls == nil,
	}
	if c.tls != nil {
		o.TLS = c.tls.Client(node)
	}
	return o
}

func (c *cluster) osts() (l []client.Target) {
	for i := range c.cfg.OST {
		l = append(l, c.reach(ostName(i)))
	}
	return l
}

// startAgain is the pause before a target is started again that could not be
// started with the node, or that has failed.
const startAgain = 3 * time.Second

// standby stands for all errors that say that a target runs elsewhere.
const standby = "runs elsewhere"

// boot starts the targets that belong to the start of the node.
func (c *cluster) boot() {
	for _, name := range c.cfg.Cluster.Start {
		h := c.byName[name]
		h.wanted.Store(true)
		c.background(func() { c.keep(h) })
	}
}

// keep starts a target and goes on trying as long as only something is missing and
// nobody has stopped it. One that runs elsewhere is left there, also when it ends
// later: whoever has moved it decides where it goes. But nothing can be moved without
// the registry: a node that is to start the MGS stands by for the one that has it.
func (c *cluster) keep(h *hosted) {
	for last := ""; h.wanted.Load() && c.ctx.Err() == nil; {
		err := c.start(c.ctx, h, "")
		switch {
		case err == nil || c.ctx.Err() != nil || errors.Is(err, errNotStopped):
			return
		case errors.Is(err, owner.ErrHeld) && h.kind == status.KindMGS:
			if last != standby {
				last = standby
				c.log.Info("the registry runs elsewhere; this node stands by for it", "err", err)
			}
		case errors.Is(err, owner.ErrHeld):
			h.wanted.Store(false)
			c.log.Warn("target is not started here, since it runs elsewhere", "target", h.Name, "err", err)
			return
		case err.Error() != last:
			last = err.Error()
			c.log.Error("target does not start; trying again", "target", h.Name, "err", err)
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(startAgain):
		}
	}
}

// close stops what runs here, in order: the MDT, which works at the OSTs, before
// them, and the registry last. The registry is told of it, and beats tell of it until
// nothing runs any more.
func (c *cluster) close(ctx context.Context) error {
	c.stopManager()
	c.cancel()
	var errs []error
	for _, h := range c.hosted {
		if h.kind != status.KindMGS {
			errs = append(errs, c.stop(ctx, h))
		}
	}
	c.ir.Flush(ctx, withdrawTime)
	if h := c.byName[config.MGSName]; h != nil {
		errs = append(errs, c.stop(ctx, h))
	}
	c.unwatch()
	if c.etcd != nil {
		c.etcd.leave()
	}
	errs = append(errs, c.reg.Close())
	if c.etcd != nil {
		errs = append(errs, c.etcd.close())
	}
	c.stopHealth()
	c.asks.close()
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	errs = append(errs, c.srv.Close(ctx))
	c.wg.Wait()
	return errors.Join(errs...)
}

// withdrawTime bounds the wait for the registry's word that it knows of the stops. It
// may be stopping, too.
const withdrawTime = time.Second

// identityFile is where a node remembers which registry is its cluster's, so that a
// disk that is not mounted is not taken for a new cluster. storeMark, in the
// directory of a target, names the registry and the target.
const (
	identityFile = "registry-id"
	storeMark    = "baton-store"
)

// meet waits for the registry, and refuses another one than that of this node's
// cluster.
func (c *cluster) meet(ctx context.Context) error {
	c.mu.Lock()
	met := c.met
	c.mu.Unlock()
	if met {
		return nil
	}
	path := filepath.Join(c.cfg.DataDir, identityFile)
	known, err := readMark(path)
	if err != nil {
		return err
	}
	var id string
	if known != "" && c.etcd != nil {
		id, err = c.etcd.found(ctx)
	} else {
		id, err = c.reg.Identity(ctx)
	}
	if err == nil && known == "" {
		known, err = c.remember(path, id)
	}
	switch {
	case err != nil:
		return err
	case known != id && c.etcd != nil:
		err = fmt.Errorf("the registry is not the one that this node knows: correct registry.prefix and where etcd is, or import the right one (baton registry import --force); if it really is another cluster, remove %s", path)
	case known != id:
		err = fmt.Errorf("the registry is not the one that this node knows: mount its disk in mgs.dir where the MGS runs; if it really is another cluster, remove %s", path)
	}
	if err == nil && c.etcd != nil {
		c.etcd.storage.expect(known)
		err = adopt(ctx, c.reg) // one that was imported
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.met = true
	c.mu.Unlock()
	return nil
}

// remember makes id the registry that this node knows, unless another caller was first,
// and returns the one that it knows.
func (c *cluster) remember(path, id string) (known string, err error) {
	c.marking.Lock()
	defer c.marking.Unlock()
	if known, err = readMark(path); err != nil || known != "" {
		return known, err
	}
	return id, writeMark(path, id)
}

func readMark(path string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// writeMark makes path with one line, durably.
func writeMark(path, line string) error {
	return replace.File(path, []byte(line+"\n"), 0o600)
}

// directory makes a target's directory unless it has to be there.
func (c *cluster) directory(ctx context.Context, h *hosted) error {
	if _, err := os.Stat(h.Dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	made := false
	var err error
	if h.kind == status.KindMGS {
		var known string
		known, err = readMark(filepath.Join(c.cfg.DataDir, identityFile))
		made = known != ""
	} else {
		made, err = c.reg.Made(ctx, h.Name)
	}
	switch {
	case err != nil:
		return err
	case made:
		return c.missing(h)
	}
	return os.MkdirAll(h.Dir, 0o700)
}

func (c *cluster) missing(h *hosted) error {
	return fmt.Errorf("%s: %s is empty or missing, but belongs to the store: mount its disk or restore it from a backup", h.Name, h.Dir)
}

// checkStore looks whether the store that was taken is the one that belongs here,
// and marks a new one. It is marked before the registry knows of it, so that a
// start that was broken off can be made again.
func (c *cluster) checkStore(ctx context.Context, h *hosted) error {
	if h.kind == status.KindMGS {
		known, err := readMark(filepath.Join(c.cfg.DataDir, identityFile))
		if err != nil || known == "" {
			return err
		}
		if _, err := os.Stat(filepath.Join(h.Dir, mgs.FileName)); errors.Is(err, fs.ErrNotExist) {
			return c.missing(h)
		}
		return nil
	}
	id, err := c.reg.Identity(ctx)
	if err != nil {
		return err
	}
	if h.kind == status.KindMDT {
		made, err := c.reg.OSTs(ctx)
		if err != nil {
			return err
		}
		if len(c.cfg.OST) < made {
			return fmt.Errorf("the configuration has %d OSTs, the store was made with %d: add the missing [[ost]] tables", len(c.cfg.OST), made)
		}
	}
	made, err := c.reg.Made(ctx, h.Name)
	if err != nil {
		return err
	}
	path, want := filepath.Join(h.Dir, storeMark), h.Name+" "+id
	mark, err := readMark(path)
	if err != nil {
		return err
	}
	used, err := inUse(h.Dir)
	switch {
	case err != nil:
		return err
	case mark != "" && mark != want:
		return fmt.Errorf("%s: %s is the store of %q, not of %q: correct the directories, or mount the right disk", h.Name, h.Dir, mark, want)
	case made && mark == "" && !used:
		return c.missing(h)
	case !made && mark == "" && used:
		return fmt.Errorf("%s: %s is not empty, but the registry does not know of this target: give it an empty directory, or restore the registry from a backup", h.Name, h.Dir)
	}
	if mark == "" {
		if err := writeMark(path, want); err != nil {
			return err
		}
	}
	if !made {
		if err := c.reg.SetMade(ctx, h.Name); err != nil {
			return err
		}
	}
	if h.kind == status.KindMDT {
		return c.reg.SetOSTs(ctx, len(c.cfg.OST))
	}
	return nil
}

// loadKey reads the cluster key, or makes it on the cluster's first node. All nodes
// must have the same.
func (c *cluster) loadKey(ctx context.Context) ([]byte, error) {
	path := c.cfg.ClusterKeyFile
	_, err := os.Stat(path)
	fresh := errors.Is(err, fs.ErrNotExist)
	key, err := config.LoadClusterKey(path, rand.Reader)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte("baton cluster key\n"), key...))
	mine := hex.EncodeToString(sum[:])
	agreed, err := c.reg.Agree(ctx, "cluster-key", mine)
	if err == nil && agreed == mine {
		return key, nil
	}
	// Without an answer it may be the one that all have agreed on, and must stay.
	if err == nil && fresh {
		err = os.Remove(path)
	}
	if err == nil {
		err = fmt.Errorf("cluster key %s is not that of the other nodes, so that clients could not change nodes: copy the file from one of them", path)
	}
	return nil, err
}
