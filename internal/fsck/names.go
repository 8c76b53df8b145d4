package fsck

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/wire"
)

// group is the state of one directory while its entries are checked.
type group struct {
	fid    wire.FID
	node   *node
	idx    int
	in     *mdt.Inode // nil: there is none that decodes
	notDir bool

	// Counts as they should be stored now, and after the repairs.
	entries, subdirs  uint64
	rmEntries, rmDirs uint64
	maxCookie         uint64
	hash, hashC       uint64 // sums over entries and over records of cookies
	badNames          map[string]bool
	badCookies        map[uint64]bool
	handled           map[uint64]bool // cookies that were dealt with at their entry
	nextCookie        uint64
	recookied         int
}

// checkNames goes over the entries and the records of their cookies, both in
// the order of directories, and compares sums; it looks at a directory in detail
// only when they differ.
func (c *checker) checkNames() error {
	nc, err := prefixCursor(c.o.MDT, keyName)
	if err != nil {
		return err
	}
	defer nc.close()
	cc, err := prefixCursor(c.o.MDT, keyCookie)
	if err != nil {
		return err
	}
	defer cc.close()
	for {
		var f, fc wire.FID
		skip := func(cur *cursor, min, max int) (f wire.FID) {
			for ; cur.ok; cur.next() {
				var ok bool
				if f, ok = cur.fid(); ok && len(cur.k) >= min && len(cur.k) <= max {
					return f
				}
				c.unknownKey(cur.k)
			}
			return f
		}
		f, fc = skip(nc, 18, 17+wire.MaxNameLen), skip(cc, 25, 25)
		if !nc.ok && !cc.ok {
			break
		}
		if !nc.ok || cc.ok && fc.FileID() < f.FileID() {
			f = fc
		}
		g := &group{fid: f}
		if err := c.openGroup(g); err != nil {
			return err
		}
		if err := c.groupNames(g, nc); err != nil {
			return err
		}
		if err := c.groupCookies(g, cc); err != nil {
			return err
		}
		if g.notDir {
			continue
		}
		if g.hash != g.hashC || len(g.badNames)+len(g.badCookies) > 0 {
			if err := c.compareGroup(g); err != nil {
				return err
			}
		}
		if err := c.closeGroup(g); err != nil {
			return err
		}
	}
	if err := nc.err(); err != nil {
		return err
	}
	return cc.err()
}

func (c *checker) openGroup(g *group) error {
	if g.node, g.idx = c.nodes.findFID(g.fid); g.node == nil {
		return fmt.Errorf("directory %v appeared during the check", g.fid)
	}
	switch {
	case g.node.typ != wire.TypeDir:
		g.notDir = true
		c.bad(EntryNotDir, g.fid, "its entries are removed", "it has entries and is no directory")
	case g.node.has(fNoInode) && g.fid == wire.RootFID:
	case !g.node.has(fNoInode | fDamaged):
		in, err := mdt.ReadInode(c.o.MDT, g.fid)
		if err != nil {
			return err
		}
		g.in = in
		g.nextCookie = in.NextCookie
	}
	return nil
}

func (c *checker) sum(f wire.FID, t wire.FileType, cookie uint64, name []byte) uint64 {
	var b [wire.FIDSize + 9 + wire.MaxNameLen]byte
	k := f.Append(b[:0])
	k = append(be.AppendUint64(k, cookie), byte(t))
	return maphash.Bytes(c.seed, append(k, name...))
}

