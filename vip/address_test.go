package vip_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/vip"
	"golang.org/x/sys/unix"
)

// 004.1, 004.20: one address comes and goes, others stay; a process that is
// started anew finds what the last one has added, and nothing else.
func TestAddressComesAndGoes(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		addr := a.Prefix.Addr()
		has := func(want bool) {
			t.Helper()
			if got, err := w.a.k.Has(addr); got != want || err != nil {
				t.Errorf("has %v, %v; want %v", got, err, want)
			}
		}
		has(false)
		must(t, w.a.k.Add(ctx, a))
		must(t, w.a.k.Add(ctx, a))
		has(true)
		line := w.a.ip(t, "-d -o addr show dev eth0 to "+addr.String())
		if strings.Contains(line, "tentative") {
			t.Errorf("the address is tentative:\n%s", line)
		}
		if addr.Is6() && (!strings.Contains(line, "nodad") || !strings.Contains(line, "deprecated")) {
			t.Errorf("the address is not nodad and deprecated:\n%s", line)
		}
		other := netip.PrefixFrom(addr.Next(), a.Prefix.Bits())
		must(t, w.a.AddAddr("eth0", other))
		next := w.a.open(t, vip.Options{})
		got, err := next.Added()
		if want := []vip.Address{{Prefix: a.Prefix, Interface: "eth0"}}; err != nil || !slices.Equal(got, want) {
			t.Errorf("added %v, %v; want %v", got, err, want)
		}
		must(t, next.Remove(ctx, a))
		must(t, next.Remove(ctx, a))
		has(false)
		if got, err := next.Added(); err != nil || len(got) != 0 {
			t.Errorf("added after remove: %v, %v", got, err)
		}
		// What somebody else has added is no error, and stays theirs.
		must(t, next.Add(ctx, vip.Address{Prefix: other}))
		if got, err := next.Added(); err != nil || len(got) != 0 {
			t.Errorf("somebody else's address counts as added: %v, %v", got, err)
		}
	})
}

// When Add returns, the kernel delivers to the address.
func TestAddIsUsableAtOnce(t *testing.T) {
	each(t, func(t *testing.T, w *world, a vip.Address) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		l := w.a.listen(t, a.Prefix.Addr(), 0)
		for range 20 {
			must(t, w.a.k.Add(ctx, a))
			c, err := w.a.DialContext(ctx, "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			must(t, w.a.k.Remove(ctx, a))
		}
	})
}

// The machine's own connections never use a floating IPv6 address as source.
func TestFloatingAddressIsNoSource(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	must(t, w.a.k.Add(ctx, families["ipv6"]))
	must(t, w.a.k.Add(ctx, families["ipv4"]))
	for to, want := range map[string]string{"fd66::3": "fd66::1", "10.66.0.3": "10.66.0.1"} {
		if r := w.a.ip(t, "route get "+to); !strings.Contains(r, "src "+want+" ") {
			t.Errorf("route to %s, want source %s:\n%s", to, want, r)
		}
	}
}

// 004.1: the kernel removes the secondary addresses of a network with the first
// one; those of others come back.
func TestRemoveKeepsOthers(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var as []vip.Address
	for _, s := range []string{"10.67.0.50/24", "10.67.0.51/24", "10.67.0.52/24"} {
		a := vip.Address{Prefix: netip.MustParsePrefix(s), Interface: "eth0"}
		must(t, w.a.k.Add(ctx, a))
		as = append(as, a)
	}
	must(t, w.a.k.Remove(ctx, as[0]))
	if got, err := w.a.k.Added(); err != nil || !slices.Equal(got, as[1:]) {
		t.Errorf("left %v, %v; want %v", got, err, as[1:])
	}
}

