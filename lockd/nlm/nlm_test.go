package nlm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

// message is what every argument and result type is.
type message interface {
	Decode(*xdr.Reader, uint32) error
	Encode(*xdr.Writer, uint32)
}

var kinds = []func() message{
	func() message { return new(TestArgs) },
	func() message { return new(LockArgs) },
	func() message { return new(CancelArgs) },
	func() message { return new(UnlockArgs) },
	func() message { return new(ShareArgs) },
	func() message { return new(Notify) },
	func() message { return new(Res) },
	func() message { return new(TestRes) },
	func() message { return new(ShareRes) },
	func() message { return new(Lock) },
}

func lock(off, n uint64) Lock {
	return Lock{CallerName: []byte("host1"), FH: []byte{1, 2, 3, 4}, OH: []byte("9@h"), Svid: 9, Offset: off, Len: n}
}

// The words of lock(), without the range: caller_name, fh, oh, svid.
const lockHex = "00000005 686f737431000000" + "00000004 01020304" + "00000003 39406800" + "00000009"

// vectors were written down by hand from the XDR of XNFS.
var vectors = []struct {
	name string
	vers uint32
	msg  message
	hex  string
}{
	{"testargs v4", 4, &TestArgs{Cookie: []byte{0xc0, 0x01}, Exclusive: true, Lock: lock(1<<32, 10)},
		"00000002 c0010000 00000001" + lockHex + "0000000100000000 000000000000000a"},
	{"testargs v1", 1, &TestArgs{Cookie: []byte{0xc0, 0x01}, Lock: lock(16, 0)},
		"00000002 c0010000 00000000" + lockHex + "00000010 00000000"},
	{"lockargs v4", 4, &LockArgs{Cookie: []byte{1, 0, 0, 0}, Block: true, Exclusive: true, Lock: lock(0, 0), Reclaim: true, State: 7},
		"00000004 01000000 00000001 00000001" + lockHex + "0000000000000000 0000000000000000" + "00000001 00000007"},
	{"lockargs v3", 3, &LockArgs{Cookie: nil, Exclusive: true, Lock: lock(0xfffffffe, 1), State: 0x80000001},
		"00000000 00000000 00000001" + lockHex + "fffffffe 00000001" + "00000000 80000001"},
	{"cancargs v4", 4, &CancelArgs{Cookie: []byte{5}, Block: true, Lock: lock(2, 3)},
		"00000001 05000000 00000001 00000000" + lockHex + "0000000000000002 0000000000000003"},
	{"unlockargs v3", 3, &UnlockArgs{Cookie: []byte{5}, Lock: lock(2, 3)},
		"00000001 05000000" + lockHex + "00000002 00000003"},
	{"shareargs", 3, &ShareArgs{Cookie: []byte{5}, CallerName: []byte("pc"), FH: []byte{9}, OH: []byte{8}, Mode: ShareWrite, Access: ShareBoth, Reclaim: true},
		"00000001 05000000 00000002 70630000 00000001 09000000 00000001 08000000 00000002 00000003 00000001"},
	{"notify", 4, &Notify{Name: []byte("pc"), State: 3}, "00000002 70630000 00000003"},
	{"res", 4, &Res{Cookie: []byte{5}, Stat: FBig}, "00000001 05000000 00000008"},
	{"testres granted", 4, &TestRes{Cookie: []byte{5}, Stat: Granted}, "00000001 05000000 00000000"},
	{"testres v4", 4, &TestRes{Cookie: []byte{5}, Stat: Denied, Holder: Holder{Exclusive: true, Svid: 9, OH: []byte("9@h"), Offset: 1 << 40, Len: 1}},
		"00000001 05000000 00000001 00000001 00000009 00000003 39406800 0000010000000000 0000000000000001"},
	{"testres v1", 1, &TestRes{Cookie: []byte{5}, Stat: Denied, Holder: Holder{Svid: 9, OH: []byte("9@h"), Offset: 3, Len: 1}},
		"00000001 05000000 00000001 00000000 00000009 00000003 39406800 00000003 00000001"},
	{"shareres", 3, &ShareRes{Cookie: []byte{5}, Stat: Denied, Sequence: 4}, "00000001 05000000 00000001 00000004"},
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func fresh(m message) message {
	for _, k := range kinds {
		if n := k(); typeName(n) == typeName(m) {
			return n
		}
	}
	return nil
}

func typeName(m message) string { return fmt.Sprintf("%T", m) }

func TestGoldenBytes(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			want := unhex(t, v.hex)
			var w xdr.Writer
			v.msg.Encode(&w, v.vers)
			if d := cmp.Diff(hex.EncodeToString(want), hex.EncodeToString(w.Buf)); d != "" {
				t.Errorf("encoded (-want +got):\n%s", d)
			}
			got := fresh(v.msg)
			r := xdr.NewReader(want)
			if err := got.Decode(r, v.vers); err != nil || r.Len() != 0 {
				t.Fatalf("decode: %v, %d bytes left", err, r.Len())
			}
			if d := cmp.Diff(v.msg, got, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("decoded (-want +got):\n%s", d)
			}
			// Every proper prefix is an error, and none a panic.
			for n := range want {
				if err := fresh(v.msg).Decode(xdr.NewReader(want[:n]), v.vers); err == nil {
					t.Fatalf("%d of %d bytes decode", n, len(want))
				}
			}
			if len(want) > MaxArgs {
				t.Errorf("%d bytes, more than MaxArgs", len(want))
			}
		})
	}
}

