package sunrpc

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// FuzzDecodeCall: no input may panic, and what is decoded must lie within the record.
func FuzzDecodeCall(f *testing.F) {
	f.Add(callMsg(1, 2, 3, 4, 5, 6))
	f.Add(words(1, 1, 0, 0, 0, 0))
	var cr Cred
	cr.Flavor, cr.NGIDs = AuthSys, 16
	f.Add(append(words(1, 0, 2, testProg, 3, 1), appendCred(nil, &cr)...))
	f.Add(words(1, 0, 2, testProg, 3, 1, 1, 20, 0, 255, 0, 0, 17, 0, 0))
	f.Add(words(1, 0, 2, testProg, 3, 1, 1, 0xffffffff, 0, 0))
	f.Fuzz(func(t *testing.T, rec []byte) {
		var c Call
		v, stat := decodeCall(&c, rec)
		switch v {
		case vCall:
			if len(rec) < minCallHeader || len(c.Raw) != len(rec)-32 || !bytes.HasSuffix(rec, c.Args) ||
				len(c.Args) > len(rec)-minCallHeader || c.Cred.NGIDs > maxGIDs || c.Cred.Flavor > AuthSys {
				t.Fatalf("decoded %+v from %x", c, rec)
			}
		case vAuthError:
			if stat == 0 {
				t.Fatalf("AUTH_ERROR with AUTH_OK for %x", rec)
			}
		}
		if v != vGarbage && c.XID != binary.BigEndian.Uint32(rec) {
			t.Fatalf("xid %x of %x", c.XID, rec)
		}
	})
}

// reference cuts a stream the slow way: the records up to the first fault.
func reference(in []byte, maxRecord, maxFrags int) (recs [][]byte) {
	var rec []byte
	frags := 0
	for len(in) >= 4 {
		m := binary.BigEndian.Uint32(in)
		n := int(m & (1<<31 - 1))
		in = in[4:]
		if frags++; frags > maxFrags || n > maxRecord-len(rec) || n > len(in) {
			return recs
		}
		rec = append(rec, in[:n]...)
		in = in[n:]
		if m>>31 != 0 {
			recs = append(recs, rec)
			rec, frags = nil, 0
		}
	}
	return recs
}

// FuzzRecords sends a stream, cut in two, through a real connection and compares the replies with those
// that a simple reading of the stream demands.
func FuzzRecords(f *testing.F) {
	f.Add(record(callMsg(1, procEcho, 1, 2, 3, 4)), uint16(7))
	f.Add(append(mark(20, false), append(callMsg(1, procEcho)[:20], append(mark(20, true), callMsg(1, procEcho)[20:]...)...)...), uint16(22))
	f.Add(append(record(callMsg(1, 0)), mark(0, true)...), uint16(1))
	f.Add(bytes.Repeat(mark(0, false), 20), uint16(9))
	f.Add(append(record(callMsg(1, 0)), mark(1<<20, true)...), uint16(45))
	f.Add(append(record(words(1, 1, 2)), record(words(1, 0, 9))...), uint16(3))
	cfg := Config{MaxRecord: 64 << 10, MaxFragments: 8, Programs: []Program{{
		Prog: testProg, VersLow: testLow, VersHigh: testHigh,
		NumProcs: func(uint32) uint32 { return 2 }, Handler: newTestHandler(),
	}}}
	s := NewServer(cfg)
	f.Cleanup(func() { _ = s.Close() })
	a, err := s.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte, cut uint16) {
		if len(in) > 200<<10 {
			t.Skip("longer than the socket buffers are sure to take")
		}
		want := 0
		sound := true
		for _, rec := range reference(in, cfg.MaxRecord, cfg.MaxFragments) {
			var c Call
			v, _ := decodeCall(&c, rec)
			if v == vGarbage {
				sound = false
				break
			}
			if v != vIgnore {
				want++
			}
		}
		nc, err := net.Dial("tcp", a.String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
		k := min(int(cut), len(in))
		_, _ = nc.Write(in[:k])
		_, _ = nc.Write(in[k:]) // the server may have closed already
		_ = nc.(*net.TCPConn).CloseWrite()
		got := 0
		for {
			if _, err = readRecord(nc); err != nil {
				break
			}
			got++
		}
		// A reset, which follows a fault with input unread, may overtake replies.
		if got > want || got < want && err == io.EOF && sound {
			t.Fatalf("%d replies, want %d (%v)", got, want, err)
		}
	})
}
