package mdt

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// TestLostClients leaves the operations of one or two of four clients out of the
// replay. Every other operation then has exactly its first result, or it meets
// other versions, is told so, and changes nothing; and it has its first result if
// nothing that it has met was lost (RV 7a-7i, 8a-8c, 10b, 11a, 11b).
func TestLostClients(t *testing.T) {
	good, bad := 0, 0
	for _, seed := range twinSeeds(4, 8) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 12))
			tw := newTwins(t, rng, 4)
			tw.names = 30 // larger directories, less in each other's way
			for range 4 {
				tw.ahead()
				// Everybody also works in a place of its own.
				for i := range tw.clients {
					tw.own(i)
				}
				for range 150 + rng.IntN(150) {
					tw.step()
				}
				tw.crash()
				lost := map[int]bool{rng.IntN(4): true}
				if rng.IntN(3) == 0 {
					lost[rng.IntN(4)] = true
				}
				failed := map[uint64]bool{}
				for i := range tw.kept {
					k := &tw.kept[i]
					if lost[k.client] {
						failed[k.req.Transno] = true
						continue
					}
					builds := false
					for _, v := range k.req.PreVersions {
						builds = builds || failed[v]
					}
					before := contents(t, tw.b.e)
					again := tw.b.replay(k.req)
					desc := fmt.Sprintf("replay %d of op %d", k.req.Transno, k.req.Op)
					if !again.res.Mismatch {
						if k.req.Op == wire.OpCreate && !k.first.rep.Created {
							// It has not touched the directory, so the version of that does not
							// count: it may have lost something since.
							again.rep.DirAttr, again.rep.DirPre = k.first.rep.DirAttr, k.first.rep.DirPre
						}
						if d := sameAnswer(&again.rep, &k.first.rep); d != "" {
							t.Fatalf("%s has another answer: %s", desc, d)
						}
						if string(again.res.Data) != string(k.first.res.Data) || again.res.Status != wire.OK || again.res.Transno != k.req.Transno {
							t.Fatalf("%s: %+v, first %+v", desc, again.res, k.first.res)
						}
						if builds {
							t.Fatalf("%s goes well on what is lost: %d", desc, k.req.PreVersions)
						}
						good++
						continue
					}
					bad++
					failed[k.req.Transno] = true
					if again.res.Transno != 0 || again.rep.Transno != 0 || again.res.Status == wire.OK || again.res.Status != again.rep.Status {
						t.Fatalf("%s: %+v", desc, again.res)
					}
					if d := diffContents(contents(t, tw.b.e), before); d != "" {
						t.Fatalf("%s has failed and changed:%s", desc, d)
					}
					// A directory may have moved into itself, a truncate may not be
					// reported: that is not in the versions.
					if !builds && k.req.Op != wire.OpRename && k.req.Op != wire.OpCloseEpoch {
						t.Fatalf("%s fails with %v, though %d are as they were (want %d)", desc, again.rep.Status, k.req.PreVersions, again.res.PreVersions)
					}
				}
				if err := checkStore(tw.b.e); err != nil {
					t.Fatal(err)
				}
				// The one that lost clients is the truth from here on; what is in memory
				// is what is in the store.
				tw.kept = nil
				tw.w.kill()
				_, n := tw.b.e.ends()
				tw.w.e = tw.b.e.cut(n)
				tw.w.open()
				tw.b.restart()
				tw.b.begin(0)
				tw.w.begin(0)
				tw.last = nil
			}
		})
	}
	t.Logf("%d went well, %d did not", good, bad)
	if good < 20 || bad < 10 {
		t.Errorf("%d went well, %d did not", good, bad)
	}
}

// own lets a client work in a directory where nobody else does.
func (tw *twins) own(i int) {
	tw.t.Helper()
	both := func(req wire.Request) wire.FID {
		tw.xid++
		req.Client, req.ClientGen, req.XID = tw.clients[i], 1, tw.xid
		tw.clock()
		got, want := tw.b.ok(&req, execOf(&req)), tw.w.ok(&req, execOf(&req))
		if d := sameAnswer(&got.rep, &want.rep); d != "" {
			tw.t.Fatal(d)
		}
		if got.rep.Transno > got.rep.LastCommitted {
			tw.kept = append(tw.kept, keptOp{i, replayOf(&req, &got.rep), got})
		}
		return got.rep.Attr.FID
	}
	d := both(wire.Request{Header: wire.Header{Op: wire.OpMkdir}, FID: wire.RootFID, Name: fmt.Appendf(nil, "own%d.%d", i, tw.xid), SetAttr: mode(0o700)})
	for n := range 5 {
		f := both(wire.Request{Header: wire.Header{Op: wire.OpCreate, Flags: wire.FlagOpenEpoch}, FID: d, Name: fmt.Appendf(nil, "f%d", n), SetAttr: mode(0o600)})
		both(wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: f, SetAttr: mode(0o640)})
		if n%2 == 0 {
			both(wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: d, Name: fmt.Appendf(nil, "f%d", n)})
		}
	}
}

