package nfs3

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

type argsCodec interface {
	Decode(*xdr.Reader) error
	Encode(*xdr.Writer)
}

type resDecoder interface{ Decode(*xdr.Reader) error }

// nullCodec stands for NULL's missing argument and result.
type nullCodec struct{}

func (nullCodec) Decode(*xdr.Reader) error { return nil }
func (nullCodec) Encode(*xdr.Writer)       {}

// newArgs and newRes make the structures of each procedure.
var newArgs = [NumProcs]func() argsCodec{
	nfs.NFSProcedureNull:        func() argsCodec { return nullCodec{} },
	nfs.NFSProcedureGetAttr:     func() argsCodec { return &FHArgs{} },
	nfs.NFSProcedureSetAttr:     func() argsCodec { return &SetattrArgs{} },
	nfs.NFSProcedureLookup:      func() argsCodec { return &DirOpArgs{} },
	nfs.NFSProcedureAccess:      func() argsCodec { return &AccessArgs{} },
	nfs.NFSProcedureReadlink:    func() argsCodec { return &FHArgs{} },
	nfs.NFSProcedureRead:        func() argsCodec { return &ReadArgs{} },
	nfs.NFSProcedureWrite:       func() argsCodec { return &WriteArgs{} },
	nfs.NFSProcedureCreate:      func() argsCodec { return &CreateArgs{} },
	nfs.NFSProcedureMkDir:       func() argsCodec { return &MkdirArgs{} },
	nfs.NFSProcedureSymlink:     func() argsCodec { return &SymlinkArgs{} },
	nfs.NFSProcedureMkNod:       func() argsCodec { return &MknodArgs{} },
	nfs.NFSProcedureRemove:      func() argsCodec { return &DirOpArgs{} },
	nfs.NFSProcedureRmDir:       func() argsCodec { return &DirOpArgs{} },
	nfs.NFSProcedureRename:      func() argsCodec { return &RenameArgs{} },
	nfs.NFSProcedureLink:        func() argsCodec { return &LinkArgs{} },
	nfs.NFSProcedureReadDir:     func() argsCodec { return &ReaddirArgs{} },
	nfs.NFSProcedureReadDirPlus: func() argsCodec { return &ReaddirplusArgs{} },
	nfs.NFSProcedureFSStat:      func() argsCodec { return &FHArgs{} },
	nfs.NFSProcedureFSInfo:      func() argsCodec { return &FHArgs{} },
	nfs.NFSProcedurePathConf:    func() argsCodec { return &FHArgs{} },
	nfs.NFSProcedureCommit:      func() argsCodec { return &CommitArgs{} },
}

var newRes = [NumProcs]func() resDecoder{
	nfs.NFSProcedureNull:        func() resDecoder { return nullCodec{} },
	nfs.NFSProcedureGetAttr:     func() resDecoder { return &GetattrRes{} },
	nfs.NFSProcedureSetAttr:     func() resDecoder { return &WccRes{} },
	nfs.NFSProcedureLookup:      func() resDecoder { return &LookupRes{} },
	nfs.NFSProcedureAccess:      func() resDecoder { return &AccessRes{} },
	nfs.NFSProcedureReadlink:    func() resDecoder { return &ReadlinkRes{} },
	nfs.NFSProcedureRead:        func() resDecoder { return &ReadRes{} },
	nfs.NFSProcedureWrite:       func() resDecoder { return &WriteRes{} },
	nfs.NFSProcedureCreate:      func() resDecoder { return &CreateRes{} },
	nfs.NFSProcedureMkDir:       func() resDecoder { return &CreateRes{} },
	nfs.NFSProcedureSymlink:     func() resDecoder { return &CreateRes{} },
	nfs.NFSProcedureMkNod:       func() resDecoder { return &CreateRes{} },
	nfs.NFSProcedureRemove:      func() resDecoder { return &WccRes{} },
	nfs.NFSProcedureRmDir:       func() resDecoder { return &WccRes{} },
	nfs.NFSProcedureRename:      func() resDecoder { return &RenameRes{} },
	nfs.NFSProcedureLink:        func() resDecoder { return &LinkRes{} },
	nfs.NFSProcedureReadDir:     func() resDecoder { return &ReaddirRes{} },
	nfs.NFSProcedureReadDirPlus: func() resDecoder { return &ReaddirRes{Plus: true} },
	nfs.NFSProcedureFSStat:      func() resDecoder { return &FSStatRes{} },
	nfs.NFSProcedureFSInfo:      func() resDecoder { return &FSInfoRes{} },
	nfs.NFSProcedurePathConf:    func() resDecoder { return &PathConfRes{} },
	nfs.NFSProcedureCommit:      func() resDecoder { return &CommitRes{} },
}

