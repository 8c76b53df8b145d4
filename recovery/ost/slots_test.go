package ost

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// slotOf finds a request's slot record.
func slotOf(t front.Table, q *wire.Request) *recov.SlotRecord {
	for i := range t.Slots {
		if s := &t.Slots[i]; s.Client == q.Client && s.Gen == q.ClientGen && s.Slot == q.Slot && s.XID == q.XID {
			return s
		}
	}
	return nil
}

// A request whose answer was lost with the process is not executed over what
// others have written since (SM 148), on real files and in memory.
func TestResendAfterACrashOfTheProcess(t *testing.T) {
	for _, linux := range []bool{false, true} {
		m := mem()
		opts := func() Options { return Options{FS: m} }
		if linux {
			dir := t.TempDir()
			opts = func() Options { return Options{Dir: dir} }
		}
		g := open(t, opts())
		a, b := remote(t, g, 1), remote(t, g, 2)
		lost := writeOf(a, 5, fid(1), 0, "old data")
		w := do(t, g, lost)
		short := writeOf(b, 2, fid(1), 0, "x")
		short.Op, short.Size, short.LogID = wire.OpPunch, 6, 1
		p := do(t, g, short)
		failed := writeOf(b, 3, fid(1), 1<<63, "too far")
		execute(g, failed, front.Exec{})
		do(t, g, writeOf(a, 6, fid(2), 0, "another slot"))
		abandon(g)
		if linux {
			g.closeFiles()
		}
		m.Kill()

		g = openOnly(t, opts())
		tab := tableOf(t, g)
		if len(tab.Slots) != 4 || len(tableOf(t, g).Slots) != 0 {
			t.Fatalf("%+v", tab.Slots)
		}
		g.Begin(0)
		do(t, g, writeOf(b, 4, fid(1), 0, "new data"))
		s := slotOf(tab, lost)
		if s == nil || s.Transno != w.Transno || s.Status != wire.OK {
			t.Fatalf("%+v", s)
		}
		var rep wire.Reply
		g.Rebuild(lost, &rep, s)
		if rep.Status != wire.OK || !rep.Reconstructed || rep.Count != 8 || rep.Transno != w.Transno || rep.XID != 5 || rep.ObjPre.Valid || rep.Obj.Size != 8 {
			t.Fatalf("%+v", rep)
		}
		content(t, g, fid(1), "new data")
		rep = wire.Reply{}
		if g.Rebuild(short, &rep, slotOf(tab, short)); rep.Status != wire.OK || rep.Transno != p.Transno || rep.Obj.Size != 8 || rep.Count != 0 {
			t.Fatalf("%+v", rep)
		}
		rep = wire.Reply{}
		if g.Rebuild(failed, &rep, slotOf(tab, failed)); rep.Status != wire.ErrFBig || rep.Transno != 0 {
			t.Fatalf("%+v", rep)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Which ends of a run the slots survive.
func TestSlotsOverRestarts(t *testing.T) {
	for _, x := range []struct {
		name, boot string
		end        func(g *Target, m *objfs.Mem) *objfs.Mem
		kept       int
	}{
		{"process crash", "boot-1", killed, 2},
		{"power failure", "boot-2", powerless, 0},
		{"a sync that fails at the start", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			m = killed(g, m)
			m.FailSync(wire.ErrIO)
			if g, err := Open(Options{FS: m, BootID: "boot-1", Logger: quiet}); err == nil {
				abandon(g)
			}
			m.FailSync(nil)
			return m // nobody knows what of the data is left
		}, 0},
		{"clean stop, another kernel", "boot-2", func(g *Target, m *objfs.Mem) *objfs.Mem {
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			return m.CrashClone(3)
		}, 2},
		{"damaged head", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			damage(t, killed(g, m), 17)
			return m
		}, 0},
		{"damaged area", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			damage(t, killed(g, m), 4096+9)
			return m
		}, 0},
		{"damaged record", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			damage(t, killed(g, m), 4096+64+1*32)
			return m
		}, 1},
		{"cut file", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			put(t, killed(g, m), "slots", []byte("BTNSLT"))
			return m
		}, 0},
		{"client left", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			g.DelClient(wire.ClientID{1}, 1, true)
			if err := register(g, recov.ClientRecord{Client: wire.ClientID{1}, Gen: 1, Instance: 3}); err != nil {
				t.Fatal(err)
			}
			return killed(g, m)
		}, 0},
		{"new life of the client", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			if err := register(g, recov.ClientRecord{Client: wire.ClientID{1}, Gen: 2}); err != nil {
				t.Fatal(err)
			}
			return killed(g, m)
		}, 0},
		{"a run without slots between", "boot-1", func(g *Target, m *objfs.Mem) *objfs.Mem {
			m = killed(g, m)
			g = open(t, Options{FS: &noMemory{m}})
			return killed(g, m)
		}, 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			m := mem()
			g := open(t, Options{FS: m})
			c := remote(t, g, 1)
			do(t, g, writeOf(c, 1, fid(1), 0, "a"))
			do(t, g, writeOf(c, 2, fid(1), 0, "b"))
			do(t, g, writeOf(c, 5, fid(1), 0, "c"))
			m = x.end(g, m)
			g = openOnly(t, Options{FS: m, BootID: x.boot})
			var got []uint64
			for _, s := range tableOf(t, g).Slots {
				got = append(got, s.XID)
			}
			want := map[int][]uint64{0: nil, 1: {2}, 2: {5, 2}}[x.kept]
			if d := cmp.Diff(want, got); d != "" {
				t.Fatal(d)
			}
			// They go on as if nothing had been.
			g.Begin(0)
			if x.name != "new life of the client" {
				do(t, g, writeOf(c, 9, fid(1), 0, "d"))
				g = openOnly(t, Options{FS: killed(g, m), BootID: x.boot})
				if s := slotOf(tableOf(t, g), writeOf(c, 9, fid(1), 0, "d")); s == nil {
					t.Fatal("nothing is kept any more")
				}
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			if n := m.OpenFDs(); n != 0 {
				t.Fatalf("%d descriptors leaked", n)
			}
		})
	}
}

