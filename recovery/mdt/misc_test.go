package mdt

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestBigDirectory fills a directory with 100,000 entries, reads it in pieces,
// and empties it.
func TestBigDirectory(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 10_000
	}
	b := newBed(t, vfs.NewMem(), Options{InodeCache: 1000, DentryCache: 1000})
	defer b.close()
	dir := b.mkdir(wire.RootFID, "d")
	send := func(req *wire.Request) {
		req.Client = testClient
		rep := &wire.Reply{}
		b.m.Handle(req, rep, func() {}) // does not wait: answered at once
		if rep.Status != wire.OK {
			t.Fatal(req.Op, string(req.Name), rep.Status)
		}
	}
	for i := range n {
		send(&wire.Request{Header: wire.Header{Op: wire.OpCreate}, FID: dir, Name: fmt.Appendf(nil, "f%d", i)})
	}
	seen := make([]bool, n)
	count, cookie := 0, uint64(0)
	for {
		rep := b.must(&wire.Request{Header: wire.Header{Op: wire.OpReaddir}, FID: dir, Cookie: cookie, Count: 64 << 10, Plus: count%3 == 0})
		for _, e := range rep.Entries {
			cookie = e.Cookie
			if isDot(e.Name) {
				continue
			}
			var i int
			if _, err := fmt.Sscanf(string(e.Name), "f%d", &i); err != nil || seen[i] {
				t.Fatalf("entry %q: %v, twice %v", e.Name, err, seen[i])
			}
			seen[i] = true
			count++
		}
		if rep.EOF {
			break
		}
	}
	if count != n {
		t.Fatalf("%d entries, want %d", count, n)
	}
	a := b.must(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: dir}).Attr
	if a.Size != dirSize(uint64(n)) || a.Nlink != 2 {
		t.Errorf("directory: %s", printAttr(&a))
	}
	for i := range n {
		send(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: dir, Name: fmt.Appendf(nil, "f%d", i)})
	}
	send(&wire.Request{Header: wire.Header{Op: wire.OpRmdir}, FID: wire.RootFID, Name: []byte("d")})
	if err := checkStore(b.e); err != nil {
		t.Error(err)
	}
}

func TestFIDsAreNeverReused(t *testing.T) {
	fs := vfs.NewMem()
	b := newBed(t, fs, Options{})
	seen := map[wire.FID]bool{}
	make1 := func(name string) {
		f := b.create(wire.RootFID, name)
		if seen[f] {
			t.Fatalf("%v given twice", f)
		}
		seen[f] = true
		b.must(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: wire.RootFID, Name: []byte(name)})
	}
	make1("a")
	b.m.fidOID = math.MaxUint32 - 1 // the end of the sequence
	make1("b")
	// An operation that fails after the change of the sequence.
	if rep := b.call(&wire.Request{Header: wire.Header{Op: wire.OpSymlink}, FID: wire.RootFID, Name: []byte("c")}); rep.Status != wire.ErrNoEnt {
		t.Fatal(rep.Status)
	}
	make1("d")
	make1("e")
	b.close()
	b.open()
	make1("f")
	b.close()
}

func TestTouchAtime(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{InodeCache: 1})
	f := b.create(wire.RootFID, "a")
	old := b.must(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: f}).Attr
	at := old.Atime + 12345
	b.must(&wire.Request{Header: wire.Header{Op: wire.OpTouchAtime}, FID: f, SetAttr: wire.SetAttr{Atime: at}})
	for i := range 1000 { // push it out of a cache that holds little
		b.create(wire.RootFID, fmt.Sprint("x", i))
	}
	check := func(when string) {
		t.Helper()
		a := b.must(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: f}).Attr
		if a.Atime != at || a.Ctime != old.Ctime || a.Version != old.Version {
			t.Errorf("%s: %s atime %d, want %d", when, printAttr(&a), a.Atime, at)
		}
	}
	check("cached")
	b.close()
	b.open()
	check("after a restart")
	b.close()
}

