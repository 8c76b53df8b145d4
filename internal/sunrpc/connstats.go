package sunrpc

import (
	"net/netip"
	"time"
)

// ConnStats describes one open connection.
type ConnStats struct {
	Remote, Local netip.AddrPort
	Replies       uint64        // calls answered
	Inflight      int64         // calls in progress
	Idle          time.Duration // since something was read, to the second
}

// Conns describes the open connections, in no order.
func (s *Server) Conns() []ConnStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock.Load()
	l := make([]ConnStats, 0, len(s.conns))
	for c := range s.conns {
		l = append(l, ConnStats{
			Remote: c.remote, Local: c.local, Replies: uint64(c.replies.Load()), Inflight: c.inflight.Load(),
			Idle: max(0, time.Duration(now-c.lastRead.Load())),
		})
	}
	return l
}
