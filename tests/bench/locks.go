package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

const (
	lockCaller = "bench"
	// Held locks are spread over files of lockRanges ranges each, which belong to
	// lockOwners owners in turn. Range k is [4k, 4k+2); what is timed lies in the
	// gaps, so that a server has to look at its neighbours.
	lockRanges = 1000
	lockOwners = 10
	lockFiles  = 32 // files of the row without held locks
)

// heldLocks are the locks that one round of the row nlmheld holds.
type heldLocks struct {
	name string
	dir  []byte
	fhs  [][]byte
}

// lockFill is what it took a server to take the held locks.
type lockFill struct {
	Server string  `json:"server"`
	Held   int     `json:"held"`
	Rate   float64 `json:"rate"` // LOCK/s, 4x16 outstanding
	// Before and After are the resident memory, in bytes.
	Before int64 `json:"rss_before"`
	After  int64 `json:"rss_after"`
}

// connectNLM makes the connections to the server's lock manager, at the port that
// its port mapper names, and waits until the server is past its grace period. A
// server that has none keeps noNLM, the reason.
func (e *env) connectNLM(ctx context.Context, batch bool) error {
	pc, err := e.node.DialContext(ctx, "tcp", benchAddr+":111")
	if err != nil {
		return fmt.Errorf("port mapper of %s: %w", e.name, err)
	}
	pm := nfsload.NewConn(pc, nfsload.ProgPortmap)
	defer pm.Close()
	// Ganesha registers it some time after it answers NFS calls.
	port, err := pm.Getport(nfsload.ProgNLM)
	for limit := time.Now().Add(5 * time.Second); errors.Is(err, nfsload.ErrNotRegistered) && time.Now().Before(limit); {
		time.Sleep(50 * time.Millisecond)
		port, err = pm.Getport(nfsload.ProgNLM)
	}
	if errors.Is(err, nfsload.ErrNotRegistered) {
		e.noNLM = err
		return nil
	}
	if err != nil {
		return err
	}
	for range 4 {
		nc, err := e.node.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", benchAddr, port))
		if err != nil {
			return fmt.Errorf("connect to NLM of %s: %w", e.name, err)
		}
		conn := nfsload.NewConn(nc, nfsload.ProgNLM)
		conn.Batch = batch
		e.nlm = append(e.nlm, conn)
	}
	const probe = "nlm-probe"
	fh, err := e.conns[0].Create(e.root, probe)
	if err != nil {
		return err
	}
	l := nfsload.Lock{Caller: lockCaller, Handle: fh, Owner: 1, Len: 1}
	for limit := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		st, err := e.nlm[0].LockNow(nfsload.NLMLock, &l)
		if err != nil {
			return fmt.Errorf("%s: LOCK: %w", e.name, err)
		}
		if st == nfsload.NLMGranted {
			break
		}
		if st != nfsload.NLMGracePeriod || time.Now().After(limit) {
			return fmt.Errorf("%s: LOCK of a free range: status %d", e.name, st)
		}
	}
	// The locks must be real: somebody else is denied.
	other := l
	other.Owner = 2
	st, err := e.nlm[0].LockNow(nfsload.NLMLock, &other)
	if err != nil || st != nfsload.NLMDenied {
		return fmt.Errorf("%s: LOCK of a range that is held: status %d, %w", e.name, st, err)
	}
	if st, err := e.nlm[0].LockNow(nfsload.NLMUnlock, &l); err != nil || st != nfsload.NLMGranted {
		return fmt.Errorf("%s: UNLOCK: status %d, %w", e.name, st, err)
	}
	return e.conns[0].Unlink(e.root, probe, false)
}

func wantGranted(proc, cookie uint32, b []byte) error {
	st, err := nfsload.LockStat(cookie, b)
	if err == nil && st != nfsload.NLMGranted {
		err = fmt.Errorf("lock procedure %d: status %d", proc, st)
	}
	return err
}

