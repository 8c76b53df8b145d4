package powerfail

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"

	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/wire"
)

// cellSize is the unit of the data model, a sector, which a disk writes as a
// whole. All writes and sizes are multiples of it.
const cellSize = 512

// cell is what is known of a sector of a file: the number of the write whose
// data it has, 0 for a hole.
type cell struct {
	cur uint32 // as last acknowledged
	old []uint32
	// old: what it may be after a power failure instead, because nothing was
	// committed since
}

// object is a file system object in the model.
type object struct {
	typ    wire.FileType
	fid    wire.FID // zero while it is not known
	mode   uint32
	target string
	links  int
	kids   map[string]*object

	cells []cell // its size, as acknowledged
	// The size after a power failure is between lo and hi.
	lo, hi int
	// A write or a size change that is under way.
	wrFrom, wrTo int
	wrVer        uint32
	cut          int // -1: none
}

func newObject(typ wire.FileType, mode uint32) *object {
	o := &object{typ: typ, mode: mode, links: 1, cut: -1}
	if typ == wire.TypeDir {
		o.kids = map[string]*object{}
	}
	return o
}

func (o *object) names() []string {
	l := make([]string, 0, len(o.kids))
	for n := range o.kids {
		l = append(l, n)
	}
	sort.Strings(l)
	return l
}

// wrote is the acknowledgement of the write under way.
func (o *object) wrote(stable bool) {
	for len(o.cells) < o.wrTo {
		o.cells = append(o.cells, cell{})
	}
	for i := o.wrFrom; i < o.wrTo; i++ {
		c := &o.cells[i]
		if stable {
			c.old = nil
		} else {
			c.old = append(c.old, c.cur)
		}
		c.cur = o.wrVer
	}
	if stable {
		o.lo = max(o.lo, o.wrTo)
	}
	o.hi = max(o.hi, o.wrTo)
	o.wrFrom, o.wrTo = 0, 0
}

// committed: all that was acknowledged is durable.
func (o *object) committed() {
	for i := range o.cells {
		o.cells[i].old = nil
	}
	o.lo, o.hi = len(o.cells), len(o.cells)
}

// truncated is the acknowledgement of a size change, which is durable.
func (o *object) truncated(size int) {
	if size < len(o.cells) {
		o.cells = slices.Clone(o.cells[:size])
	}
	for len(o.cells) < size {
		o.cells = append(o.cells, cell{})
	}
	o.lo, o.hi, o.cut = size, size, -1
}

// fill makes the data of a write.
func fill(b []byte, ver uint32) {
	for i := 0; i < len(b); i += 4 {
		binary.LittleEndian.PutUint32(b[i:], ver)
	}
}

// version reads a sector; ok is false when it is none that was ever written.
func version(b []byte) (v uint32, ok bool) {
	v = binary.LittleEndian.Uint32(b)
	for i := 4; i < len(b); i += 4 {
		if binary.LittleEndian.Uint32(b[i:]) != v {
			return v, false
		}
	}
	return v, true
}

// data compares a file's content after a crash with the model, which becomes
// what was found. lost tells that acknowledged data are gone.
func (o *object) data(n *node, power bool) (lost bool, err error) {
	var a wire.Attr
	st, _ := n.fs.Attr(ctx, client.Owner{}, o.fid, &a, true)
	if st != wire.OK {
		return false, fmt.Errorf("attributes of %v: %w", o.fid, st)
	}
	if a.Size%cellSize != 0 {
		return false, fmt.Errorf("%v: size %d", o.fid, a.Size)
	}
	size := int(a.Size / cellSize)
	lo, hi := len(o.cells), len(o.cells)
	if power {
		lo, hi = min(o.lo, lo), max(o.hi, hi)
	}
	hi = max(hi, o.wrTo)
	if o.cut >= 0 {
		lo, hi = min(lo, o.cut), max(hi, o.cut)
	}
	if size < lo || size > hi {
		return false, fmt.Errorf("%v: %d sectors, possible are %d to %d (%d acknowledged)", o.fid, size, lo, hi, len(o.cells))
	}
	b := make([]byte, a.Size)
	got, eof, st, _ := n.fs.Read(ctx, client.Owner{}, &a, 0, b, true)
	if st != wire.OK || got != len(b) || !eof {
		return false, fmt.Errorf("%v: read %d of %d bytes, eof %v: %w", o.fid, got, len(b), eof, st)
	}
	cells := make([]cell, size)
	for i := range cells {
		var want cell
		if i < len(o.cells) {
			want = o.cells[i]
		}
		v, ok := version(b[i*cellSize : (i+1)*cellSize])
		possible := v == want.cur ||
			i >= o.wrFrom && i < o.wrTo && v == o.wrVer ||
			o.cut >= 0 && i >= o.cut && v == 0 ||
			power && slices.Contains(want.old, v) ||
			power && v == 0 && i >= o.lo
		if !ok || !possible {
			return false, fmt.Errorf("%v sector %d of %d: has write %d (whole: %v), acknowledged is %d, before that %v", o.fid, i, size, v, ok, want.cur, want.old)
		}
		if v != want.cur && v != o.wrVer && o.cut < 0 {
			lost = true
		}
		cells[i].cur = v
	}
	if size < len(o.cells) && o.cut < 0 {
		lost = true
	}
	o.cells = cells
	o.wrFrom, o.wrTo, o.cut = 0, 0, -1
	o.lo, o.hi = size, size
	return lost, nil
}

