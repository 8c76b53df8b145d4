package ost

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/baton-nfs/baton/recovery/ost/objfs"
	"github.com/baton-nfs/baton/recovery/wire"
)

// crashModel is what an object may be after a power failure: state is what it
// is now, and the rest what it has been since it was last known to be durable.
type crashModel struct {
	state   model
	transno uint64            // of the newest change
	pending bool              // changes that are not known to be durable
	was     map[uint64][]byte // values of bytes since then, with 0 for absent
	sizes   []uint64          // sizes since then
	gone    bool              // did not exist at some time since then
}

func newCrashModel() *crashModel {
	return &crashModel{state: model{data: map[uint64]byte{}}, was: map[uint64][]byte{}}
}

// before keeps the present values of the bytes that a change touches.
func (c *crashModel) before(from, to uint64) {
	if !c.pending {
		c.was = map[uint64][]byte{}
		c.sizes = []uint64{c.state.size}
		c.gone = !c.state.exists
	}
	c.pending = true
	for i := from; i < to; i++ {
		c.was[i] = append(c.was[i], c.state.data[i], 0)
	}
}

func (c *crashModel) after(transno uint64) {
	c.transno = max(c.transno, transno) // 0: nothing was changed
	c.sizes = append(c.sizes, c.state.size)
	c.gone = c.gone || !c.state.exists
}

func (c *crashModel) durable() { c.pending = false }

// check compares the object after a crash and makes the model what was found.
func (c *crashModel) check(g *Target, f wire.FID, limit int) error {
	rep := op(g, wire.OpObjAttr, f)
	if rep.Status != wire.OK {
		return fmt.Errorf("attributes: %v", rep.Status)
	}
	b, rr := read(g, f, 0, limit)
	if rr.Status != wire.OK {
		return fmt.Errorf("read: %v", rr.Status)
	}
	if !c.pending {
		if rep.Obj.Exists != c.state.exists || rep.Obj.Size != c.state.size {
			return fmt.Errorf("durable object: %+v, want exists %v size %d", rep.Obj, c.state.exists, c.state.size)
		}
		if w := c.state.read(0, limit); !bytes.Equal(b, w) {
			i := 0
			for b[i] == w[i] {
				i++
			}
			return fmt.Errorf("durable data differ at %d: %d, want %d", i, b[i], w[i])
		}
		return nil
	}
	if !rep.Obj.Exists {
		if !c.gone {
			return fmt.Errorf("object is gone")
		}
		*c = *newCrashModel()
		return nil
	}
	lo, hi := c.sizes[0], c.sizes[0]
	for _, s := range c.sizes {
		lo, hi = min(lo, s), max(hi, s)
	}
	if s := rep.Obj.Size; s < lo && !c.gone || s > hi {
		return fmt.Errorf("size %d, was between %d and %d", s, lo, hi)
	}
	for i, v := range b {
		o := uint64(i)
		if v == c.state.data[o] || v == 0 && (o >= lo || c.gone) || bytes.IndexByte(c.was[o], v) >= 0 {
			continue
		}
		return fmt.Errorf("byte %d is %d, now %d, was %v", i, v, c.state.data[o], c.was[o])
	}
	n := newCrashModel()
	n.state.exists, n.state.size = true, rep.Obj.Size
	for i, v := range b {
		if v != 0 {
			n.state.data[uint64(i)] = v
		}
	}
	// Which of the truncates was remembered is a matter of luck, too.
	if i, ok := g.inspect(objKey{fid: f}); ok {
		n.state.log = i.LogID
	}
	*c = *n
	return nil
}

// TestPowerFail runs random operations, cuts the power again and again, and
// looks whether everything that was said to be durable is there.
func TestPowerFail(t *testing.T) {
	for _, seed := range seeds(t, 20) {
		t.Run(fmt.Sprintf("OST_SEED=%d", seed), func(t *testing.T) { powerFail(t, seed) })
	}
}

