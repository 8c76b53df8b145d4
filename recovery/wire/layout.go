package wire

// FileEnd is the file size that an object of size objSize in the given stripe
// proves: the offset after the object's last byte.
func (l *Layout) FileEnd(stripe uint8, objSize uint64) uint64 {
	if l.Count <= 1 || objSize == 0 {
		return objSize
	}
	ss, cnt := uint64(l.StripeSize), uint64(l.Count)
	last := objSize - 1
	return (last/ss*cnt+uint64(stripe))*ss + last%ss + 1
}

// ObjectSize is the size of the object in the given stripe of a file that is
// size bytes long.
func (l *Layout) ObjectSize(stripe uint8, size uint64) uint64 {
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
