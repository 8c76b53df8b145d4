package vip_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/vip"
	"golang.org/x/sys/unix"
)

// server accepts at the address, answers each connection with its name, and keeps
// it until the client ends it.
type server struct {
	h    host
	l    *net.TCPListener
	mu   sync.Mutex
	all  map[*net.TCPConn]struct{}
	done chan struct{}
	wg   sync.WaitGroup
}

func (h host) serve(t *testing.T, addr netip.Addr, port int) *server {
	s := &server{h: h, l: h.listen(t, addr, port), all: map[*net.TCPConn]struct{}{}}
	s.begin()
	t.Cleanup(s.end)
	return s
}

func (s *server) begin() {
	s.done = make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		for {
			c, err := s.l.AcceptTCP()
			if err != nil {
				return
			}
			s.admit(c)
		}
	}(s.done)
}

func (s *server) admit(c *net.TCPConn) {
	s.mu.Lock()
	s.all[c] = struct{}{}
	s.mu.Unlock()
	s.wg.Go(func() {
		io.WriteString(c, s.h.Name())
		io.Copy(io.Discard, c)
		c.Close()
		s.mu.Lock()
		delete(s.all, c)
		s.mu.Unlock()
	})
}

func (s *server) conns() (out []*net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		out = append(out, c)
	}
	return out
}

func (s *server) end() {
	s.l.Close()
	<-s.done
	for _, c := range s.conns() {
		c.Close()
	}
	s.wg.Wait()
}

// hold drops SYNs and takes what the kernel has completed.
func (s *server) hold(t *testing.T) {
	t.Helper()
	filter(t, s.l, true)
	must(t, s.l.SetDeadline(time.Unix(1, 0)))
	<-s.done
	rc, err := s.l.SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if err != nil {
				return
			}
			unix.Close(n) // never answered: the client finds out
		}
	}))
}

// release takes SYNs again.
func (s *server) release(t *testing.T) {
	t.Helper()
	must(t, s.l.SetDeadline(time.Time{}))
	s.begin()
	filter(t, s.l, false)
}

// filter drops all segments for the listener, or lets them through.
func filter(t *testing.T, l *net.TCPListener, on bool) {
	t.Helper()
	rc, err := l.SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) {
		if on {
			drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
			err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]})
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		}
	}))
	must(t, err)
}

// 004.7, 004.9, 004.19, 004.20, 004.25: while the address goes back and forth, in
// the order of a planned move, no client is ever refused, and the machine without
// the address has no socket of it.
func TestHandoverRefusesNobody(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		addr := a.Prefix.Addr()
		const port = 2049
		from, to := w.a.serve(t, addr, port), w.b.serve(t, addr, port)
		to.hold(t)
		w.a.take(t, a)

		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		results := make(chan error, 1)
		answers := make(chan string)
		for range 4 {
			wg.Go(func() {
				for ctx.Err() == nil {
					name, err := w.ask(ctx, addr, port)
					if err != nil {
						select {
						case results <- err:
						default:
						}
					}
					select {
					case answers <- name:
					case <-ctx.Done():
					}
				}
			})
		}
		answered := func(name string) {
			t.Helper()
			for end := time.After(limit); ; {
				select {
				case got := <-answers:
					if got == name {
						return
					}
				case <-end:
					t.Fatalf("%s does not answer", name)
				}
			}
		}
		answered("a")
		rounds := 6
		if testing.Short() {
			rounds = 2
		}
		for range rounds {
			to.release(t) // listens on the absent address
			from.hold(t)
			if _, err := from.h.k.Destroy(ctx, addr); err != nil {
				t.Fatal(err)
			}
			from.h.clean(t, addr)
			must(t, from.h.k.Remove(ctx, a))
			if n, err := to.h.k.Destroy(ctx, addr); n != 0 || err != nil {
				t.Fatalf("stale sockets at the new owner: %d, %v", n, err)
			}
			to.h.take(t, a)
			from.h.clean(t, addr)
			answered(to.h.Name())
			from.h.clean(t, addr)
			from, to = to, from
		}
		cancel()
		wg.Wait()
		select {
		case err := <-results:
			t.Error(err)
		default:
		}
	})
}

// ask connects and returns what the server says: its name, or nothing if the
// connection was ended. Only a failure to connect is an error.
func (w *world) ask(ctx context.Context, addr netip.Addr, port int) (string, error) {
	c, err := w.c.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, uint16(port)).String())
	if err != nil {
		// The last two end a connection that was made: a reset of a SYN is a refusal.
		if ctx.Err() != nil || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
			return "", nil
		}
		return "", fmt.Errorf("connect: %w", err)
	}
	defer c.Close()
	// A connection that was taken and thrown away has no answer, and maybe no end.
	c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	b := make([]byte, 1)
	if _, err := io.ReadFull(c, b); err != nil {
		return "", nil
	}
	return string(b), nil
}

