package lockd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/baton-nfs/baton/internal/inflight"
	"github.com/baton-nfs/baton/internal/sunrpc"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/lockd/nlm"
	"github.com/baton-nfs/baton/recovery/wire"
)

// everywhere runs f for every version and transport.
func everywhere(t *testing.T, f func(t *testing.T, vers uint32, nw string)) {
	for _, vers := range []uint32{1, 3, 4} {
		for _, nw := range []string{"tcp", "udp"} {
			t.Run(fmt.Sprintf("v%d-%s", vers, nw), func(t *testing.T) { f(t, vers, nw) })
		}
	}
}

func TestProcedures(t *testing.T) {
	everywhere(t, func(t *testing.T, vers uint32, nw string) {
		b := newBed(t, nil)
		p := b.peer(1, vers, nw)
		if _, err := p.rpc.Call(context.Background(), 0, nil); err != nil {
			t.Fatalf("NULL: %v", err)
		}
		want(t, "test of a free range", p.test("file1", 1, 0, 10).Stat, nlm.Granted)
		want(t, "lock", p.lock("file1", 1, 0, 10, false), nlm.Granted)
		b.tab.mu.Lock()
		a, req := b.tab.last, b.tab.lastReq
		b.tab.mu.Unlock()
		wantOwner := wire.LockOwner{LockHost: wire.LockHost{VIP: 7, Addr: p.addr, Name: "host-127.0.0.1"}, Svid: 1, OH: "oh"}
		if a.Owner != wantOwner || a.Range != (wire.LockRange{Start: 0, End: 9}) || !a.Exclusive || a.Block || !a.Monitor || a.Reclaim || len(a.Note) != 0 {
			t.Errorf("the table was asked %+v", a)
		}
		if req.FID != fileFID(1) || req.VIP != 7 || req.Flags != wire.FlagWaitCommit|wire.FlagAnyPort || req.Key.Proc != nlm.Program<<8|2 || req.Key.Addr != p.addr.As16() || req.Key.Port == 0 {
			t.Errorf("request %+v", req)
		}

		r := p.test("file1", 2, 5, 1)
		want(t, "test of a locked range", r.Stat, nlm.Denied)
		if h := r.Holder; !h.Exclusive || h.Svid != 1 || string(h.OH) != "oh" || h.Offset != 0 || h.Len != 10 {
			t.Errorf("holder %+v", h)
		}
		want(t, "conflict", p.lock("file1", 2, 5, 0, false), nlm.Denied)
		want(t, "blocking conflict", p.lock("file1", 3, 5, 0, true), nlm.Blocked)
		want(t, "cancel", p.cancel("file1", 3, 5, 0), nlm.Granted)
		want(t, "cancel again", p.cancel("file1", 3, 5, 0), nlm.Denied)
		want(t, "unlock", p.unlock("file1", 1, 0, 10), nlm.Granted)
		want(t, "unlock of nothing", p.unlock("file1", 1, 0, 0), nlm.Granted)
		want(t, "granted, at a server", p.res(nlm.ProcGranted, &nlm.TestArgs{Cookie: cookie, Lock: p.lk("file1", 1, 0, 1)}), nlm.Denied)
		want(t, "reclaim", p.res(nlm.ProcLock, &nlm.LockArgs{Cookie: cookie, Lock: p.lk("file1", 1, 0, 1), Reclaim: true}), nlm.Granted)
		b.tab.mu.Lock()
		a = b.tab.last
		b.tab.mu.Unlock()
		if !a.Reclaim || a.Exclusive {
			t.Errorf("reclaim: %+v", a)
		}

		// What servers answer is taken and ignored.
		for _, proc := range []nlm.Proc{nlm.ProcLockRes, nlm.ProcCancelRes, nlm.ProcUnlockRes, nlm.ProcGrantedRes} {
			p.call(proc, &nlm.Res{Cookie: cookie}, nil)
		}
		p.call(nlm.ProcTestRes, &nlm.TestRes{Cookie: cookie, Stat: nlm.Denied}, nil)

		share := func(proc nlm.Proc, oh string, mode, access uint32) (nlm.ShareRes, error) {
			var w xdr.Writer
			(&nlm.ShareArgs{Cookie: cookie, CallerName: []byte("pc"), FH: []byte("file2"), OH: []byte(oh), Mode: mode, Access: access}).Encode(&w, vers)
			out, err := p.rpc.Call(context.Background(), uint32(proc), w.Buf)
			var r nlm.ShareRes
			if err == nil {
				err = r.Decode(xdr.NewReader(out), vers)
			}
			return r, err
		}
		if vers == 1 {
			for proc := uint32(16); proc < 25; proc++ {
				var ae *sunrpc.AcceptError
				if _, err := p.rpc.Call(context.Background(), proc, nil); !errors.As(err, &ae) || ae.Stat != sunrpc.ProcUnavail {
					t.Errorf("procedure %d: %v", proc, err)
				}
			}
			return
		}
		for _, s := range []struct {
			proc         nlm.Proc
			oh           string
			mode, access uint32
			st           nlm.Stat
		}{
			{nlm.ProcShare, "a", nlm.ShareWrite, nlm.ShareRead, nlm.Granted},
			{nlm.ProcShare, "b", nlm.ShareNone, nlm.ShareWrite, nlm.Denied},
			{nlm.ProcShare, "b", nlm.ShareNone, nlm.ShareRead, nlm.Granted},
			{nlm.ProcUnshare, "a", nlm.ShareWrite, nlm.ShareRead, nlm.Granted},
		} {
			r, err := share(s.proc, s.oh, s.mode, s.access)
			if err != nil || r.Stat != s.st || string(r.Cookie) != string(cookie) {
				t.Errorf("%+v: %+v %v", s, r, err)
			}
		}
		b.tab.mu.Lock()
		if a := b.tab.last; a.Owner.Svid != 0 || a.Owner.OH != "a" || a.ShareMode != nlm.ShareWrite || a.ShareAccess != nlm.ShareRead {
			t.Errorf("unshare: %+v", a)
		}
		b.tab.mu.Unlock()
		want(t, "nm_lock", p.res(nlm.ProcNMLock, &nlm.LockArgs{Cookie: cookie, Exclusive: true, Lock: p.lk("file3", 9, 0, 0)}), nlm.Granted)
		b.tab.mu.Lock()
		if a := b.tab.last; a.Monitor || a.Range.End != wire.MaxLockOffset {
			t.Errorf("nm_lock: %+v", a)
		}
		b.tab.mu.Unlock()
		p.call(nlm.ProcFreeAll, &nlm.Notify{Name: []byte("host-127.0.0.1"), State: 5}, nil)
		b.tab.mu.Lock()
		if len(b.tab.freed) != 1 || b.tab.freeCk[0] != 5 || b.tab.freed[0].Owner.LockHost != wantOwner.LockHost || b.tab.freed[0].AllVIPs {
			t.Errorf("free_all: %+v %v", b.tab.freed, b.tab.freeCk)
		}
		b.tab.mu.Unlock()
		want(t, "lock after free_all", p.lock("file3", 10, 0, 1, false), nlm.Granted)
		for proc := uint32(16); proc < 20; proc++ {
			var ae *sunrpc.AcceptError
			if _, err := p.rpc.Call(context.Background(), proc, nil); !errors.As(err, &ae) || ae.Stat != sunrpc.ProcUnavail {
				t.Errorf("procedure %d: %v", proc, err)
			}
		}
	})
}

