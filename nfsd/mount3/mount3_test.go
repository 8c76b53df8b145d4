package mount3

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	mntOKHex   = "00000000 00000004 61626364 00000002 00000001 00000000"
	dumpHex    = "00000001 00000002 68310000 00000002 2f610000 00000001 00000004 686f7374 00000003 2f622f00 00000000"
	exportsHex = "00000001 00000002 2f610000 00000001 00000002 68310000 00000001 00000001 2a000000 00000000 " +
		"00000001 00000002 2f620000 00000000 00000000"
)

var (
	dump    = []DumpEntry{{"h1", "/a"}, {"host", "/b/"}}
	exports = []ExportEntry{{Dir: "/a", Groups: []string{"h1", "*"}}, {Dir: "/b"}}
)

func TestMnt(t *testing.T) {
	var w xdr.Writer
	PutMntOK(&w, []byte("abcd"), 1, 0)
	if want := unhex(t, mntOKHex); !bytes.Equal(w.Buf, want) {
		t.Errorf("%x\nwant\n%x", w.Buf, want)
	}
	var res MntRes
	if err := res.Decode(xdr.NewReader(w.Buf)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(MntRes{FH: []byte("abcd"), Flavors: []uint32{1, 0}}, res); d != "" {
		t.Error(d)
	}
	w.Buf = nil
	PutMntFail(&w, nfs.MountStatusErrAcces)
	if err := res.Decode(xdr.NewReader(w.Buf)); err != nil || res.Status != nfs.MountStatusErrAcces || res.FH != nil {
		t.Errorf("%+v %v", res, err)
	}
	if err := res.Decode(xdr.NewReader(unhex(t, "00000000 00000000 7fffffff"))); !errors.Is(err, ErrTooMany) {
		t.Errorf("many flavors: %v", err)
	}
	if err := res.Decode(xdr.NewReader(unhex(t, "00000000 00000041"))); !errors.Is(err, xdr.ErrTooLong) {
		t.Errorf("long handle: %v", err)
	}
}

func TestLists(t *testing.T) {
	var w xdr.Writer
	if n := PutDump(&w, dump, 0); n != 2 || !bytes.Equal(w.Buf, unhex(t, dumpHex)) {
		t.Errorf("%d %x", n, w.Buf)
	}
	if got, err := DecodeDump(xdr.NewReader(w.Buf)); err != nil || !cmp.Equal(dump, got) {
		t.Errorf("%v %v", got, err)
	}
	var e xdr.Writer
	if n := PutExports(&e, exports, 0); n != 2 || !bytes.Equal(e.Buf, unhex(t, exportsHex)) {
		t.Errorf("%d %x", n, e.Buf)
	}
	if got, err := DecodeExports(xdr.NewReader(e.Buf)); err != nil || !cmp.Equal(exports, got) {
		t.Errorf("%v %v", got, err)
	}
	// Limits: every result is within them, well formed, and as full as can be.
	for limit := 4; limit <= len(w.Buf); limit++ {
		l := xdr.Writer{Buf: []byte("rpc head")}
		n := PutDump(&l, dump, limit)
		got, err := DecodeDump(xdr.NewReader(l.Buf[8:]))
		if err != nil || len(got) != n || len(l.Buf)-8 > limit || (n == 2) != (limit == len(w.Buf)) {
			t.Errorf("dump limit %d: %d entries, %d bytes, %v", limit, n, len(l.Buf)-8, err)
		}
	}
	for limit := 4; limit <= len(e.Buf); limit++ {
		l := xdr.Writer{Buf: []byte("rpc head")}
		n := PutExports(&l, exports, limit)
		got, err := DecodeExports(xdr.NewReader(l.Buf[8:]))
		if err != nil || len(got) != n || len(l.Buf)-8 > limit || (n == 2) != (limit == len(e.Buf)) {
			t.Errorf("exports limit %d: %d entries, %d bytes, %v", limit, n, len(l.Buf)-8, err)
		}
	}
	for n := range w.Buf {
		if _, err := DecodeDump(xdr.NewReader(w.Buf[:n])); err == nil {
			t.Errorf("dump cut to %d: no error", n)
		}
	}
	for n := range e.Buf {
		if _, err := DecodeExports(xdr.NewReader(e.Buf[:n])); err == nil {
			t.Errorf("exports cut to %d: no error", n)
		}
	}
	// What is too long for the protocol is cut, not sent.
	w.Buf = nil
	PutDump(&w, []DumpEntry{{strings.Repeat("h", 300), strings.Repeat("d", 2000)}}, 0)
	if got, err := DecodeDump(xdr.NewReader(w.Buf)); err != nil || len(got[0].Hostname) != MaxName || len(got[0].Directory) != MaxPath {
		t.Errorf("%v", err)
	}
	// A client does not collect without end.
	many := bytes.Repeat(unhex(t, "00000001 00000000 00000000"), maxListEntries+1)
	if _, err := DecodeDump(xdr.NewReader(many)); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
	if _, err := DecodeExports(xdr.NewReader(many)); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
}

func TestPath(t *testing.T) {
	var w xdr.Writer
	EncodePath(&w, "/srv")
	if p, err := DecodePath(xdr.NewReader(w.Buf)); err != nil || string(p) != "/srv" {
		t.Errorf("%q %v", p, err)
	}
	w.Buf = nil
	EncodePath(&w, strings.Repeat("x", 4097))
	if _, err := DecodePath(xdr.NewReader(w.Buf)); !errors.Is(err, xdr.ErrTooLong) {
		t.Error(err)
	}
	for in, want := range map[string]nfs.MountStatus{
		"/": nfs.MountStatusOk, "/a/b//": nfs.MountStatusOk, "": nfs.MountStatusErrNoEnt, "a": nfs.MountStatusErrNoEnt,
		"/a\x00":                          nfs.MountStatusErrInval,
		"/" + strings.Repeat("x", 255):    nfs.MountStatusOk,
		"/" + strings.Repeat("x", 256):    nfs.MountStatusErrNameTooLong,
		"/a/" + strings.Repeat("x", 256):  nfs.MountStatusErrNameTooLong,
		strings.Repeat("/xxx", 256):       nfs.MountStatusOk,
		strings.Repeat("/xxx", 256) + "/": nfs.MountStatusErrNameTooLong,
	} {
		if st := CheckPath([]byte(in)); st != want {
			t.Errorf("CheckPath(%.20q) = %d, want %d", in, st, want)
		}
	}
}

func TestStatusAndOld(t *testing.T) {
	for st, want := range map[wire.Status]nfs.MountStatus{
		wire.OK: nfs.MountStatusOk, wire.ErrAcces: nfs.MountStatusErrAcces, wire.ErrStale: nfs.MountStatusErrNoEnt,
		wire.ErrNotDir: nfs.MountStatusErrNotDir, wire.ErrRecovering: nfs.MountStatusErrServerFault,
	} {
		if got := Status(st); got != want {
			t.Errorf("%v: %d", st, got)
		}
	}
	for p := nfs.MountProcNull; p < 8; p++ {
		if got, want := ServesOld(p), p != nfs.MountProcMount && p < NumProcs; got != want {
			t.Errorf("ServesOld(%v) = %v", p, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(uint8(0), unhex(f, mntOKHex))
	f.Add(uint8(1), unhex(f, dumpHex))
	f.Add(uint8(2), unhex(f, exportsHex))
	f.Add(uint8(3), unhex(f, "00000004 2f737276"))
	f.Fuzz(func(t *testing.T, what uint8, in []byte) {
		r := xdr.NewReader(in)
		var w xdr.Writer
		switch what % 4 {
		case 0:
			var x, y MntRes
			if x.Decode(r) == nil && x.Status == nfs.MountStatusOk {
				PutMntOK(&w, x.FH, x.Flavors...)
				if err := y.Decode(xdr.NewReader(w.Buf)); err != nil || !cmp.Equal(x, y) {
					t.Fatalf("%+v %+v %v", x, y, err)
				}
			}
		case 1:
			if l, err := DecodeDump(r); err == nil {
				PutDump(&w, l, 0)
				if m, err := DecodeDump(xdr.NewReader(w.Buf)); err != nil || !cmp.Equal(l, m) {
					t.Fatalf("%+v %+v %v", l, m, err)
				}
			}
		case 2:
			if l, err := DecodeExports(r); err == nil {
				PutExports(&w, l, 0)
				if m, err := DecodeExports(xdr.NewReader(w.Buf)); err != nil || !cmp.Equal(l, m) {
					t.Fatalf("%+v %+v %v", l, m, err)
				}
			}
		case 3:
			if p, err := DecodePath(r); err == nil {
				CheckPath(p)
			}
		}
	})
}
