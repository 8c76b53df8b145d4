package nfs3

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/recovery/wire"
)

const testFSID = 0x1122334455667788

var (
	attr = wire.Attr{
		FID: wire.FID{Seq: 2, OID: 3}, Type: wire.TypeReg, Mode: 0o104644, Nlink: 1, UID: 10, GID: 20,
		Size: 30, Used: 4096, RdevMajor: 1, RdevMinor: 2, Atime: 1_000_000_001, Mtime: 2_000_000_002, Ctime: 3_000_000_003,
	}
	fattr = Fattr{
		Type: wire.TypeReg, Mode: 0o4644, Nlink: 1, UID: 10, GID: 20, Size: 30, Used: 4096, RdevMajor: 1, RdevMinor: 2,
		FSID: testFSID, FileID: 2<<32 | 3, Atime: 1_000_000_001, Mtime: 2_000_000_002, Ctime: 3_000_000_003,
	}
	postOp = PostOpAttr{Present: true, Attr: fattr}
	pre    = wire.PreAttr{Valid: true, Size: 29, Mtime: 4_000_000_004, Ctime: 5_000_000_005}
	wcc    = Wcc{Before: pre, After: postOp}
)

const (
	attrHex = "00000001 000009a4 00000001 0000000a 00000014 000000000000001e 0000000000001000 00000001 00000002 " +
		"1122334455667788 0000000200000003 00000001 00000001 00000002 00000002 00000003 00000003 "
	postHex = "00000001 " + attrHex
	preHex  = "00000001 000000000000001d 00000004 00000004 00000005 00000005 "
	wccHex  = preHex + postHex
	okHex   = "00000000 "
)

var (
	info = FSInfo{RTMax: 1, RTPref: 2, RTMult: 3, WTMax: 4, WTPref: 5, WTMult: 6, DTPref: 7, MaxFileSize: 8, TimeDelta: 1, Properties: 0x1b}
	conf = PathConf{LinkMax: 65000, NameMax: 255, NoTrunc: true, ChownRestricted: true, CasePreserving: true}
	stat = wire.Statfs{Total: 1, Free: 2, Avail: 3, Files: 4, FilesFree: 5, FilesAvail: 6}
	ents = []wire.Dirent{
		{Cookie: 1, FID: wire.FID{Seq: 1, OID: 1}, Name: []byte(".")},
		{Cookie: 9, FID: wire.FID{Seq: 2, OID: 3}, Name: []byte("file"), HasAttr: true, Attr: attr},
	}
)

