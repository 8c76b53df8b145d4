package ost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

const (
	superFile   = "super"
	superTemp   = "super.tmp"
	superMagic  = "BTNOST\x00\x01"
	superFormat = 1

	maxSuper   = 8 << 20 // bytes of an encoded superblock
	maxBootID  = 128
	maxLost    = 1 << 16
	maxEpochs  = 1 << 16
	maxClients = 1 << 16
)

var errSuper = errors.New("superblock is damaged")

// super is the target's own durable state, rewritten as a whole.
type super struct {
	Index    uint16
	UUID     [16]byte
	SegShift uint8  // a segment holds 1<<SegShift bytes
	Instance uint64 // counts starts of the target
	Clean    bool
	BootID   string
	// Ceiling: no transno above it was given out.
	Ceiling uint64
	// LastCommitted is a lower bound of what was committed.
	LastCommitted uint64
	// Lost lists the instances that ended with a power failure: their
	// truncates may have to be done again.
	Lost    []uint64
	Epochs  map[uint32]uint64
	Clients map[wire.ClientID]uint64
}

func (s *super) encode() []byte {
	le := binary.LittleEndian
	b := append([]byte(nil), superMagic...)
	b = le.AppendUint32(b, superFormat)
	b = le.AppendUint16(b, s.Index)
	b = append(b, s.SegShift, 0)
	if s.Clean {
		b[len(b)-1] = 1
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
	vips := make([]uint32, 0, len(s.Epochs))
	for v := range s.Epochs {
		vips = append(vips, v)
	}
	sort.Slice(vips, func(i, j int) bool { return vips[i] < vips[j] })
	b = le.AppendUint32(b, uint32(len(vips)))
	for _, v := range vips {
		b = le.AppendUint32(b, v)
		b = le.AppendUint64(b, s.Epochs[v])
	}
	b = le.AppendUint32(b, uint32(len(s.Clients)))
	for c, g := range s.Clients {
		b = append(b, c[:]...)
		b = le.AppendUint64(b, g)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeSuper reads what encode wrote; any deviation is errSuper (wrapped).
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
	if f := le.Uint32(take(4)); f != superFormat {
		return nil, fmt.Errorf("%w: format %d", errSuper, f)
	}
	s := &super{Epochs: map[uint32]uint64{}, Clients: map[wire.ClientID]uint64{}}
	s.Index = le.Uint16(take(2))
	s.SegShift = take(1)[0]
	s.Clean = take(1)[0]&1 != 0
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
	for range count(maxClients, 24) {
		var c wire.ClientID
		copy(c[:], take(16))
		s.Clients[c] = le.Uint64(take(8))
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

// writeSuper replaces the superblock; it is durable when nil is returned.
func writeSuper(fs objfs.FS, rootFD int, s *super) error {
	err := func() error {
		fd, err := fs.Open(superTemp, objfs.ReadWrite|objfs.Create|objfs.Trunc)
		if err != nil {
			return err
		}
		if _, err = fs.Pwrite(fd, s.encode(), 0); err == nil {
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