func TestLimits(t *testing.T) {
	long := func(name, fh, oh, cookie int) []byte {
		var w xdr.Writer
		a := LockArgs{Cookie: make([]byte, cookie), Lock: Lock{CallerName: make([]byte, name), FH: make([]byte, fh), OH: make([]byte, oh)}}
		a.Encode(&w, 4)
		return w.Buf
	}
	for _, c := range []struct {
		name, fh, oh, cookie int
		ok                   bool
	}{
		{MaxName, MaxHandle, MaxNetobj, MaxNetobj, true},
		{MaxName + 1, 1, 1, 1, false},
		{1, MaxHandle + 1, 1, 1, false},
		{1, 1, MaxNetobj + 1, 1, false},
		{1, 1, 1, MaxNetobj + 1, false},
		{0, 0, 0, 0, true},
	} {
		b := long(c.name, c.fh, c.oh, c.cookie)
		var a LockArgs
		if err := a.Decode(xdr.NewReader(b), 4); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
		if c.ok && len(b) > MaxArgs {
			t.Errorf("%+v: %d bytes, MaxArgs is %d", c, len(b), MaxArgs)
		}
	}
	var w xdr.Writer
	(&ShareArgs{Mode: 4}).Encode(&w, 3)
	if err := new(ShareArgs).Decode(xdr.NewReader(w.Buf), 3); !errors.Is(err, ErrEnum) {
		t.Errorf("share mode 4: %v", err)
	}
	if err := new(TestArgs).Decode(xdr.NewReader(unhex(t, "00000000 00000002")), 4); !errors.Is(err, xdr.ErrBool) {
		t.Errorf("exclusive 2: %v", err)
	}
}

func TestRange(t *testing.T) {
	const eof = wire.MaxLockOffset
	for _, c := range []struct {
		vers       uint32
		off, n     uint64
		start, end uint64
		st         wire.Status
	}{
		{4, 0, 0, 0, eof, wire.OK},
		{4, 0, 1, 0, 0, wire.OK},
		{4, 10, 5, 10, 14, wire.OK},
		{4, eof, 0, eof, eof, wire.OK},
		{4, eof, 1, eof, eof, wire.OK},
		{4, eof, 2, eof, eof, wire.OK},
		{4, eof - 1, 1, eof - 1, eof - 1, wire.OK},
		{4, 0, eof, 0, eof - 1, wire.OK},
		{4, 0, eof + 1, 0, eof, wire.OK},
		{4, 5, math.MaxUint64, 5, eof, wire.OK},
		{4, eof + 1, 0, 0, 0, wire.ErrFBig},
		{4, math.MaxUint64, 1, 0, 0, wire.ErrFBig},
		{1, 0, 0, 0, eof, wire.OK},
		{3, 10, 5, 10, 14, wire.OK},
		{3, 1, math.MaxUint32, 1, eof, wire.OK},
		{3, 0, math.MaxUint32, 0, math.MaxUint32 - 1, wire.OK},
		{3, math.MaxUint32, math.MaxUint32, math.MaxUint32, eof, wire.OK},
	} {
		r, st := Range(c.vers, c.off, c.n)
		if st != c.st || r.Start != c.start || r.End != c.end {
			t.Errorf("v%d %d+%d: %v %v", c.vers, c.off, c.n, r, st)
		}
		if st != wire.OK {
			continue
		}
		if !r.Valid() {
			t.Errorf("v%d %d+%d: %v is not valid", c.vers, c.off, c.n, r)
		}
		off, n := OffsetLen(r)
		if !wide(c.vers) {
			off, n = Clip(off, n)
		}
		if again, st := Range(c.vers, off, n); st != wire.OK || again != r {
			t.Errorf("v%d %v: there and back gives %v %v", c.vers, r, again, st)
		}
	}
	for _, c := range []struct{ off, n, wantOff, wantLen uint64 }{
		{1 << 32, 5, math.MaxUint32, 0},
		{5, 1 << 32, 5, 0},
		{math.MaxUint32 - 1, 1, math.MaxUint32 - 1, 1},
		{5, 6, 5, 6},
	} {
		if off, n := Clip(c.off, c.n); off != c.wantOff || n != c.wantLen {
			t.Errorf("Clip(%d, %d) = %d, %d", c.off, c.n, off, n)
		}
	}
}