// lockOps times TEST, then LOCK + UNLOCK, in the gaps of the files' ranges.
// Every slot is an owner of its own and has gaps of its own.
func lockOps(e *env, fhs [][]byte, c conc) ([]outcome, error) {
	total := c.conns * c.depth
	gap := func(r *rand.PCG, conn, slot int) nfsload.Lock {
		k := uint64(conn*c.depth+slot) + uint64(total)*(r.Uint64()%uint64(lockRanges/total))
		return nfsload.Lock{
			Caller: lockCaller, Handle: fhs[r.Uint64()%uint64(len(fhs))],
			Owner: uint32(lockRanges + conn*c.depth + slot), Off: 4*k + 2, Len: 2,
		}
	}
	tests, err := e.timedOn(e.nlm, c, func(i int) nfsload.Worker {
		r := rand.NewPCG(uint64(i), 14)
		cookies := make([]uint32, c.depth)
		return &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, slot int) (uint32, bool) {
				l := gap(r, i, slot)
				cookies[slot]++
				cn.LockCall(nfsload.NLMTest, cookies[slot], &l)
				return nfsload.NLMTest, true
			},
			ReplyFunc: func(slot int, b []byte) (int, error) { return 1, wantGranted(nfsload.NLMTest, cookies[slot], b) },
		}
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("TEST: %w", err)
	}
	type state struct {
		l      nfsload.Lock
		locked bool
		cookie uint32
	}
	slots := make([][]state, c.conns)
	pairs, err := e.timedOn(e.nlm, c, func(i int) nfsload.Worker {
		r := rand.NewPCG(uint64(i), 15)
		slots[i] = make([]state, c.depth)
		proc := func(s *state) uint32 {
			if s.locked {
				return nfsload.NLMUnlock
			}
			return nfsload.NLMLock
		}
		return &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, slot int) (uint32, bool) {
				s := &slots[i][slot]
				if !s.locked {
					s.l = gap(r, i, slot)
				}
				s.cookie++
				cn.LockCall(proc(s), s.cookie, &s.l)
				return proc(s), true
			},
			ReplyFunc: func(slot int, b []byte) (int, error) {
				s := &slots[i][slot]
				if err := wantGranted(proc(s), s.cookie, b); err != nil {
					return 0, err
				}
				if s.locked = !s.locked; s.locked {
					return 0, nil
				}
				return 1, nil
			},
		}
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("LOCK and UNLOCK: %w", err)
	}
	// Those that the end of the time left between the two calls.
	for i := range slots {
		for j := range slots[i] {
			if s := &slots[i][j]; s.locked {
				if st, err := e.nlm[i].LockNow(nfsload.NLMUnlock, &s.l); err != nil || st != nfsload.NLMGranted {
					return nil, fmt.Errorf("UNLOCK: status %d, %w", st, err)
				}
			}
		}
	}
	return []outcome{tests, pairs}, nil
}

func nlmFree(e *env, dir []byte, c conc) ([]outcome, error) {
	fhs, err := e.files(dir, lockFiles, 0)
	if err != nil {
		return nil, err
	}
	return lockOps(e, fhs, c)
}

func nlmHeld(e *env, _ []byte, c conc) ([]outcome, error) {
	if e.held == nil {
		if err := e.holdLocks(); err != nil {
			return nil, fmt.Errorf("take %d locks: %w", e.hold, err)
		}
	}
	return lockOps(e, e.held.fhs, c)
}

// holdLocks takes e.hold locks, which stay until releaseLocks.
func (e *env) holdLocks() error {
	e.serial++
	h := &heldLocks{name: fmt.Sprintf("held-%d", e.serial)}
	var err error
	if h.dir, err = e.conns[0].Mkdir(e.root, h.name); err != nil {
		return err
	}
	if h.fhs, err = e.files(h.dir, (e.hold+lockRanges-1)/lockRanges, 0); err != nil {
		return err
	}
	e.held = h
	before, err := bed.ServerUsage(e.srv)
	if err != nil {
		return err
	}
	start := time.Now()
	err = e.allOn(e.nlm, func(i int) nfsload.Worker {
		n := i - len(e.nlm)
		cookies := map[int]uint32{}
		return &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, slot int) (uint32, bool) {
				if n += len(e.nlm); n >= e.hold {
					return 0, false
				}
				// One file after the other: the ranges of a file grow together.
				f, k := n%len(h.fhs), n/len(h.fhs)
				cookies[slot] = uint32(n)
				cn.LockCall(nfsload.NLMLock, uint32(n), &nfsload.Lock{Caller: lockCaller, Handle: h.fhs[f], Owner: uint32(1 + k%lockOwners), Off: uint64(4 * k), Len: 2})
				return nfsload.NLMLock, true
			},
			ReplyFunc: func(slot int, b []byte) (int, error) { return 1, wantGranted(nfsload.NLMLock, cookies[slot], b) },
		}
	})
	if err != nil {
		return err
	}
	took := time.Since(start)
	after, err := bed.ServerUsage(e.srv)
	if err != nil {
		return err
	}
	f := lockFill{Server: e.name, Held: e.hold, Rate: float64(e.hold) / took.Seconds(), Before: before.RSS, After: after.RSS}
	e.fills = append(e.fills, f)
	fmt.Fprintf(logTo, "         %s locks held by %s: %s LOCK/s, RSS %d MiB before and %d MiB after\n", human(float64(f.Held)), e.name, human(f.Rate), f.Before>>20, f.After>>20)
	return nil
}

// releaseLocks undoes holdLocks.
func (e *env) releaseLocks() error {
	h := e.held
	if h == nil {
		return nil
	}
	e.held = nil
	err := e.allOn(e.nlm, func(i int) nfsload.Worker {
		n := i - len(e.nlm)
		return &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, _ int) (uint32, bool) {
				if n += len(e.nlm); n >= len(h.fhs)*lockOwners {
					return 0, false
				}
				cn.LockCall(nfsload.NLMUnlock, 0, &nfsload.Lock{Caller: lockCaller, Handle: h.fhs[n/lockOwners], Owner: uint32(1 + n%lockOwners)})
				return nfsload.NLMUnlock, true
			},
			ReplyFunc: func(_ int, b []byte) (int, error) { return 1, wantGranted(nfsload.NLMUnlock, 0, b) },
		}
	})
	if err != nil {
		return fmt.Errorf("release the held locks: %w", err)
	}
	if err := e.empty(h.dir); err != nil {
		return err
	}
	return e.conns[0].Unlink(e.root, h.name, true)
}
