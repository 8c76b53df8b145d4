package mdt

import (
	"fmt"
	"math/rand/v2"
	"sort"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/wire"
)

// node is an object of the naive model of a POSIX file system.
type node struct {
	typ      wire.FileType
	perm     uint32
	uid, gid uint32
	links    int
	size     uint64
	target   string
	up       *node
	kids     map[string]*node
	fid      wire.FID
}

type model struct{ root *node }

type who struct{ uid, gid uint32 }

func (n *node) ok(w who, bits uint32) bool {
	if w.uid == 0 {
		return true
	}
	shift := 0
	switch {
	case w.uid == n.uid:
		shift = 6
	case w.gid == n.gid:
		shift = 3
	}
	return (n.perm>>shift)&bits == bits
}

func (n *node) stickyBlocks(kid *node, w who) bool {
	return n.perm&0o1000 != 0 && w.uid != 0 && w.uid != n.uid && w.uid != kid.uid
}

func (m *model) add(w who, d *node, name string, k *node) wire.Status {
	switch {
	case d.typ != wire.TypeDir:
		return wire.ErrNotDir
	case !d.ok(w, 1):
		return wire.ErrAcces
	case d.kids[name] != nil:
		return wire.ErrExist
	case !d.ok(w, 2):
		return wire.ErrAcces
	}
	k.uid, k.gid, k.up = w.uid, w.gid, d
	if d.perm&0o2000 != 0 {
		k.gid = d.gid
		if k.typ == wire.TypeDir {
			k.perm |= 0o2000
		}
	}
	if k.typ != wire.TypeDir && k.perm&0o2000 != 0 && w.uid != 0 && w.gid != k.gid {
		k.perm &^= 0o2000
	}
	k.links = 1
	if k.typ == wire.TypeDir {
		k.links = 2
		k.kids = map[string]*node{}
		d.links++
	}
	d.kids[name] = k
	return wire.OK
}

func (m *model) del(w who, d *node, name string, dir bool) wire.Status {
	if d.typ != wire.TypeDir {
		return wire.ErrNotDir
	}
	if !d.ok(w, 3) {
		return wire.ErrAcces
	}
	k := d.kids[name]
	switch {
	case k == nil:
		return wire.ErrNoEnt
	case d.stickyBlocks(k, w):
		return wire.ErrPerm
	case dir && k.typ != wire.TypeDir:
		return wire.ErrNotDir
	case !dir && k.typ == wire.TypeDir:
		return wire.ErrIsDir
	case dir && len(k.kids) > 0:
		return wire.ErrNotEmpty
	}
	delete(d.kids, name)
	k.links--
	if dir {
		k.links--
		d.links--
	}
	return wire.OK
}

func (m *model) move(w who, d *node, name string, d2 *node, name2 string) wire.Status {
	if d2.typ != wire.TypeDir || d.typ != wire.TypeDir {
		return wire.ErrNotDir
	}
	if !d.ok(w, 3) {
		return wire.ErrAcces
	}
	k := d.kids[name]
	switch {
	case k == nil:
		return wire.ErrNoEnt
	case d.stickyBlocks(k, w):
		return wire.ErrPerm
	case !d2.ok(w, 3):
		return wire.ErrAcces
	}
	old := d2.kids[name2]
	if old == k {
		return wire.OK
	}
	dir := k.typ == wire.TypeDir
	if dir && d != d2 {
		for p := d2; ; p = p.up {
			if p == k {
				return wire.ErrInval
			}
			if p == m.root {
				break
			}
		}
		if !k.ok(w, 2) {
			return wire.ErrAcces
		}
	}
	if old != nil {
		switch {
		case d2.stickyBlocks(old, w):
			return wire.ErrPerm
		case dir && old.typ != wire.TypeDir:
			return wire.ErrNotDir
		case !dir && old.typ == wire.TypeDir:
			return wire.ErrIsDir
		case len(old.kids) > 0:
			return wire.ErrNotEmpty
		}
		old.links--
		if old.typ == wire.TypeDir {
			old.links--
			d2.links--
		}
	}
	delete(d.kids, name)
	d2.kids[name2] = k
	if dir {
		k.up = d2
		d.links--
		d2.links++
	}
	return wire.OK
}

