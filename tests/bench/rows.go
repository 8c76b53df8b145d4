package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

// conc is how many calls are outstanding: conns connections of depth each.
type conc struct{ conns, depth int }

func (c conc) String() string {
	if c.conns == 1 {
		return strconv.Itoa(c.depth)
	}
	return fmt.Sprintf("%dx%d", c.conns, c.depth)
}

var allConcs = []conc{{1, 1}, {1, 32}, {4, 16}}

// outcome is one timed run of one row.
type outcome struct {
	ops     int64 // operations, or bytes where the row says so
	calls   int64 // what to divide CPU time by: operations, entries or MiB
	elapsed time.Duration
	cpu     time.Duration // of the server, while the row ran
}

// row is one line of the table. run does everything in dir, a new directory of
// the export, and returns one outcome for each of names.
type row struct {
	key   string
	names []string
	bytes bool // ops are bytes, shown as MB/s
	concs []conc
	// metadata rows are also run against the peer with synchronous directories.
	metadata bool
	// nlm rows need the server's lock manager.
	nlm bool
	run func(e *env, dir []byte, c conc) ([]outcome, error)
	// after, if not nil, ends what the runs of one round left for each other.
	after func(e *env) error
}

const (
	mib       = 1 << 20
	fileSize  = 256 * mib // of each file that is read or written in place
	nameCount = 1000      // objects that GETATTR, LOOKUP and ACCESS go over
	dirCount  = 10000     // entries that READDIRPLUS reads
	// maxNames bounds the files that a CREATE row makes in one run.
	maxNames = 200000
)

var rows = []row{
	{key: "seqwrite", names: []string{"sequential write 1 MiB + COMMIT"}, bytes: true, concs: allConcs, run: seqWrite},
	{key: "seqread", names: []string{"sequential read 1 MiB"}, bytes: true, concs: allConcs, run: func(e *env, d []byte, c conc) ([]outcome, error) { return readFile(e, d, c, mib, false) }},
	{key: "randread", names: []string{"random read 4 KiB"}, concs: allConcs, run: func(e *env, d []byte, c conc) ([]outcome, error) { return readFile(e, d, c, 4096, true) }},
	{key: "randwrite", names: []string{"random write 4 KiB UNSTABLE + COMMIT"}, concs: allConcs, run: randWrite},
	{key: "filesync", names: []string{"write 4 KiB FILE_SYNC, 32 files"}, concs: allConcs, run: fileSyncWrite},
	{key: "getattr", names: []string{"GETATTR"}, concs: allConcs, run: func(e *env, d []byte, c conc) ([]outcome, error) { return overNames(e, d, c, nfsload.ProcGetattr) }},
	{key: "lookup", names: []string{"LOOKUP"}, concs: allConcs, run: func(e *env, d []byte, c conc) ([]outcome, error) { return overNames(e, d, c, nfsload.ProcLookup) }},
	{key: "access", names: []string{"ACCESS"}, concs: allConcs, run: func(e *env, d []byte, c conc) ([]outcome, error) { return overNames(e, d, c, nfsload.ProcAccess) }},
	{key: "crwrite", names: []string{"create + write 4 KiB + COMMIT"}, concs: allConcs, metadata: true, run: createWrite},
	{key: "names", names: []string{"CREATE", "RENAME", "REMOVE"}, concs: allConcs, metadata: true, run: nameOps},
	{key: "readdirplus", names: []string{"READDIRPLUS, entries of 10,000"}, concs: allConcs, run: readdirplus},
	{key: "nlm", names: []string{"NLM TEST", "NLM LOCK + UNLOCK, pairs"}, nlm: true, concs: allConcs, run: nlmFree},
	{key: "nlmheld", names: []string{"NLM TEST, many locks held", "NLM LOCK + UNLOCK, pairs, many locks held"}, nlm: true, concs: allConcs, run: nlmHeld, after: (*env).releaseLocks},
}

var errNothing = errors.New("no operation completed")

// timed runs one worker on each connection for the row's time, then, inside
// the measurement, final on each connection.
func (e *env) timed(c conc, worker func(i int) nfsload.Worker, final func(i int, conn *nfsload.Conn) error) (outcome, error) {
	return e.timedOn(e.conns, c, worker, final)
}

