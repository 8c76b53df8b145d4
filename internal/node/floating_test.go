package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/vip"
	"github.com/baton-nfs/baton/vip/viptest"
)

// floatCell is a cell whose frontends a and b serve floating addresses on a network
// without a kernel. The addresses are of 127.0.0.0/8, where everything is local, so the
// listeners are real; each node has ports of its own.
type floatCell struct {
	*cell
	net *viptest.Network
}

func newFloatCell(t *testing.T) *floatCell {
	c := &floatCell{cell: newCell(t), net: viptest.NewNetwork()}
	c.start = map[string][]string{"c": {"MGS", mdtName, ostName(0), ostName(1)}}
	c.change = func(k *config.Config) {
		k.NFS.Floating = k.Cluster.Node != "c"
		k.Failover.StopWait = config.Duration(100 * time.Millisecond)
	}
	c.prepare = func(n *Node) { n.testNet = c.net.Machine(n.cfg.Cluster.Node) }
	t.Cleanup(func() {
		for _, v := range c.net.Violations() {
			t.Error(v)
		}
	})
	return c
}

var floatAddr = netip.MustParseAddr("127.0.9.1")

func (c *floatCell) reg(n *Node) mgs.Floating { return n.cluster.reg }

// add enters the floating address.
func (c *floatCell) add(n *Node) mgs.VIP {
	c.t.Helper()
	v, err := c.reg(n).AddVIP(ctx, mgs.VIPSpec{Addr: floatAddr, Bits: 32, Interface: "lo"})
	if err != nil {
		c.t.Fatal(err)
	}
	return v
}

func (c *floatCell) vip(n *Node) mgs.VIP {
	c.t.Helper()
	for _, v := range vips(c.t, n.reg) {
		if v.Addr == floatAddr {
			return v
		}
	}
	c.t.Fatal("the address is not in the registry")
	return mgs.VIP{}
}

func (c *floatCell) assign(n *Node, to string) {
	c.t.Helper()
	v := c.vip(n)
	if _, err := c.reg(n).Assign(ctx, v.Index, v.Epoch, to); err != nil {
		c.t.Fatal(err)
	}
}

func (c *floatCell) abandon(n *Node) {
	c.t.Helper()
	v := c.vip(n)
	if err := n.reg.Abandoned(ctx, v.Index, v.Epoch); err != nil {
		c.t.Fatal(err)
	}
}

func addressState(n *Node) vipagent.State {
	for _, r := range n.AddressReports() {
		if r.Addr == floatAddr {
			return r.State
		}
	}
	return ""
}

// become waits until the address is so at a node.
func (c *floatCell) become(n *Node, s vipagent.State) {
	c.t.Helper()
	until(c.t, fmt.Sprintf("the address to be %s at %s", s, n.cluster.name), func() bool { return addressState(n) == s })
}

// served is where the address is served, of those given.
func served(l ...*Node) netip.AddrPort {
	for _, n := range l {
		if addressState(n) != vipagent.Serving {
			continue
		}
		for _, u := range n.serving() {
			for ap, name := range u.Ports() {
				if u.Addr() == floatAddr && name == "nfs" {
					return ap
				}
			}
		}
	}
	return netip.AddrPort{}
}

// rpcClient is an NFS client that sends a call again, with its XID, by a new connection
// when the old one has ended.
type rpcClient struct {
	t    *testing.T
	at   func() netip.AddrPort // where the address is now
	conn net.Conn
	xid  uint32
	sent int // calls that were sent again
}

func (c *rpcClient) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

func record(xid, prog, vers, proc uint32, args []byte) []byte {
	var w xdr.Writer
	// AUTH_SYS as root, without a machine's name and groups.
	for _, v := range []uint32{0, xid, 0, 2, prog, vers, proc, 1, 20, 0, 0, 0, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	b := append(w.Buf, args...)
	binary.BigEndian.PutUint32(b, 1<<31|uint32(len(b)-4))
	return b
}

// once sends a call and waits for its answer.
func (c *rpcClient) once(rec []byte, xid uint32) ([]byte, error) {
	if c.conn == nil {
		at := c.at()
		if !at.IsValid() {
			return nil, errors.New("nobody serves the address")
		}
		conn, err := net.DialTimeout("tcp", at.String(), time.Second)
		if err != nil {
			return nil, err
		}
		c.conn = conn
	}
	// A connection that has vanished quietly says nothing: a real client is woken up by
	// the new owner's kernel, this one asks again.
	c.conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.conn.Write(rec); err != nil {
		return nil, err
	}
	for {
		var mark [4]byte
		if _, err := io.ReadFull(c.conn, mark[:]); err != nil {
			return nil, err
		}
		b := make([]byte, binary.BigEndian.Uint32(mark[:])&^(1<<31))
		if _, err := io.ReadFull(c.conn, b); err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint32(b) == xid {
			if len(b) < 24 || binary.BigEndian.Uint32(b[8:]) != 0 || binary.BigEndian.Uint32(b[20:]) != 0 {
				return nil, fmt.Errorf("refused: %x", b)
			}
			return b[24:], nil
		}
	}
}

func (c *rpcClient) call(prog, vers, proc uint32, args func(*xdr.Writer), res interface{ Decode(*xdr.Reader) error }) {
	c.t.Helper()
	c.xid++
	var w xdr.Writer
	args(&w)
	rec := record(c.xid, prog, vers, proc, w.Buf)
	for end := time.Now().Add(patience); ; {
		out, err := c.once(rec, c.xid)
		if err == nil {
			if err := res.Decode(xdr.NewReader(bytes.Clone(out))); err != nil {
				c.t.Fatal(err)
			}
			return
		}
		c.close()
		c.sent++
		if time.Now().After(end) {
			c.t.Fatalf("no answer: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
}

func (c *rpcClient) mount() []byte {
	c.t.Helper()
	var res mount3.MntRes
	c.call(mount3.Program, mount3.Version, uint32(nfs.MountProcMount), func(w *xdr.Writer) { mount3.EncodePath(w, "/data") }, &res)
	if res.Status != nfs.MountStatusOk {
		c.t.Fatal("mount:", res.Status)
	}
	return bytes.Clone(res.FH)
}

// create makes a file, which must not be there.
func (c *rpcClient) create(dir []byte, name string) (nfs.NFSStatus, []byte) {
	c.t.Helper()
	var res nfs3.CreateRes
	c.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCreate), (&nfs3.CreateArgs{FH: dir, Name: []byte(name), How: wire.Guarded}).Encode, &res)
	return res.Status, bytes.Clone(res.FH)
}

// make is create of a file that is needed.
func (c *rpcClient) make(dir []byte, name string) []byte {
	c.t.Helper()
	st, fh := c.create(dir, name)
	if st != nfs.NFSStatusOk {
		c.t.Fatalf("create %s: %v", name, st)
	}
	return fh
}

func (c *rpcClient) remove(dir []byte, name string) nfs.NFSStatus {
	c.t.Helper()
	var res nfs3.WccRes
	c.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRemove), (&nfs3.DirOpArgs{FH: dir, Name: []byte(name)}).Encode, &res)
	return res.Status
}