func TestFullDisk(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "a")
	d := b.mkdir(wire.RootFID, "d")
	e := &fullEngine{Engine: b.e}
	b.m.e = e
	create := &wire.Request{Header: wire.Header{Op: wire.OpCreate}, FID: wire.RootFID, Name: []byte("n")}
	chmod := &wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: f, SetAttr: mode(0o600)}
	cut := &wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: f, SetAttr: wire.SetAttr{Mask: wire.SetSize}}
	rmdir := &wire.Request{Header: wire.Header{Op: wire.OpRmdir}, FID: wire.RootFID, Name: []byte("d")}
	remove := &wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: wire.RootFID, Name: []byte("a")}
	look := &wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: f}
	for _, c := range []struct {
		room store.Room
		req  *wire.Request
		want wire.Status
	}{
		{store.RoomLow, create, wire.ErrNoSpc}, {store.RoomLow, chmod, wire.OK}, {store.RoomLow, cut, wire.OK},
		{store.RoomCritical, create, wire.ErrNoSpc}, {store.RoomCritical, chmod, wire.ErrNoSpc},
		{store.RoomCritical, cut, wire.OK}, {store.RoomCritical, rmdir, wire.OK}, {store.RoomNone, remove, wire.ErrNoSpc},
		{store.RoomNone, look, wire.OK}, {store.RoomCritical, remove, wire.OK}, {store.RoomOK, create, wire.OK},
	} {
		e.room = c.room
		if rep := b.call(c.req); rep.Status != c.want {
			t.Errorf("room %d op %d: %v, want %v", c.room, c.req.Op, rep.Status, c.want)
		}
	}
	_ = d
	b.m.e = b.e
	b.close()
}

type fullEngine struct {
	store.Engine
	room store.Room
}

func (e *fullEngine) Room() store.Room { return e.room }

// holdEngine lets Sync wait for the test while hold is set.
type holdEngine struct {
	store.Engine
	enter, leave chan struct{}
	hold         atomic.Bool
}

func (e *holdEngine) Sync() error {
	if e.hold.Load() {
		e.enter <- struct{}{}
		<-e.leave
	}
	return e.Engine.Sync()
}

// TestWaitCommit: nothing is answered before it is durable, errors included;
// replies leave in order; reads are answered unless commit on share is on.
func TestWaitCommit(t *testing.T) {
	for _, cos := range []bool{false, true} {
		b := newBed(t, vfs.NewMem(), Options{COS: cos})
		h := &holdEngine{Engine: b.e, enter: make(chan struct{}), leave: make(chan struct{})}
		if err := b.m.Close(); err != nil {
			t.Fatal(err)
		}
		type answer struct {
			n   int
			rep *wire.Reply
		}
		order := make(chan answer, 10)
		o := Options{Engine: h, COS: cos}
		m, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		m.Begin(0)
		if rep := call(m, &wire.Request{Header: wire.Header{Op: wire.OpConnect}}); rep.Status != wire.OK {
			t.Fatal(rep.Status)
		}
		h.hold.Store(true)
		send := func(n int, op wire.Op, name string, how wire.CreateHow) {
			rep := &wire.Reply{}
			req := &wire.Request{Header: wire.Header{Op: op, Client: testClient, Flags: wire.FlagWaitCommit}, FID: wire.RootFID, Name: []byte(name), How: how}
			m.Handle(req, rep, func() { order <- answer{n, rep} })
		}
		send(1, wire.OpCreate, "a", wire.Guarded)
		<-h.enter
		send(2, wire.OpCreate, "a", wire.Guarded) // fails, but shows what is not durable
		send(3, wire.OpMkdir, "b", 0)
		send(4, wire.OpLookup, "a", 0)
		if !cos {
			if a := <-order; a.n != 4 || a.rep.LastCommitted >= a.rep.Attr.Version {
				t.Errorf("first answer is %d", a.n)
			}
		}
		select {
		case a := <-order:
			t.Errorf("answer %d before anything is durable", a.n)
		default:
		}
		h.leave <- struct{}{}
		a1, a2 := <-order, <-order
		if a1.n != 1 || a1.rep.LastCommitted != a1.rep.Transno {
			t.Errorf("answer %d: transno %d, last committed %d", a1.n, a1.rep.Transno, a1.rep.LastCommitted)
		}
		if a2.n != 2 || a2.rep.Status != wire.ErrExist {
			t.Errorf("answer %d %v", a2.n, a2.rep.Status)
		}
		<-h.enter
		h.leave <- struct{}{}
		want := []int{3}
		if cos {
			want = []int{3, 4}
		}
		for _, n := range want {
			if a := <-order; a.n != n || a.rep.Status != wire.OK {
				t.Errorf("answer %d %v, want %d", a.n, a.rep.Status, n)
			}
		}
		h.hold.Store(false)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := b.e.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedRecords: unreadable records give ErrIO and nothing else.
func TestDamagedRecords(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "a")
	g := b.create(wire.RootFID, "b")
	b.close()
	b.open()
	bt := b.e.NewBatch()
	bt.Set(appendInodeKey(nil, f), []byte("garbage"))
	bt.Set(appendNameKey(nil, wire.RootFID, []byte("b")), []byte{1, 2})
	bt.Delete(appendInodeKey(nil, g))
	bt.Set(appendNameKey(nil, wire.RootFID, []byte("c")), AppendEntry(nil, &Entry{FID: g, Type: wire.TypeReg, Cookie: 9}))
	bt.Set(appendCookieKey(nil, wire.RootFID, 10), []byte{7})
	if err := b.e.Apply(bt); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][3]wire.Status{
		"a": {wire.ErrIO, wire.ErrIO, wire.ErrIO},
		"b": {wire.ErrIO, wire.ErrIO, wire.ErrIO},
		"c": {wire.ErrNoEnt, wire.ErrIO, wire.ErrIO},
	} {
		for i, op := range []wire.Op{wire.OpLookup, wire.OpRemove, wire.OpRename} {
			rep := b.call(&wire.Request{Header: wire.Header{Op: op}, FID: wire.RootFID, Name: []byte(name), FID2: wire.RootFID, Name2: []byte("z")})
			if rep.Status != want[i] {
				t.Errorf("op %d %s: %v, want %v", op, name, rep.Status, want[i])
			}
		}
	}
	if rep := b.call(&wire.Request{Header: wire.Header{Op: wire.OpReaddir}, FID: wire.RootFID, Count: 1000, Plus: true}); rep.Status != wire.OK || !rep.EOF {
		t.Errorf("readdir: %v", rep.Status)
	}
	if err := checkStore(b.e); err == nil {
		t.Error("the checker finds nothing")
	}
	b.close()
}

