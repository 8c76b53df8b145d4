package tcp

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/baton-nfs/baton/internal/ca"
	"github.com/baton-nfs/baton/recovery/wire"

	"context"
)

func aligned(p []byte) uintptr { return uintptr(unsafe.Pointer(&p[0])) & 4095 }

// Handshakes that must fail, each with the error that says why.
func TestHandshakeErrors(t *testing.T) {
	b := newBed(t, true, func(o *ServerOptions) {
		o.Allow = func(_, _ string, k Kind) error {
			if k == Bulk {
				return errors.New("no bulk here")
			}
			return nil
		}
	})
	dir := t.TempDir()
	foreign, err := ca.Create(dir, "other", ca.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := foreign.IssueNode(dir, "client", ca.Options{}); err != nil {
		t.Fatal(err)
	}
	other, err := ca.LoadNode(dir, "client")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		change func(*DialOptions)
		want   error
	}{
		{"unknown target", func(o *DialOptions) { o.Target = "nothing" }, ErrNoTarget},
		{"another's name", func(o *DialOptions) { o.Node = "server" }, ErrIdentity},
		{"refused kind", func(o *DialOptions) { o.Kind = Bulk }, ErrRefused},
		{"unknown kind", func(o *DialOptions) { o.Kind = 9 }, ErrRefused},
		{"no certificate", func(o *DialOptions) { o.TLS = o.TLS.Clone(); o.TLS.Certificates = nil }, nil},
		{"foreign certificate", func(o *DialOptions) { o.TLS = o.TLS.Clone(); o.TLS.Certificates = other.Client("").Certificates }, nil},
		{"foreign server", func(o *DialOptions) { o.TLS = other.Client("server") }, nil},
		{"another server expected", func(o *DialOptions) { o.Addrs[0].Node = "client" }, nil},
		{"no TLS", func(o *DialOptions) { o.TLS = nil }, nil},
	} {
		o := b.options()
		c.change(&o)
		conn, err := Dial(ctx, o)
		if err == nil {
			conn.Close()
		}
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	// The second address counts when the first fails.
	o := b.options()
	o.Addrs = append([]Endpoint{{Addr: "127.0.0.1:1"}}, o.Addrs...)
	c, err := Dial(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	for what, o := range map[string]ServerOptions{
		"no TLS by accident":          {Node: "server"},
		"clients without certificate": {Node: "server", TLS: &tls.Config{}},
		"no name":                     {Insecure: true},
	} {
		if _, err := NewServer(nil, o); err == nil {
			t.Error(what, "was accepted")
		}
	}
	if _, err := Dial(ctx, DialOptions{Addrs: o.Addrs, Target: "fake", Node: "client"}); err == nil {
		t.Error("dialled without TLS by accident")
	}
}

// raw opens a plain connection, after the handshake if wanted.
func (b *bed) raw(hs bool) net.Conn {
	b.t.Helper()
	nc, err := net.Dial("tcp", b.addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	if hs {
		h := hello{min: 1, max: 1, kind: Control, node: "client", target: "fake"}
		if _, err := nc.Write(h.encode()); err != nil {
			b.t.Fatal(err)
		}
		if _, err := readHandshake(nc); err != nil {
			b.t.Fatal(err)
		}
	}
	return nc
}

// ends waits until the server has closed the connection.
func ends(t *testing.T, what string, nc net.Conn) {
	t.Helper()
	_, err := io.Copy(io.Discard, nc)
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		t.Errorf("%s: the server did not close the connection", what)
	}
}

func frame(p prefix, msg, bulk []byte) []byte {
	return append(append(p.append(nil), msg...), bulk...)
}

func TestHostileClients(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) {
		o.Timeouts = Timeouts{Handshake: 2 * time.Second, Frame: 400 * time.Millisecond, Write: 500 * time.Millisecond, Idle: 5 * time.Second}
	})
	ping := wire.AppendRequest(nil, request(wire.OpPing, 1))
	huge := prefix{typ: frameRequest, msg: 1 << 31, bulk: 1 << 31, tag: 1}
	long := prefix{typ: frameRequest, msg: wire.MaxRequestSize + 1, tag: 1}
	version := hello{min: 7, max: 9, kind: Control, node: "client", target: "fake"}
	for _, c := range []struct {
		what string
		hs   bool
		b    []byte
	}{
		{"nothing", false, nil},
		{"half a hello", false, version.encode()[:7]},
		{"another version", false, version.encode()},
		{"garbage for a hello", false, []byte("GET / HTTP/1.1\r\n\r\n")},
		{"long hello", false, append(be.AppendUint16(be.AppendUint32(nil, helloMagic), 65535), make([]byte, 65535)...)},
		{"short hello", false, seal([]byte{0, 1})},
		{"names beyond the hello", false, seal([]byte{0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 9, 200, 'x'})},
		{"half a session", false, seal([]byte{0, 1, 0, 1, 1, 0, 0, 0, 0})},
		{"session and no names", false, seal([]byte{0, 1, 0, 1, 1, 255, 255, 255, 255, 255, 255, 255, 255})},
		{"garbage", true, []byte("garbage garbage garbage garbage")},
		{"huge frame", true, huge.append(nil)},
		{"long frame", true, long.append(nil)},
		{"half a prefix", true, frame(prefix{typ: frameRequest, msg: 10, tag: 1}, nil, nil)[:9]},
		{"half a message", true, frame(prefix{typ: frameRequest, msg: uint32(len(ping)), tag: 1}, ping[:50], nil)},
		{"tag out of order", true, frame(prefix{typ: frameRequest, msg: uint32(len(ping)), tag: 5}, ping, nil)},
		{"reply from a client", true, frame(prefix{typ: frameReply, tag: 1}, nil, nil)},
		{"message without header", true, frame(prefix{typ: frameRequest, msg: 3, tag: 1}, ping[:3], nil)},
		{"bulk that does not come", true, frame(prefix{typ: frameRequest, msg: uint32(len(ping)), bulk: 1 << 20, tag: 1}, ping, nil)},
	} {
		nc := b.raw(c.hs)
		if _, err := nc.Write(c.b); err != nil {
			t.Error(c.what, err)
		}
		ends(t, c.what, nc)
		_ = nc.Close()
	}
	// A damaged message in a whole frame is answered.
	nc := b.raw(true)
	bad := append([]byte(nil), ping...)
	bad[3] = 99
	if _, err := nc.Write(frame(prefix{typ: frameRequest, msg: uint32(len(bad)), bulk: 5, tag: 1}, bad, []byte("12345"))); err != nil {
		t.Fatal(err)
	}
	var h [prefixSize + wire.ReplyHeaderSize]byte
	if _, err := io.ReadFull(nc, h[:]); err != nil || wire.Status(be.Uint32(h[prefixSize+4:])) != wire.ErrProto {
		t.Fatalf("%v %x", err, h)
	}
	_ = nc.Close()
	if b.srv.Stats().Violations == 0 || b.srv.Stats().Timeouts == 0 {
		t.Errorf("%+v", b.srv.Stats())
	}
	if err := b.dial(nil).Call(ctx, request(wire.OpPing, 1), new(wire.Reply)); err != nil {
		t.Error(err)
	}
}

