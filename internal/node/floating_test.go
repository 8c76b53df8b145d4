package node

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/control/vipctl"
	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
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
		k.Manager.Mode = config.ManagerExternal
		k.Failover.StopWait = config.Duration(100 * time.Millisecond)
		// Other tests run beside this one: nothing is to be cut short because of them.
		k.Failover.DrainTimeout, k.Failover.CommitTimeout = config.Duration(patience/2), config.Duration(patience/2)
	}
	c.prepare = func(n *Node) { n.testNet = c.net.Machine(n.cfg.Cluster.Node) }
	t.Cleanup(func() {
		for _, v := range c.net.Violations() {
			t.Error(v)
		}
	})
	return c
}

// managed has the builtin manager decide who serves.
func (c *floatCell) managed() *floatCell {
	external := c.change
	c.change = func(k *config.Config) {
		external(k)
		k.Manager.Mode = config.ManagerBuiltin
	}
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

func superseded(err error) bool {
	var e *mgs.Error
	return errors.As(err, &e) && e.Code == mgs.CodeSuperseded
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
	sent int            // calls that were sent again
	from netip.AddrPort // of its connections, if valid
	wait time.Duration  // for a reply; default 300 ms
}

func (c *rpcClient) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// once sends a call and waits for its answer.
func (c *rpcClient) once(rec []byte, xid uint32) ([]byte, error) {
	if c.conn == nil {
		at := c.at()
		if !at.IsValid() {
			return nil, errors.New("nobody serves the address")
		}
		conn, err := dialFrom(c.from, at)
		if err != nil {
			return nil, err
		}
		c.conn = conn
	}
	// A connection that has vanished quietly says nothing: a real client is woken up by
	// the new owner's kernel, this one asks again.
	c.conn.SetDeadline(time.Now().Add(cmp.Or(c.wait, 300*time.Millisecond)))
	if _, err := c.conn.Write(rec); err != nil {
		return nil, err
	}
	return rpctest.Reply(c.conn, xid)
}

func (c *rpcClient) call(prog, vers, proc uint32, args func(*xdr.Writer), res interface{ Decode(*xdr.Reader) error }) {
	c.t.Helper()
	c.xid++
	rec := rpctest.Call(c.xid, prog, vers, proc, args)
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
	_, a, b = c.serving()
	return c, a, b
}

// serving starts everything and has a serve the address.
func (c *floatCell) serving() (n, a, b *Node) {
	c.t.Helper()
	n = c.up("c")
	a, b = c.up("a"), c.up("b")
	c.ready(a)
	c.ready(b)
	c.all(n)
	c.add(a)
	c.assign(a, "a")
	c.become(a, vipagent.Serving)
	return n, a, b
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

// An owner that is declared gone and lives gives the address up at once and answers
// nothing more. The next one acts as after a crash: unstable data are sent again, locks
// have to be confirmed, and a REMOVE that was executed is answered again, not executed
// again. 004.3, 004.24, 004.26, 004.31, 004.32.
func TestTakenOver(t *testing.T) {
	c, a, b := upFloating(t)
	k := &rpcClient{t: t, at: func() netip.AddrPort { return served(a, b) }}
	defer k.close()
	dir := k.mount()
	fh := k.make(dir, "kept")
	verf := k.write(fh, "unstable")
	k.make(dir, "gone")
	rec := k.rec(77<<16, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRemove), &nfs3.DirOpArgs{FH: dir, Name: []byte("gone")})
	status := func() nfs.NFSStatus {
		t.Helper()
		return nfs.NFSStatus(binary.BigEndian.Uint32(k.again(rec, 77<<16)))
	}
	if st := status(); st != nfs.NFSStatusOk {
		t.Fatal(st)
	}
	old := k.conn
	k.conn = nil
	defer old.Close()
	state := c.vip(a).NSMState
	c.net.Machine("a").Isolate(true) // else both have it on the network for a moment
	// It is still assigned to a, which may begin anew before b gets it.
	for {
		v := c.vip(b)
		if err := b.reg.Abandoned(ctx, v.Index, v.Epoch); err != nil && !superseded(err) {
			t.Fatal(err)
		}
		_, err := c.reg(b).Assign(ctx, v.Index, v.Epoch, "b")
		if err == nil {
			break
		}
		if !superseded(err) {
			t.Fatal(err)
		}
	}
	c.become(b, vipagent.Serving)
	c.become(a, vipagent.Absent)
	old.SetDeadline(time.Now().Add(patience))
	if n, err := old.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the old connection lives: %d bytes, %v", n, err)
	}
	if st := status(); st != nfs.NFSStatusOk {
		t.Errorf("the REMOVE that was sent again: %v", st)
	}
	if v := c.vip(a); v.NSMState < state+2 || v.NSMState%2 == 0 || v.Node != "b" {
		t.Errorf("%+v, the NSM state was %d", v, state)
	}
	if k.commit(fh) == verf {
		t.Error("the write verifier is the old one")
	}
	if o := c.net.Owners(floatAddr); len(o) != 1 || o[0] != "b" {
		t.Errorf("the address is at %v", o)
	}
}

