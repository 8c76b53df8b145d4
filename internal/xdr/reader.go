// Package xdr encodes and decodes XDR (RFC 4506) on caller-owned byte slices.
//
// It uses no reflection and allocates nothing while decoding: variable-length items are returned as
// slices of the input. Encoding appends to a slice that the caller may pool.
package xdr

import (
	"encoding/binary"
	"errors"
)

// Decoding errors. A Reader reports the first one it met; they are never wrapped by this package.
var (
	// ErrShort means that the input ended inside an item.
	ErrShort = errors.New("xdr: short input")
	// ErrTooLong means that a length word exceeds the maximum the caller gave.
	ErrTooLong = errors.New("xdr: length over limit")
	// ErrBool means that a boolean was neither 0 nor 1 (RFC 4506 §4.4).
	ErrBool = errors.New("xdr: boolean is neither 0 nor 1")
)

// Reader is a cursor over XDR input. The first error sticks: later calls return zero values and
// consume nothing, so that a decoder may check Err once at its end. The zero Reader is empty.
//
// Slices that a Reader returns alias its input.
type Reader struct {
	buf []byte
	off int
	err error
}

// NewReader returns a Reader over b.
func NewReader(b []byte) *Reader { return &Reader{buf: b} }

// Reset makes r read b from its start and forgets an earlier error.
func (r *Reader) Reset(b []byte) { *r = Reader{buf: b} }

// Err returns the first error met, or nil.
func (r *Reader) Err() error { return r.err }

// SetErr records err as the Reader's error unless one is set already. Decoders use it for values that
// are well-formed XDR and still not acceptable.
func (r *Reader) SetErr(err error) {
	if r.err == nil {
		r.err = err
	}
}

// Len returns the number of bytes not consumed yet; 0 after an error.
func (r *Reader) Len() int {
	if r.err != nil {
		return 0
	}
	return len(r.buf) - r.off
}

// Offset returns the number of bytes consumed so far.
func (r *Reader) Offset() int { return r.off }

// Rest returns everything not consumed and consumes it; nil after an error.
func (r *Reader) Rest() []byte {
	if r.err != nil {
		return nil
	}
	b := r.buf[r.off:]
	r.off = len(r.buf)
	return b
}

// Uint32 decodes an unsigned integer or enum.
func (r *Reader) Uint32() uint32 {
	if r.err != nil {
		return 0
	}
	if len(r.buf)-r.off < 4 {
		r.err = ErrShort
		return 0
	}
	v := binary.BigEndian.Uint32(r.buf[r.off:])
	r.off += 4
	return v
}

// Int32 decodes a signed integer.
func (r *Reader) Int32() int32 { return int32(r.Uint32()) }

// Uint64 decodes an unsigned hyper integer.
func (r *Reader) Uint64() uint64 {
	if r.err != nil {
		return 0
	}
	if len(r.buf)-r.off < 8 {
		r.err = ErrShort
		return 0
	}
	v := binary.BigEndian.Uint64(r.buf[r.off:])
	r.off += 8
	return v
}

// Int64 decodes a signed hyper integer.
func (r *Reader) Int64() int64 { return int64(r.Uint64()) }

// Bool decodes a boolean; anything but 0 and 1 is ErrBool.
func (r *Reader) Bool() bool {
	switch r.Uint32() {
	case 0:
		return false
	case 1:
		return true
	}
	r.SetErr(ErrBool)
	return false
}

// Opaque decodes variable-length opaque data of at most max bytes. The result aliases the input and is
// clipped to its length. The padding's value is not checked: deployed peers send garbage there.
func (r *Reader) Opaque(max int) []byte {
	n := r.Uint32()
	if r.err != nil {
		return nil
	}
	if uint64(n) > uint64(max) {
		r.err = ErrTooLong
		return nil
	}
	return r.FixedOpaque(int(n))
}

// String decodes a string of at most max bytes as the bytes received (no character set is implied).
func (r *Reader) String(max int) []byte { return r.Opaque(max) }

// FixedOpaque decodes n bytes of opaque data and their padding. The result aliases the input.
func (r *Reader) FixedOpaque(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > len(r.buf)-r.off || Pad(n) > len(r.buf)-r.off-n {
		r.err = ErrShort
		return nil
	}
	b := r.buf[r.off : r.off+n : r.off+n]
	r.off += n + Pad(n)
	return b
}

// Skip consumes n bytes without padding.
func (r *Reader) Skip(n int) {
	if r.err != nil {
		return
	}
	if n < 0 || n > len(r.buf)-r.off {
		r.err = ErrShort
		return
	}
	r.off += n
}

// Pad returns the number of padding bytes after n bytes of opaque data: 0 to 3.
func Pad(n int) int { return -n & 3 }