// resVectors pair what the server writes with what RFC 1813 says it looks like
// and with what a client reads.
var resVectors = []struct {
	proc nfs.NFSProcedure
	put  func(w *xdr.Writer)
	hex  string
	res  resDecoder
}{
	{nfs.NFSProcedureNull, func(*xdr.Writer) {}, "", nullCodec{}},
	{nfs.NFSProcedureGetAttr, func(w *xdr.Writer) { PutGetattrOK(w, &attr, testFSID) }, okHex + attrHex, &GetattrRes{Attr: fattr}},
	{nfs.NFSProcedureGetAttr, func(w *xdr.Writer) { PutStatus(w, nfs.NFSStatusStale) }, "00000046", &GetattrRes{Status: nfs.NFSStatusStale}},
	{nfs.NFSProcedureSetAttr, func(w *xdr.Writer) { PutWccResult(w, nfs.NFSStatusNotSync, pre, &attr, testFSID) }, "00002712 " + wccHex, &WccRes{nfs.NFSStatusNotSync, wcc}},
	{nfs.NFSProcedureLookup, func(w *xdr.Writer) { PutLookupOK(w, fh, &attr, nil, testFSID) }, okHex + fhHex + postHex + "00000000", &LookupRes{FH: fh, Obj: postOp}},
	{nfs.NFSProcedureLookup, func(w *xdr.Writer) { PutFailPostOp(w, nfs.NFSStatusNoEnt, &attr, testFSID) }, "00000002 " + postHex, &LookupRes{Status: nfs.NFSStatusNoEnt, Dir: postOp}},
	{nfs.NFSProcedureAccess, func(w *xdr.Writer) { PutAccessOK(w, &attr, testFSID, AccessRead|AccessExecute) }, okHex + postHex + "00000021", &AccessRes{Obj: postOp, Access: 0x21}},
	{nfs.NFSProcedureReadlink, func(w *xdr.Writer) { PutReadlinkOK(w, nil, testFSID, []byte("../x/y")) }, okHex + "00000000 00000006 t:../x/y 0000", &ReadlinkRes{Target: []byte("../x/y")}},
	{nfs.NFSProcedureRead, func(w *xdr.Writer) {
		PutReadHead(w, &attr, testFSID, 5, true)
		w.Buf = append(w.Buf, "hello"...)
		w.Buf = append(w.Buf, make([]byte, Pad(5))...)
	}, okHex + postHex + "00000005 00000001 00000005 t:hello 000000", &ReadRes{Obj: postOp, Count: 5, EOF: true, Data: []byte("hello")}},
	{nfs.NFSProcedureWrite, func(w *xdr.Writer) { PutWriteOK(w, pre, &attr, testFSID, 7, wire.DataSync, &verf) }, okHex + wccHex + "00000007 00000001 t:verifier", &WriteRes{Wcc: wcc, Count: 7, Committed: wire.DataSync, Verf: verf}},
	{nfs.NFSProcedureCreate, func(w *xdr.Writer) { PutCreateOK(w, fh, &attr, pre, &attr, testFSID) }, okHex + "00000001 " + fhHex + postHex + wccHex, &CreateRes{FH: fh, Obj: postOp, Dir: wcc}},
	{nfs.NFSProcedureMkDir, func(w *xdr.Writer) { PutCreateOK(w, nil, nil, wire.PreAttr{}, nil, testFSID) }, okHex + "00000000 00000000 00000000 00000000", &CreateRes{}},
	{nfs.NFSProcedureSymlink, func(w *xdr.Writer) { PutCreateOK(w, fh, nil, wire.PreAttr{}, &attr, testFSID) }, okHex + "00000001 " + fhHex + "00000000 00000000 " + postHex, &CreateRes{FH: fh, Dir: Wcc{After: postOp}}},
	{nfs.NFSProcedureMkNod, func(w *xdr.Writer) { PutWccResult(w, nfs.NFSStatusExist, pre, nil, testFSID) }, "00000011 " + preHex + "00000000", &CreateRes{Status: nfs.NFSStatusExist, Dir: Wcc{Before: pre}}},
	{nfs.NFSProcedureRemove, func(w *xdr.Writer) { PutWccResult(w, nfs.NFSStatusOk, pre, &attr, testFSID) }, okHex + wccHex, &WccRes{Wcc: wcc}},
	{nfs.NFSProcedureRmDir, func(w *xdr.Writer) { PutWccResult(w, nfs.NFSStatusNotEmpty, pre, &attr, testFSID) }, "00000042 " + wccHex, &WccRes{nfs.NFSStatusNotEmpty, wcc}},
	{nfs.NFSProcedureRename, func(w *xdr.Writer) {
		PutRename(w, nfs.NFSStatusOk, pre, &attr, wire.PreAttr{}, nil, testFSID)
	}, okHex + wccHex + "00000000 00000000", &RenameRes{From: wcc}},
	{nfs.NFSProcedureLink, func(w *xdr.Writer) { PutLink(w, nfs.NFSStatusMlink, &attr, pre, &attr, testFSID) }, "0000001f " + postHex + wccHex, &LinkRes{nfs.NFSStatusMlink, postOp, wcc}},
	{nfs.NFSProcedureReadDir, func(w *xdr.Writer) {
		var d DirWriter
		d.Begin(w, &attr, testFSID, &verf, 0, 4096)
		d.Add(&ents[0])
		d.Add(&ents[1])
		d.End(true)
	}, okHex + postHex + "t:verifier 00000001 0000000100000001 00000001 t:. 000000 0000000000000001 " +
		"00000001 0000000200000003 00000004 t:file 0000000000000009 00000000 00000001",
		&ReaddirRes{Dir: postOp, CookieVerf: verf, EOF: true, Entries: []DirEntry{
			{FileID: 1<<32 | 1, Name: []byte("."), Cookie: 1}, {FileID: 2<<32 | 3, Name: []byte("file"), Cookie: 9}}}},
	{nfs.NFSProcedureReadDirPlus, func(w *xdr.Writer) {
		var d DirWriter
		d.Begin(w, nil, testFSID, &verf, 4096, 4096)
		d.AddPlus(&ents[0], nil)
		d.AddPlus(&ents[1], fh)
		d.End(false)
	}, okHex + "00000000 t:verifier 00000001 0000000100000001 00000001 t:. 000000 0000000000000001 00000000 00000000 " +
		"00000001 0000000200000003 00000004 t:file 0000000000000009 " + postHex + "00000001 " + fhHex + "00000000 00000000",
		&ReaddirRes{Plus: true, CookieVerf: verf, Entries: []DirEntry{
			{FileID: 1<<32 | 1, Name: []byte("."), Cookie: 1}, {FileID: 2<<32 | 3, Name: []byte("file"), Cookie: 9, Attr: postOp, FH: fh}}}},
	{nfs.NFSProcedureFSStat, func(w *xdr.Writer) { PutFSStatOK(w, nil, testFSID, &stat, 7) }, okHex + "00000000 0000000000000001 0000000000000002 0000000000000003 0000000000000004 0000000000000005 0000000000000006 00000007", &FSStatRes{Statfs: stat, Invarsec: 7}},
	{nfs.NFSProcedureFSInfo, func(w *xdr.Writer) { PutFSInfoOK(w, &attr, testFSID, &info) }, okHex + postHex + "00000001 00000002 00000003 00000004 00000005 00000006 00000007 0000000000000008 00000000 00000001 0000001b", &FSInfoRes{Obj: postOp, Info: info}},
	{nfs.NFSProcedurePathConf, func(w *xdr.Writer) { PutPathConfOK(w, nil, testFSID, &conf) }, okHex + "00000000 0000fde8 000000ff 00000001 00000001 00000000 00000001", &PathConfRes{Conf: conf}},
	{nfs.NFSProcedureCommit, func(w *xdr.Writer) { PutCommitOK(w, pre, &attr, testFSID, &verf) }, okHex + wccHex + "t:verifier", &CommitRes{Wcc: wcc, Verf: verf}},
}

