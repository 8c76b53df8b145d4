package fsck

import (
	"errors"
	"fmt"
	"sort"

	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// saneTransno bounds transnos that are taken for real: their upper half counts starts.
const saneTransno = 1 << 62

func (c *checker) readSuper() error {
	cur, err := newCursor(c.o.MDT, nil, nil)
	if err != nil {
		return err
	}
	empty := !cur.ok && cur.err() == nil
	cur.close()
	if empty {
		return ErrNoStore
	}
	// What is wrong with them is reported at the end, when it is known what
	// they should be.
	if c.super, err = mdt.ReadSuper(c.o.MDT); err == nil {
		c.superOK = true
	} else if isIO(err) {
		return err
	}
	if c.state, err = mdt.ReadState(c.o.MDT); err == nil {
		c.stateOK = true
	} else if isIO(err) {
		return err
	}
	return nil
}

// isIO tells an engine's error from a damaged or missing record, which is
// known by not being wrapped around anything of the engine.
func isIO(err error) bool {
	return errors.Is(err, store.ErrFailed)
}

func (c *checker) transno(n uint64) {
	if n < saneTransno {
		c.maxTransno = max(c.maxTransno, n)
	}
}

func (c *checker) seq(f wire.FID) {
	if _, ok := idOf(f); ok {
		c.maxSeq = max(c.maxSeq, f.Seq)
	}
}

// readInodes fills the table: with the inodes, and with directories that have
// entries but no inode.
func (c *checker) readInodes() error {
	if c.stateOK {
		c.total = c.state.Inodes
	}
	ic, err := prefixCursor(c.o.MDT, keyInode)
	if err != nil {
		return err
	}
	defer ic.close()
	var dirs [2]*cursor
	for i, p := range []byte{keyName, keyCookie} {
		if dirs[i], err = prefixCursor(c.o.MDT, p); err != nil {
			return err
		}
		defer dirs[i].close()
	}
	const none = ^uint64(0)
	head := func(cur *cursor) uint64 {
		for ; cur.ok; cur.next() {
			if f, ok := cur.fid(); ok {
				return f.FileID()
			}
		}
		return none
	}
	for {
		var in *mdt.Inode
		f, at := wire.FID{}, none
		for ; ic.ok; ic.next() {
			var ok bool
			if f, ok = ic.fid(); ok && len(ic.k) == 17 {
				at = f.FileID()
				break
			}
			c.unknownKey(ic.k)
		}
		n0, n1 := head(dirs[0]), head(dirs[1])
		dir := min(n0, n1)
		if at == none && dir == none {
			break
		}
		if err := c.step(); err != nil {
			return err
		}
		n := node{id: min(at, dir)}
		if dir == n.id {
			n.flags |= fGroup
			// One seek leads over all entries of the directory.
			past := store.PrefixEnd(fidOf(dir).Append(nil))
			if n0 == dir {
				dirs[0].seek(append([]byte{keyName}, past...))
			}
			if n1 == dir {
				dirs[1].seek(append([]byte{keyCookie}, past...))
			}
		}
		if at != n.id {
			n.typ = wire.TypeDir
			n.flags |= fNoInode
		} else {
			c.inodes++
			c.counts.Inodes++
			if in, err = mdt.DecodeInode(f, ic.v); err != nil {
				n.flags |= fDamaged
				if n.has(fGroup) {
					n.typ = wire.TypeDir
				}
				if c.bad(InodeDamaged, f, "removed", "%v", err) {
					c.fix.do().DeleteRaw(ic.k)
					c.inodes--
				}
			} else {
				n.typ = in.Attr.Type
				c.transno(in.Attr.Version)
				c.maxTime = max(c.maxTime, in.Attr.Ctime)
				switch n.typ {
				case wire.TypeDir:
					c.counts.Directories++
				case wire.TypeReg:
					c.counts.Files++
				case wire.TypeLnk:
					c.counts.Symlinks++
				}
			}
			ic.next()
		}
		c.seq(fidOf(n.id))
		c.nodes.add(n)
	}
	if n, _ := c.nodes.findFID(wire.RootFID); n == nil {
		if c.bad(RootMissing, wire.RootFID, "made anew", "the root directory does not exist") {
			c.fix.do().PutInode(c.newDir(wire.RootFID, wire.RootFID, 0o755))
			c.inodes++
		}
	}
	for _, cur := range []*cursor{ic, dirs[0], dirs[1]} {
		if err := cur.err(); err != nil {
			return err
		}
	}
	return nil
}

// dirSize is the size that the MDT gives a directory with so many entries.
func dirSize(entries uint64) uint64 { return 4096 * (1 + entries/64) }

// newDir makes an empty directory of root's.
func (c *checker) newDir(f, parent wire.FID, mode uint32) *mdt.Inode {
	now := max(c.state.Time, c.maxTime)
	return &mdt.Inode{
		Attr: wire.Attr{
			FID: f, Type: wire.TypeDir, Mode: mode, Nlink: 2, Size: dirSize(0), Used: dirSize(0),
			Atime: now, Mtime: now, Ctime: now, Generation: f.OID ^ uint32(f.Seq)*2654435761,
			Version: c.version(), Parent: parent,
		},
		NextCookie: mdt.FirstCookie,
	}
}

// version is the transno that repairs give to what they make.
func (c *checker) version() uint64 {
	if c.stateOK && c.state.Transno < saneTransno {
		return c.state.Transno
	}
	return c.maxTransno
}

func (c *checker) unknownKey(k []byte) {
	if c.bad(KeyUnknown, fmt.Sprintf("%x", k), "removed", "the key belongs to no record") {
		c.fix.do().DeleteRaw(k)
	}
}

// checkLogs reads the unlink and truncate log.
func (c *checker) checkLogs() error {
	err := c.scanPrefix(func(k, v []byte) error {
		if len(k) != 9 {
			c.unknownKey(k)
			return nil
		}
		c.counts.Logs++
		id := be.Uint64(k[1:])
		name := fmt.Sprintf("log record %d", id)
		l, err := mdt.DecodeLogRec(id, v)
		if err == nil && id >= saneTransno {
			err = fmt.Errorf("transno %d: %w", id, errFormat)
		}
		var fid uint64
		if err == nil {
			var ok bool
			if fid, ok = idOf(l.FID); !ok {
				err = fmt.Errorf("FID %v: %w", l.FID, errFormat)
			}
		}
		if err != nil {
			if c.bad(LogDamaged, name, "removed", "%v", err) {
				c.fix.do().DeleteRaw(k)
			}
			return nil
		}
		c.transno(id)
		c.seq(l.FID)
		n, _ := c.nodes.find(fid)
		if n != nil && n.has(fDamaged) {
			return nil // judged when that is repaired
		}
		if l.Kind == mdt.LogUnlink {
			if n != nil {
				if c.bad(LogUnlinkLive, name, "removed", "it asks to destroy the objects of %v, which exists", l.FID) {
					c.fix.do().DeleteLog(id)
				}
				return nil
			}
			c.unlinks = append(c.unlinks, fid)
			if c.layoutOSTs(name, &l.Layout) {
				c.note(UnlinkPending, name, "objects of %v are still to be destroyed", l.FID)
			}
			return nil
		}
		if n == nil || n.typ != wire.TypeReg || n.has(fNoInode) {
			if c.bad(LogTruncateStray, name, "removed", "it asks to truncate %v, which is no regular file", l.FID) {
				c.fix.do().DeleteLog(id)
			}
			return nil
		}
		n.flags |= fTrunc
		in, err := mdt.ReadInode(c.o.MDT, l.FID)
		if err != nil {
			return err
		}
		if in.Attr.Layout != l.Layout {
			if c.bad(LogLayout, name, "takes the file's layout", "its layout is not that of %v", l.FID) {
				l.Layout = in.Attr.Layout
				c.fix.do().PutLog(&l)
			}
			return nil
		}
		c.note(TruncatePending, name, "%v is still to be cut to %d bytes", l.FID, l.Size)
		return nil
	}, keyLog)
	sort.Slice(c.unlinks, func(i, j int) bool { return c.unlinks[i] < c.unlinks[j] })
	return err
}

// unlinked tells whether there is an unlink record of the file.
func (c *checker) unlinked(f wire.FID) bool {
	id, ok := idOf(f)
	i := sort.Search(len(c.unlinks), func(i int) bool { return c.unlinks[i] >= id })
	return ok && i < len(c.unlinks) && c.unlinks[i] == id
}

// layoutOSTs tells whether all OSTs of a layout are there.
func (c *checker) layoutOSTs(object any, l *wire.Layout) bool {
	for _, i := range l.OST[:l.Count] {
		if !c.osts[i] {
			c.bad(LayoutOST, object, "", "it has data on OST %d, which was not given to the check; give it (nothing is repaired here, the data may be intact)", i)
			return false
		}
	}
	return true
}

// checkTables reads reply records, the client table with fences and reply slots,
// VIP epochs, and what is between the known keys.
func (c *checker) checkTables() error {
	err := c.scanPrefix(func(k, v []byte) error {
		_, _, _, err := target.ParseReplyKey(k)
		if err != nil {
			c.unknownKey(k)
			return nil
		}
		c.counts.Replies++
		rec, err := target.DecodeRecord(v)
		name := fmt.Sprintf("reply record %x", k[1:])
		if err != nil {
			if c.bad(ReplyDamaged, name, "removed", "%v", err) {
				c.fix.do().DeleteRaw(k)
			}
			return nil
		}
		if c.stateOK && rec.Transno > max(c.state.Transno, c.maxTransno) {
			if c.bad(ReplyTransno, name, "removed", "its transno %d is above the last one, %d", rec.Transno, c.state.Transno) {
				c.fix.do().DeleteRaw(k)
			}
			return nil
		}
		c.transno(rec.Transno)
		return nil
	}, keyReply)
	if err != nil {
		return err
	}
	err = c.scanPrefix(func(k, v []byte) error {
		class, repair := Class(""), "removed"
		var err error
		switch {
		case len(k) == 2 && (k[1] == 's' || k[1] == 't'):
			return nil
		case len(k) == 2 && k[1] == 'r':
			class = TargetDamaged
			var r recov.TargetRecord
			err = r.Decode(v)
		case len(k) == 18 && k[1] == 'c':
			class, repair = ClientDamaged, ""
			var e mdt.ClientEntry
			if e, err = mdt.DecodeClient(wire.ClientID(k[2:]), v); err == nil {
				c.maxSeq = max(c.maxSeq, e.Tenure>>32)
			}
		case len(k) == 18 && k[1] == 'f':
			class, repair = FenceDamaged, ""
			var f mdt.FenceRec
			if f, err = mdt.DecodeFence(v); err == nil {
				c.maxSeq = max(c.maxSeq, (f.Tenure-1)>>32)
			}
		case len(k) == 6 && k[1] == 'v':
			class = VIPDamaged
			_, err = u64Record(v)
		default:
			c.unknownKey(k)
			return nil
		}
		if err != nil && c.bad(class, fmt.Sprintf("%x", k[2:]), repair, "%v", err) {
			c.fix.do().DeleteRaw(k)
		}
		return nil
	}, keyMeta)
	if err != nil {
		return err
	}
	err = c.scanPrefix(func(k, v []byte) error {
		if len(k) != 19 {
			c.unknownKey(k)
			return nil
		}
		var r recov.SlotRecord
		err := r.Decode(v)
		if err == nil && (r.Client != wire.ClientID(k[1:17]) || r.Slot != be.Uint16(k[17:]) || r.Transno >= saneTransno) {
			err = errFormat
		}
		if err != nil {
			if c.bad(SlotDamaged, fmt.Sprintf("%x", k[1:]), "removed", "%v", err) {
				c.fix.do().DeleteRaw(k)
			}
			return nil
		}
		c.transno(r.Transno)
		return nil
	}, keySlot)
	if err != nil {
		return err
	}
	var lower []byte
	for i := 0; i <= len(prefixes); i++ {
		var upper []byte
		if i < len(prefixes) {
			upper = prefixes[i : i+1]
		}
		if lower == nil || upper == nil || string(lower) < string(upper) {
			if err := c.scan(lower, upper, func(k, _ []byte) error { c.unknownKey(k); return nil }); err != nil {
				return err
			}
		}
		if upper != nil {
			lower = []byte{upper[0] + 1}
		}
	}
	return nil
}

// checkState compares the superblock with what was seen.
func (c *checker) checkState() error {
	switch {
	case !c.superOK:
		if c.bad(SuperblockDamaged, "superblock", "rebuilt", "it is missing or does not decode") {
			c.super = mdt.Super{NextSeq: c.nextSeq()}
			c.fix.do().PutSuper(&c.super)
		}
	case c.super.NextSeq <= c.maxSeq || c.super.NextSeq > wire.MaxSeq || c.super.NextSeq < wire.FirstSeq:
		// A sequence that is used again gives two files one identity.
		if c.bad(SuperblockSequence, "superblock", "set", "the next FID sequence is %d, %d is in use", c.super.NextSeq, c.maxSeq) {
			c.super.NextSeq = c.nextSeq()
			c.fix.do().PutSuper(&c.super)
		}
	}
	s := c.state
	write := false
	if !c.stateOK {
		s = mdt.State{Transno: c.maxTransno, Time: c.maxTime}
		write = c.bad(StateDamaged, "superblock state", "rebuilt", "it is missing or does not decode")
	} else {
		if s.Transno < c.maxTransno || s.Transno >= saneTransno {
			write = c.bad(StateTransno, "superblock state", "set", "the last transno is %d, the highest in use %d", s.Transno, c.maxTransno)
			s.Transno = c.maxTransno
		}
		if s.Inodes != c.counts.Inodes {
			write = c.bad(StateInodes, "superblock state", "set", "it counts %d inodes, there are %d", s.Inodes, c.counts.Inodes)
		}
	}
	s.Inodes = uint64(max(0, c.inodes))
	if c.o.Repair && (write || s.Inodes != c.counts.Inodes) {
		c.fix.do().PutState(&s)
	}
	return nil
}

func (c *checker) nextSeq() uint64 { return max(c.maxSeq+1, wire.FirstSeq) }
