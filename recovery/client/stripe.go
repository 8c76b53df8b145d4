package client

import "github.com/baton-nfs/baton/recovery/wire"

// piece is the part of a file range that lies in one object.
type piece struct {
	stripe uint8
	obj    uint64 // offset in the object
	start  int    // offset in the caller's buffer
	n      int
}

// pieces cuts the file range [off, off+n) at stripe boundaries and appends the
// parts to dst. With one stripe there is one piece.
func pieces(dst []piece, l *wire.Layout, off uint64, n int) []piece {
	if l.Count <= 1 {
		return append(dst, piece{obj: off, n: n})
	}
	ss, cnt := uint64(l.StripeSize), uint64(l.Count)
	for start := 0; start < n; {
		o := off + uint64(start)
		m := ss - o%ss
		if left := uint64(n - start); m > left {
			m = left
		}
		dst = append(dst, piece{
			stripe: uint8(o / ss % cnt),
			obj:    o/(ss*cnt)*ss + o%ss,
			start:  start,
			n:      int(m),
		})
		start += int(m)
	}
	return dst
}

// FileEnd is the file size that an object of size objSize in the given stripe
// proves: the offset after the object's last byte.
func FileEnd(l *wire.Layout, stripe uint8, objSize uint64) uint64 {
	if l.Count <= 1 || objSize == 0 {
		return objSize
	}
	ss, cnt := uint64(l.StripeSize), uint64(l.Count)
	last := objSize - 1
	return (last/ss*cnt+uint64(stripe))*ss + last%ss + 1
}

// ObjectSize is the size of the object in the given stripe of a file that is
// size bytes long.
func ObjectSize(l *wire.Layout, stripe uint8, size uint64) uint64 {
	if l.Count <= 1 {
		return size
	}
	ss, cnt := uint64(l.StripeSize), uint64(l.Count)
	n := size / (ss * cnt) * ss
	rem, start := size%(ss*cnt), uint64(stripe)*ss
	switch {
	case rem <= start:
		return n
	case rem-start >= ss:
		return n + ss
	}
	return n + rem - start
}
