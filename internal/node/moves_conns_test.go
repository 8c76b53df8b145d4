package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"
	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/rpcbind"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/statd/nsm"
	"github.com/baton-nfs/baton/vip/viptest"
)

// Kinds of connections that a move finds.
const (
	idle = iota
	midRecord
	unacked // the reply is in the kernel, since the client's window is closed
	unsent  // replies wait in the process, since the kernel takes no more
	kinds
)

var kindNames = [kinds]string{"idle", "mid-record", "reply unacknowledged", "replies unsent"}

// slowReader connects with a window so small that a reply does not fit.
func slowReader(to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return firstError(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) }), &err)
	}}
	conn, err := d.Dial("tcp", to.String())
	if err == nil {
		err = conn.(*net.TCPConn).SetLinger(0)
	}
	return conn, err
}

// held is a connection in the state in which a move finds it.
type held struct {
	kind   int
	conn   net.Conn
	rec    []byte // of midRecord: the whole call
	xid    uint32
	expect int // replies that are due
}

const readSize = 64 << 10

// hold brings a connection to its state. Every connection has made a call before.
func (m *moving) hold(kind int, dir, fh []byte, name string) *held {
	t := m.t
	h := &held{kind: kind, xid: 1}
	conn, err := slowReader(m.at())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	h.conn = conn
	k := &rpcClient{t: t, conn: conn, wait: patience}
	send := func(b []byte) {
		t.Helper()
		conn.SetWriteDeadline(time.Now().Add(patience))
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.once(k.rec(h.xid, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureGetAttr), &nfs3.FHArgs{FH: dir}), h.xid); err != nil {
		t.Fatal(err)
	}
	read := func() []byte {
		h.xid++
		h.expect++
		return k.rec(h.xid, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureRead), &nfs3.ReadArgs{FH: fh, Count: readSize})
	}
	switch kind {
	case midRecord:
		h.xid++
		h.rec = k.rec(h.xid, nfs3.Program, nfs3.Version, uint32(nfs.NFSProcedureCreate), &nfs3.CreateArgs{FH: dir, Name: []byte(name), How: wire.Guarded})
		send(h.rec[:len(h.rec)/2])
	case unacked:
		send(read())
		until(t, "the reply to be with the kernel", func() bool {
			s := m.seen(conn)
			return s != nil && s.Inflight == 0 && s.Replies == 2
		})
	case unsent:
		for range 160 { // 10 MiB, more than a socket takes
			send(read())
		}
		until(t, "replies to wait", func() bool { s := m.seen(conn); return s != nil && s.Replies > 2 })
	}
	return h
}

// collect reads what is due on the connection, which ends whole.
func (h *held) collect(t *testing.T) {
	t.Helper()
	h.conn.SetReadDeadline(time.Now().Add(patience))
	k := &rpcClient{t: t, conn: h.conn}
	for i := range h.expect {
		out, err := k.anything()
		if err != nil {
			t.Errorf("%s: reply %d of %d: %v", kindNames[h.kind], i, h.expect, err)
			return
		}
		if len(out) < readSize || out[0]|out[1]|out[2]|out[3] != 0 {
			t.Errorf("%s: reply %d has %d bytes, status %x", kindNames[h.kind], i, len(out), out[:4])
		}
	}
}

// silent looks whether anything of the peer's end is in the kernel: on loopback it would
// be there by the time the peer has closed its socket.
func silent(conn net.Conn) error {
	if os.Geteuid() != 0 {
		return nil // without CAP_NET_ADMIN connections are reset instead
	}
	rc, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) {
		var n int
		n, _, err = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err == nil && n == 0 {
			err = io.EOF
		}
	})
	if errors.Is(err, unix.EAGAIN) {
		err = nil
	}
	return firstError(cerr, &err)
}

// A planned move with no, one and many connections, idle, in the middle of a record,
// with a reply that is unsent or not acknowledged: what was asked is answered before the
// end, what was not is not begun, and all are woken up by the next owner. own 1;
// 004.14 to 004.19, 004.28.
func TestMoveWithConnections(t *testing.T) {
	m := upMoving(t)
	k := m.client()
	dir := k.mount()
	fh := k.make(dir, "data")
	k.writeAt(fh, 0, bytes.Repeat([]byte{'x'}, readSize), wire.FileSync)
	k.close()
	many := []int{unsent}
	for i := range 63 {
		many = append(many, i%unsent)
	}
	for i, c := range [][]int{{}, {idle}, {midRecord}, {unacked}, {unsent}, many} {
		t.Run(fmt.Sprintf("%d connections %d", len(c), i), func(t *testing.T) {
			m.t, k.t = t, t
			var l []*held
			for j, kind := range c {
				l = append(l, m.hold(kind, dir, fh, fmt.Sprintf("mid-%d-%d", i, j)))
			}
			from, to := m.on, m.other()
			m.assign(m.a, to.cluster.name)
			if len(c) > 0 {
				until(t, "the drain", func() bool { s := addressState(from); return s == vipagent.Releasing || s == vipagent.Absent })
			}
			for _, h := range l {
				h.collect(t)
			}
			m.arrived()
			e := last(t, from, "release")
			if e.Attrs["outcome"] != "clean" || e.Int("left") != 0 {
				t.Errorf("%+v", e)
			}
			for _, h := range l {
				if err := silent(h.conn); err != nil {
					t.Errorf("%s: the last owner has ended the connection with a segment: %v", kindNames[h.kind], err)
				}
				me := h.conn.LocalAddr().(*net.TCPAddr).AddrPort()
				woken := false
				for _, c := range m.net.Machine(to.cluster.name).Tickled() {
					woken = woken || c.Remote == me
				}
				if !woken {
					t.Errorf("%s: %v was not woken up", kindNames[h.kind], me)
				}
				if h.kind != midRecord {
					continue
				}
				name := h.rec[len(h.rec)-32:]
				if out := k.again(h.rec, h.xid); !bytes.Equal(out[:4], make([]byte, 4)) {
					t.Errorf("the call that had arrived in part: %x (%x)", out, name)
				}
			}
			k.close()
		})
	}
}

