// Package unit has what a node serves at one service address: NFS, MOUNT, NLM, NSM and
// its own portmapper, over TCP and UDP. All of it moves together, because clients
// know a server only by its address. Fixed and floating addresses are served by the
// same code: Listen, Begin, Serve, Notify; a teardown is that of package failover.
package unit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/failover"
	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/fdstore"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/lockd"
	"github.com/baton-nfs/baton/nfsd"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd"
	"github.com/baton-nfs/baton/vip"
)

// Deps are what the units of a node share.
type Deps struct {
	Config   *config.Config
	Log      *slog.Logger
	FS       *client.FS
	NFS      *nfsd.Server
	Lockd    *lockd.Server // nil without locks
	Statd    *statd.Server // nil without locks
	Registry mgs.Registry
	Portmap  *Portmap
	// MaxConns bounds the connections of one address.
	MaxConns int
	// Begun is told of a unit whose period of service has begun, before it answers
	// anything, and gives it its write verifier as it is then: data may have been lost
	// since the registry gave it out. Ended is told of the end, once, if Begun was.
	Begun func(ctx context.Context, u *Unit) error
	Ended func(u *Unit)
	// Verifiers counts the changes of this node's write verifiers; nil: they do not
	// change.
	Verifiers func() uint64
	// Silence makes it so that closing a TCP socket sends nothing (vip.CloseQuietly).
	// nil: connections are reset instead.
	Silence func(syscall.RawConn) error
	// Inherited are sockets of the process before, or of the service manager; nil: none.
	Inherited *fdstore.Inherited
}

// Unit is what is served at one address, from Listen to Finish; it is used once. It
// implements failover.Service.
type Unit struct {
	d    *Deps
	addr netip.Addr
	log  *slog.Logger
	rpc  *sunrpc.Server
	bind *sunrpc.Server // the own portmapper's, or nil
	port map[netip.AddrPort]string
	// changed gets a value when a connection has come or gone.
	changed chan struct{}
	// verifiers is what Deps.Verifiers said when the unit was made.
	verifiers uint64

	// Set by Begin, which Begun follows, under mu.
	vip   mgs.VIP
	nfs   *nfsd.Address
	locks *Locks
	hosts int // clients to be told that they have to reclaim their locks

	mu       sync.Mutex
	begun    bool // Begun was called
	quiet    bool // Drain was called
	closing  bool // Close was called
	finished bool
}

// New returns the unit of an address. Nothing is open yet.
func (d *Deps) New(addr netip.Addr) *Unit {
	addr = addr.Unmap()
	u := &Unit{d: d, addr: addr, log: d.Log.With("address", addr), port: map[netip.AddrPort]string{}, changed: make(chan struct{}, 1)}
	if d.Verifiers != nil {
		u.verifiers = d.Verifiers()
	}
	return u
}

// Addr is the address.
func (u *Unit) Addr() netip.Addr { return u.addr }

// VIP is the address as it was registered when its period of service began.
func (u *Unit) VIP() mgs.VIP { return u.vip }

// Verifiers is how often this node's write verifiers had changed when the unit was made,
// which was before its period of service was asked for.
func (u *Unit) Verifiers() uint64 { return u.verifiers }

// NFS is the NFS service of the address.
func (u *Unit) NFS() *nfsd.Address { return u.nfs }

// Locks is the lock service, nil without locks.
func (u *Unit) Locks() *Locks { return u.locks }

// Ports tells what listens where.
func (u *Unit) Ports() map[netip.AddrPort]string { return u.port }

// Servers are the RPC servers, for their figures.
func (u *Unit) Servers() []*sunrpc.Server {
	if u.bind == nil {
		return []*sunrpc.Server{u.rpc}
	}
	return []*sunrpc.Server{u.rpc, u.bind}
}

// Changed gets a value after connections have come or gone.
func (u *Unit) Changed() <-chan struct{} { return u.changed }

func (u *Unit) change() {
	select {
	case u.changed <- struct{}{}:
	default:
	}
}

// Listen opens the listeners. With absent the machine need not have the address (yet).
// What comes before Serve waits in the kernel. When it fails, nothing is open.
func (u *Unit) Listen(absent bool) error {
	n := &u.d.Config.NFS
	u.rpc = sunrpc.NewServer(sunrpc.Config{
		Logger:                  u.d.Log,
		MaxRecord:               int(n.Wtmax) + 64<<10,
		MaxConns:                u.d.MaxConns,
		MaxInflightBytesPerConn: int(n.ConnInflight),
		MaxInflightBytes:        int(n.Inflight),
		Workers:                 n.Workers,
		OnOpen:                  func(*sunrpc.Conn) { u.change() },
		OnClose: func(c *sunrpc.Conn) {
			u.d.NFS.ConnClosed(c)
			u.change()
		},
	})
	opts := sunrpc.ListenOptions{FreeBind: absent, Held: true}
	err := u.openPorts(opts)
	if err == nil {
		err = u.openPortmap(opts)
	}
	if err != nil {
		u.closeServers(context.Background())
	}
	return err
}