func TestVersionsOffered(t *testing.T) {
	b := newBed(t, nil)
	for _, vers := range []uint32{0, 2, 5} {
		c, err := sunrpc.Dial(context.Background(), "tcp", netip.AddrPort{}, b.tcp, nlm.Program, vers, sunrpc.Cred{})
		if err != nil {
			t.Fatal(err)
		}
		var ae *sunrpc.AcceptError
		if _, err := c.Call(context.Background(), 0, nil); !errors.As(err, &ae) || ae.Stat != sunrpc.ProgMismatch || ae.Low != 1 || ae.High != 4 {
			t.Errorf("version %d: %v", vers, err)
		}
		c.Close()
	}
}

func TestStatuses(t *testing.T) {
	b := newBed(t, nil)
	p4, p3 := b.peer(1, 4, "tcp"), b.peer(2, 3, "udp")
	for _, c := range []struct {
		st     wire.Status
		v4, v3 nlm.Stat
	}{
		{wire.ErrLockDeadlock, nlm.Deadlck, nlm.Denied},
		{wire.ErrLockGrace, nlm.DeniedGracePeriod, nlm.DeniedGracePeriod},
		{wire.ErrLockNoLocks, nlm.DeniedNoLocks, nlm.DeniedNoLocks},
		{wire.ErrStale, nlm.StaleFH, nlm.DeniedNoLocks},
		{wire.ErrIO, nlm.Failed, nlm.DeniedNoLocks},
	} {
		b.tab.setForce(wire.OpLock, c.st)
		want(t, c.st.String()+" v4", p4.lock("file1", 1, 0, 1, true), c.v4)
		want(t, c.st.String()+" v3", p3.lock("file1", 1, 0, 1, true), c.v3)
	}
	b.tab.setForce(wire.OpLock, wire.OK)
	want(t, "no such file", p4.lock("gone", 1, 0, 1, false), nlm.StaleFH)
	want(t, "no such file, unlock", p4.unlock("gone", 1, 0, 1), nlm.StaleFH)
	want(t, "a directory", p4.lock("dir", 1, 0, 1, false), nlm.Failed)
	want(t, "beyond the largest offset", p4.lock("file1", 1, math.MaxInt64+1, 1, false), nlm.FBig)
	want(t, "at the largest offset", p4.lock("file1", 1, math.MaxInt64, 1, false), nlm.Granted)
	want(t, "over the largest offset", p4.lock("file1", 1, 5, math.MaxUint64, false), nlm.Granted)
	s := b.a.Stats()
	if s.Deadlock != 2 || s.Grace != 2 || s.NoLocks != 2 || s.Granted != 2 || s.Failed == 0 {
		t.Errorf("stats %+v", s)
	}

	// What is not known here is not answered, and sent again by the client.
	drops := uint64(0)
	silent := func(what string, f func()) {
		t.Helper()
		drops++
		done := make(chan error, 1)
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			var w xdr.Writer
			(&nlm.LockArgs{Cookie: cookie, Lock: p4.lk("file5", uint32(drops), 0, 1)}).Encode(&w, 4)
			if what == "files" {
				w.Buf = nil
				(&nlm.LockArgs{Cookie: cookie, Lock: p4.lk("busy", uint32(drops), 0, 1)}).Encode(&w, 4)
			}
			_, err := p4.rpc.Call(ctx, uint32(nlm.ProcLock), w.Buf)
			done <- err
		}()
		until(t, what+": dropped", func() bool { return b.a.Stats().Dropped == drops })
		if _, err := p4.rpc.Call(context.Background(), 0, nil); err != nil {
			t.Fatalf("%s: the connection is gone: %v", what, err)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: answered: %v", what, err)
		}
	}
	for _, st := range []wire.Status{wire.ErrTargetDown, wire.ErrRecovering, wire.ErrJukebox, wire.ErrStaleVIP} {
		b.tab.setForce(wire.OpLock, st)
		silent(st.String(), nil)
	}
	b.tab.setForce(wire.OpLock, wire.OK)
	silent("files", nil)
	if s := b.a.Stats(); s.Fenced != 1 {
		t.Errorf("fenced %d", s.Fenced)
	}
	want(t, "afterwards", p4.lock("file5", 99, 0, 1, false), nlm.Granted)
}

