package mdt

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// fetch asks for everything that an OST has to know, piece by piece.
func fetch(t testing.TB, m *MDT, ost uint16, between func()) (o wire.OSTInfo, pieces int) {
	t.Helper()
	var next []byte
	for {
		rep := &wire.Reply{}
		// Nobody that the target knows.
		m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpOSTFetch, Client: wire.ClientID{'?'}}, Count: uint32(ost), Name: next}, rep, func() {})
		if rep.Status != wire.OK {
			t.Fatal(rep.Status)
		}
		if len(rep.Data) > wire.MaxData {
			t.Fatalf("%d bytes", len(rep.Data))
		}
		if err := wire.DecodeOSTInfo(rep.Data, &o); err != nil {
			t.Fatal(err)
		}
		pieces++
		if next = o.Next; len(next) == 0 {
			return o, pieces
		}
		if len(next) > wire.MaxNameLen {
			t.Fatalf("cursor of %d bytes", len(next))
		}
		if between != nil {
			between()
		}
	}
}

// TestOSTFetch: an OST is told what concerns it, and only of removals that are
// durable.
func TestOSTFetch(t *testing.T) {
	b := served(t, Options{OSTs: func() []OSTState {
		return []OSTState{{Index: 0, Up: true, Free: 1 << 40}, {Index: 1, Up: true, Free: 1 << 40}}
	}})
	b.e.allow()
	ch := make(chan error, 1)
	b.m.RaiseVIP(2, 9, func(err error) { ch <- err })
	<-ch
	var fids []wire.FID
	var on []uint16
	for i := range 6 {
		r := reqOf(clientA, wire.OpCreate, wire.RootFID, fmt.Sprint("f", i))
		r.Flags |= wire.FlagOpenEpoch
		e := b.ok(r, front.Exec{})
		fids, on = append(fids, e.rep.Attr.FID), append(on, e.rep.Attr.Layout.OST[0])
	}
	b.ok(reqOf(clientB, wire.OpOpenEpoch, fids[0], ""), front.Exec{})
	b.ok(reqOf(clientA, wire.OpRemove, wire.RootFID, "f4"), front.Exec{})
	b.ok(reqOf(clientA, wire.OpRemove, wire.RootFID, "f5"), front.Exec{})
	tenureA, tenureB := b.m.Tenure(clientA), b.m.Tenure(clientB)
	b.m.DelClient(clientB, 1, true)
	b.sync()
	if err := b.m.FenceDone(clientB, tenureB+1, 1); err != nil {
		t.Fatal(err)
	}
	b.e.hold()
	b.ok(reqOf(clientA, wire.OpRemove, wire.RootFID, "f3"), front.Exec{})
	for ost := range uint16(3) {
		o, _ := fetch(t, b.m, ost, nil)
		if len(o.VIPs) != 1 || o.VIPs[0] != (wire.VIPEpoch{VIP: 2, Epoch: 9}) {
			t.Errorf("OST %d: VIPs %+v", ost, o.VIPs)
		}
		if len(o.Clients) != 1 || o.Clients[0] != (wire.ClientInfo{ID: clientA, Gen: 1, Tenure: tenureA}) {
			t.Errorf("OST %d: clients %+v", ost, o.Clients)
		}
		if want := ost == 0; want != (len(o.Fences) == 1) || want && o.Fences[0] != (wire.Fence{ID: clientB, Tenure: tenureB + 1}) {
			t.Errorf("OST %d: fences %+v", ost, o.Fences)
		}
		got := map[wire.EpochInfo]bool{}
		for _, e := range o.Epochs {
			got[e] = true
		}
		n := 0
		for i, f := range fids {
			for _, c := range []wire.ClientID{clientA, clientB} {
				want := on[i] == ost && i < 3 && (c == clientA || i == 0)
				if want {
					n++
				}
				if got[wire.EpochInfo{FID: f, Client: c}] != want {
					t.Errorf("OST %d: epoch of %v by %c: told %v", ost, f, c[0], !want)
				}
			}
		}
		if len(got) != n || len(o.Epochs) != n {
			t.Errorf("OST %d: %d epochs, want %d", ost, len(o.Epochs), n)
		}
		gone := map[wire.FID]bool{}
		for _, f := range o.Unlinked {
			gone[f] = true
		}
		for i, f := range fids {
			if want := on[i] == ost && i >= 4; gone[f] != want {
				t.Errorf("OST %d: removal of %v told: %v", ost, f, !want)
			}
		}
	}
	// What is not readable is told rather than lost, but for what nobody can name.
	b.e.allow()
	b.sync()
	_, n := b.e.ends()
	bt := b.e.NewBatch()
	bt.Set(appendInodeKey(nil, fids[1]), []byte("bad"))
	bt.Set(append(appendEpochKey(nil, fids[1], clientA), 1), []byte("bad"))
	bt.Set(appendLogKey(nil, 5), []byte("bad"))
	if err := b.e.Apply(bt); err != nil {
		t.Fatal(err)
	}
	b.crash(n + 1)
	for ost := range uint16(2) {
		o, _ := fetch(t, b.m, ost, nil)
		told := false
		for _, e := range o.Epochs {
			told = told || e.FID == fids[1]
		}
		if !told {
			t.Errorf("OST %d: the epoch of an unreadable file is not told", ost)
		}
	}
}