func (m *model) link(w who, k, d *node, name string) wire.Status {
	switch {
	case d.typ != wire.TypeDir:
		return wire.ErrNotDir
	case !d.ok(w, 1):
		return wire.ErrAcces
	case k.typ == wire.TypeDir:
		return wire.ErrIsDir
	case d.kids[name] != nil:
		return wire.ErrExist
	case !d.ok(w, 2):
		return wire.ErrAcces
	}
	k.links++
	d.kids[name] = k
	return wire.OK
}

func (m *model) chmod(w who, k *node, perm uint32) wire.Status {
	if w.uid != 0 && w.uid != k.uid {
		return wire.ErrPerm
	}
	if perm&0o2000 != 0 && w.uid != 0 && w.gid != k.gid {
		perm &^= 0o2000
	}
	k.perm = perm
	return wire.OK
}

func (m *model) resize(w who, k *node, size uint64) wire.Status {
	switch {
	case k.typ == wire.TypeDir:
		return wire.ErrIsDir
	case k.typ != wire.TypeReg:
		return wire.ErrInval
	case !k.ok(w, 2):
		return wire.ErrAcces
	}
	if w.uid != 0 {
		k.perm &^= 0o4000
		if k.perm&0o010 != 0 {
			k.perm &^= 0o2000
		}
	}
	k.size = size
	return wire.OK
}

// TestRandomAgainstModel runs random operations on the MDT and the model and
// compares every result, and the whole trees from time to time and after
// restarts.
func TestRandomAgainstModel(t *testing.T) {
	seeds := 6
	if testing.Short() {
		seeds = 2
	}
	for i := range seeds {
		seed := uint64(i) + 1
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { randomRun(t, seed, 4000) })
	}
}

func randomRun(t *testing.T, seed uint64, steps int) {
	rng := rand.New(rand.NewPCG(seed, 7))
	// Small caches, so that both paths are taken.
	b := newBed(t, vfs.NewMem(), Options{InodeCache: 256, DentryCache: 256, RootMode: 0o777})
	defer b.close()
	root := &node{typ: wire.TypeDir, perm: 0o777, links: 2, kids: map[string]*node{}, fid: wire.RootFID}
	root.up = root
	m := &model{root}
	all := []*node{root}
	names := []string{"a", "b", "c", "dd", "e e", "ü", "g", "h"}
	perms := []uint32{0o777, 0o755, 0o700, 0o1777, 0o2775, 0o750, 0o644, 0o6755, 0o666}
	people := []who{{0, 0}, {1, 1}, {2, 1}, {3, 3}}
	alive := func() *node { return all[rng.IntN(len(all))] }
	dir := func() *node {
		for range 10 {
			if n := alive(); n.typ == wire.TypeDir {
				return n
			}
		}
		return root
	}
	gc := func() {
		kept := all[:0]
		for _, n := range all {
			if n.links > 0 {
				kept = append(kept, n)
			}
		}
		all = kept
	}
	for step := range steps {
		w := people[rng.IntN(len(people))]
		name, name2 := names[rng.IntN(len(names))], names[rng.IntN(len(names))]
		d, d2, k := dir(), dir(), alive()
		perm := perms[rng.IntN(len(perms))]
		req := &wire.Request{FID: d.fid, Name: []byte(name), SetAttr: mode(perm), Cred: wire.Cred{UID: w.uid, GID: w.gid}}
		var want wire.Status
		var made *node
		desc := ""
		switch rng.IntN(12) {
		case 0, 1:
			req.Op, req.How = wire.OpCreate, wire.Guarded
			made = &node{typ: wire.TypeReg, perm: perm}
			want = m.add(w, d, name, made)
		case 2, 3:
			req.Op = wire.OpMkdir
			made = &node{typ: wire.TypeDir, perm: perm}
			want = m.add(w, d, name, made)
		case 4:
			req.Op, req.Data = wire.OpSymlink, []byte(name2)
			made = &node{typ: wire.TypeLnk, perm: 0o777, target: name2, size: uint64(len(name2))}
			want = m.add(w, d, name, made)
		case 5:
			req.Op, req.Type = wire.OpMknod, wire.TypeFifo
			made = &node{typ: wire.TypeFifo, perm: perm}
			want = m.add(w, d, name, made)
		case 6:
			req.Op = wire.OpRemove
			want = m.del(w, d, name, false)
		case 7:
			req.Op = wire.OpRmdir
			want = m.del(w, d, name, true)
		case 8, 9:
			req.Op, req.FID2, req.Name2 = wire.OpRename, d2.fid, []byte(name2)
			want = m.move(w, d, name, d2, name2)
		case 10:
			req.Op, req.FID, req.FID2, req.Name2 = wire.OpLink, k.fid, d2.fid, []byte(name2)
			want = m.link(w, k, d2, name2)
		case 11:
			req.Op, req.FID = wire.OpSetattr, k.fid
			if rng.IntN(2) == 0 {
				want = m.chmod(w, k, perm)
			} else {
				req.SetAttr = wire.SetAttr{Mask: wire.SetSize, Size: uint64(rng.IntN(100000))}
				want = m.resize(w, k, req.SetAttr.Size)
			}
		}
		if rng.IntN(3) == 0 {
			req.Key = wire.ReplyKey{Addr: [16]byte{1}, Port: 7, XID: uint32(step), Proc: 1, Sum: uint64(step)}
		}
		rep := b.call(req)
		if rep.Status != want {
			t.Fatalf("step %d op %d %s %q %q as %v: %v, model says %v", step, req.Op, desc, name, name2, w, rep.Status, want)
		}
		if made != nil && want == wire.OK {
			made.fid = rep.Attr.FID
			all = append(all, made)
		}
		if !req.Key.IsZero() {
			again := *req
			if r := b.call(&again); r.Status != want || want == wire.OK && !r.Reconstructed {
				t.Fatalf("step %d: repeated call gave %v, reconstructed %v", step, r.Status, r.Reconstructed)
			}
		}
		gc()
		if step%1000 == 999 {
			if rng.IntN(2) == 0 {
				b.close()
				b.open()
			}
			compare(t, b, m)
		}
	}
}

