package sunrpc

import (
	"net/netip"
	"slices"
	"strings"
)

// AddrStats counts what happened at one service address since the server was created.
type AddrStats struct {
	Network string // "tcp" or "udp"
	Addr    netip.AddrPort

	Conns              int64  // open now
	Accepted, Rejected uint64 // connections
	Calls              uint64
	BytesIn, BytesOut  uint64 // including record marks and headers
	AuthErrors         uint64 // calls denied
	Garbage            uint64 // GARBAGE_ARGS, and connections closed or datagrams dropped for nonsense
	Dropped            uint64 // calls without a reply
	Inflight           int64  // calls in progress now
	OutBytes           int64  // reply bytes waiting now
}

// ProcStats counts the calls of one procedure that reached it.
type ProcStats struct {
	Prog, Vers, Proc uint32
	Calls            uint64
}

// Stats is a snapshot of a Server's counters.
type Stats struct {
	Addrs       []AddrStats // by network and address
	Procs       []ProcStats // called ones only
	BufferBytes int64       // pooled buffers in use
}

// Stats returns a snapshot; the counters are not read at one instant.
func (s *Server) Stats() Stats {
	st := Stats{BufferBytes: s.mem.used.Load()}
	s.mu.Lock()
	byEndpoint := make(map[*endpoint]int, len(s.endpoints))
	for _, ep := range s.endpoints {
		byEndpoint[ep] = len(st.Addrs)
		st.Addrs = append(st.Addrs, AddrStats{
			Network: ep.network, Addr: ep.addr,
			Conns: ep.conns.Load(), Accepted: ep.accepted.Load(), Rejected: ep.rejected.Load(),
			Calls: ep.calls.Load(), BytesIn: ep.bytesIn.Load(), BytesOut: ep.bytesOut.Load(),
			AuthErrors: ep.authErrors.Load(), Garbage: ep.garbage.Load(), Dropped: ep.dropped.Load(),
			Inflight: ep.inflightUDP.Load(),
		})
	}
	for c := range s.conns {
		a := &st.Addrs[byEndpoint[c.ep]]
		a.Inflight += c.inflight.Load()
		a.OutBytes += c.outBytes.Load()
	}
	s.mu.Unlock()
	slices.SortFunc(st.Addrs, func(a, b AddrStats) int {
		if d := strings.Compare(a.Network, b.Network); d != 0 {
			return d
		}
		return a.Addr.Compare(b.Addr)
	})
	for _, p := range *s.progs.Load() {
		for v := range p.procs {
			for n := range p.procs[v] {
				if k := p.procs[v][n].Load(); k > 0 {
					st.Procs = append(st.Procs, ProcStats{p.Prog, p.VersLow + uint32(v), uint32(n), k})
				}
			}
		}
	}
	return st
}