// unhex reads hexadecimal with blanks; "t:abc" words are text.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var out []byte
	for _, f := range strings.Fields(s) {
		if txt, ok := strings.CutPrefix(f, "t:"); ok {
			out = append(out, txt...)
			continue
		}
		b, err := hex.DecodeString(f)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

var (
	allSet = wire.SetAttr{
		Mask: wire.SetMode | wire.SetUID | wire.SetGID | wire.SetSize | wire.SetAtime | wire.SetMtime,
		Mode: 0o644, UID: 1, GID: 2, Size: 3, Atime: 5_000_000_006, Mtime: 7_000_000_008,
	}
	noneSet = wire.SetAttr{}
)

const (
	fhHex   = "00000005 t:hndle 000000 "
	nameHex = "00000003 t:foo 00 "
	// mode, uid, gid, size, atime and mtime from the client
	allSetHex = "00000001 000001a4 00000001 00000001 00000001 00000002 00000001 0000000000000003 " +
		"00000002 00000005 00000006 00000002 00000007 00000008 "
	noneSetHex = "00000000 00000000 00000000 00000000 00000000 00000000 "
	// server time for both
	nowSetHex = "00000000 00000000 00000000 00000000 00000001 00000001 "
)

// argVectors are written by hand from RFC 1813 section 3.3.
var argVectors = []struct {
	proc nfs.NFSProcedure
	args argsCodec
	hex  string
}{
	{nfs.NFSProcedureNull, nullCodec{}, ""},
	{nfs.NFSProcedureGetAttr, &FHArgs{FH: fh}, fhHex},
	{nfs.NFSProcedureSetAttr, &SetattrArgs{FH: fh, Attr: allSet, Guard: true, GuardCtime: 9_000_000_001}, fhHex + allSetHex + "00000001 00000009 00000001"},
	{nfs.NFSProcedureSetAttr, &SetattrArgs{FH: fh, Attr: noneSet}, fhHex + noneSetHex + "00000000"},
	{nfs.NFSProcedureLookup, &DirOpArgs{FH: fh, Name: name}, fhHex + nameHex},
	{nfs.NFSProcedureAccess, &AccessArgs{FH: fh, Access: 0x1f}, fhHex + "0000001f"},
	{nfs.NFSProcedureReadlink, &FHArgs{FH: fh}, fhHex},
	{nfs.NFSProcedureRead, &ReadArgs{FH: fh, Offset: 1 << 40, Count: 4096}, fhHex + "0000010000000000 00001000"},
	{nfs.NFSProcedureWrite, &WriteArgs{FH: fh, Offset: 2, Count: 5, Stable: wire.FileSync, Data: []byte("12345")}, fhHex + "0000000000000002 00000005 00000002 00000005 t:12345 000000"},
	{nfs.NFSProcedureCreate, &CreateArgs{FH: fh, Name: name, How: wire.Unchecked, Attr: allSet}, fhHex + nameHex + "00000000" + allSetHex},
	{nfs.NFSProcedureCreate, &CreateArgs{FH: fh, Name: name, How: wire.Guarded}, fhHex + nameHex + "00000001" + noneSetHex},
	{nfs.NFSProcedureCreate, &CreateArgs{FH: fh, Name: name, How: wire.Exclusive, Verf: verf}, fhHex + nameHex + "00000002 t:verifier"},
	{nfs.NFSProcedureMkDir, &MkdirArgs{FH: fh, Name: name, Attr: wire.SetAttr{Mask: wire.SetAtimeNow | wire.SetMtimeNow}}, fhHex + nameHex + nowSetHex},
	{nfs.NFSProcedureSymlink, &SymlinkArgs{FH: fh, Name: name, Target: []byte("../x")}, fhHex + nameHex + noneSetHex + "00000004 t:../x"},
	{nfs.NFSProcedureMkNod, &MknodArgs{FH: fh, Name: name, Type: wire.TypeChr, Attr: allSet, RdevMajor: 10, RdevMinor: 200}, fhHex + nameHex + "00000004" + allSetHex + "0000000a 000000c8"},
	{nfs.NFSProcedureMkNod, &MknodArgs{FH: fh, Name: name, Type: wire.TypeFifo}, fhHex + nameHex + "00000007" + noneSetHex},
	{nfs.NFSProcedureMkNod, &MknodArgs{FH: fh, Name: name, Type: wire.TypeDir}, fhHex + nameHex + "00000002"},
	{nfs.NFSProcedureRemove, &DirOpArgs{FH: fh, Name: name}, fhHex + nameHex},
	{nfs.NFSProcedureRmDir, &DirOpArgs{FH: fh, Name: name}, fhHex + nameHex},
	{nfs.NFSProcedureRename, &RenameArgs{FromFH: fh, FromName: name, ToFH: fh, ToName: []byte("quux")}, fhHex + nameHex + fhHex + "00000004 t:quux"},
	{nfs.NFSProcedureLink, &LinkArgs{FH: fh, DirFH: []byte("dir4"), Name: name}, fhHex + "00000004 t:dir4" + " " + nameHex},
	{nfs.NFSProcedureReadDir, &ReaddirArgs{FH: fh, Cookie: 3, CookieVerf: verf, Count: 8192}, fhHex + "0000000000000003 t:verifier 00002000"},
	{nfs.NFSProcedureReadDirPlus, &ReaddirplusArgs{FH: fh, Cookie: 3, CookieVerf: verf, DirCount: 512, MaxCount: 8192}, fhHex + "0000000000000003 t:verifier 00000200 00002000"},
	{nfs.NFSProcedureFSStat, &FHArgs{FH: fh}, fhHex},
	{nfs.NFSProcedureFSInfo, &FHArgs{FH: fh}, fhHex},
	{nfs.NFSProcedurePathConf, &FHArgs{FH: fh}, fhHex},
	{nfs.NFSProcedureCommit, &CommitArgs{FH: fh, Offset: 1, Count: 2}, fhHex + "0000000000000001 00000002"},
}

var (
	fh   = []byte("hndle")
	name = []byte("foo")
	verf = [8]byte([]byte("verifier"))
)

func TestArgs(t *testing.T) {
	seen := [NumProcs]bool{}
	for _, v := range argVectors {
		seen[v.proc] = true
		t.Run(fmt.Sprintf("%v/%T", v.proc, v.args), func(t *testing.T) {
			raw := unhex(t, v.hex)
			var w xdr.Writer
			v.args.Encode(&w)
			if !bytes.Equal(w.Buf, raw) {
				t.Errorf("encoded\n%x\nwant\n%x", w.Buf, raw)
			}
			got := newArgs[v.proc]()
			r := xdr.NewReader(raw)
			if err := got.Decode(r); err != nil || r.Len() != 0 {
				t.Fatalf("%v, %d bytes left", err, r.Len())
			}
			if d := cmp.Diff(v.args, got); d != "" {
				t.Error(d)
			}
			for n := range raw {
				if err := newArgs[v.proc]().Decode(xdr.NewReader(raw[:n])); err == nil {
					t.Fatalf("cut to %d bytes: no error", n)
				}
			}
			// A used structure must not leak its former content.
			dirty := newArgs[v.proc]()
			if dirty != (nullCodec{}) {
				fill(reflect.ValueOf(dirty).Elem())
			}
			if err := dirty.Decode(xdr.NewReader(raw)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(v.args, dirty); d != "" {
				t.Errorf("into a used structure: %s", d)
			}
		})
	}
	for p, ok := range seen {
		if !ok {
			t.Errorf("no vector for procedure %v", nfs.NFSProcedure(p))
		}
	}
}

// fill sets every field to something.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 3, 3))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int64:
		v.SetInt(77)
	default:
		v.SetUint(77)
	}
}

