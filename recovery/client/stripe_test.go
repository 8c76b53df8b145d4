package client

import (
	"math/rand"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

// The mapping is checked against counting bytes one by one.
func TestStripeMappingAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewSource(1))
	for round := 0; round < 200; round++ {
		l := wire.Layout{StripeSize: uint32(1 + rng.Intn(7)), Count: uint8(1 + rng.Intn(5))}
		size := uint64(rng.Intn(120))
		var objs [wire.MaxStripes]uint64
		where := make([]struct {
			s uint8
			o uint64
		}, size)
		for b := uint64(0); b < size; b++ {
			s := uint8(b / uint64(l.StripeSize) % uint64(l.Count))
			if l.Count == 1 {
				s = 0
			}
			where[b].s, where[b].o = s, objs[s]
			objs[s]++
		}
		var end uint64
		for s := uint8(0); s < l.Count; s++ {
			if got := l.ObjectSize(s, size); got != objs[s] {
				t.Fatalf("layout %+v size %d stripe %d: object size %d, want %d", l, size, s, got, objs[s])
			}
			end = max(end, l.FileEnd(s, objs[s]))
		}
		if end != size {
			t.Fatalf("layout %+v: file end %d, want %d", l, end, size)
		}
		off := uint64(0)
		if size > 0 {
			off = uint64(rng.Intn(int(size)))
		}
		n := int(size - off)
		covered := 0
		for _, p := range pieces(nil, &l, off, n) {
			for i := 0; i < p.n; i++ {
				w := where[off+uint64(p.start+i)]
				if w.s != p.stripe || w.o != p.obj+uint64(i) {
					t.Fatalf("layout %+v off %d: byte %d in stripe %d at %d, want %d at %d", l, off, p.start+i, p.stripe, p.obj+uint64(i), w.s, w.o)
				}
				covered++
			}
		}
		if covered != n {
			t.Fatalf("covered %d of %d bytes", covered, n)
		}
	}
}

func TestStripeSizeLimits(t *testing.T) {
	l := wire.Layout{StripeSize: 1 << 20, Count: 3}
	var end uint64
	for s := uint8(0); s < 3; s++ {
		end = max(end, l.FileEnd(s, l.ObjectSize(s, wire.MaxFileSize)))
	}
	if end != wire.MaxFileSize {
		t.Fatalf("end %d, want %d", end, uint64(wire.MaxFileSize))
	}
}
