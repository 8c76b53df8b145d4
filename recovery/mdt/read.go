package mdt

import (
	"errors"
	"fmt"
	"math"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/wire"
)

// missed is read's result for a request that the caches cannot answer.
const missed = math.MaxUint64

// read executes a request that changes nothing. With try it uses the caches
// alone and returns missed when they do not suffice. Else it returns the newest
// version that the reply shows.
func (m *MDT) read(req *wire.Request, rep *wire.Reply, try bool) uint64 {
	switch req.Op {
	case wire.OpPing:
		return 0
	case wire.OpStatfs:
		m.statfs(rep)
		return 0
	case wire.OpGetattr:
		in, st := m.inode(req.FID, try)
		if in == nil {
			return result(rep, st)
		}
		rep.Attr, rep.HasAttr = in.Attr, true
		return in.Attr.Version
	case wire.OpLookup:
		return m.lookup(req, rep, try)
	case wire.OpReadlink:
		in, st := m.inode(req.FID, try)
		if in == nil {
			return result(rep, st)
		}
		rep.Attr, rep.HasAttr = in.Attr, true
		if in.Attr.Type != wire.TypeLnk {
			rep.Status = wire.ErrInval
			return in.Attr.Version
		}
		if in.link == nil {
			if try {
				return missed
			}
			link, err := m.e.Get(appendLinkKey(make([]byte, 0, 17), req.FID), rep.Data[:0])
			if errors.Is(err, store.ErrNotFound) {
				rep.HasAttr = false // removed meanwhile
				return result(rep, wire.ErrStale)
			}
			if err != nil {
				return result(rep, m.damaged("symlink", req.FID, err))
			}
			rep.Data = link
			return in.Attr.Version
		}
		rep.Data = append(rep.Data[:0], in.link...)
		return in.Attr.Version
	case wire.OpReaddir:
		return m.readdir(req, rep)
	case wire.OpLockTest, wire.OpLockList, wire.OpLockHosts:
		m.lockQuery(req, rep)
		return 0
	}
	return result(rep, wire.ErrProto)
}

func result(rep *wire.Reply, st wire.Status) uint64 {
	if st == stMiss {
		return missed
	}
	rep.Status = st
	return 0
}

// stMiss says that the cache does not know; it never leaves the package.
const stMiss wire.Status = math.MaxUint32

func (m *MDT) damaged(what string, key any, err error) wire.Status {
	m.log.Error("mdt: cannot read "+what, "key", key, "err", err)
	return wire.ErrIO
}

// maxCachedLink bounds the symlink targets that the inode cache keeps.
const maxCachedLink = 192

// inode returns an object's snapshot: nil with ErrStale when there is none,
// with ErrIO when it is unreadable, with stMiss when it is not cached and try is
// set.
func (m *MDT) inode(f wire.FID, try bool) (*Inode, wire.Status) {
	if in := m.inodes.get(f); in != nil {
		return in, wire.OK
	}
	if f.Ver != 0 || f.Seq > wire.MaxSeq {
		return nil, wire.ErrStale
	}
	if try {
		return nil, stMiss
	}
	gen := m.inodes.gen(f)
	var kb [17]byte
	var vb [256]byte
	v, err := m.e.Get(appendInodeKey(kb[:0], f), vb[:0])
	if errors.Is(err, store.ErrNotFound) {
		return nil, wire.ErrStale
	}
	if err != nil {
		return nil, m.damaged("inode", f, err)
	}
	in, err := DecodeInode(f, v)
	if err != nil {
		return nil, m.damaged("inode", f, err)
	}
	if in.Attr.Type == wire.TypeLnk && in.Attr.Size <= maxCachedLink {
		link, err := m.e.Get(appendLinkKey(kb[:0], f), nil)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, m.damaged("symlink", f, err)
		}
		if err == nil {
			in.link = link
		}
	}
	m.inodes.fill(in, gen)
	return in, wire.OK
}