// A client that reads nothing, and one that stopped in the middle of a record, hold a
// move no longer than the drain may take, and the end is orderly for all others. own 17;
// 004.22.
func TestClientThatDoesNotRead(t *testing.T) {
	m := &moving{floatCell: newFloatCell(t)}
	plain := m.change
	m.change = func(k *config.Config) {
		plain(k)
		k.Failover.DrainTimeout = config.Duration(200 * time.Millisecond)
	}
	m.begin()
	k := m.client()
	dir := k.mount()
	fh := k.make(dir, "data")
	k.writeAt(fh, 0, bytes.Repeat([]byte{'x'}, readSize), wire.FileSync)
	other := k.make(dir, "unstable")
	verf := k.write(other, "unstable")
	m.hold(unsent, dir, fh, "")
	m.hold(midRecord, dir, fh, "never")
	from := m.on
	m.move()
	if e := last(t, from, "release"); e.Attrs["outcome"] != "clean" || e.Int("left") != 1 {
		t.Errorf("%+v", e)
	}
	if k.commit(other) != verf {
		t.Error("the write verifier has changed")
	}
	if k.there(dir, "never") {
		t.Error("half a call was executed")
	}
}

// begin starts everything and has a serve the address.
func (m *moving) begin() {
	m.t.Helper()
	m.up("c")
	m.a, m.b = m.up("a"), m.up("b")
	m.ready(m.a)
	m.ready(m.b)
	m.all(m.nodes["c"])
	m.add(m.a)
	m.assign(m.a, "a")
	m.become(m.a, vipagent.Serving)
	m.on = m.a
}

func portOf(t *testing.T) int {
	t.Helper()
	return int(netip.MustParseAddrPort(freePort(t)).Port())
}

// The address goes to and fro at once and again and again, and its client keeps its
// port: so each time it comes back with a connection that this node had before. A move
// that is called off before it is through ends where it should, too. own 2; 004.8, 004.25.
func TestMoveToAndBack(t *testing.T) {
	m := &moving{floatCell: newFloatCell(t)}
	plain, ports := m.change, map[string]int{"a": portOf(t), "b": portOf(t), "c": 0}
	m.change = func(k *config.Config) {
		plain(k)
		k.NFS.Port = ports[k.Cluster.Node]
	}
	m.begin()
	k := m.client()
	k.from = netip.MustParseAddrPort("127.0.7.3:20001")
	dir := k.mount()
	for i := range 12 {
		if i%4 == 3 {
			m.crash()
		} else {
			m.move()
		}
		name := fmt.Sprintf("f%d", i)
		k.make(dir, name)
		if k.conn.LocalAddr().String() != k.from.String() {
			t.Fatalf("connected from %v", k.conn.LocalAddr())
		}
		if st := k.remove(dir, name); st != nfs.NFSStatusOk {
			t.Error(name, st)
		}
	}
	for i := range 6 {
		m.wish(m.other())
		m.wish(m.on)
		if i%2 == 0 {
			continue // without waiting
		}
		m.become(m.on, vipagent.Serving)
		m.become(m.other(), vipagent.Absent)
		k.make(dir, fmt.Sprintf("g%d", i))
	}
	if v := m.vip(m.a); v.Node != m.on.cluster.name {
		t.Errorf("%+v", v)
	}
}

// wish assigns the address, which may be moving just now.
func (m *moving) wish(to *Node) {
	m.t.Helper()
	until(m.t, "the address to be assigned", func() bool {
		v := m.vip(m.a)
		_, err := m.reg(m.a).Assign(ctx, v.Index, v.Epoch, to.cluster.name)
		return err == nil
	})
}

