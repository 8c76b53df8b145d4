package tcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/internal/clock"
	"github.com/baton-nfs/baton/recovery/client"
	"github.com/baton-nfs/baton/recovery/mdt"
	"github.com/baton-nfs/baton/recovery/ost"
	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/wire"
)

// realTargets are an MDT and OSTs over stores in memory.
func realTargets(t testing.TB, clk *clock.Strict, osts int) map[string]wire.Target {
	t.Helper()
	targets := map[string]wire.Target{}
	var states []mdt.OSTState
	for i := range osts {
		x, err := ost.Open(ost.Options{Index: uint16(i), FS: objfs.NewMem(clk.Now), BootID: "boot", Clock: clk.Now})
		if err != nil {
			t.Fatal(err)
		}
		x.Begin(0)
		t.Cleanup(func() { x.Close() })
		targets[fmt.Sprintf("ost%d", i)] = x
		states = append(states, mdt.OSTState{Index: uint16(i), Up: true, Free: 1 << 40})
	}
	e, err := local.OpenPebble("mdt", local.Options{FS: vfs.NewMem(), MinFreeBytes: -1, MemTableBytes: 1 << 20, CacheBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	m, err := mdt.Open(mdt.Options{Engine: e, Clock: clk.Now, StripeCount: uint8(osts), StripeSize: 64 << 10, OSTs: func() []mdt.OSTState { return states }})
	if err != nil {
		t.Fatal(err)
	}
	m.Begin(0)
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		e.Close()
	})
	targets["mdt"] = m
	return targets
}

// The file system client works over the network as it does in one process.
func TestFileSystem(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		b := newBed(t, secure, nil)
		var clk clock.Strict
		targets := realTargets(t, &clk, 2)
		for name, x := range targets {
			if err := b.srv.SetTarget(name, x); err != nil {
				t.Fatal(err)
			}
		}
		open := func(name string, k Kind) wire.Conn {
			return b.dial(func(o *DialOptions) { o.Target, o.Kind = name, k })
		}
		fs, err := client.New(client.Options{
			MDT: open("mdt", Control), OSTs: []wire.Conn{open("ost0", Bulk), open("ost1", Bulk)},
			ID: wire.ClientID{1}, Gen: 1, Clock: clk.Now, EpochIdle: 20 * time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := fs.Connect(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := fs.Close(ctx); err != nil {
				t.Error(err)
			}
		})
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := workload(fs, w); err != nil {
					t.Errorf("worker %d: %v", w, err)
				}
			}()
		}
		wg.Wait()
		// Every name is there, in whatever pieces the listing comes.
		names := map[string]bool{}
		cookie := uint64(0)
		for {
			req := wire.Request{FID: wire.RootFID, Cookie: cookie, Count: 400, Plus: true}
			req.Op = wire.OpReaddir
			var rep wire.Reply
			fs.Call(ctx, client.Owner{}, &req, &rep)
			if rep.Status != wire.OK {
				t.Fatal(rep.Status)
			}
			for _, e := range rep.Entries {
				names[string(e.Name)] = true
				if !e.HasAttr && e.Cookie > 2 {
					t.Errorf("%q without attributes", e.Name)
				}
				cookie = e.Cookie
			}
			if rep.EOF {
				break
			}
		}
		if len(names) != 2+4*2 {
			t.Errorf("%d names: %v", len(names), names)
		}
		if s, st := fs.Statfs(ctx, client.Owner{}); st != wire.OK || s.Total == 0 {
			t.Error(s, st)
		}
		locks(t, fs)
	})
}

// workload writes, truncates and reads one file and compares it with a model.
func workload(fs *client.FS, w int) error {
	rnd := rand.New(rand.NewPCG(uint64(w), 3))
	o := client.Owner{}
	name := fmt.Sprintf("file%d", w)
	req := wire.Request{FID: wire.RootFID, Name: []byte(name), How: wire.Guarded, SetAttr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o640}}
	req.Op, req.Flags = wire.OpCreate, wire.FlagWaitCommit|wire.FlagOpenEpoch
	req.Key = wire.ReplyKey{Addr: wire.MakeReplyAddr(netip.MustParseAddr("192.0.2.9")), Port: 800, XID: uint32(w), Proc: 100003<<8 | 8, Sum: 1}
	var rep wire.Reply
	fs.Call(ctx, o, &req, &rep)
	if rep.Status != wire.OK || !rep.Created || !rep.HasAttr || !rep.HasDir || rep.Attr.Mode != 0o640 || rep.Attr.Layout.Count != 2 {
		return fmt.Errorf("create: %+v", rep)
	}
	fid := rep.Attr.FID
	fs.Created(fid, rep.Transno)
	fs.Call(ctx, o, &req, &rep)
	if rep.Status != wire.OK || !rep.Reconstructed || rep.Attr.FID != fid {
		return fmt.Errorf("repeated create: %+v", rep)
	}
	link := wire.Request{FID: wire.RootFID, Name: []byte("link" + name), Data: []byte("to/" + name)}
	link.Op = wire.OpSymlink
	fs.Call(ctx, o, &link, &rep)
	if rep.Status != wire.OK {
		return fmt.Errorf("symlink: %w", rep.Status)
	}
	read := wire.Request{FID: rep.Attr.FID}
	read.Op = wire.OpReadlink
	fs.Call(ctx, o, &read, &rep)
	if string(rep.Data) != "to/"+name {
		return fmt.Errorf("readlink: %q", rep.Data)
	}
	var model []byte
	for i := range 60 {
		var a wire.Attr
		if st, _ := fs.Attr(ctx, o, fid, &a, true); st != wire.OK || a.Size != uint64(len(model)) {
			return fmt.Errorf("step %d: %v, size %d, want %d", i, st, a.Size, len(model))
		}
		off := rnd.IntN(600 << 10)
		switch rnd.IntN(4) {
		case 0, 1:
			p := make([]byte, 1+rnd.IntN(300<<10))
			fill(p, rnd.Uint64())
			if _, st := fs.Write(ctx, o, &a, uint64(off), p, wire.StableHow(rnd.IntN(3))); st != wire.OK {
				return fmt.Errorf("step %d: write: %w", i, st)
			}
			if n := off + len(p); n > len(model) {
				model = append(model, make([]byte, n-len(model))...)
			}
			copy(model[off:], p)
		case 2:
			p := make([]byte, 1+rnd.IntN(300<<10))
			n, _, st, _ := fs.Read(ctx, o, &a, uint64(off), p, true)
			if st != wire.OK || n != max(0, min(len(p), len(model)-off)) || n > 0 && !bytes.Equal(p[:n], model[off:off+n]) {
				return fmt.Errorf("step %d: read of %d at %d of %d: %v, %d bytes", i, len(p), off, len(model), st, n)
			}
		case 3:
			cut := wire.Request{FID: fid, SetAttr: wire.SetAttr{Mask: wire.SetSize, Size: uint64(off)}}
			cut.Op = wire.OpSetattr
			fs.Setattr(ctx, o, &cut, &rep)
			if rep.Status != wire.OK {
				return fmt.Errorf("step %d: truncate: %w", i, rep.Status)
			}
			model = append(model[:min(off, len(model)):min(off, len(model))], make([]byte, max(0, off-len(model)))...)
		}
	}
	var a wire.Attr
	fs.Attr(ctx, o, fid, &a, true)
	if st := fs.Commit(ctx, o, &a); st != wire.OK {
		return fmt.Errorf("commit: %w", st)
	}
	return nil
}

