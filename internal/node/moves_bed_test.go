package node

import (
	"bytes"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/failover/events"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/sunrpc/rpctest"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// dialFrom connects from an address, or from any if it is not valid. As with a kernel's
// client the port may have been used just before.
func dialFrom(from, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return firstError(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), &err)
	}}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	conn, err := d.Dial("tcp", to.String())
	if err == nil {
		// Its end is a reset: nothing of it stays here.
		err = conn.(*net.TCPConn).SetLinger(0)
	}
	return conn, err
}

func firstError(err error, later *error) error {
	if err == nil {
		err = *later
	}
	return err
}

// moving is a cell whose address goes to and fro between two nodes.
type moving struct {
	*floatCell
	a, b *Node
	on   *Node // serves the address
}

func upMoving(t *testing.T) *moving {
	t.Helper()
	c, a, b := upFloating(t)
	return &moving{c, a, b, a}
}

func (m *moving) at() netip.AddrPort { return served(m.a, m.b) }

func (m *moving) other() *Node {
	if m.on == m.a {
		return m.b
	}
	return m.a
}

func (m *moving) client() *rpcClient {
	k := &rpcClient{t: m.t, at: m.at}
	m.t.Cleanup(k.close)
	return k
}

// arrived waits until the other node has the address.
func (m *moving) arrived() {
	m.t.Helper()
	from, to := m.on, m.other()
	m.become(to, vipagent.Serving)
	m.become(from, vipagent.Absent)
	m.on = to
	if o := m.net.Owners(floatAddr); len(o) != 1 || o[0] != to.cluster.name {
		m.t.Errorf("the address is at %v", o)
	}
	if len(from.serving()) != 1 { // the fixed one
		m.t.Errorf("%s still serves %d addresses", from.cluster.name, len(from.serving()))
	}
}

// move moves the address to the other node in order.
func (m *moving) move() {
	m.t.Helper()
	m.assign(m.a, m.other().cluster.name)
	m.arrived()
}

// crash has the other node take the address from one that is thought dead.
func (m *moving) crash() {
	m.t.Helper()
	cut := m.net.Machine(m.on.cluster.name)
	cut.Isolate(true)
	m.takeFrom()
	m.arrived()
	cut.Isolate(false)
}

// takeFrom gives the address of a node that is thought dead to the other one. Since it
// lives, it may be quicker to take the address anew than this is to assign it.
func (m *moving) takeFrom() {
	m.t.Helper()
	to := m.other()
	until(m.t, "the address to be assigned", func() bool {
		v := m.vip(to)
		if v.Node != "" && !v.Clean {
			if err := to.reg.Abandoned(ctx, v.Index, v.Epoch); err != nil {
				return false
			}
		}
		_, err := m.reg(to).Assign(ctx, v.Index, v.Epoch, to.cluster.name)
		return err == nil && m.vip(to).Next == to.cluster.name
	})
}

// ways are the ways in which an address moves.
func (m *moving) ways() []way {
	return []way{{"planned", false, m.move}, {"crash", true, m.crash}}
}

type way struct {
	name  string
	crash bool
	run   func()
}

// servers are those of the address.
func (m *moving) servers() []*sunrpc.Server {
	for _, u := range m.on.serving() {
		if u.Addr() == floatAddr {
			return u.Servers()
		}
	}
	return nil
}

// served tells how a client's connection is seen by the server, nil if it is not.
func (m *moving) seen(conn net.Conn) *sunrpc.ConnStats {
	me := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	for _, s := range m.servers() {
		for _, c := range s.Conns() {
			if c.Remote == me {
				return &c
			}
		}
	}
	return nil
}

// last gives the event by which the last move of the address ended at a node, as the
// one who gave it up or took it over.
func last(t *testing.T, n *Node, role string) events.Event {
	t.Helper()
	l, _ := n.events.Since(0)
	for i := len(l) - 1; i >= 0; i-- {
		if l[i].Kind == events.Move && l[i].Attrs["role"] == role && l[i].Attrs["outcome"] != "" {
			return l[i]
		}
	}
	t.Fatalf("%s has no move (%s) in its log", n.cluster.name, role)
	return events.Event{}
}

// answer sends a call and gives the result, undecoded.
func (c *rpcClient) answer(xid, prog, vers, proc uint32, args interface{ Encode(*xdr.Writer) }) []byte {
	c.t.Helper()
	return c.again(c.rec(xid, prog, vers, proc, args), xid)
}

// again makes a call, as often as it must, and returns the result.
func (c *rpcClient) again(rec []byte, xid uint32) []byte {
	c.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		out, err := c.once(rec, xid)
		if err == nil {
			return bytes.Clone(out)
		}
		c.close()
		if time.Now().After(end) {
			c.t.Fatalf("no answer: %v", err)
		}
	}
}

func (c *rpcClient) rec(xid, prog, vers, proc uint32, args interface{ Encode(*xdr.Writer) }) []byte {
	return rpctest.Call(xid, prog, vers, proc, args.Encode)
}

func (c *rpcClient) nfs(xid uint32, proc nfs.NFSProcedure, args interface{ Encode(*xdr.Writer) }, res interface{ Decode(*xdr.Reader) error }) {
	c.t.Helper()
	out := c.answer(xid, nfs3.Program, nfs3.Version, uint32(proc), args)
	if err := res.Decode(xdr.NewReader(out)); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rpcClient) next() uint32 {
	c.xid++
	return c.xid
}

func (c *rpcClient) read(fh []byte, n int) string {
	c.t.Helper()
	var res nfs3.ReadRes
	c.nfs(c.next(), nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: fh, Count: uint32(n)}, &res)
	if res.Status != nfs.NFSStatusOk {
		c.t.Fatal("read:", res.Status)
	}
	return string(res.Data)
}

func (c *rpcClient) writeAt(fh []byte, off uint64, data []byte, how wire.StableHow) [8]byte {
	c.t.Helper()
	var res nfs3.WriteRes
	c.nfs(c.next(), nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: fh, Offset: off, Count: uint32(len(data)), Data: data, Stable: how}, &res)
	if res.Status != nfs.NFSStatusOk || int(res.Count) != len(data) {
		c.t.Fatalf("write: %v, %d bytes", res.Status, res.Count)
	}
	return res.Verf
}

// there tells whether a directory has a name.
func (c *rpcClient) there(dir []byte, name string) bool {
	c.t.Helper()
	var res nfs3.LookupRes
	c.nfs(c.next(), nfs.NFSProcedureLookup, &nfs3.DirOpArgs{FH: dir, Name: []byte(name)}, &res)
	if res.Status != nfs.NFSStatusOk && res.Status != nfs.NFSStatusNoEnt {
		c.t.Fatal("lookup:", res.Status)
	}
	return res.Status == nfs.NFSStatusOk
}

// anything reads the next reply's result, to whatever call.
func (c *rpcClient) anything() ([]byte, error) {
	_, result, err := rpctest.Next(c.conn)
	return result, err
}