// What is served goes on without the registry; what was given up meanwhile is told when
// it is back.
func TestFloatingWithoutRegistry(t *testing.T) {
	c, a, b := upFloating(t)
	k := &rpcClient{t: t, at: func() netip.AddrPort { return served(a, b) }}
	defer k.close()
	dir := k.mount()
	if err := c.nodes["c"].StopTarget(ctx, "MGS"); err != nil {
		t.Fatal(err)
	}
	k.make(dir, "f")
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := a.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish})
	if err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	if o := c.net.Owners(floatAddr); len(o) != 0 {
		t.Errorf("the address is at %v", o)
	}
	if err := c.nodes["c"].StartTarget(ctx, "MGS", ""); err != nil {
		t.Fatal(err)
	}
	until(t, "the registry to know", func() bool { v := c.vip(b); return v.Free() })
	if v := c.vip(b); !v.Clean && v.Node != "" {
		t.Errorf("%+v", v)
	}
	c.assign(b, "b")
	c.become(b, vipagent.Serving)
	k.make(dir, "g")
}

// A start takes away what an earlier process has left on the machine, and serves again
// what the registry gives to it, as after a crash.
func TestRestartCleansUp(t *testing.T) {
	c := newFloatCell(t)
	left := netip.MustParseAddr("127.0.9.7")
	c.net.Machine("a").Give(vip.Address{Prefix: netip.PrefixFrom(left, 32), Interface: "lo"})
	if err := c.net.Machine("a").Add(ctx, vip.Address{Prefix: netip.PrefixFrom(floatAddr, 32), Interface: "lo"}); err != nil {
		t.Fatal(err)
	}
	a := c.up("a")
	if o := c.net.Owners(floatAddr); len(o) != 0 {
		t.Errorf("the address is at %v", o)
	}
	if o := c.net.Owners(left); len(o) != 1 {
		t.Errorf("an address that no baton has added is at %v", o)
	}
	c.up("c")
	c.ready(a)
	c.all(c.nodes["c"])
	c.add(a)
	c.assign(a, "a")
	c.become(a, vipagent.Serving)
	epoch := c.vip(a).Epoch
	c.down("a", a)
	a = c.up("a")
	c.become(a, vipagent.Serving)
	if v := c.vip(a); v.Epoch != epoch+1 || v.NSMState != 1 {
		t.Errorf("after an orderly restart: %+v", v)
	}
}

