package differential

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"path"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/billyfs"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
)

// pair compares the two servers.
type pair struct {
	t   *testing.T
	rng *rand.Rand
	p   [2]*peer // go-nfs, baton
	log []string // the last operations, for messages
	// done counts the operations that succeeded, by name.
	done map[string]int
}

func (x *pair) note(format string, a ...any) {
	x.log = append(x.log, fmt.Sprintf(format, a...))
	if len(x.log) > 12 {
		x.log = x.log[1:]
	}
}

func (x *pair) differ(what string, a, b any) {
	x.t.Helper()
	x.t.Fatalf("%s: go-nfs %v, baton %v, after\n%s", what, a, b, strings.Join(x.log, "\n"))
}

// where the exact status of a failure is right in go-nfs too.
type exactness bool

const (
	exactStatus exactness = true
	anyFailure  exactness = false
)

// both runs f on both servers and compares the statuses and what else f gives.
// It tells whether both succeeded.
func (x *pair) both(op string, how exactness, f func(*peer) (nfs.NFSStatus, string)) bool {
	x.t.Helper()
	x.note("%s", op)
	a, av := f(x.p[0])
	b, bv := f(x.p[1])
	if a != b && (how == exactStatus || a == nfs.NFSStatusOk || b == nfs.NFSStatusOk) {
		x.differ(op+": status", a, b)
	}
	if av != bv {
		x.differ(op, av, bv)
	}
	if a == nfs.NFSStatusOk && b == nfs.NFSStatusOk {
		x.done[strings.Fields(op)[0]]++
		return true
	}
	return false
}

// path is a random path in a small tree, so that operations meet.
func (x *pair) path() []string {
	p := make([]string, 1+x.rng.Intn(3))
	for i := range p {
		p[i] = string(rune('a' + x.rng.Intn(4)))
	}
	return p
}

// spot is a path's state on both servers.
type spot struct {
	path    []string
	name    []byte
	dir, fh [2][]byte // fh nil: not there
	typ     wire.FileType
}

// find looks the path up on both servers; ok is false when its directory is
// not there. It compares lookups and attributes on the way.
func (x *pair) find(p []string) (s spot, ok bool) {
	x.t.Helper()
	s.path, s.name = p, []byte(p[len(p)-1])
	ok = x.both("lookup "+path.Join(p[:len(p)-1]...), exactStatus, func(q *peer) (st nfs.NFSStatus, _ string) {
		s.dir[x.index(q)], st = q.walk(p[:len(p)-1])
		return st, ""
	})
	if !ok {
		return s, false
	}
	x.both("lookup "+path.Join(p...), exactStatus, func(q *peer) (nfs.NFSStatus, string) {
		fh, st := q.walk(p)
		s.fh[x.index(q)] = fh
		if st != nfs.NFSStatusOk {
			return st, ""
		}
		text, a := q.getattr(fh)
		if a != nil {
			s.typ = a.Type
		}
		return st, text
	})
	dirs := [2]string{}
	for i, q := range x.p {
		dirs[i], _ = q.getattr(s.dir[i])
	}
	if dirs[0] != dirs[1] {
		x.differ("attributes of "+path.Join(p[:len(p)-1]...), dirs[0], dirs[1])
	}
	// A parent that is no directory answers lookups in different ways above, but
	// is no place to make anything in.
	return s, strings.HasPrefix(dirs[1], fmt.Sprintf("type %d ", wire.TypeDir))
}

func (x *pair) index(q *peer) int {
	if q == x.p[0] {
		return 0
	}
	return 1
}

