package owner

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"
)

var sample = Record{
	Node: "n1.example", Boot: "2f3a7b9c-0000-4000-8000-123456789abc", Incarnation: [16]byte{1, 2, 3, 15: 9},
	Generation: 7, Seq: 300, Interval: 1500 * time.Millisecond, State: Checking, Late: true,
}

// The layout does not change: other nodes may run another version.
func TestRecordLayout(t *testing.T) {
	b := make([]byte, BlockSize)
	sample.encode(b)
	want := "6261746f6e6f776e" + "01" + "03" + "01" + "00" + "98324ef4" + "01020300000000000000000000000009" +
		"0000000000000007" + "000000000000012c" + "0000000059682f00" +
		"0a" + hex.EncodeToString([]byte("n1.example")) + "24" + hex.EncodeToString([]byte(sample.Boot))
	if got := hex.EncodeToString(bytes.TrimRight(b, "\x00")); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	var r Record
	if err := r.decode(b); err != nil || r != sample {
		t.Errorf("%+v, %v", r, err)
	}
	long := Record{Node: strings.Repeat("n", 300), Boot: strings.Repeat("b", 300), Interval: time.Second, State: Owned}
	long.encode(b)
	if err := r.decode(b); err != nil || r.Node != long.Node[:255] || r.Boot != long.Boot[:255] {
		t.Errorf("%+v, %v", r, err)
	}
}

// Every changed bit, and every value that makes no sense, is noticed.
func TestRecordDamage(t *testing.T) {
	b := make([]byte, BlockSize)
	sample.encode(b)
	var r Record
	for i := range 8 * 512 {
		b[i/8] ^= 1 << (i % 8)
		if err := r.decode(b); !errors.Is(err, errDamaged) {
			t.Fatalf("bit %d: %v", i, err)
		}
		b[i/8] ^= 1 << (i % 8)
	}
	b[BlockSize-1] ^= 1
	if err := r.decode(b); !errors.Is(err, errDamaged) {
		t.Error(err)
	}
	for what, change := range map[string]func(r *Record){
		"no state":      func(r *Record) { r.State = 0 },
		"unknown state": func(r *Record) { r.State = 9 },
		"no interval":   func(r *Record) { r.Interval = 0 },
		"negative":      func(r *Record) { r.Interval = -time.Second },
		"long interval": func(r *Record) { r.Interval = MaxInterval + 1 },
		"generation":    func(r *Record) { r.Generation = 1<<64 - 1 },
		"seq":           func(r *Record) { r.Seq = 1<<64 - 1 },
	} {
		c := sample
		change(&c)
		c.encode(b)
		if err := r.decode(b); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	sample.encode(b)
	b[8] = 2 // another version, with a checksum that is right
	be.PutUint32(b[offSum:], checksum(b))
	if err := r.decode(b); !errors.Is(err, errDamaged) {
		t.Error(err)
	}
}

// Which record counts, what is written next, and what a mark in the wrong place is.
func TestSnapshot(t *testing.T) {
	rec := func(gen, seq uint64, change func(*Record)) []byte {
		r := Record{Node: "a", Generation: gen, Seq: seq, Interval: time.Second, State: Owned}
		if change != nil {
			change(&r)
		}
		b := make([]byte, BlockSize)
		r.encode(b)
		return b
	}
	mark := func(r *Record) { r.State = wanted }
	empty := make([]byte, BlockSize)
	torn := append(append([]byte(nil), rec(9, 9, nil)[:700]...), empty[700:]...)
	torn[650] = 1
	for _, x := range []struct {
		what                    string
		b                       [][]byte
		newest, older           int
		fresh, damaged, settled bool
		mark                    bool
	}{
		{"nothing", nil, -1, 0, true, false, false, false},
		{"zeros", [][]byte{empty, empty, empty}, -1, 0, true, false, false, false},
		{"first", [][]byte{rec(1, 1, nil)}, 0, 1, false, false, false, false},
		{"second", [][]byte{empty, rec(1, 1, nil)}, 1, 0, false, false, false, false},
		{"by seq", [][]byte{rec(1, 9, nil), rec(1, 10, nil), rec(0, 1, mark)}, 1, 0, false, false, true, true},
		{"by generation", [][]byte{rec(2, 9, nil), rec(1, 10, nil)}, 0, 1, false, false, true, false},
		{"two owners", [][]byte{rec(2, 9, func(r *Record) { r.Incarnation[0] = 1 }), rec(1, 10, nil)}, 0, 1, false, false, false, false},
		{"late", [][]byte{rec(1, 9, nil), rec(1, 10, func(r *Record) { r.Late = true })}, 1, 0, false, false, false, false},
		{"torn", [][]byte{torn, rec(1, 10, nil)}, 1, 0, false, true, false, false},
		{"short", [][]byte{rec(1, 10, nil), rec(1, 11, nil)[:100]}, 0, 1, false, true, false, false},
		{"both torn", [][]byte{torn, torn}, -1, 0, false, true, false, false},
		{"mark as record", [][]byte{rec(1, 10, mark), rec(1, 9, nil), rec(1, 10, nil)}, 1, 0, false, true, false, false},
	} {
		var s Snapshot
		s.decode(bytes.Join(x.b, nil))
		if s.newest() != x.newest || s.older() != x.older || s.fresh() != x.fresh || s.damaged() != x.damaged || s.settled() != x.settled || s.Mark.OK != x.mark {
			t.Errorf("%s: newest %d older %d fresh %v damaged %v settled %v mark %v", x.what, s.newest(), s.older(), s.fresh(), s.damaged(), s.settled(), s.Mark.OK)
		}
	}
}

func FuzzSnapshot(f *testing.F) {
	b := make([]byte, BlockSize)
	sample.encode(b)
	f.Add(b[:200], b[:100], b[:200], uint16(FileSize))
	f.Fuzz(func(t *testing.T, one, two, three []byte, size uint16) {
		file := make([]byte, FileSize)
		for i, b := range [][]byte{one, two, three} {
			block := file[i*BlockSize : (i+1)*BlockSize]
			copy(block, b)
			// Checksums that are right let everything else be tried.
			if len(b)%8 != 7 {
				be.PutUint32(block[offSum:], checksum(block))
			}
		}
		var s Snapshot
		s.decode(file[:min(int(size), FileSize)])
		for _, p := range []*Slot{&s.Slots[0], &s.Slots[1], &s.Mark} {
			if !p.OK {
				continue
			}
			again := make([]byte, BlockSize)
			p.Record.encode(again)
			var r Record
			if err := r.decode(again); err != nil || r != p.Record {
				t.Errorf("%+v became %+v, %v", p.Record, r, err)
			}
		}
		// Nothing that is read makes the machine fail.
		m := NewMachine(Config{Node: "x", Interval: time.Second, Wait: size%2 == 0})
		now := int64(1)
		m.Start(now)
		for range 40 {
			now += int64(100 * time.Millisecond)
			for _, a := range append([]Action(nil), m.Actions()...) {
				switch a.Kind {
				case ActRead:
					m.Read(now, &s, nil)
				case ActWrite, ActMark:
					m.Wrote(now, nil)
				}
			}
			m.Tick(now)
		}
	})
}
