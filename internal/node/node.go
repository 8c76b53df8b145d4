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

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/nfsd"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/statd"
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
	// svcMu guards services, and the order of new verifiers and new services.
	svcMu    sync.Mutex
	services []*service
	rpcTable *rpcbind.Table
	rpcMode  string
	rpcReg   *rpcbind.Registrar

	// run ends, by cancel, when nothing is served any more.
	run      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	stopping atomic.Bool
	orderly  bool          // Stop has drained all addresses
	verifier atomic.Uint64 // changes of write verifiers since the start
	verMu    sync.Mutex    // held while they change
	// stale: data were lost and the verifiers could not be changed before the end.
	stale atomic.Bool

	// Of a cluster: the frontend comes up in the background; up is set when all
	// fields of it are, failed tells that it cannot.
	up         atomic.Bool
	waits      atomic.Pointer[string] // what it waits for until then
	frontend   sync.WaitGroup
	noFrontend context.CancelFunc
	deaf       func() // ends the hearing of news
	failed     chan error

	rates rateKeeper
	load  loadKeeper
}

// service is what runs on one service address.
type service struct {
	vip mgs.VIP
	rpc *sunrpc.Server
	nfs *nfsd.Address
	// locks is nil without locks and on the portmapper's services.
	locks *lockService
	port  map[netip.AddrPort]string // what listens where
}

// New checks what can be checked without starting anything.
func New(cfg *config.Config, log *slog.Logger) (*Node, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Addrs()) == 0 && !cfg.Clustered() {
		return nil, errors.New("no service address: set nfs.addresses")
	}
	return &Node{cfg: cfg, log: log, failed: make(chan error, 1)}, nil
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
	if n.fs, n.reg, n.targets, n.boot, err = openFS(ctx, n.cfg, n.log, &n.clock, n.lostData); err != nil {
		return err
	}
	return n.serve(ctx, key)
}

