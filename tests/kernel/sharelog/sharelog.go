// Package sharelog is the model of files that several processes of several
// guests change in turn. What a file holds follows from the operations on it
// alone: its head tells what the rest must be, and the operations that the
// processes noted, one after the other, give it byte for byte.
package sharelog

import (
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
)

// HeadLen is the length of a file's head, one line of text. A file with less is
// empty, or, as a part of a larger one, all zeros: version 0.
const HeadLen = 256

// Cells, parts of one file that have a lock each, are CellLen long and without a gap
// between them, neither at the ends of pages nor, one of them, of the first stripe.
const (
	Cells   = 8
	CellLen = 1500
)

// CellAt is where cell k begins.
func CellAt(k int) int { return 64<<10 - CellLen/2 + (k-Cells/2)*CellLen }

// Writers is how many processes there are at most.
const Writers = 8

// Kinds of Op.
const (
	// Write writes Len bytes at Off, inside, over the end or beyond it.
	Write = "write"
	// Append writes Len bytes at the end, which is Off, with O_APPEND.
	Append = "append"
	// Truncate makes the size Off.
	Truncate = "truncate"
)

// Op is one change of a file. It rewrites the head as well.
type Op struct {
	File string
	// Version is what the file has after it, one more than before.
	Version uint64
	// Writer is the process, less than Writers.
	Writer   int
	Kind     string
	Off, Len int64
}

// Head is what the first line of a file says.
type Head struct {
	Version uint64
	// Size is that of the whole file, Sum the checksum of all behind the head.
	Size int64
	Sum  uint32
	// Writer made the last change.
	Writer int
	// Counts are the changes by each writer; together they are Version.
	Counts [Writers]uint64
}

const headFormat = "version %d size %d sum %d writer %d counts %d %d %d %d %d %d %d %d"

func (h *Head) args() (a, p []any) {
	p = []any{&h.Version, &h.Size, &h.Sum, &h.Writer}
	a = []any{h.Version, h.Size, h.Sum, h.Writer}
	for i := range h.Counts {
		a, p = append(a, h.Counts[i]), append(p, &h.Counts[i])
	}
	return a, p
}

func (h *Head) bytes() []byte {
	a, _ := h.args()
	return fmt.Appendf(nil, "%-*s\n", HeadLen-1, fmt.Sprintf(headFormat, a...))
}

var table = crc32.MakeTable(crc32.Castagnoli)

// Check returns the head of a file's contents, and an error unless they are what
// it says.
func Check(b []byte) (Head, error) {
	var h Head
	if len(b) == 0 || strings.Trim(string(b), "\x00") == "" && len(b) >= HeadLen {
		return h, nil
	}
	if len(b) < HeadLen {
		return h, fmt.Errorf("%d bytes, not even a head: %q", len(b), b)
	}
	_, p := h.args()
	if _, err := fmt.Sscanf(string(b[:HeadLen]), headFormat, p...); err != nil || string(h.bytes()) != string(b[:HeadLen]) {
		return h, fmt.Errorf("head %q: %v", b[:HeadLen], err)
	}
	sum := uint64(0)
	for _, n := range h.Counts {
		sum += n
	}
	if sum != h.Version {
		return h, fmt.Errorf("head %+v: the counts are %d together", h, sum)
	}
	if h.Size != int64(len(b)) {
		return h, fmt.Errorf("head %+v, but there are %d bytes:\n%s", h, len(b), Describe(b))
	}
	if s := crc32.Checksum(b[HeadLen:], table); s != h.Sum {
		return h, fmt.Errorf("head %+v, but the checksum is %d:\n%s", h, s, Describe(b))
	}
	return h, nil
}

// Data returns what the operation writes: each 16 bytes, by their place in the
// file, tell who wrote them, the version and the place.
func (o Op) Data() []byte {
	b := make([]byte, o.Len)
	var word [16]byte
	at := int64(-1)
	for i := range b {
		x := o.Off + int64(i)
		if w := x / 16; w != at {
			at = w
			word[0] = 'A' + byte(o.Writer)
			hex(word[1:8], o.Version)
			hex(word[8:], uint64(w))
		}
		b[i] = word[x%16]
	}
	return b
}

func hex(b []byte, v uint64) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = "0123456789abcdef"[v&15]
		v >>= 4
	}
}

// ErrOrder says that an operation does not follow what the file holds.
var ErrOrder = errors.New("not the operation that comes next")

// Apply returns the contents after the operation. h is the head of b, which it
// may overwrite; h becomes the new head.
func (o Op) Apply(b []byte, h *Head) ([]byte, error) {
	if o.Version != h.Version+1 || o.Kind == Append && o.Off != int64(len(b)) || o.Writer >= Writers || o.Writer < 0 {
		return nil, fmt.Errorf("%w: %+v on %+v, %d bytes", ErrOrder, o, *h, len(b))
	}
	size := int64(len(b))
	if o.Kind == Truncate {
		size = o.Off
	} else {
		size = max(size, o.Off+o.Len)
	}
	size = max(size, HeadLen)
	if grow := size - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	b = b[:size]
	if o.Kind != Truncate {
		copy(b[o.Off:], o.Data())
	}
	h.Version, h.Size, h.Writer = o.Version, size, o.Writer
	h.Counts[o.Writer]++
	h.Sum = crc32.Checksum(b[HeadLen:], table)
	copy(b, h.bytes())
	return b, nil
}

// Describe tells who wrote what of a file's contents.
func Describe(b []byte) string {
	var out strings.Builder
	last, from := "", HeadLen
	flush := func(to int) {
		if last != "" && to > from {
			fmt.Fprintf(&out, "%d-%d %s\n", from, to-1, last)
		}
		from = to
	}
	for x := HeadLen; x < len(b); x += 16 {
		w := string(b[x:min(x+16, len(b))])
		what := fmt.Sprintf("mixed or foreign %q", w)
		var place [8]byte
		hex(place[:], uint64(x/16))
		switch {
		case strings.Trim(w, "\x00") == "":
			what = "zeros"
		case len(w) == 16 && w[8:] == string(place[:]):
			what = "writer " + string(w[0]) + " version " + w[1:8]
		}
		if what != last {
			flush(x)
			last = what
		}
	}
	flush(len(b))
	return out.String()
}

// Replay returns the contents that operations make of an empty file, or of one
// of fixed zeros. They must be all that were ever done.
func Replay(ops []Op, zeros int) ([]byte, error) {
	b := make([]byte, zeros)
	var h Head
	for _, o := range ops {
		var err error
		if b, err = o.Apply(b, &h); err != nil {
			return nil, err
		}
	}
	return b, nil
}