// A machine that cannot get rid of the address is silent there, says so, and nobody else
// gets the address until it has gone.
func TestStuckAddressIsSilent(t *testing.T) {
	c, a, b := upFloating(t)
	at := served(a)
	machine := c.net.Machine("a")
	machine.Fail(viptest.Remove, errors.New("the kernel refuses"), 1<<20)
	c.assign(a, "b")
	c.become(a, vipagent.Failed)
	c.become(b, vipagent.Listening)
	d := net.Dialer{Timeout: 200 * time.Millisecond}
	conn, err := d.Dial("tcp", at.String())
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		if err == nil {
			conn.Close()
		}
		t.Errorf("a connection to the address: %v, want a time-out", err)
	}
	if l, err := a.ListVIPs(ctx); err != nil || !strings.Contains(l[0].Floating.Local.Reason, "ip addr del 127.0.9.1/32 dev lo") {
		t.Errorf("%+v, %v", l, err)
	}
	if r := a.reportAddresses(); len(r) != 1 || !r[0].Stuck || !r[0].Silent {
		t.Errorf("the manager is told %+v", r)
	}
	if s := addressState(b); s != vipagent.Listening {
		t.Errorf("the next owner is %s", s)
	}
	machine.On(viptest.Remove, nil)
	c.become(b, vipagent.Serving)
	c.become(a, vipagent.Absent)
	until(t, "the ports to be closed", func() bool {
		conn, err := d.Dial("tcp", at.String())
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

// A node that serves no floating addresses any more takes away those that it had added
// before it crashed, and no others.
func TestFloatingSwitchedOff(t *testing.T) {
	network := viptest.NewNetwork()
	add := func(s string) netip.Addr {
		p := netip.MustParsePrefix(s)
		if err := network.Machine("a").Add(ctx, vip.Address{Prefix: p, Interface: "lo"}); err != nil {
			t.Fatal(err)
		}
		return p.Addr()
	}
	left, others := add("127.0.9.7/32"), add("127.0.9.8/32")
	k := conf(t, t.TempDir())
	if err := os.MkdirAll(k.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(k.DataDir, addedFile)
	if err := os.WriteFile(record, []byte("127.0.9.7 lo\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func() {
		t.Helper()
		n, err := New(k, nil)
		if err != nil {
			t.Fatal(err)
		}
		n.testNet = network.Machine("a")
		if err := n.Start(ctx); err != nil {
			t.Fatal(err)
		}
		stop(t, n)
	}
	run()
	if o := network.Owners(left); len(o) != 0 {
		t.Errorf("what it had added is at %v", o)
	}
	// From now on it is somebody else's, as the other one has been all the time.
	add("127.0.9.7/32")
	run()
	for _, a := range []netip.Addr{left, others} {
		if o := network.Owners(a); len(o) != 1 {
			t.Errorf("%s, which it has not added, is at %v", a, o)
		}
	}
}

// An address that is removed is given up and forgotten.
func TestRemoval(t *testing.T) {
	c, a, _ := upFloating(t)
	v := c.vip(a)
	if _, err := c.reg(a).RemoveVIP(ctx, v.Index); err != nil {
		t.Fatal(err)
	}
	until(t, "the address to be forgotten", func() bool { return addressState(a) == "" && c.vip(a).Bits == 0 })
	if o := c.net.Owners(floatAddr); len(o) != 0 {
		t.Errorf("the address is at %v", o)
	}
	if !c.vip(a).Clean {
		t.Error("not given up in order")
	}
	// The same again: epochs do not go back.
	c.add(a)
	c.assign(a, "b")
	c.become(c.nodes["b"], vipagent.Serving)
	if n := c.vip(a); n.Epoch != v.Epoch+1 || n.Index != v.Index {
		t.Errorf("%+v after %+v", n, v)
	}
}

// The commands for hooks can be given again and at the same time; the last one counts.
func TestHookCommands(t *testing.T) {
	c, a, b := upFloating(t)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	take := vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageServe}
	release := vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish}
	if r, err := a.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	for range 2 {
		if r, err := a.ReleaseVIP(ctx, release); err != nil || r.State != vipctl.Absent {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if r, err := a.CheckVIP(ctx, vipctl.CheckArgs{Addr: floatAddr}); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			n := []*Node{a, b}[i%2]
			if i%3 == 0 {
				_, _ = n.ReleaseVIP(ctx, release) // broken off or not
			} else {
				_, _ = n.TakeVIP(ctx, take)
			}
		})
	}
	wg.Wait()
	if r, err := b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	if o := c.net.Owners(floatAddr); len(o) != 1 || o[0] != "b" {
		t.Errorf("the address is at %v", o)
	}
	if r, err := b.ReleaseVIP(ctx, release); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, _ := a.CheckVIP(ctx, vipctl.CheckArgs{Addr: netip.MustParseAddr("127.0.9.9")}); r.State != vipctl.Unknown {
		t.Errorf("%+v", r)
	}
	if _, err := a.TakeVIP(ctx, vipctl.TakeArgs{Addr: netip.MustParseAddr("127.0.9.9"), Stage: vipctl.StageServe}); err == nil {
		t.Error("an address was taken that is none")
	}
}

// A cluster manager chooses among nodes that could serve an address. A node that stops
// says so, and that it takes and serves none.
func TestReadyForAddresses(t *testing.T) {
	c, _, b := upFloating(t)
	if err := c.nodes["c"].ReadyVIP(ctx); err == nil {
		t.Error("a node without floating addresses is ready for them")
	}
	until(t, "b to be ready", func() bool { return b.ReadyVIP(ctx) == nil })
	if err := c.nodes["c"].StopTarget(ctx, mdtName); err != nil {
		t.Fatal(err)
	}
	says := func(text string) func() bool {
		return func() bool {
			err := b.ReadyVIP(ctx)
			return err != nil && strings.Contains(err.Error(), text)
		}
	}
	until(t, "b not to be ready", says("the metadata target (MDT0000) does not answer it"))
	if err := c.nodes["c"].StartTarget(ctx, mdtName, ""); err != nil {
		t.Fatal(err)
	}
	until(t, "b to be ready again", func() bool { return b.ReadyVIP(ctx) == nil })
	c.down("b", b)
	if !says("stops")() {
		t.Errorf("after the stop: %v", b.ReadyVIP(ctx))
	}
	if _, err := b.TakeVIP(ctx, vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageServe}); !errors.Is(err, errStops) {
		t.Errorf("take: %v", err)
	}
	if r, err := b.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish}); err != nil || !strings.Contains(r.Text, "it stops") {
		t.Errorf("release: %+v, %v", r, err)
	}
}

