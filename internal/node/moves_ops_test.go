package node

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	nfs "github.com/willscott/go-nfs"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/vipagent"
	"github.com/baton-nfs/baton/internal/xdr"
	"github.com/baton-nfs/baton/nfsd/nfs3"
	"github.com/baton-nfs/baton/recovery/wire"
	"github.com/baton-nfs/baton/vip/viptest"
)

// result is the outcome of an operation: the status, and the handle that it made.
type result struct {
	status nfs.NFSStatus
	fh     []byte
}

// onceOp is an operation that is to be executed once.
type onceOp struct {
	name string
	proc nfs.NFSProcedure
	args interface{ Encode(*xdr.Writer) }
	// again is what an equal call gets that is not a copy.
	again nfs.NFSStatus
}

func (o *onceOp) send(k *rpcClient, xid uint32) result {
	k.t.Helper()
	out := k.answer(xid, nfs3.Program, nfs3.Version, uint32(o.proc), o.args)
	r := result{status: nfs.NFSStatus(xdr.NewReader(out).Uint32())}
	switch o.proc {
	case nfs.NFSProcedureCreate, nfs.NFSProcedureMkDir, nfs.NFSProcedureSymlink, nfs.NFSProcedureMkNod:
		var res nfs3.CreateRes
		if err := res.Decode(xdr.NewReader(out)); err != nil {
			k.t.Fatal(o.name, err)
		}
		r.fh = bytes.Clone(res.FH)
	}
	return r
}

// onceOps makes what the operations need in a directory.
func onceOps(k *rpcClient, dir []byte) []onceOp {
	obj := k.make(dir, "object")
	for _, n := range []string{"gone", "from", "over-from", "over-to"} {
		k.make(dir, n)
	}
	var res nfs3.CreateRes
	k.nfs(k.next(), nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("empty")}, &res)
	var at nfs3.GetattrRes
	k.nfs(k.next(), nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: obj}, &at)
	in := func(name string) nfs3.DirOpArgs { return nfs3.DirOpArgs{FH: dir, Name: []byte(name)} }
	gone, empty := in("gone"), in("empty")
	return []onceOp{
		{"setattr with guard", nfs.NFSProcedureSetAttr, &nfs3.SetattrArgs{FH: obj, Attr: wire.SetAttr{Mask: wire.SetMode, Mode: 0o600}, Guard: true, GuardCtime: at.Attr.Ctime}, nfs.NFSStatusNotSync},
		{"create guarded", nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("guarded"), How: wire.Guarded}, nfs.NFSStatusExist},
		{"create exclusive", nfs.NFSProcedureCreate, &nfs3.CreateArgs{FH: dir, Name: []byte("exclusive"), How: wire.Exclusive, Verf: [8]byte{1, 2}}, nfs.NFSStatusOk},
		{"mkdir", nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: dir, Name: []byte("sub")}, nfs.NFSStatusExist},
		{"symlink", nfs.NFSProcedureSymlink, &nfs3.SymlinkArgs{FH: dir, Name: []byte("link"), Target: []byte("object")}, nfs.NFSStatusExist},
		{"mknod", nfs.NFSProcedureMkNod, &nfs3.MknodArgs{FH: dir, Name: []byte("fifo"), Type: wire.TypeFifo}, nfs.NFSStatusExist},
		{"remove", nfs.NFSProcedureRemove, &gone, nfs.NFSStatusNoEnt},
		{"rmdir", nfs.NFSProcedureRmDir, &empty, nfs.NFSStatusNoEnt},
		{"rename", nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: []byte("from"), ToFH: dir, ToName: []byte("to")}, nfs.NFSStatusNoEnt},
		{"rename over another", nfs.NFSProcedureRename, &nfs3.RenameArgs{FromFH: dir, FromName: []byte("over-from"), ToFH: dir, ToName: []byte("over-to")}, nfs.NFSStatusNoEnt},
		{"link", nfs.NFSProcedureLink, &nfs3.LinkArgs{FH: obj, DirFH: dir, Name: []byte("hard")}, nfs.NFSStatusExist},
	}
}

// What has to be executed once is executed once, whichever way the address moves and by
// which connection a copy comes. own 5, 6, 8, 9, 10; 004.31, 004.32.
func TestOperationsOverMoves(t *testing.T) {
	m := upMoving(t)
	for _, w := range m.ways() {
		t.Run(w.name, func(t *testing.T) {
			m.t = t
			t.Run("once", func(t *testing.T) { m.t = t; m.once(w) })
			t.Run("two mounts", func(t *testing.T) { m.t = t; m.twoMounts(w) })
			t.Run("unstable", func(t *testing.T) { m.t = t; m.unstable(w) })
			t.Run("readdir", func(t *testing.T) { m.t = t; m.readdir(w) })
		})
	}
}