func TestBadRequests(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	defer b.close()
	for _, req := range []*wire.Request{
		{Header: wire.Header{Op: 0}}, {Header: wire.Header{Op: 31}}, {Header: wire.Header{Op: 65535}},
		{Header: wire.Header{Op: wire.OpWrite}}, {Header: wire.Header{Op: wire.OpRead}},
		{Header: wire.Header{Op: wire.OpTruncateDone}, LogIDs: make([]uint64, maxBatchItems+1)},
		{Header: wire.Header{Op: wire.OpCloseEpoch}, Epochs: make([]wire.EpochClose, maxBatchItems+1)},
		{Header: wire.Header{Op: wire.OpCreate}, FID: wire.RootFID, Name: []byte("x"), How: 9},
		{Header: wire.Header{Op: wire.OpSetattr}, FID: wire.RootFID, SetAttr: wire.SetAttr{Mask: 1 << 15}},
	} {
		if rep := b.call(req); rep.Status != wire.ErrProto {
			t.Errorf("op %d: %v", req.Op, rep.Status)
		}
	}
	for _, f := range []wire.FID{{}, {Seq: math.MaxUint64, OID: 1}, {Seq: 1, OID: 1, Ver: 1}} {
		for op := wire.OpGetattr; op <= wire.OpTouchAtime; op++ {
			req := &wire.Request{Header: wire.Header{Op: op}, FID: f, FID2: f, Name: []byte("n"), Name2: []byte("m"), Type: wire.TypeFifo}
			rep := b.call(req)
			if op == wire.OpTruncateDone || op == wire.OpCloseEpoch {
				continue
			}
			if rep.Status != wire.ErrStale {
				t.Errorf("op %d of %v: %v", op, f, rep.Status)
			}
		}
	}
}