// A client that asks for much and reads nothing costs bounded memory, and is
// thrown out.
func TestSlowReader(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) {
		o.ConnMemory = 4 << 20
		o.Timeouts.Write, o.Timeouts.Idle = 500*time.Millisecond, 2*time.Second
	})
	nc := b.raw(true)
	req := request(wire.OpRead, 1)
	req.Bulk = make([]byte, 1<<20)
	msg := wire.AppendRequest(nil, req)
	for i := range 200 {
		if _, err := nc.Write(frame(prefix{typ: frameRequest, msg: uint32(len(msg)), tag: uint64(i + 1)}, msg, nil)); err != nil {
			break
		}
		if m := b.srv.Stats().MemoryInUse; m > 5<<20 {
			t.Fatalf("%d bytes in use", m)
		}
	}
	eventually(t, "end of the connection", func() bool { return b.srv.Stats().Conns == 0 })
	eventually(t, "return of the memory", func() bool { return b.srv.Stats().MemoryInUse == 0 })
}

// Connections beyond the limit are closed at once, those within go on.
func TestConnectionLimit(t *testing.T) {
	b := newBed(t, false, func(o *ServerOptions) { o.MaxConns = 3 })
	c := b.dial(nil)
	for range 10 {
		b.raw(false)
	}
	eventually(t, "refusals", func() bool { return b.srv.Stats().Refused >= 8 })
	if err := c.Call(ctx, request(wire.OpPing, 1), new(wire.Reply)); err != nil {
		t.Error(err)
	}
}

