package ost

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

const (
	superFile   = "super"
	superTemp   = "super.tmp"
	superMagic  = "BTNOST\x00\x01"
	superFormat = 2

	maxSuper   = 8 << 20 // bytes of an encoded superblock
	maxBootID  = 128
	maxLost    = 1 << 16
	maxEpochs  = 1 << 16
	maxClients = 1 << 16
	maxFences  = 1 << 16
)

var errSuper = errors.New("superblock is damaged")

// super is the target's own durable state, rewritten as a whole.
type super struct {
	Index    uint16
	UUID     [16]byte
	SegShift uint8  // a segment holds 1<<SegShift bytes
	Instance uint64 // counts starts of the target
	Clean    bool
	// Began: the last start's recovery was over, so that everything it executed
	// counts; before that only what is up to LastCommitted does.
	Began  bool
	BootID string
	// Ceiling: no transno above it was given out.
	Ceiling uint64
	// LastCommitted is a lower bound of what was committed.
	LastCommitted uint64
	// Lost lists the instances of whose truncates nobody knows whether they are
	// durable: those that ended with a power failure or in recovery.
	Lost    []uint64
	Epochs  map[uint32]uint64
	Target  recov.TargetRecord
	Clients map[wire.ClientID]recov.ClientRecord
	// Fences are the lowest tenures from which clients may send.
	Fences map[wire.ClientID]uint64
}

func compareIDs(a, b wire.ClientID) int { return bytes.Compare(a[:], b[:]) }

