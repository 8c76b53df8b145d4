package mdt

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/wire"
)

var (
	twinSeed = flag.Uint64("twin.seed", 0, "run one seed of the twin tests")
	twinRuns = flag.Int("twin.runs", 0, "number of seeds of the twin tests")
)

// twinSeeds gives the seeds of a run: fixed ones and, unless short, new ones.
func twinSeeds(fixed, more int) []uint64 {
	if *twinSeed != 0 {
		return []uint64{*twinSeed}
	}
	var s []uint64
	if testing.Short() {
		fixed = min(fixed, 2)
	}
	for i := range fixed {
		s = append(s, uint64(i)+1)
	}
	if *twinRuns > 0 {
		more = *twinRuns
	} else if testing.Short() {
		more = 1
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	for range more {
		s = append(s, rng.Uint64()|1)
	}
	return s
}

// keptOp is an operation that was answered and may have to be replayed.
type keptOp struct {
	client int
	req    *wire.Request // with what a replay needs
	first  *outcomeOf
}

// load makes random operations of several clients.
type load struct {
	rng     *rand.Rand
	clients []wire.ClientID
	xid     uint64
	nfsXID  uint32
	dirs    []wire.FID
	files   []wire.FID // of any type but directories
	logs    []uint64   // truncate records not reported
	seen    map[wire.FID]uint64
	open    [][]wire.FID    // by client: files whose epoch it may have open
	last    []*wire.Request // with keys, for retransmissions
	fresh   []*wire.Request // that made directories
	names   int
}

func newLoad(rng *rand.Rand, clients int) *load {
	l := &load{rng: rng, dirs: []wire.FID{wire.RootFID}, seen: map[wire.FID]uint64{}, names: 9}
	for i := range clients {
		l.clients = append(l.clients, wire.ClientID{0xc, byte(i + 1)})
	}
	l.open = make([][]wire.FID, clients)
	return l
}

func (l *load) dir() wire.FID { return l.dirs[l.rng.IntN(len(l.dirs))] }

func (l *load) file() wire.FID {
	if len(l.files) == 0 {
		return wire.FID{Seq: wire.FirstSeq, OID: 1}
	}
	// New ones more often, old ones may be gone.
	n := len(l.files)
	return l.files[n-1-min(l.rng.IntN(n), l.rng.IntN(n))]
}

func (l *load) name() []byte { return fmt.Appendf(nil, "n%d", l.rng.IntN(l.names)) }

func (l *load) setAttr() wire.SetAttr {
	var s wire.SetAttr
	if l.rng.IntN(2) == 0 {
		s.Mask |= wire.SetMode
		s.Mode = [...]uint32{0o644, 0o755, 0o777, 0o6755, 0o2775}[l.rng.IntN(5)]
	}
	if l.rng.IntN(6) == 0 {
		s.Mask |= wire.SetUID | wire.SetGID
		s.UID, s.GID = uint32(l.rng.IntN(3)), uint32(l.rng.IntN(3))
	}
	switch l.rng.IntN(6) {
	case 0:
		s.Mask |= wire.SetMtime | wire.SetAtime
		s.Mtime, s.Atime = l.rng.Int64N(1<<40), l.rng.Int64N(1<<40)
	case 1:
		s.Mask |= wire.SetMtimeNow | wire.SetAtimeNow
	}
	return s
}

// next makes an operation at the given time of the clock.
func (l *load) next(now int64) (client int, req *wire.Request) {
	l.xid++
	client = l.rng.IntN(len(l.clients))
	req = &wire.Request{Header: wire.Header{Client: l.clients[client], ClientGen: 1, XID: l.xid, Slot: uint16(l.rng.IntN(4))}}
	if len(l.last) > 0 && l.rng.IntN(1200) == 0 {
		// A retransmission, which may come by another frontend.
		again := *l.last[l.rng.IntN(len(l.last))]
		again.Client, again.XID, again.Slot = req.Client, req.XID, req.Slot
		return client, &again
	}
	if l.rng.IntN(3) == 0 {
		req.Cred = wire.Cred{UID: uint32(l.rng.IntN(3)), GID: uint32(l.rng.IntN(3))}
	}
	if l.rng.IntN(1200) == 0 {
		req.Flags |= wire.FlagWaitCommit
	}
	req.FID, req.Name = l.dir(), l.name()
	req.SetAttr = l.setAttr()
	switch l.rng.IntN(24) {
	case 0, 1, 2, 3, 4, 5:
		req.Op, req.How = wire.OpCreate, wire.CreateHow(l.rng.IntN(2))
		if l.rng.IntN(20) == 0 {
			req.How = wire.Exclusive
		}
		if l.rng.IntN(2) == 0 {
			req.Flags |= wire.FlagOpenEpoch
		}
		req.Verf[0] = byte(l.rng.IntN(2))
		if l.rng.IntN(4) == 0 {
			req.SetAttr.Mask |= wire.SetSize
			req.SetAttr.Size = uint64(l.rng.IntN(3) * 5000)
		}
	case 6, 7:
		req.Op = wire.OpMkdir
	case 8:
		req.Op, req.Data = wire.OpSymlink, l.name()
		if l.rng.IntN(4) == 0 {
			req.Data = make([]byte, maxCachedLink+50)
			for i := range req.Data {
				req.Data[i] = 'x'
			}
		}
	case 9:
		req.Op, req.Type, req.RdevMajor = wire.OpMknod, wire.TypeFifo, 3
		if l.rng.IntN(2) == 0 {
			req.Type = wire.TypeChr
		}
	case 10, 11:
		req.Op = wire.OpRemove
	case 12:
		req.Op = wire.OpRmdir
		if n := len(l.fresh); n > 0 {
			// The newest may be empty.
			req.FID, req.Name, req.Cred = l.fresh[n-1].FID, l.fresh[n-1].Name, wire.Cred{}
			l.fresh = l.fresh[:n-1]
		}
	case 13, 14, 15:
		req.Op, req.FID2, req.Name2 = wire.OpRename, l.dir(), l.name()
	case 16:
		req.Op, req.FID, req.FID2, req.Name2 = wire.OpLink, l.file(), l.dir(), l.name()
	case 17, 18:
		req.Op, req.FID = wire.OpSetattr, l.file()
		if l.rng.IntN(4) == 0 {
			req.FID = l.dir()
		}
		if l.rng.IntN(2) == 0 {
			req.SetAttr.Mask |= wire.SetSize
			req.SetAttr.Size = uint64(l.rng.IntN(4) * 3000)
		}
		if req.Guard = l.rng.IntN(10) == 0; req.Guard {
			req.GuardCtime = now - 1
		}
	case 19:
		req.Op = wire.OpTruncateDone
		for range min(len(l.logs), 1+l.rng.IntN(3)) {
			req.LogIDs = append(req.LogIDs, l.logs[l.rng.IntN(len(l.logs))])
		}
	case 20:
		req.Op, req.FID = wire.OpOpenEpoch, l.file()
	case 21, 22:
		req.Op = wire.OpCloseEpoch
		n := 1 + l.rng.IntN(80)/79*(1+l.rng.IntN(3))
		if l.rng.IntN(300) == 0 {
			n = 6
		}
		for range n {
			f := l.file()
			if o := l.open[client]; len(o) > 0 && l.rng.IntN(600) > 0 {
				f = o[len(o)-1]
				l.open[client] = o[:len(o)-1]
			}
			c := wire.EpochClose{FID: f, Size: uint64(l.rng.IntN(90000)), Used: 4096, Mtime: now, Ctime: now}
			switch l.rng.IntN(6) {
			case 0:
				c.Ctime = now + int64(30*time.Second)
			case 1:
				// Too far ahead to be followed.
				c.Ctime = now + int64(time.Hour)
			case 2:
				c.Ctime, c.Seen = 5, l.seen[f]
			}
			req.Epochs = append(req.Epochs, c)
		}
	case 23:
		req.Op, req.FID, req.Layout = wire.OpSetLayout, l.dir(), wire.Layout{StripeSize: 64 << 10, Count: uint8(l.rng.IntN(4))}
	}
	if req.Op < wire.OpTruncateDone && l.rng.IntN(2) == 0 {
		l.nfsXID++
		req.VIP = uint32(l.rng.IntN(2))
		req.Key = wire.ReplyKey{Addr: [16]byte{byte(l.nfsXID % 16)}, Port: 700, XID: l.nfsXID, Proc: 100003<<8 | 8, Sum: uint64(l.nfsXID)}
		l.last = append(l.last, req)
	}
	return client, req
}

// note learns from an answer.
func (l *load) note(client int, req *wire.Request, rep *wire.Reply) {
	if rep.Status != wire.OK {
		return
	}
	if rep.HasAttr {
		l.seen[rep.Attr.FID] = rep.Attr.Version
	}
	if rep.Truncate.LogID != 0 {
		l.logs = append(l.logs, rep.Truncate.LogID)
	}
	if rep.Reconstructed || rep.Transno == 0 {
		return
	}
	if rep.HasAttr && rep.Attr.EpochOpen {
		l.open[client] = append(l.open[client], rep.Attr.FID)
	}
	switch req.Op {
	case wire.OpMkdir:
		l.dirs, l.fresh = append(l.dirs, rep.Attr.FID), append(l.fresh, req)
	case wire.OpCreate, wire.OpSymlink, wire.OpMknod:
		l.files = append(l.files, rep.Attr.FID)
	}
}

// execOf says how a front would have it executed.
func execOf(req *wire.Request) front.Exec { return front.Exec{KeepSlot: req.Key.IsZero()} }

// twins is a target that crashes, and one that does the same and never does.
type twins struct {
	*load
	t    *testing.T
	b, w *body
	now  int64
	kept []keptOp
	acts map[wire.Op]int
}

func newTwins(t *testing.T, rng *rand.Rand, clients int) *twins {
	tw := &twins{load: newLoad(rng, clients), t: t, acts: map[wire.Op]int{}}
	// Small caches, so that both paths are taken.
	o := Options{InodeCache: 128, DentryCache: 128, RootMode: 0o777, StripeSize: 64 << 10}
	tw.b, tw.w = newBody(t, o), newBody(t, o)
	for _, b := range []*body{tw.b, tw.w} {
		b.e.hold()
		b.begin(0)
		for _, id := range tw.clients {
			b.put(id, 1)
		}
	}
	tw.now = tw.b.now
	return tw
}

// clock sets both clocks: mostly ahead, sometimes not.
func (tw *twins) clock() {
	if tw.rng.IntN(5) > 0 {
		tw.now += 1 + tw.rng.Int64N(1e6)
	}
	tw.b.now, tw.w.now = tw.now, tw.now
}

// ahead sets both clocks above all times that the targets know, since they differ
// in how often they have asked for the time.
func (tw *twins) ahead() {
	tw.now = max(tw.now, tw.b.m.state.Time, tw.w.m.state.Time) + 1
	tw.b.now, tw.w.now = tw.now, tw.now
	tw.b.rnd = max(tw.b.rnd, tw.w.rnd)
	tw.w.rnd = tw.b.rnd
}

// step lets both execute one operation.
func (tw *twins) step() {
	t := tw.t
	tw.clock()
	if tw.rng.IntN(30) == 0 {
		req := wire.Request{Header: wire.Header{Op: wire.OpTouchAtime, Client: tw.clients[0], ClientGen: 1}, FID: tw.file(), SetAttr: wire.SetAttr{Atime: tw.now}}
		for _, b := range []*body{tw.b, tw.w} {
			r := req
			b.m.Handle(&r, &wire.Reply{}, func() {})
		}
		return
	}
	c, req := tw.next(tw.now)
	x := execOf(req)
	got, want := tw.b.execute(req, x), tw.w.execute(req, x)
	if d := sameAnswer(&got.rep, &want.rep); d != "" {
		t.Fatalf("op %d of the twins differs: %s", req.Op, d)
	}
	if got.res.NotDone || got.res.Mismatch {
		t.Fatalf("op %d: %+v", req.Op, got.res)
	}
	tw.note(c, req, &got.rep)
	if got.res.Transno == 0 {
		return
	}
	if got.res.Held {
		if got.rep.LastCommitted < got.res.Transno {
			t.Fatalf("op %d was answered at %d, durable was %d", req.Op, got.res.Transno, got.rep.LastCommitted)
		}
		return
	}
	if !got.rep.Reconstructed && got.rep.Transno > got.rep.LastCommitted {
		tw.acts[req.Op]++
		tw.kept = append(tw.kept, keptOp{c, replayOf(req, &got.rep), got})
	}
}

// crash cuts the log of the one at a random batch, and starts both again, the
// other one in order. It drops what is durable of the kept operations.
func (tw *twins) crash() {
	d, n := tw.b.e.ends()
	tw.b.crash(d + min(tw.rng.IntN(n-d+1), tw.rng.IntN(n-d+1)))
	tw.w.restart()
	tab, err := tw.b.m.Table()
	if err != nil {
		tw.t.Fatal(err)
	}
	for len(tw.kept) > 0 && tw.kept[0].req.Transno <= tab.Transno {
		tw.kept = tw.kept[1:]
	}
}

// replayAll replays what is kept, up to n operations, each with its first result.
func (tw *twins) replayAll(n int) {
	t := tw.t
	t.Helper()
	for i := range tw.kept[:n] {
		k := &tw.kept[i]
		again := tw.b.replay(k.req)
		if again.res.Mismatch {
			t.Fatalf("replay %d of op %d: %v, versions %d, first %d", k.req.Transno, k.req.Op, again.rep.Status, again.res.PreVersions, k.req.PreVersions)
		}
		if d := sameAnswer(&again.rep, &k.first.rep); d != "" {
			t.Fatalf("replay %d of op %d has another answer: %s", k.req.Transno, k.req.Op, d)
		}
		if string(again.res.Data) != string(k.first.res.Data) || again.res.Transno != k.first.res.Transno || again.res.Status != k.first.res.Status {
			t.Fatalf("replay %d of op %d has another result: %+v, first %+v", k.req.Transno, k.req.Op, again.res, k.first.res)
		}
	}
}

func (tw *twins) compare() {
	tw.t.Helper()
	if d := diffContents(contents(tw.t, tw.b.e), contents(tw.t, tw.w.e)); d != "" {
		tw.t.Fatal("after the replay the store is not what it was:", d)
	}
	if err := checkStore(tw.b.e); err != nil {
		tw.t.Fatal(err)
	}
}

// TestTwin crashes a target at random batches, also in the middle of recovery,
// and replays what its clients keep; every record is then that of a target that
// did the same and never crashed (RD 16, RS 52: recovery that is interrupted
// begins anew and comes to the same end).
func TestTwin(t *testing.T) {
	total := map[wire.Op]int{}
	for _, seed := range twinSeeds(4, 8) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			tw := newTwins(t, rand.New(rand.NewPCG(seed, 11)), 3)
			replayed := 0
			for range 5 {
				tw.ahead()
				for range 400 + tw.rng.IntN(400) {
					tw.step()
				}
				tw.crash()
				for range tw.rng.IntN(3) {
					n := tw.rng.IntN(len(tw.kept) + 1)
					tw.replayAll(n)
					replayed += n
					tw.crash()
				}
				tw.replayAll(len(tw.kept))
				replayed += len(tw.kept)
				tw.compare()
				tw.kept = nil
				tw.b.begin(0)
				tw.w.begin(0)
			}
			t.Log(replayed, "operations replayed")
			for op, n := range tw.acts {
				total[op] += n
			}
		})
	}
	for _, op := range []wire.Op{
		wire.OpCreate, wire.OpMkdir, wire.OpSymlink, wire.OpMknod, wire.OpRemove, wire.OpRmdir, wire.OpRename, wire.OpLink,
		wire.OpSetattr, wire.OpTruncateDone, wire.OpOpenEpoch, wire.OpCloseEpoch, wire.OpSetLayout,
	} {
		if total[op] < 10 {
			t.Errorf("only %d operations %d could have been replayed", total[op], op)
		}
	}
}
