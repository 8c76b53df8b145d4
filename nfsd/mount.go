package nfsd

import (
	"context"
	"net/netip"
	"sort"
	"sync"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/exports"
	"github.com/baton-nfs/baton/nfsd/mount3"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// mountTable remembers who mounted what, for DUMP and the status command. It is
// a hint, as RFC 1813 section 5.2.2 says: clients come and go without telling.
type mountTable struct {
	mu sync.Mutex
	m  map[mountKey]time.Time
}

type mountKey struct {
	addr netip.Addr
	path string
}

// maxMounts bounds the table; beyond it the oldest entry makes room.
const maxMounts = 8192

func (t *mountTable) init() { t.m = make(map[mountKey]time.Time) }

func (t *mountTable) add(addr netip.Addr, path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := mountKey{addr.Unmap(), path}
	if _, ok := t.m[k]; !ok && len(t.m) >= maxMounts {
		var oldest mountKey
		var at time.Time
		for k, v := range t.m {
			if at.IsZero() || v.Before(at) {
				oldest, at = k, v
			}
		}
		delete(t.m, oldest)
	}
	t.m[k] = time.Now()
}

// remove forgets one mount, or all of the client's with an empty path.
func (t *mountTable) remove(addr netip.Addr, path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	addr = addr.Unmap()
	if path != "" {
		delete(t.m, mountKey{addr, path})
		return
	}
	for k := range t.m {
		if k.addr == addr {
			delete(t.m, k)
		}
	}
}

// Mount is an entry of the mount list.
type Mount struct {
	Client netip.Addr
	Path   string
	Since  time.Time
}

// Mounts lists what clients said they mounted, ordered by client and path.
func (s *Server) Mounts() []Mount {
	s.mounts.mu.Lock()
	l := make([]Mount, 0, len(s.mounts.m))
	for k, v := range s.mounts.m {
		l = append(l, Mount{k.addr, k.path, v})
	}
	s.mounts.mu.Unlock()
	sort.Slice(l, func(i, j int) bool {
		if l[i].Client != l[j].Client {
			return l[i].Client.Less(l[j].Client)
		}
		return l[i].Path < l[j].Path
	})
	return l
}

type mountHandler struct{ a *Address }

// udpListLimit keeps DUMP and EXPORT replies inside a datagram, tcpListLimit
// inside a record.
const (
	udpListLimit = 32 << 10
	tcpListLimit = 512 << 10
)

// ServeRPC answers a MOUNT call.
func (h mountHandler) ServeRPC(c *sunrpc.Call) {
	r := xdr.NewReader(c.Args)
	limit := tcpListLimit
	if c.Conn == nil {
		limit = udpListLimit
	}
	s := h.a.srv
	if c.Vers != mount3.Version && !mount3.ServesOld(nfs.MountProcedure(c.Proc)) {
		c.Fail(sunrpc.ProcUnavail)
		return
	}
	switch nfs.MountProcedure(c.Proc) {
	case nfs.MountProcMount:
		path, err := mount3.DecodePath(r)
		if err != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		p := string(path)
		st := mount3.CheckPath(path)
		c.Go(func(c *sunrpc.Call) { h.mount(c, p, st) })
	case nfs.MountProcDump:
		var l []mount3.DumpEntry
		for _, m := range s.Mounts() {
			l = append(l, mount3.DumpEntry{Hostname: m.Client.String(), Directory: m.Path})
		}
		mount3.PutDump(&c.Out, l, limit)
		c.Finish()
	case nfs.MountProcUmnt:
		path, err := mount3.DecodePath(r)
		if err != nil {
			c.Fail(sunrpc.GarbageArgs)
			return
		}
		if len(path) > 0 {
			s.mounts.remove(c.Remote.Addr(), string(path))
		}
		c.Finish()
	case nfs.MountProcUmntAll:
		s.mounts.remove(c.Remote.Addr(), "")
		c.Finish()
	case nfs.MountProcExport:
		var l []mount3.ExportEntry
		for _, e := range s.Exports().Exports() {
			x := mount3.ExportEntry{Dir: e.Path}
			for i := range e.Clients {
				if e.Clients[i].Kind == exports.KindAnyone {
					x.Groups = nil
					break
				}
				x.Groups = append(x.Groups, e.Clients[i].Spec())
			}
			l = append(l, x)
		}
		mount3.PutExports(&c.Out, l, limit)
		c.Finish()
	default:
		c.Fail(sunrpc.ProcUnavail)
	}
}

func (h mountHandler) mount(c *sunrpc.Call, path string, st nfs.MountStatus) {
	s := h.a.srv
	ctx := context.Background()
	if st != nfs.MountStatusOk {
		mount3.PutMntFail(&c.Out, st)
		c.Finish()
		return
	}
	set := s.exp.Load()
	exp, rest, ok := set.table.FindPath(path)
	if !ok {
		s.log.Info("mount refused: not exported", "client", c.Remote.Addr(), "path", path)
		mount3.PutMntFail(&c.Out, nfs.MountStatusErrAcces)
		c.Finish()
		return
	}
	addr, port := c.Remote.Addr(), c.Remote.Port()
	_, v := set.table.MatchPath(exp.Path, addr, port)
	if v == exports.Pending {
		if err := set.table.Resolve(ctx, addr); err != nil {
			s.log.Warn("the client's host name could not be found", "client", addr, "err", err)
		}
		_, v = set.table.MatchPath(exp.Path, addr, port)
	}
	if v != exports.Allowed {
		s.log.Info("mount refused", "client", c.Remote, "path", path, "export", exp.Path, "reason", v.String())
		mount3.PutMntFail(&c.Out, nfs.MountStatusErrAcces)
		c.Finish()
		return
	}
	a, wst := s.fs.Resolve(ctx, set.roots[exp.FSID], rest)
	if wst == wire.OK && a.Type != wire.TypeDir {
		wst = wire.ErrNotDir
	}
	if wst != wire.OK {
		mount3.PutMntFail(&c.Out, mount3.Status(wst))
		c.Finish()
		return
	}
	var fh [nfs3.HandleSize]byte
	s.cfg.Codec.Encode(nfs3.Handle{FSID: exp.FSID, FID: a.FID, Generation: a.Generation}, &fh)
	s.mounts.add(addr, path)
	s.log.Info("mounted", "client", addr, "path", path, "export", exp.Path)
	mount3.PutMntOK(&c.Out, fh[:], exports.AuthSys)
	c.Finish()
}