// compare walks the MDT with its own operations beside the model.
func compare(t *testing.T, b *bed, m *model) {
	t.Helper()
	if err := checkStore(b.e); err != nil {
		t.Fatal(err)
	}
	seen := map[*node]bool{}
	var walk func(path string, n *node)
	walk = func(path string, n *node) {
		rep := b.must(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: n.fid})
		a := &rep.Attr
		if a.Type != n.typ || a.Mode != n.perm || a.UID != n.uid || a.GID != n.gid || int(a.Nlink) != n.links ||
			n.typ != wire.TypeDir && a.Size != n.size {
			t.Fatalf("%s: %s, model %+v", path, printAttr(a), n)
		}
		if n.typ == wire.TypeLnk {
			if rep := b.must(&wire.Request{Header: wire.Header{Op: wire.OpReadlink}, FID: n.fid}); string(rep.Data) != n.target {
				t.Fatalf("%s: target %q, model %q", path, rep.Data, n.target)
			}
		}
		if n.typ != wire.TypeDir || seen[n] {
			return
		}
		seen[n] = true
		var got, want []string
		cookie := uint64(0)
		for {
			rep := b.must(&wire.Request{Header: wire.Header{Op: wire.OpReaddir}, FID: n.fid, Cookie: cookie, Count: 100, Plus: true})
			for _, e := range rep.Entries {
				cookie = e.Cookie
				if isDot(e.Name) {
					continue
				}
				k := n.kids[string(e.Name)]
				if k == nil || k.fid != e.FID || !e.HasAttr || e.Attr.Mode != k.perm {
					t.Fatalf("%s/%s: entry %+v, model %+v", path, e.Name, e, k)
				}
				got = append(got, string(e.Name))
			}
			if rep.EOF {
				break
			}
		}
		for name, k := range n.kids {
			want = append(want, name)
			rep := b.must(&wire.Request{Header: wire.Header{Op: wire.OpLookup}, FID: n.fid, Name: []byte(name)})
			if rep.Attr.FID != k.fid {
				t.Fatalf("%s/%s: lookup gives %v, model %v", path, name, rep.Attr.FID, k.fid)
			}
		}
		sort.Strings(got)
		sort.Strings(want)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%s: entries %q, model %q", path, got, want)
		}
		for _, name := range want {
			walk(path+"/"+name, n.kids[name])
		}
	}
	walk("", m.root)
}