// encode gives format 2, little-endian: magic, format 4, index 2, segment shift
// 1, flags 1 (1 clean, 2 began), UUID 16, instance 8, ceiling 8, last committed 8,
// and as counted lists: boot id, lost instances 8, VIP epochs 4+8, the target's
// record, clients' records (each with its own length 2), fences 16+8. Then the
// checksum 4.
func (s *super) encode() []byte {
	le := binary.LittleEndian
	b := append([]byte(nil), superMagic...)
	b = le.AppendUint32(b, superFormat)
	b = le.AppendUint16(b, s.Index)
	b = append(b, s.SegShift, 0)
	if s.Clean {
		b[len(b)-1] |= 1
	}
	if s.Began {
		b[len(b)-1] |= 2
	}
	b = append(b, s.UUID[:]...)
	b = le.AppendUint64(b, s.Instance)
	b = le.AppendUint64(b, s.Ceiling)
	b = le.AppendUint64(b, s.LastCommitted)
	b = le.AppendUint32(b, uint32(len(s.BootID)))
	b = append(b, s.BootID...)
	b = le.AppendUint32(b, uint32(len(s.Lost)))
	for _, l := range s.Lost {
		b = le.AppendUint64(b, l)
	}
	b = le.AppendUint32(b, uint32(len(s.Epochs)))
	for _, v := range slices.Sorted(maps.Keys(s.Epochs)) {
		b = le.AppendUint32(b, v)
		b = le.AppendUint64(b, s.Epochs[v])
	}
	n := len(b)
	b = s.Target.Append(le.AppendUint32(b, 0))
	le.PutUint32(b[n:], uint32(len(b)-n-4))
	b = le.AppendUint32(b, uint32(len(s.Clients)))
	for _, id := range slices.SortedFunc(maps.Keys(s.Clients), compareIDs) {
		r := s.Clients[id]
		n := len(b)
		b = r.Append(le.AppendUint16(b, 0))
		le.PutUint16(b[n:], uint16(len(b)-n-2))
	}
	b = le.AppendUint32(b, uint32(len(s.Fences)))
	for _, id := range slices.SortedFunc(maps.Keys(s.Fences), compareIDs) {
		b = le.AppendUint64(append(b, id[:]...), s.Fences[id])
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeSuper reads what encode wrote, and format 1, which had of clients only
// the generation: they were in the target's process. Any deviation is errSuper
// (wrapped).
func decodeSuper(b []byte) (*super, error) {
	le := binary.LittleEndian
	if len(b) < len(superMagic)+4 || string(b[:len(superMagic)]) != superMagic {
		return nil, fmt.Errorf("%w: no magic", errSuper)
	}
	body := b[:len(b)-4]
	if le.Uint32(b[len(b)-4:]) != crc32.Checksum(body, castagnoli) {
		return nil, fmt.Errorf("%w: checksum", errSuper)
	}
	p := body[len(superMagic):]
	bad := false
	take := func(n int) []byte {
		if n < 0 || n > len(p) {
			bad, p = true, nil
			return make([]byte, min(max(n, 0), 64))
		}
		r := p[:n]
		p = p[n:]
		return r
	}
	count := func(limit, size int) int {
		n := le.Uint32(take(4))
		if uint64(n) > uint64(limit) || int(n)*size > len(p) {
			bad = true
			return 0
		}
		return int(n)
	}
	format := le.Uint32(take(4))
	if format != 1 && format != superFormat {
		return nil, fmt.Errorf("%w: format %d", errSuper, format)
	}
	s := &super{
		Epochs: map[uint32]uint64{}, Clients: map[wire.ClientID]recov.ClientRecord{}, Fences: map[wire.ClientID]uint64{},
	}
	s.Index = le.Uint16(take(2))
	s.SegShift = take(1)[0]
	flags := take(1)[0]
	s.Clean, s.Began = flags&1 != 0, flags&2 != 0 || format == 1
	copy(s.UUID[:], take(16))
	s.Instance = le.Uint64(take(8))
	s.Ceiling = le.Uint64(take(8))
	s.LastCommitted = le.Uint64(take(8))
	s.BootID = string(take(count(maxBootID, 1)))
	for range count(maxLost, 8) {
		s.Lost = append(s.Lost, le.Uint64(take(8)))
	}
	for range count(maxEpochs, 12) {
		v := le.Uint32(take(4))
		s.Epochs[v] = le.Uint64(take(8))
	}
	id := func() (c wire.ClientID) {
		copy(c[:], take(len(c)))
		return c
	}
	if format == 1 {
		for range count(maxClients, 24) {
			c := id()
			s.Clients[c] = recov.ClientRecord{Client: c, Gen: le.Uint64(take(8)), Local: true}
		}
	} else {
		if err := s.Target.Decode(take(count(recov.MaxRecordSize, 1))); err != nil {
			return nil, fmt.Errorf("%w: target record: %w", errSuper, err)
		}
		for range count(maxClients, 2) {
			var r recov.ClientRecord
			if err := r.Decode(take(int(le.Uint16(take(2))))); err != nil {
				return nil, fmt.Errorf("%w: client record: %w", errSuper, err)
			}
			s.Clients[r.Client] = r
		}
		for range count(maxFences, 24) {
			c := id()
			s.Fences[c] = le.Uint64(take(8))
		}
	}
	if bad || len(p) != 0 {
		return nil, fmt.Errorf("%w: lengths", errSuper)
	}
	if s.SegShift < minSegShift || s.SegShift > maxSegShift || s.LastCommitted > s.Ceiling {
		return nil, fmt.Errorf("%w: values", errSuper)
	}
	return s, nil
}

// readSuper returns nil when there is none.
func readSuper(fs objfs.FS) (*super, error) {
	fd, err := fs.Open(superFile, objfs.ReadOnly)
	if err == unix.ENOENT {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	defer fs.Close(fd)
	st, err := fs.Fstat(fd)
	if err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	if st.Size > maxSuper {
		return nil, fmt.Errorf("%w: %d bytes", errSuper, st.Size)
	}
	b := make([]byte, st.Size)
	n, err := fs.Pread(fd, b, 0)
	if err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	return decodeSuper(b[:n])
}

// writeSuper replaces the superblock with the encoded b; it is durable when nil
// is returned.
func writeSuper(fs objfs.FS, rootFD int, b []byte) error {
	err := func() error {
		fd, err := fs.Open(superTemp, objfs.ReadWrite|objfs.Create|objfs.Trunc)
		if err != nil {
			return err
		}
		if _, err = fs.Pwrite(fd, b, 0); err == nil {
			err = fs.Fdatasync(fd)
		}
		if cerr := fs.Close(fd); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
		if err := fs.Rename(superTemp, superFile); err != nil {
			return err
		}
		return fs.Fdatasync(rootFD)
	}()
	if err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	return nil
}
