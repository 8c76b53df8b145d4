package sunrpc

import (
	"testing"
	"unsafe"
)

func TestBufs(t *testing.T) {
	freed := 0
	g := &gauge{freed: func(int64, int64) { freed++ }}
	for _, n := range []int{1, 4096, 5000, 16 << 10, 33 << 10, MaxPayload, MaxPayload + 1, 3 << 20, 5 << 20} {
		for range 3 {
			b := getBuf(g, n)
			if len(b.b) < n {
				t.Errorf("%d bytes for %d", len(b.b), n)
			}
			if p := uintptr(unsafe.Pointer(&b.b[0])); p%4096 != 0 {
				t.Errorf("buffer for %d bytes at %#x: not page-aligned", n, p)
			}
			if g.used.Load() != int64(len(b.b)) {
				t.Errorf("gauge %d, want %d", g.used.Load(), len(b.b))
			}
			b.retain()
			b.release()
			if g.used.Load() == 0 {
				t.Error("freed with a reference left")
			}
			b.release()
			if g.used.Load() != 0 {
				t.Errorf("gauge %d after release", g.used.Load())
			}
		}
	}
	if freed != 27 {
		t.Errorf("freed called %d times, want 27", freed)
	}
	ci := classFor(MaxPayload)
	trimBufs()
	for range 20 {
		trimBufs()
	}
	if n := len(classes[ci].free); n != 0 {
		t.Errorf("%d unused buffers survive trimming", n)
	}
}
