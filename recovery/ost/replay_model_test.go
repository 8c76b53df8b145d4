package ost

import (
	"fmt"
	"slices"

	"github.com/baton-nfs/baton/recovery/target/front"
	"github.com/baton-nfs/baton/recovery/target/recov"
	"github.com/baton-nfs/baton/recovery/wire"
)

// execution is a front.Execution that waits.
type execution struct {
	res  recov.Result
	n    int
	wait bool
	done chan struct{}
}

func (e *execution) Executed(r recov.Result) bool {
	e.res = r
	e.n++
	return e.wait
}

func (e *execution) Done() { close(e.done) }

// execute gives a request to the target as the front does.
func execute(g *Target, req *wire.Request, x front.Exec) (*wire.Reply, recov.Result) {
	rep, e := &wire.Reply{}, &execution{done: make(chan struct{})}
	g.Execute(req, rep, x, e)
	<-e.done
	if e.n != 1 {
		panic(fmt.Sprintf("Executed was called %d times", e.n))
	}
	return rep, e.res
}

// register enters a client as the front does.
func register(g *Target, r recov.ClientRecord) error {
	ch := make(chan error, 1)
	g.PutClient(r, func(err error) { ch <- err })
	return <-ch
}

const replayLimit = 20000 // bytes of a file in these tests

// change is something that was asked of an object.
type change struct {
	req     wire.Request // of a write or a punch
	who     *replayer    // nil: somebody in the target's process
	transno uint64
	inst    uint64 // the instance that executed it last
	acked   bool   // its reply was seen
	durable bool   // a reply said so
	done    bool   // a truncate whose log record is gone
}

func (c *change) punch() bool { return c.req.Op == wire.OpPunch }

// must tells that the change may not be lost: it was durable, its client will
// repeat it, or its log record does.
func (c *change) must() bool {
	return c.durable || c.punch() || c.who != nil && !c.who.dead
}

// file is a file with one object, and everything that was done to it, in order.
type file struct {
	fid     wire.FID
	changes []*change
	gone    bool // unlinked
}

// possible gives for every byte the values that it may have (0 behind the end), and
// the least and the greatest size.
func (f *file) possible() (vals [replayLimit][]byte, lo, hi uint64) {
	for i := range vals {
		vals[i] = []byte{0}
	}
	for _, c := range f.changes {
		must := c.must()
		set := func(i uint64, v byte) {
			if must {
				vals[i] = append(vals[i][:0], v)
			} else {
				vals[i] = append(vals[i], v)
			}
		}
		if c.punch() {
			for i := c.req.Size; i < replayLimit; i++ {
				set(i, 0)
			}
			if lo, hi = min(lo, c.req.Size), max(hi, c.req.Size); must {
				lo, hi = c.req.Size, c.req.Size
			}
			continue
		}
		for i, v := range c.req.Bulk {
			set(c.req.Offset+uint64(i), v)
		}
		end := c.req.Offset + uint64(len(c.req.Bulk))
		if hi = max(hi, end); must {
			lo = max(lo, end)
		}
	}
	return vals, lo, hi
}

// check compares what the target has with what may be.
func (f *file) check(g *Target) error {
	b, rep := read(g, f.fid, 0, replayLimit)
	if rep.Status != wire.OK {
		return fmt.Errorf("read: %w", rep.Status)
	}
	if f.gone {
		if rep.Obj.Exists {
			return fmt.Errorf("a removed file's object exists")
		}
		return nil
	}
	vals, lo, hi := f.possible()
	if s := rep.Obj.Size; s < lo || s > hi {
		return fmt.Errorf("size %d, not in [%d, %d]: %s", s, lo, hi, f.history(0))
	}
	for i := range vals {
		v := byte(0)
		if i < len(b) {
			v = b[i]
		}
		if !slices.Contains(vals[i], v) {
			return fmt.Errorf("byte %d is %d, may be %v: %s", i, v, vals[i], f.history(uint64(i)))
		}
	}
	return nil
}

// history lists what concerns a byte.
func (f *file) history(i uint64) string {
	s := ""
	for _, c := range f.changes {
		in := c.req.Offset <= i && i < c.req.Offset+uint64(len(c.req.Bulk))
		if !c.punch() && !in && i != 0 {
			continue
		}
		who := "local"
		if c.who != nil {
			who = fmt.Sprint(c.who.rec.Client[0])
			if c.who.dead {
				who += " (dead)"
			}
		}
		what := fmt.Sprintf("write %d+%d", c.req.Offset, len(c.req.Bulk))
		if in {
			what += fmt.Sprintf(" (%d here)", c.req.Bulk[i-c.req.Offset])
		}
		if c.punch() {
			what = fmt.Sprintf("punch to %d log %d", c.req.Size, c.req.LogID)
		}
		s += fmt.Sprintf("\n  %d by %s: %s stable %d acked %v durable %v instance %d", c.transno, who, what, c.req.Stable, c.acked, c.durable, c.inst)
	}
	return s
}

// replayer is a client that keeps what it was not told to be committed.
type replayer struct {
	rec  recov.ClientRecord
	xid  uint64
	told uint64 // last committed
	kept []*change
	// pending was sent and not answered.
	pending *change
	on      *file // what pending is for
	open    map[wire.FID]bool
	dead    bool
}

func (c *replayer) header(op wire.Op) wire.Header {
	c.xid++
	return wire.Header{Op: op, Client: c.rec.Client, ClientGen: c.rec.Gen, XID: c.xid, Slot: uint16(c.xid % 8)}
}

// answer notes what a reply of the given instance tells.
func (c *replayer) answer(lc, inst uint64) {
	c.told = max(c.told, lc)
	c.kept = slices.DeleteFunc(c.kept, func(x *change) bool { return x.inst == inst && x.transno <= lc })
}
