package lockd

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/baton-nfs/baton/lockd/nlm"
)

// note is what a blocked request leaves in the table so that whoever serves the
// address when the lock is granted can call the client back: how it asked, and
// the handle, offset and length exactly as it wrote them, by which it finds its
// request again. Encoded, big-endian:
//
//	 0  format, 1
//	 1  NLM version
//	 2  flags: 1 = the request came over UDP
//	 3  offset, 8 bytes
//	11  length, 8 bytes
//	19  file handle, to the end
type note struct {
	vers        uint32
	udp         bool
	offset, len uint64
	fh          []byte
}

const (
	noteFormat = 1
	noteUDP    = 1
	noteFixed  = 19
	noteMax    = noteFixed + nlm.MaxHandle
)

var errNote = errors.New("lockd: damaged note of a waiting request")

func (n *note) append(b []byte) []byte {
	var flags byte
	if n.udp {
		flags |= noteUDP
	}
	b = append(b, noteFormat, byte(n.vers), flags)
	b = binary.BigEndian.AppendUint64(b, n.offset)
	b = binary.BigEndian.AppendUint64(b, n.len)
	return append(b, n.fh...)
}

// decodeNote decodes a note; fh is a copy.
func decodeNote(b []byte) (note, error) {
	if len(b) < noteFixed || len(b) > noteMax || b[0] != noteFormat || b[2]&^noteUDP != 0 {
		return note{}, errNote
	}
	n := note{
		vers: uint32(b[1]), udp: b[2]&noteUDP != 0,
		offset: binary.BigEndian.Uint64(b[3:]), len: binary.BigEndian.Uint64(b[11:]),
		fh: append([]byte(nil), b[noteFixed:]...),
	}
	if n.vers != nlm.Version1 && n.vers != nlm.Version3 && n.vers != nlm.Version4 {
		return note{}, errNote
	}
	return n, nil
}

// A callback's cookie names the service address and the lock.
const cookieSize = 12

func putCookie(vip uint32, id uint64) [cookieSize]byte {
	var b [cookieSize]byte
	binary.BigEndian.PutUint32(b[:], vip)
	binary.BigEndian.PutUint64(b[4:], id)
	return b
}

// cookieID gives the lock that a cookie of the given service address names.
func cookieID(vip uint32, b []byte) (uint64, bool) {
	if len(b) != cookieSize || binary.BigEndian.Uint32(b) != vip {
		return 0, false
	}
	return binary.BigEndian.Uint64(b[4:]), true
}

// clientAddr is a client's address as part of lock owners.
func clientAddr(a netip.AddrPort) netip.Addr { return a.Addr().Unmap() }