// fakeServer answers the handshake and then runs fn.
func fakeServer(t *testing.T, fn func(nc net.Conn)) DialOptions {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
			fn(nc)
			_ = nc.Close()
		}
	}()
	return DialOptions{Addrs: []Endpoint{{Addr: l.Addr().String()}}, Target: "fake", Node: "client", Insecure: true, Timeouts: short}
}

func greet(nc net.Conn) {
	if _, err := readHandshake(nc); err != nil {
		return
	}
	w := welcome{version: 1, window: 8, maxBulk: 1 << 20, node: "server"}
	_, _ = nc.Write(w.encode())
}

func TestHostileServers(t *testing.T) {
	noLeaks(t)
	rep := func(change func(*wire.Reply)) []byte {
		r := wire.Reply{XID: 7}
		change(&r)
		return wire.AppendReply(nil, wire.OpRead, &r)
	}
	ok := rep(func(*wire.Reply) {})
	much := rep(func(r *wire.Reply) { r.Count = 1000 })
	some := rep(func(r *wire.Reply) { r.Count = 50 })
	ping := wire.AppendReply(nil, wire.OpPing, &wire.Reply{XID: 7})
	big := prefix{typ: frameReply, msg: 1 << 31, tag: 1}
	for _, c := range []struct {
		what string
		b    []byte
	}{
		{"closes", nil},
		{"garbage", []byte("garbage garbage garbage garbage")},
		{"huge frame", big.append(nil)},
		{"unknown tag", frame(prefix{typ: frameReply, msg: uint32(len(ok)), tag: 2}, ok, nil)},
		{"tag 0", frame(prefix{typ: frameReply, msg: uint32(len(ok))}, ok, nil)},
		{"another XID", frame(prefix{typ: frameReply, msg: uint32(len(ok)), tag: 1}, rep(func(r *wire.Reply) { r.XID = 8 }), nil)},
		{"another operation", frame(prefix{typ: frameReply, msg: uint32(len(ping)), tag: 1}, ping, nil)},
		{"more data than room", frame(prefix{typ: frameReply, msg: uint32(len(much)), bulk: 1000, tag: 1}, much, make([]byte, 1000))},
		{"bulk unlike count", frame(prefix{typ: frameReply, msg: uint32(len(some)), bulk: 49, tag: 1}, some, make([]byte, 49))},
		{"cut bulk", frame(prefix{typ: frameReply, msg: uint32(len(some)), bulk: 50, tag: 1}, some, make([]byte, 49))},
		{"cut message", frame(prefix{typ: frameReply, msg: uint32(len(ok)), tag: 1}, ok[:40], nil)},
		{"request from a server", frame(prefix{typ: frameRequest, tag: 1}, nil, nil)},
	} {
		o := fakeServer(t, func(nc net.Conn) {
			greet(nc)
			var b [prefixSize]byte
			if _, err := io.ReadFull(nc, b[:]); err == nil {
				_, _ = nc.Write(c.b)
			}
		})
		conn, err := Dial(ctx, o)
		if err != nil {
			t.Fatal(c.what, err)
		}
		req := request(wire.OpRead, 7)
		req.Bulk = make([]byte, 100)
		var r wire.Reply
		isLost(t, conn.Call(ctx, req, &r), true)
		if r.Status != wire.ErrTargetDown || r.Count != 0 {
			t.Errorf("%s: %+v", c.what, r)
		}
		conn.Close()
	}
	for what, b := range map[string][]byte{
		"no handshake":  nil,
		"garbage":       []byte("SSH-2.0-OpenSSH"),
		"short welcome": seal([]byte{0}),
		"other version": (&welcome{version: 9, window: 1, node: "server"}).encode(),
		"no window":     (&welcome{version: 1, node: "server"}).encode(),
	} {
		o := fakeServer(t, func(nc net.Conn) { _, _ = readHandshake(nc); _, _ = nc.Write(b) })
		if c, err := Dial(ctx, o); err == nil {
			c.Close()
			t.Error(what, "was accepted")
		}
	}
	// A server that says nothing at all: the context's end counts.
	stuck := make(chan struct{})
	o := fakeServer(t, func(net.Conn) { <-stuck })
	c, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(c, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	close(stuck)
}

// cutConn ends after a number of bytes in one direction.
type cutConn struct {
	net.Conn
	mu          sync.Mutex
	read, write int // bytes left, -1: no limit
}

func (c *cutConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	left := c.read
	c.mu.Unlock()
	if left == 0 {
		_ = c.Close()
		return 0, io.EOF
	}
	if left > 0 {
		p = p[:min(len(p), left)]
	}
	n, err := c.Conn.Read(p)
	if left > 0 {
		c.mu.Lock()
		c.read -= n
		c.mu.Unlock()
	}
	return n, err
}

func (c *cutConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.write < 0 || len(p) <= c.write {
		n, err := c.Conn.Write(p)
		c.write -= min(n, max(c.write, 0))
		return n, err
	}
	n, _ := c.Conn.Write(p[:c.write])
	c.write = 0
	_ = c.Close()
	return n, io.ErrClosedPipe
}

// A connection that is cut anywhere loses answers but never gives a wrong one,
// and what was never sent was never executed.
func TestCutAnywhere(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, nil)
		b.fake.later = true
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 1))
		lostSome, gotSome := 0, 0
		for round := range 60 {
			o := b.options()
			o.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				nc, err := new(net.Dialer).DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				cut := &cutConn{Conn: nc, read: -1, write: -1}
				if n := 100 + rnd.IntN(1<<(10+round%11)); rnd.IntN(2) == 0 {
					cut.read = n
				} else {
					cut.write = n
				}
				return cut, nil
			}
			c, err := Dial(ctx, o)
			if err != nil {
				continue // cut in the handshake
			}
			var wg sync.WaitGroup
			var mu sync.Mutex
			for w := range 4 {
				r := rand.New(rand.NewPCG(seed, uint64(round)<<8|uint64(w)))
				wg.Add(1)
				go func() {
					defer wg.Done()
					for i := range 12 {
						err := oneCall(ctx, c, r, uint64(round)<<32|uint64(w)<<16|uint64(i), new(wire.Reply))
						mu.Lock()
						switch l := new(wire.LostError); {
						case err == nil:
							gotSome++
						case errors.As(err, &l):
							lostSome++
						default:
							t.Error(fmt.Errorf("round %d: %w", round, err))
						}
						mu.Unlock()
					}
				}()
			}
			wg.Wait()
			c.Close()
		}
		if lostSome == 0 || gotSome == 0 {
			t.Errorf("%d answers, %d lost: the test does not test", gotSome, lostSome)
		}
	})
}