func TestResults(t *testing.T) {
	seen := [NumProcs]bool{}
	for _, v := range resVectors {
		seen[v.proc] = true
		t.Run(v.proc.String(), func(t *testing.T) {
			want := unhex(t, v.hex)
			w := xdr.Writer{Buf: []byte("rpc head")} // results follow a header
			v.put(&w)
			raw := w.Buf[8:]
			if !bytes.Equal(raw, want) {
				t.Fatalf("encoded\n%x\nwant\n%x", raw, want)
			}
			got := newRes[v.proc]()
			r := xdr.NewReader(raw)
			if err := got.Decode(r); err != nil || r.Len() != 0 {
				t.Fatalf("%v, %d bytes left", err, r.Len())
			}
			if d := cmp.Diff(v.res, got); d != "" {
				t.Error(d)
			}
			for n := range raw {
				if err := newRes[v.proc]().Decode(xdr.NewReader(raw[:n])); err == nil {
					t.Fatalf("cut to %d bytes: no error", n)
				}
			}
			if n := testing.AllocsPerRun(20, func() { w.Buf = w.Buf[:8]; v.put(&w) }); n != 0 && !raceEnabled {
				t.Errorf("encoding makes %v allocations", n)
			}
		})
	}
	for p, ok := range seen {
		if !ok {
			t.Errorf("no vector for procedure %v", nfs.NFSProcedure(p))
		}
	}
}

func TestPutFail(t *testing.T) {
	for p := nfs.NFSProcedureGetAttr; p < NumProcs; p++ {
		var w xdr.Writer
		PutFail(&w, p, nfs.NFSStatusBadHandle)
		r := xdr.NewReader(w.Buf)
		if err := newRes[p]().Decode(r); err != nil || r.Len() != 0 {
			t.Errorf("%v: %v, %d bytes left", p, err, r.Len())
		}
		for n := range w.Buf {
			if err := newRes[p]().Decode(xdr.NewReader(w.Buf[:n])); err == nil {
				t.Errorf("%v cut to %d: no error", p, n)
			}
		}
	}
	var w xdr.Writer
	PutFail(&w, 1000, nfs.NFSStatusBadHandle) // must not crash
}

func TestReadHeadSize(t *testing.T) {
	var w xdr.Writer
	PutReadHead(&w, &attr, 0, 1, false)
	if len(w.Buf) != ReadHeadSize {
		t.Errorf("%d bytes", len(w.Buf))
	}
	for n, want := range map[uint32]uint32{0: 0, 1: 3, 2: 2, 3: 1, 4: 0, 1<<20 + 1: 3} {
		if Pad(n) != want {
			t.Errorf("Pad(%d) = %d", n, Pad(n))
		}
	}
}

