// Package rpctest has calls and replies of RPC over TCP (RFC 5531) as bytes, for tests
// that decide for themselves when a call is sent, by which connection, and how often.
package rpctest

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/baton-nfs/baton/internal/xdr"
)

// maxReply bounds a reply in bytes.
const maxReply = 4 << 20

// Call is a record of one fragment (RFC 5531 section 11) with a call as root by
// AUTH_SYS, without a machine's name and groups. args encodes the arguments.
func Call(xid, prog, vers, proc uint32, args func(*xdr.Writer)) []byte {
	var w xdr.Writer
	for _, v := range []uint32{0, xid, 0, 2, prog, vers, proc, 1, 20, 0, 0, 0, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	args(&w)
	binary.BigEndian.PutUint32(w.Buf, 1<<31|uint32(len(w.Buf)-4))
	return w.Buf
}

// Next reads a reply of one fragment and returns its XID and its result, undecoded. A
// call that was not executed is an error.
func Next(r io.Reader) (xid uint32, result []byte, err error) {
	var mark [4]byte
	if _, err := io.ReadFull(r, mark[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(mark[:]) &^ (1 << 31)
	if n < 4 || n > maxReply {
		return 0, nil, fmt.Errorf("a reply of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, nil, err
	}
	xid = binary.BigEndian.Uint32(b)
	// Accepted, and with success; servers here send no verifier.
	if n < 24 || binary.BigEndian.Uint32(b[8:]) != 0 || binary.BigEndian.Uint32(b[20:]) != 0 {
		return xid, nil, fmt.Errorf("refused: %x", b[:min(n, 64)])
	}
	return xid, b[24:], nil
}

// Reply reads replies until that of xid, and returns its result.
func Reply(r io.Reader, xid uint32) ([]byte, error) {
	for {
		got, result, err := Next(r)
		if got == xid || got == 0 && err != nil {
			return result, err
		}
	}
}