// once: operations were executed and the replies have not arrived when the address
// moves. Copies from the same port and from others get the first outcome, and nothing
// happens again. A call with another XID is another call, whatever it asks for: a
// client that numbers anew with each connection (FreeBSD) gets the outcome of a second
// execution, since an equal call of another process of that client cannot be told from it.
func (m *moving) once(w way) {
	t := m.t
	k, host := m.client(), netip.MustParseAddr("127.0.7.1")
	k.from = netip.AddrPortFrom(host, 20001)
	var sub nfs3.CreateRes
	k.nfs(k.next(), nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: k.mount(), Name: []byte("once-" + w.name)}, &sub)
	dir := bytes.Clone(sub.FH)
	ops := onceOps(k, dir)
	first := make([]result, len(ops))
	for i := range ops {
		first[i] = ops[i].send(k, uint32(1000+i))
		if first[i].status != nfs.NFSStatusOk {
			t.Fatalf("%s: %v", ops[i].name, first[i].status)
		}
	}
	k.close()
	w.run()
	same, other := m.client(), m.client()
	same.from, other.from = k.from, netip.AddrPortFrom(host, 0)
	check := func(k *rpcClient, how string) {
		t.Helper()
		for i := range ops {
			if r := ops[i].send(k, uint32(1000+i)); r.status != nfs.NFSStatusOk || !bytes.Equal(r.fh, first[i].fh) {
				t.Errorf("%s, sent again %s: %v, handle %x, want %x", ops[i].name, how, r.status, r.fh, first[i].fh)
			}
		}
	}
	check(same, "from the same port")
	same.close()
	check(other, "from another port")
	other.xid = 9000
	for i := range ops {
		if r := ops[i].send(other, other.next()); r.status != ops[i].again {
			t.Errorf("%s as another call: %v, want %v", ops[i].name, r.status, ops[i].again)
		}
	}
	check(other, "after an equal call of its own")
	for name, want := range map[string]bool{
		"object": true, "guarded": true, "exclusive": true, "sub": true, "link": true, "fifo": true, "to": true, "over-to": true, "hard": true,
		"gone": false, "empty": false, "from": false, "over-from": false,
	} {
		if other.there(dir, name) != want {
			t.Errorf("%s is there: %v", name, !want)
		}
	}
	var at nfs3.GetattrRes
	other.nfs(other.next(), nfs.NFSProcedureGetAttr, &nfs3.FHArgs{FH: ops[len(ops)-1].args.(*nfs3.LinkArgs).FH}, &at)
	if at.Attr.Nlink != 2 || at.Attr.Mode&0o777 != 0o600 {
		t.Errorf("the object has %d links and mode %o", at.Attr.Nlink, at.Attr.Mode)
	}
}

// twoMounts: equal calls with equal XIDs that come by two connections of one host are
// two calls, and each one's copy gets its own outcome from the next owner, too.
func (m *moving) twoMounts(w way) {
	t := m.t
	x, y, host := m.client(), m.client(), netip.MustParseAddr("127.0.7.2")
	x.from, y.from = netip.AddrPortFrom(host, 20001), netip.AddrPortFrom(host, 20002)
	dir := x.mount()
	y.mount()
	x.make(dir, "both-"+w.name)
	rm := onceOp{"remove", nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte("both-" + w.name)}, 0}
	want := func(how string) {
		t.Helper()
		if r := rm.send(x, 7000); r.status != nfs.NFSStatusOk {
			t.Errorf("%s: the one that removed it: %v", how, r.status)
		}
		if r := rm.send(y, 7000); r.status != nfs.NFSStatusNoEnt {
			t.Errorf("%s: the other one: %v", how, r.status)
		}
	}
	want("before")
	x.close()
	y.close()
	w.run()
	want("after")
}

