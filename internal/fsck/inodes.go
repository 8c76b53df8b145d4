package fsck

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/wire"
)

// checkObjects goes over the objects of all targets.
func (c *checker) checkObjects() error {
	for _, s := range c.o.OSTs {
		var failed error
		err := s.Walk(func(i ost.ObjectInfo) {
			if failed == nil {
				if failed = c.step(); failed == nil {
					failed = c.object(s, &i)
				}
			}
		})
		if err == nil {
			err = failed
		}
		if err != nil {
			return fmt.Errorf("OST %d: %w", s.Index(), err)
		}
	}
	return nil
}

func (c *checker) object(s ObjectStore, i *ost.ObjectInfo) error {
	name := fmt.Sprintf("OST %d object %v stripe %d", s.Index(), i.FID, i.Stripe)
	if i.FID.IsZero() {
		name = fmt.Sprintf("OST %d %s", s.Index(), i.Name)
		if c.bad(ObjectName, name, "moved to the OST's lost+found", "%v", i.Err) {
			return c.setAside(s, i)
		}
		return nil
	}
	c.counts.Objects++
	c.counts.Bytes += i.Size
	c.seq(i.FID)
	// A punch with a lower id than the object remembers would be left out.
	c.transno(i.LogID)
	n, _ := c.nodes.findFID(i.FID)
	switch {
	case c.unlinked(i.FID) || n != nil && n.has(fDamaged):
		return nil
	case n == nil || n.typ != wire.TypeReg || n.has(fNoInode):
		return c.orphanObject(s, i, ObjectOrphan, name, "it belongs to no file")
	}
	in, err := mdt.ReadInode(c.o.MDT, i.FID)
	if err != nil {
		return err
	}
	l := &in.Attr.Layout
	switch {
	case !validLayout(l):
		n.flags |= fLayoutBad | fObject
		if i.Stripe == 0 {
			n.end = max(n.end, i.Size)
		}
		return nil
	case i.Stripe >= l.Count:
		return c.orphanObject(s, i, ObjectMisplaced, name, fmt.Sprintf("the file has %d stripes", l.Count))
	case l.OST[i.Stripe] != s.Index() && !c.osts[l.OST[i.Stripe]]:
		return nil // LayoutOST, which is left alone
	case l.OST[i.Stripe] != s.Index():
		return c.orphanObject(s, i, ObjectMisplaced, name, fmt.Sprintf("the file has this stripe on OST %d", l.OST[i.Stripe]))
	case i.Unfinished:
		c.note(ObjectUnfinished, name, "power was lost while it was made or destroyed%s; it reads as missing", unfinished(i))
		return nil
	case i.Err != nil:
		n.flags |= fObjBad
		if c.bad(ObjectDamaged, name, "moved to the OST's lost+found", "%v", i.Err) {
			return c.setAside(s, i)
		}
		return nil
	}
	n.flags |= fObject
	n.end = max(n.end, l.FileEnd(i.Stripe, i.Size))
	return nil
}

func (c *checker) orphanObject(s ObjectStore, i *ost.ObjectInfo, class Class, name, what string) error {
	keep := !i.Unfinished && (i.Size > 0 || i.Err != nil)
	repair := "removed"
	if keep {
		repair = "moved to the OST's lost+found"
	}
	if !c.bad(class, name, repair, "%s; it has %d bytes%s", what, i.Size, unfinished(i)) {
		return nil
	}
	if keep {
		return c.setAside(s, i)
	}
	c.fix.any = true
	return s.Remove(i.FID, i.Stripe)
}

func (c *checker) setAside(s ObjectStore, i *ost.ObjectInfo) error {
	c.fix.any = true
	to, err := s.SetAside(*i)
	if err == nil {
		c.o.Logger.Info("fsck: moved", "ost", s.Index(), "fid", i.FID, "stripe", i.Stripe, "name", i.Name, "to", to)
	}
	return err
}

func validLayout(l *wire.Layout) bool {
	return l.Count >= 1 && l.Count <= wire.MaxStripes && l.StripeSize > 0 && l.StripeSize%(64<<10) == 0
}

