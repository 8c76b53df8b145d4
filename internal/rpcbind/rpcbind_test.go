package rpcbind

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/cockroachdb/datadriven"
)

var procNames = map[string]uint32{
	"2 null": 0, "2 set": 1, "2 unset": 2, "2 getport": 3, "2 dump": 4, "2 callit": 5,
	"null": 0, "set": 1, "unset": 2, "getaddr": 3, "dump": 4, "bcast": 5, "gettime": 6, "uaddr2taddr": 7,
	"taddr2uaddr": 8, "getversaddr": 9, "indirect": 10, "getaddrlist": 11, "getstat": 12,
}

func own() *Table {
	t := &Table{}
	for _, n := range []string{TCP, UDP, TCP6, UDP6} {
		for v := uint32(2); v <= 4; v++ {
			t.Set(Mapping{Prog: Program, Vers: v, Netid: n, Port: 111})
		}
		t.Set(Mapping{Prog: 100005, Vers: 3, Netid: n, Port: 20048})
	}
	t.Set(Mapping{Prog: 100003, Vers: 3, Netid: TCP, Port: 2049})
	t.Set(Mapping{Prog: 100003, Vers: 3, Netid: TCP6, Port: 2049})
	return t
}

// TestServe runs golden transcripts. A line is VERSION PROC ARGS; an argument
// is a number, a quoted string or x and hex bytes of an opaque.
func TestServe(t *testing.T) {
	datadriven.Walk(t, "testdata/serve", func(t *testing.T, path string) {
		s := &Server{Table: own(), Now: func() time.Time { return time.Unix(0x12345678, 0) }}
		q := question{remote: netip.MustParseAddrPort("192.0.2.9:800"), local: netip.MustParseAddrPort("192.0.2.1:111"), udp: true}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "peer":
				for _, a := range d.CmdArgs {
					switch a.Key {
					case "remote":
						q.remote = netip.MustParseAddrPort(a.Vals[0])
					case "local":
						q.local = netip.MustParseAddrPort(a.Vals[0])
					case "tcp":
						q.udp = false
					case "udp":
						q.udp = true
					}
				}
				return "ok\n"
			case "call":
				var out strings.Builder
				for line := range strings.Lines(d.Input) {
					f := strings.Fields(line)
					vers, err := strconv.Atoi(f[0])
					if err != nil {
						d.Fatalf(t, "%v", err)
					}
					proc, ok := procNames[f[0]+" "+f[1]]
					if !ok {
						if proc, ok = procNames[f[1]]; !ok {
							d.Fatalf(t, "procedure %s", f[1])
						}
					}
					q.vers, q.proc = uint32(vers), proc
					q.args = encodeArgs(t, d, f[2:])
					var w xdr.Writer
					out.WriteString(strings.TrimSpace(line) + "\n")
					switch s.serve(&q, &w) {
					case success:
						if len(w.Buf) == 0 {
							out.WriteString("  void\n")
						}
						for l := range strings.Lines(hex.Dump(w.Buf)) {
							out.WriteString("  " + l[10:])
						}
					case procUnavail:
						out.WriteString("  PROC_UNAVAIL\n")
					case garbageArgs:
						out.WriteString("  GARBAGE_ARGS\n")
					case noReply:
						out.WriteString("  no reply\n")
					}
				}
				return out.String()
			}
			d.Fatalf(t, "unknown command")
			return ""
		})
	})
}

func encodeArgs(t *testing.T, d *datadriven.TestData, args []string) []byte {
	var w xdr.Writer
	for _, a := range args {
		switch {
		case a[0] == '"':
			s, err := strconv.Unquote(a)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			w.String(s)
		case a[0] == 'x':
			b, err := hex.DecodeString(a[1:])
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			w.Opaque(b)
		default:
			n, err := strconv.ParseUint(a, 0, 32)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			w.Uint32(uint32(n))
		}
	}
	return w.Buf
}

func TestTableIsBounded(t *testing.T) {
	s := &Server{Table: own()}
	q := question{vers: 2, proc: pmapSet, remote: netip.MustParseAddrPort("127.0.0.1:700"), local: netip.MustParseAddrPort("127.0.0.1:111")}
	full := false
	for i := range uint32(maxEntries + 10) {
		var a, w xdr.Writer
		putMapping(&a, 0x40000000+i, 1, 6, 5000)
		q.args = a.Buf
		if s.serve(&q, &w) != success {
			t.Fatal("not served")
		}
		full = w.Buf[3] == 0
	}
	if !full || len(s.Table.List()) != maxEntries {
		t.Errorf("%d entries, last SET refused %v", len(s.Table.List()), full)
	}
	s.Table.Unset(100005)
	for _, m := range s.Table.List() {
		if m.Prog == 100005 {
			t.Errorf("still there: %+v", m)
		}
	}
}