func (x *pair) step() {
	x.t.Helper()
	s, ok := x.find(x.path())
	if !ok {
		return
	}
	r, at := x.rng, path.Join(s.path...)
	missing, reg, dir, link := s.fh[1] == nil, s.typ == wire.TypeReg, s.typ == wire.TypeDir, s.typ == wire.TypeLnk
	mode := wire.SetAttr{Mask: wire.SetMode, Mode: uint32(r.Intn(0o1000))}
pick:
	switch op := r.Intn(20); {
	case op == 0 || op == 1 && missing:
		how := anyFailure
		if dir {
			how = exactStatus
		}
		x.create("mkdir "+at, how, nfs.NFSProcedureMkDir, func(i int) encoder {
			return &nfs3.MkdirArgs{FH: s.dir[i], Name: s.name, Attr: mode}
		})
	case op <= 3 && (missing || reg || dir):
		how, a := wire.Guarded, mode
		if r.Intn(2) == 0 {
			how = wire.Unchecked
			a.Mask |= wire.SetSize
			if !missing {
				a.Mask = wire.SetSize
			}
		}
		exact := exactness(how == wire.Guarded && !dir)
		x.create(fmt.Sprintf("create %s how %d %+v", at, how, a), exact, nfs.NFSProcedureCreate, func(i int) encoder {
			return &nfs3.CreateArgs{FH: s.dir[i], Name: s.name, How: how, Attr: a}
		})
	case op == 4:
		target := []string{"a", "b/c", "../a", "nowhere", "/a/b", strings.Repeat("x", 300)}[r.Intn(6)]
		x.create("symlink "+at+" to "+target, anyFailure, nfs.NFSProcedureSymlink, func(i int) encoder {
			return &nfs3.SymlinkArgs{FH: s.dir[i], Name: s.name, Target: []byte(target)}
		})
	case op == 5 && (missing || dir):
		typ := []wire.FileType{wire.TypeBlk, wire.TypeFifo, wire.TypeSock}[r.Intn(3)]
		x.create(fmt.Sprintf("mknod %s type %d", at, typ), anyFailure, nfs.NFSProcedureMkNod, func(i int) encoder {
			return &nfs3.MknodArgs{FH: s.dir[i], Name: s.name, Type: typ, Attr: mode, RdevMajor: 8, RdevMinor: 1}
		})
	case op == 6 && !dir, op == 7 && dir:
		proc, name := nfs.NFSProcedureRemove, "remove "
		if dir {
			proc, name = nfs.NFSProcedureRmDir, "rmdir "
		}
		x.wcc(name+at, exactness(missing), proc, func(i int) encoder { return &nfs3.DirOpArgs{FH: s.dir[i], Name: s.name} })
	case op == 8 && !missing:
		to, ok := x.find(x.path())
		if !ok {
			return
		}
		x.both("rename "+at+" to "+path.Join(to.path...), anyFailure, func(q *peer) (nfs.NFSStatus, string) {
			var res nfs3.RenameRes
			i := x.index(q)
			q.call(nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: s.dir[i], FromName: s.name, ToFH: to.dir[i], ToName: to.name}, &res)
			return res.Status, ""
		})
		x.find(to.path)
	case op <= 11 && !missing && !link:
		x.write(&s)
		return
	case op <= 13 && !missing && reg:
		off, n := uint64(r.Intn(450_000)), uint32(r.Intn(100_000))
		x.both(fmt.Sprintf("read %s at %d count %d", at, off, n), exactStatus, func(q *peer) (nfs.NFSStatus, string) {
			var res nfs3.ReadRes
			q.call(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: s.fh[x.index(q)], Offset: off, Count: n}, &res)
			return res.Status, fmt.Sprintf("count %d eof %v sum %x", res.Count, res.EOF, sha256.Sum256(res.Data))
		})
		return
	case op <= 15 && !missing && !link:
		x.setattr(&s, mode)
	case op == 16 && !missing:
		x.both("readlink "+at, anyFailure, func(q *peer) (nfs.NFSStatus, string) {
			var res nfs3.ReadlinkRes
			q.call(nfs.NFSProcedureReadlink, &nfs3.FHArgs{FH: s.fh[x.index(q)]}, &res)
			return res.Status, string(res.Target)
		})
		return
	case op == 17 && reg:
		x.both("commit "+at, exactStatus, func(q *peer) (nfs.NFSStatus, string) {
			var res nfs3.CommitRes
			q.call(nfs.NFSProcedureCommit, &nfs3.CommitArgs{FH: s.fh[x.index(q)]}, &res)
			return res.Status, ""
		})
		return
	case op < 18:
		goto pick // not possible here
	default:
		plus := r.Intn(2) == 0
		x.both(fmt.Sprintf("list %s plus %v", path.Dir(at), plus), exactStatus, func(q *peer) (nfs.NFSStatus, string) {
			st, es := q.list(s.dir[x.index(q)], plus)
			return st, strings.Join(es, "\n")
		})
		return
	}
	// What the operation left.
	x.find(s.path)
}

type encoder interface{ Encode(*xdr.Writer) }

func (x *pair) create(op string, how exactness, proc nfs.NFSProcedure, args func(i int) encoder) {
	x.t.Helper()
	x.both(op, how, func(q *peer) (nfs.NFSStatus, string) {
		var res nfs3.CreateRes
		q.call(proc, args(x.index(q)), &res)
		if res.Status != nfs.NFSStatusOk {
			return res.Status, ""
		}
		if res.FH == nil {
			return res.Status, "no handle"
		}
		text, _ := q.getattr(res.FH)
		return res.Status, text
	})
}