// openPorts opens the listeners. All programs are served on every port; programs with
// the same port share a listener.
func (u *Unit) openPorts(opts sunrpc.ListenOptions) error {
	type port struct {
		name string
		port int
		udp  bool
	}
	cfg := u.d.Config
	ports := []port{{"nfs", cfg.NFS.Port, cfg.NFS.UDP}, {"mountd", cfg.NFS.MountPort, true}}
	if u.d.Lockd != nil {
		ports = append(ports, port{"nlm", cfg.Locks.NLMPort, true}, port{"statd", cfg.Locks.StatdPort, true})
	}
	udp := map[netip.AddrPort]bool{}
	for _, l := range ports {
		ap := netip.AddrPortFrom(u.addr, uint16(l.port))
		if _, shared := u.port[ap]; !shared {
			bound, err := u.rpc.ListenTCP(ap, u.inherit(false, ap, opts))
			if err != nil {
				return listenError(ap, "tcp", l.name, err)
			}
			ap = bound
			u.port[ap] = l.name
		}
		if l.udp && !udp[ap] {
			if _, err := u.rpc.ListenUDP(ap, u.inherit(true, ap, opts)); err != nil {
				return listenError(ap, "udp", l.name, err)
			}
			udp[ap] = true
		}
	}
	return nil
}

// inherit completes opts by a socket that is there already.
func (u *Unit) inherit(udp bool, ap netip.AddrPort, opts sunrpc.ListenOptions) sunrpc.ListenOptions {
	opts.File, opts.Shared = u.d.Inherited.Socket(udp, ap)
	return opts
}