func TestArgsRefused(t *testing.T) {
	long := strings.Repeat("ab", 4097)
	for _, tc := range []struct {
		proc nfs.NFSProcedure
		hex  string
		want error
	}{
		{nfs.NFSProcedureGetAttr, "00000041 " + strings.Repeat("ff", 68), xdr.ErrTooLong},
		{nfs.NFSProcedureLookup, fhHex + "00001001 " + long, xdr.ErrTooLong},
		{nfs.NFSProcedureLookup, fhHex + "ffffffff", xdr.ErrTooLong},
		{nfs.NFSProcedureSetAttr, fhHex + "00000002", xdr.ErrBool},
		{nfs.NFSProcedureSetAttr, fhHex + "00000000 00000000 00000000 00000000 00000003", ErrBadEnum},
		{nfs.NFSProcedureSetAttr, fhHex + "00000000 00000000 00000000 00000000 00000000 00000003", ErrBadEnum},
		{nfs.NFSProcedureWrite, fhHex + "0000000000000000 00000000 00000003 00000000", ErrBadEnum},
		{nfs.NFSProcedureWrite, fhHex + "0000000000000000 00000000 00000000 7fffffff", xdr.ErrTooLong},
		{nfs.NFSProcedureCreate, fhHex + nameHex + "00000003" + noneSetHex, ErrBadEnum},
		{nfs.NFSProcedureMkNod, fhHex + nameHex + "00000000", ErrBadEnum},
		{nfs.NFSProcedureMkNod, fhHex + nameHex + "00000008", ErrBadEnum},
		{nfs.NFSProcedureSymlink, fhHex + nameHex + noneSetHex + "00002001 " + long + long, xdr.ErrTooLong},
	} {
		if err := newArgs[tc.proc]().Decode(xdr.NewReader(unhex(t, tc.hex))); !errors.Is(err, tc.want) {
			t.Errorf("%v %.60s: %v, want %v", tc.proc, tc.hex, err, tc.want)
		}
	}
}