func TestMappings(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	got := show(Mappings(100005, []uint32{1, 3}, []netip.Addr{v6, v4, v4}, 5, 6)) + show(Mappings(100003, []uint32{3}, []netip.Addr{v6}, 7, 0))
	want := "100005.1 tcp 5\n100005.1 udp 6\n100005.3 tcp 5\n100005.3 udp 6\n100005.1 tcp6 5\n100005.1 udp6 6\n100005.3 tcp6 5\n100005.3 udp6 6\n100003.3 tcp6 7\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestUaddr(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1.8.1": "192.0.2.1:2049", "::1.0.111": "[::1]:111", "0.0.0.0.255.255": "0.0.0.0:65535",
		"::ffff:10.0.0.1.1.0": "10.0.0.1:256",
	} {
		a, err := ParseUaddr(in)
		if err != nil || a != netip.MustParseAddrPort(want) {
			t.Errorf("ParseUaddr(%q) = %v, %v, want %s", in, a, err, want)
		}
	}
	for _, in := range []string{"", ".", "1.2", "192.0.2.1", "192.0.2.1.8.256", "192.0.2.1.-1.1", "x.1.1", strings.Repeat("1.", 300)} {
		if a, err := ParseUaddr(in); err == nil {
			t.Errorf("ParseUaddr(%q) = %v, want an error", in, a)
		}
	}
}

func TestDecodeReply(t *testing.T) {
	words := func(v ...uint32) []byte {
		var w xdr.Writer
		for _, x := range v {
			w.Uint32(x)
		}
		return w.Buf
	}
	for _, c := range []struct {
		name string
		b    []byte
		want string
	}{
		{"ok", words(7, 1, 0, 0, 0, 0, 99), ""},
		{"other xid", words(8, 1, 0, 0, 0, 0, 99), "another call"},
		{"a call", words(7, 0, 2), "not a reply"},
		{"denied", words(7, 1, 1, 0, 2, 2), "denied"},
		{"unavailable", words(7, 1, 0, 0, 0, 2, 2, 3), "unavailable"},
		{"system error", words(7, 1, 0, 0, 0, 5), "accept_stat 5"},
		{"short", words(7, 1, 0, 0), "short"},
		{"long verifier", words(7, 1, 0, 0, 0xffffffff, 0), "limit"},
		{"empty", nil, "short"},
	} {
		res, err := decodeReply(c.b, 7)
		if c.want == "" && (err != nil || len(res) != 4) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %x, %v, want %q", c.name, res, err, c.want)
		}
	}
}

func TestReadRecord(t *testing.T) {
	for _, c := range []struct{ in, want, err string }{
		{"80000004" + "00000007", "00000007", ""},
		{"00000002" + "0000" + "80000002" + "0007", "00000007", ""},
		{"ffffffff", "", "longer than"},
		{"80002001", "", "longer than"},
		{"80000004" + "0000", "", "EOF"},
		{strings.Repeat("00000000", 100), "", "longer than"},
	} {
		in, err := hex.DecodeString(c.in)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readRecord(strings.NewReader(string(in)))
		if hex.EncodeToString(got) != c.want || c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%.40s: %x, %v, want %s %q", c.in, got, err, c.want, c.err)
		}
	}
}