// groupNames reads the entries of one directory.
func (c *checker) groupNames(g *group, nc *cursor) error {
	for ; nc.ok; nc.next() {
		f, ok := nc.fid()
		if !ok || len(nc.k) < 18 || len(nc.k) > 17+wire.MaxNameLen {
			return nil // the caller reports it
		}
		if f != g.fid {
			return nil
		}
		if err := c.step(); err != nil {
			return err
		}
		c.counts.Entries++
		name := nc.k[17:]
		ent, err := mdt.DecodeEntry(nc.v)
		if g.notDir {
			if c.o.Repair {
				c.fix.do().DeleteRaw(nc.k)
			}
			if err == nil {
				// What it names is judged when the entry is gone.
				if n, _ := c.nodes.findFID(ent.FID); n != nil && n.typ != wire.TypeDir {
					n.n++
				} else if n != nil {
					n.flags |= fReached
				}
			}
			continue
		}
		if err != nil {
			if g.badNames == nil {
				g.badNames = map[string]bool{}
			}
			g.badNames[string(name)] = true
			c.bad(EntryDamaged, entryName(g.fid, name), "rebuilt from its cookie's record, or removed", "%v", err)
			continue
		}
		g.hash += c.sum(ent.FID, ent.Type, ent.Cookie, name)
		if err := c.entry(g, name, ent); err != nil {
			return err
		}
	}
	return nil
}

func entryName(dir wire.FID, name []byte) string { return fmt.Sprintf("%v/%q", dir, name) }

// groupCookies reads the records of one directory's cookies.
func (c *checker) groupCookies(g *group, cc *cursor) error {
	for ; cc.ok; cc.next() {
		f, ok := cc.fid()
		if !ok || len(cc.k) != 25 || f != g.fid {
			return nil
		}
		if err := c.step(); err != nil {
			return err
		}
		if g.notDir {
			if c.o.Repair {
				c.fix.do().DeleteRaw(cc.k)
			}
			continue
		}
		cookie := be.Uint64(cc.k[17:])
		child, t, name, err := mdt.DecodeCookieRec(cc.v)
		if err != nil {
			if g.badCookies == nil {
				g.badCookies = map[uint64]bool{}
			}
			g.badCookies[cookie] = true
			if c.bad(CookieDamaged, cookieName(g.fid, cookie), "rebuilt from the entry, or removed", "%v", err) {
				c.fix.do().DeleteRaw(cc.k)
			}
			continue
		}
		g.hashC += c.sum(child, t, cookie, name)
	}
	return nil
}

func cookieName(dir wire.FID, cookie uint64) string { return fmt.Sprintf("%v cookie %d", dir, cookie) }

func validName(name []byte) bool {
	return len(name) > 0 && len(name) <= wire.MaxNameLen && bytes.IndexByte(name, 0) < 0 &&
		bytes.IndexByte(name, '/') < 0 && string(name) != "." && string(name) != ".."
}

// newCookie takes the directory's next cookie.
func (g *group) newCookie() uint64 {
	n := max(g.nextCookie, g.maxCookie+1, mdt.FirstCookie)
	g.nextCookie = n + 1
	g.recookied++
	return n
}

