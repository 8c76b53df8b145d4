package vip

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	mac = [6]byte{2, 0, 0, 0, 0, 0x0a}
	ip4 = netip.MustParseAddr("192.0.2.1")
	ip6 = netip.MustParseAddr("2001:db8::1")
)

// The packets byte by byte, as the RFCs draw them.
func TestPackets(t *testing.T) {
	for _, c := range []struct {
		name string
		got  []byte
		want []string
	}{
		{"ARP request", arpFrame(1, mac, ip4), []string{
			"ffffffffffff 02000000000a 0806", "0001 0800 06 04 0001", "02000000000a c0000201", "000000000000 c0000201",
		}},
		{"ARP reply", arpFrame(2, mac, ip4), []string{
			"ffffffffffff 02000000000a 0806", "0001 0800 06 04 0002", "02000000000a c0000201", "02000000000a c0000201",
		}},
		{"NA", naFrame(mac, ip6), []string{
			"333300000001 02000000000a 86dd", "60000000 0020 3a ff", "20010db8000000000000000000000001", "ff020000000000000000000000000001",
			"88 00 f921 20000000", "20010db8000000000000000000000001", "0201 02000000000a",
		}},
		{"tickle IPv4", tickle(Conn{netip.AddrPortFrom(ip4, 2049), netip.MustParseAddrPort("192.0.2.9:700")}), []string{
			"45 00 0028 0000 4000 40 06 b6c5", "c0000201 c0000209", "0801 02bc 00000000 00000000 5010 0000 210d 0000",
		}},
		{"tickle IPv6", tickle(Conn{netip.AddrPortFrom(ip6, 2049), netip.MustParseAddrPort("[2001:db8::9]:700")}), []string{
			"60000000 0014 06 40", "20010db8000000000000000000000001", "20010db8000000000000000000000009",
			"0801 02bc 00000000 00000000 5010 0000 499c 0000",
		}},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(strings.Join(c.want, ""), " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(c.got, want) {
			t.Errorf("%s:\n got %x\nwant %x", c.name, c.got, want)
		}
	}
}

// A packet's words with their checksum add up to all ones (RFC 1071).
func TestChecksum(t *testing.T) {
	for _, b := range [][]byte{{}, {0xff, 0xff, 0xff, 0xff}, {0x12, 0x34, 0xf0, 0x0f}} {
		c := checksum(0xffff, b)
		if got := checksum(0xffff+uint32(c), b); got != 0 {
			t.Errorf("%x: %04x", b, got)
		}
	}
}

