package mdt

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/wire"
)

const testVIP = 3

func testOwner(host, svid int) wire.LockOwner {
	return wire.LockOwner{
		LockHost: wire.LockHost{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(host)}), Name: fmt.Sprintf("c%d", host)},
		Svid:     uint32(svid), OH: fmt.Sprintf("%d@c%d", svid, host),
	}
}

func lockReq(op wire.Op, f wire.FID, o wire.LockOwner, start, end uint64, excl, block bool) *wire.Request {
	return &wire.Request{
		Header: wire.Header{Op: op, VIP: testVIP, VIPEpoch: 1}, FID: f,
		Lock: &wire.LockArgs{Owner: o, Range: wire.LockRange{Start: start, End: end}, Exclusive: excl, Block: block, Monitor: true, Note: []byte("note")},
	}
}

func (b *bed) service(state uint32, crashed, forget bool) wire.LockServiceInfo {
	b.t.Helper()
	r := &wire.Request{Header: wire.Header{Op: wire.OpLockService, VIP: testVIP, VIPEpoch: 1},
		Lock: &wire.LockArgs{NSMState: state, Crashed: crashed, Forget: forget, Window: int64(time.Second)}}
	return b.must(r).Lock.Service
}

func (b *bed) want(st wire.Status, req *wire.Request) *wire.Reply {
	b.t.Helper()
	rep := b.call(req)
	if rep.Status != st {
		b.t.Fatalf("op %d of svid %d: %v, want %v", req.Op, req.Lock.Owner.Svid, rep.Status, st)
	}
	return rep
}

func (b *bed) list(f wire.FID) []wire.LockHolder {
	b.t.Helper()
	return b.must(&wire.Request{Header: wire.Header{Op: wire.OpLockList}, FID: f, Lock: &wire.LockArgs{AllVIPs: true}}).Lock.Locks
}

// crash loses what was not synced and starts again.
func (b *bed) crash(seed uint64) {
	b.t.Helper()
	mem := b.fs.(*vfs.MemFS)
	b.fs = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(seed, 0))})
	_ = b.m.Close()
	_ = b.e.Close()
	b.open()
}

func TestLocksSurviveACrash(t *testing.T) {
	b := newBed(t, vfs.NewCrashableMem(), Options{})
	f := b.create(wire.RootFID, "f")
	b.service(1, false, false)
	holder, other, waiter := testOwner(1, 7), testOwner(2, 7), testOwner(2, 8)
	b.want(wire.OK, lockReq(wire.OpLock, f, holder, 0, 9, true, false))
	b.want(wire.OK, lockReq(wire.OpLock, f, holder, 100, wire.MaxLockOffset, false, false))
	b.want(wire.ErrLockDenied, lockReq(wire.OpLock, f, other, 5, 5, false, false))
	b.want(wire.ErrLockBlocked, lockReq(wire.OpLock, f, waiter, 9, 20, true, true))
	before := b.list(f)
	if len(before) != 3 {
		t.Fatalf("%d entries, want 3: %+v", len(before), before)
	}
	b.crash(1)
	after := b.list(f)
	if len(after) != 3 {
		t.Fatalf("%d entries after the crash, want 3: %+v", len(after), after)
	}
	if in := b.service(3, true, false); in.Unconfirmed != 2 || in.Waiting != 1 || in.Grace || in.Damaged {
		t.Fatalf("after a crashed start: %+v", in)
	}
	// Nothing in the way: granted at once, no grace.
	b.want(wire.OK, lockReq(wire.OpLock, f, other, 50, 60, true, false))
	b.want(wire.ErrLockDenied, lockReq(wire.OpLock, f, other, 5, 5, false, false))
	re := lockReq(wire.OpLock, f, holder, 0, 9, true, false)
	re.Lock.Reclaim = true
	b.want(wire.OK, re)
	if in := b.service(0, false, false); in.Unconfirmed != 1 {
		t.Fatalf("after one reclaim: %+v", in)
	}
	// The window passes; the lock that nobody reclaimed yields to who wants it.
	b.clock += int64(2 * time.Second)
	if err := b.m.TickLocks(); err != nil {
		t.Fatal(err)
	}
	b.want(wire.ErrLockDenied, lockReq(wire.OpLock, f, other, 5, 5, false, false))
	b.want(wire.OK, lockReq(wire.OpLock, f, other, 200, 300, true, false))
	b.close()
}