// entry checks an entry against the inode that it names and counts it.
func (c *checker) entry(g *group, name []byte, ent mdt.Entry) error {
	if ent.Cookie < mdt.FirstCookie || ent.Cookie == ^uint64(0) {
		if c.bad(CookieRange, entryName(g.fid, name), "gets another cookie", "its cookie is %d", ent.Cookie) {
			c.fix.do().DeleteCookie(g.fid, ent.Cookie)
			ent.Cookie = g.newCookie()
			c.fix.do().PutName(g.fid, name, ent)
		}
	} else {
		g.maxCookie = max(g.maxCookie, ent.Cookie)
	}
	if !validName(name) {
		if c.bad(EntryName, entryName(g.fid, name), "renamed", "no operation makes such a name") {
			c.fix.do().DeleteName(g.fid, name)
			name = fmt.Appendf(nil, "#name-%x", ent.Cookie)
			c.fix.do().PutName(g.fid, name, ent)
		}
	}
	g.entries++
	child, _ := c.nodes.findFID(ent.FID)
	typ := ent.Type
	if child != nil && child.typ != 0 {
		typ = child.typ
	}
	if typ == wire.TypeDir {
		g.subdirs++
	}
	remove := func() {
		c.fix.do().DeleteName(g.fid, name)
		c.fix.do().DeleteCookie(g.fid, ent.Cookie)
		g.rmEntries++
		if typ == wire.TypeDir {
			g.rmDirs++
		}
	}
	switch {
	case child == nil && ent.FID == wire.RootFID:
	case child == nil:
		if c.bad(EntryDangling, entryName(g.fid, name), "removed", "%v does not exist", ent.FID) {
			remove()
		}
		return nil
	case child.typ == 0:
		return nil
	case child.typ != ent.Type:
		if c.bad(EntryType, entryName(g.fid, name), "corrected", "it says type %d, %v has type %d", ent.Type, ent.FID, child.typ) {
			ent.Type = child.typ
			c.fix.do().PutName(g.fid, name, ent)
		}
	}
	if typ != wire.TypeDir {
		child.n++
		return nil
	}
	if ent.FID == wire.RootFID {
		if c.bad(DirParents, entryName(g.fid, name), "removed", "it names the root directory") {
			remove()
		}
		return nil
	}
	if child.n == 0 {
		child.n = uint32(g.idx) + 1
		return nil
	}
	keep, err := c.parentOf(ent.FID)
	if err != nil {
		return err
	}
	other := c.nodes.at(int(child.n - 1)).fid()
	if keep == g.fid && other != g.fid {
		child.n = uint32(g.idx) + 1
		if c.bad(DirParents, ent.FID, "the entry in the other directory is removed", "it has entries in %v and, as its parent field says, in %v", other, g.fid) {
			c.drops = append(c.drops, drop{other, ent.FID})
		}
		return nil
	}
	if c.bad(DirParents, entryName(g.fid, name), "removed", "the directory %v has an entry in %v already", ent.FID, other) {
		remove()
	}
	return nil
}

// parentOf reads a directory's parent field; zero when it has none.
func (c *checker) parentOf(f wire.FID) (wire.FID, error) {
	v, err := c.get(inodeKey(f))
	if v == nil || err != nil {
		return wire.FID{}, err
	}
	in, derr := mdt.DecodeInode(f, v)
	if derr != nil {
		return wire.FID{}, nil
	}
	return in.Attr.Parent, nil
}

// compareGroup finds the differences between a directory's entries and the
// records of its cookies.
func (c *checker) compareGroup(g *group) error {
	// Repairs of this group are read back below.
	if err := c.fix.apply(); err != nil {
		return err
	}
	g.handled = map[uint64]bool{}
	err := c.scanPrefix(func(k, v []byte) error {
		name := k[17:]
		ent, err := mdt.DecodeEntry(v)
		if err != nil {
			return nil
		}
		return c.compareEntry(g, name, ent)
	}, g.fid.Append([]byte{keyName})...)
	if err != nil {
		return err
	}
	if err := c.fix.apply(); err != nil {
		return err
	}
	err = c.scanPrefix(func(k, v []byte) error {
		if len(k) != 25 {
			return nil
		}
		child, t, name, err := mdt.DecodeCookieRec(v)
		if err != nil {
			return nil
		}
		return c.compareCookie(g, be.Uint64(k[17:]), child, t, name)
	}, g.fid.Append([]byte{keyCookie})...)
	if err != nil || !c.o.Repair {
		return err
	}
	for name := range g.badNames { // those that were not rebuilt
		c.fix.do().DeleteName(g.fid, []byte(name))
	}
	return nil
}

// compareEntry looks for the record of an entry's cookie.
func (c *checker) compareEntry(g *group, name []byte, ent mdt.Entry) error {
	child, t, cname, ok, err := c.cookieAt(g.fid, ent.Cookie)
	if err != nil {
		return err
	}
	if ok && child == ent.FID && t == ent.Type && bytes.Equal(name, cname) {
		return nil
	}
	repair := c.o.Repair
	switch {
	case g.badCookies[ent.Cookie]:
	case !ok:
		repair = c.bad(EntryCookie, entryName(g.fid, name), "rebuilt", "its cookie %d has no record", ent.Cookie)
	default:
		other, _, _, err := c.entryAt(g.fid, cname)
		if err != nil {
			return err
		}
		if !bytes.Equal(name, cname) && other.Cookie == ent.Cookie {
			// The cookie is that of another entry, too.
			if c.bad(EntryCookie, entryName(g.fid, name), "gets another cookie", "%q has the same cookie %d", cname, ent.Cookie) {
				ent.Cookie = g.newCookie()
				c.fix.do().PutName(g.fid, name, ent)
			}
			return nil
		}
		repair = c.bad(CookieMismatch, entryName(g.fid, name), "the cookie's record is rebuilt", "the record of cookie %d says %q, %v, type %d", ent.Cookie, cname, child, t)
	}
	g.handled[ent.Cookie] = true
	if repair {
		c.fix.do().PutName(g.fid, name, ent)
	}
	return nil
}

