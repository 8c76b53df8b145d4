package fsck

import (
	"sort"

	"github.com/baton-nfs/baton/recovery/wire"
)

// node is what the check remembers of an inode: 24 bytes.
type node struct {
	id uint64 // wire.FID.FileID
	// end is the furthest byte that the objects of a file prove.
	end uint64
	// n is the number of entries; of a directory: 1 + the index of its parent's
	// node, 0 when no entry was found.
	n     uint32
	flags uint16
	typ   wire.FileType // 0: damaged, and unknown
}

// Flags of nodes.
const (
	fDamaged   = 1 << iota // the record does not decode
	fNoInode               // a directory that has entries only
	fGroup                 // entries were seen below it
	fObject                // has an object
	fObjBad                // has an object whose state is not known
	fTrunc                 // has a truncate record
	fLayoutBad             // objects cannot be judged by the layout
	fPath                  // on the way to the root, see reach
	fReached
	fLost
)

func (n *node) has(f uint16) bool { return n.flags&f != 0 }

func (n *node) fid() wire.FID { return fidOf(n.id) }

func fidOf(id uint64) wire.FID { return wire.FID{Seq: id >> 32, OID: uint32(id)} }

// idOf gives the identity of a FID that an MDT can have given out.
func idOf(f wire.FID) (uint64, bool) {
	return f.FileID(), f.Ver == 0 && f.Seq >= 1 && f.Seq <= wire.MaxSeq && f.OID != 0
}

const chunkNodes = 1 << 15

// table holds nodes in the order of their ids, in chunks, so that growing
// copies nothing.
type table struct {
	chunks [][]node
	last   int // chunk of the last hit
}

// add appends; ids rise.
func (t *table) add(n node) *node {
	if k := len(t.chunks); k == 0 || len(t.chunks[k-1]) == chunkNodes {
		t.chunks = append(t.chunks, make([]node, 0, chunkNodes))
	}
	c := &t.chunks[len(t.chunks)-1]
	*c = append(*c, n)
	return &(*c)[len(*c)-1]
}

func (t *table) len() int {
	if len(t.chunks) == 0 {
		return 0
	}
	return (len(t.chunks)-1)*chunkNodes + len(t.chunks[len(t.chunks)-1])
}

func (t *table) at(i int) *node { return &t.chunks[i/chunkNodes][i%chunkNodes] }

// find gives a node and its index; nil when there is none.
func (t *table) find(id uint64) (*node, int) {
	in := func(k int) bool {
		c := t.chunks[k]
		return c[0].id <= id && id <= c[len(c)-1].id
	}
	if t.last >= len(t.chunks) || !in(t.last) {
		k := sort.Search(len(t.chunks), func(i int) bool { return t.chunks[i][0].id > id }) - 1
		if k < 0 || !in(k) {
			return nil, 0
		}
		t.last = k
	}
	c := t.chunks[t.last]
	i := sort.Search(len(c), func(i int) bool { return c[i].id >= id })
	if i == len(c) || c[i].id != id {
		return nil, 0
	}
	return &c[i], t.last*chunkNodes + i
}

func (t *table) findFID(f wire.FID) (*node, int) {
	id, ok := idOf(f)
	if !ok {
		return nil, 0
	}
	return t.find(id)
}
