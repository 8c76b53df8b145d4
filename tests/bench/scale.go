package main

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/baton-nfs/baton/tests/bench/nfsload"
)

// scalePoint is what one server does with one directory of Files entries.
type scalePoint struct {
	Server string `json:"server"`
	Files  int    `json:"files"`
	// Rates per second with 32 outstanding; ReaddirUS is microseconds per entry
	// of a whole scan by one reader.
	Fill, Lookup, Getattr, Create, Remove float64
	ReaddirUS                             float64
	RSS                                   int64 `json:"rss"`
}

// scale grows one directory through the sizes and measures at each.
func scale(e *env, sizes []int) ([]scalePoint, error) {
	dir, err := e.conns[0].Mkdir(e.root, "scale")
	if err != nil {
		return nil, err
	}
	c := conc{1, 32}
	var out []scalePoint
	have := 0
	for _, n := range sizes {
		p := scalePoint{Server: e.name, Files: n}
		start := time.Now()
		if err := e.names(dir, "file-", have, n-have); err != nil {
			return nil, fmt.Errorf("fill to %d: %w", n, err)
		}
		p.Fill = float64(n-have) / time.Since(start).Seconds()
		have = n

		start = time.Now()
		es, err := e.conns[0].Run(1, start.Add(time.Hour), lister(dir, 1, n, 1))
		if err != nil {
			return nil, err
		}
		p.ReaddirUS = float64(time.Since(start).Microseconds()) / float64(es)
		entries, err := e.conns[0].ReadDir(dir)
		if err != nil {
			return nil, err
		}
		rate := func(proc uint32, next func(r *rand.PCG, cn *nfsload.Conn)) (float64, error) {
			o, err := e.timed(c, func(i int) nfsload.Worker {
				r := rand.NewPCG(uint64(i), 13)
				return &nfsload.Funcs{
					NextFunc:  func(cn *nfsload.Conn, _ int) (uint32, bool) { next(r, cn); return proc, true },
					ReplyFunc: nfsload.CheckStatus(proc),
				}
			}, nil)
			return float64(o.ops) / o.elapsed.Seconds(), err
		}
		if p.Lookup, err = rate(nfsload.ProcLookup, func(r *rand.PCG, cn *nfsload.Conn) {
			dirop(cn, dir, "file-", int(r.Uint64()%uint64(n)))
		}); err != nil {
			return nil, fmt.Errorf("LOOKUP: %w", err)
		}
		if p.Getattr, err = rate(nfsload.ProcGetattr, func(r *rand.PCG, cn *nfsload.Conn) {
			cn.Opaque(entries[r.Uint64()%uint64(len(entries))].Handle)
		}); err != nil {
			return nil, fmt.Errorf("GETATTR: %w", err)
		}
		made, removed := 0, 0
		if p.Create, err = rate(nfsload.ProcCreate, func(_ *rand.PCG, cn *nfsload.Conn) {
			create(cn, dir, "new-", made)
			made++
		}); err != nil {
			return nil, fmt.Errorf("CREATE: %w", err)
		}
		start = time.Now()
		if _, err := e.conns[0].Run(32, start.Add(time.Hour), &nfsload.Funcs{
			NextFunc: func(cn *nfsload.Conn, _ int) (uint32, bool) {
				if removed == made {
					return 0, false
				}
				dirop(cn, dir, "new-", removed)
				removed++
				return nfsload.ProcRemove, true
			},
			ReplyFunc: nfsload.CheckStatus(nfsload.ProcRemove),
		}); err != nil {
			return nil, fmt.Errorf("REMOVE: %w", err)
		}
		p.Remove = float64(removed) / time.Since(start).Seconds()
		u, err := usage(e)
		if err != nil {
			return nil, err
		}
		p.RSS = u.RSS
		out = append(out, p)
		fmt.Fprintf(logTo, "%s: %d files: fill %.0f/s lookup %.0f/s getattr %.0f/s create %.0f/s remove %.0f/s readdirplus %.2f us/entry\n",
			e.name, n, p.Fill, p.Lookup, p.Getattr, p.Create, p.Remove, p.ReaddirUS)
	}
	return out, nil
}