// timedOn is timed on some of the connections given.
func (e *env) timedOn(conns []*nfsload.Conn, c conc, worker func(i int) nfsload.Worker, final func(i int, conn *nfsload.Conn) error) (outcome, error) {
	conns = conns[:c.conns]
	ops := make([]int64, len(conns))
	errs := make([]error, len(conns))
	ws := make([]nfsload.Worker, len(conns))
	for i := range conns {
		ws[i] = worker(i)
	}
	before, err := e.cpu()
	if err != nil {
		return outcome{}, err
	}
	start := time.Now()
	deadline := start.Add(e.seconds)
	var wg sync.WaitGroup
	for i, conn := range conns {
		wg.Go(func() {
			if ops[i], errs[i] = conn.Run(c.depth, deadline, ws[i]); errs[i] == nil && final != nil {
				errs[i] = final(i, conn)
			}
		})
	}
	wg.Wait()
	o := outcome{elapsed: time.Since(start)}
	after, err := e.cpu()
	if err != nil {
		return o, err
	}
	o.cpu = after - before
	for i := range conns {
		if errs[i] != nil {
			return o, errs[i]
		}
		o.ops += ops[i]
	}
	if o.ops == 0 {
		return o, fmt.Errorf("%w in %v", errNothing, o.elapsed)
	}
	o.calls = o.ops
	return o, nil
}

// all runs a worker to its end on every connection at depth 16, untimed, to
// prepare or clean up.
func (e *env) all(worker func(i int) nfsload.Worker) error { return e.allOn(e.conns, worker) }

// allOn is all on the connections given.
func (e *env) allOn(conns []*nfsload.Conn, worker func(i int) nfsload.Worker) error {
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	for i, conn := range conns {
		w := worker(i)
		wg.Go(func() {
			defer func(b bool) { conn.Batch = b }(conn.Batch)
			conn.Batch = true
			_, errs[i] = conn.Run(16, time.Now().Add(time.Hour), w)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// writer writes n bytes at each offset that off returns; wrote counts bytes.
func writer(fh func() []byte, n int, stable uint32, off func() (uint64, bool), data []byte) nfsload.Worker {
	return &nfsload.Funcs{
		NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
			o, ok := off()
			if !ok {
				return 0, false
			}
			c.Opaque(fh())
			c.U64(o)
			c.U32(uint32(n))
			c.U32(stable)
			c.Payload(data[:n])
			return nfsload.ProcWrite, true
		},
		ReplyFunc: func(_ int, b []byte) (int, error) {
			d := nfsload.Decoder{B: b}
			if err := d.Status(nfsload.ProcWrite); err != nil {
				return 0, err
			}
			d.Wcc()
			if count, committed := d.U32(), d.U32(); d.Err != nil || int(count) != n || committed < stable {
				return 0, fmt.Errorf("WRITE of %d: count %d, committed %d: %w", n, count, committed, nfsload.ErrProtocol)
			}
			return 1, nil
		},
	}
}

func sequence(step, end uint64) func() (uint64, bool) {
	next := uint64(0)
	return func() (uint64, bool) {
		o := next
		if next += step; next >= end {
			next = 0
		}
		return o, true
	}
}

func once(step, end uint64) func() (uint64, bool) {
	next := uint64(0)
	return func() (uint64, bool) {
		o := next
		next += step
		return o, o < end
	}
}

func random(seed uint64, step, end uint64) func() (uint64, bool) {
	r := rand.NewPCG(seed, 11)
	return func() (uint64, bool) { return r.Uint64() % (end / step) * step, true }
}

// files makes one file per connection, filled if size is not 0.
func (e *env) files(dir []byte, n int, size uint64) ([][]byte, error) {
	fhs := make([][]byte, n)
	for i := range fhs {
		var err error
		if fhs[i], err = e.conns[0].Create(dir, fmt.Sprint("file", i)); err != nil {
			return nil, err
		}
		if size > 0 {
			w := writer(func() []byte { return fhs[i] }, mib, nfsload.Unstable, once(mib, size), e.data)
			if _, err := e.conns[0].Run(8, time.Now().Add(time.Hour), w); err != nil {
				return nil, err
			}
			if err := e.conns[0].Commit(fhs[i]); err != nil {
				return nil, err
			}
		}
	}
	return fhs, nil
}

func seqWrite(e *env, dir []byte, c conc) ([]outcome, error) {
	fhs, err := e.files(dir, c.conns, 0)
	if err != nil {
		return nil, err
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		return writer(func() []byte { return fhs[i] }, mib, nfsload.Unstable, sequence(mib, 1024*mib/uint64(c.conns)), e.data)
	}, func(i int, conn *nfsload.Conn) error { return conn.Commit(fhs[i]) })
	o.ops *= mib
	return []outcome{o}, err
}

func readFile(e *env, dir []byte, c conc, n int, rnd bool) ([]outcome, error) {
	fhs, err := e.files(dir, 1, fileSize)
	if err != nil {
		return nil, err
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		off := sequence(uint64(n), fileSize)
		if rnd {
			off = random(uint64(i), uint64(n), fileSize)
		}
		return &nfsload.Funcs{
			NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
				o, _ := off()
				c.Opaque(fhs[0])
				c.U64(o)
				c.U32(uint32(n))
				return nfsload.ProcRead, true
			},
			ReplyFunc: func(_ int, b []byte) (int, error) {
				d := nfsload.Decoder{B: b}
				if err := d.Status(nfsload.ProcRead); err != nil {
					return 0, err
				}
				d.PostAttr()
				count, _ := d.U32(), d.U32()
				if data := d.Opaque(); d.Err != nil || int(count) != n || len(data) != n || data[0] != e.data[0] {
					return 0, fmt.Errorf("READ of %d: count %d: %w", n, count, nfsload.ErrProtocol)
				}
				return 1, nil
			},
		}
	}, nil)
	if n == mib {
		o.ops *= mib
	}
	return []outcome{o}, err
}