// startCluster begins to run targets and to bring the frontend up. Both may wait for
// other nodes, so it waits for neither.
func (n *Node) startCluster() (err error) {
	if n.cluster, err = newCluster(n.cfg, n.log, &n.clock); err != nil {
		return err
	}
	n.reg = n.cluster.reg
	vitals := n.vitals
	n.cluster.managing.vitals.Store(&vitals)
	n.cluster.boot()
	ctx, cancel := context.WithCancel(n.run)
	n.noFrontend = cancel
	if len(n.cfg.Addrs()) == 0 {
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
	n.log.Info("serving the service addresses", "addresses", n.cfg.NFS.Addresses)
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
	if err = n.listen(ctx); err != nil {
		return err
	}
	if err = n.startRpcbind(ctx); err != nil {
		return err
	}
	// Clients look for the ports when they are called, so they are called last.
	for _, s := range n.serving() {
		if s.locks != nil {
			s.locks.start()
		}
	}
	n.up.Store(true)
	return nil
}

// addService enters a service and, if it serves NFS, gives it its verifier as it is
// now: data may have been lost since the address was registered.
func (n *Node) addService(ctx context.Context, s *service) error {
	n.svcMu.Lock()
	defer n.svcMu.Unlock()
	n.services = append(n.services, s)
	if s.nfs == nil {
		return nil
	}
	if n.cluster != nil {
		n.cluster.serves(s.vip)
	}
	vips, err := n.reg.VIPs(ctx)
	for _, v := range vips {
		if v.Index == s.vip.Index {
			s.nfs.SetVerifier(v.VerifierBytes())
		}
	}
	return err
}

// serving lists the services there are.
func (n *Node) serving() []*service {
	n.svcMu.Lock()
	defer n.svcMu.Unlock()
	return slices.Clone(n.services)
}

// lostData gives all write verifiers new values, because an OST has lost data
// that were acknowledged as UNSTABLE. Nothing that depends on it is answered before
// it returns. A node that is alone and cannot store them must not go on answering
// COMMIT, so it stops answering at all; one of a cluster tries until it stops
// serving, and then its next start changes them.
func (n *Node) lostData(reg mgs.Registry) {
	n.verMu.Lock()
	defer n.verMu.Unlock()
	var vips []mgs.VIP
	for told := false; ; told = true {
		var err error
		if vips, err = reg.NewVerifiers(n.run, n.cfg.Cluster.Node); err == nil {
			break
		}
		if n.cluster == nil {
			n.log.Error("new write verifiers could not be stored; this node stops", "err", err)
			os.Exit(1)
		}
		if n.run.Err() != nil {
			n.stale.Store(true)
			return
		}
		if !told {
			n.log.Error("new write verifiers cannot be stored; answers about the data wait for it", "err", err)
		}
		select {
		case <-n.run.Done():
		case <-time.After(maxPause):
		}
	}
	n.verifier.Add(1)
	n.svcMu.Lock()
	defer n.svcMu.Unlock()
	for _, s := range n.services {
		for i := range vips {
			// The portmapper's services have no verifier.
			if s.nfs != nil && vips[i].Index == s.vip.Index {
				s.nfs.SetVerifier(vips[i].VerifierBytes())
			}
		}
	}
}

// takeAddress begins a period of service. What a process of a cluster had of data
// that were not on a disk yet has died with it, and an OST may have died, too: then
// clients have to send them again.
func (n *Node) takeAddress(ctx context.Context, addr netip.Addr) (mgs.VIP, error) {
	v, err := n.reg.Serve(ctx, addr, n.cfg.Cluster.Node)
	if err != nil || n.cluster == nil || !v.Crashed {
		return v, err
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

// listen opens the services of every address.
func (n *Node) listen(ctx context.Context) error {
	for _, addr := range n.cfg.Addrs() {
		vip, err := n.takeAddress(ctx, addr)
		if err != nil {
			return err
		}
		if err := n.fs.RaiseEpoch(ctx, client.Owner{VIP: vip.Index, Epoch: vip.Epoch}); err != nil {
			return err
		}
		forgotten, err := n.beginLocks(ctx, &vip, n.cfg.ForgetLocks)
		if err != nil {
			return err
		}
		s := &service{vip: vip, nfs: n.nfs.Address(vip.Index, vip.Epoch, vip.VerifierBytes()), port: map[netip.AddrPort]string{}}
		programs := []sunrpc.Program{s.nfs.NFSProgram(), s.nfs.MountProgram()}
		if n.lockd != nil {
			s.locks = &lockService{
				nlm: n.lockd.Address(addr, vip.Index, vip.Epoch, s.nfs),
				nsm: n.statd.Address(addr, vip.Index, vip.Epoch, vip.NSMState), forgotten: forgotten,
			}
			programs = append(programs, s.locks.programs()...)
		}
		s.rpc = sunrpc.NewServer(sunrpc.Config{
			Programs:                programs,
			Logger:                  n.log,
			MaxRecord:               int(n.cfg.NFS.Wtmax) + 64<<10,
			MaxConns:                n.maxConns(),
			MaxInflightBytesPerConn: int(n.cfg.NFS.ConnInflight),
			MaxInflightBytes:        int(n.cfg.NFS.Inflight),
			Workers:                 n.cfg.NFS.Workers,
			OnClose:                 n.nfs.ConnClosed,
		})
		if err := n.addService(ctx, s); err != nil {
			return err
		}
		if err := n.openPorts(s); err != nil {
			return err
		}
		n.log.Info("listening", "address", addr, "port", n.cfg.NFS.Port, "mount_port", n.cfg.NFS.MountPort, "vip", vip.Index, "epoch", vip.Epoch)
	}
	return nil
}

// openPorts opens the listeners of a service. All programs are served on every
// port; programs with the same port share a listener.
func (n *Node) openPorts(s *service) error {
	type port struct {
		name string
		port int
		udp  bool
	}
	ports := []port{{"nfs", n.cfg.NFS.Port, n.cfg.NFS.UDP}, {"mountd", n.cfg.NFS.MountPort, true}}
	if s.locks != nil {
		ports = append(ports, port{"nlm", n.cfg.Locks.NLMPort, true}, port{"statd", n.cfg.Locks.StatdPort, true})
	}
	udp := map[netip.AddrPort]bool{}
	for _, l := range ports {
		ap := netip.AddrPortFrom(s.vip.Addr, uint16(l.port))
		if _, shared := s.port[ap]; !shared {
			bound, err := s.rpc.ListenTCP(ap, sunrpc.ListenOptions{})
			if err != nil {
				return listenError(ap, "tcp", l.name, err)
			}
			ap = bound
			s.port[ap] = l.name
		}
		if l.udp && !udp[ap] {
			if _, err := s.rpc.ListenUDP(ap, sunrpc.ListenOptions{}); err != nil {
				return listenError(ap, "udp", l.name, err)
			}
			udp[ap] = true
		}
	}
	return nil
}

func listenError(ap netip.AddrPort, network, name string, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%s on %s/%s: the port is in use, perhaps by the kernel's NFS server or another baton; stop that or choose other ports: %w", name, ap, network, err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s on %s/%s: not allowed; ports below 1024 need root or CAP_NET_BIND_SERVICE: %w", name, ap, network, err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s on %s/%s: this machine does not have the address; correct nfs.addresses: %w", name, ap, network, err)
	}
	return fmt.Errorf("%s on %s/%s: %w", name, ap, network, err)
}

// mappings lists what rpcbind shall answer.
func (n *Node) mappings() []rpcbind.Mapping {
	port, mount, udp := uint16(n.cfg.NFS.Port), uint16(n.cfg.NFS.MountPort), uint16(0)
	if n.cfg.NFS.UDP {
		udp = port
	}
	l := rpcbind.Mappings(nfs3.Program, []uint32{nfs3.Version}, n.cfg.Addrs(), port, udp)
	l = append(l, rpcbind.Mappings(mount3.Program, []uint32{mount3.VersionOld, mount3.Version}, n.cfg.Addrs(), mount, mount)...)
	return append(l, n.lockMappings()...)
}

// startRpcbind makes the ports known: through the system's rpcbind, or by
// answering on every service address.
func (n *Node) startRpcbind(ctx context.Context) error {
	mode := n.cfg.Rpcbind.Mode
	sys := rpcbind.System{}
	if mode == config.RpcbindAuto {
		mode = config.RpcbindOwn
		if sys.Available(ctx) {
			mode = config.RpcbindSystem
		}
	}
	n.rpcMode = mode
	switch mode {
	case config.RpcbindOff:
		return nil
	case config.RpcbindSystem:
		r := &rpcbind.Registrar{System: sys, Mappings: n.mappings(), Logger: n.log}
		if err := r.Start(ctx); err != nil {
			return fmt.Errorf("rpcbind: %w; set rpcbind.mode = \"own\" or \"off\"", err)
		}
		n.rpcReg = r
		return nil
	}
	n.rpcTable = &rpcbind.Table{}
	for _, m := range n.mappings() {
		n.rpcTable.Set(m)
	}
	srv := &rpcbind.Server{Table: n.rpcTable}
	for _, s := range n.serving() {
		rs := sunrpc.NewServer(sunrpc.Config{Programs: srv.Programs(), Logger: n.log, MaxRecord: 64 << 10, MaxConns: 256, MaxInflightBytes: 8 << 20, Workers: 4})
		ap := netip.AddrPortFrom(s.vip.Addr, uint16(n.cfg.Rpcbind.Port))
		v := &service{vip: s.vip, rpc: rs, port: map[netip.AddrPort]string{ap: "rpcbind"}}
		_, err := rs.ListenTCP(ap, sunrpc.ListenOptions{})
		if err == nil {
			_, err = rs.ListenUDP(ap, sunrpc.ListenOptions{})
		}
		if err := n.addService(ctx, v); err != nil {
			return err
		}
		if err != nil {
			if n.cfg.Rpcbind.Mode == config.RpcbindAuto {
				n.log.Warn("portmap is not available; clients must name the ports themselves (mount options port= and mountport=)", "err", listenError(ap, "tcp+udp", "rpcbind", err))
				n.rpcMode = config.RpcbindOff
				return nil
			}
			return listenError(ap, "tcp+udp", "rpcbind", err)
		}
	}
	port := uint16(n.cfg.Rpcbind.Port)
	for _, m := range rpcbind.Mappings(rpcbind.Program, []uint32{rpcbind.VersPortmap, rpcbind.Vers3, rpcbind.Vers4}, n.cfg.Addrs(), port, port) {
		n.rpcTable.Set(m)
	}
	return nil
}

// Stop takes the node down in an orderly way: clients' calls are finished and
// answered, everything acknowledged is made durable. ctx bounds the drain.
func (n *Node) Stop(ctx context.Context) error {
	n.stopping.Store(true)
	if n.cluster != nil {
		n.noFrontend()
		n.frontend.Wait()
	}
	dctx, cancel := context.WithTimeout(ctx, time.Duration(n.cfg.NFS.DrainTimeout))
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range n.serving() {
		wg.Go(func() {
			if s.locks != nil {
				// Grants stay pending in the lock table; the next start calls back.
				if err := s.locks.stop(dctx); err != nil {
					n.log.Warn("callbacks to clients have not ended in time", "address", s.vip.Addr, "err", err)
				}
			}
			r := s.rpc.Drain(dctx)
			n.log.Info("drained", "address", s.vip.Addr, "orderly", r.Orderly, "forced", r.Forced, "replies", r.Replies)
		})
	}
	wg.Wait()
	if n.cluster != nil {
		n.cluster.vips.Store(nil)
	}
	n.orderly = true
	return n.teardown(ctx)
}

// leaveTime bounds the leave that a node takes of the other nodes, which may be
// stopping, too: what it has left behind is then finished by the MDT.
const leaveTime = 10 * time.Second

func (n *Node) teardown(ctx context.Context) error {
	if n.noFrontend != nil {
		n.noFrontend()
		n.frontend.Wait()
	}
	var errs []error
	if n.rpcReg != nil {
		errs = append(errs, n.rpcReg.Stop(ctx))
	}
	for _, s := range n.serving() {
		if s.locks != nil && !n.orderly {
			errs = append(errs, s.locks.stop(ctx))
		}
		errs = append(errs, s.rpc.Close())
	}
	if n.cancel != nil {
		n.cancel()
	}
	n.wg.Wait()
	if n.cluster != nil {
		errs = append(errs, n.leave(ctx), n.cluster.close(ctx))
	} else {
		if n.fs != nil {
			errs = append(errs, n.fs.Close(ctx))
		}
		if n.targets != nil {
			errs = append(errs, n.targets.close(ctx))
		}
		if n.orderly && errors.Join(errs...) == nil {
			// Everything is durable: the next start need not ask clients for their locks.
			errs = append(errs, n.stopped(ctx))
		}
	}
	if n.unlock != nil {
		n.unlock()
	}
	return errors.Join(errs...)
}

// stopped ends the periods of service.
func (n *Node) stopped(ctx context.Context) error {
	var errs []error
	for _, s := range n.serving() {
		if s.nfs != nil {
			errs = append(errs, n.reg.Stopped(ctx, s.vip.Index, s.vip.Epoch))
		}
	}
	return errors.Join(errs...)
}

// leave ends the part of a cluster's frontend in this node, while the targets here
// still run. That others are away is no error: nothing acknowledged is lost, and
// the next start acts as after a crash.
func (n *Node) leave(ctx context.Context) error {
	if n.fs == nil {
		return nil
	}
	n.deaf()
	defer n.cluster.fs.Store(nil)
	lctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	err := n.fs.Close(lctx)
	if err == nil && n.orderly && !n.stale.Load() {
		err = n.stopped(lctx)
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