func TestLockTransactions(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "f")
	b.service(1, false, false)
	a, c := testOwner(1, 1), testOwner(2, 1)

	key := func(op wire.Op, xid uint32) *wire.Request {
		r := lockReq(op, f, a, 0, 9, true, false)
		r.Key = wire.ReplyKey{Addr: wire.MakeReplyAddr(a.Addr), Port: 700, XID: xid, Proc: 100021<<8 | uint32(op), Sum: 5}
		r.Flags |= wire.FlagAnyPort
		return r
	}
	b.want(wire.OK, key(wire.OpLock, 1))
	b.want(wire.OK, key(wire.OpUnlock, 2))
	// A copy of the first call that comes late must not lock again.
	if rep := b.want(wire.OK, key(wire.OpLock, 1)); !rep.Reconstructed {
		t.Error("a repeated LOCK was executed")
	}
	if l := b.list(f); len(l) != 0 {
		t.Fatalf("locks after the late copy: %+v", l)
	}
	b.want(wire.OK, lockReq(wire.OpLock, f, c, 0, 9, true, false))
	b.want(wire.ErrLockDenied, key(wire.OpLock, 3))
	b.want(wire.OK, lockReq(wire.OpUnlock, f, c, 0, 9, true, false))
	if rep := b.want(wire.ErrLockDenied, key(wire.OpLock, 3)); !rep.Reconstructed {
		t.Error("a repeated denied LOCK was executed")
	}

	t.Run("client restarted", func(t *testing.T) {
		b.want(wire.OK, key(wire.OpLock, 4))
		free := lockReq(wire.OpLockFree, wire.FID{}, a, 0, 0, false, false)
		free.Cookie = 5
		if rep := b.want(wire.OK, free); rep.Lock.Freed != 1 {
			t.Fatalf("freed %d locks, want 1", rep.Lock.Freed)
		}
		b.close()
		b.open()
		// The same XID with the same arguments in its second life is a new call.
		if rep := b.want(wire.OK, key(wire.OpLock, 4)); rep.Reconstructed {
			t.Error("the first life's answer was given again")
		}
		if l := b.list(f); len(l) != 1 {
			t.Errorf("%d locks, want 1", len(l))
		}
		b.want(wire.OK, lockReq(wire.OpUnlock, f, a, 0, 9, true, false))
	})
	t.Run("other objects", func(t *testing.T) {
		d := b.mkdir(wire.RootFID, "d")
		b.want(wire.ErrInval, lockReq(wire.OpLock, d, a, 0, 9, true, false))
		b.want(wire.ErrInval, lockReq(wire.OpLockTest, d, a, 0, 9, true, false))
		gone := wire.FID{Seq: 99, OID: 1}
		b.want(wire.ErrStale, lockReq(wire.OpLock, gone, a, 0, 9, true, false))
		b.want(wire.ErrInval, lockReq(wire.OpLock, f, a, 10, 9, true, false))
		r := lockReq(wire.OpLock, f, a, 0, 9, true, false)
		r.Lock = nil
		if rep := b.call(r); rep.Status != wire.ErrProto {
			t.Errorf("without a body: %v", rep.Status)
		}
	})
	t.Run("fenced", func(t *testing.T) {
		b.must(&wire.Request{Header: wire.Header{Op: wire.OpSetVIPEpoch, VIP: testVIP, VIPEpoch: 2}})
		b.want(wire.ErrStaleVIP, lockReq(wire.OpLock, f, a, 0, 9, true, false))
		b.want(wire.ErrStaleVIP, lockReq(wire.OpLockPoll, f, a, 0, 9, true, false))
	})
	b.close()
	b.open()
	if l := b.list(wire.FID{}); len(l) != 0 {
		t.Errorf("after a restart: %+v", l)
	}
	b.close()
}