// vbrCase is a history of two clients, of which B is lost with what it did.
type vbrCase struct {
	ids    string
	before []vbrOp // durable
	ops    []vbrOp
}

// vbrOp is one operation: its client, what, on which names below the directory
// of that number.
type vbrOp struct {
	client byte
	op     wire.Op
	dir    int
	name   string
	dir2   int
	name2  string
	fails  bool // its replay meets other versions
}

// TestVersionRecovery goes through the scenarios of version recovery. Names of one
// directory depend on each other, since a directory's entries have cookies that
// nobody may give twice; those of different directories do not.
func TestVersionRecovery(t *testing.T) {
	const cr, un, re, mk, mn, sa = wire.OpCreate, wire.OpRemove, wire.OpRename, wire.OpMkdir, wire.OpMknod, wire.OpSetattr
	f := func(c byte, op wire.Op, dir int, name string) vbrOp {
		return vbrOp{client: c, op: op, dir: dir, name: name}
	}
	mv := func(c byte, dir int, name string, dir2 int, name2 string) vbrOp {
		return vbrOp{client: c, op: re, dir: dir, name: name, dir2: dir2, name2: name2}
	}
	bad := func(o vbrOp) vbrOp { o.fails = true; return o }
	cases := []vbrCase{
		{"RV 7a: create, lost create, create", nil,
			[]vbrOp{f('A', cr, 0, "a"), f('B', cr, 0, "b"), bad(f('A', cr, 0, "c"))}},
		{"RV 7a elsewhere", nil,
			[]vbrOp{f('A', cr, 0, "a"), f('B', cr, 1, "b"), f('A', cr, 0, "c")}},
		{"RV 7b: create, lost unlink, unlink", []vbrOp{f('A', cr, 0, "x")},
			[]vbrOp{f('A', cr, 0, "a"), f('B', un, 0, "x"), bad(f('A', un, 0, "a"))}},
		{"RV 7b elsewhere", []vbrOp{f('A', cr, 1, "x")},
			[]vbrOp{f('A', cr, 0, "a"), f('B', un, 1, "x"), f('A', un, 0, "a")}},
		{"RV 7c: create, lost create, rename of what is lost", nil,
			[]vbrOp{f('A', cr, 0, "a"), f('B', cr, 1, "b"), bad(mv('A', 1, "b", 1, "c"))}},
		{"RV 7c elsewhere", nil,
			[]vbrOp{f('A', cr, 0, "a"), f('B', cr, 1, "b"), mv('A', 0, "a", 2, "c")}},
		{"RV 7d: unlink, lost unlink, create of the name", []vbrOp{f('A', cr, 0, "a"), f('A', cr, 1, "b")},
			[]vbrOp{f('A', un, 0, "a"), f('B', un, 1, "b"), bad(f('A', cr, 1, "b"))}},
		{"RV 7e: unlink, lost create, unlink of the name", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{f('A', un, 0, "a"), f('B', cr, 1, "b"), bad(f('A', un, 1, "b"))}},
		{"RV 7f: unlink, lost rename, rename of the new name", []vbrOp{f('A', cr, 0, "a"), f('A', cr, 1, "b")},
			[]vbrOp{f('A', un, 0, "a"), mv('B', 1, "b", 1, "c"), bad(mv('A', 1, "c", 1, "d"))}},
		{"RV 7g: rename, lost unlink, create elsewhere", []vbrOp{f('A', cr, 0, "a"), f('A', cr, 1, "b")},
			[]vbrOp{mv('A', 0, "a", 0, "a2"), f('B', un, 1, "b"), f('A', cr, 0, "c")}},
		{"RV 7h: rename, lost attributes, unlink", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{mv('A', 0, "a", 0, "a2"), f('B', sa, 0, "a2"), bad(f('A', un, 0, "a2"))}},
		{"RV 7i: rename, lost rename back, rename", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{mv('A', 0, "a", 0, "b"), mv('B', 0, "b", 0, "a"), bad(mv('A', 0, "a", 0, "b"))}},
		{"RV 8a: a durable create, unlink and create of the name, a gap elsewhere", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{f('A', un, 0, "a"), f('B', cr, 1, "x"), f('A', cr, 0, "a")}},
		{"RV 8b: then a device", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{f('A', un, 0, "a"), f('B', cr, 1, "x"), f('A', mn, 0, "a")}},
		{"RV 8c: then a directory", []vbrOp{f('A', cr, 0, "a")},
			[]vbrOp{f('A', un, 0, "a"), f('B', cr, 1, "x"), f('A', mk, 0, "a")}},
		{"RV 10b: all, some and none of three clients", nil,
			[]vbrOp{
				f('A', cr, 0, "a"), f('C', cr, 1, "c"), f('B', cr, 2, "b"), bad(f('D', sa, 2, "b")), f('A', cr, 0, "a2"),
				bad(f('C', cr, 2, "c2")), f('C', cr, 1, "c3"), bad(f('D', un, 2, "b")),
			}},
		{"RV 11a: creates of two clients side by side", nil,
			[]vbrOp{f('A', cr, 0, "a1"), f('B', cr, 1, "b1"), f('A', cr, 0, "a2"), f('B', cr, 1, "b2"), f('A', cr, 0, "a3")}},
		{"RV 11b: creates and unlinks side by side", []vbrOp{f('A', cr, 0, "a1"), f('A', cr, 1, "b1")},
			[]vbrOp{f('A', un, 0, "a1"), f('B', un, 1, "b1"), f('A', cr, 0, "a2"), f('B', cr, 1, "b2"), f('A', un, 0, "a2")}},
		{"RV 12a: what is lost is gone, its reader is not", nil,
			[]vbrOp{f('B', cr, 1, "b"), f('A', cr, 0, "a")}},
	}
	for _, c := range cases {
		t.Run(c.ids, func(t *testing.T) { c.run(t) })
	}
}

