// Package nfsd is the NFS version 3 and MOUNT version 3 server (RFC 1813): it
// turns RPC calls into requests to the file system's targets. It keeps no state
// that a client could miss: names, reply records and sizes live at the targets.
package nfsd

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/baton-nfs/baton/internal/inflight"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Config is what a Server needs. FS and Codec are required.
type Config struct {
	FS     *client.FS
	Codec  *nfs3.Codec
	Logger *slog.Logger
	// RTMax, WTMax and DTMax bound the bytes of one READ, WRITE and directory
	// read. Default 1 MiB each.
	RTMax, WTMax, DTMax uint32
	// RTPref, WTPref and DTPref are the sizes that FSINFO recommends. Default:
	// the maxima.
	RTPref, WTPref, DTPref uint32
	// InlineRead is the largest READ that a connection's reader answers itself
	// when the data are in memory; longer ones go to a worker so that one stream
	// does not hold up the connection's other calls. Default 64 KiB.
	InlineRead uint32
	// OnFenced is called when a target says that a service address has a newer owner
	// than this epoch, once for each Address. It must not block.
	OnFenced func(vip uint32, epoch uint64)
	// Unsure tells that data were lost and the write verifiers are not changed yet: COMMIT
	// is then answered with JUKEBOX, which has the client ask again. Optional.
	Unsure func() bool
}

// Server serves exports of one file system on any number of addresses.
type Server struct {
	cfg Config
	fs  *client.FS
	log *slog.Logger

	exp    atomic.Pointer[exportSet]
	dups   *inflight.Table[*op]
	mounts mountTable

	// conns holds the live TCP connections by peer, for the rule that a reply
	// record of a living connection does not answer a call of another.
	connMu sync.Mutex
	conns  map[connKey]*sunrpc.Conn
}

// exportSet is one version of the export table with the directories resolved.
type exportSet struct {
	table *exports.Table
	roots map[uint64]wire.FID // by FSID
}