// noMemory is a disk on which the slots cannot be had.
type noMemory struct{ *objfs.Mem }

func (*noMemory) OpenMemory(string) (objfs.Memory, error) { return nil, wire.ErrROFS }

// damage changes a byte of the slot file.
func damage(t *testing.T, m *objfs.Mem, off int64) {
	t.Helper()
	x, err := m.OpenMemory("slots")
	if err != nil {
		t.Fatal(err)
	}
	b := []byte{0}
	if err := x.Get(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if err := x.Put(b, off); err != nil {
		t.Fatal(err)
	}
	x.Close()
}

// An answer that is rebuilt is as durable as the request asked for.
func TestRebuiltAnswerWaitsForTheDisk(t *testing.T) {
	g := open(t, Options{FS: mem()})
	c := remote(t, g, 1)
	for _, x := range []struct {
		name   string
		change func(q *wire.Request)
		waits  bool
	}{
		{"unstable", func(*wire.Request) {}, false},
		{"stable", func(q *wire.Request) { q.Stable = wire.DataSync }, true},
		{"wait for commit", func(q *wire.Request) { q.Flags |= wire.FlagWaitCommit }, true},
		{"punch", func(q *wire.Request) { q.Op, q.Size, q.LogID, q.Flags = wire.OpPunch, 2, 1, wire.FlagWaitCommit }, true},
		{"destroy", func(q *wire.Request) { q.Op, q.Flags = wire.OpDestroy, wire.FlagWaitCommit }, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			// Executed, but its flush is not over: here, because it asked for none.
			q := writeOf(c, uint64(len(x.name)), fid(1), 0, "data")
			x.change(q)
			first := *q
			first.Stable, first.Flags = wire.Unstable, 0
			w := do(t, g, &first)
			if g.LastCommitted() >= w.Transno {
				t.Fatal("durable already")
			}
			var rep wire.Reply
			g.Rebuild(q, &rep, &recov.SlotRecord{XID: q.XID, Transno: w.Transno})
			if rep.Status != wire.OK || rep.Obj.Exists != (q.Op != wire.OpDestroy) {
				t.Fatalf("%+v", rep)
			}
			if got := rep.LastCommitted >= w.Transno; got != x.waits {
				t.Fatalf("durable: %v", got)
			}
			if err := g.Commit(); err != nil {
				t.Fatal(err)
			}
		})
	}
	// Of an object that cannot be read the answer is an error.
	q := writeOf(c, 50, fid(9), 0, "data")
	g.fs.(*objfs.Mem).FailOpen(wire.ErrIO)
	var rep wire.Reply
	if g.Rebuild(q, &rep, &recov.SlotRecord{XID: 50}); rep.Status != wire.ErrIO {
		t.Fatal(rep.Status)
	}
	g.fs.(*objfs.Mem).FailOpen(nil)
	g.Close()
}