// locks runs a conflict, a wait and a grant through a poll that was waiting.
func locks(t *testing.T, fs *client.FS) {
	look := wire.Request{FID: wire.RootFID, Name: []byte("file0")}
	look.Op = wire.OpLookup
	var rep wire.Reply
	fs.Call(ctx, client.Owner{}, &look, &rep)
	fid := rep.Attr.FID
	o := client.Owner{VIP: 1, Epoch: 1}
	call := func(op wire.Op, host string, change func(*wire.Request)) *wire.Reply {
		t.Helper()
		req := wire.Request{FID: fid, Lock: &wire.LockArgs{
			Owner: wire.LockOwner{LockHost: wire.LockHost{Addr: netip.MustParseAddr("192.0.2.1"), Name: host}, Svid: 1, OH: "oh" + host},
			Range: wire.LockRange{Start: 0, End: wire.MaxLockOffset}, Exclusive: true, Monitor: true,
		}}
		req.Op, req.Flags = op, wire.FlagWaitCommit
		if change != nil {
			change(&req)
		}
		rep := new(wire.Reply)
		fs.Call(ctx, o, &req, rep)
		return rep
	}
	call(wire.OpSetVIPEpoch, "", nil)
	if r := call(wire.OpLockService, "", func(r *wire.Request) { r.Lock.NSMState = 1 }); r.Status != wire.OK || r.Lock.Service.NSMState != 1 {
		t.Fatalf("service: %+v", r)
	}
	if r := call(wire.OpLock, "a", nil); r.Status != wire.OK {
		t.Fatal(r.Status)
	}
	if r := call(wire.OpLockTest, "b", nil); r.Status != wire.ErrLockDenied || r.Lock.Holder.Owner.Name != "a" {
		t.Fatalf("test: %+v", r)
	}
	poll := wire.Request{}
	poll.Op = wire.OpLockPoll
	got := make(chan struct{})
	pr := new(wire.Reply)
	fs.Submit(o, &poll, pr, func() { close(got) })
	if r := call(wire.OpLock, "b", func(r *wire.Request) { r.Lock.Block, r.Lock.Note = true, []byte("note") }); r.Status != wire.ErrLockBlocked {
		t.Fatal(r.Status)
	}
	if r := call(wire.OpUnlock, "a", nil); r.Status != wire.OK {
		t.Fatal(r.Status)
	}
	select {
	case <-got:
	case <-time.After(10 * time.Second):
		t.Fatal("no grant")
	}
	if len(pr.Lock.Grants) != 1 || pr.Lock.Grants[0].Owner.Name != "b" || string(pr.Lock.Grants[0].Note) != "note" {
		t.Fatalf("%+v", pr.Lock)
	}
	if r := call(wire.OpLockGrantDone, "b", func(r *wire.Request) { r.Lock.ID, r.Lock.Grant = pr.Lock.Grants[0].ID, wire.GrantAccepted }); r.Status != wire.OK {
		t.Fatal(r.Status)
	}
	if r := call(wire.OpLockList, "", nil); r.Status != wire.OK || len(r.Lock.Locks) != 1 || r.Lock.Locks[0].State != wire.LockGranted || !r.EOF {
		t.Fatalf("%+v", r.Lock)
	}
	if r := call(wire.OpLockHosts, "", nil); r.Status != wire.OK || len(r.Lock.Hosts) != 2 {
		t.Fatalf("%+v", r.Lock)
	}
	// Ends the poll that the file system client would leave waiting.
	call(wire.OpLockPoll, "", func(r *wire.Request) { r.Cookie = 1<<64 - 1 })
}