// compareCookie looks for the entry of a cookie's record.
func (c *checker) compareCookie(g *group, cookie uint64, child wire.FID, t wire.FileType, name []byte) error {
	ent, found, ok, err := c.entryAt(g.fid, name)
	if err != nil {
		return err
	}
	if ok && ent.Cookie == cookie || g.handled[cookie] {
		return nil
	}
	where := cookieName(g.fid, cookie)
	if ok {
		if c.bad(CookieEntry, where, "removed", "%q has cookie %d", name, ent.Cookie) {
			c.fix.do().DeleteCookie(g.fid, cookie)
		}
		return nil
	}
	n, _ := c.nodes.findFID(child)
	possible := n != nil && (n.typ == t || n.typ == 0) && validName(name) && cookie >= mdt.FirstCookie
	repair := c.o.Repair
	switch {
	case found: // the entry is damaged, which is reported
	case possible:
		repair = c.bad(CookieEntry, where, "the entry is rebuilt", "%q has no entry", name)
	default:
		repair = c.bad(CookieEntry, where, "removed", "%q has no entry, and %v is not of type %d", name, child, t)
	}
	if !possible {
		if repair {
			c.fix.do().DeleteCookie(g.fid, cookie)
		}
		return nil
	}
	ent = mdt.Entry{FID: child, Type: t, Cookie: cookie}
	if repair {
		delete(g.badNames, string(name))
		c.fix.do().PutName(g.fid, name, ent)
	}
	c.counts.Entries++
	return c.entry(g, bytes.Clone(name), ent)
}

// closeGroup compares the directory's inode with what was counted.
func (c *checker) closeGroup(g *group) error {
	entries, dirs := g.entries-g.rmEntries, g.subdirs-g.rmDirs
	if g.node.has(fNoInode) {
		if entries == 0 {
			// Nothing is left that would need a directory.
			g.node.flags |= fReached
			return nil
		}
		class, mode := DirInodeMissing, uint32(0o700)
		if g.fid == wire.RootFID {
			class, mode = RootMissing, 0o755
		}
		if c.bad(class, g.fid, "made anew", "it has %d entries and no inode", g.entries) {
			parent := g.fid
			if g.fid != wire.RootFID && g.node.n > 0 {
				parent = c.nodes.at(int(g.node.n - 1)).fid()
			}
			in := c.newDir(g.fid, parent, mode)
			in.Entries, in.Attr.Nlink = entries, uint32(2+dirs)
			in.Attr.Size, in.Attr.Used = dirSize(entries), dirSize(entries)
			in.NextCookie = max(g.nextCookie, g.maxCookie+1, mdt.FirstCookie)
			c.fix.do().PutInode(in)
			c.inodes++
		}
		return nil
	}
	if g.in == nil {
		return nil
	}
	in := *g.in
	write := c.dirCounts(&in, g.entries, g.subdirs)
	if in.NextCookie <= g.maxCookie || in.NextCookie < mdt.FirstCookie {
		write = c.bad(CookieRange, g.fid, "raised", "its next cookie is %d, %d is in use", in.NextCookie, g.maxCookie) || write
	}
	if !c.o.Repair {
		return nil
	}
	if write || g.rmEntries > 0 || g.recookied > 0 {
		in.Entries, in.Attr.Nlink = entries, uint32(2+dirs)
		in.Attr.Size, in.Attr.Used = dirSize(entries), dirSize(entries)
		in.NextCookie = max(g.nextCookie, g.maxCookie+1, mdt.FirstCookie)
		c.fix.do().PutInode(&in)
	}
	return nil
}