func powerFail(t *testing.T, seed uint64) {
	const limit = 60000
	r := rand.New(rand.NewPCG(seed, 7))
	clk := newClock()
	m := objfs.NewMem(clk.now)
	boot := 0
	opts := Options{FS: m, SegShift: 13, Clock: clk.now, MaxOpenFiles: 16, BootID: "b0"}
	g := open(t, opts)
	objs := make([]*crashModel, 4)
	for i := range objs {
		objs[i] = newCrashModel()
	}
	log, highest := uint64(0), uint64(0)
	seen := func(rep *wire.Reply) {
		if rep.LastCommitted < highest {
			t.Fatalf("last_committed fell from %d to %d", highest, rep.LastCommitted)
		}
		highest = rep.LastCommitted
		for _, c := range objs {
			if c.pending && c.transno <= rep.LastCommitted {
				c.durable()
			}
		}
	}
	for step := range 250 {
		k := r.IntN(len(objs))
		f, c := fid(uint32(k*64)), objs[k]
		ok := func(rep *wire.Reply) {
			if rep.Status != wire.OK {
				t.Fatalf("step %d: %v", step, rep.Status)
			}
		}
		x := r.IntN(24)
		if os.Getenv("OST_LOG") != "" {
			fmt.Printf("step %d: op %d object %d: exists %v size %d pending %v highest %d\n", step, x, k, c.state.exists, c.state.size, c.pending, highest)
		}
		switch {
		case x < 9:
			b := make([]byte, 1+r.IntN(5000))
			for i := range b {
				b[i] = byte(1 + r.IntN(255))
			}
			off := uint64(r.IntN(limit - 5000))
			if r.IntN(2) == 0 {
				off = uint64(r.IntN(9000))
			}
			st := wire.Unstable
			if r.IntN(3) == 0 {
				st = wire.FileSync
			}
			c.before(off, off+uint64(len(b)))
			rep := write(g, f, off, b, st)
			ok(rep)
			c.state.write(off, b)
			c.after(rep.Transno)
			if st != wire.Unstable {
				c.durable()
			}
			seen(rep)
		case x < 14:
			size := uint64(r.IntN(limit))
			if r.IntN(3) == 0 {
				size = 0
			}
			log++
			was := c.pending
			c.before(min(size, c.state.size), c.state.size)
			req := &wire.Request{Header: wire.Header{Op: wire.OpPunch}, FID: f, Size: size, LogID: log}
			if r.IntN(3) == 0 {
				req.Flags = wire.FlagWaitCommit
			}
			rep := call(g, req)
			ok(rep)
			existed := c.state.exists
			c.state.punch(size, log)
			c.after(rep.Transno)
			if req.Flags != 0 || !existed && size == 0 && !was {
				c.durable()
			}
			seen(rep)
		case x < 16:
			rep := op(g, wire.OpSyncObject, f)
			ok(rep)
			c.durable()
			seen(rep)
		case x == 16:
			if err := g.Commit(); err != nil {
				t.Fatal(err)
			}
			seen(op(g, wire.OpPing, f))
			for _, c := range objs {
				if c.pending {
					t.Fatalf("step %d: last_committed does not reach what was committed", step)
				}
			}
		case x == 17:
			c.before(0, c.state.size)
			req := &wire.Request{Header: wire.Header{Op: wire.OpDestroy}, FID: f}
			if r.IntN(2) == 0 {
				req.Flags = wire.FlagWaitCommit
			}
			rep := call(g, req)
			ok(rep)
			forgetGone(g)
			c.state = model{data: map[uint64]byte{}, log: 0}
			c.after(rep.Transno)
			if req.Flags != 0 {
				c.durable()
			}
			seen(rep)
		case x < 21:
			m.Writeback(r)
		case x == 21: // kill -9
			abandon(g)
			m.Kill()
			g = open(t, opts)
			if g.LostUnflushed() {
				t.Fatal("a process crash counts as a power failure")
			}
			for i, c := range objs {
				c.durable()
				if err := c.check(g, fid(uint32(i*64)), limit); err != nil {
					t.Fatalf("step %d: after kill, object %d: %v", step, i, err)
				}
			}
			seen(op(g, wire.OpPing, f))
			// The newest truncate comes again, after whatever was written.
			if c.state.exists && c.state.log != 0 {
				ok(punch(g, f, 1, c.state.log))
				if err := c.check(g, f, limit); err != nil {
					t.Fatalf("step %d: truncate was repeated: %v", step, err)
				}
			}
		case x == 22:
			abandon(g)
			boot++
			m = m.CrashClone(r.Uint64())
			opts.FS, opts.BootID = m, fmt.Sprintf("b%d", boot)
			g = open(t, opts)
			if !g.LostUnflushed() {
				t.Fatal("power failure not noticed")
			}
			if err := g.WalkObjects(func(i ObjectInfo) {
				if i.Err != nil && !i.Unfinished {
					t.Errorf("step %d: walk: %+v", step, i)
				}
			}); err != nil {
				t.Fatal(err)
			}
			known := make([]bool, len(objs))
			for i, c := range objs {
				known[i] = !c.pending && c.state.exists
				if err := c.check(g, fid(uint32(i*64)), limit); err != nil {
					t.Fatalf("step %d: after power failure, object %d: %v", step, i, err)
				}
			}
			if known[k] && c.state.log != 0 {
				ok(punch(g, f, 1, c.state.log))
				if err := c.check(g, f, limit); err != nil {
					t.Fatalf("step %d: truncate was repeated: %v", step, err)
				}
			}
			highest = op(g, wire.OpPing, f).LastCommitted
			// What was found may still be repeated or lost only by new changes.
			for i := range objs {
				ok(op(g, wire.OpSyncObject, fid(uint32(i*64))))
			}
		default:
			got, rep := read(g, f, 0, limit)
			ok(rep)
			if w := c.state.read(0, limit); !bytes.Equal(got, w) {
				t.Fatalf("step %d: read differs", step)
			}
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}