// names compares a directory of the node with the model, entries and
// attributes, and learns the identities of what it did not know yet.
func (o *object) compare(n *node, path string) error {
	have, err := n.readdir(o.fid)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for name := range have {
		if o.kids[name] == nil {
			return fmt.Errorf("%s/%s is there and should not be", path, name)
		}
	}
	for _, name := range o.names() {
		k := o.kids[name]
		f, ok := have[name]
		if !ok {
			return fmt.Errorf("%s/%s is gone", path, name)
		}
		if k.fid != f && !k.fid.IsZero() {
			return fmt.Errorf("%s/%s is %v, was %v", path, name, f, k.fid)
		}
		var a wire.Attr
		if st, _ := n.fs.Attr(ctx, client.Owner{}, f, &a, true); st != wire.OK {
			return fmt.Errorf("%s/%s: attributes: %w", path, name, st)
		}
		if a.Type != k.typ || a.Mode != k.mode || k.typ != wire.TypeDir && int(a.Nlink) != k.links {
			return fmt.Errorf("%s/%s: type %d mode %o links %d, want %d %o %d", path, name, a.Type, a.Mode, a.Nlink, k.typ, k.mode, k.links)
		}
		switch k.typ {
		case wire.TypeLnk:
			var rep wire.Reply
			n.fs.Call(ctx, client.Owner{}, &wire.Request{Header: wire.Header{Op: wire.OpReadlink}, FID: f}, &rep)
			if rep.Status != wire.OK || string(rep.Data) != k.target {
				return fmt.Errorf("%s/%s: %v target %q, want %q", path, name, rep.Status, rep.Data, k.target)
			}
		case wire.TypeDir:
			if k.fid.IsZero() {
				k.fid = f
			}
			if err := k.compare(n, path+"/"+name); err != nil {
				return err
			}
		}
	}
	return nil
}

// learn notes the identities of what a crash hid.
func (o *object) learn(n *node) error {
	have, err := n.readdir(o.fid)
	if err != nil {
		return err
	}
	for name, k := range o.kids {
		k.fid = have[name]
		if k.typ == wire.TypeDir {
			if err := k.learn(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// files visits each regular file once.
func (o *object) files(seen map[*object]bool, fn func(*object) error) error {
	for _, name := range o.names() {
		k := o.kids[name]
		if k.typ == wire.TypeDir {
			if err := k.files(seen, fn); err != nil {
				return err
			}
		}
		if k.typ == wire.TypeReg && !seen[k] {
			seen[k] = true
			if err := fn(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// readdir lists a directory in small portions.
func (n *node) readdir(dir wire.FID) (map[string]wire.FID, error) {
	have := map[string]wire.FID{}
	var cookie uint64
	for {
		var rep wire.Reply
		n.fs.Call(ctx, client.Owner{}, &wire.Request{Header: wire.Header{Op: wire.OpReaddir}, FID: dir, Cookie: cookie, Count: 4096, MaxEntries: 7}, &rep)
		if rep.Status != wire.OK {
			return nil, fmt.Errorf("readdir %v: %w", dir, rep.Status)
		}
		for _, e := range rep.Entries {
			cookie = e.Cookie
			if s := string(e.Name); s != "." && s != ".." {
				if _, twice := have[s]; twice {
					return nil, fmt.Errorf("readdir %v: %q twice", dir, s)
				}
				have[s] = e.FID
			}
		}
		if rep.EOF {
			return have, nil
		}
	}
}