func TestLocksGoWithTheirFile(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	b.service(1, false, false)
	f, g := b.create(wire.RootFID, "f"), b.create(wire.RootFID, "g")
	b.must(&wire.Request{Header: wire.Header{Op: wire.OpLink}, FID: f, FID2: wire.RootFID, Name2: []byte("f2")})
	for _, x := range []wire.FID{f, g} {
		b.want(wire.OK, lockReq(wire.OpLock, x, testOwner(1, 1), 0, 9, true, false))
		b.want(wire.ErrLockBlocked, lockReq(wire.OpLock, x, testOwner(2, 1), 0, 9, true, true))
	}
	b.must(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: wire.RootFID, Name: []byte("f")})
	if l := b.list(f); len(l) != 2 {
		t.Errorf("a link is left, and %d entries, want 2", len(l))
	}
	b.must(&wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: wire.RootFID, Name: []byte("f2")})
	if rep := b.call(&wire.Request{Header: wire.Header{Op: wire.OpRename}, FID: wire.RootFID, Name: []byte("none"), FID2: wire.RootFID, Name2: []byte("g")}); rep.Status != wire.ErrNoEnt {
		t.Fatal(rep.Status)
	}
	if l := b.list(g); len(l) != 2 {
		t.Errorf("a failed rename left %d entries, want 2", len(l))
	}
	b.create(wire.RootFID, "h")
	b.must(&wire.Request{Header: wire.Header{Op: wire.OpRename}, FID: wire.RootFID, Name: []byte("h"), FID2: wire.RootFID, Name2: []byte("g")})
	b.close()
	b.open()
	if l := b.list(wire.FID{}); len(l) != 0 {
		t.Errorf("locks of removed files: %+v", l)
	}
	b.close()
}

// poll sends an OpLockPoll; the channel gets its reply.
func (b *bed) poll(after uint64) chan *wire.Reply {
	ch := make(chan *wire.Reply, 1)
	rep := &wire.Reply{}
	b.m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpLockPoll, Client: testClient, VIP: testVIP, VIPEpoch: 1}, Cookie: after, Lock: &wire.LockArgs{}}, rep, func() { ch <- rep })
	return ch
}

func get(t *testing.T, ch chan *wire.Reply) *wire.Reply {
	t.Helper()
	select {
	case r := <-ch:
		return r
	case <-time.After(30 * time.Second):
		t.Fatal("no answer to the poll")
		return nil
	}
}

func TestLockPoll(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "f")
	b.service(1, false, false)
	a, c := testOwner(1, 1), testOwner(2, 1)
	b.want(wire.OK, lockReq(wire.OpLock, f, a, 0, 9, true, false))
	b.want(wire.ErrLockBlocked, lockReq(wire.OpLock, f, c, 0, 9, true, true))

	first := b.poll(0)
	second := b.poll(0)
	if r := get(t, first); r.Status != wire.OK || len(r.Lock.Grants) != 0 {
		t.Fatalf("a poll that another one ended: %+v", r)
	}
	select {
	case r := <-second:
		t.Fatalf("answered without a grant: %+v", r)
	default:
	}
	b.want(wire.OK, lockReq(wire.OpUnlock, f, a, 0, 9, true, false))
	r := get(t, second)
	if len(r.Lock.Grants) != 1 || r.LastCommitted < b.m.core.LastApplied() {
		t.Fatalf("grants %+v, last committed %d of %d", r.Lock.Grants, r.LastCommitted, b.m.core.LastApplied())
	}
	g := r.Lock.Grants[0]
	if g.FID != f || g.Owner.Svid != 1 || g.Owner.Name != "c2" || g.Owner.VIP != testVIP || string(g.Note) != "note" || !g.Exclusive {
		t.Errorf("grant %+v", g)
	}
	if l := b.list(f); len(l) != 1 || l[0].State != wire.LockGrantPending {
		t.Errorf("list: %+v", l)
	}
	// Not acknowledged: asked from the start it comes again, also after a restart.
	if r := get(t, b.poll(0)); len(r.Lock.Grants) != 1 {
		t.Errorf("asked again: %+v", r.Lock.Grants)
	}
	b.close()
	b.open()
	r = get(t, b.poll(0))
	if len(r.Lock.Grants) != 1 {
		t.Fatalf("after a restart: %+v", r.Lock.Grants)
	}
	done := lockReq(wire.OpLockGrantDone, wire.FID{}, c, 0, 0, false, false)
	done.Lock.ID, done.Lock.Grant = r.Lock.Grants[0].ID, wire.GrantAccepted
	b.want(wire.OK, done)
	parked := b.poll(r.Lock.Grants[0].Seq)
	stop := b.poll(math.MaxUint64)
	for _, ch := range []chan *wire.Reply{parked, stop} {
		if r := get(t, ch); r.Status != wire.OK || len(r.Lock.Grants) != 0 {
			t.Errorf("after the stop: %+v", r)
		}
	}
	parked = b.poll(0)
	b.m.Fail(fmt.Errorf("test"))
	if r := get(t, parked); r.Status != wire.ErrTargetDown {
		t.Errorf("parked on a failed target: %v", r.Status)
	}
	if r := get(t, b.poll(0)); r.Status != wire.ErrTargetDown {
		t.Errorf("poll of a failed target: %v", r.Status)
	}
	_ = b.e.Close()
}