// dirCounts checks what a directory's inode says of its entries.
func (c *checker) dirCounts(in *mdt.Inode, entries, dirs uint64) (repair bool) {
	a := &in.Attr
	if in.Entries != entries || a.Size != dirSize(entries) {
		repair = c.bad(DirEntries, a.FID, "corrected", "it says %d entries and %d bytes, it has %d and should have %d bytes", in.Entries, a.Size, entries, dirSize(entries))
	}
	if uint64(a.Nlink) != 2+dirs {
		repair = c.bad(LinkCount, a.FID, "corrected", "link count %d, with %d subdirectories it should be %d", a.Nlink, dirs, 2+dirs) || repair
	}
	return repair
}

// checkTree looks for directories that the root does not lead to.
func (c *checker) checkTree() error {
	if err := c.fix.apply(); err != nil {
		return err
	}
	for _, d := range c.drops {
		if err := c.dropEntry(d); err != nil {
			return err
		}
	}
	c.drops = nil
	root, _ := c.nodes.findFID(wire.RootFID)
	if root != nil {
		root.n = 0
		root.flags |= fReached
	}
	for i := range c.nodes.len() {
		n := c.nodes.at(i)
		if n.typ != wire.TypeDir || n.has(fReached|fLost) {
			continue
		}
		if err := c.step(); err != nil {
			return err
		}
		if err := c.reach(n); err != nil {
			return err
		}
	}
	return nil
}

// reach follows the parents of n and marks all of them.
func (c *checker) reach(n *node) error {
	up := n
	for !up.has(fReached|fLost|fPath) && up.n != 0 {
		up.flags |= fPath
		up = c.nodes.at(int(up.n - 1))
	}
	mark := uint16(fLost)
	switch {
	case up.has(fReached):
		mark = fReached
	case up.has(fPath):
		// A cycle: cut where the lowest FID is entered.
		low := up
		for p := c.nodes.at(int(up.n - 1)); p != up; p = c.nodes.at(int(p.n - 1)) {
			if p.id < low.id {
				low = p
			}
		}
		if c.bad(DirCycle, low.fid(), "moved to /lost+found", "it is below itself") {
			if err := c.dropEntry(drop{c.nodes.at(int(low.n - 1)).fid(), low.fid()}); err != nil {
				return err
			}
			c.attach = append(c.attach, low.fid())
		}
	case !up.has(fLost):
		up.flags |= fLost
		if up.has(fDamaged) {
			break // what it was is not known; its repair comes first
		}
		if c.bad(Orphan, up.fid(), "moved to /lost+found", "no entry leads to this directory") {
			c.attach = append(c.attach, up.fid())
		}
	}
	for p := n; ; p = c.nodes.at(int(p.n - 1)) {
		p.flags = p.flags&^fPath | mark
		if p.n == 0 {
			return nil
		}
		if next := c.nodes.at(int(p.n - 1)); !next.has(fPath) {
			return nil
		}
	}
}

// errStop ends a scan early.
var errStop = errors.New("stop")

// dropEntry removes the entry of a subdirectory.
func (c *checker) dropEntry(d drop) error {
	if err := c.fix.apply(); err != nil {
		return err
	}
	err := c.scanPrefix(func(k, v []byte) error {
		ent, err := mdt.DecodeEntry(v)
		if err != nil || ent.FID != d.child {
			return nil
		}
		r := c.fix.do()
		r.DeleteName(d.dir, k[17:])
		r.DeleteCookie(d.dir, ent.Cookie)
		return errStop
	}, d.dir.Append([]byte{keyName})...)
	if err == nil || !errors.Is(err, errStop) {
		return err
	}
	return c.editDir(d.dir, func(in *mdt.Inode) {
		in.Entries -= min(in.Entries, 1)
		in.Attr.Nlink = max(in.Attr.Nlink, 3) - 1
		in.Attr.Size, in.Attr.Used = dirSize(in.Entries), dirSize(in.Entries)
	})
}