// TestMessages: the results of _MSG calls come as calls to the client's lock
// manager, by the same transport, from the service address.
func TestMessages(t *testing.T) {
	everywhere(t, func(t *testing.T, vers uint32, nw string) {
		b := newBed(t, nil)
		p := b.peer(2, vers, nw)
		want(t, "setup", p.lock("file1", 1, 0, 10, false), nlm.Granted)
		lock := func(svid uint32) *nlm.LockArgs {
			return &nlm.LockArgs{Cookie: cookie, Block: true, Exclusive: true, Lock: p.lk("file1", svid, 0, 10)}
		}
		for i, c := range []struct {
			proc, res nlm.Proc
			args      codec
			st        nlm.Stat
		}{
			{nlm.ProcTestMsg, nlm.ProcTestRes, &nlm.TestArgs{Cookie: cookie, Exclusive: true, Lock: p.lk("file1", 2, 5, 0)}, nlm.Denied},
			{nlm.ProcLockMsg, nlm.ProcLockRes, lock(2), nlm.Blocked},
			{nlm.ProcCancelMsg, nlm.ProcCancelRes, &nlm.CancelArgs{Cookie: cookie, Block: true, Exclusive: true, Lock: p.lk("file1", 2, 0, 10)}, nlm.Granted},
			{nlm.ProcUnlockMsg, nlm.ProcUnlockRes, &nlm.UnlockArgs{Cookie: cookie, Lock: p.lk("file1", 1, 0, 10)}, nlm.Granted},
			{nlm.ProcLockMsg, nlm.ProcLockRes, lock(3), nlm.Granted},
			{nlm.ProcGrantedMsg, nlm.ProcGrantedRes, &nlm.TestArgs{Cookie: cookie, Lock: p.lk("file1", 1, 0, 10)}, nlm.Denied},
		} {
			p.call(c.proc, c.args, nil)
			until(t, c.res.String(), func() bool { return len(p.got()) > i })
			got := p.got()[i]
			if got.proc != c.res || got.vers != vers || got.nw != nw || got.from.Addr() != netip.MustParseAddr("127.0.0.1") {
				t.Fatalf("%v: %+v", c.proc, got)
			}
			var st nlm.Stat
			var ck []byte
			if c.res == nlm.ProcTestRes {
				var r nlm.TestRes
				if err := r.Decode(xdr.NewReader(got.args), vers); err != nil || r.Holder.Svid != 1 || r.Holder.Len != 10 {
					t.Errorf("%+v %v", r, err)
				}
				st, ck = r.Stat, r.Cookie
			} else {
				var r nlm.Res
				if err := r.Decode(xdr.NewReader(got.args), vers); err != nil {
					t.Error(err)
				}
				st, ck = r.Stat, r.Cookie
			}
			want(t, c.proc.String(), st, c.st)
			if string(ck) != string(cookie) {
				t.Errorf("%v: cookie %x", c.proc, ck)
			}
		}
		until(t, "counted", func() bool { return b.a.Stats().Results == 6 })
		// A client that cannot be reached gets none, and costs nothing.
		b.peers.mu.Lock()
		delete(b.peers.m, p.addr)
		b.peers.mu.Unlock()
		b.a.eng.Load().mu.Lock()
		clear(b.a.eng.Load().ports)
		b.a.eng.Load().mu.Unlock()
		p.call(nlm.ProcUnlockMsg, &nlm.UnlockArgs{Cookie: cookie, Lock: p.lk("file1", 3, 0, 10)}, nil)
		until(t, "lost", func() bool { return b.a.Stats().ResultsLost == 1 })
	})
}