// entry finds a name in a directory; a zero FID means that it is not there.
func (m *MDT) entry(dir wire.FID, name []byte, try bool) (Entry, wire.Status) {
	ent, known, gen := m.dents.get(dir, name)
	if known {
		return ent, wire.OK
	}
	if try {
		return Entry{}, stMiss
	}
	var kb [17 + wire.MaxNameLen]byte
	var vb [32]byte
	v, err := m.e.Get(appendNameKey(kb[:0], dir, name), vb[:0])
	switch {
	case errors.Is(err, store.ErrNotFound):
		ent = Entry{}
	case err != nil:
		return Entry{}, m.damaged("entry", fmt.Sprintf("%v/%q", dir, name), err)
	default:
		if ent, err = DecodeEntry(v); err != nil {
			return Entry{}, m.damaged("entry", fmt.Sprintf("%v/%q", dir, name), err)
		}
	}
	m.dents.fill(dir, name, ent, gen)
	return ent, wire.OK
}

// isDot tells "." and ".." from other names.
func isDot(name []byte) bool { return string(name) == "." || string(name) == ".." }

// checkName refuses what cannot be a name in a directory. An empty name is
// ErrAcces, as Linux's server answers.
func checkName(name []byte) wire.Status {
	switch {
	case len(name) == 0:
		return wire.ErrAcces
	case len(name) > wire.MaxNameLen:
		return wire.ErrNameTooLong
	}
	for _, c := range name {
		if c == '/' || c == 0 {
			return wire.ErrInval
		}
	}
	return wire.OK
}

func (m *MDT) lookup(req *wire.Request, rep *wire.Reply, try bool) uint64 {
	dir, st := m.inode(req.FID, try)
	if dir == nil {
		return result(rep, st)
	}
	if dir.Attr.Type != wire.TypeDir {
		return result(rep, wire.ErrNotDir)
	}
	rep.DirAttr, rep.HasDir = dir.Attr, true
	if st := checkName(req.Name); st != wire.OK {
		return result(rep, st)
	}
	if !wire.MayAccess(&dir.Attr, &req.Cred, wire.MayExec) {
		return result(rep, wire.ErrAcces)
	}
	var child wire.FID
	switch string(req.Name) {
	case ".":
		rep.Attr, rep.HasAttr = dir.Attr, true
		return dir.Attr.Version
	case "..":
		child = dir.Attr.Parent
	default:
		ent, st := m.entry(req.FID, req.Name, try)
		if st != wire.OK {
			return result(rep, st)
		}
		if ent.FID.IsZero() {
			rep.Status = wire.ErrNoEnt
			return dir.Attr.Version
		}
		child = ent.FID
	}
	in, st := m.inode(child, try)
	if in == nil {
		if st == wire.ErrStale {
			// Removed between the two steps, or the entry dangles.
			st = wire.ErrNoEnt
		}
		return result(rep, st)
	}
	rep.Attr, rep.HasAttr = in.Attr, true
	return max(dir.Attr.Version, in.Attr.Version)
}

// Bounds of one OpReaddir.
const (
	maxReaddirEntries = 8192
	maxReaddirBytes   = 1 << 20
)

// direntCost is what an entry takes of OpReaddir's byte budget: the size of an
// entry3 of RFC 1813 (list pointer, fileid, name length, padded name, cookie).
func direntCost(name int) int { return 24 + (name+3)&^3 }