// checkInodes goes over the inodes once more, together with open epochs and
// symlink targets, which are in the same order.
func (c *checker) checkInodes() error {
	// The inodes as they are after the repairs so far.
	if err := c.fix.apply(); err != nil {
		return err
	}
	ic, err := prefixCursor(c.o.MDT, keyInode)
	if err != nil {
		return err
	}
	defer ic.close()
	ec, err := prefixCursor(c.o.MDT, keyEpoch)
	if err != nil {
		return err
	}
	defer ec.close()
	lc, err := prefixCursor(c.o.MDT, keyLink)
	if err != nil {
		return err
	}
	defer lc.close()
	for ; ic.ok; ic.next() {
		f, ok := ic.fid()
		if !ok || len(ic.k) != 17 {
			continue
		}
		c.strayEpochs(ec, f.FileID())
		c.strayLinks(lc, f.FileID())
		n, _ := c.nodes.find(f.FileID())
		if n == nil || n.has(fDamaged|fNoInode) {
			continue
		}
		if err := c.step(); err != nil {
			return err
		}
		in, err := mdt.DecodeInode(f, ic.v)
		if err != nil {
			return err
		}
		if c.inode(n, in, ec, lc) {
			c.fix.do().PutInode(in)
		}
	}
	c.strayEpochs(ec, ^uint64(0))
	c.strayLinks(lc, ^uint64(0))
	for _, cur := range []*cursor{ic, ec, lc} {
		if err := cur.err(); err != nil {
			return err
		}
	}
	return nil
}

// stray tells whether a record at f has no inode to belong to, or one of
// another type; a damaged one is not judged.
func (c *checker) stray(f wire.FID, want wire.FileType) bool {
	n, _ := c.nodes.findFID(f)
	return n == nil || !n.has(fDamaged) && (n.typ != want || n.has(fNoInode))
}

// strayEpochs deals with the epochs in front of the inode id.
func (c *checker) strayEpochs(ec *cursor, id uint64) {
	for ; ec.ok; ec.next() {
		f, ok := ec.fid()
		if !ok || len(ec.k) != 33 {
			c.unknownKey(ec.k)
			continue
		}
		if f.FileID() >= id {
			return
		}
		c.counts.Epochs++
		if c.stray(f, wire.TypeReg) && c.bad(EpochStray, f, "removed", "an IO epoch of something that is no regular file") {
			c.fix.do().DeleteRaw(ec.k)
		}
	}
}

// strayLinks deals with the symlink targets in front of the inode id.
func (c *checker) strayLinks(lc *cursor, id uint64) {
	for ; lc.ok; lc.next() {
		f, ok := lc.fid()
		if !ok || len(lc.k) != 17 {
			c.unknownKey(lc.k)
			continue
		}
		if f.FileID() >= id {
			return
		}
		if c.stray(f, wire.TypeLnk) && c.bad(SymlinkStray, f, "removed", "a target of something that is no symlink") {
			c.fix.do().DeleteRaw(lc.k)
		}
	}
}

// inode checks one inode, corrects it if repairs are asked for, and tells
// whether it has to be stored.
func (c *checker) inode(n *node, in *mdt.Inode, ec, lc *cursor) (write bool) {
	a := &in.Attr
	// A version that is a little too high tells that the state is behind, which
	// is reported as such.
	if a.Version >= saneTransno && c.bad(InodeVersion, a.FID, "set", "version %d is impossible", a.Version) {
		a.Version = c.version()
		write = true
	}
	switch a.Type {
	case wire.TypeDir:
		if !n.has(fGroup) && c.dirCounts(in, 0, 0) {
			in.Entries, a.Nlink, a.Size, a.Used = 0, 2, dirSize(0), dirSize(0)
			write = true
		}
		parent := a.FID
		if a.FID != wire.RootFID {
			if n.n == 0 {
				return write
			}
			parent = c.nodes.at(int(n.n - 1)).fid()
		}
		if a.Parent != parent && !n.has(fLost) && c.bad(DirParent, a.FID, "corrected", "its parent field says %v, its entry is in %v", a.Parent, parent) {
			a.Parent = parent
			write = true
		}
		return write
	case wire.TypeReg:
		write = c.file(n, in, ec) || write
	case wire.TypeLnk:
		write = c.symlink(in, lc) || write
	}
	switch {
	case n.n == 0:
		if c.bad(Orphan, a.FID, "moved to /lost+found", "no entry leads to it") {
			c.attach = append(c.attach, a.FID)
		}
	case a.Nlink != n.n:
		if c.bad(LinkCount, a.FID, "corrected", "link count %d, it has %d entries", a.Nlink, n.n) {
			a.Nlink = n.n
			write = true
		}
	}
	return write
}