func (c *vbrCase) run(t *testing.T) {
	b := newBody(t, Options{RootMode: 0o777})
	b.begin(0)
	for i := range 4 {
		b.put(wire.ClientID{'A' + byte(i)}, 1)
	}
	var dirs [3]wire.FID
	xid := uint64(0)
	do := func(o vbrOp) (*wire.Request, *outcomeOf) {
		xid++
		b.now += 1000
		req := &wire.Request{Header: wire.Header{Op: o.op, Client: wire.ClientID{o.client}, ClientGen: 1, XID: xid}, FID: dirs[o.dir], Name: []byte(o.name), SetAttr: mode(0o600)}
		switch o.op {
		case wire.OpRename:
			req.FID2, req.Name2 = dirs[o.dir2], []byte(o.name2)
		case wire.OpMknod:
			req.Type = wire.TypeFifo
		case wire.OpSetattr:
			ent, err := ReadEntry(b.e, req.FID, req.Name)
			if err != nil {
				t.Fatal(err)
			}
			req.FID, req.Name = ent.FID, nil
		}
		return req, b.ok(req, execOf(req))
	}
	for i := range dirs {
		dirs[i] = wire.RootFID
		_, e := do(vbrOp{client: 'A', op: wire.OpMkdir, dir: i, name: fmt.Sprint("d", i)})
		dirs[i] = e.rep.Attr.FID
	}
	for _, o := range c.before {
		do(o)
	}
	b.sync()
	b.e.hold()
	n, _ := b.e.ends()
	var kept []*wire.Request
	for _, o := range c.ops {
		req, e := do(o)
		kept = append(kept, replayOf(req, &e.rep))
	}
	b.crash(n)
	for i, o := range c.ops {
		if o.client == 'B' {
			continue
		}
		e := b.replay(kept[i])
		if e.res.Mismatch != o.fails {
			t.Errorf("operation %d: status %v, mismatch %v, want %v", i, e.rep.Status, e.res.Mismatch, o.fails)
		}
		if want := wire.OK; !o.fails && e.rep.Status != want {
			t.Errorf("operation %d: %v", i, e.rep.Status)
		}
	}
	if err := checkStore(b.e); err != nil {
		t.Error(err)
	}
	// Lost objects are gone, their client's entry stays until recovery decides.
	for i, o := range c.ops {
		if _, err := ReadEntry(b.e, dirs[o.dir], []byte(o.name)); o.client == 'B' && o.op == wire.OpCreate && err == nil {
			t.Errorf("operation %d is lost, and its file is there", i)
		}
	}
}

