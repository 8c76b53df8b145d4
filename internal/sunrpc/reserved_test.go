package sunrpc

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
)

func TestDialReserved(t *testing.T) {
	ctx := context.Background()
	l, err := net.Listen("tcp", "127.0.0.21:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := l.Addr().(*net.TCPAddr).AddrPort()
	local := netip.MustParseAddr("127.0.0.41")
	for _, network := range []string{"udp", "tcp"} {
		var pick int64
		rnd := func(n int64) int64 {
			if n != reservedHigh-reservedLow+1 {
				t.Errorf("a number below %d is asked for", n)
			}
			return pick
		}
		dial := func() uint16 {
			t.Helper()
			c, err := DialReserved(ctx, rnd, network, local, remote, 100024, 1, Cred{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			at := c.LocalAddr()
			if at.Addr() != local {
				t.Errorf("dialed from %v", at)
			}
			return at.Port()
		}
		var port uint16
		for range 20 { // others may have taken a port
			pick = rand.Int64N(reservedHigh - reservedLow + 1)
			if port = dial(); port < 1024 {
				break
			}
		}
		if int64(port) != reservedLow+pick {
			if os.Geteuid() == 0 {
				t.Errorf("%s: no reserved port: %d", network, port)
			}
			t.Log("not privileged: the use of reserved ports is not tested")
		}
		if port := dial(); port < 1024 { // taken now
			t.Errorf("dialed from port %d", port)
		}
	}
	if _, err := DialReserved(ctx, func(int64) int64 { return 0 }, "tcp", netip.MustParseAddr("192.0.2.1"), remote, 100024, 1, Cred{}); err == nil {
		t.Error("dialed from an address that is not there")
	}
}

// TestCloseLeavesNothing: after Close the same port connects to the same server again at
// once, which a socket in TIME-WAIT would prevent.
func TestCloseLeavesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.21:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	remote := l.Addr().(*net.TCPAddr).AddrPort()
	from := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.42"), 0)
	for i := range 5 {
		c, err := Dial(t.Context(), "tcp", from, remote, 100024, 1, Cred{})
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		from = c.LocalAddr()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}
