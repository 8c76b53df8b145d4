package systemd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const (
	nfsPort, mountPort       = 2049, 20048
	progNFS, progMount       = 100003, 100005
	procGetattr, procLookup  = 1, 3
	procCreate, procWrite    = 8, 7
	statusOK                 = 0
	createGuarded, writeSync = 1, 2
)

// client is an NFS client of one connection: calls and their replies in order.
type client struct {
	t    *testing.T
	c    net.Conn
	xid  uint32
	root []byte
}

// dial connects to a port of the service address.
func (b *box) dial(port int) (net.Conn, error) { return b.dialTo(addr, port) }

func (b *box) dialTo(at netip.Addr, port int) (net.Conn, error) {
	return b.node.DialContext(b.ctx, "tcp", netip.AddrPortFrom(at, uint16(port)).String())
}

// connect mounts /home and returns a client with its root.
func (b *box) connect() *client {
	b.t.Helper()
	return b.connectTo(addr)
}

// connectTo is connect to another address.
func (b *box) connectTo(at netip.Addr) *client {
	b.t.Helper()
	mc, err := b.dialTo(at, mountPort)
	if err != nil {
		b.t.Fatal(err)
	}
	m := &client{t: b.t, c: mc, xid: 100}
	res := m.call(progMount, 1, str("/home"))
	mc.Close()
	if status(res) != statusOK {
		b.t.Fatalf("MNT: status %d", status(res))
	}
	c, err := b.dialTo(at, nfsPort)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	n := binary.BigEndian.Uint32(res[4:])
	return &client{t: b.t, c: c, xid: 1000, root: append([]byte(nil), res[8:8+n]...)}
}

func u32(vs ...uint32) (b []byte) {
	for _, v := range vs {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func str[T ~string | ~[]byte](s T) []byte {
	b := append(u32(uint32(len(s))), s...)
	return append(b, make([]byte, -len(s)&3)...)
}

func status(res []byte) uint32 {
	if len(res) < 4 {
		return 1 << 31
	}
	return binary.BigEndian.Uint32(res)
}

// message is a call in a record, with root's credential.
func message(xid, prog, proc uint32, args []byte) []byte {
	cred := append(u32(0), str("t")...)
	cred = append(cred, u32(0, 0, 0)...)
	m := append(u32(xid, 0, 2, prog, 3, proc, 1), str(cred)...)
	m = append(append(m, u32(0, 0)...), args...)
	return append(u32(1<<31|uint32(len(m))), m...)
}

// receive returns the results of the next reply.
func (c *client) receive(xid uint32) ([]byte, error) {
	c.c.SetReadDeadline(time.Now().Add(patience))
	var mark [4]byte
	if _, err := io.ReadFull(c.c, mark[:]); err != nil {
		return nil, err
	}
	m := make([]byte, binary.BigEndian.Uint32(mark[:])&(1<<20-1))
	if _, err := io.ReadFull(c.c, m); err != nil {
		return nil, err
	}
	if len(m) < 24 || binary.BigEndian.Uint32(m) != xid || binary.BigEndian.Uint32(m[8:]) != 0 || binary.BigEndian.Uint32(m[20:]) != 0 {
		return nil, fmt.Errorf("reply to call %d: % x", xid, m[:min(len(m), 24)])
	}
	return m[24:], nil
}

func (c *client) send(prog, proc uint32, args []byte) uint32 {
	c.t.Helper()
	c.xid++
	if _, err := c.c.Write(message(c.xid, prog, proc, args)); err != nil {
		c.t.Fatalf("send: %v", err)
	}
	return c.xid
}

func (c *client) call(prog, proc uint32, args []byte) []byte {
	c.t.Helper()
	res, err := c.receive(c.send(prog, proc, args))
	if err != nil {
		c.t.Fatalf("call %d of program %d: %v", proc, prog, err)
	}
	return res
}

// works makes a call that has to be answered.
func (c *client) works() {
	c.t.Helper()
	if s := status(c.call(progNFS, procGetattr, str(c.root))); s != statusOK {
		c.t.Fatalf("GETATTR: status %d", s)
	}
}

func (c *client) lookup(name string) uint32 {
	c.t.Helper()
	return status(c.call(progNFS, procLookup, append(str(c.root), str(name)...)))
}

// createArgs creates a file that must not exist.
func (c *client) createArgs(name string) []byte {
	return append(append(str(c.root), str(name)...), u32(createGuarded, 0, 0, 0, 0, 0, 0)...)
}

// ends waits for the server's FIN, and closes the connection as clients do; a reset is
// an error.
func (c *client) ends() error {
	defer c.c.Close()
	c.c.SetReadDeadline(time.Now().Add(patience))
	n, err := c.c.Read(make([]byte, 1))
	if n == 0 && errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("read %d bytes, %v", n, err)
}

// refused tells whether an error says that nobody listens.
func refused(err error) bool { return err != nil && strings.Contains(err.Error(), "refused") }