func TestGetPort(t *testing.T) {
	f := startFake(t, own())
	ctx := context.Background()
	local := netip.MustParseAddr("127.0.0.1")
	for _, c := range []struct {
		prog  uint32
		netid string
		port  uint16
	}{{100005, TCP, 20048}, {100005, UDP, 20048}, {100003, TCP, 2049}, {100003, UDP, 0}, {100021, TCP, 0}} {
		p, err := GetPort(ctx, local, f.addr, c.prog, 3, c.netid)
		if p != c.port || (c.port == 0) != errors.Is(err, ErrNotRegistered) {
			t.Errorf("%d %s: %d, %v, want %d", c.prog, c.netid, p, err, c.port)
		}
	}
	// A lost first datagram is sent again.
	f.dropNext.Store(1)
	if p, err := GetPort(ctx, netip.Addr{}, f.addr, 100005, 3, UDP); p != 20048 || err != nil {
		t.Errorf("after a loss: %d, %v", p, err)
	}
	cctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := GetPort(cctx, local, f.addr, 100005, 3, UDP); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestGetPortIPv6(t *testing.T) {
	f := startFakeAt(t, own(), "[::1]:0")
	if f == nil {
		t.Skip("no IPv6 loopback here")
	}
	p, err := GetPort(context.Background(), netip.Addr{}, f.addr, 100003, 3, TCP6)
	if p != 2049 || err != nil {
		t.Errorf("%d, %v", p, err)
	}
	if _, err := GetPort(context.Background(), netip.Addr{}, f.addr, 100003, 3, UDP6); !errors.Is(err, ErrNotRegistered) {
		t.Errorf("udp6: %v", err)
	}
}

var ours = []Mapping{
	{Prog: 100003, Vers: 3, Netid: TCP, Port: 2049},
	{Prog: 100003, Vers: 3, Netid: TCP6, Port: 2049},
	{Prog: 100005, Vers: 3, Netid: UDP, Port: 20048},
}

func show(ms []Mapping) string {
	var b strings.Builder
	for _, m := range ms {
		fmt.Fprintf(&b, "%d.%d %s %d\n", m.Prog, m.Vers, m.Netid, m.Port)
	}
	return b.String()
}

func TestRegistrar(t *testing.T) {
	ctx := context.Background()
	f := startFake(t, &Table{})
	f.trustAll = true
	sys := System{Addr: f.addr.String()}
	if !sys.Available(ctx) {
		t.Fatal("not available")
	}
	// A leftover of a predecessor on another port is replaced.
	f.srv.Table.add(Mapping{Prog: 100003, Vers: 3, Netid: TCP, Port: 1})
	r := &Registrar{System: sys, Mappings: ours, Every: 5 * time.Millisecond}
	if err := r.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got, want := show(f.srv.Table.List()), show(ours); got != want {
		t.Errorf("registered:\n%swant:\n%s", got, want)
	}
	// rpcbind forgets everything, as it does when it restarts.
	f.srv.Table.mu.Lock()
	f.srv.Table.m = nil
	f.srv.Table.mu.Unlock()
	for i := 0; show(f.srv.Table.List()) != show(ours); i++ {
		if i == 2000 {
			t.Fatalf("not registered again: %s", show(f.srv.Table.List()))
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := r.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if l := f.srv.Table.List(); len(l) != 0 {
		t.Errorf("left after Stop: %s", show(l))
	}
}

func TestRegistrarOldPortmapper(t *testing.T) {
	f := startFake(t, &Table{})
	f.trustAll, f.only2 = true, true
	r := &Registrar{System: System{Addr: f.addr.String()}, Mappings: ours, Every: time.Hour}
	if err := r.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got, want := show(f.srv.Table.List()), "100003.3 tcp 2049\n100005.3 udp 20048\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if err := r.Stop(context.Background()); err != nil || len(f.srv.Table.List()) != 0 {
		t.Errorf("stop: %v, %s", err, show(f.srv.Table.List()))
	}
}

func TestRegistrarRefused(t *testing.T) {
	f := startFake(t, own()) // owned by another
	f.trustAll = true
	r := &Registrar{System: System{Addr: f.addr.String()}, Mappings: []Mapping{{Prog: 100003, Vers: 3, Netid: TCP, Port: 9}}}
	err := r.Start(context.Background())
	want := "rpcbind: program 100003 version 3 on tcp is registered by another server or rpcbind refuses us; stop the other server (rpcinfo -p shows it) or run baton as root"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	gone := System{Addr: "127.0.0.1:1", Socket: "/does/not/exist"}
	if gone.Available(context.Background()) {
		t.Error("available where nothing listens")
	}
	if err := (&Registrar{System: gone, Mappings: ours}).Start(context.Background()); err == nil {
		t.Error("registered where nothing listens")
	}
}

func FuzzServe(f *testing.F) {
	var w xdr.Writer
	putRpcb(&w, 100003, 3, "tcp", "0.0.0.0.8.1", "x")
	f.Add(uint32(4), uint32(1), w.Buf, true)
	var m xdr.Writer
	putMapping(&m, 100003, 3, 6, 2049)
	f.Add(uint32(2), uint32(3), m.Buf, false)
	f.Add(uint32(3), uint32(8), []byte{0, 0, 0, 16, 0xff, 0xff, 0xff, 0xff}, true)
	f.Fuzz(func(t *testing.T, vers, proc uint32, args []byte, local bool) {
		s := &Server{Table: own()}
		q := question{vers: vers, proc: proc, args: args, remote: netip.MustParseAddrPort("192.0.2.3:900"), local: netip.MustParseAddrPort("192.0.2.1:111")}
		if local {
			q.remote, q.local = netip.MustParseAddrPort("127.0.0.1:900"), netip.MustParseAddrPort("127.0.0.1:111")
		}
		before := show(s.Table.List())
		var w xdr.Writer
		s.serve(&q, &w)
		if len(w.Buf)%4 != 0 || len(w.Buf) > 64<<10 {
			t.Fatalf("answer of %d bytes", len(w.Buf))
		}
		after := show(s.Table.List())
		if !strings.HasPrefix(after, before) || !local && after != before {
			t.Fatalf("the table changed:\n%s", after)
		}
	})
}

func FuzzDecodeReply(f *testing.F) {
	f.Add([]byte{0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		res, err := decodeReply(b, 7)
		if err == nil && len(b) < 24+len(res) {
			t.Fatal("results out of nowhere")
		}
	})
}

func FuzzUaddr(f *testing.F) {
	f.Add("192.0.2.1.8.1")
	f.Add("fe80::1%eth0.8.1")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseUaddr(s)
		if err != nil {
			return
		}
		b, err := ParseUaddr(FormatUaddr(a))
		if err != nil || b.Port() != a.Port() || b.Addr() != a.Addr().WithZone("") {
			t.Fatalf("%q -> %v -> %v, %v", s, a, b, err)
		}
	})
}