func TestStatFor(t *testing.T) {
	for _, c := range []struct {
		st     wire.Status
		v4, v3 Stat
		answer bool
	}{
		{wire.OK, Granted, Granted, true},
		{wire.ErrLockDenied, Denied, Denied, true},
		{wire.ErrLockBlocked, Blocked, Blocked, true},
		{wire.ErrLockDeadlock, Deadlck, Denied, true},
		{wire.ErrLockGrace, DeniedGracePeriod, DeniedGracePeriod, true},
		{wire.ErrLockNoLocks, DeniedNoLocks, DeniedNoLocks, true},
		{wire.ErrStale, StaleFH, DeniedNoLocks, true},
		{wire.ErrBadHandle, StaleFH, DeniedNoLocks, true},
		{wire.ErrROFS, ROFS, DeniedNoLocks, true},
		{wire.ErrFBig, FBig, DeniedNoLocks, true},
		{wire.ErrIO, Failed, DeniedNoLocks, true},
		{wire.ErrAcces, Failed, DeniedNoLocks, true},
		{wire.ErrInval, Failed, DeniedNoLocks, true},
		{wire.Status(4711), Failed, DeniedNoLocks, true},
		{wire.ErrJukebox, 0, 0, false},
		{wire.ErrTargetDown, 0, 0, false},
		{wire.ErrRecovering, 0, 0, false},
		{wire.ErrStaleVIP, 0, 0, false},
		{wire.ErrStaleClient, 0, 0, false},
		{wire.ErrUnknownClient, 0, 0, false},
		{wire.ErrPortMismatch, 0, 0, false},
	} {
		for vers, want := range map[uint32]Stat{1: c.v3, 3: c.v3, 4: c.v4} {
			got, answer := StatFor(vers, c.st)
			if answer != c.answer || answer && got != want {
				t.Errorf("v%d %v: %v %v", vers, c.st, got, answer)
			}
			if answer && vers < 4 && got > DeniedGracePeriod {
				t.Errorf("v%d %v: %v does not exist there", vers, c.st, got)
			}
		}
	}
}

func TestProcedures(t *testing.T) {
	for p := Proc(0); p < 30; p++ {
		if got, want := Served(1, p), p <= 15; got != want {
			t.Errorf("v1 %v: %v", p, got)
		}
		for _, v := range []uint32{3, 4} {
			if got, want := Served(v, p), p <= 15 || p >= 20 && p <= 23; got != want {
				t.Errorf("v%d %v: %v", v, p, got)
			}
		}
		req, res, ok := Async(p)
		if ok != (p >= 6 && p <= 10) || ok && (req != p-5 || res != p+5) {
			t.Errorf("%v: %v %v %v", p, req, res, ok)
		}
	}
	if ProcNMLock.String() != "NM_LOCK" || Proc(17).String() != "PROC_17" || Deadlck.String() != "DEADLCK" || Stat(10).String() != "STAT_10" {
		t.Error("names")
	}
}

// FuzzDecode feeds every decoder; what decodes survives being encoded and
// decoded again.
func FuzzDecode(f *testing.F) {
	for _, v := range vectors {
		for i, k := range kinds {
			if typeName(k()) == typeName(v.msg) {
				f.Add(uint8(i), v.vers == 4, unhex(f, v.hex))
			}
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, v4 bool, in []byte) {
		k := kinds[int(kind)%len(kinds)]
		vers := uint32(3)
		if v4 {
			vers = 4
		}
		a, b := k(), k()
		r := xdr.NewReader(in)
		if a.Decode(r, vers) != nil {
			return
		}
		var w xdr.Writer
		a.Encode(&w, vers)
		if err := b.Decode(xdr.NewReader(w.Buf), vers); err != nil {
			t.Fatal(err)
		}
		if !v4 {
			// Ranges beyond 32 bits are clipped once and then stay.
			var w2, w3 xdr.Writer
			b.Encode(&w2, vers)
			c := k()
			if err := c.Decode(xdr.NewReader(w2.Buf), vers); err != nil {
				t.Fatal(err)
			}
			c.Encode(&w3, vers)
			if !cmp.Equal(w2.Buf, w3.Buf) {
				t.Fatalf("%x %x", w2.Buf, w3.Buf)
			}
			return
		}
		if d := cmp.Diff(a, b, cmpopts.EquateEmpty()); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzRange(f *testing.F) {
	f.Add(false, uint64(0), uint64(0), uint64(5))
	f.Add(true, uint64(wire.MaxLockOffset), uint64(1), uint64(math.MaxUint64))
	f.Fuzz(func(t *testing.T, v4 bool, off, n, probe uint64) {
		vers := uint32(4)
		if !v4 {
			vers, off, n = 3, off&math.MaxUint32, n&math.MaxUint32
		}
		r, st := Range(vers, off, n)
		if st != wire.OK {
			if off <= wire.MaxLockOffset {
				t.Fatalf("%d+%d refused: %v", off, n, st)
			}
			return
		}
		if !r.Valid() || r.Start != off {
			t.Fatalf("%d+%d: %v", off, n, r)
		}
		// A byte of the asked range that has a name is in the range, and the range
		// holds no other ones that have a name.
		last := uint64(wire.MaxLockOffset)
		if !v4 {
			last = math.MaxUint32
		}
		if probe &= last; probe <= last {
			asked := probe >= off && (n == 0 || probe-off < n)
			if got := r.Start <= probe && probe <= r.End; got != asked {
				t.Fatalf("%d+%d: byte %d in %v: %v", off, n, probe, r, got)
			}
		}
	})
}
