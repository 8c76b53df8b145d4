package node

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/health"
	"github.com/baton-nfs/baton/recovery/wire"
)

// An owner that is superseded without knowing it answers nothing and changes nothing
// any more, and gives the address up, when a target refuses it (the registry has told it
// nothing) and when another node's beats tell a newer epoch. own 3, 4; 004.24, 004.26,
// 004.32.
func TestFencedWithoutRegistry(t *testing.T) {
	for _, by := range []string{"target", "beat"} {
		t.Run(by, func(t *testing.T) {
			m := upMoving(t)
			k := m.client()
			dir := k.mount()
			fh := k.make(dir, "kept")
			k.writeAt(fh, 0, []byte("first"), wire.FileSync)
			was := m.vip(m.b)
			// Two connections of the time before, and two calls that are late.
			var conns [2]net.Conn
			for i := range conns {
				c := m.client()
				c.mount()
				conns[i], c.conn = c.conn, nil
				defer conns[i].Close()
			}
			late := [2][]byte{
				k.rec(600, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRemove), &nfs3.DirOpArgs{FH: dir, Name: []byte("kept")}),
				k.rec(601, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureWrite), &nfs3.WriteArgs{FH: fh, Count: 4, Data: []byte("late"), Stable: wire.FileSync}),
			}
			k.close()
			_, seq := m.a.events.Since(0)
			newer := client.Owner{VIP: was.Index, Epoch: was.Epoch + 1}
			if by == "target" {
				// As the next owner does it when it begins.
				if err := m.b.fs.RaiseEpoch(ctx, newer); err != nil {
					t.Fatal(err)
				}
			} else {
				l := []health.VIP{{Index: newer.VIP, Epoch: newer.Epoch}}
				m.b.cluster.vips.Store(&l)
				waitFenced(t, m.a, seq)
			}
			for i, conn := range conns {
				conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
				_, _ = conn.Write(late[i])
				// It may be torn down without a segment, so silence is right, too.
				if n, err := conn.Read(make([]byte, 1)); err == nil {
					t.Errorf("late call %d was answered (%d bytes)", i, n)
				} else if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Logf("late call %d: silence", i)
				}
			}
			waitFenced(t, m.a, seq)
			// That there is a newer owner the registry learns now.
			if v := m.vip(m.b); v.Node != "a" || v.Epoch != was.Epoch {
				t.Errorf("the registry knew: %+v", v)
			}
			m.takeFrom()
			m.arrived()
			if got := k.read(fh, 100); got != "first" {
				t.Errorf("the file has %q", got)
			}
			if !k.there(dir, "kept") {
				t.Error("a late REMOVE was executed")
			}
		})
	}
}

// waitFenced waits until a node has given the address up because it is superseded.
func waitFenced(t *testing.T, n *Node, seq uint64) {
	t.Helper()
	until(t, "the fence", func() bool {
		l, _ := n.events.Since(seq)
		for _, e := range l {
			if e.Kind == events.Move && e.Attrs["role"] == "release" && e.Attrs["outcome"] == "superseded" {
				return true
			}
		}
		return false
	})
}