func TestLockDamage(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{})
	f := b.create(wire.RootFID, "f")
	b.service(1, false, false)
	b.want(wire.OK, lockReq(wire.OpLock, f, testOwner(1, 1), 0, 9, true, false))
	if err := b.m.Close(); err != nil {
		t.Fatal(err)
	}
	bt := b.e.NewBatch()
	n := 0
	if err := IterLocks(b.e, func(k, v []byte) error {
		if n++; n == 1 {
			v = append([]byte(nil), v...)
			v[len(v)/2] ^= 0x40
			bt.Set(k, v)
		}
		return nil
	}); err != nil || n < 2 {
		t.Fatal(n, err)
	}
	if err := b.e.Apply(bt); err != nil {
		t.Fatal(err)
	}
	b.openMDT()
	if in := b.service(0, false, false); !in.Damaged {
		t.Fatalf("the damage was not noticed: %+v", in)
	}
	if in := b.service(3, true, false); !in.Grace {
		t.Fatalf("no grace period: %+v", in)
	}
	b.want(wire.ErrLockGrace, lockReq(wire.OpLock, f, testOwner(2, 1), 50, 60, true, false))
	re := lockReq(wire.OpLock, f, testOwner(1, 1), 0, 9, true, false)
	re.Lock.Reclaim = true
	b.want(wire.OK, re)
	b.clock += int64(20 * time.Second)
	if err := b.m.TickLocks(); err != nil {
		t.Fatal(err)
	}
	b.want(wire.OK, lockReq(wire.OpLock, f, testOwner(2, 1), 50, 60, true, false))
	b.want(wire.ErrLockDenied, lockReq(wire.OpLock, f, testOwner(2, 1), 9, 9, true, false))
	b.close()
}

// lockCall and lockResult are an operation of a concurrent history. The file has
// four bytes.
type lockCall struct {
	owner      int
	start, end uint64
	excl, free bool
	got        wire.Status
}

type lockModelState [4]struct {
	excl   int8 // owner, -1 none
	shared uint8
}

var lockModel = porcupine.Model{
	Init: func() any {
		var s lockModelState
		for i := range s {
			s[i].excl = -1
		}
		return s
	},
	Step: func(state, in, out any) (bool, any) {
		s, c, ok := state.(lockModelState), in.(lockCall), out.(bool)
		me := uint8(1) << c.owner
		free := true
		for i := c.start; i <= c.end; i++ {
			p := &s[i]
			if p.excl >= 0 && p.excl != int8(c.owner) || c.excl && p.shared&^me != 0 {
				free = false
			}
		}
		if !c.free && free != ok {
			return false, state
		}
		if !c.free && !ok {
			return true, state
		}
		for i := c.start; i <= c.end; i++ {
			p := &s[i]
			p.shared &^= me
			if p.excl == int8(c.owner) {
				p.excl = -1
			}
			if c.free {
				continue
			}
			if c.excl {
				p.excl = int8(c.owner)
			} else {
				p.shared |= me
			}
		}
		return true, s
	},
	Equal: func(a, b any) bool { return a.(lockModelState) == b.(lockModelState) },
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%+v -> %v", in, out)
	},
}

