package lockctl

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/status"
	"github.com/baton-nfs/baton/recovery/mgs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Files do not know their names, so the names of locked files are looked for
// from the root downwards, as far as that is cheap. What is not found is shown
// by its FID.
const (
	walkEntries = 50000
	walkTime    = time.Second
	walkKeep    = 10 * time.Second // pages of one listing share a walk
	maxPath     = 4096
)

// paths is what the last walk has found.
type paths struct {
	at    time.Time
	names map[wire.FID]string
}

// file finds the file that an argument names: a FID, or a path; "" is the zero FID.
func (a *Admin) file(ctx context.Context, s string) (wire.FID, string, error) {
	if s == "" {
		return wire.FID{}, "", nil
	}
	if strings.HasPrefix(s, "[") {
		f, err := wire.ParseFID(s)
		if err == nil && f.IsZero() {
			err = fmt.Errorf("fid %q names no file", s)
		}
		return f, "", err
	}
	attr, st := a.fs.Resolve(ctx, wire.RootFID, s)
	switch st {
	case wire.OK:
		return attr.FID, "/" + strings.Trim(s, "/"), nil
	case wire.ErrNoEnt, wire.ErrNotDir:
		return wire.FID{}, "", fmt.Errorf("no such file: %q (paths are those of baton's file system, as in \"baton ls\")", s)
	}
	return wire.FID{}, "", fmt.Errorf("file %q: %w", s, st)
}

// setPaths fills in the paths of locks, whose files are fids. If path is set, it
// is the name of them all. The last page of a listing gives back the memory.
func (a *Admin) setPaths(ctx context.Context, locks []status.Lock, fids []wire.FID, path string, last bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := a.now(); len(fids) > 0 && path == "" && now.Sub(a.paths.at) > walkKeep {
		a.paths = paths{at: now, names: a.walk(ctx)}
	}
	for i, f := range fids {
		locks[i].Path = path
		if path == "" {
			locks[i].Path = a.paths.names[f]
		}
	}
	if last {
		a.paths = paths{}
	}
}

// walk gives the paths of regular files, those near the root first.
func (a *Admin) walk(ctx context.Context) map[wire.FID]string {
	ctx, cancel := context.WithTimeout(ctx, walkTime)
	defer cancel()
	names := map[wire.FID]string{}
	type dir struct {
		fid  wire.FID
		path string
	}
	dirs := []dir{{wire.RootFID, "/"}}
	for n := 0; len(dirs) > 0 && n < walkEntries; {
		d := dirs[0]
		dirs = dirs[1:]
		for cookie, eof := uint64(0), false; !eof && n < walkEntries; {
			req := &wire.Request{FID: d.fid, Cookie: cookie, Count: 64 << 10, MaxEntries: 1024}
			req.Op = wire.OpReaddir
			rep, err := a.call(ctx, mgs.VIP{}, req)
			if ctx.Err() != nil {
				return names
			}
			if err != nil {
				break // gone meanwhile, or damaged: its files have no paths
			}
			for i := range rep.Entries {
				e := &rep.Entries[i]
				cookie = e.Cookie
				n++
				p := d.path + string(e.Name)
				if len(p) > maxPath {
					continue
				}
				switch {
				case string(e.Name) == "." || string(e.Name) == "..":
				case e.Type == wire.TypeReg:
					names[e.FID] = p
				case e.Type == wire.TypeDir:
					dirs = append(dirs, dir{e.FID, p + "/"})
				}
			}
			eof = rep.EOF || len(rep.Entries) == 0
		}
	}
	return names
}
