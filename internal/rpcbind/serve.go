package rpcbind

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/baton-nfs/baton/internal/xdr"
)

// Procedures of portmap 2 (RFC 1833 section 3.2).
const (
	pmapNull    = 0
	pmapSet     = 1
	pmapUnset   = 2
	pmapGetport = 3
	pmapDump    = 4
	pmapCallit  = 5
)

// Procedures of rpcbind 3 and 4 (RFC 1833 section 2.1).
const (
	rpcbNull        = 0
	rpcbSet         = 1
	rpcbUnset       = 2
	rpcbGetaddr     = 3
	rpcbDump        = 4
	rpcbCallit      = 5 // BCAST in version 4
	rpcbGettime     = 6
	rpcbUaddr2taddr = 7
	rpcbTaddr2uaddr = 8
	rpcbGetversaddr = 9
	rpcbIndirect    = 10
	rpcbGetaddrlist = 11
	rpcbGetstat     = 12
	rpcbNumProcs    = 13
)

// Protocol numbers of portmap.
const (
	protoTCP = 6
	protoUDP = 17
)

// Address families in the sockaddr that UADDR2TADDR carries (Linux).
const (
	afInet  = 2
	afInet6 = 10
)

// Server answers calls of program 100000 from a table.
type Server struct {
	Table *Table
	// Now is the clock of GETTIME; nil: time.Now.
	Now func() time.Time

	// Calls by version (2, 3, 4) and procedure, for GETSTAT.
	calls [3][rpcbNumProcs]atomic.Uint32
	sets  [3]atomic.Uint32
	unset [3]atomic.Uint32
}

// question is what the answer depends on.
type question struct {
	vers, proc    uint32
	args          []byte
	remote, local netip.AddrPort
	udp           bool
}

// outcome is how a call ends.
type outcome int

const (
	success outcome = iota
	procUnavail
	garbageArgs
	noReply
)

// netid is the network id of the question's own transport.
func (q *question) netid() string {
	n := TCP
	if q.udp {
		n = UDP
	}
	if q.local.Addr().Unmap().Is6() {
		n += "6"
	}
	return n
}

// trusted tells whether the caller may change the table: a privileged
// process of this machine.
func (q *question) trusted() bool {
	return q.remote.Addr().Unmap().IsLoopback() && q.remote.Port() != 0 && q.remote.Port() < 1024
}

// serve answers one call: results are appended to w.
func (s *Server) serve(q *question, w *xdr.Writer) outcome {
	if q.vers >= VersPortmap && q.vers <= Vers4 && q.proc < rpcbNumProcs {
		s.calls[q.vers-VersPortmap][q.proc].Add(1)
	}
	switch q.vers {
	case VersPortmap:
		return s.portmap(q, w)
	case Vers3, Vers4:
		return s.rpcb(q, w)
	}
	return procUnavail
}

func protoNetid(prot uint32) string {
	switch prot {
	case protoTCP:
		return TCP
	case protoUDP:
		return UDP
	}
	return ""
}

func (s *Server) portmap(q *question, w *xdr.Writer) outcome {
	var prog, vers, prot, port uint32
	switch q.proc {
	case pmapSet, pmapUnset, pmapGetport:
		r := xdr.NewReader(q.args)
		prog, vers, prot, port = r.Uint32(), r.Uint32(), r.Uint32(), r.Uint32()
		if r.Err() != nil {
			return garbageArgs
		}
	}
	switch q.proc {
	case pmapNull:
	case pmapSet:
		ok := q.trusted() && protoNetid(prot) != "" && port > 0 && port <= 65535 &&
			s.Table.add(Mapping{Prog: prog, Vers: vers, Netid: protoNetid(prot), Port: uint16(port), Owner: "superuser"})
		s.count(&s.sets, q, ok)
		w.Bool(ok)
	case pmapUnset:
		ok := q.trusted() && s.Table.remove(prog, vers, func(n string) bool { return n == TCP || n == UDP })
		s.count(&s.unset, q, ok)
		w.Bool(ok)
	case pmapGetport:
		var m Mapping
		if n := protoNetid(prot); n != "" {
			ok := false
			if q.local.Addr().Unmap().Is6() {
				m, ok = s.Table.find(prog, vers, n+"6", false)
			}
			if !ok {
				m, _ = s.Table.find(prog, vers, n, false)
			}
		}
		w.Uint32(uint32(m.Port))
	case pmapDump:
		for _, m := range s.Table.List() {
			prot := uint32(protoTCP)
			switch m.Netid {
			case TCP:
			case UDP:
				prot = protoUDP
			default:
				continue
			}
			w.Bool(true)
			w.Uint32(m.Prog)
			w.Uint32(m.Vers)
			w.Uint32(prot)
			w.Uint32(uint32(m.Port))
		}
		w.Bool(false)
	case pmapCallit:
		return noReply // RFC 1833 section 3.2: no reply unless the call succeeds
	default:
		return procUnavail
	}
	return success
}

func (s *Server) count(c *[3]atomic.Uint32, q *question, ok bool) {
	if ok {
		c[q.vers-VersPortmap].Add(1)
	}
}

