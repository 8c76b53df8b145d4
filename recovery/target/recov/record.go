package recov

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Limits of records.
const (
	// MaxResult is the largest result that a reply slot keeps, in bytes.
	MaxResult = 1024
	// MaxSlot is the highest slot number.
	MaxSlot = 4095
	// MaxRecordSize is the largest encoded record.
	MaxRecordSize = 2 + 16 + 8 + 2 + 8 + 8 + 4 + 2 + MaxResult + 4
)

// Errors of decoding.
var (
	// ErrRecordVersion: the record is of a kind or version that is not known.
	ErrRecordVersion = errors.New("unknown record version")
	// ErrRecordDamaged: checksum, length or a field is wrong.
	ErrRecordDamaged = errors.New("damaged record")
)

const (
	kindTarget = 'T'
	kindClient = 'C'
	kindSlot   = 'S'
	recVersion = 1
)

// TargetRecord is the target's own state in the client table (Lustre's
// lr_server_data).
type TargetRecord struct {
	Instance uint64 // number of this start
	// Clean: everything was durable when the target stopped.
	Clean bool
	// Transno is a number that all new ones exceed; it covers numbers that were
	// told to clients but are lost.
	Transno uint64
}

// ClientRecord is an entry of the client table (Lustre's lsd_client_data).
type ClientRecord struct {
	Client   wire.ClientID
	Gen      uint64
	Instance uint64 // the instance that made the entry
	Local    bool   // recovery does not wait for it
	// FailedAt, if not 0, is the first transno whose replay met other versions:
	// the client is evicted when its replay is at its end, also if the target
	// dies before, and must not take that number for durable.
	FailedAt uint64
}

// SlotRecord is the newest result of a client's reply slot (Lustre's
// lsd_reply_data). It is written in the transaction of the operation.
type SlotRecord struct {
	Client  wire.ClientID
	Gen     uint64
	Slot    uint16
	XID     uint64
	Transno uint64 // 0: the operation changed nothing
	Status  wire.Status
	Data    []byte // at most MaxResult bytes
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(b []byte, from int) []byte {
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[from:], castagnoli))
}

// open checks kind, version, checksum and size (exact, or at least with more)
// and returns the body.
func open(b []byte, kind byte, size int, more bool) ([]byte, error) {
	switch {
	case len(b) < 6 || len(b) > MaxRecordSize:
		return nil, ErrRecordDamaged
	case crc32.Checksum(b[:len(b)-4], castagnoli) != binary.BigEndian.Uint32(b[len(b)-4:]):
		return nil, ErrRecordDamaged
	case b[0] != kind || b[1] != recVersion:
		return nil, fmt.Errorf("%w: %q version %d", ErrRecordVersion, b[0], b[1])
	}
	body := b[2 : len(b)-4]
	if len(body) < size || !more && len(body) != size {
		return nil, ErrRecordDamaged
	}
	return body, nil
}

func bit(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// Append appends the encoded record to b.
func (r *TargetRecord) Append(b []byte) []byte {
	n := len(b)
	b = append(b, kindTarget, recVersion, bit(r.Clean))
	b = binary.BigEndian.AppendUint64(b, r.Instance)
	return seal(binary.BigEndian.AppendUint64(b, r.Transno), n)
}

// Decode reads a record that Append wrote: ErrRecordVersion or ErrRecordDamaged.
func (r *TargetRecord) Decode(b []byte) error {
	p, err := open(b, kindTarget, 17, false)
	if err != nil {
		return err
	}
	if p[0] > 1 {
		return ErrRecordDamaged
	}
	*r = TargetRecord{
		Clean:    p[0] == 1,
		Instance: binary.BigEndian.Uint64(p[1:]),
		Transno:  binary.BigEndian.Uint64(p[9:]),
	}
	return nil
}

// Append appends the encoded record to b.
func (r *ClientRecord) Append(b []byte) []byte {
	n := len(b)
	b = append(b, kindClient, recVersion, bit(r.Local))
	b = append(b, r.Client[:]...)
	b = binary.BigEndian.AppendUint64(b, r.Gen)
	b = binary.BigEndian.AppendUint64(b, r.Instance)
	return seal(binary.BigEndian.AppendUint64(b, r.FailedAt), n)
}

// Decode reads a record that Append wrote: ErrRecordVersion or ErrRecordDamaged.
func (r *ClientRecord) Decode(b []byte) error {
	p, err := open(b, kindClient, 41, false)
	if err != nil {
		return err
	}
	if p[0] > 1 {
		return ErrRecordDamaged
	}
	*r = ClientRecord{
		Local:    p[0] == 1,
		Client:   wire.ClientID(p[1:17]),
		Gen:      binary.BigEndian.Uint64(p[17:]),
		Instance: binary.BigEndian.Uint64(p[25:]),
		FailedAt: binary.BigEndian.Uint64(p[33:]),
	}
	return nil
}

// Append appends the encoded record to b. Data beyond MaxResult is left out.
func (r *SlotRecord) Append(b []byte) []byte {
	n := len(b)
	d := r.Data[:min(len(r.Data), MaxResult)]
	b = append(b, kindSlot, recVersion)
	b = append(b, r.Client[:]...)
	b = binary.BigEndian.AppendUint64(b, r.Gen)
	b = binary.BigEndian.AppendUint16(b, r.Slot)
	b = binary.BigEndian.AppendUint64(b, r.XID)
	b = binary.BigEndian.AppendUint64(b, r.Transno)
	b = binary.BigEndian.AppendUint32(b, uint32(r.Status))
	b = binary.BigEndian.AppendUint16(b, uint16(len(d)))
	return seal(append(b, d...), n)
}

// Decode reads a record that Append wrote, with its own copy of Data:
// ErrRecordVersion or ErrRecordDamaged.
func (r *SlotRecord) Decode(b []byte) error {
	const fixed = 16 + 8 + 2 + 8 + 8 + 4 + 2
	p, err := open(b, kindSlot, fixed, true)
	if err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(p[46:]))
	slot := binary.BigEndian.Uint16(p[24:])
	if n > MaxResult || len(p) != fixed+n || slot > MaxSlot {
		return ErrRecordDamaged
	}
	*r = SlotRecord{
		Client:  wire.ClientID(p[:16]),
		Gen:     binary.BigEndian.Uint64(p[16:]),
		Slot:    slot,
		XID:     binary.BigEndian.Uint64(p[26:]),
		Transno: binary.BigEndian.Uint64(p[34:]),
		Status:  wire.Status(binary.BigEndian.Uint32(p[42:])),
	}
	if n > 0 {
		r.Data = append([]byte(nil), p[fixed:]...)
	}
	return nil
}
