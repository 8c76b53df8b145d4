package powerfail

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/internal/fsck"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/mdt/ostsync"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

var ctx = context.Background()

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// segShift makes segments of 128 KiB, so that files have several.
const segShift = 17

// disks are what a crash leaves: the metadata target's file system and those
// of the object targets, as they were at one instant.
type disks struct {
	mdt  *vfs.MemFS
	ost  [2]*objfs.Mem
	boot int // a power failure gives another one
}

func newDisks(clk *clock.Strict) *disks {
	d := &disks{mdt: vfs.NewCrashableMem()}
	for i := range d.ost {
		d.ost[i] = objfs.NewMem(clk.Now)
	}
	return d
}

// gate lets a crash stop all changes of the object targets' disks. The
// metadata target need not stop: it is copied last, in one instant, and what it
// does meanwhile cannot have been caused by anything that is not in the copies.
type gate struct {
	mu      sync.RWMutex
	crashed bool
}

// alive runs fn unless the crash was before; then what fn would note was never
// seen by anybody.
func (g *gate) alive(fn func()) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.crashed {
		fn()
	}
	return !g.crashed
}

// gated is an object target's disk behind the gate.
type gated struct {
	objfs.FS
	g *gate
}

func (f *gated) Open(p string, flags int) (int, error) {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Open(p, flags)
}

func (f *gated) Pwrite(fd int, p []byte, off int64) (int, error) {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Pwrite(fd, p, off)
}

func (f *gated) Truncate(fd int, size int64) error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Truncate(fd, size)
}

func (f *gated) Fdatasync(fd int) error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Fdatasync(fd)
}

func (f *gated) Syncfs() error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Syncfs()
}

func (f *gated) Remove(p string) error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Remove(p)
}

func (f *gated) Rename(from, to string) error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Rename(from, to)
}

func (f *gated) Mkdir(p string) error {
	f.g.mu.RLock()
	defer f.g.mu.RUnlock()
	return f.FS.Mkdir(p)
}

// node is one life of the node.
type node struct {
	d    *disks
	g    gate
	e    *local.Pebble
	mdt  *mdt.MDT
	osts [2]*ost.Target
	fs   *client.FS
	lost bool // an object target said that unflushed data may be lost

	cancel context.CancelFunc
	wg     sync.WaitGroup
	logErr error
	sync   *ostsync.Sync
}

// start opens the targets on the disks and connects a client, without recovery.
func start(d *disks, clk *clock.Strict, gen uint64) (*node, error) {
	n := &node{d: d}
	var err error
	n.e, err = local.OpenPebble("mdt", local.Options{FS: d.mdt, MemTableBytes: 1 << 20, CacheBytes: 4 << 20, MinFreeBytes: -1})
	if err != nil {
		return nil, err
	}
	n.mdt, err = mdt.Open(mdt.Options{Engine: n.e, Clock: clk.Now, StripeSize: 64 << 10, OSTs: func() []mdt.OSTState {
		return []mdt.OSTState{{Index: 0, Up: true, Free: 1 << 30}, {Index: 1, Up: true, Free: 1 << 30}}
	}})
	if err != nil {
		return nil, err
	}
	n.mdt.Begin(0)
	conns := make([]wire.Conn, len(n.osts))
	for i := range n.osts {
		n.osts[i], err = ost.Open(ost.Options{
			Index: uint16(i), FS: &gated{d.ost[i], &n.g}, BootID: fmt.Sprint("boot", d.boot), Clock: clk.Now, Logger: quiet,
			CommitInterval: 30 * time.Millisecond, SegShift: segShift, MaxOpenFiles: 32, OnLost: func() error { n.lost = true; return nil },
		})
		if err != nil {
			return nil, err
		}
		n.osts[i].Begin(0)
		conns[i] = wire.InProc(n.osts[i])
	}
	n.fs, err = client.New(client.Options{
		MDT: wire.InProc(n.mdt), OSTs: conns, ID: wire.ClientID{1}, Gen: gen, Clock: clk.Now, EpochIdle: 20 * time.Millisecond,
	})
	if err != nil {
		return nil, err
	}
	n.sync = ostsync.New(n.mdt, n.fs, nil)
	return n, n.fs.Connect(ctx)
}

// recover does what a node does before it serves: logged truncations, IO
// epochs that were left open. Then it starts to destroy the objects of removed
// files.
func (n *node) recover() error {
	return n.sync.Once(ctx)
}

// serve starts the destroyer.
func (n *node) serve() {
	c, cancel := context.WithCancel(ctx)
	n.cancel = cancel
	n.wg.Go(func() {
		tick := time.NewTicker(3 * time.Millisecond)
		defer tick.Stop()
		for n.logErr == nil {
			select {
			case <-c.Done():
				return
			case <-tick.C:
				if err := n.sync.Once(c); c.Err() == nil {
					n.logErr = err
				}
			}
		}
	})
}

// crash takes what a power failure, or a kill of the process, leaves on the
// disks at this moment. The node goes on without knowing, on disks that nobody
// looks at any more.
func (n *node) crash(rng *rand.Rand, power bool) *disks {
	n.g.mu.Lock()
	defer n.g.mu.Unlock()
	n.g.crashed = true
	d := &disks{boot: n.d.boot}
	percent := 100 // what was written is in the kernel
	if power {
		d.boot++
		percent = rng.IntN(101)
	}
	for i, m := range n.d.ost {
		if !power {
			if err := m.Syncfs(); err != nil {
				panic(err) // no error was injected
			}
		} else if rng.IntN(2) == 0 {
			m.Writeback(rng)
		}
		d.ost[i] = m.CrashClone(rng.Uint64())
	}
	d.mdt = n.d.mdt.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
	return d
}

// stop ends the node's life in an orderly way.
func (n *node) stop() error {
	if n.cancel != nil {
		n.cancel()
		n.wg.Wait()
	}
	if n.logErr != nil {
		return fmt.Errorf("destroyer: %w", n.logErr)
	}
	if err := n.mdt.Sync(); err != nil {
		return err
	}
	if err := n.sync.Once(ctx); err != nil {
		return err
	}
	if err := n.fs.Close(ctx); err != nil {
		return err
	}
	if err := n.mdt.Close(); err != nil {
		return err
	}
	if err := n.e.Close(); err != nil {
		return err
	}
	for _, o := range n.osts {
		if err := o.Close(); err != nil {
			return err
		}
	}
	return nil
}

// check runs fsck on disks that no node uses.
func (d *disks) check() (*fsck.Report, error) {
	return fsck.Open(ctx, fsck.OpenOptions{
		MDTDir: "mdt", OSTDirs: []string{"0", "1"}, VFS: d.mdt, OSTFS: func(i int) objfs.FS { return d.ost[i] },
	})
}

func text(r *fsck.Report) string {
	var b bytes.Buffer
	_ = r.WriteText(&b, true)
	return b.String()
}