func (c *checker) symlink(in *mdt.Inode, lc *cursor) (write bool) {
	a := &in.Attr
	length := -1
	for ; lc.ok; lc.next() {
		f, ok := lc.fid()
		if !ok || len(lc.k) != 17 {
			c.unknownKey(lc.k)
			continue
		}
		if f == a.FID {
			length = len(lc.v)
			lc.next()
		}
		break
	}
	if length <= 0 || length > wire.MaxSymlinkLen {
		what := "it has no target"
		if length > 0 {
			what = fmt.Sprintf("its target has %d bytes", length)
		}
		if !c.bad(SymlinkMissing, a.FID, "gets the target "+LostTarget, "%s", what) {
			return false
		}
		c.linkFix = append(c.linkFix, a.FID)
		a.Size = uint64(len(LostTarget))
		return true
	}
	if a.Size != uint64(length) && c.bad(SymlinkSize, a.FID, "corrected", "size %d, the target has %d bytes", a.Size, length) {
		a.Size = uint64(length)
		return true
	}
	return false
}

// file checks layout, epochs and size of a regular file.
func (c *checker) file(n *node, in *mdt.Inode, ec *cursor) (write bool) {
	a := &in.Attr
	opens, opener := 0, wire.ClientID{}
	badEpochs := false
	for ; ec.ok; ec.next() {
		f, ok := ec.fid()
		if !ok || len(ec.k) != 33 {
			c.unknownKey(ec.k)
			continue
		}
		if f != a.FID {
			break
		}
		c.counts.Epochs++
		if _, err := mdt.DecodeEpoch(ec.v); err != nil {
			badEpochs = true
			if c.bad(EpochDamaged, a.FID, "removed", "client %x: %v", ec.k[17:], err) {
				c.fix.do().DeleteRaw(ec.k)
			}
			continue
		}
		opens++
		opener = wire.ClientID(ec.k[17:33])
	}
	if !badEpochs && (int(in.Opens) != min(opens, 0xffff) || opens == 1 && in.Opener != opener) {
		if c.bad(EpochCount, a.FID, "corrected", "it says %d open IO epochs, there are %d", in.Opens, opens) {
			in.Opens, in.Opener = uint16(min(opens, 0xffff)), wire.ClientID{}
			if opens == 1 {
				in.Opener = opener
			}
			if opens > 0 {
				in.HadData = true
			}
			// The size is judged when the epochs are right.
			return true
		}
		return false
	}
	if opens > 0 {
		c.note(EpochOpen, a.FID, "an IO epoch is open")
	}
	if !validLayout(&a.Layout) {
		if len(c.o.OSTs) > 0 && c.bad(LayoutInvalid, a.FID, "becomes one stripe on the first OST", "%d stripes of %d bytes", a.Layout.Count, a.Layout.StripeSize) {
			a.Layout = wire.Layout{StripeSize: 1 << 20, Count: 1}
			a.Layout.OST[0] = c.o.OSTs[0].Index()
			write = true
		}
		return write
	}
	if !c.layoutOSTs(a.FID, &a.Layout) {
		return false
	}
	if n.has(fObject|fObjBad) && !in.HadData && c.bad(ObjectUnrecorded, a.FID, "corrected", "it has objects and says that it never had data") {
		in.HadData = true
		write = true
	}
	if opens > 0 || in.Opens > 0 || n.has(fTrunc|fObjBad|fLayoutBad) || badEpochs || a.Size == n.end {
		return write
	}
	class, what := SizeWrong, fmt.Sprintf("size %d, its objects end at %d", a.Size, n.end)
	if !n.has(fObject) {
		class, what = ObjectMissing, fmt.Sprintf("size %d, it has no objects", a.Size)
	}
	if c.bad(class, a.FID, fmt.Sprintf("size becomes %d", n.end), "%s", what) {
		a.Size = n.end
		a.Used = min(a.Used, (n.end+4095)&^4095)
		write = true
	}
	return write
}

// fixLinks gives symlinks that have lost their target another one.
func (c *checker) fixLinks() error {
	if err := c.fix.apply(); err != nil {
		return err
	}
	for _, f := range c.linkFix {
		if err := c.fix.set(linkKey(f), []byte(LostTarget)); err != nil {
			return err
		}
	}
	return nil
}

// unfinished describes what a power failure left of an object.
func unfinished(i *ost.ObjectInfo) string {
	switch {
	case !i.Unfinished:
		return ""
	case i.Name != "":
		return "; there are further segments only, " + i.Name
	}
	return "; its first segment was never written"
}