func (c *rpcClient) write(fh []byte, data string) (verf [8]byte) {
	c.t.Helper()
	var res nfs3.WriteRes
	c.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureWrite), (&nfs3.WriteArgs{FH: fh, Count: uint32(len(data)), Data: []byte(data)}).Encode, &res)
	if res.Status != nfs.NFSStatusOk {
		c.t.Fatal("write:", res.Status)
	}
	return res.Verf
}

func (c *rpcClient) commit(fh []byte) (verf [8]byte) {
	c.t.Helper()
	var res nfs3.CommitRes
	c.call(nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCommit), (&nfs3.CommitArgs{FH: fh}).Encode, &res)
	if res.Status != nfs.NFSStatusOk {
		c.t.Fatal("commit:", res.Status)
	}
	return res.Verf
}

// upFloating starts everything and has a serve the address.
func upFloating(t *testing.T) (c *floatCell, a, b *Node) {
	t.Helper()
	c = newFloatCell(t)
	c.up("c")
	a, b = c.up("a"), c.up("b")
	c.ready(a)
	c.ready(b)
	c.all(c.nodes["c"])
	c.add(a)
	c.assign(a, "a")
	c.become(a, vipagent.Serving)
	return c, a, b
}

// Calls that go on while an address moves to and fro are all executed once and
// answered, unstable data and the write verifier move with it. 004.24, 004.31, 004.32.
func TestMoveUnderLoad(t *testing.T) {
	c, a, b := upFloating(t)
	at := func() netip.AddrPort { return served(a, b) }
	main := &rpcClient{t: t, at: at}
	defer main.close()
	dir := main.mount()
	fh := main.make(dir, "kept")
	verf := main.write(fh, "unstable")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var sent, made [4]int
	for i := range 4 {
		wg.Go(func() {
			k := &rpcClient{t: t, at: at, xid: uint32(i+1) << 16}
			defer k.close()
			for n := 0; ; n++ {
				select {
				case <-stop:
					sent[i] = k.sent
					return
				default:
				}
				name := fmt.Sprintf("f%d-%d", i, n)
				if st, _ := k.create(dir, name); st != nfs.NFSStatusOk {
					t.Errorf("create %s: %v", name, st)
				}
				if st := k.remove(dir, name); st != nfs.NFSStatusOk {
					t.Errorf("remove %s: %v", name, st)
				}
				made[i]++
			}
		})
	}
	epoch := c.vip(a).Epoch
	for i, to := range []*Node{b, a, b} {
		c.assign(a, to.cluster.name)
		c.become(to, vipagent.Serving)
		from := a
		if to == a {
			from = b
		}
		c.become(from, vipagent.Absent)
		if o := c.net.Owners(floatAddr); len(o) != 1 || o[0] != to.cluster.name {
			t.Errorf("the address is at %v", o)
		}
		if v := c.vip(a); v.Epoch != epoch+uint64(i)+1 || v.Node != to.cluster.name || v.Clean {
			t.Errorf("move %d: %+v", i, v)
		}
		if len(from.serving()) != 1 || len(to.serving()) != 2 { // with the fixed one
			t.Errorf("units: %d and %d", len(from.serving()), len(to.serving()))
		}
	}
	close(stop)
	wg.Wait()
	if v := main.commit(fh); v != verf {
		t.Error("the write verifier has changed")
	}
	if v := c.vip(a); v.NSMState != 1 {
		t.Errorf("NSM state %d", v.NSMState)
	}
	t.Logf("made %v, sent again %v", made, sent)
	if slices.Max(made[:]) == 0 {
		t.Error("nothing was made")
	}
	// The clients were woken up by the new owners.
	if len(c.net.Machine("b").Tickled()) == 0 {
		t.Error("nobody was tickled")
	}
}

// prepareFor is for the network of a node that is killed.
var _ = context.Background
var _ vip.Net = (*viptest.Net)(nil)
