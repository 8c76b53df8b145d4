package bed

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestParseSockets(t *testing.T) {
	ss, err := parseSockets("tcp", []byte(`  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 654D000A:0801 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 654D000A:0801 0B4D000A:03FF 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   2: 0000000000000000FFFF0000654D000A:0801 0000000000000000FFFF00000B4D000A:03FF 01 00000000:00000000 00:00000000 00000000 0 0 1 1
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"tcp LISTEN 10.0.77.101:2049 0.0.0.0:0", "tcp TIME-WAIT 10.0.77.101:2049 10.0.77.11:1023", "tcp ESTAB 10.0.77.101:2049 10.0.77.11:1023"}
	var got []string
	for _, s := range ss {
		got = append(got, s.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, bad := range []string{"0: 7F00000:0016 00000000:0000 0A", "0: 7F000001:0016 00000000:0000 FF", "0: 7F000001:0016 00000000 0A", "0: 7F000001:x 00000000:0000 0A"} {
		if ss, err := parseSockets("tcp", []byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, ss)
		}
	}
}

// TestSocketsOfAnAddress sees an address come and go, and its sockets in each state
// that matters to who looks for leftovers.
func TestSocketsOfAnAddress(t *testing.T) {
	hub, a := newNode(t, "hub"), newNode(t, "a")
	if err := hub.AddBridge("br0", netip.MustParsePrefix("10.77.0.1/24")); err != nil {
		t.Fatal(err)
	}
	if err := a.Plug(hub, "br0", "pa", "eth0", netip.MustParsePrefix("10.77.0.2/24")); err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParsePrefix("10.77.0.101/24")
	has := func(want bool) {
		t.Helper()
		if got, err := a.Has(addr.Addr()); err != nil || got != want {
			t.Fatalf("has the address: %v, %v; want %v", got, err, want)
		}
	}
	has(false)
	if err := a.AddAddr("eth0", addr); err != nil {
		t.Fatal(err)
	}
	has(true)
	states := func(want ...string) {
		t.Helper()
		waitFor(t, fmt.Sprint(want), func() bool {
			ss, err := a.Sockets(addr.Addr())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range ss {
				got = append(got, s.State)
			}
			slices.Sort(got)
			return slices.Equal(got, want)
		})
	}
	var l net.Listener
	if err := a.Do(func() (err error) {
		l, err = net.Listen("tcp", "10.77.0.101:2049")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	states("LISTEN")
	if err := a.Announce("eth0", addr.Addr()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := hub.DialContext(ctx, "tcp", "10.77.0.101:2049")
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	states("ESTAB", "LISTEN")
	s.Close()
	states("FIN-WAIT-2", "LISTEN")
	c.Close()
	states("LISTEN", "TIME-WAIT")
	// A pulled cable keeps a FIN here.
	if c, err = hub.DialContext(ctx, "tcp", "10.77.0.101:2049"); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if s, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	if err := hub.SetLink("pa", false); err != nil {
		t.Fatal(err)
	}
	s.Close()
	states("FIN-WAIT-1", "LISTEN", "TIME-WAIT")
	if err := a.DelAddr("eth0", addr); err != nil {
		t.Fatal(err)
	}
	has(false)
}