// unstable: data that were acknowledged and not yet written out survive a planned move
// with their verifier. After a crash COMMIT says that they may be lost.
func (m *moving) unstable(w way) {
	t := m.t
	k := m.client()
	dir := k.mount()
	block := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 64<<10) }
	const files, blocks = 3, 4
	var fhs [files][]byte
	var verf [8]byte
	for f := range fhs {
		fhs[f] = k.make(dir, fmt.Sprintf("unstable-%s-%d", w.name, f))
		for i := range blocks {
			v := k.writeAt(fhs[f], uint64(i)*64<<10, block(i), wire.Unstable)
			if f+i > 0 && v != verf {
				t.Fatal("the verifier changes while nothing is lost")
			}
			verf = v
		}
	}
	if from := m.on; !w.crash {
		// Else an OST could lose them later, and the next owner's verifier would not tell.
		left, net := -1, m.net.Machine(from.cluster.name)
		net.On(viptest.Remove, func(context.Context, netip.Addr) error {
			left = uncommitted(from)
			return nil
		})
		if uncommitted(from) == 0 {
			t.Log("all data were written out already")
		}
		w.run()
		net.On(viptest.Remove, nil)
		if left != 0 {
			t.Errorf("%d requests were not durable when the address was removed (-1: it was not)", left)
		}
	} else {
		w.run()
	}
	for f := range fhs {
		now := k.commit(fhs[f])
		if (now != verf) != w.crash {
			t.Errorf("COMMIT of file %d: the verifier has changed: %v", f, now != verf)
		}
		if now != verf {
			for i := range blocks {
				k.writeAt(fhs[f], uint64(i)*64<<10, block(i), wire.Unstable)
			}
			if k.commit(fhs[f]) != now {
				t.Error("the verifier changes again")
			}
		}
	}
	w.run() // what was committed is there whatever happens
	for f := range fhs {
		for i := range blocks {
			var res nfs3.ReadRes
			k.nfs(k.next(), nfs.NFSProcedureRead, &nfs3.ReadArgs{FH: fhs[f], Offset: uint64(i) * 64 << 10, Count: 64 << 10}, &res)
			if res.Status != nfs.NFSStatusOk || !bytes.Equal(res.Data, block(i)) {
				t.Errorf("file %d block %d: %v, %d bytes", f, i, res.Status, len(res.Data))
			}
		}
	}
}

// uncommitted is how much a node's frontend has been answered by OSTs that is not durable.
func uncommitted(n *Node) (sum int) {
	for _, im := range n.Status().Imports {
		if im.Target != mdtName {
			sum += im.Uncommitted
		}
	}
	return sum
}

// readdir: a directory that is read in pieces while the address moves and names come and
// go has each name that stays exactly once.
func (m *moving) readdir(w way) {
	t := m.t
	k := m.client()
	var sub nfs3.CreateRes
	k.nfs(k.next(), nfs.NFSProcedureMkDir, &nfs3.MkdirArgs{FH: k.mount(), Name: []byte("list-" + w.name)}, &sub)
	dir := bytes.Clone(sub.FH)
	const names = 60
	for i := range names {
		k.make(dir, fmt.Sprintf("stays-%03d", i))
	}
	for _, plus := range []bool{false, true} {
		seen := map[string]int{}
		var verf [8]byte
		var cookie uint64
		pieces := 0
		for eof := false; !eof; pieces++ {
			res := nfs3.ReaddirRes{Plus: plus}
			if plus {
				k.nfs(k.next(), nfs.NFSProcedureReadDirPlus, &nfs3.ReaddirplusArgs{FH: dir, Cookie: cookie, CookieVerf: verf, DirCount: 1 << 10, MaxCount: 4 << 10}, &res)
			} else {
				k.nfs(k.next(), nfs.NFSProcedureReadDir, &nfs3.ReaddirArgs{FH: dir, Cookie: cookie, CookieVerf: verf, Count: 1 << 10}, &res)
			}
			if res.Status != nfs.NFSStatusOk || len(res.Entries) == 0 && !res.EOF {
				t.Fatalf("piece %d: %v", pieces, res.Status)
			}
			for _, e := range res.Entries {
				seen[string(e.Name)]++
				cookie = e.Cookie
			}
			verf, eof = res.CookieVerf, res.EOF
			if pieces < 2 {
				name := fmt.Sprintf("goes-%v-%d", plus, pieces)
				k.make(dir, name)
				w.run()
				if st := k.remove(dir, name); st != nfs.NFSStatusOk {
					t.Error(name, st)
				}
			}
		}
		if pieces < 3 {
			t.Errorf("the directory came in %d pieces", pieces)
		}
		for i := range names {
			if n := seen[fmt.Sprintf("stays-%03d", i)]; n != 1 {
				t.Errorf("plus=%v: name %d was listed %d times", plus, i, n)
			}
		}
	}
}