// openPortmap opens the own portmapper's listeners, if it is to answer.
func (u *Unit) openPortmap(opts sunrpc.ListenOptions) error {
	p := u.d.Portmap
	if !p.own() {
		return nil
	}
	srv := &rpcbind.Server{Table: p.table(u.addr)}
	u.bind = sunrpc.NewServer(sunrpc.Config{
		Programs: srv.Programs(), Logger: u.d.Log, MaxRecord: 64 << 10, MaxConns: 256, MaxInflightBytes: 8 << 20, Workers: 4,
	})
	ap := netip.AddrPortFrom(u.addr, uint16(u.d.Config.Rpcbind.Port))
	_, err := u.bind.ListenTCP(ap, u.inherit(false, ap, opts))
	if err == nil {
		_, err = u.bind.ListenUDP(ap, u.inherit(true, ap, opts))
	}
	if err == nil {
		p.opened(true)
		u.port[ap] = "rpcbind"
		return nil
	}
	err = listenError(ap, "tcp+udp", "rpcbind", err)
	if u.d.Config.Rpcbind.Mode != config.RpcbindAuto {
		return err
	}
	u.bind.Close()
	u.bind = nil
	if p.opened(false) {
		u.log.Info("the system's rpcbind answers by now, and is told the ports from now on", "own", err)
		return nil
	}
	u.log.Warn("portmap is not available; clients must name the ports themselves (mount options port= and mountport=)", "err", err)
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

// Begin begins the period of service that the registry has given v for: all targets
// refuse earlier ones from now on, and the lock table knows in which state the locks
// are. It may still run when Finish is called, and has no effect here after that.
func (u *Unit) Begin(ctx context.Context, v mgs.VIP, forget bool) error {
	if err := u.d.FS.RaiseEpoch(ctx, client.Owner{VIP: v.Index, Epoch: v.Epoch}); err != nil {
		return err
	}
	in, forgotten, err := u.d.beginLocks(ctx, &v, forget)
	if err != nil {
		return err
	}
	if err := u.enter(v, &in, forgotten); err != nil {
		return err
	}
	err = u.d.Begun(ctx, u)
	u.mu.Lock()
	u.begun = true
	over := u.finished
	u.mu.Unlock()
	if over {
		u.d.Ended(u)
	}
	return err
}

var errFinished = errors.New("the address was given up meanwhile")

// enter makes what serves v, unless the unit is finished already.
func (u *Unit) enter(v mgs.VIP, in *wire.LockServiceInfo, forgotten uint64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.finished {
		return errFinished
	}
	u.vip = v
	u.nfs = u.d.NFS.Address(v.Index, v.Epoch, v.VerifierBytes())
	if u.d.Lockd != nil {
		u.locks = &Locks{
			NLM: u.d.Lockd.Address(u.addr, v.Index, v.Epoch, u.nfs),
			NSM: u.d.Statd.Address(u.addr, v.Index, v.Epoch, v.NSMState), Forgotten: forgotten,
		}
	}
	if v.Crashed || in.Grace {
		u.hosts = int(in.Hosts)
	}
	return nil
}

// Serve has calls answered from now on, those too that have waited.
func (u *Unit) Serve() error {
	programs := []sunrpc.Program{u.nfs.NFSProgram(), u.nfs.MountProgram()}
	if u.locks != nil {
		programs = append(programs, u.locks.programs()...)
	}
	err := u.rpc.Open(programs...)
	if err == nil && u.bind != nil {
		err = u.bind.Open()
	}
	return err
}

// Notify makes the ports known, begins to call clients back that wait for locks, and
// tells those that have to reclaim theirs, in the background. Clients look for the
// ports when they are called, so they are called last.
func (u *Unit) Notify(ctx context.Context) (failover.Notified, error) {
	// One that is late comes after the end: package failover has not waited for it.
	u.mu.Lock()
	if u.finished {
		u.mu.Unlock()
		return failover.Notified{}, errFinished
	}
	u.d.Portmap.want(u.addr, true)
	u.mu.Unlock()
	err := u.d.Portmap.settled(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.quiet || u.closing || u.finished || u.locks == nil {
		return failover.Notified{}, err
	}
	u.locks.start()
	return failover.Notified{Clients: u.hosts}, err
}

// Refuse implements failover.Service.
func (u *Unit) Refuse(_ context.Context, how failover.Refuse) error {
	err := u.rpc.Refuse(how != failover.Reset)
	if u.bind != nil {
		err = errors.Join(err, u.bind.Refuse(how != failover.Reset))
	}
	return err
}

// Drain implements failover.Service. Grants of locks that were not told stay pending in
// the lock table, for the address's next owner.
func (u *Unit) Drain(ctx context.Context) (failover.Drained, error) {
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { err = u.stopLocks(ctx) })
	if u.bind != nil {
		wg.Go(func() { u.bind.Quiesce(ctx) })
	}
	q := u.rpc.Quiesce(ctx)
	wg.Wait()
	if err != nil {
		err = fmt.Errorf("callbacks to clients have not ended in time: %w", err)
	}
	return failover.Drained{Conns: q.Conns, Replies: q.Replies, Left: q.Left + q.LeftUDP}, err
}

// stopLocks ends the callbacks, once.
func (u *Unit) stopLocks(ctx context.Context) error {
	u.mu.Lock()
	done := u.quiet || u.locks == nil
	u.quiet = true
	u.mu.Unlock()
	if done {
		return nil
	}
	return u.locks.stop(ctx)
}

// Commit implements failover.Service.
func (u *Unit) Commit(ctx context.Context) error {
	return u.d.FS.Flush(ctx, client.Owner{VIP: u.vip.Index, Epoch: u.vip.Epoch})
}

// Conns implements failover.Service.
func (u *Unit) Conns() []vip.Conn {
	var l []vip.Conn
	for _, s := range u.Servers() {
		for _, c := range s.Conns() {
			l = append(l, vip.Conn{Local: c.Local, Remote: c.Remote})
		}
	}
	return l
}

// Close implements failover.Service. Calls to clients end, too, so that no socket of
// theirs is closed after those of the address were cleared away: a teardown that is
// fenced has no Drain, and one that is cut has not ended.
func (u *Unit) Close(ctx context.Context, how failover.Closing) (failover.Closed, error) {
	var c failover.Closed
	var errs []error
	u.mu.Lock()
	u.closing = true
	u.mu.Unlock()
	if u.locks != nil {
		errs = append(errs, u.locks.endCalls(ctx))
	}
	for _, s := range u.Servers() {
		var r sunrpc.DrainResult
		var err error
		if how == failover.Quiet && u.d.Silence != nil {
			r, err = s.CloseQuietly(ctx, u.d.Silence)
		} else {
			r = s.HalfClose(ctx)
		}
		c.Orderly += r.Orderly
		c.Forced += r.Forced
		errs = append(errs, err)
	}
	return c, errors.Join(errs...)
}

// Mute keeps the ports and has the kernel drop whatever comes to them, until Finish. It
// comes after Close.
func (u *Unit) Mute(context.Context) error {
	var errs []error
	for _, s := range u.Servers() {
		errs = append(errs, s.DropAll())
	}
	return errors.Join(errs...)
}

// Finish implements failover.Service, and undoes what was done of a take-over. It may
// be called at any time and more than once.
func (u *Unit) Finish(ctx context.Context) error {
	u.mu.Lock()
	done, begun := u.finished, u.begun
	u.finished = true
	registered := !done && u.d.Portmap.want(u.addr, false)
	u.mu.Unlock()
	if done {
		return nil
	}
	var wg sync.WaitGroup
	var lerr, perr error
	wg.Go(func() { lerr = u.stopLocks(ctx) })
	if registered {
		wg.Go(func() { perr = u.d.Portmap.settled(ctx) })
	}
	err := u.closeServers(ctx)
	wg.Wait()
	if begun {
		u.d.Ended(u)
	}
	return errors.Join(err, lerr, perr)
}

// closeServers closes all sockets. Calls that wait for a target end later, unanswered.
func (u *Unit) closeServers(ctx context.Context) error {
	if u.rpc == nil {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		var errs []error
		for _, s := range u.Servers() {
			errs = append(errs, s.Close())
		}
		done <- errors.Join(errs...)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("services of %s have not ended in time; nothing more is answered: %w", u.addr, ctx.Err())
	}
}
