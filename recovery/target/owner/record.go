package owner

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// The file of records in a target's directory.
const (
	FileName = "owner"
	// BlockSize is the size of each of its parts in bytes, a multiple of what
	// disks write at once.
	BlockSize = 4096
	// FileSize: two copies of the record and the mark.
	FileSize = 3 * BlockSize

	markOffset = 2 * BlockSize
)

// MaxInterval is the longest time between heartbeats.
const MaxInterval = 10 * time.Second

// State is what the owner does with the store.
type State uint8

// States.
const (
	Owned    State = 1 // a target runs
	Clean    State = 2 // nobody has the store, and it was left in order
	Checking State = 3 // a checker runs
	wanted   State = 4 // in marks
)

// String gives the state's name.
func (s State) String() string {
	switch s {
	case Owned:
		return "owned"
	case Clean:
		return "clean"
	case Checking:
		return "checking"
	case wanted:
		return "wanted"
	}
	return fmt.Sprintf("state-%d", uint8(s))
}

// Record says who owns a store.
type Record struct {
	Node string
	// Boot is the id of the kernel that the owner runs on.
	Boot string
	// Incarnation is a random number of every attempt to own.
	Incarnation [16]byte
	// Generation rises with every ownership.
	Generation uint64
	// Seq rises with every write of the record, by whomever.
	Seq uint64
	// Interval is the time between the owner's heartbeats.
	Interval time.Duration
	State    State
	// Late: an earlier write of the owner has failed and may come some time.
	Late bool
}

// compare orders records by when they were made.
func (r *Record) compare(o *Record) int {
	return cmp.Or(cmp.Compare(r.Generation, o.Generation), cmp.Compare(r.Seq, o.Seq), bytes.Compare(r.Incarnation[:], o.Incarnation[:]))
}

// Block layout: magic, version, state, flags, 0, checksum, incarnation, generation, seq,
// interval, node, boot id; the rest is 0. The checksum (CRC-32C) is of the whole
// block with 0 in its place.
const flagLate = 1

const (
	magic      = "batonown"
	version    = 1
	offState   = 9
	offFlags   = 10
	offSum     = 12
	offInc     = 16
	offGen     = 32
	offSeq     = 40
	offIval    = 48
	offNames   = 56
	maxNameLen = 255
)

// errDamaged is wrapped with what is wrong.
var errDamaged = errors.New("damaged record")

var (
	be         = binary.BigEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// encode fills the block b. Names are cut at 255 bytes.
func (r *Record) encode(b []byte) {
	clear(b)
	copy(b, magic)
	b[8], b[offState] = version, byte(r.State)
	if r.Late {
		b[offFlags] = flagLate
	}
	copy(b[offInc:], r.Incarnation[:])
	be.PutUint64(b[offGen:], r.Generation)
	be.PutUint64(b[offSeq:], r.Seq)
	be.PutUint64(b[offIval:], uint64(r.Interval))
	at := offNames
	for _, s := range []string{r.Node, r.Boot} {
		b[at] = byte(copy(b[at+1:at+1+maxNameLen], s))
		at += 1 + int(b[at])
	}
	be.PutUint32(b[offSum:], checksum(b))
}

var zero4 [4]byte

func checksum(b []byte) uint32 {
	s := crc32.Update(0, castagnoli, b[:offSum])
	s = crc32.Update(s, castagnoli, zero4[:])
	return crc32.Update(s, castagnoli, b[offSum+4:])
}

// decode reads a block. Errors wrap errDamaged.
func (r *Record) decode(b []byte) error {
	*r = Record{}
	bad := func(what string) error { return fmt.Errorf("%w: %s", errDamaged, what) }
	switch {
	case len(b) != BlockSize:
		return bad("short")
	case string(b[:len(magic)]) != magic:
		return bad("magic number")
	case be.Uint32(b[offSum:]) != checksum(b):
		return bad("checksum")
	case b[8] != version:
		return bad(fmt.Sprintf("version %d", b[8]))
	}
	r.State, r.Late = State(b[offState]), b[offFlags]&flagLate != 0
	copy(r.Incarnation[:], b[offInc:])
	r.Generation, r.Seq, r.Interval = be.Uint64(b[offGen:]), be.Uint64(b[offSeq:]), time.Duration(be.Uint64(b[offIval:]))
	at := offNames
	for _, s := range []*string{&r.Node, &r.Boot} {
		n := int(b[at])
		*s = string(b[at+1 : at+1+n])
		at += 1 + n
	}
	switch {
	case r.State < Owned || r.State > wanted:
		return bad("state")
	case r.Interval <= 0 || r.Interval > MaxInterval:
		return bad("interval")
	case r.Generation == 1<<64-1 || r.Seq >= 1<<64-2:
		return bad("number")
	}
	return nil
}

// Slot is one block of the file as it was read.
type Slot struct {
	// OK: Record is valid.
	OK     bool
	Record Record
	// Empty: nothing was ever written there.
	Empty bool
	// Sum tells different contents apart.
	Sum uint32
}

// Snapshot is the file as it was read; its slots may be of different moments.
type Snapshot struct {
	Slots [2]Slot
	Mark  Slot
}

var zeroBlock [BlockSize]byte

// decode reads the file's first n bytes in b, which may be fewer than FileSize.
func (s *Snapshot) decode(b []byte) {
	for i, p := range []*Slot{&s.Slots[0], &s.Slots[1], &s.Mark} {
		block := b[min(i*BlockSize, len(b)):min((i+1)*BlockSize, len(b))]
		*p = Slot{Empty: bytes.Equal(block, zeroBlock[:len(block)]), Sum: crc32.Checksum(block, castagnoli)}
		if !p.Empty {
			p.OK = p.Record.decode(block) == nil
		}
		if isMark := p.Record.State == wanted; p.OK && isMark != (p == &s.Mark) {
			p.OK = false
		}
	}
}

// newest is the index of the copy that counts, -1 if there is none.
func (s *Snapshot) newest() int {
	a, b := &s.Slots[0], &s.Slots[1]
	switch {
	case !a.OK && !b.OK:
		return -1
	case !b.OK || a.OK && a.Record.compare(&b.Record) > 0:
		return 0
	}
	return 1
}

// older is the index of the copy that is written next.
func (s *Snapshot) older() int {
	if s.newest() == 0 {
		return 1
	}
	return 0
}

// record is the record that counts, nil if there is none.
func (s *Snapshot) record() *Record {
	if i := s.newest(); i >= 0 {
		return &s.Slots[i].Record
	}
	return nil
}

// damaged tells that a copy cannot be read.
func (s *Snapshot) damaged() bool {
	a, b := &s.Slots[0], &s.Slots[1]
	return !a.OK && !a.Empty || !b.OK && !b.Empty
}

// settled tells that both copies are of one owner, none of whose writes has failed:
// at most one that it began can come late, over somebody else's record, so it would
// not look like this.
func (s *Snapshot) settled() bool {
	a, b := &s.Slots[0], &s.Slots[1]
	return a.OK && b.OK && a.Record.Incarnation == b.Record.Incarnation && !a.Record.Late && !b.Record.Late
}

// fresh tells that there never was a record.
func (s *Snapshot) fresh() bool { return s.Slots[0].Empty && s.Slots[1].Empty }