func TestChoose(t *testing.T) {
	ls := []link{{index: 1, name: "lo", quiet: true}, {index: 2, name: "eth0"}, {index: 3, name: "eth1"}, {index: 4, name: "eth2"}}
	es := func(s ...string) (out []entry) {
		for i := 0; i < len(s); i += 2 {
			out = append(out, entry{prefix: netip.MustParsePrefix(s[i+1]), index: slices.IndexFunc(ls, func(l link) bool { return l.name == s[i] }) + 1})
		}
		return out
	}
	for _, c := range []struct {
		name, addr, dev string
		es              []entry
		want            string
	}{
		{"by network", "192.0.2.1/24", "", es("lo", "127.0.0.1/8", "eth0", "198.51.100.7/24", "eth1", "192.0.2.7/24"), "eth1"},
		{"by IPv6 network", "2001:db8::1/64", "", es("eth0", "2001:db8::7/64", "eth1", "192.0.2.7/24"), "eth0"},
		{"longest prefix", "10.1.2.3/24", "", es("eth0", "10.0.0.7/8", "eth1", "10.1.2.7/24"), "eth1"},
		{"two addresses of one", "10.1.2.3/24", "", es("eth1", "10.1.2.7/24", "eth1", "10.1.2.8/24"), "eth1"},
		{"ambiguous", "10.1.2.3/24", "", es("eth0", "10.1.2.8/24", "eth1", "10.1.2.7/24"), "interfaces [eth0 eth1] are all in its network"},
		{"named", "10.1.2.3/24", "eth2", es("eth0", "10.1.2.8/24"), "eth2"},
		{"single addresses tell nothing", "10.1.2.3/24", "", es("eth0", "10.1.2.3/32", "eth0", "10.1.2.4/32"), "eth0 has it"},
		{"nor do they of others", "10.1.2.3/24", "", es("eth0", "10.1.2.4/32"), "no interface has an address of its network"},
		{"where it is", "10.1.2.3/24", "eth2", es("eth0", "10.1.2.3/24"), "eth0 has it"},
		{"where it is and named", "10.1.2.3/24", "eth1", es("eth0", "10.1.2.3/24", "eth1", "10.1.2.3/24", "eth2", "10.1.2.3/24"), "eth1 has it"},
		{"unknown name", "10.1.2.3/24", "eth9", es("eth0", "10.1.2.8/24"), "no interface eth9"},
		{"interface gone", "10.1.2.3/24", "", []entry{{prefix: netip.MustParsePrefix("10.1.2.3/24"), index: 77}}, "no interface has an address"},
	} {
		i, here, err := choose(Address{netip.MustParsePrefix(c.addr), c.dev}, c.es, ls)
		got := ""
		if err != nil {
			got = err.Error()
		} else if got = ls[i].name; here {
			got += " has it"
		}
		if err == nil && got != c.want || !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestInTurns(t *testing.T) {
	var conns []Conn
	for _, s := range []string{"10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3", "10.0.0.2:1", "10.0.0.2:2", "10.0.0.3:1"} {
		conns = append(conns, Conn{Remote: netip.MustParseAddrPort(s)})
	}
	var got []string
	for _, c := range inTurns(conns) {
		got = append(got, c.Remote.String())
	}
	if want := "10.0.0.1:1 10.0.0.2:1 10.0.0.3:1 10.0.0.1:2 10.0.0.2:2 10.0.0.1:3"; strings.Join(got, " ") != want {
		t.Errorf("%v, want %s", got, want)
	}
}

// Segments leave in groups with a pause after each, and nobody waits after the last. A
// pause that took too long is made up for.
func TestTicklePace(t *testing.T) {
	k, err := Open(Options{})
	if err != nil {
		t.Skipf("SKIPPED, reason: %v", err)
	}
	defer k.Close()
	for _, x := range []struct {
		n      int
		late   time.Duration // each pause takes this much longer than it should
		pauses int
	}{{0, 0, 0}, {1, 0, 0}, {tickleGroup, 0, 0}, {tickleGroup + 1, 0, 1}, {500, 0, 3}, {500, ticklePause, 2}, {500, 20 * ticklePause, 1}} {
		now, pauses := time.Unix(1, 0), 0
		k.now = func() time.Time { return now }
		k.pause = func(d time.Duration) {
			if pauses++; d <= 0 || d > ticklePause {
				t.Errorf("a pause of %v", d)
			}
			now = now.Add(d + x.late)
		}
		// No connection of the address: nothing is sent.
		conns := slices.Repeat([]Conn{{Local: netip.AddrPortFrom(ip4, 1), Remote: netip.AddrPortFrom(ip4, 2)}}, x.n)
		err := k.Tickle(Address{Prefix: netip.MustParsePrefix("192.0.2.77/24"), Interface: "lo"}, conns)
		if x.n > 0 && (err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d of %d", x.n, x.n))) {
			t.Errorf("tickle of %d wrong connections: %v", x.n, err)
		}
		if pauses != x.pauses {
			t.Errorf("%d segments, pauses late by %v: %d pauses, want %d", x.n, x.late, pauses, x.pauses)
		}
	}
}

func TestSettings(t *testing.T) {
	dir := t.TempDir()
	set := func(path, value string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"all", "eth0", "eth1"} {
		set("ipv4/conf/"+d+"/arp_announce", "0")
		set("ipv4/conf/"+d+"/promote_secondaries", "0")
	}
	set("ipv6/conf/eth0.7/disable_ipv6", "1")
	look := func(devs4, devs6 []string) string {
		t.Helper()
		ss, err := settings(dir, devs4, devs6)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, s := range ss {
			out = append(out, fmt.Sprintf("%s %d %d", s.Key, s.Value, s.Want))
			if !strings.Contains(s.String(), "sysctl -w "+s.Key+"=") {
				t.Errorf("no remedy in %q", s)
			}
		}
		return strings.Join(out, ", ")
	}
	const arp, promote = "net.ipv4.conf.all.arp_announce 0 2", "net.ipv4.conf.all.promote_secondaries 0 1"
	if got := look([]string{"eth0", "eth1"}, nil); got != arp+", "+promote {
		t.Error(got)
	}
	set("ipv4/conf/all/promote_secondaries", "1")
	set("ipv4/conf/eth0/arp_announce", "2")
	if got := look([]string{"eth0"}, nil); got != "" {
		t.Error(got)
	}
	if got := look([]string{"eth0", "eth1"}, nil); got != arp {
		t.Error(got)
	}
	if got, want := look(nil, []string{"eth0.7", "eth0.7"}), "net.ipv6.conf.eth0/7.disable_ipv6 1 0"; got != want {
		t.Error(got)
	}
	if _, err := settings(dir, []string{"eth9"}, nil); err == nil {
		t.Error("no error for an interface without settings")
	}
}

// Whatever the kernel says, nothing panics, and addresses come out whole.
func FuzzKernelMessages(f *testing.F) {
	f.Add(newAddr(netip.MustParsePrefix("192.0.2.1/24"), 2, DefaultProto))
	f.Add(newAddr(netip.MustParsePrefix("2001:db8::1/64"), 2, DefaultProto))
	f.Add(make([]byte, diagMsgSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, ok := parseEntry(b); ok && !e.prefix.IsValid() {
			t.Errorf("entry %+v", e)
		}
		if d, ok := parseDiag(b); ok && (!d.Local.IsValid() || d.stateName() == "") {
			t.Errorf("socket %+v", d)
		}
	})
}

func TestParseEntry(t *testing.T) {
	for _, s := range []string{"192.0.2.1/24", "2001:db8::1/64"} {
		p := netip.MustParsePrefix(s)
		e, ok := parseEntry(newAddr(p, 7, DefaultProto))
		if !ok || e.prefix != p || e.index != 7 || e.proto != DefaultProto {
			t.Errorf("%s: %+v, %v", s, e, ok)
		}
	}
}

// loopPair makes a connection to a listener at an address of the loopback.
func loopPair(t *testing.T, addr netip.Addr) (s, c net.Conn) {
	t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Skipf("SKIPPED, reason: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	if c, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if s, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, c
}

// Destroy says what stays, and why; no privileges are needed for that.
func TestDestroyThatCannot(t *testing.T) {
	k, err := Open(Options{})
	if err != nil {
		t.Skipf("SKIPPED, reason: %v", err)
	}
	defer k.Close()
	// Not one of an earlier run, of which sockets may have stayed.
	addr := netip.AddrFrom4([4]byte{127, 66, byte(rand.N(256)), byte(1 + rand.N(254))})
	s, c := loopPair(t, addr)

	ctx, cancel := context.WithCancelCause(t.Context())
	looks, late := 0, errors.New("late")
	k.kill = func(d *diagSocket) error {
		if looks++; looks == 5 {
			cancel(late)
		}
		return unix.ENOENT
	}
	if n, err := k.Destroy(ctx, addr); n != 1 || !errors.Is(err, late) || !strings.Contains(err.Error(), "1 sockets of "+addr.String()+" are still there") || looks != 5 {
		t.Errorf("a socket that stays: %d, %v, %d looks", n, err, looks)
	}
	k.kill = func(d *diagSocket) error { return unix.EOPNOTSUPP }
	if _, err := k.Destroy(t.Context(), addr); err == nil || !strings.Contains(err.Error(), "CONFIG_INET_DIAG_DESTROY") {
		t.Errorf("a kernel without SOCK_DESTROY: %v", err)
	}
	// The address's side closes first, and is in TIME-WAIT then.
	s.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(err)
	}
	c.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		ds, err := k.list(unix.IPPROTO_TCP, addr)
		if err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(ds, func(d diagSocket) bool { return d.state != stateListen }); i < 0 || time.Now().After(end) {
			t.Fatalf("no TIME-WAIT: %v", ds)
		} else if ds[i].state == stateTimeWait {
			break
		}
	}
	if n, err := k.Destroy(t.Context(), addr); n != 1 || !errors.Is(err, ErrTimeWait) {
		t.Errorf("a kernel that cannot destroy TIME-WAIT: %d, %v", n, err)
	}
}

// Add waits for the local routing table, looks again and again, and gives up with ctx.
func TestUsable(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	looks, late := 0, errors.New("late")
	k := &Kernel{here: func(netip.Addr) (bool, error) { looks++; return looks == 3, nil }}
	if err := k.usable(ctx, ip6); err != nil || looks != 3 {
		t.Errorf("%v after %d looks, want none after 3", err, looks)
	}
	k.here = func(netip.Addr) (bool, error) { cancel(late); return false, nil }
	if err := k.usable(ctx, ip6); !errors.Is(err, late) || !strings.Contains(err.Error(), ip6.String()) {
		t.Errorf("an address that is never usable: %v", err)
	}
	broken := errors.New("broken")
	k.here = func(netip.Addr) (bool, error) { return false, broken }
	if err := k.usable(t.Context(), ip6); err != broken {
		t.Errorf("no routing table: %v", err)
	}
}
