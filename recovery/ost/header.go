package ost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/baton-nfs/baton/recovery/wire"
)

// headerSize is the block in front of every segment's data. The header proper
// fits one 512-byte sector, so that a disk writes it as a whole or not at all.
const headerSize = 4096

const (
	headerLen    = 128
	headerMagic  = "BTNOBJ\x00\x01"
	headerFormat = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header errors.
var (
	// errUnfinished: the header was never written; the object was created and
	// lost power before anything of it was flushed.
	errUnfinished = errors.New("object was never flushed")
	// errDamaged: the header is not one.
	errDamaged = errors.New("object header is damaged")
)

// header describes a segment file. Fields from LastSeg on count in segment 0
// only.
type header struct {
	FID     wire.FID
	Stripe  uint8
	Segment uint32
	LastSeg uint32
	// Multi: the directory of further segments exists or may exist.
	Multi   bool
	Version uint64
	// LogID is the newest truncate record that was applied. While PunchInst is
	// not 0 the truncate to PunchSize was done by that instance of the target
	// and may not be durable: see object.punch. Of several such truncates
	// PunchSize is the smallest; the newest made the object PunchEnd long, if
	// that is more.
	LogID     uint64
	PunchSize uint64
	PunchEnd  uint64
	PunchInst uint64
	// SureLog is LogID without those truncates.
	SureLog uint64
	// Durable: all changes up to this transno are durable. Replay: some up to
	// Version that are not known to be are of clients that may replay them.
	Durable uint64
	Replay  bool
	Mtime   int64
	Ctime   int64
	// Written is the time the header was written: a file that the kernel
	// changed later has a newer mtime than the header knows.
	Written int64
}

// encode fills b (at least headerLen bytes).
func (h *header) encode(b []byte) {
	clear(b[:headerLen])
	copy(b, headerMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], headerFormat)
	b[12] = h.Stripe
	if h.Multi {
		b[13] |= 1
	}
	if h.Replay {
		b[13] |= 2
	}
	h.FID.Put(b[16:])
	le.PutUint32(b[32:], h.Segment)
	le.PutUint32(b[36:], h.LastSeg)
	le.PutUint64(b[40:], h.Version)
	le.PutUint64(b[48:], h.LogID)
	le.PutUint64(b[56:], h.PunchSize)
	le.PutUint64(b[64:], h.PunchInst)
	le.PutUint64(b[72:], uint64(h.Mtime))
	le.PutUint64(b[80:], uint64(h.Ctime))
	le.PutUint64(b[88:], uint64(h.Written))
	le.PutUint64(b[96:], h.PunchEnd)
	le.PutUint64(b[104:], h.Durable)
	le.PutUint64(b[112:], h.SureLog)
	le.PutUint32(b[headerLen-4:], crc32.Checksum(b[:headerLen-4], castagnoli))
}

// decodeHeader reads a header of this format, or of format 1, which did not have
// Durable, Replay and SureLog; errUnfinished when b is short or zero, errDamaged
// (wrapped) when it is anything else than a header.
func decodeHeader(b []byte) (header, error) {
	var h header
	zero := true
	for _, c := range b[:min(len(b), headerLen)] {
		if c != 0 {
			zero = false
			break
		}
	}
	if zero {
		return h, errUnfinished
	}
	if len(b) < headerLen {
		return h, fmt.Errorf("%w: %d bytes", errDamaged, len(b))
	}
	le := binary.LittleEndian
	if string(b[:8]) != headerMagic {
		return h, fmt.Errorf("%w: no magic", errDamaged)
	}
	if le.Uint32(b[headerLen-4:]) != crc32.Checksum(b[:headerLen-4], castagnoli) {
		return h, fmt.Errorf("%w: checksum", errDamaged)
	}
	f := le.Uint32(b[8:])
	if f != 1 && f != headerFormat {
		return h, fmt.Errorf("%w: format %d", errDamaged, f)
	}
	h = header{
		FID: wire.GetFID(b[16:]), Stripe: b[12], Segment: le.Uint32(b[32:]),
		LastSeg: le.Uint32(b[36:]), Multi: b[13]&1 != 0, Replay: b[13]&2 != 0, Version: le.Uint64(b[40:]),
		LogID: le.Uint64(b[48:]), PunchSize: le.Uint64(b[56:]), PunchInst: le.Uint64(b[64:]),
		Mtime: int64(le.Uint64(b[72:])), Ctime: int64(le.Uint64(b[80:])), Written: int64(le.Uint64(b[88:])), PunchEnd: le.Uint64(b[96:]),
		Durable: le.Uint64(b[104:]), SureLog: le.Uint64(b[112:]),
	}
	if f == 1 {
		h.SureLog = h.LogID
	}
	if h.LastSeg > 0 && !h.Multi || h.PunchSize > wire.MaxFileSize || h.PunchEnd > wire.MaxFileSize || h.SureLog > h.LogID {
		return h, fmt.Errorf("%w: inconsistent", errDamaged)
	}
	return h, nil
}