// TestReplayIsChecked: what cannot be a replay of something that this target has
// executed is refused and changes nothing.
func TestReplayIsChecked(t *testing.T) {
	b := newBody(t, Options{})
	a := wire.ClientID{'A'}
	b.begin(0)
	b.put(a, 1)
	b.sync()
	b.e.hold()
	n, _ := b.e.ends()
	h := wire.Header{Client: a, ClientGen: 1, XID: 1}
	mk := func(op wire.Op, name string) *wire.Request {
		r := &wire.Request{Header: h, FID: wire.RootFID, Name: []byte(name), SetAttr: mode(0o644), Type: wire.TypeFifo}
		r.Op = op
		return r
	}
	first := b.ok(mk(wire.OpCreate, "a"), execOf(mk(wire.OpCreate, "a")))
	good := replayOf(mk(wire.OpCreate, "a"), &first.rep)
	b.crash(n)
	before := contents(t, b.e)
	try := func(name string, st wire.Status, edit func(r *wire.Request)) {
		t.Helper()
		r := *good
		edit(&r)
		e := b.replay(&r)
		if e.rep.Status != st || e.res.Status != st || e.res.Transno != 0 || !e.res.Mismatch && !e.res.NotDone || e.rep.Created {
			t.Errorf("%s: %v, %+v", name, e.rep.Status, e.res)
		}
		if d := diffContents(contents(t, b.e), before); d != "" {
			t.Errorf("%s changed%s", name, d)
		}
	}
	try("sequence of this start", wire.ErrProto, func(r *wire.Request) { r.Made.FID.Seq = b.m.startSeq })
	try("sequence never given", wire.ErrProto, func(r *wire.Request) { r.Made.FID.Seq = 1 << 40 })
	try("reserved sequence", wire.ErrProto, func(r *wire.Request) { r.Made.FID = wire.FID{Seq: 1, OID: 9} })
	try("no FID", wire.ErrProto, func(r *wire.Request) { r.Made.FID = wire.FID{} })
	try("version in the FID", wire.ErrProto, func(r *wire.Request) { r.Made.FID.Ver = 1 })
	try("no time", wire.ErrProto, func(r *wire.Request) { r.Made.Time = 0 })
	try("a time without end", wire.ErrProto, func(r *wire.Request) { r.Made.Time = 1<<63 - 1 })
	try("no layout", wire.ErrProto, func(r *wire.Request) { r.Made.Layout = wire.Layout{} })
	try("too many stripes", wire.ErrProto, func(r *wire.Request) { r.Made.Layout.Count = wire.MaxStripes + 1 })
	try("stripes of nothing", wire.ErrProto, func(r *wire.Request) { r.Made.Layout.StripeSize = 0 })
	try("other versions", recov.VersionMismatch, func(r *wire.Request) { r.PreVersions[0]++ })
	try("more versions", recov.VersionMismatch, func(r *wire.Request) { r.PreVersions[3] = 7 })
	try("of the past", wire.ErrProto, func(r *wire.Request) { r.Transno = b.m.core.LastApplied() })
	try("a lock operation", wire.ErrProto, func(r *wire.Request) { r.Op, r.Lock = wire.OpUnlock, &wire.LockArgs{} })
	try("an epoch of a service address", wire.ErrProto, func(r *wire.Request) { r.Op, r.VIP, r.VIPEpoch = wire.OpSetVIPEpoch, 1, 5 })
	try("a connect", wire.ErrProto, func(r *wire.Request) { r.Op = wire.OpConnect })
	try("a write", wire.ErrProto, func(r *wire.Request) { r.Op = wire.OpWrite })
	try("of a stranger", wire.ErrUnknownClient, func(r *wire.Request) { r.Client = wire.ClientID{'X'} })
	try("of an older generation", wire.ErrStaleClient, func(r *wire.Request) { r.ClientGen = 0 })
	try("of a newer generation", wire.ErrUnknownClient, func(r *wire.Request) { r.ClientGen = 2 })
	b.e.room = store.RoomNone
	try("on a full disk", wire.ErrTargetDown, func(r *wire.Request) {})
	b.e.room = store.RoomCritical // replays use the reserve

	if e := b.replay(good); e.res.Mismatch || sameAnswer(&e.rep, &first.rep) != "" {
		t.Errorf("the replay: %v %+v", e.rep.Status, e.res)
	}
	before = contents(t, b.e)
	try("the same again", wire.ErrProto, func(r *wire.Request) {})
	try("the same FID for another name", wire.ErrExist, func(r *wire.Request) { r.Transno++; r.Name = []byte("b") })
	if e := b.start(mk(wire.OpMkdir, "d"), front.Exec{}, false); e.rep.Status != wire.ErrRecovering || !e.res.NotDone {
		t.Errorf("a new operation in recovery: %v", e.rep.Status)
	}
	rep := &wire.Reply{}
	b.m.Handle(mk(wire.OpMkdir, "d"), rep, func() {})
	if rep.Status != wire.ErrRecovering {
		t.Errorf("a local operation in recovery: %v", rep.Status)
	}
	b.e.room = store.RoomOK
	b.begin(0)
	before = contents(t, b.e)
	try("after recovery", wire.ErrProto, func(r *wire.Request) { r.Transno = b.m.core.LastApplied() + 1 })
	b.e.allow()
}
