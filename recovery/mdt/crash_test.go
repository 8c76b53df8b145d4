package mdt

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/baton-nfs/baton/recovery/store"
	"github.com/baton-nfs/baton/recovery/store/local"
	"github.com/baton-nfs/baton/recovery/target"
	"github.com/baton-nfs/baton/recovery/wire"
)

// opLog is one worker's history: what it was told is done, and what it had
// asked for.
type opLog struct {
	dir   wire.FID
	id    byte
	mu    sync.Mutex
	acked []logged // answered OK
	open  *logged  // asked and not answered
}

type logged struct {
	op          wire.Op
	name, name2 string
	xid         uint32
}

// apply is what an operation does to a set of names.
func (l *logged) apply(names map[string]bool) {
	switch l.op {
	case wire.OpCreate, wire.OpMkdir:
		names[l.name] = true
	case wire.OpRemove:
		delete(names, l.name)
	case wire.OpRename:
		delete(names, l.name)
		names[l.name2] = true
	}
}

func (w *opLog) snapshot() ([]logged, *logged) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]logged(nil), w.acked...), w.open
}

// run works in its own directory until stop or until the target fails.
func (w *opLog) run(m *MDT, rng *rand.Rand, stop *atomic.Bool) error {
	names := map[string]bool{}
	done := make(chan struct{}, 1)
	for n := uint32(1); !stop.Load(); n++ {
		l := &logged{op: wire.OpCreate, name: fmt.Sprintf("f%d", n), xid: n}
		if len(names) > 0 && rng.IntN(2) == 0 {
			for k := range names {
				l.name = k
				break
			}
			l.op = wire.OpRemove
			if rng.IntN(2) == 0 {
				l.op, l.name2 = wire.OpRename, fmt.Sprintf("r%d", n)
			}
		}
		w.mu.Lock()
		w.open = l
		w.mu.Unlock()
		req := &wire.Request{
			Header: wire.Header{Op: l.op, Client: testClient, Flags: wire.FlagWaitCommit | wire.FlagOpenEpoch},
			Key:    wire.ReplyKey{Addr: [16]byte{w.id}, Port: 1, XID: n, Proc: 9, Sum: uint64(n)},
			FID:    w.dir, Name: []byte(l.name), FID2: w.dir, Name2: []byte(l.name2),
		}
		rep := &wire.Reply{}
		m.Handle(req, rep, func() { done <- struct{}{} })
		<-done
		if rep.Status != wire.OK {
			return rep.Status
		}
		l.apply(names)
		w.mu.Lock()
		w.acked = append(w.acked, *l)
		w.open = nil
		w.mu.Unlock()
	}
	return nil
}

// verify checks a store after a crash: structure, and for each worker that what
// is there is the effect of a prefix of its history that holds at least all that
// was acknowledged before the crash, with a reply record for each operation of
// the prefix and for no other.
func verify(e store.Engine, ws []*opLog, acked []int, history [][]logged) error {
	if err := checkStore(e); err != nil {
		return err
	}
	recs := map[[2]uint32]bool{}
	err := IterReplies(e, func(_ uint32, addr [16]byte, _ uint32, rec target.Record, err error) error {
		recs[[2]uint32{uint32(addr[0]), rec.XID}] = true
		return err
	})
	if err != nil {
		return err
	}
	have := map[wire.FID]map[string]bool{}
	err = IterNames(e, func(dir wire.FID, name []byte, _ Entry, err error) error {
		if have[dir] == nil {
			have[dir] = map[string]bool{}
		}
		have[dir][string(name)] = true
		return err
	})
	if err != nil {
		return err
	}
	for i, w := range ws {
		want := map[string]bool{}
		n := 0
		for n < len(history[i]) && recs[[2]uint32{uint32(w.id), history[i][n].xid}] {
			history[i][n].apply(want)
			n++
		}
		if n < acked[i] {
			return fmt.Errorf("worker %d: %d operations were acknowledged, only %d have records", i, acked[i], n)
		}
		for _, l := range history[i][n:] {
			if recs[[2]uint32{uint32(w.id), l.xid}] {
				return fmt.Errorf("worker %d: call %d has a record, call %d before it none", i, l.xid, history[i][n].xid)
			}
		}
		if !maps.Equal(want, have[w.dir]) && len(want)+len(have[w.dir]) > 0 {
			return fmt.Errorf("worker %d: records tell of %d names, %d are there (%d of %d operations acknowledged)",
				i, len(want), len(have[w.dir]), acked[i], len(history[i]))
		}
	}
	return nil
}

