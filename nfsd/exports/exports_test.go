package exports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/wire"
)

var cmpAddr = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

func mustParse(t testing.TB, src string, names Names) *Table {
	t.Helper()
	tab, err := Parse("exports", []byte(src), names)
	if err != nil {
		t.Fatalf("%s\n%v", src, err)
	}
	return tab
}

func TestParseGood(t *testing.T) {
	const tail = ",sync,wdelay,hide,no_subtree_check,secure,root_squash,no_all_squash,anonuid=65534,anongid=65534)"
	for _, tc := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"only comments", "# a\n  # b\n\n", ""},
		{"defaults", "/a host", "/a host(ro" + tail},
		{"no client", "/a", "/a *(ro" + tail},
		{"star", "/a *(rw)", "/a *(rw" + tail},
		{"space before options", "/a (rw)", "/a *(rw" + tail},
		{"comment after", "/a h(rw) # (x", "/a h(rw" + tail},
		{"hash inside word", "/a#b h(rw)", `/a\043b h(rw` + tail},
		{"quoted", `"/a b" h(rw)`, `/a\040b h(rw` + tail},
		{"octal", `/a\040b\134c h(rw)`, `/a\040b\134c h(rw` + tail},
		{"plain backslash", `/a\b h(rw)`, `/a\134b h(rw` + tail},
		{"continuation", "/a \\\n h(rw) \\\r\n *(ro)", "/a h(rw" + tail + " *(ro" + tail},
		{"comment is not continued", "# x \\\n/a h(rw)", "/a h(rw" + tail},
		{"dash defaults", "/a -rw h1 h2(ro)", "/a h1(rw" + tail + " h2(ro" + tail},
		{"dash defaults again", "/a -rw h1 -ro h2", "/a h1(rw" + tail + " h2(ro" + tail},
		{"address", "/a 192.0.2.1(rw)", "/a 192.0.2.1(rw" + tail},
		{"ipv6", "/a 2001:DB8::1(rw)", "/a 2001:db8::1(rw" + tail},
		{"mapped", "/a ::ffff:192.0.2.1(rw)", "/a 192.0.2.1(rw" + tail},
		{"network", "/a 192.0.2.77/24(rw)", "/a 192.0.2.0/24(rw" + tail},
		{"netmask", "/a 192.0.2.0/255.255.255.128(rw)", "/a 192.0.2.0/25(rw" + tail},
		{"host network", "/a 192.0.2.1/32(rw)", "/a 192.0.2.1(rw" + tail},
		{"ipv6 network", "/a 2001:db8::/32(rw)", "/a 2001:db8::/32(rw" + tail},
		{"name case", "/a Host.Example.ORG.(rw)", "/a host.example.org(rw" + tail},
		{"precedence", "/a * *.b *.a.b 10.0.0.0/8 10.1.0.0/16 h 10.0.0.1", "/a 10.0.0.1(ro" + tail + " h(ro" + tail +
			" 10.1.0.0/16(ro" + tail + " 10.0.0.0/8(ro" + tail + " *.a.b(ro" + tail + " *.b(ro" + tail + " *(ro" + tail},
		{"merge and sort", "/b h(rw)\n/a h(rw)\n/b g(ro)", "/a h(rw" + tail + "\n/b g(ro" + tail + " h(rw" + tail},
		{"clean path", "//a/./b/ h(rw)", "/a/b h(rw" + tail},
		{"root", "/ h(rw)", "/ h(rw" + tail},
		{"all options", "/a h(rw,async,no_wdelay,nohide,crossmnt,subtree_check,insecure,no_root_squash,all_squash,anonuid=1,anongid=2,sec=sys,fsid=7,dir=/x\\054y)",
			`/a h(rw,async,no_wdelay,nohide,crossmnt,subtree_check,insecure,no_root_squash,all_squash,anonuid=1,anongid=2,fsid=7,dir=/x\054y)`},
		{"durability", "/a h(rw,durability=two-node) g(durability=two-node,durability=disk)", "/a g(ro" + tail + " h(rw" + tail[:len(tail)-1] + ",durability=two-node)"},
		{"empty options", "/a h(,rw,,) g()", "/a g(ro" + tail + " h(rw" + tail},
		{"fsid root", "/a h(rw,fsid=root)", "/a h(rw" + tail[:len(tail)-1] + ",fsid=0)"},
		{"fsid uuid", "/a h(rw,fsid=00000000-0000-0001-0000-000000000003)", "/a h(rw" + tail[:len(tail)-1] + ",fsid=2)"},
		{"fsid once", "/a h(rw,fsid=9) g(rw)", "/a g(rw" + tail[:len(tail)-1] + ",fsid=9) h(rw" + tail[:len(tail)-1] + ",fsid=9)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.want != "" {
				tc.want += "\n"
			}
			if d := cmp.Diff(tc.want, mustParse(t, tc.in, nil).String()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseBad(t *testing.T) {
	long := strings.Repeat("x", 256)
	for _, tc := range []struct{ name, in, want string }{
		{"relative", "a h", "f:1: path a: not an absolute path"},
		{"dotdot", "/a/../b h", `f:1: path /a/../b: contains ".."`},
		{"nul", `/a\000b h`, `f:1: path "/a\x00b": contains a NUL byte`},
		{"long component", "/" + long + " h", "f:1: path /" + long[:79] + "...: a component is longer than 255 bytes"},
		{"quote", "\n/a \"h", "f:2: quote is not closed"},
		{"unknown option", "/a h(rw,speed)", "f:1: unknown option speed"},
		{"option case", "/a h(RW)", "f:1: unknown option RW"},
		{"value for flag", "/a h(rw=1)", "f:1: option rw takes no value"},
		{"durability", "/a h(durability=one-node)", "f:1: option durability=one-node: want durability=disk or durability=two-node"},
		{"durability of nothing", "/a h(durability)", "f:1: option durability: want durability=disk or durability=two-node"},
		{"anonuid", "/a h(anonuid=-2)", "f:1: option anonuid=-2: want a number from 0 to 4294967294"},
		{"anongid", "/a h(anongid=4294967295)", "f:1: option anongid=4294967295: want a number from 0 to 4294967294"},
		{"anonuid without value", "/a h(anonuid)", "f:1: option anonuid: want a number from 0 to 4294967294"},
		{"sec", "/a h(sec=krb5)", "f:1: option sec=krb5: only sec=sys is supported"},
		{"sec list", "/a h(sec=sys:krb5)", "f:1: option sec=sys:krb5: only sec=sys is supported"},
		{"fsid", "/a h(fsid=x)", "f:1: option fsid=x: want root, a number below 2^64, or a UUID"},
		{"fsid short uuid", "/a h(fsid=0000-01)", "f:1: option fsid=0000-01: want root, a number below 2^64, or a UUID"},
		{"dir", "/a h(dir=x)", "f:1: option dir=x: not an absolute path"},
		{"dir empty", "/a h(dir=)", "f:1: option dir=: not an absolute path"},
		{"mountpoint", "/a h(mountpoint=/x)", "f:1: option mountpoint is not supported: exports are directories of baton's name space, not mount points"},
		{"netgroup", "/a @ng(rw)", "f:1: client @ng: netgroups are not supported; list hosts or networks"},
		{"gss", "/a gss/krb5(rw)", "f:1: client gss/krb5: only sec=sys is supported"},
		{"bad v4", "/a 300.1.1.1", "f:1: client 300.1.1.1: not an IPv4 address"},
		{"short v4", "/a 10.1", "f:1: client 10.1: not an IPv4 address"},
		{"bad v6", "/a 2001::db8::1", "f:1: client 2001::db8::1: not an IPv6 address"},
		{"zone", "/a fe80::1%eth0", "f:1: client fe80::1%eth0: not an IPv6 address"},
		{"v4 wildcard", "/a 10.1.*", "f:1: client 10.1.*: wildcards do not work with addresses; give a network such as 192.0.2.0/24"},
		{"prefix", "/a 10.0.0.0/33", "f:1: client 10.0.0.0/33: want a prefix length from 0 to 32 or a netmask after the slash"},
		{"no prefix", "/a 10.0.0.0/", "f:1: client 10.0.0.0/: want a prefix length from 0 to 32 or a netmask after the slash"},
		{"netmask", "/a 10.0.0.0/255.0.255.0", "f:1: client 10.0.0.0/255.0.255.0: netmask has holes"},
		{"netmask family", "/a 2001:db8::/255.0.0.0", "f:1: client 2001:db8::/255.0.0.0: address and netmask are of different families"},
		{"network", "/a host/24", "f:1: client host/24: not a network address"},
		{"mapped network", "/a ::ffff:0:0/90", "f:1: client ::ffff:0:0/90: prefix of an IPv4-mapped address is shorter than 96"},
		{"class", "/a h[12].x", "f:1: client h[12].x: character classes are not supported; use * or ?"},
		{"host byte", "/a h%x", "f:1: client h%x: '%' does not belong in a host name"},
		{"host dots", "/a h..x", "f:1: client h..x: not a host name"},
		{"open paren", "/a h(rw", "f:1: client h(rw: no closing parenthesis at its end"},
		{"after paren", "/a h(rw)x", "f:1: client h(rw)x: no closing parenthesis at its end"},
		{"two parens", "/a h(rw)(ro)", "f:1: client h(rw)(ro): misplaced parenthesis"},
		{"stray paren", "/a h)", "f:1: client h): misplaced parenthesis"},
		{"duplicate", "/a h(rw)\n/a H.(ro)", "f:2: /a is exported to h twice; first in line 1"},
		{"duplicate network", "/a 10.0.0.0/8 10.1.0.0/255.0.0.0", "f:1: /a is exported to 10.0.0.0/8 twice; first in line 1"},
		{"fsid differs", "/a h(fsid=1) \\\n g(fsid=2)", "f:2: fsid=2 differs from fsid=1 for /a in line 1"},
		{"dir differs", "/a h(dir=/x) g(dir=/y)", "f:1: dir=/y differs from dir=/x for /a in line 1"},
		{"fsid twice", "/a h(fsid=1)\n/b h(fsid=1)", "f:2: /b has the fsid 1 of /a (line 1); give one of them another with fsid="},
		{"fsid hits default", fmt.Sprintf("/a h\n/b h(fsid=%d)", DefaultFSID("/a")),
			fmt.Sprintf("f:2: /b has the fsid %d of /a (line 1); give one of them another with fsid=", DefaultFSID("/a"))},
		{"all at once", "/a h(x,y)\nb\n/c 1.2.3\n/d -q g(rw)",
			"f:1: unknown option x\nf:1: unknown option y\nf:2: path b: not an absolute path\nf:3: client 1.2.3: not an IPv4 address\nf:4: unknown option q"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tab, err := Parse("f", []byte(tc.in), nil)
			if err == nil {
				t.Fatalf("no error; table:\n%s", tab)
			}
			if d := cmp.Diff(tc.want, err.Error()); d != "" {
				t.Error(d)
			}
			var e *Error
			if !errors.As(err, &e) || e.Line == 0 || e.Column == 0 {
				t.Errorf("no single fault in %#v", err)
			}
		})
	}
}

