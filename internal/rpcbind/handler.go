package rpcbind

import "github.com/baton-nfs/baton/internal/sunrpc"

// maxArgs bounds the arguments of a call in bytes.
const maxArgs = 2048

// ServeRPC implements sunrpc.Handler. Every answer comes from memory.
func (s *Server) ServeRPC(c *sunrpc.Call) {
	q := question{vers: c.Vers, proc: c.Proc, args: c.Args, remote: c.Remote, local: c.Local, udp: c.Conn == nil}
	switch s.serve(&q, &c.Out) {
	case success:
		c.Finish()
	case procUnavail:
		c.Fail(sunrpc.ProcUnavail)
	case garbageArgs:
		c.Fail(sunrpc.GarbageArgs)
	default:
		c.Drop()
	}
}

// Programs is the service for a sunrpc server, to be put on TCP and UDP.
func (s *Server) Programs() []sunrpc.Program {
	return []sunrpc.Program{{
		Prog: Program, VersLow: VersPortmap, VersHigh: Vers4,
		NumProcs: func(vers uint32) uint32 {
			switch vers {
			case VersPortmap:
				return pmapCallit + 1
			case Vers3:
				return rpcbTaddr2uaddr + 1
			}
			return rpcbNumProcs
		},
		MaxArgs: maxArgs,
		Handler: s,
	}}
}