// history is everything a stopped worker asked for.
func (w *opLog) history() []logged {
	h, open := w.snapshot()
	if open != nil {
		h = append(h, *open)
	}
	return h
}

func sum(ns []int) (n int) {
	for _, i := range ns {
		n += i
	}
	return n
}

func workers(b *bed, n int) []*opLog {
	var ws []*opLog
	for i := range n {
		ws = append(ws, &opLog{id: byte(i + 1), dir: b.mkdir(wire.RootFID, fmt.Sprint("w", i))})
	}
	return ws
}

// TestPowerFail cuts the power at random moments under concurrent load. What
// was acknowledged with FlagWaitCommit is there, nothing is half done, and the
// target works on.
func TestPowerFail(t *testing.T) {
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fs := vfs.NewCrashableMem()
	b := newBed(t, fs, Options{})
	for round := range rounds {
		var ws []*opLog
		for i := range 6 {
			ws = append(ws, &opLog{id: byte(i + 1 + 10*round), dir: b.mkdir(wire.RootFID, fmt.Sprintf("w%d.%d", round, i))})
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		for _, w := range ws {
			wg.Add(1)
			r := rand.New(rand.NewPCG(rng.Uint64(), 1))
			go func() {
				defer wg.Done()
				if err := w.run(b.m, r, &stop); err != nil {
					t.Error(err)
				}
			}()
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		acked := make([]int, len(ws))
		for i, w := range ws {
			h, _ := w.snapshot()
			acked[i] = len(h)
		}
		clone := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		stop.Store(true)
		wg.Wait()
		b.close()
		history := make([][]logged, len(ws))
		total := 0
		for i, w := range ws {
			history[i] = w.history()
			total += len(history[i])
		}
		t.Logf("round %d: cut after %d of %d operations were acknowledged", round, sum(acked), total)

		e, err := openEngine(clone, "mdt")
		if err != nil {
			t.Fatal("after the crash:", err)
		}
		if err := verify(e, ws, acked, history); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		// Go on from the state after the crash.
		fs = clone
		b.fs, b.e = clone, e
		b.openMDT()
	}
	b.close()
}

// TestDiskErrors injects errors into writes of the store's files: the target
// fails as a whole, nothing panics or exits, what was acknowledged is on disk.
func TestDiskErrors(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Log("seed", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for _, kind := range []string{"write", "sync"} {
		t.Run(kind, func(t *testing.T) {
			mem := vfs.NewCrashableMem()
			var armed atomic.Bool
			inj := errorfs.InjectorFunc(func(op errorfs.Op) error {
				if !armed.Load() || !strings.HasSuffix(op.Path, ".log") {
					return nil
				}
				switch op.Kind {
				case errorfs.OpFileWrite:
					if kind == "write" {
						return os.ErrDeadlineExceeded
					}
				case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
					if kind == "sync" {
						return os.ErrDeadlineExceeded
					}
				}
				return nil
			})
			var m atomic.Pointer[MDT]
			var fails atomic.Int32
			e, err := local.OpenPebble("mdt", local.Options{FS: errorfs.Wrap(mem, inj), MinFreeBytes: -1, MemTableBytes: 1 << 20, OnFail: func(err error) {
				fails.Add(1)
				m.Load().Fail(err)
			}})
			if err != nil {
				t.Fatal(err)
			}
			b := &bed{t: t, e: e}
			b.openMDT()
			m.Store(b.m)
			ws := workers(b, 6)
			var wg sync.WaitGroup
			var stop atomic.Bool
			errs := make([]error, len(ws))
			for i, w := range ws {
				wg.Add(1)
				r := rand.New(rand.NewPCG(rng.Uint64(), 1))
				go func() { defer wg.Done(); errs[i] = w.run(b.m, r, &stop) }()
			}
			time.Sleep(time.Duration(5+rng.IntN(20)) * time.Millisecond)
			armed.Store(true)
			wg.Wait()
			for i, err := range errs {
				if err != wire.ErrIO && err != wire.ErrTargetDown {
					t.Errorf("worker %d ended with %v", i, err)
				}
			}
			if rep := b.call(&wire.Request{Header: wire.Header{Op: wire.OpGetattr}, FID: wire.RootFID}); rep.Status != wire.ErrTargetDown {
				t.Error("after the failure:", rep.Status)
			}
			if fails.Load() != 1 || !errors.Is(e.Failed(), store.ErrFailed) {
				t.Errorf("OnFail called %d times, failed %v", fails.Load(), e.Failed())
			}
			if err := b.m.Close(); err == nil {
				t.Error("closing a failed target succeeds")
			}
			_ = e.Close()
			armed.Store(false)
			acked, history := make([]int, len(ws)), make([][]logged, len(ws))
			for i, w := range ws {
				h, _ := w.snapshot()
				acked[i], history[i] = len(h), w.history()
			}
			e2, err := openEngine(mem.CrashClone(vfs.CrashCloneCfg{}), "mdt")
			if err != nil {
				t.Fatal(err)
			}
			defer e2.Close()
			if err := verify(e2, ws, acked, history); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestConcurrentReaders lets readers use the caches while writers change the
// same objects; run with -race. A reader never sees half of a change: a file's
// mode and uid are always changed together.
func TestConcurrentReaders(t *testing.T) {
	b := newBed(t, vfs.NewMem(), Options{InodeCache: 256, DentryCache: 256})
	defer b.close()
	dir := b.mkdir(wire.RootFID, "d")
	fids := make([]wire.FID, 8)
	for i := range fids {
		fids[i] = b.create(dir, fmt.Sprint("f", i))
	}
	for _, f := range fids {
		b.must(&wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: f, SetAttr: wire.SetAttr{Mask: wire.SetMode | wire.SetUID}})
	}
	var stop atomic.Bool
	var readers, writers sync.WaitGroup
	for r := range 3 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			last := map[wire.FID]uint64{}
			for i := 0; !stop.Load(); i++ {
				req := &wire.Request{Header: wire.Header{Op: wire.OpGetattr, Client: testClient}, FID: fids[i%len(fids)]}
				if i%3 == r%3 {
					req.Op, req.FID, req.Name = wire.OpLookup, dir, []byte(fmt.Sprint("f", i%len(fids)))
				}
				if i%17 == 0 {
					req.Op, req.FID, req.Count, req.Plus = wire.OpReaddir, dir, 10000, true
				}
				rep := call(b.m, req)
				if rep.Status != wire.OK {
					t.Error(req.Op, rep.Status)
					return
				}
				if rep.HasAttr && rep.Attr.Type == wire.TypeReg {
					a := &rep.Attr
					if a.Mode != a.UID&0o777 {
						t.Errorf("mode %o, uid %o", a.Mode, a.UID)
					}
					if a.Version < last[a.FID] {
						t.Errorf("version went back from %d to %d", last[a.FID], a.Version)
					}
					last[a.FID] = a.Version
				}
			}
		}()
	}
	for w := range 2 {
		writers.Add(1)
		go func() {
			defer writers.Done()
			for i := range 400 {
				n := uint32(i*2+w) & 0o777
				f := fids[(i+w)%len(fids)]
				rep := call(b.m, &wire.Request{Header: wire.Header{Op: wire.OpSetattr}, FID: f, SetAttr: wire.SetAttr{Mask: wire.SetMode | wire.SetUID, Mode: n, UID: n}})
				if rep.Status != wire.OK {
					t.Error(rep.Status)
				}
				name := fmt.Sprintf("x%d.%d", w, i)
				b.create(dir, name)
				if rep := call(b.m, &wire.Request{Header: wire.Header{Op: wire.OpRemove}, FID: dir, Name: []byte(name)}); rep.Status != wire.OK {
					t.Error(rep.Status)
				}
				if rep := call(b.m, &wire.Request{Header: wire.Header{Op: wire.OpLookup}, FID: dir, Name: []byte(name)}); rep.Status != wire.ErrNoEnt {
					t.Errorf("%s after its removal: %v", name, rep.Status)
				}
			}
		}()
	}
	writers.Wait()
	stop.Store(true)
	readers.Wait()
	if err := checkStore(b.e); err != nil {
		t.Error(err)
	}
}
