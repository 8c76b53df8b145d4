package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/client/imp"
	"github.com/baton-nfs/baton/recovery/host"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/recovery/wire/tcp"
)

const (
	mdtName = "MDT0000"
	ostName = "OST0000"
)

// rig is an MDT and an OST over stores in memory, served by TCP.
type rig struct {
	p      plan
	disk   *disk
	clk    clock.Strict
	srv    *tcp.Server
	served chan error
	addr   string
	// Until the crash told bounds what frontends are told to be durable.
	told    atomic.Uint64
	crashed atomic.Bool
	most    atomic.Int32 // replays of one frontend that were unanswered at a time
	first   atomic.Int64 // when the first replay was sent, in nanoseconds since 1970

	mdt, dead *host.MDT
	ost       *host.OST
	home      *tcp.Server // where the MDT is started
	fail      *failover   // nil: it is started where it was
}

func newRig(ctx context.Context, p plan) (r *rig, err error) {
	r = &rig{p: p, disk: &disk{FS: vfs.NewCrashableMem()}, served: make(chan error, 1)}
	r.told.Store(math.MaxUint64)
	if r.srv, err = tcp.NewServer(nil, tcp.ServerOptions{Node: "targets", Insecure: true}); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r.addr, r.home = l.Addr().String(), r.srv
	go func() { r.served <- r.srv.Serve(l) }()
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close(ctx))
			r = nil
		}
	}()
	if p.kill != "" {
		if err = r.newFailover(); err != nil {
			return r, err
		}
	}
	if err = r.start(ctx); err != nil {
		return r, err
	}
	if r.ost, err = host.StartOST(ctx, host.OSTOptions{
		Name: ostName, OST: ost.Options{FS: objfs.NewMem(r.clk.Now), BootID: "boot", Clock: r.clk.Now},
		MDT: r.reach("targets", mdtName),
	}); err != nil {
		return r, err
	}
	if err = r.srv.SetTarget(ostName, r.ost.Front()); err != nil {
		return r, err
	}
	select {
	case <-r.mdt.AllThere():
		return r, nil
	case <-ctx.Done():
		return r, ctx.Err()
	}
}

// start starts the MDT on what its disk has.
func (r *rig) start(ctx context.Context) (err error) {
	r.mdt, err = host.StartMDT(ctx, host.MDTOptions{
		Name: mdtName, Dir: "mdt", MDT: mdt.Options{StripeCount: 1},
		// A full table of the store would be written durably, commits held back or not.
		Engine:   local.Options{FS: r.disk, MinFreeBytes: -1, MemTableBytes: 1 << 30},
		Recovery: recov.Config{SoftMin: r.p.window, Step: r.p.step},
		OSTs:     []client.Target{r.reach("targets", ostName)}, Clock: r.clk.Now,
	})
	if err != nil {
		return err
	}
	return r.home.SetTarget(mdtName, r.mdt.Front())
}

// hold keeps from now on what the MDT writes from its disk, and from frontends
// that it takes it for durable.
func (r *rig) hold() {
	r.told.Store(r.mdt.Front().Status().Recovery.LastCommitted)
	r.disk.held.Store(true)
}

// crash ends service of the MDT as a power failure does.
func (r *rig) crash() error {
	left := r.disk.FS.(*vfs.MemFS).CrashClone(vfs.CrashCloneCfg{})
	// Its goroutines go on for a while on a disk that is gone.
	r.dead, r.mdt = r.mdt, nil
	r.crashed.Store(true)
	r.dead.Front().Fail(errors.New("crash"))
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.srv.StopTarget(over, mdtName); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	r.disk = &disk{FS: left}
	return nil
}

func (r *rig) close(ctx context.Context) error {
	var errs []error
	if r.ost != nil {
		errs = append(errs, r.ost.Stop(ctx))
	}
	if r.dead != nil {
		_ = r.dead.Stop(ctx) // it has failed
	}
	if r.mdt != nil {
		errs = append(errs, r.mdt.Stop(ctx))
	}
	if r.fail != nil {
		errs = append(errs, r.fail.close(ctx))
	}
	return errors.Join(append(errs, r.srv.Close(ctx), <-r.served)...)
}

// reach is the way to a target for a client on the given node.
func (r *rig) reach(node, name string) client.Target {
	addrs := []string{r.addr}
	if r.fail != nil && name == mdtName {
		addrs = []string{r.fail.relay.l.Addr().String(), r.fail.addr}
	}
	return client.Target{Name: name, Addrs: addrs, Dial: func(ctx context.Context, addr string) (wire.Conn, error) {
		b, err := tcp.DialBundle(ctx, tcp.BundleOptions{Bulk: name != mdtName, DialOptions: tcp.DialOptions{
			Addrs: []tcp.Endpoint{{Addr: addr}}, Target: name, Node: node, Insecure: true,
		}})
		if err != nil {
			return nil, err
		}
		if name == mdtName {
			return &path{Bundle: b, r: r}, nil
		}
		return b, nil
	}}
}

// frontend connects the i-th client.
func (r *rig) frontend(ctx context.Context, i int, evicted func()) (*client.FS, error) {
	node := fmt.Sprintf("frontend%d", i)
	fs, err := client.NewRemote(client.Options{
		ID: host.AgentID(node), Gen: 1, Clock: r.clk.Now, EpochIdle: time.Hour, OnEvicted: func(int) { evicted() },
	}, client.Remote{
		MDT: r.reach(node, mdtName), OSTs: []client.Target{r.reach(node, ostName)},
		// One frontend is to keep everything; the rest is as a node has it.
		Import: imp.Config{Soft: 1 << 40, BackoffMax: time.Second, ReplayWindow: r.p.ahead},
	})
	if err != nil {
		return nil, err
	}
	if err := fs.Connect(ctx); err != nil {
		return nil, errors.Join(err, fs.Abandon())
	}
	return fs, nil
}

// path is a frontend's path to the MDT.
type path struct {
	*tcp.Bundle
	r       *rig
	replays atomic.Int32 // unanswered ones
}

func (c *path) Start(req *wire.Request, rep *wire.Reply, done func(err error)) {
	replay := req.Flags&wire.FlagReplay != 0
	if replay {
		c.r.first.CompareAndSwap(0, time.Now().UnixNano())
		n := c.replays.Add(1)
		for m := c.r.most.Load(); n > m && !c.r.most.CompareAndSwap(m, n); m = c.r.most.Load() {
		}
	}
	c.Bundle.Start(req, rep, func(err error) {
		if replay {
			c.replays.Add(-1)
		}
		if !c.r.crashed.Load() {
			rep.LastCommitted = min(rep.LastCommitted, c.r.told.Load())
		}
		done(err)
	})
}

// disk is a file system that with held set makes nothing of a log durable.
type disk struct {
	vfs.FS
	held atomic.Bool
}

func (d *disk) log(name string, f vfs.File, err error) (vfs.File, error) {
	if err == nil && strings.HasSuffix(name, ".log") {
		f = &logFile{f, d}
	}
	return f, err
}

func (d *disk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.FS.Create(name, c)
	return d.log(name, f, err)
}

func (d *disk) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := d.FS.ReuseForWrite(oldname, newname, c)
	return d.log(newname, f, err)
}

type logFile struct {
	vfs.File
	d *disk
}

func (l *logFile) Sync() error {
	if l.d.held.Load() {
		return nil
	}
	return l.File.Sync()
}

func (l *logFile) SyncData() error { return l.Sync() }

func (l *logFile) SyncTo(int64) (bool, error) { return true, l.Sync() }