// An announcement that nobody hears is made again, and so is a tickle; a client that comes
// by itself before is served. own 16.
func TestLostAnnouncement(t *testing.T) {
	m := upMoving(t)
	k := m.client()
	dir := k.mount()
	to := m.other()
	net := m.net.Machine(to.cluster.name)
	net.Fail(viptest.Tickle, errors.New("lost"), 1)
	first := true
	net.On(viptest.Announce, func(context.Context, netip.Addr) error {
		net.Isolate(first) // the first one reaches nobody
		first = false
		return nil
	})
	m.move()
	k.make(dir, "f") // comes by itself
	until(t, "the second announcement", func() bool { return m.net.Reaches(floatAddr) == to.cluster.name })
	if e := last(t, to, "take"); e.Attrs["outcome"] != "serving" {
		t.Errorf("%+v", e)
	}
	until(t, "the tickle to be sent again", func() bool { return len(net.Tickled()) > 0 })
}

// Every program answers on the address by every transport before the machine has the
// address: no SYN can meet a closed port. The old owner's goes first, and a client is
// woken up last. own 18; 004.10, 004.13, 004.20, 004.21.
func TestEverythingAnswersFirst(t *testing.T) {
	m := &moving{floatCell: newFloatCell(t)}
	plain := m.change
	ports := map[string][]int{}
	for _, n := range []string{"a", "b", "c"} {
		ports[n] = []int{portOf(t), portOf(t)}
	}
	m.change = func(k *config.Config) {
		plain(k)
		k.NFS.UDP, k.NFS.Port = true, ports[k.Cluster.Node][1]
		k.Rpcbind.Mode, k.Rpcbind.Port = config.RpcbindOwn, ports[k.Cluster.Node][0]
	}
	m.begin()
	k := m.client()
	dir := k.mount()
	k.writeAt(k.make(dir, "data"), 0, []byte("data"), wire.FileSync)
	data, st := m.a.fs.Resolve(ctx, wire.RootFID, "data")
	if st != wire.OK {
		t.Fatal(st)
	}
	asked := 0
	ask := func(n *Node) error {
		for _, u := range n.serving() {
			if u.Addr() != floatAddr {
				continue
			}
			for ap, name := range u.Ports() {
				progs := map[uint32][]uint32{nfs3.Program: {3}, mount3.Program: {1, 3}, nlm.Program: {1, 3, 4}, nsm.Program: {1}}
				if name == "rpcbind" {
					progs = map[uint32][]uint32{rpcbind.Program: {2, 3, 4}}
				}
				for prog, versions := range progs {
					for _, vers := range versions {
						for _, nw := range []string{"tcp", "udp"} {
							if err := null(nw, ap, prog, vers); err != nil {
								return fmt.Errorf("%s %s %s, program %d version %d: %w", name, nw, ap, prog, vers, err)
							}
							asked++
						}
					}
				}
			}
		}
		return nil
	}
	for _, w := range m.ways() {
		asked = 0
		to, from := m.other(), m.on
		var before error
		old := m.vip(to)
		owner := client.Owner{VIP: old.Index, Epoch: old.Epoch}
		var atMDT, atOST wire.Status
		m.net.Machine(to.cluster.name).On(viptest.Add, func(ctx context.Context, _ netip.Addr) error {
			before = ask(to)
			_, atMDT = from.fs.Statfs(ctx, owner)
			_, _, atOST, _ = from.fs.Read(ctx, owner, &data, 0, make([]byte, 1), true)
			return nil
		})
		done := len(m.net.Log())
		w.run()
		k.make(dir, w.name)
		if before != nil || asked < 24 {
			t.Errorf("%s: %d answers before the address was there: %v", w.name, asked, before)
		}
		if atMDT != wire.ErrStaleVIP || atOST != wire.ErrStaleVIP {
			t.Errorf("%s: what the old owner asked the MDT and an OST before the address was at the next one: %v, %v", w.name, atMDT, atOST)
		}
		var order []string
		for _, o := range m.net.Log()[done:] {
			if s := o.Machine + " " + string(o.Kind); o.Kind != viptest.Destroy && !slices.Contains(order, s) {
				order = append(order, s)
			}
		}
		if first := from.cluster.name + " announce"; len(order) > 0 && order[0] == first {
			order = order[1:] // repeated, of the time before
		}
		want := []string{from.cluster.name + " remove", to.cluster.name + " add", to.cluster.name + " announce", to.cluster.name + " tickle"}
		if w.crash { // nobody waits for the one that is thought dead, nor for its last words
			order = slices.DeleteFunc(order, func(s string) bool { return s == want[0] || s == want[3] })
			want = want[1:3]
		}
		if !slices.Equal(order, want) {
			t.Errorf("%s: %s, want %s", w.name, strings.Join(order, ", "), strings.Join(want, ", "))
		}
	}
}

// null calls procedure 0.
func null(network string, to netip.AddrPort, prog, vers uint32) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := sunrpc.Dial(ctx, network, netip.AddrPort{}, to, prog, vers, sunrpc.Cred{})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Call(ctx, 0, nil)
	return err
}
