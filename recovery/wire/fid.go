// Package wire defines the messages between the file system's clients (the
// frontends) and its targets (MDT, OST, MGS), and the transports that carry
// them. The in-process transport passes the same Request and Reply structures
// that the network transport frames.
package wire

import (
	"encoding/binary"
	"fmt"
)

// FID identifies a file system object for ever: a sequence number, an object
// number inside the sequence and a version that is reserved (0). FIDs are never
// reused (Lustre's lu_fid).
type FID struct {
	Seq uint64
	OID uint32
	Ver uint32
}

// FIDSize is the encoded size of a FID in bytes.
const FIDSize = 16

// Fixed FIDs. Sequence 1 is reserved for them; allocated sequences start at 2.
var (
	// RootFID is the root directory of the name space.
	RootFID = FID{Seq: 1, OID: 1}
)

// FirstSeq is the first sequence that an MDT hands out for new objects.
const FirstSeq = 2

// MaxSeq bounds sequences so that FileID stays unique in 64 bits.
const MaxSeq = 1<<32 - 1

// IsZero tells whether f names nothing.
func (f FID) IsZero() bool { return f == FID{} }

// FileID is the 64-bit NFS fileid (RFC 1813 section 2.6) of the object. It is
// unique because sequences stay below 2^32 and Ver is 0.
func (f FID) FileID() uint64 { return f.Seq<<32 | uint64(f.OID) }

// Put writes the FID big-endian into b, which has at least FIDSize bytes, so
// that the byte order of encoded FIDs is their numeric order.
func (f FID) Put(b []byte) {
	binary.BigEndian.PutUint64(b, f.Seq)
	binary.BigEndian.PutUint32(b[8:], f.OID)
	binary.BigEndian.PutUint32(b[12:], f.Ver)
}

// Append appends the encoded FID to b.
func (f FID) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, f.Seq)
	b = binary.BigEndian.AppendUint32(b, f.OID)
	return binary.BigEndian.AppendUint32(b, f.Ver)
}

// GetFID decodes a FID from the first FIDSize bytes of b.
func GetFID(b []byte) FID {
	return FID{
		Seq: binary.BigEndian.Uint64(b),
		OID: binary.BigEndian.Uint32(b[8:]),
		Ver: binary.BigEndian.Uint32(b[12:]),
	}
}

// String formats a FID as Lustre does: [0xseq:0xoid:0xver].
func (f FID) String() string { return fmt.Sprintf("[0x%x:0x%x:0x%x]", f.Seq, f.OID, f.Ver) }

// ParseFID reads the form that String writes.
func ParseFID(s string) (FID, error) {
	var f FID
	if _, err := fmt.Sscanf(s, "[0x%x:0x%x:0x%x]", &f.Seq, &f.OID, &f.Ver); err != nil {
		return FID{}, fmt.Errorf("fid %q: want [0xSEQ:0xOID:0xVER]: %w", s, err)
	}
	return f, nil
}
