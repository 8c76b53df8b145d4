package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/baton-nfs/baton/recovery/wire"
)

// Resolve walks path from the directory from, as root, without following
// symbolic links, and returns the attributes of what it names.
func (f *FS) Resolve(ctx context.Context, from wire.FID, path string) (wire.Attr, wire.Status) {
	m := f.get()
	defer f.put(m)
	var a wire.Attr
	st, _ := f.Attr(ctx, Owner{}, from, &a, true)
	if st != wire.OK {
		return a, st
	}
	for _, name := range strings.Split(path, "/") {
		if name == "" || name == "." {
			continue
		}
		m.req.Reset()
		m.rep.Reset()
		m.req.Op = wire.OpLookup
		m.req.FID, m.req.Name = a.FID, []byte(name)
		f.Call(ctx, Owner{}, &m.req, &m.rep)
		if m.rep.Status != wire.OK {
			return a, m.rep.Status
		}
		a = m.rep.Attr
	}
	st, _ = f.Complete(ctx, Owner{}, &a, true)
	return a, st
}

// MkdirAll makes the directory that path names and those above it, as root with
// mode 0755, and returns its FID. Directories that exist are left as they are.
func (f *FS) MkdirAll(ctx context.Context, path string) (wire.FID, error) {
	m := f.get()
	defer f.put(m)
	at := wire.RootFID
	for _, name := range strings.Split(path, "/") {
		if name == "" {
			continue
		}
		if name == "." || name == ".." || len(name) > wire.MaxNameLen {
			return wire.FID{}, fmt.Errorf("make directory %s: name %q is not allowed: %w", path, name, wire.ErrInval)
		}
		a, st := f.Resolve(ctx, at, name)
		if st == wire.ErrNoEnt {
			m.req.Reset()
			m.rep.Reset()
			m.req.Op = wire.OpMkdir
			m.req.Flags = wire.FlagWaitCommit
			m.req.FID, m.req.Name = at, []byte(name)
			m.req.SetAttr = wire.SetAttr{Mask: wire.SetMode, Mode: 0o755}
			f.Call(ctx, Owner{}, &m.req, &m.rep)
			if a, st = m.rep.Attr, m.rep.Status; st == wire.ErrExist {
				a, st = f.Resolve(ctx, at, name)
			}
		}
		if st != wire.OK {
			return wire.FID{}, fmt.Errorf("make directory %s: %q: %w", path, name, st)
		}
		if a.Type != wire.TypeDir {
			return wire.FID{}, fmt.Errorf("make directory %s: %q: %w", path, name, wire.ErrNotDir)
		}
		at = a.FID
	}
	return at, nil
}