// TestOSTFetchInPieces: with more than an answer holds, and everything changing
// meanwhile, what is there all the time is told.
func TestOSTFetchInPieces(t *testing.T) {
	files := 6000
	if testing.Short() {
		files = 3500
	}
	e, err := openEngine(vfs.NewMem(), "mdt")
	if err != nil {
		t.Fatal(err)
	}
	var now atomic.Int64
	m, err := Open(Options{Engine: e, Clock: func() int64 { return now.Add(1000) }})
	if err != nil {
		t.Fatal(err)
	}
	m.Begin(0)
	b := &body{t: t, m: m, e: newLogEngine()}
	var ids []wire.ClientID
	for i := range 3000 {
		id := wire.ClientID{1, byte(i >> 8), byte(i)}
		ids = append(ids, id)
		m.PutClient(recov.ClientRecord{Client: id, Gen: 1}, nil)
	}
	must := map[wire.EpochInfo]bool{}
	for i := range files {
		r := reqOf(ids[i%len(ids)], wire.OpCreate, wire.RootFID, fmt.Sprint("f", i))
		r.Flags |= wire.FlagOpenEpoch
		ep := wire.EpochInfo{FID: b.ok(r, front.Exec{}).rep.Attr.FID, Client: r.Client}
		must[ep] = true
	}
	gone := map[wire.FID]bool{}
	for ep := range must {
		if len(gone) == files/2 {
			break
		}
		delete(must, ep)
		gone[ep.FID] = true
	}
	for i := range files {
		lk := &wire.Reply{}
		m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpLookup, Client: ids[0], ClientGen: 1}, FID: wire.RootFID, Name: fmt.Append(nil, "f", i)}, lk, func() {})
		if lk.Status != wire.OK {
			t.Fatal(lk.Status)
		}
		if gone[lk.Attr.FID] {
			b.ok(reqOf(ids[0], wire.OpRemove, wire.RootFID, fmt.Sprint("f", i)), front.Exec{})
		}
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			// Clients, files, epochs and removals come and go.
			id := wire.ClientID{0, byte(w)}
			for i := 0; !stop.Load(); i++ {
				m.PutClient(recov.ClientRecord{Client: id, Gen: uint64(i)}, nil)
				r := reqOf(id, wire.OpCreate, wire.RootFID, fmt.Sprintf("w%d", w))
				r.ClientGen, r.Flags = uint64(i), wire.FlagOpenEpoch
				b.ok(r, front.Exec{})
				r = reqOf(id, wire.OpRemove, wire.RootFID, fmt.Sprintf("w%d", w))
				r.ClientGen = uint64(i)
				b.ok(r, front.Exec{})
				m.DelClient(id, uint64(i), i%2 == 0)
			}
		}()
	}
	for range 3 {
		o, pieces := fetch(t, m, 0, nil)
		if pieces < 4 {
			t.Errorf("%d pieces", pieces)
		}
		left := map[wire.EpochInfo]bool{}
		for ep := range must {
			left[ep] = true
		}
		for _, ep := range o.Epochs {
			delete(left, ep)
		}
		known := map[wire.ClientID]bool{}
		for _, c := range o.Clients {
			known[c.ID] = true
		}
		n := 0
		for _, f := range o.Unlinked {
			if gone[f] {
				n++
			}
		}
		miss := 0
		for _, id := range ids {
			if !known[id] {
				miss++
			}
		}
		if len(left) > 0 || n != len(gone) || miss > 0 {
			t.Errorf("%d epochs of %d, %d removals of %d, %d clients of %d are not told", len(left), len(must), len(gone)-n, len(gone), miss, len(ids))
		}
	}
	stop.Store(true)
	wg.Wait()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOSTFetchFullBetween: the answer is full where one kind of entries ends.
func TestOSTFetchFullBetween(t *testing.T) {
	b := newBody(t, Options{})
	b.begin(0)
	n := 0
	for o := (wire.OSTInfo{}); o.Size() <= fetchBytes; n++ {
		id := wire.ClientID{1, byte(n >> 8), byte(n)}
		b.m.PutClient(recov.ClientRecord{Client: id, Gen: 1}, nil)
		o.Clients = append(o.Clients, wire.ClientInfo{})
	}
	b.put(clientB, 1)
	b.m.DelClient(clientB, 1, true)
	b.sync()
	o, pieces := fetch(t, b.m, 0, nil)
	if pieces != 2 || len(o.Clients) != n || len(o.Fences) != 1 {
		t.Errorf("%d pieces, %d clients of %d, %d fences", pieces, len(o.Clients), n, len(o.Fences))
	}
}

// FuzzOSTFetch gives any cursor: an answer, or ErrInval, and always an end.
func FuzzOSTFetch(f *testing.F) {
	b := served(f, Options{})
	b.e.allow()
	for i := range 20 {
		r := reqOf(clientA, wire.OpCreate, wire.RootFID, fmt.Sprint("f", i))
		r.Flags |= wire.FlagOpenEpoch
		b.ok(r, front.Exec{})
		if i%2 == 0 {
			b.ok(reqOf(clientA, wire.OpRemove, wire.RootFID, fmt.Sprint("f", i)), front.Exec{})
		}
	}
	b.m.DelClient(clientB, 1, true)
	b.sync()
	f.Add([]byte{}, uint32(0))
	f.Add([]byte{3}, uint32(3))
	f.Add([]byte{3, 0xff, 0xff}, uint32(7))
	f.Add([]byte{4, 0, 0, 0, 0, 0, 0, 0, 1}, uint32(1<<16))
	f.Fuzz(func(t *testing.T, cursor []byte, ost uint32) {
		for range 10 {
			rep := &wire.Reply{}
			b.m.Handle(&wire.Request{Header: wire.Header{Op: wire.OpOSTFetch}, Count: ost, Name: cursor}, rep, func() {})
			if rep.Status == wire.ErrInval {
				return
			}
			var o wire.OSTInfo
			if err := wire.DecodeOSTInfo(rep.Data, &o); rep.Status != wire.OK || err != nil {
				t.Fatal(rep.Status, err)
			}
			if cursor = o.Next; len(cursor) == 0 {
				return
			}
		}
		t.Fatal("no end")
	})
}
