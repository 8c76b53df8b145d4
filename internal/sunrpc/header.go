package sunrpc

import (
	"encoding/binary"

	"github.com/baton-nfs/baton/internal/xdr"
)

// Authentication flavors (RFC 5531 §8.2) that the server accepts.
const (
	AuthNone uint32 = 0
	AuthSys  uint32 = 1
)

// Values of auth_stat (RFC 5531 §9) for Call.AuthError.
const (
	AuthBadCred      uint32 = 1
	AuthRejectedCred uint32 = 2
	AuthBadVerf      uint32 = 3
	AuthRejectedVerf uint32 = 4
	AuthTooWeak      uint32 = 5
)

// AcceptStat is the status of an accepted call that was not executed (RFC 5531 §9, accept_stat).
type AcceptStat uint32

// Values of AcceptStat.
const (
	ProgUnavail  AcceptStat = 1
	ProgMismatch AcceptStat = 2
	ProcUnavail  AcceptStat = 3
	GarbageArgs  AcceptStat = 4
	SystemErr    AcceptStat = 5
)

const (
	rpcVersion  = 2
	msgCall     = 0
	msgReply    = 1
	msgAccepted = 0
	msgDenied   = 1
	rpcMismatch = 0
	authError   = 1

	maxAuthBody    = 400 // RFC 5531 §8.2
	maxMachineName = 255
	maxGIDs        = 16

	minCallHeader = 40 // six words, empty credential, empty verifier
	markSize      = 4
	// replyHeader is what precedes the result of an accepted call: record mark, xid, REPLY, MSG_ACCEPTED,
	// an AUTH_NONE verifier of two words, accept_stat.
	replyHeader = markSize + 6*4
)

// NobodyID is the user and group of AUTH_NONE callers.
const NobodyID = 65534

// Cred is a decoded credential. With AUTH_NONE the ids are NobodyID and there are no groups; handlers
// that treat anonymous callers otherwise look at Flavor.
type Cred struct {
	Flavor   uint32
	UID, GID uint32
	NGIDs    uint8
	GIDs     [maxGIDs]uint32 // the first NGIDs are valid
}

// verdict says what becomes of a record.
type verdict uint8

const (
	vCall      verdict = iota // a well-formed call for program, version and credential checks to follow
	vIgnore                   // a reply: not for us
	vGarbage                  // not an RPC message: the stream cannot be trusted
	vMismatch                 // MSG_DENIED RPC_MISMATCH
	vAuthError                // MSG_DENIED AUTH_ERROR
)

// decodeCall decodes a call header (RFC 5531 §9) from rec into c: XID, Prog, Vers, Proc, Cred, Raw and
// Args. For vAuthError the status is returned too. Nothing is allocated; Raw and Args alias rec.
func decodeCall(c *Call, rec []byte) (verdict, uint32) {
	if len(rec) < 12 {
		return vGarbage, 0
	}
	c.XID = binary.BigEndian.Uint32(rec)
	switch binary.BigEndian.Uint32(rec[4:]) {
	case msgCall:
	case msgReply:
		return vIgnore, 0
	default:
		return vGarbage, 0
	}
	if binary.BigEndian.Uint32(rec[8:]) != rpcVersion {
		return vMismatch, 0
	}
	if len(rec) < minCallHeader {
		return vGarbage, 0
	}
	c.Prog = binary.BigEndian.Uint32(rec[12:])
	c.Vers = binary.BigEndian.Uint32(rec[16:])
	c.Proc = binary.BigEndian.Uint32(rec[20:])
	flavor := binary.BigEndian.Uint32(rec[24:])
	credLen := binary.BigEndian.Uint32(rec[28:])
	if credLen > maxAuthBody {
		return vAuthError, AuthBadCred
	}
	var r xdr.Reader
	r.Reset(rec[32:])
	body := r.FixedOpaque(int(credLen))
	if r.Err() != nil {
		return vAuthError, AuthBadCred
	}
	verfFlavor := r.Uint32()
	verf := r.Opaque(maxAuthBody)
	if r.Err() != nil {
		return vAuthError, AuthBadVerf
	}
	switch flavor {
	case AuthNone:
		if len(body) != 0 {
			return vAuthError, AuthBadCred
		}
		c.Cred.Flavor, c.Cred.UID, c.Cred.GID, c.Cred.NGIDs = AuthNone, NobodyID, NobodyID, 0
	case AuthSys:
		if !decodeAuthSys(&c.Cred, body) {
			return vAuthError, AuthBadCred
		}
	default:
		// AUTH_SHORT handles were never issued, and the others are not implemented: the client must
		// come back with a credential of its own (RFC 5531 §8.2).
		return vAuthError, AuthRejectedCred
	}
	// RFC 5531 §8.1 and appendix A: both flavors go with an AUTH_NONE verifier of length zero.
	if verfFlavor != AuthNone || len(verf) != 0 {
		return vAuthError, AuthBadVerf
	}
	c.Raw = rec[32:]
	c.Args = r.Rest()
	return vCall, 0
}

// decodeAuthSys decodes authsys_parms (RFC 5531 appendix A).
func decodeAuthSys(cr *Cred, body []byte) bool {
	var r xdr.Reader
	r.Reset(body)
	r.Uint32() // stamp
	r.Opaque(maxMachineName)
	cr.Flavor = AuthSys
	cr.UID = r.Uint32()
	cr.GID = r.Uint32()
	n := r.Uint32()
	if r.Err() != nil || n > maxGIDs {
		return false
	}
	for i := range n {
		cr.GIDs[i] = r.Uint32()
	}
	cr.NGIDs = uint8(n)
	return r.Err() == nil && r.Len() == 0
}

// appendAccepted appends the header of an accepted reply. The record mark in front is filled in when the
// length is known.
func appendAccepted(b []byte, xid uint32, stat AcceptStat) []byte {
	b = append(b, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, xid)
	b = binary.BigEndian.AppendUint32(b, msgReply)
	b = binary.BigEndian.AppendUint32(b, msgAccepted)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(stat))
}

func appendDenied(b []byte, xid, why uint32) []byte {
	b = append(b, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, xid)
	b = binary.BigEndian.AppendUint32(b, msgReply)
	b = binary.BigEndian.AppendUint32(b, msgDenied)
	return binary.BigEndian.AppendUint32(b, why)
}