func (b *bed) raw(from netip.Addr) *raw {
	b.t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := d.Dial("tcp", b.tcp.String())
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return &raw{b.t, c}
}

// send makes a call with a credential stamp that the real client changes when it
// sends a call again.
func (c *raw) send(xid, stamp uint32, proc nlm.Proc, args codec) {
	c.t.Helper()
	var w xdr.Writer
	w.Uint32(0)
	for _, v := range []uint32{xid, 0, 2, nlm.Program, 4, uint32(proc), sunrpc.AuthSys, 20, stamp, 0, 0, 0, 0, 0, 0} {
		w.Uint32(v)
	}
	args.Encode(&w, 4)
	binary.BigEndian.PutUint32(w.Buf, 1<<31|uint32(len(w.Buf)-4))
	if _, err := c.Write(w.Buf); err != nil {
		c.t.Fatal(err)
	}
}

func (c *raw) recv(xid uint32) nlm.Stat {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	var h [4]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		c.t.Fatalf("no reply: %v", err)
	}
	b := make([]byte, binary.BigEndian.Uint32(h[:])&^(1<<31))
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatal(err)
	}
	r := xdr.NewReader(b)
	if got := r.Uint32(); got != xid {
		c.t.Fatalf("reply to xid %d, want %d", got, xid)
	}
	r.Skip(20)
	var res nlm.Res
	if err := res.Decode(r, 4); err != nil {
		c.t.Fatal(err)
	}
	return res.Stat
}

