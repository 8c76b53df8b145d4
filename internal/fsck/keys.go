package fsck

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/baton-nfs/baton/recovery/locks"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/wire"
)

// Key prefixes of the MDT, docs/design.md section 4. The check reads raw keys,
// because it must be able to name and remove those that are damaged.
const (
	keyCookie = 'c'
	keyName   = 'd'
	keyEpoch  = 'e'
	keyInode  = 'i'
	keyLock   = locks.Prefix
	keyLog    = 'l'
	keyMeta   = 'm'
	keyReply  = target.ReplyPrefix
	keyLink   = 's'
	keySlot   = 'x'
)

var (
	be        = binary.BigEndian
	prefixes  = []byte{keyCookie, keyName, keyEpoch, keyInode, keyLock, keyLog, keyMeta, keyReply, keyLink, keySlot} // ascending
	errFormat = errors.New("malformed record")
)

func inodeKey(f wire.FID) []byte { return f.Append([]byte{keyInode}) }
func linkKey(f wire.FID) []byte  { return f.Append([]byte{keyLink}) }
func cookieKey(dir wire.FID, c uint64) []byte {
	return be.AppendUint64(dir.Append([]byte{keyCookie}), c)
}
func nameKey(dir wire.FID, name []byte) []byte {
	return append(dir.Append([]byte{keyName}), name...)
}

// u64Record decodes the value of VIP epochs.
func u64Record(v []byte) (uint64, error) {
	if len(v) != 9 || v[0] != 1 {
		return 0, errFormat
	}
	return be.Uint64(v[1:]), nil
}

// cursor walks over the keys of a range.
type cursor struct {
	it store.Iter
	ok bool
	k  []byte
	v  []byte
}

func newCursor(e store.Engine, lower, upper []byte) (*cursor, error) {
	it, err := e.NewIter(lower, upper)
	if err != nil {
		return nil, err
	}
	c := &cursor{it: it}
	c.set(it.First())
	return c, nil
}

func prefixCursor(e store.Engine, prefix ...byte) (*cursor, error) {
	return newCursor(e, prefix, store.PrefixEnd(prefix))
}

func (c *cursor) set(ok bool) {
	c.ok, c.k, c.v = ok, nil, nil
	if ok {
		c.k, c.v = c.it.Key(), c.it.Value()
	}
}

func (c *cursor) next()         { c.set(c.it.Next()) }
func (c *cursor) seek(k []byte) { c.set(c.it.SeekGE(k)) }
func (c *cursor) close()        { _ = c.it.Close() }
func (c *cursor) err() error    { return c.it.Error() }

// fid gives the FID behind the prefix of a key that is long enough for it.
func (c *cursor) fid() (wire.FID, bool) {
	if len(c.k) < 1+wire.FIDSize {
		return wire.FID{}, false
	}
	f := wire.GetFID(c.k[1:])
	_, ok := idOf(f)
	return f, ok
}

// scan calls fn for every key of a range.
func (c *checker) scan(lower, upper []byte, fn func(k, v []byte) error) error {
	cur, err := newCursor(c.o.MDT, lower, upper)
	if err != nil {
		return err
	}
	defer cur.close()
	for ; cur.ok; cur.next() {
		if err := c.step(); err != nil {
			return err
		}
		if err := fn(cur.k, cur.v); err != nil {
			return err
		}
	}
	return cur.err()
}

func (c *checker) scanPrefix(fn func(k, v []byte) error, prefix ...byte) error {
	return c.scan(prefix, store.PrefixEnd(prefix), fn)
}

// get reads a key; nil when there is none.
func (c *checker) get(k []byte) ([]byte, error) {
	v, err := c.o.MDT.Get(k, nil)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read key %x: %w", k, err)
	}
	if v == nil {
		v = []byte{}
	}
	return v, nil
}

// cookieAt reads a cookie's record; ok is false when it is absent or damaged.
func (c *checker) cookieAt(dir wire.FID, cookie uint64) (f wire.FID, t wire.FileType, name []byte, ok bool, err error) {
	v, err := c.get(cookieKey(dir, cookie))
	if v == nil || err != nil {
		return f, 0, nil, false, err
	}
	f, t, name, derr := mdt.DecodeCookieRec(v)
	return f, t, name, derr == nil, nil
}

// entryAt reads an entry; found is false when there is none, ok when it is
// absent or damaged.
func (c *checker) entryAt(dir wire.FID, name []byte) (ent mdt.Entry, found, ok bool, err error) {
	v, err := c.get(nameKey(dir, name))
	if v == nil || err != nil {
		return ent, false, false, err
	}
	ent, derr := mdt.DecodeEntry(v)
	return ent, true, derr == nil, nil
}

// changes gathers corrections; each run of apply makes them durable together.
type changes struct {
	e   store.Engine
	r   *mdt.Repair
	n   int
	any bool
}

func (x *changes) do() *mdt.Repair {
	if x.r == nil {
		x.r = mdt.NewRepair(x.e)
	}
	x.n++
	x.any = true
	return x.r
}

func (x *changes) apply() error {
	if x.r == nil {
		return nil
	}
	r := x.r
	x.r, x.n = nil, 0
	return r.Apply(x.e)
}

// set stores a record that mdt.Repair has no method for.
func (x *changes) set(k, v []byte) error {
	x.any = true
	b := x.e.NewBatch()
	b.Set(k, v)
	if err := x.e.Apply(b); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	if err := x.e.Sync(); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	return nil
}