// New returns a server without exports; SetExports installs them.
func New(cfg Config) (*Server, error) {
	if cfg.FS == nil || cfg.Codec == nil {
		return nil, errors.New("nfsd: a file system and a handle codec are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	const mib = 1 << 20
	for _, p := range []*uint32{&cfg.RTMax, &cfg.WTMax, &cfg.DTMax} {
		if *p == 0 || *p > mib {
			*p = mib
		}
	}
	for _, p := range []struct {
		pref *uint32
		max  uint32
	}{{&cfg.RTPref, cfg.RTMax}, {&cfg.WTPref, cfg.WTMax}, {&cfg.DTPref, cfg.DTMax}} {
		if *p.pref == 0 || *p.pref > p.max {
			*p.pref = p.max
		}
	}
	if cfg.InlineRead == 0 {
		cfg.InlineRead = 64 << 10
	}
	s := &Server{cfg: cfg, fs: cfg.FS, log: cfg.Logger, conns: make(map[connKey]*sunrpc.Conn), dups: inflight.New[*op]()}
	s.mounts.init()
	s.exp.Store(&exportSet{table: &exports.Table{}, roots: map[uint64]wire.FID{}})
	return s, nil
}

// Address is one service address of a Server.
type Address struct {
	srv *Server
	// vip and epoch name the address to the targets.
	vip      uint32
	epoch    atomic.Uint64
	verifier atomic.Uint64 // big-endian bytes of the write verifier
	// Fenced counts calls that were dropped because a newer owner has the address.
	Fenced atomic.Uint64
}

// Address returns the service of the VIP with the given index and epoch.
func (s *Server) Address(vip uint32, epoch uint64, verifier [8]byte) *Address {
	a := &Address{srv: s, vip: vip}
	a.epoch.Store(epoch)
	a.SetVerifier(verifier)
	return a
}

// SetVerifier changes the write verifier of all later replies.
func (a *Address) SetVerifier(v [8]byte) {
	var n uint64
	for _, b := range v {
		n = n<<8 | uint64(b)
	}
	a.verifier.Store(n)
}

// Verifier is the write verifier that the address has now.
func (a *Address) Verifier() (v [8]byte) {
	a.putVerifier(&v)
	return v
}

func (a *Address) putVerifier(dst *[8]byte) {
	n := a.verifier.Load()
	for i := range dst {
		dst[i] = byte(n >> (56 - 8*i))
	}
}

func (a *Address) owner() client.Owner {
	return client.Owner{VIP: a.vip, Epoch: a.epoch.Load()}
}

// NFSProgram is the NFS service for a sunrpc server.
func (a *Address) NFSProgram() sunrpc.Program {
	return sunrpc.Program{
		Prog: nfs3.Program, VersLow: nfs3.Version, VersHigh: nfs3.Version,
		NumProcs: func(uint32) uint32 { return nfs3.NumProcs },
		MaxArgs:  int(a.srv.cfg.WTMax) + 4096,
		Handler:  nfsHandler{a},
	}
}

// MountProgram is the MOUNT service for a sunrpc server.
func (a *Address) MountProgram() sunrpc.Program {
	return sunrpc.Program{
		Prog: mount3.Program, VersLow: mount3.VersionOld, VersHigh: mount3.Version,
		NumProcs: func(uint32) uint32 { return mount3.NumProcs },
		MaxArgs:  4096,
		Handler:  mountHandler{a},
	}
}

// connKey is a connection's peer and the service address it came to: a client
// may use one port towards two addresses.
type connKey struct {
	local  netip.Addr
	remote netip.AddrPort
}

func keyOf(c *sunrpc.Conn) connKey { return connKey{c.Local().Addr(), c.Remote()} }

// connOpened runs on the connection's reader at its first call, so before
// ConnClosed whatever becomes of the call.
func (s *Server) connOpened(c *sunrpc.Conn) {
	c.SetValue(known{})
	s.connMu.Lock()
	s.conns[keyOf(c)] = c
	s.connMu.Unlock()
}

// known marks a connection that is in Server.conns.
type known struct{}

// ConnClosed must be called (sunrpc.Config.OnClose) when a connection ends.
func (s *Server) ConnClosed(c *sunrpc.Conn) {
	s.connMu.Lock()
	if k := keyOf(c); s.conns[k] == c {
		delete(s.conns, k)
	}
	s.connMu.Unlock()
}

func (s *Server) connAlive(local, addr netip.Addr, port uint16) bool {
	s.connMu.Lock()
	defer s.connMu.Unlock()
	c := s.conns[connKey{local, netip.AddrPortFrom(addr, port)}]
	return c != nil && c.Alive()
}

// decide finds what the export with the given FSID allows the caller. Without
// block, ok is false when the caller's host name has to be looked up first.
func (s *Server) decide(from netip.AddrPort, fsid uint64, block bool) (dec *exports.Decision, set *exportSet, st wire.Status, ok bool) {
	set = s.exp.Load()
	dec, v := set.table.MatchFSID(fsid, from.Addr(), from.Port())
	if v == exports.Pending {
		if !block {
			return nil, nil, 0, false
		}
		// A failed look-up leaves the verdict pending: the client tries again.
		_ = set.table.Resolve(context.Background(), from.Addr())
		dec, v = set.table.MatchFSID(fsid, from.Addr(), from.Port())
	}
	return dec, set, v.Status(), true
}

// SetExports installs a new table. Directories that do not exist are made
// (mode 0755, root). The old table stays when it returns an error.
func (s *Server) SetExports(ctx context.Context, t *exports.Table) error {
	set := &exportSet{table: t, roots: make(map[uint64]wire.FID)}
	for _, e := range t.Exports() {
		fid, err := s.fs.MkdirAll(ctx, e.Dir)
		if err != nil {
			return &ExportError{Path: e.Path, Dir: e.Dir, Err: err}
		}
		set.roots[e.FSID] = fid
	}
	s.exp.Store(set)
	return nil
}

// Exports is the table in force.
func (s *Server) Exports() *exports.Table { return s.exp.Load().table }

// ExportError tells that an export's directory could not be used.
type ExportError struct {
	Path, Dir string
	Err       error
}

func (e *ExportError) Error() string {
	return "export " + e.Path + ": directory " + e.Dir + " of the name space: " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *ExportError) Unwrap() error { return e.Err }
