package xdr

import (
	"bytes"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	var w Writer
	w.Uint32(0xdeadbeef)
	w.Int32(-2)
	w.Uint64(1<<63 | 5)
	w.Int64(-3)
	w.Bool(true)
	w.Bool(false)
	w.Opaque([]byte("abcde"))
	w.String("xyz")
	w.FixedOpaque([]byte("12"))
	at := w.Len()
	w.Uint32(0)
	w.PutUint32At(at, 77)

	want := []byte{
		0xde, 0xad, 0xbe, 0xef, 0xff, 0xff, 0xff, 0xfe,
		0x80, 0, 0, 0, 0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfd,
		0, 0, 0, 1, 0, 0, 0, 0,
		0, 0, 0, 5, 'a', 'b', 'c', 'd', 'e', 0, 0, 0,
		0, 0, 0, 3, 'x', 'y', 'z', 0,
		'1', '2', 0, 0,
		0, 0, 0, 77,
	}
	if !bytes.Equal(w.Buf, want) {
		t.Fatalf("encoded\n%x\nwant\n%x", w.Buf, want)
	}
	r := NewReader(w.Buf)
	if v := r.Uint32(); v != 0xdeadbeef {
		t.Errorf("Uint32 = %x", v)
	}
	if v := r.Int32(); v != -2 {
		t.Errorf("Int32 = %d", v)
	}
	if v := r.Uint64(); v != 1<<63|5 {
		t.Errorf("Uint64 = %x", v)
	}
	if v := r.Int64(); v != -3 {
		t.Errorf("Int64 = %d", v)
	}
	if !r.Bool() || r.Bool() {
		t.Error("Bool")
	}
	if v := r.Opaque(5); string(v) != "abcde" || cap(v) != 5 {
		t.Errorf("Opaque = %q cap %d", v, cap(v))
	}
	if v := r.String(255); string(v) != "xyz" {
		t.Errorf("String = %q", v)
	}
	if v := r.FixedOpaque(2); string(v) != "12" {
		t.Errorf("FixedOpaque = %q", v)
	}
	if r.Len() != 4 || r.Offset() != len(want)-4 {
		t.Errorf("Len %d Offset %d", r.Len(), r.Offset())
	}
	if v := NewReader(r.Rest()).Uint32(); v != 77 {
		t.Errorf("patched = %d", v)
	}
	if r.Err() != nil || r.Len() != 0 {
		t.Errorf("Err %v Len %d", r.Err(), r.Len())
	}
}

func TestErrorsStick(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []byte
		read func(*Reader)
		want error
	}{
		{"uint32", []byte{0, 0, 1}, func(r *Reader) { r.Uint32() }, ErrShort},
		{"uint64", []byte{0, 0, 0, 1, 2, 3, 4}, func(r *Reader) { r.Uint64() }, ErrShort},
		{"bool 2", []byte{0, 0, 0, 2, 0, 0, 0, 1}, func(r *Reader) { r.Bool() }, ErrBool},
		{"opaque over max", []byte{0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0}, func(r *Reader) { r.Opaque(4) }, ErrTooLong},
		{"opaque huge", []byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4}, func(r *Reader) { r.Opaque(1 << 30) }, ErrTooLong},
		{"opaque short", []byte{0, 0, 0, 5, 1, 2, 3, 4}, func(r *Reader) { r.Opaque(9) }, ErrShort},
		{"opaque without padding", []byte{0, 0, 0, 5, 1, 2, 3, 4, 5}, func(r *Reader) { r.Opaque(9) }, ErrShort},
		{"skip", []byte{1, 2}, func(r *Reader) { r.Skip(3) }, ErrShort},
		{"negative skip", []byte{1, 2}, func(r *Reader) { r.Skip(-1) }, ErrShort},
		{"negative fixed", []byte{1, 2}, func(r *Reader) { r.FixedOpaque(-4) }, ErrShort},
	} {
		r := NewReader(tc.in)
		tc.read(r)
		if r.Err() != tc.want {
			t.Errorf("%s: error %v, want %v", tc.name, r.Err(), tc.want)
		}
		if r.Uint32() != 0 || r.Rest() != nil || r.Len() != 0 || r.Opaque(1) != nil || r.Err() != tc.want {
			t.Errorf("%s: error did not stick", tc.name)
		}
	}
}

func TestNoAllocs(t *testing.T) {
	buf := make([]byte, 0, 256)
	n := testing.AllocsPerRun(100, func() {
		w := Writer{Buf: buf[:0]}
		w.Uint32(1)
		w.String("hello")
		w.Bool(true)
		r := NewReader(w.Buf)
		r.Uint32()
		r.String(10)
		if !r.Bool() || r.Err() != nil {
			t.Error("decode failed")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations per run, want 0", n)
	}
}

// FuzzReader interprets the first bytes of the input as a program of reads over the rest: no read may
// panic, run past the input or go on after an error.
func FuzzReader(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6}, []byte{0, 0, 0, 1, 0, 0, 0, 3, 'a', 'b', 'c', 0})
	f.Add([]byte{2, 2, 2}, []byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, prog, in []byte) {
		r := NewReader(in)
		for _, op := range prog {
			before, failed := r.Offset(), r.Err() != nil
			switch op % 7 {
			case 0:
				r.Uint32()
			case 1:
				r.Uint64()
			case 2:
				if b := r.Opaque(int(op)); len(b) > int(op) {
					t.Fatalf("Opaque(%d) returned %d bytes", op, len(b))
				}
			case 3:
				r.Bool()
			case 4:
				r.FixedOpaque(int(op) - 8)
			case 5:
				r.Skip(int(op) - 8)
			case 6:
				r.String(int(op))
			}
			if r.Offset() < before || r.Offset() > len(in) || failed && r.Offset() != before {
				t.Fatalf("offset %d -> %d of %d, failed before: %v", before, r.Offset(), len(in), failed)
			}
		}
	})
}