// TestLocksAreLinearizable runs owners of three clients against each other,
// with requests that wait among them, and checks that there is an order of
// their calls that a single lock table would have given these answers in. A
// call that waits ends when the callback has been taken.
func TestLocksAreLinearizable(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	rounds, calls := 20, 40
	if testing.Short() {
		rounds = 6
	}
	for round := range rounds {
		b := newBed(t, vfs.NewMem(), Options{Clock: func() int64 { return time.Now().UnixNano() }})
		f := b.create(wire.RootFID, "f")
		b.service(1, false, false)
		const owners = 6
		var granted [owners]chan struct{}
		for i := range granted {
			granted[i] = make(chan struct{}, 1)
		}
		var pollers sync.WaitGroup
		pollers.Go(func() {
			var after uint64
			for {
				r := <-b.poll(after)
				if r.Status != wire.OK || len(r.Lock.Grants) == 0 {
					return
				}
				for _, g := range r.Lock.Grants {
					after = g.Seq
					done := lockReq(wire.OpLockGrantDone, wire.FID{}, g.Owner, 0, 0, false, false)
					done.Lock.ID, done.Lock.Grant = g.ID, wire.GrantAccepted
					b.call(done)
					granted[g.Owner.Svid] <- struct{}{}
				}
			}
		})
		var mu sync.Mutex
		var history []porcupine.Operation
		start := time.Now()
		var wg sync.WaitGroup
		for o := range owners {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(round*owners+o)))
				who := testOwner(1+o%3, o)
				var excl [4]bool // held
				for range calls {
					c := lockCall{owner: o, excl: rng.IntN(2) == 0, free: rng.IntN(2) == 0}
					c.start = rng.Uint64N(4)
					c.end = c.start + rng.Uint64N(4-c.start)
					if c.free {
						c.start, c.end, c.excl = 0, 3, false
					}
					op := porcupine.Operation{ClientId: o, Input: c, Call: int64(time.Since(start))}
					if c.free {
						b.call(lockReq(wire.OpUnlock, f, who, c.start, c.end, false, false))
						op.Output = true
					} else {
						// Until its client has taken the callback, a lock that a granted request
						// downgrades excludes others as before. That is no single step, so
						// downgrades do not wait here.
						wait := rng.IntN(3) > 0 && (c.excl || !slices.Contains(excl[c.start:c.end+1], true))
						c.got = b.call(lockReq(wire.OpLock, f, who, c.start, c.end, c.excl, wait)).Status
						op.Input = c
						switch st := c.got; st {
						case wire.OK:
							op.Output = true
						case wire.ErrLockDenied:
							op.Output = false
						case wire.ErrLockDeadlock: // denied because it was in the way of others
							op.Output = false
						case wire.ErrLockBlocked:
							select {
							case <-granted[o]:
							case <-time.After(time.Minute):
								t.Errorf("seed %d, round %d: owner %d waits for ever: %+v", seed, round, o, b.list(f))
								return
							}
							op.Output = true
						default:
							t.Errorf("seed %d: %v", seed, st)
							return
						}
					}
					for i := c.start; op.Output == true && i <= c.end; i++ {
						excl[i] = c.excl && !c.free
					}
					op.Return = int64(time.Since(start))
					mu.Lock()
					history = append(history, op)
					mu.Unlock()
				}
				op := porcupine.Operation{ClientId: o, Input: lockCall{owner: o, end: 3, free: true}, Output: true, Call: int64(time.Since(start))}
				b.call(lockReq(wire.OpUnlock, f, who, 0, wire.MaxLockOffset, false, false))
				op.Return = int64(time.Since(start))
				mu.Lock()
				history = append(history, op)
				mu.Unlock()
			})
		}
		wg.Wait()
		// The poller may be between two polls, which the end of a poll misses.
		ended := make(chan struct{})
		go func() { pollers.Wait(); close(ended) }()
		for done := false; !done; {
			<-b.poll(math.MaxUint64)
			select {
			case <-ended:
				done = true
			case <-time.After(time.Millisecond):
			}
		}
		if r := porcupine.CheckOperationsTimeout(lockModel, history, time.Minute); r != porcupine.Ok {
			slices.SortFunc(history, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
			for _, o := range history {
				t.Logf("%9d %9d %s", o.Call, o.Return, lockModel.DescribeOperation(o.Input, o.Output))
			}
			t.Fatalf("seed %d, round %d: history of %d calls is %v", seed, round, len(history), r)
		}
		if l := b.list(f); len(l) != 0 {
			t.Fatalf("seed %d: left over: %+v", seed, l)
		}
		b.close()
	}
}