func TestExactlyOnce(t *testing.T) {
	b := newBed(t, nil)
	p := b.peer(2, 4, "tcp")
	c := b.raw(p.addr)
	lock := &nlm.LockArgs{Cookie: cookie, Exclusive: true, Lock: p.lk("file1", 1, 0, 10)}
	c.send(100, 1, nlm.ProcLock, lock)
	want(t, "lock", c.recv(100), nlm.Granted)
	c.send(101, 1, nlm.ProcUnlock, &nlm.UnlockArgs{Cookie: cookie, Lock: p.lk("file1", 1, 0, 10)})
	want(t, "unlock", c.recv(101), nlm.Granted)
	// A copy of the lock call that was delayed on its way, by another port.
	d := b.raw(p.addr)
	d.send(100, 2, nlm.ProcLock, lock)
	want(t, "late copy", d.recv(100), nlm.Granted)
	if n := b.tab.count(wire.OpLock); n != 1 {
		t.Errorf("executed %d times", n)
	}
	if s := b.tab.states(fileFID(1)); len(s) != 0 {
		t.Errorf("the late copy took a lock: %v", s)
	}
	// Other arguments, another version or another procedure are other calls.
	other := *lock
	other.Lock.Len = 11
	d.send(100, 2, nlm.ProcLock, &other)
	want(t, "other arguments", d.recv(100), nlm.Granted)
	if n := b.tab.count(wire.OpLock); n != 2 {
		t.Errorf("executed %d times", n)
	}
	// TEST changes nothing and is answered anew.
	for range 2 {
		d.send(200, 1, nlm.ProcTest, &nlm.TestArgs{Cookie: cookie, Lock: p.lk("file3", 5, 0, 1)})
		want(t, "test", d.recv(200), nlm.Granted)
	}
	if n := b.tab.count(wire.OpLockTest); n != 2 {
		t.Errorf("tested %d times", n)
	}
}

// TestEvictedWhileAsking: the MDT evicts the frontend, and the answer to what it was
// asked is lost. The frontend asks again, and clients neither wait for their own
// time-outs nor have anything done twice.
func TestEvictedWhileAsking(t *testing.T) {
	b := newBed(t, nil)
	p, other := b.peer(1, 4, "tcp"), b.peer(2, 4, "udp")
	b.tab.mu.Lock()
	b.tab.evict[wire.OpLock], b.tab.evict[wire.OpUnlock] = 2, 2
	b.tab.mu.Unlock()
	want(t, "lock", p.lock("file1", 1, 0, 1, false), nlm.Granted)
	want(t, "lock of another", other.lock("file1", 2, 0, 1, false), nlm.Denied)
	want(t, "unlock", p.unlock("file1", 1, 0, 1), nlm.Granted)
	want(t, "lock of another", other.lock("file1", 2, 0, 1, false), nlm.Granted)
	b.tab.mu.Lock()
	defer b.tab.mu.Unlock()
	if b.tab.executed[wire.OpUnlock] != 1 || b.tab.evict[wire.OpLock] != 0 || b.tab.evict[wire.OpUnlock] != 0 {
		t.Errorf("executed %v, evictions left %v", b.tab.executed, b.tab.evict)
	}
	if n := b.a.Stats().Dropped; n != 0 {
		t.Errorf("%d calls were not answered", n)
	}
}

