package locks

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

func args(host string, svid int, start, end uint64, excl bool) *wire.LockArgs {
	return &wire.LockArgs{
		Owner: wire.LockOwner{LockHost: wire.LockHost{VIP: 1, Addr: netip.MustParseAddr("10.0.0.1"), Name: host},
			Svid: uint32(svid), OH: fmt.Sprint(svid)},
		Range: wire.LockRange{Start: start, End: end}, Exclusive: excl, Monitor: true,
	}
}

func lockOK(t testing.TB, tb *Table, fid wire.FID, a *wire.LockArgs) {
	t.Helper()
	if st, h := tb.Lock(1, fid, a); st != wire.OK {
		t.Fatalf("lock %v %v: %v by %v", a.Owner, a.Range, st, h)
	}
}

// TestListPages reads all entries, and those of one file and address, page by
// page while entries go.
func TestListPages(t *testing.T) {
	tb := New(Limits{}, 100)
	for i := range 1000 {
		a := args("a", i%7, uint64(10*i), uint64(10*i), true)
		a.Owner.VIP = uint32(1 + i%2)
		lockOK(t, tb, fidOf(i%3), a)
	}
	for i := 0; i < 1000; i += 2 {
		if st, n := tb.Release(1, uint64(100+i)); st != wire.OK || n != 1 {
			t.Fatalf("release %d: %v %d", i, st, n)
		}
	}
	for _, c := range []struct {
		fid  wire.FID
		vip  uint32
		all  bool
		want int
	}{{wire.FID{}, 0, true, 500}, {wire.FID{}, 2, false, 500}, {wire.FID{}, 1, false, 0}, {fidOf(1), 2, false, 167}, {fidOf(9), 2, false, 0}} {
		got, last := 0, uint64(0)
		for {
			l, eof := tb.List(c.fid, c.vip, c.all, last, 7)
			if len(l) > 7 || len(l) == 0 && !eof {
				t.Fatalf("page of %d, eof %v", len(l), eof)
			}
			for _, h := range l {
				if h.ID <= last || !c.fid.IsZero() && h.FID != c.fid {
					t.Fatalf("%+v after %d", h, last)
				}
				last = h.ID
				got++
			}
			if eof {
				break
			}
		}
		if got != c.want {
			t.Errorf("%+v: %d entries, want %d", c, got, c.want)
		}
	}
	if !tb.HasFile(fidOf(1)) || tb.HasFile(fidOf(9)) {
		t.Error("HasFile")
	}
}

// TestPendingPages: grants by Seq, none twice, and Granted tells of new ones.
func TestPendingPages(t *testing.T) {
	tb := New(Limits{}, 1)
	lockOK(t, tb, fidOf(0), args("a", 0, 0, 99, true))
	for i := range 50 {
		a := args("b", i, uint64(i), uint64(i), true)
		a.Block, a.Note = true, []byte{byte(i)}
		if st, _ := tb.Lock(1, fidOf(0), a); st != wire.ErrLockBlocked {
			t.Fatal(st)
		}
	}
	if tb.Granted() {
		t.Error("grants before the unlock")
	}
	tb.Unlock(1, fidOf(0), args("a", 0, 0, 99, true))
	if !tb.Granted() || tb.Granted() {
		t.Error("Granted is not true once")
	}
	last, n := uint64(0), 0
	for {
		l := tb.Pending(1, last, 8)
		if len(l) == 0 {
			break
		}
		for _, g := range l {
			if g.Seq <= last || int(g.Note[0]) != n || g.Range.Start != uint64(n) {
				t.Fatalf("grant %+v, want number %d", g, n)
			}
			last = g.Seq
			n++
		}
	}
	if n != 50 || len(tb.Pending(2, 0, 0)) != 0 {
		t.Errorf("%d grants", n)
	}
}