// A cluster manager adds and removes the address itself.
func TestGivenAddress(t *testing.T) {
	c, a, b := upFloating(t)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	at := vip.Address{Prefix: netip.PrefixFrom(floatAddr, 32), Interface: "lo"}
	r, err := a.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish})
	if err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	take := vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageListen, Given: true}
	if r, err = b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Listening {
		t.Fatalf("%+v, %v", r, err)
	}
	if v := c.vip(a); !v.Free() {
		t.Errorf("it is served before the address is there: %+v", v)
	}
	c.net.Machine("b").Give(at)
	take.Stage = vipctl.StageServe
	if r, err = b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	k := &rpcClient{t: t, at: func() netip.AddrPort { return served(a, b) }}
	defer k.close()
	k.make(k.mount(), "f")
	port := served(b)
	give := vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageDrain, Given: true}
	for range 2 {
		if r, err = b.ReleaseVIP(ctx, give); err != nil || r.State != vipctl.Releasing {
			t.Fatalf("%+v, %v", r, err)
		}
		if r, err = b.CheckVIP(ctx, vipctl.CheckArgs{Addr: floatAddr}); err != nil || r.State != vipctl.Releasing {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if o := c.net.Owners(floatAddr); len(o) != 1 || o[0] != "b" {
		t.Errorf("the address is at %v, though the cluster manager removes it", o)
	}
	if !c.vip(a).Clean {
		t.Error("drained, and the registry does not know")
	}
	// New connections are held, not refused.
	if conn, err := net.DialTimeout("tcp", port.String(), 200*time.Millisecond); err == nil {
		conn.Close()
		t.Error("connected to an address that is drained")
	} else if !errors.Is(err, os.ErrDeadlineExceeded) && !strings.Contains(err.Error(), "timeout") {
		t.Error(err)
	}
	give.Stage = vipctl.StageFinish
	if r, err = b.ReleaseVIP(ctx, give); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	until(t, "the ports to be closed", func() bool {
		conn, err := net.DialTimeout("tcp", port.String(), 200*time.Millisecond)
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

// A process that is started anew leaves an address to the cluster manager that has given
// it to the last one.
func TestGivenAddressAfterRestart(t *testing.T) {
	c, a, b := upFloating(t)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	at := vip.Address{Prefix: netip.PrefixFrom(floatAddr, 32), Interface: "lo"}
	if r, err := a.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish}); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	c.net.Machine("b").Give(at)
	take := vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageServe, Given: true}
	if r, err := b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	before := c.vip(a)
	changed := func() (ops []string) {
		for _, o := range c.net.Log() {
			if o.Machine == "b" && (o.Kind == viptest.Add || o.Kind == viptest.Remove) {
				ops = append(ops, o.String())
			}
		}
		return ops
	}
	// It is there: it is served again, and stays when the process ends.
	c.down("b", b)
	b = c.up("b")
	c.become(b, vipagent.Serving)
	if v := c.vip(a); v.Epoch <= before.Epoch || v.Node != "b" {
		t.Errorf("%+v after %+v", v, before)
	}
	c.down("b", b)
	if o := c.net.Owners(floatAddr); len(o) != 1 || o[0] != "b" {
		t.Errorf("the address is at %v, though the cluster manager removes it", o)
	}
	// It is not there: the manager says when it is.
	if err := c.net.Machine("b").Remove(ctx, at); err != nil {
		t.Fatal(err)
	}
	by := len(changed())
	b = c.up("b")
	c.become(b, vipagent.Listening)
	if r, err := b.TakeVIP(ctx, vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageListen, Given: true}); err != nil || r.State != vipctl.Listening {
		t.Fatalf("%+v, %v", r, err)
	}
	c.net.Machine("b").Give(at)
	if r, err := b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err := b.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish, Given: true}); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	if ops := changed(); len(ops) != by {
		t.Errorf("b did %q", ops)
	}
	// The node's own again.
	if err := c.net.Machine("b").Remove(ctx, at); err != nil {
		t.Fatal(err)
	}
	if r, err := b.TakeVIP(ctx, vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageServe}); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	c.down("b", b)
	if o := c.net.Owners(floatAddr); len(o) != 0 {
		t.Errorf("the address is at %v", o)
	}
}

// A node that ends does not wait for a cluster manager that has not come back to finish
// what it began.
func TestGivenAddressDrainedAtStop(t *testing.T) {
	c, a, b := upFloating(t)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if r, err := a.ReleaseVIP(ctx, vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageFinish}); err != nil || r.State != vipctl.Absent {
		t.Fatalf("%+v, %v", r, err)
	}
	c.net.Machine("b").Give(vip.Address{Prefix: netip.PrefixFrom(floatAddr, 32), Interface: "lo"})
	take := vipctl.TakeArgs{Addr: floatAddr, Stage: vipctl.StageServe, Given: true}
	give := vipctl.ReleaseArgs{Addr: floatAddr, Stage: vipctl.StageDrain, Given: true}
	if r, err := b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	// Drained twice, and taken again: the second order is over, too.
	for range 2 {
		if r, err := b.ReleaseVIP(ctx, give); err != nil || r.State != vipctl.Releasing {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if r, err := b.TakeVIP(ctx, take); err != nil || r.State != vipctl.Serving {
		t.Fatalf("%+v, %v", r, err)
	}
	c.down("b", b)
	if !c.vip(a).Clean {
		t.Error("not given up in order")
	}
}
