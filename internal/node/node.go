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
	targets *targets
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

	cancel   context.CancelFunc
	wg       sync.WaitGroup
	stopping atomic.Bool
	orderly  bool          // Stop has drained all addresses
	verifier atomic.Uint64 // changes of write verifiers since the start

	rates rateKeeper
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
	if err := alone(cfg); err != nil {
		return nil, err
	}
	if len(cfg.Addrs()) == 0 {
		return nil, errors.New("no service address: set nfs.addresses")
	}
	return &Node{cfg: cfg, log: log}, nil
}

// alone refuses to run the whole store of a cluster in one process.
func alone(cfg *config.Config) error {
	if cfg.Clustered() {
		return fmt.Errorf("node %s is part of a cluster, which this version cannot run: it has everything in one process", cfg.Cluster.Node)
	}
	return nil
}

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
	run, cancel := context.WithCancel(context.Background())
	n.cancel = cancel

	n.nfs, err = nfsd.New(nfsd.Config{
		FS: n.fs, Codec: nfs3.NewCodec(key), Logger: n.log,
		RTMax: uint32(n.cfg.NFS.Rtmax), WTMax: uint32(n.cfg.NFS.Wtmax),
		RTPref: uint32(n.cfg.NFS.Rtpref), WTPref: uint32(n.cfg.NFS.Wtpref), DTPref: uint32(n.cfg.NFS.Dtpref),
	})
	if err != nil {
		return err
	}
	n.names = exports.NewNameCache(exports.NameConfig{Resolver: exports.SystemResolver{}})
	n.wg.Go(func() { n.names.Run(run) })
	if err = n.ReloadExports(); err != nil {
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
// that were acknowledged as UNSTABLE. If the registry cannot store them the node
// must not go on answering COMMIT, so it stops answering at all.
func (n *Node) lostData(reg mgs.Registry) {
	vips, err := reg.NewVerifiers(context.Background(), n.cfg.Cluster.Node)
	if err != nil {
		n.log.Error("new write verifiers could not be stored; this node stops", "err", err)
		os.Exit(1)
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

// listen opens the services of every address.
func (n *Node) listen(ctx context.Context) error {
	for _, addr := range n.cfg.Addrs() {
		vip, err := n.reg.Serve(ctx, addr, n.cfg.Cluster.Node)
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
	n.orderly = true
	return n.teardown(ctx)
}

func (n *Node) teardown(ctx context.Context) error {
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
	if n.fs != nil {
		errs = append(errs, n.fs.Close(ctx))
	}
	if n.targets != nil {
		errs = append(errs, n.targets.close(ctx))
	}
	if n.orderly && errors.Join(errs...) == nil {
		// Everything is durable: the next start need not ask clients for their locks.
		for _, s := range n.serving() {
			errs = append(errs, n.reg.Stopped(ctx, s.vip.Index, s.vip.Epoch))
		}
	}
	if n.unlock != nil {
		n.unlock()
	}
	return errors.Join(errs...)
}

// ReloadExports reads the exports again. On an error the old ones stay.
func (n *Node) ReloadExports() error {
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
	if err := n.nfs.SetExports(context.Background(), t); err != nil {
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

// FS is the node's file system client, from Start to Stop.
func (n *Node) FS() *client.FS { return n.fs }

// Probe goes through the data path: an attribute read at the MDT and a status
// from every OST.
func (n *Node) Probe(ctx context.Context) error {
	if n.stopping.Load() {
		return errors.New("stopping")
	}
	return n.targets.probe(ctx, n.fs)
}
