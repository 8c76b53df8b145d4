package nsm

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/internal/xdr"
)

type codec interface {
	Encode(*xdr.Writer)
	Decode(*xdr.Reader) error
}

const idHex = "00000003 6e666d00 000186b5 00000004 00000010"

const privHex = "00010203 04050607 08090a0b 0c0d0e0f"

var (
	id   = MyID{MyName: "nfm", MyProg: 100021, MyVers: 4, MyProc: 16}
	priv = [PrivSize]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
)

// golden has, for every type, a value, its bytes by the specification, and an
// empty value to decode into.
var golden = []struct {
	name  string
	value codec
	hex   string
	fresh func() codec
}{
	{"sm_name", &SMName{"host"}, "00000004 686f7374", func() codec { return new(SMName) }},
	{"my_id", &id, idHex, func() codec { return new(MyID) }},
	{"mon_id", &MonID{"h.org", id}, "00000005 682e6f72 67000000" + idHex, func() codec { return new(MonID) }},
	{"mon", &Mon{MonID{"h", id}, priv}, "00000001 68000000" + idHex + privHex, func() codec { return new(Mon) }},
	{"stat_chge", &StatChge{"host", 7}, "00000004 686f7374 00000007", func() codec { return new(StatChge) }},
	{"sm_stat", &SMStat{9}, "00000009", func() codec { return new(SMStat) }},
	{"sm_stat_res", &SMStatRes{StatFail, 5}, "00000001 00000005", func() codec { return new(SMStatRes) }},
	{"status", &Status{"ab", 3, priv}, "00000002 61620000 00000003" + privHex, func() codec { return new(Status) }},
}

func TestGolden(t *testing.T) {
	for _, g := range golden {
		want, err := hex.DecodeString(strings.ReplaceAll(g.hex, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		var w xdr.Writer
		g.value.Encode(&w)
		if !bytes.Equal(w.Buf, want) {
			t.Errorf("%s: %x\nwant %x", g.name, w.Buf, want)
		}
		v := g.fresh()
		r := xdr.NewReader(want)
		if err := v.Decode(r); err != nil || r.Len() != 0 {
			t.Errorf("%s: %v, %d bytes left", g.name, err, r.Len())
		}
		if d := cmp.Diff(g.value, v); d != "" {
			t.Errorf("%s:\n%s", g.name, d)
		}
		for n := range want {
			if err := g.fresh().Decode(xdr.NewReader(want[:n])); !errors.Is(err, xdr.ErrShort) {
				t.Errorf("%s cut to %d bytes: %v", g.name, n, err)
			}
		}
	}
}

func TestStringLimit(t *testing.T) {
	for _, n := range []int{MaxStrLen, MaxStrLen + 1} {
		for _, x := range []codec{&SMName{strings.Repeat("n", n)}, &StatChge{MonName: strings.Repeat("n", n)},
			&MyID{MyName: strings.Repeat("n", n)}, &MonID{MonName: strings.Repeat("n", n)}, &Status{MonName: strings.Repeat("n", n)}} {
			var w xdr.Writer
			x.Encode(&w)
			err := x.Decode(xdr.NewReader(w.Buf))
			if n <= MaxStrLen && err != nil || n > MaxStrLen && !errors.Is(err, xdr.ErrTooLong) {
				t.Errorf("%T with %d bytes: %v", x, n, err)
			}
		}
	}
	var w xdr.Writer
	long := Mon{MonID: MonID{strings.Repeat("a", MaxStrLen), MyID{MyName: strings.Repeat("b", MaxStrLen)}}}
	long.Encode(&w)
	if len(w.Buf) != MaxArgs {
		t.Errorf("the longest argument has %d bytes, MaxArgs is %d", len(w.Buf), MaxArgs)
	}
}

// FuzzDecode decodes arbitrary bytes as every type; what decodes encodes again
// to a value that is the same.
func FuzzDecode(f *testing.F) {
	for _, g := range golden {
		var w xdr.Writer
		g.value.Encode(&w)
		f.Add(w.Buf)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, g := range golden {
			v := g.fresh()
			if v.Decode(xdr.NewReader(b)) != nil {
				continue
			}
			var w xdr.Writer
			v.Encode(&w)
			again := g.fresh()
			r := xdr.NewReader(w.Buf)
			if err := again.Decode(r); err != nil || r.Len() != 0 || !cmp.Equal(v, again) {
				t.Fatalf("%s: %v\n%s", g.name, err, cmp.Diff(v, again))
			}
		}
	})
}
