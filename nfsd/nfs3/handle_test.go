package nfs3

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync"
	"testing"

	"github.com/baton-nfs/baton/recovery/wire"
)

var testHandle = Handle{FSID: 0x8001020304050607, FID: wire.FID{Seq: 2, OID: 3, Ver: 4}, Generation: 5}

// The layout is for ever: clients keep handles across upgrades.
func TestHandleLayout(t *testing.T) {
	key := []byte("0123456789abcdef0123456789abcdef")
	want, _ := hex.DecodeString("01000000" + "8001020304050607" + "0000000000000002" + "00000003" + "00000004" + "00000005")
	mac := hmac.New(sha256.New, key)
	mac.Write(want)
	want = mac.Sum(want)[:HandleSize]
	c := NewCodec(key)
	var b [HandleSize]byte
	for range 2 { // without and with the table
		c.Encode(testHandle, &b)
		if !bytes.Equal(b[:], want) {
			t.Fatalf("encoded\n%x\nwant\n%x", b, want)
		}
	}
	for _, d := range []*Codec{c, NewCodec(key)} {
		for range 2 {
			if h, err := d.Decode(b[:]); err != nil || h != testHandle {
				t.Fatalf("decoded %+v, %v", h, err)
			}
		}
	}
	if _, err := NewCodec([]byte("another key")).Decode(b[:]); !errors.Is(err, wire.ErrBadHandle) {
		t.Errorf("handle of another cluster: %v", err)
	}
}

func TestHandleRefusesChanges(t *testing.T) {
	cold, warm := NewCodec([]byte("k")), NewCodec([]byte("k"))
	var b [HandleSize]byte
	warm.Encode(testHandle, &b)
	for i := range b {
		for _, x := range []byte{1, 0x80} {
			m := b
			m[i] ^= x
			for _, c := range []*Codec{cold, warm} {
				if _, err := c.Decode(m[:]); !errors.Is(err, wire.ErrBadHandle) {
					t.Errorf("byte %d changed: %v", i, err)
				}
			}
		}
	}
	for n := range HandleSize {
		if _, err := warm.Decode(b[:n]); !errors.Is(err, wire.ErrBadHandle) {
			t.Errorf("length %d: %v", n, err)
		}
	}
	if _, err := warm.Decode(append(b[:], 0)); !errors.Is(err, wire.ErrBadHandle) {
		t.Errorf("length %d: %v", HandleSize+1, err)
	}
}

// TestHandleTableConcurrent makes many goroutines fight for few slots.
func TestHandleTableConcurrent(t *testing.T) {
	c := NewCodec([]byte("k"))
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var b [HandleSize]byte
			for i := range 20000 {
				h := Handle{FSID: uint64(g & 1), FID: wire.FID{Seq: 2, OID: uint32(i)}}
				c.Encode(h, &b)
				if got, err := c.Decode(b[:]); err != nil || got != h {
					t.Errorf("%+v: %+v %v", h, got, err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// TestHandleSlotCollision puts different handles into one slot.
func TestHandleSlotCollision(t *testing.T) {
	c := NewCodec([]byte("k"))
	var a, b [HandleSize]byte
	ha := testHandle
	c.Encode(ha, &a)
	hb := ha
	for range 1 << 20 {
		hb.FID.OID++
		var e [HandleSize]byte
		e[0] = handleVersion
		copy(e[4:], a[4:])
		hb.FID.Put(e[12:])
		if c.slotOf(signedWords(e[:])) == c.slotOf(signedWords(a[:])) {
			break
		}
	}
	NewCodec([]byte("k")).Encode(hb, &b)
	if hb == ha || c.slotOf(signedWords(b[:])) != c.slotOf(signedWords(a[:])) {
		t.Fatal("no collision found")
	}
	for range 3 {
		c.Encode(hb, &b)
		if h, err := c.Decode(a[:]); err != nil || h != ha {
			t.Fatalf("%+v %v", h, err)
		}
		if h, err := c.Decode(b[:]); err != nil || h != hb {
			t.Fatalf("%+v %v", h, err)
		}
	}
}

func TestHandleDoesNotAllocate(t *testing.T) {
	c := NewCodec([]byte("k"))
	var b [HandleSize]byte
	h := testHandle
	if n := testing.AllocsPerRun(200, func() {
		h.FID.OID++ // never in the table
		c.Encode(h, &b)
		if _, err := c.Decode(b[:]); err != nil {
			t.Error(err)
		}
		b[47] ^= 1
		if _, err := c.Decode(b[:]); err == nil {
			t.Error("no error")
		}
	}); n > 0 && !raceEnabled {
		t.Errorf("%v allocations", n)
	}
}

func FuzzHandle(f *testing.F) {
	c := NewCodec([]byte("k"))
	var b [HandleSize]byte
	c.Encode(testHandle, &b)
	f.Add(b[:])
	f.Add(b[:20])
	f.Fuzz(func(t *testing.T, in []byte) {
		h, err := c.Decode(in)
		if err != nil {
			if !errors.Is(err, wire.ErrBadHandle) || h != (Handle{}) {
				t.Fatalf("%+v %v", h, err)
			}
			return
		}
		var out [HandleSize]byte
		c.Encode(h, &out)
		if !bytes.Equal(out[:], in) {
			t.Fatalf("%x decodes to %+v, which encodes to %x", in, h, out)
		}
	})
}

func BenchmarkHandle(b *testing.B) {
	c := NewCodec([]byte("0123456789abcdef0123456789abcdef"))
	var fh [HandleSize]byte
	h := testHandle
	b.Run("encode/known", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			c.Encode(h, &fh)
		}
	})
	b.Run("decode/known", func(b *testing.B) {
		c.Encode(h, &fh)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Decode(fh[:]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode/unknown", func(b *testing.B) {
		var p handleWords
		b.ReportAllocs()
		for b.Loop() {
			p[3]++
			c.sign(&p)
		}
	})
}