func (s *Server) rpcb(q *question, w *xdr.Writer) outcome {
	if q.vers == Vers3 && q.proc > rpcbTaddr2uaddr {
		return procUnavail
	}
	var prog, vers uint32
	var netid, addr string
	r := xdr.NewReader(q.args)
	switch q.proc {
	case rpcbSet, rpcbUnset, rpcbGetaddr, rpcbGetversaddr, rpcbGetaddrlist:
		prog, vers = r.Uint32(), r.Uint32()
		netid, addr = string(r.String(maxNetid)), string(r.String(maxAddr))
		r.String(maxOwner) // the owner is decided by the transport
		if r.Err() != nil {
			return garbageArgs
		}
	}
	switch q.proc {
	case rpcbNull:
	case rpcbSet:
		ok := s.rpcbSet(q, prog, vers, netid, addr)
		s.count(&s.sets, q, ok)
		w.Bool(ok)
	case rpcbUnset:
		ok := q.trusted() && s.Table.remove(prog, vers, func(n string) bool { return netid == "" || n == netid })
		s.count(&s.unset, q, ok)
		w.Bool(ok)
	case rpcbGetaddr, rpcbGetversaddr:
		// RFC 1833 ignores the caller's network id in favour of the
		// transport's; callers that name another one mean it.
		if !knownNetid(netid) {
			netid = q.netid()
		}
		var ua string
		if m, ok := s.Table.find(prog, vers, netid, q.proc == rpcbGetversaddr); ok {
			ua = m.uaddr(q.local.Addr())
		}
		w.String(ua)
	case rpcbDump:
		for _, m := range s.Table.List() {
			w.Bool(true)
			w.Uint32(m.Prog)
			w.Uint32(m.Vers)
			w.String(m.Netid)
			w.String(m.listed())
			w.String(m.Owner)
		}
		w.Bool(false)
	case rpcbCallit:
		return noReply
	case rpcbGettime:
		now := time.Now
		if s.Now != nil {
			now = s.Now
		}
		w.Uint32(uint32(now().Unix()))
	case rpcbUaddr2taddr:
		ua := string(r.String(maxAddr))
		if r.Err() != nil {
			return garbageArgs
		}
		b := taddr(ua)
		w.Uint32(uint32(len(b)))
		w.Opaque(b)
	case rpcbTaddr2uaddr:
		r.Uint32() // maxlen
		b := r.Opaque(maxAddr)
		if r.Err() != nil {
			return garbageArgs
		}
		w.String(uaddrOf(b))
	case rpcbGetaddrlist:
		s.addrList(q, prog, vers, w)
	case rpcbGetstat:
		s.stat(w)
	default: // INDIRECT included
		return procUnavail
	}
	return success
}

func (s *Server) rpcbSet(q *question, prog, vers uint32, netid, addr string) bool {
	a, err := ParseUaddr(addr)
	if err != nil || !q.trusted() || !knownNetid(netid) || a.Port() == 0 || a.Addr().Is6() != is6(netid) || a.Addr().Zone() != "" {
		return false
	}
	m := Mapping{Prog: prog, Vers: vers, Netid: netid, Port: a.Port(), Owner: "superuser"}
	if !a.Addr().IsUnspecified() {
		m.Host = a.Addr()
	}
	return s.Table.add(m)
}

// addrList answers GETADDRLIST: the places of exactly this version on the
// networks of the question's protocol family.
func (s *Server) addrList(q *question, prog, vers uint32, w *xdr.Writer) {
	for _, m := range s.Table.List() {
		if m.Prog != prog || m.Vers != vers {
			continue
		}
		ua := m.uaddr(q.local.Addr())
		if ua == "" || is6(m.Netid) != q.local.Addr().Unmap().Is6() {
			continue
		}
		family, proto, semantics := "inet", TCP, uint32(3) // connection-oriented with orderly release
		if m.Netid == UDP || m.Netid == UDP6 {
			proto, semantics = UDP, 1
		}
		if is6(m.Netid) {
			family = "inet6"
		}
		w.Bool(true)
		w.String(ua)
		w.String(m.Netid)
		w.Uint32(semantics)
		w.String(family)
		w.String(proto)
	}
	w.Bool(false)
}

// stat answers GETSTAT: call counts by version, and no lists.
func (s *Server) stat(w *xdr.Writer) {
	for v := range s.calls {
		for p := range s.calls[v] {
			w.Uint32(s.calls[v][p].Load())
		}
		w.Uint32(s.sets[v].Load())
		w.Uint32(s.unset[v].Load())
		w.Bool(false) // addresses asked for
		w.Bool(false) // forwarded calls
	}
}

// taddr is a universal address as Linux's struct sockaddr_in or sockaddr_in6;
// empty if it cannot be read.
func taddr(ua string) []byte {
	a, err := ParseUaddr(ua)
	if err != nil {
		return nil
	}
	if a.Addr().Is4() {
		b := make([]byte, 16)
		binary.NativeEndian.PutUint16(b, afInet)
		binary.BigEndian.PutUint16(b[2:], a.Port())
		copy(b[4:], a.Addr().AsSlice())
		return b
	}
	b := make([]byte, 28)
	binary.NativeEndian.PutUint16(b, afInet6)
	binary.BigEndian.PutUint16(b[2:], a.Port())
	copy(b[8:], a.Addr().AsSlice())
	return b
}

// uaddrOf reads what taddr writes; "" if it cannot.
func uaddrOf(b []byte) string {
	switch {
	case len(b) >= 8 && binary.NativeEndian.Uint16(b) == afInet:
		return FormatUaddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:])))
	case len(b) >= 24 && binary.NativeEndian.Uint16(b) == afInet6:
		return FormatUaddr(netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), binary.BigEndian.Uint16(b[2:])))
	}
	return ""
}
