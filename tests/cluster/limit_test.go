package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/vip"
)

// skipped is how many answers to segments out of the window the hub's kernel has held
// back, because it answers one in tcp_invalid_ratelimit for each socket.
func (s *street) skipped() (n int) {
	s.t.Helper()
	s.ok(s.hub.Do(func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/net/netstat", unix.Gettid()))
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) == 0 || f[0] != "TcpExt:" {
				continue
			}
			if names == nil {
				names = f
				continue
			}
			for i, name := range names {
				if name == "TCPACKSkippedSeq" && i < len(f) {
					n, err = strconv.Atoi(f[i])
					return err
				}
			}
		}
		return errors.New("/proc/net/netstat has no TCPACKSkippedSeq")
	}))
	return n
}

// The client's kernel has just answered a segment out of its connection's window, and
// does not answer another one for half a second (tcp_invalid_ratelimit): the first tickle
// is lost to that. The client, which is idle, learns of the move all the same. own 16.
func TestTickleAndTheClientsLimit(t *testing.T) {
	t.Run("ipv4", func(t *testing.T) { testLimit(t) })
	t.Run("ipv6", func(t *testing.T) { testLimit(t, six) })
}

func testLimit(t *testing.T, set ...func(*street)) {
	s := newStreet(t, "off", set...)
	s.all()
	s.must("vip", "add", s.at.String())
	s.must("vip", "move", s.vip().String(), "--to", "n1")
	s.alone("n1")
	// A third machine speaks in the address's name, as one does that has lost it.
	var third *vip.Kernel
	s.ok(s.nodes["t"].Do(func() (err error) {
		if err = os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0); err == nil {
			third, err = vip.Open(vip.Options{})
		}
		return err
	}))
	defer third.Close()
	at := vip.Address{Prefix: s.at}
	k := &caller{s: s}
	defer func() { k.hang() }()
	from, to := "n1", "n2"
	for try := 0; ; try++ {
		if try == 20 {
			t.Fatal("no tickle was lost to the client's limit")
		}
		k.mount() // connects
		c := vip.Conn{Local: netip.MustParseAddrPort(s.nfs()), Remote: k.conn.LocalAddr().(*net.TCPAddr).AddrPort()}
		before := s.skipped()
		moved := make(chan error, 1)
		go func() {
			out, err := s.order("t", "vip", "move", s.vip().String(), "--to", to)
			if err != nil {
				err = fmt.Errorf("%w\n%s", err, out)
			}
			moved <- err
		}()
		// What the client says now reaches nobody who knows the connection.
		for end := time.Now().Add(patience); ; time.Sleep(500 * time.Microsecond) {
			if has, err := s.nodes[from].Has(s.vip()); err != nil || !has {
				s.ok(err)
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s keeps the address", from)
			}
		}
		s.ok(third.Tickle(at, []vip.Conn{c}))
		s.ok(k.conn.SetReadDeadline(time.Now().Add(patience)))
		if n, err := k.conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("the idle connection gave %d bytes, %v; want a reset", n, err)
		}
		k.hang()
		s.ok(<-moved)
		s.alone(to)
		from, to = to, from
		if lost := s.skipped() - before; lost > 0 {
			t.Logf("%d tickles were lost to the limit, the client was reset; try %d", lost, try+1)
			return
		}
	}
}
