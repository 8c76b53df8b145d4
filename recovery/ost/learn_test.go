package ost

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// What the MDT tells is durable before anybody connects: epochs, fences, the
// objects of removed files (RO 6, RO 7, RS 89), and who need not be waited for.
func TestLearn(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m, SegShift: 13})
	kept, evicted, restarted := remote(t, g, 1), remote(t, g, 2), remote(t, g, 3)
	ahead := recov.ClientRecord{Client: wire.ClientID{4}, Gen: 9}
	if err := register(g, ahead); err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 20000)
	for _, f := range []uint32{1, 2, 64, 128} {
		for s := range uint8(3) {
			q := writeOf(kept, uint64(f), fid(f), 0, string(big))
			q.Stripe = s
			do(t, g, q)
		}
	}
	if err := g.Commit(); err != nil {
		t.Fatal(err)
	}
	before := do(t, g, writeOf(evicted, 7, fid(2), 0, "y"))
	m = powerless(g, m)
	opts := Options{FS: m, SegShift: 13, BootID: "b2"}
	g = openOnly(t, opts)
	info := &wire.OSTInfo{
		VIPs:     []wire.VIPEpoch{{VIP: 1, Epoch: 5}, {VIP: 2, Epoch: 6}},
		Clients:  []wire.ClientInfo{{ID: kept.Client, Gen: 1}, {ID: restarted.Client, Gen: 2}, {ID: ahead.Client, Gen: 8}, {ID: wire.ClientID{77}, Gen: 1}},
		Fences:   []wire.Fence{{ID: evicted.Client, Tenure: 11}},
		Epochs:   []wire.EpochInfo{{FID: fid(2), Client: kept.Client}},
		Unlinked: []wire.FID{fid(1), fid(128), fid(999)},
	}
	renames := &superFS{Mem: m}
	g.fs = renames
	if err := g.Learn(info); err != nil {
		t.Fatal(err)
	}
	if n := renames.n.Load(); n != 1 {
		t.Fatalf("%d rewrites", n)
	}
	check := func(g *Target) {
		t.Helper()
		var ids []byte
		for _, c := range tableOf(t, g).Clients {
			ids = append(ids, c.Client[0])
		}
		if d := cmp.Diff([]byte{1, 4}, ids); d != "" {
			t.Fatal(d)
		}
		if g.VIPEpoch(1) != 5 || g.VIPEpoch(2) != 6 || g.VIPEpoch(3) != 0 || g.admit.tables.Load().fences[evicted.Client] != 11 {
			t.Fatal("epochs or fences are missing")
		}
		var left []wire.FID
		if err := g.WalkObjects(func(i ObjectInfo) {
			if i.Err != nil {
				t.Error(i.Name, i.Err)
			}
			left = append(left, i.FID)
		}); err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(left, func(a, b wire.FID) int { return int(a.OID) - int(b.OID) })
		if d := cmp.Diff([]wire.FID{fid(2), fid(2), fid(2), fid(64), fid(64), fid(64)}, left); d != "" {
			t.Fatal(d)
		}
	}
	check(g)
	m = powerless(g, m)
	opts.FS, opts.BootID = m, "b3"
	g = openOnly(t, opts)
	check(g)

	// Replays for open epochs are executed, others are not.
	if err := g.Learn(info); err != nil {
		t.Fatal(err)
	}
	replay := func(c recov.ClientRecord, o wire.Op, f uint32, transno uint64) *wire.Reply {
		q := writeOf(c, 100, fid(f), 0, "replayed")
		if q.Op = o; o == wire.OpPunch {
			q.Size, q.LogID, q.Bulk = 3, 1, nil
		}
		rep, res := execute(g, q, front.Exec{Transno: transno})
		if rep.Status != wire.OK || res.Transno != transno || o == wire.OpWrite && rep.Count != 8 {
			t.Fatalf("replay: %+v %+v", rep, res)
		}
		return rep
	}
	at := before.Transno
	replay(kept, wire.OpWrite, 1, at+1)
	replay(kept, wire.OpPunch, 128, at+2)
	replay(kept, wire.OpWrite, 64, at+3)
	replay(evicted, wire.OpWrite, 2, at+4)
	if b, _ := read(g, fid(64), 0, 8); string(b) == "replayed" {
		t.Fatal("the replay for a closed epoch was executed")
	}
	check(g)
	if replay(kept, wire.OpWrite, 2, at+5); op(g, wire.OpObjAttr, fid(2)).Obj.Version != at+5 {
		t.Fatal("the replay for an open epoch was not executed")
	}
	if r := replay(kept, wire.OpPunch, 2, at+6); r.Obj.Size != 3 {
		t.Fatal(r.Obj.Size)
	}
	if r := replay(kept, wire.OpDestroy, 64, at+7); r.Obj.Exists {
		t.Fatal("not destroyed")
	}
	g.Begin(at + 7)
	content(t, g, fid(2), "rep")
	if err := g.Learn(info); err == nil {
		t.Fatal("learnt while serving")
	}
	do(t, g, writeOf(kept, 200, fid(1000), 0, "no epochs are asked any more"))
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTruncatesOfTheAbsent: truncates of clients that are gone, or that took no part in
// recovery though the MDT still has them, are done before anything is written, and do
// not cut that off when they come again. Those of the others their clients replay.
func TestTruncatesOfTheAbsent(t *testing.T) {
	m := mem()
	g := open(t, Options{FS: m})
	here, away := remote(t, g, 1), remote(t, g, 2)
	for f := range uint32(3) {
		do(t, g, writeOf(here, uint64(f), fid(f+1), 0, "old old"))
	}
	if err := g.Commit(); err != nil {
		t.Fatal(err)
	}
	m = powerless(g, m)
	g = openOnly(t, Options{FS: m, BootID: "b2"})
	truncate := func(f uint32, by wire.ClientID) wire.ObjTruncate {
		return wire.ObjTruncate{FID: fid(f), Size: 0, LogID: uint64(10 + f), Client: by}
	}
	if err := g.Learn(&wire.OSTInfo{
		Clients:   []wire.ClientInfo{{ID: here.Client, Gen: 1}, {ID: away.Client, Gen: 1}},
		Truncates: []wire.ObjTruncate{truncate(1, here.Client), truncate(2, away.Client), truncate(3, wire.ClientID{}), truncate(4, away.Client)},
	}); err != nil {
		t.Fatal(err)
	}
	g.DelClient(away.Client, 1, false)
	g.Begin(100)
	content(t, g, fid(1), "old old")
	content(t, g, fid(2), "")
	content(t, g, fid(3), "")
	for f := uint32(2); f <= 4; f++ {
		do(t, g, writeOf(here, uint64(20+f), fid(f), 0, "new"))
	}
	for pass := range 2 {
		for f := uint32(2); f <= 4; f++ {
			q := &wire.Request{Header: wire.Header{Op: wire.OpPunch, Flags: wire.FlagWaitCommit}, FID: fid(f), LogID: uint64(10 + f)}
			if rep := do(t, g, q); rep.Obj.Size != 3 {
				t.Errorf("file %d, pass %d: %d bytes", f, pass, rep.Obj.Size)
			}
		}
		// What was written is durable with the punch.
		m = powerless(g, m)
		g = open(t, Options{FS: m, BootID: fmt.Sprint("again", pass)})
	}
}

// A target that cannot take in what it is told does not start.
func TestLearnFails(t *testing.T) {
	f := &superFS{Mem: mem()}
	g := open(t, Options{FS: f})
	want(t, write(g, fid(1), 0, []byte("x"), wire.FileSync), wire.OK)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g = openOnly(t, Options{FS: f})
	f.fail.Store(true)
	if err := g.Learn(&wire.OSTInfo{VIPs: []wire.VIPEpoch{{VIP: 1, Epoch: 1}}}); err == nil {
		t.Fatal("no error")
	}
	f.fail.Store(false)
	g.fs = &noRemove{f}
	if err := g.Learn(&wire.OSTInfo{Unlinked: []wire.FID{fid(1)}}); err == nil {
		t.Fatal("no error")
	}
	g.fs = f
	if err := g.Learn(&wire.OSTInfo{Unlinked: []wire.FID{fid(1)}}); err != nil {
		t.Fatal(err)
	}
	g.Begin(0)
	if g.VIPEpoch(1) != 1 {
		t.Fatal("forgot what it failed to write")
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

type noRemove struct{ objfs.FS }

func (*noRemove) Remove(string) error { return wire.ErrIO }