func randWrite(e *env, dir []byte, c conc) ([]outcome, error) {
	fhs, err := e.files(dir, c.conns, fileSize/uint64(c.conns))
	if err != nil {
		return nil, err
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		return writer(func() []byte { return fhs[i] }, 4096, nfsload.Unstable, random(uint64(i), 4096, fileSize/uint64(c.conns)), e.data)
	}, func(i int, conn *nfsload.Conn) error { return conn.Commit(fhs[i]) })
	return []outcome{o}, err
}

func fileSyncWrite(e *env, dir []byte, c conc) ([]outcome, error) {
	fhs, err := e.files(dir, 32, 8*mib)
	if err != nil {
		return nil, err
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		n := i
		return writer(func() []byte { n++; return fhs[n%len(fhs)] }, 4096, nfsload.FileSync, random(uint64(i), 4096, 8*mib), e.data)
	}, nil)
	return []outcome{o}, err
}

// names makes n empty files named prefix0... in dir on all connections.
func (e *env) names(dir []byte, prefix string, from, n int) error {
	return e.all(func(i int) nfsload.Worker {
		k := from + i - len(e.conns)
		return &nfsload.Funcs{
			NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
				if k += len(e.conns); k >= from+n {
					return 0, false
				}
				create(c, dir, prefix, k)
				return nfsload.ProcCreate, true
			},
			ReplyFunc: nfsload.CheckStatus(nfsload.ProcCreate),
		}
	})
}

// create appends the arguments of CREATE GUARDED.
func create(c *nfsload.Conn, dir []byte, prefix string, k int) {
	dirop(c, dir, prefix, k)
	c.U32(1)
	c.Sattr(0o644)
}

func dirop(c *nfsload.Conn, dir []byte, prefix string, k int) {
	var b [32]byte
	c.Dirop(dir, strconv.AppendInt(append(b[:0], prefix...), int64(k), 10))
}

func overNames(e *env, dir []byte, c conc, proc uint32) ([]outcome, error) {
	if err := e.names(dir, "n", 0, nameCount); err != nil {
		return nil, err
	}
	es, err := e.conns[0].ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if len(es) != nameCount {
		return nil, fmt.Errorf("%d entries, want %d", len(es), nameCount)
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		r := rand.NewPCG(uint64(i), 12)
		return &nfsload.Funcs{
			NextFunc: func(c *nfsload.Conn, _ int) (uint32, bool) {
				x := &es[r.Uint64()%nameCount]
				switch proc {
				case nfsload.ProcLookup:
					c.Opaque(dir)
					c.Opaque([]byte(x.Name))
				case nfsload.ProcAccess:
					c.Opaque(x.Handle)
					c.U32(0x3f)
				default:
					c.Opaque(x.Handle)
				}
				return proc, true
			},
			ReplyFunc: nfsload.CheckObject(proc),
		}
	}, nil)
	return []outcome{o}, err
}

