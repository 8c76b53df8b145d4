package fsck

import (
	"fmt"

	"github.com/baton-nfs/baton/recovery/locks"
	"github.com/baton-nfs/baton/recovery/wire"
)

// checkLocks reads the records of the lock table.
func (c *checker) checkLocks() error {
	return c.scanPrefix(func(k, v []byte) error {
		rec, err := locks.DecodeRecord(k, v)
		if err != nil {
			// Whose lock it was is not known. If it were removed here, the next
			// start would find nothing missing and give the range to somebody
			// else, while its holder believes in the lock.
			c.bad(LockDamaged, fmt.Sprintf("lock record %x", k[1:min(len(k), 32)]), "",
				"%v (nothing is repaired here: the next start removes it and lets clients reclaim their locks before others get any)", err)
			return nil
		}
		c.counts.Locks++
		e, ok := rec.(*locks.EntryRecord)
		if !ok {
			return nil
		}
		h := &e.Holder
		id, sane := idOf(h.FID)
		n, _ := c.nodes.find(id)
		switch {
		case sane && n != nil && n.has(fDamaged):
			return nil // judged when that is repaired
		case !sane || n == nil || n.has(fNoInode) || n.typ != wire.TypeReg:
			if c.bad(LockStray, fmt.Sprintf("lock %d", h.ID), "removed", "it is of %v, which is no regular file; held by %v", h.FID, h.Owner.LockHost) {
				c.fix.do().DeleteRaw(k)
			}
		}
		return nil
	}, keyLock)
}