func (m *MDT) readdir(req *wire.Request, rep *wire.Reply) uint64 {
	dir, st := m.inode(req.FID, false)
	if dir == nil {
		return result(rep, st)
	}
	if dir.Attr.Type != wire.TypeDir {
		return result(rep, wire.ErrNotDir)
	}
	rep.DirAttr, rep.HasDir = dir.Attr, true
	if !wire.MayAccess(&dir.Attr, &req.Cred, wire.MayRead) {
		return result(rep, wire.ErrAcces)
	}
	budget := int(min(req.Count, maxReaddirBytes))
	limit := maxReaddirEntries
	if req.MaxEntries > 0 {
		limit = int(min(req.MaxEntries, maxReaddirEntries))
	}
	version := dir.Attr.Version
	// Names live in one arena. When it moves while it grows, earlier names
	// keep the old one alive.
	arena := rep.Data[:0]
	add := func(cookie uint64, f wire.FID, t wire.FileType, name []byte) bool {
		if budget -= direntCost(len(name)); budget < 0 || len(rep.Entries) >= limit {
			return false
		}
		at := len(arena)
		arena = append(arena, name...)
		rep.Entries = append(rep.Entries, wire.Dirent{Cookie: cookie, FID: f, Type: t, Name: arena[at:len(arena):len(arena)]})
		return true
	}
	defer func() { rep.Data = arena }()
	full := false
	if req.Cookie < 1 {
		full = !add(1, req.FID, wire.TypeDir, []byte("."))
	}
	if req.Cookie < 2 && !full {
		full = !add(2, dir.Attr.Parent, wire.TypeDir, []byte(".."))
	}
	var gens [cacheShards]uint64
	if req.Plus {
		m.inodes.gens(&gens)
	}
	if !full && req.Cookie < math.MaxUint64 {
		lower := appendCookieKey(nil, req.FID, max(req.Cookie+1, FirstCookie))
		upper := store.PrefixEnd(lower[:17])
		it, err := m.e.NewIter(lower, upper)
		if err != nil {
			return result(rep, m.damaged("directory", req.FID, err))
		}
		for ok := it.First(); ok; ok = it.Next() {
			k := it.Key()
			f, t, name, err := DecodeCookieRec(it.Value())
			if err != nil || len(k) != 25 {
				m.damaged("directory cookie", fmt.Sprintf("%x", k), errRecord)
				continue
			}
			if full = !add(be.Uint64(k[17:]), f, t, name); full {
				break
			}
		}
		err = it.Error()
		_ = it.Close()
		if err != nil {
			rep.Entries = rep.Entries[:0]
			return result(rep, m.damaged("directory", req.FID, err))
		}
	}
	if full && len(rep.Entries) == 0 {
		return result(rep, wire.ErrTooSmall)
	}
	rep.EOF = !full
	if req.Plus {
		version = max(version, m.plus(rep, &gens))
	}
	return version
}

// plus fills the attributes of a reply's entries, from the cache or with one
// iterator, since the entries of a directory are often neighbours.
func (m *MDT) plus(rep *wire.Reply, gens *[cacheShards]uint64) (version uint64) {
	var it store.Iter
	defer func() {
		if it != nil {
			_ = it.Close()
		}
	}()
	var kb [17]byte
	for i := range rep.Entries {
		e := &rep.Entries[i]
		in := m.inodes.get(e.FID)
		if in == nil {
			if it == nil {
				var err error
				if it, err = m.e.NewIter([]byte{prefixInode}, []byte{prefixInode + 1}); err != nil {
					m.damaged("inodes", e.FID, err)
					return version
				}
			}
			key := appendInodeKey(kb[:0], e.FID)
			if !it.SeekGE(key) || string(it.Key()) != string(key) {
				continue
			}
			var err error
			if in, err = DecodeInode(e.FID, it.Value()); err != nil {
				m.damaged("inode", e.FID, err)
				continue
			}
			if in.Attr.Type != wire.TypeLnk {
				m.inodes.fill(in, gens[m.inodes.shardIndex(e.FID)])
			}
		}
		e.Attr, e.HasAttr = in.Attr, true
		version = max(version, in.Attr.Version)
	}
	return version
}

func (m *MDT) statfs(rep *wire.Reply) {
	s := &rep.Statfs
	if m.o.Space != nil {
		s.Total, s.Free, s.Avail = m.o.Space()
	}
	m.seq.Lock()
	s.Files = m.state.Inodes
	m.seq.Unlock()
	// Inodes are made on demand; an estimate of what the space allows.
	s.FilesFree = s.Free / 4096
	s.FilesAvail = s.Avail / 4096
	s.Files += s.FilesFree
}