// createWrite counts one operation for the three calls of each new file.
func createWrite(e *env, dir []byte, c conc) ([]outcome, error) {
	type state struct {
		fh    []byte
		phase int
	}
	o, err := e.timed(c, func(i int) nfsload.Worker {
		slots := make([]state, c.depth)
		k := i
		return &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, slot int) (uint32, bool) {
				s := &slots[slot]
				switch s.phase {
				case 0:
					if k >= maxNames {
						return 0, false
					}
					create(cn, dir, "f", k)
					k += c.conns
					return nfsload.ProcCreate, true
				case 1:
					cn.Opaque(s.fh)
					cn.U64(0)
					cn.U32(4096)
					cn.U32(nfsload.Unstable)
					cn.Payload(e.data[:4096])
					return nfsload.ProcWrite, true
				}
				cn.Opaque(s.fh)
				cn.U64(0)
				cn.U32(0)
				return nfsload.ProcCommit, true
			},
			ReplyFunc: func(slot int, b []byte) (int, error) {
				s := &slots[slot]
				proc := []uint32{nfsload.ProcCreate, nfsload.ProcWrite, nfsload.ProcCommit}[s.phase]
				d := nfsload.Decoder{B: b}
				if err := d.Status(proc); err != nil {
					return 0, err
				}
				if s.phase == 0 {
					if d.U32() == 0 {
						return 0, fmt.Errorf("CREATE without a handle: %w", nfsload.ErrProtocol)
					}
					s.fh = append(s.fh[:0], d.Opaque()...)
				}
				if s.phase = (s.phase + 1) % 3; s.phase != 0 {
					return 0, d.Err
				}
				return 1, d.Err
			},
		}
	}, nil)
	return []outcome{o}, err
}

// nameOps times CREATE, then renames and removes what was created.
func nameOps(e *env, dir []byte, c conc) ([]outcome, error) {
	made := make([]int, c.conns) // names of connection i: i, i+conns, ...
	worker := func(proc uint32, limit func(i int) int, args func(cn *nfsload.Conn, k int), count []int) func(i int) nfsload.Worker {
		return func(i int) nfsload.Worker {
			return &nfsload.Funcs{
				NextFunc: func(cn *nfsload.Conn, _ int) (uint32, bool) {
					if count[i] >= limit(i) {
						return 0, false
					}
					args(cn, i+count[i]*c.conns)
					count[i]++
					return proc, true
				},
				ReplyFunc: nfsload.CheckStatus(proc),
			}
		}
	}
	out := make([]outcome, 3)
	var err error
	out[0], err = e.timed(c, worker(nfsload.ProcCreate, func(int) int { return maxNames / c.conns },
		func(cn *nfsload.Conn, k int) { create(cn, dir, "c", k) }, made), nil)
	if err != nil {
		return nil, fmt.Errorf("CREATE: %w", err)
	}
	renamed := make([]int, c.conns)
	rename := func(cn *nfsload.Conn, k int) {
		dirop(cn, dir, "c", k)
		dirop(cn, dir, "r", k)
	}
	upTo := func(i int) int { return made[i] }
	if out[1], err = e.timed(c, worker(nfsload.ProcRename, upTo, rename, renamed), nil); err != nil {
		return nil, fmt.Errorf("RENAME: %w", err)
	}
	removed := make([]int, c.conns)
	remove := func(cn *nfsload.Conn, k int) {
		prefix := "c"
		if k/c.conns < renamed[k%c.conns] {
			prefix = "r"
		}
		dirop(cn, dir, prefix, k)
	}
	if out[2], err = e.timed(c, worker(nfsload.ProcRemove, upTo, remove, removed), nil); err != nil {
		return nil, fmt.Errorf("REMOVE: %w", err)
	}
	return out, nil
}

// lister reads a directory again and again from every slot; it counts entries.
func lister(dir []byte, slots int, entries int, rounds int) nfsload.Worker {
	type state struct {
		cookie, verf uint64
		seen         int
		rounds       int
	}
	st := make([]state, slots)
	return &nfsload.Funcs{
		NextFunc: func(c *nfsload.Conn, slot int) (uint32, bool) {
			if rounds > 0 && st[slot].rounds == rounds {
				return 0, false
			}
			c.ReaddirplusArgs(dir, st[slot].cookie, st[slot].verf)
			return nfsload.ProcReaddirplus, true
		},
		ReplyFunc: func(slot int, b []byte) (int, error) {
			s := &st[slot]
			cookie, verf, n, eof, err := nfsload.ReadPage(b, nil)
			if err != nil {
				return 0, err
			}
			s.cookie, s.verf = cookie, verf
			s.seen += n
			if eof {
				if s.seen < entries || s.seen > entries+2 {
					return 0, fmt.Errorf("READDIRPLUS found %d entries, want %d", s.seen, entries)
				}
				*s = state{rounds: s.rounds + 1}
			} else if n == 0 {
				return 0, fmt.Errorf("READDIRPLUS returned an empty page: %w", nfsload.ErrProtocol)
			}
			return n, nil
		},
	}
}

func readdirplus(e *env, dir []byte, c conc) ([]outcome, error) {
	if err := e.names(dir, "entry-", 0, dirCount); err != nil {
		return nil, err
	}
	o, err := e.timed(c, func(int) nfsload.Worker { return lister(dir, c.depth, dirCount, 0) }, nil)
	return []outcome{o}, err
}