// TestMemoryFreed: nothing is kept of files, owners and hosts that are empty.
func TestMemoryFreed(t *testing.T) {
	tb := New(Limits{}, 1)
	for i := range 2000 {
		a := args(fmt.Sprint("h", i%20), i, uint64(2*i), uint64(2*i), i%2 == 0)
		a.Monitor = false
		lockOK(t, tb, fidOf(i%100), a)
		b := args("w", i, uint64(2*i), uint64(2*i), true)
		b.Block, b.Monitor = true, false
		if st, _ := tb.Lock(1, fidOf(i%100), b); st != wire.ErrLockBlocked {
			t.Fatal(st)
		}
	}
	for i := range 2000 {
		tb.Unlock(1, fidOf(i%100), args("w", i, 0, wire.MaxLockOffset, true))
		tb.Unlock(1, fidOf(i%100), args(fmt.Sprint("h", i%20), i, 0, wire.MaxLockOffset, true))
	}
	tb.Take(func(Change) {})
	if why := checkTable(tb); why != "" {
		t.Error(why)
	}
	if n := len(tb.files) + len(tb.fos) + len(tb.hosts) + len(tb.ids.l) + len(tb.waitFiles) + len(tb.vips[0].grants.l); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// TestBounds: arguments out of bounds are refused and change nothing.
func TestBounds(t *testing.T) {
	tb := New(Limits{}, 1)
	long := strings.Repeat("x", wire.MaxLockHostName+1)
	for i, f := range []func(*wire.LockArgs){
		func(a *wire.LockArgs) { a.Owner.Name = long },
		func(a *wire.LockArgs) { a.Owner.OH = long },
		func(a *wire.LockArgs) { a.Note = []byte(long) },
		func(a *wire.LockArgs) { a.Range = wire.LockRange{Start: 5, End: 4} },
		func(a *wire.LockArgs) { a.Range.End = wire.MaxLockOffset + 1 },
		func(a *wire.LockArgs) { a.Owner.Addr = netip.MustParseAddr("fe80::1%" + long) },
	} {
		a := args("a", 1, 0, 9, true)
		f(a)
		st, _ := tb.Lock(1, fidOf(0), a)
		st2, _ := tb.Test(1, fidOf(0), a)
		if un, ca := tb.Unlock(1, fidOf(0), a), tb.Cancel(1, fidOf(0), a); st != wire.ErrProto || st2 != st || un != st || ca != st {
			t.Errorf("case %d: %v %v %v %v", i, st, st2, un, ca)
		}
	}
	if st := tb.Monitor(1, wire.LockHost{Name: long}, nil); st != wire.ErrProto {
		t.Error(st)
	}
	if tb.Changed() || len(tb.hosts) > 0 {
		t.Error("something changed")
	}
	// An address and its IPv6 form are one host.
	a := args("a", 1, 0, 9, true)
	a.Owner.Addr = netip.MustParseAddr("::ffff:10.0.0.1")
	lockOK(t, tb, fidOf(0), args("a", 1, 0, 9, true))
	lockOK(t, tb, fidOf(0), a)
	if tb.Stats().Locks != 1 {
		t.Error("two hosts of one address")
	}
}

// TestLongQueue: thousands of requests behind each other, by owners that all
// hold something (so that the deadlock search runs into its bound), get the lock
// one after the other in order.
func TestLongQueue(t *testing.T) {
	tb := New(Limits{}, 1)
	lockOK(t, tb, fidOf(0), args("a", 0, 0, 0, true))
	n := 500
	if testing.Short() {
		n = 200
	}
	for i := range n {
		lockOK(t, tb, fidOf(1), args("b", i, uint64(2*i), uint64(2*i), true))
		b := args("b", i, 0, 0, true)
		b.Block = true
		if st, _ := tb.Lock(1, fidOf(0), b); st != wire.ErrLockBlocked {
			t.Fatal(st)
		}
	}
	for i := range n {
		if g := tb.Pending(1, 0, 0); len(g) != i && len(g) != 1 {
			t.Fatalf("%d grants", len(g))
		}
		for _, g := range tb.Pending(1, 0, 0) {
			if int(g.Owner.Svid) != i-1 {
				t.Fatalf("grant %d goes to %v", i, g.Owner)
			}
			tb.GrantDone(1, g.Owner.LockHost, g.ID, wire.GrantAccepted)
			tb.Unlock(1, fidOf(0), args("b", i-1, 0, 0, true))
		}
		if i == 0 {
			tb.Unlock(1, fidOf(0), args("a", 0, 0, 0, true))
		}
	}
}

// records gives a few records of every kind.
func records(t testing.TB) map[string][]byte {
	tb := New(Limits{}, 1)
	tb.Service(1, 1, &wire.LockArgs{NSMState: 3, Crashed: true, Window: 100})
	lockOK(t, tb, fidOf(0), args("a", 1, 0, wire.MaxLockOffset, true))
	b := args("b", 2, 5, 6, false)
	b.Block, b.Note = true, []byte("note")
	b.Owner.Addr = netip.MustParseAddr("fe80::1%eth0")
	tb.Lock(1, fidOf(0), b)
	b.ShareMode, b.ShareAccess = 1, 2
	tb.Share(1, fidOf(1), b)
	tb.Monitor(1, b.Owner.LockHost, []byte("who"))
	m := map[string][]byte{}
	tb.Take(func(c Change) { m[string(c.Key)] = bytes.Clone(c.Value) })
	return m
}

// TestDamageFound: every flipped bit, every truncation, and a value under
// another key are found; what is damaged is deleted and noted for good.
func TestDamageFound(t *testing.T) {
	recs := records(t)
	for _, k := range sortedKeys(toStrings(recs)) {
		v := recs[k]
		for i := range len(v) * 8 {
			w := bytes.Clone(v)
			w[i/8] ^= 1 << (i % 8)
			if r, err := DecodeRecord([]byte(k), w); err == nil {
				t.Errorf("%x with bit %d flipped is %+v", k, i, r)
			}
		}
		for i := range v {
			if _, err := DecodeRecord([]byte(k), v[:i]); err == nil {
				t.Errorf("%x of %d bytes", k, i)
			}
		}
		for k2, v2 := range recs {
			if _, err := DecodeRecord([]byte(k), v2); k2 != k && err == nil {
				t.Errorf("%x taken for %x", k2, k)
			}
		}
		tb := New(Limits{}, 1)
		for k2, v2 := range recs {
			if k2 == k {
				v2 = v2[1:]
			}
			if err := tb.Load([]byte(k2), v2); (err != nil) != (k2 == k) {
				t.Fatal(err)
			}
		}
		tb.Loaded(1)
		gone, noted := false, false
		tb.Take(func(c Change) {
			gone = gone || string(c.Key) == k && c.Value == nil
			noted = noted || c.Key[1] == kindMeta && c.Value != nil
		})
		if !tb.Damaged() || !noted || !gone && k[1] != kindMeta && k[1] != kindHost {
			t.Errorf("damage of %x: damaged %v, noted %v, deleted %v", k, tb.Damaged(), noted, gone)
		}
		if st, _ := tb.Lock(1, fidOf(5), args("n", 1, 0, 0, true)); st != wire.ErrLockGrace {
			t.Errorf("lock with %x damaged: %v", k, st)
		}
	}
}

func toStrings(m map[string][]byte) map[string]string {
	s := map[string]string{}
	for k, v := range m {
		s[k] = string(v)
	}
	return s
}

// FuzzDecodeRecord: no input crashes the decoder, and what it accepts loads and
// is written the same again. The checksum is made right, or nothing would pass.
func FuzzDecodeRecord(f *testing.F) {
	for k, v := range records(f) {
		f.Add([]byte(k), v[:len(v)-4])
	}
	f.Fuzz(func(t *testing.T, key, body []byte) {
		_, _ = DecodeRecord(key, body)
		value := seal(key, bytes.Clone(body))
		rec, err := DecodeRecord(key, value)
		if err != nil {
			return
		}
		tb := New(Limits{}, 1)
		if err := tb.Load(key, value); err != nil {
			t.Fatal(err)
		}
		tb.Loaded(1)
		var got []byte
		switch r := rec.(type) {
		case *EntryRecord:
			got = seal(key, tb.ids.get(r.Holder.ID).value(nil))
		case *HostRecord:
			got = seal(key, tb.hosts[r.Host.Host].value(nil))
		case *VIPRecord:
			got = seal(key, tb.findVIP(r.VIP).value(nil))
		default:
			return
		}
		if !bytes.Equal(got, value) {
			t.Errorf("%+v is written as %x, was %x", rec, got, value)
		}
		if why := checkTable(tb); why != "" {
			t.Error(why)
		}
	})
}

// held makes a table of n locks of one host.
func held(b *testing.B, n, files int, excl bool) *Table {
	tb := New(Limits{PerHost: 2 * n}, 1)
	for i := range n {
		j := uint64(i) * 7919 % uint64(n)
		lockOK(b, tb, wire.FID{Seq: 2, OID: uint32(i%files + 1)}, args("a", i%8, 4*j, 4*j+1, excl))
	}
	tb.Take(func(Change) {})
	return tb
}

// BenchmarkLockUnlock: a lock and its unlock, with their records taken, among
// 100,000 held locks of one host.
func BenchmarkLockUnlock(b *testing.B) {
	const n = 100_000
	for _, c := range []struct {
		name  string
		files int
		excl  bool
	}{{"one-file", 1, true}, {"one-file-shared", 1, false}, {"many-files", n, true}} {
		b.Run(c.name, func(b *testing.B) {
			tb := held(b, n, c.files, c.excl)
			a := args("a", 3, 0, 0, c.excl)
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				j := uint64(i) * 6151 % n
				a.Range = wire.LockRange{Start: 4*j + 3, End: 4*j + 3}
				fid := wire.FID{Seq: 2, OID: uint32(int(j)%c.files + 1)}
				if st, _ := tb.Lock(1, fid, a); st != wire.OK {
					b.Fatal(st)
				}
				tb.Take(func(Change) {})
				tb.Unlock(1, fid, a)
				tb.Take(func(Change) {})
			}
		})
	}
}