// TestHugeFiles: neither time nor memory may explode with a large
// file. There is no limit on the time here but the test binary's own.
func TestHugeFiles(t *testing.T) {
	var hosts, paths strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&hosts, " h%d(rw,anonuid=5)", i)
		fmt.Fprintf(&paths, "/p%d/x *(rw)\n", i)
	}
	if tab := mustParse(t, "/a"+hosts.String(), nil); len(tab.Exports()[0].Clients) != 20_000 {
		t.Error("hosts lost")
	}
	if tab := mustParse(t, paths.String(), nil); len(tab.Exports()) != 20_000 {
		t.Error("exports lost")
	}
	for _, unit := range []string{"x\n", "/a h(", "/a h(q,", "\\\n", "\"", "(", "/", "\\040"} {
		_, err := Parse("f", bytes.Repeat([]byte(unit), MaxFileSize/8/len(unit)), nil)
		var l Errors
		if errors.As(err, &l) && len(l) > maxErrors+1 {
			t.Errorf("%q: %d errors", unit, len(l))
		}
	}
}

func TestWarnings(t *testing.T) {
	tab := mustParse(t, "/a h (rw)\n/b\n/c *(rw)\n", nil)
	var got []string
	for _, w := range tab.Warnings() {
		got = append(got, w.Error())
	}
	want := []string{
		"exports:1: options (rw) without a client apply to everybody; remove the space before them if that is not meant",
		"exports:2: /b names no client and is exported to everybody; write *(...) if that is meant",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// fixedNames knows some clients; resolving makes known what was pending.
type fixedNames map[string][]string

func (f fixedNames) Lookup(a netip.Addr) ([]string, bool) {
	n, ok := f[a.String()]
	return n, ok
}

func (f fixedNames) Resolve(_ context.Context, a netip.Addr) error {
	f[a.String()] = []string{"late.example.org"}
	return nil
}

func TestMatch(t *testing.T) {
	names := fixedNames{
		"10.9.0.1": {"a.example.org"}, "10.9.0.2": {"b.sub.example.org"}, "10.9.0.3": {"c.other"}, "10.1.2.3": {"a.example.org"},
	}
	tab := mustParse(t, `
/a 10.1.2.3(rw,anonuid=1) 10.1.2.0/24(rw,anonuid=2) 10.1.0.0/16(rw,anonuid=3) a.example.org(rw,anonuid=4) \
   *.sub.example.org(rw,anonuid=5) *.example.org(rw,anonuid=6) 2001:db8::/32(rw,anonuid=7) ?.other(rw,anonuid=8)
/pub *(ro,insecure) 192.0.2.1(rw)
/hosts late.example.org(rw)
`, names)
	for _, tc := range []struct {
		path, addr string
		port       uint16
		want       Verdict
		anon       uint32
	}{
		{"/a", "10.1.2.3", 700, Allowed, 1},
		{"/a", "::ffff:10.1.2.3", 700, Allowed, 1},
		{"/a", "10.1.2.4", 700, Pending, 0}, // a host name is more specific than a network
		{"/a", "10.9.0.1", 1023, Allowed, 4},
		{"/a", "10.9.0.2", 700, Allowed, 5},
		{"/a", "10.9.0.3", 700, Allowed, 8},
		{"/a", "10.9.0.1", 1024, InsecurePort, 0},
		{"/a", "10.9.0.9", 700, Pending, 0},
		{"/b", "10.9.0.9", 700, NoExport, 0},
		{"/pub", "203.0.113.5", 50000, Allowed, Nobody},
		{"/pub", "192.0.2.1", 50000, InsecurePort, 0},
		{"/hosts", "10.9.0.1", 700, NotAllowed, 0},
	} {
		d, v := tab.MatchPath(tc.path, netip.MustParseAddr(tc.addr), tc.port)
		if v != tc.want || (d != nil) != (v == Allowed) || d != nil && d.AnonUID != tc.anon {
			t.Errorf("%s from %s:%d: %+v %v, want %v anon %d", tc.path, tc.addr, tc.port, d, v, tc.want, tc.anon)
		}
	}
	late := netip.MustParseAddr("10.1.2.9")
	if _, v := tab.MatchPath("/hosts", late, 700); v != Pending {
		t.Errorf("before Resolve: %v", v)
	}
	if err := tab.Resolve(context.Background(), late); err != nil {
		t.Fatal(err)
	}
	if _, v := tab.MatchPath("/hosts", late, 700); v != Allowed {
		t.Errorf("after Resolve: %v", v)
	}
	if d, v := tab.MatchPath("/a", late, 700); v != Allowed || d.AnonUID != 2 {
		t.Errorf("network once the name is known: %+v %v", d, v)
	}
	d, v := tab.MatchFSID(DefaultFSID("/pub"), netip.MustParseAddr("192.0.2.9"), 9)
	if v != Allowed || d.Path != "/pub" || !d.ReadOnly {
		t.Errorf("MatchFSID: %+v %v", d, v)
	}
	if _, v := new(Table).MatchFSID(1, late, 1); v != NoExport {
		t.Errorf("zero table: %v", v)
	}
}

func TestDurabilityIsDecidedPerClient(t *testing.T) {
	tab := mustParse(t, "/a 192.0.2.0/24(rw,durability=two-node) *(rw,insecure)\n", nil)
	for addr, want := range map[string]Durability{"192.0.2.7": DurabilityTwoNode, "203.0.113.7": DurabilityDisk} {
		d, v := tab.MatchPath("/a", netip.MustParseAddr(addr), 700)
		if v != Allowed || d.Durability != want {
			t.Errorf("%s: %v, %+v", addr, v, d)
		}
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	tab := mustParse(t, "/a 10.0.0.1 10.0.0.0/8 *.x.org *(rw)", fixedNamesNoAlloc{})
	addr := netip.MustParseAddr("::ffff:192.0.2.1")
	cred := wire.Cred{}
	if n := testing.AllocsPerRun(100, func() {
		d, v := tab.MatchFSID(DefaultFSIDOfA, addr, 3)
		if v != Allowed {
			t.Error(v)
			return
		}
		d.Squash(&cred, AuthSys)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

type fixedNamesNoAlloc struct{}

var someNames = []string{"q.y.org"}

func (fixedNamesNoAlloc) Lookup(netip.Addr) ([]string, bool)        { return someNames, true }
func (fixedNamesNoAlloc) Resolve(context.Context, netip.Addr) error { return nil }

var DefaultFSIDOfA = DefaultFSID("/a")

func TestDefaultFSIDIsStable(t *testing.T) {
	// Handles contain it: this number must never change.
	if got := DefaultFSID("/srv/data"); got != 0x96b53e47e3fc7c29 {
		t.Errorf("DefaultFSID = %#x", got)
	}
}

func TestSquash(t *testing.T) {
	in := wire.Cred{UID: 0, GID: 0, NGIDs: 3, GIDs: [16]uint32{0, 5, 0}}
	user := wire.Cred{UID: 7, GID: 8, NGIDs: 1, GIDs: [16]uint32{9}}
	anon := wire.Cred{UID: 1, GID: 2}
	for _, tc := range []struct {
		opts   string
		cred   wire.Cred
		flavor uint32
		want   wire.Cred
	}{
		{"root_squash", in, AuthSys, wire.Cred{UID: 1, GID: 2, NGIDs: 3, GIDs: [16]uint32{2, 5, 2}}},
		{"root_squash", user, AuthSys, user},
		{"root_squash", wire.Cred{UID: 7, GID: 0}, AuthSys, wire.Cred{UID: 7, GID: 2}},
		{"root_squash", in, AuthNone, anon},
		{"no_root_squash", in, AuthSys, in},
		{"no_root_squash", in, AuthNone, anon},
		{"no_root_squash", in, 6, anon},
		{"no_root_squash,all_squash", user, AuthSys, anon},
		{"all_squash,no_all_squash", user, AuthSys, user},
	} {
		tab := mustParse(t, "/a *(anonuid=1,anongid=2,"+tc.opts+")", nil)
		d, v := tab.MatchPath("/a", netip.MustParseAddr("10.0.0.1"), 5)
		if v != Allowed {
			t.Fatal(v)
		}
		got := tc.cred
		d.Squash(&got, tc.flavor)
		if got != tc.want {
			t.Errorf("%s flavor %d: %+v -> %+v, want %+v", tc.opts, tc.flavor, tc.cred, got, tc.want)
		}
	}
}

func TestFindPath(t *testing.T) {
	tab := mustParse(t, "/a h\n/a/b/c h\n/x h", nil)
	root := mustParse(t, "/ h\n/a h", nil)
	for _, tc := range []struct {
		tab            *Table
		in, path, rest string
		ok             bool
	}{
		{tab, "/a", "/a", "", true},
		{tab, "/a/", "/a", "", true},
		{tab, "//a//b", "/a", "b", true},
		{tab, "/a/b/c", "/a/b/c", "", true},
		{tab, "/a/b/c/d/e", "/a/b/c", "d/e", true},
		{tab, "/ab", "", "", false},
		{tab, "/", "", "", false},
		{tab, "", "", "", false},
		{tab, "a", "", "", false},
		{tab, "/a/../x", "", "", false},
		{root, "/", "/", "", true},
		{root, "/b/c", "/", "b/c", true},
		{root, "/a/c", "/a", "c", true},
	} {
		e, rest, ok := tc.tab.FindPath(tc.in)
		if ok != tc.ok || rest != tc.rest || ok && e.Path != tc.path {
			t.Errorf("%q: %v %q %v", tc.in, e, rest, ok)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, tc := range []struct{ flag, opts, want, err string }{
		{"data=/srv/d", FlagOptions, "/data *(rw,sync,wdelay,hide,no_subtree_check,secure,root_squash,no_all_squash,anonuid=65534,anongid=65534,dir=/srv/d)", ""},
		{"/data=/", QuickStartOptions, "/data *(rw,sync,wdelay,hide,no_subtree_check,insecure,no_root_squash,no_all_squash,anonuid=65534,anongid=65534,dir=/)", ""},
		{"data", FlagOptions, "/data *(rw,sync,wdelay,hide,no_subtree_check,secure,root_squash,no_all_squash,anonuid=65534,anongid=65534)", ""},
		{"my data=x", "", `/my\040data *(ro,sync,wdelay,hide,no_subtree_check,secure,root_squash,no_all_squash,anonuid=65534,anongid=65534,dir=/x)`, ""},
		{"=/x", "", "", "--export =/x:1: want NAME=PATH"},
		{"a=", "", "", "--export a=:1: want NAME=PATH"},
		{"a=/../x", "zoom", "", "--export a=/../x:1: unknown option zoom\n--export a=/../x:1: directory /../x: contains \"..\""},
	} {
		e, err := ParseFlag(tc.flag, tc.opts)
		got, msg := "", ""
		if err != nil {
			msg = err.Error()
		} else {
			got = e.String()
		}
		if got != tc.want || msg != tc.err {
			t.Errorf("%q: %s %s", tc.flag, got, msg)
		}
	}
	var b Builder
	b.Add("file", []byte("/a h"))
	b.AddFlag("b=/a", FlagOptions)
	b.AddFlag("a=/a", FlagOptions)
	b.AddFlag("a=/a", FlagOptions)
	if _, err := b.Table(nil); err == nil || err.Error() != "--export a=/a:1: /a is exported to * twice; first in line 1" {
		t.Errorf("flag given twice: %v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	p := filepath.Join(dir, "exports")
	if err := os.WriteFile(p, []byte("/a h(rw)\n/b h(bad)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(p, nil); err == nil || err.Error() != p+":2: unknown option bad" {
		t.Errorf("bad file: %v", err)
	}
	if err := os.WriteFile(p, make([]byte, MaxFileSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(p, nil); err == nil || !strings.Contains(err.Error(), "file is larger than") {
		t.Errorf("large file: %v", err)
	}
}

// TestPrintedTableParsesBack makes random tables and reads back what they print.
func TestPrintedTableParsesBack(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(l ...string) string { return l[rng.IntN(len(l))] }
	for range 300 {
		var src strings.Builder
		for e := range 1 + rng.IntN(4) {
			fmt.Fprintf(&src, "%s%d", pick("/a", `"/b c/d"`, `/e\040f#`, "/g,h=(", "/ä"), e)
			opts := func() string {
				return pick("ro", "rw") + "," + pick("sync", "async") + "," + pick("secure", "insecure") + "," +
					pick("root_squash", "no_root_squash") + "," + pick("all_squash", "no_all_squash") + "," +
					pick("wdelay", "no_wdelay") + "," + pick("hide", "nohide", "crossmnt") + "," +
					pick("subtree_check", "no_subtree_check") + pick("", ",durability=disk", ",durability=two-node") + fmt.Sprintf(",anonuid=%d,anongid=%d", rng.Uint32N(9), rng.Uint32N(9))
			}
			extra := pick("", fmt.Sprintf(",fsid=%d", e), `,dir=/q\040\054r`, ",dir=/")
			for _, c := range []string{"*", "h.x", "*.x", "10.0.0.0/8", "10.0.0.1", "2001:db8::/32", "::1"} {
				if rng.IntN(2) == 0 {
					fmt.Fprintf(&src, " %s(%s%s)", c, opts(), extra)
				}
			}
			src.WriteString("\n")
		}
		tab := mustParse(t, src.String(), nil)
		again := mustParse(t, tab.String(), nil)
		if d := cmp.Diff(tab.Exports(), again.Exports(), cmpAddr); d != "" {
			t.Fatalf("from\n%s\nprinted\n%s\n%s", src.String(), tab, d)
		}
	}
}

// fakeDNS is a Resolver whose answers tests change.
type fakeDNS struct {
	ptr   map[string][]string
	a     map[string][]string
	down  bool
	calls int
}

var errDown = errors.New("name service is down")

func (f *fakeDNS) LookupAddr(_ context.Context, a netip.Addr) ([]string, error) {
	f.calls++
	if f.down {
		return nil, errDown
	}
	return f.ptr[a.String()], nil
}

func (f *fakeDNS) LookupHost(_ context.Context, h string) ([]netip.Addr, error) {
	if f.down {
		return nil, errDown
	}
	var l []netip.Addr
	for _, s := range f.a[h] {
		l = append(l, netip.MustParseAddr(s))
	}
	return l, nil
}

func TestNameCache(t *testing.T) {
	dns := &fakeDNS{
		ptr: map[string][]string{"10.0.0.1": {"One.Example.org.", "liar.bank.com."}},
		a:   map[string][]string{"one.example.org": {"10.0.0.1"}, "liar.bank.com": {"10.9.9.9"}, "fwd.only": {"10.0.0.2", "10.0.0.1"}},
	}
	now := time.Unix(1000, 0)
	c := NewNameCache(NameConfig{Resolver: dns, Now: func() time.Time { return now }, MaxClients: 2})
	tab := mustParse(t, "/a fwd.only(rw) *.example.org(rw) *.bank.com(rw)", c)
	c.SetHosts(tab.Hosts())
	ctx := context.Background()
	a1 := netip.MustParseAddr("10.0.0.1")
	if _, known := c.Lookup(a1); known {
		t.Fatal("known before it was resolved")
	}
	if err := c.Resolve(ctx, a1); err != nil {
		t.Fatal(err)
	}
	got, known := c.Lookup(a1)
	if d := cmp.Diff([]string{"fwd.only", "one.example.org"}, got); d != "" || !known {
		t.Errorf("known %v: %s", known, d)
	}
	if err := c.Resolve(ctx, a1); err != nil || dns.calls != 1 {
		t.Errorf("a known client was resolved again: %v, %d calls", err, dns.calls)
	}

	// Stale: still used, and queued once for the refresher.
	now = now.Add(6 * time.Minute)
	dns.down = true
	for range 3 {
		if _, known := c.Lookup(a1); !known {
			t.Error("stale names are not used")
		}
	}
	if len(c.queue) != 1 {
		t.Errorf("%d refreshes queued", len(c.queue))
	}
	c.refresh(ctx, <-c.queue)
	if got, _ := c.Lookup(a1); len(got) != 2 {
		t.Errorf("names lost while the name service is down: %v", got)
	}
	now = now.Add(time.Hour)
	if _, known := c.Lookup(a1); known {
		t.Error("names outlived StaleFor")
	}
	// Down and nothing known: no names, and known to have none.
	if err := c.Resolve(ctx, a1); err != nil {
		t.Fatal(err)
	}
	if got, known := c.Lookup(a1); !known || len(got) != 0 {
		t.Errorf("after failed lookups: %v %v", got, known)
	}

	// Bounded.
	dns.down = false
	for i := range 10 {
		if err := c.Resolve(ctx, netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.addrs) > 2 {
		t.Errorf("%d clients remembered", len(c.addrs))
	}
	// A new host name makes old answers incomplete.
	c.SetHosts([]string{"fwd.only", "new.host"})
	if len(c.addrs) != 0 {
		t.Error("answers survived a new host name")
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Resolve(ended, a1); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	if _, known := c.Lookup(a1); known {
		t.Error("an interrupted lookup was remembered")
	}
}

func TestNameCacheRunEnds(t *testing.T) {
	c := NewNameCache(NameConfig{Resolver: &fakeDNS{}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { c.Run(ctx); close(done) }()
	cancel()
	<-done
}

func FuzzParse(f *testing.F) {
	f.Add("/a h(rw)\n/b *(ro,fsid=3,dir=/x) 10.0.0.0/8\n")
	f.Add("\"/a b\" -rw,anonuid=5 \\\n *.x(sync) # c\n")
	f.Add("/a\\040b @n (\n\"")
	f.Fuzz(func(t *testing.T, src string) {
		tab, err := Parse("f", []byte(src), nil)
		if err != nil {
			var l Errors
			if !errors.As(err, &l) || len(l) == 0 {
				t.Fatalf("error without faults: %v", err)
			}
			return
		}
		again, err := Parse("f", []byte(tab.String()), nil)
		if err != nil {
			t.Fatalf("printed table is refused:\n%s\n%v", tab, err)
		}
		if d := cmp.Diff(tab.Exports(), again.Exports(), cmpAddr); d != "" {
			t.Fatal(d)
		}
	})
}

func BenchmarkMatchFSID(b *testing.B) {
	tab := mustParse(b, "/a 10.0.0.1 10.0.0.0/8 192.168.0.0/16 *(rw)", nil)
	addr := netip.MustParseAddr("192.168.3.4")
	b.ReportAllocs()
	for b.Loop() {
		tab.MatchFSID(DefaultFSIDOfA, addr, 700)
	}
}