func TestAddErrors(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	w.b.ip(t, "link set eth0 down")
	w.c.sysctl(t, "ipv6/conf/all/disable_ipv6", "1")
	for family, a := range families {
		if err := w.a.k.Check(a); err != nil {
			t.Errorf("%s: check: %v", family, err)
		}
		if has, err := w.a.k.Has(a.Prefix.Addr()); has || err != nil {
			t.Errorf("%s: check has added it: %v, %v", family, has, err)
		}
	}
	for _, c := range []struct {
		name string
		k    *vip.Kernel
		a    vip.Address
		want string
	}{
		{"no network", w.a.k, vip.Address{Prefix: netip.MustParsePrefix("10.99.0.1/24")}, "name the address's interface"},
		{"no interface", w.a.k, vip.Address{Prefix: netip.MustParsePrefix("10.66.0.50/24"), Interface: "eth7"}, "no interface eth7"},
		{"loopback", w.a.k, vip.Address{Prefix: netip.MustParsePrefix("127.0.0.3/8")}, "not an address of a machine"},
		{"invalid", w.a.k, vip.Address{}, "no valid address"},
		{"mapped", w.a.k, vip.Address{Prefix: netip.MustParsePrefix("::ffff:10.66.0.50/120")}, "10.66.0.50"},
		{"down", w.b.k, vip.Address{Prefix: netip.MustParsePrefix("10.66.0.50/24"), Interface: "eth0"}, "ip link set eth0 up"},
	} {
		err := c.k.Check(c.a)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: check: %v, want %q in it", c.name, err, c.want)
		}
		if aerr := c.k.Add(ctx, c.a); errors.Is(aerr, vip.ErrUnable) != errors.Is(err, vip.ErrUnable) || fmt.Sprint(aerr) != fmt.Sprint(err) {
			t.Errorf("%s: add: %v, check said %v", c.name, aerr, err)
		} else if strings.Contains(aerr.Error(), "interface") && !errors.Is(aerr, vip.ErrUnable) {
			t.Errorf("%s: add: %v, as if it had been tried", c.name, aerr)
		}
	}
	for _, c := range []struct {
		name string
		k    *vip.Kernel
		a    vip.Address
		want string
	}{
		{"no IPv6", w.c.k, vip.Address{Prefix: netip.MustParsePrefix("fd66::50/64"), Interface: "eth0"}, "disable_ipv6"},
	} {
		if err := c.k.Add(ctx, c.a); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.want)
		}
	}
}

// When the time is over, Add has either succeeded or left nothing.
func TestAddGivesUp(t *testing.T) {
	w := newWorld(t)
	a := families["ipv6"]
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	cancel(stop)
	for range 50 {
		err := w.a.k.Add(ctx, a)
		if err != nil && !errors.Is(err, stop) {
			t.Fatal(err)
		}
		if has, herr := w.a.k.Has(a.Prefix.Addr()); has != (err == nil) || herr != nil {
			t.Fatalf("add: %v; the address is there: %v, %v", err, has, herr)
		}
		must(t, w.a.k.Remove(t.Context(), a))
	}
}

// The state file has what Add added and Remove has not removed.
func TestStateFile(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	path := filepath.Join(t.TempDir(), "addresses")
	k := w.a.open(t, vip.Options{StateFile: path})
	must(t, k.Add(ctx, families["ipv4"]))
	must(t, k.Add(ctx, families["ipv6"]))
	recorded := func(want ...string) {
		t.Helper()
		l, err := vip.Recorded(path)
		must(t, err)
		if got := fmt.Sprint(l); got != fmt.Sprint(want) {
			t.Errorf("recorded %s, want %s", got, want)
		}
	}
	recorded("10.66.0.50", "fd66::50")
	must(t, k.Remove(ctx, families["ipv4"]))
	recorded("fd66::50")
	// An address without a mark, as old kernels have them, counts if it is recorded.
	must(t, os.WriteFile(path, []byte("10.66.0.60 eth0\n10.66.0.61 eth1\ngarbage\n10.66.0.63 eth0\n"), 0o644))
	for _, p := range []string{"10.66.0.60/24", "10.66.0.61/24", "10.66.0.62/24"} {
		must(t, w.a.AddAddr("eth0", netip.MustParsePrefix(p)))
	}
	got, err := k.Added()
	must(t, err)
	var text []string
	for _, a := range got {
		text = append(text, a.Prefix.String()+" "+a.Interface)
	}
	slices.Sort(text)
	if want := []string{"10.66.0.60/24 eth0", "fd66::50/64 eth0"}; !slices.Equal(text, want) {
		t.Errorf("added %q, want %q", text, want)
	}
}