func FuzzDecodeInode(f *testing.F) {
	f.Add(AppendInode(nil, &Inode{Attr: wire.Attr{Type: wire.TypeDir}, NextCookie: 3}))
	f.Add(AppendInode(nil, &Inode{Attr: wire.Attr{Type: wire.TypeReg, EpochOpen: true, Layout: wire.Layout{StripeSize: 1, Count: 2}}, HasVerf: true, Opens: 1}))
	f.Add(AppendInode(nil, &Inode{Attr: wire.Attr{Type: wire.TypeReg, EpochOpen: true, MtimeAt: 7}, Opens: 2}))
	f.Add(AppendInode(nil, &Inode{Attr: wire.Attr{Type: wire.TypeLnk}}))
	f.Fuzz(func(t *testing.T, v []byte) {
		fid := wire.FID{Seq: 2, OID: 3}
		in, err := DecodeInode(fid, v)
		if err != nil {
			return
		}
		again, err := DecodeInode(fid, AppendInode(nil, in))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(in, again, cmpopts.IgnoreUnexported(Inode{})); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzDecodeOthers(f *testing.F) {
	f.Add(AppendEntry(nil, &Entry{Type: wire.TypeReg}))
	f.Add(AppendLogRec(nil, &LogRec{Kind: LogUnlink, Layout: wire.Layout{StripeSize: 1, Count: 3}}))
	f.Add(appendCookieRec(nil, wire.RootFID, wire.TypeDir, []byte("name")))
	f.Add(AppendLogRec(nil, &LogRec{Kind: LogTruncate, Client: testClient, Layout: wire.Layout{StripeSize: 1, Count: 3}}))
	f.Add(appendState(nil, &State{}))
	f.Add(appendSuper(nil, &Super{}))
	f.Add(AppendClient(nil, &ClientEntry{ClientRecord: recov.ClientRecord{Client: testClient, Gen: 1}, Tenure: 9}))
	f.Add(AppendFence(nil, &FenceRec{Tenure: 9, OSTs: []uint16{0, 4}}))
	f.Add(appendOutcome(nil, &outcome{Time: 1, FID: wire.RootFID, Layout: wire.Layout{StripeSize: 1, Count: 2}, Created: true}))
	f.Add(appendOutcome(nil, &outcome{Pre: [4]uint64{1, 2}, Truncate: wire.Truncate{LogID: 1, Size: 2}, Count: 3}))
	f.Fuzz(func(t *testing.T, v []byte) {
		if e, err := DecodeEntry(v); err == nil && !bytes.Equal(AppendEntry(nil, &e), v) {
			t.Error("entry")
		}
		if l, err := DecodeLogRec(1, v); err == nil && !bytes.Equal(AppendLogRec(nil, &l), v) {
			t.Error("log record")
		}
		if f, typ, name, err := DecodeCookieRec(v); err == nil && !bytes.Equal(appendCookieRec(nil, f, typ, name), v) {
			t.Error("cookie")
		}
		if s, err := DecodeState(v); err == nil && !bytes.Equal(appendState(nil, &s), v) {
			t.Error("state")
		}
		// The last byte was used by older versions.
		if s, err := DecodeSuper(v); err == nil && !bytes.Equal(appendSuper(nil, &s)[:9], v[:9]) {
			t.Error("superblock")
		}
		// As with a checksum that fits.
		for _, v := range [][]byte{v, seal(bytes.Clone(v), 0)} {
			if c, err := DecodeClient(testClient, v); err == nil && c.Tenure != 0 && !bytes.Equal(AppendClient(nil, &c), v) {
				t.Error("client")
			}
			if f, err := DecodeFence(v); err == nil && !bytes.Equal(AppendFence(nil, &f), v) {
				t.Error("fence")
			}
		}
		if o, err := decodeOutcome(v); err == nil && !bytes.Equal(appendOutcome(nil, &o), v) {
			t.Error("outcome")
		}
		if n, err := decodeU64Rec(v); err == nil && !bytes.Equal(appendU64Rec(nil, n), v) {
			t.Error("number")
		}
	})
}

func TestEmptyEngineIsNotAnMDT(t *testing.T) {
	e, err := openEngine(vfs.NewMem(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if _, err := ReadSuper(e); !errors.Is(err, store.ErrNotFound) {
		t.Error(err)
	}
	if _, err := Open(Options{}); err == nil {
		t.Error("opened without an engine")
	}
}

// slowEngine lets a test act between a read of the engine and its return.
type slowEngine struct {
	store.Engine
	after func()
}

func (e *slowEngine) Get(k, buf []byte) ([]byte, error) {
	v, err := e.Engine.Get(k, buf)
	if f := e.after; f != nil {
		e.after = nil
		f()
	}
	return v, err
}

// TestStaleFill: what a reader took from the engine before a change does not
// get into the cache after it.
func TestStaleFill(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "a")
	b.close()
	b.open()
	e := &slowEngine{Engine: b.e}
	b.m.e = e
	get := func(f wire.FID) *wire.Reply {
		return b.call(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: f})
	}
	look := func(name string) *wire.Reply {
		return b.call(&wire.Request{Header: wire.Header{Op: wire.OpLookup}, FID: wire.RootFID, Name: []byte(name)})
	}
	e.after = func() {
		b.must(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: wire.RootFID, Name: []byte("a")})
	}
	if rep := get(f); rep.Status != wire.OK {
		t.Fatal(rep.Status) // it was there when it was read
	}
	if rep := get(f); rep.Status != wire.ErrStale {
		t.Errorf("a removed file: %v", rep.Status)
	}
	look("..") // the root is cached now
	e.after = func() { b.create(wire.RootFID, "n") }
	if rep := look("n"); rep.Status != wire.ErrNoEnt {
		t.Fatal(rep.Status)
	}
	if rep := look("n"); rep.Status != wire.OK {
		t.Errorf("a new name: %v", rep.Status)
	}
	b.m.e = b.e
	b.close()
}

// TestLayoutOfNewFiles: new files go round over the OSTs that are up and have space,
// and over all while none is up, which only their writers have to wait for.
func TestLayoutOfNewFiles(t *testing.T) {
	var osts []OSTState
	b := newBed(t, vfs.NewMem(), Options{StripeCount: 2, StripeSize: 1 << 20, OSTs: func() []OSTState { return osts }})
	creates := func(name string) *wire.Request {
		return &wire.Request{Header: wire.Header{Op: wire.OpCreate}, FID: wire.RootFID, Name: []byte(name), SetAttr: mode(0o644)}
	}
	up := func(i uint16, free uint64) OSTState { return OSTState{Index: i, Up: true, Free: free} }
	down := func(i uint16) OSTState { return OSTState{Index: i, Free: 1 << 40} }
	for n, x := range []struct {
		what  string
		osts  []OSTState
		count uint8
		want  []uint16 // allowed
	}{
		{"all up", []OSTState{up(0, 1<<40), up(1, 1<<40), up(2, 1<<40)}, 2, []uint16{0, 1, 2}},
		{"one down", []OSTState{up(0, 1<<40), down(1), up(2, 1<<40)}, 2, []uint16{0, 2}},
		{"one nearly full", []OSTState{up(0, 1<<40), up(1, 1<<20), up(2, 1<<40)}, 2, []uint16{0, 2}},
		{"nearly full or down", []OSTState{up(0, 1<<40), up(1, 1<<20), down(2)}, 2, []uint16{0, 1}},
		{"two down", []OSTState{down(0), down(1), up(2, 1<<40)}, 1, []uint16{2}},
		{"none up", []OSTState{down(0), down(1), down(2)}, 2, []uint16{0, 1, 2}},
	} {
		osts = x.osts
		used := map[uint16]bool{}
		for i := range 6 {
			rep := b.call(creates(fmt.Sprintf("%d.%d", n, i)))
			l := rep.Attr.Layout
			if rep.Status != wire.OK || l.Count != x.count || l.Count == 2 && l.OST[0] == l.OST[1] {
				t.Fatalf("%s: %v, layout %+v", x.what, rep.Status, l)
			}
			for _, o := range l.OST[:l.Count] {
				if !slices.Contains(x.want, o) {
					t.Errorf("%s: a file on OST %d", x.what, o)
				}
				used[o] = true
			}
		}
		if len(used) != len(x.want) {
			t.Errorf("%s: files on %v only", x.what, used)
		}
	}
	osts = nil
	if rep := b.call(creates("nowhere")); rep.Status != wire.ErrJukebox {
		t.Error("without any OST:", rep.Status)
	}
}
