package ost

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// gateFS holds writes of objects.
type gateFS struct {
	*objfs.Mem
	hold    atomic.Bool
	entered chan struct{}
	release chan struct{}
}

func newGate() *gateFS {
	return &gateFS{Mem: mem(), entered: make(chan struct{}, 8), release: make(chan struct{})}
}

func (f *gateFS) Pwrite(fd int, p []byte, off int64) (int, error) {
	if off == headerSize && f.hold.Swap(false) {
		f.entered <- struct{}{}
		<-f.release
	}
	return f.Mem.Pwrite(fd, p, off)
}

// A write that was admitted before is executed before the fence is answered,
// others go on meanwhile, and later ones are refused, also after a power failure
// (SM 55).
func TestFenceWaitsForWhatIsUnderWay(t *testing.T) {
	for _, how := range []string{"OpFence", "OpSetVIPEpoch", "RaiseVIP", "OpFence executed", "OpSetVIPEpoch executed"} {
		t.Run(how, func(t *testing.T) {
			f := newGate()
			g := open(t, Options{FS: f})
			c, other := remote(t, g, 1), remote(t, g, 2)
			late := func(xid uint64) *wire.Request {
				q := writeOf(c, xid, fid(1), 10*xid-10, "late") // the first is held and the others must not wait for it
				q.Tenure, q.VIP, q.VIPEpoch = 7, 3, 5
				return q
			}
			f.hold.Store(true)
			rep, e := &wire.Reply{}, &execution{done: make(chan struct{})}
			go g.Execute(late(1), rep, front.Exec{}, e)
			<-f.entered
			answer := make(chan wire.Status, 1)
			q := &wire.Request{Header: wire.Header{Op: wire.OpFence}, Peer: c.Client, Cookie: 8}
			if how == "OpSetVIPEpoch" || how == "OpSetVIPEpoch executed" {
				q = &wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch, VIP: 3, VIPEpoch: 6}}
			}
			frep, fe := &wire.Reply{}, &execution{done: make(chan struct{})}
			switch how {
			case "RaiseVIP":
				g.RaiseVIP(3, 6, func(err error) { answer <- g.statusOf(err) })
			case "OpFence", "OpSetVIPEpoch":
				g.Handle(q, frep, func() { answer <- frep.Status })
			default:
				g.Execute(q, frep, front.Exec{}, fe)
				go func() { <-fe.done; answer <- frep.Status }()
			}
			refuse := wire.ErrTooLate
			if q.Op == wire.OpSetVIPEpoch || how == "RaiseVIP" {
				refuse = wire.ErrStaleVIP
			}
			// Refused as soon as it is durable, whoever is still waited for.
			for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
				r, res := execute(g, late(2), front.Exec{})
				if r.Status == refuse && res.NotDone {
					break
				}
				if r.Status != wire.OK || time.Now().After(end) {
					t.Fatal(r.Status)
				}
			}
			do(t, g, writeOf(other, 1, fid(1), 100, "other"))
			select {
			case st := <-answer:
				t.Fatalf("answered %v while an older write is under way", st)
			default:
			}
			close(f.release)
			if st := <-answer; st != wire.OK {
				t.Fatal(st)
			}
			if b, _ := read(g, fid(1), 0, 4); string(b) != "late" {
				t.Fatalf("answered before the older write was executed: %q", b)
			}
			<-e.done
			if rep.Status != wire.OK {
				t.Fatal(rep.Status)
			}
			if how != "RaiseVIP" && frep.Transno == 0 {
				t.Fatal("no transno")
			}
			f2 := &gateFS{Mem: powerless(g, f.Mem)}
			g = open(t, Options{FS: f2, BootID: "b2"})
			if r, _ := execute(g, late(3), front.Exec{}); r.Status != refuse {
				t.Fatal(r.Status)
			}
			q2 := late(4)
			q2.Tenure, q2.VIPEpoch = 8, 6
			do(t, g, q2)
			if g.Tenure(c.Client) != 0 || how != "OpFence" && how != "OpFence executed" && g.VIPEpoch(3) != 6 {
				t.Fatal("VIP epoch is gone")
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A clean stop waits for what is under way and has it on the disk.
func TestCleanStopWaitsForWhatIsUnderWay(t *testing.T) {
	f := newGate()
	g := open(t, Options{FS: f})
	c := remote(t, g, 1)
	f.hold.Store(true)
	rep, e := &wire.Reply{}, &execution{done: make(chan struct{})}
	go g.Execute(writeOf(c, 1, fid(1), 0, "late"), rep, front.Exec{}, e)
	<-f.entered
	stopped := make(chan error, 1)
	go func() { stopped <- g.PutTarget(recov.TargetRecord{Instance: 1, Clean: true}) }()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		r, _ := execute(g, writeOf(c, 2, fid(2), 0, "x"), front.Exec{})
		if r.Status == wire.ErrTargetDown {
			break
		}
		if r.Status != wire.OK || time.Now().After(end) {
			t.Fatal(r.Status)
		}
	}
	// Long enough for a stop that does not wait.
	for range 20 {
		if s, err := readSuper(f.Mem); err != nil || s.Clean {
			t.Fatal("clean while a write is under way", err)
		}
		time.Sleep(time.Millisecond)
	}
	close(f.release)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	<-e.done
	g = openOnly(t, Options{FS: powerless(g, f.Mem), BootID: "b2"})
	if g.LostUnflushed() {
		t.Fatal("not clean")
	}
	content(t, g, fid(1), "late")
	g.Close()
}

// What fences and epochs refuse, and that lower ones change nothing.
func TestFenceRules(t *testing.T) {
	g := open(t, Options{FS: mem()})
	c := remote(t, g, 1)
	fence := func(peer wire.ClientID, tenure uint64) wire.Status {
		return call(g, &wire.Request{Header: wire.Header{Op: wire.OpFence}, Peer: peer, Cookie: tenure}).Status
	}
	try := func(o wire.Op, tenure uint64) wire.Status {
		return call(g, &wire.Request{Header: wire.Header{Op: o, Client: c.Client, ClientGen: 1, Tenure: tenure}, FID: fid(1), Bulk: make([]byte, 1)}).Status
	}
	for _, x := range []struct{ got, want wire.Status }{
		{fence(wire.ClientID{}, 3), wire.ErrProto},
		{fence(c.Client, 5), wire.OK},
		{fence(c.Client, 4), wire.OK},
		{try(wire.OpWrite, 4), wire.ErrTooLate},
		{try(wire.OpRead, 0), wire.ErrTooLate},
		{try(wire.OpWrite, 5), wire.OK},
		{call(g, &wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch}}).Status, wire.ErrProto},
	} {
		if x.got != x.want {
			t.Fatalf("%v, want %v", x.got, x.want)
		}
	}
	// Replays are not asked: they are of requests that were admitted once.
	g.Handle(&wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch, VIP: 1, VIPEpoch: 9}}, &wire.Reply{}, func() {})
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g = openOnly(t, Options{FS: g.fs})
	old := g.base
	q := writeOf(c, 9, fid(1), 0, "x")
	q.VIP, q.VIPEpoch = 1, 8
	g.startTransno += 10 // as if the last run had told of numbers
	for i, q := range []*wire.Request{q,
		{Header: wire.Header{Op: wire.OpSetVIPEpoch, VIP: 1, VIPEpoch: 8}},
		{Header: wire.Header{Op: wire.OpFence}, Peer: c.Client, Cookie: 1},
		{Header: wire.Header{Op: wire.OpDestroy}, FID: fid(1)},
	} {
		rep, res := execute(g, q, front.Exec{Transno: old + uint64(i) + 1})
		if rep.Status != wire.OK || res.Transno != old+uint64(i)+1 || res.Mismatch {
			t.Fatalf("replay of %v: %v %+v", q.Op, rep.Status, res)
		}
	}
	if g.VIPEpoch(1) != 9 || g.admit.tables.Load().fences[c.Client] != 5 {
		t.Fatal("a replay has lowered an epoch")
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}