// A copy of a call reaches the next owner while the last one still has the call in
// progress: the MDT, which is away meanwhile and recovers when both are there, decides
// which of them it executes, once. An address that moves while the MDT is away, or in
// recovery, is served when it is back. own 7, 15; 004.24, 004.32.
func TestMoveWhileTheMDTIsAway(t *testing.T) {
	m := upMoving(t)
	k := m.client()
	dir := k.mount()
	const n = 8
	for i := range n {
		k.make(dir, fmt.Sprintf("f%d", i))
	}
	mds := m.nodes["c"]
	if err := mds.StopTarget(ctx, mdtName); err != nil {
		t.Fatal(err)
	}
	rm := make([]onceOp, n)
	for i := range rm {
		rm[i] = onceOp{"remove", nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: fmt.Appendf(nil, "f%d", i)}, nfs.NFSStatusNoEnt}
		if _, err := k.conn.Write(k.rec(uint32(500+i), nfs3.Program, nfs3.Version, uint32(rm[i].proc), rm[i].args)); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "the calls to be in progress", func() bool { s := m.seen(k.conn); return s != nil && s.Inflight == n })
	old := k.conn
	k.conn = nil
	defer old.Close()
	from := m.on
	cut := m.net.Machine(from.cluster.name)
	cut.Isolate(true)
	m.takeFrom()
	m.become(m.other(), vipagent.Taking)
	if err := mds.StartTarget(ctx, mdtName, ""); err != nil {
		t.Fatal(err)
	}
	m.arrived()
	cut.Isolate(false)
	for i := range rm {
		if r := rm[i].send(k, uint32(500+i)); r.status != nfs.NFSStatusOk {
			t.Errorf("remove %d, sent again: %v", i, r.status)
		}
	}
	k.xid = 9000
	for i := range rm {
		if r := rm[i].send(k, k.next()); r.status != nfs.NFSStatusNoEnt {
			t.Errorf("remove %d once more: %v", i, r.status)
		}
	}
	// What the old owner said, if anything, is no other outcome.
	old.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // it has arrived, if it was sent
	ends := rpcClient{t: t, conn: old}
	for range n {
		out, err := ends.anything()
		if err != nil {
			break
		}
		if st := nfs.NFSStatus(xdr.NewReader(out).Uint32()); st != nfs.NFSStatusOk {
			t.Errorf("the old owner answered %v", st)
		}
	}
}

// A frontend dies while the MDT is away, so that the MDT waits for it in its recovery;
// another one takes the address meanwhile. own 15.
func TestFrontendGoneInRecovery(t *testing.T) {
	m := upMoving(t)
	k := m.client()
	dir := k.mount()
	k.make(dir, "gone")
	rm := onceOp{"remove", nfs.NFSProcedureRemove, &nfs3.DirOpArgs{FH: dir, Name: []byte("gone")}, 0}
	if r := rm.send(k, 500); r.status != nfs.NFSStatusOk {
		t.Fatal(r.status)
	}
	k.close()
	mds := m.nodes["c"]
	if err := mds.StopTarget(ctx, mdtName); err != nil {
		t.Fatal(err)
	}
	dead := m.on
	to := m.other()
	// Nobody hears of its end: the registry is away while it ends.
	if err := mds.StopTarget(ctx, config.MGSName); err != nil {
		t.Fatal(err)
	}
	delete(m.nodes, dead.cluster.name)
	short, cancel := context.WithTimeout(ctx, time.Second)
	_ = dead.Stop(short) // neither the MDT nor the registry can be told
	cancel()
	m.net.Machine(dead.cluster.name).PowerOff()
	for _, target := range []string{config.MGSName, mdtName} {
		if err := mds.StartTarget(ctx, target, ""); err != nil {
			t.Fatal(err)
		}
	}
	if v := m.vip(to); v.Node != dead.cluster.name || v.Clean {
		t.Fatalf("the registry knows of the end: %+v", v)
	}
	m.abandon(to)
	m.assign(to, to.cluster.name)
	m.become(to, vipagent.Serving)
	m.on = to
	k.at = func() netip.AddrPort { return served(to) }
	if r := rm.send(k, 500); r.status != nfs.NFSStatusOk {
		t.Errorf("sent again: %v", r.status)
	}
	k.xid = 9000
	k.make(dir, "new")
	if v := m.vip(to); v.NSMState != 3 {
		t.Errorf("NSM state %d", v.NSMState)
	}
}