// editDir changes a directory's inode if it has one.
func (c *checker) editDir(f wire.FID, fn func(*mdt.Inode)) error {
	if err := c.fix.apply(); err != nil {
		return err
	}
	in, err := mdt.ReadInode(c.o.MDT, f)
	if err != nil {
		if isIO(err) {
			return err
		}
		return nil // a later round deals with it
	}
	fn(in)
	c.fix.do().PutInode(in)
	return nil
}

var lostFound = []byte("lost+found")

// attachOrphans enters inodes that no entry leads to into /lost+found.
func (c *checker) attachOrphans() error {
	if len(c.attach) == 0 {
		return nil
	}
	if err := c.fix.apply(); err != nil {
		return err
	}
	root, err := mdt.ReadInode(c.o.MDT, wire.RootFID)
	if err != nil {
		if isIO(err) {
			return err
		}
		return nil // after the root was repaired
	}
	var dir *mdt.Inode
	ent, found, ok, err := c.entryAt(wire.RootFID, lostFound)
	if err != nil {
		return err
	}
	if found {
		if ok && ent.Type == wire.TypeDir {
			if dir, err = mdt.ReadInode(c.o.MDT, ent.FID); err != nil && isIO(err) {
				return err
			}
		}
		if dir == nil || dir.Attr.Type != wire.TypeDir || dir.Attr.FID == wire.RootFID {
			c.o.Logger.Error("fsck: /lost+found is no directory; orphans stay orphans until it is moved away")
			c.keepOrphans()
			return nil
		}
	} else {
		if !c.superOK || c.super.NextSeq <= c.maxSeq || c.super.NextSeq > wire.MaxSeq {
			return nil // after the superblock was repaired
		}
		f := wire.FID{Seq: c.super.NextSeq, OID: 1}
		c.super.NextSeq++
		c.fix.do().PutSuper(&c.super)
		c.maxSeq = max(c.maxSeq, f.Seq)
		dir = c.newDir(f, wire.RootFID, 0o700)
		c.inodes++
		c.fix.do().PutName(wire.RootFID, lostFound, mdt.Entry{FID: f, Type: wire.TypeDir, Cookie: root.NextCookie})
		root.NextCookie++
		root.Entries++
		root.Attr.Nlink++
		root.Attr.Size, root.Attr.Used = dirSize(root.Entries), dirSize(root.Entries)
		c.fix.do().PutInode(root)
	}
	for _, f := range c.attach {
		if f == dir.Attr.FID {
			continue
		}
		in, err := mdt.ReadInode(c.o.MDT, f)
		if err != nil {
			if isIO(err) {
				return err
			}
			continue
		}
		if in.Attr.Type == wire.TypeDir {
			in.Attr.Parent = dir.Attr.FID
			dir.Attr.Nlink++
		} else {
			in.Attr.Nlink = 1
		}
		r := c.fix.do()
		r.PutInode(in)
		r.PutName(dir.Attr.FID, fmt.Appendf(nil, "#%x-%x", f.Seq, f.OID), mdt.Entry{FID: f, Type: in.Attr.Type, Cookie: dir.NextCookie})
		dir.NextCookie++
		dir.Entries++
		if err := c.step(); err != nil {
			return err
		}
	}
	dir.Attr.Size, dir.Attr.Used = dirSize(dir.Entries), dirSize(dir.Entries)
	c.fix.do().PutInode(dir)
	return nil
}

// keepOrphans takes back that orphans were moved.
func (c *checker) keepOrphans() {
	c.repaired[Orphan], c.repaired[DirCycle] = 0, 0
	for i := range c.found {
		if f := &c.found[i]; f.Class == Orphan || f.Class == DirCycle {
			f.Repaired = false
		}
	}
}
