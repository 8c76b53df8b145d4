package nfs3

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/recovery/wire"
)

// HandleSize is the size of baton's file handles in bytes.
const HandleSize = 48

// handleVersion is the first byte of a handle.
const handleVersion = 1

// Handle is what a file handle says: which object, seen through which export's
// file system. It holds no path and nothing of a node, so it is good for ever
// and everywhere.
type Handle struct {
	FSID       uint64 // of the export
	FID        wire.FID
	Generation uint32
}

// Codec makes and checks file handles. A handle is, big-endian:
//
//	 0  format version, 1
//	 1  reserved, three zero bytes
//	 4  FSID
//	12  FID
//	28  generation
//	32  first 16 bytes of HMAC-SHA256(key, bytes 0..31)
//
// Handles in use are kept in a lossy table of fixed size, so that neither
// Encode nor Decode usually computes a hash. All methods may be called
// concurrently and none allocates.
type Codec struct {
	macs  sync.Pool // *macState
	cache []handleSlot
}

// handleSlots is the number of remembered handles (64 bytes each), a power of two.
const handleSlots = 1 << 14

// handleSlot holds a known good handle under a sequence lock: seq is odd while
// a writer is at work, and a reader that saw it change ignores what it read.
// Writers that find the slot busy give up, so nobody ever waits.
type handleSlot struct {
	seq atomic.Uint64
	w   [HandleSize / 8]atomic.Uint64
	_   [8]byte // fill the cache line
}

type macState struct {
	h   hash.Hash
	in  [HandleSize - 16]byte
	sum [sha256.Size]byte
}

// NewCodec returns a codec for the cluster's key, which is the same on every
// node and secret; it should have 32 random bytes. The key is copied.
func NewCodec(key []byte) *Codec {
	key = append([]byte(nil), key...)
	c := &Codec{cache: make([]handleSlot, handleSlots)}
	c.macs.New = func() any { return &macState{h: hmac.New(sha256.New, key)} }
	return c
}

// handleWords is a handle as big-endian words: 0..3 what is signed, 4..5 the MAC.
type handleWords [HandleSize / 8]uint64

// signedWords returns the signed part of a handle of at least 32 bytes.
func signedWords(b []byte) *handleWords {
	var p handleWords
	for i := range 4 {
		p[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	return &p
}

// slotOf spreads the signed part over the table.
func (c *Codec) slotOf(p *handleWords) *handleSlot {
	h := p[0]
	for _, v := range p[1:4] {
		h = (h ^ v) * 0x9e3779b97f4a7c15
		h ^= h >> 29
	}
	return &c.cache[(h>>40)&(handleSlots-1)]
}

// lookup fills p[4] and p[5] if the table knows the signed part of p.
func (c *Codec) lookup(p *handleWords) bool {
	s := c.slotOf(p)
	seq := s.seq.Load()
	if seq&1 != 0 || seq == 0 {
		return false
	}
	same := s.w[0].Load() == p[0] && s.w[1].Load() == p[1] && s.w[2].Load() == p[2] && s.w[3].Load() == p[3]
	a, b := s.w[4].Load(), s.w[5].Load()
	if !same || s.seq.Load() != seq {
		return false
	}
	p[4], p[5] = a, b
	return true
}

func (c *Codec) remember(p *handleWords) {
	s := c.slotOf(p)
	seq := s.seq.Load()
	if seq&1 != 0 || !s.seq.CompareAndSwap(seq, seq+1) {
		return
	}
	for i := range p {
		s.w[i].Store(p[i])
	}
	s.seq.Store(seq + 2)
}

// sign computes p[4] and p[5].
func (c *Codec) sign(p *handleWords) {
	m := c.macs.Get().(*macState)
	for i := range 4 {
		binary.BigEndian.PutUint64(m.in[i*8:], p[i])
	}
	m.h.Reset()
	m.h.Write(m.in[:])
	m.h.Sum(m.sum[:0])
	p[4] = binary.BigEndian.Uint64(m.sum[:])
	p[5] = binary.BigEndian.Uint64(m.sum[8:])
	c.macs.Put(m)
}

// Encode writes h's file handle to dst.
func (c *Codec) Encode(h Handle, dst *[HandleSize]byte) {
	dst[0], dst[1], dst[2], dst[3] = handleVersion, 0, 0, 0
	binary.BigEndian.PutUint64(dst[4:], h.FSID)
	h.FID.Put(dst[12:])
	binary.BigEndian.PutUint32(dst[28:], h.Generation)
	p := signedWords(dst[:])
	if !c.lookup(p) {
		c.sign(p)
		c.remember(p)
	}
	binary.BigEndian.PutUint64(dst[32:], p[4])
	binary.BigEndian.PutUint64(dst[40:], p[5])
}

// Decode checks b and returns what it says. The error is wire.ErrBadHandle for
// a handle of wrong length, format or signature, and nothing else. The time it
// takes does not depend on how much of a wrong signature is right.
func (c *Codec) Decode(b []byte) (Handle, error) {
	if len(b) != HandleSize || b[0] != handleVersion || b[1]|b[2]|b[3] != 0 {
		return Handle{}, wire.ErrBadHandle
	}
	p := signedWords(b)
	known := c.lookup(p)
	if !known {
		c.sign(p)
	}
	if (p[4]^binary.BigEndian.Uint64(b[32:]))|(p[5]^binary.BigEndian.Uint64(b[40:])) != 0 {
		return Handle{}, wire.ErrBadHandle
	}
	if !known {
		c.remember(p)
	}
	return Handle{
		FSID:       binary.BigEndian.Uint64(b[4:]),
		FID:        wire.GetFID(b[12:]),
		Generation: binary.BigEndian.Uint32(b[28:]),
	}, nil
}
