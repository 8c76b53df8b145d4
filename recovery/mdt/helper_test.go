package mdt

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

var testClient = wire.ClientID{1, 2, 3}

// bed is an MDT on a file system in memory with one connected client.
type bed struct {
	t     testing.TB
	fs    vfs.FS
	o     Options
	e     *local.Pebble
	m     *MDT
	clock int64
	down  []error
}

func newBed(t testing.TB, fs vfs.FS, o Options) *bed {
	b := &bed{t: t, fs: fs, o: o, clock: 1_000_000_000}
	b.open()
	return b
}

func openEngine(fs vfs.FS, dir string) (*local.Pebble, error) {
	return local.OpenPebble(dir, local.Options{FS: fs, MemTableBytes: 4 << 20, CacheBytes: 8 << 20, MinFreeBytes: -1})
}

func (b *bed) open() {
	b.t.Helper()
	var err error
	b.e, err = openEngine(b.fs, "mdt")
	if err != nil {
		b.t.Fatal(err)
	}
	b.openMDT()
}

func (b *bed) openMDT() {
	b.t.Helper()
	o := b.o
	o.Engine = b.e
	rng := rand.New(rand.NewPCG(1, 2))
	o.Rand = rng.Uint32
	if o.Clock == nil {
		o.Clock = func() int64 { b.clock += 1000; return b.clock }
	}
	o.OnFail = func(err error) { b.down = append(b.down, err) }
	var err error
	if b.m, err = Open(o); err != nil {
		b.t.Fatal(err)
	}
	b.m.Begin(0)
	if rep := b.call(&wire.Request{Header: wire.Header{Op: wire.OpConnect}}); rep.Status != wire.OK {
		b.t.Fatal("connect:", rep.Status)
	}
}

func (b *bed) close() {
	b.t.Helper()
	if err := b.m.Close(); err != nil {
		b.t.Fatal(err)
	}
	if err := b.e.Close(); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) call(req *wire.Request) *wire.Reply { return call(b.m, req) }

func call(m *MDT, req *wire.Request) *wire.Reply {
	rep := &wire.Reply{}
	if req.Client == (wire.ClientID{}) {
		req.Client = testClient
	}
	if req.Op.Modifies() {
		req.Flags |= wire.FlagWaitCommit
	}
	if m.TryHandle(req, rep) {
		return rep
	}
	ch := make(chan struct{}, 1)
	m.Handle(req, rep, func() { ch <- struct{}{} })
	<-ch
	return rep
}

// must is call for operations that have to succeed.
func (b *bed) must(req *wire.Request) *wire.Reply {
	b.t.Helper()
	rep := b.call(req)
	if rep.Status != wire.OK {
		b.t.Fatalf("op %d %q: %v", req.Op, req.Name, rep.Status)
	}
	return rep
}

func mode(m uint32) wire.SetAttr { return wire.SetAttr{Mask: wire.SetMode, Mode: m} }

func (b *bed) create(dir wire.FID, name string) wire.FID {
	b.t.Helper()
	return b.must(&wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: dir, Name: []byte(name), SetAttr: mode(0o644)}).Attr.FID
}

func (b *bed) mkdir(dir wire.FID, name string) wire.FID {
	b.t.Helper()
	return b.must(&wire.Request{Header: wire.Header{Op: wire.OpMkdir}, FID: dir, Name: []byte(name), SetAttr: mode(0o755)}).Attr.FID
}

// checkStore verifies the structure of an MDT's engine: every name has its
// cookie and the other way round, every entry an inode, every inode the right
// number of links, directories their counts and parents.
func checkStore(e store.Engine) error {
	type key struct {
		dir    wire.FID
		cookie uint64
	}
	type val struct {
		child wire.FID
		typ   wire.FileType
		name  string
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	names := map[key]val{}
	links := map[wire.FID]uint32{}
	parents := map[wire.FID]wire.FID{wire.RootFID: wire.RootFID}
	subdirs := map[wire.FID]uint32{}
	entries := map[wire.FID]uint64{}
	maxCookie := map[wire.FID]uint64{}
	err := IterNames(e, func(dir wire.FID, name []byte, ent Entry, err error) error {
		if err != nil {
			return err
		}
		k := key{dir, ent.Cookie}
		if _, dup := names[k]; dup {
			bad("cookie %d of %v twice", ent.Cookie, dir)
		}
		names[k] = val{ent.FID, ent.Type, string(name)}
		links[ent.FID]++
		entries[dir]++
		maxCookie[dir] = max(maxCookie[dir], ent.Cookie)
		if ent.Type == wire.TypeDir {
			subdirs[dir]++
			parents[ent.FID] = dir
		}
		return nil
	})
	if err != nil {
		return err
	}
	n := 0
	err = IterCookies(e, func(dir wire.FID, cookie uint64, child wire.FID, typ wire.FileType, name []byte, err error) error {
		if err != nil {
			return err
		}
		n++
		if names[key{dir, cookie}] != (val{child, typ, string(name)}) {
			bad("cookie %d of %v is %v %q, name says %+v", cookie, dir, child, name, names[key{dir, cookie}])
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n != len(names) {
		bad("%d names, %d cookies", len(names), n)
	}
	syms := map[wire.FID]bool{}
	if err := IterLinks(e, func(f wire.FID, _ []byte, err error) error { syms[f] = true; return err }); err != nil {
		return err
	}
	inodes := map[wire.FID]*Inode{}
	err = IterInodes(e, func(f wire.FID, in *Inode, err error) error {
		if err != nil {
			return err
		}
		inodes[f] = in
		want := links[f]
		if in.Attr.Type == wire.TypeDir {
			want = 2 + subdirs[f]
			if parents[f] != in.Attr.Parent {
				bad("%v: parent %v, entry is in %v", f, in.Attr.Parent, parents[f])
			}
			if in.Entries != entries[f] {
				bad("%v: %d entries, counted %d", f, in.Entries, entries[f])
			}
			if maxCookie[f] >= in.NextCookie {
				bad("%v: next cookie %d, has %d", f, in.NextCookie, maxCookie[f])
			}
			if f != wire.RootFID && links[f] != 1 {
				bad("%v: directory with %d names", f, links[f])
			}
		}
		if in.Attr.Nlink != want || want == 0 {
			bad("%v: nlink %d, counted %d", f, in.Attr.Nlink, want)
		}
		if (in.Attr.Type == wire.TypeLnk) != syms[f] {
			bad("%v: type %d, symlink target %v", f, in.Attr.Type, syms[f])
		}
		return nil
	})
	if err != nil {
		return err
	}
	for k, v := range names {
		if in := inodes[v.child]; in == nil || in.Attr.Type != v.typ {
			bad("%v/%q dangles", k.dir, v.name)
		}
		if in := inodes[k.dir]; in == nil || in.Attr.Type != wire.TypeDir {
			bad("%v has names and is no directory", k.dir)
		}
	}
	opens := map[wire.FID]uint16{}
	if err := IterEpochs(e, func(f wire.FID, _ wire.ClientID, _ EpochRec, err error) error { opens[f]++; return err }); err != nil {
		return err
	}
	for f, in := range inodes {
		if opens[f] != in.Opens {
			bad("%v: opens %d, counted %d", f, in.Opens, opens[f])
		}
		delete(opens, f)
	}
	for f := range opens {
		bad("%v: epoch without inode", f)
	}
	if st, err := ReadState(e); err != nil || st.Inodes != uint64(len(inodes)) {
		bad("state says %d inodes, counted %d (%v)", st.Inodes, len(inodes), err)
	}
	return errors.Join(errs...)
}