// What is recorded of an earlier boot is void: the address may be anybody's by now.
func TestStateFileOfEarlierBoot(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "addresses")
	must(t, os.WriteFile(path, []byte("boot 0a0a0a0a-0000-0000-0000-000000000000\n10.66.0.60 eth0\n"), 0o644))
	must(t, w.a.AddAddr("eth0", netip.MustParsePrefix("10.66.0.60/24")))
	k := w.a.open(t, vip.Options{StateFile: path})
	if l, err := k.Added(); err != nil || len(l) != 0 {
		t.Errorf("added %v, %v", l, err)
	}
	if l, err := vip.Recorded(path); err != nil || len(l) != 0 {
		t.Errorf("recorded %v, %v", l, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	must(t, k.Add(ctx, families["ipv6"]))
	if l, err := vip.Recorded(path); err != nil || fmt.Sprint(l) != "[fd66::50]" {
		t.Errorf("recorded %v, %v", l, err)
	}
}

func TestSettingsOfMachine(t *testing.T) {
	w := newWorld(t)
	keys := func() (out []string) {
		t.Helper()
		must(t, w.a.Do(func() error {
			ss, err := w.a.k.Settings(families["ipv4"], families["ipv6"])
			for _, s := range ss {
				out = append(out, s.Key)
			}
			return err
		}))
		return out
	}
	w.a.sysctl(t, "ipv4/conf/all/arp_announce", "0")
	w.a.sysctl(t, "ipv4/conf/eth0/arp_announce", "0")
	w.a.sysctl(t, "ipv4/conf/all/promote_secondaries", "1")
	if got := keys(); !slices.Equal(got, []string{"net.ipv4.conf.all.arp_announce"}) {
		t.Errorf("wrong settings %q", got)
	}
	w.a.sysctl(t, "ipv4/conf/eth0/arp_announce", "2")
	if got := keys(); got != nil {
		t.Errorf("wrong settings %q, want none", got)
	}
}

// Without capabilities every method says which one is missing.
func TestWithoutCapabilities(t *testing.T) {
	w := newWorld(t)
	a := families["ipv4"]
	w.a.take(t, a)
	l := w.a.listen(t, a.Prefix.Addr(), 0)
	s, _ := w.pair(t, l, a.Prefix.Addr())
	rc, err := s.SyscallConn()
	must(t, err)
	must(t, w.a.Do(func() error { // the thread ends with this function
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			return err
		}
		ctx := t.Context()
		add := vip.Address{Prefix: netip.MustParsePrefix("10.66.0.51/24")}
		_, derr := w.a.k.Destroy(ctx, a.Prefix.Addr())
		for name, err := range map[string]error{
			"add": w.a.k.Add(ctx, add), "remove": w.a.k.Remove(ctx, a), "destroy": derr, "close quietly": vip.CloseQuietly(rc),
		} {
			if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
				t.Errorf("%s: %v", name, err)
			}
		}
		k, err := vip.Open(vip.Options{})
		if err != nil {
			return err
		}
		defer k.Close()
		for name, err := range map[string]error{"announce": k.Announce(a), "tickle": k.Tickle(a, []vip.Conn{connOf(s)})} {
			if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_RAW") {
				t.Errorf("%s: %v", name, err)
			}
		}
		return nil
	}))
	if _, err := s.Write([]byte("x")); err != nil {
		t.Errorf("a connection that could not be closed quietly is disturbed: %v", err)
	}
}

// Close waits for nobody else, and later calls fail.
func TestClosed(t *testing.T) {
	w := newWorld(t)
	k := w.a.open(t, vip.Options{})
	must(t, k.Close())
	must(t, k.Close())
	if _, err := k.Has(netip.MustParseAddr("10.66.0.50")); err == nil {
		t.Error("a closed Kernel works")
	}
	if err := k.Announce(families["ipv4"]); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("announce by a closed Kernel: %v", err)
	}
	w.a.take(t, families["ipv4"]) // the other one still works
}