func (x *pair) wcc(op string, how exactness, proc nfs.NFSProcedure, args func(i int) encoder) bool {
	x.t.Helper()
	return x.both(op, how, func(q *peer) (nfs.NFSStatus, string) {
		var res nfs3.WccRes
		q.call(proc, args(x.index(q)), &res)
		return res.Status, ""
	})
}

func (x *pair) write(s *spot) {
	x.t.Helper()
	data := make([]byte, x.rng.Intn(70_000))
	x.rng.Read(data)
	off := uint64(x.rng.Intn(400_000))
	stable := wire.StableHow(x.rng.Intn(3))
	x.both(fmt.Sprintf("write %s at %d count %d", path.Join(s.path...), off, len(data)), anyFailure, func(q *peer) (nfs.NFSStatus, string) {
		var res nfs3.WriteRes
		fh := s.fh[x.index(q)]
		q.call(nfs.NFSProcedureWrite, &nfs3.WriteArgs{FH: fh, Offset: off, Count: uint32(len(data)), Stable: stable, Data: data}, &res)
		if res.Status != nfs.NFSStatusOk {
			return res.Status, ""
		}
		if res.Committed < stable {
			return res.Status, "less stable than asked for"
		}
		text, _ := q.getattr(fh)
		if !res.Wcc.After.Present || attr(&res.Wcc.After.Attr) != text {
			text += ", but the reply says " + attr(&res.Wcc.After.Attr)
		}
		return res.Status, fmt.Sprintf("count %d, %s", res.Count, text)
	})
}

func (x *pair) setattr(s *spot, sa wire.SetAttr) {
	x.t.Helper()
	switch x.rng.Intn(4) {
	case 0:
		sa = wire.SetAttr{Mask: wire.SetSize, Size: uint64(x.rng.Intn(300_000))}
		if s.typ != wire.TypeReg {
			// go-nfs answers that with a broken reply.
			return
		}
	case 1:
		sa = wire.SetAttr{Mask: wire.SetUID | wire.SetGID, UID: uint32(x.rng.Intn(5)), GID: uint32(x.rng.Intn(5))}
	case 2:
		sa = wire.SetAttr{Mask: wire.SetAtime | wire.SetMtime, Atime: x.rng.Int63n(4e18), Mtime: x.rng.Int63n(4e18)}
	}
	op := fmt.Sprintf("setattr %s %+v", path.Join(s.path...), sa)
	ok := x.wcc(op, exactStatus, nfs.NFSProcedureSetAttr, func(i int) encoder { return &nfs3.SetattrArgs{FH: s.fh[i], Attr: sa} })
	if !ok || sa.Mask&wire.SetMtime == 0 {
		return
	}
	for i, q := range x.p {
		if _, a := q.getattr(s.fh[i]); a == nil || a.Mtime != sa.Mtime {
			x.t.Fatalf("%s: %s: mtime %v, want %d", q.name, op, a, sa.Mtime)
		}
	}
}

// list reads a directory and describes its entries, sorted by name.
func (p *peer) list(dir []byte, plus bool) (nfs.NFSStatus, []string) {
	p.t.Helper()
	res := nfs3.ReaddirRes{Plus: plus}
	const count = 1 << 20
	if plus {
		p.call(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, DirCount: count, MaxCount: count}, &res)
	} else {
		p.call(nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Count: count}, &res)
	}
	if res.Status != nfs.NFSStatusOk {
		return res.Status, nil
	}
	if !res.EOF {
		p.t.Errorf("%s: a directory of %d entries did not fit", p.name, len(res.Entries))
	}
	var out []string
	dots := 0
	for _, e := range res.Entries {
		name := string(e.Name)
		if name == "." || name == ".." {
			dots++
			continue
		}
		line := name
		if plus {
			if !e.Attr.Present || e.FH == nil {
				p.t.Errorf("%s: entry %q without attributes or handle", p.name, name)
			} else {
				line += " " + attr(&e.Attr.Attr)
				if e.Attr.Attr.FileID != e.FileID {
					p.t.Errorf("%s: entry %q: fileid %d, attributes have %d", p.name, name, e.FileID, e.Attr.Attr.FileID)
				}
			}
		}
		out = append(out, line)
	}
	if dots != 2 {
		p.t.Errorf("%s: %d dot entries", p.name, dots)
	}
	sort.Strings(out)
	return res.Status, out
}