// A client that is talking to the old machine goes on with the new one when that
// has announced the address, and not before.
func TestAnnounceMovesABusyClient(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		addr := a.Prefix.Addr()
		w.a.take(t, a)
		conns := map[string]*net.UDPConn{}
		var wg sync.WaitGroup
		for _, h := range []host{w.a, w.b} {
			var pc net.PacketConn
			lc := net.ListenConfig{Control: func(network, _ string, rc syscall.RawConn) error {
				var err error
				cerr := rc.Control(func(fd uintptr) {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
					if network == "udp6" {
						err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
					}
				})
				return errors.Join(cerr, err)
			}}
			must(t, h.Do(func() (err error) {
				pc, err = lc.ListenPacket(context.Background(), "udp", netip.AddrPortFrom(addr, 5000).String())
				return err
			}))
			conns[h.Name()] = pc.(*net.UDPConn)
			wg.Go(func() {
				b := make([]byte, 16)
				for {
					_, from, err := pc.ReadFrom(b)
					if err != nil {
						return
					}
					pc.WriteTo([]byte(h.Name()), from)
				}
			})
		}
		defer wg.Wait()
		defer conns["a"].Close()
		defer conns["b"].Close()
		c, err := w.c.DialContext(t.Context(), "udp", netip.AddrPortFrom(addr, 5000).String())
		must(t, err)
		defer c.Close()
		answer := func(want string) {
			t.Helper()
			waitFor(t, "an answer of "+want, func() bool {
				c.Write([]byte("?"))
				c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				b := make([]byte, 16)
				n, err := c.Read(b)
				return err == nil && string(b[:n]) == want
			})
		}
		neighbour := func() string { return w.c.ip(t, "neigh show "+addr.String()) }
		mac := func(h host) string {
			f := strings.Fields(h.ip(t, "-o link show dev eth0"))
			for i, s := range f {
				if s == "link/ether" {
					return f[i+1]
				}
			}
			t.Fatal("no MAC address")
			return ""
		}
		macA, macB := mac(w.a), mac(w.b)
		for range 3 {
			answer("a")
			must(t, w.a.k.Remove(t.Context(), a))
			must(t, w.b.k.Add(t.Context(), a))
			if n := neighbour(); !strings.Contains(n, macA) {
				t.Errorf("before the announcement the client's neighbour is %q, want %s", n, macA)
			}
			must(t, w.b.k.Announce(a))
			waitFor(t, "the client to learn of it", func() bool { return strings.Contains(neighbour(), macB) })
			answer("b")
			must(t, w.b.k.Remove(t.Context(), a))
			w.a.take(t, a)
		}
	})
}

// Some machines heed only requests, some only replies.
func TestAnnounceAsRequestAndReply(t *testing.T) {
	bed.Need(t, namespaces())
	w, a := newWorld(t), families["ipv4"]
	w.a.take(t, a)
	c := w.c.capture(t)
	must(t, w.a.k.Announce(a))
	ip := a.Prefix.Addr().As4()
	must(t, c.f.SetReadDeadline(time.Now().Add(limit)))
	for seen := [3]bool{}; !seen[1] || !seen[2]; {
		b := make([]byte, 1<<16)
		n, err := c.f.Read(b)
		if err != nil {
			t.Fatalf("a request has come: %v, a reply: %v; %v", seen[1], seen[2], err)
		}
		// RFC 826: hardware, protocol, sizes, operation, sender, target.
		if b = b[:n]; n >= 28 && string(b[:7]) == "\x00\x01\x08\x00\x06\x04\x00" && [4]byte(b[14:]) == ip && [4]byte(b[24:]) == ip && b[7] <= 2 {
			seen[b[7]] = true
		}
	}
}

// quietly takes the address away and then closes connections quietly.
func (s *server) quietly(t *testing.T, a vip.Address) (conns []vip.Conn) {
	t.Helper()
	all := s.conns()
	must(t, s.h.k.Remove(t.Context(), a))
	for _, c := range all {
		conns = append(conns, connOf(c))
		rc, err := c.SyscallConn()
		must(t, err)
		must(t, vip.CloseQuietly(rc))
		c.Close()
	}
	return conns
}

// 004.18: clients of connections that have vanished with their machine get a reset
// from the new one when they are tickled: one connection, and 500.
func TestTickleResetsClients(t *testing.T) {
	for _, count := range []int{1, 500} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			if testing.Short() && count > 1 {
				t.Skip("SKIPPED, reason: -short")
			}
			each(t, func(t *testing.T, w *world, a vip.Address) {
				addr := a.Prefix.Addr()
				const port = 2049
				w.a.take(t, a)
				from := w.a.serve(t, addr, port)
				w.b.serve(t, addr, port)
				ends := make(chan error, count)
				for range count {
					c := w.c.dial(t, addr, port)
					b := make([]byte, 1)
					if _, err := io.ReadFull(c, b); err != nil || string(b) != "a" {
						t.Fatalf("answer %q, %v", b, err)
					}
					go func() {
						_, err := c.Read(b)
						ends <- err
					}()
				}
				conns := from.quietly(t, a)
				w.a.clean(t, addr)
				if len(conns) != count {
					t.Fatalf("%d connections, want %d", len(conns), count)
				}
				w.b.take(t, a)
				select {
				case err := <-ends:
					t.Fatalf("a client noticed before it was tickled: %v", err)
				default:
				}
				must(t, w.b.k.Tickle(a, conns))
				for range count {
					if err := <-ends; !errors.Is(err, syscall.ECONNRESET) {
						t.Fatalf("a client's connection ended with %v, want a reset", err)
					}
				}
				w.b.clean(t, addr)
			})
		})
	}
}

// A connection that is none of the address's is said, and the others are tickled.
func TestTickleGoesOn(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		addr := a.Prefix.Addr()
		w.a.take(t, a)
		from := w.a.serve(t, addr, 2049)
		c := w.c.dial(t, addr, 2049)
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		conns := from.quietly(t, a)
		wrong := vip.Conn{Local: netip.MustParseAddrPort("192.0.2.1:1"), Remote: conns[0].Remote}
		w.b.take(t, a)
		err := w.b.k.Tickle(a, append([]vip.Conn{wrong}, conns...))
		if err == nil || !strings.Contains(err.Error(), "1 of 2") {
			t.Errorf("tickle: %v", err)
		}
		if _, err := c.Read(b); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's connection ended with %v, want a reset", err)
		}
	})
}