func TestDuplicateOfRunningCall(t *testing.T) {
	b := newBed(t, nil)
	p := b.peer(2, 4, "tcp")
	gate := make(chan struct{})
	b.tab.mu.Lock()
	b.tab.hold[wire.OpLock] = gate
	b.tab.mu.Unlock()
	lock := &nlm.LockArgs{Cookie: cookie, Exclusive: true, Lock: p.lk("file1", 1, 0, 10)}
	var conns []*raw
	for i := range 4 + inflight.MaxHeld {
		c := b.raw(p.addr)
		c.send(100, uint32(i), nlm.ProcLock, lock)
		conns = append(conns, c)
		if i == 0 {
			until(t, "the first runs", func() bool { b.tab.mu.Lock(); defer b.tab.mu.Unlock(); return b.tab.holds[wire.OpLock] == 1 })
		}
	}
	until(t, "more than enough are dropped", func() bool { return b.a.Stats().Dropped == 3 })
	b.tab.mu.Lock()
	delete(b.tab.hold, wire.OpLock)
	b.tab.mu.Unlock()
	close(gate)
	want(t, "the original", conns[0].recv(100), nlm.Granted)
	answers := make(chan error, len(conns))
	for _, c := range conns[1:] {
		go func() {
			var h [1]byte
			c.SetReadDeadline(time.Now().Add(patience))
			_, err := c.Read(h[:])
			answers <- err
		}()
	}
	for range inflight.MaxHeld {
		if err := <-answers; err != nil {
			t.Fatalf("a held duplicate was not answered: %v", err)
		}
	}
	if n := b.tab.count(wire.OpLock); n != 1 {
		t.Errorf("executed %d times", n)
	}
}

// TestHostile: whatever comes is answered with an RPC error or a status, and the
// service goes on.
func TestHostile(t *testing.T) {
	everywhere(t, func(t *testing.T, vers uint32, nw string) {
		b := newBed(t, nil)
		p := b.peer(2, vers, nw)
		rnd := rand.New(rand.NewPCG(1, uint64(vers)))
		var good xdr.Writer
		(&nlm.LockArgs{Cookie: cookie, Block: true, Exclusive: true, Lock: p.lk("file1", 1, 0, 10)}).Encode(&good, vers)
		for proc := uint32(1); proc < 26; proc++ {
			for i := range 20 {
				args := append([]byte(nil), good.Buf...)
				switch i % 4 {
				case 0:
					args = args[:rnd.IntN(len(args))]
				case 1:
					args[rnd.IntN(len(args))] ^= 1 << rnd.IntN(8)
				case 2:
					binary.BigEndian.PutUint32(args[rnd.IntN(len(args)/4)*4:], 0xffffffff)
				case 3:
					args = make([]byte, 5000)
				}
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				_, err := p.rpc.Call(ctx, proc, args)
				cancel()
				var ae *sunrpc.AcceptError
				if err != nil && !errors.As(err, &ae) {
					t.Fatalf("procedure %d, %x: %v", proc, args, err)
				}
			}
		}
		want(t, "afterwards", p.lock("file9", 77, 0, 1, false), nlm.Granted)
	})
}

// BenchmarkLockUnlock measures pairs through the RPC server and this package,
// over a table that does nothing.
func BenchmarkLockUnlock(b *testing.B) {
	t := newFakeTable()
	t.force[wire.OpLock], t.force[wire.OpUnlock] = wire.OK, wire.OK
	s, err := New(Config{Table: t})
	if err != nil {
		b.Fatal(err)
	}
	a := s.Address(netip.MustParseAddr("127.0.0.1"), 1, 1, fakeFiles{})
	rpc := sunrpc.NewServer(sunrpc.Config{Programs: a.Programs()})
	defer rpc.Close()
	addr, err := rpc.ListenTCP(netip.MustParseAddrPort("127.0.0.1:0"), sunrpc.ListenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	c, err := sunrpc.Dial(context.Background(), "tcp", netip.AddrPort{}, addr, nlm.Program, 4, sunrpc.Cred{Flavor: sunrpc.AuthSys})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	l := nlm.Lock{CallerName: []byte("client.example.org"), FH: []byte("file1"), OH: []byte("4711@client"), Svid: 4711, Len: 1}
	var lock, unlock xdr.Writer
	(&nlm.LockArgs{Cookie: cookie, Exclusive: true, Lock: l}).Encode(&lock, 4)
	(&nlm.UnlockArgs{Cookie: cookie, Lock: l}).Encode(&unlock, 4)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Call(context.Background(), uint32(nlm.ProcLock), lock.Buf); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Call(context.Background(), uint32(nlm.ProcUnlock), unlock.Buf); err != nil {
			b.Fatal(err)
		}
	}
}
