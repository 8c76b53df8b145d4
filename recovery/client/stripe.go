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