// snapshot describes everything a server shows.
func (p *peer) snapshot() []string {
	p.t.Helper()
	var out []string
	var visit func(dir []byte, at string)
	visit = func(dir []byte, at string) {
		res := nfs3.ReaddirRes{Plus: true}
		p.call(nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, DirCount: 1 << 20, MaxCount: 1 << 20}, &res)
		if res.Status != nfs.NFSStatusOk || !res.EOF {
			p.t.Fatalf("%s: readdirplus %s: %v", p.name, at, res.Status)
		}
		type child struct {
			name string
			fh   []byte
			typ  wire.FileType
			size uint64
		}
		var cs []child
		for _, e := range res.Entries {
			if n := string(e.Name); n != "." && n != ".." {
				cs = append(cs, child{n, bytes.Clone(e.FH), e.Attr.Attr.Type, e.Attr.Attr.Size})
			}
		}
		sort.Slice(cs, func(i, j int) bool { return cs[i].name < cs[j].name })
		for _, c := range cs {
			text, _ := p.getattr(c.fh)
			name := at + "/" + c.name
			switch c.typ {
			case wire.TypeReg:
				var data []byte
				for uint64(len(data)) < c.size {
					var rd nfs3.ReadRes
					p.call(nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: c.fh, Offset: uint64(len(data)), Count: 128 << 10}, &rd)
					if rd.Status != nfs.NFSStatusOk || rd.Count == 0 {
						p.t.Fatalf("%s: read %s: %v, %d bytes", p.name, name, rd.Status, rd.Count)
					}
					data = append(data, rd.Data...)
				}
				text += fmt.Sprintf(" sum %x", sha256.Sum256(data))
			case wire.TypeLnk:
				var rl nfs3.ReadlinkRes
				p.call(nfs.NFSProcedureReadlink, &nfs3.FHArgs{FH: c.fh}, &rl)
				text += " to " + string(rl.Target)
			}
			out = append(out, name+" "+text)
			if c.typ == wire.TypeDir {
				visit(c.fh, name)
			}
		}
	}
	visit(p.root, "")
	return out
}

// direct describes everything as billyfs shows it, in the same words.
func (p *peer) direct() []string {
	p.t.Helper()
	var out []string
	var visit func(at string)
	visit = func(at string) {
		infos, err := p.fs.ReadDir(at)
		ok(p.t, err)
		for _, fi := range infos {
			a, name := billyfs.Attr(fi), at+"/"+fi.Name()
			text := attr(&nfs3.Fattr{Type: a.Type, Mode: a.Mode, Nlink: a.Nlink, UID: a.UID, GID: a.GID, Size: a.Size, RdevMajor: a.RdevMajor, RdevMinor: a.RdevMinor})
			switch {
			case fi.Mode().IsRegular():
				h, err := p.fs.Open(name)
				ok(p.t, err)
				sum := sha256.New()
				_, err = io.Copy(sum, h)
				ok(p.t, err)
				ok(p.t, h.Close())
				text += fmt.Sprintf(" sum %x", sum.Sum(nil))
			case fi.Mode()&fs.ModeSymlink != 0:
				to, err := p.fs.Readlink(name)
				ok(p.t, err)
				text += " to " + to
			}
			out = append(out, name+" "+text)
			if fi.IsDir() {
				visit(name)
			}
		}
	}
	visit("")
	return out
}

// The same random operations have the same results, and leave the same file
// system, whichever server and whichever way one looks at it.
func TestRandomOperations(t *testing.T) {
	done := map[string]int{}
	for seed := int64(1); seed <= 3; seed++ {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			x := &pair{t: t, rng: rand.New(rand.NewSource(seed)), p: [2]*peer{goNFS(t, "127.0.0.1"), baton(t, "127.0.0.1")}, done: done}
			for range 1500 {
				x.step()
			}
			want := x.p[1].snapshot()
			for name, got := range map[string][]string{
				"go-nfs": x.p[0].snapshot(), "billyfs below go-nfs": x.p[0].direct(), "billyfs below baton": x.p[1].direct(),
			} {
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("baton (-) and %s (+) show different things:\n%s", name, d)
				}
			}
			t.Logf("%d objects at the end", len(want))
		})
	}
	for _, op := range []string{"lookup", "mkdir", "create", "symlink", "mknod", "remove", "rmdir", "rename", "write", "read", "setattr", "readlink", "commit", "list"} {
		if done[op] == 0 {
			t.Errorf("no %s succeeded", op)
		}
	}
	t.Logf("operations that succeeded: %v", done)
}