// BenchmarkReaders: a shared lock of the whole file among 100,000 of others.
func BenchmarkReaders(b *testing.B) {
	const n = 100_000
	tb := New(Limits{PerHost: 2 * n}, 1)
	for i := range n {
		lockOK(b, tb, fidOf(0), args("a", i, 0, wire.MaxLockOffset, false))
	}
	a, x := args("b", 1, 0, wire.MaxLockOffset, false), args("c", 1, 0, 5, true)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if st, _ := tb.Lock(1, fidOf(0), a); st != wire.OK {
			b.Fatal(st)
		}
		if st, _ := tb.Test(1, fidOf(0), x); st != wire.ErrLockDenied {
			b.Fatal(st)
		}
		tb.Unlock(1, fidOf(0), a)
		tb.Take(func(Change) {})
	}
}

// BenchmarkHandOver: one waiter gets the lock with 1000 behind it.
func BenchmarkHandOver(b *testing.B) {
	tb := New(Limits{}, 1)
	const n = 1000
	lockOK(b, tb, fidOf(0), args("a", n, 0, 9, true))
	wait := func(i int) {
		a := args("a", i, 0, 9, true)
		a.Block = true
		if st, _ := tb.Lock(1, fidOf(0), a); st != wire.ErrLockBlocked {
			b.Fatal(st)
		}
	}
	for i := range n {
		wait(i)
	}
	b.ResetTimer()
	for i := range b.N {
		holder := (i + n) % (n + 1)
		tb.Unlock(1, fidOf(0), args("a", holder, 0, 9, true))
		g := tb.Pending(1, 0, 1)[0]
		tb.GrantDone(1, g.Owner.LockHost, g.ID, wire.GrantAccepted)
		wait(holder)
		tb.Take(func(Change) {})
	}
}