func TestLongNamesDecode(t *testing.T) {
	in := DirOpArgs{FH: fh, Name: bytes.Repeat([]byte("n"), 4096)}
	var w xdr.Writer
	in.Encode(&w)
	var out DirOpArgs
	if err := out.Decode(xdr.NewReader(w.Buf)); err != nil {
		t.Fatal(err)
	}
	if st := CheckName(nfs.NFSProcedureLookup, out.Name); st != wire.ErrNameTooLong {
		t.Error(st)
	}
}

func TestChecks(t *testing.T) {
	n255 := strings.Repeat("x", 255)
	for _, tc := range []struct {
		proc nfs.NFSProcedure
		name string
		want wire.Status
	}{
		{nfs.NFSProcedureLookup, "a", wire.OK},
		{nfs.NFSProcedureLookup, "...", wire.OK},
		{nfs.NFSProcedureLookup, ".a", wire.OK},
		{nfs.NFSProcedureLookup, n255, wire.OK},
		{nfs.NFSProcedureLookup, n255 + "x", wire.ErrNameTooLong},
		{nfs.NFSProcedureLookup, "", wire.ErrAcces},
		{nfs.NFSProcedureLookup, "a/b", wire.ErrAcces},
		{nfs.NFSProcedureLookup, "a\x00b", wire.ErrAcces},
		{nfs.NFSProcedureLookup, ".", wire.OK},
		{nfs.NFSProcedureLookup, "..", wire.OK},
		{nfs.NFSProcedureCreate, ".", wire.ErrExist},
		{nfs.NFSProcedureLink, "..", wire.ErrExist},
		{nfs.NFSProcedureRemove, "..", wire.ErrAcces},
		{nfs.NFSProcedureRmDir, ".", wire.ErrInval},
		{nfs.NFSProcedureRmDir, "..", wire.ErrExist},
		{nfs.NFSProcedureRename, "..", wire.ErrInval},
	} {
		if st := CheckName(tc.proc, []byte(tc.name)); st != tc.want {
			t.Errorf("CheckName(%v, %.10q) = %v, want %v", tc.proc, tc.name, st, tc.want)
		}
		if tc.want != wire.OK && !Legal(tc.proc, Status(tc.proc, tc.want)) {
			t.Errorf("%v is not legal for %v", tc.want, tc.proc)
		}
	}
	for in, want := range map[string]wire.Status{
		"": wire.ErrNoEnt, "x": wire.OK, strings.Repeat("x", 4095): wire.OK,
		strings.Repeat("x", 4096): wire.ErrNameTooLong, "a\x00": wire.ErrInval,
	} {
		if st := CheckTarget([]byte(in)); st != want {
			t.Errorf("CheckTarget(%.10q) = %v, want %v", in, st, want)
		}
	}
	for _, tc := range []struct {
		got, want wire.Status
	}{
		{(&WriteArgs{Count: 3, Data: []byte("abc")}).Check(), wire.OK},
		{(&WriteArgs{Count: 2, Data: []byte("abc")}).Check(), wire.ErrInval},
		{(&WriteArgs{Count: 4, Data: []byte("abc")}).Check(), wire.ErrInval},
		{(&WriteArgs{Offset: math.MaxInt64 - 3, Count: 3, Data: []byte("abc")}).Check(), wire.OK},
		{(&WriteArgs{Offset: math.MaxInt64 - 2, Count: 3, Data: []byte("abc")}).Check(), wire.ErrFBig},
		{(&WriteArgs{Offset: math.MaxUint64, Count: 3, Data: []byte("abc")}).Check(), wire.ErrFBig},
		{(&CommitArgs{Offset: math.MaxUint64, Count: 0}).Check(), wire.OK},
		{(&CommitArgs{Offset: math.MaxUint64, Count: 1}).Check(), wire.ErrInval},
		{(&MknodArgs{Type: wire.TypeSock}).Check(), wire.OK},
		{(&MknodArgs{Type: wire.TypeLnk}).Check(), wire.ErrBadType},
		{CheckSattr(&wire.SetAttr{Mask: wire.SetSize, Size: math.MaxInt64}), wire.OK},
		{CheckSattr(&wire.SetAttr{Mask: wire.SetSize, Size: math.MaxInt64 + 1}), wire.ErrFBig},
		{CheckSattr(&wire.SetAttr{Mask: wire.SetUID, UID: math.MaxUint32}), wire.ErrInval},
		{CheckSattr(&wire.SetAttr{Mask: wire.SetMode, UID: math.MaxUint32}), wire.OK},
	} {
		if tc.got != tc.want {
			t.Errorf("got %v, want %v", tc.got, tc.want)
		}
	}
}

