package ost

import (
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

func FuzzHeader(f *testing.F) {
	b := make([]byte, headerLen)
	h := header{FID: fid(3), Stripe: 1, LastSeg: 2, Multi: true, Version: 5, LogID: 6, Mtime: 7}
	h.encode(b)
	f.Add(b)
	f.Add([]byte{})
	f.Add(make([]byte, 600))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= headerLen {
			// With the right checksum, or nothing would pass it.
			binary.LittleEndian.PutUint32(b[headerLen-4:], crc32.Checksum(b[:headerLen-4], castagnoli))
		}
		h, err := decodeHeader(b)
		if err != nil {
			return
		}
		c := make([]byte, headerLen)
		h.encode(c)
		h2, err := decodeHeader(c)
		if err != nil || h != h2 {
			t.Fatalf("%+v, again %+v: %v", h, h2, err)
		}
	})
}

func FuzzSuper(f *testing.F) {
	s := super{Index: 1, SegShift: 40, BootID: "x", Ceiling: 9, Lost: []uint64{1},
		Epochs: map[uint32]uint64{1: 2}, Fences: map[wire.ClientID]uint64{{2}: 9}, Target: recov.TargetRecord{Instance: 4, Clean: true},
		Clients: map[wire.ClientID]recov.ClientRecord{{1}: {Client: wire.ClientID{1}, Gen: 3, Instance: 4, FailedAt: 5}}}
	f.Add(s.encode())
	f.Add(oldSuper)
	f.Add([]byte(superMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 4 {
			binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
		}
		s, err := decodeSuper(b)
		if err != nil {
			return
		}
		s2, err := decodeSuper(s.encode())
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(s, s2); d != "" {
			t.Fatal(d)
		}
	})
}
