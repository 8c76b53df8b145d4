package xdr

import "encoding/binary"

// Writer appends XDR items to Buf. Buf may be set, shortened and taken by its owner at any time; it
// only grows through append. The zero Writer is ready to use.
type Writer struct {
	Buf []byte
}

var zeros [4]byte

// Len returns len(Buf): the offset at which the next item starts.
func (w *Writer) Len() int { return len(w.Buf) }

// Truncate shortens Buf to n bytes; n must not exceed Len.
func (w *Writer) Truncate(n int) { w.Buf = w.Buf[:n] }

// Uint32 appends an unsigned integer or enum.
func (w *Writer) Uint32(v uint32) { w.Buf = binary.BigEndian.AppendUint32(w.Buf, v) }

// Int32 appends a signed integer.
func (w *Writer) Int32(v int32) { w.Uint32(uint32(v)) }

// Uint64 appends an unsigned hyper integer.
func (w *Writer) Uint64(v uint64) { w.Buf = binary.BigEndian.AppendUint64(w.Buf, v) }

// Int64 appends a signed hyper integer.
func (w *Writer) Int64(v int64) { w.Uint64(uint64(v)) }

// Bool appends a boolean.
func (w *Writer) Bool(v bool) {
	var n uint32
	if v {
		n = 1
	}
	w.Uint32(n)
}

// Opaque appends variable-length opaque data: length, bytes, padding.
func (w *Writer) Opaque(b []byte) {
	w.Uint32(uint32(len(b)))
	w.FixedOpaque(b)
}

// FixedOpaque appends bytes and padding without a length.
func (w *Writer) FixedOpaque(b []byte) {
	w.Buf = append(w.Buf, b...)
	w.Buf = append(w.Buf, zeros[:Pad(len(b))]...)
}

// String appends a string: length, bytes, padding.
func (w *Writer) String(s string) {
	w.Uint32(uint32(len(s)))
	w.Buf = append(w.Buf, s...)
	w.Buf = append(w.Buf, zeros[:Pad(len(s))]...)
}

// PutUint32At overwrites the four bytes at offset off, which must have been appended before.
func (w *Writer) PutUint32At(off int, v uint32) { binary.BigEndian.PutUint32(w.Buf[off:off+4], v) }