// TestReaddirBudget checks for every limit that a result is as full as can be
// and not fuller.
func TestReaddirBudget(t *testing.T) {
	var all []wire.Dirent
	for i := range 12 {
		all = append(all, wire.Dirent{Cookie: uint64(i + 1), Name: []byte(strings.Repeat("n", i*3+1)), HasAttr: i%3 != 2, Attr: attr})
	}
	var fh48 [HandleSize]byte
	for _, plus := range []bool{false, true} {
		size := func(e *wire.Dirent) int {
			if !plus {
				return EntrySize(len(e.Name))
			}
			if e.HasAttr {
				return EntryPlusSize(len(e.Name), HandleSize)
			}
			return EntryPlusSize(len(e.Name), HandleSize) - AttrSize
		}
		for _, dirCount := range []uint32{0, 1, 60, 200, 1 << 20} {
			for limit := uint32(0); limit < 3000; limit++ {
				fit, room, dirRoom := 0, int(limit)-ReaddirOverhead, int(dirCount)
				for i := range all {
					room -= size(&all[i])
					dirRoom -= EntrySize(len(all[i].Name))
					if room < 0 || plus && dirCount != 0 && i > 0 && dirRoom < 0 {
						break
					}
					fit++
				}
				var w xdr.Writer
				var d DirWriter
				dc := uint32(0)
				if plus {
					dc = dirCount
				}
				d.Begin(&w, &attr, testFSID, &verf, dc, limit)
				for i := range all {
					if plus && !d.AddPlus(&all[i], fh48[:]) || !plus && !d.Add(&all[i]) {
						break
					}
				}
				where := fmt.Sprintf("plus %v dircount %d limit %d", plus, dirCount, limit)
				st := d.End(true)
				if fit == 0 != (st == nfs.NFSStatusTooSmall) {
					t.Fatalf("%s: status %d, %d entries fit", where, st, fit)
				}
				res := ReaddirRes{Plus: plus}
				r := xdr.NewReader(w.Buf)
				if err := res.Decode(r); err != nil || r.Len() != 0 || res.Status != st {
					t.Fatalf("%s: %v, %d bytes left, status %d", where, err, r.Len(), res.Status)
				}
				if len(res.Entries) != fit || d.Entries() != fit && st == nfs.NFSStatusOk {
					t.Fatalf("%s: %d entries, want %d", where, len(res.Entries), fit)
				}
				if st == nfs.NFSStatusOk {
					if len(w.Buf)-4 > int(limit) {
						t.Fatalf("%s: %d bytes", where, len(w.Buf)-4)
					}
					if res.EOF != (fit == len(all)) {
						t.Fatalf("%s: eof %v after %d", where, res.EOF, fit)
					}
				}
			}
		}
	}
}

func TestReaddirEmpty(t *testing.T) {
	for _, tc := range []struct {
		limit uint32
		eof   bool
		want  nfs.NFSStatus
	}{
		{ReaddirOverhead, true, nfs.NFSStatusOk},
		{ReaddirOverhead - 1, true, nfs.NFSStatusTooSmall},
		{4096, false, nfs.NFSStatusTooSmall},
	} {
		var w xdr.Writer
		var d DirWriter
		d.Begin(&w, &attr, testFSID, &verf, 0, tc.limit)
		if st := d.End(tc.eof); st != tc.want {
			t.Errorf("limit %d eof %v: %d", tc.limit, tc.eof, st)
		}
		if tc.want == nfs.NFSStatusOk && len(w.Buf) != 4+ReaddirOverhead {
			t.Errorf("%d bytes", len(w.Buf))
		}
	}
}

func TestResultsRefused(t *testing.T) {
	for _, tc := range []struct {
		proc nfs.NFSProcedure
		hex  string
	}{
		{nfs.NFSProcedureGetAttr, okHex + "00000008" + attrHex[8:]},
		{nfs.NFSProcedureWrite, okHex + wccHex + "00000007 00000003 t:verifier"},
		{nfs.NFSProcedureLookup, okHex + "00000041 " + strings.Repeat("00", 68) + "00000000 00000000"},
	} {
		if err := newRes[tc.proc]().Decode(xdr.NewReader(unhex(t, tc.hex))); err == nil {
			t.Errorf("%v %s: no error", tc.proc, tc.hex)
		}
	}
}

func FuzzResults(f *testing.F) {
	for _, v := range resVectors {
		f.Add(uint32(v.proc), unhex(f, v.hex))
	}
	f.Fuzz(func(t *testing.T, proc uint32, in []byte) {
		x := newRes[proc%NumProcs]()
		r := xdr.NewReader(in)
		if err := x.Decode(r); err == nil && r.Err() != nil {
			t.Fatalf("the reader's error was lost: %v", r.Err())
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	var w xdr.Writer
	b.Run("getattr", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			w.Buf = w.Buf[:0]
			PutGetattrOK(&w, &attr, testFSID)
		}
	})
	b.Run("readdirplus-100", func(b *testing.B) {
		var fh48 [HandleSize]byte
		var d DirWriter
		b.ReportAllocs()
		for b.Loop() {
			w.Buf = w.Buf[:0]
			d.Begin(&w, &attr, testFSID, &verf, 0, 1<<20)
			for range 100 {
				d.AddPlus(&ents[1], fh48[:])
			}
			d.End(true)
		}
	})
}