func TestTime(t *testing.T) {
	for in, want := range map[int64]int64{
		0: 0, 1: 1, -1: 0, math.MinInt64: 0, 1_700_000_000_999_999_999: 1_700_000_000_999_999_999,
		(math.MaxUint32+1)*nsPerSec - 1: math.MaxUint32*nsPerSec + nsPerSec - 1,
		(math.MaxUint32 + 1) * nsPerSec: math.MaxUint32*nsPerSec + nsPerSec - 1,
		math.MaxInt64:                   math.MaxUint32*nsPerSec + nsPerSec - 1,
	} {
		var w xdr.Writer
		PutTime(&w, in)
		if got := GetTime(xdr.NewReader(w.Buf)); got != want || RepresentableTime(in) != want {
			t.Errorf("%d: %d and %d, want %d", in, got, RepresentableTime(in), want)
		}
	}
	if got := GetTime(xdr.NewReader(unhex(t, "00000001 ffffffff"))); got != 1_999_999_999 {
		t.Errorf("too many nanoseconds: %d", got)
	}
}

func TestStatus(t *testing.T) {
	for st := range statusMap {
		for p := nfs.NFSProcedureGetAttr; p < NumProcs; p++ {
			got := Status(p, st)
			if !Legal(p, got) {
				t.Errorf("Status(%v, %v) = %d is not legal", p, st, got)
			}
			if st < 20000 && got != nfs.NFSStatus(st) && got != nfs.NFSStatusServerFault {
				t.Errorf("Status(%v, %v) = %d", p, st, got)
			}
			if (st == wire.OK) != (got == nfs.NFSStatusOk) {
				t.Errorf("Status(%v, %v) = %d", p, st, got)
			}
		}
	}
	for _, tc := range []struct {
		proc nfs.NFSProcedure
		st   wire.Status
		want nfs.NFSStatus
	}{
		{nfs.NFSProcedureRemove, wire.ErrRecovering, nfs.NFSStatusJukebox},
		{nfs.NFSProcedureRead, wire.ErrTargetDown, nfs.NFSStatusJukebox},
		{nfs.NFSProcedureGetAttr, wire.ErrStaleVIP, nfs.NFSStatusJukebox},
		{nfs.NFSProcedureWrite, wire.ErrTooLate, nfs.NFSStatusIO},
		{nfs.NFSProcedureWrite, wire.ErrProto, nfs.NFSStatusServerFault},
		{nfs.NFSProcedureGetAttr, wire.ErrExist, nfs.NFSStatusServerFault},
		{nfs.NFSProcedureGetAttr, wire.Status(12345), nfs.NFSStatusServerFault},
		{nfs.NFSProcedureRemove, wire.ErrIsDir, nfs.NFSStatusIsDir},
		{nfs.NFSProcedureRmDir, wire.ErrNotEmpty, nfs.NFSStatusNotEmpty},
		{nfs.NFSProcedureRename, wire.ErrXDev, nfs.NFSStatusXDev},
		{nfs.NFSProcedureSetAttr, wire.ErrNotSync, nfs.NFSStatusNotSync},
	} {
		if got := Status(tc.proc, tc.st); got != tc.want {
			t.Errorf("Status(%v, %v) = %d, want %d", tc.proc, tc.st, got, tc.want)
		}
	}
	if !DropReply(wire.ErrStaleVIP) || DropReply(wire.ErrJukebox) {
		t.Error("DropReply")
	}
}

