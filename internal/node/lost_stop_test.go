package node

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
)

// failing is a disk that takes data and, while broken is set, cannot make them durable.
type failing struct {
	objfs.FS
	broken *atomic.Bool
}

func (f failing) Fdatasync(fd int) error {
	if f.broken.Load() {
		return unix.EIO
	}
	return f.FS.Fdatasync(fd)
}

func (f failing) Syncfs() error {
	if f.broken.Load() {
		return unix.EIO
	}
	return f.FS.Syncfs()
}

// A flush has failed, and the new write verifiers cannot be stored: the call that has learnt
// of it is held, as everything is that depends on it. A stop ends nevertheless. It answers
// nothing of that, and leaves the address as after a crash.
func TestStopWithDataLostAndNoRegistry(t *testing.T) {
	c := newFloatCell(t)
	float, prepare := c.change, c.prepare
	var broken atomic.Bool
	c.change = func(k *config.Config) {
		float(k)
		k.NFS.DrainTimeout = config.Duration(time.Second)
		k.Failover.DrainTimeout, k.Failover.CommitTimeout = config.Duration(200*time.Millisecond), config.Duration(200*time.Millisecond)
	}
	c.prepare = func(n *Node) {
		prepare(n)
		n.testDisk = func(fs objfs.FS) objfs.FS { return failing{fs, &broken} }
	}
	n, a, b := c.serving()
	k := &rpcClient{t: t, at: func() netip.AddrPort { return served(a, b) }}
	defer k.close()
	fh := k.make(k.mount(), "f")
	verf := k.write(fh, "unstable")

	if err := n.StopTarget(ctx, "MGS"); err != nil {
		t.Fatal(err)
	}
	broken.Store(true)
	if _, err := k.conn.Write(rpctest.Call(1<<20, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCommit), (&nfs3.CommitArgs{FH: fh}).Encode)); err != nil {
		t.Fatal(err)
	}
	until(t, "the loss to be known", func() bool { return len(a.verTurn) == 1 })
	broken.Store(false)
	delete(c.nodes, "a")
	sctx, cancel := context.WithTimeout(ctx, patience/2)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- a.Stop(sctx) }()
	select {
	case err := <-stopped:
		if err != nil || sctx.Err() != nil {
			t.Errorf("stop: %v, %v", err, sctx.Err())
		}
	case <-time.After(patience):
		t.Fatal("the stop does not end")
	}
	if !a.stale.Load() {
		t.Error("the next start does not know of the loss")
	}
	k.conn.SetDeadline(time.Now().Add(patience))
	if out, err := rpctest.Reply(k.conn, 1<<20); err == nil {
		t.Errorf("the COMMIT was answered: %x", out)
	}
	k.close()
	if err := n.StartTarget(ctx, "MGS", ""); err != nil {
		t.Fatal(err)
	}
	until(t, "the registry", func() bool { _, err := b.reg.VIPs(ctx); return err == nil })
	if v := c.vip(b); v.Clean {
		t.Errorf("the address was given up in order: %+v", v)
	}
	c.abandon(b)
	c.assign(b, "b")
	c.become(b, vipagent.Serving)
	if k.commit(fh) == verf {
		t.Error("the write verifier is the old one")
	}
	c.down("b", b)
	delete(c.nodes, "c")
	if err := n.Stop(ctx); err == nil {
		t.Error("the OST that has lost data says that it stopped in order")
	}
}