func FuzzArgs(f *testing.F) {
	for _, v := range argVectors {
		f.Add(uint32(v.proc), unhex(f, v.hex))
	}
	f.Fuzz(func(t *testing.T, proc uint32, in []byte) {
		proc %= NumProcs
		a := newArgs[proc]()
		if a.Decode(xdr.NewReader(in)) != nil {
			return
		}
		var w xdr.Writer
		a.Encode(&w)
		b := newArgs[proc]()
		if err := b.Decode(xdr.NewReader(w.Buf)); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(a, b, cmpopts.EquateEmpty()); d != "" {
			t.Fatal(d)
		}
		switch a := a.(type) {
		case *WriteArgs:
			a.Check()
		case *DirOpArgs:
			CheckName(nfs.NFSProcedure(proc), a.Name)
		case *SymlinkArgs:
			CheckTarget(a.Target)
		}
	})
}

func BenchmarkDecodeArgs(b *testing.B) {
	for _, v := range argVectors {
		if v.proc != nfs.NFSProcedureLookup && v.proc != nfs.NFSProcedureWrite {
			continue
		}
		raw := unhex(b, v.hex)
		a := newArgs[v.proc]()
		b.Run(v.proc.String(), func(b *testing.B) {
			b.ReportAllocs()
			var r xdr.Reader
			for b.Loop() {
				r.Reset(raw)
				if err := a.Decode(&r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
